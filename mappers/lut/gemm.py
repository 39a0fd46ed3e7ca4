"""One GEMM on the lookup arrays: how it is cut, the program of each core, and its operands in memory.

a [M, Ktot] times codes q [N, Ktot] becomes m-tiles x n-tiles x groups (`arch.lut`). The device's cores form a grid
of shares along M, N and K, as even as possible; core 0 has the largest. A core walks its share block by block, and a
block's results stay in the result buffer over the whole loop along K (output stationary). The loop goes chunk by
chunk: operands of one chunk are loaded into one half of the buffers while those of the other half are used. A is laid out
by chunk, m-tile and group, as whoever writes it knows the tiling; W by n-tile and group, for every tiling. A block takes
both halves of the result buffer, or one, so that it is stored while the next block is computed. Shares along K
leave partial sums, which are added from the first to the last.

What a load finds in the L2 cache:

- A, if A, W and the results of a wave (all cores' blocks of the same number) fit together: the kernel before has just
  written it.
- What another core loads in the same wave. Of the cores that share a line one fetches it from DRAM, so that every core
  takes its part of the loads from there.
- W in later waves, if all that fits.

What does not fit is fetched from DRAM once in every wave that needs it. Results go to L2, where what follows picks them
up wave by wave, if those of one wave fit; else to DRAM.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program, Segment
from tilewright.arch.lut import ISA, LEVELS, OP, LutParams, LutSpec
from tilewright.workloads.lut import ACTIVATIONS, Image, blank_image
from tilewright.workloads.lut_kernels import ACCUMULATORS, CodedWeights, quantise_tables, symmetric_tables

Code = NDArray[Any]

_BLANK = ISA.record("code").make()
_DRAM, _L2 = LEVELS.index("dram"), LEVELS.index("l2")
_KEPT = 64  # grids of cores whose blocks are looked at


class Tiling(NamedTuple):
    """How a GEMM is cut."""

    cores: tuple[int, int, int]
    """Shares along M, N and K."""
    tiles: tuple[int, int]
    """m-tiles and n-tiles of a block, at most."""
    groups: int
    """Groups of a chunk, at most."""
    result_halves: int
    """Halves of the result buffer that a block takes: 1 or 2."""


class Block(NamedTuple):
    """Output tiles that a core computes together."""

    m: int
    m_tiles: int
    n: int
    n_tiles: int


class Part(NamedTuple):
    """What one half of the result buffer holds: tiles of a block, from its (m, n) on."""

    half: int
    m: int
    m_tiles: int
    n: int
    n_tiles: int


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def even(total: int, parts: int) -> list[tuple[int, int]]:
    """(first, count) of so many parts of a range, as even as possible, the larger ones first.

    >>> even(7, 3)
    [(0, 3), (3, 2), (5, 2)]
    """
    size, more = divmod(total, parts)
    return [(i * size + min(i, more), size + (i < more)) for i in range(parts)]


def joined(codes: Sequence[Code]) -> Code:
    """Arrays of instructions one behind the other; concatenate would compare their 22 fields each time."""
    out = np.empty(sum(map(len, codes)), _BLANK.dtype)
    at = 0
    for code in codes:
        out[at : at + len(code)] = code
        at += len(code)
    return out


def records(op: str, how_many: int, /, **values: Any) -> Code:
    """So many instructions; a value is the same for all, or an array of one for each."""
    code = np.repeat(_BLANK, how_many)
    code["op"] = OP[op]
    for name, value in values.items():
        code[name] = value
    return code


@dataclass(frozen=True)
class Shape:
    """M x Ktot times N x Ktot of `bits`-bit weights, in tiles and lines of a device."""

    spec: LutSpec
    m: int
    n: int
    k: int
    bits: int

    @cached_property
    def p(self) -> LutParams:
        return self.spec.params()

    @cached_property
    def m_tiles(self) -> int:
        return ceil_div(self.m, self.p.rows)

    @cached_property
    def n_tiles(self) -> int:
        return ceil_div(self.n, self.p.n)

    @cached_property
    def groups(self) -> int:
        return ceil_div(self.k, self.p.k)

    @property
    def weight_lines(self) -> int:
        return self.n_tiles * self.groups * self.bits

    @property
    def activation_lines(self) -> int:
        return self.m_tiles * self.groups * self.p.row_lines

    @property
    def tile_lines(self) -> int:
        """Lines of all results, once."""
        return self.m_tiles * self.n_tiles * self.p.tile_lines

    @property
    def table_block(self) -> int:
        """Groups that must be computed together: those of int8 tables that share a scale."""
        return self.p.table_block if self.spec.lut.table == "int8" else 1


def in_l2(spec: LutSpec, lines: Any) -> Any:
    """Whether so many lines, a number or an array, fit into the L2 cache."""
    return lines * (spec.lut.n * spec.lut.k) <= 8 * spec.memory.l2_bytes


@dataclass(frozen=True)
class Gemm:
    """A GEMM that is cut; weights, activations and results begin at the given lines of memory."""

    shape: Shape
    tiling: Tiling
    weight_line: int = 0
    activation_line: int = 0
    result_line: int = 0

    @property
    def result_lines(self) -> int:
        """Lines of all results, a set of them for each share along K."""
        return self.tiling.cores[2] * self.shape.tile_lines

    @property
    def wave_lines(self) -> int:
        """Lines of the results of a wave."""
        return self.cores * self.tiling.tiles[0] * self.tiling.tiles[1] * self.shape.p.tile_lines

    @property
    def resident(self) -> bool:
        """Whether A, W and the results of a wave fit into the L2 cache together."""
        shape = self.shape
        return in_l2(shape.spec, shape.weight_lines + shape.activation_lines + self.wave_lines)

    @property
    def results_stay(self) -> bool:
        """Whether all results fit into the L2 cache beside A and W."""
        shape = self.shape
        return bool(in_l2(shape.spec, shape.weight_lines + shape.activation_lines + self.result_lines))

    @property
    def result_level(self) -> int:
        """Where results go, in LEVELS."""
        return _L2 if in_l2(self.shape.spec, self.wave_lines) else _DRAM

    @property
    def cores(self) -> int:
        """Cores that have a share."""
        a, b, c = self.tiling.cores
        return a * b * c

    @property
    def slots(self) -> int:
        """Multiply-accumulates that all of the device's cores have the time for while core 0 computes."""
        p = self.shape.p
        tiles = sum(block.m_tiles * block.n_tiles for block in self.blocks())
        return tiles * self.share_of_k()[1] * p.rows * p.n * p.k * self.shape.spec.cores

    # ---- programs -----------------------------------------------------------------------------------

    def blocks(self, core: int = 0) -> Iterator[Block]:
        """The blocks of a core in order."""
        along_m, along_n, _ = self.tiling.cores
        m0, m = even(self.shape.m_tiles, along_m)[core // along_n % along_m]
        n0, n = even(self.shape.n_tiles, along_n)[core % along_n]
        for m1, mb in even(m, ceil_div(m, self.tiling.tiles[0])):
            for n1, nb in even(n, ceil_div(n, self.tiling.tiles[1])):
                yield Block(m0 + m1, mb, n0 + n1, nb)

    def share_of_k(self, core: int = 0) -> tuple[int, int]:
        """(first group, groups) of a core."""
        block, groups = self.shape.table_block, self.shape.groups
        share = core // (self.tiling.cores[0] * self.tiling.cores[1])
        first, count = even(ceil_div(groups, block), self.tiling.cores[2])[share]
        return first * block, min(count * block, groups - first * block)

    def chunks(self) -> Iterator[tuple[int, int]]:
        """(first group, groups) of each chunk, over all shares along K."""
        for share in range(self.tiling.cores[2]):
            first, groups = self.share_of_k(share * self.tiling.cores[0] * self.tiling.cores[1])
            for start in range(0, groups, self.tiling.groups):
                yield first + start, min(self.tiling.groups, groups - start)

    def waves(self, core: int = 0) -> list[Code]:
        """The instructions of a core, an array for each block. In time, core 0 stands for all cores."""
        first, groups = self.share_of_k(core)
        size = self.tiling.groups
        whole, rest = divmod(groups, size)
        out: list[Code] = []
        loads = {"LOAD_A": 0, "LOAD_W": 0}
        first_m = next(self.blocks(core)).m
        for wave, block in enumerate(self.blocks(core)):
            parts = self._parts(block, wave)
            done = wave * (whole + (rest > 0))
            chunks = [self._chunks(block, parts, first, whole, size, done)] if whole else []
            if rest:
                chunks.append(self._chunks(block, parts, first + whole * size, 1, rest, done + whole))
            code = joined(chunks)
            code["accumulate"][np.flatnonzero(code["op"] == OP["LMMA"])[: len(parts)]] = 0
            new = not self.resident
            for name, sharers, fetched in (
                ("LOAD_A", self.tiling.cores[1], new),
                ("LOAD_W", self.tiling.cores[0], new or block.m == first_m),
            ):
                at = np.flatnonzero(code["op"] == OP[name])
                if fetched:
                    mine = (loads[name] + np.arange(len(at))) % sharers == 0
                    code["level"][at] = np.where(mine, _DRAM, _L2)
                loads[name] += len(at)
            out.append(joined([code, *self._stores(block, parts, core)]))
        return out

    def program(self, core: int = 0) -> Program:
        """All of a core as one segment. What it loads must be in memory, what it stores are its results."""
        return Program(ISA, [Segment({"code": joined(self.waves(core))})], ["gemm"])

    def _parts(self, block: Block, wave: int) -> list[Part]:
        """A block in both halves of the result buffer is split along M if it can be, else along N."""
        if self.tiling.result_halves == 1:
            return [Part(wave % 2, 0, block.m_tiles, 0, block.n_tiles)]
        if block.m_tiles > 1:
            pieces = even(block.m_tiles, 2)
            return [Part(half, m, size, 0, block.n_tiles) for half, (m, size) in enumerate(pieces)]
        pieces = even(block.n_tiles, min(2, block.n_tiles))
        return [Part(half, 0, block.m_tiles, n, size) for half, (n, size) in enumerate(pieces)]

    def _chunks(
        self, block: Block, parts: list[Part], first: int, count: int, groups: int, done: int
    ) -> Code:
        """`count` chunks of `groups` groups each from group `first` on; `done` chunks have gone before."""
        shape = self.shape
        row_lines, bits = shape.p.row_lines, shape.bits
        j = np.arange(block.n_tiles)
        one = joined(
            [
                records(
                    "LOAD_A", 1, count=block.m_tiles * groups, level=_L2,
                    line=self.activation_line + (first * shape.m_tiles + block.m * groups) * row_lines,
                ),
                records(
                    "LOAD_W", len(j), base=j * groups * bits, count=groups * bits, level=_L2,
                    line=self.weight_line + ((block.n + j) * shape.groups + first) * bits,
                ),
                *(
                    records(
                        "LMMA", 1, table_base=part.m * groups, weight_base=part.n * groups * bits, result=part.half,
                        m_tiles=part.m_tiles, n_tiles=part.n_tiles, groups=groups, bits=bits, accumulate=1,
                    )
                    for part in parts
                ),
            ]
        )  # fmt: skip
        loads = len(one) - len(parts)
        code = np.tile(one, (count, 1))
        index = np.arange(count)[:, None]
        code["line"][:, :1] += index * groups * shape.m_tiles * row_lines
        code["line"][:, 1:loads] += index * groups * bits
        half = (done + index) % 2
        code["half"][:, :loads] = half
        code["table"][:, loads:] = code["weight"][:, loads:] = half
        return code.reshape(-1)

    def _stores(self, block: Block, parts: list[Part], core: int) -> list[Code]:
        shape, lines = self.shape, self.shape.p.tile_lines
        share = core // (self.tiling.cores[0] * self.tiling.cores[1])
        first = self.result_line + share * shape.tile_lines
        out = []
        for part in parts:
            i = np.arange(part.m_tiles)
            tile = (block.m + part.m + i) * shape.n_tiles + block.n + part.n
            out.append(
                records(
                    "STORE", len(i), half=part.half, base=i * part.n_tiles, count=part.n_tiles,
                    level=self.result_level, line=first + tile * lines,
                )
            )  # fmt: skip
        return out

    # ---- values -------------------------------------------------------------------------------------

    def place(self, a: NDArray[Any], weights: CodedWeights, image: Image | None = None) -> Image:
        """An image (a blank one, or the given one changed) with activations [M, Ktot] and coded weights.

        With int8 tables what is placed are tables, since ordinary units build them. Raises UserError for
        arrays of another shape or type.
        """
        shape, p = self.shape, self.shape.p
        dtype = np.dtype(ACTIVATIONS[shape.spec.lut.activation])
        if a.shape != (shape.m, shape.k) or a.dtype != dtype:
            raise UserError(
                f"activations must be {dtype} of shape {(shape.m, shape.k)}, not {a.dtype} of {a.shape}"
            )
        want = (shape.bits, shape.n, shape.groups)
        if weights.words.shape != want or weights.group != p.k:
            raise UserError(
                f"weights must be words of {p.k} elements of shape {want}, not of {weights.group} of "
                f"{weights.words.shape}"
            )
        image = blank_image(p) if image is None else image
        words = np.zeros((shape.bits, shape.n_tiles * p.n, shape.groups), np.uint8)
        words[:, : shape.n] = weights.words
        # [bits, tiles, n, groups] to a line for each (tile, group, plane).
        lines = words.reshape(shape.bits, shape.n_tiles, p.n, shape.groups).transpose(1, 3, 0, 2)
        places = (lines[..., None] >> np.arange(p.k, dtype=np.uint8)) & 1
        self._write(
            image, self.weight_line, np.packbits(places.reshape(-1, p.n * p.k), axis=1, bitorder="little")
        )
        full = np.zeros((shape.m_tiles * p.rows, shape.groups * p.k), dtype)
        full[: shape.m, : shape.k] = a
        rows = self._rows(full)
        padded = np.zeros((shape.m_tiles, shape.groups, p.row_lines * p.line_bits // 8), np.uint8)
        padded[..., : rows.shape[-1]] = rows
        for start, size in self.chunks():
            chunk = padded[:, start : start + size].reshape(-1, p.line_bits // 8)
            self._write(image, self.activation_line + start * shape.m_tiles * p.row_lines, chunk)
        return image

    def _rows(self, full: NDArray[Any]) -> NDArray[np.uint8]:
        """The bytes [m-tiles, groups, bytes] that a row of tables is loaded from."""
        shape, p = self.shape, self.shape.p

        def rows(x: NDArray[Any]) -> NDArray[np.uint8]:
            tiles = x.reshape(shape.m_tiles, p.rows, shape.groups, -1).transpose(0, 2, 1, 3)
            return np.ascontiguousarray(tiles).view(np.uint8).reshape(shape.m_tiles, shape.groups, -1)

        if shape.spec.lut.table == "exact":
            return rows(full)
        entries, scales = quantise_tables(symmetric_tables(full, p.k), p.table_block)
        of_table = np.repeat(scales, p.table_block, axis=1)[:, : shape.groups]
        return np.concatenate([rows(entries), rows(of_table.astype("<f4"))], axis=-1)

    def _write(self, image: Image, line: int, data: NDArray[np.uint8]) -> None:
        if line + len(data) > len(image["memory"]):
            raise UserError(
                f"{self.shape.spec.name}: operands reach line {line + len(data)}, memory.dram_bytes hold "
                f"{len(image['memory'])}"
            )
        image["memory"][line : line + len(data)] = data

    def collect(self, image: Image) -> NDArray[Any]:
        """The result [M, N] in the accumulators' format, partial sums added from the first to the last."""
        shape, p = self.shape, self.shape.p
        dtype = ACCUMULATORS[shape.spec.lut.accumulator]
        lines = image["memory"][self.result_line : self.result_line + self.result_lines]
        parts = self.tiling.cores[2]
        tiles = np.ascontiguousarray(lines).reshape(parts * shape.m_tiles * shape.n_tiles, -1)
        size = p.rows * p.n * dtype.itemsize
        values = np.ascontiguousarray(tiles[:, :size]).view(dtype.newbyteorder("<")).astype(dtype)
        grid = values.reshape(parts, shape.m_tiles, shape.n_tiles, p.rows, p.n).transpose(0, 1, 3, 2, 4)
        sums = grid.reshape(parts, shape.m_tiles * p.rows, shape.n_tiles * p.n)[:, : shape.m, : shape.n]
        total = sums[0]
        with np.errstate(all="ignore"):
            for part in sums[1:]:
                total = total + part
        return total


# ---- choosing -----------------------------------------------------------------------------------------


def plan(
    spec: LutSpec, m: int, n: int, k: int, bits: int | None = None, tiling: Tiling | None = None
) -> Gemm:
    """The GEMM cut as `choose` does, or as given; weights, activations and results one behind the other.

    Raises UserError for sizes and bits out of range, a tiling that does not fit the buffers, and operands that
    do not fit memory.
    """
    bits = spec.lut.weight_bits if bits is None else bits
    if min(m, n, k) < 1:
        raise UserError(f"m, n and k of a GEMM must be at least 1, not {m}, {n} and {k}")
    if not 1 <= bits <= spec.lut.max_weight_bits:
        raise UserError(f"weights must have 1..{spec.lut.max_weight_bits} bits, not {bits}")
    shape = Shape(spec, m, n, k, bits)
    if tiling is None:
        tiling = choose(shape)
    else:
        check_tiling(shape, tiling)
    a = shape.weight_lines
    gemm = Gemm(shape, tiling, 0, a, a + shape.activation_lines)
    need = gemm.result_line + gemm.result_lines
    if need > spec.line_count:
        raise UserError(
            f"a GEMM of {m} x {n} x {k} needs {need} lines of memory, memory.dram_bytes hold {spec.line_count}"
        )
    return gemm


def gemm_program(spec: LutSpec, m: int, n: int, k: int, bits: int | None = None) -> Program:
    """The program of a core with the largest share of a GEMM, which stands for all. Raises as `plan`."""
    return plan(spec, m, n, k, bits).program()


def check_tiling(shape: Shape, tiling: Tiling, where: str = "tiling") -> None:
    """Raises UserError for a tiling that does not fit the device, its buffers or the GEMM."""
    b, (mb, nb), halves = shape.spec.buffers, tiling.tiles, tiling.result_halves
    limits = (shape.m_tiles, shape.n_tiles, ceil_div(shape.groups, shape.table_block))
    for axis, parts, most in zip("MNK", tiling.cores, limits, strict=True):
        if not 1 <= parts <= most:
            raise UserError(f"{where}: cores along {axis} must be in 1..{most}, not {parts}")
    a, c, d = tiling.cores
    if a * c * d > shape.spec.cores:
        raise UserError(
            f"{where}: {a * c * d} cores are more than the {shape.spec.cores} of {shape.spec.name}"
        )
    if min(mb, nb, tiling.groups) < 1 or halves not in (1, 2):
        raise UserError(f"{where}: tiles and groups must be at least 1, result_halves 1 or 2")
    if tiling.groups % shape.table_block and tiling.groups < shape.groups:
        raise UserError(
            f"{where}: groups must be a multiple of lut.table_block {shape.table_block}, not {tiling.groups}"
        )
    results = max(p.m_tiles * p.n_tiles for p in Gemm(shape, tiling)._parts(Block(0, mb, 0, nb), 0))
    for what, need, have in (
        ("table_rows", mb * tiling.groups, b.table_rows),
        ("weight_lines", nb * tiling.groups * shape.bits, b.weight_lines),
        ("result_tiles", results, b.result_tiles),
    ):
        if need > have:
            raise UserError(f"{where}: needs {need} of buffers.{what}, which has {have}")


def choose(shape: Shape) -> Tiling:
    """The tiling that takes the fewest ticks by `_ticks`, and among such, the one that moves the fewest lines.

    Grids of cores are ranked by the largest share; the best of them are combined with every block that fits
    the buffers. Raises UserError where no block fits.
    """
    spec, b, unit = shape.spec, shape.spec.buffers, shape.table_block
    grids = []
    for along_m in _counts(shape.m_tiles, spec.cores):
        for along_n in _counts(shape.n_tiles, spec.cores // along_m):
            most = min(spec.cores // (along_m * along_n), ceil_div(shape.groups, unit))
            for along_k in {1, most, *(most >> i for i in (1, 2, 3) if most >> i)}:
                share = ceil_div(ceil_div(shape.groups, unit), along_k) * unit
                work = ceil_div(shape.m_tiles, along_m) * ceil_div(shape.n_tiles, along_n) * share
                grids.append((work, along_m, along_n, along_k))
    grids.sort()
    blocks = []
    for halves in (1, 2):
        room = halves * b.result_tiles
        for mb in range(1, min(shape.m_tiles, room) + 1):
            for nb in range(1, min(shape.n_tiles, room // mb) + 1):
                uneven = (ceil_div(mb, 2) * nb if mb > 1 else ceil_div(nb, 2)) > b.result_tiles
                groups = min(b.table_rows // mb, b.weight_lines // (nb * shape.bits)) // unit * unit
                if groups and not (halves == 2 and uneven):
                    blocks.append((mb, nb, groups, halves))
    if not blocks:
        raise UserError(
            f"{spec.name}: {unit} groups of int8 tables that share a scale do not fit buffers.table_rows "
            f"{b.table_rows} and buffers.weight_lines {b.weight_lines}"
        )
    g = np.array(grids[:_KEPT], np.float64).T[1:, :, None]
    t = np.array(blocks, np.float64).T[:, None, :]
    ticks, lines = _ticks(shape, g, t)
    # Estimates are no better than this: within it, fewer lines are worth more.
    near = np.where(ticks <= 1.005 * ticks.min(), lines, np.inf)
    i, j = np.unravel_index(int(np.argmin(near)), near.shape)
    along_m, along_n, along_k = grids[i][1:]
    mb, nb, groups, halves = blocks[j]
    share = ceil_div(ceil_div(shape.groups, unit), along_k) * unit
    share_m, share_n = ceil_div(shape.m_tiles, along_m), ceil_div(shape.n_tiles, along_n)
    # Blocks and chunks that are as even as possible.
    mb = ceil_div(share_m, ceil_div(share_m, mb))
    nb = ceil_div(share_n, ceil_div(share_n, nb))
    groups = ceil_div(ceil_div(share, ceil_div(share, groups)), unit) * unit
    return Tiling((along_m, along_n, along_k), (mb, nb), groups, halves)


def _counts(tiles: int, cores: int) -> list[int]:
    """Numbers of cores that tiles can be shared between, without those that shorten no core's share."""
    return sorted({ceil_div(tiles, ceil_div(tiles, c)) for c in range(1, min(tiles, cores) + 1)})


def _ticks(shape: Shape, grid: NDArray[Any], block: NDArray[Any]) -> tuple[NDArray[Any], NDArray[Any]]:
    """Estimates for grids [3, i, 1] (cores along M, N, K) and blocks [4, 1, j] (m-tiles, n-tiles, groups, halves).

    The ticks of the GEMM and the lines that a core moves. Two chunks are under way, one being loaded and one
    computed: a chunk takes as long as the slower of the two, or half of a load with its latency and the
    computation that it waits for. Sizes are means over the share, not rounded to tiles.
    """
    spec, p = shape.spec, shape.p
    dram, l2 = (p.rate_q / p.rate_p).tolist()
    latency = p.latency.astype(np.float64)
    along_m, along_n, along_k = grid
    share_m, share_n = np.ceil(shape.m_tiles / along_m), np.ceil(shape.n_tiles / along_n)
    share_k = np.ceil(shape.groups / along_k)
    blocks_m, blocks_n = np.ceil(share_m / block[0]), np.ceil(share_n / block[1])
    mb, nb, chunks = share_m / blocks_m, share_n / blocks_n, np.ceil(share_k / block[2])
    groups, waves = share_k / chunks, blocks_m * blocks_n
    compute = mb * nb * groups * shape.bits
    passing = along_m * along_n * along_k * mb * nb * p.tile_lines
    resident = in_l2(spec, shape.weight_lines + shape.activation_lines + passing)
    # Parts of the loads that come from DRAM, over all waves.
    from_dram_a = np.where(resident, 0, 1 / along_n)
    from_dram_w = 1 / along_m / np.where(resident, blocks_m, 1)
    a, w = mb * groups * p.row_lines, nb * groups * shape.bits
    load = a * (from_dram_a * dram + (1 - from_dram_a) * l2) + w * (
        from_dram_w * dram + (1 - from_dram_w) * l2
    )
    wait = latency[1] + (latency[0] - latency[1]) * (from_dram_w > 0.5) + p.load_drain
    chunk = np.maximum(np.maximum(compute, load), (compute + load + wait + p.compute_drain) / 2)
    store = mb * nb * p.tile_lines * np.where(in_l2(spec, passing), l2, dram)
    body = chunks * chunk
    wave = np.where(block[3] == 1, np.maximum(body, store), body + np.maximum(0, store - compute))
    sums = along_k * shape.m * shape.n * 4 / spec.cores * float(p.bytes_q[1] / p.bytes_p[1])
    ticks = waves * wave + load + wait + store + latency[1] + sums
    return ticks, waves * (chunks * (a + w) + mb * nb * p.tile_lines) * np.ones_like(ticks)
