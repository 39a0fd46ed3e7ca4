"""Kernels of dataflow units in time: what each unit, switch and memory channel does in a tick.

Links decouple everything: what is pushed, popped or signalled in a tick is seen by others in later ticks only. So
nodes can be taken in any order within a tick, and only those that may do something: a node that waits sleeps until
the tick in which, as far as is known, its state changes, or until another node's push, pop or token wakes it. The
ticks between are charged when it wakes, to the cause it slept for.

A pipeline is a queue of the ticks in which results come out; where it stands still, they slip.
"""

import numpy as np
from numba import njit

from tilewright.sim.cache import CALLED, ENTRY, INNER
from tilewright.sim.rdu_dram import first_taken, take
from tilewright.sim.rdu_state import (
    ACTED,
    AGCU,
    AGCU_FLOW,
    AGCU_RING,
    AGCU_SEQUENCE,
    AGCU_STEP,
    AGCUS,
    AHEAD,
    ALIGNED,
    ARRAY,
    ARRAY_FROZEN,
    ARRAY_SLIP,
    ASKS,
    AT_ONCE,
    BACKWARD,
    BANK,
    BASE,
    BUSY,
    CAPACITY,
    CAUSE,
    COLUMNS,
    CONFLICTS,
    COUNT,
    COUNTER,
    CREDIT,
    DEBT,
    DELTA,
    DEPTH,
    DIRTY,
    DRAIN,
    DROPPED,
    END,
    ENDS,
    EXPECTED,
    FAULT,
    FAULTY,
    FED,
    FILL,
    FINAL,
    FIRST,
    FIRST_AGCU,
    FORWARD,
    FROZEN,
    GAP,
    GIVEN,
    GIVES,
    GIVES_FLOW,
    GRANTED,
    GROUP_TURN,
    HELD_LINE,
    HUNGRY,
    IDLE,
    INPUT,
    INPUT_LEVEL,
    INPUTS_USED,
    INSIDE,
    INTERVAL,
    INTERVAL_CAUSE,
    LANE,
    LANES,
    LATENCY,
    LATER,
    LEAD,
    LEFT,
    LEVEL,
    LEVELS,
    LINE_FAULT,
    LINE_SHIFT,
    LINES,
    LOW,
    MASK,
    MEMORY,
    MOST,
    MOVED,
    NEVER,
    NOW,
    OCCUPIED,
    OPERAND,
    ORIGIN,
    OUTPUT,
    OWED,
    PARTS,
    PCU,
    PIPELINE,
    PLANES,
    PMU,
    PMU_FROZEN,
    PMU_RING,
    PMU_SEQUENCE,
    PMU_SLIP,
    PMU_STEP,
    PORT,
    POSITION,
    PUSHES,
    QUEUE,
    QUIET,
    RATE_P,
    RATE_Q,
    READ,
    READY,
    RING,
    RUN,
    SCALAR,
    SCALAR_FLOW,
    SCALE,
    SENT,
    SEQUENCE,
    SIDE,
    SIGNAL,
    SIGNAL_LEVEL,
    SINCE,
    SINK,
    SIZE,
    SKEW_BITS,
    SKEW_SHIFT,
    SKIPPED,
    SLIP,
    SOME,
    SOURCE,
    STARVED,
    STEP,
    STEPS,
    STORE,
    SWITCH,
    SYSTOLIC,
    TABLE,
    TABLE_DEPTH,
    TABLE_MASK,
    TAKEN,
    TIER,
    TIMED,
    TOKEN,
    TOKENS,
    TOKENS_FAULT,
    TOKENS_HELD,
    TURN,
    UNDER_WAY,
    UNIT,
    USED,
    VALID,
    VECTOR,
    VECTOR_FLOW,
    WAIT,
    WAIT_LEVEL,
    WAITER,
    WANT,
    WHEEL,
    WORDS,
    WRITE,
    WRITE_FIRST,
    ZEROS,
)

# ---- scheduling ---------------------------------------------------------------------------------------


