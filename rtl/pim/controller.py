"""The channel's controller: an instruction in, DRAM commands out, every constraint and refresh kept."""

from amaranth.hdl import Array, Assert, Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from tilewright.arch.pim import CAUSES, CMD, DRAM_CAUSES, ISA, N_CHANNEL_OPS, OP, PimParams
from tilewright.rtl.layouts import layout_of
from tilewright.rtl.lib.dram import AGE_BITS, DramTiming
from tilewright.rtl.pim.bus import command_layout

DRAIN_BITS = 16


def control_members(params: PimParams) -> dict:
    """What the machine says to a channel, and hears of it; see `ChannelController`."""
    return {
        "clear": In(1),
        "run": In(1),
        "n_refi": In(AGE_BITS),
        "staggered": In(1),
        "latency": In(AGE_BITS).array(len(params.dram.row_prev)),
        "drain": In(DRAIN_BITS).array(N_CHANNEL_OPS),
        "instruction": In(layout_of(ISA.record("code"))),
        "start": In(1),
        "busy": Out(1),
        "any_open": Out(1),
        "stall": Out(range(len(CAUSES))),
        "bus": Out(command_layout(params)),
    }


class ChannelController(wiring.Component):
    """Turns one instruction at a time into DRAM commands.

    In each tick of a run at most one command issues: the refresh that is due, or else the next command that the
    instruction asks for, given which rows are open. It issues in the first tick in which no constraint holds
    it back. After the last one the instruction drains, and then `busy` falls.

    Each tick counts once: as busy if a command issues, otherwise under the first cause that holds (see
    `arch.pim.CAUSES`).

    Parameters
    ----------
    params : PimParams
        Only widths and counts are read; timings are inputs.
    index : int
        Number of the channel: its SRAM addresses lie index * stride further on.

    Members
    -------
    =========== === ================== =========================================================
    clear       In  1                  a run begins in the next tick: forget all timing state
    run         In  1                  this tick belongs to the run
    n_refi      In  16                 refresh interval
    staggered   In  1                  open all banks one by one
    latency     In  array, 16          see `DramTiming`
    drain       In  array of ops, 16   ticks from an operation's last command to its completion
    instruction In  record             what to do, taken with `start`
    start       In  1                  begins the instruction in the next tick
    busy        Out 1                  an instruction is executing or draining
    bus         Out command_layout     the command of this tick
    any_open    Out 1                  some bank has an open row
    stall       Out range(causes)      cause of this tick, where `bus.valid` is 0
    =========== === ================== =========================================================
    """

    def __init__(self, *, params: PimParams, index: int):
        self._params, self._index = params, index
        super().__init__(control_members(params))

    def elaborate(self, platform):
        m = Module()
        p, bus = self._params, self.bus
        column_bits = (p.columns - 1).bit_length()
        issue = bus.valid

        # Refresh: due every n_refi ticks, counted if an earlier one still waits.
        phase, pending = Signal(AGE_BITS), Signal(2)
        wrap = self.run & (phase + 1 == self.n_refi)
        refresh = pending != 0
        refreshed = issue & (bus.code == CMD.REFAB)
        with m.If(self.clear):
            m.d.sync += [phase.eq(0), pending.eq(0)]
        with m.Elif(self.run):
            m.d.sync += [phase.eq(Mux(wrap, 0, phase + 1)), pending.eq(pending + wrap - refreshed)]
            m.d.sync += Assert(~(wrap & (pending == 3)), "refreshes pile up: the interval is too short")

        # The rows that are open.
        opened = Signal(p.n_banks)
        rows = [Signal(bus.row.shape(), name=f"row_{b}") for b in range(p.n_banks)]
        m.d.comb += self.any_open.eq(opened.any())
        with m.If(self.clear):
            m.d.sync += opened.eq(0)
        with m.Elif(issue):
            with m.Switch(bus.code):
                with m.Case(CMD.ACT):
                    m.d.sync += [opened.bit_select(bus.bank, 1).eq(1), Array(rows)[bus.bank].eq(bus.row)]
                with m.Case(CMD.ACTAB):
                    m.d.sync += [opened.eq((1 << p.n_banks) - 1)] + [r.eq(bus.row) for r in rows]
                with m.Case(CMD.PRE):
                    m.d.sync += opened.bit_select(bus.bank, 1).eq(0)
                with m.Case(CMD.PREAB):
                    m.d.sync += opened.eq(0)

        # The instruction and how far it is.
        i = Signal(layout_of(ISA.record("code")))
        active, waiting = Signal(), Signal(DRAIN_BITS)
        address = Signal(i.row.shape().width + column_bits)
        group = Signal.like(address)  # where the repetition of WR_EL began
        gb, sram, sram_out = Signal(bus.gb.shape()), Signal(bus.sram.shape()), Signal(bus.sram.shape())
        cols, outs = Signal(i.cols.shape()), Signal(i.outs.shape())
        reading = Signal()  # GEMV: the columns are done, the accumulators are read
        burst, bank = Signal(range(p.bursts + 1)), Signal(range(p.n_banks + 1))
        m.d.comb += self.busy.eq(active | (waiting != 0))

        row, col = address[column_bits:], address[:column_bits]
        same = Cat(o & (r == row) for o, r in zip(opened, rows, strict=True))
        other = opened & ~same
        order = [int(b) for b in p.stagger_order]
        next_closed = Signal(bus.bank.shape())
        for b in reversed(order):
            with m.If(~opened[b]):
                m.d.comb += next_closed.eq(b)

        # Which command is needed next.
        needs_all = (i.op == OP["MAC_AB"]) | ((i.op == OP["GEMV"]) & ~reading) | (i.op == OP["WR_EL"])
        needs_one = (i.op == OP["RD_BK"]) | (i.op == OP["WR_BK"])
        target = Signal(bus.bank.shape())
        m.d.comb += target.eq(Mux(needs_one, i.bank, bank))
        ready = Signal()  # banks are as the instruction needs them: the command is its own
        code = Signal(bus.code.shape())
        m.d.comb += bus.bank.eq(target)
        with m.If(refresh):
            m.d.comb += code.eq(Mux(opened.any(), CMD.PREAB, CMD.REFAB))
        with m.Elif(needs_all & ~same.all()):
            with m.If(other.any() | (same.any() & ~self.staggered)):
                m.d.comb += code.eq(CMD.PREAB)
            with m.Elif(self.staggered):
                m.d.comb += [code.eq(CMD.ACT), bus.bank.eq(next_closed)]
            with m.Else():
                m.d.comb += code.eq(CMD.ACTAB)
        with m.Elif(needs_one & ~same.bit_select(target, 1)):
            m.d.comb += code.eq(Mux(opened.bit_select(target, 1), CMD.PRE, CMD.ACT))
        with m.Else():
            m.d.comb += ready.eq(1)
            with m.Switch(i.op):
                with m.Case(OP["WR_GB"]):
                    m.d.comb += code.eq(CMD.WRGB)
                with m.Case(OP["MAC_AB"], OP["GEMV"]):
                    m.d.comb += code.eq(Mux(reading, CMD.RDMAC, CMD.MACAB))
                with m.Case(OP["RD_MAC"]):
                    m.d.comb += code.eq(CMD.RDMAC)
                with m.Case(OP["RD_BK"]):
                    m.d.comb += code.eq(CMD.RD)
                with m.Default():
                    m.d.comb += code.eq(CMD.WR)

        # May it issue?
        m.submodules.timing = timing = DramTiming(params=p.dram, causes=len(DRAM_CAUSES))
        m.d.comb += [
            timing.clear.eq(self.clear),
            timing.run.eq(self.run),
            timing.command.eq(code),
            timing.bank.eq(bus.bank),
            timing.issue.eq(issue),
            *(a.eq(b) for a, b in zip(timing.latency, self.latency, strict=True)),
            issue.eq(self.run & (refresh | active) & ~timing.blocked.any()),
            bus.code.eq(code),
            bus.row.eq(row),
            bus.col.eq(col),
            bus.gb.eq(gb),
            bus.burst.eq(burst),
            bus.sram.eq(Mux(code == CMD.RDMAC, sram_out + burst, sram)),
            bus.masked.eq(i.op == OP["WR_EL"]),
            bus.lane.eq(i.lane),
        ]
        # WR_EL: bank b takes element b of the SRAM columns at `sram`.
        with m.If(i.op == OP["WR_EL"]):
            m.d.comb += bus.sram.eq(sram + (bank >> (p.lanes - 1).bit_length()))

        # Why not?
        with m.If(refresh):
            m.d.comb += self.stall.eq(CAUSES.index("refresh"))
        with m.Elif(active):
            for k in reversed(range(len(DRAM_CAUSES))):
                with m.If(timing.blocked[k]):
                    m.d.comb += self.stall.eq(k)
        with m.Elif(waiting != 0):
            m.d.comb += self.stall.eq(CAUSES.index("drain"))
        with m.Else():
            m.d.comb += self.stall.eq(CAUSES.index("idle"))

        # Progress.
        done = Signal()
        offset = self._index * self.instruction.stride
        with m.If(self.clear):
            m.d.sync += [active.eq(0), waiting.eq(0)]
        with m.Elif(self.start):
            n = self.instruction
            start = Cat(n.col[:column_bits], n.row)
            m.d.sync += [
                i.eq(n),
                active.eq(1),
                address.eq(start),
                group.eq(start),
                gb.eq(n.gb),
                sram.eq(Mux(n.op == OP["RD_BK"], n.dst, n.src) + offset),
                sram_out.eq(n.dst + offset),
                cols.eq(n.cols),
                outs.eq(n.outs),
                reading.eq(0),
                burst.eq(0),
                bank.eq(0),
            ]
            m.d.sync += Assert(~self.busy, "instruction started while another executes")
            m.d.sync += Assert(n.op < N_CHANNEL_OPS, "not a channel's instruction")
        with m.Elif(self.run & (waiting != 0)):
            m.d.sync += waiting.eq(waiting - 1)
        with m.If(issue & ready & ~refresh):
            last_col, last_out = cols == 1, outs == 1
            last_burst, last_bank = burst == p.bursts - 1, bank == p.n_banks - 1
            with m.Switch(code):
                with m.Case(CMD.WRGB):
                    m.d.sync += [gb.eq(gb + 1), sram.eq(sram + 1), cols.eq(cols - 1)]
                    m.d.comb += done.eq(last_col)
                with m.Case(CMD.MACAB):
                    m.d.sync += [gb.eq(gb + 1), address.eq(address + 1), cols.eq(cols - 1)]
                    m.d.comb += done.eq(last_col & (i.op == OP["MAC_AB"]))
                    with m.If(last_col):
                        m.d.sync += reading.eq(1)
                with m.Case(CMD.RDMAC):
                    m.d.sync += burst.eq(burst + 1)
                    m.d.comb += done.eq(last_burst & ((i.op == OP["RD_MAC"]) | last_out))
                    with m.If(last_burst):
                        m.d.sync += [reading.eq(0), burst.eq(0), cols.eq(i.cols), gb.eq(i.gb)]
                        m.d.sync += [outs.eq(outs - 1), sram_out.eq(sram_out + i.pitch)]
                with m.Case(CMD.RD):
                    m.d.sync += [address.eq(address + 1), sram.eq(sram + 1), cols.eq(cols - 1)]
                    m.d.comb += done.eq(last_col)
                with m.Case(CMD.WR):
                    with m.If(i.op == OP["WR_EL"]):
                        m.d.sync += bank.eq(bank + 1)
                        m.d.comb += done.eq(last_bank & last_out)
                        with m.If(last_bank):
                            m.d.sync += [bank.eq(0), outs.eq(outs - 1), sram.eq(sram + p.bursts)]
                            m.d.sync += [address.eq(group + i.pitch), group.eq(group + i.pitch)]
                    with m.Else():
                        m.d.sync += [address.eq(address + 1), sram.eq(sram + 1), cols.eq(cols - 1)]
                        m.d.comb += done.eq(last_col)
        with m.If(done):
            latency = Array(self.drain)[i.op]
            m.d.sync += [active.eq(0), waiting.eq(Mux(latency == 0, 0, latency - 1))]
        return m
