"""Timings that can be added up by hand, and the closed forms that hold at any size.

The device of `strategies.device`: a page moves in 10 ticks, read 100, program 300, erase 1000; commands 2, and
1 for each further plane.
"""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.flash.strategies import device
from tilewright.arch.flash import ERASE, PROGRAM, READ, load_flash, operations
from tilewright.sim.flash import IllegalOperation, percentile, simulate


def run(spec, ops):
    return simulate(spec.params(), ops)


def stalls(r, unit):
    return {k: v for k, v in r.timeline.unit(unit).items() if v}


# ---- by hand ------------------------------------------------------------------------------------------


def test_one_read():
    # Command 0..1, array 2..101, data-out 102..111.
    spec = device((2, 1, 2, 1, 4, 8))
    r = run(spec, operations(spec, channel=1, die=1))
    assert (r.issued.tolist(), r.done.tolist(), r.timeline.ticks) == ([0], [112], 112)
    assert stalls(r, "channel 1") == {"busy": 12, "array": 100}
    assert stalls(r, "channel 0") == {"idle": 112}
    assert stalls(r, "die 1.0.1") == {"busy": 100, "transfer": 12}
    assert stalls(r, "die 1.0.0") == {"idle": 112}
    assert r.timeline.totals() == {
        "operations": 1, "commands": 1, "multi_plane_commands": 0, "bytes": 1000, "suspensions": 0,
    }  # fmt: skip
    assert r.channel_bytes.tolist() == [[0, 0], [1000, 0]]
    assert r.die_operations.tolist() == [[0, 0, 0]] * 3 + [[1, 0, 0]]


def test_mqsim_reads_one_page():
    # tCS + 6 tWC + tWB + tRR = 290 ns, tR = 75 us, 8192 B at 333 MB/s = 24600.6 ns.
    spec = load_flash("mqsim")
    assert run(spec, operations(spec)).done.tolist() == [290 + 75_000 + 24_601]
    # Two planes in one command: 290 + 650, one array time, two transfers.
    r = run(spec, operations(spec, plane=[0, 1]))
    assert r.done.tolist() == [940 + 75_000 + 24_601, 940 + 75_000 + 2 * 24_601]
    assert r.timeline.counter("multi_plane_commands") == 1


def test_a_part_of_a_page_moves_sooner():
    # 101 B are 1.01 ticks of a tenth of the page's 10: ceil(101 / 100) = 2.
    spec = device()
    assert run(spec, operations(spec, bytes=101)).done.tolist() == [2 + 100 + 2]


def test_program_and_erase():
    # Erase: command 0..1, array 2..1001. Program: 1002..1013 with its data, array until 1313.
    spec = device()
    ops = operations(spec, [ERASE, PROGRAM, PROGRAM, READ], page=[0, 0, 1, 0])
    # The read waits for page 0 only, and reads go first: 1314 + 2 + 100, out until 1426; then page 1.
    r = run(spec, ops)
    assert r.issued.tolist() == [0, 1002, 1426, 1314]
    assert r.done.tolist() == [1002, 1314, 1426 + 2 + 10 + 300, 1426]
    assert r.timeline.totals()["operations"] == 4 and r.most_erases == 1
    assert stalls(r, "die 0.0.0") == {"busy": 1700, "transfer": 2 + 12 + 12 + 12}


def test_cached_reads_overlap_array_and_data_out():
    # Plain: 2 + 100 + 10 each. Cached: the next command starts when the array ends, at 102 and 204.
    spec = device()
    ops = operations(spec, page=[0, 1, 2])
    assert run(spec, ops).done.tolist() == [112, 224, 336]
    cached = device(scheduler__cache_read=True)
    # The command goes before the data: data-out at 104 and 206; the last array ends at 306.
    assert run(cached, ops).done.tolist() == [114, 216, 316]
    # The move to the cache register makes each array time 5 longer.
    slower = device(scheduler__cache_read=True, cells__cache_busy_us=0.005)
    assert run(slower, ops).done.tolist() == [119, 226, 331]


