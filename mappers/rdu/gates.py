"""Which gate to memory goes where: a channel serves some sites only, and should not have more to do than others.

Site i belongs to channel i modulo the channels of the gate's memory (`rtl.rdu.channel`). Placement looks at wires alone;
what is left is to swap gates, a few rows apart, until all channels of a memory move about as many bytes. The paper's
compiler carries a static bandwidth model likewise (Prabhakar et al., MICRO 2024, VII).
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction

import numpy as np

from tilewright.mappers.rdu.fabric import Fabric
from tilewright.mappers.rdu.netlist import Netlist
from tilewright.mappers.rdu.place import Placement, wire

__all__ = ["balanced", "busiest"]

WHOLE = 1 << 16  # the bytes of one memory
LEAST = 1 << 14  # what a swap must gain, in squares of these


def balanced(
    netlist: Netlist,
    fabric: Fabric,
    placement: Placement,
    traffic: Mapping[str, tuple[int, int]],
    channels: Sequence[int],
    pinned: Collection[str] = (),
) -> Placement:
    """The placement with gates swapped, or moved to free sites, so that channels share the bytes.

    `traffic` is for each gate its memory and bytes, `channels` how many each memory has. The swap is taken that gains most
    for its distance, a gain being the fall of the sum of squares of the channels' bytes, while there is any. `pinned`
    units stay.
    """
    sites = fabric.sites_of("agcu")
    unit_at = {placement.sites[name]: name for name in traffic}
    names = [unit_at.get(site) for site in sites]
    totals = [sum(bytes_ for memory, bytes_ in traffic.values() if memory == i) for i in range(len(channels))]
    loads = np.zeros((len(channels), len(sites)), np.int64)
    for i, name in enumerate(names):
        if name is not None:
            memory, moved = traffic[name]
            loads[memory, i] = moved * WHOLE // max(1, totals[memory])
    x, y = (np.array([getattr(fabric.sites[s], axis) for s in sites]) for axis in "xy")
    far = 1 + np.abs(x[:, None] - x) + np.abs(y[:, None] - y)
    fixed = np.array([name in pinned for name in names], bool)
    order = np.arange(len(sites))  # whose gate, by its first place, is at a site
    for _ in range(len(sites) ** 2):
        gain = np.zeros_like(far)
        for memory, count in enumerate(channels):
            if count:
                own = loads[memory, order]
                channel = np.arange(len(sites)) % count
                of_channel = np.bincount(channel, own, count).astype(np.int64)[channel]
                more = own - own[:, None]  # by a swap, for the channel of the row
                apart = channel[:, None] != channel
                gain -= np.where(apart, 2 * more * (of_channel[:, None] - of_channel + more), 0)
        gain[fixed[order], :] = gain[:, fixed[order]] = 0
        best = int(np.argmax(gain // far))
        a, b = divmod(best, len(sites))
        if gain[a, b] < LEAST:
            break
        order[[a, b]] = order[[b, a]]
    moved_to = {names[k]: sites[i] for i, k in enumerate(order.tolist()) if names[k] is not None}
    new = {name: moved_to.get(name, site) for name, site in placement.sites.items()}
    return replace(placement, sites=new, cost=wire(netlist, fabric, new))


def busiest(
    fabric: Fabric,
    placement: Placement,
    traffic: Mapping[str, tuple[int, int]],
    channels: Sequence[int],
) -> list[Fraction]:
    """For each memory, bytes of its busiest channel to those of all on average; 0 for a memory that is not used."""
    sites = {site: i for i, site in enumerate(fabric.sites_of("agcu"))}
    out = []
    for memory, count in enumerate(channels):
        of_channel = [0] * max(1, count)
        for name, (at, moved) in traffic.items():
            if at == memory:
                of_channel[sites[placement.sites[name]] % count] += moved
        out.append(Fraction(max(of_channel) * count, max(1, sum(of_channel))))
    return out
