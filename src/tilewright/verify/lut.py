"""The verification plan of target lut: small cores, random timings, random programs, random numbers."""

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright.arch import formats
from tilewright.arch import lut as arch
from tilewright.arch import spec as specs
from tilewright.arch.isa import Program
from tilewright.arch.timeline import Timeline
from tilewright.sim import lut as sim
from tilewright.verify.engine import Case, Observed, Structure, document
from tilewright.workloads import lut as meaning
from tilewright.workloads.formats import to_bits

if TYPE_CHECKING:
    from tilewright.rtl.cosim.simulator import Build
    from tilewright.rtl.lut.run import Outcome

SPEC = arch.LutSpec
ISA = arch.ISA
STRUCTURES = 7
PROGRAMS = 25
_BASE = "lut-a100-4x"
_TRACED = 1 << 10  # instructions kept: all that a case has
_LINES = 160  # of memory

Image = Mapping[str, np.ndarray]
Rng = np.random.Generator

# ---- structures ---------------------------------------------------------------------------------------

# m, n, k, arrays, weight bits, activation, table, groups that share a scale, accumulator, table rows, weight lines,
# result tiles, queue depth. Every activation and accumulator, both kinds of table; one array and several; one line
# a row and several; blocks of one group and more; an odd k; a queue of one.
_Shape = tuple[int, int, int, int, int, str, str, int, str, int, int, int, int]
_SHAPES: tuple[_Shape, ...] = (
    (2, 4, 4, 1, 4, "int8", "exact", 1, "int32", 6, 16, 4, 3),
    (2, 4, 4, 1, 2, "fp16", "exact", 1, "fp16", 4, 12, 3, 2),
    (1, 4, 4, 2, 3, "fp8", "exact", 1, "fp32", 5, 12, 3, 4),
    (2, 8, 3, 1, 1, "int16", "exact", 1, "int32", 7, 6, 5, 1),
    (2, 4, 4, 1, 2, "fp16", "int8", 1, "fp32", 6, 12, 4, 3),
    (1, 8, 2, 2, 4, "int8", "int8", 3, "fp32", 8, 32, 3, 2),
    (1, 4, 4, 1, 4, "fp16", "exact", 1, "fp32", 6, 16, 4, 5),
)
_KINDS = (
    *(("int8", "exact", "int32"), ("int16", "exact", "int32"), ("fp8", "exact", "fp16")),
    *(("fp16", "exact", "fp32"), ("fp8", "exact", "fp32"), ("fp16", "int8", "fp32")),
)


def structures(count: int, seed: int) -> list[Structure]:
    """`count` cores: the fixed list first, then random ones from `seed`."""
    shapes = list(_SHAPES[:count])
    rng = np.random.default_rng((seed, 11))
    while len(shapes) < count:
        m, arrays, k = (int(rng.integers(1, 3)), int(rng.integers(1, 3)), int(rng.integers(2, 6)))
        n = 4 if k % 2 == 0 else 8
        activation, table, accumulator = _KINDS[int(rng.integers(0, len(_KINDS)))]
        if m * arrays * n > 16:
            continue
        bits, rows = int(rng.integers(1, 5)), int(rng.integers(3, 9))
        sizes = rows, bits * int(rng.integers(3, 7)), int(rng.integers(2, 6)), int(rng.integers(1, 6))
        block = int(rng.integers(1, 5))
        shapes.append((m, n, k, arrays, bits, activation, table, block, accumulator, *sizes))
    return [_structure(shape) for shape in shapes]


def _structure(shape: _Shape) -> Structure:
    m, n, k, arrays, bits, activation, table, block, accumulator, *_ = shape
    spec = _build(specs.apply_sets(_base(), [*_shape_sets(shape), "name=small"]), "small")
    tables = f"int8 tables, scale of {block}" if table == "int8" else f"{activation} tables"
    return Structure(f"{arrays} x {m} x {n} x {k}, {bits} bits, {tables}, {accumulator}", spec)