def test_a_full_cache_register_holds_the_array_up():
    # Data-out of 200 ticks: the first until 304, while the second array ends at 204 and waits for the register.
    spec = device(scheduler__cache_read=True, interface__mb_per_s=5000)
    r = run(spec, operations(spec, page=[0, 1, 2]))
    # At 304 the second page moves; the third command goes first, 304..305, then data 306..505 and 506..705.
    assert r.issued.tolist() == [0, 102, 304] and r.done.tolist() == [304, 506, 706]
    # Arrays 2..101, 104..203 and 306..405; the rest is transfer, of commands or of pages that wait.
    assert stalls(r, "die 0.0.0") == {"busy": 300, "transfer": 406}


def test_dies_share_the_bus():
    # Pipelined: commands at 0 and 2; die 0 is out 102..111, then its next command 112..113, then die 1's data.
    spec = device((1, 1, 2, 1, 4, 8))
    ops = operations(spec, die=[0, 1, 0], page=[0, 0, 1])
    r = run(spec, ops)
    assert r.issued.tolist() == [0, 2, 112] and r.done.tolist() == [112, 124, 224]
    # Data-out first: die 1's data 112..121 goes before the command 122..123.
    r = run(device((1, 1, 2, 1, 4, 8), scheduler__policy="data-out-first"), ops)
    assert r.issued.tolist() == [0, 2, 122] and r.done.tolist() == [112, 122, 234]
    # Chip busy: die 1 waits until die 0's data is out; its sibling then waits for it.
    r = run(device((1, 1, 2, 1, 4, 8), scheduler__policy="chip-busy"), ops)
    assert r.issued.tolist() == [0, 112, 224] and r.done.tolist() == [112, 224, 336]
    assert stalls(r, "die 0.0.1") == {"busy": 100, "transfer": 12, "sibling": 112, "idle": 112}
    assert r.timeline.bound_by() == "die 0.0.0"


def test_chips_are_asked_round_robin():
    spec = device((1, 3, 1, 1, 4, 8), scheduler__policy="chip-busy")
    ops = operations(spec, chip=[2, 1, 0, 2, 1, 0], page=[0, 0, 0, 1, 1, 1])
    r = run(spec, ops)
    # From chip 0 on, whatever the trace says; and data-outs 102, 112, 122 before the next commands.
    assert r.issued.tolist() == [4, 2, 0, 136, 134, 132]


def test_multi_plane_takes_the_same_page_of_other_planes():
    spec = device((1, 1, 1, 4, 4, 8), scheduler__multi_plane=True)
    ops = operations(spec, plane=[0, 1, 1, 2, 3], page=[5, 6, 5, 5, 5], block=[0, 0, 1, 2, 3])
    r = run(spec, ops)
    # Four planes in 2 + 3 ticks of command; page 6 alone, after the data of the four: 5 + 100 + 40.
    assert r.issued.tolist() == [0, 145, 0, 0, 0]
    assert r.done.tolist() == [115, 145 + 112, 125, 135, 145]
    # Any page: plane 1 takes the first in the queue, page 6, and leaves page 5 behind.
    r = run(device((1, 1, 1, 4, 4, 8), scheduler__multi_plane=True, scheduler__same_page=False), ops)
    assert r.issued.tolist() == [0, 0, 145, 0, 0]
    # A window of two sees no more than planes 0 and 1.
    r = run(device((1, 1, 1, 4, 4, 8), scheduler__multi_plane=True, scheduler__window=2), ops)
    assert r.issued.tolist() == [0, 112, 112 + 123 - 11, 112 + 123 - 11, 112 + 112 + 112 + 11]


def test_multi_plane_programs_share_the_array_time():
    spec = device((1, 1, 1, 2, 4, 8), scheduler__multi_plane=True)
    r = run(spec, operations(spec, PROGRAM, plane=[0, 1], page=3))
    # 2 + 1 of command, two pages of 10, one program.
    assert r.done.tolist() == [3 + 20 + 300] * 2
    assert r.channel_bytes.tolist() == [[0, 2000]]


