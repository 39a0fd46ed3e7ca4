"""The contracts of `arch` hold for four machines that have little in common, though only two are built yet.

One Program and one Timeline must carry: a stream of DRAM macro-commands (process-in-memory), one instruction
over a whole tile loop (LUT tensor core), configuration of a fused dataflow section and its launch (a
reconfigurable dataflow unit), and a command that arrives later than `start` (attention inside a drive).
"""

from dataclasses import dataclass, replace

import numpy as np
import pytest

from tilewright.arch import lut, pim
from tilewright.arch.isa import Field, InstructionSet, Op, Program, Record
from tilewright.arch.timeline import Timeline, fold_spans
from tilewright.rtl.layouts import layout_of

# ---- four instruction sets ----------------------------------------------------------------------------

# SN40L (arXiv 2405.07518, IV): compute units, memory units and switches are configured, arguments are loaded,
# then the kernel is launched.
_PLACE = (Field("x", 6, "column of the tile"), Field("y", 6, "row of the tile"))
RDU = InstructionSet(
    "rdu",
    (
        Record(
            "config.pcu",
            (
                *_PLACE,
                Field("mode", 2, "use of the body", names=("off", "systolic", "simd", "reduce")),
                Field("k", 20, "iterations until the control token", 1),
                Field("op", 4, "operation of the SIMD stages", names=("pass", "mul", "add", "exp")),
                Field("stage", 16, "operator that the unit works for", tag=True),
            ),
            at=("x", "y"),
            command=False,
        ),
        Record(
            "config.pmu",
            (
                *_PLACE,
                Field("base", 20, "first byte", base=16),
                Field("bytes", 20, "size of the buffer"),
                Field("order", 1, "read order", names=("plain", "transposed")),
                Field("buffers", 2, "copies, so that writer and reader overlap", 1),
            ),
            at=("x", "y"),
            command=False,
        ),
        Record(
            "config.switch",
            (
                *_PLACE,
                Field("flow", 8, "flow identifier of the packet"),
                Field("out", 5, "mask of ports: north, east, south, west, local", base=16),
                Field("next_flow", 8, "identifier after this hop"),
            ),
            at=("x", "y"),
            command=False,
        ),
        Record("args", (Field("index", 8, "argument register"), Field("value", 48, "an address", base=16)),
               at=("index",), command=False),
        Record("code", (Field("section", 16, "which configuration"),), (Op("EXECUTE", ("section",), "launch"),)),
    ),
)  # fmt: skip

# InstInfer's NVMe commands (arXiv 2409.04992, IV): config() and attend() beside reads and writes of KV groups.
CSD = InstructionSet(
    "csd",
    (
        Record(
            "code",
            (
                Field("slot", 8, "sequence of the batch"),
                Field("layer", 8, "layer of the model"),
                Field("head", 8, "first head"),
                Field("heads", 8, "heads that this drive holds", 1),
                Field("tokens", 20, "tokens to attend to", 1),
                Field("topk", 12, "tokens kept by the filter"),
                Field("rank", 8, "channels that estimate the scores"),
            ),
            (
                Op("CONFIG", ("topk", "rank"), "parameters of the sparse attention"),
                Op("ATTEND", ("slot", "layer", "head", "heads", "tokens"), "q in, attention out"),
                Op("APPEND", ("slot", "layer", "head", "heads", "tokens"), "k, v to the group buffer"),
            ),
        ),
    ),
)

# ---- a program of each --------------------------------------------------------------------------------

PIM_TEXT = """\
# one layer's projection in a decode step of 4 tokens: the vector goes to the buffers, then a loop of MACs
.segment repeat=4 label=decode
WR_GB channels=0xff cols=64 src=0 tag=qkv
GEMV channels=0xff row=3 cols=64 outs=12 pitch=64 dst=128 stride=12 tag=qkv
ADD dst=128 src=128 src2=512 n=1536 tag=bias
"""
LUT_TEXT = """\
LOAD_A count=64 tag=load
LOAD_W half=1 count=256 line=4096 level=l2 tag=load
LMMA weight=1 m_tiles=8 n_tiles=4 groups=8 bits=2 tag=up
STORE count=32 line=65536 tag=up
ORDINARY operations=1000 bytes=4096 level=l2 tag=gate
"""
RDU_TEXT = """\
# Gemm0 -> Mul -> Transpose -> Gemm1, fused: the transpose is an order of reading, not a unit
pcu@0,1 mode=systolic k=64 stage=gemm0
pcu@2,1 mode=simd op=mul k=512 stage=mul
pcu@4,1 mode=systolic k=32 stage=gemm1
pmu@1,1 bytes=65536 buffers=2
pmu@3,1 base=0x100 bytes=65536 buffers=2 order=transposed
switch@0,0 flow=1 out=0x2 next_flow=2
switch@1,0 flow=2 out=0x10
switch@1,0 flow=3 out=0x12 next_flow=3
args@0 value=0x9abcdef01234
EXECUTE section=1 tag=gemm0
"""
CSD_TEXT = """\
CONFIG topk=256 rank=16 tag=attend
ATTEND layer=3 heads=8 tokens=1024 tag=attend
ATTEND layer=3 head=8 heads=8 tokens=1024 tag=attend not_before=40000
APPEND layer=3 heads=16 tag=append not_before=40000
"""


