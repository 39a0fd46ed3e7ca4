"""Attention inside a computational storage drive: what it computes, rounding by rounding, and what it reads.

`dense` and `sparf` compute one decode step for all heads of a sequence; `reads` derives from their selections
which flash pages the step needs and what the filters forward. Nothing here knows time or addresses.

SparF is Algorithm 1 of Pan et al., "InstAttention: In-storage attention offloading for cost-effective
long-context LLM inference", HPCA 2025, which places SparQ attention (Ribar et al., "SparQ attention:
bandwidth-efficient LLM inference", ICML 2024) on flash pages. H is the number of K and V heads, g that of
query heads for each (1 unless queries are grouped), d channels, S tokens:

| array        | dtype, shape       | holds                                                     |
| ------------ | ------------------ | --------------------------------------------------------- |
| q            | uint16 [H, g, d]   | FP16 bits                                                 |
| keys         | uint16 [H, S, d]   | FP16 bits; so are values [H, S, dv], with dv = d as a rule |
| value_sum    | uint32 [H, dv]     | FP32 bits of the sum of the values so far                 |
| scale        | float32            | 1/sqrt(d), rounded beforehand; so is 1/S                  |

Every operation rounds once, to nearest even, subnormals kept. Products of FP16 operands are exact in FP32.

| step | result      | definition, in this order                                 | kept as       |
| ---- | ----------- | --------------------------------------------------------- | ------------- |
| 1    | channels    | top r of sum over the group of abs(q)                     | mask          |
|      |             | sum in FP32 from the first head on, rounded to FP16       |               |
| 2    | 1/tau       | scale * rsqrt(L * reciprocal(M))                          | FP32          |
|      |             | L, M: `reduce` of abs(q), L with 0 for other channels     |               |
| 3    | score       | `dot` of q and key over the channels, in ascending order  | FP32          |
| 4    | weight      | exp((score - largest score) * 1/tau)                      | FP16          |
| 5    | total       | `reduce` of the weights; 1/total = reciprocal(total)      | FP32          |
| 6    | tokens      | top k of the weights, the last `local` tokens before all  | mask          |
| 7    | alpha       | `reduce` of the weights, 0 for other tokens, * 1/total    | FP32, at most 1 |
| 8    | score       | `dot` of q and key over all channels, for these tokens    | FP32          |
| 9    | weight      | exp((score - largest score) * scale); total as in step 5  | FP16, FP32    |
| 10   | mix         | `dot` of weight and value over these tokens, ascending    | FP32          |
| 11   | out         | mix * (alpha * 1/total) + value_sum * ((1 - alpha) * 1/S) | FP16        |

Dense attention is steps 8 to 11 over all tokens, with out = mix * 1/total. Heads of a group share channels
and tokens, for which step 6 sums their probabilities: see `select_tokens`.

`dot` takes groups of `lanes` products; a group, the last one filled up with +0, is summed as a tree of
neighbouring pairs, (p0 + p1) + (p2 + p3), and added to a running total that begins with +0. `reduce` is the same
without products; it, `exp`, `reciprocal` and `rsqrt` are those of `tilewright.workloads.asic`.

Weights are relative to the largest, so that a long context does not push them below FP16's normal range.
Sums over a selection run over all positions, with zeros: alpha never falls as k rises. What needs no estimate
makes none: with k >= S, out is dense and alpha 1; with r >= d, or q zero, 1/tau is scale. The value sum
rather than the mean is kept, since it grows by one addition a token, and in FP32, since an FP16 mean stops
moving.
"""

from typing import NamedTuple, cast

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewright.arch.formats import FP16, FP32
from tilewright.workloads import asic
from tilewright.workloads.formats import add, from_bits, to_bits

F32 = NDArray[np.float32]
Bits16 = NDArray[np.uint16]
Bits32 = NDArray[np.uint32]
Mask = NDArray[np.bool_]
Counts = NDArray[np.int64]

_MAGNITUDE = np.uint16(FP16.sign - 1)
_ZERO, _ONE = np.float32(0), np.float32(1)


class Engine(NamedTuple):
    """What of the attention engine shows in its results."""

    lanes: int  # multipliers of a GeMV unit, a power of two
    exp_terms: int  # of the Taylor series, after the constant one
    reciprocal_iterations: int
    rsqrt_iterations: int


class Layout(NamedTuple):
    """How keys and values lie in pages. With 4 KB pages, 128 channels: 16 tokens; 2 to 8 channels of
    2048 / channels tokens."""

    tokens: int  # of a token-indexed page, with all channels
    channels: int  # of a channel-indexed page
    span: int  # tokens of a channel-indexed page


