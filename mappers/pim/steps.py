"""From operators to instructions: a template of a step, and what moves from one token to the next."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.arch.errors import UserError
from tilewright.arch.isa import Segment
from tilewright.arch.pim import ISA, OP
from tilewright.arch.scenario import Scenario
from tilewright.mappers.pim.layout import ACTIVATIONS, Layout, ceil_div
from tilewright.mappers.pim.overlap import schedule, sram_use
from tilewright.workloads.graph import Operator, decode_step

_CODE = ISA.record("code")


def float_bits(value: float | str) -> int:
    return int(np.float32(value).view(np.uint32))


@dataclass(frozen=True)
class Moving:
    """constant + factor * variable: a field that changes from step to step."""

    variable: int
    factor: int = 1
    constant: int = 0

    def __mul__(self, factor: int) -> "Moving":
        return Moving(self.variable, self.factor * factor, self.constant * factor)

    def __radd__(self, constant: int) -> "Moving":
        return Moving(self.variable, self.factor, self.constant + constant)

    def value(self, variables: NDArray[np.int64]) -> int:
        return self.constant + self.factor * int(variables[self.variable])


# What a step depends on; `_variables` computes them.
TOKENS, BLOCKS, COLUMNS, BANK, BLOCK, LANE, COLUMN, POSITION_BANK, POSITION_BLOCK = map(Moving, range(9))
TOKEN_CHANNEL, TOKEN_BANK, TOKEN_OUT, TABLE_BANK, TABLE_BLOCK = map(Moving, range(9, 14))

Value = int | Moving
Record = tuple[str, Mapping[str, Value]]
"""Name of an operation, and its fields."""


def _variables(layout: Layout, context: int, tokens: NDArray[np.int64]) -> NDArray[np.int64]:
    """[sequence, step, variable] for token ids [sequence, step]; step i is at position context + i."""
    p, m = layout.p, layout.model
    t = np.broadcast_to(context + np.arange(tokens.shape[1]), tokens.shape)
    position = t + (max(0, m.position_rows - m.positions) if m.position_rows and m.positions else 0)
    out, rest = np.divmod(tokens, p.channels * p.n_banks)
    return np.stack(
        [
            t + 1,
            t // p.n_banks + 1,
            t // p.lanes + 1,
            t % p.n_banks,
            t // p.n_banks,
            t % p.lanes,
            t // p.lanes,
            position % p.n_banks,
            position // p.n_banks,
            1 << rest // p.n_banks,
            rest % p.n_banks,
            out,
            tokens % p.n_banks,
            tokens // p.n_banks,
        ],
        axis=-1,
    )


class Template:
    """The records of a step, and which of their fields move with the step's variables."""

    def __init__(self, records: Sequence[Record], columns: int) -> None:
        self.columns = columns
        self.code = np.zeros(len(records), _CODE.dtype)
        for f in _CODE.layout:
            self.code[f.name] = f.default
        self.code["op"] = [OP[op] for op, _ in records]
        fixed: dict[str, list[tuple[int, int]]] = {}
        moving: dict[str, list[tuple[int, int, int, int]]] = {}
        for i, (_, fields) in enumerate(records):
            for name, value in fields.items():
                if isinstance(value, Moving):
                    place = (i, value.variable, value.factor, value.constant)
                    moving.setdefault(name, []).append(place)
                else:
                    fixed.setdefault(name, []).append((i, value))
        for name, entries in fixed.items():
            self._set(self.code, name, *np.array(entries, np.int64).T)
        self.moving = {name: np.array(entries, np.int64).T for name, entries in moving.items()}

    def _set(
        self, code: NDArray[Any], name: str, where: NDArray[np.int64], values: NDArray[np.int64]
    ) -> None:
        if name == "address":
            code["row"][where], code["col"][where] = np.divmod(values, self.columns)
        else:
            high = _CODE.by_name[name].high
            if values.size and values.max() > high:
                raise UserError(
                    f"{name} would be {values.max()}, more than the {high} that an instruction holds"
                )
            code[name][where] = values

    def step(self, variables: NDArray[np.int64]) -> NDArray[Any]:
        """The records of the step with these variables."""
        code = self.code.copy()
        for name, (where, variable, factor, constant) in self.moving.items():
            self._set(code, name, where, constant + factor * variables[variable])
        return code


