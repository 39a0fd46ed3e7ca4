"""Real weights into the memory image, where a mapping puts them."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewright.arch.errors import UserError, nearest
from tilewright.arch.formats import BF16
from tilewright.arch.pim import PimSpec
from tilewright.mappers.pim.layout import Layout, Matrix
from tilewright.workloads.formats import to_bits
from tilewright.workloads.models import ModelConfig
from tilewright.workloads.pim import Image, blank_image


def place_weights(
    spec: PimSpec, model: ModelConfig, document: Mapping[str, Any], weights: Mapping[str, ArrayLike]
) -> Image:
    """The image that a program mapped with `document` starts from: bfloat16 weights, an empty KV cache.

    A matrix is [in, out], its outputs in the model's order, under "layer 0 qkv" (Q, K and V heads side by side), "layer 0 attention_out",
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
                order = self.order(name, w.shape[1])
                w = w[:, order]
                if name == "attention_out":
                    w = padded(w, 0, m.head_dim, head)
                if name in out_pads:
                    w = padded(w, 1, *out_pads[name])
                self.matrix(lay.matrices[key], w)
                if f"{name}.bias" in lay.layer_vectors:
                    bias = self.get(f"{key}.bias", shapes[name][1:])[order]
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

    def order(self, name: str, outputs: int) -> NDArray[np.int64]:
        """Which output of a matrix lies in which place. The rotary embedding turns element i of a head with
        element i + head_dim / 2: in Q and K they become neighbours, which leaves q k as it is."""
        m, places = self.layout.model, np.arange(outputs)
        if name == "qkv" and m.position == "rotary":
            turned = (m.heads + m.kv_heads) * m.head_dim
            pairs = places[:turned].reshape(-1, 2, m.head_dim // 2).swapaxes(1, 2)
            places[:turned] = pairs.ravel()
        return places

    def rotary(self) -> NDArray[np.float64]:
        """A row for each position: a cosine for each element, then as many sines, each in whole columns. A
        pair's two elements have the same cosine; the first has minus the sine. Angle of pair i: position *
        theta**(-2i / head_dim) (Su et al., "RoFormer", 2021)."""
        lay, m = self.layout, self.layout.model
        half, width = m.head_dim // 2, lay.rope_cols * lay.p.lanes
        angles = (
            np.arange(lay.tokens)[:, None] * float(m.rope_theta or 0) ** (-np.arange(half) / half)[None, :]
        )
        rows = np.zeros((lay.tokens, 2 * width))
        rows[:, : m.head_dim] = np.repeat(np.cos(angles), 2, axis=1)
        rows[:, width : width + m.head_dim] = np.repeat(np.sin(angles), 2, axis=1) * np.tile([-1, 1], half)
        return rows
