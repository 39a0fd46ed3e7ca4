"""The drive's flash controllers in time, by events: a channel with its dies, and rows on their way to ports.

The rules are those of `sim.flash`, without suspension, for operations that come one by one, and what a controller adds:

- It holds at most `flash_queue` operations, and takes an operation at tick t that it can act on from t + 1. A program
  or an erase is held until it is done; a read whose page is there at t, of which no row is wanted, until t + 1 at the
  earliest: pages are looked at one by one, in the order in which they were read, one a tick.
- A page with rows asks for its port from t + 1 on, once the page before it has forwarded all rows. Granted at g, its n
  lines leave in g + 1 .. g + n, and are at the port a tick later. The next page may be granted at g + n, by the same
  controller or the same port. Ports go round: the controller after the last one comes first.
- What is done in a tick makes room from the next one on.
- The group buffer is one more source of pages with rows, behind the last channel: a queue of `flash_queue` pages.

A channel has an event (`next`) at each tick in which its bus ends, a program or an erase ends, or an idle bus may have
work. Array ends of reads in between are looked at late, in the order in which they were: nobody sees them while the bus
is busy. And of its events others see nothing until a page is there that finds no other waiting: they are caught up with
at that tick (`wake`), when it is given an operation, or when a page leaves it.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from tilewright.arch.csd import CsdParams
from tilewright.sim.cache import CALLED, INNER

Array = np.ndarray

# The kernels use literals of this file, since a cached kernel would keep the old value of a name of another.
_READ, _PROGRAM, _ERASE, _DATA_OUT = range(4)
NEVER = 1 << 62
_NEVER = 1 << 62
_NONE = -1
_PLANE_BITS, _PAGE_BITS = 6, 20  # of a key: plane, page, then die within the unit
_UNIT_SHIFT = 32
_PLACE_MASK = (1 << 32) - 1

# Columns. Operations: where, what they wait for, and what becomes of their rows.
_KIND, _UNIT, _KEY, _BLOCK, _PAGE, _WORK, _NEEDS, _SERIAL, _PORT, _LINES, _BATCH, _TAG, _LIVE = range(13)
_OP_COLUMNS = 13
_STATE, _DOING, _SIZE, _END, _OUT, _ASKS = range(6)  # units; ASKS: it is idle, and operations wait for it
# Channels. BUS: the operation whose data moves, -2 - unit for a command, -1 for nothing, until BUS_END. OUT: pages that
# wait for the bus. ROWS: pages that wait to be forwarded, LAST the tick of the last line of the one before. HELD: all
# operations but those DONE in tick DONE_AT, and one that ends in tick RELEASE. ASKING: units that ask for the bus. ENDS: units
# whose arrays work, the first one until ARRAY_END.
_BUS, _BUS_END, _TURN, _OUT_FIRST, _OUT_COUNT, _LIVE_COUNT, _WRITES, _ERASES, _HELD, _DONE, _DONE_AT = range(
    11
)
_RELEASE, _ROWS_FIRST, _ROWS_COUNT, _ROWS_LAST, _CHARGE, _CHARGE_TAG, _SINCE, _SERIALS = range(11, 19)
_FREE_COUNT, _REQUEST, _LAST_TAG, _ARRAY_END, _ASKING, _ENDS_FIRST, _ENDS_COUNT = range(19, 26)
_CHANNEL_COLUMNS = 26
_IDLE, _BUSY, _HOLD = range(3)


class Channels(NamedTuple):
    """All that changes. c counts channels, s sources (channels and the group buffer), u units (of all channels), q
    operations of a channel, n ports."""

    ops: Array  # [s * q, 13]
    free: Array  # [s, q] operations that are not in use
    waiting: Array  # [u * 3, q] operations by unit and kind, oldest first
    counts: Array  # [u * 3]
    units: Array  # [u, 6]
    ends: Array  # [c, units of a channel] ring: units whose arrays work, by the ticks in which they end, then by number
    groups: Array  # [u, planes] operations of the unit's command
    channels: Array  # [s, 26]
    out: Array  # [c, q] ring: pages that wait for the bus
    rows: Array  # [s, q] ring: pages that were read
    since: Array  # [s, q] when each was
    next: Array  # [c] tick of the channel's next event
    wake: Array  # [c] tick by which somebody may see its events
    look: Array  # [s] tick of the next event of its rows
    ports: Array  # [n, 2] tick from which the port is free; the channel whose turn it is
    asking: Array  # [n] channels that ask for it
    stripe: Array  # [planes of a channel] by page of a log: unit, and key without page
    totals: Array  # [3] events
    activity: Array  # [tags + 1, units of the drive, 1 + causes]
    unit: Array  # [1] of the first channel in `activity`, and causes: array, other


def new_channels(
    p: CsdParams, ports: int, activity: Array, first_unit: int, causes: tuple[int, int, int]
) -> Channels:
    """Idle controllers whose ticks are charged to `activity` from unit `first_unit` on: with cause 0 while cells work
    or hold data, with cause 1 while rows wait for a port, else with cause 2."""
    f, q = p.flash, p.flash_queue

    def zeros(*shape: int) -> Array:
        return np.zeros(shape, np.int64)

    c, u = f.channels, f.channels * f.units
    n = c + 1
    s = Channels(
        ops=zeros(n * q, _OP_COLUMNS), free=zeros(n, q), waiting=zeros(u * 3, q), counts=zeros(u * 3),
        units=zeros(u, 6), ends=zeros(c, f.units), groups=zeros(u, f.planes), channels=zeros(n, _CHANNEL_COLUMNS), out=zeros(c, q),
        rows=zeros(n, q), since=zeros(n, q), next=np.full(c, NEVER), wake=np.full(c, NEVER), look=np.full(n, NEVER), ports=zeros(ports, 2),
        asking=zeros(ports), stripe=_stripe(p), totals=zeros(3), activity=activity, unit=np.array([first_unit, *causes], np.int64),
    )  # fmt: skip
    s.free[:] = np.arange(n * q).reshape(n, q)
    s.channels[:, _FREE_COUNT] = q
    s.channels[:, _BUS] = _NONE
    s.channels[:, [_RELEASE, _DONE_AT, _REQUEST, _LAST_TAG]] = _NONE
    s.channels[:, _ARRAY_END] = NEVER
    s.channels[:, _CHARGE], s.channels[:, _CHARGE_TAG] = causes[2], len(activity) - 1
    return s


def grown_channels(s: Channels, activity: Array) -> Channels:
    """The controllers with a larger `activity`, whose last row has moved."""
    before, after = len(s.activity) - 1, len(activity) - 1
    own = s.channels[:, [_CHARGE_TAG]]
    s.channels[:, [_CHARGE_TAG]] = np.where(own == before, after, own)
    return s._replace(activity=activity)


def turns(s: Channels) -> Array:
    """All that controllers and ports at rest remember: whose turn it is."""
    return np.concatenate([s.channels[:, _TURN], s.ports[:, 1]])


def set_turns(s: Channels, values: Array) -> None:
    """Make them those of `turns`."""
    s.channels[:, _TURN], s.ports[:, 1] = values[: len(s.channels)], values[len(s.channels) :]


def account_from(s: Channels, now: int) -> None:
    """All ticks before `now` are accounted for."""
    s.channels[:, _SINCE] = now


def _stripe(p: CsdParams) -> Array:
    f = p.flash
    number = np.arange(f.chips * f.dies * f.planes)
    chip, die, plane = (
        number // stride % size
        for stride, size in zip(p.log_strides, (f.chips, f.dies, f.planes), strict=True)
    )
    die_of_channel = chip * f.dies + die
    key = (die_of_channel % f.unit_dies << _PAGE_BITS + _PLANE_BITS) + plane
    return (die_of_channel // f.unit_dies << _UNIT_SHIFT) + key


# ---- what it holds ------------------------------------------------------------------------------------


@njit(**INNER)
def held(s, c, now):
    """Operations that a controller counts at the beginning of a tick."""
    row = s.channels[c]
    if 0 <= row[_RELEASE] < now:
        row[_HELD] -= 1
        row[_RELEASE] = _NONE
    return row[_HELD] + (row[_DONE] if row[_DONE_AT] == now else 0)


@njit(**INNER)
def room_at(s, c, q, now):
    """The first tick after `now` in which a controller of `q` operations has room, as far as is known at the end of
    `now`: what ends unforeseen is an event."""
    row = s.channels[c]
    left = row[_HELD] - (0 <= row[_RELEASE] <= now)
    if left < q:
        return now + 1
    return row[_RELEASE] + 1 if row[_RELEASE] > now else _NEVER


@njit(**INNER)
def _is_done(s, c, now):
    row = s.channels[c]
    if row[_DONE_AT] != now:
        row[_DONE_AT], row[_DONE] = now, 0
    row[_DONE] += 1
    row[_HELD] -= 1


@njit(**INNER)
def _account(s, c, charge, tag, now):
    row = s.channels[c]
    s.activity[row[_CHARGE_TAG], s.unit[0] + c, row[_CHARGE]] += now - row[_SINCE]
    row[_SINCE], row[_CHARGE], row[_CHARGE_TAG] = now, charge, tag


@njit(**INNER)
def _account_channel(s, c, now):
    """Charge the channel's ticks from `now` on."""
    row = s.channels[c]
    move = row[_BUS]
    if move != _NONE:
        op = move if move >= 0 else s.groups[-2 - move, 0]
        _account(s, c, 0, s.ops[op, _TAG], now)
    elif row[_LIVE_COUNT] > 0:
        _account(s, c, s.unit[1], row[_LAST_TAG], now)
    else:
        tag = s.activity.shape[0] - 1
        _account(s, c, s.unit[2] if row[_HELD] == 0 else s.unit[3], tag, now)


