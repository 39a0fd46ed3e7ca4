"""RTL, cycle model and interpreter of target csd agree; and what they would not agree on is caught."""

import json
import os

import pytest

from tilewright.arch import csd as arch
from tilewright.arch.spec import build, load_tree
from tilewright.verify import csd as plan
from tilewright.verify import engine
from tilewright.verify.csd_mutants import MUTANTS
from tilewright.verify.mutants import Mutant

LONG = bool(os.environ.get("TILEWRIGHT_LONG"))
# One a level; the others with TILEWRIGHT_LONG=1. The faults of model and interpreter take no build of their own.
QUICK = (
    "rtl: a kernel writes while pages are still looked at",
    "model: exponentials take a tick more",
    "interpreter: scores are scaled before the largest is taken off",
)
# Two kernels, and pages that are not filtered; the others with TILEWRIGHT_LONG=1.
QUICK_STRUCTURES = (0, 1)


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
    assert content["target"] == "csd" and content["difference"] == report.mismatches[0]


def test_the_quick_mutants_exist():
    names = [m.name for m in MUTANTS]
    assert set(QUICK) <= set(names) and len(set(names)) == len(names) >= 10


def test_a_large_spec_is_scaled_to_what_rtl_simulates():
    spec = build(arch.CsdSpec, load_tree("instinfer-a6000", ["csd"]), "preset")
    small, notes = plan.scaled(spec)
    p, q = small.spec.params(), spec.params()
    assert p.lanes == 4 and p.flash.channels == 2 and p.kernels == q.kernels
    assert small.keep_timing and "engine.lanes 32 to 4" in notes[0] and "timings kept" in notes[0]
    for name in ("exp_latency", "page_filter"):
        assert getattr(p, name) == getattr(q, name)
    assert p.flash.read.max() == q.flash.read.max() and p.flash.command.tolist() == q.flash.command.tolist()
    assert p.flash.page_transfer == q.flash.page_transfer
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
    many = plan.structures(20, 5)
    assert len({s.name for s in many[: plan.STRUCTURES]}) == plan.STRUCTURES
    for s in many:
        assert arch.image_shapes(s.spec.params())["vectors"][1][1] <= 4
    for s in many[-4:]:
        plan.cases(s, 3, (0,))


def test_cases_fit_the_rtl():
    from tilewright.rtl.csd import CODE_DEPTH

    for k, s in enumerate(plan.structures(plan.STRUCTURES, 0)):
        for case in plan.cases(s, 10, (7, k)):
            steps = engine.one_by_one(plan.ISA.assemble(case.text))
            assert len(steps.flat()) <= CODE_DEPTH