class Weights(NamedTuple):
    """A softmax before normalisation: [H, g, S] FP16 bits, 1.0 for the largest score; [H, g] the rest."""

    bits: Bits16
    total: F32
    inverse: F32  # 1/total


class Attention(NamedTuple):
    """A result and the selections behind it."""

    out: Bits16  # [H, g, dv] FP16
    alpha: F32  # [H, g]: share of the softmax that the selected tokens hold by the estimate; 1 if dense
    channels: Mask  # [H, d]: of channel-indexed keys that were needed; none if there was no estimate
    tokens: Mask  # [H, S]: of which keys and values were needed


class Reads(NamedTuple):
    """Flash pages of one step, per head. A page is read (1) or skipped (0); rows are what its filter
    forwards: channels of a channel-indexed page, tokens of a token-indexed one."""

    channel_pages: Counts  # [H, channel groups, spans], of the keys
    channel_rows: Counts
    token_pages: Counts  # [H, groups]; values are read like keys
    token_rows: Counts


# ---- attention ----------------------------------------------------------------------------------------


@np.errstate(all="ignore")
def dense(q: Bits16, keys: Bits16, values: Bits16, scale: np.float32, engine: Engine) -> Attention:
    """Attention over all tokens. Raises ValueError for shapes or lanes other than in the tables above."""
    heads, group, d, n = _shapes(q, keys, values, engine)
    w = weigh(scores(q, keys, engine.lanes), scale, engine)
    out = _mix(w.bits, values, engine.lanes) * w.inverse[..., None]
    alpha = np.ones((heads, group), np.float32)
    return Attention(_fp16(out), alpha, np.zeros((heads, d), np.bool_), np.ones((heads, n), np.bool_))


@np.errstate(all="ignore")
def sparf(
    q: Bits16,
    keys: Bits16,
    values: Bits16,
    scale: np.float32,
    engine: Engine,
    *,
    r: int,
    k: int,
    local: int = 0,
    value_sum: Bits32 | None = None,
    share: np.float32 | None = None,
    estimate_keys: Bits16 | None = None,
) -> Attention:
    """Attention over k tokens, found by an estimate from r channels; the last `local` ones come first.

    `estimate_keys` is what the estimate reads where keys are stored a second time, `share` what it is told as 1/S.

    Without `value_sum` the tokens left out count for nothing (alpha = 1 in step 11), as SparQ has it for
    grouped queries; the alpha returned is that of step 7. Raises ValueError as `dense` does, and for r or k
    below 1 or a negative `local`.
    """
    heads, _, _, n = _shapes(q, keys, values, engine)
    for name, value, low in (("r", r, 1), ("k", k, 1), ("local", local, 0)):
        if value < low:
            raise ValueError(f"{name} must be at least {low}, not {value}")
    want = (heads, values.shape[-1])
    if value_sum is not None and (value_sum.dtype, value_sum.shape) != (np.uint32, want):
        raise ValueError(f"value_sum must be uint32 {want}, not {value_sum.dtype} {value_sum.shape}")
    twice = keys if estimate_keys is None else estimate_keys
    if (twice.dtype, twice.shape) != (np.uint16, keys.shape):
        raise ValueError(f"estimate_keys must be uint16 {keys.shape}, not {twice.dtype} {twice.shape}")
    if k >= n:
        return dense(q, keys, values, scale, engine)
    channels = select_channels(q, r)
    c = positions(channels)
    estimate = weigh(
        scores(_take(q, c, -1), _take(twice, c, -1), engine.lanes),
        temperature(q, channels, scale, engine)[..., None],
        engine,
    )
    tokens = select_tokens(estimate, k, local)
    alpha = coverage(estimate, tokens, engine)
    t = positions(tokens)
    w = weigh(scores(q, _take(keys, t, -2), engine.lanes), scale, engine)
    out = _mix(w.bits, _take(values, t, -2), engine.lanes)
    if value_sum is None:
        out = out * w.inverse[..., None]
    else:
        rest = (_ONE - alpha) * np.float32(1 / n if share is None else share)
        out = out * (alpha * w.inverse)[..., None] + value_sum.view(np.float32)[:, None] * rest[..., None]
    return Attention(_fp16(out), alpha, channels, tokens)


