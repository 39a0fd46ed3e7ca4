"""RTL, cycle model and interpreter of target rdu agree; and what they would not agree on is caught."""

import json
import os

import pytest

from tilewright.arch import rdu as arch
from tilewright.arch.spec import apply_sets, build, load_tree
from tilewright.verify import engine
from tilewright.verify import rdu as plan
from tilewright.verify.mutants import Mutant
from tilewright.verify.rdu_mutants import MUTANTS

LONG = bool(os.environ.get("TILEWRIGHT_LONG"))
# One a level; the others with TILEWRIGHT_LONG=1. The faults of model and interpreter take no build of their own.
QUICK = (
    "rtl: the first value of a fold meets the sum before",
    "model: latency of memory one tick longer",
    "interpreter: results are rounded before the function",
)
# The smallest one; the others with TILEWRIGHT_LONG=1.
QUICK_STRUCTURES = (4,)


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
    assert content["target"] == "rdu" and content["difference"] == report.mismatches[0]


def test_the_quick_mutants_exist():
    names = [m.name for m in MUTANTS]
    assert set(QUICK) <= set(names) and len(set(names)) == len(names) >= 10


def test_few_sections_are_drawn_in_vain(monkeypatch):
    """What the model finds deadlocked is drawn anew: a model that refuses much would hide what it does wrong."""
    tried = []
    true = plan.sim.execute

    def execute(*args, **options):
        tried.append(False)
        out = true(*args, **options)
        tried[-1] = True
        return out

    monkeypatch.setattr(plan.sim, "execute", execute)
    for k in (0, 4):
        plan.cases(structure(k), 12, (1, k))
    assert len(tried) > 20 and sum(tried) > 0.6 * len(tried)


def preset(*sets):
    return build(arch.RduSpec, apply_sets(load_tree("sn40l", ["rdu"]), sets), "preset")


def test_a_large_spec_is_scaled_to_what_rtl_simulates():
    spec = preset()
    small, notes = plan.scaled(spec)
    p, q = small.spec.params(), spec.params()
    assert p.columns * p.rows <= 16 and p.lanes == 4 and p.stages == 3 and p.tier_lines[0] == 256
    assert (
        small.keep_timing and f"columns {q.columns} to {p.columns}" in notes[0] and "timings kept" in notes[0]
    )
    for name in ("rate_p", "rate_q", "latency"):
        assert getattr(p, name).tolist() == getattr(q, name).tolist()
    for name in (
        "hop",
        "credit",
        "token",
        "fifo_depth",
        "op_latency",
        "copy_p",
        "copy_q",
        "host_launch",
        "program_load",
    ):
        assert getattr(p, name) == getattr(q, name)
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
        p = s.spec.params()
        assert p.columns * p.rows <= 16 and p.lanes * p.stages <= 12
    for s in many[-4:]:
        plan.cases(s, 3, (0,))


def test_the_records_of_a_case_fit_the_rtl():
    for k, s in enumerate(plan.structures(plan.STRUCTURES, 0)):
        for case in plan.cases(s, 10, (7, k)):
            segments = engine.one_by_one(plan.ISA.assemble(case.text)).segments
            records = sum(
                len(s.regions[r.region]) for s in segments for r in arch.CONFIGS if r.region in s.regions
            )
            assert records <= plan._DEPTH
            assert sum(len(s.regions["code"]) for s in segments) <= plan._DEPTH
