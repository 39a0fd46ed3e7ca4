"""PIM-GPT: processing in GDDR6 banks with a companion ASIC.

Wu, Wang, Lu, "PIM-GPT: a hybrid process-in-memory accelerator for autoregressive transformers", npj
Unconventional Computing 2024; the commodity device that it builds on is SK hynix's GDDR6-AiM (JSSC 2023).
This module holds the spec, the commands that process-in-memory adds to GDDR6, the instruction set, what the
timing rules are made of, and the energy rows. `docs/targets/pim.md` has the pictures.
"""

from collections.abc import Mapping
from dataclasses import replace
from fractions import Fraction
from functools import cached_property
from math import ceil
from typing import Annotated, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field as Limits
from pydantic import model_validator

from tilewright.arch.clock import Clock
from tilewright.arch.dram import GDDR6, Command, Constraint, DramParams, Effect, Needs, Scope
from tilewright.arch.energy import EnergyRow
from tilewright.arch.hostmap import HostMap, Region
from tilewright.arch.isa import Field, InstructionSet, Op, Record
from tilewright.arch.pim_asic import AsicSection, passes, step_latency, tree_latency, vector_lanes
from tilewright.arch.spec import NonNegative, Positive, Section, Spec
from tilewright.arch.trace import TraceForm

# ---- commands and constraints beside GDDR6's own ------------------------------------------------------

_AIM = "GDDR6-AiM edges as in aim_simulator src/dram/impl/GDDR6.cpp @ 0f28a07b"
_OURS = "tilewright: pipeline of the MAC unit and ports of the global buffer"
_ASSUMED = "assumed: opening all banks at once counts as four activates"
_ALL = ("ACT", "ACTab", "PREpb", "PREab", "RD", "WR", "MACab", "WRGB", "RDMAC", "REFab")


def _c(
    preceding: str, following: str, latency: str, cause: str, source: str = _AIM, title: str = ""
) -> Constraint:
    p, f = tuple(preceding.split()), tuple(following.split())
    title = title or f"channel: {preceding} to {following}"
    return Constraint(Scope.CHANNEL, p, f, latency, cause, title=title, source=source)


