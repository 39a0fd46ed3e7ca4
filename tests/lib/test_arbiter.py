# amaranth: UnusedElaboratable=no
# (some of these constructors raise)

import numpy as np
import pytest

from tests.lib.ticks import play
from tilewright.rtl.lib.arbiter import RoundRobin

OUTPUTS = ("valid", "grant", "index")


def test_turns_pass_only_with_a_taken_grant():
    # (requests, ready): 0 is first; not taken, so 0 again; then 2 as 1 is silent; nobody; then 0 as 2 had its turn.
    script = [(0b111, 0), (0b111, 1), (0b101, 1), (0, 1), (0b111, 1), (0b111, 1), (0b001, 1), (0b101, 0)]
    seen = play(
        RoundRobin(count=3),
        len(script),
        lambda t, _: dict(zip(("requests", "ready"), script[t], strict=True)),
        OUTPUTS,
    )
    assert [s["index"] for s in seen] == [0, 0, 2, 0, 0, 1, 0, 2]
    assert [s["valid"] for s in seen] == [1, 1, 1, 0, 1, 1, 1, 1]


@pytest.mark.parametrize("count", [1, 2, 5, 8])
def test_against_a_pointer(count):
    rng = np.random.default_rng(count)
    requests = rng.integers(1 << count, size=1500) & rng.integers(1 << count, size=1500)
    ready = rng.integers(2, size=1500)
    seen = play(
        RoundRobin(count=count), 1500, lambda t, _: {"requests": requests[t], "ready": ready[t]}, OUTPUTS
    )
    first = 0
    for t, tick in enumerate(seen):
        wanting = [k % count for k in range(first, first + count) if requests[t] >> k % count & 1]
        if not wanting:
            assert tick == {"valid": 0, "grant": 0, "index": 0}
            continue
        assert tick == {"valid": 1, "grant": 1 << wanting[0], "index": wanting[0]}
        if ready[t]:
            first = (wanting[0] + 1) % count


def test_all_who_ask_are_served_in_turn():
    seen = play(RoundRobin(count=4), 12, lambda t, _: {"requests": 15, "ready": 1}, OUTPUTS)
    assert [s["index"] for s in seen] == [0, 1, 2, 3] * 3


def test_an_arbiter_of_nobody_is_refused():
    with pytest.raises(ValueError, match=r"^count must be at least 1, not 0$"):
        RoundRobin(count=0)
