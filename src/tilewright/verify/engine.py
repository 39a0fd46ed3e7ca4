"""Run a target's verification plan: RTL against interpreter (bits) and against cycle model (ticks).

This module knows no target. A plan is a module `tilewright.verify.<slug>` with what `Plan` lists: structures
(what takes a Verilator build of its own), random cases for them, and the target's three readings. Every case
runs on all three; a mismatch is described in a line and kept in a replay file that holds all it takes.
"""

import json
import os
import tempfile
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from fractions import Fraction
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from typing import Any, Protocol, cast

import numpy as np

from tilewright.arch import registry
from tilewright.arch import spec as spec_files
from tilewright.arch.errors import UserError, nearest
from tilewright.arch.isa import InstructionSet, Program, Segment
from tilewright.arch.scenario import Progress
from tilewright.arch.timeline import Timeline

Image = Mapping[str, np.ndarray]
_FORMAT = 1  # of replay files


@dataclass(frozen=True)
class Structure:
    """Widths and counts of a machine. With `keep_timing` its cases keep the timings of `spec`, too."""

    name: str
    spec: spec_files.Spec
    keep_timing: bool = False


@dataclass(frozen=True)
class Case:
    """A program in assembler text, the spec that it runs on, and the seed of the memory image that it meets."""

    spec: spec_files.Spec
    text: str
    image_seed: int


class Outcome(Protocol):
    """What the RTL did, or why it did not."""

    timeline: Timeline | None
    image: Image
    error: str | None


@dataclass(frozen=True)
class Observed:
    """A case after interpreter and model, for the plan's coverage and its own checks.

    `steps` is the program `one_by_one`, with a tag of its own for each instruction, and `timeline` the model's for it,
    unfolded and with a trace.
    """

    case: Case
    program: Program
    steps: Program
    timeline: Timeline
    before: Image
    after: Image
    decisions: Mapping[str, Any] = field(default_factory=dict)


class Plan(Protocol):
    """What a target's module `tilewright.verify.<slug>` offers."""

    SPEC: type[spec_files.Spec]
    ISA: InstructionSet
    STRUCTURES: int  # in the default plan
    PROGRAMS: int  # of each structure
    COVERAGE: Sequence[str]  # what the default plan must count at least once

    def structures(self, count: int, seed: int) -> list[Structure]: ...

    def scaled(self, spec: spec_files.Spec) -> tuple[Structure, list[str]]:
        """A structure small enough for RTL with the timings of `spec`, and what was made smaller."""

    def cases(self, structure: Structure, count: int, seed: Sequence[int]) -> list[Case]: ...

    def image(self, spec: spec_files.Spec, seed: int) -> Image: ...

    def interpret(
        self, spec: spec_files.Spec, program: Program, image: Image
    ) -> tuple[Image, Mapping[str, Any]]:
        """The image that the program leaves, and the decisions that its timing depends on."""

    def simulate(
        self,
        spec: spec_files.Spec,
        program: Program,
        *,
        fold: bool,
        trace: bool,
        decisions: Mapping[str, Any] | None = None,
    ) -> Timeline: ...

    def build(self, spec: spec_files.Spec, waves: bool) -> Any: ...

    def run_rtl(
        self, build: Any, cases: Sequence[tuple[spec_files.Spec, Program, Image]], waves: Path | None
    ) -> Sequence[Outcome]: ...

    def referee(self, spec: spec_files.Spec, timeline: Timeline) -> str | None:
        """What an independent judge objects to in a trace, of the model or of the RTL."""

    def commands(self, spec: spec_files.Spec, model: Timeline, rtl: Timeline) -> str | None:
        """The first difference between the traces of RTL and model."""

    def count(self, observed: Observed) -> Counter[str]:
        """What the case exercised, by the names of COVERAGE and others."""


