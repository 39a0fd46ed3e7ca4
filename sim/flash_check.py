"""An independent oracle for page operations: slow, plain, and straight from the rules of `tilewright.sim.flash`.

It shares nothing with the kernels but spec and operations: no events, lists or running sums. From one instant
to the next it looks at every operation, asks each rule again, and charges the ticks in between one by one to
what holds throughout.
"""

from collections import defaultdict
from dataclasses import dataclass, field
from math import ceil

import numpy as np

from tilewright.arch.flash import KINDS, POLICIES, FlashSpec

READ, PROGRAM, ERASE = KINDS


@dataclass(eq=False)
class _Op:
    index: int
    arrival: int
    kind: str
    channel: int
    chip: int
    die: int
    plane: int
    block: int
    page: int
    bytes: int
    waits_for: "list[_Op]" = field(default_factory=list)
    admitted: int | None = None
    issued: int | None = None
    done: int | None = None

    @property
    def ready(self) -> bool:
        return all(other.done is not None for other in self.waits_for)


@dataclass(eq=False)
class _Command:
    kind: str
    ops: list[_Op]
    left: int  # ticks of the array
    start: int = 0  # of the array
    suspensions: int = 0

    @property
    def end(self) -> int:
        return self.start + self.left


@dataclass(eq=False)
class _Unit:
    """A die, or a chip."""

    dies: list[tuple[int, int]]  # chip, die
    command: _Command | None = None  # on the bus or in the array
    holds: _Command | None = None  # a read that has ended and cannot leave the page register
    out: list[_Op] = field(default_factory=list)  # pages in the register that data leaves from
    suspended: _Command | None = None


@dataclass(eq=False)
class _Channel:
    units: list[_Unit]
    queue: list[_Op] = field(default_factory=list)
    turn: int = 0
    data: _Op | None = None
    command: _Command | None = None
    free_at: int = 0


@dataclass(frozen=True)
class Expected:
    """What should happen: ticks for each operation, and ticks of each unit by "busy <kind>" or cause."""

    ticks: int
    admitted: list[int]
    issued: list[int]
    done: list[int]
    activity: dict[str, dict[str, int]]
    counters: dict[tuple[str, str], int]  # (kind, counter)


def expected(spec: FlashSpec, operations: np.ndarray) -> Expected:
    """Operations OPERATION[n] in time. The trace must be legal."""
    return _Oracle(spec, operations).run()


