"""The table array: one bit plane of N weight groups meets the tables of M rows in every tick."""

from amaranth.hdl import Assert, Cat, Const, Module, Mux, Shape, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.formats import FP32, FloatFormat
from tilewright.rtl.lib.fp import FpAdd, FpConvert, FpRound
from tilewright.rtl.lib.share import shared

__all__ = [
    "Accumulate",
    "LutArray",
    "LutUnit",
    "PlaneWeight",
    "QuantisedLutArray",
    "ScaleInteger",
    "accumulators",
    "common_ports",
    "delayed",
    "weighted",
    "widened",
]

PLANE_BITS = 2  # planes 0..3


# ---- what every array is made of ---------------------------------------------------------------------------


def widened(number: Shape | FloatFormat, accumulator: Shape | FloatFormat) -> Shape | FloatFormat:
    """In what format a number waits to be weighted with 2**plane and added to the accumulator.

    A float on its way to a larger format gets one exponent bit more: none is subnormal then, and none
    overflows, so that each unit weights it with an adder for the exponent.
    """
    if not isinstance(number, FloatFormat) or number == accumulator:
        return number
    wide = FloatFormat(f"{number.name}_wide", number.exponent_bits + 1, number.mantissa_bits)
    planes = 1 << PLANE_BITS
    assert number.has_inf and wide.bias - number.bias >= max(wide.mantissa_bits, planes), number
    assert accumulator.exponent_bits > wide.exponent_bits, accumulator
    assert accumulator.mantissa_bits >= wide.mantissa_bits, accumulator
    return wide


def weighted(number: Shape | FloatFormat, planes: int, accumulator: Shape | FloatFormat):
    """What holds a number times 2**plane: the accumulator's format, or a wider integer."""
    return accumulator if isinstance(number, FloatFormat) else signed(number.width + planes - 1)


def delayed(m, value, ticks, name):
    """The value of so many ticks ago; zero before the first tick."""
    for tick in range(ticks):
        later = Signal(len(value), name=f"{name}_{tick + 1}")
        m.d.sync += later.eq(value)
        value = later
    return value


class PlaneWeight(wiring.Component):
    """A number times 2**plane, in the format that `weighted` says.

    Latency 0. Exact, but for an overflow, which gives infinity; a zero stays a zero, a NaN a NaN.

    Parameters
    ----------
    number : Shape or FloatFormat
        Format of the operand, as `widened` says: of floats, the accumulator's or one without subnormals.
    planes : int
        Number of planes.
    accumulator : Shape or FloatFormat
        Format of the accumulator.

    Members
    -------
    ===== === ============== ==================
    a     In  number.width   the operand
    plane In  PLANE_BITS     below ``planes``
    o     Out weighted width ``a * 2**plane``
    ===== === ============== ==================
    """

    def __init__(self, *, number: Shape | FloatFormat, planes: int, accumulator: Shape | FloatFormat):
        self._number, self._planes, self._accumulator = number, planes, accumulator
        result = weighted(number, planes, accumulator)
        super().__init__({"a": In(number.width), "plane": In(PLANE_BITS), "o": Out(result.width)})

    @shared
    def elaborate(self, platform):
        m = Module()
        number, result = self._number, self._accumulator
        # Planes that don't exist cost nothing.
        plane = self.plane[: bits_for(self._planes - 1)] if self._planes > 1 else Const(0, 1)
        if not isinstance(number, FloatFormat):
            m.d.comb += self.o.eq(self.a.as_signed() << plane)
            return m
        if number == result:
            word = self.a[:-1]
            infinity = number.overflow
            for step in range(self._planes - 1):
                field = word[number.mantissa_bits :]
                doubled = Signal(number.width - 1, name=f"doubled_{step}")
                with m.If(word >= infinity):
                    m.d.comb += doubled.eq(word)
                with m.Elif(word >= infinity - number.min_normal):
                    m.d.comb += doubled.eq(infinity)
                with m.Elif(field.any()):
                    m.d.comb += doubled.eq(Cat(word[: number.mantissa_bits], field + 1))
                with m.Else():  # subnormal: its first bit may become the hidden one
                    m.d.comb += doubled.eq(word << 1)
                word = Mux(plane > step, doubled, word)
            m.d.comb += self.o.eq(Cat(word[: number.width - 1], self.a[-1]))
            return m
        field = self.a[number.mantissa_bits : -1]
        exponent = Signal(result.exponent_bits)
        with m.If(field.all()):
            m.d.comb += exponent.eq((1 << result.exponent_bits) - 1)
        with m.Elif(field.any()):
            m.d.comb += exponent.eq(field + plane + (result.bias - number.bias))
        padding = Const(0, result.mantissa_bits - number.mantissa_bits)
        m.d.comb += self.o.eq(Cat(padding, self.a[: number.mantissa_bits], exponent, self.a[-1]))
        return m


