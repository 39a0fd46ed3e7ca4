"""Energy: counts times picojoules, with the key of the spec that says so."""

from fractions import Fraction as F

import numpy as np
import pytest

from tilewright.arch.energy import EnergyRow, basis_counts, energy_by_tag
from tilewright.arch.timeline import SPAN, Timeline

# Two units over 10 ticks; `mac` works 4 ticks for tag x and 1 for y.
ACTIVITY = np.array([[[4, 2], [0, 6]], [[1, 0], [1, 0]], [[0, 3], [0, 3]]])
LINE = Timeline(
    ticks=10, tags=("x", "y"), spans=np.zeros(0, SPAN), counter_names=("act", "rd"),
    counters=np.array([[5, 100], [1, 0], [2, 7]]), units=("mac", "asic"), causes=("wait",), activity=ACTIVITY,
)  # fmt: skip


@pytest.mark.parametrize(
    ("basis", "counts"),
    [
        ("act", [5, 1, 2]),
        ("rd", [100, 0, 7]),
        ("ticks", [6, 1, 3]),  # busy and stalls of the first unit; they add up to the run's 10 ticks
        ("busy:mac", [4, 1, 0]),
        ("busy:asic", [0, 1, 0]),
    ],
)
def test_what_a_row_counts(basis, counts):
    assert basis_counts(EnergyRow("r", basis, F(1), "key"), LINE).tolist() == counts


def test_joules_by_tag_and_row():
    rows = (
        EnergyRow("activate", "act", F(1500), "energy.a"),
        EnergyRow("idle", "ticks", F(1, 2), "energy.b"),
    )
    # 5 * 1500 pJ = 7.5 nJ; 6 * 0.5 pJ = 3 pJ; the last row belongs to no tag.
    expected = [[7.5e-9, 3e-12], [1.5e-9, 0.5e-12], [3e-9, 1.5e-12]]
    np.testing.assert_allclose(energy_by_tag(rows, LINE), expected, rtol=1e-12)


def test_an_unknown_basis_is_an_error():
    with pytest.raises(ValueError, match="tuple"):
        basis_counts(EnergyRow("r", "acts", F(1), "key"), LINE)
