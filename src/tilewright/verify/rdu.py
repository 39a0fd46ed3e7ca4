"""The verification plan of target rdu: small grids, random timings, random sections, random numbers.

A section is drawn as pipelines: loads and scratchpads give streams; buffers, compute units and arrays lie between;
stores and scratchpads take what comes out. It has no race and what each unit gives fits what the next one takes, both
by construction. Whether units wait for one another for ever depends on places and routes, too: a section that the model
finds deadlocked is drawn anew.
"""

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from functools import cache
from itertools import pairwise
from math import prod
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright.arch import rdu as arch
from tilewright.arch import spec as specs
from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program, Segment
from tilewright.arch.rdu import INPUTS, LEVELS, MESH, RduParams
from tilewright.arch.timeline import Timeline
from tilewright.mappers.rdu.fabric import LOCAL, Fabric
from tilewright.mappers.rdu.section import Built, Section, segment
from tilewright.sim import rdu as sim
from tilewright.verify.engine import Case, Observed, Structure, document
from tilewright.workloads import rdu as meaning
from tilewright.workloads import rdu_kernels as kernels

if TYPE_CHECKING:
    from tilewright.rtl.cosim.cases import Outcome
    from tilewright.rtl.cosim.simulator import Build

SPEC = arch.RduSpec
ISA = arch.ISA
STRUCTURES = 5
PROGRAMS = 25
_BASE = "plasticine"
_TRACED = 1 << 10  # operations kept: all that a case has
_DEPTH = 128  # of the RTL's memories of code, and of records
_LINES = 256  # of each off-chip memory
_HALF = 96  # lines: a section reads in one such part and writes in the other; behind them is room for copies
_TRIES = 60  # sections drawn for one that ends

Image = Mapping[str, np.ndarray]
Rng = np.random.Generator

# ---- structures ---------------------------------------------------------------------------------------

_Shape = dict[str, str]  # keys of a spec


def _keys(text: str) -> _Shape:
    return dict(key.split("=") for key in text.split())


_DEFAULTS = _keys(
    "grid.columns=3 grid.rows=3 grid.dies=1 pcu.lanes=2 pcu.stages=2 pcu.registers=6 pcu.counters=4 "
    "pcu.vector_inputs=2 pcu.scalar_inputs=1 pcu.op_latency_cycles=1 pcu.systolic=true pcu.exp_terms=1 "
    "pcu.reciprocal_iterations=1 pcu.rsqrt_iterations=1 pmu.bytes=1024 pmu.banks=4 pmu.counters=4 "
    "network.fifo_depth=4 network.hop_cycles=1 network.credit_cycles=1 network.die_hop_cycles=1 "
    "network.token_cycles=1 network.flows=8 network.order=xy agcu.per_side=2 agcu.counters=3 agcu.in_flight=4 "
    "memory.hbm.channels=2 node.copy_lines=2"
)
# Bank groups, banks of each, lines of a row.
_BANKS = {"hbm": (2, 2, 2), "ddr": (1, 2, 4)}
# Two lanes and four; one stage to three; arrays or none; one scalar input, two, none; queues shorter and longer than a
# credit's way; two dies; both dimension orders; few loads in flight and many; operators of several ticks. The last
# one is small: RTL of its own, as faults need it, is built in little time.
_SHAPES = (
    "network.fifo_depth=3 agcu.in_flight=2",
    (
        "grid.columns=4 grid.dies=2 pcu.lanes=4 pcu.stages=3 pcu.registers=8 pcu.counters=5 pcu.vector_inputs=4 "
        "pcu.scalar_inputs=2 pcu.systolic=false pmu.banks=8 network.credit_cycles=2 network.die_hop_cycles=3 "
        "network.order=yx agcu.in_flight=12"
    ),
    (
        "grid.rows=4 pcu.lanes=4 pcu.vector_inputs=3 pcu.op_latency_cycles=2 pmu.banks=2 network.hop_cycles=2 "
        "network.token_cycles=3 agcu.per_side=3 node.copy_lines=1"
    ),
    (
        "grid.columns=4 grid.rows=4 pcu.stages=1 pcu.registers=5 pcu.scalar_inputs=0 pcu.exp_terms=2 "
        "pcu.reciprocal_iterations=0 pmu.bytes=512 network.fifo_depth=1 network.flows=4"
    ),
    (
        "pcu.stages=1 pcu.counters=6 pcu.systolic=false pcu.op_latency_cycles=3 pcu.reciprocal_iterations=0 "
        "pcu.rsqrt_iterations=0 pmu.counters=6 network.fifo_depth=2"
    ),
)


def structures(count: int, seed: int) -> list[Structure]:
    """`count` sockets: the fixed list first, then random ones from `seed`."""
    shapes = [_keys(text) for text in _SHAPES[:count]]
    rng = np.random.default_rng((seed, 13))
    while len(shapes) < count:
        lanes, stages, columns = int(rng.choice([2, 4])), int(rng.integers(1, 4)), int(rng.integers(3, 5))
        ranges = {
            "grid.rows": (3, 5),
            "pcu.op_latency_cycles": (1, 4),
            "pcu.registers": (5, 9),
            "pcu.scalar_inputs": (0, 2),
            "pcu.vector_inputs": (2, 4),
            "pcu.exp_terms": (1, 3),
            **{f"network.{name}_cycles": (1, 4) for name in ("hop", "credit", "die_hop", "token")},
            "network.fifo_depth": (1, 6),
            "agcu.in_flight": (1, 10),
            "pcu.rsqrt_iterations": (0, 2),
            "memory.hbm.channels": (1, 4),
            "node.copy_lines": (1, 4),
        }
        chosen = {
            "grid.columns": columns,
            "grid.dies": 2 if columns == 4 and rng.integers(0, 2) else 1,
            "pcu.lanes": lanes,
            "pcu.stages": stages,
            "pcu.systolic": "true" if stages <= lanes and rng.integers(0, 2) else "false",
            "pmu.banks": rng.choice([2, 4, 8]),
            "network.order": rng.choice(["xy", "yx"]),
        }
        chosen |= {key: rng.integers(*ends) for key, ends in ranges.items()}
        shapes.append({key: str(value) for key, value in chosen.items()})
    return [_structure({**_DEFAULTS, **shape}) for shape in shapes]


def _structure(shape: _Shape) -> Structure:
    line, channels = 4 * int(shape["pcu.lanes"]), int(shape["memory.hbm.channels"])
    sets = [f"{key}={value}" for key, value in shape.items()]
    for tier in ("hbm", "ddr"):
        sets += [f"memory.{tier}.bytes={_LINES * line}", f"memory.{tier}.efficiency=1"]
    sets += _timing_sets(channels, line, [Fraction(1)] * 4, [3, 5, 4], [0, 0, 0, 0])
    for tier, (groups, banks, columns) in _BANKS.items():
        sets += [f"memory.{tier}.dram.bank_groups={groups}", f"memory.{tier}.dram.banks_per_group={banks}"]
        sets.append(f"memory.{tier}.dram.row_bytes={columns * line}")
        sets += _dram_sets(tier, {**dict.fromkeys(arch.DRAM_TIMINGS, 1), "refi": 9})
    spec = _build(specs.apply_sets(_base(), [*sets, "name=small"]), "small")
    g, c = spec.grid, spec.pcu
    body = "arrays" if c.systolic else "pipelines"
    network = f"queues of {spec.network.fifo_depth}, {spec.agcu.in_flight} loads"
    return Structure(f"{g.columns} x {g.rows}, {body} of {c.lanes} x {c.stages}, {network}", spec)


