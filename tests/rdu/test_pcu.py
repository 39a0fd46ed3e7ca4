"""Compute units: values as the NumPy kernels give them, ticks as the closed forms say."""

import math
from random import Random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rdu.units import cause, packet, run, simulate, small, unit
from tilewright.arch import rdu
from tilewright.arch.rdu import CONFIG_PCU, CONFIG_STAGE, simd_latency, systolic_fill
from tilewright.rtl.rdu.lane import LaneOp
from tilewright.rtl.rdu.pcu import Pcu
from tilewright.workloads import rdu_kernels as kernels

LANES, STAGES, REGISTERS = 4, 2, 6
SETS = {
    "pcu__lanes": LANES,
    "pcu__stages": STAGES,
    "pcu__registers": REGISTERS,
    "pcu__vector_inputs": 2,
    "pcu__scalar_inputs": 1,
    "pcu__counters": 3,
    "pcu__op_latency_cycles": 1,
    "pcu__exp_terms": 2,
    "pcu__reciprocal_iterations": 1,
    "pcu__rsqrt_iterations": 1,
}
SIMD = SETS
LANE_OP = LaneOp()
ARRAY = SETS | {"pcu__systolic": "true"}

SPECIAL = [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0x7F7FFFFF, 1, 0x80000001, 0x00800000, 0xFFFFFFFF]


def word(random):
    """A word from where faults hide: any bits, extremes, small numbers."""
    number = int(np.float32(random.uniform(-8, 8)).view(np.uint32))
    return random.choice((random.choice(SPECIAL), random.getrandbits(32), number))


def f32(*values):
    return [int(w) for w in np.array(values, np.float32).view(np.uint32)]


def stage(**fields):
    return kernels.configuration(CONFIG_STAGE, **fields)


def config(**fields):
    return kernels.configuration(CONFIG_PCU, **{"mode": "simd", "vectors": 1, "send_vector": 1, **fields})


def play(sets, cfg, stages, vectors, scalars=(), **more):
    """Run the RTL and compare its packets with the kernel's; gives the run."""
    params = small(**sets)
    feeds = {f"vector_{i}": [packet(row) for row in v] for i, v in enumerate(vectors)}
    feeds |= {f"scalar_{i}": [packet([word]) for word in s] for i, s in enumerate(scalars)}
    done = run(
        unit(Pcu, **sets),
        {"config": cfg, "stage": stages},
        feeds,
        ["vector", "scalar"],
        activities=["activity"],
        **more,
    )
    want = kernels.pcu(
        cfg, stages, vectors, scalars, lanes=params.lanes, registers=params.registers, counts=params
    )
    for name, used, width, flow in (
        ("vector", cfg["send_vector"], params.lanes, cfg["flow"]),
        ("scalar", cfg["send_scalar"], 1, cfg["scalar_flow"]),
    ):
        expected = [
            packet(row[:width], s, l, flow)
            for row, s, l in zip(want.data, want.sequence, want.last, strict=True)
        ]
        assert [p for _, p in done.packets[name]] == (expected if used else [])
    return done


@pytest.mark.parametrize("operation", rdu.STAGE_OPS)
def test_a_functional_unit_does_what_the_kernel_does(operation):
    random = Random(0)
    words = [*SPECIAL, *f32(1, -1, 1.0078125, 1e-38), 31, 33]
    cases = random.sample([(a, b) for a in words for b in words], 100)
    cases += [(word(random), word(random)) for _ in range(50)]
    a, b = np.array(cases, np.uint32).T
    choose = np.arange(len(cases)) % 2
    got = []

    async def bench(ctx):
        for kind in range(len(rdu.TYPES)):
            ctx.set(LANE_OP.operation, rdu.STAGE_OPS.index(operation))
            ctx.set(LANE_OP.type, kind)
            for (x, y), c in zip(cases, choose, strict=True):
                ctx.set(LANE_OP.a, x)
                ctx.set(LANE_OP.b, y)
                ctx.set(LANE_OP.choose, int(c))
                got.append(ctx.get(LANE_OP.o))

    simulate(LANE_OP, bench)
    want = [kernels.lane_op(operation, kind, a, b, choose) for kind in rdu.TYPES]
    assert got == np.concatenate(want).tolist()


