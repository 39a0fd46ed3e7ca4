"""Streams that clash on shared links: found, kept apart by tokens, and no deadlock where there are none."""

from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rdu.units import small
from tilewright.arch.errors import UserError
from tilewright.arch.rdu import COUNTERS, LEVELS
from tilewright.mappers.rdu.section import Section
from tilewright.mappers.rdu.stages import Pipeline
from tilewright.mappers.rdu.waits import Waits
from tilewright.sim.rdu import execute

PARAMS = small(
    grid__columns=4, grid__rows=4, agcu__per_side=2, pcu__lanes=8, pcu__stages=8, pmu__banks=32, pmu__bytes=65536,
    memory__hbm__bytes=1048576, memory__hbm__channels=4, network__fifo_depth=4,
)  # fmt: skip
LANES = 8


def compute(line, name, inputs, packets):
    """A unit that takes a packet of each input in each iteration."""
    line.unit(
        name, "pcu", "t", mode="simd", vectors=(1 << len(inputs)) - 1, count0=packets, signal_level=LEVELS
    )
    line.work[name] = packets
    for port, source in enumerate(inputs):
        line.feed(source, name, port)
    return name


def memory(line, name, source, packets):
    """A unit that is filled, and then read once."""
    chains = {
        **line.chain(name, "write_", [(packets, LANES)]),
        **line.chain(name, "read_", [(packets, LANES)]),
    }
    line.unit(
        name,
        "pmu",
        "t",
        enable=3,
        words=packets * LANES,
        **chains,
        write_signal_level=LEVELS,
        read_wait_level=LEVELS,
    )
    line.work[name] = packets
    line.wire(f"{name}.write", f"{name}.read")
    line.feed(source, name)
    return name


def build(line, at=None, like=None):
    section = Section(PARAMS)
    line.into(section)
    if like is not None:
        return section.build(like=like)
    return section.build(at=at, moves=0, turns="xy", remember=False)


def test_a_load_behind_what_it_fills():
    # A gate fills first `a`, then `b`; both stream to `sum`, a packet each an iteration.
    #
    #   load -> s 0,0 ==> s 1,0 ==> s 2,0 --> s 3,0      a's packets fill the link from 1,0 to 2,0 while they wait for b's,
    #                    a ^ v a    sum v     b v ^ b     which are still to come through it.
    #
    line = Pipeline(PARAMS)
    line.streamed("w", "t", "weights", [[("a", 200, "t"), ("b", 200, "t")]])
    compute(line, "sum", ["a", "b"], 200)
    built = build(line, {"w.load0": (0, 0), "a": (1, 0), "sum": (2, 0), "b": (3, 0)})
    with pytest.raises(UserError, match=r"stand on link 1,0 -> 2,0|room on link 1,0 -> 2,0"):
        execute(PARAMS, built.records)
    waits = Waits(line, built)
    clashes = waits.clashes()
    assert {(c.stream, c.before, c.queue) for c in clashes} == {("w.load0", "a", ("vector", 2, 0, 3))}
    # What reads `a` begins when `b` is filled, to which all of the gate's packets go that take the link.
    assert waits.holds(clashes) == ({"a.read": ["b.write"]}, [])
    line.hold_back({"a.read": ["b.write"]})
    held = build(line, like=built)
    assert not Waits(line, held).clashes()
    done = execute(PARAMS, held.records)
    steps = done.counters[:, COUNTERS.index("iterations")]
    assert steps[done.units.index("pcu@2,0")] == 200


def test_as_few_as_a_link_holds_do_not_clash():
    line = Pipeline(PARAMS)
    line.streamed("w", "t", "weights", [[("a", 4, "t"), ("b", 4, "t")]])
    compute(line, "sum", ["a", "b"], 4)
    built = build(line, {"w.load0": (0, 0), "a": (1, 0), "sum": (2, 0), "b": (3, 0)})
    assert not Waits(line, built).clashes()
    assert execute(PARAMS, built.records).ticks > 0


