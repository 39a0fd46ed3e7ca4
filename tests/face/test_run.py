"""`run`: the sums of the tables, the JSON contract, comparisons and baselines."""

import csv
import io
import json

import numpy as np
import pytest

from tests.face.invoke import tilewright, tiny_model
from tilewright import report
from tilewright.arch.clock import Clock
from tilewright.arch.scenario import TagInfo
from tilewright.arch.timeline import SPAN as ROW
from tilewright.arch.timeline import Timeline
from tilewright.devices import load_device
from tilewright.summary import Result, bound_by, of_timeline, row_hit_rate

FIELDS = {
    "tilewright", "spec", "spec_hash", "model", "scenario", "cycles", "tick_s", "time_s", "tokens_per_s",
    "energy_j", "area_mm2", "counters", "units", "assumed", "seed", "spans",
}  # fmt: skip
SPAN = {"name", "op", "layer", "start", "end", "cycles", "energy_j", "bound_by"}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_model(tmp_path_factory.mktemp("model"))


def run(*arguments):
    ran = tilewright("run", *arguments, "--json", "-")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def test_json_has_the_fields_of_the_contract(model):
    found = run("pim-gpt", "--model", model, "--context", 2, "--prompt", 3, "--generate", 4, "--seed", 7)
    assert found.keys() == FIELDS
    assert all(span.keys() == SPAN for span in found["spans"])
    assert found["scenario"] == {
        "context": 2, "prompt": 3, "generate": 4, "batch": 1, "lm_head": True, "embedding": True, "seed": 7,
        "train": 0,
    }  # fmt: skip
    assert (found["spec"], found["model"], found["seed"]) == ("pim-gpt", "tiny", 7)
    assert found["tick_s"] == "1/2000000000" and found["area_mm2"] is None
    assert found["time_s"] == pytest.approx(found["cycles"] * 0.5e-9)
    assert found["tokens_per_s"] == pytest.approx(4 / found["time_s"])
    assert any("token ids" in text for text in found["assumed"]) and "dram.rows" in found["assumed"]


@pytest.mark.parametrize("batch", [1, 2])  # the spans of two sequences' operators overlap
def test_cycles_and_energies_add_up(model, batch):
    found = run("pim-gpt", "--model", model, "--generate", 4, "--batch", batch)
    # All but the one fetch that finds the end of the program.
    assert found["cycles"] - sum(s["cycles"] for s in found["spans"]) in (1, 2)
    energy = sum(s["energy_j"] for s in found["spans"])
    assert energy == pytest.approx(found["energy_j"], rel=1e-3) and energy <= found["energy_j"]
    for unit in found["units"].values():
        assert unit["busy"] + sum(unit["stalls"].values()) == found["cycles"]


def test_spans_by_step_sum_to_spans_by_operator(model):
    whole = run("pim-gpt", "--model", model, "--generate", 4)["spans"]
    steps = run("pim-gpt", "--model", model, "--generate", 4, "--spans", "step")["spans"]
    assert {s["step"] for s in steps} == {0, 1, 2, 3}
    for span in whole:
        own = [s for s in steps if s["name"] == span["name"]]
        assert (min(s["start"] for s in own), max(s["end"] for s in own)) == (span["start"], span["end"])
        # Within a step the LM head and its argmax take turns: their spans overlap.
        assert sum(s["cycles"] for s in own) >= span["cycles"]
        if span["op"] not in ("lm_head", "argmax"):
            assert sum(s["cycles"] for s in own) == span["cycles"]
        assert all(s["energy_j"] is None and s["bound_by"] is None for s in own)


def test_folding_changes_nothing(model):
    folded = run("pim-gpt", "--model", model, "--prompt", 2, "--generate", 2)
    assert folded == run("pim-gpt", "--model", model, "--prompt", 2, "--generate", 2, "--no-fold")


def test_without_generated_tokens_there_is_no_rate(model):
    assert run("pim-gpt", "--model", model, "--prompt", 2, "--generate", 0)["tokens_per_s"] is None


def test_lm_head_and_embedding_can_be_left_out(model):
    found = run("pim-gpt", "--model", model, "--no-lm-head", "--no-embedding")
    ops = {s["op"] for s in found["spans"]}
    assert "qkv" in ops and not ops & {"lm_head", "argmax", "embedding"}
    assert "LM head no" in tilewright("run", "pim-gpt", "--model", model, "--no-lm-head").out


