"""Attention in a storage drive: orders and roundings by hand, the identities of SparF, accuracy, pages."""

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tilewright.arch.formats import FP16, FP32
from tilewright.workloads import csd_kernels as csd
from tilewright.workloads.formats import from_bits, to_bits

ENGINE = csd.Engine(lanes=16, exp_terms=6, reciprocal_iterations=3, rsqrt_iterations=3)
NAN = FP16.nan


def half(values):
    return to_bits(np.asarray(values, np.float64), FP16)


def wide(bits):
    return from_bits(bits, FP16).astype(np.float64)


def scale_of(d):
    return np.float32(d**-0.5)


def sums(values):
    return csd.add_values(np.zeros((values.shape[0], values.shape[2]), np.uint32), values)


def weights(bits, total):
    """A softmax of one head from the bits of its weights."""
    bits, total = np.asarray(bits, np.uint16), np.float32(total)
    return csd.Weights(bits, total, np.float32(1) / total)


def tensors(seed, heads=2, group=1, d=32, n=48, spread=1.0):
    rng = np.random.default_rng(seed)
    shapes = ((heads, group, d), (heads, n, d), (heads, n, d))
    return tuple(half(rng.normal(size=s) * w) for s, w in zip(shapes, (spread, 1, 1), strict=True))


def ulp(x):
    return 2.0 ** (np.maximum(np.frexp(np.abs(x))[1] - 1, -14) - 10)


# ---- order of the sums --------------------------------------------------------------------------------


def test_dot_is_a_tree_of_neighbours():
    # Products 2^24, -2^24, 1, 1: (2^24 - 2^24) + (1 + 1) = 2. Pairs (0, 2), (1, 3): 2^24 + (1 - 2^24) = 1.
    a, b = half([4096, -4096, 1, 1]), half([4096, 4096, 1, 1])
    assert csd.dot(a, b, 4) == 2


def test_dot_adds_group_after_group_to_the_total():
    # 2^24, 0 | 1, 1: 2^24 + 2 is exact. With one lane (2^24 + 0 + 1) + 1: both ones are lost to ties.
    a, b = half([4096, 0, 1, 1]), half([4096, 0, 1, 1])
    assert csd.dot(a, b, 2) == 2**24 + 2
    assert csd.dot(a, b, 1) == 2**24
    # Five products, four lanes: the fifth stands alone. (2^24 + 0) + (1 + 1) = 2^24 + 2, then + 1 rounds to
    # even: 2^24 + 4. With eight lanes 1 has the tree's left half to itself: (2^24 + 2) + 1, the same.
    a, b = half([4096, 0, 1, 1, 1]), half([4096, 0, 1, 1, 1])
    assert csd.dot(a, b, 4) == 2**24 + 4
    # In two lanes: (2^24 + 0), + (1 + 1), + 1.
    assert csd.dot(a, b, 2) == 2**24 + 4
    # The products are not rounded to FP16: 257 * 257 = 66049 is beyond its range, and odd.
    assert csd.dot(half([257.0]), half([257.0]), 16) == 66049


def test_total_is_the_reduction_over_partial_sums():
    # 4097 equal scores: weights 1, and FP32 counts them (an FP16 sum would stop at 2048).
    w = csd.weigh(np.zeros((1, 1, 4097), np.float32), np.float32(1), ENGINE)
    assert np.all(w.bits == half(1)) and w.total == 4097
    assert abs(w.inverse * 4097 - 1) < 1e-6


def test_value_sum_is_fp32_and_token_after_token():
    assert csd.add_values(np.zeros((1, 1), np.uint32), half(np.ones((1, 2049, 1)))).view(np.float32) == 2049
    # (2^24 + 1) + 1 = 2^24 from the left; any other order keeps at least one of the ones.
    start = to_bits(np.array([[2.0**24]]), FP32)
    assert csd.add_values(start, half(np.ones((1, 2, 1)))).view(np.float32) == 2**24
    # In steps or at once: the same bits.
    _, _, v = tensors(1)
    assert np.array_equal(csd.add_values(sums(v[:, :20]), v[:, 20:]), sums(v))
    assert csd.add_values(np.zeros((1, 1), np.uint32), half([[[np.inf], [-np.inf]]])) == FP32.nan


