"""Amaranth to Verilog: RTLIL from Amaranth, Verilog from Yosys."""

import importlib.util
import subprocess
import sys
import tempfile
from pathlib import Path

from amaranth.back import rtlil

from tilewright.arch.errors import UserError
from tilewright.rtl.lib.share import ModuleLibrary

# An error inside Yosys ends the whole Python process, so it gets one of its own.
_WORKER = """
import sys
from pyosys import libyosys
design = libyosys.Design()
for command in sys.argv[1:]:
    libyosys.run_pass(command, design)
"""


def to_verilog(component, name="top", *, limit_s=120.0):
    """The Verilog of an Amaranth component, as text.

    Raises UserError when Yosys is not installed or needs more than `limit_s` seconds, RuntimeError with
    Yosys' own message when it refuses the design.
    """
    if importlib.util.find_spec("pyosys") is None:
        raise UserError("Verilog needs pyosys, which is not installed: pip install tilewright[rtl]")
    library = ModuleLibrary()
    text = rtlil.convert(component, name=name, platform=library, emit_src=False)
    text = "\n".join([text, *library.modules()])
    with tempfile.TemporaryDirectory(prefix="tilewright-verilog-") as folder:
        Path(folder, "top.il").write_text(text)
        passes = [
            "read_rtlil top.il",
            "proc -nomux -norom",
            "memory_collect",
            "write_verilog -norename top.v",
        ]
        try:
            done = subprocess.run(
                [sys.executable, "-c", _WORKER, *passes],
                check=False,
                cwd=folder,
                capture_output=True,
                text=True,
                errors="replace",
                timeout=limit_s,
            )
        except subprocess.TimeoutExpired:
            raise UserError(f"Verilog of {name}: Yosys did not finish within {limit_s:g} s") from None
        if done.returncode:
            tail = "\n".join((done.stdout + done.stderr).strip().splitlines()[-10:])
            raise RuntimeError(f"Yosys refused {name} (exit code {done.returncode}):\n{tail}")
        return Path(folder, "top.v").read_text()