def _shape_sets(shape: _Shape) -> list[str]:
    m, n, k, arrays, bits, activation, table, block, accumulator, rows, lines, tiles, queue = shape
    return [
        "sms=1",
        "cores_per_sm=1",
        f"lut.m={m}",
        f"lut.n={n}",
        f"lut.k={k}",
        f"lut.arrays={arrays}",
        f"lut.max_weight_bits={bits}",
        f"lut.weight_bits={bits}",
        f"lut.activation={activation}",
        f"lut.table={table}",
        f"lut.table_block={block}",
        f"lut.accumulator={accumulator}",
        f"buffers.table_rows={rows}",
        f"buffers.weight_lines={lines}",
        f"buffers.result_tiles={tiles}",
        f"buffers.queue_depth={queue}",
        f"memory.dram_bytes={_LINES * n * k // 8}",
        "memory.lines_in_flight=512",  # enough for a line a tick from anywhere
    ]


@cache
def _base() -> specs.Tree:
    return specs.load_tree(_BASE, ["lut"])


def _build(tree: specs.Tree, name: str) -> arch.LutSpec:
    spec = specs.build(SPEC, tree, name)
    assert isinstance(spec, arch.LutSpec)
    return spec


def _tree(spec: arch.LutSpec) -> specs.Tree:
    return specs.parse_yaml(json.dumps(document(spec)), spec.name)


def scaled(spec: arch.LutSpec) -> tuple[Structure, list[str]]:
    """The spec with at most 2 arrays of 2 x 4 lanes (8 for an odd k) and small buffers; rates and latencies stay."""
    a, b = spec.lut, spec.buffers
    old = (a.m, a.n, a.arrays, b.table_rows, b.weight_lines, b.result_tiles, spec.line_count, spec.cores)
    most = (2, 4 if a.k % 2 == 0 else 8, 2, 8, 24, 6, _LINES, 1)
    m, n, arrays, rows, lines, tiles, memory, _ = new = [min(x, y) for x, y in zip(old, most, strict=True)]
    names = ("m", "n", "arrays", "table rows", "weight lines", "result tiles", "lines of memory", "cores")
    smaller = [f"{name} {x} to {y}" for name, x, y in zip(names, old, new, strict=True) if x != y]
    notes = [f"scaled to what RTL simulates: {', '.join(smaller)}; timings kept"] if smaller else []
    line = n * a.k // 8
    dram, l2 = (Fraction(r.p, r.q) * line for r in spec.line_rates)
    sets = [
        "sms=1",
        "cores_per_sm=1",
        f"lut.m={m}",
        f"lut.n={n}",
        f"lut.arrays={arrays}",
        f"buffers.table_rows={rows}",
        f"buffers.weight_lines={lines}",
        f"buffers.result_tiles={tiles}",
        f"memory.dram_bytes={memory * line}",
        f"memory.dram_gb_per_s={dram * spec.clock_mhz / 1000 / spec.memory.dram_efficiency}",
        f"memory.l2_bytes_per_clock={l2}",
    ]
    small = _build(specs.apply_sets(_tree(spec), sets), spec.name)
    return Structure(spec.name, small, keep_timing=True), notes


# ---- random timings -----------------------------------------------------------------------------------

_RATES = tuple(Fraction(r) for r in ("1", "1/2", "2/3", "1/5", "3/7", "1", "5/6", "10/27"))


def _timed(structure: arch.LutSpec, rng: Rng, number: int) -> arch.LutSpec:
    """The structure with random rates and latencies of both levels."""
    line = Fraction(structure.lut.n * structure.lut.k, 8)
    dram, l2 = _RATES[number % len(_RATES)], _RATES[int(rng.integers(0, len(_RATES)))]
    longest = int(rng.choice([1, 4, 30]))
    ticks = [int(rng.integers(1, longest + 1)) for _ in range(2)]
    # Any time above ticks - 1 rounds up to `ticks`; a tick is a nanosecond.
    dram_ns, l2_ns = (n - Fraction(int(rng.integers(0, 4)), 5) for n in ticks)
    sets = [
        "clock_mhz=1000",
        "memory.dram_efficiency=1",
        f"memory.dram_gb_per_s={dram * line}",
        f"memory.l2_bytes_per_clock={l2 * line}",
        f"memory.dram_latency_ns={dram_ns}",
        f"memory.l2_latency_ns={l2_ns}",
    ]
    return _build(specs.apply_sets(_tree(structure), sets), "random timings")


# ---- random programs ----------------------------------------------------------------------------------

_OPERATIONS = ("LOAD_A", "LOAD_W", "LMMA", "STORE")  # the RTL's


