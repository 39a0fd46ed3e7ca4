"""Roofline devices: presets and their provenance, operator times by hand, and laws over random operators."""

from fractions import Fraction
from math import ceil

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.arch.clock import Clock
from tilewright.arch.errors import UserError
from tilewright.arch.system import UNITS, load_roofline, roofline_presets
from tilewright.sim.roofline import operator_s, run_graph

NS = Clock.from_ns(Fraction(1))
# GPT2-XL: 48 layers of 12 * 1600**2 weights.
GPT2_XL = 48 * 12 * 1600**2

DEVICE = """
target: system
name: toy
peak_tops: {fp16: {value: 0.001, unit: Tops/s, source: "toy", kind: published}}
memory:
  gb_per_s: {value: 2, unit: GB/s, source: "toy", kind: published}
  gb: 1
efficiency:
  compute: {value: 0.5, unit: "1", source: "toy, Table 1", kind: measured}
  memory: {value: 0.25, unit: "1", source: "toy, Table 1", kind: measured}
launch_overhead_us: 0.003
power: {peak_w: 10}
"""


@pytest.fixture
def toy(tmp_path):
    """A device of 5e8 achieved operations and bytes a second, 3 ns to launch, 10 W."""

    def make(old="", new=""):
        assert old in DEVICE
        (tmp_path / "toy.yaml").write_text(DEVICE.replace(old, new) if old else DEVICE)
        return load_roofline(str(tmp_path / "toy.yaml"))

    return make


# ---- presets ------------------------------------------------------------------------------------------


def test_presets():
    assert roofline_presets() == ["a100", "a6000", "h100", "t4", "xeon-6154"]


@pytest.mark.parametrize("name", ["a100", "a6000", "h100", "t4", "xeon-6154"])
def test_every_number_has_a_unit_and_a_source(name):
    spec = load_roofline(name)
    assert spec.name == name
    for path, p in spec.provenance.items():
        assert p.unit == UNITS[path], path
        assert p.source, path
    stated = {path for path, value in spec.leaves() if value is not None}
    defaults = {"efficiency.compute", "efficiency.memory", "launch_overhead_us"}
    assert stated - {"target", "name", "description"} - defaults == set(spec.provenance)
    # No preset states an efficiency: each is a bound, and a speed-up over it an "at least".
    assert spec.is_bound
    # Narrower numbers are never slower, and memory is never faster than arithmetic on bytes.
    rates = spec.params().ops_per_s
    assert rates["fp32"] <= rates["fp16"] <= rates.get("int8", rates["fp16"])
    assert rates["fp16"] > spec.params().bytes_per_s


def test_what_nobody_published_is_listed():
    assert load_roofline("xeon-6154").assumed() == [
        "peak_tops.fp32",
        "peak_tops.fp16",
        "peak_tops.bf16",
        "memory.gb",
    ]
    assert all(load_roofline(name).assumed() == [] for name in ("t4", "a100", "a6000", "h100"))


# Weights of GPT2-XL are read once for a token: 1,474,560,000 * 2 B = 2.94912 GB.
@pytest.mark.parametrize(
    "name, ms",
    [
        ("t4", Fraction("9.216")),  # 2.94912 / 320
        ("xeon-6154", Fraction("23.04")),  # 2.94912 / 128
        ("a6000", Fraction("3.84")),  # 2.94912 / 768
        ("a100", Fraction(2949120, 2039) / 1000),
        ("h100", Fraction(2949120, 3350) / 1000),
    ],
)
def test_gpt2_xl_decodes_at_memory_speed(name, ms):
    assert operator_s(load_roofline(name), 2 * GPT2_XL, 2 * GPT2_XL, "fp16") == ms / 1000


def test_prefill_is_compute_bound():
    # 2 * 1.47456e9 * 1024 tokens = 3.0199e12 operations; / 65e12 = 46.46 ms, above the 9.216 ms of reading.
    t = operator_s(load_roofline("t4"), 2 * GPT2_XL * 1024, 2 * GPT2_XL, "fp16")
    assert t == Fraction(2 * GPT2_XL * 1024, 65 * 10**12)
    assert 46.4 < 1000 * t < 46.5


