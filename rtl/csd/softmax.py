"""The softmax unit of an attention kernel: weights relative to the largest score, and their sum; and the scalar unit."""

from math import factorial

import numpy as np
from amaranth.hdl import Array, Assert, Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from tilewright.arch.csd import LANE_TICKS, SCALARS, exp_latency, reduce_latency, scalar_programs
from tilewright.arch.formats import FP16, FP32
from tilewright.arch.pim_asic import LN2, LOG2E, ROUND
from tilewright.rtl.lib.fp import FpConvert
from tilewright.rtl.pim.asic_lane import FIRST, SECOND, Lane, Tree, delay, is_nan

__all__ = ["PROGRAMS", "ScalarUnit", "SoftmaxUnit"]

PROGRAMS = tuple(scalar_programs(1, 1))


def _bits(value) -> int:
    return int(np.float32(value).view(np.uint32))


class SoftmaxUnit(wiring.Component):
    """weight = exp((score - top) * scale), rounded to FP16, and the sum of the weights in FP32.

    A score a tick, gaps allowed; its weight comes `arch.csd.exp_latency` ticks later. e**x is that of
    `workloads.asic.exp`, one step of it after the other. Weights are summed in groups of `lanes`, the last one filled
    up with +0: `total` is there `arch.csd.reduce_latency` ticks after the last weight, and stays.

    Parameters
    ----------
    lanes : int
        Weights of a group, a power of two, at least 2.
    terms : int
        Of the Taylor series, after the constant one.

    Members
    -------
    ============ === == =======================================================
    valid        In  1  there is a score
    score        In  32 FP32
    last         In  1  it is the last one of its softmax
    top, scale   In  32 FP32: the largest score, and its factor; with each score
    weight_valid Out 1  there is a weight
    weight       Out 16 FP16
    weight_last  Out 1  it is the last one
    total_valid  Out 1  `total` is that of a softmax from this tick on
    total        Out 32 FP32
    ============ === == =======================================================
    """

    def __init__(self, *, lanes: int, terms: int):
        self._lanes, self._terms = lanes, terms
        super().__init__(
            {
                "valid": In(1),
                "score": In(FP32.width),
                "last": In(1),
                "top": In(FP32.width),
                "scale": In(FP32.width),
                "weight_valid": Out(1),
                "weight": Out(FP16.width),
                "weight_last": Out(1),
                "total_valid": Out(1),
                "total": Out(FP32.width),
            }
        )

    def elaborate(self, platform):
        m = Module()
        steps = 0

        def step(first, a, second, c, b=0, negate=False):
            """The result of a lane, LANE_TICKS after its operands."""
            nonlocal steps
            m.submodules[f"step_{steps}"] = lane = Lane(multiply_latency=1, add_latency=1)
            steps += 1
            m.d.comb += [
                lane.first.eq(FIRST.index(first)),
                lane.second.eq(SECOND.index(second)),
                lane.negate.eq(negate),
                lane.a.eq(a),
                lane.b.eq(b),
                lane.c.eq(c),
            ]
            return lane.o

        def later(value, passed, name):
            return delay(m, value, LANE_TICKS * passed, name=name)

        x = step("pass", self.score, "subtract", self.top)
        x = step("multiply", x, "pass", 0, later(self.scale, 1, "scale"))
        power = step("multiply", x, "add", _bits(ROUND), _bits(LOG2E))
        power = step("pass", power, "subtract", _bits(ROUND))
        rest = step("multiply", power, "add", later(x, 2, "x"), _bits(LN2), negate=True)
        power = later(power, 1, "power")
        series = _bits(1 / factorial(self._terms))
        for i in reversed(range(self._terms)):
            series = step("multiply", series, "add", _bits(1 / factorial(i)), rest)
            rest, power = later(rest, 1, f"rest_{i}"), later(power, 1, f"power_{i}")
        weight = step("scale", series, "pass", 0, power)
        m.submodules.round = rounded = FpConvert(source=FP32, result=FP16)
        latency = exp_latency(self._terms)
        assert latency == LANE_TICKS * steps + 1
        m.d.comb += [
            rounded.a.eq(weight),
            self.weight_valid.eq(delay(m, self.valid, latency, name="valid", reset_less=False)),
            self.weight_last.eq(delay(m, self.last, latency, name="last")),
        ]
        m.d.sync += self.weight.eq(rounded.o)

        # A group is complete with its last weight.
        held = [Signal(FP32.width, name=f"held_{lane}") for lane in range(self._lanes - 1)]
        place, fresh = Signal(range(self._lanes)), Signal(init=1)
        m.submodules.widen = widen = FpConvert(source=FP16, result=FP32)
        m.submodules.tree = tree = Tree(lanes=self._lanes, latency=1)
        ends = self.weight_valid & (self.weight_last | (place == self._lanes - 1))
        m.d.comb += [
            widen.a.eq(self.weight),
            tree.valid.eq(ends),
            tree.fresh.eq(fresh),
            tree.active.eq(Cat(lane <= place for lane in range(self._lanes))),
            *(
                element.eq(Mux(place == lane, widen.o, held[lane]) if lane < len(held) else widen.o)
                for lane, element in enumerate(tree.elements)
            ),
            self.total.eq(tree.sum),
            self.total_valid.eq(
                delay(m, ends & self.weight_last, reduce_latency(self._lanes), name="total", reset_less=False)
            ),
        ]
        with m.If(self.weight_valid):
            m.d.sync += [
                place.eq(Mux(ends, 0, place + 1)),
                Array(held)[place].eq(widen.o),
            ]
        with m.If(ends):
            m.d.sync += fresh.eq(self.weight_last)
        return m


