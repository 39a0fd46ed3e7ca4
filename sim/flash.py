"""NAND flash in time: page operations over channels, chips, dies and planes, on exact ticks.

`simulate` takes `FlashParams` and operations (see `tilewright.arch.flash`) and says when each was admitted,
issued and done, and what every channel and die did in every tick. What happens in a tick t, in this order:

1. *Bus ends*, by channel. A data-out that ends completes its read. The last one of a unit's register empties it.
2. *Array ends*, by unit. A program or erase completes. A read has its pages in the page register: they join
   the channel's data-out queue in the order of the command, and the unit holds them until the last one is out.
   With cached reads the pages move to the cache register at once, or when it is empty, and join the queue
   then; the unit is free after the move, whose time is part of the array time. Chips that hold data take no
   program and no erase.
3. *Admission*, in the order of the trace: every operation that has arrived, as `queue_depth` allows.
4. *Resumption*: a unit with a suspended operation that is idle, and for which no ready read waits within the
   window, goes on with what was left of it.
5. *Dispatch*: a channel whose bus is free takes the first stage of the policy that has work. Data-out: the head
   of the queue, for ceil(bytes / rate) ticks. Commands: units are asked round robin from the one after the last
   that was served, each for the kinds of the stage in order. A command holds the bus for its time by planes, a
   program's data-in included; the array starts when the bus ends and takes the longest of the pages. A command
   of zero ticks leaves the bus free, so that the channel chooses again.

A *unit* is a die, or a whole chip where the policy says that a busy die blocks its siblings. It takes a read
when it is idle, a program or an erase when it is idle, holds no data and has suspended nothing.

*Choice*: per unit and kind the operations wait in order of the trace. The first ready one of the first `window`
leads. With multi-plane commands, ready ones behind it in the window join: same die, another plane and, with
`same_page`, the same page number; one for each plane.

*Ready*: a program waits for the last program or erase before it in its block; a read for the program of its
page since the last erase, or for that erase; an erase for everything before it in its block. Waiting ends with
completion. So what a page holds never depends on the schedule.

*Suspension*: a read may also go to a unit whose array works on a program or an erase, if that kind may be
suspended, nothing is suspended there yet, it was suspended less than `suspend_limit` times, and it has more
ticks to go than suspending takes. The read's command holds the bus `suspend_command` ticks longer, the array
takes `suspend` ticks longer; the operation stops when that command starts.

*Legality* is checked before time begins, in order of the trace. A block's pages are programmed in order, once
between erases. What a block holds at the start is unknown: its first program may be of any page above those
read so far, which were full, and the pages from there on are erased.

Ticks: a channel is busy while its bus moves commands or data; a die while its array works for it. A tick that
is not busy goes to the first that holds, for a channel: *array* (an admitted operation of it is not complete),
*host* (one is still to be admitted), *idle*; for a die: *transfer* (the bus moves its command, or its registers
hold pages that are not out), *suspended* (an operation of it is), *sibling* (it has waiting work and its chip
is busy with another die), *bus* (it has waiting work), *host*, *idle*.
"""

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from numba import njit

from tilewright.arch.errors import UserError
from tilewright.arch.flash import DATA_OUT, ERASE, KINDS, PROGRAM, READ, Array, FlashParams
from tilewright.arch.timeline import Timeline, fold_spans
from tilewright.sim.cache import CALLED, ENTRY, INNER

CAUSES = ("transfer", "suspended", "sibling", "bus", "array", "host", "idle")
WAITING = ("transfer", "bus", "array", "host", "idle")
COUNTERS = ("operations", "commands", "multi_plane_commands", "bytes", "suspensions")

# The kernels use literals of this file, since a cached kernel would keep the old value of a name of another.
_READ, _PROGRAM, _ERASE, _DATA_OUT = range(4)
assert (READ, PROGRAM, ERASE, DATA_OUT) == (_READ, _PROGRAM, _ERASE, _DATA_OUT)

