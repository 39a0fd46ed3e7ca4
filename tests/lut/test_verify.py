"""RTL, cycle model and interpreter of target lut agree; and what they would not agree on is caught."""

import json
import os

import numpy as np
import pytest

from tilewright.arch import lut as arch
from tilewright.arch.isa import Program
from tilewright.arch.spec import apply_sets, build, load_tree
from tilewright.verify import engine
from tilewright.verify import lut as plan
from tilewright.verify.lut_mutants import MUTANTS
from tilewright.verify.mutants import Mutant

LONG = bool(os.environ.get("TILEWRIGHT_LONG"))
# One a level that needs at most one small build; the others with TILEWRIGHT_LONG=1.
QUICK = (
    "rtl: lines of a load and a store may overlap",
    "model: latency one tick longer",
    "model: a line does not wait for the one before",
    "interpreter: partial sums are added last",
)
# Together they have integer and FP16 tables, and quantised ones; the others with TILEWRIGHT_LONG=1.
QUICK_STRUCTURES = (0, 1, 5)


def structure(number: int) -> engine.Structure:
    return plan.structures(plan.STRUCTURES, 0)[number]


@pytest.mark.cosim
@pytest.mark.parametrize("number", range(plan.STRUCTURES))
def test_a_structure_agrees(number, tmp_path):
    if number not in QUICK_STRUCTURES and not LONG:
        pytest.skip("TILEWRIGHT_LONG=1 runs all structures")
    report = engine.run(structure(number), replay=tmp_path / "replay.json")
    assert report.mismatches == []
    assert report.passed and report.cases == plan.PROGRAMS
    assert report.replay is None and list(tmp_path.iterdir()) == []


def test_the_default_plan_covers():
    """Coverage is counted on model and interpreter alone: it takes no RTL."""
    session = engine._Session(plan)
    for k, s in enumerate(plan.structures(plan.STRUCTURES, 0)):
        for i, case in enumerate(plan.cases(s, plan.PROGRAMS, (0, k))):
            session._observe(s, i, case)
    assert [name for name in plan.COVERAGE if not session.coverage[name]] == []
    assert session.mismatches == []


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
    content = json.loads((tmp_path / "replay.json").read_text())
    assert content["target"] == "lut" and content["difference"] == report.mismatches[0]


def test_the_quick_mutants_exist():
    names = [m.name for m in MUTANTS]
    assert set(QUICK) <= set(names) and len(set(names)) == len(names) >= 8


@pytest.mark.cosim
def test_a_wrong_expectation_fails(monkeypatch, tmp_path):
    """The oracle itself altered in one bit of one array."""
    true = plan.interpret

    def interpret(*args):
        image, decisions = true(*args)
        image["results"][1, 0, 1, 2] ^= 1
        return image, decisions

    monkeypatch.setattr(plan, "interpret", interpret)
    report = engine.run(structure(3), programs=1, replay=tmp_path / "replay.json")
    assert not report.passed
    assert "results[1,0,1,2] is" in report.mismatches[0] and "(1 elements differ)" in report.mismatches[0]


@pytest.mark.cosim
def test_the_rtl_has_no_ordinary_units():
    from tilewright.rtl.lut.run import Case, build_rtl, run_cases

    s = structure(3)
    program = plan.ISA.assemble("LMMA\nORDINARY operations=4")
    case = Case(s.spec.params(), program, plan.image(s.spec, 0))
    with pytest.raises(ValueError, match=r"instruction 1 \(ORDINARY\): the RTL has no ordinary units"):
        run_cases(build_rtl(s.spec), [case])
    long = Case(s.spec.params(), plan.ISA.assemble("LMMA\n" * 65), case.image)
    with pytest.raises(ValueError, match="holds 64 instructions, not 65"):
        run_cases(build_rtl(s.spec), [long])


@pytest.mark.cosim
@pytest.mark.skipif(not LONG, reason="TILEWRIGHT_LONG=1: another build")
def test_the_preset_keeps_its_timings(tmp_path):
    small, notes = plan.scaled(preset())
    report = engine.run(small, programs=6, replay=tmp_path / "replay.json")
    assert report.mismatches == [] and "timings kept" in notes[0]


def preset(*sets):
    return build(arch.LutSpec, apply_sets(load_tree("lut-a100-4x", ["lut"]), sets), "preset")


def test_a_large_spec_is_scaled_to_what_rtl_simulates():
    spec = preset()
    small, notes = plan.scaled(spec)
    p, q = small.spec.params(), spec.params()
    assert (p.m, p.n, p.k, p.arrays, p.table_rows, p.lines) == (2, 4, 4, 2, 8, 160)
    assert small.keep_timing and "n 64 to 4" in notes[0] and "cores 432 to 1" in notes[0]
    for name in ("rate_p", "rate_q", "latency"):
        np.testing.assert_array_equal(getattr(p, name), getattr(q, name))
    assert plan.scaled(small.spec)[1] == []


def test_equal_seeds_give_equal_cases():
    first = structure(1)
    a, b = plan.cases(first, 6, (3, 1)), plan.cases(structure(1), 6, (3, 1))
    assert [(c.text, c.image_seed, engine.document(c.spec)) for c in a] == [
        (c.text, c.image_seed, engine.document(c.spec)) for c in b
    ]
    assert plan.cases(first, 6, (4, 1))[0].text != a[0].text
    longer = plan.cases(first, 8, (3, 1))
    assert [c.text for c in longer[:6]] == [c.text for c in a]


def test_random_structures_are_valid_and_small():
    many = plan.structures(25, 5)
    assert len({s.name for s in many[: plan.STRUCTURES]}) == plan.STRUCTURES
    for s in many:
        p = s.spec.params()
        assert p.rows * p.n <= 16 and p.queue_depth <= 5
        plan.cases(s, 4, (0,))


def test_the_code_of_a_case_fits_the_rtl():
    from tilewright.rtl.lut import CODE_DEPTH

    for s in plan.structures(plan.STRUCTURES, 0):
        for case in plan.cases(s, 30, (7,)):
            program: Program = engine.one_by_one(plan.ISA.assemble(case.text))
            assert sum(len(segment.regions["code"]) for segment in program.segments) <= CODE_DEPTH