@dataclass(frozen=True)
class Machine:
    isa: InstructionSet
    text: str
    tags: tuple[str, ...]


MACHINES = {
    "pim": Machine(pim.ISA, PIM_TEXT, ("qkv", "bias")),
    "lut": Machine(lut.ISA, LUT_TEXT, ("load", "up", "gate")),
    "rdu": Machine(RDU, RDU_TEXT, ("gemm0", "mul", "gemm1")),
    "csd": Machine(CSD, CSD_TEXT, ("attend", "append")),
}


@pytest.fixture(params=MACHINES)
def machine(request):
    return MACHINES[request.param]


def assert_same(a: Program, b: Program):
    one, two = list(a.segments), list(b.segments)
    assert list(a.tags) == list(b.tags)
    assert [(s.repeat, s.label) for s in one] == [(s.repeat, s.label) for s in two]
    for s, t in zip(one, two, strict=True):
        assert list(s.regions) == list(t.regions)
        for region in s.regions:
            np.testing.assert_array_equal(s.regions[region], t.regions[region])


def test_text_comes_back(machine):
    program = machine.isa.assemble(machine.text)
    assert tuple(program.tags) == machine.tags
    printed = program.text()
    assert_same(program, machine.isa.assemble(printed))
    assert machine.isa.assemble(printed).text() == printed
    # What was written is what is printed, but for the order of fields and those at their default.
    wanted = [set(line.split()) for line in machine.text.splitlines() if not line.startswith("#")]
    got = [set(line.split()) for line in printed.splitlines()]
    assert len(got) == len(wanted)
    assert all(g <= w for g, w in zip(got, wanted, strict=True))


