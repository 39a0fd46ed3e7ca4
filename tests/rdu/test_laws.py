"""Closed forms that the cycle model must obey at any size."""

from math import ceil, gcd

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.inner import called
from tests.rdu.test_model import SETS, Sketch, random_sketch, spec_of
from tilewright.arch import rdu
from tilewright.arch.errors import UserError
from tilewright.arch.rdu import dynamic_flow
from tilewright.sim import rdu_engine
from tilewright.sim import rdu_state as state
from tilewright.sim.rdu import execute
from tilewright.sim.rdu_build import build
from tilewright.sim.rdu_periods import run_kernel

FEW = settings(deadline=None, max_examples=40)
LINKS = 3  # from a unit to its neighbour: into the switch, across, out
# Ticks from the last iteration of one side of a PMU to the first of the other that waits for its token: accesses are
# done 1 tick later, the token is at the input `token` after that, and counts from the next.
TURN = 2


def machine(*more):
    return spec_of(*SETS, "network.flows=64", *more).params()


def ticks(sketch, p):
    return execute(p, sketch.records()).ticks


def busy(sketch, p):
    """First and last busy tick of each unit."""
    did = execute(p, sketch.records())
    return {unit: (int(first), int(end) - 1) for unit, (first, end) in zip(did.units, did.busy, strict=True)}


# ---- stages -------------------------------------------------------------------------------------------


def buffered(p, tiles, n, write, read, buffers):
    """Vectors for a PMU that takes one in `write` ticks and gives one in `read`, in `buffers` of n."""
    s = Sketch(p)
    levels = {"wait": 1, "wait_level": 1, "signal": 1, "signal_level": 1, "count0": n, "count1": tiles}
    sides = {f"{side}_{k}": v for side in ("write", "read") for k, v in levels.items()}
    s.pmu(1, 0, enable=2, read_count0=n * tiles, flow=dynamic_flow(0, 0))
    s.pcu(0, 0, vectors=1, count0=n * tiles, send_vector=1, flow=dynamic_flow(0, 1))
    # Reading uses the banks that writing does not.
    more = {"write_hold0": buffers, "write_interval": write, "read_interval": read, "read_base": p.lanes}
    s.pmu(0, 1, enable=3, flow=dynamic_flow(1, 1), **sides, **more)
    s.token((0, 1), 0, (0, 1), 4)
    s.token((0, 1), 4, (0, 1), 0)
    s.pcu(1, 1, vectors=1, count0=n * tiles)
    return s


@FEW
@given(
    n=st.integers(1, 12),
    write=st.integers(1, 4),
    read=st.integers(1, 4),
    buffers=st.integers(1, 3),
    token=st.integers(1, 5),
)
def test_the_slowest_stage_or_the_turns_of_a_buffer(n, write, read, buffers, token):
    # A side takes n intervals a tile. A buffer is written and read in turn, which takes both spans and a turn each way:
    # with one buffer that is the sum of neighbours, with two or more the slowest stage decides, if tiles are long.
    p = machine(f"network.token_cycles={token}")
    tiles = 12
    more = ticks(buffered(p, tiles + buffers, n, write, read, buffers), p)
    turns = (n - 1) * (write + read) + 2 * (TURN + token)
    assert more - ticks(buffered(p, tiles, n, write, read, buffers), p) == max(
        buffers * n * write, buffers * n * read, turns
    )


def test_stages_overlap_but_for_the_first_tile():
    # T = sum t_i + (N - 1) max t_i, and what does not depend on N, tiles being long: here t = 32, 96, 64.
    p = machine()
    one, many = (ticks(buffered(p, tiles, 32, 3, 2, 2), p) for tiles in (1, 9))
    assert many - one == 8 * max(32, 96, 64)


# ---- links --------------------------------------------------------------------------------------------


def stream(p, n):
    s = Sketch(p)
    s.pmu(1, 0, enable=2, read_count0=n, flow=dynamic_flow(0, 0))
    s.pcu(0, 0, vectors=1, count0=n)
    return s


@FEW
@given(credits=st.integers(1, 12), forward=st.integers(1, 8), backward=st.integers(1, 8), fold=st.booleans())
def test_credits_bound_the_rate_of_a_link(credits, forward, backward, fold):
    # C packets every max(C, F + B) ticks: min(1, C / (F + B)) a tick.
    p = machine(
        f"network.fifo_depth={credits}",
        f"network.hop_cycles={forward}",
        f"network.credit_cycles={backward}",
    )
    # Steady once every link's first round is over.
    n = 6 * credits
    few, many = (execute(p, stream(p, k).records(), fold=fold).ticks for k in (n, n + 5 * credits))
    assert many - few == 5 * max(credits, forward + backward)


@settings(deadline=None, max_examples=15)
@given(seed=st.integers(0, 10**6))
def test_no_more_is_in_flight_than_there_are_credits(seed):
    p = machine("network.credit_cycles=3")
    m = build(p, random_sketch(p, seed), {}, fold=False).machine
    popped = [np.zeros(len(m.link), np.int64)] * p.credit  # of each link, before this tick and earlier ones
    for _ in range(150):
        called(rdu_engine.tick)(m, p.banks.bit_length() - 1)
        m.clock[state.NOW] += 1
        pushed = m.link[:, state.PUSHES].copy()
        # A place is taken until its credit is back.
        assert (pushed - popped[-p.credit] <= p.fifo_depth).all()
        popped.append(pushed - m.link[:, state.LEVEL])


