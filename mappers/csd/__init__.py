"""Maps transformers onto a GPU with drives that attend (InstInfer, arXiv 2409.04992; InstAttention, HPCA 2025).

The GPU computes all but decode's attention. A prompt's keys and values go to the drives layer by layer, while the GPU
goes on; in decode a layer's query, key and value go there, and its attention comes back. K/V heads are dealt out to the
drives, and the program is that of one with the most of them: all do the same at the same time.

Two ways to do without such drives are mapped too, of GPU and LINK commands alone, and run beside the first: `kv: host`
keeps keys and values in host memory (as DeepSpeed ZeRO-Inference may), `kv: ssd` on a plain SSD (as FlexGen does); they
cross the link in every step, a layer ahead of the GPU, which attends to all of them.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np

from tilewright.arch.csd import ISA, CsdSpec
from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program
from tilewright.arch.scenario import Mapped, Scenario
from tilewright.arch.timeline import Timeline
from tilewright.mappers.csd.layout import KV, Layout
from tilewright.mappers.csd.steps import Steps
from tilewright.workloads.graph import Graph, decode_step, prefill
from tilewright.workloads.models import ModelConfig

__all__ = ["Layout", "map_model"]

YEAR_S = 365.25 * 24 * 3600


def map_model(
    spec: CsdSpec,
    model: ModelConfig,
    scenario: Scenario,
    mapping: Mapping[str, Any] | None = None,
) -> Mapped:
    """The program of `scenario` for the drive with the most heads, and for the GPU.

    `mapping` is a document as this function returns it, or parts of one, that overrides its choices. More tokens
    than a model with rotary positions is made for are noted.

    Raises UserError for a model that the target does not support, more tokens than a table of positions has, what
    does not fit (GPU memory, slots, tables, vectors and flash of a drive; host memory or SSD), and values of
    `mapping` that are not allowed.
    """
    total = scenario.context + scenario.prompt + scenario.generate
    _check_model(model, total)
    notes = []
    if model.positions is not None and model.position == "rotary" and total > model.positions:
        notes.append(
            f"{total} tokens are more than the {model.positions} positions that {model.name} is made for"
        )
        model = replace(model, positions=None)
    graphs = _graphs(model, scenario)
    layout = Layout(spec, model, scenario, graphs, mapping)
    steps = Steps(layout, scenario, graphs)
    beside: dict[str, Mapping[str, Any]] = {}
    if layout.kv == "drive":
        beside, left_out = _beside(spec, model, scenario, graphs)
        notes += left_out
    return Mapped(
        program=Program(ISA, steps, [tag.name.replace(" ", "_") for tag in steps.tags]),
        tags=steps.tags,
        steps=len(steps),
        document=layout.document,
        step_of=steps.steps,
        notes=[*_notes(layout), *notes],
        assumed=_assumed(layout),
        conclude=lambda timeline: _conclude(layout, steps, timeline),
        beside=beside,
    )


def _check_model(model: ModelConfig, tokens: int) -> None:
    if not model.causal:
        raise UserError(
            f"{model.name} is an encoder: it keeps no keys and values that drives could attend to"
        )
    if model.position == "alibi":
        raise UserError(f"{model.name}: target csd has no ALiBi biases in its attention")
    if model.weight_groups > 1:
        raise UserError(f"{model.name}: target csd does not support sparse weights")
    windows = [w for layer in range(model.layers) if (w := model.window(layer)) is not None]
    if windows and min(windows) < tokens:
        raise UserError(
            f"{model.name}: target csd attends to all tokens; {tokens} are more than the sliding window of "
            f"{min(windows)}"
        )


def _graphs(model: ModelConfig, s: Scenario) -> dict[str, Graph]:
    """The graph of each phase: a pass over the prompt, and the first decode step."""
    flags: dict[str, Any] = {"batch": s.batch, "lm_head": s.lm_head, "embedding": s.embedding}
    out = {}
    if s.prompt:
        out["prompt"] = prefill(model, prompt=s.prompt, context=s.context, **flags | {"batch": 1})
    if s.generate:
        decode_step(model, context=s.context + s.prompt + s.generate - 1, **flags)  # the longest
        out["decode"] = decode_step(model, context=s.context + s.prompt, **flags)
    return out


def _beside(
    spec: CsdSpec, model: ModelConfig, scenario: Scenario, graphs: Mapping[str, Graph]
) -> tuple[dict[str, Mapping[str, Any]], list[str]]:
    """Mappings without drives that attend, and why those that are missing are."""
    out: dict[str, Mapping[str, Any]] = {}
    notes = []
    for kv in KV[1:]:
        document = {"kv": kv}
        try:
            Layout(spec, model, scenario, graphs, document)
            out[f"kv={kv}"] = document
        except UserError as error:
            notes.append(f"kv={kv} is left out: {error}")
    return out, notes


# ---- what a run says beside its tables ----------------------------------------------------------------


def _notes(layout: Layout) -> list[str]:
    spec, s = layout.spec, layout.scenario
    where = {"host": "host memory", "ssd": "a plain SSD"}.get(layout.kv)
    size = f"weights {layout.weight_bytes / 1e9:.3g} GB, keys and values {layout.kv_bytes / 1e9:.3g} GB"
    if where:
        return [f"{size} in {where}"]
    page = spec.flash.geometry.page_bytes
    stored, have = (spec.drives * pages * page / 1e12 for pages in (layout.pages, spec.flash_pages))
    notes = [f"{size}, which take {stored:.3g} of {have:.3g} TB of flash"]
    if layout.heads * spec.drives != layout.model.kv_heads:
        notes.append(
            f"{layout.model.kv_heads} K/V heads on {spec.drives} drives: all are counted as those with {layout.heads}"
        )
    if s.prompt and layout.prompt_batch < s.batch:
        notes.append(
            f"the prompt goes through the GPU {layout.prompt_batch} sequences at a time, as its memory allows"
        )
    return notes


def _assumed(layout: Layout) -> list[str]:
    out = ["FP16 throughout; scores of attention on the GPU never leave its SMs"]
    if layout.kv == "drive" and layout.sparse:
        a = layout.spec.attention
        out.append(
            f"selections are drawn: channels at random, tokens in runs of {a.run_tokens} on average, {a.patterns} "
            f"different ones"
        )
    return out


def _conclude(layout: Layout, steps: Steps, timeline: Timeline) -> list[str]:
    """Where the time goes, what flash reads, and how long it lasts."""
    if not timeline.ticks:
        return []
    spec, c = layout.spec, timeline.totals()
    own = timeline.activity[:, 0].sum(axis=1)
    part = {"GPU": 0, "link": 0, "drives": 0}
    attention = []
    for i, tag in enumerate(steps.tags):
        part[_where(tag.op, layout)] += int(own[i])
        if tag.op == "attention":
            attention.append(i)
    shares = [f"{name} {100 * n / timeline.ticks:.3g} %" for name, n in part.items() if n]
    lines = [f"waited for: {', '.join(shares)}"]
    if layout.kv != "drive":
        return lines
    ticks = int(own[attention].sum())
    if ticks:
        busy = {kind: _busy(timeline, attention, kind) / ticks for kind in ("channel", "kernel")}
        lines.append(
            f"attention: flash channels {100 * busy['channel']:.3g} % busy, kernels {100 * busy['kernel']:.3g} %"
        )
    page = spec.flash.geometry.page_bytes
    read = c["channel_pages"] + c["token_pages"]
    skipped = c["channel_pages_skipped"] + c["token_pages_skipped"]
    if read:
        lines.append(
            f"flash reads {spec.drives * read * page / 1e9:.4g} GB for attention; the page-level filter skips "
            f"{100 * skipped / (read + skipped):.3g} % of the pages"
        )
    written, endurance = c["programs"] * page, spec.flash.cells.endurance
    if written:
        s = layout.scenario
        tokens = (s.prompt + s.generate) * s.batch
        line = f"flash programs {spec.drives * written / tokens / 1e6:.3g} MB a token"
        if endurance is not None:
            runs = endurance * spec.flash_pages * page / written
            years = runs * float(timeline.ticks * spec.tick.period_s) / YEAR_S
            line += f"; {endurance} P/E cycles last {runs * tokens:.3g} tokens, {years:.3g} years of this"
        lines.append(line)
    return lines


def _where(op: str, layout: Layout) -> str:
    """What the run waits for during an operator."""
    if op in ("send", "receive", "kv_send", "kv_fetch", "kv_store"):
        return "link"
    drive = ("kv_write", "kv_append", "kv_read", "transpose", "reclaim", "config")
    return "drives" if op in drive or (op == "attention" and layout.kv == "drive") else "GPU"


def _busy(timeline: Timeline, tags: list[int], kind: str) -> float:
    """Mean busy ticks for the tags of the units of a kind."""
    units = [i for i, name in enumerate(timeline.units) if name.startswith(f"{kind} ")]
    return float(np.mean(timeline.activity[tags][:, units, 0].sum(axis=0))) if units else 0.0
