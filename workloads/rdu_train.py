"""A training step of a transformer layer as dataflow units compute it, in the order of their additions.

Matrices are as in `rdu_layer`: bfloat16 in the upper half of words, gradients too. Of a product y = x w, the gradient of
x is dy w^T, summed over the columns of y, that of w is x^T dy, summed over the rows, one after the other. What attention
needs of its scores is computed again. Weights are kept in float32 by the optimizer, which rounds them for the layer.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from tilewright.workloads import asic
from tilewright.workloads.models import ModelConfig
from tilewright.workloads.rdu_kernels import reduce_tree, round_bf16, special
from tilewright.workloads.rdu_layer import (
    GELU_CUBIC,
    GELU_SCALE,
    LOWEST,
    Words,
    _fold,
    _op,
    _word,
    activation,
    attention,
    cut,
    fold,
    join,
    norm,
    partial_products,
    product,
    rotary,
    there,
    turns_of,
)

__all__ = [
    "Cuts", "accumulated", "activation_dx", "adamw", "attention_dx", "column_sum", "embedding_dw", "gradients", "head", "loss", "norm_dx",
    "product_dw", "product_dx", "table_gradients",
]  # fmt: skip

TINY = 1e-30
"""The least second moment that a root is taken of."""


@dataclass(frozen=True)
class Cuts:
    """How sums are cut: ranges of a product's depth by its name, else one; of the tokens, by pass; inputs of a unit."""

    depths: Mapping[str, int] = field(default_factory=dict)
    chunks: int = 1
    backward: int = 1
    """Chunks of the tokens of attention's backward pass, with queries as rows."""
    turned: int = 1
    """And with keys as rows."""
    inputs: int = 4
    lanes: int = 16


def product_dx(
    dy: Words, w: Words, cuts: int = 1, inputs: int = 4, groups: int = 1, turns: tuple[bool, bool] = (True, True)
) -> Words:  # fmt: skip
    """The gradient of x in y = x w: dy w^T, uint32[rows, k]. Of sparse weights as `rdu_layer.partial_products`."""
    return round_bf16(join("add", partial_products(dy, w.T, cuts, groups, turns), inputs))


def product_dw(x: Words, dy: Words) -> Words:
    """The gradient of w in y = x w: x^T dy, uint32[k, n]."""
    return round_bf16(product(x.T, dy))


def norm_dx(
    x: Words, dy: Words, gain: Words, eps: str, layernorm: bool, counts: asic.Counts, parts: int = 1, inputs: int = 4
) -> tuple[Words, Words]:  # fmt: skip
    """The gradient of a norm's x, and what summed over rows is its gain's, both uint32[rows, columns].

    With c = x less its mean (x itself, where there is none) and r its scale: r (g dy - mean(g dy)) - c mean(g dy c) r^3.
    """
    n = x.shape[1]
    inverse, least = _word(1 / n), _word(float(eps))

    def total(a: Words) -> Words:
        return join("add", [fold("add", part) for part in cut(a, parts)], inputs)

    c = _op("subtract", x, _op("multiply", total(x), inverse)[:, None]) if layernorm else x
    mean_square = _op("multiply", total(_op("multiply", c, c)), inverse)
    r = special("rsqrt", _op("add", mean_square, least), counts)
    scaled = _op("multiply", dy, gain[None])
    slope = _op("multiply", total(_op("multiply", scaled, c)), inverse)
    for _ in range(3):
        slope = _op("multiply", slope, r)
    a = _op("multiply", scaled, r[:, None])
    if layernorm:
        a = _op("subtract", a, _op("multiply", _op("multiply", total(scaled), inverse), r)[:, None])
    dx = _op("subtract", a, _op("multiply", c, slope[:, None]))
    return round_bf16(dx), round_bf16(_op("multiply", _op("multiply", dy, c), r[:, None]))


