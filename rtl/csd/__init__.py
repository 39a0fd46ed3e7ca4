"""Attention inside a storage drive as RTL: a drive behind a host port, its kernels, and its flash controllers.

A controller compares all operations that it holds with each other; what is written for drives whose controllers hold
more than `MOST_OPERATIONS` in all is one channel that holds fewer, and one kernel. A simulator is only built of whole drives.
"""

from tilewright.arch.csd import CsdParams, CsdSpec, page_types
from tilewright.rtl.csd.top import Top

CODE_DEPTH = 64
MOST_OPERATIONS = 32
PART_OPERATIONS = 8


def operations(params: CsdParams) -> int:
    """What the controllers hold in all."""
    return params.flash.channels * params.flash_queue


def part(spec: CsdSpec) -> str:
    """What `top` writes of the machine; nothing: all of it."""
    if operations(spec.params()) <= MOST_OPERATIONS:
        return ""
    return f"a drive of one kernel and one channel, whose controller holds {PART_OPERATIONS} operations"


def top(spec: CsdSpec, params: CsdParams | None = None, depth: int = CODE_DEPTH) -> Top:
    """The drive that the spec describes, or one channel of it."""
    p = params or spec.params()
    if operations(p) > MOST_OPERATIONS:
        p = p._replace(
            kernels=1, flash=p.flash._replace(channels=1), flash_queue=min(p.flash_queue, PART_OPERATIONS)
        )
    return Top(params=p, order=spec.flash.placement.order, types=page_types(spec), depth=depth)
