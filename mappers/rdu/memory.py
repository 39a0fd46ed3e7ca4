"""Where tensors lie off chip: part after part, weights, cache, rows and tables; experts in HBM or on their way there."""

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from tilewright.arch.errors import UserError
from tilewright.arch.isa import Segment
from tilewright.arch.rdu import CODE, TIERS, RduSpec
from tilewright.arch.scenario import Scenario
from tilewright.mappers.rdu import mixture, train, vision
from tilewright.mappers.rdu.coe import copy_ticks
from tilewright.mappers.rdu.launches import Copies, Launch, Moves
from tilewright.mappers.rdu.layer import SLOT
from tilewright.mappers.rdu.search import Kernel
from tilewright.mappers.rdu.stages import BF16_BYTES, Region, ceil_div
from tilewright.workloads.models import ModelConfig

__all__ = ["ACTIVATIONS", "Memory", "is_row"]

PARTS = ("weights", "cache", "rows", "tables")  # of a socket's memory, in order of their addresses
SHARED = ("cos", "sin", "mask", "slopes")
ACTIVATIONS = (
    *("x", "z", "y", "h", "h2", "s", "s2", "qkv", "q", "a", "o", "w", "f"),
    *("gate_out", "up_out", "o_part", "w_part", "logits", "last", "r", "e", "spare", "patch"),
)
PARAMETERS = (".w", ".gain", ".bias")
EXPERT = "expert."


def is_row(tensor: str) -> bool:
    """Whether a tensor holds rows between sections; in a mixture each slot has its own."""
    return tensor.split(".")[0] in ACTIVATIONS and not tensor.endswith(PARAMETERS)


