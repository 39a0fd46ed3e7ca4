"""Folding in space and time changes no integer."""

import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rdu.test_model import SETS, Sketch, launch, random_sketch, spec_of
from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program, Segment
from tilewright.arch.rdu import ISA, dynamic_flow
from tilewright.sim import rdu_state as state
from tilewright.sim.rdu import execute, simulate
from tilewright.sim.rdu_build import build
from tilewright.sim.rdu_periods import AT_ONCE, run_kernel

OPS = ("PROGRAM_LOAD", "ARGUMENT_LOAD", "KERNEL_EXECUTE")

# A link of the last two moves less than a packet a tick: it is never joined with another.
MACHINES = [
    (),
    (
        "grid.columns=4",
        "grid.rows=3",
        "agcu.per_side=3",
        "network.hop_cycles=2",
        "grid.dies=2",
        "network.die_hop_cycles=3",
    ),
    ("grid.columns=5", "grid.rows=2", "network.hop_cycles=3", "network.credit_cycles=2", "network.order=yx"),
    (
        "grid.columns=4",
        "grid.rows=4",
        "agcu.per_side=4",
        "network.fifo_depth=2",
        "network.credit_cycles=2",
        "pmu.banks=4",
    ),
]
PARAMS = [spec_of(*SETS, "network.flows=64", *more).params() for more in MACHINES]


def both(p, section):
    """What happens unfolded and folded."""
    out = []
    for fold in (False, True):
        try:
            out.append(execute(p, section, fold=fold))
        except UserError as error:
            out.append(str(error))
    return out


def assert_equal(plain, folded):
    assert type(plain) is type(folded)
    if isinstance(plain, str):
        if plain.startswith("deadlock"):  # links that were joined are named by their ends
            plain, folded = (text.partition(":")[0] for text in (plain, folded))
        assert plain == folded
        return
    assert plain.ticks == folded.ticks
    assert (plain.units, plain.tags) == (folded.units, folded.tags)
    for name in ("activity", "busy", "counters"):
        np.testing.assert_array_equal(getattr(plain, name), getattr(folded, name), err_msg=name)


@settings(deadline=None, max_examples=400)
@given(
    machine=st.sampled_from(range(len(MACHINES))),
    seed=st.integers(0, 10**6),
    most=st.sampled_from([24, 2000]),
)
def test_a_random_section_takes_as_long(machine, seed, most):
    section = random_sketch(PARAMS[machine], seed, most)
    assert_equal(*both(PARAMS[machine], section))


def pipeline(p, tiles, n=8, more=None):
    """PMU (1, 0) to PCU (1, 1) and on to the double buffer of PMU (2, 1), `tiles` of n vectors."""
    s = Sketch(p)
    levels = {"wait": 1, "wait_level": 1, "signal": 1, "signal_level": 1}
    sides = {f"{side}_{k}": v for side in ("write", "read") for k, v in levels.items()}
    loops = {f"{side}_{k}": v for side in ("write", "read") for k, v in (("count0", n), ("count1", tiles))}
    s.pmu(1, 0, enable=2, read_count0=n, read_count1=tiles, read_stride0=4, flow=dynamic_flow(1, 1))
    s.pcu(1, 1, vectors=1, count0=n, count1=tiles, send_vector=1, flow=dynamic_flow(2, 1))
    buffer = {"enable": 3, **sides, **loops, "write_hold0": 2, "write_stride0": 4, **(more or {})}
    s.pmu(2, 1, flow=dynamic_flow(2, 0), **buffer)
    s.token((2, 1), 0, (2, 1), 4)
    s.token((2, 1), 4, (2, 1), 0)
    s.pcu(2, 0, vectors=1, count0=n, count1=tiles)
    return s.records()


# Odd tiles go to words 32 .. 63.
HALVES = {
    f"{side}_{k}": v
    for side in ("write", "read")
    for k, v in (("count1", 2), ("count2", 1000), ("stride1", 32))
}


