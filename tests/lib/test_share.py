"""Components of one kind become instances of one module, and stay what they are in Amaranth's simulator."""

import re

from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from tilewright.arch.formats import BF16, FP16, FP32
from tilewright.rtl.cosim.verilog import to_verilog
from tilewright.rtl.lib.fp import FpAdd, FpMultiply


class Sums(wiring.Component):
    """Two sums of bfloat16 numbers, one of fp16, and two products, of bfloat16 to itself and to fp32."""

    def __init__(self):
        super().__init__({"a": In(16), "b": In(16), "o": Out(16).array(4), "wide": Out(32)})

    def elaborate(self, platform):
        m = Module()
        units = [FpAdd(format=BF16), FpAdd(format=FP16), FpAdd(format=BF16)]
        units += [FpMultiply(source=BF16, result=result) for result in (BF16, FP32)]
        for unit, o in zip(units, [*self.o, self.wide], strict=True):
            m.submodules += unit
            m.d.comb += [unit.a.eq(self.a), unit.b.eq(self.b), o.eq(unit.o)]
        return m


def test_a_module_for_each_kind():
    verilog = to_verilog(Sums())
    modules = re.findall(r"^module (\w+)", verilog, re.MULTILINE)
    kinds = sorted(re.sub(r"_\d+$", "", name) for name in modules)
    # Rounding a product to bfloat16 and to fp32 are two kinds.
    assert kinds == ["FpAdd", "FpAdd", "FpMultiply", "FpMultiply", "FpRound", "FpRound", "top"]
    top = verilog[verilog.index("module top") :]
    instances = re.findall(r"^  (FpAdd_\d+) ", top, re.MULTILINE)
    assert len(instances) == 3 and len(set(instances)) == 2
