"""What a run came to: one form for a machine modelled in cycles and for a device known by its roofline."""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.arch.clock import Clock
from tilewright.arch.energy import EnergyRow, energy_by_tag
from tilewright.arch.scenario import Scenario, TagInfo
from tilewright.arch.spec import Spec
from tilewright.arch.timeline import Timeline


@dataclass(frozen=True, kw_only=True)
class Spans:
    """When the device worked for what; one row for each operator and layer, or (`step` >= 0) for each step.

    Arrays have one element a row. `tag` indexes `tags`; `energy_j` is None where it is not known.
    """

    tags: Sequence[TagInfo]
    tag: NDArray[np.int64]
    step: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    cycles: NDArray[np.int64]
    energy_j: NDArray[np.floating[Any]] | None
    bound_by: Sequence[str]

    def rows(self) -> Iterator[dict[str, Any]]:
        """The rows in the form of the JSON contract."""
        for i, t in enumerate(self.tag):
            tag = self.tags[t]
            row: dict[str, Any] = {"name": tag.name, "op": tag.op, "layer": tag.layer}
            if self.step[i] >= 0:
                row["step"] = int(self.step[i])
            yield row | {
                "start": int(self.start[i]),
                "end": int(self.end[i]),
                "cycles": int(self.cycles[i]),
                "energy_j": None if self.energy_j is None else float(self.energy_j[i]),
                "bound_by": self.bound_by[i] or None,
            }


@dataclass(frozen=True)
class Operator:
    """An operator kind, summed over layers and steps. The name is empty for what belongs to no operator.

    `inside`: it works within another one, alongside others; its cycles, from its first to its last, are part of that one's.
    """

    name: str
    calls: int
    cycles: int
    energy_j: float | None
    bound_by: str
    inside: bool = False


@dataclass(frozen=True, kw_only=True)
class Result:
    """A run of one device.

    `assumed` are keys of the spec, `choices` what this run assumed beside them. `lower_bound`: times are bounds
    from below (a roofline of unknown efficiency). `beside` are the runs that the mapper holds against this one, each
    with its `way`.
    """

    spec: Spec
    cycles: int
    tick: Clock
    energy_j: float | None
    counters: Mapping[str, int]
    units: Mapping[str, Mapping[str, Any]]
    operators: Sequence[Operator]
    spans: Spans
    model: str | None = None
    scenario: Scenario | None = None
    params: Any = None
    assumed: Sequence[str] = ()
    notes: Sequence[str] = field(default=())
    choices: Sequence[str] = ()
    lower_bound: bool = False
    way: str = ""
    beside: Sequence["Result"] = ()

    @property
    def name(self) -> str:
        """The device's, with the way in which it was used if that is not its usual one."""
        return f"{self.spec.name} {self.way}".rstrip()

    @property
    def time_s(self) -> Fraction:
        return self.cycles * self.tick.period_s

    @property
    def tokens(self) -> int:
        """Tokens generated, over the whole batch."""
        return self.scenario.generate * self.scenario.batch if self.scenario else 0

    @property
    def tokens_per_s(self) -> float | None:
        """Generated tokens by the time of the whole run, prompt included; None if none was generated."""
        return float(self.tokens / self.time_s) if self.tokens and self.cycles else None


# ---- from a Timeline ----------------------------------------------------------------------------------


def group(unit: str) -> str:
    """The kind of a unit that stands in a row of equals.

    >>> group("channel 3"), group("pcu@3,1"), group("asic")
    ('channels', 'pcus', 'asic')
    """
    kind, at, _ = unit.partition("@")
    if at:
        return f"{kind}s"
    match = re.fullmatch(r"(.*\D)[ _]?\d+", unit)
    return f"{match[1].rstrip(' _')}s" if match else unit


def bound_by(timeline: Timeline, shares: NDArray[np.float64]) -> str:
    """What binds the tags of which these shares count, for people: equal units go by the name of their kind."""
    tags = np.flatnonzero(shares)
    unit, cause = timeline.binding(tags.tolist(), shares[tags].tolist())
    if sum(group(u) == group(unit) for u in timeline.units) > 1:
        unit = group(unit)
    return f"{unit}: {cause}" if cause else unit


def of_timeline(
    timeline: Timeline,
    tags: Sequence[TagInfo],
    rows: Sequence[EnergyRow] | None,
    by_step: bool = False,
    step_of: Sequence[int] | None = None,
) -> dict[str, Any]:
    """Cycles, energy, counters, units, operators and spans of a Timeline: keyword arguments of `Result`.

    `step_of` has the step of each segment, where a segment is not a step of its own.

    Cycles of a tag are those that the first unit, which issues the work, spends on it: they add up to the
    run even where the spans of tags overlap. A tag on which it spends none works inside others, for the ticks of its
    spans; what binds it binds those. `rows` None: the energy is not known.
    """
    n = len(tags)
    own = timeline.tag_ticks()
    cycles = timeline.activity[:, 0].sum(axis=1)
    if not cycles[:n].any():  # an RTL keeps its stalls for the run as a whole, and spans by tag
        cycles = np.append(own, max(0, timeline.ticks - int(own.sum())))
    inside = np.append(cycles[:n] == 0, False)
    cycles[:n] += own * inside[:n]
    energy = None if rows is None else energy_by_tag(tuple(rows), timeline).sum(axis=1)
    calls = np.zeros(n, np.int64)
    np.add.at(calls, timeline.spans["tag"], timeline.spans["count"])
    within = _within(timeline, inside[:n])
    bound = [bound_by(timeline, shares) for shares in within]
    return {
        "cycles": timeline.ticks,
        "energy_j": None if energy is None else float(energy.sum()),
        "counters": timeline.totals(),
        "units": {u: _unit(timeline.unit(u)) for u in timeline.units},
        "operators": _operators(timeline, tags, cycles, calls, energy, inside, within),
        "spans": _steps(timeline, tags, bound, step_of)
        if by_step
        else _sums(timeline, tags, cycles, calls, energy, bound),
    }


