"""Sections placed and routed so that no stream waits behind one that waits for others: what is tried, and in which order.

Routes are judged by `waits`. Where streams clash, tokens keep them apart, or they are led by other ways; then places are
looked for longer, from other seeds, and sections of fewer units are tried. What is left is counted.
"""

import time
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import dataclass, replace
from fractions import Fraction

from tilewright.arch.errors import UserError
from tilewright.arch.rdu import RduParams
from tilewright.mappers.rdu.plan import Choice, Limits
from tilewright.mappers.rdu.section import Built, Section
from tilewright.mappers.rdu.stages import LOADED, Pipeline
from tilewright.mappers.rdu.waits import Clash, Queue, Waits

__all__ = ["Kernel", "Search", "Smaller"]

TRIES = 4
"""Places that are tried."""
LONGER = 8
"""Moves of the annealing in all tries but the first, in moves of that one: what large sections need to find routes at all."""
DETOURS = 8
"""Times that streams are led by other ways, where they can't be kept apart."""
HOPELESS = 40
"""Links with which other seeds are not tried."""
CROWDED = Fraction(5, 4)
"""What a link may have to do, in its capacity, without that other places are tried."""

Smaller = Callable[[Limits], Choice | None]


@dataclass
class Kernel:
    """A section that is placed and routed, and what it was planned as."""

    name: str
    phase: str
    choice: Choice
    built: Built
    seconds: float
    blocked: int
    """Links that streams share with some that wait for others: what may end in a deadlock."""


@dataclass(frozen=True)
class Search:
    """Finds places and routes, from a first `seed` on.

    Parameters
    ----------
    params : RduParams
    seed : int
    moves : int
        Moves of the annealing; 0: as many as placement takes by itself.
    """

    params: RduParams
    seed: int
    moves: int

    def kernel(
        self, phase: str, choice: Choice, limits: Limits, smaller: Smaller | None = None, *, rows: bool = False,
        prefix: str = "",
    ) -> Kernel | None:  # fmt: skip
        """A section's kernel, or None if there are no routes.

        Where streams share links with some that wait for others, or a link has much more than its capacity, other places are
        tried; where the former are left, sections of fewer units than `limits`, as `smaller` plans them. The units of a
        section of `rows` have places by their stages; `prefix` is put before the kernel's name.
        """
        start = time.monotonic()
        best: tuple[tuple[int, Fraction, int], Choice, Built] | None = None
        while True:
            for number in range(TRIES):
                section = Section(self.params, f"{phase} {choice.name}")
                choice.line.prefix = prefix
                choice.line.into(section, choice.ticks(self.params))
                longer = number > 0 and not rows
                try:
                    at = choice.line.places() if rows else None
                    built = section.build(
                        seed=self.seed + number - longer,
                        moves=self.moves * (LONGER if longer else 1) or None,
                        at=at,
                    )
                except UserError:  # more streams on a link than it has flows
                    continue
                blocked, apart, held = self.kept_apart(choice, built)
                score = blocked, _load(held), len(held.netlist.units)  # tokens delay what they hold back
                if best is None or score < best[0]:
                    best = score, apart, held
                if not blocked and score[1] <= CROWDED:
                    break
                if blocked > HOPELESS and (longer or rows):
                    break
            if smaller is None or (best is not None and not best[0][0]):
                break
            limits = Limits(limits.pcu * 2 // 3, limits.pmu * 2 // 3, limits.agcu)
            fewer = smaller(limits)
            if fewer is None:
                break
            choice = fewer
        if best is None:
            return None
        (blocked, *_), choice, built = best
        return Kernel(prefix + choice.name, phase, choice, built, time.monotonic() - start, blocked)

    def kept_apart(self, choice: Choice, built: Built) -> tuple[int, Choice, Built]:
        """The section with the same places, in which tokens keep streams that clash apart, and the links on which some
        still do. Streams of which neither can wait for the other are led by other ways, one and the other in turn."""

        def on(clashes: Sequence[Clash]) -> int:
            return len({clash.queue for clash in clashes})

        if choice.line.blocks > 1:
            return _meetings(built, choice.line), choice, built
        avoid: dict[str, set[Queue]] = {}
        best: tuple[int, Choice, Built] | None = None
        for detour in range(DETOURS + 1):
            waits = Waits(choice.line, built)
            clashes = waits.clashes()
            if not clashes:
                return 0, choice, built
            if best is None:
                best = on(clashes), choice, built
            holds, left = waits.holds(clashes)
            if on(left) > HOPELESS:
                break
            section = Section(self.params, built.name)
            if not left:
                line = deepcopy(choice.line)
                line.hold_back(holds)
                line.into(section, choice.ticks(self.params))
                try:  # tokens have wires of their own; what joins them takes units that are left
                    held = section.build(like=built)
                except UserError:
                    break
                return on(Waits(line, held).clashes()), replace(choice, line=line), held
            for clash in left:
                avoid.setdefault(clash.before if detour % 2 else clash.stream, set()).add(clash.queue)
            choice.line.into(section, choice.ticks(self.params))
            try:
                built = section.build(like=built, avoid=avoid)
            except UserError:
                break
        return best or (0, choice, built)


def _load(built: Built) -> Fraction:
    """What the busiest overused link of the mesh has to do, in its capacity; 0 where none is."""
    r, capacity = built.routing, built.fabric.capacity
    return max(
        (r.loads[n][link] / capacity for n in r.overused for link in r.overused[n]), default=Fraction(0)
    )


def _meetings(built: Built, line: Pipeline) -> int:
    """Links of a prompt's section that a stream shares with one whose packets may wait on their way until others come.

    What is loaded is through before weights leave their memory units.
    """
    on: dict[tuple[str, int, int, int], list[str]] = {}
    for r in built.routing.routes.values():
        for hop in r.hops:
            for out in hop.outs:
                on.setdefault((r.stream.network, hop.x, hop.y, out), []).append(r.stream.source)

    def meet(sources: Sequence[str]) -> bool:
        rests = [s for s in sources if s in line.resting]
        if rests and all(s in line.later or s == LOADED for s in rests):
            sources = [s for s in sources if s not in line.loading]
        return bool(rests) and len(sources) > 1

    return sum(map(meet, on.values()))
