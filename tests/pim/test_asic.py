"""The ASIC's functions: accuracy over all bfloat16 inputs, order of reductions, number of operations."""

from collections import Counter
from typing import ClassVar

import numpy as np
import pytest

from tilewright.arch.formats import BF16
from tilewright.arch.pim import PimSpec, asic_passes
from tilewright.arch.spec import apply_sets, build, load_tree
from tilewright.workloads import asic
from tilewright.workloads.formats import from_bits, to_bits


def section(*sets):
    return build(PimSpec, apply_sets(load_tree("pim-gpt", ["pim"]), sets), "test").asic


ASIC = section()
ALL = from_bits(np.arange(1 << 16), BF16)
FINITE = ALL[np.isfinite(ALL)]


def ulps(got, want):
    """Largest error in units of the last place of bfloat16, results rounded to bfloat16."""
    got = from_bits(to_bits(got, BF16), BF16).astype(np.float64)
    exponent = np.maximum(np.frexp(want)[1] - 1, -126)
    return float(np.max(np.abs(got - want) / 2.0 ** (exponent - 7)))


def quiet(function, *args):
    with np.errstate(all="ignore"):
        out = function(*args)
    assert out.dtype == np.float32
    return out


# ---- accuracy: 0.5 is correct rounding ----------------------------------------------------------------


def test_exp():
    x = FINITE[(FINITE > -87) & (FINITE < 88.7)]  # the normal range of the result
    # Measured 0.50002: rounded correctly but for a near tie.
    assert ulps(quiet(asic.exp, x, ASIC), np.exp(x.astype(np.float64))) < 0.5001


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
    assert ulps(quiet(asic.reciprocal, d, ASIC), 1 / d.astype(np.float64)) < 0.499  # measured 0.498
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
    assert ulps(quiet(asic.rsqrt, d, ASIC), d.astype(np.float64) ** -0.5) < 0.4994  # measured 0.49932
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
    assert ulps(got[normal], want[normal]) < 0.5001  # measured 0.5
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
    assert ulps(got[normal], want[normal]) < 0.5001  # measured 0.50002
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
    assert ulps(quiet(asic.softmax, x, np.float32(0.3), ASIC), e / e.sum(-1, keepdims=True)) < 0.51


def test_norms():
    rng = np.random.default_rng(2)
    x, gain, bias = (from_bits(to_bits(rng.normal(size=300) + 1, BF16), BF16) for _ in range(3))
    wide = x.astype(np.float64)
    eps = np.float32(1e-5)
    want = (wide - wide.mean()) / np.sqrt(wide.var() + eps) * gain + bias
    assert np.abs(quiet(asic.layernorm, x, gain, bias, eps, ASIC) - want).max() < 4e-5
    want = wide / np.sqrt((wide**2).mean() + eps) * gain
    assert np.abs(quiet(asic.rmsnorm, x, gain, eps, ASIC) / want - 1).max() < 1e-5


# ---- order of reductions ------------------------------------------------------------------------------


def test_reduction_goes_round_the_adders_and_then_by_pairs():
    # Three adders, partials padded to four. Elements 0..4: p0 = 2^24 + (-2^24) = 0, p1 = 1 + 1 = 2, p2 = 1;
    # (p0 + p1) + (p2 + 0) = 3. From left to right 2^24 + 1 + 1 - 2^24 + 1 would be 1.
    three = section("asic.adders=3")
    x = np.float32([2**24, 1, 1, -(2**24), 1])
    assert asic.reduce(x, three, np.add, 0).tolist() == [3]
    # Within a partial in order of j, with one adder: ((2^24 + 1) + 1) - 2^24 + 1 = 1.
    assert asic.reduce(x, section("asic.adders=1"), np.add, 0).tolist() == [1]
    # Four adders: p0 = 2^24 + 1 = 2^24, p1 = 1, p2 = 1, p3 = -2^24: 2^24 + (1 - 2^24) = 1.
    assert asic.reduce(x, section("asic.adders=4"), np.add, 0).tolist() == [1]


def test_maximum_starts_below_everything():
    assert asic.reduce(np.float32([[-5, -3], [-np.inf, -7]]), ASIC, np.maximum, -np.inf).tolist() == [
        [-3],
        [-7],
    ]


# ---- operations as the pass table counts them ---------------------------------------------------------


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
CASES = {
    "SOFTMAX": (lambda a: asic.softmax(counted(X), np.float32(0.5), a), 2),
    "LAYERNORM": (lambda a: asic.layernorm(counted(X), counted(X), counted(X), np.float32(1), a), 2),
    "RMSNORM": (lambda a: asic.rmsnorm(counted(X), counted(X), np.float32(1), a), 1),
    "GELU": (lambda a: asic.gelu(counted(X), a), 0),
    "SILU": (lambda a: asic.silu(counted(X), a), 0),
    "RELU": (lambda a: asic.relu(counted(X)), 0),
    "ROPE": (lambda a: asic.rope(counted(X), counted(X[: N // 2]), counted(X[: N // 2])), 0),
}


@pytest.mark.parametrize("terms", [1, 6])
@pytest.mark.parametrize("steps", [0, 2])
@pytest.mark.parametrize("name", CASES)
def test_operations_are_those_of_the_pass_table(name, terms, steps):
    a = section(
        f"asic.exp_terms={terms}", f"asic.reciprocal_iterations={steps}", f"asic.rsqrt_iterations={steps}",
        "asic.adders=5",
    )  # fmt: skip
    function, reductions = CASES[name]
    Counted.counts.clear()
    function(a)
    passes = asic_passes(a)[name]
    adds = sum(p.adds * (1 if p.scalar else N) for p in passes)
    multiplies = sum(p.multiplies * (1 if p.scalar else N) for p in passes)
    # The table has the tree that joins 8 partial results as depth, not as issue: 4 + 2 + 1 operations.
    assert Counted.counts["adds"] == adds + 7 * reductions
    assert Counted.counts["multiplies"] == multiplies
