"""The ASIC's functions: accuracy over all bfloat16 inputs, order of reductions, number of operations."""

from collections import Counter
from typing import ClassVar

import numpy as np
import pytest

from tilewright.arch.formats import BF16
from tilewright.arch.pim import PimSpec
from tilewright.arch.pim_asic import microprograms, vector_lanes
from tilewright.arch.spec import apply_sets, build, load_tree
from tilewright.workloads import asic
from tilewright.workloads.asic_precision import precision, ulps
from tilewright.workloads.formats import from_bits, to_bits


def section(*sets):
    return build(PimSpec, apply_sets(load_tree("pim-gpt", ["pim"]), sets), "test").asic


ASIC = section()
LANES = 128
ALL = from_bits(np.arange(1 << 16), BF16)
FINITE = ALL[np.isfinite(ALL)]


def quiet(function, *args):
    with np.errstate(all="ignore"):
        out = function(*args)
    assert out.dtype == np.float32
    return out


# ---- accuracy: 0.5 is correct rounding ----------------------------------------------------------------


def test_ulps_by_hand():
    # Steps of bfloat16 are 2^-7 from 1 on, 2^-6 from 2 on: 1 + 2^-9 rounds to 1, 2^-9 / 2^-7 = 1/4 off;
    # 2 for a true 3 is 1 / 2^-6 = 64 off; of a subnormal the step is 2^-133, as of 2^-126.
    assert ulps(np.float32([1 + 2**-9, 2, 0]), np.array([1 + 2**-9, 3, 2.0**-134])).tolist() == [
        0.25,
        64,
        0.5,
    ]


def test_precision():
    rows = {row.function: row for row in precision(ASIC, LANES)}
    assert rows["ReLU"][2:] == (0, 0)
    # Rounded once from binary32: a little above 0.5 at most. Softmax rounds twice (its numerators, up to 1 ulp
    # of the result, and the result); layernorm's bias cancels leading digits.
    worst = {"softmax": 1.5, "layernorm": 0.7}
    for name, row in rows.items():
        if name != "ReLU":
            assert 0.49 < row.worst < worst.get(name, 0.50003), name
            assert row.mean < 0.25 + 0.01 * (name == "layernorm") + 0.11 * (name == "softmax"), name
    # Without Newton's steps 1/d is 5.06 % off: 2^-7 steps of the largest mantissa, 0.0506 * 2^8 = 13.
    coarse = precision(section("asic.reciprocal_iterations=0"), LANES)
    assert 6 < next(row.worst for row in coarse if row.function == "reciprocal") < 13.5


def test_exp():
    x = FINITE[(FINITE > -87) & (FINITE < 88.7)]  # the normal range of the result
    # Measured 0.50002: rounded correctly but for a near tie.
    assert ulps(quiet(asic.exp, x, ASIC), np.exp(x.astype(np.float64))).max() < 0.5001


def test_exp_beyond_the_range():
    x = np.float32([89, 1e38, np.inf, -88, -1e38, -np.inf, 0, -0.0])
    assert quiet(asic.exp, x, ASIC).tolist() == [np.inf] * 3 + [0] * 3 + [1, 1]
    assert np.isnan(quiet(asic.exp, np.float32([np.nan]), ASIC))[0]
    # exp(88.5) = 2.7e38 is finite although k = 128; below 2^-126 everything is +0.
    assert np.isfinite(quiet(asic.exp, np.float32([88.5]), ASIC))[0]
    tiny = quiet(asic.exp, FINITE[FINITE < -80], ASIC)
    assert not np.any((tiny > 0) & (tiny < 2.0**-126)) and not np.signbit(tiny).any()


def test_exp_with_fewer_terms_is_the_shorter_polynomial():
    # One term: 1 + r, with |r| <= ln 2 / 2, lacks r^2/2 = 0.06 at most; at x = 0.34375, k = 0, it is exact.
    assert quiet(asic.exp, np.float32([0.34375]), section("asic.exp_terms=1")).tolist() == [1.34375]
    # Two terms: 1 + r + r^2 / 2 with r = 1/4 is 1.28125.
    assert quiet(asic.exp, np.float32([0.25]), section("asic.exp_terms=2")).tolist() == [1.28125]


def test_reciprocal():
    d = FINITE[(FINITE >= 2.0**-126) & (FINITE < 2.0**126)]
    assert ulps(quiet(asic.reciprocal, d, ASIC), 1 / d.astype(np.float64)).max() < 0.499  # measured 0.498
    assert quiet(asic.reciprocal, np.float32([2.0**126, np.inf]), ASIC).tolist() == [0, 0]
    assert np.isnan(quiet(asic.reciprocal, np.float32([np.nan]), ASIC))[0]


