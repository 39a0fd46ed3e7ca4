"""How fast the RDU mapper and model run: `make bench`. Figures are printed, and compared only within one run."""

import pytest

from benchmarks import measure
from benchmarks.measure import best
from tilewright.arch.registry import load_spec
from tilewright.arch.scenario import Scenario
from tilewright.mappers.rdu import map_model
from tilewright.mappers.rdu.apps import LOGGED
from tilewright.sim.rdu import simulate
from tilewright.workloads.models import load_model


@pytest.mark.parametrize("name", [n for n in LOGGED if n.startswith("gemm")])
def test_logged_products(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Plasticine's GEMM rows: every iteration and hop an event, then links joined and periods folded."""
    p = load_spec("plasticine-20x20").params()
    make, sizes = LOGGED[name]
    app = make(p, **sizes)
    program = app.program(app.section.build())
    for fold in (False, True):
        simulate(p, program, fold=fold)  # compile
    unfolded_s, unfolded = best(lambda: simulate(p, program, fold=False))
    folded_s, folded = best(lambda: simulate(p, program))
    assert folded.ticks == unfolded.ticks and folded.totals() == unfolded.totals()
    rate = unfolded.events / unfolded_s / 1e6
    with capsys.disabled():
        print(
            f"\n{name:8} {folded.ticks:8} ticks  unfolded {rate:6.1f} M events/s, {1e3 * unfolded_s:7.1f} ms; "
            f"folded {1e3 * folded_s:7.1f} ms"
        )


@pytest.mark.parametrize(
    "scenario",
    [Scenario(context=4000, generate=1), Scenario(prompt=4096, generate=0)],
    ids=("token", "prompt"),
)
def test_a_model(scenario: Scenario, capsys: pytest.CaptureFixture[str]) -> None:
    """Llama-2-7B on a node: mapping, with its places and routes found before, and model apart."""
    spec, model = load_spec("sn40l-node"), load_model("llama-2-7b")
    map_s, mapped = best(lambda: map_model(spec, model, scenario))
    run_s, timeline = best(lambda: simulate(spec.params(), mapped.program))
    with capsys.disabled():
        print(
            f"\nmapped {map_s:6.2f} s, simulated {run_s:6.2f} s   {timeline.ticks} ticks, {timeline.events} events"
        )
    assert timeline.ticks > 0


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "sn40l-node", "--model", "llama-2-7b", "--context", "4000", "--generate", "1"],
        ["run", "sn40l-node", "--model", "samba-coe", "--prompt", "256", "--generate", "20", "--batch", "8"],
    ],
    ids=lambda c: " ".join(c),
)
def test_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Wall clock, CPU time and memory of a whole command, warm; the memory is the most of all so far."""
    taken = measure.command(arguments)
    with capsys.disabled():
        print(f"\n{taken}  tilewright", *arguments)
    assert taken.wall_s > 0
