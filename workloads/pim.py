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
An instruction reads all its operands before it writes anything. The ASIC works strip by strip: what it writes
must not overlap what it reads, unless it is the same place.
"""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.arch.formats import BF16, FloatFormat, float_format
from tilewright.arch.isa import Program
from tilewright.arch.pim import N_CHANNEL_OPS, OP, OPS, PimParams, PimSpec
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
    that the machine lacks, a bank, lane or count (cols, outs, n: at least 1) out of range, an odd ROPE, two
    channels of one instruction that write the same SRAM column, an ASIC operation whose result overlaps
    an operand, and an instruction alongside another that it is not independent of.
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
        # SRAM columns that the current instruction reads and writes, and those of the instructions that may
        # still execute, by unit.
        self.reads: list[NDArray[np.int64]] = []
        self.writes: list[NDArray[np.int64]] = []
        self.under_way: dict[str, tuple[list[NDArray[np.int64]], list[NDArray[np.int64]]]] = {}

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
        """One instruction. Raises ValueError for an operand out of range, or one that is not independent of an
        instruction that the other unit may still execute."""
        method: Callable[[Fields], None] = getattr(self, op)
        self.reads, self.writes = [], []
        method(fields)
        unit, other = ("channels", "asic") if OP[op] < N_CHANNEL_OPS else ("asic", "channels")
        if not fields["alongside"]:
            self.under_way = {}
        elif other in self.under_way:
            reads, writes = self.under_way[other]
            for mine, theirs, what in (
                (self.reads, writes, "reads what {0} may still write"),
                (self.writes, writes, "writes what {0} may still write"),
                (self.writes, reads, "writes what {0} may still read"),
            ):
                common = np.intersect1d(_union(mine), _union(theirs))
                if len(common):
                    raise ValueError(f"alongside: {what.format(other)}: SRAM column {common[0]}")
        self.under_way[unit] = self.reads, self.writes

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
        columns = self._sram(name, base.reshape(-1, *(1,) * offsets.ndim) + offsets)
        (self.writes if name == "dst" else self.reads).append(columns)
        return columns

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

    def _load(self, f: Fields, name: str, outs: int = 1, pitch: int = 0) -> asic.F32:
        """`outs` vectors [outs, n]; elements are contiguous from the SRAM column that the field names."""
        return from_bits(self.image["sram"][self._elements(f, name, outs, pitch)], BF16)

    def _store(self, f: Fields, values: asic.F32, pitch: int = 0) -> None:
        """Elements behind the n-th of the last column keep what they held."""
        self.image["sram"][self._elements(f, "dst", len(values), pitch)] = to_bits(values, BF16)

    def _elements(self, f: Fields, name: str, outs: int, pitch: int) -> NDArray[np.int64]:
        lanes = self.params.lanes
        first = f[name] + np.arange(outs)[:, None] * pitch
        columns = self._sram(name, first + np.arange(-(-f["n"] // lanes)))
        (self.writes if name == "dst" else self.reads).append(columns)
        return first * lanes + np.arange(f["n"])

    def _apart(self, f: Fields, name: str, outs: int, pitch: int, source_pitch: int) -> None:
        """`dst` must be the same place as an operand, or share no column with it."""
        columns = -(-f["n"] // self.params.lanes)
        if outs > 1 and pitch < columns:
            raise ValueError(f"pitch {pitch}: vectors of {columns} columns overlap")
        if f[name] == f["dst"] and (outs == 1 or pitch == source_pitch):
            return
        dst, src = f["dst"], f[name]
        if src < dst + (outs - 1) * pitch + columns and dst < src + (outs - 1) * source_pitch + columns:
            raise ValueError(f"dst {dst} overlaps {name} {src}: they must be equal or apart")

    def _vector(self, f: Fields, function: Callable[..., asic.F32], *names: str) -> None:
        """dst = function(src, the other operands that are named)"""
        self._count("n", f)
        for name in ("src", *names):
            self._apart(f, name, 1, 0, 0)
        with np.errstate(all="ignore"):
            self._store(f, function(*(self._load(f, name) for name in ("src", *names))))

    def ADD(self, f: Fields) -> None:
        """dst = src + src2"""
        self._vector(f, np.add, "src2")

    def MUL(self, f: Fields) -> None:
        """dst = src * src2"""
        self._vector(f, np.multiply, "src2")

    def LAYERNORM(self, f: Fields) -> None:
        """asic.layernorm; gain src2, bias src3; epsilon and 1/n are the float32 whose bits are imm and imm2"""
        eps, share, lanes = _float(f["imm"]), _float(f["imm2"]), self.params.vector_lanes
        self._vector(
            f,
            lambda x, gain, bias: asic.layernorm(x, gain, bias, eps, share, self.asic, lanes),
            "src2",
            "src3",
        )

    def RMSNORM(self, f: Fields) -> None:
        """asic.rmsnorm; gain src2; epsilon and 1/n are the float32 whose bits are imm and imm2"""
        eps, share, lanes = _float(f["imm"]), _float(f["imm2"]), self.params.vector_lanes
        self._vector(f, lambda x, gain: asic.rmsnorm(x, gain, eps, share, self.asic, lanes), "src2")

    def GELU(self, f: Fields) -> None:
        """asic.gelu"""
        self._vector(f, lambda x: asic.gelu(x, self.asic))

    def SILU(self, f: Fields) -> None:
        """asic.silu"""
        self._vector(f, lambda x: asic.silu(x, self.asic))

    def RELU(self, f: Fields) -> None:
        """asic.relu"""
        self._vector(f, asic.relu)

    def SOFTMAX(self, f: Fields) -> None:
        """asic.softmax of `outs` vectors of n elements: vector i at src + i * pitch to dst + i * pitch. The
        scale is the float32 whose bits are imm."""
        self._count("n", f)
        outs, pitch, scale = self._count("outs", f), f["pitch"], _float(f["imm"])
        self._apart(f, "src", outs, pitch, pitch)
        with np.errstate(all="ignore"):
            x = self._load(f, "src", outs, pitch)
            self._store(f, asic.softmax(x, scale, self.asic, self.params.vector_lanes), pitch)

    def ROPE(self, f: Fields) -> None:
        """asic.rope of `outs` vectors of n elements (even), pitch columns apart in src and dst; src2 holds n
        cosines and src3 n sines, the same for every vector."""
        n, outs, pitch = self._count("n", f), self._count("outs", f), f["pitch"]
        if n % 2:
            raise ValueError(f"n must be even, not {n}")
        for name in ("src", "src2", "src3"):
            self._apart(f, name, outs, pitch, pitch if name == "src" else 0)
        with np.errstate(all="ignore"):
            x = self._load(f, "src", outs, pitch)
            self._store(f, asic.rope(x, self._load(f, "src2"), self._load(f, "src3")), pitch)

    def ARGMAX(self, f: Fields) -> None:
        """With `clear` the best so far becomes -infinity at index imm. Then each of the n elements of src, in
        order, takes its place if it is greater: the first of equals stays, NaN never wins. The index of
        element j is imm + j, below 2**32."""
        n = self._count("n", f)
        if f["imm"] + n > 1 << 32:
            raise ValueError(f"imm {f['imm']} + n {n} exceed the 32 bits of an index")
        bits = self.image["sram"][self._elements(f, "src", 1, 0)[0]]
        state = self.image["argmax"]
        if f["clear"]:
            state[:] = _NEGATIVE_INFINITY, f["imm"]
        values = from_bits(bits, BF16)
        # NaN as -infinity: never greater than anything. argmax finds the first of equals.
        values = np.where(np.isnan(values), np.float32(-np.inf), values)
        j = int(np.argmax(values))
        if values[j] > from_bits(state[0], BF16):
            state[:] = bits[j], f["imm"] + j


def _union(columns: list[NDArray[np.int64]]) -> NDArray[np.int64]:
    return np.concatenate([c.reshape(-1) for c in columns]) if columns else np.zeros(0, np.int64)


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
