"""The operator graph of one pass through a transformer: shapes, operations, bytes and data dependences.

`prefill` pushes a prompt through the model, `decode_step` one token per sequence. Attention is counted
exactly: a query attends to the keys at or before it, no further back than a sliding window reaches.

Operations (FLOPs) are 2 per multiply-accumulate, plus, per operator:

| operator                | other FLOPs                                                                     |
|-------------------------|---------------------------------------------------------------------------------|
| bias                    | 1 per output element                                                            |
| layernorm over n        | 7 n + 4: sum, subtract, square, accumulate, scale, gain, bias; means, eps, rsqrt |
| rmsnorm over n          | 4 n + 3: square, accumulate, scale, gain; mean, eps, rsqrt                       |
| rotary                  | 3 per element: 4 multiplications and 2 additions rotate a pair                  |
| softmax                 | 6 per score: 1/sqrt(d) scale, maximum, subtract, exp, sum, divide; +1 for ALiBi |
| activation              | 1 per element, whatever the function                                            |
| multiply, add           | 1 per element                                                                   |
| router                  | softmax: 5 per expert and token                                                 |
| argmax                  | V - 1 comparisons per row                                                       |
"""

import operator
from collections.abc import Iterable
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Literal

from tilewright.arch.errors import UserError
from tilewright.workloads.models import ModelConfig


class OpKind(StrEnum):
    EMBED = "embed"
    NORM = "norm"
    LINEAR = "linear"
    ROTARY = "rotary"
    KV_APPEND = "kv_append"
    SCORES = "scores"
    SOFTMAX = "softmax"
    VALUES = "values"
    ACTIVATION = "activation"
    MULTIPLY = "multiply"
    ADD = "add"
    ROUTER = "router"
    LM_HEAD = "lm_head"
    ARGMAX = "argmax"


