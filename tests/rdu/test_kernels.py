"""The NumPy kernels of compute and memory units, against sums done by hand and against plain Python."""

from itertools import product
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.rdu.units import small
from tests.workloads.test_reference_rules import offences
from tilewright.arch import rdu
from tilewright.arch import spec as specs
from tilewright.arch.errors import UserError
from tilewright.arch.rdu import CONFIG_AGCU, CONFIG_PCU, CONFIG_PMU, CONFIG_STAGE, systolic_fill
from tilewright.workloads import rdu_kernels as kernels

WORD = st.integers(0, 2**32 - 1)


def f32(*values):
    return np.array(values, np.float32).view(np.uint32)


def value(words):
    return np.asarray(words, np.uint32).view(np.float32)


def signed(word):
    return word - 2**32 if word >> 31 else word


def test_kernels_use_elementwise_operations_only():
    assert offences(Path(kernels.__file__).read_text("utf-8")) == []


# ---- functional units ---------------------------------------------------------------------------------


def test_operations_by_hand():
    def one(operation, kind, a, b, choose=0):
        return int(kernels.lane_op(operation, kind, a, b, choose))

    assert one("shift_right", "int32", 0x80000000, 33) == 0xC0000000  # by 33 mod 32, with the sign
    assert one("shift_left", "fp32", 0x80000001, 4) == 0x10
    assert one("multiply", "int32", 0xFFFFFFFF, 7) == 0xFFFFFFF9  # -1 * 7
    assert one("less", "int32", 0xFFFFFFFF, 0) == 1
    assert one("less", "fp32", *f32(-0.0, 0.0)) == 0
    assert one("less", "fp32", *f32(np.nan, 1.0)) == 0
    assert one("minimum", "fp32", *f32(0.0, -0.0)) == 0x80000000
    assert one("minimum", "fp32", *f32(1.0, np.nan)) == 0x7FC00000
    assert one("select", "fp32", 5, 6, 0) == 6 and one("select", "fp32", 5, 6, 0x80000000) == 5
    # 1 + 2**-8 lies between the bfloat16 numbers 1 and 1 + 2**-7: to the even one; a little more goes up.
    assert one("pass", "bf16", f32(1 + 2.0**-8)[0], 0) == f32(1)[0]
    assert one("add", "bf16", *f32(1, 2.0**-8 + 2.0**-20)) == f32(1 + 2.0**-7)[0]


@given(WORD, WORD)
def test_integers_wrap(a, b):
    x, y = signed(a), signed(b)
    for operation, want in (
        ("add", x + y), ("subtract", x - y), ("multiply", x * y), ("maximum", max(x, y)), ("minimum", min(x, y)),
        ("less", x < y), ("and", a & b), ("or", a | b), ("xor", a ^ b), ("shift_left", a << b % 32),
        ("shift_right", x >> b % 32),
    ):  # fmt: skip
        assert int(kernels.lane_op(operation, "int32", a, b)) == want % 2**32


@given(st.floats(width=32), st.floats(width=32))
def test_floats_are_numpys_and_bfloat16_rounds_them(a, b):
    x, y = np.float32(a), np.float32(b)
    with np.errstate(all="ignore"):
        wants = {"add": x + y, "subtract": x - y, "multiply": x * y}
    for operation, want in wants.items():
        got = kernels.lane_op(operation, "fp32", *f32(a, b))
        np.testing.assert_array_equal(value(got), want)
        half = kernels.lane_op(operation, "bf16", *f32(a, b))
        with np.errstate(all="ignore"):
            np.testing.assert_array_equal(value(half), np.float32(ml_dtypes.bfloat16(want)))


def test_a_tree_joins_neighbours_first():
    # (1e8 + 1) + (-1e8 + 1) = 1e8 - 1e8 = 0, where from left to right it would be 1.
    assert value(kernels.reduce_tree("add", "fp32", f32(1e8, 1, -1e8, 1))) == 0


# ---- compute units ------------------------------------------------------------------------------------


def pcu_config(**fields):
    return kernels.configuration(CONFIG_PCU, **{"mode": "simd", "vectors": 1, **fields})


