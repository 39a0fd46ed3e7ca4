"""When a command may issue, and what it waits for: the kernels through `DramChannel` and by themselves."""

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.inner import called
from tilewright.arch.dram import GDDR6, Command, Effect, Needs, Scope, evaluate, load_dram_preset
from tilewright.arch.errors import UserError
from tilewright.sim import dram as sim
from tilewright.sim.dram import (
    DramChannel,
    IllegalCommand,
    legal_state,
    new_state,
    ready_tick,
    record,
)

PRESET = load_dram_preset("gddr6-14000-1250mv")
P = PRESET.compile()
NAMES = GDDR6.command_names
ACT, RD, REFAB = NAMES.index("ACT"), NAMES.index("RD"), NAMES.index("REFab")


def channel(standard=GDDR6):
    return DramChannel(standard, PRESET.timing, PRESET.organisation)


# Bank 0 and 1 share bank group 0; bank 4 is in group 1. Each row: commands with their ticks, then a command
# that is blocked one tick before the last number and legal at it.
HAND = [
    # n_rcd_rd 30, n_rcd_wr 20
    ([("ACT", 0, 0)], ("RD", 0), 30),
    ([("ACT", 0, 0)], ("WRA", 0), 20),
    # n_ras 60; n_rtp 4 after a late read; n_cwl 6 + n_bl 2 + n_wr 30 = 38 after a write
    ([("ACT", 0, 0)], ("PREpb", 0), 60),
    ([("ACT", 0, 0), ("RD", 0, 100)], ("PREpb", 0), 104),
    ([("ACT", 0, 0), ("WR", 0, 100)], ("PREab", 0), 138),
    # n_rp 30 after a late precharge, n_rc 90 after an early one
    ([("ACT", 0, 0), ("PREpb", 0, 70)], ("ACT", 0), 100),
    ([("ACT", 0, 0), ("PREpb", 0, 60)], ("ACT", 0), 90),
    # n_ccd_l 4 in the group, max(n_bl 2, n_ccd_s 2) beside it
    ([("ACT", 0, 0), ("ACT", 1, 11), ("RD", 0, 100)], ("RD", 1), 104),
    ([("ACT", 0, 0), ("ACT", 4, 11), ("RD", 0, 100)], ("RD", 4), 102),
    # read to write n_cl 24 + 1; write to read n_cwl 6 + n_bl 2 + n_wtr_s 9 = 17, n_wtr_l 11: 19
    ([("ACT", 0, 0), ("RD", 0, 100)], ("WR", 0), 125),
    ([("ACT", 0, 0), ("ACT", 4, 11), ("WR", 0, 100)], ("RD", 4), 117),
    ([("ACT", 0, 0), ("ACT", 1, 11), ("WR", 0, 100)], ("RD", 1), 119),
    # n_rrd_s 11
    ([("ACT", 0, 0)], ("ACT", 4), 11),
    # auto-precharge: n_rtp 4 + n_rp 30; n_cwl 6 + n_bl 2 + n_wr 30 + n_rp 30 = 68
    ([("ACT", 0, 0), ("RDA", 0, 100)], ("ACT", 0), 134),
    ([("ACT", 0, 0), ("WRA", 0, 100)], ("REFab", 0), 168),
    # n_ppd 2; precharge to refresh n_rp 30
    ([("PREpb", 0, 5)], ("PREpb", 4), 7),
    ([("ACT", 0, 0), ("PREpb", 0, 200)], ("REFab", 0), 230),
    # n_rfc 211; n_rfc_pb 106 to its bank and to REFab, n_rrefd 22 to another bank
    ([("REFab", 0, 0)], ("ACT", 0), 211),
    ([("REFpb", 0, 0)], ("ACT", 0), 106),
    ([("REFpb", 0, 0)], ("ACT", 4), 22),
    ([("REFpb", 0, 0)], ("REFab", 0), 106),
]


@pytest.mark.parametrize(("issued", "probed", "tick"), HAND)
def test_hand_written_timings(issued, probed, tick):
    ch = channel()
    for command, bank, at in issued:
        ch.issue(command, bank, 0, tick=at)
    assert not ch.probe(*probed, tick=tick - 1)
    assert ch.probe(*probed, tick=tick)
    assert ch.earliest(*probed) == tick


BANKS = {  # banks of the preceding and following command, inside and outside the scope
    Scope.CHANNEL: ((0, 15), None),
    Scope.BANKGROUP: ((4, 7), (4, 8)),
    Scope.BANK: ((5, 5), (5, 6)),
}
ROWS = [(c, p, f) for c in GDDR6.constraints for p, f in GDDR6.pairs(c)]


