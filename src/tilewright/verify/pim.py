"""The verification plan of target pim: small machines, random timings, random programs, random numbers."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright.arch import formats
from tilewright.arch import pim as arch
from tilewright.arch import spec as specs
from tilewright.arch.dram import Issued, Organisation
from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program
from tilewright.arch.timeline import Timeline
from tilewright.sim import pim as sim
from tilewright.sim.dram_check import check_trace
from tilewright.verify.engine import Case, Observed, Structure, document
from tilewright.workloads import pim as meaning

if TYPE_CHECKING:
    from tilewright.rtl.cosim.simulator import Build
    from tilewright.rtl.pim.run import Outcome

SPEC = arch.PimSpec
ISA = arch.ISA
STRUCTURES = 6
PROGRAMS = 25
_BASE = "pim-gpt"
_TRACED = 1 << 14  # DRAM commands kept of each channel: all that a case issues
_LOGGED = 256  # of them are logged by the RTL
_REFEREED = 100  # of them are judged by the referee, whose work grows with the square

Image = Mapping[str, np.ndarray]
Rng = np.random.Generator

# ---- structures ---------------------------------------------------------------------------------------

# channels, bank groups, banks of a group, lanes, rows, columns, buffer columns, SRAM columns, accumulator.
# The counts that matter to some rule: more banks than tFAW's four; one bank; one lane (no adder tree); one
# column in a row; several RDMAC bursts; several channels; every accumulator format.
_Shape = tuple[int, int, int, int, int, int, int, int, str]
# The ASIC: adders, multipliers, register rows, latencies of adder and multiplier, terms of exp, iterations of
# reciprocal and 1/sqrt. Vector units below a column, of one, of several, and of no power of two; a strip of one
# group; no iteration at all; adders slower than a strip is long.
_Asic = tuple[int, int, int, int, int, int, int, int]
_ASIC_KEYS = (
    *("adders", "multipliers", "register_rows", "adder_latency_cycles", "multiplier_latency_cycles"),
    *("exp_terms", "reciprocal_iterations", "rsqrt_iterations"),
)
_SHAPES: tuple[tuple[_Shape, _Asic], ...] = (
    ((1, 2, 2, 4, 8, 4, 8, 64, "fp32"), (5, 3, 4, 1, 1, 6, 3, 2)),
    ((2, 1, 2, 2, 16, 8, 4, 64, "bf16"), (4, 4, 3, 2, 1, 3, 1, 1)),
    ((1, 1, 2, 1, 8, 2, 4, 32, "fp32"), (12, 6, 1, 1, 2, 2, 0, 0)),
    ((1, 2, 2, 2, 8, 4, 8, 32, "fp16"), (9, 4, 2, 1, 3, 1, 2, 3)),
    ((1, 1, 1, 1, 8, 1, 4, 48, "bf16"), (8, 3, 2, 3, 2, 5, 2, 1)),
    ((1, 4, 2, 1, 8, 4, 4, 64, "fp32"), (5, 9, 6, 1, 1, 4, 1, 2)),
)


def structures(count: int, seed: int) -> list[Structure]:
    """`count` machines: the fixed list first, then random ones from `seed`."""
    shapes = list(_SHAPES[:count])
    rng = np.random.default_rng((seed, 7))
    while len(shapes) < count:
        lanes, groups, banks = (int(1 << rng.integers(0, 3)) for _ in range(3))
        if groups * banks > 8 or groups * banks % lanes:
            continue
        channels = int(rng.integers(1, 4)) if groups * banks * lanes <= 4 else 1
        rows, columns, gb = int(rng.integers(4, 17)), int(1 << rng.integers(0, 4)), int(rng.integers(2, 9))
        fmt = str(rng.choice(["fp32", "bf16", "fp16"]))
        shape = (channels, groups, banks, lanes, rows, columns, gb, int(rng.integers(32, 65)), fmt)
        low, high = (4, 2, 1, 1, 1, 1, 0, 0), (16, 8, 8, 3, 3, 7, 3, 3)
        adders, multipliers, *rest = (int(rng.integers(a, b + 1)) for a, b in zip(low, high, strict=True))
        shapes.append((shape, (adders, multipliers, *rest)))  # type: ignore[arg-type]
    return [_structure(*shape) for shape in shapes]


def _structure(shape: _Shape, asic: _Asic) -> Structure:
    channels, groups, banks, lanes, rows, columns, gb, sram, fmt = shape
    sets = _shape_sets(channels, groups, banks, lanes, rows, columns, gb, sram)
    sets += [f"asic.{key}={value}" for key, value in zip(_ASIC_KEYS, asic, strict=True)]
    spec = _spec([*sets, f"pim.accumulator={fmt}", "name=small"])
    vector = spec.params().vector_lanes
    name = f"{channels} x {groups} x {banks} banks x {lanes} lanes, {columns} columns, {fmt}, vectors of {vector}"
    return Structure(name, spec)


def _shape_sets(
    channels: int, groups: int, banks: int, lanes: int, rows: int, columns: int, gb: int, sram: int
) -> list[str]:
    column = 2 * lanes
    return [
        f"channels={channels}",
        f"dram.bankgroups={groups}",
        f"dram.banks_per_group={banks}",
        f"dram.rows={rows}",
        f"dram.row_bytes={columns * column}",
        f"dram.column_bytes={column}",
        f"dram.pins={lanes}",  # the burst stays as long as with 16 lanes on 16 pins
        f"pim.lanes={lanes}",
        f"pim.global_buffer_bytes={gb * column}",
        f"asic.sram_bytes={sram * column}",
    ]


@cache
def _base() -> specs.Tree:
    return specs.load_tree(_BASE, ["pim"])


def _spec(sets: Sequence[str]) -> arch.PimSpec:
    spec = specs.build(SPEC, specs.apply_sets(_base(), sets), "verify")
    assert isinstance(spec, arch.PimSpec)
    return spec


def scaled(spec: arch.PimSpec) -> tuple[Structure, list[str]]:
    """The spec with one channel of at most 2 x 2 banks x 4 lanes, small rows and memories; its timings stay."""
    d, p = spec.dram, spec.pim
    lanes = min(p.lanes, 4)
    groups, banks = min(d.bankgroups, 2), min(d.banks_per_group, 2)
    while groups * banks % lanes:
        lanes //= 2
    old = (
        spec.channels,
        d.bankgroups,
        d.banks_per_group,
        p.lanes,
        d.rows,
        d.row_bytes // d.column_bytes,
        p.global_buffer_bytes // d.column_bytes,
        spec.asic.sram_bytes // d.column_bytes,
        spec.asic.adders,
        spec.asic.multipliers,
    )
    most = (1, groups, banks, lanes, 16, 8, 8, 64, 8, 4)
    new = tuple(min(a, b) for a, b in zip(old, most, strict=True))
    names = (
        *("channels", "bank groups", "banks", "lanes", "rows", "columns", "buffer columns", "SRAM columns"),
        *("ASIC adders", "ASIC multipliers"),
    )
    smaller = [f"{n} {a} to {b}" for n, a, b in zip(names, old, new, strict=True) if a != b]
    notes = [f"scaled to what RTL simulates: {', '.join(smaller)}; timings kept"] if smaller else []
    tree = _tree(spec)
    sets = [s for s in _shape_sets(*new[:8]) if not s.startswith("dram.pins")]
    sets += [f"asic.adders={new[8]}", f"asic.multipliers={new[9]}"]
    # As many ticks for a burst as before, with narrower columns.
    sets.append(f"dram.pin_rate_gbps={d.pin_rate_gbps * new[3] / p.lanes}")
    small = specs.build(SPEC, specs.apply_sets(tree, sets), spec.name)
    return Structure(spec.name, small, keep_timing=True), notes


def _tree(spec: arch.PimSpec) -> specs.Tree:
    return specs.parse_yaml(json.dumps(document(spec)), spec.name)


# ---- random timings -----------------------------------------------------------------------------------

_TICKS = tuple(Fraction(t) for t in ("1/2", "1", "3/4", "2/3"))
_CLOCKS = tuple(Fraction(r) for r in ("1", "1/2", "2/3", "3/7", "1/5"))
_TIMINGS = (
    *("t_rcd_rd", "t_rcd_wr", "t_rcd_mac", "t_rp", "t_cl", "t_cwl", "t_cwl_gb", "t_wr", "t_rtp"),
    *("t_wtr_s", "t_wtr_l", "t_ppd", "t_rfc", "t_rfc_pb", "t_rrefd"),
)


def _timed(structure: arch.PimSpec, rng: Rng, number: int) -> arch.PimSpec:
    """The structure with random timings, clock ratio and activation, as tight as validation allows or looser."""
    tick = _TICKS[number % len(_TICKS)]
    longest = int(rng.choice([2, 6, 14]))

    def some(low: int = 1, high: int = longest) -> int:
        return int(rng.integers(low, max(high, low) + 1))

    n = {name: some() for name in _TIMINGS}
    n["t_cl_reg"], n["t_wpre"] = some(0), some(0, 2)
    n["t_ccd_l"], n["t_rrd_l"], n["t_rc"] = some(1, 6), some(1, 8), some(1, 2 * longest)
    n["t_ccd_s"], n["t_rrd_s"] = some(1, n["t_ccd_l"]), some(1, n["t_rrd_l"])
    n["t_ras"], n["t_faw"] = some(1, n["t_rc"]), n["t_rrd_s"] + some(0, 30)
    bits = structure.dram.column_bytes * 8
    burst = some(1, 4)
    sets = [
        f"tick_ns={tick}",
        f"dram.pin_rate_gbps={Fraction(bits, structure.dram.pins) / (burst * tick)}",
        f"asic.clock_mhz={1000 / tick * _CLOCKS[number % len(_CLOCKS)]}",
        f"pim.all_bank_activate={('simultaneous', 'staggered')[number // 2 % 2]}",
        f"asic.overlap={('false', 'true')[number // 3 % 2]}",
    ]
    for name, ticks in n.items():
        # Any time above ticks - 1 rounds up to `ticks`.
        part = Fraction(int(rng.integers(0, 4)), 5) if ticks else 0
        sets.append(f"dram.timing.{name}_ns={(ticks - part) * tick}")
    tree = specs.apply_sets(_tree(structure), sets)
    refi = n["t_rfc"] + 4
    while True:
        overlay = specs.apply_sets(tree, [f"dram.timing.t_refi_ns={refi * tick}"])
        try:
            spec = specs.build(SPEC, overlay, "random timings")
        except UserError as error:
            if "t_refi_ns" not in str(error):
                raise
            refi += 1 + refi // 8
            continue
        if number % 3:  # loose, once the least that is valid is known
            overlay = specs.apply_sets(
                tree, [f"dram.timing.t_refi_ns={refi * tick * int(rng.integers(2, 6))}"]
            )
            spec = specs.build(SPEC, overlay, "random timings")
        assert isinstance(spec, arch.PimSpec)
        return spec


# ---- random programs ----------------------------------------------------------------------------------

_OPERATIONS = [op.name for op in arch.OPS]
_CHANNEL_OPERATIONS, _ASIC_OPERATIONS = _OPERATIONS[: arch.N_CHANNEL_OPS], _OPERATIONS[arch.N_CHANNEL_OPS :]


class _Writer:
    """Writes random instructions that lie within the machine."""

    def __init__(self, spec: arch.PimSpec, rng: Rng) -> None:
        self.p, self.rng = spec.params(), rng
        # Knows which instructions may execute alongside which: values do not matter.
        self.machine = meaning.Machine(spec, meaning.blank_image(self.p))
        self.now = 0  # a guess at the tick
        self.last_row = 0

    def pick(self, low: int, high: int) -> int:
        """An integer of low..high, the ends more often than the rest."""
        low = min(low, high)
        kind = self.rng.integers(0, 6)
        if kind < 2:
            return high if kind else low
        return int(self.rng.integers(low, high + 1))

    def mask(self) -> int:
        every = (1 << self.p.channels) - 1
        return every if self.rng.integers(0, 3) == 0 else int(self.rng.integers(1, every + 1))

    def place(self, columns: int) -> dict[str, int]:
        """Row and column from which `columns` fit; often where the last instruction was, or at the very end."""
        p = self.p
        last = p.rows * p.columns - columns
        kind = self.rng.integers(0, 6)
        address = int(self.rng.integers(0, last + 1))
        if kind == 0:
            address = last
        elif kind < 4:
            address = min(self.last_row * p.columns + int(self.rng.integers(0, p.columns)), last)
        self.last_row = (address + columns - 1) // p.columns
        return {"row": address // p.columns, "col": address % p.columns}

    def line(self, op: str | None = None, alone: bool = False) -> str:
        """An instruction; unless `alone`, every other one executes alongside what is under way, where it is
        independent of it."""
        while True:
            text = self.operation(op)
            for alongside in ("",) if alone or self.rng.integers(0, 2) else (" alongside=1", ""):
                [segment] = ISA.assemble(text + alongside).segments
                record = segment.regions["code"][0]
                fields = dict(zip(record.dtype.names, record.tolist(), strict=True))
                try:
                    self.machine.execute(arch.OPS[fields["op"]].name, fields)
                except ValueError:
                    continue
                return text + alongside

    def operation(self, op: str | None) -> str:
        op = op or str(self.rng.choice(_OPERATIONS))
        return self.vector(op) if op in _ASIC_OPERATIONS else self.channel(op)

    def vector(self, op: str) -> str:
        """An operation of the ASIC: in place or apart, of less than a group up to several strips."""
        p, pick, fields = self.p, self.pick, arch.OPS[arch.OP[op]].fields
        names = [name for name in ("dst", "src", "src2", "src3") if name in fields]
        in_place = "dst" in names and bool(self.rng.integers(0, 2))
        f = {"n": pick(1, p.sram_columns // len(names) * p.lanes)}
        if op == "ROPE":
            f["n"] = max(2, f["n"] // 2 * 2)
        columns = -(-f["n"] // p.lanes)
        size = dict.fromkeys(names, columns)
        if "outs" in fields:
            f["pitch"] = columns + pick(0, 1)
            others = sum(name not in ("dst", "src") for name in names)
            room = (p.sram_columns - others * columns) // (1 if in_place else 2)
            f["outs"] = pick(1, max(1, min(3, (room - columns) // f["pitch"] + 1)))
            size["dst"] = size["src"] = (f["outs"] - 1) * f["pitch"] + columns
        placed = [name for name in names if not (in_place and name == "dst")]
        free = p.sram_columns - sum(size[name] for name in placed)
        if free < 0:
            return self.vector(op)
        at = 0
        for name in self.rng.permutation(placed):
            gap = pick(0, free)
            f[str(name)], at, free = at + gap, at + gap + size[name], free - gap
        if in_place:
            f["dst"] = f["src"]
        if "imm" in fields:
            scale = float(self.rng.choice([0.5, 1.0, 1e-5, 0.0, -2.0, 30.0]))
            f["imm"] = pick(0, 1 << 20) if op == "ARGMAX" else int(np.float32(scale).view(np.uint32))
        if "imm2" in fields:
            f["imm2"] = int(np.float32(1 / f["n"]).view(np.uint32))
        if "clear" in fields:
            f["clear"] = pick(0, 1)
        return " ".join([op, *(f"{k}={v}" for k, v in f.items())])

    def channel(self, op: str) -> str:
        p, pick = self.p, self.pick
        mask = self.mask()
        top = mask.bit_length() - 1  # its SRAM columns lie farthest
        f: dict[str, int] = {}
        if op in ("WR_GB", "MAC_AB", "GEMV"):
            f["cols"] = pick(1, p.gb_columns)
            f["gb"] = pick(0, p.gb_columns - f["cols"])
        columns, sram, side = f.get("cols", 1), 0, ""
        if op in ("RD_BK", "WR_BK"):
            f["bank"], f["cols"] = pick(0, p.n_banks - 1), pick(1, min(2 * p.columns + 1, 12))
            columns = f["cols"]
        if op == "GEMV":
            f["outs"], f["pitch"] = pick(1, 5), pick(0, 3)
            columns *= f["outs"]
        if op == "WR_EL":
            f["outs"], f["pitch"], f["lane"] = pick(1, 5), pick(0, p.columns + 1), pick(0, p.lanes - 1)
            columns = (f["outs"] - 1) * f["pitch"] + 1
        if columns > p.rows * p.columns:
            return self.channel(op)
        if op not in ("WR_GB", "RD_MAC"):
            f |= self.place(columns)
        if op in ("WR_GB", "WR_BK"):
            side, sram = "src", f["cols"]
        elif op == "WR_EL":
            side, sram = "src", f["outs"] * p.bursts
        elif op == "RD_BK":
            side, sram = "dst", f["cols"]
        elif op == "RD_MAC":
            side, sram = "dst", p.bursts
        elif op == "GEMV":
            side, sram = "dst", (f["outs"] - 1) * f["pitch"] + p.bursts
        if side:
            room = p.sram_columns - sram
            # Channels may read the same SRAM columns, but never write them.
            stride = pick(sram if side == "dst" and top else 0, min(sram + 2, room // max(top, 1)))
            if room < 0 or (side == "dst" and top and stride < sram):
                return self.channel(op)
            f["stride"] = stride if top else pick(0, 3)
            f[side] = pick(0, room - f["stride"] * top) if top else pick(0, room)
        return " ".join([op, f"channels={mask:#x}", *(f"{k}={v}" for k, v in f.items())])

    def arrival(self) -> str:
        """Mostly none; else a tick in the past, soon, or around a refresh to come."""
        kind = self.rng.integers(0, 8)
        self.now += 60
        if kind == 0:
            return f" not_before={int(self.rng.integers(0, 40))}"
        if kind == 1:
            self.now += int(self.rng.integers(0, 100))
        elif kind == 2:
            due = (self.now // self.p.n_refi + 1) * self.p.n_refi
            self.now = max(0, due - int(self.rng.integers(-5, 30)))
        else:
            return ""
        return f" not_before={self.now}"


def _program(spec: arch.PimSpec, rng: Rng, number: int) -> str:
    """A random program; its number decides which kind, so that every kind occurs."""
    w = _Writer(spec, rng)
    tags = [f"t{i}" for i in range(int(rng.integers(1, 5)))]
    kinds: tuple[Sequence[str] | None, ...] = (
        None,
        ("WR_GB", "GEMV", "GEMV", "MAC_AB"),
        _ASIC_OPERATIONS,
        ("RD_BK", "WR_BK", "MAC_AB", "WR_EL"),
        None,
        _CHANNEL_OPERATIONS,
        ("GEMV", "RD_BK", "SOFTMAX", "ADD", "GELU"),
    )
    operations = kinds[number % len(kinds)]
    lines: list[str] = []
    for k in range(int(rng.integers(4, 15)) if number != 1 else 0):
        op = None if operations is None else str(rng.choice(operations))
        again = k == 3 and number % 4 == 2
        if again:
            lines.append(".segment repeat=2 label=again")
        # What stands before the segment's first instruction is not always the same.
        lines.append(f"{w.line(op, alone=again)} tag={rng.choice(tags)}{w.arrival()}")
        if rng.integers(0, 5) == 0 and "alongside" not in lines[-1]:  # the same again: same row, back to back
            lines.append(lines[-1])
    if number == 1:
        # Long bursts; a refresh long awaited with the rows open; and one that falls due in every drain.
        lines = [w.line("MAC_AB") for _ in range(6)] + [w.line("GEMV") for _ in range(4)]
        lines.append(f"{w.line('WR_BK')} not_before={(w.p.n_refi) * 12}")
    elif number == 3:
        return "# nothing to do\n"
    if number % 2:
        lines += [f"{op} channels=0x{(1 << w.p.channels) - 1:x} {rest} tag=last" for op, rest in _LAST]
    return "\n".join(lines) + "\n"


# What random numbers rarely leave: accumulators that the run ends with.
_LAST = (("WR_GB", "cols=1 src=1"), ("MAC_AB", "row=1 cols=1"))


def cases(structure: Structure, count: int, seed: Sequence[int]) -> list[Case]:
    """`count` cases; equal seeds give equal cases."""
    return [case(structure, number, seed) for number in range(count)]


def case(structure: Structure, number: int, seed: Sequence[int]) -> Case:
    """Case `number`, which also decides what kind of program and of image it has."""
    rng = np.random.default_rng([*seed, number])
    spec = structure.spec
    assert isinstance(spec, arch.PimSpec)
    if not structure.keep_timing:
        spec = _timed(spec, rng, number)
    return Case(spec, _program(spec, rng, number), 5 * int(rng.integers(0, 1 << 40)) + number % 5)


# ---- images -------------------------------------------------------------------------------------------

_SPECIAL = np.array(
    [
        *(0x0000, 0x8000, 0x0001, 0x8001, 0x007F, 0x0080, 0x8080),  # zeros, subnormals, the smallest normal
        *(0x3F80, 0xBF80, 0x3F81, 0x4000, 0x3F00, 0x4049),  # ones and their neighbours
        *(0x7F7F, 0xFF7F, 0x7F80, 0xFF80, 0x7FC0, 0xFFC1, 0x7F81),  # largest, infinities, NaNs
    ],
    np.uint16,
)


def image(spec: arch.PimSpec, seed: int) -> dict[str, np.ndarray]:
    """A memory image; the seed's remainder by 5 says of what: small numbers, specials, ties, tiny, any bits."""
    rng = np.random.default_rng(seed)
    kind = seed % 5
    out = meaning.blank_image(spec.params())
    for name in ("dram", "sram", "gb"):
        shape = out[name].shape
        values = rng.standard_normal(shape).astype(np.float32)
        if kind == 2:  # few bits apart in exponent: sums that tie
            values = np.ldexp(rng.integers(-128, 129, shape), rng.integers(-9, 9, shape)).astype(np.float32)
        elif kind == 3:  # products below the normal range, of bfloat16 and of fp16
            values = np.ldexp(values, rng.choice([-63, -66, -70, -126, -9, -12], shape))
        bits = (values.view(np.uint32) >> 16).astype(np.uint16)
        if kind == 1:
            bits = np.where(rng.random(shape) < 0.15, rng.choice(_SPECIAL, shape), bits)
        elif kind == 4:
            bits = rng.integers(0, 1 << 16, shape).astype(np.uint16)
        out[name][...] = bits
    return out