def test_operands_of_one_unit_can_not_be_kept_apart():
    # Both go from 2,1 to 2,2, and neither can be through before the other begins.
    line = Pipeline(PARAMS)
    for name in ("a", "b"):
        line.streamed(name, "t", name, [[(name, 200, "t")]])
    compute(line, "sum", ["a", "b"], 200)
    built = build(line, {"a.load0": (0, 0), "b.load0": (0, 1), "a": (1, 0), "b": (0, 1), "sum": (2, 2)})
    waits = Waits(line, built)
    clashes = waits.clashes()
    assert {(c.stream, c.before) for c in clashes} == {("a", "b"), ("b", "a")}
    assert {c.queue for c in clashes} == {("vector", 2, 2, 0)}
    assert waits.holds(clashes) == ({}, clashes)


def drawn(seed):
    """Levels of compute units between memory units, at random places: with links of its own for each stream it ends, since
    all that a level's units take is there when they begin."""
    random = Random(seed)
    line, packets = Pipeline(PARAMS), random.choice([3, 24, 40])
    ready = []
    for i in range(random.randint(1, 3)):
        names = [f"m{i}.{k}" for k in range(random.randint(1, 2))]
        line.streamed(f"w{i}", "t", f"w{i}", [[(name, packets, "t") for name in names]])
        ready += names
    kept = ready[:]
    for level in range(random.randint(1, 3)):
        # A memory unit is read by units of one level only.
        given = random.sample(ready, random.randint(1, len(ready)))
        ready = [name for name in ready if name not in given]
        for k in range(random.randint(1, 2)):
            inputs = random.sample(given, min(len(given), random.randint(1, 3)))
            unit = compute(line, f"c{level}.{k}", inputs, packets)
            ready.append(memory(line, f"r{level}.{k}", unit, packets))
    for name in [*kept, *(n for n in line.units if n.startswith("r"))]:
        if name not in line.sinks:  # nobody reads it
            line.units[name].fields["enable"] = 1
    places = {kind: [] for kind in ("pcu", "pmu", "agcu")}
    for y in range(4):
        for x in range(4):
            places["pmu" if (x + y) % 2 else "pcu"].append((x, y))
    places["agcu"] = [(x, y) for x in (0, 3) for y in (0, 1)]
    for some in places.values():
        random.shuffle(some)
    if any(line.count(kind) > len(some) for kind, some in places.items()):
        return None
    return line, {name: places[u.kind].pop() for name, u in line.units.items()}


def outcome(seed):
    """Whether streams clash, and whether the model comes to a deadlock, before they are kept apart and after; None for what
    does not fit."""
    found = drawn(seed)
    if found is None:
        return None
    line, at = found
    built = build(line, at)
    waits = Waits(line, built)
    clashes = waits.clashes()

    def stuck(section):
        try:
            execute(PARAMS, section.records)
        except UserError as error:
            assert "deadlock" in str(error)
            return True
        return False

    before = stuck(built)
    assert clashes or not before, "a deadlock that was not foreseen"
    holds, left = waits.holds(clashes)
    if not clashes or left:
        return bool(clashes), before, None
    line.hold_back(holds)
    try:
        held = build(line, like=built)
    except UserError:  # no units are left to join the tokens
        return True, before, None
    assert not Waits(line, held).clashes()
    after = stuck(held)
    assert not after
    return True, before, after


@settings(deadline=None, max_examples=60)
@given(st.integers(0, 1 << 30))
def test_sections_without_clashes_end(seed):
    outcome(seed)


def test_what_is_drawn_clashes_and_is_kept_apart():
    """The property above has something to say: deadlocks, some of which tokens resolve, and sections without clashes."""
    seen = {outcome(seed) for seed in range(200)}
    assert {(False, False, None), (True, True, None), (True, True, False), (True, False, False)} <= seen
