"""PIM-GPT as RTL: the whole machine behind a host port."""

from tilewright.arch import formats
from tilewright.arch.pim import PimParams, PimSpec
from tilewright.rtl.pim.top import Top

CODE_DEPTH = 64


def accumulator_format(spec: PimSpec) -> formats.FloatFormat:
    """The number format that `pim.accumulator` names."""
    return {"fp32": formats.FP32, "bf16": formats.BF16, "fp16": formats.FP16}[spec.pim.accumulator]


def top(spec: PimSpec, params: PimParams | None = None, depth: int = CODE_DEPTH, trace_depth: int = 0) -> Top:
    """The machine that the spec describes."""
    accumulator = accumulator_format(spec)
    return Top(
        params=params or spec.params(),
        depth=depth,
        accumulator=accumulator,
        asic=spec.asic,
        trace_depth=trace_depth,
    )
