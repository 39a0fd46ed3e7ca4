"""Published rows of SN40L and Plasticine beside ours: the data, and what follows from it by hand."""

from fractions import Fraction

import pytest

from tilewright.arch.published import published
from tilewright.arch.registry import load_spec
from tilewright.mappers.rdu.apps import LOGGED
from tilewright.reproduce import Row, rdu
from tilewright.reproduce.jobs import Outcome
from tilewright.workloads.models import load_model


def test_rows_have_sources_and_the_logs_are_quoted():
    rows = published("rdu").rows
    assert all(r.source and len(r.title) <= 20 for r in rows.values())
    logs = {k: int(r.low) for k, r in rows.items() if "2020-05-05" in r.source}
    assert set(logs) == set(LOGGED)
    assert logs["gemm_0"] == 132071 and logs["outer_0"] == 4481 and logs["sram_split_3"] == 224618
    # The older log, whose columns are not to be mixed with the others': routed less ideal.
    routed = {k: int(rows[k].low) for k in rdu.ROUTED}
    assert routed == {
        "routed_dot_simple_0": 1104 - 1088, "routed_gemm_0": 132450 - 132337, "routed_outer_1": 65901 - 65819,
    }  # fmt: skip
    assert rows["ridge_sn40l"].low == 319 and rows["ridge_sn40l"].high == Fraction("398.75")
    assert rows["switch_8b"].kind == rows["share_of_peak"].kind == "secondary"


def test_peaks_by_hand():
    # 1040 PCUs of 16 x 12 at 1.6 GHz: 638.976; 64 of 16 x 6 at 1 GHz: 12.288; in 1e12 operations, two a product.
    assert rdu.peak_tflops("sn40l") == pytest.approx(1040 * 192 * 2 * 1.6e9 / 1e12)
    assert rdu.peak_tflops("plasticine") == pytest.approx(64 * 96 * 2 * 1e9 / 1e12)
    assert rdu.peak_tflops("sn40l") == pytest.approx(638, rel=2e-3)


def test_intensities_by_hand():
    # b 1, all sides 2: 16 + 4 + 16 operations; five operands of 4 elements, 8 bytes each; six transfers between.
    found = rdu.intensities(1, 2, 2, 2, 2)
    assert found == pytest.approx({"fused": 36 / 40, "partial": 36 / 56, "unfused": 36 / 88})
    rows = published("rdu").rows
    ours = rdu.intensities(*rdu.SHAPE)
    assert rows["intensity_fused"].low <= ours["fused"] <= rows["intensity_fused"].high  # 410.4, rounded
    assert ours["partial"] == pytest.approx(102.6, rel=5e-3)
    # The plain count has 4 % less traffic than the printed row.
    assert ours["unfused"] / 39.5 == pytest.approx(1.035, abs=5e-3)


def test_switching_follows_from_one_number():
    # 13.476 GB at 1000 GB/s: 13.5 ms; from the host at 32 and 64 GB/s 421 and 211 ms.
    assert rdu.node_copy() == pytest.approx(1000)
    weights = 2 * load_model("llama-2-7b").parameters["total"]
    assert weights == pytest.approx(13.476e9, rel=1e-3)
    assert rdu.switch_seconds(weights, 32) / rdu.switch_seconds(weights, rdu.node_copy()) == pytest.approx(
        31.25
    )
    assert rdu.node_copy(["node.ddr_to_hbm_gb_per_s=100"]) == pytest.approx(800)
    # 150 experts, 8 prompts: 7.8 different ones; a prompt asks for one.
    assert rdu.distinct(150, 1) == pytest.approx(1)
    assert rdu.distinct(150, 8) == pytest.approx(7.816, abs=2e-3)
    assert rdu.distinct(1, 8) == 1


TIMES = {  # seconds of (prefill, decode step), and launches, by way of mapping
    "unfused": (0.4, 0.05, 1100),
    "SO": (0.2, 0.01, 100),
    "HO": (0.16, 0.004, 100),
}


TRAINING = {"unfused": 0.9, "SO": 0.5, "HO": 0.45}  # seconds of a step


