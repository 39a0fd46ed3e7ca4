"""Reconfigurable dataflow units: SambaNova SN40L, and Plasticine as the second preset.

Prabhakar et al., "SambaNova SN40L: scaling the AI memory wall with dataflow and composition of experts", MICRO 2024
(arXiv 2405.07518); Prabhakar et al., "Plasticine: a reconfigurable architecture for parallel patterns", ISCA 2017.
This module holds the spec, the configuration records of every unit, what its timing rules are made of, and the
energy rows.

A socket is a grid of `columns` x `rows` positions, x to the east and y to the south. Position (x, y) holds a switch
and a unit: a PCU (compute) where x + y is even, a PMU (memory) where it is odd. AGCUs, the gates to off-chip memory,
hang on the outer ports of the first and last column's switches, in the first `per_side` rows.

Words have 32 bits: float32, int32, or a bfloat16 in the upper half above zeros. A vector is `lanes` words. What
travels is a *packet*: a flow (how switches route it), a sequence id, a last flag and the data; a packet of the
scalar network has one word. Control is made of tokens, pulses on wires of their own.

Every unit is led by a *counter chain*: up to `LEVELS` nested loops, level 0 the innermost. An event "of level n"
happens once for each iteration of the loops from level n upwards, that is at the first or the last of the iterations
of the levels below: level 0 is every iteration, and level `LEVELS` the whole nest.
"""

from collections.abc import Mapping
from fractions import Fraction
from functools import cached_property
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field as Limits
from pydantic import model_validator

from tilewright.arch.clock import Clock
from tilewright.arch.energy import EnergyRow
from tilewright.arch.isa import Field, InstructionSet, Op, Record
from tilewright.arch.spec import NonNegative, Positive, Section, Spec

# ---- sizes that the records fix -----------------------------------------------------------------------

WORD_BITS = 32
LEVELS = 6  # counters of a chain
INPUTS = 4  # vector inputs, and scalar inputs, of a unit
REGISTERS = 16  # of each lane
TOKENS = 4  # control inputs, and control outputs, of a unit
TOKENS_HELD = 15  # of one control input
STAGES = 32
BANK_BITS = 6
ADDRESS_BITS = 24  # of a word within a tensor that may span PMUs
COUNT_BITS = 24
SEQUENCE_BITS = 20
FLOW_BITS = 16

# ---- packets ------------------------------------------------------------------------------------------

# The flow of a packet. Static: an index of the table at the switch's port. Dynamic: where it goes.
DYNAMIC = 1 << 15
X_BITS, Y_BITS, LOCAL_BITS = 6, 6, 3
MESH = ("north", "east", "south", "west")  # ports 0..3 of a switch; local ports follow
OPPOSITE = (2, 3, 0, 1)


def dynamic_flow(x: int, y: int, port: int = 0) -> int:
    """The flow that dimension order leads to local port `port` at position (x, y).

    >>> hex(dynamic_flow(3, 2, 1))
    '0x9083'
    """
    return DYNAMIC | port << X_BITS + Y_BITS | y << X_BITS | x


# ---- units, causes, counters --------------------------------------------------------------------------

UNITS = ("pcu", "pmu.write", "pmu.read", "agcu")
# Units are named by kind and place: `pcu@3,1`, `pmu.read@2,1`, `agcu@0`; besides, there are `sequencer` and `dma`.
# Charging order of a stalled tick. "output": what is done can't leave; "drain": the results of the tile before are
# still leaving the array; "bank": a bank serves another access; "token": a control token is missing; "operand": an
# input is empty; "interval": the accumulator is at work, or the throttle holds; "memory": the off-chip memory moves
# nothing for this unit in this tick; "launch": configuration or arguments are being loaded; "arrival": `not_before`
# lies ahead; "pipeline": all is issued, not all complete; "idle": there is nothing to do.
CAUSES = (
    *("output", "drain", "bank", "token", "operand", "interval"),
    *("memory", "launch", "arrival", "pipeline", "idle"),
)
CAUSE = {name: i + 1 for i, name in enumerate(CAUSES)}  # activity of a unit: 0 is busy
# Iterations, lane operations and multiply-accumulates of PCUs; words read and written, ticks in which banks conflict,
# addresses out of range of PMUs; packets by link; lines of AGCUs by tier, lines of the DMA; kernels.
COUNTERS = (
    *("iterations", "lane_ops", "macs", "words_read", "words_written", "bank_conflicts", "dropped"),
    *("vector_hops", "scalar_hops", "hbm_lines", "ddr_lines", "remote_lines", "copied_lines", "launches"),
    # Of channels with timed banks: rows opened; for which another one was closed; refreshes before a line.
    *(f"{tier}_{what}" for tier in ("hbm", "ddr") for what in ("activates", "row_conflicts", "refreshes")),
)

