"""What one functional unit computes."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from tilewright.arch.formats import BF16, FP32
from tilewright.arch.rdu import STAGE_OPS, TYPES, WORD_BITS
from tilewright.rtl.lib.fp import FpAdd, FpCompare, FpConvert, FpMaximum, FpMultiply
from tilewright.rtl.lib.share import shared

__all__ = ["JOINS", "LaneOp"]

OP = {name: i for i, name in enumerate(STAGE_OPS)}
TYPE = {name: i for i, name in enumerate(TYPES)}
JOINS = ("add", "maximum", "minimum")
"""The operations of accumulation and tree."""


class LaneOp(wiring.Component):
    """One operation on words.

    Latency 0. With type bf16 the results of `pass`, arithmetic, maximum and minimum are the float32 results rounded
    to bfloat16; its operands need not be bfloat16. Shifts and logic know no type: a shift is by b modulo 32, to the
    right with the sign. `less` gives the integer 1 or 0, 0 with a NaN. Integers wrap.

    Parameters
    ----------
    operations : tuple of str
        The operations to build, of STAGE_OPS; with others the output is a.

    Members
    -------
    ========= === ===== ==============================
    operation In  4     index in STAGE_OPS
    type      In  2     index in TYPES
    a, b      In  32    operands
    choose    In  1     what `select` chooses a by
    o         Out 32    the result
    ========= === ===== ==============================
    """

    def __init__(self, *, operations: tuple[str, ...] = STAGE_OPS):
        self._operations = tuple(operations)
        word = WORD_BITS
        super().__init__(
            {"operation": In(4), "type": In(2), "a": In(word), "b": In(word), "choose": In(1), "o": Out(word)}
        )

    @shared
    def elaborate(self, platform):
        m = Module()
        a, b, has = self.a, self.b, self._operations.__contains__
        integer = self.type == TYPE["int32"]
        exact = Signal(WORD_BITS)  # before rounding
        result = Signal(WORD_BITS)  # never rounded
        rounds = Signal()
        m.d.comb += [exact.eq(a), rounds.eq(1)]

        m.submodules.add = add = FpAdd(format=FP32)
        m.submodules.maximum = maximum = FpMaximum(format=FP32)
        minus, lower = Signal(), Signal()
        m.d.comb += [
            minus.eq(self.operation == OP["subtract"]),
            lower.eq(self.operation == OP["minimum"]),
            add.a.eq(a),
            add.b.eq(Cat(b[:-1], b[-1] ^ minus)),
            maximum.a.eq(Cat(a[:-1], a[-1] ^ lower)),
            maximum.b.eq(Cat(b[:-1], b[-1] ^ lower)),
        ]
        extreme = Signal(WORD_BITS)
        nan = maximum.o == FP32.nan
        m.d.comb += extreme.eq(Cat(maximum.o[:-1], maximum.o[-1] ^ (lower & ~nan)))
        if has("multiply"):
            m.submodules.multiply = multiply = FpMultiply(source=FP32, result=FP32)
            m.d.comb += [multiply.a.eq(a), multiply.b.eq(b)]
        if has("less"):
            m.submodules.compare = compare = FpCompare(format=FP32)
            m.d.comb += [compare.a.eq(a), compare.b.eq(b)]
        smaller = a.as_signed() < b.as_signed()

        with m.Switch(self.operation):
            for name, value in (
                ("add", Mux(integer, (a + b)[:WORD_BITS], add.o)),
                ("subtract", Mux(integer, (a - b)[:WORD_BITS], add.o)),
                ("multiply", Mux(integer, (a * b)[:WORD_BITS], multiply.o) if has("multiply") else a),
                ("maximum", Mux(integer, Mux(smaller, b, a), extreme)),
                ("minimum", Mux(integer, Mux(smaller, a, b), extreme)),
            ):
                if has(name):
                    with m.Case(OP[name]):
                        m.d.comb += exact.eq(value)
            for name, value in (
                ("less", Mux(integer, smaller, compare.lt) if has("less") else a),
                ("select", Mux(self.choose, a, b)),
                ("shift_left", (a << b[:5])[:WORD_BITS]),
                ("shift_right", (a.as_signed() >> b[:5])[:WORD_BITS]),
                ("and", a & b),
                ("or", a | b),
                ("xor", a ^ b),
            ):
                if has(name):
                    with m.Case(OP[name]):
                        m.d.comb += [result.eq(value), rounds.eq(0)]

        m.submodules.round = rounding = FpConvert(source=FP32, result=BF16)
        half = Const(0, WORD_BITS - BF16.width)
        m.d.comb += [
            rounding.a.eq(exact),
            self.o.eq(
                Mux(
                    rounds,
                    Mux(self.type == TYPE["bf16"], Cat(half, rounding.o), exact),
                    result,
                )
            ),
        ]
        return m
