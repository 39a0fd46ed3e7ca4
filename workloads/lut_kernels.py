"""What a table-lookup GEMM computes: LUT Tensor Core (Mo et al., ISCA 2025, arXiv 2408.06003), and the arrays
it is compared with.

M rows of activations a [M, Ktot] meet N rows of b-bit weight codes q [N, Ktot], b = 1..4, which stand for
s (q - z). K = 2..6 consecutive input channels form a group (element k of a group is index bit k; the last,
s = K-1, is its sign element), and the codes are read bit plane by bit plane. The type of the activations is
that of their array: int8, int16, float8_e4m3fn (OCP E4M3) or float16.

**What is rounded where.** Rounding is to nearest, ties to even; subnormals are kept, an overflow gives
infinity, a NaN in a result is the canonical quiet one. What is not in this table is exact.

| step                  | integer activations           | E4M3 and FP16 activations                         |
| --------------------- | ----------------------------- | ------------------------------------------------- |
| table entry           | exact                         | E4M3 becomes FP16 exactly; K-1 FP16 additions,    |
|                       |                               | elements in order, the sign element last:         |
|                       |                               | ((+-a0 +- a1) +- a2) - a3                         |
| sign, times 2**plane  | exact                         | exact in the accumulator's format, but for an     |
|                       |                               | overflow of FP16; a zero entry stays zero         |
| accumulate: groups    | int32, wraps                  | one addition in FP16 or FP32 for each group and   |
| outer, planes inner,  |                               | plane, accumulator on the left; for FP32 the      |
| LSB first             |                               | entry is widened first, exactly                   |
| int8 table: scale     | max abs of the block's entries as FP32, divided by 127 in FP32                    |
| int8 table: entry     | entry as FP32 divided by the scale in FP32, to the nearest integer, within +-127  |
| int8 table: sum       | int32, exact over the planes and groups of a block; then acc = acc + FP32(sum) *  |
|                       | scale in FP32: conversion, product and addition each rounded, blocks in order     |
| sum of activations    | exact                         | FP32, channels in order, from +0                  |
| epilogue              | FP32: out = out + s' * FP32(sum - z' * sum_a), quantisation groups in order, from +0: |
|                       | difference exact              | product z' * sum_a and difference each in FP32    |
|                       | then out * row scale, then out + bias, where given                                |

**Ragged Ktot.** The last group is filled up with activations +0 and codes 0. Its entries are the ones of the
shorter group: adding +-0 changes no number, only perhaps the sign of a zero. Whole groups of padding add
zeros, so a padded GEMM has the value of the GEMM without.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]
I32 = NDArray[np.int32]
F32 = NDArray[np.float32]

ACCUMULATORS: dict[str, np.dtype[Any]] = {
    "int32": np.dtype(np.int32),
    "fp16": np.dtype(np.float16),
    "fp32": np.dtype(np.float32),
}
_INTEGERS = (np.dtype(np.int8), np.dtype(np.int16))
_FLOATS = (np.dtype(ml_dtypes.float8_e4m3fn), np.dtype(np.float16))
_ENTRY_LIMIT = 127  # a symmetric int8: the negated entry is an entry


# ---- weights -----------------------------------------------------------------------------------------------


def reinterpret(q: Array, scale: Array, zero: Array, bits: int) -> tuple[NDArray[np.int8], Array, Array]:
    """(q', s', z') with s' (q' - z') = s (q - z): q' = 2q - (2**b - 1), s' = s/2, z' = 2z + 1 - 2**b (Eq 2).

    q' takes the odd numbers in +-(2**b - 1), so that every bit plane means +-1. Exact (s/2 but for a
    subnormal s). Raises ValueError for bits beyond 1..4 and codes that do not fit them.

    >>> reinterpret(np.array([0, 1]), np.float32(2), np.float32(0.5), 1)  # the paper's example: -1 and +1
    (array([-1,  1], dtype=int8), np.float32(1.0), np.float32(0.0))
    """
    codes = _checked_codes(q, bits).astype(np.int8)
    return 2 * codes - np.int8((1 << bits) - 1), scale / 2, 2 * zero + (1 - (1 << bits))


def bit_planes(q: Array, bits: int) -> NDArray[np.uint8]:
    """uint8 [bits, *q.shape] of zeros and ones, the least significant plane first."""
    codes = _checked_codes(q, bits)
    return np.stack([codes >> t & 1 for t in range(bits)]).astype(np.uint8)


@dataclass(frozen=True)
class CodedWeights:
    """Weights as the arrays read them: one K-bit word for each plane, output channel and group."""

    words: NDArray[np.uint8]
    """[bits, N, groups], planes LSB first; element k of the group is bit k."""
    group: int
    """K, input channels in a group."""
    channels: int
    """Ktot, input channels without the padding of the last group."""

    @property
    def bits(self) -> int:
        return self.words.shape[0]


def group_words(q: Array, bits: int, group: int = 4) -> CodedWeights:
    """The planes of q [N, Ktot] as they are: the words that a conventional table is read with.

    Raises ValueError for bits beyond 1..4, a group beyond 2..6 and codes that do not fit.
    """
    _check_group(group)
    planes = bit_planes(q, bits)
    grouped = _in_groups(planes, group)
    words = np.zeros(grouped.shape[:-1], np.uint8)
    for k in range(group):
        words |= grouped[..., k] << k
    return CodedWeights(words, group, planes.shape[-1])


def encode(q: Array, bits: int, group: int = 4) -> CodedWeights:
    """Weights for the symmetric table, coded offline: W'_s = W_s and W'_k = W_k ^ W_s (Eq 6).

    So the low K-1 bits of a word are the index and bit K-1 negates the entry. Raises as `group_words`.
    """
    plain = group_words(q, bits, group)
    return CodedWeights(_fold(plain.words, group), group, plain.channels)


def decode(weights: CodedWeights) -> NDArray[np.uint8]:
    """The codes q [N, Ktot] of `encode`."""
    words = _fold(weights.words, weights.group)  # the folding is its own inverse
    q = np.zeros((*words.shape[1:], weights.group), np.uint8)
    for t, plane in enumerate(words):
        for k in range(weights.group):
            q[..., k] |= (plane >> k & 1) << t
    return q.reshape(q.shape[0], -1)[:, : weights.channels]


def _fold(words: NDArray[np.uint8], group: int) -> NDArray[np.uint8]:
    """Complements the index bits of words whose sign bit is set."""
    return np.where(words >> (group - 1), words ^ np.uint8((1 << group - 1) - 1), words)


# ---- tables ------------------------------------------------------------------------------------------------


def symmetric_tables(a: Array, group: int = 4) -> Array:
    """T[i] = sum over k < s of (a_k if bit k of i else -a_k), minus a_s: [M, Ktot] -> [M, groups, 2**(K-1)].

    int32 or float16. The other half of all sign combinations is -T[~i] (Eq 4). An integer entry has the bits of
    the activations + ceil(log2 K) + 1: for int8 at K = 4 these are 11, as four times -128 gives +512. Raises ValueError for another type of a, or a group beyond 2..6.
    """
    elements = _operands(a, group)
    index = np.arange(1 << group - 1)
    with np.errstate(all="ignore"):
        total = _signed(elements[..., :1], index & 1)
        for k in range(1, group - 1):
            total = total + _signed(elements[..., k : k + 1], index >> k & 1)
        return _canonical(total - elements[..., -1:])


def conventional_tables(a: Array, group: int = 4) -> Array:
    """T[i] = sum of the a_k whose bit k of i is set: [M, Ktot] -> [M, groups, 2**K], no symmetry used.

    int32, or float16 with additions in the order of the elements, a missing one adding +0. Raises as
    `symmetric_tables`.
    """
    elements = _operands(a, group)
    index = np.arange(1 << group)
    nothing = elements.dtype.type(0)
    with np.errstate(all="ignore"):
        total = np.where(index & 1, elements[..., :1], nothing)
        for k in range(1, group):
            total = total + np.where(index >> k & 1, elements[..., k : k + 1], nothing)
        return _canonical(total)


def quantise_tables(tables: Array, block: int = 1) -> tuple[NDArray[np.int8], F32]:
    """Entries as int8 [M, groups, entries], and the scales [M, ceil(groups / block)] of `block` tables each.

    With block = 1 every table has its own scale (the paper, 3.1.3); a larger block is one int32 sum. A scale
    of 0 has entries 0, and so has one that is infinite or NaN: 0 times it makes the result NaN.
    """
    if block < 1:
        raise ValueError(f"block must be at least 1 group, not {block}")
    values = tables.astype(np.float32)
    m, groups, entries = values.shape
    blocks = -(-groups // block)
    size = np.zeros((m, blocks * block, entries), np.float32)
    size[:, :groups] = np.abs(values)
    with np.errstate(all="ignore"):
        scales = size.reshape(m, blocks, -1).max(axis=-1) / np.float32(_ENTRY_LIMIT)
        of_table = np.repeat(scales, block, axis=1)[:, :groups, None]
        ratio = np.where((of_table > 0) & np.isfinite(of_table), values / of_table, np.float32(0))
    return np.clip(np.rint(ratio), -_ENTRY_LIMIT, _ENTRY_LIMIT).astype(np.int8), _canonical(scales)


# ---- GEMMs -------------------------------------------------------------------------------------------------


def lut_gemm(
    a: Array,
    weights: CodedWeights,
    psum: Array | None = None,
    *,
    accumulator: str = "int32",
    table: str = "exact",
    block: int = 1,
) -> Array:
    """psum + a . q' through symmetric tables: a [M, Ktot], weights by `encode`, psum [M, N] (or zeros).

    accumulator: "int32" for integer activations, "fp16" or "fp32" for E4M3 and FP16, and "fp32" with
    table="int8", whose scales serve `block` tables each. The result has the accumulator's type.

    Raises ValueError for shapes that do not fit, or an accumulator that the table does not have.
    """
    _check_channels(a, weights)
    tables = symmetric_tables(a, weights.group)
    if table == "exact":
        return lookup(tables, weights, psum, accumulator)
    if table != "int8":
        raise ValueError(f"table must be 'exact' or 'int8', not {table!r}")
    if accumulator != "fp32":
        raise ValueError(f"accumulator of an int8 table must be 'fp32', not {accumulator!r}")
    return lookup_quantised(*quantise_tables(tables, block), weights, psum, block)


def lookup(tables: Array, weights: CodedWeights, psum: Array | None, accumulator: str) -> Array:
    """The second half of `lut_gemm`: exact tables [M, groups, 2**(K-1)] are read and accumulated."""
    return _accumulate(_both_halves(tables), weights, psum, _accumulator(accumulator, tables.dtype))


def lookup_quantised(
    entries: NDArray[np.int8], scales: F32, weights: CodedWeights, psum: Array | None, block: int
) -> F32:
    """The second half of `lut_gemm` for int8 entries and the scales of `quantise_tables`."""
    both = _both_halves(entries)
    shape = entries.shape[0], weights.words.shape[1]
    total = _start(psum, shape, np.dtype(np.float32))
    with np.errstate(all="ignore"):
        for i in range(scales.shape[1]):
            part = slice(i * block, (i + 1) * block)
            few = CodedWeights(weights.words[..., part], weights.group, 0)
            whole = _accumulate(both[:, part], few, None, np.dtype(np.int32))
            total = total + whole.astype(np.float32) * scales[:, i : i + 1]
    return _canonical(total)


def conventional_gemm(
    a: Array, weights: CodedWeights, psum: Array | None = None, *, accumulator: str = "int32"
) -> Array:
    """psum + a . q through tables of 2**K entries: weights by `group_words`, unsigned codes.

    `symmetric_sum` turns an integer result without psum into a . q'. Raises as `lut_gemm`.
    """
    _check_channels(a, weights)
    tables = conventional_tables(a, weights.group)
    return _accumulate(tables, weights, psum, _accumulator(accumulator, tables.dtype))


def add_gemm(
    a: Array, weights: CodedWeights, psum: Array | None = None, *, accumulator: str = "int32"
) -> Array:
    """psum + a . q, bit-serially and without a table: weights by `group_words`, unsigned codes.

    In each group and plane the bits select which activations are added, in order; an FP16 sum is the one
    that `conventional_tables` holds, and it is scaled and accumulated as an entry is. Raises as `lut_gemm`.
    """
    _check_channels(a, weights)
    elements = _operands(a, weights.group)
    dtype = _accumulator(accumulator, elements.dtype)
    total = _start(psum, (elements.shape[0], weights.words.shape[1]), dtype)
    nothing = elements.dtype.type(0)
    with np.errstate(all="ignore"):
        for g in range(elements.shape[1]):
            for t, words in enumerate(weights.words[:, :, g]):
                part = np.where(words & 1, elements[:, g, :1], nothing)
                for k in range(1, weights.group):
                    part = part + np.where(words >> k & 1, elements[:, g, k : k + 1], nothing)
                total = total + part.astype(dtype) * dtype.type(1 << t)
    return _canonical(total)


def mac_gemm(
    a: Array, w: Array, psum: Array | None = None, *, accumulator: str = "int32", lanes: int = 4
) -> Array:
    """psum + a . w on multipliers: a [M, Ktot] and w [N, Ktot], both integer or both E4M3 or FP16.

    A dot-product unit of `lanes` (a power of two) takes that many channels at a time. int32 wraps. In floats
    the products are rounded to the accumulator's format (FP32: exact), summed as a balanced tree of adjacent
    pairs (p0 + p1) + (p2 + p3), +0 where Ktot is ragged, and added to the accumulator.

    Raises ValueError for shapes that do not fit, lanes or an accumulator that is not allowed.
    """
    if lanes < 1 or lanes & lanes - 1:
        raise ValueError(f"lanes must be a power of two, not {lanes}")
    if a.shape[1:] != w.shape[1:]:
        raise ValueError(f"activations have {a.shape[1]} channels, weights {w.shape[1]}")
    left, right = _operands(a, lanes), _operands(w, lanes)
    if left.dtype != right.dtype:
        raise ValueError(f"activations {a.dtype} and weights {w.dtype} must both be integer or both float")
    dtype = _accumulator(accumulator, left.dtype)
    left, right = left.astype(dtype), right.astype(dtype)
    total = _start(psum, (a.shape[0], w.shape[0]), dtype)
    with np.errstate(all="ignore"):
        for g in range(left.shape[1]):
            part = left[:, None, g] * right[None, :, g]
            while part.shape[-1] > 1:
                part = part[..., 0::2] + part[..., 1::2]
            total = total + part[..., 0]
    return _canonical(total)


# ---- epilogue ----------------------------------------------------------------------------------------------


def symmetric_sum(unsigned_sum: I32, channel_sum: I32, bits: int) -> I32:
    """a . q' from a . q [M, N] and sum(a) [M]: 2 a.q - (2**b - 1) sum(a), in int32, which wraps."""
    return 2 * unsigned_sum - ((1 << bits) - 1) * channel_sum[:, None]


