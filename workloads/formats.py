"""Floating-point arithmetic on bit patterns, elementwise, in any `FloatFormat`: the reference of the RTL.

Encodings are unsigned integer arrays of the smallest NumPy type that holds the format. Every operation
rounds once, to nearest, ties to even; subnormals are kept; an overflow gives infinity, or NaN in a format
without one (OCP E4M3, which does not saturate here); every NaN that leaves is the format's canonical one.
Operands broadcast as in NumPy, and there are no reductions: the order of a sum is the caller's to write.
"""

from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewright.arch.formats import FP32, FloatFormat

Bits = NDArray[np.unsignedinteger[Any]]


def bits_dtype(fmt: FloatFormat) -> np.dtype[Any]:
    """The unsigned NumPy type of encodings in `fmt`.

    >>> from tilewright.arch.formats import BF16
    >>> bits_dtype(BF16)
    dtype('uint16')
    """
    return np.dtype(np.uint8 if fmt.width <= 8 else np.uint16 if fmt.width <= 16 else np.uint32)


def from_bits(bits: ArrayLike, fmt: FloatFormat) -> NDArray[np.float32]:
    """The values of encodings; exact, as every format is contained in binary32."""
    b = np.asarray(bits).astype(np.uint32)
    if fmt.exponent_bits == FP32.exponent_bits and fmt.has_inf:  # the upper bits of a binary32
        return (b << np.uint32(FP32.mantissa_bits - fmt.mantissa_bits)).view(np.float32)
    magnitude = b & np.uint32(fmt.sign - 1)
    field = (magnitude >> np.uint32(fmt.mantissa_bits)).astype(np.int32)
    fraction = magnitude & np.uint32(fmt.min_normal - 1)
    significand = np.where(field > 0, fraction + np.uint32(fmt.min_normal), fraction)
    value = np.ldexp(significand.astype(np.float32), np.maximum(field, 1) - (fmt.bias + fmt.mantissa_bits))
    value = np.where(magnitude > fmt.max_finite, np.float32(np.nan), value)
    if fmt.has_inf:
        value = np.where(magnitude == fmt.overflow, np.float32(np.inf), value)
    return np.where(b & np.uint32(fmt.sign), -value, value).astype(np.float32)


def to_bits(values: ArrayLike, fmt: FloatFormat) -> Bits:
    """The encodings of float64 values (or anything that float64 holds exactly), rounded once.

    >>> from tilewright.arch.formats import FP16
    >>> to_bits([1.0, -0.0, 65520.0], FP16)
    array([15360, 32768, 31744], dtype=uint16)
    """
    with np.errstate(all="ignore"):
        x = np.asarray(values).astype(_carrier(fmt))
    if fmt == FP32:
        return np.where(np.isnan(x), np.uint32(fmt.nan), x.view(np.uint32))
    finite = np.isfinite(x)
    size = np.where(finite, np.abs(x), 0.0)
    # Powers of two scale exactly, so rint is the only rounding. Below the normal range the quantum stays.
    lowest = 1 - fmt.bias
    exponent = np.where(size > 0, np.maximum(np.frexp(size)[1] - 1, lowest), lowest)
    significand = np.rint(np.ldexp(size, fmt.mantissa_bits - exponent)).astype(np.int64)
    # The hidden bit adds one to the exponent field, and so does a carry out of the rounding.
    magnitude = ((exponent.astype(np.int64) + (fmt.bias - 1)) << fmt.mantissa_bits) + significand
    magnitude = np.where(finite & (magnitude <= fmt.max_finite), magnitude, fmt.overflow)
    bits = np.where(np.signbit(x), magnitude + fmt.sign, magnitude)
    return np.where(np.isnan(x) | (magnitude == fmt.nan), fmt.nan, bits).astype(bits_dtype(fmt))


def _carrier(fmt: FloatFormat) -> type[np.floating[Any]]:
    """The NumPy type to compute in, such that rounding its result to `fmt` is one correct rounding.

    For binary32 it is the format itself. For a narrower format binary64 has at least 2p + 2 bits for
    both precisions p involved: products are exact, and the second rounding of a sum is innocuous
    (S. A. Figueroa, "When is double rounding innocuous?", SIGNUM 30(3), 1995); a sum in the subnormal
    range is a multiple of the smallest subnormal, hence exact.
    """
    return np.float32 if fmt == FP32 else np.float64


def convert(bits: ArrayLike, src: FloatFormat, dst: FloatFormat) -> Bits:
    """Encodings of `src` as encodings of `dst`."""
    return to_bits(from_bits(bits, src), dst)


def add(a_bits: ArrayLike, b_bits: ArrayLike, fmt: FloatFormat) -> Bits:
    """a + b in `fmt`; x + (-x) is +0."""
    t = _carrier(fmt)
    with np.errstate(all="ignore"):
        return to_bits(from_bits(a_bits, fmt).astype(t) + from_bits(b_bits, fmt).astype(t), fmt)


def multiply(a_bits: ArrayLike, b_bits: ArrayLike, fmt_in: FloatFormat, fmt_out: FloatFormat) -> Bits:
    """a * b of two operands in `fmt_in`, rounded to `fmt_out`.

    >>> from tilewright.arch.formats import BF16
    >>> hex(multiply(0x3FC0, 0xC000, BF16, FP32)[()])  # 1.5 * -2
    '0xc0400000'
    """
    t = _carrier(fmt_out)
    with np.errstate(all="ignore"):
        return to_bits(from_bits(a_bits, fmt_in).astype(t) * from_bits(b_bits, fmt_in).astype(t), fmt_out)


def compare(a_bits: ArrayLike, b_bits: ArrayLike, fmt: FloatFormat) -> tuple[Any, Any, Any]:
    """(a < b, a == b, unordered) as Booleans; the zeros are equal, unordered is either being NaN."""
    a, b = from_bits(a_bits, fmt), from_bits(b_bits, fmt)
    return a < b, a == b, np.isnan(a) | np.isnan(b)


def maximum(a_bits: ArrayLike, b_bits: ArrayLike, fmt: FloatFormat) -> Bits:
    """The larger of a and b, NaN if either is, +0 above -0 (IEEE 754-2019, 9.6: maximum)."""
    a, b = from_bits(a_bits, fmt), from_bits(b_bits, fmt)
    larger = np.where((a < b) | ((a == b) & np.signbit(a)), b_bits, a_bits)
    return np.where(np.isnan(a) | np.isnan(b), fmt.nan, larger).astype(bits_dtype(fmt))