def column_sum(x: Words, lanes: int) -> Words:
    """Sums over the rows, uint32[columns]: lane by lane over the blocks of rows, then over the lanes by a tree."""
    by_lane = fold(
        "add", x.T.reshape(-1, len(x) // lanes, lanes).transpose(0, 2, 1).reshape(-1, len(x) // lanes)
    )
    sums = [reduce_tree("add", "fp32", column) for column in by_lane.reshape(-1, lanes)]
    return round_bf16(np.array(sums, np.uint32))


def activation_dx(
    kind: str, df: Words, gate: Words | None, up: Words, counts: asic.Counts
) -> tuple[Words, ...]:
    """Gradients of an activation's inputs: (of the gate, of up) for a gated SiLU, (of up,) for GELU's tanh form."""
    if gate is not None:
        sigmoid = special("sigmoid", gate, counts)
        through = _op("multiply", gate, sigmoid)
        through = _op("add", _op("subtract", gate, through), _word(1.0))
        through = _op("multiply", _op("multiply", through, sigmoid), up)
        d_up = _op("multiply", sigmoid, _op("multiply", df, gate))
        return round_bf16(_op("multiply", through, df)), round_bf16(d_up)
    x = up
    square = _op("multiply", x, x)
    z = _op("add", _op("multiply", square, _word(GELU_CUBIC)), _word(1.0))
    z = _op("multiply", _op("multiply", z, x), _word(GELU_SCALE))
    sigmoid = special("sigmoid", z, counts)
    rise = _op("add", _op("multiply", square, _word(3 * GELU_CUBIC)), _word(1.0))
    rise = _op("multiply", _op("multiply", rise, _word(GELU_SCALE)), x)
    rest = _op("add", _op("multiply", sigmoid, _word(-1.0)), _word(1.0))
    rise = _op("add", _op("multiply", rise, rest), _word(1.0))
    return (round_bf16(_op("multiply", _op("multiply", rise, sigmoid), df)),)


def attention_dx(
    q: Words, keys: Words, values: Words, a: Words, da: Words, *, heads: int, head_dim: int, hidden: NDArray[np.bool_],
    chunks: int, counts: asic.Counts, turned: int = 1, inputs: int = 4,
) -> tuple[Words, Words, Words]:  # fmt: skip
    """Gradients of q, keys and values, uint32[rows, heads * head_dim], from what attention gave and its gradient.

    A row's maximum and sum of powers are found as `rdu_layer.attention` does; the powers themselves once with queries as
    rows, and once with keys. Tokens are taken in `chunks` equal ranges, or, for the latter, in `turned` ones. dP = da v^T; dS = P (dP - rowsum(da a)) scale.
    """
    scale = _word(head_dim**-0.5)
    out: tuple[list[Words], list[Words], list[Words]] = ([], [], [])

    def total(x: Words, w: Words, chunks: int) -> Words:
        """A product whose depth is cut into chunks."""
        parts = [product(b, v) for b, v in zip(cut(x, chunks), np.split(w, chunks), strict=True)]
        return round_bf16(join("add", parts, inputs))

    for h in range(heads):
        own = slice(h * head_dim, (h + 1) * head_dim)
        qh, kh, vh, ah, dah = (x[:, own] for x in (q, keys, values, a, da))
        masked = _op("multiply", product(qh, kh.T), scale)
        masked = np.where(hidden, _word(LOWEST), masked).astype(np.uint32)
        top = join("maximum", [fold("maximum", part) for part in cut(masked, chunks)], inputs)
        power = special("exp", _op("subtract", masked, top[:, None]), counts)
        power = round_bf16(power)
        inverse = special(
            "reciprocal", join("add", [fold("add", p) for p in cut(power, chunks)], inputs), counts
        )
        dot = fold("add", _op("multiply", dah, ah))

        def slopes(power: Words, dp: Words, inverse: Words, dot: Words) -> tuple[Words, Words]:
            share = _op("multiply", power, inverse)
            ds = _op("multiply", _op("multiply", share, _op("subtract", dp, dot)), scale)
            return round_bf16(share), round_bf16(ds)

        _, ds = slopes(power, product(dah, vh.T), inverse[:, None], dot[:, None])
        out[0].append(total(ds, kh, chunks))
        # Keys as rows: the products' sums are over the same elements in the same order, so that scores are equal.
        share, ds = slopes(power.T, product(vh, dah.T), inverse[None], dot[None])
        out[1].append(total(ds, qh, turned))
        out[2].append(total(share, dah, turned))
    dq, dk, dv = (np.concatenate(parts, axis=1) for parts in out)
    return dq, dk, dv


def _over_sockets(how: str, parts: Sequence[Words]) -> Words:
    """What all sockets have of a row's word: the first one's, and what the others' give together."""
    return parts[0] if len(parts) == 1 else _op(how, parts[0], _fold(how, parts[1:]))


def loss(
    logits: Sequence[Words], targets: NDArray[np.integer], vocab: int, counts: asic.Counts, parts: int = 1, inputs: int = 4,
    firsts: Sequence[int] | None = None,
) -> tuple[list[Words], Words, Words, Words]:  # fmt: skip
    """The gradient of the mean cross entropy, by the columns of the logits that each socket has, uint32[rows, columns].

    And three words of each row: the largest logit, the sum of the powers of all less that one, and the target's logit. The
    loss is mean(top + log(total) - target). Columns from `vocab` on are masked. Sums are over `parts` ranges of a socket's
    columns, which are joined, and over the sockets. `firsts` are the numbers of their first columns, else all follow one
    another. The gradient is (power / sum - (1 at the target)) / rows.
    """
    rows, each = logits[0].shape
    column = [first + np.arange(each) for first in firsts or range(0, len(logits) * each, each)]
    at_target = [np.asarray(targets)[:, None] == own[None] for own in column]
    masked = [
        np.where(own[None] < vocab, x, _word(LOWEST)).astype(np.uint32)
        for x, own in zip(logits, column, strict=True)
    ]

    def joined(how: str, words: Sequence[Words]) -> Words:
        own = [join(how, [fold(how, part) for part in cut(x, parts)], inputs) for x in words]
        return _over_sockets(how, own)

    top = joined("maximum", masked)
    power = [special("exp", _op("subtract", x, top[:, None]), counts) for x in masked]
    total = joined("add", power)
    inverse = special("reciprocal", total, counts)
    picked = joined("add", [np.where(at, x, np.uint32(0)) for x, at in zip(logits, at_target, strict=True)])
    out = []
    for own, at in zip(power, at_target, strict=True):
        share = _op("multiply", own, inverse[:, None])
        share = np.where(at, _op("subtract", share, _word(1.0)), share).astype(np.uint32)
        out.append(round_bf16(_op("multiply", share, _word(1 / rows))))
    return out, top, total, picked


def embedding_dw(tokens: NDArray[np.integer], dx: Words, first: int, rows: int) -> Words:
    """The gradient of `rows` rows of a table of embeddings from row `first` on, uint32[rows, columns].

    It is a product with the matrix that has a one at (row, token of that row): gradients of a token that comes again are
    added up in the order in which it comes.
    """
    one_hot = np.where(np.asarray(tokens)[:, None] == first + np.arange(rows), _word(1.0), np.uint32(0))
    return product_dw(one_hot.astype(np.uint32), dx)


def accumulated(gradients: Sequence[Words]) -> Words:
    """The mean of a weight's gradients by several sequences, in float32: each one's part is added to those before."""
    return _fold("add", [_op("multiply", g, _word(1 / len(gradients))) for g in gradients])


def adamw(
    w: Words, m: Words, v: Words, g: Words, rate: Words, *, beta1: float, beta2: float, eps: float, decay: float,
    counts: asic.Counts,
) -> tuple[Words, Words, Words, Words]:  # fmt: skip
    """AdamW (Loshchilov, Hutter, ICLR 2019): new weights, moments, and the weights that the layer takes, all but the last
    and the gradient `g` in float32.

    `rate` is the step's, with both corrections of bias in it (Kingma, Ba, ICLR 2015, end of section 2): w - rate (m /
    (sqrt(v) + eps) + decay w), the decay at the corrected rate.
    """
    m = _op("add", _op("multiply", m, _word(beta1)), _op("multiply", g, _word(1 - beta1)))
    v = _op("add", _op("multiply", v, _word(beta2)), _op("multiply", _op("multiply", g, g), _word(1 - beta2)))
    root = _op("multiply", special("rsqrt", _op("maximum", v, _word(TINY)), counts), v)
    step = _op("multiply", special("reciprocal", _op("add", root, _word(eps)), counts), m)
    step = _op("multiply", _op("add", step, _op("multiply", w, _word(decay))), rate)
    w = _op("subtract", w, step)
    return w, m, v, round_bf16(w)


def gradients(
    model: ModelConfig, weights: Mapping[str, Words], x: Words, dz: Words, cos: Words | None, sin: Words | None,
    cuts: Cuts, counts: asic.Counts,
) -> tuple[dict[str, Words], dict[str, Words]]:  # fmt: skip
    """A layer forward and backward: (matrices by name, gradients of the weights by theirs).

    Attention, norm, MLP, one after the other. `weights` as of `rdu_layer.layer`; among the matrices `z` is what the layer
    gives, and `dx` the gradient of `x`, from `dz`. Gradients of biases are under `<operator>_bias`.
    """
    m, w = model, weights
    rows = len(x)

    def normed(name: str, a: Words) -> Words:
        return norm(a, w[f"{name}.gain"], w.get(f"{name}.bias"), m.norm_eps, counts)

    def linear(name: str, a: Words) -> Words:
        parts = partial_products(a, w[name], cuts.depths.get(name, 1), m.weight_groups, turns_of(name))
        if f"{name}.bias" in w:
            parts.append(np.broadcast_to(w[f"{name}.bias"], parts[0].shape))
        return round_bf16(join("add", parts, cuts.inputs))

    def add(*parts: Words) -> Words:
        return round_bf16(_fold("add", parts))

    def turned(a: Words, sign: Words | None) -> Words:
        return a if cos is None or sign is None else rotary(a, cos, sign, m.head_dim)

    hidden = np.arange(rows)[None] > np.arange(rows)[:, None]
    at = {"x": x, "h": normed("attention_norm", x)}
    qkv = linear("qkv", at["h"])
    q, k, v = np.split(qkv, 3, axis=1)
    at |= {"q": turned(q, sin), "keys": turned(k, sin), "values": v}
    at["a"] = attention(
        at["q"], at["keys"], v, heads=m.heads, head_dim=m.head_dim, hidden=hidden, chunks=cuts.chunks, slopes=None,
        counts=counts, inputs=cuts.inputs,
    )  # fmt: skip
    at["y"] = add(x, linear("attention_out", at["a"]))
    at["h2"] = normed("mlp_norm", at["y"])
    at["up_out"] = linear("up", at["h2"])
    gate = linear("gate", at["h2"]) if m.gated_mlp else None
    if gate is None:
        at["f"] = activation(m.activation, at["up_out"], None, counts)
    else:
        at |= {"gate_out": gate, "f": activation(m.activation, gate, at["up_out"], counts)}
    at["z"] = add(at["y"], linear("down", at["f"]))

    def back(name: str, dy: Words) -> Words:
        depths = cuts.depths.get(f"{name}_dx", 1)
        return product_dx(dy, w[name], depths, cuts.inputs, m.weight_groups, turns_of(name)[::-1])

    def unnormed(name: str, a: Words, dy: Words) -> tuple[Words, Words]:
        return norm_dx(a, dy, w[f"{name}.gain"], m.norm_eps, m.norm == "layernorm", counts)

    at["df"] = back("down", dz)
    slopes = activation_dx(m.activation, at["df"], gate, at["up_out"], counts)
    at |= dict(zip(("dgate", "dup") if m.gated_mlp else ("dup",), slopes, strict=True))
    dh2 = add(back("gate", at["dgate"]), back("up", at["dup"])) if m.gated_mlp else back("up", at["dup"])
    dn, mlp_products = unnormed("mlp_norm", at["y"], dh2)
    at["dy"] = add(dz, dn)
    at["da"] = back("attention_out", at["dy"])
    dq, dk, dv = attention_dx(
        at["q"], at["keys"], at["values"], at["a"], at["da"], heads=m.heads, head_dim=m.head_dim, hidden=hidden,
        chunks=cuts.backward, turned=cuts.turned, counts=counts, inputs=cuts.inputs,
    )  # fmt: skip
    signs = None if sin is None else sin ^ np.uint32(0x80000000)
    at["dqkv"] = np.concatenate([turned(dq, signs), turned(dk, signs), dv], axis=1)
    dh = back("qkv", at["dqkv"])
    dn, products = unnormed("attention_norm", x, dh)
    at["dx"] = add(at["dy"], dn)
    pairs = {"qkv": ("h", "dqkv"), "attention_out": ("a", "dy"), "up": ("h2", "dup"), "down": ("f", "dz")}
    pairs |= {"gate": ("h2", "dgate")} if m.gated_mlp else {}
    at["dz"] = dz
    found = {name: product_dw(at[a], at[b]) for name, (a, b) in pairs.items()}
    if m.weight_groups > 1:
        found = {name: np.where(there(m, name, g.shape), g, np.uint32(0)) for name, g in found.items()}
    found["attention_norm"] = column_sum(products, cuts.lanes)
    found["mlp_norm"] = column_sum(mlp_products, cuts.lanes)
    sums = {name: at[b] for name, (_, b) in pairs.items()} | {"attention_norm": dh, "mlp_norm": dh2}
    found |= {f"{name}_bias": column_sum(dy, cuts.lanes) for name, dy in sums.items() if f"{name}.bias" in w}
    return at, found


def head(
    model: ModelConfig, weights: Sequence[Mapping[str, Words]], x: Words, targets: NDArray[np.integer], cuts: Cuts,
    counts: asic.Counts, parts: int = 1, firsts: Sequence[int] | None = None,
) -> tuple[dict[str, Words], list[dict[str, Words]]]:  # fmt: skip
    """What is behind the layers, forward and backward: (matrices by name, gradients of each socket's weights by theirs).

    `weights` of each socket: `lm_head` uint32[columns of its logits, d_model], and the final norm's, of which all have the
    same. Matrices are `last`, `dlast`, the loss's words `top`, `total` and `target`, and `dx`, the gradient of `x`.
    """
    m, w = model, weights[0]
    gain, bias = w.get("final_norm.gain"), w.get("final_norm.bias")
    last = x if gain is None else norm(x, gain, bias, m.norm_eps, counts)
    depths = cuts.depths.get("lm_head", 1)
    logits = [product_dx(last, own["lm_head"], depths, cuts.inputs) for own in weights]
    slopes, top, total, picked = loss(logits, targets, m.vocab, counts, parts, cuts.inputs, firsts)
    sums = []
    for d, own in zip(slopes, weights, strict=True):
        pieces = [product(a, b) for a, b in zip(cut(d, parts), np.split(own["lm_head"], parts), strict=True)]
        sums.append(round_bf16(join("add", pieces, cuts.inputs)))
    dlast = sums[0] if len(sums) == 1 else round_bf16(_over_sockets("add", sums))
    at = {"last": last, "top": top, "total": total, "target": picked, "dlast": dlast, "dx": dlast}
    found = [{"lm_head": product_dw(d, last)} for d in slopes]
    if gain is not None:
        at["dx"], products = norm_dx(x, dlast, gain, m.norm_eps, m.norm == "layernorm", counts)
        own = {"final_norm": column_sum(products, cuts.lanes)}
        own |= {} if bias is None else {"final_norm_bias": column_sum(dlast, cuts.lanes)}
        found = [f | own for f in found]
    return at, found


def table_gradients(
    model: ModelConfig, found: Sequence[Mapping[str, Words]], tokens: NDArray[np.integer], dx: Words
) -> list[dict[str, Words]]:
    """`found`, what `head` gives for the weights, with the gradients of each socket's rows of the tables, from `dx`, the
    gradient of the first layer's rows. A table that is the head's, too, has the sum of both; rows of learned positions
    are those of `dx`."""
    out = []
    for i, own in enumerate(found):
        rows = len(own["lm_head"])
        table = embedding_dw(tokens, dx, i * rows, rows)
        new = dict(own)
        if model.tie_embeddings:
            new["lm_head"] = round_bf16(_op("add", own["lm_head"], table))
        else:
            new["embedding"] = table
        out.append(new | ({"positions": dx} if model.position == "learned" else {}))
    return out
