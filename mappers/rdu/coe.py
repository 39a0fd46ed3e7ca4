"""Compositions of experts: a router, and experts that wait in DDR until a prompt needs them.

As the paper has it (Prabhakar et al., arXiv 2405.07518, V and VI-C): the router reads all prompts of a round in one
pass, its weights and KV cache always in HBM; then each prompt is read and continued by its own expert, one after the
other at batch 1. An expert that is not in HBM is first copied from DDR, by the DMA and by all sockets at once, each
its share. All addresses are fixed beforehand:

    HBM   router | the experts' KV cache and activations | region 0 | region 1 | ...
    DDR   what the models themselves keep there | expert 0 | expert 1 | ...

A region holds the weights of one expert. The one used least recently gives way; weights are read only, so that
nothing is ever written back. One KV cache is enough, since only one expert is at work, from the prompt to the last
token.

The experts' program is mapped once. A run of it in another region has other address arguments and shares everything
else; a run in the same region is the same segments.
"""

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from math import ceil
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.arch.errors import UserError, nearest
from tilewright.arch.isa import Program, Segment
from tilewright.arch.rdu import CODE, ISA, OP, TIERS, RduSpec
from tilewright.arch.scenario import Mapped, Scenario, TagInfo
from tilewright.workloads.models import ModelConfig

MapOne = Callable[[RduSpec, ModelConfig, Scenario, Mapping[str, Any] | None], Mapped]
SWITCHING = ("exposed", "overlapped")
KEYS = ("switching", "requests", "round", "regions", "resident", "router", "expert")
HBM, DDR = TIERS.index("hbm"), TIERS.index("ddr")


def map_composition(
    spec: RduSpec,
    model: ModelConfig,
    scenario: Scenario,
    mapping: Mapping[str, Any] | None,
    map_one: MapOne,
) -> Mapped:
    """The program of a composition: `scenario.batch` prompts, each read and continued by the expert it is sent to.

    `map_one` maps one model. Its segments load, give arguments and execute; the argument registers hold addresses of a
    memory that begins with the model's weights, and its document says how large the parts are, in bytes of one
    socket: `memory: {hbm: {weights: n, <part>: n, ...}, ddr: {<part>: n, ...}}`. Parts follow one another in that
    order, each from a whole line on.

    Keys of `mapping`, all optional, beside those of `map_one` (for both models, or below `router` and `expert`):

    - `requests`: the expert of each prompt; else drawn uniformly from `scenario.seed`.
    - `round`: prompts that the router reads in one pass, a divisor of the batch; else all.
    - `switching`: `exposed` (default) copies all experts that a round needs before the first one runs, as published,
      or as many as there are regions for; `overlapped` copies the next one while an expert runs.
    - `regions`: experts that HBM may hold; else as many as fit.
    - `resident`: experts that it holds at the start, the most recently used last; else none.

    Raises UserError for values that are not allowed, without a prompt or with a context, and where HBM or DDR is too
    small.
    """
    composition = model.composition
    assert composition is not None
    if not scenario.prompt or scenario.context:
        raise UserError(
            f"{model.name}: a composition is run from the prompt: --prompt must be at least 1 and --context 0, not "
            f"{scenario.prompt} and {scenario.context}"
        )
    options = _Options.read(mapping or {}, model, scenario)
    router = map_one(
        spec,
        composition.router,
        replace(scenario, batch=options.round, generate=0),
        options.router,
    )
    expert = map_one(
        spec,
        replace(model, composition=None, name=f"an expert of {model.name}"),
        replace(scenario, batch=1),
        options.expert,
    )
    layout = _Layout.plan(spec, model, router, expert, options)
    asked = options.requests
    events = schedule(
        [asked[i : i + options.round] for i in range(0, len(asked), options.round)],
        layout.regions, options.resident, options.switching == "overlapped",
    )  # fmt: skip
    program = _Composed(spec, router, expert, layout)
    for event in events:
        program.add(event)
    copies = sum(isinstance(event, Copy) for event in events)
    return Mapped(
        program=Program(ISA, program.segments, [tag.name.replace(" ", "_") for tag in program.tags]),
        tags=program.tags,
        steps=len(program.segments),
        step_of=program.step_of,
        document={
            "switching": options.switching,
            "round": options.round,
            "requests": list(options.requests),
            "regions": layout.regions,
            "resident": list(options.resident),
            "router": dict(router.document),
            "expert": dict(expert.document),
        },
        notes=[
            *layout.notes(spec, model),
            _traffic(spec, layout, len(asked), copies, options.switching),
            *(f"router: {note}" for note in router.notes),
            *(f"expert: {note}" for note in expert.notes),
        ],
        assumed=[*options.assumed, *dict.fromkeys((*router.assumed, *expert.assumed))],
        draw=expert.draw,
    )


