"""Groups of stages that operators over rows and those for a token are both made of."""

from collections.abc import Sequence
from math import prod
from typing import Any

import numpy as np

from tilewright.arch.errors import UserError
from tilewright.arch.rdu import ADDRESS_BITS, LEVELS
from tilewright.mappers.rdu.layer import Op
from tilewright.mappers.rdu.stages import BF16_BYTES, Flow, Pipeline, ceil_div, stage
from tilewright.workloads.models import ModelConfig

__all__ = [
    "GELU_CUBIC",
    "GELU_SCALE",
    "LOWEST",
    "MEETING",
    "activation_stages",
    "cached",
    "has_bias",
    "rotated",
    "softmax",
    "weighted",
    "weights_of",
]  # fmt: skip

LOWEST = -1e30
"""What the score of a masked key is."""
MEETING = 48
"""Streams of results that meet at one buffer, where their weights allow so few."""
QUICK_GELU = 1.702
GELU_CUBIC = 0.044715
GELU_SCALE = float(2 * np.sqrt(2 / np.pi))


def activation_stages(activation: str, gated: bool) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Stages for register 0 (times register 1, if gated), and the tail's fields."""
    gate = [stage("multiply", 0, 1, 5)] if gated else [stage("pass", 0, 0, 5)]
    if activation == "silu":
        return gate, {"result": 0, "function": "sigmoid", "gated": 1, "gate": 5}
    if activation == "quick_gelu":
        return [*gate, stage("multiply", 0, QUICK_GELU, 4)], {
            "result": 4, "function": "sigmoid", "gated": 1, "gate": 5,
        }  # fmt: skip
    if activation in ("gelu", "gelu_tanh"):  # (1 + tanh(z)) / 2 = sigmoid(2 z)
        return [
            *gate,
            stage("multiply", 0, 0, 4),
            stage("multiply", 4, GELU_CUBIC, 4),
            stage("add", 4, 1.0, 4),
            stage("multiply", 4, 0, 4),
            stage("multiply", 4, GELU_SCALE, 4),
        ], {"result": 4, "function": "sigmoid", "gated": 1, "gate": 5}
    out = [stage("maximum", 0, 0.0, 4)]
    if activation == "relu2":
        out.append(stage("multiply", 4, 4, 4))
    if gated:
        out.append(stage("multiply", 4, 1, 4))
    return out, {"result": 4}


def has_bias(model: ModelConfig, name: str) -> bool:
    """Whether a product of the model adds a bias."""
    if name.endswith("_dx"):  # of a gradient
        return False
    return {
        "qkv": model.qkv_bias,
        "attention_out": model.attention_out_bias,
        "lm_head": False,
        "router": False,
        "patches": False,
    }.get(name, model.mlp_bias)


def rotated(line: Pipeline, name: str, qkv: Flow, dim: int, heads: int, row: int | None = None) -> Flow:
    """Rotary positions on the first `heads` heads of `dim` columns each; `row` bytes from block to block of
    the tables, as of `Pipeline.load`."""
    half = dim // 2
    x = line.read(f"{name}.x", name, qkv, [(dim, 1), (heads, dim)])
    other = line.read(f"{name}.other", name, qkv, [(half, 1), (2, -half), (heads, dim)], first=half)
    tables = [
        line.read(
            f"{name}.{t}", name, line.load(f"{name}.{t}.in", name, t, dim, row=row), [(dim, 1), (heads, 0)]
        )
        for t in ("cos", "sin")
    ]
    stages = [stage("multiply", 0, 2, 4), stage("multiply", 1, 3, 5), stage("add", 4, 5, 4)]
    reads = [(f, 0) for f in (x, other, *tables)]
    return line.simd(f"{name}.turn", name, reads, stages, heads * dim, result=4, round=1)


def softmax(line: Pipeline, name: str, scores: Sequence[Flow]) -> list[Flow]:
    """The softmax over `scores`, a packet each of a block, of each lane by itself."""
    width = line.p.vector_inputs

    def joined(how: str, flows: Sequence[Flow]) -> Flow:
        flows = list(flows)
        level = 0
        while len(flows) > 1:
            flows = [
                line.simd(
                    f"{name}.{how}{level}.{i}", name, [(f, 0) for f in flows[i : i + width]],
                    [stage(how, 0 if k == 1 else 4, k, 4) for k in range(1, len(flows[i : i + width]))]
                    or [stage("pass", 0, 0, 4)], 1, result=4,
                )
                for i in range(0, len(flows), width)
            ]  # fmt: skip
            level += 1
        return flows[0]

    top = joined("maximum", scores)
    powers = [
        line.simd(f"{name}.exp{i}", name, [(s, 0), (top, 0)], [stage("subtract", 0, 1, 4)], 1, result=4, function="exp")
        for i, s in enumerate(scores)
    ]  # fmt: skip
    inverse = line.simd(f"{name}.inverse", name, [(joined("add", powers), 0)], [], 1, function="reciprocal")
    return [
        line.simd(
            f"{name}.share{i}", name, [(power, 0), (inverse, 0)], [stage("multiply", 0, 1, 4)], 1, result=4
        )
        for i, power in enumerate(powers)
    ]


