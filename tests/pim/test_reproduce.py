"""Published rows beside ours: the data, the errors by hand, what a bound may say, and the command's output."""

import json
import re
from fractions import Fraction

import pytest

from tests.face.invoke import refused, tilewright
from tilewright.arch.errors import UserError
from tilewright.arch.published import PublishedRow, published
from tilewright.arch.scenario import Scenario
from tilewright.reproduce import Ours, Row, pim, steps
from tilewright.reproduce.jobs import Job, run_job, run_jobs
from tilewright.summary import row_hit_rate


def row(low, high, ours, bound=""):
    p = PublishedRow(title="t", unit="x", kind="published", source="s", low=low, high=high)
    return Row("key", p, Ours(ours, bound))


# ---- rows and errors ----------------------------------------------------------------------------------


def test_errors_by_hand():
    # Least against least, 20 / 40 - 1; most against most, 150 / 100 - 1.
    assert row(40, 100, {"a": 20, "b": 70, "c": 150}).errors == pytest.approx((-0.5, 0.5))
    words = PublishedRow(title="t", unit="%", kind="recalled", source="s", words="dominates")
    assert Row("key", words, Ours({"a": 80})).errors is None


@pytest.mark.parametrize(
    ("bound", "ours", "verdict"),
    [
        ("", (41, 137), "inside"),
        ("", (50, 60), "inside"),
        ("", (40, 100), "outside"),
        ("", (50, 138), "outside"),
        (">=", (6, 8), "open"),  # the truth may be anything above
        (">=", (42, 60), "outside"),  # the least is at least 42, where 41 is published
        (">=", (6, 138), "outside"),
        ("<=", (200, 300), "open"),
        ("<=", (40, 300), "outside"),
        ("~", (6, 8), "open"),
    ],
)
def test_a_bound_can_be_refuted_but_not_confirmed(bound, ours, verdict):
    assert row(41, 137, dict(zip("ab", ours, strict=True)), bound).verdict == verdict


@pytest.mark.parametrize("low, high, words", [(2, 1, ""), (1, None, "many"), (None, None, "")])
def test_a_published_row_holds_a_range_or_words(low, high, words):
    with pytest.raises(ValueError, match=r"above high|low and high, or words"):
        PublishedRow(title="t", unit="x", kind="published", source="s", low=low, high=high, words=words)


def test_published_rows_have_sources_and_the_abstract_is_quoted():
    found = published("pim").rows
    assert all(r.source and r.title and len(r.title) <= 20 for r in found.values())
    ranges = {k: (r.low, r.high) for k, r in found.items() if r.kind == "published"}
    assert ranges == {
        "speedup_gpu": (41, 137), "speedup_cpu": (631, 1074), "energy_gpu": (123, 383), "energy_cpu": (320, 602),
    }  # fmt: skip
    assert found["power_gpu"].low == Fraction(383, 137)
    with pytest.raises(UserError, match="no published rows for 'pin': did you mean pim"):
        published("pin")


def test_weights_of_the_blocks():
    # 12 * 48 * 1600^2; gpt3-xl: 24 layers of 4 * 2048 * 3072 (heads of 24 x 128) + 2 * 2048 * 8192.
    assert (
        pim.block_weights("gpt2-xl")
        == 12 * 48 * 1600**2
        == published("pim").rows["weights_gpt2_xl"].low * 2**20
    )
    assert pim.block_weights("gpt3-xl") == 24 * (4 * 2048 * 3072 + 2 * 2048 * 8192)
    assert published("pim").rows["weights_gpt3_xl"].low * 2**20 == 12 * 24 * 2048**2


# ---- laws ---------------------------------------------------------------------------------------------


def test_rows_that_fill_are_hit_63_times_in_64(tmp_path):
    # A row of 2 KB holds 64 columns of 32 B, and only the first one opens it.
    program = tmp_path / "full.asm"
    program.write_text("GEMV channels=0xff row=0 cols=64 outs=8 pitch=1 dst=64\n")
    ran = tilewright("exec", "pim-gpt", program, "--json", "-")
    counters = json.loads(ran.out)["counters"]
    assert (counters["act_all"], counters["mac_all"]) == (8 * 8, 8 * 8 * 64)  # channels, rows, columns
    assert row_hit_rate(counters, 16) == pytest.approx(63 / 64, abs=1e-12)


def test_shares_of_a_small_model():
    tiny = Scenario(generate=2, lm_head=False)
    found = run_job(Job("pim-gpt", "gpt2-small", tiny))
    # Instructions are serial: while the ASIC computes, the channels wait, so that the shares can't overlap.
    assert 0.5 < pim.vmm_share(found) < 1 - pim.asic_share(found)
    assert found.operators["softmax"] / found.ticks < pim.asic_share(found) < 0.3
    assert 0.97 < pim.hit_rate(found) < 63 / 64 + 1e-9


# ---- runs ---------------------------------------------------------------------------------------------


