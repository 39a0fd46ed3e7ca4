"""`--trace`: events that a strict reader accepts, and what they say against ticks and counters."""

import json
from collections import Counter, defaultdict
from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from tests.face.invoke import refused, tilewright, tiny_model
from tilewright import trace
from tilewright.arch import pim, registry
from tilewright.arch.clock import Clock
from tilewright.arch.timeline import SPAN, Timeline
from tilewright.arch.trace import LOG, TraceForm
from tilewright.sim.pim import simulate

TINY = """\
WR_GB channels=1 cols=2 tag=load
MAC_AB channels=1 row=3 cols=2 tag=multiply
RD_MAC channels=1 dst=8 tag=read
ADD dst=8 src=8 src2=8 n=16 tag=add
"""
# Two channels that part and join, single banks and all, several rows, and a refresh with rows open.
BUSY = """\
WR_GB channels=3 cols=64 tag=load
GEMV channels=3 row=2 col=60 cols=20 outs=3 pitch=1 stride=3 tag=gemv
WR_BK channels=1 bank=5 row=4 col=62 cols=4 tag=write
RD_BK channels=2 bank=3 row=9 cols=2 dst=100 tag=read
.segment repeat=3 label=again
MAC_AB channels=3 row=7 col=0 cols=8 tag=multiply
WR_EL channels=3 row=1 outs=2 pitch=64 lane=3 tag=element
RD_MAC channels=3 dst=8 tag=read
.segment
MAC_AB channels=3 row=8 cols=3 tag=multiply not_before=14000
"""
KINDS = {"process_name", "process_sort_index", "thread_name", "thread_sort_index"}


class Track:
    """A thread of the trace: its process, its name and its complete events."""

    def __init__(self, process, name):
        self.process, self.name, self.spans = process, name, []


def read(text):
    """The tracks of a trace by (process, thread), after everything that the format asks of it is checked."""
    document = json.loads(text, parse_constant=lambda c: pytest.fail(f"{c} is not JSON"))
    assert document["displayTimeUnit"] == "ns"
    tick_us = document["otherData"]["tick_s"] * 1e6
    processes, tracks = {}, {}
    for e in document["traceEvents"]:
        assert e["ph"] in ("M", "X") and type(e["pid"]) is int and type(e["tid"]) is int
        key = (e["pid"], e["tid"])
        if e["ph"] == "M":
            assert e["name"] in KINDS
            if e["name"] == "process_name":
                assert e["pid"] not in processes
                processes[e["pid"]] = e["args"]["name"]
            elif e["name"] == "thread_name":
                assert key not in tracks
                tracks[key] = Track(processes[e["pid"]], e["args"]["name"])
            continue
        assert type(e["name"]) is str and e["name"] and type(e["cat"]) is str
        assert type(e["ts"]) is float and type(e["dur"]) is float and e["ts"] >= 0 and e["dur"] > 0
        first, ticks = e["args"]["tick"], e["args"]["ticks"]
        assert e["ts"] == pytest.approx(first * tick_us, rel=1e-12)
        assert e["dur"] == pytest.approx(ticks * tick_us, rel=1e-12)
        assert first + ticks <= document["otherData"]["ticks"]
        tracks[key].spans.append(e)
    for track in tracks.values():
        in_perfetto = [(int(e["ts"] * 1000.0), int(e["dur"] * 1000.0)) for e in track.spans]
        for (ts, dur), (following, _) in pairwise(in_perfetto):
            assert ts + dur <= following, f"{track.name}: overlap once cut to nanoseconds"
        open_until = []
        last = 0
        for e in track.spans:
            first = e["args"]["tick"]
            assert first >= last, f"{track.name}: back in time"
            last = first
            while open_until and open_until[-1] <= first:
                open_until.pop()
            end = first + e["args"]["ticks"]
            assert not open_until or end <= open_until[-1], f"{track.name}: {e} does not nest"
            open_until.append(end)
    assert len({tid for _, tid in tracks}) == len(tracks) and not {p for p, t in tracks if 0 in (p, t)}
    return document, list(tracks.values())