def channel_sums(a: Array, spans: Sequence[int] | None = None) -> Array:
    """Sums of a [M, Ktot] over successive spans of channels (all of them): [M, len(spans)], int32 or FP32.

    FP32 adds the channels in order, starting from +0.
    """
    values = _operands(a, 1)[..., 0]
    values = values.astype(np.int32 if a.dtype in _INTEGERS else np.float32)
    spans = [a.shape[1]] if spans is None else spans
    sums = np.zeros((a.shape[0], len(spans)), values.dtype)
    first = 0
    with np.errstate(all="ignore"):
        for i, span in enumerate(spans):
            for k in range(first, first + span):
                sums[:, i] += values[:, k]
            first += span
    return _canonical(sums)


def epilogue(
    sums: Sequence[Array],
    activation_sums: Array,
    scale: F32,
    zero: F32,
    row_scale: F32 | None = None,
    bias: F32 | None = None,
) -> F32:
    """The outputs, FP32 [M, N]: sum over quantisation groups of s' (sum - z' sum_a), times row_scale, plus bias.

    `sums` holds a . q' [M, N] for each of Q groups of input channels, `activation_sums` is [M, Q]; `scale` and
    `zero` [N, Q] are s' and z' of `reinterpret`; row_scale [M] is the activations' own, bias is [N].
    Raises ValueError for integer sums with a z' that is no integer: then z is no multiple of 1/2.
    """
    total = np.zeros_like(sums[0], np.float32)
    with np.errstate(all="ignore"):
        for i, part in enumerate(sums):
            offset: Array = zero[:, i]
            of_rows: Array = activation_sums[:, i : i + 1]
            if part.dtype.kind == "i":
                if not np.array_equal(offset, np.rint(offset)):
                    raise ValueError("zero points must be multiples of 1/2")
                offset, of_rows = offset.astype(np.int64), of_rows.astype(np.int64)
                part = part.astype(np.int64)
            else:
                part = part.astype(np.float32)
            total = total + scale[:, i] * (part - offset * of_rows).astype(np.float32)
        if row_scale is not None:
            total = total * row_scale[:, None]
        if bias is not None:
            total = total + bias
    return _canonical(total)