class Memory:
    """Gives every tensor of a plan its address, in lines of its own.

    `address` has bytes by key: (phase or kind, tensor, layer).

    Parameters
    ----------
    spec : RduSpec
    model : ModelConfig
    scenario : Scenario
    kernels, launches : list
        The plan. `launches` becomes a new list, with copies of experts where they are needed.
    cache_bytes : int
        Keys, or values, of a layer and sequence.
    rows_bytes : int
        What rows between sections take at least.
    apart : bool
        Each phase has weights of its own.
    regions : int, optional
        Experts that HBM may hold; by default all for which there is room.
    """

    def __init__(
        self, spec: RduSpec, model: ModelConfig, scenario: Scenario, kernels: Sequence[Kernel],
        launches: Sequence[Launch | Copies | Moves], *, cache_bytes: int, rows_bytes: int = 0, apart: bool = True,
        regions: int | None = None,
    ) -> None:  # fmt: skip
        self.spec, self.model, self.scenario, self.kernels = spec, model, scenario, kernels
        self.launches = list(launches)
        self.apart, self._regions = apart, regions
        self._cache_bytes = cache_bytes
        self._widest = max(rows_bytes, self._largest())
        self.address: dict[tuple[str, str, int], int] = {}
        self.used = {"hbm": 0, "ddr": 0, "remote": 0}
        self.notes: list[str] = []
        self.assumed: list[str] = []
        self._within: dict[tuple[object, ...], int] = {}
        self.told = self._lay_out()
        """Bytes of the parts, by tier."""

    def _tensor(self, tensor: str, layer: int, kernel: Kernel) -> tuple[str, tuple[str, str, int], int]:
        """The part of the memory that a tensor belongs to, its key there, and its bytes."""
        size = kernel.choice.line.extents[tensor]
        tier = kernel.choice.line.tiers[tensor]
        if kernel.phase == train.PHASE:
            return *train.place(tensor, layer), size
        if kernel.phase == vision.PHASE:
            if tensor in ("x", "z"):  # the kernels before the first layer have number -1
                return "rows", ("rows", f"vision {'xz'[(layer + (tensor == 'z')) % 2]}", -1), self._widest
            if tensor in ("keys", "values"):  # of one layer at a time
                return "cache", ("cache", f"vision {tensor}", -1), size
            if tensor == vision.PIXELS:
                return "rows", ("rows", tensor, -1), size
        if tensor in ("x", "z") and layer >= 0:  # a layer reads what the one before wrote
            return "rows", ("rows", "xz"[(layer + (tensor == "z")) % 2], -1), self._widest
        if tensor == "x":
            return "rows", ("rows", "xz"[self.model.layers % 2], -1), self._widest
        if tensor in ("keys", "values", "keys.new", "values.new"):
            size = self.scenario.batch * self._cache_bytes
            return "cache", ("cache", tensor.split(".")[0], layer), size
        if tensor in SHARED:
            return "tables", (kernel.phase, tensor, -1), size
        if is_row(tensor) or tier == "remote":
            return "rows", ("rows", tensor, -1), self._widest
        phase = f"{kernel.phase} {kernel.name}" if kernel.phase != "prompt" else "prompt"
        return "weights", (phase, tensor, layer), size

    def _lay_out(self) -> dict[str, dict[str, int]]:
        """Give every tensor its address, in lines of its own, part after part; bytes of the parts by tier."""
        line = self.spec.line_bytes
        parts: dict[str, dict[str, dict[str, dict[tuple[str, str, int], int]]]] = {}
        for launch in self.launches:
            if isinstance(launch, Launch) and launch.kernel >= 0:
                kernel = self.kernels[launch.kernel]
                for r in kernel.choice.line.arguments:
                    if r.tensor.startswith(EXPERT):
                        continue
                    if r in launch.where:
                        rows = parts.setdefault("hbm", {name: {} for name in PARTS})["rows"]
                        size = (
                            kernel.choice.line.extents[r.tensor]
                            if r.tensor.startswith(SLOT)
                            else self._widest
                        )
                        rows.setdefault("", {})["rows", launch.where[r][0], -1] = size
                        continue
                    part, key, size = self._tensor(r.tensor, launch.depth, kernel)
                    tier = kernel.choice.line.tiers[r.tensor]
                    if (
                        launch.layer < 0 or part == "tables"
                    ):  # passes of the head lie side by side, and positions
                        size += launch.slot.get(r.tensor, 0)
                    # Phases whose weights are the same begin at the same address.
                    phase = kernel.phase if part == "weights" and not self.apart else ""
                    group = parts.setdefault(tier, {name: {} for name in PARTS})[part].setdefault(phase, {})
                    group[key] = max(group.get(key, 0), size)
        told: dict[str, dict[str, int]] = {}
        for tier, named in parts.items():
            for part, phases in named.items():
                first = end = self.used[tier]
                # The head's weights are no layer's.
                common = {**phases.pop("head", {}), **phases.pop(vision.PHASE, {})}
                for group in phases.values():
                    at = first
                    for key, size in group.items():
                        self.address[key] = at
                        at += ceil_div(size, line) * line
                    end = max(end, at)
                for key, size in common.items():
                    self.address[key] = end
                    end += ceil_div(size, line) * line
                self.used[tier] = end
                told.setdefault(tier, {})[part] = end - first
        if self.model.experts:
            for tier, size in self._lay_out_experts().items():
                told.setdefault(tier, {})["experts"] = size
        return told

    def _place(self, tensor: str, layer: int, kernel: Kernel) -> int:
        """The first byte of a tensor."""
        return self.address[self._tensor(tensor, layer, kernel)[1]]

    def _largest(self) -> int:
        """Bytes of the largest matrix between sections."""
        sizes = (
            n
            for k in self.kernels
            for t, n in k.choice.line.extents.items()
            if is_row(t) or k.choice.line.tiers[t] == "remote"
        )
        return max(sizes, default=0) * max(1, self.scenario.batch)

    def arguments(self, launch: Launch) -> dict[int, int]:
        """What a launch's argument registers hold: byte addresses."""
        kernel = self.kernels[launch.kernel]

        def value(r: Region) -> int:
            if r.tensor.startswith(EXPERT):
                return self._expert_place(launch, r.tensor) + r.offset
            if r in launch.where:
                tensor, at = launch.where[r]
                return self.address["rows", tensor, -1] + at
            return self._place(r.tensor, launch.depth, kernel) + r.offset + launch.slot.get(r.tensor, 0)

        return {i: value(r) for i, r in enumerate(kernel.choice.line.arguments)}

    def moves(self, moves: Moves, tag: int) -> Segment:
        """The DMA's copies of rows, those that lie side by side at once."""
        line = self.spec.line_bytes
        row = self.model.d_model * BF16_BYTES // line
        runs: list[
            list[int]
        ] = []  # of rows that lie side by side, before and after: first lines, and how many
        for source, a, target, b in moves.rows:
            start, end = (
                self.address["rows", names[n], -1] // line + at * row
                for names, n, at in ((moves.source, source, a), (moves.target, target, b))
            )
            if runs and runs[-1][0] + runs[-1][2] == start and runs[-1][1] + runs[-1][2] == end:
                runs[-1][2] += row
            else:
                runs.append([start, end, row])
        hbm = TIERS.index("hbm")
        codes = [
            CODE.make("COPY", source=hbm, target=hbm, lines=lines, tag=tag, **{"from": start, "to": end})
            for start, end, lines in runs
        ]
        return Segment({"code": np.concatenate([*codes, CODE.make("WAIT", tag=tag)])}, label=moves.tag)

    # ---- experts ------------------------------------------------------------------------------------

    def _stored(self, kernel: Kernel, tensor: str) -> tuple[object, ...]:
        """What part of an expert's weights a section reads, and in what order: equal for slots that read the same."""
        slot, *rest = tensor.removeprefix(EXPERT).split(".")
        names = (op.name.removesuffix(f"_{slot}") for op in kernel.choice.ops if op.slot == int(slot))
        return kernel.phase, *names, *(f"{k} {v}" for k, v in kernel.choice.tiles.items()), *rest

    def _lay_out_experts(self) -> dict[str, int]:
        """Give each expert its place in HBM, or one in DDR and, while it is at work, a region; bytes of both."""
        m, line = self.model, self.spec.line_bytes
        ends: dict[str, int] = {}
        used: list[tuple[int, Launch, list[mixture.Expert]]] = []
        for at, launch in enumerate(self.launches):
            if not isinstance(launch, Launch) or not launch.experts:
                continue
            kernel = self.kernels[launch.kernel]
            for tensor, size in kernel.choice.line.extents.items():
                if tensor.startswith(EXPERT) and self._stored(kernel, tensor) not in self._within:
                    self._within[self._stored(kernel, tensor)] = ends.get(kernel.phase, 0)
                    ends[kernel.phase] = ends.get(kernel.phase, 0) + ceil_div(size, line) * line
            used.append((at, launch, [(kernel.phase, launch.layer, e) for e in launch.experts]))
        experts = [(phase, layer, e) for phase in ends for layer in range(m.layers) for e in range(m.experts)]
        self._region = max(ends.values())
        room = (self.spec.memory.hbm.bytes - self.used["hbm"]) // self._region
        asked = len(experts) if self._regions is None else self._regions
        least = max(len(e) for _, _, e in used)
        if type(asked) is not int or not least <= asked <= len(experts):
            raise UserError(f"mapping: regions must be in {least}..{len(experts)}, not {asked!r}")
        if room < least:
            raise UserError(
                f"{m.name}: beside {self.used['hbm'] / 1e9:.4g} GB of other things, a socket's HBM has room for {room} "
                f"experts of {self._region / 1e9:.4g} GB; a section needs {least}; more sockets (node.sockets) share them"
            )
        self.residence = held = mixture.Residence(experts, min(asked, room))
        self._first_expert = {"hbm": self.used["hbm"], "ddr": self.used["ddr"]}
        told = {"hbm": held.regions * self._region}
        if not held.fixed:
            told["ddr"] = len(experts) * self._region
            self.assumed.append("no expert is in HBM at the start")
            if self.used["ddr"] + told["ddr"] > self.spec.memory.ddr.bytes:
                raise UserError(
                    f"{m.name}: a socket's DDR has {self.spec.memory.ddr.bytes / 1e9:.4g} GB, its share of the experts "
                    f"is {told['ddr'] / 1e9:.4g} GB; more sockets (node.sockets) share them"
                )
        for tier, size in told.items():
            self.used[tier] += size
        launches = list(self.launches)
        inserted = 0
        for at, launch, asked_for in used:
            regions, places = held.use(asked_for)
            launches[at + inserted] = replace(launch, regions=tuple(regions))
            if places:
                tag = f"layer_{launch.layer}_copy_expert"
                launches.insert(at + inserted, Copies(tuple(places), tag, launch.step, launch.layer))
                inserted += 1
        self.launches = launches
        each = f"{len(experts)} experts of {self._region / 1e6:.4g} MB of a socket"
        if held.fixed:
            self.notes.append(f"{each} are in HBM")
        else:
            lines = self._region // line
            ms = 1000 * float(copy_ticks(self.spec, lines) * self.spec.tick.period_s)
            self.notes.append(
                f"{each} are in DDR, HBM holds {held.regions}: {held.copies} of {held.uses} were copied when they were "
                f"needed, in {ms:.4g} ms each"
            )
        return told

    def _expert_place(self, launch: Launch, tensor: str) -> int:
        """The first byte of a section's part of the expert in a slot."""
        region = launch.regions[int(tensor.removeprefix(EXPERT).split(".")[0])]
        within = self._within[self._stored(self.kernels[launch.kernel], tensor)]
        return self._first_expert["hbm"] + region * self._region + within

    def copies(self, copies: Copies, tag: int) -> Segment:
        """The DMA's copies of experts."""
        line, size = self.spec.line_bytes, self._region
        codes = [
            CODE.make(
                "COPY", source=TIERS.index("ddr"), target=TIERS.index("hbm"), lines=size // line, tag=tag,
                **{
                    "from": (self._first_expert["ddr"] + self.residence.number[place.expert] * size) // line,
                    "to": (self._first_expert["hbm"] + place.region * size) // line,
                },
            )
            for place in copies.places
        ]  # fmt: skip
        return Segment({"code": np.concatenate([*codes, CODE.make("WAIT", tag=tag)])}, label=copies.tag)
