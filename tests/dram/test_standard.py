"""The standard as data: definition, extension, compilation."""

from dataclasses import replace

import numpy as np
import pytest

from tilewright.arch.dram import (
    GDDR6,
    Command,
    Constraint,
    Effect,
    Needs,
    Scope,
    Standard,
    evaluate,
    load_dram_preset,
)
from tilewright.arch.errors import UserError

TIMING = dict(load_dram_preset("gddr6-14000-1250mv").timing)
C, G, B = Scope.CHANNEL, Scope.BANKGROUP, Scope.BANK


def row(scope=C, preceding=("A",), following=("A",), latency="n_x", cause="wait", window=1):
    return Constraint(scope, preceding, following, latency, cause, window, source="test")


def standard(*constraints, commands=(Command("A", B), Command("P", C))):
    return Standard("T", commands, constraints, {"n_x": "a timing", "n_y": "another"}, ("wait", "late"))


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("n_a + n_b * 2", 3 + 5 * 2),
        ("max(n_a, n_b) - 1", 5 - 1),
        ("min(n_a, max(n_b, 9), 4)", 3),
        ("(n_a + n_b) * n_a", (3 + 5) * 3),
    ],
)
def test_latency_expressions(text, value):
    assert evaluate(text, {"n_a": 3, "n_b": 5}) == value


@pytest.mark.parametrize(
    "text",
    [
        "n_x / 2",
        "n_x ** 2",
        "-n_x",
        "1.5",
        "True",
        "n_x.real",
        "abs(n_x)",
        "max()",
        "max(n_x, key=n_x)",
        "n_x +",
        "'a'",
    ],
)
def test_other_expressions_are_refused(text):
    with pytest.raises(UserError, match="latency"):
        standard(row(latency=text))


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (row(latency="n_z + n_x"), "unknown timing 'n_z', did you mean n_"),
        (row(following=("AA",)), "unknown command 'AA', did you mean A"),
        (row(cause="wayt"), "unknown cause 'wayt', did you mean wait"),
        (row(scope=B, preceding=("P",)), "command P addresses a CHANNEL"),
        (row(scope=G, following=("*",)), "must be at scope CHANNEL, not BANKGROUP"),
        (row(window=0), "window must be 1 or more, not 0"),
    ],
)
def test_a_constraint_must_fit_its_standard(broken, message):
    with pytest.raises(UserError, match=message):
        standard(broken)


def test_commands_must_be_consistent():
    with pytest.raises(UserError, match="A is defined twice"):
        standard(commands=(Command("A", B), Command("A", C)))
    with pytest.raises(UserError, match="P addresses the channel"):
        standard(commands=(Command("A", B), Command("P", C, Needs.OPEN)))


def test_rows_merge_by_maximum_and_latency_is_at_least_one():
    p = standard(
        row(latency="n_x"),
        row(latency="n_y"),
        row(latency="n_x - n_y", window=2),
        row(cause="late", latency="7"),
    ).compile({"n_x": 3, "n_y": 5}, bankgroups=1, banks_per_group=2)
    # Rows of A: (wait, window 1) max(3, 5); (wait, window 2) max(3 - 5, 1); (late) 7. P has none.
    np.testing.assert_array_equal(p.row_start, [0, 3, 3])
    np.testing.assert_array_equal(p.row_latency, [5, 1, 7])
    np.testing.assert_array_equal(p.row_window, [1, 2, 1])
    np.testing.assert_array_equal(p.row_cause, [0, 0, 1])  # charging order
    assert p.max_window == 2
    np.testing.assert_array_equal(p.cmd_history, [2, 1])
    for column in p[5:]:
        assert column.dtype == np.int64 and not column.flags.writeable


def test_compile_keeps_and_orders_commands():
    p = GDDR6.compile(TIMING, bankgroups=4, banks_per_group=4, commands=["RD", "ACT"])
    np.testing.assert_array_equal(p.cmd_needs, [Needs.OPEN, Needs.CLOSED])
    np.testing.assert_array_equal(p.cmd_effect, [Effect.NONE, Effect.OPEN])
    # RD waits for RD (channel, group) and ACT (bank); ACT for ACT (channel 1 and 4 deep, group, bank).
    np.testing.assert_array_equal(np.diff(p.row_start), [3, 4])
    np.testing.assert_array_equal(p.bank_group_node, np.repeat([1, 2, 3, 4], 4))


def test_only_the_timings_of_the_kept_commands_are_needed():
    small = {"n_rrd_s": 1, "n_rrd_l": 2, "n_faw": 9, "n_rc": 5}
    GDDR6.compile(small, bankgroups=1, banks_per_group=1, commands=["ACT"])
    del small["n_faw"]
    with pytest.raises(UserError, match="timing n_faw is missing"):
        GDDR6.compile(small, bankgroups=1, banks_per_group=1, commands=["ACT"])


@pytest.mark.parametrize(
    ("timing", "options", "message"),
    [
        ({"n_rpp": 3}, {}, "unknown timing 'n_rpp', did you mean n_rp?"),
        ({"n_rp": -1}, {}, "n_rp must be ticks of 0 or more, not -1"),
        ({"n_rp": 1.5}, {}, "n_rp must be ticks of 0 or more, not 1.5"),
        ({}, {"commands": ["RDD"]}, "unknown command 'RDD', did you mean RD"),
        ({}, {"commands": ["RD", "RD"]}, "must be distinct"),
        ({}, {"bankgroups": 0}, "bankgroups must be 1 or more, not 0"),
    ],
)
def test_compile_refuses(timing, options, message):
    with pytest.raises(UserError, match=message):
        GDDR6.compile(TIMING | timing, **({"bankgroups": 4, "banks_per_group": 4} | options))


def test_extension_adds_and_inherits_refresh():
    pim = GDDR6.extend(
        "PIM",
        commands=[Command("MAC16", C, Needs.ALL_OPEN)],
        constraints=[Constraint(C, ("MAC16",), ("MAC16",), "n_mac", "column", source="test")],
        parameters={"n_mac": "MAC16 to MAC16"},
    )
    p = pim.compile({"n_mac": 3, "n_rfc": 211}, bankgroups=4, banks_per_group=4, commands=["MAC16", "REFab"])
    # Into MAC16: REFab 211 (refresh comes first in charging order), MAC16 3. Into REFab: REFab 211.
    np.testing.assert_array_equal(p.row_latency, [211, 3, 211])
    assert GDDR6.command_names == pim.command_names[:-1]
    with pytest.raises(UserError, match="n_rp is already defined by GDDR6"):
        GDDR6.extend("PIM", parameters={"n_rp": "again"})


def test_gddr6_names_and_sources_every_row():
    titles = [c.title for c in GDDR6.constraints]
    assert "channel: read-to-write turnaround" in titles
    assert all(c.source and c.title.startswith(c.scope.name.lower() + ": ") for c in GDDR6.constraints)
    with pytest.raises(TypeError, match="source"):
        Constraint(C, ("ACT",), ("ACT",), "n_rc", "row_cycle")
    assert str(replace(GDDR6.constraints[0], title="")) == "channel: RD,RDA to RD,RDA max(n_bl, n_ccd_s)"
