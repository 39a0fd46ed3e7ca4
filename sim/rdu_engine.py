"""Kernels of dataflow units in time: what each unit, switch and memory channel does in a tick.

Links decouple everything: what is pushed, popped or signalled in a tick is seen by others in later ticks only. So
nodes can be taken in any order within a tick, and only those that may do something: a node that waits sleeps until
the tick in which, as far as is known, its state changes, or until another node's push, pop or token wakes it. The
ticks between are charged when it wakes, to the cause it slept for.

A pipeline is a queue of the ticks in which results come out; where it stands still, they slip.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from tilewright.arch import rdu as arch
from tilewright.sim.cache import CALLED, INNER

# Literals of this file: a cached kernel would keep the old value of a constant changed elsewhere.
NEVER = 1 << 60
_BUSY, _OUTPUT, _DRAIN, _BANK, _TOKEN, _OPERAND, _INTERVAL, _MEMORY = range(8)
_PIPELINE, _IDLE = 10, 11
assert ("busy", *arch.CAUSES) == (
    *("busy", "output", "drain", "bank", "token", "operand", "interval"),
    *("memory", "launch", "arrival", "pipeline", "idle"),
)
_LEVELS, _TOKENS, _HELD, _PLANES = 6, 4, 15, 7
assert (arch.LEVELS, arch.TOKENS, arch.TOKENS_HELD, arch.BANK_BITS + 1) == (_LEVELS, _TOKENS, _HELD, _PLANES)
WHEEL = 64  # ticks ahead for which nodes can be scheduled

# Kinds of node.
PCU, PMU, SWITCH, GROUP = range(4)

# Columns of Machine.chain: a counter chain, one for each unit of the timeline.
(
    RUN,  # there is an iteration at hand
    GAP,  # the first tick that the interval allows
    ZEROS,  # it is the first of the levels up to this one
    ENDS,  # and the last of those up to this one
    LEAD,  # the innermost level that counts further than to one
    WAIT,
    WAIT_LEVEL,
    SIGNAL,
    SIGNAL_LEVEL,
    INTERVAL,
    ORIGIN,  # address of the iteration at hand
    MASK,  # of an address
    STEPS,
    SINCE,  # the tick up to which it is accounted for
    CAUSE,  # and what it does since
    FIRST,  # busy tick, -1: none
    END,  # the last, plus 1
) = range(17)
COUNTER, COUNT, STRIDE, DELTA = (17 + _LEVELS * n for n in range(4))
QUEUE = 17 + 4 * _LEVELS  # token queue of each input, -1: none
CHAIN = QUEUE + _TOKENS

# Machine.link
(
    BASE,  # of its slots
    CAPACITY,
    WRITE,  # slot of the next push
    READ,  # and of the next pop
    LEVEL,  # packets within
    FORWARD,
    BACKWARD,
    SOURCE,  # node that pushes
    SINK,  # node that pops
    HUNGRY,  # which waits for a push
    STARVED,  # and for a pop
    SENT,  # outputs of a switch that the head has left by
    TURN,  # input of a switch that comes first next
    WANT,  # outputs of a switch that the head wants, within a tick
    PUSHES,
    LINK,
) = range(16)

# Machine.queue: control tokens on their way to an input, or held there. BASE, then
SIZE, GIVEN, TAKEN, WAITER, EXPECTED, TOKEN_QUEUE = range(1, 7)

# Machine.pcu; a ring is base, mask, head, tail
(
    UNIT,  # its chain
    SYSTOLIC,
    LATENCY,  # from what enters the pipeline to the output
    FILL,  # from an iteration to the accumulators
    COLUMNS,
    FINAL,  # level of the iterations that give a result
    VECTOR,  # link, or -1
    SCALAR,
    VECTOR_FLOW,
    SCALAR_FLOW,
    SEQUENCE,
    STEP,
    PARTS,  # outputs by which the result has left: 1 vector, 2 scalar
    SLIP,  # ticks for which the pipeline has stood still
    FROZEN,  # it does since this tick; -1: it moves
    RING,
) = range(16)
ARRAY = RING + 4  # tiles that end in the array: ring
ARRAY_SLIP, ARRAY_FROZEN, LEFT, INPUTS_USED = range(ARRAY + 4, ARRAY + 8)
INPUT = INPUTS_USED + 1
INPUT_LEVEL = INPUT + 8
PCU_ROW = INPUT_LEVEL + 8

# Machine.pmu; what the two sides have each stands side by side, write first
(
    SIDE,  # chains
    _,
    FED,  # link
    GIVES,  # link, or -1
    GIVES_FLOW,
    PMU_SEQUENCE,
    PMU_STEP,
    OCCUPIED,
    _,
    OWED,  # tokens of the iteration at the banks
    _,
    INSIDE,  # lanes of it within range
    _,
    WRITE_FIRST,
    PMU_SLIP,
    PMU_FROZEN,
    PMU_RING,
) = range(17)
LOW = PMU_RING + 4
WORDS, SCALE = LOW + 1, LOW + 2
LANE = LOW + 3  # lane strides
TABLE = LOW + 5  # first rows of the tables of banks, -1: none
TABLE_MASK, SKEW_BITS, SKEW_SHIFT = LOW + 7, LOW + 8, LOW + 9
POSITION = LOW + 10
CONFLICTS = POSITION + 6
MOVED = CONFLICTS + 1  # words written, words read
DROPPED = CONFLICTS + 3
ALWAYS = CONFLICTS + 4  # no address is ever out of range
PMU_ROW = ALWAYS + 2

# Machine.agcu
(
    AGCU,  # its chain
    STORE,
    PORT,  # link
    AGCU_FLOW,
    AGCU_SEQUENCE,
    AGCU_STEP,
    AHEAD,  # ticks from a grant to the line buffer
    UNDER_WAY,
    VALID,  # a packet is at the output
    AGCU_RING,
) = range(10)
(
    SOME,
    HELD_LINE,
    DIRTY,
    DEBT,  # tokens that go out with the grant
    LINES,
    READY,  # the chain is; within a tick, like those that follow
    ASKS,
    AT_ONCE,  # the iteration needs no grant
    GRANTED,
    MOST,  # packets under way
    LINE_SHIFT,
    USED,  # bytes of an iteration
    ALIGNED,  # to multiples of these it must be
    AGCU_ROW,
) = range(13, 27)

# Machine.group: the AGCUs of one channel
FIRST_AGCU, AGCUS, RATE_P, RATE_Q, GROUP_TURN, GROUP_ROW = range(6)

# Machine.clock
(
    NOW,
    SKIPPED,  # ticks of periods that were taken in one step, which NOW does not count
    QUIET,  # the first tick that finds everything so far quiet
    ACTED,  # the last tick in which a unit did anything
    FAULT,
    FAULTY,  # where
    CREDIT,  # ticks of a credit on one link
    LANES,
    SEQUENCE_MASK,  # bits of sequence ids that matter
    CLOCK,
) = range(10)
TOKENS_FAULT, LINE_FAULT = 1, 2


class Machine(NamedTuple):
    """A kernel's state and configuration."""

    clock: np.ndarray  # int64[CLOCK]
    when: np.ndarray  # int64[nodes]: the tick for which each is scheduled
    wheel: np.ndarray  # uint64[WHEEL, words]: nodes by tick modulo WHEEL, as bits
    kind: np.ndarray  # int64[nodes]
    index: np.ndarray  # int64[nodes]: row in the table of its kind
    chain: np.ndarray  # int64[chains, CHAIN]
    activity: np.ndarray  # int64[chains, busy + causes]
    link: np.ndarray  # int64[links, LINK]
    slots: np.ndarray  # int64: of a packet, when it arrives; of a free place, when its credit does
    items: np.ndarray  # int64: flow and sequence id of the packet
    queue: np.ndarray  # int64[queues, TOKEN_QUEUE]
    tokens: np.ndarray  # int64: from which tick each counts
    wire: np.ndarray  # int64[chains * TOKENS + 1]: first wire of each output
    wire_queue: np.ndarray  # int64[wires]
    wire_ticks: np.ndarray  # int64[wires]
    pcu: np.ndarray  # int64[pcus, PCU_ROW]
    pmu: np.ndarray  # int64[pmus, PMU_ROW]
    agcu: np.ndarray  # int64[agcus, AGCU_ROW]
    group: np.ndarray  # int64[groups, GROUP_ROW]
    switch: np.ndarray  # int64[switches, 4]: first input, inputs, first output, outputs
    ports: np.ndarray  # int64: their links
    flow_out: np.ndarray  # int64[flows]: outputs of a packet's switch, as a mask
    flow_next: np.ndarray  # int64[flows, 8]: its flow behind each
    ring: np.ndarray  # int64
    planes: np.ndarray  # uint64[pmus, 2, PLANES]: accesses left at each bank, in binary, a bank in each bit
    tables: np.ndarray  # uint64[rows, PLANES]: likewise for an address


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
def _account(m, chain, tick, cause):
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
    for output in range(_TOKENS):
        if outputs >> output & 1:
            for w in range(m.wire[chain * _TOKENS + output], m.wire[chain * _TOKENS + output + 1]):
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
        for i in range(_TOKENS):
            if row[WAIT] >> i & 1:
                queue = m.queue[row[QUEUE + i]]
                if queue[GIVEN] == queue[TAKEN]:
                    queue[EXPECTED] = 1
                    latest = NEVER
                else:
                    latest = max(latest, m.tokens[queue[BASE] + queue[TAKEN] % queue[SIZE]])
    return latest