GDDR6_PIM = GDDR6.extend(
    "gddr6-pim",
    commands=(
        Command("ACTab", Scope.CHANNEL, Needs.ALL_CLOSED, Effect.OPEN_ALL),
        Command("MACab", Scope.CHANNEL, Needs.ALL_OPEN, Effect.NONE),
        Command("WRGB", Scope.CHANNEL, Needs.ANY, Effect.NONE),
        Command("RDMAC", Scope.CHANNEL, Needs.ANY, Effect.NONE),
    ),
    parameters={
        "n_rcd_mac": "activate to all-bank MAC",
        "n_cl_reg": "read latency of the accumulators",
        "n_cwl_gb": "write latency of the global buffer",
        "n_wpre": "write preamble",
        "n_mac": "depth of the MAC pipeline: all-bank MAC to accumulator",
    },
    causes=("mac",),
    constraints=(
        _c("RDMAC", "RD RDA RDMAC", "max(n_bl, n_ccd_l)", "column"),
        _c("RD RDA", "RDMAC", "max(n_bl, n_ccd_l)", "column"),
        _c("MACab", "MACab RD RDA RDMAC", "n_ccd_l", "column"),
        _c("RD RDA RDMAC", "MACab", "n_ccd_l", "column"),
        _c("MACab", "RDMAC", "n_mac", "mac", _OURS),
        _c("MACab", "WR WRA WRGB", "n_ccd_l", "column", _OURS),
        _c("WRGB", "WRGB WR WRA", "max(n_bl, n_ccd_s)", "column"),
        _c("WR WRA", "WRGB", "max(n_bl, n_ccd_s)", "column"),
        _c("RD RDA", "WR WRA", "n_cl + n_bl + 3 - n_cwl + n_wpre", "turnaround"),
        _c("RD RDA", "WRGB", "n_cl + n_bl + 3 - n_cwl_gb + n_wpre", "turnaround"),
        _c("RDMAC", "WR WRA", "n_cl_reg + n_bl + 3 - n_cwl + n_wpre", "turnaround"),
        _c("RDMAC", "WRGB", "n_cl_reg + n_bl + 3 - n_cwl_gb + n_wpre", "turnaround"),
        _c("WRGB", "RD RDA RDMAC", "n_cwl_gb + n_bl + n_wtr_s", "turnaround"),
        _c("WR WRA", "RDMAC", "n_cwl + n_bl + n_wtr_l", "turnaround"),
        _c("WR WRA", "MACab", "n_cwl + n_bl + n_wtr_l", "turnaround", _OURS),
        _c("WRGB", "MACab", "n_cwl_gb + n_bl", "turnaround", _OURS),
        _c("ACT ACTab", "MACab", "n_rcd_mac", "activate"),
        _c("ACTab", "RD RDA", "n_rcd_rd", "activate"),
        _c("ACTab", "WR WRA", "n_rcd_wr", "activate"),
        _c("MACab", "PREpb PREab", "n_rtp", "row_cycle"),
        _c("ACTab", "PREpb PREab", "n_ras", "row_cycle"),
        _c("ACTab", "ACT ACTab REFab REFpb", "n_rc", "row_cycle"),
        _c("ACT", "ACTab", "n_rc", "row_cycle"),
        _c("RDA", "ACTab", "n_rtp + n_rp", "row_cycle"),
        _c("WRA", "ACTab", "n_cwl + n_bl + n_wr + n_rp", "row_cycle"),
        _c("PREpb PREab", "ACTab", "n_rp", "precharge"),
        _c("PREab", "PREpb PREab", "n_rp", "precharge"),
        _c("PREpb", "PREab", "n_rp", "precharge"),
        _c("ACTab", "ACT ACTab", "n_rrd_l", "activate_rate"),
        _c("ACT", "ACTab", "n_rrd_l", "activate_rate"),
        _c("ACTab", "ACT ACTab", "n_faw", "activate_rate", _ASSUMED),
        _c("ACT", "ACTab", "n_faw", "activate_rate", _ASSUMED),
        _c("REFab", "ACTab MACab WRGB RDMAC", "n_rfc", "refresh"),
        _c("REFpb", "ACTab", "n_rfc_pb", "refresh"),
        _c("ACTab", "REFpb", "n_rrd_s", "activate_rate"),
    ),
)


class Cmd(NamedTuple):
    """Numbers of the DRAM commands that the PIM controller issues; also the first counters."""

    ACT: int = 0
    ACTAB: int = 1
    PRE: int = 2
    PREAB: int = 3
    RD: int = 4
    WR: int = 5
    MACAB: int = 6
    WRGB: int = 7
    RDMAC: int = 8
    REFAB: int = 9


CMD = Cmd()
DRAM_CAUSES = GDDR6_PIM.causes
# Charging order of a stalled tick. The DRAM's own causes come first; "drain": data of the last command is
# under way; "arrival": `not_before` lies ahead; "wait": another unit executes; "clock": the domain has no
# edge in this tick; "idle": there is nothing to do.
CAUSES = (*DRAM_CAUSES, "drain", "arrival", "wait", "clock", "idle")
COUNTERS = ("act", "act_all", "pre", "pre_all", "rd", "wr", "mac_all", "wr_gb", "rd_mac", "ref", "open_ticks")
ASIC_COUNTERS = ("asic_adds", "asic_multiplies")

# ---- instruction set ----------------------------------------------------------------------------------