def test_weights_are_relative_to_the_largest_score():
    # (3 - 5) * 0.5 = -1; the weight is e^-1 in FP16. -20 / 2 falls below half a subnormal: 0 at -18.
    w = csd.weigh(np.float32([[[3, 5, -31.0, -np.inf]]]), np.float32(0.5), ENGINE)
    assert w.bits.tolist() == half([[[np.exp(-1), 1, np.exp(-18), 0]]]).tolist()
    assert w.bits[0, 0, 2] == 0
    assert w.total == np.float32(1 + wide(half(np.exp(-1))))


# ---- argtopk ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "keys, n, want",
    [
        ([5, 7, 6], 1, [1]),
        ([7, 7, 7, 7], 2, [0, 1]),  # ties: the lowest positions
        ([7, 9, 7, 9], 3, [0, 1, 3]),
        ([1, 2], 2, [0, 1]),
        ([1, 2], 9, [0, 1]),
        ([0xFFFF, 0x10000], 1, [1]),
    ],
)
def test_argtopk(keys, n, want):
    assert csd.positions(csd.argtopk([keys], n)).tolist() == [want]


@given(
    st.lists(st.lists(st.integers(0, 6), min_size=9, max_size=9), min_size=1, max_size=4), st.integers(1, 12)
)
@settings(deadline=None, max_examples=60)
def test_argtopk_is_a_sort_by_key_then_position(rows, n):
    for row, got in zip(rows, csd.argtopk(rows, n), strict=True):
        best = sorted(range(len(row)), key=lambda i: (-row[i], i))[:n]
        assert np.nonzero(got)[0].tolist() == sorted(best)


def test_channels_go_by_magnitude():
    q = half([[[-3, 2, 3, 0, -0.0]], [[1, -np.inf, 2, np.nan, -2]]])
    assert csd.positions(csd.select_channels(q, 1)).tolist() == [[0], [3]]
    assert csd.positions(csd.select_channels(q, 3)).tolist() == [[0, 1, 2], [1, 2, 3]]
    assert csd.positions(csd.select_channels(q, 4)).tolist() == [[0, 1, 2, 3], [1, 2, 3, 4]]


def test_channels_of_a_group_go_by_the_sum_of_magnitudes():
    # Sums 3, 4, 4, 1 although the largest single magnitude is in channel 0.
    q = half([[[3, 2, -2, 0.5], [0, -2, 2, 0.5]]])
    assert csd.positions(csd.select_channels(q, 2)).tolist() == [[1, 2]]
    # 2048 + 1 is rounded to 2048 in FP16 (ties to even): a tie, so the lowest.
    assert csd.positions(csd.select_channels(half([[[2048, 2048], [0, 1]]]), 1)).tolist() == [[0]]


def test_temperature():
    # 2, 1 of 2, 1, 1/2, 1/4: tau = sqrt(4 * 3 / 3.75).
    q = half([[[2, -1, 0.5, 0.25]]])
    channels = csd.select_channels(q, 2)
    tau = 1 / csd.temperature(q, channels, scale_of(4), ENGINE)
    assert tau[0, 0] == pytest.approx(1.7888543820, rel=1e-6)
    everything = np.ones_like(channels)
    coarse = ENGINE._replace(reciprocal_iterations=1)  # M/M would be off by a thousandth
    assert csd.temperature(q, everything, scale_of(4), coarse) == scale_of(4)
    assert csd.temperature(half(np.zeros((1, 1, 4))), channels, scale_of(4), ENGINE) == scale_of(4)


def test_the_last_tokens_go_first():
    w = weights(half([[[0.5, 1, 0.25, 0.5, 0.125, 0]]]), [[2.375]])
    assert csd.positions(csd.select_tokens(w, 2, 0)).tolist() == [[0, 1]]
    assert csd.positions(csd.select_tokens(w, 2, 1)).tolist() == [[1, 5]]
    assert csd.positions(csd.select_tokens(w, 3, 3)).tolist() == [[3, 4, 5]]
    # A window wider than k: the best of it. One that covers everything: as if there were none.
    assert csd.positions(csd.select_tokens(w, 1, 3)).tolist() == [[3]]
    for local in (6, 100):
        assert csd.positions(csd.select_tokens(w, 2, local)).tolist() == [[0, 1]]