# ---- what completes -----------------------------------------------------------------------------------


@njit(**INNER)
def _needs(p, s, op, other):
    """Whether an operation waits for an older one of its channel: their blocks are the same, and one changes it."""
    mine, before = s.ops[op], s.ops[other]
    if before[_LIVE] == 0 or mine[_UNIT] != before[_UNIT]:
        return False
    place = _PLACE_MASK - (((1 << _PAGE_BITS) - 1) << _PLANE_BITS)
    if (mine[_KEY] ^ before[_KEY]) & place or (mine[_BLOCK] - before[_BLOCK]) % p.flash.blocks:
        return False
    if mine[_KIND] == _READ:
        return before[_KIND] == _ERASE or (before[_KIND] == _PROGRAM and before[_PAGE] == mine[_PAGE])
    return mine[_KIND] == _ERASE or before[_KIND] != _READ


@njit(**INNER)
def _release_needs(p, s, op):
    """Operations that wait for `op`, all of its unit, wait for one less."""
    first = 3 * s.ops[op, _UNIT]
    for at in range(first, first + 3):
        for i in range(s.counts[at]):
            younger = s.waiting[at, i]
            if s.ops[younger, _SERIAL] > s.ops[op, _SERIAL] and _needs(p, s, younger, op):
                s.ops[younger, _NEEDS] -= 1