_CODE = (
    Field("channels", 32, "mask of the channels that execute", base=16),
    Field("bank", 8, "bank within the channel"),
    Field("row", 16, "DRAM row of the first column"),
    Field("col", 12, "first column within the row; longer accesses run on into the next rows"),
    Field("gb", 12, "first column in the global buffer"),
    Field("cols", 16, "columns", 1),
    Field("outs", 16, "repetitions of the hardware loop", 1),
    Field("pitch", 16, "columns between repetitions"),
    Field("lane", 8, "element within a column"),
    Field("dst", 16, "SRAM column written first"),
    Field("src", 16, "SRAM column read first"),
    Field("src2", 16, "SRAM column of the second operand"),
    Field("src3", 16, "SRAM column of the third operand"),
    Field("stride", 16, "SRAM columns between channels: channel c uses the address plus c * stride"),
    Field("n", 20, "elements"),
    Field("imm", 32, "float32 bits, or an integer", base=16),
    Field("imm2", 32, "float32 bits", base=16),
    Field("alongside", 1, "nothing that another unit still executes is needed or disturbed"),
    Field("clear", 1, "start afresh rather than carry on"),
)
_BANK = ("channels", "bank", "row", "col", "cols", "stride")
_OPS = (
    Op("WR_GB", ("channels", "gb", "cols", "src", "stride"), "SRAM columns to the global buffer"),
    Op(
        "MAC_AB",
        ("channels", "row", "col", "gb", "cols"),
        "all banks: accumulate the products of bank and buffer columns",
    ),
    Op(
        "RD_MAC",
        ("channels", "dst", "stride"),
        "accumulators, rounded to bfloat16, to SRAM; then they are zero",
    ),
    Op(
        "GEMV",
        ("channels", "row", "col", "gb", "cols", "outs", "pitch", "dst", "stride"),
        "outs x (MAC_AB over the next cols columns; RD_MAC to dst, which moves on by pitch)",
    ),
    Op("RD_BK", (*_BANK, "dst"), "columns of one bank to SRAM"),
    Op("WR_BK", (*_BANK, "src"), "SRAM columns to one bank"),
    Op(
        "WR_EL",
        ("channels", "row", "col", "outs", "pitch", "lane", "src", "stride"),
        "outs x (all banks: one element of each bank's column is written, bank b from element b of the SRAM "
        "columns at src); the column moves on by pitch",
    ),
    Op("ADD", ("dst", "src", "src2", "n"), "dst = src + src2"),
    Op("MUL", ("dst", "src", "src2", "n"), "dst = src * src2"),
    Op(
        "SOFTMAX",
        ("dst", "src", "n", "outs", "pitch", "imm"),
        "outs vectors, pitch columns apart: softmax(imm * src)",
    ),
    Op(
        "LAYERNORM",
        ("dst", "src", "src2", "src3", "n", "imm", "imm2"),
        "(src - mean) / sqrt(var + imm) * src2 + src3; imm2 = 1/n",
    ),
    Op(
        "RMSNORM",
        ("dst", "src", "src2", "n", "imm", "imm2"),
        "src / sqrt(mean square + imm) * src2; imm2 = 1/n",
    ),
    Op("GELU", ("dst", "src", "n"), "GELU in its tanh form"),
    Op("SILU", ("dst", "src", "n"), "src / (1 + exp(-src))"),
    Op("RELU", ("dst", "src", "n"), "max(src, 0)"),
    Op(
        "ROPE",
        ("dst", "src", "src2", "src3", "n", "outs", "pitch"),
        "outs vectors of pairs: src * src2 + (src, its pairs swapped) * src3, cosines and signed sines",
    ),
    Op(
        "ARGMAX",
        ("src", "n", "imm", "clear"),
        "running maximum and its index, the first of equals; imm is the index of src[0]",
    ),
)
OPS = tuple(replace(op, fields=(*op.fields, "alongside")) for op in _OPS)
ISA = InstructionSet("pim", (Record("code", _CODE, OPS),))
OP = {op.name: i for i, op in enumerate(OPS)}
N_CHANNEL_OPS = 7  # the ones before ADD run on channels, the others on the ASIC


# ---- spec ---------------------------------------------------------------------------------------------

Count = Annotated[int, Limits(ge=1, le=1 << 20)]
Size = Annotated[int, Limits(ge=1, le=1 << 40)]