def test_tokens_of_a_group_go_by_the_sum_of_probabilities():
    # Probabilities: 1/2 1/4 1/4 0 and 0 1/4 1/4 1/2, sums 1/2 1/2 1/2 1/2: ties. Unnormalised: 1 1 1 1 too.
    w = weights(half([[[1, 0.5, 0.5, 0], [0, 0.5, 0.5, 1]]]), [[2, 2]])
    assert csd.positions(csd.select_tokens(w, 2, 0)).tolist() == [[0, 1]]
    # The first head is flatter: 1/4 1/8 1/8.. and 3/7 4/7, so token 1 by 0.696 to 0.679; by the weights
    # themselves it would be token 0, 1.75 to 1.5.
    w = weights(half([[[1, *[0.5] * 6], [0.75, 1, *[0] * 5]]]), [[4, 1.75]])
    assert csd.positions(csd.select_tokens(w, 1, 0)).tolist() == [[1]]
    # The window goes before the surest of tokens.
    w = weights(half([[[1, 0, 0], [1, 0, 0]]]), [[1, 1]])
    assert csd.positions(csd.select_tokens(w, 1, 1)).tolist() == [[2]]


def test_sums_of_tiny_probabilities_stay_apart():
    # 2^-23 and 2^-23 (1 + 2^-9) of the whole, plus 2^-23: the same as FP16 probabilities, multiples of 2^-24.
    w = weights(half([[[2**-14, 2**-14 * (1 + 2**-9)], [2**-14, 2**-14]]]), [[2**9, 2**9]])
    assert csd.positions(csd.select_tokens(w, 1, 0)).tolist() == [[1]]


# ---- golden vector and identities ---------------------------------------------------------------------

Q = half([[[2, -1, 0.5, 0.25]]])
KEYS = half([[[1, 0, 0, 0], [0, 1, 0, 0], [1, -1, 0, 0], [0, 0, 1, 1]]])
VALUES = half([[[1, 0], [0, 1], [2, 0], [0, 2]]])


def test_golden_vector():
    # Algorithm 1 with r = k = 2, computed in binary64; v_bar = (3/4, 3/4).
    a = csd.sparf(Q, KEYS, VALUES, scale_of(4), ENGINE, r=2, k=2, value_sum=sums(VALUES))
    assert csd.positions(a.channels).tolist() == [[0, 1]]
    assert csd.positions(a.tokens).tolist() == [[0, 2]]
    assert a.alpha[0, 0] == pytest.approx(0.8425136377, rel=2**-11)
    want = np.array([1.48505888, 0.11811477])
    assert np.all(np.abs(wide(a.out)[0, 0] - want) <= 0.5 * ulp(want))  # measured 0.30 and 0.19
    c = csd.positions(a.channels)[0]
    inverse_tau = csd.temperature(Q, a.channels, scale_of(4), ENGINE)
    estimate = csd.weigh(csd.scores(Q[..., c], KEYS[..., c], 16), inverse_tau[..., None], ENGINE)
    s_hat = wide(estimate.bits)[0, 0] * estimate.inverse[0, 0]
    assert s_hat == pytest.approx([0.30648535, 0.05728959, 0.53602829, 0.10019677], rel=2**-10)
    want = np.array([1.261315, 0.37969186])
    got = wide(csd.dense(Q, KEYS, VALUES, scale_of(4), ENGINE).out)[0, 0]
    assert np.all(np.abs(got - want) <= 0.8 * ulp(want))  # measured 0.41 and 0.78: the weights are FP16


seeds = st.integers(0, 1 << 32)
engines = st.builds(
    csd.Engine,
    st.sampled_from([1, 2, 4, 8, 16, 64]),
    st.integers(5, 8),
    st.integers(3, 4),
    st.integers(3, 4),
)


