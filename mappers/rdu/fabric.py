"""What placement and routing know of a machine: sites, switches, and the links between them."""

from collections.abc import Mapping
from fractions import Fraction
from functools import lru_cache
from typing import NamedTuple

from tilewright.arch.rdu import INPUTS, MESH, NETWORKS, TOKENS, RduParams, is_pcu

KINDS = ("pcu", "pmu", "agcu")
LOCAL = len(MESH)
"""First local port of a switch."""
NORTH, EAST, SOUTH, WEST = range(len(MESH))
STEP = ((0, -1), (1, 0), (0, 1), (-1, 0))
"""(dx, dy) to the neighbour behind each mesh port."""


class Site(NamedTuple):
    """A place for a unit: its kind, the switch it hangs on, and the first port of that switch that leads to it.

    A gate to memory hangs on a mesh port that has no neighbour, every other unit on the local ports.
    """

    kind: str
    x: int
    y: int
    port: int = LOCAL


class Fabric(NamedTuple):
    """A `columns` x `rows` mesh of switches, x to the east and y to the south, and the sites of its units."""

    columns: int
    rows: int
    sites: tuple[Site, ...]
    inputs: Mapping[tuple[str, str], int]
    """Input ports of a unit, by (kind, network)."""
    capacity: Fraction = Fraction(1)
    """Packets a tick that a link of either network moves, each way."""
    flows: int = 64
    """Static flows of one input port of a switch."""
    hop: int = 1
    """Ticks over a link."""
    die_columns: int = 0
    """Columns of one die; 0: all of them."""
    die_hop: int = 1
    """Ticks over a link from one die to the next."""

    @classmethod
    def of(cls, params: RduParams) -> "Fabric":
        """The fabric of a machine: PCUs and PMUs as on a checkerboard, gates at the west side, then at the east."""
        p = params
        grid = (Site("pcu" if is_pcu(x, y) else "pmu", x, y) for y in range(p.rows) for x in range(p.columns))
        gates = (
            Site("agcu", x, y, port)
            for x, port in ((0, WEST), (p.columns - 1, EAST))
            for y in range(p.agcus_per_side)
        )
        inputs = {("pcu", "vector"): p.vector_inputs, ("pcu", "scalar"): p.scalar_inputs}
        for kind in ("pmu", "agcu"):
            inputs[kind, "vector"] = 1
        for kind in KINDS:
            inputs[kind, "control"] = TOKENS
        return cls(
            p.columns,
            p.rows,
            (*grid, *gates),
            inputs,
            flows=p.flows,
            hop=p.hop,
            die_columns=p.die_columns,
            die_hop=p.die_hop,
        )

    def inside(self, x: int, y: int) -> bool:
        """Whether there is a switch at (x, y)."""
        return 0 <= x < self.columns and 0 <= y < self.rows

    def neighbour(self, x: int, y: int, port: int) -> tuple[int, int] | None:
        """The switch behind a mesh port, or None at the edge.

        >>> Fabric(2, 1, (), {}).neighbour(0, 0, EAST)
        (1, 0)
        """
        there = (x + STEP[port][0], y + STEP[port][1])
        return there if self.inside(*there) else None

    def link_ticks(self, x: int, port: int) -> int:
        """Ticks over the link that leaves a switch of column x by a mesh port."""
        across = port in (EAST, WEST) and self.die_columns and (x + (port == EAST)) % self.die_columns == 0
        return self.die_hop if across else self.hop

    def sites_of(self, kind: str) -> list[int]:
        """Indices of the sites of one kind."""
        return [i for i, site in enumerate(self.sites) if site.kind == kind]


@lru_cache
def checkerboard(columns: int, rows: int, gates: int = 0, flows: int = 64) -> Fabric:
    """A small fabric by itself: `gates` AGCUs a side, four inputs a PCU, every time 1 tick.

    >>> [site.kind for site in checkerboard(2, 2).sites]
    ['pcu', 'pmu', 'pmu', 'pcu']
    """
    grid = (Site("pcu" if is_pcu(x, y) else "pmu", x, y) for y in range(rows) for x in range(columns))
    edge = [Site("agcu", x, y, p) for x, p in ((0, WEST), (columns - 1, EAST)) for y in range(gates)]
    inputs = {("pcu", network): INPUTS for network in NETWORKS}
    inputs |= {(kind, "vector"): 1 for kind in ("pmu", "agcu")}
    inputs |= {(kind, "control"): TOKENS for kind in KINDS}
    return Fabric(columns, rows, (*grid, *edge), inputs, flows=flows)
