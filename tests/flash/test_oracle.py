"""The kernels against the plain oracle: every operation's ticks, every unit's ticks by cause, every counter."""

from hypothesis import given, settings
from hypothesis import strategies as st

from tests.flash.strategies import devices, traces
from tilewright.arch.flash import ERASE, PROGRAM, READ, check_operations
from tilewright.sim.flash import COUNTERS, simulate
from tilewright.sim.flash_check import expected


def same(spec, ops):
    check_operations(spec, ops)
    run, want = simulate(spec.params(), ops), expected(spec, ops)
    line = run.timeline
    assert run.admitted.tolist() == want.admitted
    assert run.issued.tolist() == want.issued
    assert run.done.tolist() == want.done
    assert line.ticks == want.ticks
    for u, unit in enumerate(line.units):
        got = {f"busy {kind}": int(line.activity[k, u, 0]) for k, kind in enumerate(line.tags)}
        got |= {cause: int(line.activity[-1, u, 1 + c]) for c, cause in enumerate(line.causes)}
        assert {k: v for k, v in got.items() if v} == want.activity[unit], unit
    for k, kind in enumerate(line.tags):
        for c, counter in enumerate(COUNTERS):
            assert line.counters[k, c] == want.counters.get((kind, counter), 0), (kind, counter)
    return run


@settings(max_examples=100)
@given(st.data())
def test_any_trace_on_any_device(data):
    spec = data.draw(devices())
    same(spec, data.draw(traces(spec)))


@settings(max_examples=100)
@given(st.data())
def test_reads_suspend_what_takes_long(data):
    # One chip, and reads that keep coming.
    one = {"geometry__channels": 1, "geometry__chips_per_channel": 1, "scheduler__queue_depth": 0}
    spec = data.draw(devices(**one, suspension__of="both", cells__erase_us=0.2, cells__program_lsb_us=0.1))
    kinds = (READ, READ, READ, READ, PROGRAM, ERASE)
    same(spec, data.draw(traces(spec, kinds=kinds, gaps=(10, 25, 50))))


@settings(max_examples=40)
@given(st.data())
def test_multi_plane_reads(data):
    spec = data.draw(devices(scheduler__multi_plane=True, geometry__planes_per_die=4, scheduler__window=8))
    same(spec, data.draw(traces(spec, kinds=(READ,))))


def test_the_drawn_traces_reach_every_rule():
    """What the properties above draw is not all of one sort: each cause and counter occurs."""
    seen: set[str] = set()

    @settings(max_examples=80, database=None, derandomize=True)
    @given(st.data())
    def draw(data):
        spec = data.draw(devices())
        line = simulate(spec.params(), data.draw(traces(spec))).timeline
        seen.update(c for i, c in enumerate(line.causes) if line.activity[..., 1 + i].any())
        seen.update(name for name, n in line.totals().items() if n)
        seen.add(spec.scheduler.policy)

    draw()
    assert seen >= {
        *("transfer", "suspended", "sibling", "bus", "array", "host", "idle"), *COUNTERS,
        *("chip-busy", "data-out-first", "pipelined"),
    }  # fmt: skip
