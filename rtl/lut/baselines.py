"""The arrays that the table array is compared with: multipliers, bit-serial adders, and unshared full tables.

All have the tile protocol of `LutArray`, take K input channels of M rows and N columns in a tick, and have
registers in the same places: the addend is registered before the accumulator; on the way to it an integer
takes one tick (a table of its own one more), and floats one operation a tick.

Units share no hardware but the conversion of FP8 activations. Their modules are shared in Verilog, so
synthesise without flattening: a flat netlist would merge what the units of a row do alike.
"""

from amaranth.hdl import Assert, Cat, Const, Module, Mux, Shape, Signal, Value, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from tilewright.arch.formats import FP16, FloatFormat
from tilewright.rtl.lib.fp import FpAdd, FpConvert, FpMultiply
from tilewright.rtl.lib.share import shared
from tilewright.rtl.lut.array import (
    PLANE_BITS,
    PlaneWeight,
    accumulators,
    check_tile,
    common_ports,
    delayed,
    select,
    weighted,
    widened,
)

__all__ = ["AddArray", "ConventionalLutArray", "MacArray"]


def sum_format(activation: Shape | FloatFormat, k: int) -> Shape | FloatFormat:
    """What holds the sum of any selection of k activations: an integer type, or FP16."""
    if isinstance(activation, FloatFormat):
        return FP16
    return signed(activation.width + ceil_log2(k))


def _elements(m, bits, k, activation, name):
    """The k activations of a row; floats as FP16, exactly."""
    elements = []
    for i in range(k):
        element = bits.word_select(i, activation.width)
        if isinstance(activation, FloatFormat):
            m.submodules[f"convert_{name}_{i}"] = unit = FpConvert(source=activation, result=FP16)
            m.d.comb += unit.a.eq(element)
            element = unit.o
        elements.append(element)
    return elements


def _where(bit: Value, element: Value) -> Value:
    return element & bit.replicate(len(element))


def _registered(m, value, name):
    return delayed(m, value, 1, name)


def _tree(terms: list[Value]) -> Value:
    """Sum of integers as a balanced tree."""
    while len(terms) > 1:
        pairs = zip(terms[0::2], terms[1::2], strict=False)
        terms = [a + b for a, b in pairs] + terms[len(terms) & ~1 :]
    return terms[0]


class _ActivationArray(wiring.Component):
    """An array that takes activations, not tables."""

    def __init__(self, *, m, n, k, activation, accumulator, more):
        self._m, self._n, self._k = m, n, k
        self._activation, self._accumulator = activation, accumulator
        self._float = isinstance(activation, FloatFormat)
        assert self._float == isinstance(accumulator, FloatFormat), (activation, accumulator)
        super().__init__(
            {**common_ports(m, n, accumulator), "activations": In(m * k * activation.width), **more}
        )

    def _rows(self, m):
        size = self._k * self._activation.width
        return [
            _elements(m, self.activations.word_select(row, size), self._k, self._activation, str(row))
            for row in range(self._m)
        ]

    def _accumulate(self, m, addend, addends):
        check_tile(m, self)
        marks = {
            name: delayed(m, getattr(self, name), self.latency - 1, name)
            for name in ("valid", "first", "last")
        }
        accumulators(m, self, self._accumulator, addend, [(a, Const(0, 1)) for a in addends], **marks)


class _DotProduct(wiring.Component):
    """Sum of k products of integers, exact. Latency 0."""

    def __init__(self, *, k: int, activation: Shape, weight: Shape):
        self._k, self._activation, self._weight = k, activation, weight
        width = activation.width + weight.width + ceil_log2(k)
        super().__init__({"a": In(k * activation.width), "w": In(k * weight.width), "o": Out(width)})

    @shared
    def elaborate(self, platform):
        m = Module()
        terms = [
            self.a.word_select(i, self._activation.width).as_signed()
            * self.w.word_select(i, self._weight.width).as_signed()
            for i in range(self._k)
        ]
        m.d.comb += self.o.eq(_tree(terms))
        return m


