"""Fourier convolution by Monarch decomposition (`workloads.monarch`) as sections, and the paper's fusion example.

A signal is cut into lanes by one of its digits, each with a chain of stages of its own:

    signal PMU -> two systolic PCUs (real and imaginary parts) -> SIMD PCU (twiddles from two PMUs) -> signal PMU -> ...

The array's rows are the `radix` outputs of a transform, its columns as many other points; a result packet holds the
outputs of one point, so that the next stage's digit is a stride of its PMU's read side: the transposition costs
nothing. The digit by which lanes are cut can't be transformed in them. So there are three groups of stages, between
which the signal goes through the HBM, stored by one cut and loaded by another: 1..m-1; then m, the spectrum, and the
inverses of m..2; then the inverse of 1. All is one kernel: a load waits for the tokens of the stores before it.

Matrices, twiddles and spectrum are resident in PMUs. Streams are routed as if they moved a packet a tick, so that none
shares a link (see `mappers.rdu.apps`). All stages but the first work on a PMU each, without a second
buffer: it is one signal that passes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import ceil
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program
from tilewright.arch.rdu import ADDRESS_BITS, ISA, LEVELS, TOKENS, TOKENS_HELD, RduParams, is_pcu
from tilewright.mappers.rdu.apps import Stage, buffer
from tilewright.mappers.rdu.section import Built, Section, segment
from tilewright.workloads import monarch
from tilewright.workloads.monarch import Pair
from tilewright.workloads.rdu_kernels import place

__all__ = ["Convolution", "Kernel", "fft_convolution", "scratch", "unfused_convolution"]

Words = NDArray[np.uint32]
Layout = tuple[int, ...]
SINKING = 0.5
"""Rate by which streams are routed that always move on, into a PMU that has room for all or to memory: those may share
links with one another, and need not be near."""
SEEDS = 4
"""Tried for a kernel in which a stream may wait for another on the same link."""
ELEMENT = 2  # bytes of a bfloat16 off chip


class Step(NamedTuple):
    """A stage: the digit that it transforms, and by what its outputs are multiplied, by digit.

    `read`: the digit is the slowest of its layout ("slow"), or that within vectors ("vector"). `write`: the digit that
    was within vectors becomes the fastest, or the slowest, of those between them ("fast", "slow", or "" if it was
    transformed).
    """

    digit: int
    inverse: bool
    factors: Pair | None
    read: Literal["slow", "vector"] = "slow"
    write: Literal["fast", "slow", ""] = "fast"


class Source(NamedTuple):
    """Where a group's signal lies: its first byte, bytes from lane to lane, and the (count, stride in bytes) of packets."""

    address: int
    lane_bytes: int
    loops: Sequence[tuple[int, int]]


@dataclass(frozen=True)
class Kernel:
    """A section, its arguments, and the words that PMUs hold from the start, by address."""

    section: Section
    arguments: Mapping[int, int]
    resident: Mapping[str, Words]
    seeds: int = 1

    def build(self, *, seed: int = 0) -> Built:
        """Place and route, by the first of `seeds` seeds from `seed` on that overuses no link, or else by the first."""
        first = built = self.section.build(seed=seed)
        for other in range(seed + 1, seed + self.seeds):
            if not any(built.routing.overused.values()):
                return built
            built = self.section.build(seed=other)
        return first if any(built.routing.overused.values()) else built