# ---- what is asked for --------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Options:
    switching: str
    requests: tuple[int, ...]
    round: int
    regions: int | None
    resident: tuple[int, ...]
    router: Mapping[str, Any] | None
    expert: Mapping[str, Any] | None
    assumed: tuple[str, ...]

    @classmethod
    def read(cls, mapping: Mapping[str, Any], model: ModelConfig, scenario: Scenario) -> "_Options":
        assert model.composition is not None
        experts, batch = model.composition.experts, scenario.batch
        switching = mapping.get("switching", SWITCHING[0])
        if switching not in SWITCHING:
            raise UserError(
                f"mapping: switching: {switching!r} is unknown; {nearest(str(switching), SWITCHING)}"
            )
        at_once = mapping.get("round", batch)
        if type(at_once) is not int or at_once < 1 or batch % at_once:
            raise UserError(
                f"mapping: round must be a divisor of the {batch} prompts of the batch, not {at_once!r}"
            )
        regions = mapping.get("regions")
        if regions is not None and (type(regions) is not int or not 1 <= regions <= experts):
            raise UserError(f"mapping: regions must be in 1..{experts}, not {regions!r}")
        if regions == 1 < experts and switching == "overlapped":
            raise UserError("mapping: regions must be at least 2 for overlapped switching, not 1")
        resident = _experts(mapping.get("resident", []), "resident", experts)
        if len(set(resident)) < len(resident):
            raise UserError(f"mapping: resident must name each expert once, not {list(resident)}")
        assumed = [] if resident else ["no expert is in HBM at the start"]
        if "requests" in mapping:
            requests = _experts(mapping["requests"], "requests", experts)
            if len(requests) != batch:
                raise UserError(
                    f"mapping: requests must name an expert for each of the {batch} prompts of the batch, not "
                    f"{len(requests)}"
                )
        else:
            drawn = np.random.default_rng(scenario.seed).integers(experts, size=batch)
            requests = tuple(int(e) for e in drawn)
            assumed.append(f"the expert of each prompt: drawn uniformly, seed {scenario.seed}")
        common = {key: value for key, value in mapping.items() if key not in KEYS}
        own = {}
        for part in ("router", "expert"):
            value = mapping.get(part, {})
            if not isinstance(value, Mapping):
                raise UserError(f"mapping: {part} must be a mapping of keys to values, not {value!r}")
            own[part] = {**common, **value} or None
        return cls(
            switching, requests, at_once, regions, resident, own["router"], own["expert"], tuple(assumed)
        )


def _experts(value: Any, key: str, experts: int) -> tuple[int, ...]:
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise UserError(f"mapping: {key} must be a list of experts, not {value!r}")
    for e in value:
        if type(e) is not int or not 0 <= e < experts:
            raise UserError(f"mapping: {key} must list experts in 0..{experts - 1}, not {e!r}")
    return tuple(value)


# ---- who runs when, and where -------------------------------------------------------------------------


