"""Run programs on the RTL under Verilator, and bring back what the cycle model also says."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from tilewright.arch import csd as arch
from tilewright.arch.errors import UserError
from tilewright.arch.timeline import SPAN, Timeline, fold_spans
from tilewright.rtl import csd
from tilewright.rtl.cosim.cases import Case, Image, Outcome
from tilewright.rtl.cosim.simulator import Build, Job, build, run
from tilewright.rtl.cosim.verilog import to_verilog
from tilewright.rtl.lib.memory import MODEL


def build_rtl(spec: arch.CsdSpec, *, depth: int = csd.CODE_DEPTH, waves: bool = False) -> Build:
    """The simulator for the structure of `spec`: built once for all timings, cached by content.

    Raises UserError for a drive too large for one.
    """
    if csd.part(spec):
        raise UserError(
            f"the RTL of a drive is simulated up to {csd.MOST_OPERATIONS} operations in all controllers, not "
            f"{csd.operations(spec.params())}: set flash.queue and flash.geometry.channels"
        )
    verilog = to_verilog(csd.top(spec, depth=depth))
    return build(verilog, top="top", extra_sources=[MODEL], waves=waves)


def run_cases(
    simulator: Build,
    cases: Sequence[Case],
    *,
    depth: int = csd.CODE_DEPTH,
    waves: Path | None = None,
    slack: int = 0,
) -> list[Outcome]:
    """Run cases of one structure, each from its own image, in one simulator process.

    `depth` is that of the build. `slack` is added to the ticks after which a run counts as hung. Raises
    ValueError for a program longer than `depth`, one that reaches outside the machine, one that begins with a filled
    cache, and one with commands of the GPU or the link, which the RTL does not have.
    """
    jobs = [_job(case, depth, 200_000 + slack) for case in cases]
    return [
        _outcome(case, depth, result)
        for case, result in zip(cases, run(simulator, jobs, waves=waves), strict=True)
    ]


# ---- memory images ------------------------------------------------------------------------------------


def _room(sizes: Sequence[int]) -> tuple[int, ...]:
    """What addresses of fields side by side take: powers of two, at least 2."""
    return tuple(max(2, 1 << (size - 1).bit_length()) for size in sizes)


def _words(values: np.ndarray) -> np.ndarray:
    """uint8 [words, bytes] of an array whose last axis is a word and whose others are an address, each of its own bits."""
    padded = np.zeros((*_room(values.shape[:-1]), values.shape[-1]), values.dtype)
    padded[tuple(map(slice, values.shape))] = values
    little = padded.astype(padded.dtype.newbyteorder("<"))
    return little.reshape(-1, values.shape[-1]).view(np.uint8)


def _values(words: np.ndarray, like: np.ndarray) -> np.ndarray:
    """The inverse of `_words`, of the shape and type of `like`."""
    little = np.ascontiguousarray(words).view(like.dtype.newbyteorder("<"))
    padded = little.reshape(*_room(like.shape[:-1]), like.shape[-1])
    return padded[tuple(map(slice, like.shape))].astype(like.dtype)


def _shaped(p: arch.CsdParams, image: Image) -> dict[str, np.ndarray]:
    """The arrays of the black boxes, by path: an axis for each field of the address, the highest first, then the word."""
    sums = image["sums"].reshape(p.slots, -1, p.lanes)
    # A page's place, the highest bits of its address first: page, block, plane, die, chip.
    cells = image["cells"].transpose(0, 5, 4, 3, 2, 1, 6, 7)
    return {
        "buffer.groups": image["groups"],
        "buffer.sums": sums,
        **{f"controller_{c}.cells": cells[c] for c in range(p.flash.channels)},
    }


def _memories(p: arch.CsdParams, image: Image) -> dict[str, np.ndarray]:
    """The words of every black box that the image stands for, uint8 [words, bytes]."""
    lines = image["vectors"].astype("<u2").view(np.uint8)
    return {"vectors.lines": lines} | {path: _words(array) for path, array in _shaped(p, image).items()}


def _image(p: arch.CsdParams, before: Image, words: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """The image that the words of the black boxes stand for."""
    arrays = {path: _values(words[path], like) for path, like in _shaped(p, before).items()}
    cells = np.stack([arrays[f"controller_{c}.cells"] for c in range(p.flash.channels)])
    return {
        "vectors": np.ascontiguousarray(words["vectors.lines"]).view("<u2").astype(np.uint16),
        "groups": arrays["buffer.groups"],
        "sums": arrays["buffer.sums"].reshape(before["sums"].shape),
        "cells": np.ascontiguousarray(cells.transpose(0, 5, 4, 3, 2, 1, 6, 7)),
    }


# ---- jobs ---------------------------------------------------------------------------------------------


def _job(case: Case, depth: int, max_ticks: int) -> Job:
    p = case.params
    code = case.program.flat()
    if len(code) > depth:
        raise ValueError(f"the RTL's code memory holds {depth} commands, not {len(code)}")
    arch.check(p, code)
    if any(segment.label == arch.CACHED for segment in case.program.segments):
        raise ValueError("the RTL begins with an empty cache: there must be no segment of what is cached")
    outside = np.flatnonzero(np.isin(code["op"], [arch.OP["GPU"], arch.OP["LINK"]]))
    if len(outside):
        name = arch.OPS[int(code["op"][outside[0]])].name
        raise ValueError(f"command {outside[0]} ({name}): the RTL is a drive alone, without GPU and link")
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
        loads=[(f"top.{path}.cells.mem", 0, rows) for path, rows in words.items()],
        reads=[(layout.base(name), layout[name].words) for name in ("status", "log")],
        dumps=[(f"top.{path}.cells.mem", 0, len(rows)) for path, rows in words.items()],
        max_ticks=max_ticks,
    )


def _outcome(case: Case, depth: int, result) -> Outcome:
    if result.error:
        return Outcome(None, {}, result.error)
    p = case.params
    layout = arch.hostmap(p, depth)
    status_words, log_words = result.reads
    status = dict(zip(arch.status_names(p), layout.unpack("status", status_words), strict=True))
    code = case.program.flat()
    log = layout.unpack("log", log_words)[: len(code)]
    firsts = (log & np.uint64(0xFFFFFFFF)).astype(np.int64)
    ends = (log >> np.uint64(32)).astype(np.int64)
    paths = ["vectors.lines", *_shaped(p, case.image)]
    image = _image(p, case.image, dict(zip(paths, result.dumps, strict=True)))
    return Outcome(_timeline(case, status, code["tag"], firsts, ends), image)


def _timeline(
    case: Case, status: Mapping[str, int], tags: np.ndarray, firsts: np.ndarray, ends: np.ndarray
) -> Timeline:
    n_tags = max(len(case.program.tags), int(tags.max(initial=-1)) + 1)
    units = arch.unit_names(case.params)
    # Counters and stalls are of the whole run: they belong to no tag.
    counters = np.zeros((n_tags + 1, len(arch.COUNTERS)), np.int64)
    activity = np.zeros((n_tags + 1, len(units), 1 + len(arch.CAUSES)), np.int64)
    counters[-1] = [int(status[name]) for name in arch.COUNTERS]
    for u, unit in enumerate(units):
        activity[-1, u] = [int(status[f"{unit}.{cause}"]) for cause in ("busy", *arch.CAUSES)]
    return Timeline(
        ticks=int(status["ticks"]),
        tags=[*case.program.tags, *(f"tag {i}" for i in range(len(case.program.tags), n_tags))],
        spans=fold_spans(tags, firsts, ends, 0) if len(tags) else np.zeros(0, SPAN),
        counter_names=arch.COUNTERS,
        counters=counters,
        units=units,
        causes=arch.CAUSES,
        activity=activity,
        waiting=arch.WAITING,
    )
