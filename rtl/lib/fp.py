"""Combinational floating-point units for any `FloatFormat`.

All have latency 0: whoever instantiates one places the registers. They round to nearest, ties to even, keep
subnormals, give infinity on overflow (NaN in a format without infinity) and let only the canonical NaN
out; `tilewright.workloads.formats` is the same arithmetic in NumPy.
"""

from amaranth.hdl import Cat, Const, Module, Mux, Shape, Signal, Value
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.formats import FloatFormat
from tilewright.rtl.lib.share import shared

__all__ = ["FpAdd", "FpCompare", "FpConvert", "FpMaximum", "FpMultiply", "FpRound"]


class _Operand:
    """The fields of an encoding, and what kind of number it is."""

    def __init__(self, m: Module, bits: Value, fmt: FloatFormat, name: str):
        self.sign, self.magnitude = bits[-1], bits[:-1]
        field = self.magnitude[fmt.mantissa_bits :]
        normal = Signal(name=f"{name}_normal")
        # A subnormal has the exponent of the smallest normal number, and no hidden bit.
        self.exponent = Cat(field[0] | ~normal, field[1:])
        self.significand = Cat(self.magnitude[: fmt.mantissa_bits], normal)
        self.nan = Signal(name=f"{name}_nan")
        self.inf = Signal(name=f"{name}_inf")
        m.d.comb += normal.eq(field.any())
        if fmt.has_inf:
            m.d.comb += [
                self.nan.eq(self.magnitude > fmt.overflow),
                self.inf.eq(self.magnitude == fmt.overflow),
            ]
        else:
            m.d.comb += self.nan.eq(self.magnitude == fmt.nan)


def _signed(fmt: FloatFormat, sign: Value, magnitude: Value, overflow: Value) -> Value:
    """The encoding of a magnitude, or of an overflow, which has a sign only where it is an infinity."""
    if fmt.has_inf:
        return Cat(Mux(overflow, fmt.overflow, magnitude)[: fmt.width - 1], sign)
    return Mux(overflow, fmt.nan, Cat(magnitude[: fmt.width - 1], sign))[: fmt.width]


def _normalise(m: Module, word: Value, name: str) -> tuple[Value, Value]:
    """The word shifted left until its first bit is set, and by how many places."""
    flags = []
    for k in reversed(range(bits_for(len(word) - 1))):
        step = 1 << k
        empty = Signal(name=f"{name}_empty_{step}")
        shifted = Signal(len(word), name=f"{name}_from_{step}")
        m.d.comb += [
            empty.eq(~word[-step:].any()),
            shifted.eq(Mux(empty, Cat(Const(0, step), word[:-step]), word)),
        ]
        flags.insert(0, empty)
        word = shifted
    return word, Cat(flags)


def _at_most(m: Module, amount: Value, useful: int) -> Value:
    """A shift amount in as few bits as hold `useful`: all ones where it does not fit."""
    bits = bits_for(useful)
    if len(amount) <= bits:
        return amount
    far = Signal(name="far")
    m.d.comb += far.eq(amount[bits:].any())
    return amount[:bits] | far.replicate(bits)


def _below_shift(word: Value, amount: Value) -> Value:
    """Whether `word >> amount` loses a set bit."""
    lost = ~(Const((1 << len(word)) - 1, len(word)) << amount)[: len(word)]
    return (word & lost).any()


