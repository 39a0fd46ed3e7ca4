"""The meaning of a LUT program: `interpret` executes it over a memory image and knows no time.

An image is a dict of arrays; a half is the first axis of each buffer. With K = 2**(k-1) entries and the other
names of `arch.lut.LutParams`:

| name      | dtype, shape                               | holds                                              |
| --------- | ------------------------------------------ | -------------------------------------------------- |
| "memory"  | uint8 [lines, line_bits / 8]               | lines as `arch.lut` lays them out, bit 0 first     |
| "tables"  | int32 [2, table_rows, rows, K]             | exact entries of integer activations; or           |
|           | uint16 of that shape                       | FP16 bits; or                                      |
|           | int8 of that shape                         | quantised entries, with                            |
| "scales"  | uint32 [2, table_rows, rows]               | their scales, FP32 bits; no others have them       |
| "weights" | uint8 [2, weight_lines, line_bits / 8]     | coded weight lines                                 |
| "results" | uint32 [2, result_tiles, rows, n]          | bits in the accumulators' format, zero-extended    |

Instructions mean what they say one after the other; what is computed is `lut_kernels`.
"""

from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np
from numpy.typing import NDArray

from tilewright.arch.isa import Program
from tilewright.arch.lut import OPS, LutParams, LutSpec, check
from tilewright.workloads.lut_kernels import (
    ACCUMULATORS,
    CodedWeights,
    lookup,
    lookup_quantised,
    symmetric_tables,
)

Image = dict[str, NDArray[Any]]
Fields = Mapping[str, int]

ACTIVATIONS: dict[str, Any] = {
    "int8": np.int8,
    "int16": np.int16,
    "fp8": ml_dtypes.float8_e4m3fn,
    "fp16": np.float16,
}


def blank_image(params: LutParams) -> Image:
    """An image of zeros; see the module's table for its arrays."""
    return {name: np.zeros(shape, dtype) for name, (shape, dtype) in _arrays(params).items()}


def interpret(
    spec: LutSpec,
    program: Program,
    image: Mapping[str, NDArray[Any]],
    decisions: Mapping[str, Any] | None = None,
) -> tuple[Image, dict[str, Any]]:
    """The image that `program` leaves, and the decisions that its timing depends on: none on this machine.

    `image` is not changed; `decisions` are handed through. An ORDINARY instruction leaves the image as it is:
    what the GPU's ordinary units compute is not part of it. Raises ValueError naming the segment and the
    instruction that reaches beyond memory or a buffer, and for arrays that do not fit the spec.
    """
    machine = Machine(spec, {name: np.array(array) for name, array in image.items()})
    machine.run(program)
    return machine.image, dict(decisions or {})


# ---- what lies in memory ------------------------------------------------------------------------------