PASS = stage()
ADD = stage(operation="add", a=0, b=1, to=2)


def test_two_vectors_are_added_and_scaled():
    # (1 + 0.5) * 2 = 3, (2 + 0.5) * 2 = 5, (-1 + 1) * 2 = +0, (4 - 8) * 2 = -8
    a, b = f32(1, 2, -1, 4), f32(0.5, 0.5, 1, -8)
    double = stage(operation="multiply", a=2, b_from="constant", constant=f32(2)[0], to=3)
    done = play(SIMD, config(vectors=3, result=3, flow=7, sequence=5), [ADD, double], [[a], [b]])
    assert done.words("vector") == [f32(3, 5, 0, -8)]
    assert done.packets["vector"][0][1]["sequence"] == 5


@pytest.mark.parametrize("latency", [1, 2])
@pytest.mark.parametrize("count", [1, 5])
def test_elements_take_depth_and_one_vector_a_tick(count, latency):
    # N = 4 n elements on 4 lanes: T = D + n - 1, D = 1 header + 2 stages * latency + 1 tail.
    sets = SETS | {"pcu__op_latency_cycles": latency}
    params = small(**sets)
    depth = 1 + 2 * latency + 1
    assert simd_latency(params) == depth
    rows = [f32(*range(4 * i, 4 * i + 4)) for i in range(count)]
    done = play(sets, config(count0=count), [PASS, PASS], [rows])
    assert done.at("vector") == [depth + i for i in range(count)]
    assert done.activity["activity"] == [0] * count + [cause("pipeline")] * depth
    assert done.ticks == depth + count


@pytest.mark.parametrize("latency", [1, 2])
def test_a_dot_product_accumulates_lane_wise_and_then_across(latency):
    # D = header + 2 stages + accumulator + tree of log2(4) = 2 levels + tail; an iteration every `latency` ticks.
    sets = SETS | {"pcu__op_latency_cycles": latency}
    params = small(**sets)
    depth = 2 + latency * (2 + 1 + 2)
    assert simd_latency(params, fold=True, tree=True) == depth
    a = [f32(1, 2, 3, 4), f32(5, 6, 7, 8), f32(9, 10, 11, 12)]
    b = [f32(1, 1, 1, 1), f32(2, 2, 2, 2), f32(1, 0, 1, 0)]
    cfg = config(vectors=3, count0=3, fold="add", fold_level=1, tree="add", result=2, send_scalar=1)
    multiply = stage(operation="multiply", a=0, b=1, to=2)
    done = play(sets, cfg, [multiply, stage(a=2, to=2)], [a, b])
    assert done.words("scalar") == [f32(82)]  # 10 + 2 * 26 + 20
    assert done.words("vector") == [f32(82, 82, 82, 82)]
    assert done.at("vector") == [2 * latency + depth]


def test_a_stop_in_the_middle_of_a_sum_adds_nothing_twice():
    # Sums of three: 1 + 2 + 3, 4 + 5 + 6, ... with the output ready on every seventh tick only.
    rows = [f32(i, 0, 0, 0) for i in range(1, 13)]
    cfg = config(count0=3, count1=4, fold="add", fold_level=1)
    done = play(SIMD, cfg, [PASS, PASS], [rows], accept=lambda name, tick: tick % 7 == 6)
    assert done.words("vector") == [f32(9 * i + 6, 0, 0, 0) for i in range(4)]
    assert done.at("vector") == [13, 20, 27, 34]


