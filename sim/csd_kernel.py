"""The attention kernels of a drive in time: phases of known lengths, and waits for lines, ports and the argtopk unit.

The phases are those of the RTL's kernel (`rtl.csd.kernel`): what does something in each of n ticks takes n ticks, then the
latency of the unit until its last result is in its memory, then the next phase. A batch is worked on from the second tick
on in which it is complete, a line counting from the tick after it came. `step` is called at the end of a tick: what it
sets holds from the next tick on.
"""

from numba import njit

from tilewright.arch import csd as arch
from tilewright.sim import csd_state
from tilewright.sim.cache import CALLED, INNER
from tilewright.sim.csd_state import charge, count, head_done

# Literals of this file: a cached kernel would keep the old value of a constant changed elsewhere.
_NEVER, _UNLIMITED = 1 << 62, 1 << 40
_BUSY, _ARRAY, _FLASH, _ARGTOPK, _QUEUE, _ORDER, _ARRIVAL, _DRAIN, _IDLE = range(9)
assert arch.CAUSES == ("array", "flash", "argtopk", "queue", "order", "arrival", "drain", "idle")
_TOPK, _KERNEL = 3, 4
assert arch.SINGLE_UNITS.index("argtopk") == _TOPK and len(arch.SINGLE_UNITS) == _KERNEL
_PRODUCTS, _EXPONENTIALS, _COMPARED, _STEPS = 10, 11, 12, 13
assert arch.COUNTERS[_PRODUCTS:] == ("products", "exponentials", "compared_words", "scalar_steps")
_INVERSE, _TAU, _COVERAGE, _FACTORS = range(4)
assert tuple(arch.scalar_programs(1, 1)) == ("inverse", "tau", "coverage", "factors")
_PASSES = 18  # of the argtopk unit
assert arch.argtopk_ticks(1, 1) == 2 * _PASSES
_LANE_TICKS, _VECTOR_TICKS = (
    2,
    3,
)  # of a scalar step; from a memory's address to what the vector unit makes of its word
assert (arch.LANE_TICKS, arch.VECTOR_TICKS) == (_LANE_TICKS, _VECTOR_TICKS)
_TOPK_RELEASE = 27
assert csd_state.TOPK_RELEASE == _TOPK_RELEASE
_BY_CHANNELS = 1
assert arch.FORMS.index("channels") == _BY_CHANNELS

# Fields of a command.
_TOKENS, _SPANS, _TAG, _ATTENTION, _D, _GROUP, _R, _K = 3, 4, 13, 14, 15, 16, 17, 18
_MEAN, _PAGE_TOKENS, _PAGE_CHANNELS, _SPAN = 20, 21, 22, 23
assert [
    *(csd_state.TOKENS, csd_state.SPANS, csd_state.TAG, csd_state.ATTENTION, csd_state.D, csd_state.GROUP),
    *(
        csd_state.R,
        csd_state.K,
        csd_state.MEAN,
        csd_state.PAGE_TOKENS,
        csd_state.PAGE_CHANNELS,
        csd_state.SPAN,
    ),
] == [_TOKENS, _SPANS, _TAG, _ATTENTION, _D, _GROUP, _R, _K, _MEAN, _PAGE_TOKENS, _PAGE_CHANNELS, _SPAN]

# What the drive knows of a kernel, then its own.
_IS_BUSY, _COMMAND, _HEAD, _NEXT, _PHASE, _READ_LEFT, _WRITE_LEFT, _SUM_LEFT, _TOPK_WANTS, _ASK = range(10)
_FORM, _VALUES, _TURN, _ALL, _FIRST, _N, _ROWS, _ROW_LINES, _ACCEPTED, _LIMIT, _IDLE_FROM = range(10, 21)
_TAKES, _FOLLOWS, _NEXT_COMMAND, _NEXT_HEAD, _ASK_COMMAND, _ASK_HEAD = range(21, 27)
assert csd_state.K_ASK == _ASK and csd_state.K_IDLE_FROM == _IDLE_FROM and csd_state.K_OWN == _ASK_HEAD + 1
# DUE: tick in which the phase ends. Of the head: lines of a row, whether it estimates, tokens that are needed, rows of a
# part. Of batches: first row, part, whether lines that come are values, and in which phase the kernel is of estimate, keys,
# values; spans worked on and asked for; WAITS_FROM the first tick of a wait. Of each part: lines that came, tick of the last one.
_DUE, _LINES, _ESTIMATES, _NEEDED, _FITS, _PART, _KEYS_ASKED, _BASE, _LATER, _MIXED = range(27, 37)
_ESTIMATING, _OF_TOKENS, _OF_VALUES, _SPANS_DONE, _SPANS_ASKED, _KEYS_WANTED, _VALUES_ASKED = range(37, 44)
_FOLLOWING_ASKED, _WAITS_FROM, _CAME, _LAST = 44, 45, 46, 62
assert csd_state.KERNEL_COLUMNS == _LAST + 16
_BEGIN, _LOAD, _LOADED, _TURNS, _RANK, _WAIT, _WORK, _WEIGH, _FACTOR, _SUMS, _JOIN, _FIRST_LINE, _STORE = (
    range(13)
)