@dataclass(frozen=True)
class Convolution:
    """Kernels to be run one after the other, and where signal and result lie in HBM, as bfloat16.

    Both are arrays of digits, slowest first, by their number; in between the two parts of a number, and the digit
    listed last.
    """

    params: RduParams
    order: int
    kernels: Sequence[Kernel]
    source: int
    source_digits: Layout
    target: int
    target_digits: Layout
    constants: Mapping[int, Words]
    bytes: int

    def program(self, built: Sequence[Built], *, host: bool = False) -> Program:
        """All kernels in order, launched by the host or by the AGCUs."""
        if len(built) != len(self.kernels):
            raise ValueError(f"built must be {len(self.kernels)} sections, not {len(built)}")
        parts = zip(self.kernels, built, strict=True)
        return Program(
            ISA,
            [segment(b, args=dict(k.arguments), index=i, host=host) for i, (k, b) in enumerate(parts)],
            [*built[0].tags],
        )

    def memory(self, signal: NDArray[Any]) -> NDArray[np.uint8]:
        """HBM with the signal, radix ** order complex values."""
        radix = self.params.lanes
        z = np.asarray(signal, np.complex128).reshape((radix,) * self.order)
        z = z.transpose([d - 1 for d in self.source_digits])
        parts = np.stack([monarch.bf16(part) for part in Pair.of(z)], axis=-2)
        image = np.zeros(self.bytes, np.uint8)
        for address, words in {self.source: parts.view(np.uint32), **self.constants}.items():
            raw = (words.reshape(-1) >> 16).astype(np.uint16).view(np.uint8)
            image[address : address + len(raw)] = raw
        return image

    def result(self, image: NDArray[np.uint8]) -> Pair:
        """The convolution in HBM after the run."""
        radix, lane = self.params.lanes, _Shape.of(self.params, self.order).lane_bytes
        size = radix ** (self.order - 1) * 2 * ELEMENT
        lanes = [image[self.target + u * lane :][:size] for u in range(radix)]
        halves = np.stack(lanes).reshape(-1).view(np.uint16).astype(np.uint32) << 16
        shape = (*(radix,) * (self.order - 1), 2, radix)
        parts = halves.view(np.float32).reshape(shape)
        back = np.argsort([d - 1 for d in self.target_digits])
        return Pair(*(parts[..., k, :].transpose(back).reshape(-1) for k in range(2)))


def scratch(params: RduParams, built: Sequence[Built], kernels: Sequence[Kernel]) -> Words:
    """uint32[pmus, banks, words]: what PMUs hold before the run. Raises UserError where two kernels want one PMU."""
    p = params
    out = np.zeros((p.pmus, p.banks, p.bank_words), np.uint32)
    at = [(x, y) for y in range(p.rows) for x in range(p.columns) if not is_pcu(x, y)]
    index = {position: i for i, position in enumerate(at)}
    taken: dict[int, str] = {}
    for b, kernel in zip(built, kernels, strict=True):
        records = {(int(r["x"]), int(r["y"])): r for r in b.records["config.pmu"]}
        for name, words in kernel.resident.items():
            position = b.site(name)
            pmu = index[position]
            if pmu in taken:
                raise UserError(f"{name} and {taken[pmu]} are resident in one PMU, {position}")
            taken[pmu] = name
            valid, bank, word = place(records[position], np.arange(len(words)), p.banks)
            assert np.all(valid)
            out[pmu, bank, word] = words
    return out


# ---- one group of stages ------------------------------------------------------------------------------