def test_inputs_are_held_for_the_inner_loop():
    # The scalar and vector 1 stay for two iterations of level 0; vector 0 changes in each.
    a = [f32(i, i, i, i) for i in range(4)]
    b = [f32(10, 20, 30, 40), f32(1, 2, 3, 4)]
    cfg = config(
        vectors=3, scalars=1, count0=2, count1=2, vector1_level=1, scalar0_level=2, last_level=1, result=3
    )
    double = stage(operation="multiply", a=2, b=4, to=3)
    done = play(SIMD, cfg, [ADD, double], [a, b], [f32(2)])
    assert done.words("vector")[3] == f32(8, 10, 12, 14)
    assert [p["last"] for _, p in done.packets["vector"]] == [0, 1, 0, 1]


def test_counters_and_lanes_are_operands():
    # 100 * the index of level 1 + the lane
    hundred = stage(
        operation="multiply", type="int32", a_from="counter", a=1, b_from="constant", constant=100, to=1
    )
    plus = stage(operation="add", type="int32", a=1, b_from="lane", to=1)
    done = play(SIMD, config(vectors=0, count0=1, count1=3, result=1), [hundred, plus], [])
    assert done.words("vector") == [[100 * i + k for k in range(4)] for i in range(3)]


def test_tokens_hold_an_iteration_and_go_out_with_one():
    # Two tokens a run of level 1; the second comes in at tick 9 and counts from 10. Tokens go out with the last
    # iteration of level 1.
    rows = [f32(i, 0, 0, 0) for i in range(4)]
    cfg = config(count0=2, count1=2, wait=2, wait_level=1, signal=5, signal_level=1)
    done = play(SIMD, cfg, [PASS, PASS], [rows], tokens={"tokens": {2: 2, 9: 2}})
    steps = [t for t, a in enumerate(done.activity["activity"]) if a == 0]
    assert steps == [3, 4, 10, 11]
    assert done.tokens["signal"] == [(4, 5), (11, 5)]
    assert done.activity["activity"][:3] == [cause("token")] * 3


def test_the_throttle_spaces_iterations():
    rows = [f32(i, 0, 0, 0) for i in range(3)]
    done = play(SIMD, config(count0=3, interval=4), [PASS, PASS], [rows])
    assert done.at("vector") == [4, 8, 12]
    assert done.activity["activity"][:5] == [0] + [cause("interval")] * 3 + [0]


def test_a_full_output_stops_everything_behind_it():
    # Ready from tick 9: the pipeline fills at 4 iterations (header, two stages, tail).
    rows = [f32(i, 0, 0, 0) for i in range(6)]
    done = play(SIMD, config(count0=6), [PASS, PASS], [rows], accept=lambda name, tick: tick >= 9)
    assert done.at("vector") == [9 + i for i in range(6)]
    assert done.activity["activity"][:10] == [0] * 4 + [cause("output")] * 5 + [0]


def test_an_empty_input_is_charged():
    done = play(SIMD, config(), [PASS, PASS], [[f32(1, 2, 3, 4)]], offer=lambda name, tick: tick >= 3)
    assert done.activity["activity"][:4] == [cause("operand")] * 3 + [0]


def test_a_run_begins_where_the_last_one_ended():
    rows = [f32(1, 2, 3, 4), f32(5, 6, 7, 8)]
    cfg = config(count0=2, fold="add", fold_level=1, sequence=3)
    first, second = run(
        unit(Pcu, **SIMD), {"config": cfg, "stage": [PASS, PASS]}, {"vector_0": [packet(r) for r in rows]},
        ["vector"], runs=2,
    )  # fmt: skip
    assert first.packets == second.packets
    assert first.words("vector") == [f32(6, 8, 10, 12)]


