"""The interpreter of target csd: where rows and pages lie by hand, attention against the kernels, what is refused."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.csd.units import half, small_spec
from tilewright.arch import csd as arch
from tilewright.arch.csd_pages import PageTables
from tilewright.arch.formats import FP16
from tilewright.arch.isa import Program, Segment
from tilewright.workloads import csd as meaning
from tilewright.workloads import csd_kernels as kernels
from tilewright.workloads.formats import from_bits

# Lines of 4 elements, pages of 16 lines, 4 slots, 2 channels of 2 chips with 2 planes, 4 blocks of 4 pages.
SPEC = small_spec(engine__exp_terms=6, engine__reciprocal_iterations=3, engine__rsqrt_iterations=3)
P = SPEC.params()
ENGINE = kernels.Engine(P.lanes, P.exp_terms, P.reciprocal_iterations, P.rsqrt_iterations)
# Groups of 2 tokens with 4 channels each; channel-indexed pages of 2 channels and 4 tokens.
CONFIG = "CONFIG d=4 page_tokens=2 page_channels=2 span=4 scale=0x3f000000"  # 1/sqrt(4)


def sparf(r, k, **more):
    fields = (
        dict(pair.split("=") for pair in CONFIG.split()[1:]) | {"attention": "sparf", "r": r, "k": k} | more
    )
    return " ".join(["CONFIG", *(f"{name}={value}" for name, value in fields.items())])


def share(n):
    return hex(int(np.float32(1 / n).view(np.uint32)))


def run(text, image, spec=SPEC):
    """The image and the selections."""
    out, decisions = meaning.interpret(spec, arch.ISA.assemble(text), image)
    return out, decisions["selections"]


def refused(text, match):
    with pytest.raises(ValueError, match=match):
        run(text, meaning.blank_image(P))


def elements(image, line, *shape):
    """FP16 bits from a line of the vectors on."""
    return image["vectors"].reshape(-1)[line * P.lanes :][: np.prod(shape)].reshape(shape)


def where(channel, number):
    """Index of a page by its number in its channel's log: chips count first, then planes, then pages."""
    a = arch.log_address(P.flash, SPEC.flash.placement.order, number)
    return channel, *(a[name] for name in ("chip", "die", "plane", "block", "page"))


@pytest.fixture
def image():
    """Line i of the vectors holds 4i .. 4i + 3; everything else holds 0xFFFF."""
    out = meaning.blank_image(P)
    for array in out.values():
        array[...] = np.iinfo(array.dtype).max
    out["vectors"][...] = np.arange(out["vectors"].size).reshape(-1, 4)
    return out


def tensors(seed, heads, tokens, d=4, group=1):
    rng = np.random.default_rng(seed)
    return [half(rng.normal(size=s)) for s in ((heads, group, d), (heads, tokens, d), (heads, tokens, d))]


def loaded(q, keys, values):
    """An image with queries from line 0, keys from line 50 and values from line 100 on; results go to line 20."""
    out = meaning.blank_image(P)
    for line, array in ((0, q), (50, keys), (100, values)):
        elements(out, line, *array.shape)[...] = array
    return out


# ---- where things go ----------------------------------------------------------------------------------


def test_shapes_of_the_image(image):
    assert {name: (a.dtype.name, a.shape) for name, a in image.items()} == {
        "vectors": ("uint16", (256, 4)),
        "groups": ("uint16", (4, 2, 2, 16, 4)),
        "sums": ("uint32", (4, 16)),
        "cells": ("uint16", (2, 2, 1, 2, 4, 4, 16, 4)),
    }


