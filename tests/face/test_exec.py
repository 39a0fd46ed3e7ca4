"""`exec` and `rtl`: programs from assembler files, images, and the comparison of RTL and model."""

import json

import numpy as np
import pytest

from tests.face.invoke import refused, tilewright
from tilewright import execute
from tilewright.arch import registry
from tilewright.workloads.pim import blank_image

SMALL = ["--set", "channels=1", "--set", "dram.rows=8"]
TINY = [  # a machine whose Verilog is made in seconds
    "channels=1", "dram.rows=8", "dram.row_bytes=16", "dram.column_bytes=4", "pim.lanes=2", "dram.bankgroups=1",
    "dram.banks_per_group=2", "pim.global_buffer_bytes=16", "asic.sram_bytes=64",
    "asic.adders=4", "asic.multipliers=2",
]  # fmt: skip
PROGRAM = """\
WR_GB channels=1 cols=2 tag=load
MAC_AB channels=1 cols=2 tag=multiply  # two columns from row 0
RD_MAC channels=1 dst=8 tag=read
"""


@pytest.fixture
def program(tmp_path):
    path = tmp_path / "p.asm"
    path.write_text(PROGRAM)
    return path


@pytest.fixture
def image(tmp_path):
    """SRAM columns 0 and 1 hold 1, 2, 3, ... and every bank's first two columns hold 2."""
    params = registry.load_spec("pim-gpt", ["channels=1", "dram.rows=8"]).params()
    full = blank_image(params)
    dram, sram = full["dram"], full["sram"]
    sram[: 2 * params.lanes] = bf16(np.arange(1, 2 * params.lanes + 1))
    dram[:, :, : 2 * params.lanes] = bf16(np.full(2 * params.lanes, 2))
    path = tmp_path / "image.npz"
    np.savez(path, dram=dram, sram=sram)
    return path


def bf16(values):
    return (np.asarray(values, np.float32).view(np.uint32) >> 16).astype(np.uint16)


def test_ticks_are_reported(program):
    ran = tilewright("exec", "pim-gpt", program)
    assert ran.code == 0
    for word in ("load", "multiply", "read", "sequencer", "mac_all", "ticks"):
        assert word in ran.out
    document = json.loads(tilewright("exec", "pim-gpt", program, "--json", "-").out)
    assert document["engine"] == "sim" and document["equal"] is None and document["values"] is None
    assert document["counters"]["mac_all"] == 2
    assert [s["name"] for s in document["spans"]] == ["load", "multiply", "read"]
    # One fetch more finds the end of the program: a tick, or two where the ASIC's clock is not due.
    assert document["cycles"] - sum(s["cycles"] for s in document["spans"]) in (1, 2)


def test_values_by_hand(program, image, tmp_path):
    dump = tmp_path / "after.npz"
    ran = tilewright("exec", "pim-gpt", program, *SMALL, "--image", image, "--values", "--dump", dump)
    assert ran.code == 0, ran.err
    # 2 * (1 + ... + 32) = 1056 in every bank, a bfloat16 (33 * 2**5).
    with np.load(dump) as after:
        assert (after["sram"][8 * 16 : 9 * 16] == bf16([1056])).all()
        assert not after["acc"].any()
    assert "4484" in f"{int(bf16([1056])[0]):04x}" and "sha256" in ran.out


def test_what_an_image_leaves_out_is_zero(program, tmp_path):
    path = tmp_path / "image.npz"
    np.savez(path)
    ran = tilewright("exec", "pim-gpt", program, *SMALL, "--image", path, "--values", "--json", "-")
    assert all(a["changed"] == 0 for a in json.loads(ran.out)["values"].values())


@pytest.mark.parametrize(
    ("arrays", "words"),
    [
        ({"drm": np.zeros(1)}, "unknown array 'drm': did you mean dram?"),
        ({"argmax": np.zeros(3, np.int64)}, "argmax must be int64 of shape (2,), not int64 of (3,)"),
        ({"argmax": np.zeros(2, np.int32)}, "argmax must be int64 of shape (2,), not int32 of (2,)"),
        ({"argmax": np.array([{}, {}])}, "not an .npz file of plain arrays"),
    ],
)
def test_an_image_that_does_not_fit(program, tmp_path, arrays, words):
    path = tmp_path / "image.npz"
    np.savez(path, **arrays)
    assert words in refused("exec", "pim-gpt", program, *SMALL, "--image", path, "--values")


@pytest.mark.parametrize("content", [b"", b"PK\x03\x04 broken", b"plain text", b"\x93NUMPY\x01\x00"])
def test_an_image_that_is_none(program, tmp_path, content):
    path = tmp_path / "image.npz"
    path.write_bytes(content)
    message = refused("exec", "pim-gpt", program, *SMALL, "--image", path)
    assert str(path) in message
    assert "cannot read image" in refused("exec", "pim-gpt", program, *SMALL, "--image", tmp_path)


