"""Instruction sets as field tables: one table gives the NumPy records, the words that RTL decodes, and the text.

A target has one `InstructionSet` made of `Record` types, one for each kind of thing a program holds
(`code`, `config.pcu`, `args`, ...). A record may name several operations, told apart by an `op` field.
Text is one record a line, `MAC_AB row=3 cols=64 channels=0xff`, `pcu@1,2 mode=systolic k=64`; fields that
are left out take their default. RTL sees a record as an integer, fields from bit 0 upwards in table order.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import numpy as np

from tilewright.arch.errors import UserError, nearest


@dataclass(frozen=True)
class Field:
    """One field of a record: `bits` wide (1..63), unsigned unless `signed`; `names` makes it an enumeration.

    A `tag` field holds the index of a name in the program's list of tags; text spells the name.
    """

    name: str
    bits: int
    doc: str = ""
    default: int = 0
    signed: bool = False
    names: tuple[str, ...] = ()
    base: int = 10
    tag: bool = False

    def __post_init__(self) -> None:
        if not 1 <= self.bits <= 63:  # kernels compute with fields as int64
            raise ValueError(f"field {self.name} must have 1..63 bits, not {self.bits}")
        if len(self.names) > 1 << self.bits:
            raise ValueError(f"field {self.name} has {len(self.names)} names for {self.bits} bits")

    @property
    def low(self) -> int:
        return -(1 << (self.bits - 1)) if self.signed else 0

    @property
    def high(self) -> int:
        return (1 << (self.bits - 1)) - 1 if self.signed else (1 << self.bits) - 1

    @property
    def dtype(self) -> type:
        # Signed on purpose: kernels mix fields with int64, and NumPy's uint64 would turn that into float.
        return np.int32 if self.bits <= 31 else np.int64

    def parse(self, text: str, where: str, tags: list[str]) -> int:
        """The integer that `text` stands for; a new tag name is added to `tags`."""
        if self.tag and not text.lstrip("-").isdigit():
            if text not in tags:
                tags.append(text)
            return tags.index(text)
        if self.names and text in self.names:
            return self.names.index(text)
        try:
            value = int(text, 0)
        except ValueError:
            if not self.names:
                allowed = f"an integer {self.low}..{self.high}"
                raise UserError(f"{where}: {self.name} must be {allowed}, not {text!r}") from None
            raise UserError(f"{where}: {self.name} has no {text!r}: {nearest(text, self.names)}") from None
        high = len(self.names) - 1 if self.names else self.high
        if not self.low <= value <= high:
            raise UserError(f"{where}: {self.name} must be in {self.low}..{high}, not {text}")
        return value

    def format(self, value: int, tags: Sequence[str]) -> str:
        if self.tag:
            return tags[value] if value < len(tags) else str(value)
        if self.names:
            return self.names[value]
        return hex(value) if self.base == 16 else str(value)


# Every command carries these: which operator it works for, and the tick before which it may not start.
COMMON = (
    Field("tag", 16, "operator that the command works for", tag=True),
    Field("not_before", 32, "earliest tick at which the command may start (work that arrives over time)"),
)


@dataclass(frozen=True)
class Op:
    """An operation of a record type: its mnemonic, the fields it reads, and what it does."""

    name: str
    fields: tuple[str, ...]
    doc: str = ""


@dataclass(frozen=True)
class Record:
    """A record type: what one element of the program's region `region` holds.

    Records with `ops` get a leading `op` field. `at` names the fields written after `@` in text.
    """

    region: str
    fields: tuple[Field, ...]
    ops: tuple[Op, ...] = ()
    at: tuple[str, ...] = ()
    command: bool = True

    def __post_init__(self) -> None:
        names = [f.name for f in self.layout]
        for name in names:
            if names.count(name) > 1:
                raise ValueError(f"record {self.region} has two fields {name!r}")
        known = {f.name for f in self.fields}
        for op in self.ops:
            for name in op.fields:
                if name not in known:
                    raise ValueError(f"operation {op.name} reads unknown field {name!r}")
        for name in self.at:
            if name not in known:
                raise ValueError(f"record {self.region} is placed by unknown field {name!r}")

    @cached_property
    def layout(self) -> tuple[Field, ...]:
        """All fields in bit order: `op` first where there are operations, the common ones last."""
        op = (Field("op", 8, "operation", names=tuple(o.name for o in self.ops)),) if self.ops else ()
        return op + self.fields + (COMMON if self.command else ())

    @cached_property
    def dtype(self) -> np.dtype:
        return np.dtype([(f.name, f.dtype) for f in self.layout])

    @cached_property
    def bits(self) -> int:
        return sum(f.bits for f in self.layout)

    @cached_property
    def by_name(self) -> dict[str, Field]:
        return {f.name: f for f in self.layout}

    @property
    def mnemonic(self) -> str:
        """The text name of a record without operations: the last part of its region."""
        return self.region.rpartition(".")[2]

    def make(self, op: str | None = None, **values: int) -> np.ndarray:
        """One record as an array of length 1; unnamed fields take their defaults.

        Raises ValueError for a field that the record lacks or a value that does not fit.
        """
        out = np.zeros(1, self.dtype)
        for f in self.layout:
            out[f.name] = f.default
        if self.ops:
            out["op"] = [o.name for o in self.ops].index(op or self.ops[0].name)
        for name, value in values.items():
            if name not in self.by_name:
                raise ValueError(f"record {self.region} has no field {name!r}: {nearest(name, self.by_name)}")
            f = self.by_name[name]
            if not f.low <= value <= f.high:
                raise ValueError(f"{name} must be in {f.low}..{f.high}, not {value}")
            out[name] = value
        return out

    def encode(self, records: np.ndarray) -> np.ndarray:
        """Records [n] as words uint32[n, ceil(bits / 32)], the bits that RTL decodes."""
        words = np.zeros((len(records), -(-self.bits // 32)), np.uint32)
        offset = 0
        for f in self.layout:
            value = records[f.name].astype(np.int64) & ((1 << f.bits) - 1)
            word, shift = divmod(offset, 32)
            rest = f.bits
            while rest > 0:
                take = min(rest, 32 - shift)
                words[:, word] |= ((value & ((1 << take) - 1)) << shift).astype(np.uint32)
                value >>= take
                rest -= take
                word, shift = word + 1, 0
            offset += f.bits
        return words

    def decode(self, words: np.ndarray) -> np.ndarray:
        """The inverse of `encode`."""
        records = np.zeros(len(words), self.dtype)
        offset = 0
        for f in self.layout:
            value = np.zeros(len(words), np.int64)
            word, shift = divmod(offset, 32)
            done = 0
            while done < f.bits:
                take = min(f.bits - done, 32 - shift)
                part = (words[:, word].astype(np.int64) >> shift) & ((1 << take) - 1)
                value |= part << done
                done += take
                word, shift = word + 1, 0
            if f.signed:
                value -= (value >> (f.bits - 1)) << f.bits
            records[f.name] = value
            offset += f.bits
        return records


@dataclass(frozen=True)
class Segment:
    """A piece of a program: a few typed arrays, one for each region it fills, executed `repeat` times.

    `names` are a mapper's for the units that the segment configures, by place, for messages; they are no part of the text.
    """

    regions: Mapping[str, np.ndarray]
    repeat: int = 1
    label: str = ""
    names: Mapping[str, str] = field(default_factory=dict, compare=False)


@dataclass
class Program:
    """What a machine executes: segments in order, and the names of the tags their commands carry.

    `segments` is a list, or any iterable that can be walked again (a mapper may generate them on the
    way, so that memory is bounded by a segment and not by the run).
    """

    isa: "InstructionSet"
    segments: Iterable[Segment]
    tags: Sequence[str] = ()

    def flat(self, region: str = "code") -> np.ndarray:
        """All records of a region as one array, repetitions written out. For programs that fit in memory."""
        parts = [s.regions[region] for s in self.segments for _ in range(s.repeat)]
        return np.concatenate(parts) if parts else np.zeros(0, self.isa.record(region).dtype)

    def text(self) -> str:
        """The program in assembler text; `isa.assemble` reads back the same program, tags included."""
        lines: list[str] = []
        seen: dict[int, None] = {}  # tags in the order in which the text shows them
        for i, segment in enumerate(self.segments):
            if i or segment.repeat != 1 or segment.label:
                label = f" label={segment.label.replace(' ', '_')}" if segment.label else ""
                lines.append(f".segment repeat={segment.repeat}{label}")
            for region, records in segment.regions.items():
                lines += self.isa.format(region, records, self.tags)
                named = [records[f.name] for f in self.isa.record(region).layout if f.tag]
                if named:
                    tags, first = np.unique(np.stack(named, axis=1), return_index=True)
                    seen |= dict.fromkeys(int(t) for t in tags[np.argsort(first)] if t < len(self.tags))
        # `assemble` numbers tags as they appear; where that is not their order here, the text states it.
        head = [] if list(seen) == list(range(len(self.tags))) else [f".tags {' '.join(self.tags)}"]
        return "\n".join(head + lines) + "\n"


@dataclass(frozen=True)
class InstructionSet:
    """The record types of one target."""

    target: str
    records: tuple[Record, ...]
    _mnemonics: dict[str, tuple[Record, Op | None]] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        table: dict[str, tuple[Record, Op | None]] = {}
        for record in self.records:
            ops: tuple[Op | None, ...] = record.ops or (None,)
            for op in ops:
                name = op.name if op else record.mnemonic
                if name in table:
                    raise ValueError(f"mnemonic {name} is defined twice")
                table[name] = record, op
        object.__setattr__(self, "_mnemonics", table)

    def record(self, region: str) -> Record:
        for r in self.records:
            if r.region == region:
                return r
        raise KeyError(region)

    def make(self, mnemonic: str, **values: int) -> np.ndarray:
        """One record of the given mnemonic; see `Record.make`."""
        record, op = self._mnemonics[mnemonic]
        return record.make(op.name if op else None, **values)

    def assemble(self, text: str, name: str = "program") -> Program:
        """The program that `text` spells. Raises UserError naming the line.

        A line is a record, a comment after `#`, `.segment [repeat=n] [label=text]`, which starts a new
        segment, or `.tags name ...`, which numbers tags before their first use.
        """
        tags: list[str] = []
        segments: list[Segment] = []
        regions: dict[str, list[np.ndarray]] = {}
        head: dict[str, Any] = {}

        def close() -> None:
            if regions:
                segments.append(Segment({r: np.concatenate(a) for r, a in regions.items()}, **head))
                regions.clear()

        for number, line in enumerate(text.splitlines(), 1):
            words = line.split("#", 1)[0].split()
            if not words:
                continue
            where = f"{name}:{number}"
            if words[0] == ".tags":
                tags += [w for w in words[1:] if w not in tags]
                continue
            if words[0] == ".segment":
                close()
                head = self._directive(words[1:], where)
                continue
            record, values = self._record(words, where, tags)
            regions.setdefault(record.region, []).append(values)
        close()
        return Program(self, segments, tags)

    def format(self, region: str, records: np.ndarray, tags: Sequence[str] = ()) -> list[str]:
        """One line of text for each record; fields at their default are left out, but never a named tag."""
        record = self.record(region)
        lines = []
        for r in records:
            op = record.ops[int(r["op"])] if record.ops else None
            words = [op.name if op else record.mnemonic]
            if record.at:
                words[0] += "@" + ",".join(str(int(r[a])) for a in record.at)
            for f in record.layout:
                if (op and f.name == "op") or f.name in record.at:
                    continue
                if int(r[f.name]) == f.default and not (f.tag and tags):
                    continue
                words.append(f"{f.name}={f.format(int(r[f.name]), tags)}")
            lines.append(" ".join(words))
        return lines

    def _directive(self, words: list[str], where: str) -> dict[str, Any]:
        head: dict[str, Any] = {}
        for key, value in _pairs(words, where):
            if key == "repeat":
                if not value.isdigit() or int(value) < 1:
                    raise UserError(f"{where}: repeat must be a positive integer, not {value!r}")
                head["repeat"] = int(value)
            elif key == "label":
                head["label"] = value
            else:
                raise UserError(f"{where}: .segment has no {key!r}: {nearest(key, ['repeat', 'label'])}")
        return head

    def _record(self, words: list[str], where: str, tags: list[str]) -> tuple[Record, np.ndarray]:
        mnemonic, _, place = words[0].partition("@")
        if mnemonic not in self._mnemonics:
            hint = nearest(mnemonic, self._mnemonics)
            raise UserError(f"{where}: unknown instruction {mnemonic!r}: {hint}")
        record, op = self._mnemonics[mnemonic]
        allowed = [*(op.fields if op else [f.name for f in record.fields]), *(f.name for f in COMMON)]
        if not record.command:
            allowed = allowed[: -len(COMMON)]
        out = record.make(op.name if op else None)
        coordinates = place.split(",") if place else []
        if len(coordinates) != len(record.at):
            raise UserError(f"{where}: {mnemonic} takes {len(record.at)} coordinates after @, not {place!r}")
        given = list(zip(record.at, coordinates, strict=True)) + list(_pairs(words[1:], where))
        seen: set[str] = set()
        for key, value in given:
            if key not in allowed:
                raise UserError(f"{where}: {mnemonic} has no field {key!r}: {nearest(key, allowed)}")
            if key in seen:
                raise UserError(f"{where}: {key} is given twice")
            seen.add(key)
            out[key] = record.by_name[key].parse(value, where, tags)
        return record, out


def _pairs(words: list[str], where: str) -> Iterable[tuple[str, str]]:
    for word in words:
        key, equals, value = word.partition("=")
        if not equals or not key or not value:
            raise UserError(f"{where}: expected field=value, not {word!r}")
        yield key, value
