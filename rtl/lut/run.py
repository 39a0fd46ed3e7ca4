"""Run programs on the RTL under Verilator, and bring back what the cycle model also says."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tilewright.arch import lut as arch
from tilewright.arch.timeline import SPAN, Timeline, fold_spans
from tilewright.rtl import lut
from tilewright.rtl.cosim.cases import Case, Image, Outcome
from tilewright.rtl.cosim.simulator import Build, Job, build, run
from tilewright.rtl.cosim.verilog import to_verilog
from tilewright.rtl.lib.memory import MODEL


def build_rtl(spec: arch.LutSpec, *, depth: int = lut.CODE_DEPTH, waves: bool = False) -> Build:
    """The simulator for the structure of `spec`: built once for all timings, cached by content."""
    return build(to_verilog(lut.top(spec, depth=depth)), top="top", extra_sources=[MODEL], waves=waves)


def run_cases(
    simulator: Build,
    cases: Sequence[Case],
    *,
    depth: int = lut.CODE_DEPTH,
    waves: Path | None = None,
    slack: int = 0,
) -> list[Outcome]:
    """Run cases of one structure, each from its own image, in one simulator process.

    `depth` is that of the build. `slack` is added to the ticks after which a run counts as hung. Raises
    ValueError for a program longer than `depth`, one that reaches outside the machine, and one with work of the
    ordinary units, which the RTL does not have.
    """
    jobs = [_job(case, depth, 200_000 + slack) for case in cases]
    return [
        _outcome(case, depth, result)
        for case, result in zip(cases, run(simulator, jobs, waves=waves), strict=True)
    ]


# ---- memory images ------------------------------------------------------------------------------------


def pack(values: np.ndarray, bits: int) -> np.ndarray:
    """Integers [words, elements] as words of `bits` each, element 0 in the lowest bits: uint8 [words, bytes]."""
    places = (values.astype(np.int64)[..., None] >> np.arange(bits)) & 1
    flat = places.reshape(len(values), -1).astype(np.uint8)
    return np.packbits(flat, axis=1, bitorder="little")


def unpack(words: np.ndarray, elements: int, bits: int, signed: bool = False) -> np.ndarray:
    """The inverse of `pack`: int64 [words, elements]; bits behind the last element are left out."""
    flat = np.unpackbits(np.ascontiguousarray(words), axis=1, bitorder="little")[:, : elements * bits]
    values = (flat.reshape(len(words), elements, bits).astype(np.int64) << np.arange(bits)).sum(axis=2)
    return values - ((values >> (bits - 1)) << bits) if signed else values


def _memories(p: arch.LutParams, image: Image) -> dict[str, np.ndarray]:
    """The words of every black box of the top that the image stands for, uint8 [words, bytes]."""
    rows = 2 * p.table_rows
    tables = pack(image["tables"].reshape(rows, -1), p.entry_bits)
    if "scales" in image:
        tables = np.concatenate([tables, pack(image["scales"].reshape(rows, -1), 32)], axis=1)
    results = [pack(image["results"][half].reshape(p.result_tiles, -1), p.acc_bits) for half in range(2)]
    return {
        "memory": image["memory"],
        "table_buffer": tables,
        "weight_buffer": image["weights"].reshape(-1, p.line_bits // 8),
        "result_buffer_0": results[0],
        "result_buffer_1": results[1],
    }


def _image(p: arch.LutParams, before: Image, words: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The image that the words of the black boxes stand for."""
    entries = p.rows * p.entries
    kinds = before["tables"].dtype.kind
    tables = unpack(words["table_buffer"], entries, p.entry_bits, signed=kinds == "i")
    out = {
        "memory": words["memory"],
        "tables": tables.reshape(before["tables"].shape).astype(before["tables"].dtype),
        "weights": words["weight_buffer"].reshape(before["weights"].shape),
    }
    results = [unpack(words[f"result_buffer_{half}"], p.rows * p.n, p.acc_bits) for half in range(2)]
    out["results"] = np.stack(results).reshape(before["results"].shape).astype(np.uint32)
    if "scales" in before:
        scales = unpack(words["table_buffer"][:, entries:], p.rows, 32)  # an entry is a byte
        out["scales"] = scales.reshape(before["scales"].shape).astype(np.uint32)
    return out


# ---- jobs ---------------------------------------------------------------------------------------------


def _job(case: Case, depth: int, max_ticks: int) -> Job:
    p = case.params
    code = case.program.flat()
    if len(code) > depth:
        raise ValueError(f"the RTL's code memory holds {depth} instructions, not {len(code)}")
    arch.check(p, code)
    ordinary = np.flatnonzero(code["op"] == arch.OP["ORDINARY"])
    if len(ordinary):
        raise ValueError(f"instruction {ordinary[0]} (ORDINARY): the RTL has no ordinary units")
    layout = arch.hostmap(p, depth)
    encoded = [
        int.from_bytes(w.astype("<u4").tobytes(), "little") for w in arch.ISA.record("code").encode(code)
    ]
    registers = np.array(arch.register_values(p, len(code)), np.int64)
    words = _memories(p, case.image)
    return Job(
        writes=[
            (layout.base("registers"), layout.pack("registers", registers)),
            (layout.base("code"), layout.pack("code", encoded)),
        ],
        loads=[(f"top.{name}.cells.mem", 0, rows) for name, rows in words.items()],
        reads=[(layout.base(name), layout[name].words) for name in ("status", "log")],
        dumps=[(f"top.{name}.cells.mem", 0, len(rows)) for name, rows in words.items()],
        max_ticks=max_ticks,
    )


def _outcome(case: Case, depth: int, result) -> Outcome:
    if result.error:
        return Outcome(None, {}, result.error)
    p = case.params
    layout = arch.hostmap(p, depth)
    status_words, log_words = result.reads
    status = dict(zip(arch.status_names(), layout.unpack("status", status_words), strict=True))
    code = case.program.flat()
    log = layout.unpack("log", log_words)[: len(code)]
    firsts = (log & np.uint64(0xFFFFFFFF)).astype(np.int64)
    ends = (log >> np.uint64(32)).astype(np.int64)
    names = ("memory", "table_buffer", "weight_buffer", "result_buffer_0", "result_buffer_1")
    image = _image(p, case.image, dict(zip(names, result.dumps, strict=True)))
    return Outcome(_timeline(case, status, code["tag"], firsts, ends), image)


def _timeline(
    case: Case, status: Mapping[str, int], tags: np.ndarray, firsts: np.ndarray, ends: np.ndarray
) -> Timeline:
    n_tags = max(len(case.program.tags), int(tags.max(initial=-1)) + 1)
    # Counters and stalls are of the whole run: they belong to no tag.
    counters = np.zeros((n_tags + 1, len(arch.COUNTERS)), np.int64)
    activity = np.zeros((n_tags + 1, len(arch.RTL_UNITS), 1 + len(arch.CAUSES)), np.int64)
    counters[-1] = [int(status[name]) for name in arch.COUNTERS]
    for u, unit in enumerate(arch.RTL_UNITS):
        activity[-1, u] = [int(status[f"{unit}.{cause}"]) for cause in ("busy", *arch.CAUSES)]
    return Timeline(
        ticks=int(status["ticks"]),
        tags=[*case.program.tags, *(f"tag {i}" for i in range(len(case.program.tags), n_tags))],
        spans=fold_spans(tags, firsts, ends, 0) if len(tags) else np.zeros(0, SPAN),
        counter_names=arch.COUNTERS,
        counters=counters,
        units=arch.RTL_UNITS,
        causes=arch.CAUSES,
        activity=activity,
        waiting=arch.WAITING,
    )
