"""A transformer layer as dataflow units compute it, in the order of their additions: what sections must give.

Matrices are words uint32[rows, columns]: bfloat16 in the upper half, or float32 between the stages of one operator.
Products are exact, their sums float32, one after the other; statistics are float32; what an operator gives is rounded
to bfloat16. Sums over a row are taken column by column (rows as lanes), or, for a vector as `lanes` columns at a
time, lane by lane and then over the lanes by a tree.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from tilewright.arch.formats import BF16, FP32
from tilewright.workloads import asic, formats
from tilewright.workloads.models import ModelConfig, Vision
from tilewright.workloads.rdu_kernels import lane_op, reduce_tree, round_bf16, special

__all__ = [
    "LOWEST", "Layer", "activation", "attention", "cut", "image", "layer", "members", "norm", "partial_products", "product",
    "rotary", "there", "turns_of", "words",
]  # fmt: skip

Words = NDArray[np.uint32]
LOWEST = -1e30
"""What the score of a masked key is."""
SPARSE = ("qkv", "attention_out", "gate", "up", "down")
"""Products whose weights may be sparse."""
QUICK_GELU = 1.702
GELU_CUBIC = 0.044715
GELU_SCALE = float(2 * np.sqrt(2 / np.pi))


def words(values: object) -> Words:
    """Numbers as bfloat16 in the upper half of words."""
    return round_bf16(np.asarray(values, np.float32).view(np.uint32))


def _word(value: float) -> np.uint32:
    return np.float32(value).view(np.uint32)


def _op(operation: str, a: object, b: object) -> Words:
    return lane_op(operation, "fp32", np.asarray(a, np.uint32), np.asarray(b, np.uint32))


def _fold(how: str, parts: Sequence[Words]) -> Words:
    total = parts[0]
    for part in parts[1:]:
        total = _op(how, total, part)
    return total


def fold(how: str, x: Words) -> Words:
    """Columns joined one after the other: uint32[rows]."""
    return _fold(how, [x[:, k] for k in range(x.shape[1])])


def cut(x: Words, parts: int) -> list[Words]:
    """Equal ranges of the columns."""
    return np.split(x, parts, axis=1)


def join(how: str, parts: Sequence[Words], inputs: int) -> Words:
    """What units of `inputs` inputs make of partial results, level by level."""
    level = list(parts)
    while len(level) > inputs:
        level = [_fold(how, level[i : i + inputs]) for i in range(0, len(level), inputs)]
    return _fold(how, level)


def product(x: Words, w: Words) -> Words:
    """uint32[rows, k] times uint32[k, n], bfloat16 in, float32 out."""
    half = np.uint32(16)
    total = np.zeros((len(x), w.shape[1]), np.uint32)
    for k in range(x.shape[1]):
        term = formats.multiply(x[:, k, None] >> half, w[None, k] >> half, BF16, FP32).astype(np.uint32)
        total = term if k == 0 else _op("add", total, term)
    return total


def members(columns: int, groups: int, turns: bool) -> NDArray[np.int64]:
    """The group of each column: by turns, or in equal ranges."""
    column = np.arange(columns)
    return column % groups if turns else column // (columns // groups)


def turns_of(name: str) -> tuple[bool, bool]:
    """Whether the inputs of a product, and its outputs, belong to groups of weights by turns (`ModelConfig.weight_groups`)."""
    return True, name not in ("attention_out", "down")


def there(model: ModelConfig, name: str, shape: tuple[int, int]) -> NDArray[np.bool_]:
    """Which weights of a layer's product, of a `shape` of inputs and outputs, there are."""
    rows, columns = (members(n, model.weight_groups, t) for n, t in zip(shape, turns_of(name), strict=True))
    return rows[:, None] == columns[None]