@njit(**INNER)
def _advance(m, chain, tick):
    """The iteration at hand is done. Returns the tokens that it raises."""
    row = m.chain[chain]
    if row[WAIT] and row[ZEROS] >= row[WAIT_LEVEL]:
        for i in range(_TOKENS):
            if row[WAIT] >> i & 1:
                queue = m.queue[row[QUEUE + i]]
                beyond = queue[TAKEN] + _HELD
                if queue[GIVEN] > beyond and m.tokens[queue[BASE] + beyond % queue[SIZE]] - 1 < tick:
                    m.clock[FAULT], m.clock[FAULTY] = TOKENS_FAULT, row[QUEUE + i]
                queue[TAKEN] += 1
    raises = row[SIGNAL] if row[ENDS] >= row[SIGNAL_LEVEL] else 0
    level = row[ENDS]
    if level >= _LEVELS:
        row[RUN] = 0
    else:
        for n in range(level):
            row[COUNTER + n] = 0
        row[COUNTER + level] += 1
        row[ORIGIN] = (row[ORIGIN] + row[DELTA + level]) & row[MASK]
        row[ZEROS] = level
        n = row[LEAD]
        if level == n:
            while n < _LEVELS and row[COUNTER + n] + 1 >= row[COUNT + n]:
                n += 1
        row[ENDS] = n if n < _LEVELS else _LEVELS + 2
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
    wake = NEVER
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
                _push(m, row[VECTOR], t, row[VECTOR_FLOW] << 16 | row[SEQUENCE])
                row[PARTS] |= 1
                acts = True
            else:
                full = True
        if row[SCALAR] >= 0 and not row[PARTS] & 2:
            other = _room(m, row[SCALAR], t)
            if other <= t:
                _push(m, row[SCALAR], t, row[SCALAR_FLOW] << 16 | row[SEQUENCE])
                row[PARTS] |= 2
                acts = True
            else:
                full = True
                room = max(room, other) if room > t else other
        if full:
            row[FROZEN] = t
        else:
            row[RING + 2] += 1
            row[PARTS] = 0
            row[SEQUENCE] = (row[SEQUENCE] + row[STEP]) & 0xFFFF
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
    cause = _IDLE
    if c[RUN]:
        token = _missing(m, chain, t)
        operand = np.int64(0)
        if token <= t or not stopped:
            for k in range(row[INPUTS_USED]):
                operand = max(operand, _head(m, row[INPUT + k]))
        if token <= t and operand <= t and c[GAP] <= t and not stopped:
            cause = _BUSY
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
            cause = _OUTPUT
        elif hold:
            cause = _DRAIN
        elif token > t:
            cause = _TOKEN
            wake = min(wake, token)
        elif operand > t:
            cause = _OPERAND
            wake = min(wake, operand)
        else:
            cause = _INTERVAL
            wake = min(wake, c[GAP])
    elif full:
        cause = _OUTPUT
    elif hold:
        cause = _DRAIN
    elif row[LEFT] or row[RING + 2] != row[RING + 3] or row[ARRAY + 2] != row[ARRAY + 3] or acts:
        cause = _PIPELINE
    _account(m, chain, t, cause)
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


