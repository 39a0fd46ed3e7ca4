"""On-chip memories that are part of the netlist."""

from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.memory import Memory

from tilewright.rtl.lib.memory import assert_addresses, memory_members

__all__ = ["Sram"]

LARGEST_BYTES = 64 * 1024  # Amaranth and Yosys handle every word by itself


class Sram(wiring.Component):
    """A memory with one read and one write port.

    Latency 1: the data of a read enabled at tick t is on ``read_data`` from t + 1 until the next read. A read of the
    word that is being written gives the old data. Initial contents are zero, and outlive a reset. An enabled access
    beyond ``depth`` fails an assertion. Above 64 KiB use `BlackBoxMemory`, which has the same members.

    Parameters
    ----------
    width, depth : int
        Bits of a word, and words.
    granularity : int, optional
        Bits that one write enable governs: a divisor of ``width``, by default ``width``.

    Members
    -------
    ============= === ==================== =======================================
    read_enable   In  1                    read at this tick
    read_address  In  range(depth)         what to read
    read_data     Out width                what the last read found
    write_enable  In  width // granularity lanes to write at this tick, lowest first
    write_address In  range(depth)         where to write
    write_data    In  width                what to write
    ============= === ==================== =======================================
    """

    def __init__(self, *, width: int, depth: int, granularity: int | None = None):
        super().__init__(memory_members(width, depth, granularity))
        if width * depth > 8 * LARGEST_BYTES:
            raise ValueError(
                f"an Sram must not exceed {LARGEST_BYTES} bytes, not {depth} words of {width} bits"
            )
        self._depth = depth

    def elaborate(self, platform):
        m = Module()
        m.submodules.cells = cells = Memory(shape=len(self.write_data), depth=self._depth, init=[])
        lanes = len(self.write_enable)
        write = cells.write_port(granularity=len(self.write_data) // lanes if lanes > 1 else None)
        read = cells.read_port()
        m.d.comb += [
            read.en.eq(self.read_enable),
            read.addr.eq(self.read_address),
            self.read_data.eq(read.data),
            write.en.eq(self.write_enable),
            write.addr.eq(self.write_address),
            write.data.eq(self.write_data),
        ]
        assert_addresses(m, self, self._depth)
        return m
