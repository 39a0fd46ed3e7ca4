"""A small drive under Verilator: values against the interpreter, ticks and counters by hand and against the cycle model."""

from functools import cache

import numpy as np
import pytest

from tests.csd.units import small_spec
from tilewright.arch import csd as arch
from tilewright.execute import differing_values
from tilewright.rtl.cosim.cases import Case
from tilewright.rtl.csd import run as bench
from tilewright.workloads.csd import interpret

pytestmark = pytest.mark.cosim

SPEC = small_spec()
P = SPEC.params()
CONFIG = "CONFIG d=8 group=1 r=2 k=3 page_tokens=8 page_channels=2 span=16 scale=0x3eb504f3 tag=config\n"


@cache
def simulator():
    return bench.build_rtl(SPEC)


def some_image(seed):
    """Small numbers in the vectors and the value sums; nothing written in flash."""
    rng = np.random.default_rng(seed)
    image = {name: np.zeros(shape, dtype) for name, (dtype, shape) in arch.image_shapes(P).items()}
    shape = image["vectors"].shape
    image["vectors"][:] = rng.normal(size=shape).astype(np.float16).view(np.uint16)
    image["groups"][:] = rng.integers(0, 1 << 14, image["groups"].shape)
    image["sums"][:] = rng.normal(size=image["sums"].shape).astype(np.float32).view(np.uint32)
    image["cells"][:] = rng.integers(0, 1 << 14, image["cells"].shape)
    return image


def play(*texts, seed=0):
    """Timelines of programs on the RTL, whose values were found to be those of the interpreter."""
    programs = [arch.ISA.assemble(CONFIG + text) for text in texts]
    image = some_image(seed)
    outcomes = bench.run_cases(simulator(), [Case(P, program, image) for program in programs])
    for program, outcome in zip(programs, outcomes, strict=True):
        assert outcome.error is None, outcome.error
        assert differing_values(interpret(SPEC, program, image)[0], outcome.image) == []
    return [outcome.timeline for outcome in outcomes]


def span(timeline, tag):
    (row,) = timeline.spans[timeline.spans["tag"] == timeline.tags.index(tag)]
    return int(row["first"]), int(row["end"])


def test_ticks_of_writes_by_hand():
    # CONFIG in tick 0, dispatch in 1, loaded in 2. A token is 2 lines of keys, 2 of values.
    one, group, channels = play(
        "WRITE slot=1 heads=1 first=0 tokens=1 line=0 line2=8 tag=write",
        "WRITE slot=1 heads=2 first=0 tokens=9 line=0 line2=100 tag=write",
        "WRITE form=channels slot=2 heads=1 first=0 line=0 tag=write",
    )
    # Lines in 3 to 6, the end in 7; the decoder finds nothing at work in 8.
    assert (span(one, "write"), one.ticks) == ((2, 8), 9)
    assert one.unit("writer") == dict.fromkeys(("busy", *arch.CAUSES), 0) | {"busy": 6, "idle": 3}
    assert (one.counter("vector_lines"), one.counter("group_lines"), one.counter("programs")) == (4, 4, 0)
    # Each head: 9 tokens of 4 lines, and two pages of 8 tokens of 2 lines, which are then pushed.
    assert span(group, "write") == (2, 2 + 1 + 2 * (9 * 4 + 2 * (8 * 2 + 1)) + 1)
    assert (group.counter("programs"), group.counter("group_lines")) == (4, 2 * (9 * 4 + 2 * 16))
    # Four pages of two channels of 16 tokens, 8 lines.
    assert span(channels, "write") == (2, 2 + 1 + 4 * (8 + 1) + 1)
    assert (channels.counter("programs"), channels.counter("vector_lines")) == (4, 32)


def test_a_program_is_drained():
    # Channel 2 + 0 mod 2: pushed in 11, arrives at 12; command 2, page 10, array 50: done at 74. That of channel 1 is
    # pushed 9 ticks later, done at 83; the third one, of channel 0, goes to the other chip: pushed in 29, and the fourth,
    # pushed in 38, arrives at 39 and is done at 101. A controller holds nothing from the tick after.
    (timeline,) = play("WRITE form=channels slot=2 heads=1 first=0 line=0 tag=write")
    assert timeline.ticks == 39 + 62 + 1 + 1
    assert timeline.unit("decoder")["drain"] == timeline.ticks - 3


def test_pages_that_are_read_back():
    # One page: loaded in 2 of the READ, which the decoder holds back until the write is done.
    (timeline,) = play(
        "WRITE slot=1 heads=1 first=0 tokens=8 line=0 line2=100 tag=write\n"
        "READ form=tokens slot=1 heads=1 first=1 count=1 line=16 tag=read"
    )
    # The value page is pushed in `end` - 2, arrives at end - 1, takes 62 until its cells are done; the read itself: command
    # 2, array 30, page 10; asks for its port a tick later; first line 2 after that; 16 lines, then a tick to end.
    end = span(timeline, "write")[1]
    assert span(timeline, "read") == (end + 1, end - 1 + 62 + 42 + 3 + 16 + 1)
    assert timeline.counter("other_pages") == 1


def test_spans_are_transposed():
    play(
        "WRITE slot=1 heads=2 first=0 tokens=17 line=0 line2=100\nTRANSPOSE slot=1 heads=2 first=0\n"
        "READ form=channels slot=1 heads=2 first=0 count=4 line=128",
        "WRITE slot=0 heads=3 first=0 tokens=33 line=0 line2=50\nTRANSPOSE slot=0 heads=3 first=1\n"
        "READ form=channels slot=2 heads=1 first=1 count=3 line=7\nWRITE form=channels slot=2 heads=1 first=0 line=9\n"
        "READ form=channels slot=2 heads=1 first=0 count=4 line=7",
    )


def test_logs_are_rings():
    # 16 pages of a channel are a block: two heads of 33 tokens are 2 * 2 * 4 pages, 8 of each channel.
    fill = "WRITE slot=0 heads=2 first=0 tokens=33 line=0 line2=80 after=4\n"
    (timeline,) = play(
        fill * 7 + "RECLAIM count=2 after=4\n" + fill * 3 + "READ slot=1 heads=1 count=6 line=0"
    )
    assert timeline.counter("erases") == 2 * 2 * 4


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("GPU operations=1", r"command 1 \(GPU\): the RTL is a drive alone"),
        ("LINK bytes=1", r"command 1 \(LINK\)"),
        ("READ slot=9 heads=1 count=1", "beyond the 4 slots"),
        ("WRITE slot=0 heads=1 tokens=1\n" * 64, "holds 64 commands, not 65"),
    ],
)
def test_what_the_rtl_cannot_do_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        bench.run_cases(None, [Case(P, arch.ISA.assemble(CONFIG + text), some_image(0))])
