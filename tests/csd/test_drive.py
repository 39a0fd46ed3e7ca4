"""The drive in time against the RTL, GPU and link by hand, and what `simulate` promises."""

from functools import cache

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.csd.units import small_spec
from tilewright.arch import csd as arch
from tilewright.arch.csd_pages import PageTables, Selection
from tilewright.rtl.cosim.cases import Case
from tilewright.rtl.csd import run as bench
from tilewright.sim import csd_beside, csd_fold
from tilewright.sim.csd import simulate
from tilewright.verify.engine import one_by_one
from tilewright.workloads.csd import blank_image

P = small_spec().params()
# What the drive's registers hold; its structure is the same.
TIMINGS = (
    {},
    {"flash__interface__mb_per_s": 128000, "flash__cells__read_lsb_us": 0.003},
    {"flash__interface__mb_per_s": 2000, "flash__cells__program_lsb_us": 0.4},
)
CONFIG = "CONFIG d=8 page_tokens=8 page_channels=2 span=16 tag=config\n"


@cache
def simulator():
    return bench.build_rtl(small_spec())


def of_both(p, texts, selections=()):
    """Timelines of RTL and model, every command with a tag of its own."""
    decisions = {"selections": selections} if selections else None
    programs = [one_by_one(arch.ISA.assemble(text)) for text in texts]
    outcomes = bench.run_cases(simulator(), [Case(p, program, blank_image(p)) for program in programs])
    for program, outcome in zip(programs, outcomes, strict=True):
        assert outcome.error is None, outcome.error
        yield outcome.timeline, simulate(p, program, decisions=decisions)


def assert_equal(rtl, model):
    assert model.ticks == rtl.ticks
    assert {name: model.counter(name) for name in arch.COUNTERS} == rtl.totals()
    assert {unit: model.unit(unit) for unit in rtl.units} == {unit: rtl.unit(unit) for unit in rtl.units}
    assert model.spans.tolist() == rtl.spans.tolist()


def span(timeline, tag):
    (row,) = timeline.spans[timeline.spans["tag"] == timeline.tags.index(tag)]
    return int(row["first"]), int(row["end"])


# ---- against the RTL ----------------------------------------------------------------------------------


@st.composite
def programs(draw):
    """Text of commands without attention that the tables allow."""
    d = draw(st.sampled_from([4, 8, 16]))
    tokens = draw(st.sampled_from([t for t in (1, 2, 4, 8) if t * d <= 64]))
    channels, span = draw(st.sampled_from([(1, 8), (2, 16), (4, 16), (2, 24)]))
    head = f"CONFIG d={d} page_tokens={tokens} page_channels={channels} span={span}"
    lines = [head]
    tables, config = PageTables(P), arch.ISA.assemble(head).flat()[0]
    for _ in range(draw(st.integers(1, 14))):
        slot = draw(st.integers(0, 3))
        where = f"slot={slot} heads={draw(st.integers(1, min(2, 4 - slot)))}"
        first, n = draw(st.integers(0, 9)), draw(st.integers(1, 12))
        line = draw(
            st.sampled_from(
                [
                    f"WRITE {where} first={first} tokens={n}",
                    f"WRITE {where} tokens={8 * n // d * 2 + 8}",
                    f"WRITE form=channels {where} first={first // 5}",
                    f"TRANSPOSE {where} first={first // 9}",
                    f"READ {where} first={first} count={min(n, 3)}",
                    f"READ form=channels {where} first={first // 5} count={min(n, 2)}",
                    "RECLAIM count=1",
                    head,
                ]
            )
        )
        if line != head:
            line += f" after={draw(st.sampled_from([0, 0, 0, 4]))} not_before={draw(st.sampled_from([0, 0, 300]))}"
        record = arch.ISA.assemble(line).flat()[0]
        try:
            arch.check(P, np.array([config, record]))
            tables.command(config, record)
        except ValueError:
            continue
        lines.append(line)
    return "\n".join(lines)


@pytest.mark.cosim
@settings(deadline=None, max_examples=12)
@given(st.lists(programs(), min_size=3, max_size=3), st.sampled_from(TIMINGS))
def test_programs_without_attention_are_those_of_the_rtl(texts, timing):
    for rtl, model in of_both(small_spec(**timing).params(), texts):
        assert_equal(rtl, model)