@pytest.mark.parametrize("latency", [1, 2])
@pytest.mark.parametrize("function", range(len(rdu.FUNCTIONS)))
@pytest.mark.parametrize("gated", [0, 1])
def test_the_tail_takes_its_operations_and_one_vector_a_tick(latency, function, gated):
    # D = header + 2 stages + operations of the function + 1 of the gate + tail. With 2 terms and 1 iteration: exp
    # 5 + 4 = 9, reciprocal 3, rsqrt 5, sigmoid 9 + 1 + 3 = 13.
    sets = SETS | {"pcu__op_latency_cycles": latency}
    depth = 2 + latency * (2 + (0, 9, 3, 5, 13)[function] + gated)
    assert simd_latency(small(**sets), function=function, gated=bool(gated)) == depth
    rows = [f32(*(0.1 + 0.7 * i - j for j in range(4))) for i in range(4)]
    cfg = config(count0=4, function=function, gated=gated, gate=3, result=0, last_level=1)
    double = stage(operation="multiply", a=0, b_from="constant", constant=f32(2)[0], to=3)
    done = play(sets, cfg, [double, PASS], [rows])
    assert done.at("vector") == [depth + i for i in range(4)]
    assert done.ticks == depth + 4
    assert done.activity["activity"] == [0] * 4 + [cause("pipeline")] * depth


@pytest.mark.parametrize("period", [3, 7])
def test_a_stop_freezes_the_tail(period):
    # Sums of two through the exponential, one packet leaving every few ticks: none is lost, none comes twice.
    rows = [f32(0.25 * i, -0.5 * i, i, 1) for i in range(12)]
    cfg = config(count0=2, count1=6, fold="add", fold_level=1, function="exp", round=1)
    done = play(SIMD, cfg, [PASS, PASS], [rows], accept=lambda name, tick: tick % period == period - 1)
    assert len(done.words("vector")) == 6
    assert set(np.diff(done.at("vector"))) <= {period}


def tile(sets, k, tiles, seed=0, **more):
    rng = np.random.default_rng(seed)
    function = more.pop("function", "none")
    shape = (tiles * k, LANES)
    # Numbers of one size, so that each counts in its sum; every eighth word may be anything.
    a, b = (
        np.where(
            rng.random(shape) < 0.125,
            rng.integers(0, 1 << 32, shape),
            rng.normal(size=shape).astype(np.float32).view(np.uint32),
        )
        for _ in range(2)
    )
    cfg = config(mode="systolic", vectors=3, count0=k, count1=tiles, fold_level=1, last_level=2,
                 function=function)  # fmt: skip
    return play(sets, cfg, [PASS] * STAGES, [a, b], **more)


def test_a_tile_by_hand():
    # a = columns (1, 2, 3, 4) and (1, 0, 1, 0), b = rows (10, 20) and (1, -1): column 0 is 10 a0 + a1, column 1
    # 20 a0 - a1. Lower halves are ignored.
    a = [f32(1, 2, 3, 4), [w | 5 for w in f32(1, 0, 1, 0)]]
    b = [f32(10, 20, 0, 0), f32(1, -1, 0, 0)]
    cfg = config(mode="systolic", vectors=3, count0=2, fold_level=1)
    done = play(ARRAY, cfg, [PASS, PASS], [a, b])
    assert done.words("vector") == [f32(11, 20, 31, 40), f32(19, 40, 59, 80)]


@pytest.mark.parametrize("k, tiles, latency", [(5, 1, 1), (5, 3, 2), (1, 4, 1), (2, 3, 1)])
def test_tiles_fill_run_and_drain(k, tiles, latency):
    # T = fill + n * max(K, C) + C, less the columns that a longer drain hides: the last tile ends after
    # (n - 1) * max(K, C) + K + fill + C ticks, and all of it but the tail's last tick is over when `done`.
    sets = ARRAY | {"pcu__op_latency_cycles": latency}
    params = small(**sets)
    columns, fill = STAGES, systolic_fill(params)
    assert fill == 1 + latency + 1
    period = max(k, columns)
    done = tile(sets, k, tiles)
    ends = [n * period + k + fill + c for n in range(tiles) for c in range(columns)]
    assert done.at("vector") == ends
    assert done.ticks == (tiles - 1) * period + k + fill + columns