def test_a_read_suspends_an_erase():
    # The erase starts at 2. A read at 500: command 2 + 3 for the suspension, array 505 + 20 + 100 until 624, out
    # 625..634. The erase stopped at 500 with 502 ticks to go, and goes on at 635.
    spec = device(suspension__of="erase")
    ops = operations(spec, [ERASE, READ], block=[0, 1], arrival=[0, 500])
    r = run(spec, ops)
    assert r.issued.tolist() == [0, 500] and r.done.tolist() == [635 + 502, 635]
    assert r.timeline.counter("suspensions") == 1
    assert stalls(r, "die 0.0.0") == {"busy": 498 + 120 + 502, "transfer": 2 + 5 + 10}
    # Without suspension the read waits for 1002.
    plain = run(device(), ops)
    assert plain.issued.tolist() == [0, 1002] and plain.done.tolist() == [1002, 1114]


@pytest.mark.parametrize(("arrival", "suspends"), [(981, True), (982, False)])
def test_nothing_is_suspended_that_ends_sooner(arrival, suspends):
    # The erase ends at 1002: at 982 it has 20 ticks to go, no more than suspending takes.
    spec = device(suspension__of="erase")
    r = run(spec, operations(spec, [ERASE, READ], block=[0, 1], arrival=[0, arrival]))
    assert r.issued[1] == (arrival if suspends else 1002)


def test_suspensions_are_limited():
    spec = device(suspension__of="program", suspension__limit=2)
    ops = operations(spec, [PROGRAM, READ, READ, READ], block=[0, 1, 1, 1], arrival=[0, 20, 200, 400])
    # 12 + 8 done at 20; out at 20 + 5 + 120 + 10 = 155, goes on to 200 with 247 left; out at 335, to go on
    # until 335 + 247 = 582: the third read waits.
    r = run(spec, ops)
    assert r.issued.tolist() == [0, 20, 200, 582] and r.done[0] == 582
    assert r.timeline.counters[PROGRAM, r.timeline.counter_names.index("suspensions")] == 2


def test_nothing_but_reads_goes_to_a_unit_that_has_suspended():
    # Programs before reads, unlike any policy of ours. The read at 500 is out at 635, as above; the next goes at once,
    # 635 + 112 = 747; the erase ends 502 later; only then the program of 520.
    spec = device(suspension__of="erase")
    stages = np.array([[PROGRAM, -1, -1], [3, -1, -1], [READ, ERASE, -1]])
    ops = operations(spec, [ERASE, READ, READ, PROGRAM], block=[0, 1, 1, 2], arrival=[0, 500, 510, 520])
    r = simulate(spec.params()._replace(stages=stages), ops)
    assert r.issued.tolist() == [0, 500, 635, 747 + 502]


def test_a_read_of_the_suspended_page_waits_for_it():
    spec = device(suspension__of="both")
    r = run(spec, operations(spec, [PROGRAM, READ], arrival=[0, 100]))
    assert r.issued.tolist() == [0, 312] and r.timeline.counter("suspensions") == 0


def test_queue_depth():
    # One at a time: 112 ticks each, admitted when the one before is done.
    spec = device((2, 1, 1, 1, 4, 8), scheduler__queue_depth=1)
    r = run(spec, operations(spec, channel=[0, 1, 0]))
    assert r.admitted.tolist() == [0, 112, 224] and r.done.tolist() == [112, 224, 336]
    assert r.latency(READ).tolist() == [112] * 3
    assert stalls(r, "channel 1") == {"busy": 12, "array": 100, "host": 112, "idle": 112}


def test_page_types_have_their_times():
    changes = {
        f"cells__{k}_{t}_us": v
        for k in ("read", "program")
        for t, v in (("lsb", 0.1), ("csb", 0.2), ("msb", 0.4))
    }
    spec = device((1, 1, 1, 1, 4, 16), cells__page_types="tlc", **changes)
    assert spec.params().read.tolist() == [100] * 6 + [200] * 2 + [100, 100, 200, 200, 400, 400, 100, 100]
    spec = device((1, 1, 1, 1, 4, 4), cells__page_types="mlc", **changes)
    assert spec.params().program.tolist() == [100, 400, 100, 400]
    assert run(spec, operations(spec, page=3)).done.tolist() == [412]


def test_percentiles_are_values_that_occurred():
    values = np.array([1, 2, 3, 4])
    assert [percentile(values, q) for q in (0, 25, 26, 50, 75, 76, 100)] == [1, 1, 2, 2, 3, 4, 4]