# ---- configuration ------------------------------------------------------------------------------------

MODES = ("off", "simd", "systolic")
STAGE_OPS = (
    *("pass", "add", "subtract", "multiply", "maximum", "minimum", "less", "select"),
    *("shift_left", "shift_right", "and", "or", "xor"),
)
TYPES = ("fp32", "bf16", "int32")
FOLDS = ("none", "add", "maximum", "minimum")
OPERANDS = ("register", "constant", "counter", "lane")
TIERS = ("hbm", "ddr", "remote")
FUNCTIONS = ("none", "exp", "reciprocal", "rsqrt", "sigmoid")
FORMATS = ("word", "bf16")
ELEMENT_BYTES = (4, 2)  # of each format, off chip

_PLACE = (Field("x", X_BITS, "column"), Field("y", Y_BITS, "row"))
_TAG = Field("tag", 16, "operator that the unit works for", tag=True)


def _level(name: str, doc: str) -> Field:
    return Field(name, 3, f"{doc}: level of the event")


def chain_fields(prefix: str = "") -> tuple[Field, ...]:
    """Loop counts and control tokens of one counter chain."""
    return (
        *(Field(f"{prefix}count{n}", COUNT_BITS, f"iterations of level {n}", 1) for n in range(LEVELS)),
        Field(f"{prefix}wait", TOKENS, "control inputs of which a token each is taken", base=16),
        _level(f"{prefix}wait_level", "before the first iteration"),
        Field(f"{prefix}signal", TOKENS, "control outputs that give a token each", base=16),
        _level(f"{prefix}signal_level", "behind the last iteration"),
        *(
            Field(f"{prefix}hold{i}", 4, f"tokens that control input {i} holds at the start")
            for i in range(TOKENS)
        ),
        Field(f"{prefix}interval", 12, "fewest ticks between iterations (packet throttling)", 1),
    )


def _output() -> tuple[Field, ...]:
    return (
        Field("flow", FLOW_BITS, "flow of the packets that leave", base=16),
        Field("sequence", SEQUENCE_BITS, "sequence id of the first packet"),
        Field("sequence_step", SEQUENCE_BITS, "and what each next one adds", 1),
        _level("last_level", "last flag of packets"),
    )


def _pattern(prefix: str) -> tuple[Field, ...]:
    """Addresses of one side of a PMU, in words: base + sum of counter * stride + sequence id * scale + lane * step."""
    return (
        Field(f"{prefix}base", ADDRESS_BITS, "address of the first word"),
        *(
            Field(f"{prefix}stride{n}", ADDRESS_BITS, f"words an iteration of level {n}")
            for n in range(LEVELS)
        ),
        Field(f"{prefix}lane_stride", ADDRESS_BITS, "words from lane to lane", 1),
    )