def test_words_come_back_and_agree_with_the_hardware_layout(machine):
    for segment in machine.isa.assemble(machine.text).segments:
        for region, records in segment.regions.items():
            record = machine.isa.record(region)
            words = record.encode(records)
            assert words.shape == (len(records), -(-record.bits // 32))
            np.testing.assert_array_equal(record.decode(words), records)
            layout = layout_of(record)
            assert layout.size == record.bits
            for row, r in zip(words, records, strict=True):
                bits = sum(int(w) << (32 * i) for i, w in enumerate(row))
                assert bits >> record.bits == 0
                view = layout.from_bits(bits)
                assert {f.name: _value(view[f.name]) for f in record.layout} == {
                    f.name: int(r[f.name]) for f in record.layout
                }


def _value(constant) -> int:
    return constant if isinstance(constant, int) else constant.value


def test_pim_decode_step_is_one_instruction_for_a_row_of_banks():
    (segment,) = pim.ISA.assemble(PIM_TEXT).segments
    code = segment.regions["code"]
    assert segment.repeat == 4 and segment.label == "decode"
    assert code["cols"].tolist() == [64, 64, 1] and code["tag"].tolist() == [0, 0, 1]


def test_lut_one_instruction_covers_the_tile_loop():
    code = next(iter(lut.ISA.assemble(LUT_TEXT).segments)).regions["code"]
    loops = ("m_tiles", "n_tiles", "groups", "bits")
    assert [int(code[name][2]) for name in loops] == [8, 4, 8, 2]  # 512 planes
    assert code["level"].tolist() == [0, 1, 0, 0, 1]


def test_rdu_section_is_configuration_by_region_then_a_launch():
    regions = next(iter(RDU.assemble(RDU_TEXT).segments)).regions
    assert {r: len(a) for r, a in regions.items()} == {
        "config.pcu": 3, "config.pmu": 2, "config.switch": 3, "args": 1, "code": 1,
    }  # fmt: skip
    assert regions["config.pcu"]["stage"].tolist() == [0, 1, 2]
    assert regions["args"]["value"][0] == 0x9ABC_DEF0_1234


def test_csd_work_arrives_over_time():
    code = next(iter(CSD.assemble(CSD_TEXT).segments)).regions["code"]
    assert code["not_before"].tolist() == [0, 0, 40000, 40000]


# ---- one Timeline -------------------------------------------------------------------------------------


def timeline(machine, log, ticks, units, causes, activity, counter_names=("macs",), counters=None):
    """A Timeline of `log` rows (tag, first, end) and activity {(tag or None, unit, "busy" or cause): n}."""
    tags = machine.tags
    table = np.zeros((len(tags) + 1, len(units), 1 + len(causes)), np.int64)
    for (tag, unit, state), n in activity.items():
        row = len(tags) if tag is None else tags.index(tag)
        table[row, units.index(unit), ("busy", *causes).index(state)] += n
    log = np.array([(tags.index(t), first, end) for t, first, end in log], np.int64)
    counts = np.zeros((len(tags) + 1, len(counter_names)), np.int64) if counters is None else counters
    return Timeline(
        ticks=ticks, tags=tags, spans=fold_spans(log[:, 0], log[:, 1], log[:, 2], 0),
        counter_names=counter_names, counters=counts, units=units, causes=causes, activity=table,
    )  # fmt: skip


def spans(line):
    return {line.tags[s["tag"]]: (int(s["first"]), int(s["end"]), int(s["ticks"])) for s in line.spans}


def test_tags_of_a_command_stream_follow_one_another():
    line = timeline(
        MACHINES["pim"], [("qkv", 0, 70), ("qkv", 70, 900), ("bias", 900, 1000)], 1000,
        ("mac", "asic"), ("activate", "wait"),
        {("qkv", "mac", "busy"): 768, ("qkv", "mac", "activate"): 132, ("qkv", "asic", "wait"): 900,
         ("bias", "asic", "busy"): 100, ("bias", "mac", "wait"): 100},
    )  # fmt: skip
    assert spans(line) == {"qkv": (0, 900, 900), "bias": (900, 1000, 100)}
    assert line.unit("mac") == {"busy": 768, "activate": 132, "wait": 100}
    assert (line.bound_by(), line.bound_by(0), line.bound_by(1)) == ("mac", "mac", "asic")


def test_tags_of_a_dataflow_section_overlap():
    # Four tiles through three stages of 10, 4 and 8 ticks, one tick apart; the slowest stage sets the pace:
    # gemm0 works 0-40; mul follows each tile: 11-15, 21-25, 31-35, 41-45; gemm1: 16-24, 26-34, 36-44, 46-54.
    log = [("gemm0", 0, 40)]
    log += [("mul", 11 + 10 * i, 15 + 10 * i) for i in range(4)]
    log += [("gemm1", 16 + 10 * i, 24 + 10 * i) for i in range(4)]
    units, causes = ("pcu0", "pcu1", "pcu2"), ("input", "credit", "idle")
    line = timeline(
        MACHINES["rdu"], log, 54, units, causes,
        {("gemm0", "pcu0", "busy"): 40, (None, "pcu0", "idle"): 14,
         ("mul", "pcu1", "busy"): 16, ("mul", "pcu1", "input"): 29, (None, "pcu1", "idle"): 9,
         ("gemm1", "pcu2", "busy"): 32, ("gemm1", "pcu2", "input"): 22},
    )  # fmt: skip
    assert spans(line) == {"gemm0": (0, 40, 40), "mul": (11, 45, 34), "gemm1": (16, 54, 38)}
    # The stages overlap, so their ticks add up to more than the run.
    assert line.tag_ticks().tolist() == [40, 34, 38] and line.ticks == 54
    assert line.bound_by(1) == "pcu1: input"
    assert line.bound_by(2) == "pcu2"
    # A stage without input or credit has nothing to do: what binds is the one that never waits.
    assert replace(line, waiting=causes).bound_by() == "pcu0"


def test_a_command_that_arrives_later_leaves_arrival_stalls():
    line = timeline(
        MACHINES["csd"], [("attend", 0, 9000), ("attend", 40000, 49000), ("append", 40000, 40100)], 49100,
        ("flash", "attend"), ("arrival", "wait"),
        {("attend", "flash", "busy"): 18000, ("append", "flash", "busy"): 100, (None, "flash", "arrival"): 31000,
         ("attend", "attend", "busy"): 17000, ("attend", "attend", "wait"): 1000,
         (None, "attend", "arrival"): 31100},
        ("pages", "bytes"), np.array([[512, 2_097_152], [0, 8192], [3, 0]]),
    )  # fmt: skip
    assert spans(line) == {"attend": (0, 49000, 49000), "append": (40000, 40100, 100)}
    assert line.bound_by() == "flash: arrival"
    assert line.totals() == {"pages": 515, "bytes": 2_105_344}


@pytest.mark.parametrize("name", MACHINES)
def test_no_unit_may_lose_a_tick(name):
    with pytest.raises(AssertionError, match="unit u: busy plus stalls is 9, not 10 ticks"):
        tag = MACHINES[name].tags[0]
        timeline(MACHINES[name], [(tag, 0, 10)], 10, ("u",), ("idle",), {(tag, "u", "busy"): 9})
