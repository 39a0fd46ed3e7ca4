"""Run programs on the RTL under Verilator, and bring back what the cycle model also says."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np

from tilewright.arch import pim as arch
from tilewright.arch.timeline import SPAN, Timeline, fold_spans
from tilewright.rtl import pim
from tilewright.rtl.cosim.cases import Case, Outcome
from tilewright.rtl.cosim.simulator import Build, Job, build, run
from tilewright.rtl.cosim.verilog import to_verilog
from tilewright.rtl.lib.memory import MODEL


def build_rtl(
    spec: arch.PimSpec, *, depth: int = pim.CODE_DEPTH, trace_depth: int = 0, waves: bool = False
) -> Build:
    """The simulator for the structure of `spec`: built once for all timings, cached by content.

    `trace_depth` is the number of DRAM commands that it logs of each channel.
    """
    verilog = to_verilog(pim.top(spec, depth=depth, trace_depth=trace_depth))
    return build(verilog, top="top", extra_sources=[MODEL], waves=waves)


def run_cases(
    simulator: Build,
    cases: Sequence[Case],
    *,
    depth: int = pim.CODE_DEPTH,
    trace_depth: int = 0,
    waves: Path | None = None,
    slack: int = 0,
) -> list[Outcome]:
    """Run cases of one structure, each from its own image, in one simulator process.

    `depth` and `trace_depth` are those of the build; a Timeline has a trace if it has logs. `slack` is added
    to the ticks after which a run counts as hung. Raises ValueError for a program longer
    than `depth`.
    """
    jobs = [_job(case, depth, trace_depth, 200_000 + slack) for case in cases]
    return [
        _outcome(case, depth, trace_depth, result)
        for case, result in zip(cases, run(simulator, jobs, waves=waves), strict=True)
    ]


def _arrays(p: arch.PimParams) -> list[tuple[int, int, str]]:
    return [
        (c, b, f"top.channel_{c}.bank_{b}.array.cells.mem")
        for c in range(p.channels)
        for b in range(p.n_banks)
    ]


def _columns(elements: np.ndarray, lanes: int) -> np.ndarray:
    """bfloat16 bit patterns uint16[n * lanes] as bytes uint8[n, 2 * lanes], lowest lane first."""
    return np.ascontiguousarray(elements.astype("<u2")).view(np.uint8).reshape(-1, 2 * lanes)


def _words(elements: np.ndarray, lanes: int) -> list[int]:
    return [int.from_bytes(row.tobytes(), "little") for row in _columns(elements, lanes)]


def _job(case: Case, depth: int, trace_depth: int, max_ticks: int) -> Job:
    p = case.params
    code = case.program.flat()
    if len(code) > depth:
        raise ValueError(f"the RTL's code memory holds {depth} instructions, not {len(code)}")
    layout = arch.hostmap(p, depth, trace_depth)
    encoded = [
        int.from_bytes(w.astype("<u4").tobytes(), "little") for w in arch.ISA.record("code").encode(code)
    ]
    best = (int(case.image["argmax"][0]), int(case.image["argmax"][1]))
    registers = np.array(arch.register_values(p, len(code), best), np.int64)
    writes = [
        (layout.base("registers"), layout.pack("registers", registers)),
        (layout.base("code"), layout.pack("code", encoded)),
        (layout.base("sram"), layout.pack("sram", _words(case.image["sram"], p.lanes))),
    ]
    logs = [f"trace_{c}" for c in range(p.channels)] if trace_depth else []
    reads = [(layout.base(name), layout[name].words) for name in ("status", "log", "sram", *logs)]
    for c in range(p.channels):
        name = f"gb_{c}"
        writes.append((layout.base(name), layout.pack(name, _words(case.image["gb"][c], p.lanes))))
        reads.append((layout.base(name), layout[name].words))
    loads = [(path, 0, _columns(case.image["dram"][c, b], p.lanes)) for c, b, path in _arrays(p)]
    dumps = [(path, 0, p.rows * p.columns) for _, _, path in _arrays(p)]
    return Job(writes=writes, loads=loads, reads=reads, dumps=dumps, max_ticks=max_ticks)


def _elements(values: np.ndarray, lanes: int) -> np.ndarray:
    raw = b"".join(int(v).to_bytes(2 * lanes, "little") for v in values)
    return np.frombuffer(raw, "<u2").astype(np.uint16)


def _outcome(case: Case, depth: int, trace_depth: int, result) -> Outcome:
    if result.error:
        return Outcome(None, {}, result.error)
    p = case.params
    layout = arch.hostmap(p, depth, trace_depth)
    status_words, log_words, sram_words, *rest = result.reads
    trace_words, gb_words = rest[: -p.channels], rest[-p.channels :]
    status = dict(zip(arch.status_names(p), layout.unpack("status", status_words), strict=True))
    code = case.program.flat()
    log = layout.unpack("log", log_words)[: len(code)]
    firsts = (log & np.uint64(0xFFFFFFFF)).astype(np.int64)
    ends = (log >> np.uint64(32)).astype(np.int64)
    dram = np.zeros((p.channels, p.n_banks, p.rows * p.columns * p.lanes), np.uint16)
    for (c, b, _), data in zip(_arrays(p), result.dumps, strict=True):
        dram[c, b] = np.ascontiguousarray(data).view("<u2").reshape(-1)
    acc = [[status[f"acc {c}.{b}"] for b in range(p.n_banks)] for c in range(p.channels)]
    image = {
        "dram": dram,
        "sram": _elements(layout.unpack("sram", sram_words), p.lanes),
        "gb": np.stack([_elements(layout.unpack(f"gb_{c}", w), p.lanes) for c, w in enumerate(gb_words)]),
        "acc": np.array(acc, np.uint32),
        "argmax": np.array([int(status[f"argmax_{part}"]) for part in ("value", "index")], np.int64),
    }
    timeline = _timeline(case, status, code["tag"], firsts, ends)
    if trace_depth:
        logs = [layout.unpack(f"trace_{c}", words) for c, words in enumerate(trace_words)]
        timeline = replace(timeline, trace=_trace(p, status, logs))
    return Outcome(timeline, image)


def _trace(p: arch.PimParams, status: Mapping[str, int], logs: Sequence[np.ndarray]) -> np.ndarray:
    """The logs of the channels as Timeline.trace has it."""
    channels = []
    for c, log in enumerate(logs):
        commands = arch.COUNTERS[: p.dram.n_commands]
        used = log[: sum(int(status[f"channel {c}.{name}"]) for name in commands)]
        rows = np.zeros((len(used), 5), np.int64)
        rows[:, 1] = c
        shift = 0
        for column, bits in zip((0, 2, 3, 4), arch.TRACE_FIELDS.values(), strict=True):
            rows[:, column] = (used >> np.uint64(shift)) & np.uint64((1 << bits) - 1)
            shift += bits
        channels.append(rows)
    return arch.addressed(np.concatenate(channels))


def _timeline(
    case: Case, status: Mapping[str, int], tags: np.ndarray, firsts: np.ndarray, ends: np.ndarray
) -> Timeline:
    p = case.params
    units = ("sequencer", "asic", *(f"channel {c}" for c in range(p.channels)))
    n_tags = max(len(case.program.tags), int(tags.max(initial=-1)) + 1)
    # Counters and stalls are of the whole run: they belong to no tag.
    names = (*arch.COUNTERS, *arch.ASIC_COUNTERS)
    counters = np.zeros((n_tags + 1, len(names)), np.int64)
    activity = np.zeros((n_tags + 1, len(units), 1 + len(arch.CAUSES)), np.int64)
    for k, name in enumerate(arch.COUNTERS):
        counters[-1, k] = sum(int(status[f"channel {c}.{name}"]) for c in range(p.channels))
    for k, name in enumerate(arch.ASIC_COUNTERS, len(arch.COUNTERS)):
        counters[-1, k] = int(status[name])
    for u, unit in enumerate(units):
        activity[-1, u] = [int(status[f"{unit}.{cause}"]) for cause in ("busy", *arch.CAUSES)]
    return Timeline(
        ticks=int(status["ticks"]),
        tags=[*case.program.tags, *(f"tag {i}" for i in range(len(case.program.tags), n_tags))],
        spans=fold_spans(tags, firsts, ends, 0) if len(tags) else np.zeros(0, SPAN),
        counter_names=names,
        counters=counters,
        units=units,
        causes=arch.CAUSES,
        activity=activity,
    )
