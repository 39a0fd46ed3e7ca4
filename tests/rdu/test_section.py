"""The section builder: what it writes for the machine, and what it refuses."""

from fractions import Fraction
from itertools import pairwise

import numpy as np
import pytest

from tilewright.arch import rdu
from tilewright.arch import spec as specs
from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program
from tilewright.mappers.rdu.fabric import EAST, LOCAL, STEP, WEST
from tilewright.mappers.rdu.section import Section, segment


def small(*sets):
    """Plasticine on a grid of 2 x 2: PCUs at (0, 0) and (1, 1), PMUs between, an AGCU west of (0, 0) and east of (1, 0)."""
    sizes = [
        "grid.columns=2",
        "grid.rows=2",
        "agcu.per_side=1",
        "pcu.lanes=4",
        "pmu.bytes=1024",
        "pmu.banks=4",
    ]
    sizes += ["memory.ddr.channels=16", "pcu.registers=8", "pcu.stages=2", "pcu.counters=3", *sets]
    tree = specs.apply_sets(specs.load_tree("plasticine", ["rdu"]), sizes)
    return specs.build(rdu.RduSpec, tree, "small").params()


def pipeline(p):
    """Load, double buffer, compute, store: 8 lines in two tiles."""
    s = Section(p, "a section")
    s.agcu("load", tag="in", direction="load", tier="ddr", argument=3, count0=8, stride0=16, words=4)
    tiles = {
        f"{side}_{k}": v
        for side in ("write", "read")
        for k, v in (("count0", 4), ("count1", 2), ("stride0", 4))
    }
    s.pmu("buffer", enable=3, write_stride1=-16, **tiles)
    s.pcu(
        "double",
        mode="simd",
        stages=[{"operation": "add", "a": 0, "b": 0, "to": 1}],
        count0=8,
        vectors=1,
        result=1,
    )
    s.agcu("store", direction="store", tier="hbm", count0=8, stride0=-8, words=4, format="bf16")
    s.stream("load", "buffer", rate=Fraction(1, 2))
    s.stream("buffer", ("double", 0))
    s.stream("double", "store")
    s.double_buffer("buffer", write_level=1, read_level=1)
    return s


AT = {"load": (0, 0), "buffer": (1, 0), "double": (0, 0), "store": (1, 0)}


def rows(built, region):
    return [dict(zip(r.dtype.names, r.tolist(), strict=True)) for r in built.records[region]]


def test_the_records_of_a_pipeline():
    p = small()
    built = pipeline(p).build(at=AT)
    assert built.tags == ("a_section", "in", "buffer", "double", "store")
    (pcu,), (pmu,), (stage,) = (rows(built, f"config.{kind}") for kind in ("pcu", "pmu", "stage"))
    assert (pcu["x"], pcu["y"], pcu["mode"], pcu["send_vector"], pcu["send_scalar"], pcu["tag"]) == (
        0,
        0,
        1,
        1,
        0,
        3,
    )
    assert (stage["x"], stage["y"], stage["stage"], stage["operation"], stage["to"]) == (0, 0, 0, 1, 1)
    assert (pmu["x"], pmu["y"], pmu["words"], pmu["tag"]) == (1, 0, 256, 2)
    # Four banks: the lowest two bits of an address, as nothing else was said. Strides are modulo 2**24.
    assert (pmu["bank_bit0"], pmu["bank_bit1"], pmu["write_stride1"]) == (0, 1, (1 << 24) - 16)
    load, store = rows(built, "config.agcu")
    assert (load["agcu"], load["direction"], load["tier"], load["argument"], load["tag"]) == (0, 1, 1, 3, 1)
    assert (store["agcu"], store["direction"], store["tier"], store["stride0"], store["format"]) == (
        1,
        2,
        0,
        -8,
        1,
    )
    # A double buffer: the write side starts with two tokens, and each side gives the other one a tile.
    for side, hold in (("write", 2), ("read", 0)):
        names = ("wait", "wait_level", "signal", "signal_level", "hold0")
        assert [pmu[f"{side}_{name}"] for name in names] == [1, 1, 1, 1, hold]
    tokens = [
        (t["x"], t["y"], t["output"], t["to_x"], t["to_y"], t["input"]) for t in rows(built, "config.token")
    ]
    assert tokens == [(1, 0, 0, 1, 0, 4), (1, 0, 4, 1, 0, 0)]


