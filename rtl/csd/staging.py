"""The group buffer: the last two token-indexed groups of every slot, and the sums of the slots' values."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.csd import CsdParams
from tilewright.arch.formats import FP16, FP32
from tilewright.rtl.csd.memory import store
from tilewright.rtl.lib.fp import FpAdd, FpConvert
from tilewright.rtl.pim.asic_lane import delay

__all__ = ["GroupBuffer", "staged_layout", "sum_layout"]


def staged_layout(p: CsdParams) -> data.StructLayout:
    """Where a line lies in the group buffer: in the page of keys or `values` of the even or the `odd` group."""
    return data.StructLayout(
        {"line": bits_for(p.page_lines - 1), "values": 1, "odd": 1, "slot": max(1, bits_for(p.slots - 1))}
    )


def sum_layout(p: CsdParams) -> data.StructLayout:
    """Which line of `lanes` sums: those of the channels from word * lanes on."""
    return data.StructLayout(
        {"word": bits_for(max(1, p.max_channels // p.lanes - 1)), "slot": max(1, bits_for(p.slots - 1))}
    )


class GroupBuffer(wiring.Component):
    """Two pages of keys and two of values for every slot, in the form of token-indexed pages; a line in and a line
    out in a tick. Group g is in the pages of its parity, until group g + 2 begins.

    Values that pass are added to the slot's sums in FP32, in the order of tokens, as
    `workloads.csd_kernels.add_values` has it; `fresh` begins a sum with +0 before them. A line may be added to in
    every tick; `sum_read` gives what was added up to two ticks before.

    Parameters
    ----------
    params : CsdParams
    black_box : bool
        The memories, `groups` and `sums`, are outside of the netlist.

    Members
    -------
    ============ === ============= ================================================================
    write        In  1             a line is written
    write_at     In  staged_layout
    write_data   In  line
    accumulate   In  1             it is one of values, added to the sums at `sum_at`
    fresh        In  1             whose sum begins with it
    read         In  1             a line is read; latency 1
    read_at      In  staged_layout
    read_data    Out line
    sum_at       In  sum_layout    sums that `accumulate` adds to
    sum_read     In  1             sums are read; latency 1; not with `accumulate`
    sum_read_at  In  sum_layout
    sum_data     Out lanes * 32    FP32
    ============ === ============= ================================================================
    """

    def __init__(self, *, params: CsdParams, black_box: bool = True):
        self._params, self._black_box = params, black_box
        line = params.lanes * FP16.width
        super().__init__(
            {
                "write": In(1),
                "write_at": In(staged_layout(params)),
                "write_data": In(line),
                "accumulate": In(1),
                "fresh": In(1),
                "read": In(1),
                "read_at": In(staged_layout(params)),
                "read_data": Out(line),
                "sum_at": In(sum_layout(params)),
                "sum_read": In(1),
                "sum_read_at": In(sum_layout(params)),
                "sum_data": Out(params.lanes * FP32.width),
            }
        )

    def elaborate(self, platform):
        m = Module()
        p = self._params
        m.submodules.groups = groups = store(
            black_box=self._black_box, width=p.lanes * FP16.width, depth=1 << staged_layout(p).size
        )
        m.submodules.sums = sums = store(
            black_box=self._black_box, width=p.lanes * FP32.width, depth=1 << sum_layout(p).size
        )
        m.d.comb += [
            groups.write_enable.eq(self.write),
            groups.write_address.eq(self.write_at.as_value()),
            groups.write_data.eq(self.write_data),
            groups.read_enable.eq(self.read),
            groups.read_address.eq(self.read_at.as_value()),
            self.read_data.eq(groups.read_data),
        ]

        adds = self.write & self.accumulate
        added = delay(m, adds, 1, name="adds", reset_less=False)
        place = delay(m, self.sum_at.as_value(), 1, name="place")
        fresh = delay(m, self.fresh, 1, name="fresh")
        values = delay(m, self.write_data, 1, name="values")
        # The same line again in the next tick: the memory is read as it is written.
        again = delay(m, added & adds & (place == self.sum_at.as_value()), 1, name="again", reset_less=False)
        before = Signal(p.lanes * FP32.width)
        totals = []
        for lane in range(p.lanes):
            m.submodules[f"widen_{lane}"] = widen = FpConvert(source=FP16, result=FP32)
            m.submodules[f"add_{lane}"] = unit = FpAdd(format=FP32)
            old = Mux(
                again, before.word_select(lane, FP32.width), sums.read_data.word_select(lane, FP32.width)
            )
            m.d.comb += [
                widen.a.eq(values.word_select(lane, FP16.width)),
                unit.a.eq(Mux(fresh, 0, old)),
                unit.b.eq(widen.o),
            ]
            totals.append(unit.o)
        m.d.sync += before.eq(Cat(totals))
        m.d.comb += [
            sums.read_enable.eq(adds | self.sum_read),
            sums.read_address.eq(Mux(adds, self.sum_at.as_value(), self.sum_read_at.as_value())),
            sums.write_enable.eq(added),
            sums.write_address.eq(place),
            sums.write_data.eq(Cat(totals)),
            self.sum_data.eq(sums.read_data),
        ]
        return m