class Accumulate(wiring.Component):
    """The accumulator's adder: an integer sum that wraps, or a float sum, rounded.

    Latency 0. An integer addend that is to be subtracted comes inverted; the carry completes the negation.

    Parameters
    ----------
    accumulator : Shape or FloatFormat
        Format of accumulator and result.
    addend : Shape or FloatFormat
        Format of the addend: the accumulator's, or an integer of another width.

    Members
    -------
    ===== === ================= =======================================
    a     In  accumulator.width the accumulator
    b     In  addend.width      the addend
    carry In  1                 added, too; without a meaning in floats
    o     Out accumulator.width ``a + b + carry``
    ===== === ================= =======================================
    """

    def __init__(self, *, accumulator: Shape | FloatFormat, addend: Shape | FloatFormat):
        self._accumulator, self._addend = accumulator, addend
        width = accumulator.width
        super().__init__({"a": In(width), "b": In(addend.width), "carry": In(1), "o": Out(width)})

    @shared
    def elaborate(self, platform):
        m = Module()
        if isinstance(self._accumulator, FloatFormat):
            assert self._addend == self._accumulator, self._addend
            m.submodules.add = unit = FpAdd(format=self._accumulator)
            m.d.comb += [unit.a.eq(self.a), unit.b.eq(self.b), self.o.eq(unit.o)]
        else:
            addend = Signal(signed(self._accumulator.width))
            m.d.comb += [
                addend.eq(self.b.as_signed()),
                # The bit below carries in: one adder, not two.
                self.o.eq((Cat(Const(1, 1), self.a) + Cat(self.carry, addend))[1:]),
            ]
        return m


def common_ports(m: int, n: int, accumulator: Shape | FloatFormat) -> dict:
    """The members that all arrays have: the marks of a tile, its partial sums and its results."""
    assert m >= 1 and n >= 1, (m, n)
    return {
        "valid": In(1),
        "first": In(1),
        "last": In(1),
        "take": Out(1),
        "psum": In(m * n * accumulator.width),
        "done": Out(1),
        "result": Out(m * n * accumulator.width),
    }


def check_tile(m, array):
    """Asserts that `first` begins a tile, `last` ends it, and operands are in one."""
    inside = Signal()
    with m.If(array.valid):
        m.d.sync += inside.eq(~array.last)
        m.d.sync += Assert(
            array.first ^ inside, "first must mark the first operands of a tile, and only these"
        )


def accumulators(m, array, accumulator, addend, addends, *, valid, first, last):
    """Adds addends [M*N], pairs of bits and carry, to the accumulators; drives take, done and result."""
    results = []
    for i, (value, carry) in enumerate(addends):
        m.submodules[f"accumulate_{i}"] = unit = Accumulate(accumulator=accumulator, addend=addend)
        acc = Signal(accumulator.width, name=f"acc_{i}")
        m.d.comb += [
            unit.a.eq(Mux(first, array.psum.word_select(i, accumulator.width), acc)),
            unit.b.eq(value),
            unit.carry.eq(carry),
        ]
        with m.If(valid):
            m.d.sync += acc.eq(unit.o)
        results.append(acc)
    m.d.sync += array.done.eq(valid & last)
    m.d.comb += [array.take.eq(valid & first), array.result.eq(Cat(results))]


# ---- the table array ---------------------------------------------------------------------------------------