def test_accumulation_begins_with_the_first_value_and_goes_from_left_to_right():
    # -0 alone stays -0; 1e8 + 1 - 1e8 = 0 from left to right.
    rows = [f32(-0.0, 1e8), f32(-0.0, 1), f32(-0.0, -1e8)]
    cfg = pcu_config(count0=3, fold="add", fold_level=1)
    out = kernels.pcu(cfg, [kernels.configuration(CONFIG_STAGE)], [rows], lanes=2)
    assert out.data.tolist() == [f32(-0.0, 0.0).tolist()]


@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 2**31))
def test_the_array_multiplies_matrices(k, tiles, seed):
    # Small integers: every sum is exact.
    rng = np.random.default_rng(seed)
    a, b = rng.integers(-8, 9, (2, tiles, k, 4))
    cfg = pcu_config(mode="systolic", vectors=3, count0=k, count1=tiles, fold_level=1, last_level=1)
    stages = [kernels.configuration(CONFIG_STAGE)] * 3
    out = kernels.pcu(cfg, stages, [f32(*a.reshape(-1)), f32(*b.reshape(-1))], lanes=4)
    want = np.einsum("tkr,tkc->tcr", a, b[..., :3])
    assert value(out.data).reshape(tiles, 3, 4).tolist() == want.tolist()
    assert out.last.tolist() == [False, False, True] * tiles


@given(st.lists(st.integers(1, 3), min_size=6, max_size=6))
def test_a_chain_counts_level_0_first(counts):
    cfg = pcu_config(**{f"count{n}": c for n, c in enumerate(counts)})
    got = list(kernels.iterations(cfg))
    want = [c[::-1] for c in product(*(range(c) for c in reversed(counts)))]
    assert [it.counters for it in got] == want
    for it in got:
        for level in range(rdu.LEVELS + 1):
            assert it.first[level] == (not any(it.counters[:level]))
            assert it.last[level] == all(
                i == n - 1 for i, n in zip(it.counters[:level], counts, strict=False)
            )


def test_a_gate_multiplies_behind_the_function_and_before_rounding():
    # 1/4 * 3 = 0.75; 1/3 is rounded only after * 3; seven terms and three iterations come close to both.
    cfg = pcu_config(vectors=3, function="reciprocal", gated=1, gate=1, round=1, result=0)
    passes = [kernels.configuration(CONFIG_STAGE)]
    out = kernels.pcu(cfg, passes, [[f32(4, 3)], [f32(3, 3)]], lanes=2, counts=small())
    assert value(out.data).tolist() == [[0.75, 1.0]]


def test_silu_is_a_gated_sigmoid():
    # x / (1 + e**-x): 0 for 0 and for what is far below, x far above.
    cfg = pcu_config(function="sigmoid", gated=1)
    out = kernels.pcu(
        cfg, [kernels.configuration(CONFIG_STAGE)], [[f32(0, 40, -200, 1)]], lanes=4, counts=small()
    )
    np.testing.assert_allclose(value(out.data)[0], [0, 40, 0, 0.7310586], rtol=1e-6, atol=0)


def test_columns_of_the_array_pass_the_function():
    # exp(1 * 0) = 1 and exp(2 * 0) = 1, column by column.
    cfg = pcu_config(mode="systolic", vectors=3, fold_level=1, function="exp")
    out = kernels.pcu(
        cfg, [kernels.configuration(CONFIG_STAGE)] * 2, [[f32(1, 2)], [f32(0, 0)]], lanes=2, counts=small()
    )
    assert value(out.data).tolist() == [[1.0, 1.0]] * 2


@pytest.mark.parametrize("fields", [{"fold": "add"}, {"tree": "add"}, {"mode": "systolic"}])
def test_a_gate_has_no_register_behind_reductions(fields):
    with pytest.raises(ValueError, match="a gate goes with SIMD mode without fold and tree"):
        kernels.pcu(pcu_config(gated=1, **fields), [], [[f32(1, 2)]], lanes=2)


def test_functions_need_counts():
    with pytest.raises(ValueError, match="function exp needs counts"):
        kernels.pcu(pcu_config(function="exp"), [], [[f32(1, 2)]], lanes=2)