def test_a_link_fills_up_to_its_credits():
    p = machine()
    s = stream(p, 20)
    s.rows["config.pcu"][0] |= {"wait": 1}  # a token that never comes
    m = build(p, s.records(), {}, fold=False).machine
    run_kernel(m, 3, False)
    # Three links of 4 places, a packet at the output.
    assert m.link[:, state.PUSHES].max() == 3 * p.fifo_depth
    assert (m.link[m.link[:, state.PUSHES] > 0, state.LEVEL] == p.fifo_depth).all()


@FEW
@given(hop=st.integers(1, 6), distance=st.integers(1, 7))
def test_a_packet_takes_a_hop_a_link(hop, distance):
    p = machine("grid.columns=9", f"network.hop_cycles={hop}", "network.fifo_depth=16")
    s = Sketch(p)
    s.pmu(1, 0, enable=2, flow=dynamic_flow(1 + distance, (distance + 1) % 2))
    x, y = 1 + distance, (distance + 1) % 2
    s.pcu(x, y, vectors=1)
    links = distance + y + 2
    assert busy(s, p)[f"pcu@{x},{y}"] == (rdu.READ_LATENCY + links * hop,) * 2


@FEW
@given(data=st.data(), flip_x=st.booleans(), flip_y=st.booleans())
def test_a_mirrored_mesh_takes_as_long(data, flip_x, flip_y):
    # Columns and rows are odd, so that the checkerboard is its own mirror image. Streams do not meet.
    p = machine("grid.columns=7", "grid.rows=5", "network.order=" + data.draw(st.sampled_from(["xy", "yx"])))
    places = [(x, y) for y in range(5) for x in range(7)]
    pmus = data.draw(st.permutations([a for a in places if not rdu.is_pcu(*a)]))[:2]
    pcu = data.draw(st.sampled_from([a for a in places if rdu.is_pcu(*a)]))
    n = data.draw(st.integers(1, 30))

    def at(place):
        return (6 - place[0] if flip_x else place[0]), (4 - place[1] if flip_y else place[1])

    def section(where):
        s = Sketch(p)
        (source, sink), middle = [where(a) for a in pmus], where(pcu)
        s.pmu(*source, enable=2, read_count0=n, flow=dynamic_flow(*middle))
        s.pcu(*middle, vectors=1, count0=n, send_vector=1, flow=dynamic_flow(*sink))
        s.pmu(*sink, enable=1, write_count0=n)
        return s

    assert ticks(section(lambda a: a), p) == ticks(section(at), p)


@FEW
@given(seed=st.integers(0, 10**6), first=st.integers(0, 2**16 - 1), step=st.integers(0, 2**16 - 1))
def test_sequence_ids_take_no_time_where_no_address_is_made_of_them(seed, first, step):
    p = machine()
    section = random_sketch(p, seed)
    if "config.pmu" in section:
        section["config.pmu"]["sequence_scale"] = 0
    try:
        before = execute(p, section)
    except UserError:
        assume(False)
    for region in ("config.pcu", "config.pmu", "config.agcu"):
        if region in section:
            section[region]["sequence"], section[region]["sequence_step"] = first, step
    after = execute(p, section)
    assert before.ticks == after.ticks
    np.testing.assert_array_equal(before.activity, after.activity)


# ---- banks --------------------------------------------------------------------------------------------


def reader(p, n, **fields):
    s = Sketch(p)
    s.pmu(1, 0, enable=2, read_count0=n, flow=dynamic_flow(0, 0), **fields)
    s.pcu(0, 0, vectors=1, count0=n)
    return s


