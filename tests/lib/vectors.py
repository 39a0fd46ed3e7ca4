"""A bench for single units: Verilator and a plain C++ main that reads stimuli and writes results."""

import hashlib
import shutil
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from tilewright.rtl.cosim.simulator import cache_root, prepare_simulator
from tilewright.rtl.cosim.verilog import to_verilog

_COMBINATIONAL = """
#include "Vtop.h"
#include "verilated.h"
#include <cstdint>
#include <cstdio>

double sc_time_stamp() { return 0; }

int main() {
    Vtop top;
    uint32_t in[2];
    while (fread(in, 4, 2, stdin) == 2) {
        top.a = in[0];
        top.b = in[1];
        top.eval();
        const uint32_t out[] = {OUTPUTS};
        fwrite(out, sizeof out, 1, stdout);
    }
}
"""


def build(component, main, *, sources=(), options=()):
    """The program that a C++ main and a component make; the component's Verilator class is `Vtop`.

    `sources` are further Verilog files, `options` go to Verilator. Assertions of the design are checked.
    """
    tools = prepare_simulator()
    files = {path.name: path.read_text() for path in map(Path, sources)}
    files |= {"top.v": to_verilog(component), "main.cpp": main}
    verilate = [
        "verilator",
        "--cc",
        "--exe",
        "--assert",
        "-Wno-fatal",
        "--top-module",
        "top",
        *options,
        *files,
    ]
    compile_ = ["make", "-C", "obj_dir", "-f", "Vtop.mk", *tools.make_variables]
    digest = hashlib.sha256(repr([files, verilate, compile_, tools.versions]).encode()).hexdigest()[:24]
    program = cache_root() / "vectors" / digest
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=program.parent) as folder:
            for name, text in files.items():
                Path(folder, name).write_text(text)
            for command in (verilate, compile_):
                done = subprocess.run(
                    command, check=False, cwd=folder, env=tools.env, capture_output=True, text=True
                )
                assert done.returncode == 0, done.stdout + done.stderr
            shutil.move(Path(folder, "obj_dir", "Vtop"), program)
    return program


def build_combinational(component, outputs):
    """The program for a component with 32-bit ports a and b, and the named outputs of up to 32 bits."""
    return build(component, _COMBINATIONAL.replace("OUTPUTS", ", ".join(f"top.{name}" for name in outputs)))


def evaluate(program, outputs, a, b):
    """The outputs, by name, as uint32 arrays, for arrays of operands."""
    operands = np.stack([np.asarray(a, "<u4"), np.asarray(b, "<u4")], axis=-1)
    done = subprocess.run([program], input=operands.tobytes(), capture_output=True, check=True)
    results = np.frombuffer(done.stdout, "<u4").reshape(len(operands), len(outputs))
    return dict(zip(outputs, results.T, strict=True))
