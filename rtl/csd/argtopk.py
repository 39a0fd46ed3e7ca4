"""The argtopk unit: which of many keys are the largest, by counting comparisons."""

from amaranth.hdl import Assert, Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.csd import KEY_BITS
from tilewright.arch.formats import FP16
from tilewright.rtl.lib.sram import Sram

__all__ = ["ArgTopK", "tree_sum"]


def tree_sum(values):
    """The integer sum of values, in pairs."""
    values = list(values)
    while len(values) > 1:
        values = [a + b for a, b in zip(values[0::2], values[1::2], strict=False)] + values[
            len(values) & ~1 :
        ]
    return values[0]


class ArgTopK(wiring.Component):
    """Selects the `take` largest of `n` unsigned keys, the last `local` of them above all others; of equal keys
    those at the lowest positions.

    Keys are written word by word beforehand. A pass over them counts those that reach a candidate, the threshold
    with one more bit set; the bit stays if there are enough. The last candidate that was refused is the threshold
    plus one, so that its count says how many equal keys are left to take.

    The mask's first word comes `argtopk_ticks` minus the number of words, plus one, after `start`, the others in the
    ticks that follow; see `arch.csd.argtopk_ticks`. A unit has neither multipliers nor a state that depends on the
    keys, so neither does its time.

    Parameters
    ----------
    lanes : int
        Keys of a word, a power of two.
    keys : int
        Keys that it holds, a multiple of `lanes`.

    Members
    -------
    ============= === ============== ==============================================================
    write_enable  In  1              a word of keys is written, not while `busy`
    write_address In  range(words)
    write_data    In  lanes * 16     its keys, the first one lowest
    start         In  1              begin, not while `busy`
    n, take, local In range(keys + 1) 1 <= n, take; sampled with `start`
    busy          Out 1              a search is under way
    valid         Out 1              `mask` holds a word
    index         Out range(words)   which word
    mask          Out lanes          selected keys; none beyond n
    last          Out 1              it is the last one
    compares      Out 1              a word of keys is compared in this tick
    ============= === ============== ==============================================================
    """

    def __init__(self, *, lanes: int, keys: int):
        assert lanes & lanes - 1 == 0 and keys % lanes == 0, (lanes, keys)
        self._lanes, self._words = lanes, keys // lanes
        count, index = bits_for(keys), bits_for(self._words - 1)
        super().__init__(
            {
                "write_enable": In(1),
                "write_address": In(index),
                "write_data": In(lanes * FP16.width),
                "start": In(1),
                "n": In(count),
                "take": In(count),
                "local": In(count),
                "busy": Out(1),
                "valid": Out(1),
                "index": Out(index),
                "mask": Out(lanes),
                "last": Out(1),
                "compares": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        lanes, place = self._lanes, self._lanes.bit_length() - 1
        m.submodules.keys = memory = Sram(width=lanes * FP16.width, depth=self._words)
        n, take, near = (
            Signal.like(self.n),
            Signal.like(self.n),
            Signal.like(self.n),
        )  # near: the first local key
        word = Signal(len(self.index) + 1)  # to be read in this tick; one behind the last: nothing is
        bit = Signal(range(KEY_BITS + 1), init=KEY_BITS)  # KEY_BITS - 1 - bit is the one in question
        words = Signal.like(word)
        arrived, arrived_word = Signal(), Signal(len(self.index))
        threshold, candidate = Signal(KEY_BITS), Signal(KEY_BITS)
        count, above = Signal.like(self.n), Signal.like(self.n)
        selecting, ends = Signal(), Signal()
        m.d.comb += [
            words.eq((n + lanes - 1) >> place),
            ends.eq(word == words),
            selecting.eq(bit == KEY_BITS),
            memory.write_enable.eq(self.write_enable),
            memory.write_address.eq(self.write_address),
            memory.write_data.eq(self.write_data),
            memory.read_enable.eq(self.busy & ~ends),
            memory.read_address.eq(word),
            candidate.eq(threshold | (1 << (KEY_BITS - 1)) >> bit),
            self.compares.eq(arrived),
        ]
        m.d.sync += [arrived.eq(memory.read_enable), arrived_word.eq(word)]

        # The word read one tick ago.
        reach, beyond, equal = [], [], []
        for lane in range(lanes):
            position, key = Signal.like(self.n, name=f"position_{lane}"), Signal(KEY_BITS, name=f"key_{lane}")
            m.d.comb += [
                position.eq((arrived_word << place) + lane),
                key.eq(Cat(memory.read_data.word_select(lane, FP16.width), position >= near)),
            ]
            inside = position < n
            reach.append(inside & (key >= candidate))
            beyond.append(inside & (key > threshold))
            equal.append(inside & (key == threshold))
        reached = Signal.like(self.n)
        m.d.comb += reached.eq(count + tree_sum(reach))

        # Of equal keys as many as are left, from the lowest position up.
        left = Signal.like(self.n)
        ties = Signal(lanes)
        before = 0
        for lane in range(lanes):
            m.d.comb += ties[lane].eq(equal[lane] & (before < left))
            rank = Signal(range(lanes + 1), name=f"rank_{lane}")
            m.d.comb += rank.eq(before + equal[lane])
            before = rank
        m.d.comb += [
            self.valid.eq(arrived & selecting),
            self.index.eq(arrived_word),
            self.mask.eq(Cat(beyond) | ties),
            self.last.eq(self.valid & (arrived_word == words - 1)),
        ]

        with m.If(self.busy):
            m.d.sync += word.eq(Mux(ends, 0, word + 1))
            with m.If(arrived & ~selecting):
                m.d.sync += count.eq(reached)
            with m.If(self.valid):
                m.d.sync += left.eq(left - tree_sum(ties))
            # The last word of a pass arrives while none is read.
            with m.If(ends & ~selecting):
                m.d.sync += [count.eq(0), bit.eq(bit + 1)]
                with m.If(reached >= take):
                    m.d.sync += threshold.eq(candidate)
                with m.Else():
                    m.d.sync += above.eq(reached)
                with m.If(bit == KEY_BITS - 1):
                    m.d.sync += left.eq(take - Mux(reached >= take, above, reached))
            with m.If(self.last):
                m.d.sync += [self.busy.eq(0), word.eq(0)]
        with m.If(self.start):
            m.d.sync += [
                self.busy.eq(1),
                n.eq(self.n),
                take.eq(self.take),
                near.eq(Mux(self.local < self.n, self.n - self.local, 0)),
                *(s.eq(0) for s in (word, bit, threshold, count, above)),
            ]
        m.d.sync += Assert(~(self.busy & (self.start | self.write_enable)), "argtopk is disturbed")
        return m
