"""What a program does, one after the other: kernels' executions, and what the DMA moves between them."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from tilewright.mappers.rdu.mixture import Place
from tilewright.mappers.rdu.stages import Region

__all__ = ["Copies", "Launch", "Moves"]


@dataclass(frozen=True)
class Launch:
    """One execution of a kernel."""

    kernel: int
    tag: str
    step: int
    layer: int
    """-1: none."""
    slot: Mapping[str, int] = field(default_factory=dict)
    """Bytes to add to tensors' addresses."""
    experts: tuple[int, ...] = ()
    """The expert of each slot."""
    where: Mapping[Region, tuple[str, int]] = field(default_factory=dict)
    """What arguments point to instead: a tensor, and a byte in it."""
    regions: tuple[int, ...] = ()
    """Where these experts are."""
    at: int | None = None
    """The layer whose tensors it takes, where it is not its own."""

    @property
    def depth(self) -> int:
        """The layer whose tensors it takes; one more than the last one's are those behind it."""
        return self.layer if self.at is None else self.at


@dataclass(frozen=True)
class Copies:
    """Experts' weights on their way to regions of HBM, until all are there."""

    places: tuple[Place, ...]
    tag: str
    step: int
    layer: int


@dataclass(frozen=True)
class Moves:
    """Rows on their way from one tensor to another in HBM, until all are there."""

    source: tuple[str, ...]
    target: tuple[str, ...]
    rows: tuple[tuple[int, int, int, int], ...]
    """(tensor of source, row, tensor of target, row)"""
    tag: str
    step: int
    layer: int
