"""The in-order scheduler, judged by the independent checker."""

import json
import os
import subprocess
import sys
from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.arch.dram import GDDR6, Command, Constraint, Issued, Needs, Request, Scope, load_dram_preset
from tilewright.arch.errors import UserError
from tilewright.sim.dram import DramChannel
from tilewright.sim.dram_check import check_trace

PRESET = load_dram_preset("gddr6-14000-1250mv")
CHANNEL = DramChannel.from_preset("gddr6-14000-1250mv")


def check(trace, standard=GDDR6, timing=PRESET.timing):
    return check_trace(standard, timing, PRESET.organisation, trace)


@st.composite
def traces(draw, max_wait=0):
    """Requests that keep the banks in a legal state, on few banks so that they collide."""
    open_rows, trace = {}, []
    for _ in range(draw(st.integers(1, 40))):
        bank = draw(st.sampled_from([0, 1, 4, 15]))
        if bank in open_rows:
            names = ["RD", "RD", "WR", "WR", "RDA", "WRA", "PREpb", "PREab"]
        else:
            names = ["ACT", "ACT", "ACT", "PREpb", "PREab", "REFpb"] + ["REFab"] * (not open_rows)
        name = draw(st.sampled_from(names))
        row = -1
        if name == "ACT":
            row = open_rows[bank] = draw(st.integers(0, 3))
        elif name in ("RDA", "WRA", "PREpb"):
            row = open_rows.pop(bank, -1) if name != "PREpb" else (open_rows.pop(bank, None), -1)[1]
        elif name == "PREab":
            open_rows.clear()
        elif name in ("RD", "WR"):
            row = draw(st.sampled_from([-1, open_rows[bank]]))
        after = draw(st.integers(0, max_wait)) if max_wait else 0
        trace.append(Request(name, bank, row, after))
    return trace


def test_a_row_of_reads_by_hand():
    # ACT at 0, RD at 30, 34, 38: 4 commands in 39 ticks, 29 + 3 + 3 stalled.
    r = CHANNEL.replay([Request("ACT", 2, 7)] + [Request("RD", 2, 7)] * 3)
    assert r.issue_ticks.tolist() == [0, 30, 34, 38]
    assert r.ticks == 39 and r.idle == 0
    assert {k: v for k, v in r.stalls.items() if v} == {"activate": 29, "column": 6}
    assert {k: v for k, v in r.counts.items() if v} == {"ACT": 1, "RD": 3}


def test_refresh_interrupts_and_the_row_opens_again():
    # Refresh 1 falls due at 3333. The read that may not issue before 3334 lets it go first: PREab at 3333, REFab
    # n_rp 30 later, ACT n_rfc 211 after that, RD after n_rcd_rd 30.
    r = CHANNEL.replay([Request("ACT", 2, 7), Request("RD", 2, 7, 3332), Request("RD", 2, 7, 3334)])
    assert [(i.tick, i.command) for i in r.issued] == [
        (0, "ACT"),
        (3332, "RD"),
        (3336, "PREab"),  # n_rtp 4 after the read
        (3366, "REFab"),
        (3577, "ACT"),
        (3607, "RD"),
    ]
    assert r.issued[4] == Issued(3577, "ACT", 2, 7)
    # Idle until 3332 but for the ACT; PREab waits 3333..3335 for n_rtp; 29 ticks n_rp, 210 n_rfc, 29 n_rcd.
    assert r.idle == 3331
    assert {k: v for k, v in r.stalls.items() if v} == {
        "refresh": 210,
        "precharge": 29,
        "row_cycle": 3,
        "activate": 29,
    }


def test_a_waiting_command_lets_a_refresh_that_falls_due_go_first():
    # ACT at 3320 makes RD wait until 3350, past 3333: ticks 3321..3332 are n_rcd, then the refresh takes over:
    # PREab when n_ras allows, 3320 + 60.
    r = CHANNEL.replay([Request("ACT", 0, 1, 3320), Request("RD", 0, 1)])
    assert [(i.tick, i.command) for i in r.issued][:3] == [(3320, "ACT"), (3380, "PREab"), (3410, "REFab")]
    assert r.stalls["activate"] == 12 + 29
    assert r.stalls["row_cycle"] == 3380 - 3333