class TimingSection(Section):
    """DRAM timings in nanoseconds; n = ceil(t / tick)."""

    t_rcd_rd_ns: Positive
    t_rcd_wr_ns: Positive
    t_rcd_mac_ns: Positive
    t_rp_ns: Positive
    t_ras_ns: Positive
    t_rc_ns: Positive
    t_cl_ns: Positive
    t_cwl_ns: Positive
    t_cl_reg_ns: NonNegative
    t_cwl_gb_ns: Positive
    t_wpre_ns: NonNegative
    t_ccd_s_ns: Positive
    t_ccd_l_ns: Positive
    t_rrd_s_ns: Positive
    t_rrd_l_ns: Positive
    t_faw_ns: Positive
    t_wr_ns: Positive
    t_rtp_ns: Positive
    t_wtr_s_ns: Positive
    t_wtr_l_ns: Positive
    t_ppd_ns: Positive
    t_rfc_ns: Positive
    t_rfc_pb_ns: Positive
    t_rrefd_ns: Positive
    t_refi_ns: Positive


class DramSection(Section):
    """Organisation of one channel and its timings."""

    bankgroups: Annotated[int, Limits(ge=1, le=16)]
    banks_per_group: Annotated[int, Limits(ge=1, le=16)]
    rows: Annotated[int, Limits(ge=1, le=1 << 16)]
    row_bytes: Annotated[int, Limits(ge=2, le=1 << 16)]
    column_bytes: Annotated[int, Limits(ge=2, le=1 << 10)]
    pins: Annotated[int, Limits(ge=1, le=1024)]
    pin_rate_gbps: Positive
    timing: TimingSection

    @model_validator(mode="after")
    def _divides(self) -> "DramSection":
        if self.row_bytes % self.column_bytes:
            raise ValueError(
                f"row_bytes {self.row_bytes} must be a multiple of column_bytes {self.column_bytes}"
            )
        columns = self.row_bytes // self.column_bytes
        if columns & (columns - 1):
            raise ValueError(
                f"row_bytes {self.row_bytes} / column_bytes {self.column_bytes} must be a power of two, not {columns}"
            )
        if columns > 1 << 12:
            raise ValueError(
                f"row_bytes {self.row_bytes} holds more than {1 << 12} columns of {self.column_bytes} bytes"
            )
        return self


class PimSection(Section):
    """What process-in-memory adds to each channel."""

    lanes: Annotated[int, Limits(ge=1, le=256)]
    accumulator: Literal["fp32", "bf16", "fp16"]
    global_buffer_bytes: Annotated[int, Limits(ge=2, le=1 << 20)]
    all_bank_activate: Literal["simultaneous", "staggered"]


class EnergySection(Section):
    """Currents, powers and energies; `kind` and source of each are in the YAML."""

    vdd_v: Positive
    activate_mw: NonNegative
    idd2n_ma: Positive
    idd3n_ma: Positive
    idd4r_ma: Positive
    idd4w_ma: Positive
    idd5b_ma: Positive
    mac_mw_per_channel: NonNegative
    mac_array_reads: NonNegative
    dq_pj_per_bit: NonNegative
    asic_active_mw: NonNegative
    asic_idle_mw: NonNegative


class PimParams(NamedTuple):
    """What follows from a PimSpec: integers and read-only arrays, for kernels and RTL."""

    channels: int
    n_bankgroups: int
    banks_per_group: int
    n_banks: int
    rows: int
    columns: int  # in a row, a power of two
    column_bits: int  # its logarithm
    lanes: int
    gb_columns: int
    sram_columns: int
    bursts: int  # RDMAC commands that read every accumulator once
    staggered: int
    n_refi: int
    asic_p: int
    asic_q: int
    overlap: int
    vector_lanes: int
    register_rows: int
    step_latency: int  # cycles, of the ASIC's clock
    tree_latency: int
    dram: DramParams
    cadence: np.ndarray  # int64[commands]: a command to the same one again on the same bank
    drain: np.ndarray  # int64[channel ops]: last command to completion
    stagger_order: np.ndarray  # int64[banks]: order of single activates, neighbours in different bank groups
    block_start: np.ndarray  # int64[ops + 1]: blocks of operation op are block_start[op]:block_start[op + 1]
    block_steps: np.ndarray  # int64[blocks], as are the rest: see `arch.pim_asic.Passes`
    block_interval: np.ndarray
    block_tail: np.ndarray
    block_scalar: np.ndarray
    block_adds: np.ndarray
    block_multiplies: np.ndarray


