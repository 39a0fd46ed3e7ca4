"""A section of four operators in one kernel, GEMM -> multiply -> transpose -> GEMM, wherever its units lie.

It is the first part of an FFT by matrices, the example of arXiv 2405.07518, Fig. 1: D = ((A B) * M)^T C for each of a
row of tiles. Nothing between the operators leaves the chip: interpreter and RTL give the same bits, cycle model and RTL
the same ticks.
"""

import numpy as np
import pytest

from tilewright.arch import rdu
from tilewright.arch import spec as specs
from tilewright.arch.isa import Program
from tilewright.mappers.rdu.section import Section, segment
from tilewright.verify import engine
from tilewright.verify import rdu as plan
from tilewright.workloads import rdu_layer as reference
from tilewright.workloads.rdu import blank_image

# A is [R, K], B [K, N], M [R, N], C [R, Q]; R rows are the lanes of the first array, N those of the second one.
LANES, COLUMNS = 4, 2  # of an array
R, K, N, Q = LANES, 6, LANES, 4
LINE = 4 * LANES
DEPTHS = (2, 7)  # of the queues; each is RTL of its own
# Where A, B, M, C and D begin in HBM, in bytes.
AT = {"a": 0, "b": 512, "m": 640, "c": 768, "d": 1024}
PINS = ({}, {"gemm0": (2, 2), "gemm1": (0, 0)}, {"turn": (1, 0), "a": (1, 2), "store": (2, 0), "load_a": (2, 2)})


def machine(*sets, depth=DEPTHS[0]):
    sizes = [
        *("grid.columns=3", "grid.rows=3", "agcu.per_side=3", "agcu.counters=3", "agcu.in_flight=8"),
        *(f"pcu.lanes={LANES}", f"pcu.stages={COLUMNS}", "pcu.registers=5", "pcu.counters=3", "pcu.vector_inputs=2"),
        *("pcu.scalar_inputs=1", "pcu.systolic=true", "pcu.op_latency_cycles=2", "pcu.exp_terms=1"),
        *("pmu.banks=4", "pmu.bytes=1024", "pmu.counters=4", f"network.fifo_depth={depth}", "network.flows=8"),
        *("memory.hbm.bytes=4096", "memory.hbm.channels=2", f"memory.hbm.gb_per_s={2 * LINE}"),
        *("memory.hbm.efficiency=1", "memory.hbm.latency_ns=9", "memory.ddr.bytes=4096", "memory.ddr.channels=4"),
        *("launch.program_load_us=0", "launch.argument_load_us=0", "launch.host_launch_us=0"),
        *sets,
    ]
    tree = specs.apply_sets(specs.load_tree("plasticine", ["rdu"]), sizes)
    return specs.build(rdu.RduSpec, tree, "small")


def loops(prefix, *counts_and_strides):
    """Loop counts and strides, the innermost first."""
    return {
        f"{prefix}{what}{n}": pair[k]
        for n, pair in enumerate(counts_and_strides)
        for k, what in enumerate(("count", "stride"))
    }