@njit(**INNER)
def _wake(m, node, tick):
    """Schedule a node for `tick`, which lies ahead; beyond the wheel's end it will find out by itself."""
    if m.when[node] > tick:
        tick = min(tick, m.clock[NOW] + WHEEL - 1)
        m.when[node] = tick
        m.wheel[tick % WHEEL, node >> 6] |= np.uint64(1) << np.uint64(node & 63)


@njit(**INNER)
def _happens(m, tick):
    """A unit does something in this tick, so all is not quiet before the next."""
    m.clock[ACTED] = tick
    m.clock[QUIET] = max(m.clock[QUIET], tick + 1)


@njit(**INNER)
def account(m, chain, tick, cause):
    """The unit does `cause` from `tick` on."""
    row = m.chain[chain]
    m.activity[chain, row[CAUSE]] += tick - row[SINCE]
    row[SINCE], row[CAUSE] = tick, cause


# ---- links --------------------------------------------------------------------------------------------


@njit(**INNER)
def _room(m, link, tick):
    """From which tick on a packet can be pushed; NEVER: until a pop, which wakes the source."""
    row = m.link[link]
    if row[LEVEL] == row[CAPACITY]:
        row[STARVED] = 1
        return NEVER
    return m.slots[row[BASE] + row[WRITE]]


@njit(**INNER)
def _push(m, link, tick, item):
    row = m.link[link]
    at = row[BASE] + row[WRITE]
    m.slots[at] = tick + row[FORWARD]
    m.items[at] = item
    row[WRITE] = 0 if row[WRITE] + 1 == row[CAPACITY] else row[WRITE] + 1
    row[LEVEL] += 1
    row[PUSHES] += 1
    if row[HUNGRY]:
        row[HUNGRY] = 0
        _wake(m, row[SINK], tick + row[FORWARD])


@njit(**INNER)
def _head(m, link):
    """From which tick on there is a packet; NEVER: until a push, which wakes the sink."""
    row = m.link[link]
    if row[LEVEL] == 0:
        row[HUNGRY] = 1
        return NEVER
    return m.slots[row[BASE] + row[READ]]


@njit(**INNER)
def _pop(m, link, tick):
    """The packet's flow and sequence id."""
    row = m.link[link]
    at = row[BASE] + row[READ]
    m.slots[at] = tick + row[BACKWARD]
    row[READ] = 0 if row[READ] + 1 == row[CAPACITY] else row[READ] + 1
    row[LEVEL] -= 1
    if row[STARVED]:
        row[STARVED] = 0
        _wake(m, row[SOURCE], tick + row[BACKWARD])
    m.clock[QUIET] = max(m.clock[QUIET], tick + m.clock[CREDIT])
    return m.items[at]


# ---- counter chains -----------------------------------------------------------------------------------


@njit(**CALLED)
def _give(m, chain, outputs, tick):
    """Tokens leave by these outputs."""
    for output in range(TOKENS):
        if outputs >> output & 1:
            for w in range(m.wire[chain * TOKENS + output], m.wire[chain * TOKENS + output + 1]):
                row = m.queue[m.wire_queue[w]]
                at = row[GIVEN] % row[SIZE]
                arrives = tick + m.wire_ticks[w] + 1
                if row[GIVEN] - row[TAKEN] == row[SIZE]:
                    m.clock[FAULT], m.clock[FAULTY] = TOKENS_FAULT, m.wire_queue[w]
                    continue
                m.tokens[row[BASE] + at] = arrives
                row[GIVEN] += 1
                if row[EXPECTED]:
                    row[EXPECTED] = 0
                    _wake(m, row[WAITER], arrives)


@njit(**INNER)
def _missing(m, chain, tick):
    """From which tick on all tokens are there that the iteration at hand takes; NEVER: another unit's will wake it."""
    row = m.chain[chain]
    latest = np.int64(0)
    if row[WAIT] and row[ZEROS] >= row[WAIT_LEVEL]:
        for i in range(TOKENS):
            if row[WAIT] >> i & 1:
                queue = m.queue[row[QUEUE + i]]
                if queue[GIVEN] == queue[TAKEN]:
                    queue[EXPECTED] = 1
                    latest = np.int64(NEVER)
                else:
                    latest = max(latest, m.tokens[queue[BASE] + queue[TAKEN] % queue[SIZE]])
    return latest