def test_host_copies():
    # SN40L paper, VI.C: a Llama2-7B expert (6.738e9 weights, 13.476 GB) at 32 and 64 GB/s: 421.1 and 210.6 ms.
    n_bytes = 2 * 6_738_000_000
    assert load_roofline("a100").link("pcie").transfer_ticks(n_bytes, NS) == 421_125_000
    assert load_roofline("h100").link("pcie").transfer_ticks(n_bytes, NS) == 210_562_500
    with pytest.raises(UserError, match=r"xeon-6154: host_link.gb_per_s is not stated"):
        load_roofline("xeon-6154").link("pcie")


def test_capacity():
    t4 = load_roofline("t4")
    assert t4.fits(16 * 10**9)
    assert not t4.fits(16 * 10**9 + 1)


def test_energy_is_charged_at_rated_power():
    # 2 s busy at 70 W and 3 s idle at 9 W: 140 + 27 J. The A6000 states no idle power: 2 * 300 + 3 * 300.
    assert load_roofline("t4").energy_j(Fraction(2), Fraction(3)) == 167
    assert load_roofline("a6000").energy_j(Fraction(2), Fraction(3)) == 1500


# ---- files --------------------------------------------------------------------------------------------


def test_stated_efficiency_makes_times_estimates(toy):
    spec = toy()
    assert not spec.is_bound
    assert spec.params().ops_per_s == {"fp16": Fraction(5 * 10**8)}
    assert spec.params().bytes_per_s == 5 * 10**8
    assert toy('  memory: {value: 0.25, unit: "1", source: "toy, Table 1", kind: measured}\n').is_bound


@pytest.mark.parametrize(
    "old, new, message",
    [
        ("kind: measured}\n  memory: {value: 0.25", "kind: assumed}\n  memory: {value: 0.25", "yaml:9: efficiency.compute must be 1, or"),
        ("value: 0.5", "value: 1.5", "efficiency.compute must be less than or equal to 1, not '1.5'"),
        ("value: 0.5", "value: 0", "efficiency.compute must be greater than 0"),
        ("unit: GB/s", "unit: TB/s", "memory.gb_per_s is in GB/s, not 'TB/s'"),
        ("  gb: 1", "  gb: 1\n  gb_s: 1", "unknown key memory.gb_s: did you mean gb_per_s?"),
        ("{peak_w: 10}", "{idle_w: 10}", "key power.peak_w is missing"),
        ("target: system", "target: pim", "target of a roofline device must be 'system', not 'pim'"),
        ("target: system", "description: none", "target of a roofline device must be 'system', not None"),
        ("peak_w: 10", "peak_w: lots", "power.peak_w: must be a number, not 'lots'"),
    ],
)  # fmt: skip
def test_bad_files_are_refused(toy, old, new, message):
    with pytest.raises(UserError, match=message):
        toy(old, new)


def test_unknown_names_and_formats_are_refused():
    with pytest.raises(UserError, match="did you mean a100"):
        load_roofline("a10O")
    with pytest.raises(UserError, match="t4: no peak is stated for number format 'bf16': did you mean fp16"):
        operator_s(load_roofline("t4"), 1, 1, "bf16")
    with pytest.raises(UserError, match=r"efficiency.memory must be 1, or have a source"):
        load_roofline("t4", ["efficiency.memory=0.8"])
    assert load_roofline("t4", ["memory.gb_per_s=300"]).params().bytes_per_s == 3 * 10**11


# ---- runs ---------------------------------------------------------------------------------------------


