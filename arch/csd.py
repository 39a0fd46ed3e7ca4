"""Attention inside computational storage drives (InstInfer): the K/V cache and decode attention live in SSDs.

Pan et al., "InstAttention: In-storage attention offloading for cost-effective long-context LLM inference", HPCA
2025 (first as InstInfer, arXiv 2409.04992). This module holds the spec, the instruction set of a *drive*, what
its timing rules are made of, the host port and the energy rows. What is computed, rounding by rounding, stands in
`workloads/csd_kernels.py`; what the flash does on which tick in `sim/flash.py`.

    host GPU ══ PCIe ══ drive DRAM: vectors | group buffer | value sums | tables L2P
                          │                                             │
             decoder ── writer ── programs, erases ──┐                fetch ── reads (page-level filter)
                          │                          ▼                  │
                          │                     channel 0 .. C-1  ◄─────┘    NAND, as in arch/flash.py
                          │                          │ rows (entry-level filter), one line a tick to a kernel
                          │                     kernel 0, kernel 1 ── argtopk      either takes either job
                          └────── lines ─────────────┘

A *line* is `lanes` FP16 elements: the width of every path, and the operands of a GeMV unit in one tick. A *slot* is
one K/V head of one layer of one sequence. Its cache is stored in pages of two forms:

| form     | page holds                                            | for       | table entry, from the slot's first       |
| -------- | ----------------------------------------------------- | --------- | ---------------------------------------- |
| tokens   | `page_tokens` consecutive tokens, d channels each     | K, V      | 2 * group (K), 2 * group + 1 (V)         |
| channels | `page_channels` consecutive channels of a *span*, that | K         | span * (d / page_channels) + channel     |
|          | is span tokens, each                                  |           | group                                    |

Both are row after row from the first line of the page, a row being a token's channels or a channel's tokens; lines
behind the last row are not used. A slot has `1 << table_bits` entries in each table, so that an entry's address is
slot and group side by side: groups, not bytes, are addressed, which is what makes 32 bits enough.

Decisions where the paper leaves a problem open:

- *Addresses*: 32 bits do not hold batch, layer, token, head and channel (38 for OPT-13B). An entry of a table is
  a group; of which group, the slot's number and the position within it say (27 bits for the same).
- *Staging*: channel-indexed pages span up to 1024 tokens, too many to be staged in DRAM for every head. The
  group buffer holds token-indexed groups only, the last two of each slot: the one that fills, and the one before,
  which is being programmed. When a span is complete, TRANSPOSE reads its token-indexed pages back, and writes
  channel-indexed ones. Tokens behind the last complete span are estimated from their token-indexed rows, of which
  the filter forwards the chosen channels.
- *Mean of V*: kept as its sum in FP32, in the drive's DRAM, where the writer adds each value that passes.
- *Striping*: every channel has a log of its own, which fills page by page in the order of `flash.placement`, and a
  page goes to the channel of its table entry (`channel_of`). Neighbours of a slot lie on other channels, whatever
  order heads and sequences are written in, and heads share blocks, which are only ever filled and erased whole.
- *Reclaim*: logs are rings, and RECLAIM erases their oldest blocks: no live page is copied, and wear is level.
- *Second copy in prefill*: the GPU has both forms of K at hand and sends both; the link carries 1.5 times K and V.
"""

from collections.abc import Mapping
from fractions import Fraction
from functools import cached_property
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
from pydantic import Field as Limits
from pydantic import model_validator

from tilewright.arch.clock import Clock
from tilewright.arch.energy import EnergyRow
from tilewright.arch.flash import (
    Cells,
    FlashParams,
    FlashSpec,
    Geometry,
    Interface,
    Placement,
    Scheduler,
    Suspension,
)
from tilewright.arch.formats import FP16
from tilewright.arch.hostmap import HostMap, Region
from tilewright.arch.isa import Field, InstructionSet, Op, Record
from tilewright.arch.spec import NonNegative, Positive, Section, Spec
from tilewright.arch.system import load_roofline, roofline_presets
from tilewright.arch.trace import TraceForm

# ---- units, causes, counters --------------------------------------------------------------------------

SINGLE_UNITS = ("decoder", "writer", "fetch", "argtopk")  # then kernels and channels, see `unit_names`
SYSTEM_UNITS = ("gpu", "link")  # around the drive, known by rates alone; the RTL has none
# Charging order of a stalled tick. "array": a channel waits for cells; "flash": a kernel waits for pages; "argtopk":
# it waits for a selection; "queue": what a command or a page is for takes no more; "order": writes wait for
# attention before them, attention for writes, and commands for what they come `after`; "arrival": `not_before` lies ahead; "drain": all is issued, not all
# complete; "idle": nothing to do.
CAUSES = ("array", "flash", "argtopk", "queue", "order", "arrival", "drain", "idle")
# Causes for which another unit, or the program, is to blame.
WAITING = ("array", "flash", "argtopk", "queue", "order", "drain", "idle")
# Pages read for attention, and those that the page-level filter left out, by form; pages read for the host, and for
# transposition; pages programmed, blocks erased; lines forwarded to kernels (what the entry-level filter let pass);
# lines to and from the vectors and the group buffer; groups of `lanes` products; exponentials; words of keys
# compared; steps of the scalar units.
COUNTERS = (
    *("channel_pages", "channel_pages_skipped", "token_pages", "token_pages_skipped", "other_pages"),
    *("programs", "erases", "forwarded_lines", "vector_lines", "group_lines"),
    *("products", "exponentials", "compared_words", "scalar_steps"),
)
# Operations and bytes of the GPUs, and bytes over each path for one drive: its share where drives share the path.
SYSTEM_COUNTERS = ("gpu_ops", "gpu_bytes", "link_bytes", "host_bytes", "ssd_read_bytes", "ssd_write_bytes")

