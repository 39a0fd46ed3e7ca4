"""The state of a drive in time: arrays of integers, their columns, and what drive and kernels both do to them."""

from typing import NamedTuple

import numpy as np
from numba import njit

from tilewright.arch import csd as arch
from tilewright.sim.cache import INNER
from tilewright.sim.csd_flash import Channels

Array = np.ndarray

# Literals of `sim/`: a cached kernel would keep the old value of a constant changed elsewhere.
NEVER = 1 << 62
CONFIG, ATTEND, WRITE, TRANSPOSE, READ, RECLAIM, GPU, LINK = range(8)
assert tuple(arch.OP) == ("CONFIG", "ATTEND", "WRITE", "TRANSPOSE", "READ", "RECLAIM", "GPU", "LINK")
FINISH, PAUSE = 98, 99  # behind the last command: the run ends; a CONFIG follows that is not there yet
TOKENS_FORM, CHANNELS_FORM = range(2)
assert arch.FORMS == ("tokens", "channels")

# Units, causes of ticks, and counters.
DECODER, WRITER, FETCH, ARGTOPK, KERNEL = range(5)
assert arch.SINGLE_UNITS == ("decoder", "writer", "fetch", "argtopk")
BUSY, ARRAY, FLASH, TOPK, QUEUE, ORDER, ARRIVAL, DRAIN, IDLE = range(9)
assert arch.CAUSES == ("array", "flash", "argtopk", "queue", "order", "arrival", "drain", "idle")
CHANNEL_PAGES, CHANNEL_SKIPPED, TOKEN_PAGES, TOKEN_SKIPPED, OTHER_PAGES, PROGRAMS, ERASES = range(7)
FORWARDED_LINES, VECTOR_LINES, GROUP_LINES, PRODUCTS, EXPONENTIALS, COMPARED_WORDS, SCALAR_STEPS = range(
    7, 14
)
GPU_OPS, GPU_BYTES, LINK_BYTES = range(14, 17)
COUNTERS = (*arch.COUNTERS, *arch.SYSTEM_COUNTERS)
assert COUNTERS == (
    *("channel_pages", "channel_pages_skipped", "token_pages", "token_pages_skipped", "other_pages"),
    *("programs", "erases", "forwarded_lines", "vector_lines", "group_lines"),
    *("products", "exponentials", "compared_words", "scalar_steps"),
    *("gpu_ops", "gpu_bytes", "link_bytes", "host_bytes", "ssd_read_bytes", "ssd_write_bytes"),
)

# Columns of Drive.code: fields of the command, then those of the CONFIG that holds for it. PAGES and PAGES2 are where
# the numbers of its pages begin: those that it reads [heads, ...] (of an ATTEND those of tokens, then of channels), and
# those that it programs or erases. MASKS: where its masks begin.
FIELDS = (
    *(
        "op",
        "slot",
        "heads",
        "tokens",
        "spans",
        "form",
        "first",
        "count",
        "after",
        "not_before",
        "operations",
    ),
    *("bytes", "path", "tag"),
)
OP, SLOT, HEADS, TOKENS, SPANS, FORM, FIRST, COUNT, AFTER, NOT_BEFORE, OPERATIONS, BYTES, PATH, TAG = range(
    14
)
SETTINGS = (*("attention", "d", "group", "r", "k", "local", "mean", "page_tokens", "page_channels", "span"),)
ATTENTION, D, GROUP, R, K, LOCAL, MEAN, PAGE_TOKENS, PAGE_CHANNELS, SPAN = range(14, 24)
PAGES, PAGES2, MASKS = range(24, 27)
REST = 27  # the run may pause before it, if nothing but the GPU is at work
CODE_COLUMNS = 28
PLACED = (PAGES, PAGES2, MASKS, TAG, NOT_BEFORE, REST)  # where and when a command is, not what it does

# Columns of Drive.log: first tick and tick after the last, -1 before; heads that are not done.
LOG_FIRST, LOG_END, LOG_HEADS = range(3)

# Columns of Drive.kernels. A kernel sets NEXT, the tick of its next own step, and is asked at that tick's end.
(
    K_BUSY,
    K_COMMAND,  # row of the code
    K_HEAD,  # within the command
    K_NEXT,
    K_PHASE,
    K_READ_LEFT,  # lines that it still wants to read from the vectors,
    K_WRITE_LEFT,  # to write there,
    K_SUM_LEFT,  # words of sums that it wants to read
    K_TOPK_WANTS,
    K_ASK,  # for a pass, with what follows
    K_FORM,
    K_VALUES,
    K_TURN,
    K_ALL,
    K_FIRST,
    K_N,
    K_ROWS,
    K_ROW_LINES,
    K_ACCEPTED,  # in this tick
    K_LIMIT,  # rows of the pass for which there is room
    K_IDLE_FROM,  # all pages of its passes were looked at before this tick
    K_TAKES,  # it takes the next head while it works on one, when its filter is idle
    K_FOLLOWS,  # it has a following head, with what follows
    K_NEXT_COMMAND,
    K_NEXT_HEAD,
    K_ASK_COMMAND,  # the command and the head that the pass is for
    K_ASK_HEAD,
) = range(27)
K_OWN = 27  # columns from here on are the kernel's own
KERNEL_COLUMNS = K_OWN + 51

