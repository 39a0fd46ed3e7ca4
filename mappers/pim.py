"""Maps decoders onto PIM-GPT: one program segment for each token, weights and KV cache laid out in the banks.

Layout, with C channels, B banks, L lanes and B / L = `bursts` columns for one output of all banks:

- Matrix: output n is computed in out o, channel c, bank b with n = (o*C + c)*B + b. The input is cut into
  segments that fit the global buffer; a segment's columns of consecutive outs follow one another in every
  bank, over row ends.
- Head vectors are padded with zeros to whole outputs of all banks, ceil(head_dim / B) * B elements.
- Vector (bias, gain, position, embedding row): columns striped over the channels in one bank.
- KV head g lives in channel g mod C, slot g // C. Keys row-major: token t in bank t mod B, columns t // B *
  head columns. Values column-major: element i in bank i mod B, group i // B; token t in lane t mod L of
  column t // L.

Padding is sound as long as the KV cache is zero where nothing was written: the scores of tokens that are not
there yet are then q * 0 = 0 in a whole column, the softmax leaves them alone, and 0 * 0 adds nothing to the
values.

Mapping after Wu, Wang, Lu, "PIM-GPT", npj Unconventional Computing 2024: concatenated heads, weights
packed for row hits, keys row-major and values column-major.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import pairwise
from math import sqrt
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewright.arch.errors import UserError, nearest
from tilewright.arch.formats import BF16
from tilewright.arch.isa import Program, Segment
from tilewright.arch.pim import ISA, OP, PimSpec
from tilewright.arch.scenario import Mapped, Scenario, TagInfo
from tilewright.workloads.formats import to_bits
from tilewright.workloads.graph import Operator, decode_step
from tilewright.workloads.models import ModelConfig
from tilewright.workloads.pim import Image, blank_image

_CODE = ISA.record("code")
_ACTIVATIONS = {"gelu_tanh": "GELU", "silu": "SILU", "relu": "RELU"}


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


def _float_bits(value: float | str) -> int:
    return int(np.float32(value).view(np.uint32))


# ---- what the target can run --------------------------------------------------------------------------


def check_model(model: ModelConfig, tokens: int) -> None:
    """Raises UserError, naming the feature, for a model that this mapper does not support."""
    binding = [w for w in map(model.window, range(model.layers)) if w is not None and w < tokens]
    unsupported = {
        "encoders": not model.causal,
        "mixtures of experts": model.experts > 0,
        "ALiBi positions": model.position == "alibi",
        "parallel attention and MLP": model.parallel_attention,
        "norms behind the residual addition": model.post_norm,
        "a norm of the embedding": model.embedding_norm,
        "norms of Q and K": model.qk_norm,
        "BitNet's sub-norms": model.sub_norms,
        "an embedding narrower than the model": model.d_embed != model.d_model,
        "a model without a final norm": not model.final_norm,
        f"a sliding window of {binding[0] if binding else 0} over {tokens} tokens": bool(binding),
        f"the activation {model.activation} (allowed: {', '.join(_ACTIVATIONS)})": (
            model.activation not in _ACTIVATIONS
        ),
    }
    for what, present in unsupported.items():
        if present:
            raise UserError(f"{model.name}: target pim does not support {what}")


# ---- layout -------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """A weight matrix in the banks: `n` outputs from an input of `cols` columns, from column `base` on."""

    n: int
    outs: int
    cols: int
    segment: int
    """Columns of all input segments but the last."""
    base: int = 0

    @property
    def columns(self) -> int:
        return self.outs * self.cols

    def segments(self) -> Iterator[tuple[int, int, int]]:
        """(first input column, columns, first bank column) of each segment."""
        for start in range(0, self.cols, self.segment):
            yield start, min(self.segment, self.cols - start), self.base + self.outs * start


class Layout:
    """Where everything lies in DRAM and SRAM; every choice can be given by a mapping document.

    Columns count from 0 in each bank (DRAM) or in the SRAM; the same in all channels and banks.
    """

    def __init__(
        self,
        spec: PimSpec,
        model: ModelConfig,
        *,
        tokens: int,
        batch: int,
        lm_head: bool,
        embedding: bool,
        mapping: Mapping[str, Any] | None = None,
    ) -> None:
        """`tokens` of KV cache for each of `batch` sequences.

        Raises UserError if the model does not fit, or for a value of `mapping` that is not allowed.
        """
        self.spec, self.model, self.batch = spec, model, batch
        self.lm_head, self.embedding = lm_head, embedding
        self.p = p = spec.params()
        given = _Given(mapping or {}, "mapping")
        given.keys(
            "target", "model", "spec", "batch", "lm_head", "embedding", "cache_tokens", "tiles", "sram",
            "heads", "regions",
        )  # fmt: skip
        for key, value in (
            ("target", "pim"), ("model", model.name), ("batch", batch), ("lm_head", lm_head),
            ("embedding", embedding),
        ):  # fmt: skip
            given.same(key, value)
        self.tokens = given.whole("cache_tokens", tokens, tokens, 10**9)

        self.unit = p.channels * p.bursts  # SRAM columns of one out of all channels
        self.head_groups = _ceil(model.head_dim, p.n_banks)
        self.head_cols = self.head_groups * p.bursts
        self.slots = _ceil(model.kv_heads, p.channels)
        self.context_cols = _ceil(self.tokens, p.lanes)
        self.score_cols = _ceil(self.tokens, p.n_banks) * p.bursts
        self.d_cols, self.ff_cols = _ceil(model.d_model, p.lanes), _ceil(model.d_ff, p.lanes)
        self.rope_cols = _ceil(model.head_dim // 2, p.lanes)
        if self.head_cols > p.gb_columns:
            raise UserError(
                f"{model.name} does not fit {spec.name}: a head of {model.head_dim} needs {self.head_cols} "
                f"columns of global buffer, pim.global_buffer_bytes has {p.gb_columns}"
            )
        self._place_dram(given.section("regions"))
        self._place_sram(given.section("sram"), given.section("tiles"))
        given.same("heads", self.heads)

    @property
    def heads(self) -> list[dict[str, int]]:
        """Channel and slot of each KV head."""
        c = self.p.channels
        return [{"channel": g % c, "slot": g // c} for g in range(self.model.kv_heads)]

    @property
    def document(self) -> dict[str, Any]:
        """The mapping as plain data; rows and columns as explained in the class."""
        return {
            "target": "pim",
            "model": self.model.name,
            "spec": self.spec.name,
            "batch": self.batch,
            "lm_head": self.lm_head,
            "embedding": self.embedding,
            "cache_tokens": self.tokens,
            "tiles": {
                "lm_head_outs": self.lm_head_outs,
                "partial_outs": self.partial_outs,
                "attention_slots": self.attention_slots,
            },
            "sram": dict(self.sram),
            "heads": self.heads,
            "regions": dict(self.rows),
        }

    # ---- DRAM ---------------------------------------------------------------------------------------

    def matrix(self, n: int, cols: int) -> Matrix:
        return Matrix(n, _ceil(n, self.p.channels * self.p.n_banks), cols, min(cols, self.p.gb_columns))

    def striped(self, elements: int) -> int:
        """Columns for each channel of a vector that is striped over the channels."""
        return _ceil(_ceil(elements, self.p.lanes), self.p.channels)

    @cached_property
    def layer_matrices(self) -> dict[str, Matrix]:
        """The matrices of a layer by operator, without their place."""
        m, lanes, padded = self.model, self.p.lanes, self.head_cols * self.p.lanes
        up = (
            {"gate_up": self.matrix(2 * self.ff_cols * lanes, self.d_cols)}
            if m.gated_mlp
            else {"up": self.matrix(m.d_ff, self.d_cols)}
        )
        return {
            "qkv": self.matrix((m.heads + 2 * m.kv_heads) * padded, self.d_cols),
            "attention_out": self.matrix(m.d_model, m.heads * self.head_cols),
            **up,
            "down": self.matrix(m.d_model, self.ff_cols),
        }

    @cached_property
    def layer_vectors(self) -> dict[str, int]:
        """Elements of the vectors of a layer, by name."""
        m = self.model
        biased = {"qkv": m.qkv_bias, "attention_out": m.attention_out_bias}
        out: dict[str, int] = {}
        for norm in ("attention_norm", "mlp_norm"):
            out |= {f"{norm}.{part}": m.d_model for part in self.norm_parts}
        for name, matrix in self.layer_matrices.items():
            if biased.get(name, m.mlp_bias):
                out[f"{name}.bias"] = matrix.n
        return out

    @property
    def norm_parts(self) -> tuple[str, ...]:
        return ("gain", "bias") if self.model.norm == "layernorm" else ("gain",)

    def _place_dram(self, given: "_Given") -> None:
        p, m = self.p, self.model
        sizes: dict[str, int] = {}
        self.matrices: dict[str, Matrix] = {}
        self.vectors: dict[str, int] = {}
        self.kv_sizes = (_ceil(self.tokens, p.n_banks) * self.head_cols, self.head_groups * self.context_cols)
        for layer in range(m.layers):
            for name, matrix in self.layer_matrices.items():
                self.matrices[f"layer {layer} {name}"] = matrix
            for name, elements in self.layer_vectors.items():
                self.vectors[f"layer {layer} {name}"] = elements
        if self.lm_head or (self.embedding and m.tie_embeddings):
            self.matrices["lm_head"] = self.matrix(m.vocab, self.d_cols)
        if self.lm_head:
            self.vectors |= {f"final_norm.{part}": m.d_model for part in self.norm_parts}
        sizes |= {name: matrix.columns for name, matrix in self.matrices.items()}
        self.vector_pitch = max(map(self.striped, self.vectors.values()))
        self.vector_index = {name: i for i, name in enumerate(self.vectors)}
        sizes["vectors"] = _ceil(len(self.vectors), p.n_banks) * self.vector_pitch
        if m.position == "rotary":
            sizes["rotary"] = _ceil(self.tokens, p.n_banks) * self.striped(2 * self.rope_cols * p.lanes)
        elif self.embedding:
            sizes["positions"] = _ceil(m.position_rows, p.n_banks) * self.striped(m.d_model)
        if self.embedding and not m.tie_embeddings:
            sizes["embedding"] = _ceil(m.vocab, p.n_banks) * self.striped(m.d_model)
        for layer in range(m.layers):
            for name, size in zip(("keys", "values"), self.kv_sizes, strict=True):
                sizes[f"layer {layer} {name}"] = self.batch * self.slots * size

        rows = {name: _ceil(size, p.columns) for name, size in sizes.items()}
        need = sum(rows.values())
        if need > p.rows:
            excess = 100 * (need - p.rows) / p.rows
            raise UserError(
                f"{m.name} does not fit {self.spec.name}: needs {need} rows a bank, has {p.rows} "
                f"({excess:.1f} % too much)"
            )
        self.rows, self.row_sizes = given.places(rows, p.rows, "row"), rows
        self.base = {name: row * p.columns for name, row in self.rows.items()}
        self.matrices = {name: replace(x, base=self.base[name]) for name, x in self.matrices.items()}

    def vector(self, name: str) -> tuple[int, int, int]:
        """(bank, first column, columns for each channel) of a vector."""
        i = self.vector_index[name]
        at = self.base["vectors"] + i // self.p.n_banks * self.vector_pitch
        return i % self.p.n_banks, at, self.striped(self.vectors[name])

    def cache(self, layer: int, which: int, sequence: int, slot: int) -> int:
        """First column of the keys (`which` 0) or values (1) of a slot."""
        place = sequence * self.slots + slot
        return self.base[f"layer {layer} {('keys', 'values')[which]}"] + place * self.kv_sizes[which]

    # ---- SRAM ---------------------------------------------------------------------------------------

    def _place_sram(self, given: "_Given", tiles: "_Given") -> None:
        """x: residual; h: normed input, attention output; y: QKV or MLP; z: branch output; work: the rest.

        The logits overlay what lies behind h."""
        p, m = self.p, self.model
        by_operator = self.layer_matrices
        wide = [x.outs for name, x in by_operator.items() if name in ("qkv", "up", "gate_up")]
        narrow = [x.outs for name, x in by_operator.items() if name in ("attention_out", "down")]
        sizes = {
            "x": max(self.d_cols, p.channels * self.striped(m.d_model)),
            "h": max(self.d_cols, m.heads * self.head_cols),
            "y": max(wide) * self.unit,
            "z": max(narrow) * self.unit,
        }
        segmented = any(x.cols > x.segment for x in by_operator.values())
        loads = p.channels * (self.vector_pitch + self.striped(m.d_model))  # two vectors side by side
        rotary = p.channels * self.striped(2 * self.rope_cols * p.lanes) if m.position == "rotary" else 0
        group = m.heads // m.kv_heads * p.channels  # heads of a slot
        partial = self.head_cols if self.context_cols > p.gb_columns else 0
        sizes["work"] = max(
            loads, rotary, self.unit * segmented, min(group, m.heads) * (self.score_cols + partial)
        )
        need = sum(sizes.values())
        if need > p.sram_columns:
            raise UserError(
                f"{m.name} does not fit {self.spec.name}: needs {need * 2 * p.lanes} bytes of SRAM, "
                f"asic.sram_bytes is {self.spec.asic.sram_bytes}"
            )
        given.keys(*sizes, "logits")
        places = given.without("logits").places(sizes, p.sram_columns, "SRAM column")
        behind = max(places[b] + sizes[b] for b in "xh")
        if behind >= p.sram_columns:
            raise UserError(
                f"{given.path}: x and h end at column {behind}, which leaves no room for the logits"
            )
        logits = given.whole("logits", behind, behind, p.sram_columns - 1)
        room = p.sram_columns - logits
        self.sram = places | {"logits": logits}

        work = (
            min([c for c in places.values() if c > places["work"]], default=p.sram_columns) - places["work"]
        )
        tiles.keys("lm_head_outs", "partial_outs", "attention_slots")
        outs = max(x.outs for x in by_operator.values())
        most = min(outs, max(1, work // self.unit))
        self.partial_outs = tiles.whole("partial_outs", most, 1, most)
        most = max(s for s in range(1, self.slots + 1) if self._attention(s) <= work)
        self.attention_slots = tiles.whole("attention_slots", most, 1, most)
        self.lm_head_outs = 0
        if self.lm_head:
            head = self.matrices["lm_head"]
            most = min(head.outs, room // self.unit // (1 if head.cols == head.segment else 2))
            if most < 1:
                raise UserError(
                    f"{m.name} does not fit {self.spec.name}: asic.sram_bytes leave no room for logits"
                )
            even = _ceil(head.outs, _ceil(head.outs, most))
            self.lm_head_outs = tiles.whole("lm_head_outs", even, 1, most)
        else:
            tiles.same("lm_head_outs", 0)

    def _attention(self, slots: int) -> int:
        """SRAM columns for scores, and partial values where the context exceeds the global buffer."""
        per_head = self.score_cols + (self.head_cols if self.context_cols > self.p.gb_columns else 0)
        return len(self.slot_heads(0, slots)) * per_head

    def slot_heads(self, first: int, last: int) -> range:
        """The query heads of slots first to last - 1."""
        share = self.model.heads // self.model.kv_heads
        return range(
            first * self.p.channels * share, min(last * self.p.channels, self.model.kv_heads) * share
        )


class _Given:
    """A section of a mapping document: values that override a choice, checked."""

    def __init__(self, values: Any, path: str) -> None:
        if not isinstance(values, Mapping):
            raise UserError(f"{path} must be a mapping, not {values!r}")
        self.values, self.path = values, path

    def keys(self, *allowed: str) -> None:
        for key in self.values:
            if key not in allowed:
                raise UserError(f"{self.path} has no {key!r}: {nearest(str(key), allowed)}")

    def section(self, key: str) -> "_Given":
        return _Given(self.values.get(key, {}), f"{self.path}.{key}")

    def without(self, key: str) -> "_Given":
        return _Given({k: v for k, v in self.values.items() if k != key}, self.path)

    def same(self, key: str, value: Any) -> None:
        """A value that follows from the rest: it may be given, but not changed."""
        if key in self.values and self.values[key] != value:
            raise UserError(f"{self.path}.{key} must be {value!r} here, not {self.values[key]!r}")

    def whole(self, key: str, default: int, low: int, high: int) -> int:
        value = self.values.get(key, default)
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise UserError(f"{self.path}.{key} must be a whole number in {low}..{high}, not {value!r}")
        return value

    def places(self, sizes: Mapping[str, int], limit: int, what: str) -> dict[str, int]:
        """First `what` of each named item, by default one behind the other; no two may overlap."""
        self.keys(*sizes)
        out: dict[str, int] = {}
        at = 0
        for name, size in sizes.items():
            out[name] = self.whole(name, at, 0, limit - size)
            at += size
        order = sorted(sizes, key=lambda name: out[name])
        for a, b in pairwise(order):
            if out[a] + sizes[a] > out[b]:
                raise UserError(
                    f"{self.path}.{b} must be at least {out[a] + sizes[a]}, the {what} behind {a}, "
                    f"not {out[b]}"
                )
        return out


# ---- steps --------------------------------------------------------------------------------------------


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


# What a step depends on; `_variables` computes them.
TOKENS, BLOCKS, COLUMNS, BANK, BLOCK, LANE, COLUMN, POSITION_BANK, POSITION_BLOCK = map(Moving, range(9))
TOKEN_CHANNEL, TOKEN_BANK, TOKEN_OUT, TABLE_BANK, TABLE_BLOCK = map(Moving, range(9, 14))

Value = int | Moving


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

    def __init__(self, records: Sequence[tuple[str, Mapping[str, Value]]], columns: int) -> None:
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
    records: list[tuple[str, Mapping[str, Value]]] = field(default_factory=list)
    tag: int = 0
    layer: int = -1

    def walk(self, operators: Sequence[Operator]) -> None:
        handlers: dict[str, Callable[[str], None]] = {
            "embedding": self.embedding, "positions": self.positions, "attention_norm": self.norm,
            "qkv": self.qkv, "rotary": self.rotary, "kv_append": self.kv_append, "scores": self.attention,
            "attention_out": self.attention_out, "attention_add": self.add, "mlp_norm": self.norm,
            "up": self.up, "gate_up": self.up, "activation": self.activation, "gate": self.gate,
            "down": self.down, "mlp_add": self.add, "final_norm": self.norm, "lm_head": self.head,
        }  # fmt: skip
        for tag, operator in enumerate(operators):
            self.tag, self.layer = tag, operator.layer
            # Softmax and values come with the scores, argmax with the LM head: tile by tile.
            if operator.name not in ("softmax", "values", "argmax"):
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
        gain, bias = s["work"], self.load(f"{name}.gain", s["work"])
        if m.d_model % lanes:
            # The last column of h goes to the global buffer whole: its end must be zero, as that of x is.
            last = lay.d_cols - 1
            self.emit("ADD", dst=s["h"] + last, src=s["x"] + last, src2=s["x"] + last, n=lanes)
        fields = {"dst": s["h"], "src": s["x"], "src2": gain, "n": m.d_model, "imm": _float_bits(m.norm_eps)}
        if m.norm == "layernorm":
            self.load(f"{name}.bias", bias)
            self.emit("LAYERNORM", src3=bias, **fields)
        else:
            self.emit("RMSNORM", **fields)

    def linear(self, name: str, src: str, dst: str) -> None:
        """Segments of the input one after the other; partial sums are added from left to right, then the
        bias."""
        lay, s = self.layout, self.layout.sram
        matrix, unit = lay.matrices[self.named(name)], lay.unit
        for start, cols, base in matrix.segments():
            self.emit("WR_GB", channels=self.everywhere, cols=cols, src=s[src] + start)
            tile = matrix.outs if start == 0 else lay.partial_outs
            for o in range(0, matrix.outs, tile):
                outs = min(tile, matrix.outs - o)
                to = s[dst] if start == 0 else s["work"]
                self.gemv(base + o * cols, cols, outs, to)
                if start:
                    at, n = s[dst] + o * unit, outs * unit * lay.p.lanes
                    self.emit("ADD", dst=at, src=at, src2=to, n=n)
        if f"{self.named(name)}.bias" in lay.vectors:
            self.load(f"{name}.bias", s["work"])
            n = _ceil(matrix.n, lay.p.lanes) * lay.p.lanes
            self.emit("ADD", dst=s[dst], src=s[dst], src2=s["work"], n=n)

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
        self.linear(name, "h", "y")

    def down(self, name: str) -> None:
        self.linear(name, "y", "z")

    def activation(self, _: str) -> None:
        lay = self.layout
        y = lay.sram["y"]
        self.emit(_ACTIVATIONS[lay.model.activation], dst=y, src=y, n=lay.model.d_ff)

    def gate(self, _: str) -> None:
        lay = self.layout
        y = lay.sram["y"]
        self.emit("MUL", dst=y, src=y, src2=y + lay.ff_cols, n=lay.model.d_ff)

    def rotary(self, _: str) -> None:
        """Q and K lie one behind the other: one instruction turns all heads."""
        lay, s, m = self.layout, self.layout.sram, self.layout.model
        self.load_row("rotary", BANK, BLOCK, 2 * lay.rope_cols * lay.p.lanes, s["work"])
        self.emit(
            "ROPE", dst=s["y"], src=s["y"], src2=s["work"], src3=s["work"] + lay.rope_cols, n=m.head_dim,
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
        """Scores, softmax and values of as many slots at a time as the SRAM holds."""
        lay, m = self.layout, self.layout.model
        for first in range(0, lay.slots, lay.attention_slots):
            slots = range(first, min(first + lay.attention_slots, lay.slots))
            heads = lay.slot_heads(slots.start, slots.stop)
            for slot in slots:
                self.scores(slot, heads)
            work = lay.sram["work"]
            self.emit(
                "SOFTMAX", following=1, dst=work, src=work, n=TOKENS, outs=len(heads), pitch=lay.score_cols,
                imm=_float_bits(1 / sqrt(m.head_dim)),
            )  # fmt: skip
            self.values(slots, heads)

    def scores(self, slot: int, heads: range) -> None:
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
                dst=lay.sram["work"] + (head - heads.start) * lay.score_cols, stride=share * lay.score_cols,
            )  # fmt: skip

    def values(self, slots: range, heads: range) -> None:
        """Contexts beyond the global buffer in segments, whose partial sums are added from left to right."""
        lay, m, size = self.layout, self.layout.model, self.layout.p.gb_columns
        share, work = m.heads // m.kv_heads, lay.sram["work"]
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
        matrix, at = lay.matrices[name], lay.sram["logits"]
        partial = at + lay.lm_head_outs * lay.unit
        per_out = lay.p.channels * lay.p.n_banks
        for o in range(0, matrix.outs, lay.lm_head_outs):
            outs = min(lay.lm_head_outs, matrix.outs - o)
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
        kind = head, _ceil(columns, self.layout.p.gb_columns)
        if kind not in self.templates:
            self.templates[kind] = []
            for sequence in range(self.layout.batch):
                emitter = _Emitter(self.layout, sequence, kind[1])
                emitter.walk(self.operators if head else self.body)
                self.templates[kind].append(Template(emitter.records, self.layout.p.columns))
        return self.templates[kind]


# ---- the mapper ---------------------------------------------------------------------------------------


def map_model(
    spec: PimSpec,
    model: ModelConfig,
    scenario: Scenario,
    mapping: Mapping[str, Any] | None = None,
    tokens: ArrayLike | None = None,
) -> Mapped:
    """The program of `scenario`: every token of prompt and generation is one step of one segment.

    A prompt runs token by token, and the LM head only behind its last one. The sequences of a batch follow
    one another within a step, each with its own KV cache. `tokens` are the token ids by step, [prompt +
    generate] or [batch, prompt + generate]; they are drawn at random if left out. `mapping` is a document as
    this function returns it, or parts of one, that overrides its choices.

    Raises UserError for a model that the target does not support or that does not fit, for more tokens than
    the model has positions, and for values of `mapping` or `tokens` that are not allowed; walking the
    segments does so where a size exceeds the field of an instruction.
    """
    steps = scenario.prompt + scenario.generate
    total = scenario.context + steps
    check_model(model, total)
    if model.positions is not None and total > model.positions:
        raise UserError(
            f"{model.name} has {model.positions} positions: context {scenario.context} + prompt "
            f"{scenario.prompt} + generate {scenario.generate} are {total - model.positions} too many"
        )
    layout = Layout(
        spec, model, tokens=total, batch=scenario.batch, lm_head=scenario.lm_head,
        embedding=scenario.embedding, mapping=mapping,
    )  # fmt: skip
    assumed = []
    if tokens is None:
        ids = np.random.default_rng(scenario.seed).integers(model.vocab, size=(scenario.batch, steps))
        if scenario.embedding:
            assumed.append(
                f"token ids: random, seed {scenario.seed}; they choose the bank that the "
                "embedding row is read from"
            )
    else:
        ids = _token_ids(tokens, model, scenario.batch, steps)
    segments = Steps(layout, scenario, ids)
    tags = [
        TagInfo(f"layer {op.layer} {op.name}" if op.layer >= 0 else op.name, op.name, op.layer)
        for op in segments.operators
    ]
    rows = f"{sum(layout.row_sizes.values())} of {layout.p.rows} rows in every bank"
    return Mapped(
        program=Program(ISA, segments, [tag.name.replace(" ", "_") for tag in tags]),
        tags=tags,
        steps=steps,
        document=layout.document,
        notes=(
            f"{rows}; KV cache for {layout.tokens} tokens x {layout.batch}",
            "the KV cache must be zero where no token was written",
        ),
        assumed=assumed,
    )


def _token_ids(tokens: ArrayLike, model: ModelConfig, batch: int, steps: int) -> NDArray[np.int64]:
    ids = np.asarray(tokens)
    shapes = [(batch, steps)] + [(steps,)] * (batch == 1)
    if ids.dtype.kind not in "iu" or ids.shape not in shapes:
        raise UserError(
            f"tokens must be {batch} x {steps} whole numbers, not {ids.dtype} of shape {ids.shape}"
        )
    if ids.min() < 0 or ids.max() >= model.vocab:
        bad = ids[(ids < 0) | (ids >= model.vocab)].flat[0]
        raise UserError(f"tokens must be in 0..{model.vocab - 1}, not {bad}")
    return ids.reshape(batch, steps).astype(np.int64)


# ---- weights ------------------------------------------------------------------------------------------


def place_weights(
    spec: PimSpec, model: ModelConfig, document: Mapping[str, Any], weights: Mapping[str, ArrayLike]
) -> Image:
    """The image that a program mapped with `document` starts from: bfloat16 weights, an empty KV cache.

    A matrix is [in, out], under "layer 0 qkv" (Q, K and V heads side by side), "layer 0 attention_out",
    "layer 0 up" or "layer 0 gate_up" (gate first), "layer 0 down" and, unless tied, "lm_head". Vectors:
    "layer 0 qkv.bias", "layer 0 attention_norm.gain", ".bias", "layer 0 mlp_norm...", "final_norm...".
    Tables: "embedding" [vocab, d_model], "positions" [position_rows, d_model]. The rotary table is computed.
    Raises UserError for an array that is missing, unknown or of another shape.
    """
    layout = Layout(
        spec, model, tokens=document["cache_tokens"], batch=document["batch"], lm_head=document["lm_head"],
        embedding=document["embedding"], mapping=document,
    )  # fmt: skip
    return _Placer(layout, weights).place()


class _Placer:
    def __init__(self, layout: Layout, weights: Mapping[str, ArrayLike]) -> None:
        self.layout, self.weights = layout, weights
        self.image = blank_image(layout.p)
        p = layout.p
        self.dram = self.image["dram"].reshape(p.channels, p.n_banks, -1, p.lanes)
        self.used: set[str] = set()

    def place(self) -> Image:
        lay, m, lanes = self.layout, self.layout.model, self.layout.p.lanes
        head, ff = lay.head_cols * lanes, lay.ff_cols * lanes

        def padded(array: NDArray[Any], axis: int, size: int, to: int) -> NDArray[Any]:
            """Pieces of `size` along an axis, each filled up with zeros to `to`."""
            shape = array.shape
            pieces = array.reshape(*shape[:axis], -1, size, *shape[axis + 1 :])
            widths = [(0, 0)] * pieces.ndim
            widths[axis + 1] = (0, to - size)
            return np.pad(pieces, widths).reshape(*shape[:axis], -1, *shape[axis + 1 :])

        shapes = {
            "qkv": (m.d_model, m.q_dim + 2 * m.kv_dim),
            "attention_out": (m.q_dim, m.d_model),
            "up": (m.d_model, m.d_ff),
            "gate_up": (m.d_model, 2 * m.d_ff),
            "down": (m.d_ff, m.d_model),
        }
        out_pads = {"qkv": (m.head_dim, head), "gate_up": (m.d_ff, ff), "up": (m.d_ff, m.d_ff)}
        for layer in range(m.layers):
            for name in lay.layer_matrices:
                key = f"layer {layer} {name}"
                w = self.get(key, shapes[name])
                if name == "attention_out":
                    w = padded(w, 0, m.head_dim, head)
                if name in out_pads:
                    w = padded(w, 1, *out_pads[name])
                self.matrix(lay.matrices[key], w)
                if f"{name}.bias" in lay.layer_vectors:
                    bias = self.get(f"{key}.bias", shapes[name][1:])
                    self.vector(f"{key}.bias", padded(bias, 0, *out_pads.get(name, (bias.size, bias.size))))
            for norm in ("attention_norm", "mlp_norm"):
                self.norm(f"layer {layer} {norm}")
        if lay.lm_head:
            self.norm("final_norm")
        if "lm_head" in lay.matrices:
            tied = m.tie_embeddings
            name, shape = ("embedding", (m.vocab, m.d_model)) if tied else ("lm_head", (m.d_model, m.vocab))
            w = self.get(name, shape)
            self.matrix(lay.matrices["lm_head"], w.T if tied else w)
        if "embedding" in lay.base:
            self.table("embedding", self.get("embedding", (m.vocab, m.d_model)))
        if "positions" in lay.base:
            self.table("positions", self.get("positions", (m.position_rows, m.d_model)))
        if "rotary" in lay.base:
            self.table("rotary", self.rotary())
        unknown = set(self.weights) - self.used
        if unknown:
            raise UserError(f"weights: {min(unknown)!r} is not used: {nearest(min(unknown), self.used)}")
        return self.image

    def get(self, name: str, shape: tuple[int, ...]) -> NDArray[np.float64]:
        if name not in self.weights:
            raise UserError(f"weights: {name!r} is missing, an array of shape {shape}")
        array = np.asarray(self.weights[name], np.float64)
        if array.shape != shape:
            raise UserError(f"weights: {name!r} must have shape {shape}, not {array.shape}")
        self.used.add(name)
        return array

    def matrix(self, matrix: Matrix, w: NDArray[np.float64]) -> None:
        """[in, out] to the banks: out n = (o*C + c)*B + b, input column j of its segment at o*cols + j."""
        p = self.layout.p
        full = np.zeros((matrix.cols * p.lanes, matrix.outs * p.channels * p.n_banks))
        full[: w.shape[0], : w.shape[1]] = w
        bits = to_bits(full, BF16).reshape(matrix.cols, p.lanes, matrix.outs, p.channels, p.n_banks)
        for start, cols, base in matrix.segments():
            part = bits[start : start + cols].transpose(3, 4, 2, 0, 1)  # channel, bank, out, column, lane
            end = base + matrix.outs * cols
            self.dram[:, :, base:end] = part.reshape(p.channels, p.n_banks, -1, p.lanes)

    def stripe(self, bank: int, address: int, cols: int, values: NDArray[np.float64]) -> None:
        p = self.layout.p
        full = np.zeros(p.channels * cols * p.lanes)
        full[: values.size] = values
        self.dram[:, bank, address : address + cols] = to_bits(full, BF16).reshape(p.channels, cols, p.lanes)

    def vector(self, name: str, values: NDArray[np.float64]) -> None:
        self.stripe(*self.layout.vector(name), values)

    def norm(self, name: str) -> None:
        for part in self.layout.norm_parts:
            self.vector(f"{name}.{part}", self.get(f"{name}.{part}", (self.layout.model.d_model,)))

    def table(self, name: str, rows: NDArray[np.float64]) -> None:
        lay = self.layout
        cols = lay.striped(rows.shape[1])
        for i, row in enumerate(rows):
            self.stripe(i % lay.p.n_banks, lay.base[name] + i // lay.p.n_banks * cols, cols, row)

    def rotary(self) -> NDArray[np.float64]:
        """A row for each position: cosines, then sines, each in whole columns. Angle i: position *
        theta**(-2i / head_dim) (Su et al., "RoFormer", 2021)."""
        lay, m = self.layout, self.layout.model
        half, width = m.head_dim // 2, lay.rope_cols * lay.p.lanes
        angles = (
            np.arange(lay.tokens)[:, None] * float(m.rope_theta or 0) ** (-np.arange(half) / half)[None, :]
        )
        rows = np.zeros((lay.tokens, 2 * width))
        rows[:, :half], rows[:, width : width + half] = np.cos(angles), np.sin(angles)
        return rows