# Columns of the state's tables: few wide arrays, since each array that a kernel is given costs compile time, and
# an operation, a unit or a die should be one cache line.
_KIND, _DIE, _WORK, _MOVE, _BLOCK, _NEED, _ISSUED, _DONE = range(8)  # ops: WORK of the array, MOVE of the bus
_ARRIVAL, _ADMITTED, _LIST, _PLACE = range(4)  # trace
_HEAD, _TAIL, _CHANNEL = range(3)  # lists
_STATE, _DOING, _SIZE, _END, _OUT, _TIMES = range(6)  # units, and of what is suspended there:
_HELD_DOING, _HELD_SIZE, _HELD_LEFT, _HELD_TIMES = range(6, 10)
_BUS, _FIRST, _WAITING, _TURN, _OPEN, _LEFT, _TOUCHED, _HELD = range(8)  # channels
_DOES, _MOVING, _ASLEEP, _PENDING, _TO_COME, _UNIT = range(6)  # dies
_CHARGE, _SINCE = range(10, 12)  # ledger, after the ticks by charge
_HEAP_SIZE, _N_ADMITTED, _N_DONE, _N_TOUCHED, _EVENTS = range(5)  # scalars

# States of a unit: HOLD is a read whose pages cannot leave the page register yet.
_IDLE, _BUSY, _HOLD = range(3)
# What a tick of a die or channel is charged to: busy by kind, then CAUSES.
_CAUSE = 3
_C_TRANSFER, _C_SUSPENDED, _C_SIBLING, _C_BUS, _C_ARRAY, _C_HOST, _C_IDLE = range(3, 10)
_NONE = -1
_PLANE_BITS, _PAGE_BITS = 6, 20  # of a key

_OK, _PROGRAMMED, _ORDER, _ERASED, _WORN = range(5)


class _State(NamedTuple):
    """All that changes. c counts channels, u units, d dies, n operations, l = 3 * unit + kind the waiting lists.

    Operations are numbered by list, and within a list in order of the trace, so that a unit walks through its
    own stretch of memory. A list is a stretch of `line`, of which HEAD to TAIL wait; those before one that is
    taken from the middle move up.
    """

    trace: Array  # [n, 4] in its own order; PLACE: the operation's number
    ops: Array  # [n, 8]
    line: Array  # [n] operations
    key: Array  # [n] die of the unit, page and plane of each, packed: what a multi-plane command compares
    lists: Array  # [l, 3] places in `line`
    blocks: Array  # [b, 2] completed programs and erases; completed operations
    units: Array  # [u, 10]
    groups: Array  # [2, u, planes] operations of the array's command; of the suspended one
    channels: Array  # [c, 8]; BUS: an operation whose data moves, -2 - unit for a command, -1 for nothing
    queue: Array  # [c, slots] pages that wait for the bus
    dies: Array  # [d, 6]; DOES: kind that the array works on, -1 for none
    ledger: Array  # [c + d, 12]
    counters: Array  # [3, 5]
    heap: Array  # events: tick * (c + u) + channel, or + c + unit
    touched: Array  # [c] channels with something new in this tick
    scalars: Array  # [5]


# ---- events -------------------------------------------------------------------------------------------


@njit(**INNER)
def _push(s, key):
    heap = s.heap
    i = s.scalars[_HEAP_SIZE]
    s.scalars[_HEAP_SIZE] = i + 1
    while i > 0:
        above = (i - 1) >> 1
        if heap[above] <= key:
            break
        heap[i] = heap[above]
        i = above
    heap[i] = key


@njit(**INNER)
def _pop(s):
    heap = s.heap
    top = heap[0]
    n = s.scalars[_HEAP_SIZE] - 1
    s.scalars[_HEAP_SIZE] = n
    key = heap[n]
    i = 0
    while True:
        below = 2 * i + 1
        if below >= n:
            break
        if below + 1 < n and heap[below + 1] < heap[below]:
            below += 1
        if heap[below] >= key:
            break
        heap[i] = heap[below]
        i = below
    heap[i] = key
    return top


# ---- ticks by cause -----------------------------------------------------------------------------------


@njit(**INNER)
def _account(s, row, charge, now):
    s.ledger[row, s.ledger[row, _CHARGE]] += now - s.ledger[row, _SINCE]
    s.ledger[row, _SINCE] = now
    s.ledger[row, _CHARGE] = charge


@njit(**INNER)
def _account_die(s, die, unit, now):
    charge = s.dies[die, _DOES]
    if charge < 0:
        if s.dies[die, _MOVING] > 0:
            charge = _C_TRANSFER
        elif s.dies[die, _ASLEEP] > 0:
            charge = _C_SUSPENDED
        elif s.dies[die, _PENDING] > 0:
            # Were the unit engaged with this die, the cases above would hold.
            charge = _C_SIBLING if s.units[unit, _STATE] != _IDLE else _C_BUS
        else:
            charge = _C_HOST if s.dies[die, _TO_COME] > 0 else _C_IDLE
    _account(s, s.channels.shape[0] + die, charge, now)


