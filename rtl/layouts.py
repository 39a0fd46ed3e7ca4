"""Bit layouts of instruction records, from the same field table that encodes and assembles them."""

from amaranth.hdl import signed, unsigned
from amaranth.lib import data

from tilewright.arch.isa import Record


def layout_of(record: Record) -> data.StructLayout:
    """The record as RTL decodes it: the first field in the lowest bits."""
    return data.StructLayout({f.name: (signed if f.signed else unsigned)(f.bits) for f in record.layout})
