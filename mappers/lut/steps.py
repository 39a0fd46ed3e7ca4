"""From operators to instructions: linear layers on the lookup arrays, all else on the ordinary units.

A pass (the prompt as a whole, or one decode step) is a segment for each layer, and one each for what comes before the
first and after the last.
Operators run one after the other, as the kernels of a GPU do, and each pays one launch.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilewright.arch.isa import Segment
from tilewright.arch.lut import KINDS, LEVELS, OP, LutSpec
from tilewright.arch.scenario import Scenario, TagInfo
from tilewright.mappers.lut.gemm import Code, ceil_div, joined, records
from tilewright.mappers.lut.layout import EPILOGUE, FP16, Layout
from tilewright.workloads.graph import Graph, Operator, OpKind, decode_step, prefill
from tilewright.workloads.models import ModelConfig

_ELEMENTWISE = (OpKind.NORM, OpKind.ACTIVATION, OpKind.MULTIPLY, OpKind.ADD)
_PRODUCTS = (OpKind.SCORES, OpKind.VALUES, OpKind.LM_HEAD)
_TEMPLATES = 8  # that are kept; a pass has three or four kinds of layers


class Work(NamedTuple):
    """What the whole device's ordinary units do in one go."""

    kind: str
    operations: int
    near: int
    """Bytes that an operator wrote just before, or one reads next."""
    far: int = 0
    """Bytes that are in DRAM, or must get there: parameters and the KV cache."""

    def code(self, spec: LutSpec, tag: int, alongside: bool = False) -> Code:
        """One instruction. All its bytes count as L2's if most of them are near and all of them fit."""
        total = self.near + self.far
        level = "l2" if self.far < self.near and total <= spec.memory.l2_bytes else "dram"
        return records(
            "ORDINARY", 1, kind=KINDS.index(self.kind), operations=ceil_div(self.operations, spec.cores),
            bytes=ceil_div(total, spec.cores), level=LEVELS.index(level), alongside=alongside, tag=tag,
        )  # fmt: skip


class Node(NamedTuple):
    """An operator and its surroundings in the graph."""

    op: Operator
    feeds_linear: bool = False
    feeds_others: bool = False
    prepared: bool = False
    """Of a linear layer: another one reads the same input and comes first, or its producer prepares it."""

    @property
    def shape(self) -> tuple[Any, ...]:
        """Equal for nodes that become the same instructions."""
        op = self.op
        traffic = (
            op.weight_elements,
            op.input_elements,
            op.output_elements,
            op.kv_read_elements,
            op.kv_write_elements,
        )
        return (
            op.name,
            op.m,
            op.k,
            op.n,
            op.instances,
            op.macs,
            op.other_flops,
            op.bias,
            *traffic,
            *self[1:],
        )


