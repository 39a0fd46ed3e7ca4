"""What the lanes of the vector unit do to the elements of a group, and how they join them."""

from amaranth.hdl import Cat, Const, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from tilewright.arch.formats import BF16, FP32
from tilewright.arch.pim_asic import GATE_LIMIT_EXPONENT, RECIPROCAL_SEED, RSQRT_SEED, SCALE_LIMIT
from tilewright.rtl.lib.fp import FpAdd, FpCompare, FpMaximum, FpMultiply
from tilewright.rtl.lib.share import shared

FIRST = ("pass", "multiply", "scale", "gate")  # encodings of what `arch.pim_asic.Step` names
SECOND = ("pass", "add", "subtract", "reciprocal", "rsqrt", "relu")
JOIN = ("", "sum", "top", "best")

WIDTH = FP32.width
NEGATIVE_INFINITY = FP32.sign | FP32.overflow


def delay(m, value, cycles, *, name, reset_less=True):
    """The value of `cycles` cycles ago; what says that there is something has to be forgotten by a reset."""
    for i in range(cycles):
        later = Signal.like(value, name=f"{name}_{i + 1}", reset_less=reset_less)
        m.d.sync += later.eq(value)
        value = later
    return value


def is_nan(bits):
    return bits[:-1] > FP32.overflow


