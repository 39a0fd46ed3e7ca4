"""RTL, cycle model and interpreter of target pim agree; and what they would not agree on is caught."""

import json
import os
from dataclasses import replace

import numpy as np
import pytest

from tilewright.arch import pim as arch
from tilewright.arch import registry
from tilewright.arch.errors import UserError
from tilewright.verify import engine
from tilewright.verify import pim as plan
from tilewright.verify.mutants import Mutant, edited
from tilewright.verify.pim_mutants import MUTANTS

LONG = bool(os.environ.get("TILEWRIGHT_LONG"))
# One a level that needs at most one small build; the others with TILEWRIGHT_LONG=1.
QUICK = (
    "rtl: all-bank MACs one tick too close",
    "rtl: RDMAC does not clear",
    "model: refresh interval one tick longer",
    "model: a step's result one cycle late",
    "interpreter: sums by halves, not by neighbours",
    "interpreter: softmax keeps its numerators unrounded",
)


def structure(number: int) -> engine.Structure:
    return plan.structures(plan.STRUCTURES, 0)[number]


@pytest.mark.cosim
def test_the_default_plan_agrees_and_covers(tmp_path):
    report = engine.run("pim", replay=tmp_path / "replay.json")
    assert report.mismatches == []
    assert report.uncovered == []
    assert report.passed
    assert report.cases == plan.STRUCTURES * plan.PROGRAMS
    assert report.replay is None and list(tmp_path.iterdir()) == []


@pytest.mark.cosim
@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda m: m.name)
def test_a_mutant_is_caught(mutant: Mutant, tmp_path):
    if mutant.name not in QUICK and not LONG:
        pytest.skip("TILEWRIGHT_LONG=1 runs all mutants")
    with mutant.apply():
        report = engine.run(
            structure(mutant.structure), programs=mutant.programs, replay=tmp_path / "replay.json"
        )
    assert not report.passed
    assert report.mismatches
    assert report.replay is not None and report.replay.exists()


def test_the_quick_mutants_exist():
    names = [m.name for m in MUTANTS]
    assert set(QUICK) <= set(names) and len(set(names)) == len(names) >= 8


@pytest.mark.cosim
def test_a_replay_file_replays(tmp_path):
    """Alone, the failing case fails in the same way under the same fault, and passes without it."""
    path = tmp_path / "replay.json"
    mutant = next(m for m in MUTANTS if m.name == "model: refresh interval one tick longer")
    with mutant.apply():
        first = engine.run(structure(mutant.structure), programs=4, replay=path)
        again = engine.run(str(path), replay=tmp_path / "again.json")
    assert first.mismatches and first.replay == path
    assert len(again.mismatches) == 1
    assert again.mismatches[0].split(": ", 1)[1] == first.mismatches[0].split(": ", 1)[1]
    assert json.loads(path.read_text())["difference"] == first.mismatches[0]
    healthy = engine.run(str(path), replay=tmp_path / "never.json")
    assert healthy.passed and healthy.cases == 1
    assert not (tmp_path / "never.json").exists()


@pytest.mark.cosim
def test_what_is_not_covered_fails_the_default_plan(monkeypatch, tmp_path):
    monkeypatch.setattr(plan, "STRUCTURES", 1)
    monkeypatch.setattr(plan, "PROGRAMS", 2)
    monkeypatch.setattr(plan, "COVERAGE", ("instruction GEMV", "instruction NONE"))
    report = engine.run("pim", replay=tmp_path / "replay.json")
    assert report.mismatches == []
    assert report.uncovered == ["instruction NONE"]
    assert not report.passed
    assert "NOT COVERED     instruction NONE" in report.text()


@pytest.mark.cosim
def test_a_wrong_expectation_fails(monkeypatch, tmp_path):
    """The oracle itself altered in one bit of one array."""
    true = plan.interpret

    def interpret(*args):
        image, decisions = true(*args)
        image["gb"][0, 0] ^= 1
        return image, decisions

    monkeypatch.setattr(plan, "interpret", interpret)
    report = engine.run(structure(2), programs=1, replay=tmp_path / "replay.json")
    assert not report.passed
    assert "gb[0,0] is" in report.mismatches[0] and "(1 elements differ)" in report.mismatches[0]
    json.dumps(report.document())


@pytest.mark.cosim
@pytest.mark.skipif(not LONG, reason="TILEWRIGHT_LONG=1: two more builds")
def test_a_named_spec_keeps_its_timings_and_writes_waves(tmp_path):
    report = engine.run("pim-gpt", programs=4, waves=tmp_path / "waves.vcd")
    assert report.passed
    assert (tmp_path / "waves.vcd").stat().st_size > 10_000


def test_a_large_spec_is_scaled_to_what_rtl_simulates():
    spec = registry.load_spec("pim-gpt")
    small, notes = plan.scaled(spec)
    p = small.spec.params()
    assert (p.channels, p.n_banks, p.lanes, p.columns, p.gb_columns) == (1, 4, 4, 8, 8)
    assert small.keep_timing and "channels 8 to 1" in notes[0]
    # Every timing but the depth of the adder tree, which follows from the lanes.
    assert {**small.spec.timing, "n_mac": 0} == {**spec.timing, "n_mac": 0}
    assert plan.scaled(small.spec)[1] == []


