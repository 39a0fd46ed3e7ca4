"""Deadlocks: found whatever the section, and told as the circle of units and streams that wait for one another."""

import re

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.face.invoke import refused
from tests.rdu.test_model import Sketch, random_sketch, small
from tests.rdu.test_section import small as smallest
from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program
from tilewright.arch.rdu import ISA, dynamic_flow
from tilewright.mappers.rdu.section import Section, segment
from tilewright.sim.rdu import execute, simulate


def why(p, sketch, **options):
    with pytest.raises(UserError) as error:
        execute(p, sketch.records(), **options)
    assert "\n" not in str(error.value)
    return re.sub(r"^deadlock after tick \d+: ", "", str(error.value))


@pytest.mark.parametrize("fold", [False, True])
def test_a_stream_behind_one_that_waits_for_it(fold):
    #
    #   pcu 0,0 <=== s 0,0 <=== s 1,0 <--- agcu 1     The PCU takes a packet of the gate in each of 64 iterations and
    #        (both streams)       ^                   one of the PMU before every 16 of them. The PMU's 64 packets are
    #                          pmu 1,0                there first, fill 4 places on each link, and stand still.
    #
    p = small("memory.hbm.latency_ns=100")
    s = Sketch(p)
    s.pmu(1, 0, enable=2, read_count0=64, flow=dynamic_flow(0, 0, 1))
    s.agcu(1, direction="load", tier="hbm", words=4, format="word", count0=64, flow=dynamic_flow(0, 0))
    s.pcu(0, 0, vectors=3, count0=16, count1=4, vector1_level=1)
    assert why(p, s, fold=fold) == (
        "pcu@0,0 waits for packets of agcu@1, which stand on link agcu@1 -> 1,0; those of agcu@1 wait for room on link "
        "1,0 -> 0,0 behind those of pmu.read@1,0; these wait for pcu@0,0: a circle; 2 more units wait"
    )


def crossing(p):
    s = Sketch(p)
    s.pcu(0, 0, count0=40, send_vector=1, flow=dynamic_flow(1, 1))
    s.agcu(0, direction="load", tier="hbm", words=4, format="word", count0=40, flow=dynamic_flow(2, 0))
    s.pmu(3, 0, enable=2, read_count0=40, flow=dynamic_flow(2, 0, 1))
    s.agcu(1, direction="load", tier="hbm", words=4, format="word", count0=40, flow=dynamic_flow(1, 1, 1))
    s.pcu(2, 0, vectors=3, count0=40)
    s.pcu(1, 1, vectors=3, count0=40)
    return s


@pytest.mark.parametrize("fold", [False, True])
def test_two_pairs_of_streams_that_cross(fold):
    #
    #   agcu 0 --> s 0,0 ==> s 1,0 ---> s 2,0 <== s 3,0 <-- agcu 1    From the gates one packet goes to each PCU an
    #   pcu 0,0 ----^          |  ^----   |   ----   ^                iteration, crosswise; the others come from the
    #                          v          v          |                units beside the gates, without delay, and fill
    #                       pcu 1,1    pcu 2,0    pmu 3,0             the links before the gates' packets are there.
    #
    p = small("grid.columns=4", "memory.hbm.latency_ns=100")
    assert why(p, crossing(p), fold=fold) == (
        "pcu@2,0 waits for packets of agcu@0, which stand on link agcu@0 -> 0,0; those of agcu@0 wait for room on link "
        "0,0 -> 1,0 behind those of pcu@0,0; these wait for pcu@1,1; "
        "pcu@1,1 waits for packets of agcu@1, which stand on link agcu@1 -> 3,0; those of agcu@1 wait for room on link "
        "3,0 -> 2,0 behind those of pmu.read@3,0; these wait for pcu@2,0: a circle; 4 more units wait"
    )


def test_streams_that_cross_but_come_in_time():
    # With as few packets as a link holds nothing stands in the gates' way.
    p = small("grid.columns=4", "memory.hbm.latency_ns=100")
    s = crossing(p)
    for kind in ("pcu", "agcu"):
        for row in s.rows[f"config.{kind}"]:
            row["count0"] = 4
    s.rows["config.pmu"][0]["read_count0"] = 4
    assert execute(p, s.records()).ticks > 100


def test_tokens():
    p = small()
    s = Sketch(p)
    s.pcu(0, 0, wait=1, signal=1)
    s.pcu(1, 1, wait=1, signal=1)
    s.token((0, 0), 0, (1, 1), 0)
    assert why(p, s) == "pcu@0,0 waits for a token of nobody; pcu@1,1 waits for a token of pcu@0,0"
    s.token((1, 1), 0, (0, 0), 0)
    assert why(p, s) == "pcu@0,0 waits for a token of pcu@1,1; pcu@1,1 waits for a token of pcu@0,0: a circle"
    s.rows["config.pcu"][0]["hold0"] = 1  # the first to go
    assert execute(p, s.records()).ticks > 0
    # The one that is done gives no second token.
    s.rows["config.pcu"][1]["count0"] = 2
    assert why(p, s) == "pcu@1,1 waits for a token of pcu@0,0"


def test_names_of_the_mapper():
    s = Section(smallest(), "s")
    for name in ("left", "right"):
        s.pcu(name, mode="simd", wait=1, signal=1)
    s.token("left", 0, "right", 0)
    s.token("right", 0, "left", 0)
    built = s.build(moves=0, at={"left": (0, 0), "right": (1, 1)})
    program = Program(ISA, [segment(built)], built.tags)
    message = (
        r"segment 0, operation 1 \(KERNEL_EXECUTE\): deadlock after tick 0: left \(pcu@0,0\) waits for a token of "
        r"right \(pcu@1,1\); right \(pcu@1,1\) waits for a token of left \(pcu@0,0\): a circle$"
    )
    with pytest.raises(UserError, match=message):
        simulate(smallest(), program)


def test_the_command_line_says_it_in_one_line(tmp_path):
    lines = (
        "pcu@0,0 mode=simd wait=1 signal=1", "pcu@2,0 mode=simd wait=1 signal=1", "token@0,0 to_x=2", "token@2,0 to_x=0",
        "PROGRAM_LOAD section=0", "KERNEL_EXECUTE",
    )  # fmt: skip
    (tmp_path / "waits.asm").write_text("\n".join(lines) + "\n")
    assert refused("exec", "plasticine", tmp_path / "waits.asm") == (
        "segment 0, operation 1 (KERNEL_EXECUTE): deadlock after tick 0: pcu@0,0 waits for a token of pcu@2,0; "
        "pcu@2,0 waits for a token of pcu@0,0: a circle"
    )


@settings(deadline=None, max_examples=40)
@given(seed=st.integers(0, 1 << 20), drop=st.integers(0, 30), cut=st.integers(0, 30))
def test_every_run_ends(seed, drop, cut):
    """A token lost, or a unit that takes another number of packets: the kernel comes to an end, or says where it stands."""
    p = small()
    records = {region: rows.copy() for region, rows in random_sketch(p, seed).items()}
    tokens = records.get("config.token", ())
    if len(tokens):
        records["config.token"] = np.delete(tokens, drop % len(tokens))
    units = records.get("config.pcu" if cut % 2 else "config.agcu", ())
    if len(units):
        units["count0"][cut % len(units)] += 1
    try:
        did = execute(p, records)
    except UserError as error:
        assert re.match(r"deadlock after tick \d+: .+|.*control tokens", str(error))
        assert "\n" not in str(error)
    else:
        assert np.all(did.activity >= 0)