@given(seeds, engines, st.integers(1, 40), st.integers(0, 3))
@settings(deadline=None, max_examples=30)
def test_all_tokens_are_dense_attention_for_any_r(seed, engine, r, more):
    q, keys, values = tensors(seed, group=1 + seed % 2, n=17)
    a = csd.sparf(q, keys, values, scale_of(32), engine, r=r, k=17 + more, local=more, value_sum=sums(values))
    b = csd.dense(q, keys, values, scale_of(32), engine)
    assert all(np.array_equal(x, y) for x, y in zip(a, b, strict=True))
    assert np.all(b.alpha == 1) and b.tokens.all() and not b.channels.any()
    # Nor is it only because the estimate is skipped: all the weights are the whole of them.
    estimate = csd.weigh(csd.scores(q, keys, engine.lanes), scale_of(32), engine)
    whole = csd.coverage(estimate, b.tokens, engine)
    assert np.all(whole <= 1) and np.all(whole > 1 - 2e-6)


@given(seeds, engines, st.integers(1, 16))
@settings(deadline=None, max_examples=30)
def test_all_channels_estimate_exactly(seed, engine, k):
    q, keys, values = tensors(seed, n=17)
    a = csd.sparf(q, keys, values, scale_of(32), engine, r=32, k=k, value_sum=sums(values))
    exact = csd.weigh(csd.scores(q, keys, engine.lanes), scale_of(32), engine)
    assert np.array_equal(a.tokens, csd.select_tokens(exact, k, 0))
    assert np.array_equal(a.alpha, csd.coverage(exact, a.tokens, engine))
    # out = sum_j p_j V_j + (1 - sum_j p_j) v_bar
    p = wide(exact.bits)[:, 0] * exact.inverse
    p = np.where(a.tokens, p, 0)[..., None]
    v = wide(values)
    want = (p * v).sum(1) + (1 - p.sum(1)) * v.mean(1)
    # The weights are rounded anew, relative to the largest selected one: the same, as that is the largest.
    assert np.all(np.abs(wide(a.out)[:, 0] - want) <= 0.5 * ulp(want) + 2e-5)


@given(seeds, engines, st.integers(1, 32), st.integers(0, 6))
@settings(deadline=None, max_examples=30)
def test_alpha_is_a_share_that_never_falls_as_k_rises(seed, engine, r, local):
    q, keys, values = tensors(seed, group=1 + seed % 3, n=24, spread=1 + seed % 5)
    last = np.zeros((2, q.shape[1]))
    for k in range(1, 26):
        alpha = csd.sparf(q, keys, values, scale_of(32), engine, r=r, k=k, local=local).alpha
        assert np.all(last <= alpha) and np.all(alpha <= 1)
        last = alpha
    assert np.all(last == 1)


def test_alpha_is_above_zero_unless_the_window_hides_all_the_weight():
    q, keys, values = tensors(3)
    assert np.all(csd.sparf(q, keys, values, scale_of(32), ENGINE, r=4, k=1).alpha > 0)


@given(seeds, engines, st.integers(1, 32), st.integers(1, 24))
@settings(deadline=None, max_examples=30)
def test_order_of_tokens_does_not_matter(seed, engine, r, k):
    q, keys, values = tensors(seed, heads=1, n=24)
    order = np.random.default_rng(seed).permutation(24)
    a, b = (
        csd.sparf(q, x, v, scale_of(32), engine, r=r, k=k, value_sum=sums(v))
        for x, v in ((keys, values), (keys[:, order], values[:, order]))
    )
    assume(np.array_equal(a.tokens[:, order], b.tokens))  # else a tie was broken by position
    assert np.abs(a.alpha - b.alpha).max() < 1e-6
    assert np.all(np.abs(wide(a.out) - wide(b.out)) <= ulp(wide(a.out)) + 2e-6)


@given(seeds, engines, st.integers(1, 32), st.integers(1, 24))
@settings(deadline=None, max_examples=30)
def test_equal_values_come_out_as_they_are(seed, engine, r, k):
    q, keys, values = tensors(seed, group=1 + seed % 2, n=24)
    values = np.broadcast_to(values[:, :1], values.shape)
    a = csd.sparf(q, keys, values, scale_of(32), engine, r=r, k=k, value_sum=sums(values))
    assert np.array_equal(a.out, np.broadcast_to(values[:, :1], a.out.shape))


