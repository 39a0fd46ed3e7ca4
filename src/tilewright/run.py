"""The main job: map a model onto a machine, simulate it, price it."""

from collections.abc import Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from tilewright.arch import registry
from tilewright.arch import spec as specs
from tilewright.arch.clock import Clock
from tilewright.arch.errors import UserError
from tilewright.arch.scenario import Scenario, TagInfo
from tilewright.arch.system import RooflineSpec
from tilewright.catalog import is_roofline
from tilewright.output import progress_bar, read_text, replacing, say
from tilewright.summary import Operator, Result, Spans, of_timeline
from tilewright.workloads.graph import Graph, decode_step, prefill
from tilewright.workloads.models import ModelConfig

# A roofline has no clock: its times are rounded up to picoseconds.
_PICOSECOND = Clock(Fraction(1, 10**12))
_FORMATS = (("bf16", 16), ("fp16", 16), ("fp32", 32))  # the first that the device has a peak for


def run(
    spec: specs.Spec,
    model: ModelConfig,
    scenario: Scenario,
    *,
    mapping: str | None = None,
    mapping_out: str | None = None,
    by_step: bool = False,
    fold: bool = True,
) -> Result:
    """The model on the device: a target's cycle model, or a roofline.

    `mapping` and `mapping_out` are files to read the mapping from and to write it to; `by_step` keeps a span
    for each step; without `fold` every event is simulated (the integers are the same). Raises UserError for
    what does not fit or is not supported.
    """
    if isinstance(spec, RooflineSpec):
        return _roofline(spec, model, scenario, by_step)
    slug = spec.target_name
    chosen = None if mapping is None else read_mapping(mapping)
    mapped = registry.room("mappers", slug).map_model(spec, model, scenario, chosen)
    if mapping_out is not None:
        with replacing(mapping_out) as file:
            yaml.safe_dump(dict(mapped.document), file, sort_keys=False)
    params = spec.params()
    simulate = cycle_model(slug)
    with progress_bar(f"{spec.name}: steps") as progress:
        timeline = simulate(params, mapped.program, fold=fold, progress=progress, steps=mapped.steps)
    return Result(
        spec=spec,
        model=model.name,
        scenario=scenario,
        params=params,
        tick=spec.tick,  # type: ignore[attr-defined]
        assumed=spec.assumed(),
        choices=mapped.assumed,
        notes=mapped.notes,
        **of_timeline(timeline, mapped.tags, registry.room("arch", slug).energy(spec), by_step),
    )


def cycle_model(slug: str) -> Any:
    """The `simulate` of a target; says so on stderr when its kernels are about to be compiled."""
    import numba

    simulate = registry.room("sim", slug).simulate
    cache = Path(str(numba.config.CACHE_DIR))
    if not numba.config.DISABLE_JIT and not any(cache.rglob(f"{slug}.*.nbi")):
        say("compiling kernels (first use only)...")
    return simulate


def check_mapping(devices: Sequence[specs.Spec], *paths: str | None) -> None:
    """Raises UserError for a mapping file where not exactly one device is mapped."""
    mapped = sum(not is_roofline(d) for d in devices)
    if any(p is not None for p in paths) and mapped != 1:
        raise UserError(f"--mapping and --mapping-out need exactly one mapped spec, not {mapped}")


def read_mapping(path: str) -> dict[str, Any]:
    """The document that `--mapping-out` wrote, perhaps edited. Raises UserError."""
    text = read_text(path, "mapping")
    specs.check_yaml(text, path)
    document = yaml.safe_load(text)
    if not isinstance(document, dict):
        raise UserError(f"{path}: a mapping must be a YAML mapping of keys to values")
    return document


# ---- devices known by their roofline ------------------------------------------------------------------


