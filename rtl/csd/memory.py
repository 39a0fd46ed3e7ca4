"""Memories that are part of the netlist or outside of it, as who instantiates them says."""

from tilewright.rtl.lib.memory import BlackBoxMemory
from tilewright.rtl.lib.sram import Sram

__all__ = ["store"]


def store(*, black_box: bool, width: int, depth: int, granularity: int | None = None):
    """A memory with one read and one write port: a black box in machines, an `Sram` where a unit is simulated alone."""
    return (BlackBoxMemory if black_box else Sram)(width=width, depth=depth, granularity=granularity)
