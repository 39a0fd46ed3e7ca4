"""The system scheduler: task graphs on devices and links, merged in exact time.

Every device and link serves one task at a time and never interrupts it. It never waits while one of its
tasks is ready, and takes the one that became ready first; among those, the lowest `priority`, then the first
in the list. `in_order` serves each device's tasks in the listed order instead, as a command queue does.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heapify, heappop, heappush
from math import ceil
from typing import NamedTuple

import numpy as np

from tilewright.arch.clock import Clock
from tilewright.arch.errors import UserError, nearest
from tilewright.arch.system import Graph, System, Task, resolve, successors, topological
from tilewright.arch.timeline import SPAN, Timeline

# Why a device or link stands still, in the order of charging: one of its tasks still to come waits for
# another task; else one of them waits for its `not_before`; else nothing is left for it to do.
CAUSES = ("dependency", "not_before", "idle")


class Placed(NamedTuple):
    """One task in system ticks: `device` serves it in [start, end); its result is there at `arrival`."""

    name: str
    device: str
    ready: int
    start: int
    end: int
    arrival: int


@dataclass(frozen=True, kw_only=True)
class Schedule:
    """A task graph placed in time.

    `tasks` in the order given; `ticks` is the last arrival. `usage` maps each device and link to its busy
    ticks and its stalls by cause; for each of them, busy plus stalls is `ticks`.
    """

    clock: Clock
    ticks: int
    tasks: tuple[Placed, ...]
    usage: dict[str, dict[str, int]]

    def task(self, name: str) -> Placed:
        """The placed task of that name. Raises UserError with the nearest name."""
        for placed in self.tasks:
            if placed.name == name:
                return placed
        raise UserError(f"unknown task {name!r}: {nearest(name, (t.name for t in self.tasks))}")

    def timeline(self) -> Timeline:
        """The schedule as a Timeline: a tag for each task, a unit for each device and link."""
        units = tuple(self.usage)
        position = {name: i for i, name in enumerate(units)}
        spans = np.zeros(len(self.tasks), SPAN)
        activity = np.zeros((len(self.tasks) + 1, len(units), 1 + len(CAUSES)), np.int64)
        for i, t in enumerate(self.tasks):
            spans[i] = (0, i, t.start, t.arrival, t.arrival - t.start, 1)
            activity[i, position[t.device], 0] = t.end - t.start
        for unit, use in self.usage.items():
            activity[-1, position[unit], 1:] = [use[cause] for cause in CAUSES]
        return Timeline(
            ticks=self.ticks,
            tags=tuple(t.name for t in self.tasks),
            spans=spans,
            counter_names=(),
            counters=np.zeros((len(self.tasks) + 1, 0), np.int64),
            units=units,
            causes=CAUSES,
            activity=activity,
            waiting=CAUSES,  # a device that waits, however it does, has nothing to do
        )


def schedule(system: System, tasks: Sequence[Task]) -> Schedule:
    """The tasks on the system, first ready first served. Raises UserError as `resolve` does."""
    graph = resolve(system, tasks)
    ready, start = _serve(graph)
    return _collect(system, graph, ready, start)


def in_order(system: System, tasks: Sequence[Task]) -> Schedule:
    """The tasks on the system, each device and link serving its own by priority, then in the listed order.

    Raises UserError as `resolve` does, and when that order contradicts the dependencies.
    """
    graph = resolve(system, tasks)
    n = len(graph.names)
    ahead: list[tuple[int, ...]] = [()] * n  # the task that the same server serves just before
    last: dict[int, int] = {}
    for i in sorted(range(n), key=lambda i: (graph.priority[i], i)):
        if graph.service[i]:
            server = graph.server[i]
            if server in last:
                ahead[i] = (last[server],)
            last[server] = i
    ready, start = [0] * n, [0] * n
    for i in topological(graph.names, [b + a for b, a in zip(graph.before, ahead, strict=True)]):
        ready[i] = max(
            [graph.release[i], *(start[j] + graph.service[j] + graph.lag[j] for j in graph.before[i])]
        )
        start[i] = max([ready[i], *(start[j] + graph.service[j] for j in ahead[i])])
    return _collect(system, graph, ready, start)


_ARRIVE, _READY, _FREE = range(3)


def _serve(graph: Graph) -> tuple[list[int], list[int]]:
    """Ready and start tick of every task, by events in order of time."""
    n = len(graph.names)
    followers = successors(graph.before)
    missing = [len(b) for b in graph.before]
    ready, start = list(graph.release), [0] * n
    waiting: list[list[tuple[int, int, int]]] = [[] for _ in graph.servers]
    free = [True] * len(graph.servers)
    events = [(ready[i], _READY, i) for i in range(n) if not missing[i]]
    heapify(events)
    while events:
        now = events[0][0]
        touched: set[int] = set()
        # Everything that happens in this tick is known before any server chooses.
        while events and events[0][0] == now:
            _, event, i = heappop(events)
            if event == _ARRIVE:
                for j in followers[i]:
                    missing[j] -= 1
                    ready[j] = max(ready[j], now)
                    if not missing[j]:
                        heappush(events, (ready[j], _READY, j))
            elif event == _FREE:
                free[i] = True
                touched.add(i)
            elif graph.service[i]:
                heappush(waiting[graph.server[i]], (now, graph.priority[i], i))
                touched.add(graph.server[i])
            else:
                start[i] = now
                heappush(events, (now + graph.lag[i], _ARRIVE, i))
        for server in touched:
            if free[server] and waiting[server]:
                i = heappop(waiting[server])[2]
                start[i], free[server] = now, False
                end = now + graph.service[i]
                heappush(events, (end, _FREE, server))
                heappush(events, (end + graph.lag[i], _ARRIVE, i))
    return ready, start


def _collect(system: System, graph: Graph, ready: Sequence[int], start: Sequence[int]) -> Schedule:
    end = [s + d for s, d in zip(start, graph.service, strict=True)]
    arrival = [e + lag for e, lag in zip(end, graph.lag, strict=True)]
    total = max(arrival, default=0)
    served: list[list[int]] = [[] for _ in graph.servers]
    for i, server in enumerate(graph.server):
        if graph.service[i]:
            served[server].append(i)
    usage = {}
    for name, own in zip(graph.servers, served, strict=True):

        def standing(until: int, own: Sequence[int] = own) -> int:
            """Ticks before `until` in which this server stands still."""
            return until - sum(min(end[i], until) - min(start[i], until) for i in own)

        # A task waits for others in every tick before its last predecessor arrives.
        depends = max((arrival[j] for i in own for j in graph.before[i]), default=0)
        released = max([depends, *(graph.release[i] for i in own)])
        stalls = [standing(depends), standing(released), standing(total)]
        usage[name] = {
            "busy": total - stalls[2],
            "dependency": stalls[0],
            "not_before": stalls[1] - stalls[0],
            "idle": stalls[2] - stalls[1],
        }
    rows = zip(graph.names, graph.server, ready, start, end, arrival, strict=True)
    tasks = tuple(Placed(name, graph.servers[s], r, b, e, a) for name, s, r, b, e, a in rows)
    return Schedule(clock=system.clock, ticks=total, tasks=tasks, usage=usage)


def embed(
    system: System, placed: Placed, firsts: Iterable[int], ends: Iterable[int]
) -> tuple[list[int], list[int]]:
    """Spans [first, end) of the Timeline behind a task, from the device's ticks to system ticks.

    Firsts are rounded down and ends up, so the last end is the task's own. Raises UserError when the task's
    device is a link.
    """
    device = next((d for d in system.devices if d.name == placed.device), None)
    if device is None:
        raise UserError(f"task {placed.name}: {placed.device} is not a device and has no Timeline")
    ratio = system.ratio(device)
    return [placed.start + int(f * ratio) for f in firsts], [placed.start + ceil(e * ratio) for e in ends]
