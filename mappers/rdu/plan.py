"""Which operators become one section, and how each section is tiled, so that it fits and none of its stages lags.

A section is built for a choice of tiles, counted, and its busiest unit found; nothing is estimated apart from that.
For products, which take most units, shares come from `allocate`: the least interval that the rest of the units allows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from fractions import Fraction
from functools import partial

from tilewright.arch.errors import UserError
from tilewright.arch.rdu import TIERS, RduParams
from tilewright.mappers.rdu.allocate import Demand, Operator, allocate, cut_sections
from tilewright.mappers.rdu.layer import Op, Share, Tiles
from tilewright.mappers.rdu.rows import Rows
from tilewright.mappers.rdu.stages import Pipeline, ceil_div
from tilewright.mappers.rdu.vectors import Vectors

__all__ = ["Choice", "Limits", "Plan", "cut", "plan_rows", "plan_vectors"]

GROUPS = (1, 2, 3, 4, 6, 8, 12, 16)
SLACK = Fraction(21, 20)
"""Ticks that a smaller section may take, of those of the quickest."""


@dataclass(frozen=True)
class Limits:
    """Units of a socket that a section may use."""

    pcu: int
    pmu: int
    agcu: int

    @classmethod
    def of(cls, p: RduParams, fill: Fraction) -> "Limits":
        """A share `fill` of compute and memory units, and all gates: what is left helps placement and routing."""
        return cls(int(p.pcus * fill), int(p.pmus * fill), 2 * p.agcus_per_side)

    def hold(self, line: Pipeline) -> bool:
        """Whether they hold a section."""
        return all(line.count(kind) <= getattr(self, kind) for kind in ("pcu", "pmu", "agcu"))

    def short(self, line: Pipeline) -> str:
        """What doesn't fit."""
        return ", ".join(
            f"{line.count(kind)} of {getattr(self, kind)} {kind.upper()}s" for kind in ("pcu", "pmu", "agcu")
        )


@dataclass(frozen=True)
class Choice:
    """A section that fits."""

    ops: tuple[Op, ...]
    keep: tuple[str, ...]
    line: Pipeline
    tiles: dict[str, object]
    """The choices, as a person may read them."""
    banks: tuple[object, ...] = ()

    @property
    def name(self) -> str:
        """Its operators, the first and the last."""
        names = [op.name for op in self.ops]
        return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"

    def ticks(self, p: RduParams) -> int:
        """What it takes at least: the busiest unit's iterations, or the busiest memory's lines."""
        return max(self.line.interval()[0], _memory_ticks(p, self.line))

    def line_bytes(self) -> dict[str, int]:
        """Bytes by tier."""
        return _line_bytes(self.line)


def _line_bytes(line: Pipeline) -> dict[str, int]:
    out: dict[str, int] = {}
    for unit, n in line.traffic.items():
        tier = str(line.units[unit].fields["tier"])
        out[tier] = out.get(tier, 0) + n
    return out


def _memory_ticks(p: RduParams, line: Pipeline) -> int:
    """What the busiest memory takes for a section's lines."""
    out = 1
    for tier, n in _line_bytes(line).items():
        i = TIERS.index(tier)
        lines = ceil_div(n, 4 * p.lanes)
        out = max(out, ceil_div(lines * int(p.rate_q[i]), int(p.rate_p[i]) * int(p.channels[i])))
    return out


Plan = Callable[[Sequence[Op], Sequence[str]], Choice | None]


def kept(ops: Sequence[Op], later: Sequence[Op], result: Sequence[str]) -> tuple[str, ...]:
    """Matrices that `ops` write and that are needed when they are done."""
    needed = {t for op in later for t in op.reads} | set(result)
    return tuple(t for op in ops for t in op.writes if t in needed)


def _round_even(n: int) -> int:
    return n if n == 1 else n + n % 2


