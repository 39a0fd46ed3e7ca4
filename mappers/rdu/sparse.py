"""Products of sparse weights: a dense one for each group of a model's `weight_groups`, side by side.

Their inputs are columns that lie apart, read with a stride out of memory units. What the groups give comes to one buffer,
group after group, and is read in the order of the columns. Of dense weights there is one group, and a product is one.

Off chip a layer's weights lie by group: rows are those of the side of the residual stream, group after group; columns
those of the other side, in their group.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from tilewright.arch.errors import UserError
from tilewright.mappers.rdu.layer import Op
from tilewright.workloads.models import ModelConfig

__all__ = [
    "BACK",
    "GRADIENT",
    "SPARSE",
    "TO_STREAM",
    "Piece",
    "Range",
    "Term",
    "back_in_order",
    "groups_of",
    "pieces",
    "terms",
]

BACK, GRADIENT = "_dx", "_dw"
SPARSE = ("qkv", "attention_out", "gate", "up", "down")
TO_STREAM = ("attention_out", "down")
"""Those that give columns of the residual stream."""


@dataclass(frozen=True)
class Range:
    """Columns of a matrix, from `first` on: columns of its flow number `part`, from `inside` on."""

    part: int
    inside: int
    first: int
    width: int


@dataclass(frozen=True)
class Piece:
    """The columns of a range that belong to one group: `count` of them, `step` apart, from `first` of the range on.

    `at` is the number of the first one among all columns of the group.
    """

    group: int
    first: int
    step: int
    count: int
    at: int


@dataclass(frozen=True)
class Term:
    """A dense product: of columns `x` of range `source` by weights, to columns `y` of the result."""

    source: Range
    x: Piece
    y: Piece


def groups_of(model: ModelConfig, op: Op) -> int:
    """The groups of an operator's weights."""
    return model.weight_groups if op.name.removesuffix(BACK).removesuffix(GRADIENT) in SPARSE else 1


def by_turns(name: str) -> tuple[bool, bool]:
    """Whether columns of a product's input, and of its result, belong to groups by turns; else in equal ranges."""
    to_stream = name.removesuffix(BACK) in TO_STREAM
    return not (to_stream and name.endswith(BACK)), not (to_stream and not name.endswith(BACK))


def pieces(columns: int, groups: int, first: int, width: int, turns: bool) -> list[Piece]:
    """Of `width` columns from `first` on, of a matrix of `columns`, those of each group.

    >>> [(p.group, p.first, p.step, p.count, p.at) for p in pieces(12, 2, 4, 4, True)]
    [(0, 0, 2, 2, 2), (1, 1, 2, 2, 2)]
    >>> [(p.group, p.first, p.step, p.count, p.at) for p in pieces(12, 2, 4, 4, False)]
    [(0, 0, 1, 2, 4), (1, 2, 1, 2, 0)]
    """
    if turns:
        if first % groups or width % groups:
            raise UserError(
                f"{width} columns from {first} on are not as many of each of {groups} groups of weights"
            )
        return [Piece(j, j, groups, width // groups, first // groups) for j in range(groups)]
    own = columns // groups
    out = []
    for j in range(groups):
        low, high = max(first, j * own), min(first + width, (j + 1) * own)
        if low < high:
            out.append(Piece(j, low - first, 1, high - low, low - j * own))
    return out


def terms(
    name: str, groups: int, depth: int, ranges: Sequence[Range], columns: int, first: int, width: int
) -> list[list[Term]]:
    """The products of which columns `first` to `first + width` of product `name` are made.

    Its input has `depth` columns, which come in `ranges`; the result has `columns`. All products of one list give all of
    the columns, those of the next one what is to be added.
    """
    turns = by_turns(name)
    given = [(r, piece) for r in ranges for piece in pieces(depth, groups, r.first, r.width, turns[0])]
    wanted = pieces(columns, groups, first, width, turns[1])
    sums = [[Term(r, x, y) for r, x in given if x.group == y.group] for y in wanted]
    alike = {(len(own), own[0].y.count, *{t.x.count for t in own}) for own in sums}
    if len(alike) > 1:
        raise UserError(f"{name}: {width} columns from {first} on are not as many of each group of weights")
    return [list(some) for some in zip(*sums, strict=True)]


def back_in_order(name: str, groups: int, columns: int, pitch: int) -> list[tuple[int, int]]:
    """Loops that read what `groups` groups of a product give, `columns` columns each, in the order of the columns.

    They lie `pitch` columns apart.
    """
    if groups == 1:
        return [(columns, 1)]
    by_group, within = (groups, pitch), (columns, 1)
    return [by_group, within] if by_turns(name)[1] else [within, by_group]
