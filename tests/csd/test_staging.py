"""The group buffer: lines by slot, parity and word, and the sums of values that pass through it."""

import numpy as np
import pytest

from tests.csd.units import half, pack, small_spec, unpack
from tests.lib.ticks import play
from tilewright.rtl.csd.staging import GroupBuffer
from tilewright.workloads import csd_kernels as csd

P = small_spec().params()
QUIET = {"write": 0, "accumulate": 0, "fresh": 0, "read": 0, "sum_read": 0}


def at(port, **fields):
    return {f"{port}.{name}": value for name, value in fields.items()}


def run(script):
    """Outputs of each tick for inputs by tick."""
    unit = GroupBuffer(params=P, black_box=False)
    return play(
        unit,
        len(script) + 1,
        lambda t, _: QUIET | (script[t] if t < len(script) else {}),
        ["read_data", "sum_data"],
    )


def test_lines_come_back_from_where_they_were_put():
    rng = np.random.default_rng(0)
    places = [
        {"slot": s, "odd": o, "values": v, "line": line}
        for s in range(P.slots) for o in (0, 1) for v in (0, 1) for line in (0, 5, P.page_lines - 1)
    ]  # fmt: skip
    data = rng.integers(0, 1 << 16, (len(places), P.lanes))
    script = [
        {"write": 1, "write_data": pack(d), **at("write_at", **w)} for d, w in zip(data, places, strict=True)
    ]
    script += [{"read": 1, **at("read_at", **w)} for w in places]
    seen = run(script)[len(places) + 1 :]
    assert [unpack(s["read_data"], P.lanes) for s in seen] == data.tolist()


@pytest.mark.parametrize("words", [1, 2, 4])
def test_sums_of_values(words):
    # Tokens of `words` lines one right after the other: with one line, each addition needs the one of the tick before.
    rng = np.random.default_rng(words)
    values = half(rng.normal(size=(2, 7, words * P.lanes)) * np.float64(10) ** rng.integers(-3, 4, (2, 7, 1)))
    script = []
    for slot in (0, 1):
        for t in range(7):
            for w in range(words):
                script.append(
                    {
                        "write": 1, "accumulate": 1, "fresh": t == 0,
                        "write_data": pack(values[slot, t, w * P.lanes : (w + 1) * P.lanes]),
                        **at("write_at", slot=slot, values=1, line=w), **at("sum_at", slot=slot + 2, word=w),
                    }
                )  # fmt: skip
    script += [{}]
    reads = [(s, w) for s in (0, 1) for w in range(words)]
    script += [{"sum_read": 1, **at("sum_read_at", slot=s + 2, word=w)} for s, w in reads]
    seen = run(script)[-len(reads) :]
    got = np.array([unpack(s["sum_data"], P.lanes, 32) for s in seen], np.uint32).reshape(2, -1)
    want = csd.add_values(np.zeros((2, words * P.lanes), np.uint32), values)
    assert np.array_equal(got, want)


def test_keys_are_not_added():
    line = {"write_data": pack(half([1.0] * P.lanes)), **at("sum_at", slot=1, word=0)}
    script = [
        {"write": 1, "accumulate": 1, "fresh": 1, **line},
        {"write": 1, **line},
        {},
        {"sum_read": 1, **at("sum_read_at", slot=1, word=0)},
    ]
    assert unpack(run(script)[-1]["sum_data"], P.lanes, 32) == [0x3F800000] * P.lanes
