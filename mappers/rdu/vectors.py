"""Operators for the next token of each sequence as stages of one section: a vector is cut into packets of lanes."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from tilewright.arch.errors import UserError
from tilewright.arch.rdu import RduParams
from tilewright.mappers.rdu.layer import CHOSEN, Op, Share, slope
from tilewright.mappers.rdu.pieces import (
    MEETING,
    activation_stages,
    cached,
    has_bias,
    rotated,
    softmax,
    weighted,
    weights_of,
)
from tilewright.mappers.rdu.stages import BF16_BYTES, Flow, Pipeline, ceil_div, stage

__all__ = ["Bank", "Vectors", "shares_of"]


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
        biased = has_bias(self.model, name)
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
            turned = rotated(line, name, qkv, dim, heads, row=0)
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
        stages, fields = activation_stages(m.activation, m.gated_mlp)
        self.at[op.writes[0]] = line.simd(name, name, reads, stages, n, round=1, **fields)

    def _add(self, op: Op) -> None:
        line, name = self.line, op.name
        n = self.columns(op.reads[0]) // self.p.lanes
        reads = [(line.read(f"{name}.{t}", name, self.at[t], [(n, 1)]), 0) for t in op.reads]
        self.at[op.writes[0]] = line.simd(name, name, reads, self._joined(len(reads)), n, result=4, round=1)