# ---- grouped queries, windows, special values ---------------------------------------------------------


def test_grouped_queries_share_selections_but_not_weights():
    q, keys, values = tensors(4, heads=3, group=4)
    a = csd.sparf(q, keys, values, scale_of(32), ENGINE, r=8, k=9, local=2, value_sum=sums(values))
    assert a.out.shape == (3, 4, 32) and a.tokens.shape == (3, 48) and a.alpha.shape == (3, 4)
    assert np.all(np.count_nonzero(a.tokens, axis=-1) == 9) and a.tokens[:, -2:].all()
    assert np.all(np.count_nonzero(a.channels, axis=-1) == 8)
    assert len(np.unique(a.alpha)) == 12
    # Dense attention has no selection to share: each query on its own.
    b = csd.dense(q, keys, values, scale_of(32), ENGINE)
    for h in range(4):
        one = csd.dense(q[:, h : h + 1], keys, values, scale_of(32), ENGINE)
        assert np.array_equal(one.out[:, 0], b.out[:, h])


def test_a_query_without_the_chosen_channels_sees_all_tokens_alike():
    # Channel 0 wins; the second query is zero there, and all its estimates are equal.
    q = half([[[4, 0, 0, 0], [0, 1, 1, 0]]])
    a = csd.sparf(q, KEYS, VALUES, scale_of(4), ENGINE, r=1, k=2)
    assert a.alpha[0, 1] == pytest.approx(0.5, rel=1e-6)
    assert csd.positions(a.tokens).tolist() == [[0, 2]]


def test_without_a_value_sum_the_rest_counts_for_nothing():
    q, keys, values = tensors(5, heads=1)
    a = csd.sparf(q, keys, values, scale_of(32), ENGINE, r=8, k=9)
    t = csd.positions(a.tokens)[0]
    b = csd.dense(q, keys[:, t], values[:, t], scale_of(32), ENGINE)
    assert np.array_equal(a.out, b.out) and np.all(a.alpha < 1)


def test_a_window_of_k_is_local_attention():
    q, keys, values = tensors(6)
    a = csd.sparf(q, keys, values, scale_of(32), ENGINE, r=8, k=9, local=9)
    b = csd.dense(q, keys[:, -9:], values[:, -9:], scale_of(32), ENGINE)
    assert np.array_equal(a.out, b.out)
    covered, none = (
        csd.sparf(q, keys, values, scale_of(32), ENGINE, r=8, k=9, local=n, value_sum=sums(values))
        for n in (48, 0)
    )
    assert all(np.array_equal(x, y) for x, y in zip(covered, none, strict=True))


def test_heads_do_not_touch_each_other():
    q, keys, values = tensors(7, heads=3, group=2)
    together = csd.sparf(q, keys, values, scale_of(32), ENGINE, r=5, k=7, local=1, value_sum=sums(values))
    for h in range(3):
        i = slice(h, h + 1)
        alone = csd.sparf(
            q[i], keys[i], values[i], scale_of(32), ENGINE, r=5, k=7, local=1, value_sum=sums(values[i])
        )
        assert all(np.array_equal(x[i], y) for x, y in zip(together, alone, strict=True))


def test_zero_query_takes_the_first_tokens():
    # All weights are 1: alpha = k / S, and out = 2/4 (1, 0 + 0, 1)/2 + 2/4 (3, 3)/4 = (0.625, 0.625).
    a = csd.sparf(
        half(np.zeros((1, 1, 4))), KEYS, VALUES, scale_of(4), ENGINE, r=2, k=2, value_sum=sums(VALUES)
    )
    assert csd.positions(a.tokens).tolist() == [[0, 1]]
    assert a.alpha[0, 0] == pytest.approx(0.5, rel=1e-6)
    assert wide(a.out).tolist() == [[[0.625, 0.625]]]


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nan_and_infinity_in_the_query_give_the_canonical_nan(bad):
    q = Q.copy()
    q[0, 0, 3] = half(bad)
    a = csd.sparf(q, KEYS, VALUES, scale_of(4), ENGINE, r=2, k=2, value_sum=sums(VALUES))
    assert np.all(a.out == NAN) and csd.positions(a.tokens).tolist() == [[0, 1]]
    assert np.all(csd.dense(q, KEYS, VALUES, scale_of(4), ENGINE).out == NAN)


