"""A machine small enough to check by hand: it adds two memories and a black box into a third."""

from amaranth import Assert, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import Out, connect, flipped

from tilewright.arch.hostmap import HostMap, Region
from tilewright.rtl.host import HostDecoder, HostPort
from tilewright.rtl.lib.memory import BlackBoxMemory

WORDS = 16
HOSTMAP = HostMap(
    [
        Region("registers", 3),  # latency, count, mark
        Region("status", 2, 64),  # ticks of the last run; all ticks, over 2**32 at once
        Region("a", WORDS, 20),
        Region("b", WORDS, 20),
        Region("total", WORDS, 72),  # wider than two words: sum in the upper bits, mark in the lower ones
    ]
)


class Adder(wiring.Component):
    """total[i] = (a[i] + b[i] + cells[i]) << 32 | mark for i < count, one element every latency + 1 ticks.

    A run takes max(count, 1) * (latency + 1) ticks. `count` beyond the memories fails an assertion.
    The cells answer one tick late, so at latency 0 the cell of the element before is added.
    """

    host: Out(HostPort)

    def elaborate(self, platform):
        m = Module()
        m.submodules.decoder = decoder = HostDecoder(HOSTMAP)
        connect(m, flipped(self.host), decoder.host)
        latency, count, mark = decoder.registers

        running, waited, index = Signal(), Signal(32), Signal(32)
        ticks, all_ticks = Signal(64), Signal(64, init=(1 << 32) - 5)
        m.d.comb += [decoder.done.eq(~running), decoder.status[0].eq(ticks), decoder.status[1].eq(all_ticks)]

        operands = []
        for name in ("a", "b"):
            port = getattr(decoder, name)
            m.submodules[name] = memory = Memory(shape=20, depth=WORDS, init=[])
            read, write = memory.read_port(), memory.write_port()
            m.d.comb += [
                read.addr.eq(port.addr),
                write.addr.eq(port.addr),
                write.data.eq(port.wdata),
                write.en.eq(port.we),
                port.rdata.eq(read.data),
            ]
            operand = memory.read_port(domain="comb")
            m.d.comb += operand.addr.eq(index)
            operands.append(operand.data)
        # 40-bit words, so that a row is neither a power of two of bytes nor one machine word.
        m.submodules.cells = cells = BlackBoxMemory(width=40, depth=WORDS)
        m.d.comb += [cells.read_enable.eq(index < WORDS), cells.read_address.eq(index)]

        port = decoder.total
        m.submodules.total = memory = Memory(shape=96, depth=WORDS, init=[])
        read, host_write, write = memory.read_port(), memory.write_port(granularity=32), memory.write_port()
        m.d.comb += [
            read.addr.eq(port.addr),
            host_write.addr.eq(port.addr),
            host_write.data.eq(port.wdata),
            host_write.en.eq(port.we),
            port.rdata.eq(read.data),
            write.addr.eq(index),
            write.data[:32].eq(mark),
            write.data[32:72].eq(operands[0] + operands[1] + cells.read_data),
            write.en.eq(running & (waited == latency) & (index < count)),
        ]

        with m.If(decoder.start):
            m.d.sync += [running.eq(1), waited.eq(0), index.eq(0), ticks.eq(0)]
        with m.Elif(running):
            m.d.sync += [ticks.eq(ticks + 1), all_ticks.eq(all_ticks + 1), waited.eq(waited + 1)]
            with m.If(waited == latency):
                m.d.sync += [waited.eq(0), index.eq(index + 1)]
                with m.If(index + 1 >= count):
                    m.d.sync += running.eq(0)
            m.d.sync += Assert(index < WORDS, "element beyond the memories")
        return m