@pytest.mark.parametrize("until", [0, 3332, 3333, 6665, 6666, 100_000])
def test_refresh_count(until):
    assert CHANNEL.replay([], until=until).counts["REFab"] == until // 3333
    assert CHANNEL.replay([], until=until, refresh=False).counts["REFab"] == 0


def test_refresh_count_under_load():
    reads = [Request("ACT", 0, 1)] + [Request("RD", 0, 1)] * 3000
    r = CHANNEL.replay(reads)
    assert r.counts["REFab"] == r.ticks // 3333 == 3  # 12840 ticks
    assert r.counts["ACT"] == 1 + 3 and r.counts["RD"] == 3000
    assert check(r.issued) is None


def test_refresh_reopens_all_rows_for_a_command_that_needs_them():
    pim = GDDR6.extend(
        "PIM",
        [Command("MAC16", Scope.CHANNEL, Needs.ALL_OPEN)],
        [Constraint(Scope.CHANNEL, ("ACT",), ("MAC16",), "n_rcd_rd", "activate", source="test")],
    )
    ch = DramChannel(pim, PRESET.timing, PRESET.organisation)
    acts = [Request("ACT", b, b) for b in range(16)]
    r = ch.replay([*acts, Request("MAC16"), Request("MAC16", not_before=4000)])
    assert r.counts["ACT"] == 32 and r.counts["MAC16"] == 2
    assert [i.row for i in r.issued if i.command == "ACT"][16:] == list(range(16))
    assert check(r.issued, pim) is None


@settings(deadline=None, max_examples=60)
@given(traces())
def test_replay_is_legal_and_tight(trace):
    r = CHANNEL.replay(trace, refresh=False)
    assert check(r.issued) is None
    assert [i.command for i in r.issued] == [t.command for t in trace]
    assert r.ticks == len(trace) + r.idle + sum(r.stalls.values())
    for k, entry in enumerate(r.issued):
        early = check([*r.issued[:k], entry._replace(tick=entry.tick - 1)])
        if entry.tick == 0:
            continue
        assert early is not None and (early.index, early.tick, early.earliest) == (
            k,
            entry.tick - 1,
            entry.tick,
        )
    strict = DramChannel.from_preset("gddr6-14000-1250mv")
    for entry in r.issued:
        tick = strict.earliest(entry.command, entry.bank, entry.row)
        assert tick == entry.tick
        strict.issue(entry.command, entry.bank, entry.row, tick=tick)