CONFIG_PCU = Record(
    "config.pcu",
    (
        *_PLACE,
        Field("mode", 2, "use of the body", names=MODES),
        *chain_fields(),
        Field("vectors", INPUTS, "vector inputs in use: input i fills register i of every lane", base=16),
        *(_level(f"vector{i}_level", f"vector input {i} is popped") for i in range(INPUTS)),
        Field("scalars", INPUTS, "scalar inputs in use: input i fills register 4 + i of all lanes", base=16),
        *(_level(f"scalar{i}_level", f"scalar input {i} is popped") for i in range(INPUTS)),
        Field("result", 4, "register that leaves the SIMD pipeline"),
        Field("fold", 2, "lane-wise accumulation of the results", names=FOLDS),
        _level("fold_level", "an accumulated result leaves"),
        Field("fold_type", 2, "number format of accumulation and tree", names=TYPES),
        Field("tree", 2, "reduction across the lanes", names=FOLDS),
        Field("function", 3, "special function of the tail", names=FUNCTIONS),
        Field("gated", 1, "what the function gives is multiplied by the register `gate`"),
        Field("gate", 4, "register that travels along to the tail; without fold and tree"),
        Field("round", 1, "results are rounded to bfloat16 in the tail"),
        Field("send_vector", 1, "results leave by the vector output"),
        Field("send_scalar", 1, "lane 0 of the results leaves by the scalar output"),
        *_output(),
        Field("scalar_flow", FLOW_BITS, "flow of scalar packets", base=16),
        _TAG,
    ),
    at=("x", "y"),
    command=False,
)
CONFIG_STAGE = Record(
    "config.stage",
    (
        *_PLACE,
        Field("stage", 6, "stage of the SIMD pipeline"),
        Field("operation", 4, "what it does", names=STAGE_OPS),
        Field("type", 2, "number format", names=TYPES),
        *(
            f
            for name in "ab"
            for f in (
                Field(f"{name}_from", 2, f"kind of operand {name}", names=OPERANDS),
                Field(name, 4, f"register, or counter level, of operand {name}"),
            )
        ),
        Field("c", 4, "register that chooses: a where it is not zero, else b"),
        Field("constant", WORD_BITS, "word that the operands may take", base=16),
        Field("to", 4, "register that takes the result"),
    ),
    at=("x", "y", "stage"),
    command=False,
)
CONFIG_PMU = Record(
    "config.pmu",
    (
        *_PLACE,
        Field("enable", 2, "sides that run: 1 write, 2 read", base=16),
        *(
            Field(f"bank_bit{i}", 5, f"address bit that is bit {i} of the bank, ascending", i)
            for i in range(BANK_BITS)
        ),
        Field("skew_bits", 3, "low bits of the bank to which the row is added (diagonal stripes); 0: none"),
        Field("skew_shift", 5, "the row is the address from this bit upwards"),
        Field("low", ADDRESS_BITS, "first address held here, stored at word 0; those below are dropped"),
        Field("words", ADDRESS_BITS, "addresses held here; those beyond are dropped"),
        *chain_fields("write_"),
        *_pattern("write_"),
        Field("sequence_scale", ADDRESS_BITS, "words that a packet's sequence id adds to its address"),
        *chain_fields("read_"),
        *_pattern("read_"),
        *_output(),
        _TAG,
    ),
    at=("x", "y"),
    command=False,
)
NETWORKS = ("vector", "scalar")
CONFIG_SWITCH = Record(
    "config.switch",
    (
        *_PLACE,
        Field("network", 1, "which network's switch", names=NETWORKS),
        Field("port", 4, "port by which the packet comes in"),
        Field("flow", 8, "its static flow"),
        Field("out", 4 + INPUTS, "ports by which copies leave, mesh ports lowest", base=16),
        Field("next_flow", FLOW_BITS, "their flow", base=16),
    ),
    at=("x", "y"),
    command=False,
)
CONFIG_TOKEN = Record(
    "config.token",
    (
        *_PLACE,
        Field("from_agcu", 1, "the token comes from the AGCU at this switch, not from the unit"),
        Field("output", 3, "control output; those of a PMU's read side follow its write side's"),
        Field("to_x", X_BITS, "column of the unit that takes the token"),
        Field("to_y", Y_BITS, "its row"),
        Field("to_agcu", 1, "it is the AGCU at that switch, not the unit"),
        Field("input", 3, "its control input; those of a PMU's read side follow its write side's"),
    ),
    at=("x", "y"),
    command=False,
)
CONFIG_AGCU = Record(
    "config.agcu",
    (
        Field("agcu", 8, "which one: those of the west side first, each side from the north"),
        Field("direction", 2, "what it does", names=("off", "load", "store")),
        Field("tier", 2, "memory", names=TIERS),
        *chain_fields(),
        Field("argument", 8, "argument register that holds the first byte's address"),
        *(Field(f"stride{n}", 40, f"bytes an iteration of level {n}", signed=True) for n in range(LEVELS)),
        Field("words", 7, "consecutive elements of an iteration; the lanes behind are 0"),
        Field("format", 1, "of an element off chip: bf16 is the upper half of a word", names=FORMATS),
        *_output(),
        _TAG,
    ),
    at=("agcu",),
    command=False,
)
ARGS = Record(
    "args",
    (Field("index", 8, "argument register"), Field("value", 48, "a byte address", base=16)),
    at=("index",),
    command=False,
)
# The three commands of a kernel launch (arXiv 2405.07518, IV-D), and transfers between memories.
OPS = (
    Op(
        "PROGRAM_LOAD",
        ("section",),
        "the configuration records of a segment into the units, which are all off before",
    ),
    Op("ARGUMENT_LOAD", ("section",), "the argument registers of a segment"),
    Op("KERNEL_EXECUTE", ("host",), "start every unit, and wait until all are done"),
    Op(
        "COPY",
        ("source", "target", "from", "to", "lines"),
        "lines from one memory to the other, alongside what follows",
    ),
    Op("WAIT", (), "until the last COPY is done"),
)
OP = {op.name: i for i, op in enumerate(OPS)}
LINE_BITS = 38  # of a line's number within a memory
CODE = Record(
    "code",
    (
        Field("section", 16, "segment that holds the records"),
        Field("host", 1, "launched by the host's software, rather than by the AGCUs"),
        Field("source", 2, "memory that is read", names=TIERS),
        Field("target", 2, "memory that is written", names=TIERS),
        Field("from", LINE_BITS, "first line read"),
        Field("to", LINE_BITS, "first line written"),
        Field("lines", LINE_BITS, "lines copied", 1),
    ),
    OPS,
)
CONFIGS = (CONFIG_PCU, CONFIG_STAGE, CONFIG_PMU, CONFIG_SWITCH, CONFIG_TOKEN, CONFIG_AGCU)
ISA = InstructionSet(
    "rdu",
    (*CONFIGS, ARGS, CODE),
)

