"""The interpreter of target lut: instruction by instruction, then whole products against the kernels."""

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.arch.lut import ISA, LutSpec
from tilewright.arch.spec import apply_sets, build, load_tree
from tilewright.workloads import lut as meaning
from tilewright.workloads.lut_kernels import encode, lut_gemm, quantise_tables, symmetric_tables

BASE = [
    "sms=1", "cores_per_sm=1", "lut.n=4", "lut.arrays=1", "memory.dram_bytes=1024", "memory.lines_in_flight=512",
    "buffers.table_rows=16", "buffers.weight_lines=64", "buffers.result_tiles=8",
]  # fmt: skip


def tiny(*sets):
    """Lines of 4 x 4 bits, 2 bytes; tiles of 2 x 4; tables of 8 entries."""
    return build(LutSpec, apply_sets(load_tree("lut-a100-4x", ["lut"]), [*BASE, *sets]), "tiny")


SPEC = tiny()
FP16 = tiny("lut.activation=fp16", "lut.table=exact", "lut.accumulator=fp16")


def run(text, image, spec=SPEC):
    return meaning.interpret(spec, ISA.assemble(text), image)[0]


@pytest.fixture
def image():
    return meaning.blank_image(SPEC.params())


# ---- by hand ------------------------------------------------------------------------------------------


def test_shapes_of_the_image(image):
    assert {name: (a.dtype.name, a.shape) for name, a in image.items()} == {
        "memory": ("uint8", (512, 2)),
        "tables": ("int32", (2, 16, 2, 8)),
        "weights": ("uint8", (2, 64, 2)),
        "results": ("uint32", (2, 8, 2, 4)),
    }


def test_activations_become_tables(image):
    """A row of 2 x 4 int8 takes 4 lines. Entry i of (1, 2, 3, 4): 0 is -1-2-3-4, 1 is +1-2-3-4, 7 is +1+2+3-4."""
    image["memory"][8:12] = np.array([[1, 2], [3, 4], [128, 128], [128, 128]])
    out = run("LOAD_A half=1 base=5 count=1 line=8", image)
    assert out["tables"][1, 5, 0].tolist() == [-10, -8, -6, -4, -4, -2, 0, 2]
    assert out["tables"][1, 5, 1, 0] == 512  # -4 * -128: what needs the eleventh bit
    assert (
        np.count_nonzero(out["tables"]) == 7 + 5
    )  # of (-128)^4, three entries with two of each sign are zero
    assert not image["tables"].any()


def test_weights_are_loaded_as_they_are(image):
    image["memory"][3:5] = [[1, 2], [3, 4]]
    out = run("LOAD_W half=1 base=62 count=2 line=3", image)
    assert out["weights"][1, 62:].tolist() == [[1, 2], [3, 4]]
    assert np.count_nonzero(out["weights"]) == 4


def test_a_word_reads_its_entry(image):
    """Words 0..3 of plane 0: index 1, index 7, the negated index 0, index 0: +8, +2, +1, -1 with T[i] as below."""
    image["tables"][0, 0, 0] = [-1, 8, 30, 40, 50, 60, 70, 2]
    image["weights"][0, 0] = [0x71, 0x08]  # words 1, 7 | 8, 0
    out = run("LMMA", image)
    assert out["results"][0, 0].view(np.int32).tolist() == [[8, 2, 1, -1], [0, 0, 0, 0]]


def test_planes_weigh_twice_as_much_each(image):
    """Plane 0 reads 3, plane 1 (second line) -5, doubled; from a partial sum of 100: 100 + 3 - 10 = 93."""
    image["tables"][0, 0, 1, :2] = 3, 5
    image["weights"][0, :2, 0] = [0x00, 0x09]
    image["results"][1, 2] = 100
    out = run("LMMA result=1 result_base=2 bits=2 accumulate=1", image)
    assert out["results"][1, 2, 1].tolist() == [93, 100 + 3 + 6, 109, 109]
    assert run("LMMA result=1 result_base=2 bits=2", image)["results"][1, 2, 1].view(np.int32)[0] == -7


def test_int32_wraps(image):
    image["tables"][0, 0, 0] = 1
    image["results"][0, 0] = (1 << 31) - 1
    assert run("LMMA accumulate=1", image)["results"][0, 0, 0, 0] == 1 << 31