def executed(tmp_path, text, *options):
    """The document and tracks of a program's trace, and what the command said."""
    program = tmp_path / "p.asm"
    program.write_text(text)
    ran = tilewright("exec", "pim-gpt", program, *options, "--trace", tmp_path / "t.json")
    assert ran.code == 0, ran.err
    return *read((tmp_path / "t.json").read_text()), ran


def track(tracks, process, name):
    (found,) = [t for t in tracks if (t.process, t.name) == (process, name)]
    return [(e["name"], e["args"]["tick"], e["args"]["tick"] + e["args"]["ticks"]) for e in found.spans]


def test_a_tiny_program_by_hand(tmp_path):
    """The ASIC works on even ticks; a tick is 0.5 ns."""
    document, tracks, _ = executed(tmp_path, TINY, "--set", "channels=1")
    assert document["otherData"]["ticks"] == 87 and document["otherData"]["complete"] is True
    # Fetch 0, load 2, dispatch 4; the channel sees it at 5. Buffer writes at 5 and 5 + n_ccd_s 2 = 7; complete
    # n_cwl_gb 1 + n_bl 2 later, at 10, which is even: retired there. The next fetch is at 12, dispatch at 16:
    # ACTab at 17, MACab at 17 + n_rcd_mac 24 = 41 and 41 + n_ccd_l 2 = 43, complete at 43 + n_mac 7 = 50.
    # Fetch 52, dispatch 56: RDMAC at 57, complete at 57 + n_cl_reg 0 + n_bl 2 = 59, retired at 60.
    assert track(tracks, "channel 0", "commands") == [
        ("WRGB", 5, 8), ("ACTab", 17, 18), ("MACab", 41, 44), ("RDMAC", 57, 58),
    ]  # fmt: skip
    # Fetch 62, load 64, dispatch 66: two steps on one group, each there 4 cycles after its operands were asked
    # for: 8 cycles on ticks 68 to 82, retired at 84.
    assert track(tracks, "pim-gpt", "asic") == [("ADD", 67, 83)]
    rows = [("load", 0, 11), ("multiply", 11, 51), ("read", 51, 61), ("add", 61, 85)]
    assert track(tracks, "pim-gpt", "operators") == rows
    names = ("WR_GB", "MAC_AB", "RD_MAC", "ADD")
    assert track(tracks, "pim-gpt", "instructions") == [
        (n, a, b) for n, (_, a, b) in zip(names, rows, strict=True)
    ]
    for bank in range(16):  # nothing closes them before the end, a last fetch at 86
        assert track(tracks, "channel 0", f"bank {bank}") == [("row 3", 17, 87)]
    mac = next(e for t in tracks for e in t.spans if e["name"] == "MACab")
    assert (mac["ts"], mac["dur"]) == (0.0205, 0.0015)  # microseconds
    assert mac["args"] == {"tick": 41, "ticks": 3, "count": 2, "row": 3}