# ---- spec ---------------------------------------------------------------------------------------------

MAX_TICKS = 1 << 20
RATE_BITS = 31  # of numerator and denominator of a rate
Cycles = Annotated[int, Limits(ge=1, le=64)]
Efficiency = Annotated[Positive, Limits(le=1)]


class GridSection(Section):
    """Positions of a socket; dies are side by side, each with an equal share of the columns."""

    columns: Annotated[int, Limits(ge=2, le=1 << X_BITS)]  # so that no switch has AGCUs on both sides
    rows: Annotated[int, Limits(ge=1, le=1 << Y_BITS)]
    dies: Annotated[int, Limits(ge=1, le=4)]


class PcuSection(Section):
    """A compute unit: `lanes` x `stages` functional units, as SIMD pipeline or as systolic array."""

    lanes: Annotated[int, Limits(ge=2, le=64)]
    stages: Annotated[int, Limits(ge=1, le=STAGES)]
    registers: Annotated[int, Limits(ge=2, le=REGISTERS)]
    counters: Annotated[int, Limits(ge=1, le=LEVELS)]
    vector_inputs: Annotated[int, Limits(ge=1, le=INPUTS)]
    scalar_inputs: Annotated[int, Limits(ge=0, le=INPUTS)]
    op_latency_cycles: Annotated[int, Limits(ge=1, le=16)]
    systolic: bool
    exp_terms: Annotated[int, Limits(ge=1, le=16)]
    reciprocal_iterations: Annotated[int, Limits(ge=0, le=8)]
    rsqrt_iterations: Annotated[int, Limits(ge=0, le=8)]


class PmuSection(Section):
    """A memory unit: banks of 32-bit words with one port each."""

    bytes: Annotated[int, Limits(ge=8, le=1 << 24)]
    banks: Annotated[int, Limits(ge=2, le=1 << BANK_BITS)]
    counters: Annotated[int, Limits(ge=1, le=LEVELS)]


class NetworkSection(Section):
    """Switches and links. A link's queue is the input FIFO of what it leads to."""

    fifo_depth: Annotated[int, Limits(ge=1, le=256)]
    hop_cycles: Cycles
    credit_cycles: Cycles
    die_hop_cycles: Cycles
    token_cycles: Cycles
    flows: Annotated[int, Limits(ge=1, le=256)]
    order: Literal["xy", "yx"]


class AgcuSection(Section):
    """Gates to off-chip memory."""

    per_side: Annotated[int, Limits(ge=1, le=1 << Y_BITS)]
    counters: Annotated[int, Limits(ge=1, le=LEVELS)]
    in_flight: Annotated[int, Limits(ge=1, le=1 << 12)]


class DramSection(Section):
    """Banks of a channel, and the fewest nanoseconds between its commands (rules: `DRAM_TIMINGS`)."""

    bank_groups: Annotated[int, Limits(ge=1, le=16)]
    banks_per_group: Annotated[int, Limits(ge=1, le=16)]
    row_bytes: Annotated[int, Limits(ge=1, le=1 << 20)]
    ahead_ns: Positive
    rcd_ns: Positive
    rp_ns: Positive
    ras_ns: Positive
    rtp_ns: Positive
    wtp_ns: Positive
    ccd_s_ns: Positive
    ccd_l_ns: Positive
    rrd_ns: Positive
    rtw_ns: Positive
    wtr_ns: Positive
    refi_ns: Positive
    rfc_ns: Positive


class TierSection(Section):
    """A memory of one socket, by size, bandwidth and latency; a socket without it has 0 bytes.

    AGCU i has its share of channel i modulo `channels`, which moves at most a line of `lanes` words a tick. With
    `channel: dram` the banks of `dram` say when a line moves, in place of `gb_per_s` and `efficiency`; `latency_ns` is
    that of a read of a closed bank.
    """

    channel: Literal["port", "dram"] = "port"
    dram: DramSection | None = None

    bytes: Annotated[int, Limits(ge=0, le=1 << 44)]
    channels: Annotated[int, Limits(ge=1, le=128)]
    gb_per_s: Positive
    efficiency: Efficiency
    latency_ns: Positive


class MemorySection(Section):
    """Off-chip memories of a socket."""

    hbm: TierSection
    ddr: TierSection