@njit(**INNER)
def _account_unit(p, s, unit, now):
    for die in range(unit * p.unit_dies, (unit + 1) * p.unit_dies):
        _account_die(s, die, unit, now)


@njit(**INNER)
def _account_channel(s, channel, now):
    charge = _C_IDLE
    move = s.channels[channel, _BUS]
    if move >= 0:
        charge = _READ
    elif move < _NONE:
        charge = s.units[-2 - move, _DOING]
    elif s.channels[channel, _OPEN] > 0:
        charge = _C_ARRAY
    elif s.channels[channel, _LEFT] > 0:
        charge = _C_HOST
    _account(s, channel, charge, now)


@njit(**INNER)
def _touch(s, channel):
    if s.channels[channel, _TOUCHED] == 0:
        s.channels[channel, _TOUCHED] = 1
        s.touched[s.scalars[_N_TOUCHED]] = channel
        s.scalars[_N_TOUCHED] += 1


# ---- what completes -----------------------------------------------------------------------------------


@njit(**INNER)
def _complete(s, op, channel, now):
    s.ops[op, _DONE] = now
    s.channels[channel, _OPEN] -= 1
    s.scalars[_N_DONE] += 1
    block = s.ops[op, _BLOCK]
    if block >= 0:
        s.blocks[block, 1] += 1
        if s.ops[op, _KIND] != _READ:
            s.blocks[block, 0] += 1


@njit(**INNER)
def _queue_pages(s, unit, channel):
    """The pages of the unit's command join the data-out queue."""
    slots = s.queue.shape[1]
    size = s.units[unit, _SIZE]
    slot = s.channels[channel, _FIRST] + s.channels[channel, _WAITING]
    for i in range(size):
        if slot >= slots:
            slot -= slots
        s.queue[channel, slot] = s.groups[0, unit, i]
        slot += 1
    s.channels[channel, _WAITING] += size
    s.units[unit, _OUT] = size


@njit(**INNER)
def _bus_end(p, s, channel, now):
    move = s.channels[channel, _BUS]
    s.channels[channel, _BUS] = _NONE
    if move < 0:
        unit = -2 - move
        die = s.ops[s.groups[0, unit, 0], _DIE]
        s.dies[die, _MOVING] -= 1
        s.dies[die, _DOES] = s.units[unit, _DOING]
    else:
        unit = s.dies[s.ops[move, _DIE], _UNIT]
        s.dies[s.ops[move, _DIE], _MOVING] -= 1
        _complete(s, move, channel, now)
        s.units[unit, _OUT] -= 1
        if s.units[unit, _OUT] == 0 and s.units[unit, _STATE] == _HOLD:
            if p.cache_read:
                _queue_pages(s, unit, channel)
            s.units[unit, _STATE] = _IDLE
    _account_unit(p, s, unit, now)


@njit(**INNER)
def _array_end(p, s, unit, channel, now):
    size = s.units[unit, _SIZE]
    die = s.ops[s.groups[0, unit, 0], _DIE]
    s.dies[die, _DOES] = _NONE
    s.units[unit, _STATE] = _IDLE
    if s.units[unit, _DOING] == _READ:
        s.dies[die, _MOVING] += size
        free = s.units[unit, _OUT] == 0
        if free:
            _queue_pages(s, unit, channel)
        if not (free and p.cache_read):
            s.units[unit, _STATE] = _HOLD
    else:
        for i in range(size):
            _complete(s, s.groups[0, unit, i], channel, now)
    _account_unit(p, s, unit, now)


@njit(**INNER)
def _admit(p, s, now):
    n = s.trace.shape[0]
    i = s.scalars[_N_ADMITTED]
    while i < n and s.trace[i, _ARRIVAL] <= now:
        if p.queue_depth > 0 and i - s.scalars[_N_DONE] >= p.queue_depth:
            break
        at = s.trace[i, _LIST]
        die, channel = s.ops[s.trace[i, _PLACE], _DIE], s.lists[at, _CHANNEL]
        s.trace[i, _ADMITTED] = now
        s.lists[at, _TAIL] += 1
        s.dies[die, _PENDING] += 1
        s.dies[die, _TO_COME] -= 1
        _account_die(s, die, s.dies[die, _UNIT], now)
        s.channels[channel, _OPEN] += 1
        s.channels[channel, _LEFT] -= 1
        _touch(s, channel)
        i += 1
    s.scalars[_N_ADMITTED] = i


