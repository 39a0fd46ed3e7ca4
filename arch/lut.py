"""LUT Tensor Core: low-bit weights multiplied by looking up tables of precomputed activation sums.

Mo et al., "LUT Tensor Core: a software-hardware co-design for LUT-based low-bit LLM inference", ISCA 2025
(arXiv 2408.06003). This module holds the spec, the instruction set of a *core*, what its timing rules are made
of, the host port and the energy rows. `docs/targets/lut.md` has the pictures.

A core is one tensor-core slot of a streaming multiprocessor (SM): a decoder, a load unit that also builds the
tables, operand and result buffers, `arrays` lookup arrays of m x n lanes, and a store unit. A device is
sms * cores_per_sm cores which all do the same at the same time, each with its share of every bandwidth, and the
GPU's ordinary units, known by their roofline. A Program is that of one core.

Memory is made of lines of n * k / 8 bytes, what one plane of weights takes. What lies where:

| what                             | lines                          | bits from 0 upwards                      |
| -------------------------------- | ------------------------------ | ---------------------------------------- |
| weights of (n-tile, group)       | one for each plane, LSB first  | n coded words of k bits                  |
| activations of (m-tile, group)   | `row_lines`                    | rows x k activations                     |
| the same with table: int8        | `row_lines`                    | rows x 2**(k-1) entries, then rows FP32  |
|                                  |                                | scales                                   |
| results of (m-tile, n-tile)      | `tile_lines`                   | rows x n accumulators                    |

with rows = m * arrays. An element stands before the next of its row, a row before the next one.
"""

from fractions import Fraction
from functools import cached_property
from math import ceil, log2
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field as Limits
from pydantic import model_validator

from tilewright.arch.clock import Clock, Ratio
from tilewright.arch.energy import EnergyRow
from tilewright.arch.hostmap import HostMap, Region
from tilewright.arch.isa import Field, InstructionSet, Op, Record
from tilewright.arch.spec import NonNegative, Positive, Section, Spec
from tilewright.arch.trace import TraceForm

# ---- units, causes, counters --------------------------------------------------------------------------

UNITS = ("sequencer", "load", "compute", "store", "ordinary")
# Charging order of a stalled tick. "operands": what is to be read is not written yet; "release": what is to be
# written is still read; "fetch": a result tile is read from its buffer; "rate": the unit's share of the memory
# moves no line in this tick; "launch": a kernel of the ordinary units is being started; "arrival":
# `not_before` lies ahead; "queue": the unit that the instruction is for has as many as it holds; "wait": for
# ordinary units, or for all others on their behalf; "drain": all is issued, not all complete; "idle": nothing to do.
CAUSES = (*("operands", "release", "fetch", "rate", "launch", "arrival", "queue", "wait", "drain", "idle"),)
# Causes for which another unit, or the program, is to blame.
WAITING = ("operands", "release", "queue", "wait", "drain", "idle")
# Lines loaded and stored by level; rows of tables built; rows read (once for all planes of a group); planes issued
# (each is rows * n lookups); result tiles written.
COUNTERS = (
    *("dram_lines", "l2_lines", "dram_stores", "l2_stores"),
    *("table_rows", "table_reads", "planes", "result_tiles"),
)
ORDINARY_COUNTERS = (
    *("vector_ops", "tensor_fp16_ops", "tensor_int8_ops", "ordinary_dram_bytes", "ordinary_l2_bytes"),
)

# ---- instruction set ----------------------------------------------------------------------------------

LEVELS = ("dram", "l2")
KINDS = ("vector", "tensor_fp16", "tensor_int8")