class NodeSection(Section):
    """Sockets of one host, how they reach one another, and the DMA between their memories: `copy_lines` a beat."""

    sockets: Annotated[int, Limits(ge=1, le=64)]
    p2p_gb_per_s: Positive
    p2p_channels: Annotated[int, Limits(ge=1, le=128)]
    p2p_latency_ns: Positive
    ddr_to_hbm_gb_per_s: Positive
    copy_lines: Annotated[int, Limits(ge=1, le=8)]


class LaunchSection(Section):
    """What a kernel launch costs, by who schedules it."""

    orchestration: Literal["host", "hardware"]
    program_load_us: NonNegative
    argument_load_us: NonNegative
    host_launch_us: NonNegative
    hardware_launch_us: NonNegative


class EnergySection(Section):
    """Energies and powers; `kind` and source of each are in the YAML."""

    mac_pj: NonNegative
    lane_op_pj: NonNegative
    sram_pj_per_bit: NonNegative
    hop_pj_per_bit: NonNegative
    hbm_pj_per_bit: NonNegative
    ddr_pj_per_bit: NonNegative
    p2p_pj_per_bit: NonNegative
    idle_w: NonNegative


# Columns of RduParams.dram: whether the banks are in use, the bits of a line's number, timings in ticks.
#
# A line's number is, from its lowest bit: bank group, column, bank of the group, row. What the timings say, all between
# commands of one channel (C a column command, ACT an activate, PRE a precharge):
DRAM_TIMINGS = (
    "ahead",  # a request is taken while the C of the one before is less than this ahead
    "rcd",  # ACT to C
    "rp",  # PRE to ACT
    "ras",  # ACT to PRE
    "rtp",  # C of a read to PRE
    "wtp",  # C of a write to PRE: write latency, burst and write recovery
    "ccd_s",  # C to C
    "ccd_l",  # C to C of the same bank group
    "rrd",  # ACT to ACT; a quarter of tFAW where that is more
    "rtw",  # C of a read to C of a write
    "wtr",  # C of a write to C of a read: write latency, burst and turnaround
    "refi",  # refresh to refresh
    "rfc",  # a refresh
)
DRAM = ("timed", "group_bits", "column_bits", "bank_bits", *DRAM_TIMINGS)


class RduParams(NamedTuple):
    """What follows from an RduSpec: integers and read-only arrays, for kernels and RTL."""

    columns: int
    rows: int
    die_columns: int  # columns of one die
    pcus: int
    pmus: int
    lanes: int  # words of a vector, rows of the systolic array
    stages: int  # of the SIMD pipeline, columns of the systolic array
    registers: int
    counters: int  # levels of a PCU's chain
    vector_inputs: int
    scalar_inputs: int
    op_latency: int
    systolic: int
    exp_terms: int
    reciprocal_iterations: int
    rsqrt_iterations: int
    banks: int
    bank_words: int
    pmu_counters: int
    fifo_depth: int
    hop: int  # ticks from a switch's queue to the next
    credit: int  # ticks from a pop to the credit's use
    die_hop: int
    token: int  # ticks from a token's event to its use
    flows: int
    y_first: int
    agcus_per_side: int
    agcu_counters: int
    in_flight: int
    channels: np.ndarray  # int64[tiers]
    rate_p: np.ndarray  # int64[tiers]: lines of one channel, p in q ticks
    rate_q: np.ndarray
    latency: np.ndarray  # int64[tiers], ticks
    dram: np.ndarray  # int64[tiers, DRAM]; all zero where a tier has no banks
    tier_lines: np.ndarray  # int64[tiers]; another socket's count as its HBM's
    copy_p: int  # beats of the DMA, p in q ticks
    copy_q: int
    copy_lines: int  # of a beat
    sockets: int
    program_load: int  # ticks
    argument_load: int
    host_launch: int
    hardware_launch: int


