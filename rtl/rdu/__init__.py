"""Reconfigurable dataflow units as RTL: a socket behind a host port, its units, and the networks between them."""

from tilewright.arch.rdu import RduParams, RduSpec
from tilewright.rtl.rdu.top import Top

CODE_DEPTH = 64


def top(spec: RduSpec, params: RduParams | None = None, depth: int = CODE_DEPTH) -> Top:
    """The socket that the spec describes."""
    return Top(params=params or spec.params(), depth=depth)