# ---- instruction set ----------------------------------------------------------------------------------

ATTENTIONS = ("dense", "sparf")
FORMS = ("tokens", "channels")
# Where a LINK moves bytes: between GPU and drive, host memory, or a plain SSD.
PATHS = ("drive", "host", "ssd_read", "ssd_write")
AFTER_GPU, AFTER_LINK, AFTER_DRIVE = 1, 2, 4  # of the field `after`
# Label of segments that say what a drive holds when the run begins: CONFIG and WRITE, known to tables and logs alone,
# done before the first tick.
CACHED = "cached"
SLOT_BITS, TOKEN_BITS, LINE_BITS = 24, 20, 32

_CODE = (
    Field("attention", 1, "over all tokens, or over those that an estimate selects", names=ATTENTIONS),
    Field("d", 12, "channels of a head, a multiple of the lanes", 128),
    Field("group", 5, "query heads of a K/V head", 1),
    Field("r", 12, "channels of the estimate", 1),
    Field("k", TOKEN_BITS, "tokens that are attended to", 1),
    Field("local", TOKEN_BITS, "tokens at the end that come first among them"),
    Field("mean", 1, "the others count with the mean of the values"),
    Field("scale", 32, "FP32 bits of 1/sqrt(d)", base=16),
    Field("page_tokens", 12, "tokens of a token-indexed page", 1),
    Field("page_channels", 12, "channels of a channel-indexed page", 1),
    Field("span", TOKEN_BITS, "tokens of a channel-indexed page, a multiple of the lanes", 1),
    Field("slot", SLOT_BITS, "slot of the first head; the others follow"),
    Field("heads", 10, "K/V heads", 1),
    Field("tokens", TOKEN_BITS, "tokens attended to, or written", 1),
    Field("spans", 12, "spans of which there are channel-indexed pages"),
    Field("share", 32, "FP32 bits of 1/tokens", base=16),
    Field("form", 1, "form of the pages", names=FORMS),
    Field("first", TOKEN_BITS, "first token (form=tokens), or the span (form=channels)"),
    Field("line", LINE_BITS, "first line of the vectors: queries, keys, or what is read"),
    Field("line2", LINE_BITS, "first line of the results, or of the values"),
    Field("count", 12, "pages of each head, or blocks of each plane", 1),
    Field(
        "after",
        3,
        "what must be done with the commands before: 1 GPU, 2 link, 4 drive, programs and erases in the "
        "background apart",
    ),
    Field("operations", 48, "FP16 operations of the GPU"),
    Field("bytes", 48, "bytes that the GPU, or the link, moves"),
    Field("path", 2, "between the GPU and what", names=PATHS),
)
OPS = (
    Op(
        "CONFIG",
        (
            *("attention", "d", "group", "r", "k", "local", "mean", "scale"),
            *("page_tokens", "page_channels", "span"),
        ),
        "what holds for the commands that follow, until the next CONFIG",
    ),
    Op(
        "ATTEND",
        ("slot", "heads", "tokens", "spans", "share", "line", "line2", "after"),
        "queries at `line`, [heads, group, d]; results to `line2`, as many",
    ),
    Op(
        "WRITE",
        ("form", "slot", "heads", "first", "tokens", "line", "line2", "after"),
        "tokens: keys [heads, tokens, d] at `line`, values at `line2`, to the group buffer, and to flash as pages "
        "fill. channels: keys [heads, d, span] of one span at `line`, to flash",
    ),
    Op(
        "TRANSPOSE",
        ("slot", "heads", "first", "after"),
        "channel-indexed pages of the span `first` from token-indexed ones",
    ),
    Op(
        "READ",
        ("form", "slot", "heads", "first", "count", "line", "after"),
        "`count` pages of each head, from table entry `first` on, whole, to `line`",
    ),
    Op("RECLAIM", ("count", "after"), "erase the oldest `count` blocks of every plane"),
    Op(
        "GPU",
        ("operations", "bytes", "after"),
        "operators of the GPU, known by their amount alone; the RTL has no GPU",
    ),
    Op("LINK", ("bytes", "path", "after"), "a transfer, known by its amount alone; the RTL has no link"),
)
ISA = InstructionSet("csd", (Record("code", _CODE, OPS),))
OP = {op.name: i for i, op in enumerate(OPS)}
READERS = (OP["ATTEND"], OP["TRANSPOSE"], OP["READ"])  # wait for writes, and writes for them
# What a CONFIG sets, by name.
CONFIGURATION = OPS[OP["CONFIG"]].fields

# ---- spec ---------------------------------------------------------------------------------------------

MAX_TICKS = 1 << 24  # the RTL holds a flash time in 24 bits
Efficiency = Annotated[Positive, Limits(le=1)]
Bytes = Annotated[int, Limits(ge=1, le=1 << 50)]


class EngineSection(Section):
    """The attention engine of one drive.

    `lanes` are the multipliers of a GeMV unit; each kernel has one of them, one softmax unit and one scalar unit.
    The argtopk unit compares as many keys in a tick. `batches`: parts of a kernel's operand buffer, a power of two; one is
    worked on while the others fill. `buffer_lines`: lines of a part.
    `max_tokens`: what scores, weights and selections are held for.
    """

    clock_mhz: Positive
    kernels: Annotated[int, Limits(ge=1, le=8)]
    lanes: Annotated[int, Limits(ge=2, le=64)]
    batches: Annotated[int, Limits(ge=2, le=16)]
    buffer_lines: Annotated[int, Limits(ge=2, le=1 << 20)]
    max_tokens: Annotated[int, Limits(ge=2, le=1 << 19)]
    max_channels: Annotated[int, Limits(ge=2, le=1 << 11)]
    max_group: Annotated[int, Limits(ge=1, le=16)]
    exp_terms: Annotated[int, Limits(ge=1, le=16)]
    reciprocal_iterations: Annotated[int, Limits(ge=0, le=8)]
    rsqrt_iterations: Annotated[int, Limits(ge=0, le=8)]
    command_queue: Annotated[int, Limits(ge=1, le=64)]