def test_reciprocal_converges_quadratically():
    # Newton: error e -> e^2. The seed is within 5.06 %; 0.0506^2 = 2.56e-3, and that squared 6.6e-6.
    d = np.linspace(1, 4, 4096, dtype=np.float32)
    for steps, bound in enumerate((0.0506, 2.56e-3, 6.7e-6)):
        r = quiet(asic.reciprocal, d, section(f"asic.reciprocal_iterations={steps}"))
        assert bound / 10 < np.abs(r * d.astype(np.float64) - 1).max() < bound


def test_rsqrt():
    d = FINITE[FINITE >= 2.0**-126]
    assert ulps(quiet(asic.rsqrt, d, ASIC), d.astype(np.float64) ** -0.5).max() < 0.4994  # measured 0.49932
    assert np.isfinite(quiet(asic.rsqrt, np.float32([0]), ASIC))[0]


def test_rsqrt_converges_quadratically():
    # The seed is within 3.5 % (Lomont 2003); a step leaves 1.5 e^2 + e^3 / 2: 1.9e-3, then 5.2e-6.
    d = np.linspace(1, 4, 4096, dtype=np.float32)
    for steps, bound in enumerate((0.035, 1.9e-3, 5.2e-6)):
        y = quiet(asic.rsqrt, d, section(f"asic.rsqrt_iterations={steps}"))
        assert bound / 10 < np.abs(y * np.sqrt(d.astype(np.float64)) - 1).max() < bound


def test_gelu():
    x = FINITE.astype(np.float64)
    with np.errstate(over="ignore"):
        want = x / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
    got = quiet(asic.gelu, FINITE, ASIC)
    normal = np.abs(FINITE) < 9.9
    assert ulps(got[normal], want[normal]).max() < 0.5001  # measured 0.5
    assert np.abs(got - want)[FINITE <= -9.9].max() < 1e-35  # the tail towards -0
    large = FINITE >= 9.9
    assert np.array_equal(to_bits(got[large], BF16), to_bits(FINITE[large], BF16))
    assert np.isnan(quiet(asic.gelu, np.float32([np.nan]), ASIC))[0]


def test_silu():
    x = FINITE.astype(np.float64)
    with np.errstate(over="ignore"):
        want = x / (1 + np.exp(-x))
    got = quiet(asic.silu, FINITE, ASIC)
    normal = np.abs(FINITE) < 80
    assert ulps(got[normal], want[normal]).max() < 0.5001  # measured 0.50002
    assert np.abs(got - want)[FINITE <= -80].max() < 1e-35
    large = FINITE >= 80
    assert np.array_equal(to_bits(got[large], BF16), to_bits(FINITE[large], BF16))


def test_relu():
    got = quiet(asic.relu, ALL)
    assert np.array_equal(got, np.where(ALL > 0, ALL, np.where(np.isnan(ALL), np.nan, 0)), equal_nan=True)
    assert not np.signbit(got[~np.isnan(got)]).any()


def test_softmax():
    rng = np.random.default_rng(1)
    x = from_bits(to_bits(rng.normal(size=(20, 300)) * 10, BF16), BF16)
    s = x.astype(np.float64) * np.float32(0.3)
    e = np.exp(s - s.max(-1, keepdims=True))
    got = quiet(asic.softmax, x, np.float32(0.3), ASIC, LANES)
    # The numerator's half step counts up to twice where the quotient's mantissa is smaller: 0.5 + 1.
    assert 0.6 < ulps(got, e / e.sum(-1, keepdims=True)).max() < 1.5


def test_softmax_stores_its_numerators_as_bfloat16():
    # e^-0.5 = 0.60653; bfloat16's neighbours are 2^-8 apart: 0.60653 * 256 = 155.27 -> 155 / 256. The sum, of
    # what was not rounded, is 1.60653, so the result is 155 / 256 / 1.60653 = 0.376884, not 0.60653 / 1.60653.
    got = quiet(asic.softmax, np.float32([0, -0.5]), np.float32(1), ASIC, LANES)
    assert np.abs(got - [1 / 1.6065307, 155 / 256 / 1.6065307]).max() < 1e-6
    assert abs(got[1] - 0.6065307 / 1.6065307) > 5e-4