def test_written_tokens_are_staged_and_programmed(image):
    """Tokens 1, 2, 3 of slots 1 and 2, keys from line 0 on: slot 2's are in lines 3 to 5.

    Token 1 fills group 0 (with a token 0 that was written before), 2 and 3 fill group 1. Pages 0 to 3 of slot 1 lie on
    channels 1, 0, 0, 1, and slot 2's on 0, 1, 1, 0.
    """
    first = f"{CONFIG}\nWRITE slot=1 heads=2 first=0 tokens=1 line=100 line2=102"
    out, _ = run(f"{first}\nWRITE slot=1 heads=2 first=1 tokens=3 line=0 line2=10", image)
    groups = out["groups"]
    # Slot, half, keys or values, line: token 3 is row 1 of the odd half.
    assert groups[1, 1, 0, 1].tolist() == [8, 9, 10, 11]
    assert groups[2, 1, 0, 1].tolist() == [20, 21, 22, 23]
    assert groups[2, 1, 1, 0].tolist() == [56, 57, 58, 59]  # values: lines 10 to 12 are slot 1's
    assert groups[1, 0, 0, 0].tolist() == [400, 401, 402, 403]
    assert (groups[1:3, :, :, 2:] == 0xFFFF).all() and (groups[[0, 3]] == 0xFFFF).all()
    # The logs of the second command: slot 1 takes (1,0), (0,0), (0,1), (1,1) as channel and number, slot 2 (0,2) ..
    cells = out["cells"]
    assert cells[where(1, 0)][:3].tolist() == [[400, 401, 402, 403], [0, 1, 2, 3], [0xFFFF] * 4]
    assert cells[where(1, 1)][:2].tolist() == [[44, 45, 46, 47], [48, 49, 50, 51]]  # values of tokens 2, 3
    assert cells[where(0, 2)][0].tolist() == [404, 405, 406, 407]  # slot 2's keys
    assert (cells != 0xFFFF).any(axis=(-1, -2)).sum() == 8
    assert image["cells"].min() == 0xFFFF


def test_logs_fill_plane_by_plane():
    """The order of the preset, C W P D: chips first, then planes, then pages."""
    assert SPEC.flash.placement.order.replace("C", "")[0] == "W"
    assert [where(0, n) for n in range(5)] == [
        (0, 0, 0, 0, 0, 0), (0, 1, 0, 0, 0, 0), (0, 0, 0, 1, 0, 0), (0, 1, 0, 1, 0, 0), (0, 0, 0, 0, 0, 1),
    ]  # fmt: skip


def test_value_sums_grow_token_by_token(image):
    """0.5 + 0.25 in the order of tokens; token 0 begins anew; what the keys are does not matter."""
    elements(image, 0, 3, 4)[...] = half([[0.5, 1, 2, 3], [0.25, 1, -2, 4], [1, 1, 1, 1]])
    write = f"{CONFIG}\nWRITE slot=3 tokens=2 line=9 line2=0"
    out, _ = run(write, image)
    assert out["sums"].view(np.float32)[3, :4].tolist() == [0.75, 2, 0, 7]
    assert (out["sums"][3, 4:] == 0xFFFFFFFF).all() and (out["sums"][:3] == 0xFFFFFFFF).all()
    out, _ = run(f"{write}\nWRITE slot=3 first=2 line=9 line2=2", image)
    assert out["sums"].view(np.float32)[3, :4].tolist() == [1.75, 3, 1, 8]
    out, _ = run(f"{write}\nWRITE slot=3 line=9 line2=2", image)
    assert out["sums"].view(np.float32)[3, :4].tolist() == [1, 1, 1, 1]


def test_channels_are_written_row_by_row(image):
    """d = 4 channels of 4 tokens are lines 8 to 11; a page holds two channels. Span 1 begins at entry 2."""
    out, _ = run(f"{CONFIG}\nWRITE form=channels slot=1 first=1 line=8", image)
    # Positions 2 and 3 of slot 1 lie on channels 0 and 1.
    assert out["cells"][where(0, 0)][:3].reshape(-1).tolist() == [*range(32, 40), *[0xFFFF] * 4]
    assert out["cells"][where(1, 0)][:2].reshape(-1).tolist() == list(range(40, 48))
    np.testing.assert_array_equal(out["groups"], image["groups"])


def test_pages_are_read_back_whole(image):
    text = f"{CONFIG}\nWRITE slot=2 tokens=4 line=0 line2=10\nREAD slot=2 first=1 count=2 line=64"
    out, _ = run(text, image)
    read = elements(out, 64, 2, 64)
    assert read[0].tolist() == [*range(40, 48), *[0xFFFF] * 56]  # values of group 0
    assert read[1].tolist() == [*range(8, 16), *[0xFFFF] * 56]  # keys of group 1
    np.testing.assert_array_equal(out["vectors"][96:], image["vectors"][96:])