def lut_linear(
    a: Array,
    weights: Sequence[CodedWeights],
    scale: F32,
    zero: F32,
    *,
    accumulator: str = "int32",
    table: str = "exact",
    block: int = 1,
    row_scale: F32 | None = None,
    bias: F32 | None = None,
) -> F32:
    """A whole linear layer, FP32 [M, N]: one `lut_gemm` for each quantisation group of channels, then `epilogue`.

    `weights` are the groups' codes (`encode` of each span of channels), scale and zero [N, Q] those of the
    codes, not reinterpreted. An accumulator starts from zero in every quantisation group.
    """
    spans = [w.channels for w in weights]
    if sum(spans) != a.shape[1]:
        raise ValueError(f"activations have {a.shape[1]} channels, weights {sum(spans)}")
    starts = [sum(spans[:i]) for i in range(len(spans))]
    sums = [
        lut_gemm(a[:, first : first + w.channels], w, accumulator=accumulator, table=table, block=block)
        for first, w in zip(starts, weights, strict=True)
    ]
    _, half, centred = reinterpret(np.zeros(1, np.uint8), scale, zero, weights[0].bits)
    return epilogue(sums, channel_sums(a, spans), half, centred, row_scale, bias)


# ---- shared ------------------------------------------------------------------------------------------------