class MacArray(_ActivationArray):
    """psum + a . w on multipliers: K products for each row and column in a tick.

    Integers are exact, and wrap in the accumulator; latency 2 ticks. Floats: products are rounded to the
    accumulator's format (exact in FP32), summed as a balanced tree of adjacent pairs, (p0 + p1) + (p2 + p3),
    and the sum added to the accumulator, each step rounded; latency 2 + log2(K) ticks.

    Parameters
    ----------
    m, n, k : int
        Rows, columns, and products of a unit; k is a power of two for floats.
    activation, weight : Shape or FloatFormat
        Formats of the operands: signed integers, or the same float format.
    accumulator : Shape or FloatFormat
        Format of psum and result: a signed integer, or a float format.

    Members
    -------
    =========== === ========================= ================================================================
    valid       In  1                         activations and weights hold operands
    first, last In  1                         with valid: the tile's first, and last, operands
    activations In  m * k * activation.width  row 0 and its element 0 in the lowest bits
    weights     In  n * k * weight.width      column 0 and its element 0 in the lowest bits
    take        Out 1                         psum is read in this tick, latency - 1 ticks after first
    psum        In  m * n * accumulator.width partial sums, row 0 and its column 0 in the lowest bits
    done        Out 1                         result is complete, latency ticks after last
    result      Out m * n * accumulator.width the accumulators, in the order of psum
    =========== === ========================= ================================================================
    """

    def __init__(
        self,
        *,
        m: int,
        n: int,
        k: int,
        activation: Shape | FloatFormat,
        weight: Shape | FloatFormat,
        accumulator: Shape | FloatFormat,
    ):
        self._weight = weight
        if isinstance(activation, FloatFormat):
            assert weight == activation, (activation, weight)
            assert k & k - 1 == 0, k
            self.latency = 2 + ceil_log2(k)
        else:
            self.latency = 2
        more = {"weights": In(n * k * weight.width)}
        super().__init__(m=m, n=n, k=k, activation=activation, accumulator=accumulator, more=more)

    def elaborate(self, platform):
        m = Module()
        k, addends = self._k, []
        for row in range(self._m):
            a = self.activations.word_select(row, k * self._activation.width)
            for column in range(self._n):
                w = self.weights.word_select(column, k * self._weight.width)
                unit = self._float_unit if self._float else self._integer_unit
                addends.append(unit(m, a, w, f"{row}_{column}"))
        addend = self._accumulator if self._float else signed(len(addends[0]))
        self._accumulate(m, addend, addends)
        return m

    def _integer_unit(self, m, a, w, name):
        m.submodules[f"unit_{name}"] = unit = _DotProduct(
            k=self._k, activation=self._activation, weight=self._weight
        )
        m.d.comb += [unit.a.eq(a), unit.w.eq(w)]
        return _registered(m, unit.o, f"addend_{name}")

    def _float_unit(self, m, a, w, name):
        width = self._activation.width
        level = []
        for i in range(self._k):
            m.submodules[f"multiply_{name}_{i}"] = unit = FpMultiply(
                source=self._activation, result=self._accumulator
            )
            m.d.comb += [unit.a.eq(a.word_select(i, width)), unit.b.eq(w.word_select(i, width))]
            level.append(_registered(m, unit.o, f"product_{name}_{i}"))
        while len(level) > 1:
            sums = []
            for i in range(0, len(level), 2):
                path = f"{name}_{len(level)}_{i}"
                m.submodules[f"add_{path}"] = unit = FpAdd(format=self._accumulator)
                m.d.comb += [unit.a.eq(level[i]), unit.b.eq(level[i + 1])]
                sums.append(_registered(m, unit.o, f"sum_{path}"))
            level = sums
        return level[0]


class _PlaneArray(_ActivationArray):
    """An array that reads weights bit plane by bit plane."""

    def __init__(self, *, m, n, k, weight_bits, activation, accumulator):
        assert k >= 2 and 1 <= weight_bits <= 1 << PLANE_BITS, (k, weight_bits)
        self._planes = weight_bits
        more = {"plane": In(PLANE_BITS), "words": In(n * k)}
        super().__init__(m=m, n=n, k=k, activation=activation, accumulator=accumulator, more=more)
        self._total = sum_format(activation, k)

    def elaborate(self, platform):
        m = Module()
        with m.If(self.valid):
            m.d.sync += Assert(self.plane < self._planes, "the weights have no such plane")
        rows = self._rows(m)
        plane = delayed(m, self.plane, self.latency - 2, "plane")
        addends = []
        for row, elements in enumerate(rows):
            for column in range(self._n):
                name = f"{row}_{column}"
                total = self._sum(m, elements, self.words.word_select(column, self._k), name)
                number = widened(self._total, self._accumulator)
                if number != self._total:
                    m.submodules[f"widen_{name}"] = widen = FpConvert(source=self._total, result=number)
                    m.d.comb += widen.a.eq(total)
                    total = widen.o
                m.submodules[f"weight_{name}"] = unit = PlaneWeight(
                    number=number, planes=self._planes, accumulator=self._accumulator
                )
                m.d.comb += [unit.a.eq(total), unit.plane.eq(plane)]
                addends.append(_registered(m, unit.o, f"addend_{name}"))
        self._accumulate(m, weighted(self._total, self._planes, self._accumulator), addends)
        return m