class RduSpec(Spec):
    """Sockets of reconfigurable dataflow units, and the memories and links between them."""

    target_name: ClassVar[str] = "rdu"

    target: Literal["rdu"]
    clock_mhz: Positive
    grid: GridSection
    pcu: PcuSection
    pmu: PmuSection
    network: NetworkSection
    agcu: AgcuSection
    memory: MemorySection
    node: NodeSection
    launch: LaunchSection
    energy: EnergySection

    @model_validator(mode="after")
    def _check(self) -> "RduSpec":
        g, c, m = self.grid, self.pcu, self.pmu
        for key, value in (("pcu.lanes", c.lanes), ("pmu.banks", m.banks)):
            if value & (value - 1):
                raise ValueError(f"{key} must be a power of two, not {value}")
        if c.systolic and c.stages > c.lanes:
            raise ValueError(
                f"pcu.stages {c.stages} exceeds pcu.lanes {c.lanes}: a vector feeds every column of the array"
            )
        if c.vector_inputs > c.registers or (c.scalar_inputs and INPUTS + c.scalar_inputs > c.registers):
            raise ValueError(
                f"pcu.registers {c.registers} must hold pcu.vector_inputs {c.vector_inputs}, and from "
                f"{INPUTS} on pcu.scalar_inputs {c.scalar_inputs}"
            )
        if m.bytes % (4 * m.banks):
            raise ValueError(f"pmu.bytes {m.bytes} must be a multiple of 4 * pmu.banks {m.banks}")
        words = m.bytes // (4 * m.banks)
        if words & (words - 1):
            raise ValueError(
                f"pmu.bytes {m.bytes} / pmu.banks {m.banks} must be a power of two of words, not {words}"
            )
        if g.columns % g.dies:
            raise ValueError(f"grid.columns {g.columns} must be a multiple of grid.dies {g.dies}")
        if self.agcu.per_side > g.rows:
            raise ValueError(f"agcu.per_side {self.agcu.per_side} exceeds grid.rows {g.rows}")
        for name, n in zip(TIERS, self.latencies, strict=True):
            if n >= MAX_TICKS:
                raise ValueError(f"the latency of {name} is {n} ticks; at most {MAX_TICKS - 1} are modelled")
        for name, rate, key in zip(
            (*TIERS, "the copies"),
            (*self.line_rates, self.copy_rate),
            ("memory.hbm.channels", "memory.ddr.channels", "node.p2p_channels", "node.copy_lines"),
            strict=True,
        ):
            if rate > 1:
                raise ValueError(
                    f"{key} is too small: {float(rate):.3g} lines of {self.line_bytes} B a tick by a channel of "
                    f"{name}, which moves one at most"
                )
            if max(rate.numerator, rate.denominator) >= 1 << RATE_BITS:
                raise ValueError(
                    f"a channel of {name} moves {rate} lines a tick: more digits than are modelled"
                )
        for name, tier in (("hbm", self.memory.hbm), ("ddr", self.memory.ddr)):
            self._check_dram(f"memory.{name}", tier)
            if tier.bytes % self.line_bytes:
                raise ValueError(
                    f"memory.{name}.bytes {tier.bytes} must be a multiple of {self.line_bytes}, a vector of words"
                )
        return self

    def _check_dram(self, key: str, tier: TierSection) -> None:
        d = tier.dram
        if d is None:
            if tier.channel == "dram":
                raise ValueError(f"{key}.channel dram takes banks and timings: {key}.dram is missing")
            return
        for name, value in (
            ("bank_groups", d.bank_groups),
            ("banks_per_group", d.banks_per_group),
            (f"row_bytes, in lines of {self.line_bytes} bytes,", Fraction(d.row_bytes, self.line_bytes)),
        ):
            if value.denominator != 1 or value.numerator & (value.numerator - 1):
                raise ValueError(f"{key}.dram.{name} must be a power of two, not {value}")
        at = dict(zip(DRAM, self._dram(tier), strict=True))
        for name in DRAM_TIMINGS:
            if at[name] >= MAX_TICKS:
                raise ValueError(
                    f"{key}.dram.{name}_ns is {at[name]} ticks; at most {MAX_TICKS - 1} are modelled"
                )
        if at["refi"] <= at["rp"] + at["rfc"]:
            raise ValueError(
                f"{key}.dram.refi_ns must exceed rp_ns + rfc_ns: {at['refi']} ticks for {at['rp']} + {at['rfc']}"
            )
        if tier.channel == "dram" and self.tick.cycles_ns(tier.latency_ns) <= at["rcd"]:
            raise ValueError(
                f"{key}.latency_ns, which a read of a closed bank takes, must exceed {key}.dram.rcd_ns: "
                f"{self.tick.cycles_ns(tier.latency_ns)} ticks for {at['rcd']}"
            )

    def _dram(self, tier: TierSection) -> list[int]:
        """A row of RduParams.dram."""
        d = tier.dram
        if d is None:
            return [0] * len(DRAM)
        sizes = (d.bank_groups, d.row_bytes // self.line_bytes, d.banks_per_group)
        timings = (self.tick.cycles_ns(getattr(d, f"{name}_ns")) for name in DRAM_TIMINGS)
        return [int(tier.channel == "dram"), *(size.bit_length() - 1 for size in sizes), *timings]

    @cached_property
    def tick(self) -> Clock:
        """The tile's clock."""
        return Clock.from_mhz(self.clock_mhz)

    @property
    def line_bytes(self) -> int:
        """Bytes of a line of memory, as many as a vector's."""
        return self.pcu.lanes * WORD_BITS // 8

    @property
    def pcu_count(self) -> int:
        """PCUs of a socket: the positions of even x + y."""
        return (self.grid.columns * self.grid.rows + 1) // 2

    @property
    def pmu_count(self) -> int:
        """PMUs of a socket."""
        return self.grid.columns * self.grid.rows // 2

    @property
    def peak_flops(self) -> Fraction:
        """Multiplications and additions a second of a socket."""
        return Fraction(2 * self.pcu_count * self.pcu.lanes * self.pcu.stages) / self.tick.period_s

    @cached_property
    def line_rates(self) -> tuple[Fraction, Fraction, Fraction]:
        """Lines a tick of one channel of a socket, by TIERS: at most, where its banks are timed."""
        scale = 10**9 * self.tick.period_s / self.line_bytes
        node = self.node

        def rate(tier: TierSection) -> Fraction:
            if tier.channel == "dram" and tier.dram is not None:
                return Fraction(1, self.tick.cycles_ns(tier.dram.ccd_s_ns))
            return tier.gb_per_s * tier.efficiency * scale / tier.channels

        return (
            rate(self.memory.hbm),
            rate(self.memory.ddr),
            node.p2p_gb_per_s * scale / node.p2p_channels,
        )

    @cached_property
    def copy_rate(self) -> Fraction:
        """Beats a tick of one socket's DMA, each of `copy_lines` lines."""
        beat = self.node.copy_lines * self.line_bytes
        return self.node.ddr_to_hbm_gb_per_s * 10**9 * self.tick.period_s / beat

    @cached_property
    def latencies(self) -> tuple[int, int, int]:
        """Ticks from a request to its answer, by TIERS."""
        return (
            self.tick.cycles_ns(self.memory.hbm.latency_ns),
            self.tick.cycles_ns(self.memory.ddr.latency_ns),
            self.tick.cycles_ns(self.node.p2p_latency_ns),
        )

    def params(self) -> RduParams:
        """Everything that kernels and RTL need, as integers and read-only arrays."""
        g, c, m, n, a, s = self.grid, self.pcu, self.pmu, self.network, self.agcu, self.launch

        def ticks(us: Fraction) -> int:
            return self.tick.cycles_ns(us * 1000)

        return RduParams(
            columns=g.columns,
            rows=g.rows,
            die_columns=g.columns // g.dies,
            pcus=self.pcu_count,
            pmus=self.pmu_count,
            lanes=c.lanes,
            stages=c.stages,
            registers=c.registers,
            counters=c.counters,
            vector_inputs=c.vector_inputs,
            scalar_inputs=c.scalar_inputs,
            op_latency=c.op_latency_cycles,
            systolic=int(c.systolic),
            exp_terms=c.exp_terms,
            reciprocal_iterations=c.reciprocal_iterations,
            rsqrt_iterations=c.rsqrt_iterations,
            banks=m.banks,
            bank_words=m.bytes // (4 * m.banks),
            pmu_counters=m.counters,
            fifo_depth=n.fifo_depth,
            hop=n.hop_cycles,
            credit=n.credit_cycles,
            die_hop=n.die_hop_cycles,
            token=n.token_cycles,
            flows=n.flows,
            y_first=int(n.order == "yx"),
            agcus_per_side=a.per_side,
            agcu_counters=a.counters,
            in_flight=a.in_flight,
            channels=_array([self.memory.hbm.channels, self.memory.ddr.channels, self.node.p2p_channels]),
            rate_p=_array([r.numerator for r in self.line_rates]),
            rate_q=_array([r.denominator for r in self.line_rates]),
            latency=_array(self.latencies),
            dram=_array([self._dram(self.memory.hbm), self._dram(self.memory.ddr), [0] * len(DRAM)]),
            tier_lines=_array(
                [
                    tier.bytes // self.line_bytes
                    for tier in (self.memory.hbm, self.memory.ddr, self.memory.hbm)
                ]
            ),
            copy_p=self.copy_rate.numerator,
            copy_q=self.copy_rate.denominator,
            copy_lines=self.node.copy_lines,
            sockets=self.node.sockets,
            program_load=ticks(s.program_load_us),
            argument_load=ticks(s.argument_load_us),
            host_launch=ticks(s.host_launch_us),
            hardware_launch=ticks(s.hardware_launch_us),
        )


SPEC = RduSpec


def _array(values: object) -> np.ndarray:
    out = np.array(values, np.int64)
    out.flags.writeable = False
    return out


# ---- rules of time ------------------------------------------------------------------------------------

HEADER = 1  # ticks from an iteration to the first stage, or to the array's broadcast wires
TAIL = 1  # ticks of the tail


def is_pcu(x: int, y: int) -> bool:
    """Whether position (x, y) holds a PCU; the others hold PMUs."""
    return (x + y) % 2 == 0


def tail_latency(p: RduParams, function: int) -> int:
    """Ticks that a special function (an index of FUNCTIONS) adds to the tail.

    The additions and multiplications of workloads/asic.py, one after the other, `op_latency` ticks each: the
    exponential has five up to its series' argument and two for each term, the reciprocal three for each iteration,
    the reciprocal square root four for each and one more; the sigmoid is an exponential, an addition and a reciprocal.
    """
    exponential = 5 + 2 * p.exp_terms
    reciprocal = 3 * p.reciprocal_iterations
    operations = (
        0,
        exponential,
        reciprocal,
        1 + 4 * p.rsqrt_iterations,
        exponential + 1 + reciprocal,
    )
    return p.op_latency * operations[function]


def simd_latency(
    p: RduParams, fold: bool = False, tree: bool = False, function: int = 0, gated: bool = False
) -> int:
    """Ticks D from an iteration of the SIMD pipeline to its result at the output.

    N elements on L lanes take D + ceil(N / L) - 1 ticks.
    """
    operations = p.stages + fold + tree * (p.lanes.bit_length() - 1) + gated
    return HEADER + TAIL + p.op_latency * operations + tail_latency(p, function)


def systolic_fill(p: RduParams) -> int:
    """Ticks from an iteration of the systolic array to the accumulators: header, multiplier, adder.

    A tile of K iterations ends K + fill + C ticks after its first iteration began, and tiles follow one another
    every max(K, C) ticks, C being the columns of the array. A special function in the tail adds
    its `tail_latency` to the end.
    """
    return HEADER + p.op_latency + 1


READ_LATENCY = 3
"""Ticks from an iteration of a PMU's read side to its packet, without conflicts: address, bank, alignment."""
WRITE_LATENCY = 2
"""Ticks from an iteration of a PMU's write side until a read of the same word may be issued to its bank."""
LOAD_LATENCY = 2
"""Ticks that a load takes besides its memory's latency, from the grant to its packet: line buffer, alignment."""


# ---- energy -------------------------------------------------------------------------------------------


def energy(spec: RduSpec) -> tuple[EnergyRow, ...]:
    """Energy of each event and of background, in picojoules, of one socket."""
    e = spec.energy
    vector = Fraction(8 * spec.line_bytes)
    rows = (
        ("multiply-accumulates", "macs", e.mac_pj, "energy.mac_pj"),
        ("lane operations", "lane_ops", e.lane_op_pj, "energy.lane_op_pj"),
        ("SRAM reads", "words_read", e.sram_pj_per_bit * WORD_BITS, "energy.sram_pj_per_bit"),
        ("SRAM writes", "words_written", e.sram_pj_per_bit * WORD_BITS, "energy.sram_pj_per_bit"),
        ("vector network", "vector_hops", e.hop_pj_per_bit * vector, "energy.hop_pj_per_bit"),
        ("scalar network", "scalar_hops", e.hop_pj_per_bit * WORD_BITS, "energy.hop_pj_per_bit"),
        ("HBM", "hbm_lines", e.hbm_pj_per_bit * vector, "energy.hbm_pj_per_bit"),
        ("DDR", "ddr_lines", e.ddr_pj_per_bit * vector, "energy.ddr_pj_per_bit"),
        ("other sockets", "remote_lines", e.p2p_pj_per_bit * vector, "energy.p2p_pj_per_bit"),
        (
            "copies between memories",
            "copied_lines",
            (e.hbm_pj_per_bit + e.ddr_pj_per_bit) * vector,
            "energy.hbm_pj_per_bit, energy.ddr_pj_per_bit",
        ),
        ("background", "ticks", e.idle_w * 10**12 * spec.tick.period_s, "energy.idle_w"),
    )
    return tuple(EnergyRow(name, basis, Fraction(pj), source) for name, basis, pj, source in rows)


# ---- checks -------------------------------------------------------------------------------------------


def check_pmu(p: RduParams, config: Mapping[str, int], where: str = "") -> None:
    """Raise ValueError where a PMU's record would let two addresses share a word, or leaves the scratchpad."""
    bits = p.banks.bit_length() - 1
    total = bits + p.bank_words.bit_length() - 1
    positions = [config[f"bank_bit{i}"] for i in range(bits)]
    if positions != sorted(set(positions)) or positions[-1] >= total:
        raise ValueError(f"{where}bank_bit0..{bits - 1} must be ascending and below {total}, not {positions}")
    skew = config["skew_bits"]
    if skew > bits:
        raise ValueError(f"{where}skew_bits must be at most {bits}, not {skew}")
    if skew and config["skew_shift"] <= positions[skew - 1]:
        raise ValueError(
            f"{where}skew_shift {config['skew_shift']} must lie above bank_bit{skew - 1} {positions[skew - 1]}"
        )
    if config["words"] > p.banks * p.bank_words:
        raise ValueError(f"{where}words must be at most {p.banks * p.bank_words}, not {config['words']}")