def test_a_span_is_transposed(image):
    """Tokens 0 to 3 are lines 0 to 3; channel 0 of them is 0, 4, 8, 12."""
    text = f"{CONFIG}\nWRITE slot=1 tokens=4 line=0 line2=10\nTRANSPOSE slot=1\nREAD slot=1 form=channels count=2 line=64"
    out, _ = run(text, image)
    read = elements(out, 64, 2, 64)
    assert read[0, :8].tolist() == [0, 4, 8, 12, 1, 5, 9, 13]
    assert read[1, :8].tolist() == [2, 6, 10, 14, 3, 7, 11, 15]


@given(
    st.integers(0, 2**32),
    st.sampled_from([(4, 2, 2, 4), (8, 2, 1, 8), (8, 4, 4, 8), (16, 1, 2, 4), (4, 4, 4, 16)]),
)
@settings(deadline=None, max_examples=15)
def test_transpose_writes_what_the_host_would(seed, shape):
    d, rows, channels, span = shape
    config = f"CONFIG d={d} page_tokens={rows} page_channels={channels} span={span}"
    rng = np.random.default_rng(seed)
    keys = rng.integers(0, 1 << 16, (2, 2 * span, d), dtype=np.uint16)
    out = meaning.blank_image(P)
    elements(out, 0, *keys.shape)[...] = keys
    line, count = keys.size // 4, d // channels
    elements(out, line, 2, d, span)[...] = keys[:, span:].swapaxes(1, 2)
    write = f"{config}\nWRITE heads=2 tokens={2 * span} line=0 line2=0\n"
    read = f"\nREAD form=channels heads=2 first=1 count={count} line=0"
    used = channels * span // 4
    mine, theirs = (
        elements(run(write + how + read, out)[0], 0, 2, count, 16, 4)[:, :, :used]
        for how in ("TRANSPOSE heads=2 first=1", f"WRITE form=channels heads=2 first=1 line={line}")
    )
    np.testing.assert_array_equal(mine, theirs)
    np.testing.assert_array_equal(mine.reshape(2, d, span), keys[:, span:].swapaxes(1, 2))


# ---- attention ----------------------------------------------------------------------------------------

GOLDEN = (
    half([[[2, -1, 0.5, 0.25]]]),
    half([[[1, 0, 0, 0], [0, 1, 0, 0], [1, -1, 0, 0], [0, 0, 1, 1]]]),
    half([[[1, 0, 0, 0], [0, 1, 0, 0], [2, 0, 0, 0], [0, 2, 0, 0]]]),
)


def test_golden_vector_through_the_drive():
    """Algorithm 1 with r = k = 2 in binary64, mean of values (3/4, 3/4): i = {0, 1}, j = {0, 2}."""
    config = sparf(2, 2, mean=1, page_tokens=1)
    write = f"{config}\nWRITE slot=1 tokens=4 line=50 line2=100\n"
    attend = f"ATTEND slot=1 tokens=4 spans=1 share={share(4)} line2=20\n"
    text = f"{write}TRANSPOSE slot=1\n{attend.strip()} after=4\nREAD slot=1 count=8 line=128"
    out, selections = run(text, loaded(*GOLDEN))
    got = from_bits(elements(out, 20, 4), FP16).astype(np.float64)
    assert got == pytest.approx([1.48505888, 0.11811477, 0, 0], rel=2**-11, abs=2**-13)
    assert np.flatnonzero(selections[0].channels[0]).tolist() == [0, 1]
    assert np.flatnonzero(selections[0].tokens[0]).tolist() == [0, 2]
    read = elements(out, 128, 4, 2, 64)
    np.testing.assert_array_equal(read[:, 0, :4], GOLDEN[1][0])
    np.testing.assert_array_equal(read[:, 1, :4], GOLDEN[2][0])
    # Without spans the estimate comes from token-indexed rows: the same bits.
    tail, _ = run(write + attend.replace("spans=1", ""), loaded(*GOLDEN))
    np.testing.assert_array_equal(elements(tail, 20, 4), elements(out, 20, 4))
    # Dense: 1.261315, 0.37969186.
    out, selections = run(
        f"{CONFIG}\nWRITE tokens=4 line=50 line2=100\nATTEND tokens=4 line2=20", loaded(*GOLDEN)
    )
    got = from_bits(elements(out, 20, 2), FP16).astype(np.float64)
    assert got == pytest.approx([1.261315, 0.37969186], rel=2**-10)  # weights are rounded too
    assert selections[0].tokens.all() and not selections[0].channels.any()