@pytest.mark.parametrize(("constraint", "p", "f"), ROWS, ids=[f"{c.title}: {p} {f}" for c, p, f in ROWS])
def test_each_constraint_alone(constraint, p, f):
    stateless = tuple(Command(c.name, c.scope) for c in GDDR6.commands)
    alone = replace(GDDR6, commands=stateless, constraints=(constraint,))
    inside, outside = BANKS[constraint.scope]
    ready = evaluate(constraint.latency, PRESET.timing)
    for (bank_p, bank_f), expected in ((inside, ready), (outside, None)):
        ch = channel(alone)
        for tick in range(constraint.window):  # the oldest, at tick 0, is the one that counts
            assert ch.probe(f, bank_f, 0, tick=tick)
            ch.issue(p, bank_p, 0, tick=tick)
        if expected is None:
            assert ch.probe(f, bank_f, 0, tick=constraint.window)
            continue
        assert expected > constraint.window
        assert not ch.probe(f, bank_f, 0, tick=expected - 1)
        assert ch.probe(f, bank_f, 0, tick=expected)
        if outside is None:
            break


def test_a_fifth_act_waits_for_the_window():
    # n_rrd_s 11 spaces four ACTs at 0, 11, 22, 33; the fifth could follow at 44, the window of 43 is met.
    # With n_faw 60 it is what binds: 0 + 60.
    for n_faw, fifth, cause in ((43, 44, None), (60, 60, "activate_rate")):
        ch = DramChannel(GDDR6, dict(PRESET.timing) | {"n_faw": n_faw}, PRESET.organisation)
        for i in range(4):
            ch.issue("ACT", 4 * i, 0, tick=11 * i)
        assert not ch.probe("ACT", 1, 0, tick=fifth - 1)
        assert ch.probe("ACT", 1, 0, tick=fifth)
        stalls = np.zeros(7, np.int64)
        called(sim.charge)(ch.params, ch.state, ACT, 1, 44, fifth, stalls)
        assert {GDDR6.causes[i]: n for i, n in enumerate(stalls) if n} == ({cause: 16} if cause else {})
        # The window slides: the sixth counts from the second, 11 + n_faw.
        ch.issue("ACT", 1, 0, tick=fifth)
        assert ch.earliest("ACT", 5, 0) == max(fifth + 11, 11 + n_faw)


def test_window_of_1350_mv_binds():
    # n_rrd_s 8: ACTs at 0, 8, 16, 24; 24 + 8 = 32 is past the window of 29.
    ch = DramChannel.from_preset("gddr6-14000-1350mv")
    for i in range(4):
        ch.issue("ACT", 4 * i, 0, tick=8 * i)
    assert ch.earliest("ACT", 1, 0) == 32


@pytest.mark.parametrize("command", NAMES)
def test_nothing_issues_during_an_all_bank_refresh(command):
    ch = channel()
    ch.issue("REFab", tick=7)
    assert ch.earliest(command, 3, 0) == 7 + 211


def test_bank_state():
    ch = channel()
    for command in ("RD", "WR", "RDA", "WRA"):
        with pytest.raises(IllegalCommand, match=f"{command} to bank 3 at tick 999: needs OPEN"):
            ch.issue(command, 3, tick=999)
    ch.issue("ACT", 3, 17, tick=0)
    assert ch.probe("RD", 3, tick=30) and ch.probe("RD", 3, 17, tick=30)
    assert not ch.probe("RD", 3, 18, tick=30)  # another row is open
    assert not ch.probe("ACT", 3, 17, tick=999)
    assert not ch.probe("REFab", tick=999) and not ch.probe("REFpb", 3, tick=999)
    assert ch.probe("REFpb", 2, tick=999)
    ch.issue("RDA", 3, 17, tick=100)
    assert not ch.probe("RD", 3, tick=999)
    assert ch.probe("ACT", 3, 17, tick=999) and ch.probe("REFab", tick=999)
    ch.reset()
    assert ch.probe("ACT", 3, 17, tick=0)


def test_all_open_and_bank_group_commands():
    standard = GDDR6.extend(
        "X",
        [
            Command("MAC16", Scope.CHANNEL, Needs.ALL_OPEN),
            Command("ACT4", Scope.BANKGROUP, Needs.CLOSED, Effect.OPEN),
            Command("ACT16", Scope.CHANNEL, Needs.ALL_CLOSED, Effect.OPEN_ALL),
        ],
    )
    ch = channel(standard)
    for group in range(3):
        ch.issue("ACT4", 4 * group + 1, 9, tick=group)
    np.testing.assert_array_equal(ch.state.open_row, [9] * 12 + [-1] * 4)
    assert not ch.probe("ACT4", 11, 9, tick=99) and ch.probe("ACT4", 12, 9, tick=99)
    for bank in (12, 13, 14):
        ch.issue("ACT", bank, 9, tick=100 * bank)
    assert not ch.probe("MAC16", tick=9999)  # one bank is closed
    ch.issue("ACT", 15, 9, tick=1500)
    assert ch.probe("MAC16", row=9, tick=9999) and not ch.probe("MAC16", row=8, tick=9999)
    assert not ch.probe("ACT16", row=9, tick=9999)
    ch.issue("PREab", tick=2000)
    ch.issue("ACT16", row=5, tick=2100)
    np.testing.assert_array_equal(ch.state.open_row, [5] * 16)


