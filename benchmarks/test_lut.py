"""How fast the LUT mapper and model run: `make bench`. Figures are printed, and compared only within one run."""

import pytest

from benchmarks import measure
from benchmarks.measure import best
from tilewright.arch.registry import load_spec
from tilewright.arch.scenario import Scenario
from tilewright.mappers.lut import gemm_program, map_model
from tilewright.sim.lut import simulate
from tilewright.workloads.models import load_model

KERNEL = (2048, 27648, 5120)


def test_gemm(capsys: pytest.CaptureFixture[str]) -> None:
    """One GEMM: cut, written, and run with every line and tile an event, then with instructions folded."""
    spec = load_spec("lut-a100-4x")
    p = spec.params()
    program = gemm_program(spec, *KERNEL)
    for fold in (False, True):
        simulate(p, gemm_program(spec, 8, 64, 64), fold=fold)  # compile
    map_s, _ = best(lambda: gemm_program(spec, *KERNEL))
    unfolded_s, unfolded = best(lambda: simulate(p, program, fold=False))
    folded_s, folded = best(lambda: simulate(p, program))
    assert folded.ticks == unfolded.ticks and folded.totals() == unfolded.totals()
    tiles = unfolded.counter("table_reads")
    with capsys.disabled():
        print(f"\nmapped    {1e3 * map_s:10.1f} ms   {' x '.join(map(str, KERNEL))}, {unfolded.ticks} ticks")
        print(
            f"unfolded  {tiles / unfolded_s / 1e6:10.1f} M tiles/s   {tiles} tiles, {unfolded.events} events"
        )
        print(f"folded    {tiles / folded_s / 1e6:10.1f} M tiles/s   {unfolded_s / folded_s:.1f} x unfolded")


@pytest.mark.parametrize(
    "model, scenario",
    [
        ("bitnet-b1.58-3b", Scenario(prompt=2048, generate=0)),
        ("bitnet-b1.58-3b", Scenario(context=2000, generate=10)),
        ("llama-2-70b", Scenario(prompt=2048, generate=0)),
    ],
    ids=("prompt", "ten steps", "prompt of a large model"),
)
def test_models(model: str, scenario: Scenario, capsys: pytest.CaptureFixture[str]) -> None:
    """Mapping and model apart: in CPU time, how a run divides between the two."""
    spec, config = load_spec("lut-a100-4x"), load_model(model)
    map_s, mapped = best(lambda: map_model(spec, config, scenario))
    segments_s, segments = best(lambda: [len(s.regions["code"]) for s in mapped.program.segments])
    whole_s, timeline = best(lambda: simulate(spec.params(), mapped.program))
    with capsys.disabled():
        size = f"{sum(segments)} instructions, {timeline.ticks} ticks"
        print(f"\nplanned {1e3 * map_s:8.1f} ms, written {1e3 * segments_s:8.1f} ms   {model}, {size}")
        print(f"written and simulated {1e3 * whole_s:8.1f} ms   {whole_s / segments_s:.1f} x written")
    assert len(segments) == mapped.steps


@pytest.mark.parametrize(
    "arguments",
    [
        ["run", "lut-a100-4x", "--model", "bitnet-b1.58-3b", "--prompt", "2048", "--generate", "0"],
        [
            "run",
            "lut-a100-4x",
            "--model",
            "bitnet-b1.58-3b",
            *("--context", "2048", "--generate", "1", "--batch", "1024"),
        ],
        ["run", "lut-a100-4x", "--model", "opt-175b", "--prompt", "2048", "--generate", "0"],
    ],
    ids=lambda c: " ".join(c),
)
def test_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Wall clock, CPU time and memory of a whole command, warm; the memory is the most of all so far."""
    taken = measure.command(arguments)
    with capsys.disabled():
        print(f"\n{taken}  tilewright", *arguments)
    assert taken.wall_s > 0
