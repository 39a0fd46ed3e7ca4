"""The vector unit of an attention kernel: sums of scaled words, element by element, and sums over words."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from tilewright.arch.formats import FP16, FP32
from tilewright.rtl.lib.fp import FpAdd, FpConvert, FpMultiply
from tilewright.rtl.pim.asic_lane import Tree

__all__ = ["VectorUnit"]


class VectorUnit(wiring.Component):
    """`lanes` elements a tick: total = (first ? nothing : total) + x * factor, in FP32; and the tree of `reduce`.

    x is a word of FP32, or one of FP16, widened. What is taken at tick t stands in `halves`, rounded to FP16, at t + 2. The
    tree's sum of a group of FP16 elements, added up from `fresh` on, stands in `sum` `arch.csd.reduce_latency` ticks later.

    Parameters
    ----------
    lanes : int
        A power of two, at least 2.

    Members
    -------
    ====== === ========== ======================================================
    word   In  lanes * 16 FP16
    wide   In  lanes * 32 FP32
    widen  In  1          x is `word`
    factor In  32         FP32
    first  In  1          a total begins
    halves Out lanes * 16 totals, FP16
    group  In  1          `word` is a group of a sum
    fresh  In  1          its first one
    active In  lanes      elements that count; others are +0
    sum    Out 32         FP32
    ====== === ========== ======================================================
    """

    def __init__(self, *, lanes: int):
        self._lanes = lanes
        super().__init__(
            {
                "word": In(lanes * FP16.width),
                "wide": In(lanes * FP32.width),
                "widen": In(1),
                "factor": In(FP32.width),
                "first": In(1),
                "halves": Out(lanes * FP16.width),
                "group": In(1),
                "fresh": In(1),
                "active": In(lanes),
                "sum": Out(FP32.width),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.tree = tree = Tree(lanes=self._lanes, latency=1)
        begins, halves = Signal(), []
        m.d.sync += begins.eq(self.first)
        for lane in range(self._lanes):
            m.submodules[f"widen_{lane}"] = widen = FpConvert(source=FP16, result=FP32)
            m.submodules[f"multiply_{lane}"] = multiply = FpMultiply(source=FP32, result=FP32)
            m.submodules[f"add_{lane}"] = add = FpAdd(format=FP32)
            m.submodules[f"narrow_{lane}"] = narrow = FpConvert(source=FP32, result=FP16)
            product, total = (Signal(FP32.width, name=f"{what}_{lane}") for what in ("product", "total"))
            m.d.comb += [
                widen.a.eq(self.word.word_select(lane, FP16.width)),
                multiply.a.eq(Mux(self.widen, widen.o, self.wide.word_select(lane, FP32.width))),
                multiply.b.eq(self.factor),
                add.a.eq(total),
                add.b.eq(product),
                narrow.a.eq(total),
                tree.elements[lane].eq(widen.o),
            ]
            m.d.sync += [product.eq(multiply.o), total.eq(Mux(begins, product, add.o))]
            halves.append(narrow.o)
        m.d.comb += [
            self.halves.eq(Cat(halves)),
            tree.valid.eq(self.group),
            tree.fresh.eq(self.fresh),
            tree.active.eq(self.active),
            self.sum.eq(tree.sum),
        ]
        return m