def test_equal_seeds_give_equal_cases():
    first, second = structure(1), structure(1)
    a, b = plan.cases(first, 6, (3, 1)), plan.cases(second, 6, (3, 1))
    assert [(c.text, c.image_seed, engine.document(c.spec)) for c in a] == [
        (c.text, c.image_seed, engine.document(c.spec)) for c in b
    ]
    assert plan.cases(first, 6, (4, 1))[0].text != a[0].text
    longer = plan.cases(first, 8, (3, 1))
    assert [c.text for c in longer[:6]] == [c.text for c in a]


def test_random_structures_are_valid_and_small():
    many = plan.structures(14, 5)
    assert len(many) == 14 and len({s.name for s in many[:6]}) == 6
    for s in many:
        p = s.spec.params()
        assert p.n_banks <= 8 and p.lanes <= 4 and p.channels <= 3


def test_a_mutant_leaves_nothing_behind():
    true = plan.interpret
    with (
        pytest.raises(ValueError, match="holds 'no such text' 0 times"),
        edited(plan, "interpret", "no such text", ""),
    ):
        pass
    with edited(plan, "interpret", "image)\n", "{})\n"):
        assert plan.interpret is not true
    assert plan.interpret is true


@pytest.mark.parametrize(
    ("subject", "options", "message"),
    [
        ("pimm", {}, "did you mean pim"),
        ("pim", {"specs": 0}, "--specs must be at least 1, not 0"),
        ("pim", {"programs": -1}, "--programs must be at least 1, not -1"),
        ("pim", {"seed": -1}, "--seed must be at least 0, not -1"),
        ("pim-gpt", {"specs": 2}, "--specs 2: a spec has one structure"),
        ("no/such.json", {}, "cannot read no/such.json"),
        ("no/such.json", {"programs": 3}, "--programs 3: a replay file has one case"),
    ],
)
def test_mistakes_are_named(subject, options, message):
    with pytest.raises(UserError, match=message):
        engine.run(subject, **options)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"replay": 1, "target": "pom"}'])
def test_a_file_that_is_no_replay_is_refused(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match="not a replay file"):
        engine.run(path)


@pytest.mark.cosim
def test_the_rtl_logs_the_commands_of_the_model():
    """Its log is as deep as it was built, and starts afresh with every run."""
    s = structure(2)
    loops = "GEMV channels=1 cols=1 outs=16 pitch=1 dst=0\n"
    other = "RD_BK channels=1 bank=1 row=3 cols=2\nWR_EL channels=1 row=2 outs=3 pitch=2\n"
    jobs, traces = [], []
    for text in (loops * 15, other, "WR_GB channels=1\n"):
        program = plan.ISA.assemble(text)
        jobs.append((s.spec, program, plan.image(s.spec, 0)))
        traces.append(plan.simulate(s.spec, program, fold=False, trace=True).trace)
    assert [len(t) for t in traces] > [400, 10, 0]
    for outcome, trace in zip(plan.run_rtl(plan.build(s.spec, False), jobs, None), traces, strict=True):
        assert outcome.timeline.trace.tolist() == trace[:256].tolist()


@pytest.mark.cosim
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t + [0, 0, 0, 0, 1], "row 0 at tick"),  # of a refresh, which names none
        (lambda t: t[:-1], "none in the RTL"),
        # All but the first so much earlier that two stand in one tick.
        (lambda t: np.vstack([t[:1], t[1:] - [t[1, 0] - t[0, 0], 0, 0, 0, 0]]), "referee on the RTL"),
    ],
)
def test_a_command_that_differs_is_named(change, message, monkeypatch, tmp_path):
    """The RTL's log altered, everything else the same: only the commands tell."""
    true = plan.run_rtl

    def run_rtl(*args):
        return [replace(o, timeline=replace(o.timeline, trace=change(o.timeline.trace))) for o in true(*args)]

    monkeypatch.setattr(plan, "run_rtl", run_rtl)
    report = engine.run(structure(2), programs=1, replay=tmp_path / "replay.json")
    assert not report.passed
    assert any(message in m for m in report.mismatches), report.mismatches
    assert "channel 0, command " in report.mismatches[0]


def test_only_verification_builds_logs():
    from tilewright.rtl import pim as rtl
    from tilewright.rtl.cosim.verilog import to_verilog

    spec = structure(4).spec
    assert "trace_0" not in to_verilog(rtl.top(spec))
    assert "trace_0" in to_verilog(rtl.top(spec, trace_depth=4))
    p = spec.params()
    assert "trace_0" not in arch.hostmap(p, 8) and arch.hostmap(p, 8, 4)["trace_0"].elements == 4


def test_the_referee_objects_to_a_command_too_early():
    """Every DRAM command of the trace is judged: moved one tick ahead, a stalled one is illegal."""
    s = structure(0)
    case = plan.case(s, 0, (0, 0))
    program = engine.one_by_one(plan.ISA.assemble(case.text))
    timeline = plan.simulate(case.spec, program, fold=False, trace=True)
    assert plan.referee(case.spec, timeline, most=300) is None
    moved = timeline.trace.copy()
    mac = next(i for i in range(1, len(moved)) if moved[i, 2] == 6 and moved[i, 0] > moved[i - 1, 0] + 1)
    moved[mac, 0] -= 1
    objection = plan.referee(case.spec, replace(timeline, trace=moved), most=300)
    assert objection is not None and f"command {mac}, MACab" in objection