@njit(**CALLED)
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
        for k in range(_PLANES):
            planes[k] = table[k]
    else:
        inside = 0
        for k in range(lanes):
            at = (word + k * lane) & 0xFFFFFF
            if at < row[WORDS]:
                inside += 1
                _add(planes, _bank(row, at, bits))
    row[INSIDE + side] = inside
    row[DROPPED] += lanes - inside
    row[OCCUPIED + side] = 1


@njit(**INNER)
def _wanted(planes):
    out = planes[0]
    for k in range(1, _PLANES):
        out |= planes[k]
    return out


@njit(**INNER)
def _serve(planes, banks):
    """One access at each of these banks is done. Returns whether any are left."""
    borrow = banks
    left = np.uint64(0)
    for k in range(_PLANES):
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
    return np.int64((x * np.uint64(0x0101010101010101)) >> np.uint64(56))


@njit(**INNER)
def pmu_tick(m, i, t, bits):
    row = m.pmu[i]
    wake = NEVER
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
                _push(m, row[GIVES], t, row[GIVES_FLOW] << 16 | row[PMU_SEQUENCE])
            row[PMU_SEQUENCE] = (row[PMU_SEQUENCE] + row[PMU_STEP]) & 0xFFFF
            row[PMU_RING + 2] += 1
            acts = True
        else:
            move = False
            row[PMU_FROZEN] = t

    # The banks.
    writes = reads = np.uint64(0)
    if row[OCCUPIED]:
        writes = _wanted(m.planes[i, 0])
    if row[OCCUPIED + 1] and move:
        reads = _wanted(m.planes[i, 1])
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
        written = not _serve(m.planes[i, 0], writes)
        conflict = not written
        acts = True
    if row[OCCUPIED + 1] and move:
        row[MOVED + 1] += _ones(reads)
        read_done = not _serve(m.planes[i, 1], reads)
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
    cause = _PIPELINE if row[OCCUPIED] else _IDLE
    if written:
        row[OCCUPIED] = 0
    if not free:
        cause = _BANK
    elif c[RUN]:
        token, operand = _missing(m, write, t), _head(m, row[FED])
        if token <= t and operand <= t and c[GAP] <= t:
            cause = _BUSY
            sequence = _pop(m, row[FED], t) & 0xFFFF
            _access(m, i, 0, c[ORIGIN] + sequence * row[SCALE], bits)
            row[OWED] = _advance(m, write, t)
            acts = True
        elif token > t:
            cause = _TOKEN
            wake = min(wake, token)
        elif operand > t:
            cause = _OPERAND
            wake = min(wake, operand)
        else:
            cause = _INTERVAL
            wake = min(wake, c[GAP])
    _account(m, write, t, cause)

    # The read side.
    c = m.chain[read]
    under_way = row[OCCUPIED + 1] or due < NEVER
    cause = _PIPELINE if under_way else _IDLE
    if read_done:
        row[OCCUPIED + 1] = 0
    if not move:
        cause = _OUTPUT
    elif not read_free:
        cause = _BANK
    elif c[RUN]:
        token = _missing(m, read, t)
        if token <= t and c[GAP] <= t:
            cause = _BUSY
            _access(m, i, 1, c[ORIGIN], bits)
            row[OWED + 1] = _advance(m, read, t)
            acts = True
        elif token > t:
            cause = _TOKEN
            wake = min(wake, token)
        else:
            cause = _INTERVAL
            wake = min(wake, c[GAP])
    _account(m, read, t, cause)

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
    wake = NEVER
    item = m.items[row[BASE] + row[READ]]
    wants = m.flow_out[item >> 16] & ~row[SENT]
    for o in range(outs):
        if wants >> o & 1:
            out = m.ports[first_out + o]
            room = _room(m, out, t)
            if room <= t:
                _push(m, out, t, m.flow_next[item >> 16, o] << 16 | item & 0xFFFF)
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
    wake = NEVER
    for i in range(ins):
        link = m.ports[first + i]
        row = m.link[link]
        row[WANT] = 0
        head = _head(m, link)
        if head <= t:
            row[WANT] = m.flow_out[m.items[row[BASE] + row[READ]] >> 16] & ~row[SENT]
        else:
            wake = min(wake, head)
    for o in range(outs):
        out = m.ports[first_out + o]
        turn = m.link[out, TURN]
        chosen = -1
        several = False
        for k in range(ins):
            i = turn + k
            if i >= ins:
                i -= ins
            if m.link[m.ports[first + i], WANT] >> o & 1:
                if chosen < 0:
                    chosen = i
                else:
                    several = True
        if chosen < 0:
            continue
        room = _room(m, out, t)
        if room > t:
            wake = min(wake, room)
            continue
        row = m.link[m.ports[first + chosen]]
        item = m.items[row[BASE] + row[READ]]
        _push(m, out, t, m.flow_next[item >> 16, o] << 16 | item & 0xFFFF)
        m.link[out, TURN] = 0 if chosen + 1 == ins else chosen + 1
        row[SENT] |= 1 << o
        row[WANT] &= ~(1 << o)
        if several:
            wake = min(wake, t + 1)
    for i in range(ins):
        link = m.ports[first + i]
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
    wake = NEVER
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
                _push(m, row[PORT], t, row[AGCU_FLOW] << 16 | row[AGCU_SEQUENCE])
                row[AGCU_SEQUENCE] = (row[AGCU_SEQUENCE] + row[AGCU_STEP]) & 0xFFFF
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
        cause = _BUSY
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
            _put(m, row, AGCU_RING, t + (row[AHEAD] if row[GRANTED] else 1))
            row[UNDER_WAY] += 1
            if raises:
                _give(m, chain, raises, t)
        acts = True
    elif full and (crowded or not c[RUN]):
        cause = _OUTPUT
    elif c[RUN]:
        token = _missing(m, chain, t)
        if token > t:
            cause = _TOKEN
            wake = min(wake, token)
        elif operand > t:
            cause = _OPERAND
            wake = min(wake, operand)
        elif c[GAP] > t:
            cause = _INTERVAL
            wake = min(wake, c[GAP])
        else:
            cause = _MEMORY
    else:
        cause = _PIPELINE if under_way else _IDLE
    _account(m, chain, t, cause)
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
    wake = NEVER
    count = group[AGCUS]
    asks = 0
    for k in range(count):
        asks += _agcu_asks(m, m.agcu[group[FIRST_AGCU] + k], t)
    if asks:
        real = t + m.clock[SKIPPED]
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
            group[GROUP_TURN] = i + 1 if i + 1 < count else 0
    for k in range(count):
        wake = min(wake, _agcu_acts(m, m.agcu[group[FIRST_AGCU] + k], t))
    return wake