@njit(**INNER)
def _advance(m, chain, tick):
    """The iteration at hand is done. Returns the tokens that it raises."""
    row = m.chain[chain]
    if row[WAIT] and row[ZEROS] >= row[WAIT_LEVEL]:
        for i in range(TOKENS):
            if row[WAIT] >> i & 1:
                queue = m.queue[row[QUEUE + i]]
                beyond = queue[TAKEN] + TOKENS_HELD
                if queue[GIVEN] > beyond and m.tokens[queue[BASE] + beyond % queue[SIZE]] - 1 < tick:
                    m.clock[FAULT], m.clock[FAULTY] = TOKENS_FAULT, row[QUEUE + i]
                queue[TAKEN] += 1
    raises = row[SIGNAL] if row[ENDS] >= row[SIGNAL_LEVEL] else 0
    level = row[ENDS]
    if level >= LEVELS:
        row[RUN] = 0
    else:
        for n in range(level):
            row[COUNTER + n] = 0
        row[COUNTER + level] += 1
        row[ORIGIN] = (row[ORIGIN] + row[DELTA + level]) & row[MASK]
        row[ZEROS] = level
        n = row[LEAD]
        if level == n:
            while n < LEVELS and row[COUNTER + n] + 1 >= row[COUNT + n]:
                n += 1
        row[ENDS] = n if n < LEVELS else LEVELS + 2
    row[GAP] = tick + max(row[INTERVAL], 1)
    row[STEPS] += 1
    real = tick + m.clock[SKIPPED]
    if row[FIRST] < 0:
        row[FIRST] = real
    row[END] = real + 1
    return raises


# ---- compute units ------------------------------------------------------------------------------------


@njit(**INNER)
def _put(m, row, ring, tick):
    """What comes out at `tick` joins the queue."""
    m.ring[row[ring] + (row[ring + 3] & row[ring + 1])] = tick
    row[ring + 3] += 1


@njit(**INNER)
def _due(m, row, ring, slip):
    """When the next comes out."""
    if row[ring + 2] == row[ring + 3]:
        return NEVER
    return m.ring[row[ring] + (row[ring + 2] & row[ring + 1])] + slip