def one_by_one(program: Program) -> Program:
    """The program with repetitions written out, and with a tag of its own for each record that carries one.

    Tags number the records segment by segment and region by region. Segments of nothing but code become one; others
    stay what they are, as their code may name them, and only their commands are repeated.
    """
    segments = [
        {r: np.tile(a, s.repeat if program.isa.record(r).command else 1) for r, a in s.regions.items()}
        for s in program.segments
    ]
    if all(set(regions) <= {"code"} for regions in segments):
        segments = [{"code": program.flat()}]
    tagged = [a for regions in segments for r, a in regions.items() if "tag" in program.isa.record(r).by_name]
    total = 0
    for records in tagged:
        records["tag"] = total + np.arange(len(records))
        total += len(records)
    return Program(program.isa, [Segment(regions) for regions in segments], [str(i) for i in range(total)])


@dataclass(frozen=True, kw_only=True)
class Report:
    """The result of a verification. `passed`: no mismatch, and nothing left `uncovered`."""

    passed: bool
    target: str
    subject: str
    seed: int
    structures: list[str]
    cases: int  # compared
    ticks: int  # of RTL simulated in them
    coverage: dict[str, int]  # cases that showed it
    uncovered: list[str] = field(default_factory=list)
    mismatches: list[str] = field(default_factory=list)
    replay: Path | None = None
    notes: list[str] = field(default_factory=list)

    def document(self) -> dict[str, Any]:
        """The report as JSON can hold it."""
        return {**asdict(self), "replay": None if self.replay is None else str(self.replay)}

    def text(self) -> str:
        """The report for people, in lines."""
        size = f"{self.cases} cases on {len(self.structures)} structures, {self.ticks} ticks of RTL"
        lines = [f"{self.subject}: {size}, seed {self.seed}"]
        lines += [f"  {note}" for note in self.notes]
        lines += [f"  covered {count:6d}  {name}" for name, count in self.coverage.items()]
        lines += [f"  NOT COVERED     {name}" for name in self.uncovered]
        lines += [f"  MISMATCH {text}" for text in self.mismatches]
        if self.replay is not None:
            lines.append(f"  replay: {self.replay}")
        lines.append("passed" if self.passed else "FAILED")
        return "\n".join(lines)


def run(
    subject: str | Path | Structure,
    *,
    specs: int | None = None,
    programs: int | None = None,
    seed: int = 0,
    waves: Path | str | None = None,
    replay: Path | str | None = None,
    progress: Progress | None = None,
) -> Report:
    """Verify a target (its slug), a spec (preset or YAML path), a structure, or the case of a replay file.

    `specs` is the number of structures, `programs` that of programs for each; left out, a target runs its
    default plan; it must reach its coverage with no less than that. `waves` is a VCD of the first case that disagrees, else of
    the first case. A mismatch is written to `replay` (default `verify-<slug>.json` in the working folder).
    `progress` counts structures. Raises UserError for an unknown subject, counts below 1, and more structures
    or programs than the subject has.
    """
    for name, count in (("--specs", specs), ("--programs", programs)):
        if count is not None and count < 1:
            raise UserError(f"{name} must be at least 1, not {count}")
    if seed < 0:
        raise UserError(f"--seed must be at least 0, not {seed}")
    slug, structures, cases, notes = _work(subject, specs, programs, seed)
    plan = plan_of(slug)
    session = _Session(plan)
    for done, (structure, own) in enumerate(zip(structures, cases, strict=True)):
        session.run(structure, own)
        if progress:
            progress(done + 1, len(structures))
    if waves is not None:
        structure, case = session.worst or (structures[0], cases[0][0])
        session.waves(structure, case, Path(waves))
        notes.append(f"waves: {waves}")
    path = None
    if session.worst:
        path = Path(replay) if replay is not None else Path(f"verify-{slug}.json")
        _write(path, _replay(slug, session.worst[1], session.mismatches[0]))
    full = isinstance(subject, str) and subject == slug
    full = full and (specs or plan.STRUCTURES) >= plan.STRUCTURES
    full = full and (programs or plan.PROGRAMS) >= plan.PROGRAMS
    names = [*plan.COVERAGE, *sorted(set(session.coverage) - set(plan.COVERAGE))]
    uncovered = [n for n in plan.COVERAGE if not session.coverage[n]] if full else []
    return Report(
        passed=not session.mismatches and not uncovered,
        target=slug,
        subject=subject.name if isinstance(subject, Structure) else str(subject),
        seed=seed,
        structures=[s.name for s in structures],
        cases=session.cases,
        ticks=session.ticks,
        coverage={n: session.coverage[n] for n in names},
        uncovered=uncovered,
        mismatches=session.mismatches,
        replay=path,
        notes=notes,
    )


