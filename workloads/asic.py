"""What the companion ASIC of a PIM-GPT system computes: additions and multiplications in a written order.

The functions take and give float32 arrays, the last axis being the vector; operands arrive as exact bfloat16
values and the caller rounds a result once, to bfloat16. In between every operation is one binary32 addition,
multiplication or comparison, rounded to nearest even. Exponents are adjusted for free, and so are special
cases selected. `lanes` is the width of the vector unit, `arch.pim_asic.vector_lanes`.

Methods as in PIM-GPT (Wu, Wang, Lu, npj Unconventional Computing 2024): Taylor series for the exponential,
Newton-Raphson for the reciprocal, the fast inverse square root (Lomont, "Fast inverse square root", 2003).
"""

from collections.abc import Callable
from math import factorial
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from tilewright.arch import pim_asic as arch
from tilewright.arch.formats import BF16
from tilewright.workloads.formats import from_bits, to_bits

F32 = NDArray[np.float32]


class Counts(Protocol):
    """How far series and iterations go: an AsicSection, or another machine's."""

    @property
    def exp_terms(self) -> int: ...

    @property
    def reciprocal_iterations(self) -> int: ...

    @property
    def rsqrt_iterations(self) -> int: ...


_LOG2E = np.float32(arch.LOG2E)
_LN2 = np.float32(arch.LN2)
_ROUND = np.float32(arch.ROUND)
_RECIPROCAL_SEED = np.uint32(arch.RECIPROCAL_SEED)
_RSQRT_SEED = np.uint32(arch.RSQRT_SEED)
_GELU_CUBIC = np.float32(arch.GELU_CUBIC)
_GELU_SCALE = np.float32(arch.GELU_SCALE)


