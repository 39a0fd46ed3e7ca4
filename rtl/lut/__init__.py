"""LUT Tensor Core as RTL: the core behind a host port, its table array, and the arrays it is compared with."""

from amaranth.hdl import Shape, signed

from tilewright.arch.formats import FP8_E4M3, FP16, FP32, FloatFormat
from tilewright.arch.lut import LutParams, LutSpec
from tilewright.rtl.lut.precompute import entry_format
from tilewright.rtl.lut.top import Top

CODE_DEPTH = 64

ACTIVATIONS: dict[str, Shape | FloatFormat] = {
    "int8": signed(8),
    "int16": signed(16),
    "fp8": FP8_E4M3,
    "fp16": FP16,
}
ACCUMULATORS: dict[str, Shape | FloatFormat] = {"int32": signed(32), "fp16": FP16, "fp32": FP32}


def top(spec: LutSpec, params: LutParams | None = None, depth: int = CODE_DEPTH) -> Top:
    """One core of the machine that the spec describes."""
    a = spec.lut
    activation = ACTIVATIONS[a.activation]
    quantised = a.table == "int8"
    return Top(
        params=params or spec.params(),
        depth=depth,
        activation=None if quantised else activation,
        entry=signed(8) if quantised else entry_format(activation, a.k),
        accumulator=ACCUMULATORS[a.accumulator],
    )
