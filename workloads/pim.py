"""The meaning of a PIM-GPT program: `interpret` executes it over a memory image and knows no time.

An image is a dict of arrays:

| name     | dtype, shape                                 | holds                                       |
| -------- | -------------------------------------------- | ------------------------------------------- |
| "dram"   | uint16 [channels, banks, rows*columns*lanes] | bfloat16 bits; the column of linear address |
|          |                                              | row*columns + col begins at address*lanes   |
| "sram"   | uint16 [sram_columns*lanes]                  | bfloat16 bits                               |
| "gb"     | uint16 [channels, gb_columns*lanes]          | bfloat16 bits, the global buffers           |
| "acc"    | uint32 [channels, banks]                     | bits in the accumulators' format            |
| "argmax" | int64 [2]                                    | bfloat16 bits of the best value, its index  |

Rounding is to nearest even, subnormals are kept, every NaN that leaves an operation is the canonical one.
An instruction reads all its operands before it writes anything.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.arch.formats import BF16, FloatFormat, float_format
from tilewright.arch.isa import Program
from tilewright.arch.pim import OPS, PimParams, PimSpec
from tilewright.workloads import asic
from tilewright.workloads.formats import add, convert, from_bits, multiply, to_bits

Image = dict[str, NDArray[Any]]
Fields = Mapping[str, int]

_CHUNK = 1 << 22  # products held at once
_NEGATIVE_INFINITY = BF16.sign | BF16.overflow


def blank_image(params: PimParams) -> Image:
    """An image of zeros; see the module's table for its arrays."""
    return {name: np.zeros(shape, dtype) for name, (shape, dtype) in _arrays(params).items()}


def interpret(
    spec: PimSpec,
    program: Program,
    image: Mapping[str, NDArray[Any]],
    decisions: Mapping[str, Any] | None = None,
) -> tuple[Image, dict[str, Any]]:
    """The image that `program` leaves, and the decisions that its timing depends on: none on this machine.

    `image` is not changed; `decisions` are handed through. Raises ValueError naming the segment and the
    instruction for an access beyond DRAM row, SRAM or global buffer, a mask without channels or with channels
    that the machine lacks, a bank, lane or count (cols, outs, n: at least 1) out of range, an odd ROPE, and
    for two channels of one instruction that write the same SRAM column.
    """
    machine = Machine(spec, {name: np.array(array) for name, array in image.items()})
    machine.run(program)
    return machine.image, dict(decisions or {})


def column_sums(bank: NDArray[Any], buffer: NDArray[Any], fmt: FloatFormat) -> NDArray[Any]:
    """What each column adds to an accumulator: bank and buffer [..., lanes] in bfloat16 bits -> `fmt` bits.

    Products are rounded to `fmt`, then summed as a balanced tree of adjacent pairs, (p0 + p1) + (p2 + p3),
    each sum rounded.
    """
    p = multiply(bank, buffer, BF16, fmt)
    while p.shape[-1] > 1:
        p = add(p[..., 0::2], p[..., 1::2], fmt)
    return p[..., 0]