@njit(**INNER)
def pcu_tick(m, i, t):
    row = m.pcu[i]
    wake = np.int64(NEVER)
    chain = row[UNIT]
    c = m.chain[chain]
    acts = False

    # The result at the output leaves by every output in use, or all stands still.
    if row[FROZEN] >= 0:
        row[SLIP] += t - row[FROZEN]
        row[FROZEN] = -1
    due = _due(m, row, RING, row[SLIP])
    full = False
    room = np.int64(0)
    if due <= t:
        if row[VECTOR] >= 0 and not row[PARTS] & 1:
            room = _room(m, row[VECTOR], t)
            if room <= t:
                _push(m, row[VECTOR], t, row[VECTOR_FLOW] << 20 | row[SEQUENCE])
                row[PARTS] |= 1
                acts = True
            else:
                full = True
        if row[SCALAR] >= 0 and not row[PARTS] & 2:
            other = _room(m, row[SCALAR], t)
            if other <= t:
                _push(m, row[SCALAR], t, row[SCALAR_FLOW] << 20 | row[SEQUENCE])
                row[PARTS] |= 2
                acts = True
            else:
                full = True
                room = min(room, other) if room > t else other
        if full:
            row[FROZEN] = t
        else:
            row[RING + 2] += 1
            row[PARTS] = 0
            row[SEQUENCE] = (row[SEQUENCE] + row[STEP]) & 0xFFFFF
            acts = True

    # The array: tiles end, and leave column by column.
    hold = False
    if row[SYSTOLIC]:
        if row[ARRAY_FROZEN] >= 0:
            row[ARRAY_SLIP] += t - row[ARRAY_FROZEN]
            row[ARRAY_FROZEN] = -1
        ends = _due(m, row, ARRAY, row[ARRAY_SLIP]) <= t
        hold = ends and row[LEFT] != 0 and not (row[LEFT] == 1 and not full)
        if row[LEFT] and not full:
            _put(m, row, RING, t + row[LATENCY] - row[SLIP])
            row[LEFT] -= 1
            acts = True
        if hold:
            row[ARRAY_FROZEN] = t
        elif ends:
            row[ARRAY + 2] += 1
            row[LEFT] = row[COLUMNS]
            acts = True

    # The header.
    stopped = hold if row[SYSTOLIC] else full
    cause = IDLE
    if c[RUN]:
        token = _missing(m, chain, t)
        operand = np.int64(0)
        if token <= t or not stopped:
            for k in range(row[INPUTS_USED]):
                operand = max(operand, _head(m, row[INPUT + k]))
        if token <= t and operand <= t and c[GAP] <= t and not stopped:
            cause = BUSY
            for k in range(row[INPUTS_USED]):
                if c[ENDS] >= row[INPUT_LEVEL + k]:
                    _pop(m, row[INPUT + k], t)
            if c[ENDS] >= row[FINAL]:
                if row[SYSTOLIC]:
                    _put(m, row, ARRAY, t + row[FILL] - row[ARRAY_SLIP])
                else:
                    _put(m, row, RING, t + row[LATENCY] - row[SLIP])
            raises = _advance(m, chain, t)
            if raises:
                _give(m, chain, raises, t)
            acts = True
        elif full and stopped:
            cause = OUTPUT
        elif hold:
            cause = DRAIN
        elif token > t:
            cause = TOKEN
            wake = min(wake, token)
        elif operand > t:
            cause = OPERAND
            wake = min(wake, operand)
        else:
            cause = INTERVAL_CAUSE
            wake = min(wake, c[GAP])
    elif full:
        cause = OUTPUT
    elif hold:
        cause = DRAIN
    elif row[LEFT] or row[RING + 2] != row[RING + 3] or row[ARRAY + 2] != row[ARRAY + 3] or acts:
        cause = PIPELINE
    account(m, chain, t, cause)
    if acts:
        _happens(m, t)
        wake = min(wake, t + 1)
    if full:
        wake = min(wake, room)
    else:
        wake = min(wake, _due(m, row, RING, row[SLIP]))
    if row[SYSTOLIC] and not hold:
        wake = min(wake, _due(m, row, ARRAY, row[ARRAY_SLIP]))
    return wake


# ---- memory units -------------------------------------------------------------------------------------


@njit(**INNER)
def _bank(row, word, bits):
    """The bank of a word of the scratchpad."""
    bank = np.int64(0)
    for i in range(bits):
        bank |= (word >> row[POSITION + i] & 1) << i
    mask = (np.int64(1) << row[SKEW_BITS]) - 1
    return (bank & ~mask) | ((bank + (word >> row[SKEW_SHIFT])) & mask)


@njit(**INNER)
def _add(planes, bank):
    """One more access at a bank."""
    carry = np.uint64(1) << np.uint64(bank)
    k = 0
    while carry:
        both = planes[k] & carry
        planes[k] ^= carry
        carry = both
        k += 1


@njit(**ENTRY)
def fill_table(row, lane, bits, lanes, table):
    """Accesses at each bank for each address modulo the length of `table` uint64[rows, PLANES]."""
    for word in range(len(table)):
        for k in range(lanes):
            _add(table[word], _bank(row, word + k * lane, bits))


