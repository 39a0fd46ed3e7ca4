"""Stages of a pipeline: buffers, tokens, and who waits for whom."""

from fractions import Fraction

import pytest

from tilewright.arch.errors import UserError
from tilewright.mappers.rdu.pieces import cached
from tilewright.mappers.rdu.section import Section
from tilewright.mappers.rdu.stages import Pipeline, constant, first_column, stage

from .units import small

PARAMS = small(
    pcu__lanes=8, pcu__stages=8, pcu__systolic="true", pmu__banks=32, pmu__bytes=65536, memory__hbm__bytes=1048576,
    memory__hbm__channels=16, node__p2p_channels=16,
)  # fmt: skip


def line(**fields):
    return Pipeline(PARAMS, **fields)


def test_constants_and_columns():
    assert constant(1.0) == 0x3F800000
    assert stage("multiply", 0, 2.0, 4)["constant"] == 0x40000000
    assert stage("add", 0, 1)["b"] == 1
    assert stage("add", 0, "lane")["b_from"] == "lane"
    # 10 columns by 3 units of 4: the last ends with the last column, and gives two that another gives, too.
    assert [first_column(i, 3, 4, 10) for i in range(3)] == [0, 4, 6]
    assert first_column(0, 1, 12, 10) == 0


def test_buffer_of_one_source_counts_its_columns():
    p = line(blocks=4)
    x = p.load("x", "load", "x", 6)
    p.read("r", "t", x, [(6, 1), (3, 0)])
    f = p.units["r.0"].fields
    # 6 columns of 8 words are 48, in slots of 64 so that a bank bit tells the two buffers apart.
    assert (f["write_count0"], f["write_stride0"], f["write_count1"], f["write_stride1"]) == (6, 8, 2, 64)
    assert (f["read_count0"], f["read_count1"], f["read_count2"], f["read_stride2"]) == (6, 3, 2, 64)
    assert f["bank_bit4"] == 6
    assert p.work["r.0"] == 4 * 18


def test_buffer_of_many_sources_takes_sequence_ids():
    p = line(blocks=2)
    x = p.read("x", "t", p.load("in", "load", "x", 5), [(5, 1), (1, 0)])
    weights = p.weights("w", "t", "w", 5, 1, 2, 1)
    y = p.product("y", "t", x, 5, 1, weights, 16)
    p.read("r", "t", y, [(16, 1)])
    f = p.units["r.0"].fields
    # Each unit counts on, 8 a block; the second block begins 8 * 8 words lower, but in the other buffer of 128.
    assert f["sequence_scale"] == 8
    assert (f["write_count0"], f["write_stride1"]) == (16, 128 - 64)
    assert [p.units[f"y.0.{j}"].fields["sequence"] for j in range(2)] == [0, 8]
    # What begins a block of x waits for the buffer to be free, and for the block before to be complete.
    assert ("r.0.write", 1) in p.starts["x.0.read"]
    assert ("r.0.read", 2) in p.starts["x.0.read"]


def test_tokens_beyond_the_inputs_are_joined():
    p = line(blocks=2)
    x = p.load("x", "load", "x", 4)
    for i in range(6):
        p.read(f"r{i}", "t", x, [(4, 1)])
    p.close()
    # Six buffers must be free: one unit takes four of the tokens, one the others.
    joins = [name for name in p.units if ".join" in name]
    assert len(joins) == 2
    assert sum(sink in joins for _, sink, _ in p.tokens) == 6
    assert sum(sink == "x.0" for _, sink, _ in p.tokens) == 2


def test_scalars_fill_registers_of_their_own():
    p = line(blocks=2)
    x = p.load("x", "load", "x", 4)
    gain = p.broadcast("gain", "t", "gain", 4)
    p.simd("y", "t", [(x, 0), (gain, 0)], [stage("multiply", 0, 1, 4)], 4, result=4)
    u = p.units["y.0"]
    # The gain is scalar input 0, register 4; what stages call register 4 moves up.
    assert (u.fields["vectors"], u.fields["scalars"], u.fields["result"]) == (1, 1, 5)
    assert (u.stages[0]["a"], u.stages[0]["b"], u.stages[0]["to"]) == (0, 4, 5)


def test_all_reduce_moves_what_a_ring_moves():
    p = line(blocks=2)
    x = p.load("x", "load", "x", 8)
    out = p.all_reduce("sum", "t", x, 4)
    # 2 (4 - 1) / 4 of 2 blocks of 8 columns of 8 rows of bf16 leave, and as many come.
    sent = sum(n for name, n in p.traffic.items() if ".send" in name)
    assert sent == 2 * 3 * 8 * 2 * 8 * 2 // 4
    assert sent == sum(n for name, n in p.traffic.items() if ".receive" in name)
    assert (out.columns, len(out.sources[0]), out.each) == (8, 4, 2)


class Rates:
    """Takes a pipeline as a section does, and keeps the rates of its streams."""

    def __init__(self):
        self.rate = {}

    def __getattr__(self, name):
        return lambda *args, **fields: None

    def stream(self, source, *sinks, rate, **fields):
        self.rate[source] = rate