def test_norms():
    rng = np.random.default_rng(2)
    x, gain, bias = (from_bits(to_bits(rng.normal(size=300) + 1, BF16), BF16) for _ in range(3))
    wide = x.astype(np.float64)
    eps, share = np.float32(1e-5), np.float32(1 / 300)
    want = (wide - wide.mean()) / np.sqrt(wide.var() + eps) * gain + bias
    assert np.abs(quiet(asic.layernorm, x, gain, bias, eps, share, ASIC, LANES) - want).max() < 4e-5
    want = wide / np.sqrt((wide**2).mean() + eps) * gain
    assert np.abs(quiet(asic.rmsnorm, x, gain, eps, share, ASIC, LANES) / want - 1).max() < 1e-5


def test_the_share_of_a_norm_is_the_instructions():
    # Mean square of (1, 3, 1, 3) with a share of 1/5 instead of 1/4: 20 / 5 = 4, so x / 2.
    one, zero = np.ones(4, np.float32), np.float32(0)
    got = quiet(asic.rmsnorm, np.float32([1, 3, 1, 3]), one, zero, np.float32(0.2), ASIC, LANES)
    assert np.allclose(got, [0.5, 1.5, 0.5, 1.5], rtol=1e-5)


def test_rope_turns_pairs_of_neighbours():
    # (1, 2) by 90 degrees is (-2, 1); (3, 4) stays.
    x, cosine, sine = np.float32([1, 2, 3, 4]), np.float32([0, 0, 1, 1]), np.float32([-1, 1, 0, 0])
    assert quiet(asic.rope, x, cosine, sine).tolist() == [-2, 1, 3, 4]
    # Each product is rounded, then the sum: (1 + 2^-12)^2 = 1 + 2^-11 + 2^-24 ties down, and leaves 2^-11.
    near = np.float32(1 + 2**-12)
    x, cosine, sine = np.float32([near, 1]), np.float32([near, 0]), np.float32([-1, 0])
    assert quiet(asic.rope, x, cosine, sine).tolist() == [2**-11, 0]


# ---- order of reductions ------------------------------------------------------------------------------


def test_lanes_by_hand():
    # 256 adders and 128 multipliers: min(128, 256 / 2), whole columns of 16. 100 multipliers: 6 columns, 96.
    # 15 multipliers are less than a column: the power of two below, 8. 5 adders: 2.
    assert vector_lanes(ASIC, 16) == 128
    assert vector_lanes(section("asic.multipliers=100"), 16) == 96
    assert vector_lanes(section("asic.multipliers=15"), 16) == 8
    assert vector_lanes(section("asic.adders=5"), 16) == 2


def test_reduction_joins_a_group_by_pairs_and_groups_in_order():
    big, add = 2**24, np.add
    # 4 lanes: (2^24 + 1) + (1 - 2^24) = 2^24 + (1 - 2^24) = 1, then 1 + 1 = 2. Left to right: 0 + 1 = 1.
    x = np.float32([big, 1, 1, -big, 1])
    assert asic.reduce(x, 4, add, 0).tolist() == [2]
    # 2 lanes: 2^24 + 1 -> 2^24; + (1 - 2^24) = 1; + 1 = 2. One lane, left to right: 1.
    assert asic.reduce(x, 2, add, 0).tolist() == [2]
    assert asic.reduce(x, 1, add, 0).tolist() == [1]
    # 3 lanes, padded to 4: (2^24 + 1) + (1 + 0) = 2^24 + 1 -> 2^24; then -2^24 + 1, exact: total 1.
    assert asic.reduce(x, 3, add, 0).tolist() == [1]
    # 2 lanes, groups in order: (1 + 1) + (2^24 + 0) = 2^24 + 2, then + (-2^24 + 0) = 2.
    assert asic.reduce(np.float32([1, 1, big, 0, -big, 0]), 2, add, 0).tolist() == [2]
    # The other way round 2^24 + 1 is lost each time: 2^24 + (1 + 0) -> 2^24, + (1 + 0) -> 2^24, - 2^24 = 0.
    assert asic.reduce(np.float32([big, 0, 1, 0, 1, 0, -big, 0]), 2, add, 0).tolist() == [0]


def test_totals_begin_with_plus_zero():
    # -0 + -0 = -0, but the total begins with +0: +0 + -0 = +0.
    assert not np.signbit(asic.reduce(np.float32([-0.0, -0.0]), 2, np.add, 0)).any()


def test_maximum_starts_below_everything():
    x = np.float32([[-5, -3, -9], [-np.inf, -7, -8]])
    assert asic.reduce(x, 2, np.maximum, -np.inf).tolist() == [[-3], [-7]]


# ---- operations as the microprograms count them -------------------------------------------------------