def test_a_tile_is_stored_line_by_line(image):
    """8 accumulators of 4 bytes in lines of 2: 16 lines a tile, row after row, low bytes first."""
    image["results"][1, 3:5] = np.arange(16).reshape(2, 2, 4) + 0x04030200
    out = run("STORE half=1 base=3 count=2 line=100", image)
    assert out["memory"][100:102].tolist() == [[0, 2], [3, 4]]
    assert out["memory"][100:132].reshape(16, 4)[:, 0].tolist() == list(range(16))
    assert not out["memory"][132:].any() and not out["memory"][:100].any()


def test_fp16_results_take_half_the_room():
    image = meaning.blank_image(FP16.params())
    image["results"][0, 0] = np.arange(8).reshape(2, 4) + 0x3C00
    out = run("STORE count=1", image, FP16)
    assert FP16.params().tile_lines == 8
    assert out["memory"][:8].reshape(-1).view("<u2").tolist() == list(range(0x3C00, 0x3C08))


def test_what_does_not_fill_a_line_is_zero():
    """2 x 8 FP16 sums take 256 bits, lines of 8 x 3 bits: 11 lines hold 264."""
    spec = tiny("lut.n=8", "lut.k=3", "lut.activation=fp16", "lut.accumulator=fp16")
    image = meaning.blank_image(spec.params())
    image["memory"][:] = 0xFF
    image["results"][:] = 0xFFFF
    out = run("STORE count=1 line=1", image, spec)
    assert out["memory"][1:12].reshape(-1).tolist() == [0xFF] * 32 + [0]
    assert (out["memory"][12] == 0xFF).all()


def test_sums_are_rounded_group_by_group_plane_by_plane():
    """2048 + 1 + 1 in FP16, where 2049 ties to 2048: twice 2048, never 2050. From zero, 1 + 1 + ... are exact."""
    image = meaning.blank_image(FP16.params())
    image["tables"][0, :2, 0] = np.float16(1).view(np.uint16)
    image["results"][0, 0] = np.float16(2048).view(np.uint16)
    out = run("LMMA groups=2 accumulate=1", image, FP16)
    assert out["results"][0, 0, 0].astype(np.uint16).view(np.float16).tolist() == [2048] * 4
    out = run("LMMA groups=2", image, FP16)
    assert out["results"][0, 0, 0].astype(np.uint16).view(np.float16).tolist() == [2] * 4


def test_ordinary_work_leaves_the_image_alone(image):
    image["results"][:] = 7
    out = run("ORDINARY kind=tensor_fp16 operations=1000 bytes=10", image)
    assert all((out[name] == image[name]).all() for name in image)


def test_segments_repeat(image):
    image["tables"][0, 0, 0] = 1
    out = run(".segment repeat=5\nLMMA accumulate=1", image)
    assert out["results"][0, 0, 0].tolist() == [5] * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("LOAD_A base=10 count=7", "LOAD_A.: base, count reach beyond the 16 rows of the table buffer"),
        ("LOAD_A count=0", "count must be at least 1"),
        ("LOAD_A count=2 line=505", "line, count reach beyond the 512 lines of memory"),
        ("LOAD_W base=1 count=64", "beyond the 64 lines of the weight buffer"),
        ("STORE base=8", "beyond the 8 tiles of the result buffer"),
        ("STORE line=497", "beyond the 512 lines"),
        ("LMMA bits=5", "bits must be in 1..4"),
        ("LMMA groups=0", "m_tiles, n_tiles and groups must be at least 1"),
        ("LMMA m_tiles=2 groups=8 table_base=1", "beyond the 16 rows"),
        ("LMMA n_tiles=4 groups=4 bits=4 weight_base=1", "beyond the 64 lines of the weight buffer"),
        ("LMMA m_tiles=2 n_tiles=4 result_base=1", "beyond the 8 tiles"),
    ],
)
def test_what_reaches_outside_is_refused(text, message, image):
    with pytest.raises(ValueError, match=message) as error:
        run(f"LMMA\n{text}", image)
    assert str(error.value).startswith("segment 0, instruction 1 (")


def test_the_least_that_reaches_the_end_is_allowed(image):
    run(
        "LOAD_A base=9 count=7\nLOAD_A count=2 line=504\nLOAD_W count=64\nSTORE base=7\nSTORE line=496\n"
        "LMMA m_tiles=2 groups=8\nLMMA n_tiles=4 groups=4 bits=4\nLMMA m_tiles=2 n_tiles=4",
        image,
    )


def test_an_image_that_does_not_fit_is_refused(image):
    with pytest.raises(ValueError, match=r"weights must be uint8 of shape \(2, 64, 2\)"):
        run("LMMA", image | {"weights": image["weights"][:1]})


