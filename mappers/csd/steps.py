"""From operators to commands: attention in the drives, all else on the GPU, and what the link carries between them.

A pass over the prompt is a segment, and so is a decode step. The drive's commands stand in the order in which one decoder takes them, so that what may
overlap is what stands in front of a wait.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.arch.csd import (
    AFTER_DRIVE,
    AFTER_GPU,
    AFTER_LINK,
    ATTENTIONS,
    CACHED,
    FORMS,
    ISA,
    OP,
    PATHS,
)
from tilewright.arch.isa import Segment
from tilewright.arch.scenario import Scenario, TagInfo
from tilewright.mappers.csd.layout import BYTES, Layout, ceil_div
from tilewright.workloads.graph import Graph, Operator, OpKind, prefill

Code = NDArray[Any]
_DTYPE = ISA.record("code").dtype
_TOKENS, _CHANNELS = (FORMS.index(form) for form in FORMS)
_PRODUCTS = (OpKind.SCORES, OpKind.SOFTMAX, OpKind.VALUES)


@dataclass(frozen=True)
class Gpu:
    """An operator of the GPU: its kind, operations, and bytes to and from its memory.

    `by_key` of both grow with every token that is attended to.
    """

    name: str
    layer: int
    operations: int
    bytes: int
    by_key: tuple[int, int] = (0, 0)


@dataclass(frozen=True)
class LayerWork:
    """GPU operators of a layer: up to keys and values, attention, and what follows."""

    before: Sequence[Gpu]
    attention: Gpu
    behind: Sequence[Gpu]


class Lines:
    """Commands on their way to an array; a field that is not given is 0."""

    def __init__(self) -> None:
        self.rows: list[dict[str, int]] = []

    def add(self, op: str, tag: int, **fields: int) -> int:
        """Returns the command's place."""
        self.rows.append({"op": OP[op], "tag": tag, **fields})
        return len(self.rows) - 1

    def array(self) -> Code:
        out = np.zeros(len(self.rows), _DTYPE)
        for name in {name for row in self.rows for name in row}:
            out[name] = [row.get(name, 0) for row in self.rows]
        return out


def work_of(graph: Graph) -> tuple[list[Gpu], list[LayerWork], list[Gpu]]:
    """What the GPU does before the layers, in each, and after them.

    An operator reads its weights and inputs and writes its outputs in FP16. Scores and weights of attention stay in
    the GPU's SMs, so that its three operators are one. Keys and values are read where they are attended to.
    """
    layers: dict[int, list[Operator]] = {}
    for op in graph.operators:
        layers.setdefault(op.layer, []).append(op)
    first = next(i for i, op in enumerate(graph.operators) if op.layer >= 0)
    outside: dict[bool, list[Gpu]] = {True: [], False: []}
    for i, op in enumerate(graph.operators):
        if op.layer < 0:
            outside[i < first].append(_gpu(op))
    inside = []
    for layer in range(graph.model.layers):
        ops = layers[layer]
        at = next(i for i, op in enumerate(ops) if op.kind is OpKind.KV_APPEND)
        products = [op for op in ops if op.kind in _PRODUCTS]
        inside.append(
            LayerWork(
                [_gpu(op) for op in ops[:at]],
                _attention(products, layer, graph.phase),
                [_gpu(op) for op in ops[at + 1 :] if op.kind not in _PRODUCTS],
            )
        )
    return outside[True], inside, outside[False]


def _gpu(op: Operator) -> Gpu:
    moved = op.weight_bytes(16) + op.input_bytes(16) + op.output_bytes(16)
    return Gpu(op.name, op.layer, op.flops, moved)