@njit(**INNER)
def _program(p, d, tag, which, times):
    """Ticks of a scalar program, from the one that starts it to the one after its end; it runs so many times."""
    ticks = p.scalar_ticks[which]
    count(d, tag, _STEPS, times * (ticks // _LANE_TICKS))
    return ticks + 1


@njit(**INNER)
def _rows(d, kernel):
    """Rows of the batch, and batches of its pass from it on."""
    command = d.code[kernel[_COMMAND]]
    if kernel[_ESTIMATING] == 1:
        step, total = command[_SPAN], command[_TOKENS]
    else:
        step, total = kernel[_FITS], kernel[_NEEDED]
    left = total - kernel[_BASE]
    return min(step, left), (left + step - 1) // step


@njit(**INNER)
def _estimates(command):
    """Whether tokens are selected."""
    return command[_ATTENTION] == 1 and command[_K] < command[_TOKENS]


@njit(**INNER)
def _asks(p, d, kernel):
    """Ask for the next pass, if it may be asked for."""
    if kernel[_ASK] == 1:
        return
    kernel[_ASK_COMMAND], kernel[_ASK_HEAD] = kernel[_COMMAND], kernel[_HEAD]
    command = d.code[kernel[_COMMAND]]
    span, asked = command[_SPAN], kernel[_SPANS_ASKED]
    kernel[_FIRST] = kernel[_VALUES] = kernel[_TURN] = kernel[_FORM] = 0
    kernel[_ROWS], kernel[_ROW_LINES] = command[_PAGE_TOKENS], kernel[_LINES]
    kernel[_N] = command[_TOKENS]
    kernel[_ALL] = 1 - kernel[_ESTIMATES]
    if kernel[_ESTIMATING] == 1:
        left = command[_TOKENS] - asked * span
        if left <= 0 or asked - kernel[_SPANS_DONE] == p.batches:
            return
        kernel[_TURN] = asked % p.batches
        if asked < command[_SPANS]:
            kernel[_FORM], kernel[_ALL], kernel[_FIRST], kernel[_N] = _BY_CHANNELS, 0, asked, command[_D]
            kernel[_ROWS], kernel[_ROW_LINES] = command[_PAGE_CHANNELS], span * kernel[_LINES] // command[_D]
        else:
            kernel[_ALL], kernel[_FIRST] = 1, asked * (span // command[_PAGE_TOKENS])
            kernel[_N] = min(left, span)
    elif kernel[_FOLLOWS] == 1:
        # Keys of the following head, if it has no estimate.
        command = d.code[kernel[_NEXT_COMMAND]]
        if kernel[_FOLLOWING_ASKED] == 1 or _estimates(command):
            return
        kernel[_ASK_COMMAND], kernel[_ASK_HEAD] = kernel[_NEXT_COMMAND], kernel[_NEXT_HEAD]
        kernel[_N], kernel[_ALL] = command[_TOKENS], 1
    elif kernel[_KEYS_WANTED] == 0:
        if kernel[_KEYS_ASKED] == 0 or kernel[_VALUES_ASKED] == 1:
            return
        if kernel[_LATER] == 0 and _rows(d, kernel)[1] >= p.batches:
            return
        kernel[_VALUES] = kernel[_TURN] = 1
    kernel[_ASK] = 1


@njit(**INNER)
def _limits(p, d, kernel):
    """Rows that there is room for: of the pass that is worked on, or of the next one in the parts that are left."""
    room = (p.batches - _rows(d, kernel)[1]) * kernel[_FITS]
    if kernel[_FOLLOWING_ASKED] == 1:
        kernel[_LIMIT] = p.batches * kernel[_FITS] if kernel[_MIXED] == 1 else room
    elif (
        kernel[_ESTIMATING] == 1
        or kernel[_MIXED] == 1
        or (kernel[_LATER] == 1 and kernel[_VALUES_ASKED] == 0)
    ):
        kernel[_LIMIT] = _UNLIMITED
    elif kernel[_VALUES_ASKED] == 1 and kernel[_LATER] == 0:
        kernel[_LIMIT] = room
    else:
        kernel[_LIMIT] = kernel[_BASE] + p.batches * kernel[_FITS]


@njit(**INNER)
def _begin_work(p, d, k):
    """The batch is worked on, if it is complete."""
    kernel = d.kernels[k]
    command = d.code[kernel[_COMMAND]]
    part, tag = kernel[_PART], command[_TAG]
    rows, _ = _rows(d, kernel)
    chosen = min(command[_R], command[_D])
    expected = rows * kernel[_LINES]
    if kernel[_ESTIMATING] == 1 and kernel[_SPANS_DONE] < command[_SPANS]:
        expected = chosen * (command[_SPAN] // p.lanes)
    if kernel[_CAME + part] < expected:
        return
    first = max(kernel[_WAITS_FROM], kernel[_LAST + part] + 1) + 1
    if kernel[_ESTIMATING] == 1:
        ticks = -(-chosen // p.lanes) * rows
    elif kernel[_OF_VALUES] == 1:
        ticks = -(-rows // p.lanes) * command[_D]
    else:
        ticks = rows * kernel[_LINES]
    ticks *= command[_GROUP]
    count(d, tag, _PRODUCTS, ticks)
    charge(d, _KERNEL + k, _BUSY, tag, first)
    kernel[_PHASE], kernel[_DUE] = _WORK, first + ticks - 1


@njit(**INNER)
def _wait(p, d, k, first):
    """From tick `first` on the kernel waits for a batch."""
    kernel = d.kernels[k]
    charge(d, _KERNEL + k, _FLASH, d.code[kernel[_COMMAND], _TAG], first)
    kernel[_WAITS_FROM] = first
    kernel[_PHASE], kernel[_DUE] = _WAIT, _NEVER
    _begin_work(p, d, k)


@njit(**INNER)
def _want_topk(d, k, first):
    """From tick `first` on the kernel wants the argtopk unit."""
    kernel = d.kernels[k]
    charge(d, _KERNEL + k, _ARGTOPK, d.code[kernel[_COMMAND], _TAG], first)
    kernel[_TOPK_WANTS], kernel[_PHASE], kernel[_DUE] = 1, _TURNS, _NEVER


@njit(**INNER)
def _rank(p, d, k, first):
    """The argtopk unit is its own: keys from tick `first` on, then the search."""
    kernel = d.kernels[k]
    command = d.code[kernel[_COMMAND]]
    tag = command[_TAG]
    n = command[_TOKENS] if kernel[_OF_TOKENS] == 1 else command[_D]
    words = -(-n // p.lanes)
    start = first + command[_GROUP] * words + _VECTOR_TICKS
    last = start + _PASSES * (words + 1)
    charge(d, _KERNEL + k, _BUSY, tag, first)
    charge(d, _KERNEL + k, _ARGTOPK, tag, start + 1)
    charge(d, _TOPK, _BUSY, tag, start + 1)
    charge(d, _TOPK, _IDLE, d.activity.shape[0] - 1, last + 1)
    count(d, tag, _COMPARED, _PASSES * words)
    d.one[_TOPK_RELEASE] = last
    kernel[_PHASE], kernel[_DUE] = _RANK, last


@njit(**INNER)
def _ranked(p, d, k, first):
    """What follows a selection: the temperature, and queries packed; or alpha. Then the kernel waits for pages."""
    kernel = d.kernels[k]
    command = d.code[kernel[_COMMAND]]
    group, tag = command[_GROUP], command[_TAG]
    charge(d, _KERNEL + k, _BUSY, tag, first)
    if kernel[_OF_TOKENS] == 0:
        kernel[_ESTIMATING] = 1
        ticks = 3 * kernel[_LINES] + p.reduce_latency + _program(p, d, tag, _TAU, group)
    else:
        kernel[_KEYS_WANTED] = 1
        ticks = -(-command[_TOKENS] // p.lanes) + p.reduce_latency + _program(p, d, tag, _COVERAGE, group)
    _limits(p, d, kernel)
    _asks(p, d, kernel)
    _wait(p, d, k, first + group * ticks)


@njit(**INNER)
def _worked(p, d, k, now):
    """A batch is done with tick `now`."""
    kernel = d.kernels[k]
    command = d.code[kernel[_COMMAND]]
    group, tag = command[_GROUP], command[_TAG]
    rows, batches = _rows(d, kernel)
    final = batches == 1
    estimating = kernel[_ESTIMATING] == 1
    kernel[_CAME + kernel[_PART]] = 0
    kernel[_PART] = (kernel[_PART] + 1) % p.batches
    kernel[_BASE] += rows
    if estimating:
        kernel[_SPANS_DONE] += 1
    elif final:
        kernel[_BASE], kernel[_LATER], kernel[_MIXED] = 0, 1 - kernel[_OF_VALUES], kernel[_OF_VALUES]
    _limits(p, d, kernel)
    _asks(p, d, kernel)
    if not final:
        _wait(p, d, k, now + 1)
        return
    first = now + 2 + p.gemv_latency
    if kernel[_MIXED] == 1:
        if command[_MEAN] == 1 and kernel[_ESTIMATES] == 1:
            ticks = group * _program(p, d, tag, _FACTORS, group)
            kernel[_PHASE], kernel[_DUE] = _FACTOR, first + ticks - 1
        else:
            _join(d, k, first)
        return
    n = command[_TOKENS] if estimating else kernel[_NEEDED]
    count(d, tag, _EXPONENTIALS, group * n)
    ticks = n + p.exp_latency + p.reduce_latency + _program(p, d, tag, _INVERSE, group)
    if estimating:
        kernel[_PHASE], kernel[_DUE] = _WEIGH, first + group * ticks - 1
    else:
        kernel[_OF_VALUES] = 1
        _wait(p, d, k, first + group * ticks)


@njit(**INNER)
def _join(d, k, first):
    """Results from tick `first` on."""
    kernel = d.kernels[k]
    command = d.code[kernel[_COMMAND]]
    ticks = command[_GROUP] * kernel[_LINES] * (2 if command[_MEAN] == 1 and kernel[_ESTIMATES] == 1 else 1)
    charge(d, _KERNEL + k, _BUSY, command[_TAG], first)
    kernel[_PHASE], kernel[_DUE] = _FIRST_LINE, first + ticks + _VECTOR_TICKS


@njit(**INNER)
def _prepare(p, d, kernel):
    """What follows from the head's command."""
    command = d.code[kernel[_COMMAND]]
    kernel[_LINES] = command[_D] // p.lanes
    kernel[_FITS] = p.buffer_lines // kernel[_LINES] // p.lanes * p.lanes
    estimates = _estimates(command)
    kernel[_ESTIMATES] = 1 if estimates else 0
    kernel[_NEEDED] = command[_K] if estimates else command[_TOKENS]


@njit(**INNER)
def _begin(p, d, k, now):
    """The tick after a head was taken, or the one before was done."""
    kernel = d.kernels[k]
    command = d.code[kernel[_COMMAND]]
    _prepare(p, d, kernel)
    if kernel[_ESTIMATES] == 1:
        kernel[_PART] = 0
    elif kernel[_KEYS_ASKED] == 0:
        kernel[_KEYS_WANTED] = 1
    charge(d, _KERNEL + k, _BUSY, command[_TAG], now)
    kernel[_READ_LEFT] = command[_GROUP] * kernel[_LINES]
    kernel[_PHASE], kernel[_DUE] = _LOAD, _NEVER
    if kernel[_ESTIMATES] == 0:
        _limits(p, d, kernel)
        _asks(p, d, kernel)


@njit(**CALLED)
def _advance(p, d, k, now):
    """A phase ends with tick `now`."""
    kernel = d.kernels[k]
    command = d.code[kernel[_COMMAND]]
    phase, tag = kernel[_PHASE], command[_TAG]
    if phase == _BEGIN:
        _begin(p, d, k, now)
    elif phase == _LOAD:
        # The last line is written in a tick of its own.
        charge(d, _KERNEL + k, _BUSY, tag, now + 1)
        if kernel[_ESTIMATES] == 1:
            kernel[_PHASE], kernel[_DUE] = _LOADED, now + 1
        else:
            _wait(p, d, k, now + 2)
    elif phase == _LOADED:
        _want_topk(d, k, now + 1)
    elif phase == _TURNS:
        _rank(p, d, k, now + 1)
    elif phase == _RANK:
        _ranked(p, d, k, now + 1)
    elif phase == _WORK:
        _worked(p, d, k, now)
    elif phase == _WEIGH:
        kernel[_OF_TOKENS] = 1
        kernel[_ESTIMATING] = kernel[_BASE] = kernel[_PART] = 0
        _want_topk(d, k, now + 1)
    elif phase == _FACTOR:
        kernel[_SUM_LEFT] = kernel[_LINES]
        kernel[_PHASE], kernel[_DUE] = _SUMS, _NEVER
    elif phase == _SUMS:
        _join(d, k, now + 1)
    elif phase == _FIRST_LINE:
        # Not before the last page was looked at.
        if kernel[_IDLE_FROM] > now and kernel[_FOLLOWS] == 0:
            charge(d, _KERNEL + k, _QUEUE, tag, now)
            kernel[_DUE] = _NEVER
        else:
            charge(d, _KERNEL + k, _BUSY, tag, now)
            kernel[_WRITE_LEFT] = command[_GROUP] * kernel[_LINES]
            kernel[_PHASE], kernel[_DUE] = _STORE, _NEVER
    elif phase == _STORE:
        head_done(d, k, now)
        kernel[_KEYS_ASKED] = kernel[_FOLLOWING_ASKED]
        for column in range(_BASE, _WAITS_FROM):
            kernel[column] = 0
        if kernel[_FOLLOWS] == 1:
            kernel[_COMMAND], kernel[_HEAD] = kernel[_NEXT_COMMAND], kernel[_NEXT_HEAD]
            kernel[_FOLLOWS] = 0
            kernel[_PHASE], kernel[_DUE] = _BEGIN, now + 1
            _prepare(p, d, kernel)
            kernel[_KEYS_WANTED] = 1 - max(kernel[_ESTIMATES], kernel[_KEYS_ASKED])
            _limits(p, d, kernel)
            _asks(p, d, kernel)
        else:
            kernel[_IS_BUSY], kernel[_DUE] = 0, _NEVER
            charge(d, _KERNEL + k, _IDLE, d.activity.shape[0] - 1, now + 1)


@njit(**CALLED)
def step(p, d, k, now):
    """What kernel k does at the end of tick `now`, that of its K_NEXT."""
    kernel = d.kernels[k]
    phase = kernel[_PHASE]
    # What ends with the drive's word.
    if (
        phase == _BEGIN
        or (phase == _LOAD and kernel[_READ_LEFT] == 0)
        or (phase == _STORE and kernel[_WRITE_LEFT] == 0)
        or (phase == _SUMS and kernel[_SUM_LEFT] == 0)
        or (phase == _TURNS and kernel[_TOPK_WANTS] == 0)
        or (phase == _FIRST_LINE and kernel[_DUE] == _NEVER and kernel[_IDLE_FROM] <= now)
    ):
        kernel[_DUE] = now
    if kernel[_ACCEPTED] == now:
        if kernel[_ESTIMATING] == 1:
            kernel[_SPANS_ASKED] += 1
        elif kernel[_KEYS_WANTED] == 1:
            kernel[_KEYS_WANTED], kernel[_KEYS_ASKED] = 0, 1
        elif kernel[_FOLLOWS] == 1:
            kernel[_FOLLOWING_ASKED] = 1
        else:
            kernel[_VALUES_ASKED] = 1
        _limits(p, d, kernel)
        _asks(p, d, kernel)
    if kernel[_DUE] == now:
        _advance(p, d, k, now)
    if kernel[_FOLLOWS] == 1:
        _asks(p, d, kernel)
    # The next head may be taken while the last batch of values is worked on.
    kernel[_TAKES] = 0
    ends = kernel[_VALUES_ASKED] == 1 and kernel[_ESTIMATES] == 0 and kernel[_PHASE] != _STORE
    if ends and (kernel[_MIXED] == 1 or (kernel[_LATER] == 1 and _rows(d, kernel)[1] < p.batches)):
        kernel[_TAKES] = 1
    kernel[_NEXT] = kernel[_DUE]


@njit(**CALLED)
def arrive(p, d, k, turn, rank, lines, first):
    """So many lines, rows of the pass from `rank` on, come to kernel k in the ticks from `first` on."""
    kernel = d.kernels[k]
    if kernel[_ESTIMATING] == 1:
        kernel[_CAME + turn] += lines
        kernel[_LAST + turn] = max(kernel[_LAST + turn], first + lines - 1)
    else:
        # Rows from the first one of the batch that is worked on, that of the next pass behind the last one of this.
        row, part = rank - kernel[_BASE], kernel[_PART]
        if turn != kernel[_LATER]:
            row, part = rank, part + _rows(d, kernel)[1]
        part += row // kernel[_FITS]
        room = (kernel[_FITS] - row % kernel[_FITS]) * kernel[_LINES]
        last = first - 1
        while lines > 0:
            here = min(lines, room)
            part %= p.batches
            last += here
            kernel[_CAME + part] += here
            kernel[_LAST + part] = max(kernel[_LAST + part], last)
            lines -= here
            part += 1
            room = kernel[_FITS] * kernel[_LINES]
    if kernel[_PHASE] == _WAIT and kernel[_DUE] == _NEVER:
        _begin_work(p, d, k)
        kernel[_NEXT] = min(kernel[_NEXT], kernel[_DUE])
