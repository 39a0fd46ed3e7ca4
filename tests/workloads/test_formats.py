import warnings
from fractions import Fraction

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.arch.errors import UserError
from tilewright.arch.formats import BF16, FORMATS, FP8_E4M3, FP8_E5M2, FP16, FP32, FloatFormat, float_format
from tilewright.workloads import formats

NUMPY = {
    FP8_E4M3: ml_dtypes.float8_e4m3fn,
    FP8_E5M2: ml_dtypes.float8_e5m2,
    FP16: np.float16,
    BF16: ml_dtypes.bfloat16,
    FP32: np.float32,
}
NARROW = (FP8_E4M3, FP8_E5M2, FP16, BF16)


# --- the formats themselves, from their standards' tables --------------------------------------------------------


@pytest.mark.parametrize(
    "fmt, width, bias, largest, smallest, nan",
    [
        # OFP8 Table 2: S.1111.110 = 1.75 * 2^8; S.0000.001 = 2^-9.
        (FP8_E4M3, 8, 7, 448.0, 2.0**-9, 0x7F),
        # OFP8 Table 2: S.11110.11 = 1.75 * 2^15; S.00000.01 = 2^-16.
        (FP8_E5M2, 8, 15, 57344.0, 2.0**-16, 0x7E),
        # IEEE 754: (2 - 2^-10) * 2^15 and 2^(-14 - 10).
        (FP16, 16, 15, 65504.0, 2.0**-24, 0x7E00),
        (BF16, 16, 127, (2 - 2.0**-7) * 2.0**127, 2.0**-133, 0x7FC0),
        (FP32, 32, 127, (2 - 2.0**-23) * 2.0**127, 2.0**-149, 0x7FC00000),
    ],
    ids=lambda v: v.name if isinstance(v, FloatFormat) else "",
)
def test_ranges(fmt, width, bias, largest, smallest, nan):
    assert (fmt.width, fmt.bias, fmt.nan) == (width, bias, nan)
    assert formats.from_bits(fmt.max_finite, fmt) == largest
    assert formats.from_bits(1, fmt) == smallest
    assert formats.from_bits(fmt.min_normal, fmt) == 2.0 ** (1 - bias)
    assert np.isnan(formats.from_bits(fmt.nan, fmt))
    beyond = formats.from_bits(fmt.max_finite + 1, fmt)
    assert np.isposinf(beyond) if fmt.has_inf else np.isnan(beyond)


def test_names():
    assert all(float_format(name).name == name for name in FORMATS)
    with pytest.raises(UserError, match=r"^float format 'bf61' is unknown; did you mean bf16\?$"):
        float_format("bf61")


def test_formats_beyond_binary32_are_refused():
    with pytest.raises(UserError, match=r"^float format fp64: exponent_bits must be in 2..8, not 11$"):
        FloatFormat("fp64", 11, 52)
    with pytest.raises(UserError, match=r"^float format fixed: mantissa_bits must be in 1..23, not 0$"):
        FloatFormat("fixed", 4, 0)
    # Its largest exponent would be finite, and one above binary32's.
    with pytest.raises(UserError, match=r"^float format wide: exponent_bits must be in 2..7, not 8$"):
        FloatFormat("wide", 8, 3, has_inf=False)


# --- cases by hand -------------------------------------------------------------------------------------------------


def test_ties_go_to_even():
    # bf16 has 8 bits of precision: between 1 and 1 + 2^-7 the tie 1 + 2^-8 goes down, between 1 + 2^-7 and 1 + 2^-6 up.
    ties = [1 + 2.0**-8, 1 + 3 * 2.0**-8, 1 + 2.0**-8 + 2.0**-40]
    assert formats.to_bits(ties, BF16).tolist() == [0x3F80, 0x3F82, 0x3F81]


def test_overflow():
    # E4M3: 464 is the tie between 448 (even) and 480, which does not exist. fp16: 65520 is the tie with 2^16.
    assert formats.to_bits([464.0, 464.1, -1e6, np.inf], FP8_E4M3).tolist() == [0x7E, 0x7F, 0x7F, 0x7F]
    assert formats.to_bits([65519.9, 65520.0, -1e6], FP16).tolist() == [0x7BFF, 0x7C00, 0xFC00]


def test_one_rounding_only():
    # 1 + 2^-8 + 2^-40 is above the tie; by way of binary32 it would be the tie, and go down to 1.
    value = 1 + 2.0**-8 + 2.0**-40
    assert formats.to_bits(value, BF16) == 0x3F81
    assert formats.to_bits(np.float32(value), BF16) == 0x3F80


@pytest.mark.parametrize("fmt", FORMATS.values(), ids=lambda f: f.name)
def test_zeros_infinities_and_nans(fmt):
    one = fmt.bias << fmt.mantissa_bits
    minus = fmt.sign
    assert formats.add(one, one | minus, fmt) == 0
    assert formats.add(minus, minus, fmt) == minus
    assert formats.add(0, minus, fmt) == 0
    assert formats.multiply(one, minus, fmt, fmt) == minus
    if fmt.has_inf:
        inf = fmt.overflow
        assert formats.add(inf, inf | minus, fmt) == fmt.nan
        assert formats.multiply(inf, 0, fmt, fmt) == fmt.nan
        assert formats.multiply(inf, one | minus, fmt, fmt) == inf | minus
    # The last encoding is a NaN in every format; with the sign it is not the canonical one.
    strange = 2 * fmt.sign - 1
    assert formats.add(strange, one, fmt) == fmt.nan
    assert formats.multiply(one, strange, fmt, fmt) == fmt.nan
    assert formats.convert(strange, fmt, fmt) == fmt.nan
    assert formats.maximum(strange, one, fmt) == fmt.nan
    assert formats.compare(strange, strange, fmt) == (False, False, True)
    assert formats.compare(0, minus, fmt) == (False, True, False)
    assert formats.maximum(minus, 0, fmt) == formats.maximum(0, minus, fmt) == 0