def test_an_estimate_reads_the_second_copy():
    """Channel-indexed keys of zeros: all weights alike, so the first tokens; the tail is what was written."""
    config, mean = sparf(4, 1), "\nATTEND tokens=4 spans=1 line2=20"
    write = f"{config}\nWRITE tokens=4 line=50 line2=100\nWRITE form=channels line=200"
    _, selections = run(write + mean, loaded(*GOLDEN))
    assert np.flatnonzero(selections[0].tokens[0]).tolist() == [0]  # token 2 by its key
    more = "\nWRITE first=4 line=52 line2=102\nATTEND tokens=5 spans=1 line2=20"
    _, selections = run(write + more, loaded(*GOLDEN))
    assert np.flatnonzero(selections[0].tokens[0]).tolist() == [4]


def test_share_and_scale_are_what_the_program_says():
    """Values 1, 1, 3 and one token, the third: alpha * 3 + (1 - alpha) * 5 * share."""
    keys = half([[[0, 0, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0]]])
    values = half(np.array([1, 1, 3])[None, :, None] * np.ones(4))
    q = half([[[1, 0, 0, 0]]])
    results = []
    for scale, told in ((0.5, 0.25), (1.0, 0.25), (0.5, 1.0)):
        bits = hex(int(np.float32(scale).view(np.uint32)))
        text = f"{sparf(4, 1, mean=1, scale=bits)}\nWRITE tokens=3 line=50 line2=100\n"
        text += f"ATTEND tokens=3 line2=20 share={hex(int(np.float32(told).view(np.uint32)))}"
        out, _ = run(text, loaded(q, keys, values))
        alpha = np.exp(2 * scale) / (2 + np.exp(2 * scale))
        results.append((from_bits(elements(out, 20, 1), FP16)[0], alpha * 3 + (1 - alpha) * 5 * told))
    for got, want in results:
        assert got == pytest.approx(want, rel=2e-3)


