"""Maps transformers onto reconfigurable dataflow units (SambaNova SN40L, arXiv 2405.07518).

A decoder layer is a few *sections*, each one kernel: its operators are stages of a pipeline on the chip (`stages`,
`layer`). For the next token a layer is one section where its weights fit: they stream from HBM into memory units while
earlier operators compute. For a prompt it is two, one that makes queries, keys and values and one that does all else,
since attention begins when the last key is stored. What doesn't fit is cut where that takes the least time (`plan`).
`fusion: unfused` makes a section of every operator, whose results go through memory.

With several sockets heads and the MLP's columns are dealt out; sums over sockets are stages of their section
(`allreduce: fused`) or sections of their own (`separate`). One socket is simulated, the others do the same.

Every layer is the same kernel with other arguments; the configuration is loaded where it changes. Decode steps share
a kernel while the cached tokens, rounded up to `granule`, are as many: a mask hides what lies beyond.
"""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.arch.errors import UserError, nearest
from tilewright.arch.isa import Program, Segment
from tilewright.arch.rdu import CODE, ISA, RduSpec
from tilewright.arch.scenario import Mapped, Scenario, TagInfo
from tilewright.mappers.rdu import mixture, train, vision
from tilewright.mappers.rdu.coe import map_composition
from tilewright.mappers.rdu.launches import Copies, Launch, Moves
from tilewright.mappers.rdu.layer import CHOSEN, SLOT, Op, Share, expert_operators, layer_operators
from tilewright.mappers.rdu.memory import ACTIVATIONS, Memory, is_row
from tilewright.mappers.rdu.plan import Choice, Limits, Plan, cut, kept, plan_rows, plan_vectors
from tilewright.mappers.rdu.search import Kernel, Search, Smaller
from tilewright.mappers.rdu.section import Built, segment
from tilewright.mappers.rdu.stages import BF16_BYTES, Region, ceil_div
from tilewright.workloads.graph import decode_step, prefill
from tilewright.workloads.models import ModelConfig

__all__ = ["Kernel", "draw_section", "map_model"]

CHOICES: dict[str, tuple[str, ...]] = {
    "fusion": ("fused", "unfused"),
    "orchestration": ("host", "hardware"),
    "allreduce": ("fused", "separate"),
}
NUMBERS = {
    "seed": (0, 1 << 31),
    "granule": (1, 1 << 20),
    "moves": (0, 1 << 40),
    "groups": (0, 64),
    "percent": (0, 100),
}
DEFAULTS = {"seed": 0, "granule": 512, "moves": 6_000_000, "groups": 0, "percent": 0}
PERCENT, PROMPT_PERCENT = 92, 40
TOKEN_PERCENTS = (PERCENT, 60, 40)  # in turn
ALONE_PERCENTS = (60, PERCENT)  # for an operator over rows that else has no section
"""Of a socket's units, what a section may use if nothing is said. Streams of more units with rows and weights at full rate
find no routes on which none waits behind another."""
TOLD = ("sections", "memory")  # what a document tells besides
COMPOSITIONS = True
IMAGES = True
TRAINS = True


def draw_section(built: Built, path: str | Path) -> None:
    """Write the picture of a placed and routed section, an SVG file."""
    Path(path).write_text(built.svg(), encoding="utf-8")


def document_of(spec: RduSpec, mapping: Mapping[str, Any] | None, told: Sequence[str] = ()) -> dict[str, Any]:
    """The choices of a mapping with defaults filled in; `told` are keys that others read.

    Raises UserError for what is not allowed.
    """
    known: dict[str, Any] = {
        "fusion": "fused", "orchestration": spec.launch.orchestration, "allreduce": "fused", **DEFAULTS,
    }  # fmt: skip
    for key, value in (mapping or {}).items():
        if key in TOLD or key in told:
            continue
        if key not in known:
            raise UserError(f"mapping: unknown key {key!r}; {nearest(key, known)}")
        if key in CHOICES and value not in CHOICES[key]:
            raise UserError(f"mapping: {key} must be one of {', '.join(CHOICES[key])}, not {value!r}")
        if key in NUMBERS:
            low, high = NUMBERS[key]
            if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
                raise UserError(f"mapping: {key} must be in {low}..{high}, not {value!r}")
        known[key] = value
    return known


def map_model(
    spec: RduSpec, model: ModelConfig, scenario: Scenario, mapping: Mapping[str, Any] | None = None
) -> Mapped:
    """The program of `scenario` for one socket of the node; the others do the same at the same time.

    `mapping` overrides choices of the document that is returned: fusion, orchestration, allreduce, granule (tokens), the
    placement's seed and moves, groups of rows side by side (0: chosen), percent of the units that a section may use (0:
    chosen). For a mixture of experts: `requests`, the experts of each token, layer and slot (else drawn uniformly from
    `scenario.seed`), and `regions`, the experts of a layer that HBM may hold (else as many as fit). For a model with a
    vision tower: `images` of each prompt, its first tokens.
    Raises UserError for what the target does not support, what fits no section, and choices that are not allowed.
    """
    if model.composition is not None:
        if scenario.train:
            raise UserError(f"{model.name}: target rdu does not train compositions")
        return map_composition(spec, model, scenario, mapping, partial(_map_one, apart=False))
    return _map_one(spec, model, scenario, mapping)


