"""DRAM command standards: which commands a channel knows, and how soon one may follow another.

A `Standard` is data: commands, timing constraints between pairs of them, and the meaning of every timing
parameter. `Standard.compile` joins it with the numbers of one device and gives `DramParams`, the integers
that kernels and RTL receive. A new standard is a new table; an extension (a memory with compute in its
banks) is `GDDR6.extend(...)`.

When a command may issue. A command f may issue at tick t iff for every constraint p -> f, at the node of
the constraint's scope that f addresses (the channel; the bank group of f's bank; f's bank),

    t >= (tick of the w-th most recent p recorded at that node) + max(L, 1)

with window w and latency L in ticks, and the state of the banks meets what f needs. A channel carries one
command a tick. A command is recorded at the channel, and at the bank group and the bank as far as it
addresses one, so a constraint's scope must be addressed by both of its commands.

The form (a tree of nodes, a history per command, pairs with a latency and a window) is that of Luo et al.,
"Ramulator 2.0", IEEE CAL 2024.
"""

import ast
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import IntEnum
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import yaml

from tilewright.arch.clock import Clock
from tilewright.arch.errors import UserError, nearest
from tilewright.arch.quantity import KINDS, Quantity, exact

Array = npt.NDArray[np.int64]

EVERY = "*"  # in a constraint: every command of the standard, those of later extensions included


class Scope(IntEnum):
    """What a command addresses, and the node at which a constraint is kept."""

    CHANNEL = 0
    BANKGROUP = 1
    BANK = 2


class Needs(IntEnum):
    """The bank state a command needs; OPEN and CLOSED speak of the addressed banks, ALL_ of every bank."""

    ANY = 0
    OPEN = 1
    CLOSED = 2
    ALL_OPEN = 3
    ALL_CLOSED = 4


class Effect(IntEnum):
    """What a command does to the rows of the addressed banks, or (_ALL) of every bank."""

    NONE = 0
    OPEN = 1
    OPEN_ALL = 2
    CLOSE = 3
    CLOSE_ALL = 4


@dataclass(frozen=True)
class Command:
    """One DRAM command. A CHANNEL command addresses all banks, a BANK command one."""

    name: str
    scope: Scope
    needs: Needs = Needs.ANY
    effect: Effect = Effect.NONE


@dataclass(frozen=True)
class Constraint:
    """Each of `preceding` holds each of `following` back at `scope` for `latency` ticks.

    `latency` is an expression over the standard's timing parameters: names, integers, + - * max() min().
    `window` w counts from the w-th most recent preceding command. `cause` names the stall that a waiting
    command is charged to.
    """

    scope: Scope
    preceding: tuple[str, ...]
    following: tuple[str, ...]
    latency: str
    cause: str
    window: int = 1
    title: str = ""
    source: str = field(kw_only=True)

    def __str__(self) -> str:
        return self.title or (
            f"{self.scope.name.lower()}: {','.join(self.preceding)} to {','.join(self.following)} {self.latency}"
        )


class DramParams(NamedTuple):
    """A standard with the numbers of one device, as integers and read-only int64 arrays.

    Commands are numbered in the order given to `compile`. The rows (constraints) of following command f are
    row_start[f]:row_start[f + 1], in charging order; equal (scope, preceding, following, window, cause) are
    merged by their maximum. Nodes: 0 is the channel, 1 + g bank group g, 1 + n_bankgroups + b bank b, with
    b = bankgroup * banks_per_group + index.
    """

    n_bankgroups: int
    banks_per_group: int
    n_banks: int
    n_commands: int
    max_window: int
    row_start: Array  # [n_commands + 1]
    row_scope: Array  # [n_rows] Scope
    row_prev: Array  # [n_rows] preceding command
    row_latency: Array  # [n_rows] ticks, at least 1
    row_window: Array  # [n_rows] the w-th most recent counts
    row_cause: Array  # [n_rows] index into Standard.causes
    cmd_scope: Array  # [n_commands] Scope
    cmd_needs: Array  # [n_commands] Needs
    cmd_effect: Array  # [n_commands] Effect
    cmd_history: Array  # [n_commands] ticks to remember per node: the largest window that any row reads
    bank_group_node: Array  # [n_banks] node of the bank's group: spares the inner loop a division


