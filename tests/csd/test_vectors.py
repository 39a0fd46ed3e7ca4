"""What kernels share: turns, and the vectors' two ports."""

from amaranth.sim import Simulator

from tests.csd.units import small_spec
from tests.lib.ticks import play
from tilewright.rtl.csd.vectors import Turns, Vectors

P = small_spec().params()


def test_a_unit_is_given_back_before_it_is_given_anew():
    # Both want it from tick 1; the first one has it until 3, the second one, alone, from 4 to 5, and again from 6.
    releases = {3: 0b01, 5: 0b10}
    wants = {0: 0, 1: 0b11, 4: 0b10}
    seen = play(
        Turns(users=2),
        8,
        lambda t, _: (
            {"releases": releases.get(t, 0), "clear": 0} | ({"wants": wants[t]} if t in wants else {})
        ),
        ["has"],
    )
    assert [s["has"] for s in seen] == [0, 1, 1, 1, 2, 2, 2, 2]


def test_who_has_it_keeps_it_without_wanting_it():
    seen = play(Turns(users=2), 5, lambda t, _: {"wants": 0b01 if t == 0 else 0b10, "releases": 0}, ["has"])
    assert [s["has"] for s in seen] == [1] * 5


def test_a_run_begins_with_nobody():
    seen = play(Turns(users=2), 4, lambda t, _: {"wants": 0b10 if t else 0b01, "clear": t == 1}, ["has"])
    assert [s["has"] for s in seen] == [1, 1, 2, 2]


def test_kernels_take_turns_behind_the_writer():
    unit = Vectors(params=P, users=2, black_box=False)
    seen = []

    async def bench(ctx):
        ctx.set(unit.read_from[1], 1)
        ctx.set(unit.write_to[1], 1)
        ctx.set(unit.write_data[1], 99)
        ctx.set(unit.first_from, 2)
        for tick in range(10):
            # The writer fills lines 0 to 3, then reads line 2 in tick 6; kernels ask for lines 0 and 1 from 5 on, and
            # the second one wants to write line 1 from 2 on.
            for port, value in (
                (unit.first_write, tick < 4),
                (unit.first_to, tick),
                (unit.first_data, 10 + tick),
                (unit.first_read, tick == 6),
                (unit.read, 0b11 if tick >= 5 else 0),
                (unit.write, 0b10 if 2 <= tick < 5 else 0),
            ):
                ctx.set(port, value)
            names = ("reads", "data", "writes", "read_lines", "written_lines")
            seen.append([ctx.get(getattr(unit, name)) for name in names])
            await ctx.tick()

    simulator = Simulator(unit)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    reads, data, writes, read_lines, written_lines = zip(*seen, strict=True)
    assert reads == (0, 0, 0, 0, 0, 1, 0, 2, 1, 2)
    assert data[6:] == (10, 12, 99, 10)
    assert writes == (0, 0, 0, 0, 2, 0, 0, 0, 0, 0)
    assert read_lines == (0, 0, 0, 0, 0, 1, 1, 1, 1, 1)
    assert written_lines == (1, 1, 1, 1, 1, 0, 0, 0, 0, 0)