# ---- memory units -------------------------------------------------------------------------------------


def pmu_config(**fields):
    return kernels.configuration(CONFIG_PMU, **{"words": 64, **fields})


def test_places_by_hand():
    # Address 0b101101 with bank bits 1 and 4: bank 0b00, the rest is 0b1111; without them 0 is at 0, 0.
    valid, bank, index = kernels.place(pmu_config(bank_bit0=1, bank_bit1=4), [0b101101, 0b010010, 64], 4)
    assert valid.tolist() == [True, True, False]
    assert bank[:2].tolist() == [0, 3] and index[:2].tolist() == [0b1111, 0]
    # A diagonal: row 2 of 8 columns over 4 banks is turned by 2.
    _, bank, _ = kernels.place(pmu_config(skew_bits=2, skew_shift=3), range(16, 20), 4)
    assert bank.tolist() == [2, 3, 0, 1]
    # Half of the banks: only bank bit 0 turns.
    _, bank, _ = kernels.place(pmu_config(skew_bits=1, skew_shift=3), range(8, 12), 4)
    assert bank.tolist() == [1, 0, 3, 2]


@pytest.mark.parametrize("rows, columns, banks", [(4, 4, 4), (3, 8, 8), (8, 8, 8)])
def test_rows_and_columns_of_a_diagonal_tile_meet_every_bank_once(rows, columns, banks):
    # bank(i, j) = (i + j) mod B, the pitch being a multiple of B.
    cfg = pmu_config(skew_bits=banks.bit_length() - 1, skew_shift=columns.bit_length() - 1)
    _, bank, _ = kernels.place(cfg, np.arange(rows * columns).reshape(rows, columns), banks)
    assert bank.tolist() == [[(i + j) % banks for j in range(columns)] for i in range(rows)]


def test_addresses_by_hand():
    cfg = pmu_config(write_base=10, write_count0=2, write_stride0=4, write_count1=2, write_stride1=(1 << 24) - 1,
                     write_lane_stride=2, sequence_scale=8)  # fmt: skip
    got = kernels.addresses(cfg, "write", 2, [0, 1, 0, 2])
    assert got.tolist() == [[10, 12], [22, 24], [9, 11], [29, 31]]  # -1 is 2**24 - 1


def test_the_highest_lane_wins_a_word():
    memory = np.zeros((4, 16), np.uint32)
    cfg = pmu_config(write_base=5, write_lane_stride=0)
    kernels.pmu_write(
        cfg, memory, kernels.Packets(np.array([[7, 8]], np.uint32), np.zeros(1, int), np.zeros(1, bool))
    )
    assert memory[1, 1] == 8 and np.count_nonzero(memory) == 1


# ---- gates to off-chip memory -------------------------------------------------------------------------


def agcu_config(**fields):
    return kernels.configuration(CONFIG_AGCU, **{"direction": "load", "words": 2, **fields})


def test_loads_by_hand():
    # Lines of 2 words, 4 halves: two halves from byte 12, from 8, from 4.
    memory = np.arange(12, dtype="<u2").view(np.uint8)
    cfg = agcu_config(format="bf16", count0=3, stride0=-4, argument=3, sequence=7, last_level=1)
    out = kernels.agcu_load(cfg, {3: 12}, memory, 2)
    assert out.data.tolist() == [[6 << 16, 7 << 16], [4 << 16, 5 << 16], [2 << 16, 3 << 16]]
    assert out.sequence.tolist() == [7, 8, 9] and out.last.tolist() == [False, False, True]
    one = kernels.agcu_load(agcu_config(words=1), [4], memory, 2)
    assert one.data.tolist() == [[2 | 3 << 16, 0]]
    with pytest.raises(ValueError, match="2 elements of 4 bytes at address 4 are not in one line of 8 bytes"):
        kernels.agcu_load(agcu_config(), [4], memory, 2)


