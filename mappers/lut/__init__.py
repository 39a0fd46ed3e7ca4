"""Maps transformers onto a GPU whose tensor cores are lookup arrays (LUT Tensor Core, arXiv 2408.06003).

Each linear layer becomes two operators: precompute, which turns activations into what the arrays read, and a LUT-GEMM
(`gemm`), which ends with its epilogue. As in the paper (3.3), precompute is fused with the element-wise operator
before it where there is one, unless the mapping says `precompute: separate`; the tables themselves are built by the
cores' load units when they are exact, and by precompute when they are int8.

Everything else runs on the ordinary units at FP16: norms, softmax, element-wise operators and positions on the vector
units, attention products and the LM head on the plain tensor cores (`steps`). With `attention: fused` (the default)
scores stay within the SM, with `separate` they go through memory. `linear: tensor_fp16` or `tensor_int8` computes the
linear layers on the plain tensor cores, too: the same device without lookup arrays, to compare with.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program
from tilewright.arch.lut import ISA, LutSpec
from tilewright.arch.scenario import Mapped, Scenario
from tilewright.mappers.lut.gemm import Gemm, Tiling, gemm_program, plan
from tilewright.mappers.lut.layout import FP16, Layout
from tilewright.mappers.lut.steps import Steps, graphs
from tilewright.workloads.models import ModelConfig

__all__ = ["Gemm", "Tiling", "gemm_program", "map_model", "plan"]


def map_model(
    spec: LutSpec,
    model: ModelConfig,
    scenario: Scenario,
    mapping: Mapping[str, Any] | None = None,
) -> Mapped:
    """The program of `scenario` for a core with the largest share of everything; it stands for all cores.

    The prompt is one pass of batch x prompt rows, a decode step one of batch rows. `mapping` is a document as
    this function returns it, or parts of one, that overrides its choices. A KV cache that exceeds memory, and
    more tokens than a model with rotary positions is made for, are timed as if they fitted, and noted.

    Raises UserError for a model that the target does not support, more tokens than a table of positions has,
    weights that do not fit memory, and values of `mapping` that are not allowed.
    """
    if model.experts:
        raise UserError(f"{model.name}: target lut does not support mixtures of experts")
    if model.weight_groups > 1:
        raise UserError(f"{model.name}: target lut does not support sparse weights")
    total = scenario.context + scenario.prompt + scenario.generate
    beyond = model.positions is not None and model.position == "rotary" and total > model.positions
    notes = []
    if beyond:  # an angle for every position: it is the training that ends there, not the model
        notes.append(
            f"{total} tokens are more than the {model.positions} positions that {model.name} is made for"
        )
        model = replace(model, positions=None)
    phases = graphs(model, scenario)
    layout = Layout(spec, model, phases, mapping)
    steps = Steps(layout, scenario, phases)
    return Mapped(
        program=Program(ISA, steps, [tag.name.replace(" ", "_") for tag in steps.tags]),
        tags=steps.tags,
        steps=len(steps),
        document=layout.document,
        step_of=steps.steps,
        notes=[*notes, *_notes(layout, scenario)],
        assumed=_assumed(layout),
    )


def _notes(layout: Layout, scenario: Scenario) -> list[str]:
    spec, model = layout.spec, layout.model
    tokens = scenario.context + scenario.prompt + scenario.generate
    cache = tokens * scenario.batch * model.kv_elements_per_token * FP16 // 8 if model.causal else 0
    weights = layout.linear_bytes + layout.other_bytes
    sizes = {"linear layers": layout.linear_bytes, "other parameters": layout.other_bytes, "KV cache": cache}
    notes = [", ".join(f"{name} {size / 1e9:.3g} GB" for name, size in sizes.items())]
    if weights + cache > spec.memory.dram_bytes:
        notes.append(
            f"that is more than the {spec.memory.dram_bytes / 1e9:.3g} GB of memory.dram_bytes; timed as if it fitted"
        )
    for phase in ("prompt", "decode"):
        mine = [g for name, g in layout.gemms.items() if name.startswith(phase)]
        if mine:
            work = sum(g.shape.m * g.shape.n * g.shape.k for g in mine)
            notes.append(
                f"{phase}: {100 * work / sum(g.slots for g in mine):.1f} % of the lookups are no padding"
            )
    return notes


def _assumed(layout: Layout) -> list[str]:
    a = layout.spec.lut
    linear = {
        "lut": f"{a.weight_bits}-bit weights and {a.activation} activations",
        "tensor_fp16": "FP16",
        "tensor_int8": "INT8",
    }[layout.linear]
    return [f"linear layers in {linear}, all else in FP16"]
