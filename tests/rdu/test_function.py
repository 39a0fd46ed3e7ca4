"""Special functions: the pipeline against the NumPy kernel, the kernel against the mathematics."""

from random import Random

import numpy as np
import pytest

from tests.rdu.units import simulate, small
from tilewright.arch import rdu
from tilewright.arch.rdu import FUNCTIONS, tail_latency
from tilewright.rtl.rdu.function import Function
from tilewright.workloads import rdu_kernels as kernels

SPECIAL = [0, 1 << 31, 0x7F800000, 0xFF800000, 0x7FC00000, 0xFF800001, 0x7F7FFFFF, 1, 0x80000001, 0x00800000]
COUNTS = {"pcu__exp_terms": 3, "pcu__reciprocal_iterations": 2, "pcu__rsqrt_iterations": 1}


def f32(*values):
    return [int(w) for w in np.array(values, np.float32).view(np.uint32)]


# Around the ends of the exponential's range, of the reciprocal's, and of its argument's rounding.
EDGES = f32(
    88.7, 88.8, -87.3, -87.4, -104, 177.4, -177.5, 2.0**126, 1.9999999 * 2.0**125, 3e8, -3e8, 0.34657359
)


def arguments(count):
    random = Random(1)
    near = [int(np.float32(random.uniform(-100, 100)).view(np.uint32)) for _ in range(count)]
    return [*SPECIAL, *EDGES, *near, *(random.getrandbits(32) for _ in range(count))]


def stream(component, function, words, move=lambda tick: True):
    """The outputs at the ticks in which the pipeline moves, one word going in at each, zeros behind the last."""
    seen = []

    async def bench(ctx):
        ctx.set(component.function, FUNCTIONS.index(function))
        queue, tick = list(words), 0
        while len(seen) < len(words) + 64:
            moves = move(tick)
            ctx.set(component.move, int(moves))
            ctx.set(component.i, queue[0] if queue else 0)
            if moves:
                seen.append(ctx.get(component.o))
                queue = queue[1:]
            await ctx.tick()
            tick += 1

    simulate(component, bench)
    return seen


@pytest.mark.parametrize("latency", [1, 2])
def test_the_pipeline_does_what_the_kernel_does(latency):
    params = small(**COUNTS, pcu__op_latency_cycles=latency)
    component = Function(params=params)
    words = arguments(60 // latency)
    # exp: 5 + 2 * 3 = 11 operations, reciprocal: 3 * 2 = 6, rsqrt: 1 + 4 = 5, sigmoid: 11 + 1 + 6 = 18.
    for function, operations in zip(FUNCTIONS, (0, 11, 6, 5, 18), strict=True):
        ticks = latency * operations
        assert tail_latency(params, FUNCTIONS.index(function)) == ticks
        want = kernels.special(function, words, params).tolist()
        assert stream(component, function, words)[ticks : ticks + len(words)] == want


def test_counts_at_their_least():
    # Without iterations there is nothing but the seed, and its ends.
    params = small(pcu__exp_terms=1, pcu__reciprocal_iterations=0, pcu__rsqrt_iterations=0)
    component = Function(params=params)
    words = arguments(20)
    for f, function in enumerate(FUNCTIONS):
        ticks = tail_latency(params, f)
        got = stream(component, function, words)[ticks : ticks + len(words)]
        assert got == kernels.special(function, words, params).tolist()


def test_what_does_not_move_stays():
    params = small(**COUNTS)
    component = Function(params=params)
    words = arguments(10)
    random = Random(2)
    moves = [random.random() < 0.5 for _ in range(1000)]
    want = stream(component, "sigmoid", words)
    assert stream(component, "sigmoid", words, lambda tick: moves[tick]) == want


def test_functions_are_what_they_are_called():
    params = small()  # 7 terms, 3 iterations
    x = np.linspace(-20, 20, 401, dtype=np.float32)
    positive = np.exp(x)

    def at(function, values):
        words = kernels.special(function, values.view(np.uint32), params)
        return words.view(np.float32).astype(np.float64)

    np.testing.assert_allclose(at("exp", x), np.exp(x.astype(np.float64)), rtol=3e-6)
    np.testing.assert_allclose(at("reciprocal", positive), 1 / positive.astype(np.float64), rtol=3e-6)
    np.testing.assert_allclose(at("rsqrt", positive), positive.astype(np.float64) ** -0.5, rtol=3e-6)
    np.testing.assert_allclose(at("sigmoid", x), 1 / (1 + np.exp(-x.astype(np.float64))), rtol=3e-6)


def test_the_ends_by_hand():
    params = small()
    nan, inf = 0x7FC00000, 0x7F800000
    for function, argument, want in (
        ("none", 0xFF800001, 0xFF800001),
        ("exp", 0xFF800001, nan),
        ("exp", f32(-np.inf)[0], 0),
        ("exp", inf, inf),
        ("exp", 0, f32(1)[0]),
        ("reciprocal", f32(2.0**126)[0], 0),
        ("reciprocal", inf, 0),
        ("reciprocal", nan, nan),
        ("rsqrt", nan, nan),
        ("sigmoid", f32(-np.inf)[0], 0),
        ("sigmoid", f32(-100)[0], 0),  # 1 + e**100 is infinite
        ("sigmoid", nan, nan),
    ):
        assert int(kernels.special(function, np.array([argument], np.uint32), params)[0]) == want, function
    assert len(rdu.FUNCTIONS) == 5
