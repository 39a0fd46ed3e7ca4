"""The verification plan of target csd: small drives, random timings, random programs, random numbers."""

import copy
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright.arch import csd as arch
from tilewright.arch import spec as specs
from tilewright.arch.csd_pages import Selection
from tilewright.arch.formats import FP16
from tilewright.arch.isa import Program
from tilewright.arch.timeline import Timeline
from tilewright.sim import csd as sim
from tilewright.verify.engine import Case, Observed, Structure, document
from tilewright.workloads import csd as meaning
from tilewright.workloads.formats import to_bits

if TYPE_CHECKING:
    from tilewright.rtl.cosim.simulator import Build
    from tilewright.rtl.csd.run import Outcome

SPEC = arch.CsdSpec
ISA = arch.ISA
STRUCTURES = 5
PROGRAMS = 24
_BASE = "instinfer-a6000"
_TRACED = 1 << 10  # commands kept: all that a case has
_COMMANDS = 60  # at most of a case, repetitions written out

Image = Mapping[str, np.ndarray]
Rng = np.random.Generator

# ---- structures ---------------------------------------------------------------------------------------

_DEFAULTS = {
    "engine.clock_mhz": 1000, "engine.kernels": 2, "engine.lanes": 4, "engine.batches": 2, "engine.buffer_lines": 64,
    "engine.max_tokens": 64, "engine.max_channels": 16, "engine.max_group": 2,
    "engine.exp_terms": 4, "engine.reciprocal_iterations": 2, "engine.rsqrt_iterations": 2,
    "engine.command_queue": 2,
    "attention.page_channels": 2, "attention.page_filter": "true",
    "dram.table_bits": 5, "dram.slots": 4, "dram.vector_lines": 256,
    "flash.queue": 4, "flash.geometry.channels": 2, "flash.geometry.chips_per_channel": 2,
    "flash.geometry.dies_per_chip": 1, "flash.geometry.planes_per_die": 2, "flash.geometry.blocks_per_plane": 4,
    "flash.geometry.pages_per_block": 4, "flash.geometry.page_bytes": 128,
    "flash.cells.page_types": "uniform", "flash.cells.read_msb_us": 1, "flash.cells.program_msb_us": 1,
    "flash.cells.read_csb_us": 1, "flash.cells.program_csb_us": 1,
    "flash.scheduler.policy": "pipelined", "flash.scheduler.multi_plane": "true",
    "flash.scheduler.same_page": "true", "flash.scheduler.cache_read": "false", "flash.scheduler.window": 8,
    "flash.placement.order": "CWDP",
}  # fmt: skip
_Shape = Mapping[str, object]
# Two kernels and one, 1, 2 and 4 channels, every policy, single and multi-plane commands on the same page and on any,
# cached reads, every kind of cells, all pages read and only those needed, operand buffers that hold a whole slot and
# few rows, blocks that are soon full.
_SHAPES: tuple[_Shape, ...] = (
    {},
    {
        "engine.kernels": 1, "engine.lanes": 2, "engine.buffer_lines": 16, "engine.max_group": 3,
        "attention.page_filter": "false", "flash.queue": 2, "flash.geometry.channels": 4,
        "flash.geometry.planes_per_die": 1, "flash.geometry.page_bytes": 64, "flash.cells.page_types": "mlc",
        "flash.scheduler.policy": "chip-busy", "flash.scheduler.multi_plane": "false",
        "flash.placement.order": "CPDW",
    },
    {
        "engine.command_queue": 3, "engine.batches": 4, "engine.buffer_lines": 32, "flash.queue": 6, "flash.geometry.channels": 1,
        "flash.geometry.dies_per_chip": 2, "flash.geometry.pages_per_block": 10,
        "flash.cells.page_types": "tlc", "flash.scheduler.policy": "data-out-first",
        "flash.scheduler.cache_read": "true", "flash.placement.order": "DCPW",
    },
    {
        "engine.lanes": 2, "engine.batches": 4, "engine.buffer_lines": 8, "engine.max_group": 1,
        "engine.command_queue": 1, "flash.queue": 3, "flash.geometry.page_bytes": 64,
        "flash.geometry.chips_per_channel": 1, "flash.geometry.planes_per_die": 1,
        "flash.geometry.pages_per_block": 3, "flash.geometry.blocks_per_plane": 5,
    },
    {
        "engine.kernels": 1, "engine.exp_terms": 2, "engine.reciprocal_iterations": 1,
        "engine.rsqrt_iterations": 1, "engine.buffer_lines": 12, "engine.max_group": 4,
        "flash.scheduler.same_page": "false", "flash.scheduler.cache_read": "true",
        "flash.placement.order": "PDWC",
    },
)  # fmt: skip