def _timing_sets(
    channels: int, line: int, rates: Sequence[Fraction], latencies: Sequence[int], launches: Sequence[int]
) -> list[str]:
    """Rates of a channel of each tier and of the DMA, latencies of tiers, and launches, in ticks of a nanosecond."""
    bandwidth = [rates[0] * channels * line, rates[1] * line, rates[2] * line]
    names = ("program_load_us", "argument_load_us", "host_launch_us", "hardware_launch_us")
    return [
        f"memory.hbm.gb_per_s={bandwidth[0]}",
        *("memory.ddr.channels=1", f"memory.ddr.gb_per_s={bandwidth[1]}"),
        *("node.p2p_channels=1", f"node.p2p_gb_per_s={bandwidth[2]}"),
        f"memory.hbm.latency_ns={latencies[0]}",
        *(f"memory.ddr.latency_ns={latencies[1]}", f"node.p2p_latency_ns={latencies[2]}"),
        *(f"launch.{name}={Fraction(ticks, 1000)}" for name, ticks in zip(names, launches, strict=True)),
    ]


def _dram_sets(tier: str, ticks: Mapping[str, int]) -> list[str]:
    """Timings of banks, in ticks of a nanosecond."""
    return [f"memory.{tier}.dram.{name}_ns={value}" for name, value in ticks.items()]


def _banks(rng: Rng, tier: str, latency: int) -> list[str]:
    """A tier with random timings of its banks, half of the time in use."""
    ticks = {name: int(rng.integers(1, 7)) for name in arch.DRAM_TIMINGS}
    ticks |= {name: int(rng.integers(1, 14)) for name in ("ahead", "ras", "wtp", "wtr", "rfc")}
    ticks["rcd"] = min(ticks["rcd"], latency - 1) or 1
    ticks["refi"] = ticks["rp"] + ticks["rfc"] + int(rng.integers(1, 60))
    used = latency > ticks["rcd"] and rng.integers(0, 2)
    return [f"memory.{tier}.channel={'dram' if used else 'port'}", *_dram_sets(tier, ticks)]


def _timed(spec: arch.RduSpec, rng: Rng, number: int) -> arch.RduSpec:
    """The structure with random rates, latencies and launches: what registers hold."""

    def rate() -> Fraction:
        return Fraction(int(rng.integers(1, 8)), int(rng.integers(8, 20)))

    rates = [Fraction(1) if number % 3 == 0 or not rng.integers(0, 3) else rate() for _ in range(4)]
    latencies = [int(rng.integers(1, 30)) for _ in range(3)]
    launches = [int(rng.integers(0, 12)) for _ in range(4)]
    line = spec.line_bytes
    sets = _timing_sets(spec.memory.hbm.channels, line, rates, latencies, launches)
    for tier, latency in zip(_BANKS, latencies, strict=False):
        sets += _banks(rng, tier, latency)
    beat = spec.node.copy_lines * line
    return _build(
        specs.apply_sets(_tree(spec), [*sets, f"node.ddr_to_hbm_gb_per_s={rates[3] * beat}"]), "small"
    )


@cache
def _base() -> specs.Tree:
    return specs.load_tree(_BASE, ["rdu"])


def _build(tree: specs.Tree, name: str) -> arch.RduSpec:
    spec = specs.build(SPEC, tree, name)
    assert isinstance(spec, arch.RduSpec)
    return spec


def _tree(spec: arch.RduSpec) -> specs.Tree:
    return specs.parse_yaml(json.dumps(document(spec)), spec.name)


def scaled(spec: arch.RduSpec) -> tuple[Structure, list[str]]:
    """The spec with at most 4 x 4 positions of 4 lanes and 3 stages, and little memory; rates and latencies stay."""
    g, c, p = spec.grid, spec.pcu, spec.params()
    most = _keys(
        "grid.columns=4 grid.rows=4 pcu.lanes=4 pcu.stages=3 pcu.registers=8 pcu.exp_terms=2 pmu.banks=8 "
        "pmu.bytes=1024 network.flows=8 agcu.per_side=2 agcu.in_flight=64"
    )
    now = {key: int(value) for key, value in spec.leaves() if key in most}
    new = {key: min(value, int(most[key])) for key, value in now.items()}
    new["grid.columns"] += -new["grid.columns"] % g.dies
    new["pcu.registers"] = max(new["pcu.registers"], min(INPUTS + c.scalar_inputs, c.registers))
    smaller = [
        f"{key.split('.')[1]} {now[key]} to {value}" for key, value in new.items() if now[key] != value
    ]
    line = 4 * new["pcu.lanes"]
    sets = [f"{key}={value}" for key, value in new.items()]
    for tier in ("hbm", "ddr"):
        sets += [f"memory.{tier}.bytes={_LINES * line}", f"memory.{tier}.efficiency=1"]
    for name, memory in (("hbm", spec.memory.hbm), ("ddr", spec.memory.ddr)):
        if memory.dram is not None:
            sets.append(f"memory.{name}.dram.row_bytes={memory.dram.row_bytes // spec.line_bytes * line}")
    tiers = ("memory.hbm.gb_per_s", "memory.ddr.gb_per_s", "node.p2p_gb_per_s")
    per_byte = 10**9 * spec.tick.period_s
    for key, rate, channels in zip(tiers, spec.line_rates, p.channels.tolist(), strict=True):
        sets.append(f"{key}={rate * channels * line / per_byte}")
    sets.append(f"node.ddr_to_hbm_gb_per_s={spec.copy_rate * spec.node.copy_lines * line / per_byte}")
    small = _build(specs.apply_sets(_tree(spec), [*sets, "name=small"]), "small")
    notes = [f"scaled to what RTL simulates: {', '.join(smaller)}; timings kept"] if smaller else []
    return Structure(f"{spec.name}, scaled", small, keep_timing=True), notes


# ---- sections -----------------------------------------------------------------------------------------


def _split(rng: Rng, total: int, levels: int) -> list[int]:
    """Loop counts, the innermost first, whose product is `total`."""
    out = []
    for _ in range(levels - 1):
        out.append(int(rng.choice([d for d in range(1, total + 1) if total % d == 0])))
        total //= out[-1]
    return [*out, total]


def _counts(values: Sequence[int], prefix: str = "") -> dict[str, int]:
    return {f"{prefix}count{n}": value for n, value in enumerate(values)}


@dataclass(eq=False)
class _Stream:
    """What a unit gives: packets, by which network, and the names of inputs that it leads to."""

    unit: str
    packets: int
    network: str = "vector"
    sinks: list[tuple[str, int]] = field(default_factory=list)
    needed: bool = True  # it must lead somewhere; what a PCU gives need not


