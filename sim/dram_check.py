"""An independent referee for DRAM traces: slow, plain, and straight from the standard's own constraints.

It shares nothing with the kernels but the `Standard`: no compiled rows, no merged maxima, no histories of
fixed depth. Use it to judge the trace of any scheduler, ours or another tool's.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tilewright.arch.dram import Effect, Issued, Needs, Organisation, Scope, Standard, evaluate


@dataclass(frozen=True)
class Violation:
    """The first command of a trace that may not issue when it does, and the first rule it breaks."""

    index: int  # in the trace
    tick: int
    command: str
    title: str
    earliest: int | None  # the tick from which that rule would allow it; None when no waiting helps

    def __str__(self) -> str:
        until = "" if self.earliest is None else f", not before tick {self.earliest}"
        return f"command {self.index}, {self.command} at tick {self.tick}: {self.title}{until}"


def check_trace(
    standard: Standard, timing: Mapping[str, int], organisation: Organisation, trace: Iterable[Issued]
) -> Violation | None:
    """The first violation in a trace (in order of ticks, from power-up), or None if it is legal.

    Rules in order: one command a tick; the state of the banks; each constraint as the standard lists them.
    """
    per_group = organisation.banks_per_group

    def banks_of(command: str, bank: int) -> list[int]:
        scope = standard.command(command).scope
        everything = list(range(organisation.banks))
        if scope is Scope.BANK:
            return [bank]
        return [b for b in everything if scope is Scope.CHANNEL or b // per_group == bank // per_group]

    def node(scope: Scope, bank: int) -> int:
        return {Scope.CHANNEL: 0, Scope.BANKGROUP: bank // per_group, Scope.BANK: bank}[scope]

    open_row: dict[int, int] = {}
    past: list[Issued] = []
    for index, entry in enumerate(trace):
        tick, name, bank, row = entry
        command = standard.command(name, f"trace: command {index}")

        def broken(title: str, earliest: int | None, i: int = index, e: Issued = entry) -> Violation:
            return Violation(i, e.tick, e.command, title, earliest)

        bus_free = past[-1].tick + 1 if past else 0
        if tick < bus_free:
            return broken("channel: one command a tick", bus_free)

        addressed = banks_of(name, bank)
        every = list(range(organisation.banks))
        if command.needs in (Needs.OPEN, Needs.ALL_OPEN):
            for b in addressed if command.needs is Needs.OPEN else every:
                if b not in open_row or (row >= 0 and open_row[b] != row):
                    return broken(f"state: bank {b} needs an open row", None)
        if command.needs in (Needs.CLOSED, Needs.ALL_CLOSED):
            for b in addressed if command.needs is Needs.CLOSED else every:
                if b in open_row:
                    return broken(f"state: bank {b} needs no open row", None)

        for constraint in standard.constraints:
            for before, following in standard.pairs(constraint):
                if following != name:
                    continue
                same_node = [
                    old.tick
                    for old in past
                    if old.command == before
                    and node(constraint.scope, old.bank) == node(constraint.scope, bank)
                ]
                if len(same_node) >= constraint.window:
                    earliest = same_node[-constraint.window] + max(evaluate(constraint.latency, timing), 1)
                    if tick < earliest:
                        return broken(str(constraint), earliest)

        past.append(entry)
        match command.effect:
            case Effect.OPEN:
                open_row.update(dict.fromkeys(addressed, row))
            case Effect.OPEN_ALL:
                open_row.update(dict.fromkeys(every, row))
            case Effect.CLOSE:
                for b in addressed:
                    open_row.pop(b, None)
            case Effect.CLOSE_ALL:
                open_row.clear()
    return None
