"""Tables in terminals of any width."""

import io

import pytest
from rich.console import Console

from tilewright.tables import grid

NAME = "attention_norm_first_moment to attention_norm_round"
NUMBERS = ("12,332", "22,657,088", "14.11 ms", "41.0 mJ")


def lines(columns):
    table = grid("", "operator", *(f">{n}" for n in ("calls", "cycles", "time", "energy")), "bound by")
    table.add_row(NAME, *NUMBERS, "sequencer: memory of others")
    file = io.StringIO()
    Console(width=columns, file=file).print(table)
    return file.getvalue().splitlines()


# Numbers and gaps take 6 + 10 + 8 + 7 + 5 * 2 = 41 columns, the longest word "sequencer:" 10, a name at least 12.
@pytest.mark.parametrize("columns", [63, 70, 80, 100])
def test_numbers_are_whole_names_are_cut_and_words_stay_together(columns):
    text = lines(columns)
    assert max(map(len, text)) <= columns
    assert all(number in text[2] for number in NUMBERS)
    # What the name gets is what the others leave.
    left = columns - 41 - 10
    assert text[2].startswith(NAME[: left - 1] + "…")
    words = " ".join(line[-10:].strip() for line in text[2:]).split()
    assert words == ["sequencer:", "memory", "of", "others"]


def test_nothing_is_cut_where_there_is_room():
    assert f"{NAME}  {'  '.join(NUMBERS)}  sequencer: memory of others" in lines(130)[2]
