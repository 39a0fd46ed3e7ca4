"""The configuration bus, and the registers of the units that listen to it."""

from amaranth.hdl import Const, Module, Signal, unsigned
from amaranth.lib import wiring
from amaranth.lib.wiring import Out

from tilewright.arch.isa import Record
from tilewright.arch.rdu import CONFIGS
from tilewright.arch.rdu_host import KIND_BITS, RECORD_BITS
from tilewright.rtl.layouts import layout_of

__all__ = ["ConfigBus", "configured", "heard"]

KIND = {record.region: kind for kind, record in enumerate(CONFIGS)}

ConfigBus = wiring.Signature(
    {
        "off": Out(1),
        "valid": Out(1),
        "kind": Out(unsigned(KIND_BITS)),
        "record": Out(unsigned(RECORD_BITS)),
    }
)
"""One record a tick, to all units: its index in CONFIGS, and its bits from bit 0 upwards.

`off` returns every register to its record's defaults, which is what a unit that is off has. Registers show what they
were told from the next tick on.
"""


def heard(m: Module, bus, record: Record, **at):
    """Whether the bus carries a record of this kind whose fields are as in `at`, and the record.

    A field of a wrong place leaves the registers alone: each unit compares the bus with its own.
    """
    view = Signal(layout_of(record), name=f"bus_{record.mnemonic}")
    m.d.comb += view.as_value().eq(bus.record[: record.bits])
    hit = bus.valid & (bus.kind == KIND[record.region])
    for name, value in at.items():
        hit = hit & (getattr(view, name) == value)
    return hit, view


def configured(m: Module, bus, record: Record, name: str, **at) -> Signal:
    """A register that holds the last record for the place `at`, and its defaults when everything is off."""
    row = record.encode(record.make()).astype("<u4").tobytes()
    default = int.from_bytes(row, "little")
    register = Signal(layout_of(record), name=name, init=layout_of(record).from_bits(default))
    hit, view = heard(m, bus, record, **at)
    with m.If(bus.off):
        m.d.sync += register.as_value().eq(Const(default, record.bits))
    with m.Elif(hit):
        m.d.sync += register.eq(view)
    return register
