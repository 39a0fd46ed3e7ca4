"""A section in the making: units with their configuration, the streams and tokens between them; then its records.

A mapper names units and says what each does, in the fields of the records of `arch.rdu`; `build` finds their places
and the routes of their streams, and writes the records that configure the machine.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from math import prod
from typing import Any

import numpy as np

from tilewright.arch import rdu
from tilewright.arch.errors import UserError, nearest
from tilewright.arch.isa import Record, Segment
from tilewright.arch.rdu import INPUTS, LEVELS, MESH, NETWORKS, TOKENS, RduParams
from tilewright.mappers.rdu.draw import draw
from tilewright.mappers.rdu.fabric import LOCAL, Fabric
from tilewright.mappers.rdu.gates import balanced
from tilewright.mappers.rdu.netlist import Netlist, Sink, Stream, Unit
from tilewright.mappers.rdu.place import Placement, place
from tilewright.mappers.rdu.route import Routing, Turns, rerouted, route
from tilewright.mappers.rdu.store import remembered

__all__ = ["Built", "Section", "segment"]

RECORDS = {"pcu": rdu.CONFIG_PCU, "pmu": rdu.CONFIG_PMU, "agcu": rdu.CONFIG_AGCU}
SIDES = {"write": 0, "read": TOKENS}
"""First control port of each side of a PMU."""
GIVEN = ("x", "y", "agcu", "flow", "scalar_flow", "tag")
"""Fields that the builder fills in."""


@dataclass(frozen=True)
class Built:
    """A section with a place for every unit, and its records by region, with tags as indices of `tags`."""

    name: str
    netlist: Netlist
    fabric: Fabric
    placement: Placement
    routing: Routing
    records: Mapping[str, np.ndarray]
    tags: tuple[str, ...]

    def site(self, unit: str) -> tuple[int, int]:
        """Column and row of the switch of a unit."""
        site = self.fabric.sites[self.placement.sites[unit]]
        return site.x, site.y

    @cached_property
    def names(self) -> dict[str, str]:
        """The units by place: "pcu@3,4", "agcu@5"."""
        gates = self.fabric.sites_of("agcu")
        first = gates[0] if gates else 0
        return {
            f"agcu@{site - first}" if self.netlist.kind(unit) == "agcu"
            else f"{self.netlist.kind(unit)}@{','.join(map(str, self.site(unit)))}": unit
            for unit, site in self.placement.sites.items()
        }  # fmt: skip

    def svg(self, title: str = "") -> str:
        """A picture of units, routes and load."""
        return draw(self.netlist, self.fabric, self.placement, self.routing, title or self.name)


class Section:
    """Units, streams and tokens of one section for a machine of `params`.

    Fields are those of the records, enumerations by name or number. What `build` fills in can't be given: places, flows
    and tags. Raises UserError, which names the unit, for a field that a record lacks or a value that it doesn't hold,
    for more than the machine has (counter levels, stages, registers, inputs), and a name given twice.
    """

    def __init__(self, params: RduParams, name: str = "section"):
        self.params, self.name = params, name
        self._kinds: dict[str, str] = {}
        self._tags: dict[str, str] = {}
        self._fields: dict[str, dict[str, int]] = {}
        self._stages: dict[str, list[dict[str, int]]] = {}
        self._streams: dict[tuple[str, str], tuple[list[Sink], Fraction]] = {}
        self._tokens: list[tuple[str, int, str, int]] = []

    # ---- units ----------------------------------------------------------------------------------------

    def pcu(
        self, name: str, *, tag: str = "", stages: Sequence[Mapping[str, int | str]] = (), **fields: int | str
    ) -> str:
        """A compute unit; `stages` are the fields of its stages, those behind pass everything on."""
        p = self.params
        if len(stages) > p.stages:
            raise UserError(f"unit {name}: {len(stages)} stages; a PCU has {p.stages}")
        self._unit(name, "pcu", tag, fields)
        f = self._fields[name]
        self._levels(name, p.counters, "")
        for what, used, there in (
            ("vector", f["vectors"], p.vector_inputs),
            ("scalar", f["scalars"], p.scalar_inputs),
        ):
            if used >> there:
                raise UserError(f"unit {name}: {what}s {used:#x}; a PCU has {there} {what} inputs")
        if rdu.MODES[f["mode"]] == "systolic" and not p.systolic:
            raise UserError(f"unit {name}: mode systolic; the PCUs of this machine have no array")
        if f["gated"] and (f["fold"] or f["tree"] or rdu.MODES[f["mode"]] == "systolic"):
            raise UserError(f"unit {name}: gated needs mode simd, without fold and tree")
        self._stages[name] = [
            _values(f"unit {name}, stage {i}", rdu.CONFIG_STAGE, dict(s)) for i, s in enumerate(stages)
        ]
        registers = [f[key] for key in ("result", "gate")]
        registers += [s[key] for s in self._stages[name] for key in ("to", "c")]
        registers += [
            s[key] for s in self._stages[name] for key in "ab" if rdu.OPERANDS[s[f"{key}_from"]] == "register"
        ]
        if max(registers) >= p.registers:
            raise UserError(f"unit {name}: register {max(registers)}; a lane has {p.registers}")
        return name

    def pmu(self, name: str, *, tag: str = "", **fields: int | str) -> str:
        """A memory unit. Without bank bits the lowest of the address choose the bank, without `words` it is held whole."""
        p = self.params
        self._unit(name, "pmu", tag, {"words": p.banks * p.bank_words, **fields})
        for prefix in ("write_", "read_"):
            self._levels(name, p.pmu_counters, prefix)
        try:
            rdu.check_pmu(p, self._fields[name], f"unit {name}: ")
        except ValueError as error:
            raise UserError(str(error)) from None
        return name

    def agcu(self, name: str, *, tag: str = "", **fields: int | str) -> str:
        """A gate to off-chip memory."""
        self._unit(name, "agcu", tag, fields)
        self._levels(name, self.params.agcu_counters, "")
        words = self._fields[name]["words"]
        if not 1 <= words <= self.params.lanes:
            raise UserError(f"unit {name}: words must be in 1..{self.params.lanes}, not {words}")
        return name

    def _unit(self, name: str, kind: str, tag: str, fields: Mapping[str, int | str]) -> None:
        if name in self._kinds:
            raise UserError(f"unit {name} is given twice")
        for key in fields:
            if key in GIVEN:
                raise UserError(f"unit {name}: {key} is filled in by the builder")
        self._fields[name] = _values(f"unit {name}", RECORDS[kind], fields)
        self._kinds[name], self._tags[name] = kind, _word(tag or name)

    def _levels(self, name: str, levels: int, prefix: str) -> None:
        for n in range(levels, LEVELS):
            count = self._fields[name][f"{prefix}count{n}"]
            if count > 1:
                raise UserError(f"unit {name}: {prefix}count{n} is {count}; its chain has {levels} counters")

    # ---- streams and tokens ---------------------------------------------------------------------------

    def stream(
        self,
        source: str,
        *sinks: str | tuple[str, int],
        network: str = "vector",
        rate: Fraction | float = Fraction(1),
    ) -> None:
        """Every packet of the source's output to all sinks, (unit, input) or a unit's input 0.

        `rate` is what to expect, in packets a tick, for placement and routing.
        """
        if network not in NETWORKS:
            raise UserError(
                f"stream from {source}: unknown network {network!r}; {nearest(network, NETWORKS)}"
            )
        self._known(source, "stream from")
        ends = [Sink(s, 0) if isinstance(s, str) else Sink(*s) for s in sinks]
        for end in ends:
            self._known(end.unit, f"stream from {source} to")
        if (source, network) in self._streams:
            raise UserError(f"stream from {source}: its {network} output is in use")
        self._streams[source, network] = ends, Fraction(rate).limit_denominator(1 << 20)
        if self._kinds[source] == "pcu":
            self._fields[source][f"send_{network}"] = 1

    def token(self, source: str, output: int, sink: str, index: int) -> None:
        """Control output `output` of a unit, of a side of a PMU ("name.write", "name.read"), to a control input."""
        (taker, _), at = self._port(sink, index), self._port(sink, index)[1]
        if any((s, i) == (taker, at) for _, _, s, i in self._tokens):
            raise UserError(f"token from {source} to {sink}: control input {index} is in use")
        self._tokens.append((*self._port(source, output), taker, at))

    def _port(self, end: str, index: int) -> tuple[str, int]:
        unit, _, side = end.rpartition(".")
        if side not in SIDES or unit not in self._kinds:
            unit, side = end, ""
        self._known(unit, "token at")
        if (self._kinds[unit] == "pmu") != bool(side):
            raise UserError(
                f"token at {end}: a PMU has sides, {unit}.write and {unit}.read; others have none"
            )
        if not 0 <= index < TOKENS:
            raise UserError(f"token at {end}: control ports are 0..{TOKENS - 1}, not {index}")
        return unit, index + SIDES.get(side, 0)

    def double_buffer(self, name: str, *, write_level: int, read_level: int, buffers: int = 2) -> None:
        """The sides of a PMU take turns at `buffers` parts of it: what is written once per event of `write_level` is
        read between two events of `read_level`. With one buffer they alternate."""
        self._known(name, "buffer")
        f = self._fields[name]
        f |= {
            "write_wait": f["write_wait"] | 1,
            "write_wait_level": write_level,
            "write_hold0": buffers,
            "write_signal": f["write_signal"] | 1,
            "write_signal_level": write_level,
            "read_wait": f["read_wait"] | 1,
            "read_wait_level": read_level,
            "read_signal": f["read_signal"] | 1,
            "read_signal_level": read_level,
        }
        self.token(f"{name}.write", 0, f"{name}.read", 0)
        self.token(f"{name}.read", 0, f"{name}.write", 0)

    def units(self, kind: str) -> list[str]:
        """Names of the units of a kind, in the order in which they came."""
        return [name for name, k in self._kinds.items() if k == kind]

    def fields(self, unit: str) -> dict[str, int]:
        """The configuration of a unit as it stands, to be changed before `build`."""
        self._known(unit, "fields of")
        return self._fields[unit]

    def _known(self, unit: str, what: str) -> None:
        if unit not in self._kinds:
            raise UserError(f"{what} {unit}: there is no such unit; {nearest(unit, self._kinds)}")

    # ---- to the machine -------------------------------------------------------------------------------

    @property
    def tags(self) -> tuple[str, ...]:
        """The section's own, which is its kernel's, and those of the units in the order in which they came."""
        return tuple(dict.fromkeys((_word(self.name), *self._tags.values())))

    def netlist(self) -> Netlist:
        """What placement and routing need; tokens are only kept short."""
        units = tuple(Unit(name, kind) for name, kind in self._kinds.items())
        streams = [
            Stream(f"{source} {network}", source, tuple(sinks), rate, network)
            for (source, network), (sinks, rate) in self._streams.items()
        ]
        wires = {(source, sink) for source, _, sink, _ in self._tokens if source != sink}
        streams += [
            Stream(f"{source} to {sink}", source, (Sink(sink),), Fraction(1, 64), "control")
            for source, sink in sorted(wires)
        ]
        return Netlist(units, tuple(streams))

    def build(
        self,
        *,
        seed: int = 0,
        at: Mapping[str, tuple[int, int]] | None = None,
        moves: int | None = None,
        turns: Turns = "acyclic",
        time_limit_s: float | None = None,
        remember: bool = True,
        like: Built | None = None,
        avoid: Mapping[str, Collection[tuple[str, int, int, int]]] | None = None,
    ) -> Built:
        """Place, route, and write the records.

        `at` keeps units at the switch (x, y). The result depends on the seed alone unless `time_limit_s` cuts the
        search short; places and routes are then not kept on disk, nor without `remember`. Raises UserError for what
        doesn't fit the machine. `like` is a section with all of the streams of this one, whose places and routes are kept;
        units that it lacks take any that are left, and streams from units in `avoid` are routed anew, not by these input ports,
        (network, x, y, port).
        """
        fabric = Fabric.of(self.params)
        netlist = self.netlist()
        if like is not None:
            placement = place(netlist, fabric, moves=0, pinned=like.placement.sites)
            routing = like.routing
            if avoid:
                bans = {source: sorted(ports) for source, ports in sorted(avoid.items())}
                before = [(r.stream.name, r.hops) for r in routing.routes.values()]
                routing = remembered(
                    repr((fabric, netlist, sorted(placement.sites.items()), before, bans)),
                    lambda: rerouted(netlist, fabric, placement, like.routing, bans),
                )
            records = self._records(fabric, placement, routing)
            return Built(self.name, netlist, fabric, placement, routing, records, self.tags)
        found = {(s.kind, s.x, s.y): i for i, s in enumerate(fabric.sites)}
        pinned = {}
        for unit, (x, y) in (at or {}).items():
            self._known(unit, "place of")
            if (self._kinds[unit], x, y) not in found:
                raise UserError(f"unit {unit}: there is no {self._kinds[unit]} at {x},{y}")
            pinned[unit] = found[self._kinds[unit], x, y]
        half = None if time_limit_s is None else time_limit_s / 2

        traffic = {name: self._traffic(name) for name in self.units("agcu")}
        channels = self.params.channels.tolist()

        def find() -> tuple[Placement, Routing]:
            placed = place(netlist, fabric, seed=seed, moves=moves, pinned=pinned, seconds=half)
            placed = balanced(netlist, fabric, placed, traffic, channels, pinned)
            return placed, route(netlist, fabric, placed, turns=turns, seconds=half)

        known = repr((fabric, netlist, seed, moves, turns, sorted(pinned.items()), traffic, channels))
        placement, routing = remembered(known, find) if remember and half is None else find()
        records = self._records(fabric, placement, routing)
        return Built(self.name, netlist, fabric, placement, routing, records, self.tags)

    def _traffic(self, gate: str) -> tuple[int, int]:
        """The memory of a gate, and the bytes that it moves."""
        f = self._fields[gate]
        steps = prod(f[f"count{n}"] for n in range(LEVELS)) if f["direction"] else 0
        return f["tier"], steps * f["words"] * rdu.ELEMENT_BYTES[f["format"]]

    def _records(self, fabric: Fabric, placement: Placement, routing: Routing) -> dict[str, np.ndarray]:
        tags = {tag: i for i, tag in enumerate(self.tags)}
        gates = fabric.sites_of("agcu")
        rows: dict[str, list[dict[str, int]]] = {record.region: [] for record in rdu.CONFIGS}
        for name, kind in self._kinds.items():
            site = placement.sites[name]
            x, y = fabric.sites[site].x, fabric.sites[site].y
            where = {"agcu": gates.index(site)} if kind == "agcu" else {"x": x, "y": y}
            flows = {
                field: routing.routes[f"{name} {network}"].flow
                for network, field in zip(NETWORKS, ("flow", "scalar_flow"), strict=True)
                if (name, network) in self._streams
            }
            rows[RECORDS[kind].region].append(
                self._fields[name] | where | flows | {"tag": tags[self._tags[name]]}
            )
            rows[rdu.CONFIG_STAGE.region] += [
                {**s, "x": x, "y": y, "stage": i} for i, s in enumerate(self._stages.get(name, ()))
            ]
        for r in routing.routes.values():
            rows[rdu.CONFIG_SWITCH.region] += [
                {
                    "x": hop.x,
                    "y": hop.y,
                    "network": NETWORKS.index(r.stream.network),
                    "port": hop.port,
                    "flow": hop.flow,
                    "out": sum(1 << out for out in hop.outs),
                    "next_flow": hop.next_flow,
                }
                for hop in r.hops
            ]
        for source, output, sink, index in self._tokens:
            a, b = (fabric.sites[placement.sites[unit]] for unit in (source, sink))
            rows[rdu.CONFIG_TOKEN.region].append(
                {
                    "x": a.x,
                    "y": a.y,
                    "from_agcu": int(a.kind == "agcu"),
                    "output": output,
                    "to_x": b.x,
                    "to_y": b.y,
                    "to_agcu": int(b.kind == "agcu"),
                    "input": index,
                }
            )
        assert len(MESH) == LOCAL and INPUTS >= max(fabric.inputs.values())
        return {
            record.region: _array(record, rows[record.region])
            for record in rdu.CONFIGS
            if rows[record.region]
        }


def segment(
    built: Built,
    *,
    args: Mapping[int, int] | None = None,
    index: int = 0,
    load: bool = True,
    host: bool = False,
    tag: str = "",
    tags: list[str] | None = None,
    repeat: int = 1,
) -> Segment:
    """A segment, number `index` of its program, that loads a section and its arguments, and executes it.

    Without `load` the configuration is that of the last section loaded. `host`: launched by the host's software. `tag` is
    the kernel's (the section's name, if not given). `tags`: those of the program, to which the section's are added where
    they are missing; without it the program's tags are `built.tags`.
    """
    tags = list(built.tags) if tags is None else tags
    own = _word(tag) or built.tags[0]
    for t in (own, *(built.tags if load else ())):
        if t not in tags:
            tags.append(t)
    number = {t: i for i, t in enumerate(tags)}
    regions: dict[str, np.ndarray] = {}
    if load:
        for region, records in built.records.items():
            regions[region] = records.copy()
            if "tag" in (records.dtype.names or ()):
                renumbered = np.array([number[t] for t in built.tags], np.int64)
                regions[region]["tag"] = renumbered[records["tag"]]
    if args:
        regions["args"] = _array(rdu.ARGS, [{"index": i, "value": v} for i, v in sorted(args.items())])
    kernel = number[own]
    code = [rdu.CODE.make("PROGRAM_LOAD", section=index, tag=kernel)] if load else []
    code += [rdu.CODE.make("ARGUMENT_LOAD", section=index, tag=kernel)] if args else []
    code += [rdu.CODE.make("KERNEL_EXECUTE", host=int(host), tag=kernel)]
    regions["code"] = np.concatenate(code)
    return Segment(regions, repeat, own, built.names if load else {})


def _word(tag: str) -> str:
    """A tag as assembler text spells it."""
    return tag.replace(" ", "_")


def _values(where: str, record: Record, fields: Mapping[str, int | str]) -> dict[str, int]:
    """All fields of a record, enumerations as numbers, addresses and strides modulo their range."""
    known = record.by_name
    out = {f.name: f.default for f in record.layout}
    for name, value in fields.items():
        if name not in known:
            raise UserError(f"{where}: unknown field {name}: {nearest(name, known)}")
        f = known[name]
        if isinstance(value, str):
            if value not in f.names:
                raise UserError(
                    f"{where}: {name} must be one of {', '.join(f.names) or 'the integers'}, not {value!r}"
                )
            value = f.names.index(value)
        number = int(value)
        if f.bits == rdu.ADDRESS_BITS and ("stride" in name or "base" in name) and not f.signed:
            number %= 1 << f.bits  # words of a PMU are counted modulo the address space
        if not f.low <= number <= f.high:
            raise UserError(f"{where}: {name} must be in {f.low}..{f.high}, not {value}")
        out[name] = number
    return out


def _array(record: Record, rows: Sequence[Mapping[str, Any]]) -> np.ndarray:
    out = np.zeros(len(rows), record.dtype)
    for f in record.layout:
        out[f.name] = [row.get(f.name, f.default) for row in rows]
    return out
