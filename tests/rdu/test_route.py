"""Routing: trees, loads and flow ids by hand, and laws that a packet can check by walking the tables."""

import re
import xml.etree.ElementTree as ET
from fractions import Fraction
from graphlib import CycleError, TopologicalSorter

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.arch.errors import UserError
from tilewright.arch.rdu import OPPOSITE
from tilewright.mappers.rdu.draw import draw
from tilewright.mappers.rdu.fabric import EAST, LOCAL, NORTH, SOUTH, WEST, Fabric, checkerboard
from tilewright.mappers.rdu.netlist import Netlist, Sink, Stream, Unit
from tilewright.mappers.rdu.place import Placement, place
from tilewright.mappers.rdu.route import TURNS, Hop, Link, rerouted, route, turn_allowed, waiting_circle


def at(fabric, **positions):
    """A netlist's units at positions (x, y), or at gates ("west", y) and ("east", y); and their placement."""
    units, sites = [], {}
    for name, (x, y) in positions.items():
        if isinstance(x, str):
            port = WEST if x == "west" else EAST
            (site,) = [i for i, s in enumerate(fabric.sites) if s.port == port and s.y == y]
        else:
            site = y * fabric.columns + x
        units.append(Unit(name, fabric.sites[site].kind))
        sites[name] = site
    return tuple(units), Placement(sites, Fraction(0), Fraction(0), 0)


def test_a_multicast_in_dimension_order():
    # From (0, 0) to (2, 0), (2, 1) and (2, 2): two hops east, two south, with a copy at each switch of column 2.
    fabric = checkerboard(3, 3)
    units, placement = at(fabric, a=(0, 0), b=(2, 0), c=(2, 1), d=(2, 2))
    netlist = Netlist(units, (Stream("s", "a", (Sink("b", 3), Sink("c"), Sink("d", 1)), Fraction(1, 2)),))
    result = route(netlist, fabric, placement, turns="xy")
    assert result.routes["s"].hops == (
        Hop(0, 0, LOCAL, 0, (EAST,), 0),
        Hop(1, 0, WEST, 0, (EAST,), 0),
        Hop(2, 0, WEST, 0, (SOUTH, LOCAL + 3), 0),
        Hop(2, 1, NORTH, 0, (SOUTH, LOCAL), 0),
        Hop(2, 2, NORTH, 0, (LOCAL + 1,), 0),
    )
    # A link in, the hops, a link out.
    assert result.routes["s"].latencies == (1 + 2 + 1, 1 + 3 + 1, 1 + 4 + 1)
    # Each link of the tree carries the packets once: in, four hops, three out.
    assert list(result.loads["vector"].values()) == [Fraction(1, 2)] * 8
    assert (result.slow_down, result.hops, result.overused["vector"]) == (1, 4, ())


def test_gates_hang_on_the_edge():
    fabric = checkerboard(2, 2, gates=2)
    units, placement = at(fabric, load=("west", 0), c=(1, 1), m=(1, 0), store=("east", 1))
    streams = (Stream("a", "load", (Sink("c"),)), Stream("b", "m", (Sink("store"),)))
    result = route(Netlist(units, streams), fabric, placement, turns="xy")
    assert result.routes["a"].hops[0] == Hop(0, 0, WEST, 0, (EAST,), 0)
    assert result.routes["b"].hops[-1] == Hop(1, 1, NORTH, 1, (EAST,), 0)  # beside the other
    assert result.loads["vector"][Link(0, 0, WEST, into=True)] == 1
    assert result.loads["vector"][Link(1, 1, EAST)] == 1


def test_a_hop_from_die_to_die_takes_longer():
    fabric = checkerboard(4, 1)._replace(hop=2, die_columns=2, die_hop=5)
    units, placement = at(fabric, a=(0, 0), b=(3, 0))
    result = route(Netlist(units, (Stream("s", "a", (Sink("b"),)),)), fabric, placement)
    assert result.routes["s"].latencies == (2 + 2 + 5 + 2 + 2,)


