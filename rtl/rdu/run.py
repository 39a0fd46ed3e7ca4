"""Run programs on the RTL under Verilator, and bring back what the cycle model also says."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tilewright.arch import rdu as arch
from tilewright.arch import rdu_host as host
from tilewright.arch.errors import UserError
from tilewright.arch.timeline import SPAN, Timeline, fold_spans
from tilewright.rtl import rdu
from tilewright.rtl.cosim.cases import Case, Image, Outcome
from tilewright.rtl.cosim.simulator import Build, Job, build, run
from tilewright.rtl.cosim.verilog import to_verilog
from tilewright.rtl.lib.memory import MODEL
from tilewright.rtl.rdu.lines import MODEL as LINES_MODEL

COPIED = ("hbm", "ddr")  # between which the DMA copies
FEW_POSITIONS = 16  # of a grid whose parts are compiled with it
BLOCKS = (
    "PcuTile",
    "AgcuTile",
    "Switch",
)  # those of a larger one that are compiled once; no job loads memory in them


def build_rtl(spec: arch.RduSpec, *, depth: int = rdu.CODE_DEPTH, waves: bool = False) -> Build:
    """The simulator for the structure of `spec`, cached by content. Raises UserError for a grid too large for one."""
    p = spec.params()
    if not rdu.whole(p):
        raise UserError(
            f"the RTL of a grid is simulated up to {rdu.MOST_POSITIONS} positions, not {p.columns} x {p.rows}: "
            f"set grid.columns and grid.rows"
        )
    verilog = to_verilog(rdu.top(spec, depth=depth))
    many = p.columns * p.rows > FEW_POSITIONS and not waves
    blocks = re.findall(rf"^module ((?:{'|'.join(BLOCKS)})_\d+)\(", verilog, re.MULTILINE) if many else []
    return build(verilog, top="top", extra_sources=[MODEL, LINES_MODEL], waves=waves, blocks=blocks)


def run_cases(
    simulator: Build,
    cases: Sequence[Case],
    *,
    depth: int = rdu.CODE_DEPTH,
    waves: Path | None = None,
    slack: int = 0,
) -> list[Outcome]:
    """Run cases of one structure, each from its own image, in one simulator process.

    `depth` is that of the build. `slack` is added to the ticks after which a run counts as hung. Raises ValueError for a
    program longer than `depth`, and one that names a section or a memory that is not there.
    """
    jobs = [_job(case, depth, 200_000 + slack) for case in cases]
    return [
        _outcome(case, depth, result)
        for case, result in zip(cases, run(simulator, jobs, waves=waves), strict=True)
    ]


# ---- memory images ------------------------------------------------------------------------------------


def _memories(p: arch.RduParams, image: Image) -> dict[str, np.ndarray]:
    """The words of every black box that the image stands for, uint8 [words, bytes]."""
    line = p.lanes * arch.WORD_BITS // 8
    memories = {
        tier: np.ascontiguousarray(image[tier]).reshape(-1, line)
        for k, tier in enumerate(arch.TIERS)
        if p.tier_lines[k]
    }
    scratch = np.ascontiguousarray(image["scratch"], "<u4")
    for i, (x, y) in enumerate(host.pmu_positions(p)):
        for b in range(p.banks):
            memories[f"pmu_{x}_{y}.unit.unit.bank_{b}"] = scratch[i, b].view(np.uint8).reshape(-1, 4)
    return memories


def _image(p: arch.RduParams, before: Image, words: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The image that the words of the black boxes stand for."""
    image = {
        tier: words[tier].reshape(-1) if tier in words else np.array(before[tier]) for tier in arch.TIERS
    }
    scratch = np.zeros((p.pmus, p.banks, p.bank_words), np.uint32)
    for i, (x, y) in enumerate(host.pmu_positions(p)):
        for b in range(p.banks):
            data = np.ascontiguousarray(words[f"pmu_{x}_{y}.unit.unit.bank_{b}"])
            scratch[i, b] = data.view("<u4").reshape(-1)
    return {**image, "scratch": scratch}


# ---- jobs ---------------------------------------------------------------------------------------------


def _check(p: arch.RduParams, code: np.ndarray, sections: int) -> None:
    for i, row in enumerate(code):
        name = arch.OPS[int(row["op"])].name
        if name in ("PROGRAM_LOAD", "ARGUMENT_LOAD") and row["section"] >= sections:
            raise ValueError(f"operation {i} ({name}): section must be in 0..{sections - 1}")
        if name == "COPY":
            for tier, first in (("source", "from"), ("target", "to")):
                k = int(row[tier])
                if k >= len(COPIED):
                    raise ValueError(f"operation {i} (COPY): {tier} must be one of {', '.join(COPIED)}")
                if row[first] + row["lines"] > p.tier_lines[k]:
                    raise ValueError(
                        f"operation {i} (COPY): {first}, lines reach beyond the {p.tier_lines[k]} lines of "
                        f"{arch.TIERS[k]}"
                    )


