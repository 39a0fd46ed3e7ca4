"""A training step: the operators of a layer's backward pass and of the optimizer, as stages of sections.

Weights and their gradients lie off chip as activations do, blocks of rows, column by column, so that one copy serves
all: a product takes it across a diagonal stripe of a memory unit's banks, the gradient of the product's input takes it
as it comes, and the optimizer element by element. The gradient of a weight is a product, too: blocks of the columns of
x, which a diagonal stripe turns, by the gradient of y, which stays in memory units.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from itertools import accumulate
from math import lcm
from typing import Any

import numpy as np

from tilewright.arch.errors import UserError
from tilewright.arch.rdu import RduParams
from tilewright.mappers.rdu.allocate import Demand
from tilewright.mappers.rdu.layer import Op, Share, layer_operators, summed
from tilewright.mappers.rdu.pieces import GELU_CUBIC, GELU_SCALE, LOWEST, cached, has_bias
from tilewright.mappers.rdu.rows import Rows
from tilewright.mappers.rdu.sparse import (
    BACK,
    GRADIENT,
    SPARSE,
    TO_STREAM,
    Piece,
    Range,
    Term,
    back_in_order,
    groups_of,
    pieces,
)
from tilewright.mappers.rdu.stages import BF16_BYTES, Flow, Pipeline, ceil_div, constant, stage
from tilewright.workloads.models import ModelConfig

__all__ = [
    "BETAS", "DECAY", "EPS", "PHASE", "SAVED", "WORDS", "Training", "accumulation", "backward", "check", "end_parameters",
    "forward", "gradient_shape", "head", "head_gradients", "optimizer", "parameters", "place", "shape", "table_gradients",
    "vocabulary", "weight_gradients",
]  # fmt: skip

PHASE = "train"
BETAS, EPS, DECAY = (0.9, 0.95), 1e-5, 0.1
"""Of AdamW, as Llama 2 was trained (Touvron et al. 2023, arXiv 2307.09288, section 2.2)."""
TINY = 1e-30
"""The least second moment that a root is taken of."""
SAVED = ("h", "q", "a", "y", "h2", "gate_out", "up_out", "f")
"""What the forward pass keeps of a layer, beside its rows and the keys and values."""
WORDS = ("tokens", "targets", "loss.top", "loss.total", "loss.target")
"""Of each row: what the host gives, and what it makes the loss of."""
STATISTICS = ("top", "inverse", "dot")
"""Of each head and row: the largest score, the inverse sum of powers, and the sum of da * a."""
OPTIMIZED = ("grad", "sum", "first", "second", "root", "step", "master", "copy")
"""Of each weight: its gradient, that of all sequences, both moments, what a step is made of, itself in float32, and as the layer takes it."""
GAINS = ("attention_norm", "mlp_norm")
NORMS = (*GAINS, "final_norm")
BIAS = "_bias"
ENDS = ("final_norm", f"final_norm{BIAS}", "lm_head", "embedding", "positions")
"""Weights that are no layer's."""
TABLES = ("cos", "sin", "sin.back", "rate", "tokens", "targets", "limit")
ELEMENTS = ("share", "accumulate", "moment", "root", "step", "update", "round")
"""Kinds of operators that take each element by itself."""
WIDE = (8, 6, 4, 3, 2, 1)
"""Groups of blocks that such operators are dealt out to, the first for which there are gates to memory."""


def check(share: Share, p: RduParams, whole: bool = True) -> None:
    """Raises UserError for models that are not trained here, and shares of them that are no whole vectors.

    `whole`: with what is before and behind the layers.
    """
    model, lanes = share.model, p.lanes
    for what, there in (
        ("mixtures of experts", model.experts),
        ("encoders", not model.causal),
        ("attention beside the MLP, or norms behind them", model.parallel_attention or model.post_norm),
        ("heads that share keys", model.kv_heads != model.heads),
        ("sliding windows", model.windowed_layers),
        ("linear biases of positions", model.position == "alibi"),
        ("a norm of embeddings, or embeddings of another width", whole and (model.embedding_norm or model.d_embed != model.d_model)),
        (f"activation {model.activation}", model.activation != "silu" if model.gated_mlp else "gelu" not in model.activation),
    ):  # fmt: skip
        if there:
            raise UserError(f"{model.name}: target rdu does not train {what}")
    groups = model.weight_groups
    for what, n in (("heads", share.q_dim), ("the MLP", share.inner)):
        if n % groups:
            raise UserError(
                f"{model.name}: {n} columns of {what} on a socket are no multiple of {groups} groups of weights"
            )
    for name in (*parameters(model), *(end_parameters(model) if whole else ())):
        rows, columns = shape(share, name, p)
        if groups > 1 and name in SPARSE:  # a group's columns need not be whole vectors
            rows, columns = rows // groups, 0
            if rows % lanes == 0 and rows > lanes and rows // lanes % 2:
                raise UserError(
                    f"{model.name}: {rows} rows of a group of {name} are no even number of blocks of {lanes}, as training needs"
                )
        for n, what in ((rows, "rows"), (columns, "columns")):
            if name not in NORMS and not name.endswith(BIAS) and n % lanes:
                raise UserError(
                    f"{model.name}: {n} {what} of {name} on a socket are no multiple of the {lanes} lanes, as training needs"
                )


def forward(model: ModelConfig, sockets: int = 1) -> list[Op]:
    """The operators of a layer, from matrix `x` to matrix `z`."""
    return [_as_stored(model, op) for op in layer_operators(model, sockets)]


def _as_stored(model: ModelConfig, op: Op) -> Op:
    """A product as its weights lie: sparse ones have the residual stream's side as rows, so that some are transposed."""
    kinds = {"product": "product_dx", "product_dx": "product"}
    if model.weight_groups > 1 and op.name.removesuffix(BACK) in TO_STREAM:
        return replace(op, kind=kinds[op.kind])
    return op


def backward(model: ModelConfig, sockets: int = 1) -> list[list[Op]]:
    """The operators from the gradient of `z` to that of `x`, in groups of which each needs all rows of those before."""
    gated = model.gated_mlp
    inner = ("gate", "up") if gated else ("up",)
    outs = tuple(f"{name}_out" for name in inner)
    slopes = tuple(f"d{name}" for name in inner)
    total = "dh2" if sockets == 1 else "dh2_part"
    parts = [f"dh2_{name}" for name in inner] if gated else [total]

    def reduced(op: Op) -> list[Op]:
        return summed(op, sockets)

    mlp = [
        Op("down_dx", "product_dx", ("dz",), ("df",)),
        Op("activation_dx", "activation_dx", ("df", *outs), slopes),
    ]
    if gated:
        mlp += [
            Op(f"{name}_dx", "product_dx", (d,), (out,))
            for name, d, out in zip(inner, slopes, parts, strict=True)
        ]
        mlp += reduced(Op("mlp_dx", "add", tuple(parts), ("dh2",)))
    else:
        mlp += reduced(Op("up_dx", "product_dx", slopes, ("dh2",)))
    mlp += [
        Op("mlp_norm_dx", "norm_dx", ("y", "dh2"), ("dn2", "mlp_norm.products")),
        Op("mlp_add_dx", "add", ("dz", "dn2"), ("dy",)),
    ]
    groups = [
        [
            *mlp,
            Op("attention_out_dx", "product_dx", ("dy",), ("da",)),
            Op("attention_dq", "attention_dq", ("q", "da", "a"), ("dq",)),
        ],
        [Op("attention_dkv", "attention_dkv", ("q", "da"), ("dk", "dv"))],
        [
            Op("rotary_dx", "positions_dx", ("dq", "dk", "dv"), ("dqkv",)),
            *reduced(Op("qkv_dx", "product_dx", ("dqkv",), ("dh",))),
            Op("attention_norm_dx", "norm_dx", ("x", "dh"), ("dn", "attention_norm.products")),
            Op("attention_add_dx", "add", ("dy", "dn"), ("dx",)),
        ],
    ]
    return [[_as_stored(model, op) for op in some] for some in groups]