@njit(**INNER)
def _count_needs(p, s, c, op):
    """How many operations of its channel a new one waits for: for an erase any may be one, else those of its unit that
    wait, too, and a program or an erase that it works on."""
    if s.ops[op, _KIND] == _ERASE:
        for other in range(c * p.flash_queue, (c + 1) * p.flash_queue):
            if other != op and _needs(p, s, op, other):
                s.ops[op, _NEEDS] += 1
        return
    unit = s.ops[op, _UNIT]
    for at in range(3 * unit, 3 * unit + 3):
        for i in range(s.counts[at]):
            if _needs(p, s, op, s.waiting[at, i]):
                s.ops[op, _NEEDS] += 1
    if s.units[unit, _STATE] == _BUSY and s.units[unit, _DOING] != _READ:
        for i in range(s.units[unit, _SIZE]):
            if _needs(p, s, op, s.groups[unit, i]):
                s.ops[op, _NEEDS] += 1


@njit(**INNER)
def _complete(p, s, c, op):
    row = s.channels[c]
    row[_LIVE_COUNT] -= 1
    kind = s.ops[op, _KIND]
    if kind != _READ or row[_ERASES] > 0:
        _release_needs(p, s, op)
    s.ops[op, _LIVE] = 0
    if kind != _READ:
        row[_WRITES] -= 1
        row[_ERASES] -= kind == _ERASE