# ---- what starts --------------------------------------------------------------------------------------


@njit(**INNER)
def _ready(s, op):
    need = s.ops[op, _NEED]
    if need == 0:
        return True
    return s.blocks[s.ops[op, _BLOCK], 1 if s.ops[op, _KIND] == _ERASE else 0] >= need


@njit(**INNER)
def _first_ready(p, s, unit, kind):
    """The place in `line` of the first ready operation within the window, -1 if there is none."""
    head = s.lists[3 * unit + kind, _HEAD]
    end = min(s.lists[3 * unit + kind, _TAIL], head + p.window)
    for place in range(head, end):
        if _ready(s, s.line[place]):
            return place
    return -1


@njit(**INNER)
def _take(s, unit, kind, place, n):
    """Move the operation at `place` out of its list, to be number n of the unit's command."""
    op = s.line[place]
    s.groups[0, unit, n] = op
    head = s.lists[3 * unit + kind, _HEAD]
    for k in range(place, head, -1):
        s.line[k] = s.line[k - 1]
        s.key[k] = s.key[k - 1]
    s.lists[3 * unit + kind, _HEAD] = head + 1


@njit(**INNER)
def _choose(p, s, unit, kind, leader):
    """Take the leader at that place of its list, and all that join it; returns how many."""
    first = s.key[leader]
    end = min(s.lists[3 * unit + kind, _TAIL], s.lists[3 * unit + kind, _HEAD] + p.window)
    _take(s, unit, kind, leader, 0)
    n = 1
    if p.multi_plane and p.planes > 1:
        # Places up to the last one taken shift by one; those behind it stay.
        same = _PLANE_BITS if p.same_page else _PLANE_BITS + _PAGE_BITS
        planes = 1 << (first & 63)
        for place in range(leader + 1, end):
            key = s.key[place]
            if (key ^ first) >> same == 0 and (planes >> (key & 63)) & 1 == 0 and _ready(s, s.line[place]):
                planes |= 1 << (key & 63)
                _take(s, unit, kind, place, n)
                n += 1
                if n == p.planes:
                    break
    return n


@njit(**INNER)
def _may_suspend(p, s, unit, now):
    # Its command has left the bus, which is free.
    work = s.units[unit, _DOING]
    return (
        s.units[unit, _STATE] == _BUSY
        and p.suspend[work] >= 0
        and s.units[unit, _HELD_SIZE] == 0
        and s.units[unit, _TIMES] < p.suspend_limit
        and s.units[unit, _END] - now > p.suspend[work]
    )


@njit(**INNER)
def _suspend(s, channel, unit, now):
    size, work = s.units[unit, _SIZE], s.units[unit, _DOING]
    for i in range(size):
        s.groups[1, unit, i] = s.groups[0, unit, i]
    s.units[unit, _HELD_SIZE], s.units[unit, _HELD_DOING] = size, work
    s.units[unit, _HELD_LEFT] = s.units[unit, _END] - now
    s.units[unit, _HELD_TIMES] = s.units[unit, _TIMES] + 1
    die = s.ops[s.groups[0, unit, 0], _DIE]
    s.dies[die, _DOES] = _NONE
    s.dies[die, _ASLEEP] += 1
    s.channels[channel, _HELD] += 1
    s.counters[work, 4] += 1


@njit(**CALLED)
def _resume(p, s, channel, unit, now):
    size, work = s.units[unit, _HELD_SIZE], s.units[unit, _HELD_DOING]
    for i in range(size):
        s.groups[0, unit, i] = s.groups[1, unit, i]
    s.units[unit, _HELD_SIZE] = 0
    s.units[unit, _STATE], s.units[unit, _SIZE], s.units[unit, _DOING] = _BUSY, size, work
    s.units[unit, _TIMES] = s.units[unit, _HELD_TIMES]
    s.units[unit, _END] = now + s.units[unit, _HELD_LEFT]
    die = s.ops[s.groups[0, unit, 0], _DIE]
    s.dies[die, _DOES] = work
    s.dies[die, _ASLEEP] -= 1
    s.channels[channel, _HELD] -= 1
    _push(s, s.units[unit, _END] * (p.channels + s.units.shape[0]) + p.channels + unit)
    _account_unit(p, s, unit, now)


