"""Timed banks of a memory channel in time: when a request is taken, and when its column command issues.

The rules are those of `rtl.rdu.banks`, which implements them anew. Ticks are those since the kernel's start.
"""

from numba import njit

from tilewright.sim.cache import INNER
from tilewright.sim.rdu_state import (
    ACTIVATES,
    BANK_OF_GROUP_BITS,
    CCD_L,
    CCD_S,
    COLUMN_BITS,
    FIRST_BANK,
    GROUP_BITS,
    LAST_COLUMN,
    LAST_GROUP,
    LAST_WRITE,
    LATER,
    NEXT_ACTIVATE,
    NEXT_CLOSED,
    NEXT_COLUMN,
    NEXT_OTHER,
    NEXT_PRECHARGE,
    NEXT_REFRESH,
    NEXT_SAME,
    NEXT_TURN,
    OPEN_ROW,
    RAS,
    RCD,
    REFI,
    REFRESHES,
    RFC,
    ROW_CONFLICTS,
    RP,
    RRD,
    RTP,
    RTW,
    STORE,
    TAKEN_AHEAD,
    TIER,
    WTP,
    WTR,
)


@njit(**INNER)
def first_taken(d, group, t):
    """The first tick from t on in which the channel takes a request; `d` is the tier's row of Machine.dram."""
    t = max(t, group[LAST_COLUMN] - d[TAKEN_AHEAD] + 1)
    return t + (t > 0 and t % d[REFI] == 0)


@njit(**INNER)
def _refresh(m, group, d):
    """The refresh that falls due: every bank closed, and none opened before its end."""
    begin = max(group[NEXT_REFRESH], group[NEXT_CLOSED]) + d[RP]
    group[NEXT_ACTIVATE] = group[NEXT_CLOSED] = max(group[NEXT_ACTIVATE], begin + d[RFC])
    group[NEXT_REFRESH] += d[REFI]
    for b in range(1 << d[GROUP_BITS] + d[BANK_OF_GROUP_BITS]):
        m.bank[group[FIRST_BANK] + b, OPEN_ROW] = -1


@njit(**INNER)
def take(m, group, agcu, line, t):
    """The channel takes an AGCU's request in tick t: its commands get their ticks, and its answer, too."""
    d = m.dram[group[TIER]]
    while group[NEXT_REFRESH] <= t:
        _refresh(m, group, d)
        agcu[REFRESHES] += 1
    bank_group = line & (1 << d[GROUP_BITS]) - 1
    line >>= d[GROUP_BITS] + d[COLUMN_BITS]
    bank_of_group = line & (1 << d[BANK_OF_GROUP_BITS]) - 1
    row = line >> d[BANK_OF_GROUP_BITS]
    bank = m.bank[group[FIRST_BANK] + (bank_of_group << d[GROUP_BITS] | bank_group)]
    if bank[OPEN_ROW] != row:
        activate = t
        if bank[OPEN_ROW] >= 0:
            activate = max(t, bank[NEXT_PRECHARGE]) + d[RP]
            agcu[ROW_CONFLICTS] += 1
        activate = max(activate, group[NEXT_ACTIVATE])
        agcu[ACTIVATES] += 1
        group[NEXT_ACTIVATE] = activate + d[RRD]
        bank[OPEN_ROW] = row
        bank[NEXT_COLUMN] = activate + d[RCD]
        bank[NEXT_PRECHARGE] = activate + d[RAS]
    write = agcu[STORE]
    column = max(t, bank[NEXT_COLUMN])
    column = max(column, group[NEXT_SAME] if bank_group == group[LAST_GROUP] else group[NEXT_OTHER])
    if write != group[LAST_WRITE]:
        column = max(column, group[NEXT_TURN])
    bank[NEXT_PRECHARGE] = max(bank[NEXT_PRECHARGE], column + (d[WTP] if write else d[RTP]))
    group[NEXT_CLOSED] = max(group[NEXT_CLOSED], bank[NEXT_PRECHARGE])
    group[LAST_COLUMN], group[LAST_GROUP], group[LAST_WRITE] = column, bank_group, write
    group[NEXT_SAME], group[NEXT_OTHER] = column + d[CCD_L], column + d[CCD_S]
    group[NEXT_TURN] = column + (d[WTR] if write else d[RTW])
    agcu[LATER] = column - t - d[RCD]
