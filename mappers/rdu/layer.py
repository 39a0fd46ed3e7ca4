"""The operators of a transformer layer over blocks of rows, as stages of one section.

An operator reads and writes matrices by name. Of a section's operators (`Rows.build`) those that another one wrote
flow to it on the chip, the others come from memory and what is read later goes there: so a whole layer is
one section, or every operator a section of its own, by the same code.

Off chip a matrix of activations is bfloat16, block of rows after block, column after column. Keys and values are
kept element by element, the tokens side by side: [layer][keys, values][head][element][token]. That gives a memory unit
keys as the array wants them (tokens side by side), and values by writing across its banks (elements side by side).
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod
from typing import Any

import numpy as np

from tilewright.arch.errors import UserError
from tilewright.arch.rdu import ADDRESS_BITS, LEVELS, RduParams
from tilewright.mappers.rdu.allocate import Demand
from tilewright.mappers.rdu.stages import BF16_BYTES, Flow, Pipeline, ceil_div, constant, stage
from tilewright.workloads.models import ModelConfig

__all__ = [
    "CHOSEN", "LOWEST", "SLOT", "Bank", "Op", "Rows", "Share", "Tiles", "Vectors", "cached", "expert_operators",
    "layer_operators", "summed",
]  # fmt: skip

LOWEST = -1e30
"""What the score of a masked key is."""
MEETING = 48
"""Streams of results that meet at one buffer, where their weights allow so few."""
CHOSEN = "chosen"
"""Scores of the chosen experts, each by an address of its own."""
BY_ROW = ("h2", "e")
"""What goes to experts, and what they give."""
SLOT = "slot"
"""The numbers of the experts in each slot, a word each row."""
UNITS = float(1 << 23)
"""A float whose last bit counts ones: an integer below it, in those bits, is added to it."""
QUICK_GELU = 1.702
GELU_CUBIC = 0.044715
GELU_SCALE = float(2 * np.sqrt(2 / np.pi))
Matrix = list[Flow]


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


class Rows:
    """Builds the operators of one section into a `Pipeline`.

    Parameters
    ----------
    params : RduParams
    share : Share
    tiles : Tiles
    keys, pitch : int
        Tokens that are attended to, and tokens that the cache has room for.
    context : int
        Tokens before the first row; a multiple of the lanes.
    attended : int
        Of an encoder: tokens that there are, the rest of the keys is padding; by default all keys.
    widths : dict of int
        Columns of matrices that are not what `columns` says.
    """

    def __init__(
        self,
        params: RduParams,
        share: Share,
        tiles: Tiles,
        *,
        keys: int = 0,
        pitch: int = 0,
        context: int = 0,
        window: int | None = None,
        attended: int | None = None,
        widths: Mapping[str, int] | None = None,
    ) -> None:
        self.p, self.share, self.model, self.tiles = params, share, share.model, tiles
        self.attended, self.widths = attended or keys, widths or {}
        self.keys, self.pitch, self.context, self.window = keys, pitch or keys, context, window
        self.line = Pipeline(params, groups=tiles.groups, blocks=tiles.blocks)
        self.at: dict[str, Matrix] = {}

    DIRECT: tuple[str, ...] = ()
    """Kinds of operators that load what they read themselves."""

    def words(self, tensor: str) -> bool:
        """Whether a matrix is float32 off chip."""
        return False

    def demand(self, op: Op) -> tuple[Demand, int] | None:
        """Units that a product needs, and their gates; None for other operators. Raises UserError where none suffice."""
        if op.kind != "product":
            return None
        depth, columns = self.columns(op.reads[0]), self.columns(op.writes[0])
        parts = 1 if op.reads[0] == "a" else self.parts(depth)
        outs = 1 if op.writes[0] == "qkv" else self.parts(columns)
        return self._demand(op.name, depth // parts, ceil_div(columns // outs, self.p.stages), outs * parts)

    def _demand(self, name: str, depth: int, strips: int, pieces: int, grain: int = 1) -> tuple[Demand, int]:
        """Each of `pieces` products of `depth` has `strips` of `grain` strips."""
        most = self.held(depth, grain)  # that a PMU holds
        if not most:
            raise UserError(f"{name}: {depth} rows of {self.p.stages * grain} columns are too many for a PMU")
        least = ceil_div(strips, most)
        return Demand(
            name, "pcu", strips * pieces, depth * grain * self.tiles.blocks, least=least * pieces,
            most=min(strips, max(least, MEETING)) * pieces,
        ), pieces  # fmt: skip

    def held(self, depth: int, grain: int = 1) -> int:
        """Strips of a product's weights, `grain` at a time, that a memory unit holds."""
        return self.line.capacity // (depth * self.p.stages * grain)

    def split(self, name: str, strips: int, pieces: int) -> tuple[int, int]:
        """Strips of a unit, and units, of one of a product's pieces."""
        units = max(1, min(strips, ceil_div(self.tiles.units.get(name, 1), pieces)))
        each = ceil_div(strips, units)
        return each, ceil_div(strips, each)

    def build(self, ops: Sequence[Op], keep: Iterable[str], layer: str = "") -> Pipeline:
        """All units and streams of `ops`; matrices named in `keep` go to memory."""
        written = {t for op in ops for t in op.writes}
        readers: dict[str, list[int]] = {}
        for i, op in enumerate(ops):
            for t in op.reads:
                readers.setdefault(t, []).append(i)
        for op in ops:
            for t in op.reads if op.kind not in self.DIRECT else ():
                if t not in self.at:
                    if t in written:
                        raise UserError(f"operator {op.name} reads {t} before it is written")
                    self.at[t] = self._load(t)
            getattr(self, f"_{op.kind}")(op)
        for t in keep:
            self._store(t, self.at[t])
        self.line.close()
        return self.line

    # ---- matrices -----------------------------------------------------------------------------------

    def columns(self, tensor: str) -> int:
        """Columns of a matrix."""
        s, m = self.share, self.model
        known = {
            "qkv": s.q_dim + 2 * s.kv_dim,
            "q": s.q_dim,
            "a": s.q_dim,
            "f": s.inner,
            "gate_out": s.inner,
            "up_out": s.inner,
            "r": m.experts,
        }
        return {**known, **self.widths}.get(tensor.split(".")[0], m.d_model)

    def parts(self, columns: int) -> int:
        """Equal ranges of a matrix's columns, so that a PMU holds the buffers of one."""
        room = self.line.capacity // (self.line.buffers * self.p.lanes)
        depth = self.line.capacity // self.p.stages  # rows of a strip of weights
        parts = ceil_div(columns, min(room, depth))
        while columns % parts:
            parts += 1
        return parts

    def _load(self, tensor: str) -> Matrix:
        columns = self.columns(tensor)
        parts = 1 if tensor in ("q", "qkv") else self.parts(columns)
        column = self.p.lanes * BF16_BYTES
        out = []
        for i in range(parts):
            name = f"{tensor}.in{i}"
            if self.by_row(tensor):
                flow = self._rows("load", name, tensor, columns // parts, i * (columns // parts), columns)
                flow = self.line.admitted(name, "load", flow)
                out.append(self.line.turned(f"{name}.turned", "load", flow, to_rows=False))
                continue
            offset = i * (columns // parts) * column
            words = self.words(tensor)
            flow = self.line.load(
                name, "load", tensor, columns // parts, offset=offset * (1 + words),
                row=columns * column * (1 + words), words=words,
            )  # fmt: skip
            out.append(self.line.admitted(name, "load", flow))
        return out

    def _store(self, tensor: str, matrix: Matrix) -> None:
        column = self.p.lanes * BF16_BYTES
        columns = sum(f.columns for f in matrix)
        for i, flow in enumerate(matrix):
            out = (
                self.line.read(f"{tensor}.out{i}", "store", flow)
                if flow.merged or flow.each != flow.columns
                else flow
            )
            if self.by_row(tensor):
                out = self.line.turned(f"{tensor}.turned{i}", "store", out, to_rows=True)
                gates = self._rows(
                    "store", f"{tensor}.store{i}", tensor, flow.columns, i * flow.columns, columns
                )
                for source, gate in zip(out.sources, gates.sources, strict=True):
                    self.line.feed(source[0], gate[0])
                continue
            self.line.store(
                f"{tensor}.store{i}",
                "store",
                out,
                tensor,
                offset=i * flow.columns * column * (1 + self.words(tensor)),
                row=columns * column * (1 + self.words(tensor)),
                words=self.words(tensor),
            )

    def by_row(self, tensor: str) -> bool:
        """Whether a matrix lies in memory row after row, so that the DMA can move single ones: those of experts."""
        return self.model.experts > 0 and tensor.split(".")[0] in BY_ROW

    def _rows(self, direction: str, name: str, tensor: str, columns: int, first: int, whole: int) -> Flow:
        """Gates for columns from `first` on of a matrix that lies row after row, each of `whole` columns."""
        line, lanes = self.line, self.p.lanes
        names = []
        for g in range(line.groups):
            loops = [
                (columns // lanes, lanes * BF16_BYTES), (lanes, whole * BF16_BYTES),
                (line.blocks, line.groups * lanes * whole * BF16_BYTES),
            ]  # fmt: skip
            offset = (g * lanes * whole + first) * BF16_BYTES
            names.append(line.gate(f"{name}.{g}", direction, direction, "hbm", tensor, offset, loops))
        each = tuple((n,) for n in names)
        return Flow(columns, each, columns, each)

    def _whole(self, matrix: Matrix) -> Flow:
        if len(matrix) > 1:
            raise UserError(f"{sum(f.columns for f in matrix)} columns of a block exceed a PMU's buffers")
        return matrix[0]

    def _total(
        self, name: str, tag: str, flows: Sequence[Flow], how: str = "add", packets: int = 1
    ) -> list[Flow]:
        """Flows joined, as few as an input each of one unit; left as they are if they are few enough."""
        width = self.p.vector_inputs
        level = 0
        flows = list(flows)
        while len(flows) > width:
            joined = []
            for i in range(0, len(flows), width):
                some = flows[i : i + width]
                if len(some) > 1:
                    stages = [stage(how, 0 if k == 1 else 4, k, 4) for k in range(1, len(some))]
                    some = [
                        self.line.simd(
                            f"{name}.join{level}.{i}", tag, [(f, 0) for f in some], stages, packets, result=4
                        )
                    ]
                joined += some
            flows, level = joined, level + 1
        return flows

    def _joined(self, n: int, how: str = "add", to: int = 4) -> list[dict[str, Any]]:
        """Stages that join registers 0..n-1 into a register."""
        if n == 1:
            return [stage("pass", 0, 0, to)]
        return [stage(how, 0 if k == 1 else to, k, to) for k in range(1, n)]

    # ---- operators ----------------------------------------------------------------------------------

    def _norm(self, op: Op) -> None:
        """A root-mean-square or layer norm: statistics first, then each column again."""
        line, name, m = self.line, op.name, self.model
        x = self.at[op.reads[0]]
        total = sum(f.columns for f in x)
        inverse, eps = float(np.float32(1 / total)), float(np.float32(m.norm_eps))
        inputs: list[tuple[Flow, int]] = []
        after: tuple[str, ...] = ()
        if m.norm == "layernorm":
            sums = []
            for i, part in enumerate(x):
                r = line.read(f"{name}.first{i}", name, part, [(part.columns, 1)])
                sums.append(line.simd(f"{name}.sum{i}", name, [(r, 0)], [], part.columns, fold="add"))
            sums = self._total(f"{name}.mean", name, sums)
            mean = line.simd(
                f"{name}.mean", name, [(f, 0) for f in sums],
                [*self._joined(len(sums)), stage("multiply", 4, inverse, 4)], 1, result=4,
            )  # fmt: skip
            inputs, after = [(mean, 1)], tuple(s[0] for s in mean.sources)
        squares = []
        centre = [stage("subtract", 0, 1, 4)] if inputs else [stage("pass", 0, 0, 4)]
        for i, part in enumerate(x):
            r = line.read(f"{name}.second{i}", name, part, [(part.columns, 1)], after=after)
            squares.append(
                line.simd(
                    f"{name}.square{i}",
                    name,
                    [(r, 0), *inputs],
                    [*centre, stage("multiply", 4, 4, 4)],
                    part.columns,
                    result=4,
                    fold="add",
                )
            )
        squares = self._total(f"{name}.scale", name, squares)
        scale = line.simd(
            f"{name}.scale", name, [(f, 0) for f in squares],
            [*self._joined(len(squares)), stage("multiply", 4, inverse, 4), stage("add", 4, eps, 4)], 1,
            result=4, function="rsqrt",
        )  # fmt: skip
        after = tuple(s[0] for s in scale.sources)
        out = []
        for i, part in enumerate(x):
            n = part.columns
            r = line.read(f"{name}.third{i}", name, part, [(n, 1)], after=after)
            gain = line.broadcast(f"{name}.gain{i}", name, f"{name}.gain", n, offset=i * n * BF16_BYTES)
            if not inputs:
                stages = [stage("multiply", 0, 1, 4), stage("multiply", 4, 2, 4)]
                out.append(
                    line.simd(
                        f"{name}.{i}", name, [(r, 0), (scale, 1), (gain, 0)], stages, n, result=4, round=1
                    )
                )
                continue
            bias = line.broadcast(f"{name}.bias{i}", name, f"{name}.bias", n, offset=i * n * BF16_BYTES)
            normal = line.simd(
                f"{name}.normal{i}", name, [(r, 0), *inputs, (scale, 1)],
                [stage("subtract", 0, 1, 4), stage("multiply", 4, 2, 4)], n, result=4,
            )  # fmt: skip
            out.append(
                line.simd(
                    f"{name}.{i}",
                    name,
                    [(normal, 0), (gain, 0), (bias, 0)],
                    [stage("multiply", 0, 1, 4), stage("add", 4, 2, 4)],
                    n,
                    result=4,
                    round=1,
                )
            )
        self.at[op.writes[0]] = out

    def _product(self, op: Op) -> None:
        """A matrix product with resident weights; partial sums over ranges of its depth are added, and a bias."""
        line, name = self.line, op.name
        x = self.at[op.reads[0]]
        columns = self.columns(op.writes[0])
        outs = 1 if op.writes[0] == "qkv" else self.parts(columns)
        biased = _biased(self.model, name)
        whole = len(x) == 1 and not biased
        result = []
        for o in range(outs):
            n = columns // outs
            each, units = self.split(name, ceil_div(n, self.p.stages), outs * len(x))
            sums = []
            for i, part in enumerate(x):
                # Each product has its own copy of the rows, which it can hold back.
                at = f"{name}.{o}.{i}"
                r = line.read(f"{at}.x", name, part, [(part.columns, 1), (each, 0)])
                w = self._weights(op, at, (i * part.columns, o * n), part.columns, n, each, units)
                sums.append(line.product(at, name, r, part.columns, each, w, n, rounded=whole))
            if whole:
                if self.share.sockets > 1 or op.writes[0] == "qkv":  # several read it: many streams end here
                    sums = [line.read(f"{name}.{o}.all", name, f, [(n, 1)]) for f in sums if f.merged] or sums
                result += sums
                continue
            flows = [line.read(f"{name}.{o}.sum{i}", name, f, [(n, 1)]) for i, f in enumerate(sums)]
            if biased:
                flows.append(
                    line.broadcast(f"{name}.bias{o}", name, f"{name}.bias", n, offset=o * n * BF16_BYTES)
                )
            flows = self._total(f"{name}.{o}", name, flows, packets=n)
            result.append(
                line.simd(
                    f"{name}.{o}.total",
                    name,
                    [(f, 0) for f in flows],
                    self._joined(len(flows)),
                    n,
                    result=4,
                    round=1,
                )
            )
        self.at[op.writes[0]] = result

    def _weights(
        self, op: Op, at: str, first: tuple[int, int], depth: int, columns: int, strips: int, units: int
    ) -> list[list[str]]:  # fmt: skip
        """Memory units with the weights of a piece of a product, whose rows and columns begin at `first`."""
        tensor = f"{at}.w" if op.slot is None else f"{weights_of(op)}.{at}.w"
        return self.line.weights(at, op.name, tensor, depth, strips, units, self.tiles.gates)

    def _positions(self, op: Op) -> None:
        """Rotary positions where the model has them; keys and values go to the cache."""
        line, m, s, name = self.line, self.model, self.share, op.name
        qkv = self._whole(self.at[op.reads[0]])
        dim, heads = m.head_dim, s.heads + s.kv_heads
        turned = qkv
        if m.position == "rotary":
            half = dim // 2
            x = line.read(f"{name}.x", name, qkv, [(dim, 1), (heads, dim)])
            other = line.read(f"{name}.other", name, qkv, [(half, 1), (2, -half), (heads, dim)], first=half)
            tables = [
                line.read(
                    f"{name}.{t}", name, line.load(f"{name}.{t}.in", name, t, dim), [(dim, 1), (heads, 0)]
                )
                for t in ("cos", "sin")
            ]
            stages = [stage("multiply", 0, 2, 4), stage("multiply", 1, 3, 5), stage("add", 4, 5, 4)]
            turned = line.simd(
                f"{name}.turn",
                name,
                [(f, 0) for f in (x, other, *tables)],
                stages,
                heads * dim,
                result=4,
                round=1,
            )
        self.at[op.writes[0]] = [line.read(f"{name}.q", name, turned, [(s.q_dim, 1)])]
        token = self.p.lanes * BF16_BYTES
        row = self.pitch * BF16_BYTES
        for at, source, first in (("keys", turned, s.q_dim), ("values", qkv, s.q_dim + s.kv_dim)):
            flow = line.read(f"{name}.{at}", name, source, [(s.kv_dim, 1)], first=first)
            line.store(
                f"{name}.{at}.store", name, flow, at, offset=self.context * BF16_BYTES, row=token, column=row
            )

    def _attention(self, op: Op) -> None:
        """Scores, softmax and values of each head, over ranges of keys that have units of their own."""
        line, m, s, p, name = self.line, self.model, self.share, self.p, op.name
        dim, chunks, c = m.head_dim, self.tiles.chunks, p.stages
        if self.keys % (chunks * p.lanes):
            raise UserError(f"{self.keys} keys don't divide into {chunks} chunks of vectors of {p.lanes}")
        width = self.keys // chunks
        strips, wide = ceil_div(width, c), ceil_div(dim, c)
        q = self._whole(self.at[op.reads[0]])
        keys, values = self._cache(name, width)
        sources, readers = [], []
        for h in range(s.heads):
            own = h * s.kv_heads // s.heads
            mine = sum(i * s.kv_heads // s.heads == own for i in range(h)) * line.groups  # its copies
            head = f"{name}.{h}"
            x = line.read(f"{head}.q", name, q, [(dim, 1), (strips, 0)], part=(h, s.heads))
            scores = [
                line.product(
                    f"{head}.score{k}",
                    name,
                    x,
                    dim,
                    strips,
                    [[n] for n in keys[own][k][mine : mine + line.groups]],
                    width,
                    rounded=False,
                )
                for k in range(chunks)
            ]
            top = self._top(name, h, scores, width)
            sums, parts = [], []
            for k, flow in enumerate(scores):
                power, total = self._power(name, h, k, flow, width, top)
                sums.append(total)
                x = line.read(f"{head}.p{k}", name, power, [(width, 1), (wide, 0)])
                out = line.product(
                    f"{head}.value{k}",
                    name,
                    x,
                    width,
                    wide,
                    [[n] for n in values[own][k][mine : mine + line.groups]],
                    dim,
                    rounded=False,
                )
                parts.append(out)
            sums = self._total(f"{head}.sum", name, sums)
            inverse = line.simd(
                f"{head}.inverse",
                name,
                [(f, 0) for f in sums],
                self._joined(len(sums)),
                1,
                result=4,
                function="reciprocal",
            )
            after = tuple(src[0] for src in inverse.sources)
            reads = [
                line.read(f"{head}.part{k}", name, f, [(dim, 1)], after=after) for k, f in enumerate(parts)
            ]
            flows = reads
            while len(flows) >= p.vector_inputs:
                flows = self._fewer(f"{head}.out{len(flows)}", name, flows, dim)
            n = len(flows)
            final = line.simd(
                f"{head}.out", name, [*((f, 0) for f in flows), (inverse, 1)],
                [*self._joined(n, to=4 + n), stage("multiply", 4 + n, n, 4)], dim, result=4, round=1,
                sequence=h * dim if s.heads > 1 else 0,
            )  # fmt: skip
            sources.append(final.sources)
            readers.append(final.readers)
        self.at[op.writes[0]] = [
            Flow(
                s.q_dim,
                tuple(tuple(src[g][0] for src in sources) for g in range(line.groups)),
                dim,
                tuple(tuple(n for r in readers for n in r[g]) for g in range(line.groups)),
            )
        ]

    def _fewer(self, name: str, tag: str, flows: list[Flow], packets: int) -> list[Flow]:
        out = []
        for i in range(0, len(flows), self.p.vector_inputs):
            some = flows[i : i + self.p.vector_inputs]
            if len(some) > 1:
                some = [
                    self.line.simd(
                        f"{name}.{i}", tag, [(f, 0) for f in some], self._joined(len(some)), packets, result=4
                    )
                ]
            out += some
        return out

    def _top(self, name: str, h: int, scores: Sequence[Flow], width: int) -> Flow:
        """The largest score of each row in a head, of which each chunk has `width`."""
        line, head = self.line, f"{name}.{h}"
        most = []
        for k, flow in enumerate(scores):
            r = line.read(f"{head}.first{k}", name, flow, [(width, 1)])
            most.append(
                line.simd(
                    f"{head}.max{k}", name, [(r, 0)], self._masked(k * width, h), width, result=4, fold="maximum"
                )
            )  # fmt: skip
        most = self._total(f"{head}.max", name, most, "maximum")
        return line.simd(
            f"{head}.top", name, [(f, 0) for f in most], self._joined(len(most), "maximum"), 1, result=4
        )

    def _power(self, name: str, h: int, k: int, scores: Flow, width: int, top: Flow) -> tuple[Flow, Flow]:
        """Powers of the scores in a head's chunk, less the largest ones, and their sums."""
        line, head = self.line, f"{name}.{h}"
        after = tuple(src[0] for src in top.sources)
        r = line.read(f"{head}.second{k}", name, scores, [(width, 1)], after=after)
        power = line.simd(
            f"{head}.exp{k}", name, [(r, 0), (top, 1)],
            [*self._masked(k * width, h), stage("subtract", 4, 1, 4)], width, result=4, function="exp", round=1,
        )  # fmt: skip
        return power, line.simd(f"{head}.sum{k}", name, [(power, 0)], [], width, fold="add")

    def _masked(self, first: int, head: int, turned: bool = False) -> list[dict[str, Any]]:
        """Stages that scale the score in register 0, and mask it where key `first` + counter 0 is none of its row's.

        Where they are `turned`, the rows are those of the keys, and the columns of the queries.
        The result is in register 4, registers 5 to 7 are used.
        """
        m, lanes = self.model, self.p.lanes
        groups = self.tiles.groups
        whole = {"kind": "int32"}
        out = [stage("multiply", 0, float(np.float32(m.head_dim**-0.5)), 4)]
        out.append(
            {
                "operation": "add",
                "type": "int32",
                "a_from": "counter",
                "a": 0,
                "b_from": "constant",
                "constant": first,
                "to": 5,
            }
        )
        if m.position == "alibi":  # the key's number as a float, times the head's slope
            out += [
                {
                    "operation": "or",
                    "type": "int32",
                    "a": 5,
                    "b_from": "constant",
                    "constant": constant(UNITS),
                    "to": 6,
                },
                stage("subtract", 6, UNITS, 6),
                stage("multiply", 6, slope(m.heads, head), 6),
                stage("add", 4, 6, 4),
            ]
        if not m.causal:
            limit = {
                "operation": "less",
                "type": "int32",
                "a": 5,
                "b_from": "constant",
                "constant": self.attended,
                "c": 0,
                "to": 6,
            }
            choose = {
                "operation": "select",
                "type": "int32",
                "a": 4,
                "b_from": "constant",
                "constant": constant(LOWEST),
                "c": 6,
                "to": 4,
            }
            return [*out, limit, choose]
        out += [
            {
                "operation": "multiply",
                "type": "int32",
                "a_from": "counter",
                "a": 1,
                "b_from": "constant",
                "constant": lanes * groups,
                "to": 6,
            },
            stage("add", 6, "lane", 6, **whole),
            {
                "operation": "add",
                "type": "int32",
                "a": 6,
                "b_from": "constant",
                "constant": self.context,
                "to": 6,
                "group": lanes,
            },
            stage("less", 5, 6, 7, **whole) if turned else stage("less", 6, 5, 7, **whole),
        ]
        if self.window is not None:
            out += [
                {
                    "operation": "subtract",
                    "type": "int32",
                    "a": 6,
                    "b_from": "constant",
                    "constant": self.window - 1,
                    "to": 6,
                },
                stage("less", 5, 6, 6, **whole),
                stage("or", 6, 7, 7, **whole),
            ]
        out.append(
            {
                "operation": "select",
                "type": "int32",
                "a_from": "constant",
                "constant": constant(LOWEST),
                "b": 4,
                "c": 7,
                "to": 4,
            }
        )
        return out

    def _cache(self, name: str, width: int) -> tuple[list[list[list[str]]], list[list[list[str]]]]:
        """Memory units with the keys and the values of each head, by chunk."""
        found = [
            cached(
                self.line, f"{name}.{what}", name, what, self.share.kv_heads, self.model.head_dim, width, self.tiles.chunks,
                self.pitch, 0, self.p.stages, self.tiles.cache_gates,
                self.tiles.groups * ceil_div(self.share.heads, self.share.kv_heads),
            )
            for what in ("keys", "values")
        ]  # fmt: skip
        return found[0], found[1]

    def _mixture(self, op: Op) -> None:
        """The experts' rows, weighted by a softmax over their own scores, which are found by the experts' numbers."""
        line, name, experts = self.line, op.name, self.model.experts
        r = self._whole(self.at[op.reads[0]])
        scores = []
        for i in range(len(op.reads) - 1):
            number = line.load(f"{name}.{SLOT}.{i}", name, f"{SLOT}.{i}", 1, words=True)
            own = line.read(f"{name}.r{i}", name, r, [(experts, 1)])
            other = {"operation": "xor", "type": "int32", "a_from": "counter", "a": 0, "b": 1, "to": 5}
            chosen = {"operation": "select", "type": "int32", "a_from": "constant", "b": 0, "c": 5, "to": 4}
            scores.append(
                line.simd(f"{name}.score{i}", name, [(own, 0), (number, 1)], [other, chosen], experts, result=4, fold="add")
            )  # fmt: skip
        shares = softmax(line, name, scores)
        out = []
        for i, flows in enumerate(zip(*(self.at[t] for t in op.reads[1:]), strict=True)):
            n = flows[0].columns
            reads = [line.read(f"{name}.{i}.x{k}", name, f, [(n, 1)]) for k, f in enumerate(flows)]
            out.append(weighted(line, f"{name}.{i}", name, shares, reads, n))
        self.at[op.writes[0]] = out

    def _reduce(self, op: Op) -> None:
        self.at[op.writes[0]] = [
            self.line.all_reduce(f"{op.name}{i}", op.name, flow, self.share.sockets)
            for i, flow in enumerate(self.at[op.reads[0]])
        ]

    def _activation(self, op: Op) -> None:
        line, m, name = self.line, self.model, op.name
        out = []
        inputs = [self.at[t] for t in op.reads]
        for i, flows in enumerate(zip(*inputs, strict=True)):
            n = flows[0].columns
            reads = [(line.read(f"{name}.{i}.{k}", name, f, [(n, 1)]), 0) for k, f in enumerate(flows)]
            stages, fields = _activation_stages(m.activation, m.gated_mlp)
            out.append(line.simd(f"{name}.{i}", name, reads, stages, n, round=1, **fields))
        self.at[op.writes[0]] = out

    def _add(self, op: Op) -> None:
        """A sum of matrices; the first one, which passed by the others, waits in several buffers."""
        line, name = self.line, op.name
        out = []
        for i, flows in enumerate(zip(*(self.at[t] for t in op.reads), strict=True)):
            n = flows[0].columns
            reads = []
            for k, flow in enumerate(flows):
                for hop in range(1 if k == len(flows) - 1 or line.blocks == 1 else self.tiles.depth):
                    flow = line.read(f"{name}.{i}.{k}.{hop}", name, flow, [(n, 1)])
                reads.append((flow, 0))
            out.append(line.simd(f"{name}.{i}", name, reads, self._joined(len(reads)), n, result=4, round=1))
        self.at[op.writes[0]] = out


def _activation_stages(activation: str, gated: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Stages for register 0 (times register 1, if gated), and the tail's fields."""
    gate = [stage("multiply", 0, 1, 5)] if gated else [stage("pass", 0, 0, 5)]
    if activation == "silu":
        return gate, {"result": 0, "function": "sigmoid", "gated": 1, "gate": 5}
    if activation == "quick_gelu":
        return [*gate, stage("multiply", 0, QUICK_GELU, 4)], {
            "result": 4, "function": "sigmoid", "gated": 1, "gate": 5,
        }  # fmt: skip
    if activation in ("gelu", "gelu_tanh"):  # (1 + tanh(z)) / 2 = sigmoid(2 z)
        return [
            *gate,
            stage("multiply", 0, 0, 4),
            stage("multiply", 4, GELU_CUBIC, 4),
            stage("add", 4, 1.0, 4),
            stage("multiply", 4, 0, 4),
            stage("multiply", 4, GELU_SCALE, 4),
        ], {"result": 4, "function": "sigmoid", "gated": 1, "gate": 5}
    out = [stage("maximum", 0, 0.0, 4)]
    if activation == "relu2":
        out.append(stage("multiply", 4, 4, 4))
    if gated:
        out.append(stage("multiply", 4, 1, 4))
    return out, {"result": 4}


def _biased(model: ModelConfig, name: str) -> bool:
    return {
        "qkv": model.qkv_bias,
        "attention_out": model.attention_out_bias,
        "lm_head": False,
        "lm_head_dx": False,
        "router": False,
        "patches": False,
    }.get(name, model.mlp_bias)


def softmax(line: Pipeline, name: str, scores: Sequence[Flow]) -> list[Flow]:
    """The softmax over `scores`, a packet each of a block, of each lane by itself."""
    width = line.p.vector_inputs

    def joined(how: str, flows: Sequence[Flow]) -> Flow:
        flows = list(flows)
        level = 0
        while len(flows) > 1:
            flows = [
                line.simd(
                    f"{name}.{how}{level}.{i}", name, [(f, 0) for f in flows[i : i + width]],
                    [stage(how, 0 if k == 1 else 4, k, 4) for k in range(1, len(flows[i : i + width]))]
                    or [stage("pass", 0, 0, 4)], 1, result=4,
                )
                for i in range(0, len(flows), width)
            ]  # fmt: skip
            level += 1
        return flows[0]

    top = joined("maximum", scores)
    powers = [
        line.simd(f"{name}.exp{i}", name, [(s, 0), (top, 0)], [stage("subtract", 0, 1, 4)], 1, result=4, function="exp")
        for i, s in enumerate(scores)
    ]  # fmt: skip
    inverse = line.simd(f"{name}.inverse", name, [(joined("add", powers), 0)], [], 1, function="reciprocal")
    return [
        line.simd(
            f"{name}.share{i}", name, [(power, 0), (inverse, 0)], [stage("multiply", 0, 1, 4)], 1, result=4
        )
        for i, power in enumerate(powers)
    ]


def weighted(
    line: Pipeline, name: str, tag: str, shares: Sequence[Flow], matrices: Sequence[Flow], columns: int
) -> Flow:
    """Matrices times `shares`, a packet each of a block, added up in order."""
    total: list[tuple[Flow, int]] = []
    for i, (share, matrix) in enumerate(zip(shares, matrices, strict=True)):
        stages = [stage("multiply", 0, 1, 4), *([stage("add", 2, 4, 4)] if total else [])]
        total = [
            (
                line.simd(
                    f"{name}.{i}", tag, [(matrix, 0), (share, 1), *total], stages, columns, result=4,
                    round=int(i == len(matrices) - 1),
                ),
                0,
            )
        ]  # fmt: skip
    return total[0][0]


def weights_of(op: Op) -> str:
    """The tensor with an operator's weights: an expert's are apart, so that their place may follow from the choice."""
    return "weights" if op.slot is None else f"expert.{op.slot}"


def cached(
    line: Pipeline, name: str, tag: str, what: str, heads: int, dim: int, width: int, chunks: int, pitch: int,
    offset: int, strip: int, gates: int, copies: int = 1, tensor: str = "",
) -> list[list[list[str]]]:  # fmt: skip
    """Memory units with the "keys" or "values" of heads of `dim` elements: one for each head, and chunk of `width` tokens.

    They give strips of `strip` tokens, element after element, or strips of elements, token after token. The cache, whose
    elements are `pitch` tokens apart, begins at `offset` bytes; at most `gates` gates to memory load it, each some heads,
    or some chunks of one, unless more are needed for their addresses. There are `copies` of each unit, one for each that
    reads it. Of a `tensor`, if it is given: what tells the order alone.
    """
    p = line.p
    keys = what == "keys"
    row = 1 << (dim - 1).bit_length()
    size = width * (dim if keys else row)
    if size > line.capacity:
        raise UserError(f"{width} {what} of {dim} elements are {size} words; a PMU has {line.capacity}")
    tokens = width // p.lanes
    strips = (ceil_div(width if keys else dim, strip), strip)
    most = (1 << ADDRESS_BITS) // size  # units that the addresses of a gate tell apart
    # Units of a gate: some heads with all their chunks, or some chunks of one; as few as leave at most `gates` gates.
    shapes = [(n, chunks) for n in range(1, heads + 1) if heads % n == 0]
    shapes += [(1, n) for n in range(1, chunks) if chunks % n == 0]
    shapes = sorted((s for s in shapes if s[0] * s[1] <= most), key=lambda s: s[0] * s[1])
    step, span = next((s for s in shapes if heads * chunks <= s[0] * s[1] * gates), shapes[-1])
    if keys:
        write = [(tokens, p.lanes), (dim, width), (span, size)]
        fields = line.chain(name, "read_", [(dim, width), strips, (line.blocks, 0)])
    else:
        write = [(tokens, p.lanes * row), (dim, 1), (span, size)]
        fields = line.chain(name, "read_", [(width, row), strips, (line.blocks, 0)])
        # Tokens are in different banks, too: a diagonal stripe.
        bits = min(p.banks.bit_length() - 1, row.bit_length() - 1)
        fields |= {"skew_bits": bits, "skew_shift": row.bit_length() - 1, "write_lane_stride": row}
    head_bytes = dim * pitch * BF16_BYTES
    found = []
    resident = line.blocks > 1
    for h in range(heads):
        chunk = []
        for k in range(chunks):
            first = h % step == 0 and k % span == 0
            if first:
                gate = line.gate(
                    f"{name}.{h}.{k}.load", tag, "load", "hbm", tensor or what,
                    offset + h * head_bytes + k * width * BF16_BYTES,
                    [
                        (tokens, p.lanes * BF16_BYTES), (dim, pitch * BF16_BYTES), (span, width * BF16_BYTES),
                        (step, head_bytes),
                    ],
                )  # fmt: skip
            low = (h % step * span + k % span) * size
            units = [f"{name}.{h}.{k}.{copy}" for copy in range(copies)]
            for unit in units:
                line.unit(
                    unit, "pmu", tag, enable=3, low=low, words=size,
                    **line.chain(name, "write_", [*write, (step, span * size)]), write_signal_level=LEVELS,
                    **fields, read_base=low, read_wait_level=LEVELS,
                )  # fmt: skip
                line.wire(f"{unit}.write", f"{unit}.read")
                line.feed(gate, unit)
                if resident:
                    line.filled.append(unit)
                line.resting.add(unit)
                line.work[unit] = prod(fields[f"read_count{n}"] for n in range(3))
            if resident and first:
                line.loads.append(units[0])
            chunk.append(units)
        found.append(chunk)
    return found


# ---- one token ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Bank:
    """The weights of one product in a section of `Vectors`: `units` units of `strips` strips of lanes."""

    name: str
    part: int
    depth: int
    strips: int
    units: int
    tensor: str = "weights"


def shares_of(banks: Iterable[Bank], tensor: str, gates: int) -> list[list[tuple[Bank, int]]]:
    """For each gate to the weights of a tensor what it fills, one after the other: a unit of a bank.

    Operators come in their order, and each unit goes to the gate with the least so far: gates come to the weights of an
    operator at about one time. Gates that fill nothing are left out.
    """
    out: list[list[tuple[Bank, int]]] = [[] for _ in range(gates)]
    packets = [0] * gates
    for bank in banks:
        for j in range(bank.units if bank.tensor == tensor else 0):
            i = packets.index(min(packets))
            out[i].append((bank, j))
            packets[i] += bank.depth * bank.strips
    return [share for share in out if share]


class Vectors:
    """Builds the operators of one section for the next token of each sequence: a vector is cut into packets of lanes.

    A sequence is a group with its own keys and values. Weights stream from memory through the memory units, in the
    order in which they are used; those of later operators come while earlier ones compute. Keys and values that are
    cached stream likewise; the token's own are added on the chip, and stored for the next step.

    Parameters
    ----------
    params : RduParams
    share : Share
    batch : int
    keys : int
        Tokens that the cache has room for, at `pitch` of it are attended to: a multiple of `chunks` * lanes.
    chunks : int
        Ranges of keys, each with its own units.
    words : int
        Words of weights that a unit should hold: fewer mean more units.
    gates, cache_gates : int
        Gates to memory for the weights, of each slot in a mixture, and each for the keys and for the values of a
        sequence.
    passes : int
        Kernels that share the columns of the LM head.
    """

    def __init__(
        self, params: RduParams, share: Share, *, batch: int = 1, keys: int = 0, pitch: int = 0, chunks: int = 1,
        words: int = 1, gates: int = 1, cache_gates: int = 1, passes: int = 1,
    ) -> None:  # fmt: skip
        self.p, self.share, self.model = params, share, share.model
        self.keys, self.pitch, self.chunks, self.words, self.gates = keys, pitch or keys, chunks, words, gates
        self.cache_gates, self.passes = cache_gates, passes
        self.line = Pipeline(params, groups=batch)
        self.at: dict[str, Flow] = {}
        self.banks: list[Bank] = []
        for columns in (share.model.d_model, share.model.head_dim, share.inner):
            if columns % params.lanes:
                raise UserError(
                    f"{share.model.name}: {columns} columns are not a multiple of the {params.lanes} lanes"
                )

    def build(self, ops: Sequence[Op], keep: Iterable[str]) -> Pipeline:
        """All units and streams of `ops`; vectors named in `keep` go to memory."""
        for op in ops:
            for t in op.reads[op.kind == "mixture" :]:  # which takes the scores by address
                if t not in self.at:
                    self.at[t] = self._load(t)
            getattr(self, f"_{op.kind}")(op)
        for t in keep:
            flow = self.line.read(f"{t}.out", "store", self.at[t], [(self.at[t].columns, 1)])
            self.line.store(f"{t}.store", "store", flow, t)
        self._stream_weights()
        self.line.close()
        return self.line

    def columns(self, tensor: str) -> int:
        """Columns of a matrix."""
        s, m = self.share, self.model
        known = {
            "qkv": s.q_dim + 2 * s.kv_dim, "q": s.q_dim + s.kv_dim, "a": s.q_dim, "f": s.inner, "gate_out": s.inner,
            "up_out": s.inner, "logits": ceil_div(m.vocab, s.sockets * self.passes * self.p.lanes) * self.p.lanes,
            "r": ceil_div(m.experts, self.p.lanes) * self.p.lanes,
        }  # fmt: skip
        # What is summed over sockets is cut into slices of whole packets, one for each.
        slices = s.sockets * self.p.lanes
        known |= dict.fromkeys(("o", "o_part", "w", "w_part", "e"), ceil_div(m.d_model, slices) * slices)
        return known.get(tensor.split(".")[0], m.d_model)

    def _load(self, tensor: str) -> Flow:
        return self.line.load(f"{tensor}.in", "load", tensor, self.columns(tensor) // self.p.lanes)

    def _constant(self, name: str, tag: str, tensor: str, columns: int) -> Flow:
        """A vector that stays: gains, biases."""
        return self.line.read(
            f"{name}.buffer", tag, self.line.load(name, tag, tensor, columns // self.p.lanes, row=0)
        )

    def _stream_weights(self) -> None:
        for tensor in dict.fromkeys(bank.tensor for bank in self.banks):
            shares = [
                [(f"{bank.name}.{bank.part}.w{j}", bank.depth * bank.strips, bank.name) for bank, j in share]
                for share in shares_of(self.banks, tensor, self.gates)
            ]
            self.line.streamed(tensor, "weights", tensor, shares)

    def _joined(self, n: int, how: str = "add", to: int = 4) -> list[dict[str, Any]]:
        if n == 1:
            return [stage("pass", 0, 0, to)]
        return [stage(how, 0 if k == 1 else to, k, to) for k in range(1, n)]

    def _fewer(
        self, name: str, tag: str, flows: Sequence[Flow], packets: int, how: str = "add", room: int = 0
    ) -> list[Flow]:
        """Flows joined until `room` inputs of a unit are left."""
        out, level, width = list(flows), 0, self.p.vector_inputs
        while len(out) > width - room:
            joined = []
            for i in range(0, len(out), width):
                some = out[i : i + width]
                if len(some) > 1:
                    some = [
                        self.line.simd(
                            f"{name}.join{level}.{i}",
                            tag,
                            [(f, 0) for f in some],
                            self._joined(len(some), how),
                            packets,
                            result=4,
                        )
                    ]
                joined += some
            out, level = joined, level + 1
        return out

    def _norm(self, op: Op) -> None:
        line, name, m = self.line, op.name, self.model
        x = self.at[op.reads[0]]
        n = self.columns(op.reads[0]) // self.p.lanes
        inverse, eps = float(np.float32(1 / (n * self.p.lanes))), float(np.float32(m.norm_eps))
        inputs: list[tuple[Flow, int]] = []
        after: tuple[str, ...] = ()
        if m.norm == "layernorm":
            r = line.read(f"{name}.first", name, x, [(n, 1)])
            total = line.simd(f"{name}.sum", name, [(r, 0)], [], n, fold="add", tree="add")
            mean = line.simd(
                f"{name}.mean", name, [(total, 0)], [stage("multiply", 0, inverse, 4)], 1, result=4
            )
            inputs, after = [(mean, 1)], tuple(s[0] for s in mean.sources)
        r = line.read(f"{name}.second", name, x, [(n, 1)], after=after)
        centre = stage("subtract", 0, 1, 4) if inputs else stage("pass", 0, 0, 4)
        square = line.simd(
            f"{name}.square",
            name,
            [(r, 0), *inputs],
            [centre, stage("multiply", 4, 4, 4)],
            n,
            result=4,
            fold="add",
            tree="add",
        )
        scale = line.simd(
            f"{name}.scale", name, [(square, 0)], [stage("multiply", 0, inverse, 4), stage("add", 4, eps, 4)], 1,
            result=4, function="rsqrt",
        )  # fmt: skip
        r = line.read(f"{name}.third", name, x, [(n, 1)], after=tuple(s[0] for s in scale.sources))
        gain = self._constant(f"{name}.gain", name, f"{name}.gain", n * self.p.lanes)
        if not inputs:
            stages = [stage("multiply", 0, 1, 4), stage("multiply", 4, 2, 4)]
            self.at[op.writes[0]] = line.simd(
                name, name, [(r, 0), (scale, 1), (gain, 0)], stages, n, result=4, round=1
            )
            return
        bias = self._constant(f"{name}.bias", name, f"{name}.bias", n * self.p.lanes)
        normal = line.simd(
            f"{name}.normal", name, [(r, 0), *inputs, (scale, 1)],
            [stage("subtract", 0, 1, 4), stage("multiply", 4, 2, 4)], n, result=4,
        )  # fmt: skip
        stages = [stage("multiply", 0, 1, 4), stage("add", 4, 2, 4)]
        self.at[op.writes[0]] = line.simd(
            name, name, [(normal, 0), (gain, 0), (bias, 0)], stages, n, result=4, round=1
        )

    def _product(self, op: Op) -> None:
        line, name, lanes = self.line, op.name, self.p.lanes
        x = self.at[op.reads[0]]
        depth = self.columns(op.reads[0])
        columns = self.columns(op.writes[0])
        strips = ceil_div(columns, lanes)
        parts = 1
        while depth // parts * lanes > line.capacity or depth % parts:
            parts += 1
        each = max(1, min(strips, min(self.words, line.capacity) // (depth // parts * lanes)))
        each = max(each, ceil_div(strips, MEETING))  # their results meet at one buffer
        each = min(each, max(1, line.capacity // (depth // parts * lanes)))
        units = ceil_div(strips, each)
        biased = _biased(self.model, name)
        sums = []
        for i in range(parts):
            own = depth // parts
            r = line.read(f"{name}.x{i}", name, x, [(own, 1), (each, 0)], first=i * own, words=True)
            self.banks.append(Bank(name, i, own, each, units, weights_of(op)))
            weights = [f"{name}.{i}.w{j}" for j in range(units)]
            sums.append(
                line.vector_product(
                    f"{name}.{i}",
                    name,
                    r,
                    own,
                    each,
                    [weights] * line.groups,
                    rounded=parts == 1 and not biased,
                )
            )
        sums = [replace(f, columns=strips) for f in sums]  # the last unit may have more
        if parts == 1 and not biased:
            if self.share.sockets > 1 or op.writes[0] == "qkv":  # several read it: many streams end here
                sums = [line.read(f"{name}.all", name, f, [(strips, 1)]) for f in sums if f.merged] or sums
            self.at[op.writes[0]] = sums[0]
            return
        flows = [line.read(f"{name}.sum{i}", name, f, [(strips, 1)]) for i, f in enumerate(sums)]
        if biased:
            flows.append(self._constant(f"{name}.bias", name, f"{name}.bias", columns))
        flows = self._fewer(name, name, flows, strips)
        self.at[op.writes[0]] = line.simd(
            f"{name}.total",
            name,
            [(f, 0) for f in flows],
            self._joined(len(flows)),
            strips,
            result=4,
            round=1,
        )

    def _positions(self, op: Op) -> None:
        """Rotary positions; the token's keys and values go to the cache, one element at a time."""
        line, m, s, name, lanes = self.line, self.model, self.share, op.name, self.p.lanes
        qkv = self.at[op.reads[0]]
        dim = m.head_dim // lanes
        heads = s.heads + s.kv_heads
        turned = qkv
        if m.position == "rotary":
            if dim % 2:
                raise UserError(
                    f"{m.name}: half a head of {m.head_dim} columns is no multiple of the {lanes} lanes"
                )
            half = dim // 2
            x = line.read(f"{name}.x", name, qkv, [(dim, 1), (heads, dim)])
            other = line.read(f"{name}.other", name, qkv, [(half, 1), (2, -half), (heads, dim)], first=half)
            tables = [
                line.read(
                    f"{name}.{t}",
                    name,
                    line.load(f"{name}.{t}.in", name, t, dim, row=0),
                    [(dim, 1), (heads, 0)],
                )
                for t in ("cos", "sin")
            ]
            stages = [stage("multiply", 0, 2, 4), stage("multiply", 1, 3, 5), stage("add", 4, 5, 4)]
            turned = line.simd(
                f"{name}.turn",
                name,
                [(f, 0) for f in (x, other, *tables)],
                stages,
                heads * dim,
                result=4,
                round=1,
            )
        self.at[op.writes[0]] = turned
        for at, source, first in (("keys", turned, s.q_dim), ("values", qkv, s.q_dim + s.kv_dim)):
            flow = line.read(f"{name}.{at}", name, source, [(s.kv_dim, 1)], first=first, words=True)
            for g in range(line.groups):
                gate = line.gate(
                    f"{name}.{at}.store.{g}", name, "store", "hbm", f"{at}.new", g * s.kv_dim * self.pitch * BF16_BYTES,
                    [(s.kv_dim, self.pitch * BF16_BYTES)], words=1,
                )  # fmt: skip
                line.feed(flow.sources[g][0], gate)

    def _attention(self, op: Op) -> None:
        line, m, s, name, lanes = self.line, self.model, self.share, op.name, self.p.lanes
        dim, packets, chunks = m.head_dim, m.head_dim // lanes, self.chunks
        width = self.keys // chunks
        strips = width // lanes
        whole = self.keys // lanes
        turned, qkv = (self.at[t] for t in op.reads)
        scale = float(np.float32(dim**-0.5))
        keys, values = self._cache(name, width) if self.keys else ([], [])
        alibi = m.position == "alibi"
        hidden = line.load(f"{name}.mask.in", name, "mask", whole, row=0, words=alibi) if self.keys else None
        outs = []
        for h in range(s.heads):
            own = h * s.kv_heads // s.heads
            mine = sum(i * s.kv_heads // s.heads == own for i in range(h))  # its copy
            head = f"{name}.{h}"
            # The token itself.
            q = line.read(f"{head}.q", name, turned, [(packets, 1)], first=h * packets)
            k = line.read(f"{head}.k", name, turned, [(packets, 1)], first=(s.heads + own) * packets)
            v = line.read(
                f"{head}.v", name, qkv, [(packets, 1)], first=(s.heads + s.kv_heads + own) * packets
            )
            dot = line.simd(
                f"{head}.dot",
                name,
                [(q, 0), (k, 0)],
                [stage("multiply", 0, 1, 4)],
                packets,
                result=4,
                fold="add",
                tree="add",
            )
            self_score = line.simd(
                f"{head}.self", name, [(dot, 0)], [stage("multiply", 0, scale, 4)], 1, result=4
            )
            tops = [self_score]
            scores = None
            if hidden is not None:
                x = line.read(
                    f"{head}.query", name, turned, [(dim, 1), (strips, 0)], first=h * dim, words=True
                )
                units = [[keys[g][own][c][mine] for c in range(chunks)] for g in range(line.groups)]
                raw = line.vector_product(f"{head}.score", name, x, dim, strips, units, rounded=False)
                r = line.read(f"{head}.scores", name, raw, [(whole, 1)])
                mask = line.read(f"{head}.mask", name, hidden, [(whole, 1)])
                # With linear biases the mask is each key's distance.
                biased = [stage("multiply", 1, slope(m.heads, h), 5)] if alibi else [stage("pass", 1, 1, 5)]
                scores = line.simd(
                    f"{head}.masked", name, [(r, 0), (mask, 0)],
                    [stage("multiply", 0, scale, 4), *biased, stage("add", 4, 5, 4)], whole, result=4,
                )  # fmt: skip
                tops.append(
                    line.simd(f"{head}.max", name, [(scores, 0)], [], whole, fold="maximum", tree="maximum")
                )
            top = line.simd(
                f"{head}.top", name, [(f, 0) for f in tops], self._joined(len(tops), "maximum"), 1, result=4
            )
            own_power = line.simd(
                f"{head}.own", name, [(self_score, 0), (top, 0)], [stage("subtract", 0, 1, 4)], 1, result=4,
                function="exp", round=1,
            )  # fmt: skip
            sums = [own_power]
            parts = [
                line.simd(
                    f"{head}.ownv",
                    name,
                    [(v, 0), (own_power, 1)],
                    [stage("multiply", 0, 1, 4)],
                    packets,
                    result=4,
                )
            ]
            if scores is not None:
                r = line.read(
                    f"{head}.second", name, scores, [(whole, 1)], after=tuple(src[0] for src in top.sources)
                )
                power = line.simd(
                    f"{head}.exp", name, [(r, 0), (top, 1)], [stage("subtract", 0, 1, 4)], whole, result=4,
                    function="exp", round=1,
                )  # fmt: skip
                sums.append(line.simd(f"{head}.sum", name, [(power, 0)], [], whole, fold="add", tree="add"))
                for c in range(chunks):
                    x = line.read(
                        f"{head}.p{c}", name, power, [(width, 1), (packets, 0)], first=c * width, words=True
                    )
                    units = [[values[g][own][c][mine]] for g in range(line.groups)]
                    part = line.vector_product(
                        f"{head}.value{c}", name, x, width, packets, units, rounded=False
                    )
                    parts.append(line.read(f"{head}.part{c}", name, part, [(packets, 1)]))
            inverse = line.simd(
                f"{head}.inverse",
                name,
                [(f, 0) for f in sums],
                self._joined(len(sums)),
                1,
                result=4,
                function="reciprocal",
            )
            parts = self._fewer(f"{head}.out", name, parts, packets, room=1)
            n = len(parts)
            outs.append(
                line.simd(
                    f"{head}.out",
                    name,
                    [*((f, 0) for f in parts), (inverse, 1)],
                    [*self._joined(n, to=4 + n), stage("multiply", 4 + n, n, 4)],
                    packets,
                    result=4,
                    round=1,
                    sequence=h * packets if s.heads > 1 else 0,
                )
            )
        self.at[op.writes[0]] = Flow(
            s.heads * packets, tuple(tuple(o.sources[g][0] for o in outs) for g in range(line.groups)), packets,
            ((),) * line.groups,
        )  # fmt: skip

    def _cache(
        self, name: str, width: int
    ) -> tuple[list[list[list[list[str]]]], list[list[list[list[str]]]]]:
        """Memory units with the keys and the values of each sequence and head, by chunk."""
        s, dim = self.share, self.model.head_dim
        found = [
            [
                cached(
                    self.line, f"{name}.{what}{g}", name, what, s.kv_heads, dim, width, self.chunks, self.pitch,
                    g * s.kv_dim * self.pitch * BF16_BYTES, self.p.lanes, self.cache_gates,
                    ceil_div(s.heads, s.kv_heads),
                )
                for g in range(self.line.groups)
            ]
            for what in ("keys", "values")
        ]  # fmt: skip
        return found[0], found[1]

    def _mixture(self, op: Op) -> None:
        """The experts' vectors, weighted by a softmax over their own scores. Each is where its address says."""
        line, name = self.line, op.name
        n = self.columns(op.writes[0]) // self.p.lanes
        row = self.columns("r") * BF16_BYTES
        scores = []
        for i in range(len(op.reads) - 1):
            tensor = f"{CHOSEN}.{i}"
            gates = [
                line.gate(f"{name}.{tensor}.{g}", name, "load", "hbm", tensor, g * row, [(1, 0)], words=1)
                for g in range(line.groups)
            ]
            scores.append(line.spread(f"{name}.{tensor}", name, Flow(1, tuple((u,) for u in gates), 1)))
        vectors = [line.read(f"{name}.x{i}", name, self.at[t], [(n, 1)]) for i, t in enumerate(op.reads[1:])]
        self.at[op.writes[0]] = weighted(line, name, name, softmax(line, name, scores), vectors, n)

    def _reduce(self, op: Op) -> None:
        self.at[op.writes[0]] = self.line.all_reduce(
            op.name, op.name, self.at[op.reads[0]], self.share.sockets
        )

    def _activation(self, op: Op) -> None:
        line, m, name = self.line, self.model, op.name
        n = self.columns(op.reads[0]) // self.p.lanes
        reads = [(line.read(f"{name}.{t}", name, self.at[t], [(n, 1)]), 0) for t in op.reads]
        stages, fields = _activation_stages(m.activation, m.gated_mlp)
        self.at[op.writes[0]] = line.simd(name, name, reads, stages, n, round=1, **fields)

    def _add(self, op: Op) -> None:
        line, name = self.line, op.name
        n = self.columns(op.reads[0]) // self.p.lanes
        reads = [(line.read(f"{name}.{t}", name, self.at[t], [(n, 1)]), 0) for t in op.reads]
        self.at[op.writes[0]] = line.simd(name, name, reads, self._joined(len(reads)), n, result=4, round=1)
