"""Published rows of InstAttention beside ours: the data, what can be derived by hand, and the command's output."""

import json

import pytest

from tests.face.invoke import tilewright
from tilewright.arch.csd import CsdSpec
from tilewright.arch.published import published
from tilewright.arch.spec import build, load_tree
from tilewright.reproduce import csd
from tilewright.reproduce.jobs import Outcome

SPEC = build(CsdSpec, load_tree(csd.SPEC, ["csd"]), "test")


def outcome(system, batch, scenario, time_s, **found):
    attention, kv, _ = csd.SYSTEMS[system]
    job = csd.Job(csd.SPEC, csd.MODEL, scenario, mapping={"attention": attention, "kv": kv})
    known = {"ticks": round(time_s * 285e6), "counters": {}, "operators": {}, "energy_j": 1.0} | found
    return Outcome(job=job, time_s=time_s, units={}, lower_bound=False, **known)


def test_published_rows_have_sources_and_short_titles():
    rows = published("csd").rows
    assert all(r.source and len(r.title) <= 20 for r in rows.values())
    # 2 x 40 layers x 5120 x 2 B are 0.78125 MiB; 64 x 1024 tokens of a layer, 20480 B each, 1.342 GB.
    assert float(rows["kv_token"].low) == pytest.approx(819200 / 2**20, abs=5e-3)
    assert float(rows["write_gb"].low) == pytest.approx(64 * 1024 * 20480 / 1e9, abs=5e-3)
    # Table I: 2 x 16 x 128 operations in 0.32 us.
    assert float(rows["gemv_gflops"].low) == pytest.approx(2 * 16 * 128 / 0.32e3, rel=0.01)
    # 768 DSP x 2 x 285 MHz, 900 DSP x 2 x 361 MHz.
    assert (float(rows["peak_gflops"].low), float(rows["peak_gflops"].high)) == (438, 650)
    assert (round(768 * 2 * 0.285), round(900 * 2 * 0.361)) == (438, 650)


def test_units_by_hand():
    # 16 tokens of 4 lines, then 7 ticks: product, five levels, total. 71 ticks of 285 MHz.
    assert csd.gemv_s(SPEC, 16, 128) == pytest.approx(71 / 285e6)
    # 16 scores, then 2 x (6 + 6) + 1 ticks.
    assert csd.softmax_s(SPEC, 16) == pytest.approx(41 / 285e6)
    assert csd.peak_gflops(SPEC) == pytest.approx(2 * 2 * 32 * 0.285)


def test_throughput_is_of_the_prompt_and_all_steps():
    pair = (
        outcome("InstA", 8, csd.prompt(8), 10.0),
        outcome("InstA", 8, csd.middle(8, 1024), 2.0),
    )
    assert csd.rate(pair, 1024) == pytest.approx(8 * 1024 / (10 + 2048))
    assert pair[1].job.scenario.context == 1024 + 512
    assert csd._generated(pair) == 1024


def test_the_share_of_keys_and_values_is_what_a_step_waits_for():
    operators = {"send": 5, "attention": 60, "receive": 5, "qkv": 20, "kv_fetch": 0, "kv_append": 10}
    drive = outcome("SparF", 8, csd.middle(8, 4), 1.0, ticks=100, operators=operators)
    assert csd.share(drive) == 80
    # Attention on the GPU is no share of theirs, their transfer is.
    ssd = outcome("FlexGen", 8, csd.middle(8, 4), 1.0, ticks=100, operators={"kv_fetch": 70, "attention": 20})
    assert csd.share(ssd) == 70


@pytest.fixture(scope="module")
def found():
    """The command with two batches, the smaller of which stands for 64, and steps at 8 tokens more than the prompt."""
    patch = pytest.MonkeyPatch()
    patch.setattr(csd, "SYSTEMS", {k: (a, kv, (1,)) for k, (a, kv, _) in csd.SYSTEMS.items()})
    patch.setattr(csd, "MANY", 1)
    patch.setattr(csd, "MOST", 1)
    ran = tilewright("reproduce", "csd", "--no-sensitivity", "--generate", "16", "--json", "-")
    table = tilewright("reproduce", "csd", "--no-sensitivity", "--generate", "16")
    patch.undo()
    assert ran.code == table.code == 0, ran.err
    return json.loads(ran.out), table.out


def test_rows_of_the_command_follow_from_its_runs(found):
    rows, systems = (
        {r[name]: r for r in found[0][key]} for key, name in (("rows", "key"), ("models", "model"))
    )
    assert list(rows) == list(published("csd").rows)
    ours = {key: row["ours"]["low"] for key, row in rows.items()}
    rate = {name.split(",")[0]: row["rate"] for name, row in systems.items()}
    assert ours["flexgen_64"] == pytest.approx(rate["InstA"] / rate["FlexGen"])
    assert ours["sparf_flexgen"] == pytest.approx(rate["SparF"] / rate["FlexGen"])
    assert ours["deepspeed_best"] == pytest.approx(rate["InstA"] / rate["DeepSpeed"])
    a = systems["InstA, batch 1"]
    assert a["rate"] == pytest.approx(16 / (a["prompt_s"] + 16 * a["step_s"]))
    # What does not depend on time or batch: K and V of a token, K a second time, s tokens against 2 of q, k, v, out.
    assert ours["kv_token"] == pytest.approx(819200 / 2**20)
    assert ours["footprint"] == 1.5
    assert ours["traffic"] == pytest.approx(0.5, rel=1e-2)
    assert ours["write_gb"] == pytest.approx(1024 * 20480 / 1e9)
    assert ours["kv_32"] == pytest.approx(100) and ours["kv_128"] == pytest.approx(200)
    # 8 channels of 1.4 GB/s, less commands; programs: 256 planes x 4 KB in 350 us and their transfer.
    assert 8 < ours["flash_gb"] < 11.2
    assert 1.5 < ours["write_rate"] < 256 * 4096 / 350e3
    # 16 of 128 channels leave (112/128)^8 = 34 % of pages of 8 untouched.
    assert ours["sparsity"] == pytest.approx(100 * (7 / 8) ** 8, abs=8)


def test_misses_are_named_and_tables_fit_80_columns(found):
    document, table = found
    assert any("bounds" in line for line in document["remarks"])
    assert max(len(line) for line in table.splitlines()) <= 80


def test_every_row_has_a_verdict(found):
    rows = {r["key"]: r["verdict"] for r in found[0]["rows"]}
    assert rows["softmax_us"] == "open" and rows["footprint"] == "inside" and rows["flexgen_64"] == "outside"