@pytest.mark.cosim
@pytest.mark.parametrize("timing", TIMINGS)
def test_heads_share_the_drive_as_in_the_rtl(timing):
    """Both kernels at work, ATTENDs that overlap, a READ beside them, and a queue that is full."""
    fill = f"WRITE slot=0 heads=4 tokens=32 line=0 line2=0\nWRITE slot=0 heads=4 first=32 tokens=9\n{CONFIG}"
    spans = "TRANSPOSE slot=0 heads=4\nTRANSPOSE slot=0 heads=4 first=1\n"
    sparse = CONFIG.replace("CONFIG", "CONFIG attention=sparf r=2 k=5 local=2 mean=1")
    attend = "ATTEND slot=0 heads=4 tokens=41 share=0x3cc7ce0c line=0 line2=200\n"
    read = "READ slot=1 heads=2 count=3 line=100\n"
    texts = [
        CONFIG + fill + attend + attend + read + attend,
        CONFIG + fill + spans + sparse + attend.replace("tokens", "spans=2 tokens") + read * 4,
    ]
    # Numbers are all zero: every selection takes the first ones.
    channels, tokens = np.arange(8) < 2, (np.arange(41) < 3) | (np.arange(41) >= 39)
    p = small_spec(**timing).params()
    ((rtl, model),) = of_both(p, texts[:1])
    assert_equal(rtl, model)
    ((rtl, model),) = of_both(p, texts[1:], [Selection(np.tile(channels, (4, 1)), np.tile(tokens, (4, 1)))])
    assert_equal(rtl, model)
    assert model.counter("channel_pages") > 0


# ---- GPU and link -------------------------------------------------------------------------------------

# 2 operations, or 4 bytes, a tick; the path to host memory takes 3 ticks and moves 2 bytes in one.


def constant(*values):
    """Read-only, as arrays of parameters are: kernels are compiled for them already."""
    out = np.array(values)
    out.setflags(write=False)
    return out


SYSTEM = P._replace(
    gpu_ops_p=2, gpu_ops_q=1, gpu_bytes_p=4, gpu_bytes_q=1, gpu_launch=5,
    path_p=constant(1, 2, 1, 1), path_q=constant(1, 1, 1, 1), path_latency=constant(0, 3, 0, 0),
)  # fmt: skip


def system(text, **options):
    return simulate(SYSTEM, arch.ISA.assemble(text), **options)


def test_a_gpu_command_by_hand():
    # Handed over in tick 0: from 1 on 5 ticks of launch and max(21 / 2, 4 / 4), rounded up: to 17, in which it ends.
    timeline = system("GPU operations=21 bytes=4 tag=a")
    assert (span(timeline, "a"), timeline.ticks) == ((1, 17), 18)
    assert timeline.unit("gpu")["busy"] == 16
    assert timeline.unit("decoder") == dict.fromkeys(("busy", *arch.CAUSES), 0) | {"busy": 2, "drain": 16}
    assert (timeline.counter("gpu_ops"), timeline.counter("gpu_bytes")) == (21, 4)
    assert span(system("GPU operations=2 bytes=41 tag=a"), "a") == (1, 1 + 5 + 11)


def test_commands_queue_and_waits_belong_to_what_is_waited_for():
    timeline = system(
        "GPU operations=20 tag=a\nGPU operations=2 tag=b\nLINK path=host bytes=5 after=1 tag=c\nGPU after=3 tag=d"
    )
    # a in 1 to 16; b is handed over in 1, and goes from 16 to 22, the tick of the link; that takes 23 to 23 + 3 + 3.
    assert [span(timeline, t) for t in "abc"] == [(1, 16), (16, 22), (23, 29)]
    assert (span(timeline, "d"), timeline.ticks) == ((30, 35), 36)
    order, drain = 1 + arch.CAUSES.index("order"), 1 + arch.CAUSES.index("drain")
    decoder = timeline.activity[:, timeline.units.index("decoder")]
    # From 2 on for a, from 16 on for b, from 23 to 28 for c; after 29, to the end of d.
    assert decoder[:, order].tolist() == [14, 6, 6, 0, 0]
    assert decoder[:, drain].tolist() == [0, 0, 0, 5, 0]
    assert timeline.unit("link") == dict.fromkeys(("busy", *arch.CAUSES), 0) | {"busy": 6, "idle": 30}
    assert timeline.counter("host_bytes") == 5


