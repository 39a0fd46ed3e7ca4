"""Float reference kernels use elementwise operations in a written order, no reduction of a library's own.

Three ways to add 4096 floats give three answers, and a library's exponential is no specification.
"""

import ast
from pathlib import Path

import pytest

import tilewright.workloads

FOLDER = Path(tilewright.workloads.__file__).parent
KERNELS = ("formats.py", "asic.py", "pim.py", "lut_kernels.py", "csd_kernels.py")
FORBIDDEN = {
    "sum", "nansum", "cumsum", "prod", "cumprod", "mean", "average", "var", "std", "dot", "vdot", "inner",
    "outer", "matmul", "einsum", "tensordot", "convolve", "trace", "linalg", "fft", "accumulate", "reduceat",
    "exp", "exp2", "expm1", "log", "log2", "log1p", "sqrt", "cbrt", "sin", "cos", "tan", "tanh", "sinh",
    "cosh", "power", "float_power", "reciprocal", "hypot", "fma", "logaddexp",
}  # fmt: skip


def offences(source: str) -> list[str]:
    """What breaks the rule, with its line: `@`, and NumPy functions and array methods of the forbidden
    names."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.MatMult):
            found.append(f"{node.lineno}: @")
        elif isinstance(node, ast.Attribute):
            ours = isinstance(node.value, ast.Name) and node.value.id == "asic"
            ufunc_reduction = node.attr == "reduce" and isinstance(node.value, ast.Attribute)
            if (node.attr in FORBIDDEN and not ours) or ufunc_reduction:
                found.append(f"{node.lineno}: .{node.attr}")
    return found


@pytest.mark.parametrize("name", KERNELS)
def test_kernels_use_elementwise_operations_only(name):
    assert offences((FOLDER / name).read_text("utf-8")) == []


@pytest.mark.parametrize(
    "line",
    [
        "y = a @ b",
        "y @= b",
        "np.sum(x)",
        "x.sum()",
        "np.exp(x)",
        "np.add.reduce(x)",
        "np.linalg.norm(x)",
        "x.mean()",
    ],
)
def test_the_rule_catches(line):
    assert len(offences(line)) == 1


@pytest.mark.parametrize(
    "line", ["y = a * b + c", "asic.exp(x)", "np.rint(x)", "asic.reduce(x, a, np.add, 0)"]
)
def test_the_rule_allows(line):
    assert offences(line) == []
