"""Run an assembler program on the cycle model or on the RTL, and compare the two: `tilewright exec`."""

import hashlib
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.arch import registry
from tilewright.arch import spec as specs
from tilewright.arch.errors import UserError, nearest
from tilewright.arch.isa import Program
from tilewright.arch.scenario import TagInfo
from tilewright.arch.timeline import Timeline
from tilewright.output import read_text, replacing, say
from tilewright.run import cycle_model
from tilewright.summary import Result, of_timeline
from tilewright.trace import LIMIT
from tilewright.trace import write as write_trace

Image = Mapping[str, NDArray[Any]]
IMAGE_LIMIT = 1 << 30  # bytes of a memory image that are allocated


@dataclass(frozen=True)
class Executed:
    """What `execute` found. `before` and `after` are memory images, None where values were not asked for.

    `differences` between RTL on the one side and interpreter and cycle model on the other, a line each; None
    where nothing was compared.
    """

    result: Result
    before: Image | None
    after: Image | None
    differences: list[str] | None


def assemble(spec: specs.Spec, path: str) -> Program:
    """The program of an assembler file. Raises UserError naming file and line."""
    isa = registry.room("arch", spec.target_name).ISA
    program: Program = isa.assemble(read_text(path, "program"), path)
    if not program.segments:
        raise UserError(f"{path}: holds no instructions")
    return program


def execute(
    spec: specs.Spec,
    path: str,
    *,
    engine: str = "sim",
    image: str | None = None,
    values: bool = False,
    waves: str | None = None,
    trace: str | None = None,
    trace_limit: int = LIMIT,
) -> Executed:
    """Run the program of file `path` on the cycle model ("sim") or on the RTL ("rtl").

    `image` is an .npz file with the memory to start from; what it leaves out is zero. With `values` the
    interpreter runs too; the RTL is then compared with it, and with the cycle model. `trace` is a file for a
    trace of the cycle model, of at most `trace_limit` commands of each channel. Raises UserError.
    """
    slug, params = spec.target_name, spec.params()
    program = assemble(spec, path)
    before = load_image(spec, image) if values or image is not None or engine == "rtl" else None
    try:
        kept = 0 if trace is None else trace_limit
        after, decisions = interpret(spec, program, before) if values and before is not None else (None, None)
        timeline: Timeline = cycle_model(slug)(params, program, trace=kept, decisions=decisions)
        if engine == "sim":
            if trace is not None:
                write_trace(trace, spec, timeline, trace_limit)
            rows = registry.room("arch", slug).energy(spec)
            return Executed(_result(spec, timeline, rows), before, after, None)
        assert before is not None
        rtl, left = run_rtl(spec, program, before, timeline, waves)
    except ValueError as error:
        raise UserError(f"{path}: {error}") from None
    found = None if after is None else [*differing_values(after, left), *differing_ticks(timeline, rtl)]
    return Executed(_result(spec, rtl, None), before, left, found)


def _result(spec: specs.Spec, timeline: Timeline, rows: Any) -> Result:
    tags = [TagInfo(name, name, -1) for name in timeline.tags]
    tick = spec.tick
    return Result(spec=spec, tick=tick, assumed=spec.assumed(), **of_timeline(timeline, tags, rows))


def interpret(spec: specs.Spec, program: Program, image: Image) -> tuple[Image, Mapping[str, Any]]:
    """The image that the program leaves by its meaning alone, and the decisions that its timing depends on.

    Raises ValueError for a wrong access.
    """
    out: tuple[Image, Mapping[str, Any]]
    out = registry.room("workloads", spec.target_name).interpret(spec, program, image)
    return out


def run_rtl(
    spec: specs.Spec, program: Program, image: Image, model: Timeline, waves: str | None
) -> tuple[Timeline, Image]:
    """Timeline and image of the RTL under Verilator. Raises UserError, or ValueError for what it cannot run."""
    machine = registry.room("rtl", spec.target_name)
    bench = import_module(f"{machine.__name__}.run")
    length = sum(len(r) * s.repeat for s in program.segments for r in s.regions.values())
    # A power of two, so that programs of similar length share a build.
    depth = max(machine.CODE_DEPTH, 1 << (length - 1).bit_length())
    case = bench.Case(spec.params(), program, image)
    say("running the RTL; a structure that is new takes minutes to build...")
    simulator = bench.build_rtl(spec, depth=depth, waves=waves is not None)
    target = None if waves is None else Path(waves)
    (outcome,) = bench.run_cases(simulator, [case], depth=depth, waves=target, slack=2 * model.ticks)
    if outcome.error:
        raise UserError(f"the RTL did not finish: {' '.join(outcome.error.split())}")
    return outcome.timeline, outcome.image


# ---- images -------------------------------------------------------------------------------------------


