# amaranth: UnusedElaboratable=no
# (some of these constructors raise)

from collections import deque

import numpy as np
import pytest

from tests.lib.ticks import play
from tilewright.rtl.lib.fifo import StreamFifo

OUTPUTS = ("i.ready", "o.valid", "o.payload", "level")


def test_a_push_is_visible_in_the_next_tick_and_a_full_queue_waits_for_the_tick_after_a_pop():
    # Depth 2: 7 and 8 go in at 0 and 1, which fills it; 9 waits until 7 has left (popped at 3), so it goes in at 4.
    pushes = {0: 7, 1: 8, 2: 9, 3: 9, 4: 9}
    seen = play(
        StreamFifo(shape=8, depth=2),
        7,
        lambda t, _: {"i.valid": t in pushes, "i.payload": pushes.get(t, 0), "o.ready": t in (3, 5)},
        OUTPUTS,
    )
    assert [s["level"] for s in seen] == [0, 1, 2, 2, 1, 2, 1]
    assert [s["i.ready"] for s in seen] == [1, 1, 0, 0, 1, 0, 1]
    assert [s["o.payload"] for s in seen[1:]] == [7, 7, 7, 8, 8, 9]


@pytest.mark.parametrize("depth", [1, 2, 3, 8])
def test_against_a_list(depth):
    rng = np.random.default_rng(depth)
    ticks = 1500
    # The odds change every 100 ticks, so that the queue is often full and often empty.
    odds = rng.choice([0.1, 0.5, 0.9], size=(ticks // 100, 2)).repeat(100, axis=0)
    valid, ready = (rng.random((ticks, 2)) < odds).T
    payload = rng.integers(256, size=ticks)
    seen = play(
        StreamFifo(shape=8, depth=depth),
        ticks,
        lambda t, _: {"i.valid": valid[t], "i.payload": payload[t], "o.ready": ready[t]},
        OUTPUTS,
    )
    held = deque()
    levels = set()
    for t, tick in enumerate(seen):
        levels.add(len(held))
        assert (tick["level"], tick["i.ready"], tick["o.valid"]) == (
            len(held),
            len(held) < depth,
            len(held) > 0,
        )
        push = valid[t] and len(held) < depth
        if held:
            assert tick["o.payload"] == held[0]
            if ready[t]:
                held.popleft()
        if push:
            held.append(payload[t])
    assert levels == set(range(depth + 1))


def test_depth_two_moves_an_item_a_tick():
    seen = play(StreamFifo(shape=4, depth=2), 50, lambda t, _: {"i.valid": 1, "o.ready": 1}, OUTPUTS)
    assert [s["o.valid"] for s in seen] == [0] + [1] * 49


def test_a_push_into_a_full_queue_fails():
    queue = StreamFifo(shape=4, depth=2, always_ready=True)
    play(queue, 2, lambda t, _: {"i.valid": 1}, ["level"])  # fills it
    with pytest.raises(AssertionError, match="push into a full queue"):
        play(queue, 3, lambda t, _: {"i.valid": 1}, ["level"])


def test_a_queue_without_places_is_refused():
    with pytest.raises(ValueError, match=r"^depth must be at least 1, not 0$"):
        StreamFifo(shape=4, depth=0)
