"""What a target's `run_cases` takes and gives: programs for its RTL, and what the RTL did with them."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.arch.isa import Program
from tilewright.arch.timeline import Timeline

Image = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Case:
    """A program with the params (timings included) and the memory image that it meets."""

    params: Any
    program: Program
    image: Image


@dataclass(frozen=True)
class Outcome:
    """What the RTL did: its Timeline (counters and stalls of the whole run) and the image it left, or an error."""

    timeline: Timeline | None
    image: Image
    error: str | None = None
