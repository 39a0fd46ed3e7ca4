"""Reconfigurable dataflow units as RTL: a socket behind a host port, its units, and the networks between them.

A socket of thousands of units takes Amaranth half an hour, although equal units share one module: what is written
for a larger grid than `MOST_POSITIONS` is a region of 2 x 2 positions, in which every kind of unit occurs, with all its
sizes as they are. A simulator is only built of whole sockets.
"""

from tilewright.arch.rdu import RduParams, RduSpec
from tilewright.rtl.rdu.top import Top

CODE_DEPTH = 64
MOST_POSITIONS = 64


def whole(params: RduParams) -> bool:
    """Whether `top` writes the whole socket."""
    return params.columns * params.rows <= MOST_POSITIONS


def part(spec: RduSpec) -> str:
    """What `top` writes of the machine; nothing: all of it."""
    return "" if whole(spec.params()) else "a region of 2 x 2 positions and two AGCUs"


def top(spec: RduSpec, params: RduParams | None = None, depth: int = CODE_DEPTH) -> Top:
    """The socket that the spec describes, or a region of it: two PCUs, two PMUs and an AGCU on either side."""
    p = params or spec.params()
    if not whole(p):
        p = p._replace(columns=2, rows=2, die_columns=2, pcus=2, pmus=2, agcus_per_side=1)
    return Top(params=p, depth=depth)
