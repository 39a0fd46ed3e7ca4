"""Convolution by Monarch-decomposed Fourier transforms: small matrix products with twiddle factors between them.

Fu et al., FlashFFTConv (arXiv 2311.05908); the decomposition is Cooley and Tukey's. A signal of radix ** order points
is an array of `order` axes of `radix` each, the most significant digit of time first. Stage s transforms axis s and
multiplies by exp(-2 pi i k_s (i_s+1 .. i_order) / radix ** (order - s + 1)); the last one multiplies by the spectrum of
the convolution kernel instead. The inverse stages undo that, last axis first.

Numbers, in this order: a complex number is a pair; signals and matrices are bfloat16; a matrix product sums the
products with the real parts, then those with the imaginary parts, each by ascending digit, in float32, first product
as it is; twiddles and spectrum are float32; re * w_re - im * w_im, and re * w_im + im * w_re, each product and the
sum rounded to float32, are rounded to bfloat16 once.
"""

from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewright.workloads.rdu_kernels import round_bf16

F32 = NDArray[np.float32]


class Pair(NamedTuple):
    """Complex numbers as two float32 arrays of one shape."""

    re: F32
    im: F32

    @classmethod
    def of(cls, values: ArrayLike) -> "Pair":
        """Complex values, each part rounded to float32."""
        z = np.asarray(values, np.complex128)
        return cls(z.real.astype(np.float32), z.imag.astype(np.float32))

    def complex(self) -> NDArray[np.complex128]:
        """The values."""
        return self.re.astype(np.complex128) + 1j * self.im.astype(np.complex128)


def bf16(values: F32) -> F32:
    """float32 values rounded to bfloat16."""
    return round_bf16(np.ascontiguousarray(values).view(np.uint32)).view(np.float32)


def order_of(points: int, radix: int) -> int:
    """The number of stages of a transform. Raises ValueError unless `points` is a power of `radix`, from 2 on.

    >>> order_of(1 << 20, 16)
    5
    """
    order, rest = 0, points
    while radix > 1 and rest > 1 and rest % radix == 0:
        order, rest = order + 1, rest // radix
    if rest != 1 or order < 1:
        raise ValueError(f"points must be a power of radix {radix}, not {points}")
    return order


def matrix(radix: int, inverse: bool = False) -> Pair:
    """The transform of one axis in bfloat16, [digit in, digit out]; the inverse has 1 / radix in it."""
    turns = np.outer(np.arange(radix), np.arange(radix)) / radix
    values = np.exp((2j if inverse else -2j) * np.pi * turns) / (radix if inverse else 1)
    return Pair(*(bf16(part) for part in Pair.of(values)))


def twiddles(radix: int, order: int, stage: int, inverse: bool = False) -> Pair:
    """Factors behind forward stage `stage` (from 1), or, conjugate, before its inverse; one for each point."""
    if not 1 <= stage < order:
        raise ValueError(f"stage must be in 1..{order - 1}, not {stage}")
    rest = order - stage
    later = np.arange(radix**rest)
    turns = np.outer(np.arange(radix), later) / radix ** (rest + 1)
    values = np.exp((2j if inverse else -2j) * np.pi * turns).reshape((radix,) * (rest + 1))
    return Pair(*(np.broadcast_to(part, (radix,) * order) for part in Pair.of(values)))


def spectrum(kernel: ArrayLike, radix: int) -> Pair:
    """The transform of a convolution kernel, in float32, digit of frequency by digit: axis s is k_s."""
    h = np.asarray(kernel)
    order = order_of(len(h), radix)
    return Pair.of(np.fft.fft(h).reshape((radix,) * order).transpose())


def transform(z: Pair, axis: int, f: Pair) -> Pair:
    """The matrix products of one axis, unrounded."""
    re, im = (np.moveaxis(part, axis, -1) for part in z)

    def sums(first: F32, second: F32) -> F32:
        total: F32 | None = None
        for x, weights in ((re, first), (im, second)):
            for i in range(x.shape[-1]):
                product = x[..., i, None] * weights[i]
                total = product if total is None else total + product
        assert total is not None
        return np.moveaxis(total, -1, axis)

    return Pair(sums(f.re, -f.im), sums(f.im, f.re))


def multiply(z: Pair, w: Pair) -> Pair:
    """The complex products, rounded to bfloat16."""
    return Pair(bf16(z.re * w.re - z.im * w.im), bf16(z.re * w.im + z.im * w.re))


def convolve(signal: ArrayLike, kernel_spectrum: Pair) -> Pair:
    """The circular convolution of a complex signal with the kernel of that spectrum."""
    radix, order = kernel_spectrum.re.shape[0], kernel_spectrum.re.ndim
    x = np.asarray(signal, np.complex128).reshape((radix,) * order)
    z = Pair(*(bf16(part) for part in Pair.of(x)))
    forward, back = matrix(radix), matrix(radix, inverse=True)
    for stage in range(1, order + 1):
        factors = twiddles(radix, order, stage) if stage < order else kernel_spectrum
        z = multiply(transform(z, stage - 1, forward), factors)
    for stage in range(order, 0, -1):
        z = transform(z, stage - 1, back)
        if stage > 1:
            z = multiply(z, twiddles(radix, order, stage - 1, inverse=True))
    return Pair(bf16(z.re).reshape(-1), bf16(z.im).reshape(-1))
