"""The host's view of a device: named regions in a 24-bit space of 32-bit words.

Pure data, so that whoever writes a program, the RTL that decodes it and the bench that loads it derive the
same addresses from the same widths and counts.
"""

import operator
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from tilewright.arch.errors import nearest

ADDRESS_BITS = 24
WORD_BITS = 32

Words = npt.NDArray[np.uint32]


def _power_of_two_from(n: int) -> int:
    """The smallest power of two that is at least `n` (>= 1)."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Region:
    """`elements` values of `element_bits` each.

    An element starts at a word of its own and takes a power of two of words, so that hardware splits an
    address into element and word by its bits alone.
    """

    name: str
    elements: int
    element_bits: int = WORD_BITS

    def __post_init__(self) -> None:
        if not self.name.isidentifier():
            raise ValueError(f"region name must be an identifier, not {self.name!r}")
        if self.elements < 1:
            raise ValueError(f"region {self.name}: elements must be at least 1, not {self.elements}")
        if self.element_bits < 1:
            raise ValueError(f"region {self.name}: element_bits must be at least 1, not {self.element_bits}")

    @property
    def element_words(self) -> int:
        """Words that carry data in one element."""
        return -(-self.element_bits // WORD_BITS)

    @property
    def stride(self) -> int:
        """Words from one element to the next."""
        return _power_of_two_from(self.element_words)

    @property
    def words(self) -> int:
        """Words from the first element to the end of the last."""
        return self.elements * self.stride

    @property
    def span(self) -> int:
        """The aligned block of address space that the region owns, in words."""
        return _power_of_two_from(self.words)


class HostMap:
    """Regions laid out in the order given, each aligned to its own span.

    >>> hostmap = HostMap([Region("registers", 4), Region("rows", 3, 72)])
    >>> hostmap.base("registers"), hostmap.base("rows"), hostmap.words()
    (0, 16, 32)
    >>> hostmap.pack("rows", [1 << 64]).tolist()
    [0, 0, 1, 0]

    Raises ValueError on a repeated name and when the regions do not fit 24 address bits.
    """

    def __init__(self, regions: Sequence[Region]) -> None:
        self._regions: dict[str, Region] = {}
        self._bases: dict[str, int] = {}
        cursor = 0
        for region in regions:
            if region.name in self._regions:
                raise ValueError(f"region {region.name} is given twice")
            base = -(-cursor // region.span) * region.span
            cursor = base + region.span
            self._regions[region.name] = region
            self._bases[region.name] = base
        if cursor > 1 << ADDRESS_BITS:
            raise ValueError(
                f"regions {', '.join(self._regions)} need {cursor} words; {ADDRESS_BITS} address bits hold "
                f"{1 << ADDRESS_BITS}"
            )
        self._words = cursor

    def __iter__(self) -> Iterator[Region]:
        return iter(self._regions.values())

    def __contains__(self, name: object) -> bool:
        return name in self._regions

    def __getitem__(self, name: str) -> Region:
        if name not in self._regions:
            raise KeyError(f"no region {name!r}: {nearest(name, self._regions)}")
        return self._regions[name]

    def words(self) -> int:
        """Words of address space in use, alignment included."""
        return self._words

    def base(self, name: str, element: int = 0) -> int:
        """The word address of an element. Raises KeyError for an unknown region, IndexError beyond it."""
        region = self[name]
        if not 0 <= element < region.elements:
            raise IndexError(f"region {name} has elements 0 to {region.elements - 1}, not {element}")
        return self._bases[name] + element * region.stride

    def pack(self, name: str, values: npt.ArrayLike) -> Words:
        """Elements as host words, (n,) integers -> (n * stride,) uint32; least significant word first.

        Negative values become two's complement. Elements wider than 64 bits are Python ints in a list or an
        object array. Raises ValueError for more values than the region has elements, and for a value that
        does not fit.
        """
        region = self[name]
        array = values if isinstance(values, np.ndarray) else np.array(values, object)
        if array.ndim != 1 or len(array) > region.elements:
            raise ValueError(f"region {name} takes at most {region.elements} values, not shape {array.shape}")
        if array.dtype.kind not in "iubO":
            raise ValueError(f"region {name} takes integers, not {array.dtype}")
        bits, words = region.element_bits, region.element_words
        low, high = -(1 << (bits - 1)), (1 << bits) - 1
        if array.size and not (low <= int(array.min()) and int(array.max()) <= high):
            bad = next(int(v) for v in array if not low <= int(v) <= high)
            raise ValueError(f"region {name}: {bad} does not fit {bits} bits")

        packed = np.zeros((len(array), region.stride), np.uint32)
        if array.dtype.kind != "O" and words <= 2:
            unsigned = array.astype(np.uint64) & np.uint64(high)
            for word in range(words):
                packed[:, word] = (unsigned >> np.uint64(WORD_BITS * word)).astype(np.uint32)
        else:
            raw = b"".join((operator.index(v) & high).to_bytes(words * 4, "little") for v in array)
            packed[:, :words] = np.frombuffer(raw, "<u4").reshape(-1, words)
        return packed.reshape(-1)

    def unpack(self, name: str, words: npt.ArrayLike) -> npt.NDArray[Any]:
        """Host words as unsigned elements, (n * stride,) -> (n,): uint64, or Python ints beyond 64 bits.

        Padding is ignored. Raises ValueError if the words are not whole elements of this region.
        """
        region = self[name]
        flat = np.asarray(words, np.uint32)
        if flat.ndim != 1 or len(flat) % region.stride or len(flat) > region.words:
            raise ValueError(
                f"region {name} has {region.elements} elements of {region.stride} words, "
                f"not shape {flat.shape}"
            )
        rows = flat.reshape(-1, region.stride)[:, : region.element_words]
        mask = (1 << region.element_bits) - 1
        if region.element_words <= 2:
            values = np.zeros(len(rows), np.uint64)
            for word in range(region.element_words):
                values |= rows[:, word].astype(np.uint64) << np.uint64(WORD_BITS * word)
            return values & np.uint64(mask)
        wide = np.empty(len(rows), object)
        for i, row in enumerate(rows):
            wide[i] = int.from_bytes(row.astype("<u4").tobytes(), "little") & mask
        return wide
