"""Special functions of a word, as a pipeline of additions and multiplications."""

from math import factorial

import numpy as np
from amaranth.hdl import Cat, Const, Module, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from tilewright.arch.formats import FP32
from tilewright.arch.pim_asic import (
    GATE_LIMIT_EXPONENT,
    LN2,
    LOG2E,
    RECIPROCAL_SEED,
    ROUND,
    RSQRT_SEED,
    SCALE_LIMIT,
)
from tilewright.arch.rdu import FUNCTIONS, RduParams, tail_latency
from tilewright.rtl.lib.fp import FpAdd, FpMultiply
from tilewright.rtl.lib.share import shared

__all__ = ["Adjust", "Function"]

WIDTH = FP32.width
REGISTERS = ("x", "y", "z")
ADJUSTMENTS = ("negate", "scale", "reciprocal seed", "reciprocal end", "rsqrt seed", "rsqrt end")


def _bits(value: float) -> int:
    return int(np.float32(value).view(np.uint32))


def _exp(terms: int) -> list:
    """Leaves e**x in y."""
    steps = [
        ("multiply", "x", LOG2E, "z"),
        ("add", "z", ROUND, "y"),
        ("add", "y", -ROUND, "z"),
        ("multiply", "z", LN2, "z"),
        ("subtract", "x", "z", "x"),
    ]
    for i in reversed(range(terms)):
        head = "z" if i < terms - 1 else 1 / factorial(terms)
        steps += [("multiply", "x", head, "z"), ("add", "z", 1 / factorial(i), "z")]
    return [*steps, ("scale",)]


def _reciprocal(iterations: int) -> list:
    newton = [("multiply", "x", "y", "z"), ("subtract", 2, "z", "z"), ("multiply", "y", "z", "y")]
    return [("reciprocal seed",), *newton * iterations, ("reciprocal end",)]


def _rsqrt(iterations: int) -> list:
    newton = [
        ("multiply", "x", "y", "z"),
        ("multiply", "z", "y", "z"),
        ("subtract", 1.5, "z", "z"),
        ("multiply", "y", "z", "y"),
    ]
    return [("rsqrt seed",), ("multiply", "x", 0.5, "x"), *newton * iterations, ("rsqrt end",)]


def programs(p: RduParams) -> list[list]:
    """Operations (what, a, b, to) of each of FUNCTIONS but the first, on registers x, which holds the argument, and
    y, which takes the result, and z; in between, adjustments that take no time."""
    exp, reciprocal = _exp(p.exp_terms), _reciprocal(p.reciprocal_iterations)
    sigmoid = [("negate",), *exp, ("add", "y", 1, "x"), *reciprocal]
    return [exp, reciprocal, _rsqrt(p.rsqrt_iterations), sigmoid]


class Adjust(wiring.Component):
    """What the methods do to bits between their operations, for free.

    Latency 0. Registers that `what` does not name stay.

    ================ ==========================================================================================
    negate           x = -x
    scale            y = z * 2**k, for z in (1/2, 2) and y = 1.5 * 2**23 + k: +0 below the smallest normal
                     number, infinity above the range, and where k is not in -255..255; NaN where y is
    reciprocal seed  y = the seed of 1/x
    reciprocal end   y = +0 where x >= 2**126, NaN where x is; the canonical NaN where y is one
    rsqrt seed       y = the seed of 1/sqrt(x)
    rsqrt end        y = NaN where x is; the canonical NaN where y is one
    ================ ==========================================================================================

    Parameters
    ----------
    what : str
        One of the above.

    Members
    -------
    ============== === == ==================
    x, y, z        In  32 registers, binary32
    new_x, new_y   Out 32 afterwards
    ============== === == ==================
    """

    def __init__(self, *, what: str):
        if what not in ADJUSTMENTS:
            raise ValueError(f"what must be one of {', '.join(ADJUSTMENTS)}, not {what!r}")
        self._what = what
        super().__init__(
            {**{name: In(WIDTH) for name in REGISTERS}, "new_x": Out(WIDTH), "new_y": Out(WIDTH)}
        )

    @shared
    def elaborate(self, platform):
        m = Module()
        x, y = self.x, self.y
        m.d.comb += [self.new_x.eq(x), self.new_y.eq(y)]

        def nan(bits):
            return bits[:-1] > FP32.overflow

        match self._what:
            case "negate":
                m.d.comb += self.new_x[-1].eq(~x[-1])
            case "scale":
                fraction = FP32.mantissa_bits
                k, exponent = Signal(range(-(1 << WIDTH), 1 << WIDTH)), Signal(range(-1024, 1024))
                # Whatever is above or below in the order of signed integers is so as a number, too.
                m.d.comb += [
                    k.eq(y.as_signed() - Const(_bits(ROUND))),
                    exponent.eq(self.z[fraction:-1] + k[: SCALE_LIMIT.bit_length() + 1].as_signed()),
                ]
                with m.If(nan(y)):
                    m.d.comb += self.new_y.eq(FP32.nan)
                with m.Elif((k <= -SCALE_LIMIT) | ((k < SCALE_LIMIT) & (exponent < 1))):
                    m.d.comb += self.new_y.eq(0)
                with m.Elif((k >= SCALE_LIMIT) | (exponent >= FP32.overflow >> fraction)):
                    m.d.comb += self.new_y.eq(FP32.overflow)
                with m.Else():
                    m.d.comb += self.new_y.eq(Cat(self.z[:fraction], exponent[: FP32.exponent_bits]))
            case "reciprocal seed":
                m.d.comb += self.new_y.eq(RECIPROCAL_SEED - x)
            case "rsqrt seed":
                m.d.comb += self.new_y.eq(RSQRT_SEED - (x >> 1))
            case end:
                with m.If(nan(x)):
                    m.d.comb += self.new_y.eq(FP32.nan)
                if end == "reciprocal end":
                    limit = FP32.bias + GATE_LIMIT_EXPONENT << FP32.mantissa_bits
                    with m.Elif(~x[-1] & (x >= limit)):
                        m.d.comb += self.new_y.eq(0)
                with m.Elif(nan(y)):  # a seed may be
                    m.d.comb += self.new_y.eq(FP32.nan)
        return m