class _Writer:
    """Writes random instructions that lie within the machine."""

    def __init__(self, spec: arch.LutSpec, rng: Rng) -> None:
        self.p, self.rng = spec.params(), rng
        self.now = 0  # a guess at the tick

    def pick(self, low: int, high: int) -> int:
        """An integer of low..high, the ends more often than the rest."""
        low = min(low, high)
        kind = self.rng.integers(0, 6)
        if kind < 2:
            return high if kind else low
        return int(self.rng.integers(low, high + 1))

    def line(self, op: str | None = None, small: bool = False) -> str:
        """An instruction; with `small` it is as short as can be."""
        op = op or str(self.rng.choice(_OPERATIONS))
        f = self.multiply(small) if op == "LMMA" else self.move(op, small)
        return " ".join([op, *(f"{k}={v}" for k, v in f.items())])

    def move(self, op: str, small: bool) -> dict[str, int | str]:
        p, pick = self.p, self.pick
        size, lines = {
            "LOAD_A": (p.table_rows, p.row_lines),
            "LOAD_W": (p.weight_lines, 1),
            "STORE": (p.result_tiles, p.tile_lines),
        }[op]
        count = 1 if small else pick(1, min(size, p.lines // lines))
        return {
            "half": pick(0, 1),
            "base": pick(0, size - count),
            "count": count,
            "line": pick(0, p.lines - count * lines),
            "level": arch.LEVELS[pick(0, 1)],
        }

    def multiply(self, small: bool) -> dict[str, int | str]:
        p, pick = self.p, self.pick
        bits = 1 if small else pick(1, p.max_bits)
        groups = 1 if small else pick(1, min(p.table_rows, p.weight_lines // bits))
        m = 1 if small else pick(1, min(p.table_rows // groups, p.result_tiles))
        n = 1 if small else pick(1, min(p.weight_lines // (groups * bits), p.result_tiles // m))
        return {
            "table": pick(0, 1),
            "table_base": pick(0, p.table_rows - m * groups),
            "weight": pick(0, 1),
            "weight_base": pick(0, p.weight_lines - n * groups * bits),
            "result": pick(0, 1),
            # Short ones meet each other's tiles in the pipeline.
            "result_base": pick(0, min(1, p.result_tiles - 1) if small else p.result_tiles - m * n),
            "m_tiles": m,
            "n_tiles": n,
            "groups": groups,
            "bits": bits,
            "accumulate": pick(0, 1) or int(small),
        }

    def arrival(self) -> str:
        """Mostly none; else a tick in the past, or soon."""
        kind = self.rng.integers(0, 10)
        self.now += 20
        if kind == 0:
            return f" not_before={int(self.rng.integers(1, 20))}"
        if kind == 1:
            self.now += int(self.rng.integers(0, 100))
            return f" not_before={self.now}"
        return ""


def _program(spec: arch.LutSpec, rng: Rng, number: int) -> str:
    """A random program; its number decides which kind, so that every kind occurs."""
    w = _Writer(spec, rng)
    tags = [f"t{i}" for i in range(int(rng.integers(1, 5)))]
    if number == 3:
        return "# nothing to do\n"
    kinds: tuple[tuple[Sequence[str] | None, bool], ...] = (
        (None, False),
        (("LMMA",), True),
        (("LOAD_A", "LOAD_W", "LMMA", "LMMA", "STORE"), False),
        (("LOAD_A", "LOAD_W", "STORE"), False),
        (None, True),
        (("LOAD_A", "LOAD_W", "LMMA"), False),
    )
    operations, small = kinds[number % len(kinds)]
    lines: list[str] = []
    for k in range(int(rng.integers(6, 24))):
        if k == 3 and number % 4 == 2:
            lines.append(".segment repeat=2 label=again")
        op = None if operations is None else str(rng.choice(operations))
        tiny = small if rng.integers(0, 4) else not small
        lines.append(f"{w.line(op, tiny)} tag={rng.choice(tags)}{w.arrival()}")
    return "\n".join(lines) + "\n"


def cases(structure: Structure, count: int, seed: Sequence[int]) -> list[Case]:
    """`count` cases; equal seeds give equal cases."""
    return [case(structure, number, seed) for number in range(count)]


def case(structure: Structure, number: int, seed: Sequence[int]) -> Case:
    """Case `number`, which also decides what kind of program and of image it has."""
    rng = np.random.default_rng([*seed, number])
    spec = structure.spec
    assert isinstance(spec, arch.LutSpec)
    if not structure.keep_timing:
        spec = _timed(spec, rng, number)
    return Case(spec, _program(spec, rng, number), 5 * int(rng.integers(0, 1 << 40)) + number % 5)


# ---- images -------------------------------------------------------------------------------------------

_FORMATS = {"fp8": formats.FP8_E4M3, "fp16": formats.FP16, "fp32": formats.FP32}


def _numbers(fmt: formats.FloatFormat, count: int, kind: int, rng: Rng) -> np.ndarray:
    """Encodings: 0 ordinary numbers, 1 with specials, 2 large ones, 3 tiny ones, 4 any bits."""
    if kind == 4:
        return rng.integers(0, 1 << fmt.width, count)
    values = rng.standard_normal(count)
    if kind == 2:  # sums and weighted entries that overflow, and ties
        values = np.ldexp(rng.integers(-16, 17, count), fmt.bias - int(rng.integers(2, 7)))
    elif kind == 3:
        values = np.ldexp(values, 1 - fmt.bias - rng.integers(-2, fmt.mantissa_bits, count))
    bits = to_bits(values, fmt).astype(np.int64)
    if kind == 1:
        special = [0, 1, fmt.min_normal - 1, fmt.min_normal, fmt.max_finite, fmt.overflow, fmt.nan]
        special += [fmt.sign | v for v in special]
        bits = np.where(rng.random(count) < 0.1, rng.choice(special, count), bits)
    return bits


def _integers(bits: int, count: int, kind: int, rng: Rng) -> np.ndarray:
    """Any integers of so many bits; for odd kinds extremes, or nothing but the most negative one."""
    low, high = -(1 << bits - 1), (1 << bits - 1) - 1
    values = rng.integers(low, high + 1, count)
    if kind % 2:
        extremes = [low] if kind == 1 else [low, high, 0, -1]
        values = np.where(rng.random(count) < 0.8, rng.choice(extremes, count), values)
    return values


def _encoded(name: str, count: int, kind: int, rng: Rng) -> np.ndarray:
    """Bytes of so many numbers of an activation or accumulator type."""
    if name in _FORMATS:
        fmt = _FORMATS[name]
        return _numbers(fmt, count, kind, rng).astype(f"<u{fmt.width // 8}").view(np.uint8)
    bits = int(name.removeprefix("int"))
    return _integers(bits, count, kind, rng).astype(f"<i{bits // 8}").view(np.uint8)


def image(spec: arch.LutSpec, seed: int) -> dict[str, np.ndarray]:
    """A memory image; the seed's remainder by 5 is the kind of its numbers. Some of it reads as weights: any bits."""
    rng = np.random.default_rng(seed)
    kind, p, a = seed % 5, spec.params(), spec.lut
    out = meaning.blank_image(p)
    # Of quantised tables the scales are what has a meaning as numbers.
    stored = "fp32" if a.table == "int8" else a.activation
    memory = out["memory"]
    memory[...] = np.resize(_encoded(stored, memory.size, kind, rng), memory.shape)
    any_bits = rng.random(p.lines) < 0.2
    memory[any_bits] = rng.integers(0, 256, (int(any_bits.sum()), memory.shape[1]))
    out["weights"][...] = rng.integers(0, 256, out["weights"].shape)
    tables = out["tables"]
    if tables.dtype == np.uint16:
        tables[...] = _numbers(formats.FP16, tables.size, kind, rng).reshape(tables.shape)
    else:
        tables[...] = _integers(p.entry_bits, tables.size, kind, rng).reshape(tables.shape)
    if "scales" in out:
        scales = out["scales"]
        scales[...] = _numbers(formats.FP32, scales.size, kind, rng).reshape(scales.shape)
    results = out["results"]
    results[...] = (
        _encoded(a.accumulator, results.size, kind, rng).view(f"<u{p.acc_bits // 8}").reshape(results.shape)
    )
    return out


# ---- the three readings -------------------------------------------------------------------------------


def interpret(
    spec: arch.LutSpec, program: Program, image: Image
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    return meaning.interpret(spec, program, image)


def simulate(
    spec: arch.LutSpec,
    program: Program,
    *,
    fold: bool,
    trace: bool,
    decisions: Mapping[str, Any] | None = None,
) -> Timeline:
    return sim.simulate(spec.params(), program, fold=fold, trace=_TRACED if trace else 0, decisions=decisions)


def build(spec: arch.LutSpec, waves: bool) -> "Build":
    from tilewright.rtl.lut.run import build_rtl

    return build_rtl(spec, waves=waves)


def run_rtl(
    build: "Build", cases: Sequence[tuple[arch.LutSpec, Program, Image]], waves: Path | None
) -> "list[Outcome]":
    from tilewright.rtl.lut.run import Case as RtlCase
    from tilewright.rtl.lut.run import run_cases

    jobs = [RtlCase(s.params(), program, image) for s, program, image in cases]
    # A program may wait for work that arrives late; that alone is no hang.
    late = max(int(s.regions["code"]["not_before"].max(initial=0)) for _, p, _ in cases for s in p.segments)
    return run_cases(build, jobs, waves=waves, slack=late)


# ---- referee and coverage -----------------------------------------------------------------------------


def referee(spec: arch.LutSpec, timeline: Timeline) -> str | None:
    """Laws that hold whatever the rules of time: what is counted is what units were busy with."""
    totals = timeline.totals()
    for unit, counted in (
        ("load", totals["dram_lines"] + totals["l2_lines"]),
        ("compute", totals["planes"]),
        ("store", totals["dram_stores"] + totals["l2_stores"]),
    ):
        busy = timeline.unit(unit)["busy"]
        if busy != counted:
            return f"{unit} is busy for {busy} ticks, with {counted} lines or planes"
    return None


def commands(spec: arch.LutSpec, model: Timeline, rtl: Timeline) -> str | None:
    """Nothing: there are no memory commands."""
    return None


_STALLS = {
    "sequencer": ("arrival", "queue", "drain"),
    "load": ("operands", "release", "rate", "drain", "idle"),
    "compute": ("operands", "release", "drain", "idle"),
    "store": ("operands", "release", "fetch", "rate", "drain", "idle"),
}
COVERAGE = (
    *(f"instruction {name}" for name in _OPERATIONS),
    *(f"{unit} stall {cause}" for unit, causes in _STALLS.items() for cause in causes),
    *(f"rate {kind}" for kind in ("1/1", "1/n", "m/n")),
    *(f"level {level}" for level in arch.LEVELS),
    "latency 1",
    "line waits for the one before",
    "row of several lines",
    "last line",
    "whole half",
    "half loaded anew",
    "load after store",
    "store after load",
    "several m_tiles",
    "several n_tiles",
    "several groups",
    "one-tick tile",
    "sum of the tile before",
    "sum of the tile before that",
    "from zero",
    "accumulate",
    *(f"bits {b}" for b in range(1, 5)),
    "fewer bits than the array has",
    "not_before waits",
    "not_before past",
    "tag shared",
    "segment repeated",
    "empty program",
    *(f"activation {name}" for name in ("int8", "int16", "fp8", "fp16")),
    *(f"accumulator {name}" for name in ("int32", "fp16", "fp32")),
    "int8 table, scale of its own",
    "int8 table, scale of a block",
    "block cut short",
    "entry of all signs equal",
    "int32 wraps",
    *(f"result {kind}" for kind in ("nan", "infinity", "subnormal", "zero", "normal")),
)


def count(observed: Observed) -> Counter[str]:
    """What the case exercised, by the names of COVERAGE."""
    spec, timeline = observed.case.spec, observed.timeline
    assert isinstance(spec, arch.LutSpec)
    p, a = spec.params(), spec.lut
    code = observed.steps.segments[0].regions["code"]  # type: ignore[index]
    out: Counter[str] = Counter()
    for unit in arch.RTL_UNITS:
        for cause, ticks in timeline.unit(unit).items():
            out[f"{unit} stall {cause}"] += ticks if cause != "busy" else 0
    for ratio in spec.line_rates:
        out[f"rate {'1/1' if ratio.q == 1 else ('1/n' if ratio.p == 1 else 'm/n')}"] += 1
    out["latency 1"] += 1 in spec.latencies
    out["row of several lines"] += p.row_lines > 1 and bool((code["op"] == arch.OP["LOAD_A"]).any())
    out["empty program"] += len(code) == 0
    out[f"activation {a.activation}"] += a.table == "exact"
    out[f"accumulator {a.accumulator}"] += 1
    if a.table == "int8":
        out[f"int8 table, scale of {'a block' if a.table_block > 1 else 'its own'}"] += 1
    out["segment repeated"] += sum(s.repeat > 1 for s in observed.program.segments)
    for segment in observed.program.segments:
        tags = segment.regions["code"]["tag"]
        out["tag shared"] += len(tags) - len(np.unique(tags))
    out += _count_fields(p, code, timeline)
    out += _count_results(spec, observed)
    return +out


def _count_fields(p: arch.LutParams, code: np.ndarray, timeline: Timeline) -> Counter[str]:
    out: Counter[str] = Counter()
    loaded: set[tuple[str, int]] = set()
    moved: list[tuple[bool, int, int]] = []
    tiles: set[tuple[int, int, int]] = set()  # half, address, tick of its last plane
    for i, row in zip(code, timeline.log if timeline.log is not None else (), strict=True):
        f: dict[str, Any] = {name: int(i[name]) for name in i.dtype.names}
        op = arch.OPS[f["op"]].name
        out[f"instruction {op}"] += 1
        out["not_before past"] += 0 < f["not_before"] < int(row["first"])
        out["not_before waits"] += f["not_before"] == int(row["first"]) > 0
        if op == "LMMA":
            out[f"bits {f['bits']}"] += 1
            out["fewer bits than the array has"] += f["bits"] < p.max_bits
            for name in ("m_tiles", "n_tiles", "groups"):
                out[f"several {name}"] += f[name] > 1
            out["accumulate" if f["accumulate"] else "from zero"] += 1
            out["block cut short"] += f["groups"] % p.table_block != 0
            length = f["groups"] * f["bits"]
            out["one-tick tile"] += length == 1
            for k in range(f["m_tiles"] * f["n_tiles"]):
                first = int(row["start"]) + k * length
                tile = f["result"], f["result_base"] + k
                for distance, name in ((1, "the tile before"), (2, "the tile before that")):
                    # In the pipeline its sum is this many ticks old when it is asked for.
                    near = (*tile, first - distance) in tiles
                    out[f"sum of {name}"] += near and bool(f["accumulate"])
                tiles.add((*tile, first + length - 1))
            continue
        out[f"level {arch.LEVELS[f['level']]}"] += 1
        size, lines = {
            "LOAD_A": (p.table_rows, p.row_lines),
            "LOAD_W": (p.weight_lines, 1),
            "STORE": (p.result_tiles, p.tile_lines),
        }[op]
        end = f["line"] + f["count"] * lines
        out["last line"] += end == p.lines
        out["whole half"] += f["count"] == size
        is_load = op != "STORE"
        out["load after store" if is_load else "store after load"] += any(
            other != is_load and f["line"] < other_end and other_first < end
            for other, other_first, other_end in moved
        )
        moved.append((is_load, f["line"], end))
        if is_load:
            out["half loaded anew"] += (op, f["half"]) in loaded
            loaded.add((op, f["half"]))
            # Asked for in the tick before `complete`, its last line would arrive so much later by itself.
            alone = int(row["complete"]) - 1 + int(p.latency[f["level"]]) + p.load_drain
            out["line waits for the one before"] += int(row["end"]) > alone
    return out


def _count_results(spec: arch.LutSpec, observed: Observed) -> Counter[str]:
    """The kinds of number that appear in results and tables and were not there before."""
    out: Counter[str] = Counter()
    a = spec.lut
    before, after = observed.before["results"], observed.after["results"]
    written = after[after != before].astype(np.int64)
    if a.accumulator == "int32":
        # Far from where a sum of so few products can get from zero.
        far = np.abs(after.view(np.int32).astype(np.int64) - before.view(np.int32).astype(np.int64))
        out["int32 wraps"] += int((far > 1 << 31).sum())
        if a.activation == "int8":
            extreme = 1 << a.k.bit_length() + 6
            out["entry of all signs equal"] += int((observed.after["tables"] == extreme).sum())
        return out
    fmt = _FORMATS[a.accumulator]
    magnitude = written & (fmt.sign - 1)
    out["result nan"] += int((magnitude > fmt.overflow).sum())
    out["result infinity"] += int((magnitude == fmt.overflow).sum())
    out["result subnormal"] += int(((magnitude > 0) & (magnitude < fmt.min_normal)).sum())
    out["result normal"] += int(((magnitude >= fmt.min_normal) & (magnitude < fmt.overflow)).sum())
    out["result zero"] += int((magnitude == 0).sum())
    return out
