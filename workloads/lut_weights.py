"""Weights for low-bit GEMMs: round-to-nearest quantisation of float matrices, and the files they come in.

A code q stands for s (q - z), with one scale s and zero point z for each row and each group of `group`
consecutive input channels (a ragged last group is shorter). All steps are FP32, each operation rounded, and
`round` is to nearest, ties to even:

| scheme     | bits | scale s                          | zero point z                | code q                       |
| ---------- | ---- | -------------------------------- | --------------------------- | ---------------------------- |
| asymmetric | 2..4 | (hi - lo) / (2**b - 1)           | round(-lo / s), clipped     | round(w / s) + z, clipped    |
| sign       | 1    | 2 mean abs w                     | 1/2                         | 1 if w >= 0 else 0           |
| ternary    | 2    | mean abs w                       | 1                           | round(w / s) in -1..1, + 1   |

lo = min(0, min w) and hi = max(0, max w), so that 0 is a code; clipping is to 0..2**b - 1. `sign` gives
+- mean abs w (Rastegari et al., "XNOR-Net", 2016), `ternary` is the absmean rule of Ma et al., "The Era of 1-bit
LLMs" (BitNet b1.58, 2024), without its lower bound on the scale. A mean is taken in FP64 and rounded once. A group
of scale 0 has codes z (asymmetric: 0) and stands for zeros.
"""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes  # also makes "bfloat16" a name that NumPy, hence safetensors, knows
import numpy as np
from numpy.typing import NDArray

from tilewright.arch.errors import UserError, nearest
from tilewright.workloads.lut_kernels import CodedWeights, encode

F32 = NDArray[np.float32]

_ROW_LIMIT = 127
_NPY_MAGIC = b"\x93NUMPY"
_FILE_TYPES = ("BF16", "BOOL", "F16", "F32", "F64", "I32", "I64", "I8", "U8")

SCHEMES: dict[str, tuple[int, str]] = {
    "W1": (1, "sign"),
    "W2": (2, "asymmetric"),
    "W3": (3, "asymmetric"),
    "W4": (4, "asymmetric"),
    "ternary": (2, "ternary"),
}
"""Name -> bits of a code, scheme of the table above."""


@dataclass(frozen=True)
class QuantisedWeights:
    """What `quantise` returns: codes that stand for scale (code - zero)."""

    codes: NDArray[np.uint8]
    """[N, Ktot], each below 2**bits."""
    scale: F32
    """[N, ceil(Ktot / group)]."""
    zero: F32
    """[N, ceil(Ktot / group)], multiples of 1/2."""
    bits: int
    group: int
    """Input channels that share a scale and a zero point."""

    @property
    def spans(self) -> list[slice]:
        """The groups' channels, in order."""
        channels = self.codes.shape[1]
        return [slice(i, min(i + self.group, channels)) for i in range(0, channels, self.group)]


def quantise(w: NDArray[Any], scheme: str, group: int | None = None) -> QuantisedWeights:
    """Codes, scales and zero points of a float matrix w [N, Ktot]; no group: one for each row.

    Raises UserError for an unknown scheme, a matrix that is empty, not of floats or not finite (as FP32), and
    a group below 1.

    >>> coded = quantise(np.float32([[-1.0, 0.0, 1.0, 2.0]]), "W2")
    >>> coded.codes, coded.scale, coded.zero
    (array([[0, 1, 2, 3]], dtype=uint8), array([[1.]], dtype=float32), array([[1.]], dtype=float32))
    """
    if scheme not in SCHEMES:
        raise UserError(f"weight scheme {scheme!r} is unknown; {nearest(scheme, SCHEMES)}")
    bits, rule = SCHEMES[scheme]
    values = _floats("weights", w)
    group = values.shape[1] if group is None else group
    if group < 1:
        raise UserError(f"weight group must be at least 1 channel, not {group}")
    parts = [_quantise_group(values[:, i : i + group], bits, rule) for i in range(0, values.shape[1], group)]
    codes, scales, zeros = zip(*parts, strict=True)
    scale = np.concatenate(scales, axis=1)
    if not np.isfinite(scale).all():
        raise UserError("weights span more than FP32 holds: a scale is infinite")
    return QuantisedWeights(np.concatenate(codes, axis=1), scale, np.concatenate(zeros, axis=1), bits, group)


def dequantise(weights: QuantisedWeights) -> F32:
    """FP32 [N, Ktot]: the product scale * (code - zero), rounded once."""
    columns = np.arange(weights.codes.shape[1]) // weights.group
    return weights.scale[:, columns] * (weights.codes.astype(np.float32) - weights.zero[:, columns])


def encode_groups(weights: QuantisedWeights, k: int = 4) -> list[CodedWeights]:
    """The operands of `lut_linear`: each quantisation group's codes as words of `k` input channels."""
    return [encode(weights.codes[:, span], weights.bits, k) for span in weights.spans]


