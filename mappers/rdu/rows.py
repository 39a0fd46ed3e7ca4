"""Operators over blocks of rows, a prompt's or a training step's, as stages of one section."""

from collections.abc import Iterable, Mapping, Sequence
from itertools import accumulate
from typing import Any

import numpy as np

from tilewright.arch.errors import UserError
from tilewright.arch.rdu import RduParams
from tilewright.mappers.rdu.allocate import Demand
from tilewright.mappers.rdu.layer import BY_ROW, SLOT, Op, Share, Tiles, slope
from tilewright.mappers.rdu.pieces import (
    LOWEST,
    MEETING,
    activation_stages,
    cached,
    has_bias,
    rotated,
    softmax,
    weighted,
    weights_of,
)
from tilewright.mappers.rdu.sparse import Range, Term, back_in_order, groups_of, terms
from tilewright.mappers.rdu.stages import BF16_BYTES, Flow, Pipeline, ceil_div, constant, stage

__all__ = ["Rows"]

UNITS = float(1 << 23)
"""A float whose last bit counts ones: an integer below it, in those bits, is added to it."""
Matrix = list[Flow]


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
        self.places: dict[str, list[tuple[int, int]]] = {}
        """Of matrices of which some flows have rows of their own: the first row and column of each."""

    DIRECT: tuple[str, ...] = ()
    """Kinds of operators that load what they read themselves."""

    def words(self, tensor: str) -> bool:
        """Whether a matrix is float32 off chip."""
        return False

    def demand(self, op: Op) -> tuple[Demand, int] | None:
        """Units that a product needs, and their gates; None for other operators. Raises UserError where none suffice."""
        if op.kind != "product":
            return None
        depth = self.columns(op.reads[0])
        parts = 1 if op.reads[0] == "a" else self.parts(depth)
        outs = self._outs(op.writes[0])
        ranges = [Range(i, 0, i * (depth // parts), depth // parts) for i in range(parts)]
        return self._demand(op, ranges, outs)

    def _demand(self, op: Op, ranges: Sequence[Range], outs: int, grain: int = 1) -> tuple[Demand, int]:
        """Of a product whose input comes in `ranges`, and whose result is given in `outs` parts, in strips of `grain`
        strips."""
        products = self._terms(op, ranges, outs, 0)
        one = products[0][0]
        pieces = outs * len(products) * len(products[0])
        strips = ceil_div(one.y.count, self.p.stages * grain)
        return self._shares(op.name, one.x.count, strips, pieces, grain, len(products[0]))

    def _shares(
        self, name: str, depth: int, strips: int, pieces: int, grain: int = 1, together: int = 1
    ) -> tuple[Demand, int]:
        """Each of `pieces` products of `depth` has `strips` of `grain` strips; the results of so many come `together`."""
        most = self.held(depth, grain)  # that a PMU holds
        if not most:
            raise UserError(f"{name}: {depth} rows of {self.p.stages * grain} columns are too many for a PMU")
        least = ceil_div(strips, most)
        return Demand(
            name, "pcu", strips * pieces, depth * grain * self.tiles.blocks, least=least * pieces,
            most=min(strips, max(least, MEETING // together)) * pieces,
        ), pieces  # fmt: skip

    def _terms(self, op: Op, ranges: Sequence[Range], outs: int, out: int) -> list[list[Term]]:
        """The products of part `out` of the result of `op`, of `outs` parts; its input comes in `ranges`."""
        depth, columns = self.columns(op.reads[0]), self.columns(op.writes[0])
        width = columns // outs
        return terms(op.name, groups_of(self.model, op), depth, ranges, columns, out * width, width)

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
        groups = self.model.weight_groups
        step = 1 if columns % groups else groups  # as many columns of each group
        while columns % (parts * step) or (step % parts and parts % step):
            parts += 1
        return parts

    def _outs(self, tensor: str) -> int:
        """Ranges of the columns in which a product gives a matrix: queries, keys and values come together, where there is
        room for them."""
        columns = self.columns(tensor)
        if tensor != "qkv":
            return self.parts(columns)
        fits = self.line.buffers * self.p.lanes * columns <= self.line.capacity
        return 1 if fits or self.share.heads != self.share.kv_heads else 3

    def _load(self, tensor: str) -> Matrix:
        columns = self.columns(tensor)
        parts = 1 if tensor == "q" else self._outs(tensor)
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
        places = self.places.get(tensor) or [
            (0, at) for at in accumulate((f.columns for f in matrix[:-1]), initial=0)
        ]
        columns = sum(f.columns for f in matrix) // len({row for row, _ in places})
        for i, flow in enumerate(matrix):
            first_row, first_column = places[i]
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
                offset=(first_row // self.p.lanes * columns + first_column)
                * column
                * (1 + self.words(tensor)),
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
        """A matrix product with resident weights; partial sums over ranges of its depth are added, and a bias.

        Of sparse weights that of each group by itself.
        """
        line, name = self.line, op.name
        x = self.at[op.reads[0]]
        columns = self.columns(op.writes[0])
        outs = self._outs(op.writes[0])
        biased, groups = has_bias(self.model, name), groups_of(self.model, op)
        firsts = accumulate((part.columns for part in x), initial=0)
        ranges = [Range(i, 0, at, part.columns) for i, (part, at) in enumerate(zip(x, firsts, strict=False))]
        result = []
        for o in range(outs):
            n = columns // outs
            products = self._terms(op, ranges, outs, o)
            whole = len(products) == 1 and not biased
            pieces = outs * len(products) * len(products[0])
            each, units = self.split(name, ceil_div(products[0][0].y.count, self.p.stages), pieces)
            pitch = self._pitch(products[0], each)
            sums = []
            for some in products:
                flows = []
                for k, t in enumerate(some):
                    # Each product has its own copy of the rows, which it can hold back.
                    at = f"{name}.{o}.{t.source.part}" + (f".{t.x.group}" if groups > 1 else "")
                    r = line.read(
                        f"{at}.x", name, x[t.source.part], [(t.x.count, t.x.step), (each, 0)], first=t.x.first
                    )
                    w = self._weights(op, at, t, each, units)
                    flows.append(
                        line.product(
                            at, name, r, t.x.count, each, w, t.y.count, rounded=whole, sequence=k * pitch
                        )
                    )
                sums.append(Flow.of(flows, len(flows) * pitch))
            order = back_in_order(name, len(products[0]), products[0][0].y.count, pitch)
            if whole:
                if self.share.sockets > 1 or groups > 1 or op.writes[0] == "qkv":
                    # Several read it: many streams end here.
                    sums = [line.read(f"{name}.{o}.all", name, f, order) for f in sums if f.merged] or sums
                result += sums
                continue
            flows = [line.read(f"{name}.{o}.sum{i}", name, f, order) for i, f in enumerate(sums)]
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

    def _pitch(self, some: Sequence[Term], strips: int) -> int:
        """Columns from one group's results to the next one's, where they meet: a single unit may give more than there are."""
        return max(some[0].y.count, strips * self.p.stages)

    def _weights(self, op: Op, at: str, term: Term, strips: int, units: int) -> list[list[str]]:
        """Memory units with the weights of a product."""
        tensor = f"{at}.w" if op.slot is None else f"{weights_of(op)}.{at}.w"
        return self.line.weights(at, op.name, tensor, term.x.count, strips, units, self.tiles.gates)

    def _positions(self, op: Op) -> None:
        """Rotary positions where the model has them; keys and values go to the cache."""
        line, m, s, name = self.line, self.model, self.share, op.name
        dim, given = m.head_dim, self.at[op.reads[0]]
        if len(given) == 3:  # each by itself
            parts = list(given)
            if m.position == "rotary":
                parts[:2] = (
                    rotated(line, f"{name}.{what}", flow, dim, s.heads)
                    for what, flow in zip(("queries", "keys"), given, strict=False)
                )
            queries, keys, values = ((flow, 0) for flow in parts)
        else:
            qkv = turned = self._whole(given)
            if m.position == "rotary":
                turned = rotated(line, name, qkv, dim, s.heads + s.kv_heads)
            queries, keys, values = (turned, 0), (turned, s.q_dim), (qkv, s.q_dim + s.kv_dim)
        self.at[op.writes[0]] = [line.read(f"{name}.q", name, queries[0], [(s.q_dim, 1)])]
        token = self.p.lanes * BF16_BYTES
        row = self.pitch * BF16_BYTES
        for at, (source, first) in (("keys", keys), ("values", values)):
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
        outs = []
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
            outs.append(final)
        self.at[op.writes[0]] = [Flow.of(outs, s.q_dim)]

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
            stages, fields = activation_stages(m.activation, m.gated_mlp)
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
