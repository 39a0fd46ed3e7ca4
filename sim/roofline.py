"""Time of operators on a device known only by its roofline: the longer of compute and memory, plus launch.

Operators run one after another. Seconds stay exact rationals; each operator's time is rounded up to the tick.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from math import lcm
from typing import Any

import numpy as np

from tilewright.arch.clock import Clock
from tilewright.arch.errors import UserError, nearest
from tilewright.arch.system import RooflineSpec

# (name, layer, operations, bytes moved to and from memory); the last two a number, or one for each step.
Operator = tuple[str, int, Any, Any]


@dataclass(frozen=True, kw_only=True)
class RooflineRun:
    """Operators on a roofline device, steps in order and operators in order within a step.

    `ticks` int64[steps, operators] and `memory_bound` bool[steps, operators] (ties count as compute bound)
    are read-only. `busy_s` is the exact time before any rounding to ticks, `energy_j` that time at the
    device's rated power: an upper bound. `is_bound`: times are lower bounds, see `RooflineSpec.is_bound`.
    """

    names: tuple[str, ...]
    layers: tuple[int, ...]
    clock: Clock
    ticks: np.ndarray
    memory_bound: np.ndarray
    busy_s: Fraction
    energy_j: Fraction
    is_bound: bool

    @property
    def total_ticks(self) -> int:
        return int(self.ticks.sum())

    def starts(self) -> np.ndarray:
        """First tick of every operator, int64[steps, operators]."""
        flat = self.ticks.ravel()
        return (np.cumsum(flat) - flat).reshape(self.ticks.shape)


def operator_s(spec: RooflineSpec, operations: int, n_bytes: int, number_format: str) -> Fraction:
    """Exact seconds of one operator: max(operations / (peak * eff), bytes / (bandwidth * eff)) + launch.

    Raises UserError when the device has no peak for the number format.
    """
    rate, p = _rate(spec, number_format), spec.params()
    return max(operations / rate, n_bytes / p.bytes_per_s) + p.overhead_s


def _rate(spec: RooflineSpec, number_format: str) -> Fraction:
    rates = spec.params().ops_per_s
    if number_format not in rates:
        hint = nearest(number_format, rates)
        raise UserError(f"{spec.name}: no peak is stated for number format {number_format!r}: {hint}")
    return rates[number_format]


def run_graph(
    spec: RooflineSpec, operators: Sequence[Operator], number_format: str, clock: Clock
) -> RooflineRun:
    """The operators, repeated for each step, on the device.

    Each operator is (name, layer, operations, bytes); operations and bytes are integers or integer arrays
    int[steps], so that a decode run whose context grows is one call. Raises UserError when the number
    format has no peak, when arrays differ in length, or when an amount is negative or not an integer.
    """
    rate, p = _rate(spec, number_format), spec.params()
    operations = _amounts(operators, 2, "operations")
    n_bytes = _amounts(operators, 3, "bytes")
    if len(operations) != len(n_bytes) and 1 not in (len(operations), len(n_bytes)):
        raise UserError(f"operations are given for {len(operations)} steps, bytes for {len(n_bytes)}")
    # One common denominator turns the rationals into whole numbers, as Python's, which never overflow.
    per_op, per_byte, launch = (t / clock.period_s for t in (1 / rate, 1 / p.bytes_per_s, p.overhead_s))
    unit = lcm(per_op.denominator, per_byte.denominator, launch.denominator)
    compute = operations * int(per_op * unit)
    memory = n_bytes * int(per_byte * unit)
    exact = np.maximum(compute, memory) + int(launch * unit)
    ticks = (-(-exact // unit)).astype(np.int64)
    memory_bound = (memory > compute).astype(bool)
    ticks.flags.writeable = memory_bound.flags.writeable = False
    busy_s = Fraction(int(exact.sum()), unit) * clock.period_s
    return RooflineRun(
        names=tuple(o[0] for o in operators),
        layers=tuple(o[1] for o in operators),
        clock=clock,
        ticks=ticks,
        memory_bound=memory_bound,
        busy_s=busy_s,
        energy_j=spec.energy_j(busy_s),
        is_bound=spec.is_bound,
    )


def _amounts(operators: Sequence[Operator], column: int, what: str) -> np.ndarray:
    """Column of the operators as Python integers, object[steps or 1, operators]."""
    columns = []
    for operator in operators:
        values = np.atleast_1d(np.asarray(operator[column]))
        # Amounts beyond int64 arrive as objects; they must be integers all the same.
        whole = values.dtype.kind in "iu" or (
            values.dtype == object and all(type(v) is int for v in values.flat)
        )
        if values.ndim != 1 or not whole:
            raise UserError(f"operator {operator[0]}: {what} must be integers, one or one for each step")
        if len(values) and values.min() < 0:
            raise UserError(f"operator {operator[0]}: {what} must not be negative, not {values.min()}")
        columns.append(values.astype(object))
    steps = {len(c) for c in columns} - {1}
    if len(steps) > 1:
        raise UserError(f"{what} are given for {' and '.join(map(str, sorted(steps)))} steps")
    shape = (steps.pop() if steps else 1,)
    return (
        np.stack([np.broadcast_to(c, shape) for c in columns], axis=1)
        if columns
        else np.empty((1, 0), object)
    )