class AttentionSection(Section):
    """How decode attends. `compression` is the share of K/V traffic that SparF aims at; r and k follow from it
    unless given (0): see `selection`.

    Where no values exist, selections are drawn: channels at random, tokens in runs of `run_tokens` consecutive ones on
    average, `patterns` different ones for the heads in turn.
    """

    kind: Literal["dense", "sparf"]
    compression: Efficiency
    r: Annotated[int, Limits(ge=0, le=1 << 11)]
    k: Annotated[int, Limits(ge=0, le=1 << 19)]
    local: Annotated[int, Limits(ge=0, le=1 << 19)]
    page_channels: Annotated[int, Limits(ge=1, le=1 << 11)]
    page_filter: bool
    run_tokens: Annotated[int, Limits(ge=1, le=1 << 12)]
    patterns: Annotated[int, Limits(ge=1, le=1 << 12)]


class DramSection(Section):
    """The drive's own memory: group buffer, tables, value sums and the vectors that the host leaves and fetches."""

    bytes: Bytes
    table_bits: Annotated[int, Limits(ge=1, le=19)]
    slots: Annotated[int, Limits(ge=1, le=1 << SLOT_BITS)]
    vector_lines: Annotated[int, Limits(ge=1, le=1 << LINE_BITS)]


class FlashSection(Section):
    """NAND and its controllers, as in `arch.flash`. `queue` holds the operations that a channel's controller knows
    of, from their arrival until their rows are forwarded."""

    queue: Annotated[int, Limits(ge=1, le=256)]
    geometry: Geometry
    cells: Cells
    interface: Interface
    suspension: Suspension
    scheduler: Scheduler
    placement: Placement


class LinkSection(Section):
    """A drive's PCIe link, in either direction: peer to peer with the GPU."""

    gb_per_s: Positive
    latency_us: NonNegative


class HostSection(Section):
    """What computes all but attention: GPUs by their roofline, and what the baselines keep K/V in."""

    gpu: str
    gpus: Annotated[int, Limits(ge=1, le=64)]
    compute_efficiency: Efficiency
    memory_efficiency: Efficiency
    launch_us: NonNegative
    gpu_link_gb_per_s: Positive
    memory_bytes: Bytes
    memory_gb_per_s: Positive
    ssd_bytes: Bytes
    ssd_read_gb_per_s: Positive
    ssd_write_gb_per_s: Positive

    @model_validator(mode="after")
    def _known(self) -> "HostSection":
        if self.gpu not in roofline_presets():
            raise ValueError(f"gpu must be one of {', '.join(roofline_presets())}, not {self.gpu!r}")
        if load_roofline(self.gpu).peak_tops.fp16 is None:
            raise ValueError(f"gpu {self.gpu} has no FP16 arithmetic")
        return self


class EnergySection(Section):
    """Energies and powers of one drive; `kind` and source of each are in the YAML."""

    product_pj: NonNegative
    exponential_pj: NonNegative
    compare_pj_per_key: NonNegative
    scalar_step_pj: NonNegative
    buffer_pj_per_bit: NonNegative
    dram_pj_per_bit: NonNegative
    channel_pj_per_bit: NonNegative
    page_read_uj: NonNegative
    page_program_uj: NonNegative
    block_erase_uj: NonNegative
    idle_w: NonNegative


class CsdParams(NamedTuple):
    """What follows from a CsdSpec for one drive: integers and read-only arrays, for kernels and RTL.

    The latencies are those of the functions of the same name.
    """

    kernels: int
    lanes: int
    batches: int
    buffer_lines: int
    max_tokens: int
    max_channels: int
    max_group: int
    exp_terms: int
    reciprocal_iterations: int
    rsqrt_iterations: int
    command_queue: int
    table_bits: int
    slots: int
    vector_lines: int
    page_filter: bool
    page_lines: int
    flash_queue: int
    gemv_latency: int
    reduce_latency: int
    exp_latency: int
    scalar_ticks: np.ndarray  # int64[programs], in order of `scalar_programs`
    run_tokens: int
    patterns: int
    log_strides: np.ndarray  # int64[3]: pages of a log from one chip, die, plane to the next
    gpu_ops_p: int  # the GPUs' operations, p in q ticks
    gpu_ops_q: int
    gpu_bytes_p: int
    gpu_bytes_q: int
    gpu_launch: int  # ticks of every GPU command
    path_p: np.ndarray  # int64[paths]: bytes in ticks, p in q
    path_q: np.ndarray
    path_latency: np.ndarray  # int64[paths], ticks
    page_types: np.ndarray  # int64[pages of a block]: 0, 1, 2 for LSB, CSB, MSB
    flash: FlashParams


