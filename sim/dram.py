"""A DRAM channel in time: kernels that say when a command may issue, and why not sooner.

The kernels take `DramParams` (see `tilewright.arch.dram` for what its constraints mean) and a `DramState`; any
machine with DRAM calls them from its own loop. `DramChannel` is the same for people: one command at a time
in strict mode, or a list of commands through the in-order scheduler.
"""

from typing import NamedTuple

import numpy as np
from numba import njit

from tilewright.arch.dram import Array, DramParams, Effect, Needs, Scope
from tilewright.sim.cache import INNER

NEVER = -(2**40)  # the tick of a command that has not been issued: older than any latency

# The kernels use literals of this file, since a cached kernel would keep the old value of an enum that
# was renumbered elsewhere.
_CHANNEL, _BANKGROUP, _BANK = 0, 1, 2
_NEEDS_OPEN, _NEEDS_CLOSED, _NEEDS_ALL_OPEN, _NEEDS_ALL_CLOSED = 1, 2, 3, 4
_OPENS, _OPENS_ALL, _CLOSES, _CLOSES_ALL = 1, 2, 3, 4
assert [s.value for s in Scope] == [_CHANNEL, _BANKGROUP, _BANK]
assert [n.value for n in Needs] == [0, _NEEDS_OPEN, _NEEDS_CLOSED, _NEEDS_ALL_OPEN, _NEEDS_ALL_CLOSED]
assert [e.value for e in Effect] == [0, _OPENS, _OPENS_ALL, _CLOSES, _CLOSES_ALL]


class DramState(NamedTuple):
    """What a channel remembers; nodes and banks are numbered as in `DramParams`."""

    last: Array  # [n_nodes, n_commands, max_window] ticks, most recent first; NEVER at first
    open_row: Array  # [n_banks] -1 = closed


def new_state(params: DramParams) -> DramState:
    """A channel at power-up: no history, every bank closed."""
    n_nodes = 1 + params.n_bankgroups + params.n_banks
    return DramState(
        last=np.full((n_nodes, params.n_commands, params.max_window), NEVER, np.int64),
        open_row=np.full(params.n_banks, -1, np.int64),
    )


@njit(**INNER)
def ready_tick(p, s, command, bank):
    """The earliest tick at which the constraints let `command` issue, 0 if none binds.

    `bank` is ignored for a CHANNEL command. Bank state is `legal_state`'s business.
    """
    ready = 0
    first = p.row_start[command]
    end = p.row_start[command + 1]
    if p.cmd_scope[command] == _CHANNEL:
        for row in range(first, end):
            t = s.last[0, p.row_prev[row], p.row_window[row] - 1] + p.row_latency[row]
            ready = max(ready, t)
        return ready
    group_node = p.bank_group_node[bank]
    bank_node = 1 + p.n_bankgroups + bank
    for row in range(first, end):
        scope = p.row_scope[row]
        node = 0 if scope == _CHANNEL else (group_node if scope == _BANKGROUP else bank_node)
        t = s.last[node, p.row_prev[row], p.row_window[row] - 1] + p.row_latency[row]
        ready = max(ready, t)
    return ready


@njit(**INNER)
def charge(p, s, command, bank, start, end, stalls):
    """Charge the ticks start..end-1, in which `command` waits, to the causes that hold it back.

    Each tick goes to the first cause, in charging order, with a constraint unmet in that tick; `stalls`
    [n_causes] is added to. Ticks in which nothing is unmet are charged to nobody. Call before `record`.
    Returns the tick at which the command may issue, `end` if that comes first.
    """
    charged = start
    bank_node = 1 + p.n_bankgroups + bank
    for row in range(p.row_start[command], p.row_start[command + 1]):  # rows lie in charging order
        scope = p.row_scope[row]
        node = 0
        if scope == _BANKGROUP:
            node = p.bank_group_node[bank]
        elif scope == _BANK:
            node = bank_node
        t = min(end, s.last[node, p.row_prev[row], p.row_window[row] - 1] + p.row_latency[row])
        if t > charged:
            stalls[p.row_cause[row]] += t - charged
            charged = t
    return charged


@njit(**INNER)
def _first_bank(p, command, bank):
    """The first of the banks that `command` addresses."""
    scope = p.cmd_scope[command]
    if scope == _BANK:
        return bank
    if scope == _BANKGROUP:
        return (p.bank_group_node[bank] - 1) * p.banks_per_group
    return 0


@njit(**INNER)
def _end_bank(p, command, bank):
    """One past the last of the banks that `command` addresses."""
    scope = p.cmd_scope[command]
    if scope == _BANK:
        return bank + 1
    if scope == _BANKGROUP:
        return p.bank_group_node[bank] * p.banks_per_group
    return p.n_banks


@njit(**INNER)
def legal_state(p, s, command, bank, row):
    """Whether the banks are in the state that `command` needs.

    Where a row must be open it must be `row`; a `row` of -1 accepts any.
    """
    needs = p.cmd_needs[command]
    if needs == 0:
        return True
    first, end = 0, p.n_banks
    if needs == _NEEDS_OPEN or needs == _NEEDS_CLOSED:
        first, end = _first_bank(p, command, bank), _end_bank(p, command, bank)
    wants_open = needs == _NEEDS_OPEN or needs == _NEEDS_ALL_OPEN
    for b in range(first, end):
        held = s.open_row[b]
        if wants_open:
            if held < 0 or (row >= 0 and held != row):
                return False
        elif held >= 0:
            return False
    return True


@njit(**INNER)
def apply_effect(p, open_row, command, bank, row):
    """Open or close the rows in `open_row` [n_banks] that `command` opens or closes."""
    effect = p.cmd_effect[command]
    if effect == 0:
        return
    first, end = 0, p.n_banks
    if effect == _OPENS or effect == _CLOSES:
        first, end = _first_bank(p, command, bank), _end_bank(p, command, bank)
    opened = row if effect == _OPENS or effect == _OPENS_ALL else -1
    for b in range(first, end):
        open_row[b] = opened


@njit(**INNER)
def _remember(last, node, command, depth, tick):
    for w in range(depth - 1, 0, -1):
        last[node, command, w] = last[node, command, w - 1]
    last[node, command, 0] = tick


@njit(**INNER)
def record(p, s, command, bank, row, tick):
    """`command` issues at `tick`: enter it in the history of its nodes and move the open rows."""
    depth = p.cmd_history[command]
    _remember(s.last, 0, command, depth, tick)
    scope = p.cmd_scope[command]
    if scope != _CHANNEL:
        _remember(s.last, p.bank_group_node[bank], command, depth, tick)
        if scope == _BANK:
            _remember(s.last, 1 + p.n_bankgroups + bank, command, depth, tick)
    apply_effect(p, s.open_row, command, bank, row)