@settings(deadline=None, max_examples=60)
@given(traces(max_wait=12_000))
def test_refreshes_are_legal_punctual_and_first(trace):
    trace = [t for t in trace if not t.command.startswith("REF")]
    r = CHANNEL.replay(trace, until=9000)
    assert check(r.issued) is None
    assert r.ticks == len(r.issued) + r.idle + sum(r.stalls.values())
    refreshes = [i.tick for i in r.issued if i.command == "REFab"]
    assert len(refreshes) >= 9000 // 3333
    for k, tick in enumerate(refreshes, 1):
        due = k * 3333
        assert tick >= due
        assert {i.command for i in r.issued if due <= i.tick < tick} <= {"PREab"}
    assert len(refreshes) == max(9000 // 3333, (r.ticks - 1) // 3333)
    asked = [(t.command, t.bank if t.command != "PREab" else 0) for t in trace]
    issued = iter((i.command, i.bank) for i in r.issued)
    assert all(a in issued for a in asked)  # in order
    assert all(tick >= t.not_before for tick, t in zip(r.issue_ticks, trace, strict=True))
    assert all(a < b for a, b in pairwise(r.issue_ticks))


@pytest.mark.parametrize(
    ("trace", "title", "earliest"),
    [
        ([(0, "ACT", 0, 0), (29, "RD", 0, 0)], "bank: ACT to read", 30),
        ([(0, "ACT", 0, 0), (0, "ACT", 4, 0)], "channel: one command a tick", 1),
        ([(0, "RD", 0, 0)], "state: bank 0 needs an open row", None),
        ([(0, "ACT", 0, 0), (90, "RD", 0, 1)], "state: bank 0 needs an open row", None),
        ([(0, "ACT", 0, 0), (95, "ACT", 0, 1)], "state: bank 0 needs no open row", None),
        ([(0, "ACT", 0, 0), (95, "REFab", 0, -1)], "state: bank 0 needs no open row", None),
        ([(0, "REFab", 0, -1), (210, "PREpb", 3, -1)], "channel: all-bank refresh to any command", 211),
        (
            [(11 * i, "ACT", 4 * i, 0) for i in range(4)] + [(59, "ACT", 1, 0)],
            "channel: four-activate window",
            60,
        ),
        ([(0, "ACT", 0, 0), (30, "RD", 0, 0), (54, "WR", 0, 0)], "channel: read-to-write turnaround", 55),
        ([(5, "PREpb", 0, -1), (34, "REFab", 0, -1)], "channel: precharge to all-bank refresh", 35),
    ],
)
def test_checker_names_the_rule(trace, title, earliest):
    found = check([Issued(*entry) for entry in trace], timing=dict(PRESET.timing) | {"n_faw": 60})
    assert found is not None
    assert (found.index, found.title, found.earliest) == (len(trace) - 1, title, earliest)
    assert title in str(found) and f"at tick {trace[-1][0]}" in str(found)


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        ([Request("RD", 3)], "trace: command 0, RD to bank 3, needs OPEN"),
        ([Request("ACT", 0, 1), Request("RD", 0, 2)], "trace: command 1, RD to bank 0, needs OPEN row 2"),
        ([Request("ACT", 0, 1), Request("REFab")], "trace: command 1, REFab to bank 0, needs ALL_CLOSED"),
        ([Request("RDD", 3)], "trace: command 0: unknown command 'RDD'"),
        ([Request("ACT", 99, 0)], "trace: command 0: ACT bank must be 0 to 15, not 99"),
        ([Request("ACT", 0, 0, -1)], "trace: command 0: not_before must be 0 or more, not -1"),
    ],
)
def test_wrong_traces_are_refused(trace, message):
    with pytest.raises(UserError, match=message):
        CHANNEL.replay(trace)


def test_refresh_needs_its_timing():
    timing = {k: v for k, v in PRESET.timing.items() if k != "n_refi"}
    ch = DramChannel(GDDR6, timing, PRESET.organisation)
    assert ch.replay([Request("ACT", 0, 0)], refresh=False).ticks == 1
    with pytest.raises(UserError, match="needs the timing n_refi"):
        ch.replay([])


SCRIPT = """
import json, sys
from tilewright.arch.dram import Request
from tilewright.sim.dram import DramChannel
trace = [Request(*t) for t in json.loads(sys.argv[1])]
r = DramChannel.from_preset("gddr6-14000-1250mv").replay(trace, until=7000)
print(json.dumps([r.issued, r.ticks, r.idle, r.counts, r.stalls]))
"""


def test_interpreted_kernels_agree():
    trace = [
        *(Request("ACT", b, b) for b in (0, 1, 4, 9, 15)),
        Request("RD", 1, 1),
        Request("WR", 1, -1),
        Request("RDA", 4, 4),
        Request("REFpb", 4),
        Request("WRA", 9, 9, 3330),
        Request("RD", 15, -1, 3400),
        Request("PREab"),
    ]
    r = CHANNEL.replay(trace, until=7000)
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, json.dumps(trace)],
        env=os.environ | {"NUMBA_DISABLE_JIT": "1"},
        capture_output=True,
        text=True,
        check=True,
    )
    compiled = json.loads(json.dumps([r.issued, r.ticks, r.idle, r.counts, r.stalls]))
    assert json.loads(done.stdout) == compiled