@njit(**INNER)
def _free(s, c, op):
    s.free[c, s.channels[c, _FREE_COUNT]] = op
    s.channels[c, _FREE_COUNT] += 1


@njit(**INNER)
def _queue_pages(s, c, unit):
    """The pages of the unit's command wait for the bus, oldest first: so they were chosen."""
    row = s.channels[c]
    slots = s.out.shape[1]
    size = s.units[unit, _SIZE]
    slot = row[_OUT_FIRST] + row[_OUT_COUNT]
    for i in range(size):
        s.out[c, slot - slots if slot >= slots else slot] = s.groups[unit, i]
        slot += 1
    row[_OUT_COUNT] += size
    s.units[unit, _OUT] = size


@njit(**INNER)
def _look(s, c, now):
    """The oldest page is looked at from tick `now` on; if rows are wanted, after those of the page before."""
    wanted = s.ops[s.rows[c, s.channels[c, _ROWS_FIRST]], _LINES] > 0
    s.look[c] = max(now, s.channels[c, _ROWS_LAST]) if wanted else now


@njit(**INNER)
def _asks(s, c, unit):
    """Whether the unit asks for the bus has changed, or has not."""
    row = s.units[unit]
    waiting = s.counts[3 * unit] + s.counts[3 * unit + 1] + s.counts[3 * unit + 2]
    asks = 1 if row[_STATE] == _IDLE and waiting > 0 else 0
    s.channels[c, _ASKING] += asks - row[_ASKS]
    row[_ASKS] = asks


@njit(**INNER)
def _bus_end(p, s, c, now):
    row = s.channels[c]
    op = row[_BUS]
    row[_BUS] = _NONE
    if op < 0:
        return
    unit = s.ops[op, _UNIT]
    _complete(p, s, c, op)
    slots = s.rows.shape[1]
    slot = row[_ROWS_FIRST] + row[_ROWS_COUNT]
    slot -= slots if slot >= slots else 0
    s.rows[c, slot], s.since[c, slot] = op, now
    row[_ROWS_COUNT] += 1
    if row[_ROWS_COUNT] == 1:
        _look(s, c, now + 1)
    s.units[unit, _OUT] -= 1
    if s.units[unit, _OUT] == 0 and s.units[unit, _STATE] == _HOLD:
        if p.flash.cache_read:
            _queue_pages(s, c, unit)
        s.units[unit, _STATE] = _IDLE
        _asks(s, c, unit)


@njit(**INNER)
def _array_end(p, s, c, unit, now):
    s.units[unit, _STATE] = _IDLE
    if s.units[unit, _DOING] == _READ:
        free = s.units[unit, _OUT] == 0
        if free:
            _queue_pages(s, c, unit)
        if not (free and p.flash.cache_read):
            s.units[unit, _STATE] = _HOLD
    else:
        for i in range(s.units[unit, _SIZE]):
            op = s.groups[unit, i]
            _complete(p, s, c, op)
            _is_done(s, c, now)
            _free(s, c, op)
    _asks(s, c, unit)


@njit(**INNER)
def _arrays_end(p, s, c, until):
    """Arrays that end up to a tick, in order of ticks and then of units."""
    row = s.channels[c]
    while row[_ARRAY_END] <= until:
        first = row[_ENDS_FIRST]
        unit = s.ends[c, first]
        first = first + 1 if first + 1 < s.ends.shape[1] else 0
        row[_ENDS_FIRST] = first
        row[_ENDS_COUNT] -= 1
        row[_ARRAY_END] = s.units[s.ends[c, first], _END] if row[_ENDS_COUNT] > 0 else _NEVER
        _array_end(p, s, c, unit, s.units[unit, _END])


