"""What a channel's controller tells its banks, global buffer and SRAM port: one DRAM command a tick."""

from amaranth.hdl import unsigned
from amaranth.lib import data

from tilewright.arch.pim import PimParams


def bits_for_count(count: int) -> int:
    """Bits of an index below `count`, at least one."""
    return max((count - 1).bit_length(), 1)


def command_layout(p: PimParams) -> data.StructLayout:
    """The command bus.

    ======= ==================================================================================
    valid   a command issues in this tick
    code    which one (`arch.pim.CMD`)
    bank    the bank, for commands that address one
    row     the row that it opens, or that must be open
    col     column within the row
    gb      column of the global buffer, read (MACAB) or written (WRGB)
    burst   which group of accumulators RDMAC reads
    sram    SRAM column, read (WR, WRGB) or written (RD, RDMAC)
    masked  WR: write one lane only, the element that belongs to the bank
    lane    the lane
    ======= ==================================================================================
    """
    return data.StructLayout(
        {
            "valid": unsigned(1),
            "code": unsigned(4),
            "bank": unsigned(bits_for_count(p.n_banks)),
            "row": unsigned(bits_for_count(p.rows)),
            "col": unsigned(bits_for_count(p.columns)),
            "gb": unsigned(bits_for_count(p.gb_columns)),
            "burst": unsigned(bits_for_count(p.bursts)),
            "sram": unsigned(bits_for_count(p.sram_columns)),
            "masked": unsigned(1),
            "lane": unsigned(bits_for_count(p.lanes)),
        }
    )
