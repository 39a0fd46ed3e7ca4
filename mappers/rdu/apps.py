"""The regression applications by which Plasticine's own simulator is logged, as sections of one kernel each.

github.com/stanford-ppl/pir, regression/ at d4ea004b: loop nests over tiles, whose loops are unrolled by
parallelisation factors. A tile is double-buffered in a PMU, so that what fills it and what uses it work at
the same time; loops that carry a sum over tiles wait for a token. The network is ours, with hops, where the
logs have an ideal point-to-point one. Integers of 32 bits, as there. What an application gives to its host is
a word of memory here.

All streams are routed as if they moved a packet a tick, so that none shares a link: of two that do, one may
wait for the other for ever, where a unit takes both. Loops are given as (iterations, stride) pairs, innermost
first; a stride is in words in PMUs, in bytes off chip.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import ceil, prod
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program
from tilewright.arch.rdu import ADDRESS_BITS, ISA, LEVELS, RduParams
from tilewright.mappers.rdu.section import Built, Section, segment

__all__ = [
    "LOGGED", "App", "buffer", "dot_product", "gate", "gemm", "mem_reduce", "outer_product", "simple_dot_product",
    "sram_split",
]  # fmt: skip

BUFFERS = 4
"""Of a tile that is written and read in less than SHORT ticks: two hide the work of either side from the other, more also
hide the way of the tokens. As many as a PMU of Plasticine has (github.com/stanford-ppl/spade @ 5b35e8b CUParams.scala);
longer tiles have two, in banks of their own."""
SHORT = 64

Ints = NDArray[np.int32]
Loops = Sequence[tuple[int, int]]
Stage = dict[str, int | str]


@dataclass(frozen=True)
class App:
    """A section, what it works on, and what must come out.

    `inputs`: int32 arrays by byte address in DDR. `result` is what lies at byte address `output` of DDR when the
    kernel has ended. `ideal`: ticks of the loops alone, each with ceil(iterations / parallel) turns.
    """

    section: Section
    arguments: Mapping[int, int]
    inputs: Mapping[int, Ints]
    output: int
    result: Ints
    ideal: int

    def program(self, built: Built) -> Program:
        """The program that loads and runs the section once."""
        return Program(ISA, [segment(built, args=dict(self.arguments))], [*built.tags])

    def memory(self, size: int) -> NDArray[np.uint8]:
        """The first `size` bytes of DDR before the run."""
        image = np.zeros(size, np.uint8)
        for address, values in self.inputs.items():
            raw = np.frombuffer(values.tobytes(), np.uint8)
            image[address : address + len(raw)] = raw
        return image

    @property
    def bytes(self) -> int:
        """Bytes of DDR that the run touches."""
        ends = [a + v.nbytes for a, v in self.inputs.items()]
        return max([*ends, self.output + self.result.nbytes])


# ---- parts of sections --------------------------------------------------------------------------------


def _chain(loops: Loops, prefix: str = "") -> dict[str, int]:
    if len(loops) > LEVELS:
        raise UserError(f"{len(loops)} nested loops; a counter chain has {LEVELS}")
    out = {f"{prefix}count{n}": count for n, (count, _) in enumerate(loops)}
    return out | {f"{prefix}stride{n}": stride for n, (_, stride) in enumerate(loops)}


def _counts(*counts: int) -> dict[str, int]:
    return {f"count{n}": count for n, count in enumerate(counts)}


def alone(p: RduParams) -> int:
    """The lane stride by which all lanes but the first are out of any PMU's range, and dropped."""
    return (1 << ADDRESS_BITS) // p.lanes


def _power(n: int) -> int:
    return 1 << (n - 1).bit_length()


def _banks(p: RduParams, between: int) -> dict[str, int]:
    """Bank bits: the lanes of a vector, and, where there are banks for it, address bit `between` topmost.

    Two accesses whose vectors differ in that bit never meet.
    """
    bits, lanes = p.banks.bit_length() - 1, p.lanes.bit_length() - 1
    positions = list(range(bits))
    if bits > lanes and between >= bits:
        positions[-1] = between
    return {f"bank_bit{i}": position for i, position in enumerate(positions)}


