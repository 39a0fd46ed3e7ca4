"""A run as a picture over time: trace events that Perfetto and chrome://tracing read (`--trace`).

One process for the machine: its operators, instructions and units; one for each memory channel: its commands
and the rows that are open in each bank. `ts` and `dur` are microseconds of the machine's time, as the format
wants; viewers cut them to whole nanoseconds, so each span has its ticks among its arguments.
Format: "Trace Event Format", Chromium project; complete events ("X"), spans of a thread nest.
"""

import json
from collections.abc import Iterable, Iterator, Sequence
from math import inf, nextafter
from typing import Any, NamedTuple

import numpy as np

from tilewright import __version__
from tilewright.arch import registry
from tilewright.arch import spec as specs
from tilewright.arch.clock import Clock
from tilewright.arch.errors import UserError
from tilewright.arch.timeline import Timeline
from tilewright.arch.trace import TraceForm
from tilewright.output import replacing, say

LIMIT = 100_000  # commands of each channel
MOST = 1_000_000  # they take 32 bytes each while a machine runs

_TRACKS = 1000  # of a process, more than there are

Event = dict[str, Any]


class Span(NamedTuple):
    """Something that lasts from tick `first` to before `end`."""

    name: str
    first: int
    end: int
    args: dict[str, Any]


Tracks = Iterator[tuple[str, Sequence[Span]]]


def check_limit(limit: int) -> None:
    """Raises UserError for a limit out of range."""
    if not 1 <= limit <= MOST:
        raise UserError(f"--trace-limit must be 1 to {MOST}, not {limit}")


def write(path: str, spec: specs.Spec, timeline: Timeline, limit: int = LIMIT) -> None:
    """Write the trace of a Timeline that was simulated with `trace=limit`; says so when that cut it.

    Raises UserError when the file cannot be written.
    """
    form: TraceForm = registry.room("arch", spec.target_name).trace_form(spec)
    clock = spec.tick
    head = {
        "displayTimeUnit": "ns",
        "otherData": {
            "tilewright": __version__,
            "spec": spec.name,
            "tick_s": float(clock.period_s),
            "ticks": timeline.ticks,
            "complete": is_complete(timeline, limit),
        },
    }
    with replacing(path) as file:
        file.write(json.dumps(head)[:-1] + ', "traceEvents": [\n')
        lead = ""
        for event in events(spec.name, timeline, form, clock, limit):
            file.write(lead + json.dumps(event, separators=(",", ":")))
            lead = ",\n"
        file.write("\n]}\n")
    if not is_complete(timeline, limit):
        say(f"the trace was cut after {limit} commands of a channel, or instructions (--trace-limit)")


def is_complete(timeline: Timeline, limit: int) -> bool:
    """Whether a trace with that limit holds every span, instruction and command of the run."""
    commands = timeline.trace is None or len(timeline.trace) == timeline.events
    instructions = timeline.log is None or len(timeline.log) < limit
    return commands and instructions and len(timeline.spans) <= limit


def events(
    name: str, timeline: Timeline, form: TraceForm, clock: Clock, limit: int = LIMIT
) -> Iterator[Event]:
    """The events of a machine called `name`, track by track; the spans of a track follow each other.

    Raises AssertionError for commands of a channel that overlap.
    """
    yield from _process(1, name, _machine(timeline, form, limit), clock)
    if timeline.trace is not None:
        for channel in np.unique(timeline.trace[:, 1]).tolist():
            rows = timeline.trace[timeline.trace[:, 1] == channel]
            end = timeline.ticks if len(rows) < limit else int(rows[-1, 0]) + 1
            yield from _process(channel + 2, f"channel {channel}", _channel(rows.tolist(), form, end), clock)


def _process(pid: int, name: str, tracks: Tracks, clock: Clock) -> Iterator[Event]:
    """A process with a thread for each track."""
    yield _name("process_name", pid, pid, name)
    yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": pid, "args": {"sort_index": pid}}
    period = clock.period_s * 10**6
    a, b = period.numerator, period.denominator
    # Numbers of the system's own kind: none is 0, and no thread of one process shares that of another.
    for tid, (track, spans) in enumerate(tracks, pid * _TRACKS):
        yield _name("thread_name", pid, tid, track)
        yield {"ph": "M", "name": "thread_sort_index", "pid": pid, "tid": tid, "args": {"sort_index": tid}}
        last = 0
        for s in spans:
            assert last <= s.first < s.end, f"{name}, {track}: {s} overlaps what ends at tick {last}"
            last = s.end
            yield {
                "ph": "X",
                "name": s.name,
                "cat": track.partition(" ")[0],
                "pid": pid,
                "tid": tid,
                "ts": _microseconds(s.first, a, b),
                "dur": _microseconds(s.end - s.first, a, b),
                "args": {"tick": s.first, "ticks": s.end - s.first, **s.args},
            }