def _bytes(elements: int, bits: int) -> int:
    return -(-elements * bits // 8)


class _Traffic:
    """Element counts, read as bytes at a width of `bits` per element, rounded up to whole bytes."""

    weight_elements: int
    input_elements: int
    output_elements: int
    kv_read_elements: int
    kv_write_elements: int

    def weight_bytes(self, bits: int) -> int:
        return _bytes(self.weight_elements, bits)

    def input_bytes(self, bits: int) -> int:
        return _bytes(self.input_elements, bits)

    def output_bytes(self, bits: int) -> int:
        return _bytes(self.output_elements, bits)

    def kv_read_bytes(self, bits: int) -> int:
        return _bytes(self.kv_read_elements, bits)

    def kv_write_bytes(self, bits: int) -> int:
        return _bytes(self.kv_write_elements, bits)


@dataclass(frozen=True, kw_only=True)
class Operator(_Traffic):
    """One operator: `instances` products of shape (m, k) x (k, n), or of m rows of n elements (k = 0)."""

    name: str
    kind: OpKind
    layer: int
    """-1 outside the layers."""
    inputs: tuple[int, ...]
    """Indices in the graph of the operators that it reads from; the graph's own input is not listed."""
    m: int
    k: int = 0
    n: int
    instances: int = 1
    """Heads x batch in attention; expert slots per token in a mixture of experts."""
    macs: int = 0
    """Exact: below m k n instances where a causal mask or a window leaves keys out."""
    other_flops: int = 0
    bias: bool = False
    weight_elements: int = 0
    """Parameters read. An embedding reads one row per token. Experts: the most that the router can choose,
    min(experts, tokens x experts per token); the number really chosen is known only with values."""
    input_elements: int = 0
    """Activations read, KV cache excluded."""
    output_elements: int = 0
    """Activations produced, KV cache excluded."""
    kv_read_elements: int = 0
    """Distinct cached keys or values attended to, those of the new tokens included."""
    kv_write_elements: int = 0

    @property
    def weight(self) -> bool:
        """Whether it reads parameters."""
        return self.weight_elements > 0

    @property
    def flops(self) -> int:
        return 2 * self.macs + self.other_flops


@dataclass(frozen=True, kw_only=True)
class Graph(_Traffic):
    """Operators in an order in which every producer comes before its consumers, and their totals."""

    model: ModelConfig
    phase: Literal["prefill", "decode"]
    tokens: int
    """New tokens per sequence."""
    context: int
    """Tokens per sequence that are cached already."""
    batch: int
    operators: tuple[Operator, ...]

    @property
    def macs(self) -> int:
        return sum(op.macs for op in self.operators)

    @property
    def flops(self) -> int:
        return sum(op.flops for op in self.operators)

    @property
    def weight_elements(self) -> int:  # type: ignore[override]
        return sum(op.weight_elements for op in self.operators)

    @property
    def input_elements(self) -> int:  # type: ignore[override]
        return sum(op.input_elements for op in self.operators)

    @property
    def output_elements(self) -> int:  # type: ignore[override]
        return sum(op.output_elements for op in self.operators)

    @property
    def kv_read_elements(self) -> int:  # type: ignore[override]
        return sum(op.kv_read_elements for op in self.operators)

    @property
    def kv_write_elements(self) -> int:  # type: ignore[override]
        return sum(op.kv_write_elements for op in self.operators)


def _moved(op: Operator, layer: int, shift: int) -> Operator:
    """The same operator in another layer, `shift` places on; without the cost of __init__."""
    copy = object.__new__(Operator)
    copy.__dict__.update(op.__dict__, layer=layer, inputs=tuple(i + shift for i in op.inputs))
    return copy


def attended_pairs(tokens: int, context: int, window: int | None) -> int:
    """(query, key) pairs of `tokens` queries behind `context` cached ones: sum of min(context + i, window).

    >>> attended_pairs(4, 0, None), attended_pairs(4, 0, 2), attended_pairs(1, 9, None)
    (10, 7, 10)
    """
    growing = tokens if window is None else min(tokens, max(0, window - context))
    pairs = growing * context + growing * (growing + 1) // 2
    return pairs if window is None else pairs + (tokens - growing) * window


class _Builder:
    """Appends operators; every method returns the index of its result."""

    def __init__(self, model: ModelConfig, tokens: int, context: int, batch: int) -> None:
        self.model, self.tokens, self.context, self.batch = model, tokens, context, batch
        self.rows = batch * tokens
        self.layer = -1
        self.operators: list[Operator] = []
        self.first_alike: dict[tuple[int | None, bool], range] = {}

    def emit(self, name: str, kind: OpKind, inputs: Iterable[int | None], **fields: Any) -> int:
        present = tuple(i for i in inputs if i is not None)
        self.operators.append(Operator(name=name, kind=kind, layer=self.layer, inputs=present, **fields))
        return len(self.operators) - 1

    def elementwise(
        self, name: str, kind: OpKind, inputs: Iterable[int | None], rows: int, width: int, operands: int = 1
    ) -> int:
        size = rows * width
        return self.emit(
            name, kind, inputs, m=rows, n=width, other_flops=size, input_elements=operands * size,
            output_elements=size,
        )  # fmt: skip

    def linear(
        self, name: str, x: int | None, rows: int, k: int, n: int, *, bias: bool = False,
        kind: OpKind = OpKind.LINEAR, other_flops: int = 0, groups: int = 1,
    ) -> int:  # fmt: skip
        """A product; of sparse weights that of each of `groups`, side by side."""
        return self.emit(
            name, kind, (x,), m=rows, k=k // groups, n=n // groups, instances=groups, macs=rows * k * n // groups,
            other_flops=other_flops + bias * rows * n, bias=bias, weight_elements=k * n // groups + bias * n,
            input_elements=rows * k, output_elements=rows * n,
        )  # fmt: skip

    def layer_linear(self, *args: Any, **fields: Any) -> int:
        """A product of a layer, whose weights may be sparse."""
        return self.linear(*args, **fields, groups=self.model.weight_groups)

    def experts(self, name: str, inputs: Iterable[int | None], k: int, n: int, reads: int) -> int:
        """A matrix per expert; each token goes through `experts_per_token` of them, chosen by the router."""
        slots, bias = self.model.experts_per_token, self.model.mlp_bias
        touched = min(self.model.experts, slots * self.rows)
        out = slots * self.rows * n
        return self.emit(
            name, OpKind.LINEAR, inputs, m=self.rows, k=k, n=n, instances=slots, macs=out * k,
            other_flops=bias * out, bias=bias, weight_elements=touched * (k * n + bias * n),
            input_elements=reads, output_elements=out,
        )  # fmt: skip

    def norm(self, name: str, x: int | None, rows: int, width: int, kind: str | None = None) -> int:
        layernorm = (kind or self.model.norm) == "layernorm"
        flops = 7 * width + 4 if layernorm else 4 * width + 3
        return self.emit(
            name, OpKind.NORM, (x,), m=rows, n=width, other_flops=rows * flops, bias=layernorm,
            weight_elements=2 * width if layernorm else width,
            input_elements=rows * width, output_elements=rows * width,
        )  # fmt: skip

    def embedding(self) -> int:
        model, rows = self.model, self.rows
        size = rows * model.d_embed
        x = self.emit(
            "embedding", OpKind.EMBED, (), m=rows, n=model.d_embed, weight_elements=size, output_elements=size
        )
        if model.d_embed != model.d_model:
            x = self.linear("embedding_in", x, rows, model.d_embed, model.d_model)
        for name, table in (("positions", model.position_rows), ("token_types", model.token_types)):
            if table:
                size = rows * model.d_model
                x = self.emit(
                    name, OpKind.ADD, (x,), m=rows, n=model.d_model, other_flops=size, weight_elements=size,
                    input_elements=size, output_elements=size,
                )  # fmt: skip
        if model.embedding_norm:
            x = self.norm("embedding_norm", x, rows, model.d_model)
        return x

    def attention(self, x: int | None) -> int:
        model, rows, tokens, batch = self.model, self.rows, self.tokens, self.batch
        q, kv, dim = model.q_dim, model.kv_dim, model.head_dim
        heads = batch * model.heads
        window = model.window(self.layer)
        if model.causal:
            pairs = attended_pairs(tokens, self.context, window)
            keys = self.context + tokens
            if window is not None:  # the first query reaches back window - 1 tokens, the last one sees itself
                keys = min(keys, tokens + window - 1)
        else:
            pairs, keys = tokens * tokens, tokens
        scores = heads * pairs
        # A decoder reads K and V from its cache, an encoder straight from the projection.
        cached = batch * keys * kv if model.causal else 0
        direct = 0 if model.causal else rows * kv

        qkv = self.layer_linear("qkv", x, rows, model.d_model, q + 2 * kv, bias=model.qkv_bias)
        query = qkv
        if model.qk_norm:
            query = self.emit(
                "qk_norm", OpKind.NORM, (query,), m=rows * (model.heads + model.kv_heads), n=dim,
                other_flops=rows * (model.heads + model.kv_heads) * (4 * dim + 3), weight_elements=2 * dim,
                input_elements=rows * (q + kv), output_elements=rows * (q + kv),
            )  # fmt: skip
        if model.position == "rotary":
            size = rows * (q + kv)
            query = self.emit(
                "rotary", OpKind.ROTARY, (query,), m=rows, n=q + kv, other_flops=3 * size,
                input_elements=size, output_elements=size,
            )  # fmt: skip
        source = query
        if model.causal:
            size = rows * 2 * kv
            source = self.emit(
                "kv_append", OpKind.KV_APPEND, sorted({qkv, query}), m=rows, n=2 * kv, input_elements=size,
                kv_write_elements=size,
            )  # fmt: skip
        weights = self.emit(
            "scores", OpKind.SCORES, sorted({query, source}), m=tokens, k=dim, n=keys, instances=heads,
            macs=scores * dim, input_elements=rows * q + direct, output_elements=scores,
            kv_read_elements=cached,
        )  # fmt: skip
        weights = self.emit(
            "softmax", OpKind.SOFTMAX, (weights,), m=tokens, n=keys, instances=heads,
            other_flops=scores * (7 if model.position == "alibi" else 6), input_elements=scores,
            output_elements=scores,
        )  # fmt: skip
        x = self.emit(
            "values", OpKind.VALUES, sorted({weights, source}), m=tokens, k=keys, n=dim, instances=heads,
            macs=scores * dim, input_elements=scores + direct, output_elements=rows * q,
            kv_read_elements=cached,
        )  # fmt: skip
        if model.sub_norms:
            x = self.norm("attention_sub_norm", x, rows, q)
        return self.layer_linear("attention_out", x, rows, q, model.d_model, bias=model.attention_out_bias)

    def dense_mlp(self, x: int | None, width: int, prefix: str = "") -> int:
        model, rows, d, bias = self.model, self.rows, self.model.d_model, self.model.mlp_bias
        if model.gated_mlp:
            up = self.layer_linear(prefix + "gate_up", x, rows, d, 2 * width, bias=bias)
            h = self.elementwise(prefix + "activation", OpKind.ACTIVATION, (up,), rows, width)
            h = self.elementwise(prefix + "gate", OpKind.MULTIPLY, (up, h), rows, width, 2)
        else:
            up = self.layer_linear(prefix + "up", x, rows, d, width, bias=bias)
            h = self.elementwise(prefix + "activation", OpKind.ACTIVATION, (up,), rows, width)
        if model.sub_norms:
            h = self.norm("mlp_sub_norm", h, rows, width)
        return self.layer_linear(prefix + "down", h, rows, width, d, bias=bias)

    def moe_mlp(self, x: int | None) -> int:
        """Every routed expert is gated, as in all families that have experts."""
        model, rows, d, width = self.model, self.rows, self.model.d_model, self.model.d_expert
        slots = model.experts_per_token
        router = self.linear(
            "router", x, rows, d, model.experts, kind=OpKind.ROUTER, other_flops=5 * rows * model.experts
        )
        up = self.experts("expert_gate_up", (x, router), d, 2 * width, rows * d)
        h = self.elementwise("expert_activation", OpKind.ACTIVATION, (up,), slots * rows, width)
        h = self.elementwise("expert_gate", OpKind.MULTIPLY, (up, h), slots * rows, width, 2)
        h = self.experts("expert_down", (router, h), width, d, slots * rows * width)
        scaled = self.emit(
            "expert_scale", OpKind.MULTIPLY, (router, h), m=slots * rows, n=d, other_flops=slots * rows * d,
            input_elements=slots * rows * (d + 1), output_elements=slots * rows * d,
        )  # fmt: skip
        y = scaled
        if slots > 1:
            y = self.emit(
                "expert_sum", OpKind.ADD, (scaled,), m=rows, n=d, other_flops=(slots - 1) * rows * d,
                input_elements=slots * rows * d, output_elements=rows * d,
            )  # fmt: skip
        if model.d_shared_expert:
            shared = self.dense_mlp(x, model.d_shared_expert, "shared_")
            gate = self.linear("shared_expert_gate", x, rows, d, 1, other_flops=rows)  # and its sigmoid
            shared = self.emit(
                "shared_scale", OpKind.MULTIPLY, (shared, gate), m=rows, n=d, other_flops=rows * d,
                input_elements=rows * (d + 1), output_elements=rows * d,
            )  # fmt: skip
            y = self.add("shared_add", y, shared)
        return y

    def mlp(self, x: int | None) -> int:
        return self.moe_mlp(x) if self.model.is_moe(self.layer) else self.dense_mlp(x, self.model.d_ff)

    def add(self, name: str, a: int | None, b: int | None) -> int:
        return self.elementwise(name, OpKind.ADD, (a, b), self.rows, self.model.d_model, 2)

    def transformer_layer(self, x: int | None) -> int:
        model, rows, d = self.model, self.rows, self.model.d_model
        if model.parallel_attention:
            h = self.norm("attention_norm", x, rows, d)
            attention = self.attention(h)
            if model.parallel_norms == 2:
                h = self.norm("mlp_norm", x, rows, d)
            both = self.add("branch_add", attention, self.mlp(h))
            return self.add("residual_add", x, both)
        if model.post_norm:
            x = self.norm("attention_norm", self.add("attention_add", x, self.attention(x)), rows, d)
            return self.norm("mlp_norm", self.add("mlp_add", x, self.mlp(x)), rows, d)
        x = self.add("attention_add", x, self.attention(self.norm("attention_norm", x, rows, d)))
        return self.add("mlp_add", x, self.mlp(self.norm("mlp_norm", x, rows, d)))

    def add_layer(self, layer: int, x: int | None) -> int:
        """The layer, as a copy of an earlier one where their shapes agree: deep models are built often."""
        self.layer = layer
        alike = (self.model.window(layer), self.model.is_moe(layer))
        if alike in self.first_alike:
            span = self.first_alike[alike]
            shift = len(self.operators) - span.start
            self.operators += [_moved(self.operators[i], layer, shift) for i in span]
            return len(self.operators) - 1
        start = len(self.operators)
        x_out = self.transformer_layer(x)
        if x is not None:  # a layer that reads the graph's own input has no producer to shift
            self.first_alike[alike] = range(start, len(self.operators))
        return x_out

    def head(self, x: int | None) -> None:
        """The next token of each sequence, from its last position."""
        model, rows = self.model, self.batch
        if model.final_norm:
            x = self.norm("final_norm", x, rows, model.d_model)
        if model.d_embed != model.d_model:
            x = self.linear("embedding_out", x, rows, model.d_model, model.d_embed)
        x = self.linear("lm_head", x, rows, model.d_embed, model.vocab, kind=OpKind.LM_HEAD)
        self.emit(
            "argmax", OpKind.ARGMAX, (x,), m=rows, n=model.vocab, other_flops=rows * (model.vocab - 1),
            input_elements=rows * model.vocab, output_elements=rows,
        )  # fmt: skip


def _whole(name: str, value: object, least: int) -> int:
    try:
        number = operator.index(value)  # type: ignore[arg-type]
    except TypeError:
        number = least - 1
    if isinstance(value, bool) or number < least:
        raise UserError(f"{name} must be a whole number of at least {least}, not {value!r}")
    return number


def _build(
    model: ModelConfig, phase: Literal["prefill", "decode"], tokens: int, context: int, batch: int,
    lm_head: bool, embedding: bool,
) -> Graph:  # fmt: skip
    total = context + tokens
    if model.positions is not None and total > model.positions:
        raise UserError(
            f"{model.name} has {model.positions} positions: {context} cached + {tokens} new tokens "
            f"are {total - model.positions} too many"
        )
    builder = _Builder(model, tokens, context, batch)
    x = builder.embedding() if embedding else None
    for layer in range(model.layers):
        x = builder.add_layer(layer, x)
    builder.layer = -1
    if lm_head and model.causal:
        builder.head(x)
    return Graph(
        model=model, phase=phase, tokens=tokens, context=context, batch=batch,
        operators=tuple(builder.operators),
    )  # fmt: skip


def decode_step(
    model: ModelConfig, *, context: int, batch: int = 1, lm_head: bool = True, embedding: bool = True
) -> Graph:
    """One new token for each of `batch` sequences, attending to `context` cached tokens and itself.

    Without `lm_head` the graph ends at the last layer (no final norm); without `embedding` it starts there.
    Raises UserError for an encoder, for numbers out of range, and past the model's last position.
    """
    context, batch = _whole("context", context, 0), _whole("batch", batch, 1)
    if not model.causal:
        raise UserError(f"{model.name} is an encoder ({model.family}): it has no decode step, only a prefill")
    return _build(model, "decode", 1, context, batch, lm_head, embedding)


def prefill(
    model: ModelConfig, *, prompt: int, context: int = 0, batch: int = 1, lm_head: bool = True,
    embedding: bool = True,
) -> Graph:  # fmt: skip
    """`prompt` new tokens for each of `batch` sequences behind `context` cached ones; LM head for the last.

    An encoder sees all tokens from every token, keeps no cache and has no head. `lm_head`, `embedding`
    and errors as in `decode_step`.
    """
    prompt, context, batch = (
        _whole("prompt", prompt, 1),
        _whole("context", context, 0),
        _whole("batch", batch, 1),
    )
    if context and not model.causal:
        raise UserError(f"{model.name} is an encoder ({model.family}): context must be 0, not {context}")
    return _build(model, "prefill", prompt, context, batch, lm_head, embedding)