class FpRound(wiring.Component):
    """Round an unnormalised number to a format: normalise, denormalise below its range, round, pack.

    Latency 0.

    Parameters
    ----------
    width : int
        Bits of the significand.
    exponents : (int, int)
        Smallest and largest value of ``exponent``.
    result : FloatFormat
        Format of the result.

    Members
    -------
    ========== === ======================== =========================================================
    sign       In  1                        the number is negative
    exponent   In  range(*exponents), incl. exponent of the first bit of the significand, biased as in
                                            ``result``
    significand In width                    the number is significand * 2**(exponent - bias - width + 1)
    o          Out result.width             the number in ``result``
    ========== === ======================== =========================================================
    """

    def __init__(self, *, width: int, exponents: tuple[int, int], result: FloatFormat):
        self._exponents = exponents
        self._result = result
        super().__init__(
            {
                "sign": In(1),
                "exponent": In(Shape.cast(range(exponents[0], exponents[1] + 1))),
                "significand": In(width),
                "o": Out(result.width),
            }
        )

    @shared
    def elaborate(self, platform):
        m = Module()
        fmt, p = self._result, self._result.precision
        low, high = self._exponents
        width = len(self.significand)

        normal, count = _normalise(m, self.significand, "normal")
        exponent = Signal(range(low - width + 1, high + 1))
        m.d.comb += exponent.eq(self.exponent - count)

        # The precision and a guard bit; all below is only ever asked whether it is zero.
        kept = Cat(Const(0, max(0, p + 1 - width)), normal)[-(p + 1) :]
        rest = Signal()
        m.d.comb += rest.eq(normal[: -(p + 1)].any())
        if low - width + 1 < 1:  # there may be numbers below the normal range
            distance = Signal(range(1 - high, width - low + 1))
            shift, lost = Signal(bits_for(p + 1)), Signal()
            shifted = Signal(p + 1)
            m.d.comb += [
                distance.eq(1 - exponent),
                shift.eq(Mux(distance > 0, _at_most(m, distance[:-1], p + 1), 0)),
                shifted.eq(kept >> shift),
                lost.eq(_below_shift(kept, shift)),
            ]
            kept, rest = shifted, rest | lost

        magnitude = Signal(max(fmt.width, fmt.mantissa_bits + bits_for(high + 1)))
        # Without the hidden bit the number is subnormal or zero.
        field = Mux(kept[-1], exponent, 0)[: len(magnitude) - fmt.mantissa_bits]
        up = kept[0] & (rest | kept[1])
        m.d.comb += [
            magnitude.eq(Cat(kept[1:-1], field) + up),
            self.o.eq(_signed(fmt, self.sign, magnitude, magnitude > fmt.max_finite)),
        ]
        return m


class FpConvert(wiring.Component):
    """A number of one format in another.

    Latency 0. Between formats with the same exponents it costs one incrementer, or nothing.

    Parameters
    ----------
    source, result : FloatFormat
        Formats of the operand and of the result.

    Members
    -------
    = === ============ ==================
    a In  source.width the operand
    o Out result.width ``a`` in ``result``
    = === ============ ==================
    """

    def __init__(self, *, source: FloatFormat, result: FloatFormat):
        self._source = source
        self._result = result
        super().__init__({"a": In(source.width), "o": Out(result.width)})

    @shared
    def elaborate(self, platform):
        m = Module()
        source, result = self._source, self._result
        a = _Operand(m, self.a, source, "a")
        number = Signal(result.width)
        dropped = source.mantissa_bits - result.mantissa_bits

        if (source.exponent_bits, source.has_inf) != (result.exponent_bits, result.has_inf):
            offset = result.bias - source.bias
            exponents = (1 + offset, (1 << source.exponent_bits) - 1 + offset)
            m.submodules.round = rounding = FpRound(
                width=source.precision, exponents=exponents, result=result
            )
            m.d.comb += [
                rounding.sign.eq(a.sign),
                rounding.exponent.eq(a.exponent + offset),
                rounding.significand.eq(a.significand),
                number.eq(Mux(a.inf, _signed(result, a.sign, Const(0, result.width), Const(1)), rounding.o)),
            ]
        elif dropped <= 0:
            m.d.comb += number.eq(Cat(Const(0, -dropped), self.a))
        else:
            # Rounding carries into the exponent by itself, up to infinity, which has no rest.
            magnitude = Signal(result.width)
            up = a.magnitude[dropped - 1] & (a.magnitude[: dropped - 1].any() | a.magnitude[dropped])
            m.d.comb += [
                magnitude.eq(a.magnitude[dropped:] + up),
                number.eq(_signed(result, a.sign, magnitude, magnitude > result.max_finite)),
            ]

        m.d.comb += self.o.eq(Mux(a.nan, result.nan, number))
        return m