@pytest.mark.parametrize("function, operations", [("exp", 9), ("sigmoid", 13)])
def test_columns_pass_the_tail(function, operations):
    # As above, and the function's operations later: two tiles of 3 iterations, 2 columns each.
    done = tile(ARRAY, 3, 2, function=function)
    assert done.at("vector") == [n * 3 + 3 + 3 + operations + c for n in range(2) for c in range(2)]


def test_a_tile_waits_for_the_drain_of_the_one_before():
    done = tile(ARRAY, 1, 6)
    assert done.activity["activity"].count(cause("drain")) > 0
    assert done.activity["activity"].count(0) == 6


def test_an_array_goes_on_while_its_results_wait():
    # The output is ready from tick 20. Tile 0 waits outside while tile 1, iterations 4..7, accumulates; its last
    # product stands before the accumulators from 9 on, and holds up all that follows iteration 8.
    done = tile(ARRAY, 4, 3, accept=lambda name, tick: tick >= 20)
    taken = [t for t, a in enumerate(done.activity["activity"]) if a == 0]
    assert taken == [*range(9), 20, 21, 22]
    assert set(done.activity["activity"][9:20]) == {cause("output")}


def test_an_array_that_waits_for_its_drain_adds_nothing_twice():
    # Columns leave on every fifth tick: 10 ticks a tile of 3 iterations, and the array waits with its last product.
    done = tile(ARRAY, 3, 5, accept=lambda name, tick: tick % 5 == 4)
    assert np.diff(done.at("vector")).tolist() == [5] * 9
    assert done.activity["activity"].count(cause("drain")) > 0


@settings(deadline=None, max_examples=40)
@given(st.integers(0, 2**32 - 1))
def test_random_pipelines_match_the_kernel(seed):
    random = Random(seed)
    counts = [random.randint(1, 3) for _ in range(3)]
    cfg = config(
        vectors=3, scalars=1, result=random.randrange(REGISTERS), fold=random.choice(("none", *rdu.FOLDS)),
        fold_type=random.choice(rdu.TYPES), tree=random.choice(("none", *rdu.FOLDS)), round=random.randrange(2),
        send_scalar=random.randrange(2), sequence=65535, last_level=random.randrange(8),
        **{f"count{n}": c for n, c in enumerate(counts)},
        **{f"{name}_level": random.randrange(4) for name in ("vector0", "vector1", "scalar0", "fold")},
    )  # fmt: skip
    cfg |= {"function": random.randrange(len(rdu.FUNCTIONS)), "gate": random.randrange(REGISTERS)}
    cfg["gated"] = int(cfg["fold"] == cfg["tree"] == 0 and random.random() < 0.5)
    stages = [
        stage(
            operation=random.choice(rdu.STAGE_OPS), type=random.choice(rdu.TYPES), constant=word(random),
            **{f"{name}_from": random.choice(rdu.OPERANDS) for name in "ab"},
            **{name: random.randrange(REGISTERS) for name in ("a", "b", "c", "to")},
        )
        for _ in range(STAGES)
    ]  # fmt: skip
    pops = [math.prod(counts[cfg[f"{name}_level"] :]) for name in ("vector0", "vector1", "scalar0")]
    vectors = [[[word(random) for _ in range(LANES)] for _ in range(n)] for n in pops[:2]]
    scalars = [[word(random) for _ in range(pops[2])]]
    willing = random.choice((0.3, 0.8, 1))
    holds = {(name, t): random.random() < willing for name in ("vector", "scalar") for t in range(300)}
    play(SIMD, cfg, stages, vectors, scalars, accept=lambda name, t: holds.get((name, t), True))


@settings(deadline=None, max_examples=15)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(0, 99), st.randoms(use_true_random=False))
def test_random_tiles_match_the_kernel(k, tiles, seed, random):
    holds = [random.random() < 0.6 for _ in range(400)]
    function = random.choice(rdu.FUNCTIONS)
    tile(ARRAY, k, tiles, seed, function=function, accept=lambda name, t: t >= 400 or holds[t])
