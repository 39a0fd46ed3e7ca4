"""The inner loops of placement and routing, compiled; integers only, so that every machine gives the same result.

All in one file: what is kept compiled on disk is then renewed by any edit.
"""

import numpy as np
from numba import njit

LOGARITHMS = np.array([round(-(1 << 16) * float(np.log((k + 0.5) / 4096))) for k in range(4096)], np.int64)
"""-ln(u) for 4096 equally likely u, in units of 2**-16: a change for the worse is taken if it is below T * -ln(u)."""


@njit(cache=True)
def _draw(state, n):
    """A number below n from a linear congruence of 48 bits."""
    s = (int(state[0]) * 25214903917 + 11) & 0xFFFFFFFFFFFF
    state[0] = s
    return ((s >> 17) * n) >> 31


@njit(cache=True)
def _measure(net, first, pins, at, xs, ys, box):
    x0, y0 = 1 << 30, 1 << 30
    x1, y1 = -1, -1
    for k in range(first[net], first[net + 1]):
        site = at[pins[k]]
        x0, x1 = min(x0, xs[site]), max(x1, xs[site])
        y0, y1 = min(y0, ys[site]), max(y1, ys[site])
    box[0], box[1], box[2], box[3] = x0, x1, y0, y1


@njit(cache=True)
def anneal(
    moves, temperature, reach, state, logarithms,
    at, holds, movable, kinds, xs, ys, first_site, sites, rank, grid,
    first_pin, pins, weights, first_net, nets, boxes,
):  # fmt: skip
    """Try `moves` moves at one temperature; returns the change of the cost, in units of the weights.

    Half of the moves look for a site around the unit, half around another unit of one of its streams. A site that
    is taken swaps its unit.

    at, holds: int64, site of each unit and unit of each site (-1: none). movable: units. kinds, xs, ys: of each
    site. first_site, sites, rank: sites by kind, and the place of each in that list. grid[y, x]: site at a switch.
    first_pin, pins: units of each stream; first_net, nets: streams of each unit. boxes: int64[streams, 4]:
    x0, x1, y0, y1.
    """
    total = 0
    rows, columns = grid.shape
    fresh = np.empty((len(weights), 4), np.int64)
    seen = np.full(len(weights), -1, np.int64)
    touched = np.empty(len(weights), np.int64)
    for move in range(moves):
        unit = movable[_draw(state, len(movable))]
        old = at[unit]
        kind = kinds[old]
        centre, radius = old, reach
        streams = first_net[unit + 1] - first_net[unit]
        if streams > 0 and _draw(state, 2) == 0:
            net = nets[first_net[unit] + _draw(state, streams)]
            other = pins[first_pin[net] + _draw(state, first_pin[net + 1] - first_pin[net])]
            if other != unit:
                centre, radius = at[other], 2
        if grid[ys[old], xs[old]] == old:  # a unit of the grid
            x = xs[centre] + _draw(state, 2 * radius + 1) - radius
            y = ys[centre] + _draw(state, 2 * radius + 1) - radius
            if x < 0 or x >= columns or y < 0 or y >= rows:
                continue
            new = grid[y, x]
        else:
            count = first_site[kind + 1] - first_site[kind]
            near = rank[old] + _draw(state, 2 * radius + 1) - radius
            if radius >= rows or near < 0 or near >= count:
                near = _draw(state, count)
            new = sites[first_site[kind] + near]
        if new == old or kinds[new] != kind:
            continue
        swapped = holds[new]
        if swapped == -2:  # pinned
            continue

        at[unit] = new
        if swapped >= 0:
            at[swapped] = old
        found = 0
        change = 0
        for who in (unit, swapped):
            if who < 0:
                continue
            for k in range(first_net[who], first_net[who + 1]):
                net = nets[k]
                if seen[net] == move:
                    continue
                seen[net] = move
                touched[found] = net
                found += 1
                box = fresh[net]
                _measure(net, first_pin, pins, at, xs, ys, box)
                was = boxes[net]
                change += weights[net] * (
                    (box[1] - box[0] + box[3] - box[2]) - (was[1] - was[0] + was[3] - was[2])
                )
        if change <= 0 or (change << 16) < temperature * logarithms[_draw(state, 4096)]:
            total += change
            holds[old] = swapped
            holds[new] = unit
            for i in range(found):
                boxes[touched[i]] = fresh[touched[i]]
        else:
            at[unit] = old
            if swapped >= 0:
                at[swapped] = new
    return total