def plan_of(slug: str) -> Plan:
    """The plan of a target. Raises UserError if it has none."""
    if find_spec(f"tilewright.verify.{slug}") is None:
        raise UserError(f"target {slug} has no verification plan")
    return cast(Plan, import_module(f"tilewright.verify.{slug}"))


Work = tuple[str, list[Structure], list[list[Case]], list[str]]


def _work(subject: str | Path | Structure, count: int | None, programs: int | None, seed: int) -> Work:
    """Slug, structures, cases for each and notes."""
    notes: list[str] = []
    if isinstance(subject, (str, Path)) and str(subject).endswith(".json"):
        _only_once("a replay file has one case", specs=count, programs=programs)
        slug, structure, case = load_replay(Path(subject))
        return slug, [structure], [[case]], [f"replay of {subject}"]
    if isinstance(subject, Structure):
        _only_once("a structure is one", specs=count)
        slug, structures = subject.spec.target, [subject]
        plan = plan_of(slug)
    elif str(subject) in registry.targets():
        slug = str(subject)
        plan = plan_of(slug)
        structures = plan.structures(count or plan.STRUCTURES, seed)
    else:
        known = [*registry.targets(), *registry.preset_names()]
        if str(subject) not in known and not spec_files.is_path(str(subject)):
            hint = nearest(str(subject), known)
            raise UserError(f"{subject!r} is no target, spec or replay file: {hint}")
        _only_once("a spec has one structure; name a target for more", specs=count)
        spec = registry.load_spec(str(subject))
        slug = spec.target
        plan = plan_of(slug)
        structure, notes = plan.scaled(spec)
        structures = [structure]
    each = programs or plan.PROGRAMS
    cases = [plan.cases(s, each, (seed, k)) for k, s in enumerate(structures)]
    return slug, structures, cases, notes


def _only_once(why: str, **counts: int | None) -> None:
    for name, count in counts.items():
        if count is not None and count != 1:
            raise UserError(f"--{name} {count}: {why}")


# ---- running ------------------------------------------------------------------------------------------