class PimSpec(Spec):
    """A PIM-GPT system: `channels` of GDDR6 with MAC units in the banks, and one ASIC."""

    target_name: ClassVar[str] = "pim"

    target: Literal["pim"]
    channels: Annotated[int, Limits(ge=1, le=32)]
    tick_ns: Positive
    dram: DramSection
    pim: PimSection
    asic: AsicSection
    energy: EnergySection

    @model_validator(mode="after")
    def _check(self) -> "PimSpec":
        d, p, a = self.dram, self.pim, self.asic
        if d.column_bytes != 2 * p.lanes:
            raise ValueError(
                f"dram.column_bytes {d.column_bytes} must be 2 * pim.lanes {p.lanes}: a column feeds every lane once"
            )
        if p.lanes & (p.lanes - 1):
            raise ValueError(
                f"pim.lanes must be a power of two, not {p.lanes}: the products are summed by a tree"
            )
        banks = d.bankgroups * d.banks_per_group
        if banks % p.lanes:
            raise ValueError(
                f"dram.bankgroups {d.bankgroups} * dram.banks_per_group {d.banks_per_group} must be a multiple of "
                f"pim.lanes {p.lanes}: reading the accumulators fills whole columns"
            )
        for key, size, most in (
            ("pim.global_buffer_bytes", p.global_buffer_bytes, 1 << 12),
            ("asic.sram_bytes", a.sram_bytes, 1 << 16),
        ):
            if size % d.column_bytes:
                raise ValueError(f"{key} {size} must be a multiple of dram.column_bytes {d.column_bytes}")
            if size // d.column_bytes > most:
                raise ValueError(f"{key} {size} must be at most {most} columns of {d.column_bytes} bytes")
        if Clock.from_mhz(a.clock_mhz).period_s < self.tick.period_s:
            raise ValueError(
                f"asic.clock_mhz {float(a.clock_mhz):g} is faster than tick_ns {float(self.tick_ns):g} ns"
            )
        ratio = Clock.from_mhz(a.clock_mhz).ratio_to(self.tick)
        if max(ratio) >= MAX_TICKS:
            raise ValueError(
                f"asic.clock_mhz {float(a.clock_mhz):g} is {ratio.p}/{ratio.q} of the tick's rate; numbers up to "
                f"{MAX_TICKS - 1} are modelled: choose a rounder clock_mhz or tick_ns"
            )
        n = self.timing
        if max(n.values()) >= MAX_TICKS:
            key = max(n, key=lambda k: n[k])
            raise ValueError(
                f"{_key(key)} is {n[key]} ticks; at most {MAX_TICKS - 1} are modelled: choose a longer tick_ns"
            )
        for small, large in (
            ("n_ras", "n_rc"),
            ("n_rrd_s", "n_rrd_l"),
            ("n_ccd_s", "n_ccd_l"),
            ("n_rrd_s", "n_faw"),
        ):
            if n[small] > n[large]:
                raise ValueError(
                    f"{_key(small)} is {n[small]} ticks, longer than {_key(large)} with {n[large]}"
                )
        # The refresh must find room: close the rows, refresh, open again, before the next is due.
        need = n["n_rfc"] + n["n_rp"] + max(n["n_ras"], n["n_rtp"], n["n_cwl"] + n["n_bl"] + n["n_wr"])
        need += max(n["n_rc"], n["n_rrd_l"] * banks, n["n_faw"] * ceil(banks / 4)) + banks
        if n["n_refi"] <= need:
            raise ValueError(
                f"dram.timing.t_refi_ns is {n['n_refi']} ticks, too short: closing, refreshing (t_rfc_ns "
                f"{n['n_rfc']}) and opening {banks} banks again takes up to {need}"
            )
        return self

    @cached_property
    def tick(self) -> Clock:
        """The device's tick: DRAM commands issue at most one a tick and channel."""
        return Clock.from_ns(self.tick_ns)

    @cached_property
    def timing(self) -> Mapping[str, int]:
        """Timings in ticks under the DRAM standard's names, `n_rcd_rd` from `t_rcd_rd_ns`."""
        t = self.dram.timing
        n = {f"n_{k[2:-3]}": self.tick.cycles_ns(getattr(t, k)) for k in type(t).model_fields}
        bits = Fraction(self.dram.column_bytes * 8)
        n["n_bl"] = self.tick.cycles_ns(bits / self.dram.pins / self.dram.pin_rate_gbps)
        n["n_mac"] = mac_latency(self.pim.lanes)
        return n

    def params(self) -> PimParams:
        """Everything that kernels and RTL need, as integers and read-only arrays. Raises ValueError."""
        d, n = self.dram, self.timing
        banks = d.bankgroups * d.banks_per_group
        dram = GDDR6_PIM.compile(n, bankgroups=d.bankgroups, banks_per_group=d.banks_per_group, commands=_ALL)
        longest = int(dram.row_latency.max())
        if longest >= MAX_TICKS:
            raise ValueError(
                f"dram.timing adds up to a constraint of {longest} ticks; at most {MAX_TICKS - 1} are modelled: "
                f"choose a longer tick_ns"
            )
        ratio = Clock.from_mhz(self.asic.clock_mhz).ratio_to(self.tick)
        lanes = vector_lanes(self.asic, self.pim.lanes)
        table = passes(self.asic, lanes)
        blocks = [table.get(op.name, ()) for op in OPS]
        flat = [block for row in blocks for block in row]
        gb, read_acc = n["n_cwl_gb"] + n["n_bl"], n["n_cl_reg"] + n["n_bl"]
        write = n["n_cwl"] + n["n_bl"]
        drain = [gb, n["n_mac"], read_acc, read_acc, n["n_cl"] + n["n_bl"], write, write]
        return PimParams(
            channels=self.channels,
            n_bankgroups=d.bankgroups,
            banks_per_group=d.banks_per_group,
            n_banks=banks,
            rows=d.rows,
            columns=d.row_bytes // d.column_bytes,
            column_bits=(d.row_bytes // d.column_bytes).bit_length() - 1,
            lanes=self.pim.lanes,
            gb_columns=self.pim.global_buffer_bytes // d.column_bytes,
            sram_columns=self.asic.sram_bytes // d.column_bytes,
            bursts=banks // self.pim.lanes,
            staggered=int(self.pim.all_bank_activate == "staggered"),
            n_refi=n["n_refi"],
            asic_p=ratio.p,
            asic_q=ratio.q,
            overlap=int(self.asic.overlap),
            vector_lanes=lanes,
            register_rows=self.asic.register_rows,
            step_latency=step_latency(self.asic),
            tree_latency=tree_latency(self.asic, lanes),
            dram=dram,
            cadence=_array([_cadence(dram, c) for c in range(dram.n_commands)]),
            drain=_array(drain),
            stagger_order=_array(
                [g * d.banks_per_group + b for b in range(d.banks_per_group) for g in range(d.bankgroups)]
            ),
            block_start=_array(np.cumsum([0, *(len(row) for row in blocks)])),
            block_steps=_array([b.steps for b in flat]),
            block_interval=_array([b.interval for b in flat]),
            block_tail=_array([b.tail for b in flat]),
            block_scalar=_array([b.scalar for b in flat]),
            block_adds=_array([b.adds for b in flat]),
            block_multiplies=_array([b.multiplies for b in flat]),
        )


SPEC = PimSpec
MAX_TICKS = 1 << 16  # RTL holds ages of commands, the refresh interval and the clock ratio in 16 bits


def mac_latency(lanes: int) -> int:
    """Ticks from an all-bank MAC to its sum standing in the accumulators.

    One to read bank and buffer, one for the products, one for each level of the adder tree, one to accumulate.
    """
    return 3 + (lanes - 1).bit_length()


def _cadence(dram: DramParams, command: int) -> int:
    rows = range(dram.row_start[command], dram.row_start[command + 1])
    same = [int(dram.row_latency[r]) for r in rows if dram.row_prev[r] == command and dram.row_window[r] == 1]
    return max(same, default=1)


def _key(name: str) -> str:
    return {"n_bl": "dram.pin_rate_gbps (burst)", "n_mac": "pim.lanes (MAC pipeline)"}.get(
        name, f"dram.timing.t_{name[2:]}_ns"
    )


def _array(values: object) -> np.ndarray:
    out = np.array(values, np.int64)
    out.flags.writeable = False
    return out


# ---- host port ----------------------------------------------------------------------------------------


def registers(p: PimParams) -> list[str]:
    """Names of the RTL's registers, in order: everything about time that is not structure."""
    rows = [f"latency_{r}" for r in range(len(p.dram.row_prev))]
    return [
        "length",
        "n_refi",
        "staggered",
        "overlap",
        "argmax_value",
        "argmax_index",
        "asic_p",
        "asic_q",
        *(f"drain_{o}" for o in range(len(p.drain))),
        *rows,
    ]


def register_values(p: PimParams, length: int, argmax: tuple[int, int] = (0, 0)) -> list[int]:
    """What the registers hold for a program of `length` instructions, begun with `argmax` as the best so far."""
    own = [length, p.n_refi, p.staggered, p.overlap, *argmax, p.asic_p, p.asic_q]
    return [*own, *(int(v) for v in p.drain), *(int(v) for v in p.dram.row_latency)]


def status_names(p: PimParams) -> list[str]:
    """Names of the RTL's read-only words: counters and stalls as the Timeline names them; then state."""
    stalls = ("busy", *CAUSES)
    names = ["ticks", *ASIC_COUNTERS, *(f"{unit}.{s}" for unit in ("sequencer", "asic") for s in stalls)]
    for c in range(p.channels):
        names += [f"channel {c}.{n}" for n in (*COUNTERS, *stalls)]
    names += [f"acc {c}.{b}" for c in range(p.channels) for b in range(p.n_banks)]
    return [*names, "argmax_value", "argmax_index"]


TRACE_FIELDS = {"tick": 32, "code": 8, "bank": 8, "row": 16}  # bits of a command in the RTL's command log


def hostmap(p: PimParams, depth: int, trace_depth: int = 0) -> HostMap:
    """Regions of the host port for a code memory of `depth` instructions; the DRAM arrays are not among them.

    `trace_depth` is the number of DRAM commands that the RTL logs of each channel.
    """
    column = 16 * p.lanes
    traces = range(p.channels) if trace_depth else ()
    return HostMap(
        [
            Region("registers", len(registers(p))),
            Region("status", len(status_names(p))),
            Region("code", depth, ISA.record("code").bits),
            Region("log", depth, 64),
            Region("sram", p.sram_columns, column),
            *(Region(f"gb_{c}", p.gb_columns, column) for c in range(p.channels)),
            *(Region(f"trace_{c}", trace_depth, sum(TRACE_FIELDS.values())) for c in traces),
        ]
    )


# ---- traces -------------------------------------------------------------------------------------------

_COMMANDS = tuple(GDDR6_PIM.command(name) for name in _ALL)
_NAMES_BANK = np.array([c.scope is Scope.BANK for c in _COMMANDS])
_NAMES_ROW = np.array(
    [c.needs in (Needs.OPEN, Needs.ALL_OPEN) or c.effect in (Effect.OPEN, Effect.OPEN_ALL) for c in _COMMANDS]
)


def addressed(trace: np.ndarray) -> np.ndarray:
    """DRAM commands int64[n, 5] (tick, channel, command, bank, row) with -1 for what a command does not name."""
    out = trace.copy()
    out[~_NAMES_BANK[trace[:, 2]], 3] = -1
    out[~_NAMES_ROW[trace[:, 2]], 4] = -1
    return out


def trace_form(spec: "PimSpec") -> TraceForm:
    """How a trace of this machine is drawn."""
    p = spec.params()
    holds = [1] * len(_ALL)
    holds[CMD.REFAB] = spec.timing["n_rfc"]
    return TraceForm(
        operations=tuple(op.name for op in OPS),
        executes=tuple("" if i < N_CHANNEL_OPS else "asic" for i in range(len(OPS))),
        commands=_ALL,
        opens=frozenset((CMD.ACT, CMD.ACTAB)),
        closes=frozenset((CMD.PRE, CMD.PREAB)),
        cadence=tuple(int(n) for n in p.cadence),
        holds=tuple(holds),
        banks=p.n_banks,
    )


# ---- energy -------------------------------------------------------------------------------------------


def energy(spec: PimSpec) -> tuple[EnergyRow, ...]:
    """Energy of each event and of background, over all channels, in picojoules.

    DRAM by the usual current formulas (as in Micron TN-40-07): column accesses from IDD4 above active standby for
    one burst, refresh from IDD5B, background from IDD3N with a row open and IDD2N without. Activate and
    precharge: a power over tRC, as CENT does for GDDR6-AiM. An all-bank activate costs one for each bank.
    """
    e, t, n = spec.energy, spec.dram.timing, spec.timing
    tick = spec.tick_ns
    banks = spec.dram.bankgroups * spec.dram.banks_per_group
    burst_ns = n["n_bl"] * tick
    dq = e.dq_pj_per_bit * spec.dram.column_bytes * 8
    act = e.activate_mw * t.t_rc_ns
    read = e.vdd_v * (e.idd4r_ma - e.idd3n_ma) * burst_ns
    write = e.vdd_v * (e.idd4w_ma - e.idd3n_ma) * burst_ns
    cadence_ns = n["n_ccd_l"] * tick
    array = e.mac_array_reads * e.vdd_v * (e.idd4r_ma - e.idd3n_ma) * cadence_ns
    standby = e.vdd_v * e.idd2n_ma * tick * spec.channels

    def row(name: str, counter: str, pj: Fraction, source: str) -> EnergyRow:
        return EnergyRow(name, counter, pj, source)

    return (
        row("activate, precharge", "act", act, "energy.activate_mw"),
        row("activate, precharge (all banks)", "act_all", act * banks, "energy.activate_mw"),
        row("read", "rd", read + dq, "energy.idd4r_ma, dq_pj_per_bit"),
        row("write", "wr", write + dq, "energy.idd4w_ma, dq_pj_per_bit"),
        row("MAC: bank array", "mac_all", array, "energy.mac_array_reads, idd4r_ma"),
        row("MAC: units", "mac_all", e.mac_mw_per_channel * cadence_ns, "energy.mac_mw_per_channel"),
        row("global buffer transfer", "wr_gb", dq, "energy.dq_pj_per_bit"),
        row("accumulator transfer", "rd_mac", dq, "energy.dq_pj_per_bit"),
        row("refresh", "ref", e.vdd_v * (e.idd5b_ma - e.idd2n_ma) * t.t_rfc_ns, "energy.idd5b_ma"),
        row("background", "ticks", standby + e.asic_idle_mw * tick, "energy.idd2n_ma, asic_idle_mw"),
        row(
            "background, row open",
            "open_ticks",
            e.vdd_v * (e.idd3n_ma - e.idd2n_ma) * tick,
            "energy.idd3n_ma",
        ),
        row("ASIC", "busy:asic", (e.asic_active_mw - e.asic_idle_mw) * tick, "energy.asic_active_mw"),
    )