def test_run_by_hand(toy):
    run = run_graph(
        toy(), [("fc", 0, 10, np.array([4, 20])), ("act", 1, 1, 0)], "fp16", Clock.from_ns(Fraction(4))
    )
    # 2 ns for an operation or a byte, 3 ns to launch, ticks of 4 ns.
    # fc: max(20, 8) + 3 = 23 ns -> 6; max(20, 40) + 3 = 43 ns -> 11. act: max(2, 0) + 3 = 5 ns -> 2, twice.
    assert run.ticks.tolist() == [[6, 2], [11, 2]]
    assert run.memory_bound.tolist() == [[False, False], [True, False]]
    assert run.starts().tolist() == [[0, 6], [8, 19]]
    assert run.total_ticks == 21
    # Exactly 23 + 5 + 43 + 5 = 76 ns, at 10 W.
    assert run.busy_s == Fraction(76, 10**9)
    assert run.energy_j == Fraction(760, 10**9)
    assert (run.names, run.layers, run.is_bound) == (("fc", "act"), (0, 1), False)
    with pytest.raises(ValueError, match="read-only"):
        run.ticks[0, 0] = 1


def test_a_long_decode_with_growing_context():
    # 48 layers, each with 24 * d**2 operations on weights and 4 * d * context on the cache (fp16, d = 1600).
    d, steps = 1600, np.arange(1, 1025)
    layer = [("fc", 24 * d * d, 24 * d * d), ("attention", 4 * d * steps, 4 * d * steps)]
    operators = [(name, i, ops, n_bytes) for i in range(48) for name, ops, n_bytes in layer]
    run = run_graph(load_roofline("t4"), operators, "fp16", NS)
    assert run.ticks.shape == (1024, 96)
    assert run.memory_bound.all()
    # 1024 * 9.216 ms, plus 48 * 4 * 1600 B * (1024 * 1025 / 2) / 320 GB/s = 503.808 ms.
    assert run.busy_s == 1024 * Fraction("0.009216") + Fraction("0.503808")
    # Rounding up costs less than a tick for each operator.
    assert 0 <= run.total_ticks - run.busy_s * 10**9 < run.ticks.size


def test_no_operators_take_no_time(toy):
    run = run_graph(toy(), [], "fp16", NS)
    assert (run.total_ticks, run.busy_s) == (0, 0)


@pytest.mark.parametrize(
    "operators, message",
    [
        ([("fc", 0, 1.5, 1)], "operator fc: operations must be integers"),
        ([("fc", 0, 1, [[1]])], "operator fc: bytes must be integers"),
        ([("fc", 0, -1, 1)], "operator fc: operations must not be negative, not -1"),
        ([("fc", 0, [1, 2], 1), ("act", 0, [1, 2, 3], 1)], "operations are given for 2 and 3 steps"),
        ([("fc", 0, [1, 2], [1, 2, 3])], "operations are given for 2 steps, bytes for 3"),
    ],
)
def test_bad_amounts_are_refused(toy, operators, message):
    with pytest.raises(UserError, match=message):
        run_graph(toy(), operators, "fp16", NS)


amounts = st.lists(st.tuples(st.integers(0, 2**70), st.integers(0, 2**70)), min_size=1, max_size=8)


@settings(deadline=None, max_examples=100)
@given(st.sampled_from(roofline_presets()), amounts, st.fractions(Fraction(1, 10), 10))
def test_a_run_is_its_operators_one_by_one(name, work, tick_us):
    # Ticks of about a microsecond keep the largest amounts within int64.
    spec, clock = load_roofline(name), Clock(tick_us / 10**6)
    run = run_graph(spec, [(f"op{i}", i, ops, n) for i, (ops, n) in enumerate(work)], "fp16", clock)
    times = [operator_s(spec, ops, n, "fp16") for ops, n in work]
    assert run.ticks.tolist() == [[ceil(t / clock.period_s) for t in times]]
    assert run.busy_s == sum(times)
    p = spec.params()
    for (ops, n), t, memory in zip(work, times, run.memory_bound[0], strict=True):
        assert t == max(ops / p.ops_per_s["fp16"], n / p.bytes_per_s)
        assert memory == (n / p.bytes_per_s > ops / p.ops_per_s["fp16"])
