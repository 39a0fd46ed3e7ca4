"""`tilewright flash`: a page trace on a flash device, as tables and as JSON."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright import __version__, output
from tilewright.arch.errors import UserError
from tilewright.arch.flash import KINDS, POLICIES, FlashSpec, load_flash, read_trace
from tilewright.devices import spec_hash
from tilewright.sim.flash import FlashRun, IllegalOperation, percentile, simulate
from tilewright.tables import engineering, grid, percent

# Latency percentiles as part, whole, name.
_PERCENTILES = ((50, 100, "p50"), (90, 100, "p90"), (99, 100, "p99"), (999, 1000, "p99.9"))
_MOST_DIES = 16  # with a row of their own


@dataclass(frozen=True)
class Replayed:
    """A trace on a device."""

    spec: FlashSpec
    trace: str
    run: FlashRun

    def seconds(self, ticks: float) -> float:
        return ticks * float(self.spec.tick.period_s)


def replay(name: str, sets: Sequence[str], trace: str) -> Replayed:
    """Run the page trace of a file on a preset or YAML file. Raises UserError, naming the line of the trace."""
    spec = load_flash(name, sets)
    pages = read_trace(output.read_text(trace, "trace").splitlines(), trace, spec)
    try:
        return Replayed(spec, trace, simulate(spec.params(), pages.operations))
    except IllegalOperation as error:
        raise UserError(f"{pages.places[error.index]}: {error.reason}") from None


def _latencies(run: FlashRun, kind: int) -> dict[str, int | float]:
    """Ticks from admission to completion; empty where there is no such operation."""
    values = run.latency(kind)
    if not len(values):
        return {}
    named = {name: percentile(values, part, whole) for part, whole, name in _PERCENTILES}
    return {"min": int(values[0]), "mean": float(values.mean()), **named, "max": int(values[-1])}


def document(done: Replayed) -> dict[str, Any]:
    """What `--json` writes."""
    line, period = done.run.timeline, done.spec.tick.period_s
    seconds = done.seconds(line.ticks)
    operations, moved = line.counter("operations"), line.counter("bytes")
    dies = line.units[len(done.run.channel_bytes) :]
    return {
        "tilewright": __version__,
        "spec": done.spec.name,
        "spec_hash": spec_hash(done.spec),
        "trace": done.trace,
        "cycles": line.ticks,
        "tick_s": f"{period.numerator}/{period.denominator}",
        "time_s": seconds,
        "operations_per_s": operations / seconds,
        "bytes_per_s": moved / seconds,
        "counters": line.totals(),
        "most_erases": done.run.most_erases,
        "bound_by": line.bound_by(),
        "kinds": {
            kind: {
                **dict(zip(line.counter_names, line.counters[k].tolist(), strict=True)),
                "latency_ticks": _latencies(done.run, k),
            }
            for k, kind in enumerate(KINDS)
        },
        "channels": {
            f"channel {c}": {"bytes_read": r, "bytes_programmed": w}
            for c, (r, w) in enumerate(done.run.channel_bytes.tolist())
        },
        "dies": {
            name: dict(zip(("reads", "programs", "erases"), counts, strict=True))
            for name, counts in zip(dies, done.run.die_operations.tolist(), strict=True)
        },
        "units": {
            unit: {"busy": ticks.pop("busy"), "stalls": ticks}
            for unit in line.units
            for ticks in (line.unit(unit),)
        },
        "assumed": done.spec.assumed(),
        "spans": [
            {"name": KINDS[s["tag"]], "start": int(s["first"]), "end": int(s["end"])} for s in line.spans
        ],
    }


def tables(done: Replayed) -> list[Any]:
    """What the command prints."""
    spec, run, line = done.spec, done.run, done.run.timeline
    seconds = done.seconds(line.ticks)
    policy = spec.scheduler.policy
    kinds = grid("", "operation", ">count", ">moved", ">mean", ">p50", ">p99", ">p99.9", ">max latency")
    for k, kind in enumerate(KINDS):
        latency = _latencies(run, k)
        if not latency:
            continue
        count, moved = int(line.counters[k, 0]), int(line.counters[k, line.counter_names.index("bytes")])
        shown = [engineering(done.seconds(latency[n]), "s") for n in ("mean", "p50", "p99", "p99.9", "max")]
        kinds.add_row(kind, str(count), engineering(moved / seconds, "B/s"), *shown)
    units = grid("", "unit", ">busy %", "stalled for (% of the run)")
    channels = len(run.channel_bytes)
    for number in range(channels):
        units.add_row(f"channel {number}", *_shares(done, [number]))
    dies = range(channels, len(line.units))
    if len(dies) <= _MOST_DIES:
        for number in dies:
            units.add_row(line.units[number], *_shares(done, [number]))
    else:
        per = len(dies) // channels
        for c in range(channels):
            mine = dies[c * per : (c + 1) * per]
            units.add_row(f"dies {c}.* ({per})", *_shares(done, mine))
    total = line.totals()
    facts = [f"{total['multi_plane_commands']} of {total['commands']} commands are multi-plane"]
    if total["suspensions"]:
        facts.append(f"{total['suspensions']} suspensions")
    if run.most_erases:
        facts.append(f"a block is erased at most {run.most_erases} times")
    rate = engineering(total["operations"] / seconds, "op/s")
    return [
        f"{spec.name}: {spec.description}",
        f"policy {policy}: {POLICIES[policy].title}",
        "", kinds, "", units, "",
        f"{engineering(seconds, 's')}; {rate}; {engineering(total['bytes'] / seconds, 'B/s')}; bound by {line.bound_by()}",
        "; ".join(facts),
        f"assumed: {len(spec.assumed())} of {len(spec.provenance)} values of the preset",
    ]  # fmt: skip


def _shares(done: Replayed, units: Sequence[int]) -> tuple[str, str]:
    """Busy, and stalls from the longest down, in percent of the run; the mean of several units."""
    line = done.run.timeline
    ticks = line.activity.sum(axis=0)[list(units)].sum(axis=0)
    whole = line.ticks * len(units)
    order = np.argsort(-ticks[1:], kind="stable")
    named = [f"{line.causes[i]} {percent(ticks[1 + i], whole)}" for i in order if ticks[1 + i]]
    return percent(ticks[0], whole), ", ".join(named)
