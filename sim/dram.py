"""A DRAM channel in time: kernels that say when a command may issue, and why not sooner.

The kernels take `DramParams` (see `tilewright.arch.dram` for what its constraints mean) and a `DramState`; any
machine with DRAM calls them from its own loop. `DramChannel` is the same for people: one command at a time
in strict mode, or a list of commands through the in-order scheduler.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numba import njit

from tilewright.arch.dram import (
    Array,
    DramParams,
    Effect,
    Issued,
    Needs,
    Organisation,
    Request,
    Scope,
    Standard,
    load_dram_preset,
)
from tilewright.arch.errors import UserError
from tilewright.sim.cache import ENTRY, INNER

NEVER = -(2**40)  # the tick of a command that has not been issued: older than any latency

# The kernels use literals of this file, since a cached kernel would keep the old value of an enum that
# was renumbered elsewhere.
_CHANNEL, _BANKGROUP, _BANK = 0, 1, 2
_NEEDS_OPEN, _NEEDS_CLOSED, _NEEDS_ALL_OPEN, _NEEDS_ALL_CLOSED = 1, 2, 3, 4
_OPENS, _OPENS_ALL, _CLOSES, _CLOSES_ALL = 1, 2, 3, 4
assert [s.value for s in Scope] == [_CHANNEL, _BANKGROUP, _BANK]
assert [n.value for n in Needs] == [0, _NEEDS_OPEN, _NEEDS_CLOSED, _NEEDS_ALL_OPEN, _NEEDS_ALL_CLOSED]
assert [e.value for e in Effect] == [0, _OPENS, _OPENS_ALL, _CLOSES, _CLOSES_ALL]


class DramState(NamedTuple):
    """What a channel remembers; nodes and banks are numbered as in `DramParams`."""

    last: Array  # [n_nodes, n_commands, max_window] ticks, most recent first; NEVER at first
    open_row: Array  # [n_banks] -1 = closed


def new_state(params: DramParams) -> DramState:
    """A channel at power-up: no history, every bank closed."""
    n_nodes = 1 + params.n_bankgroups + params.n_banks
    return DramState(
        last=np.full((n_nodes, params.n_commands, params.max_window), NEVER, np.int64),
        open_row=np.full(params.n_banks, -1, np.int64),
    )


@njit(**ENTRY, forceinline=True)
def ready_tick(p, s, command, bank):
    """The earliest tick at which the constraints let `command` issue, 0 if none binds.

    `bank` is ignored for a CHANNEL command. Bank state is `legal_state`'s business.
    """
    ready = 0
    first = p.row_start[command]
    end = p.row_start[command + 1]
    if p.cmd_scope[command] == _CHANNEL:
        for row in range(first, end):
            t = s.last[0, p.row_prev[row], p.row_window[row] - 1] + p.row_latency[row]
            ready = max(ready, t)
        return ready
    group_node = p.bank_group_node[bank]
    bank_node = 1 + p.n_bankgroups + bank
    for row in range(first, end):
        scope = p.row_scope[row]
        node = 0 if scope == _CHANNEL else (group_node if scope == _BANKGROUP else bank_node)
        t = s.last[node, p.row_prev[row], p.row_window[row] - 1] + p.row_latency[row]
        ready = max(ready, t)
    return ready


@njit(**INNER)
def charge(p, s, command, bank, start, end, stalls):
    """Charge the ticks start..end-1, in which `command` waits, to the causes that hold it back.

    Each tick goes to the first cause, in charging order, with a constraint unmet in that tick; `stalls`
    [n_causes] is added to. Ticks in which nothing is unmet are charged to nobody. Call before `record`.
    Returns the tick at which the command may issue, `end` if that comes first.
    """
    charged = start
    bank_node = 1 + p.n_bankgroups + bank
    for row in range(p.row_start[command], p.row_start[command + 1]):  # rows lie in charging order
        scope = p.row_scope[row]
        node = 0
        if scope == _BANKGROUP:
            node = p.bank_group_node[bank]
        elif scope == _BANK:
            node = bank_node
        t = min(end, s.last[node, p.row_prev[row], p.row_window[row] - 1] + p.row_latency[row])
        if t > charged:
            stalls[p.row_cause[row]] += t - charged
            charged = t
    return charged


@njit(**INNER)
def _first_bank(p, command, bank):
    """The first of the banks that `command` addresses."""
    scope = p.cmd_scope[command]
    if scope == _BANK:
        return bank
    if scope == _BANKGROUP:
        return (p.bank_group_node[bank] - 1) * p.banks_per_group
    return 0


@njit(**INNER)
def _end_bank(p, command, bank):
    """One past the last of the banks that `command` addresses."""
    scope = p.cmd_scope[command]
    if scope == _BANK:
        return bank + 1
    if scope == _BANKGROUP:
        return p.bank_group_node[bank] * p.banks_per_group
    return p.n_banks


@njit(**ENTRY, forceinline=True)
def legal_state(p, s, command, bank, row):
    """Whether the banks are in the state that `command` needs.

    Where a row must be open it must be `row`; a `row` of -1 accepts any.
    """
    needs = p.cmd_needs[command]
    if needs == 0:
        return True
    first, end = 0, p.n_banks
    if needs == _NEEDS_OPEN or needs == _NEEDS_CLOSED:
        first, end = _first_bank(p, command, bank), _end_bank(p, command, bank)
    wants_open = needs == _NEEDS_OPEN or needs == _NEEDS_ALL_OPEN
    for b in range(first, end):
        held = s.open_row[b]
        if wants_open:
            if held < 0 or (row >= 0 and held != row):
                return False
        elif held >= 0:
            return False
    return True


@njit(**INNER)
def apply_effect(p, open_row, command, bank, row):
    """Open or close the rows in `open_row` [n_banks] that `command` opens or closes."""
    effect = p.cmd_effect[command]
    if effect == 0:
        return
    first, end = 0, p.n_banks
    if effect == _OPENS or effect == _CLOSES:
        first, end = _first_bank(p, command, bank), _end_bank(p, command, bank)
    opened = row if effect == _OPENS or effect == _OPENS_ALL else -1
    for b in range(first, end):
        open_row[b] = opened


@njit(**INNER)
def _remember(last, node, command, depth, tick):
    for w in range(depth - 1, 0, -1):
        last[node, command, w] = last[node, command, w - 1]
    last[node, command, 0] = tick


@njit(**ENTRY, forceinline=True)
def record(p, s, command, bank, row, tick):
    """`command` issues at `tick`: enter it in the history of its nodes and move the open rows."""
    depth = p.cmd_history[command]
    _remember(s.last, 0, command, depth, tick)
    scope = p.cmd_scope[command]
    if scope != _CHANNEL:
        _remember(s.last, p.bank_group_node[bank], command, depth, tick)
        if scope == _BANK:
            _remember(s.last, 1 + p.n_bankgroups + bank, command, depth, tick)
    apply_effect(p, s.open_row, command, bank, row)


# Scheduling --------------------------------------------------------------------------------------------


class Upkeep(NamedTuple):
    """What a scheduler must do of its own accord: commands by number, -1 where the standard has none."""

    n_refi: int  # ticks from one refresh to the next; 0 = never
    refresh: int  # refreshes all banks
    close_all: int  # closes all rows, which the refresh needs
    activate: int  # opens a row again after a refresh


@njit(cache=True)
def _logged(log, n, tick, command, bank, row):
    """`log` [capacity, 4] with one more entry at n, in a larger array where it was full."""
    if n == log.shape[0]:
        larger = np.empty((2 * n, 4), np.int64)
        for i in range(n):  # a slice assignment compiles for seconds
            for k in range(4):
                larger[i, k] = log[i, k]
        log = larger
    log[n, 0] = tick
    log[n, 1] = command
    log[n, 2] = bank
    log[n, 3] = row
    return log


@njit(**INNER)
def _send(p, s, command, bank, row, start, stalls):
    """Issue `command` at its earliest tick from `start` on, charge the wait; returns the tick."""
    tick = max(start, ready_tick(p, s, command, bank))
    charge(p, s, command, bank, start, tick, stalls)
    record(p, s, command, bank, row, tick)
    return tick


@njit(**INNER)
def _bank_to_reopen(p, s, command, bank, believed):
    """The first bank whose row `command` needs and a refresh has closed; -1 if there is none."""
    needs = p.cmd_needs[command]
    found = -1
    if needs == _NEEDS_OPEN or needs == _NEEDS_ALL_OPEN:
        first, end = 0, p.n_banks
        if needs == _NEEDS_OPEN:
            first, end = _first_bank(p, command, bank), _end_bank(p, command, bank)
        for b in range(end - 1, first - 1, -1):
            if s.open_row[b] != believed[b]:
                found = b
    return found


@njit(cache=True)
def _refresh_now(p, s, upkeep, start, log, n, stalls):
    """Close all rows if any is open, then refresh; returns the log, its length and the tick after."""
    if not legal_state(p, s, upkeep.refresh, 0, -1):
        tick = _send(p, s, upkeep.close_all, 0, -1, start, stalls)
        log = _logged(log, n, tick, upkeep.close_all, 0, -1)
        n += 1
        start = tick + 1
    tick = _send(p, s, upkeep.refresh, 0, -1, start, stalls)
    log = _logged(log, n, tick, upkeep.refresh, 0, -1)
    return log, n + 1, tick + 1


@njit(cache=True)
def _replay_in_order(p, s, view, upkeep, trace, until, stalls):
    """Issue trace [n, 4] (command, bank, row, not_before) in order, each as early as it may.

    `view` shares the history of `s`, and holds the rows as they would be without refreshes. Returns the log
    [capacity, 4] (tick, command, bank, row), its length, the ticks of the trace's commands [n], ticks in all, idle ticks,
    and the number of the first command whose bank state is wrong (-1 if none).
    """
    n_trace = trace.shape[0]
    ticks = np.full(n_trace, -1, np.int64)
    log = np.empty((max(16, 2 * n_trace), 4), np.int64)
    n = 0
    now = 0
    idle = 0
    due = upkeep.n_refi
    i = 0
    while i < n_trace or (upkeep.n_refi > 0 and due <= until):
        command, bank, row, start, tick, reopen = -1, 0, -1, max(now, due), max(now, due), -1
        if i < n_trace:
            command, bank, row = trace[i, 0], trace[i, 1], trace[i, 2]
            if not legal_state(p, view, command, bank, row):
                return log, n, ticks, now, idle, i
            reopen = _bank_to_reopen(p, s, command, bank, view.open_row)
            if reopen >= 0:
                command, bank, row = upkeep.activate, reopen, view.open_row[reopen]
            start = max(now, trace[i, 3])
            tick = max(start, ready_tick(p, s, command, bank))
        if upkeep.n_refi > 0 and tick >= due:
            # A refresh goes before any command that would not issue sooner than it falls due.
            idle += max(0, min(start, due) - now)
            if command >= 0:
                charge(p, s, command, bank, min(start, due), due, stalls)
            log, n, now = _refresh_now(p, s, upkeep, max(now, due), log, n, stalls)
            due += upkeep.n_refi
            continue
        idle += start - now
        tick = _send(p, s, command, bank, row, start, stalls)
        log = _logged(log, n, tick, command, bank, row)
        n += 1
        now = tick + 1
        if reopen < 0:
            apply_effect(p, view.open_row, command, bank, row)
            ticks[i] = tick
            i += 1
    return log, n, ticks, now, idle, -1


class IllegalCommand(ValueError):
    """A command was issued too early, or to banks in the wrong state."""


@dataclass(frozen=True)
class Replay:
    """A trace in time. Every tick issues a command, idles or stalls: ticks = sum(counts) + idle + sum(stalls)."""

    issued: list[Issued]  # every command, the scheduler's own refreshes, precharges and activates included
    issue_ticks: Array  # [n] of the trace's commands
    ticks: int  # one past the last command
    idle: int  # waiting for a command's not_before, or with nothing left but a refresh to come
    counts: dict[str, int]  # issued commands by name
    stalls: dict[str, int]  # by cause, in charging order


class DramChannel:
    """A DRAM channel: `earliest`, `probe` and `issue` one command at a time, or `replay` a trace.

    `timing` is in ticks. In strict mode (`issue`) nothing happens unasked: no refresh, no precharge.
    Raises UserError on unknown commands and on banks or rows that the channel does not have.
    """

    def __init__(self, standard: Standard, timing: Mapping[str, int], organisation: Organisation) -> None:
        self.standard = standard
        self.timing = dict(timing)
        self.organisation = organisation
        self.params = standard.compile(
            timing, bankgroups=organisation.bankgroups, banks_per_group=organisation.banks_per_group
        )
        self._index = {name: i for i, name in enumerate(standard.command_names)}
        self.reset()

    @classmethod
    def from_preset(cls, name: str) -> "DramChannel":
        preset = load_dram_preset(name)
        return cls(preset.standard, preset.timing, preset.organisation)

    def reset(self) -> None:
        """Back to power-up: every bank closed, no history."""
        self.state = new_state(self.params)
        self._free = 0  # the first tick at which the command bus is free

    def earliest(self, command: str, bank: int = 0, row: int = -1) -> int:
        """The earliest tick that the timing allows, after all commands issued so far. Says nothing of bank state."""
        c, bank, _ = self._checked(command, bank, row)
        return max(self._free, int(ready_tick(self.params, self.state, c, bank)))

    def probe(self, command: str, bank: int = 0, row: int = -1, *, tick: int) -> bool:
        """Whether `command` may issue at `tick`: by timing and by the state of its banks."""
        c, bank, row = self._checked(command, bank, row)
        return tick >= self.earliest(command, bank, row) and bool(
            legal_state(self.params, self.state, c, bank, row)
        )

    def issue(self, command: str, bank: int = 0, row: int = -1, *, tick: int) -> None:
        """Issue `command` at `tick`; raises IllegalCommand when it may not."""
        c, bank, row = self._checked(command, bank, row, issues=True)
        where = f"{command} to bank {bank} at tick {tick}"
        if not legal_state(self.params, self.state, c, bank, row):
            needs = self.standard.command(command).needs.name
            raise IllegalCommand(f"{where}: needs {needs}{f' row {row}' if row >= 0 else ''}")
        earliest = self.earliest(command, bank, row)
        if tick < earliest:
            raise IllegalCommand(f"{where}: earliest tick is {earliest}")
        record(self.params, self.state, c, bank, row, tick)
        self._free = tick + 1

    def replay(self, trace: Iterable[Request], *, refresh: bool = True, until: int = 0) -> Replay:
        """Issue `trace` in order from tick 0 on a channel at power-up, each command as early as it may.

        With `refresh`, all-bank refresh k falls due at tick k * n_refi; it is never postponed, goes before
        any command not yet issued, and closes open rows first. A row that the trace believes open is opened
        again when next needed. After the trace, refreshes go on until all that fall due by `until` are done.
        Raises UserError when the trace itself puts a bank in the wrong state. Leaves the strict mode's
        state alone.
        """
        requests = [self._checked_request(i, r) for i, r in enumerate(trace)]
        state = new_state(self.params)
        view = DramState(state.last, state.open_row.copy())
        stalls = np.zeros(len(self.standard.causes), np.int64)
        log, n, ticks, end, idle, wrong = _replay_in_order(
            self.params,
            state,
            view,
            self._upkeep(refresh),
            np.array(requests, np.int64).reshape(-1, 4),
            until,
            stalls,
        )
        log = log[:n]
        names = self.standard.command_names
        if wrong >= 0:
            command, bank, row, _ = requests[wrong]
            raise UserError(
                f"trace: command {wrong}, {names[command]} to bank {bank}, needs "
                f"{self.standard.commands[command].needs.name}{f' row {row}' if row >= 0 else ''}"
            )
        counts = np.bincount(log[:, 1], minlength=len(names))
        return Replay(
            issued=[Issued(t, names[c], b, r) for t, c, b, r in log.tolist()],
            issue_ticks=ticks,
            ticks=int(end),
            idle=int(idle),
            counts=dict(zip(names, counts.tolist(), strict=True)),
            stalls=dict(zip(self.standard.causes, stalls.tolist(), strict=True)),
        )

    def _upkeep(self, refresh: bool) -> Upkeep:
        def find(effect: Effect, scope: Scope) -> int:
            found = (
                i for i, c in enumerate(self.standard.commands) if (c.effect, c.scope) == (effect, scope)
            )
            return next(found, -1)

        if not refresh:
            return Upkeep(0, -1, -1, -1)
        for what, present in (
            ("timing n_refi", self.timing.get("n_refi", 0)),
            ("command REFab", "REFab" in self._index),
        ):
            if not present:
                raise UserError(f"{self.standard.name}: a replay with refresh needs the {what}")
        return Upkeep(
            n_refi=self.timing["n_refi"],
            refresh=self._index["REFab"],
            close_all=find(Effect.CLOSE_ALL, Scope.CHANNEL),
            activate=find(Effect.OPEN, Scope.BANK),
        )

    def _checked(
        self, command: str, bank: int, row: int, where: str = "channel", *, issues: bool = False
    ) -> tuple[int, int, int]:
        """The command's number, bank and row; a CHANNEL command has no bank, so 0.

        One that `issues` and opens a row must say which.
        """
        known = self.standard.command(command, where)
        org = self.organisation
        if known.scope is Scope.CHANNEL:
            bank = 0
        elif not 0 <= bank < org.banks:
            raise UserError(f"{where}: {command} bank must be 0 to {org.banks - 1}, not {bank}")
        opens = issues and known.effect in (Effect.OPEN, Effect.OPEN_ALL)
        if not (0 if opens else -1) <= row < org.rows:
            raise UserError(f"{where}: {command} row must be 0 to {org.rows - 1}, not {row}")
        return self._index[command], int(bank), int(row)

    def _checked_request(self, i: int, request: Request) -> tuple[int, int, int, int]:
        if request.not_before < 0:
            raise UserError(f"trace: command {i}: not_before must be 0 or more, not {request.not_before}")
        checked = self._checked(
            request.command, request.bank, request.row, f"trace: command {i}", issues=True
        )
        return *checked, request.not_before
