"""Energy of a run: what each counted event costs, with the key of the spec that says so."""

from dataclasses import dataclass
from fractions import Fraction

import numpy as np

from tilewright.arch.timeline import Timeline


@dataclass(frozen=True)
class EnergyRow:
    """Picojoules for each unit of `basis`.

    `basis` is a counter's name, `ticks` (each tick of the run), or `busy:<unit>` (each tick that unit works).
    `source` names the keys of the spec from which the figure is derived.
    """

    name: str
    basis: str
    pj: Fraction
    source: str


def basis_counts(row: EnergyRow, timeline: Timeline) -> np.ndarray:
    """How often the row's basis happened, int64[tags + 1], the last for no tag."""
    if row.basis == "ticks":
        return timeline.activity[:, 0, :].sum(axis=1)
    kind, _, unit = row.basis.partition(":")
    if kind == "busy":
        return timeline.activity[:, timeline.units.index(unit), 0]
    return timeline.counters[:, timeline.counter_names.index(row.basis)]


def energy_by_tag(rows: tuple[EnergyRow, ...], timeline: Timeline) -> np.ndarray:
    """Joules float64[tags + 1, rows]; the last row of the first axis belongs to no tag."""
    return np.stack([basis_counts(r, timeline) * float(r.pj) * 1e-12 for r in rows], axis=1)
