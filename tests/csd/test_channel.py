"""The channel against `sim.flash`: the tick on which every operation ends, under every policy."""

import numpy as np
import pytest
from amaranth.sim import Simulator

from tests.flash.strategies import device
from tests.lib.ticks import play
from tilewright.arch.flash import ERASE, OPERATION, POLICIES, PROGRAM, READ
from tilewright.rtl.csd.channel import FlashChannel
from tilewright.sim.flash import simulate

TYPES = ("lsb", "csb", "msb")


def times(spec):
    """Values for the `times` port."""
    t = spec.timing
    kinds = ("read", "program", "erase")
    by_type = {k: [t.get(f"{k}_{w}", 1) for w in TYPES] for k in kinds[:2]}
    by_type["read"] = [r + t["cache_busy"] * spec.scheduler.cache_read for r in by_type["read"]]
    return {
        "command": [t[f"{k}_command"] for k in kinds],
        "command_plane": [t[f"{k}_command_plane"] for k in kinds],
        "page_transfer": t["page_transfer"],
        "erase": t["erase"],
        **by_type,
    }


def channel(spec, slots):
    types = [TYPES.index(spec.cells.page_type(i)) for i in range(spec.geometry.pages_per_block)]
    return FlashChannel(params=spec.params(), types=types, slots=slots, tag=8)


def run(spec, ops, slots=6, ticks=None):
    """Push `ops` in order, each not before its arrival and when there is a slot; one a tick.

    Returns what the model is to be given (arrivals as they were), the ticks on which operations ended, pages as
    (tick, tag), and the numbers of commands and of operations in them, by kind.
    """
    p = spec.params()
    unit = channel(spec, slots)
    late = ops.copy()
    state = {"next": 0, "of": {}}
    done = np.full(len(ops), -1)
    pages, commands = [], np.zeros((3, 2), int)
    limit = ticks or int(ops["arrival"][-1]) + len(ops) * int(p.erase + p.program.max() + 200)
    outputs = [
        "ready",
        "slot",
        "finished",
        "read_valid",
        "read_tag",
        "command",
        "command_kind",
        "command_planes",
    ]

    async def bench(ctx):
        for name, value in times(spec).items():
            port = getattr(unit.times, name)
            if isinstance(value, list):
                for i, v in enumerate(value):
                    ctx.set(port[i], v)
            else:
                ctx.set(port, value)
        for tick in range(limit):
            seen = {name: ctx.get(getattr(unit, name)) for name in outputs}
            for slot in range(slots):
                if seen["finished"] >> slot & 1:
                    done[state["of"][slot]] = tick
            if seen["read_valid"]:
                pages.append((tick, seen["read_tag"]))
            if seen["command"]:
                commands[seen["command_kind"]] += 1, seen["command_planes"]
            i = state["next"]
            push = i < len(ops) and seen["ready"] and ops["arrival"][i] <= tick
            ctx.set(unit.push, bool(push))
            if push:
                op = ops[i]
                ctx.set(unit.kind, int(op["kind"]))
                ctx.set(unit.tag, i)
                for name in ("chip", "die", "plane", "block", "page"):
                    ctx.set(getattr(unit.address, name), int(op[name]))
                state["of"][seen["slot"].bit_length() - 1] = i
                late["arrival"][i] = tick + 1
                state["next"] += 1
            await ctx.tick()
            if (done >= 0).all():
                return

    simulator = Simulator(unit)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    return late, done, pages, commands


def check(spec, ops, slots=6):
    late, done, pages, commands = run(spec, ops, slots)
    model = simulate(spec.params(), late)
    assert done.tolist() == model.done.tolist()
    reads = sorted((int(t), i) for i, t in enumerate(model.done) if ops["kind"][i] == READ)
    assert pages == reads
    counters = dict(zip(model.timeline.counter_names, model.timeline.counters[:3].T, strict=True))
    assert commands[:, 0].tolist() == counters["commands"].tolist()
    assert commands[:, 1].tolist() == counters["operations"].tolist()
    return model


def reads(n, **fields):
    ops = np.zeros(n, OPERATION)
    ops["bytes"] = 1000
    for name, values in fields.items():
        ops[name] = values
    return ops


