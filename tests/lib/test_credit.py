# amaranth: UnusedElaboratable=no
# (some of these constructors raise)

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lib.ticks import play
from tilewright.rtl.lib.credit import CreditLink, CreditReceiver, CreditSender

OUTPUTS = ("i.ready", "o.valid", "o.payload", "credits")


def play_link(link, valid, ready):
    """Offer 0, 1, 2, ... and return the (tick, item) pairs of pushes and of pops, and all outputs."""
    pushed, popped = [], []

    def drive(t, before):
        if before and valid[t - 1] and before["i.ready"]:
            pushed.append((t - 1, len(pushed)))
        if before and ready[t - 1] and before["o.valid"]:
            popped.append((t - 1, before["o.payload"]))
        if t == len(valid):
            return {"i.valid": 0, "o.ready": 0}
        return {"i.valid": valid[t], "i.payload": len(pushed), "o.ready": ready[t]}

    seen = play(link, len(valid) + 1, drive, OUTPUTS)
    return pushed, popped, seen


@pytest.mark.parametrize(
    "credits, forward, backward", [(1, 1, 1), (1, 2, 3), (2, 1, 2), (3, 3, 1), (4, 2, 2), (5, 1, 1)]
)
def test_throughput_is_credits_per_round_trip(credits, forward, backward):
    # Each slot makes one round trip in forward + backward ticks, but only one item is sent a tick.
    ticks = 60
    link = CreditLink(shape=8, credits=credits, forward=forward, backward=backward)
    pushed, popped, seen = play_link(link, [True] * ticks, [True] * ticks)
    trip = forward + backward
    assert [t for t, _ in pushed] == [t for t in range(ticks) if t % trip < credits]
    assert popped == [(t + forward, n) for t, n in pushed if t + forward < ticks]
    # In any tick, the pushes of the trip - 1 ticks before are still out.
    assert min(s["credits"] for s in seen) == max(0, credits - (trip - 1))


@settings(deadline=None, max_examples=20)
@given(st.integers(1, 5), st.integers(1, 3), st.integers(1, 3), st.randoms(use_true_random=False))
def test_order_latency_and_items_in_flight(credits, forward, backward, random):
    ticks = 120
    valid, ready = ([random.random() < random.choice([0.2, 0.9]) for _ in range(ticks)] for _ in range(2))
    link = CreditLink(shape=8, credits=credits, forward=forward, backward=backward)
    pushed, popped, _ = play_link(link, valid, ready)
    assert [n for _, n in popped] == list(range(len(popped)))

    # A plain account: a slot is free again `backward` ticks after its pop.
    push_ticks, pop_ticks = [], []
    for t in range(ticks):
        spent = len(push_ticks) - sum(p + backward <= t for p in pop_ticks)
        assert spent <= credits
        oldest = len(pop_ticks)
        if ready[t] and oldest < len(push_ticks) and push_ticks[oldest] + forward <= t:
            pop_ticks.append(t)
        if valid[t] and spent < credits:
            push_ticks.append(t)
    assert [t for t, _ in pushed] == push_ticks
    assert [t for t, _ in popped] == pop_ticks


def test_an_item_without_a_credit_fails_at_the_receiver():
    receiver = CreditReceiver(shape=8, credits=2)
    with pytest.raises(AssertionError, match="push into a full queue"):
        play(receiver, 4, lambda t, _: {"link.valid": 1}, ["level"])


def test_a_credit_too_many_fails_at_the_sender():
    sender = CreditSender(shape=8, credits=2)
    with pytest.raises(AssertionError, match="none was spent"):
        play(sender, 3, lambda t, _: {"link.credit": t == 1}, ["credits"])


@pytest.mark.parametrize("wrong", ["credits", "forward", "backward"])
def test_what_must_be_positive(wrong):
    good = {"credits": 1, "forward": 1, "backward": 1}
    with pytest.raises(ValueError, match=rf"^{wrong} must be at least 1, not 0$"):
        CreditLink(shape=8, **good | {wrong: 0})