def test_stores_by_hand():
    memory = np.full(16, 0xEE, np.uint8)
    data = np.array([[0x11223344, 0x55667788], [0x99AABBCC, 0]], np.uint32)
    packets = kernels.Packets(data, np.arange(2), np.zeros(2, bool))
    kernels.agcu_store(agcu_config(direction="store", words=1, count0=2, stride0=8), [4], memory, packets)
    assert memory.tobytes().hex() == "eeeeeeee44332211eeeeeeeeccbbaa99"
    kernels.agcu_store(
        agcu_config(direction="store", words=1, format="bf16", count0=2, stride0=2), [0], memory, packets
    )
    assert memory[:4].tobytes().hex() == "2211aa99"


def test_requests_by_hand():
    # Words 0..5 in lines of two words are lines 0, 0, 1, 1, 2, 2.
    fields = {"words": 1, "count0": 3, "count1": 2, "stride0": 4, "stride1": 12}

    def requests(**more):
        return kernels.agcu_requests(agcu_config(**fields, **more), [0], 2).tolist()

    assert requests() == [0, 1, 2]
    assert requests(wait=1, wait_level=1) == [0, 1, 1, 2]  # tokens before word 3
    assert requests(signal=1, signal_level=1) == [0, 1, 2]
    assert requests(direction="store", wait=1, wait_level=1) == [0, 1, 2]
    assert requests(direction="store", signal=1, signal_level=1) == [0, 1, 1, 2]  # tokens behind word 2
    assert requests(direction="store", signal=1) == [0, 0, 1, 1, 2, 2]


# ---- records and presets ------------------------------------------------------------------------------


def test_records_refuse_what_they_do_not_have():
    with pytest.raises(ValueError, match="has no field 'leves'"):
        kernels.configuration(CONFIG_PCU, leves=1)
    with pytest.raises(ValueError, match=r"fold_level must be in 0\.\.7, not 8"):
        kernels.configuration(CONFIG_PCU, fold_level=8)


@pytest.mark.parametrize(
    "name, pcus, peak, fill",
    # 1040 * 16 * 12 * 2 * 1.6 GHz = 638.976e12, printed as 638; 64 * 16 * 6 * 2 * 1 GHz = 12.288e12, as 12.3
    [("sn40l", 1040, 638.976e12, 3), ("plasticine", 64, 12.288e12, 3)],
)
def test_presets_have_the_published_peak(name, pcus, peak, fill):
    spec = specs.build(rdu.RduSpec, specs.load_tree(name, ["rdu"]), name)
    p = spec.params()
    assert (p.pcus, p.pmus, spec.peak_flops) == (pcus, pcus, peak)
    assert systolic_fill(p) == fill
    assert all(row.pj >= 0 for row in rdu.energy(spec))
    assert all(
        spec.provenance[path].source for path, _ in spec.leaves() if path in spec.provenance and "." in path
    )


def test_a_node_is_eight_sockets():
    spec = specs.build(rdu.RduSpec, specs.load_tree("sn40l-node", ["rdu"]), "sn40l-node")
    assert spec.params().sockets == 8


@pytest.mark.parametrize(
    "key, bad, message",
    [
        ("pcu__lanes", 12, "pcu.lanes must be a power of two, not 12"),
        ("pmu__bytes", 100, "pmu.bytes 100 must be a multiple of 4 * pmu.banks 16"),
        ("pmu__bytes", 192, "must be a power of two of words, not 3"),
        ("grid__dies", 3, "grid.columns 16 must be a multiple of grid.dies 3"),
        ("agcu__per_side", 9, "agcu.per_side 9 exceeds grid.rows 8"),
        ("pcu__registers", 4, "pcu.registers 4 must hold pcu.vector_inputs 4"),
        ("memory__ddr__latency_ns", 10**9, "the latency of ddr is 1000000000 ticks"),
    ],
)
def test_specs_that_make_no_machine_are_refused(key, bad, message):
    with pytest.raises(UserError) as error:
        small(**{key: bad})
    assert message in str(error.value)


def test_an_array_is_no_wider_than_a_vector():
    with pytest.raises(UserError, match=r"pcu\.stages 6 exceeds pcu\.lanes 4"):
        small(pcu__lanes=4, pcu__systolic="true")
