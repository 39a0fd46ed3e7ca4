"""What travels between units."""

from amaranth.hdl import unsigned
from amaranth.lib import data

from tilewright.arch.rdu import FLOW_BITS, SEQUENCE_BITS, WORD_BITS

__all__ = ["packet_layout"]


def packet_layout(lanes: int) -> data.StructLayout:
    """A packet of `lanes` words; those of the scalar network have one."""
    return data.StructLayout(
        {
            "data": data.ArrayLayout(unsigned(WORD_BITS), lanes),
            "flow": unsigned(FLOW_BITS),
            "sequence": unsigned(SEQUENCE_BITS),
            "last": unsigned(1),
        }
    )