class _Draft:
    """A random section in the making."""

    def __init__(self, p: RduParams, rng: Rng, name: str, written: int):
        """It writes in part `written` (0 or 1) of off-chip memory, and reads in the other."""
        self.p, self.rng = p, rng
        self.section = Section(p, name)
        self.free = {"pcu": p.pcus, "pmu": p.pmus, "agcu": 2 * p.agcus_per_side}
        self.streams: list[_Stream] = []  # that may lead on
        self.done: list[_Stream] = []
        self.line = p.lanes * arch.WORD_BITS // 8
        self.begins = {tier: _HALF * written * self.line for tier in arch.TIERS}
        self.reads_at = _HALF * (1 - written) * self.line
        self.args: dict[int, int] = {}
        self.moves: dict[int, int] = {}  # by how much an argument may grow, and its grain
        self.grains: dict[int, int] = {}
        self.stores: list[tuple[str, dict[str, Any]]] = []
        self.tags = ["", *(f"op{i}" for i in range(3))]
        self.total = 8 * int(rng.integers(1, 4)) if rng.integers(0, 3) else int(rng.integers(1, 25))

    def pick(self, *values: Any) -> Any:
        return values[int(self.rng.integers(0, len(values)))]

    def chance(self, share: float) -> bool:
        return bool(self.rng.random() < share)

    def take(self, kind: str) -> str:
        """A name for a unit of that kind."""
        self.free[kind] -= 1
        return f"{kind}{self.free[kind]}"

    def room(self, units: int, streams: int = 0) -> bool:
        """Whether, with so many units and streams more, every stream can still end at a unit of its own."""
        waiting = sum(s.needed and not s.sinks for s in self.streams) + streams
        return sum(self.free.values()) - units >= waiting

    def lead(self, stream: _Stream, unit: str, index: int = 0) -> None:
        """To that input; sometimes it may lead to others, too."""
        stream.sinks.append((unit, index))
        if not self.chance(0.25):
            self.close(stream)

    def close(self, stream: _Stream) -> None:
        if stream in self.streams:
            self.streams.remove(stream)
            self.done.append(stream)

    def common(self) -> dict[str, Any]:
        """Fields of what leaves."""
        sequence = self.pick((0, 1), (0, 1), (7, 3), (65535, 1))
        return {
            "sequence": sequence[0],
            "sequence_step": sequence[1],
            "last_level": self.pick(0, 1, 2, 7),
            "tag": self.pick(*self.tags),
        }

    def throttle(self, prefix: str = "") -> dict[str, int]:
        return {f"{prefix}interval": self.pick(1, 1, 1, 1, 2, 3, 7)}

    # ---- off-chip memory ------------------------------------------------------------------------------

    def gate(self, direction: str, values: Sequence[int], **fields: Any) -> str:
        """An AGCU of these loop counts; its elements lie in the part of memory that suits the direction."""
        name, index = self.take("agcu"), len(self.args)
        how = self.pick("word", "word", "bf16")
        words = self.pick(self.p.lanes, self.p.lanes, int(self.rng.integers(1, self.p.lanes + 1)))
        used = words * (4 if how == "word" else 2)
        grain = 1 << (used - 1).bit_length()  # a power of two, so that no iteration is in two lines
        strides: list[int] = []
        extent: list[int] = []
        for count in values:
            stride = grain * self.pick(0, 1, 1, 2, 3, -1, self.line // grain)
            if count > 1 and sum(extent) + abs(stride) * (count - 1) > (_HALF // 5) * self.line:
                stride = 0
            strides.append(stride)
            extent.append(abs(stride) * (count - 1))
        below = sum(e for e, s in zip(extent, strides, strict=True) if s < 0)
        size = -(-(sum(extent) + grain) // self.line) * self.line
        tier = self.pick("hbm", "hbm", "ddr", "remote")
        slack = self.line * self.pick(0, 1, 2)
        if direction == "store":
            first = self.begins[tier]
            self.begins[tier] += size + slack
        else:
            first = self.reads_at + self.line * int(
                self.rng.integers(0, _HALF - (size + slack) // self.line + 1)
            )
        self.args[index], self.moves[index], self.grains[index] = first + below, slack, grain
        given = {
            "direction": direction,
            "tier": tier,
            "argument": index,
            "words": words,
            "format": how,
            **{f"stride{n}": s for n, s in enumerate(strides)},
            **_counts(values),
            **self.throttle(),
            **self.common(),
            **fields,
        }
        self.section.agcu(name, **given)
        if direction == "store":
            self.stores.append((name, given))
        return name

    def load(self) -> None:
        """Packets from memory."""
        values = _split(self.rng, self.total, self.p.agcu_counters)
        self.streams.append(_Stream(self.gate("load", values), self.total))

    def load_again(self) -> None:
        """What a store has written, behind its last line."""
        store, fields = self.pick(*self.stores)
        if self.section.fields(store)["signal"]:
            return
        name = self.take("agcu")
        given = {**fields, "direction": "load", "wait": 4, "wait_level": 7, **self.common()}
        self.section.agcu(name, **given)
        self.section.fields(store).update(signal=1, signal_level=7)
        self.section.token(store, 0, name, 2)
        values = [fields[f"count{n}"] for n in range(self.p.agcu_counters)]
        self.streams.append(_Stream(name, prod(values)))

    # ---- scratchpads ----------------------------------------------------------------------------------

    @property
    def words(self) -> int:
        return self.p.banks * self.p.bank_words

    def bank_bits(self) -> dict[str, int]:
        bits = self.p.banks.bit_length() - 1
        total = self.words.bit_length() - 1
        if self.chance(0.6):
            return {}
        chosen = sorted(self.rng.choice(total, bits, replace=False).tolist())
        out = {f"bank_bit{i}": b for i, b in enumerate(chosen)}
        if self.chance(0.4):
            skew = int(self.rng.integers(1, bits + 1))
            out |= {"skew_bits": skew, "skew_shift": int(self.rng.integers(chosen[skew - 1] + 1, total + 1))}
        return out

    def pattern(self, prefix: str, values: Sequence[int], room: int) -> dict[str, int]:
        """Strides of the loops such that all addresses are below `room`."""
        lane = self.pick(1, 1, 1, 0, 2, self.p.banks)
        if lane * (self.p.lanes - 1) >= room:
            lane = 1
        out, left = {f"{prefix}lane_stride": lane}, room - 1 - lane * (self.p.lanes - 1)
        for n, count in enumerate(values):
            most = left // (count - 1) if count > 1 else 0
            stride = min(
                most, self.pick(self.p.lanes, self.p.lanes, 1, 3, 2 * self.p.lanes, self.p.banks, most)
            )
            out[f"{prefix}stride{n}"] = stride
            left -= stride * (count - 1)
        return out

    def source(self) -> None:
        """What a scratchpad has held before; addresses may go beyond what is held."""
        name, values = self.take("pmu"), _split(self.rng, self.total, self.p.pmu_counters)
        held = self.pick(self.words, self.words, self.words // 2)
        given = {
            "enable": 2,
            "low": self.pick(0, 0, 5),
            "words": held,
            **_counts(values, "read_"),
            **self.pattern("read_", values, self.words),
            **self.throttle("read_"),
            **self.bank_bits(),
            **self.common(),
        }
        self.section.pmu(name, **given)
        if not self.packets_of(name):
            self.section.fields(name).update(low=0, words=self.words)
        self.read_by(name)

    def packets_of(self, name: str) -> int:
        """How many a scratchpad gives."""
        fields = self.section.fields(name)
        where = kernels.addresses(fields, "read", self.p.lanes)
        return int(kernels.place(fields, where, self.p.banks)[0].any(axis=1).sum())

    def read_by(self, name: str) -> _Stream:
        """The stream of a scratchpad."""
        stream = _Stream(name, self.packets_of(name))
        self.streams.append(stream)
        return stream

    def sink(self, stream: _Stream) -> None:
        """A scratchpad that keeps what comes."""
        name, values = self.take("pmu"), _split(self.rng, stream.packets, self.p.pmu_counters)
        given = {
            "enable": 1,
            "write_base": self.pick(0, 0, 9, (1 << 24) - 5),
            "words": self.pick(self.words, 11),
            **_counts(values, "write_"),
            **self.pattern("write_", values, self.words),
            "sequence_scale": self.pick(0, 1, 1, 3),
            **self.throttle("write_"),
            **self.bank_bits(),
            **self.common(),
        }
        self.section.pmu(name, **given)
        self.lead(stream, name)

    def buffer(self, stream: _Stream) -> None:
        """A scratchpad written and read tile by tile, one to three of them at a time."""
        p, n = self.p, stream.packets
        buffers = self.pick(1, 2, 2, 3)
        tiles = self.pick(*(t for t in range(1, n + 1) if n % t == 0))
        if tiles % buffers:
            buffers = 1
        room = self.words >> (buffers - 1).bit_length()
        inner = p.pmu_counters - 2
        write = _split(self.rng, n // tiles, inner)
        again = self.pick(n // tiles, n // tiles, int(self.rng.integers(1, 7)))
        read = _split(self.rng, again, inner)
        turns = [buffers, tiles // buffers]
        given: dict[str, Any] = {"enable": 3}
        pitch = 1 << max(p.banks.bit_length() - 1, (p.lanes - 1).bit_length())
        if self.chance(0.3) and (max(n // tiles, p.lanes)) * pitch <= room and again <= pitch:
            # Rows are written and columns read, or the other way round: neither meets a bank twice.
            rows = {"stride0": pitch, "lane_stride": 1}, {"stride0": 1, "lane_stride": pitch}
            rows = rows if self.chance(0.5) or n // tiles > pitch else rows[::-1]
            write, read = [n // tiles, *[1] * (inner - 1)], [again, *[1] * (inner - 1)]
            for prefix, fields in zip(("write_", "read_"), rows, strict=True):
                given |= {f"{prefix}{key}": value for key, value in fields.items()}
            given |= {"skew_bits": p.banks.bit_length() - 1, "skew_shift": pitch.bit_length() - 1}
        else:
            given |= {
                **self.pattern("write_", write, room),
                **self.pattern("read_", read, room),
                **self.bank_bits(),
            }
        for prefix, values in (("write_", write), ("read_", read)):
            given |= _counts([*values, *turns], prefix)
            given |= {f"{prefix}stride{inner}": room, **self.throttle(prefix)}
        name = self.take("pmu")
        self.section.pmu(name, **given, **self.common())
        self.section.double_buffer(name, write_level=inner, read_level=inner, buffers=buffers)
        self.lead(stream, name)
        self.read_by(name)
        fields = self.section.fields(stream.unit)
        outer = [fields[f"count{k}"] for k in range(LEVELS)] if "direction" in fields else []
        for level in range(LEVELS + 1 if outer else 0):
            # A load that has tiles, too, waits until there is room for the next one.
            if prod(outer[level:]) == tiles and not fields["wait"] and self.chance(0.5):
                fields.update(wait=2, wait_level=level, hold1=buffers)
                self.section.fields(name)["read_signal"] |= 2
                self.section.token(f"{name}.read", 1, stream.unit, 1)
                break

    def span(self, stream: _Stream) -> None:
        """A range over two scratchpads: both are told all addresses, and drop what the other one holds. What they
        read comes together in a third one, ordered by sequence ids."""
        p, n = self.p, stream.packets
        border = int(self.rng.integers(1, n * p.lanes))
        values = _split(self.rng, n, p.pmu_counters)
        strides = {f"stride{k}": p.lanes * prod(values[:k]) for k in range(p.pmu_counters)}
        target, first = self.take("pmu"), 0
        for low, words in ((0, border), (border, self.words)):
            name = self.take("pmu")
            given: dict[str, Any] = {"enable": 3, "low": low, "words": words}
            for prefix in ("write_", "read_"):
                given |= _counts(values, prefix) | {f"{prefix}{k}": v for k, v in strides.items()}
                given |= self.throttle(prefix)
            self.section.pmu(name, **given, tag=self.pick(*self.tags))
            self.section.double_buffer(name, write_level=7, read_level=7, buffers=1)
            stream.sinks.append((name, 0))
            part = self.read_by(name)
            self.section.fields(name).update(sequence=first, sequence_step=1)
            first += part.packets
            part.sinks.append((target, 0))
            self.close(part)
        self.close(stream)
        scale = self.pick(p.lanes, p.lanes + 1)
        again = _split(self.rng, self.pick(first, 3), p.pmu_counters)
        fields: dict[str, Any] = {
            "enable": 3,
            "write_count0": first,
            "sequence_scale": scale,
            "write_lane_stride": 1,
            **_counts(again, "read_"),
            **self.pattern("read_", again, self.words),
            **self.bank_bits(),
            **self.common(),
        }
        self.section.pmu(target, **fields)
        self.section.double_buffer(target, write_level=7, read_level=7, buffers=1)
        self.read_by(target)

    # ---- compute units --------------------------------------------------------------------------------

    def compute(self, stream: _Stream) -> None:
        """A PCU that takes a stream, and others that it finds a loop for."""
        p = self.p
        vector = stream.network == "vector"
        repeat = self.pick(1, 1, 1, 1, 2, 3) if vector else self.pick(1, 2, 4)
        total = stream.packets * repeat
        values = _split(self.rng, stream.packets, p.counters - (repeat > 1))
        values = [repeat, *values] if repeat > 1 else values
        events = [prod(values[level:]) for level in range(LEVELS + 1)]
        inputs: dict[str, list[tuple[_Stream, int]]] = {"vector": [], "scalar": []}
        inputs[stream.network].append((stream, events.index(stream.packets)))
        others = [s for s in self.streams if s is not stream and s.packets in events]
        array = p.systolic and vector and self.chance(0.8) and repeat == 1
        pairs = [s for s in others if s.network == "vector" and s.packets == total]
        array = array and bool(pairs) and p.vector_inputs > 1
        if array:
            inputs["vector"].append((self.pick(*pairs), 0))
        else:
            self.rng.shuffle(others)
            most = {"vector": p.vector_inputs, "scalar": p.scalar_inputs}
            for other in others:
                if len(inputs[other.network]) < most[other.network] and self.chance(0.7):
                    inputs[other.network].append((other, events.index(other.packets)))
        name = self.take("pcu")
        fields: dict[str, Any] = {
            "mode": "systolic" if array else "simd",
            **_counts(values),
            **self.throttle(),
            **self.common(),
        }
        for network, given in inputs.items():
            fields[f"{network}s"] = (1 << len(given)) - 1
            fields |= {f"{network}{i}_level": level for i, (_, level) in enumerate(given)}
        level = int(self.rng.integers(0, p.counters + 1))
        packets = total
        if array:
            level = self.pick(0, 1, level)
            fields |= {"fold": self.pick("none", "add"), "fold_level": level}
            packets = events[level] * p.stages
        elif self.chance(0.35):
            fields |= {"fold": self.pick("add", "maximum", "minimum"), "fold_level": level}
            packets = events[level]
        fields |= {"fold_type": self.pick("fp32", *arch.TYPES), "round": self.pick(0, 0, 1)}
        fields["function"] = self.pick("none", "none", *arch.FUNCTIONS)
        if not array and self.chance(0.4):
            fields["tree"] = self.pick("add", "add", "maximum", "minimum")
        if not array and "fold" not in fields and "tree" not in fields and self.chance(0.4):
            fields |= {"gated": 1, "gate": int(self.rng.integers(0, p.registers))}
        fields["result"] = int(self.rng.integers(0, p.registers)) if self.chance(0.3) else 0
        stages = [self.stage(fields["result"]) for _ in range(int(self.rng.integers(0, p.stages + 1)))]
        if not array and self.chance(0.3):  # sums of what came in, whose order shows
            fields |= {
                "tree": self.pick("none", "add", "add"),
                "fold_type": self.pick("fp32", "bf16"),
                "result": 0,
            }
            fields |= {"fold": "add", "fold_level": level, "function": "none", "round": 0, "gated": 0}
            stages, packets = [], events[level]
        self.section.pcu(name, stages=stages, **fields)
        for given in inputs.values():
            for i, (taken, _) in enumerate(given):
                self.lead(taken, name, i)
        self.streams.append(_Stream(name, packets, needed=False))
        if p.scalar_inputs and self.chance(0.6):
            self.streams.append(_Stream(name, packets, "scalar", needed=False))

    def stage(self, result: int) -> dict[str, Any]:
        registers = self.p.registers
        out: dict[str, Any] = {
            "operation": self.pick(*arch.STAGE_OPS[1:], *arch.STAGE_OPS),
            "type": self.pick(*arch.TYPES),
            "c": int(self.rng.integers(0, registers)),
            "constant": self.pick(
                1, 3, 0x3F800000, 0xC0200000, 0x00FF00FF, int(self.rng.integers(0, 1 << 32))
            ),
            "to": self.pick(result, result, int(self.rng.integers(0, registers))),
        }
        for operand in "ab":
            kind = self.pick("register", "register", "register", *arch.OPERANDS)
            most = {"register": registers, "counter": self.p.counters}.get(kind, 1)
            out |= {
                f"{operand}_from": kind,
                operand: int(self.rng.integers(0, most)) if self.chance(0.6) else 0,
            }
        return out

    def swallow(self, stream: _Stream) -> None:
        """A PCU that takes a stream and gives nothing."""
        name = self.take("pcu")
        values = _split(self.rng, stream.packets, self.p.counters)
        fields: dict[str, Any] = {f"{stream.network}s": 1, **_counts(values), **self.throttle()}
        self.section.pcu(name, mode="simd", tag=self.pick(*self.tags), **fields)
        self.lead(stream, name)

    def store(self, stream: _Stream) -> None:
        values = _split(self.rng, stream.packets, self.p.agcu_counters)
        fields = {"signal": 8, "signal_level": self.pick(1, 7)} if self.chance(0.2) else {}
        self.lead(stream, self.gate("store", values, **fields))

    # ---- the whole ------------------------------------------------------------------------------------

    def draw(self) -> None:
        """Units and streams."""
        for _ in range(self.pick(1, 2, 2, 3)):
            for make, kind in ((self.load, "agcu"), (self.source, "pmu")):
                if self.free[kind] and self.room(1, 1) and self.chance(0.75):
                    make()
        if not self.streams:
            self.load()
        for _ in range(int(self.rng.integers(2, 12))):
            if not self.streams:
                break
            stream = self.pick(*self.streams)
            kind = self.pick("compute", "compute", "compute", "buffer", "buffer", "span", "store", "again")
            vector = stream.network == "vector"
            if kind == "compute" and self.free["pcu"] and self.room(1):
                self.compute(stream)
            elif kind == "buffer" and vector and self.free["pmu"] and self.room(1, 1):
                self.buffer(stream)
            elif (
                kind == "span"
                and vector
                and self.free["pmu"] > 2
                and self.room(3, 2)
                and 1 < stream.packets * self.p.lanes <= self.words
                and not stream.sinks
            ):
                self.span(stream)
            elif kind == "store" and vector and self.free["agcu"] and self.room(1, int(not stream.sinks)):
                self.store(stream)
            elif kind == "again" and self.stores and self.free["agcu"] and self.room(1, 1):
                self.load_again()
        for stream in list(self.streams):
            self.end(stream)
        for stream in (*self.done, *self.streams):
            if stream.sinks:
                rate = Fraction(1, self.pick(1, 2, 4))
                self.section.stream(
                    stream.unit, *dict.fromkeys(stream.sinks), network=stream.network, rate=rate
                )
        self.wait_for_ends()

    def end(self, stream: _Stream) -> None:
        """Somewhere for what has no sink yet, or for a result."""
        vector = stream.network == "vector"
        ends: list[tuple[str, Callable[[_Stream], None]]] = [("pcu", self.swallow)]
        if not vector and not self.p.scalar_inputs:
            return
        if vector:
            ends += [("agcu", self.store), ("agcu", self.store), ("pmu", self.sink)]
        ends = [(kind, make) for kind, make in ends if self.free[kind]]
        wanted = not stream.sinks and (stream.needed or self.chance(0.9))
        spare = self.room(1) and (wanted or self.chance(0.2))
        if ends and (spare or (wanted and stream.needed)):
            _, make = ends[int(self.rng.integers(0, len(ends)))]
            make(stream)

    def wait_for_ends(self) -> None:
        """Now and then a unit begins when another one has ended."""
        section = self.section
        units = [(n, section.fields(n)) for n in section.units("pcu")]
        loads = [(n, section.fields(n)) for n in section.units("agcu") if section.fields(n)["direction"] == 1]
        if len(units) > 1 and self.chance(0.4):
            (source, a), (sink, b) = units[0], self.pick(*units[1:], *loads[1:])
            if not b["wait"]:
                a.update(signal=4, signal_level=7)
                b.update(wait=8, wait_level=7)
                section.token(source, 2, sink, 3)

    def pins(self) -> dict[str, tuple[int, int]]:
        """Places of some units."""
        out: dict[str, tuple[int, int]] = {}
        for kind in ("pcu", "pmu", "agcu"):
            sites = [s for s in Fabric.of(self.p).sites if s.kind == kind]
            for name in self.section.units(kind):
                if self.chance(0.25):
                    site = sites.pop(int(self.rng.integers(0, len(sites))))
                    out[name] = site.x, site.y
        return out


def _dynamic(built: Built, rng: Rng) -> Built:
    """Some streams with one unit at their end find their own way."""
    local = {name: built.fabric.sites[site] for name, site in built.placement.sites.items()}
    for r in built.routing.routes.values():
        sink = r.stream.sinks[0]
        site = local[sink.unit]
        if len(r.stream.sinks) > 1 or site.port < LOCAL or rng.random() < 0.8:
            continue
        source = local[r.stream.source]
        region = f"config.{source.kind}"
        records = built.records[region]
        if source.kind == "agcu":
            mine = records["agcu"] == built.fabric.sites_of("agcu").index(
                built.placement.sites[r.stream.source]
            )
        else:
            mine = (records["x"] == source.x) & (records["y"] == source.y)
        name = "flow" if r.stream.network == "vector" else "scalar_flow"
        records[name][mine] = arch.dynamic_flow(site.x, site.y, sink.input)
    return built


def _section(p: RduParams, rng: Rng, name: str, written: int) -> tuple[_Draft, Built]:
    """A section that fits the machine and comes to an end."""
    for _ in range(_TRIES):
        draft = _Draft(p, rng, name, written)
        draft.draw()
        seed, turns = int(rng.integers(0, 1 << 30)), draft.pick("acyclic", "acyclic", "odd-even", "xy", "yx")
        try:
            built = draft.section.build(seed=seed, at=draft.pins(), moves=300, turns=turns, remember=False)
        except UserError as error:
            if "flow id" not in str(error):  # too many streams through one switch
                raise
            continue
        built = _dynamic(built, rng)
        try:
            sim.execute(p, built.records, draft.args)
        except UserError as error:
            if "deadlock" not in str(error):
                raise
            continue
        return draft, built
    raise AssertionError(f"none of {_TRIES} random sections comes to an end")


# ---- programs -----------------------------------------------------------------------------------------


def _copy(p: RduParams, rng: Rng, written: int, where: int) -> np.ndarray:
    """A COPY into the room for copies, from the part that the section at work does not write."""
    lines = int(rng.integers(0, 9))
    source, target = (int(t) for t in rng.integers(0, 2, 2))
    first = _HALF * (1 - written) + int(rng.integers(0, _HALF - lines))
    to = 2 * _HALF + 10 * where + int(rng.integers(0, 2))
    fields = {"source": source, "target": target, "from": first, "to": to, "lines": lines}
    return arch.CODE.make("COPY", **fields)


def _program(p: RduParams, rng: Rng, number: int) -> str:
    """A random program; its number decides some of what it shows."""
    if number == 3:
        return "# nothing to do\n"
    tags: list[str] = []
    segments: list[Segment] = []
    records, copies, now = 0, 0, 0
    for k in range(int(rng.integers(1, 4))):
        written = k % 2
        draft, built = _section(p, rng, f"section{k}", written)
        size = sum(len(rows) for rows in built.records.values())
        if records + size > _DEPTH:
            break
        records += size
        code: list[np.ndarray] = []
        under_way = copies < 6 and rng.random() < 0.5
        if under_way:
            for _ in range(int(rng.integers(1, 3))):
                code.append(_copy(p, rng, written, copies))
                copies += 1
        host = bool(rng.integers(0, 2))
        index = len(segments)
        made = segment(built, args=draft.args, index=index, host=host, tags=tags)
        code.append(made.regions["code"])
        if rng.random() < 0.3:
            code.append(arch.CODE.make("KERNEL_EXECUTE", tag=int(code[-1]["tag"][0]), host=int(not host)))
        if under_way or rng.random() < 0.2:
            code.append(arch.CODE.make("WAIT"))
        joined = np.concatenate(code)
        for row in joined:
            if rng.random() < 0.15:
                now += int(rng.integers(1, 300))
                row["not_before"] = now if rng.random() < 0.7 else int(rng.integers(1, 9))
        repeat = 2 if number % 4 == 2 and not under_way else 1
        segments.append(Segment({**made.regions, "code": joined}, repeat, f"part{k}"))
        if rng.random() < 0.5:  # the same section with other arguments
            args = {
                i: value + draft.grains[i] * int(rng.integers(0, draft.moves[i] // draft.grains[i] + 1))
                for i, value in draft.args.items()
            }
            again = segment(built, args=args, index=len(segments), load=False, host=host, tags=tags)
            segments.append(Segment(again.regions, 1, "again"))
    return Program(ISA, segments, tags).text()


def cases(structure: Structure, count: int, seed: Sequence[int]) -> list[Case]:
    """`count` cases; equal seeds give equal cases."""
    return [case(structure, number, seed) for number in range(count)]


def case(structure: Structure, number: int, seed: Sequence[int]) -> Case:
    """Case `number`, which also decides what kind of program and of image it has."""
    rng = np.random.default_rng([*seed, number])
    spec = structure.spec
    assert isinstance(spec, arch.RduSpec)
    if not structure.keep_timing:
        spec = _timed(spec, rng, number)
    p = spec.params()
    for _ in range(_TRIES):
        text = _program(p, rng, number)
        try:
            sim.simulate(p, ISA.assemble(text))
        except UserError as error:  # other arguments, and with them other ticks
            if "deadlock" not in str(error):
                raise
            continue
        return Case(spec, text, 3 * int(rng.integers(0, 1 << 40)) + number % 3)
    raise AssertionError(f"none of {_TRIES} random programs comes to an end")


# ---- images -------------------------------------------------------------------------------------------

_SPECIAL = (
    0,
    1,
    0x007FFFFF,
    0x00800000,
    0x3F800000,
    0x3F808000,
    0x7F7FFFFF,
    0x7F800000,
    0x7FC00000,
    0x7F800001,
)


def _numbers(count: int, kind: int, rng: Rng) -> np.ndarray:
    """Words: 0 ordinary floats, bfloat16 among them; 1 specials and any bits among them, too; 2 small integers."""
    if kind == 2:
        return rng.integers(-9, 10, count).astype(np.int32).view(np.uint32)
    scale = np.exp2(rng.integers(-3, 4, count))  # near one another, so that sums are rounded
    words = (rng.standard_normal(count) * scale).astype(np.float32).view(np.uint32)
    words = np.where(rng.random(count) < 0.3, words & np.uint32(0xFFFF0000), words)
    if kind == 1:
        special = np.array([*_SPECIAL, *(v | 1 << 31 for v in _SPECIAL)], np.uint32)
        words = np.where(rng.random(count) < 0.15, rng.choice(special, count), words)
        words = np.where(rng.random(count) < 0.1, rng.integers(0, 1 << 32, count), words)
    return words.astype(np.uint32)


def image(spec: arch.RduSpec, seed: int) -> dict[str, np.ndarray]:
    """A memory image; the seed's remainder by 3 is the kind of its numbers."""
    rng = np.random.default_rng(seed)
    out = meaning.blank_image(spec.params())
    for array in out.values():
        words = array.reshape(-1).view(np.uint32)
        words[...] = _numbers(words.size, seed % 3, rng)
    return out


# ---- the three readings -------------------------------------------------------------------------------


def interpret(
    spec: arch.RduSpec, program: Program, image: Image
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    return meaning.interpret(spec, program, image)


def simulate(
    spec: arch.RduSpec,
    program: Program,
    *,
    fold: bool,
    trace: bool,
    decisions: Mapping[str, Any] | None = None,
) -> Timeline:
    return sim.simulate(spec.params(), program, fold=fold, trace=_TRACED if trace else 0, decisions=decisions)


def build(spec: arch.RduSpec, waves: bool) -> "Build":
    from tilewright.rtl.rdu.run import build_rtl

    return build_rtl(spec, depth=_DEPTH, waves=waves)


def run_rtl(
    build: "Build", cases: Sequence[tuple[arch.RduSpec, Program, Image]], waves: Path | None
) -> "list[Outcome]":
    from tilewright.rtl.rdu.run import Case as RtlCase
    from tilewright.rtl.rdu.run import run_cases

    jobs = [RtlCase(s.params(), program, image) for s, program, image in cases]
    # A program may wait for work that arrives late; that alone is no hang.
    late = max(int(s.regions["code"]["not_before"].max(initial=0)) for _, p, _ in cases for s in p.segments)
    return run_cases(build, jobs, depth=_DEPTH, waves=waves, slack=late)


# ---- referee and coverage -----------------------------------------------------------------------------


def referee(spec: arch.RduSpec, timeline: Timeline) -> str | None:
    """Laws that hold whatever the rules of time: what is counted is what units were busy with."""
    totals = timeline.totals()
    busy = Counter[str]()
    for unit in timeline.units:
        busy[unit.partition("@")[0]] += timeline.unit(unit)["busy"]
    p = spec.params()
    if busy["pcu"] != totals["iterations"]:
        return f"PCUs are busy for {busy['pcu']} ticks, with {totals['iterations']} iterations"
    lines = sum(totals[f"{tier}_lines"] for tier in arch.TIERS)
    if lines > busy["agcu"]:
        return f"AGCUs are busy for {busy['agcu']} ticks, and move {lines} lines"
    beats = busy["dma"]
    if not beats <= totals["copied_lines"] <= beats * p.copy_lines:
        return f"the DMA is busy for {beats} ticks, and copies {totals['copied_lines']} lines"
    for kind, counted in (("pmu.write", "words_written"), ("pmu.read", "words_read")):
        if totals[counted] > busy[kind] * p.lanes:
            return f"{kind} is busy for {busy[kind]} ticks, with {totals[counted]} words"
    return None


def commands(spec: arch.RduSpec, model: Timeline, rtl: Timeline) -> str | None:
    """Nothing: there are no memory commands."""
    return None


_STALLS = {
    "pcu": ("output", "drain", "token", "operand", "interval", "launch", "arrival", "pipeline", "idle"),
    "pmu.write": ("bank", "token", "operand", "interval", "pipeline", "idle"),
    "pmu.read": ("output", "bank", "token", "interval", "pipeline", "idle"),
    "agcu": ("output", "token", "operand", "interval", "memory", "pipeline", "idle"),
    "sequencer": ("memory", "launch", "arrival", "pipeline"),
    "dma": ("memory", "pipeline", "idle"),
}
COVERAGE = (
    *(f"operation {op.name}" for op in arch.OPS),
    *(f"stage {name}" for name in arch.STAGE_OPS),
    *(f"stage type {name}" for name in arch.TYPES),
    *(f"operand {name}" for name in arch.OPERANDS),
    *(f"mode {name}" for name in arch.MODES[1:]),
    *(f"{what} {name}" for what in ("fold", "tree") for name in arch.FOLDS[1:]),
    *(f"function {name}" for name in arch.FUNCTIONS[1:]),
    *(f"{unit} stall {cause}" for unit, causes in _STALLS.items() for cause in causes),
    *(f"{direction} {tier}" for direction in ("load", "store") for tier in arch.TIERS),
    *(f"format {name}" for name in arch.FORMATS),
    *("function of an array", "gated", "rounded", "fold of several iterations", "input held for a loop"),
    *("scalar stream", "both outputs", "multicast", "several hops", "dynamic flow", "contention at a switch"),
    *("many to one", "one buffer", "two buffers", "three buffers", "diagonal stripes", "bank bits apart"),
    *(
        "bank conflict",
        "dropped words",
        "dropped vectors",
        "range over two PMUs",
        "sequence id in the address",
    ),
    *("credits to a load", "load behind a store", "unit behind another"),
    *(
        "lines coalesced",
        "line of few words",
        "backward stride",
        "in_flight limit",
        "shared channel",
        "rate below 1",
    ),
    *(f"{tier} {what}" for tier in _BANKS for what in ("row hit", "bank closed", "row conflict", "refresh")),
    "direction changed",
    *(
        "latency 1",
        "launch by the host",
        "launch by the hardware",
        "launch without a tick",
        "kernel without a load",
    ),
    *("other arguments", "several sections", "segment repeated", "not_before waits", "not_before past"),
    *("copy alongside a kernel", "copy of no line", "copy waits for a copy", "empty program"),
    *(f"result {kind}" for kind in ("nan", "infinity", "subnormal", "zero", "normal")),
)


def count(observed: Observed) -> Counter[str]:
    """What the case exercised, by the names of COVERAGE."""
    spec, timeline = observed.case.spec, observed.timeline
    assert isinstance(spec, arch.RduSpec)
    p = spec.params()
    segments = list(observed.program.segments)
    out: Counter[str] = Counter()
    for unit in timeline.units:
        kind = unit.partition("@")[0]
        for cause, ticks in timeline.unit(unit).items():
            if cause in _STALLS[kind]:
                out[f"{kind} stall {cause}"] += ticks
    totals = timeline.totals()
    out["bank conflict"] += totals["bank_conflicts"]
    out["dropped words"] += totals["dropped"]
    out["rate below 1"] += any(rate < 1 for rate in (*spec.line_rates, spec.copy_rate))
    for tier in _BANKS:
        hits = totals[f"{tier}_lines"] - totals[f"{tier}_activates"]
        used = p.dram[arch.TIERS.index(tier), arch.DRAM.index("timed")]
        out[f"{tier} row hit"] += used and hits
        out[f"{tier} bank closed"] += totals[f"{tier}_activates"] - totals[f"{tier}_row_conflicts"]
        out[f"{tier} row conflict"] += totals[f"{tier}_row_conflicts"]
        out[f"{tier} refresh"] += totals[f"{tier}_refreshes"]
    out["latency 1"] += 1 in p.latency.tolist()
    out["launch without a tick"] += 0 in (p.host_launch, p.hardware_launch)
    out["several sections"] += sum("config.pcu" in s.regions for s in segments) > 1
    out["segment repeated"] += sum(s.repeat > 1 for s in segments)
    out["empty program"] += not any(len(s.regions["code"]) for s in segments)
    args = [{int(r["index"]): int(r["value"]) for r in s.regions.get("args", ())} for s in segments]
    for s, mine, before in zip(segments, args, [{}, *args], strict=False):
        out["other arguments"] += not any(name.startswith("config") for name in s.regions) and mine != before
    for s in segments:
        out += _count_section(p, s.regions)
    out += _count_code(observed)
    out += _count_results(observed)
    return +out


def _rows(regions: Mapping[str, np.ndarray], region: str) -> Iterator[dict[str, int]]:
    for row in regions.get(region, ()):
        yield dict(zip(row.dtype.names, row.tolist(), strict=True))


def _loops(row: Mapping[str, int], prefix: str = "") -> list[int]:
    return [max(1, row[f"{prefix}count{n}"]) for n in range(LEVELS)]


def _count_section(p: RduParams, regions: Mapping[str, np.ndarray]) -> Counter[str]:
    out: Counter[str] = Counter()
    for s in _rows(regions, "config.stage"):
        out[f"stage {arch.STAGE_OPS[s['operation']]}"] += 1
        out[f"stage type {arch.TYPES[s['type']]}"] += 1
        for operand in "ab":
            out[f"operand {arch.OPERANDS[s[f'{operand}_from']]}"] += 1
    for c in _rows(regions, "config.pcu"):
        mode, function = arch.MODES[c["mode"]], arch.FUNCTIONS[c["function"]]
        fold, tree = arch.FOLDS[c["fold"]], arch.FOLDS[c["tree"]]
        out[f"mode {mode}"] += 1
        out[f"function {function}"] += function != "none"
        out["function of an array"] += function != "none" and mode == "systolic"
        out["gated"] += c["gated"]
        out["rounded"] += c["round"]
        out["scalar stream"] += c["send_scalar"]
        out["both outputs"] += c["send_scalar"] and c["send_vector"]
        if mode == "simd":
            out[f"fold {fold}"] += fold != "none"
            out[f"tree {tree}"] += tree != "none"
        sizes = [prod(_loops(c)[:level]) for level in range(LEVELS + 2)]
        out["fold of several iterations"] += fold != "none" and sizes[c["fold_level"]] > 1
        for kind, mask in (("vector", c["vectors"]), ("scalar", c["scalars"])):
            held = [i for i in range(INPUTS) if mask >> i & 1 and sizes[c[f"{kind}{i}_level"]] > 1]
            out["input held for a loop"] += len(held)
        out["unit behind another"] += c["wait"] != 0
    out += _count_memories(p, regions)
    out += _count_network(regions)
    return out


def _count_memories(p: RduParams, regions: Mapping[str, np.ndarray]) -> Counter[str]:
    out: Counter[str] = Counter()
    ports: Counter[tuple[int, int]] = Counter()
    directions: dict[tuple[int, int], set[str]] = {}
    lows = set()
    for m in _rows(regions, "config.pmu"):
        buffers = m["write_hold0"]
        out[f"{('no', 'one', 'two', 'three')[buffers]} buffer{'s' if buffers > 1 else ''}"] += buffers > 0
        out["diagonal stripes"] += m["skew_bits"]
        out["bank bits apart"] += any(m[f"bank_bit{i}"] != i for i in range(p.banks.bit_length() - 1))
        out["sequence id in the address"] += m["enable"] & 1 and m["sequence_scale"]
        out["credits to a load"] += m["read_signal"] & 2
        if m["enable"] & 2:
            held = kernels.place(m, kernels.addresses(m, "read", p.lanes), p.banks)[0]
            out["dropped vectors"] += int((~held.any(axis=1)).sum())
        lows.add((m["low"], m["words"]))
    out["range over two PMUs"] += any((words, w) in lows for low, words in lows if low == 0 for _, w in lows)
    for a in _rows(regions, "config.agcu"):
        direction, tier = ("off", "load", "store")[a["direction"]], arch.TIERS[a["tier"]]
        out[f"{direction} {tier}"] += 1
        out[f"format {arch.FORMATS[a['format']]}"] += 1
        counters = list(kernels.iterations(a))
        strides = [a[f"stride{n}"] for n in range(LEVELS)]
        at = [sum(c * s for c, s in zip(it.counters, strides, strict=True)) for it in counters]
        lines = [x // (4 * p.lanes) for x in at]
        joined = sum(x == y for x, y in pairwise(lines))
        out["lines coalesced"] += joined
        out["line of few words"] += a["words"] < p.lanes
        out["backward stride"] += any(s < 0 < c - 1 for s, c in zip(strides, _loops(a), strict=True))
        if direction == "load":
            out["in_flight limit"] += p.in_flight < min(p.latency[a["tier"]], len(lines) - joined)
            out["load behind a store"] += a["wait"] == 4
        channel = a["tier"], a["agcu"] % int(p.channels[a["tier"]])
        ports[channel] += 1
        if p.dram[a["tier"], arch.DRAM.index("timed")]:
            directions.setdefault(channel, set()).add(direction)
    out["direction changed"] += sum({"load", "store"} <= seen for seen in directions.values())
    out["shared channel"] += max(ports.values(), default=0) > 1
    return out


def _count_network(regions: Mapping[str, np.ndarray]) -> Counter[str]:
    out: Counter[str] = Counter()
    into: Counter[tuple[int, int, int, int]] = Counter()
    for s in _rows(regions, "config.switch"):
        out["multicast"] += s["out"].bit_count() > 1
        out["several hops"] += bool(s["out"] & (1 << len(MESH)) - 1)
        for port in range(len(MESH) + INPUTS):
            into[s["network"], s["x"], s["y"], port] += s["out"] >> port & 1
    out["contention at a switch"] += max(into.values(), default=0) > 1
    out["many to one"] += sum(n > 1 for (_, _, _, port), n in into.items() if port >= len(MESH))
    for region, name in (("pcu", "flow"), ("pcu", "scalar_flow"), ("pmu", "flow"), ("agcu", "flow")):
        out["dynamic flow"] += sum(row[name] >> 15 for row in _rows(regions, f"config.{region}"))
    return out


def _count_code(observed: Observed) -> Counter[str]:
    out: Counter[str] = Counter()
    log = observed.timeline.log
    assert log is not None
    code = [row for s in observed.steps.segments for row in s.regions["code"]]
    copy_ends = 0
    for row, did in zip(code, log, strict=True):
        name = arch.OPS[int(row["op"])].name
        first, end = int(did["first"]), int(did["end"])
        out[f"operation {name}"] += 1
        out["not_before past"] += 0 < int(row["not_before"]) < first
        out["not_before waits"] += int(row["not_before"]) == first > 0
        if name == "KERNEL_EXECUTE":
            out[f"launch by the {'host' if row['host'] else 'hardware'}"] += 1
            out["copy alongside a kernel"] += first < copy_ends
        elif name == "COPY":
            out["copy of no line"] += int(row["lines"]) == 0
            out["copy waits for a copy"] += first == copy_ends > 0
            copy_ends = end
    for s in observed.program.segments:
        ops = s.regions["code"]["op"].tolist()
        out["kernel without a load"] += (
            arch.OP["PROGRAM_LOAD"] not in ops or ops.count(arch.OP["KERNEL_EXECUTE"]) > 1
        )
    return out


def _count_results(observed: Observed) -> Counter[str]:
    """The kinds of float32 that appear in memory and were not there before."""
    out: Counter[str] = Counter()
    for name, after in observed.after.items():
        words, old = (array.reshape(-1).view(np.uint32) for array in (after, observed.before[name]))
        magnitude = words[words != old].astype(np.int64) & 0x7FFFFFFF
        out["result nan"] += int((magnitude > 0x7F800000).sum())
        out["result infinity"] += int((magnitude == 0x7F800000).sum())
        out["result subnormal"] += int(((magnitude > 0) & (magnitude < 0x00800000)).sum())
        out["result normal"] += int(((magnitude >= 0x00800000) & (magnitude < 0x7F800000)).sum())
        out["result zero"] += int((magnitude == 0).sum())
    return out