class _SelectedSum(wiring.Component):
    """Sum of the integers that a word selects, exact, as a tree. Latency 0."""

    def __init__(self, *, k: int, activation: Shape):
        self._k, self._activation = k, activation
        width = sum_format(activation, k).width
        super().__init__({"a": In(k * activation.width), "word": In(k), "o": Out(width)})

    @shared
    def elaborate(self, platform):
        m = Module()
        width = self._activation.width
        terms = [_where(self.word[i], self.a.word_select(i, width)).as_signed() for i in range(self._k)]
        m.d.comb += self.o.eq(_tree(terms))
        return m


class AddArray(_PlaneArray):
    """psum + a . q, bit-serially and without a table: each bit of a plane adds its activation, or nothing.

    Codes are unsigned, so that no plane is negative: a two's-complement weight W = q - 2**(b-1) is a code
    with the zero point 2**(b-1), as it is for the table array.

    Integers are exact, and wrap in the accumulator; latency 2 ticks. Floats: activations become FP16,
    exactly, and are summed in FP16, elements in order, +0 for one that is not selected; the sum is weighted
    as a table entry is, and added to the accumulator, each step rounded; latency K + 1 ticks.

    Parameters
    ----------
    m, n, k : int
        Rows, columns, and bits of a weight group.
    weight_bits : int
        Most planes a weight has, 1..4.
    activation : Shape or FloatFormat
        Format of the activations: a signed integer, or a float format that FP16 contains.
    accumulator : Shape or FloatFormat
        Format of psum and result: a signed integer, or FP16 or FP32.

    Members
    -------
    =========== === ========================= ================================================================
    valid       In  1                         activations, plane and words hold operands
    first, last In  1                         with valid: the tile's first, and last, operands
    activations In  m * k * activation.width  row 0 and its element 0 in the lowest bits, in every plane
    plane       In  PLANE_BITS                which plane the words are; below weight_bits
    words       In  n * k                     one plane of the codes, column 0, element 0 in the lowest bits
    take        Out 1                         psum is read in this tick, latency - 1 ticks after first
    psum        In  m * n * accumulator.width partial sums, row 0 and its column 0 in the lowest bits
    done        Out 1                         result is complete, latency ticks after last
    result      Out m * n * accumulator.width the accumulators, in the order of psum
    =========== === ========================= ================================================================
    """

    def __init__(
        self,
        *,
        m: int,
        n: int,
        k: int,
        weight_bits: int,
        activation: Shape | FloatFormat,
        accumulator: Shape | FloatFormat,
    ):
        self.latency = k + 1 if isinstance(activation, FloatFormat) else 2
        super().__init__(
            m=m, n=n, k=k, weight_bits=weight_bits, activation=activation, accumulator=accumulator
        )

    def _sum(self, m, elements, word, name):
        if not self._float:
            m.submodules[f"sum_{name}"] = unit = _SelectedSum(k=self._k, activation=self._activation)
            m.d.comb += [unit.a.eq(Cat(elements)), unit.word.eq(word)]
            return unit.o
        total = _where(word[0], elements[0])
        for i in range(1, self._k):
            # Each unit delays its own operands: they meet the sum one addition later.
            element = delayed(m, _where(word[i], elements[i]), i - 1, f"element_{name}_{i}")
            m.submodules[f"add_{name}_{i}"] = unit = FpAdd(format=FP16)
            m.d.comb += [unit.a.eq(total), unit.b.eq(element)]
            total = _registered(m, unit.o, f"sum_{name}_{i}")
        return total