def test_processes_find_what_one_finds():
    jobs = [Job("pim-gpt", "gpt2-small", Scenario(generate=n, lm_head=False)) for n in (1, 2, 3)]
    calls = []
    found = run_jobs(jobs, lambda done, total: calls.append((done, total)))
    assert [o.job for o in found] == jobs and found[2] == run_job(jobs[2])
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_a_refusal_in_another_process_arrives():
    good, bad = (Job("pim-gpt", "gpt2-small", Scenario(generate=n, lm_head=False)) for n in (1, 1025))
    with pytest.raises(UserError, match="1024 positions"):
        run_jobs([good, bad, good])
    assert [o.job for o in run_jobs([bad._replace(optional=True), good, bad._replace(optional=True)])] == [
        good
    ]


def test_steps_by_hand():
    assert steps(Fraction(12), whole=False) == (Fraction(54, 5), Fraction(66, 5))
    assert steps(Fraction(128), whole=True) == (115, 141)
    assert steps(Fraction(1), whole=True) == (0, 2)


@pytest.fixture(scope="module")
def found():
    ran = tilewright("reproduce", "pim", "--generate", 2, "--no-sensitivity", "--json", "-")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)  # nothing but JSON


def test_json_of_the_command(found):
    assert found.keys() == {
        "tilewright", "target", "source", "spec", "spec_hash", "generate", "rows", "models", "remarks", "assumed",
        "sensitivity",
    }  # fmt: skip
    assert (found["target"], found["spec"], found["generate"], found["sensitivity"]) == (
        "pim",
        "pim-gpt",
        2,
        None,
    )
    assert [r["key"] for r in found["rows"]] == list(published("pim").rows)
    assert [m["model"] for m in found["models"]] == list(pim.MODELS) and len(pim.MODELS) == 8
    assert "dram.row_bytes" in found["assumed"]


def test_rows_of_the_command_follow_from_its_models(found):
    rows, models = {r["key"]: r for r in found["rows"]}, {m["model"]: m for m in found["models"]}
    for key in ("speedup_gpu", "speedup_cpu", "energy_gpu", "energy_cpu", "row_hits", "vmm_share"):
        values = [m[key] for m in models.values()]
        assert (rows[key]["ours"]["low"], rows[key]["ours"]["high"]) == (min(values), max(values))
    least = min(m["speedup_gpu"] for m in models.values())
    assert rows["speedup_gpu"]["error"][0] == pytest.approx(least / 41 - 1)
    assert rows["speedup_gpu"]["ours"]["bound"] == rows["speedup_cpu"]["ours"]["bound"] == ">="
    assert rows["speedup_gpu"]["verdict"] == "open" and rows["vmm_share"]["error"] is None
    assert rows["asic_share"]["ours"]["by_model"] == {"gpt3-xl": models["gpt3-xl"]["asic_share"]}
    # The speed-up by hand: both machines on the same work.
    scenario = Scenario(generate=2, lm_head=False)
    ours, theirs = (run_job(Job(spec, "gpt2-medium", scenario)) for spec in ("pim-gpt", "t4"))
    assert models["gpt2-medium"]["speedup_gpu"] == pytest.approx(theirs.time_s / ours.time_s)


def test_tables_mark_bounds_and_fit_80_columns(tmp_path, monkeypatch):
    small = pim.probe(1)._replace(model="gpt2-small")  # sooner
    monkeypatch.setattr(pim, "probe", lambda generate: small)
    ran = tilewright("reproduce", "pim", "--generate", 1, "--json", tmp_path / "r.json")
    assert max(len(line) for line in ran.out.splitlines()) <= 80
    text = " ".join(ran.out.split())
    assert re.search(r"speed-up over T4 41\.\.137 published >=\d", text)
    assert "can't be concluded" in text and "not what is published: that is for 1024 tokens" in text
    assert "assumed numbers less and more 10 %: gpt2-small, 1 tokens" in text
    assert "refused by the spec's checks or the mapper, both ways: dram.row_bytes" in text
    # What the constants do, against a run with one of them changed.
    effects = {e["key"]: e for e in json.loads((tmp_path / "r.json").read_text())["sensitivity"]["effects"]}
    assert effects.keys() == {
        k for k in json.loads((tmp_path / "r.json").read_text())["assumed"]
        if k not in ("pim.accumulator", "pim.all_bank_activate")
    }  # fmt: skip
    base, slow = run_job(small), run_job(small._replace(sets=("asic.clock_mhz=900",)))
    assert effects["asic.clock_mhz"]["time"][0] == pytest.approx(slow.time_s / base.time_s - 1)
    assert effects["dram.row_bytes"]["time"] == [None, None]
    assert effects["energy.vdd_v"]["time"] == [0, 0] and effects["energy.vdd_v"]["energy"][1] > 0.01
    sizes = [max(abs(v) for v in (*e["time"], *e["energy"], 0) if v is not None) for e in effects.values()]
    assert sizes == sorted(sizes, reverse=True)


def test_refusals():
    assert refused("reproduce", "pin") == "no published rows for 'pin': did you mean pim?"
    assert "--generate must be in 0..1000000000, not -1" in refused("reproduce", "pim", "--generate", -1)
    assert "1024 positions" in refused("reproduce", "pim", "--generate", 1025)
    assert "there is no directory" in refused("reproduce", "pim", "--json", "nowhere/r.json")