# ---- what a block allows ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kinds", "pages", "index", "message"),
    [
        (
            [PROGRAM, PROGRAM],
            [2, 2],
            1,
            "page 2 of channel 0 chip 0 die 0 plane 0 block 0 is programmed already",
        ),
        ([PROGRAM, PROGRAM], [2, 1], 1, "is programmed already: erase the block first"),
        ([PROGRAM, PROGRAM], [2, 4], 1, "must be programmed in order: 3 is next, not 4"),
        ([ERASE, PROGRAM], [0, 1], 1, "must be programmed in order: 0 is next, not 1"),
        ([READ, PROGRAM], [5, 5], 1, "page 5 of .* is programmed already"),
        ([PROGRAM, READ], [2, 3], 1, "page 3 of .* is erased: 3 of its pages are programmed"),
        ([ERASE, READ], [0, 0], 1, "page 0 of .* is erased: 0 of its pages are programmed"),
        ([ERASE, ERASE, ERASE], [0, 0, 0], 2, "is erased more than 2 times, which is its endurance"),
    ],
)
def test_illegal_operations(kinds, pages, index, message):
    spec = device(cells__endurance=2)
    with pytest.raises(IllegalOperation, match=message) as caught:
        run(spec, operations(spec, kinds, page=pages))
    assert caught.value.index == index


def test_blocks_are_apart():
    spec = device((1, 1, 1, 2, 4, 8))
    r = run(spec, operations(spec, PROGRAM, page=2, block=[0, 1, 0, 1], plane=[0, 0, 1, 1]))
    assert (r.done > 0).all()


def test_a_trace_that_leaves_the_integers_is_refused():
    from tilewright.arch.errors import UserError

    wide = ["geometry.channels=1024", "geometry.chips_per_channel=1024", "geometry.blocks_per_plane=16"]
    spec = load_flash("mqsim", ["cells.erase_us=1e9", "placement.spare_blocks=1", *wide])
    with pytest.raises(UserError, match="too long to be counted"):
        run(spec, operations(spec, ERASE, chip=np.arange(1000), arrival=0))


# ---- laws ---------------------------------------------------------------------------------------------
# t_c command, t_r array, t_x transfer of a page; n dies share a channel, p planes join in a command; a die has
# the channel for s = p t_x + t_c in each round. Per page the law in the steady state is the larger of s / p (the
# channel) and (t_c + t_r + p t_x) / (n p) (the dies), or (t_c + t_r) / (n p) with cached reads.


def stripe(spec, rounds):
    """Reads of `rounds` pages from every plane of channel 0, in the order channel, way, die, plane."""
    g = spec.geometry
    row = np.arange(rounds)[:, None, None, None]
    chip = np.arange(g.chips_per_channel)[:, None, None]
    die, plane = np.arange(g.dies_per_chip)[:, None], np.arange(g.planes_per_die)
    block, page = np.divmod(row, g.pages_per_block)
    return operations(spec, READ, chip=chip, die=die, plane=plane, block=block, page=page)


def timed(chips, dies, planes, t_c, t_r, t_x, cached):
    return device(
        (1, chips, dies, planes, 64, 32), geometry__page_bytes=t_x, interface__mb_per_s=1000,
        interface__read_command_ns=t_c, interface__read_command_plane_ns=0, cells__read_lsb_us=t_r / 1000,
        scheduler__policy="pipelined", scheduler__multi_plane=True, scheduler__cache_read=cached,
        scheduler__window=64,
    )  # fmt: skip


SHAPES = {
    "chips": st.integers(1, 4), "dies": st.integers(1, 3), "planes": st.integers(1, 4),
    "t_c": st.integers(0, 9), "t_r": st.integers(1, 400), "t_x": st.integers(1, 60),
}  # fmt: skip


@settings(max_examples=40)
@given(**SHAPES, cached=st.booleans(), count=st.integers(1, 5))
def test_l0_one_at_a_time_takes_the_sum(chips, dies, planes, t_c, t_r, t_x, cached, count):
    spec = timed(chips, dies, planes, t_c, t_r, t_x, cached)
    one = load_with(spec, queue_depth=1)
    r = run(one, stripe(one, count))
    assert (r.latency(READ) == t_c + t_r + t_x).all()
    assert r.timeline.ticks == count * chips * dies * planes * (t_c + t_r + t_x)


