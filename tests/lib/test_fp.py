"""Every floating-point unit against NumPy: all operands up to 16 bits in total, else special and random ones."""

import itertools

import numpy as np
import pytest
from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from tests.lib import vectors
from tilewright.arch.formats import BF16, FORMATS, FP8_E4M3, FP8_E5M2, FP16, FP32, FloatFormat
from tilewright.rtl.lib.fp import FpAdd, FpCompare, FpConvert, FpMaximum, FpMultiply
from tilewright.workloads import formats as reference

pytestmark = pytest.mark.cosim

# Two formats of nobody's: the narrowest one, and one whose significand is wider than its exponent range.
TINY = FloatFormat("tiny", 2, 1)
STEEP = FloatFormat("steep", 3, 12)
FLOATS = (*FORMATS.values(), TINY, STEEP)
PRODUCTS = [(f, f) for f in FLOATS] + [
    (BF16, FP32),
    (FP16, FP32),
    (FP16, BF16),
    (FP8_E4M3, FP32),
    (FP8_E5M2, BF16),
    (FP8_E5M2, FP8_E4M3),
    (FP32, FP16),
    (FP32, FP8_E4M3),
    (STEEP, FP8_E5M2),
]


class Units(wiring.Component):
    """All units side by side, each on the low bits of the same two operands."""

    def __init__(self):
        self.units = {}
        for f in FLOATS:
            self.units[f"add_{f.name}"] = (FpAdd(format=f), "o")
            self.units[f"max_{f.name}"] = (FpMaximum(format=f), "o")
            compare = FpCompare(format=f)
            self.units |= {f"{port}_{f.name}": (compare, port) for port in ("lt", "eq", "unordered")}
        for f, g in PRODUCTS:
            self.units[f"mul_{f.name}_{g.name}"] = (FpMultiply(source=f, result=g), "o")
        for f, g in itertools.product(FLOATS, FLOATS):
            self.units[f"cvt_{f.name}_{g.name}"] = (FpConvert(source=f, result=g), "o")
        super().__init__({"a": In(32), "b": In(32), **{name: Out(32) for name in self.units}})

    def elaborate(self, platform):
        m = Module()
        placed = set()
        for name, (unit, port) in self.units.items():
            if id(unit) not in placed:
                placed.add(id(unit))
                m.submodules[name] = unit
                m.d.comb += unit.a.eq(self.a)
                if hasattr(unit, "b"):
                    m.d.comb += unit.b.eq(self.b)
            m.d.comb += getattr(self, name).eq(getattr(unit, port))
        return m


@pytest.fixture(scope="module")
def units():
    component = Units()
    names = list(component.units)
    program = vectors.build_combinational(component, names)
    return lambda a, b: vectors.evaluate(program, names, a, b)


def special(fmt):
    """Magnitudes at which something changes: zero, the ends of the ranges, one, ties, infinity, NaNs."""
    one = fmt.bias << fmt.mantissa_bits
    around = (0, fmt.min_normal, one, one + fmt.min_normal // 2, fmt.overflow, fmt.nan, fmt.sign - 1)
    magnitudes = {m + d for m in around for d in (-2, -1, 0, 1, 2)} | {1 << k for k in range(fmt.width - 1)}
    magnitudes |= {m ^ (fmt.min_normal - 1) for m in magnitudes}
    return np.array(
        [m | s for m in sorted(magnitudes) if 0 <= m < fmt.sign for s in (0, fmt.sign)], np.uint32
    )


def pairs(fmt, count=100_000):
    """All pairs of operands, if they are few; else all pairs of special ones, and random ones.

    A third of these are uniform; a third have opposite signs and near exponents, else hardly any would
    cancel; and a third have products around the smallest normal number.
    """
    if fmt.width <= 8:
        a, b = np.meshgrid(*[np.arange(1 << fmt.width, dtype=np.uint32)] * 2)
        return a.ravel(), b.ravel()
    edges = special(fmt)
    a, b = (x.ravel() for x in np.meshgrid(edges, edges))
    rng = np.random.default_rng(fmt.width)
    x = rng.integers(1 << fmt.width, size=count, dtype=np.uint32)
    y = rng.integers(1 << fmt.width, size=count, dtype=np.uint32)
    near = x ^ fmt.sign ^ (y & (2 * fmt.min_normal - 1))
    field = fmt.sign // fmt.min_normal - 1
    exponent = (fmt.bias + 1 - (x.astype(np.int64) >> fmt.mantissa_bits)) & field
    small = (exponent << fmt.mantissa_bits) | (y & (fmt.sign | fmt.min_normal - 1))
    return np.concatenate([a, x, x, x]), np.concatenate([b, y, near, small])


def singles(fmt):
    if fmt.width <= 16:
        return np.arange(1 << fmt.width, dtype=np.uint32)
    rng = np.random.default_rng(0)
    return np.concatenate([special(fmt), rng.integers(1 << fmt.width, size=200_000, dtype=np.uint32)])


def check(got, expected, a, b):
    wrong = np.flatnonzero(got != expected)
    assert wrong.size == 0, (
        f"{wrong.size} of {len(a)} differ; a {a[wrong[0]]:#x}, b {b[wrong[0]]:#x}: "
        f"{got[wrong[0]]:#x}, expected {expected[wrong[0]]:#x}"
    )


@pytest.mark.parametrize("fmt", FLOATS, ids=lambda f: f.name)
def test_binary_units(units, fmt):
    a, b = pairs(fmt)
    results = units(a, b)
    check(results[f"add_{fmt.name}"], reference.add(a, b, fmt), a, b)
    check(results[f"max_{fmt.name}"], reference.maximum(a, b, fmt), a, b)
    for port, expected in zip(("lt", "eq", "unordered"), reference.compare(a, b, fmt), strict=True):
        check(results[f"{port}_{fmt.name}"], expected, a, b)
    for source, result in PRODUCTS:
        if source == fmt:
            got = results[f"mul_{source.name}_{result.name}"]
            check(got, reference.multiply(a, b, source, result), a, b)


@pytest.mark.parametrize("source", FLOATS, ids=lambda f: f.name)
def test_conversions(units, source):
    a = singles(source)
    results = units(a, a)
    for result in FLOATS:
        check(results[f"cvt_{source.name}_{result.name}"], reference.convert(a, source, result), a, a)
