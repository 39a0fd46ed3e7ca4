"""The MAC unit of a bank."""

from amaranth.hdl import Assert, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from tilewright.arch import formats
from tilewright.arch.pim import mac_latency
from tilewright.rtl.lib.fp import FpAdd, FpMultiply


class MacUnit(wiring.Component):
    """Accumulates dot products of two columns of bfloat16: acc = acc + tree(a * b).

    Products are rounded to the accumulator's format; the tree adds adjacent pairs, level by level, each sum
    rounded. One column a tick. Operands taken at tick t stand in `acc` from t + 2 + log2(lanes) on.

    Parameters
    ----------
    lanes : int
        Elements of a column, a power of two.
    accumulator : FloatFormat
        Format of products, sums and accumulator.

    Members
    -------
    ====== === =========== =================================================================
    valid  In  1           a and b hold operands
    a, b   In  lanes * 16  columns, lane 0 in the lowest bits
    clear  In  1           acc is +0 in the next tick; nothing may be under way, except on `reset`
    reset  In  1           a run begins: forget what is under way, too
    acc    Out width       the accumulator
    ====== === =========== =================================================================
    """

    def __init__(self, *, lanes: int, accumulator: formats.FloatFormat):
        self._lanes, self._format = lanes, accumulator
        width = lanes * formats.BF16.width
        super().__init__(
            {
                "valid": In(1),
                "a": In(width),
                "b": In(width),
                "clear": In(1),
                "reset": In(1),
                "acc": Out(accumulator.width),
            }
        )

    def elaborate(self, platform):
        m = Module()
        width = formats.BF16.width
        level = []
        for lane in range(self._lanes):
            m.submodules[f"multiply_{lane}"] = unit = FpMultiply(source=formats.BF16, result=self._format)
            product = Signal(self._format.width, name=f"product_{lane}")
            m.d.comb += [
                unit.a.eq(self.a.word_select(lane, width)),
                unit.b.eq(self.b.word_select(lane, width)),
            ]
            m.d.sync += product.eq(unit.o)
            level.append(product)
        valid = Signal(name="valid_products")
        m.d.sync += valid.eq(self.valid & ~self.reset)
        under_way = valid
        depth = 0
        while len(level) > 1:
            sums = []
            for i in range(0, len(level), 2):
                m.submodules[f"add_{depth}_{i // 2}"] = unit = FpAdd(format=self._format)
                total = Signal(self._format.width, name=f"sum_{depth}_{i // 2}")
                m.d.comb += [unit.a.eq(level[i]), unit.b.eq(level[i + 1])]
                m.d.sync += total.eq(unit.o)
                sums.append(total)
            later = Signal(name=f"valid_{depth}")
            m.d.sync += later.eq(valid & ~self.reset)
            valid, level, depth = later, sums, depth + 1
            under_way = under_way | valid
        assert depth + 3 == mac_latency(self._lanes)
        m.submodules.accumulate = unit = FpAdd(format=self._format)
        m.d.comb += [unit.a.eq(self.acc), unit.b.eq(level[0])]
        with m.If(self.clear | self.reset):
            m.d.sync += self.acc.eq(0)
        with m.Elif(valid):
            m.d.sync += self.acc.eq(unit.o)
        m.d.sync += Assert(
            ~(self.clear & ~self.reset & (under_way | self.valid)),
            "accumulator cleared under a MAC in flight",
        )
        return m