@njit(**INNER)
def _access(m, i, side, address, bits):
    """An iteration's accesses go to the banks."""
    row = m.pmu[i]
    lanes = m.clock[LANES]
    word = (address - row[LOW]) & 0xFFFFFF
    lane = row[LANE + side]
    planes = m.planes[i, side]
    inside = lanes
    if word + (lanes - 1) * lane < row[WORDS] and row[TABLE + side] >= 0:
        table = m.tables[row[TABLE + side] + (word & row[TABLE_MASK])]
        row[DEPTH + side] = row[TABLE_DEPTH + side]
        for k in range(row[DEPTH + side]):
            planes[k] = table[k]
    elif word >= row[WORDS] and word + (lanes - 1) * lane <= 0xFFFFFF:
        inside = row[DEPTH + side] = 0  # others keep what goes by
    else:
        inside = 0
        row[DEPTH + side] = PLANES
        for k in range(lanes):
            at = (word + k * lane) & 0xFFFFFF
            if at < row[WORDS]:
                inside += 1
                _add(planes, _bank(row, at, bits))
    row[INSIDE + side] = inside
    row[DROPPED] += lanes - inside
    row[OCCUPIED + side] = 1


@njit(**INNER)
def _wanted(planes, depth):
    out = np.uint64(0)
    for k in range(depth):
        out |= planes[k]
    return out


@njit(**INNER)
def _serve(planes, depth, banks):
    """One access at each of these banks is done. Returns whether any are left."""
    borrow = banks
    left = np.uint64(0)
    for k in range(depth):
        plane = planes[k]
        planes[k] = plane ^ borrow
        borrow &= ~plane
        left |= planes[k]
    return left != 0


