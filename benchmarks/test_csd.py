"""How fast the drive's model runs: `make bench`. Figures are printed, and compared only within one run."""

import pytest

from benchmarks.measure import best
from tilewright.arch.registry import load_spec
from tilewright.arch.scenario import Scenario
from tilewright.mappers.csd import map_model
from tilewright.sim.csd import simulate
from tilewright.workloads.models import load_model

PAGES = ("channel_pages", "token_pages", "other_pages", "programs")


@pytest.mark.parametrize("attention", ["dense", "sparf"])
def test_a_step(attention: str, capsys: pytest.CaptureFixture[str]) -> None:
    """OPT-13B, 8 sequences of 2047 tokens: every page an event, then what is alike folded."""
    spec = load_spec("instinfer-a6000", [f"attention.kind={attention}"])
    mapped = map_model(spec, load_model("opt-13b"), Scenario(context=2047, generate=1, batch=8))
    p = spec.params()
    unfolded_s, unfolded = best(lambda: simulate(p, mapped.program, fold=False))
    folded_s, folded = best(lambda: simulate(p, mapped.program))
    assert folded.ticks == unfolded.ticks and folded.totals() == unfolded.totals()
    pages = sum(unfolded.counter(name) for name in PAGES)
    with capsys.disabled():
        print(
            f"\n{attention:6} {pages / unfolded_s / 1e6:6.2f} M pages/s unfolded, {unfolded_s:6.2f} s; "
            f"folded {folded_s:6.2f} s, {unfolded_s / folded_s:.0f} times as fast"
        )
