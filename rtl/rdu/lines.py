"""Off-chip memories as black boxes."""

from pathlib import Path

from amaranth.hdl import Assert, Cat, ClockSignal, Instance, Module, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.rdu import LINE_BITS

__all__ = ["MODEL", "LineMemory"]

MODEL = Path(__file__).with_name("tilewright_lines.v")
BYTE = 8


class LineMemory(wiring.Component):
    """A memory outside the design, of lines and with several ports: an instance, `cells`, of `tilewright_lines`.

    Latency 1: what a port reads at tick t is on its `read_data` from t + 1 until its next read. A read of what is
    being written gives the old data; of ports that write the same byte in one tick the last one does. Lines beyond
    the memory fail an assertion. The array is ``<this component>.cells.mem`` to a testbench.

    Parameters
    ----------
    width, depth, ports : int
        Bits of a line, lines, and ports.

    Members
    -------
    ============= === ============================= ==========================
    read_enable   In  ports                         ports that read
    read_line     In  array(LINE_BITS)              what each of them reads
    read_data     Out array(width)                  what its last read found
    write_enable  In  array(bytes of a line)        bytes that a port writes
    write_line    In  array(LINE_BITS)              where
    write_data    In  array(width)                  what
    ============= === ============================= ==========================
    """

    def __init__(self, *, width: int, depth: int, ports: int):
        self._width, self._depth, self._ports = width, depth, ports

        def each(bits):
            return data.ArrayLayout(unsigned(bits), ports)

        super().__init__(
            {
                "read_enable": In(ports),
                "read_line": In(each(LINE_BITS)),
                "read_data": Out(each(width)),
                "write_enable": In(each(width // BYTE)),
                "write_line": In(each(LINE_BITS)),
                "write_data": In(each(width)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        address = bits_for(self._depth - 1)
        ports = range(self._ports)
        m.submodules.cells = Instance(
            "tilewright_lines",
            p_WIDTH=self._width,
            p_DEPTH=self._depth,
            p_PORTS=self._ports,
            i_clk=ClockSignal("sync"),
            i_read_enable=self.read_enable,
            i_read_address=Cat(self.read_line[k][:address] for k in ports),
            o_read_data=self.read_data,
            i_write_enable=self.write_enable,
            i_write_address=Cat(self.write_line[k][:address] for k in ports),
            i_write_data=self.write_data,
        )
        for k in ports:
            m.d.sync += [
                Assert(~self.read_enable[k] | (self.read_line[k] < self._depth), "read beyond the memory"),
                Assert(
                    ~self.write_enable[k].any() | (self.write_line[k] < self._depth),
                    "write beyond the memory",
                ),
            ]
        return m
