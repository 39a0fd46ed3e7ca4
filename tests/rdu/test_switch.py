# amaranth: UnusedElaboratable=no
# (some of these constructors raise)

"""Switches and the mesh: ways, multicast, fairness, and the closed forms of latency and load."""

from collections import Counter
from random import Random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.rdu.units import packet, simulate, small
from tilewright.arch.rdu import MESH, NETWORKS, dynamic_flow, is_pcu
from tilewright.rtl.rdu.network import Network, local_ports
from tilewright.rtl.rdu.switch import Switch

N, E, S, W = (1 << k for k in range(4))
LOCAL = 4
COLUMNS, ROWS = 3, 2
SETS = {
    "pcu__lanes": 2,
    "pcu__stages": 1,
    "pcu__registers": 2,
    "pcu__vector_inputs": 2,
    "pcu__scalar_inputs": 0,
    "grid__columns": COLUMNS,
    "grid__rows": ROWS,
    "agcu__per_side": 1,
    "network__flows": 4,
    "network__fifo_depth": 2,
}
BUILT = {}


def network(**sets):
    key = tuple(sorted(sets.items()))
    if key not in BUILT:
        BUILT[key] = Network(params=small(**SETS | sets), network="vector")
    return BUILT[key]


def play(component, feeds, *, tables=(), accept=None, ticks=200):
    """Offer each stream its packets, (tick to begin, packets), and return pushes and pops as (tick, packet).

    `tables`: rows (x, y, port, flow, out, next), written before tick 0.
    """
    pushed = {name: [] for name in feeds}
    popped = {name: [] for name in component.signature.members if name.startswith("out_") or "_out_" in name}

    async def bench(ctx):
        for x, y, port, flow, out, after in tables:
            values = {"enable": 1, "port": port, "flow": flow, "out": out, "next": after}
            if hasattr(component, "table_x"):
                values |= {"x": x, "y": y}
            for name, value in values.items():
                ctx.set(getattr(component, f"table_{name}"), value)
            await ctx.tick()
        ctx.set(component.table_enable, 0)
        for tick in range(ticks):
            for name, (start, packets) in feeds.items():
                port = getattr(component, name)
                n = len(pushed[name])
                offers = tick >= start and n < len(packets)
                ctx.set(port.valid, int(offers))
                if offers:
                    ctx.set(port.payload, packets[n])
            for name in popped:
                ctx.set(getattr(component, name).ready, int(accept is None or accept(name, tick)))
            for name in feeds:
                port = getattr(component, name)
                if ctx.get(port.valid) and ctx.get(port.ready):
                    pushed[name].append((tick, ctx.get(port.payload.data[0])))
            for name, seen in popped.items():
                port = getattr(component, name)
                if ctx.get(port.valid) and ctx.get(port.ready):
                    seen.append((tick, ctx.get(port.payload.data[0]), ctx.get(port.payload.flow)))
            await ctx.tick()

    simulate(component, bench)
    return pushed, {name: seen for name, seen in popped.items() if seen}


def numbered(count, flow, first=0):
    return [packet([first + i, 0], flow=flow) for i in range(count)]


# ---- one switch ---------------------------------------------------------------------------------------

SWITCH = Switch(lanes=2, local_in=1, local_out=2, flows=4)


def test_a_static_flow_is_looked_up_and_renamed_at_its_port():
    # The same flow number means something else at each port.
    tables = [(0, 0, 0, 1, S, 3), (0, 0, 4, 1, E, 2)]
    feeds = {"in_0": (0, numbered(2, 1)), "in_4": (0, numbered(2, 1, 10))}
    _, popped = play(SWITCH, feeds, tables=tables, ticks=4)
    assert popped == {"out_2": [(0, 0, 3), (1, 1, 3)], "out_1": [(0, 10, 2), (1, 11, 2)]}


def test_inputs_take_turns_at_an_output_and_do_not_meet_elsewhere():
    # North, south and the unit all go east; west goes north at the same time.
    tables = [(0, 0, port, 0, E, 0) for port in (0, 2, 4)] + [(0, 0, 3, 0, N, 0)]
    feeds = {f"in_{port}": (0, numbered(3, 0, 10 * port)) for port in (0, 2, 3, 4)}
    _, popped = play(SWITCH, feeds, tables=tables, ticks=10)
    assert [w for _, w, _ in popped["out_1"]] == [0, 20, 40, 1, 21, 41, 2, 22, 42]
    assert [t for t, _, _ in popped["out_1"]] == list(range(9))
    assert [t for t, _, _ in popped["out_0"]] == [0, 1, 2]