def reduce(x: F32, lanes: int, join: Callable[[F32, F32], F32], start: float) -> F32:
    """`join` over the last axis [..., n], kept with length 1, in the order of the vector unit.

    The vector, padded with `start`, is cut into groups of `lanes` elements. Each group, padded with `start` to
    a power of two, is joined in adjacent pairs, level by level; its result is joined to the total, which
    begins with `start`, group after group.
    """
    *outer, n = x.shape
    groups = -(-n // lanes)
    tree = np.full_like(x, start, shape=(*outer, groups, 1 << (lanes - 1).bit_length()))
    padded = np.full_like(x, start, shape=(*outer, groups * lanes))
    padded[..., :n] = x
    tree[..., :lanes] = padded.reshape(*outer, groups, lanes)
    while tree.shape[-1] > 1:
        tree = join(tree[..., 0::2], tree[..., 1::2])
    total = np.full_like(x, start, shape=(*outer, 1))
    for g in range(groups):
        total = join(total, tree[..., g, :])
    return total


def exp(x: F32, asic: Counts) -> F32:
    """e**x = 2**k p(r): k = x log2(e) to the nearest even integer, r = (x - k ln 2), p the Taylor polynomial.

    k is found by adding 1.5 * 2**23 to the rounded product and subtracting it again. The product k ln 2 and the
    difference are rounded separately. p has `exp_terms` terms after the constant one, by Horner's rule from the
    highest: p = p r + 1/i!. The factor 2**k only adds to the exponent: above the range the result is infinity,
    below the smallest normal number +0. exp(-inf) = +0, exp(inf) = inf.
    """
    k = x * _LOG2E + _ROUND - _ROUND
    r = x - k * _LN2
    p = np.full_like(x, 1 / factorial(asic.exp_terms))
    for i in reversed(range(asic.exp_terms)):
        p = p * r + np.float32(1 / factorial(i))
    inside = np.abs(k) < arch.SCALE_LIMIT
    exponent = np.where(inside, k, np.float32(0)).astype(np.int32)
    p = np.where(inside, p, np.float32(1))
    small = np.frexp(p)[1] + exponent < -125
    scaled = np.where(small, np.float32(0), np.ldexp(p, exponent))
    outside = np.where(np.signbit(k), np.float32(0), np.float32(np.inf))
    return np.where(np.isnan(x), x, np.where(inside, scaled, outside))


def reciprocal(d: F32, asic: Counts) -> F32:
    """1/d for positive d: a seed from the bits of d, then r = r (2 - d r), `reciprocal_iterations` times.

    From 2**126 on the result is +0, as the seed leaves the normal range.
    """
    r = (_RECIPROCAL_SEED - d.view(np.uint32)).view(np.float32)
    for _ in range(asic.reciprocal_iterations):
        r = r * (2 - d * r)
    return np.where(np.isnan(d), d, np.where(d >= 2.0**126, np.float32(0), r))


def rsqrt(d: F32, asic: Counts) -> F32:
    """1/sqrt(d) for d >= 0: a seed from the bits of d, then y = y (1.5 - d/2 y y), `rsqrt_iterations` times.

    The products associate to the left. For d = 0 the result is large and
    finite.
    """
    half = d * np.float32(0.5)
    y = (_RSQRT_SEED - (d.view(np.uint32) >> np.uint32(1))).view(np.float32)
    for _ in range(asic.rsqrt_iterations):
        y = y * (np.float32(1.5) - half * y * y)
    return np.where(np.isnan(d), d, y)


def softmax(x: F32, scale: np.float32, asic: Counts, lanes: int) -> F32:
    """exp(s - max s) * (1 / sum exp(s - max s)) with s = scale * x, over the last axis.

    The exponentials are summed as they are, and rounded to bfloat16 before they are divided: between the two
    they lie in the SRAM.
    """
    s = x * scale
    top = reduce(s, lanes, np.maximum, -np.inf)
    e = exp(s - top, asic)
    stored = from_bits(to_bits(e, BF16), BF16)
    return stored * reciprocal(reduce(e, lanes, np.add, 0), asic)


def layernorm(
    x: F32, gain: F32, bias: F32, eps: np.float32, share: np.float32, asic: Counts, lanes: int
) -> F32:
    """(x - mean) * rsqrt(variance + eps) * gain + bias, left to right, over the last axis.

    mean = sum x * share and variance = sum (x - mean)**2 * share; share is 1/n.
    """
    mean = reduce(x, lanes, np.add, 0) * share
    centred = x - mean
    variance = reduce(centred * centred, lanes, np.add, 0) * share
    # The vector is read again rather than kept: the second subtraction gives the same values.
    return (x - mean) * rsqrt(variance + eps, asic) * gain + bias


def rmsnorm(x: F32, gain: F32, eps: np.float32, share: np.float32, asic: Counts, lanes: int) -> F32:
    """x * rsqrt(mean square + eps) * gain, left to right; the mean as in `layernorm`."""
    return x * rsqrt(reduce(x * x, lanes, np.add, 0) * share + eps, asic) * gain


def gelu(x: F32, asic: Counts) -> F32:
    """x / (1 + exp(-2u)), which is GELU's tanh form x/2 (1 + tanh u), u = sqrt(2/pi) (x + 0.044715 x**3).

    The cubic term is ((x x) x) 0.044715; the sum is scaled by -2 sqrt(2/pi), rounded to binary32.
    """
    return x * reciprocal(1 + exp((x + x * x * x * _GELU_CUBIC) * _GELU_SCALE, asic), asic)


def silu(x: F32, asic: Counts) -> F32:
    """x * (1 / (1 + exp(-x)))."""
    return x * reciprocal(1 + exp(-x, asic), asic)


def relu(x: F32) -> F32:
    """The larger of x and +0; NaN stays."""
    return np.where(x == 0, np.float32(0), np.maximum(x, np.float32(0)))


def rope(x: F32, cosine: F32, sine: F32) -> F32:
    """Rotary embedding of [..., n], element 2i paired with 2i + 1: x * cosine + (pairs swapped) * sine.

    cosine and sine are [n]: both elements of a pair have its cosine, the first has minus its sine.
    """
    swapped = x.reshape(*x.shape[:-1], -1, 2)[..., ::-1].reshape(x.shape)
    return swapped * sine + x * cosine