def partial_products(
    x: Words, w: Words, cuts: int, groups: int = 1, turns: tuple[bool, bool] = (True, True)
) -> list[Words]:
    """The products over `cuts` ranges of the columns of x; their sum is x w. Of sparse weights each output takes those
    ranges only in which its group has columns."""
    if groups == 1:
        return [product(a, b) for a, b in zip(cut(x, cuts), np.split(w, cuts), strict=True)]
    of_row, of_column = members(x.shape[1], groups, turns[0]), members(w.shape[1], groups, turns[1])
    ranges = np.array_split(np.arange(x.shape[1]), cuts)
    found = []
    for j in range(groups):
        mine = [own for r in ranges if len(own := r[of_row[r] == j])]
        found.append([product(x[:, own], w[own][:, of_column == j]) for own in mine])
    out = []
    for some in zip(*found, strict=True):
        whole = np.zeros((len(x), w.shape[1]), np.uint32)
        for j, part in enumerate(some):
            whole[:, of_column == j] = part
        out.append(whole)
    return out


def norm(
    x: Words, gain: Words, bias: Words | None, eps: str, counts: asic.Counts, parts: int = 1, inputs: int = 4
) -> Words:
    """Root-mean-square norm, or layer norm where there is a bias; sums over `parts` ranges of columns are joined."""
    n = x.shape[1]
    inverse, least = _word(1 / n), _word(float(eps))
    centred = x
    if bias is not None:
        mean = _op("multiply", join("add", [fold("add", part) for part in cut(x, parts)], inputs), inverse)
        centred = _op("subtract", x, mean[:, None])
    squares = [fold("add", part) for part in cut(_op("multiply", centred, centred), parts)]
    mean_square = _op("multiply", join("add", squares, inputs), inverse)
    scale = special("rsqrt", _op("add", mean_square, least), counts)
    y = _op("multiply", _op("multiply", centred, scale[:, None]), gain[None])
    return round_bf16(y if bias is None else _op("add", y, bias[None]))


