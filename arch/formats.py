"""Floating-point formats as data: what the NumPy reference, the cycle models and the RTL agree on.

A number is a sign, a biased exponent of `exponent_bits` and `mantissa_bits` of fraction, with gradual
underflow (subnormals), the layout of IEEE 754-2019, 3.4. The two 8-bit formats are those of the OCP
8-bit Floating Point Specification (OFP8), revision 1.0 of 2023, Table 1.
"""

from dataclasses import dataclass

from tilewright.arch.errors import UserError, nearest


@dataclass(frozen=True)
class FloatFormat:
    """A binary floating-point format no larger than binary32.

    With `has_inf` the largest exponent field holds infinity and the NaNs, as in IEEE 754. Without it the
    format has no infinity, and only the encoding with all bits set (of either sign) is a NaN, as in OCP
    E4M3: an overflow then gives NaN.

    Raises UserError for fewer than 2 or more than 8 exponent bits (7 without infinity), or fewer than 1 or
    more than 23 mantissa bits: every value of every format is then a binary32 value.

    >>> BF16.width, BF16.bias, hex(BF16.nan), hex(BF16.max_finite)
    (16, 127, '0x7fc0', '0x7f7f')
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    has_inf: bool = True

    def __post_init__(self) -> None:
        for what, low, high in (("exponent_bits", 2, 8 if self.has_inf else 7), ("mantissa_bits", 1, 23)):
            value = getattr(self, what)
            if not low <= value <= high:
                raise UserError(f"float format {self.name}: {what} must be in {low}..{high}, not {value!r}")

    @property
    def width(self) -> int:
        """Bits of an encoding."""
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def precision(self) -> int:
        """Bits of a significand, the hidden one included."""
        return 1 + self.mantissa_bits

    @property
    def bias(self) -> int:
        """What the exponent field of 1.0 holds."""
        return (1 << self.exponent_bits - 1) - 1

    @property
    def sign(self) -> int:
        """The sign bit as a mask; every encoding below it is a magnitude, ordered as its value is."""
        return 1 << self.width - 1

    @property
    def overflow(self) -> int:
        """The magnitude that an overflow gives: infinity or, in a format without it, NaN."""
        return (self.sign - 1) >> self.mantissa_bits << self.mantissa_bits if self.has_inf else self.nan

    @property
    def nan(self) -> int:
        """The canonical quiet NaN: positive, only the first mantissa bit set (E4M3: the only NaN)."""
        return self.sign - (1 << self.mantissa_bits - 1) if self.has_inf else self.sign - 1

    @property
    def max_finite(self) -> int:
        """The magnitude of the largest finite number."""
        return self.overflow - 1

    @property
    def min_normal(self) -> int:
        """The magnitude of the smallest normal number."""
        return 1 << self.mantissa_bits


FP8_E4M3 = FloatFormat("fp8_e4m3", 4, 3, has_inf=False)
FP8_E5M2 = FloatFormat("fp8_e5m2", 5, 2)
FP16 = FloatFormat("fp16", 5, 10)
BF16 = FloatFormat("bf16", 8, 7)
FP32 = FloatFormat("fp32", 8, 23)

FORMATS: dict[str, FloatFormat] = {f.name: f for f in (FP8_E4M3, FP8_E5M2, FP16, BF16, FP32)}


def float_format(name: str) -> FloatFormat:
    """The format of that name. Raises UserError with the nearest known name.

    >>> float_format("bf16") is BF16
    True
    """
    if name not in FORMATS:
        raise UserError(f"float format {name!r} is unknown; {nearest(name, FORMATS)}")
    return FORMATS[name]
