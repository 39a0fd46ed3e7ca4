"""A drive in time, by events: decoder, queues, mover, fetch and staging around kernels and flash controllers.

The rules, which the RTL implements anew (`rtl/csd/top.py`). What is pushed, dispatched or done in a tick is seen by
others from the next one on; what a unit does in a tick follows from what was at its beginning.

- *Decoder*: one command a tick, in order. It waits, charged in this order, while the queue of its kind is full
  (`command_queue` reads, as many writes); a CONFIG while the drive works, reads while writes are under way, and these
  for reads; for what it comes `after`; for its `not_before`. A CONFIG, and a command that comes after the drive, give
  turns anew: from the next tick on all that go round begin with the first one. A command is in its queue from the tick after its dispatch
  to the one in which it is complete, an ATTEND to the one in which its last head is handed to a kernel. The run ends
  with a tick that finds everything at rest, background programs and erases included.
- *GPU and link* take their commands in order, from the tick after dispatch on, each for as long as its amount takes.
- *Hand-over*: the heads of the oldest ATTEND go to kernels that are at rest, or take the next head while they end one, one
  a tick, round robin.
- *Filters*: each kernel's works for one pass at a time. It looks at one page a tick, after taking the words of its mask,
  `lanes` entries a tick, and not before the kernel has room for its rows. A page in flash needs the lookup, one a tick,
  round robin over kernels and mover; it is in the register behind it from the next tick on, until its controller
  takes it. A page in the group buffer needs room in that buffer's queue, also one a tick, round robin.
- *Ports* of vectors and sums give a line a tick, round robin over kernels; at the port to write a line that was read for
  the host goes first. The argtopk unit is one kernel's until he gives it back.
- *Mover*: all other commands, one at a time. It loads a command in one tick, works, and finishes in one tick. It moves a
  line a tick; a page is pushed when its controller has room and fetch does not push there. READ waits for the lines of
  a page before it looks up the next one, TRANSPOSE for those of a span before it programs.

Within a tick: decoder, hand-over, flash, fetch, mover, ports of rows, shared ports, then kernels.

A stalled tick of the decoder belongs to the tag of what it waits for: of the command that is at work in the GPU or on the
link, of the last one given to the drive; the drive comes first, then the link.
"""

import numpy as np
from numba import njit

from tilewright.sim import csd_kernel
from tilewright.sim.cache import CALLED, INNER
from tilewright.sim.csd_flash import (
    begin_anew,
    catch_up,
    finish_channels,
    forwarded,
    grant,
    held,
    push,
    room_at,
    stage,
    staged,
    step_rows,
)
from tilewright.sim.csd_state import (
    AFTER,
    ANEW,
    ARRIVAL,
    ATTEND,
    ATTEND_TAG,
    BUSY,
    BYTES,
    CHANNEL_PAGES,
    CHANNEL_SKIPPED,
    CHANNELS_FORM,
    CONFIG,
    COUNT,
    DECODER,
    DECODER_NEXT,
    DRAIN,
    DRAINING,
    DRIVE_TAG,
    ERASES,
    F_BUSY,
    F_COUNT,
    F_FORM,
    F_FREE,
    F_HERE,
    F_LEFT,
    F_LEVEL,
    F_MASK,
    F_NUMBERS,
    F_PAGE,
    F_PASSES,
    F_POSITION,
    F_RANK,
    F_READY,
    F_ROW_LINES,
    F_ROWS,
    F_SLOT,
    F_STAGED,
    F_STEP,
    F_TAG,
    F_TURN,
    FETCH,
    FETCH_NEXT,
    FETCH_TAG,
    FINISH,
    FIRST,
    FLASH,
    FLASH_NEXT,
    FORM,
    FORWARDED_LINES,
    GPU,
    GPU_BYTES,
    GPU_END,
    GPU_OPS,
    GPU_ROW,
    GRANT_NEXT,
    GROUP_LINES,
    HAND_HEAD,
    HAND_NEXT,
    HAND_TURN,
    HEADS,
    IDLE,
    INDEX,
    K_ACCEPTED,
    K_ALL,
    K_ASK,
    K_ASK_COMMAND,
    K_ASK_HEAD,
    K_BUSY,
    K_COMMAND,
    K_FIRST,
    K_FOLLOWS,
    K_FORM,
    K_HEAD,
    K_IDLE_FROM,
    K_LIMIT,
    K_N,
    K_NEXT,
    K_NEXT_COMMAND,
    K_NEXT_HEAD,
    K_PHASE,
    K_READ_LEFT,
    K_ROW_LINES,
    K_ROWS,
    K_TAKES,
    K_TOPK_WANTS,
    K_TURN,
    K_VALUES,
    KERNEL,
    LIMIT,
    LINK,
    LINK_BYTES,
    LINK_END,
    LINK_ROW,
    LOG_END,
    LOG_FIRST,
    LOG_HEADS,
    LOOKED_BATCH,
    LOOKED_CHANNEL,
    LOOKED_FROM,
    LOOKED_LINES,
    LOOKED_NUMBER,
    LOOKED_PORT,
    LOOKED_TAG,
    LOOKUP_TURN,
    MASKS,
    MOVER_BLOCKED,
    MOVER_COMMAND,
    MOVER_HEAD,
    MOVER_ITEM,
    MOVER_LINES,
    MOVER_LOOKS,
    MOVER_LOOKUPS,
    MOVER_NEXT,
    MOVER_PAGE,
    MOVER_PHASE,
    MOVER_READ,
    MOVER_STAGE,
    NOT_BEFORE,
    NOW,
    OP,
    OPERATIONS,
    ORDER,
    OTHER_PAGES,
    PAGE_CHANNELS,
    PAGE_TOKENS,
    PAGES,
    PAGES2,
    PATH,
    PAUSE,
    PROGRAMS,
    PUSHED,
    PUSHED_AT,
    QUEUE,
    READ,
    RECLAIM,
    REST,
    RESUMED,
    S_AT,
    S_CLOSED,
    S_NEXT,
    S_OPEN,
    S_TURN,
    SHARES_NEXT,
    SLOT,
    SPAN,
    SPANS,
    STAGING_TURN,
    STOPPED,
    STUCK,
    SUM_PORT,
    TAG,
    TOKEN_PAGES,
    TOKEN_SKIPPED,
    TOKENS,
    TOKENS_FORM,
    TOPK_NEXT,
    TOPK_RELEASE,
    TOPK_TURN,
    TRANSPOSE,
    VECTOR_LINES,
    WORKING,
    WRITE,
    WRITE_PORT,
    WRITER,
    D,
    channel_of,
    charge,
    count,
    rest,
)