def rotary(x: Words, cos: Words, sin: Words, head_dim: int) -> Words:
    """x * cos + partner * sin, the partner half a head away; `sin`, uint32[rows, head_dim], has the signs."""
    rows, n = x.shape
    heads = x.reshape(rows, n // head_dim, head_dim)
    half = head_dim // 2
    partner = np.concatenate([heads[..., half:], heads[..., :half]], axis=-1)
    turned = _op("add", _op("multiply", heads, cos[:, None]), _op("multiply", partner, sin[:, None]))
    return round_bf16(turned).reshape(rows, n)


def attention(
    q: Words, keys: Words, values: Words, *, heads: int, head_dim: int, hidden: NDArray[np.bool_], chunks: int,
    slopes: Words | None, counts: asic.Counts, inputs: int = 4,
) -> Words:  # fmt: skip
    """Softmax attention: q uint32[rows, heads * head_dim], keys and values uint32[tokens, kv_heads * head_dim].

    `hidden[row, token]` masks; `slopes` uint32[heads, tokens] is added to the scaled scores. Tokens are taken in
    `chunks` equal ranges, whose maxima, sums and values are joined.
    """
    shared = heads * head_dim // keys.shape[1]
    scale = _word(head_dim**-0.5)
    outs = []
    for h in range(heads):
        own = slice(h // shared * head_dim, (h // shared + 1) * head_dim)
        scores = _op("multiply", product(q[:, h * head_dim : (h + 1) * head_dim], keys[:, own].T), scale)
        if slopes is not None:
            scores = _op("add", scores, slopes[h][None])
        scores = np.where(hidden, _word(LOWEST), scores).astype(np.uint32)
        top = join("maximum", [fold("maximum", part) for part in cut(scores, chunks)], inputs)
        power = round_bf16(special("exp", _op("subtract", scores, top[:, None]), counts))
        sums = join("add", [fold("add", part) for part in cut(power, chunks)], inputs)
        inverse = special("reciprocal", sums, counts)
        parts = [
            product(p, v) for p, v in zip(cut(power, chunks), np.split(values[:, own], chunks), strict=True)
        ]
        total = join("add", parts, inputs - 1)  # the inverse sum takes one input
        outs.append(round_bf16(_op("multiply", total, inverse[:, None])))
    return np.concatenate(outs, axis=1)


def activation(kind: str, x: Words, times: Words | None, counts: asic.Counts) -> Words:
    """The activation, times `times` where it is gated; both GELU forms are the tanh one."""
    gate = x if times is None else _op("multiply", x, times)
    if kind == "silu":
        return round_bf16(_op("multiply", special("sigmoid", x, counts), gate))
    if kind == "quick_gelu":
        z = _op("multiply", x, _word(QUICK_GELU))
        return round_bf16(_op("multiply", special("sigmoid", z, counts), gate))
    if kind in ("gelu", "gelu_tanh"):  # (1 + tanh(z)) / 2 = sigmoid(2 z)
        cubic = _op("add", _op("multiply", _op("multiply", x, x), _word(GELU_CUBIC)), _word(1.0))
        z = _op("multiply", _op("multiply", cubic, x), _word(GELU_SCALE))
        return round_bf16(_op("multiply", special("sigmoid", z, counts), gate))
    y = _op("maximum", x, np.uint32(0))
    if kind == "relu2":
        y = _op("multiply", y, y)
    return round_bf16(y if times is None else _op("multiply", y, times))


@dataclass(frozen=True)
class Layer:
    """How a layer is cut: ranges of columns of a matrix, chunks of the keys, inputs of a unit."""

    chunks: int = 1
    parts: int = 1
    """Of matrices as wide as the model."""
    inner: int = 1
    """Of the MLP's."""
    inputs: int = 4


def layer(
    model: ModelConfig, weights: Mapping[str, Words], x: Words, cos: Words | None, sin: Words | None,
    past: tuple[Words, Words], tokens: int, how: Layer, counts: asic.Counts, slopes: Words | None = None,
    window: int | None = None, chosen: Sequence[Sequence[int]] = (),
) -> tuple[Words, Words, Words]:  # fmt: skip
    """One layer over rows of new tokens behind cached ones; returns (rows, keys, values) with all `tokens` of the cache.

    Of a mixture the experts `chosen` by each row are at work, whose weights are under `<operator>_<expert>`.

    `weights` by operator; biases under `<operator>.bias`, norms under `.gain` and `.bias`. What lies beyond the new
    tokens in the cache must be finite, as it is masked.
    """
    m, w = model, weights
    rows, context = len(x), len(past[0])

    def normed(name: str, a: Words) -> Words:
        return norm(a, w[f"{name}.gain"], w.get(f"{name}.bias"), m.norm_eps, counts, how.parts, how.inputs)

    def linear(name: str, a: Words, parts: int) -> Words:
        sparse = m.weight_groups if name in SPARSE else 1
        sums = partial_products(a, w[name], parts, sparse, turns_of(name))
        if f"{name}.bias" in w:
            sums.append(np.broadcast_to(w[f"{name}.bias"], sums[0].shape))
        return round_bf16(join("add", sums, how.inputs))

    def attend(a: Words) -> tuple[Words, Words, Words]:
        qkv = linear("qkv", a, how.parts)
        q, k, v = np.split(qkv, [m.q_dim, m.q_dim + m.kv_dim], axis=1)
        if cos is not None and sin is not None:
            q, k = rotary(q, cos, sin, m.head_dim), rotary(k, cos, sin, m.head_dim)
        rest = np.zeros((tokens - context - rows, m.kv_dim), np.uint32)
        keys, values = (np.concatenate([old, new, rest]) for old, new in zip(past, (k, v), strict=True))
        token, row = np.arange(tokens)[None], context + np.arange(rows)[:, None]
        hidden = token > row if m.causal else token >= context + rows + 0 * row
        if window is not None:
            hidden = hidden | (token < row - (window - 1))
        out = attention(
            q, keys, values, heads=m.heads, head_dim=m.head_dim, hidden=hidden, chunks=how.chunks, slopes=slopes,
            counts=counts, inputs=how.inputs,
        )  # fmt: skip
        return linear("attention_out", out, 1), keys, values

    def expert(a: Words, suffix: str = "") -> Words:
        up = linear(f"up{suffix}", a, how.parts)
        inner = (
            activation(m.activation, linear(f"gate{suffix}", a, how.parts), up, counts)
            if m.gated_mlp
            else activation(m.activation, up, None, counts)
        )
        return linear(f"down{suffix}", inner, how.inner)

    def mlp(a: Words) -> Words:
        if not m.experts:
            return expert(a)
        scores = linear("router", a, how.parts)
        given = [expert(a, f"_{e}") for e in range(m.experts)]
        number, row = np.array(chosen).T, np.arange(rows)
        return mixture(
            [scores[row, e][:, None] for e in number], [np.stack(given)[e, row] for e in number], counts, how.inputs
        )  # fmt: skip

    def add(*parts: Words) -> Words:
        return round_bf16(_fold("add", parts))

    if m.parallel_attention:
        h = normed("attention_norm", x)
        o, keys, values = attend(h)
        return add(x, o, mlp(normed("mlp_norm", x) if m.parallel_norms == 2 else h)), keys, values
    if m.post_norm:
        o, keys, values = attend(x)
        y = normed("attention_norm", add(x, o))
        return normed("mlp_norm", add(y, mlp(y))), keys, values
    o, keys, values = attend(normed("attention_norm", x))
    y = add(x, o)
    return add(y, mlp(normed("mlp_norm", y))), keys, values


# ---- an image ------------------------------------------------------------------------------------------


def image(
    vision: Vision, weights: Mapping[str, Words], layers: Sequence[Mapping[str, Words]], patches: Words, tokens: int,
    how: Layer, counts: asic.Counts,
) -> Words:  # fmt: skip
    """What an image's patches, uint32[patches, elements], give for a prompt: uint32[patches, columns].

    The class token is the last row, whose patch is all zeros: `table` of `weights`, uint32[patches + 1, columns], has
    its vector there, and the positions' vectors in all rows. `tokens` are the cache's room in each of the `layers`.
    """
    w, tower = weights, vision.tower
    rows = np.concatenate([patches, np.zeros((1, patches.shape[1]), np.uint32)])
    x = round_bf16(_op("add", w["table"], round_bf16(product(rows, w["patches"]))))
    x = norm(x, w["pre_norm.gain"], w["pre_norm.bias"], tower.norm_eps, counts, how.parts, how.inputs)
    none = np.zeros((0, tower.kv_dim), np.uint32)
    for own in layers:
        x, _, _ = layer(tower, own, x, None, None, (none, none), tokens, how, counts)
    x = round_bf16(_op("add", product(x[:-1], w["up"]), w["up.bias"]))
    x = activation(vision.activation, x, None, counts)
    return round_bf16(_op("add", product(x, w["down"]), w["down.bias"]))


# ---- one token ----------------------------------------------------------------------------------------


def lane_sum(how: str, x: Words, lanes: int) -> Words:
    """A vector joined lane by lane, `lanes` words at a time, then over the lanes by a tree: one word."""
    return reduce_tree(how, "fp32", _fold(how, list(x.reshape(-1, lanes))))


def token_norm(x: Words, gain: Words, bias: Words | None, eps: str, counts: asic.Counts, lanes: int) -> Words:
    """`norm` of a vector."""
    inverse, least = _word(1 / len(x)), _word(float(eps))
    centred = x
    if bias is not None:
        centred = _op("subtract", x, _op("multiply", lane_sum("add", x, lanes), inverse))
    mean_square = _op("multiply", lane_sum("add", _op("multiply", centred, centred), lanes), inverse)
    scale = special("rsqrt", _op("add", mean_square, least), counts)
    y = _op("multiply", _op("multiply", centred, scale), gain)
    return round_bf16(y if bias is None else _op("add", y, bias))


def token_attention(
    q: Words, k: Words, v: Words, keys: Words, values: Words, mask: Words, *, heads: int, head_dim: int, chunks: int,
    counts: asic.Counts, lanes: int, inputs: int = 4,
) -> Words:  # fmt: skip
    """Attention of one token to itself (q, k, v) and to cached keys and values, uint32[tokens, kv_heads * head_dim].

    `mask` uint32[heads, tokens] is added to the scaled scores.
    """
    shared = heads * head_dim // len(k)
    scale = _word(head_dim**-0.5)
    outs = []
    for h in range(heads):
        own = slice(h // shared * head_dim, (h // shared + 1) * head_dim)
        query = q[h * head_dim : (h + 1) * head_dim]
        itself = _op("multiply", lane_sum("add", _op("multiply", query, k[own]), lanes), scale)
        scores = _op("add", _op("multiply", product(query[None], keys[:, own].T)[0], scale), mask[h])
        tops = [itself, lane_sum("maximum", scores, lanes)] if len(keys) else [itself]
        top = _fold("maximum", tops)
        power = round_bf16(special("exp", _op("subtract", scores, top), counts))
        itself = round_bf16(special("exp", _op("subtract", itself, top), counts))
        total = _op("add", itself, lane_sum("add", power, lanes)) if len(keys) else itself
        parts = [_op("multiply", v[own], itself)]
        if len(keys):
            parts += [
                product(p[None], x)[0]
                for p, x in zip(np.split(power, chunks), np.split(values[:, own], chunks), strict=True)
            ]
        out = join("add", parts, inputs - 1)
        outs.append(round_bf16(_op("multiply", out, special("reciprocal", total, counts))))
    return np.concatenate(outs)


def mixture(scores: Sequence[Words], experts: Sequence[Words], counts: asic.Counts, inputs: int = 4) -> Words:
    """What the chosen experts give, uint32[..., columns], weighted by a softmax over their `scores`, uint32[..., 1]."""
    top = join("maximum", scores, inputs)
    powers = [special("exp", _op("subtract", score, top), counts) for score in scores]
    inverse = special("reciprocal", join("add", powers, inputs), counts)
    return round_bf16(
        _fold(
            "add",
            [_op("multiply", x, _op("multiply", p, inverse)) for p, x in zip(powers, experts, strict=True)],
        )
    )


def token_layer(
    model: ModelConfig, weights: Mapping[str, Words], x: Words, cos: Words | None, sin: Words | None,
    past: tuple[Words, Words], mask: Words, how: Layer, counts: asic.Counts, lanes: int, chosen: Sequence[int] = (),
) -> tuple[Words, Words, Words]:  # fmt: skip
    """One layer for one token, uint32[d_model], behind `past` keys and values; returns (x, k, v) of the token.

    As `layer`, but for the order of sums over a row. `how.parts` and `how.inner` cut the depths of products. Of a
    mixture the `chosen` experts are at work, whose weights are under `<operator>_<expert>`.
    """
    m, w = model, weights

    def normed(name: str, a: Words) -> Words:
        return token_norm(a, w[f"{name}.gain"], w.get(f"{name}.bias"), m.norm_eps, counts, lanes)

    def linear(name: str, a: Words, parts: int) -> Words:
        sums = [product(b, v)[0] for b, v in zip(cut(a[None], parts), np.split(w[name], parts), strict=True)]
        if f"{name}.bias" in w:
            sums.append(w[f"{name}.bias"])
        return round_bf16(join("add", sums, how.inputs))

    def attend(a: Words) -> tuple[Words, Words, Words]:
        q, k, v = np.split(linear("qkv", a, how.parts), [m.q_dim, m.q_dim + m.kv_dim])
        if cos is not None and sin is not None:
            q, k = (rotary(b[None], cos[None], sin[None], m.head_dim)[0] for b in (q, k))
        out = token_attention(
            q, k, v, *past, mask, heads=m.heads, head_dim=m.head_dim, chunks=how.chunks, counts=counts, lanes=lanes,
            inputs=how.inputs,
        )  # fmt: skip
        return linear("attention_out", out, 1), k, v

    def expert(a: Words, suffix: str = "") -> Words:
        up = linear(f"up{suffix}", a, how.parts)
        inner = (
            activation(m.activation, linear(f"gate{suffix}", a, how.parts), up, counts)
            if m.gated_mlp
            else activation(m.activation, up, None, counts)
        )
        return linear(f"down{suffix}", inner, how.inner)

    def mlp(a: Words) -> Words:
        if not m.experts:
            return expert(a)
        scores = linear("router", a, how.parts)
        return mixture(
            [scores[e, None] for e in chosen], [expert(a, f"_{e}") for e in chosen], counts, how.inputs
        )

    def add(*parts: Words) -> Words:
        return round_bf16(_fold("add", parts))

    if m.parallel_attention:
        h = normed("attention_norm", x)
        o, k, v = attend(h)
        return add(x, o, mlp(normed("mlp_norm", x) if m.parallel_norms == 2 else h)), k, v
    if m.post_norm:
        o, k, v = attend(x)
        y = normed("attention_norm", add(x, o))
        return normed("mlp_norm", add(y, mlp(y))), k, v
    o, k, v = attend(normed("attention_norm", x))
    y = add(x, o)
    return add(y, mlp(normed("mlp_norm", y))), k, v
