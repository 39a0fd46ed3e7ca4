"""The argtopk unit against the reference: masks, ties, local keys, and its ticks."""

import numpy as np
import pytest
from amaranth.back import rtlil
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.lib.ticks import play
from tilewright.arch.csd import argtopk_ticks
from tilewright.arch.formats import FP16
from tilewright.rtl.csd.argtopk import ArgTopK
from tilewright.workloads import csd_kernels as csd

LANES, KEYS = 4, 32


def search(jobs, lanes=LANES, keys=KEYS):
    """The mask of each (keys, take, local), one search after the other in one unit; ticks and words are asserted."""
    schedule, starts, at = {}, [], 0
    for values, take, local in jobs:
        words = -(-len(values) // lanes)
        padded = [
            *values,
            *[0xFFFF] * (words * lanes - len(values)),
        ]  # what stands behind the last must not count
        for w in range(words):
            packed = sum(v << 16 * i for i, v in enumerate(padded[w * lanes : (w + 1) * lanes]))
            schedule[at + w] = {"write_enable": 1, "write_address": w, "write_data": packed}
        at += words
        schedule[at] = {"start": 1, "n": len(values), "take": take, "local": local}
        starts.append(at)
        at += argtopk_ticks(len(values), lanes) + 1
    quiet = {"write_enable": 0, "start": 0}
    outputs = ["valid", "index", "mask", "last", "busy", "compares"]
    unit = ArgTopK(lanes=lanes, keys=keys)
    seen = play(unit, at + 1, lambda tick, _: quiet | schedule.get(tick, {}), outputs)
    masks = []
    for (values, _, _), start in zip(jobs, starts, strict=True):
        words, ticks = -(-len(values) // lanes), argtopk_ticks(len(values), lanes)
        window = seen[start + 1 : start + ticks + 1]
        assert (
            all(s["busy"] for s in window) and not seen[start]["busy"] and not seen[start + ticks + 1]["busy"]
        )
        assert [s["valid"] for s in window] == [0] * (ticks - words) + [1] * words
        assert [s["last"] for s in window] == [0] * (ticks - 1) + [1]
        assert sum(s["compares"] for s in window) == 18 * words
        found = window[-words:]
        assert [s["index"] for s in found] == list(range(words))
        bits = [s["mask"] >> i & 1 for s in found for i in range(lanes)]
        assert not any(bits[len(values) :])
        masks.append([bool(b) for b in bits[: len(values)]])
    return masks


def reference(values, take, local):
    near = np.arange(len(values)) >= len(values) - local
    return csd.argtopk(np.asarray(values) + (near.astype(np.int64) << FP16.width), take).tolist()


def test_ticks_by_hand():
    # Nine keys are three words of four. 17 bits and the mask: 18 passes of 3 words and a tick.
    assert argtopk_ticks(9, 4) == 72


@pytest.mark.parametrize(
    "values, take, local",
    [
        ([5, 7, 6], 1, 0),
        ([7] * 9, 4, 0),  # ties across words: the lowest positions
        ([7, 9, 7, 9, 7], 3, 0),
        ([0, 0, 0, 0, 0], 2, 0),
        ([0xFFFF, 0xFFFF, 1], 1, 0),
        ([1, 2], 9, 0),  # fewer keys than are taken: all
        ([9, 8, 7, 6, 5, 4], 3, 2),  # the last two above all others
        ([9, 8, 7, 6, 5, 4], 2, 4),  # more local ones than are taken: by their keys
        ([9, 8, 9], 1, 7),  # all are local
        ([3], 1, 0),
    ],
)
def test_masks_by_hand(values, take, local):
    assert search([(values, take, local)]) == [reference(values, take, local)]


KEY = st.one_of(st.integers(0, 3), st.integers(0, 0xFFFF))


@given(
    st.lists(
        st.tuples(st.lists(KEY, min_size=1, max_size=KEYS), st.integers(1, KEYS), st.integers(0, KEYS)),
        min_size=1,
        max_size=3,
    )
)
@settings(deadline=None, max_examples=25)
def test_masks_are_the_reference(jobs):
    assert search(jobs) == [reference(*job) for job in jobs]


@pytest.mark.parametrize("lanes", [2, 8])
def test_other_widths(lanes):
    rng = np.random.default_rng(lanes)
    jobs = [(rng.integers(0, 50, n).tolist(), take, 3) for n, take in ((24, 7), (17, 5), (3, 2))]
    assert search(jobs, lanes, 24) == [reference(*job) for job in jobs]


def test_it_has_comparators_and_no_multipliers():
    text = rtlil.convert(ArgTopK(lanes=LANES, keys=KEYS))
    assert "$mul" not in text and "$ge" in text