@pytest.mark.parametrize("units", [8, 100])
def test_results_that_meet_claim_no_more_than_their_buffer_takes(units):
    p = line(blocks=2)
    x = p.read("x", "t", p.load("in", "load", "x", 512), [(512, 1), (1, 0)])
    y = p.product("y", "t", x, 512, 1, p.weights("w", "t", "w", 512, 1, units, 1), units * 8)
    p.read("r", "t", y, [(units * 8, 1)])
    section = Rates()
    p.into(section)
    # A unit gives 8 columns of 2 blocks while it takes 1024 of x: 1/64, the least there is. A hundred would be 25/16.
    assert section.rate["y.0.0"] == Fraction(1, max(64, units))
    assert sum(section.rate[f"y.0.{j}"] for j in range(units)) <= 1


def test_a_section_takes_it_all():
    p = line(groups=2, blocks=2)
    x = p.read("x", "t", p.load("in", "load", "x", 8), [(8, 1), (1, 0)])
    y = p.product("y", "t", x, 8, 1, p.weights("w", "t", "w", 8, 1, 1, 1), 8)
    p.store("out", "t", p.read("r", "t", y, [(8, 1)]), "y")
    section = Section(PARAMS, "s")
    p.into(section)
    built = section.build(moves=10_000)
    assert len(built.records["config.pcu"]) == p.count("pcu")
    assert len(built.records["config.agcu"]) == p.count("agcu") == 5


@pytest.mark.parametrize(
    ("columns", "message"),
    [(2000, "buffer r: 2 x 2000 columns of 8 rows are 32000 words; a PMU has 16384")],
)
def test_buffers_fit(columns, message):
    p = line(blocks=2)
    with pytest.raises(UserError, match=message):
        p.read("r", "t", p.load("x", "load", "x", columns))


def test_limits_are_named():
    p = line()
    x = p.load("x", "load", "x", 4)
    with pytest.raises(UserError, match="unit y needs 9 stages; a PCU has 8"):
        p.simd("y", "t", [(x, 0)], [stage("add", 0, 0)] * 9, 4)
    with pytest.raises(UserError, match="unit y needs 5 vector inputs; a PCU has 4"):
        p.simd("y", "t", [(x, 0)] * 5, [], 4)
    with pytest.raises(UserError, match="6 columns are no multiple of 4 sockets"):
        p.all_reduce("sum", "t", p.load("y", "load", "y", 6), 4)
    with pytest.raises(ValueError, match="blocks must be even or 1, not 3"):
        line(blocks=3)


def test_weights_are_read_no_further_than_they_reach():
    # 400 packets, in steps of ceil(400 / 15) = 27: 15 of them. a's 200 end in step ceil(200 / 27) = 8.
    p = line()
    p.streamed("w", "t", "weights", [[("a", 200, "t"), ("b", 200, "t")]])
    counts = {u: [p.units[u].fields[f"{s}_count1"] for s in ("write", "read")] for u in ("a", "b")}
    assert counts == {"a": [15, 8], "b": [15, 15]}
    assert p.units["a"].fields["read_count0"] == 27


@pytest.mark.parametrize(
    ("heads", "chunks", "gates", "expected"),
    [
        (4, 4, 1, 1),  # all heads
        (4, 4, 3, 2),  # two heads each: three gates would not share them evenly
        (4, 4, 4, 4),
        (4, 4, 15, 8),  # two chunks of a head each
        (4, 4, 16, 16),
        (1, 6, 4, 3),
    ],
)
def test_gates_share_the_cache(heads, chunks, gates, expected):
    p = line()
    units = cached(p, "keys", "t", "keys", heads, 8, 16, chunks, 16 * chunks, 0, PARAMS.lanes, gates)
    names = {unit for row in units for chunk in row for unit in chunk}
    assert len(names) == heads * chunks
    found = [u for u in p.units if p.units[u].kind == "agcu"]
    assert len(found) == expected
    # Each gate fills its own units, by addresses that tell them apart.
    for gate in found:
        own = [unit for unit, _ in p.sinks[gate]]
        assert len(own) == heads * chunks // expected
        assert sorted(p.units[u].fields["low"] for u in own) == [16 * 8 * i for i in range(len(own))]
        assert p.work[gate] == len(own) * 16 * 8 // PARAMS.lanes


def test_sides_that_can_be_held_back():
    p = line(blocks=4)
    x = p.load("x", "load", "x", 6)
    p.read("y", "t", x, [(6, 1)])
    p.close()
    # 4 blocks: so many tokens an input holds; each is one event of either side of the buffer.
    assert (p.sides("y.0"), p.sides("x.0")) == (["y.0.write", "y.0.read"], ["x.0"])
    assert (p.events("y.0.read", "wait"), p.events("y.0.write", "signal")) == (4, 4)
    assert p.can_wait("y.0.read") and p.can_tell("y.0.write")
    p.hold_back({"y.0.read": ["y.0.write"]})
    # One token of four is joined to one, and that is given four times.
    assert p.units["y.0.read.through4"].fields["count0"] == 4
    assert p.units["y.0.read.hold"].fields["count0"] == 4
    assert ("y.0.read.hold", "y.0.read", 1) in p.tokens
    for name in "ab":  # two inputs are left; with them the side has no more
        p.unit(name, "pcu", "t", mode="simd", vectors=0)
        p.wire(name, "y.0.read")
    assert not p.can_wait("y.0.read")
    q = line(blocks=16)
    q.read("y", "t", q.load("x", "load", "x", 6), [(6, 1)])
    q.close()
    assert not q.can_wait("y.0.read") and not q.can_tell("y.0.write")