def quantise_rows(x: NDArray[Any]) -> tuple[NDArray[np.int8], F32]:
    """Activations x [M, Ktot] as int8 with a scale for each row [M]: max abs x / 127, x = scale * code.

    code = round(x / scale) within +-127, in FP32, ties to even; a row of scale 0 has codes 0. Raises
    UserError for a matrix that is empty, not of floats or not finite.
    """
    values = _floats("activations", x)
    scale = np.abs(values).max(axis=1) / np.float32(_ROW_LIMIT)
    codes = np.clip(np.rint(_divide(values, scale[:, None])), -_ROW_LIMIT, _ROW_LIMIT)
    return codes.astype(np.int8), scale


def _quantise_group(w: F32, bits: int, rule: str) -> tuple[NDArray[np.uint8], F32, F32]:
    top = np.float32((1 << bits) - 1)
    zero = np.full((w.shape[0], 1), 0.5 if rule == "sign" else 1.0, np.float32)
    mean = np.abs(w).mean(axis=1, dtype=np.float64, keepdims=True).astype(np.float32)
    if rule == "sign":
        with np.errstate(over="ignore"):  # the caller refuses an infinite scale
            return (w >= 0).astype(np.uint8), 2 * mean, zero
    if rule == "ternary":
        codes = np.clip(np.rint(_divide(w, mean)), -1, 1) + zero
        return codes.astype(np.uint8), mean, zero
    low = np.minimum(w.min(axis=1, keepdims=True), np.float32(0))
    high = np.maximum(w.max(axis=1, keepdims=True), np.float32(0))
    with np.errstate(over="ignore"):
        scale = (high - low) / top
    zero = np.clip(np.rint(_divide(-low, scale)), 0, top)
    codes = np.clip(np.rint(_divide(w, scale)) + zero, 0, top)
    return codes.astype(np.uint8), scale, zero


def _divide(x: F32, scale: F32) -> F32:
    """x / scale, and 0 where the scale is 0; a subnormal scale may give an infinity, which is then clipped."""
    with np.errstate(over="ignore"):
        quotient: F32 = np.divide(x, scale, out=np.zeros_like(x), where=scale > 0)
    return quotient


def _floats(what: str, x: NDArray[Any]) -> F32:
    if x.ndim != 2 or not x.size:
        raise UserError(f"{what} must be a matrix that is not empty, not of shape {list(x.shape)}")
    if x.dtype.kind != "f" and x.dtype != ml_dtypes.bfloat16:
        raise UserError(f"{what} must be floats, not {x.dtype}")
    with np.errstate(over="ignore"):
        values = x.astype(np.float32)
    if not np.isfinite(values).all():
        row, column = np.argwhere(~np.isfinite(values))[0]
        raise UserError(f"{what} must be finite FP32 numbers: [{row}, {column}] is {x[row, column]}")
    return values


# ---- files -------------------------------------------------------------------------------------------------


class TensorFile:
    """The tensors of a `.npy` or `.safetensors` file, each read when it is asked for.

    A `.npy` file has one tensor, of any name, and is memory-mapped. Raises UserError for a file that can't be
    read, is malformed, or has another ending.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.suffix not in (".npy", ".safetensors"):
            raise UserError(f"{self.path}: the file must end in .npy or .safetensors")
        try:
            with self.path.open("rb") as file:
                magic = file.read(len(_NPY_MAGIC))
        except OSError as error:
            raise UserError(f"{self.path}: {error.strerror}") from None
        self._array: NDArray[Any] | None = None
        if self.path.suffix == ".npy":
            self._array = _read_npy(self.path, magic)
            self.names = [self.path.stem]
        else:
            # Here, so that work without such files does not load the library.
            from safetensors import SafetensorError, safe_open

            try:
                self._file = safe_open(self.path, framework="np")
            except (OSError, SafetensorError) as error:
                raise UserError(f"{self.path}: {_one_line(error)}") from None
            self.names = sorted(self._file.keys())

    def read(self, name: str | None = None) -> NDArray[Any]:
        """One tensor; no name: the only one. Raises UserError for a name that is not there or is needed, and
        for a type other than F64, F32, F16, BF16, I64, I32, I8, U8 and BOOL."""
        if name is None and len(self.names) != 1:
            raise UserError(f"{self.path} has {len(self.names)} tensors: name one, such as {self.names[0]}")
        if self._array is not None:
            return self._array
        name = self.names[0] if name is None else name
        if name not in self.names:
            raise UserError(f"{self.path} has no tensor {name!r}; {nearest(name, self.names)}")
        kind = self._file.get_slice(name).get_dtype()
        if kind not in _FILE_TYPES:
            raise UserError(
                f"{self.path}: tensor {name!r} is of type {kind}; allowed: {', '.join(_FILE_TYPES)}"
            )
        tensor: NDArray[Any] = self._file.get_tensor(name)
        return tensor


def _read_npy(path: Path, magic: bytes) -> NDArray[Any]:
    if magic != _NPY_MAGIC:
        raise UserError(f"{path}: not a .npy file: it begins with {magic!r}")
    try:
        array: NDArray[Any] = np.load(path, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise UserError(f"{path}: {_one_line(error)}") from None
    if array.dtype.kind not in "fiub":
        raise UserError(f"{path}: the array must hold numbers, not {array.dtype}")
    return array


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