def test_two_streams_share_a_link_or_go_apart():
    # Both PCUs of the north row send to units below each other at the east: dimension order takes the link
    # (1,0) -> (2,0) twice; negotiation sends one through the south row, as long, and nobody slows down.
    fabric = checkerboard(3, 2)
    units, placement = at(fabric, a=(0, 0), b=(1, 0), c=(2, 0), d=(2, 1))
    netlist = Netlist(units, (Stream("s", "a", (Sink("c"),)), Stream("t", "b", (Sink("d"),))))
    plain = route(netlist, fabric, placement, turns="xy")
    assert plain.slow_down == 2
    assert plain.overused["vector"] == (Link(1, 0, EAST),)
    assert {plain.routes["s"].hops[1].next_flow, plain.routes["t"].hops[0].next_flow} == {0, 1}
    negotiated = route(netlist, fabric, placement)
    assert (negotiated.slow_down, negotiated.overused["vector"], negotiated.hops) == (1, (), 4)
    assert negotiated.iterations == 1  # the second stream sees the link full
    # Slow streams may share: half a packet a tick each.
    half = Netlist(units, tuple(Stream(s.name, s.source, s.sinks, Fraction(1, 2)) for s in netlist.streams))
    assert route(half, fabric, placement, turns="xy").slow_down == 1


def test_an_input_of_two_streams_slows_both():
    fabric = checkerboard(3, 1)
    units, placement = at(fabric, a=(0, 0), m=(1, 0), b=(2, 0))
    streams = tuple(Stream(f"s{u}", u, (Sink("m"),), Fraction(3, 4)) for u in "ab")
    result = route(Netlist(units, streams), fabric, placement)
    assert result.slow_down == Fraction(3, 2)
    assert result.overused["vector"] == ()  # no link of the mesh is to blame, and none can help
    wide = route(Netlist(units, streams), fabric._replace(capacity=Fraction(2)), placement)
    assert wide.slow_down == Fraction(3, 2)


def test_networks_do_not_meet():
    fabric = checkerboard(3, 1)
    units, placement = at(fabric, a=(0, 0), b=(1, 0), c=(2, 0))
    streams = (
        Stream("v", "a", (Sink("c"),)),
        Stream("s", "b", (Sink("c"),), network="scalar"),
        Stream("k", "a", (Sink("c"),), network="control"),
    )
    result = route(Netlist(units, streams), fabric, placement)
    assert list(result.routes) == ["v", "s"]
    assert result.slow_down == 1
    assert result.routes["s"].flow == result.routes["s"].hops[-1].flow == 0


def test_more_flows_than_a_port_has():
    # A row leaves no way round: two streams over (1,0) -> (2,0).
    fabric = checkerboard(3, 1, flows=1)
    units, placement = at(fabric, a=(0, 0), b=(1, 0), c=(2, 0))
    streams = tuple(Stream(f"s{u}", u, (Sink("c"),), Fraction(1, 4)) for u in "ab")
    netlist = Netlist(units, streams)
    with pytest.raises(UserError, match=r"needs flow id 1 at switch 1,0; network\.flows is 1"):
        route(netlist, fabric, placement)
    assert route(netlist, fabric._replace(flows=2), placement).slow_down == 1


def test_unknown_turns():
    units, placement = at(checkerboard(2, 1), a=(0, 0))
    with pytest.raises(UserError, match=r"turns must be one of acyclic, .*, not 'left'"):
        route(Netlist(units, ()), checkerboard(2, 1), placement, turns="left")


def square():
    """Four streams, each to the next unit round a square of 2 x 2 and by it to the one behind."""
    fabric = checkerboard(2, 2)
    units, placement = at(fabric, a=(0, 0), b=(1, 0), c=(1, 1), d=(0, 1))
    streams = (
        Stream(f"s{u}", u, (Sink(v, int(v in "ac")), Sink(w, 2 * int(w in "ac"))), Fraction(1, 4))
        for u, v, w in ("abc", "bcd", "cda", "dab")
    )
    return Netlist(units, tuple(streams)), fabric, placement


def test_a_circle_of_waiting_links_is_found_and_broken():
    # With all turns each goes on from its first sink, and the four links wait for one another.
    netlist, fabric, placement = square()
    loose = route(netlist, fabric, placement, turns="any")
    assert (loose.slow_down, loose.hops) == (1, 8)
    circle = waiting_circle(loose)
    assert circle is not None
    assert circle[0] == circle[-1]
    assert set(circle) == {
        Link(0, 0, SOUTH, True),
        Link(1, 0, WEST, True),
        Link(1, 1, NORTH, True),
        Link(0, 1, EAST, True),
    }
    for turns in TURNS:
        if turns != "any":
            assert waiting_circle(route(netlist, fabric, placement, turns=turns)) is None
    # With one turn taken away one stream forks at its source: a link to one sink, and two to the other.
    assert route(netlist, fabric, placement).hops == 6 + 3


