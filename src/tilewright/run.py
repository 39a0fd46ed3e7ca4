"""The main job: map a model onto a machine, simulate it, price it."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from tilewright.arch import registry
from tilewright.arch import spec as specs
from tilewright.arch.errors import UserError
from tilewright.arch.scenario import Scenario
from tilewright.arch.system import RooflineSpec
from tilewright.devices import is_roofline
from tilewright.output import progress_bar, read_text, replacing, say
from tilewright.summary import Result, of_timeline
from tilewright.trace import LIMIT
from tilewright.trace import write as write_trace
from tilewright.workloads.models import ModelConfig


def run(
    spec: specs.Spec,
    model: ModelConfig,
    scenario: Scenario,
    *,
    mapping: str | Mapping[str, Any] | None = None,
    mapping_out: str | None = None,
    trace: str | None = None,
    trace_limit: int = LIMIT,
    svg: str | None = None,
    by_step: bool = False,
    fold: bool = True,
    way: str = "",
) -> Result:
    """The model on the device: a target's cycle model, or a roofline.

    `mapping` is a document that overrides choices of the mapper, or a file of it, `mapping_out` a file to write the
    whole mapping to; `trace` is a file for a
    trace of at most `trace_limit` commands of each channel, where the device is a target; `by_step` keeps a span
    for each step; without `fold` every event is simulated (the integers are the same). `svg` is a file for a picture
    of the mapping. Where no mapping is given, what the mapper holds against its own is run too (`beside`). `way`
    names such a run. Raises UserError for what does not fit or is not supported.
    """
    if isinstance(spec, RooflineSpec):
        from tilewright.baseline import run_roofline

        return run_roofline(spec, model, scenario, by_step)
    slug = spec.target_name
    chosen = read_mapping(mapping) if isinstance(mapping, str) else mapping
    mapper = registry.room("mappers", slug)
    if model.composition is not None and not getattr(mapper, "COMPOSITIONS", False):
        raise UserError(f"{model.name}: target {slug} does not support compositions of experts")
    if scenario.train and not getattr(mapper, "TRAINS", False):
        raise UserError(f"--train: target {slug} does not train models; allowed: rdu")
    mapped = mapper.map_model(spec, model, scenario, chosen)
    if mapping_out is not None:
        with replacing(mapping_out) as file:
            yaml.safe_dump(dict(mapped.document), file, sort_keys=False)
    if svg is not None:
        if mapped.draw is None:
            raise UserError(f"--svg: there is no picture of how target {slug} is mapped")
        with replacing(svg) as file:
            file.write(mapped.draw())
    notes = list(mapped.notes)
    if model.vision is not None and not getattr(mapper, "IMAGES", False):
        notes.append(f"{model.name}: its language model alone; target {slug} has no images")
    params = spec.params()
    simulate = cycle_model(slug)
    with progress_bar(f"{spec.name} {way}".rstrip() + ": steps") as progress:
        kept = 0 if trace is None else trace_limit
        timeline = simulate(
            params, mapped.program, fold=fold, progress=progress, steps=mapped.steps, trace=kept
        )
    if trace is not None:
        write_trace(trace, spec, timeline, trace_limit)
    others = {} if mapping is not None or way else mapped.beside
    return Result(
        spec=spec,
        way=way,
        beside=[
            run(spec, model, scenario, mapping=document, by_step=by_step, fold=fold, way=name)
            for name, document in others.items()
        ],
        model=model.name,
        scenario=scenario,
        params=params,
        tick=spec.tick,
        assumed=spec.assumed(),
        choices=mapped.assumed,
        notes=[*notes, *(mapped.conclude(timeline) if mapped.conclude is not None else ())],
        **of_timeline(
            timeline, mapped.tags, registry.room("arch", slug).energy(spec), by_step, mapped.step_of
        ),
    )


def cycle_model(slug: str) -> Any:
    """The `simulate` of a target; says so on stderr when its kernels are about to be compiled."""
    import numba

    simulate = registry.room("sim", slug).simulate
    config: Any = numba.config  # its attributes are set at run time, unseen by type checkers
    if not config.DISABLE_JIT and not any(Path(config.CACHE_DIR).rglob(f"{slug}[._]*.nbi")):
        say("compiling kernels (first use only)...")
    return simulate


def check_mapping(devices: Sequence[specs.Spec], *paths: str | None) -> None:
    """Raises UserError for a mapping file where not exactly one device is mapped."""
    check_one_mapped(devices, "--mapping and --mapping-out need", *paths)


def check_one_mapped(devices: Sequence[specs.Spec], what: str, *paths: str | None) -> None:
    """Raises UserError, which begins with `what`, for a file where not exactly one device is mapped."""
    mapped = sum(not is_roofline(d) for d in devices)
    if any(p is not None for p in paths) and mapped != 1:
        raise UserError(f"{what} exactly one mapped spec, not {mapped}")


def read_mapping(path: str) -> dict[str, Any]:
    """The document that `--mapping-out` wrote, perhaps edited. Raises UserError."""
    text = read_text(path, "mapping")
    specs.check_yaml(text, path)
    document = yaml.safe_load(text)
    if not isinstance(document, dict):
        raise UserError(f"{path}: a mapping must be a YAML mapping of keys to values")
    return document