def test_one_token():
    a = csd.sparf(Q, KEYS[:, :1], VALUES[:, :1], scale_of(4), ENGINE, r=1, k=1)
    assert np.array_equal(a.out, VALUES[:, :1])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"r": 0}, "r must be at least 1, not 0"),
        ({"k": 0}, "k must be at least 1, not 0"),
        ({"local": -1}, "local must be at least 0, not -1"),
        ({"engine": ENGINE._replace(lanes=12)}, "lanes must be a power of two, not 12"),
        ({"engine": ENGINE._replace(lanes=0)}, "lanes must be a power of two, not 0"),
        ({"q": Q[0]}, r"q must be uint16 of three axes, none empty, not uint16 \(1, 4\)"),
        ({"keys": KEYS.astype(np.float32)}, "keys must be uint16 of three axes, none empty, not float32"),
        ({"keys": KEYS[:, :0]}, "keys must be uint16 of three axes, none empty"),
        ({"keys": KEYS[..., :3]}, r"keys must be \(1, 4, 4\) and values \(1, 4\)"),
        ({"values": VALUES[:, :3]}, r"keys must be \(1, 4, 4\) and values \(1, 4\)"),
        (
            {"value_sum": np.zeros((1, 3), np.uint32)},
            r"value_sum must be uint32 \(1, 2\), not uint32 \(1, 3\)",
        ),
        ({"value_sum": np.zeros((1, 2))}, r"value_sum must be uint32 \(1, 2\), not float64 \(1, 2\)"),
    ],
)
def test_bad_arguments(change, message):
    good = {"q": Q, "keys": KEYS, "values": VALUES, "scale": scale_of(4), "engine": ENGINE, "r": 2, "k": 2}
    with pytest.raises(ValueError, match=message):
        csd.sparf(**{**good, **change})


# ---- accuracy -----------------------------------------------------------------------------------------