_NEVER = 1 << 62  # a literal of this file, so that comparisons are with a number
_READ, _PROGRAM, _ERASE = range(3)  # operations of the flash
_READS, _WRITES = range(2)
_AT_REST, _PUSHING, _LOOKING, _AWAITING, _ERASING, _FINISHING = range(6)  # what the mover does next


# ---- decoder ------------------------------------------------------------------------------------------


@njit(**INNER)
def _queue_changes(d, which, now):
    """What is seen from the next tick on: a queue's new oldest command, or more room."""
    one = d.one
    d.head[which] = now + 1
    one[DECODER_NEXT] = min(one[DECODER_NEXT], now + 1)
    one[HAND_NEXT] = min(one[HAND_NEXT], now + 1)
    if one[MOVER_PHASE] == _AT_REST:
        one[MOVER_NEXT] = now + 1


@njit(**INNER)
def _leave_queue(d, which, now):
    d.level[which] -= 1
    for i in range(d.level[which]):
        d.queue[which, i] = d.queue[which, i + 1]
    _queue_changes(d, which, now)


@njit(**INNER)
def _times(n, q, p):
    """ceil(n * q / p), by halves of q: their products with remainders of p stay within int64."""
    whole, rest_of = n // p, n % p
    high, low = q >> 20, q & ((1 << 20) - 1)
    part = rest_of * high
    more = ((part % p) << 20) + rest_of * low
    return whole * q + ((part // p) << 20) + (more + p - 1) // p


@njit(**INNER)
def _at_work(d, row, op, now):
    """The oldest command of the GPU, or of the link, that has not ended at `now`; there is one."""
    i = d.one[row]
    while d.code[i, OP] != op or d.log[i, LOG_END] <= now:
        i += 1
    d.one[row] = i
    return i


@njit(**INNER)
def _system_wait(d, gpu, now):
    """(tag, end) of the command at work in the GPU, or on the link."""
    i = _at_work(d, GPU_ROW, GPU, now) if gpu else _at_work(d, LINK_ROW, LINK, now)
    return d.code[i, TAG], d.log[i, LOG_END]


@njit(**INNER)
def _flash_wait(d, now):
    """Whether a controller holds an operation at `now`, and when, as far as is known, one has room again."""
    pending, wake = False, _NEVER
    for c in range(d.flash.next.shape[0]):
        if held(d.flash, c, now) > 0:
            pending = True
            wake = min(wake, room_at(d.flash, c, 1, now))
    return pending, wake


@njit(**INNER)
def _all_rest(d, now):
    """Whether neither a channel nor a kernel has anything left to do."""
    for k in range(d.kernels.shape[0]):
        if d.kernels[k, K_NEXT] < _NEVER:
            return False
    return not _flash_wait(d, now)[0]


@njit(**INNER)
def _turns_anew(p, d, now):
    """At the end of tick `now` whoever is the first becomes the next."""
    one = d.one
    one[ANEW] = one[HAND_TURN] = one[LOOKUP_TURN] = one[STAGING_TURN] = one[TOPK_TURN] = 0
    for port in range(d.shares.shape[0]):
        d.shares[port, S_TURN] = 0
    begin_anew(p, d.flash, now)


@njit(**CALLED)
def _decode(p, d, now):
    """What the decoder does in tick `now`."""
    one = d.one
    if one[ANEW] > 0:
        _turns_anew(p, d, now - 1)
    i = one[INDEX]
    command = d.code[i]
    op, after = command[OP], command[AFTER]
    one[DECODER_NEXT] = _NEVER
    one[DRAINING] = 0
    reads, writes = d.level[_READS] > 0 or one[WORKING] > 0, d.level[_WRITES] > 0
    drive = reads or writes
    gpu, link = one[GPU_END] > now, one[LINK_END] > now
    system = op == GPU or op == LINK
    cause, tag, wake = -1, one[DRIVE_TAG], _NEVER
    if op == FINISH or op == PAUSE:
        if drive:
            cause = DRAIN if op == FINISH else ORDER
        elif op == PAUSE:
            one[STOPPED] = 1
            return
        else:
            pending, wake = _flash_wait(d, now)
            if pending:
                cause = DRAIN
                one[DRAINING] = 1
            elif link or gpu:
                cause = DRAIN
                tag, wake = _system_wait(d, not link, now)
            else:
                charge(d, DECODER, BUSY, d.activity.shape[0] - 1, now)
                one[STOPPED] = 1
                return
    else:
        kind = _READS if op == ATTEND or op == TRANSPOSE or op == READ else _WRITES
        if not system and op != CONFIG and d.level[kind] == p.command_queue:
            cause = QUEUE
        elif drive and (
            after & 4 != 0
            or op == CONFIG
            or (not system and ((kind == _READS and writes) or (kind == _WRITES and reads)))
        ):
            cause = ORDER
        elif after & 2 != 0 and link:
            cause = ORDER
            tag, wake = _system_wait(d, False, now)
        elif after & 1 != 0 and gpu:
            cause = ORDER
            tag, wake = _system_wait(d, True, now)
        elif command[NOT_BEFORE] > now:
            cause, tag, wake = ARRIVAL, command[TAG], command[NOT_BEFORE]
        elif command[REST] > 0 and one[RESUMED] != i and not (drive or link) and _all_rest(d, now):
            one[STOPPED] = 1
            return
        elif i == one[LIMIT]:
            one[STOPPED] = 2
            return
        else:
            tag = command[TAG]
            if op == CONFIG:
                d.log[i, LOG_FIRST], d.log[i, LOG_END] = now, now + 1
            elif system:
                _start_system(p, d, i, now)
            else:
                level = d.level[kind]
                d.queue[kind, level] = i
                d.level[kind] = level + 1
                one[DRIVE_TAG] = tag
                if level == 0:
                    _queue_changes(d, kind, now)
    if cause >= 0:
        charge(d, DECODER, cause, tag, now)
        one[DECODER_NEXT] = wake
        return
    charge(d, DECODER, BUSY, tag, now)
    one[ANEW] = 1 if op == CONFIG or after & 4 != 0 else 0
    one[INDEX] = i + 1
    one[DECODER_NEXT] = now + 1


@njit(**INNER)
def _start_system(p, d, i, now):
    """A command of the GPU or the link: from the next tick on, or when the one before it has ended."""
    one, command = d.one, d.code[i]
    tag, units = command[TAG], d.charge.shape[0]
    if command[OP] == GPU:
        unit = units - 2
        start = max(now + 1, one[GPU_END])
        compute = _times(command[OPERATIONS], p.gpu_ops_q, p.gpu_ops_p)
        moved = _times(command[BYTES], p.gpu_bytes_q, p.gpu_bytes_p)
        end = start + p.gpu_launch + max(compute, moved)
        count(d, tag, GPU_OPS, command[OPERATIONS])
        count(d, tag, GPU_BYTES, command[BYTES])
        one[GPU_END] = end
    else:
        unit, path = units - 1, command[PATH]
        start = max(now + 1, one[LINK_END])
        end = start + p.path_latency[path] + _times(command[BYTES], p.path_q[path], p.path_p[path])
        count(d, tag, LINK_BYTES + path, command[BYTES])
        one[LINK_END] = end
    charge(d, unit, BUSY, tag, start)
    rest(d, unit, end)
    d.log[i, LOG_FIRST], d.log[i, LOG_END] = start, end


# ---- hand-over ----------------------------------------------------------------------------------------


@njit(**INNER)
def _takes(d, k, now):
    """Whether kernel k takes a head in tick `now`."""
    row = d.kernels[k]
    ahead = row[K_TAKES] > 0 and row[K_FOLLOWS] == 0 and row[K_IDLE_FROM] <= now
    return row[K_BUSY] == 0 or ahead


@njit(**INNER)
def _hand_over(p, d, now):
    """The next head of an ATTEND goes to a kernel that takes one."""
    one = d.one
    one[HAND_NEXT] = _NEVER
    if d.level[_READS] == 0:
        return
    if d.head[_READS] > now:
        one[HAND_NEXT] = d.head[_READS]
        return
    i = d.queue[_READS, 0]
    command = d.code[i]
    if command[OP] != ATTEND:
        return
    kernels = d.kernels.shape[0]
    k = one[HAND_TURN]
    for _ in range(kernels):
        if _takes(d, k, now):
            break
        k = k + 1 if k + 1 < kernels else 0
    row = d.kernels[k]
    if not _takes(d, k, now):
        return
    one[HAND_TURN] = k + 1 if k + 1 < kernels else 0
    head = one[HAND_HEAD]
    if head == 0:
        d.log[i, LOG_FIRST], d.log[i, LOG_HEADS] = now, command[HEADS]
    if row[K_BUSY] == 0:
        row[K_BUSY], row[K_COMMAND], row[K_HEAD], row[K_NEXT], row[K_PHASE] = 1, i, head, now + 1, 0
    else:
        row[K_FOLLOWS], row[K_NEXT_COMMAND], row[K_NEXT_HEAD] = 1, i, head
        row[K_NEXT] = min(row[K_NEXT], now)
    one[WORKING] += 1
    one[FETCH_TAG] = one[ATTEND_TAG] = command[TAG]
    if head + 1 == command[HEADS]:
        one[HAND_HEAD] = 0
        _leave_queue(d, _READS, now)
    else:
        one[HAND_HEAD] = head + 1
        one[HAND_NEXT] = now + 1


# ---- fetch --------------------------------------------------------------------------------------------


@njit(**CALLED)
def _begin_pass(p, d, k, now):
    """Kernel k's filter takes what the kernel asks for in tick `now`."""
    row, ask = d.filters[k], d.kernels[k]
    command = d.code[ask[K_ASK_COMMAND]]
    head, first = ask[K_ASK_HEAD], ask[K_FIRST]
    slot = command[SLOT] + head
    row[F_BUSY], row[F_FORM], row[F_TURN], row[F_TAG] = 1, ask[K_FORM], ask[K_TURN], command[TAG]
    row[F_ROWS], row[F_ROW_LINES] = ask[K_ROWS], ask[K_ROW_LINES]
    row[F_LEFT], row[F_LEVEL], row[F_PAGE], row[F_RANK] = ask[K_N], 0, 0, 0
    masks = command[MASKS] + head * (command[D] + command[TOKENS])
    if ask[K_FORM] == CHANNELS_FORM:
        pages = command[D] // command[PAGE_CHANNELS]
        position, row[F_STEP] = first * pages, 1
        row[F_NUMBERS] = command[PAGES2] + (head * command[SPANS] + first) * pages
        row[F_STAGED] = _NEVER
    else:
        groups = (command[TOKENS] + command[PAGE_TOKENS] - 1) // command[PAGE_TOKENS]
        flash = max(groups - 2, 0)
        position, row[F_STEP] = 2 * first + ask[K_VALUES], 2
        row[F_NUMBERS] = command[PAGES] + (head * flash + first) * 2 + ask[K_VALUES]
        row[F_STAGED] = flash - first
        masks += command[D] + first * ask[K_ROWS]
    row[F_MASK] = -1 if ask[K_ALL] > 0 else masks
    row[F_SLOT], row[F_POSITION] = slot, position
    ask[K_ASK], ask[K_ACCEPTED], ask[K_IDLE_FROM] = 0, now, _NEVER
    ask[K_NEXT] = min(ask[K_NEXT], now)
    _next_page(p, d, row, now + 1)


@njit(**INNER)
def _next_page(p, d, row, now):
    """From tick `now` on the filter takes the words of its next page, then looks at it."""
    here = min(row[F_LEFT], row[F_ROWS])
    missing = here - row[F_LEVEL]
    words = (missing + p.lanes - 1) // p.lanes if missing > 0 else 0
    row[F_LEVEL] += words * p.lanes
    row[F_HERE], row[F_READY] = here, now + words
    wanted = here
    if row[F_MASK] >= 0:
        wanted = 0
        for i in range(row[F_MASK], row[F_MASK] + here):
            wanted += np.int64(d.masks[i])
    row[F_PASSES] = wanted > 0 or not p.page_filter
    row[F_COUNT] = wanted


@njit(**INNER)
def _looked(p, d, k, now):
    """Kernel k's filter has looked at its page in tick `now`."""
    row = d.filters[k]
    here = row[F_HERE]
    row[F_LEFT] -= here
    row[F_LEVEL] -= here
    row[F_PAGE] += 1
    if row[F_PASSES] > 0:
        row[F_RANK] += row[F_COUNT]
    if row[F_MASK] >= 0:
        row[F_MASK] += here
    if row[F_LEFT] > 0:
        _next_page(p, d, row, now + 1)
    else:
        row[F_BUSY], row[F_FREE] = 0, now + 1
        d.kernels[k, K_IDLE_FROM] = now + 1
        d.kernels[k, K_NEXT] = min(d.kernels[k, K_NEXT], now + 1)
        d.one[HAND_NEXT] = min(d.one[HAND_NEXT], now + 1)
    d.one[FETCH_TAG] = row[F_TAG]


@njit(**INNER)
def _looks_up(d, channel, number, port, lines, batch, tag, now):
    """What the register behind the lookup holds from the next tick on."""
    one = d.one
    one[LOOKED_FROM], one[LOOKED_CHANNEL], one[LOOKED_NUMBER] = now + 1, channel, number
    one[LOOKED_PORT], one[LOOKED_LINES], one[LOOKED_BATCH], one[LOOKED_TAG] = port, lines, batch, tag
    one[FETCH_TAG] = tag


@njit(**INNER)
def _fetch(p, d, now):
    """What filters and lookup do in tick `now`."""
    one, f = d.one, d.flash
    kernels, channels = d.kernels.shape[0], f.next.shape[0]
    following = _NEVER
    if one[LOOKED_FROM] <= now:
        c = one[LOOKED_CHANNEL]
        if held(f, c, now) < p.flash_queue:
            tag = one[LOOKED_TAG]
            push(
                p,
                f,
                c,
                _READ,
                one[LOOKED_NUMBER],
                one[LOOKED_PORT],
                one[LOOKED_LINES],
                one[LOOKED_BATCH],
                tag,
                now,
            )
            one[FLASH_NEXT] = min(one[FLASH_NEXT], f.wake[c])
            one[PUSHED_AT], one[PUSHED] = now, c
            one[LOOKED_FROM] = _NEVER
            one[FETCH_TAG] = tag
    free = one[LOOKED_FROM] == _NEVER
    room = staged(f) < p.flash_queue

    k = one[STAGING_TURN]
    staging = -1
    for _ in range(kernels):
        row = d.filters[k]
        if row[F_BUSY] > 0 and row[F_READY] <= now:
            if row[F_PASSES] == 0:
                if row[F_FORM] == CHANNELS_FORM:
                    count(d, row[F_TAG], CHANNEL_SKIPPED, 1)
                elif row[F_PAGE] < row[F_STAGED]:
                    count(d, row[F_TAG], TOKEN_SKIPPED, 1)
                _looked(p, d, k, now)
            elif staging < 0 and room and row[F_PAGE] >= row[F_STAGED] and _fits(d, k):
                staging = k
        k = k + 1 if k + 1 < kernels else 0
    user = one[LOOKUP_TURN]
    granted = -1
    for _ in range(kernels + 1):
        if granted < 0 and free:
            if user == kernels:
                if one[MOVER_LOOKS] <= now:
                    granted = user
            else:
                row = d.filters[user]
                if row[F_BUSY] > 0 and row[F_READY] <= now and row[F_PAGE] < row[F_STAGED] and _fits(d, user):
                    granted = user
        user = user + 1 if user < kernels else 0

    if staging >= 0:
        row = d.filters[staging]
        one[STAGING_TURN] = staging + 1 if staging + 1 < kernels else 0
        stage(f, staging, row[F_COUNT] * row[F_ROW_LINES], row[F_RANK] << 4 | row[F_TURN], row[F_TAG], now)
        _looked(p, d, staging, now)
    if granted >= 0:
        one[LOOKUP_TURN] = granted + 1 if granted < kernels else 0
    if granted == kernels:
        _mover_looks_up(p, d, now)
    elif granted >= 0:
        row = d.filters[granted]
        page = row[F_STEP] * row[F_PAGE]
        _looks_up(
            d,
            channel_of(row[F_SLOT], row[F_POSITION] + page, channels),
            np.int64(d.pages[row[F_NUMBERS] + page]),
            granted,
            row[F_COUNT] * row[F_ROW_LINES],
            row[F_RANK] << 4 | row[F_TURN],
            row[F_TAG],
            now,
        )
        count(d, row[F_TAG], CHANNEL_PAGES if row[F_FORM] == CHANNELS_FORM else TOKEN_PAGES, 1)
        _looked(p, d, granted, now)

    for k in range(kernels):
        row = d.filters[k]
        if d.kernels[k, K_ASK] > 0 and row[F_BUSY] == 0:
            if row[F_FREE] <= now:
                _begin_pass(p, d, k, now)
            else:
                following = now + 1
        if row[F_BUSY] > 0:
            by_lookup = row[F_PASSES] > 0 and row[F_PAGE] < row[F_STAGED]
            if row[F_READY] > now:
                # Who waits for a full register is woken with it.
                if not by_lookup or one[LOOKED_FROM] == _NEVER:
                    following = min(following, row[F_READY])
            elif row[F_PASSES] == 0 or _fits(d, k):
                # What waits for a full queue behind it is woken when that changes.
                if row[F_PAGE] < row[F_STAGED]:
                    if one[LOOKED_FROM] == _NEVER:
                        following = now + 1
                elif staged(f) < p.flash_queue:
                    following = now + 1
    if one[LOOKED_FROM] == _NEVER and one[MOVER_LOOKS] <= now + 1:
        following = now + 1
    one[FETCH_NEXT] = following


@njit(**INNER)
def _fits(d, k):
    row = d.filters[k]
    return row[F_PASSES] > 0 and row[F_RANK] + row[F_COUNT] <= d.kernels[k, K_LIMIT]


@njit(**INNER)
def _charge_fetch(d, now):
    """What fetch did in tick `now`, and what it waits for from the next one on."""
    one = d.one
    row = d.charge[FETCH]
    if one[FETCH_TAG] >= 0:
        charge(d, FETCH, BUSY, one[FETCH_TAG], now)
        one[FETCH_TAG] = -1
    cause, tag = IDLE, d.activity.shape[0] - 1
    if one[LOOKED_FROM] < _NEVER:
        cause, tag = QUEUE, one[LOOKED_TAG]
    elif d.level[_READS] > 0 and d.code[d.queue[_READS, 0], OP] == ATTEND:
        cause, tag = QUEUE, d.code[d.queue[_READS, 0], TAG]
    elif one[WORKING] > 0:
        cause, tag = DRAIN, one[ATTEND_TAG]
    if row[0] != cause or row[1] != tag:
        charge(d, FETCH, cause, tag, now + 1)


# ---- mover --------------------------------------------------------------------------------------------


@njit(**INNER)
def _mover_head(d, now):
    """The command that the mover may load, or -1."""
    if d.level[_WRITES] > 0:
        return d.queue[_WRITES, 0] if d.head[_WRITES] <= now else -1
    if d.level[_READS] > 0 and d.head[_READS] <= now and d.code[d.queue[_READS, 0], OP] != ATTEND:
        return d.queue[_READS, 0]
    return -1


@njit(**CALLED)
def _plan(p, d, now):
    """What the mover does from tick `now` on: lines, then a push; or lookups; or it finishes.

    ITEM counts what was done for the present head; STAGE is 0 while the lines of a group of tokens are written, 1 for
    its page of keys, 2 for that of values, and 1 in a TRANSPOSE when the keys of the head are there.
    """
    one = d.one
    command = d.code[one[MOVER_COMMAND]]
    op, tag = command[OP], command[TAG]
    line, ticks = command[D] // p.lanes, 0
    size, span_lines = command[PAGE_TOKENS], command[SPAN] // p.lanes
    phase = _AT_REST
    if op == RECLAIM:
        phase = _ERASING
    while phase == _AT_REST:
        if one[MOVER_HEAD] == command[HEADS]:
            phase = _FINISHING
        elif op == WRITE and command[FORM] == TOKENS_FORM:
            first, end = command[FIRST], command[FIRST] + command[TOKENS]
            group = first // size + one[MOVER_ITEM]
            if group * size >= end:
                one[MOVER_HEAD] += 1
                one[MOVER_ITEM] = 0
            elif one[MOVER_STAGE] == 2:
                one[MOVER_STAGE] = 0
                one[MOVER_ITEM] += 1
            else:
                if one[MOVER_STAGE] == 0:
                    lines = 2 * line * (min(end, (group + 1) * size) - max(first, group * size))
                    ticks += lines
                    count(d, tag, VECTOR_LINES, lines)
                    count(d, tag, GROUP_LINES, lines)
                if (group + 1) * size <= end:
                    one[MOVER_STAGE] += 1
                    ticks += size * line
                    count(d, tag, GROUP_LINES, size * line)
                    phase = _PUSHING
                else:
                    one[MOVER_ITEM] += 1
        elif op == READ:
            if one[MOVER_ITEM] == command[COUNT]:
                one[MOVER_ITEM] = 0
                one[MOVER_HEAD] += 1
            else:
                phase = _LOOKING
                one[MOVER_LOOKUPS], one[MOVER_LINES] = 1, p.page_lines
        elif op == TRANSPOSE and one[MOVER_STAGE] == 0:
            phase = _LOOKING
            one[MOVER_LOOKUPS], one[MOVER_LINES] = command[SPAN] // size, command[SPAN] * line
            one[MOVER_STAGE] = 1
        elif one[MOVER_ITEM] == command[D] // command[PAGE_CHANNELS]:
            one[MOVER_ITEM] = one[MOVER_STAGE] = 0
            one[MOVER_HEAD] += 1
        else:
            one[MOVER_ITEM] += 1
            lines = command[PAGE_CHANNELS] * span_lines
            ticks += lines
            if op == WRITE:
                count(d, tag, VECTOR_LINES, lines)
            phase = _PUSHING
    one[MOVER_PHASE] = phase
    charge(d, WRITER, QUEUE if phase == _LOOKING else BUSY, tag, now)
    if phase == _LOOKING:
        one[MOVER_LOOKS], one[MOVER_NEXT] = now, _NEVER
        one[FETCH_NEXT] = min(one[FETCH_NEXT], now)
    else:
        one[MOVER_NEXT] = now + ticks


@njit(**INNER)
def _mover(p, d, now):
    """What the mover does in tick `now`, the one of MOVER_NEXT."""
    one = d.one
    phase = one[MOVER_PHASE]
    one[MOVER_NEXT] = _NEVER
    if phase == _AT_REST:
        i = _mover_head(d, now)
        if i < 0:
            return
        one[MOVER_COMMAND] = i
        one[MOVER_HEAD] = one[MOVER_ITEM] = one[MOVER_STAGE] = 0
        one[MOVER_READ], one[MOVER_PAGE] = d.code[i, PAGES], d.code[i, PAGES2]
        d.log[i, LOG_FIRST] = now
        charge(d, WRITER, BUSY, d.code[i, TAG], now)
        _plan(p, d, now + 1)
    elif phase == _AWAITING:
        # The last line is there.
        _plan(p, d, now + 1)
    elif phase == _FINISHING:
        i = one[MOVER_COMMAND]
        op = d.code[i, OP]
        rest(d, WRITER, now + 1)
        d.log[i, LOG_END] = now + 1
        one[MOVER_PHASE] = _AT_REST
        _leave_queue(d, _READS if op == READ or op == TRANSPOSE else _WRITES, now)
        one[MOVER_NEXT] = now + 1
    else:
        _mover_pushes(p, d, now)


@njit(**CALLED)
def _mover_pushes(p, d, now):
    """Give a controller the page whose lines are written, or an erase, unless fetch gives it a page in this tick."""
    one = d.one
    i = one[MOVER_COMMAND]
    command = d.code[i]
    tag, erases = command[TAG], one[MOVER_PHASE] == _ERASING
    channels = d.flash.next.shape[0]
    if erases:
        planes = p.flash.chips * p.flash.dies * p.flash.planes
        c = (one[MOVER_PAGE] - command[PAGES2]) // planes % channels
    else:
        position = one[MOVER_ITEM] - 1
        if command[OP] == WRITE and command[FORM] == TOKENS_FORM:
            position = 2 * (command[FIRST] // command[PAGE_TOKENS] + one[MOVER_ITEM]) + one[MOVER_STAGE] - 1
        else:
            position += command[FIRST] * (command[D] // command[PAGE_CHANNELS])
        c = channel_of(command[SLOT] + one[MOVER_HEAD], position, channels)
    taken = one[PUSHED_AT] == now and one[PUSHED] == c
    if taken or held(d.flash, c, now) >= p.flash_queue:
        charge(d, WRITER, QUEUE, tag, now)
        if taken:
            one[MOVER_NEXT] = now + 1
        else:
            one[MOVER_BLOCKED] = c
        return
    kind = _ERASE if erases else _PROGRAM
    push(p, d.flash, c, kind, np.int64(d.pages[one[MOVER_PAGE]]), 0, 0, 0, tag, now)
    one[FLASH_NEXT] = min(one[FLASH_NEXT], d.flash.wake[c])
    count(d, tag, ERASES if erases else PROGRAMS, 1)
    charge(d, WRITER, BUSY, tag, now)
    one[MOVER_PAGE] += 1
    if not erases:
        _plan(p, d, now + 1)
        return
    one[MOVER_NEXT] = now + 1
    if one[MOVER_PAGE] == command[PAGES2] + command[COUNT] * channels * planes:
        one[MOVER_PHASE] = _FINISHING


@njit(**INNER)
def _mover_looks_up(p, d, now):
    """The mover has the lookup in tick `now`."""
    one = d.one
    i = one[MOVER_COMMAND]
    command = d.code[i]
    tag, lines = command[TAG], p.page_lines
    position = command[FIRST]
    if command[OP] == READ:
        if command[FORM] == CHANNELS_FORM:
            position *= command[D] // command[PAGE_CHANNELS]
        position += one[MOVER_ITEM]
        one[MOVER_ITEM] += 1
    else:
        lines = command[PAGE_TOKENS] * (command[D] // p.lanes)
        groups = command[SPAN] // command[PAGE_TOKENS]
        position = 2 * (position * groups + groups - one[MOVER_LOOKUPS])
    c = channel_of(command[SLOT] + one[MOVER_HEAD], position, d.flash.next.shape[0])
    _looks_up(d, c, np.int64(d.pages[one[MOVER_READ]]), d.kernels.shape[0], lines, 0, tag, now)
    count(d, tag, OTHER_PAGES, 1)
    one[MOVER_READ] += 1
    one[MOVER_LOOKUPS] -= 1
    charge(d, WRITER, BUSY, tag, now)
    if one[MOVER_LOOKUPS] > 0:
        one[MOVER_LOOKS] = now + 1
        charge(d, WRITER, QUEUE, tag, now + 1)
    else:
        one[MOVER_LOOKS], one[MOVER_PHASE] = _NEVER, _AWAITING
        charge(d, WRITER, FLASH, tag, now + 1)


# ---- rows ---------------------------------------------------------------------------------------------


@njit(**INNER)
def _grants(p, d, now):
    """Ports that are free go to the sources whose turn it is."""
    one, f = d.one, d.flash
    kernels = d.kernels.shape[0]
    following = _NEVER
    for port in range(kernels + 1):
        if f.asking[port] > 0 and f.ports[port, 0] <= now:
            op = grant(p, f, port, now)
            lines, batch, tag = forwarded(f, op)
            source = op // p.flash_queue
            if source < f.next.shape[0]:
                one[FLASH_NEXT] = min(one[FLASH_NEXT], min(f.look[source], f.wake[source]))
            else:
                count(d, tag, GROUP_LINES, lines)
                one[FETCH_NEXT] = min(one[FETCH_NEXT], now + 1)
            if port < kernels:
                count(d, tag, FORWARDED_LINES, lines)
                csd_kernel.arrive(p, d, port, batch & 15, batch >> 4, lines, now + 2)
            else:
                one[MOVER_LINES] -= lines
                if d.code[one[MOVER_COMMAND], OP] == READ:
                    count(d, tag, VECTOR_LINES, lines)
                    _close(d, now + 2, now + 2 + lines, now)
                if one[MOVER_LINES] == 0:
                    one[MOVER_NEXT] = now + 1 + lines
        if f.asking[port] > 0:
            following = min(following, f.ports[port, 0])
    one[GRANT_NEXT] = following


# ---- shared ports -------------------------------------------------------------------------------------


@njit(**INNER)
def _users(d, port):
    """Kernels that want the port."""
    n = 0
    for k in range(d.wants.shape[1]):
        n += d.wants[port, k]
    return n


@njit(**CALLED)
def _share(d, port, until):
    """Give the port's lines to those who want it, up to tick `until`: to none more than he wants."""
    row = d.shares[port]
    first, row[S_AT] = row[S_AT], until
    users = _users(d, port)
    if users == 0 or until <= first:
        return
    closed = max(0, min(until, row[S_OPEN]) - max(first, row[S_CLOSED]))
    lines = until - first - closed
    kernels = d.wants.shape[1]
    k, place, last = row[S_TURN], 0, -1
    for _ in range(kernels):
        if d.wants[port, k] > 0:
            got = (lines - place + users - 1) // users if lines > place else 0
            kernel = d.kernels[k]
            kernel[K_READ_LEFT + port] -= got
            tag = d.code[kernel[K_COMMAND], TAG]
            state = d.charge[KERNEL + k]
            d.activity[state[1], KERNEL + k, state[0]] += first - state[2]
            state[2] = until
            d.activity[tag, KERNEL + k, BUSY] += got
            d.activity[tag, KERNEL + k, QUEUE] += until - first - got
            if port != SUM_PORT:
                count(d, tag, VECTOR_LINES, got)
            if lines > 0 and (lines - 1) % users == place:
                last = k
            place += 1
        k = k + 1 if k + 1 < kernels else 0
    if last >= 0:
        row[S_TURN] = last + 1 if last + 1 < kernels else 0


@njit(**CALLED)
def _last_line(d, port):
    """When the next of the port's users has its last line."""
    row = d.shares[port]
    kernels, users = d.wants.shape[1], _users(d, port)
    k, place, least = row[S_TURN], 0, _NEVER
    for _ in range(kernels):
        if d.wants[port, k] > 0:
            least = min(least, place + users * (d.kernels[k, K_READ_LEFT + port] - 1))
            place += 1
        k = k + 1 if k + 1 < kernels else 0
    row[S_NEXT] = _NEVER
    if users > 0:
        tick = row[S_AT] + least
        if row[S_OPEN] > row[S_AT] and tick >= row[S_CLOSED]:
            tick += row[S_OPEN] - max(row[S_CLOSED], row[S_AT])
        row[S_NEXT] = tick
    d.one[SHARES_NEXT] = min(d.shares[0, S_NEXT], min(d.shares[1, S_NEXT], d.shares[2, S_NEXT]))


@njit(**INNER)
def _close(d, first, end, now):
    """The port to write the vectors is the mover's in these ticks."""
    _share(d, WRITE_PORT, now)
    d.shares[WRITE_PORT, S_CLOSED], d.shares[WRITE_PORT, S_OPEN] = first, end
    _last_line(d, WRITE_PORT)


@njit(**INNER)
def _ports(d, now):
    """Kernels that have their last line in tick `now` go on."""
    for port in range(3):
        if d.shares[port, S_NEXT] == now:
            _share(d, port, now + 1)
            for k in range(d.wants.shape[1]):
                if d.wants[port, k] > 0 and d.kernels[k, K_READ_LEFT + port] == 0:
                    d.wants[port, k] = 0
                    d.kernels[k, K_NEXT] = now
            _last_line(d, port)


@njit(**INNER)
def _argtopk(d, now):
    """The argtopk unit, free in tick `now`, goes to a kernel that wants it."""
    one = d.one
    kernels = d.kernels.shape[0]
    k = one[TOPK_TURN]
    while d.kernels[k, K_TOPK_WANTS] == 0:
        k = k + 1 if k + 1 < kernels else 0
    one[TOPK_TURN] = k + 1 if k + 1 < kernels else 0
    one[TOPK_RELEASE], one[TOPK_NEXT] = _NEVER, _NEVER
    d.kernels[k, K_TOPK_WANTS], d.kernels[k, K_NEXT] = 0, now


@njit(**INNER)
def _kernel(p, d, k, now):
    """A kernel's own step at the end of tick `now`, and what it asks the drive for from the next one on."""
    one, row = d.one, d.kernels[k]
    csd_kernel.step(p, d, k, now)
    if row[K_TAKES] > 0:
        one[HAND_NEXT] = min(one[HAND_NEXT], now + 1)
    for port in range(3):
        if row[K_READ_LEFT + port] > 0 and d.wants[port, k] == 0:
            _share(d, port, now + 1)
            d.wants[port, k] = 1
            _last_line(d, port)
    if row[K_ASK] > 0 or d.filters[k, F_BUSY] > 0:
        one[FETCH_NEXT] = min(one[FETCH_NEXT], now + 1)
    for other in range(d.kernels.shape[0]):
        if d.kernels[other, K_TOPK_WANTS] > 0 and one[TOPK_RELEASE] < _NEVER:
            one[TOPK_NEXT] = max(now, one[TOPK_RELEASE]) + 1


# ---- all of it ----------------------------------------------------------------------------------------


@njit(**INNER)
def _flash(p, d, now):
    """Flash controllers up to their requests for ports; when next."""
    one, f = d.one, d.flash
    channels = f.next.shape[0]
    following = _NEVER
    for c in range(channels):
        if f.look[c] <= now or f.wake[c] <= now:
            catch_up(p, f, c, now - 1)
            if f.look[c] <= now:
                step_rows(p, f, c, now)
            catch_up(p, f, c, now)
        following = min(following, min(f.look[c], f.wake[c]))
    one[FLASH_NEXT] = following
    one[GRANT_NEXT] = now  # somebody may ask
    if one[DRAINING] > 0:
        one[DECODER_NEXT] = min(one[DECODER_NEXT], now + 1)


@njit(cache=True, nogil=True)
def run(p, d):
    """Execute commands, from tick NOW up to that of FINISH or PAUSE, or one in which a command with REST finds everything
    at rest but the GPU, or, STOPPED being 2, one in which the decoder would take the command LIMIT: in that tick nothing but the
    decoder has acted. Or until the drive is STUCK."""
    one, f = d.one, d.flash
    kernels, channels = d.kernels.shape[0], f.next.shape[0]
    one[STOPPED] = 0
    now = one[NOW]
    one[DECODER_NEXT] = now
    while True:
        acts = False  # but for flash and ports
        if one[DECODER_NEXT] <= now:
            _decode(p, d, now)
            if one[STOPPED] > 0:
                break
            acts = True
        if one[HAND_NEXT] <= now:
            _hand_over(p, d, now)
            acts = True
        if one[FLASH_NEXT] <= now:
            _flash(p, d, now)
        if one[FETCH_NEXT] <= now:
            _fetch(p, d, now)
            acts = True
        if one[MOVER_NEXT] <= now:
            _mover(p, d, now)
            acts = True
        if f.look[channels] <= now:
            step_rows(p, f, channels, now)
            one[FETCH_NEXT] = min(one[FETCH_NEXT], now + 1)
            one[GRANT_NEXT] = now
        if one[GRANT_NEXT] <= now:
            _grants(p, d, now)
        if one[SHARES_NEXT] == now:
            _ports(d, now)
        if one[TOPK_NEXT] <= now:
            _argtopk(d, now)
        for k in range(kernels):
            if d.kernels[k, K_NEXT] <= now:
                _kernel(p, d, k, now)
                acts = True
        if acts:
            _charge_fetch(d, now)
        if one[LOOKED_FROM] < _NEVER:
            one[FETCH_NEXT] = min(one[FETCH_NEXT], room_at(f, one[LOOKED_CHANNEL], p.flash_queue, now))
        if one[MOVER_BLOCKED] >= 0:
            following = room_at(f, one[MOVER_BLOCKED], p.flash_queue, now)
            if following < _NEVER:
                one[MOVER_NEXT], one[MOVER_BLOCKED] = following, -1
        following = min(one[DECODER_NEXT], one[HAND_NEXT], one[MOVER_NEXT], one[FETCH_NEXT])
        following = min(following, one[FLASH_NEXT], f.look[channels], one[GRANT_NEXT], one[TOPK_NEXT])
        following = min(following, one[SHARES_NEXT])
        for k in range(kernels):
            following = min(following, d.kernels[k, K_NEXT])
        if following <= now or following == _NEVER:
            one[STUCK] = 1
            break
        now = following
    one[NOW] = now


@njit(cache=True)
def finish(d, end):
    """Account for all ticks before `end`."""
    for unit in range(d.charge.shape[0]):
        if not KERNEL + d.kernels.shape[0] <= unit < d.charge.shape[0] - 2:  # channels keep their own account
            rest(d, unit, end)
    finish_channels(d.flash, end)