@dataclass(frozen=True)
class Standard:
    """Commands, constraints and timing parameters of a DRAM standard.

    `parameters` maps each timing name to its meaning; `causes` lists the stalls in charging order: a tick
    in which a command waits for several is charged to the first. Raises UserError when a constraint names
    an unknown command, parameter or cause, or a scope that one of its commands does not address.
    """

    name: str
    commands: tuple[Command, ...]
    constraints: tuple[Constraint, ...]
    parameters: Mapping[str, str]
    causes: tuple[str, ...]

    def __post_init__(self) -> None:
        object.__setattr__(self, "parameters", MappingProxyType(dict(self.parameters)))
        names = self.command_names
        for name in names:
            if names.count(name) > 1:
                raise UserError(f"{self.name}: command {name} is defined twice")
        for command in self.commands:
            one = command.needs in (Needs.OPEN, Needs.CLOSED) or command.effect in (Effect.OPEN, Effect.CLOSE)
            if one and command.scope is Scope.CHANNEL:
                raise UserError(
                    f"{self.name}: command {command.name} addresses the channel, so what it needs and does must "
                    f"be ANY, NONE or an _ALL, not {command.needs.name} and {command.effect.name}"
                )
        for constraint in self.constraints:
            self._validate(constraint)

    def _validate(self, c: Constraint) -> None:
        where = f"{self.name}: constraint '{c}'"
        for name in (*c.preceding, *c.following):
            if name == EVERY:
                if c.scope is not Scope.CHANNEL:
                    raise UserError(f"{where}: {EVERY!r} must be at scope CHANNEL, not {c.scope.name}")
                continue
            if self.command(name, where).scope < c.scope:
                raise UserError(
                    f"{where}: command {name} addresses a {self.command(name).scope.name}, "
                    f"so the scope must be no narrower, not {c.scope.name}"
                )
        if c.cause not in self.causes:
            raise UserError(f"{where}: unknown cause {c.cause!r}, {nearest(c.cause, self.causes)}")
        if c.window < 1:
            raise UserError(f"{where}: window must be 1 or more, not {c.window}")
        for name in latency_names(c.latency, where):
            if name not in self.parameters:
                raise UserError(f"{where}: unknown timing {name!r}, {nearest(name, self.parameters)}")

    @property
    def command_names(self) -> tuple[str, ...]:
        return tuple(c.name for c in self.commands)

    def command(self, name: str, where: str = "") -> Command:
        """The command of that name; UserError with the nearest one if there is none."""
        for command in self.commands:
            if command.name == name:
                return command
        raise UserError(
            f"{where or self.name}: unknown command {name!r}, {nearest(name, self.command_names)}"
        )

    def pairs(self, constraint: Constraint) -> Iterator[tuple[str, str]]:
        """The (preceding, following) pairs of a constraint, with `EVERY` written out."""
        for p in self.command_names if EVERY in constraint.preceding else constraint.preceding:
            for f in self.command_names if EVERY in constraint.following else constraint.following:
                yield p, f

    def extend(
        self,
        name: str,
        commands: Iterable[Command] = (),
        constraints: Iterable[Constraint] = (),
        parameters: Mapping[str, str] = MappingProxyType({}),
        causes: Iterable[str] = (),
    ) -> "Standard":
        """This standard with more commands, constraints, parameters and causes; the old ones stay as they are."""
        for key in parameters:
            if key in self.parameters:
                raise UserError(f"{name}: timing {key} is already defined by {self.name}")
        return replace(
            self,
            name=name,
            commands=self.commands + tuple(commands),
            constraints=self.constraints + tuple(constraints),
            parameters={**self.parameters, **parameters},
            causes=self.causes + tuple(causes),
        )

    def compile(
        self,
        timing: Mapping[str, int],
        *,
        bankgroups: int,
        banks_per_group: int,
        commands: Sequence[str] | None = None,
    ) -> DramParams:
        """The integer form for one device: `timing` in ticks, banks as bank groups x banks of a group.

        `commands` keeps only these, numbered in this order, with all constraints among them; `timing` must
        then hold every parameter those constraints use. Raises UserError on unknown names, missing or
        negative timings, and sizes below 1.
        """
        for what, n in (("bankgroups", bankgroups), ("banks_per_group", banks_per_group)):
            if n < 1:
                raise UserError(f"{self.name}: {what} must be 1 or more, not {n}")
        kept = [self.command(c) for c in (self.command_names if commands is None else commands)]
        index = {c.name: i for i, c in enumerate(kept)}
        if len(index) < len(kept):
            raise UserError(
                f"{self.name}: commands to keep must be distinct, not {', '.join(commands or ())}"
            )
        self.check_names(timing)
        merged: dict[tuple[int, int, int, int, int], int] = {}
        for c in self.constraints:
            pairs = [(index[p], index[f]) for p, f in self.pairs(c) if p in index and f in index]
            if not pairs:
                continue
            latency = max(evaluate(c.latency, timing, f"{self.name}: constraint '{c}'"), 1)
            for p, f in pairs:
                key = (f, self.causes.index(c.cause), int(c.scope), p, c.window)
                merged[key] = max(merged.get(key, 0), latency)
        rows = sorted(merged)
        history = np.ones(len(kept), np.int64)
        for _, _, _, p, window in rows:
            history[p] = max(history[p], window)
        n_banks = bankgroups * banks_per_group
        return DramParams(
            n_bankgroups=bankgroups,
            banks_per_group=banks_per_group,
            n_banks=n_banks,
            n_commands=len(kept),
            max_window=int(history.max(initial=1)),
            row_start=_column(sum(r[0] < f for r in rows) for f in range(len(kept) + 1)),
            row_scope=_column(r[2] for r in rows),
            row_prev=_column(r[3] for r in rows),
            row_latency=_column(merged[r] for r in rows),
            row_window=_column(r[4] for r in rows),
            row_cause=_column(r[1] for r in rows),
            cmd_scope=_column(c.scope for c in kept),
            cmd_needs=_column(c.needs for c in kept),
            cmd_effect=_column(c.effect for c in kept),
            cmd_history=_column(history),
            bank_group_node=_column(1 + b // banks_per_group for b in range(n_banks)),
        )

    def check_names(self, timing: Mapping[str, int]) -> None:
        """Raise UserError on a timing that this standard does not know, or that is not a count of ticks."""
        for key, value in timing.items():
            if key not in self.parameters:
                raise UserError(f"{self.name}: unknown timing {key!r}, {nearest(key, self.parameters)}")
            if isinstance(value, bool) or not isinstance(value, (int, np.integer)) or value < 0:
                raise UserError(f"{self.name}: timing {key} must be ticks of 0 or more, not {value!r}")


def _column(values: Iterable[Any]) -> Array:
    column = np.array([int(v) for v in values], np.int64)
    column.flags.writeable = False
    return column


# Latency expressions -----------------------------------------------------------------------------------


@cache
def _parse(text: str) -> ast.expr:
    return ast.parse(text, mode="eval").body


def _walk(text: str, where: str, lookup: Mapping[str, int] | None, names: list[str]) -> int:
    """Evaluate `text`; without `lookup` every name counts as 0, so that only the form is checked."""

    def value(node: ast.expr) -> int:
        match node:
            case ast.Constant(value=int(n)) if not isinstance(n, bool):
                return n
            case ast.Name(id=name):
                names.append(name)
                if lookup is None:
                    return 0
                if name not in lookup:
                    raise UserError(f"{where}: timing {name} is missing")
                return int(lookup[name])
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return value(left) - value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return value(left) * value(right)
            case ast.Call(func=ast.Name(id="max"), args=[_, *_] as args, keywords=[]):
                return max([value(a) for a in args])
            case ast.Call(func=ast.Name(id="min"), args=[_, *_] as args, keywords=[]):
                return min([value(a) for a in args])
        raise UserError(
            f"{where}: latency must be made of timings, integers, + - * max() min(), not {ast.unparse(node)!r}"
        )

    try:
        tree = _parse(text)
    except SyntaxError:
        raise UserError(f"{where}: latency {text!r} is not an expression") from None
    return value(tree)


def latency_names(text: str, where: str = "latency") -> list[str]:
    """The timing parameters that a latency expression reads.

    >>> latency_names("max(n_bl, n_ccd_s) + 1")
    ['n_bl', 'n_ccd_s']
    """
    names: list[str] = []
    _walk(text, where, None, names)
    return names


def evaluate(text: str, timing: Mapping[str, int], where: str = "latency") -> int:
    """A latency expression in ticks.

    >>> evaluate("n_cwl + n_bl + n_wr", {"n_cwl": 6, "n_bl": 2, "n_wr": 30})
    38

    Raises UserError for anything but names, integers, + - * max() min(), and for a missing timing.
    """
    return _walk(text, where, timing, [])


# GDDR6 -------------------------------------------------------------------------------------------------

_RAMULATOR = "Ramulator 2.1, python/ramulator/dram/gddr6.py"
_CH, _BG, _BA = Scope.CHANNEL, Scope.BANKGROUP, Scope.BANK
_READS, _WRITES = ("RD", "RDA"), ("WR", "WRA")
_READ_RECOVERY = "n_rtp + n_rp"
_WRITE_RECOVERY = "n_cwl + n_bl + n_wr + n_rp"


def _row(
    scope: Scope,
    preceding: tuple[str, ...],
    following: tuple[str, ...],
    latency: str,
    cause: str,
    title: str,
    window: int = 1,
    source: str = _RAMULATOR,
) -> Constraint:
    title = f"{scope.name.lower()}: {title}"
    return Constraint(scope, preceding, following, latency, cause, window, title, source=source)


GDDR6 = Standard(
    name="GDDR6",
    commands=(
        Command("ACT", _BA, Needs.CLOSED, Effect.OPEN),
        Command("PREab", _CH, Needs.ANY, Effect.CLOSE_ALL),
        Command("PREpb", _BA, Needs.ANY, Effect.CLOSE),
        Command("RD", _BA, Needs.OPEN),
        Command("WR", _BA, Needs.OPEN),
        Command("RDA", _BA, Needs.OPEN, Effect.CLOSE),
        Command("WRA", _BA, Needs.OPEN, Effect.CLOSE),
        Command("REFab", _CH, Needs.ALL_CLOSED),
        Command("REFpb", _BA, Needs.CLOSED),
    ),
    causes=("refresh", "precharge", "row_cycle", "activate", "activate_rate", "column", "turnaround"),
    parameters={
        "n_rcd_rd": "ACT to read of the same bank",
        "n_rcd_wr": "ACT to write of the same bank",
        "n_rp": "precharge to ACT or refresh",
        "n_ras": "ACT to precharge of the same bank",
        "n_rc": "ACT to ACT of the same bank",
        "n_cl": "read to first data",
        "n_cwl": "write to first data",
        "n_bl": "data burst on the bus",
        "n_ccd_s": "column command to column command, other bank group",
        "n_ccd_l": "column command to column command, same bank group",
        "n_rrd_s": "ACT to ACT, other bank group",
        "n_rrd_l": "ACT to ACT, same bank group",
        "n_faw": "window that holds at most four ACTs",
        "n_wr": "end of write data to precharge",
        "n_rtp": "read to precharge",
        "n_wtr_s": "end of write data to read, other bank group",
        "n_wtr_l": "end of write data to read, same bank group",
        "n_rfc": "all-bank refresh to any command",
        "n_rfc_pb": "per-bank refresh to the same bank",
        "n_refi": "interval at which all-bank refreshes fall due",
        "n_rrefd": "per-bank refresh to ACT or refresh of another bank",
        "n_ppd": "precharge to precharge",
    },
    constraints=(
        _row(_CH, _READS, _READS, "max(n_bl, n_ccd_s)", "column", "read to read"),
        _row(_CH, _WRITES, _WRITES, "max(n_bl, n_ccd_s)", "column", "write to write"),
        # One tick of bus turnaround, as the source assumes.
        _row(_CH, _READS, _WRITES, "n_cl + 1", "turnaround", "read-to-write turnaround"),
        _row(_CH, _WRITES, _READS, "n_cwl + n_bl + n_wtr_s", "turnaround", "write-to-read turnaround"),
        _row(_CH, ("RD",), ("PREab",), "n_rtp", "row_cycle", "read to all-bank precharge"),
        _row(_CH, ("WR",), ("PREab",), "n_cwl + n_bl + n_wr", "row_cycle", "write recovery, all banks"),
        _row(_CH, ("ACT",), ("ACT",), "n_rrd_s", "activate_rate", "ACT to ACT"),
        _row(_CH, ("ACT",), ("ACT", "REFpb"), "n_faw", "activate_rate", "four-activate window", 4),
        _row(_CH, ("REFpb",), ("ACT", "REFpb"), "n_faw", "activate_rate", "four-refresh window", 4),
        _row(_CH, ("ACT",), ("PREab",), "n_ras", "row_cycle", "row active time, all banks"),
        _row(_CH, ("PREab",), ("ACT",), "n_rp", "precharge", "all-bank precharge to ACT"),
        _row(_CH, ("PREab", "PREpb"), ("PREab", "PREpb"), "n_ppd", "precharge", "precharge to precharge"),
        _row(_CH, ("ACT",), ("REFab",), "n_rc", "row_cycle", "row cycle before all-bank refresh"),
        _row(_CH, ("PREab",), ("REFab",), "n_rp", "precharge", "all-bank precharge to all-bank refresh"),
        _row(
            _CH,
            ("PREpb",),
            ("REFab",),
            "n_rp",
            "precharge",
            "precharge to all-bank refresh",
            source="derived: an all-bank refresh needs every bank idle for n_rp; the edge is absent in Ramulator 2.1",
        ),
        _row(
            _CH, ("RDA",), ("REFab",), _READ_RECOVERY, "precharge", "auto-precharge read to all-bank refresh"
        ),
        _row(
            _CH,
            ("WRA",),
            ("REFab",),
            _WRITE_RECOVERY,
            "precharge",
            "auto-precharge write to all-bank refresh",
        ),
        _row(_CH, ("REFab",), (EVERY,), "n_rfc", "refresh", "all-bank refresh to any command"),
        _row(_CH, ("ACT",), ("REFpb",), "n_rrd_s", "activate_rate", "ACT to per-bank refresh"),
        _row(_CH, ("PREab",), ("REFpb",), "n_rp", "precharge", "all-bank precharge to per-bank refresh"),
        _row(
            _CH, ("RDA",), ("REFpb",), _READ_RECOVERY, "precharge", "auto-precharge read to per-bank refresh"
        ),
        _row(
            _CH,
            ("WRA",),
            ("REFpb",),
            _WRITE_RECOVERY,
            "precharge",
            "auto-precharge write to per-bank refresh",
        ),
        _row(_CH, ("REFpb",), ("ACT", "REFpb"), "n_rrefd", "refresh", "per-bank refresh to another bank"),
        _row(_CH, ("REFpb",), ("REFab",), "n_rfc_pb", "refresh", "per-bank refresh to all-bank refresh"),
        _row(_BG, _READS, _READS, "n_ccd_l", "column", "read to read"),
        _row(_BG, _WRITES, _WRITES, "n_ccd_l", "column", "write to write"),
        _row(_BG, _WRITES, _READS, "n_cwl + n_bl + n_wtr_l", "turnaround", "write-to-read turnaround"),
        _row(_BG, ("ACT",), ("ACT", "REFpb"), "n_rrd_l", "activate_rate", "ACT to ACT"),
        _row(_BA, ("ACT",), ("ACT",), "n_rc", "row_cycle", "row cycle"),
        _row(_BA, ("ACT",), _READS, "n_rcd_rd", "activate", "ACT to read"),
        _row(_BA, ("ACT",), _WRITES, "n_rcd_wr", "activate", "ACT to write"),
        _row(_BA, ("ACT",), ("PREpb",), "n_ras", "row_cycle", "row active time"),
        _row(_BA, ("PREpb",), ("ACT",), "n_rp", "precharge", "precharge to ACT"),
        _row(_BA, ("RD",), ("PREpb",), "n_rtp", "row_cycle", "read to precharge"),
        _row(_BA, ("WR",), ("PREpb",), "n_cwl + n_bl + n_wr", "row_cycle", "write recovery"),
        _row(_BA, ("RDA",), ("ACT",), _READ_RECOVERY, "precharge", "auto-precharge read to ACT"),
        _row(_BA, ("WRA",), ("ACT",), _WRITE_RECOVERY, "precharge", "auto-precharge write to ACT"),
        _row(_BA, ("ACT",), ("REFpb",), "n_rc", "row_cycle", "row cycle before per-bank refresh"),
        _row(_BA, ("PREpb",), ("REFpb",), "n_rp", "precharge", "precharge to per-bank refresh"),
        _row(
            _BA, ("RDA",), ("REFpb",), _READ_RECOVERY, "precharge", "auto-precharge read to per-bank refresh"
        ),
        _row(
            _BA,
            ("WRA",),
            ("REFpb",),
            _WRITE_RECOVERY,
            "precharge",
            "auto-precharge write to per-bank refresh",
        ),
        _row(_BA, ("REFpb",), ("ACT", "REFpb"), "n_rfc_pb", "refresh", "per-bank refresh to the same bank"),
    ),
)

STANDARDS: Mapping[str, Standard] = MappingProxyType({s.name: s for s in (GDDR6,)})

# (smaller, larger, whether they may be equal): orders that hold for every DRAM. A name that a device does
# not have is passed over.
_ORDERS = (
    ("n_ras", "n_rc", True),
    ("n_rp", "n_rc", False),
    ("n_rcd_rd", "n_ras", True),
    ("n_rcd_wr", "n_ras", True),
    ("n_ccd_s", "n_ccd_l", True),
    ("n_rrd_s", "n_rrd_l", True),
    ("n_wtr_s", "n_wtr_l", True),
    ("n_rrd_s", "n_faw", True),
    ("n_rfc_pb", "n_rfc", True),
)


def check_timing(timing: Mapping[str, int]) -> None:
    """Raise UserError, naming both keys and values, when timings contradict each other.

    Besides the orders between pairs, a refresh must fit in its interval: n_refi > n_rfc + n_rp +
    max(n_ras, n_rtp), or refreshes fall due faster than rows can be closed for them.
    """
    for low, high, equal in _ORDERS:
        if low in timing and high in timing:
            a, b = timing[low], timing[high]
            if a > b or (a == b and not equal):
                raise UserError(f"timing: {low} {a} must be {'at most' if equal else 'below'} {high} {b}")
    if timing.get("n_refi", 0):
        parts = {k: timing.get(k, 0) for k in ("n_rfc", "n_rp", "n_ras", "n_rtp")}
        least = parts["n_rfc"] + parts["n_rp"] + max(parts["n_ras"], parts["n_rtp"])
        if timing["n_refi"] <= least:
            said = ", ".join(f"{k} {v}" for k, v in parts.items())
            raise UserError(
                f"timing: n_refi {timing['n_refi']} must be above n_rfc + n_rp + max(n_ras, n_rtp) = {least} ({said})"
            )


# Trace records -----------------------------------------------------------------------------------------


class Request(NamedTuple):
    """A command that a trace asks for. `row` is the row that ACT opens, or that a column command expects
    (-1: any). It does not issue before tick `not_before`."""

    command: str
    bank: int = 0
    row: int = -1
    not_before: int = 0


class Issued(NamedTuple):
    """A command that issued at `tick`."""

    tick: int
    command: str
    bank: int = 0
    row: int = -1


# Devices -----------------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class Organisation:
    """The arrays of one channel: a row has `columns` of `column_bits`, one column command moves `access_bytes`.

    Raises UserError for a size below 1, or when accesses do not fill the row exactly.
    """

    bankgroups: int
    banks_per_group: int
    rows: int
    columns: int
    column_bits: int
    access_bytes: int

    def __post_init__(self) -> None:
        for name, value in vars(self).items():
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise UserError(f"organisation: {name} must be an integer of 1 or more, not {value!r}")
        if self.columns * self.column_bits % (8 * self.access_bytes):
            raise UserError(
                f"organisation: access_bytes {self.access_bytes} must divide the row of "
                f"{self.columns} columns x {self.column_bits} bits"
            )

    @property
    def banks(self) -> int:
        return self.bankgroups * self.banks_per_group

    @property
    def row_bytes(self) -> int:
        return self.columns * self.column_bits // 8

    @property
    def accesses_per_row(self) -> int:
        return self.row_bytes // self.access_bytes


@dataclass(frozen=True, kw_only=True)
class DramPreset:
    """One device: its standard, clock, timings in ticks of that clock, arrays, and supply where known."""

    name: str
    title: str
    standard: Standard
    clock: Clock
    timing: Mapping[str, int]
    organisation: Organisation
    vdd_v: Fraction | None
    currents_ma: Mapping[str, Fraction]  # idd0, idd2n, ...; empty when unknown
    provenance: Mapping[str, Quantity]  # by path: "timing.n_rp", "organisation.rows", ...

    def compile(self, commands: Sequence[str] | None = None) -> DramParams:
        """`Standard.compile` with this device's numbers."""
        return self.standard.compile(
            self.timing,
            bankgroups=self.organisation.bankgroups,
            banks_per_group=self.organisation.banks_per_group,
            commands=commands,
        )


_PRESETS = Path(__file__).parent / "presets" / "dram"
_PS = {"ps": Fraction(1, 1000), "ns": Fraction(1), "us": Fraction(1000)}  # in ns


class _UniqueKeys(yaml.SafeLoader):
    """The safe loader, refusing a key given twice: YAML would silently keep the second."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                continue  # refused below, as a key that is not text
            if key.value in seen:
                raise UserError(
                    f"{key.start_mark.name}:{key.start_mark.line + 1}: key {key.value} is given twice"
                )
            seen.add(key.value)
        return super().construct_mapping(node, deep)


def dram_presets() -> list[str]:
    """Names of the DRAM devices that come with the package."""
    return sorted(p.stem for p in _PRESETS.glob("*.yaml"))


def load_dram_preset(name: str) -> DramPreset:
    """The device of that name, or the one described in a YAML file given by its path.

    Timings may be in tCK, or in ps, ns or us: these are rounded up to ticks. Raises UserError on an unknown
    name, a malformed file, a number without unit, source or kind, and timings that contradict each other.
    """
    path = Path(name) if re.search(r"\.ya?ml$", name) else _PRESETS / f"{name}.yaml"
    if path.parent == _PRESETS and name not in dram_presets():
        raise UserError(f"unknown DRAM preset {name!r}, {nearest(name, dram_presets())}")
    try:
        with path.open() as file:
            data = yaml.load(file, _UniqueKeys)
    except OSError as error:
        raise UserError(f"{name}: {error.strerror}") from None
    except yaml.YAMLError as error:
        raise UserError(f"{name}: not YAML: {' '.join(str(error).split())}") from None
    return _preset(path.stem, data, name)


_SECTIONS = ("title", "standard", "clock_period", "organisation", "timing", "vdd", "currents")


def _preset(name: str, data: Any, where: str) -> DramPreset:
    sections = _mapping(data, where, allowed=_SECTIONS)
    for key in _SECTIONS[:5]:
        if key not in sections:
            raise UserError(f"{where}: {key} is missing")
    provenance: dict[str, Quantity] = {}

    def leaf(path: str, node: Any, units: Iterable[str]) -> tuple[Fraction, str]:
        at = f"{where}: {path}"
        fields = _mapping(node, at, allowed=("value", "unit", "source", "kind"))
        for key in ("value", "unit", "source", "kind"):
            if key not in fields:
                raise UserError(f"{at}: {key} is missing")
        if fields["kind"] not in KINDS:
            raise UserError(f"{at}: kind must be one of {', '.join(KINDS)}, not {fields['kind']!r}")
        if fields["unit"] not in units:
            raise UserError(f"{at}: unit must be one of {', '.join(units)}, not {fields['unit']!r}")
        value = exact(fields["value"], at)
        provenance[path] = Quantity(
            value=value, unit=fields["unit"], source=str(fields["source"]), kind=fields["kind"]
        )
        return value, fields["unit"]

    def integer(path: str, value: Fraction) -> int:
        if value.denominator != 1:
            raise UserError(f"{where}: {path} must be an integer, not {value}")
        return value.numerator

    standard = STANDARDS.get(sections["standard"])
    if standard is None:
        raise UserError(
            f"{where}: unknown standard {sections['standard']!r}, {nearest(str(sections['standard']), STANDARDS)}"
        )
    period, unit = leaf("clock_period", sections["clock_period"], _PS)
    if period <= 0:
        raise UserError(f"{where}: clock_period must be above 0, not {period}")
    clock = Clock.from_ns(period * _PS[unit])

    organisation: dict[str, int] = {}
    known = tuple(Organisation.__dataclass_fields__)
    for key, node in _mapping(sections["organisation"], f"{where}: organisation", allowed=known).items():
        unit = {"column_bits": "bit", "access_bytes": "B"}.get(key, "")
        path = f"organisation.{key}"
        organisation[key] = integer(path, leaf(path, node, (unit,))[0])
    for key in known:
        if key not in organisation:
            raise UserError(f"{where}: organisation.{key} is missing")

    timing: dict[str, int] = {}
    names = tuple(standard.parameters)
    for key, node in _mapping(sections["timing"], f"{where}: timing", allowed=names).items():
        path = f"timing.{key}"
        value, unit = leaf(path, node, ("tCK", *_PS))
        timing[key] = integer(path, value) if unit == "tCK" else clock.cycles_ns(value * _PS[unit])
    for key in names:
        if key not in timing:
            raise UserError(f"{where}: timing.{key} is missing")
    standard.check_names(timing)
    check_timing(timing)

    currents = {
        key: leaf(f"currents.{key}", node, ("mA",))[0]
        for key, node in _mapping(sections.get("currents", {}), f"{where}: currents").items()
    }
    return DramPreset(
        name=name,
        title=str(sections["title"]),
        standard=standard,
        clock=clock,
        timing=MappingProxyType(timing),
        organisation=Organisation(**organisation),
        vdd_v=leaf("vdd", sections["vdd"], ("V",))[0] if "vdd" in sections else None,
        currents_ma=MappingProxyType(currents),
        provenance=MappingProxyType(provenance),
    )


def _mapping(node: Any, where: str, allowed: Sequence[str] | None = None) -> dict[str, Any]:
    if not isinstance(node, dict):
        raise UserError(f"{where}: must be a mapping, not {node!r}")
    for key in node:
        if allowed is not None and key not in allowed:
            raise UserError(f"{where}: unknown key {key!r}, {nearest(str(key), allowed)}")
    return node