@njit(**INNER)
def _ones(x):
    x = x - ((x >> np.uint64(1)) & np.uint64(0x5555555555555555))
    x = (x & np.uint64(0x3333333333333333)) + ((x >> np.uint64(2)) & np.uint64(0x3333333333333333))
    x = (x + (x >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    x += x >> np.uint64(8)
    x += x >> np.uint64(16)
    x += x >> np.uint64(32)
    return np.int64(x & np.uint64(0x7F))


@njit(**INNER)
def _lowest(x):
    """The number of the lowest bit that is set."""
    return _ones(~x & (x - np.uint64(1)))


@njit(**INNER)
def pmu_tick(m, i, t, bits):
    row = m.pmu[i]
    wake = np.int64(NEVER)
    write, read = row[SIDE], row[SIDE + 1]
    acts = False

    if row[PMU_FROZEN] >= 0:
        row[PMU_SLIP] += t - row[PMU_FROZEN]
        row[PMU_FROZEN] = -1
    due = _due(m, row, PMU_RING, row[PMU_SLIP])
    move = True
    room = np.int64(0)
    if due <= t:
        room = _room(m, row[GIVES], t) if row[GIVES] >= 0 else np.int64(0)
        if room <= t:
            if row[GIVES] >= 0:
                _push(m, row[GIVES], t, row[GIVES_FLOW] << 20 | row[PMU_SEQUENCE])
            row[PMU_SEQUENCE] = (row[PMU_SEQUENCE] + row[PMU_STEP]) & 0xFFFFF
            row[PMU_RING + 2] += 1
            acts = True
        else:
            move = False
            row[PMU_FROZEN] = t

    # The banks.
    writes = reads = np.uint64(0)
    if row[OCCUPIED]:
        writes = _wanted(m.planes[i, 0], row[DEPTH])
    if row[OCCUPIED + 1] and move:
        reads = _wanted(m.planes[i, 1], row[DEPTH + 1])
    both = writes & reads
    if both:
        if row[WRITE_FIRST]:
            reads &= ~both
        else:
            writes &= ~both
        row[WRITE_FIRST] ^= 1
    written = read_done = False
    conflict = False
    if row[OCCUPIED]:
        row[MOVED] += _ones(writes)
        written = not _serve(m.planes[i, 0], row[DEPTH], writes)
        conflict = not written
        acts = True
    if row[OCCUPIED + 1] and move:
        row[MOVED + 1] += _ones(reads)
        read_done = not _serve(m.planes[i, 1], row[DEPTH + 1], reads)
        conflict |= not read_done
        acts = True
    row[CONFLICTS] += conflict
    if written and row[OWED]:
        _give(m, write, row[OWED], t)
    if read_done:
        if row[OWED + 1]:
            _give(m, read, row[OWED + 1], t)
        if row[INSIDE + 1]:
            _put(m, row, PMU_RING, t + 2 - row[PMU_SLIP])
    free = written or not row[OCCUPIED]
    read_free = read_done or not row[OCCUPIED + 1]

    # The write side.
    c = m.chain[write]
    cause = PIPELINE if row[OCCUPIED] else IDLE
    if written:
        row[OCCUPIED] = 0
    if not free:
        cause = BANK
    elif c[RUN]:
        token, operand = _missing(m, write, t), _head(m, row[FED])
        if token <= t and operand <= t and c[GAP] <= t:
            cause = BUSY
            sequence = _pop(m, row[FED], t) & 0xFFFFF
            _access(m, i, 0, c[ORIGIN] + sequence * row[SCALE], bits)
            row[OWED] = _advance(m, write, t)
            acts = True
        elif token > t:
            cause = TOKEN
            wake = min(wake, token)
        elif operand > t:
            cause = OPERAND
            wake = min(wake, operand)
        else:
            cause = INTERVAL_CAUSE
            wake = min(wake, c[GAP])
    account(m, write, t, cause)

    # The read side.
    c = m.chain[read]
    under_way = row[OCCUPIED + 1] or due < NEVER
    cause = PIPELINE if under_way else IDLE
    if read_done:
        row[OCCUPIED + 1] = 0
    if not move:
        cause = OUTPUT
    elif not read_free:
        cause = BANK
    elif c[RUN]:
        token = _missing(m, read, t)
        if token <= t and c[GAP] <= t:
            cause = BUSY
            _access(m, i, 1, c[ORIGIN], bits)
            row[OWED + 1] = _advance(m, read, t)
            acts = True
        elif token > t:
            cause = TOKEN
            wake = min(wake, token)
        else:
            cause = INTERVAL_CAUSE
            wake = min(wake, c[GAP])
    account(m, read, t, cause)

    if acts:
        _happens(m, t)
        wake = min(wake, t + 1)
    if move:
        wake = min(wake, _due(m, row, PMU_RING, row[PMU_SLIP]))
    else:
        wake = min(wake, room)
    return wake


# ---- switches -----------------------------------------------------------------------------------------


@njit(**INNER)
def _fork(m, link, first_out, outs, t):
    """A switch with one input, where nobody else wants an output."""
    row = m.link[link]
    head = _head(m, link)
    if head > t:
        return head
    wake = np.int64(NEVER)
    item = m.items[row[BASE] + row[READ]]
    wants = m.flow_out[item >> 20] & ~row[SENT]
    for o in range(outs):
        if wants >> o & 1:
            out = m.ports[first_out + o]
            room = _room(m, out, t)
            if room <= t:
                _push(m, out, t, m.flow_next[item >> 20, o] << 20 | item & 0xFFFFF)
                wants ^= 1 << o
                row[SENT] |= 1 << o
            else:
                wake = min(wake, room)
    if not wants:
        row[SENT] = 0
        _pop(m, link, t)
        wake = max(_head(m, link), t + 1)
    return wake


@njit(**INNER)
def switch_tick(m, s, t):
    first, ins, first_out, outs = m.switch[s]
    if ins == 1:
        return _fork(m, m.ports[first], first_out, outs, t)
    wake = np.int64(NEVER)
    wanted = taking = np.uint64(0)  # outputs that heads want; inputs whose heads do
    for i in range(ins):
        link = m.ports[first + i]
        row = m.link[link]
        row[WANT] = 0
        head = _head(m, link)
        if head <= t:
            row[WANT] = m.flow_out[m.items[row[BASE] + row[READ]] >> 20] & ~row[SENT]
            wanted |= np.uint64(row[WANT])
            taking |= np.uint64(1) << np.uint64(i)
        else:
            wake = min(wake, head)
    alone = taking & (taking - np.uint64(1)) == 0
    while wanted:
        o = _lowest(wanted)
        wanted &= wanted - np.uint64(1)
        out = m.ports[first_out + o]
        room = _room(m, out, t)
        if room > t:
            wake = min(wake, room)
            continue
        chosen = -1
        several = False
        if alone:
            chosen = _lowest(taking)
        else:
            turn = m.link[out, TURN]
            for k in range(ins):
                i = turn + k
                if i >= ins:
                    i -= ins
                if m.link[m.ports[first + i], WANT] >> o & 1:
                    if chosen < 0:
                        chosen = i
                    else:
                        several = True
                        break
        row = m.link[m.ports[first + chosen]]
        item = m.items[row[BASE] + row[READ]]
        _push(m, out, t, m.flow_next[item >> 20, o] << 20 | item & 0xFFFFF)
        m.link[out, TURN] = 0 if chosen + 1 == ins else chosen + 1
        row[SENT] |= 1 << o
        row[WANT] &= ~(1 << o)
        if several:
            wake = min(wake, t + 1)
    while taking:
        link = m.ports[first + _lowest(taking)]
        taking &= taking - np.uint64(1)
        row = m.link[link]
        if row[SENT] and not row[WANT]:
            row[SENT] = 0
            _pop(m, link, t)
            wake = min(wake, max(_head(m, link), t + 1))
    return wake


# ---- gates to memory ----------------------------------------------------------------------------------


@njit(**INNER)
def next_working(t, p, q):
    """First tick >= t in which a channel works: (t * p) mod q < p."""
    phase = t % q * p % q
    return t if phase < p else t + (q - phase + p - 1) // p


@njit(**INNER)
def _agcu_asks(m, row, t):
    """What an AGCU wants in this tick. Returns whether it asks its channel for a line."""
    c = m.chain[row[AGCU]]
    same = row[SOME] and c[ORIGIN] >> row[LINE_SHIFT] == row[HELD_LINE]
    row[READY] = c[RUN] and c[GAP] <= t and _missing(m, row[AGCU], t) <= t
    row[GRANTED] = 0
    if row[STORE]:
        row[AT_ONCE] = not row[DIRTY] or (same and not row[DEBT])
        row[ASKS] = row[DIRTY] and (not c[RUN] or not same or row[DEBT] != 0)
    else:
        row[READY] = row[READY] and row[UNDER_WAY] < row[MOST]
        row[AT_ONCE] = same and not (c[WAIT] and c[ZEROS] >= c[WAIT_LEVEL])
        row[ASKS] = row[READY] and not row[AT_ONCE]
    return row[ASKS]


@njit(**INNER)
def _agcu_acts(m, row, t):
    """It does what it can. Returns when it may do more, or something else."""
    wake = np.int64(NEVER)
    chain = row[AGCU]
    c = m.chain[chain]
    acts = full = False
    operand = np.int64(0)
    crowded = row[UNDER_WAY] >= row[MOST]
    under_way = row[UNDER_WAY] or row[DIRTY]
    if row[STORE]:
        if c[RUN]:
            operand = _head(m, row[PORT])
        if row[GRANTED]:
            acts = True
            if row[DEBT]:
                _give(m, chain, row[DEBT], t)
            row[DIRTY] = row[DEBT] = 0
    else:
        if row[VALID]:
            room = _room(m, row[PORT], t)
            if room <= t:
                _push(m, row[PORT], t, row[AGCU_FLOW] << 20 | row[AGCU_SEQUENCE])
                row[AGCU_SEQUENCE] = (row[AGCU_SEQUENCE] + row[AGCU_STEP]) & 0xFFFFF
                row[UNDER_WAY] -= 1
                row[VALID] = 0
                acts = True
            else:
                full = True
                wake = min(wake, room)
        if not full and _due(m, row, AGCU_RING, 0) <= t:
            row[AGCU_RING + 2] += 1
            row[VALID] = 1
            acts = True

    if row[READY] and operand <= t and (row[AT_ONCE] or row[GRANTED]):
        cause = BUSY
        address = c[ORIGIN]
        within = address & ((1 << row[LINE_SHIFT]) - 1)
        if within + row[USED] > 1 << row[LINE_SHIFT] or address % row[ALIGNED]:
            m.clock[FAULT], m.clock[FAULTY] = LINE_FAULT, chain
        row[SOME], row[HELD_LINE] = 1, address >> row[LINE_SHIFT]
        raises = _advance(m, chain, t)
        if row[STORE]:
            _pop(m, row[PORT], t)
            row[DIRTY], row[DEBT] = 1, raises
        else:
            _put(m, row, AGCU_RING, t + (row[AHEAD] + row[LATER] if row[GRANTED] else 1))
            row[UNDER_WAY] += 1
            if raises:
                _give(m, chain, raises, t)
        acts = True
    elif full and (crowded or not c[RUN]):
        cause = OUTPUT
    elif c[RUN]:
        token = _missing(m, chain, t)
        if token > t:
            cause = TOKEN
            wake = min(wake, token)
        elif operand > t:
            cause = OPERAND
            wake = min(wake, operand)
        elif c[GAP] > t:
            cause = INTERVAL_CAUSE
            wake = min(wake, c[GAP])
        else:
            cause = MEMORY
    else:
        cause = PIPELINE if under_way else IDLE
    account(m, chain, t, cause)
    if acts:
        _happens(m, t)
        wake = min(wake, t + 1)
    if not full and not row[STORE]:
        wake = min(wake, max(_due(m, row, AGCU_RING, 0), t + 1))
    return wake


@njit(**INNER)
def group_tick(m, g, t):
    """A channel and its AGCUs."""
    group = m.group[g]
    wake = np.int64(NEVER)
    count = group[AGCUS]
    asks = 0
    for k in range(count):
        asks += _agcu_asks(m, m.agcu[group[FIRST_AGCU] + k], t)
    if asks:
        real = t + m.clock[SKIPPED]
        timed = m.dram[group[TIER], TIMED]
        if timed:
            working = first_taken(m.dram[group[TIER]], group, real)
        else:
            working = next_working(real, group[RATE_P], group[RATE_Q])
        if working > real:
            wake = min(wake, t + working - real)
        else:
            i = group[GROUP_TURN]
            while not m.agcu[group[FIRST_AGCU] + i, ASKS]:
                i = i + 1 if i + 1 < count else 0
            row = m.agcu[group[FIRST_AGCU] + i]
            row[GRANTED] = 1
            row[LINES] += 1
            if timed:
                line = row[HELD_LINE] if row[STORE] else m.chain[row[AGCU], ORIGIN] >> row[LINE_SHIFT]
                take(m, group, row, line, real)
            group[GROUP_TURN] = i + 1 if i + 1 < count else 0
    for k in range(count):
        wake = min(wake, _agcu_acts(m, m.agcu[group[FIRST_AGCU] + k], t))
    return wake


# ---- the run ------------------------------------------------------------------------------------------


@njit(**CALLED)
def tick(m, bits):
    """Everything of the present tick. Returns whether anything was scheduled."""
    t = m.clock[NOW]
    row = m.wheel[t % WHEEL]
    some = False
    for word in range(len(row)):
        left = row[word]
        if left == 0:
            continue
        row[word] = 0
        while left:
            node = word << 6 | _lowest(left)
            left &= left - np.uint64(1)
            if m.when[node] != t:
                continue
            m.when[node] = NEVER
            some = True
            kind, i = m.kind[node], m.place[node]
            if kind == PCU:
                wake = pcu_tick(m, i, t)
            elif kind == PMU:
                wake = pmu_tick(m, i, t, bits)
            elif kind == SWITCH:
                wake = switch_tick(m, i, t)
            else:
                wake = group_tick(m, i, t)
            if wake < NEVER:
                _wake(m, node, wake)
    return some


@njit(cache=True)
def close(m):
    """Account for all ticks up to the one that finds everything quiet."""
    for chain in range(len(m.chain)):
        account(m, chain, m.clock[QUIET] + 1, IDLE)
