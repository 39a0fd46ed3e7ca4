"""A drive in time, by events: decoder, queues, mover, fetch and staging around kernels and flash controllers.

The rules, which the RTL implements anew (`rtl/csd/top.py`). What is pushed, dispatched or done in a tick is seen by
others from the next one on. In each tick units act in the order of the functions that `run` calls.

- *Decoder*: one command a tick, in order. It waits, charged in this order, while the queue of its kind is full
  (`command_queue` reads, as many writes); a CONFIG while the drive works, reads while writes are under way, and these
  for reads; for what it comes `after`; for its `not_before`. A command is in its queue from the tick after its dispatch
  to the one in which it is complete, an ATTEND to the one in which its last head is handed to a kernel. The run ends
  with a tick that finds the drive at rest, background programs and erases included.
- *GPU and link* take their commands in order, from the tick after dispatch on, each for as long as its amount takes.
- *Hand-over*: the heads of the ATTEND at the head of the reads go to kernels that are ready, one a tick, round robin.
- *Filters*: each kernel's looks at one page a tick, after taking the words of its mask, a word a tick. A page in flash
  needs the lookup, one a tick, round robin over kernels and mover; it is in the register behind it from the next tick
  on, until its controller takes it. A page in the group buffer needs room in the staging queue, also one a tick, round
  robin. Staging forwards rows to ports like a controller.
- *Mover*: all other commands, one at a time. It loads a command in one tick, works, and finishes in one tick.
  It moves a line a tick; a page is pushed when its controller has room and fetch does not push there.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from tilewright.arch import csd as arch
from tilewright.arch.csd import CsdParams
from tilewright.sim import csd_flash
from tilewright.sim.cache import CALLED, INNER
from tilewright.sim.csd_flash import Channels, finish_channels, grant, held, push, room_from, step_channel, step_rows

Array = np.ndarray

# Literals of this file: a cached kernel would keep the old value of a constant changed elsewhere.
_NEVER = 1 << 62
_CONFIG, _ATTEND, _WRITE, _TRANSPOSE, _READ, _RECLAIM, _GPU, _LINK = range(8)
assert [arch.OP[n] for n in ("CONFIG", "ATTEND", "WRITE", "TRANSPOSE", "READ", "RECLAIM", "GPU", "LINK")] == [*range(8)]
_BUSY, _ARRAY, _FLASH, _ARGTOPK, _QUEUE, _ORDER, _ARRIVAL, _DRAIN, _IDLE = range(9)
assert arch.CAUSES == ("array", "flash", "argtopk", "queue", "order", "arrival", "drain", "idle")
_DECODER, _WRITER, _FETCH, _TOPK, _KERNEL = range(5)
assert arch.SINGLE_UNITS == ("decoder", "writer", "fetch", "argtopk")
_CHANNEL_PAGES, _CHANNEL_SKIPPED, _TOKEN_PAGES, _TOKEN_SKIPPED, _OTHER_PAGES, _PROGRAMS, _ERASES = range(7)
_FORWARDED, _VECTOR_LINES, _GROUP_LINES, _PRODUCTS, _EXPONENTIALS, _COMPARED, _STEPS = range(7, 14)
_GPU_OPS, _GPU_BYTES, _LINK_BYTES = range(14, 17)
_ALL = (*arch.COUNTERS, *arch.SYSTEM_COUNTERS)
assert [_ALL.index(c) for c in ("channel_pages", "other_pages", "erases", "forwarded_lines", "group_lines")] == [
    *(_CHANNEL_PAGES, _OTHER_PAGES, _ERASES, _FORWARDED, _GROUP_LINES)
]
assert [_ALL.index(c) for c in ("scalar_steps", "gpu_ops", "gpu_bytes", "link_bytes", "host_bytes")] == [
    *(_STEPS, _GPU_OPS, _GPU_BYTES, _LINK_BYTES, _LINK_BYTES + 1)
]
_READS, _WRITES = range(2)
_READ_KIND, _PROGRAM_KIND, _ERASE_KIND = range(3)

# Columns of a command: fields of the record, those of its CONFIG, and where its pages are in `pages`.
FIELDS = (
    *("op", "slot", "heads", "tokens", "spans", "form", "first", "count", "after", "not_before", "operations", "bytes"),
    *("path", "tag", "attention", "d", "group", "r", "k", "local", "mean", "page_tokens", "page_channels", "span"),
    *("pages", "pages2", "masks"),
)
_OP, _SLOT, _HEADS, _TOKENS, _SPANS, _FORM, _FIRST, _COUNT, _AFTER, _NOT_BEFORE, _OPERATIONS, _BYTES = range(12)
_PATH, _TAG, _ATTENTION, _D, _GROUP, _R, _K, _LOCAL, _MEAN, _PAGE_TOKENS, _PAGE_CHANNELS, _SPAN = range(12, 24)
_PAGES, _PAGES2, _MASKS = range(24, 27)
END, PAUSE = 98, 99  # ops of what may stand behind the last command: the run ends, or more will come
_END_OP, _PAUSE_OP = 98, 99

# Single numbers of the state. A unit's charge is what its ticks from `since` on count as, for which tag.
_INDEX, _NOW, _GPU_END, _LINK_END, _STOPPED = range(5)
_M_COMMAND, _M_PHASE, _M_HEAD, _M_ITEM, _M_STAGE, _M_NEXT, _M_READ, _M_PAGE, _M_LINES, _M_LOOKUPS = range(5, 15)
_L_AT, _L_CHANNEL, _L_NUMBER, _L_PORT, _L_LINES, _L_TAG, _L_TURN = range(15, 22)
_H_TURN, _H_HEAD, _H_NEXT, _S_TURN, _DRIVE_TAG, _GPU_TAG, _LINK_TAG, _DECODER_NEXT, _FETCH_NEXT = range(22, 31)
_PUSHED, _MOVED_FROM, _MOVED_UNTIL, _FETCHED = range(31, 35)
_SCALARS = 35
_AT_REST, _LOADED, _READING, _PUSHING, _LOOKING, _AWAITING, _ERASING, _FINISHING = range(8)


class Drive(NamedTuple):
    """All that changes, and the commands that are executed. n commands, k kernels, c channels."""

    code: Array  # [n + 1, fields] and what comes behind them
    pages: Array  # [m, 2] channel and number in its log, of the pages of the commands
    log: Array  # [n, 4] first tick, tick after the last, heads that are not done, tick of dispatch
    flash: Channels  # its row c is staging
    one: Array  # [35]
    queue: Array  # [2, command_queue, 2] commands, and the tick of their dispatch
    level: Array  # [2]
    charge: Array  # [units, 3] cause, tag, since
    activity: Array  # [tags + 1, units, 1 + causes]
    counters: Array  # [tags + 1, counters]


# ---- ticks by cause -----------------------------------------------------------------------------------


@njit(**INNER)
def _charge(d, unit, cause, tag, now):
    """The ticks of a unit from `now` on count as `cause`."""
    row = d.charge[unit]
    d.activity[row[1], unit, row[0]] += now - row[2]
    row[0], row[1], row[2] = cause, tag, now


@njit(**INNER)
def _count(d, tag, counter, n):
    d.counters[tag, counter] += n


# ---- decoder ------------------------------------------------------------------------------------------


@njit(**INNER)
def _queue_changes(d, now):
    """What waits for queues looks at them in the next tick."""
    one = d.one
    one[_DECODER_NEXT] = min(one[_DECODER_NEXT], now + 1)
    one[_H_NEXT] = min(one[_H_NEXT], now + 1)
    if one[_M_PHASE] == _AT_REST:
        one[_M_NEXT] = now + 1


@njit(**INNER)
def _leave_queue(d, which, now):
    d.level[which] -= 1
    for i in range(d.level[which]):
        d.queue[which, i] = d.queue[which, i + 1]
    _queue_changes(d, now)


@njit(**INNER)
def _times(n, q, p):
    """ceil(n * q / p) without leaving int64, for n below 2**49 and quotients that fit."""
    whole, rest = n // p, n % p
    # rest * q may be too large where both are: by halves of q.
    high, low = q >> 20, q & ((1 << 20) - 1)
    part = rest * high
    more = ((part % p) << 20) + rest * low
    return whole * q + ((part // p) << 20) + (more + p - 1) // p


@njit(**INNER)
def _at_work(d):
    """Whether a kernel is."""
    for k in range(d.kernels.shape[0]):
        if d.kernels[k, _K_BUSY] > 0:
            return True
    return False


@njit(**CALLED)
def _decode(p, d, now):
    one = d.one
    i = one[_INDEX]
    command = d.code[i]
    op = command[_OP]
    one[_DECODER_NEXT] = _NEVER
    reads, writes = d.level[_READS] > 0 or _at_work(d), d.level[_WRITES] > 0
    drive = reads or writes
    kind = _READS if op == _ATTEND or op == _TRANSPOSE or op == _READ else _WRITES
    system = op == _GPU or op == _LINK
    cause, tag = -1, command[_TAG]
    if op == _PAUSE_OP:
        one[_STOPPED] = 1
        return
    if op == _END_OP:
        ends = max(one[_GPU_END], one[_LINK_END])
        pending = _NEVER if drive else now
        for c in range(p.flash.channels):
            if held(d.flash, c, now) > 0:
                pending = max(pending, room_from(d.flash, c))
        if pending > now or ends > now:
            cause = _DRAIN
            tag = one[_DRIVE_TAG] if pending > now else (one[_LINK_TAG] if one[_LINK_END] > now else one[_GPU_TAG])
            one[_DECODER_NEXT] = ends if pending <= now else pending
    elif op <= _RECLAIM and op != _CONFIG and d.level[kind] == p.command_queue:
        cause, tag = _QUEUE, one[_DRIVE_TAG]
    elif not system and ((op == _CONFIG and drive) or (kind == _READS and writes) or (kind == _WRITES and reads)):
        cause, tag = _ORDER, one[_DRIVE_TAG]
    elif command[_AFTER] & 4 and drive:
        cause, tag = _ORDER, one[_DRIVE_TAG]
    elif command[_AFTER] & 2 and one[_LINK_END] > now:
        cause, tag, one[_DECODER_NEXT] = _ORDER, one[_LINK_TAG], one[_LINK_END]
    elif command[_AFTER] & 1 and one[_GPU_END] > now:
        cause, tag, one[_DECODER_NEXT] = _ORDER, one[_GPU_TAG], one[_GPU_END]
    elif command[_NOT_BEFORE] > now:
        cause, one[_DECODER_NEXT] = _ARRIVAL, command[_NOT_BEFORE]
    if cause >= 0:
        _charge(d, _DECODER, cause, tag, now)
        return
    if i == d.code.shape[0] - 1:
        one[_STOPPED] = 1
        return
    _charge(d, _DECODER, _BUSY, tag, now)
    one[_INDEX] = i + 1
    one[_DECODER_NEXT] = now + 1
    if op == _CONFIG:
        d.log[i, 0], d.log[i, 1] = now, now + 1
    elif system:
        _start_system(p, d, i, now)
    else:
        d.queue[kind, d.level[kind]] = i
        d.level[kind] += 1
        d.log[i, 3] = now
        one[_DRIVE_TAG] = tag
        _queue_changes(d, now)


@njit(**INNER)
def _start_system(p, d, i, now):
    """A command of the GPU or the link: from the next tick, or when the one before it has ended."""
    one, command = d.one, d.code[i]
    tag, gpu = command[_TAG], command[_OP] == _GPU
    unit = d.charge.shape[0] - (2 if gpu else 1)
    before = one[_GPU_END] if gpu else one[_LINK_END]
    start = max(now + 1, before)
    if gpu:
        compute = _times(command[_OPERATIONS], p.gpu_ops_q, p.gpu_ops_p)
        end = start + p.gpu_launch + max(compute, _times(command[_BYTES], p.gpu_bytes_q, p.gpu_bytes_p))
        _count(d, tag, _GPU_OPS, command[_OPERATIONS])
        _count(d, tag, _GPU_BYTES, command[_BYTES])
        one[_GPU_END], one[_GPU_TAG] = end, tag
    else:
        path = command[_PATH]
        end = start + p.path_latency[path] + _times(command[_BYTES], p.path_q[path], p.path_p[path])
        _count(d, tag, _LINK_BYTES + path, command[_BYTES])
        one[_LINK_END], one[_LINK_TAG] = end, tag
    # Between two commands the unit waits for what the second one comes after.
    d.activity[tag, unit, _ORDER] += start - before
    d.activity[tag, unit, _BUSY] += end - start
    d.log[i, 0], d.log[i, 1] = start, end


# ---- mover --------------------------------------------------------------------------------------------


@njit(**INNER)
def _mover_head(d, now):
    """The command that the mover may load, or -1. What was dispatched in this tick is not there yet."""
    for which in range(2):
        if d.level[which] > 0:
            i = d.queue[which, 0]
            if which == _WRITES or d.code[i, _OP] != _ATTEND:
                return i if d.log[i, 3] < now else -1
    return -1


@njit(**CALLED)
def _plan(p, d, now):
    """From tick `now` on the mover does what comes next: lines, then a push; or lookups; or it finishes.

    ITEM counts what was done for the present head, STAGE is 0 while the lines of a group of tokens are written, then 1
    and 2 for its pages.
    """
    one = d.one
    command = d.code[one[_M_COMMAND]]
    op, tag = command[_OP], command[_TAG]
    line, ticks = command[_D] // p.lanes, 0
    size = command[_PAGE_TOKENS]
    while True:
        if one[_M_HEAD] == command[_HEADS]:
            # Lines of the last heads may fill no page.
            one[_M_PHASE] = _FINISHING
            break
        if op == _WRITE and command[_FORM] == 0:
            first, end = command[_FIRST], command[_FIRST] + command[_TOKENS]
            group = first // size + one[_M_ITEM]
            if group * size >= end:
                one[_M_HEAD] += 1
                one[_M_ITEM] = 0
                continue
            if one[_M_STAGE] == 0:
                lines = 2 * line * (min(end, (group + 1) * size) - max(first, group * size))
                ticks += lines
                _count(d, tag, _VECTOR_LINES, lines)
                _count(d, tag, _GROUP_LINES, lines)
                if (group + 1) * size > end:
                    one[_M_ITEM] += 1
                    continue
            one[_M_STAGE] += 1
            if one[_M_STAGE] == 3:
                one[_M_STAGE] = 0
                one[_M_ITEM] += 1
                continue
            ticks += size * line
            _count(d, tag, _GROUP_LINES, size * line)
            one[_M_PHASE] = _PUSHING
            break
        groups = command[_D] // command[_PAGE_CHANNELS]
        if op == _RECLAIM:
            one[_M_PHASE] = _ERASING
            break
        if op == _READ or (op == _TRANSPOSE and one[_M_STAGE] == 0):
            if op == _READ and one[_M_ITEM] == command[_COUNT]:
                one[_M_ITEM] = 0
                one[_M_HEAD] += 1
                continue
            one[_M_PHASE] = _LOOKING
            if op == _READ:
                one[_M_LOOKUPS], one[_M_LINES] = 1, p.page_lines
            else:
                one[_M_LOOKUPS], one[_M_LINES] = command[_SPAN] // size, command[_SPAN] * line
            break
        if one[_M_ITEM] == groups:
            one[_M_ITEM] = one[_M_STAGE] = 0
            one[_M_HEAD] += 1
            continue
        one[_M_ITEM] += 1
        lines = command[_PAGE_CHANNELS] * command[_SPAN] // p.lanes
        ticks += lines
        if op == _WRITE:
            _count(d, tag, _VECTOR_LINES, lines)
        one[_M_PHASE] = _PUSHING
        break
    one[_M_NEXT] = now + ticks
    if ticks > 0:
        _charge(d, _WRITER, _BUSY, tag, now)
    if one[_M_PHASE] == _LOOKING:
        _charge(d, _WRITER, _QUEUE, tag, now)
        one[_FETCH_NEXT] = min(one[_FETCH_NEXT], now)


@njit(**CALLED)
def _mover(p, d, now):
    """What the mover does in tick `now`, the one of M_NEXT; before fetch looks at its wish for the lookup."""
    one = d.one
    one[_M_NEXT] = _NEVER
    phase = one[_M_PHASE]
    if phase == _AT_REST:
        i = _mover_head(d, now)
        if i < 0:
            return
        one[_M_COMMAND], one[_M_PHASE] = i, _LOADED
        one[_M_HEAD] = one[_M_ITEM] = one[_M_STAGE] = 0
        one[_M_READ], one[_M_PAGE] = d.code[i, _PAGES], d.code[i, _PAGES2]
        d.log[i, 0] = now
        one[_M_NEXT] = now + 1
        _charge(d, _WRITER, _BUSY, d.code[i, _TAG], now)
        return
    if phase == _LOADED or phase == _AWAITING:
        if phase == _AWAITING:
            if d.code[one[_M_COMMAND], _OP] == _READ:
                one[_M_ITEM] += 1
            else:
                one[_M_STAGE] = 1
        _plan(p, d, now)
        if one[_M_NEXT] > now:
            return
        phase = one[_M_PHASE]
    if phase == _FINISHING:
        i = one[_M_COMMAND]
        op = d.code[i, _OP]
        tag = d.code[i, _TAG]
        _charge(d, _WRITER, _BUSY, tag, now)
        _charge(d, _WRITER, _IDLE, d.activity.shape[0] - 1, now + 1)
        d.log[i, 1] = now + 1
        one[_M_PHASE] = _AT_REST
        _leave_queue(d, _READS if op == _READ or op == _TRANSPOSE else _WRITES, now)


@njit(**CALLED)
def _mover_pushes(p, d, now):
    """Give a controller the page whose lines are written, or an erase, unless fetch gives it a page in this tick."""
    one = d.one
    i = one[_M_COMMAND]
    tag, erases = d.code[i, _TAG], one[_M_PHASE] == _ERASING
    c = d.pages[one[_M_PAGE], 0]
    if one[_PUSHED] == c or held(d.flash, c, now) >= p.flash_queue:
        _charge(d, _WRITER, _QUEUE, tag, now)
        one[_M_NEXT] = now + 1 if one[_PUSHED] == c else _NEVER
        return
    kind = _ERASE_KIND if erases else _PROGRAM_KIND
    push(p, d.flash, c, kind, d.pages[one[_M_PAGE], 1], 0, 0, 0, tag, now)
    _count(d, tag, _ERASES if erases else _PROGRAMS, 1)
    _charge(d, _WRITER, _BUSY, tag, now)
    one[_M_PAGE] += 1
    if erases and one[_M_PAGE] < d.code[i, _PAGES2] + d.code[i, _MASKS]:
        one[_M_NEXT] = now + 1
    elif erases:
        one[_M_PHASE], one[_M_NEXT] = _FINISHING, now + 1
    else:
        _plan(p, d, now + 1)


@njit(**INNER)
def _lines_for_mover(p, d, op, now):
    """Rows of a page that goes to the mover: at its port from tick now + 2 on."""
    one = d.one
    lines = d.flash.ops[op, csd_flash.LINES]
    one[_M_LINES] -= lines
    i = one[_M_COMMAND]
    if d.code[i, _OP] == _READ:
        _count(d, d.code[i, _TAG], _VECTOR_LINES, lines)
        one[_MOVED_FROM], one[_MOVED_UNTIL] = now + 2, now + 1 + lines
    if one[_M_LINES] == 0 and one[_M_LOOKUPS] == 0:
        one[_M_NEXT] = now + 2 + lines