def _attention(ops: Sequence[Operator], layer: int, phase: str) -> Gpu:
    scores, _, values = ops
    keys = scores.n
    operations = sum(op.flops for op in ops)
    cached = scores.kv_read_bytes(16) + values.kv_read_bytes(16)
    by_key = (operations // keys, cached // keys) if phase == "decode" else (0, 0)
    ends = scores.input_bytes(16) + values.output_bytes(16)
    name = "attention" if phase == "decode" else "prompt_attention"
    return Gpu(name, layer, operations, ends + cached, by_key)


class Steps:
    """The segments of a run; generated when walked. `steps` has the number of the step that each belongs to."""

    def __init__(self, layout: Layout, scenario: Scenario, graphs: Mapping[str, Graph]) -> None:
        self.layout, self.scenario, self.graphs = layout, scenario, graphs
        self.tags: list[TagInfo] = []
        self._tag_of: dict[tuple[str, int], int] = {}
        s, layers = scenario, layout.model.layers
        drive = layout.kv == "drive"
        self.passes = [
            (first, min(layout.prompt_batch, s.batch - first))
            for first in (range(0, s.batch, layout.prompt_batch) if s.prompt else ())
        ]
        self.steps = [0] * (layers * (drive and s.context > 0) + len(self.passes))
        self.steps += [bool(s.prompt) + i for i in range(s.generate)]
        self.reclaimed = (
            min(layout.full_blocks, layout.spec.flash.geometry.blocks_per_plane - 1) if drive else 0
        )
        if drive and layout.free_blocks >= layout.reclaim * layout.spec.flash.geometry.blocks_per_plane:
            self.reclaimed = 0
        self.steps += [self.steps[-1]] * bool(self.reclaimed)
        self._decode: dict[bool, _Step] = {}
        self._elsewhere: dict[tuple[bool, bool], tuple[Code, NDArray[np.int64], NDArray[np.int64]]] = {}
        self._work = work_of(graphs["decode"]) if s.generate else None
        # Tags are numbered now, in the order of the program: a step that completes a span has one more operator.
        if drive and s.context:
            self._tag("config", -1)
        if self.passes:
            self._pass(*self.passes[0])
        kinds = {self._ends_span(i): i for i in reversed(range(s.generate))} if drive else {False: 0}
        for i in sorted(kinds.values()) if s.generate else ():
            self._step(i)
        if self.reclaimed:
            self._tag("reclaim", -1)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Segment]:
        s = self.scenario
        if s.context and self.layout.kv == "drive":
            yield from self._cached()
        for first, sequences in self.passes:
            yield self._pass(first, sequences)
        for i in range(s.generate):
            yield Segment({"code": self._step(i)}, label=f"token {i}")
        if self.reclaimed:
            code = Lines()
            code.add("RECLAIM", self._tag("reclaim", -1), count=self.reclaimed)
            yield Segment({"code": code.array()}, label="reclaim")

    def _tag(self, op: str, layer: int) -> int:
        key = (op, layer)
        if key not in self._tag_of:
            self._tag_of[key] = len(self.tags)
            self.tags.append(TagInfo(f"layer {layer} {op}" if layer >= 0 else op, op, layer))
        return self._tag_of[key]

    # ---- parts --------------------------------------------------------------------------------------

    def _gpus(self, code: Lines, work: Sequence[Gpu], after: int = 0) -> None:
        for op in work:
            code.add(
                "GPU", self._tag(op.name, op.layer), operations=op.operations, bytes=op.bytes, after=after
            )
            after = 0

    def _link(self, code: Lines, op: str, layer: int, size: int, path: str, after: int) -> None:
        if size:
            code.add("LINK", self._tag(op, layer), bytes=size, path=PATHS.index(path), after=after)

    def _config(self, code: Lines, tokens: int) -> None:
        """What holds for attention over so many tokens."""
        lay, d = self.layout, self.layout.model.head_dim
        r, k = self._selection(tokens)
        code.add(
            "CONFIG", self._tag("config", -1), attention=ATTENTIONS.index(lay.attention), d=d, group=lay.group,
            r=r, k=k, local=lay.spec.attention.local if lay.sparse else 0, mean=lay.group == 1,
            scale=_fp32(1 / np.sqrt(d)), page_tokens=lay.page_tokens, page_channels=lay.page_channels,
            span=lay.span,
        )  # fmt: skip

    def _store(
        self, code: Lines, tag: int, slot: int, heads: int, tokens: tuple[int, int], line: int, *, first: bool
    ) -> None:
        """Keys and values of a prompt's tokens (from, to), in both forms, from a half of the vectors at `line` on:
        the `first` command, of the token-indexed form, or those that follow."""
        lay, (begin, end) = self.layout, tokens
        lines = heads * lay.model.head_dim // lay.spec.engine.lanes
        part = (end - begin) * lines
        at = {"slot": slot, "heads": heads}
        if first:
            code.add(
                "WRITE", tag, form=_TOKENS, first=begin, tokens=end - begin, line=line, line2=line + part,
                after=AFTER_LINK | AFTER_DRIVE, **at,
            )  # fmt: skip
            return
        for i, span in enumerate(range(lay.spans(begin), lay.spans(end))):
            code.add(
                "WRITE", tag, form=_CHANNELS, first=span, line=line + 2 * part + i * lay.span * lines, **at
            )

    # ---- what is cached -----------------------------------------------------------------------------

    def _cached(self) -> Iterator[Segment]:
        """Writes of what is in the drive when the run begins; they take no time."""
        lay, context = self.layout, self.scenario.context
        for layer in range(lay.model.layers):
            code = Lines()
            self._config(code, context)
            for at, heads in _chunks(lay.layer_slots, lay.cached_heads):
                slot = layer * lay.layer_slots + at
                for first in (True, False):
                    self._store(code, self._tag("config", -1), slot, heads, (0, context), 0, first=first)
            yield Segment({"code": code.array()}, label=CACHED)

    # ---- the prompt ---------------------------------------------------------------------------------

    def _pass(self, first: int, sequences: int) -> Segment:
        """So many sequences from the `first` on, layer by layer."""
        s, code = self.scenario, Lines()
        head, layers, tail = work_of(self._graph_of(sequences))
        send = self._send if self.layout.kv == "drive" else self._send_elsewhere
        if self.layout.kv == "drive":
            self._config(code, s.context + s.prompt)
        self._gpus(code, head)
        self._fetch_elsewhere(code, 0, s.context, sequences)
        self._gpus(code, layers[0].before, self._fetched)
        half = 0
        for layer, work in enumerate(layers):
            following = layers[layer + 1].before if layer + 1 < len(layers) else tail
            half = send(code, layer, work, following, first, sequences, half)
        label = "prompt" if len(self.passes) == 1 else f"prompt {first}-{first + sequences - 1}"
        return Segment({"code": code.array()}, label=label)

    def _graph_of(self, sequences: int) -> Graph:
        s, graph = self.scenario, self.graphs["prompt"]
        if graph.batch == sequences:
            return graph
        return prefill(
            graph.model,
            prompt=s.prompt,
            context=s.context,
            batch=sequences,
            lm_head=s.lm_head,
            embedding=s.embedding,
        )

    def _send(
        self,
        code: Lines,
        layer: int,
        work: LayerWork,
        following: Sequence[Gpu],
        first: int,
        sequences: int,
        half: int,
    ) -> int:
        """K and V of a layer leave as soon as they are there, while the GPU goes on; returns the next half.

        The link fills one half of the vectors while the drive stores what lies in the other: the first WRITE of a part
        waits for its link and for the WRITEs before it, so that the next part may come in behind it.
        """
        lay, s = self.layout, self.scenario
        if s.context:
            half = self._bring_back(code, layer, first, sequences, half)
        slot = layer * lay.layer_slots + first * lay.heads
        parts = list(_chunks(sequences * lay.heads, lay.send_heads))
        head_bytes = lay.head_lines(s.context, s.prompt) * lay.spec.engine.lanes * BYTES
        after = AFTER_GPU | (AFTER_LINK if s.context else 0)
        self._link(code, "kv_send", layer, parts[0][1] * head_bytes, "drive", after)
        self._gpus(code, [work.attention, *work.behind, *following])
        tag, tokens = self._tag("kv_write", layer), (s.context, s.context + s.prompt)
        for (at, heads), (_, more) in zip(parts, [*parts[1:], (0, 0)], strict=True):
            self._store(code, tag, slot + at, heads, tokens, half * lay.half, first=True)
            self._link(code, "kv_send", layer, more * head_bytes, "drive", 0)
            self._store(code, tag, slot + at, heads, tokens, half * lay.half, first=False)
            half = 1 - half
        return half

    def _bring_back(self, code: Lines, layer: int, first: int, sequences: int, half: int) -> int:
        """What is cached goes to the GPU, which attends to it from the prompt: full pages from flash, the rest from the
        group buffer."""
        lay, context = self.layout, self.scenario.context
        slot, total = layer * lay.layer_slots + first * lay.heads, sequences * lay.heads
        pages, d = lay.full_pages(context), lay.model.head_dim
        read, sent = AFTER_LINK | AFTER_DRIVE, AFTER_DRIVE
        for at, heads in _chunks(total, lay.back_heads):
            if pages:
                code.add(
                    "READ", self._tag("kv_read", layer), form=_TOKENS, slot=slot + at, heads=heads, first=0, count=pages,
                    line=half * lay.half, after=read,
                )  # fmt: skip
            self._link(code, "kv_fetch", layer, heads * 2 * context * d * BYTES, "drive", sent)
            read, sent, half = 0, AFTER_LINK | AFTER_DRIVE, 1 - half
        return half

    # ---- decode -------------------------------------------------------------------------------------

    def _step(self, i: int) -> Code:
        """The commands of decode step i, from a template in which only what depends on the step is set."""
        lay, s = self.layout, self.scenario
        tokens = s.context + s.prompt + i + 1
        if lay.kv != "drive":
            return self._step_elsewhere(i, tokens)
        ends_span = self._ends_span(i)
        if ends_span not in self._decode:
            self._decode[ends_span] = self._template(tokens, ends_span)
        template = self._decode[ends_span]
        code = template.code.copy()
        code["r"][template.config], code["k"][template.config] = self._selection(tokens)
        for name, value in (
            ("tokens", tokens),
            ("spans", lay.spans(tokens - 1)),
            ("share", _fp32(1 / tokens)),
        ):
            code[name][template.attend] = value
        code["first"][template.write] = tokens - 1
        if ends_span:
            code["first"][template.transpose] = lay.spans(tokens) - 1
        if i == 0:  # what stored the prompt still reads the vectors
            code["after"][template.first_link] |= AFTER_DRIVE
        return code

    def _ends_span(self, i: int) -> bool:
        """Whether the token of step i is the last of a span."""
        tokens = self.scenario.context + self.scenario.prompt + i
        return self.layout.spans(tokens + 1) > self.layout.spans(tokens)

    def _selection(self, tokens: int) -> tuple[int, int]:
        """Channels and tokens of attention over so many tokens."""
        lay, d = self.layout, self.layout.model.head_dim
        return lay.spec.selection(tokens, d) if lay.sparse else (d, tokens)

    def _template(self, tokens: int, ends_span: bool) -> "_Step":
        lay, d = self.layout, self.layout.model.head_dim
        assert self._work is not None
        head, layers, tail = self._work
        code = Lines()
        self._config(code, tokens)
        self._gpus(code, head)
        queries = lay.layer_slots * lay.group * d * BYTES
        new = 2 * lay.layer_slots * d * BYTES
        lines = d // lay.spec.engine.lanes
        for layer, work in enumerate(layers):
            slot = layer * lay.layer_slots
            self._gpus(code, work.before)
            self._link(code, "send", layer, queries + new, "drive", AFTER_GPU)
            tag = self._tag("kv_append", layer)
            for at, heads in _chunks(lay.layer_slots, lay.append_heads):
                code.add(
                    "WRITE", tag, form=_TOKENS, slot=slot + at, heads=heads, tokens=1, line=lay.key_line + at * lines,
                    line2=lay.value_line + at * lines, after=0 if at else AFTER_LINK,
                )  # fmt: skip
            tag = self._tag("attention", layer)
            for at, heads in _chunks(lay.layer_slots, lay.chunk):
                code.add(
                    "ATTEND", tag, slot=slot + at, heads=heads, line=at * lay.group * lines,
                    line2=lay.result_line + at * lay.group * lines, after=AFTER_DRIVE,
                )  # fmt: skip
            self._link(code, "receive", layer, queries, "drive", AFTER_DRIVE)
            if ends_span:
                tag = self._tag("transpose", layer)
                for at, heads in _chunks(lay.layer_slots, lay.append_heads):
                    code.add("TRANSPOSE", tag, slot=slot + at, heads=heads)
            self._gpus(code, work.behind, AFTER_LINK)
        self._gpus(code, tail)
        return _Step.of(code.array())

    # ---- keys and values elsewhere ------------------------------------------------------------------

    @property
    def _paths(self) -> tuple[str, str]:
        """To keep keys and values, and to bring them back."""
        return ("ssd_write", "ssd_read") if self.layout.kv == "ssd" else ("host", "host")

    @property
    def _fetched(self) -> int:
        """What a prompt waits for that attends to cached tokens."""
        return AFTER_LINK if self.layout.kv != "drive" and self.scenario.context else 0

    def _kv_share(self, tokens: int, sequences: int) -> int:
        """Bytes of a layer's keys and values, the share of one drive: paths are shared out to drives."""
        return ceil_div(2 * tokens * sequences * self.layout.model.kv_dim * BYTES, self.layout.spec.drives)

    def _fetch_elsewhere(self, code: Lines, layer: int, tokens: int, sequences: int) -> None:
        if self.layout.kv != "drive":
            self._link(code, "kv_fetch", layer, self._kv_share(tokens, sequences), self._paths[1], 0)

    def _send_elsewhere(
        self,
        code: Lines,
        layer: int,
        work: LayerWork,
        following: Sequence[Gpu],
        first: int,
        sequences: int,
        half: int,
    ) -> int:
        s = self.scenario
        self._link(code, "kv_send", layer, self._kv_share(s.prompt, sequences), self._paths[0], AFTER_GPU)
        if layer + 1 < self.layout.model.layers:
            self._fetch_elsewhere(code, layer + 1, s.context, sequences)
        self._gpus(code, [work.attention, *work.behind])
        self._gpus(code, following, self._fetched)
        return half

    def _step_elsewhere(self, i: int, tokens: int) -> Code:
        """The GPU attends to what comes over the link a layer ahead, and gives the new token's K and V back."""
        s = self.scenario
        kind = i == 0, i + 1 == s.generate
        if kind not in self._elsewhere:
            self._elsewhere[kind] = self._template_elsewhere(tokens, *kind)
        template, attention, fetch = self._elsewhere[kind]
        code = template.copy()
        assert self._work is not None
        more = tokens - (s.context + s.prompt + 1)  # than in the first step
        for name, column in (("operations", 0), ("bytes", 1)):
            code[name][attention] = [
                (work.attention.operations, work.attention.bytes)[column]
                + more * work.attention.by_key[column]
                for work in self._work[1]
            ]
        code["bytes"][fetch] = self._kv_share(tokens - 1, s.batch)
        if not kind[1]:
            code["bytes"][fetch[-1]] = self._kv_share(tokens, s.batch)
        return code

    def _template_elsewhere(
        self, tokens: int, first: bool, last: bool
    ) -> tuple[Code, NDArray[np.int64], NDArray[np.int64]]:
        """The commands of a step, and which of them attend and fetch; `tokens` only says whether there is anything to
        fetch."""
        s, lay = self.scenario, self.layout
        assert self._work is not None
        head, layers, tail = self._work
        code = Lines()
        attention = []
        if first:
            self._fetch_elsewhere(code, 0, tokens - 1, s.batch)
        self._gpus(code, head)
        for layer, work in enumerate(layers):
            self._gpus(code, work.before)
            attention.append(code.add("GPU", self._tag(work.attention.name, layer), after=AFTER_LINK))
            self._gpus(code, work.behind)
            if layer + 1 < lay.model.layers:
                self._fetch_elsewhere(code, layer + 1, tokens - 1, s.batch)
            elif not last:
                self._fetch_elsewhere(code, 0, tokens, s.batch)
            self._link(code, "kv_store", layer, self._kv_share(1, s.batch), self._paths[0], AFTER_GPU)
        self._gpus(code, tail)
        out = code.array()
        fetches = [tag for (op, _), tag in self._tag_of.items() if op == "kv_fetch"]
        return out, np.array(attention), np.flatnonzero(np.isin(out["tag"], fetches))


@dataclass(frozen=True)
class _Step:
    """A decode step, and where its commands of each kind are."""

    code: Code
    config: NDArray[np.int64]
    attend: NDArray[np.int64]
    write: NDArray[np.int64]
    transpose: NDArray[np.int64]
    first_link: int

    @classmethod
    def of(cls, code: Code) -> "_Step":
        at = {
            name: np.flatnonzero(code["op"] == OP[name])
            for name in ("CONFIG", "ATTEND", "WRITE", "TRANSPOSE")
        }
        first = int(np.argmax(code["op"] == OP["LINK"]))
        return cls(code, at["CONFIG"], at["ATTEND"], at["WRITE"], at["TRANSPOSE"], first)


def _chunks(total: int, size: int) -> Iterator[tuple[int, int]]:
    for at in range(0, total, size):
        yield at, min(size, total - at)


def _fp32(value: Any) -> int:
    """Bits of the FP32 number nearest to a value."""
    return int(np.float32(value).view(np.uint32))