class LutUnit(wiring.Component):
    """Reads a table for one column: selects an entry, negates it on the sign bit, weights it with 2**plane.

    Latency 0. The coded bits need no complement here: W'_k = W_k ^ W_(K-1) was done offline (LUT Tensor Core,
    Eq 6).

    Parameters
    ----------
    k : int
        Bits of a coded weight group.
    planes : int
        Number of planes.
    entry : Shape or FloatFormat
        Format of a table entry, as `widened` says.
    accumulator : Shape or FloatFormat
        Format of the accumulator.

    Members
    -------
    ===== === ====================== ==================================================================
    table In  2**(k-1) * entry.width the entries, entry 0 in the lowest bits
    word  In  k                      coded weights: the index, and above it the sign
    plane In  PLANE_BITS             below ``planes``
    o     Out weighted width         the addend; a negated integer is only inverted
    carry Out 1                      the addend is such an integer
    ===== === ====================== ==================================================================
    """

    def __init__(self, *, k: int, planes: int, entry: Shape | FloatFormat, accumulator: Shape | FloatFormat):
        self._planes, self._entry, self._accumulator = planes, entry, accumulator
        super().__init__(
            {
                "table": In((1 << k - 1) * entry.width),
                "word": In(k),
                "plane": In(PLANE_BITS),
                "o": Out(weighted(entry, planes, accumulator).width),
                "carry": Out(1),
            }
        )

    @shared
    def elaborate(self, platform):
        m = Module()
        index, negate = self.word[:-1], self.word[-1]
        m.submodules.weight = weight = PlaneWeight(
            number=self._entry, planes=self._planes, accumulator=self._accumulator
        )
        m.d.comb += [
            weight.a.eq(select(m, self.table, index, self._entry.width)),
            weight.plane.eq(self.plane),
        ]
        if isinstance(self._entry, FloatFormat):
            m.d.comb += self.o.eq(Cat(weight.o[:-1], weight.o[-1] ^ negate))
        else:
            m.d.comb += [self.o.eq(weight.o ^ negate.replicate(len(self.o))), self.carry.eq(negate)]
        return m


def select(m, table, index, width):
    """A word of a table, through a multiplexer."""
    word = Signal(width, name="entry")
    with m.Switch(index):
        for i in range(1 << len(index)):
            with m.Case(i):
                m.d.comb += word.eq(table.word_select(i, width))
    return word


class _TableArray(wiring.Component):
    """The tables of M rows, and the M*N units that read them."""

    def __init__(self, *, m, n, k, weight_bits, entry, accumulator, more=None):
        assert k >= 2 and 1 <= weight_bits <= 1 << PLANE_BITS, (k, weight_bits)
        self._m, self._n, self._k, self._planes = m, n, k, weight_bits
        self._entry, self._accumulator = entry, accumulator
        super().__init__(
            {
                "load": In(m),
                "tables": In(m * (1 << k - 1) * entry.width),
                "swap": In(1),
                **common_ports(m, n, accumulator),
                "plane": In(PLANE_BITS),
                "words": In(n * k),
                **(more or {}),
            }
        )

    def _read(self, m, accumulator):
        """The registered addends and carries [M*N] of the operands of the last tick, and their format."""
        stored = widened(self._entry, accumulator)
        entries = 1 << self._k - 1
        check_tile(m, self)
        with m.If(self.valid):
            m.d.sync += Assert(self.plane < self._planes, "the weights have no such plane")
        addends = []
        for row in range(self._m):
            offered = self.tables.word_select(row, entries * self._entry.width)
            if stored != self._entry:
                words = []
                for i in range(entries):
                    m.submodules[f"widen_{row}_{i}"] = unit = FpConvert(source=self._entry, result=stored)
                    m.d.comb += unit.a.eq(offered.word_select(i, self._entry.width))
                    words.append(unit.o)
                offered = Cat(words)
            spare = Signal(entries * stored.width, name=f"spare_{row}")
            table = Signal(entries * stored.width, name=f"table_{row}")
            with m.If(self.load[row]):
                m.d.sync += spare.eq(offered)
            with m.If(self.swap):
                m.d.sync += table.eq(spare)
            for column in range(self._n):
                name = f"{row}_{column}"
                m.submodules[f"unit_{name}"] = unit = LutUnit(
                    k=self._k, planes=self._planes, entry=stored, accumulator=accumulator
                )
                m.d.comb += [
                    unit.table.eq(table),
                    unit.word.eq(self.words.word_select(column, self._k)),
                    unit.plane.eq(self.plane),
                ]
                addends.append(
                    (delayed(m, unit.o, 1, f"addend_{name}"), delayed(m, unit.carry, 1, f"carry_{name}"))
                )
        return addends, weighted(stored, self._planes, accumulator)


