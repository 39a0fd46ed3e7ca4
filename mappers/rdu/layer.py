"""The operators of a transformer layer, and a socket's share of them.

An operator reads and writes matrices by name. Of a section's operators those that another one wrote flow to it on the
chip, the others come from memory and what is read later goes there: so a whole layer is one section, or every
operator a section of its own, by the same code: `rows.Rows` over blocks of rows, `vectors.Vectors` for the next token.

Off chip a matrix of activations is bfloat16, block of rows after block, column after column. Keys and values are
kept element by element, the tokens side by side: [layer][keys, values][head][element][token]. That gives a memory unit
keys as the array wants them (tokens side by side), and values by writing across its banks (elements side by side).
"""

from dataclasses import dataclass, replace

import numpy as np

from tilewright.mappers.rdu.stages import ceil_div
from tilewright.workloads.models import ModelConfig

__all__ = [
    "BY_ROW",
    "CHOSEN",
    "SLOT",
    "Op",
    "Share",
    "Tiles",
    "expert_operators",
    "layer_operators",
    "slope",
    "summed",
]

CHOSEN = "chosen"
"""Scores of the chosen experts, each by an address of its own."""
BY_ROW = ("h2", "e")
"""What goes to experts, and what they give."""
SLOT = "slot"
"""The numbers of the experts in each slot, a word each row."""


@dataclass(frozen=True)
class Share:
    """One socket's share of a layer: heads and the MLP's inner columns are dealt out, all else is whole."""

    model: ModelConfig
    sockets: int = 1

    @property
    def heads(self) -> int:
        """Query heads."""
        return ceil_div(self.model.heads, self.sockets)

    @property
    def kv_heads(self) -> int:
        """Heads of keys and values; where there are fewer than sockets, sockets hold the same."""
        return ceil_div(self.model.kv_heads, self.sockets)

    @property
    def inner(self) -> int:
        """Columns of the MLP, or of each expert's."""
        return ceil_div(self.model.d_expert if self.model.experts else self.model.d_ff, self.sockets)

    @property
    def q_dim(self) -> int:
        """Columns of queries."""
        return self.heads * self.model.head_dim

    @property
    def kv_dim(self) -> int:
        """Columns of keys, and of values."""
        return self.kv_heads * self.model.head_dim


@dataclass(frozen=True)
class Tiles:
    """How a section is tiled: see `plan`."""

    groups: int
    blocks: int
    """Blocks of rows of each group."""
    units: dict[str, int]
    """Columns of units, by product: each multiplies a range of the product's columns."""
    chunks: int = 1
    """Ranges of keys, each with its own units."""
    gates: int = 1
    """Gates to memory that load the weights of one product."""
    cache_gates: int = 1
    """Gates that load keys, and as many that load values."""
    depth: int = 4
    """Memory units in a row that hold back what passes by the MLP or attention."""


@dataclass(frozen=True)
class Op:
    """An operator: the name of the function of `Rows` that builds it, and the matrices that it reads and writes."""

    name: str
    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    slot: int | None = None
    """In a mixture, which of a token's experts it belongs to: its weights are those of whichever was chosen."""


def summed(op: Op, sockets: int) -> list[Op]:
    """An operator whose result is a sum over sockets."""
    if sockets == 1:
        return [op]
    part = f"{op.writes[0]}_part"
    return [replace(op, writes=(part,)), Op(f"{op.name}_reduce", "reduce", (part,), op.writes)]


def layer_operators(model: ModelConfig, sockets: int = 1, *, token: bool = False) -> list[Op]:
    """The operators of a layer in order, from matrix `x` to matrix `z`.

    With more than one socket what attention and MLP give is summed over all of them. The next `token`'s attention takes
    the token's own values from `qkv`; that of a prompt takes all of them from the cache. In a mixture of experts the
    router gives a score for each, `r`; then come those that were chosen, slot by slot, and their weighted sum.
    """
    m = model
    inner = ("gate", "up") if m.gated_mlp else ("up",)

    def attention(x: str) -> list[Op]:
        return [
            Op("qkv", "product", (x,), ("qkv",)),
            Op("rotary", "positions", ("qkv",), ("q",)),
            Op("attention", "attention", ("q", "qkv") if token else ("q",), ("a",)),
            *summed(Op("attention_out", "product", ("a",), ("o",)), sockets),
        ]

    def mlp(x: str) -> list[Op]:
        if m.experts:
            slots = range(m.experts_per_token)
            return [
                Op("router", "product", (x,), ("r",)),
                *(op for i in slots for op in expert_operators(m, i, x)),
                *summed(Op("mixture", "mixture", ("r", *(f"e.{i}" for i in slots)), ("w",)), sockets),
            ]
        return [
            *(Op(name, "product", (x,), (f"{name}_out",)) for name in inner),
            Op("activation", "activation", tuple(f"{name}_out" for name in inner), ("f",)),
            *summed(Op("down", "product", ("f",), ("w",)), sockets),
        ]

    if m.parallel_attention:
        two = m.parallel_norms == 2
        return [
            Op("attention_norm", "norm", ("x",), ("h",)),
            *attention("h"),
            *([Op("mlp_norm", "norm", ("x",), ("h2",))] if two else []),
            *mlp("h2" if two else "h"),
            Op("add", "add", ("x", "o", "w"), ("z",)),
        ]
    if m.post_norm:
        return [
            *attention("x"),
            Op("attention_add", "add", ("x", "o"), ("s",)),
            Op("attention_norm", "norm", ("s",), ("y",)),
            *mlp("y"),
            Op("mlp_add", "add", ("y", "w"), ("s2",)),
            Op("mlp_norm", "norm", ("s2",), ("z",)),
        ]
    return [
        Op("attention_norm", "norm", ("x",), ("h",)),
        *attention("h"),
        Op("attention_add", "add", ("x", "o"), ("y",)),
        Op("mlp_norm", "norm", ("y",), ("h2",)),
        *mlp("h2"),
        Op("mlp_add", "add", ("y", "w"), ("z",)),
    ]


def expert_operators(model: ModelConfig, slot: int = 0, x: str = "h2") -> list[Op]:
    """The operators of the expert in a slot, from matrix `x` to matrix `e.<slot>`."""
    inner = ("gate", "up") if model.gated_mlp else ("up",)
    outs = tuple(f"{name}_out.{slot}" for name in inner)
    return [
        *(Op(f"{name}_{slot}", "product", (x,), (out,), slot) for name, out in zip(inner, outs, strict=True)),
        Op(f"activation_{slot}", "activation", outs, (f"f.{slot}",), slot),
        Op(f"down_{slot}", "product", (f"f.{slot}",), (f"e.{slot}",), slot),
    ]


def slope(heads: int, head: int) -> float:
    """A head's factor of linear biases (Press, Smith, Lewis, "Train short, test long", ICLR 2022).

    Heads beyond a power of two take every other one of the next power's.
    """
    power = 1 << heads.bit_length() - 1
    exponent = (head + 1) / power if head < power else (2 * (head - power) + 1) / (2 * power)
    return float(np.float32(2.0 ** (-8 * exponent)))
