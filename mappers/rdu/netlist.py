"""The units of a section and the streams between them."""

from collections.abc import Iterable
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import NamedTuple

from tilewright.arch.errors import UserError, nearest
from tilewright.arch.rdu import NETWORKS
from tilewright.mappers.rdu.fabric import KINDS, Fabric

__all__ = ["Netlist", "Sink", "Stream", "Unit"]

STREAMS = (*NETWORKS, "control")


@dataclass(frozen=True)
class Unit:
    """A unit to be placed, of one of the kinds pcu, pmu, agcu."""

    name: str
    kind: str


class Sink(NamedTuple):
    """Where a stream ends: an input port of a unit."""

    unit: str
    input: int = 0


@dataclass(frozen=True)
class Stream:
    """Packets from the output of one unit to the inputs of others, all of which get every packet.

    `rate` is in packets a tick. Vector and scalar streams are routed through the switches; tokens (control) have
    wires of their own, and are only kept short.
    """

    name: str
    source: str
    sinks: tuple[Sink, ...]
    rate: Fraction = Fraction(1)
    network: str = "vector"


@dataclass(frozen=True)
class Netlist:
    """Units and streams of one section.

    Raises UserError for a name given twice, an unknown unit, kind or network, a stream without sinks or with one
    twice, a rate that is not positive, and a second vector or scalar stream from one unit: it has one output each.
    """

    units: tuple[Unit, ...]
    streams: tuple[Stream, ...]

    def __post_init__(self) -> None:
        _unique("unit", (u.name for u in self.units))
        _unique("stream", (s.name for s in self.streams))
        for u in self.units:
            if u.kind not in KINDS:
                raise UserError(f"unit {u.name}: unknown kind {u.kind!r}; {nearest(u.kind, KINDS)}")
        outputs: dict[tuple[str, str], str] = {}
        for s in self.streams:
            if s.network not in STREAMS:
                raise UserError(
                    f"stream {s.name}: unknown network {s.network!r}; {nearest(s.network, STREAMS)}"
                )
            for name in (s.source, *(sink.unit for sink in s.sinks)):
                if name not in self.index:
                    raise UserError(f"stream {s.name}: unknown unit {name!r}; {nearest(name, self.index)}")
            if not s.sinks:
                raise UserError(f"stream {s.name} has no sinks")
            if len(set(s.sinks)) < len(s.sinks):
                raise UserError(f"stream {s.name}: a sink is given twice")
            if s.rate <= 0:
                raise UserError(f"stream {s.name}: rate must be positive, not {s.rate}")
            first = outputs.setdefault((s.source, s.network), s.name)
            if first != s.name and s.network in NETWORKS:
                raise UserError(
                    f"stream {s.name}: the {s.network} output of {s.source} gives {first} already"
                )

    @cached_property
    def index(self) -> dict[str, int]:
        """The number of each unit, by name."""
        return {u.name: i for i, u in enumerate(self.units)}

    def kind(self, name: str) -> str:
        """The kind of a unit."""
        return self.units[self.index[name]].kind

    def check(self, fabric: Fabric) -> None:
        """Raises UserError where there are more units of a kind than sites, or inputs that a unit hasn't."""
        for kind in KINDS:
            units, sites = sum(u.kind == kind for u in self.units), len(fabric.sites_of(kind))
            if units > sites:
                raise UserError(f"the section has {units} units of kind {kind}; the grid has {sites}")
        for s in self.streams:
            for sink in s.sinks:
                kind = self.kind(sink.unit)
                inputs = fabric.inputs.get((kind, s.network), 0)
                if not 0 <= sink.input < inputs:
                    raise UserError(
                        f"stream {s.name}: {s.network} input {sink.input} of {sink.unit}; "
                        f"the {s.network} inputs of a {kind} number {inputs}"
                    )


def _unique(what: str, names: Iterable[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise UserError(f"{what} {name} is given twice")
        seen.add(name)