def test_copies_of_a_multicast_leave_as_they_can():
    # East is ready from tick 3: the first packet's other copies leave at 0, and the second waits behind it.
    tables = [(0, 0, 3, 2, E | N | 1 << LOCAL + 1, 1)]
    pushed, popped = play(
        SWITCH,
        {"in_3": (0, numbered(2, 2))},
        tables=tables,
        ticks=6,
        accept=lambda name, tick: name != "out_1" or tick >= 3,
    )
    assert popped == {
        "out_0": [(0, 0, 1), (4, 1, 1)],
        "out_1": [(3, 0, 1), (4, 1, 1)],
        "out_5": [(0, 0, 1), (4, 1, 1)],
    }
    assert pushed["in_3"] == [(3, 0), (4, 1)]


@pytest.mark.parametrize("flow", [3, dynamic_flow(0, 0, 2), dynamic_flow(0, 0, 7), 4])
def test_a_flow_that_leads_nowhere_is_an_error(flow):
    # No entry; a local port that is not there (two are), either within the mask or beyond; no such flow.
    with pytest.raises(AssertionError, match="leads nowhere"):
        play(Switch(lanes=2, local_in=1, local_out=2, flows=4), {"in_0": (0, numbered(1, flow))}, ticks=2)


def test_no_more_local_ports_than_a_mask_has():
    with pytest.raises(ValueError, match=r"local_out must be in 0\.\.4, not 5"):
        Switch(lanes=2, local_in=1, local_out=5, flows=4)


# ---- the mesh -----------------------------------------------------------------------------------------

POSITIONS = [(x, y) for y in range(ROWS) for x in range(COLUMNS)]


@pytest.mark.parametrize("hop, die_hop, dies", [(1, 1, 1), (2, 2, 1), (1, 4, 3)])
def test_an_unloaded_packet_takes_a_hop_for_each_link(hop, die_hop, dies):
    # (H + 2) hops, H = |dx| + |dy|; each of the |dx| links crosses a border where every column is a die.
    mesh = network(network__hop_cycles=hop, network__die_hop_cycles=die_hop, grid__dies=dies)
    for x, y in POSITIONS[::5]:
        for to in POSITIONS:
            flow = dynamic_flow(*to)
            _, popped = play(mesh, {f"in_{x}_{y}_0": (0, numbered(1, flow))}, ticks=20)
            dx, dy = abs(to[0] - x), abs(to[1] - y)
            latency = (dy + 2) * hop + dx * (die_hop if dies > 1 else hop)
            assert popped == {f"out_{to[0]}_{to[1]}_0": [(latency, 0, flow)]}