class CsdSpec(Spec):
    """A GPU with drives that attend."""

    target_name: ClassVar[str] = "csd"

    target: Literal["csd"]
    drives: Annotated[int, Limits(ge=1, le=64)]
    engine: EngineSection
    attention: AttentionSection
    dram: DramSection
    flash: FlashSection
    link: LinkSection
    host: HostSection
    energy: EnergySection

    @model_validator(mode="after")
    def _check(self) -> "CsdSpec":
        e, f = self.engine, self.flash
        for name in ("lanes", "batches"):
            if getattr(e, name) & (getattr(e, name) - 1):
                raise ValueError(f"engine.{name} must be a power of two, not {getattr(e, name)}")
        for name in ("max_tokens", "max_channels"):
            if getattr(e, name) % e.lanes:
                raise ValueError(
                    f"engine.{name} {getattr(e, name)} must be a multiple of engine.lanes {e.lanes}"
                )
        line = e.lanes * FP16.width // 8
        if f.geometry.page_bytes % line:
            raise ValueError(
                f"flash.geometry.page_bytes {f.geometry.page_bytes} must be whole lines of {line} bytes "
                f"(engine.lanes {e.lanes})"
            )
        if e.buffer_lines % e.lanes:
            raise ValueError(
                f"engine.buffer_lines {e.buffer_lines} must be a multiple of engine.lanes {e.lanes}"
            )
        if f.suspension.of != "none":
            raise ValueError(
                f"flash.suspension.of must be none: the drive suspends nothing, not {f.suspension.of}"
            )
        if f.scheduler.queue_depth:
            raise ValueError(
                f"flash.scheduler.queue_depth must be 0, not {f.scheduler.queue_depth}: flash.queue limits a channel"
            )
        if f.scheduler.window < f.queue:
            raise ValueError(
                f"flash.scheduler.window {f.scheduler.window} must be at least flash.queue {f.queue}: "
                f"a controller looks at all that it holds"
            )
        if f.geometry.channels & (f.geometry.channels - 1):
            raise ValueError(f"flash.geometry.channels must be a power of two, not {f.geometry.channels}")
        for key, ticks in self.flash_device.timing.items():
            if ticks >= MAX_TICKS:
                raise ValueError(f"flash: {key} is {ticks} ticks; at most {MAX_TICKS - 1} are modelled")
            if key.endswith("_command") and not key.startswith("suspend") and not ticks:
                raise ValueError(f"flash.interface.{key}_ns must be above 0: the drive's commands take time")
        if self.dram_bytes > self.dram.bytes:
            raise ValueError(
                f"dram.slots {self.dram.slots} and dram.vector_lines {self.dram.vector_lines} take "
                f"{self.dram_bytes} bytes, more than dram.bytes {self.dram.bytes}"
            )
        return self

    @cached_property
    def tick(self) -> Clock:
        """The engine's clock: one line a tick."""
        return Clock.from_mhz(self.engine.clock_mhz)

    @cached_property
    def flash_device(self) -> FlashSpec:
        """The drive's flash on its own, in ticks of the engine."""
        f = self.flash
        return FlashSpec(
            target="flash", name=f"{self.name}.flash", tick_ns=1000 / self.engine.clock_mhz,
            geometry=f.geometry, cells=f.cells, interface=f.interface, suspension=f.suspension,
            scheduler=f.scheduler, placement=f.placement,
        )  # fmt: skip

    @property
    def page_elements(self) -> int:
        """FP16 elements of a page."""
        return self.flash.geometry.page_bytes * 8 // FP16.width

    @property
    def dram_use(self) -> Mapping[str, int]:
        """Bytes of the drive's DRAM by what they hold, for all slots."""
        d, e = self.dram, self.engine
        line = e.lanes * FP16.width // 8
        return MappingProxyType(
            {
                "group buffer": d.slots * 2 * 2 * self.flash.geometry.page_bytes,
                "tables": d.slots * 2 * (1 << d.table_bits) * 4,
                "value sums": d.slots * e.max_channels * 4,
                "vectors": d.vector_lines * line,
            }
        )

    @property
    def dram_bytes(self) -> int:
        return sum(self.dram_use.values())

    @property
    def flash_pages(self) -> int:
        g = self.flash.geometry
        return g.dies * g.planes_per_die * g.blocks_per_plane * g.pages_per_block

    def params(self) -> CsdParams:
        """Everything that kernels and RTL need, as integers and read-only arrays."""
        e, a = self.engine, self.attention
        return CsdParams(
            kernels=e.kernels,
            lanes=e.lanes,
            batches=e.batches,
            buffer_lines=e.buffer_lines,
            max_tokens=e.max_tokens,
            max_channels=e.max_channels,
            max_group=e.max_group,
            exp_terms=e.exp_terms,
            reciprocal_iterations=e.reciprocal_iterations,
            rsqrt_iterations=e.rsqrt_iterations,
            command_queue=e.command_queue,
            table_bits=self.dram.table_bits,
            slots=self.dram.slots,
            vector_lines=self.dram.vector_lines,
            page_filter=a.page_filter,
            page_lines=self.page_elements // e.lanes,
            flash_queue=self.flash.queue,
            gemv_latency=gemv_latency(e.lanes),
            reduce_latency=reduce_latency(e.lanes),
            exp_latency=exp_latency(e.exp_terms),
            scalar_ticks=_array(list(scalar_ticks(e.reciprocal_iterations, e.rsqrt_iterations).values())),
            run_tokens=a.run_tokens,
            patterns=a.patterns,
            log_strides=_array(log_strides(self.flash_device.params(), self.flash.placement.order)),
            **self._system(),
            page_types=_array(page_types(self)),
            flash=self.flash_device.params(),
        )

    @cached_property
    def path_rates(self) -> Mapping[str, Fraction]:
        """Bytes a second that one drive's share of the work has of each path.

        Drives share the GPU's link, host memory and the plain SSD: all do the same at the same time.
        """
        h, gpus = self.host, self.host.gpu_link_gb_per_s * self.host.gpus
        rates = {
            "drive": min(self.link.gb_per_s, gpus / self.drives),
            "host": min(gpus, h.memory_gb_per_s) / self.drives,
            "ssd_read": min(gpus, h.ssd_read_gb_per_s) / self.drives,
            "ssd_write": min(gpus, h.ssd_write_gb_per_s) / self.drives,
        }
        return MappingProxyType({path: rates[path] * 10**9 for path in PATHS})

    def _system(self) -> dict[str, Any]:
        """What CsdParams holds of all but the drive."""
        h, gpu, second = self.host, load_roofline(self.host.gpu), self.tick.period_s
        fp16 = gpu.peak_tops.fp16
        assert fp16 is not None  # see HostSection
        ops = fp16 * 10**12 * h.gpus * h.compute_efficiency * second
        moved = gpu.memory.gb_per_s * 10**9 * h.gpus * h.memory_efficiency * second
        paths = [self.path_rates[path] * second for path in PATHS]
        latency = self.tick.cycles_ns(self.link.latency_us * 1000)
        return {
            "gpu_ops_p": ops.numerator,
            "gpu_ops_q": ops.denominator,
            "gpu_bytes_p": moved.numerator,
            "gpu_bytes_q": moved.denominator,
            "gpu_launch": self.tick.cycles_ns(h.launch_us * 1000),
            "path_p": _array([r.numerator for r in paths]),
            "path_q": _array([r.denominator for r in paths]),
            "path_latency": _array([latency] * len(PATHS)),
        }

    def selection(self, tokens: int, d: int) -> tuple[int, int]:
        """r and k for so many tokens and channels: those of the spec, else from its compression c.

        The estimate and the selection share the traffic: r channels of all keys, and k keys and values, are
        c * 2 * tokens * d elements with r = c * d and k = (c - r / 2d) * tokens = c/2 * tokens, as the sheet's
        2048 tokens, 128 channels and 1/8 give r = 16, k = 128.
        """
        a = self.attention
        r = a.r or max(1, int(a.compression * d))
        k = a.k or max(1, int((a.compression - Fraction(min(r, d), 2 * d)) * tokens))
        return min(r, d), min(k, tokens)