def test_gpu_and_drive_work_side_by_side():
    timeline = system(
        CONFIG
        + "GPU operations=200 tag=gpu\nWRITE tokens=1 tag=write\nLINK path=host bytes=2 after=4 tag=link\n"
        "WRITE tokens=1 after=1 tag=last"
    )
    # WRITE: handed over in 2, 4 lines, 3 to 9; the link's LINK in 9, from 10; the second WRITE in 107, when the GPU has ended.
    assert [span(timeline, t) for t in ("gpu", "write", "link")] == [(2, 107), (3, 9), (10, 14)]
    assert (span(timeline, "last"), timeline.ticks) == ((108, 114), 115)
    decoder = timeline.activity[:, timeline.units.index("decoder"), 1 + arch.CAUSES.index("order")]
    tags = {name: int(decoder[timeline.tags.index(name)]) for name in ("gpu", "write", "link")}
    assert tags == {"gpu": 107 - 10, "write": 9 - 4 + 1, "link": 0}


@settings(deadline=None)
@given(st.integers(0, (1 << 47) - 1), st.integers(1, 1 << 34), st.integers(1, 1 << 34))
def test_amounts_are_exact(n, q, p):
    large = SYSTEM._replace(gpu_ops_p=p, gpu_ops_q=q)
    n = min(n, (1 << 61) * p // q)
    timeline = simulate(large, arch.ISA.assemble(f"GPU operations={n} tag=a"))
    assert timeline.unit("gpu")["busy"] == 5 + -(-n * q // p)


# ---- programs -----------------------------------------------------------------------------------------


def test_what_is_cached_takes_no_time():
    cached = f".segment label={arch.CACHED}\n{CONFIG}WRITE slot=1 heads=1 tokens=16\n.segment label=run\n"
    timeline = simulate(P, arch.ISA.assemble(f"{cached}{CONFIG}READ slot=1 heads=1 count=2 tag=read"))
    # Loaded in 2. Looked up in 3, pushed in 4; command 2, array 30, page 10; there in 47, granted its port in 48, 16 lines
    # from 50 on; so again for the second page, which is looked up in the tick after.
    page = 1 + 1 + 42 + 1 + 2 + 16
    assert span(timeline, "read") == (2, 3 + 2 * page + 1)
    assert (timeline.counter("programs"), timeline.counter("other_pages")) == (0, 2)
    assert list(timeline.labels) == [arch.CACHED, "run"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f".segment label=run\n{CONFIG}READ count=1", r"segment 0, command 1 \(READ\): page 0 of slot 0"),
        (
            f".segment label=run\n{CONFIG}RECLAIM count=1",
            r"command 1 \(RECLAIM\): the log of channel 0 has 0 full",
        ),
        (f".segment label={arch.CACHED}\n{CONFIG}RECLAIM count=1", "must hold CONFIG and WRITE only"),
        (
            f".segment label=run\n{CONFIG}.segment label={arch.CACHED}\n{CONFIG}",
            "segment 1: what is cached must come",
        ),
        (
            f".segment label=run\n{CONFIG}READ slot=9 heads=1 count=1",
            "segment 0, command 1 .READ.: slot, heads reach",
        ),
    ],
)
def test_what_cannot_be_done_is_refused(text, message):
    with pytest.raises(ValueError, match=message):
        simulate(P, arch.ISA.assemble(text))


def test_decisions_must_be_those_of_the_program():
    text = (
        CONFIG.replace("CONFIG", "CONFIG attention=sparf k=3")
        + "WRITE heads=1 tokens=9\nATTEND heads=1 tokens=9"
    )
    with pytest.raises(ValueError, match=r"command 2 \(ATTEND\): there are more ATTENDs than selections"):
        simulate(P, arch.ISA.assemble(text), decisions={"selections": []})