def fused(p, tiles, skew=True):
    """The section, for an even number of tiles; without `skew` the transpose meets one bank with all lanes."""
    s = Section(p, "fused")
    half = {"direction": "load", "format": "bf16"}
    first, second = N // COLUMNS, Q // COLUMNS  # strips of columns, each a pass of the array
    # A by columns: twice the array needs them, once for each strip of B.
    s.agcu("load_a", argument=0, words=R, **half, **loops("", (tiles * K, 2 * R)))
    s.pmu(
        "a",
        enable=3,
        **loops("write_", (K, LANES), (2, 32), (tiles // 2, 0)),
        **loops("read_", (K, LANES), (first, 0), (2, 32), (tiles // 2, 0)),
    )
    s.double_buffer("a", write_level=1, read_level=2)
    # B and C by strips, and in each row by row; they stay for all tiles.
    for name, index, rows, strips in (("b", 1, K, first), ("c", 2, R, second)):
        s.agcu(f"load_{name}", argument=index, words=COLUMNS, **half, **loops("", (rows * strips, 2 * COLUMNS)))
        s.pmu(
            name,
            enable=3,
            **loops("write_", (rows * strips, LANES)),
            **loops("read_", (rows * strips, LANES), (tiles, 0)),
        )
        s.double_buffer(name, write_level=7, read_level=7, buffers=1)
    s.agcu("load_m", direction="load", argument=3, words=R, **loops("", (N, LINE), (tiles, 0)))
    array = {"mode": "systolic", "vectors": 3, "fold": "add", "fold_level": 1}
    s.pcu("gemm0", count0=K, count1=first * tiles, round=1, **array)
    multiply = {"operation": "multiply", "a": 0, "b": 1, "to": 0}
    s.pcu("multiply", mode="simd", vectors=3, count0=N * tiles, round=1, stages=[multiply])
    # Columns are written, rows are read: word (r, n) lies in bank n + r, so that neither meets a bank twice.
    s.pmu(
        "turn",
        enable=3,
        **loops("write_", (N, 1), (2, R * N), (tiles // 2, 0)),
        write_lane_stride=N,
        **loops("read_", (R, N), (second, 0), (2, R * N), (tiles // 2, 0)),
        **({"skew_bits": 2, "skew_shift": 2} if skew else {}),
    )
    s.double_buffer("turn", write_level=1, read_level=2)
    s.pcu("gemm1", count0=R, count1=second * tiles, **array)
    s.agcu("store", direction="store", argument=4, words=N, **loops("", (Q * tiles, LINE)))
    for source, *sinks in (
        *(("load_a", "a"), ("load_b", "b"), ("load_c", "c"), ("load_m", ("multiply", 1))),
        *(("a", ("gemm0", 0)), ("b", ("gemm0", 1)), ("gemm0", ("multiply", 0)), ("multiply", "turn")),
        *(("turn", ("gemm1", 0)), ("c", ("gemm1", 1)), ("gemm1", "store")),
    ):
        s.stream(source, *sinks)
    return s


def program(p, tiles, **options):
    """`options` of `fused`, and of `build`."""
    own = {"skew": options.pop("skew")} if "skew" in options else {}
    built = fused(p, tiles, **own).build(remember=False, **options)
    args = dict(enumerate((AT["a"], AT["b"], AT["c"], AT["m"], AT["d"])))
    tags = []
    return Program(rdu.ISA, [segment(built, args=args, tags=tags)], tags)


def operands(tiles, integers=False):
    """A [tiles, R, K], B, M and C as bfloat16 words; with small integers everything is exact."""
    rng = np.random.default_rng(5)
    shapes = (tiles, R, K), (K, N), (R, N), (R, Q)
    return [
        reference.words(rng.integers(-3, 4, shape) if integers else rng.standard_normal(shape)) for shape in shapes
    ]


def image(p, a, b, m, c):
    """HBM with the operands, in the order in which they are taken."""
    out = blank_image(p)

    def strips(x):
        return x.reshape(len(x), -1, COLUMNS).transpose(1, 0, 2)

    for name, words in (("a", a.transpose(0, 2, 1)), ("b", strips(b)), ("c", strips(c))):
        raw = np.ascontiguousarray((words >> 16).astype("<u2")).view(np.uint8).ravel()
        out["hbm"][AT[name] : AT[name] + raw.size] = raw
    raw = np.ascontiguousarray(m.T).view(np.uint8).ravel()
    out["hbm"][AT["m"] : AT["m"] + raw.size] = raw
    return out


def stored(memory, tiles):
    """D, uint32[tiles, N, Q]."""
    words = memory["hbm"][AT["d"] :][: 4 * tiles * Q * N].view(np.uint32)
    return words.reshape(tiles, Q, N).transpose(0, 2, 1)


def expected(a, b, m, c):
    """D operator by operator."""
    out = []
    for tile in a:
        product = reference.round_bf16(reference.product(tile, b))
        scaled = reference.round_bf16(reference.lane_op("multiply", "fp32", product, m))
        out.append(reference.product(np.ascontiguousarray(scaled.T), c))
    return np.array(out)


def observe(spec, written, before):
    """A case on interpreter and model."""
    steps = engine.one_by_one(written)
    timeline = plan.simulate(spec, steps, fold=False, trace=True)
    after = plan.interpret(spec, written, before)
    return engine.Observed(engine.Case(spec, written.text(), 0), written, steps, timeline, before, after)


def test_four_operators_are_what_they_are_one_by_one():
    spec, tiles = machine(), 4
    p = spec.params()
    a, b, m, c = operands(tiles, integers=True)
    after = plan.interpret(spec, program(p, tiles), image(p, a, b, m, c))
    # Sums of integers below 2**8 (K * 9 * 3 = 162, R * 162 * 3 = 1944 in float32): any order gives them.
    x, y, z, w = (words.view(np.float32) for words in (a, b, m, c))
    np.testing.assert_array_equal(stored(after, tiles).view(np.float32), ((x @ y) * z).transpose(0, 2, 1) @ w)
    rounded = operands(tiles)
    after = plan.interpret(spec, program(p, tiles), image(p, *rounded))
    np.testing.assert_array_equal(stored(after, tiles), expected(*rounded))


@pytest.mark.cosim
@pytest.mark.parametrize("depth", DEPTHS)
def test_rtl_agrees_wherever_units_lie(depth):
    spec, tiles = machine(depth=depth), 4
    p = spec.params()
    rounded = operands(tiles)
    observed = [
        observe(spec, program(p, tiles, seed=seed, at=at), image(p, *rounded))
        for seed, at in enumerate(PINS)
    ]
    places = {tuple(o.program.segments[0].regions["config.pcu"][["x", "y"]].tolist()) for o in observed}
    assert len(places) == len(PINS)
    outcomes = plan.run_rtl(plan.build(spec, False), [(spec, o.steps, o.before) for o in observed], None)
    for o, outcome in zip(observed, outcomes, strict=True):
        assert outcome.error is None
        assert engine.compare(o, outcome) is None
        np.testing.assert_array_equal(stored(outcome.image, tiles), expected(*rounded))


@pytest.mark.parametrize("seed", range(3))
def test_the_first_array_binds(seed):
    """A tile takes N / COLUMNS passes of K = 6 ticks of the first array, 12, and as many as Q / COLUMNS of R = 4, 8,
    of the second one: two tiles more take 24 ticks more, and the transpose does not slow them down."""
    p = machine(depth=8).params()
    ticks, conflicts = {}, {}
    for skew in (True, False):
        for tiles in (8, 10):
            timeline = plan.sim.simulate(p, program(p, tiles, seed=seed, skew=skew))
            ticks[skew, tiles], conflicts[skew, tiles] = timeline.ticks, timeline.counter("bank_conflicts")
    assert ticks[True, 10] - ticks[True, 8] == 24
    assert conflicts[True, 10] == 0 < conflicts[False, 10]


def test_only_operands_and_results_cross_the_memory():
    tiles = 4
    p = machine().params()
    timeline = plan.sim.simulate(p, program(p, tiles))
    # In lines of 16 bytes: A in halves of 4 rows, 2 columns a line; B's 24 halves and C's 16; M for each tile; D.
    lines = tiles * K // 2 + K * N * 2 // LINE + R * Q * 2 // LINE + tiles * N + tiles * Q
    assert timeline.counter("hbm_lines") == lines == 12 + 3 + 2 + 16 + 16
    assert timeline.counter("launches") == 1