def test_a_slower_part_makes_a_slower_machine(model):
    a = run("pim-gpt", "--model", model)
    b = run("pim-gpt", "--model", model, "--set", "dram.timing.t_ccd_l_ns=4")
    assert b["cycles"] > a["cycles"] and b["spec_hash"] != a["spec_hash"]
    assert "dram.timing.t_ccd_l_ns" in b["assumed"]


def test_several_specs_are_a_list_and_ratios_are_to_the_first(model, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    both = run("pim-gpt", "t4", "gddr6-aim", "--model", model)
    assert [r["spec"] for r in both] == ["pim-gpt", "t4", "gddr6-aim"]
    ran = tilewright("run", "pim-gpt", "t4", "gddr6-aim", "--model", model)
    lines = [line.split() for line in ran.out.splitlines()]
    slower = both[2]["time_s"] / both[0]["time_s"]
    assert any(row[:1] == ["gddr6-aim"] and f"{slower:.2f}x" in row for row in lines)
    assert any(row[:1] == ["t4"] and any(word.startswith(">=") for word in row) for row in lines)
    assert "roofline in fp16" in ran.out


def test_mapping_goes_out_and_comes_back(model, tmp_path):
    path = tmp_path / "mapping.yaml"
    first = run("pim-gpt", "--model", model, "--mapping-out", path)
    assert "regions" in path.read_text()
    assert run("pim-gpt", "--model", model, "--mapping", path) == first


def test_csv_holds_the_spans(model, tmp_path):
    path = tmp_path / "run.csv"
    found = run("pim-gpt", "--model", model, "--csv", path)
    rows = list(csv.DictReader(io.StringIO(path.read_text())))
    assert [(r["name"], int(r["cycles"])) for r in rows] == [(s["name"], s["cycles"]) for s in found["spans"]]


def test_dash_prints_nothing_else(model):
    ran = tilewright("run", "t4", "--model", model, "--csv", "-")
    assert (
        ran.out.startswith("spec,name,op,layer,step,start,end,cycles,energy_j,bound_by\n") and ran.err == ""
    )
    assert {len(row) for row in csv.reader(io.StringIO(ran.out))} == {10}


def test_roofline_by_hand(model):
    # One token behind none: the QKV matrix of layer 0 is 32 x 96 in fp16 and binds by memory at 320 GB/s.
    found = run("t4", "--model", model)
    span = next(s for s in found["spans"] if s["name"] == "layer 0 qkv")
    n_bytes = 2 * (32 * 96 + 96 + 32 + 96)  # weights, bias, input, output
    assert span["cycles"] == -(-n_bytes * 1000 // 320)  # picoseconds
    assert span["bound_by"] == "memory" and span["energy_j"] == pytest.approx(span["cycles"] * 70e-12)
    assert sum(s["cycles"] for s in found["spans"]) == found["cycles"]
    assert any("lower bounds" in text for text in found["assumed"])


def test_roofline_steps_follow_one_another(model):
    found = run("t4", "--model", model, "--prompt", 3, "--generate", 2, "--spans", "step")
    ends = [0] + [s["end"] for s in found["spans"]]
    assert [s["start"] for s in found["spans"]] == ends[:-1] and ends[-1] == found["cycles"]
    assert {s["step"] for s in found["spans"]} == {0, 1, 2}  # the prompt is one pass


def test_equal_units_go_by_the_name_of_their_kind():
    def bound(rows, units):
        rows = np.array(rows)
        line = Timeline(
            ticks=int(rows[0].sum()), tags=("t",), spans=np.zeros(0, ROW), counter_names=(),
            counters=np.zeros((2, 0), np.int64), units=units, causes=("column", "wait", "idle"),
            activity=np.stack([rows, np.zeros_like(rows)]),
        )  # fmt: skip
        return bound_by(line, np.array([1.0]))

    # busy, column, wait, idle: the sequencer waits, the channels are engaged in 80 and 90 of 100 ticks.
    rows = [[5, 0, 95, 0], [20, 60, 0, 20], [30, 60, 0, 10]]
    assert bound(rows, ("sequencer", "channel 0", "channel 1")) == "channels: column"
    assert bound(rows[:2], ("sequencer", "channel 0")) == "channel 0: column"
    assert bound([[5, 0, 95, 0], [60, 20, 0, 20]], ("sequencer", "channel 0")) == "channel 0"
    # The one that works most is not the one that is engaged most.
    assert bound([[30, 0, 0, 70], [20, 60, 0, 20]], ("asic", "channel 0")) == "channel 0: column"


def test_what_binds_a_kernel_binds_what_works_inside_it():
    # Kernels of 40 and 60 ticks. In both, gates work for `weights`, 30 and 10 ticks, in the second one units add for 45.
    spans = [
        (0, 0, 0, 40, 40, 1),
        (0, 2, 5, 35, 30, 1),
        (1, 1, 40, 100, 60, 1),
        (1, 2, 50, 60, 10, 1),
        (1, 3, 50, 95, 45, 1),
    ]
    activity = np.zeros((5, 3, 3), np.int64)  # busy, pipeline, idle of the sequencer, a gate and a unit
    activity[0, 0, 1], activity[1, 0, 1] = 40, 60
    activity[2, 1, 0], activity[3, 2, 0] = 40, 45
    activity[-1, 1, 2], activity[-1, 2, 2] = 60, 55
    names = ("first", "second", "weights", "add")
    line = Timeline(
        ticks=100, tags=names, spans=np.array(spans, ROW), counter_names=(), counters=np.zeros((5, 0), np.int64),
        units=("sequencer", "gate", "unit"), causes=("pipeline", "idle"), activity=activity, waiting=("pipeline", "idle"),
    )  # fmt: skip
    found = of_timeline(line, [TagInfo(name, name, -1) for name in names], None)
    # Of the gate's 40 ticks the first kernel has 30, the second one 10.
    assert {o.name: o.bound_by for o in found["operators"]} == {
        "first": "gate", "second": "unit", "weights": "gate", "add": "unit",
    }  # fmt: skip
    assert found["spans"].bound_by == ["gate", "unit", "gate", "unit"]
    assert [o.inside for o in found["operators"]] == [False, False, True, True]


def test_row_hit_rate_by_hand():
    # One all-bank activate for 63 + 1 all-bank MACs, over 4 banks, and one read behind one activate of its own:
    # 5 activates for 4 * 64 + 1 column accesses.
    counters = {"act": 1, "act_all": 1, "rd": 1, "wr": 0, "mac_all": 64}
    assert row_hit_rate(counters, 4) == pytest.approx(1 - 5 / 257)
    assert row_hit_rate({"macs": 3}, 4) is None
    # Ten lines of HBM in two rows; DDR, a port, opens none.
    lines = {"hbm_lines": 10, "hbm_activates": 2, "ddr_lines": 30, "ddr_activates": 0}
    assert row_hit_rate(lines, 0) == pytest.approx(0.8)
    assert row_hit_rate({**lines, "hbm_activates": 0}, 0) is None


@pytest.mark.parametrize(
    ("first", "other", "shown"),
    [(False, False, "2.00x"), (False, True, ">=2.00x"), (True, False, "<=2.00x"), (True, True, "2.00x")],
)
def test_ratios_say_when_they_are_bounds(first, other, shown):
    spec = load_device("t4")

    def result(bound):
        return Result(
            spec=spec, cycles=1, tick=Clock(1), energy_j=None, counters={}, units={}, operators=(),
            spans=None, lower_bound=bound,
        )  # fmt: skip

    assert report.ratio(2.0, result(first), result(other)) == shown


def test_lines_of_the_table(model, monkeypatch):
    monkeypatch.setenv("COLUMNS", "80")
    found = run("pim-gpt", "--model", model, "--generate", 3)
    ran = tilewright("run", "pim-gpt", "--model", model, "--generate", 3)
    rows = {line.split()[0]: line.split() for line in ran.out.splitlines() if line.strip()}
    # Two layers in three steps.
    own = sum(s["cycles"] for s in found["spans"] if s["op"] == "qkv")
    assert rows["qkv"][1:3] == ["6", f"{own:,}"]
    assert rows["total"][2] == f"{found['cycles']:,}"
    assert (
        "row hits" in ran.out and "tokens/s" in ran.out and "seed 0" in ran.out and "LM head yes" in ran.out
    )