@njit(cache=True)
def measure_all(at, xs, ys, first_pin, pins, weights, boxes):
    """Fill the boxes of all streams; returns the sum of half perimeter times weight."""
    total = 0
    for net in range(len(weights)):
        box = boxes[net]
        _measure(net, first_pin, pins, at, xs, ys, box)
        total += weights[net] * (box[1] - box[0] + box[3] - box[2])
    return total


# ---- routing ------------------------------------------------------------------------------------------

ONE = 64
"""Cost of a tick of latency on a free link, and one whole capacity of overuse."""


@njit(cache=True)
def _push(heap, size, key):
    i = size
    while i > 0:
        up = (i - 1) >> 1
        if heap[up] <= key:
            break
        heap[i] = heap[up]
        i = up
    heap[i] = key
    return size + 1


@njit(cache=True)
def _pop(heap, size):
    """Remove heap[0], which the caller has read."""
    size -= 1
    key = heap[size]
    i = 0
    while True:
        down = 2 * i + 1
        if down >= size:
            break
        if down + 1 < size and heap[down + 1] < heap[down]:
            down += 1
        if heap[down] >= key:
            break
        heap[i] = heap[down]
        i = down
    heap[i] = key
    return size


@njit(cache=True)
def between_circles(before, after, nodes):
    """Which edges lie on circles, or on ways from one circle to another: what is left when edges from nodes that none
    leads to, and to nodes that lead nowhere, are taken away until there are none."""
    left = np.ones(len(before), np.bool_)
    into, out = np.zeros(nodes, np.int64), np.zeros(nodes, np.int64)
    for k in range(len(before)):
        out[before[k]] += 1
        into[after[k]] += 1
    changed = True
    while changed:
        changed = False
        for k in range(len(before)):
            if left[k] and (into[before[k]] == 0 or out[after[k]] == 0):
                left[k] = False
                out[before[k]] -= 1
                into[after[k]] -= 1
                changed = True
    return left


@njit(cache=True)
def grow_tree(
    source, targets, rate, one, least, hop, columns, follow, base, load, count, history, capacity, flows, present,
    cost, stamp, clock, parent, heap, tree, tree_parent, ends,
):  # fmt: skip
    """Route one stream: from its tree so far to each target in turn, by A*; returns the number of states.

    A state is a packet at an input port of a switch: switch * 5 + port, port 4 being the injection port. It is also
    the link by which it came, so that load, count, history and base (ticks) are those of states. follow[state]: the
    states behind it, -1 where the edge or a rule of turns forbids. targets: switches, nearest first. tree and
    tree_parent get states and the index of their parents, ends[i] the index at which target i is reached.
    """
    tree[0], tree_parent[0] = source, -1
    states = 1
    for i in range(len(targets)):
        target = targets[i]
        tx, ty = target % columns, target // columns
        clock[0] += 1
        now = clock[0]
        size = 0
        for k in range(states):
            state = tree[k]
            switch = state // 5
            cost[state], stamp[state], parent[state] = 0, now, -1 - k
            estimate = one * hop * (abs(switch % columns - tx) + abs(switch // columns - ty))
            size = _push(heap, size, (estimate << 16) | state)
        reached = -1
        while size > 0:
            key = heap[0]
            size = _pop(heap, size)
            state = key & 0xFFFF
            switch = state // 5
            here = cost[state]
            if switch == target:
                reached = state
                break
            if (key >> 16) > here + one * hop * (abs(switch % columns - tx) + abs(switch // columns - ty)):
                continue  # a cheaper way was found since
            for port in range(4):
                after = follow[state, port]
                if after < 0:
                    continue
                excess = load[after] + rate - capacity
                over = least + one * excess // capacity if excess > 0 else 0
                if count[after] >= flows:  # no route at all, so it weighs as much as a stream of full rate
                    over += one + one * (count[after] + 1 - flows) // flows
                there = here + (base[after] * (one + history[after]) * (one + (present * over) // one)) // one
                if stamp[after] == now and cost[after] <= there:
                    continue
                cost[after], stamp[after], parent[after] = there, now, state
                switch = after // 5
                there += one * hop * (abs(switch % columns - tx) + abs(switch // columns - ty))
                if size == len(heap):
                    return -1
                size = _push(heap, size, (there << 16) | after)
        if reached < 0:
            return -1
        new = states
        state = reached
        while parent[state] >= 0:
            tree[states] = state
            states += 1
            state = parent[state]
        root = -1 - parent[state]
        # The path was found from its end: put it the other way round.
        a, b = new, states - 1
        while a < b:
            tree[a], tree[b] = tree[b], tree[a]
            a += 1
            b -= 1
        for k in range(new, states):
            tree_parent[k] = k - 1
        if new < states:
            tree_parent[new] = root
            ends[i] = states - 1
        else:
            ends[i] = root
    return states
