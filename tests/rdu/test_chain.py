"""Counter chains: iterations and events as the kernel counts them, tokens held and taken."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rdu.units import simulate
from tilewright.arch.rdu import CONFIG_PCU
from tilewright.rtl.rdu.chain import CounterChain
from tilewright.workloads import rdu_kernels as kernels

LEVELS = 3
CHAIN = CounterChain(levels=LEVELS)


def run(ticks, tokens=None, at_start=0, **fields):
    """For each tick behind `start` its flags, and of those with a step the iteration; a step wherever it is ready."""
    cfg = kernels.configuration(CONFIG_PCU, **fields)
    names = set(CHAIN.config.shape().members)
    seen, iterations = [], []

    async def bench(ctx):
        ctx.set(CHAIN.config, {k: v for k, v in cfg.items() if k in names})
        ctx.set(CHAIN.start, 1)
        ctx.set(CHAIN.tokens, at_start)
        await ctx.tick()
        ctx.set(CHAIN.start, 0)
        for tick in range(ticks):
            ctx.set(CHAIN.tokens, (tokens or {}).get(tick, 0))
            ready = ctx.get(CHAIN.ready)
            ctx.set(CHAIN.step, ready)
            flags = "step" if ready else "token" if ctx.get(CHAIN.missing) else "idle"
            seen.append((flags, ctx.get(CHAIN.signal)))
            if ready:
                counters = [ctx.get(CHAIN.counters[n]) for n in range(6)]
                iterations.append((counters, ctx.get(CHAIN.first), ctx.get(CHAIN.last)))
            await ctx.tick()

    simulate(CHAIN, bench)
    return seen, iterations


def mask(flags):
    return sum(1 << n for n, flag in enumerate(flags) if flag)


@settings(deadline=None, max_examples=20)
@given(st.lists(st.integers(1, 4), min_size=LEVELS, max_size=LEVELS))
def test_iterations_are_those_of_the_kernel(counts):
    fields = {f"count{n}": c for n, c in enumerate(counts)}
    want = list(kernels.iterations(kernels.configuration(CONFIG_PCU, **fields)))
    seen, got = run(len(want) + 2, **fields)
    assert [flags for flags, _ in seen] == ["step"] * len(want) + ["idle"] * 2
    assert got == [(list(it.counters), mask(it.first), mask(it.last)) for it in want]


@pytest.mark.parametrize("held", [0, 1, 2, 15])
def test_tokens_held_at_the_start_are_credits(held):
    # A token an iteration: the first `held` ones need not wait, the rest never come.
    seen, _ = run(20, count0=18, wait=2, hold1=held)
    assert [flags for flags, _ in seen] == ["step"] * held + ["token"] * (20 - held)


def test_a_double_buffer_runs_two_ahead():
    # Two credits, and one back six ticks behind: at 7, counting from 8; that of input 2 is held for all.
    fields = {
        "count0": 2,
        "count1": 4,
        "wait": 5,
        "wait_level": 1,
        "hold0": 2,
        "hold2": 4,
        "signal": 1,
        "signal_level": 1,
    }
    seen, _ = run(12, tokens={7: 1, 8: 1}, **fields)
    assert [t for t, (flags, _) in enumerate(seen) if flags == "step"] == [0, 1, 2, 3, 8, 9, 10, 11]
    assert [t for t, (_, signal) in enumerate(seen) if signal] == [1, 3, 9, 11]


def test_a_start_sets_what_is_held_whatever_it_was():
    run(3, tokens={0: 1, 1: 1}, count0=9, wait=2)
    # One held and one that comes with the start.
    seen, _ = run(4, at_start=1, count0=4, wait=1, hold0=1)
    assert [flags for flags, _ in seen] == ["step", "step", "token", "token"]


def test_more_than_15_tokens_fail():
    with pytest.raises(AssertionError, match="too many tokens held at the start"):
        run(1, at_start=1, wait=1, hold0=15)
    with pytest.raises(AssertionError, match="too many tokens held"):
        run(3, tokens={0: 2, 1: 2}, hold1=14)
