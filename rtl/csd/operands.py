"""The operand buffer of an attention kernel: rows go in, rows or columns come out, a line a tick."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.formats import FP16
from tilewright.rtl.csd.argtopk import tree_sum
from tilewright.rtl.csd.memory import store

__all__ = ["OperandBuffer", "compress", "rotate"]


def rotate(m, values, turn, *, back=False):
    """The values moved `turn` places up, around the end; `back`: down. For a power of two of them."""
    values = list(values)
    for bit in range(len(values).bit_length() - 1):
        step = -(1 << bit) if back else 1 << bit
        moved = []
        for i, value in enumerate(values):
            out = Signal(len(value), name=f"{'back' if back else 'turned'}_{bit}_{i}")
            m.d.comb += out.eq(Mux(turn[bit], values[(i - step) % len(values)], value))
            moved.append(out)
        values = moved
    return values


def compress(m, mask, values):
    """The values whose mask bit is set, side by side from place 0 on; and which places are filled."""
    n = len(values)
    before = [tree_sum([*mask[:i]]) if i else 0 for i in range(n)]
    packed, filled = [], []
    for place in range(n):
        out = 0
        hits = [mask[i] & (before[i] == place) for i in range(place, n)]
        for hit, value in zip(hits, values[place:], strict=True):
            out = out | Mux(hit, value, 0)
        value = Signal(len(values[0]), name=f"packed_{place}")
        m.d.comb += value.eq(out)
        packed.append(value)
        filled.append(Cat(*hits).any())
    return packed, filled


class OperandBuffer(wiring.Component):
    """Rows of FP16 in `lanes` banks, skewed so that a line of a row, and a column of neighbouring rows, lie in
    different banks.

    Element e of row i is in bank (e + i) mod lanes at line i * stride + e // lanes. An access takes `lanes` places:

        row     place j is element w * lanes + j of row i:  line i * stride + w, turn i
        column  place j is element e of row i + j:          line i * stride + e // lanes, turn i + e

    What is written are the elements with a mask bit, side by side from place 0 on: a token's chosen channels become
    a column of the channels' rows. Latency 1. A read in the tick of a write to the same element gives the old one.

    Parameters
    ----------
    lanes : int
        A power of two.
    lines : int
        Of the buffer, of `lanes` elements each.
    black_box : bool
        The banks are outside of the netlist.

    Members
    -------
    ============ === ============ =============================================================
    stride       In  range(lines) lines of a row
    write        In  1
    write_column In  1            the places are a column
    write_line   In  range(lines) of place 0
    write_turn   In  range(lanes) mod `lanes`
    write_mask   In  lanes
    write_data   In  lanes * 16
    read         In  1
    read_column  In  1
    read_line    In  range(lines)
    read_turn    In  range(lanes)
    read_data    Out lanes * 16   places of the read one tick ago; beyond the buffer without meaning
    ============ === ============ =============================================================
    """

    def __init__(self, *, lanes: int, lines: int, black_box: bool = False):
        assert lanes >= 2 and lanes & lanes - 1 == 0, lanes
        self._lanes, self._lines, self._black_box = lanes, lines, black_box
        line, turn = bits_for(lines - 1), bits_for(lanes - 1)
        ports = {}
        for access in ("write", "read"):
            ports |= {
                access: In(1),
                f"{access}_column": In(1),
                f"{access}_line": In(line),
                f"{access}_turn": In(turn),
            }
        data = lanes * FP16.width
        super().__init__(
            {
                "stride": In(line),
                **ports,
                "write_mask": In(lanes),
                "write_data": In(data),
                "read_data": Out(data),
            }
        )

    def elaborate(self, platform):
        m = Module()
        lanes, width = self._lanes, FP16.width
        steps = [Signal.like(self.stride, name=f"step_{j}") for j in range(lanes)]
        m.d.comb += [step.eq(j * self.stride) for j, step in enumerate(steps)]

        def addresses(access):
            column, line = getattr(self, f"{access}_column"), getattr(self, f"{access}_line")
            places = [Signal.like(line, name=f"{access}_place_{j}") for j in range(lanes)]
            m.d.comb += [
                place.eq(line + Mux(column, step, 0)) for place, step in zip(places, steps, strict=True)
            ]
            return places

        values = [self.write_data.word_select(j, width) for j in range(lanes)]
        packed, filled = compress(m, self.write_mask, values)
        written = [Cat(v, f, a) for v, f, a in zip(packed, filled, addresses("write"), strict=True)]
        written = rotate(m, written, self.write_turn)
        asked = rotate(m, addresses("read"), self.read_turn)
        found = []
        for b in range(lanes):
            m.submodules[f"bank_{b}"] = bank = store(
                black_box=self._black_box, width=width, depth=self._lines
            )
            # A column at the buffer's end may reach beyond it with places that nobody uses.
            inside = asked[b] < self._lines
            m.d.comb += [
                bank.write_enable.eq(self.write & written[b][width]),
                bank.write_data.eq(written[b][:width]),
                bank.write_address.eq(written[b][width + 1 :]),
                bank.read_enable.eq(self.read & inside),
                bank.read_address.eq(asked[b]),
            ]
            found.append(bank.read_data)
        turned = Signal.like(self.read_turn)
        with m.If(self.read):
            m.d.sync += turned.eq(self.read_turn)
        m.d.comb += self.read_data.eq(Cat(rotate(m, found, turned, back=True)))
        return m
