"""GEMMs cut for the arrays: their values, their traffic by hand, the choice of tiles; models mapped as operators."""

import dataclasses
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program, Segment
from tilewright.arch.lut import ISA, KINDS, LEVELS, OP, LutSpec
from tilewright.arch.scenario import Scenario
from tilewright.arch.spec import apply_sets, build, load_tree
from tilewright.mappers.lut import Tiling, gemm_program, map_model, plan
from tilewright.mappers.lut.gemm import Shape, check_tiling, choose, even
from tilewright.run import run
from tilewright.sim.lut import simulate
from tilewright.workloads.graph import decode_step, prefill
from tilewright.workloads.lut import ACTIVATIONS, interpret
from tilewright.workloads.lut_kernels import encode, lut_gemm
from tilewright.workloads.models import load_model


def machine(*sets, name="lut-a100-4x"):
    return build(LutSpec, apply_sets(load_tree(name, ["lut"]), sets), "test")


FULL = machine()
# 6 cores; tiles of 2 x 16; in a half 8 rows of tables, 16 lines of weights, 2 result tiles. A line is 8 bytes.
TINY = [
    "sms=3", "cores_per_sm=2", "lut.n=16", "lut.arrays=1", "memory.dram_bytes=400000", "buffers.table_rows=8",
    "buffers.weight_lines=16", "buffers.result_tiles=2", "memory.lines_in_flight=500",
]  # fmt: skip
FORMATS = {
    "int8": [],
    "int16, K=3": ["lut.activation=int16", "lut.k=3"],
    "fp16": ["lut.activation=fp16", "lut.accumulator=fp16"],
    "fp16, fp32": ["lut.activation=fp16", "lut.accumulator=fp32"],
    "fp16, int8 tables": ["lut.activation=fp16", "lut.accumulator=fp32", "lut.table=int8"],
    "fp8, blocks": ["lut.activation=fp8", "lut.accumulator=fp32", "lut.table=int8", "lut.table_block=3"],
}
BITNET = load_model("bitnet-b1.58-3b")


def code_of(program):
    (segment,) = program.segments
    return segment.regions["code"]


def loaded(code, op, level=None):
    mine = code["op"] == OP[op]
    if level is not None:
        mine &= code["level"] == LEVELS.index(level)
    return int(code["count"][mine].sum())


# ---- values -------------------------------------------------------------------------------------------


def operands(spec, m, n, k, bits, seed):
    rng = np.random.default_rng(seed)
    dtype = np.dtype(ACTIVATIONS[spec.lut.activation])
    a = rng.integers(-128, 128, (m, k)) if dtype.kind == "i" else rng.normal(size=(m, k))
    return a.astype(dtype), rng.integers(0, 1 << bits, (n, k)).astype(np.uint8)


def check_values(spec, m, n, k, bits, seed, tiling=None):
    """All cores one after the other over one memory, against the reference for each share along K."""
    gemm = plan(spec, m, n, k, bits, tiling)
    a, q = operands(spec, m, n, k, bits, seed)
    image = gemm.place(a, encode(q, bits, spec.lut.k))
    for core in range(gemm.cores):
        image = interpret(spec, gemm.program(core), image)[0]
    expected = None
    for share in range(gemm.tiling.cores[2]):
        first, groups = gemm.share_of_k(share * gemm.tiling.cores[0] * gemm.tiling.cores[1])
        span = slice(first * spec.lut.k, min(k, (first + groups) * spec.lut.k))
        part = lut_gemm(
            a[:, span], encode(q[:, span], bits, spec.lut.k), accumulator=spec.lut.accumulator,
            table=spec.lut.table, block=spec.lut.table_block,
        )  # fmt: skip
        expected = part if expected is None else expected + part
    got = gemm.collect(image)
    assert got.dtype == expected.dtype and np.array_equal(got, expected)
    if spec.lut.accumulator == "int32":
        assert np.array_equal(got, a.astype(np.int32) @ (2 * q.astype(np.int32) - (1 << bits) + 1).T)