@pytest.mark.parametrize("turns", TURNS)
def test_allowed_turns_close_no_circle(turns):
    fabric = checkerboard(6, 5)
    links = [(x, y, p) for y in range(5) for x in range(6) for p in range(4) if fabric.neighbour(x, y, p)]
    graph = {
        (x, y, port): [
            (*fabric.neighbour(x, y, out), OPPOSITE[out])
            for out in range(4)
            if fabric.neighbour(x, y, out) and turn_allowed(turns, x, port, out)
        ]
        for x, y, port in links
    }
    if turns in ("any", "acyclic"):
        with pytest.raises(CycleError):
            TopologicalSorter(graph).prepare()
    else:
        TopologicalSorter(graph).prepare()


@st.composite
def cases(draw):
    """A fabric of up to 5 x 4 with gates, a placed netlist with multicasts on both networks."""
    fabric = checkerboard(draw(st.integers(1, 5)), draw(st.integers(2, 4)), gates=1)
    count = len(fabric.sites)
    sites = draw(st.lists(st.integers(0, count - 1), min_size=2, max_size=min(12, count), unique=True))
    units = tuple(Unit(f"u{s}", fabric.sites[s].kind) for s in sites)
    streams = []
    for network in ("vector", "scalar"):
        can = [u for u in units if (u.kind, network) in fabric.inputs]
        for source in draw(st.lists(st.sampled_from(units), max_size=8, unique=True)) if can else ():
            others = draw(st.lists(st.sampled_from(can), min_size=1, max_size=4, unique=True))
            sinks = tuple(
                Sink(u.name, draw(st.integers(0, fabric.inputs[u.kind, network] - 1)))
                for u in others
                if u != source
            )
            if sinks:
                rate = Fraction(1, draw(st.sampled_from([1, 2, 3, 4, 8])))
                streams.append(Stream(f"{network}{source.name}", source.name, sinks, rate, network))
    return fabric, Netlist(units, tuple(streams)), Placement({f"u{s}": s for s in sites}, 0, 0, 0)


@settings(max_examples=150)
@given(cases(), st.sampled_from(TURNS))
def test_packets_arrive_by_the_tables(case, turns):
    fabric, netlist, placement = case
    result = route(netlist, fabric, placement, turns=turns, iterations=12)
    walk(fabric, placement, result, turns)
    if turns != "any":
        assert waiting_circle(result) is None
    assert result == route(netlist, fabric, placement, turns=turns, iterations=12)


@given(cases(), st.randoms(use_true_random=False))
def test_streams_take_other_ways(case, random):
    fabric, netlist, placement = case
    first = route(netlist, fabric, placement, iterations=12)
    inner = [(r, h) for r in first.routes.values() for h in r.hops[1:]]
    if not inner:
        return
    some = random.sample(inner, min(len(inner), 2))
    avoid = {}
    for r, h in some:
        avoid.setdefault(r.stream.source, set()).add((r.stream.network, h.x, h.y, h.port))
    try:
        result = rerouted(netlist, fabric, placement, first, avoid)
    except UserError as error:
        assert "can't avoid" in str(error)
        return
    walk(fabric, placement, result, "acyclic")
    assert waiting_circle(result) is None
    for r, h in some:
        assert all((h.x, h.y, h.port) != (k.x, k.y, k.port) for k in result.routes[r.stream.name].hops)
    assert rerouted(netlist, fabric, placement, first, {}) == first


def walk(fabric, placement, result, turns):
    """Packets arrive at all sinks when they are said to, by tables without conflicts; loads count them on each link."""
    # The tables of all switches; no two streams share an entry.
    tables = {}
    for r in result.routes.values():
        for h in r.hops:
            key = (r.stream.network, h.x, h.y, h.port, h.flow)
            assert key not in tables
            assert h.flow < fabric.flows
            tables[key] = (h.outs, h.next_flow)
    counted = {"vector": {}, "scalar": {}}
    for r in result.routes.values():
        s = r.stream
        source = fabric.sites[placement.sites[s.source]]
        arrived = {}
        waiting = [(source.x, source.y, source.port, r.flow, fabric.hop)]
        links = [Link(source.x, source.y, source.port, into=True)]
        while waiting:
            x, y, port, flow, ticks = waiting.pop()
            outs, after = tables[s.network, x, y, port, flow]
            for out in outs:
                links.append(Link(x, y, out))
                there = fabric.neighbour(x, y, out) if out < LOCAL else None
                if there is None:
                    assert (x, y, out) not in arrived
                    arrived[x, y, out] = ticks + fabric.hop
                else:
                    waiting.append((*there, OPPOSITE[out], after, ticks + fabric.hop))
        expected = {}
        for sink, ticks in zip(s.sinks, r.latencies, strict=True):
            site = fabric.sites[placement.sites[sink.unit]]
            expected[site.x, site.y, site.port + sink.input * (site.port == LOCAL)] = ticks
        assert arrived == expected
        if turns in ("xy", "yx"):
            assert all(
                t == 2 + abs(x - source.x) + abs(y - source.y) for (x, y, _), t in arrived.items()
            )  # the shortest way
        for link in links:
            counted[s.network][link] = counted[s.network].get(link, 0) + s.rate
    assert counted == result.loads
    assert result.slow_down == max([1, *(v for loads in counted.values() for v in loads.values())])
    for network, loads in counted.items():
        inner = [k for k in loads if not k.into and k.port < LOCAL and fabric.neighbour(*k[:3])]
        assert set(result.overused[network]) == {k for k in inner if loads[k] > 1}