def structures(count: int, seed: int) -> list[Structure]:
    """`count` drives: the fixed list first, then random ones from `seed`."""
    shapes = list(_SHAPES[:count])
    rng = np.random.default_rng((seed, 17))
    while len(shapes) < count:
        lanes, channels = int(rng.choice([2, 4])), int(rng.choice([1, 2, 4]))
        chosen: dict[str, object] = {
            "engine.lanes": lanes,
            "engine.kernels": rng.integers(1, 3),
            "engine.batches": rng.choice([2, 4, 8]),
            "engine.buffer_lines": lanes * int(rng.integers(4, 17)),
            "engine.max_group": rng.integers(1, 4),
            "engine.command_queue": rng.integers(1, 4),
            "attention.page_filter": rng.choice(["true", "false"]),
            "flash.queue": rng.integers(2, 7),
            "flash.geometry.channels": channels,
            "flash.geometry.chips_per_channel": rng.integers(1, 3),
            "flash.geometry.dies_per_chip": rng.integers(1, 3),
            "flash.geometry.planes_per_die": rng.choice([1, 2]),
            "flash.geometry.pages_per_block": rng.integers(2, 9),
            "flash.geometry.page_bytes": 32 * lanes,
            "flash.cells.page_types": rng.choice(["uniform", "mlc", "tlc"]),
            "flash.scheduler.policy": rng.choice(["pipelined", "chip-busy", "data-out-first"]),
            "flash.placement.order": "".join(rng.permutation(list("CWDP"))),
        }
        for name in ("multi_plane", "same_page", "cache_read"):
            chosen[f"flash.scheduler.{name}"] = rng.choice(["true", "false"])
        shapes.append(chosen)
    return [_structure(shape) for shape in shapes]


def _structure(shape: _Shape) -> Structure:
    sets = [f"{key}={value}" for key, value in {**_DEFAULTS, **shape}.items()]
    spec = _build(specs.apply_sets(_base(), [*sets, "name=small"]), "small")
    e, g, s = spec.engine, spec.flash.geometry, spec.flash.scheduler
    kernels = f"{e.kernels} kernel{'s' * (e.kernels > 1)} of {e.lanes}"
    planes = f"{g.chips_per_channel} x {g.dies_per_chip} x {g.planes_per_die}"
    return Structure(
        f"{kernels}, buffers of {e.batches} x {e.buffer_lines}, {g.channels} channels of {planes} {spec.flash.cells.page_types}, "
        f"{s.policy}",
        spec,
    )


@cache
def _base() -> specs.Tree:
    return specs.load_tree(_BASE, ["csd"])


def _build(tree: specs.Tree, name: str) -> arch.CsdSpec:
    spec = specs.build(SPEC, tree, name)
    assert isinstance(spec, arch.CsdSpec)
    return spec


def _tree(spec: arch.CsdSpec) -> specs.Tree:
    return specs.parse_yaml(json.dumps(document(spec)), spec.name)


# What of a spec RTL simulates, by key: at most so much.
_MOST = {
    "engine.lanes": 4, "engine.batches": 2, "engine.buffer_lines": 64, "engine.max_tokens": 64,
    "engine.max_channels": 16, "engine.max_group": 2, "engine.command_queue": 4, "dram.table_bits": 5,
    "dram.slots": 4, "dram.vector_lines": 256, "flash.queue": 8, "flash.geometry.channels": 2,
    "flash.geometry.chips_per_channel": 2, "flash.geometry.dies_per_chip": 2, "flash.geometry.planes_per_die": 2,
    "flash.geometry.blocks_per_plane": 4, "flash.geometry.pages_per_block": 8, "flash.geometry.page_bytes": 128,
    "flash.scheduler.window": 8, "attention.page_channels": 2,
}  # fmt: skip