def weight_lines(p: LutParams, weights: CodedWeights) -> NDArray[np.uint8]:
    """Coded weights of N channels as memory lines, uint8 [n_tiles * groups * bits, line_bits / 8].

    In order of (n-tile, group, plane). Channels beyond N have the word 0.
    """
    bits, channels, groups = weights.words.shape
    tiles = -(-channels // p.n)
    words = np.zeros((bits, tiles * p.n, groups), np.uint8)
    words[:, :channels] = weights.words
    ordered = words.reshape(bits, tiles, p.n, groups).transpose(1, 3, 0, 2)
    places = ordered[..., None] >> np.arange(p.k, dtype=np.uint8) & 1
    return np.packbits(places.reshape(-1, p.line_bits), axis=1, bitorder="little")


def activation_lines(p: LutParams, a: NDArray[Any]) -> NDArray[np.uint8]:
    """Activations [M, channels] as memory lines, uint8 [m_tiles * groups * row_lines, line_bits / 8].

    In order of (m-tile, group). Rows beyond M, and channels beyond the last, are zero.
    """
    tiles, groups = -(-a.shape[0] // p.rows), -(-a.shape[1] // p.k)
    padded = np.zeros((tiles * p.rows, groups * p.k), a.dtype)
    padded[: a.shape[0], : a.shape[1]] = a
    ordered = padded.reshape(tiles, p.rows, groups, p.k).transpose(0, 2, 1, 3)
    return _lines(p, _bytes(ordered.reshape(tiles * groups, -1)), p.row_lines)


def table_lines(p: LutParams, entries: NDArray[np.int8], scales: NDArray[np.float32]) -> NDArray[np.uint8]:
    """Quantised tables [M, groups, entries] and scales [M, blocks] as memory lines, as `activation_lines`.

    Every row has the scales of its block.
    """
    rows, groups = entries.shape[:2]
    tiles = -(-rows // p.rows)
    of_row = np.repeat(scales, p.table_block, axis=1)[:, :groups, None]
    parts = []
    for values in (entries, of_row.astype(np.float32)):
        padded = np.zeros((tiles * p.rows, *values.shape[1:]), values.dtype)
        padded[:rows] = values
        ordered = padded.reshape(tiles, p.rows, groups, -1).transpose(0, 2, 1, 3)
        parts.append(_bytes(ordered.reshape(tiles * groups, -1)))
    return _lines(p, np.concatenate(parts, axis=1), p.row_lines)


def read_results(
    p: LutParams, lines: NDArray[np.uint8], m_tiles: int, n_tiles: int, accumulator: str
) -> NDArray[Any]:
    """Numbers [m_tiles * rows, n_tiles * n] from the memory lines of tiles (i, j), j running faster."""
    dtype = ACCUMULATORS[accumulator].newbyteorder("<")
    size = p.rows * p.n * dtype.itemsize
    data = np.ascontiguousarray(lines.reshape(m_tiles * n_tiles, -1)[:, :size]).view(dtype)
    tiles = data.reshape(m_tiles, n_tiles, p.rows, p.n).transpose(0, 2, 1, 3)
    return np.ascontiguousarray(tiles.reshape(m_tiles * p.rows, n_tiles * p.n), ACCUMULATORS[accumulator])


def _bytes(values: NDArray[Any]) -> NDArray[np.uint8]:
    """Numbers [rows, elements] as bytes, the least significant first."""
    little = np.ascontiguousarray(values, values.dtype.newbyteorder("<"))
    return little.view(np.uint8).reshape(len(values), -1)


def _lines(p: LutParams, data: NDArray[np.uint8], each: int) -> NDArray[np.uint8]:
    """Bytes [pieces, size] as whole lines, so many for each piece."""
    out = np.zeros((len(data), each * p.line_bits // 8), np.uint8)
    out[:, : data.shape[1]] = data
    return out.reshape(-1, p.line_bits // 8)


# ---- the machine --------------------------------------------------------------------------------------


class Machine:
    """The state of a core, and a method for each of its instructions, named like it.

    It works on the arrays of the image that it is given: `interpret` hands it a copy.
    """

    def __init__(self, spec: LutSpec, image: Mapping[str, NDArray[Any]]) -> None:
        """Raises ValueError if the arrays of the image do not fit the spec."""
        self.params = p = spec.params()
        self.quantised = spec.lut.table == "int8"
        self.activation = np.dtype(ACTIVATIONS[spec.lut.activation])
        self.accumulator = spec.lut.accumulator
        self.image = dict(image)
        for name, (shape, dtype) in _arrays(p).items():
            got = (image[name].shape, image[name].dtype) if name in image else "nothing"
            if got != (shape, dtype):
                raise ValueError(f"image: {name} must be {np.dtype(dtype)} of shape {shape}, not {got}")
        self.memory, self.weights = self.image["memory"], self.image["weights"]
        self.tables, self.results = self.image["tables"], self.image["results"]

    def run(self, program: Program) -> None:
        """All of a program; raises as `interpret` does, with the segments before the faulty one executed."""
        for s, segment in enumerate(program.segments):
            code = segment.regions["code"]
            check(self.params, code, f"segment {s}, ")
            for _ in range(segment.repeat):
                for record in code:
                    fields = dict(zip(record.dtype.names, record.tolist(), strict=True))
                    method: Callable[[Fields], None] = getattr(self, OPS[fields["op"]].name)
                    method(fields)

    def LOAD_A(self, f: Fields) -> None:
        """Rows of activations become rows of tables; int8 tables are in memory as they are."""
        p, count = self.params, f["count"]
        lines = self.memory[f["line"] : f["line"] + count * p.row_lines].reshape(count, -1)
        where = f["half"], slice(f["base"], f["base"] + count)
        if self.quantised:
            split = p.rows * p.entries
            self.tables[where] = lines[:, :split].view(np.int8).reshape(count, p.rows, p.entries)
            scales = np.ascontiguousarray(lines[:, split : split + 4 * p.rows]).view("<u4")
            self.image["scales"][where] = scales
            return
        size = p.rows * p.k * self.activation.itemsize
        a = np.ascontiguousarray(lines[:, :size]).view(self.activation.newbyteorder("<"))
        # [count, rows, k] to [rows, count * k], in which a row's groups follow one another, and back.
        a = a.astype(self.activation).reshape(count, p.rows, p.k).transpose(1, 0, 2).reshape(p.rows, -1)
        built = symmetric_tables(a, p.k).transpose(1, 0, 2)
        self.tables[where] = built.view(self.tables.dtype) if built.dtype.kind == "f" else built

    def LOAD_W(self, f: Fields) -> None:
        """Lines of coded weights as they are."""
        count = f["count"]
        self.weights[f["half"], f["base"] : f["base"] + count] = self.memory[f["line"] : f["line"] + count]

    def LMMA(self, f: Fields) -> None:
        """result (i, j) = (result (i, j) or 0) + activations of m-tile i . weights q' of n-tile j."""
        p, m, n, groups = self.params, f["m_tiles"], f["n_tiles"], f["groups"]
        weights = CodedWeights(self._words(f), p.k, groups * p.k)
        first = f["result_base"]
        tiles = self.results[f["result"], first : first + m * n].reshape(m, n, p.rows, p.n)
        for i in range(m):
            rows = f["table"], slice(f["table_base"] + i * groups, f["table_base"] + (i + 1) * groups)
            psum = self._values(tiles[i].transpose(1, 0, 2)) if f["accumulate"] else None
            total = self._multiply(rows, weights, psum)
            tiles[i] = self._bits(total).reshape(p.rows, n, p.n).transpose(1, 0, 2)

    def _words(self, f: Fields) -> NDArray[np.uint8]:
        """Coded words [bits, n_tiles * n, groups] of an LMMA."""
        p, n, groups, bits = self.params, f["n_tiles"], f["groups"], f["bits"]
        first = f["weight_base"]
        lines = self.weights[f["weight"], first : first + n * groups * bits]
        places = np.unpackbits(lines, axis=1, bitorder="little").reshape(n, groups, bits, p.n, p.k)
        words = (places << np.arange(p.k, dtype=np.uint8)).sum(axis=-1, dtype=np.uint8)
        return np.ascontiguousarray(words.transpose(2, 0, 3, 1).reshape(bits, n * p.n, groups))

    def _multiply(
        self, where: tuple[int, slice], weights: CodedWeights, psum: NDArray[Any] | None
    ) -> NDArray[Any]:
        tables = self.tables[where].transpose(1, 0, 2)
        if not self.quantised:
            exact = tables.view(np.float16) if tables.dtype == np.uint16 else tables
            return lookup(exact, weights, psum, self.accumulator)
        block, groups = self.params.table_block, tables.shape[1]
        last = [
            min(i + block, groups) - 1 for i in range(0, groups, block)
        ]  # a block's last row has its scale
        scales = self.image["scales"][where][last].view(np.float32).T
        # In memory there may be -128, whose negative is no int8.
        return lookup_quantised(tables.astype(np.int16), scales, weights, psum, block)  # type: ignore[arg-type]

    def _values(self, bits: NDArray[Any]) -> NDArray[Any]:
        """Accumulators [rows, n_tiles * n] as numbers, from their bits [rows, n_tiles, n]."""
        dtype = ACCUMULATORS[self.accumulator]
        return bits.reshape(len(bits), -1).astype(f"u{dtype.itemsize}").view(dtype)

    def _bits(self, values: NDArray[Any]) -> NDArray[np.uint32]:
        return np.ascontiguousarray(values).view(f"u{values.dtype.itemsize}").astype(np.uint32)

    def STORE(self, f: Fields) -> None:
        """Result tiles to memory; the bits behind a tile's last accumulator are written as zero."""
        p, count = self.params, f["count"]
        tiles = self.results[f["half"], f["base"] : f["base"] + count].reshape(count, -1)
        lines = _lines(p, _bytes(tiles.astype(f"u{p.acc_bits // 8}")), p.tile_lines)
        self.memory[f["line"] : f["line"] + len(lines)] = lines

    def ORDINARY(self, f: Fields) -> None:
        """Nothing: see `interpret`."""


def _arrays(p: LutParams) -> dict[str, tuple[tuple[int, ...], Any]]:
    line = p.line_bits // 8
    tables = 2, p.table_rows, p.rows
    entry: Any = {8: np.int8, 16: np.uint16}.get(p.entry_bits, np.int32)
    out: dict[str, tuple[tuple[int, ...], Any]] = {
        "memory": ((p.lines, line), np.uint8),
        "tables": ((*tables, p.entries), entry),
        "weights": ((2, p.weight_lines, line), np.uint8),
        "results": ((2, p.result_tiles, p.rows, p.n), np.uint32),
    }
    if entry is np.int8:
        out["scales"] = tables, np.uint32
    return out
