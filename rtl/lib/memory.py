"""Large arrays (DRAM or flash cells) as black boxes: no netlist holds their contents.

`MODEL` is their behaviour in Verilog, to be given to the simulator along with the design.
"""

from pathlib import Path

from amaranth.hdl import Assert, ClockSignal, Instance, Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

__all__ = ["MODEL", "BlackBoxMemory", "memory_members"]

MODEL = Path(__file__).with_name("tilewright_memory.v")


def memory_members(width: int, depth: int, granularity: int | None) -> dict:
    """The members of a memory with one read and one write port, the same for every kind of memory.

    Raises ValueError for a width or depth below 1, or a granularity that does not divide the width.
    """
    for what, value in (("width", width), ("depth", depth)):
        if value < 1:
            raise ValueError(f"{what} must be at least 1, not {value!r}")
    lane = width if granularity is None else granularity
    if lane < 1 or width % lane:
        raise ValueError(f"granularity must divide width {width}, not {granularity!r}")
    address = bits_for(depth - 1)
    return {
        "read_enable": In(1),
        "read_address": In(address),
        "read_data": Out(width),
        "write_enable": In(width // lane),
        "write_address": In(address),
        "write_data": In(width),
    }


def assert_addresses(m: Module, memory, depth: int):
    """Fail where an enabled port is given an address beyond the memory."""
    if depth < 1 << len(memory.read_address):
        m.d.sync += [
            Assert(~memory.read_enable | (memory.read_address < depth), "read beyond the memory"),
            Assert(~memory.write_enable.any() | (memory.write_address < depth), "write beyond the memory"),
        ]


class BlackBoxMemory(wiring.Component):
    """A memory outside the design: an instance of the Verilog module ``tilewright_memory`` named ``cells``.

    Latency 1: the data of a read enabled at tick t is on ``read_data`` from t + 1 until the next read. A read of the
    word that is being written gives the old data. Initial contents are zero, and outlive a reset. An enabled access
    beyond ``depth`` fails an assertion.

    The array is ``<this component>.cells.mem`` to a testbench, which may also put a path into ``cells.load_path`` and
    raise ``cells.load``: the file is then read by ``$readmemh``, at any time.

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
        self._depth = depth

    def elaborate(self, platform):
        m = Module()
        m.submodules.cells = Instance(
            "tilewright_memory",
            p_WIDTH=len(self.write_data),
            p_DEPTH=self._depth,
            p_GRANULARITY=len(self.write_data) // len(self.write_enable),
            i_clk=ClockSignal("sync"),
            i_read_enable=self.read_enable,
            i_read_address=self.read_address,
            o_read_data=self.read_data,
            i_write_enable=self.write_enable,
            i_write_address=self.write_address,
            i_write_data=self.write_data,
        )
        assert_addresses(m, self, self._depth)
        return m