def plan_rows(
    p: RduParams, share: Share, ops: Sequence[Op], keep: Sequence[str], limits: Limits, *, rows: int, keys: int,
    pitch: int, context: int, window: int | None, groups: int | None = None, attended: int | None = None,
    widths: Mapping[str, int] | None = None, builder: Callable[..., Rows] = Rows,
) -> Choice | None:  # fmt: skip
    """The tiles with which a section over `rows` rows takes the fewest ticks; None if it fits with none."""

    def make(tiles: Tiles, keys: int) -> Rows:
        return builder(
            p, share, tiles, keys=keys, pitch=pitch, context=context, window=window, attended=attended, widths=widths
        )  # fmt: skip

    found: list[Choice] = []
    words = p.banks * p.bank_words
    attends = any(op.kind.startswith("attention") for op in ops)
    dim = 1 << (share.model.head_dim - 1).bit_length()
    for g in (groups,) if groups else GROUPS:
        blocks = _round_even(ceil_div(ceil_div(rows, p.lanes), g))
        if g > 1 and g > ceil_div(rows, p.lanes):
            break
        least = ceil_div(keys, words // dim // p.lanes * p.lanes) if attends else 1
        for chunks in sorted({least + i for i in (0, 1, 2, 4, 6, 8)}) if attends else (1,):
            padded = ceil_div(keys, chunks * p.lanes) * chunks * p.lanes
            if padded > pitch:
                continue
            tiles = Tiles(groups=g, blocks=blocks, units={}, chunks=chunks)
            choice = _fill(p, share, ops, keep, limits, tiles, partial(make, keys=padded))
            if choice is not None:
                found.append(choice)
    if not found:
        return None
    # What takes hardly longer with fewer units is easier to place, and to route.
    least_ticks = min(choice.ticks(p) for choice in found)
    near = [choice for choice in found if choice.ticks(p) <= least_ticks * SLACK]
    return min(near, key=lambda choice: (choice.line.count("pcu"), choice.ticks(p)))


def _fill(
    p: RduParams, share: Share, ops: Sequence[Op], keep: Sequence[str], limits: Limits, tiles: Tiles,
    make: Callable[[Tiles], Rows],
) -> Choice | None:  # fmt: skip
    """A section whose products take what the other stages leave."""

    def build(t: Tiles) -> Pipeline:
        return make(t).build(ops, keep)

    rows = make(tiles)
    demands, gates = [], 0
    for op in ops:
        try:
            found = rows.demand(op)
        except UserError:
            return None
        if found is not None:
            demands.append(found[0])
            gates += found[1]
    try:
        first = build(replace(tiles, units={d.name: d.least for d in demands}))
    except UserError:
        return None
    fixed = sum(u.kind == "pcu" and not _of_product(first, name, demands) for name, u in first.units.items())
    if demands:
        others = max(
            (n for name, n in first.work.items() if not _of_product(first, name, demands)), default=1
        )
        # Products that are faster than a memory, or than another stage, would only wait for it.
        at_least = max(others, _memory_ticks(p, first))
        shares = allocate(demands, {"pcu": (limits.pcu - fixed) // tiles.groups}, at_least=at_least)
        if shares is None:
            return None
        spare = limits.agcu - first.count("agcu") + gates
        tiles = replace(tiles, units=shares.units, gates=max(1, spare // gates))
    if any(op.kind.startswith("attention") for op in ops):
        left = limits.agcu - first.count("agcu")
        tiles = replace(tiles, cache_gates=max(1, min(share.kv_heads, left // 8)))
        tiles = replace(tiles, gates=max(1, tiles.gates - ceil_div(2 * tiles.cache_gates, max(1, gates))))
    for _ in range(6):
        try:
            line = build(tiles)
        except UserError:
            return None
        if limits.hold(line):
            break
        if line.count("agcu") > limits.agcu and tiles.gates > 1:
            tiles = replace(tiles, gates=tiles.gates - 1)
            continue
        return None
    else:
        return None
    units = {d.name: tiles.units[d.name] for d in demands}
    return Choice(
        tuple(ops), tuple(keep), line,
        {"groups": tiles.groups, "blocks": tiles.blocks, "chunks": tiles.chunks, "keys": rows.keys, "units": units},
    )  # fmt: skip


def _of_product(line: Pipeline, unit: str, demands: Sequence[Demand]) -> bool:
    own = line.units[unit]
    if own.tag not in {d.name for d in demands}:
        return False
    return own.kind != "pcu" or own.fields["mode"] == "systolic"


def plan_vectors(
    p: RduParams, share: Share, ops: Sequence[Op], keep: Sequence[str], limits: Limits, *, batch: int, keys: int,
    pitch: int, passes: int = 1,
) -> Choice | None:  # fmt: skip
    """The tiles with which a section over one token a sequence holds its weights; None if it fits with none.

    The more units share the weights, the shorter the time from the last weight's arrival to the end: the smallest
    share for which there are units is taken.
    """
    capacity = p.banks * p.bank_words
    chunks = 1
    attends = any(op.kind == "attention" for op in ops) and keys > 0
    if attends:
        dim = 1 << (share.model.head_dim - 1).bit_length()
        chunks = ceil_div(keys, capacity // dim // p.lanes * p.lanes)
        keys = ceil_div(keys, chunks * p.lanes) * chunks * p.lanes

    def build(words: int, gates: int, cache_gates: int) -> Vectors:
        out = Vectors(
            p, share, batch=batch, keys=keys, pitch=max(pitch, keys), chunks=chunks, words=words, gates=gates,
            cache_gates=cache_gates, passes=passes,
        )  # fmt: skip
        out.build(ops, keep)
        return out

    def gates_of(least: Vectors) -> tuple[int, int]:
        """Gates for the weights of each tensor, and for the keys, or the values, of a sequence; `least` has one of each.

        What attention waits for should be there at one time: gates for weights are to those for the cache as the bytes
        of the products before it to the cache's. But the weights that follow should keep the memory busy alone.
        """
        tensors = max(1, len({bank.tensor for bank in least.banks}))
        room = limits.agcu - least.line.count("agcu") + tensors
        if not attends:
            return room // tensors, 1
        before = {op.name for op in ops[: [op.kind for op in ops].index("attention")]}
        weights = sum(b.units * b.depth * b.strips * p.lanes for b in least.banks if b.name in before)
        cache = 2 * batch * share.kv_heads * keys * share.model.head_dim
        hbm = TIERS.index("hbm")
        busy = ceil_div(
            2 * int(p.channels[hbm]) * int(p.rate_p[hbm]), int(p.rate_q[hbm])
        )  # gates of a vector a tick
        room += 2 * batch
        most = max(room * cache // (cache + weights), limits.agcu // 8)
        each = max(1, min(most, room - busy) // (2 * batch))
        return (room - 2 * batch * each) // tensors, each

    for words in (
        capacity // 8,
        capacity // 4,
        3 * capacity // 8,
        capacity // 2,
        3 * capacity // 4,
        capacity,
    ):
        try:
            least = build(words, 1, 1)
            first = least.line
            gates, cache_gates = gates_of(least)
            if gates < 1 or first.count("pcu") > limits.pcu or first.count("pmu") > limits.pmu:
                continue
            found = build(words, gates, cache_gates)
        except UserError:
            continue
        if limits.hold(found.line):
            return Choice(
                tuple(ops), tuple(keep), found.line,
                {"batch": batch, "words": words, "gates": gates, "chunks": chunks, "keys": keys, "passes": passes},
                tuple(found.banks),
            )  # fmt: skip
    return None


def cut(
    ops: Sequence[Op], result: Sequence[str], plan: Plan, p: RduParams, *, fused: bool, launch: int, what: str
) -> list[Choice]:
    """Sections of `ops`: one if it fits and `fused`, else the cut that takes the fewest ticks, or one for each."""
    cache: dict[tuple[int, int], Choice | None] = {}

    def at(first: int, stop: int) -> Choice | None:
        if (first, stop) not in cache:
            inside = ops[first:stop]
            cache[first, stop] = plan(inside, kept(inside, ops[stop:], result))
        return cache[first, stop]

    if fused:
        whole = at(0, len(ops))
        if whole is not None:
            return [whole]

    def cost(first: int, stop: int) -> Fraction | int | None:
        if not fused and stop - first > 1:
            return None
        found = at(first, stop)
        return None if found is None else found.ticks(p) + launch

    operators = [Operator(op.name, (), op.reads, op.writes) for op in ops]
    try:
        spans = cut_sections(operators, cost)
    except UserError as error:
        raise UserError(f"{what}: {error}; more sockets (node.sockets) share its weights") from None
    out = []
    for first, stop in spans:
        found = at(first, stop)
        assert found is not None
        out.append(found)
    return out