@njit(**INNER)
def _will_end(s, c, unit):
    """The unit's array works: its place is behind those that end before, mostly behind all."""
    row, size = s.channels[c], s.ends.shape[1]
    end = s.units[unit, _END]
    at = row[_ENDS_FIRST] + row[_ENDS_COUNT]
    at -= size if at >= size else 0
    for _ in range(row[_ENDS_COUNT]):
        before = at - 1 if at > 0 else size - 1
        other = s.ends[c, before]
        if s.units[other, _END] < end or (s.units[other, _END] == end and other < unit):
            break
        s.ends[c, at] = other
        at = before
    s.ends[c, at] = unit
    row[_ENDS_COUNT] += 1
    row[_ARRAY_END] = min(row[_ARRAY_END], end)


# ---- what starts --------------------------------------------------------------------------------------


@njit(**INNER)
def _take(s, at, place):
    """Remove the operation at a place of a waiting list."""
    op = s.waiting[at, place]
    s.counts[at] -= 1
    for i in range(place, s.counts[at]):
        s.waiting[at, i] = s.waiting[at, i + 1]
    return op


@njit(**INNER)
def _issue(p, s, c, unit, kind, now):
    """Send a command of `kind` to the unit if it takes one; returns whether it did."""
    at = 3 * unit + kind
    if s.counts[at] == 0 or s.units[unit, _STATE] != _IDLE or (kind != _READ and s.units[unit, _OUT] > 0):
        return False
    leader = 0
    while s.ops[s.waiting[at, leader], _NEEDS] > 0:
        leader += 1
        if leader == s.counts[at]:
            return False
    op = _take(s, at, leader)
    s.groups[unit, 0] = op
    work, n = s.ops[op, _WORK], 1
    if p.flash.multi_plane and p.flash.planes > 1:
        first = s.ops[op, _KEY]
        same = _PLANE_BITS if p.flash.same_page else _PLANE_BITS + _PAGE_BITS
        planes = 1 << (first & 63)
        place = leader
        while place < s.counts[at] and n < p.flash.planes:
            other = s.waiting[at, place]
            key = s.ops[other, _KEY]
            if (key ^ first) >> same == 0 and (planes >> (key & 63)) & 1 == 0 and s.ops[other, _NEEDS] == 0:
                planes |= 1 << (key & 63)
                s.groups[unit, n] = _take(s, at, place)
                work = max(work, s.ops[other, _WORK])
                n += 1
            else:
                place += 1
    move = p.flash.command[kind, n]
    if kind == _PROGRAM:
        move += n * p.flash.page_transfer
    s.units[unit, _STATE], s.units[unit, _DOING], s.units[unit, _SIZE] = _BUSY, kind, n
    s.units[unit, _END] = now + move + work
    _will_end(s, c, unit)
    _asks(s, c, unit)
    s.channels[c, _BUS], s.channels[c, _BUS_END] = -2 - unit, now + move
    return True


@njit(**INNER)
def _ask_units(p, s, c, stage, now):
    if s.channels[c, _ASKING] == 0:
        return False
    index = s.channels[c, _TURN]
    for _ in range(p.flash.units):
        unit = c * p.flash.units + index
        index += 1
        if index == p.flash.units:
            index = 0
        if s.units[unit, _ASKS] > 0:
            for i in range(3):
                kind = p.flash.stages[stage, i]
                if kind >= 0 and _issue(p, s, c, unit, kind, now):
                    s.channels[c, _TURN] = index
                    return True
    return False


@njit(**INNER)
def _move_data(p, s, c, now):
    row = s.channels[c]
    if row[_OUT_COUNT] == 0:
        return False
    first = row[_OUT_FIRST]
    row[_BUS], row[_BUS_END] = s.out[c, first], now + p.flash.page_transfer
    row[_OUT_FIRST] = first + 1 if first + 1 < s.out.shape[1] else 0
    row[_OUT_COUNT] -= 1
    return True