def mixed(seed, spec, n, pace):
    """Legal operations of one channel, whose arrivals are up to `pace` ticks apart: pages are programmed in order,
    and read when programmed; a block that is full, and some others, are erased."""
    rng = np.random.default_rng(seed)
    g = spec.geometry
    ops = np.zeros(n, OPERATION)
    ops["arrival"] = np.cumsum(rng.integers(0, pace + 1, n))
    used = {}
    for i in range(n):
        where = tuple(int(rng.integers(k)) for k in g.limits[1:4]) + (int(rng.integers(2)),)
        filled = used.setdefault(where, 2)  # pages 0 and 1 hold something at the start
        choice = rng.random()
        if choice < 0.5 and filled:
            kind, page = READ, int(rng.integers(filled))
        elif filled < g.pages_per_block and choice < 0.92:
            kind, page = PROGRAM, filled
            used[where] += 1
        else:
            kind, page = ERASE, 0
            used[where] = 0
        ops[i] = (
            ops["arrival"][i],
            kind,
            0,
            *where[:3],
            where[3],
            page,
            0 if kind == ERASE else g.page_bytes,
        )
    return ops


def test_one_read_by_hand():
    # Arrives at 1, command 2, array 100, data-out 10.
    spec = device()
    late, done, pages, _ = run(spec, reads(1))
    assert late["arrival"].tolist() == [1] and done.tolist() == [113] and pages == [(113, 0)]


def test_a_multi_plane_read_by_hand():
    # Both are there when the erase of another die leaves the bus: command 2 + 1, array 100, data-out 10 each.
    spec = device((1, 1, 2, 2, 4, 8), scheduler__multi_plane=True, scheduler__policy="pipelined",
                  interface__erase_command_ns=6)  # fmt: skip
    ops = reads(3, plane=[0, 0, 1], die=[1, 0, 0])
    ops["kind"][0], ops["bytes"][0] = ERASE, 0
    _, done, _, commands = run(spec, ops)
    # The erase arrives at 1, its command is on the bus until 7.
    assert done.tolist() == [1007, 7 + 3 + 100 + 10, 7 + 3 + 100 + 20]
    assert commands.tolist() == [[1, 2], [0, 0], [1, 1]]


CASES = [
    ("chip-busy", {"geometry": (1, 2, 2, 2, 4, 4), "scheduler__multi_plane": True}),
    ("data-out-first", {"geometry": (1, 2, 2, 2, 4, 8), "scheduler__multi_plane": True, "scheduler__same_page": False}),
    ("pipelined", {"geometry": (1, 3, 1, 2, 4, 8), "scheduler__multi_plane": True}),
    ("pipelined", {"geometry": (1, 2, 2, 1, 4, 8), "scheduler__cache_read": True, "cells__cache_busy_us": 0.003}),
    ("data-out-first", {"geometry": (1, 1, 2, 4, 4, 8), "scheduler__multi_plane": True, "scheduler__cache_read": True}),
    ("chip-busy", {"geometry": (1, 1, 1, 1, 4, 8), "cells__page_types": "mlc", "cells__read_msb_us": 0.13, "cells__program_msb_us": 0.5}),
]  # fmt: skip


def built(policy, changes, **more):
    fast = {
        "cells__read_lsb_us": 0.013,
        "cells__program_lsb_us": 0.023,
        "cells__erase_us": 0.04,
        "scheduler__window": 64,
    }
    return device(**(fast | changes | more), scheduler__policy=policy)


@pytest.mark.parametrize("policy, changes", CASES)
def test_reads_end_as_in_the_model(policy, changes):
    spec = built(policy, changes)
    rng = np.random.default_rng(len(changes))
    g = spec.geometry
    n = 30
    ops = reads(
        n, arrival=np.cumsum(rng.integers(0, 6, n)), chip=rng.integers(g.chips_per_channel, size=n),
        die=rng.integers(g.dies_per_chip, size=n), plane=rng.integers(g.planes_per_die, size=n),
        block=rng.integers(4, size=n), page=rng.integers(3, size=n),
    )  # fmt: skip
    check(spec, ops)


@pytest.mark.parametrize("policy, changes", CASES)
@pytest.mark.parametrize("pace", [1, 12])
def test_mixed_operations_end_as_in_the_model(policy, changes, pace):
    spec = built(policy, changes)
    model = check(spec, mixed(pace, spec, 36, pace), slots=6)
    assert set(model.kind.tolist()) == {READ, PROGRAM, ERASE}


def test_every_policy_is_covered():
    assert {policy for policy, _ in CASES} == set(POLICIES)


def test_a_full_channel_takes_nothing_and_clear_empties_it():
    spec = device()
    unit = channel(spec, 2)

    def drive(tick, _):
        return {"push": tick < 2, "clear": tick == 4, "kind": READ}

    seen = play(unit, 7, drive, ["ready", "held", "bus"])
    assert [s["ready"] for s in seen] == [1, 1, 0, 0, 0, 1, 1]
    assert [s["held"] for s in seen] == [0, 1, 3, 3, 3, 0, 0]
    # No time is told, so that the first command stays on the bus until it is cleared.
    assert [s["bus"] for s in seen] == [0, 1, 1, 1, 1, 0, 0]
