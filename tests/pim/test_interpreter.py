"""The interpreter, instruction by instruction, on a machine of 2 channels, 4 banks and 4 lanes."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.arch.formats import BF16, FP32
from tilewright.arch.isa import Program, Segment
from tilewright.arch.pim import ISA, PimSpec
from tilewright.arch.spec import apply_sets, build, load_tree
from tilewright.workloads.formats import from_bits, to_bits
from tilewright.workloads.pim import blank_image, interpret

SETS = [
    "channels=2", "dram.bankgroups=2", "dram.banks_per_group=2", "dram.rows=8", "dram.row_bytes=32",
    "dram.column_bytes=8", "pim.lanes=4", "pim.global_buffer_bytes=64", "asic.sram_bytes=512",
    "asic.adders=4", "asic.multipliers=4",
]  # fmt: skip


def tiny(*sets):
    """Rows of 4 columns, 8 rows, 8 buffer columns, 64 SRAM columns; one SRAM column for four accumulators."""
    return build(PimSpec, apply_sets(load_tree("pim-gpt", ["pim"]), [*SETS, *sets]), "tiny")


SPEC = tiny()


def bf16(*values):
    return to_bits(values, BF16)


def run(text, image, spec=SPEC):
    return interpret(spec, ISA.assemble(text), image)[0]


@pytest.fixture
def image():
    return blank_image(SPEC.params())


def sram(image, column, n=4):
    return from_bits(image["sram"][4 * column : 4 * column + n], BF16).tolist()


def accumulators(image):
    return image["acc"].view(np.float32).tolist()


# ---- channels -----------------------------------------------------------------------------------------


def test_write_global_buffer_reads_each_channels_own_columns(image):
    image["sram"][:] = np.arange(256)
    out = run("WR_GB channels=3 gb=2 cols=2 src=5 stride=4", image)
    assert out["gb"][0, 8:16].tolist() == list(range(20, 28))  # columns 5 and 6
    assert out["gb"][1, 8:16].tolist() == list(range(36, 44))  # 5 + 1 * 4 = column 9
    assert not out["gb"][:, :8].any() and not out["gb"][:, 16:].any()


def test_mac_multiplies_banks_by_the_buffer(image):
    # Row 1 of a bank begins at element 1 * 4 columns * 4 lanes = 16; bank b holds (b, 1, 1, 1).
    for b in range(4):
        image["dram"][1, b, 16:20] = bf16(b, 1, 1, 1)
    image["gb"][1, :4] = bf16(2, 3, 5, 7)
    out = run("MAC_AB channels=2 row=1 col=0 gb=0 cols=1", image)
    # 2 b + 3 + 5 + 7 in channel 1, nothing in channel 0
    assert accumulators(out) == [[0, 0, 0, 0], [15, 17, 19, 21]]
    out = run("MAC_AB channels=2 row=1 col=0 gb=0 cols=1", out)
    assert accumulators(out)[1] == [30, 34, 38, 42]


def test_mac_adds_products_as_a_tree(image):
    image["gb"][0, :4] = bf16(1, 1, 1, 1)
    image["dram"][0, 0, :4] = bf16(2**24, 1, 1, -(2**24))
    image["dram"][0, 1, :4] = bf16(2**24, -(2**24), 1, 1)
    # Bank 0: 2^24 + 1 ties to 2^24, and 2^24 + (1 - 2^24) = 1; left to right gives 0. Bank 1: 0 + 2.
    assert accumulators(run("MAC_AB channels=1", image))[0][:2] == [1, 2]


def test_mac_adds_columns_in_order_to_the_accumulator(image):
    # Columns of 1, 2^24, -2^24 times 1: ((0 + 1) + 2^24) - 2^24 = 0; any other order of the three gives 1.
    image["gb"][0, :12] = np.tile(bf16(1, 0, 0, 0), 3)
    image["dram"][0, 0, :12:4] = bf16(1, 2**24, -(2**24))
    assert accumulators(run("MAC_AB channels=1 cols=3", image))[0][0] == 0
    # The accumulator comes first: (2^24 + 1) + 1 stays 2^24, 2^24 + (1 + 1) would be 2^24 + 2.
    image["acc"][0, 0] = np.float32(2**24).view(np.uint32)
    image["dram"][0, 0, :8] = bf16(1, 0, 0, 0, 1, 0, 0, 0)
    assert accumulators(run("MAC_AB channels=1 cols=2", image))[0][0] == 2**24


def test_mac_runs_on_into_the_next_row(image):
    image["gb"][:, :12] = bf16(*[1] * 12)
    image["dram"][0, 2, 12:24] = bf16(*range(12))  # column 3 of row 0, then columns 0 and 1 of row 1
    assert accumulators(run("MAC_AB channels=1 row=0 col=3 cols=3", image))[0][2] == 66  # 0 + 1 + ... + 11


def test_mac_keeps_subnormals_and_canonical_nan(image):
    image["gb"][0, :4] = [0x0080, 0, 0, 0]  # 2^-126
    image["dram"][0, :3, 0] = [*bf16(0.5, 2**-30), 0xFFC1]
    acc = run("MAC_AB channels=1", image)["acc"][0]
    # 2^-127 is 2^22 steps of 2^-149; 2^-156 is less than half a step
    assert acc[:3].tolist() == [1 << 22, 0, FP32.nan]


def test_narrow_accumulator_rounds_every_product_and_sum(image):
    # bfloat16 has 8 bits: 1.0078125^2 = 1.01568... -> 1.015625, 256 + 1.015625 -> 258, 256 + 1 ties to 256.
    image["gb"][0, :4] = bf16(1.0078125, 1, 0, 0)
    image["dram"][0, :3, 0] = bf16(1.0078125, 1.0078125, 0)
    image["dram"][0, :3, 1] = bf16(0, 256, 256)
    image["gb"][0, 2], image["dram"][0, 2, 2] = bf16(1, 1)
    acc = run("MAC_AB channels=1", image, tiny("pim.accumulator=bf16"))["acc"][0]
    assert from_bits(acc[:3], BF16).tolist() == [1.015625, 258, 256]


def test_read_accumulators_rounds_to_even_and_clears(image):
    # Steps of bfloat16 near 1 are 2^-7: 1 + 2^-8 ties down to 1, 1 + 3 * 2^-8 ties up to 1 + 2^-6.
    image["acc"][1] = np.float32([1 + 2**-8, 1 + 3 * 2**-8, -3, 3.4e38]).view(np.uint32)
    image["acc"][0] = np.float32([1, 2, 3, 4]).view(np.uint32)
    out = run("RD_MAC channels=2 dst=7 stride=2", image)
    assert sram(out, 9) == [1, 1 + 2**-6, -3, np.inf]
    assert accumulators(out) == [[1, 2, 3, 4], [0, 0, 0, 0]]


def test_read_accumulators_fills_several_columns(image):
    spec = tiny("dram.banks_per_group=4")  # 8 banks in 4 lanes: two columns
    image = blank_image(spec.params())
    image["acc"][0] = np.arange(8, dtype=np.float32).view(np.uint32)
    out = run("RD_MAC channels=1 dst=3", image, spec)
    assert sram(out, 3, 8) == list(range(8))


def test_gemv_walks_the_bank_and_the_destination(image):
    image["gb"][:, 4:12] = bf16(1, 1, 1, 1, 10, 10, 10, 10)
    values = np.arange(24)  # three outs of two columns, in every bank the same plus the bank's number
    for c in range(2):
        for b in range(4):
            image["dram"][c, b, 8:32] = to_bits(values + b, BF16)
    out = run("GEMV channels=3 row=0 col=2 gb=1 cols=2 outs=3 pitch=5 dst=10 stride=1", image)
    for c in range(2):
        for o in range(3):
            # out o: sum of four values from 8 o, plus ten times the sum of four from 8 o + 4
            want = [4 * (8 * o + b) + 6 + 10 * (4 * (8 * o + 4 + b) + 6) for b in range(4)]
            assert sram(out, 10 + c + 5 * o) == from_bits(to_bits(want, BF16), BF16).tolist()
    assert not out["acc"].any()


def test_gemv_starts_from_the_accumulators(image):
    image["acc"][0, 1] = np.float32(5).view(np.uint32)
    out = run("GEMV channels=1 cols=1 outs=2 pitch=1 dst=0", image)
    assert sram(out, 0, 8) == [0, 5, 0, 0, 0, 0, 0, 0]


def test_bank_columns_to_sram_and_back(image):
    image["dram"][:, 2, :] = np.arange(2 * 128).reshape(2, 128)
    out = run("RD_BK channels=3 bank=2 row=1 col=3 cols=2 dst=4 stride=8", image)
    assert out["sram"][16:24].tolist() == list(range(28, 36))  # column 1 * 4 + 3 = 7 -> element 28
    assert out["sram"][48:56].tolist() == list(range(156, 164))  # 128 further
    out = run("WR_BK channels=2 bank=1 row=0 col=1 cols=2 src=4 stride=8", out)
    assert out["dram"][1, 1, 4:12].tolist() == list(range(156, 164))
    assert not out["dram"][0, 1].any()


def test_write_element_puts_one_lane_into_every_bank(image):
    image["sram"][:] = np.arange(256)
    out = run("WR_EL channels=2 row=0 col=1 outs=2 pitch=6 lane=3 src=8 stride=2", image)
    # channel 1 reads SRAM column 8 + 2 = 10 for column 1, then column 11 for column 1 + 6 = 7
    assert [out["dram"][1, b, 1 * 4 + 3] for b in range(4)] == [40, 41, 42, 43]
    assert [out["dram"][1, b, 7 * 4 + 3] for b in range(4)] == [44, 45, 46, 47]
    assert np.count_nonzero(out["dram"]) == 8


def test_write_element_with_more_banks_than_lanes():
    spec = tiny("dram.banks_per_group=4")
    image = blank_image(spec.params())
    image["sram"][:] = np.arange(256)
    out = run("WR_EL channels=1 outs=2 pitch=1 lane=0 src=2", image, spec)
    # 8 banks take two SRAM columns: elements 8.. for the first column, 16.. for the second
    assert out["dram"][0, :, 0].tolist() == list(range(8, 16))
    assert out["dram"][0, :, 4].tolist() == list(range(16, 24))


# ---- ASIC ---------------------------------------------------------------------------------------------


def test_add_keeps_what_lies_behind_the_vector(image):
    image["sram"][0:8] = bf16(1, 2, 3, 4, 5, 6, 7, 8)
    image["sram"][8:16] = bf16(10, 20, 30, 40, 50, 60, 70, 80)
    out = run("ADD dst=4 src=0 src2=2 n=6", image | {"sram": image["sram"].copy()})
    assert sram(out, 4, 8) == [11, 22, 33, 44, 55, 66, 0, 0]
    image["sram"][22:24] = bf16(-1, -2)
    assert sram(run("MUL dst=4 src=0 src2=2 n=6", image), 4, 8) == [10, 40, 90, 160, 250, 360, -1, -2]


def test_softmax_of_two_vectors(image):
    image["sram"][0:8] = bf16(0, 0, 9, 9, 1, 1, 1, 9)
    image["sram"][8:12] = bf16(-np.inf, 3, 9, 9)
    out = run("SOFTMAX dst=8 src=0 n=2 outs=2 pitch=2 imm=0x3f800000", image)
    assert sram(out, 8, 4) == [0.5, 0.5, 0, 0]
    assert sram(out, 10, 4) == [0, 1, 0, 0]


def test_rope_rotates_pairs_of_neighbours(image):
    image["sram"][0:4] = bf16(1, 2, 3, 4)  # pairs (1, 2) and (3, 4)
    image["sram"][4:8] = bf16(0, 0, 1, 1)  # cosines
    image["sram"][8:12] = bf16(-1, 1, 0, 0)  # sines: the first pair turns by 90 degrees, the second stays
    assert sram(run("ROPE dst=6 src=0 src2=1 src3=2 n=4 outs=1", image), 6) == [-2, 1, 3, 4]


def test_rope_of_several_vectors_turns_them_by_the_same_angles(image):
    image["sram"][0:12] = bf16(1, 2, 3, 4, 9, 9, 9, 9, 5, 6, 7, 8)  # two vectors, a column between them
    image["sram"][40:44] = bf16(0, 0, 0, 0)
    image["sram"][44:48] = bf16(-1, 1, -1, 1)
    out = run("ROPE dst=0 src=0 src2=10 src3=11 n=4 outs=2 pitch=2", image)
    assert sram(out, 0, 12) == [-2, 1, -4, 3, 9, 9, 9, 9, -6, 5, -8, 7]


def test_layernorm_and_rmsnorm(image):
    image["sram"][0:4] = bf16(1, 3, 1, 3)  # mean 2, variance 1; mean square 5
    image["sram"][4:8] = bf16(2, 2, 2, 2)
    image["sram"][8:12] = bf16(0, 0, 1, 1)
    quarter = "imm2=0x3e800000"
    assert sram(run(f"LAYERNORM dst=8 src=0 src2=1 src3=2 n=4 {quarter}", image), 8) == [-2, 2, -1, 3]
    out = sram(run(f"RMSNORM dst=8 src=0 src2=1 n=4 imm=0x40800000 {quarter}", image), 8)
    assert np.allclose(out, np.array([2, 6, 2, 6]) / 3, rtol=2**-8)  # epsilon 4: 5 + 4 = 3 * 3
    # imm2 is what the sum is multiplied by: 20 * 0.2 = 4 without epsilon, so 2 (1, 3, 1, 3) / 2.
    out = sram(run("RMSNORM dst=8 src=0 src2=1 n=4 imm2=0x3e4ccccd", image), 8)
    assert out == [1, 3, 1, 3]


def test_results_may_take_the_place_of_an_operand(image):
    image["sram"][0:8] = bf16(1, 2, 3, 4, 5, 6, 7, 8)
    assert sram(run("ADD dst=0 src=0 src2=0 n=8", image), 0, 8) == [2, 4, 6, 8, 10, 12, 14, 16]
    assert sram(run("ADD dst=0 src=1 src2=0 n=4", image), 0, 8) == [6, 8, 10, 12, 5, 6, 7, 8]


# ---- alongside ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        # Other columns; and both may read the same ones.
        "ADD dst=0 src=1 src2=2 n=4\nRD_BK channels=1 dst=3 cols=2 alongside=1",
        "ADD dst=0 src=1 src2=2 n=4\nWR_GB channels=1 src=1 cols=2 alongside=1",
        # The second waits for its own unit whatever it touches.
        "RD_BK channels=1 dst=0 cols=2\nWR_GB channels=1 src=0 cols=2 alongside=1",
        "ADD dst=0 src=1 src2=2 n=4\nADD dst=1 src=0 src2=0 n=4 alongside=1",
        # Both units were idle when the ADD in the middle began, so RD_BK has completed.
        "RD_BK channels=1 dst=0\nADD dst=3 src=1 src2=1 n=4\nADD dst=4 src=0 src2=0 n=4 alongside=1",
        # Only the latest of the other unit may still execute: the second RD_BK, not the first.
        "RD_BK channels=1 dst=0\nRD_BK channels=1 dst=5 alongside=1\nADD dst=4 src=0 src2=0 n=4 alongside=1",
    ],
)
def test_alongside_what_is_independent(image, text):
    image["sram"][:] = np.arange(256)
    first = run(text, image)
    again = run(text.replace(" alongside=1", ""), image)
    assert all(np.array_equal(first[name], again[name]) for name in first)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("ADD dst=4 src=0 src2=2 n=8\nWR_GB channels=1 src=5 alongside=1",
         "reads what asic may still write: SRAM column 5"),
        ("ADD dst=3 src=1 src2=2 n=4\nRD_BK channels=2 dst=1 stride=2 alongside=1",
         "writes what asic may still write: SRAM column 3"),
        ("ADD dst=3 src=1 src2=2 n=4\nRD_BK channels=1 dst=2 alongside=1",
         "writes what asic may still read: SRAM column 2"),
        ("GEMV channels=3 dst=8 outs=2 pitch=4 stride=1\nADD dst=0 src=13 src2=1 n=4 alongside=1",
         "reads what channels may still write: SRAM column 13"),
        # The instruction in the middle does not wait for RD_BK, so it may still execute.
        ("RD_BK channels=1 dst=7\nADD dst=0 src=1 src2=1 n=4 alongside=1\nADD dst=0 src=7 src2=1 n=4 alongside=1",
         "reads what channels may still write: SRAM column 7"),
    ],
)  # fmt: skip
def test_alongside_what_is_not(image, text, message):
    with pytest.raises(ValueError, match=r"^segment 0, instruction \d \(") as error:
        run(text, image)
    assert f"alongside: {message}" in str(error.value)


def test_relu(image):
    image["sram"][0:4] = [*bf16(-1, -0.0, 2), 0xFFFF]
    assert run("RELU dst=1 src=0 n=4", image)["sram"][4:8].tolist() == [0, 0, 0x4000, BF16.nan]


def test_argmax_runs_on_and_prefers_the_first(image):
    image["sram"][0:4] = bf16(1, 5, 5, 2)
    image["sram"][4:8] = [BF16.nan, *bf16(5, 7, 6)]
    first = run("ARGMAX src=0 n=4 imm=100 clear=1", image)
    assert first["argmax"].tolist() == [bf16(5)[0], 101]
    assert run("ARGMAX src=1 n=2 imm=104", first)["argmax"].tolist() == [bf16(5)[0], 101]
    assert run("ARGMAX src=1 n=4 imm=104", first)["argmax"].tolist() == [bf16(7)[0], 106]
    nothing = image["sram"].copy()
    nothing[:] = BF16.nan
    out = run("ARGMAX src=0 n=4 imm=9 clear=1", image | {"sram": nothing})
    assert out["argmax"].tolist() == [0xFF80, 9]


# ---- programs -----------------------------------------------------------------------------------------


def test_image_is_copied_and_segments_repeat(image):
    image["sram"][0:4] = bf16(1, 2, 3, 4)
    code = ISA.make("ADD", dst=0, src=0, src2=0, n=4)
    out, decisions = interpret(SPEC, Program(ISA, [Segment({"code": code}, repeat=3)]), image)
    assert sram(out, 0) == [8, 16, 24, 32] and sram(image, 0) == [1, 2, 3, 4] and decisions == {}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("RD_BK channels=1 row=7 col=3 cols=2", "row 7 + 2 columns reach row 8 of 8"),
        ("MAC_AB channels=1 col=4", "col must be in 0..3, not 4"),
        ("GEMV channels=1 cols=4 outs=9", "row 0 + 36 columns reach row 8 of 8"),
        ("GEMV channels=3 cols=1 outs=2 pitch=1 stride=1", "two channels write the same SRAM column"),
        ("RD_BK channels=3 cols=2 stride=1", "two channels write the same SRAM column"),
        ("WR_EL channels=1 outs=5 pitch=8", "row 0 + 33 columns reach row 8 of 8"),
        ("WR_GB channels=1 gb=7 cols=2", "gb 7 + 2 columns exceed the buffer of 8"),
        ("WR_GB channels=3 cols=2 src=60 stride=3", "src reaches SRAM column 64 of 64"),
        ("RD_MAC channels=4", "channels 0x4 must name some of the 2 channels"),
        ("RD_MAC channels=0", "channels 0x0 must name some of the 2 channels"),
        ("WR_BK channels=1 bank=4", "bank must be in 0..3, not 4"),
        ("WR_EL channels=1 lane=4", "lane must be in 0..3, not 4"),
        ("MAC_AB channels=1 cols=0", "cols must be at least 1, not 0"),
        ("ADD n=0", "n must be at least 1, not 0"),
        ("ADD n=5 src2=63", "src2 reaches SRAM column 64 of 64"),
        ("SOFTMAX n=4 outs=3 pitch=32", "src reaches SRAM column 64 of 64"),
        ("ROPE n=3 outs=1", "n must be even, not 3"),
        ("ADD dst=1 src=0 src2=4 n=8", "dst 1 overlaps src 0: they must be equal or apart"),
        ("ADD dst=1 src=4 src2=2 n=5", "dst 1 overlaps src2 2: they must be equal or apart"),
        ("LAYERNORM dst=4 src=0 src2=8 src3=5 n=8", "dst 4 overlaps src3 5: they must be equal or apart"),
        ("SOFTMAX dst=3 src=0 n=4 outs=3 pitch=2", "dst 3 overlaps src 0: they must be equal or apart"),
        ("SOFTMAX n=8 outs=2 pitch=1", "pitch 1: vectors of 2 columns overlap"),
        ("ROPE dst=0 src=0 src2=2 src3=20 n=4 outs=2 pitch=2", "dst 0 overlaps src2 2: they must be"),
        ("ARGMAX src=0 n=4 imm=0xffffffff", "imm 4294967295 + n 4 exceed the 32 bits of an index"),
    ],
)
def test_errors_name_the_instruction(image, text, message):
    with pytest.raises(ValueError, match=r"^segment 0, instruction 1 \(") as error:
        run(f"ADD n=4\n{text}", image)
    assert message in str(error.value)


def test_image_must_fit(image):
    with pytest.raises(ValueError, match="image: gb must be uint16 of shape"):
        run("ADD n=4", image | {"gb": np.zeros((2, 5), np.uint16)})


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 3), st.integers(1, 3), st.integers(0, 2**32 - 1))
def test_gemv_is_mac_and_read(cols, outs, col, mask, seed):
    rng = np.random.default_rng(seed)
    image = blank_image(SPEC.params())
    for name in ("dram", "gb"):
        image[name][:] = rng.integers(0, 1 << 16, image[name].shape, np.uint16)
    image["acc"][:] = rng.integers(0, 1 << 32, image["acc"].shape, np.uint32)
    loop = ""
    for o in range(outs):
        row, c = divmod(4 + col + o * cols, 4)
        loop += f"MAC_AB channels={mask} row={row} col={c} gb=2 cols={cols}\n"
        loop += f"RD_MAC channels={mask} dst={3 + 2 * o} stride=1\n"
    gemv = f"GEMV channels={mask} row=1 col={col} gb=2 cols={cols} outs={outs} pitch=2 dst=3 stride=1"
    a, b = run(loop, image), run(gemv, image)
    assert all(np.array_equal(a[name], b[name]) for name in a)