class _SubsetSums(wiring.Component):
    """Every sum of a selection of k integers, exact, each with one addition. Latency 0."""

    def __init__(self, *, k: int, activation: Shape):
        self._k, self._activation = k, activation
        self._sum_width = sum_format(activation, k).width
        super().__init__({"a": In(k * activation.width), "o": Out((1 << k) * self._sum_width)})

    @shared
    def elaborate(self, platform):
        m = Module()
        sums = [Const(0, signed(self._sum_width))]
        for i in range(self._k):
            element = self.a.word_select(i, self._activation.width).as_signed()
            for j in range(1 << i):
                total = Signal(signed(self._sum_width), name=f"sum_{j + (1 << i)}")
                m.d.comb += total.eq(sums[j] + element if j else element)
                sums.append(total)
        m.d.comb += self.o.eq(Cat(sums))
        return m


class ConventionalLutArray(_PlaneArray):
    """psum + a . q by full tables: every unit forms the 2**K sums of its activations itself, and reads one.

    No sign symmetry, no table of a row shared between columns, as in designs before LUT Tensor Core. Entry i
    is the sum of the a_k whose bit k of i is set. Codes are unsigned, as in `AddArray`.

    Integers are exact, and wrap in the accumulator; latency 3 ticks: table, weighted entry, sum. Floats: as
    in `AddArray`, with all sums formed at the same time; latency K + 1 ticks.

    Parameters
    ----------
    m, n, k : int
        Rows, columns, and bits of a weight group.
    weight_bits : int
        Most planes a weight has, 1..4.
    activation : Shape or FloatFormat
        Format of the activations: a signed integer, or a float format that FP16 contains.
    accumulator : Shape or FloatFormat
        Format of psum and result: a signed integer, or FP16 or FP32.

    Members
    -------
    =========== === ========================= ================================================================
    valid       In  1                         activations, plane and words hold operands
    first, last In  1                         with valid: the tile's first, and last, operands
    activations In  m * k * activation.width  row 0 and its element 0 in the lowest bits, in every plane
    plane       In  PLANE_BITS                which plane the words are; below weight_bits
    words       In  n * k                     one plane of the codes, column 0, element 0 in the lowest bits
    take        Out 1                         psum is read in this tick, latency - 1 ticks after first
    psum        In  m * n * accumulator.width partial sums, row 0 and its column 0 in the lowest bits
    done        Out 1                         result is complete, latency ticks after last
    result      Out m * n * accumulator.width the accumulators, in the order of psum
    =========== === ========================= ================================================================
    """

    def __init__(
        self,
        *,
        m: int,
        n: int,
        k: int,
        weight_bits: int,
        activation: Shape | FloatFormat,
        accumulator: Shape | FloatFormat,
    ):
        self.latency = k + 1 if isinstance(activation, FloatFormat) else 3
        super().__init__(
            m=m, n=n, k=k, weight_bits=weight_bits, activation=activation, accumulator=accumulator
        )

    def _sum(self, m, elements, word, name):
        if self._float:
            table, ticks = self._float_table(m, elements, name), self._k - 1
        else:
            m.submodules[f"sums_{name}"] = unit = _SubsetSums(k=self._k, activation=self._activation)
            m.d.comb += unit.a.eq(Cat(elements))
            table, ticks = _registered(m, unit.o, f"table_{name}"), 1
        return select(m, table, delayed(m, word, ticks, f"word_{name}"), self._total.width)

    def _float_table(self, m, elements, name):
        """One more element each tick; its sum with nothing needs no adder."""
        sums = [Const(0, FP16.width), elements[0]]
        for i in range(1, self._k):
            element = delayed(m, elements[i], i - 1, f"element_{name}_{i}")
            more = [_plus_zero(element)]
            for j, a in enumerate(sums[1:], 1):
                m.submodules[f"add_{name}_{i}_{j}"] = unit = FpAdd(format=FP16)
                m.d.comb += [unit.a.eq(a), unit.b.eq(element)]
                more.append(unit.o)
            sums = [
                _registered(m, total, f"sum_{name}_{i}_{j}")
                for j, total in enumerate([_plus_zero(a) for a in sums] + more)
            ]
        return Cat(sums)


def _plus_zero(a: Value) -> Value:
    """a + 0: the sum of the two zeros is +0."""
    return Mux(a[:-1].any(), a, 0)
