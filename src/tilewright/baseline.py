"""Devices known by their roofline, as baselines: the operator graph, priced by peak rates and bandwidth."""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilewright.arch.errors import UserError
from tilewright.arch.scenario import Scenario, TagInfo
from tilewright.arch.system import RooflineSpec
from tilewright.summary import Operator, Result, Spans
from tilewright.workloads.graph import Graph, decode_step, prefill
from tilewright.workloads.graph import Operator as GraphOperator
from tilewright.workloads.models import ModelConfig

FORMATS = (
    ("bf16", 16),
    ("fp16", 16),
    ("fp32", 32),
)  # name and bits; the first that the device has a peak for


class _Log(NamedTuple):
    """One row for each operator of each step, in order of time. `tag` indexes the operators of a step."""

    tag: NDArray[np.int64]
    step: NDArray[np.int64]
    start: NDArray[np.int64]
    end: NDArray[np.int64]
    ticks: NDArray[np.int64]
    memory: NDArray[np.int64]  # ticks again where memory binds, else 0


def run_roofline(spec: RooflineSpec, model: ModelConfig, scenario: Scenario, by_step: bool = False) -> Result:
    """The model on the device: the prompt in one pass, then token by token, one operator after another.

    Raises UserError for a composition of experts, a model that does not fit its memory, and more tokens than the
    model has positions.
    """
    if model.composition is not None:
        raise UserError(f"{model.name}: roofline {spec.name} does not support compositions of experts")
    if scenario.train:
        raise UserError(f"--train: roofline {spec.name} does not train models; allowed: specs of target rdu")
    from tilewright.sim.roofline import run_graph

    number, bits = _number_format(spec)
    _check_fit(spec, model, scenario, bits)
    phases = _phases(model, scenario)
    runs = [run_graph(spec, _operators(graphs, bits), number, spec.tick) for graphs in phases]
    index: dict[tuple[str, int], int] = {}
    logs, began, step = [], 0, 0
    for r in runs:
        own = [index.setdefault(key, len(index)) for key in zip(r.names, r.layers, strict=True)]
        n, ticks = len(r.ticks), r.ticks.ravel()
        steps = np.repeat(np.arange(step, step + n), len(own))
        start, waits = began + r.starts().ravel(), ticks * r.memory_bound.ravel()
        logs.append(_Log(np.tile(own, n), steps, start, start + ticks, ticks, waits))
        began, step = began + r.total_ticks, step + n
    log = _Log(*(np.concatenate(column) for column in zip(*logs, strict=True)))
    tags = [TagInfo(f"layer {layer} {op}" if layer >= 0 else op, op, layer) for op, layer in index]
    watts = float(spec.power.peak_w)
    tick_j = watts * float(spec.tick.period_s)
    operators = [op for graphs in phases for graph in graphs for op in graph.operators]
    limits = "efficiency 1 for want of a source: times are lower bounds"
    return Result(
        spec=spec,
        model=model.name,
        scenario=scenario,
        cycles=began,
        tick=spec.tick,
        energy_j=float(sum(r.energy_j for r in runs)),
        counters={
            "operations": sum(op.flops for op in operators),
            "bytes": sum(_moved(op, bits) for op in operators),
        },
        units={},
        operators=_kinds(tags, log, tick_j),
        spans=_spans(tags, log if by_step else _summed(log, len(tags)), tick_j),
        assumed=spec.assumed(),
        choices=[limits] if spec.is_bound else [],
        notes=[
            f"roofline in {number}, {bits}-bit weights and cache",
            f"energy is the rated {watts:g} W over that time",
        ],
        lower_bound=spec.is_bound,
    )


def _number_format(spec: RooflineSpec) -> tuple[str, int]:
    rates = spec.params().ops_per_s
    for name, bits in FORMATS:
        if name in rates:
            return name, bits
    raise UserError(f"{spec.name}: no peak is stated for any of {', '.join(n for n, _ in FORMATS)}")


def _check_fit(spec: RooflineSpec, model: ModelConfig, scenario: Scenario, bits: int) -> None:
    s = scenario
    total = s.context + s.prompt + s.generate
    if model.positions is not None and total > model.positions:
        raise UserError(
            f"{model.name} has {model.positions} positions: context {s.context} + prompt {s.prompt} + "
            f"generate {s.generate} are {total - model.positions} too many"
        )
    need = (model.parameters["total"] + total * s.batch * model.kv_elements_per_token) * bits // 8
    if not spec.fits(need):
        over = need - int(spec.memory.gb * 10**9)
        raise UserError(
            f"{model.name} does not fit {spec.name}: weights and KV cache take {need / 1e9:.1f} GB, "
            f"{over / 1e9:.1f} GB more than its memory"
        )


def _phases(model: ModelConfig, s: Scenario) -> list[list[Graph]]:
    """Graphs of equal operators: one for the prompt as a whole, then one for each token generated."""
    phases = []
    if s.prompt:
        prompt = prefill(
            model, prompt=s.prompt, context=s.context, batch=s.batch, lm_head=s.lm_head, embedding=s.embedding
        )
        phases.append([prompt])
    if s.generate:
        first = s.context + s.prompt
        steps = [
            decode_step(model, context=first + i, batch=s.batch, lm_head=s.lm_head, embedding=s.embedding)
            for i in range(s.generate)
        ]
        phases.append(steps)
    return phases


def _moved(op: GraphOperator, bits: int) -> int:
    reads = op.weight_bytes(bits) + op.input_bytes(bits) + op.kv_read_bytes(bits)
    return reads + op.output_bytes(bits) + op.kv_write_bytes(bits)


def _operators(graphs: Sequence[Graph], bits: int) -> list[tuple[str, int, list[int], list[int]]]:
    """Name, layer, operations and bytes by step."""
    return [
        (ops[0].name, ops[0].layer, [op.flops for op in ops], [_moved(op, bits) for op in ops])
        for ops in zip(*(g.operators for g in graphs), strict=True)
    ]


def _bound(memory: int, ticks: int) -> str:
    return "memory" if 2 * memory > ticks else "compute"


def _kinds(tags: Sequence[TagInfo], log: _Log, tick_j: float) -> list[Operator]:
    names = list(dict.fromkeys(t.op for t in tags))
    kind = np.array([names.index(t.op) for t in tags])[log.tag]
    out = []
    for i, name in enumerate(names):
        ticks, memory = int(log.ticks[kind == i].sum()), int(log.memory[kind == i].sum())
        out.append(Operator(name, int((kind == i).sum()), ticks, ticks * tick_j, _bound(memory, ticks)))
    return out


def _summed(log: _Log, n_tags: int) -> _Log:
    """A row for each operator over all steps, from the start of the first to the end of the last; step -1."""
    start = np.full(n_tags, np.iinfo(np.int64).max)
    end, ticks, memory = (np.zeros(n_tags, np.int64) for _ in range(3))
    np.minimum.at(start, log.tag, log.start)
    np.maximum.at(end, log.tag, log.end)
    np.add.at(ticks, log.tag, log.ticks)
    np.add.at(memory, log.tag, log.memory)
    return _Log(np.arange(n_tags), np.full(n_tags, -1), start, end, ticks, memory)


def _spans(tags: Sequence[TagInfo], log: _Log, tick_j: float) -> Spans:
    return Spans(
        tags=tags,
        tag=log.tag,
        step=log.step,
        start=log.start,
        end=log.end,
        cycles=log.ticks,
        energy_j=log.ticks * tick_j,
        bound_by=[_bound(m, t) for m, t in zip(log.memory.tolist(), log.ticks.tolist(), strict=True)],
    )