def buffer(
    s: Section,
    name: str,
    *,
    size: int,
    tiles: int,
    write: Loops,
    read: Loops,
    tag: str = "",
    write_lane: int = 1,
    read_lane: int = 1,
    base: int = 0,
    diagonal: int = 0,
) -> None:
    """A PMU that holds tiles of at most `size` words: while one is written, one before is read.

    `write` and `read` are the loops of a tile; `write_lane`, `read_lane` are words from lane to lane, `base`
    is where writing begins; what is out of range is dropped. With `diagonal`, the words of a row, a column is
    read at the rate of a row. There are two buffers, or up to BUFFERS, as many as divide the tiles; of a
    single tile there is one. Raises UserError where they do not fit.
    """
    p = s.params
    capacity = p.banks * p.bank_words
    size = _power(size)
    fit = [n for n in range(1, tiles + 1) if tiles % n == 0 and n * size <= capacity]
    short = max(prod(n for n, _ in write), prod(n for n, _ in read)) < SHORT
    few = [n for n in fit if n <= (BUFFERS if short else 2)]
    buffers = few[-1] if few and few[-1] > 1 else fit[1] if len(fit) > 1 else 1
    if size > capacity or (tiles > 1 and buffers == 1):
        raise UserError(f"{name}: buffers of {size} words for {tiles} tiles; a PMU holds {capacity} words")
    over = [(buffers, size), (tiles // buffers, 0)] if tiles > 1 else []
    lanes = p.lanes.bit_length() - 1
    s.pmu(
        name,
        tag=tag,
        enable=3,
        words=buffers * size,
        **_banks(p, size.bit_length() - 1),
        **({"skew_bits": lanes, "skew_shift": diagonal.bit_length() - 1} if diagonal else {}),
        **_chain([*write, *over], "write_"),
        **_chain([*read, *over], "read_"),
        write_base=base,
        write_lane_stride=write_lane,
        read_lane_stride=read_lane,
    )
    s.double_buffer(name, write_level=len(write), read_level=len(read), buffers=buffers)


def accumulator(s: Section, name: str, *, size: int, passes: int, tag: str = "") -> None:
    """A PMU whose words go out and come back, `passes` times; each pass waits for the end of the one before."""
    p = s.params
    loops = [(ceil(size / p.lanes), p.lanes), (passes, 0)]
    s.pmu(
        name,
        tag=tag,
        enable=3,
        words=_power(size),
        **_banks(p, p.lanes.bit_length() - 1),  # neighbouring vectors lie in different banks
        **_chain(loops, "write_"),
        **_chain(loops, "read_"),
        read_hold0=1,
        write_signal=1,
        write_signal_level=1,
        read_wait=1,
        read_wait_level=1,
    )
    s.token(f"{name}.write", 0, f"{name}.read", 0)


def gate(
    s: Section,
    name: str,
    direction: str,
    loops: Loops,
    *,
    argument: int,
    words: int,
    tag: str = "",
    **more: Any,
) -> None:
    """An AGCU that moves `words` words an iteration, from byte address args[`argument`] on."""
    s.agcu(
        name,
        tag=tag or direction,
        direction=direction,
        **({"tier": "ddr"} | more),
        argument=argument,
        words=words,
        **_chain(loops),
    )


def int_stage(
    operation: str, to: int, a: str | int, b: str | int = 0, constant: int = 0, c: int = 0
) -> Stage:
    """A stage on int32 words. Operands: a register's number, "c2" for a counter, "constant" or "lane"."""
    out: Stage = {
        "operation": operation,
        "type": "int32",
        "to": to,
        "c": c,
        "constant": constant & 0xFFFFFFFF,
    }
    for name, operand in (("a", a), ("b", b)):
        if isinstance(operand, int):
            out[name] = operand
        elif operand[0] == "c" and operand[1:].isdigit():
            out |= {f"{name}_from": "counter", name: int(operand[1:])}
        else:
            out[f"{name}_from"] = operand
    return out


def _sum_of(inputs: Sequence[int], to: int) -> list[Stage]:
    """Stages that add registers."""
    if len(inputs) == 1:
        return [int_stage("pass", to, inputs[0])]
    first = int_stage("add", to, inputs[0], inputs[1])
    return [first, *(int_stage("add", to, to, r) for r in inputs[2:])]


def _divides(what: str, part: int, whole: int) -> None:
    if whole % part:
        raise UserError(f"{what} {part} must divide {whole}")


def _one_or_all(p: RduParams, what: str, words: int) -> None:
    if words not in (1, p.lanes):
        raise UserError(f"{what} must be 1 or {p.lanes}, not {words}")


def _sum(values: NDArray[Any]) -> Ints:
    return np.asarray(values, np.int64).astype(np.uint32).sum(dtype=np.uint32).reshape(1).view(np.int32)


def _data(rng: np.random.Generator, *shape: int) -> Ints:
    return rng.integers(-(1 << 15), 1 << 15, shape).astype(np.int32)


# ---- dot products -------------------------------------------------------------------------------------


def _reduction(s: Section, turns: int, outer: int, argument: int) -> None:
    """Sums of products over a tile, and over the tiles of all copies; units dot0.. take one or two vectors."""
    s.pcu(
        "sum",
        tag="outer reduce",
        mode="simd",
        scalars=(1 << outer) - 1,
        stages=_sum_of([4 + u for u in range(outer)], 0),
        fold="add",
        fold_type="int32",
        fold_level=1,
        send_vector=1,
        **_counts(turns),
    )
    for u in range(outer):
        s.stream(f"dot{u}", ("sum", u), network="scalar")
    gate(s, "result", "store", [(1, 4)], argument=argument, words=1)
    s.stream("sum", ("result", 0))


def simple_dot_product(params: RduParams, *, n: int = 1024, tile: int = 32, outer: int = 1) -> App:
    """Sum of i * i for i < n, the i's made in place: `outer` tiles at once, an element of each a tick."""
    _divides("outer * tile", outer * tile, n)
    p, turns = params, n // (outer * tile)
    s = Section(p, "SimpleDotProduct")
    for u in range(outer):
        s.pcu(
            f"fill{u}",
            tag="fill",
            mode="simd",
            stages=[
                int_stage("multiply", 0, "c1", "constant", tile * outer),
                int_stage("add", 0, 0, "c0"),
                int_stage("add", 0, 0, "constant", u * tile),
            ],
            send_vector=1,
            **_counts(tile, turns),
        )
        buffer(
            s, f"tile{u}", size=tile, tiles=turns, tag="tile", write=[(tile, 1)], read=[(tile, 1)],
            write_lane=alone(p), read_lane=alone(p),
        )  # fmt: skip
        s.stream(f"fill{u}", (f"tile{u}", 0))
        s.pcu(
            f"dot{u}",
            tag="inner reduce",
            mode="simd",
            vectors=1,
            stages=[int_stage("multiply", 0, 0, 0)],
            fold="add",
            fold_type="int32",
            fold_level=1,
            send_scalar=1,
            **_counts(tile, turns),
        )
        s.stream(f"tile{u}", (f"dot{u}", 0))
    _reduction(s, turns, outer, 0)
    i = np.arange(n, dtype=np.int64)
    return App(s, {0: 0}, {}, 0, _sum(i * i), tile * turns)


def dot_product(params: RduParams, *, n: int = 1024, tile: int = 32, inner: int = 1, outer: int = 1) -> App:
    """Dot product of two vectors in DDR, `outer` tiles at once, `inner` elements of each a tick."""
    _divides("outer * tile", outer * tile, n)
    _divides("inner", inner, tile)
    p, turns = params, n // (outer * tile)
    s = Section(p, "DotProduct")
    one = alone(p)
    lanes = {"write_lane": one, "read_lane": one} if inner == 1 else {}
    slot = 1 if inner == 1 else p.lanes
    loops = [(tile // inner, slot)]
    arguments = {0: 8 * n}
    for u in range(outer):
        s.pcu(
            f"dot{u}",
            tag="inner reduce",
            mode="simd",
            vectors=3,
            stages=[int_stage("multiply", 0, 0, 1)],
            fold="add",
            fold_type="int32",
            fold_level=1,
            tree="none" if inner == 1 else "add",
            send_scalar=1,
            **_counts(tile // inner, turns),
        )
        for k, name in enumerate("ab"):
            argument = 1 + 2 * u + k
            arguments[argument] = 4 * (k * n + u * tile)
            gate(
                s, f"load_{name}{u}", "load", [(tile // inner, 4 * inner), (turns, 4 * tile * outer)],
                argument=argument, words=inner,
            )  # fmt: skip
            buffer(
                s,
                f"{name}{u}",
                size=tile // inner * slot,
                tiles=turns,
                tag=name,
                write=loops,
                read=loops,
                **lanes,
            )
            s.stream(f"load_{name}{u}", (f"{name}{u}", 0))
            s.stream(f"{name}{u}", (f"dot{u}", k))
    _reduction(s, turns, outer, 0)
    rng = np.random.default_rng(0)
    a, b = _data(rng, n), _data(rng, n)
    return App(
        s, arguments, {0: a, 4 * n: b}, 8 * n, _sum(a.astype(np.int64) * b), tile // inner * turns
    )  # fmt: skip


# ---- outer product ------------------------------------------------------------------------------------


def outer_product(
    params: RduParams,
    *,
    n: int = 256,
    rows: int = 64,
    columns: int = 32,
    words: int = 16,
    outer_rows: int = 1,
    outer_columns: int = 1,
) -> App:
    """The n x n outer product of two vectors in DDR, by tiles of rows x columns; `words` words a tick off chip."""
    p = params
    _divides("outer_rows * rows", outer_rows * rows, n)
    _divides("outer_columns * columns", outer_columns * columns, n)
    _one_or_all(p, "words", words)
    _divides("lanes", p.lanes, columns)
    s = Section(p, "OuterProduct")
    turns_i, turns_j = n // (rows * outer_rows), n // (columns * outer_columns)
    turns = turns_i * turns_j
    vectors = columns // p.lanes
    lane = {"write_lane": alone(p)} if words == 1 else {}
    arguments: dict[int, int] = {}

    def argument(address: int) -> int:
        arguments[len(arguments)] = address
        return len(arguments) - 1

    for u in range(outer_rows):
        gate(
            s, f"load_rows{u}", "load", [(rows // words, 4 * words), (turns_i, 4 * rows * outer_rows)],
            argument=argument(4 * u * rows), words=words,
        )  # fmt: skip
        buffer(
            s, f"rows{u}", size=rows, tiles=turns_i, tag="rows", write=[(rows // words, words)],
            read=[(rows, 1), (turns_j, 0)], read_lane=alone(p), **lane,
        )  # fmt: skip
        # A PMU gives vectors only; a word for all lanes comes by the scalar network.
        s.pcu(f"word{u}", tag="rows", mode="simd", vectors=1, send_scalar=1, count0=rows * turns)
        s.stream(f"load_rows{u}", (f"rows{u}", 0))
        s.stream(f"rows{u}", (f"word{u}", 0))
        for v in range(outer_columns):
            name = f"{u}_{v}"
            gate(
                s, f"load_columns{name}", "load",
                [(columns // words, 4 * words), (turns_j, 4 * columns * outer_columns), (turns_i, 0)],
                argument=argument(4 * (n + v * columns)), words=words,
            )  # fmt: skip
            buffer(
                s, f"columns{name}", size=columns, tiles=turns, tag="columns", write=[(columns // words, words)],
                read=[(vectors, p.lanes), (rows, 0)], **lane,
            )  # fmt: skip
            s.stream(f"load_columns{name}", (f"columns{name}", 0))
            s.pcu(
                f"product{name}",
                tag="product",
                mode="simd",
                vectors=1,
                scalars=1,
                scalar0_level=1,
                stages=[int_stage("multiply", 0, 0, 4)],
                send_vector=1,
                **_counts(vectors, rows * turns),
            )
            s.stream(f"columns{name}", (f"product{name}", 0))
            buffer(
                s, f"tile{name}", size=rows * columns, tiles=turns, tag="tile",
                write=[(rows * vectors, p.lanes)], read=[(rows * columns // words, words)],
                **({"read_lane": alone(p)} if words == 1 else {}),
            )  # fmt: skip
            s.stream(f"product{name}", (f"tile{name}", 0))
            gate(
                s, f"store{name}", "store",
                [
                    (columns // words, 4 * words), (rows, 4 * n), (turns_j, 4 * columns * outer_columns),
                    (turns_i, 4 * n * rows * outer_rows),
                ],
                argument=argument(4 * (2 * n + u * rows * n + v * columns)), words=words,
            )  # fmt: skip
            s.stream(f"tile{name}", (f"store{name}", 0))
        s.stream(f"word{u}", *((f"product{u}_{v}", 0) for v in range(outer_columns)), network="scalar")
    rng = np.random.default_rng(0)
    a, b = _data(rng, n), _data(rng, n)
    product = (a[:, None].astype(np.int64) * b).astype(np.int32)
    return App(s, arguments, {0: a, 4 * n: b}, 8 * n, product, turns * rows * columns // words)


# ---- sums of tiles ------------------------------------------------------------------------------------


def _add_tiles(s: Section, name: str, parts: int, slots: int, passes: int, steps: int, tag: str = "") -> None:
    """A PCU that adds `parts` tiles at vector inputs 1.., and to the sum so far at input 0 but in the first pass."""
    carry = passes > 1
    stages = _sum_of(range(1, 1 + parts), 1)
    if carry:
        stages += [
            int_stage("add", 2, 0, 1) if parts < 2 else int_stage("add", 0, 0, 1),
            int_stage("less", 8, "c1", "constant", 1),
            int_stage("select", 1, 1, 2 if parts < 2 else 0, c=8),
        ]
    s.pcu(
        name,
        tag=tag or "add",
        mode="simd",
        vectors=((1 << parts) - 1) << 1 | carry,
        stages=stages,
        result=1,
        send_vector=1,
        **_counts(slots, passes, steps),
    )


def mem_reduce(params: RduParams, *, size: int = 1024, n: int = 100, outer: int = 1) -> App:
    """The sum of n tiles, tile i all of i: made a word a tick, added a vector a tick, `outer` tiles at once."""
    p = params
    _divides("lanes", p.lanes, size)
    if not 1 <= outer < p.vector_inputs:
        raise UserError(f"outer must be in 1..{p.vector_inputs - 1}, not {outer}")
    s = Section(p, "MemReduceTest")
    passes, slots = ceil(n / outer), size // p.lanes
    _add_tiles(s, "add", outer, slots, passes, 1)
    for u in range(outer):
        stages = [
            int_stage("multiply", 0, "c1", "constant", outer),
            int_stage("add", 0, 0, "constant", u),
        ]
        if n % outer:  # beyond the last tile: nothing
            stages += [
                int_stage("less", 1, 0, "constant", n),
                int_stage("select", 0, 0, "constant", 0, c=1),
            ]
        s.pcu(
            f"fill{u}", tag="fill", mode="simd", stages=stages, send_vector=1, **_counts(size, passes)
        )  # fmt: skip
        buffer(
            s, f"tile{u}", size=size, tiles=passes, tag="tile", write=[(size, 1)], read=[(slots, p.lanes)],
            write_lane=alone(p),
        )  # fmt: skip
        s.stream(f"fill{u}", (f"tile{u}", 0))
        s.stream(f"tile{u}", ("add", 1 + u))
    accumulator(s, "sum", size=size, passes=passes, tag="add")
    # The sums so far go to both; what is stored is the last.
    buffer(
        s,
        "total",
        size=size,
        tiles=1,
        tag="add",
        write=[(slots, p.lanes), (passes, 0)],
        read=[(slots, p.lanes)],
    )
    s.stream("sum", ("add", 0))
    s.stream("add", ("sum", 0), ("total", 0))
    gate(s, "store", "store", [(slots, 4 * p.lanes)], argument=0, words=p.lanes)
    s.stream("total", ("store", 0))
    return App(s, {0: 0}, {}, 0, np.full(size, n * (n - 1) // 2, np.int32), size * passes)


def sram_split(
    params: RduParams, *, n: int = 262144, tile: int = 64, write: int = 1, read: int = 1, outer: int = 1
) -> App:
    """The sum of n words that are first all written, `write` a tick, then read, `read` a tick; `outer` tiles at once.

    The words of a copy span PMUs: each takes all its addresses, and drops those that others hold.
    """
    p = params
    _divides("tile", tile, n)
    _one_or_all(p, "write", write)
    _one_or_all(p, "read", read)
    s = Section(p, "SRAMSplit")
    capacity = p.banks * p.bank_words
    per_copy = [len(range(u, n // tile, outer)) for u in range(outer)]
    if per_copy[0] * tile > alone(p):
        raise UserError(f"n {n} is more than {outer * alone(p)} words of {outer} copies can be addressed")
    s.pcu(
        "sum",
        tag="read",
        mode="simd",
        scalars=(1 << outer) - 1,
        stages=_sum_of([4 + u for u in range(outer)], 0),
        send_vector=1,
    )
    for u, tiles in enumerate(per_copy):
        stages = [
            int_stage("multiply", 0, "c1", "constant", tile * outer),
            int_stage("multiply", 1, "c0", "constant", write),
            int_stage("add", 0, 0, 1),
            int_stage("add", 0, 0, "constant", u * tile),
        ]
        if write > 1:
            stages.append(int_stage("add", 0, 0, "lane"))
        s.pcu(
            f"fill{u}",
            tag="write",
            mode="simd",
            stages=stages,
            send_vector=1,
            **_counts(tile // write, tiles),
        )
        s.pcu(
            f"tile{u}",
            tag="read",
            mode="simd",
            vectors=1,
            fold="add",
            fold_type="int32",
            fold_level=1,
            tree="none" if read == 1 else "add",
            send_scalar=1,
            count0=tile // read,
            count1=tiles,
        )
        s.pcu(
            f"copy{u}",
            tag="read",
            mode="simd",
            scalars=1,
            stages=[int_stage("pass", 0, 4)],
            fold="add",
            fold_type="int32",
            fold_level=1,
            send_scalar=1,
            **_counts(tiles),
        )
        parts = ceil(tiles * tile / capacity)
        for k in range(parts):
            name = f"words{u}_{k}"
            s.pmu(
                name,
                tag="words",
                enable=3,
                low=k * capacity,
                words=min(capacity, tiles * tile - k * capacity),
                **_chain([(tiles * tile // write, write)], "write_"),
                **_chain([(tiles * tile // read, read)], "read_"),
                **({"write_lane_stride": alone(p)} if write == 1 else {}),
                **({"read_lane_stride": alone(p)} if read == 1 else {}),
                write_signal=1,
                write_signal_level=LEVELS,
                read_wait=1,
                read_wait_level=LEVELS,
            )
            s.token(f"{name}.write", 0, f"{name}.read", 0)
            s.stream(name, (f"tile{u}", 0), rate=1 / parts)
        s.stream(f"fill{u}", *((f"words{u}_{k}", 0) for k in range(parts)))
        s.stream(f"tile{u}", (f"copy{u}", 0), network="scalar")
        s.stream(f"copy{u}", ("sum", u), network="scalar")
    gate(s, "result", "store", [(1, 4)], argument=0, words=1)
    s.stream("sum", ("result", 0))
    turns = per_copy[0]
    return App(s, {0: 0}, {}, 0, _sum(np.arange(n)), turns * (tile // write + tile // read))


# ---- matrix product -----------------------------------------------------------------------------------


def gemm(
    params: RduParams,
    *,
    dim: int = 128,
    tile: int = 64,
    inner: int = 16,
    ii: int = 1,
    jj: int = 1,
    kk: int = 1,
    i: int = 1,
    j: int = 1,
) -> App:
    """C = A B, dim x dim, by tiles; `inner` products a tick for each of ii * jj * kk * i * j copies.

    Loops ii, jj and kk go over tiles, i and j over the rows and columns of one. A copy has rows and columns of C of
    its own; those of parallel kk give parts of one C, which are added. Where i does not divide the rows of a tile,
    copies overlap by a row, which both compute.
    """
    p, count = params, dim // tile
    _divides("tile", tile, dim)
    ii, jj, kk = (min(u, count) for u in (ii, jj, kk))
    for what, u in (("ii", ii), ("jj", jj), ("kk", kk)):
        if count % u:
            raise UserError(f"{what} {u} must divide {count} tiles")
    _divides("inner", inner, tile)
    _divides("j", j, tile)
    _divides("inner", inner, tile // j)
    if inner > p.lanes:
        raise UserError(f"inner must be at most {p.lanes}, not {inner}")
    if kk >= p.vector_inputs:
        raise UserError(f"kk must be at most {p.vector_inputs - 1}, not {kk}")
    s = Section(p, "GEMM")
    rows, columns = ceil(tile / i), tile // j
    depth, across = tile // inner, columns // inner  # vectors of a dot product, and of a row of C
    turns_i, turns_j, passes = count // ii, count // jj, count // kk
    steps = turns_i * turns_j
    tiles = steps * passes
    slots = rows * across
    pitch = _power(across * p.lanes)
    first_row = [min(u * rows, tile - rows) for u in range(i)]
    arguments: dict[int, int] = {}

    def argument(word: int) -> int:
        arguments[len(arguments)] = 4 * word
        return len(arguments) - 1

    at_a, at_b, at_c = 0, dim * dim, 2 * dim * dim
    row, line = 4 * dim, 4 * inner
    rows_of = [(ui, u) for ui in range(ii) for u in range(i)]
    columns_of = [(uj, u) for uj in range(jj) for u in range(j)]
    copies = [f"{ui}_{u}_{vj}_{v}" for ui, u in rows_of for vj, v in columns_of]
    for name in copies:
        for q in range(kk):
            s.pcu(
                f"dot{name}_{q}",
                tag="dot",
                mode="simd",
                vectors=3,
                stages=[int_stage("multiply", 0, 0, 1)],
                fold="add",
                fold_type="int32",
                fold_level=1,
                tree="add",
                send_vector=1,
                **_counts(depth, rows * columns * tiles),
            )
    for q in range(kk):
        for ui, u in rows_of:
            name = f"a{ui}_{u}_{q}"
            gate(
                s, f"load_{name}", "load",
                [(depth, line), (rows, row), (passes, 4 * tile * kk), (turns_j, 0), (turns_i, row * tile * ii)],
                argument=argument(at_a + (ui * tile + first_row[u]) * dim + q * tile), words=inner,
            )  # fmt: skip
            buffer(
                s, name, size=depth * p.lanes, tiles=rows * tiles, tag="a", write=[(depth, p.lanes)],
                read=[(depth, p.lanes), (columns, 0)],
            )  # fmt: skip
            s.stream(f"load_{name}", (name, 0))
            s.stream(name, *((f"dot{ui}_{u}_{vj}_{v}_{q}", 0) for vj, v in columns_of))
        for vj, v in columns_of:
            name = f"b{vj}_{v}_{q}"
            gate(
                s, f"load_{name}", "load",
                [(across, line), (tile, row), (passes, row * tile * kk), (turns_j, 4 * tile * jj), (turns_i, 0)],
                argument=argument(at_b + q * tile * dim + vj * tile + v * columns), words=inner,
            )  # fmt: skip
            # Written by rows, read by columns; the lanes beyond `inner` meet zeros of A.
            buffer(
                s, name, size=tile * pitch, tiles=tiles, tag="b", write=[(across, p.lanes), (tile, pitch)],
                read=[(depth, inner * pitch), (inner, 1), (across, p.lanes), (rows, 0)], read_lane=pitch,
                diagonal=pitch,
            )  # fmt: skip
            s.stream(f"load_{name}", (name, 0))
            s.stream(name, *((f"dot{ui}_{u}_{vj}_{v}_{q}", 1) for ui, u in rows_of))
    for ui, u in rows_of:
        for vj, v in columns_of:
            name = f"{ui}_{u}_{vj}_{v}"
            _add_tiles(s, f"add{name}", kk, slots, passes, steps)
            for q in range(kk):
                buffer(
                    s, f"part{name}_{q}", size=slots * p.lanes, tiles=tiles, tag="part",
                    write=[(inner, 1), (slots, p.lanes)], read=[(slots, p.lanes)], write_lane=alone(p),
                )  # fmt: skip
                s.stream(f"dot{name}_{q}", (f"part{name}_{q}", 0))
                s.stream(f"part{name}_{q}", (f"add{name}", 1 + q))
            sinks = [(f"c{name}", 0)]
            if passes > 1:
                accumulator(s, f"sum{name}", size=slots * p.lanes, passes=passes * steps, tag="add")
                s.stream(f"sum{name}", (f"add{name}", 0))
                sinks.append((f"sum{name}", 0))
            buffer(
                s, f"c{name}", size=slots * p.lanes, tiles=steps, tag="c",
                write=[(slots, p.lanes), (passes, 0)], read=[(slots, p.lanes)],
            )  # fmt: skip
            s.stream(f"add{name}", *sinks)
            gate(
                s, f"store{name}", "store",
                [(across, line), (rows, row), (turns_j, 4 * tile * jj), (turns_i, row * tile * ii)],
                argument=argument(at_c + (ui * tile + first_row[u]) * dim + vj * tile + v * columns), words=inner,
            )  # fmt: skip
            s.stream(f"c{name}", (f"store{name}", 0))
    rng = np.random.default_rng(0)
    a, b = _data(rng, dim, dim), _data(rng, dim, dim)
    c = (a.astype(np.int64) @ b.astype(np.int64)).astype(np.int32)
    return App(
        s, arguments, {0: a, 4 * at_b: b}, 4 * at_c, c, prod((depth, columns, rows, tiles))
    )  # fmt: skip


# The rows of the log of 2020-05-05, by key of `arch.published`.
LOGGED: Mapping[str, tuple[Callable[..., App], Mapping[str, int]]] = {
    "dot_simple_0": (simple_dot_product, {}),
    "dot_simple_1": (simple_dot_product, {"outer": 2}),
    "dot_1": (dot_product, {}),
    "dot_2": (dot_product, {"outer": 2}),
    "outer_0": (outer_product, {}),
    "outer_1": (outer_product, {"words": 1}),
    "outer_2": (outer_product, {"words": 1, "outer_columns": 2}),
    "outer_4": (outer_product, {"words": 1, "outer_columns": 2, "outer_rows": 2}),
    "mem_reduce_0": (mem_reduce, {}),
    "mem_reduce_1": (mem_reduce, {"outer": 2}),
    "mem_reduce_2": (mem_reduce, {"outer": 3}),
    "sram_split_0": (sram_split, {}),
    "sram_split_1": (sram_split, {"write": 16}),
    "sram_split_3": (sram_split, {"n": 524288, "write": 16, "outer": 3}),
    "gemm_0": (gemm, {}),
    "gemm_2": (gemm, {"j": 2}),
    "gemm_3": (gemm, {"kk": 2}),
    "gemm_4": (gemm, {"i": 2}),
    "gemm_8": (gemm, {"dim": 32, "tile": 16, "inner": 8, "j": 2}),
    "gemm_9": (gemm, {"dim": 64, "tile": 32, "j": 2}),
    "gemm_17": (gemm, {"dim": 64, "tile": 32, "kk": 2, "i": 2, "j": 2}),
    "gemm_18": (gemm, {"dim": 64, "tile": 32, "ii": 2, "jj": 2, "kk": 2}),
    "gemm_19": (gemm, {"i": 3}),
    "gemm_22": (gemm, {"ii": 3, "kk": 3}),
}