def load_with(spec, **scheduler):
    return spec.model_copy(update={"scheduler": spec.scheduler.model_copy(update=scheduler)})


@settings(max_examples=150)
@given(**SHAPES, rounds=st.integers(1, 60))
def test_l1_pipelined(chips, dies, planes, t_c, t_r, t_x, rounds):
    spec = timed(chips, dies, planes, t_c, t_r, t_x, cached=False)
    n, p = chips * dies, planes
    s = p * t_x + t_c
    pages = rounds * n * p
    ticks = run(spec, stripe(spec, rounds)).timeline.ticks
    law = t_r + t_c + pages * max(Fraction(t_x), Fraction(t_r + s, n * p))
    if n * s <= t_r + s:
        # Dies limit: a round takes t_r + s. Between the data of two dies the first one's next command goes by,
        # so that they stay s apart; in the first round, only the data or the command.
        apart = s if rounds > 1 else max(p * t_x, t_c)
        assert ticks == rounds * (t_r + s) + (n - 1) * apart
        assert law - (t_r + t_c) <= ticks <= law
    elif t_c == 0 and (n - 1) * p * t_x >= t_r:
        # The channel limits, and never waits after the first page: the law as it stands.
        assert ticks == t_r + pages * t_x == law


@settings(max_examples=150)
@given(**SHAPES, rounds=st.integers(1, 60))
def test_l1c_cached(chips, dies, planes, t_c, t_r, t_x, rounds):
    spec = timed(chips, dies, planes, t_c, t_r, t_x, cached=True)
    n, p = chips * dies, planes
    pages = rounds * n * p
    ticks = run(spec, stripe(spec, rounds)).timeline.ticks
    law = t_r + t_c + pages * max(Fraction(t_x), Fraction(t_r + t_c, n * p))
    if n * (p * t_x + t_c) <= t_r + t_c:
        # Dies limit: a round takes t_r + t_c, and the last round's data comes at the end.
        assert ticks == rounds * (t_r + t_c) + max(n * p * t_x, (n - 1) * t_c + p * t_x)
        assert ticks <= law
    elif t_c == 0:
        assert ticks == t_r + pages * t_x == law


@settings(max_examples=80)
@given(**SHAPES, cached=st.booleans())
def test_the_rate_in_the_steady_state(chips, dies, planes, t_c, t_r, t_x, cached):
    # From round 40 to 60, whatever limits: the law's ticks for each page, commands counted on the channel.
    spec = timed(chips, dies, planes, t_c, t_r, t_x, cached)
    n, p = chips * dies, planes
    s = p * t_x + t_c
    short, long = (run(spec, stripe(spec, rounds)).timeline.ticks for rounds in (40, 60))
    assert long - short == 20 * max(n * s, t_r + (t_c if cached else s))


@settings(max_examples=60)
@given(**SHAPES, rounds=st.integers(2, 30), policy=st.sampled_from(["data-out-first", "chip-busy"]))
def test_no_policy_beats_what_the_bus_and_the_arrays_allow(
    chips, dies, planes, t_c, t_r, t_x, rounds, policy
):
    spec = load_with(timed(chips, dies, planes, t_c, t_r, t_x, cached=False), policy=policy)
    n, p = chips * dies, planes
    s = p * t_x + t_c
    one_at_a_time = chips if policy == "chip-busy" else n
    bound = max(rounds * n * s, rounds * n * (t_r + s) // one_at_a_time)
    line = run(spec, stripe(spec, rounds)).timeline
    assert line.ticks >= bound
    assert line.unit("channel 0")["busy"] == rounds * n * s


def test_data_out_first_moves_in_convoys():
    # 4 dies, t_x = 10, t_r = 20, t_c = 0. Pipelined the channel never waits: 20 + 40 pages x 10. With data-out
    # first all four commands wait for all four pages, so every round costs t_r again: 10 x (20 + 40).
    spec = timed(2, 2, 1, 0, 20, 10, cached=False)
    assert run(spec, stripe(spec, 10)).timeline.ticks == 20 + 400
    spec = load_with(spec, policy="data-out-first")
    assert run(spec, stripe(spec, 10)).timeline.ticks == 10 * 60