def _map_one(
    spec: RduSpec,
    model: ModelConfig,
    scenario: Scenario,
    mapping: Mapping[str, Any] | None,
    apart: bool = True,
) -> Mapped:
    """The program of one model. `apart`: each phase (prompt, tokens) has weights of its own, in its order."""
    notes = []
    total = scenario.context + scenario.prompt + scenario.generate + scenario.train
    if model.position == "rotary" and model.positions is not None and total > model.positions:
        # There is an angle for every position: it is the training that ends there, not the model.
        notes.append(
            f"{total} tokens are more than the {model.positions} positions that {model.name} is made for"
        )
        model = replace(model, positions=None)
    own = (mixture.KEYS if model.experts else ()) + (vision.KEYS if model.vision is not None else ())
    document = document_of(spec, mapping, own) | {k: v for k, v in (mapping or {}).items() if k in own}
    mapper = _Mapper(spec, model, scenario, document, apart)
    mapper.notes += notes
    mapper.plan()
    others = {"unfused": {"fusion": "unfused", "orchestration": "host", "allreduce": "separate"}}
    # Kernels of a prompt are long beside any launch, and take long to simulate.
    if scenario.generate and not scenario.prompt:
        other = "host" if mapper.document["orchestration"] == "hardware" else "hardware"
        others["unfused, hardware"] = {**others["unfused"], "orchestration": "hardware"}
        others[other] = {"orchestration": other}
    kept_choices = {k: v for k, v in mapper.document.items() if k not in TOLD}
    return Mapped(
        program=Program(ISA, mapper, mapper.tags),
        tags=mapper.infos,
        steps=len(mapper.launches),
        document=mapper.document,
        step_of=[launch.step for launch in mapper.launches],
        notes=mapper.notes,
        assumed=[
            "bfloat16 weights, activations and caches; a bfloat16 takes a whole word of SRAM",
            *(
                []
                if apart
                else ["one copy of the weights suits the orders in which prompt and tokens stream them"]
            ),
            *mapper.assumed,
        ],
        draw=mapper.draw(),
        beside={name: kept_choices | other for name, other in others.items()}
        if mapper.document["fusion"] == "fused" and not scenario.train  # long to route without fusion
        else {},
    )


