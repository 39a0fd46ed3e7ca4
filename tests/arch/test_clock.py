"""Clocks are exact: cycle counts come from rationals, and a domain's ticks from one rule."""

from fractions import Fraction as F

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tilewright.arch.clock import Clock, Ratio, works

positive = st.fractions(min_value=F(1, 1000), max_value=1000, max_denominator=1000)


@pytest.mark.parametrize(
    ("period_ns", "t_ns", "cycles"),
    [
        ("0.1", "0.3", 3),  # in floats 0.3 / 0.1 is 2.9999999999999996, and 0.7 / 0.1 is 6.999999999999999
        ("0.1", "0.7", 7),
        ("0.1", "1.1", 11),  # in floats 1.1 / 0.1 is 11.000000000000002, whose ceiling is 12
        ("0.5", "44.5", 89),
        ("0.5", "44.6", 90),
        ("0.57", "0", 0),
        ("1/3", "1", 3),
        ("1/3", "1.0000000001", 4),
    ],
)
def test_cycles_cover_a_time_exactly(period_ns, t_ns, cycles):
    assert Clock.from_ns(F(period_ns)).cycles_ns(F(t_ns)) == cycles


def test_frequency_and_period_are_the_same_clock():
    assert Clock.from_mhz(F(1600)) == Clock.from_ns(F("0.625"))


@given(positive, positive)
def test_cycles_are_the_least_that_cover(period, t):
    n = Clock.from_ns(period).cycles_ns(t)
    assert (n - 1) * period < t <= n * period


def test_a_domain_is_a_ratio_in_lowest_terms():
    tick = Clock.from_mhz(F(1600))
    assert Clock.from_mhz(F(1200)).ratio_to(tick) == Ratio(3, 4)
    assert tick.ratio_to(tick) == Ratio(1, 1)
    with pytest.raises(ValueError, match="is faster than the tick"):
        Clock.from_mhz(F(1601)).ratio_to(tick)


@pytest.mark.parametrize("period", [F(0), F(-1, 10**9)])
def test_a_period_must_be_positive(period):
    with pytest.raises(ValueError, match="clock period must be positive"):
        Clock(period)


def test_ticks_of_a_domain_by_hand():
    # 3/4: t*3 mod 4 is 0, 3, 2, 1, 0, ...; works where that is < 3.
    assert [works(t, Ratio(3, 4)) for t in range(8)] == [True, False, True, True] * 2
    assert [t for t in range(10) if works(t, Ratio(1, 5))] == [0, 5]
    assert all(works(t, Ratio(1, 1)) for t in range(5))


@given(st.integers(1, 40), st.integers(0, 40), st.integers(0, 10**12), st.integers(1, 200))
def test_a_domain_works_p_times_in_q_ticks(p, more, start, n):
    """It works at start, never ahead of n p / q by a whole tick, and p times in any q ticks in a row."""
    ratio = Ratio(p, p + more)
    assert works(0, ratio)
    count = sum(works(t, ratio) for t in range(n))
    assert count == (n - 1) * p // ratio.q + 1
    q = ratio.q
    assert sum(works(t, ratio) for t in range(start, start + q)) == p


@given(st.integers(1, 40), st.integers(0, 40))
def test_an_accumulator_in_hardware_follows_the_rule(p, more):
    """RTL keeps r = (t * p) mod q by adding p and subtracting q at most once a tick."""
    ratio, r = Ratio(p, p + more), 0
    for t in range(150):
        assert works(t, ratio) == (r < p)
        r = r + p - (ratio.q if r + p >= ratio.q else 0)