class _Shape(NamedTuple):
    """Sizes of one lane: `order` - 1 digits, one of them within vectors."""

    radix: int
    columns: int  # of the array
    points: int  # between which vectors lie: radix ** (order - 2)
    words: int  # of the signal

    @classmethod
    def of(cls, p: RduParams, order: int) -> "_Shape":
        return cls(p.lanes, p.stages, p.lanes ** (order - 2), 2 * p.lanes ** (order - 1))

    @property
    def line(self) -> int:
        """Words of a point's vectors."""
        return 2 * self.radix

    def passes(self, step: Step) -> tuple[int, int]:
        """Tiles of columns, and how often each is taken."""
        if step.read == "vector":
            return ceil(self.points / self.columns), 1
        return ceil(self.points // self.radix / self.columns), self.radix

    def packets(self, step: Step) -> int:
        tiles, turns = self.passes(step)
        return tiles * self.columns * turns

    def reads(self, step: Step) -> list[tuple[int, int]]:
        """Loops of the operands: the digit, the two parts, the tiles, and the digit within vectors."""
        tiles, turns = self.passes(step)
        tile = (tiles, self.columns * self.line)
        if step.read == "vector":
            return [(self.radix, 1), (2, self.radix), tile]
        return [(self.radix, self.points // self.radix * self.line), (2, self.radix), tile, (turns, 1)]

    def writes(self, step: Step) -> list[tuple[int, int]]:
        """Loops of the results. Those of columns beyond the last point fall behind the signal, or are overwritten."""
        tiles, turns = self.passes(step)
        columns = tiles * self.columns
        if step.read == "vector":
            return [(2, self.radix), (columns, self.line)]
        across = self.points // self.radix
        point, turn = (self.radix, 1) if step.write == "fast" else (1, across)
        return [(2, self.radix), (columns, point * self.line), (turns, turn * self.line)]

    @property
    def lane_bytes(self) -> int:
        """Bytes of a lane off chip, with what columns beyond the last point leave behind it."""
        across = ceil(max(1, self.points // self.radix) / self.columns) * self.columns
        return max(across * self.radix, self.points) * self.line * ELEMENT


def _loops(loops: Sequence[tuple[int, int]], prefix: str = "") -> dict[str, int]:
    if len(loops) > LEVELS:
        raise UserError(f"{len(loops)} nested loops; a counter chain has {LEVELS}")
    out = {f"{prefix}count{n}": count for n, (count, _) in enumerate(loops)}
    return out | {f"{prefix}stride{n}": stride for n, (_, stride) in enumerate(loops)}


def _float(operation: str, to: int, a: int, b: int = 0, c: int = 0) -> Stage:
    return {"operation": operation, "type": "fp32", "to": to, "a": a, "b": b, "c": c}


# Outputs (re, im) in turn, by counter 0, from vectors re, im and factors.
_JOIN: list[Stage] = [
    {"operation": "pass", "type": "int32", "a_from": "counter", "a": 0, "to": 8},
    _float("select", 0, 1, 0, c=8),
]
_MULTIPLY: list[Stage] = [
    _JOIN[0],
    _float("select", 9, 3, 2, c=8),
    _float("select", 10, 2, 3, c=8),
    _float("multiply", 9, 0, 9),
    _float("multiply", 10, 1, 10),
    _float("add", 11, 9, 10),
    _float("subtract", 12, 9, 10),
    _float("select", 0, 11, 12, c=8),
]


@dataclass
class _Building:
    """A section that grows, with its arguments and resident words."""

    section: Section
    shape: _Shape
    arguments: dict[int, int] = field(default_factory=dict)
    resident: dict[str, Words] = field(default_factory=dict)

    def argument(self, address: int) -> int:
        for index, known in self.arguments.items():
            if known == address:
                return index
        self.arguments[len(self.arguments)] = address
        return len(self.arguments) - 1

    def kernel(self, seeds: int = 1) -> Kernel:
        return Kernel(self.section, self.arguments, self.resident, seeds)

    def constant(
        self, name: str, words: Words, loops: Sequence[tuple[int, int]], tag: str, taker: str
    ) -> None:
        """A PMU that gives what it holds, for each token of the taker one packet.

        What is on the way fits into the taker's queue, and keeps nobody else from using the same links.
        """
        self.resident[name] = words
        credits = min(TOKENS_HELD, self.section.params.fifo_depth)
        self.section.pmu(
            name, tag=tag, enable=2, words=len(words), read_wait=1, read_hold0=credits, **_loops(loops, "read_")
        )  # fmt: skip
        self.section.token(taker, 0, f"{name}.read", 0)

    def matrices(self, name: str, lane: int, step: Step, tag: str, loaded: bool) -> None:
        """The operands of the array's rows, for the PCUs of real and of imaginary parts: resident, or to be loaded."""
        s, radix = self.section, self.shape.radix
        tiles, turns = self.shape.passes(step)
        rows = 2 * radix
        loops = [(rows, radix), (tiles * turns, 0)]
        for part, words in zip(("re", "im"), _operands(radix, step.inverse), strict=True):
            unit, taker = f"{name}.f_{part}@{lane}", f"{name}.{part}@{lane}"
            if not loaded:
                self.constant(unit, words, loops, tag, taker)
            else:
                s.pmu(
                    unit, tag=tag, enable=3, words=len(words), write_count0=rows, write_stride0=radix,
                    write_signal=1, write_signal_level=LEVELS, read_wait=1, read_wait_level=LEVELS,
                    **_loops(loops, "read_"),
                )  # fmt: skip
                s.token(f"{unit}.write", 0, f"{unit}.read", 0)
            s.stream(unit, taker)

    def load(self, name: str, address: int, loops: Sequence[tuple[int, int]], **more: int) -> None:
        """An AGCU that reads vectors from HBM."""
        self.section.agcu(
            name, tag="load", direction="load", tier="hbm", argument=self.argument(address), words=self.shape.radix,
            format="bf16", **_loops(loops), **more,
        )  # fmt: skip

    def store(self, name: str, address: int, loops: Sequence[tuple[int, int]]) -> None:
        """An AGCU that writes them, and signals its end."""
        self.section.agcu(
            name, tag="store", direction="store", tier="hbm", argument=self.argument(address),
            words=self.shape.radix, format="bf16", **_loops(loops), signal=1, signal_level=LEVELS,
        )  # fmt: skip

    def signal(self, name: str, reader: Step, *, tag: str, low: int = 0, **write: int) -> None:
        """A PMU that holds a lane's signal: all is written, then all is read."""
        sh, p = self.shape, self.section.params
        banks = p.banks.bit_length() - 1
        line = sh.line.bit_length() - 1
        self.section.pmu(
            name,
            tag=tag,
            enable=3,
            low=low,
            words=sh.words,
            skew_bits=min(banks, line),
            skew_shift=max(banks, line),
            **write,
            **_loops(sh.reads(reader), "read_"),
            read_base=low,
            read_lane_stride=sh.line,
            write_signal=1,
            write_signal_level=LEVELS,
            read_wait=1,
            read_wait_level=LEVELS,
        )
        self.section.token(f"{name}.write", 0, f"{name}.read", 0)

    def stage(
        self, name: str, lane: int, step: Step, factors: Sequence[Words] | None, source: str, tag: str
    ) -> str:
        """The PCUs of one stage in one lane; returns the one that gives the results."""
        s, sh = self.section, self.shape
        tiles, turns = sh.passes(step)
        for part in ("re", "im"):
            s.pcu(
                f"{name}.{part}@{lane}",
                tag=tag,
                mode="systolic",
                vectors=3,
                fold="add",
                fold_level=1,
                signal=1,
                send_vector=1,
                count0=2 * sh.radix,
                count1=tiles * turns,
            )
        s.stream(source, *((f"{name}.{part}@{lane}", 1) for part in ("re", "im")))
        out = f"{name}.out@{lane}"
        inputs = 2 if factors is None else 4
        s.pcu(
            out,
            tag=tag,
            mode="simd",
            vectors=(1 << inputs) - 1,
            **{f"vector{i}_level": 1 for i in range(inputs)},
            stages=_JOIN if factors is None else _MULTIPLY,
            round=1,
            signal=1,
            signal_level=1,
            send_vector=1,
            count0=2,
            count1=sh.packets(step),
        )
        for i, part in enumerate(("re", "im")):
            s.stream(f"{name}.{part}@{lane}", (out, i))
            if factors is not None:
                across = sh.points if step.read == "vector" else sh.points // sh.radix
                loops = [(tiles * sh.columns, sh.radix), (turns, across * sh.radix)]
                beyond = np.zeros((tiles * sh.columns - across) * sh.radix, np.uint32)
                table = f"{name}.w_{part}@{lane}"
                words = np.concatenate([factors[i].reshape(-1), beyond])
                self.constant(table, words, loops, tag, out)
                s.stream(table, (out, 2 + i))
        return out

    def barrier(self, name: str, sources: Sequence[str], sinks: Sequence[str]) -> None:
        """No sink starts before every source has signalled its end."""
        while len(sources) > 1:
            joined = []
            for k in range(0, len(sources), TOKENS):
                part = sources[k : k + TOKENS]
                unit = f"{name}.{len(sources)}.{k // TOKENS}"
                self.section.pcu(
                    unit, tag=name, mode="simd", wait=(1 << len(part)) - 1, wait_level=LEVELS, signal=1,
                    signal_level=LEVELS,
                )  # fmt: skip
                for i, source in enumerate(part):
                    self.section.token(source, 0, unit, i)
                joined.append(unit)
            sources = joined
        for sink in sinks:
            self.section.token(sources[0], 0, sink, 0)

    def group(
        self,
        name: str,
        lane_digit: int,
        layout: Layout,
        source: Source,
        steps: Sequence[Step],
        target: int,
        share: int,
        waits: Sequence[str] = (),
        matrices: int | None = None,
    ) -> tuple[Layout, list[str]]:
        """Stages in every lane, from `source` to `target`; returns the layout there, and the AGCUs that store."""
        s, sh = self.section, self.shape
        loads, stores = [], []
        packet = sh.radix * ELEMENT
        for u in range(sh.radix):
            at, held = layout, f"{name}.x@{u}"
            count = share * 2 * sh.points
            self.signal(
                held,
                steps[0],
                tag="load",
                low=u % share * sh.words,
                write_count0=count,
                write_stride0=sh.radix,
            )
            if u % share == 0:
                load = f"{name}.load@{u}"
                self.load(
                    load,
                    source.address + u * source.lane_bytes,
                    [(2, packet), *source.loops, (share, source.lane_bytes)],
                    **({"wait": 1, "wait_level": LEVELS} if waits else {}),
                )
                loads.append(load)
            for k, step in enumerate(steps):
                tag = _tag(step)
                order = _packet_order(at, step)
                factors = None
                if step.factors is not None:
                    factors = [_lane(part, lane_digit, u, order).view(np.uint32) for part in step.factors]
                out = self.stage(f"{name}.{k}", u, step, factors, held, tag)
                self.matrices(f"{name}.{k}", u, step, tag, matrices is not None)
                at = _after(at, step)
                if k + 1 < len(steps):
                    held = f"{name}.{k}.x@{u}"
                    self.signal(held, steps[k + 1], tag=tag, **_loops(sh.writes(step), "write_"))
                    s.stream(out, held, rate=SINKING)
            store = f"{name}.store@{u}"
            at_bytes = [(count, stride * ELEMENT) for count, stride in sh.writes(steps[-1])]
            self.store(store, target + u * sh.lane_bytes, at_bytes)
            s.stream(out, store, rate=SINKING / 4)
            stores.append(store)
        for load, u in zip(loads, range(0, sh.radix, share), strict=True):
            s.stream(load, *(f"{name}.x@{v}" for v in range(u, u + share)), rate=SINKING / 4)
        if matrices is not None:
            for k in range(len(steps)):
                for i, part in enumerate(("re", "im")):
                    unit = f"{name}.{k}.f_{part}"
                    address = matrices + i * 2 * sh.radix * packet
                    self.load(f"{unit}.load", address, [(2 * sh.radix, packet)])
                    s.stream(f"{unit}.load", *(f"{unit}@{u}" for u in range(sh.radix)), rate=SINKING / 4)
        if waits:
            self.barrier(f"{name}.barrier", waits, loads)
        return at, stores


def _operands(radix: int, inverse: bool) -> list[Words]:
    """Matrix operands by ascending digit, real parts first, for the real and for the imaginary part of the result."""
    f = monarch.matrix(radix, inverse)
    return [np.concatenate(rows).reshape(-1).view(np.uint32) for rows in ((f.re, -f.im), (f.im, f.re))]


def _tag(step: Step) -> str:
    return f"{'inverse' if step.inverse else 'forward'} {step.digit}"


def _after(layout: Layout, step: Step) -> Layout:
    first, *rest, inside = layout
    if step.read == "vector":
        return layout
    return (*rest, inside, first) if step.write == "fast" else (inside, *rest, first)


def _packet_order(layout: Layout, step: Step) -> Layout:
    """Digits of the points in the order in which results leave, and the digit within them."""
    first, *rest, inside = layout
    return layout if step.read == "vector" else (inside, *rest, first)


def _lane(values: NDArray[np.float32], lane_digit: int, lane: int, order: Layout) -> NDArray[np.float32]:
    """The values of one lane, an axis for each digit of `order`."""
    axes = [d for d in range(1, values.ndim + 1) if d != lane_digit]
    part = np.take(values, lane, axis=lane_digit - 1)
    return np.ascontiguousarray(part.transpose([axes.index(d) for d in order]), np.float32)


# ---- the convolution ----------------------------------------------------------------------------------


def _check(p: RduParams, order: int) -> None:
    if not p.systolic:
        raise UserError("a Fourier convolution needs pcu.systolic: its transforms are matrix products")
    if not 3 <= order <= LEVELS:
        raise UserError(f"order must be in 3..{LEVELS}, not {order}")
    if p.stages < len(_MULTIPLY):
        raise UserError(f"pcu.stages {p.stages}: a complex product takes {len(_MULTIPLY)}")
    shape = _Shape.of(p, order)
    if shape.words > p.banks * p.bank_words:
        raise UserError(f"a lane's signal has {shape.words} words; a PMU holds {p.banks * p.bank_words}")


class _Group(NamedTuple):
    """Stages between two transfers: the digit that cuts the lanes, the layout, and packets of a lane when loaded."""

    lane_digit: int
    layout: Layout
    lane_bytes: int
    loops: Sequence[tuple[int, int]]
    steps: Sequence[Step]


def _groups(sh: _Shape, spectrum: Pair) -> tuple[_Group, _Group, _Group]:
    radix, last = sh.radix, spectrum.re.ndim
    line = sh.line * ELEMENT
    across = radix ** (last - 3)

    def back(digit: int) -> Pair | None:
        return monarch.twiddles(radix, last, digit - 1, inverse=True) if digit > 1 else None

    forward = [Step(d, False, monarch.twiddles(radix, last, d)) for d in range(1, last)]
    # Lanes by digit 1, the slowest of each old lane; behind the old lane those between, the fastest now slowest.
    between = [(radix, line * radix ** (last - 2 - d)) for d in range(2, last - 1)]
    middle = [
        Step(last, False, spectrum, write="slow"),
        Step(last, True, back(last), read="vector", write=""),
        *(Step(d, True, back(d)) for d in range(last - 1, 1, -1)),
    ]
    return (
        _Group(last, tuple(range(1, last)), sh.words * ELEMENT, [(sh.points, line)], forward),
        _Group(
            1, (last, *range(last - 2, 1, -1), last - 1), line * across, [*between, (radix, sh.lane_bytes)], middle
        ),
        _Group(
            last, (1, *range(last - 1, 1, -1)), line * across, [(across, line), (radix, sh.lane_bytes)],
            [Step(1, True, back(1))],
        ),
    )  # fmt: skip


def _share(p: RduParams, lanes: int, groups: int, others: int) -> int:
    """How many lanes must share an AGCU that loads, so that those of all groups are enough."""
    gates = 2 * p.agcus_per_side
    shares = [1 << n for n in range(lanes.bit_length()) if groups * (lanes + (lanes >> n)) + others <= gates]
    if not shares:
        raise UserError(f"{lanes} lanes need {groups * (lanes + 1) + others} AGCUs; there are {gates}")
    return shares[0]


def fft_convolution(params: RduParams, spectrum: Pair) -> Convolution:
    """The circular convolution of a signal of radix ** order points, radix being the lanes of a vector, as one kernel.

    `spectrum`: of the convolution kernel, as `workloads.monarch.spectrum` gives it. Raises UserError for what does not
    fit the machine: a lane of the signal in a PMU, a complex product in a PCU.
    """
    p, order = params, spectrum.re.ndim
    _check(p, order)
    sh = _Shape.of(p, order)
    share = _share(p, sh.radix, 3, 0)
    b = _Building(Section(p, "FFT convolution"), sh)
    region = sh.radix * sh.lane_bytes
    groups = _groups(sh, spectrum)
    stores: list[str] = []
    for i, g in enumerate(groups):
        source = Source(i * region, g.lane_bytes, g.loops)
        at, stores = b.group(
            "abc"[i], g.lane_digit, g.layout, source, g.steps, (i + 1) * region, share, stores
        )
    digits = tuple((g.lane_digit, *d) for g, d in ((groups[0], groups[0].layout), (groups[-1], at)))
    return Convolution(p, order, [b.kernel()], 0, digits[0], 3 * region, digits[1], {}, 4 * region)


def unfused_convolution(params: RduParams, spectrum: Pair) -> Convolution:
    """The same operators, each a kernel of its own: transforms, and products with twiddles or spectrum.

    Signals and constants are in HBM, as bfloat16, so that results are rounded once more than in one kernel.
    Transpositions are the strides of loads and stores, and take no kernels.
    """
    p, order = params, spectrum.re.ndim
    _check(p, order)
    sh = _Shape.of(p, order)
    share = _share(p, sh.radix, 1, 2)
    region = sh.radix * sh.lane_bytes
    constants: dict[int, Words] = {}
    size = 0

    def allot(count: int) -> int:
        nonlocal size
        size += count
        return size - count

    held = allot(region)
    matrices = {}
    for inverse in (False, True):
        words = np.concatenate(_operands(sh.radix, inverse))
        matrices[inverse] = allot(len(words) * ELEMENT)
        constants[matrices[inverse]] = words
    kernels = []
    groups = _groups(sh, spectrum)
    for g in groups:
        at, source = g.layout, Source(held, g.lane_bytes, g.loops)
        for step in g.steps:
            b = _Building(Section(p, _tag(step)), sh)
            held = allot(region)
            plain = step._replace(factors=None)
            at, _ = b.group(
                "a", g.lane_digit, at, source, [plain], held, share, matrices=matrices[step.inverse]
            )
            kernels.append(b.kernel(SEEDS))
            if step.factors is not None:
                table, source_at = allot(region), held
                held = allot(region)
                constants[table] = _table(sh, step.factors, g.lane_digit, at)
                kernels.append(_product(p, sh, f"product {_tag(step)}", source_at, table, held))
            source = Source(held, sh.lane_bytes, [(sh.points, sh.line * ELEMENT)])
    last = groups[-1]
    return Convolution(
        p, order, kernels, 0, (groups[0].lane_digit, *groups[0].layout), held, (last.lane_digit, *at), constants, size
    )  # fmt: skip


def _table(sh: _Shape, factors: Pair, lane_digit: int, layout: Layout) -> Words:
    """Factors off chip, laid out as a signal, lane by lane."""
    out = np.zeros((sh.radix, sh.lane_bytes // ELEMENT), np.float32)
    for u in range(sh.radix):
        parts = [_lane(part, lane_digit, u, layout) for part in factors]
        out[u, : sh.words] = monarch.bf16(np.stack(parts, axis=-2)).reshape(-1)
    return out.view(np.uint32)


def _product(p: RduParams, sh: _Shape, name: str, source: int, table: int, target: int) -> Kernel:
    """A kernel that multiplies a signal by factors, point by point."""
    b = _Building(Section(p, name), sh)
    s = b.section
    radix, packet = sh.radix, sh.radix * ELEMENT
    vectors = sh.lane_bytes // packet
    for u in range(radix):
        out = f"out@{u}"
        s.pcu(
            out, tag=name, mode="simd", vectors=15, **{f"vector{i}_level": 1 for i in range(4)}, stages=_MULTIPLY,
            round=1, count0=2, count1=vectors // 2,
        )  # fmt: skip
        for i, (what, address) in enumerate((("z", source), ("w", table))):
            load = f"load_{what}@{u}"
            b.load(load, address + u * sh.lane_bytes, [(vectors, packet)])
            parts = [f"{what}_{part}@{u}" for part in ("re", "im")]
            for k, part in enumerate(parts):
                # The vectors of the other part fall out of range.
                away = (1 << ADDRESS_BITS - 1, -(1 << ADDRESS_BITS - 1))[k]
                buffer(
                    s, part, size=radix * radix, tiles=vectors // (2 * radix), tag=name,
                    write=[(2, away), (radix, radix)], read=[(radix, radix)], base=k << ADDRESS_BITS - 1,
                )  # fmt: skip
                s.stream(part, (out, 2 * i + k))
            s.stream(load, *parts)
        store = f"store@{u}"
        b.store(store, target + u * sh.lane_bytes, [(vectors, packet)])
        s.stream(out, store, rate=SINKING / 4)
    return b.kernel(SEEDS)