def _job(case: Case, depth: int, max_ticks: int) -> Job:
    p = case.params
    code = case.program.flat()
    segments = list(case.program.segments)
    _check(p, code, len(segments))
    configs = [host.config_words(segment.regions) for segment in segments]
    none = np.zeros(0, arch.ARGS.dtype)
    args = [segment.regions.get("args", none) for segment in segments]
    words = [word for section in configs for word in section]
    arguments = np.concatenate(args) if args else none
    for what, size in (
        ("operations", len(code)),
        ("sections", len(segments)),
        ("configuration records", len(words)),
        ("arguments", len(arguments)),
    ):
        if size > depth:
            raise ValueError(f"the RTL holds {depth} {what}, not {size}")
    layout = host.hostmap(p, depth)
    directory = host.directory([len(c) for c in configs], [len(a) for a in args], depth)
    memories = _memories(p, case.image)
    size = -(-host.CONFIG_BITS // 8)
    bits = np.frombuffer(b"".join(word.to_bytes(size, "little") for word in words), np.uint8)
    loads = {"records": bits.reshape(-1, size), **memories}
    return Job(
        writes=[
            (layout.base(name), layout.pack(name, values))
            for name, values in (
                ("registers", np.array(host.register_values(p, len(code)), np.int64)),
                ("code", _encoded(arch.CODE, code)),
                ("sections", directory),
                ("args", _encoded(arch.ARGS, arguments)),
            )
        ],
        loads=[(f"top.{name}.cells.mem", 0, rows) for name, rows in loads.items()],
        reads=[
            *((layout.base(name), layout[name].words) for name in ("status", "activity")),
            # Of the logs what the operations wrote: a word takes a tick, and most of the depth is empty.
            (layout.base("log"), len(code) * layout["log"].stride),
            *(
                (layout.base("spans", k * depth), len(code) * layout["spans"].stride)
                for k in range(len(host.loggers(p)))
            ),
        ],
        dumps=[(f"top.{name}.cells.mem", 0, len(rows)) for name, rows in memories.items()],
        max_ticks=max_ticks,
    )


def _encoded(record, records: np.ndarray) -> list[int]:
    return [int.from_bytes(w.astype("<u4").tobytes(), "little") for w in record.encode(records)]


# ---- results ------------------------------------------------------------------------------------------


def _outcome(case: Case, depth: int, result) -> Outcome:
    if result.error:
        return Outcome(None, {}, result.error)
    p = case.params
    layout = host.hostmap(p, depth)
    names = ("status", "activity", "log", *["spans"] * len(host.loggers(p)))
    status, activity, log, *spans = (
        layout.unpack(name, words) for name, words in zip(names, result.reads, strict=True)
    )
    image = _image(p, case.image, dict(zip(_memories(p, case.image), result.dumps, strict=True)))
    counts = dict(zip(host.status_names(), (int(v) for v in status), strict=True))
    return Outcome(_timeline(case, counts, log, activity, spans), image)


def _tagged(case: Case) -> dict[str, dict[int, int]]:
    """For each unit with a configuration record: by section, the tag that it has there."""
    p = case.params
    tags: dict[str, dict[int, int]] = {}
    for k, segment in enumerate(case.program.segments):
        for record in (arch.CONFIG_PCU, arch.CONFIG_PMU):
            for row in segment.regions.get(record.region, ()):
                tags.setdefault(f"{record.mnemonic}@{row['x']},{row['y']}", {})[k] = int(row["tag"])
        for row in segment.regions.get(arch.CONFIG_AGCU.region, ()):
            tags.setdefault(f"agcu@{row['agcu']}", {})[k] = int(row["tag"])
    known = set(host.loggers(p))
    return {unit: by_section for unit, by_section in tags.items() if unit in known}


def _timeline(
    case: Case, counts: Mapping[str, int], log: np.ndarray, activity: np.ndarray, spans: Sequence[np.ndarray]
) -> Timeline:
    p = case.params
    code = case.program.flat()
    tagged = _tagged(case)

    # A tag's span: operations, and units in kernels, by the section that was loaded last.
    rows = [(int(row["tag"]), int(entry)) for row, entry in zip(code, log, strict=True)]
    section = -1
    for i, row in enumerate(code):
        if row["op"] == arch.OP["PROGRAM_LOAD"]:
            section = int(row["section"])
        elif row["op"] == arch.OP["KERNEL_EXECUTE"]:
            for logger, name in enumerate(host.loggers(p)):
                if section in tagged.get(name, {}) and spans[logger][i] >> np.uint64(32):
                    rows.append((tagged[name][section], int(spans[logger][i])))
    tags = np.array([tag for tag, _ in rows], np.int64)
    firsts = np.array([entry & 0xFFFFFFFF for _, entry in rows], np.int64)
    ends = np.array([entry >> 32 for _, entry in rows], np.int64)

    # Counters and stalls are of the whole run: they belong to no tag.
    n_tags = max(len(case.program.tags), int(tags.max(initial=-1)) + 1)
    names = host.unit_names(p)
    units = ["sequencer", "dma"]
    units += [name for name in names if name.replace("pmu.write", "pmu").replace("pmu.read", "pmu") in tagged]
    table = activity.reshape(len(names), host.ACTIVITIES)[:, : 1 + len(arch.CAUSES)].astype(np.int64)
    counters = np.zeros((n_tags + 1, len(host.COUNTED)), np.int64)
    counters[-1] = [counts[name] for name in host.COUNTED]
    stalls = np.zeros((n_tags + 1, len(units), 1 + len(arch.CAUSES)), np.int64)
    stalls[-1] = table[[names.index(unit) for unit in units]]
    return Timeline(
        ticks=counts["ticks"],
        tags=[*case.program.tags, *(f"tag {i}" for i in range(len(case.program.tags), n_tags))],
        spans=fold_spans(tags, firsts, ends, 0) if len(tags) else np.zeros(0, SPAN),
        counter_names=host.COUNTED,
        counters=counters,
        units=tuple(units),
        causes=arch.CAUSES,
        activity=stalls,
    )
