"""NAND flash behind channels: geometry, timing sets, scheduling policies, page mapping and page traces.

    channel (bus) -> chip (way) -> die (one array operation at a time) -> plane (page register) -> block -> page

A preset under `arch/presets/flash/` is one device: `load_flash` gives a `FlashSpec`, whose `params()` are the
integers that kernels receive. `sim/flash.py` says what happens on which tick. A `Policy` is data: what a free
channel does first, and what a busy array blocks. `PageMap` places logical pages; `read_trace` reads a trace.
"""

import csv
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import cached_property
from math import ceil
from types import MappingProxyType
from typing import Annotated, Any, ClassVar, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from tilewright.arch import spec as specs
from tilewright.arch.clock import Clock
from tilewright.arch.errors import UserError, nearest
from tilewright.arch.quantity import exact
from tilewright.arch.spec import NonNegative, Positive, Section, Spec

SLUG = "flash"
Array = npt.NDArray[np.int64]

# ---- operations ---------------------------------------------------------------------------------------

KINDS = ("read", "program", "erase")
READ, PROGRAM, ERASE = range(3)

# One page operation. `arrival` is a tick, and must not fall from one operation to the next. `bytes` are what
# a read moves over the channel (a program always moves a page). An erase has page 0 and 0 bytes.
OPERATION = np.dtype(
    [
        (name, "i8")
        for name in ("arrival", "kind", "channel", "chip", "die", "plane", "block", "page", "bytes")
    ]
)
ADDRESS = ("channel", "chip", "die", "plane", "block", "page")

# ---- scheduling policies ------------------------------------------------------------------------------

DATA_OUT = 3  # beside READ, PROGRAM and ERASE: what a free channel may do next
_WORK = (*KINDS, "data_out")


class Policy(NamedTuple):
    """How the controller of a channel chooses.

    `stages`: a free channel takes the first stage that has work it can start. A stage is data_out, or one or
    more commands: then the chips (or dies) are asked round robin, each for the commands in the order given.
    `unit`: what takes one command at a time; a busy die blocks its siblings where that is the chip.
    """

    title: str
    stages: tuple[tuple[str, ...], ...]
    unit: Literal["chip", "die"]


POLICIES: Mapping[str, Policy] = MappingProxyType(
    {
        "chip-busy": Policy(
            "data-out first, one command at a time for a chip, as MQSim @7ec40e3 schedules",
            (("data_out",), ("read", "program", "erase")),
            "chip",
        ),
        "data-out-first": Policy(
            "data-out first, dies of a chip interleaved",
            (("data_out",), ("read", "program", "erase")),
            "die",
        ),
        "pipelined": Policy(
            "short commands first so that arrays never wait for data, dies of a chip interleaved",
            (("read", "erase"), ("data_out",), ("program",)),
            "die",
        ),
    }
)
PolicyName = Literal["chip-busy", "data-out-first", "pipelined"]

# ---- spec ---------------------------------------------------------------------------------------------

Count = Annotated[int, Field(ge=1, le=1 << 20)]


class Geometry(Section):
    channels: Annotated[int, Field(ge=1, le=1024)]
    chips_per_channel: Annotated[int, Field(ge=1, le=1024)]
    dies_per_chip: Annotated[int, Field(ge=1, le=64)]
    planes_per_die: Annotated[int, Field(ge=1, le=32)]
    blocks_per_plane: Count
    pages_per_block: Count
    page_bytes: Annotated[int, Field(ge=1, le=1 << 30)]

    @property
    def dies(self) -> int:
        return self.channels * self.chips_per_channel * self.dies_per_chip

    @property
    def limits(self) -> tuple[int, ...]:
        """Sizes of the fields of an address, in the order of `ADDRESS`."""
        return (
            self.channels, self.chips_per_channel, self.dies_per_chip, self.planes_per_die,
            self.blocks_per_plane, self.pages_per_block,
        )  # fmt: skip


