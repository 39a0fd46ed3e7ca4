"""What a cycle model returns: integers only. Seconds and joules are derived outside the kernels."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

# One row for each (segment, tag) that ran. `first` is the first tick any unit works for it, `end` the last
# plus one; over a repeated segment they bracket all repetitions, `ticks` sums the spans and `count` counts them.
SPAN = np.dtype(
    [("segment", "i8"), ("tag", "i8"), ("first", "i8"), ("end", "i8"), ("ticks", "i8"), ("count", "i8")]
)


@dataclass(frozen=True, kw_only=True)
class Timeline:
    """The result of a run in integer ticks.

    `counters` int64[tags + 1, counter names] and `activity` int64[tags + 1, units, 1 + causes] are kept
    for each tag; the last row belongs to no tag. `activity[..., 0]` is busy, the rest are stalls by
    cause: for every unit, busy plus stalls is `ticks`.
    `trace` int64[n, 5] are memory commands: tick, channel, command, bank (-1: all, or none), row (-1: none),
    by channel and then tick. `log` are instructions, rows of `arch.trace.LOG`. Both only where asked for.
    `waiting` are the causes in which a unit has nothing to do, so that another one is to blame.
    """

    ticks: int
    tags: Sequence[str]
    spans: np.ndarray
    counter_names: tuple[str, ...]
    counters: np.ndarray
    units: tuple[str, ...]
    causes: tuple[str, ...]
    activity: np.ndarray
    labels: Sequence[str] = ()
    events: int = 0
    trace: np.ndarray | None = None
    log: np.ndarray | None = None
    waiting: tuple[str, ...] = ("wait", "idle")

    def __post_init__(self) -> None:
        totals = self.activity.sum(axis=(0, 2))
        for unit, total in zip(self.units, totals, strict=True):
            if total != self.ticks:
                raise AssertionError(f"unit {unit}: busy plus stalls is {total}, not {self.ticks} ticks")

    def counter(self, name: str) -> int:
        return int(self.counters[:, self.counter_names.index(name)].sum())

    def totals(self) -> dict[str, int]:
        """Each counter over the whole run."""
        return dict(zip(self.counter_names, (int(v) for v in self.counters.sum(axis=0)), strict=True))

    def unit(self, name: str) -> dict[str, int]:
        """Busy and stalls of one unit over the whole run: {"busy": n, cause: n, ...}."""
        row = self.activity[:, self.units.index(name), :].sum(axis=0)
        return dict(zip(("busy", *self.causes), (int(v) for v in row), strict=True))

    def tag_ticks(self) -> np.ndarray:
        """Ticks for each tag, int64[tags], summed over segments."""
        out = np.zeros(len(self.tags), np.int64)
        np.add.at(out, self.spans["tag"], self.spans["ticks"])
        return out

    def binding(
        self, tags: Sequence[int] | None = None, shares: Sequence[float] | None = None
    ) -> tuple[str, str]:
        """What binds the run, or the given tags: a unit, and the cause that it waits for most, "" if it works more.

        `shares`: how much of each of the tags counts, all of it unless given.
        It is the unit that is engaged longest: busy, or held up by a cause other than those of `waiting`.
        Both are "" where no unit was engaged.
        """
        of_tags = self.activity if tags is None else self.activity[list(tags)]
        rows = of_tags.sum(axis=0) if shares is None else np.tensordot(np.asarray(shares), of_tags, 1)
        kept = [0, *(1 + i for i, cause in enumerate(self.causes) if cause not in self.waiting)]
        engaged = rows[:, kept]
        if not engaged.any():
            return "", ""
        unit = max(range(len(self.units)), key=lambda u: (engaged[u].sum(), engaged[u, 0], -u))
        top = int(np.argmax(engaged[unit]))
        return self.units[unit], self.causes[kept[top] - 1] if top else ""

    def bound_by(self, *tags: int) -> str:
        """`binding` in words: "asic", "channel 0: activate"."""
        unit, cause = self.binding(tags or None)
        return f"{unit}: {cause}" if cause else unit


def fold_spans(tags: np.ndarray, firsts: np.ndarray, ends: np.ndarray, segment: int) -> np.ndarray:
    """Rows of SPAN for one segment from a log of (tag, first, end): tags that recur are joined.

    A tag's span reaches from its smallest `first` to its largest `end` (tags may overlap).
    """
    size = int(tags.max(initial=-1)) + 1
    first = np.full(size, np.iinfo(np.int64).max)
    end = np.zeros(size, np.int64)
    np.minimum.at(first, tags, firsts)
    np.maximum.at(end, tags, ends)
    names = np.flatnonzero(end)
    out = np.zeros(len(names), SPAN)
    out["segment"], out["tag"], out["count"] = segment, names, 1
    out["first"], out["end"] = first[names], end[names]
    out["ticks"] = out["end"] - out["first"]
    return out
