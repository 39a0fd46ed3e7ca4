import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.arch.formats import FP8_E4M3, FP16, FP32
from tilewright.workloads import formats
from tilewright.workloads import lut_kernels as lut

INT_TYPES = (np.int8, np.int16)
FLOAT_TYPES = (ml_dtypes.float8_e4m3fn, np.float16)


def odd(q, bits):
    return 2 * q.astype(np.int64) - (2**bits - 1)


def int32(x):
    return x.astype(np.uint64).astype(np.uint32).view(np.int32)


def bits_of(x):
    return x.view({2: np.uint16, 4: np.uint32}[x.dtype.itemsize])


# --- weights -----------------------------------------------------------------------------------------------------


def test_reinterpretation():
    # Section 3.1: the 4-bit codes 0..15 become -15, -13, .., 13, 15.
    q, s, z = lut.reinterpret(np.arange(16), np.float32(0.5), np.float32(8), 4)
    assert q.tolist() == list(range(-15, 16, 2))
    assert (s, z) == (0.25, 1)  # 2*8 + 1 - 16


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_reinterpretation_keeps_the_value(bits):
    q = np.arange(2**bits)
    for zero in np.arange(0, 2**bits - 0.5, 0.5):
        odd_q, s, z = lut.reinterpret(q, 0.75, zero, bits)
        assert (s * (odd_q - z)).tolist() == (0.75 * (q - zero)).tolist()  # all exact in FP64
        # Symmetric around the middle there is nothing to correct; one more half step costs sum(a).
        assert z == 2 * (zero - (2**bits - 1) / 2)
    # Every plane means +-1: q' = sum of 2**t (2 q_t - 1).
    planes = lut.bit_planes(q, bits).astype(int)
    assert sum(2**t * (2 * p - 1) for t, p in enumerate(planes)).tolist() == odd_q.tolist()


def test_the_papers_example():
    # b = 1, s = 2, z = 1/2, W3 W2 W1 W0 = 0010 with A on W0: -A + B - C - D.
    a = np.array([[3, 10, 20, 50]], np.int8)
    q = np.array([[0, 1, 0, 0]], np.uint8)
    assert lut.lut_gemm(a, lut.encode(q, 1)).tolist() == [[-3 + 10 - 20 - 50]]
    linear = lut.lut_linear(a, [lut.encode(q, 1)], np.float32([[2]]), np.float32([[0.5]]))
    assert linear.tolist() == [[-63.0]]


def test_words():
    # Codes by element: 0, 1, 2, 3 of two bits. Plane 0 reads 0101 from element 0 on, plane 1 reads 0011.
    q = np.array([[0, 1, 2, 3]], np.uint8)
    assert lut.group_words(q, 2).words[:, 0, 0].tolist() == [0b1010, 0b1100]
    # Eq 6: W3 = 1 complements the other three, and stays.
    assert lut.encode(q, 2).words[:, 0, 0].tolist() == [0b1101, 0b1011]
    # W3 = 0 changes nothing; so codes 0, the padding, stay 0.
    assert lut.encode(np.array([[3, 3, 3, 0, 2]]), 2).words[:, 0].tolist() == [[0b0111, 0], [0b0111, 1]]


@st.composite
def cases(draw, types, finite=True):
    """(a, q, bits, group): often ragged, extremes included."""
    dtype = np.dtype(draw(st.sampled_from(types)))
    bits, group = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    m, n, channels = draw(st.integers(1, 3)), draw(st.integers(1, 4)), draw(st.integers(1, 14))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    q = rng.integers(0, 1 << bits, (n, channels)).astype(np.uint8)
    if dtype.kind == "i":
        info = np.iinfo(dtype)
        a = rng.integers(info.min, info.max, (m, channels), endpoint=True).astype(dtype)
        if draw(st.booleans()):
            a[:] = draw(st.sampled_from([info.min, info.max, 0]))
        return a, q, bits, group
    # Any encodings: subnormals and large numbers, and sometimes infinities and NaNs.
    words = rng.integers(0, 1 << 8 * dtype.itemsize, (m, channels)).astype(f"u{dtype.itemsize}")
    if draw(st.booleans()):  # values of one magnitude, so that sums cancel and tie
        words = words & (0x87FF if dtype.itemsize == 2 else 0x8F) | (0x3800 if dtype.itemsize == 2 else 0x30)
    a = words.view(dtype)
    if draw(st.integers(0, 3)):
        a = np.where(np.isfinite(a.astype(np.float32)), a, dtype.type(0))
    return a, q, bits, group