class FpAdd(wiring.Component):
    """The sum of two numbers of one format.

    Latency 0: one alignment shifter, one adder, one normalising shifter, one incrementer.

    Parameters
    ----------
    format : FloatFormat
        Format of the operands and of the sum.

    Members
    -------
    ==== === ============ ==================================
    a, b In  format.width the operands
    o    Out format.width ``a + b``; +0 where they cancel out
    ==== === ============ ==================================
    """

    def __init__(self, *, format: FloatFormat):
        self._format = format
        width = format.width
        super().__init__({"a": In(width), "b": In(width), "o": Out(width)})

    @shared
    def elaborate(self, platform):
        m = Module()
        fmt, p = self._format, self._format.precision

        # The larger magnitude decides exponent and sign, and is the one that may be NaN or infinite.
        swap = Signal()
        large_bits = Signal(fmt.width)
        small_bits = Signal(fmt.width)
        m.d.comb += [
            swap.eq(self.a[:-1] < self.b[:-1]),
            large_bits.eq(Mux(swap, self.b, self.a)),
            small_bits.eq(Mux(swap, self.a, self.b)),
        ]
        large = _Operand(m, large_bits, fmt, "large")
        small = _Operand(m, small_bits, fmt, "small")
        subtract = Signal()
        m.d.comb += subtract.eq(large.sign ^ small.sign)

        # Align: two bits below the significand and a sticky one are enough for a correct rounding.
        distance = Signal(fmt.exponent_bits)
        shift, lost = Signal(bits_for(p + 2)), Signal()
        grown = Cat(Const(0, 2), small.significand)
        m.d.comb += [
            distance.eq(large.exponent - small.exponent),
            shift.eq(_at_most(m, distance, p + 2)),
            lost.eq(_below_shift(grown, shift)),
        ]
        addend = Signal(p + 4)
        total = Signal(p + 4)
        m.d.comb += [
            addend.eq(Cat(lost, grown >> shift)),
            # The bit below carries in.
            total.eq(
                (
                    Cat(Const(1), Const(0, 3), large.significand)
                    + Cat(subtract, Mux(subtract, ~addend, addend))
                )[1:]
            ),
        ]

        # Normalise, but no further than the smallest exponent: a bit there ends the count of zeros.
        limited = Signal(p + 4)
        normal = Signal(p + 4)
        exponent = Signal(fmt.exponent_bits + 1)
        m.d.comb += limited.eq(total | (Const(1 << p + 3, p + 4) >> large.exponent))
        _, count = _normalise(m, limited, "limited")
        m.d.comb += [
            normal.eq(total << count),
            # Without the hidden bit the sum is subnormal or zero.
            exponent.eq(Mux(normal[-1], large.exponent + 1 - count, 0)),
        ]

        magnitude = Signal(fmt.width)
        up = normal[3] & (normal[:3].any() | normal[4])
        sign = Signal()
        m.d.comb += [
            magnitude.eq(Cat(normal[4:-1], exponent) + up),
            sign.eq(large.sign & ~(subtract & ~total.any())),
            self.o.eq(
                Mux(
                    large.nan | (large.inf & small.inf & subtract),
                    fmt.nan,
                    _signed(fmt, sign, magnitude, large.inf | (magnitude > fmt.max_finite)),
                )
            ),
        ]
        return m