class Function(wiring.Component):
    """A special function of one lane of the tail: the methods of `workloads.asic`.

    A pipeline that moves where ``move``: ``o`` is the function of what ``i`` was `arch.rdu.tail_latency` movements
    ago, in the same tick for "none". The functions share the operations' units: operation n of each has the same
    place. There is a multiplier where any function multiplies, and an adder where any adds. The canonical NaN stands
    for every NaN, but "none" gives what came in.

    Parameters
    ----------
    params : RduParams

    Members
    -------
    ======== === ================ ===================================================
    function In  range(FUNCTIONS) which, constant while anything is under way
    move     In  1                the pipeline moves at the end of this tick
    i        In  32               binary32
    o        Out 32               the result
    ======== === ================ ===================================================
    """

    def __init__(self, *, params: RduParams):
        self._params = params
        super().__init__(
            {"function": In(range(len(FUNCTIONS))), "move": In(1), "i": In(WIDTH), "o": Out(WIDTH)}
        )

    def elaborate(self, platform):
        m = Module()
        p = self._params
        m.d.comb += self.o.eq(self.i)
        left = {f: list(program) for f, program in enumerate(programs(p), 1)}
        state = dict.fromkeys(REGISTERS, self.i)
        place = 0

        def taken(condition):
            """The functions by what comes next, those that meet the condition; it is taken off."""
            groups = {}
            for f, program in left.items():
                if program and condition(program[0]):
                    groups.setdefault(program.pop(0), []).append(f)
            return groups

        def operand(name):
            return state[name] if name in REGISTERS else Const(_bits(name), WIDTH)

        while True:
            turn = 0
            while groups := taken(lambda step: step[0] in ADJUSTMENTS):
                after = {r: Signal(WIDTH, name=f"{r}_{place}_{turn}") for r in REGISTERS}
                m.d.comb += [after[r].eq(state[r]) for r in REGISTERS]
                with m.Switch(self.function):
                    for n, ((what,), functions) in enumerate(groups.items()):
                        m.submodules[f"adjust_{place}_{turn}_{n}"] = unit = Adjust(what=what)
                        m.d.comb += [getattr(unit, r).eq(state[r]) for r in REGISTERS]
                        with m.Case(*functions):
                            m.d.comb += [after["x"].eq(unit.new_x), after["y"].eq(unit.new_y)]
                state = after
                turn += 1
            ends = [f for f, program in left.items() if not program]
            if ends:
                for f in ends:
                    assert p.op_latency * place == tail_latency(p, f), FUNCTIONS[f]
                    del left[f]
                with m.Switch(self.function):
                    with m.Case(*ends):
                        m.d.comb += self.o.eq(state["y"])
            if not left:
                return m

            after = {r: Signal(WIDTH, name=f"{r}_{place}_after") for r in REGISTERS}
            m.d.comb += [after[r].eq(state[r]) for r in REGISTERS]
            groups = taken(lambda step: True)
            units = {}
            if any(what == "multiply" for what, *_ in groups):
                units["multiply"] = FpMultiply(source=FP32, result=FP32)
            if any(what != "multiply" for what, *_ in groups):
                units["add"] = FpAdd(format=FP32)
            for kind, unit in units.items():
                m.submodules[f"{kind}_{place}"] = unit
            with m.Switch(self.function):
                for (what, a, b, to), functions in groups.items():
                    unit = units["multiply" if what == "multiply" else "add"]
                    second = operand(b)
                    with m.Case(*functions):
                        m.d.comb += [
                            unit.a.eq(operand(a)),
                            unit.b.eq(Cat(second[:-1], second[-1] ^ (what == "subtract"))),
                            after[to].eq(unit.o),
                        ]
            for k in range(p.op_latency):
                later = {r: Signal(WIDTH, name=f"{r}_{place}_{k}_later") for r in REGISTERS}
                with m.If(self.move):
                    m.d.sync += [later[r].eq(after[r]) for r in REGISTERS]
                after = later
            state = after
            place += 1