class LutArray(_TableArray):
    r"""psum + a . q' for M rows and N columns: each tick, one bit plane of one group of K input channels.

    In each tick with `valid`, accumulator [m, n] becomes acc + (+-T_m[index_n]) * 2**plane, without bubbles
    between planes, groups or tiles. Integers wrap. A float sum is rounded once, in the accumulator's format;
    the weighted entry is exact but for an overflow, which gives infinity.

    A set of tables is written into the spare registers while another one is in use; with `swap` it serves
    from the next tick on, and the spare registers may be written in the same tick. Latency 2 ticks: the
    addend is registered, then the sum.

        clk     _/~\_/~\_/~\_/~\_/~\_/~\_
        load    _/~~~\___________________
        swap    _____/~~~\_______________     the tables of the tick before
        valid   _________/~~~~~~~\_______     two planes
        first   _________/~~~\___________
        last    _____________/~~~\_______
        take    _____________/~~~\_______     psum is read
        done    _____________________/~~~     result stands until the next tile's first sum

    Parameters
    ----------
    m, n, k : int
        Rows, columns, and channels of a group.
    weight_bits : int
        Most planes a weight has, 1..4.
    entry : Shape or FloatFormat
        Format of the tables (`precompute.entry_format`): a signed integer, or FP16.
    accumulator : Shape or FloatFormat
        Format of psum and result: a signed integer, FP16 or FP32.

    Members
    -------
    ====== === ========================== ====================================================================
    load   In  m                          the rows whose spare tables are written
    tables In  m * 2**(k-1) * entry.width tables of all rows, row 0 and its entry 0 in the lowest bits
    swap   In  1                          the spare tables of all rows serve from the next tick on
    valid  In  1                          plane and words hold operands
    first  In  1                          with valid: the tile's first operands; they start from psum
    last   In  1                          with valid: the tile's last operands
    plane  In  PLANE_BITS                 which plane the words are; below weight_bits
    words  In  n * k                      coded weight groups, column 0 in the lowest bits (see `LutUnit`)
    take   Out 1                          psum is read in this tick, latency - 1 ticks after first
    psum   In  m * n * accumulator.width  partial sums, row 0 and its column 0 in the lowest bits
    done   Out 1                          result is complete, latency ticks after last
    result Out m * n * accumulator.width  the accumulators, in the order of psum
    ====== === ========================== ====================================================================
    """

    latency = 2

    def __init__(
        self,
        *,
        m: int,
        n: int,
        k: int,
        weight_bits: int,
        entry: Shape | FloatFormat,
        accumulator: Shape | FloatFormat,
    ):
        super().__init__(m=m, n=n, k=k, weight_bits=weight_bits, entry=entry, accumulator=accumulator)

    def elaborate(self, platform):
        m = Module()
        addends, addend = self._read(m, self._accumulator)
        marks = {name: delayed(m, getattr(self, name), 1, name) for name in ("valid", "first", "last")}
        accumulators(m, self, self._accumulator, addend, addends, **marks)
        return m


class ScaleInteger(wiring.Component):
    """An integer times a float, rounded once to the float's format: to nearest, ties to even.

    Latency 0. If the format holds the integer exactly, it is the product of two floats, on a smaller
    multiplier.

    Parameters
    ----------
    width : int
        Bits of the integer's magnitude.
    format : FloatFormat
        Format of scale and product, one with infinity.

    Members
    -------
    ========= === ============ ================================================
    sign      In  1            the integer is negative
    magnitude In  width        its absolute value
    scale     In  format.width the float
    o         Out format.width the product; NaN if one is zero and one infinite
    ========= === ============ ================================================
    """

    def __init__(self, *, width: int, format: FloatFormat):
        assert format.has_inf, format
        self._format = format
        super().__init__(
            {"sign": In(1), "magnitude": In(width), "scale": In(format.width), "o": Out(format.width)}
        )

    @shared
    def elaborate(self, platform):
        m = Module()
        fmt, bits = self._format, len(self.magnitude)
        mantissa, field = self.scale[: fmt.mantissa_bits], self.scale[fmt.mantissa_bits : -1]
        top = (1 << fmt.exponent_bits) - 1
        m.submodules.round = rounding = FpRound(
            width=bits + fmt.precision, exponents=(1 + bits, top + bits), result=fmt
        )
        sign, nan = Signal(), Signal()
        m.d.comb += [
            sign.eq(self.sign ^ self.scale[-1]),
            nan.eq(field.all() & (mantissa.any() | ~self.magnitude.any())),
            rounding.sign.eq(sign),
            # A subnormal has the exponent of the smallest normal number, and no hidden bit.
            rounding.exponent.eq(Mux(field.any(), field, 1) + bits),
            rounding.significand.eq(self.magnitude * Cat(mantissa, field.any())),
            self.o.eq(
                Mux(
                    nan,
                    fmt.nan,
                    Mux(field.all(), Cat(Const(fmt.overflow, fmt.width - 1), sign), rounding.o),
                )
            ),
        ]
        return m


