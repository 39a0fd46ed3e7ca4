"""Laws of the cycle model: closed forms of flash channels that hold exactly.

For one channel with U dies of one plane, N = m * U pages that all are known from tick 1 on and follow each other die by
die, c = command, R = array time, x = transfer of a page, in ticks, with R >= (U - 1) * c (the first page is not there
before the last die has its command) and x >= c:

    one page         T = 1 + c + R + x
    pipelined        T = 1 + c + R + U * (x + c) + (m - 2) * max(c + R + x, U * (x + c)) + max((U - 1) * x, R) + x, m >= 2
    cached reads     T = 1 + c + R + (m - 1) * max(c + R, U * (x + c)) + U * x

The textbook forms R + c + N * max(x, (R + c + x) / U), and with (R + c) / U, leave the commands on the bus out.
"""

import numpy as np
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.csd.units import small_spec
from tests.inner import called
from tilewright.arch.flash import READ
from tilewright.sim import csd_flash


def last_tick(dies, command, read, transfer, pages, cached):
    """The tick after the last byte of so many pages, one after the other in a channel's log."""
    spec = small_spec(
        flash__geometry__channels=1, flash__geometry__chips_per_channel=dies, flash__geometry__planes_per_die=1,
        flash__queue=64, flash__scheduler__window=64, flash__scheduler__policy="pipelined",
        flash__scheduler__cache_read=cached, flash__interface__read_command_ns=command,
        flash__cells__read_lsb_us=read / 1000, flash__interface__mb_per_s=128000 / transfer,
    )  # fmt: skip
    p = spec.params()
    assert (p.flash.read[0], p.flash.page_transfer, p.flash.command[READ, 1]) == (read, transfer, command)
    s = csd_flash.new_channels(p, 1, np.zeros((1, 1, 4), np.int64), 0, (1, 2, 3))
    for page in range(pages):
        called(csd_flash.push)(p, s, 0, READ, page, 0, 0, 0, 0, 0)
    left, now = pages, 0
    while left:
        now = min(s.next[0], s.look[0])
        assert now < csd_flash.NEVER, "pages wait for ever"
        if s.look[0] == now:
            called(csd_flash.step_rows)(p, s, 0, now)
            left -= 1
        if s.next[0] == now:
            called(csd_flash.step_channel)(p, s, 0, now)
    return now - 1  # a page is dropped in the tick after it came


times = {
    "command": st.integers(1, 6),
    "read": st.integers(3, 130),
    "transfer": st.sampled_from([8, 10, 16, 32]),
}


def test_one_page_by_hand():
    # Known from tick 1 on: command 3, array 40, transfer 8.
    assert last_tick(1, 3, 40, 8, 1, False) == 1 + 3 + 40 + 8


def test_two_dies_by_hand():
    # Commands in ticks 1-2 and 3-4, arrays end at 33 and 35. Pages out 33-40, then, after the next command 41-42, 43-50;
    # the command 51-52. The second pages are there at 73 and 83, and take 8 each.
    assert last_tick(2, 2, 30, 8, 4, False) == 91


@settings(deadline=None, max_examples=40)
@given(**times)
def test_latency_of_a_page(command, read, transfer):
    assert last_tick(1, command, read, transfer, 1, False) == 1 + command + read + transfer


@settings(deadline=None, max_examples=40)
@given(dies=st.integers(1, 5), rounds=st.integers(2, 6), **times)
def test_pipelined_reads(dies, rounds, command, read, transfer):
    assume(read >= (dies - 1) * command)
    period = max(command + read + transfer, dies * (transfer + command))
    want = (
        1 + command + read + dies * (transfer + command) + (rounds - 2) * period
        + max((dies - 1) * transfer, read) + transfer
    )  # fmt: skip
    assert last_tick(dies, command, read, transfer, rounds * dies, False) == want


@settings(deadline=None, max_examples=40)
@given(dies=st.integers(1, 5), rounds=st.integers(1, 6), **times)
def test_cached_reads(dies, rounds, command, read, transfer):
    assume(read >= (dies - 1) * command)
    period = max(command + read, dies * (transfer + command))
    want = 1 + command + read + (rounds - 1) * period + dies * transfer
    assert last_tick(dies, command, read, transfer, rounds * dies, True) == want