# ---- the run ------------------------------------------------------------------------------------------


@njit(**INNER)
def _lowest(x):
    """The number of the lowest bit that is set."""
    return _ones((x & -x) - np.uint64(1))


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
            kind, i = m.kind[node], m.index[node]
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
        _account(m, chain, m.clock[QUIET] + 1, _IDLE)


# ---- periods ------------------------------------------------------------------------------------------


def _flush(m: Machine) -> None:
    """Account for all ticks up to now."""
    since = m.clock[NOW] - m.chain[:, SINCE]
    np.add.at(m.activity, (np.arange(len(m.chain)), m.chain[:, CAUSE]), since)
    m.chain[:, SINCE] = m.clock[NOW]


@njit(**INNER)
def _ahead(tick, now):
    """Ticks from now on; what is over is over."""
    return max(tick - now, 0)


@njit(**INNER)
def _periods(m, s, chain):
    """How often the chain can go on as from s to m; NEVER: for ever, -1: it did not come back."""
    a, b = s.chain[chain], m.chain[chain]
    if a[RUN] != b[RUN] or a[ZEROS] != b[ZEROS] or a[ENDS] != b[ENDS]:
        return -1
    if _ahead(a[GAP], s.clock[NOW]) != _ahead(b[GAP], m.clock[NOW]):
        return -1
    out = NEVER
    for n in range(_LEVELS):
        if a[COUNTER + n] != b[COUNTER + n]:
            by = b[COUNTER + n] - a[COUNTER + n]
            if out < NEVER or by < 0 or a[COUNTER + n] == 0:
                return -1
            # The step that ends the level is not taken: what depends on it would be new.
            out = (b[COUNT + n] - 1 - b[COUNTER + n]) // by
    return out


