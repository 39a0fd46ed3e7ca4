# amaranth: UnusedElaboratable=no
# (one of these constructors raises)

"""Token wires: what leaves an output is at every input wired to it, as many ticks later as the way is long."""

from functools import cache
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rdu.units import simulate, small
from tilewright.arch.errors import UserError
from tilewright.arch.rdu import CONFIG_TOKEN, is_pcu
from tilewright.rtl.rdu.tokens import TokenNetwork, agcu_place
from tilewright.workloads import rdu_kernels as kernels

COLUMNS, ROWS, SIDE = 3, 2, 2


@cache
def network(token):
    sets = {
        "grid__columns": COLUMNS,
        "grid__rows": ROWS,
        "agcu__per_side": SIDE,
        "network__token_cycles": token,
    }
    return TokenNetwork(params=small(**sets))


def port(agcu, x, y):
    side = (SIDE if x else 0) + y
    return f"agcu_{side}" if agcu else f"{x}_{y}"


def run(token, records, sent, ticks, clear=(), start=()):
    """(tick, place, input) of every token that comes out.

    `records` are written one a tick from tick 0 on, in place of the last one behind the list; `sent` has (tick,
    place, output).
    """
    component, seen = network(token), []
    names = [name for name in component.signature.members if name.startswith(("from_", "to_"))]

    async def bench(ctx):
        for tick in range(ticks):
            ctx.set(component.enable, int(tick < len(records)))
            if tick < len(records):
                ctx.set(component.config, kernels.configuration(CONFIG_TOKEN, **records[tick]))
            ctx.set(component.clear, int(tick in clear))
            ctx.set(component.start, int(tick in start))
            for name in names:
                signal = getattr(component, name)
                if name.startswith("from_"):
                    ctx.set(signal, sum({1 << n for t, at, n in sent if t == tick and f"from_{at}" == name}))
            for name in names:
                if name.startswith("to_"):
                    mask = ctx.get(getattr(component, name))
                    seen.extend((tick, name[3:], n) for n in range(8) if mask >> n & 1)
            await ctx.tick()

    simulate(component, bench)
    return sorted(seen)


def wire(source, output, sink, taken, from_agcu=0, to_agcu=0):
    (x, y), (to_x, to_y) = source, sink
    return {"x": x, "y": y, "output": output, "to_x": to_x, "to_y": to_y, "input": taken,
            "from_agcu": from_agcu, "to_agcu": to_agcu}  # fmt: skip


@pytest.mark.parametrize("token", [1, 3])
def test_a_token_takes_as_long_as_its_way(token):
    # From (0, 0) to (2, 1) are 3 positions, to itself none: 3 + 1 and 0 + 1 times `token`.
    records = [wire((0, 0), 2, (2, 1), 1), wire((0, 0), 2, (0, 0), 3)]
    got = run(token, records, [(4, "0_0", 2), (5, "0_0", 2), (5, "0_0", 1)], 30)
    far, near = 4 * token, token
    assert got == sorted(
        [(4 + far, "2_1", 1), (5 + far, "2_1", 1), (4 + near, "0_0", 3), (5 + near, "0_0", 3)]
    )


def test_the_sides_of_a_pmu_and_gates_have_wires_of_their_own():
    # (1, 0) is a PMU: outputs 4..7 are its read side's. The gates at the east side are the third and the fourth.
    records = [
        wire((1, 0), 5, (1, 0), 1),
        wire((1, 0), 1, (1, 0), 5),
        wire((2, 1), 0, (0, 0), 2, from_agcu=1, to_agcu=1),
        wire((2, 1), 0, (0, 0), 2),
    ]
    sent = [(6, "1_0", 5), (8, "1_0", 1), (10, "agcu_3", 0), (11, "2_1", 0)]
    got = run(1, records, sent, 20)
    assert got == [(7, "1_0", 1), (9, "1_0", 5), (14, "agcu_0", 2), (15, "0_0", 2)]
    assert [agcu_place(small(grid__columns=3, agcu__per_side=2), i) for i in range(4)] == [
        (0, 0),
        (0, 1),
        (2, 0),
        (2, 1),
    ]


def test_an_input_has_one_source_the_last_one():
    records = [wire((0, 0), 0, (1, 1), 0), wire((2, 0), 0, (1, 1), 0)]
    assert run(1, records, [(3, "0_0", 0), (4, "2_0", 0)], 12) == [(7, "1_1", 0)]


def test_wires_are_cut_and_laid_anew():
    # Cut at 4, so that from 5 on nothing gets in; what was on its way arrives.
    sent = [(t, "0_0", 0) for t in range(3, 9)]
    assert run(1, [wire((0, 0), 0, (1, 0), 0)], sent, 14, clear=[4]) == [(5, "1_0", 0), (6, "1_0", 0)]


def test_a_start_forgets_what_is_on_its_way():
    # Those of 2 and 3 would arrive at 6 and 7; that of 4 enters in the tick of the start, and is lost, too.
    sent = [(t, "0_0", 0) for t in (1, 2, 3, 4, 5)]
    assert run(1, [wire((0, 0), 0, (2, 1), 0)], sent, 14, start=[4]) == [(9, "2_1", 0)]
    # One that would come out in the tick of the start.
    assert run(1, [wire((0, 0), 0, (2, 1), 0)], [(1, "0_0", 0)], 14, start=[5]) == []


ENDS = st.tuples(st.integers(0, 1), st.integers(0, COLUMNS - 1), st.integers(0, ROWS - 1), st.integers(0, 7))


@settings(deadline=None, max_examples=25)
@given(st.lists(st.tuples(ENDS, ENDS), max_size=6), st.integers(0, 99), st.sampled_from([1, 2]))
def test_random_wires(pairs, seed, token):
    def exists(end):
        agcu, x, y, n = end
        return x in (0, COLUMNS - 1) and n < 4 if agcu else n < (4 if is_pcu(x, y) else 8)

    wires = {b: a for a, b in pairs if exists(a) and exists(b)}
    records = [wire(a[1:3], a[3], b[1:3], b[3], a[0], b[0]) for b, a in wires.items()]
    random = Random(seed)
    sources = sorted(set(wires.values()))
    sent = [(t, a) for t in range(8, 16) for a in sources if random.random() < 0.5]
    got = run(token, records, [(t, port(*a[:3]), a[3]) for t, a in sent], 16 + 8)
    want = [
        (t + token * (abs(a[1] - b[1]) + abs(a[2] - b[2]) + 1), port(*b[:3]), b[3])
        for t, source in sent
        for b, a in wires.items()
        if a == source
    ]
    assert got == sorted(want)


def test_a_mesh_of_one_column_is_refused():
    # An AGCU is named by its switch, and in one column each would have two.
    with pytest.raises(UserError, match=r"grid.columns must be greater than or equal to 2, not 1"):
        small(grid__columns=1)
