"""The operand buffer against a plain array: rows and columns, in and out."""

import numpy as np
import pytest

from tests.csd.units import pack, unpack
from tests.lib.ticks import play
from tilewright.rtl.csd.operands import OperandBuffer

FULL = -1


def run(lanes, lines, stride, accesses):
    """What each read gave; one access a tick, as (kind, column, line, turn) and (mask, values) for a write."""
    buffer = OperandBuffer(lanes=lanes, lines=lines)

    def drive(tick, _):
        inputs = {"stride": stride, "write": 0, "read": 0}
        if tick < len(accesses):
            kind, column, line, turn, *rest = accesses[tick]
            inputs |= {kind: 1, f"{kind}_column": column, f"{kind}_line": line, f"{kind}_turn": turn % lanes}
            if rest:
                inputs |= {"write_mask": rest[0] & (1 << lanes) - 1, "write_data": pack(rest[1])}
        return inputs

    seen = play(buffer, len(accesses) + 1, drive, ["read_data"])
    return [unpack(s["read_data"], lanes) for s, a in zip(seen[1:], accesses, strict=True) if a[0] == "read"]


def rows_in(array, stride, lanes):
    """Writes of whole rows [rows, elements], line by line."""
    return [
        ("write", 0, i * stride + w, i, FULL, row[w * lanes : (w + 1) * lanes].tolist())
        for i, row in enumerate(array)
        for w in range(len(row) // lanes)
    ]


def rows_out(shape, stride, lanes):
    return [("read", 0, i * stride + w, i) for i in range(shape[0]) for w in range(shape[1] // lanes)]


def columns_out(shape, stride, lanes):
    return [
        ("read", 1, i * stride + e // lanes, i + e)
        for i in range(0, shape[0], lanes)
        for e in range(shape[1])
    ]


def table(seed, rows, elements):
    return np.random.default_rng(seed).integers(0, 1 << 16, (rows, elements))


@pytest.mark.parametrize(
    "lanes, rows, words, stride", [(2, 4, 3, 3), (4, 8, 2, 2), (4, 4, 2, 5), (8, 8, 1, 1)]
)
def test_rows_come_back_as_rows_and_columns(lanes, rows, words, stride):
    array = table(lanes, rows, words * lanes)
    writes = rows_in(array, stride, lanes)
    shape, lines = array.shape, rows * stride
    got = run(lanes, lines, stride, writes + rows_out(shape, stride, lanes))
    assert np.array_equal(np.array(got).reshape(shape), array)
    got = run(lanes, lines, stride, writes + columns_out(shape, stride, lanes))
    want = [array[i : i + lanes, e].tolist() for i in range(0, rows, lanes) for e in range(words * lanes)]
    assert got == want


def test_a_column_beside_the_last_rows():
    # Five rows, lanes 4: the second block of rows has one; its other places mean nothing.
    array = table(9, 5, 8)
    got = run(4, 10, 2, rows_in(array, 2, 4) + [("read", 1, 4 * 2 + 1, 4 + 6)])
    assert got[0][0] == array[4, 6]


def test_chosen_channels_of_tokens_become_columns():
    # Tokens with 8 channels, of which 1, 2, 5 and 7 are wanted: rows 0 to 3 of the buffer, a column for each token.
    lanes, tokens = 4, table(3, 8, 8)
    chosen = [1, 2, 5, 7]
    writes = []
    for t, token in enumerate(tokens):
        for w, (rank, mask) in enumerate(((0, 0b0110), (2, 0b1010))):
            line = rank * 2 + t // lanes  # rows of 8 tokens are 2 lines
            writes.append(("write", 1, line, rank + t, mask, token[w * lanes : (w + 1) * lanes].tolist()))
    got = run(lanes, 8, 2, writes + rows_out((4, 8), 2, lanes))
    assert np.array_equal(np.array(got).reshape(4, 8), tokens.T[chosen])


def test_a_transposition():
    # All channels of 4 tokens in, rows of channels out: what TRANSPOSE does.
    tokens = table(5, 4, 8)
    writes = [
        ("write", 1, 4 * w, 4 * w + t, FULL, token[w * 4 : w * 4 + 4].tolist())
        for t, token in enumerate(tokens)
        for w in range(2)
    ]
    got = run(4, 8, 1, writes + rows_out((8, 4), 1, 4))
    assert np.array_equal(np.array(got), tokens.T)


def test_nothing_is_written_without_a_mask_bit():
    array = table(7, 1, 4)
    got = run(4, 4, 1, [*rows_in(array, 1, 4), ("write", 0, 0, 0, 0, [1, 2, 3, 4]), ("read", 0, 0, 0)])
    assert got[0] == array[0].tolist()
