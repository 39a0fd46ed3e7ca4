"""Tables of signed sums: what one group of activations contributes to every column."""

from amaranth.hdl import Cat, Module, Shape, Signal, signed
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from tilewright.arch.formats import FP16, FloatFormat
from tilewright.rtl.lib.fp import FpAdd, FpConvert

__all__ = ["TablePrecompute", "entry_format", "negated"]


def entry_format(activation: Shape | FloatFormat, k: int) -> Shape | FloatFormat:
    """What holds every entry of an exact table and its negation: an integer type, or FP16.

    >>> entry_format(signed(8), 4)  # 4 times -128 with all signs equal is +512
    signed(11)
    """
    if isinstance(activation, FloatFormat):
        return FP16
    return signed(activation.width + ceil_log2(k) + 1)


def negated(half, index):
    """The sum for `index`, whose highest bit is the last element's, from the half in which that is negative.

    LUT[i] = -LUT[~i] (LUT Tensor Core, Eq 4 and 5). Returns the sum to read, and whether to negate it.
    """
    negate = index >= len(half)
    return half[len(half) * 2 - 1 - index if negate else index], negate


class TablePrecompute(wiring.Component):
    """The table of one group: entry i is the sum over k < K-1 of (a_k if bit k of i else -a_k) minus a_(K-1).

    One group a tick. Integers are exact, latency 1 tick: the halves of the group are summed first, and shared
    (12 additions for K = 4). Floats become FP16, exactly, and take K-1 additions in FP16, elements in order,
    the last one subtracted at the end: one addition a tick, latency K-1; sums that differ only in all signs
    are shared (14 additions for K = 4).

    Parameters
    ----------
    k : int
        Activations of a group, at least 2.
    activation : Shape or FloatFormat
        Type of the activations: a signed integer, or a format that FP16 contains.

    Members
    -------
    =========== === ======================== ================================================================
    valid       In  1                        a holds a group
    a           In  k * activation.width     the activations, element 0 in the lowest bits
    table_valid Out 1                        table holds the group that was taken `latency` ticks ago
    table       Out 2**(k-1) * entry.width   its entries, entry 0 in the lowest bits (`entry_format`)
    =========== === ======================== ================================================================
    """

    def __init__(self, *, k: int, activation: Shape | FloatFormat):
        assert k >= 2, k
        self._k, self._activation = k, activation
        self.entry = entry_format(activation, k)
        self.latency = k - 1 if isinstance(activation, FloatFormat) else 1
        super().__init__(
            {
                "valid": In(1),
                "a": In(k * activation.width),
                "table_valid": Out(1),
                "table": Out((1 << k - 1) * self.entry.width),
            }
        )

    def elaborate(self, platform):
        m = Module()
        elements = [self.a.word_select(i, self._activation.width) for i in range(self._k)]
        if isinstance(self._activation, FloatFormat):
            entries = self._float_sums(m, elements)
        else:
            leaves = [(a.as_signed(), True) for a in elements]
            leaves[-1] = (-elements[-1].as_signed(), False)
            entries = []
            for i, (total, negative) in enumerate(self._integer_sums(m, leaves, "sum")):
                assert not negative
                entry = Signal(self.entry, name=f"entry_{i}")
                m.d.sync += entry.eq(total)
                entries.append(entry)
        m.d.comb += self.table.eq(Cat(entries))

        valid = self.valid
        for tick in range(self.latency):
            later = Signal(name=f"valid_{tick}")
            m.d.sync += later.eq(valid)
            valid = later
        m.d.comb += self.table_valid.eq(valid)
        return m

    def _integer_sums(self, m, leaves, name):
        """The half in which the last element is negative: pairs of a value, and whether it stands negated.

        `leaves` are such pairs of each element negated. Only the last one must be negated in hardware.
        """
        if len(leaves) == 1:
            return leaves
        middle = len(leaves) // 2
        low = self._integer_sums(m, leaves[:middle], f"{name}_low")
        high = self._integer_sums(m, leaves[middle:], f"{name}_high")
        sums = []
        for i in range(1 << len(leaves) - 1):
            (a, minus_a), flip = negated(low, i % (1 << middle))
            b, minus_b = high[i >> middle]
            minus_a ^= flip
            value = a + b if minus_a == minus_b else b - a if minus_a else a - b
            total = Signal(value.shape(), name=f"{name}_{i}")
            m.d.comb += total.eq(value)
            sums.append((total, minus_a and minus_b))
        return sums

    def _float_sums(self, m, elements):
        converted = []
        for i, a in enumerate(elements):
            m.submodules[f"convert_{i}"] = unit = FpConvert(source=self._activation, result=FP16)
            m.d.comb += unit.a.eq(a)
            converted.append(unit.o)
        # Sums of the first elements, the last of these negative, and each time the sign of the negated sum.
        first, *rest = converted
        half = [(Cat(first[:-1], ~first[-1]), first[-1])]
        for j in range(1, self._k):
            a, *rest = rest
            minus_a = Cat(a[:-1], ~a[-1])
            sums = []
            for i in range(1 << j):
                (value, opposite), negate = negated(half, i)
                if negate:
                    value = Cat(value[:-1], opposite)
                m.submodules[f"add_{j}_{i}"] = unit = FpAdd(format=FP16)
                total = Signal(FP16.width, name=f"sum_{j}_{i}")
                sign = Signal(name=f"opposite_{j}_{i}")
                m.d.comb += [unit.a.eq(value), unit.b.eq(minus_a)]
                m.d.sync += [
                    total.eq(unit.o),
                    # x - x is +0, and so is -x + x.
                    sign.eq(~unit.o[-1] & (unit.o[:-1].any() | (unit.a[-1] == unit.b[-1]))),
                ]
                sums.append((total, sign))
            half = sums
            waiting = []
            for i, element in enumerate(rest):
                later = Signal(FP16.width, name=f"element_{j}_{j + 1 + i}")
                m.d.sync += later.eq(element)
                waiting.append(later)
            rest = waiting
        return [total for total, _ in half]