@pytest.mark.parametrize("activate", ["simultaneous", "staggered"])
def test_rows_and_commands_are_those_of_the_model(tmp_path, activate):
    sets = ["channels=2", f"pim.all_bank_activate={activate}"]
    _, tracks, ran = executed(tmp_path, BUSY, *(a for s in sets for a in ("--set", s)))
    assert "cut" not in ran.err
    spec = registry.load_spec("pim-gpt", sets)
    timeline = simulate(spec.params(), pim.ISA.assemble(BUSY))
    # Every command is in the picture.
    counts = Counter()
    for t in tracks:
        if t.name == "commands":
            counts.update({e["name"]: 0 for e in t.spans})
            for e in t.spans:
                counts[e["name"]] += e["args"]["count"]
    names = ("ACT", "ACTab", "PREpb", "PREab", "RD", "WR", "MACab", "WRGB", "RDMAC", "REFab")
    counters = [timeline.counter(c) for c in pim.COUNTERS[:10]]
    assert [counts[n] for n in names] == counters
    assert counts["REFab"] == 2 and counts["MACab"] == 2 * (60 + 3 * 8 + 3)
    # The open rows, bank by bank, are what activates and precharges make of them one after the other.
    kept = simulate(spec.params(), pim.ISA.assemble(BUSY), trace=10_000).trace.tolist()
    expected = defaultdict(list)
    for channel in range(2):
        for bank in range(16):
            opened = None
            own = [r for r in kept if r[1] == channel and r[3] in (bank, -1)]
            for tick, _, command, _, row in own:
                if names[command].startswith("ACT"):
                    opened = tick, row
                elif names[command].startswith("PRE") and opened:
                    expected[channel, bank].append((f"row {opened[1]}", opened[0], tick))
                    opened = None
            if opened:
                expected[channel, bank].append((f"row {opened[1]}", opened[0], timeline.ticks))
    for (channel, bank), spans in expected.items():
        assert track(tracks, f"channel {channel}", f"bank {bank}") == spans
    # A tick in which some row is open counts as such; one that is open at the end was opened a tick before.
    open_ticks = 0
    for channel in range(2):
        held = set()
        for t in tracks:
            if t.process == f"channel {channel}" and t.name.startswith("bank"):
                for e in t.spans:
                    last = e["args"].get("closed", True)
                    first = e["args"]["tick"]
                    held |= set(range(first, first + e["args"]["ticks"] - (not last)))
        open_ticks += len(held)
    assert open_ticks == timeline.counter("open_ticks")


def test_repeated_segments_overlap_on_lanes_of_their_own(tmp_path):
    _, tracks, _ = executed(tmp_path, BUSY, "--set", "channels=2")
    operators = [e for t in tracks if t.name.startswith("operators") for e in t.spans]
    again = [e for e in operators if e["args"]["segment"] == "again"]
    assert len(again) == 3 and {e["args"]["repeated"] for e in again} == {3}
    # Three operators, repeated three times, bracket each other in part: a lane for each.
    assert {t.name for t in tracks} >= {"operators", "operators (2)", "operators (3)"}
    instructions = [e for t in tracks if t.name == "instructions" for e in t.spans]
    assert len(instructions) == 4 + 3 * 3 + 1


def test_a_refresh_that_the_end_cuts_is_not_there(tmp_path):
    """Due at 13650 it closes the rows at once; its REFab could issue n_rp 24 later, after the end at 13671."""
    text = "MAC_AB channels=1 cols=1\nADD n=16 not_before=13650\n"
    document, tracks, _ = executed(tmp_path, text, "--set", "channels=1")
    assert document["otherData"]["ticks"] == 13671
    assert track(tracks, "channel 0", "commands")[-1] == ("PREab", 13650, 13651)
    assert document["otherData"]["complete"] is True


@pytest.mark.parametrize("limit", [1, 7])
def test_the_limit_holds_and_is_said(tmp_path, limit):
    options = ["--set", "channels=2", "--json", tmp_path / "r.json"]
    document, tracks, ran = executed(tmp_path, BUSY, *options, "--trace-limit", limit)
    assert f"trace was cut after {limit} commands of a channel" in ran.err
    assert document["otherData"]["complete"] is False
    for t in tracks:
        if t.name == "commands":
            assert sum(e["args"]["count"] for e in t.spans) == limit
    assert sum(len(t.spans) for t in tracks if t.name.startswith(("instructions", "operators"))) == 2 * limit
    # What the run comes to does not depend on how much of it was traced.
    whole = tmp_path / "whole.json"
    tilewright("exec", "pim-gpt", tmp_path / "p.asm", "--set", "channels=2", "--json", whole)
    assert json.loads((tmp_path / "r.json").read_text()) == json.loads(whole.read_text())