@dataclass(frozen=True)
class Copy:
    """An expert's weights begin to move from DDR to a region of HBM."""

    expert: int
    region: int


@dataclass(frozen=True)
class Wait:
    """Until all copies are done."""


@dataclass(frozen=True)
class Run:
    """The router (`region` None), or the expert that a region holds."""

    region: int | None


Event = Copy | Wait | Run


class Regions:
    """Which expert each region holds; the expert used least recently gives way."""

    def __init__(self, regions: int, resident: Sequence[int] = ()) -> None:
        kept = resident[max(0, len(resident) - regions) :]
        self._where = {expert: region for region, expert in enumerate(kept)}  # least recently used first
        self._free = list(range(len(kept), regions))

    def __contains__(self, expert: int) -> bool:
        return expert in self._where

    def use(self, expert: int, keep: Collection[int] = ()) -> tuple[int, bool]:
        """The region of the expert, and whether it must be copied there; experts of `keep` don't give way."""
        copied = expert not in self._where
        if not copied:
            region = self._where.pop(expert)
        elif self._free:
            region = self._free.pop(0)
        else:
            region = self._where.pop(next(e for e in self._where if e not in keep))
        self._where[expert] = region
        return region, copied


def schedule(
    rounds: Sequence[Sequence[int]], regions: int, resident: Sequence[int] = (), overlapped: bool = False
) -> list[Event]:
    """What happens in order, for the experts asked for in each round."""
    held = Regions(regions, resident)
    events: list[Event] = []
    for requests in rounds:
        events.append(Run(None))
        events += _overlapped(requests, held) if overlapped else _exposed(requests, held, regions)
    return events


def _exposed(requests: Sequence[int], held: Regions, regions: int) -> list[Event]:
    events: list[Event] = []
    first = 0
    while first < len(requests):
        needed: dict[int, None] = {}  # of as many requests as there are regions for
        end = first
        while end < len(requests) and (requests[end] in needed or len(needed) < regions):
            needed[requests[end]] = None
            end += 1
        copies = [Copy(e, region) for e in needed for region, copied in [held.use(e, needed)] if copied]
        events += [*copies, Wait()] if copies else []
        events += [Run(held.use(e)[0]) for e in requests[first:end]]
        first = end
    return events


def _overlapped(requests: Sequence[int], held: Regions) -> list[Event]:
    events: list[Event] = []
    before: Run | None = None
    for e in requests:
        region, copied = held.use(e)  # not that of the one before, which was used last
        events += [Copy(e, region)] if copied else []
        events += [before] if before else []
        events += [Wait()] if copied else []
        before = Run(region)
    return [*events, before] if before else events