def test_the_tables_of_a_pipeline():
    """From each output they lead to one place, whatever the way."""
    built = pipeline(small()).build(at=AT)
    tables = {
        (t["x"], t["y"], t["port"], t["flow"]): (t["out"], t["next_flow"])
        for t in rows(built, "config.switch")
    }
    (pcu,), (pmu,) = rows(built, "config.pcu"), rows(built, "config.pmu")
    load = rows(built, "config.agcu")[0]

    def ends(x, y, port, flow):
        mask, after = tables.pop((x, y, port, flow))
        (out,) = [k for k in range(8) if mask >> k & 1]
        dx, dy = STEP[out] if out < LOCAL else (0, 0)
        inside = out < LOCAL and 0 <= x + dx < 2 and 0 <= y + dy < 2
        return ends(x + dx, y + dy, rdu.OPPOSITE[out], after) if inside else (x, y, out)

    assert ends(0, 0, WEST, load["flow"]) == (1, 0, LOCAL)
    assert ends(1, 0, LOCAL, pmu["flow"]) == (0, 0, LOCAL)
    assert ends(0, 0, LOCAL, pcu["flow"]) == (1, 0, EAST)
    assert not tables  # nothing else is written


def test_a_segment_launches_a_section():
    built = pipeline(small()).build(at=AT)
    tags = ["before"]
    made = segment(built, args={3: 64, 0: 128}, index=5, host=True, tags=tags)
    assert tags == ["before", *built.tags]
    code = made.regions["code"]
    assert [rdu.OPS[op].name for op in code["op"]] == ["PROGRAM_LOAD", "ARGUMENT_LOAD", "KERNEL_EXECUTE"]
    assert (
        code["section"].tolist() == [5, 5, 0]
        and code["host"].tolist() == [0, 0, 1]
        and set(code["tag"]) == {1}
    )
    assert made.regions["config.pcu"]["tag"].tolist() == [4] and built.records["config.pcu"][
        "tag"
    ].tolist() == [3]
    assert made.regions["args"].tolist() == [(0, 128), (3, 64)]
    again = segment(built, index=6, load=False, tag="once more", tags=tags)
    assert set(again.regions) == {"code"} and len(again.regions["code"]) == 1 and tags[-1] == "once_more"
    program = Program(rdu.ISA, [made, again], tags)
    assert rdu.ISA.assemble(program.text()).text() == program.text()


def test_equal_seeds_build_equal_records():
    p = small("grid.columns=6", "grid.rows=6", "agcu.per_side=4")
    built = [pipeline(p).build(seed=seed) for seed in (3, 3, 4)]
    for region, records in built[0].records.items():
        np.testing.assert_array_equal(records, built[1].records[region])
    assert (
        built[0].placement.sites != built[2].placement.sites or built[0].routing.hops == built[2].routing.hops
    )
    assert built[0].svg().startswith("<svg") and "a section" in built[0].svg()