def test_one_command_a_tick_and_no_way_back():
    ch = channel()
    ch.issue("PREpb", 0, tick=10)
    assert not ch.probe("ACT", 9, 0, tick=10)
    assert ch.probe("ACT", 9, 0, tick=11)
    with pytest.raises(IllegalCommand, match="ACT to bank 9 at tick 3: earliest tick is 11"):
        ch.issue("ACT", 9, 0, tick=3)


def test_bad_addresses_are_refused():
    ch = channel()
    with pytest.raises(UserError, match="unknown command 'ACTT', did you mean ACT"):
        ch.probe("ACTT", tick=0)
    with pytest.raises(UserError, match="ACT bank must be 0 to 15, not 16"):
        ch.issue("ACT", 16, 0, tick=0)
    for row in (-1, 16384):
        with pytest.raises(UserError, match=f"ACT row must be 0 to 16383, not {row}"):
            ch.issue("ACT", 0, row, tick=0)


def test_stalls_by_hand():
    # ACT of bank 0 at 0, ACT of bank 4 at 11; RD of bank 4 wanted from 12 on may issue at 41: 29 ticks of n_rcd_rd.
    ch = channel()
    ch.issue("ACT", 0, 0, tick=0)
    ch.issue("ACT", 4, 0, tick=11)
    stalls = np.zeros(7, np.int64)
    called(sim.charge)(ch.params, ch.state, RD, 4, 12, 41, stalls)
    assert dict(zip(GDDR6.causes, stalls.tolist(), strict=True))["activate"] == 29 == stalls.sum()
    # PREpb of bank 0 at 60. ACT of bank 0 from 61: n_rp until 90, and n_rc (90) adds nothing after that.
    ch.issue("PREpb", 0, tick=60)
    stalls[:] = 0
    called(sim.charge)(ch.params, ch.state, ACT, 0, 61, 90, stalls)
    assert stalls.tolist() == [0, 29, 0, 0, 0, 0, 0]


histories = st.lists(
    st.tuples(st.integers(0, len(NAMES) - 1), st.integers(0, 15), st.integers(1, 40)), max_size=30
)


@settings(deadline=None, max_examples=150)
@given(histories, st.integers(0, len(NAMES) - 1), st.integers(0, 15), st.integers(0, 5), st.integers(0, 400))
def test_waterfall(history, command, bank, gap, length):
    s = new_state(P)
    tick = 0
    past = []
    for c, b, step in history:
        tick += step
        record(P, s, c, b, 0, tick)
        past.append((tick, c, b))
    start = tick + gap

    def unmet(t):
        """The causes with an unmet constraint in tick t, straight from the standard."""
        found = set()
        for c in GDDR6.constraints:
            for p, f in GDDR6.pairs(c):
                if f == NAMES[command]:
                    width = {Scope.CHANNEL: 16, Scope.BANKGROUP: 4, Scope.BANK: 1}[c.scope]
                    ticks = [at for at, q, b in past if NAMES[q] == p and b // width == bank // width]
                    if len(ticks) >= c.window and t < ticks[-c.window] + evaluate(c.latency, PRESET.timing):
                        found.add(GDDR6.causes.index(c.cause))
        return found

    stalls = np.zeros(7, np.int64)
    called(sim.charge)(P, s, command, bank, start, start + length, stalls)
    expected = np.zeros(7, np.int64)
    for t in range(start, start + length):
        causes = unmet(t)
        if not causes:
            break  # once all are met, all stay met
        expected[min(causes)] += 1
    np.testing.assert_array_equal(stalls, expected)

    ready = max(start, ready_tick(P, s, command, bank))
    stalls[:] = 0
    called(sim.charge)(P, s, command, bank, start, ready, stalls)
    assert stalls.sum() == ready - start
    assert not unmet(ready) and (ready == start or unmet(ready - 1))


def test_channel_commands_ignore_the_bank():
    s = new_state(P)
    record(P, s, REFAB, -5, -1, 100)
    assert ready_tick(P, s, REFAB, 10**6) == 311
    assert legal_state(P, s, REFAB, 10**6, -1)