def _microseconds(ticks: int, a: int, b: int) -> float:
    """`ticks` * a / b, such that 1000 times it, cut off, is the whole nanoseconds.

    That is how Perfetto reads it (trace_processor, json_utils.cc: CoerceToTs); one nanosecond less, and a span
    would overlap the one before and be dropped.
    """
    value = ticks * a / b
    return value if int(value * 1000.0) >= 1000 * ticks * a // b else nextafter(value, inf)


def _name(kind: str, pid: int, tid: int, name: str) -> Event:
    return {"ph": "M", "name": kind, "pid": pid, "tid": tid, "args": {"name": name}}


# ---- the machine --------------------------------------------------------------------------------------


def _machine(timeline: Timeline, form: TraceForm, limit: int) -> Tracks:
    """Operators from the Timeline's spans, instructions and units from its log."""
    yield from _lanes("operators", (_operator(timeline, row) for row in timeline.spans[:limit]))
    if timeline.log is None:
        return
    log = timeline.log.tolist()
    yield from _lanes("instructions", (_instruction(timeline, form, row, 4, 7) for row in log))
    for unit in sorted({form.executes[row[3]] for row in log} - {""}):
        own = (_instruction(timeline, form, row, 5, 6) for row in log if form.executes[row[3]] == unit)
        yield from _lanes(unit, own)


def _operator(timeline: Timeline, row: np.void) -> Span:
    args: dict[str, Any] = {"segment": _segment(timeline, int(row["segment"]))}
    if row["count"] > 1:
        args |= {"repeated": int(row["count"]), "ticks at work": int(row["ticks"])}
    return Span(timeline.tags[int(row["tag"])], int(row["first"]), int(row["end"]), args)


def _instruction(timeline: Timeline, form: TraceForm, row: Sequence[int], first: int, end: int) -> Span:
    """An instruction, row of LOG, between two of its columns."""
    segment, index, tag, op = row[:4]
    args = {"operator": timeline.tags[tag], "segment": _segment(timeline, segment), "index": index}
    return Span(form.operations[op], row[first], row[end], args)


def _segment(timeline: Timeline, number: int) -> str:
    label = timeline.labels[number] if number < len(timeline.labels) else ""
    return label or str(number)


def _lanes(name: str, spans: Iterable[Span]) -> Tracks:
    """The spans on as many tracks as it takes for none to overlap: each goes to the first that is free."""
    lanes: list[list[Span]] = []
    for span in sorted(spans, key=lambda s: (s.first, -s.end)):
        lane = next((x for x in lanes if x[-1].end <= span.first), None)
        if lane is None:
            lanes.append(lane := [])
        lane.append(span)
    for i, lane in enumerate(lanes):
        yield f"{name} ({i + 1})" if i else name, lane


# ---- a channel ----------------------------------------------------------------------------------------


def _channel(rows: Sequence[Sequence[int]], form: TraceForm, end: int) -> Tracks:
    """Commands and open rows; `rows` as in Timeline.trace, of which nothing is known from tick `end` on."""
    yield "commands", list(_commands(rows, form, end))
    for bank, spans in enumerate(_open_rows(rows, form, end)):
        if spans:
            yield f"bank {bank}", spans


def _commands(rows: Sequence[Sequence[int]], form: TraceForm, end: int) -> Iterator[Span]:
    """One span for each command, or for a burst: equal commands at full speed on one bank and row."""
    i = 0
    while i < len(rows):
        first, _, command, bank, row = rows[i]
        last, j = first, i + 1
        while (
            j < len(rows)
            and rows[j][2:] == [command, bank, row]
            and rows[j][0] - last <= form.cadence[command]
        ):
            last, j = rows[j][0], j + 1
        until = min(last + form.holds[command], rows[j][0] if j < len(rows) else end)
        args = {"count": j - i} | ({"bank": bank} if bank >= 0 else {}) | ({"row": row} if row >= 0 else {})
        yield Span(form.commands[command], first, until, args)
        i = j


def _open_rows(rows: Sequence[Sequence[int]], form: TraceForm, end: int) -> list[list[Span]]:
    """For each bank, its open rows; what is still open at `end` ends there, and says so."""
    spans: list[list[Span]] = [[] for _ in range(form.banks)]
    open_row: dict[int, tuple[int, int]] = {}  # by bank: row, and since when
    for tick, _, command, bank, row in rows:
        named = range(form.banks) if bank < 0 else (bank,)
        if command in form.opens:
            open_row.update(dict.fromkeys(named, (row, tick)))
        elif command in form.closes:
            for b in named:
                if b in open_row:
                    opened, since = open_row.pop(b)
                    spans[b].append(Span(f"row {opened}", since, tick, {"row": opened}))
    for b, (opened, since) in open_row.items():
        spans[b].append(Span(f"row {opened}", since, end, {"row": opened, "closed": False}))
    return spans