class _Session:
    """The comparisons so far."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.coverage: Counter[str] = Counter()
        self.mismatches: list[str] = []
        self.worst: tuple[Structure, Case] | None = None
        self.cases = self.ticks = 0

    def run(self, structure: Structure, cases: Sequence[Case]) -> None:
        plan = self.plan
        observed = [self._observe(structure, i, case) for i, case in enumerate(cases)]
        jobs = [(o.case.spec, o.steps, o.before) for o in observed]
        outcomes = plan.run_rtl(plan.build(structure.spec, False), jobs, None)
        for i, (o, outcome) in enumerate(zip(observed, outcomes, strict=True)):
            self.cases += 1
            if outcome.error is not None:
                self._mismatch(structure, i, o.case, f"RTL: {outcome.error}")
                break  # the simulator stopped there: the cases behind it did not run
            assert outcome.timeline is not None
            self.ticks += outcome.timeline.ticks
            timelines = o.timeline, outcome.timeline
            difference = compare(o, outcome) or plan.commands(o.case.spec, *timelines)
            if difference:
                self._mismatch(structure, i, o.case, difference)
            objection = plan.referee(o.case.spec, outcome.timeline)
            if objection:
                self._mismatch(structure, i, o.case, f"referee on the RTL: {objection}")

    def _observe(self, structure: Structure, i: int, case: Case) -> Observed:
        plan = self.plan
        program = plan.ISA.assemble(case.text, f"program {i} of {structure.name}")
        steps = one_by_one(program)
        before = plan.image(case.spec, case.image_seed)
        after, decisions = plan.interpret(case.spec, program, before)
        timeline = plan.simulate(case.spec, steps, fold=False, trace=True, decisions=decisions)
        observed = Observed(case, program, steps, timeline, before, after, decisions)
        objection = plan.referee(case.spec, timeline)
        if objection:
            self._mismatch(structure, i, case, f"referee: {objection}")
        folded = plan.simulate(case.spec, program, fold=True, trace=False, decisions=decisions)
        difference = _tags(observed, folded) or _totals(timeline, folded, "unfolded model", "folded model")
        if difference:
            self._mismatch(structure, i, case, difference)
        self.coverage.update(dict.fromkeys(plan.count(observed) + Counter(), 1))
        return observed

    def waves(self, structure: Structure, case: Case, path: Path) -> None:
        plan = self.plan
        steps = one_by_one(plan.ISA.assemble(case.text))
        job = (case.spec, steps, plan.image(case.spec, case.image_seed))
        plan.run_rtl(plan.build(structure.spec, True), [job], path)

    def _mismatch(self, structure: Structure, i: int, case: Case, what: str) -> None:
        self.mismatches.append(f"{structure.name}, program {i}: {what}")
        self.worst = self.worst or (structure, case)


def compare(o: Observed, outcome: Outcome) -> str | None:
    """The first difference between the RTL and interpreter or model, or None."""
    assert outcome.timeline is not None
    return (
        _bits(o.after, outcome.image)
        or _instructions(o, outcome.timeline)
        or _totals(o.timeline, outcome.timeline, "model", "RTL")
    )


def _bits(expected: Image, got: Image) -> str | None:
    for name, array in got.items():
        wrong = np.argwhere(expected[name] != array)
        if len(wrong):
            at = tuple(int(k) for k in wrong[0])
            place = ",".join(map(str, at))
            return (
                f"{name}[{place}] is {int(array[at]):#x} in the RTL, {int(expected[name][at]):#x} by the "
                f"interpreter ({len(wrong)} elements differ)"
            )
    return None


def _instructions(o: Observed, rtl: Timeline) -> str | None:
    """The first instruction, or configured unit, that begins or ends on another tick than the model says."""
    model, other = _joined(o.timeline), _joined(rtl)
    for tag in sorted(model.keys() | other.keys()):
        a, b = model.get(tag), other.get(tag)
        if a != b:
            return f"instruction {tag} takes {_ticks(b)} in the RTL, {_ticks(a)} in the model: {_line(o.steps, tag)}"
    return None


def _ticks(span: tuple[int, int] | None) -> str:
    return "no tick" if span is None else f"ticks {span[0]}..{span[1]}"


def _joined(timeline: Timeline) -> dict[int, tuple[int, int]]:
    """First tick and end of each tag that was worked for, over all segments."""
    out: dict[int, tuple[int, int]] = {}
    for span in timeline.spans:
        tag, first, end = (int(span[name]) for name in ("tag", "first", "end"))
        before = out.get(tag, (first, end))
        out[tag] = min(first, before[0]), max(end, before[1])
    return out


def _line(steps: Program, tag: int) -> str:
    """The record of a tag as text, without the tag."""
    for segment in steps.segments:
        for region, records in segment.regions.items():
            if "tag" in steps.isa.record(region).by_name and (records["tag"] == tag).any():
                rows = records[records["tag"] == tag]
                return steps.isa.format(region, rows, steps.tags)[0].partition(" tag=")[0]
    return f"tag {tag}"


def _tags(o: Observed, folded: Timeline) -> str | None:
    """Whether the tags of the program as written span what its instructions do one by one."""
    spans, theirs = _joined(o.timeline), _joined(folded)
    mine: dict[int, tuple[int, int]] = {}
    for step, tag in enumerate(_owners(o.program)):
        if step in spans:
            (first, end), before = spans[step], mine.get(tag, spans[step])
            mine[tag] = min(first, before[0]), max(end, before[1])
    for tag in sorted(mine.keys() | theirs.keys()):
        a, b = mine.get(tag), theirs.get(tag)
        if a != b:
            return f"tag {folded.tags[tag]} spans {_ticks(a)} unfolded, {_ticks(b)} folded"
    return None


def _owners(program: Program) -> list[int]:
    """The tag that each record has in the program, by its number in `one_by_one`."""
    return [
        int(tag)
        for s in program.segments
        for r, records in s.regions.items()
        if "tag" in program.isa.record(r).by_name
        for tag in np.tile(records["tag"], s.repeat if program.isa.record(r).command else 1)
    ]


def _totals(expected: Timeline, got: Timeline, left: str, right: str) -> str | None:
    if got.ticks != expected.ticks:
        return f"{got.ticks} ticks by the {right}, {expected.ticks} by the {left}"
    for name, value in got.totals().items():
        if value != expected.counter(name):
            return f"counter {name} is {value} by the {right}, {expected.counter(name)} by the {left}"
    for unit in got.units:
        mine = expected.unit(unit)
        for cause, value in got.unit(unit).items():
            if value != mine[cause]:
                return f"{unit}: {value} ticks {cause} by the {right}, {mine[cause]} by the {left}"
    return None


# ---- replay files -------------------------------------------------------------------------------------


def document(spec: spec_files.Spec) -> dict[str, Any]:
    """Everything a spec holds as nested mappings of JSON values; rationals as exact text."""
    out: dict[str, Any] = {}
    for path, value in spec.leaves():
        *parents, last = path.split(".")
        section = out
        for key in parents:
            section = section.setdefault(key, {})
        section[last] = str(value) if isinstance(value, Fraction) else value
    return out


def _replay(slug: str, case: Case, difference: str) -> str:
    content = {
        "replay": _FORMAT,
        "target": slug,
        "difference": difference,
        "image_seed": case.image_seed,
        "program": case.text.splitlines(),
        "spec": document(case.spec),
    }
    return json.dumps(content, indent=1) + "\n"


def load_replay(path: Path) -> tuple[str, Structure, Case]:
    """Slug, structure and case of a replay file. Raises UserError if it is none."""
    try:
        content = json.loads(path.read_text("utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}") from None
    except ValueError as error:
        raise UserError(f"{path}: not a replay file: {error}") from None
    wanted: dict[str, Callable[[Any], bool]] = {
        "replay": lambda v: v == _FORMAT,
        "target": lambda v: v in registry.targets(),
        "image_seed": lambda v: isinstance(v, int) and v >= 0,
        "program": lambda v: isinstance(v, list) and all(isinstance(line, str) for line in v),
        "spec": lambda v: isinstance(v, dict),
    }
    for key, valid in wanted.items():
        if not isinstance(content, dict) or key not in content or not valid(content[key]):
            raise UserError(f"{path}: not a replay file: {key} is missing or wrong")
    slug = content["target"]
    tree = spec_files.parse_yaml(json.dumps(content["spec"]), str(path))
    spec = spec_files.build(plan_of(slug).SPEC, tree, str(path))
    case = Case(spec, "\n".join(content["program"]) + "\n", content["image_seed"])
    return slug, Structure(path.stem, spec), case


def _write(path: Path, text: str) -> None:
    """Under a temporary name first: a reader never finds half a file. Raises UserError."""
    try:
        with tempfile.NamedTemporaryFile("w", dir=path.parent, prefix=path.name, delete=False) as file:
            file.write(text)
        os.replace(file.name, path)
    except OSError as error:
        raise UserError(f"cannot write {path}: {error.strerror}") from None
