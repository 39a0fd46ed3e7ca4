"""The cycle model against the RTL's parts: controllers with their ports, on operations that come one by one."""

import numpy as np
import pytest
from amaranth.hdl import Cat, Module
from amaranth.sim import Simulator

from tests.csd.test_channel import mixed, times
from tests.csd.units import small_spec
from tests.inner import called
from tilewright.arch.csd import page_types
from tilewright.arch.flash import ERASE, READ
from tilewright.rtl.csd.controller import FlashController, PortSwitch
from tilewright.sim import csd_flash

NAMES = ("chip", "die", "plane", "block", "page")
PORTS = 2
LIMIT = 20000  # ticks


def stream(seed, spec, n, pace):
    """Operations of all channels in turn of chance: what `mixed` gives for each, with ports and rows."""
    rng = np.random.default_rng(seed)
    p, f = spec.params(), spec.flash_device
    own = [mixed(seed + c, f, n, 0) for c in range(p.flash.channels)]
    out = []
    for channel in rng.permutation(np.repeat(np.arange(p.flash.channels), n)).tolist():
        op = own[channel][0]
        own[channel] = own[channel][1:]
        rows = int(rng.choice([0, 0, 1, 2, 5])) if op["kind"] == READ else 0
        out.append((channel, int(op["kind"]), *(int(op[k]) for k in NAMES), int(rng.integers(PORTS)), rows))
    arrivals = np.cumsum(rng.integers(0, pace + 1, len(out))).tolist()
    return list(zip(arrivals, out, strict=True))


def play_rtl(spec, ops, limit):
    """(tick of each push), [(tick, port, channel) of grants], busy ticks of each bus, ticks with `working`."""
    p = spec.params()
    m = Module()
    units = [
        FlashController(params=p, types=page_types(spec), ports=PORTS, black_box=False)
        for _ in range(p.flash.channels)
    ]
    switches = [PortSwitch(sources=len(units)) for _ in range(PORTS)]
    for c, unit in enumerate(units):
        m.submodules[f"unit_{c}"] = unit
        m.d.comb += unit.grant.eq(Cat(s.grant[c] for s in switches).any())
    for n, switch in enumerate(switches):
        m.submodules[f"switch_{n}"] = switch
        m.d.comb += [
            switch.requests.eq(Cat(u.request[n] for u in units)),
            switch.releases.eq(Cat(u.releases[n] for u in units)),
        ]
    pushes, grants, bus, working = [], [], [0] * len(units), [0] * len(units)

    async def bench(ctx):
        for unit in units:
            for name, value in times(spec.flash_device).items():
                port = getattr(unit.times, name)
                for i, v in enumerate(value) if isinstance(value, list) else ():
                    ctx.set(port[i], v)
                if not isinstance(value, list):
                    ctx.set(port, value)
        for tick in range(limit):
            for c, unit in enumerate(units):
                ctx.set(unit.push, 0)
                bus[c] += ctx.get(unit.bus)
                working[c] += ctx.get(unit.working)
            for n, switch in enumerate(switches):
                given = ctx.get(switch.grant)
                if given:
                    grants.append((tick, n, given.bit_length() - 1))
            if len(pushes) < len(ops):
                arrival, (channel, kind, *where, port, rows) = ops[len(pushes)]
                unit = units[channel]
                if arrival <= tick and ctx.get(unit.ready):
                    ctx.set(unit.push, 1)
                    ctx.set(unit.kind, kind)
                    for name, value in zip(NAMES, where, strict=True):
                        ctx.set(getattr(unit.address, name), value)
                    for name, value in (
                        ("port", port),
                        ("mask", (1 << rows) - 1),
                        ("row_lines", 2),
                        ("rank", 0),
                    ):
                        ctx.set(getattr(unit.job, name), value)
                    pushes.append(tick)
            await ctx.tick()
            if len(pushes) == len(ops) and not any(ctx.get(u.working) for u in units):
                return

    simulator = Simulator(m)
    simulator.add_clock(1e-6)
    simulator.add_testbench(bench)
    simulator.run()
    return pushes, grants, bus, working


def number(p, where):
    """The page's number in its channel's log."""
    f = p.flash
    chip, die, plane, block, page = where
    stripe = chip * p.log_strides[0] + die * p.log_strides[1] + plane * p.log_strides[2]
    return (block * f.pages + page) * f.chips * f.dies * f.planes + int(stripe)


def play_model(spec, ops):
    """The same from the model."""
    p = spec.params()
    activity = np.zeros((1, p.flash.channels, 4), np.int64)
    s = csd_flash.new_channels(p, PORTS, activity, 0, (1, 2, 3))
    pushes, grants, now = [], [], 0
    working = [0] * p.flash.channels
    while len(pushes) < len(ops) or any(called(csd_flash.held)(s, c, now) for c in range(p.flash.channels)):
        for c in range(p.flash.channels):
            working[c] += called(csd_flash.held)(s, c, now) > 0
            if s.look[c] == now:
                called(csd_flash.step_rows)(p, s, c, now)
            if s.next[c] == now:
                called(csd_flash.step_channel)(p, s, c, now)
        for port in range(PORTS):
            if s.asking[port] and s.ports[port, 0] <= now:
                called(csd_flash.grant)(p, s, port, now)
                grants.append((now, port, (s.ports[port, 1] - 1) % p.flash.channels))
        if len(pushes) < len(ops):
            arrival, (channel, kind, *where, port, rows) = ops[len(pushes)]
            if arrival <= now and called(csd_flash.held)(s, channel, now) < p.flash_queue:
                called(csd_flash.push)(p, s, channel, kind, number(p, where), port, 2 * rows, 0, 0, now)
                pushes.append(now)
        now += 1
        assert now < LIMIT, "operations wait for ever"
    called(csd_flash.finish_channels)(s, now)
    assert (activity.sum(axis=(0, 2)) == now).all()
    return pushes, grants, activity[:, :, 0].sum(axis=0).tolist(), working


CASES = [
    {},
    {"flash__scheduler__policy": "data-out-first", "flash__queue": 6},
    {"flash__scheduler__policy": "chip-busy", "flash__geometry__dies_per_chip": 2, "flash__queue": 6},
    {"flash__scheduler__cache_read": True, "flash__cells__cache_busy_us": 0.003, "flash__queue": 8},
    {"flash__scheduler__same_page": False, "flash__scheduler__multi_plane": True, "flash__queue": 8},
]


@pytest.mark.parametrize("changes", CASES)
@pytest.mark.parametrize("pace", [1, 9])
def test_controllers_act_as_in_the_rtl(changes, pace):
    spec = small_spec(**changes)
    ops = stream(7, spec, 24, pace)
    mine = play_model(spec, ops)
    theirs = play_rtl(spec, ops, LIMIT)
    assert {op[1] for _, op in ops} >= {READ, ERASE}
    for a, b in zip(mine, theirs, strict=True):
        assert a == b