def test_scalar_streams_and_multicasts_have_flows_of_their_own():
    p = small()
    s = Section(p)
    s.pcu("sum", mode="simd", count0=2, tree="add", fold_type="fp32")
    s.pcu("scale", mode="simd", count0=2, scalars=1, vectors=1)
    s.pmu("keep", enable=1, write_count0=2)
    s.stream("sum", ("scale", 0), network="scalar")
    s.stream("sum", ("scale", 0), "keep")
    built = s.build(at={"sum": (0, 0), "scale": (1, 1), "keep": (1, 0)})
    sender = rows(built, "config.pcu")[0]
    assert (sender["send_vector"], sender["send_scalar"]) == (1, 1)
    table = rows(built, "config.switch")
    assert {t["network"] for t in table} == {0, 1}
    vector = [t for t in table if t["network"] == 0]
    # The one unit lies beside, the other behind it or behind the switch below: one switch gives two copies.
    assert max(t["out"].bit_count() for t in vector) == 2
    assert sum((t["out"] >> LOCAL).bit_count() for t in vector) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda s: s.pcu("u", mdoe="simd"), "unit u: unknown field mdoe: did you mean mode"),
        (lambda s: s.pcu("u", mode="smid"), "unit u: mode must be one of off, simd, systolic, not 'smid'"),
        (
            lambda s: s.pcu("u", mode="systolic"),
            "unit u: mode systolic; the PCUs of this machine have no array",
        ),
        (lambda s: s.pcu("u", count3=2), "unit u: count3 is 2; its chain has 3 counters"),
        (lambda s: s.pcu("u", stages=[{}] * 3), "unit u: 3 stages; a PCU has 2"),
        (lambda s: s.pcu("u", stages=[{"to": 9}]), "unit u: register 9; a lane has 8"),
        (lambda s: s.pcu("u", stages=[{"opration": "add"}]), "unit u, stage 0: unknown field opration"),
        (lambda s: s.pcu("u", result=8), "unit u: register 8; a lane has 8"),
        (lambda s: s.pcu("u", vectors=0x10), "vectors must be in 0..15, not 16"),
        (lambda s: s.pcu("u", scalars=8), "unit u: scalars 0x8; a PCU has 2 scalar inputs"),
        (lambda s: s.pcu("u", gated=1, fold="add"), "unit u: gated needs mode simd, without fold and tree"),
        (lambda s: s.pcu("u", x=1), "unit u: x is filled in by the builder"),
        (lambda s: s.pmu("u", words=257), "unit u: words must be at most 256, not 257"),
        (lambda s: s.pmu("u", bank_bit0=2), "unit u: bank_bit0..1 must be ascending and below 8, not [2, 1]"),
        (lambda s: s.pmu("u", skew_bits=1), "unit u: skew_shift 0 must lie above bank_bit0 0"),
        (lambda s: s.agcu("u", words=5), "unit u: words must be in 1..4, not 5"),
        (lambda s: s.agcu("u", tier="dram"), "unit u: tier must be one of hbm, ddr, remote, not 'dram'"),
        (lambda s: (s.pmu("u"), s.pcu("u")), "unit u is given twice"),
        (lambda s: s.stream("u", "v"), "stream from u: there is no such unit"),
        (lambda s: (s.pcu("u"), s.stream("u", "v")), "stream from u to v: there is no such unit"),
        (
            lambda s: (s.pcu("u"), s.pcu("v"), s.stream("u", "v"), s.stream("u", "v")),
            "its vector output is in use",
        ),
        (lambda s: (s.pcu("u"), s.pcu("v"), s.stream("u", ("v", 4)), s.build()), "vector input 4 of v"),
        (
            lambda s: (s.pmu("u"), s.token("u", 0, "u.read", 0)),
            "token at u: a PMU has sides, u.write and u.read",
        ),
        (lambda s: (s.pcu("u"), s.token("u.write", 0, "u", 0)), "token at u.write: a PMU has sides"),
        (lambda s: (s.pcu("u"), s.token("v", 0, "u", 0)), "token at v: there is no such unit"),
        (lambda s: (s.pcu("u"), s.token("u", 4, "u", 0)), "token at u: control ports are 0..3, not 4"),
        (
            lambda s: (s.pcu("u"), s.token("u", 0, "u", 0), s.token("u", 1, "u", 0)),
            "control input 0 is in use",
        ),
        (lambda s: (s.pcu("u"), s.build(at={"u": (1, 0)})), "unit u: there is no pcu at 1,0"),
        (
            lambda s: (s.pcu("u"), s.pcu("v"), s.pcu("w"), s.build()),
            "the section has 3 units of kind pcu; the grid has 2",
        ),
    ],
)
def test_what_does_not_fit_is_refused(make, message):
    s = Section(small("pcu.scalar_inputs=2"))
    with pytest.raises(UserError) as error:
        make(s)
    assert message in str(error.value)


def test_fields_can_be_changed_until_the_build():
    s = pipeline(small())
    assert s.units("agcu") == ["load", "store"]
    s.fields("load")["count0"] = 5
    assert rows(s.build(at=AT), "config.agcu")[0]["count0"] == 5
    with pytest.raises(UserError, match="fields of lod: there is no such unit; did you mean load"):
        s.fields("lod")


def test_two_thousand_units_take_seconds():
    """A chain of PCUs and PMUs over most of a large grid; places suit streams: two hops a stream at most on average."""
    spec = specs.build(rdu.RduSpec, specs.load_tree("sn40l", ["rdu"]), "large")
    s = Section(spec.params(), "chain")
    names = []
    for i in range(1000):
        names += [s.pcu(f"c{i}", mode="simd", vectors=1), s.pmu(f"m{i}", enable=3)]
    for a, b in pairwise(names):
        s.stream(a, b)
    built = s.build(moves=400_000)
    assert len(built.records["config.pcu"]) == len(built.records["config.pmu"]) == 1000
    assert built.routing.hops <= 2 * 1999 and built.routing.slow_down == 1