def _roofline(spec: RooflineSpec, model: ModelConfig, scenario: Scenario, by_step: bool) -> Result:
    from tilewright.sim.roofline import RooflineRun, run_graph

    number, bits = _number_format(spec)
    _check_fit(spec, model, scenario, bits)
    runs: list[RooflineRun] = [
        run_graph(spec, _operators(graphs, bits), number, _PICOSECOND) for graphs in _phases(model, scenario)
    ]
    tags: dict[tuple[str, int], int] = {}
    parts: list[tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]] = []
    began = step = 0
    for done in runs:
        index = [tags.setdefault(key, len(tags)) for key in zip(done.names, done.layers, strict=True)]
        n = len(done.ticks)
        steps = np.repeat(np.arange(step, step + n), len(index))
        start = began + done.starts().ravel()
        parts.append((np.tile(index, n), steps, start, done.ticks.ravel(), done.memory_bound.ravel()))
        began, step = began + done.total_ticks, step + n
    tag, steps, start, ticks, memory = (np.concatenate(column) for column in zip(*parts, strict=True))
    infos = [
        TagInfo(f"layer {layer} {name}" if layer >= 0 else name, name, layer) for name, layer in tags
    ]
    watts = float(spec.power.peak_w)
    seconds = float(_PICOSECOND.period_s)
    spans = _spans(infos, tag, steps, start, ticks, memory, watts * seconds, by_step)
    limits = "efficiency is 1 for want of a source: times are lower bounds"
    return Result(
        spec=spec,
        model=model.name,
        scenario=scenario,
        cycles=began,
        tick=_PICOSECOND,
        energy_j=float(sum(r.energy_j for r in runs)),
        counters=_counters(model, scenario, bits),
        units={},
        operators=_kinds(infos, tag, ticks, memory, watts * seconds),
        spans=spans,
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
    for name, bits in _FORMATS:
        if name in rates:
            return name, bits
    raise UserError(f"{spec.name}: no peak is stated for any of {', '.join(n for n, _ in _FORMATS)}")


def _phases(model: ModelConfig, scenario: Scenario) -> list[list[Graph]]:
    """One graph for the prompt as a whole, and one for each token generated."""
    s = scenario
    flags = {"batch": s.batch, "lm_head": s.lm_head, "embedding": s.embedding}
    phases = []
    if s.prompt:
        phases.append([prefill(model, prompt=s.prompt, context=s.context, **flags)])
    if s.generate:
        first = s.context + s.prompt
        if model.positions is not None and first + s.generate > model.positions:
            raise UserError(
                f"{model.name} has {model.positions} positions: context {s.context} + prompt {s.prompt} + "
                f"generate {s.generate} are {first + s.generate - model.positions} too many"
            )
        phases.append([decode_step(model, context=first + i, **flags) for i in range(s.generate)])
    return phases


def _moved(op: Any, bits: int) -> int:
    reads = op.weight_bytes(bits) + op.input_bytes(bits) + op.kv_read_bytes(bits)
    return int(reads + op.output_bytes(bits) + op.kv_write_bytes(bits))


def _operators(graphs: Sequence[Graph], bits: int) -> list[tuple[str, int, list[int], list[int]]]:
    """Name, layer, operations and bytes by step; every step has the same operators."""
    return [
        (ops[0].name, ops[0].layer, [op.flops for op in ops], [_moved(op, bits) for op in ops])
        for ops in zip(*(g.operators for g in graphs), strict=True)
    ]


def _counters(model: ModelConfig, scenario: Scenario, bits: int) -> dict[str, int]:
    operators = [op for graphs in _phases(model, scenario) for g in graphs for op in g.operators]
    return {"operations": sum(op.flops for op in operators), "bytes": sum(_moved(op, bits) for op in operators)}


def _check_fit(spec: RooflineSpec, model: ModelConfig, scenario: Scenario, bits: int) -> None:
    tokens = scenario.context + scenario.prompt + scenario.generate
    need = (model.parameters["total"] + tokens * scenario.batch * model.kv_elements_per_token) * bits // 8
    if not spec.fits(need):
        have = int(spec.memory.gb * 10**9)
        raise UserError(
            f"{model.name} does not fit {spec.name}: weights and KV cache take {need / 1e9:.1f} GB, "
            f"{(need - have) / 1e9:.1f} GB more than its memory"
        )


def _bound(memory: int, ticks: int) -> str:
    return "memory" if 2 * memory > ticks else "compute"


def _kinds(
    infos: Sequence[TagInfo], tag: np.ndarray, ticks: np.ndarray, memory: np.ndarray, tick_j: float
) -> list[Operator]:
    names = list(dict.fromkeys(t.op for t in infos))
    kind = np.array([names.index(t.op) for t in infos])[tag]
    out = []
    for i, name in enumerate(names):
        mine = kind == i
        total, waits = int(ticks[mine].sum()), int(ticks[mine & memory].sum())
        out.append(Operator(name, int(mine.sum()), total, total * tick_j, _bound(waits, total)))
    return out


def _spans(
    infos: Sequence[TagInfo],
    tag: np.ndarray,
    steps: np.ndarray,
    start: np.ndarray,
    ticks: np.ndarray,
    memory: np.ndarray,
    tick_j: float,
    by_step: bool,
) -> Spans:
    if not by_step:
        n = len(infos)
        first, end = np.full(n, np.iinfo(np.int64).max), np.zeros(n, np.int64)
        total, waits, calls = (np.zeros(n, np.int64) for _ in range(3))
        np.minimum.at(first, tag, start)
        np.maximum.at(end, tag, start + ticks)
        np.add.at(total, tag, ticks)
        np.add.at(waits, tag, ticks * memory)
        np.add.at(calls, tag, 1)
        tag, steps, start, ticks, waited = np.arange(n), np.full(n, -1), first, total, waits
    else:
        end, calls, waited = start + ticks, np.ones(len(tag), np.int64), ticks * memory
    return Spans(
        tags=infos,
        tag=tag,
        step=steps,
        start=start,
        end=end,
        cycles=ticks,
        calls=calls,
        energy_j=ticks * tick_j,
        bound_by=[_bound(w, t) for w, t in zip(waited.tolist(), ticks.tolist(), strict=True)],
    )

