"""Specs: bases, overrides, provenance, and errors that name file, line, key and what is allowed."""

from fractions import Fraction as F
from typing import Annotated, ClassVar, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field as Limits
from pydantic import model_validator

from tilewright.arch.clock import Clock
from tilewright.arch.errors import UserError
from tilewright.arch.registry import load_spec
from tilewright.arch.spec import (
    Positive,
    Section,
    Spec,
    apply_sets,
    build,
    load_tree,
    merge,
    parse_yaml,
    presets,
)


class Timing(Section):
    t_rcd_ns: Positive
    t_rp_ns: Positive = F(9)

    @model_validator(mode="after")
    def _order(self):
        if self.t_rp_ns > self.t_rcd_ns:
            raise ValueError(f"t_rp_ns {self.t_rp_ns} is more than t_rcd_ns {self.t_rcd_ns}")
        return self


class ToySpec(Spec):
    target_name: ClassVar[str] = "toy"

    lanes: Annotated[int, Limits(ge=1, le=64)]
    mode: Literal["fast", "slow"] = "fast"
    timing: Timing

    @property
    def tick(self):
        return Clock.from_ns(self.timing.t_rp_ns)

    def params(self):
        return self.lanes


TOY = """\
target: toy
name: toy
lanes: {value: 16, unit: multipliers, source: "a table", kind: published}
timing:
  t_rcd_ns: {value: 0.1, unit: ns, source: "sheet 7", kind: measured, note: "at 25 C"}
  t_rp_ns: 1/20
"""


def spec_of(text, sets=()):
    return build(ToySpec, apply_sets(parse_yaml(text, "toy.yaml"), sets), "toy.yaml")


def message(text, sets=()):
    with pytest.raises(UserError) as error:
        spec_of(text, sets)
    assert "\n" not in str(error.value)
    return str(error.value)


# ---- values and provenance ----------------------------------------------------------------------------


def test_values_are_exact_and_carry_their_provenance():
    spec = spec_of(TOY)
    assert spec.timing.t_rcd_ns == F(1, 10) and spec.timing.t_rp_ns == F(1, 20) and spec.lanes == 16
    p = spec.provenance["timing.t_rcd_ns"]
    assert (p.unit, p.source, p.kind, p.where) == ("ns", "sheet 7; at 25 C", "measured", "toy.yaml:5")
    assert spec.assumed() == ["timing.t_rp_ns"]  # a plain value without a source
    assert "mode" not in spec.provenance  # left to its default
    assert dict(spec.leaves())["timing.t_rp_ns"] == F(1, 20)


def test_a_set_keeps_the_unit_and_overrides_the_rest():
    spec = spec_of(TOY, ["lanes=8", "timing.t_rcd_ns=1/3"])
    assert (spec.lanes, spec.timing.t_rcd_ns) == (8, F(1, 3))
    for path, unit in (("lanes", "multipliers"), ("timing.t_rcd_ns", "ns")):
        p = spec.provenance[path]
        assert (p.unit, p.source, p.kind) == (unit, "set on the command line", "assumed")
    assert sorted(spec.assumed()) == ["lanes", "timing.t_rcd_ns", "timing.t_rp_ns"]
    assert spec_of(TOY).provenance["lanes"].kind == "published"  # the tree below is not changed


def test_the_later_set_wins():
    assert spec_of(TOY, ["lanes=8", "lanes=4"]).lanes == 4


def test_a_spec_is_frozen():
    with pytest.raises(ValueError, match="frozen"):
        spec_of(TOY).lanes = 3


@given(st.lists(st.tuples(st.sampled_from("abc"), st.sampled_from("xyz"), st.integers(0, 9)), max_size=8))
def test_merging_is_the_last_word_on_each_key(rows):
    tree, expected = {}, {}
    for section, key, value in rows:
        tree = merge(tree, parse_yaml(f"{section}: {{{key}: {value}}}", "t"))
        expected[section, key] = value
    assert {(s, k): leaf.value for s, keys in tree.items() for k, leaf in keys.items()} == expected


# ---- bases --------------------------------------------------------------------------------------------


