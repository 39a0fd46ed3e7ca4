"""Exact clocks: periods are Fractions of a second, cycle counts come from exact rationals."""

from dataclasses import dataclass
from fractions import Fraction
from math import ceil
from typing import NamedTuple


class Ratio(NamedTuple):
    """A clock domain of `p` cycles in every `q` ticks: it works on tick t iff (t * p) % q < p."""

    p: int
    q: int


@dataclass(frozen=True)
class Clock:
    """A clock of exact period.

    >>> tick = Clock.from_ns(Fraction(1, 2))
    >>> tick.cycles_ns(Fraction("44.5")), tick.cycles_ns(Fraction("44.6"))
    (89, 90)
    >>> Clock.from_mhz(Fraction(1000)).ratio_to(tick)
    Ratio(p=1, q=2)
    """

    period_s: Fraction

    def __post_init__(self) -> None:
        if self.period_s <= 0:
            raise ValueError(f"clock period must be positive, not {self.period_s} s")

    @classmethod
    def from_ns(cls, period_ns: Fraction) -> "Clock":
        return cls(period_ns / 10**9)

    @classmethod
    def from_mhz(cls, frequency_mhz: Fraction) -> "Clock":
        return cls(1 / (frequency_mhz * 10**6))

    def cycles_ns(self, t_ns: Fraction) -> int:
        """Cycles that cover `t_ns` nanoseconds: ceil(t / t_ck), exactly."""
        return ceil(t_ns / 10**9 / self.period_s)

    def ratio_to(self, tick: "Clock") -> Ratio:
        """This domain as p cycles in q ticks of `tick`, in lowest terms; it must not be faster."""
        r = tick.period_s / self.period_s
        if r > 1:
            raise ValueError(
                f"a domain of period {self.period_s} s is faster than the tick {tick.period_s} s"
            )
        return Ratio(r.numerator, r.denominator)


def works(t: int, ratio: Ratio) -> bool:
    """Whether the domain works on tick t; t = 0 at `start`.

    >>> [t for t in range(9) if works(t, Ratio(2, 3))]
    [0, 2, 3, 5, 6, 8]
    """
    return (t * ratio.p) % ratio.q < ratio.p