def softmax(s):
    e = np.exp(s - s.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def plain(q, keys, values, a, mean):
    """Algorithm 1 in binary64 with the selections of `a`: (out, alpha, s_hat, how far out may be off).

    A weight is rounded to FP16, by 2**-11 of itself or 2**-25 of the largest; 10 % are for everything in
    FP32. Normalised, weights off by a share D move the mean of values by D times their mean distance from
    it, and alpha by 2 D alpha (1 - alpha).
    """
    q, keys, values = wide(q), wide(keys), wide(values)
    d, n = q.shape[-1], keys.shape[1]
    part = np.where(a.channels[:, None], np.abs(q), 0).sum(-1) / np.abs(q).sum(-1)
    estimated = a.channels.any()
    s_hat = softmax(
        np.einsum("hgd,hsd->hgs", np.where(a.channels[:, None], q, 0), keys)
        / np.sqrt(d * part if estimated else d)[..., None]
    )
    alpha = np.where(a.tokens[:, None], s_hat, 0).sum(-1) if estimated else np.ones(q.shape[:2])
    s = softmax(np.where(a.tokens[:, None], np.einsum("hgd,hsd->hgs", q, keys) / np.sqrt(d), -np.inf))
    mix = np.einsum("hgs,hsd->hgd", s, values)
    distance = np.einsum("hgs,hgsd->hgd", s, np.abs(values[:, None] - mix[..., None, :]))
    off, floor = 1.1 * 2.0**-11, n * 2.0**-25 + 1e-5
    gain, v_bar = alpha[..., None], values.mean(1)[:, None]
    if not mean:
        return mix, alpha, s_hat, off * distance + floor * np.abs(values).max()
    slack = gain * off * distance + (2 * off * gain * (1 - gain) + floor) * np.abs(mix - v_bar)
    return gain * mix + (1 - gain) * v_bar, alpha, s_hat, slack + floor * np.abs(values).max()


@given(
    seeds, engines, st.integers(1, 3), st.integers(1, 3), st.integers(1, 40), st.integers(2, 60),
    st.booleans(), st.data(),
)  # fmt: skip
@settings(deadline=None, max_examples=80)
def test_close_to_binary64(seed, engine, heads, group, d, n, mean, data):
    q, keys, values = tensors(seed, heads, group, d, n, spread=1 + seed % 3)
    r, k, local = data.draw(st.integers(1, d)), data.draw(st.integers(1, n)), data.draw(st.integers(0, 4))
    a = csd.sparf(
        q, keys, values, scale_of(d), engine, r=r, k=k, local=local, value_sum=sums(values) if mean else None
    )
    want, alpha, s_hat, slack = plain(q, keys, values, a, mean)
    assert np.all(np.abs(wide(a.out) - want) <= 0.5 * ulp(want) + slack)
    assert np.all(np.abs(a.alpha - alpha) <= 2.2 * 2.0**-11 * alpha * (1 - alpha) + n * 2.0**-25 + 1e-5)
    # Nobody left out is better than somebody chosen, but for what the keys' rounding makes equal.
    joint = s_hat.sum(1)
    far = np.arange(n) < n - local
    chosen = np.where(a.tokens & far, joint, np.inf).min(-1)
    left = np.where(~a.tokens & far, joint, 0).max(-1)
    assert np.all(left <= chosen * (1 + 2.0**-9) + 2.0**-24)


@pytest.mark.parametrize("n", [1024, 4096])
def test_accuracy_of_softmax_and_output(n):
    q, keys, values = tensors(8, heads=2, d=128, n=n, spread=2)
    w = csd.weigh(csd.scores(q, keys, 16), scale_of(128), ENGINE)
    p = wide(w.bits) * w.inverse[..., None]
    want = softmax(np.einsum("hgd,hsd->hgs", wide(q), wide(keys)) / np.sqrt(128))
    # Measured 4.9e-4: half a unit of FP16's last place is 2^-11 = 4.88e-4 of a weight.
    normal = want > 2.0**-14 * want.max()
    assert np.abs(p / want - 1)[normal].max() < 5.2e-4
    assert np.abs(p.sum(-1) - 1).max() < 1e-6
    out = wide(csd.dense(q, keys, values, scale_of(128), ENGINE).out)
    exact = np.einsum("hgs,hsd->hgd", want, wide(values))
    # Measured 2.6e-4 relative L2, of which rounding the result to FP16 is 2.1e-4.
    assert np.linalg.norm(out - exact) < 3e-4 * np.linalg.norm(exact)


def test_shorter_series_are_less_accurate():
    q, keys, values = tensors(9, d=128, n=512, spread=2)
    exact = np.einsum(
        "hgs,hsd->hgd",
        softmax(np.einsum("hgd,hsd->hgs", wide(q), wide(keys)) / np.sqrt(128)),
        wide(values),
    )

    def error(**change):
        out = wide(csd.dense(q, keys, values, scale_of(128), ENGINE._replace(**change)).out)
        return np.linalg.norm(out - exact) / np.linalg.norm(exact)

    assert error(exp_terms=1) > error(exp_terms=2) > 2 * error(exp_terms=4)
    assert (
        error(reciprocal_iterations=0) > error(reciprocal_iterations=1) > 2 * error(reciprocal_iterations=2)
    )


# ---- pages --------------------------------------------------------------------------------------------

LAYOUT = csd.Layout(tokens=4, channels=2, span=16)


def selection(channels, d, tokens, n):
    """One head with these selections."""
    masks = [np.isin(np.arange(size), chosen)[None] for size, chosen in ((d, channels), (n, tokens))]
    return csd.Attention(np.zeros((1, 1, d), np.uint16), np.ones((1, 1), np.float32), *masks)


def test_pages_of_a_selection():
    # Channels 0 1 | 2 3 | 4 5, 20 tokens in spans of 16: channels 0, 1 and 4 in both spans.
    # Tokens 0..3 | 4..7 | 8..11 | 12..15 | 16..19.
    a = selection([0, 1, 4], 6, [0, 3, 9, 19], 20)
    r = csd.reads(a, LAYOUT)
    assert r.channel_pages.tolist() == [[[1, 1], [0, 0], [1, 1]]]
    assert r.channel_rows.tolist() == [[[2, 2], [0, 0], [1, 1]]]
    assert r.token_pages.tolist() == [[1, 0, 1, 0, 1]] and r.token_rows.tolist() == [[2, 0, 1, 0, 1]]
    assert all(x.dtype == np.int64 for x in r)
    # Without the entry-level filter whole pages are forwarded; without the page-level one all are read.
    assert csd.reads(a, LAYOUT, pick=False).token_rows.tolist() == [[4, 0, 4, 0, 4]]
    open_ = csd.reads(a, LAYOUT, skip=False)
    assert open_.token_pages.tolist() == [[1] * 5] and open_.token_rows.tolist() == [[2, 0, 1, 0, 1]]
    assert open_.channel_pages.tolist() == [[[1, 1]] * 3]
    assert csd.reads(a, LAYOUT, skip=False, pick=False).channel_rows.tolist() == [[[2, 2]] * 3]


def test_pages_at_the_end_may_be_partial():
    # Tokens 16 and 17 are all that the fifth page holds; channel 4 is alone in the third.
    a = selection([4], 5, [16], 18)
    r = csd.reads(a, LAYOUT, pick=False)
    assert r.token_rows.tolist() == [[0, 0, 0, 0, 2]] and r.channel_rows.tolist() == [
        [[0, 0], [0, 0], [1, 1]]
    ]


def test_dense_attention_reads_all_tokens_and_no_channel_page():
    q, keys, values = tensors(10, n=18)
    for skip in (True, False):
        for pick in (True, False):
            r = csd.reads(csd.dense(q, keys, values, scale_of(32), ENGINE), LAYOUT, skip=skip, pick=pick)
            assert not r.channel_pages.any() and not r.channel_rows.any()
            assert r.token_pages.tolist() == [[1] * 5] * 2 and r.token_rows.tolist() == [[4, 4, 4, 4, 2]] * 2


@given(seeds, st.integers(1, 40), st.integers(1, 9), st.booleans(), st.booleans())
@settings(deadline=None, max_examples=60)
def test_pages_as_counted_one_by_one(seed, n, size, skip, pick):
    mask = np.random.default_rng(seed).random((2, n)) < 0.3
    pages, rows = csd.pages_read(mask, size, skip=skip, pick=pick)
    for h in range(2):
        groups = [mask[h, i : i + size].tolist() for i in range(0, n, size)]
        read = [int(any(g) or not skip) for g in groups]
        assert pages[h].tolist() == read
        assert rows[h].tolist() == [
            r * (sum(g) if pick else len(g)) for r, g in zip(read, groups, strict=True)
        ]


@pytest.mark.parametrize("size, touched", [(16, 0.882), (2, 0.234), (4, 0.414), (8, 0.656)])
def test_random_picks_touch_most_pages(size, touched):
    # Independent picks of one in eight: 1 - (7/8)^size of the pages hold at least one.
    mask = np.random.default_rng(11).random((64, 4096)) < 1 / 8
    pages, rows = csd.pages_read(mask, size)
    assert pages.mean() == pytest.approx(touched, abs=0.01)
    assert rows.sum() == np.count_nonzero(mask)


def test_reads_of_an_attention_agree_with_its_selections():
    q, keys, values = tensors(12, heads=3, group=2, d=128, n=100)
    layout = csd.Layout(tokens=16, channels=4, span=512)  # 4 KB pages
    a = csd.sparf(q, keys, values, scale_of(128), ENGINE, r=16, k=12, local=3)
    r = csd.reads(a, layout)
    assert r.channel_pages.shape == (3, 32, 1) and r.token_pages.shape == (3, 7)
    assert np.all(r.channel_rows.sum((1, 2)) == 16) and np.all(r.token_rows.sum(1) == 12)
    assert np.all(r.token_pages[:, -1] == 1) and np.array_equal(r.token_pages, r.token_rows > 0)