@pytest.mark.parametrize("more", [{}, {"read_interval": 3}, HALVES])
def test_periods_are_leapt_over(more):
    p = PARAMS[1]
    section = pipeline(p, 2000, more=more)
    assert_equal(*both(p, section))
    m = build(p, section, {}).machine
    simulated = run_kernel(m, 3, True)
    assert 40 * simulated < m.clock[state.QUIET] + m.clock[state.SKIPPED]


def test_a_billion_ticks():
    # Whether the last step of a leap is right shows in how far the totals are from those of fewer tiles.
    p = PARAMS[1]
    few, many = (execute(p, pipeline(p, tiles)) for tiles in (1_000, 16_000_000))
    periods = (16_000_000 - 1_000) // 2
    step = execute(p, pipeline(p, 1_002)).ticks - few.ticks
    assert many.ticks == few.ticks + periods * step
    assert many.counters.sum(axis=0)[0] == 2 * 8 * 16_000_000


@pytest.mark.parametrize("rate", ["16", "12", "5"])
def test_the_rate_of_memory_is_part_of_the_state(rate):
    p = spec_of(*SETS, f"memory.hbm.gb_per_s={rate}").params()
    s = Sketch(p)
    s.agcu(0, direction="load", words=4, count0=4, count1=500, stride0=16, flow=dynamic_flow(1, 0))
    s.pmu(1, 0, enable=1, write_count0=4, write_count1=500, write_interval=2)
    plain, folded = both(p, s.records())
    assert_equal(plain, folded)
    m = build(p, s.records(), {}).machine
    assert 2 * run_kernel(m, 3, True) < plain.ticks


def test_links_without_a_choice_are_joined():
    p = PARAMS[1]
    section = pipeline(p, 4)
    plain, folded = (build(p, section, {}, fold=fold).machine for fold in (False, True))
    # Each of the three streams goes over 3 links and 2 switches; then it is one link.
    assert (len(plain.link), len(folded.link)) == (3 * 3, 3)
    assert (len(plain.switch), len(folded.switch)) == (3 * 2, 0)


def test_equal_kernels_are_run_once():
    p = PARAMS[0]
    first = launch(random_sketch(p, 0)).segments[0]
    again = Segment({"code": first.regions["code"][2:]}, repeat=5)
    program = Program(launch({}).isa, [first, again], ())
    plain, folded = (simulate(p, program, fold=fold) for fold in (False, True))
    assert plain.ticks == folded.ticks
    np.testing.assert_array_equal(plain.activity, folded.activity)
    np.testing.assert_array_equal(plain.counters, folded.counters)
    np.testing.assert_array_equal(plain.spans, folded.spans)


def test_kernels_that_are_run_ahead_take_as_long():
    # Three sections, the first again at the end: its tables of switches are then what all of them left.
    p = PARAMS[0]
    sections = [launch(random_sketch(p, seed)).segments[0] for seed in (0, 2, 5)]
    code = ISA.record("code")
    segments = [
        Segment(s.regions | {"code": np.concatenate([code.make(op, section=i) for op in OPS])})
        for i, s in enumerate(sections)
    ]
    last = Segment({"code": np.concatenate([code.make(op) for op in OPS])})
    program = Program(ISA, [*segments, last], ())
    plain, folded = (simulate(p, program, fold=fold) for fold in (False, True))
    assert plain.ticks == folded.ticks
    np.testing.assert_array_equal(plain.activity, folded.activity)
    np.testing.assert_array_equal(plain.spans, folded.spans)


def test_a_kernel_stops_when_told_to():
    p = PARAMS[1]
    asked = []

    def stopped():
        asked.append(None)
        return len(asked) > 3

    m = build(p, pipeline(p, 20_000), {}).machine
    assert run_kernel(m, 3, False, stopped) == 3 * AT_ONCE
    assert run_kernel(m, 3, False, lambda: True) == 0

    # Interrupted in the first operation: no thread goes on.
    def interrupt(*_):
        raise KeyboardInterrupt

    before = threading.active_count()
    with pytest.raises(KeyboardInterrupt):
        simulate(p, launch(pipeline(p, 20)), progress=interrupt)
    assert threading.active_count() == before