class Machine:
    """The state of a PIM-GPT system, and a method for each of its instructions, named like it.

    It works on the arrays of the image that it is given: `interpret` hands it a copy.
    """

    def __init__(self, spec: PimSpec, image: Mapping[str, NDArray[Any]]) -> None:
        """Raises ValueError if the arrays of the image do not fit the spec."""
        self.asic = spec.asic
        self.params = p = spec.params()
        self.format = float_format(spec.pim.accumulator)
        self.image = dict(image)
        for name, (shape, dtype) in _arrays(p).items():
            got = (image[name].shape, image[name].dtype) if name in image else "nothing"
            if got != (shape, dtype):
                raise ValueError(f"image: {name} must be {np.dtype(dtype)} of shape {shape}, not {got}")
        # Views by column.
        self.dram = self.image["dram"].reshape(p.channels, p.n_banks, -1, p.lanes)
        self.sram = self.image["sram"].reshape(-1, p.lanes)
        self.gb = self.image["gb"].reshape(p.channels, -1, p.lanes)
        self.acc = self.image["acc"]

    def run(self, program: Program) -> None:
        """All of a program; raises as `interpret` does, with the instructions before the faulty one
        executed."""
        for s, segment in enumerate(program.segments):
            code = segment.regions.get("code")
            for _ in range(segment.repeat):
                for i, record in enumerate(code if code is not None else ()):
                    op = OPS[int(record["op"])].name
                    try:
                        self.execute(op, dict(zip(record.dtype.names, record.tolist(), strict=True)))
                    except ValueError as error:
                        raise ValueError(f"segment {s}, instruction {i} ({op}): {error}") from None

    def execute(self, op: str, fields: Fields) -> None:
        """One instruction. Raises ValueError for an operand out of range."""
        method: Callable[[Fields], None] = getattr(self, op)
        method(fields)

    # ---- checked addresses ----------------------------------------------------------------------------

    def _channels(self, f: Fields) -> NDArray[np.int64]:
        mask, n = f["channels"], self.params.channels
        if not 0 < mask < 1 << n:
            raise ValueError(f"channels {mask:#x} must name some of the {n} channels")
        return np.array([c for c in range(n) if mask >> c & 1])

    def _below(self, name: str, value: int, limit: int) -> int:
        if not 0 <= value < limit:
            raise ValueError(f"{name} must be in 0..{limit - 1}, not {value}")
        return value

    def _count(self, name: str, f: Fields) -> int:
        if f[name] < 1:
            raise ValueError(f"{name} must be at least 1, not {f[name]}")
        return f[name]

    def _address(self, f: Fields, columns: int) -> int:
        """The linear address of the first of `columns` columns."""
        p = self.params
        self._below("col", f["col"], p.columns)
        first = f["row"] * p.columns + f["col"]
        if first + columns > p.rows * p.columns:
            last = (first + columns - 1) // p.columns
            raise ValueError(f"row {f['row']} + {columns} columns reach row {last} of {p.rows}")
        return first

    def _sram(self, name: str, addresses: NDArray[np.int64]) -> NDArray[np.int64]:
        if addresses.max() >= self.params.sram_columns:
            raise ValueError(f"{name} reaches SRAM column {addresses.max()} of {self.params.sram_columns}")
        return addresses

    def _by_channel(
        self, f: Fields, name: str, channels: NDArray[np.int64], offsets: NDArray[np.int64]
    ) -> Any:
        """SRAM columns [channel, *offsets.shape]: the field plus c * stride plus the offset."""
        base = f[name] + channels * f["stride"]
        return self._sram(name, base.reshape(-1, *(1,) * offsets.ndim) + offsets)

    def _targets(self, f: Fields, channels: NDArray[np.int64], offsets: NDArray[np.int64]) -> Any:
        """SRAM columns that channels write. No two channels may share one: they run side by side."""
        out = self._by_channel(f, "dst", channels, offsets)
        own = len(np.unique(offsets))
        if len(np.unique(out)) != own * len(channels):
            raise ValueError(f"dst {f['dst']}, stride {f['stride']}: two channels write the same SRAM column")
        return out

    def _buffer(self, f: Fields, cols: int) -> slice:
        if f["gb"] + cols > self.params.gb_columns:
            raise ValueError(f"gb {f['gb']} + {cols} columns exceed the buffer of {self.params.gb_columns}")
        return slice(f["gb"], f["gb"] + cols)

    # ---- channels -------------------------------------------------------------------------------------

    def WR_GB(self, f: Fields) -> None:
        """`cols` SRAM columns from src to the global buffer from gb on, in every channel of the mask."""
        channels, cols = self._channels(f), self._count("cols", f)
        where = self._buffer(f, cols)
        self.gb[channels, where] = self.sram[self._by_channel(f, "src", channels, np.arange(cols))]

    def MAC_AB(self, f: Fields) -> None:
        """For each of `cols` columns, in every bank: acc = acc + column_sums(bank column, buffer column).

        One rounded addition a column, the accumulator on the left.
        """
        channels, cols = self._channels(f), self._count("cols", f)
        self.acc[channels] = self._mac(
            channels, self._address(f, cols), f, cols, self.acc[channels][:, :, None]
        )[..., 0]

    def _mac(
        self, channels: NDArray[np.int64], address: int, f: Fields, cols: int, acc: NDArray[Any]
    ) -> NDArray[Any]:
        """Accumulators [channel, bank, out] after each out's `cols` columns, which follow one another."""
        bank = self.dram[channels, :, address : address + acc.shape[-1] * cols]
        bank = bank.reshape(*acc.shape, cols, self.params.lanes)
        buffer = self.gb[channels, self._buffer(f, cols)][:, None, None]
        sums = column_sums(bank, buffer, self.format)
        for j in range(cols):
            acc = add(acc, sums[..., j], self.format)
        return acc

    def RD_MAC(self, f: Fields) -> None:
        """Accumulators, rounded to bfloat16, to SRAM; then they are +0.

        SRAM column dst + k (k < banks / lanes) gets in lane l the accumulator of bank k * lanes + l.
        """
        channels = self._channels(f)
        where = self._targets(f, channels, np.arange(self.params.bursts))
        self._read(where, self.acc[channels])
        self.acc[channels] = 0

    def _read(self, where: NDArray[np.int64], acc: NDArray[Any]) -> None:
        self.sram[where] = convert(acc, self.format, BF16).reshape(*where.shape, self.params.lanes)

    def GEMV(self, f: Fields) -> None:
        """`outs` times: MAC_AB over the next `cols` columns of the banks and the same buffer columns; RD_MAC
        to dst + o * pitch. The first out carries on from the accumulators as they stand."""
        channels, cols, outs = self._channels(f), self._count("cols", f), self._count("outs", f)
        address, bursts = self._address(f, cols * outs), np.arange(self.params.bursts)
        self._buffer(f, cols)
        where = self._targets(f, channels, np.arange(outs)[:, None] * f["pitch"] + bursts)
        step = max(1, _CHUNK // (len(channels) * self.params.n_banks * cols * self.params.lanes))
        for o in range(0, outs, step):
            acc = np.zeros((len(channels), self.params.n_banks, min(step, outs - o)), np.uint32)
            if o == 0:
                acc[..., 0] = self.acc[channels]
            acc = self._mac(channels, address + o * cols, f, cols, acc)
            for k in range(acc.shape[-1]):
                self._read(where[:, o + k], acc[..., k])
        self.acc[channels] = 0

    def RD_BK(self, f: Fields) -> None:
        """`cols` columns of one bank to consecutive SRAM columns from dst on."""
        channels, cols = self._channels(f), self._count("cols", f)
        bank, first = self._below("bank", f["bank"], self.params.n_banks), self._address(f, cols)
        where = self._targets(f, channels, np.arange(cols))
        self.sram[where] = self.dram[channels, bank, first : first + cols]

    def WR_BK(self, f: Fields) -> None:
        """`cols` consecutive SRAM columns from src on to one bank."""
        channels, cols = self._channels(f), self._count("cols", f)
        bank, first = self._below("bank", f["bank"], self.params.n_banks), self._address(f, cols)
        where = self._by_channel(f, "src", channels, np.arange(cols))
        self.dram[channels, bank, first : first + cols] = self.sram[where]

    def WR_EL(self, f: Fields) -> None:
        """For k < outs, at the linear column plus k * pitch: element `lane` of bank b's column becomes
        element
        b mod lanes of SRAM column src + k * (banks / lanes) + b // lanes."""
        p, channels, outs = self.params, self._channels(f), self._count("outs", f)
        lane = self._below("lane", f["lane"], p.lanes)
        first = self._address(f, (outs - 1) * f["pitch"] + 1)
        data = self.sram[self._by_channel(f, "src", channels, np.arange(outs * p.bursts))]
        data = data.reshape(len(channels), outs, p.n_banks)
        for k in range(outs):
            self.dram[channels, :, first + k * f["pitch"], lane] = data[:, k]

    # ---- ASIC: operands bfloat16, computed in binary32 (see asic.py), rounded once to bfloat16 ----------

    def _load(self, f: Fields, name: str, n: int, outs: int = 1, pitch: int = 0) -> asic.F32:
        """`outs` vectors [outs, n]; elements are contiguous from the SRAM column that the field names."""
        return from_bits(self.image["sram"][self._elements(f, name, n, outs, pitch)], BF16)

    def _store(self, f: Fields, values: asic.F32, pitch: int = 0) -> None:
        """Elements behind the n-th of the last column keep what they held."""
        outs, n = values.shape
        bits = to_bits(values, BF16)
        for i, where in enumerate(self._elements(f, "dst", n, outs, pitch)):
            self.image["sram"][where] = bits[i]

    def _elements(self, f: Fields, name: str, n: int, outs: int, pitch: int) -> NDArray[np.int64]:
        lanes = self.params.lanes
        columns = f[name] + np.arange(outs)[:, None] * pitch
        self._sram(name, columns + (n - 1) // lanes)
        return columns * lanes + np.arange(n)

    def _unary(self, f: Fields, function: Callable[[asic.F32], asic.F32]) -> None:
        n = self._count("n", f)
        with np.errstate(all="ignore"):
            self._store(f, function(self._load(f, "src", n)))

    def ADD(self, f: Fields) -> None:
        """dst = src + src2"""
        self._unary(f, lambda x: x + self._load(f, "src2", f["n"]))

    def MUL(self, f: Fields) -> None:
        """dst = src * src2"""
        self._unary(f, lambda x: x * self._load(f, "src2", f["n"]))

    def LAYERNORM(self, f: Fields) -> None:
        """asic.layernorm; gain src2, bias src3, epsilon the float32 whose bits are imm"""
        n = f["n"]
        self._unary(
            f,
            lambda x: asic.layernorm(
                x, self._load(f, "src2", n), self._load(f, "src3", n), _float(f["imm"]), self.asic
            ),
        )

    def RMSNORM(self, f: Fields) -> None:
        """asic.rmsnorm; gain src2, epsilon the float32 whose bits are imm"""
        self._unary(f, lambda x: asic.rmsnorm(x, self._load(f, "src2", f["n"]), _float(f["imm"]), self.asic))

    def GELU(self, f: Fields) -> None:
        """asic.gelu"""
        self._unary(f, lambda x: asic.gelu(x, self.asic))

    def SILU(self, f: Fields) -> None:
        """asic.silu"""
        self._unary(f, lambda x: asic.silu(x, self.asic))

    def RELU(self, f: Fields) -> None:
        """asic.relu"""
        self._unary(f, asic.relu)

    def SOFTMAX(self, f: Fields) -> None:
        """asic.softmax of `outs` vectors of n elements: vector i at src + i * pitch to dst + i * pitch. The
        scale is the float32 whose bits are imm."""
        n, outs, pitch = self._count("n", f), self._count("outs", f), f["pitch"]
        with np.errstate(all="ignore"):
            self._store(
                f, asic.softmax(self._load(f, "src", n, outs, pitch), _float(f["imm"]), self.asic), pitch
            )

    def ROPE(self, f: Fields) -> None:
        """asic.rope of `outs` vectors of n elements (even), pitch columns apart in src and dst; src2 holds
        n/2
        cosines and src3 n/2 sines, the same for every vector."""
        n, outs, pitch = self._count("n", f), self._count("outs", f), f["pitch"]
        if n % 2:
            raise ValueError(f"n must be even, not {n}")
        cosine, sine = self._load(f, "src2", n // 2), self._load(f, "src3", n // 2)
        with np.errstate(all="ignore"):
            self._store(f, asic.rope(self._load(f, "src", n, outs, pitch), cosine, sine), pitch)

    def ARGMAX(self, f: Fields) -> None:
        """With `clear` the best so far becomes -infinity at index imm. Then each of the n elements of src, in
        order, takes its place if it is greater: the first of equals stays, NaN never wins. The index of
        element j is imm + j."""
        n = self._count("n", f)
        bits = self.image["sram"][self._elements(f, "src", n, 1, 0)[0]]
        state = self.image["argmax"]
        if f["clear"]:
            state[:] = _NEGATIVE_INFINITY, f["imm"]
        values = from_bits(bits, BF16)
        # NaN as -infinity: never greater than anything. argmax finds the first of equals.
        values = np.where(np.isnan(values), np.float32(-np.inf), values)
        j = int(np.argmax(values))
        if values[j] > from_bits(state[0], BF16):
            state[:] = bits[j], f["imm"] + j


def _float(bits: int) -> np.float32:
    return np.uint32(bits).view(np.float32)


def _arrays(p: PimParams) -> dict[str, tuple[tuple[int, ...], type]]:
    return {
        "dram": ((p.channels, p.n_banks, p.rows * p.columns * p.lanes), np.uint16),
        "sram": ((p.sram_columns * p.lanes,), np.uint16),
        "gb": ((p.channels, p.gb_columns * p.lanes), np.uint16),
        "acc": ((p.channels, p.n_banks), np.uint32),
        "argmax": ((2,), np.int64),
    }