def test_a_full_size_image_is_not_allocated(program):
    assert "takes 4 GiB" in refused("exec", "pim-gpt", program, "--values")
    large = "--set", "dram.rows=65536", "--set", "dram.row_bytes=65536", "--set", "channels=32"
    assert "too large" in refused("exec", "pim-gpt", program, "--values", *large)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("MAC_ABC channels=1\n", "p.asm:1: unknown instruction 'MAC_ABC': did you mean MAC_AB?"),
        ("\nMAC_AB chanels=1\n", "p.asm:2: MAC_AB has no field 'chanels': did you mean channels?"),
        ("MAC_AB channels=two\n", "p.asm:1: channels must be an integer"),
        ("MAC_AB row=99999999\n", "p.asm:1: row must be in 0..65535, not 99999999"),
        ("MAC_AB row\n", "p.asm:1: expected field=value"),
        ("# nothing\n", "holds no instructions"),
        ("MAC_AB channels=0\n", "p.asm: segment 0, instruction 0 (MAC_AB): channels must"),
        ("MAC_AB channels=2 tag=x\n", "p.asm: segment 0, instruction 0 (MAC_AB): channels must name"),
        ("MAC_AB channels=1 row=8\n", "p.asm: segment 0, instruction 0 (MAC_AB): row"),
    ],
)
def test_a_bad_program(tmp_path, text, words):
    path = tmp_path / "p.asm"
    path.write_text(text)
    assert words in refused("exec", "pim-gpt", path, *SMALL)


def test_waves_need_signals(program):
    assert "--engine rtl" in refused("exec", "pim-gpt", program, "--waves", "w.vcd")


def test_verilog_of_one_channel(tmp_path):
    path = tmp_path / "machine.v"
    sets = [word for text in TINY if not text.startswith("channels") for word in ("--set", text)]
    ran = tilewright("rtl", "pim-gpt", *sets, "-o", path)
    assert ran.code == 0 and ran.out == ""
    assert "one channel of 8" in ran.err
    text = path.read_text()
    first, second, *_ = text.splitlines()
    assert first == "// pim-gpt, one channel of 8 (target pim)"
    digest = json.loads(tilewright("show", "pim-gpt", *sets, "--json").out)["spec_hash"]
    assert second == f"// spec {digest}"
    assert "module top(" in text and "endmodule" in text


# ---- comparing RTL and model --------------------------------------------------------------------------


@pytest.fixture
def case(program):
    spec = registry.load_spec("pim-gpt", ["channels=1", "dram.rows=8"])
    assembled = execute.assemble(spec, str(program))
    timeline = registry.room("sim", "pim").simulate(spec.params(), assembled)
    return spec, timeline, execute.load_image(spec, None)


def test_equal_runs_have_no_differences(case):
    _, timeline, image = case
    assert execute.differing_ticks(timeline, timeline) == []
    assert execute.differing_values(image, image) == []


def test_a_flipped_bit_is_found(case):
    _, _, image = case
    other = image | {"acc": image["acc"].copy()}
    other["acc"][0, 3] = 1
    (line,) = execute.differing_values(image, other)
    assert "1 of 16 elements of acc differ, the first at [0, 3]: 0x1 in the RTL, 0x0" in line


def test_a_moved_tick_is_found(case):
    from dataclasses import replace

    _, timeline, _ = case
    spans, counters, activity = timeline.spans.copy(), timeline.counters.copy(), timeline.activity.copy()
    spans["end"][1] += 1
    counters[0, 6] += 1
    activity[0, 0, 0] += 1
    activity[0, 0, 1] -= 1
    other = replace(timeline, spans=spans, counters=counters, activity=activity)
    text = "\n".join(execute.differing_ticks(timeline, other))
    assert "ticks of tag multiply" in text and "counter mac_all" in text and "sequencer, busy" in text


@pytest.mark.cosim
def test_rtl_equals_model_and_interpreter(program, tmp_path):
    sets = [word for text in TINY for word in ("--set", text)]
    program.write_text(
        "WR_GB channels=1 cols=2 tag=load\n"
        "GEMV channels=1 cols=2 outs=2 pitch=1 dst=4\n"
        "SILU dst=8 src=4 n=3\n"
    )
    rng = np.random.default_rng(1)
    blank = blank_image(registry.load_spec("pim-gpt", TINY).params())
    image = {n: rng.integers(0, 1 << 16, blank[n].shape, np.uint16) for n in ("dram", "sram")}
    path, dump = tmp_path / "image.npz", tmp_path / "after.npz"
    np.savez(path, **image)
    ran = tilewright("exec", "pim-gpt", program, *sets, "--engine", "rtl", "--values", "--image", path,
                     "--dump", dump)  # fmt: skip
    assert ran.code == 0, ran
    assert "RTL equals interpreter (bits) and cycle model" in " ".join(ran.out.split())
    with np.load(dump) as after:
        changed = after["sram"] != image["sram"]
        assert changed[8:12].any() and changed[16:19].any() and not changed[19:].any()