@pytest.mark.parametrize("limit", [20, 1_000_000])
def test_a_run_is_traced_and_stays_the_same(tmp_path, limit):
    common = ("run", "pim-gpt", "--model", tiny_model(tmp_path), "--prompt", 2, "--generate", 3, "--json")
    out = tmp_path / "t.json"
    traced = tilewright(*common, "-", "--trace", out, "--trace-limit", limit)
    plain = tilewright(*common, "-")
    assert traced.code == 0 and traced.out == plain.out
    document, tracks = read(out.read_text())
    found = json.loads(plain.out)
    assert document["otherData"]["complete"] is (limit > 20) and ("cut" in traced.err) is (limit == 20)
    assert {t.process for t in tracks} == {"pim-gpt", *(f"channel {c}" for c in range(8))}
    macs = sum(e["args"]["count"] for t in tracks for e in t.spans if e["name"] == "MACab")
    assert macs == found["counters"]["mac_all"] if limit > 20 else macs <= 8 * limit
    names = {e["name"] for t in tracks if t.name.startswith("operators") for e in t.spans}
    assert names and (limit == 20 or names == {s["name"].replace(" ", "_") for s in found["spans"]})


def test_the_program_may_be_empty_of_commands(tmp_path):
    _, tracks, _ = executed(tmp_path, "ADD dst=8 src=8 src2=8 n=16\n")
    assert {t.name for t in tracks} == {"operators", "instructions", "asic"}


def test_stdout_holds_the_trace_alone(tmp_path):
    (tmp_path / "p.asm").write_text(TINY)
    ran = tilewright("exec", "pim-gpt", tmp_path / "p.asm", "--trace", "-")
    assert ran.code == 0
    read(ran.out)


def test_wrong_use_is_refused_in_a_line(tmp_path):
    program = tmp_path / "p.asm"
    program.write_text(TINY)
    out = tmp_path / "t.json"
    assert refused("exec", "pim-gpt", program, "--engine", "rtl", "--trace", out).startswith("--trace needs")
    message = "--trace-limit must be 1 to 1000000, not 0"
    assert refused("exec", "pim-gpt", program, "--trace", out, "--trace-limit", 0) == message
    model = tiny_model(tmp_path)
    assert refused("run", "pim-gpt", "--model", model, "--trace", out, "--trace-limit", 0) == message
    message = "--trace needs exactly one mapped spec, not 2"
    assert refused("run", "pim-gpt", "gddr6-aim", "--model", model, "--trace", out) == message
    assert "no directory" in refused("exec", "pim-gpt", program, "--trace", tmp_path / "no" / "t.json")
    assert "two outputs go to stdout" in refused("exec", "pim-gpt", program, "--trace", "-", "--json", "-")
    assert not out.exists()


# ---- the writer alone ---------------------------------------------------------------------------------

FORM = TraceForm(
    operations=("LOAD", "WORK"), executes=("", "core"), commands=("OPEN", "CLOSE", "READ", "REST"),
    opens=frozenset([0]), closes=frozenset([1]), cadence=(9, 9, 4, 9), holds=(1, 1, 1, 50), banks=2,
)  # fmt: skip


def machine(spans=(), log=(), commands=(), ticks=100):
    """A Timeline of a machine that is no target: `spans` (tag, first, end), `commands` as in `trace`."""
    rows = np.array([(0, tag, a, b, b - a, 1) for tag, a, b in spans], SPAN)
    activity = np.zeros((3, 1, 2), np.int64)
    activity[-1, 0, 0] = ticks
    return Timeline(
        ticks=ticks, tags=["a", "b"], spans=rows, counter_names=(), counters=np.zeros((3, 0), np.int64),
        units=("core",), causes=("idle",), activity=activity, events=len(commands),
        trace=np.array(commands, np.int64).reshape(-1, 5), log=np.array(list(log), LOG),
    )  # fmt: skip