def _within(timeline: Timeline, inside: NDArray[np.bool_]) -> NDArray[np.float64]:
    """The share of each tag's time that it works within others, or is itself: float64[tag, tag within].

    One that works inside belongs to what is under way when its span begins.
    """
    spans = timeline.spans
    ticks = np.zeros((len(inside), len(inside)))
    at = inside[spans["tag"]]
    within, around = spans[at], spans[~at]
    low, high = (np.searchsorted(around["segment"], within["segment"], side) for side in ("left", "right"))
    i = np.repeat(np.arange(len(within)), high - low)
    j = np.arange(len(i)) - np.repeat(np.cumsum(high - low) - high, high - low)
    first = within["first"][i]
    holds = (around["first"][j] <= first) & (first < around["end"][j])
    i, j = i[holds], j[holds]
    np.add.at(ticks, (around["tag"][j], within["tag"][i]), within["ticks"][i])
    return ticks / np.maximum(ticks.sum(axis=0), 1) + np.eye(len(inside))


def _unit(ticks: Mapping[str, int]) -> dict[str, Any]:
    return {"busy": ticks["busy"], "stalls": {c: n for c, n in ticks.items() if c != "busy"}}


def _operators(
    timeline: Timeline,
    tags: Sequence[TagInfo],
    cycles: NDArray[np.int64],
    calls: NDArray[np.int64],
    energy: NDArray[np.float64] | None,
    inside: NDArray[np.bool_],
    within: NDArray[np.float64],
) -> list[Operator]:
    members: dict[str, list[int]] = {}
    for i, tag in enumerate(tags):
        members.setdefault(tag.op, []).append(i)
    members[""] = list(range(len(tags), len(cycles)))
    out = []
    for name, m in members.items():
        joules = None if energy is None else float(energy[m].sum())
        ran = int(calls[m].sum()) if name else 0
        if ran or (not name and (cycles[m].any() or joules)):
            bound = bound_by(timeline, within[m].sum(axis=0)) if name else ""
            out.append(Operator(name, ran, int(cycles[m].sum()), joules, bound, bool(inside[m].all())))
    return out


def _sums(
    timeline: Timeline,
    tags: Sequence[TagInfo],
    cycles: NDArray[np.int64],
    calls: NDArray[np.int64],
    energy: NDArray[np.float64] | None,
    bound: Sequence[str],
) -> Spans:
    """A row for each tag that ran, from its first tick in any step to its last."""
    start = np.full(len(tags), np.iinfo(np.int64).max)
    end = np.zeros(len(tags), np.int64)
    np.minimum.at(start, timeline.spans["tag"], timeline.spans["first"])
    np.maximum.at(end, timeline.spans["tag"], timeline.spans["end"])
    ran = np.flatnonzero(calls)
    return Spans(
        tags=tags,
        tag=ran,
        step=np.full(len(ran), -1),
        start=start[ran],
        end=end[ran],
        cycles=cycles[ran],
        energy_j=None if energy is None else energy[ran],
        bound_by=[bound[i] for i in ran.tolist()],
    )


def _steps(
    timeline: Timeline, tags: Sequence[TagInfo], bound: Sequence[str], step_of: Sequence[int] | None
) -> Spans:
    """The Timeline's own rows. Energy and what binds are known for the whole run only."""
    s = timeline.spans
    return Spans(
        tags=tags,
        tag=s["tag"],
        step=s["segment"] if step_of is None else np.array(step_of, np.int64)[s["segment"]],
        start=s["first"],
        end=s["end"],
        cycles=s["ticks"],
        energy_j=None,
        bound_by=[""] * len(s),
    )


# ---- figures ------------------------------------------------------------------------------------------


def row_hit_rate(counters: Mapping[str, int], banks: int) -> float | None:
    """1 - activates / column accesses, bank by bank; an all-bank command counts once for each bank.

    Where memories are named, it is that of those which opened rows: `hbm_activates` of `hbm_lines`, and so on. None for a
    machine whose counters (`act`, `act_all`, `rd`, `wr`, `mac_all`) do not say it.
    """
    named = [
        name.removesuffix("_activates") for name, n in counters.items() if n and name.endswith("_activates")
    ]
    if named:
        return 1 - sum(counters[f"{m}_activates"] for m in named) / sum(counters[f"{m}_lines"] for m in named)
    if "act" not in counters or "rd" not in counters or not banks:
        return None
    activates = counters["act"] + banks * counters.get("act_all", 0)
    columns = counters["rd"] + counters["wr"] + banks * counters.get("mac_all", 0)
    return 1 - activates / columns if columns else None