@pytest.mark.parametrize("sets", FORMATS.values(), ids=FORMATS)
@pytest.mark.parametrize("shape", [(1, 65, 4), (5, 33, 70), (1, 16, 300), (17, 100, 37)], ids=str)
def test_cores_together_compute_the_gemm(shape, sets):
    check_values(machine(*TINY, *sets), *shape, bits=2, seed=1)


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_every_tiling_computes_the_same(data):
    draw = data.draw
    spec = machine(*TINY, *draw(st.sampled_from([FORMATS["int8"], FORMATS["fp8, blocks"]])))
    m, n, k, bits = (draw(st.integers(1, most)) for most in (12, 90, 60, 4))
    shape = Shape(spec, m, n, k, bits)
    unit = shape.table_block
    along_m = draw(st.integers(1, min(3, shape.m_tiles)))
    along_n = draw(st.integers(1, min(6 // along_m, shape.n_tiles)))
    along_k = draw(st.integers(1, min(6 // (along_m * along_n), -(-shape.groups // unit))))
    halves = draw(st.integers(1, 2))
    mb = draw(st.integers(1, 2))
    nb = draw(st.integers(1, min(2 * halves // mb, 16 // (unit * bits))))
    most = min(8 // mb, 16 // (nb * bits)) // unit
    groups = unit * draw(st.integers(1, most))
    check_values(spec, m, n, k, bits, 2, Tiling((along_m, along_n, along_k), (mb, nb), groups, halves))


def test_place_refuses_what_does_not_fit():
    gemm = plan(machine(*TINY), 3, 20, 9)
    a, q = operands(gemm.shape.spec, 3, 20, 9, 2, 0)
    with pytest.raises(UserError, match=r"activations must be int8 of shape \(3, 9\), not int8 of \(3, 8\)"):
        gemm.place(a[:, :8], encode(q, 2))
    with pytest.raises(
        UserError, match=r"words of 4 elements of shape \(2, 20, 3\), not of 4 of \(3, 20, 3\)"
    ):
        gemm.place(a, encode(q, 3))


# ---- what is loaded, by hand --------------------------------------------------------------------------


def test_one_share_by_hand():
    # 20 x 40 x 36: 10 m-tiles, 3 n-tiles, 9 groups. 2 x 3 x 1 cores: core 0 has 5 m-tiles and 1 n-tile, in blocks
    # of 2, 2 and 1; chunks of 4, 4 and 1 groups.
    spec = machine(*TINY)
    gemm = plan(spec, 20, 40, 36, 2, Tiling((2, 3, 1), (2, 1), 4, 1))
    assert [tuple(b) for b in gemm.blocks()] == [(0, 2, 0, 1), (2, 2, 0, 1), (4, 1, 0, 1)]
    assert [tuple(b)[::2] for b in gemm.blocks(5)] == [(5, 2), (7, 2), (9, 2)]
    code = code_of(gemm.program())
    # A row of tables is 2 rows x 4 bytes = 8 bytes: a line. 5 m-tiles of 9 groups; weights for each of 3 blocks.
    assert (loaded(code, "LOAD_A"), loaded(code, "LOAD_W")) == (5 * 9, 3 * 9 * 2)
    lmma = code[code["op"] == OP["LMMA"]]
    assert lmma["groups"].tolist() == [4, 4, 1] * 3 and lmma["accumulate"].tolist() == [0, 1, 1] * 3
    # Halves alternate, over the ends of blocks, too.
    assert lmma["table"].tolist() == lmma["weight"].tolist() == [0, 1, 0, 1, 0, 1, 0, 1, 0]
    assert lmma["result"].tolist() == [0] * 3 + [1] * 3 + [0] * 3
    assert (lmma["m_tiles"] * lmma["groups"] * lmma["bits"]).sum() == 5 * 9 * 2
    # All operands fit into L2: activations are there, weights are new in the first wave, 2 cores sharing a line.
    weights = code[code["op"] == OP["LOAD_W"]]
    assert weights["level"].tolist() == [0, 1, 0] + [1] * 6
    assert loaded(code, "LOAD_A", "dram") == 0
    timeline = simulate(spec.params(), gemm.program())
    assert timeline.counter("planes") == 5 * 9 * 2 and timeline.counter("table_rows") == 5 * 9
    assert timeline.counter("result_tiles") == 5 * 3  # every chunk takes them up and puts them back


def test_what_exceeds_l2_is_fetched_in_every_wave():
    sets = ["memory.l2_bytes=700"]  # 10 x 13 + 3 x 13 x 2 lines of 8 bytes are 1664
    gemm = plan(machine(*TINY, *sets), 20, 40, 50, 2, Tiling((2, 3, 1), (2, 1), 4, 1))
    code = code_of(gemm.program())
    for op, sharers in (("LOAD_A", 3), ("LOAD_W", 2)):
        mine = code[code["op"] == OP[op]]["level"]
        assert mine.tolist() == [int(i % sharers > 0) for i in range(12)]
    # A wave's results, 6 cores x 2 tiles of 2 x 16 x 4 bytes, are 1536 bytes: to DRAM.
    assert set(code["level"][code["op"] == OP["STORE"]].tolist()) == {0}


def test_both_result_halves_of_a_block():
    gemm = plan(machine(*TINY), 8, 16, 32, 2, Tiling((1, 1, 1), (4, 1), 2, 2))
    lmma = code_of(gemm.program())
    lmma = lmma[lmma["op"] == OP["LMMA"]]
    assert lmma["result"].tolist() == [0, 1] * 4
    assert lmma["table_base"].tolist() == [0, 4] * 4 and lmma["m_tiles"].tolist() == [2] * 8
    assert lmma["accumulate"].tolist() == [0, 0] + [1] * 6


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 60), st.integers(1, 200), st.integers(1, 200), st.integers(1, 3), st.integers(1, 4))
def test_cores_store_each_tile_once(m, n, k, along, bits):
    spec = machine(*TINY)
    shape = Shape(spec, m, n, k, bits)
    gemm = plan(spec, m, n, k, bits, choose(shape))
    lines = []
    for core in range(gemm.cores):
        for code in gemm.waves(core):
            for store in code[code["op"] == OP["STORE"]]:
                first = int(store["line"]) - gemm.result_line
                lines += range(first, first + int(store["count"]) * spec.params().tile_lines)
    assert sorted(lines) == list(range(gemm.result_lines))


def test_shares_by_hand():
    assert even(150, 10) == [(15 * i, 15) for i in range(10)]
    # 256 x 150 tiles: 43 x 10 cores have at most 6 x 15; 5.95 x 15 on average, of 432 cores 430 work.
    gemm = plan(FULL, 2048, 9600, 3200)
    assert gemm.tiling.cores == (43, 10, 1)
    assert gemm.slots == 6 * 15 * 800 * (8 * 64 * 4) * 432
    assert 2048 * 9600 * 3200 / gemm.slots == pytest.approx(256 * 150 / (6 * 15 * 432))


# ---- the choice ---------------------------------------------------------------------------------------


def test_one_row_is_spread_over_the_cores_along_k():
    # 50 n-tiles would leave 382 of 432 cores, and their shares of the bandwidth, idle.
    gemm = plan(FULL, 1, 3200, 3200)
    assert gemm.tiling.cores[0] == 1 and gemm.cores >= 0.9 * 432
    # Each line of weights is fetched from DRAM once, by nobody else.
    code = code_of(gemm.program())
    assert loaded(code, "LOAD_W", "l2") == 0
    largest = -(-50 // gemm.tiling.cores[1]) * gemm.share_of_k()[1] * 2
    assert loaded(code, "LOAD_W") == largest >= 50 * 800 * 2 / 432


@pytest.mark.parametrize(
    "shape", [(2048, 9600, 3200), (1024, 3200, 8640), (1, 17280, 3200), (96, 700, 5120)], ids=str
)
@pytest.mark.parametrize("name", ["lut-a100-4x", "lut-a100-8x"])
def test_estimates_are_near_and_no_worse_tiling_is_chosen(name, shape):
    spec = machine(name=name)
    best = plan(spec, *shape)
    ticks = simulate(spec.params(), best.program()).ticks
    # Less of everything: two m-tiles and n-tiles a block, half of a chunk.
    t = best.tiling
    small = t._replace(tiles=tuple(-(-x // 2) for x in t.tiles), groups=-(-t.groups // 2))
    assert ticks <= 1.01 * simulate(spec.params(), plan(spec, *shape, tiling=small).program()).ticks
    one_half = t._replace(result_halves=3 - t.result_halves)
    try:
        other = plan(spec, *shape, tiling=one_half)
    except UserError:
        return
    assert ticks <= 1.1 * simulate(spec.params(), other.program()).ticks


def test_tiles_follow_the_buffers():
    shape = 2048, 27648, 5120
    of = {
        sets: plan(machine(*sets), *shape).tiling
        for sets in [
            (),
            ("buffers.table_rows=16",),
            ("buffers.result_tiles=4",),
            ("buffers.weight_lines=16",),
        ]
    }
    full = of[()]
    assert (
        full.tiles[0] * full.tiles[1] * 1.1 > 2 * 16 or full.result_halves == 1
    )  # the result buffer is used up
    assert of["buffers.table_rows=16",].groups * of["buffers.table_rows=16",].tiles[0] <= 16
    assert np.prod(of["buffers.result_tiles=4",].tiles) <= 8 < np.prod(full.tiles)
    assert of["buffers.weight_lines=16",].groups * of["buffers.weight_lines=16",].tiles[1] * 2 <= 16


@settings(deadline=None, max_examples=40)
@given(st.data())
def test_every_choice_fits(data):
    draw = data.draw
    least = {"table_rows": 1, "weight_lines": 4, "result_tiles": 1}
    sets = [f"buffers.{key}={draw(st.integers(low, 64))}" for key, low in least.items()]
    spec = machine(*sets, f"sms={draw(st.integers(1, 200))}", "memory.lines_in_flight=500")
    m, n, k, bits = (draw(st.integers(1, most)) for most in (5000, 9000, 9000, 4))
    shape = Shape(spec, m, n, k, bits)
    check_tiling(shape, choose(shape))


@pytest.mark.parametrize(
    ("tiling", "message"),
    [
        (Tiling((9, 1, 1), (1, 1), 1, 1), "tiling: cores along M must be in 1..2, not 9"),
        (Tiling((2, 3, 2), (1, 1), 1, 1), "tiling: 12 cores are more than the 6 of lut-a100-4x"),
        (Tiling((1, 1, 1), (1, 1), 9, 1), "tiling: needs 9 of buffers.table_rows, which has 8"),
        (Tiling((1, 1, 1), (1, 3), 3, 1), "tiling: needs 18 of buffers.weight_lines, which has 16"),
        (Tiling((1, 1, 1), (1, 3), 1, 1), "tiling: needs 3 of buffers.result_tiles, which has 2"),
        (
            Tiling((1, 1, 1), (0, 1), 1, 1),
            "tiling: tiles and groups must be at least 1, result_halves 1 or 2",
        ),
    ],
)
def test_tilings_are_checked(tiling, message):
    with pytest.raises(UserError) as error:
        plan(machine(*TINY), 4, 60, 64, 2, tiling)
    assert str(error.value) == message


def test_gemms_are_checked():
    with pytest.raises(UserError, match="must be at least 1, not 0, 5 and 5"):
        gemm_program(FULL, 0, 5, 5)
    with pytest.raises(UserError, match=r"weights must have 1\.\.4 bits, not 5"):
        gemm_program(FULL, 5, 5, 5, 5)
    with pytest.raises(UserError, match=r"needs \d+ lines of memory, memory\.dram_bytes hold 50000"):
        gemm_program(machine(*TINY), 1000, 1000, 1000)
    blocks = machine(*TINY, *FORMATS["fp8, blocks"], "lut.table_block=9")
    with pytest.raises(
        UserError, match=r"9 groups of int8 tables that share a scale do not fit buffers\.table_rows 8"
    ):
        gemm_program(blocks, 5, 5, 50)


# ---- models -------------------------------------------------------------------------------------------

BERT = load_model("all-minilm-l6-v2")
SMALL = dataclasses.replace(BITNET, layers=2)


def segments(model, scenario, mapping=None, spec=FULL):
    mapped = map_model(spec, model, scenario, mapping)
    return mapped, [s.regions["code"] for s in mapped.program.segments]


def by_operator(mapped, codes, layer=0):
    """The instructions of each operator of a layer."""
    code = np.concatenate(codes)
    return {t.name.removeprefix(f"layer {layer} "): code[code["tag"] == i]
            for i, t in enumerate(mapped.tags) if t.layer in (layer, -1)}  # fmt: skip


@pytest.mark.parametrize("name", ["bitnet-b1.58-3b", "opt-175b", "bloom-176b", "falcon-40b", "gpt2-xl"])
def test_tags_are_the_operators_of_the_graph(name):
    model = dataclasses.replace(load_model(name), layers=2)
    mapped, codes = segments(model, Scenario(prompt=64, generate=2))
    operators = prefill(model, prompt=64).operators
    assert [(t.op, t.layer) for t in mapped.tags if t.op != "precompute"] == [
        (o.name, o.layer) for o in operators
    ]
    assert len(codes) == mapped.steps == len(mapped.step_of) == 3 * 4
    assert list(mapped.step_of) == [0] * 4 + [1] * 4 + [2] * 4
    assert set(np.concatenate(codes)["tag"].tolist()) == set(range(len(mapped.tags)))
    labels = [s.label for s in mapped.program.segments]
    assert labels[:4] == ["prompt embedding", "prompt layer 0", "prompt layer 1", labels[3]]
    assert labels[8] == "token 1 embedding"


def test_all_multiply_accumulates_are_there():
    mapped, codes = segments(SMALL, Scenario(prompt=64, generate=1))
    for i, graph in enumerate((prefill(SMALL, prompt=64), decode_step(SMALL, context=64))):
        part = np.concatenate([c for c, step in zip(codes, mapped.step_of, strict=True) if step == i])
        for op in graph.operators:
            code = part[part["tag"] == next(t for t, tag in enumerate(mapped.tags) if tag.name.endswith(
                f"layer {op.layer} {op.name}" if op.layer >= 0 else op.name))]  # fmt: skip
            ordinary = code[code["op"] == OP["ORDINARY"]]
            if op.kind == "linear":
                lmma = code[code["op"] == OP["LMMA"]].astype([(n, np.int64) for n in code.dtype.names])
                tiles = (lmma["m_tiles"] * lmma["n_tiles"] * lmma["groups"]).sum()
                # Core 0 has the largest of 432 shares.
                assert tiles * 432 * 8 * 64 * 4 >= op.macs
                assert (lmma["bits"] == 2).all()
            else:
                assert len(ordinary) == len(code) == 1
                kind = "tensor_fp16" if op.kind in ("scores", "values", "lm_head") else "vector"
                assert KINDS[ordinary["kind"][0]] == kind
                assert (
                    0 <= ordinary["operations"][0] - -(-op.flops // 432) <= -(-7 * op.output_elements // 432)
                )


def test_spans_by_step():
    result = run(FULL, SMALL, Scenario(prompt=8, generate=2), by_step=True)
    rows = [(row["name"], row["step"]) for row in result.spans.rows()]
    assert len(set(rows)) == len(rows) and {step for _, step in rows} == {0, 1, 2}
    assert {name for name, step in rows if step == 0} == {name for name, step in rows if step == 2}
    starts = [min(r["start"] for r in result.spans.rows() if r["step"] == step) for step in (0, 1, 2)]
    assert starts == sorted(starts) and starts[0] < starts[1] < starts[2]


def test_decode_of_a_batch_has_a_row_for_each_sequence():
    mapped, _ = segments(SMALL, Scenario(generate=1, batch=24))
    gemms = mapped.document["gemms"]
    assert set(gemms) == {f"decode {op}" for op in ("qkv", "attention_out", "gate_up", "down")}
    assert gemms["decode qkv"]["cores"][0] <= 3  # 24 rows are 3 m-tiles


def test_steps_differ_in_attention_only():
    mapped, codes = segments(SMALL, Scenario(context=100, generate=2))
    first, second = codes[:4], codes[4:]
    for a, b in zip(first, second, strict=True):
        changed = {mapped.tags[t].op for t in a["tag"][a != b]}
        assert changed <= {"scores", "softmax", "values"}
    # FP16 keys of 101 and 102 tokens, 32 heads of 100, and the query: bytes of one of 432 cores.
    at = next(i for i, t in enumerate(mapped.tags) if t.name == "layer 0 scores")
    keys = [int(c["bytes"][c["tag"] == at][0]) for c in (first[1], second[1])]
    assert keys == [-(-2 * (n * 3200 + 3200) // 432) for n in (101, 102)]


def test_precompute_fused_and_separate():
    fused, a = segments(SMALL, Scenario(prompt=256, generate=0))
    apart, b = segments(SMALL, Scenario(prompt=256, generate=0), {"precompute": "separate"})
    assert "precompute" not in {t.op for t in fused.tags}
    assert [t.name for t in apart.tags if t.op == "precompute" and t.layer == 0] == [
        f"layer 0 {op} precompute" for op in ("qkv", "attention_out", "gate_up", "down")
    ]
    one, two = by_operator(fused, a), by_operator(apart, b)
    # A norm writes int8 in place of FP16: 256 x 3200 x (2 + 1) bytes and its gain; quantising takes 6 operations.
    norm = 256 * (4 * 3200 + 3)
    assert one["attention_norm"]["bytes"] == -(-(256 * 3200 * 3 + 6400) // 432)
    assert one["attention_norm"]["operations"] == -(-(norm + 256 * 3200 * 6) // 432)
    assert two["attention_norm"]["bytes"] == -(-(256 * 3200 * 4 + 6400) // 432)
    assert two["attention_norm"]["operations"] == -(-norm // 432)
    assert two["qkv precompute"]["bytes"] == -(-(256 * 3200 * 3) // 432)
    assert two["qkv precompute"]["operations"] == -(-(256 * 3200 * 6) // 432)
    assert np.array_equal(one["qkv"]["op"], two["qkv"]["op"])


def test_precompute_of_int8_tables():
    # 8 entries and an FP32 scale for 4 activations: 3 bytes each. Sum 1; tables (14 additions + 8 x 5) / 4.
    spec = machine(*FORMATS["fp16, int8 tables"])
    mapped, codes = segments(SMALL, Scenario(prompt=256, generate=0), {"precompute": "separate"}, spec)
    work = by_operator(mapped, codes)["qkv precompute"]
    assert work["bytes"] == -(-(256 * 3200 * 5) // 432)
    assert work["operations"] == -(-int(256 * 3200 * (1 + 13.5)) // 432)
    # FP16 activations are read as they are.
    spec = machine("lut.activation=fp16", "lut.accumulator=fp32")
    mapped, codes = segments(SMALL, Scenario(prompt=256, generate=0), {"precompute": "separate"}, spec)
    work = by_operator(mapped, codes)["qkv precompute"]
    assert (work["bytes"], work["operations"]) == (-(-(256 * 3200 * 2) // 432), -(-(256 * 3200) // 432))


def test_attention_products_are_no_elementwise_operator():
    # Without sub-norms the values feed the output projection: quantising them is a kernel of its own.
    model = dataclasses.replace(load_model("llama-2-7b"), layers=1)
    mapped, _ = segments(model, Scenario(prompt=32, generate=0))
    assert [t.name for t in mapped.tags if t.op == "precompute"] == ["layer 0 attention_out precompute"]


def test_attention_fused_and_separate():
    scenario = Scenario(prompt=256, generate=0)
    pairs, heads = 256 * 257 // 2, 32  # every token attends to itself and those before
    q = kv = 256 * 3200
    fused = by_operator(*segments(SMALL, scenario))
    apart = by_operator(*segments(SMALL, scenario, {"attention": "separate"}))
    share = [-(-2 * n // 432) for n in (q + kv, 0, kv + q)]
    assert [int(fused[op]["bytes"][0]) for op in ("scores", "softmax", "values")] == share
    # This pass wrote the keys, all of which fit into L2; a cache from before is in DRAM.
    after = by_operator(*segments(SMALL, Scenario(context=256, prompt=256, generate=0)))
    assert [LEVELS[int(x["scores"]["level"][0])] for x in (fused, after)] == ["l2", "dram"]
    s = heads * pairs
    share = [-(-2 * n // 432) for n in (q + kv + s, 2 * s, kv + q + s)]
    assert [int(apart[op]["bytes"][0]) for op in ("scores", "softmax", "values")] == share
    for op in ("scores", "values"):
        assert fused[op]["operations"] == apart[op]["operations"] == -(-2 * s * 100 // 432)


def test_epilogues_cover_all_outputs():
    # Five operations an output; four bytes read and two written.
    mapped, codes = segments(SMALL, Scenario(prompt=2048, generate=0))
    code = by_operator(mapped, codes)["qkv"]
    ordinary = code[code["op"] == OP["ORDINARY"]].astype([(n, np.int64) for n in code.dtype.names])
    outputs = 2048 * 9600
    assert ordinary["operations"].sum() * 432 == pytest.approx(5 * outputs, rel=1e-3)
    assert ordinary["bytes"].sum() * 432 == pytest.approx(6 * outputs, rel=1e-3)
    # All but the last wave's run beside the arrays; blocks of 3 x 4, 4, 4 and 3 tiles of 6 x 15, twice.
    uneven = {"cores": [43, 10, 1], "tiles": [4, 4], "groups": 8, "result_halves": 1}
    mapped, codes = segments(SMALL, Scenario(prompt=2048, generate=0), {"gemms": {"prompt qkv": uneven}})
    code = by_operator(mapped, codes)["qkv"]
    work = code["operations"][(code["op"] == OP["ORDINARY"]) & (code["operations"] > 0)]
    assert work.tolist() == [-(-5 * round(outputs * tiles / 90) // 432) for tiles in [12, 12, 12, 9] * 2]
    waves = len(list(plan(FULL, 2048, 9600, 3200).blocks()))
    assert ordinary["alongside"].tolist().count(0) == 1 and waves > 1
    assert ordinary["alongside"][-1] == 0 or ordinary["level"][-1] == 0


def test_linear_layers_on_plain_tensor_cores():
    for linear, bits in (("tensor_fp16", 16), ("tensor_int8", 8)):
        mapped, codes = segments(SMALL, Scenario(prompt=64, generate=0), {"linear": linear})
        qkv = by_operator(mapped, codes)["qkv"]
        assert KINDS[qkv["kind"][0]] == linear and len(qkv) == 1
        assert qkv["operations"] == -(-2 * 64 * 3200 * 9600 // 432)
        assert qkv["bytes"] == -(-(64 * 3200 * bits // 8 + 64 * 9600 * 2 + 3200 * 9600 * bits // 8) // 432)
        assert not mapped.document["gemms"]
    norm = by_operator(*segments(SMALL, Scenario(prompt=64, generate=0), {"linear": "tensor_fp16"}))[
        "attention_norm"
    ]
    assert norm["operations"] == -(-64 * (4 * 3200 + 3) // 432)  # nothing to prepare


def test_layers_have_their_own_weights():
    mapped, codes = segments(SMALL, Scenario(prompt=8, generate=1))
    per_layer = (9600 * 3200 + 3200 * 3200 + 17280 * 3200 + 3200 * 8640) * 2 // 8 // 32
    lines = {}
    for code, segment in zip(codes, mapped.program.segments, strict=True):
        loads = code[code["op"] == OP["LOAD_W"]]
        if len(loads):
            lines[segment.label] = int(loads["line"].min()), int((loads["line"] + loads["count"]).max())
    assert lines["prompt layer 0"][0] == 0 and lines["prompt layer 1"][0] == per_layer
    assert lines["prompt layer 0"][1] <= per_layer and lines["token 0 layer 1"][0] == per_layer
    # What is written lies behind all weights.
    stores = np.concatenate([c[c["op"] == OP["STORE"]]["line"] for c in codes])
    assert stores.min() >= 2 * per_layer


def test_program_text_reads_back():
    mapped, codes = segments(dataclasses.replace(BERT, layers=1), Scenario(prompt=4, generate=0))
    back = ISA.assemble(mapped.program.text())
    assert list(back.tags) == list(mapped.program.tags)
    for mine, theirs in zip(codes, back.segments, strict=True):
        assert np.array_equal(mine, theirs.regions["code"])


def test_walking_twice_gives_the_same():
    mapped = map_model(FULL, SMALL, Scenario(prompt=4, generate=2))
    first, second = ([s.regions["code"] for s in mapped.program.segments] for _ in range(2))
    assert all(np.array_equal(a, b) for a, b in zip(first, second, strict=True))


def test_layers_take_the_same_time():
    mapped = map_model(FULL, BITNET, Scenario(prompt=300, generate=0))
    timeline = simulate(FULL.params(), mapped.program)
    ticks = timeline.tag_ticks()
    for op in ("scores", "gate", "attention_norm"):
        mine = [int(t) for t, tag in zip(ticks, mapped.tags, strict=True) if tag.op == op]
        assert len(mine) == 26 and len(set(mine)) == 1
    assert timeline.counter("tensor_fp16_ops") > 0 and timeline.counter("planes") > 0


# ---- the mapping document, and limits -----------------------------------------------------------------


def test_document_round_trip_gives_the_same_program():
    first, a = segments(SMALL, Scenario(prompt=100, generate=1), {"attention": "separate"})
    again, b = segments(SMALL, Scenario(prompt=100, generate=1), json.loads(json.dumps(first.document)))
    assert again.document == first.document
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))


def test_a_given_tiling_is_used():
    tiling = {"cores": [1, 150, 2], "tiles": [1, 1], "groups": 64, "result_halves": 1}
    mapped, codes = segments(SMALL, Scenario(generate=1), {"gemms": {"decode qkv": tiling}})
    assert mapped.document["gemms"]["decode qkv"] == tiling
    lmma = by_operator(mapped, codes)["qkv"]
    assert lmma[lmma["op"] == OP["LMMA"]]["groups"].tolist() == [64] * 6 + [16]


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"gem": {}}, "mapping has no 'gem': did you mean gemms?"),
        ({"model": "gpt2-xl"}, "mapping.model must be 'bitnet-b1.58-3b' here, not 'gpt2-xl'"),
        ({"target": "pim"}, "mapping.target must be 'lut' here, not 'pim'"),
        ({"precompute": "no"}, "mapping.precompute must be fused or separate, not 'no'"),
        ({"linear": 3}, "mapping.linear must be lut or tensor_fp16 or tensor_int8, not 3"),
        ({"gemms": 3}, "mapping.gemms must be a mapping, not 3"),
        ({"gemms": {"decode qvk": {}}}, "mapping.gemms has no 'decode qvk': did you mean decode qkv?"),
        (
            {"gemms": {"decode qkv": {}}},
            "mapping.gemms.decode qkv must have cores, tiles, groups, result_halves",
        ),
        (
            {"gemms": {"decode qkv": {"cores": [1, 2], "tiles": [1, 1], "groups": 1, "result_halves": 1}}},
            "mapping.gemms.decode qkv.cores must be a list of 3 whole numbers, not [1, 2]",
        ),
        (
            {
                "gemms": {
                    "decode qkv": {"cores": [1, 2, 1], "tiles": [1, 1], "groups": "x", "result_halves": 1}
                }
            },
            "mapping.gemms.decode qkv.groups must be a whole number, not 'x'",
        ),
        (
            {
                "gemms": {
                    "decode qkv": {"cores": [1, 2, 1], "tiles": [1, 1], "groups": 99, "result_halves": 1}
                }
            },
            "mapping.gemms.decode qkv: needs 99 of buffers.table_rows, which has 64",
        ),
    ],
)
def test_document_errors_name_the_key(mapping, message):
    with pytest.raises(UserError) as error:
        map_model(FULL, BITNET, Scenario(generate=1), mapping)
    assert message in str(error.value) and "\n" not in str(error.value)


def test_capacity_is_checked():
    with pytest.raises(
        UserError, match=r"opt-175b does not fit lut-a100-4x: weights and activations take 4\d\.\d GB"
    ):
        map_model(machine("memory.dram_bytes=40000000000"), load_model("opt-175b"), Scenario(generate=1))


def test_what_is_timed_as_if_it_fitted_is_noted():
    # 26 layers x 2 x 3200 x 2 bytes for each of 2049 x 1024 tokens.
    notes = " ".join(map_model(FULL, BITNET, Scenario(context=2048, generate=1, batch=1024)).notes)
    assert f"KV cache {26 * 2 * 3200 * 2 * 2049 * 1024 / 1e9:.3g} GB" in notes and "KV cache 698 GB" in notes
    assert "more than the 80 GB of memory.dram_bytes; timed as if it fitted" in notes
    assert "2049 tokens are more than the 2048 positions that bitnet-b1.58-3b is made for" in notes
    assert "more than" not in " ".join(map_model(FULL, BITNET, Scenario(context=2047, generate=1)).notes)


def test_unsupported_models_are_refused():
    with pytest.raises(UserError, match="mixtral-8x7b: target lut does not support mixtures of experts"):
        map_model(FULL, load_model("mixtral-8x7b"), Scenario(generate=1))
    with pytest.raises(UserError, match="target lut does not support sparse weights"):
        map_model(FULL, load_model("sparse-gpt-13b"), Scenario(generate=1))
    with pytest.raises(UserError, match="is an encoder"):
        map_model(FULL, BERT, Scenario(generate=1))
    with pytest.raises(UserError, match="opt-175b has 2048 positions"):  # a learned table ends there
        map_model(FULL, load_model("opt-175b"), Scenario(context=2048, generate=1))


def test_no_core_does_more_than_core_0():
    gemm = plan(FULL, 1000, 3200, 3200)
    planes = []
    for core in (0, 1, gemm.cores // 2, gemm.cores - 1):
        code = np.concatenate(gemm.waves(core))
        planes.append(
            simulate(FULL.params(), Program(ISA, [Segment({"code": code})], ["x"])).counter("planes")
        )
    assert max(planes) == planes[0]
