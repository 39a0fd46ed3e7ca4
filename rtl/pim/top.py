"""The machine behind a host port."""

from amaranth.hdl import Assert, C, Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import Out, connect, flipped

from tilewright.arch import formats
from tilewright.arch.pim import CAUSES, ISA, TRACE_FIELDS, PimParams, hostmap, registers
from tilewright.arch.pim_asic import AsicSection
from tilewright.rtl.host import HostDecoder, HostPort
from tilewright.rtl.layouts import layout_of
from tilewright.rtl.pim.asic import VectorUnit
from tilewright.rtl.pim.channel import Channel
from tilewright.rtl.pim.sequencer import UNITS, Sequencer


class Top(wiring.Component):
    """Code memory, sequencer, SRAM, `params.channels` channels and the ASIC's vector unit.

    Every channel has a read and a write port of its own into the SRAM; the vector unit has one of each for every
    column of a group.

    Parameters
    ----------
    params : PimParams
        Widths and counts; timings are registers (see `arch.pim.registers`).
    depth : int
        Instructions that the code memory holds.
    accumulator : FloatFormat
    asic : AsicSection
        What the microprograms are made of.
    trace_depth : int
        The first DRAM commands of a run that are logged for each channel, for verification; 0: no logs.

    Members
    -------
    ==== === ======== ==================================================
    host Out HostPort regions as `arch.pim.hostmap` lays them out
    ==== === ======== ==================================================
    """

    def __init__(
        self,
        *,
        params: PimParams,
        depth: int,
        accumulator: formats.FloatFormat,
        asic: AsicSection,
        trace_depth: int = 0,
    ):
        self._params, self._depth, self._format = params, depth, accumulator
        self._asic, self._trace_depth = asic, trace_depth
        super().__init__({"host": Out(HostPort)})

    def elaborate(self, platform):
        m = Module()
        p = self._params
        layout = hostmap(p, self._depth, self._trace_depth)
        m.submodules.decoder = decoder = HostDecoder(layout)
        connect(m, flipped(self.host), decoder.host)
        register = dict(zip(registers(p), decoder.registers, strict=True))

        m.submodules.sequencer = sequencer = Sequencer(params=p, depth=self._depth)
        m.d.comb += [
            decoder.done.eq(~sequencer.run),
            sequencer.clear.eq(decoder.start),
            sequencer.length.eq(register["length"]),
            sequencer.p.eq(register["asic_p"]),
            sequencer.q.eq(register["asic_q"]),
            sequencer.overlap.eq(register["overlap"]),
        ]

        # Code, and the log of first and end tick of each instruction.
        code_width = len(decoder.code.wdata)
        m.submodules.code = code = Memory(shape=code_width, depth=self._depth, init=[])
        read, write = code.read_port(), code.write_port(granularity=32)
        m.d.comb += [
            read.addr.eq(Mux(sequencer.run, sequencer.code_addr, decoder.code.addr)),
            decoder.code.rdata.eq(read.data),
            write.addr.eq(decoder.code.addr),
            write.data.eq(decoder.code.wdata),
            write.en.eq(decoder.code.we),
            sequencer.code_data.eq(read.data[: layout_of(ISA.record("code")).size]),
        ]
        m.submodules.log = log = Memory(shape=64, depth=self._depth, init=[])
        log_read = log.read_port()
        m.d.comb += [log_read.addr.eq(decoder.log.addr), decoder.log.rdata.eq(log_read.data)]
        for u in range(len(UNITS)):
            log_write = log.write_port()
            m.d.comb += [
                log_write.addr.eq(sequencer.index[u]),
                log_write.data.eq(Cat(sequencer.first[u], sequencer.end)),
                log_write.en.eq(sequencer.retire[u]),
            ]

        channels = []
        for c in range(p.channels):
            m.submodules[f"channel_{c}"] = channel = Channel(params=p, index=c, accumulator=self._format)
            latencies = [register[f"latency_{r}"] for r in range(len(p.dram.row_prev))]
            drains = [register[f"drain_{o}"] for o in range(len(p.drain))]
            m.d.comb += [
                channel.clear.eq(decoder.start),
                channel.run.eq(sequencer.run),
                channel.n_refi.eq(register["n_refi"]),
                channel.staggered.eq(register["staggered"]),
                *(a.eq(b) for a, b in zip(channel.latency, latencies, strict=True)),
                *(a.eq(b) for a, b in zip(channel.drain, drains, strict=True)),
                channel.instruction.eq(sequencer.instruction),
                channel.start.eq(sequencer.start[c]),
                sequencer.busy[c].eq(channel.busy),
            ]
            port = getattr(decoder, f"gb_{c}")
            m.d.comb += [
                channel.gb_addr.eq(port.addr),
                channel.gb_we.eq(port.we),
                channel.gb_wdata.eq(port.wdata),
                port.rdata.eq(channel.gb_rdata),
            ]
            channels.append(channel)
            if self._trace_depth:
                self._trace(m, c, getattr(decoder, f"trace_{c}"), sequencer, channel.bus, decoder.start)

        m.submodules.asic = unit = VectorUnit(params=p, asic=self._asic)
        # The instruction stays with the unit, whatever the sequencer loads next.
        kept = Signal.like(sequencer.instruction)
        with m.If(sequencer.start_asic):
            m.d.sync += kept.eq(sequencer.instruction)
        m.d.comb += [
            unit.clear.eq(decoder.start),
            unit.enable.eq(sequencer.enable & sequencer.run),
            unit.start.eq(sequencer.start_asic),
            unit.instruction.eq(Mux(sequencer.start_asic, sequencer.instruction, kept)),
            unit.argmax_init.value.eq(register["argmax_value"]),
            unit.argmax_init.index.eq(register["argmax_index"]),
            sequencer.busy_asic.eq(unit.busy),
        ]

        self._sram(m, decoder.sram, sequencer.run, channels, unit)
        self._count(m, decoder.status, sequencer, channels, unit, decoder.start)
        return m

    def _trace(self, m, index, port, sequencer, bus, clear):
        """A log of the channel's first commands: tick, code, bank and row as they stand on its bus."""
        m.submodules[f"trace_{index}"] = log = Memory(shape=len(port.rdata), depth=self._trace_depth, init=[])
        read, write = log.read_port(), log.write_port()
        count = Signal(range(self._trace_depth + 1), name=f"trace_{index}_count")
        with m.If(clear):
            m.d.sync += count.eq(0)
        with m.Elif(write.en):
            m.d.sync += count.eq(count + 1)
        values = {"tick": sequencer.tick, "code": bus.code, "bank": bus.bank, "row": bus.row}
        m.d.comb += [
            read.addr.eq(port.addr),
            port.rdata.eq(read.data),
            write.addr.eq(count),
            write.data.eq(Cat(Cat(values[name], C(0, bits))[:bits] for name, bits in TRACE_FIELDS.items())),
            write.en.eq(bus.valid & (count < self._trace_depth)),
        ]

    def _sram(self, m, port, run, channels, unit):
        """Ports for each channel and for the vector unit; the host uses the first channel's, outside runs."""
        p = self._params
        width = 16 * p.lanes  # an enable for each element
        m.submodules.sram = sram = Memory(shape=width, depth=p.sram_columns, init=[])
        for c, channel in enumerate(channels):
            read, write = sram.read_port(), sram.write_port(granularity=16)
            read_enable, read_addr = channel.sram_read, channel.sram_raddr
            write_enable, write_addr = (channel.sram_write & run).replicate(p.lanes), channel.sram_waddr
            write_data = channel.sram_wdata
            if c == 0:
                host_we = Cat(port.we[16 * e // 32] for e in range(p.lanes))
                read_enable, read_addr = read_enable | ~run, Mux(run, read_addr, port.addr)
                write_enable = Mux(run, write_enable, host_we)
                write_addr, write_data = Mux(run, write_addr, port.addr), Mux(run, write_data, port.wdata)
                m.d.comb += port.rdata.eq(read.data)
            m.d.comb += [
                read.en.eq(read_enable),
                read.addr.eq(read_addr),
                channel.sram_rdata.eq(read.data),
                write.en.eq(write_enable),
                write.addr.eq(write_addr),
                write.data.eq(write_data),
            ]
        for i in range(len(unit.read_data) // width):
            # A group may reach beyond the memory where it holds no elements.
            read, write = sram.read_port(), sram.write_port(granularity=16)
            m.d.comb += [
                read.en.eq(unit.read_enable),
                read.addr.eq(unit.read_address + i),
                unit.read_data.word_select(i, width).eq(read.data),
                write.en.eq(unit.write_enable.word_select(i, p.lanes)),
                write.addr.eq(unit.write_address + i),
                write.data.eq(unit.write_data.word_select(i, width)),
            ]

    def _count(self, m, status, sequencer, channels, unit, clear):
        """Ticks, commands and stalls, in the order of `arch.pim.status_names`; then state."""
        run = sequencer.run
        events = [run, unit.adds, unit.multiplies]
        causes = range(len(CAUSES))
        events += [run & sequencer.working]
        events += [run & ~sequencer.working & (sequencer.stall == k) for k in causes]
        clock, idle = unit.busy & ~sequencer.enable, ~unit.busy
        events += [run & unit.busy & sequencer.enable]
        events += [run & {"clock": clock, "idle": idle}.get(cause, C(0)) for cause in CAUSES]
        for channel in channels:
            bus = channel.bus
            events += [bus.valid & (bus.code == command) for command in range(self._params.dram.n_commands)]
            events += [sequencer.run & channel.any_open, bus.valid]
            events += [sequencer.run & ~bus.valid & (channel.stall == k) for k in causes]
            m.d.sync += Assert(~bus.valid | sequencer.run, "command outside a run")
        for port, event in zip(status, events, strict=False):
            counter = Signal(32)
            with m.If(clear):
                m.d.sync += counter.eq(0)
            with m.Else():
                m.d.sync += counter.eq(counter + event)
            m.d.comb += port.eq(counter)
        state = [acc for channel in channels for acc in channel.acc]
        state += [unit.argmax.value, unit.argmax.index]
        for port, value in zip(list(status)[len(events) :], state, strict=True):
            m.d.comb += port.eq(value)
