"""Published rows of LUT Tensor Core beside ours: the data, what can be derived by hand, and the command's output."""

import json
import re
from concurrent.futures import ThreadPoolExecutor
from fractions import Fraction

import pytest

from tests.face.invoke import tilewright
from tilewright.arch.errors import UserError
from tilewright.arch.published import published
from tilewright.arch.registry import load_spec
from tilewright.arch.scenario import Scenario
from tilewright.reproduce import jobs, lut, sensitivity
from tilewright.reproduce.jobs import Job, run_job
from tilewright.reproduce.report import sensitivity_tables
from tilewright.workloads.models import load_model


def test_published_rows_have_sources_and_table_1_is_quoted():
    rows = published("lut").rows
    assert all(r.source and len(r.title) <= 20 for r in rows.values())
    table = {k: float(r.low) for k, r in rows.items() if "Table 1, A100" in r.source and r.unit == "ms"}
    assert table == {
        "prefill_fp16": 106.71, "prefill_int8": 67.06, "prefill_4x": 42.49, "prefill_8x": 38.02,
        "decode_fp16": 41.15, "decode_int8": 21.70, "decode_4x": 11.41, "decode_8x": 7.47,
    }  # fmt: skip
    # The published headline is the quotient of its row: 41.15 / 7.47 = 5.509.
    assert rows["speedup_decode_8x"].low == Fraction("5.51")
    assert table["decode_fp16"] / table["decode_8x"] == pytest.approx(5.51, abs=5e-3)
    for key, (a, b) in {
        "speedup_prefill_4x": ("prefill_fp16", "prefill_4x"), "speedup_prefill_8x": ("prefill_fp16", "prefill_8x"),
        "speedup_decode_4x": ("decode_fp16", "decode_4x"), "speedup_int8_prefill_4x": ("prefill_int8", "prefill_4x"),
        "speedup_int8_decode_4x": ("decode_int8", "decode_4x"), "roofline_prefill_4x": ("prefill_fp16", "prefill_4x"),
        "roofline_decode_4x": ("decode_fp16", "decode_4x"),
    }.items():  # fmt: skip
        assert float(rows[key].low) == pytest.approx(table[a] / table[b], rel=1e-9)
    assert rows["kernel_w1a16"].kind == "secondary"


def test_peaks_and_efficiency_by_hand():
    # 108 SMs x 4 cores x 4 arrays x 512 lanes x 2 operations x 1.41 GHz / 2 planes = 1247.5e12.
    four, eight = load_spec("lut-a100-4x"), load_spec("lut-a100-8x")
    assert lut.peak_tops(four) == pytest.approx(108 * 4 * 4 * 512 * 2 * 1.41e9 / 2 / 1e12)
    assert lut.peak_tops(eight) == pytest.approx(2 * lut.peak_tops(four))
    # 512 lanes x 2 operations in 2 planes of 16.22 pJ each: 31.57 operations a picojoule.
    assert lut.array_efficiency(four) == pytest.approx(512 * 2 / (2 * 16.22))
    # The 1-bit machine of the kernel row has the peak that its source gives, 1248 Tops/s, and stays below it.
    one_bit = load_spec(lut.SPEC, lut.W1A16)
    assert lut.peak_tops(one_bit) == pytest.approx(lut.peak_tops(four))
    assert 0.5 * lut.peak_tops(one_bit) < lut.kernel_tops(lut.W1A16) < lut.peak_tops(one_bit)


def test_a_single_layer_can_not_be_what_is_timed():
    # Linear layers of one of 26 layers, 2048 tokens, at 312e12 operations a second: 1.6 ms of 106.71.
    m = load_model(lut.MODEL)
    weights = m.d_model * (m.q_dim + 2 * m.kv_dim) + m.q_dim * m.d_model + 3 * m.d_model * m.d_ff
    assert 2 * 2048 * weights / 312e12 / 106.71e-3 == pytest.approx(0.015, abs=5e-4)


def test_jobs_keep_their_mapping():
    scenario = Scenario(prompt=2048, generate=0)
    times = {}
    for linear in ("lut", "tensor_int8", "tensor_fp16"):
        job = Job("lut-a100-4x", "bitnet-b1.58-700m", scenario, mapping={"linear": linear})
        times[linear] = run_job(job).time_s
    assert times["lut"] < times["tensor_int8"] < times["tensor_fp16"]


@pytest.fixture(scope="module")
def found():
    ran = tilewright("reproduce", "lut", "--no-sensitivity", "--json", "-")
    assert ran.code == 0, ran.err
    return json.loads(ran.out)