_CODE = (
    Field("half", 1, "half of the buffer that is loaded or stored"),
    Field("base", 16, "first row, line or tile within that half"),
    Field("count", 16, "rows (LOAD_A), lines (LOAD_W) or tiles (STORE)", 1),
    Field("line", 32, "first line in memory"),
    Field("level", 1, "where the memory's lines are found or put", names=LEVELS),
    Field("table", 1, "half of the table buffer"),
    Field("table_base", 16, "its row of (m-tile 0, group 0); that of (i, g) is i * groups + g later"),
    Field("weight", 1, "half of the weight buffer"),
    Field(
        "weight_base",
        16,
        "its line of (n-tile 0, group 0, plane 0); (j, g, t) is (j * groups + g) * bits + t later",
    ),
    Field("result", 1, "half of the result buffer"),
    Field("result_base", 16, "its tile of (m-tile 0, n-tile 0); that of (i, j) is i * n_tiles + j later"),
    Field("m_tiles", 16, "tiles of m * arrays activation rows", 1),
    Field("n_tiles", 16, "tiles of n output channels", 1),
    Field("groups", 16, "groups of k input channels", 1),
    Field("bits", 3, "planes of the weights", 1),
    Field("accumulate", 1, "start from what the result buffer holds, rather than from zero"),
    Field("kind", 2, "ordinary units that work", names=KINDS),
    Field("operations", 40, "operations of this core's share"),
    Field("bytes", 40, "bytes that they move to and from memory"),
    Field("alongside", 1, "nothing that the other units do before, meanwhile or next is needed or disturbed"),
)
_MOVE = ("half", "base", "count", "line", "level")
OPS = (
    Op("LOAD_A", _MOVE, "activation rows from memory, as tables, to the table buffer"),
    Op("LOAD_W", _MOVE, "weight lines from memory to the weight buffer"),
    Op(
        "LMMA",
        (
            *("table", "table_base", "weight", "weight_base", "result", "result_base"),
            *("m_tiles", "n_tiles", "groups", "bits", "accumulate"),
        ),
        "for every m-tile, n-tile, group and plane: look up and accumulate",
    ),
    Op("STORE", _MOVE, "result tiles to memory"),
    Op(
        "ORDINARY",
        ("kind", "operations", "bytes", "level", "alongside"),
        "work of the GPU's ordinary units, known by its amount alone; the RTL has none",
    ),
)
ISA = InstructionSet("lut", (Record("code", _CODE, OPS),))
OP = {op.name: i for i, op in enumerate(OPS)}
UNIT_OF = (1, 1, 2, 3, 4)  # of each operation, in UNITS

# Pipeline depths of the core, in ticks, from the issue of a last plane, or the arrival of a last line, to the
# first tick in which the other units find the instruction complete. Between come the arrays (`array_latency`), or
# the units that build tables (`table_latency`).
COMPUTE_DRAIN = 4  # tables are read; kept beside those in use; take their place; ...; results are written
LOAD_DRAIN = 2  # memory is read; ...; the buffer is written

# ---- spec ---------------------------------------------------------------------------------------------

MAX_TICKS = 1 << 16  # the RTL holds latencies in 16 bits
MAX_RATIO = 1 << 31  # and the numbers of a rate in 32
FLOATS = ("fp8", "fp16")  # activations whose tables are FP16
_ACTIVATION_BITS = {"int8": 8, "int16": 16, "fp8": 8, "fp16": 16}

Rows = Annotated[int, Limits(ge=1, le=1 << 16)]
Efficiency = Annotated[Positive, Limits(le=1)]


class LutSection(Section):
    """Lookup arrays of one core."""

    m: Annotated[int, Limits(ge=1, le=64)]
    n: Annotated[int, Limits(ge=1, le=1024)]
    k: Annotated[int, Limits(ge=2, le=6)]
    arrays: Annotated[int, Limits(ge=1, le=64)]
    max_weight_bits: Annotated[int, Limits(ge=1, le=4)]
    weight_bits: Annotated[int, Limits(ge=1, le=4)]
    activation: Literal["int8", "int16", "fp8", "fp16"]
    table: Literal["exact", "int8"]
    # 128 * 15 * 2**12 is below 2**24: FP32 holds the integer sum of a block exactly.
    table_block: Annotated[int, Limits(ge=1, le=1 << 12)]
    accumulator: Literal["int32", "fp16", "fp32"]