@settings(max_examples=60)
@given(cases(INT_TYPES))
def test_decoding_gives_the_codes_back(case):
    _, q, bits, group = case
    coded = lut.encode(q, bits, group)
    assert (coded.bits, coded.group, coded.channels) == (bits, group, q.shape[1])
    np.testing.assert_array_equal(lut.decode(coded), q)


# --- tables ------------------------------------------------------------------------------------------------------


def test_tables_by_hand():
    # -8 +-1 +-2 +-4: i counts up from -15 in steps of 2.
    a = np.array([[1, 2, 4, 8]], np.int8)
    assert lut.symmetric_tables(a).tolist() == [[list(range(-15, 0, 2))]]
    assert lut.conventional_tables(a).tolist() == [[list(range(16))]]


def test_int8_entries_need_eleven_bits_at_group_4():
    # All -128: T[0] = 4 * 128 = 512, beyond the 10-bit 511. The least: -127 - 3 * 128 = -511.
    assert lut.symmetric_tables(np.full((1, 4), -128, np.int8))[0, 0, 0] == 512
    assert lut.symmetric_tables(np.array([[-128, -128, -128, 127]], np.int8)).min() == -511
    # Without -128: 4 * 127 = 508 fits 10 bits.
    corners = np.array(np.meshgrid(*[[-127, 127]] * 4), np.int8).reshape(4, -1).T
    assert np.abs(lut.symmetric_tables(corners)).max() == 508


@settings(max_examples=60)
@given(cases(INT_TYPES + FLOAT_TYPES))
def test_a_symmetric_table_is_the_difference_of_both_halves(case):
    a, _, _, group = case
    if a.dtype.kind != "i":
        a = np.rint(np.clip(np.nan_to_num(a.astype(np.float32)), -8, 8)).astype(a.dtype)  # exact sums
    full, half = lut.conventional_tables(a, group), lut.symmetric_tables(a, group)
    entries = half.shape[-1]
    np.testing.assert_array_equal(half, (full - full[..., ::-1])[..., :entries])


def test_float_entries_add_the_elements_in_order():
    # FP16 has 11 bits: 1 + 2**-11 is a tie and goes down to 1, twice; the small ones first would give 1 + 2**-10.
    tiny = 2.0**-11
    assert lut.symmetric_tables(np.float16([[1, tiny, tiny, 0]]))[0, 0, 7] == 1
    assert lut.symmetric_tables(np.float16([[tiny, tiny, 1, 0]]))[0, 0, 7] == 1 + 2 * tiny
    # The sign element is last: (tiny + tiny) - 1 is exact, 2**-10 - 1.
    assert lut.symmetric_tables(np.float16([[tiny, tiny, 0, 1]]))[0, 0, 7] == 2 * tiny - 1


# --- integer GEMMs -----------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(cases(INT_TYPES), st.integers(-(2**31), 2**31 - 1))
def test_integer_gemms_equal_the_plain_product(case, start):
    a, q, bits, group = case
    psum = np.full((a.shape[0], q.shape[0]), start, np.int32)
    wide = a.astype(np.int64)
    expected = int32(wide @ odd(q, bits).T + start)
    np.testing.assert_array_equal(lut.lut_gemm(a, lut.encode(q, bits, group), psum), expected)

    unsigned = int32(wide @ q.astype(np.int64).T + start)
    plain = lut.group_words(q, bits, group)
    np.testing.assert_array_equal(lut.conventional_gemm(a, plain, psum), unsigned)
    np.testing.assert_array_equal(lut.add_gemm(a, plain, psum), unsigned)
    w = odd(q, bits).astype(np.int8)
    np.testing.assert_array_equal(lut.mac_gemm(a, w, psum, lanes=1 << group % 4), expected)
    raw, sums = lut.conventional_gemm(a, plain), lut.channel_sums(a)[:, 0]
    np.testing.assert_array_equal(sums, wide.sum(axis=1))
    np.testing.assert_array_equal(lut.symmetric_sum(raw, sums, bits), int32(wide @ odd(q, bits).T))


