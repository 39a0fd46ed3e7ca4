"""What a mapping chooses, and where everything lies; every choice can be given by a mapping document."""

from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from tilewright.arch.errors import UserError, nearest
from tilewright.arch.lut import FLOATS, LutSpec, additions
from tilewright.mappers.lut.gemm import Gemm, Shape, Tiling, ceil_div, check_tiling, choose
from tilewright.workloads.graph import Graph, Operator, OpKind
from tilewright.workloads.models import ModelConfig

FP16 = 16
"""Bits of an activation, weight, cached key or value outside the linear layers."""

LINEAR = ("lut", "tensor_fp16", "tensor_int8")
FUSING = ("fused", "separate")

# Operations of the ordinary units for each activation that goes into a linear layer.
QUANTISE = {
    "int8": 5,
    "int16": 5,
    "fp8": 1,
    "fp16": 0,
}  # absolute, maximum, times 1 / scale, round, clip; convert
SUM = 1  # its part in the sum that the zero point is multiplied with
QUANTISE_ENTRY = 5  # of each table entry, as an activation
# And for each output: convert, subtract z' times the row's sum, times s', times the row's scale.
EPILOGUE = 5


class Layout:
    """Choices, GEMMs and places of a run.

    Memory holds the weights of the linear layers, layer by layer; one operand and the results of one GEMM; and what
    has no address in a program: FP16 parameters and the KV cache.
    """

    def __init__(
        self,
        spec: LutSpec,
        model: ModelConfig,
        graphs: Mapping[str, Graph],
        mapping: Mapping[str, Any] | None = None,
    ) -> None:
        """`graphs` by phase ("prompt", "decode"). Raises UserError for weights that do not fit memory, and for
        a value of `mapping` that is not allowed."""
        self.spec, self.model = spec, model
        given = dict(mapping or {})
        known = ("target", "model", "spec", "linear", "precompute", "attention", "gemms")
        for key in given:
            if key not in known:
                raise UserError(f"mapping has no {key!r}: {nearest(str(key), known)}")
        for key, value in (("target", "lut"), ("model", model.name)):
            if given.get(key, value) != value:
                raise UserError(f"mapping.{key} must be {value!r} here, not {given[key]!r}")
        self.linear = _one_of(given, "linear", LINEAR)
        self.precompute = _one_of(given, "precompute", FUSING)
        self.attention = _one_of(given, "attention", FUSING)
        linears = {
            phase: [op for op in g.operators if op.kind is OpKind.LINEAR] for phase, g in graphs.items()
        }
        self._place(next(iter(linears.values())))
        self._cut(linears, given.get("gemms", {}))

    @property
    def document(self) -> dict[str, Any]:
        """The mapping as plain data."""
        return {
            "target": "lut",
            "model": self.model.name,
            "spec": self.spec.name,
            "linear": self.linear,
            "precompute": self.precompute,
            "attention": self.attention,
            "gemms": {
                name: {k: list(v) if isinstance(v, tuple) else v for k, v in gemm.tiling._asdict().items()}
                for name, gemm in self.gemms.items()
            },
        }

    # ---- what linear layers read --------------------------------------------------------------------

    @property
    def prepares(self) -> bool:
        """Whether activations are anything else than FP16 before a linear layer reads them."""
        return self.linear != "tensor_fp16"

    @property
    def operand_bits(self) -> Fraction:
        """Bits that a linear layer reads for an activation."""
        a = self.spec.lut
        if self.linear != "lut":
            return Fraction(8 if self.linear == "tensor_int8" else FP16)
        if a.table == "int8":
            return Fraction((8 << a.k - 1) + 32, a.k)
        return Fraction(self.spec.params().activation_bits)

    def precompute_operations(self, elements: int) -> int:
        """Operations that turn so many FP16 activations into what the linear layers read."""
        a = self.spec.lut
        if self.linear != "lut":
            return elements * QUANTISE["int8"] if self.prepares else 0
        each = Fraction(QUANTISE[a.activation] + SUM)
        if a.table == "int8":
            table = additions(a.k, a.activation in FLOATS) + (QUANTISE_ENTRY << a.k - 1)
            each += Fraction(table, a.k)
        return int(elements * each)

    # ---- memory -------------------------------------------------------------------------------------

    def _place(self, linears: Sequence[Operator]) -> None:
        bits = self.spec.lut.weight_bits
        self.weight_lines: dict[tuple[int, str], int] = {}
        at, elements = 0, 0
        for op in linears:
            self.weight_lines[op.layer, op.name] = at
            shape = Shape(self.spec, 1, op.n, op.k, bits)
            at += shape.weight_lines if self.linear == "lut" else self._lines(op.k * op.n * self.linear_bits)
            elements += op.k * op.n
        self.linear_bytes = at * self.spec.lut.n * self.spec.lut.k // 8
        self.other_bytes = (self.model.parameters["total"] - elements) * FP16 // 8
        self.first_free = at + self._lines(self.other_bytes * 8)

    @property
    def linear_bits(self) -> int:
        """Bits of a weight of a linear layer."""
        return {"lut": self.spec.lut.weight_bits, "tensor_fp16": 16, "tensor_int8": 8}[self.linear]

    def _lines(self, bits: int) -> int:
        return ceil_div(bits, self.spec.lut.n * self.spec.lut.k)

    def _cut(self, linears: Mapping[str, Sequence[Operator]], given: Any) -> None:
        if not isinstance(given, Mapping):
            raise UserError(f"mapping.gemms must be a mapping, not {given!r}")
        shapes = {}
        if self.linear == "lut":
            for phase, ops in linears.items():
                for op in ops:
                    shapes[f"{phase} {op.name}"] = Shape(
                        self.spec, op.m, op.n, op.k, self.spec.lut.weight_bits
                    )
        for name in given:
            if name not in shapes:
                raise UserError(f"mapping.gemms has no {name!r}: {nearest(str(name), shapes)}")
        operand = self.first_free
        results = operand + max((s.activation_lines for s in shapes.values()), default=0)
        self.gemms: dict[str, Gemm] = {}
        chosen: dict[Shape, Tiling] = {}
        for name, shape in shapes.items():
            if name in given:
                tiling = read_tiling(given[name], f"mapping.gemms.{name}")
                check_tiling(shape, tiling, f"mapping.gemms.{name}")
            else:
                tiling = chosen[shape] if shape in chosen else choose(shape)
                chosen[shape] = tiling
            self.gemms[name] = Gemm(shape, tiling, 0, operand, results)
        need = results + max((g.result_lines for g in self.gemms.values()), default=0)
        if need > self.spec.line_count:
            line = self.spec.lut.n * self.spec.lut.k // 8
            raise UserError(
                f"{self.model.name} does not fit {self.spec.name}: weights and activations take "
                f"{need * line / 1e9:.1f} GB, memory.dram_bytes are {self.spec.memory.dram_bytes / 1e9:.1f} GB"
            )


def read_tiling(given: Any, where: str) -> Tiling:
    """A tiling from a mapping document. Raises UserError."""
    keys = Tiling._fields
    if not isinstance(given, Mapping) or set(given) != set(keys):
        raise UserError(f"{where} must have {', '.join(keys)}, not {given!r}")
    values: dict[str, Any] = {}
    for key, size in zip(keys, (3, 2, 0, 0), strict=True):
        items = given[key] if size else [given[key]]
        whole = isinstance(items, (list, tuple)) and all(type(i) is int for i in items)
        if not whole or len(items) != max(size, 1):
            what = f"a list of {size} whole numbers" if size else "a whole number"
            raise UserError(f"{where}.{key} must be {what}, not {given[key]!r}")
        values[key] = tuple(items) if size else items[0]
    return Tiling(**values)


def _one_of(given: Mapping[str, Any], key: str, allowed: Sequence[str]) -> str:
    value = given.get(key, allowed[0])
    if value not in allowed:
        raise UserError(f"mapping.{key} must be {' or '.join(allowed)}, not {value!r}")
    return str(value)