class ScalarUnit(wiring.Component):
    """Executes the microprograms of `arch.csd.scalar_programs`, a step every `arch.csd.LANE_TICKS` ticks.

    `done` comes `arch.csd.scalar_ticks` ticks after `start`, in which x, y and u are taken; results stay.

    Parameters
    ----------
    reciprocal_iterations, rsqrt_iterations : int

    Members
    -------
    ======== === =============== =======================================================
    start    In  1               begin, not while `busy`
    program  In  range(PROGRAMS) what
    x, y, u  In  32              operands, FP32
    plain    In  1               tau: the result is u
    steps    Out 1               a step begins
    busy     Out 1               a step is under way
    done     Out 1               results are there
    x_result Out 32
    y_result Out 32
    ======== === =============== =======================================================
    """

    def __init__(self, *, reciprocal_iterations: int, rsqrt_iterations: int):
        self._programs = scalar_programs(reciprocal_iterations, rsqrt_iterations)
        super().__init__(
            {
                "start": In(1),
                "program": In(range(len(PROGRAMS))),
                "x": In(FP32.width),
                "y": In(FP32.width),
                "u": In(FP32.width),
                "plain": In(1),
                "steps": Out(1),
                "busy": Out(1),
                "done": Out(1),
                "x_result": Out(FP32.width),
                "y_result": Out(FP32.width),
            }
        )

    def elaborate(self, platform):
        m = Module()
        words = [step for name in PROGRAMS for step in self._programs[name]]
        ends = np.cumsum([len(self._programs[name]) for name in PROGRAMS])
        begins = [0, *ends[:-1]]

        m.submodules.lane = lane = Lane(multiply_latency=1, add_latency=1)
        word, current = Signal(range(len(words))), Signal(range(len(words)))
        phase = Signal(range(LANE_TICKS))
        issues, final = Signal(), Signal()
        to, clip = Signal(range(len(SCALARS))), Signal()  # of the step before
        one, value = _bits(1), Signal(FP32.width)
        m.d.comb += [
            current.eq(Mux(self.start, Array(int(b) for b in begins)[self.program], word)),
            issues.eq(self.start | (self.busy & (phase == 0) & ~self.done)),
            self.steps.eq(issues),
            value.eq(Mux(clip & ~lane.o[-1] & (lane.o > one) & ~is_nan(lane.o), one, lane.o)),
        ]
        # A register has the result of the step before in the tick in which the next step takes it.
        registers, results = {}, {}
        given = {"x": self.x, "y": self.y, "u": self.u}
        for i, name in enumerate(SCALARS):
            register = Signal(FP32.width, name=name)
            result, taken = (Signal(FP32.width, name=f"{name}_{what}") for what in ("result", "taken"))
            comes = self.busy & (phase == 0) & (to == i)
            m.d.comb += [
                result.eq(Mux(comes, value, register)),
                taken.eq(Mux(self.start, given.get(name, 0), result)),
            ]
            m.d.sync += register.eq(taken)
            registers[name], results[name] = taken, result

        def operand(text):
            return registers[text] if text in registers else (_bits(text) if text else 0)

        with m.Switch(current):
            for i, step in enumerate(words):
                with m.Case(i):
                    m.d.comb += [
                        lane.first.eq(FIRST.index(step.first)),
                        lane.second.eq(SECOND.index(step.second)),
                        lane.negate.eq(step.negate),
                        lane.a.eq(operand(step.a)),
                        lane.b.eq(operand(step.b)),
                        lane.c.eq(operand(step.c)),
                    ]
                    with m.If(issues):
                        m.d.sync += [
                            to.eq(SCALARS.index(step.to)),
                            clip.eq(step.clip),
                            final.eq(i + 1 in ends),
                        ]
        m.d.comb += self.done.eq(self.busy & (phase == 0) & final)
        plain = Signal()
        m.d.comb += [
            self.x_result.eq(Mux(plain, results["u"], results["x"])),
            self.y_result.eq(results["y"]),
        ]
        with m.If(issues):
            m.d.sync += [word.eq(current + 1), phase.eq(1)]
        with m.Elif(self.busy):
            m.d.sync += phase.eq(0)
        with m.If(self.start):
            m.d.sync += [self.busy.eq(1), plain.eq(self.plain)]
        with m.Elif(self.done):
            m.d.sync += self.busy.eq(0)
        m.d.sync += Assert(~(self.start & self.busy & ~self.done), "the scalar unit is busy")
        return m