class FpMultiply(wiring.Component):
    """The product of two numbers of one format, rounded to another.

    Latency 0. A product of two bfloat16 numbers in binary32 is exact unless it overflows or underflows.

    Parameters
    ----------
    source : FloatFormat
        Format of both operands.
    result : FloatFormat
        Format of the product.

    Members
    -------
    ==== === ============ ===============================
    a, b In  source.width the operands
    o    Out result.width ``a * b``, rounded to ``result``
    ==== === ============ ===============================
    """

    def __init__(self, *, source: FloatFormat, result: FloatFormat):
        self._source = source
        self._result = result
        super().__init__({"a": In(source.width), "b": In(source.width), "o": Out(result.width)})

    @shared
    def elaborate(self, platform):
        m = Module()
        source, result = self._source, self._result
        a = _Operand(m, self.a, source, "a")
        b = _Operand(m, self.b, source, "b")
        # The product of two significands in [1, 2) is in [1, 4): its first bit weighs 2.
        offset = result.bias - 2 * source.bias + 1
        top = (1 << source.exponent_bits) - 1
        m.submodules.round = rounding = FpRound(
            width=2 * source.precision, exponents=(2 + offset, 2 * top + offset), result=result
        )
        sign = Signal()
        inf = Signal()
        nan = Signal()
        m.d.comb += [
            sign.eq(a.sign ^ b.sign),
            inf.eq(a.inf | b.inf),
            nan.eq(a.nan | b.nan | (inf & (~a.magnitude.any() | ~b.magnitude.any()))),
            rounding.sign.eq(sign),
            rounding.exponent.eq(a.exponent + b.exponent + offset),
            rounding.significand.eq(a.significand * b.significand),
            self.o.eq(
                Mux(
                    nan,
                    result.nan,
                    Mux(inf, _signed(result, sign, Const(0, result.width), Const(1)), rounding.o),
                )
            ),
        ]
        return m


class FpCompare(wiring.Component):
    """The order of two numbers of one format; with a NaN only ``unordered`` is set.

    Latency 0.

    Parameters
    ----------
    format : FloatFormat
        Format of the operands.

    Members
    -------
    ========= === ============ ==============================================
    a, b      In  format.width the operands
    lt        Out 1            ``a < b``
    eq        Out 1            ``a == b``; the two zeros are equal
    unordered Out 1            ``a`` or ``b`` is NaN
    ========= === ============ ==============================================
    """

    def __init__(self, *, format: FloatFormat):
        self._format = format
        width = format.width
        super().__init__({"a": In(width), "b": In(width), "lt": Out(1), "eq": Out(1), "unordered": Out(1)})

    @shared
    def elaborate(self, platform):
        m = Module()
        a = _Operand(m, self.a, self._format, "a")
        b = _Operand(m, self.b, self._format, "b")
        zeros = Signal()
        m.d.comb += [
            zeros.eq(~(a.magnitude | b.magnitude).any()),
            self.unordered.eq(a.nan | b.nan),
            self.eq.eq(~self.unordered & (zeros | (self.a == self.b))),
            self.lt.eq(~self.unordered & ~zeros & _below(a, b)),
        ]
        return m


class FpMaximum(wiring.Component):
    """The larger of two numbers of one format: NaN if either is, and +0 above -0.

    Latency 0.

    Parameters
    ----------
    format : FloatFormat
        Format of the operands and of the result.

    Members
    -------
    ==== === ============ ==================================================
    a, b In  format.width the operands
    o    Out format.width the larger of them (IEEE 754-2019, 9.6: maximum)
    ==== === ============ ==================================================
    """

    def __init__(self, *, format: FloatFormat):
        self._format = format
        width = format.width
        super().__init__({"a": In(width), "b": In(width), "o": Out(width)})

    @shared
    def elaborate(self, platform):
        m = Module()
        a = _Operand(m, self.a, self._format, "a")
        b = _Operand(m, self.b, self._format, "b")
        m.d.comb += self.o.eq(Mux(a.nan | b.nan, self._format.nan, Mux(_below(a, b), self.b, self.a)))
        return m


def _below(a: _Operand, b: _Operand) -> Value:
    """Whether a comes before b in the order of signs and magnitudes, in which -0 is before +0."""
    return Mux(a.sign, ~b.sign | (b.magnitude < a.magnitude), ~b.sign & (a.magnitude < b.magnitude))
