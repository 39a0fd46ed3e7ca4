"""A datum about hardware: value, unit, source and kind. Numbers without these do not enter `arch/`."""

import re
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Literal

from tilewright.arch.errors import UserError

Kind = Literal["published", "derived", "measured", "assumed"]
# Three digits of exponent at most: 1e999999999 as an exact rational would fill the memory.
_NUMBER = re.compile(r"\s*[-+]?(\d{1,40}(/\d{1,40})?|\d{0,40}\.?\d{0,40}([eE][-+]?\d{1,3})?)\s*")
KINDS: tuple[str, ...] = ("published", "derived", "measured", "assumed")


@dataclass(frozen=True, kw_only=True)
class Quantity:
    """One number with its provenance.

    `value` is what the YAML text says, as an exact Fraction for numbers, so that 0.1 ns is a tenth
    and not the nearest double. `kind` is one of published, derived, measured, assumed.
    """

    value: Fraction | str | bool
    unit: str = ""
    source: str = ""
    kind: Kind = "assumed"


def exact(text: Any, where: str = "value") -> Fraction:
    """The exact rational that a number of a YAML text denotes.

    Floats are read through their shortest repr, which is the text for up to 15 significant digits.

    >>> exact("0.1"), exact(0.1), exact("1/3")
    (Fraction(1, 10), Fraction(1, 10), Fraction(1, 3))

    Raises UserError for anything that is not a finite number.
    """
    if isinstance(text, bool) or not isinstance(text, (int, float, str, Fraction)):
        raise UserError(f"{where}: must be a number, not {text!r}")
    if isinstance(text, str) and not _NUMBER.fullmatch(text):
        raise UserError(f"{where}: must be a finite number, not {text[:40]!r}")
    try:
        value = Fraction(repr(text)) if isinstance(text, float) else Fraction(text)
    except (ValueError, ZeroDivisionError):
        raise UserError(f"{where}: must be a finite number, not {text!r}") from None
    return value