class Counted(np.ndarray):
    """float32 arrays that count the additions and multiplications made with them, element by element."""

    counts: ClassVar[Counter[str]] = Counter()
    kinds: ClassVar = {
        np.add: "adds", np.subtract: "adds", np.maximum: "adds", np.rint: "adds", np.multiply: "multiplies",
    }  # fmt: skip

    def __array_ufunc__(self, ufunc, method, *inputs, **kwargs):
        assert method == "__call__"
        plain = [x.view(np.ndarray) if isinstance(x, Counted) else x for x in inputs]
        out = getattr(ufunc, method)(*plain, **kwargs)
        # uint32: the seeds, an integer subtraction. int32: exponents, adjusted for free.
        if ufunc in self.kinds and out.dtype in (np.float32, np.uint32):
            Counted.counts[self.kinds[ufunc]] += out.size
        return tuple(x.view(Counted) for x in out) if isinstance(out, tuple) else out.view(Counted)

    def __array_function__(self, func, types, args, kwargs):
        out = super().__array_function__(func, types, args, kwargs)
        return out.view(Counted) if isinstance(out, np.ndarray) else out


def counted(x):
    return np.asarray(x, np.float32).view(Counted)


N = 24
X = np.linspace(-2, 2, N)
ONE = np.float32(1)
CASES = {
    "ADD": (lambda a, lanes: counted(X) + counted(X), 0),
    "MUL": (lambda a, lanes: counted(X) * counted(X), 0),
    "SOFTMAX": (lambda a, lanes: asic.softmax(counted(X), ONE, a, lanes), 2),
    "LAYERNORM": (
        lambda a, lanes: asic.layernorm(counted(X), counted(X), counted(X), ONE, ONE, a, lanes), 2,
    ),
    "RMSNORM": (lambda a, lanes: asic.rmsnorm(counted(X), counted(X), ONE, ONE, a, lanes), 1),
    "GELU": (lambda a, lanes: asic.gelu(counted(X), a), 0),
    "SILU": (lambda a, lanes: asic.silu(counted(X), a), 0),
    "RELU": (lambda a, lanes: asic.relu(counted(X)), 0),
    "ROPE": (lambda a, lanes: asic.rope(counted(X), counted(X), counted(X)), 0),
}  # fmt: skip


@pytest.mark.parametrize(("lanes", "joins"), [(4, 24), (5, 40), (16, 32), (48, 64)])
@pytest.mark.parametrize(("terms", "newton"), [(1, 2), (6, 0), (6, 3)])
@pytest.mark.parametrize("name", CASES)
def test_operations_are_those_of_the_microprograms(name, terms, newton, lanes, joins):
    a = section(
        f"asic.exp_terms={terms}", f"asic.reciprocal_iterations={newton}", f"asic.rsqrt_iterations={newton}"
    )  # fmt: skip
    function, reductions = CASES[name]
    Counted.counts.clear()
    function(a, lanes)
    steps = [(1 if block.scalar else N, s) for block in microprograms(a)[name] for s in block.steps]
    assert sum(bool(s.join) for _, s in steps) == reductions
    # A join counts as one addition for each element. Done with padding, a group of w lanes, w a power of two,
    # takes w - 1 in the tree and one for the total: 24 elements on 4 lanes 6 * 4, on 5 lanes 5 * 8, on 16
    # lanes 2 * 16, on 48 lanes 64.
    adds = sum(n * s.adds for n, s in steps) + reductions * (joins - N)
    assert Counted.counts["adds"] == adds
    # The unit scales the elements of a softmax a second time rather than keep them; the reference keeps them.
    again = N * (name == "SOFTMAX")
    assert Counted.counts["multiplies"] == sum(n * s.multiplies for n, s in steps) - again


def test_operations_of_a_few_functions_by_hand():
    def per_element(name):
        steps = [s for b in microprograms(ASIC)[name] for s in b.steps if not b.scalar]
        return sum(s.adds for s in steps), sum(s.multiplies for s in steps)

    # e^x with 6 terms: + and - 1.5 * 2^23, the rest, 6 Horner steps: 9 additions; 1 + 1 + 6 = 8 products.
    # 1/d in 3 steps: seed and one each, 4; 2 products each, 6. SiLU: those, 1 + e^u, and the gate's product.
    assert per_element("SILU") == (9 + 1 + 4, 8 + 6 + 1)
    # GELU: x + cubic; x x, x x x, times 0.044715, times the scale.
    assert per_element("GELU") == (9 + 1 + 4 + 1, 8 + 6 + 1 + 4)
    assert per_element("ROPE") == (1, 2)
    # Maximum; minus it, exponential, sum; times scale twice, and the reciprocal.
    assert per_element("SOFTMAX") == (1 + 1 + 9 + 1, 8 + 2 + 1)