def add_values(value_sum: Bits32, values: Bits16) -> Bits32:
    """The value sum after the tokens of `values` [H, tokens, dv], one addition each, in order of tokens."""
    for t in range(values.shape[1]):
        value_sum = add(value_sum, from_bits(values[:, t], FP16).view(np.uint32), FP32)
    return value_sum


# ---- the steps ----------------------------------------------------------------------------------------


def argtopk(keys: ArrayLike, n: int) -> Mask:
    """The n largest of unsigned keys [..., length] as a mask; all of them if there are no more than n.

    Of equal keys the lowest positions are taken. FP16 magnitudes order like their encodings, so that these
    serve as keys; a NaN is above infinity.

    >>> argtopk([3, 9, 3, 3], 2).tolist()
    [True, True, False, False]
    """
    descending = -np.asarray(keys).astype(np.int64)
    mask = np.zeros(descending.shape, np.bool_)
    np.put_along_axis(mask, np.argsort(descending, axis=-1, kind="stable")[..., :n], True, axis=-1)
    return mask


def positions(mask: Mask) -> Counts:
    """Where a mask [H, length] is set, ascending: [H, n], with the same n >= 1 in every row.

    >>> positions(np.array([[False, True, True], [True, False, True]])).tolist()
    [[1, 2], [0, 2]]
    """
    return np.nonzero(mask)[-1].reshape(len(mask), -1)


def select_channels(q: Bits16, r: int) -> Mask:
    """Step 1: [H, d]."""
    if q.shape[1] == 1:
        return argtopk(q[:, 0] & _MAGNITUDE, r)
    magnitude = from_bits(q & _MAGNITUDE, FP16)
    joint = magnitude[:, 0]
    for h in range(1, q.shape[1]):
        joint = joint + magnitude[:, h]
    return argtopk(_fp16(joint), r)


@np.errstate(all="ignore")
def temperature(q: Bits16, channels: Mask, scale: np.float32, engine: Engine) -> F32:
    """Step 2: 1/tau [H, g], tau = sqrt(d L / M), from the share L/M that the channels have in sum abs(q).

    It is `scale` if they are all channels, or if q is zero.
    """
    magnitude = from_bits(q & _MAGNITUDE, FP16)
    some = asic.reduce(np.where(channels[:, None], magnitude, _ZERO), engine.lanes, np.add, 0)[..., 0]
    whole = asic.reduce(magnitude, engine.lanes, np.add, 0)[..., 0]
    plain = np.all(channels, axis=-1)[:, None] | (whole == 0)
    return np.where(plain, scale, scale * asic.rsqrt(some * asic.reciprocal(whole, engine), engine))


def scores(q: Bits16, keys: Bits16, lanes: int) -> F32:
    """Steps 3 and 8: [H, g, n] from queries [H, g, c] and keys [H, n, c]."""
    return dot(q[:, :, None], keys[:, None], lanes)


@np.errstate(all="ignore")
def dot(a: Bits16, b: Bits16, lanes: int) -> F32:
    """Sum over the last axis of the products of FP16 bits, group by group as the module describes."""
    n = a.shape[-1]
    total = np.zeros(np.broadcast_shapes(a.shape[:-1], b.shape[:-1]), np.float32)
    for first in range(0, n, lanes):
        here = slice(first, first + lanes)
        products = from_bits(a[..., here], FP16) * from_bits(b[..., here], FP16)
        tree = np.zeros((*total.shape, lanes), np.float32)
        tree[..., : products.shape[-1]] = products
        while tree.shape[-1] > 1:
            tree = tree[..., 0::2] + tree[..., 1::2]
        total = total + tree[..., 0]
    return total


@np.errstate(all="ignore")
def weigh(score: F32, scale: F32 | np.float32, engine: Engine) -> Weights:
    """Steps 4, 5 and 9 for scores [H, g, n] and a scale that broadcasts to them."""
    bits = _fp16(asic.exp((score - score.max(axis=-1, keepdims=True)) * scale, engine))
    total = asic.reduce(from_bits(bits, FP16), engine.lanes, np.add, 0)[..., 0]
    return Weights(bits, total, asic.reciprocal(total, engine))


