"""A bench for combinational units: operands in, results out, through Verilator and a plain C++ main."""

import hashlib
import shutil
import subprocess
import tempfile

import numpy as np

from tilewright.rtl.cosim.simulator import cache_root, prepare_simulator
from tilewright.rtl.cosim.verilog import to_verilog

_MAIN = """
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


def build(component, outputs):
    """The program that evaluates a component with 32-bit ports a and b, and ports named as in `outputs`."""
    tools = prepare_simulator()
    verilog = to_verilog(component)
    main = _MAIN.replace("OUTPUTS", ", ".join(f"top.{name}" for name in outputs))
    digest = hashlib.sha256("\0".join([verilog, main, *tools.versions]).encode()).hexdigest()[:24]
    program = cache_root() / "vectors" / digest
    if not program.exists():
        program.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=program.parent) as folder:
            work = program.parent / folder
            (work / "top.v").write_text(verilog)
            (work / "main.cpp").write_text(main)
            for command in (
                ["verilator", "--cc", "--exe", "-Wno-fatal", "--top-module", "top", "main.cpp", "top.v"],
                ["make", "-C", "obj_dir", "-f", "Vtop.mk", *tools.make_variables],
            ):
                done = subprocess.run(
                    command, check=False, cwd=work, env=tools.env, capture_output=True, text=True
                )
                assert done.returncode == 0, done.stdout + done.stderr
            shutil.move(work / "obj_dir" / "Vtop", program)
    return program


def evaluate(program, outputs, a, b):
    """The outputs, by name, as uint32 arrays, for arrays of operands."""
    operands = np.stack([np.asarray(a, "<u4"), np.asarray(b, "<u4")], axis=-1)
    done = subprocess.run([program], input=operands.tobytes(), capture_output=True, check=True)
    results = np.frombuffer(done.stdout, "<u4").reshape(len(operands), len(outputs))
    return dict(zip(outputs, results.T, strict=True))