class BufferSection(Section):
    """Sizes of one half of each buffer (there are two), and of the units' queues."""

    table_rows: Rows
    weight_lines: Rows
    result_tiles: Rows
    queue_depth: Annotated[int, Limits(ge=1, le=16)]


class MemorySection(Section):
    """Memory of the device, of which every core has an equal share of the bandwidth."""

    dram_bytes: Annotated[int, Limits(ge=1, le=1 << 40)]
    dram_gb_per_s: Positive
    dram_efficiency: Efficiency
    dram_latency_ns: Positive
    l2_bytes: Annotated[int, Limits(ge=1, le=1 << 40)]
    l2_bytes_per_clock: Positive
    l2_latency_ns: Positive
    shared_bytes_per_sm: Annotated[int, Limits(ge=1, le=1 << 30)]
    lines_in_flight: Annotated[int, Limits(ge=1, le=1 << 16)]


class OrdinarySection(Section):
    """The GPU's ordinary units by their roofline; rates are the device's."""

    vector_tops: Positive
    tensor_fp16_tops: Positive
    tensor_int8_tops: Positive
    efficiency: Efficiency
    launch_us: NonNegative


class EnergySection(Section):
    """Energies and powers; `kind` and source of each are in the YAML."""

    lut_pj_per_512_lanes: NonNegative
    table_pj_per_add: NonNegative
    buffer_pj_per_bit: NonNegative
    l2_pj_per_bit: NonNegative
    dram_pj_per_bit: NonNegative
    vector_pj_per_op: NonNegative
    tensor_pj_per_op: NonNegative
    idle_w: NonNegative


class LutParams(NamedTuple):
    """What follows from a LutSpec: integers and read-only arrays, for kernels and RTL."""

    m: int
    n: int
    k: int
    arrays: int
    rows: int  # of a tile: m * arrays
    max_bits: int  # of a weight
    entries: int  # of a table
    entry_bits: int
    activation_bits: int
    acc_bits: int
    table_block: int  # groups that share a scale; of no consequence with exact tables
    line_bits: int
    row_lines: int
    tile_lines: int
    lines: int  # of memory
    table_rows: int
    weight_lines: int
    result_tiles: int
    queue_depth: int
    lines_in_flight: int
    load_drain: int
    compute_drain: int
    rate_p: np.ndarray  # int64[levels]: p lines in q ticks, on tick t iff (t * p) mod q < p
    rate_q: np.ndarray
    latency: np.ndarray  # int64[levels], ticks
    ops_p: np.ndarray  # int64[kinds]: operations of a core, p in q ticks
    ops_q: np.ndarray
    bytes_p: np.ndarray  # int64[levels]: bytes that the ordinary units move for a core, p in q ticks
    bytes_q: np.ndarray
    launch: int  # ticks


