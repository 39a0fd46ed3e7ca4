# amaranth: UnusedElaboratable=no
# (some of these constructors raise)

"""The SRAM and the black box make the same claims; the black box needs Verilator, as its model is Verilog."""

import subprocess

import numpy as np
import pytest

from tests.lib import vectors
from tests.lib.ticks import play
from tilewright.rtl.lib.memory import MODEL, BlackBoxMemory
from tilewright.rtl.lib.sram import Sram

INPUTS = ("read_enable", "read_address", "write_enable", "write_address", "write_data")

# One line of stdin a tick; `load` names a file. A line of stdout a tick: the read data before its clock edge.
MAIN = """
#include "Vtop.h"
#include "Vtop___024root.h"
#include "verilated.h"
#include <cstdio>
#include <cstring>

double sc_time_stamp() { return 0; }

int main() {
    Vtop top;
    top.rst = 0;
    top.clk = 0;
    top.eval();  // initial blocks
    char line[1024];
    while (fgets(line, sizeof line, stdin)) {
        line[strcspn(line, "\\n")] = 0;
        if (!strncmp(line, "load ", 5)) {
            // A string in Verilog ends at its lowest byte.
            auto& path = top.rootp->top__DOT__cells__DOT__load_path;
            for (size_t n = strlen(line + 5), k = 0; k < n; k++)
                path[k / 4] |= static_cast<EData>(line[5 + n - 1 - k]) << 8 * (k % 4);
            top.rootp->top__DOT__cells__DOT__load = 1;
            top.eval();
            top.rootp->top__DOT__cells__DOT__load = 0;
            top.eval();
            continue;
        }
        unsigned in[5];
        sscanf(line, "%u %u %u %u %u", in, in + 1, in + 2, in + 3, in + 4);
        top.read_enable = in[0];
        top.read_address = in[1];
        top.write_enable = in[2];
        top.write_address = in[3];
        top.write_data = in[4];
        top.clk = 0;
        top.eval();
        printf("%u\\n", static_cast<unsigned>(top.read_data));
        fflush(stdout);
        top.clk = 1;
        top.eval();
    }
}
"""


def play_sram(shape, rows):
    seen = play(Sram(**shape), len(rows), lambda t, _: dict(zip(INPUTS, rows[t], strict=True)), ["read_data"])
    return [s["read_data"] for s in seen]


def run_black_box(shape, rows, load=None):
    program = vectors.build(BlackBoxMemory(**shape), MAIN, sources=[MODEL], options=["--public-flat-rw"])
    lines = [f"load {load}"] * (load is not None) + [" ".join(str(int(v)) for v in row) for row in rows]
    return subprocess.run(
        [program], input="\n".join(lines) + "\n", capture_output=True, text=True, check=False
    )


def play_black_box(shape, rows, load=None):
    done = run_black_box(shape, rows, load)
    assert done.returncode == 0, done.stdout + done.stderr
    return [int(line) for line in done.stdout.split()]


KINDS = pytest.mark.parametrize("run", [play_sram, pytest.param(play_black_box, marks=pytest.mark.cosim)])


@KINDS
def test_a_read_takes_a_tick_keeps_its_data_and_finds_what_was_there_before_a_write(run):
    rows = [
        (1, 3, 1, 3, 0xAB),  # read 3 while it is written: the old data, 0
        (1, 3, 0, 0, 0),  # read 3 again
        (0, 0, 1, 3, 0xCD),  # no read: the data stay
        (0, 0, 0, 0, 0),
        (1, 3, 0, 0, 0),
        (0, 0, 0, 0, 0),
    ]
    assert run({"width": 8, "depth": 8}, rows) == [0, 0, 0xAB, 0xAB, 0xAB, 0xCD]


@KINDS
@pytest.mark.parametrize("shape", [{"width": 12, "depth": 5, "granularity": 4}, {"width": 32, "depth": 8}])
def test_against_an_array(run, shape):
    width, depth = shape["width"], shape["depth"]
    lane = shape.get("granularity", width)
    rng = np.random.default_rng(width)
    rows = rng.integers([2, depth, 1 << width // lane, depth, 1 << width], size=(1000, 5), dtype=np.uint64)
    memory, data, expected = [0] * depth, 0, []
    for read, source, lanes, target, value in rows.tolist():
        expected.append(data)
        if read:
            data = memory[source]
        mask = sum((1 << lane) - 1 << k * lane for k in range(width // lane) if lanes >> k & 1)
        memory[target] = memory[target] & ~mask | value & mask
    assert run(shape, rows) == expected


@pytest.mark.cosim
def test_the_black_box_reads_a_file(tmp_path):
    file = tmp_path / "words.hex"
    file.write_text("11\n22\n@4\n55\n")
    rows = [(1, address, 0, 0, 0) for address in (0, 1, 2, 4, 0)]
    assert play_black_box({"width": 8, "depth": 8}, rows, load=file) == [0, 0x11, 0x22, 0, 0x55]


@pytest.mark.parametrize("port", ["read", "write"])
def test_an_access_beyond_the_memory_fails(port):
    inputs = {f"{port}_enable": 1, f"{port}_address": 5}
    with pytest.raises(AssertionError, match=f"{port} beyond the memory"):
        play(Sram(width=8, depth=5), 2, lambda t, _: inputs, ["read_data"])


@pytest.mark.cosim
def test_an_access_beyond_the_black_box_fails():
    done = run_black_box({"width": 12, "depth": 5, "granularity": 4}, [(1, 5, 0, 0, 0)] * 2)
    assert done.returncode != 0
    assert "read beyond the memory" in done.stdout + done.stderr


@pytest.mark.parametrize("kind", [Sram, BlackBoxMemory])
def test_shapes_that_are_refused(kind):
    with pytest.raises(ValueError, match=r"^depth must be at least 1, not 0$"):
        kind(width=8, depth=0)
    with pytest.raises(ValueError, match=r"^granularity must divide width 8, not 3$"):
        kind(width=8, depth=4, granularity=3)


def test_an_sram_has_at_most_64_kibibytes():
    Sram(width=32, depth=16384)
    with pytest.raises(
        ValueError, match=r"^an Sram must not exceed 65536 bytes, not 16385 words of 32 bits$"
    ):
        Sram(width=32, depth=16385)