# Columns of Drive.filters: a page filter of each kernel, and the pass that it works on.
(
    F_BUSY,
    F_FREE,  # not busy from this tick on
    F_READY,  # the tick from which its page may be looked at
    F_COUNT,  # rows of it that are wanted
    F_PASSES,  # it is read
    F_HERE,  # its entries
    F_LEFT,  # entries from it on
    F_LEVEL,  # of these, bits of the mask that were taken
    F_PAGE,  # its number
    F_RANK,  # rows wanted before it
    F_MASK,  # where its entries begin in the masks, -1: all are wanted
    F_FORM,
    F_TURN,
    F_ROWS,
    F_ROW_LINES,
    F_STAGED,  # the first page in the group buffer
    F_SLOT,
    F_POSITION,  # of page 0 in the table
    F_NUMBERS,  # and where its number is in `pages`,
    F_STEP,  # and the step to the next page in both
    F_TAG,
) = range(21)
FILTER_COLUMNS = 21

# Columns of Drive.shares: ports that kernels share, a line a tick: of the vectors to read and to write, and of the sums.
READ_PORT, WRITE_PORT, SUM_PORT = range(3)
# Given out up to tick AT; whose turn it is; when a user has his last line; ticks that are the mover's.
S_AT, S_TURN, S_NEXT, S_CLOSED, S_OPEN = range(5)

# Drive.one
(
    INDEX,  # the decoder's next command
    NOW,
    STOPPED,
    DECODER_NEXT,  # ticks in which units have something to do
    HAND_NEXT,
    MOVER_NEXT,
    FETCH_NEXT,
    FLASH_NEXT,
    GRANT_NEXT,
    TOPK_NEXT,
    WORKING,  # kernels at work
    DRAINING,  # the decoder waits for the channels
    HAND_TURN,
    HAND_HEAD,
    FETCH_TAG,  # of what fetch does in this tick, -1: nothing
    LOOKUP_TURN,
    STAGING_TURN,
    LOOKED_FROM,  # a page waits for its controller from this tick on, with what follows
    LOOKED_CHANNEL,
    LOOKED_NUMBER,
    LOOKED_PORT,
    LOOKED_LINES,
    LOOKED_BATCH,
    LOOKED_TAG,
    PUSHED_AT,  # fetch gave a controller a page in this tick
    PUSHED,
    TOPK_TURN,
    TOPK_RELEASE,  # the last tick in which the argtopk unit has a user
    DRIVE_TAG,  # of the last command for the drive, and the last ATTEND
    ATTEND_TAG,
    MOVER_COMMAND,
    MOVER_PHASE,
    MOVER_HEAD,
    MOVER_ITEM,
    MOVER_STAGE,
    MOVER_READ,  # next number in `pages` of pages that it reads, and that it programs or erases
    MOVER_PAGE,
    MOVER_LINES,  # that it waits for
    MOVER_LOOKUPS,
    MOVER_LOOKS,  # the tick from which it wants the lookup
    MOVER_BLOCKED,  # by this channel, -1: by none
    GPU_ROW,  # the oldest of their commands that may not have ended
    LINK_ROW,
    GPU_END,
    LINK_END,
    STUCK,  # the drive would wait for ever
    RESUMED,  # command before which it does not pause again
    LIMIT,  # the first command whose pages are not there yet
    ANEW,  # turns are given anew at the end of the tick before
    SHARES_NEXT,  # the first S_NEXT of all ports
) = range(50)
SCALARS = 50
WAKES = (HAND_NEXT, MOVER_NEXT, FETCH_NEXT, FLASH_NEXT, GRANT_NEXT, TOPK_NEXT, LOOKED_FROM, SHARES_NEXT)


class Drive(NamedTuple):
    """All that changes, and the commands that are executed: n of them; k kernels, u units."""

    code: Array  # [n + 1, 28], FINISH or PAUSE the last one
    pages: Array  # uint32: numbers of pages in the logs of their channels
    masks: Array  # uint8: of the heads of each ATTEND that estimates, channels and then tokens
    log: Array  # [n + 1, 3]
    flash: Channels
    kernels: Array  # [k, 78]
    filters: Array  # [k, 20]
    shares: Array  # [3, 5]
    wants: Array  # [3, k] whether the kernel is known to want the port
    one: Array  # [50]
    queue: Array  # [2, command_queue] rows of the code: reads, writes
    level: Array  # [2]
    head: Array  # [2] the tick from which a queue's oldest command is seen
    charge: Array  # [u, 3] what a unit's ticks count as, for which tag, since when
    activity: Array  # [tags + 1, u, 1 + causes]
    counters: Array  # [tags + 1, counters]


@njit(**INNER)
def charge(d, unit, cause, tag, now):
    """The ticks of a unit from `now` on count as `cause` for `tag`."""
    row = d.charge[unit]
    d.activity[row[1], unit, row[0]] += now - row[2]
    row[0], row[1], row[2] = cause, tag, now


@njit(**INNER)
def rest(d, unit, now):
    """From `now` on a unit has nothing to do."""
    charge(d, unit, IDLE, d.activity.shape[0] - 1, now)


@njit(**INNER)
def channel_of(slot, position, channels):
    """`arch.csd.channel_of`."""
    pair = position >> 1
    return (slot + pair + pair // channels + (position & 1) * (channels >> 1)) & (channels - 1)


@njit(**INNER)
def count(d, tag, counter, n):
    d.counters[tag, counter] += n


@njit(**INNER)
def head_done(d, k, now):
    """Kernel k is done with its head in tick `now`: others see it at rest from the next one on."""
    one = d.one
    i = d.kernels[k, K_COMMAND]
    one[WORKING] -= 1
    d.log[i, LOG_HEADS] -= 1
    if d.log[i, LOG_HEADS] == 0:
        d.log[i, LOG_END] = now + 1
    one[DECODER_NEXT] = min(one[DECODER_NEXT], now + 1)
    one[HAND_NEXT] = min(one[HAND_NEXT], now + 1)