def weight_gradients(model: ModelConfig) -> list[Op]:
    """An operator for each weight of a layer, of whose rows nothing is in common."""
    inputs = {"qkv": ("h", "dqkv"), "attention_out": ("a", "dy"), "up": ("h2", "dup"), "down": ("f", "dz")}
    if model.gated_mlp:
        inputs["gate"] = ("h2", "dgate")
    sums = {name: f"{name}.products" for name in GAINS}
    sums |= {
        f"{name}{BIAS}": {"attention_norm": "dh", "mlp_norm": "dh2"}.get(name) or inputs[name][1]
        for name in biased(model)
    }
    if model.weight_groups > 1:  # as their weights lie
        inputs |= {name: inputs[name][::-1] for name in TO_STREAM}
    return [Op(f"{name}_dw", "product_dw", pair, (f"{name}.grad",)) for name, pair in inputs.items()] + [
        Op(f"{name}_dw", "column_sum", (of,), (f"{name}.grad",)) for name, of in sums.items()
    ]


def head(model: ModelConfig, sockets: int = 1) -> list[Op]:
    """The operators from what the last layer gives, `x`, to its gradient, `dx`.

    The head's weight lies as a table of embeddings does, a row for each token, so that it can be one with it: of its two
    products the first one takes it transposed.
    """
    norm = model.final_norm
    last, slope = ("last", "dlast") if norm else ("x", "dx")
    return [
        *([Op("final_norm", "norm", ("x",), ("last",))] if norm else []),
        Op("lm_head", "product_dx", (last,), ("logits",)),
        Op("loss", "loss", ("logits",), ("dlogits",)),
        *summed(Op("lm_head_dx", "product", ("dlogits",), (slope,)), sockets),
        *([Op("final_norm_dx", "norm_dx", ("x", "dlast"), ("dx", "final_norm.products"))] if norm else []),
    ]


def head_gradients(model: ModelConfig) -> list[Op]:
    """Gradients of the weights behind the layers. A table that is the head's, too, gets both gradients' sum."""
    tied = model.tie_embeddings
    out = [
        Op(
            "lm_head_dw",
            "product_dw",
            ("dlogits", "last" if model.final_norm else "x"),
            ("dhead" if tied else "lm_head.grad",),
        )
    ]
    if model.final_norm:
        out.append(Op("final_norm_dw", "column_sum", ("final_norm.products",), ("final_norm.grad",)))
        if model.norm == "layernorm":
            out.append(Op(f"final_norm{BIAS}_dw", "column_sum", ("dlast",), (f"final_norm{BIAS}.grad",)))
    return out


def table_gradients(model: ModelConfig) -> list[Op]:
    """Gradients of the tables that the first layer's rows come from, of tokens and of learned positions."""
    tied = model.tie_embeddings
    out = [Op("embedding_dw", "embedding_dw", ("dx",), ("dtable" if tied else "embedding.grad",))]
    if tied:
        out.append(Op("tied_dw", "add", ("dhead", "dtable"), ("lm_head.grad",)))
    if model.position == "learned":
        out.append(Op("positions_dw", "add", ("dx",), ("positions.grad",)))
    return out


def end_parameters(model: ModelConfig) -> list[str]:
    """The weights that are no layer's; a table that is the head's, too, goes by the head's name."""
    return [
        *(["final_norm"] if model.final_norm else []),
        *([f"final_norm{BIAS}"] if model.final_norm and model.norm == "layernorm" else []),
        "lm_head",
        *([] if model.tie_embeddings else ["embedding"]),
        *(["positions"] if model.position == "learned" else []),
    ]


