"""Published rows beside our own: `tilewright reproduce TARGET`.

This module knows no target. `arch/published/<slug>.yaml` holds the rows as data; a module
`tilewright.reproduce.<slug>` says which runs they need and how ours follow from them (see `Recipe`). Nothing is
fitted: every constant comes from the preset, and how much the assumed ones matter is measured beside the rows.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from importlib import import_module
from importlib.util import find_spec
from typing import NamedTuple, Protocol, cast

from tilewright.arch.errors import UserError
from tilewright.arch.published import Published, PublishedRow, published
from tilewright.arch.scenario import Progress
from tilewright.arch.spec import Spec
from tilewright.devices import load_device
from tilewright.reproduce.jobs import Job, Outcome, run_jobs

NEGLIGIBLE = 1e-3  # a constant that moves neither time nor energy by more is only named


class Ours(NamedTuple):
    """Our value of a row for each model. `bound`: ">=" or "<=" where ours is a bound, "~" for neither, "" exact."""

    by_model: Mapping[str, float]
    bound: str = ""

    @property
    def low(self) -> float:
        return min(self.by_model.values())

    @property
    def high(self) -> float:
        return max(self.by_model.values())


@dataclass(frozen=True)
class Row:
    """A published row and ours."""

    key: str
    published: PublishedRow
    ours: Ours

    @property
    def errors(self) -> tuple[float, float] | None:
        """Ours / published - 1, of the lowest and of the highest value; None where no number is published."""
        p = self.published
        if p.low is None or p.high is None:
            return None
        return self.ours.low / float(p.low) - 1, self.ours.high / float(p.high) - 1

    @property
    def verdict(self) -> str:
        """ "inside" or "outside" the published range; "open" where our bound allows both, or there is no number.

        A bound can be refuted, never confirmed: ">=" is outside where even our least is above the range.
        """
        p, o = self.published, self.ours
        if p.low is None or p.high is None or o.bound == "~":
            return "open"
        low, high = float(p.low), float(p.high)
        if o.bound == ">=":
            return "outside" if o.low > low or o.high > high else "open"
        if o.bound == "<=":
            return "outside" if o.low < low or o.high < high else "open"
        return "inside" if low <= o.low and o.high <= high else "outside"


class Effect(NamedTuple):
    """What one constant does, alone: the values tried below and above, and time and energy over the preset's, - 1.

    None where the spec's own checks refuse the value, or the model can't be run with it.
    """

    key: str
    value: Fraction
    tried: tuple[Fraction, Fraction]
    time: tuple[float | None, float | None]
    energy: tuple[float | None, float | None]

    @property
    def size(self) -> float:
        return max((abs(v) for v in (*self.time, *self.energy) if v is not None), default=0.0)

    @property
    def refused(self) -> bool:
        return self.time == (None, None)


@dataclass(frozen=True)
class Sensitivity:
    """The effect of each assumed number, the largest first; `words` are assumed keys that hold no number."""

    job: Job
    effects: Sequence[Effect]
    words: Sequence[str]


class Recipe(Protocol):
    """What `tilewright.reproduce.<slug>` holds."""

    SPEC: str
    HEADINGS: Mapping[
        str, str
    ]  # of the per-model table by key; keys that end in _s and _j are seconds and joules

    @staticmethod
    def jobs(generate: int) -> list[Job]:
        """The runs that the rows need."""

    @staticmethod
    def rows(outcomes: Sequence[Outcome]) -> Mapping[str, Ours]:
        """Our value of every published row, by key."""

    @staticmethod
    def models(outcomes: Sequence[Outcome]) -> list[dict[str, str | float]]:
        """The per-model table: "model" and the keys of HEADINGS."""

    @staticmethod
    def probe(generate: int) -> Job:
        """The run that the effect of a constant is measured by."""

    @staticmethod
    def remarks(rows: Mapping[str, Row]) -> list[str]:
        """What the rows say, and what they can't."""


@dataclass(frozen=True)
class Reproduction:
    """The result of `reproduce`."""

    published: Published
    spec: Spec
    generate: int
    rows: Sequence[Row]
    models: Sequence[dict[str, str | float]]
    headings: Mapping[str, str]
    remarks: Sequence[str]
    sensitivity: Sensitivity | None = None


def recipe(slug: str) -> Recipe:
    name = f"{__name__}.{slug}"
    if find_spec(name) is None:
        raise UserError(f"{slug}: published rows, but no {name} says how to compute ours")
    return cast(Recipe, import_module(name))


def reproduce(slug: str, generate: int | None = None, progress: Progress | None = None) -> Reproduction:
    """Our rows beside those of a target; `generate` as published unless given. Raises UserError."""
    theirs = published(slug)
    how = recipe(slug)
    n = theirs.generate if generate is None else generate
    outcomes = run_jobs(how.jobs(n), progress)
    ours = how.rows(outcomes)
    rows = {key: Row(key, row, ours[key]) for key, row in theirs.rows.items() if key in ours}
    spec = load_device(how.SPEC)
    remarks = list(how.remarks(rows))
    if missing := [row.title for key, row in theirs.rows.items() if key not in ours]:
        remarks.append(f"left out, since they can't be run: {', '.join(missing)}")
    return Reproduction(theirs, spec, n, list(rows.values()), how.models(outcomes), how.HEADINGS, remarks)


def sensitivity(slug: str, generate: int | None = None, progress: Progress | None = None) -> Sensitivity:
    """Every assumed number of the preset moved by 10 % either way, alone. Raises UserError."""
    how = recipe(slug)
    probe = how.probe(published(slug).generate if generate is None else generate)
    spec = load_device(probe.spec)
    held = dict(spec.leaves())
    numbers = {k: Fraction(held[k]) for k in spec.assumed() if isinstance(held[k], (int, Fraction))}
    tried = {k: steps(v, whole=isinstance(held[k], int)) for k, v in numbers.items()}
    wanted = {(k, i): f"{k}={v}" for k, pair in tried.items() for i, v in enumerate(pair)}
    jobs = [
        probe._replace(sets=(text,), optional=True) for text in wanted.values() if _allowed(probe.spec, text)
    ]
    base, *found = run_jobs([probe, *jobs], progress)
    moved = {outcome.job.sets: outcome for outcome in found}

    def change(key: str, what: str) -> tuple[float | None, float | None]:
        first = getattr(base, what)
        pair = (moved.get((wanted[key, i],)) for i in (0, 1))
        a, b = (None if outcome is None else getattr(outcome, what) / first - 1 for outcome in pair)
        return a, b

    effects = [Effect(k, v, tried[k], change(k, "time_s"), change(k, "energy_j")) for k, v in numbers.items()]
    effects.sort(key=lambda e: -e.size)
    return Sensitivity(probe, effects, [k for k in spec.assumed() if k not in numbers])


def steps(value: Fraction, whole: bool) -> tuple[Fraction, Fraction]:
    """The value less and more a tenth; a whole number moves by the nearest whole number, at least one.

    >>> [[float(v) for v in steps(Fraction(n), whole=True)] for n in (128, 6)], steps(Fraction(6), whole=False)[0]
    ([[115.0, 141.0], [5.0, 7.0]], Fraction(27, 5))
    """
    step = Fraction(max(1, round(value / 10))) if whole else value / 10
    return value - step, value + step


def _allowed(name: str, text: str) -> bool:
    try:
        load_device(name, [text])
    except UserError:
        return False
    return True
