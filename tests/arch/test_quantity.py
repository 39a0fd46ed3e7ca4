"""Numbers are what the YAML text says, exactly; every number of a preset says where it comes from."""

from fractions import Fraction as F
from importlib import resources
from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from tilewright.arch.errors import UserError
from tilewright.arch.quantity import KINDS, exact

PRESETS = sorted((Path(str(resources.files("tilewright.arch"))) / "presets").rglob("*.yaml"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("0.1", F(1, 10)), (0.1, F(1, 10)), ("1/3", F(1, 3)), ("-2", F(-2)), (7, F(7)), ("1e-3", F(1, 1000)),
        ("2.50E+2", F(250)), (F(2, 7), F(2, 7)), (" 4 ", F(4)), (0.625, F(5, 8)), (6.02e23, F(602 * 10**21)),
    ],
)  # fmt: skip
def test_a_number_is_what_its_text_says(text, value):
    assert exact(text) == value


@pytest.mark.parametrize(
    "bad",
    ["1e999999999", "1e9999", "1/0", "inf", "nan", float("inf"), float("nan"), "", ".", "e3", "0x10", "one",
     "1_000", True, None, [1], "9" * 81, "1 2"],
)  # fmt: skip
def test_what_is_no_finite_number_is_refused(bad):
    with pytest.raises(UserError, match=r"^key: must be a (finite )?number, not "):
        exact(bad, "key")


def test_a_large_exponent_stays_a_small_number():
    assert exact("1e999") == 10**999  # refused later, by the limits of the key


@given(st.decimals(allow_nan=False, allow_infinity=False, places=6, min_value=-(10**9), max_value=10**9))
def test_any_decimal_is_exact(value):
    assert exact(str(value)) == F(value)


@given(st.floats(allow_nan=False, allow_infinity=False, width=32).map(lambda v: float(f"{v:.6g}")))
def test_a_float_is_read_as_it_prints(value):
    assert exact(value) == F(repr(value))


# ---- presets ------------------------------------------------------------------------------------------


def numbers(node, path=""):
    """(key path, number or datum that holds one) of every leaf with a digit for a value."""
    if isinstance(node, dict) and "value" in node:
        if not isinstance(node["value"], bool):
            yield path, node
    elif isinstance(node, dict):
        for key, child in node.items():
            yield from numbers(child, f"{path}.{key}" if path else key)
    elif isinstance(node, list):
        for i, child in enumerate(node):
            yield from numbers(child, f"{path}[{i}]")
    elif isinstance(node, (int, float)) and not isinstance(node, bool):
        yield path, node


def unsourced(tree):
    """Key paths of the numbers that lack unit, source or kind."""
    for path, datum in numbers(tree):
        # A count has no unit, but says so: `unit: ""`.
        good = (
            isinstance(datum, dict)
            and isinstance(datum.get("unit"), str)
            and len(str(datum.get("source") or "")) >= 8
            and datum.get("kind") in KINDS
        )
        if not good:
            yield path


@pytest.mark.parametrize("path", PRESETS, ids=lambda p: f"{p.parent.name}/{p.stem}")
def test_every_number_of_a_preset_has_unit_source_and_kind(path):
    tree = yaml.safe_load(path.read_text("utf-8"))
    assert not list(unsourced(tree))


def test_presets_hold_numbers():
    assert {p.parent.name for p in PRESETS} >= {"dram", "pim", "system"}
    for path in PRESETS:
        tree = yaml.safe_load(path.read_text("utf-8"))
        assert "base" in tree or len(list(numbers(tree))) > 5, path.name


def test_the_check_of_presets_sees_each_gap():
    tree = {
        "a": 5,
        "b": {"value": 5, "unit": "ns", "source": "a long table", "kind": "published"},
        "c": {"value": 5, "unit": "ns", "source": "", "kind": "published"},
        "d": {"e": {"value": "1/3", "unit": "ns", "source": "a long table", "kind": "guess"}},
        "f": {"value": 5, "source": "a long table", "kind": "published"},
        "g": [1.5],
        "name": "text",
    }
    assert list(unsourced(tree)) == ["a", "c", "d.e", "f", "g[0]"]
