"""How far the functions of the companion ASIC are from the true ones, in units of the last place of bfloat16."""

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilewright.arch.formats import BF16
from tilewright.arch.pim_asic import AsicSection
from tilewright.workloads import asic as unit
from tilewright.workloads.formats import from_bits, to_bits

N = 1024
"""Elements of the vectors for what works on whole vectors."""

F64 = NDArray[np.float64]


class Precision(NamedTuple):
    """Largest and mean distance of a function's results from the true values.

    Results are rounded to bfloat16: rounded correctly they are up to 0.5 off, and 0.25 in the mean if they are
    no bfloat16 themselves.
    """

    function: str
    inputs: str
    worst: float
    mean: float


def ulps(got: unit.F32, want: F64) -> F64:
    """Distance in units of the last place of bfloat16, `got` being rounded to it; subnormals have that of the
    smallest normal number."""
    rounded = from_bits(to_bits(got, BF16), BF16).astype(np.float64)
    exponent = np.maximum(np.frexp(want)[1] - 1, -126)
    distance: F64 = np.abs(rounded - want) / 2.0 ** (exponent - 7)
    return distance


def precision(asic: AsicSection, lanes: int) -> list[Precision]:
    """Of every function: over all bfloat16 numbers for which the true result is a normal number, or over vectors
    of N random elements from a fixed seed. `lanes` as in `workloads.asic`."""
    every = from_bits(np.arange(1 << 16), BF16)
    finite = every[np.isfinite(every)]
    normal = finite[finite >= 2.0**-126]
    rng = np.random.default_rng(0)
    x, gain, bias = (from_bits(to_bits(rng.normal(size=N), BF16), BF16) for _ in range(3))
    wide, eps, share = x.astype(np.float64), np.float32(1e-5), np.float32(1 / N)
    scaled = np.exp(8 * wide - 8 * wide.max())
    centred = wide - wide.mean()

    def within(low: float, high: float) -> tuple[unit.F32, F64]:
        chosen = finite[(finite >= low) & (finite <= high)]
        return chosen, chosen.astype(np.float64)

    with np.errstate(all="ignore"):
        e, e64 = within(-87.25, 88.5)
        d, d64 = within(2.0**-126, 2.0**125.99)
        r64 = normal.astype(np.float64)
        g, g64 = within(-10, np.inf)
        s, s64 = within(-87, np.inf)
        cubic = -2 * np.sqrt(2 / np.pi) * (g64 + 0.044715 * g64**3)
        vectors = f"{N} from N(0, 1)"
        rows = (
            ("exp", "-87.25 .. 88.5", unit.exp(e, asic), np.exp(e64)),
            ("reciprocal", "2^-126 .. 2^126", unit.reciprocal(d, asic), 1 / d64),
            ("rsqrt", "2^-126 .. 2^128", unit.rsqrt(normal, asic), r64**-0.5),
            ("GELU", "-10 .. 2^128", unit.gelu(g, asic), g64 / (1 + np.exp(cubic))),
            ("SiLU", "-87 .. 2^128", unit.silu(s, asic), s64 / (1 + np.exp(-s64))),
            ("ReLU", "-2^128 .. 2^128", unit.relu(finite), np.maximum(finite, 0).astype(np.float64)),
            (
                "softmax",
                f"{vectors}, scale 8",
                unit.softmax(x, np.float32(8), asic, lanes),
                scaled / scaled.sum(),
            ),
            (
                "layernorm",
                vectors,
                unit.layernorm(x, gain, bias, eps, share, asic, lanes),
                centred / np.sqrt((centred**2).mean() + eps) * gain + bias,
            ),
            (
                "RMSnorm",
                vectors,
                unit.rmsnorm(x, gain, eps, share, asic, lanes),
                wide / np.sqrt((wide**2).mean() + eps) * gain,
            ),
        )
        errors = [(name, inputs, ulps(got, want)) for name, inputs, got, want in rows]
    return [Precision(name, inputs, float(u.max()), float(u.mean())) for name, inputs, u in errors]
