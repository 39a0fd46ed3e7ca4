"""Fourier convolution by Monarch decomposition (`workloads.monarch`) as sections, and the paper's fusion example.

A signal is cut into lanes by one of its digits, each with a chain of stages of its own:

    signal PMU -> two systolic PCUs (real and imaginary parts) -> SIMD PCU (twiddles from two PMUs) -> signal PMU -> ...

The array's rows are the `radix` outputs of a transform, its columns as many other points; a result packet holds the
outputs of one point, so that the next stage's digit is a stride of its PMU's read side: the transposition costs
nothing. The digit by which lanes are cut can't be transformed in them. So there are three groups of stages, between
which the signal goes through the HBM, stored by one cut and loaded by another: 1..m-1; then m, the spectrum, and the
inverses of m..2; then the inverse of 1. All is one kernel: a load waits for the tokens of the stores before it.

Matrices, twiddles and spectrum are resident in PMUs. All stages but the first work on a PMU each, without a second
buffer: it is one signal that passes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program
from tilewright.arch.rdu import ISA, LEVELS, TOKENS, RduParams, is_pcu
from tilewright.mappers.rdu.section import Built, Section, segment
from tilewright.workloads import monarch
from tilewright.workloads.monarch import Pair
from tilewright.workloads.rdu_kernels import place

__all__ = ["Convolution", "Kernel", "fft_convolution", "fusion_example", "scratch", "unfused_convolution"]

Words = NDArray[np.uint32]
Layout = tuple[int, ...]
ELEMENT = 2  # bytes of a bfloat16 off chip


class Load(NamedTuple):
    """Where a group's lanes take the signal from: byte address, and (digit, stride) from the fastest digit on."""

    address: int
    lane_bytes: int
    loops: Sequence[tuple[int, int]]  # of packets of one lane, (count, stride in bytes)


@dataclass(frozen=True)
class Kernel:
    """A section, its arguments, and the words that PMUs hold from the start, by address."""

    section: Section
    arguments: Mapping[int, int]
    resident: Mapping[str, Words]


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
    bytes: int

    def program(self, built: Sequence[Built], *, host: bool = False) -> Program:
        """All kernels in order, launched by the host or by the AGCUs."""
        if len(built) != len(self.kernels):
            raise ValueError(f"built must be {len(self.kernels)} sections, not {len(built)}")
        parts = zip(self.kernels, built, strict=True)
        return Program(
            ISA,
            [
                segment(b, args=dict(k.arguments), index=i, host=host)
                for i, (k, b) in enumerate(parts)
            ],
            [*built[0].tags],
        )

    def memory(self, signal: NDArray[Any]) -> NDArray[np.uint8]:
        """HBM with the signal, radix ** order complex values."""
        radix = self.params.lanes
        z = np.asarray(signal, np.complex128).reshape((radix,) * self.order)
        z = z.transpose([d - 1 for d in self.source_digits])
        parts = np.stack([monarch.bf16(part) for part in Pair.of(z)], axis=-2)
        image = np.zeros(self.bytes, np.uint8)
        raw = (np.ascontiguousarray(parts).view(np.uint32) >> 16).astype(np.uint16).view(np.uint8).reshape(-1)
        image[self.source : self.source + len(raw)] = raw
        return image

    def result(self, image: NDArray[np.uint8]) -> Pair:
        """The convolution in HBM after the run."""
        radix, lane = self.params.lanes, _lane_bytes(self.params, self.order)
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
            position = b.position(name)
            pmu = index[position]
            if pmu in taken:
                raise UserError(f"{name} and {taken[pmu]} are resident in one PMU, {position}")
            taken[pmu] = name
            valid, bank, word = place(records[position], np.arange(len(words)), p.banks)
            assert np.all(valid)
            out[pmu, bank, word] = words
    return out