# --- other implementations ---------------------------------------------------------------------------------------------


def bits_of(values, fmt):
    """The encodings of a NumPy array of the format's own type, its NaNs made canonical."""
    with np.errstate(invalid="ignore"):
        nan = np.isnan(values.astype(np.float32))
    return np.where(nan, fmt.nan, values.view(formats.bits_dtype(fmt)))


@pytest.mark.parametrize("fmt", NARROW, ids=lambda f: f.name)
def test_all_encodings_against_numpy_and_ml_dtypes(fmt):
    bits = np.arange(1 << fmt.width).astype(formats.bits_dtype(fmt))
    values = bits.view(NUMPY[fmt]).astype(np.float32)
    np.testing.assert_array_equal(formats.from_bits(bits, fmt), values)
    for to, dtype in NUMPY.items():
        with np.errstate(all="ignore"):
            expected = bits_of(values.astype(dtype), to)
        np.testing.assert_array_equal(formats.convert(bits, fmt, to), expected)


@pytest.mark.parametrize("fmt", [FP8_E4M3, FP8_E5M2], ids=lambda f: f.name)
def test_all_pairs_against_ml_dtypes(fmt):
    a, b = np.meshgrid(*[np.arange(256, dtype=np.uint8)] * 2)
    x, y = a.view(NUMPY[fmt]), b.view(NUMPY[fmt])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        np.testing.assert_array_equal(formats.add(a, b, fmt), bits_of(x + y, fmt))
        np.testing.assert_array_equal(formats.multiply(a, b, fmt, fmt), bits_of(x * y, fmt))


@pytest.mark.parametrize("fmt", [FP16, BF16, FP32], ids=lambda f: f.name)
def test_random_pairs_against_numpy_and_ml_dtypes(fmt):
    rng = np.random.default_rng(fmt.width + fmt.exponent_bits)
    a, b = rng.integers(1 << fmt.width, size=(2, 100_000)).astype(formats.bits_dtype(fmt))
    x, y = a.view(NUMPY[fmt]), b.view(NUMPY[fmt])
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(formats.add(a, b, fmt), bits_of(x + y, fmt))
        np.testing.assert_array_equal(formats.multiply(a, b, fmt, fmt), bits_of(x * y, fmt))


# --- exact rationals, for formats of any size ---------------------------------------------------------------------------


def exact(bits, fmt):
    """The value of a finite encoding."""
    field, fraction = divmod(bits % fmt.sign, fmt.min_normal)
    significand = fraction + fmt.min_normal if field else fraction
    value = significand * Fraction(2) ** (max(field, 1) - fmt.bias - fmt.mantissa_bits)
    return -value if bits & fmt.sign else value


def nearest_magnitude(size, fmt):
    """By bisection over all magnitudes: the nearest one, the even one of two, and the overflow beyond."""
    low, high = (
        0,
        fmt.max_finite + 1,
    )  # exact() continues the finite numbers by one, which ends the last interval
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if exact(middle, fmt) <= size else (low, middle)
    down, up = size - exact(low, fmt), exact(high, fmt) - size
    chosen = low if down < up or (down == up and low % 2 == 0) else high
    return fmt.overflow if chosen > fmt.max_finite else chosen


def rounded(value, fmt, zero_sign):
    magnitude = nearest_magnitude(abs(value), fmt)
    negative = value < 0 or (value == 0 and zero_sign)
    return magnitude if magnitude == fmt.nan else magnitude | fmt.sign * negative


any_format = st.booleans().flatmap(
    lambda inf: st.builds(
        FloatFormat, st.just("any"), st.integers(2, 7 + inf), st.integers(1, 23), st.just(inf)
    )
)


@st.composite
def finite(draw, fmt):
    """A finite encoding, often at an end of the range or with a short mantissa, so that ties occur."""
    ends = st.sampled_from([0, 1, fmt.min_normal - 1, fmt.min_normal, fmt.max_finite])
    short = st.integers(0, fmt.max_finite >> fmt.mantissa_bits // 2).map(
        lambda n: n << fmt.mantissa_bits // 2
    )
    return draw(ends | short | st.integers(0, fmt.max_finite)) | draw(st.sampled_from([0, fmt.sign]))


@settings(deadline=None, max_examples=300)
@given(st.data(), any_format, any_format)
def test_against_rationals(data, fmt, other):
    a, b = data.draw(finite(fmt)), data.draw(finite(fmt))
    x, y = exact(a, fmt), exact(b, fmt)
    signs = bool(a & fmt.sign), bool(b & fmt.sign)
    assert formats.add(a, b, fmt) == rounded(x + y, fmt, all(signs))
    assert formats.multiply(a, b, fmt, other) == rounded(x * y, other, signs[0] != signs[1])
    assert formats.convert(a, fmt, other) == rounded(x, other, signs[0])
    assert formats.compare(a, b, fmt) == (x < y, x == y, False)
    assert exact(int(formats.maximum(a, b, fmt)), fmt) == max(x, y)
