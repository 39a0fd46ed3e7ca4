"""Stages of a pipeline through compute and memory units, as matrices flow through it by blocks of rows.

A *block* is as many rows of a matrix as a vector has lanes; it travels column by column, one packet each, so a lane
is a row throughout. That is what the systolic array takes as its operand a, and how its results drain: products
follow one another without a transpose. Sums over a row are lane-wise, and a statistic of it is one packet a block.

Blocks are dealt out to `groups` of equal pipelines, which share the weights: a memory unit's stream of weights goes to
the compute units of all groups. Between stages blocks wait in double buffers. Where several units give the columns
of one matrix, each by its own range, their sequence ids are the addresses; so that no packet of a block is taken for
one of the block before, the next block is read only when all of this one is written.
"""

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from itertools import accumulate
from math import prod
from typing import Any

import numpy as np

from tilewright.arch.errors import UserError
from tilewright.arch.rdu import (
    ADDRESS_BITS,
    INPUTS,
    LEVELS,
    SEQUENCE_BITS,
    TOKENS,
    TOKENS_HELD,
    RduParams,
    is_pcu,
)

__all__ = ["Flow", "Pipeline", "Region", "ceil_div", "constant", "first_column", "stage"]

BF16_BYTES = 2
LOADED = "loaded"
LEAST = Fraction(1, 64)
"""Rate that the rarest stream of a prompt is given to route it by."""
LOADING = Fraction(1, 16)
"""As a part of the least rate, that of a stream which is over before the rows come."""
SHARING = 4
"""As many of them may lie with one of weights."""
_RING = 1 << ADDRESS_BITS