@dataclass
class Template:
    """The instructions of some operators; their tags count from 0 within it. Built part by part, then `close`d."""

    names: list[tuple[str, str]] = field(default_factory=list)
    """Name within the layer, and kind, of the operator of each tag."""
    parts: list[Code] = field(default_factory=list)

    def close(self) -> None:
        self.code = joined(self.parts)
        self.parts.clear()

    @cached_property
    def weight_loads(self) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where weights are loaded, and for which tag."""
        at = np.flatnonzero(self.code["op"] == OP["LOAD_W"])
        return at, self.code["tag"][at]

    def tag(self, name: str, op: str) -> int:
        self.names.append((name, op))
        return len(self.names) - 1


def graphs(model: ModelConfig, scenario: Scenario) -> dict[str, Graph]:
    """The graph of each phase of a run: the prompt, and the first decode step.

    Raises UserError for what the model can't do, more tokens than it has positions among it.
    """
    s = scenario
    flags = _flags(s)
    out = {}
    if s.prompt:
        out["prompt"] = prefill(model, prompt=s.prompt, context=s.context, **flags)
    if s.generate:
        decode_step(model, context=s.context + s.prompt + s.generate - 1, **flags)  # the longest
        out["decode"] = decode_step(model, context=s.context + s.prompt, **flags)
    return out


def _flags(s: Scenario) -> dict[str, Any]:
    return {"batch": s.batch, "lm_head": s.lm_head, "embedding": s.embedding}


class Steps:
    """The segments of a run; generated when walked, from a template for each kind of layer.

    `steps` has the number of the step that each segment belongs to.
    """

    def __init__(self, layout: Layout, scenario: Scenario, phases: Mapping[str, Graph]) -> None:
        self.layout, self.scenario, self.phases = layout, scenario, phases
        self.tags: list[TagInfo] = []
        self.steps: list[int] = []
        self._tag_of: dict[str, int] = {}
        self._templates: dict[Any, Template] = {}
        self._linears: dict[str, list[Code]] = {}
        for phase, graph in phases.items():
            sections = self._sections(graph)
            for _ in range(scenario.generate if phase == "decode" else 1):
                self.steps += [self.steps[-1] + 1 if self.steps else 0] * len(sections)
            for layer, nodes in sections:
                self._global_tags(self._template(phase, nodes), layer)

    def __len__(self) -> int:
        return len(self.steps)

    def __iter__(self) -> Iterator[Segment]:
        s = self.scenario
        if s.prompt:
            yield from self._pass("prompt", "prompt", self.phases["prompt"])
        for i in range(s.generate):
            first = s.context + s.prompt
            graph = self.phases["decode"]
            if i:
                graph = decode_step(graph.model, context=first + i, **_flags(s))
            yield from self._pass("decode", f"token {i}", graph)

    def _pass(self, phase: str, label: str, graph: Graph) -> Iterator[Segment]:
        for layer, nodes in self._sections(graph):
            template = self._template(phase, nodes)
            code = template.code.copy()
            at, tags = template.weight_loads
            places = [self.layout.weight_lines.get((layer, name), 0) for name, _ in template.names]
            code["line"][at] += np.array(places)[tags]
            code["tag"] = np.array(self._global_tags(template, layer))[template.code["tag"]]
            where = f"layer {layer}" if layer >= 0 else nodes[0].op.name
            yield Segment({"code": code}, label=f"{label} {where}")

    def _global_tags(self, template: Template, layer: int) -> list[int]:
        out = []
        for name, op in template.names:
            full = f"layer {layer} {name}" if layer >= 0 else name
            if full not in self._tag_of:
                self._tag_of[full] = len(self.tags)
                self.tags.append(TagInfo(full, op, layer))
            out.append(self._tag_of[full])
        return out

    def _sections(self, graph: Graph) -> list[tuple[int, list[Node]]]:
        """The operators of each layer; what comes before the first and after the last belongs to layer -1."""
        ops = graph.operators
        readers: list[list[Operator]] = [[] for _ in ops]
        for op in ops:
            for i in op.inputs:
                readers[i].append(op)
        nodes, prepared = [], set[int | None]()
        for i, op in enumerate(ops):
            linear = [r.kind is OpKind.LINEAR for r in readers[i]]
            node = Node(op, any(linear), not all(linear))
            if op.kind is OpKind.LINEAR:
                source = op.inputs[0] if op.inputs else None
                node = node._replace(prepared=source in prepared)
                prepared.add(source)
            elif self._fuses(node):
                prepared.add(i)
            nodes.append(node)
        return [(layer, list(own)) for layer, own in groupby(nodes, key=lambda node: node.op.layer)]

    # ---- templates ----------------------------------------------------------------------------------

    def _template(self, phase: str, nodes: Sequence[Node]) -> Template:
        key = phase, tuple(node.shape for node in nodes)
        if key not in self._templates:
            if len(self._templates) >= _TEMPLATES:  # each decode step has its own
                self._templates.clear()
            out = Template()
            for node in nodes:
                if node.op.kind is OpKind.LINEAR:
                    self._linear(out, phase, node)
                else:
                    self._ordinary(out, phase, node)
            out.close()
            self._templates[key] = out
        return self._templates[key]

    def _fuses(self, node: Node) -> bool:
        """Whether an operator also prepares what the linear layers read of it: an element-wise one does."""
        lay = self.layout
        wanted = node.feeds_linear and lay.prepares and lay.precompute == "fused"
        return wanted and node.op.kind in _ELEMENTWISE

    def _ordinary(self, out: Template, phase: str, node: Node) -> None:
        op, lay = node.op, self.layout
        near = op.input_bytes(FP16) + op.output_bytes(FP16)
        far = op.weight_bytes(FP16) + op.kv_write_bytes(FP16)
        if phase == "prompt" and not self.scenario.context:  # this very pass wrote the keys and values
            near += op.kv_read_bytes(FP16)
        else:
            far += op.kv_read_bytes(FP16)
        if lay.attention == "fused":  # scores never leave the SM
            if op.kind is OpKind.SCORES:
                near -= op.output_bytes(FP16)
            elif op.kind is OpKind.SOFTMAX:
                near = 0
            elif op.kind is OpKind.VALUES:
                near -= op.macs // op.n * FP16 // 8  # a multiply-accumulate for each score and element
        operations = op.flops
        if self._fuses(node):
            operations += lay.precompute_operations(op.output_elements)
            near += int(op.output_elements * lay.operand_bits / 8)
            if not node.feeds_others or lay.operand_bits == FP16:
                near -= op.output_bytes(FP16)
        kind = "tensor_fp16" if op.kind in _PRODUCTS else "vector"
        out.parts.append(Work(kind, operations, near, far).code(lay.spec, out.tag(op.name, op.name)))

    def _linear(self, out: Template, phase: str, node: Node) -> None:
        op, lay = node.op, self.layout
        if lay.prepares and not node.prepared:
            elements = op.m * op.k
            near = elements * FP16 // 8
            if lay.operand_bits != FP16:
                near += int(elements * lay.operand_bits / 8)
            work = Work("vector", lay.precompute_operations(elements), near)
            out.parts.append(work.code(lay.spec, out.tag(f"{op.name} precompute", "precompute")))
        tag = out.tag(op.name, op.name)
        if lay.linear != "lut":
            near = int(op.m * op.k * lay.operand_bits / 8) + op.output_bytes(FP16)
            work = Work(lay.linear, 2 * op.macs, near, op.k * op.n * lay.linear_bits // 8)
            out.parts.append(work.code(lay.spec, tag))
            return
        name = f"{phase} {op.name}"
        if name not in self._linears:
            self._linears[name] = self._lookups(name, op)
        for code in self._linears[name]:
            own = code.copy()
            own["tag"] = tag
            out.parts.append(own)

    def _lookups(self, name: str, op: Operator) -> list[Code]:
        """A GEMM with its epilogue, which turns sums into FP16 outputs and begins when all of them are stored.

        Sums that would leave the L2 cache until then are turned wave by wave, each during the next.
        """
        gemm = self.layout.gemms[name]
        waves = gemm.waves()
        if gemm.results_stay:
            return [*waves, *self._epilogue(op, name, 1.0, last=True)]
        tiles = [block.m_tiles * block.n_tiles for block in gemm.blocks()]
        out = [waves[0]]
        for code, before in zip(waves[1:], tiles, strict=False):
            middle = len(code) // 2
            out += [code[:middle], *self._epilogue(op, name, before / sum(tiles), last=False), code[middle:]]
        return out + self._epilogue(op, name, tiles[-1] / sum(tiles), last=True)

    def _epilogue(self, op: Operator, name: str, part: float, *, last: bool) -> list[Code]:
        spec, gemm = self.layout.spec, self.layout.gemms[name]
        sums = gemm.tiling.cores[2]
        outputs = round(op.m * op.n * part)
        raw = outputs * sums * gemm.shape.p.acc_bits // 8
        near, far = (raw, 0) if LEVELS[gemm.result_level] == "l2" else (0, raw)
        read = Work("vector", outputs * (EPILOGUE + op.bias + sums - 1), near, far)
        written = outputs * FP16 // 8
        if op.output_bytes(FP16) <= spec.memory.l2_bytes:
            return [read._replace(near=near + written).code(spec, 0, alongside=not last)]
        # Sums come from L2 and outputs go to DRAM: an instruction for each.
        write = Work("vector", 0, 0, written)
        return [read.code(spec, 0, alongside=not last), write.code(spec, 0, alongside=True)]