def weighted(
    line: Pipeline, name: str, tag: str, shares: Sequence[Flow], matrices: Sequence[Flow], columns: int
) -> Flow:
    """Matrices times `shares`, a packet each of a block, added up in order."""
    total: list[tuple[Flow, int]] = []
    for i, (share, matrix) in enumerate(zip(shares, matrices, strict=True)):
        stages = [stage("multiply", 0, 1, 4), *([stage("add", 2, 4, 4)] if total else [])]
        total = [
            (
                line.simd(
                    f"{name}.{i}", tag, [(matrix, 0), (share, 1), *total], stages, columns, result=4,
                    round=int(i == len(matrices) - 1),
                ),
                0,
            )
        ]  # fmt: skip
    return total[0][0]


def weights_of(op: Op) -> str:
    """The tensor with an operator's weights: an expert's are apart, so that their place may follow from the choice."""
    return "weights" if op.slot is None else f"expert.{op.slot}"


def cached(
    line: Pipeline, name: str, tag: str, what: str, heads: int, dim: int, width: int, chunks: int, pitch: int,
    offset: int, strip: int, gates: int, copies: int = 1, tensor: str = "",
) -> list[list[list[str]]]:  # fmt: skip
    """Memory units with the "keys" or "values" of heads of `dim` elements: one for each head, and chunk of `width` tokens.

    They give strips of `strip` tokens, element after element, or strips of elements, token after token. The cache, whose
    elements are `pitch` tokens apart, begins at `offset` bytes; at most `gates` gates to memory load it, each some heads,
    or some chunks of one, unless more are needed for their addresses. There are `copies` of each unit, one for each that
    reads it. Of a `tensor`, if it is given: what tells the order alone.
    """
    p = line.p
    keys = what == "keys"
    row = 1 << (dim - 1).bit_length()
    size = width * (dim if keys else row)
    if size > line.capacity:
        raise UserError(f"{width} {what} of {dim} elements are {size} words; a PMU has {line.capacity}")
    tokens = width // p.lanes
    strips = (ceil_div(width if keys else dim, strip), strip)
    most = (1 << ADDRESS_BITS) // size  # units that the addresses of a gate tell apart
    # Units of a gate: some heads with all their chunks, or some chunks of one; as few as leave at most `gates` gates.
    shapes = [(n, chunks) for n in range(1, heads + 1) if heads % n == 0]
    shapes += [(1, n) for n in range(1, chunks) if chunks % n == 0]
    shapes = sorted((s for s in shapes if s[0] * s[1] <= most), key=lambda s: s[0] * s[1])
    step, span = next((s for s in shapes if heads * chunks <= s[0] * s[1] * gates), shapes[-1])
    if keys:
        write = [(tokens, p.lanes), (dim, width), (span, size)]
        fields = line.chain(name, "read_", [(dim, width), strips, (line.blocks, 0)])
    else:
        write = [(tokens, p.lanes * row), (dim, 1), (span, size)]
        fields = line.chain(name, "read_", [(width, row), strips, (line.blocks, 0)])
        # Tokens are in different banks, too: a diagonal stripe.
        bits = min(p.banks.bit_length() - 1, row.bit_length() - 1)
        fields |= {"skew_bits": bits, "skew_shift": row.bit_length() - 1, "write_lane_stride": row}
    head_bytes = dim * pitch * BF16_BYTES
    found = []
    resident = line.blocks > 1
    for h in range(heads):
        chunk = []
        for k in range(chunks):
            first = h % step == 0 and k % span == 0
            if first:
                gate = line.gate(
                    f"{name}.{h}.{k}.load", tag, "load", "hbm", tensor or what,
                    offset + h * head_bytes + k * width * BF16_BYTES,
                    [
                        (tokens, p.lanes * BF16_BYTES), (dim, pitch * BF16_BYTES), (span, width * BF16_BYTES),
                        (step, head_bytes),
                    ],
                )  # fmt: skip
            low = (h % step * span + k % span) * size
            units = [f"{name}.{h}.{k}.{copy}" for copy in range(copies)]
            for unit in units:
                line.unit(
                    unit, "pmu", tag, enable=3, low=low, words=size,
                    **line.chain(name, "write_", [*write, (step, span * size)]), write_signal_level=LEVELS,
                    **fields, read_base=low, read_wait_level=LEVELS,
                )  # fmt: skip
                line.wire(f"{unit}.write", f"{unit}.read")
                line.feed(gate, unit)
                if resident:
                    line.filled.append(unit)
                line.resting.add(unit)
                line.work[unit] = prod(fields[f"read_count{n}"] for n in range(3))
            if resident and first:
                line.loads.append(units[0])
            chunk.append(units)
        found.append(chunk)
    return found