def _accumulate(tables: Array, weights: CodedWeights, psum: Array | None, dtype: np.dtype[Any]) -> Array:
    """tables [M, groups, 2**K], indexed with the whole words: the order of the module's table."""
    n = weights.words.shape[1]
    # Transposed, so that one index fetches a whole row of M entries.
    total = _start(psum, (tables.shape[0], n), dtype).T.copy()
    by_group = tables.transpose(1, 2, 0).astype(dtype)
    with np.errstate(all="ignore"):
        for g in range(by_group.shape[0]):
            for t, words in enumerate(weights.words[:, :, g]):
                total += (by_group[g] * dtype.type(1 << t))[words]
    return _canonical(np.ascontiguousarray(total.T))


def _both_halves(tables: Array) -> Array:
    """Appends the negated entries, so that the sign bit of a word is its highest index bit."""
    return np.concatenate((tables, -tables), axis=-1)


def _start(psum: Array | None, shape: tuple[int, int], dtype: np.dtype[Any]) -> Array:
    if psum is None:
        return np.zeros(shape, dtype)
    if psum.shape != shape or psum.dtype != dtype:
        raise ValueError(f"psum must be {dtype} of shape {shape}, not {psum.dtype} of {psum.shape}")
    return psum


def _signed(x: Array, positive: Array) -> Array:
    return np.where(positive, x, -x)