def test_the_result_has_its_own_memory():
    psum = np.zeros((1, 1), np.int32)
    lut.lut_gemm(np.ones((1, 4), np.int8), lut.encode(np.ones((1, 4), int), 1), psum)
    assert psum.tolist() == [[0]]


# --- floating-point GEMMs ----------------------------------------------------------------------------------------


def float_sum(terms, fmt):
    total = terms[0]
    for term in terms[1:]:
        total = formats.add(total, term, fmt)
    return total


def float_oracle(a, q, psum, bits, group, fmt, symmetric=True):
    """On bit patterns, one number at a time, straight from the weights."""
    source = FP16 if a.dtype == np.float16 else FP8_E4M3
    words = formats.convert(a.view(f"u{a.dtype.itemsize}"), source, FP16)
    out = np.zeros(psum.shape, formats.bits_dtype(fmt))
    for m, n in np.ndindex(psum.shape):
        acc = psum[m, n]
        for first in range(0, a.shape[1], group):
            for t in range(bits):
                row = [int(words[m, k]) for k in range(first, min(first + group, a.shape[1]))]
                plane = [int(q[n, k]) >> t & 1 for k in range(first, min(first + group, a.shape[1]))]
                row += [0] * (group - len(row))
                plane += [0] * (group - len(plane))
                if symmetric:
                    # The entry with sign element negative, negated for the other half.
                    flip = plane[-1]
                    entry = float_sum(
                        [x ^ (0 if bit ^ flip else FP16.sign) for x, bit in zip(row, plane, strict=True)],
                        FP16,
                    )
                    entry = int(entry) ^ (FP16.sign if flip else 0)
                else:
                    entry = float_sum([x if bit else 0 for x, bit in zip(row, plane, strict=True)], FP16)
                power = formats.to_bits(2.0**t, fmt)
                scaled = formats.multiply(formats.convert(entry, FP16, fmt), power, fmt, fmt)
                acc = formats.add(acc, scaled, fmt)
        out[m, n] = acc
    return out


@settings(max_examples=60)
@given(cases(FLOAT_TYPES), st.sampled_from(["fp16", "fp32"]), st.integers(0, 2**32 - 1))
def test_float_gemms_equal_bit_pattern_arithmetic(case, accumulator, seed):
    a, q, bits, group = case
    fmt = {"fp16": FP16, "fp32": FP32}[accumulator]
    start = np.random.default_rng(seed).standard_normal((a.shape[0], q.shape[0]))
    psum = start.astype(lut.ACCUMULATORS[accumulator])
    got = lut.lut_gemm(a, lut.encode(q, bits, group), psum, accumulator=accumulator)
    np.testing.assert_array_equal(bits_of(got), float_oracle(a, q, bits_of(psum), bits, group, fmt))

    plain = lut.group_words(q, bits, group)
    added = lut.add_gemm(a, plain, psum, accumulator=accumulator)
    expected = float_oracle(a, q, bits_of(psum), bits, group, fmt, symmetric=False)
    np.testing.assert_array_equal(bits_of(added), expected)
    read = lut.conventional_gemm(a, plain, psum, accumulator=accumulator)
    np.testing.assert_array_equal(bits_of(read), expected)


def test_zero_entries_stay_zero():
    # +1 -1 +1 -1 = 0 in both planes: no exponent is added to a zero.
    a = np.float16([[1, 1, 1, 1]])
    q = np.array([[3, 0, 3, 0]], np.uint8)
    for accumulator in ("fp16", "fp32"):
        assert lut.lut_gemm(a, lut.encode(q, 2), accumulator=accumulator).tolist() == [[0.0]]