def test_rows_of_the_command_follow_from_its_machines(found):
    rows, machines = {r["key"]: r for r in found["rows"]}, {m["model"]: m for m in found["models"]}
    assert list(rows) == list(published("lut").rows) and list(machines) == list(lut.MACHINES)
    for machine, key in lut.KEYS.items():
        for phase in lut.PHASES:
            ours = rows[f"{phase}_{key}"]["ours"]
            assert ours["low"] == ours["high"] == pytest.approx(1e3 * machines[machine][f"{phase}_s"])
    for key, base, machine, phase in (
        ("speedup_prefill_4x", "FP16 TC", "4X", "prefill"), ("speedup_decode_8x", "FP16 TC", "8X", "decode"),
        ("speedup_int8_decode_4x", "INT8 TC", "4X", "decode"), ("roofline_prefill_4x", "a100", "4X", "prefill"),
    ):  # fmt: skip
        ratio = machines[base][f"{phase}_s"] / machines[machine][f"{phase}_s"]
        assert rows[key]["ours"]["low"] == pytest.approx(ratio)
    assert rows["roofline_prefill_4x"]["ours"]["bound"] == ">=" and rows["llama"]["error"] is None
    assert rows["decode_4x"]["error"][0] == pytest.approx(rows["decode_4x"]["ours"]["low"] / 11.41 - 1)
    # Against the roofline of the same GPU: it bounds our own FP16 machine from below.
    for phase in lut.PHASES:
        assert machines["a100"][f"{phase}_s"] < machines["FP16 TC"][f"{phase}_s"]
    assert machines["4X"]["busy"] > machines["8X"]["busy"] > 0 == machines["FP16 TC"]["busy"]


def test_the_prompt_by_hand(found):
    # The same command line that a user would run.
    ran = tilewright(
        "run", "lut-a100-8x", "--model", lut.MODEL, "--prompt", 2048, "--generate", 0, "--json", "-"
    )
    run = json.loads(ran.out)
    machine = next(m for m in found["models"] if m["model"] == "8X")
    assert machine["prefill_s"] == run["time_s"] and machine["prefill_j"] == run["energy_j"]


def test_a_step_is_a_step_however_many_are_run():
    one, three = (run_job(Job(lut.SPEC, lut.MODEL, lut.decode(n))) for n in (1, 3))
    assert lut.seconds(three) == pytest.approx(lut.seconds(one), rel=0.02)


def test_tables_fit_80_columns(monkeypatch):
    monkeypatch.setattr(lut, "OTHERS", ())  # sooner
    monkeypatch.setattr(lut, "MODEL", "bitnet-b1.58-700m")
    monkeypatch.setattr(lut, "rows", lambda outcomes, real=lut.rows: {"llama": lut.Ours({"-": 1.0})} | {
        k: v for k, v in real(outcomes).items() if k != "llama"
    })  # fmt: skip
    monkeypatch.setattr(lut, "jobs", lambda n, real=lut.jobs: [j for j in real(n) if j.model == lut.MODEL])
    ran = tilewright("reproduce", "lut", "--no-sensitivity")
    assert max(len(line) for line in ran.out.splitlines()) <= 80
    text = " ".join(ran.out.split())
    assert re.search(r"decode, FP16/8X 5\.51 published \d", text)
    assert "Table 1 does not say what it times" in text


def test_assumed_numbers_are_moved(monkeypatch):
    small = Job(lut.SPEC, "bitnet-b1.58-700m", Scenario(prompt=64, generate=1))
    monkeypatch.setattr(lut, "probe", lambda generate: small)
    found = sensitivity("lut")
    effects = {e.key: e for e in found.effects}
    spec = load_spec(lut.SPEC)
    assert set(effects) | set(found.words) == set(spec.assumed()) and "lut.table" in found.words
    base, slow = run_job(small), run_job(small._replace(sets=("memory.dram_efficiency=0.81",)))
    assert effects["memory.dram_efficiency"].time[0] == pytest.approx(slow.time_s / base.time_s - 1)
    assert (
        effects["energy.dram_pj_per_bit"].time == (0, 0) and effects["energy.dram_pj_per_bit"].energy[1] > 0
    )
    assert "bitnet-b1.58-700m, prompt 64, 1 tokens" in sensitivity_tables(found)[0].title


def test_a_number_with_which_nothing_runs_is_left_out(monkeypatch):
    small = Job(lut.SPEC, "bitnet-b1.58-700m", Scenario(prompt=64, generate=1))
    monkeypatch.setattr(lut, "probe", lambda generate: small)
    refused = "memory.dram_efficiency=99/100"

    def run_but(job, real=jobs.run_job):
        if refused in job.sets:
            raise UserError("no place for it")
        return real(job)

    monkeypatch.setattr(jobs, "run_job", run_but)
    monkeypatch.setattr(jobs, "ProcessPoolExecutor", lambda workers, **kw: ThreadPoolExecutor(1))
    found = sensitivity("lut")
    effect = next(e for e in found.effects if e.key == "memory.dram_efficiency")
    assert effect.time[0] > 0 and effect.time[1] is None
    shown = sensitivity_tables(found)
    assert "-: the spec's checks, or the mapper, refuse that value" in shown