def select_tokens(estimate: Weights, k: int, local: int) -> Mask:
    """Step 6: [H, S]. The last `local` tokens rank above all others, among themselves by their weights.

    With one query head the keys are its weights. With g of them they are the sums of their probabilities
    weight * 1/total, in FP32 from the first head on, times 2**15 / g' (g' = g rounded up to a power of two),
    which puts the largest possible sum at the upper end of FP16, rounded to FP16.
    """
    bits = estimate.bits[:, 0]
    group, n = estimate.bits.shape[1:]
    if group > 1:
        probability = from_bits(estimate.bits, FP16) * estimate.inverse[..., None]
        joint = probability[:, 0]
        for h in range(1, group):
            joint = joint + probability[:, h]
        bits = _fp16(np.ldexp(joint, 15 - (group - 1).bit_length()))
    near = np.arange(n) >= n - local
    return argtopk(bits + (near.astype(np.int64) << FP16.width), k)


def coverage(estimate: Weights, tokens: Mask, engine: Engine) -> F32:
    """Step 7: alpha [H, g]."""
    chosen = np.where(tokens[:, None], from_bits(estimate.bits, FP16), _ZERO)
    part = asic.reduce(chosen, engine.lanes, np.add, 0)[..., 0]
    return np.minimum(part * estimate.inverse, _ONE)


def _mix(weights: Bits16, values: Bits16, lanes: int) -> F32:
    """Step 10: [H, g, dv]."""
    return dot(weights[:, :, None], values.swapaxes(-1, -2)[:, None], lanes)


# ---- pages --------------------------------------------------------------------------------------------


def reads(selection: Attention, layout: Layout, *, skip: bool = True, pick: bool = True) -> Reads:
    """The pages that a result needed, and what their filters forwarded.

    `skip` is the page-level filter: it leaves out a page of which nothing is selected. `pick` is the
    entry-level filter: of a page that is read it forwards only what is selected. Tokens count as stored from
    the first on; the last page of each kind may be partial. Without an estimate no channel-indexed page is
    read, whatever the filters.
    """
    channels, tokens = selection.channels, selection.tokens
    pages, rows = pages_read(channels, layout.channels, skip=skip, pick=pick)
    estimated = np.any(channels, axis=-1)[:, None]
    spans = np.ones(-(-tokens.shape[-1] // layout.span), np.int64)
    return Reads(
        (pages * estimated)[..., None] * spans,
        (rows * estimated)[..., None] * spans,
        *pages_read(tokens, layout.tokens, skip=skip, pick=pick),
    )


def pages_read(mask: Mask, size: int, *, skip: bool = True, pick: bool = True) -> tuple[Counts, Counts]:
    """Of entries [..., n] in pages of `size`: which pages are read (0 or 1), and entries forwarded of each.

    >>> pages_read(np.array([0, 0, 1, 0, 1], bool), 2)
    (array([0, 1, 1]), array([0, 1, 1]))
    >>> pages_read(np.array([0, 0, 1, 0, 1], bool), 2, skip=False, pick=False)
    (array([1, 1, 1]), array([2, 2, 1]))
    """
    n = mask.shape[-1]
    padded = np.zeros((*mask.shape[:-1], -(-n // size) * size), np.bool_)
    padded[..., :n] = mask
    chosen = np.count_nonzero(padded.reshape(*mask.shape[:-1], -1, size), axis=-1)
    pages = ((chosen > 0) | (not skip)).astype(np.int64)
    held = np.minimum(size, n - np.arange(chosen.shape[-1]) * size)
    return pages, (chosen if pick else pages * held).astype(np.int64)


# ---- helpers ------------------------------------------------------------------------------------------


def _fp16(values: F32) -> Bits16:
    return cast(Bits16, to_bits(values, FP16))


def _take(bits: Bits16, where: Counts, axis: int) -> Bits16:
    """Entries `where` [H, n] of axis -1 or -2 of [H, m, m']."""
    return np.take_along_axis(bits, where[:, None] if axis == -1 else where[..., None], axis)


def _shapes(q: Bits16, keys: Bits16, values: Bits16, engine: Engine) -> tuple[int, int, int, int]:
    """(H, g, d, S), checked."""
    if engine.lanes < 1 or engine.lanes & (engine.lanes - 1):
        raise ValueError(f"lanes must be a power of two, not {engine.lanes}")
    for name, array in (("q", q), ("keys", keys), ("values", values)):
        if array.dtype != np.uint16 or array.ndim != 3 or not array.size:
            raise ValueError(
                f"{name} must be uint16 of three axes, none empty, not {array.dtype} {array.shape}"
            )
    heads, group, d = q.shape
    n = keys.shape[1]
    if keys.shape != (heads, n, d) or values.shape[:2] != (heads, n):
        raise ValueError(
            f"keys must be {(heads, n, d)} and values {(heads, n)} with channels,"
            f" not {keys.shape}, {values.shape}"
        )
    return heads, group, d, n