@njit(**INNER)
def _issue(p, s, channel, unit, kind, now):
    """Send a command of `kind` to the unit if it takes one; returns whether it did."""
    if s.lists[3 * unit + kind, _HEAD] == s.lists[3 * unit + kind, _TAIL]:
        return False
    wakes = s.units[unit, _STATE] != _IDLE
    if wakes:
        if kind != _READ or not _may_suspend(p, s, unit, now):
            return False
    elif kind != _READ and (s.units[unit, _OUT] > 0 or s.units[unit, _HELD_SIZE] > 0):
        return False
    leader = _first_ready(p, s, unit, kind)
    if leader < 0:
        return False
    extra = move = 0
    if wakes:
        extra, move = p.suspend[s.units[unit, _DOING]], p.suspend_command
        _suspend(s, channel, unit, now)
    n = _choose(p, s, unit, kind, leader)
    move += p.command[kind, n]
    work = 0
    for i in range(n):
        op = s.groups[0, unit, i]
        s.ops[op, _ISSUED] = now
        work = max(work, s.ops[op, _WORK])
        if kind == _PROGRAM:
            move += s.ops[op, _MOVE]
    die = s.ops[s.groups[0, unit, 0], _DIE]
    end = now + move + extra + work
    s.units[unit, _STATE], s.units[unit, _DOING], s.units[unit, _SIZE] = _BUSY, kind, n
    s.units[unit, _END], s.units[unit, _TIMES] = end, 0
    s.dies[die, _PENDING] -= n
    s.counters[kind, 0] += n
    s.counters[kind, 1] += 1
    s.counters[kind, 2] += n > 1
    ids = p.channels + s.units.shape[0]
    _push(s, end * ids + p.channels + unit)
    if move > 0:
        s.channels[channel, _BUS] = -2 - unit
        s.dies[die, _MOVING] += 1
        _push(s, (now + move) * ids + channel)
    else:
        s.dies[die, _DOES] = kind
    _account_unit(p, s, unit, now)
    return True


@njit(**INNER)
def _ask_units(p, s, channel, stage, now):
    """The first command of a stage that a unit takes; returns whether there is one."""
    index = s.channels[channel, _TURN]
    for _ in range(p.units):
        unit = channel * p.units + index
        index += 1
        if index == p.units:
            index = 0
        # Most units are at work that nothing suspends: they need not be asked.
        if s.units[unit, _STATE] != _IDLE and p.suspend[s.units[unit, _DOING]] < 0:
            continue
        for i in range(3):
            kind = p.stages[stage, i]
            if kind >= 0 and _issue(p, s, channel, unit, kind, now):
                s.channels[channel, _TURN] = index
                return True
    return False


@njit(**INNER)
def _move_data(p, s, channel, now):
    """Start the data-out at the head of the queue; returns whether there is one."""
    if s.channels[channel, _WAITING] == 0:
        return False
    slot = s.channels[channel, _FIRST]
    op = s.queue[channel, slot]
    s.channels[channel, _FIRST] = slot + 1 if slot + 1 < s.queue.shape[1] else 0
    s.channels[channel, _WAITING] -= 1
    s.channels[channel, _BUS] = op
    _push(s, (now + s.ops[op, _MOVE]) * (p.channels + s.units.shape[0]) + channel)
    return True


@njit(**INNER)
def _dispatch(p, s, channel, now):
    if s.channels[channel, _HELD] > 0:
        for unit in range(channel * p.units, (channel + 1) * p.units):
            stopped = s.units[unit, _HELD_SIZE] > 0 and s.units[unit, _STATE] == _IDLE
            if stopped and _first_ready(p, s, unit, _READ) < 0:
                _resume(p, s, channel, unit, now)
    found = True
    while found and s.channels[channel, _BUS] == _NONE:
        found = False
        for stage in range(p.stages.shape[0]):
            if p.stages[stage, 0] == _DATA_OUT:
                found = _move_data(p, s, channel, now)
            else:
                found = _ask_units(p, s, channel, stage, now)
            if found:
                break
    _account_channel(s, channel, now)