def test_exponent_overflow_gives_infinity():
    # 40000 in plane 1 is 80000, beyond FP16; in FP32 the sum is 40000 + 80000.
    a = np.float16([[40000, 0, 0, 0]])
    q = np.array([[3, 0, 0, 0], [0, 0, 0, 0]], np.uint8)
    coded = lut.encode(q, 2)
    assert lut.lut_gemm(a, coded, accumulator="fp16").tolist() == [[np.inf, -np.inf]]
    assert lut.lut_gemm(a, coded, accumulator="fp32").tolist() == [[120000.0, -120000.0]]


def test_subnormals_are_kept():
    # The smallest FP16, 2**-24, in planes 0 and 1: 3 * 2**-24.
    a = np.float16([[2.0**-24, 0, 0, 0]])
    coded = lut.encode(np.array([[3, 0, 0, 0]]), 2)
    assert lut.lut_gemm(a, coded, accumulator="fp16").tolist() == [[3 * 2.0**-24]]


def test_planes_are_inner_and_the_lowest_is_first():
    # FP16 at 2048 has a quantum of 2. Planes +1 (tie, to even 2048), then +2: 2050; plane 1 first gives 2050,
    # then +1 is a tie between 2050 and 2052 and goes to 2052 (even).
    psum = np.float16([[2048]])
    a = np.float16([[1, 0, 0, 0]])
    assert lut.lut_gemm(a, lut.encode(np.array([[3, 0, 0, 0]]), 2), psum, accumulator="fp16") == 2050


@settings(max_examples=40)
@given(cases(INT_TYPES + FLOAT_TYPES), st.integers(1, 9))
def test_groups_of_padding_change_nothing(case, more):
    a, q, bits, group = case
    accumulator = "int32" if a.dtype.kind == "i" else "fp16"
    padded = np.zeros((a.shape[0], a.shape[1] + more), a.dtype)
    padded[:, : a.shape[1]] = a
    longer = np.concatenate((q, np.zeros((q.shape[0], more), q.dtype)), axis=1)
    np.testing.assert_array_equal(
        lut.lut_gemm(padded, lut.encode(longer, bits, group), accumulator=accumulator),
        lut.lut_gemm(a, lut.encode(q, bits, group), accumulator=accumulator),
    )


def test_multipliers_by_hand():
    # Tree of adjacent pairs in FP16: (2048 + 1) + (1 + 1) = 2048 + 2; one after another would stay at 2048.
    a, ones = np.float16([[2048, 1, 1, 1]]), np.ones((1, 4), np.float16)
    assert lut.mac_gemm(a, ones, accumulator="fp16") == 2050
    assert lut.mac_gemm(a, ones, accumulator="fp16", lanes=1) == 2048
    assert lut.mac_gemm(a, ones, accumulator="fp32") == 2051
    # (2048 - 2048) + (1 + 1); the halves (2048 + 1) + (-2048 + 1) would give 1.
    assert lut.mac_gemm(np.float16([[2048, -2048, 1, 1]]), ones, accumulator="fp16") == 2
    # (1 + 2**-10)**2 = 1 + 2**-9 + 2**-20: the product is rounded to FP16, and exact in FP32.
    x = np.float16([[1 + 2.0**-10]])
    assert lut.mac_gemm(x, x, accumulator="fp16") == 1 + 2.0**-9
    assert lut.mac_gemm(x, x, accumulator="fp32") == 1 + 2.0**-9 + 2.0**-20


# --- int8 tables -------------------------------------------------------------------------------------------------


def test_quantised_table_by_hand():
    # -15, -13, .., -1 times 127/15: 127, 110.07, 93.13, 76.2, 59.27, 42.33, 25.4, 8.47.
    tables = lut.symmetric_tables(np.array([[1, 2, 4, 8]], np.int8))
    entries, scales = lut.quantise_tables(tables)
    assert entries.tolist() == [[[-127, -110, -93, -76, -59, -42, -25, -8]]]
    assert scales.tolist() == [[np.float32(15) / np.float32(127)]]