@njit(**INNER)
def _same_ring(m, s, a, b, ring, slip, frozen):
    """Whether the same comes out of two pipelines in as many ticks from now; `slip` and `frozen` are columns."""
    count = b[ring + 3] - b[ring + 2]
    if a[ring + 3] - a[ring + 2] != count or (a[frozen] < 0) != (b[frozen] < 0):
        return False
    before = a[slip] - (a[frozen] if a[frozen] >= 0 else s.clock[NOW])
    after = b[slip] - (b[frozen] if b[frozen] >= 0 else m.clock[NOW])
    for k in range(count):
        x = s.ring[a[ring] + (a[ring + 2] + k & a[ring + 1])] + before
        if x != m.ring[b[ring] + (b[ring + 2] + k & b[ring + 1])] + after:
            return False
    return True


@njit(**CALLED)
def _same_pcu(m, s, i):
    a, b = s.pcu[i], m.pcu[i]
    mask = m.clock[SEQUENCE_MASK]
    if a[PARTS] != b[PARTS] or a[LEFT] != b[LEFT] or (a[SEQUENCE] ^ b[SEQUENCE]) & mask:
        return False
    return _same_ring(m, s, a, b, RING, SLIP, FROZEN) and _same_ring(
        m, s, a, b, ARRAY, ARRAY_SLIP, ARRAY_FROZEN
    )


