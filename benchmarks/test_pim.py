"""How fast the PIM model runs: `make bench`. Figures are printed, and compared only within one run."""

import subprocess
import sys

import pytest

from benchmarks import measure
from benchmarks.measure import best
from tilewright.arch.isa import Program, Segment
from tilewright.arch.pim import ISA, PimParams
from tilewright.arch.registry import load_spec
from tilewright.sim.pim import simulate


def one_channel() -> PimParams:
    return load_spec("pim-gpt", ["channels=1"]).params()


def rows(params: PimParams, outputs: int) -> Program:
    """Dot products of a row each: a row miss every 64 MACs, refresh on."""
    code = ISA.make("GEMV", channels=1, cols=params.columns, outs=min(outputs, params.rows))
    repeat = -(-outputs // params.rows)
    return Program(ISA, [Segment({"code": code}, repeat=repeat)], ["rows"])


def test_commands_per_second(capsys: pytest.CaptureFixture[str]) -> None:
    """One channel, one core: every DRAM command an event, then row bursts and equal rows folded."""
    p = one_channel()
    few, many = rows(p, 1 << 14), rows(p, 1 << 19)
    for fold in (False, True):
        simulate(p, rows(p, 64), fold=fold)  # compile
    unfolded_s, unfolded = best(lambda: simulate(p, few, fold=False))
    folded_s, folded = best(lambda: simulate(p, many))
    assert simulate(p, few).ticks == unfolded.ticks
    slow, fast = unfolded.events / unfolded_s, folded.events / folded_s
    with capsys.disabled():
        print(
            f"\nunfolded  {slow / 1e6:10.1f} M commands/s   {unfolded.events} commands, {unfolded.ticks} ticks"
        )
        print(f"folded    {fast / 1e6:10.1f} M commands/s   {fast / slow:.0f} x unfolded")
    assert fast > slow


def test_plain_python_is_the_same_and_slower(capsys: pytest.CaptureFixture[str]) -> None:
    """The kernels against themselves without a compiler, in a process of its own."""
    script = (
        "import time; from benchmarks.test_pim import one_channel, rows, simulate\n"
        "p = one_channel(); program = rows(p, 32); simulate(p, program, fold=False)\n"
        "start = time.process_time(); r = simulate(p, program, fold=False)\n"
        "print(r.ticks, r.events / (time.process_time() - start))"
    )
    rate = {}
    for jit in ("1", "0"):
        done = subprocess.run(
            [sys.executable, "-c", script],
            env={"PATH": "/usr/bin:/bin", "NUMBA_DISABLE_JIT": jit, "HOME": "/tmp"},
            capture_output=True,
            text=True,
            check=True,
        )
        ticks, per_second = done.stdout.split()
        rate[jit] = int(ticks), float(per_second)
    assert rate["0"][0] == rate["1"][0]
    with capsys.disabled():
        print(f"\ncompiled  {rate['0'][1] / rate['1'][1]:10.0f} x plain Python, the same ticks")
    assert rate["0"][1] > rate["1"][1]


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["run", "pim-gpt", "--model", "gpt2-xl", "--generate", "32"],
        ["run", "pim-gpt", "--model", "gpt3-xl", "--generate", "1024"],
    ],
    ids=lambda c: " ".join(c),
)
def test_command_line(arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    """Wall clock, CPU time and memory of a whole command, warm; the memory is the most of all so far."""
    taken = measure.command(arguments)
    with capsys.disabled():
        print(f"\n{taken}  tilewright", *arguments)
    assert taken.wall_s > 0