def load_image(spec: specs.Spec, path: str | None) -> dict[str, NDArray[Any]]:
    """The memory image in an .npz file, zero where it says nothing; all of it zero without a file.

    Raises UserError for an image above 1 GiB, an unreadable file, and an unknown or misshapen array.
    """
    blank = _blank(spec)
    if path is None:
        return blank
    try:
        with Path(path).open("rb") as stream, np.load(stream, allow_pickle=False) as file:
            if not isinstance(file, np.lib.npyio.NpzFile):
                raise UserError(f"{path}: must be an .npz file of named arrays, not a single array")
            given = {name: file[name] for name in _known(file.files, blank, path)}
    except OSError as error:
        raise UserError(f"cannot read image {path}: {error.strerror or 'not an .npz file'}") from None
    except (ValueError, EOFError, KeyError, MemoryError, zipfile.BadZipFile) as error:
        raise UserError(f"cannot read image {path}: not an .npz file of plain arrays ({error})") from None
    for name, array in given.items():
        want = blank[name]
        if array.dtype != want.dtype or array.shape != want.shape:
            raise UserError(
                f"{path}: {name} must be {want.dtype} of shape {want.shape}, not {array.dtype} of {array.shape}"
            )
    return blank | given


def _known(names: list[str], blank: Image, path: str) -> list[str]:
    for name in names:
        if name not in blank:
            raise UserError(f"{path}: unknown array {name!r}: {nearest(name, blank)}")
    return names


def _blank(spec: specs.Spec) -> dict[str, NDArray[Any]]:
    workload = registry.room("workloads", spec.target_name)
    hint = "make the machine smaller with --set"
    try:
        # Zero pages cost nothing until they are written, so the size may be looked at after the fact.
        blank: dict[str, NDArray[Any]] = workload.blank_image(spec.params())
    except MemoryError as error:
        raise UserError(f"{spec.name}: the memory image is too large ({error}): {hint}") from None
    size = sum(a.nbytes for a in blank.values())
    if size > IMAGE_LIMIT:
        raise UserError(
            f"{spec.name}: the memory image takes {size / 2**30:.3g} GiB, more than the "
            f"{IMAGE_LIMIT / 2**30:g} GiB that values and RTL are run with: {hint}"
        )
    return blank


def save_image(path: str, image: Image) -> None:
    """Write an .npz file of the image."""
    with replacing(path, binary=True) as file:
        np.savez_compressed(file, **image)  # type: ignore[arg-type]


def checksum(array: NDArray[Any]) -> str:
    """SHA-256 of the elements as little-endian bytes, its first 16 digits."""
    data = np.ascontiguousarray(array, array.dtype.newbyteorder("<"))
    return hashlib.sha256(data.tobytes()).hexdigest()[:16]


def values_document(before: Image, after: Image) -> dict[str, Any]:
    """For each array of an image: what it is, how many elements changed, and its checksum."""
    return {
        name: {
            "dtype": str(array.dtype),
            "shape": list(array.shape),
            "changed": int((array != before[name]).sum()),
            "sha256": checksum(array),
        }
        for name, array in after.items()
    }


# ---- comparing ----------------------------------------------------------------------------------------


def differing_values(expected: Image, got: Image) -> list[str]:
    """A line for each array that the interpreter and the RTL leave different."""
    lines = []
    for name, theirs in got.items():
        mine = expected[name]
        wrong = np.argwhere(mine != theirs)
        if len(wrong):
            at = tuple(int(i) for i in wrong[0])
            lines.append(
                f"values: {len(wrong)} of {mine.size} elements of {name} differ, the first at {list(at)}: "
                f"{int(theirs[at]):#x} in the RTL, {int(mine[at]):#x} by the interpreter"
            )
    return lines


def differing_ticks(model: Timeline, rtl: Timeline) -> list[str]:
    """A line for each total, tag, counter and stall in which cycle model and RTL differ."""
    pairs: list[tuple[str, Any, Any]] = [("ticks", rtl.ticks, model.ticks)]
    mine, theirs = _tag_spans(model), _tag_spans(rtl)
    pairs += [(f"ticks of tag {t}", theirs.get(t), mine.get(t)) for t in sorted(mine.keys() | theirs.keys())]
    pairs += [(f"counter {n}", v, model.counter(n)) for n, v in rtl.totals().items()]
    for unit in rtl.units:
        expected = model.unit(unit)
        pairs += [(f"{unit}, {cause}", n, expected[cause]) for cause, n in rtl.unit(unit).items()]
    return [f"{what}: {a} in the RTL, {b} in the model" for what, a, b in pairs if a != b]


def _tag_spans(timeline: Timeline) -> dict[str, tuple[int, int]]:
    """First and last tick of each tag over the whole run."""
    out = {}
    for tag in np.unique(timeline.spans["tag"]):
        rows = timeline.spans[timeline.spans["tag"] == tag]
        out[timeline.tags[tag]] = int(rows["first"].min()), int(rows["end"].max())
    return out