def test_a_block_shares_the_largest_scale():
    # Largest entries 127, 254, 4 * 127: blocks of two are (127, 254) and (508).
    a = np.zeros((1, 12), np.int16)
    a[0, [0, 4, 8]] = 127, 254, 508
    entries, scales = lut.quantise_tables(lut.symmetric_tables(a), block=2)
    assert scales.tolist() == [[2.0, 4.0]]
    # 127 / 2 = 63.5 is a tie, and goes to the even 64.
    assert np.abs(entries[0, :, 0]).tolist() == [64, 127, 127]


def test_an_empty_table_and_an_infinite_one():
    a = np.float16([[0, 0, 0, 0], [np.inf, 0, 0, 0]])
    entries, scales = lut.quantise_tables(lut.symmetric_tables(a))
    assert not entries.any() and scales.tolist() == [[0.0], [np.inf]]
    psum = np.float32([[5], [5]])
    coded = lut.encode(np.zeros((1, 4), int), 2)
    got = lut.lut_gemm(a, coded, psum, accumulator="fp32", table="int8")
    assert got[0, 0] == 5 and bits_of(got)[1, 0] == FP32.nan


@settings(max_examples=60)
@given(cases(INT_TYPES + FLOAT_TYPES), st.integers(1, 4))
def test_quantised_gemm_equals_one_number_at_a_time(case, block):
    a, q, bits, group = case
    if a.dtype.kind != "i":
        a = np.where(np.abs(a.astype(np.float32)) < 8192, a, a.dtype.type(0))
    psum = np.full((a.shape[0], q.shape[0]), 0.1, np.float32)
    tables = lut.symmetric_tables(a, group)
    w = np.zeros((q.shape[0], tables.shape[1] * group), np.int64)
    w[:, : q.shape[1]] = q
    expected = psum.copy()
    for m, n in np.ndindex(psum.shape):
        for first in range(0, tables.shape[1], block):
            part = tables[m, first : first + block].astype(np.float32)
            scale = np.abs(part).max() / np.float32(127)
            whole = 0
            for g in range(len(part)):
                for t in range(bits):
                    plane = w[n, (first + g) * group :][:group] >> t & 1
                    low = plane[:-1] ^ plane[-1]
                    entry = part[g, int(low @ (1 << np.arange(group - 1)))]
                    level = round(float(entry / scale)) if scale else 0  # Python's round is half to even
                    whole += (-level if plane[-1] else level) << t
            expected[m, n] += np.float32(whole) * scale
    got = lut.lut_gemm(a, lut.encode(q, bits, group), psum, accumulator="fp32", table="int8", block=block)
    np.testing.assert_array_equal(bits_of(got), bits_of(expected))


# --- epilogue ----------------------------------------------------------------------------------------------------


def test_epilogue_rounding_by_hand():
    one, none = np.float32([[1]]), np.float32([[0]])
    # Integers: 2**24 + 1 is exact until it becomes FP32, a tie, to even.
    sums, of_rows = np.array([[2**24 + 1]], np.int32), np.array([[1]], np.int32)
    assert lut.epilogue([sums], of_rows, one, none) == 2**24
    assert lut.epilogue([sums], of_rows, one, one) == 2**24
    assert lut.epilogue([sums], of_rows, one, -one) == 2**24 + 2
    # FP32: 3 (2**23 + 1) = 25165827 is a tie between 25165826 and 25165828 (even) before the difference.
    sums, of_rows = np.float32([[25165828]]), np.float32([[2**23 + 1]])
    assert lut.epilogue([sums], of_rows, one, np.float32([[3]])) == 0
    # Groups in order: 1 is lost against 2**24, twice.
    parts = [np.array([[v]], np.int32) for v in (2**24, 1, 1)]
    sums_a = np.zeros((1, 3), np.int32)
    assert lut.epilogue(parts, sums_a, np.ones((1, 3), np.float32), np.zeros((1, 3), np.float32)) == 2**24
    # Row scale before bias.
    out = lut.epilogue(
        [np.array([[3]], np.int32)], of_rows.astype(np.int32), one, none, np.float32([2]), one[0]
    )
    assert out == 7