def test_a_file_is_deltas_on_its_base(tmp_path):
    (tmp_path / "low.yaml").write_text(TOY)
    (tmp_path / "mid.yaml").write_text("base: ./low.yaml\nlanes: 4\n")
    (tmp_path / "top.yaml").write_text("base: ./mid.yaml\nname: mine\ntiming: {t_rp_ns: 0.01}\n")
    path = str(tmp_path / "top.yaml")
    spec = build(ToySpec, load_tree(path, []), path)
    assert (spec.name, spec.lanes, spec.timing.t_rcd_ns, spec.timing.t_rp_ns) == (
        "mine",
        4,
        F(1, 10),
        F(1, 100),
    )
    assert spec.provenance["timing.t_rp_ns"].where.endswith("top.yaml:3")
    assert spec.provenance["lanes"].unit == "multipliers" and spec.provenance["lanes"].kind == "assumed"
    assert spec.provenance["timing.t_rcd_ns"].kind == "measured"
    # Without a name of its own, a file is called after itself, not after its base.
    assert load_tree(str(tmp_path / "mid.yaml"), [])["name"].value == "mid"


def test_a_base_may_be_a_preset(tmp_path):
    path = tmp_path / "wide.yaml"
    path.write_text("base: pim-gpt\nchannels: 16\n")
    spec = load_spec(str(path))
    assert (spec.name, spec.channels) == ("wide", 16)
    assert spec.provenance["channels"].unit == "channels" and spec.provenance["channels"].kind == "assumed"


def test_a_cycle_of_bases_is_refused(tmp_path):
    (tmp_path / "a.yaml").write_text("base: ./b.yaml\n")
    (tmp_path / "b.yaml").write_text("base: ./a.yaml\n")
    with pytest.raises(
        UserError, match=r"base: \./[ab]\.yaml is based on itself, or on a chain of more than 8"
    ):
        load_tree(str(tmp_path / "a.yaml"), [])


def test_what_cannot_be_read(tmp_path):
    with pytest.raises(UserError, match=r"^unknown spec 'pim-gtp': did you mean pim-gpt\? \(or the path"):
        load_tree("pim-gtp", ["pim"])
    with pytest.raises(UserError, match=r"^cannot read .*none.yaml: No such file or directory$"):
        load_tree(str(tmp_path / "none.yaml"), [])
    (tmp_path / "latin.yaml").write_bytes(b"name: \xff\n")
    with pytest.raises(UserError, match=r"^cannot read .*latin.yaml: not UTF-8 text$"):
        load_tree(str(tmp_path / "latin.yaml"), [])
    with pytest.raises(UserError, match=r"^cannot read .*: Is a directory$"):
        load_tree(f"{tmp_path}/", [])


# ---- mistakes -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "s.yaml: the file is empty; a spec needs at least `target` or `base`"),
        ("- 1\n", "s.yaml: a spec must be a mapping of keys to values"),
        ("a: 1\nb: [1\n", "s.yaml:3: not valid YAML: "),
        ("a: 1\nb: 2\na: 3\n", "s.yaml:3: key a is given twice"),
        ("s:\n  a: 1\n  a: 2\n", "s.yaml:3: key s.a is given twice"),
        ("a: &x 1\nb: *x\n", "s.yaml:1: YAML anchors and aliases are not allowed"),
        ("1: 2\n", "s.yaml:1: keys must be plain words, not '1'"),
        ("a: {value: 1, units: ns}\n", "s.yaml:1: a has no 'units': did you mean unit?"),
        ("a: {value: 1, kind: guess}\n",
         "s.yaml:1: a.kind must be one of published, derived, measured, assumed, not 'guess'"),
        ("a: [{b: 1}]\n", "s.yaml:1: a must be a list of plain values"),
        ("a: 2026-13-45\n", "s.yaml:1: a: month must be in 1..12"),
        ("a: " + "{b: " * 12 + "1" + "}" * 12 + "\n", "s.yaml:1: nested deeper than 12 levels"),
    ],
)  # fmt: skip
def test_a_mistake_in_yaml_names_its_line(text, expected):
    with pytest.raises(UserError) as error:
        parse_yaml(text, "s.yaml")
    assert str(error.value).startswith(expected)