class LutSpec(Spec):
    """A GPU whose tensor cores are lookup arrays."""

    target_name: ClassVar[str] = "lut"

    target: Literal["lut"]
    clock_mhz: Positive
    sms: Annotated[int, Limits(ge=1, le=1 << 12)]
    cores_per_sm: Annotated[int, Limits(ge=1, le=64)]
    lut: LutSection
    buffers: BufferSection
    memory: MemorySection
    ordinary: OrdinarySection
    energy: EnergySection

    @model_validator(mode="after")
    def _check(self) -> "LutSpec":
        a, mem = self.lut, self.memory
        floating = a.activation in FLOATS
        allowed = ("fp32",) if a.table == "int8" else (("fp16", "fp32") if floating else ("int32",))
        if a.accumulator not in allowed:
            raise ValueError(
                f"lut.accumulator must be {' or '.join(allowed)} with activation {a.activation} and table "
                f"{a.table}, not {a.accumulator}"
            )
        if a.weight_bits > a.max_weight_bits:
            raise ValueError(
                f"lut.weight_bits {a.weight_bits} exceeds lut.max_weight_bits {a.max_weight_bits}"
            )
        if a.n * a.k % 8:
            raise ValueError(f"lut.n {a.n} * lut.k {a.k} must be a multiple of 8: a line is whole bytes")
        if not 1 <= self.line_count < 1 << 32:
            raise ValueError(
                f"memory.dram_bytes {mem.dram_bytes} must hold 1..{(1 << 32) - 1} lines of {a.n * a.k // 8} bytes"
            )
        table_bits = a.m * a.arrays * (1 << a.k - 1) * self.entry_bits
        shared = 2 * (self.buffers.table_rows * table_bits + self.buffers.weight_lines * a.n * a.k) // 8
        if shared * self.cores_per_sm > mem.shared_bytes_per_sm:
            raise ValueError(
                f"buffers.table_rows {self.buffers.table_rows} and buffers.weight_lines {self.buffers.weight_lines} "
                f"take {shared * self.cores_per_sm} bytes of an SM, more than memory.shared_bytes_per_sm "
                f"{mem.shared_bytes_per_sm}"
            )
        for name, n in zip(("dram", "l2"), self.latencies, strict=True):
            if n >= MAX_TICKS:
                raise ValueError(
                    f"memory.{name}_latency_ns is {n} ticks; at most {MAX_TICKS - 1} are modelled"
                )
        rates = {
            "memory.dram_gb_per_s": self.line_rates[0],
            "memory.l2_bytes_per_clock": self.line_rates[1],
            **{f"ordinary.{kind}_tops": rate for kind, rate in zip(KINDS, self.op_rates, strict=True)},
        }
        for name, ratio in rates.items():
            if max(ratio) >= MAX_RATIO:
                raise ValueError(
                    f"{name} comes to {ratio.p}/{ratio.q} a core and tick; numbers up to {MAX_RATIO - 1} are "
                    f"modelled: choose a rounder one, or a rounder clock_mhz"
                )
        # A line arrives at most the longest latency after it was asked for, and at most one is asked for in a tick
        # in which either level works.
        longest = max(self.latencies)
        most = min(longest, ceil(longest * sum(Fraction(r.p, r.q) for r in self.line_rates)) + 1) + 1
        if mem.lines_in_flight < most:
            raise ValueError(
                f"memory.lines_in_flight must be at least {most} for these rates and latencies, "
                f"not {mem.lines_in_flight}"
            )
        return self

    @cached_property
    def tick(self) -> Clock:
        """The core's clock: one plane a tick."""
        return Clock.from_mhz(self.clock_mhz)

    @property
    def cores(self) -> int:
        """Cores of the device."""
        return self.sms * self.cores_per_sm

    @property
    def line_count(self) -> int:
        """Lines of the device's memory, all of which every core reaches."""
        return self.memory.dram_bytes * 8 // (self.lut.n * self.lut.k)

    @property
    def entry_bits(self) -> int:
        """Bits of a table entry: an exact integer takes ceil(log2 k) + 1 more than an activation.

        The extreme is k times the most negative activation, negated; FP8 becomes FP16 exactly.
        """
        a = self.lut
        if a.table == "int8":
            return 8
        if a.activation in FLOATS:
            return 16
        return _ACTIVATION_BITS[a.activation] + ceil(log2(a.k)) + 1

    @property
    def table_latency(self) -> int:
        """Ticks that a row of tables takes to build; one begins every tick.

        Floats are added one element a tick, integers in one tick. Quantised tables come from memory.
        """
        a = self.lut
        return 0 if a.table == "int8" else (a.k - 1 if a.activation in FLOATS else 1)

    @property
    def array_latency(self) -> int:
        """Ticks from a plane's lookup to its sum: addend and sum, or, with int8 tables, addend, integer sum,
        conversion, product, sum."""
        return 5 if self.lut.table == "int8" else 2

    @cached_property
    def line_rates(self) -> tuple[Ratio, Ratio]:
        """Lines that reach one core in a tick, from DRAM and from L2: its share, at most one (its port's width)."""
        mem, line = self.memory, Fraction(self.lut.n * self.lut.k, 8)
        share = 1 / (line * self.cores)
        per_tick = mem.dram_gb_per_s * 10**9 * mem.dram_efficiency * self.tick.period_s
        return _ratio(min(per_tick * share, Fraction(1))), _ratio(
            min(mem.l2_bytes_per_clock * share, Fraction(1))
        )

    @cached_property
    def latencies(self) -> tuple[int, int]:
        """Ticks from asking for a line to its arrival, from DRAM and from L2."""
        return (
            self.tick.cycles_ns(self.memory.dram_latency_ns),
            self.tick.cycles_ns(self.memory.l2_latency_ns),
        )

    @cached_property
    def op_rates(self) -> tuple[Ratio, Ratio, Ratio]:
        """Operations of the ordinary units for one core in a tick, by KINDS."""
        o = self.ordinary
        scale = o.efficiency * 10**12 * self.tick.period_s / self.cores
        return (
            _ratio(o.vector_tops * scale),
            _ratio(o.tensor_fp16_tops * scale),
            _ratio(o.tensor_int8_tops * scale),
        )

    def params(self) -> LutParams:
        """Everything that kernels and RTL need, as integers and read-only arrays."""
        a, b, mem = self.lut, self.buffers, self.memory
        rows, line_bits = a.m * a.arrays, a.n * a.k
        acc_bits = 16 if a.accumulator == "fp16" else 32
        entries = 1 << a.k - 1
        quantised = a.table == "int8"
        row_bits = rows * (entries * 8 + 32) if quantised else rows * a.k * _ACTIVATION_BITS[a.activation]
        dram, l2 = (
            mem.dram_gb_per_s * 10**9 * mem.dram_efficiency * self.tick.period_s,
            mem.l2_bytes_per_clock,
        )
        bytes_rates = [_ratio(dram / self.cores), _ratio(l2 / self.cores)]
        return LutParams(
            m=a.m,
            n=a.n,
            k=a.k,
            arrays=a.arrays,
            rows=rows,
            max_bits=a.max_weight_bits,
            entries=entries,
            entry_bits=self.entry_bits,
            activation_bits=_ACTIVATION_BITS[a.activation],
            acc_bits=acc_bits,
            table_block=a.table_block,
            line_bits=line_bits,
            row_lines=-(-row_bits // line_bits),
            tile_lines=-(-rows * a.n * acc_bits // line_bits),
            lines=self.line_count,
            table_rows=b.table_rows,
            weight_lines=b.weight_lines,
            result_tiles=b.result_tiles,
            queue_depth=b.queue_depth,
            lines_in_flight=mem.lines_in_flight,
            load_drain=LOAD_DRAIN + self.table_latency,
            compute_drain=COMPUTE_DRAIN + self.array_latency,
            rate_p=_array([r.p for r in self.line_rates]),
            rate_q=_array([r.q for r in self.line_rates]),
            latency=_array(self.latencies),
            ops_p=_array([r.p for r in self.op_rates]),
            ops_q=_array([r.q for r in self.op_rates]),
            bytes_p=_array([r.p for r in bytes_rates]),
            bytes_q=_array([r.q for r in bytes_rates]),
            launch=self.tick.cycles_ns(self.ordinary.launch_us * 1000),
        )


SPEC = LutSpec


def _ratio(rate: Fraction) -> Ratio:
    return Ratio(rate.numerator, rate.denominator)


def _array(values: object) -> np.ndarray:
    out = np.array(values, np.int64)
    out.flags.writeable = False
    return out


# ---- host port ----------------------------------------------------------------------------------------

REGISTERS = ("length", *(f"{what}_{level}" for level in LEVELS for what in ("p", "q", "latency")))


def register_values(p: LutParams, length: int) -> list[int]:
    """What the RTL's registers hold for a program of `length` instructions."""
    own = [(int(p.rate_p[k]), int(p.rate_q[k]), int(p.latency[k])) for k in range(len(LEVELS))]
    return [length, *(value for row in own for value in row)]


RTL_UNITS = UNITS[:4]  # the RTL has no ordinary units


def status_names() -> list[str]:
    """Names of the RTL's read-only words: counters and stalls as the Timeline names them."""
    return ["ticks", *COUNTERS, *(f"{unit}.{s}" for unit in RTL_UNITS for s in ("busy", *CAUSES))]


def hostmap(p: LutParams, depth: int) -> HostMap:
    """Regions of the host port for a code memory of `depth` instructions; memory and buffers are not among them."""
    return HostMap(
        [
            Region("registers", len(REGISTERS)),
            Region("status", len(status_names())),
            Region("code", depth, ISA.record("code").bits),
            Region("log", depth, 64),
        ]
    )


# ---- traces -------------------------------------------------------------------------------------------


def trace_form(spec: LutSpec) -> TraceForm:
    """How a trace of this machine is drawn: by its instructions, as there are no memory commands."""
    return TraceForm(
        operations=tuple(op.name for op in OPS),
        executes=tuple(UNITS[unit] for unit in UNIT_OF),
        commands=(),
        opens=frozenset(),
        closes=frozenset(),
        cadence=(),
        holds=(),
        banks=0,
    )


# ---- energy -------------------------------------------------------------------------------------------


def energy(spec: LutSpec) -> tuple[EnergyRow, ...]:
    """Energy of each event and of background, in picojoules, of the whole device: all cores do the same.

    An array's power at 1 GHz is its energy for a tick, that is for one plane, and is taken to grow with its
    lanes m * n * k.
    """
    e, a, p = spec.energy, spec.lut, spec.params()
    cores = spec.cores
    line = Fraction(p.line_bits) * cores
    table_bits = Fraction(p.rows * p.entries * p.entry_bits)
    tile_bits = Fraction(p.rows * p.n * p.acc_bits)
    adds = 0 if a.table == "int8" else p.rows * additions(a.k, a.activation in FLOATS)
    plane = e.lut_pj_per_512_lanes * p.rows * p.n * p.k / 512

    def row(name: str, counter: str, pj: Fraction, source: str) -> EnergyRow:
        return EnergyRow(name, counter, pj, source)

    loads = e.buffer_pj_per_bit * line
    return (
        row("lookup arrays", "planes", plane * cores, "energy.lut_pj_per_512_lanes"),
        row(
            "table buffer",
            "table_reads",
            e.buffer_pj_per_bit * table_bits * cores,
            "energy.buffer_pj_per_bit",
        ),
        row("weight buffer", "planes", e.buffer_pj_per_bit * line, "energy.buffer_pj_per_bit"),
        row(
            "table building",
            "table_rows",
            (e.table_pj_per_add * adds + e.buffer_pj_per_bit * table_bits) * cores,
            "energy.table_pj_per_add, buffer_pj_per_bit",
        ),
        row(
            "result buffer",
            "result_tiles",
            e.buffer_pj_per_bit * tile_bits * cores,
            "energy.buffer_pj_per_bit",
        ),
        row("lines from DRAM", "dram_lines", e.dram_pj_per_bit * line + loads, "energy.dram_pj_per_bit"),
        row("lines from L2", "l2_lines", e.l2_pj_per_bit * line + loads, "energy.l2_pj_per_bit"),
        row("lines to DRAM", "dram_stores", e.dram_pj_per_bit * line + loads, "energy.dram_pj_per_bit"),
        row("lines to L2", "l2_stores", e.l2_pj_per_bit * line + loads, "energy.l2_pj_per_bit"),
        row("ordinary: vector", "vector_ops", e.vector_pj_per_op * cores, "energy.vector_pj_per_op"),
        row(
            "ordinary: tensor FP16", "tensor_fp16_ops", e.tensor_pj_per_op * cores, "energy.tensor_pj_per_op"
        ),
        row(
            "ordinary: tensor INT8", "tensor_int8_ops", e.tensor_pj_per_op * cores, "energy.tensor_pj_per_op"
        ),
        row("ordinary: DRAM", "ordinary_dram_bytes", e.dram_pj_per_bit * 8 * cores, "energy.dram_pj_per_bit"),
        row("ordinary: L2", "ordinary_l2_bytes", e.l2_pj_per_bit * 8 * cores, "energy.l2_pj_per_bit"),
        row("background", "ticks", e.idle_w * 10**12 * spec.tick.period_s, "energy.idle_w"),
    )


def additions(k: int, floating: bool) -> int:
    """Additions that build one table of a group of k activations; sums and their negatives are formed once.

    Floats are added element by element, in order. Integers have no such order: the sums of either half of the
    group are formed first, and combined.

    >>> additions(4, floating=True), additions(4, floating=False)
    (14, 12)
    """
    if k == 1:
        return 0
    first = k - 1 if floating else k // 2
    return additions(first, floating) + additions(k - first, floating) + (1 << k - 1)


# ---- checks -------------------------------------------------------------------------------------------


def check(p: LutParams, code: np.ndarray, where: str = "") -> None:
    """Raise ValueError for the first instruction that reaches outside the machine, saying what is wrong."""
    f = {name: code[name].astype(np.int64) for name in code.dtype.names or ()}
    op, bad, messages = f["op"], np.zeros(len(code), bool), []
    for name, (size, lines, what) in {
        "LOAD_A": (p.table_rows, p.row_lines, "rows of the table buffer"),
        "LOAD_W": (p.weight_lines, 1, "lines of the weight buffer"),
        "STORE": (p.result_tiles, p.tile_lines, "tiles of the result buffer"),
    }.items():
        mine = op == OP[name]
        messages += [
            (mine & (f["count"] < 1), "count must be at least 1"),
            (mine & (f["base"] + f["count"] > size), f"base, count reach beyond the {size} {what}"),
            (
                mine & (f["line"] + f["count"] * lines > p.lines),
                f"line, count reach beyond the {p.lines} lines of memory",
            ),
        ]
    mine = op == OP["LMMA"]
    m, n, g, bits = f["m_tiles"], f["n_tiles"], f["groups"], f["bits"]
    messages += [
        (mine & ((m < 1) | (n < 1) | (g < 1)), "m_tiles, n_tiles and groups must be at least 1"),
        (mine & ((bits < 1) | (bits > p.max_bits)), f"bits must be in 1..{p.max_bits}"),
        (
            mine & (f["table_base"] + m * g > p.table_rows),
            f"table_base, m_tiles, groups reach beyond the {p.table_rows} rows of the table buffer",
        ),
        (
            mine & (f["weight_base"] + n * g * bits > p.weight_lines),
            f"weight_base, n_tiles, groups, bits reach beyond the {p.weight_lines} lines of the weight buffer",
        ),
        (
            mine & (f["result_base"] + m * n > p.result_tiles),
            f"result_base, m_tiles, n_tiles reach beyond the {p.result_tiles} tiles of the result buffer",
        ),
        ((op == OP["ORDINARY"]) & (f["kind"] >= len(KINDS)), f"kind must be in 0..{len(KINDS) - 1}"),
    ]
    for broken, _ in messages:
        bad |= broken
    if bad.any():
        i = int(np.argmax(bad))
        message = next(text for broken, text in messages if broken[i])
        raise ValueError(f"{where}instruction {i} ({OPS[int(op[i])].name}): {message}")