def ceil_div(a: int, b: int) -> int:
    """The quotient, rounded up."""
    return -(-a // b)


def constant(value: float) -> int:
    """The float32 word of a number."""
    return int(np.float32(value).view(np.uint32))


def stage(
    operation: str, a: int, b: float | str = 0, to: int = 0, *, kind: str = "fp32", **fields: Any
) -> dict[str, Any]:
    """A stage of the SIMD pipeline: registers a and b into register `to`.

    b may be a float, a constant word of `constant`, or "lane"; `counter=n` makes b the index of loop n.
    """
    out: dict[str, Any] = {"operation": operation, "type": kind, "a": a, "to": to}
    if isinstance(b, float):
        out |= {"b_from": "constant", "constant": constant(b)}
    elif b == "lane":
        out["b_from"] = "lane"
    else:
        out["b"] = b
    return out | fields


def first_column(unit: int, units: int, width: int, columns: int) -> int:
    """The first of the `width` columns of a product that a unit gives: the last unit ends with the last column.

    >>> [first_column(i, 3, 4, 10) for i in range(3)]
    [0, 4, 6]
    """
    return min(unit * width, columns - width) if units > 1 else 0


@dataclass(frozen=True)
class Region:
    """What an argument register points to: a place in a tensor off chip, in bytes from its start."""

    tensor: str
    offset: int = 0


@dataclass(frozen=True)
class Flow:
    """A matrix on its way, of `columns` columns a block.

    `sources[g]` are the units that give the blocks of group g, each `each` packets a block; some columns may come
    twice, or what comes last be beyond the columns. On the scalar network each packet is a word for all lanes. `readers[g]` begin each block, so that they can hold it back.
    """

    columns: int
    sources: tuple[tuple[str, ...], ...]
    each: int
    readers: tuple[tuple[str, ...], ...] = ()
    network: str = "vector"

    @property
    def merged(self) -> bool:
        """Whether sequence ids tell the columns."""
        return len(self.sources[0]) > 1

    @classmethod
    def of(cls, flows: "Sequence[Flow]", columns: int) -> "Flow":
        """A matrix of which each flow has some columns, with sequence ids that tell which."""
        if len(flows) == 1:
            return flows[0]
        sources, readers = (
            tuple(
                tuple(dict.fromkeys(n for given in some if given for n in given[g]))
                for g in range(len(some[0]))
            )
            for some in ([f.sources for f in flows], [f.readers for f in flows])
        )
        return cls(columns, sources, flows[0].each, readers)


@dataclass
class _Unit:
    kind: str
    tag: str
    fields: dict[str, Any]
    stages: list[dict[str, Any]] = field(default_factory=list)
    waits: dict[str, int] = field(default_factory=dict)
    """Control inputs in use, by side."""


class Pipeline:
    """Units, streams and tokens of a section, by stages; `into` hands them to a section builder.

    Parameters
    ----------
    params : RduParams
    groups : int
        Pipelines side by side.
    blocks : int
        Blocks of rows that each of them takes; even, or 1.
    """

    def __init__(self, params: RduParams, *, groups: int = 1, blocks: int = 1) -> None:
        if blocks > 1 and blocks % 2:
            raise ValueError(f"blocks must be even or 1, not {blocks}")
        self.p, self.groups, self.blocks = params, groups, blocks
        self.capacity = params.banks * params.bank_words
        self.buffers = 2 if blocks > 1 else 1
        self.prefix = ""
        """Of the tags in a section, so that the same operators of other models are told apart."""
        self.units: dict[str, _Unit] = {}
        self.sinks: dict[str, list[tuple[str, int]]] = {}
        self.networks: dict[str, str] = {}
        self.tokens: list[tuple[str, str, int]] = []
        self.starts: dict[str, list[tuple[str, int]]] = {}
        """What must be so before a side begins a block: tokens from other sides, and how many there are at first."""
        self.rows: dict[str, list[str]] = {}
        """Compute units that a memory unit's weights go to."""
        self.bundles: list[set[str]] = []
        """Sides that begin each block together."""
        self.loads: list[str] = []
        """A memory unit of each gate that fills some once."""
        self.filled: list[str] = []
        """Memory units that are filled once, and read from when all gates that do so are through."""
        self.later: set[str] = set()
        """Those that were `filled`: nothing leaves them before all is loaded."""
        self.loading: set[str] = set()
        """Gates that do nothing but fill them."""
        self.resting: set[str] = set()
        """Units whose packets wait on their way until others come."""
        self.arguments: list[Region] = []
        self.by_steps: set[str] = set()
        """Memory units whose reading follows their filling by steps."""
        self.sent: dict[str, int] = {}
        """Packets of a unit, where they are not what its loops say."""
        self.work: dict[str, int] = {}
        """Iterations of each unit."""
        self.traffic: dict[str, int] = {}
        """Bytes of each gate to memory."""
        self.extents: dict[str, int] = {}
        """Bytes of each tensor off chip, as far as it is looked at."""
        self.tiers: dict[str, str] = {}

    # ---- units and wires ----------------------------------------------------------------------------

    def count(self, kind: str) -> int:
        """Units of a kind."""
        return sum(u.kind == kind for u in self.units.values())

    def unit(self, name: str, kind: str, tag: str, **fields: Any) -> str:
        """Add a unit with the fields of its record."""
        if name in self.units:
            raise ValueError(f"unit {name} is given twice")
        self.units[name] = _Unit(kind, tag, fields)
        return name

    def feed(self, source: str, sink: str, index: int = 0, network: str = "vector") -> None:
        """Lead the packets of a unit, which has one output, to an input of another."""
        self.networks[source] = network
        self.sinks.setdefault(source, []).append((sink, index))

    def wire(self, source: str, sink: str, hold: int = 0) -> None:
        """A token from one side to another, each `unit`, or `unit.write` and `unit.read` of a memory unit."""
        unit, side = _side(sink)
        waits = self.units[unit].waits
        index = waits.get(side, 0)
        if index == TOKENS:
            raise UserError(
                f"unit {unit}: its {side or 'chain'} must wait for more than {TOKENS} control inputs"
            )
        waits[side] = index + 1
        prefix = f"{side}_" if side else ""
        fields = self.units[unit].fields
        fields[f"{prefix}wait"] = fields.get(f"{prefix}wait", 0) | 1 << index
        if hold:
            fields[f"{prefix}hold{index}"] = hold
        unit, side = _side(source)
        self.units[unit].fields[f"{side}_signal" if side else "signal"] = 1
        self.tokens.append((source, sink, index))

    def need(self, sink: str, source: str, hold: int = 0) -> None:
        """A side begins each block with a token of another side; `close` wires it."""
        self.starts.setdefault(sink, []).append((source, hold))

    def close(self) -> None:
        """Wire what sides need to begin a block; where that is more than control inputs, through compute units that
        only join tokens."""
        whole: dict[str, set[str]] = {}  # the bundle that each side is in; bundles that meet are one
        for bundle in [*self.bundles, *({sink} for sink in self.starts)]:
            joined = set(bundle).union(*(whole[sink] for sink in bundle if sink in whole))
            whole |= dict.fromkeys(joined, joined)
        order = {sink: i for i, sink in enumerate(self.starts)}
        bundles = list(
            {id(bundle): bundle for _, bundle in sorted(whole.items(), key=lambda w: order[w[0]])}.values()
        )
        for bundle in bundles:
            sinks = sorted(bundle, key=lambda sink: order[sink])
            needs = list(dict.fromkeys(need for sink in sinks for need in self.starts[sink]))
            unit = _side(sinks[0])[0]
            for source, hold in self._joined(
                f"{unit}.join", self.units[unit].tag, needs, TOKENS, self.blocks
            ):
                for sink in sinks:
                    self.wire(source, sink, hold)
        if LOADED in self.units and self.loads:
            every = [(f"{unit}.write", 0) for unit in self.loads]
            for source, hold in self._joined("loaded", "load", every, TOKENS, 1):
                self.wire(source, LOADED, hold)
            for unit in self.filled:
                self.wire(LOADED, f"{unit}.read")
            self.later.update(self.filled)
            self.loading.update(
                source for source, sinks in self.sinks.items() if all(unit in self.later for unit, _ in sinks)
            )
            self.filled.clear()
        self.starts.clear()
        self.bundles.clear()
        self.loads.clear()

    def admitted(self, name: str, tag: str, flow: Flow) -> Flow:
        """A matrix from memory, let in when what fills memory units once is through: rows that wait for weights must
        not hold up weights that are still to come."""
        if LOADED not in self.units:
            self.unit(LOADED, "pcu", "load", mode="simd", vectors=0)
            self.work[LOADED] = 1
        ready = Flow(1, ((LOADED,),) * self.groups, 1)
        return self.simd(f"{name}.admit", tag, [(flow, 0), (ready, LEVELS)], [], flow.columns)

    # ---- sides --------------------------------------------------------------------------------------

    def side(self, unit: str, which: str) -> str:
        """The side of a memory unit, `unit.write` or `unit.read`; any other unit has but one."""
        return f"{unit}.{which}" if self.units[unit].kind == "pmu" else unit

    def sides(self, unit: str) -> list[str]:
        """All of them."""
        return list(dict.fromkeys(self.side(unit, which) for which in ("write", "read")))

    def unit_of(self, side: str) -> str:
        """The unit of a side."""
        return _side(side)[0]

    def held(self, side: str, index: int) -> int:
        """Tokens that a control input of a side holds at first."""
        unit, which = _side(side)
        return int(self.units[unit].fields.get(f"{which}_hold{index}" if which else f"hold{index}", 0))

    def events(self, side: str, what: str) -> int:
        """How often a side takes its tokens ("wait"), or gives them ("signal")."""
        unit, which = _side(side)
        fields, prefix = self.units[unit].fields, f"{which}_" if which else ""
        return prod(
            fields.get(f"{prefix}count{n}", 1) for n in range(fields.get(f"{prefix}{what}_level", 0), LEVELS)
        )

    def gives_to_its_end(self, unit: str) -> bool:
        """Whether a unit is through with its last packet: none of its iterations is about what others hold."""
        fields = self.units[unit].fields
        reads = prod(fields.get(f"read_count{n}", 1) for n in range(LEVELS))
        return self.units[unit].kind != "pmu" or self.packets(unit) == reads

    def can_wait(self, side: str) -> bool:
        """Whether a side can wait for one more token, as often as it waits."""
        unit, which = _side(side)
        own = self.units[unit]
        waits = bool(own.fields.get(f"{which}_wait" if which else "wait"))
        return own.waits.get(which, 0) < TOKENS and (not waits or self.events(side, "wait") <= TOKENS_HELD)

    def can_tell(self, side: str) -> bool:
        """Whether its tokens can say that a side is through: no more of them than an input holds."""
        return self.events(side, "signal") <= TOKENS_HELD

    def rests(self) -> set[str]:
        """Units whose packets may stand before a side until tokens or other packets come there, or where what that side
        gives may. As few packets as a side's own link holds never do."""
        inputs: dict[str, list[str]] = {}
        for source, sinks in self.sinks.items():
            for sink in dict.fromkeys(self.side(unit, "write") for unit, _ in sinks):
                inputs.setdefault(sink, []).append(source)
        held = {sink for _, sink, _ in self.tokens}
        left = [
            source
            for side, sources in inputs.items()
            for source in sources
            if side in held or (self.units[self.unit_of(side)].kind == "pcu" and len(sources) > 1)
        ]
        found: set[str] = set()
        while left:
            unit = left.pop()
            if unit not in found and self.packets(unit) > self.p.fifo_depth:
                found.add(unit)
                left += inputs.get(unit, ())
        return found

    def hold_back(self, holds: Mapping[str, Iterable[str]]) -> None:
        """Let sides begin when others are through: `holds` are the latter for each of the former.

        For sides that `can_wait` and others that `can_tell`. Compute units that are left join and repeat the tokens.
        """
        given: dict[tuple[tuple[str, ...], int], str] = {}
        for side in holds:
            unit, which = _side(side)
            own = self.units[unit]
            if unit in self.by_steps:  # it waits for all that fills it: one token in place of several
                own.fields |= {"write_signal_level": LEVELS, "read_wait_level": LEVELS}
            elif not own.fields.get(f"{which}_wait" if which else "wait"):
                own.fields[f"{which}_wait_level" if which else "wait_level"] = LEVELS
        for side, others in holds.items():
            tag = self.units[_side(side)[0]].tag
            times, needs = self.events(side, "wait"), tuple(sorted(others))
            if (needs, times) not in given:
                given[needs, times] = self._repeated(side, tag, self._once(side, tag, needs), times)
            self.wire(given[needs, times], side)

    def _once(self, side: str, tag: str, others: Sequence[str]) -> str:
        """A side that gives one token when all others are through."""
        by_times: dict[int, list[str]] = {}
        for other in others:
            by_times.setdefault(self.events(other, "signal"), []).append(other)
        ends = [(other, 0) for other in by_times.pop(1, [])]
        for times, some in by_times.items():
            needs = self._joined(f"{side}.in{times}.", tag, [(other, 0) for other in some], TOKENS, times)
            out = self.unit(
                f"{side}.through{times}", "pcu", tag, mode="simd", vectors=0, count0=times, signal_level=1
            )
            self.work[out] = times
            for source, _ in needs:
                self.wire(source, out)
            ends.append((out, 0))
        return self._joined(f"{side}.after", tag, ends, 1, 1)[0][0]

    def _repeated(self, side: str, tag: str, source: str, times: int) -> str:
        """A side that gives a token of another one so many times."""
        if times == 1:
            return source
        out = self.unit(f"{side}.hold", "pcu", tag, mode="simd", vectors=0, count0=times, wait_level=LEVELS)
        self.work[out] = times
        self.wire(source, out)
        return out

    def _joined(
        self, name: str, tag: str, needs: list[tuple[str, int]], most: int, times: int
    ) -> list[tuple[str, int]]:
        """Tokens, (source, held at first), as at most `most`, by compute units that each take some and give one."""
        level = 0
        while len(needs) > most:
            joined = []
            for i in range(0, len(needs), TOKENS):
                some = needs[i : i + TOKENS]
                if len(some) > 1:
                    unit = self.unit(
                        f"{name}{level}.{i // TOKENS}", "pcu", tag, mode="simd", vectors=0, count0=times
                    )
                    self.work[unit] = times
                    for source, hold in some:
                        self.wire(source, unit, hold)
                    some = [(unit, 0)]
                joined += some
            needs, level = joined, level + 1
        return needs

    def argument(self, tensor: str, offset: int = 0) -> int:
        """The register that points to a place in a tensor."""
        region = Region(tensor, offset)
        if region not in self.arguments:
            self.arguments.append(region)
        return self.arguments.index(region)

    def chain(
        self, name: str, prefix: str, loops: Sequence[tuple[int, int]], ring: int = _RING
    ) -> dict[str, int]:
        """Counts and strides of nested loops, the innermost first."""
        kept = list(loops)
        if len(kept) > LEVELS:
            raise UserError(f"unit {name} needs {len(kept)} counters; a chain has {LEVELS}")
        out = {}
        for n, (count, stride) in enumerate(kept):
            out[f"{prefix}count{n}"] = count
            out[f"{prefix}stride{n}" if ring else f"stride{n}"] = stride % ring if ring else stride
        return out

    def _rounds(self, toggle: int = 0, drift: int = 0) -> list[tuple[int, int]]:
        """The loops over a group's blocks; `toggle` words from buffer to buffer, `drift` words a block in all."""
        if self.buffers == 1:
            return [(self.blocks, drift)]
        return [(2, toggle + drift), (self.blocks // 2, 2 * drift)]

    # ---- stages -------------------------------------------------------------------------------------

    def load(
        self,
        name: str,
        tag: str,
        tensor: str,
        columns: int,
        *,
        tier: str = "hbm",
        offset: int = 0,
        row: int | None = None,
        words: bool = False,
    ) -> Flow:
        """A matrix from off-chip memory, bfloat16 or `words`, blocks of columns of lanes; `row` bytes from block to block."""
        lanes = self.p.lanes
        column = lanes * (4 if words else BF16_BYTES)
        pitch = columns * column if row is None else row
        names = []
        for g in range(self.groups):
            loops = [(columns, column), (self.blocks, self.groups * pitch)]
            names.append(
                self.gate(
                    f"{name}.{g}",
                    tag,
                    "load",
                    tier,
                    tensor,
                    offset + g * pitch,
                    loops,
                    form="word" if words else "bf16",
                )
            )
        return Flow(columns, tuple((n,) for n in names), columns, tuple((n,) for n in names))

    def gate(
        self, name: str, tag: str, direction: str, tier: str, tensor: str, offset: int,
        loops: Sequence[tuple[int, int]], words: int | None = None, form: str = "bf16",
    ) -> str:  # fmt: skip
        """A gate to memory whose loops have strides in bytes."""
        fields = self.chain(name, "", loops, 0)
        level = len(loops) - 1
        element = 4 if form == "word" else BF16_BYTES
        self.unit(
            name, "agcu", tag, direction=direction, tier=tier, argument=self.argument(tensor, offset),
            words=words or self.p.lanes, format=form, wait_level=level, signal_level=level, **fields,
        )  # fmt: skip
        self.work[name] = prod(count for count, _ in loops)
        self.traffic[name] = self.work[name] * (words or self.p.lanes) * element
        span = offset + sum((c - 1) * step for c, step in loops) + (words or self.p.lanes) * element
        self.extents[tensor] = max(self.extents.get(tensor, 0), span)
        self.tiers[tensor] = tier
        return name

    def store(
        self,
        name: str,
        tag: str,
        flow: Flow,
        tensor: str,
        *,
        tier: str = "hbm",
        offset: int = 0,
        row: int | None = None,
        column: int | None = None,
        words: bool = False,
    ) -> tuple[str, ...]:
        """Store a matrix of one source a group, as `load` finds it; `column` bytes from column to column."""
        step = self.p.lanes * (4 if words else BF16_BYTES) if column is None else column
        pitch = flow.columns * step if row is None else row
        names = []
        for g in range(self.groups):
            loops = [(flow.columns, step), (self.blocks, self.groups * pitch)]
            unit = self.gate(
                f"{name}.{g}", tag, "store", tier, tensor, offset + g * pitch, loops,
                form="word" if words else "bf16",
            )  # fmt: skip
            self.feed(flow.sources[g][0], unit)
            names.append(unit)
        return tuple(names)

    def read(
        self, name: str, tag: str, flow: Flow, loops: Sequence[tuple[int, int]] | None = None, *, first: int = 0,
        part: tuple[int, int] = (0, 1), words: bool = False, after: Sequence[str] = (), sequence: int = 0,
    ) -> Flow:  # fmt: skip
        """A double buffer of a matrix, and how it is read: columns `first` + sum of counter * step of (count, step).

        `part` (i, n) keeps only the i-th of n equal ranges of the columns, and `loops` count within it. With `words`
        loops count words, of which each is lane 0 of a packet. `after[g]` are units whose token each block needs.
        """
        lanes = self.p.lanes
        given = len(flow.sources[0]) * flow.each
        if flow.merged and part != (0, 1):
            raise ValueError("what several units give has no parts")
        width = max(flow.columns, flow.each) if flow.merged else ceil_div(given, part[1])
        size = width * lanes
        slot = 1 << (size - 1).bit_length()
        bits: dict[str, int] = {}
        count = self.p.banks.bit_length() - 1
        if (
            self.buffers > 1
            and self.buffers * slot <= self.capacity
            and lanes <= self.p.banks // 2
            and slot >= self.p.banks // 2
        ):
            bits = {f"bank_bit{count - 1}": slot.bit_length() - 1}  # buffers in banks of their own
        else:
            slot = size
        span = self.buffers * slot
        if span > self.capacity:
            raise UserError(
                f"buffer {name}: {self.buffers} x {width} columns of {lanes} rows are {span} words; a PMU has {self.capacity}"
            )
        # Ids wrap around unnoticed where addresses do so at the same packet, or sooner.
        wraps = (lanes << SEQUENCE_BITS) % _RING == 0
        if flow.merged and not wraps and self.blocks * flow.each + width > 1 << SEQUENCE_BITS:
            raise UserError(
                f"buffer {name}: {self.blocks} blocks of {flow.each} columns run through the {1 << SEQUENCE_BITS} "
                "sequence ids; use more groups or smaller tiles"
            )
        if flow.merged:
            write = [(given, 0), *self._rounds(slot, -flow.each * lanes)]
        elif part[1] > 1:
            write = [(width, lanes), (part[1], span), *self._rounds(slot)]
        else:
            write = [(given, lanes), *self._rounds(slot)]
        if loops is None:
            loops = [(flow.columns // part[1], 1)]
        scale = 1 if words else lanes
        inner = [(c, step * scale) for c, step in loops]
        names = []
        for g in range(self.groups):
            unit = self.unit(
                f"{name}.{g}", "pmu", tag, enable=3, low=part[0] * span, words=span, **bits,
                **self.chain(name, "write_", write), sequence_scale=lanes if flow.merged else 0,
                write_wait_level=len(write) - len(self._rounds()),
                write_signal_level=len(write) - len(self._rounds()),
                **self.chain(name, "read_", [*inner, *self._rounds(slot)]),
                read_base=part[0] * span + first * scale,
                read_wait_level=len(inner), read_signal_level=len(inner), sequence=sequence,
            )  # fmt: skip
            names.append(unit)
            self.work[unit] = self.blocks * max(given, prod(c for c, _ in inner))
            self.sent[unit] = self.blocks * prod(c for c, _ in inner)
            self.need(f"{unit}.read", f"{unit}.write")
            if after:
                self.need(f"{unit}.read", after[g])
            if self.blocks > 1:  # what comes in finds room: nothing waits on its way, and holds up others
                for reader in flow.readers[g]:
                    self.need(reader, f"{unit}.read", self.buffers)
                    if flow.merged:
                        self.need(reader, f"{unit}.write", 1)
            for source in flow.sources[g]:
                self.feed(source, unit)
        packets = prod(c for c, _ in inner)
        return Flow(packets, tuple((n,) for n in names), packets, tuple((f"{n}.read",) for n in names))

    def turned(self, name: str, tag: str, flow: Flow, *, to_rows: bool) -> Flow:
        """Blocks turned round in double buffers: columns, a packet each, to rows of several packets, or back.

        Both sides find their words in different banks: the buffer is a diagonal stripe.
        """
        lanes, n = self.p.lanes, flow.columns
        row = 1 << (n - 1).bit_length()
        size = lanes * row
        if n % lanes or self.buffers * size > self.capacity:
            raise UserError(
                f"buffer {name}: {self.buffers} x {lanes} rows of {n} columns can't be turned round in a PMU of "
                f"{self.capacity} words, by {lanes} columns at a time"
            )
        count = self.p.banks.bit_length() - 1
        apart = self.buffers > 1 and lanes <= self.p.banks // 2
        bits = {f"bank_bit{count - 1}": size.bit_length() - 1} if apart else {}
        skew = min(count - apart, row.bit_length() - 1)
        by_column, by_row = ([(n, 1)], row), ([(n // lanes, lanes), (lanes, row)], 1)
        (write, write_lanes), (read, read_lanes) = (by_column, by_row) if to_rows else (by_row, by_column)
        names = []
        for g in range(self.groups):
            unit = self.unit(
                f"{name}.{g}", "pmu", tag, enable=3, words=self.buffers * size, **bits,
                skew_bits=skew, skew_shift=row.bit_length() - 1,
                **self.chain(name, "write_", [*write, *self._rounds(size)]), write_lane_stride=write_lanes,
                **self.chain(name, "read_", [*read, *self._rounds(size)]), read_lane_stride=read_lanes,
                write_wait_level=len(write), write_signal_level=len(write),
                read_wait_level=len(read), read_signal_level=len(read),
            )  # fmt: skip
            names.append(unit)
            self.work[unit] = self.blocks * n
            self.need(f"{unit}.read", f"{unit}.write")
            if self.blocks > 1:
                for reader in flow.readers[g]:
                    self.need(reader, f"{unit}.read", self.buffers)
            self.feed(flow.sources[g][0], unit)
        return Flow(n, tuple((u,) for u in names), n, tuple((f"{u}.read",) for u in names))

    def simd(
        self, name: str, tag: str, inputs: Sequence[tuple[Flow, int]], stages: Sequence[dict[str, Any]], packets: int,
        *, result: int = 0, columns: int | None = None, loops: Sequence[int] | None = None,
        fold_level: int | None = None, **fields: Any,
    ) -> Flow:  # fmt: skip
        """A SIMD pipeline a group that takes `packets` iterations a block; inputs with the level they are popped at.

        Level 0 is each iteration, and the number of `loops` (by default one) a block. With `fold` a packet leaves at
        the end of `fold_level`, by default a block. A stage for which `group` is given adds that number times the group to its constant.
        """
        if len(stages) > self.p.stages:
            raise UserError(f"unit {name} needs {len(stages)} stages; a PCU has {self.p.stages}")
        vectors = [i for i, (flow, _) in enumerate(inputs) if flow.network == "vector"]
        scalars = [i for i, (flow, _) in enumerate(inputs) if flow.network == "scalar"]
        for kind, used, there in (
            ("vector", vectors, self.p.vector_inputs),
            ("scalar", scalars, self.p.scalar_inputs),
        ):
            if len(used) > there:
                raise UserError(f"unit {name} needs {len(used)} {kind} inputs; a PCU has {there}")
        # Stages name inputs in order, and have the registers from INPUTS on to themselves.
        port = {i: k for used in (vectors, scalars) for k, i in enumerate(used)}
        where = {i: k for k, i in enumerate(vectors)} | {i: INPUTS + k for k, i in enumerate(scalars)}
        shift = len(scalars)

        def register(r: int) -> int:
            return where.get(r, r) if r < INPUTS else r + shift

        def moved(fields: Mapping[str, Any], names: Sequence[str]) -> dict[str, Any]:
            return {k: register(v) if k in names else v for k, v in fields.items()}

        def operand(s: Mapping[str, Any]) -> dict[str, Any]:
            names = ["to", "c", *(k for k in "ab" if s.get(f"{k}_from", "register") == "register")]
            return moved(s, names)

        fields = moved(fields, ("gate",))
        inner = list(loops or [packets])
        level = len(inner)
        fold = fields.get("fold", "none") != "none"
        names = []
        for g in range(self.groups):
            unit = self.unit(
                f"{name}.{g}", "pcu", tag, mode="simd", result=register(result),
                vectors=(1 << len(vectors)) - 1, scalars=(1 << len(scalars)) - 1,
                **{f"{flow.network}{port[i]}_level": at for i, (flow, at) in enumerate(inputs)},
                **{f"count{i}": c for i, c in enumerate([*inner, self.blocks])},
                fold_level=level if fold_level is None else fold_level, signal_level=level, **fields,
            )  # fmt: skip
            names.append(unit)
            self.units[unit].stages = [operand(_grouped(s, g)) for s in stages]
            self.work[unit] = prod(inner) * self.blocks
            for i, (flow, at) in enumerate(inputs):
                if flow.merged:
                    raise ValueError(f"unit {name}: what several units give must be buffered")
                self.feed(flow.sources[g][0], unit, port[i], flow.network)
                if at or len(inputs) > 1:  # what comes early must not stand before what it waits for
                    self.resting.add(flow.sources[g][0])
            # Buffers that are read together begin together.
            together = [
                flow.sources[g][0]
                for flow, at in inputs
                if not at and f"{flow.sources[g][0]}.read" in (flow.readers[g] if flow.readers else ())
            ]
            if len(together) > 1:
                self.bundles.append({f"{reader}.read" for reader in together})
        out = prod(inner[level if fold_level is None else fold_level :] if fold else inner)
        if columns is not None:
            out = columns
        # Inputs that are popped at each iteration may hold up one another; the readers of all of them wait together.
        readers = tuple(
            tuple(dict.fromkeys(r for f, at in inputs if at == 0 and f.readers for r in f.readers[g]))
            for g in range(self.groups)
        )
        return Flow(out, tuple((n,) for n in names), out, readers)

    def spread(self, name: str, tag: str, words: Flow) -> Flow:
        """Lane 0 of each packet for all lanes: a unit a group puts it on the scalar network.

        To read one word of a memory unit for every lane would take as many ticks as there are lanes.
        """
        n = words.columns
        out = self.simd(f"{name}.spread", tag, [(words, 0)], [], n)
        return replace(out, network="scalar")

    def product(
        self,
        name: str,
        tag: str,
        x: Flow,
        depth: int,
        strips: int,
        weights: Sequence[Sequence[str]],
        columns: int,
        *,
        rounded: bool = True,
        sequence: int = 0,
    ) -> Flow:
        """A matrix product on systolic arrays: each unit multiplies the block with `strips` strips of columns, whose
        sequence ids count from `sequence` on.

        `x` is read depth x strips times a block; `weights[g]` are memory units, one for each unit of group g, whose
        streams hold the strips in order, of the columns from `first_column` on. (If they were shared by groups, streams
        to many units would cross, and could wait for one another.)
        """
        c = self.p.stages
        sources = []
        for g in range(self.groups):
            row = []
            for j, weight in enumerate(weights[g]):
                unit = self.unit(
                    f"{name}.{g}.{j}", "pcu", tag, mode="systolic", vectors=3, round=int(rounded),
                    count0=depth, count1=strips, count2=self.blocks, fold_level=1,
                    sequence=sequence + first_column(j, len(weights[g]), strips * c, columns),
                )  # fmt: skip
                self.feed(x.sources[g][0], unit, 0)
                self.feed(weight, unit, 1)
                self.rows.setdefault(weight, []).append(unit)
                self.work[unit] = max(depth, c) * strips * self.blocks
                row.append(unit)
            sources.append(tuple(row))
        return Flow(columns, tuple(sources), strips * c, x.readers)

    def all_reduce(
        self, name: str, tag: str, flow: Flow, sockets: int, *, how: str = "add", words: bool = False
    ) -> Flow:
        """The sum over sockets of a matrix of which each has a part, by slices of its columns; or their maximum.

        It is rounded to bfloat16, unless it is of `words`.

        Each socket sends the slices of the others, adds up its own, and sends the sum to the others: 2 (n - 1) / n
        of the matrix leave it. Sockets do the same at the same time, so each receives just what it sends.
        """
        columns, others = flow.columns, sockets - 1
        if columns % sockets:
            raise UserError(f"{name}: {columns} columns are no multiple of {sockets} sockets")
        width = columns // sockets

        def exchanged(what: str, sent: Flow) -> Flow:
            tensor = f"{name}.{what}"
            gates = self.store(f"{tensor}.send", tag, sent, tensor, tier="remote", words=words)
            received = self.load(f"{tensor}.receive", tag, tensor, sent.columns, tier="remote", words=words)
            for g, gate in enumerate(gates):
                self.need(received.sources[g][0], gate)
            return received

        parts = exchanged("parts", self.read(f"{name}.out", tag, flow, [(width * others, 1)], first=width))
        each = self.read(f"{name}.parts.in", tag, parts, [(others, width), (width, 1)])
        total = self.simd(
            f"{name}.others",
            tag,
            [(each, 0)],
            [],
            others * width,
            loops=[others, width],
            fold=how,
            fold_level=1,
        )
        own = self.read(f"{name}.own", tag, flow, [(width, 1)])
        total = self.simd(
            f"{name}.sum", tag, [(own, 0), (total, 0)], [stage(how, 0, 1, 4)], width, result=4,
            round=int(not words),
        )  # fmt: skip
        sums = exchanged("sums", self.read(f"{name}.sums.out", tag, total, [(width, 1), (others, 0)]))
        slices = [self.read(f"{name}.slice0", tag, total, [(width, 1)])]
        slices += [
            self.read(
                f"{name}.slice{i + 1}", tag, sums, [(width, 1)], part=(i, others), sequence=(i + 1) * width
            )
            for i in range(others)
        ]
        sources, readers = (
            tuple(tuple(s[g][0] for s in some) for g in range(self.groups))
            for some in ([s.sources for s in slices], [s.readers for s in slices])
        )
        return Flow(columns, sources, width, readers)

    # ---- what stays for the whole kernel ------------------------------------------------------------

    def resident(
        self,
        name: str,
        tag: str,
        tensor: str,
        shares: Sequence[Sequence[tuple[Sequence[str], int, Mapping[str, Any]]]],
    ) -> None:
        """Memory units that are filled once, from a tensor that holds their contents one after the other.

        `shares[i]` are those that one gate to memory fills: (units with the same contents, words, fields of the read
        side). Each takes its range of the addresses, which count from 0 in each share.
        """
        lanes = self.p.lanes
        offset = 0
        for i, share in enumerate(shares):
            packets = sum(ceil_div(words, lanes) for _, words, _ in share)
            gate = self.gate(
                f"{name}.load{i}", tag, "load", "hbm", tensor, offset, [(packets, lanes * BF16_BYTES)]
            )
            self.loads.append(share[0][0][0])
            starts = accumulate((ceil_div(words, lanes) * lanes for _, words, _ in share), initial=0)
            for (units, words, fields), low in zip(share, starts, strict=False):
                held = ceil_div(words, lanes) * lanes
                if held > self.capacity:
                    raise UserError(f"unit {units[0]}: {held} words exceed the {self.capacity} of a PMU")
                for unit in units:
                    self.unit(
                        unit, "pmu", tag, enable=3, low=low, words=held,
                        **self.chain(unit, "write_", [(packets, lanes)]), write_signal_level=LEVELS,
                        **{**fields, "read_base": fields.get("read_base", 0) + low}, read_wait_level=LEVELS,
                    )  # fmt: skip
                    self.wire(f"{unit}.write", f"{unit}.read")
                    self.filled.append(unit)
                    self.resting.add(unit)
                    self.feed(gate, unit)
                    self.work[unit] = prod(fields.get(f"read_count{n}", 1) for n in range(LEVELS))
            offset += packets * lanes * BF16_BYTES

    def weights(
        self, name: str, tag: str, tensor: str, depth: int, strips: int, units: int, gates: int
    ) -> list[list[str]]:
        """Memory units with `strips` strips each of a weight matrix, for each group, filled through `gates` gates.

        The tensor holds strip after strip, row after row of it, as many columns as the array has; which columns are a
        unit's tells `first_column`.
        """
        c = self.p.stages
        names = [[f"{name}.w{j}.{g}" for j in range(units)] for g in range(self.groups)]
        fields = self.chain(name, "read_", [(depth, c), (strips, depth * c), (self.blocks, 0)])
        words = depth * strips * c
        share = ceil_div(units, gates)
        self.resident(
            name, tag, tensor,
            [
                [([row[j] for row in names], words, fields) for j in range(i, min(i + share, units))]
                for i in range(0, units, share)
            ],
        )  # fmt: skip
        return names

    def striped(
        self, name: str, tag: str, tensor: str, *, shape: tuple[int, int], first: tuple[int, int], depth: int,
        columns: int, strips: int, units: int, gates: int, apart: int = 1,
    ) -> list[list[str]]:  # fmt: skip
        """`weights` from a matrix of `shape` that lies as `load` finds it, of `depth` rows and `columns` columns from `first`,
        which are so far `apart`.

        Rows come side by side, a packet of them for each column; the array takes columns side by side. So what is written
        goes across the banks, a diagonal stripe.
        """
        lanes, c = self.p.lanes, self.p.stages
        width = strips * c
        row = 1 << (width - 1).bit_length()
        if depth % lanes or first[0] % lanes:
            raise UserError(f"{tensor}: {depth} rows from {first[0]} are no whole vectors of {lanes}")
        own = min(width, columns)
        loops = [(own, 1), (depth // lanes, lanes * row)]
        bits = min(self.p.banks.bit_length() - 1, row.bit_length() - 1)
        fields = {"skew_bits": bits, "skew_shift": row.bit_length() - 1, "write_lane_stride": row}
        fields |= self.chain(name, "read_", [(depth, row), (strips, c), (self.blocks, 0)])
        column = lanes * BF16_BYTES
        steps = [(own, apart * column), (depth // lanes, shape[1] * column)]
        at = [first[1] + apart * first_column(j, units, width, columns) for j in range(units)]
        offsets = [(first[0] // lanes * shape[1] + k) * column for k in at]
        return self._filled(name, tag, tensor, depth * row, loops, steps, offsets, fields, gates)

    def across(
        self, name: str, tag: str, tensor: str, *, shape: tuple[int, int], first: tuple[int, int], depth: int,
        columns: int, strips: int, units: int, gates: int,
    ) -> list[list[str]]:  # fmt: skip
        """The same for the transposed matrix: `depth` columns and `columns` rows from (row, column) `first`, of which
        each unit has whole vectors."""
        lanes, c = self.p.lanes, self.p.stages
        own = min(strips * c, columns)
        if own % lanes or columns % lanes or first[0] % lanes:
            raise UserError(
                f"{tensor}: {columns} rows from {first[0]}, {own} a unit, are no whole vectors of {lanes}"
            )
        loops = [(depth, own), (own // lanes, lanes)]
        fields = self.chain(name, "read_", [(depth, own), (strips, c), (self.blocks, 0)])
        column = lanes * BF16_BYTES
        steps = [(depth, column), (own // lanes, shape[1] * column)]
        at = [first[0] + first_column(j, units, strips * c, columns) for j in range(units)]
        offsets = [(k // lanes * shape[1] + first[1]) * column for k in at]
        return self._filled(name, tag, tensor, depth * own, loops, steps, offsets, fields, gates)

    def _filled(
        self, name: str, tag: str, tensor: str, words: int, loops: Sequence[tuple[int, int]],
        steps: Sequence[tuple[int, int]], offsets: Sequence[int], fields: Mapping[str, Any], gates: int,
    ) -> list[list[str]]:  # fmt: skip
        """A unit for each of `offsets` and group, filled once with `words` by `loops`, from memory by `steps`.

        A gate fills units one after the other whose offsets are equally far apart.
        """
        if words > self.capacity:
            raise UserError(f"unit {name}: {words} words exceed the {self.capacity} of a PMU")
        most = min(ceil_div(len(offsets), gates), (1 << ADDRESS_BITS) // words)
        shares: list[list[int]] = []
        for j, offset in enumerate(offsets):
            share = shares[-1] if shares else []
            apart = {offsets[i + 1] - offsets[i] for i in share[:-1]} | {offset - offsets[j - 1]}
            if share and len(share) < most and len(apart) == 1:
                share.append(j)
            else:
                shares.append([j])
        names = [[f"{name}.w{j}.{g}" for j in range(len(offsets))] for g in range(self.groups)]
        for i, share in enumerate(shares):
            step = offsets[share[1]] - offsets[share[0]] if len(share) > 1 else 0
            gate = self.gate(
                f"{name}.load{i}", tag, "load", "hbm", tensor, offsets[share[0]], [*steps, (len(share), step)]
            )
            self.loads.append(names[0][share[0]])
            for at, j in enumerate(share):
                for row in names:
                    unit = self.unit(
                        row[j], "pmu", tag, enable=3, low=at * words, words=words,
                        **self.chain(name, "write_", [*loops, (len(share), words)]), write_signal_level=LEVELS,
                        **fields, read_base=at * words, read_wait_level=LEVELS,
                    )  # fmt: skip
                    self.wire(f"{unit}.write", f"{unit}.read")
                    self.filled.append(unit)
                    self.resting.add(unit)
                    self.feed(gate, unit)
                    self.work[unit] = prod(fields[f"read_count{n}"] for n in range(3))
        return names

    def transposed(
        self, name: str, tag: str, tensor: str, *, rows: int, columns: int, strips: int, first: int = 0, step: int = 1,
        count: int | None = None,
    ) -> Flow:  # fmt: skip
        """A matrix's transpose as `product` takes it, `strips` times a block: blocks of its columns, one packet for each of
        its `rows`. Of the columns only `count` are taken, from `first` on, each `step`-th.

        A block's columns come a packet each for some rows, and leave as rows: the buffer is a diagonal stripe.
        """
        lanes = self.p.lanes
        taken = columns if count is None else count
        if rows % lanes or taken % lanes:
            raise UserError(f"{tensor}: {rows} rows of {taken} columns are no whole vectors of {lanes}")
        size = rows * lanes
        slot = 1 << (size - 1).bit_length()
        bank_bits = self.p.banks.bit_length() - 1
        apart = self.buffers > 1 and lanes <= self.p.banks // 2 and self.buffers * slot <= self.capacity
        if not apart:
            slot = size
        if self.buffers * slot > self.capacity:
            raise UserError(
                f"buffer {name}: {self.buffers} x {rows} rows of {lanes} columns are more than the {self.capacity} words of "
                "a PMU"
            )
        bits = {f"bank_bit{bank_bits - 1}": slot.bit_length() - 1} if apart else {}
        shift = lanes.bit_length() - 1
        column = lanes * BF16_BYTES
        steps = [
            (lanes, step * column),
            (rows // lanes, columns * column),
            (self.blocks, self.groups * lanes * step * column),
        ]
        gates = tuple(
            (
                self.gate(
                    f"{name}.in.{g}", tag, "load", "hbm", tensor, (first + g * lanes * step) * column, steps
                ),
            )
            for g in range(self.groups)
        )
        flow = self.admitted(name, tag, Flow(rows, gates, rows, gates))
        write, read = [(lanes, 1), (rows // lanes, lanes * lanes)], [(rows, lanes), (strips, 0)]
        names = []
        for g in range(self.groups):
            unit = self.unit(
                f"{name}.{g}", "pmu", tag, enable=3, words=self.buffers * slot, **bits,
                skew_bits=min(bank_bits - apart, shift), skew_shift=shift,
                **self.chain(name, "write_", [*write, *self._rounds(slot)]), write_lane_stride=lanes,
                **self.chain(name, "read_", [*read, *self._rounds(slot)]),
                write_wait_level=len(write), write_signal_level=len(write),
                read_wait_level=len(read), read_signal_level=len(read),
            )  # fmt: skip
            names.append(unit)
            self.work[unit] = self.blocks * rows * strips
            self.need(f"{unit}.read", f"{unit}.write")
            self.feed(flow.sources[g][0], unit)
            if self.blocks > 1:
                for reader in flow.readers[g]:
                    self.need(reader, f"{unit}.read", self.buffers)
        every = tuple((unit,) for unit in names)
        return Flow(rows * strips, every, rows * strips, tuple((f"{unit}.read",) for unit in names))

    def broadcast(
        self, name: str, tag: str, tensor: str, length: int, *, offset: int = 0, words: bool = False
    ) -> Flow:
        """A vector of a word for each column (a gain, say), given to all lanes, once a block; units for each group."""
        names = [f"{name}.{g}" for g in range(self.groups)]
        fields = self.chain(name, "read_", [(length, 1), (self.blocks, 0)])
        lanes = self.p.lanes
        gate = self.gate(
            f"{name}.load",
            tag,
            "load",
            "hbm",
            tensor,
            offset,
            [(ceil_div(length, lanes), lanes * (4 if words else BF16_BYTES))],
            form="word" if words else "bf16",
        )
        held = ceil_div(length, lanes) * lanes
        for unit in names:
            self.unit(
                unit, "pmu", tag, enable=3, words=held,
                **self.chain(unit, "write_", [(held // lanes, lanes)]), write_signal_level=LEVELS,
                **fields, read_wait_level=LEVELS,
            )  # fmt: skip
            self.wire(f"{unit}.write", f"{unit}.read")
            self.feed(gate, unit)
            self.work[unit] = length * self.blocks
        out = self.spread(name, tag, Flow(length, tuple((n,) for n in names), length))
        self.loads.append(names[0])
        self.filled += names
        self.resting.update(names)
        self.resting.update(unit for row in out.sources for unit in row)
        return replace(out, readers=())

    def streamed(
        self, name: str, tag: str, tensor: str, shares: Sequence[Sequence[tuple[str, int, str]]]
    ) -> None:
        """Memory units that are read in the order in which they are filled, from a tensor that holds their contents.

        `shares[i]` are those that one gate to memory fills, (unit, packets, tag), one after the other. Each keeps its
        range of what goes by. Reading follows writing by one of `TOKENS_HELD` steps, so that what comes first is used
        while the rest is under way.
        """
        lanes = self.p.lanes
        offset = 0
        for i, share in enumerate(shares):
            total = sum(packets for _, packets, _ in share)
            step = ceil_div(total, TOKENS_HELD)
            steps = ceil_div(total, step)
            gate = self.gate(
                f"{name}.load{i}", tag, "load", "hbm", tensor, offset,
                [(step, lanes * BF16_BYTES), (steps, step * lanes * BF16_BYTES)],
            )  # fmt: skip
            low = 0
            loops = [(step, lanes), (steps, step * lanes)]
            for unit, packets, own in share:
                if packets * lanes > self.capacity:
                    raise UserError(
                        f"unit {unit}: {packets * lanes} words exceed the {self.capacity} of a PMU"
                    )
                last = ceil_div(low + packets * lanes, step * lanes)  # step with any of its own
                self.unit(
                    unit, "pmu", own, enable=3, low=low, words=packets * lanes,
                    **self.chain(unit, "write_", loops), write_signal_level=1,
                    **self.chain(unit, "read_", [loops[0], (last, step * lanes)]), read_wait_level=1,
                )  # fmt: skip
                self.wire(f"{unit}.write", f"{unit}.read")
                self.resting.add(unit)
                self.feed(gate, unit)
                self.work[unit] = total
                self.by_steps.add(unit)
                self.sent[unit] = packets
                low += packets * lanes
            offset += steps * step * lanes * BF16_BYTES

    def vector_product(
        self,
        name: str,
        tag: str,
        x: Flow,
        depth: int,
        strips: int,
        weights: Sequence[Sequence[str]],
        *,
        rounded: bool = True,
    ) -> Flow:
        """A vector times a matrix on SIMD pipelines: lane n adds up x[k] * w[k, n], a packet for each strip of lanes.

        `x` gives a word of the vector a packet, depth x strips times; `weights[g]` are units whose streams hold the
        strips, row after row, one for each unit of the product.
        """
        # Where weights are still to come, the words for them wait on their way, on both networks.
        self.resting.update(unit for row in x.sources for unit in row)
        x = self.spread(f"{name}.x", tag, x)
        self.resting.update(unit for row in x.sources for unit in row)
        sources = []
        for g in range(self.groups):
            row = []
            for j, weight in enumerate(weights[g]):
                unit = self.unit(
                    f"{name}.{g}.{j}", "pcu", tag, mode="simd", vectors=1, scalars=1, round=int(rounded),
                    count0=depth, count1=strips, count2=self.blocks, fold="add", fold_level=1, signal_level=2, result=5,
                    sequence=j * strips if len(weights[g]) > 1 else 0,
                )  # fmt: skip
                self.units[unit].stages = [stage("multiply", INPUTS, 0, 5)]
                self.feed(x.sources[g][0], unit, 0, "scalar")
                self.feed(weight, unit, 0)
                self.rows.setdefault(weight, []).append(unit)
                self.work[unit] = depth * strips * self.blocks
                row.append(unit)
            sources.append(tuple(row))
        return Flow(len(weights[0]) * strips, tuple(sources), strips, x.readers)

    # ---- the section --------------------------------------------------------------------------------

    def interval(self) -> tuple[int, list[str]]:
        """Iterations of the busiest units, and which these are."""
        most = max(self.work.values(), default=0)
        return most, [name for name, n in self.work.items() if n == most]

    def into(self, section: Any, ticks: int = 0) -> None:
        """Give everything to a section builder (`mappers.rdu.section.Section`).

        Streams that rest (weights, say, which wait for the rows) claim whole links, so that none is behind them; the
        others have the rates that `ticks` for all of them give, if that is more than the busiest unit's iterations.
        """
        self.close()
        most = max(ticks, self.interval()[0])
        if self.blocks > 1:  # rows of a prompt find their weights there
            least, resting = LEAST, self.resting
        else:  # the rarest takes one of a link's flows
            least, resting = Fraction(1, self.p.flows), self.resting | self.rests()
        loading = least * LOADING
        if self.blocks > 1 and self.loading:
            least *= 2  # seen beside weights, which leave loads some room
        for name, u in self.units.items():
            fields = {"stages": u.stages, **u.fields} if u.kind == "pcu" and u.stages else u.fields
            getattr(section, u.kind)(name, tag=self.prefix + u.tag, **fields)
        meeting = Counter(sink for sinks in self.sinks.values() for sink in sinks)
        for source, sinks in self.sinks.items():
            # However rare a stream is, it counts beside one that claims the link; but where very many meet, all must be
            # able to. (Fewer that claim more are spread better: a layer's forward pass takes 20 % longer without.)
            together = max(meeting[sink] for sink in sinks)
            own = min(least, Fraction(1, together)) if together * LEAST > 1 else least
            rate = min(Fraction(1), max(own, Fraction(self.packets(source), max(1, most))))
            if source in resting:
                rate = 1 - SHARING * loading if source in self.later else Fraction(1)
            elif source in self.loading:
                rate = loading
            section.stream(source, *sinks, network=self.networks[source], rate=rate)
        for source, sink, index in self.tokens:
            section.token(source, 0, sink, index)

    def places(self) -> dict[str, tuple[int, int]]:
        """Columns and rows for the units of products: a memory unit with weights, and east of it those that it feeds.

        Weights flow east then, and the rows of each group can flow south, past all units of the product: streams of
        full rate that share no link. Empty if there is no room for all. The others find their places between them.
        """
        p = self.p
        wide = max((len(units) for units in self.rows.values()), default=0)
        used = ceil_div(len(self.rows), p.rows)  # columns of such units
        if not used or used * 2 * wide >= p.columns:
            return {}
        pitch = (p.columns - 1) // used // 2 * 2
        out = {}
        for i, (weight, units) in enumerate(self.rows.items()):
            x, y = i // p.rows * pitch, i % p.rows
            x += int(is_pcu(x, y))
            out[weight] = (x, y)
            out |= {unit: (x + 1 + 2 * n, y) for n, unit in enumerate(units)}
        return out

    def packets(self, name: str) -> int:
        """Packets that a unit gives in all."""
        u = self.units[name]
        if u.kind != "pcu":
            return self.sent.get(name, self.work[name])
        f = u.fields
        counts = [f.get(f"count{n}", 1) for n in range(LEVELS)]
        if f["mode"] == "systolic":
            return prod(counts[1:]) * self.p.stages
        return prod(counts[f["fold_level"] :]) if f.get("fold", "none") != "none" else prod(counts)


def _side(name: str) -> tuple[str, str]:
    unit, _, side = name.rpartition(".")
    return (unit, side) if side in ("write", "read") else (name, "")


def _grouped(fields: Mapping[str, Any], group: int) -> dict[str, Any]:
    out = dict(fields)
    step = out.pop("group", 0)
    if step:
        out["constant"] = out.get("constant", 0) + step * group
    return out
