"""The channels behind a host port."""

from amaranth.hdl import Assert, C, Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import Out, connect, flipped

from tilewright.arch import formats
from tilewright.arch.pim import CAUSES, ISA, TRACE_FIELDS, PimParams, hostmap, registers
from tilewright.rtl.host import HostDecoder, HostPort
from tilewright.rtl.layouts import layout_of
from tilewright.rtl.lib.memory import BlackBoxMemory
from tilewright.rtl.pim.channel import Channel
from tilewright.rtl.pim.sequencer import Sequencer

SMALL_BITS = 64 * 1024 * 8  # larger memories are black boxes


class ChannelTop(wiring.Component):
    """Code memory, sequencer, SRAM and `params.channels` channels; the ASIC's arithmetic is not part of it.

    Every channel has a read and a write port of its own into the SRAM.

    Parameters
    ----------
    params : PimParams
        Widths and counts; timings are registers (see `arch.pim.registers`).
    depth : int
        Instructions that the code memory holds.
    accumulator : FloatFormat
    trace_depth : int
        The first DRAM commands of a run that are logged for each channel, for verification; 0: no logs.

    Members
    -------
    ==== === ======== ==================================================
    host Out HostPort regions as `arch.pim.hostmap` lays them out
    ==== === ======== ==================================================
    """

    def __init__(
        self, *, params: PimParams, depth: int, accumulator: formats.FloatFormat, trace_depth: int = 0
    ):
        self._params, self._depth, self._format = params, depth, accumulator
        self._trace_depth = trace_depth
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
        log_read, log_write = log.read_port(), log.write_port()
        m.d.comb += [
            log_read.addr.eq(decoder.log.addr),
            decoder.log.rdata.eq(log_read.data),
            log_write.addr.eq(sequencer.index),
            log_write.data.eq(Cat(sequencer.first, (sequencer.tick + 1)[:32])),
            log_write.en.eq(sequencer.retire),
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

        self._sram(m, decoder.sram, sequencer.run, channels)
        self._count(m, decoder.status, sequencer, channels, decoder.start)
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

    def _sram(self, m, port, run, channels):
        """One read and one write port for each channel; the host uses the first channel's, outside runs."""
        p = self._params
        width = len(port.wdata)
        words = len(port.we)  # of the host in a column; one lane is half a word
        first = channels[0]
        host_we = port.we
        if len(channels) == 1 and width * p.sram_columns > SMALL_BITS:
            m.submodules.sram = sram = BlackBoxMemory(
                width=width, depth=p.sram_columns, granularity=width // words
            )
            m.d.comb += [
                sram.read_enable.eq(Mux(run, first.sram_read, port.re)),
                sram.read_address.eq(Mux(run, first.sram_raddr, port.addr)),
                sram.write_enable.eq(Mux(run, first.sram_write.replicate(words), host_we)),
                sram.write_address.eq(Mux(run, first.sram_waddr, port.addr)),
                sram.write_data.eq(Mux(run, first.sram_wdata, port.wdata)),
                first.sram_rdata.eq(sram.read_data),
                port.rdata.eq(sram.read_data),
            ]
            return
        m.submodules.sram = sram = Memory(shape=width, depth=p.sram_columns, init=[])
        for c, channel in enumerate(channels):
            read, write = sram.read_port(), sram.write_port(granularity=width // words)
            host = c == 0
            m.d.comb += [
                read.addr.eq(Mux(run, channel.sram_raddr, port.addr) if host else channel.sram_raddr),
                read.en.eq(channel.sram_read | (~run if host else 0)),
                channel.sram_rdata.eq(read.data),
                write.addr.eq(Mux(run, channel.sram_waddr, port.addr) if host else channel.sram_waddr),
                write.data.eq(Mux(run, channel.sram_wdata, port.wdata) if host else channel.sram_wdata),
                write.en.eq(
                    Mux(run, channel.sram_write.replicate(words), host_we)
                    if host
                    else (channel.sram_write & run).replicate(words)
                ),
            ]
            if host:
                m.d.comb += port.rdata.eq(read.data)

    def _count(self, m, status, sequencer, channels, clear):
        """Ticks, commands and stalls, in the order of `arch.pim.status_names`; then the accumulators."""
        events = [sequencer.run]
        causes = range(len(CAUSES))
        sequencer_stall = [sequencer.run & ~sequencer.working & (sequencer.stall == k) for k in causes]
        events += [sequencer.run & sequencer.working, *sequencer_stall]
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
            with m.Elif(event):
                m.d.sync += counter.eq(counter + 1)
            m.d.comb += port.eq(counter)
        accumulators = [acc for channel in channels for acc in channel.acc]
        for port, acc in zip(list(status)[len(events) :], accumulators, strict=True):
            m.d.comb += port.eq(acc)
