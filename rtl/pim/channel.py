"""One channel: controller, global buffer and banks."""

from amaranth.hdl import Array, Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from tilewright.arch import formats
from tilewright.arch.pim import CMD, PimParams
from tilewright.rtl.lib.fp import FpConvert
from tilewright.rtl.pim.bank import Bank
from tilewright.rtl.pim.bus import bits_for_count
from tilewright.rtl.pim.controller import ChannelController, control_members


class Channel(wiring.Component):
    """A GDDR6 channel with process-in-memory.

    Data moves one tick after its command: SRAM is read in the tick of a WR or WRGB and written into array or
    buffer in the next; RD and RDMAC write SRAM in the tick after theirs. The controller's latencies
    (`drain`, turnarounds) are the datasheet's and never shorter.

    Parameters
    ----------
    params : PimParams
    index : int
        Number of the channel.
    accumulator : FloatFormat

    Members beside those of `ChannelController`
    -------------------------------------------
    ============ === =================== ====================================================
    sram_read    Out 1                   read SRAM column `sram_raddr`
    sram_raddr   Out                     column
    sram_rdata   In  lanes * 16          its contents, one tick later
    sram_write   Out 1                   write SRAM
    sram_waddr   Out                     column
    sram_wdata   Out lanes * 16          contents
    gb_addr      In                      host access to the global buffer, outside runs
    gb_we        In  host words          host write enables
    gb_wdata     In                      host data
    gb_rdata     Out                     contents, one tick after `gb_addr`
    acc          Out array of banks      accumulators
    ============ === =================== ====================================================
    """

    def __init__(self, *, params: PimParams, index: int, accumulator: formats.FloatFormat):
        self._params, self._index, self._format = params, index, accumulator
        width = params.lanes * formats.BF16.width
        self._host_words = -(-width // 32)
        sram = bits_for_count(params.sram_columns)
        super().__init__(
            {
                **control_members(params),
                "sram_read": Out(1),
                "sram_raddr": Out(sram),
                "sram_rdata": In(width),
                "sram_write": Out(1),
                "sram_waddr": Out(sram),
                "sram_wdata": Out(width),
                "gb_addr": In(bits_for_count(params.gb_columns)),
                "gb_we": In(self._host_words),
                "gb_wdata": In(self._host_words * 32),
                "gb_rdata": Out(self._host_words * 32),
                "acc": Out(accumulator.width).array(params.n_banks),
            }
        )

    def elaborate(self, platform):
        m = Module()
        p = self._params
        m.submodules.controller = controller = ChannelController(params=p, index=self._index)
        bus = controller.bus
        for name, member in control_members(p).items():
            ours, its = getattr(self, name), getattr(controller, name)
            pairs = zip(ours, its, strict=True) if member.dimensions else [(ours, its)]
            m.d.comb += [b.eq(a) if member.flow == In else a.eq(b) for a, b in pairs]

        def issues(command):
            return bus.valid & (bus.code == command)

        # SRAM towards the channel: read with the command, use in the next tick.
        write_gb, gb_q = Signal(), Signal(bus.gb.shape())
        m.d.sync += [write_gb.eq(issues(CMD.WRGB)), gb_q.eq(bus.gb)]
        m.d.comb += [
            self.sram_read.eq(issues(CMD.WRGB) | issues(CMD.WR)),
            self.sram_raddr.eq(bus.sram),
        ]

        # Global buffer: the host's port is the channel's, outside runs.
        width = self._host_words * 32
        m.submodules.gb = memory = Memory(shape=width, depth=p.gb_columns, init=[])
        read, write = memory.read_port(), memory.write_port(granularity=32)
        m.d.comb += [
            read.addr.eq(Mux(self.run, bus.gb, self.gb_addr)),
            self.gb_rdata.eq(read.data),
            write.addr.eq(Mux(self.run, gb_q, self.gb_addr)),
            write.data.eq(Mux(self.run, self.sram_rdata, self.gb_wdata)),
            write.en.eq(Mux(self.run, write_gb.replicate(self._host_words), self.gb_we)),
        ]

        banks = []
        for b in range(p.n_banks):
            m.submodules[f"bank_{b}"] = bank = Bank(params=p, index=b, accumulator=self._format)
            m.d.comb += [
                bank.bus.eq(bus),
                bank.reset.eq(self.clear),
                bank.run.eq(self.run),
                bank.gb.eq(read.data),
                bank.wdata.eq(self.sram_rdata),
                self.acc[b].eq(bank.acc),
            ]
            banks.append(bank)

        # The channel towards SRAM: read data, or accumulators rounded to bfloat16.
        element = formats.BF16.width
        rounded = []
        for lane in range(p.lanes):
            m.submodules[f"round_{lane}"] = unit = FpConvert(source=self._format, result=formats.BF16)
            m.d.comb += unit.a.eq(Array(banks[k * p.lanes + lane].acc for k in range(p.bursts))[bus.burst])
            rounded.append(unit.o)
        read_q, acc_q, sram_q = Signal(), Signal(), Signal(bus.sram.shape())
        bank_q, acc_data = Signal(bus.bank.shape()), Signal(p.lanes * element)
        m.d.sync += [
            read_q.eq(issues(CMD.RD)),
            acc_q.eq(issues(CMD.RDMAC)),
            sram_q.eq(bus.sram),
            bank_q.eq(bus.bank),
            acc_data.eq(Cat(rounded)),
        ]
        m.d.comb += [
            self.sram_write.eq(read_q | acc_q),
            self.sram_waddr.eq(sram_q),
            self.sram_wdata.eq(Mux(acc_q, acc_data, Array(bank.rdata for bank in banks)[bank_q])),
        ]
        return m