@njit(**CALLED)
def _same_pmu(m, s, i):
    a, b = s.pmu[i], m.pmu[i]
    if a[WRITE_FIRST] != b[WRITE_FIRST] or (a[PMU_SEQUENCE] ^ b[PMU_SEQUENCE]) & m.clock[SEQUENCE_MASK]:
        return False
    for side in range(2):
        for column in (OCCUPIED, OWED, INSIDE):
            if a[column + side] != b[column + side]:
                return False
        for k in range(_PLANES):
            if s.planes[i, side, k] != m.planes[i, side, k]:
                return False
        # Addresses must meet the same banks, and the same bounds.
        differs = s.chain[a[SIDE + side], ORIGIN] ^ m.chain[b[SIDE + side], ORIGIN]
        if b[ALWAYS + side]:
            differs = (s.chain[a[SIDE + side], ORIGIN] - m.chain[b[SIDE + side], ORIGIN]) & b[TABLE_MASK]
        if differs:
            return False
    return _same_ring(m, s, a, b, PMU_RING, PMU_SLIP, PMU_FROZEN)


@njit(**CALLED)
def _same_agcu(m, s, i):
    a, b = s.agcu[i], m.agcu[i]
    for column in (UNDER_WAY, VALID, SOME, DIRTY, DEBT):
        if a[column] != b[column]:
            return False
    if (a[AGCU_SEQUENCE] ^ b[AGCU_SEQUENCE]) & m.clock[SEQUENCE_MASK]:
        return False
    before, after = s.chain[a[AGCU], ORIGIN], m.chain[b[AGCU], ORIGIN]
    if (after - before) & ((1 << b[LINE_SHIFT]) - 1):
        return False
    moved = ((after - before) & m.chain[b[AGCU], MASK]) >> b[LINE_SHIFT]
    if b[SOME] and (b[HELD_LINE] - a[HELD_LINE] - moved) & (m.chain[b[AGCU], MASK] >> b[LINE_SHIFT]):
        return False
    count = b[AGCU_RING + 3] - b[AGCU_RING + 2]
    if a[AGCU_RING + 3] - a[AGCU_RING + 2] != count:
        return False
    for k in range(count):
        x = s.ring[a[AGCU_RING] + (a[AGCU_RING + 2] + k & a[AGCU_RING + 1])]
        y = m.ring[b[AGCU_RING] + (b[AGCU_RING + 2] + k & b[AGCU_RING + 1])]
        if _ahead(x, s.clock[NOW]) != _ahead(y, m.clock[NOW]):
            return False
    return True