@njit(**ENTRY)
def _run(p, s):
    """All operations to their end; returns the tick after the last."""
    n = s.trace.shape[0]
    ids = p.channels + s.units.shape[0]
    now = 0
    while s.scalars[_N_DONE] < n:
        now = -1
        if s.scalars[_HEAP_SIZE] > 0:
            now = s.heap[0] // ids
        i = s.scalars[_N_ADMITTED]
        if i < n and (p.queue_depth == 0 or i - s.scalars[_N_DONE] < p.queue_depth):
            now = s.trace[i, _ARRIVAL] if now < 0 else min(now, s.trace[i, _ARRIVAL])
        if now < 0:
            raise AssertionError("operations wait for each other")
        while s.scalars[_HEAP_SIZE] > 0 and s.heap[0] < (now + 1) * ids:
            event = _pop(s) - now * ids
            s.scalars[_EVENTS] += 1
            if event < p.channels:
                _bus_end(p, s, event, now)
                _touch(s, event)
            else:
                unit = event - p.channels
                # The end of work that has been suspended since is not an end.
                if s.units[unit, _STATE] == _BUSY and s.units[unit, _END] == now:
                    channel = unit // p.units
                    _array_end(p, s, unit, channel, now)
                    _touch(s, channel)
        _admit(p, s, now)
        for k in range(s.scalars[_N_TOUCHED]):
            s.channels[s.touched[k], _TOUCHED] = 0
            _dispatch(p, s, s.touched[k], now)
        s.scalars[_N_TOUCHED] = 0
    for row in range(s.ledger.shape[0]):
        _account(s, row, _C_IDLE, now)
    return now


