"""What the companion ASIC of a PIM-GPT system computes: additions and multiplications in a written order.

The functions take and give float32 arrays, the last axis being the vector; operands arrive as exact bfloat16
values and the caller rounds a result once, to bfloat16. In between every operation is one binary32 addition,
multiplication or comparison, rounded to nearest even, and their number per element is the pass table of
`tilewright.arch.pim.asic_passes`. Exponents are adjusted for free, and so are special cases selected.

Methods as in PIM-GPT (Wu, Wang, Lu, npj Unconventional Computing 2024): Taylor series for the exponential,
Newton-Raphson for the reciprocal, the fast inverse square root (Lomont, "Fast inverse square root", 2003).
"""

from collections.abc import Callable
from math import factorial, log, pi, sqrt

import numpy as np
from numpy.typing import NDArray

from tilewright.arch.pim import AsicSection

F32 = NDArray[np.float32]

_LOG2E = np.float32(1 / log(2))
_LN2 = np.float32(log(2))
_RECIPROCAL_SEED = np.uint32(0x7EF311C7)  # minus the bits of d: 1/d within 5.1 %
_RSQRT_SEED = np.uint32(0x5F3759DF)
_GELU_CUBIC = np.float32(0.044715)
_GELU_SCALE = np.float32(-2 * sqrt(2 / pi))


def reduce(x: F32, asic: AsicSection, join: Callable[[F32, F32], F32], start: float) -> F32:
    """`join` over the last axis [..., n], kept with length 1, in the order of the ASIC's adders.

    Element j goes to partial result j mod adders, in order of j; every partial begins with `start`. The
    partials, padded with `start` to a power of two, are then joined in adjacent pairs, level by level.
    """
    width = 1 << (asic.adders - 1).bit_length()
    partial = np.full_like(x, start, shape=(*x.shape[:-1], width))
    for j in range(0, x.shape[-1], asic.adders):
        row = x[..., j : j + asic.adders]
        partial[..., : row.shape[-1]] = join(partial[..., : row.shape[-1]], row)
    while partial.shape[-1] > 1:
        partial = join(partial[..., 0::2], partial[..., 1::2])
    return partial


def exp(x: F32, asic: AsicSection) -> F32:
    """e**x = 2**k p(r): k = x log2(e) to the nearest even integer, r = (x - k ln 2), p the Taylor polynomial.

    The product k ln 2 and the difference are rounded separately. p has `exp_terms` terms after the constant
    one, by Horner's rule from the highest: p = p r + 1/i!. The factor 2**k only adds to the exponent: above
    the range the result is infinity, below the smallest normal number +0. exp(-inf) = +0, exp(inf) = inf.
    """
    t = np.rint(x * _LOG2E)
    inside = np.abs(t) < 256
    k: F32 = np.where(inside, t, np.float32(0))
    r = x - k * _LN2
    p = np.full_like(x, 1 / factorial(asic.exp_terms))
    for i in reversed(range(asic.exp_terms)):
        p = p * r + np.float32(1 / factorial(i))
    exponent = k.astype(np.int32)
    small = np.frexp(p)[1] + exponent < -125
    scaled = np.where(small, np.float32(0), np.ldexp(p, exponent))
    outside = np.where(np.signbit(t), np.float32(0), np.float32(np.inf))
    return np.where(np.isnan(x), x, np.where(inside, scaled, outside))


def reciprocal(d: F32, asic: AsicSection) -> F32:
    """1/d for positive d: a seed from the bits of d, then r = r (2 - d r), `reciprocal_iterations` times.

    From 2**126 on the result is +0, as the seed leaves the normal range.
    """
    r = (_RECIPROCAL_SEED - d.view(np.uint32)).view(np.float32)
    for _ in range(asic.reciprocal_iterations):
        r = r * (2 - d * r)
    return np.where(np.isnan(d), d, np.where(d >= 2.0**126, np.float32(0), r))


def rsqrt(d: F32, asic: AsicSection) -> F32:
    """1/sqrt(d) for d >= 0: a seed from the bits of d, then y = y (1.5 - d/2 y y), `rsqrt_iterations` times.

    The products associate to the left; d/2 only lowers the exponent. For d = 0 the result is large and
    finite.
    """
    half = np.ldexp(d, -1)
    y = (_RSQRT_SEED - (d.view(np.uint32) >> np.uint32(1))).view(np.float32)
    for _ in range(asic.rsqrt_iterations):
        y = y * (np.float32(1.5) - half * y * y)
    return y


def softmax(x: F32, scale: np.float32, asic: AsicSection) -> F32:
    """exp(s - max s) * (1 / sum exp(s - max s)) with s = scale * x, over the last axis."""
    s = x * scale
    top = reduce(s, asic, np.maximum, -np.inf)
    e = exp(s - top, asic)
    return e * reciprocal(reduce(e, asic, np.add, 0), asic)


def layernorm(x: F32, gain: F32, bias: F32, eps: np.float32, asic: AsicSection) -> F32:
    """(x - mean) * rsqrt(variance + eps) * gain + bias, left to right, over the last axis.

    mean = sum x * (1/n) and variance = sum (x - mean)**2 * (1/n), with 1/n rounded to binary32 beforehand.
    """
    share = np.float32(1 / x.shape[-1])
    mean = reduce(x, asic, np.add, 0) * share
    centred = x - mean
    variance = reduce(centred * centred, asic, np.add, 0) * share
    # The vector is read again rather than kept: the second subtraction gives the same values.
    return (x - mean) * rsqrt(variance + eps, asic) * gain + bias


def rmsnorm(x: F32, gain: F32, eps: np.float32, asic: AsicSection) -> F32:
    """x * rsqrt(mean square + eps) * gain, left to right; the mean as in `layernorm`."""
    share = np.float32(1 / x.shape[-1])
    return x * rsqrt(reduce(x * x, asic, np.add, 0) * share + eps, asic) * gain


def gelu(x: F32, asic: AsicSection) -> F32:
    """x / (1 + exp(-2u)), which is GELU's tanh form x/2 (1 + tanh u), u = sqrt(2/pi) (x + 0.044715 x**3).

    The cubic term is ((x x) x) 0.044715; the sum is scaled by -2 sqrt(2/pi), rounded to binary32.
    """
    return x * reciprocal(1 + exp((x + x * x * x * _GELU_CUBIC) * _GELU_SCALE, asic), asic)


def silu(x: F32, asic: AsicSection) -> F32:
    """x * (1 / (1 + exp(-x)))."""
    return x * reciprocal(1 + exp(-x, asic), asic)


def relu(x: F32) -> F32:
    """The larger of x and +0; NaN stays."""
    return np.where(x == 0, np.float32(0), np.maximum(x, np.float32(0)))


def rope(x: F32, cosine: F32, sine: F32) -> F32:
    """Rotary embedding of [..., n], element i paired with element i + n/2; cosine and sine are [n/2].

    (a cos - b sin, b cos + a sin): two products and one sum for each element.
    """
    a, b = x[..., : x.shape[-1] // 2], x[..., x.shape[-1] // 2 :]
    return np.concatenate((a * cosine - b * sine, b * cosine + a * sine), axis=-1)
