"""The state of dataflow units in time: tables of integers, a row for each unit, link or queue, and their columns."""

from typing import NamedTuple

import numpy as np

from tilewright.arch import rdu as arch

# Literals of this file: a cached kernel would keep the old value of a constant changed elsewhere.
NEVER = 1 << 60
BUSY, OUTPUT, DRAIN, BANK, TOKEN, OPERAND, INTERVAL_CAUSE, MEMORY = range(8)
PIPELINE, IDLE = 10, 11
assert ("busy", *arch.CAUSES) == (
    *("busy", "output", "drain", "bank", "token", "operand", "interval"),
    *("memory", "launch", "arrival", "pipeline", "idle"),
)
LEVELS, TOKENS, TOKENS_HELD, PLANES = 6, 4, 15, 7
assert (arch.LEVELS, arch.TOKENS, arch.TOKENS_HELD, arch.BANK_BITS + 1) == (
    LEVELS,
    TOKENS,
    TOKENS_HELD,
    PLANES,
)
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
COUNTER, COUNT, STRIDE, DELTA = (17 + LEVELS * n for n in range(4))
QUEUE = 17 + 4 * LEVELS  # token queue of each input, -1: none
CHAIN = QUEUE + TOKENS

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
TABLE_DEPTH = ALWAYS + 2  # planes that a table has any access in
DEPTH = ALWAYS + 4  # and the accesses at hand
PMU_ROW = ALWAYS + 6

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
    LATER,  # ticks by which an answer comes later than of a closed bank that waits for nobody
    ACTIVATES,
    ROW_CONFLICTS,
    REFRESHES,
    AGCU_ROW,
) = range(13, 31)

# Machine.group: the AGCUs of one channel
FIRST_AGCU, AGCUS, RATE_P, RATE_Q, GROUP_TURN, TIER, FIRST_BANK = range(7)
# and, with timed banks, ticks from which on commands may issue
(
    LAST_COLUMN,  # of the last column command
    LAST_GROUP,  # its bank group
    LAST_WRITE,  # whether it writes
    NEXT_SAME,  # column command of the same bank group
    NEXT_OTHER,  # and of others
    NEXT_TURN,  # of the other direction
    NEXT_ACTIVATE,
    NEXT_CLOSED,  # precharge of the last bank for which that is allowed
    NEXT_REFRESH,
    GROUP_ROW,
) = range(7, 17)
# Machine.bank
OPEN_ROW, NEXT_COLUMN, NEXT_PRECHARGE, BANK_ROW = range(4)
# Machine.dram
TIMED, GROUP_BITS, COLUMN_BITS, BANK_OF_GROUP_BITS, TAKEN_AHEAD, RCD, RP, RAS, RTP, WTP = range(10)
CCD_S, CCD_L, RRD, RTW, WTR, REFI, RFC = range(10, 17)
assert arch.DRAM == (
    *("timed", "group_bits", "column_bits", "bank_bits", "ahead", "rcd", "rp", "ras", "rtp", "wtp"),
    *("ccd_s", "ccd_l", "rrd", "rtw", "wtr", "refi", "rfc"),
)

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
    place: np.ndarray  # int64[nodes]: row in the table of its kind
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
    bank: np.ndarray  # int64[banks of all groups, BANK_ROW]
    dram: np.ndarray  # int64[tiers, DRAM]
    switch: np.ndarray  # int64[switches, 4]: first input, inputs, first output, outputs
    ports: np.ndarray  # int64: their links
    flow_out: np.ndarray  # int64[flows]: outputs of a packet's switch, as a mask
    flow_next: np.ndarray  # int64[flows, 8]: its flow behind each
    ring: np.ndarray  # int64
    planes: np.ndarray  # uint64[pmus, 2, PLANES]: accesses left at each bank, in binary, a bank in each bit
    tables: np.ndarray  # uint64[rows, PLANES]: likewise for an address