class Lane(wiring.Component):
    """A multiplier followed by an adder, with what little logic the special steps need beside them.

    Latency `multiply_latency + add_latency`. `arch.pim_asic.Step` has the operations; the seed of 1/sqrt(NaN)
    is NaN.

    Parameters
    ----------
    multiply_latency, add_latency : int
        Cycles, at least 1.

    Members
    -------
    ======= === ============= ================================================================
    first   In  range(FIRST)  what the multiplier's stage does to a, b (and c, which may gate)
    negate  In  1             its result is negated
    second  In  range(SECOND) what the adder's stage does to that and c
    a, b, c In  32            operands, binary32
    o       Out 32            the result
    ======= === ============= ================================================================
    """

    def __init__(self, *, multiply_latency: int, add_latency: int):
        self._multiply_latency, self._add_latency = multiply_latency, add_latency
        super().__init__(
            {
                "first": In(range(len(FIRST))),
                "negate": In(1),
                "second": In(range(len(SECOND))),
                "a": In(WIDTH),
                "b": In(WIDTH),
                "c": In(WIDTH),
                "o": Out(WIDTH),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.multiply = multiply = FpMultiply(source=FP32, result=FP32)
        m.submodules.add = add = FpAdd(format=FP32)
        gate_field = FP32.bias + GATE_LIMIT_EXPONENT << FP32.mantissa_bits

        factor, product = Signal(WIDTH), Signal(WIDTH)
        m.d.comb += [factor.eq(self.b), multiply.a.eq(self.a), multiply.b.eq(factor)]
        with m.If(self.first == FIRST.index("gate")):
            with m.If(is_nan(self.c)):
                m.d.comb += factor.eq(self.c)
            with m.Elif(~self.c[-1] & (self.c[:-1] >= gate_field)):
                m.d.comb += factor.eq(0)
        with m.Switch(self.first):
            with m.Case(FIRST.index("pass")):
                m.d.comb += product.eq(self.a)
            with m.Case(FIRST.index("scale")):
                m.d.comb += product.eq(self._scale(m))
            with m.Default():
                m.d.comb += product.eq(multiply.o)

        later = self._multiply_latency
        x, c = Signal(WIDTH), delay(m, self.c, later, name="c")
        negate = delay(m, self.negate, later, name="negate")
        second = delay(m, self.second, later, name="second")
        product = delay(m, product, later, name="product")
        m.d.comb += [
            x.eq(Cat(product[:-1], product[-1] ^ negate)),
            add.a.eq(x),
            add.b.eq(Cat(c[:-1], c[-1] ^ (second == SECOND.index("subtract")))),
        ]
        result = Signal(WIDTH)
        with m.Switch(second):
            with m.Case(SECOND.index("pass")):
                m.d.comb += result.eq(x)
            with m.Case(SECOND.index("reciprocal")):
                m.d.comb += result.eq(RECIPROCAL_SEED - x)
            with m.Case(SECOND.index("rsqrt")):
                m.d.comb += result.eq(Mux(is_nan(x), x, RSQRT_SEED - (x >> 1)))
            with m.Case(SECOND.index("relu")):
                m.d.comb += result.eq(Mux(x[-1] & ~is_nan(x), 0, x))
            with m.Default():
                m.d.comb += result.eq(add.o)
        m.d.comb += self.o.eq(delay(m, result, self._add_latency, name="result"))
        return m

    def _scale(self, m):
        """a * 2**b by an addition to the exponent."""
        fraction, bits = FP32.mantissa_bits, SCALE_LIMIT.bit_length() - 1
        assert SCALE_LIMIT == 1 << bits
        field, sign = self.b[fraction:-1], self.b[-1]
        # The highest bits of the significand, shifted until the last one weighs 1: the limit takes no shift.
        highest = Cat(self.b[fraction - bits + 1 : fraction], Const(1))
        shift = (FP32.bias + bits - 1 - field)[: (bits - 1).bit_length()]
        size, exponent = Signal(bits), Signal(range(-SCALE_LIMIT, 2 * SCALE_LIMIT))
        far, low, high = Signal(), Signal(), Signal()
        m.d.comb += [
            size.eq(Mux(field < FP32.bias, 0, highest >> shift)),
            exponent.eq(self.a[fraction:-1] + Mux(sign, -size, size)),
            far.eq(field >= FP32.bias + bits),
            low.eq(Mux(far, sign, exponent < 1)),
            high.eq(Mux(far, ~sign, exponent >= FP32.overflow >> fraction)),
        ]
        scaled = Cat(self.a[:fraction], exponent[: FP32.exponent_bits], Const(0))
        return Mux(is_nan(self.b), FP32.nan, Mux(low, 0, Mux(high, FP32.overflow, scaled)))


class _Join(wiring.Component):
    """The sum or the larger of two binary32 numbers. Latency 0."""

    def __init__(self):
        super().__init__({"maximum": In(1), "a": In(WIDTH), "b": In(WIDTH), "o": Out(WIDTH)})

    @shared
    def elaborate(self, platform):
        m = Module()
        m.submodules.add = add = FpAdd(format=FP32)
        m.submodules.larger = larger = FpMaximum(format=FP32)
        for unit in (add, larger):
            m.d.comb += [unit.a.eq(self.a), unit.b.eq(self.b)]
        m.d.comb += self.o.eq(Mux(self.maximum, larger.o, add.o))
        return m


class Tree(wiring.Component):
    """Joins the elements of a group in adjacent pairs, level by level, and its result to a running total.

    There are two totals, the sum from +0 and the maximum from -infinity. Lanes that are not active, and those
    that fill up to a power of two, count as the total's start. Every level takes `latency` cycles and so does
    the total: a group may follow `latency` cycles after the one before it, and stands in its total
    `latency * (1 + ceil(log2(lanes)))` cycles after it came.

    Parameters
    ----------
    lanes, latency : int

    Members
    -------
    ======== === ================ =======================================
    valid    In  1                there is a group
    maximum  In  1                which total it is for
    fresh    In  1                the total starts anew
    active   In  lanes            lanes that hold elements
    elements In  array, 32        binary32, as are the totals
    sum      Out 32
    top      Out 32
    ======== === ================ =======================================
    """

    def __init__(self, *, lanes: int, latency: int):
        self._latency = latency
        super().__init__(
            {
                "valid": In(1),
                "maximum": In(1),
                "fresh": In(1),
                "active": In(lanes),
                "elements": In(WIDTH).array(lanes),
                "sum": Out(WIDTH),
                "top": Out(WIDTH),
            }
        )

    def elaborate(self, platform):
        m = Module()
        valid, maximum, fresh = self.valid, self.maximum, self.fresh

        def start():
            return Mux(maximum, NEGATIVE_INFINITY, 0)

        def join(name, a, b):
            m.submodules[name] = unit = _Join()
            m.d.comb += [unit.maximum.eq(maximum), unit.a.eq(a), unit.b.eq(b)]
            return unit.o

        lanes = len(self.active)
        level = [Mux(on, x, start()) for on, x in zip(self.active, self.elements, strict=True)]
        level += [start()] * ((1 << (lanes - 1).bit_length()) - lanes)
        depth = 0
        while len(level) > 1:
            joined = [join(f"join_{depth}_{i // 2}", *level[i : i + 2]) for i in range(0, len(level), 2)]
            level = [delay(m, x, self._latency, name=f"level_{depth}_{i}") for i, x in enumerate(joined)]
            valid = delay(m, valid, self._latency, name=f"valid_{depth}", reset_less=False)
            maximum = delay(m, maximum, self._latency, name=f"maximum_{depth}")
            fresh = delay(m, fresh, self._latency, name=f"fresh_{depth}")
            depth += 1

        before = Mux(fresh, start(), Mux(maximum, self.top, self.sum))
        # The last cycle of the adder is the total itself.
        total = delay(m, join("total", before, level[0]), self._latency - 1, name="total")
        valid = delay(m, valid, self._latency - 1, name="valid_total", reset_less=False)
        maximum = delay(m, maximum, self._latency - 1, name="maximum_total")
        with m.If(valid & maximum):
            m.d.sync += self.top.eq(total)
        with m.Elif(valid):
            m.d.sync += self.sum.eq(total)
        return m


class ArgMaximum(wiring.Component):
    """The greatest element of a group, the first of equals, and its index.

    NaN counts as -infinity, which is greater than nothing. Whoever compares it with the best so far in one cycle
    more takes as long as a `Tree`: the latency is `latency * (1 + ceil(log2(lanes))) - 1`.

    Parameters
    ----------
    lanes, latency : int

    Members
    -------
    ======== === ========= ================================================
    valid    In  1         there is a group
    first    In  32        index of lane 0
    active   In  lanes     lanes that hold elements
    elements In  array, 16 bfloat16
    found    Out 1         `value` and `index` are those of a group
    value    Out 16        bfloat16
    index    Out 32
    ======== === ========= ================================================
    """

    def __init__(self, *, lanes: int, latency: int):
        self._latency = latency
        super().__init__(
            {
                "valid": In(1),
                "first": In(32),
                "active": In(lanes),
                "elements": In(BF16.width).array(lanes),
                "found": Out(1),
                "value": Out(BF16.width),
                "index": Out(32),
            }
        )

    def elaborate(self, platform):
        m = Module()
        valid, first = self.valid, self.first
        lanes = len(self.active)
        level = []
        for lane, on, x in zip(range(lanes), self.active, self.elements, strict=True):
            number = on & (x[:-1] <= BF16.overflow)
            level.append((Mux(number, x, BF16.sign | BF16.overflow), Const(lane, range(lanes))))
        depth = 0
        while len(level) > 1:
            best = level[len(level) // 2 * 2 :]  # one that has no neighbour
            for i in reversed(range(0, len(level) - 1, 2)):
                (a, a_lane), (b, b_lane) = level[i : i + 2]
                m.submodules[f"compare_{depth}_{i // 2}"] = compare = FpCompare(format=BF16)
                m.d.comb += [compare.a.eq(a), compare.b.eq(b)]
                best.insert(0, (Mux(compare.lt, b, a), Mux(compare.lt, b_lane, a_lane)))
            level = [
                (
                    delay(m, value, self._latency, name=f"value_{depth}_{i}"),
                    delay(m, lane, self._latency, name=f"lane_{depth}_{i}"),
                )
                for i, (value, lane) in enumerate(best)
            ]
            valid = delay(m, valid, self._latency, name=f"valid_{depth}", reset_less=False)
            first = delay(m, first, self._latency, name=f"first_{depth}")
            depth += 1
        [(value, lane)] = level
        rest = self._latency - 1
        m.d.comb += [
            self.found.eq(delay(m, valid, rest, name="valid_best", reset_less=False)),
            self.value.eq(delay(m, value, rest, name="value_best")),
            self.index.eq(delay(m, first + lane, rest, name="index_best")),
        ]
        return m