def _canonical(x: Array) -> Array:
    if x.dtype.kind != "f":
        return x
    return np.where(np.isnan(x), x.dtype.type(np.nan), x)


def _operands(a: Array, group: int) -> Array:
    """[M, Ktot] in the table's type, int32 or float16, as [M, groups, group] with zeros at the end."""
    if a.dtype not in _INTEGERS + _FLOATS:
        allowed = ", ".join(str(t) for t in _INTEGERS + _FLOATS)
        raise ValueError(f"activations must be {allowed}, not {a.dtype}")
    return _in_groups(a.astype(np.int32 if a.dtype in _INTEGERS else np.float16), group)


def _in_groups(x: Array, group: int) -> Array:
    """The last axis as [groups, group], zeros at the end."""
    groups = -(-x.shape[-1] // group)
    out = np.zeros((*x.shape[:-1], groups * group), x.dtype)
    out[..., : x.shape[-1]] = x
    return out.reshape(*x.shape[:-1], groups, group)


def _accumulator(name: str, table: np.dtype[Any]) -> np.dtype[Any]:
    allowed = ("int32",) if table.kind == "i" else ("fp16", "fp32")
    if name not in allowed:
        raise ValueError(f"accumulator of {table} operands must be {' or '.join(allowed)}, not {name!r}")
    return ACCUMULATORS[name]


def _check_group(group: int) -> None:
    if not 2 <= group <= 6:
        raise ValueError(f"group must be in 2..6, not {group}")


def _check_channels(a: Array, weights: CodedWeights) -> None:
    if a.ndim != 2 or a.shape[1] != weights.channels:
        raise ValueError(f"activations must be [M, {weights.channels}], not {list(a.shape)}")


def _checked_codes(q: Array, bits: int) -> NDArray[np.uint8]:
    if not 1 <= bits <= 4:
        raise ValueError(f"bits must be in 1..4, not {bits}")
    if q.size and not 0 <= int(q.min()) <= int(q.max()) < 1 << bits:
        raise ValueError(f"codes of {bits} bits must be in 0..{(1 << bits) - 1}, not {q.min()}..{q.max()}")
    return q.astype(np.uint8)