class _Oracle:
    def __init__(self, spec: FlashSpec, operations: np.ndarray) -> None:
        self.spec, self.policy = spec, POLICIES[spec.scheduler.policy]
        self.ops = [
            _Op(i, arrival, KINDS[kind], *place)
            for i, (arrival, kind, *place) in enumerate(operations.tolist())
        ]
        self._find_dependences()
        g = spec.geometry
        dies = [(w, d) for w in range(g.chips_per_channel) for d in range(g.dies_per_chip)]
        self.channels = []
        for _ in range(g.channels):
            if self.policy.unit == "die":
                units = [_Unit([die]) for die in dies]
            else:
                units = [_Unit([die for die in dies if die[0] == w]) for w in range(g.chips_per_channel)]
            self.channels.append(_Channel(units))
        self.counters: dict[tuple[str, str], int] = defaultdict(int)

    def _find_dependences(self) -> None:
        for i, op in enumerate(self.ops):
            place = (op.channel, op.chip, op.die, op.plane, op.block)
            earlier = [o for o in self.ops[:i] if (o.channel, o.chip, o.die, o.plane, o.block) == place]
            if op.kind == ERASE:
                op.waits_for = earlier
            elif op.kind == PROGRAM:
                op.waits_for = [o for o in earlier if o.kind != READ][-1:]
            else:
                op.waits_for = [
                    o for o in earlier if o.kind == ERASE or (o.kind == PROGRAM and o.page == op.page)
                ][-1:]

    # -- times

    def _ns(self, ns: object) -> int:
        return ceil(ns / self.spec.tick_ns)  # type: ignore[operator]

    def _array_ticks(self, op: _Op) -> int:
        cells = self.spec.cells
        if op.kind == ERASE:
            return self._ns(cells.erase_us * 1000)
        ticks = self._ns(getattr(cells, f"{op.kind}_{cells.page_type(op.page)}_us") * 1000)
        if op.kind == READ and self.spec.scheduler.cache_read:
            ticks += self._ns(cells.cache_busy_us * 1000)
        return ticks

    def _move_ticks(self, op: _Op) -> int:
        return ceil(op.bytes * 1000 / self.spec.interface.mb_per_s / self.spec.tick_ns)

    def _command_ticks(self, kind: str, planes: int) -> int:
        bus = self.spec.interface
        first, more = getattr(bus, f"{kind}_command_ns"), getattr(bus, f"{kind}_command_plane_ns")
        return self._ns(first) + (planes - 1) * self._ns(more)

    # -- who waits

    def _window(self, channel: int, unit: _Unit, kind: str) -> list[_Op]:
        waiting = [
            o
            for o in self.ops
            if o.admitted is not None and o.issued is None and o.kind == kind
            and o.channel == channel and (o.chip, o.die) in unit.dies
        ]  # fmt: skip
        return waiting[: self.spec.scheduler.window]

    def _group(self, window: list[_Op]) -> list[_Op]:
        group: list[_Op] = []
        for op in window:
            if not op.ready or (group and not self._joins(op, group)):
                continue
            group.append(op)
        return group

    def _joins(self, op: _Op, group: list[_Op]) -> bool:
        first = group[0]
        return (
            self.spec.scheduler.multi_plane
            and (op.chip, op.die) == (first.chip, first.die)
            and op.plane not in [o.plane for o in group]
            and (op.page == first.page or not self.spec.scheduler.same_page)
        )

    def _suspendable(self, unit: _Unit, now: int) -> bool:
        command, rules = unit.command, self.spec.suspension
        if command is None or unit.suspended or command.kind == READ:
            return False
        if rules.of not in (command.kind, "both") or command.suspensions >= rules.limit:
            return False
        return command.end - now > self._suspend_ticks(command.kind)

    def _suspend_ticks(self, kind: str) -> int:
        return self._ns(getattr(self.spec.suspension, f"{kind}_us") * 1000)

    # -- what happens in an instant

    def _finish(self, op: _Op, now: int) -> None:
        op.done = now

    def _leave_register(self, channel: _Channel, unit: _Unit) -> None:
        """A read that has ended goes on, if the register that data leaves from is empty."""
        if unit.holds is None or unit.out:
            return
        unit.out = list(unit.holds.ops)
        channel.queue += unit.holds.ops
        if self.spec.scheduler.cache_read:
            unit.holds = None

    def _bus_ends(self, channel: _Channel, now: int) -> None:
        if channel.free_at != now:
            return
        if channel.data is not None:
            op, channel.data = channel.data, None
            unit = next(u for u in channel.units if op in u.out)
            self._finish(op, now)
            unit.out.remove(op)
            if not unit.out and not self.spec.scheduler.cache_read:
                unit.holds = None
            self._leave_register(channel, unit)
        channel.command = None

    def _array_ends(self, channel: _Channel, unit: _Unit, now: int) -> None:
        command = unit.command
        if command is None or command.end != now:
            return
        unit.command = None
        if command.kind == READ:
            unit.holds = command
            self._leave_register(channel, unit)
        else:
            for op in command.ops:
                self._finish(op, now)

    def _admit(self, now: int) -> None:
        depth = self.spec.scheduler.queue_depth
        for op in self.ops:
            open_ = sum(o.admitted is not None and o.done is None for o in self.ops)
            if op.admitted is None:
                if op.arrival > now or (depth and open_ >= depth):
                    return
                op.admitted = now

    def _idle(self, unit: _Unit) -> bool:
        return unit.command is None and unit.holds is None

    def _resume(self, number: int, channel: _Channel, now: int) -> None:
        for unit in channel.units:
            if unit.suspended is None or not self._idle(unit):
                continue
            if not any(o.ready for o in self._window(number, unit, READ)):
                unit.command, unit.suspended = unit.suspended, None
                unit.command.start = now

    def _dispatch(self, number: int, channel: _Channel, now: int) -> bool:
        """Start one thing on a free bus."""
        for stage in self.policy.stages:
            if stage == ("data_out",):
                if channel.queue:
                    channel.data = channel.queue.pop(0)
                    channel.free_at = now + self._move_ticks(channel.data)
                    return True
                continue
            for k in range(len(channel.units)):
                at = (channel.turn + k) % len(channel.units)
                for kind in stage:
                    if self._send(number, channel, channel.units[at], kind, now):
                        channel.turn = (at + 1) % len(channel.units)
                        return True
        return False

    def _send(self, number: int, channel: _Channel, unit: _Unit, kind: str, now: int) -> bool:
        group = self._group(self._window(number, unit, kind))
        if not group:
            return False
        bus, array = self._command_ticks(kind, len(group)), max(map(self._array_ticks, group))
        if not self._idle(unit):
            if kind != READ or not self._suspendable(unit, now):
                return False
            stopped = unit.command
            assert stopped is not None
            stopped.left, stopped.suspensions = stopped.end - now, stopped.suspensions + 1
            unit.suspended = stopped
            self.counters[stopped.kind, "suspensions"] += 1
            bus += self._ns(self.spec.suspension.command_ns)
            array += self._suspend_ticks(stopped.kind)
        elif kind != READ and (unit.out or unit.suspended):
            return False
        if kind == PROGRAM:
            bus += sum(map(self._move_ticks, group))
        for op in group:
            op.issued = now
            self.counters[kind, "bytes"] += op.bytes
        self.counters[kind, "operations"] += len(group)
        self.counters[kind, "commands"] += 1
        self.counters[kind, "multi_plane_commands"] += len(group) > 1
        unit.command = _Command(kind, group, array, start=now + bus)
        if bus:
            channel.command, channel.free_at = unit.command, now + bus
        return True

    # -- ticks by cause

    def _channel_does(self, number: int, channel: _Channel) -> str:
        mine = [o for o in self.ops if o.channel == number]
        if channel.data is not None:
            return "busy read"
        if channel.command is not None:
            return f"busy {channel.command.kind}"
        if any(o.admitted is not None and o.done is None for o in mine):
            return "array"
        return "host" if any(o.admitted is None for o in mine) else "idle"

    def _die_does(self, number: int, channel: _Channel, unit: _Unit, die: tuple[int, int], now: int) -> str:
        mine = [o for o in self.ops if o.channel == number and (o.chip, o.die) == die]
        command = unit.command
        if command is not None and command.ops[0] in mine:
            return f"busy {command.kind}" if now >= command.start else "transfer"
        held = [*unit.out, *(unit.holds.ops if unit.holds else ())]
        if any(o in mine for o in held):
            return "transfer"
        if unit.suspended is not None and unit.suspended.ops[0] in mine:
            return "suspended"
        if any(o.admitted is not None and o.issued is None for o in mine):
            return "bus" if self._idle(unit) else "sibling"
        return "host" if any(o.admitted is None for o in mine) else "idle"

    # -- from one instant to the next

    def _next(self, now: int) -> int:
        times = [o.arrival for o in self.ops if o.admitted is None and o.arrival > now]
        for channel in self.channels:
            if channel.data is not None or channel.command is not None:
                times.append(channel.free_at)
            times += [u.command.end for u in channel.units if u.command is not None]
        return min(t for t in times if t > now)

    def run(self) -> Expected:
        activity: dict[str, dict[str, int]] = defaultdict(lambda: defaultdict(int))
        now = 0
        while True:
            for channel in self.channels:
                self._bus_ends(channel, now)
            for channel in self.channels:
                for unit in channel.units:
                    self._array_ends(channel, unit, now)
            self._admit(now)
            for number, channel in enumerate(self.channels):
                self._resume(number, channel, now)
                while channel.data is None and channel.command is None:
                    if not self._dispatch(number, channel, now):
                        break
            if all(op.done is not None for op in self.ops):
                break
            later = self._next(now)
            for number, channel in enumerate(self.channels):
                activity[f"channel {number}"][self._channel_does(number, channel)] += later - now
                for unit in channel.units:
                    for die in unit.dies:
                        does = self._die_does(number, channel, unit, die, now)
                        activity[f"die {number}.{die[0]}.{die[1]}"][does] += later - now
            now = later
        return Expected(
            ticks=now,
            admitted=[int(o.admitted or 0) for o in self.ops],
            issued=[int(o.issued or 0) for o in self.ops],
            done=[int(o.done or 0) for o in self.ops],
            activity={name: dict(ticks) for name, ticks in activity.items()},
            counters=dict(self.counters),
        )