@given(
    st.integers(0, 2**32), st.integers(1, 2), st.integers(1, 13), st.integers(1, 4), st.integers(1, 14),
    st.integers(0, 3), st.booleans(), st.integers(0, 2), st.sampled_from([1, 2, 4]),
)  # fmt: skip
@settings(deadline=None, max_examples=40)
def test_attention_is_the_kernel(seed, group, tokens, r, k, local, mean, spans, rows):
    """However tokens came in: partial groups, in one go or one by one, with or without whole spans."""
    q, keys, values = tensors(seed, 2, tokens, group=group)
    image = loaded(q, keys, values)
    spans = min(spans, tokens // 4)
    config = sparf(r, k, local=local, mean=int(mean), group=group, page_tokens=rows)
    writes = [f"WRITE slot=1 heads=2 tokens={tokens} line=50 line2=100"]
    split = seed % tokens  # the first ones, then the rest one by one
    if split:
        lines = np.arange(2 * tokens).reshape(2, tokens)
        order = [*lines[:, :split].reshape(-1), *lines[:, split:].T.reshape(-1)]
        for line in (50, 100):
            rows_of = elements(image, line, 2 * tokens, 4)
            rows_of[...] = rows_of[order]
        writes = [f"WRITE slot=1 heads=2 tokens={split} line=50 line2=100"]
        for t in range(split, tokens):
            writes.append(f"WRITE slot=1 heads=2 first={t} line={50 + 2 * t} line2={100 + 2 * t}")
    steps = [f"TRANSPOSE slot=1 heads=2 first={s}" for s in range(spans)]
    attend = f"ATTEND slot=1 heads=2 tokens={tokens} spans={spans} share={share(tokens)} line2=20 after=4"
    out, (selection,) = run("\n".join([config, *writes, *steps, attend]), image)
    sums = kernels.add_values(np.zeros((2, 4), np.uint32), values)
    want = kernels.sparf(
        q, keys, values, np.float32(0.5), ENGINE, r=r, k=k, local=local, value_sum=sums if mean else None
    )
    np.testing.assert_array_equal(elements(out, 20, *q.shape), want.out)
    np.testing.assert_array_equal(selection.channels, want.channels)
    np.testing.assert_array_equal(selection.tokens, want.tokens)
    changed = np.flatnonzero((out["vectors"] != image["vectors"]).any(axis=1))
    assert set(changed) <= set(range(20, 20 + 2 * group))


def test_selections_are_in_the_order_of_the_program():
    text = f"{CONFIG}\nWRITE heads=2 tokens=3 line=50 line2=100\nATTEND heads=2 tokens=3 line2=20\n"
    text += ".segment repeat=2\n" + sparf(1, 1) + "\nATTEND tokens=2 line2=20"
    _, selections = run(text.replace("tokens=2 line2", "slot=1 tokens=3 line2"), loaded(*tensors(0, 2, 3)))
    assert [s.tokens.shape for s in selections] == [(2, 3), (1, 3), (1, 3)]
    assert [int(s.tokens.sum()) for s in selections] == [6, 1, 1]


def test_decisions_are_added_to_those_given(image):
    program = Program(arch.ISA, [Segment({"code": arch.ISA.assemble("GPU\nLINK bytes=4").flat()})])
    out, decisions = meaning.interpret(SPEC, program, image, {"kept": 1})
    assert decisions == {"kept": 1, "selections": []}
    for name, array in out.items():
        np.testing.assert_array_equal(array, image[name])


# ---- reclaim ------------------------------------------------------------------------------------------

# 4 units of 4 pages: a block of a log is 16 pages, and 2 channels have 32. A slot's 32 entries are 16 on each.
FILL = "CONFIG d=4 page_tokens=1 page_channels=2 span=4\nWRITE tokens=16 line=0 line2=64\n"


def test_a_reclaimed_block_is_filled_anew(image):
    """All four blocks of both logs, the oldest given back: the next page is the first one's."""
    fill = "".join(FILL.replace("WRITE", f"WRITE slot={s}") for s in range(4))
    refill = "RECLAIM count=1\nWRITE slot=0 tokens=1 line=128 line2=129"
    out, _ = run(fill + refill, image)
    assert out["cells"][where(0, 0)][0].tolist() == [512, 513, 514, 515]
    # All else stays, the erased cells too.
    assert out["cells"][where(0, 1)][0].tolist() == [260, 261, 262, 263]  # values of token 1
    assert run(fill, image)[0]["cells"][where(0, 0)][0].tolist() == [0, 1, 2, 3]
    refused(fill + "WRITE slot=0 tokens=1 line=0 line2=0", "command 8 .WRITE.: the log of channel 0 is full")
    refused(fill + "RECLAIM\nREAD count=1", "page 0 of slot 0 .tokens. was erased")
    run(fill + "RECLAIM\nREAD slot=1 count=1", image)


def test_pages_and_tables_agree_with_the_tables():
    """The interpreter's table is that of `PageTables` run by itself."""
    text = f"{FILL}RECLAIM\n{CONFIG}\nWRITE slot=1 heads=2 tokens=5\nTRANSPOSE slot=1\nREAD slot=2"
    program = arch.ISA.assemble(text)
    machine = meaning.Machine(SPEC, meaning.blank_image(P))
    machine.run(program)
    tables, config = PageTables(P), None
    for record in program.flat():
        config = record if record["op"] == arch.OP["CONFIG"] else config
        tables.command(config, record)
    np.testing.assert_array_equal(machine.pages.table, tables.table)
    np.testing.assert_array_equal(machine.pages.taken, tables.taken)


# ---- what is refused ----------------------------------------------------------------------------------

WRITTEN = f"{CONFIG}\nWRITE slot=1 tokens=5 line=0 line2=10\n"


@pytest.mark.parametrize(
    "text, match",
    [
        ("READ", "segment 0, command 0 .READ.: there is no CONFIG before it"),
        (f"{CONFIG}\nREAD slot=4", "slot, heads reach beyond the 4 slots"),
        (
            f"{CONFIG}\nREAD slot=3",
            "segment 0, command 1 .READ.: page 0 of slot 3 .tokens. was never written",
        ),
        (f"{WRITTEN}READ slot=1 first=4", "page 4 of slot 1"),  # group 2 is partial
        (
            f"{WRITTEN}ATTEND slot=1 tokens=6 line2=20",
            "group 2 of slot 1 is not in the group buffer with 2 tokens",
        ),
        (f"{WRITTEN}ATTEND slot=1 tokens=2 line2=20", "group 0 of slot 1 is not in the group buffer"),
        (f"{WRITTEN}ATTEND heads=2 tokens=1 line2=20", "group 0 of slot 0"),
        (f"{WRITTEN}WRITE slot=1 first=7", "group 3 of slot 1 is not in the group buffer with 1 tokens"),
        (f"{WRITTEN}WRITE slot=1 first=1", "group 0 of slot 1"),
        (f"{WRITTEN}TRANSPOSE slot=1 first=1", "page 4 of slot 1 .tokens. was never written"),
        (
            f"{sparf(1, 1)}\nWRITE slot=1 tokens=5\nATTEND slot=1 tokens=5 spans=1 line2=20",
            "page 0 of slot 1 .channels. was never written",
        ),
        (f"{WRITTEN}RECLAIM", "the log of channel 0 has 0 full blocks, not 1 to erase"),
        (f"{CONFIG}\n.segment label=b\nREAD", "segment 1, command 0 .READ.: there is no CONFIG"),
    ],
)
def test_what_is_not_there_is_refused(text, match):
    refused(text, match)


@pytest.mark.parametrize(
    "second, match",
    [
        ("ATTEND slot=1 tokens=5 line=24 line2=40", "reads vectors that ATTEND writes meanwhile, from 24 on"),
        ("ATTEND slot=1 tokens=5 line=40 line2=12", "writes vectors that ATTEND reads meanwhile, from 12 on"),
        ("READ slot=1 line=17", "writes vectors that ATTEND writes meanwhile, from 24 on"),
        ("TRANSPOSE slot=1", "writes channel-indexed pages that ATTEND reads meanwhile, from 0 on"),
    ],
)
def test_what_shows_when_an_attend_ends_is_refused(second, match):
    """The first one reads line 12 and writes line 24."""
    first = f"{sparf(1, 1)}\nWRITE slot=1 tokens=5\nTRANSPOSE slot=1\nATTEND slot=1 tokens=5 spans=1 line=12 line2=24\n"
    refused(first + second, f"segment 0, command 4 .*{match}")
    for between in (CONFIG, "GPU after=4", "WRITE slot=2"):
        run(f"{first}{between}\n{second}", meaning.blank_image(P))
    run(f"{first}{second} after=4", meaning.blank_image(P))


def test_what_does_not_meet_an_attend_is_not_refused():
    first = f"{sparf(1, 1)}\nWRITE slot=1 tokens=9\nTRANSPOSE slot=1\nATTEND slot=1 tokens=9 spans=1 line=12 line2=24\n"
    for second in ("TRANSPOSE slot=1 first=1", "READ slot=1 line=25", "READ slot=1 form=channels line=32",
                   "ATTEND slot=1 tokens=9 line=12 line2=25", "ATTEND slot=1 tokens=9 line=23 line2=25"):  # fmt: skip
        run(first + second, meaning.blank_image(P))
    # Without an estimate no channel-indexed page is read.
    run(first.replace("k=1", "k=9") + "TRANSPOSE slot=1", meaning.blank_image(P))


def test_results_over_queries_are_refused():
    refused(
        f"{WRITTEN}ATTEND slot=1 tokens=5 line=20 line2=20",
        "writes vectors that ATTEND reads meanwhile, from 20",
    )


def test_arrays_of_another_shape_are_refused(image):
    with pytest.raises(ValueError, match=r"image: sums must be uint32 of shape .4, 16., not "):
        run("GPU", image | {"sums": np.zeros(3, np.uint32)})
    del image["cells"]
    with pytest.raises(ValueError, match=r"image: cells must be .* not nothing"):
        run("GPU", image)