class _Mapper:
    """Plans kernels and their launches; walked, it gives the program's segments."""

    def __init__(
        self,
        spec: RduSpec,
        model: ModelConfig,
        scenario: Scenario,
        document: dict[str, Any],
        apart: bool = True,
    ) -> None:
        if model.experts:
            mixture.check(model)
            if scenario.prompt and model.d_model * BF16_BYTES % spec.line_bytes:
                raise UserError(f"{model.name}: a row of {model.d_model} columns is no multiple of a line")
            if not apart:
                raise UserError(
                    f"{model.name}: target rdu does not support compositions of mixtures; allowed: dense experts"
                )
            tokens = scenario.batch * (scenario.prompt + scenario.generate)
            self.trace = mixture.Trace.read(document, model, tokens, scenario.seed)
            document["requests"] = self.trace.experts
        if model.vision is not None:
            if not apart:
                raise UserError(
                    f"{model.name}: target rdu does not support compositions of models with images; allowed: text alone"
                )
            document["images"] = vision.count(document, model, scenario.prompt)
        self.images: int = document.get("images", 0)
        if model.sub_norms or model.qk_norm:
            raise UserError(f"{model.name}: target rdu does not support norms within attention and MLP")
        if model.weight_groups > 1 and scenario.generate:
            raise UserError(
                f"{model.name}: target rdu does not decode with sparse weights; allowed: prompts and training (--generate 0)"
            )
        if not spec.pcu.systolic and scenario.prompt:
            raise UserError("a prompt needs systolic arrays (pcu.systolic); this machine has none")
        self.spec, self.model, self.scenario, self.document = spec, model, scenario, document
        self.p = spec.params()
        self.share = Share(model, spec.node.sockets)
        self.limits = self._limits(PERCENT)
        self.kernels: list[Kernel] = []
        self.launches: list[Launch | Copies | Moves] = []
        self.assumed: list[str] = []
        self._phases: dict[str, tuple[list[int], int]] = {}
        self._most_rows = 0
        self.notes: list[str] = []
        self.infos: list[TagInfo] = []
        self.tags: list[str] = []
        self.apart = apart
        self.launch_ticks = self.p.argument_load + (
            self.p.host_launch if document["orchestration"] == "host" else self.p.hardware_launch
        )

    # ---- planning -----------------------------------------------------------------------------------

    def plan(self) -> None:
        """All kernels and launches."""
        s, m = self.scenario, self.model
        total = s.context + s.prompt + s.generate
        if s.prompt:
            prefill(m, prompt=s.prompt, context=s.context, batch=s.batch)
        if s.generate:
            decode_step(m, context=total - 1, batch=s.batch)
        self.pitch = self._room(max(total, s.context + s.prompt + self.document["granule"]))
        step = 0
        if s.train:
            self._train(step)
        if s.prompt:
            self._prompt(step)
            step += 1
        for i in range(s.generate):
            self._token(step, i)
            step += 1
        self.memory = Memory(
            self.spec, m, s, self.kernels, self.launches, cache_bytes=self._cache_bytes(), rows_bytes=self._most_rows,
            apart=self.apart, regions=self.document.get("regions"),
        )  # fmt: skip
        self.launches = self.memory.launches
        self.notes += self.memory.notes
        self.assumed += self.memory.assumed
        if m.experts:
            if self.trace.drawn:
                self.assumed.append(
                    f"the {m.experts_per_token} experts of each token and layer: drawn uniformly, seed {s.seed}"
                )
            self.assumed.append(
                "choosing experts from the router's scores, outside of the program, takes no time"
            )
        self._number_tags()
        self._report()

    def _room(self, tokens: int) -> int:
        """Tokens that a cache has room for, with what blocks of rows are padded by."""
        return (ceil_div(tokens, 4 * self.p.lanes) + 4) * 4 * self.p.lanes

    def _limits(self, percent: int) -> Limits:
        return Limits.of(self.p, Fraction(self.document["percent"] or percent, 100))

    def _prompt(self, step: int) -> None:
        s, m, p = self.scenario, self.model, self.p
        self.limits = self._limits(PROMPT_PERCENT)
        context = ceil_div(s.context, p.lanes) * p.lanes
        if context != s.context:
            self.notes.append(f"prompt: {s.context} cached tokens count as {context}, whole vectors")
        keys = ceil_div(context + s.prompt, 4 * p.lanes) * 4 * p.lanes
        window = m.sliding_window if m.windowed_layers else None
        if window is not None and len(m.windowed_layers) < m.layers:
            self.notes.append(
                f"prompt: layers without a window are timed like those with one: {window} tokens"
            )
        ops = layer_operators(m, self.share.sockets)
        first = [op.kind for op in ops].index("attention")

        def plan(
            some: Sequence[Op], keep: Sequence[str], limits: Limits = self.limits, rows: int = s.prompt
        ) -> Choice | None:
            return plan_rows(
                p, self.share, some, keep, limits, rows=rows, keys=keys, pitch=self.pitch, context=context,
                window=window if window is not None and window < keys else None,
                groups=self.document["groups"] or None,
            )  # fmt: skip

        def kernels(
            some: Sequence[Op], later: Sequence[Op], result: Sequence[str], plan: Any = plan
        ) -> list[int]:
            choices = self._cut(some, kept(some, later, result), self._roomy(plan), "prompt")
            return [
                self._kernel("prompt", choice, partial(plan, choice.ops, choice.keep)) for choice in choices
            ]

        if m.experts:
            split = next(i for i, op in enumerate(ops) if op.name == "router") + 1
            tail = next(i for i, op in enumerate(ops) if op.kind == "mixture")
            asked = [
                self.trace.groups(range(b * s.prompt, (b + 1) * s.prompt), layer)
                for b in range(s.batch)
                for layer in range(m.layers)
            ]
            rows = mixture.rows_at_once([len(found) for a in asked for found in a.values()], p.lanes)
            own = partial(plan, rows=rows)
            expert = kernels(expert_operators(m), [], ["e.0"], own)
            layers = kernels(ops[:first], ops[first:], ["z"]) + kernels(ops[first:split], ops[split:], ["z"])
            last = kernels(ops[tail:], [], ["z"])
        else:
            layers = kernels(ops[:first], ops[first:], ["z"]) + kernels(ops[first:], [], ["z"])
        image = self._image_kernels() if self.images else ([], [], [])
        for b in range(s.batch):
            for i in range(self.images):
                self._image(image, step, b, i)
            self._embed(step, s.prompt - self.images * (m.vision.tokens if m.vision is not None else 0))
            for layer in range(m.layers):
                for k in layers:
                    slot = {name: b * self._cache_bytes() for name in ("keys", "values")}
                    self.launches.append(Launch(k, self._tag(k, layer), step, layer, slot))
                if m.experts:
                    self._prompt_mixture(expert, last, step, b, layer, asked[b * m.layers + layer], rows)
            self._head(step)

    def _image_kernels(self) -> tuple[list[int], list[int], list[int]]:
        """The kernels before the tower's layers, of a layer, and behind them."""
        seen = self.model.vision
        assert seen is not None
        lanes, rows = self.p.lanes, seen.tokens + 1
        keys = ceil_div(rows, 4 * lanes) * 4 * lanes

        def kernels(
            model: ModelConfig, some: Sequence[Op], later: Sequence[Op], result: str, rows: int = rows, **widths: int
        ) -> list[int]:  # fmt: skip
            def plan(some: Sequence[Op], keep: Sequence[str], limits: Limits = self.limits) -> Choice | None:
                return plan_rows(
                    self.p, Share(model, self.share.sockets), some, keep, limits, rows=rows, keys=keys,
                    pitch=self._room(rows + self.document["granule"]), context=0, window=None,
                    groups=self.document["groups"] or None, attended=rows, widths=widths,
                )  # fmt: skip

            return [
                self._kernel(vision.PHASE, choice, partial(plan, choice.ops, choice.keep))
                for choice in self._cut(some, kept(some, later, [result]), self._roomy(plan), "an image")
            ]

        tower, widths = seen.tower, vision.widths(seen)
        ops = layer_operators(tower, self.share.sockets)
        first = [op.kind for op in ops].index("attention")
        before = kernels(tower, vision.embedding(), [], "z", **{vision.PIXELS: widths[vision.PIXELS]})
        layer = kernels(tower, ops[:first], ops[first:], "z") + kernels(tower, ops[first:], [], "z")
        behind = kernels(
            vision.projector_model(seen), vision.projector(self.share.sockets), [], "w", seen.tokens, **widths
        )
        self.assumed.append(
            f"images of each prompt: {self.images}, of {seen.tokens} tokens, which are its first; the host cuts them into "
            "patches, which are in HBM at the start"
        )
        return before, layer, behind

    def _image(
        self, kernels: tuple[list[int], list[int], list[int]], step: int, sequence: int, image: int
    ) -> None:
        """An image's patches through the tower, to its rows of the prompt."""
        seen = self.model.vision
        assert seen is not None
        layers = seen.tower.layers
        extents = {
            t: n for some in kernels for k in some for t, n in self.kernels[k].choice.line.extents.items()
        }
        at = image * seen.tokens * self.model.d_model * BF16_BYTES
        self._most_rows = max(self._most_rows, at + extents["w"])
        before, layer, behind = kernels
        for depth, some in ((-1, before), *((i, layer) for i in range(layers)), (layers, behind)):
            for k in some:
                arguments = self.kernels[k].choice.line.arguments
                self.launches.append(
                    Launch(
                        k, self._tag(k, depth if depth < layers else -1), step, depth,
                        {vision.PIXELS: (sequence * self.images + image) * extents[vision.PIXELS]},
                        where={r: ("x", at + r.offset) for r in arguments if depth == layers and r.tensor == "w"},
                    )
                )  # fmt: skip

    def _prompt_mixture(
        self, expert: list[int], last: list[int], step: int, b: int, layer: int,
        asked: Mapping[int, Sequence[tuple[int, int]]], rows: int,
    ) -> None:  # fmt: skip
        """Each expert's rows are gathered, go through its sections, and are put back in the order of the tokens."""
        slots = tuple(f"e.{i}" for i in range(self.model.experts_per_token))
        tag = f"layer_{layer}_prompt_move_rows"
        for e, found in asked.items():
            for first in range(0, len(found), rows):
                some = found[first : first + rows]
                there = tuple((0, t, 0, i) for i, (t, _) in enumerate(some))
                self.launches.append(Moves(("h2",), ("gathered",), there, tag, step, layer))
                for k in expert:
                    where = {
                        r: ({"h2": "gathered", "e.0": "given"}[r.tensor], r.offset)
                        for r in self.kernels[k].choice.line.arguments
                        if r.tensor in ("h2", "e.0")
                    }
                    self.launches.append(
                        Launch(k, self._tag(k, layer), step, layer, experts=(e,), where=where)
                    )
                back = tuple((0, i, slot, t) for i, (t, slot) in enumerate(some))
                self.launches.append(Moves(("given",), slots, back, tag, step, layer))
        for k in last:
            where = {
                r: (f"{r.tensor} {b} {layer}", r.offset)
                for r in self.kernels[k].choice.line.arguments
                if r.tensor.startswith(SLOT)
            }
            self.launches.append(Launch(k, self._tag(k, layer), step, layer, where=where))

    def _train(self, step: int) -> None:
        """A step of training: forward through all layers, backward through them, and the optimizer on each one's weights."""
        s, m, p = self.scenario, self.model, self.p
        train.check(self.share, p, s.lm_head)
        if s.train % (2 * p.lanes):
            raise UserError(f"--train must be a multiple of {2 * p.lanes}, twice the lanes, not {s.train}")
        prefill(m, prompt=s.train)
        self.limits = self._limits(PROMPT_PERCENT)
        self.pitch = s.train
        sockets = self.share.sockets
        gradients, names = train.weight_gradients(m), train.parameters(m)

        def plan(
            some: Sequence[Op], keep: Sequence[str], limits: Limits = self.limits, rows: int = s.train
        ) -> Choice | None:
            # What memory binds has many streams, which share its channels evenly.
            wide = train.WIDE if all(op.kind in train.ELEMENTS for op in some) else (None,)
            for groups in (self.document["groups"],) if self.document["groups"] else wide:
                found = plan_rows(
                    p, self.share, some, keep, limits, rows=rows, keys=s.train, pitch=s.train, context=0, window=None,
                    groups=groups, attended=s.train, builder=partial(train.Training, sequences=s.batch),
                )  # fmt: skip
                if found is not None:
                    return found
            return None

        def kernels(
            some: Sequence[Op], later: Sequence[Op], result: Sequence[str] = (), rows: int = s.train
        ) -> list[int]:
            """Sections; one whose streams wait behind one another is cut in two."""
            own = partial(plan, rows=rows)
            out = []
            for choice in self._cut(some, kept(some, later, result), self._roomy(own), "a step of training"):
                k = self._kernel(train.PHASE, choice, partial(own, choice.ops, choice.keep))
                half = len(choice.ops) // 2
                if self.kernels[k].blocked and half:
                    self.kernels.pop()
                    out += kernels(choice.ops[:half], choice.ops[half:], choice.keep, rows)
                    out += kernels(choice.ops[half:], (), choice.keep, rows)
                else:
                    out.append(k)
            return out

        ops = train.forward(m, sockets)
        groups = train.backward(m, sockets)
        first = [op.kind for op in ops].index("attention")
        saved = (*train.SAVED, "z")
        forth = kernels(ops[:first], ops[first:], saved) + kernels(ops[first:], [], saved)
        back = []
        for i, some in enumerate(groups):
            back += kernels(some, [op for later in groups[i + 1 :] for op in later] + gradients, ["dx"])

        def gradient(op: Op) -> list[int]:
            """The kernels of an operator that gives a weight's gradient."""
            rows, columns = train.gradient_shape(self.share, op, s.train, p)
            if op.kind == "column_sum":  # whose blocks are of columns
                return kernels([op], [], (), columns * p.lanes)
            return kernels([op], [], op.writes, rows)

        def elements(ops: Sequence[Op], name: str, *result: str) -> list[int]:
            return kernels(ops, [], [f"{name}.{t}" for t in result], train.shape(self.share, name, p)[0])

        def optimized(names: Sequence[str]) -> tuple[list[int], list[int], list[int]]:
            """The kernels that take a first and another sequence's gradients, if there are several, and the optimizer's."""
            of = "sum" if s.batch > 1 else "grad"
            first, other = (
                [k for n in names for k in elements([train.accumulation(n, which)], n, "sum.new")]
                if s.batch > 1
                else []
                for which in (True, False)
            )
            new = ("first.new", "second.new", "master.new", "copy")
            return first, other, [k for n in names for k in elements(train.optimizer(n, of), n, *new)]

        back += [k for op in gradients for k in gradient(op)]
        within = optimized(names)
        before: list[int] = []
        behind: list[int] = []
        tables: list[int] = []
        outside: tuple[list[int], ...] = ([], [], [])
        learned = m.position == "learned"
        if s.lm_head:
            if learned:
                before = kernels([Op("positions", "add", ("embedded", "positions.copy"), ("x",))], [], ["x"])
            ends = train.head_gradients(m)
            behind = kernels(train.head(m, sockets), ends, ["dx"])
            behind += [k for op in ends for k in gradient(op)]
            tables = [k for op in train.table_gradients(m) for k in gradient(op)]
            outside = optimized(train.end_parameters(m))
        rows_of = "embedded" if s.lm_head and learned else "x"

        def launch(some: Iterable[int], b: int, layer: int, inside: bool = True) -> None:
            """Kernels for sequence `b`; what is there of each is behind that of the one before."""
            own = layer if inside else -1
            slot = {t: 4 * b * s.train for t in train.WORDS}
            for k in some:
                where = {
                    r: (f"{rows_of} {b}", r.offset)
                    for r in self.kernels[k].choice.line.arguments
                    if b and not layer and r.tensor == rows_of
                }
                self.launches.append(Launch(k, self._tag(k, own), step, own, slot, where=where, at=layer))

        for b in range(s.batch):
            steps = [b > 0, *([2] if b == s.batch - 1 else [])]
            self._embed(step, s.train)
            launch(before, b, 0, False)
            for layer in range(m.layers):
                launch(forth, b, layer)
            launch(behind, b, m.layers, False)
            for layer in reversed(range(m.layers)):
                launch([*back, *(k for i in steps for k in within[i])], b, layer)
            launch([*tables, *(k for i in steps for k in outside[i])], b, 0, False)
        if s.lm_head:
            self.assumed.append(
                "a step takes tokens and targets from HBM, and leaves three words of each row there, of which the host makes "
                "the loss; each socket's rows of a table of embeddings are trained there, the host brings them to all"
            )
        else:
            self.assumed.append(
                "a step is that of the layers: the gradient of what the last one gives is there; the embedding's is not "
                "followed further"
            )
        self.assumed.append("AdamW keeps weights and both moments in float32; gradients are bfloat16")

    def _token(self, step: int, i: int) -> None:
        s, m, p = self.scenario, self.model, self.p
        cached = s.context + s.prompt + i
        keys = ceil_div(cached, self.document["granule"]) * self.document["granule"]
        if m.windowed_layers and len(m.windowed_layers) == m.layers and m.sliding_window is not None:
            keys = min(keys, ceil_div(m.sliding_window, 4 * p.lanes) * 4 * p.lanes)
        phase = f"token {keys}"
        first = max(0, cached - keys)
        slot = {
            "keys.new": cached * BF16_BYTES, "values.new": cached * BF16_BYTES,
            "cos": cached * m.head_dim * BF16_BYTES, "sin": cached * m.head_dim * BF16_BYTES,
            "keys": first // (2 * p.lanes) * 2 * p.lanes * BF16_BYTES,
            "values": first // (2 * p.lanes) * 2 * p.lanes * BF16_BYTES,
            "mask": (keys - min(cached, keys)) * keys * BF16_BYTES if keys else 0,
        }  # fmt: skip
        ops = layer_operators(m, self.share.sockets, token=True)
        self._embed(step, s.batch)
        for layer in range(m.layers):
            if m.experts:
                chosen = range(s.batch * (s.prompt + i), s.batch * (s.prompt + i + 1))
                self._token_mixture(phase, keys, ops, step, layer, slot, chosen)
            else:
                self._launch_sequences(phase, keys, ops, (), step, layer, slot)
        for _ in range(s.batch):
            self._head(step)

    def _launch_sequences(
        self, phase: str, keys: int, ops: Sequence[Op], later: Sequence[Op], step: int, layer: int, slot: Mapping[str, int]
    ) -> None:  # fmt: skip
        """A layer's `ops` for the next token of all sequences, as many at once as sections are made for."""
        name = f"{phase} from {ops[0].name}"
        if name not in self._phases:
            self._phases[name] = self._token_kernels(phase, keys, ops, kept(ops, later, ["z"]))
        kernels, batch = self._phases[name]
        for b in range(0, self.scenario.batch, batch):
            for k in kernels:
                own = dict(slot)
                for t, n in self.kernels[k].choice.line.extents.items():
                    if t in ACTIVATIONS:
                        own[t] = own.get(t, 0) + b // batch * n
                    elif t in ("keys", "values", "keys.new", "values.new"):
                        own[t] = own.get(t, 0) + b * self._cache_bytes()
                self.launches.append(Launch(k, self._tag(k, layer), step, layer, own))

    def _token_mixture(
        self, phase: str, keys: int, ops: Sequence[Op], step: int, layer: int, slot: Mapping[str, int], tokens: range
    ) -> None:  # fmt: skip
        """A layer with experts: up to the router's scores, the experts that they choose, and what they give together.

        One token's experts are one section. Those of several run one after the other, for all tokens that go to it.
        """
        split = next(i for i, op in enumerate(ops) if op.name == "router") + 1
        tail = next(i for i, op in enumerate(ops) if op.kind == "mixture")
        self._launch_sequences(phase, keys, ops[:split], ops[split:], step, layer, slot)
        (x,) = ops[split - 1].reads
        row, scores = self.model.d_model * BF16_BYTES, self._router_row()
        if len(tokens) == 1:
            name = f"{phase} experts"
            if name not in self._phases:
                self._phases[name] = self._token_kernels(phase, keys, ops[split:], ("z",))
            chosen = self.trace.of(tokens[0], layer)
            for k in self._phases[name][0]:
                self.launches.append(
                    Launch(
                        k, self._tag(k, layer), step, layer, experts=chosen,
                        where={Region(f"{CHOSEN}.{i}"): ("r", BF16_BYTES * e) for i, e in enumerate(chosen)},
                    )
                )  # fmt: skip
            return
        for e, asked in self.trace.groups(tokens, layer).items():
            first = 0
            while first < len(asked):
                kernels, most = self._expert_kernels(phase, len(asked) - first, x)
                some = asked[first : first + most]
                first += len(some)
                where = {}
                for g in range(most):
                    t, i = some[min(g, len(some) - 1)]
                    where[Region(x, g * row)] = (x, t * row)
                    where[Region("e.0", g * row)] = (f"e.{i}", t * row) if g < len(some) else ("spare", 0)
                for k in kernels:
                    self.launches.append(
                        Launch(k, self._tag(k, layer), step, layer, experts=(e,), where=where)
                    )
        name = f"{phase} mixture"
        if name not in self._phases:
            self._phases[name] = self._token_kernels(phase, keys, ops[tail:], ("z",))
        kernels, batch = self._phases[name]
        for b in range(0, len(tokens), batch):
            where = {
                Region(f"{CHOSEN}.{i}", g * scores): ("r", (b + g) * scores + BF16_BYTES * e)
                for g in range(batch)
                for i, e in enumerate(self.trace.of(tokens[b + g], layer))
            }
            for k in kernels:
                extents = self.kernels[k].choice.line.extents
                own = {t: b // batch * n for t, n in extents.items() if is_row(t)}
                self.launches.append(Launch(k, self._tag(k, layer), step, layer, own, where=where))

    def _router_row(self) -> int:
        """Bytes from one token's scores to the next one's."""
        return ceil_div(self.model.experts, self.p.lanes) * self.p.lanes * BF16_BYTES

    def _expert_kernels(self, phase: str, tokens: int, x: str) -> tuple[list[int], int]:
        """The kernels of an expert for at least so many tokens, or for as many as a section holds."""
        size = mixture.rounded(tokens)
        while True:
            name = f"{phase} expert {size}"
            try:
                if name not in self._phases:
                    ops = expert_operators(self.model, 0, x)
                    self._phases[name] = self._token_kernels(phase, 0, ops, ("e.0",), size)
                return self._phases[name]
            except UserError:
                if size == 1:
                    raise
                size //= 2

    def _token_kernels(
        self, phase: str, keys: int, ops: Sequence[Op], result: Sequence[str], batch: int = 0
    ) -> tuple[list[int], int]:
        """The kernels of `ops` for the next token, and how many sequences they take at once: at most `batch`, or all.

        Fewer units make more and smaller sections: these are taken where larger ones find no routes of their own.
        """
        tries: list[tuple[list[Kernel], int]] = []
        first = len(self.kernels)
        for percent in (self.document["percent"],) if self.document["percent"] else TOKEN_PERCENTS:
            self.limits = self._limits(percent)
            try:
                choices, held = self._token_choices(keys, ops, result, batch or self.scenario.batch)
            except UserError:
                if tries:
                    break
                raise
            found = [self._routed(phase, choice) for choice in choices]
            kernels = [kernel for kernel in found if kernel is not None]
            if len(kernels) < len(choices):
                continue
            tries.append((kernels, held))
            if not any(k.blocked for k in kernels):
                break
        if not tries:
            raise UserError(f"{phase}: no routes found; try another seed or a smaller percent")
        kernels, held = min(tries, key=lambda t: sum(k.blocked for k in t[0]))
        self.kernels += kernels
        return list(range(first, len(self.kernels))), held

    def _token_choices(
        self, keys: int, ops: Sequence[Op], result: Sequence[str], batch: int
    ) -> tuple[list[Choice], int]:
        """The sections of `ops` that the present limits allow, and the largest batch with which they do."""
        while True:
            plan = partial(plan_vectors, self.p, self.share, batch=batch, keys=keys, pitch=self.pitch)
            try:
                choices = self._cut(
                    ops,
                    result,
                    lambda some, keep, plan=plan: plan(some, keep, self.limits),
                    f"{keys} cached tokens",
                )
            except UserError:
                if batch == 1:
                    raise
                batch = next(n for n in range(batch // 2, 0, -1) if batch % n == 0)
            else:
                return choices, batch

    def _head(self, step: int) -> None:
        """The LM head of one vector, the last row of a prompt, which the host has put there, or a token's."""
        m = self.model
        if not (self.scenario.lm_head and m.causal):
            return
        if "head" not in self._phases:
            ops = [Op("lm_head", "product", ("x",), ("logits",))]
            if m.final_norm:
                ops = [
                    Op("final_norm", "norm", ("x",), ("last",)),
                    Op("lm_head", "product", ("last",), ("logits",)),
                ]
            for passes in (1, 2, 3, 4, 6, 8, 12, 16):
                choice = plan_vectors(
                    self.p, self.share, ops, ("logits",), self.limits, batch=1, keys=0, pitch=0, passes=passes
                )
                if choice is not None:
                    break
            else:
                raise UserError(f"{m.name}: the LM head fits no section")
            self._phases["head"] = [self._kernel("head", choice)] * passes, 1
        for i, k in enumerate(self._phases["head"][0]):
            extent = self.kernels[k].choice.line.extents
            slot = {t: i * extent[t] for t in ("weights", "logits")}
            self.launches.append(Launch(k, "lm_head", step, -1, slot))

    def _embed(self, step: int, rows: int) -> None:
        if self.scenario.embedding and rows:
            self.launches.append(Launch(-rows, "embedding", step, -1))

    def _roomy(self, plan: Callable[[Sequence[Op], Sequence[str], Limits], Choice | None]) -> Plan:
        """As `plan`, but that an operator over rows which is too large by itself may have more units."""

        def planned(some: Sequence[Op], keep: Sequence[str]) -> Choice | None:
            larger = () if self.document["percent"] or len(some) > 1 else ALONE_PERCENTS
            for limits in (self.limits, *map(self._limits, larger)):
                found = plan(some, keep, limits)
                if found is not None:
                    return found
            return None

        return planned

    def _cut(
        self, ops: Sequence[Op], result: Sequence[str], plan: Callable[..., Choice | None], what: str
    ) -> list[Choice]:
        fused = self.document["fusion"] == "fused"
        if not fused or self.document["allreduce"] == "fused":
            return cut(
                ops,
                result,
                plan,
                self.p,
                fused=fused,
                launch=self.launch_ticks,
                what=f"{self.model.name}, {what}",
            )
        # Sums over sockets stand alone.
        out: list[Choice] = []
        first = 0
        for i, op in enumerate((*ops, None)):
            if op is None or op.kind == "reduce":
                own = ops[first:i]
                for some, later in ((own, ops[i:]), ([op] if op is not None else [], ops[i + 1 :])):
                    if some:
                        out += cut(
                            some, [*kept(some, later, result)], plan, self.p, fused=True, launch=self.launch_ticks,
                            what=f"{self.model.name}, {what}",
                        )  # fmt: skip
                first = i + 1
        return out

    def _cache_bytes(self) -> int:
        return self.share.kv_dim * self.pitch * BF16_BYTES

    def _kernel(self, phase: str, choice: Choice, smaller: Smaller | None = None) -> int:
        """The number of a new kernel, as `Search` finds it. Raises UserError where there are no routes."""
        kernel = self._routed(phase, choice, smaller)
        if kernel is None:
            raise UserError(f"{phase}, {choice.name}: no routes found; try another seed or a smaller percent")
        self.kernels.append(kernel)
        return len(self.kernels) - 1

    def _routed(self, phase: str, choice: Choice, smaller: Smaller | None = None) -> Kernel | None:
        search = Search(self.p, self.document["seed"], self.document["moves"])
        return search.kernel(
            phase, choice, self.limits, smaller, rows=phase in ("prompt", vision.PHASE, train.PHASE),
            prefix=f"{phase}_" if phase == vision.PHASE else "",
        )  # fmt: skip

    def _tag(self, kernel: int, layer: int) -> str:
        own = self.kernels[kernel]
        named = own.name if own.phase == vision.PHASE else f"{own.phase.split()[0]} {own.name}"
        return (named if layer < 0 else f"layer {layer} {named}").replace(" ", "_")

    # ---- tags and notes -----------------------------------------------------------------------------

    def _number_tags(self) -> None:
        seen: dict[str, TagInfo] = {}
        for launch in self.launches:
            if isinstance(launch, Copies):
                name = "copy expert"
            elif isinstance(launch, Moves):
                name = "move rows"
            else:
                name = self.kernels[launch.kernel].name if launch.kernel >= 0 else "embedding"
            layer = -1 if name.startswith(f"{vision.PHASE}_") else launch.layer  # it is the model's
            seen.setdefault(launch.tag, TagInfo(launch.tag.replace("_", " "), name, layer))
        for kernel in self.kernels:
            for tag in kernel.built.tags:
                seen.setdefault(tag, TagInfo(tag.replace("_", " "), tag, -1))
        self.tags, self.infos = list(seen), list(seen.values())

    def _report(self) -> None:
        p, s, m = self.p, self.scenario, self.model
        document = []
        for kernel in self.kernels:
            choice, routing = kernel.choice, kernel.built.routing
            line = choice.line
            interval, busiest = line.interval()
            counts = {kind: line.count(kind) for kind in ("pcu", "pmu", "agcu")}
            there = {"pcu": p.pcus, "pmu": p.pmus, "agcu": 2 * p.agcus_per_side}
            moved = choice.line_bytes()
            bound = choice.ticks(p)
            binds = "memory" if bound > interval else line.units[busiest[0]].tag
            placement = kernel.built.placement
            over = sum(len(links) for links in routing.overused.values())
            self.notes.append(
                f"{kernel.phase}, {kernel.name}: "
                + ", ".join(f"{counts[k]} of {there[k]} {k.upper()}s" for k in counts)
                + f"; at least {bound} ticks, {binds} binds; "
                + ", ".join(f"{tier} {n / 1e6:.4g} MB" for tier, n in moved.items())
                + (
                    f"; {kernel.blocked} links shared with streams that wait for others"
                    if kernel.blocked
                    else ""
                )
                + f"; wires {float(placement.initial_cost):.4g} -> {float(placement.cost):.4g} hops a tick, "
                f"most loaded link {float(routing.slow_down):.3g} (claimed), {over} links over, {kernel.seconds:.1f} s"
            )
            document.append(
                {"phase": kernel.phase, "operators": [op.name for op in choice.ops], **choice.tiles}
            )
        self.document = {**self.document, "sections": document, "memory": self.memory.told}
        hbm, ddr = self.spec.memory.hbm.bytes, self.spec.memory.ddr.bytes
        cache = 2 * m.layers * (1 if s.train else s.batch) * self._cache_bytes()
        self.notes.append(
            f"memory of a socket: {self.memory.used['hbm'] / 1e9:.4g} GB, of which KV cache {cache / 1e9:.4g} GB, weights once "
            f"for each phase in the order in which it streams them; HBM has {hbm / 1e9:.4g} GB, DDR {ddr / 1e9:.4g} GB"
        )
        if self.memory.used["hbm"] > hbm + ddr:
            raise UserError(
                f"{m.name} needs {self.memory.used['hbm'] / 1e9:.4g} GB of a socket; HBM and DDR have {(hbm + ddr) / 1e9:.4g} GB"
            )
        if self.memory.used["hbm"] > hbm:
            self.notes.append("that is more than HBM has; timed as if it fitted")

    def draw(self) -> Callable[[], str] | None:
        """The picture of the section with the most units."""
        if not self.kernels:
            return None
        largest = max(self.kernels, key=lambda k: len(k.built.netlist.units))
        return largest.built.svg

    # ---- segments -----------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.launches)

    def __iter__(self) -> Iterator[Segment]:
        loaded = -1
        host = self.document["orchestration"] == "host"
        number = {tag: i for i, tag in enumerate(self.tags)}
        lines = ceil_div(self.model.d_model * BF16_BYTES, self.spec.line_bytes)
        for i, launch in enumerate(self.launches):
            if isinstance(launch, Copies):
                yield self.memory.copies(launch, number[launch.tag])
                continue
            if isinstance(launch, Moves):
                yield self.memory.moves(launch, number[launch.tag])
                continue
            if launch.kernel < 0:  # rows of the table of embeddings, which the host chooses
                tag = number[launch.tag]
                copy = CODE.make("COPY", source=1, target=0, lines=-launch.kernel * lines, tag=tag)
                yield Segment({"code": np.concatenate([copy, CODE.make("WAIT", tag=tag)])}, label=launch.tag)
                continue
            kernel = self.kernels[launch.kernel]
            yield segment(
                kernel.built, args=self.memory.arguments(launch), index=i, load=launch.kernel != loaded, host=host,
                tag=launch.tag, tags=self.tags,
            )  # fmt: skip
            loaded = launch.kernel