# ---- addresses ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Layout:
    """Bytes of one socket, all whole lines."""

    router: int
    """All that the router has in HBM."""
    shared: int
    """What all experts have in one place: KV cache and whatever else is no weight."""
    weights: int
    """Of one expert."""
    regions: int
    router_ddr: int
    shared_ddr: int
    room: int
    """Regions that HBM has room for."""

    @classmethod
    def plan(
        cls, spec: RduSpec, model: ModelConfig, router: Mapped, expert: Mapped, options: _Options
    ) -> "_Layout":
        assert model.composition is not None
        experts = model.composition.experts

        def size(mapped: Mapped, tier: str) -> dict[str, int]:
            parts = mapped.document["memory"].get(tier, {})
            return {name: -(-int(n) // spec.line_bytes) * spec.line_bytes for name, n in parts.items()}

        hbm = size(expert, "hbm")
        weights = hbm.pop("weights")
        own, shared = sum(size(router, "hbm").values()), sum(hbm.values())
        router_ddr, shared_ddr = (sum(size(m, "ddr").values()) for m in (router, expert))
        each = f"{spec.node.sockets} sockets each" if spec.node.sockets > 1 else "the socket"
        room = (spec.memory.hbm.bytes - own - shared) // weights
        needed = options.regions or min(len(set(options.requests)), 1 + (options.switching == "overlapped"))
        if room < needed:
            raise UserError(
                f"{model.name} does not fit {spec.name}: {each} need {_gb(own + shared + needed * weights)} of HBM "
                f"(router {_gb(own)}, the experts' cache {_gb(shared)}, {needed} x {_gb(weights)} of "
                f"weights) and have {_gb(spec.memory.hbm.bytes)}"
            )
        ddr = router_ddr + shared_ddr + experts * weights
        if ddr > spec.memory.ddr.bytes:
            raise UserError(
                f"{model.name} does not fit {spec.name}: {each} need {_gb(ddr)} of DDR ({experts} x {_gb(weights)} of "
                f"experts' weights, {_gb(router_ddr + shared_ddr)} for other things) and have "
                f"{_gb(spec.memory.ddr.bytes)}"
            )
        regions = options.regions or min(room, experts)
        return cls(own, shared, weights, regions, router_ddr, shared_ddr, room)

    def region(self, index: int) -> int:
        """First byte of a region of HBM."""
        return self.router + self.shared + index * self.weights

    def expert(self, index: int) -> int:
        """First byte of an expert in DDR."""
        return self.router_ddr + self.shared_ddr + index * self.weights

    def moved(self, tier: int, address: int, region: int) -> int:
        """Where something lies that an expert by itself would have at `address`."""
        if tier == DDR:
            return address + self.router_ddr
        if tier != HBM:
            return address
        return address + (self.region(region) if address < self.weights else self.router - self.weights)

    def notes(self, spec: RduSpec, model: ModelConfig) -> list[str]:
        assert model.composition is not None
        sockets = spec.node.sockets
        in_ddr = (spec.memory.ddr.bytes - self.router_ddr - self.shared_ddr) // self.weights
        held = "" if self.regions == self.room else f", of which {self.regions} are used"
        beside = (
            f"{_gb(sockets * self.router)} of router and {_gb(sockets * self.shared)} of the experts' cache"
        )
        return [
            f"weights of an expert {_gb(sockets * self.weights)}: beside {beside}, HBM has room for {self.room}{held}",
            f"DDR has room for {in_ddr} experts and holds {model.composition.experts}",
        ]


def _gb(n: int) -> str:
    return f"{n / 1e9:.4g} GB"


def copy_ticks(spec: RduSpec, lines: int) -> int:
    """Ticks of a COPY out of DDR, from its issue until the DMA is idle again (rules of rtl/rdu/sequencer.py)."""
    beats = -(-lines // spec.node.copy_lines)
    return 1 + ceil((beats - 1) / spec.copy_rate) + spec.latencies[DDR] + 2


def _traffic(spec: RduSpec, layout: _Layout, requests: int, copies: int, switching: str) -> str:
    ms = 1000 * float(copy_ticks(spec, layout.weights // spec.line_bytes) * spec.tick.period_s)
    hits = requests - copies
    return (
        f"{requests} requests, {copies} experts copied in {ms:.4g} ms each, {switching}; "
        f"{hits} of {requests} found theirs in HBM ({100 * hits / requests:.3g} %)"
    )


# ---- the program --------------------------------------------------------------------------------------


class _Composed:
    """Segments of the whole, made run by run."""

    def __init__(self, spec: RduSpec, router: Mapped, expert: Mapped, layout: _Layout) -> None:
        self.segments: list[Segment] = []
        self.step_of: list[int] = []
        self.tags = [
            *(TagInfo(f"router {t.name}", f"router {t.op}", t.layer) for t in router.tags),
            *(TagInfo(f"expert {t.name}", f"expert {t.op}", t.layer) for t in expert.tags),
            TagInfo("copy expert", "copy expert", -1),
            TagInfo("wait for expert", "wait for expert", -1),
        ]
        self._layout = layout
        self._lines = layout.weights // spec.line_bytes
        self._line_bytes = spec.line_bytes
        self._steps = 0
        self._router = _Part(router, 0)
        self._expert = _Part(expert, len(router.tags))
        self._placed: dict[int | None, list[Segment]] = {}

    def add(self, event: Event) -> None:
        """Append what the event does."""
        if isinstance(event, Run):
            part = self._router if event.region is None else self._expert
            if event.region not in self._placed:
                self._placed[event.region] = part.placed(len(self.segments), self._layout.moved, event.region)
            self.segments += self._placed[event.region]
            self.step_of += [self._steps + step for step in part.step_of]
            self._steps += part.steps
        else:
            if isinstance(event, Copy):
                code = CODE.make(
                    "COPY", source=DDR, target=HBM, lines=self._lines, tag=len(self.tags) - 2,
                    **{
                        "from": self._layout.expert(event.expert) // self._line_bytes,
                        "to": self._layout.region(event.region) // self._line_bytes,
                    },
                )  # fmt: skip
            else:
                code = CODE.make("WAIT", tag=len(self.tags) - 1)
            self.segments.append(Segment({"code": code}))
            self.step_of.append(self._steps)


class _Part:
    """A mapped model as a part of a larger program."""

    def __init__(self, mapped: Mapped, first_tag: int) -> None:
        # One array stays one array; both are kept, as long as their identities are told apart by number.
        renamed: dict[int, tuple[NDArray[Any], NDArray[Any]]] = {}

        def retag(records: NDArray[Any]) -> NDArray[Any]:
            if first_tag and "tag" in (records.dtype.names or ()):
                if id(records) not in renamed:
                    renamed[id(records)] = records, records.copy()
                    renamed[id(records)][1]["tag"] += first_tag
                return renamed[id(records)][1]
            return records

        self._segments = [
            replace(s, regions={region: retag(records) for region, records in s.regions.items()})
            for s in mapped.program.segments
        ]
        steps = range(len(self._segments)) if mapped.step_of is None else mapped.step_of
        self.step_of = list(steps)
        self.steps = max(self.step_of) + 1
        self._tiers = self._memories()

    def _memories(self) -> dict[int, dict[int, int]]:
        """Segment -> argument register -> memory that its address belongs to, by the kernels that get them."""
        out: dict[int, dict[int, int]] = {}
        configured: dict[int, int] = {}
        given: list[int] = []
        for s in self._segments:
            for record in s.regions["code"]:
                if record["op"] == OP["PROGRAM_LOAD"]:
                    units = self._segments[record["section"]].regions.get("config.agcu", ())
                    configured = {int(unit["argument"]): int(unit["tier"]) for unit in units}
                elif record["op"] == OP["ARGUMENT_LOAD"]:
                    given.append(int(record["section"]))
                elif record["op"] == OP["KERNEL_EXECUTE"]:
                    for section in given:
                        out.setdefault(section, {}).update(configured)
                    given = []
        return out

    def placed(self, first: int, moved: Callable[[int, int, int], int], region: int | None) -> list[Segment]:
        """The segments as those from `first` on of a program, with addresses for the region."""
        out = []
        for index, s in enumerate(self._segments):
            code = s.regions["code"].copy()
            loads = (code["op"] == OP["PROGRAM_LOAD"]) | (code["op"] == OP["ARGUMENT_LOAD"])
            section = CODE.by_name["section"]
            if loads.any() and int(code["section"][loads].max()) + first > section.high:
                raise UserError(
                    f"a program of more than {section.high + 1} segments: fewer tokens or fewer regions are allowed"
                )
            code["section"][loads] += first
            own = {"code": code}
            if region is not None and "args" in s.regions:
                own["args"] = s.regions["args"].copy()
                tiers = self._tiers.get(index, {})
                for record in own["args"]:
                    tier = tiers.get(int(record["index"]))
                    if tier is not None:
                        record["value"] = moved(tier, int(record["value"]), region)
            out.append(replace(s, regions={**s.regions, **own}))
        return out
