"""Gates to memory are swapped until channels share the work."""

from fractions import Fraction

from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.mappers.rdu.fabric import checkerboard
from tilewright.mappers.rdu.gates import balanced, busiest
from tilewright.mappers.rdu.netlist import Netlist, Unit
from tilewright.mappers.rdu.place import Placement


def placed(fabric, at):
    """Gates at these sites, by number of the gate's site."""
    sites = fabric.sites_of("agcu")
    netlist = Netlist(tuple(Unit(name, "agcu") for name in at), ())
    return netlist, Placement({name: sites[i] for name, i in at.items()}, Fraction(0), Fraction(0), 0)


def numbers(fabric, placement):
    return {name: fabric.sites_of("agcu").index(site) for name, site in placement.sites.items()}


def test_two_busy_gates_get_a_channel_each():
    # Sites 0 and 2 are channel 0, sites 1 and 3 channel 1: a and b, 6 bytes each, share channel 0. Any swap with c or d
    # leaves 7 and 7; the nearest are a with c (0, 1), a row apart like b with c (2, 1) and b with d (2, 3).
    fabric = checkerboard(2, 4, 4)
    netlist, placement = placed(fabric, {"a": 0, "c": 1, "b": 2, "d": 3})
    traffic = {"a": (0, 6), "b": (0, 6), "c": (0, 1), "d": (0, 1)}
    assert busiest(fabric, placement, traffic, [2]) == [Fraction(12, 7)]
    found = balanced(netlist, fabric, placement, traffic, [2])
    assert busiest(fabric, found, traffic, [2]) == [1]
    assert numbers(fabric, found) == {"a": 1, "c": 0, "b": 2, "d": 3}
    # One that is pinned stays, another one goes.
    found = balanced(netlist, fabric, placement, traffic, [2], {"a", "c"})
    assert numbers(fabric, found) == {"a": 0, "c": 1, "b": 3, "d": 2}


def test_a_free_site_will_do():
    fabric = checkerboard(2, 4, 4)
    netlist, placement = placed(fabric, {"a": 0, "b": 2})
    found = balanced(netlist, fabric, placement, {"a": (0, 5), "b": (0, 5)}, [2])
    assert numbers(fabric, found) == {"a": 1, "b": 2}


@settings(deadline=None, max_examples=100)
@given(
    st.lists(st.tuples(st.integers(0, 1), st.integers(0, 10**7)), min_size=1, max_size=12),
    st.tuples(st.integers(1, 4), st.integers(1, 4)),
    st.randoms(use_true_random=False),
)
def test_no_memory_suffers(moved, channels, random):
    fabric = checkerboard(2, 6, 6)
    names = [f"gate{i}" for i in range(len(moved))]
    sites = random.sample(range(12), len(moved))
    netlist, placement = placed(fabric, dict(zip(names, sites, strict=True)))
    traffic = dict(zip(names, moved, strict=True))
    found = balanced(netlist, fabric, placement, traffic, channels)
    assert found.sites.keys() == placement.sites.keys()
    assert len(set(found.sites.values())) == len(names)

    def squares(p):
        out = Fraction(0)
        for memory, count in enumerate(channels):
            total = sum(b for m, b in moved if m == memory) or 1
            at = numbers(fabric, p)
            of = [
                sum(b for n, (m, b) in traffic.items() if m == memory and at[n] % count == c)
                for c in range(count)
            ]
            out += sum(Fraction(b, total) ** 2 for b in of)
        return out

    # Shares are rounded to 1 / 65536 of a memory's bytes, by each of at most 12 gates.
    assert squares(found) <= squares(placement) + Fraction(24 * 2, 65536)