def test_a_huge_file_is_refused():
    with pytest.raises(UserError, match="at most 1048576 characters"):
        parse_yaml("a: " + "1" * (1 << 20), "s.yaml")


@pytest.mark.parametrize(
    ("sets", "expected"),
    [
        (["lane=8"], "--set lane=8: unknown key lane: did you mean lanes?"),
        (
            ["timing.t_rdc_ns=8"],
            "--set timing.t_rdc_ns=8: unknown key timing.t_rdc_ns: did you mean t_rcd_ns?",
        ),
        (["lanes=65"], "--set lanes=65: lanes must be less than or equal to 64, not 65"),
        (["lanes=1.5"], "--set lanes=1.5: lanes must be a valid integer"),
        (["mode=fats"], "--set mode=fats: mode must be 'fast' or 'slow', not 'fats'"),
        (["timing.t_rcd_ns=0"], "--set timing.t_rcd_ns=0: timing.t_rcd_ns must be greater than 0, not 0"),
        (["timing.t_rcd_ns=1e999"], "--set timing.t_rcd_ns=1e999: timing.t_rcd_ns must be"),
        (["timing.t_rcd_ns=.inf"], "--set timing.t_rcd_ns=.inf: timing.t_rcd_ns: must be a number"),
        (["timing.t_rcd_ns=soon"], "--set timing.t_rcd_ns=soon: timing.t_rcd_ns: must be a number"),
        (["timing=5"], "--set timing=5: timing must be"),
        (["lanes.x=5"], "--set lanes.x=5: lanes must be a valid integer, not a section"),
        (["timing.t_rp_ns=2"], "t_rp_ns 2 is more than t_rcd_ns 1/10"),
        (["lanes"], "--set lanes: expected KEY.PATH=VALUE"),
        (["=4"], "--set =4: expected KEY.PATH=VALUE"),
        (["lanes={a: 1}"], "--set lanes: must be a plain value, not '{a: 1}'"),
        (["lanes=[1"], ": not valid YAML: "),
    ],
)
def test_a_mistake_on_the_command_line_names_it(sets, expected):
    assert expected in message(TOY, sets)


def test_a_mistake_in_a_file_names_line_and_key():
    assert message(TOY.replace("16", "99")) == "toy.yaml:3: lanes must be less than or equal to 64, not 99"
    assert message(TOY + "lnaes: 3\n") == "toy.yaml:7: unknown key lnaes: did you mean lanes?"
    assert message("target: toy\nname: n\nlanes: 4\ntiming: {t_rp_ns: 1}\n") == (
        "toy.yaml: key timing.t_rcd_ns is missing"
    )


# ---- presets ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", presets("pim"))
def test_presets_of_pim_order_their_timings(name):
    """Orderings that any DRAM device keeps, whatever the source says."""
    spec = load_spec(name)
    t = spec.dram.timing
    assert t.t_ras_ns <= t.t_rc_ns and max(t.t_rcd_rd_ns, t.t_rcd_wr_ns) <= t.t_ras_ns
    assert t.t_ccd_l_ns >= t.t_ccd_s_ns and t.t_rrd_l_ns >= t.t_rrd_s_ns and t.t_wtr_l_ns >= t.t_wtr_s_ns
    assert t.t_rfc_ns < t.t_refi_ns and t.t_rfc_pb_ns <= t.t_rfc_ns
    assert t.t_faw_ns >= t.t_rrd_s_ns
    e = spec.energy
    assert e.idd2n_ma <= e.idd3n_ma < min(e.idd4r_ma, e.idd4w_ma, e.idd5b_ma)


@pytest.mark.parametrize("name", presets("pim"))
def test_every_leaf_of_a_preset_is_accounted_for(name):
    spec = load_spec(name)
    for path, value in spec.leaves():
        if path in ("target", "name", "description"):
            continue
        p = spec.provenance[path]
        assert p.source and p.where, path
        assert p.unit or not isinstance(value, (int, F)), path
