"""The softmax and scalar units against the reference steps: bits, and when they come."""

import numpy as np
import pytest

from tests.csd.units import floats, half, single
from tests.lib.ticks import play
from tilewright.arch.csd import exp_latency, reduce_latency, scalar_programs, scalar_ticks
from tilewright.rtl.csd.softmax import PROGRAMS, ScalarUnit, SoftmaxUnit
from tilewright.workloads import asic
from tilewright.workloads import csd_kernels as csd

TERMS = 4
ENGINE = csd.Engine(lanes=4, exp_terms=TERMS, reciprocal_iterations=2, rsqrt_iterations=2)


def weigh(jobs, gaps=(), engine=ENGINE):
    """(weights, total) of each (scores, scale), one job right after the other; asserts when they come."""
    schedule, weight_ticks, total_ticks, at = {}, [], [], 0
    gaps = iter(gaps)
    for scores, scale in jobs:
        for i, score in enumerate(scores):
            at += next(gaps, 0)
            schedule[at] = {
                "valid": 1, "score": single(score), "last": i == len(scores) - 1,
                "top": single(np.max(scores)), "scale": single(scale),
            }  # fmt: skip
            weight_ticks.append(at + exp_latency(engine.exp_terms))
            at += 1
        total_ticks.append(weight_ticks[-1] + reduce_latency(engine.lanes))
    outputs = ["weight_valid", "weight", "weight_last", "total_valid", "total"]
    unit = SoftmaxUnit(lanes=engine.lanes, terms=engine.exp_terms)
    seen = play(unit, total_ticks[-1] + 2, lambda t, _: {"valid": 0} | schedule.get(t, {}), outputs)
    assert [t for t, s in enumerate(seen) if s["weight_valid"]] == weight_ticks
    assert [t for t, s in enumerate(seen) if s["total_valid"]] == total_ticks
    weights = iter(seen[t]["weight"] for t in weight_ticks)
    return [
        ([next(weights) for _ in scores], seen[t]["total"])
        for (scores, _), t in zip(jobs, total_ticks, strict=True)
    ]


def reference(scores, scale, engine=ENGINE):
    w = csd.weigh(np.float32([[scores]]), np.float32(scale), engine)
    return w.bits[0, 0].tolist(), single(w.total[0, 0])


def test_latencies_by_hand():
    # Six steps beside the series' four, of two ticks, and rounding. Two levels of the tree and the total.
    assert exp_latency(4) == 21
    assert reduce_latency(4) == 3


def test_equal_scores_have_weight_one():
    assert weigh([([2.5] * 5, 1.0)]) == [(half([1.0] * 5).tolist(), single(5.0))]


@pytest.mark.parametrize("n", [1, 3, 4, 5, 9])
def test_weights_and_totals(n):
    rng = np.random.default_rng(n)
    jobs = [(np.float32(rng.normal(size=m) * 8), np.float32(s)) for m, s in ((n, 0.25), (7, 1.0), (n, 0.01))]
    assert weigh(jobs) == [reference(*job) for job in jobs]
    assert weigh(jobs[:2], gaps=[0, 2, 1, 0, 5]) == [reference(*job) for job in jobs[:2]]


@pytest.mark.parametrize("lanes, terms", [(2, 1), (8, 6)])
def test_other_sizes(lanes, terms):
    engine = ENGINE._replace(lanes=lanes, exp_terms=terms)
    scores = np.float32(np.random.default_rng(lanes).normal(size=11) * 4)
    assert weigh([(scores, 0.5)], engine=engine) == [reference(scores, 0.5, engine)]


SCORES = np.float32([0.0, -0.0, 1e-45, 88, -88, 3e38, -3e38, -np.inf, np.inf, np.nan])


def test_any_score():
    # One simulation: vectors that mix ordinary scores with those that hurt; NaN makes the largest NaN.
    rng = np.random.default_rng(5)
    jobs = []
    for i in range(16):
        scores = np.where(
            rng.random(6) < 0.4, rng.choice(SCORES[: 8 if i % 2 else 10], 6), rng.normal(size=6) * 6
        )
        jobs.append((np.float32(scores), np.float32(rng.choice([1.0, 0.125, 0.088388346, 3e-3, 40.0]))))
    with np.errstate(all="ignore"):
        assert weigh(jobs) == [reference(*job) for job in jobs]


