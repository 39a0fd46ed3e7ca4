"""Where everything lies: matrices, vectors and KV cache in the banks, buffers in SRAM."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import pairwise
from typing import Any

from tilewright.arch.errors import UserError, nearest
from tilewright.arch.pim import PimSpec
from tilewright.workloads.models import ModelConfig

# The model's activation -> the ASIC's operation.
ACTIVATIONS = {"gelu_tanh": "GELU", "silu": "SILU", "relu": "RELU"}


OVERLAPPED_TILES = 8
"""Tiles that outputs are cut into if the ASIC works on one while the channels compute the next."""


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


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
        self.overlap = spec.asic.overlap
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
        self.head_groups = ceil_div(model.head_dim, p.n_banks)
        self.head_cols = self.head_groups * p.bursts
        self.slots = ceil_div(model.kv_heads, p.channels)
        self.context_cols = ceil_div(self.tokens, p.lanes)
        self.score_cols = ceil_div(self.tokens, p.n_banks) * p.bursts
        self.d_cols, self.ff_cols = ceil_div(model.d_model, p.lanes), ceil_div(model.d_ff, p.lanes)
        self.rope_cols = ceil_div(model.head_dim, p.lanes)
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
        return Matrix(n, ceil_div(n, self.p.channels * self.p.n_banks), cols, min(cols, self.p.gb_columns))

    def striped(self, elements: int) -> int:
        """Columns for each channel of a vector that is striped over the channels."""
        return ceil_div(ceil_div(elements, self.p.lanes), self.p.channels)

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
        self.kv_sizes = (
            ceil_div(self.tokens, p.n_banks) * self.head_cols,
            self.head_groups * self.context_cols,
        )
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
        sizes["vectors"] = ceil_div(len(self.vectors), p.n_banks) * self.vector_pitch
        if m.position == "rotary":
            sizes["rotary"] = ceil_div(self.tokens, p.n_banks) * self.striped(2 * self.rope_cols * p.lanes)
        elif self.embedding:
            sizes["positions"] = ceil_div(m.position_rows, p.n_banks) * self.striped(m.d_model)
        if self.embedding and not m.tie_embeddings:
            sizes["embedding"] = ceil_div(m.vocab, p.n_banks) * self.striped(m.d_model)
        for layer in range(m.layers):
            for name, size in zip(("keys", "values"), self.kv_sizes, strict=True):
                sizes[f"layer {layer} {name}"] = self.batch * self.slots * size

        rows = {name: ceil_div(size, p.columns) for name, size in sizes.items()}
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

        The logits overlay what lies behind h. With overlap there are two buffers for what the channels write
        while the ASIC still reads the last, and vectors that are loaded early have a place of their own."""
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
        self.buffers = 1 + self.overlap
        self.scratch = p.channels * self.vector_pitch * self.overlap
        sizes["work"] = max(
            self.scratch + max(loads, rotary, self.buffers * self.unit * segmented),
            min(group, m.heads) * (self.score_cols + partial),
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
        most = min(outs, max(1, (work - self.scratch) // (self.buffers * self.unit)))
        self.partial_outs = tiles.whole("partial_outs", self._tile(outs, most), 1, most)
        regions = self.buffers if self.slots > 1 and self.buffers * self.attention_cols(1) <= work else 1
        most = max(s for s in range(1, self.slots + 1) if regions * self.attention_cols(s) <= work)
        self.attention_slots = tiles.whole("attention_slots", 1 if regions > 1 else most, 1, most)
        self.attention_regions = regions
        self.lm_head_outs = 0
        if self.lm_head:
            head = self.matrices["lm_head"]
            buffers = self.buffers + (head.cols != head.segment)
            most = min(head.outs, room // self.unit // buffers)
            if most < 1:
                raise UserError(
                    f"{m.name} does not fit {self.spec.name}: asic.sram_bytes leave no room for logits"
                )
            tile = self._tile(head.outs, most)
            even = ceil_div(head.outs, ceil_div(head.outs, tile))
            self.lm_head_outs = tiles.whole("lm_head_outs", even, 1, most)
        else:
            tiles.same("lm_head_outs", 0)

    def _tile(self, outs: int, most: int) -> int:
        """Outs of a tile: as many as there is room for, or few enough that little is left to the last one."""
        return min(most, ceil_div(outs, OVERLAPPED_TILES)) if self.overlap else most

    def attention_cols(self, slots: int) -> int:
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