@dataclass
class _Emitter:
    """Walks the operators of one step of one sequence, and appends the instructions of each."""

    layout: Layout
    sequence: int
    context_segments: int
    """Global buffers that the softmax weights of one head fill."""
    records: list[Record] = field(default_factory=list)
    tag: int = 0
    layer: int = -1

    def walk(self, operators: Sequence[Operator]) -> None:
        handlers: dict[str, Callable[[str], None]] = {
            "embedding": self.embedding, "positions": self.positions, "attention_norm": self.norm,
            "qkv": self.qkv, "rotary": self.rotary, "kv_append": self.kv_append, "scores": self.attention,
            "attention_out": self.attention_out, "attention_add": self.add, "mlp_norm": self.norm,
            "up": self.up, "gate_up": self.up,
            "down": self.down, "mlp_add": self.add, "final_norm": self.norm, "lm_head": self.head,
        }  # fmt: skip
        for tag, operator in enumerate(operators):
            self.tag, self.layer = tag, operator.layer
            # Softmax and values come with the scores, activation and gate with the outputs that they take,
            # argmax with the LM head: tile by tile.
            if operator.name not in ("softmax", "values", "activation", "gate", "argmax"):
                handlers[operator.name](operator.name)

    def emit(self, op: str, *, following: int = 0, **fields: Value) -> None:
        """One instruction; it works for the operator `following` places behind the current one."""
        self.records.append((op, {"tag": self.tag + following, **fields}))

    @property
    def everywhere(self) -> int:
        return (1 << self.layout.p.channels) - 1

    def named(self, name: str) -> str:
        return f"layer {self.layer} {name}" if self.layer >= 0 else name

    def load(self, name: str, dst: int) -> int:
        """Reads a vector to `dst`; returns the SRAM column behind it."""
        bank, address, cols = self.layout.vector(self.named(name))
        self.emit(
            "RD_BK", channels=self.everywhere, bank=bank, address=address, cols=cols, dst=dst, stride=cols
        )
        return dst + cols * self.layout.p.channels

    def load_row(self, table: str, bank: Moving, block: Moving, elements: int, dst: int) -> None:
        cols = self.layout.striped(elements)
        self.emit(
            "RD_BK", channels=self.everywhere, bank=bank, address=self.layout.base[table] + block * cols,
            cols=cols, dst=dst, stride=cols,
        )  # fmt: skip

    # ---- operators ------------------------------------------------------------------------------------

    def embedding(self, _: str) -> None:
        """One row of the table; where it is the LM head's, the row lies in one bank of one channel."""
        lay = self.layout
        if not lay.model.tie_embeddings:
            self.load_row("embedding", TABLE_BANK, TABLE_BLOCK, lay.model.d_model, lay.sram["x"])
            return
        for start, cols, base in lay.matrices["lm_head"].segments():
            self.emit(
                "RD_BK", channels=TOKEN_CHANNEL, bank=TOKEN_BANK, address=base + TOKEN_OUT * cols, cols=cols,
                dst=lay.sram["x"] + start,
            )  # fmt: skip

    def positions(self, _: str) -> None:
        lay = self.layout
        self.load_row("positions", POSITION_BANK, POSITION_BLOCK, lay.model.d_model, lay.sram["work"])
        self.accumulate("x", "work")

    def accumulate(self, to: str, what: str) -> None:
        """Whole columns, so that zeros behind the vector stay zeros."""
        s = self.layout.sram
        self.emit("ADD", dst=s[to], src=s[to], src2=s[what], n=self.layout.d_cols * self.layout.p.lanes)

    def add(self, _: str) -> None:
        self.accumulate("x", "z")

    def norm(self, name: str) -> None:
        lay, s = self.layout, self.layout.sram
        m, lanes = lay.model, lay.p.lanes
        gain = s["work"] + lay.scratch
        bias = self.load(f"{name}.gain", gain)
        if m.d_model % lanes:
            # The last column of h goes to the global buffer whole: its end must be zero, as that of x is.
            last = lay.d_cols - 1
            self.emit("ADD", dst=s["h"] + last, src=s["x"] + last, src2=s["x"] + last, n=lanes)
        fields = {"dst": s["h"], "src": s["x"], "src2": gain, "n": m.d_model}
        fields |= {"imm": float_bits(m.norm_eps), "imm2": float_bits(1 / m.d_model)}
        if m.norm == "layernorm":
            self.load(f"{name}.bias", bias)
            self.emit("LAYERNORM", src3=bias, **fields)
        else:
            self.emit("RMSNORM", **fields)

    def linear(
        self, name: str, src: str, dst: str, then: Callable[[int, int], None] = lambda first, last: None
    ) -> None:
        """Segments of the input one after the other; partial sums are added from left to right, then the
        bias. `then` is called with the first of the columns behind dst that are ready, and the one behind the
        last: tile by tile with overlap."""
        lay, s = self.layout, self.layout.sram
        matrix, unit, lanes = lay.matrices[self.named(name)], lay.unit, lay.p.lanes
        biased, columns = f"{self.named(name)}.bias" in lay.vectors, ceil_div(matrix.n, lanes)

        def finish(first: int, last: int) -> None:
            if biased:
                at, bias = s[dst] + first, s["work"] + first
                self.emit("ADD", dst=at, src=at, src2=bias, n=(last - first) * lanes)
            then(first, last)

        if biased and lay.overlap:
            self.load(f"{name}.bias", s["work"])
        for start, cols, base in matrix.segments():
            self.emit("WR_GB", channels=self.everywhere, cols=cols, src=s[src] + start)
            tiled = lay.overlap and start + cols == matrix.cols
            tile = lay.partial_outs if start or tiled else matrix.outs
            for i, o in enumerate(range(0, matrix.outs, tile)):
                outs = min(tile, matrix.outs - o)
                at = s[dst] + o * unit
                to = s["work"] + lay.scratch + i % lay.buffers * tile * unit if start else at
                self.gemv(base + o * cols, cols, outs, to)
                if start:
                    self.emit("ADD", dst=at, src=at, src2=to, n=outs * unit * lanes)
                if tiled:
                    finish(o * unit, min((o + outs) * unit, columns))
        if not lay.overlap:
            if biased:
                self.load(f"{name}.bias", s["work"])
            finish(0, columns)

    def gemv(self, address: int, cols: int, outs: int, dst: int) -> None:
        lay = self.layout
        self.emit(
            "GEMV", channels=self.everywhere, address=address, cols=cols, outs=outs, pitch=lay.unit, dst=dst,
            stride=lay.p.bursts,
        )  # fmt: skip

    def qkv(self, name: str) -> None:
        self.linear(name, "h", "y")

    def attention_out(self, name: str) -> None:
        self.linear(name, "h", "z")

    def up(self, name: str) -> None:
        self.linear(name, "h", "y", self.activate)

    def down(self, name: str) -> None:
        self.linear(name, "y", "z")

    def activate(self, first: int, last: int) -> None:
        """Activation of columns `first` to `last` - 1 of y; those of a gate, which come first, multiply the
        ones of `up` behind them."""
        lay, m = self.layout, self.layout.model
        gate, lanes = lay.ff_cols, lay.p.lanes

        def each(op: str, following: int, start: int, stop: int, **fields: int) -> None:
            if start < stop:
                at, n = lay.sram["y"] + start, min(stop * lanes, m.d_ff) - start * lanes
                more = {name: value + start for name, value in fields.items()}
                self.emit(op, following=following, dst=at, src=at, n=n, **more)

        each(ACTIVATIONS[m.activation], 1, first, min(last, gate))
        each("MUL", 2, max(first - gate, 0), last - gate, src2=lay.sram["y"] + gate)

    def rotary(self, _: str) -> None:
        """Q and K lie one behind the other: one instruction turns all heads."""
        lay, s, m = self.layout, self.layout.sram, self.layout.model
        table = s["work"] + lay.scratch
        self.load_row("rotary", BANK, BLOCK, 2 * lay.rope_cols * lay.p.lanes, table)
        self.emit(
            "ROPE", dst=s["y"], src=s["y"], src2=table, src3=table + lay.rope_cols, n=m.head_dim,
            outs=m.heads + m.kv_heads, pitch=lay.head_cols,
        )  # fmt: skip

    def slot_mask(self, slot: int) -> int:
        lay = self.layout
        return (1 << min(lay.p.channels, lay.model.kv_heads - slot * lay.p.channels)) - 1

    def kv_append(self, _: str) -> None:
        lay, m = self.layout, self.layout.model
        k = lay.sram["y"] + m.heads * lay.head_cols
        v = k + m.kv_heads * lay.head_cols
        for slot in range(lay.slots):
            offset = slot * lay.p.channels * lay.head_cols
            common = {"channels": self.slot_mask(slot), "stride": lay.head_cols}
            keys, values = (lay.cache(self.layer, which, self.sequence, slot) for which in (0, 1))
            self.emit(
                "WR_BK", bank=BANK, address=keys + BLOCK * lay.head_cols, cols=lay.head_cols,
                src=k + offset, **common,
            )  # fmt: skip
            self.emit(
                "WR_EL", address=values + COLUMN, outs=lay.head_groups, pitch=lay.context_cols, lane=LANE,
                src=v + offset, **common,
            )  # fmt: skip

    def attention(self, _: str) -> None:
        """Scores, softmax and values of some slots at a time; where the SRAM has regions for two groups, the
        values of one come behind the softmax of the next."""
        lay, m = self.layout, self.layout.model
        groups = [
            range(first, min(first + lay.attention_slots, lay.slots))
            for first in range(0, lay.slots, lay.attention_slots)
        ]
        late = lay.attention_regions - 1
        for i in range(len(groups) + late):
            if i < len(groups):
                heads, work = lay.slot_heads(groups[i].start, groups[i].stop), self.region(i)
                for slot in groups[i]:
                    self.scores(slot, heads, work)
                self.emit(
                    "SOFTMAX", following=1, dst=work, src=work, n=TOKENS, outs=len(heads),
                    pitch=lay.score_cols, imm=float_bits(1 / sqrt(m.head_dim)),
                )  # fmt: skip
            if i >= late:
                slots = groups[i - late]
                self.values(slots, lay.slot_heads(slots.start, slots.stop), self.region(i - late))

    def region(self, group: int) -> int:
        """First SRAM column of the scores of a group of slots."""
        lay = self.layout
        return lay.sram["work"] + group % lay.attention_regions * lay.attention_cols(lay.attention_slots)

    def scores(self, slot: int, heads: range, work: int) -> None:
        """Each channel takes the query heads that share its KV head, as many as the global buffer holds."""
        lay, m, cols = self.layout, self.layout.model, self.layout.head_cols
        share, mask = m.heads // m.kv_heads, self.slot_mask(slot)
        at_once = min(share, lay.p.gb_columns // cols)
        for i in range(share):
            head = slot * lay.p.channels * share + i
            if i % at_once == 0:
                self.emit(
                    "WR_GB", channels=mask, cols=min(at_once, share - i) * cols,
                    src=lay.sram["y"] + head * cols, stride=share * cols,
                )  # fmt: skip
            self.emit(
                "GEMV", channels=mask, address=lay.cache(self.layer, 0, self.sequence, slot),
                gb=i % at_once * cols, cols=cols, outs=BLOCKS, pitch=lay.p.bursts,
                dst=work + (head - heads.start) * lay.score_cols, stride=share * lay.score_cols,
            )  # fmt: skip

    def values(self, slots: range, heads: range, work: int) -> None:
        """Contexts beyond the global buffer in segments, whose partial sums are added from left to right."""
        lay, m, size = self.layout, self.layout.model, self.layout.p.gb_columns
        share = m.heads // m.kv_heads
        out, partial = lay.sram["h"] + heads.start * lay.head_cols, work + len(heads) * lay.score_cols
        for segment in range(self.context_segments):
            start = segment * size
            cols: Value = size if segment < self.context_segments - 1 else -start + COLUMNS
            to = partial if segment else out
            for slot in slots:
                mask = self.slot_mask(slot)
                address = lay.cache(self.layer, 1, self.sequence, slot) + start
                for i in range(share):
                    head = slot * lay.p.channels * share + i - heads.start
                    self.emit(
                        "WR_GB", following=2, channels=mask, cols=cols,
                        src=work + head * lay.score_cols + start, stride=share * lay.score_cols,
                    )  # fmt: skip
                    for group in range(lay.head_groups):
                        self.emit(
                            "GEMV", following=2, channels=mask, address=address + group * lay.context_cols,
                            cols=cols, pitch=lay.p.bursts,
                            dst=to + head * lay.head_cols + group * lay.p.bursts,
                            stride=share * lay.head_cols,
                        )  # fmt: skip
            if segment:
                n = len(heads) * lay.head_cols * lay.p.lanes
                self.emit("ADD", following=2, dst=out, src=out, src2=to, n=n)

    def head(self, name: str) -> None:
        """Logits tile by tile, each followed by its share of the maximum: they need not fit the SRAM."""
        lay, s = self.layout, self.layout.sram
        matrix, tile = lay.matrices[name], lay.lm_head_outs * lay.unit
        partial = lay.sram["logits"] + lay.buffers * tile
        per_out = lay.p.channels * lay.p.n_banks
        for i, o in enumerate(range(0, matrix.outs, lay.lm_head_outs)):
            outs, at = min(lay.lm_head_outs, matrix.outs - o), lay.sram["logits"] + i % lay.buffers * tile
            for start, cols, base in matrix.segments():
                if o == 0 or matrix.cols > matrix.segment:
                    self.emit("WR_GB", channels=self.everywhere, cols=cols, src=s["h"] + start)
                self.gemv(base + o * cols, cols, outs, partial if start else at)
                if start:
                    self.emit("ADD", dst=at, src=at, src2=partial, n=outs * lay.unit * lay.p.lanes)
            n = min(outs * per_out, matrix.n - o * per_out)
            self.emit("ARGMAX", following=1, src=at, n=n, imm=o * per_out, clear=int(o == 0))


class Steps:
    """The segments of a run, one for each token; generated when walked, from a template for each kind of
    step."""

    def __init__(self, layout: Layout, scenario: Scenario, tokens: NDArray[np.int64]) -> None:
        self.layout, self.scenario = layout, scenario
        self.variables = _variables(layout, scenario.context, tokens)
        flags = {"lm_head": scenario.lm_head, "embedding": scenario.embedding}
        self.operators = decode_step(layout.model, context=0, **flags).operators
        body = decode_step(layout.model, context=0, lm_head=False, embedding=scenario.embedding)
        self.body = body.operators
        self.templates: dict[tuple[bool, int], list[Template]] = {}

    def __len__(self) -> int:
        return self.scenario.prompt + self.scenario.generate

    def __iter__(self) -> Iterator[Segment]:
        prompt = self.scenario.prompt
        for i in range(len(self)):
            label = f"prompt {i}" if i < prompt else f"token {i - prompt}"
            templates = self._templates(i)
            codes = [t.step(v[i]) for t, v in zip(templates, self.variables, strict=True)]
            yield Segment({"code": codes[0] if len(codes) == 1 else np.concatenate(codes)}, label=label)

    def _templates(self, step: int) -> list[Template]:
        """One for each sequence. The LM head works behind the last token of the prompt and the generated
        ones."""
        head = self.scenario.lm_head and step >= self.scenario.prompt - 1
        columns = int(self.variables[0, step, COLUMNS.variable])
        kind = head, ceil_div(columns, self.layout.p.gb_columns)
        if kind not in self.templates:
            self.templates[kind] = []
            for sequence in range(self.layout.batch):
                emitter = _Emitter(self.layout, sequence, kind[1])
                emitter.walk(self.operators if head else self.body)
                records = self.overlapped(emitter.records) if self.layout.overlap else emitter.records
                self.templates[kind].append(Template(records, self.layout.p.columns))
        return self.templates[kind]

    def overlapped(self, records: Sequence[Record]) -> list[Record]:
        """The records in an order for overlap, and what may be alongside, for all steps alike: what moves
        counts as far as it goes in any of them."""
        largest = self.variables.max(axis=(0, 1))
        uses = [
            sram_use(
                self.layout.p,
                op,
                {name: v.value(largest) if isinstance(v, Moving) else v for name, v in fields.items()},
            )
            for op, fields in records
        ]
        return [(records[i][0], {**records[i][1], "alongside": int(a)}) for i, a in schedule(uses)]