SPEC = CsdSpec


def _array(values: object) -> np.ndarray:
    out = np.array(values, np.int64)
    out.flags.writeable = False
    return out


# ---- timing rules -------------------------------------------------------------------------------------
# Adders and multipliers take one tick and are registered behind. `lanes` is a power of two.

LANE_TICKS = 2  # a multiplication, then an addition: one step of the softmax and scalar units
VECTOR_TICKS = 3  # of the vector unit: from a memory's address to its word, its product, its sum
KEY_BITS = FP16.width + 1  # of the argtopk unit: an FP16 encoding, and whether the token is local


def _levels(n: int) -> int:
    return (n - 1).bit_length()


def gemv_latency(lanes: int) -> int:
    """Ticks from a group's operands to its sum in the running total: products, the tree's levels, the total."""
    return 2 + _levels(lanes)


def reduce_latency(lanes: int) -> int:
    """Ticks from a group's elements to its sum in the running total: the tree's levels, the total."""
    return 1 + _levels(lanes)


def exp_latency(terms: int) -> int:
    """Ticks from a score to its weight: less the largest, times the scale, the power of two (two steps), the
    remainder, the series, its scaling; then rounding to FP16."""
    return LANE_TICKS * (terms + 6) + 1


class ScalarStep(NamedTuple):
    """One step of a scalar unit: what `arch.pim_asic.Step` describes, on registers or constants (decimal text);
    `clip`: at most 1."""

    to: str
    first: str = "pass"
    a: str = ""
    b: str = ""
    second: str = "pass"
    c: str = ""
    negate: bool = False
    clip: bool = False


def _reciprocal(d: str, r: str, spare: str, iterations: int) -> list[ScalarStep]:
    newton = [
        ScalarStep(spare, "multiply", d, r, "add", "2", negate=True),
        ScalarStep(r, "multiply", r, spare),
    ]
    return [
        ScalarStep(r, a=d, second="reciprocal"),
        *newton * iterations,
        ScalarStep(r, "gate", "1", r, c=d),
    ]


def _rsqrt(d: str, y: str, spare: str, iterations: int) -> list[ScalarStep]:
    newton = [
        ScalarStep(spare, "multiply", d, y),
        ScalarStep(spare, "multiply", spare, y, "add", "1.5", negate=True),
        ScalarStep(y, "multiply", y, spare),
    ]
    return [ScalarStep(y, a=d, second="rsqrt"), ScalarStep(d, "multiply", d, "0.5"), *newton * iterations]


SCALARS = ("x", "y", "u", "v", "w")  # registers of a scalar unit; operands are given in x, y and u


def scalar_programs(reciprocal_iterations: int, rsqrt_iterations: int) -> dict[str, list[ScalarStep]]:
    """Microprograms of a scalar unit, after the steps of `workloads/csd_kernels.py`.

    | name     | operands                           | result           | step |
    | -------- | ---------------------------------- | ---------------- | ---- |
    | inverse  | x = total                          | x = 1/total      | 5    |
    | tau      | x = L, y = M, u = scale            | x = 1/tau        | 2    |
    | coverage | x = sum of weights, y = 1/total    | x = alpha        | 7    |
    | factors  | x = alpha, y = 1/total, u = 1/S    | x = alpha/total, | 11   |
    |          |                                    | y = (1-alpha)/S  |      |
    """
    inverse = _reciprocal("x", "y", "v", reciprocal_iterations)
    ratio = _reciprocal("y", "v", "w", reciprocal_iterations)
    return {
        "inverse": [*inverse, ScalarStep("x", a="y")],
        "tau": [
            *ratio,
            ScalarStep("x", "multiply", "x", "v"),
            *_rsqrt("x", "y", "v", rsqrt_iterations),
            ScalarStep("x", "multiply", "u", "y"),
        ],
        "coverage": [ScalarStep("x", "multiply", "x", "y", clip=True)],
        "factors": [
            ScalarStep("v", a="1", second="subtract", c="x"),
            ScalarStep("x", "multiply", "x", "y"),
            ScalarStep("y", "multiply", "v", "u"),
        ],
    }


