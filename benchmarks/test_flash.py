"""How fast the flash model runs: `make bench`. Figures are printed, and compared only within one run."""

import time

import numpy as np
import pytest

from benchmarks.measure import best
from tilewright.arch.flash import OPERATION, READ, FlashSpec, PageMap, load_flash
from tilewright.sim.flash import simulate
from tilewright.sim.flash_check import expected

PAGES = 1_000_000


def reads(spec: FlashSpec, pages: int, pattern: str) -> np.ndarray:
    """Reads of logical pages, all there at tick 0: in order (two planes join in a command) or at random."""
    page_map = PageMap(spec)
    logical = np.arange(pages)
    if pattern == "random":
        logical = np.random.default_rng(1).integers(0, page_map.logical_pages, pages)
    return page_map.translate(0, READ, logical)[0]


def mixed(spec: FlashSpec, pages: int) -> np.ndarray:
    """Reads of block 0 at random, with every fourth a program of the next page of blocks that were erased."""
    page_map, g = PageMap(spec), spec.geometry
    planes = g.dies * g.planes_per_die
    logical = np.random.default_rng(1).integers(0, planes * g.pages_per_block, pages)
    logical[::4] = np.arange(len(logical[::4])) % planes
    kind = np.where(np.arange(pages) % 4, 0, 1)
    ops = page_map.translate(0, kind, logical)[0]
    assert ops.dtype == OPERATION
    return ops


@pytest.mark.parametrize("policy", ["chip-busy", "pipelined"])
@pytest.mark.parametrize("pattern", ["in order", "random", "a quarter programs"])
def test_page_operations_per_second(policy: str, pattern: str, capsys: pytest.CaptureFixture[str]) -> None:
    """MQSim's device on one core, every operation an event chain of its own: nothing is folded."""
    spec = load_flash("mqsim", [f"scheduler.policy={policy}", "suspension.of=both"])
    ops = mixed(spec, PAGES // 4) if pattern == "a quarter programs" else reads(spec, PAGES, pattern)
    simulate(spec.params(), ops[:64])  # compile
    seconds, run = best(lambda: simulate(spec.params(), ops))
    line = run.timeline
    with capsys.disabled():
        print(
            f"\n{len(ops) / seconds / 1e6:6.2f} M page operations/s, {line.events / seconds / 1e6:5.2f} M events/s"
            f"   {policy}, {pattern}: {len(ops)} operations, {line.ticks} ticks"
        )
    assert line.counter("operations") == len(ops)


def test_the_plain_oracle_is_the_same_and_slower(capsys: pytest.CaptureFixture[str]) -> None:
    spec = load_flash("mqsim", ["geometry.channels=2"])
    ops = reads(spec, 400, "random")
    simulate(spec.params(), ops)
    seconds, run = best(lambda: simulate(spec.params(), ops))
    start = time.process_time()
    want = expected(spec, ops)
    slow = time.process_time() - start
    assert run.done.tolist() == want.done
    with capsys.disabled():
        print(
            f"\ncompiled  {slow / seconds:10.0f} x the plain oracle, the same ticks ({len(ops)} operations)"
        )
    assert slow > seconds