@njit(**CALLED)
def _same_group(m, s, i):
    a, b = s.group[i], m.group[i]
    if a[GROUP_TURN] != b[GROUP_TURN]:
        return False
    idle = True
    for k in range(b[FIRST_AGCU], b[FIRST_AGCU] + b[AGCUS]):
        idle &= not m.chain[m.agcu[k, AGCU], RUN] and not m.agcu[k, DIRTY]
        idle &= not s.chain[s.agcu[k, AGCU], RUN] and not s.agcu[k, DIRTY]
    ticks = m.clock[NOW] + m.clock[SKIPPED] - s.clock[NOW] - s.clock[SKIPPED]
    return idle or ticks % b[RATE_Q] * b[RATE_P] % b[RATE_Q] == 0


@njit(**CALLED)
def _same_link(m, s, i):
    a, b = s.link[i], m.link[i]
    if a[LEVEL] != b[LEVEL] or a[SENT] != b[SENT] or a[TURN] != b[TURN]:
        return False
    mask = ~np.int64(0xFFFF) | m.clock[SEQUENCE_MASK]
    x, y = a[READ], b[READ]
    for k in range(b[CAPACITY]):
        at, on = a[BASE] + x, b[BASE] + y
        if _ahead(s.slots[at], s.clock[NOW]) != _ahead(m.slots[on], m.clock[NOW]):
            return False
        if k < b[LEVEL] and (s.items[at] ^ m.items[on]) & mask:
            return False
        x = x + 1 if x + 1 < a[CAPACITY] else 0
        y = y + 1 if y + 1 < b[CAPACITY] else 0
    return True


@njit(**CALLED)
def _same_queue(m, s, i):
    a, b = s.queue[i], m.queue[i]
    if a[GIVEN] - a[TAKEN] != b[GIVEN] - b[TAKEN]:
        return False
    for k in range(b[GIVEN] - b[TAKEN]):
        x = s.tokens[a[BASE] + (a[TAKEN] + k) % a[SIZE]]
        y = m.tokens[b[BASE] + (b[TAKEN] + k) % b[SIZE]]
        if _ahead(x, s.clock[NOW]) != _ahead(y, m.clock[NOW]):
            return False
    return True


@njit(**CALLED)
def _again(m, s, i, least):
    """How many periods part i of the machine allows; -1 where that is below `least`, or it is not as it was."""
    if i < len(m.chain):
        out = _periods(m, s, i)
        return out if out >= least else -1
    i -= len(m.chain)
    if i < len(m.pcu):
        return NEVER if _same_pcu(m, s, i) else -1
    i -= len(m.pcu)
    if i < len(m.pmu):
        return NEVER if _same_pmu(m, s, i) else -1
    i -= len(m.pmu)
    if i < len(m.agcu):
        return NEVER if _same_agcu(m, s, i) else -1
    i -= len(m.agcu)
    if i < len(m.group):
        return NEVER if _same_group(m, s, i) else -1
    i -= len(m.group)
    if i < len(m.link):
        return NEVER if _same_link(m, s, i) else -1
    return NEVER if _same_queue(m, s, i - len(m.link)) else -1