# ---- whole products -----------------------------------------------------------------------------------

DTYPES = {
    "int8": np.int8,
    "int16": np.int16,
    "fp8": ml_dtypes.float8_e4m3fn,
    "fp16": np.float16,
}


def product(spec, a, weights, groups_a_step):
    """psum + a . q' by a program that goes through the channels so many groups at a time."""
    p, bits = spec.params(), weights.bits
    quantised = spec.lut.table == "int8"
    if quantised:
        rows = meaning.table_lines(p, *quantise_tables(symmetric_tables(a, p.k), p.table_block))
    else:
        rows = meaning.activation_lines(p, a)
    lines = meaning.weight_lines(p, weights)
    groups = weights.words.shape[2]
    m, n = len(rows) // (groups * p.row_lines), len(lines) // (groups * bits)
    image = meaning.blank_image(p)
    at = len(rows), len(rows) + len(lines)
    image["memory"][: at[0]], image["memory"][at[0] : at[1]] = rows, lines
    text = []
    for first in range(0, groups, groups_a_step):
        count = min(groups_a_step, groups - first)
        text += [
            f"LOAD_A base={i * count} count={count} line={(i * groups + first) * p.row_lines}"
            for i in range(m)
        ]
        text += [
            f"LOAD_W base={j * count * bits} count={count * bits} line={at[0] + (j * groups + first) * bits}"
            for j in range(n)
        ]
        text.append(f"LMMA m_tiles={m} n_tiles={n} groups={count} bits={bits} accumulate={int(first > 0)}")
    text.append(f"STORE count={m * n} line={at[1]}")
    out = run("\n".join(text), image, spec)
    stored = out["memory"][at[1] : at[1] + m * n * p.tile_lines]
    return meaning.read_results(p, stored, m, n, spec.lut.accumulator)[: len(a), : weights.words.shape[1]]


@settings(deadline=None, max_examples=40)
@given(
    kind=st.sampled_from(
        [
            ("int8", "int32"),
            ("int16", "int32"),
            ("fp8", "fp16"),
            ("fp8", "fp32"),
            ("fp16", "fp16"),
            ("fp16", "fp32"),
        ]
    ),
    shape=st.tuples(st.integers(1, 4), st.integers(1, 8), st.integers(1, 20)),
    bits=st.integers(1, 3),
    step=st.integers(1, 5),
    k=st.sampled_from([2, 4]),
    seed=st.integers(0, 1 << 30),
)
def test_a_product_is_that_of_the_kernels(kind, shape, bits, step, k, seed):
    m, n, channels = shape
    spec = tiny(
        f"lut.activation={kind[0]}", f"lut.accumulator={kind[1]}", f"lut.k={k}", "memory.dram_bytes=8192",
        "buffers.weight_lines=128", "buffers.table_rows=64",
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    dtype = np.dtype(DTYPES[kind[0]])
    if dtype.kind == "i":
        info = np.iinfo(dtype)
        a = rng.integers(info.min, info.max, (m, channels), dtype, endpoint=True)
    else:
        a = rng.standard_normal((m, channels)).astype(dtype)
    q = rng.integers(0, 1 << bits, (n, channels))
    weights = encode(q, bits, k)
    got = product(spec, a, weights, step)
    np.testing.assert_array_equal(got, lut_gemm(a, weights, accumulator=kind[1]))
    if dtype.kind == "i":
        centred = 2 * q - (1 << bits) + 1
        np.testing.assert_array_equal(got, a.astype(np.int64) @ centred.T)


@settings(deadline=None, max_examples=20)
@given(block=st.integers(1, 4), steps=st.integers(1, 2), seed=st.integers(0, 1 << 30))
def test_a_product_of_quantised_tables_is_that_of_the_kernels(block, steps, seed):
    """Steps of whole blocks; the last block of all may be cut short."""
    spec = tiny(
        "lut.activation=fp16", "lut.table=int8", "lut.accumulator=fp32", f"lut.table_block={block}",
        "memory.dram_bytes=8192",
    )  # fmt: skip
    rng = np.random.default_rng(seed)
    a = rng.standard_normal((3, 26)).astype(np.float16)
    weights = encode(rng.integers(0, 4, (5, 26)), 2)
    got = product(spec, a, weights, block * steps)
    np.testing.assert_array_equal(got, lut_gemm(a, weights, accumulator="fp32", table="int8", block=block))