def vocabulary(share: Share, p: RduParams) -> int:
    """Tokens of a socket: whole vectors in each part of a row of logits. What is beyond the vocabulary is masked."""
    own = ceil_div(share.model.vocab, share.sockets)
    parts = ceil_div(own, p.banks * p.bank_words // max(2 * p.lanes, p.stages))
    return ceil_div(own, parts * p.lanes) * parts * p.lanes


def accumulation(name: str, first: bool) -> Op:
    """A sequence's part of a weight's gradient, which is the sequences' mean, added to those before in float32."""
    if first:
        return Op(f"{name}_share", "share", (f"{name}.grad",), (f"{name}.sum.new",))
    return Op(f"{name}_accumulate", "accumulate", (f"{name}.sum", f"{name}.grad"), (f"{name}.sum.new",))


def optimizer(name: str, gradient: str = "grad") -> list[Op]:
    """AdamW over the elements of a weight: new moments, weights, and the weights that the layer takes."""
    steps = [
        ("first_moment", "moment", ("first", gradient), "first.new"),
        ("second_moment", "moment", ("second", gradient), "second.new"),
        ("root", "root", ("second.new",), "root"),
        ("step", "step", ("root", "first.new"), "step"),
        ("update", "update", ("master", "step"), "master.new"),
        ("round", "round", ("master.new",), "copy"),
    ]
    return [
        Op(f"{name}_{what}", kind, tuple(f"{name}.{t}" for t in reads), (f"{name}.{out}",))
        for what, kind, reads, out in steps
    ]


def shape(share: Share, name: str, p: RduParams) -> tuple[int, int]:
    """Rows and columns of a weight on a socket; of a gain or bias, as many columns of a vector's lanes as it takes."""
    d = share.model.d_model
    if name.endswith(BIAS):
        of = name.removesuffix(BIAS)
        return p.lanes, (d if of in NORMS else _widths(share, of)[1]) // p.lanes
    if name in ("lm_head", "embedding", "tied"):
        return vocabulary(share, p), d
    if name == "positions":
        return ceil_div(share.model.positions or 0, p.lanes) * p.lanes, d
    if name in NORMS:
        return p.lanes, d // p.lanes
    rows, columns = _widths(share, name)
    if (groups := share.model.weight_groups) > 1:
        return d, (rows if name in TO_STREAM else columns) // groups
    return rows, columns


def _widths(share: Share, name: str) -> tuple[int, int]:
    """Columns of the input and of the result of a layer's product on a socket."""
    d, q, inner = share.model.d_model, share.q_dim, share.inner
    return {
        "qkv": (d, q + 2 * share.kv_dim), "attention_out": (q, d), "gate": (d, inner), "up": (d, inner), "down": (inner, d),
    }[name]  # fmt: skip


def gradient_shape(share: Share, op: Op, tokens: int, p: RduParams) -> tuple[int, int]:
    """Rows and columns over which an operator gives a weight's gradient: of learned positions, only those that there are;
    of sparse weights all groups side by side."""
    rows, columns = shape(share, op.name.removesuffix(GRADIENT), p)
    return (tokens if op.name == "positions_dw" else rows // groups_of(share.model, op)), columns


def biased(model: ModelConfig) -> list[str]:
    """The operators of a layer that add a bias."""
    inner = ("gate", "up") if model.gated_mlp else ("up",)
    return [
        *(GAINS if model.norm == "layernorm" else ()),
        *(["qkv"] if model.qkv_bias else []),
        *(["attention_out"] if model.attention_out_bias else []),
        *((*inner, "down") if model.mlp_bias else ()),
    ]


def parameters(model: ModelConfig) -> list[str]:
    """The weights of a layer."""
    return [
        *GAINS,
        *(f"{name}{BIAS}" for name in biased(model)),
        "qkv",
        "attention_out",
        *(["gate"] if model.gated_mlp else []),
        "up",
        "down",
    ]


def _optimized(tensor: str) -> str:
    """What of a weight a matrix is, by its name: "qkv.first.new" is what comes in the place of "qkv.first"."""
    return tensor.partition(".")[2].removesuffix(".new")


def place(tensor: str, layer: int) -> tuple[str, tuple[str, str, int]]:
    """The part of the memory that a tensor belongs to, and its key there: what is new has the place of what was."""
    name, _, what = tensor.partition(".")
    if name in ENDS:
        layer = -1
    if tensor in TABLES:
        return "tables", (PHASE, tensor, -1)
    if tensor in ("keys", "values"):
        return "cache", ("cache", tensor, layer)
    if what == "copy":
        kind = "gain" if name in NORMS else "bias" if name.endswith(BIAS) else "w"
        return "weights", (PHASE, f"{name.removesuffix(BIAS)}.{kind}", layer)
    if what in ("w", "gain", "bias") or _optimized(tensor) in ("sum", "first", "second", "master"):
        return "weights", (PHASE, f"{name}.{what.removesuffix('.new')}", layer)
    if tensor in ("x", "z"):
        return "rows", ("rows", "x", layer + (tensor == "z"))
    if tensor in ("dx", "dz"):
        return "rows", ("rows", "dx", (layer + (tensor == "dz")) % 2)
    return "rows", ("rows", tensor, layer if tensor in SAVED else -1)


class Training(Rows):
    """Rows with weights that lie as activations do, and the operators of a training step; `attended` are the rows.

    A gradient is the mean over `sequences`.
    """

    def __init__(self, *args: Any, sequences: int = 1, **fields: Any) -> None:
        super().__init__(*args, **fields)
        self.sequences = sequences

    DIRECT = ("product_dw", "attention_dkv", "column_sum", "embedding_dw")

    def words(self, tensor: str) -> bool:
        """Whether a matrix is float32 off chip: what the optimizer keeps, but for what the layer gives and takes."""
        what = _optimized(tensor)
        return what in OPTIMIZED and what not in ("grad", "copy")

    def build(self, ops: Sequence[Op], keep: Iterable[str], layer: str = "") -> Pipeline:
        """As `Rows`; the cache has no room for rows that fill up blocks."""
        rows = self.tiles.groups * self.tiles.blocks * self.p.lanes
        if any(op.kind == "positions" for op in ops) and rows != self.keys:
            raise UserError(
                f"{self.keys} tokens are not {rows} rows: {self.tiles.groups} groups of even blocks"
            )
        return super().build(ops, keep, layer)

    def columns(self, tensor: str) -> int:
        """Columns of a matrix."""
        s = self.share
        known = {"dq": s.q_dim, "dk": s.kv_dim, "dv": s.kv_dim, "da": s.q_dim, "dqkv": s.q_dim + 2 * s.kv_dim}
        known |= dict.fromkeys(("df", "dgate", "dup"), s.inner)
        known |= dict.fromkeys(("logits", "dlogits"), vocabulary(s, self.p))
        name = tensor.split(".")[0]
        if _optimized(tensor) in OPTIMIZED:
            return shape(s, name, self.p)[1]
        return known[name] if name in known else super().columns(tensor)

    # ---- products -----------------------------------------------------------------------------------

    @property
    def grain(self) -> int:
        """Strips that are whole vectors of rows of a weight."""
        return lcm(self.p.stages, self.p.lanes) // self.p.stages

    def held(self, depth: int, grain: int = 1) -> int:
        """Strips of a product's weights that a memory unit holds: striped rows begin at powers of two."""
        most = super().held(depth, grain)
        while grain == 1 and most and depth << (most * self.p.stages - 1).bit_length() > self.line.capacity:
            most -= 1
        return most

    def demand(self, op: Op) -> tuple[Demand, int] | None:
        """As of `Rows`, and for the products of gradients."""
        if op.kind == "product_dx":
            outs = self.parts(self.columns(op.writes[0]))
            return self._demand(op, self._ranges(op), outs, self.grain)
        if op.kind in ("product_dw", "embedding_dw"):
            groups = groups_of(self.model, op)
            columns = self.columns(op.reads[-1]) // groups
            outs = self.parts(columns)
            strips = ceil_div(columns // outs, self.p.stages)
            return self._shares(op.name, self.keys, strips, outs * groups)
        return super().demand(op)

    def _ranges(self, op: Op) -> list[Range]:
        """The input of a gradient's product: each flow in equal ranges, of which memory units hold the weights."""
        columns, groups = self.columns(op.reads[0]), groups_of(self.model, op)
        flows = len(self.at[op.reads[0]]) if op.reads[0] in self.at else self.parts(columns)
        if op.reads[0] == "dqkv":
            flows = 3
        own = columns // flows
        cuts = 1
        while own % (cuts * groups) or not self.held(own // cuts // groups, self.grain):
            cuts += 1
            if cuts > own:
                raise UserError(f"{op.name}: no {self.grain} strips fit a PMU")
        each = own // cuts
        given = [f.columns for f in self.at.get(op.reads[0], ())] or [own] * flows
        firsts = accumulate(given, initial=0)
        return [
            Range(i, inside, first + inside, each)
            for i, (width, first) in enumerate(zip(given, firsts, strict=False))
            for inside in range(0, width, each)
        ]

    def _weights(self, op: Op, at: str, term: Term, strips: int, units: int) -> list[list[str]]:
        of = op.name.removesuffix(BACK)  # the head's gradient takes its weight as it is
        first = self._row(op.reads[0], op, term.x), term.y.at
        return self.line.striped(
            at, op.name, f"{of}.w", shape=shape(self.share, of, self.p), first=first, depth=term.x.count,
            columns=term.y.count, strips=strips, units=units, gates=self.tiles.gates,
        )  # fmt: skip

    def _row(self, tensor: str, op: Op, piece: Piece) -> int:
        """The first row of an operator's weights that belongs to a piece of a matrix."""
        return piece.group * (self.columns(tensor) // groups_of(self.model, op)) + piece.at

    def _product_dx(self, op: Op) -> None:
        """A product with the transposed weights: the gradient of a product's input, by that of its result; or a product
        whose weights lie transposed, and a bias."""
        line, name = self.line, op.name
        weight = name.removesuffix(BACK)
        dy = self.at[op.reads[0]]
        columns = self.columns(op.writes[0])
        outs, groups = self.parts(columns), groups_of(self.model, op)
        ranges = self._ranges(op)
        result = []
        for o in range(outs):
            n = columns // outs
            products = self._terms(op, ranges, outs, o)
            size, wide = self.p.stages * self.grain, products[0][0].y.count
            each, units = self.split(name, ceil_div(wide, size), outs * len(products) * len(products[0]))
            each = min(each * self.grain, ceil_div(wide, self.p.stages))  # a single unit may have fewer
            pitch = self._pitch(products[0], each)
            order = back_in_order(name, len(products[0]), wide, pitch)
            sums = []
            for some in products:
                flows, ats = [], []
                for k, t in enumerate(some):
                    source = t.source
                    at = f"{name}.{o}.{source.part}.{source.inside}" + (f".{t.x.group}" if groups > 1 else "")
                    r = line.read(
                        f"{at}.x", name, dy[source.part], [(t.x.count, t.x.step), (each, 0)], first=source.inside + t.x.first
                    )  # fmt: skip
                    w = line.across(
                        at, name, f"{weight}.w", shape=shape(self.share, weight, self.p),
                        first=(self._row(op.writes[0], op, t.y), t.x.at), depth=t.x.count, columns=wide, strips=each,
                        units=units, gates=self.tiles.gates,
                    )  # fmt: skip
                    flows.append(
                        line.product(at, name, r, t.x.count, each, w, wide, rounded=False, sequence=k * pitch)
                    )
                    ats.append(at)
                sums.append(line.read(f"{ats[0]}.sum", name, Flow.of(flows, len(flows) * pitch), order))
            if has_bias(self.model, name):
                sums.append(
                    line.broadcast(f"{name}.bias{o}", name, f"{name}.bias", n, offset=o * n * BF16_BYTES)
                )
            flows = self._total(f"{name}.{o}", name, sums, packets=n)
            result.append(
                line.simd(
                    f"{name}.{o}.total", name, [(f, 0) for f in flows], self._joined(len(flows)), n, result=4, round=1
                )
            )  # fmt: skip
        self.at[op.writes[0]] = result

    def _product_dw(self, op: Op) -> None:
        """The gradient of a weight: blocks are of its rows, sums over all tokens.

        Of sparse weights each group has units of its own, which give its rows.
        """
        x, dy = op.reads
        inner, groups = self.columns(x), groups_of(self.model, op)
        turns = op.name.removesuffix(GRADIENT) not in TO_STREAM  # how the columns of x belong to groups
        rows = pieces(inner, groups, 0, inner, turns)
        columns = pieces(self.columns(dy), groups, 0, self.columns(dy), True)
        blocks = self.tiles.groups * self.tiles.blocks
        if groups > 1 and blocks * self.p.lanes != rows[0].count:
            # What fills up blocks would be written over the next group's rows.
            raise UserError(f"{op.name}: {rows[0].count} rows of a group of weights are not {blocks} blocks")
        result, places = [], []
        for a, b in zip(rows, columns, strict=True):

            def transposed(at: str, strips: int, a: Piece = a) -> Flow:
                return self.line.transposed(
                    f"{at}.x", op.name, x, rows=self.keys, columns=inner, strips=strips, first=a.first, step=a.step,
                    count=a.count,
                )  # fmt: skip

            at = op.name if groups == 1 else f"{op.name}.{a.group}"
            own = self._over_tokens(op, at, dy, b, groups, transposed)
            result += own
            places += [(a.group * a.count, i * own[0].columns) for i in range(len(own))]
        self.at[op.writes[0]] = result
        self.places[op.writes[0]] = places

    def _embedding_dw(self, op: Op) -> None:
        """The gradient of a table of embeddings: a product, too, whose rows of x are all zero but at the token's column.

        They are made on the way: blocks are of the table's rows, whose numbers are compared with every token. So gradients of
        tokens that come again are added up as others are, in the order of the tokens.
        """
        line, lanes = self.line, self.p.lanes

        def one_hot(at: str, strips: int) -> Flow:
            gates = tuple(
                (
                    line.gate(
                        f"{at}.tokens.{g}", op.name, "load", "hbm", "tokens", 0, [(self.keys, 4), (line.blocks, 0)],
                        words=1, form="word",
                    ),
                )
                for g in range(line.groups)
            )  # fmt: skip
            tokens = line.admitted(f"{at}.tokens", op.name, Flow(self.keys, gates, self.keys, gates))
            whole = {"type": "int32", "b_from": "constant", "to": 4}
            row = {**whole, "operation": "multiply", "a_from": "counter", "a": 1}
            flow = line.simd(
                f"{at}.x", op.name, [(line.spread(f"{at}.tokens", op.name, tokens), 0)],
                [
                    {**row, "constant": lanes * line.groups}, stage("add", 4, "lane", 4, kind="int32"),
                    {**whole, "operation": "add", "a": 4, "constant": 0, "group": lanes},
                    stage("xor", 4, 0, 5, kind="int32"),
                    {"operation": "pass", "type": "fp32", "a_from": "constant", "constant": constant(1.0), "to": 6},
                    {"operation": "select", "type": "int32", "a_from": "constant", "constant": 0, "b": 6, "c": 5, "to": 4},
                ],
                self.keys, result=4,
            )  # fmt: skip
            return line.read(f"{at}.rows", op.name, flow, [(self.keys, 1), (strips, 0)])

        columns = self.columns(op.reads[0])
        whole = Piece(0, 0, 1, columns, 0)
        self.at[op.writes[0]] = self._over_tokens(op, op.name, op.reads[0], whole, 1, one_hot)

    def _over_tokens(
        self, op: Op, name: str, dy: str, piece: Piece, groups: int, x: Callable[[str, int], Flow]
    ) -> list[Flow]:
        """Products of blocks that `x` gives, so many times each, and columns of a matrix with a row for each token, which
        stays. They are one of `groups`."""
        line = self.line
        outs = self.parts(piece.count)
        n = piece.count // outs
        each, units = self.split(op.name, ceil_div(n, self.p.stages), outs * groups)
        result = []
        for o in range(outs):
            at = f"{name}.{o}"
            flow = x(at, each)
            w = line.striped(
                at, op.name, dy, shape=(self.keys, self.columns(dy)), first=(0, piece.first + piece.step * o * n),
                depth=self.keys, columns=n, strips=each, units=units, gates=self.tiles.gates, apart=piece.step,
            )  # fmt: skip
            out = line.product(at, op.name, flow, self.keys, each, w, n)
            result.append(line.read(f"{at}.all", op.name, out, [(n, 1)]))
        return result

    def _column_sum(self, op: Op) -> None:
        """Sums over the rows: blocks are as many columns as there are lanes, read in the order in which they lie, so that no
        line is read twice."""
        line, name, lanes = self.line, op.name, self.p.lanes
        columns = self.columns(op.reads[0])
        packets = self.keys // lanes
        column = lanes * BF16_BYTES
        gates = tuple(
            (
                line.gate(
                    f"{name}.in.{g}", name, "load", "hbm", op.reads[0], g * lanes * column,
                    [(lanes, column), (packets, columns * column), (line.blocks, line.groups * lanes * column)],
                ),
            )
            for g in range(line.groups)
        )  # fmt: skip
        n = lanes * packets
        flow = line.read(f"{name}.x", name, Flow(n, gates, n, gates), [(packets, lanes), (lanes, 1)])
        total = line.simd(
            f"{name}.sum", name, [(flow, 0)], [], n, loops=[packets, lanes], fold="add", fold_level=1, tree="add", round=1
        )  # fmt: skip
        for g in range(line.groups):
            gate = line.gate(
                f"{name}.out.{g}", name, "store", "hbm", op.writes[0], g * lanes * BF16_BYTES,
                [(lanes, BF16_BYTES), (line.blocks, line.groups * lanes * BF16_BYTES)], words=1,
            )  # fmt: skip
            line.feed(total.sources[g][0], gate)

    # ---- the loss -------------------------------------------------------------------------------------

    def _loss(self, op: Op) -> None:
        """The gradient of the mean cross entropy over the tokens, by the logits, of which each socket has some columns.

        Three words of each row go to memory: the largest logit, the sum of powers of all less that one, and the target's
        logit. The loss is the mean of the first one, plus the second one's logarithm, less the third.
        """
        line, name = self.line, op.name
        x = self.at[op.reads[0]]
        n = x[0].columns
        targets = line.load(f"{name}.targets.in", name, "targets", 1, words=True)
        padded = self.share.sockets * self.columns(op.reads[0]) != self.model.vocab
        limit = line.load(f"{name}.limit.in", name, "limit", 1, row=0, words=True) if padded else None

        def once(use: str, flow: Flow) -> tuple[Flow, int]:
            return line.read(f"{name}.{use}", name, flow, [(1, 1)]), 1

        def limits(use: str) -> list[tuple[Flow, int]]:
            return [] if limit is None else [once(f"limit.{use}", limit)]

        def column(part: int) -> dict[str, Any]:
            return {
                "operation": "add", "type": "int32", "a_from": "counter", "a": 0, "b_from": "constant", "constant": part * n,
                "to": 5,
            }  # fmt: skip

        def seen(part: int, at: int) -> list[dict[str, Any]]:
            """The logit in register 4, masked from the column on that input `at` says."""
            if limit is None:
                return [stage("pass", 0, 0, 4)]
            mask = {
                "operation": "select",
                "type": "int32",
                "b_from": "constant",
                "constant": constant(LOWEST),
            }
            return [
                column(part),
                stage("less", 5, at, 6, kind="int32"),
                {**mask, "a": 0, "c": 6, "to": 4},
            ]

        def joined(what: str, parts: Sequence[Flow], how: str) -> Flow:
            """A word of each row over all columns, of all sockets."""
            flows = self._total(f"{name}.{what}", name, parts, how)
            stages = self._joined(len(flows), how)
            flow = line.simd(f"{name}.{what}", name, [(f, 0) for f in flows], stages, 1, result=4)
            sockets = self.share.sockets
            if sockets > 1:
                # Each socket adds up one copy, in an order of its own, and all take the first one's.
                copies = line.read(f"{name}.{what}.copies", name, flow, [(1, 1), (sockets, 0)])
                flow = line.all_reduce(f"{name}.{what}", name, copies, sockets, how=how, words=True)
                flow = line.read(f"{name}.{what}.all", name, flow, [(1, 1)])
                flow = line.simd(f"{name}.{what}.whole", name, [(flow, 0)], [], 1)
            line.store(f"{name}.{what}.store", name, flow, f"{name}.{what}", words=True)
            return flow

        tops, picked = [], []
        for i, part in enumerate(x):
            r = line.read(f"{name}.first{i}", name, part, [(n, 1)])
            tops.append(
                line.simd(
                    f"{name}.max{i}", name, [(r, 0), *limits(f"max{i}")], seen(i, 1), n, result=4, fold="maximum"
                )
            )  # fmt: skip
            r = line.read(f"{name}.target{i}", name, part, [(n, 1)])
            none = {"operation": "select", "type": "int32", "a_from": "constant", "constant": 0}
            picked.append(
                line.simd(
                    f"{name}.target{i}.logit", name, [(r, 0), once(f"targets.logit{i}", targets)],
                    [column(i), stage("xor", 5, 1, 5, kind="int32"), {**none, "b": 0, "c": 5, "to": 4}], n, result=4,
                    fold="add",
                )
            )  # fmt: skip
        top = joined("top", tops, "maximum")
        joined("target", picked, "add")
        after = tuple(src[0] for src in top.sources)
        powers, sums = [], []
        for i, part in enumerate(x):
            r = line.read(f"{name}.second{i}", name, part, [(n, 1)], after=after)
            power = line.simd(
                f"{name}.exp{i}", name, [(r, 0), (top, 1), *limits(f"exp{i}")],
                [*seen(i, 2), stage("subtract", 4, 1, 4)], n, result=4, function="exp",
            )  # fmt: skip
            powers.append(power)
            sums.append(line.simd(f"{name}.sum{i}", name, [(power, 0)], [], n, fold="add"))
        total = joined("total", sums, "add")
        inverse = line.simd(f"{name}.inverse", name, [(total, 0)], [], 1, function="reciprocal")
        after = tuple(src[0] for src in inverse.sources)
        out = []
        for i, power in enumerate(powers):
            r = line.read(f"{name}.third{i}", name, power, [(n, 1)], after=after)
            out.append(
                line.simd(
                    f"{name}.{i}", name, [(r, 0), (inverse, 1), once(f"targets.{i}", targets)],
                    [
                        stage("multiply", 0, 1, 4), column(i), stage("xor", 5, 2, 5, kind="int32"),
                        stage("subtract", 4, 1.0, 6), stage("select", 4, 6, 4, kind="int32", c=5),
                        stage("multiply", 4, float(np.float32(1 / self.attended)), 4),
                    ],
                    n, result=4, round=1,
                )
            )  # fmt: skip
        self.at[op.writes[0]] = out

    # ---- norms and activations ------------------------------------------------------------------------

    def _norm_dx(self, op: Op) -> None:
        """The gradient of a norm's input, and what summed over the rows is its gain's."""
        line, name, m = self.line, op.name, self.model
        gain_of = name.removesuffix("_dx")
        x, dy = (self.at[t] for t in op.reads)
        inverse = float(np.float32(1 / sum(f.columns for f in x)))
        eps = float(np.float32(m.norm_eps))
        layernorm = m.norm == "layernorm"

        def gain(i: int, use: str) -> Flow:
            n, at = x[i].columns, i * x[i].columns * BF16_BYTES
            return line.broadcast(f"{name}.gain.{use}{i}", name, f"{gain_of}.gain", n, offset=at)

        def total(what: str, flows: Sequence[Flow], stages: Sequence[dict[str, Any]], **fields: Any) -> Flow:
            flows = self._total(f"{name}.{what}", name, flows)
            return line.simd(
                f"{name}.{what}", name, [(f, 0) for f in flows], [*self._joined(len(flows)), *stages], 1, result=4,
                **fields,
            )  # fmt: skip

        mean: list[tuple[Flow, int]] = []
        after: tuple[str, ...] = ()
        if layernorm:
            sums = [
                line.simd(
                    f"{name}.sum{i}", name, [(line.read(f"{name}.first{i}", name, f), 0)], [], f.columns, fold="add"
                )
                for i, f in enumerate(x)
            ]  # fmt: skip
            mean = [(total("mean", sums, [stage("multiply", 4, inverse, 4)]), 1)]
            after = tuple(s[0] for s in mean[0][0].sources)
        squares, dots, sums = [], [], []
        for i, (part, d) in enumerate(zip(x, dy, strict=True)):
            n = part.columns
            r = line.read(f"{name}.second{i}", name, part, after=after)
            centre = stage("subtract", 0, 1, 4) if mean else stage("pass", 0, 0, 4)
            squares.append(
                line.simd(
                    f"{name}.square{i}", name, [(r, 0), *mean], [centre, stage("multiply", 4, 4, 4)], n, result=4,
                    fold="add",
                )
            )  # fmt: skip
            r, e = (
                line.read(f"{name}.dot.{k}{i}", name, f, after=after) for k, f in (("x", part), ("dy", d))
            )
            centre = stage("subtract", 0, 3, 5) if mean else stage("pass", 0, 0, 5)
            dots.append(
                line.simd(
                    f"{name}.dot{i}", name, [(r, 0), (e, 0), (gain(i, "dot"), 0), *mean],
                    [centre, stage("multiply", 1, 2, 4), stage("multiply", 4, 5, 4)], n, result=4, fold="add",
                )
            )  # fmt: skip
            if mean:
                e = line.read(f"{name}.plain.dy{i}", name, d)
                sums.append(
                    line.simd(
                        f"{name}.plain{i}", name, [(e, 0), (gain(i, "plain"), 0)], [stage("multiply", 0, 1, 4)], n,
                        result=4, fold="add",
                    )
                )  # fmt: skip
        scale = total(
            "scale", squares, [stage("multiply", 4, inverse, 4), stage("add", 4, eps, 4)], function="rsqrt"
        )  # fmt: skip
        slope = total("dots", dots, [stage("multiply", 4, inverse, 4)])
        slope = line.simd(
            f"{name}.slope", name, [(slope, 0), (scale, 0)], [stage("multiply", 0, 1, 4), *[stage("multiply", 4, 1, 4)] * 2],
            1, result=4,
        )  # fmt: skip
        shift: list[tuple[Flow, int]] = []
        if mean:
            plain = total("plain", sums, [stage("multiply", 4, inverse, 4)])
            plain = line.simd(
                f"{name}.shift", name, [(plain, 0), (scale, 0)], [stage("multiply", 0, 1, 4)], 1, result=4
            )
            shift = [(plain, 1)]
        after = tuple(s[0] for s in slope.sources)
        out, products = [], []
        for i, (part, d) in enumerate(zip(x, dy, strict=True)):
            n = part.columns
            e = line.read(f"{name}.third.dy{i}", name, d, after=after)
            stages = [stage("multiply", 0, 1, 4), stage("multiply", 4, 2, 4)]
            a = line.simd(
                f"{name}.scaled{i}", name, [(e, 0), (gain(i, "third"), 0), (scale, 1), *shift],
                [*stages, *([stage("subtract", 4, 3, 4)] if shift else [])], n, result=4,
            )  # fmt: skip
            r = line.read(f"{name}.third.x{i}", name, part, after=after)
            centre = stage("subtract", 1, 3, 4) if mean else stage("pass", 1, 1, 4)
            out.append(
                line.simd(
                    f"{name}.{i}", name, [(a, 0), (r, 0), (slope, 1), *mean],
                    [centre, stage("multiply", 4, 2, 4), stage("subtract", 0, 4, 4)], n, result=4, round=1,
                )
            )  # fmt: skip
            r, e = (
                line.read(f"{name}.gain.{k}{i}", name, f, after=after) for k, f in (("x", part), ("dy", d))
            )
            products.append(
                line.simd(
                    f"{name}.products{i}", name, [(r, 0), (e, 0), (scale, 1), *mean],
                    [
                        stage("subtract", 0, 3, 4) if mean else stage("pass", 0, 0, 4), stage("multiply", 1, 4, 4),
                        stage("multiply", 4, 2, 4),
                    ],
                    n, result=4, round=1,
                )
            )  # fmt: skip
        self.at[op.writes[0]], self.at[op.writes[1]] = out, products

    def _activation_dx(self, op: Op) -> None:
        """Gradients of an activation's inputs."""
        line, name = self.line, op.name
        results: list[list[Flow]] = [[] for _ in op.writes]
        for i, flows in enumerate(zip(*(self.at[t] for t in op.reads), strict=True)):
            n = flows[0].columns

            def read(use: str, k: int, flows: tuple[Flow, ...] = flows, i: int = i) -> tuple[Flow, int]:
                return line.read(f"{name}.{i}.{use}{k}", name, flows[k]), 0

            if len(op.writes) == 2:
                sigmoid = line.simd(f"{name}.{i}.sigmoid", name, [read("s", 1)], [], n, function="sigmoid")
                d_gate = line.simd(
                    f"{name}.{i}.gate", name, [read("gate", 0), read("gate", 1), read("gate", 2), (sigmoid, 0)],
                    [
                        stage("multiply", 1, 3, 4), stage("subtract", 1, 4, 4), stage("add", 4, 1.0, 4),
                        stage("multiply", 4, 3, 4), stage("multiply", 4, 2, 4), stage("multiply", 4, 0, 4),
                    ],
                    n, result=4, round=1,
                )  # fmt: skip
                d_up = line.simd(
                    f"{name}.{i}.up", name, [read("up", 0), read("up", 1)], [stage("multiply", 0, 1, 5)], n, result=1,
                    function="sigmoid", gated=1, gate=5, round=1,
                )  # fmt: skip
                results[0].append(d_gate)
                results[1].append(d_up)
                continue
            sigmoid = line.simd(
                f"{name}.{i}.sigmoid", name, [read("s", 1)],
                [
                    stage("multiply", 0, 0, 4), stage("multiply", 4, GELU_CUBIC, 4), stage("add", 4, 1.0, 4),
                    stage("multiply", 4, 0, 4), stage("multiply", 4, GELU_SCALE, 4),
                ],
                n, result=4, function="sigmoid",
            )  # fmt: skip
            d_up = line.simd(
                f"{name}.{i}.up", name, [read("up", 0), read("up", 1), (sigmoid, 0)],
                [
                    stage("multiply", 1, 1, 4), stage("multiply", 4, 3 * GELU_CUBIC, 4), stage("add", 4, 1.0, 4),
                    stage("multiply", 4, GELU_SCALE, 4), stage("multiply", 4, 1, 4), stage("multiply", 2, -1.0, 5),
                    stage("add", 5, 1.0, 5), stage("multiply", 4, 5, 4), stage("add", 4, 1.0, 4),
                    stage("multiply", 4, 2, 4), stage("multiply", 4, 0, 4),
                ],
                n, result=4, round=1,
            )  # fmt: skip
            results[0].append(d_up)
        for t, found in zip(op.writes, results, strict=True):
            self.at[t] = found

    def _positions_dx(self, op: Op) -> None:
        """Queries' and keys' gradients turned back, by the table of sines with the other sign."""
        line, m, name = self.line, self.model, op.name
        dim, half = m.head_dim, m.head_dim // 2
        out = []
        for t in op.reads:
            flow = self._whole(self.at[t])
            heads = flow.columns // dim
            if t == "dv" or m.position != "rotary":
                out.append(line.read(f"{name}.{t}", name, flow))
                continue
            x = line.read(f"{name}.{t}.x", name, flow, [(dim, 1), (heads, dim)])
            other = line.read(
                f"{name}.{t}.other", name, flow, [(half, 1), (2, -half), (heads, dim)], first=half
            )
            tables = [
                line.read(
                    f"{name}.{t}.{table}", name, line.load(f"{name}.{t}.{table}.in", name, table, dim),
                    [(dim, 1), (heads, 0)],
                )
                for table in ("cos", "sin.back")
            ]  # fmt: skip
            out.append(
                line.simd(
                    f"{name}.{t}.turn", name, [(f, 0) for f in (x, other, *tables)],
                    [stage("multiply", 0, 2, 4), stage("multiply", 1, 3, 5), stage("add", 4, 5, 4)], heads * dim,
                    result=4, round=1,
                )
            )  # fmt: skip
        self.at[op.writes[0]] = out

    # ---- attention ------------------------------------------------------------------------------------

    def _summed(self, name: str, tag: str, parts: Sequence[Flow], head: int) -> Flow:
        """Partial products of the chunks joined and rounded: a head's columns of a matrix."""
        s, dim = self.share, self.model.head_dim
        flows = list(parts)
        while len(flows) > self.p.vector_inputs:
            flows = self._fewer(f"{name}.join{len(flows)}", tag, flows, dim)
        return self.line.simd(
            name, tag, [(f, 0) for f in flows], self._joined(len(flows)), dim, result=4, round=1,
            sequence=head * dim if s.heads > 1 else 0,
        )  # fmt: skip

    def _chunks(self) -> tuple[int, int, int, int]:
        """Tokens of a chunk, strips of it and of a head, bytes of a head's word for each token."""
        chunks = self.tiles.chunks
        if self.keys % (chunks * self.p.lanes):
            raise UserError(
                f"{self.keys} tokens don't divide into {chunks} chunks of vectors of {self.p.lanes}"
            )
        width, c = self.keys // chunks, self.p.stages
        return width, ceil_div(width, c), ceil_div(self.model.head_dim, c), self.keys * 4

    def _attention_dq(self, op: Op) -> None:
        """The queries' gradients, and statistics of the rows."""
        line, m, s, name = self.line, self.model, self.share, op.name
        dim, chunks = m.head_dim, self.tiles.chunks
        width, strips, wide, statistic = self._chunks()
        q, da, a = (self._whole(self.at[t]) for t in op.reads)
        scale = float(np.float32(dim**-0.5))
        held = {
            what: cached(
                line, f"{name}.{what}", name, order, s.kv_heads, dim, width, chunks, self.pitch, 0, self.p.stages,
                self.tiles.cache_gates, line.groups, tensor=tensor,
            )
            for what, order, tensor in (
                ("keys", "keys", "keys"), ("values", "keys", "values"), ("turned", "values", "keys"),
            )
        }  # fmt: skip
        outs = []
        for h in range(s.heads):
            head = f"{name}.{h}"
            part = (h, s.heads)
            x = line.read(f"{head}.q", name, q, [(dim, 1), (strips, 0)], part=part)
            e = line.read(f"{head}.da", name, da, [(dim, 1), (strips, 0)], part=part)
            scores, slopes = (
                [
                    line.product(
                        f"{head}.{what}{k}", name, flow, dim, strips, [[n] for n in held[what][h][k]], width, rounded=False
                    )
                    for k in range(chunks)
                ]
                for what, flow in (("keys", x), ("values", e))
            )  # fmt: skip
            top = self._top(name, h, scores, width)
            sums, powers = [], []
            for k, flow in enumerate(scores):
                power, total = self._power(name, h, k, flow, width, top)
                sums.append(total)
                powers.append(power)
            sums = self._total(f"{head}.sum", name, sums)
            inverse = line.simd(
                f"{head}.inverse", name, [(f, 0) for f in sums], self._joined(len(sums)), 1, result=4,
                function="reciprocal",
            )  # fmt: skip
            reads = [
                (line.read(f"{head}.{t}.dot", name, f, [(dim, 1)], part=part), 0)
                for t, f in (("da", da), ("a", a))
            ]
            dot = line.simd(
                f"{head}.dot", name, reads, [stage("multiply", 0, 1, 4)], dim, result=4, fold="add"
            )
            for what, flow in zip(STATISTICS, (top, inverse, dot), strict=True):
                line.store(f"{head}.{what}.store", name, flow, what, offset=h * statistic, words=True)
            after = tuple(src[0] for src in inverse.sources)
            parts = []
            for k in range(chunks):
                p = line.read(f"{head}.p{k}", name, powers[k], [(width, 1)], after=after)
                d = line.read(f"{head}.dp{k}", name, slopes[k], [(width, 1)])
                ds = line.simd(
                    f"{head}.ds{k}", name, [(p, 0), (d, 0), (inverse, 1), (dot, 1)],
                    [
                        stage("multiply", 0, 2, 4), stage("subtract", 1, 3, 5), stage("multiply", 4, 5, 4),
                        stage("multiply", 4, scale, 4),
                    ],
                    width, result=4, round=1,
                )  # fmt: skip
                r = line.read(f"{head}.turned{k}.x", name, ds, [(width, 1), (wide, 0)])
                out = line.product(
                    f"{head}.turned{k}",
                    name,
                    r,
                    width,
                    wide,
                    [[n] for n in held["turned"][h][k]],
                    dim,
                    rounded=False,
                )
                parts.append(line.read(f"{head}.part{k}", name, out, [(dim, 1)]))
            outs.append(self._summed(f"{head}.out", name, parts, h))
        self.at[op.writes[0]] = [Flow.of(outs, self.model.head_dim * len(outs))]

    def _attention_dkv(self, op: Op) -> None:
        """Gradients of keys and values: their tokens are the rows, and all queries stay."""
        line, m, s, name, lanes = self.line, self.model, self.share, op.name, self.p.lanes
        dim, chunks = m.head_dim, self.tiles.chunks
        width, strips, wide, statistic = self._chunks()
        scale = float(np.float32(dim**-0.5))
        whole = (self.keys, s.q_dim)
        outs: tuple[list[Flow], list[Flow]] = ([], [])
        for h in range(s.heads):
            head = f"{name}.{h}"
            rows = {}
            for what in ("keys", "values"):
                gates = tuple(
                    (
                        line.gate(
                            f"{head}.{what}.in.{g}", name, "load", "hbm", what,
                            h * dim * self.pitch * BF16_BYTES + g * lanes * BF16_BYTES,
                            [(dim, self.pitch * BF16_BYTES), (line.blocks, line.groups * lanes * BF16_BYTES)],
                        ),
                    )
                    for g in range(line.groups)
                )  # fmt: skip
                flow = line.admitted(f"{head}.{what}", name, Flow(dim, gates, dim, gates))
                rows[what] = line.read(f"{head}.{what}", name, flow, [(dim, 1), (strips, 0)])
            parts: tuple[list[Flow], list[Flow]] = ([], [])
            for k in range(chunks):
                at = (k * width, h * dim)
                scores, slopes = (
                    line.product(
                        f"{head}.{what}{k}", name, rows[what], dim, strips,
                        line.across(
                            f"{head}.{what}{k}", name, by, shape=whole, first=at, depth=dim, columns=width, strips=strips,
                            units=1, gates=1,
                        ),
                        width, rounded=False,
                    )
                    for what, by in (("keys", "q"), ("values", "da"))
                )  # fmt: skip
                top, inverse, again, dot = (
                    line.broadcast(
                        f"{head}.{use}{k}", name, what, width, offset=h * statistic + k * width * 4, words=True
                    )
                    for use, what in (("top", "top"), ("inverse", "inverse"), ("again", "inverse"), ("dot", "dot"))
                )  # fmt: skip
                r = line.read(f"{head}.scores{k}", name, scores, [(width, 1)])
                power = line.simd(
                    f"{head}.exp{k}", name, [(r, 0), (top, 0)],
                    [*self._masked(k * width, h, turned=True), stage("subtract", 4, 1, 4)], width, result=4,
                    function="exp", round=1,
                )  # fmt: skip
                share = line.simd(
                    f"{head}.share{k}", name, [(power, 0), (inverse, 0)], [stage("multiply", 0, 1, 4)], width, result=4,
                    round=1,
                )  # fmt: skip
                p = line.read(f"{head}.p{k}", name, power, [(width, 1)])
                d = line.read(f"{head}.dp{k}", name, slopes, [(width, 1)])
                ds = line.simd(
                    f"{head}.ds{k}", name, [(p, 0), (d, 0), (again, 0), (dot, 0)],
                    [
                        stage("multiply", 0, 2, 4), stage("subtract", 1, 3, 5), stage("multiply", 4, 5, 4),
                        stage("multiply", 4, scale, 4),
                    ],
                    width, result=4, round=1,
                )  # fmt: skip
                for found, flow, by in ((parts[0], ds, "q"), (parts[1], share, "da")):
                    own = f"{head}.{by}.turned{k}"
                    w = line.striped(
                        own,
                        name,
                        by,
                        shape=whole,
                        first=at,
                        depth=width,
                        columns=dim,
                        strips=wide,
                        units=1,
                        gates=1,
                    )
                    x = line.read(f"{own}.x", name, flow, [(width, 1), (wide, 0)])
                    out = line.product(own, name, x, width, wide, w, dim, rounded=False)
                    found.append(line.read(f"{own}.part", name, out, [(dim, 1)]))
            for i, found in enumerate(parts):
                outs[i].append(self._summed(f"{head}.out{i}", name, found, h))
        for t, found in zip(op.writes, outs, strict=True):
            self.at[t] = [Flow.of(found, dim * len(found))]

    # ---- the optimizer --------------------------------------------------------------------------------

    def _elements(self, op: Op, stages: Sequence[dict[str, Any]], rate: bool = False, **fields: Any) -> None:
        """An operator on each element by itself."""
        line, name = self.line, op.name
        out = []
        for i, flows in enumerate(zip(*(self.at[t] for t in op.reads), strict=True)):
            reads = [(line.read(f"{name}.{i}.{k}", name, f), 0) for k, f in enumerate(flows)]
            n = flows[0].columns
            if rate:
                word = line.load(f"{name}.{i}.rate", name, "rate", 1, row=0, words=True)
                reads.append((word, 1))
            out.append(line.simd(f"{name}.{i}", name, reads, list(stages), n, **fields))
        self.at[op.writes[0]] = out

    def _share(self, op: Op) -> None:
        self._elements(op, [stage("multiply", 0, float(np.float32(1 / self.sequences)), 4)], result=4)

    def _accumulate(self, op: Op) -> None:
        part = float(np.float32(1 / self.sequences))
        self._elements(op, [stage("multiply", 1, part, 4), stage("add", 0, 4, 4)], result=4)

    def _moment(self, op: Op) -> None:
        second = op.name.endswith("second_moment")
        beta = BETAS[second]
        self._elements(
            op,
            [
                stage("multiply", 1, 1, 4) if second else stage("pass", 1, 1, 4),
                stage("multiply", 4, float(np.float32(1 - beta)), 4), stage("multiply", 0, float(np.float32(beta)), 5),
                stage("add", 5, 4, 4),
            ],
            result=4,
        )  # fmt: skip

    def _root(self, op: Op) -> None:
        self._elements(
            op,
            [stage("maximum", 0, TINY, 4), stage("pass", 0, 0, 5)],
            result=4,
            function="rsqrt",
            gated=1,
            gate=5,
        )

    def _step(self, op: Op) -> None:
        self._elements(
            op,
            [stage("add", 0, EPS, 4), stage("pass", 1, 1, 5)],
            result=4,
            function="reciprocal",
            gated=1,
            gate=5,
        )

    def _update(self, op: Op) -> None:
        self._elements(
            op,
            [
                stage("multiply", 0, DECAY, 4), stage("add", 1, 4, 4), stage("multiply", 4, 2, 4),
                stage("subtract", 0, 4, 4),
            ],
            rate=True, result=4,
        )  # fmt: skip

    def _round(self, op: Op) -> None:
        self._elements(op, [], round=1)
