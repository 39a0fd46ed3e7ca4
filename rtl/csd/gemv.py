"""The GeMV unit of an attention kernel: dot products of FP16 with running totals in FP32."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.csd import gemv_latency
from tilewright.arch.formats import FP16, FP32
from tilewright.rtl.lib.fp import FpAdd, FpMultiply
from tilewright.rtl.pim.asic_lane import delay

__all__ = ["GemvUnit"]


class GemvUnit(wiring.Component):
    """Adds the sum of a group of products to one of many totals: total[index] += tree(a * b).

    Products are exact in FP32; the tree adds neighbouring pairs, level by level, and lanes that are not active count
    as +0, as `workloads.csd_kernels.dot` has it. A group a tick, of any total, the same one again included. What is
    taken at tick t stands in `result` at t + `arch.csd.gemv_latency`; it is given for every group.

    Rows of keys are consecutive groups of one total, columns (the estimate, the mix of values) groups of one total
    after the other.

    Parameters
    ----------
    lanes : int
        Products of a group, a power of two, at least 2.
    totals : int

    Members
    -------
    ============ === ============= ==========================================================
    valid        In  1             there is a group
    a, b         In  lanes * 16    FP16, lane 0 in the lowest bits
    active       In  lanes         lanes that hold operands
    index        In  range(totals) the total
    first        In  1             it starts from +0
    last         In  1             handed on
    done         Out 1             `result` is that of a group
    result       Out 32            its total, FP32
    result_index Out               which one
    result_last  Out 1             `last` of that group
    ============ === ============= ==========================================================
    """

    def __init__(self, *, lanes: int, totals: int):
        assert lanes >= 2 and lanes & lanes - 1 == 0, lanes
        self._lanes, self._totals = lanes, totals
        index = bits_for(totals - 1)
        super().__init__(
            {
                "valid": In(1),
                "a": In(lanes * FP16.width),
                "b": In(lanes * FP16.width),
                "active": In(lanes),
                "index": In(index),
                "first": In(1),
                "last": In(1),
                "done": Out(1),
                "result": Out(FP32.width),
                "result_index": Out(index),
                "result_last": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        width = FP16.width
        level = []
        for lane in range(self._lanes):
            m.submodules[f"multiply_{lane}"] = unit = FpMultiply(source=FP16, result=FP32)
            product = Signal(FP32.width, name=f"product_{lane}")
            m.d.comb += [
                unit.a.eq(self.a.word_select(lane, width)),
                unit.b.eq(self.b.word_select(lane, width)),
            ]
            m.d.sync += product.eq(Mux(self.active[lane], unit.o, 0))
            level.append(product)
        depth = 0
        while len(level) > 1:
            sums = []
            for i in range(0, len(level), 2):
                m.submodules[f"add_{depth}_{i // 2}"] = unit = FpAdd(format=FP32)
                total = Signal(FP32.width, name=f"sum_{depth}_{i // 2}")
                m.d.comb += [unit.a.eq(level[i]), unit.b.eq(level[i + 1])]
                m.d.sync += total.eq(unit.o)
                sums.append(total)
            level, depth = sums, depth + 1
        assert depth + 2 == gemv_latency(self._lanes)

        # The total is asked for a tick before it is added to.
        valid = delay(m, self.valid, depth, name="valid", reset_less=False)
        index = delay(m, self.index, depth, name="index")
        adds = delay(m, valid, 1, name="adds", reset_less=False)
        place = delay(m, index, 1, name="place")
        first = delay(m, self.first, depth + 1, name="first")
        last = delay(m, self.last, depth + 1, name="last")
        m.submodules.totals = totals = Memory(shape=FP32.width, depth=self._totals, init=[])
        read, write = totals.read_port(), totals.write_port()
        m.submodules.accumulate = unit = FpAdd(format=FP32)
        again = self.done & (self.result_index == place)  # the memory was read as it was written
        m.d.comb += [
            read.en.eq(valid),
            read.addr.eq(index),
            unit.a.eq(Mux(first, 0, Mux(again, self.result, read.data))),
            unit.b.eq(level[0]),
            write.en.eq(adds),
            write.addr.eq(place),
            write.data.eq(unit.o),
        ]
        m.d.sync += [
            self.done.eq(adds),
            self.result.eq(unit.o),
            self.result_index.eq(place),
            self.result_last.eq(last),
        ]
        return m