@njit(**ENTRY)
def _fill(p, s, ops, block, need, die_operations, channel_bytes):
    """Lay out the operations `ops` [n, 9] (fields of OPERATION) by list: a counting sort.

    `block` and `need` [n] as `_resolve` gives them, [0] where nothing is programmed or erased.
    """
    for i in range(ops.shape[0]):
        die = (ops[i, 2] * p.chips + ops[i, 3]) * p.dies + ops[i, 4]
        s.trace[i, _LIST] = 3 * (die // p.unit_dies) + ops[i, 1]
        s.lists[s.trace[i, _LIST], _TAIL] += 1
    place = 0
    for at in range(s.lists.shape[0]):
        size = s.lists[at, _TAIL]
        s.lists[at, _HEAD] = s.lists[at, _TAIL] = place
        s.lists[at, _CHANNEL] = at // (3 * p.units)
        place += size
    for i in range(ops.shape[0]):
        at = s.trace[i, _LIST]
        place = s.lists[at, _TAIL]
        s.lists[at, _TAIL] = place + 1
        s.trace[i, _ARRIVAL], s.trace[i, _PLACE] = ops[i, 0], place
        kind, page, moved = ops[i, 1], ops[i, 7], ops[i, 8]
        die = (ops[i, 2] * p.chips + ops[i, 3]) * p.dies + ops[i, 4]
        s.ops[place, _KIND], s.ops[place, _DIE], s.ops[place, _BLOCK] = kind, die, -1
        if block.shape[0] > 0:
            s.ops[place, _BLOCK], s.ops[place, _NEED] = block[i], need[i]
        work = p.erase
        if kind != _ERASE:
            work = p.read[page] if kind == _READ else p.program[page]
        s.ops[place, _WORK] = work
        s.ops[place, _MOVE] = (moved * p.transfer_num + p.transfer_den - 1) // p.transfer_den
        s.line[place] = place
        s.key[place] = (((ops[i, 4] % p.unit_dies) << _PAGE_BITS) + page << _PLANE_BITS) + ops[i, 5]
        s.dies[die, _TO_COME] += 1
        s.dies[die, _UNIT] = die // p.unit_dies
        s.channels[ops[i, 2], _LEFT] += 1
        die_operations[die, kind] += 1
        if kind != _ERASE:
            channel_bytes[ops[i, 2], kind] += moved
            s.counters[kind, 3] += moved
    for at in range(s.lists.shape[0]):
        s.lists[at, _TAIL] = s.lists[at, _HEAD]
    for row in range(s.ledger.shape[0]):
        c = row - p.channels
        to_come = s.channels[row, _LEFT] if c < 0 else s.dies[c, _TO_COME]
        s.ledger[row, _CHARGE] = _C_HOST if to_come > 0 else _C_IDLE


# ---- order and legality -------------------------------------------------------------------------------


@njit(**ENTRY)
def _resolve(kind, block, page, endurance, blocks, need, erases):
    """What each operation waits for in its block, into need [n]; returns the first illegal one and why.

    `blocks` [b, 6] is scratch of zeros; `erases` [b] counts. `need` counts completed programs and erases of the
    block, for an erase all its completed operations.
    """
    # Columns: next page; whether that is known; page and rank of the first program since the erase; programs
    # and erases so far; operations so far.
    for i in range(kind.shape[0]):
        b, at = block[i], page[i]
        known = blocks[b, 1] > 0
        if kind[i] == _READ:
            if known:
                if at >= blocks[b, 0]:
                    return i, _ERASED
                if at >= blocks[b, 2]:
                    need[i] = blocks[b, 3] + at - blocks[b, 2] + 1
            else:
                blocks[b, 0] = max(blocks[b, 0], at + 1)
        elif kind[i] == _PROGRAM:
            if at < blocks[b, 0]:
                return i, _PROGRAMMED
            if known and at > blocks[b, 0]:
                return i, _ORDER
            if not known:
                blocks[b, 1], blocks[b, 2], blocks[b, 3] = 1, at, blocks[b, 4]
            blocks[b, 0] = at + 1
            need[i] = blocks[b, 4]
            blocks[b, 4] += 1
        else:
            need[i] = blocks[b, 5]
            blocks[b, 4] += 1
            blocks[b, 0], blocks[b, 1], blocks[b, 2], blocks[b, 3] = 0, 1, 0, blocks[b, 4]
            erases[b] += 1
            if endurance > 0 and erases[b] > endurance:
                return i, _WORN
        blocks[b, 5] += 1
    return -1, _OK


def _order(p: FlashParams, ops: np.ndarray) -> tuple[Array, Array, Array]:
    """Compact block numbers [n], what each operation needs [n], erases by block number. Raises UserError."""
    die = (ops["channel"] * p.chips + ops["chip"]) * p.dies + ops["die"]
    block = (die * p.planes + ops["plane"]) * p.blocks + ops["block"]
    need = np.zeros(len(ops), np.int64)
    used = np.zeros(p.channels * p.chips * p.dies * p.planes * p.blocks, np.bool_)
    used[block] = True
    numbers = np.flatnonzero(used)
    number = np.empty(len(used), np.int64)
    number[numbers] = np.arange(len(numbers))
    compact = number[block]
    erases = np.zeros(len(numbers), np.int64)
    kind, page = np.ascontiguousarray(ops["kind"]), np.ascontiguousarray(ops["page"])
    scratch = np.zeros((len(numbers), 6), np.int64)
    wrong, why = _resolve(kind, compact, page, p.endurance, scratch, need, erases)
    if wrong >= 0:
        expected, name = int(scratch[compact[wrong], 0]), _block_name(ops[wrong])
        text = {
            _PROGRAMMED: f"page {ops['page'][wrong]} of {name} is programmed already: erase the block first",
            _ORDER: f"pages of {name} must be programmed in order: {expected} is next, not {ops['page'][wrong]}",
            _ERASED: f"page {ops['page'][wrong]} of {name} is erased: {expected} of its pages are programmed",
            _WORN: f"{name} is erased more than {p.endurance} times, which is its endurance",
        }[why]
        raise IllegalOperation(int(wrong), text)
    return compact, need, erases


def _block_name(op: np.void) -> str:
    return " ".join(f"{name} {op[name]}" for name in ("channel", "chip", "die", "plane", "block"))


class IllegalOperation(UserError):
    """An operation that its block does not allow: `index` says which."""

    def __init__(self, index: int, reason: str) -> None:
        super().__init__(f"operation {index}: {reason}")
        self.index, self.reason = index, reason


# ---- for people ---------------------------------------------------------------------------------------


@dataclass(frozen=True, kw_only=True)
class FlashRun:
    """Operations in time, in ticks.

    `timeline`: tags are the kinds; units are the channels, then the dies as `die channel.chip.die`.
    """

    timeline: Timeline
    admitted: Array  # [n] arrival, or when the queue had room
    issued: Array  # [n] first tick of the command
    done: Array  # [n] tick after the last of the data-out, the program or the erase
    kind: Array  # [n]
    die_operations: Array  # [dies, 3] by kind
    channel_bytes: Array  # [channels, 2] read, programmed
    most_erases: int  # of a block

    def latency(self, kind: int) -> Array:
        """Sorted ticks from admission to completion of the operations of a kind."""
        mine = self.kind == kind
        return np.sort(self.done[mine] - self.admitted[mine])


def percentile(values: Array, part: int, whole: int = 100) -> int:
    """The smallest of sorted `values` that at least part / whole of them do not exceed.

    >>> percentile(np.arange(1, 11), 50), percentile(np.arange(1, 11), 99), percentile(np.array([7]), 1)
    (5, 10, 7)
    """
    return int(values[max(0, -(-len(values) * part // whole) - 1)])


def die_names(p: FlashParams) -> list[str]:
    return [f"die {c}.{w}.{d}" for c in range(p.channels) for w in range(p.chips) for d in range(p.dies)]


def simulate(p: FlashParams, ops: np.ndarray) -> FlashRun:
    """Operations OPERATION[n], n >= 1, within the device (`check_operations`), from an idle device at tick 0.

    Raises IllegalOperation for the first that its block does not allow.
    """
    if int(ops["arrival"][-1]) + len(ops) * _longest(p) >= (1 << 62) // (p.channels * (1 + p.units)):
        raise UserError("the trace is too long to be counted in ticks: choose a longer tick_ns")
    rows = np.ascontiguousarray(ops).view(np.int64).reshape(len(ops), -1)
    block = need = np.empty(0, np.int64)
    erases = np.zeros(1, np.int64)
    if (ops["kind"] != READ).any():
        block, need, erases = _order(p, ops)
    s = _new_state(p, len(ops), len(erases))
    die_operations = np.zeros((len(s.dies), len(KINDS)), np.int64)
    channel_bytes = np.zeros((p.channels, 2), np.int64)
    _fill(p, s, rows, block, need, die_operations, channel_bytes)
    ticks = int(_run(p, s))
    issued, done = s.ops[s.trace[:, _PLACE], _ISSUED], s.ops[s.trace[:, _PLACE], _DONE]
    return FlashRun(
        timeline=_timeline(p, s, ticks, fold_spans(rows[:, 1], issued, done, 0)),
        admitted=s.trace[:, _ADMITTED],
        issued=issued,
        done=done,
        kind=rows[:, 1],
        die_operations=die_operations,
        channel_bytes=channel_bytes,
        most_erases=int(erases.max(initial=0)),
    )


def _longest(p: FlashParams) -> int:
    """A bound on the ticks that one operation adds, suspensions included."""
    suspended = p.suspend_limit * (int(p.suspend.max()) + p.suspend_command)
    array = max(int(p.read.max()), int(p.program.max()), p.erase)
    return array + int(p.command.max()) + 2 * p.page_transfer + max(suspended, 0)


def _new_state(p: FlashParams, n: int, blocks: int) -> _State:
    channels, units = p.channels, p.channels * p.units
    dies = units * p.unit_dies

    def zeros(*shape: int) -> Array:
        return np.zeros(shape, np.int64)

    s = _State(
        trace=zeros(n, 4), ops=zeros(n, 8), line=zeros(n), key=zeros(n), lists=zeros(3 * units, 3),
        blocks=zeros(blocks, 2), units=zeros(units, 10), groups=zeros(2, units, p.planes),
        channels=zeros(channels, 8),
        # A unit may have a register and a cache register of pages to come out.
        queue=zeros(channels, p.units * p.planes * 2),
        dies=zeros(dies, 6), ledger=zeros(channels + dies, 12), counters=zeros(3, len(COUNTERS)),
        # A bus end for each channel; for each unit an array end, and those of its work that was suspended.
        heap=zeros(channels + units * (p.suspend_limit + 2)), touched=zeros(channels), scalars=zeros(5),
    )  # fmt: skip
    s.channels[:, _BUS] = s.dies[:, _DOES] = _NONE
    return s


def _timeline(p: FlashParams, s: _State, ticks: int, spans: np.ndarray) -> Timeline:
    rows = len(s.ledger)
    activity = np.zeros((len(KINDS) + 1, rows, 1 + len(CAUSES)), np.int64)
    activity[: len(KINDS), :, 0] = s.ledger[:, :_CAUSE].T
    activity[len(KINDS), :, 1:] = s.ledger[:, _CAUSE:_CHARGE]
    return Timeline(
        ticks=ticks,
        tags=KINDS,
        spans=spans,
        counter_names=COUNTERS,
        counters=np.vstack([s.counters, np.zeros((1, len(COUNTERS)), np.int64)]),
        units=(*(f"channel {c}" for c in range(p.channels)), *die_names(p)),
        causes=CAUSES,
        activity=activity,
        events=int(s.scalars[_EVENTS]),
        waiting=WAITING,
    )