class QuantisedLutArray(_TableArray):
    """psum + sum over blocks of (sum of the block) * scale, for tables of int8.

    A block is one group or several, the end of which `close` marks. Its planes and groups are summed exactly,
    as integers, and FP32 holds the sum exactly. Then acc = acc + sum * scale in FP32: product and sum each
    rounded. One plane a tick, without bubbles, and with blocks of any length from one tick on. Latency 5
    ticks: addend, integer sum, conversion to sign and magnitude, product, sum. Tables are loaded as in
    `LutArray`.

    Parameters
    ----------
    m, n, k : int
        Rows, columns, and channels of a group.
    weight_bits : int
        Most planes a weight has, 1..4.
    block : int
        Most groups of a block; 128 * (2**weight_bits - 1) * block is at most 2**24.

    Members
    -------
    ====== === ================== ============================================================================
    load   In  m                  the rows whose spare tables are written
    tables In  m * 2**(k-1) * 8   tables of all rows, row 0 and its entry 0 in the lowest bits
    swap   In  1                  the spare tables of all rows serve from the next tick on
    valid  In  1                  plane and words hold operands
    first  In  1                  with valid: the tile's first operands
    last   In  1                  with valid: the tile's last operands, which close a block
    close  In  1                  with valid: the block's last operands
    scales In  m * 32             with close: scale of the block in each row, FP32, row 0 in the lowest bits
    plane  In  PLANE_BITS         which plane the words are; below weight_bits
    words  In  n * k              coded weight groups, column 0 in the lowest bits (see `LutUnit`)
    take   Out 1                  psum is read in this tick, latency - 1 ticks after the tile's first close
    psum   In  m * n * 32         partial sums, FP32, row 0 and its column 0 in the lowest bits
    done   Out 1                  result is complete, latency ticks after last
    result Out m * n * 32         the accumulators, in the order of psum
    ====== === ================== ============================================================================
    """

    latency = 5

    def __init__(self, *, m: int, n: int, k: int, weight_bits: int, block: int):
        entry = signed(8)
        largest = (1 << entry.width - 1) * ((1 << weight_bits) - 1) * block
        assert block >= 1 and largest <= 1 << FP32.precision, (weight_bits, block)
        self._sum = signed(1 + bits_for(largest))
        more = {"close": In(1), "scales": In(m * FP32.width)}
        super().__init__(m=m, n=n, k=k, weight_bits=weight_bits, entry=entry, accumulator=FP32, more=more)

    def elaborate(self, platform):
        m = Module()
        with m.If(self.valid):
            m.d.sync += Assert(self.close | ~self.last, "a tile must end with a block")
        addends, addend = self._read(m, self._sum)
        valid, first, last, close = (
            delayed(m, getattr(self, name), 1, name) for name in ("valid", "first", "last", "close")
        )
        # Whether the sum is under way, and whether it is the one that the tile began with.
        under_way, opening = Signal(), Signal()
        with m.If(valid):
            m.d.sync += [under_way.eq(~close), opening.eq((first | opening) & ~close)]
        marks = {
            "valid": delayed(m, valid & close, 3, "closed"),
            "first": delayed(m, first | opening, 3, "opened"),
            "last": delayed(m, last, 3, "ended"),
        }
        scales = delayed(m, self.scales, 3, "scales")
        products = []
        for i, (value, carry) in enumerate(addends):
            m.submodules[f"sum_{i}"] = add = Accumulate(accumulator=self._sum, addend=addend)
            m.submodules[f"scale_{i}"] = multiply = ScaleInteger(width=self._sum.width - 1, format=FP32)
            total = Signal(self._sum, name=f"sum_{i}")
            # The least integer has no magnitude here, but is no sum either.
            magnitude = Signal(self._sum.width - 1, name=f"magnitude_{i}")
            m.d.sync += magnitude.eq(Mux(total[-1], -total, total))
            m.d.comb += [
                add.a.eq(Mux(under_way, total, 0)),
                add.b.eq(value),
                add.carry.eq(carry),
                multiply.sign.eq(delayed(m, total[-1], 1, f"sign_{i}")),
                multiply.magnitude.eq(magnitude),
                multiply.scale.eq(scales.word_select(i // self._n, FP32.width)),
            ]
            with m.If(valid):
                m.d.sync += total.eq(add.o)
            products.append((delayed(m, multiply.o, 1, f"product_{i}"), Const(0, 1)))
        accumulators(m, self, FP32, FP32, products, **marks)
        return m