@settings(max_examples=40)
@given(cases(), st.integers(1, 6), st.sampled_from(["xy", "yx"]))
def test_wider_links_never_slow_dimension_order_down(case, sixths, turns):
    fabric, netlist, placement = case
    narrow = route(netlist, fabric._replace(capacity=Fraction(sixths, 6)), placement, turns=turns)
    wide = route(netlist, fabric._replace(capacity=Fraction(sixths + 1, 6)), placement, turns=turns)
    assert wide.slow_down <= narrow.slow_down
    assert wide.routes == narrow.routes


@settings(max_examples=40)
@given(cases(), st.sampled_from(["xy", "yx"]))
def test_a_mirrored_placement_has_mirrored_loads(case, turns):
    fabric, netlist, placement = case
    columns = fabric.columns
    flip = {WEST: EAST, EAST: WEST}
    mirrored = Fabric(
        columns,
        fabric.rows,
        tuple(s._replace(x=columns - 1 - s.x, port=flip.get(s.port, s.port)) for s in fabric.sites),
        fabric.inputs,
    )
    here = route(netlist, fabric, placement, turns=turns)
    there = route(netlist, mirrored, placement, turns=turns)
    assert there.slow_down == here.slow_down
    for network, loads in here.loads.items():
        assert there.loads[network] == {
            k._replace(x=columns - 1 - k.x, port=flip.get(k.port, k.port)): v for k, v in loads.items()
        }
    assert [r.latencies for r in there.routes.values()] == [r.latencies for r in here.routes.values()]


@settings(max_examples=60)
@given(cases())
def test_negotiation_is_no_worse_than_its_first_try(case):
    fabric, netlist, placement = case
    first = route(netlist, fabric, placement, turns="any", iterations=1)
    last = route(netlist, fabric, placement, turns="any")
    assert last.slow_down <= first.slow_down
    assert last.iterations <= 60


def test_a_drawing_shows_all_units_and_links():
    fabric = checkerboard(4, 4, gates=1)
    units = (*(Unit(f"c{i}", "pcu") for i in range(5)), Unit("a<b", "pmu"), Unit("gate", "agcu"))
    streams = (
        Stream("in", "gate", (Sink("a<b"),), Fraction(1, 4)),
        Stream("m", "a<b", tuple(Sink(f"c{i}") for i in range(4)), Fraction(3, 4)),
        *(Stream(f"r{i}", f"c{i}", (Sink("c4", i),), Fraction(3, 2)) for i in range(4)),
        Stream("s", "c0", (Sink("c4"),), Fraction(1, 8), "scalar"),
    )
    netlist = Netlist(units, streams)
    placement = place(netlist, fabric)
    routing = route(netlist, fabric, placement)
    root = ET.fromstring(draw(netlist, fabric, placement, routing, "A & B"))
    width, height = float(root.get("width")), float(root.get("height"))
    tag = "{http://www.w3.org/2000/svg}"
    texts = [t.text for t in root.iter(f"{tag}text")]
    assert {u.name for u in units} <= set(texts)
    assert any(t.startswith("A & B: 7 units, 7 streams") for t in texts)
    drawn = {}
    for line in root.iter(f"{tag}line"):
        assert all(
            0 <= float(line.get(k)) <= (width if k[0] == "x" else height) for k in ("x1", "x2", "y1", "y2")
        )
        title = line.find(f"{tag}title")
        if title is not None:
            network, percent, names = re.fullmatch(r"(\w+), ([\d.]+) %: (.*)", title.text).groups()
            rates = [s.rate for s in streams if s.name in names.split(", ")]
            assert float(percent) == pytest.approx(float(100 * sum(rates)), abs=0.1)
            colour = "#3a7d44" if sum(rates) <= 0.5 else "#d98e04" if sum(rates) <= 1 else "#c0262d"
            assert line.get("stroke") == colour
            drawn[network] = drawn.get(network, 0) + 1
    for network, loads in routing.loads.items():
        assert drawn[network] == sum(link.port < LOCAL for link in loads)
