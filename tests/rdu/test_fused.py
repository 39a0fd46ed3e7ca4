"""A section of four operators in one kernel, GEMM -> multiply -> transpose -> GEMM, wherever its units lie.

It is a part of an FFT by matrices, the example of arXiv 2405.07518, section III: D = ((A B) * M)^T C for each of a row
of tiles. Nothing between the operators leaves the chip. Interpreter and RTL give the same bits, cycle model and RTL the
same ticks.
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

# A is [R, K], B [K, N], M [R, N], C [R, Q]. The R rows of A are the lanes of the first array; the second one takes the N
# rows of the transpose in blocks of LANES.
LANES, COLUMNS = 2, 2  # of an array
R, K, N, Q = LANES, 6, 4, 4
BLOCKS = N // LANES  # passes of the second array
FIRST, SECOND = N // COLUMNS, Q // COLUMNS  # strips of B and of C
LINE = 4 * LANES
AT = {"a": 0, "weights": 512, "m": 640, "d": 1024}  # bytes of HBM
DEPTHS = (2, 5)  # of the queues; each is RTL of its own
PINS = (
    {},
    {"gemm0": (2, 0), "gemm1": (0, 0), "turn": (3, 0), "store": (0, 1)},
    {"gemm0": (3, 1), "gemm1": (1, 1), "turn": (2, 1)},
)


def machine(*sets, depth=DEPTHS[0]):
    """Eight positions, of which only a PCU is to spare."""
    sizes = [
        *("grid.columns=4", "grid.rows=2", "agcu.per_side=2", "agcu.counters=3", "agcu.in_flight=8"),
        *(f"pcu.lanes={LANES}", f"pcu.stages={COLUMNS}", "pcu.systolic=true", "pcu.op_latency_cycles=2"),
        *("pcu.registers=2", "pcu.counters=2", "pcu.vector_inputs=2", "pcu.scalar_inputs=0"),
        *("pcu.exp_terms=1", "pcu.reciprocal_iterations=0", "pcu.rsqrt_iterations=0"),
        *("pmu.banks=4", "pmu.bytes=512", "pmu.counters=5", f"network.fifo_depth={depth}", "network.flows=8"),
        *("memory.hbm.bytes=4096", "memory.hbm.channels=4", f"memory.hbm.gb_per_s={4 * LINE}"),
        *("memory.hbm.efficiency=1", "memory.hbm.latency_ns=9", "memory.ddr.bytes=4096"),
        *("memory.ddr.channels=8", "node.p2p_channels=8", "node.copy_lines=8"),
        *(f"launch.{name}_us=0" for name in ("program_load", "argument_load", "host_launch")),
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


def fused(p, tiles, skew=True, apart=True):
    """The section, for an even number of tiles.

    Without `skew` all lanes of the transpose are written to one bank; without `apart` the two halves of A's double
    buffer share their banks.
    """
    s = Section(p, "fused")
    half = {"direction": "load", "format": "bf16"}
    # A by columns, which the array needs for each strip of B.
    s.agcu("load_a", argument=0, words=R, **half, **loops("", (tiles * K, 2 * R)))
    s.pmu(
        "a",
        enable=3,
        **loops("write_", (K, LANES), (2, 16), (tiles // 2, 0)),
        **loops("read_", (K, LANES), (FIRST, 0), (2, 16), (tiles // 2, 0)),
        bank_bit1=4 if apart else 6,
    )
    s.double_buffer("a", write_level=1, read_level=2)
    # B by strips and in each row by row, and C behind it: both units are given both, and keep what is theirs for all tiles.
    b, c = K * FIRST, R * SECOND
    s.agcu("load_weights", argument=1, words=COLUMNS, **half, **loops("", (b + c, 2 * COLUMNS)))
    for name, low, packets, times in (("b", 0, b, tiles), ("c", b * LANES, c, BLOCKS * tiles)):
        s.pmu(
            name,
            enable=3,
            low=low,
            words=packets * LANES,
            **loops("write_", (b + c, LANES)),
            read_base=low,
            **loops("read_", (packets, LANES), (times, 0)),
        )
        s.double_buffer(name, write_level=7, read_level=7, buffers=1)
    s.agcu("load_m", direction="load", argument=2, words=R, **loops("", (N, LINE), (tiles, 0)))
    array = {"mode": "systolic", "vectors": 3, "fold": "add", "fold_level": 1}
    s.pcu("gemm0", count0=K, count1=FIRST * tiles, round=1, **array)
    multiply = {"operation": "multiply", "a": 0, "b": 1, "to": 0}
    s.pcu("multiply", mode="simd", vectors=3, count0=N * tiles, round=1, stages=[multiply])
    # Columns are written and rows are read: word (r, n) of a half lies in its bank (n + r) % 2, so that neither meets a
    # bank twice. The other bit of the bank tells the halves apart.
    s.pmu(
        "turn",
        enable=3,
        bank_bit1=3,
        **loops("write_", (N, 1), (2, R * N), (tiles // 2, 0)),
        write_lane_stride=N,
        **loops("read_", (R, N), (SECOND, 0), (BLOCKS, LANES), (2, R * N), (tiles // 2, 0)),
        **({"skew_bits": 1, "skew_shift": 2} if skew else {}),
    )
    s.double_buffer("turn", write_level=1, read_level=3)
    s.pcu("gemm1", count0=R, count1=SECOND * BLOCKS * tiles, **array)
    s.agcu("store", direction="store", argument=3, words=LANES, **loops("", (BLOCKS * Q * tiles, LINE)))
    for source, *sinks in (
        *(("load_a", "a"), ("load_weights", "b", "c"), ("load_m", ("multiply", 1))),
        *(("a", ("gemm0", 0)), ("b", ("gemm0", 1)), ("gemm0", ("multiply", 0)), ("multiply", "turn")),
        *(("turn", ("gemm1", 0)), ("c", ("gemm1", 1)), ("gemm1", "store")),
    ):
        s.stream(source, *sinks)
    return s


def program(p, tiles, *, seed=0, at=None, **options):
    """The section placed, and launched once; `options` are those of `fused`."""
    built = fused(p, tiles, **options).build(seed=seed, at=at, remember=False)
    tags = []
    return Program(rdu.ISA, [segment(built, args=dict(enumerate(AT.values())), tags=tags)], tags)


def operands(tiles, integers=False):
    """A [tiles, R, K], B, M and C as bfloat16 words; with small integers everything is exact."""
    rng = np.random.default_rng(5)
    shapes = (tiles, R, K), (K, N), (R, N), (R, Q)
    return [
        reference.words(rng.integers(-3, 4, shape) if integers else rng.standard_normal(shape))
        for shape in shapes
    ]


def image(p, a, b, m, c):
    """HBM with the operands, in the order in which they are taken; M in words, the others in halves of them."""
    out = blank_image(p)
    strips = [x.reshape(len(x), -1, COLUMNS).transpose(1, 0, 2).ravel() for x in (b, c)]
    halves = [(x >> 16).astype("<u2") for x in (a.transpose(0, 2, 1), np.concatenate(strips))]
    for name, words in (("a", halves[0]), ("weights", halves[1]), ("m", m.T)):
        raw = np.ascontiguousarray(words).view(np.uint8).ravel()
        out["hbm"][AT[name] : AT[name] + raw.size] = raw
    return out


def stored(memory, tiles):
    """D, uint32[tiles, N, Q]."""
    words = memory["hbm"][AT["d"] :][: 4 * tiles * N * Q].view(np.uint32)
    return words.reshape(tiles, BLOCKS, Q, LANES).transpose(0, 1, 3, 2).reshape(tiles, N, Q)


def expected(a, b, m, c):
    """D, operator by operator."""
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
    after, _ = plan.interpret(spec, written, before)
    return engine.Observed(engine.Case(spec, written.text(), 0), written, steps, timeline, before, after)


def test_four_operators_are_what_they_are_one_by_one():
    spec, tiles = machine(), 4
    p = spec.params()
    a, b, m, c = operands(tiles, integers=True)
    after, _ = plan.interpret(spec, program(p, tiles), image(p, a, b, m, c))
    # A B is at most 6 * 9 = 54, and times M 162: whole numbers below 2**8, as bfloat16 holds them; any order of sums.
    x, y, z, w = (words.view(np.float32) for words in (a, b, m, c))
    result = stored(after, tiles).view(np.float32)
    assert np.abs(result).max() > 50
    np.testing.assert_array_equal(result, ((x @ y) * z).transpose(0, 2, 1) @ w)
    rounded = operands(tiles)
    after, _ = plan.interpret(spec, program(p, tiles), image(p, *rounded))
    np.testing.assert_array_equal(stored(after, tiles), expected(*rounded))


@pytest.mark.cosim
@pytest.mark.parametrize("depth", DEPTHS)
def test_rtl_agrees_wherever_units_lie(depth):
    spec, tiles = machine(depth=depth), 4
    p = spec.params()
    rounded = operands(tiles)
    observed = [
        observe(spec, program(p, tiles, seed=seed, at=at), image(p, *rounded)) for seed, at in enumerate(PINS)
    ]
    assert len({o.program.segments[0].regions["config.pcu"][["x", "y"]].tobytes() for o in observed}) == 3
    outcomes = plan.run_rtl(plan.build(spec, False), [(spec, o.steps, o.before) for o in observed], None)
    for o, outcome in zip(observed, outcomes, strict=True):
        assert outcome.error is None
        assert engine.compare(o, outcome) is None
        np.testing.assert_array_equal(stored(outcome.image, tiles), expected(*rounded))


@pytest.mark.parametrize("at", PINS)
def test_the_first_array_binds(at):
    """A tile takes FIRST = 2 passes of K = 6 ticks of the first array, 12, and BLOCKS * SECOND = 4 passes of 2 ticks, 8,
    of the second one: two tiles more take 24 ticks more. Where reading and writing A meet in the same banks, which do one
    of both in a tick, its buffer takes 12 ticks for one and K = 6 for the other: 36."""
    p = machine(depth=8).params()

    def more(**options):
        ticks = [plan.sim.simulate(p, program(p, tiles, at=at, **options)).ticks for tiles in (12, 14)]
        return ticks[1] - ticks[0]

    assert more() == 24
    assert more(apart=False) == 36


def test_stripes_spare_the_transpose_its_conflicts():
    p, tiles = machine().params(), 4
    conflicts = {
        skew: plan.sim.simulate(p, program(p, tiles, skew=skew)).counter("bank_conflicts") for skew in (1, 0)
    }
    # Without, both words of each of N columns go to one bank.
    assert conflicts[1] == 0 and conflicts[0] >= tiles * N


def test_only_operands_and_results_cross_the_memory():
    p, tiles = machine().params(), 4
    timeline = plan.sim.simulate(p, program(p, tiles))
    # In lines of 8 bytes: A and the weights in halves of words, M for each tile, D.
    lines = [tiles * R * K // 4, (K * N + R * Q) // 4, tiles * R * N // 2, tiles * N * Q // 2]
    assert timeline.counter("hbm_lines") == sum(lines) == 12 + 8 + 16 + 32
    # Of the weights, B's unit drops C's words and C's unit B's.
    assert timeline.counter("dropped") == R * Q + K * N
    assert timeline.counter("launches") == 1
