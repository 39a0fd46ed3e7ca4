"""Logs against `log_address`, and the ring they are."""

import numpy as np
import pytest
from amaranth.sim import Simulator

from tests.csd.units import small_spec
from tests.flash.strategies import device
from tests.lib.ticks import play
from tilewright.arch.csd import channel_of, log_address
from tilewright.rtl.csd.ftl import PageLogs, PageTables

NAMES = ("chip", "die", "plane", "block", "page")


def logs(geometry, order="CWDP"):
    p = device(geometry, placement__spare_blocks=0).params()
    return p, PageLogs(params=p, order=order)


def play_logs(unit, script):
    """Outputs of each tick, for inputs by tick."""
    outputs = ["full", "oldest", *(f"address.{name}" for name in NAMES)]
    quiet = {"take": 0, "release": 0, "load": 0}
    return play(unit, len(script), lambda t, _: quiet | script[t], outputs)


def address(seen):
    return {name: seen[f"address.{name}"] for name in NAMES}


@pytest.mark.parametrize("order", ["CWDP", "PDWC", "DCPW"])
def test_a_log_is_filled_in_the_order_of_the_placement(order):
    p, unit = logs((2, 3, 2, 2, 4, 2), order)
    n = 3 * 2 * 2 * 2 * 4 - 1  # all but the last page, and back at the start of the ring after it
    seen = play_logs(unit, [{"channel": 1, "take": 1}] * n + [{"channel": 1}, {"channel": 0}])
    assert [address(s) for s in seen[: n + 1]] == [log_address(p, order, i) for i in range(n + 1)]
    # The other log has not moved.
    assert address(seen[-1]) == log_address(p, order, 0)


def test_a_ring_of_three_blocks_by_hand():
    # One plane, blocks of two pages. Six pages fill it; a block given back is the oldest, and is filled next.
    _, unit = logs((1, 1, 1, 1, 3, 2))
    take, release = {"channel": 0, "take": 1}, {"channel": 0, "release": 1}
    seen = play_logs(unit, [take] * 6 + [{}, release, take, take, {}, release, release, {}, take, {}])
    assert [s["full"] for s in seen] == [0] * 6 + [1, 1, 0, 0, 1, 1, 0, 0, 0, 0]
    assert [(s["address.block"], s["address.page"]) for s in seen[:8]] == [
        (0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (0, 0), (0, 0),
    ]  # fmt: skip
    assert seen[6]["oldest"] == 0 and seen[8]["oldest"] == 1  # given back: block 0
    assert seen[10]["oldest"] == 1 and seen[12]["oldest"] == 2 and seen[13]["oldest"] == 0  # then 1, then 2
    # With a page in block 1 the oldest is still block 0.
    assert (seen[15]["address.block"], seen[15]["address.page"], seen[15]["oldest"]) == (1, 1, 0)


def test_logs_go_on_from_where_a_run_left_them():
    p, unit = logs((2, 1, 1, 2, 4, 2))
    state = unit.logs[0].shape().const({"next": {"block": 3, "page": 1, "plane": 1}, "used": 4})

    def drive(tick, _):
        return {"load": tick == 0, "channel": 1, "take": tick == 1}

    seen = []

    async def bench(ctx):
        ctx.set(unit.initial[1], state)
        for tick in range(4):
            for name, value in drive(tick, None).items():
                ctx.set(getattr(unit, name), int(value))
            seen.append((ctx.get(unit.address.block), ctx.get(unit.address.page), ctx.get(unit.full)))
            await ctx.tick()

    simulator = Simulator(unit)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    # The last page of block 3 of 4; then the ring is full.
    assert seen == [(0, 0, 0), (3, 1, 0), (0, 0, 1), (0, 0, 1)]
    assert p.blocks == 4


def test_tables_give_back_what_was_assigned():
    spec = small_spec()
    p = spec.params()
    unit = PageTables(params=p, black_box=False)
    rng = np.random.default_rng(1)
    entries = [
        (int(rng.integers(p.slots)), int(rng.integers(1 << p.table_bits)), form)
        for form in (0, 1)
        for _ in range(6)
    ]
    entries = list(dict.fromkeys(entries))
    addresses = [{name: int(rng.integers(2)) for name in NAMES} for _ in entries]

    def drive(tick, _):
        inputs = {"assign": tick < len(entries), "lookup": tick >= len(entries)}
        slot, position, form = entries[tick % len(entries)]
        for port in ("assign_entry", "entry"):
            inputs |= {f"{port}.slot": slot, f"{port}.position": position, f"{port}.form": form}
        return inputs | {f"assign_address.{k}": v for k, v in addresses[tick % len(entries)].items()}

    outputs = ["channel", "assign_channel", *(f"address.{name}" for name in NAMES)]
    seen = play(unit, 2 * len(entries) + 1, drive, outputs)
    channels = [channel_of(slot, position, p.flash.channels) for slot, position, _ in entries]
    assert [s["assign_channel"] for s in seen[: len(entries)]] == channels
    found = seen[len(entries) + 1 :]
    assert [address(s) for s in found] == addresses and [s["channel"] for s in found] == channels