@njit(**CALLED)
def step_channel(p, s, c, now):
    """What happens on the channel in tick `now`, the next of `s.next`: ends, then what the policy starts."""
    row = s.channels[c]
    s.totals[0] += 1
    _arrays_end(p, s, c, now - 1)
    if row[_BUS] != _NONE and row[_BUS_END] == now:
        _bus_end(p, s, c, now)
    _arrays_end(p, s, c, now)
    if row[_BUS] == _NONE:
        for stage in range(p.flash.stages.shape[0]):
            if p.flash.stages[stage, 0] == _DATA_OUT:
                found = _move_data(p, s, c, now)
            else:
                found = _ask_units(p, s, c, stage, now)
            if found:
                break
    _account_channel(s, c, now)
    if row[_BUS] == _NONE:
        s.next[c] = row[_ARRAY_END]
    else:
        # Ends of programs and erases are seen by others.
        s.next[c] = min(row[_BUS_END], row[_ARRAY_END]) if row[_WRITES] > 0 else row[_BUS_END]


@njit(**INNER)
def _wakes(p, s, c):
    """Set the tick by which the channel's events must be caught up with."""
    row = s.channels[c]
    if row[_WRITES] > 0:
        s.wake[c] = s.next[c]
    elif row[_ROWS_COUNT] > 0:
        s.wake[c] = _NEVER
    elif row[_BUS] >= 0:
        s.wake[c] = row[_BUS_END] + 1
    else:
        s.wake[c] = min(s.next[c], _NEVER - 1 - p.flash.page_transfer) + p.flash.page_transfer + 1


@njit(**INNER)
def catch_up(p, s, c, now):
    """The channel's events up to tick `now`."""
    while s.next[c] <= now:
        step_channel(p, s, c, s.next[c])
    _wakes(p, s, c)


@njit(**INNER)
def begin_anew(p, s, now):
    """At the end of tick `now` turns are given anew, of channels and ports."""
    for c in range(s.next.shape[0]):
        catch_up(p, s, c, now)
        s.channels[c, _TURN] = 0
    for port in range(s.ports.shape[0]):
        s.ports[port, 1] = 0


@njit(**INNER)
def push(p, s, c, kind, number, port, lines, batch, tag, now):
    """Give a controller an operation on page `number` of its channel's log, at the end of tick `now`; of a read `lines`
    lines go to `port`, as part of `batch`. It must have room."""
    f = p.flash
    line = number // s.stripe.shape[0]
    place = s.stripe[number - line * s.stripe.shape[0]]
    block = line // f.pages
    page = 0 if kind == _ERASE else line - block * f.pages
    row = s.channels[c]
    catch_up(p, s, c, now)
    row[_FREE_COUNT] -= 1
    op = s.free[c, row[_FREE_COUNT]]
    o = s.ops[op]
    unit = c * f.units + (place >> _UNIT_SHIFT)
    o[_KIND], o[_UNIT], o[_PAGE] = kind, unit, page
    o[_KEY] = (place & _PLACE_MASK) + (page << _PLANE_BITS)
    o[_BLOCK] = block
    o[_WORK] = f.erase if kind == _ERASE else (f.read[page] if kind == _READ else f.program[page])
    o[_PORT], o[_LINES], o[_BATCH], o[_TAG] = port, lines, batch, tag
    o[_SERIAL] = row[_SERIALS]
    row[_SERIALS] += 1
    o[_NEEDS] = 0
    if row[_WRITES] > 0 or kind == _ERASE:
        _count_needs(p, s, c, op)
    o[_LIVE] = 1
    row[_WRITES] += kind != _READ
    row[_ERASES] += kind == _ERASE
    row[_HELD] += 1
    row[_LIVE_COUNT] += 1
    row[_LAST_TAG] = tag
    at = 3 * unit + kind
    s.waiting[at, s.counts[at]] = op
    s.counts[at] += 1
    _asks(s, c, unit)
    if row[_BUS] == _NONE:
        # The channel, idle so far, looks at it in the next tick.
        s.next[c] = min(s.next[c], now + 1)
    _wakes(p, s, c)