def test_float_channel_sums_are_in_order():
    # 1 + 1 + 512 * 2**15 is exact; after the 2**24 each 1 is a tie, and lost.
    ones, large = np.ones(2), np.full(512, 2.0**15)
    a = np.concatenate((ones, large, ones)).astype(np.float16)[None]
    assert lut.channel_sums(a[:, :-2]) == 2**24 + 2
    assert lut.channel_sums(a[:, 2:]) == 2**24
    assert lut.channel_sums(a, [1, 513, 2]).tolist() == [[1, 2**24, 2]]


@settings(max_examples=60)
@given(cases(INT_TYPES), st.integers(1, 14), st.integers(0, 2**32 - 1))
def test_linear_layer_with_exact_numbers(case, span, seed):
    """Scales are powers of two and sums small, so nothing rounds: the result is a . s (q - z) itself."""
    a, q, bits, group = case
    a = np.clip(a, -100, 100)
    rng = np.random.default_rng(seed)
    spans = [slice(i, min(i + span, q.shape[1])) for i in range(0, q.shape[1], span)]
    scale = 2.0 ** rng.integers(-3, 3, (q.shape[0], len(spans))).astype(np.float32)
    zero = (rng.integers(0, 2 ** (bits + 1) - 1, scale.shape) / 2).astype(np.float32)
    words = [lut.encode(q[:, s], bits, group) for s in spans]
    row = np.full(a.shape[0], 0.5, np.float32)
    bias = np.arange(q.shape[0], dtype=np.float32)
    real = np.concatenate(
        [scale[:, [i]] * (q[:, s].astype(np.float64) - zero[:, [i]]) for i, s in enumerate(spans)], axis=1
    )
    got = lut.lut_linear(a, words, scale, zero, row_scale=row, bias=bias)
    np.testing.assert_array_equal(got, a.astype(np.float64) @ real.T / 2 + bias)


# --- what is refused ---------------------------------------------------------------------------------------------

CODED = lut.encode(np.zeros((2, 8), np.uint8), 2)
INT8 = np.zeros((3, 8), np.int8)
HALF = np.zeros((3, 8), np.float16)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: lut.encode(np.zeros((1, 4)), 5), "bits must be in 1..4, not 5"),
        (lambda: lut.encode(np.full((1, 4), 4), 2), r"codes of 2 bits must be in 0..3, not 4..4"),
        (lambda: lut.encode(np.zeros((1, 4)), 2, 7), "group must be in 2..6, not 7"),
        (lambda: lut.lut_gemm(INT8[:, :7], CODED), r"activations must be \[M, 8\], not \[3, 7\]"),
        (lambda: lut.lut_gemm(INT8.astype(np.int32), CODED), "activations must be int8, .*, not int32"),
        (lambda: lut.lut_gemm(INT8, CODED, accumulator="fp32"), "must be int32, not 'fp32'"),
        (lambda: lut.lut_gemm(HALF, CODED), "must be fp16 or fp32, not 'int32'"),
        (lambda: lut.lut_gemm(HALF, CODED, table="int4"), "table must be 'exact' or 'int8', not 'int4'"),
        (lambda: lut.lut_gemm(INT8, CODED, table="int8"), "of an int8 table must be 'fp32', not 'int32'"),
        (
            lambda: lut.lut_gemm(INT8, CODED, accumulator="fp32", table="int8", block=0),
            "block must be at least 1 group, not 0",
        ),
        (
            lambda: lut.lut_gemm(INT8, CODED, np.zeros((3, 2))),
            r"psum must be int32 of shape \(3, 2\), not float64",
        ),
        (lambda: lut.mac_gemm(INT8, INT8, lanes=3), "lanes must be a power of two, not 3"),
        (lambda: lut.mac_gemm(INT8, INT8[:, :4]), "activations have 8 channels, weights 4"),
        (lambda: lut.mac_gemm(INT8, HALF), "must both be integer or both float"),
        (
            lambda: lut.lut_linear(INT8[:, :4], [CODED], np.ones((2, 1), "f4"), np.ones((2, 1), "f4")),
            "activations have 4 channels, weights 8",
        ),
        (
            lambda: lut.lut_linear(INT8, [CODED], np.ones((2, 1), "f4"), np.full((2, 1), 0.3, "f4")),
            "zero points must be multiples of 1/2",
        ),
    ],
)
def test_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()