@FEW
@given(lanes=st.sampled_from([4, 8, 16]), banks=st.sampled_from([2, 4, 8, 16, 32]), stride=st.integers(0, 40))
def test_accesses_of_a_stride_take_as_long_as_banks_are_shared(lanes, banks, stride):
    # Lanes fall on B / gcd(s, B) banks, evenly.
    p = machine(f"pcu.lanes={lanes}", f"pmu.banks={banks}", "pmu.bytes=65536")
    few, many = (ticks(reader(p, n, read_lane_stride=stride), p) for n in (3, 13))
    assert many - few == 10 * ceil(lanes / (banks // gcd(stride, banks)))


@pytest.mark.parametrize("stride", [1, 16])
def test_diagonal_stripes_have_no_conflicts(stride):
    # Rows of 16 words in 16 banks: a row is 16 words on, a column 16 words apart.
    p = machine("pcu.lanes=16", "pmu.banks=16", "pmu.bytes=65536")
    step = {"read_stride0": 17 - stride, "read_lane_stride": stride}
    plain = execute(p, reader(p, 16, **step).records())
    skewed = execute(p, reader(p, 16, **step, skew_bits=4, skew_shift=4).records())
    conflicts = rdu.COUNTERS.index("bank_conflicts")
    assert skewed.counters[:, conflicts].sum() == 0
    assert plain.counters[:, conflicts].sum() == (0 if stride == 1 else 15 * 16)


# ---- compute units ------------------------------------------------------------------------------------


@FEW
@given(vectors=st.integers(1, 50), stages=st.integers(1, 8), latency=st.integers(1, 4))
def test_a_pipeline_takes_its_depth_and_a_tick_a_vector(vectors, stages, latency):
    p = machine(f"pcu.stages={stages}", f"pcu.op_latency_cycles={latency}", "pcu.systolic=false")
    s = Sketch(p)
    s.pmu(1, 0, enable=2, read_count0=vectors, flow=dynamic_flow(0, 0))
    s.pcu(0, 0, vectors=1, count0=vectors, send_vector=1, flow=dynamic_flow(0, 1))
    s.pmu(0, 1, enable=1, write_count0=vectors)
    did = busy(s, p)
    depth = rdu.simd_latency(p)
    assert depth == rdu.HEADER + stages * latency + rdu.TAIL
    first = did["pcu@0,0"][0]
    assert did["pmu.write@0,1"] == (first + depth + LINKS, first + depth + LINKS + vectors - 1)


def gemm(p, k, tiles):
    s = Sketch(p)
    for n, (x, y) in enumerate(((1, 0), (0, 1))):
        s.pmu(x, y, enable=2, read_count0=k * tiles, flow=dynamic_flow(1, 1, n))
    s.pcu(
        1,
        1,
        mode="systolic",
        vectors=3,
        count0=k,
        count1=tiles,
        fold_level=1,
        send_vector=1,
        flow=dynamic_flow(2, 1),
    )
    s.pmu(2, 1, enable=1, write_count0=p.stages * tiles)
    return s


@FEW
@given(k=st.integers(1, 20), columns=st.integers(1, 8), latency=st.integers(1, 3), tiles=st.integers(2, 6))
def test_an_array_fills_runs_and_drains(k, columns, latency, tiles):
    p = machine("grid.columns=3", "pcu.lanes=8", f"pcu.stages={columns}", f"pcu.op_latency_cycles={latency}")
    # The first tile: K iterations, the fill behind the last one, then a column a tick.
    did = busy(gemm(p, k, 1), p)
    first = did["pcu@1,1"][0] + k - 1 + rdu.systolic_fill(p) + rdu.TAIL + LINKS
    assert did["pmu.write@2,1"] == (first, first + columns - 1)
    # Each further one takes max(K, C).
    assert ticks(gemm(p, k, tiles), p) - ticks(gemm(p, k, 1), p) == (tiles - 1) * max(k, columns)


@FEW
@given(latency=st.integers(1, 6), n=st.integers(2, 20), tiles=st.integers(1, 4))
def test_an_accumulation_of_latency_n_takes_n_ticks_each(latency, n, tiles):
    p = machine(f"pcu.op_latency_cycles={latency}")
    s = Sketch(p)
    s.pmu(1, 0, enable=2, read_count0=n * tiles, flow=dynamic_flow(0, 0))
    s.pcu(0, 0, vectors=1, count0=n, count1=tiles, fold="add", fold_level=1)
    first, last = busy(s, p)["pcu@0,0"]
    assert last - first == (n * tiles - 1) * latency


# ---- memory -------------------------------------------------------------------------------------------


@FEW
@given(lines=st.integers(1, 60), rate=st.integers(1, 16), latency=st.integers(1, 30))
def test_loads_take_the_latency_once_and_their_rate(lines, rate, latency):
    # Line n, from 0, is granted in tick ceil(n q / p), the rate being p / q = rate / 16 lines a tick.
    p = machine(
        f"memory.hbm.gb_per_s={rate}",
        "memory.hbm.efficiency=1",
        f"memory.hbm.latency_ns={latency}",
        "agcu.in_flight=64",
    )
    s = Sketch(p)
    s.agcu(0, direction="load", words=4, count0=lines, stride0=16, flow=dynamic_flow(1, 0))
    s.pmu(1, 0, enable=1, write_count0=lines)
    last = ceil((lines - 1) * 16 / rate)
    did = busy(s, p)
    assert did["agcu@0"] == (0, last)
    assert did["pmu.write@1,0"] == (
        latency + rdu.LOAD_LATENCY + LINKS,
        last + latency + rdu.LOAD_LATENCY + LINKS,
    )


@FEW
@given(words=st.sampled_from([1, 2, 4]), bf16=st.booleans(), n=st.integers(1, 40))
def test_neighbours_share_a_line(words, bf16, n):
    p = machine()
    size = words * (2 if bf16 else 4)
    s = Sketch(p)
    fields = {"words": words, "format": "bf16" if bf16 else "word", "count0": n, "stride0": size}
    s.agcu(0, direction="load", flow=dynamic_flow(1, 0), **fields)
    s.pmu(1, 0, enable=1, write_count0=n)
    did = execute(p, s.records())
    assert did.counters[:, rdu.COUNTERS.index("hbm_lines")].sum() == ceil(n * size / 16)