def _leap(m: Machine, s: Machine, times: int) -> None:
    """Take the period from s to m so many times more. Queues stay as they are, and so does NOW."""
    period = m.clock[NOW] + m.clock[SKIPPED] - s.clock[NOW] - s.clock[SKIPPED]

    def more(table: str, columns: list[int] | slice) -> np.ndarray:
        return (getattr(m, table)[:, columns] - getattr(s, table)[:, columns]) * times

    m.activity[:] += more("activity", slice(None))
    c = m.chain
    counters = slice(COUNTER, COUNTER + _LEVELS)
    by = more("chain", counters)
    c[:, counters] += by
    c[:, ORIGIN] = c[:, ORIGIN] + (by * c[:, STRIDE : STRIDE + _LEVELS]).sum(axis=1) & c[:, MASK]
    at_end = c[:, counters] + 1 >= c[:, COUNT : COUNT + _LEVELS]
    c[:, ENDS] = np.where(at_end.all(axis=1), _LEVELS + 2, (~at_end).argmax(axis=1))
    steps = more("chain", [STEPS])[:, 0]
    c[:, STEPS] += steps
    c[:, END] += np.where(steps, period * times, 0)
    line = m.agcu[:, HELD_LINE] + more("agcu", [HELD_LINE])[:, 0]
    m.agcu[:, HELD_LINE] = line & c[m.agcu[:, AGCU], MASK] >> m.agcu[:, LINE_SHIFT]
    for table, counted, sequence in (
        ("pcu", [], SEQUENCE),
        ("pmu", [CONFLICTS, MOVED, MOVED + 1, DROPPED], PMU_SEQUENCE),
        ("agcu", [LINES], AGCU_SEQUENCE),
    ):
        rows = getattr(m, table)
        rows[:, [*counted, sequence]] += more(table, [*counted, sequence])
        rows[:, sequence] &= 0xFFFF
    m.link[:, PUSHES] += more("link", [PUSHES])[:, 0]
    m.clock[SKIPPED] += period * times


# What a run never changes.
_FIXED = (
    "kind",
    "index",
    "wire",
    "wire_queue",
    "wire_ticks",
    "switch",
    "ports",
    "flow_out",
    "flow_next",
    "tables",
)
# What `advance` keeps between calls: ticks without anything scheduled, ticks simulated, the part compared last.
ASLEEP, TICKS, PART, PROGRESS = range(4)


@njit(cache=True)
def advance(m, s, bits, progress, compare, until):
    """Tick by tick, until nothing is scheduled or something is wrong: 0; or until that many ticks were simulated: -1.

    With `compare` also until the state is as in the snapshot s: the number of periods that may follow.
    """
    parts = len(m.chain) + len(m.pcu) + len(m.pmu) + len(m.agcu) + len(m.group) + len(m.link) + len(m.queue)
    while progress[ASLEEP] < WHEEL and not m.clock[FAULT]:
        if progress[TICKS] >= until:
            return -1
        progress[ASLEEP] = 0 if tick(m, bits) else progress[ASLEEP] + 1
        m.clock[NOW] += 1
        progress[TICKS] += 1
        if compare:
            period = m.clock[NOW] + m.clock[SKIPPED] - s.clock[NOW] - s.clock[SKIPPED]
            least = max(64, progress[TICKS] >> 3) // period + 1  # a leap must be worth its copies
            times = NEVER
            for _ in range(parts):
                # What differed last is compared first, so most comparisons end at once.
                times = min(times, _again(m, s, progress[PART], least))
                if times < 0:
                    break
                progress[PART] = progress[PART] + 1 if progress[PART] + 1 < parts else 0
            if 0 < times < NEVER:
                return times
    return 0


def run(m: Machine, bits: int, fold: bool) -> int:
    """Until everything is quiet or something is wrong. Returns the ticks that were simulated.

    With `fold` the state is compared in every tick with a snapshot that is renewed whenever twice as many ticks have
    passed (Brent's cycle detection).
    """
    progress = np.zeros(PROGRESS, np.int64)
    began, span, kept = 0, 32, m
    while times := advance(m, kept, bits, progress, kept is not m, began + span if fold else NEVER):
        _flush(m)
        if times > 0:
            _leap(m, kept, times)
            began, span, kept = int(progress[TICKS]), 32, m
        else:
            kept = Machine(*(a if n in _FIXED else a.copy() for n, a in zip(Machine._fields, m, strict=True)))
            span *= 2
    return int(progress[TICKS])