def test_segments_are_joined_tags_grow_and_commands_are_kept():
    text = f"GPU operations=40 tag=a\n.segment repeat=3 label=again\n{CONFIG}WRITE tokens=8 tag=b\nGPU operations=90 tag=a"
    program = arch.ISA.assemble(text)
    program.segments[1].regions["code"]["tag"][1] = 7
    seen = []
    timeline = simulate(SYSTEM, program, progress=lambda done, of: seen.append((done, of)), steps=2, trace=5)
    assert timeline.tags[-1] == "tag 7" and len(timeline.tags) == 8
    again = timeline.spans[(timeline.spans["segment"] == 1) & (timeline.spans["tag"] == 7)]
    assert again["count"].tolist() == [3] and again["ticks"][0] < again["end"][0] - again["first"][0]
    assert timeline.log[["segment", "index"]].tolist() == [(0, 0), (1, 0), (1, 1), (1, 2), (1, 0)]
    assert seen[-1] == (2, 2) and timeline.counter("gpu_ops") == 40 + 3 * 90
    assert timeline.unit("gpu")["busy"] == 5 + 20 + 3 * (5 + 45)


# ---- folding ------------------------------------------------------------------------------------------


def assert_folds(p, program, worth=csd_beside.WORTH):
    """Whatever was folded, and simulated beside the run: all is as without."""
    plain = simulate(p, program, fold=False, trace=1000)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(csd_beside, "WORTH", worth)
        folded = simulate(p, program, trace=1000)
    for name in ("ticks", "events"):
        assert getattr(folded, name) == getattr(plain, name)
    for name in ("activity", "counters", "spans", "log"):
        assert np.array_equal(getattr(folded, name), getattr(plain, name)), name


