"""Speeds of the cycle models, as printed figures: unfolded events a second, and the same run with folding.

Run with `make bench`. Kernels are compiled before the clock starts; the two ways alternate in one process, and
medians are printed. Only what must hold on any machine is asserted: equal results, and folding that pays.
"""

from statistics import median
from time import perf_counter

import pytest

from tilewright.arch.registry import load_spec, room
from tilewright.arch.scenario import Scenario
from tilewright.workloads.models import load_model

ROUNDS = 5


def seconds(work):
    began = perf_counter()
    result = work()
    return perf_counter() - began, result


@pytest.mark.parametrize(("preset", "model", "generate"), [("pim-gpt", "gpt2-small", 4), ("pim-gpt", "gpt2-xl", 1)])  # fmt: skip
def test_decode(preset, model, generate, capsys):
    spec = load_spec(preset)
    params, simulate = spec.params(), room("sim", spec.target_name).simulate
    config = load_model(model)
    mapping, mapped = seconds(
        lambda: room("mappers", spec.target_name).map_model(spec, config, Scenario(generate=generate), None)
    )
    folded, unfolded = (
        lambda: simulate(params, mapped.program, fold=True),
        lambda: simulate(params, mapped.program, fold=False),
    )
    quick, whole = folded(), unfolded()
    assert (quick.ticks, quick.totals()) == (whole.ticks, whole.totals())
    times = [(seconds(folded)[0], seconds(unfolded)[0]) for _ in range(ROUNDS)]
    with_folding, without = (median(t) for t in zip(*times, strict=True))
    with capsys.disabled():
        print(
            f"\n{preset}, {model}, {generate} tokens: {whole.ticks:,} ticks; mapping {mapping:.2f} s; unfolded "
            f"{without:.3f} s, {whole.events / without:,.0f} events/s; folded {with_folding:.3f} s, "
            f"{whole.ticks / with_folding:,.0f} ticks/s"
        )
    assert with_folding < without