def drawn(timeline, limit=100):
    """(track, name, tick, ticks) of each span."""
    names, out = {}, []
    for e in trace.events("m", timeline, FORM, Clock(Fraction(1, 3 * 10**9)), limit):
        if e["name"] == "thread_name":
            names[e["tid"]] = e["args"]["name"]
        elif e["ph"] == "X":
            out.append((names[e["tid"]], e["name"], e["args"]["tick"], e["args"]["ticks"]))
    return out


def test_operators_that_overlap_share_no_track():
    assert drawn(machine([(0, 0, 30), (1, 10, 40), (0, 30, 50), (1, 40, 45)])) == [
        ("operators", "a", 0, 30), ("operators", "a", 30, 20), ("operators (2)", "b", 10, 30),
        ("operators (2)", "b", 40, 5),
    ]  # fmt: skip


def test_a_burst_ends_where_it_pauses_or_moves():
    reads = [(0, 0), (4, 0), (8, 0), (13, 0), (15, 1), (19, 1)]  # 13 comes five ticks after 8
    commands = [(t, 0, 2, bank, 7) for t, bank in reads]
    assert drawn(machine(commands=commands)) == [
        ("commands", "READ", 0, 9), ("commands", "READ", 13, 1), ("commands", "READ", 15, 5),
    ]  # fmt: skip


def test_a_command_holds_the_channel_until_the_next_or_the_end():
    commands = [(0, 0, 3, -1, -1), (30, 0, 3, -1, -1), (90, 0, 3, -1, -1)]
    assert drawn(machine(commands=commands)) == [
        ("commands", "REST", 0, 30), ("commands", "REST", 30, 50), ("commands", "REST", 90, 10),
    ]  # fmt: skip


def test_rows_of_all_banks_and_of_one():
    commands = [(0, 0, 0, -1, 4), (20, 0, 1, 1, -1), (30, 0, 0, 1, 5), (60, 0, 1, -1, -1)]
    assert [s for s in drawn(machine(commands=commands)) if s[0].startswith("bank")] == [
        ("bank 0", "row 4", 0, 60), ("bank 1", "row 4", 0, 20), ("bank 1", "row 5", 30, 30),
    ]  # fmt: skip


def test_a_row_that_a_cut_leaves_open_ends_with_the_last_command_known():
    commands = [(0, 0, 0, 0, 4), (20, 0, 2, 0, 4)]
    assert ("bank 0", "row 4", 0, 21) in drawn(machine(commands=commands), limit=2)
    assert ("bank 0", "row 4", 0, 100) in drawn(machine(commands=commands), limit=3)


def test_units_show_what_they_execute_alone():
    log = [(0, 0, 0, 0, 0, 4, 9, 10), (0, 1, 1, 1, 10, 14, 18, 20)]
    assert drawn(machine(log=log)) == [
        ("instructions", "LOAD", 0, 10), ("instructions", "WORK", 10, 10), ("core", "WORK", 14, 4),
    ]  # fmt: skip


def test_commands_that_overlap_are_an_error():
    with pytest.raises(AssertionError, match="overlaps"):
        drawn(machine(commands=[(5, 0, 2, 0, 1), (5, 0, 2, 1, 1)]))


def test_nanoseconds_come_out_whole():
    """Perfetto cuts 1000 * ts to an integer: without care, 1.001 us, for one, would read as 1000 ns."""
    assert int(1.001 * 1000.0) == 1000
    timeline = machine([(0, t, t + 2) for t in range(0, 20_000, 2)], ticks=20_000)
    spans = trace.events("m", timeline, FORM, Clock(Fraction(1, 2 * 10**9)), 10_000)
    read_as = [(int(e["ts"] * 1000.0), int(e["dur"] * 1000.0)) for e in spans if e["ph"] == "X"]
    assert read_as == [(ns, 1) for ns in range(10_000)]


def test_a_third_of_a_nanosecond_stays_exact():
    events = trace.events("m", machine([(0, 3, 6)]), FORM, Clock(Fraction(1, 3 * 10**9)))
    (span,) = [e for e in events if e["ph"] == "X"]
    assert (span["ts"], span["dur"]) == (0.001, 0.001)