# ---- scalars ------------------------------------------------------------------------------------------


def scalars(jobs, iterations=(2, 2)):
    """(x, y) of each (program, x, y, u, plain); asserts when they come. The next starts with the last's `done`."""
    ticks = scalar_ticks(*iterations)
    starts = np.cumsum([0] + [ticks[job[0]] for job in jobs]).tolist()
    schedule = {
        at: {"start": 1, "program": PROGRAMS.index(name), "x": x, "y": y, "u": u, "plain": plain}
        for at, (name, x, y, u, plain) in zip(starts, jobs, strict=False)
    }
    unit = ScalarUnit(reciprocal_iterations=iterations[0], rsqrt_iterations=iterations[1])
    quiet = {"start": 0, "x": 0, "y": 0, "u": 0}
    outputs = ["done", "x_result", "y_result"]
    seen = play(unit, starts[-1] + 3, lambda t, _: quiet | schedule.get(t, {}), outputs)
    assert [t for t, s in enumerate(seen) if s["done"]] == starts[1:]
    return [(seen[t]["x_result"], seen[t]["y_result"]) for t in starts[1:]], seen


def test_ticks_by_hand():
    # 1/x: the seed, two steps each time, the gate, and x is set: 2 (1 + 2 * 2 + 2).
    assert scalar_ticks(2, 2)["inverse"] == 14
    assert tuple(scalar_programs(2, 2)) == PROGRAMS


SPECIAL = np.float32([0, 1e-45, 1e-38, 1, 2049, 8.5e37, 8.6e37, 3e38, np.inf, np.nan])


@pytest.mark.parametrize("iterations", [(0, 0), (1, 3), (3, 2)])
def test_programs_are_the_reference_steps(iterations):
    # One simulation with many operands: any three of the numbers that hurt, and ordinary ones.
    engine = ENGINE._replace(reciprocal_iterations=iterations[0], rsqrt_iterations=iterations[1])
    rng = np.random.default_rng(iterations)
    jobs, want = [], []
    for i in range(25):
        a, b, c = rng.choice(SPECIAL, 3) if i % 2 else np.float32(rng.uniform(0, 2, 3) ** 4)
        bits, plain = [single(v) for v in (a, b, c)], int(rng.integers(5) == 0)
        jobs += [
            ("inverse", bits[0], 0, 0, 0),
            ("tau", *bits, plain),
            ("coverage", *bits, 0),
            ("factors", *bits, 0),
        ]
        with np.errstate(all="ignore"):
            tau = c if plain else c * asic.rsqrt(a * asic.reciprocal(b, engine), engine)
            want += [asic.reciprocal(a, engine), tau, np.minimum(a * b, np.float32(1)), a * b]
            want.append((np.float32(1) - a) * c)
    results, _ = scalars(jobs, iterations)
    got = [
        word
        for (x, y), (name, *_) in zip(results, jobs, strict=True)
        for word in ((x, y) if name == "factors" else (x,))
    ]
    assert got == [single(v) for v in want]


def test_results_stay():
    _, seen = scalars([("factors", single(0.25), single(2.0), single(0.5), 0)])
    assert [(s["x_result"], s["y_result"]) for s in seen[-3:]] == [(single(0.5), single(0.375))] * 3


def test_temperature_of_a_query():
    # By the reference function itself, with the sums L and M that the tree gives.
    q = half([[[2, -1, 0.5, 0.25]]])
    channels = csd.argtopk(q[:, 0] & 0x7FFF, 2)
    scale = np.float32(0.5)
    (got, _), *_ = scalars([("tau", single(3.0), single(3.75), single(scale), 0)])[0]
    assert got == single(csd.temperature(q, channels, scale, ENGINE)[0, 0])
    assert floats(q).sum() == 1.75