def _outcome(job):
    ways = {tuple(v.items()): k for k, v in rdu.MAPPINGS.items()}
    way = ways[tuple(job.mapping.items())] if job.mapping else None
    prompt, step, launches = TIMES.get(way, (0.1, 0.03, 0))
    steps = job.scenario.generate
    time = prompt if job.scenario.prompt else step * steps * (2 if job.sets else 1)
    time = TRAINING[way] if job.scenario.train else time
    counters = {"launches": launches, "hbm_lines": 10**8}
    return Outcome(job, 0, time, 1.0, counters, {}, {}, way is None)


@pytest.fixture
def found(monkeypatch):
    """Rows of made-up runs, so that the sums can be done by hand."""
    monkeypatch.setattr(rdu, "app", lambda key: rdu.App(90_000, 100_000, 101_000, 7))
    line = rdu.Transform({"unfused": 8.0, "SO": 2.0, "HO": 1.0}, {"unfused": 19, "SO": 1, "HO": 1})
    monkeypatch.setattr(rdu, "convolution", lambda order: line)
    return [_outcome(job) for job in rdu.jobs(1)]


def test_rows_by_hand(found):
    ours = rdu.rows(found)
    assert set(ours) == set(published("rdu").rows)
    low = {key: row.low for key, row in ours.items()}
    assert low["gemm_0"] == 101_000 and low["routed_gemm_0"] == 7
    # 0.4 / 0.2 and 0.05 / 0.01 by fusion, 0.2 / 0.16 and 0.01 / 0.004 by hardware, 1100 / 100 calls.
    assert low["fusion_prefill"] == pytest.approx(2) and low["fusion_decode"] == pytest.approx(5)
    assert low["hardware_prefill"] == pytest.approx(1.25) and low["hardware_decode"] == pytest.approx(2.5)
    assert low["fusion_training"] == pytest.approx(1.8)  # 0.9 / 0.5
    assert low["hardware_training"] == pytest.approx(10 / 9)  # 0.5 / 0.45
    assert low["calls_prefill"] == 11 and low["overall"] == pytest.approx(2)
    assert ours["overall"].high == pytest.approx(12.5)
    assert low["flashfft"] == 4 and low["flashfft_calls"] == 1 and low["flashfft_hardware"] == 2
    # 1e8 lines of 64 bytes in 4 ms of 1.8 TB/s; 16 sockets: 1 / (2 * 0.004).
    assert low["share_of_peak"] == pytest.approx(100 * 6.4e9 / (0.004 * 1.8e12))
    assert low["rate_8b"] == pytest.approx(125)
    # A DGX step: a roofline of 30 ms by eight. Batch 1, 20 tokens: (0.421 + 21 * 0.00375) / (0.0135 + 21 * 0.004),
    # its router a step.
    weights = 2 * load_model("llama-2-7b").parameters["total"]
    assert low["coe_expert_1"] == pytest.approx(0.03 / 8 / 0.004)
    dgx, own = (weights / rate + 21 * step for rate, step in ((32e9, 0.03 / 8), (1e12, 0.004)))
    assert ours["coe_overall_1"].by_model["20 tokens"] == pytest.approx(dgx / own)
    assert ours["coe_overall_1"].bound == ">="


def test_a_miss_is_shown_as_a_miss(found):
    ours = rdu.rows(found)
    rows = {key: Row(key, row, ours[key]) for key, row in published("rdu").rows.items()}
    assert rows["flashfft"].verdict == "outside" and rows["fusion_prefill"].verdict == "inside"
    assert rows["switch_h100"].verdict == rows["switch_a100"].verdict == rows["switch_8b"].verdict == "inside"
    assert rows["gemm_0"].verdict == "outside" and rows["rate_405b"].verdict == "open"
    text = " ".join(rdu.remarks(rows))
    assert "differ by 3.7 and" in text and "in 19" in text
    assert [m["model"] for m in rdu.models(found)][:1] == ["SimpleDotProduct_0"]
    assert rdu.models(found)[0]["error"] == pytest.approx(1.0) and set(rdu.models(found)[0]) == {
        "model",
        *rdu.HEADINGS,
    }


def test_an_application_is_measured_on_the_preset_of_the_logs():
    found = rdu.app("dot_simple_1")
    assert found.ideal == 512 and found.logged == 576
    # Fill, drain and the last tile: beyond the loops, and not by much. Every link is taken once.
    assert 512 + 32 < found.ours < 640 and 0 < found.network < 40
    assert load_spec(rdu.PLASTICINE).params().hop == 1
