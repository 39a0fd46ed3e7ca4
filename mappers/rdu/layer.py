"""The operators of a transformer layer over blocks of rows, as stages of one section.

An operator reads and writes matrices by name. Of a section's operators (`Rows.build`) those that another one wrote
flow to it on the chip, the others come from memory and what is read later goes there: so a whole layer is
one section, or every operator a section of its own, by the same code.

Off chip a matrix of activations is bfloat16, block of rows after block, column after column. Keys and values are
kept element by element, the tokens side by side: [layer][keys, values][head][element][token]. That gives a memory unit
keys as the array wants them (tokens side by side), and values by writing across its banks (elements side by side).
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import prod
from typing import Any

import numpy as np

from tilewright.arch.errors import UserError
from tilewright.arch.rdu import LEVELS, RduParams
from tilewright.mappers.rdu.stages import BF16_BYTES, Flow, Pipeline, ceil_div, constant, stage
from tilewright.workloads.models import ModelConfig

__all__ = ["LOWEST", "OPERATORS", "Op", "Rows", "Share", "Tiles", "layer_operators"]

LOWEST = -1e30
"""What the score of a masked key is."""
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
        """Columns of the MLP."""
        return ceil_div(self.model.d_ff, self.sockets)

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
    depth: int = 4
    """Memory units in a row that hold back what passes by the MLP or attention."""


@dataclass(frozen=True)
class Op:
    """An operator: the name of the function of `Rows` that builds it, and the matrices that it reads and writes."""

    name: str
    kind: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    weights: tuple[str, ...] = ()


def layer_operators(model: ModelConfig) -> list[Op]:
    """The operators of a dense layer in order, from matrix `x` to matrix `z`."""
    m = model
    inner = ("gate", "up") if m.gated_mlp else ("up",)

    def attention(x: str) -> list[Op]:
        return [
            Op("qkv", "product", (x,), ("qkv",), ("qkv",)),
            Op("rotary", "positions", ("qkv",), ("q",)),
            Op("attention", "attention", ("q",), ("a",)),
            Op("attention_out", "product", ("a",), ("o",), ("attention_out",)),
        ]

    def mlp(x: str) -> list[Op]:
        return [
            *(Op(name, "product", (x,), (f"{name}_out",), (name,)) for name in inner),
            Op("activation", "activation", tuple(f"{name}_out" for name in inner), ("f",)),
            Op("down", "product", ("f",), ("w",), ("down",)),
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


class Rows:
    """Builds the operators of one section into a `Pipeline`.

    Parameters
    ----------
    params : RduParams
    share : Share
    tiles : Tiles
    keys : int
        Tokens that the cache has room for.
    context : int
        Tokens before the first row; a multiple of the lanes.
    """

    def __init__(self, params: RduParams, share: Share, tiles: Tiles, *, keys: int = 0, context: int = 0, window: int | None = None) -> None:
        self.p, self.share, self.model, self.tiles = params, share, share.model, tiles
        self.keys, self.context, self.window = keys, context, window
        self.line = Pipeline(params, groups=tiles.groups, blocks=tiles.blocks)
        self.at: dict[str, Matrix] = {}

    def build(self, ops: Sequence[Op], keep: Iterable[str], layer: str = "") -> Pipeline:
        """All units and streams of `ops`; matrices named in `keep` go to memory."""
        written = {t for op in ops for t in op.writes}
        readers: dict[str, list[int]] = {}
        for i, op in enumerate(ops):
            for t in op.reads:
                readers.setdefault(t, []).append(i)
        for op in ops:
            for t in op.reads:
                if t not in self.at:
                    if t in written:
                        raise UserError(f"operator {op.name} reads {t} before it is written")
                    self.at[t] = self._load(t)
            getattr(self, f"_{op.kind}")(op)
        for t in keep:
            self._store(t, self.at[t])
        return self.line

    # ---- matrices -----------------------------------------------------------------------------------

    def columns(self, tensor: str) -> int:
        """Columns of a matrix."""
        s, m = self.share, self.model
        known = {"qkv": s.q_dim + 2 * s.kv_dim, "q": s.q_dim, "a": s.q_dim, "f": s.inner, "gate_out": s.inner, "up_out": s.inner}
        return known.get(tensor, m.d_model)

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
        return [
            self.line.load(
                f"{tensor}.in{i}", "load", tensor, columns // parts, offset=i * (columns // parts) * column,
                row=columns * column,
            )
            for i in range(parts)
        ]  # fmt: skip

    def _store(self, tensor: str, matrix: Matrix) -> None:
        column = self.p.lanes * BF16_BYTES
        columns = sum(f.columns for f in matrix)
        for i, flow in enumerate(matrix):
            out = self.line.read(f"{tensor}.out{i}", "store", flow) if flow.merged or flow.each != flow.columns else flow
            self.line.store(
                f"{tensor}.store{i}", "store", out, tensor, offset=i * flow.columns * column, row=columns * column
            )

    def _whole(self, matrix: Matrix) -> Flow:
        if len(matrix) > 1:
            raise UserError(f"{sum(f.columns for f in matrix)} columns of a block exceed a PMU's buffers")
        return matrix[0]

    def _total(self, name: str, tag: str, flows: Sequence[Flow], how: str = "add", packets: int = 1) -> list[Flow]:
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
                    some = [self.line.simd(f"{name}.join{level}.{i}", tag, [(f, 0) for f in some], stages, packets, result=4)]
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
                    f"{name}.square{i}", name, [(r, 0), *inputs], [*centre, stage("multiply", 4, 4, 4)],
                    part.columns, result=4, fold="add",
                )  # fmt: skip
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
                out.append(line.simd(f"{name}.{i}", name, [(r, 0), (scale, 1), (gain, 0)], stages, n, result=4, round=1))
                continue
            bias = line.broadcast(f"{name}.bias{i}", name, f"{name}.bias", n, offset=i * n * BF16_BYTES)
            normal = line.simd(
                f"{name}.normal{i}", name, [(r, 0), *inputs, (scale, 1)],
                [stage("subtract", 0, 1, 4), stage("multiply", 4, 2, 4)], n, result=4,
            )  # fmt: skip
            out.append(
                line.simd(
                    f"{name}.{i}", name, [(normal, 0), (gain, 0), (bias, 0)],
                    [stage("multiply", 0, 1, 4), stage("add", 4, 2, 4)], n, result=4, round=1,
                )  # fmt: skip
            )
        self.at[op.writes[0]] = out

    def _product(self, op: Op) -> None:
        """A matrix product with resident weights; partial sums over ranges of its depth are added, and a bias."""
        line, name = self.line, op.name
        x = self.at[op.reads[0]]
        columns = self.columns(op.writes[0])
        outs = 1 if op.writes[0] == "qkv" else self.parts(columns)
        biased = self._biased(name)
        whole = len(x) == 1 and not biased
        result = []
        for o in range(outs):
            n = columns // outs
            strips = ceil_div(n, self.p.stages)
            units = max(1, min(strips, ceil_div(self.tiles.units.get(name, 1), outs * len(x))))
            each = ceil_div(strips, units)
            units = ceil_div(strips, each)
            sums = []
            for i, part in enumerate(x):
                # Each product has its own copy of the rows, which it can hold back.
                at = f"{name}.{o}.{i}"
                r = line.read(f"{at}.x", name, part, [(part.columns, 1), (each, 0)])
                w = line.weights(at, name, f"{at}.w", part.columns, each, units, self.tiles.gates)
                sums.append(line.product(at, name, r, part.columns, each, w, n, rounded=whole))
            if whole:
                result += sums
                continue
            flows = [line.read(f"{name}.{o}.sum{i}", name, f, [(n, 1)]) for i, f in enumerate(sums)]
            if biased:
                flows.append(line.broadcast(f"{name}.bias{o}", name, f"{name}.bias", n, offset=o * n * BF16_BYTES))
            flows = self._total(f"{name}.{o}", name, flows, packets=n)
            result.append(
                line.simd(
                    f"{name}.{o}.total", name, [(f, 0) for f in flows], self._joined(len(flows)), n, result=4, round=1
                )
            )
        self.at[op.writes[0]] = result

    def _biased(self, name: str) -> bool:
        m = self.model
        return {"qkv": m.qkv_bias, "attention_out": m.attention_out_bias}.get(name, m.mlp_bias)

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
                line.read(f"{name}.{t}", name, line.load(f"{name}.{t}.in", name, t, dim), [(dim, 1), (heads, 0)])
                for t in ("cos", "sin")
            ]
            stages = [stage("multiply", 0, 2, 4), stage("multiply", 1, 3, 5), stage("add", 4, 5, 4)]
            turned = line.simd(
                f"{name}.turn", name, [(f, 0) for f in (x, other, *tables)], stages, heads * dim, result=4, round=1
            )
        self.at[op.writes[0]] = [line.read(f"{name}.q", name, turned, [(s.q_dim, 1)])]
        token = self.p.lanes * BF16_BYTES
        row = self.keys * BF16_BYTES
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
        keys, values = self._cache(name, width, strips, wide)
        sources, readers = [], []
        for h in range(s.heads):
            own = h * s.kv_heads // s.heads
            head = f"{name}.{h}"
            x = line.read(f"{head}.q", name, q, [(dim, 1), (strips, 0)], part=(h, s.heads))
            scores = [
                line.product(f"{head}.score{k}", name, x, dim, strips, [keys[own][k]], width, rounded=False)
                for k in range(chunks)
            ]
            most = []
            for k, flow in enumerate(scores):
                r = line.read(f"{head}.first{k}", name, flow, [(width, 1)])
                most.append(
                    line.simd(
                        f"{head}.max{k}", name, [(r, 0), *self._slopes(head, h, k, width, "a")],
                        self._masked(k * width, 1), width, result=4, fold="maximum",
                    )  # fmt: skip
                )
            most = self._total(f"{head}.max", name, most, "maximum")
            top = line.simd(f"{head}.top", name, [(f, 0) for f in most], self._joined(len(most), "maximum"), 1, result=4)
            after = tuple(src[0] for src in top.sources)
            sums, parts = [], []
            for k, flow in enumerate(scores):
                r = line.read(f"{head}.second{k}", name, flow, [(width, 1)], after=after)
                power = line.simd(
                    f"{head}.exp{k}", name, [(r, 0), *self._slopes(head, h, k, width, "b"), (top, 1)],
                    [*self._masked(k * width, 1), stage("subtract", 4, 2 if m.position == "alibi" else 1, 4)],
                    width, result=4, function="exp", round=1,
                )  # fmt: skip
                sums.append(line.simd(f"{head}.sum{k}", name, [(power, 0)], [], width, fold="add"))
                x = line.read(f"{head}.p{k}", name, power, [(width, 1), (wide, 0)])
                out = line.product(f"{head}.value{k}", name, x, width, wide, [values[own][k]], dim, rounded=False)
                parts.append(out)
            sums = self._total(f"{head}.sum", name, sums)
            inverse = line.simd(
                f"{head}.inverse", name, [(f, 0) for f in sums], self._joined(len(sums)), 1, result=4, function="reciprocal"
            )
            after = tuple(src[0] for src in inverse.sources)
            reads = [line.read(f"{head}.part{k}", name, f, [(dim, 1)], after=after) for k, f in enumerate(parts)]
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
            readers.append(reads[0].sources)
        self.at[op.writes[0]] = [
            Flow(
                s.q_dim,
                tuple(tuple(src[g][0] for src in sources) for g in range(line.groups)),
                dim,
                tuple(tuple(r[g][0] for r in readers) for g in range(line.groups)),
            )
        ]

    def _fewer(self, name: str, tag: str, flows: list[Flow], packets: int) -> list[Flow]:
        out = []
        for i in range(0, len(flows), self.p.vector_inputs):
            some = flows[i : i + self.p.vector_inputs]
            if len(some) > 1:
                some = [self.line.simd(f"{name}.{i}", tag, [(f, 0) for f in some], self._joined(len(some)), packets, result=4)]
            out += some
        return out

    def _slopes(self, head: str, h: int, k: int, width: int, copy: str) -> list[tuple[Flow, int]]:
        """The linear biases of a head's keys."""
        if self.model.position != "alibi":
            return []
        offset = (h * self.keys + k * width) * BF16_BYTES
        return [(self.line.broadcast(f"{head}.bias{copy}{k}", "attention", "slopes", width, offset=offset), 0)]

    def _masked(self, first: int, alibi: int) -> list[dict[str, Any]]:
        """Stages that scale the score in register 0, and mask it where key `first` + counter 0 is none of its row's.

        The result is in register 4, registers 5 to 7 are used.
        """
        m, lanes = self.model, self.p.lanes
        groups = self.tiles.groups
        whole = {"kind": "int32"}
        out = [stage("multiply", 0, float(np.float32(m.head_dim**-0.5)), 4)]
        if m.position == "alibi":
            out.append(stage("add", 4, alibi, 4))
        out.append({"operation": "add", "type": "int32", "a_from": "counter", "a": 0, "b_from": "constant", "constant": first, "to": 5})
        if not m.causal:
            limit = {"operation": "less", "type": "int32", "a": 5, "b_from": "constant", "constant": self.keys, "c": 0, "to": 6}
            choose = {"operation": "select", "type": "int32", "a": 4, "b_from": "constant", "constant": constant(LOWEST), "c": 6, "to": 4}
            return [*out, limit, choose]
        out += [
            {"operation": "multiply", "type": "int32", "a_from": "counter", "a": 1, "b_from": "constant", "constant": lanes * groups, "to": 6},
            stage("add", 6, "lane", 6, **whole),
            {"operation": "add", "type": "int32", "a": 6, "b_from": "constant", "constant": self.context, "to": 6, "group": lanes},
            stage("less", 6, 5, 7, **whole),
        ]
        if self.window is not None:
            out += [
                {"operation": "subtract", "type": "int32", "a": 6, "b_from": "constant", "constant": self.window - 1, "to": 6},
                stage("less", 5, 6, 6, **whole),
                stage("or", 6, 7, 7, **whole),
            ]
        out.append({"operation": "select", "type": "int32", "a_from": "constant", "constant": constant(LOWEST), "b": 4, "c": 7, "to": 4})
        return out

    def _cache(self, name: str, width: int, strips: int, wide: int) -> tuple[list[list[str]], list[list[str]]]:
        """Memory units with the keys and the values of each head, by chunk."""
        line, p, s = self.line, self.p, self.share
        dim, chunks, c, lanes = self.model.head_dim, self.tiles.chunks, p.stages, p.lanes
        pitch = 1 << (dim - 1).bit_length()
        skew = min(p.banks.bit_length() - 1, pitch.bit_length() - 1)
        found: list[list[list[str]]] = []
        for what in ("keys", "values"):
            keys = what == "keys"
            size = width * (dim if keys else pitch)
            if size > line.capacity:
                raise UserError(f"{width} {what} of {dim} elements are {size} words; a PMU has {line.capacity}")
            tokens = width // lanes
            blocks = (line.blocks, 0)
            if keys:
                write = [(tokens, lanes), (dim, width), (chunks, size)]
                read = [(dim, width), (strips, c), blocks]
            else:
                write = [(tokens, lanes * pitch), (dim, 1), (chunks, size)]
                read = [(width, pitch), (wide, c), blocks]
            heads = []
            for h in range(s.kv_heads):
                row = self.keys * BF16_BYTES
                gate = line.gate(
                    f"{name}.{what}{h}.load", name, "load", "hbm", what, h * dim * row,
                    [(tokens, lanes * BF16_BYTES), (dim, row), (chunks, width * BF16_BYTES)],
                )  # fmt: skip
                units = []
                for k in range(chunks):
                    unit = line.unit(
                        f"{name}.{what}{h}.{k}", "pmu", name, enable=3, low=k * size, words=size,
                        **line.chain(name, "write_", write), write_signal_level=LEVELS,
                        write_lane_stride=1 if keys else pitch,
                        **line.chain(name, "read_", read), read_base=k * size, read_wait_level=LEVELS,
                        **({} if keys else {"skew_bits": skew, "skew_shift": pitch.bit_length() - 1}),
                    )  # fmt: skip
                    line.wire(f"{unit}.write", f"{unit}.read")
                    line.feed(gate, unit)
                    line.work[unit] = prod(n for n, _ in read)
                    units.append(unit)
                heads.append(units)
            found.append(heads)
        return found[0], found[1]

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


OPERATORS: dict[str, Callable[..., None]] = {}
_ = Fraction