# ---- the three readings -------------------------------------------------------------------------------


def interpret(
    spec: arch.PimSpec, program: Program, image: Image
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    return meaning.interpret(spec, program, image)


def simulate(
    spec: arch.PimSpec,
    program: Program,
    *,
    fold: bool,
    trace: bool,
    decisions: Mapping[str, Any] | None = None,
) -> Timeline:
    return sim.simulate(spec.params(), program, fold=fold, trace=_TRACED if trace else 0, decisions=decisions)


def build(spec: arch.PimSpec, waves: bool) -> "Build":
    from tilewright.rtl.pim.run import build_rtl

    return build_rtl(spec, trace_depth=_LOGGED, waves=waves)


def run_rtl(
    build: "Build", cases: Sequence[tuple[arch.PimSpec, Program, Image]], waves: Path | None
) -> "list[Outcome]":
    from tilewright.rtl.pim.run import Case as RtlCase
    from tilewright.rtl.pim.run import run_cases

    jobs = [RtlCase(s.params(), program, image) for s, program, image in cases]
    # A program may wait for work that arrives late; that alone is no hang.
    late = max(int(s.regions["code"]["not_before"].max(initial=0)) for _, p, _ in cases for s in p.segments)
    return run_cases(build, jobs, trace_depth=_LOGGED, waves=waves, slack=late)


# ---- referee and coverage -----------------------------------------------------------------------------

_COMMANDS = ("ACT", "ACTab", "PREpb", "PREab", "RD", "WR", "MACab", "WRGB", "RDMAC", "REFab")


def referee(spec: arch.PimSpec, timeline: Timeline, most: int = _REFEREED) -> str | None:
    """What the independent checker objects to in the first `most` DRAM commands of each channel."""
    trace = timeline.trace
    assert trace is not None
    d = spec.dram
    organisation = Organisation(
        bankgroups=d.bankgroups,
        banks_per_group=d.banks_per_group,
        rows=d.rows,
        columns=d.row_bytes // d.column_bytes,
        column_bits=8 * d.column_bytes,
        access_bytes=d.column_bytes,
    )
    for channel in range(spec.channels):
        rows = trace[trace[:, 1] == channel][:most].tolist()
        issued = [Issued(t, _COMMANDS[command], max(bank, 0), row) for t, _, command, bank, row in rows]
        violation = check_trace(arch.GDDR6_PIM, spec.timing, organisation, issued)
        if violation is not None:
            return f"channel {channel}: {violation}"
    return None


def commands(spec: arch.PimSpec, model: Timeline, rtl: Timeline) -> str | None:
    """The first DRAM command in which RTL and model differ, among those that the RTL logged."""
    assert model.trace is not None and rtl.trace is not None
    for channel in range(spec.channels):
        mine = model.trace[model.trace[:, 1] == channel][:_LOGGED].tolist()
        theirs = rtl.trace[rtl.trace[:, 1] == channel].tolist()
        for i, (a, b) in enumerate(zip_longest(mine, theirs)):
            if a != b:
                return f"channel {channel}, command {i}: {_told(b)} in the RTL, {_told(a)} in the model"
    return None


def _told(row: Sequence[int] | None) -> str:
    if row is None:
        return "none"
    tick, _, command, bank, line = row
    where = [f"bank {bank}"] * (bank >= 0) + [f"row {line}"] * (line >= 0)
    return " ".join([_COMMANDS[command], *where, f"at tick {tick}"])


_CHANNEL_CAUSES = (*arch.DRAM_CAUSES, "drain", "idle")
_SEQUENCER_CAUSES = ("arrival", "wait", "clock")
COVERAGE = (
    *(f"instruction {name}" for name in _OPERATIONS),
    *(f"command {name}" for name in _COMMANDS),
    *(f"channel stall {cause}" for cause in _CHANNEL_CAUSES),
    *(f"sequencer stall {cause}" for cause in _SEQUENCER_CAUSES),
    "refresh in a burst",
    "refresh in a drain",
    "refresh before the first command",
    "refresh while idle",
    "refresh with rows open",
    "refresh with rows closed",
    "refresh cut by the end",
    "activate simultaneous",
    "activate staggered",
    "clock 1/1",
    "clock 1/n",
    "clock m/n",
    "row wrap",
    "row wrap in MAC_AB",
    "last row",
    "one column",
    "whole buffer",
    "ragged row",
    "several outs",
    "pitch 0",
    "last lane",
    "stride",
    "not_before waits",
    "not_before past",
    "channel left out",
    "tag shared",
    "segment repeated",
    "asic stall clock",
    "overlap off",
    "overlap on",
    "alongside",
    "ASIC and channels at the same time",
    "vector unit below a column",
    "vector unit of a column",
    "vector unit of several columns",
    "vector unit of no power of two",
    "ASIC ragged group",
    "ASIC one group",
    "ASIC several strips",
    "ASIC in place",
    "several vectors",
    "argmax carried on",
    "empty program",
    "accumulators left",
    "accumulators carried on",
    *(f"accumulator {name}" for name in ("fp32", "bf16", "fp16")),
    *(f"result {kind}" for kind in ("nan", "infinity", "subnormal", "zero", "normal")),
)


def count(observed: Observed) -> Counter[str]:
    """What the case exercised, by the names of COVERAGE."""
    spec, timeline = observed.case.spec, observed.timeline
    assert isinstance(spec, arch.PimSpec)
    p = spec.params()
    code = observed.steps.segments[0].regions["code"]  # type: ignore[index]
    out: Counter[str] = Counter()
    for name, n in zip(_COMMANDS, timeline.counters.sum(axis=0), strict=False):
        out[f"command {name}"] += int(n)
    for unit in timeline.units:
        for cause, ticks in timeline.unit(unit).items():
            out[f"{unit.split()[0]} stall {cause}"] += ticks if cause != "busy" else 0
    out[f"activate {spec.pim.all_bank_activate}"] += 1
    clock = "1/1" if p.asic_q == 1 else ("1/n" if p.asic_p == 1 else "m/n")
    out[f"clock {clock}"] += 1
    out[f"accumulator {spec.pim.accumulator}"] += 1
    out[f"overlap {'on' if spec.asic.overlap else 'off'}"] += 1
    vector = "below a column" if p.vector_lanes < p.lanes else "of several columns"
    out[f"vector unit {'of a column' if p.vector_lanes == p.lanes else vector}"] += 1
    out["vector unit of no power of two"] += p.vector_lanes & (p.vector_lanes - 1) != 0
    out["empty program"] += len(code) == 0
    out += _count_fields(p, code, timeline)
    out += _count_vectors(p, code, timeline)
    out["segment repeated"] += sum(s.repeat > 1 for s in observed.program.segments)
    for segment in observed.program.segments:
        tags = segment.regions["code"]["tag"]
        out["tag shared"] += len(tags) - len(np.unique(tags))
    out += _count_refreshes(p, code, timeline)
    out += _count_results(spec, observed)
    return +out


def _count_fields(p: arch.PimParams, code: np.ndarray, timeline: Timeline) -> Counter[str]:
    out: Counter[str] = Counter()
    carried = False
    for i, span in zip(code, timeline.spans, strict=True):
        op = arch.OPS[int(i["op"])].name
        f = {name: int(i[name]) for name in i.dtype.names}
        out[f"instruction {op}"] += 1
        used = arch.OPS[int(i["op"])].fields
        out["not_before past"] += 0 < f["not_before"] < int(span["first"])
        out["not_before waits"] += f["not_before"] > int(span["first"]) + 2
        if i["op"] >= arch.N_CHANNEL_OPS:
            continue
        columns = {"GEMV": f["cols"] * f["outs"], "WR_EL": 1}.get(op, f["cols"])
        if "row" in used:
            end = f["row"] * p.columns + f["col"] + columns
            wraps = f["col"] + columns > p.columns
            out["row wrap"] += wraps
            out["row wrap in MAC_AB"] += wraps and op == "MAC_AB"
            out["last row"] += end > (p.rows - 1) * p.columns
            out["ragged row"] += end % p.columns != 0 and columns > 1
        out["one column"] += "cols" in used and f["cols"] == 1
        out["whole buffer"] += "gb" in used and f["cols"] == p.gb_columns
        out["several outs"] += "outs" in used and f["outs"] > 1
        out["pitch 0"] += "pitch" in used and f["pitch"] == 0 and f["outs"] > 1
        out["last lane"] += op == "WR_EL" and f["lane"] == p.lanes - 1 and p.lanes > 1
        out["stride"] += "stride" in used and f["stride"] > 0 and f["channels"] > 1
        out["channel left out"] += f["channels"] != (1 << p.channels) - 1
        out["accumulators carried on"] += carried and op in ("MAC_AB", "GEMV")
        carried = op == "MAC_AB" or (carried and op not in ("RD_MAC", "GEMV"))
    return out


def _count_vectors(p: arch.PimParams, code: np.ndarray, timeline: Timeline) -> Counter[str]:
    """What the ASIC was asked for, and whether the channels worked meanwhile."""
    out: Counter[str] = Counter()
    asic = code["op"] >= arch.N_CHANNEL_OPS
    spans = timeline.spans
    for i in code[asic]:
        fields = arch.OPS[int(i["op"])].fields
        groups = -(-int(i["n"]) // p.vector_lanes)
        out["ASIC ragged group"] += int(i["n"]) % p.vector_lanes != 0
        out["ASIC one group"] += groups == 1
        out["ASIC several strips"] += groups > p.register_rows
        out["ASIC in place"] += "dst" in fields and i["dst"] == i["src"]
        out["several vectors"] += "outs" in fields and i["outs"] > 1
        out["argmax carried on"] += "clear" in fields and not i["clear"]
    out["alongside"] += int(code["alongside"].sum())
    for mine in spans[asic]:
        for theirs in spans[~asic]:
            # Three ticks at least are the sequencer's own: fetch, load, dispatch.
            first, end = (f(mine[k], theirs[k]) for f, k in ((max, "first"), (min, "end")))
            out["ASIC and channels at the same time"] += int(end - first) > 3
    return out


def _count_refreshes(p: arch.PimParams, code: np.ndarray, timeline: Timeline) -> Counter[str]:
    """When each refresh fell due: what its channel was at."""
    out: Counter[str] = Counter()
    assert timeline.trace is not None
    channel_ops = code["op"] < arch.N_CHANNEL_OPS
    code, spans = code[channel_ops], timeline.spans[channel_ops]
    for channel in range(p.channels):
        rows = timeline.trace[timeline.trace[:, 1] == channel]
        ticks, commands = rows[:, 0], rows[:, 2]
        refreshes = np.flatnonzero(commands == arch.CMD.REFAB)
        dues = (np.arange(len(refreshes)) + 1) * p.n_refi
        upkeep = set(refreshes.tolist())
        for k, due in zip(refreshes, dues, strict=True):
            closing = k > 0 and commands[k - 1] == arch.CMD.PREAB and ticks[k - 1] >= due
            out["refresh with rows open" if closing else "refresh with rows closed"] += 1
            upkeep |= {int(k) - 1} if closing else set()
        own = np.array([t for j, t in enumerate(ticks) if j not in upkeep], np.int64)
        for due in dues:
            out[f"refresh {_activity(p, code, spans, channel, own, int(due))}"] += 1
        # A refresh due, whose REFab would issue after the end.
        out["refresh cut by the end"] += (timeline.ticks - 1) // p.n_refi > len(refreshes)
    return out


def _activity(
    p: arch.PimParams, code: np.ndarray, spans: np.ndarray, channel: int, own: np.ndarray, due: int
) -> str:
    """What the channel, whose commands for instructions issued at `own`, is at in tick `due`."""
    n = int(np.searchsorted(spans["end"], due, "right"))
    if n >= len(code) or not int(code["channels"][n]) >> channel & 1:
        return "while idle"
    inside = own[(own >= spans["first"][n]) & (own < spans["end"][n])]
    drain = max(int(p.drain[code["op"][n]]), 1)
    if (inside < due).any() and (inside >= due).any():
        return "in a burst"
    if (inside >= due).any():
        return "before the first command" if due >= spans["first"][n] + 3 else "while idle"
    return "in a drain" if len(inside) and due < inside.max() + drain else "while idle"


def _count_results(spec: arch.PimSpec, observed: Observed) -> Counter[str]:
    """The kinds of number that appear in SRAM and accumulators and were not there before."""
    out: Counter[str] = Counter()
    sram = observed.after["sram"]
    written = sram[sram != observed.before["sram"]]
    acc = observed.after["acc"].reshape(-1)
    out["accumulators left"] += int((acc != 0).sum())
    for bits, fmt in ((written, formats.BF16), (acc, formats.float_format(spec.pim.accumulator))):
        magnitude = bits.astype(np.int64) & (fmt.sign - 1)
        out["result nan"] += int((magnitude > fmt.overflow).sum())
        out["result infinity"] += int((magnitude == fmt.overflow).sum())
        out["result subnormal"] += int(((magnitude > 0) & (magnitude < fmt.min_normal)).sum())
        out["result normal"] += int(((magnitude >= fmt.min_normal) & (magnitude < fmt.overflow)).sum())
        if bits is written:
            out["result zero"] += int((magnitude == 0).sum())
    return out