@pytest.mark.parametrize("depth, hop, credit", [(1, 1, 1), (2, 1, 2), (3, 2, 3), (2, 1, 1)])
def test_a_busy_way_moves_credits_per_round_trip(depth, hop, credit):
    # min(1, C / (hop + credit)) packets a tick: C in every hop + credit ticks.
    mesh = network(
        network__fifo_depth=depth, network__hop_cycles=hop, network__credit_cycles=credit, grid__columns=2, grid__rows=1
    )  # fmt: skip
    count = 12
    pushed, popped = play(mesh, {"in_0_0_0": (0, numbered(count, dynamic_flow(1, 0)))})
    trip = hop + credit
    burst = min(depth, trip)
    went = [i // burst * trip + i % burst for i in range(count)]
    assert [t for t, _ in pushed["in_0_0_0"]] == went
    # Three links: to the switch, to the next one, to the unit.
    assert [seen[:2] for seen in popped["out_1_0_0"]] == [(t + 3 * hop, i) for i, t in enumerate(went)]


def test_streams_share_a_link_by_halves():
    # Load of link (0,0)-(1,0): two streams at one a tick, so each takes twice its time. A stream elsewhere doesn't.
    feeds = {
        "in_0_0_0": (0, numbered(10, dynamic_flow(1, 0))),
        "west_in_0": (0, numbered(10, dynamic_flow(2, 0), 100)),
        "in_0_1_0": (0, numbered(10, dynamic_flow(1, 1), 200)),
    }
    _, popped = play(network(), feeds)
    steady = {name: [t for t, *_ in seen][3:9] for name, seen in popped.items()}
    for name, period in (("out_1_0_0", 2), ("out_2_0_0", 2), ("out_1_1_0", 1)):
        assert [b - a for a, b in zip(steady[name], steady[name][1:], strict=False)] == [period] * 5


def test_a_multicast_counts_once_on_a_shared_link():
    # From (0, 0) east along row 0, at (1, 0) to the unit and on to (2, 0): both get a packet a tick.
    tables = [(0, 0, LOCAL, 1, E, 2), (1, 0, 3, 2, E | 1 << LOCAL, 3), (2, 0, 3, 3, 1 << LOCAL + 1, 0)]
    _, popped = play(network(), {"in_0_0_0": (0, numbered(5, 1))}, tables=tables)
    assert popped == {
        "out_1_0_0": [(3 + i, i, 3) for i in range(5)],
        "out_2_0_1": [(4 + i, i, 0) for i in range(5)],
    }


def test_dimension_order_is_the_specs():
    # From (0, 0) to (1, 1): while (1, 0) is blocked by a packet that can't leave, only the way by (0, 1) is open.
    blocker = numbered(8, dynamic_flow(1, 0))
    for order, free in (("xy", False), ("yx", True)):
        feeds = {"west_in_0": (0, blocker), "in_0_0_0": (20, numbered(1, dynamic_flow(1, 1), 100))}
        mesh = network(network__order=order)
        _, popped = play(mesh, feeds, accept=lambda name, tick: name != "out_1_0_0", ticks=40)
        assert ("out_1_1_0" in popped) is free


def test_leaving_the_mesh_is_an_error():
    mesh = Network(params=small(**SETS), network="vector")
    with pytest.raises(AssertionError, match="leaves the mesh: north_0_0"):
        play(mesh, {"in_0_0_0": (0, numbered(1, 0))}, tables=[(0, 0, LOCAL, 0, N, 0)], ticks=6)


def turned(place):
    return COLUMNS - 1 - place[0], ROWS - 1 - place[1]


@settings(deadline=None, max_examples=6)
@given(st.integers(0, 2**32 - 1))
def test_random_traffic_arrives_once_and_in_order(seed):
    random = Random(seed)
    feeds, expected = {}, Counter()
    for x, y in POSITIONS:
        packets = []
        for i in range(random.randrange(8)):
            to = random.choice(POSITIONS)
            port = random.randrange(local_ports(small(**SETS), "vector", *to)[1])
            packets.append(packet([1000 * (x + 3 * y) + i, 0], flow=dynamic_flow(*to, port)))
            expected[f"out_{to[0]}_{to[1]}_{port}", packets[-1]["data"][0]] += 1
        feeds[f"in_{x}_{y}_0"] = (random.randrange(5), packets)
    willing = random.choice((0.4, 1))
    holds = {}

    def accept(name, tick):
        return holds.setdefault((name, tick), random.random() < willing)

    _, popped = play(network(), feeds, accept=accept, ticks=120)
    got = Counter((name, word) for name, seen in popped.items() for _, word, _ in seen)
    assert got == expected
    for seen in popped.values():
        for source in range(len(POSITIONS)):
            words = [w for _, w, _ in seen if w // 1000 == source]
            assert words == sorted(words)


@settings(deadline=None, max_examples=6)
@given(st.integers(0, 2**32 - 1))
def test_a_half_turn_of_disjoint_streams_changes_no_tick(seed):
    # One stream into each unit at most: no arbiter has to choose between equals at the same time by port number.
    random = Random(seed)
    goals = random.sample(POSITIONS, 2)
    starts = random.sample(POSITIONS, 2)

    def traffic(turn):
        place = turned if turn else (lambda at: at)
        feeds = {}
        for n, (start, goal) in enumerate(zip(starts, goals, strict=True)):
            x, y = place(start)
            feeds[f"in_{x}_{y}_0"] = (20 * n, numbered(6, dynamic_flow(*place(goal))))
        _, popped = play(network(), feeds, ticks=50)
        return {
            place(tuple(map(int, name.split("_")[1:3]))): [s[:2] for s in seen]
            for name, seen in popped.items()
        }

    assert traffic(False) == traffic(True)


def test_the_scalar_network_has_the_scalar_ports():
    params = small(**SETS | {"pcu__scalar_inputs": 2, "pcu__registers": 6})
    component = Network(params=params, network="scalar")
    assert all(
        is_pcu(*map(int, name.split("_")[1:3])) for name in component.signature.members if name[:3] == "in_"
    )
    assert len(component.in_0_0_0.payload.data.as_value()) == 32
    assert hasattr(component, "out_0_0_1") and not hasattr(component, "out_0_0_2")
    with pytest.raises(ValueError, match="network must be one of vector, scalar, not 'control'"):
        Network(params=params, network="control")
    assert len(MESH) == LOCAL and NETWORKS == ("vector", "scalar")