def scaled(spec: arch.CsdSpec) -> tuple[Structure, list[str]]:
    """The spec with at most 2 channels of 2 chips and small buffers; ticks of flash commands and pages stay."""
    given = dict(spec.leaves())
    new = {key: min(most, int(str(given[key]))) for key, most in _MOST.items()}
    smaller = [f"{key} {given[key]} to {value}" for key, value in new.items() if value != given[key]]
    notes = [f"scaled to what RTL simulates: {', '.join(smaller)}; timings kept"] if smaller else []
    moved = Fraction(new["flash.geometry.page_bytes"], spec.flash.geometry.page_bytes)
    sets = {**new, "flash.interface.mb_per_s": spec.flash.interface.mb_per_s * moved}
    tree = specs.apply_sets(_tree(spec), [f"{key}={value}" for key, value in sets.items()])
    return Structure(spec.name, _build(tree, spec.name), keep_timing=True), notes


# ---- random timings -----------------------------------------------------------------------------------


def _timed(structure: arch.CsdSpec, rng: Rng, number: int) -> arch.CsdSpec:
    """The structure with random flash times: a page takes its lines' time on the bus, less or much more, and an array
    time is anything from a few ticks to some pages'."""
    lines = structure.page_elements // structure.engine.lanes
    transfer = int(rng.choice([1, lines // 2, lines, lines + 3, 4 * lines]))
    longest = (3, 20, 80, 250)[number % 4]

    def ticks(most: int) -> int:
        return int(rng.integers(1, most + 1))

    # A tick is a nanosecond; anything above ticks - 1 rounds up to `ticks`.
    sets = {"flash.interface.mb_per_s": Fraction(structure.flash.geometry.page_bytes * 1000, transfer)}
    for kind in ("read", "program"):
        for cell in ("lsb", "csb", "msb"):
            sets[f"flash.cells.{kind}_{cell}_us"] = Fraction(ticks(longest), 1000)
    sets["flash.cells.erase_us"] = Fraction(ticks(2 * longest), 1000)
    sets["flash.cells.cache_busy_us"] = Fraction(int(rng.integers(0, 5)), 1000)
    for kind in ("read", "program", "erase"):
        sets[f"flash.interface.{kind}_command_ns"] = Fraction(ticks(6))
        sets[f"flash.interface.{kind}_command_plane_ns"] = Fraction(ticks(4))
    return _build(
        specs.apply_sets(_tree(structure), [f"{key}={value}" for key, value in sets.items()]),
        "random timings",
    )


# ---- random programs ----------------------------------------------------------------------------------

# How often each command is tried, by kind of program: of everything; attention to a cache that stays; token by token;
# flash that fills up and is reclaimed.
_MIXED = {"WRITE": 5, "ATTEND": 8, "TRANSPOSE": 3, "READ": 3, "CHANNELS": 2, "CONFIG": 2, "RECLAIM": 1}
_READING = {"ATTEND": 8, "TRANSPOSE": 1, "READ": 2, "CONFIG": 1}
_DECODING = {"STEP": 5, "ATTEND": 6, "TRANSPOSE": 2, "CONFIG": 1}
_FILLING = {"WRITE": 8, "CHANNELS": 4, "RECLAIM": 5, "READ": 3, "ATTEND": 2, "TRANSPOSE": 2}
_KINDS = (_MIXED, _READING, _MIXED, _DECODING, _FILLING, _READING)


class _Writer:
    """Writes random commands, of which those stay that the interpreter does not refuse."""

    def __init__(self, spec: arch.CsdSpec, rng: Rng) -> None:
        self.p, self.rng = p, _ = spec.params(), rng
        self.machine = meaning.Machine(spec, meaning.blank_image(p))
        self.written = [0] * p.slots  # tokens of each slot
        self.spans = [0] * p.slots  # whole spans, from the first, with channel-indexed pages
        self.now = 0  # a guess at the tick
        self.tags = [f"t{i}" for i in range(int(rng.integers(1, 5)))]
        self.lines: list[str] = []
        self.geometry = self._geometry()
        self.configuration = ""
        while not self.add("CONFIG"):
            pass

    def pick(self, low: int, high: int) -> int:
        """An integer of low..high, the ends more often than the rest."""
        low = min(low, high)
        kind = self.rng.integers(0, 6)
        if kind < 2:
            return high if kind else low
        return int(self.rng.integers(low, high + 1))

    def add(self, kind: str) -> bool:
        """Try one command; whether it stays."""
        fields: dict[str, Any] | None = getattr(self, f"_{kind.lower()}")()
        if fields is None:
            return False
        op = {"CHANNELS": "WRITE", "STEP": "WRITE"}.get(kind, kind)
        line = " ".join([op, *(f"{name}={value}" for name, value in fields.items())])
        waits = not self.rng.integers(0, 6)
        for text in ([] if waits or op == "CONFIG" else [line]) + [
            line if op == "CONFIG" else f"{line} after=4"
        ]:
            if self._stays(text):
                self._note(kind, fields)
                if op == "CONFIG":
                    self.configuration = text
                self.lines.append(f"{text} tag={self.rng.choice(self.tags)}{self._arrival()}")
                return True
        return False

    def _stays(self, text: str) -> bool:
        code = ISA.assemble(f"{self.configuration}\n{text}").flat()
        trial = copy.deepcopy(self.machine)
        try:
            arch.check(self.p, code)
            trial.execute(code[-1])
        except ValueError:
            return False
        self.machine = trial
        return True

    def _note(self, kind: str, fields: Mapping[str, Any]) -> None:
        """What later commands may read."""
        if kind in ("CONFIG", "ATTEND", "READ"):
            return
        if kind == "RECLAIM":
            # What is left begins anew.
            self.written, self.spans = [0] * self.p.slots, [0] * self.p.slots
            return
        for slot in range(fields["slot"], fields["slot"] + fields["heads"]):
            if kind in ("WRITE", "STEP"):
                self.written[slot] = fields["first"] + fields["tokens"]
                self.spans[slot] *= fields["first"] > 0
            elif fields["first"] == self.spans[slot]:
                self.spans[slot] += 1

    def _arrival(self) -> str:
        """Mostly none; else a tick in the past, or soon."""
        self.now += 60
        kind = self.rng.integers(0, 10)
        if kind == 0:
            return f" not_before={int(self.rng.integers(1, 20))}"
        if kind == 1:
            self.now += int(self.rng.integers(0, 300))
            return f" not_before={self.now}"
        return ""

    # ---- what commands may be; None where there is nothing for them to do ----

    def _geometry(self) -> dict[str, int]:
        """How keys and values lie in pages: of one program, as they are written once and read often."""
        p, choice = self.p, self.rng.choice
        page, halves = p.page_lines * p.lanes, p.buffer_lines * p.lanes
        while True:
            d = p.lanes * int(self.rng.integers(1, p.max_channels // p.lanes + 1))
            rows = int(choice([1, 2, 4, page // d or 1]))
            channels = int(choice([c for c in (1, 2, 4) if d % c == 0]))
            span = int(choice([p.lanes, 2 * p.lanes, 16])) // rows * rows
            if (
                span
                and span % p.lanes == 0
                and rows * d <= page
                and channels * span <= page
                and span <= halves
                and rows <= arch.buffered_rows(p, d // p.lanes)
            ):
                return {"d": d, "page_tokens": rows, "page_channels": channels, "span": span}

    def _config(self) -> dict[str, Any]:
        p, g, pick = self.p, self.geometry, self.pick
        scale = np.float32(self.rng.choice([g["d"] ** -0.5, g["d"] ** -0.5, 2.0, -0.75, 0.0]))
        sparf = self.rng.integers(0, 4) > 0
        return {
            "attention": arch.ATTENTIONS[int(sparf)],
            "group": pick(1, p.max_group),
            "r": pick(1, min(g["d"] + 1, p.buffer_lines * p.lanes // g["span"])),
            "k": pick(1, int(self.rng.choice([3, 8, 20]))),
            "local": pick(0, 5) * int(self.rng.integers(0, 2)),
            "mean": pick(0, 1),
            "scale": hex(int(scale.view(np.uint32))),
            **g,
        }

    def _alike(self, values: Sequence[int], least: int = 1) -> tuple[int, int] | None:
        """A slot and heads of one value that is at least so much."""
        slots = [slot for slot, value in enumerate(values) if value >= least]
        if not slots:
            return None
        slot = int(self.rng.choice(slots))
        end = slot + 1
        while end < len(values) and values[end] == values[slot]:
            end += 1
        return slot, self.pick(1, end - slot)

    def _place(self, lines: int) -> int:
        """Somewhere among the vectors."""
        return self.pick(0, max(0, self.p.vector_lines - lines))

    def _write(self, tokens: int | None = None) -> dict[str, Any] | None:
        found = self._alike(self.written, 0)
        assert found is not None
        slot, heads = found
        g, first = self.geometry, self.written[slot]
        first = 0 if tokens is None and not self.rng.integers(0, 8) else first
        room = min(self.p.max_tokens, (1 << self.p.table_bits) // 2 * g["page_tokens"]) - first
        fill = max(2 * g["page_tokens"] + 1, g["span"] + 2)
        tokens = tokens or self.pick(1, min(room, int(self.rng.choice([fill, 2 * fill]))))
        lines = heads * tokens * g["d"] // self.p.lanes
        places = {"line": self._place(lines), "line2": self._place(lines)}
        return {"slot": slot, "heads": heads, "first": first, "tokens": tokens, **places}

    def _step(self) -> dict[str, Any] | None:
        return self._write(1)

    def _channels(self) -> dict[str, Any] | None:
        found = self._alike([n + 1 for n in self.spans])
        assert found is not None
        slot, heads = found
        g = self.geometry
        place = self._place(heads * g["d"] * g["span"] // self.p.lanes)
        return {"form": "channels", "slot": slot, "heads": heads, "first": self.spans[slot], "line": place}

    def _transpose(self) -> dict[str, Any] | None:
        ready = [n // self.geometry["span"] for n in self.written]
        found = self._alike(ready)
        if found is None:
            return None
        slot, heads = found
        return {"slot": slot, "heads": heads, "first": min(self.spans[slot], ready[slot] - 1)}

    def _attend(self) -> dict[str, Any] | None:
        found = self._alike(self.written)
        if found is None:
            return None
        (slot, heads), g = found, self.geometry
        written, size = self.written[slot], g["page_tokens"]
        tokens = self.pick((written - 1) // size * size + 1, written)
        whole = min(min(self.spans[slot : slot + heads]), tokens // g["span"])
        lines = heads * self.p.max_group * g["d"] // self.p.lanes
        told = np.float32(1 / tokens if self.rng.integers(0, 4) else self.rng.choice([0, 1, 0.25]))
        return {
            "slot": slot,
            "heads": heads,
            "tokens": tokens,
            "spans": whole if self.rng.integers(0, 4) else self.pick(0, whole),
            "share": hex(int(told.view(np.uint32))),
            "line": self._place(lines),
            "line2": self._place(lines),
        }

    def _read(self) -> dict[str, Any] | None:
        g, form = self.geometry, int(self.rng.integers(0, 2))
        entries = [2 * (n // g["page_tokens"]) for n in self.written]
        count = g["d"] // g["page_channels"]
        held = [entries, [n * count for n in self.spans]][form]
        found = self._alike(held)
        if found is None:
            return None
        slot, heads = found
        first = self.pick(0, held[slot] - 1) if form == 0 else self.pick(0, self.spans[slot] - 1)
        n = self.pick(1, min(4, held[slot] - first * (count if form else 1)))
        place = self._place(heads * n * self.p.page_lines)
        return {
            "form": arch.FORMS[form],
            "slot": slot,
            "heads": heads,
            "first": first,
            "count": n,
            "line": place,
        }

    def _reclaim(self) -> dict[str, Any] | None:
        return {"count": self.pick(1, 2)}


def _program(spec: arch.CsdSpec, rng: Rng, number: int) -> str:
    """A random program; its number decides which kind, so that every kind occurs."""
    if number == 3:
        return "# nothing to do\n"
    w = _Writer(spec, rng)
    kind = number % len(_KINDS)
    weights = _KINDS[kind]
    names, shares = list(weights), np.array(list(weights.values()), float)
    for _ in range(3):  # something to attend to
        w.add("WRITE")
    for _ in range(int(rng.integers(8, 24))):
        w.add(str(rng.choice(names, p=shares / shares.sum())))
    if kind != 2:
        return "\n".join(w.lines) + "\n"
    # Once more what may be said twice.
    head, again = len(w.lines), [f"{w.configuration} tag={w.tags[0]}"]
    for _ in range(6):
        w.add(str(rng.choice(["ATTEND", "READ", "TRANSPOSE"])))
    text = "\n".join([*w.lines[:head], ".segment repeat=2 label=again", *again, *w.lines[head:]]) + "\n"
    try:
        meaning.interpret(spec, ISA.assemble(text), meaning.blank_image(spec.params()))
    except ValueError:
        return "\n".join(w.lines) + "\n"
    return text


def cases(structure: Structure, count: int, seed: Sequence[int]) -> list[Case]:
    """`count` cases; equal seeds give equal cases."""
    return [case(structure, number, seed) for number in range(count)]


def case(structure: Structure, number: int, seed: Sequence[int]) -> Case:
    """Case `number`, which also decides what kind of program and of image it has."""
    rng = np.random.default_rng([*seed, number])
    spec = structure.spec
    assert isinstance(spec, arch.CsdSpec)
    if not structure.keep_timing:
        spec = _timed(spec, rng, number)
    return Case(spec, _program(spec, rng, number), 5 * int(rng.integers(0, 1 << 40)) + number % 5)


# ---- images -------------------------------------------------------------------------------------------


def _numbers(count: int, kind: int, rng: Rng) -> np.ndarray:
    """FP16 encodings: 0 ordinary numbers, 1 with specials, 2 large ones and ties, 3 tiny ones, 4 any bits."""
    if kind == 4:
        return rng.integers(0, 1 << FP16.width, count)
    values = rng.standard_normal(count)
    if kind == 2:
        values = np.ldexp(rng.integers(-16, 17, count), int(rng.integers(-2, 12)))
    elif kind == 3:
        values = np.ldexp(values, 1 - FP16.bias - rng.integers(-6, FP16.mantissa_bits, count))
    bits = to_bits(values, FP16).astype(np.int64)
    if kind == 1:
        special = [0, 1, FP16.min_normal - 1, FP16.min_normal, FP16.max_finite, FP16.overflow, FP16.nan]
        special += [FP16.sign | v for v in special]
        bits = np.where(rng.random(count) < 0.02, rng.choice(special, count), bits)
    return bits


def image(spec: arch.CsdSpec, seed: int) -> dict[str, np.ndarray]:
    """A memory image; the seed's remainder by 5 is the kind of its vectors. All else is any bits: it is written before
    it is read."""
    rng = np.random.default_rng(seed)
    out = meaning.blank_image(spec.params())
    for array in out.values():
        array[...] = rng.integers(0, 1 << 8 * array.itemsize, array.shape)
    vectors = out["vectors"]
    vectors[...] = _numbers(vectors.size, seed % 5, rng).reshape(vectors.shape)
    return out


# ---- the three readings -------------------------------------------------------------------------------


def interpret(
    spec: arch.CsdSpec, program: Program, image: Image
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    return meaning.interpret(spec, program, image)


def simulate(
    spec: arch.CsdSpec,
    program: Program,
    *,
    fold: bool,
    trace: bool,
    decisions: Mapping[str, Any] | None = None,
) -> Timeline:
    return sim.simulate(spec.params(), program, fold=fold, trace=_TRACED if trace else 0, decisions=decisions)


def build(spec: arch.CsdSpec, waves: bool) -> "Build":
    from tilewright.rtl.csd.run import build_rtl

    return build_rtl(spec, waves=waves)


def run_rtl(
    build: "Build", cases: Sequence[tuple[arch.CsdSpec, Program, Image]], waves: Path | None
) -> "list[Outcome]":
    from tilewright.rtl.csd.run import Case as RtlCase
    from tilewright.rtl.csd.run import run_cases

    jobs = [RtlCase(s.params(), program, image) for s, program, image in cases]
    return run_cases(build, jobs, waves=waves, slack=max(_slack(s, program) for s, program, _ in cases))


def _slack(spec: arch.CsdSpec, program: Program) -> int:
    """Ticks that are no hang: waiting for `not_before`, and for every page by itself."""
    code, t = program.flat(), spec.flash_device.timing
    late = int(code["not_before"].max(initial=0))
    pages = int((code["heads"].astype(np.int64) << spec.dram.table_bits).sum())
    erases = int(code["count"][code["op"] == arch.OP["RECLAIM"]].sum()) * spec.flash_device.params().units
    longest = max(value for name, value in t.items() if name.startswith(("read", "program")))
    return late + pages * (longest + t["page_transfer"]) + erases * t["erase"]


# ---- referee and coverage -----------------------------------------------------------------------------


def referee(spec: arch.CsdSpec, timeline: Timeline) -> str | None:
    """Laws that hold whatever the rules of time: buses carry what is counted, a line a tick is moved."""
    totals, t, planes = timeline.totals(), spec.flash_device.timing, spec.flash.geometry.planes_per_die
    counts = {
        "read": sum(totals[name] for name in ("channel_pages", "token_pages", "other_pages")),
        "program": totals["programs"],
        "erase": totals["erases"],
    }
    low = high = 0
    for kind, n in counts.items():
        moved = n * t["page_transfer"] if kind != "erase" else 0
        most = planes if spec.flash.scheduler.multi_plane else 1
        bounds = [
            moved + c * t[f"{kind}_command"] + (n - c) * t[f"{kind}_command_plane"]
            for c in (-(-n // most), n)
        ]
        low, high = low + min(bounds), high + max(bounds)
    busy = sum(timeline.unit(unit)["busy"] for unit in timeline.units if unit.startswith("channel "))
    if not low <= busy <= high:
        return f"channels are busy for {busy} ticks, with operations of {low}..{high}"
    kernels = spec.engine.kernels
    for name, most in (
        ("forwarded_lines", kernels + 1),
        ("products", kernels),
        ("exponentials", kernels * spec.engine.lanes),
    ):
        if totals[name] > most * timeline.ticks:
            return f"{totals[name]} {name} in {timeline.ticks} ticks, at most {most} a tick"
    if totals["compared_words"] > timeline.unit("argtopk")["busy"]:
        return f"{totals['compared_words']} words compared in {timeline.unit('argtopk')['busy']} ticks of argtopk"
    return None


def commands(spec: arch.CsdSpec, model: Timeline, rtl: Timeline) -> str | None:
    """Nothing: the commands of its channels are not traced."""
    return None


_STALLS = {
    "decoder": ("queue", "order", "arrival", "drain"),
    "writer": ("flash", "queue", "idle"),
    "fetch": ("queue", "drain", "idle"),
    "argtopk": ("idle",),
    "kernel": ("flash", "argtopk", "idle"),
    "channel": ("array", "idle"),
}
_OPERATIONS = ("CONFIG", "ATTEND", "WRITE", "TRANSPOSE", "READ", "RECLAIM")  # the RTL's
COVERAGE = (
    *(f"command {name}" for name in _OPERATIONS),
    *(f"{unit} stall {cause}" for unit, causes in _STALLS.items() for cause in causes),
    *(f"counter {name}" for name in arch.COUNTERS),
    *(f"attention {kind}" for kind in arch.ATTENTIONS),
    *("k covers all tokens", "r covers all channels", "mean", "no mean", "group of one", "group of several"),
    *("local tokens", "more local tokens than k", "one token", "last group partial"),
    *("estimate of whole spans", "estimate of spans and tail", "estimate of a tail alone"),
    *("group buffer alone", "group buffer and flash", "several heads", "more heads than kernels"),
    *("a head with no page of a span", "a page of which some tokens are selected"),
    *("write of tokens", "write of channels", "write begins within a group", "write fills no group"),
    *("write fills several groups", "slot begins anew", "read of tokens", "read of channels"),
    *("log in its second round", "last vector line", "operand buffer filled more than once"),
    *(
        "after the drive",
        "not_before waits",
        "not_before past",
        "tag shared",
        "segment repeated",
        "empty program",
    ),
    *(f"result {kind}" for kind in ("nan", "infinity", "subnormal", "zero", "normal")),
)


def count(observed: Observed) -> Counter[str]:
    """What the case exercised, by the names of COVERAGE."""
    spec, timeline = observed.case.spec, observed.timeline
    assert isinstance(spec, arch.CsdSpec)
    code = observed.steps.flat()
    out: Counter[str] = Counter()
    for unit in timeline.units:
        for cause, ticks in timeline.unit(unit).items():
            out[f"{unit.split()[0]} stall {cause}"] += ticks if cause != "busy" else 0
    out.update({f"counter {name}": value for name, value in timeline.totals().items()})
    out["empty program"] += len(code) == 0
    for segment in observed.program.segments:
        out["segment repeated"] += segment.repeat > 1
        tags = segment.regions["code"]["tag"]
        out["tag shared"] += len(tags) - len(np.unique(tags))
    firsts = {int(span["tag"]): int(span["first"]) for span in timeline.spans}
    selections = iter(observed.decisions["selections"])
    pages = np.zeros(spec.flash.geometry.channels)
    f: dict[str, int]
    config: dict[str, int] = {}
    for i, record in enumerate(code):
        f = dict(zip(record.dtype.names, record.tolist(), strict=True))
        op = arch.OPS[f["op"]].name
        config = f if op == "CONFIG" else config
        out[f"command {op}"] += 1
        out["after the drive"] += f["after"] & arch.AFTER_DRIVE > 0
        out["not_before past"] += 0 < f["not_before"] < firsts[i]
        out["not_before waits"] += firsts[i] - f["not_before"] in (0, 1) and f["not_before"] > 0
        out["several heads"] += f["heads"] > 1
        if op == "ATTEND":
            out += _count_attention(spec, config, f, next(selections))
        elif op == "WRITE":
            out += _count_write(spec, config, f)
        elif op == "READ":
            out[f"read of {arch.FORMS[f['form']]}"] += 1
    written = timeline.counter("programs") / len(pages)
    block = spec.flash_pages / len(pages) / spec.flash.geometry.blocks_per_plane
    out["log in its second round"] += written > block * spec.flash.geometry.blocks_per_plane
    return +(out + _count_results(observed))


def _count_attention(
    spec: arch.CsdSpec, config: Mapping[str, int], f: Mapping[str, int], selection: Selection
) -> Counter[str]:
    out: Counter[str] = Counter()
    tokens, size, d = f["tokens"], config["page_tokens"], config["d"]
    groups = arch.groups(tokens, size)
    out[f"attention {arch.ATTENTIONS[config['attention']]}"] += 1
    out["group of one" if config["group"] == 1 else "group of several"] += 1
    out["one token"] += tokens == 1
    out["last group partial"] += tokens % size > 0
    out["group buffer alone" if groups <= 2 else "group buffer and flash"] += 1
    out["more heads than kernels"] += f["heads"] > spec.engine.kernels
    out["last vector line"] += (
        f["line2"] + f["heads"] * config["group"] * d // spec.engine.lanes == spec.dram.vector_lines
    )
    out["operand buffer filled more than once"] += (
        tokens * d > spec.engine.batches * spec.engine.buffer_lines * spec.engine.lanes
    )
    if not config["attention"]:
        return out
    if config["k"] >= tokens:
        out["k covers all tokens"] += 1
        return out
    out["r covers all channels"] += config["r"] >= d
    out["mean" if config["mean"] else "no mean"] += 1
    out["local tokens"] += 0 < config["local"] <= config["k"]
    out["more local tokens than k"] += config["local"] > config["k"]
    whole = f["spans"] * config["span"]
    out["estimate of whole spans" if whole == tokens else "estimate of spans and tail"] += whole > 0
    out["estimate of a tail alone"] += whole == 0
    used = selection.channels.reshape(f["heads"], -1, config["page_channels"]).any(axis=-1)
    out["a head with no page of a span"] += int(np.count_nonzero(np.any(~used, axis=1))) if whole else 0
    padded = np.zeros((f["heads"], groups * size), np.bool_)
    padded[:, :tokens] = selection.tokens
    chosen = padded.reshape(f["heads"], groups, size)
    out["a page of which some tokens are selected"] += int((chosen.any(axis=-1) & ~chosen.all(axis=-1)).sum())
    return out


def _count_write(spec: arch.CsdSpec, config: Mapping[str, int], f: Mapping[str, int]) -> Counter[str]:
    out: Counter[str] = Counter()
    out[f"write of {arch.FORMS[f['form']]}"] += 1
    if f["form"] == arch.FORMS.index("tokens"):
        size, first = config["page_tokens"], f["first"]
        filled = (first + f["tokens"]) // size - first // size
        out["write begins within a group"] += first % size > 0
        out["write fills no group"] += filled == 0
        out["write fills several groups"] += filled > 1
        out["slot begins anew"] += first == 0
    return out


def _count_results(observed: Observed) -> Counter[str]:
    """The kinds of number that appear in the vectors and were not there before."""
    out: Counter[str] = Counter()
    before, after = observed.before["vectors"], observed.after["vectors"]
    magnitude = after[after != before].astype(np.int64) & (FP16.sign - 1)
    out["result nan"] += int((magnitude > FP16.overflow).sum())
    out["result infinity"] += int((magnitude == FP16.overflow).sum())
    out["result subnormal"] += int(((magnitude > 0) & (magnitude < FP16.min_normal)).sum())
    out["result normal"] += int(((magnitude >= FP16.min_normal) & (magnitude < FP16.overflow)).sum())
    out["result zero"] += int((magnitude == 0).sum())
    return out