# ---- rows ---------------------------------------------------------------------------------------------


@njit(**INNER)
def staged(s):
    """Pages that the group buffer's queue holds."""
    return s.channels[s.channels.shape[0] - 1, _ROWS_COUNT]


@njit(**INNER)
def stage(s, port, lines, batch, tag, now):
    """Give the group buffer a page of which `lines` lines go to `port`, at the end of tick `now`. It must have room."""
    c = s.channels.shape[0] - 1
    row = s.channels[c]
    row[_FREE_COUNT] -= 1
    op = s.free[c, row[_FREE_COUNT]]
    o = s.ops[op]
    o[_PORT], o[_LINES], o[_BATCH], o[_TAG] = port, lines, batch, tag
    slots = s.rows.shape[1]
    slot = row[_ROWS_FIRST] + row[_ROWS_COUNT]
    slot -= slots if slot >= slots else 0
    s.rows[c, slot], s.since[c, slot] = op, now
    row[_ROWS_COUNT] += 1
    if row[_ROWS_COUNT] == 1:
        _look(s, c, now + 1)


@njit(**INNER)
def forwarded(s, op):
    """Lines of the operation that was granted a port last, its batch and its tag."""
    o = s.ops[op]
    return o[_LINES], o[_BATCH], o[_TAG]


@njit(**CALLED)
def step_rows(p, s, c, now):
    """In tick `now`, the one of `s.look`: the oldest page asks for its port, or is dropped."""
    row = s.channels[c]
    s.totals[1] += 1
    s.look[c] = _NEVER
    first = row[_ROWS_FIRST]
    op = s.rows[c, first]
    if s.ops[op, _LINES] > 0:
        port = s.ops[op, _PORT]
        row[_REQUEST] = port
        s.asking[port] += 1
        return
    _leave_rows(s, c, now)
    _is_done(s, c, now)


@njit(**INNER)
def _leave_rows(s, c, now):
    """The oldest page leaves the queue; the next one is looked at when it is there and rows may be forwarded."""
    row = s.channels[c]
    first = row[_ROWS_FIRST]
    op = s.rows[c, first]
    _free(s, c, op)
    first = first + 1 if first + 1 < s.rows.shape[1] else 0
    row[_ROWS_FIRST] = first
    row[_ROWS_COUNT] -= 1
    if row[_ROWS_COUNT] > 0:
        _look(s, c, max(now, s.since[c, first]) + 1)
    return op


@njit(**CALLED)
def grant(p, s, port, now):
    """Give a port that is free at `now`, and asked for, to the channel whose turn it is: returns the operation.

    Its lines are at the port in ticks now + 2 to now + 1 + lines.
    """
    s.totals[2] += 1
    n = s.channels.shape[0]
    c = s.ports[port, 1]
    while s.channels[c, _REQUEST] != port:
        c = c + 1 if c + 1 < n else 0
    s.ports[port, 1] = c + 1 if c + 1 < n else 0
    row = s.channels[c]
    if c < s.next.shape[0]:
        catch_up(p, s, c, now)
    row[_REQUEST] = _NONE
    s.asking[port] -= 1
    op = s.rows[c, row[_ROWS_FIRST]]
    last = now + s.ops[op, _LINES]
    row[_ROWS_LAST] = s.ports[port, 0] = last
    held(s, c, now)  # what was released before is counted
    if row[_RELEASE] == now:
        # Its last line leaves as the next page begins.
        _is_done(s, c, now)
    row[_RELEASE] = last
    _leave_rows(s, c, now)
    if c < s.next.shape[0]:
        _wakes(p, s, c)
    return op


@njit(**CALLED)
def finish_channels(s, now):
    """Account for all ticks before `now`."""
    for c in range(s.next.shape[0]):
        _account_channel(s, c, now)