def layers(p, count, between=""):
    """Layers of attention and GPU: of each, two heads of 19 tokens and a span."""
    slots = [2 * (n % (p.slots // 2)) for n in range(count)]
    config = CONFIG.replace("CONFIG", "CONFIG attention=sparf r=2 k=3 mean=1")
    filled = "".join(
        f"WRITE slot={s} heads=2 tokens=19\nWRITE form=channels slot={s} heads=2\n" for s in sorted({*slots})
    )
    steps = "".join(
        f"GPU operations=90 after=2 tag=gpu{s % 3}\nLINK path=host bytes=9 after=1\nWRITE slot={s} heads=2 first=19 tokens=1 after=2\n"
        f"ATTEND slot={s} heads=2 tokens=20 spans=1 tag=attend\n{between}LINK path=host bytes=9 after=4\n"
        for s in slots
    )
    return arch.ISA.assemble(
        f".segment label={arch.CACHED}\n{config}{filled}.segment label=step\n{config}{steps}"
    )


@pytest.fixture
def repeats(monkeypatch):
    """Stretches that were not simulated again: a list that grows."""
    done = []
    repeat = csd_fold.Memory._repeat
    monkeypatch.setattr(csd_fold.Memory, "_repeat", lambda *a: (done.append(a[2:4]), repeat(*a)))
    return done


def test_layers_that_are_alike_fold(repeats):
    p = SYSTEM._replace(patterns=2)
    assert_folds(p, layers(p, 12))
    assert sum(end - first for first, end in repeats) >= 5 * 9


def test_what_differs_is_simulated(repeats):
    """Selections that differ, and tokens that are written."""
    p = SYSTEM._replace(patterns=4)
    assert_folds(p, layers(p, 2))
    program = layers(p, 4)
    code = program.segments[1].regions["code"]
    code["tokens"][code["op"] == arch.OP["WRITE"]] = np.arange(1, 5)
    assert_folds(p, program)
    # LINK, GPU and LINK between the layers are alike; WRITE and ATTEND are not.
    assert all(end - first == 3 for first, end in repeats)


def test_turns_are_part_of_what_is_alike(repeats):
    """A head goes to the other kernel than the one before, unless it comes after the drive."""
    head = f".segment label={arch.CACHED}\n{CONFIG}WRITE slot=0 tokens=48\n.segment label=run\n{CONFIG}"
    assert_folds(SYSTEM, arch.ISA.assemble(head + "ATTEND slot=0 tokens=48 after=4\n" * 12))
    assert len(repeats) == 10  # the first one is simulated, and the last one, as nothing says when it ends
    repeats.clear()
    step = "GPU operations=90000\nATTEND slot=0 tokens=48 after=1\n"
    assert_folds(SYSTEM, arch.ISA.assemble(head + step * 12))
    assert 0 < len(repeats) < 10


HEAD = f".segment label={arch.CACHED}\n{CONFIG}WRITE slot=0 tokens=48\n.segment label=run\n{CONFIG}"
ATTENDS = "ATTEND slot=0 tokens=48 after=4\n"


@pytest.mark.parametrize(
    "behind",
    [
        "ATTEND slot=0 tokens=40 after=1\n",  # does not wait for the heads before
        "WRITE slot=1 tokens=3 after=1\nGPU operations=9 after=4\n",
        "ATTEND slot=0 tokens=48 after=4 not_before=30000\n",  # the drive is at rest long before
        "LINK path=host bytes=9 after=4\n",
    ],
)
def test_when_a_stretch_ends_depends_on_what_follows(behind, repeats):
    """The ATTEND that has something else behind it than those before."""
    assert_folds(SYSTEM, arch.ISA.assemble(HEAD + ATTENDS * 4 + behind + ATTENDS * 3))
    assert len(repeats) >= 3


def test_a_full_queue_is_waited_for_by_its_commands_alone(repeats):
    """Two WRITEs fill the queue: another one waits for it, a LINK for the drive."""
    writes = "WRITE slot=1 tokens=3 after=4\nWRITE slot=2 tokens=3\n"
    p = SYSTEM._replace(command_queue=2)
    assert_folds(p, arch.ISA.assemble(HEAD + writes * 4 + "LINK path=host bytes=9 after=4\n" + writes * 2))
    assert len(repeats) >= 2


def test_what_the_gpu_has_left_counts_if_it_is_waited_for(repeats):
    """All ATTENDs fold while the GPU works; what waits for it, in front of the last one, does not."""
    gpu = "GPU operations=400000 tag=gpu\n"
    assert_folds(SYSTEM, arch.ISA.assemble(HEAD + ATTENDS + gpu + ATTENDS * 6 + "GPU operations=9 after=5\n"))
    assert len(repeats) >= 4
    repeats.clear()
    repeats.clear()
    waits = "ATTEND slot=0 tokens=48 after=6 tag=attend\nLINK path=host bytes=9 after=1 tag=link\n"
    # Next to each other: another length, and another tag than that of the GPU's next command, or the same.
    for lengths, tags in (((0, 10, 0, 0, 0, 0), "aaaaaa"), ((0, 0, 0, 0, 0, 0), "aabbab")):
        layers = [
            f"GPU operations={400000 + n} tag={tag}\n{waits}" for n, tag in zip(lengths, tags, strict=True)
        ]
        assert_folds(SYSTEM, arch.ISA.assemble(HEAD + "".join(layers) * 2 + ATTENDS))
    assert len(repeats) >= 10


def test_stretches_end_when_programs_do(repeats):
    """A prompt: the link brings the next part while the drive stores one, whose programs are still under way when the
    next WRITE comes."""
    layer = "LINK path=host bytes=9 after=1 tag=link\nGPU operations=90000 tag=gpu\n"
    part = "LINK path=host bytes=9 tag=link\nWRITE slot={} heads=2 tokens=16 after=6 tag=write\n"
    parts = [part.format(slot) for slot in range(0, 48, 2)]
    text = CONFIG + "".join((layer if i % 4 == 0 else "") + text for i, text in enumerate(parts))
    p = SYSTEM._replace(
        slots=48, flash=SYSTEM.flash._replace(blocks=64, program=constant(*SYSTEM.flash.program * 4))
    )
    assert_folds(p, arch.ISA.assemble(text))
    assert any(
        end - first == 10 for first, end in repeats
    )  # four parts, which fill blocks, and the GPU's work


_SOME = (
    "ATTEND slot=0 tokens=48", "ATTEND slot=0 tokens=19", "WRITE slot=2 tokens=8", "READ slot=0 count=2",
    "GPU operations=900", "GPU operations=90000", "LINK path=host bytes=9", "LINK path=host bytes=9000",
)  # fmt: skip


@settings(deadline=None, max_examples=60)
@given(
    st.sampled_from((0, csd_beside.WORTH)),
    st.lists(st.tuples(st.sampled_from(_SOME), st.sampled_from((0, 1, 2, 4, 4, 4, 5, 6)), st.integers(0, 2)), min_size=1, max_size=5),
    st.lists(st.tuples(st.integers(0, 4), st.integers(0, 7), st.sampled_from((0, 0, 3000, 60000))), min_size=2, max_size=6),
)  # fmt: skip
def test_folding_knows_gpu_and_link(worth, body, rounds):
    """The same commands again and again; in each round one of them waits for something else, or until later."""
    lines = []
    for place, after, late in rounds:
        lines.append(f".segment label=round\n{CONFIG}")
        for i, (text, usual, tag) in enumerate(body):
            ends = f" after={after} not_before={late}" if i == place else f" after={usual}"
            lines.append(f"{text}{ends} tag={text.split()[0]}{tag}")
    assert_folds(SYSTEM, arch.ISA.assemble(HEAD + "\n".join(lines)), worth)


@pytest.mark.parametrize("processors", [1, 3])
def test_stretches_are_simulated_beside_the_run(processors, repeats, monkeypatch):
    """Eight steps, of which each attends to other tokens, in two stretches that are alike: one of them is simulated, on a
    drive of its own, and both are repeated."""
    done = []
    simulated = csd_beside.Beside._simulate
    monkeypatch.setattr(csd_beside.Beside, "_simulate", lambda *a: done.append(simulated(*a)) or done[-1])
    monkeypatch.setattr(csd_beside, "PROCESSORS", processors)
    text = HEAD
    for tokens in range(20, 28):
        attends = "".join(f"ATTEND slot=0 tokens={tokens} after=4 tag={tag}\n" for tag in "ab")
        text += f".segment label=step\n{CONFIG}{attends}GPU operations=9 after=4\n"
    assert_folds(SYSTEM, arch.ISA.assemble(text), worth=0)
    assert len(done) == 8 and None not in done and len(repeats) == 16


def test_what_does_not_end_at_rest_is_not_taken_from_beside(repeats):
    """The ATTEND behind does not wait for the heads, but for the link, and has other ones at work beside it."""
    text = "ATTEND slot=0 tokens=48 after=4\nATTEND slot=0 tokens=20 after=2\n.segment label=more\n" + CONFIG
    assert_folds(SYSTEM, arch.ISA.assemble(HEAD + text * 3), worth=0)


def test_what_is_done_beside_leaves_turns():
    """One head goes to the first kernel; the next one, behind the link, to the second."""
    text = "ATTEND slot=0 tokens=48 after=4\nLINK path=host bytes=9000\nATTEND slot=0 tokens=20 after=2\n"
    text = f"{CONFIG}{text}LINK path=host bytes=9 after=4\n.segment label=more\n"
    assert_folds(SYSTEM, arch.ISA.assemble(HEAD + text * 3 + CONFIG), worth=0)


def test_selections_and_what_is_written_over_are_not_simulated_beside(monkeypatch):
    config = CONFIG.replace("CONFIG", "CONFIG attention=sparf r=2 k=3 mean=1")
    attends = "".join(f"ATTEND slot=0 tokens={n} after=4\n" for n in (40, 41, 42))
    with monkeypatch.context() as patch:
        patch.setattr(csd_beside.Beside, "_simulate", None)
        assert_folds(SYSTEM, arch.ISA.assemble(HEAD + config + attends), worth=0)
    step = (
        ".segment label=step\n" + CONFIG + "WRITE slot=0 first=0 tokens={}\nATTEND slot=0 tokens=20 after=4\n"
    )
    text = "".join(step.format(n) for n in (8, 24, 16, 8))
    assert_folds(SYSTEM, arch.ISA.assemble(HEAD + text + ATTENDS * 2), worth=0)


@settings(deadline=None, max_examples=25)
@given(programs(), st.integers(2, 4), st.integers(0, 1 << 14))
def test_folding_changes_nothing(text, times, waits):
    lines = text.splitlines()
    body = [
        line.split(" after")[0] + (" after=4" if waits >> i & 1 and not line.startswith("CONFIG") else "")
        for i, line in enumerate(lines)
    ]
    program = arch.ISA.assemble("\n".join([*lines, *body * times]))
    try:
        simulate(P, program)
    except ValueError:  # the logs are full
        return
    assert_folds(P, program)