def scalar_ticks(reciprocal_iterations: int, rsqrt_iterations: int) -> dict[str, int]:
    """Ticks from the start of each microprogram to its result: `LANE_TICKS` a step."""
    programs = scalar_programs(reciprocal_iterations, rsqrt_iterations)
    return {name: LANE_TICKS * len(steps) for name, steps in programs.items()}


def argtopk_ticks(n: int, lanes: int) -> int:
    """Ticks from the one that starts a search over n keys to that of the last word of its mask.

    The threshold is found bit by bit, from the highest down: the largest number that as many keys reach as are to
    be taken. A pass counts ceil(n / lanes) words and takes a tick more, in which the memory is read ahead. The
    last pass gives the mask.
    """
    return (KEY_BITS + 1) * (-(-n // lanes) + 1)


# ---- layouts and addresses ----------------------------------------------------------------------------


def channel_of(slot: Any, position: Any, channels: int) -> Any:
    """The flash channel of a slot's page by its position in the table, for a power of two of channels.

    Slots begin on different channels. Even positions, as keys have them, go over all channels one by one, and so do odd
    ones, half of the channels apart; from round to round all move on by one, so that spans of many groups differ, too.

    >>> [channel_of(5, position, 4) for position in range(16)]
    [1, 3, 2, 0, 3, 1, 0, 2, 2, 0, 3, 1, 0, 2, 1, 3]
    """
    pair = position >> 1
    return (slot + pair + pair // channels + (position & 1) * (channels >> 1)) % channels


def log_address(f: FlashParams, order: str, position: int) -> dict[str, int]:
    """Chip, die, plane, block and page of the position-th page of a channel's log, a ring.

    `order` is that of `flash.placement`, from which the channel is left out: W(ay), D(ie) and P(lane) count
    fastest first, then pages, then blocks.
    """
    sizes = {"W": ("chip", f.chips), "D": ("die", f.dies), "P": ("plane", f.planes)}
    out = {}
    for letter in order:
        if letter != "C":
            name, size = sizes[letter]
            position, out[name] = divmod(position, size)
    position, out["page"] = divmod(position, f.pages)
    out["block"] = position % f.blocks
    return out


def log_strides(f: FlashParams, order: str) -> list[int]:
    """Pages of a log from one chip, die, plane to the next, in the order of `flash.placement`."""
    sizes, out, stride = {"W": f.chips, "D": f.dies, "P": f.planes}, {}, 1
    for letter in order:
        if letter != "C":
            out[letter] = stride
            stride *= sizes[letter]
    return [out[letter] for letter in "WDP"]


def entry(slot: int, position: int, table_bits: int) -> int:
    """The address of a slot's table entry: the two side by side."""
    return slot << table_bits | position


def groups(tokens: int, page_tokens: int) -> int:
    """Token-indexed groups of so many tokens; the last one may be partial."""
    return -(-tokens // page_tokens)


def staged_groups(tokens: int, page_tokens: int) -> int:
    """How many of them are read from the group buffer: the last two."""
    return min(2, groups(tokens, page_tokens))


def buffered_rows(p: CsdParams, row_lines: int) -> int:
    """Rows of `row_lines` lines that a part of the operand buffer takes, whole groups of `lanes`: a batch of keys or
    values."""
    return p.buffer_lines // row_lines // p.lanes * p.lanes


def image_shapes(p: CsdParams) -> dict[str, tuple[str, tuple[int, ...]]]:
    """The arrays of a memory image, by name: dtype and shape.

    | array   | holds                                                                                        |
    | ------- | -------------------------------------------------------------------------------------------- |
    | vectors | FP16 bits: lines that the host leaves and fetches                                            |
    | groups  | FP16 bits of the group buffer: of each slot the even and the odd group, keys then values     |
    | sums    | FP32 bits: the sum of each slot's values so far                                              |
    | cells   | FP16 bits of every page                                                                      |

    Tables and logs are no part of it: a run begins with empty ones, and reads only what it has written. Lines behind
    the last row of a page are not written, neither in `groups` nor in `cells`.
    """
    f, page = p.flash, (p.page_lines, p.lanes)
    return {
        "vectors": ("uint16", (p.vector_lines, p.lanes)),
        "groups": ("uint16", (p.slots, 2, 2, *page)),
        "sums": ("uint32", (p.slots, p.max_channels)),
        "cells": ("uint16", (f.channels, f.chips, f.dies, f.planes, f.blocks, f.pages, *page)),
    }


# ---- host port ----------------------------------------------------------------------------------------

_COMMANDS = ("read", "program", "erase")
REGISTERS = (
    "length",
    *(f"{k}_command" for k in _COMMANDS),
    *(f"{k}_command_plane" for k in _COMMANDS),
    "page_transfer",
    *(f"{k}_{kind}" for k in _COMMANDS[:2] for kind in ("lsb", "csb", "msb")),
    "erase",
)


def register_values(p: CsdParams, length: int) -> list[int]:
    """What the RTL's registers hold for a program of `length` commands: flash times in ticks.

    A read's time has the move to the cache register in it where reads are cached, as `FlashParams.read` has; times of
    page types that the cells do not have are 1.
    """
    f, types = p.flash, p.page_types.tolist()
    times = [
        [int(array[types.index(kind)]) if kind in types else 1 for kind in range(3)]
        for array in (f.read, f.program)
    ]
    first = f.command[:, 1].tolist()
    more = (f.command[:, 2] - f.command[:, 1]).tolist() if f.planes > 1 else [0, 0, 0]
    return [length, *first, *more, f.page_transfer, *times[0], *times[1], f.erase]


def page_types(spec: CsdSpec) -> tuple[int, ...]:
    """The type of each page of a block: 0, 1, 2 for LSB, CSB, MSB. Structure of the RTL."""
    cells = spec.flash.cells
    return tuple(
        ("lsb", "csb", "msb").index(cells.page_type(i)) for i in range(spec.flash.geometry.pages_per_block)
    )


def unit_names(p: CsdParams) -> tuple[str, ...]:
    """Units of a drive as its Timeline names them."""
    return (
        *SINGLE_UNITS,
        *(f"kernel {k}" for k in range(p.kernels)),
        *(f"channel {c}" for c in range(p.flash.channels)),
    )


def status_names(p: CsdParams) -> list[str]:
    """Names of the RTL's read-only words: counters and stalls as the Timeline names them."""
    return ["ticks", *COUNTERS, *(f"{unit}.{s}" for unit in unit_names(p) for s in ("busy", *CAUSES))]


def hostmap(p: CsdParams, depth: int) -> HostMap:
    """Regions of the host port for a code memory of `depth` commands; DRAM and cells are not among them."""
    return HostMap(
        [
            Region("registers", len(REGISTERS)),
            Region("status", len(status_names(p))),
            Region("code", depth, ISA.record("code").bits),
            Region("log", depth, 64),
        ]
    )


# ---- traces -------------------------------------------------------------------------------------------


def trace_form(spec: CsdSpec) -> TraceForm:
    """How a trace of this machine is drawn: by its commands. Attention is drawn with the first kernel, since which
    one a head goes to is decided on the way."""
    executes = {"CONFIG": "decoder", "WRITE": "writer", "RECLAIM": "writer", "READ": "fetch"}
    return TraceForm(
        operations=tuple(op.name for op in OPS),
        executes=tuple(executes.get(op.name, "kernel 0") for op in OPS),
        commands=(),
        opens=frozenset(),
        closes=frozenset(),
        cadence=(),
        holds=(),
        banks=0,
    )


# ---- energy -------------------------------------------------------------------------------------------


def energy(spec: CsdSpec) -> tuple[EnergyRow, ...]:
    """Energy of each event of a drive and of background, in picojoules for all drives, and of the GPUs.

    A page that is read crosses its channel whole, whatever its filter forwards; a forwarded line is written to an
    operand buffer and read from it once. GPUs draw their rated power while they work: an upper bound. Nobody states
    what they draw while they wait, nor the energy of a link.
    """
    e, p = spec.energy, spec.params()
    line_bits = p.lanes * FP16.width
    page_bits = p.page_lines * line_bits
    crossing = e.channel_pj_per_bit * page_bits
    read = e.page_read_uj * 10**6 + crossing
    sources = "energy.page_read_uj, channel_pj_per_bit"
    erased = e.block_erase_uj * 10**6
    line = e.dram_pj_per_bit * line_bits

    gpus_w = load_roofline(spec.host.gpu).power.peak_w * spec.host.gpus

    def row(name: str, counter: str, pj: Fraction, source: str) -> EnergyRow:
        return EnergyRow(name, counter, pj * spec.drives, source)

    return (
        row("flash: channel-indexed pages", "channel_pages", read, sources),
        row("flash: token-indexed pages", "token_pages", read, sources),
        row("flash: other pages", "other_pages", read, sources),
        row(
            "flash: programs",
            "programs",
            e.page_program_uj * 10**6 + crossing,
            "energy.page_program_uj, channel_pj_per_bit",
        ),
        row("flash: erases", "erases", erased, "energy.block_erase_uj"),
        row("GeMV", "products", e.product_pj * p.lanes, "energy.product_pj"),
        row("softmax", "exponentials", e.exponential_pj, "energy.exponential_pj"),
        row("argtopk", "compared_words", e.compare_pj_per_key * p.lanes, "energy.compare_pj_per_key"),
        row("scalars", "scalar_steps", e.scalar_step_pj, "energy.scalar_step_pj"),
        row(
            "operand buffers",
            "forwarded_lines",
            2 * e.buffer_pj_per_bit * line_bits,
            "energy.buffer_pj_per_bit",
        ),
        row("DRAM: vectors", "vector_lines", line, "energy.dram_pj_per_bit"),
        row("DRAM: group buffer", "group_lines", line, "energy.dram_pj_per_bit"),
        row("background", "ticks", e.idle_w * 10**12 * spec.tick.period_s, "energy.idle_w"),
        EnergyRow(
            "GPUs", "busy:gpu", gpus_w * 10**12 * spec.tick.period_s, "host.gpu, host.gpus: power.peak_w"
        ),
    )


# ---- checks -------------------------------------------------------------------------------------------


def configurations(code: np.ndarray) -> np.ndarray:
    """For each command the index of the CONFIG that holds for it (a CONFIG's own), -1 where there is none."""
    return np.maximum.accumulate(np.where(code["op"] == OP["CONFIG"], np.arange(len(code)), -1))


def check(p: CsdParams, code: np.ndarray, where: str = "") -> None:
    """Raise ValueError for the first command that reaches outside the machine, saying what is wrong.

    What the tables and logs hold is not known here: `workloads` refuses what reads a page that was not written.
    """
    if not len(code):
        return
    f = {name: code[name].astype(np.int64) for name in code.dtype.names or ()}
    op, of = f["op"], configurations(code)
    some, its = of >= 0, np.maximum(of, 0)
    c = {name: np.where(some, f[name][its], 1) for name in CONFIGURATION}
    page = p.page_lines * p.lanes
    entries, part = 1 << p.table_bits, p.buffer_lines * p.lanes
    is_ = {name: op == number for name, number in OP.items()}
    heads = is_["ATTEND"] | is_["WRITE"] | is_["TRANSPOSE"] | is_["READ"]
    attend, sparf = is_["ATTEND"], is_["ATTEND"] & (c["attention"] == ATTENTIONS.index("sparf"))
    by_tokens, by_channels = f["form"] == FORMS.index("tokens"), f["form"] == FORMS.index("channels")
    writes, shapes = is_["WRITE"] & by_tokens, is_["WRITE"] & by_channels
    d, span, rows = c["d"], c["span"], np.maximum(c["page_tokens"], 1)
    channel_groups = -(-d // np.maximum(c["page_channels"], 1))
    last_group = -(-(f["first"] + f["tokens"]) // rows)
    first_entry = np.where(by_channels, f["first"] * channel_groups, f["first"])
    lines = np.where(
        attend, f["heads"] * c["group"] * d, f["heads"] * np.where(shapes, span, f["tokens"]) * d
    ) // p.lanes  # fmt: skip
    lines = np.where(is_["READ"], f["heads"] * f["count"] * p.page_lines, lines)
    config = is_["CONFIG"]
    messages = [
        (config & ((d < 1) | (d > p.max_channels) | (d % p.lanes != 0)),
         f"d must be a multiple of {p.lanes} in {p.lanes}..{p.max_channels}"),
        (config & ((f["group"] < 1) | (f["group"] > p.max_group)), f"group must be in 1..{p.max_group}"),
        (config & ((f["r"] < 1) | (f["k"] < 1)), "r and k must be at least 1"),
        (config & ((f["page_tokens"] < 1) | (f["page_tokens"] * d > page)),
         f"page_tokens * d must be in 1..{page}, the elements of a page"),
        (config & ((f["page_channels"] < 1) | (span < 1) | (f["page_channels"] * span > page)),
         f"page_channels * span must be in 1..{page}, the elements of a page"),
        (config & (f["page_tokens"] > part // np.maximum(d, 1) // p.lanes * p.lanes),
         (f"page_tokens must be at most the rows that a part of an operand buffer, {part} elements, takes, whole groups "
          f"of {p.lanes}")),
        (config & (span % p.lanes != 0), f"span must be a multiple of {p.lanes}"),
        (config & (span % rows != 0), "span must be a multiple of page_tokens: whole groups are transposed"),
        (config & (d % np.maximum(f["page_channels"], 1) != 0), "page_channels must divide d"),
        (config & (f["attention"] == 1) & (np.minimum(f["r"], d) * span > part),
         f"r * span must be at most {part}, the elements of a part of an operand buffer"),
        (heads & (of < 0), "there is no CONFIG before it"),
        (heads & (f["heads"] < 1), "heads must be at least 1"),
        (heads & (f["slot"] + f["heads"] > p.slots), f"slot, heads reach beyond the {p.slots} slots"),
        (attend & ((f["tokens"] < 1) | (f["tokens"] > p.max_tokens)), f"tokens must be in 1..{p.max_tokens}"),
        (attend & (2 * -(-f["tokens"] // rows) > entries), f"tokens reach beyond the {entries} entries of a slot"),
        (sparf & (f["spans"] * span > f["tokens"]), "spans * span must be at most tokens"),
        (sparf & (f["spans"] * channel_groups > entries), f"spans reach beyond the {entries} entries of a slot"),
        (writes & (f["tokens"] < 1), "tokens must be at least 1"),
        (writes & (2 * last_group > entries), f"first, tokens reach beyond the {entries} entries of a slot"),
        (((shapes | is_["TRANSPOSE"]) & ((f["first"] + 1) * channel_groups > entries))
         | (is_["TRANSPOSE"] & (2 * (f["first"] + 1) * (span // rows) > entries)),
         f"first reaches beyond the {entries} entries of a slot"),
        (is_["TRANSPOSE"] & (span * d > p.batches * part),
         f"span * d must be at most {p.batches * part}, the elements of an operand buffer"),
        (is_["READ"] & ((f["count"] < 1) | (first_entry + f["count"] > entries)),
         f"first, count reach beyond the {entries} entries of a slot"),
        ((attend | is_["WRITE"] | is_["READ"]) & (f["line"] + lines > p.vector_lines),
         f"line reaches beyond the {p.vector_lines} lines of the vectors"),
        ((attend | writes) & (f["line2"] + lines > p.vector_lines),
         f"line2 reaches beyond the {p.vector_lines} lines of the vectors"),
        (is_["RECLAIM"] & ((f["count"] < 1) | (f["count"] >= p.flash.blocks)),
         f"count must be in 1..{p.flash.blocks - 1}"),
    ]  # fmt: skip
    bad = np.zeros(len(code), bool)
    for broken, _ in messages:
        bad |= broken
    if bad.any():
        i = int(np.argmax(bad))
        message = next(text for broken, text in messages if broken[i])
        raise ValueError(f"{where}command {i} ({OPS[int(op[i])].name}): {message}")