class Cells(Section):
    """Array times. `page_types` says which page of a block is an LSB, CSB or MSB page.

    uniform: every page is an LSB page. mlc: page % 2 chooses LSB, MSB. tlc: pages 0-5 are LSB, 6-7 CSB, page
    p above is (p - 8) // 2 % 3 of LSB, CSB, MSB, as in MQSim's Flash_Chip.
    `cache_busy_us` is the move from page register to cache register; only cached reads pay it.
    """

    page_types: Literal["uniform", "mlc", "tlc"]
    read_lsb_us: Positive
    read_csb_us: Positive | None = None
    read_msb_us: Positive | None = None
    program_lsb_us: Positive
    program_csb_us: Positive | None = None
    program_msb_us: Positive | None = None
    erase_us: Positive
    cache_busy_us: NonNegative = Fraction(0)
    endurance: Annotated[int, Field(ge=1)] | None = None

    def page_type(self, page: int) -> str:
        """lsb, csb or msb."""
        if self.page_types == "uniform":
            return "lsb"
        if self.page_types == "mlc":
            return ("lsb", "msb")[page % 2]
        return ("lsb", "csb", "msb")[0 if page <= 5 else 1 if page <= 7 else (page - 8) // 2 % 3]

    @model_validator(mode="after")
    def _every_type_has_its_times(self) -> "Cells":
        for kind in {"uniform": (), "mlc": ("msb",), "tlc": ("csb", "msb")}[self.page_types]:
            for what in ("read", "program"):
                if getattr(self, f"{what}_{kind}_us") is None:
                    raise ValueError(f"{what}_{kind}_us is missing: page_types {self.page_types} needs it")
        return self


class Interface(Section):
    """The channel: its rate, and how long a command holds it: for one plane, and more for each further plane."""

    mb_per_s: Positive
    read_command_ns: NonNegative
    read_command_plane_ns: NonNegative
    program_command_ns: NonNegative
    program_command_plane_ns: NonNegative
    erase_command_ns: NonNegative
    erase_command_plane_ns: NonNegative


class Suspension(Section):
    """Which operations a read may suspend, how long the die takes for it, and how often an operation bears it."""

    of: Literal["none", "erase", "program", "both"]
    command_ns: NonNegative
    erase_us: NonNegative
    program_us: NonNegative
    limit: Annotated[int, Field(ge=1, le=64)]


class Scheduler(Section):
    """`window`: how many waiting operations of a kind and a unit the controller looks at. `queue_depth`:
    operations between admission and completion over the whole device; 0 sets no limit."""

    policy: PolicyName
    multi_plane: bool
    same_page: bool
    cache_read: bool
    window: Annotated[int, Field(ge=1, le=1 << 20)]
    queue_depth: Annotated[int, Field(ge=0, le=1 << 30)]


class Placement(Section):
    """`order`: which parts of the address a logical page number counts first: C(hannel), W(ay), D(ie), P(lane)."""

    order: Annotated[str, Field(pattern="^[CWDP]{4}$")]
    spare_blocks: Annotated[int, Field(ge=0)]

    @model_validator(mode="after")
    def _each_once(self) -> "Placement":
        if sorted(self.order) != sorted("CWDP"):
            raise ValueError(f"order must have each of C, W, D and P once, not {self.order!r}")
        return self


class FlashParams(NamedTuple):
    """A device in integer ticks and read-only int64 arrays: what kernels receive.

    Dies are numbered (channel * chips + chip) * dies + die over the device; a unit is a die, or a chip's
    `unit_dies` dies, so that unit = die // unit_dies.
    """

    channels: int
    chips: int
    dies: int  # of a chip
    planes: int
    blocks: int
    pages: int
    page_bytes: int
    transfer_num: int  # n bytes hold the channel for ceil(n * num / den) ticks
    transfer_den: int
    page_transfer: int
    read: Array  # [pages] array time of a page, cache_busy included where reads are cached
    program: Array  # [pages]
    erase: int
    command: Array  # [3, planes + 1] channel time of a command by kind and planes, data-in not included
    suspend: Array  # [3] time to suspend by kind; -1 where that is not done
    suspend_command: int
    suspend_limit: int
    endurance: int  # erases that a block bears; 0 = no limit
    unit_dies: int
    units: int  # of a channel
    multi_plane: bool
    same_page: bool
    cache_read: bool
    window: int
    queue_depth: int
    stages: Array  # [n, 3] kinds or DATA_OUT, in order; -1 fills


class FlashSpec(Spec):
    """One flash device and its controller."""

    target_name: ClassVar[str] = SLUG

    tick_ns: Positive
    geometry: Geometry
    cells: Cells
    interface: Interface
    suspension: Suspension
    scheduler: Scheduler
    placement: Placement

    @model_validator(mode="after")
    def _blocks_fit(self) -> "FlashSpec":
        if self.placement.spare_blocks >= self.geometry.blocks_per_plane:
            raise ValueError(
                f"placement.spare_blocks {self.placement.spare_blocks} must be below "
                f"geometry.blocks_per_plane {self.geometry.blocks_per_plane}"
            )
        g = self.geometry
        blocks = g.dies * g.planes_per_die * g.blocks_per_plane
        if blocks > 1 << 28:
            raise ValueError(f"geometry: the device must have at most 2^28 blocks, not {blocks}")
        return self

    @property
    def tick(self) -> Clock:
        return Clock.from_ns(self.tick_ns)

    @cached_property
    def timing(self) -> Mapping[str, int]:
        """Ticks by name: what follows from the spec."""
        tick, cells, bus = self.tick, self.cells, self.interface
        us = {k: getattr(cells, k) for k in type(cells).model_fields if k.endswith("_us")}
        out = {k.removesuffix("_us"): tick.cycles_ns(v * 1000) for k, v in us.items() if v is not None}
        for key in type(bus).model_fields:
            if key.endswith("_ns"):
                out[key.removesuffix("_ns")] = tick.cycles_ns(getattr(bus, key))
        out["suspend_command"] = tick.cycles_ns(self.suspension.command_ns)
        out["suspend_erase"] = tick.cycles_ns(self.suspension.erase_us * 1000)
        out["suspend_program"] = tick.cycles_ns(self.suspension.program_us * 1000)
        out["page_transfer"] = self.transfer_ticks(self.geometry.page_bytes)
        return MappingProxyType(out)

    @property
    def ticks_per_byte(self) -> Fraction:
        """Exact, not rounded: the sum over a transfer is."""
        return 1000 / self.interface.mb_per_s / self.tick_ns

    def transfer_ticks(self, n_bytes: int) -> int:
        """Ticks for which `n_bytes` hold the channel: ceil(bytes / rate / tick)."""
        return ceil(n_bytes * self.ticks_per_byte)

    def params(self) -> FlashParams:
        """Raises UserError where a number would leave the 62 bits that kernels compute with."""
        g, t, s, per_byte = self.geometry, self.timing, self.scheduler, self.ticks_per_byte
        for key, ticks in t.items():
            if ticks >= 1 << 40:
                raise UserError(
                    f"{self.name}: {key} is {ticks} ticks, must be below 2^40: choose a longer tick_ns"
                )
        if g.page_bytes * per_byte.numerator + per_byte.denominator >= 1 << 62:
            raise UserError(
                f"{self.name}: {per_byte} ticks a byte: choose a rounder interface.mb_per_s or tick_ns"
            )
        policy = POLICIES[s.policy]
        cached = t["cache_busy"] if s.cache_read else 0
        types = [self.cells.page_type(p) for p in range(g.pages_per_block)]
        commands = [
            [
                t[f"{k}_command"] + (n - 1) * t[f"{k}_command_plane"] if n else 0
                for n in range(g.planes_per_die + 1)
            ]
            for k in KINDS
        ]
        of = self.suspension.of
        return FlashParams(
            channels=g.channels,
            chips=g.chips_per_channel,
            dies=g.dies_per_chip,
            planes=g.planes_per_die,
            blocks=g.blocks_per_plane,
            pages=g.pages_per_block,
            page_bytes=g.page_bytes,
            transfer_num=per_byte.numerator,
            transfer_den=per_byte.denominator,
            page_transfer=t["page_transfer"],
            read=_frozen([t[f"read_{k}"] + cached for k in types]),
            program=_frozen([t[f"program_{k}"] for k in types]),
            erase=t["erase"],
            command=_frozen(commands),
            suspend=_frozen(
                [-1] + [t[f"suspend_{k}"] if of in (k, "both") else -1 for k in ("program", "erase")]
            ),
            suspend_command=t["suspend_command"],
            suspend_limit=self.suspension.limit,
            endurance=self.cells.endurance or 0,
            unit_dies=g.dies_per_chip if policy.unit == "chip" else 1,
            units=g.chips_per_channel * (1 if policy.unit == "chip" else g.dies_per_chip),
            multi_plane=s.multi_plane,
            same_page=s.same_page,
            cache_read=s.cache_read,
            window=s.window,
            queue_depth=s.queue_depth,
            stages=_frozen([([_WORK.index(w) for w in stage] + [-1, -1])[:3] for stage in policy.stages]),
        )


def _frozen(values: Any) -> Array:
    out = np.array(values, np.int64)
    out.flags.writeable = False
    return out


def flash_presets() -> list[str]:
    """Names of the flash devices that come with the package."""
    return list(specs.presets(SLUG))


def load_flash(name: str, sets: Sequence[str] = ()) -> FlashSpec:
    """The flash device of a preset's name or a YAML path, with `a.b=value` overrides.

    Everything is checked here, derived parameters included. Raises UserError.
    """
    known = flash_presets()
    if name not in known and not specs.is_path(name):
        raise UserError(f"unknown flash preset {name!r}: {nearest(name, known)} (or the path of a YAML file)")
    tree = specs.apply_sets(specs.load_tree(name, [SLUG]), sets)
    leaf = tree.get("target")
    if not isinstance(leaf, specs.Leaf) or leaf.value != SLUG:
        raise UserError(
            f"{name}: target must be {SLUG}, not {leaf.value if isinstance(leaf, specs.Leaf) else None!r}"
        )
    spec = specs.build(FlashSpec, tree, name)
    assert isinstance(spec, FlashSpec)
    spec.params()
    return spec


# ---- operations in bulk -------------------------------------------------------------------------------


def operations(spec: FlashSpec, kind: Any = READ, **fields: Any) -> np.ndarray:
    """OPERATION[n] from columns that broadcast: what is not given is 0, `bytes` a page (an erase: 0).

    >>> spec = load_flash("mqsim")
    >>> operations(spec, channel=[0, 1, 2], page=7)["channel"].tolist()
    [0, 1, 2]
    """
    columns = np.broadcast_arrays(*[np.asarray(v, np.int64) for v in (kind, *fields.values())])
    out = np.zeros(columns[0].size, OPERATION)
    out["kind"] = columns[0].reshape(-1)
    out["bytes"] = np.where(out["kind"] == ERASE, 0, spec.geometry.page_bytes)
    for name, column in zip(fields, columns[1:], strict=True):
        out[name] = column.reshape(-1)
    return out


def check_operations(spec: FlashSpec, ops: np.ndarray, where: Sequence[str] | None = None) -> None:
    """Raise UserError for the first operation outside the device; `where` names each (default: by number)."""

    def refuse(wrong: npt.NDArray[np.bool_], text: str) -> None:
        if wrong.any():
            i = int(np.argmax(wrong))
            place = where[i] if where is not None else f"operation {i}"
            row = dict(zip(ops.dtype.names or (), ops[i].tolist(), strict=True))
            raise UserError(f"{place}: {text.format(**row)}")

    if not len(ops):
        raise UserError("no operations: a trace must have at least one")
    refuse((ops["kind"] < READ) | (ops["kind"] > ERASE), "kind must be 0 (read) to 2 (erase), not {kind}")
    for name, size in zip(ADDRESS, spec.geometry.limits, strict=True):
        refuse((ops[name] < 0) | (ops[name] >= size), f"{name} must be 0 to {size - 1}, not {{{name}}}")
    refuse(
        (ops["arrival"] < 0) | (ops["arrival"] >= 1 << 50),
        "arrival must be 0 to 2^50 - 1 ticks, not {arrival}",
    )
    refuse(np.diff(ops["arrival"], prepend=0) < 0, "arrives at tick {arrival}, before the operation above it")
    size = spec.geometry.page_bytes
    short = (ops["bytes"] < 1) | (ops["bytes"] > size)
    refuse((ops["kind"] == READ) & short, f"a read must move 1 to {size} bytes, not {{bytes}}")
    refuse((ops["kind"] == PROGRAM) & (ops["bytes"] != size), f"a program moves {size} bytes, not {{bytes}}")
    refuse((ops["kind"] == ERASE) & (ops["bytes"] != 0), "an erase moves no bytes, not {bytes}")
    refuse((ops["kind"] == ERASE) & (ops["page"] != 0), "an erase has no page, not {page}")


# ---- page mapping -------------------------------------------------------------------------------------


class PageMap:
    """Where logical pages lie: placed by `placement.order` at first, appended to their plane when programmed.

    At the start the device is full: logical page l lies at its home, the letters of the order counting
    fastest first, then pages, then blocks. So CWDP puts neighbours on different channels. The last
    `spare_blocks` of every plane are erased. A program goes to the next page of its home plane's open block;
    the old copy is dead. A block with no live page is erased when its plane has no erased block left.
    No live page is ever copied: where no block is dead the map refuses.
    """

    def __init__(self, spec: FlashSpec) -> None:
        g = spec.geometry
        self._spec = spec
        sizes = {"C": g.channels, "W": g.chips_per_channel, "D": g.dies_per_chip, "P": g.planes_per_die}
        self._order = [(letter, sizes[letter]) for letter in spec.placement.order]
        self._planes = g.dies * g.planes_per_die
        self._user_blocks = g.blocks_per_plane - spec.placement.spare_blocks
        self.logical_pages = self._planes * self._user_blocks * g.pages_per_block
        self._at: dict[int, tuple[int, int]] = {}  # logical page -> block, page; absent: at home
        self._live: dict[tuple[int, int], int] = {}  # (plane, block) -> live pages, where not all are
        self._open: dict[int, list[int]] = {}  # plane -> its open block, next page
        self._erased: dict[int, deque[int]] = {}
        self._dead: dict[int, deque[int]] = {}

    def home(self, logical: Any) -> dict[str, Array]:
        """The address columns at which logical pages lie at first. Raises UserError beyond the device."""
        rest = np.atleast_1d(np.asarray(logical, np.int64))
        wrong = (rest < 0) | (rest >= self.logical_pages)
        if wrong.any():
            raise UserError(
                f"logical page must be 0 to {self.logical_pages - 1}, not {rest[np.argmax(wrong)]}"
            )
        out = {}
        names = {"C": "channel", "W": "chip", "D": "die", "P": "plane"}
        for letter, size in self._order:
            rest, out[names[letter]] = np.divmod(rest, size)
        out["block"], out["page"] = np.divmod(rest, self._spec.geometry.pages_per_block)
        return out

    def translate(
        self, arrival: Any, kind: Any, logical: Any, n_bytes: Any = None
    ) -> tuple[np.ndarray, Array]:
        """OPERATION[m] for reads and programs of logical pages, in order, erases put in where one is needed.

        Also [m] which of the given each works for. Raises UserError, beginning with `operation i`, on an erase, and when a plane is full of live pages.
        """
        arrival, kind, logical = np.broadcast_arrays(
            *[np.atleast_1d(np.asarray(v, np.int64)) for v in (arrival, kind, logical)]
        )
        ops = operations(self._spec, kind, arrival=arrival, **self.home(logical))
        if n_bytes is not None:
            ops["bytes"] = n_bytes
        if not (kind == READ).all() or self._at:
            return self._append(ops, logical)
        return ops, np.arange(len(ops))

    def _append(self, ops: np.ndarray, logical: Array) -> tuple[np.ndarray, Array]:
        g = self._spec.geometry
        planes = (ops["channel"] * g.chips_per_channel + ops["chip"]) * g.dies_per_chip + ops["die"]
        planes = planes * g.planes_per_die + ops["plane"]
        before: list[int] = []  # operations that an erase precedes, and the blocks
        erased: list[int] = []
        rows = zip(logical.tolist(), ops["kind"].tolist(), planes.tolist(), strict=True)
        for i, (page, kind, plane) in enumerate(rows):
            if kind == ERASE:
                raise UserError(f"operation {i}: logical pages are read or programmed, the map erases")
            if kind == PROGRAM:
                self._retire(plane, self._at.get(page) or (int(ops["block"][i]), int(ops["page"][i])))
                opened = self._open.get(plane)
                if opened is None or opened[1] == g.pages_per_block:
                    opened, erase = self._take(plane, i)
                    if erase:
                        before.append(i)
                        erased.append(opened[0])
                self._at[page] = (opened[0], opened[1])
                self._live[plane, opened[0]] += 1
                opened[1] += 1
            if page in self._at:
                ops["block"][i], ops["page"][i] = self._at[page]
        extra = ops[before]
        extra["kind"], extra["block"], extra["page"], extra["bytes"] = ERASE, erased, 0, 0
        return np.insert(ops, before, extra), np.insert(np.arange(len(ops)), before, before)

    def _retire(self, plane: int, old: tuple[int, int]) -> None:
        block = old[0]
        live = self._live.get((plane, block), self._spec.geometry.pages_per_block) - 1
        self._live[plane, block] = live
        opened = self._open.get(plane)
        full = opened is None or opened[0] != block or opened[1] == self._spec.geometry.pages_per_block
        if not live and full:
            self._dead.setdefault(plane, deque()).append(block)

    def _take(self, plane: int, i: int) -> tuple[list[int], bool]:
        """The plane's next open block, and whether it must be erased first."""
        spare = self._erased.setdefault(
            plane, deque(range(self._user_blocks, self._spec.geometry.blocks_per_plane))
        )
        dead = self._dead.setdefault(plane, deque())
        erase = not spare
        if erase and not dead:
            raise UserError(
                f"operation {i}: plane {plane} has no erased block and none without live pages: "
                f"program fewer pages or raise placement.spare_blocks {self._spec.placement.spare_blocks}"
            )
        block = dead.popleft() if erase else spare.popleft()
        self._live[plane, block] = 0
        self._open[plane] = [block, 0]
        return self._open[plane], erase


# ---- traces -------------------------------------------------------------------------------------------

_PHYSICAL = ("arrival_ns", "op", *ADDRESS)
_LOGICAL = ("arrival_ns", "op", "logical_page")


class PageTrace(NamedTuple):
    """Operations, and for each the place (file:line) that asked for it."""

    operations: np.ndarray
    places: Sequence[str]


def read_trace(lines: Iterable[str], name: str, spec: FlashSpec) -> PageTrace:
    """The operations of a page trace in CSV.

    The first line names the columns: arrival_ns, op, channel, chip, die, plane, block, page; or arrival_ns,
    op, logical_page, which `PageMap` places. A column bytes may follow: what a read moves, a page where it is
    empty. The page of an erase may be empty. Empty lines and lines that begin with # are passed over.
    Arrivals are rounded up to ticks. Raises UserError with file and line.
    """
    rows = ((n, r) for n, r in enumerate(csv.reader(lines), 1) if r and not r[0].lstrip().startswith("#"))
    number, header = next(rows, (1, []))
    columns = tuple(c.strip() for c in header)
    given = columns[:-1] if columns[-1:] == ("bytes",) else columns
    if given not in (_PHYSICAL, _LOGICAL):
        raise UserError(
            f"{name}:{number}: the first line must be {','.join(_PHYSICAL)} or {','.join(_LOGICAL)}, "
            f"then bytes or nothing, not {','.join(columns)[:80]!r}"
        )
    lengths, size, tick_ns = len(columns), spec.geometry.page_bytes, spec.tick_ns
    places: list[str] = []
    table: list[list[int]] = []

    def whole(text: str, column: str) -> int:
        try:
            return int(text)
        except ValueError:
            raise UserError(
                f"{name}:{number}: {column} must be a whole number, not {text.strip()!r}"
            ) from None

    for number, row in rows:
        if len(row) != lengths:
            raise UserError(f"{name}:{number}: {lengths} columns must be there, not {len(row)}")
        op = row[1].strip()
        if op not in KINDS:
            raise UserError(
                f"{name}:{number}: op must be read, program or erase, not {op!r}; {nearest(op, KINDS)}"
            )
        kind = KINDS.index(op)
        text = row[0].strip()
        ns = int(text) if text.isdecimal() and len(text) < 19 else exact(text, f"{name}:{number}: arrival_ns")
        if ns < 0:
            raise UserError(f"{name}:{number}: arrival_ns must be 0 or more, not {text}")
        values = [
            0 if column == "page" and kind == ERASE and not cell.strip() else whole(cell, column)
            for column, cell in zip(given[2:], row[2:], strict=False)
        ]
        cell = row[-1].strip() if given != columns else ""
        moved = whole(cell, "bytes") if cell else 0 if kind == ERASE else size
        record = [ceil(ns / tick_ns), kind, *values, moved]
        if max(map(abs, record)) >= 1 << 62:
            raise UserError(f"{name}:{number}: numbers must be below 2^62, not {max(record, key=abs)}")
        table.append(record)
        places.append(f"{name}:{number}")
    if not table:
        raise UserError(f"{name}: no operations below the first line")
    data = np.array(table, np.int64)
    if given == _PHYSICAL:
        ops = np.zeros(len(data), OPERATION)
        for column, values_ in zip(OPERATION.names or (), data.T, strict=True):
            ops[column] = values_
        check_operations(spec, ops, places)
        return PageTrace(ops, places)
    return _placed(spec, data, places)


def _placed(spec: FlashSpec, data: Array, places: Sequence[str]) -> PageTrace:
    """A trace of logical pages, columns arrival, kind, logical page, bytes."""
    page_map = PageMap(spec)
    wrong = (data[:, 2] < 0) | (data[:, 2] >= page_map.logical_pages)
    if wrong.any():
        i = int(np.argmax(wrong))
        raise UserError(
            f"{places[i]}: logical_page must be 0 to {page_map.logical_pages - 1}, not {data[i, 2]}"
        )
    # Checked before the map, which may put erases in between and so move the lines.
    plain = operations(spec, data[:, 1], arrival=data[:, 0], bytes=data[:, 3])
    check_operations(spec, plain, places)
    try:
        ops, source = page_map.translate(data[:, 0], data[:, 1], data[:, 2], data[:, 3])
    except UserError as error:
        number, _, rest = str(error).removeprefix("operation ").partition(":")
        raise UserError(f"{places[int(number)]}:{rest}") from None
    return PageTrace(ops, [places[i] for i in source])
