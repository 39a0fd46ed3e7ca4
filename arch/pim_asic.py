"""The vector unit of the companion ASIC of a PIM-GPT system: its sizes, and the microprogram of each operation.

Sizes. A lane has a multiplier followed by an adder; a tree of adders, one for each lane, joins what the lanes
give and adds it to a running total. So s lanes take s multipliers and 2 s adders, and a unit has as many lanes
as both counts allow: a power of two, or whole SRAM columns.

Time. A step is one pass of the lanes over a strip of up to `register_rows` groups of s elements, one group a
cycle; its result is there `latency` cycles after its operands were asked for. The next step begins with group
0 when the strip has been issued and the result of group 0 is there. The last step of a strip hands over to
the next strip at once; behind the last strip everything is waited for.

    step     A A A A . B B B B . C C C C A A . . . B B . . . C C | wait
    group    0 1 2 3 . 0 1 2 3 . 0 1 2 3 4 5 . . . 4 5 . . . 4 5        6 groups, strips of 4, latency 5

The paper names adders, multipliers and methods (Taylor series, Newton-Raphson, fast inverse square root: Wu,
Wang, Lu, npj Unconventional Computing 2024); the unit around them is ours.
"""

from math import factorial, log, pi, sqrt
from typing import Annotated, NamedTuple

from pydantic import Field as Limits

from tilewright.arch.spec import Positive, Section


class AsicSection(Section):
    """The companion chip: SRAM, adders, multipliers, and the sequencer that issues every instruction."""

    clock_mhz: Positive
    sram_bytes: Annotated[int, Limits(ge=2, le=1 << 26)]
    adders: Annotated[int, Limits(ge=4, le=1 << 16)]
    multipliers: Annotated[int, Limits(ge=2, le=1 << 16)]
    adder_latency_cycles: Annotated[int, Limits(ge=1, le=64)]
    multiplier_latency_cycles: Annotated[int, Limits(ge=1, le=64)]
    register_rows: Annotated[int, Limits(ge=1, le=1 << 10)]
    exp_terms: Annotated[int, Limits(ge=1, le=16)]
    reciprocal_iterations: Annotated[int, Limits(ge=0, le=8)]
    rsqrt_iterations: Annotated[int, Limits(ge=0, le=8)]
    overlap: bool


# ---- sizes and latencies ------------------------------------------------------------------------------


def vector_lanes(asic: AsicSection, column: int) -> int:
    """Lanes of the vector unit, for SRAM columns of `column` elements: even, at least 2."""
    most = min(asic.multipliers, asic.adders // 2)
    unit = max(column, 2)
    return most // unit * unit if most >= unit else 1 << most.bit_length() - 1


def step_latency(asic: AsicSection) -> int:
    """Cycles from a group's issue to the first in which its result can be asked for.

    One to read SRAM or registers, the multiplier, the adder, one to write.
    """
    return 2 + asic.multiplier_latency_cycles + asic.adder_latency_cycles


def tree_latency(asic: AsicSection, lanes: int) -> int:
    """Cycles from the lanes' results to the running total: every level of the tree and the total's adder."""
    return asic.adder_latency_cycles * (1 + (lanes - 1).bit_length())


# ---- microprograms ------------------------------------------------------------------------------------

VECTORS = ("v0", "v1", "v2", "v3")  # registers of every lane, with a row for each group of a strip
SCALARS = ("s0", "s1", "s2", "s3")  # one value for all lanes, written by lane 0
TOTALS = ("sum", "top")  # running totals: additions from +0, maxima from -infinity
FIELDS = ("imm", "imm2")  # float32 of the instruction

ROUND = 1.5 * 2.0**23
"""Added and subtracted again, it rounds numbers below 2**22 to the nearest even integer."""
RECIPROCAL_SEED = 0x7EF311C7
"""Minus the bits of d: 1/d within 5.1 %."""
RSQRT_SEED = 0x5F3759DF
"""Minus half the bits of d: 1/sqrt(d) within 3.5 % (Lomont, "Fast inverse square root", 2003)."""
GELU_CUBIC = 0.044715
GELU_SCALE = -2 * sqrt(2 / pi)
LOG2E = 1 / log(2)
LN2 = log(2)
SCALE_LIMIT = 256
"""`scale` by 2**k takes |k| below it; beyond, the result is +0 or infinity."""
GATE_LIMIT_EXPONENT = 126
"""`gate` gives +0 from d = 2**126 on, where the seed of 1/d leaves the normal range."""


class Step(NamedTuple):
    """What lanes do to each element: `first`, then `second`, then the result goes `to` somewhere.

    Operands a, b, c are a register, a running total, an immediate of the instruction, "memory" (the element
    of the vector at `load`, bfloat16), or a constant as decimal text.

    | first    | gives                                                                            |
    | -------- | -------------------------------------------------------------------------------- |
    | pass     | a                                                                                |
    | multiply | a * b                                                                            |
    | scale    | a * 2**b for positive normal a: infinity above the range, +0 below the smallest  |
    |          | normal number; b, an integer, beyond +-256 counts as infinite; NaN where b is    |
    | gate     | a * b; a * 0 where c >= 2**126; a * c where c is NaN                             |

    | second     | gives, x being the result of the first, negated if `negate`                    |
    | ---------- | ------------------------------------------------------------------------------ |
    | pass       | x                                                                              |
    | add        | x + c                                                                          |
    | subtract   | x - c                                                                          |
    | reciprocal | the seed of 1/x                                                                |
    | rsqrt      | the seed of 1/sqrt(x); NaN stays                                               |
    | relu       | x if it is above zero or NaN, else +0                                          |

    `swap`: a is that of the neighbour, lane 2i that of 2i + 1 and the other way round. `to` "memory" stores
    as bfloat16 at dst. `join` adds the result to a running total as well, or ("best") takes it and its index
    where it is greater than the best so far.
    """

    first: str = "pass"
    a: str = "memory"
    b: str = ""
    second: str = "pass"
    c: str = ""
    to: str = ""
    join: str = ""
    load: str = ""
    negate: bool = False
    swap: bool = False

    @property
    def adds(self) -> int:
        """Additions for each element; comparisons and the seeds' integer subtractions are additions."""
        return (self.second != "pass") + (self.join != "")

    @property
    def multiplies(self) -> int:
        """Multiplications for each element."""
        return int(self.first in ("multiply", "gate"))


class Block(NamedTuple):
    """Steps over a vector, strip by strip, or (scalar) once, in lane 0."""

    name: str
    steps: tuple[Step, ...]
    scalar: bool = False


def _multiply(a: str, b: str, **more: object) -> Step:
    return Step("multiply", a, b, **more)  # type: ignore[arg-type]


def _exp(x: str, t: str, p: str, terms: int, source: str = "", negate: bool = False) -> tuple[Step, ...]:
    """Leaves the polynomial in p and the power of two in t; x is overwritten. e**x = p * 2**t.

    With `source` and `negate` the argument is minus that register, and x need not hold it.
    """
    a = source or x
    steps = [
        _multiply(a, str(LOG2E), second="add", c=str(ROUND), to=t, negate=negate),
        Step(a=t, second="subtract", c=str(ROUND), to=t),
    ]
    if negate:  # -(t ln 2) - source
        steps.append(_multiply(t, str(LN2), second="subtract", c=a, to=x, negate=True))
    else:
        steps.append(_multiply(t, str(LN2), second="add", c=a, to=x, negate=True))
    for i in reversed(range(terms)):
        head = p if i < terms - 1 else str(1 / factorial(terms))
        steps.append(_multiply(head, x, second="add", c=str(1 / factorial(i)), to=p))
    return tuple(steps)


def _reciprocal(d: str, r: str, spare: str, iterations: int) -> tuple[Step, ...]:
    newton = (
        _multiply(d, r, second="add", c="2", negate=True, to=spare),
        _multiply(r, spare, to=r),
    )
    return (Step(a=d, second="reciprocal", to=r), *newton * iterations)


def _rsqrt(d: str, y: str, spare: str, iterations: int) -> tuple[Step, ...]:
    """d is halved on the way."""
    newton = (
        _multiply(d, y, to=spare),
        _multiply(spare, y, second="add", c="1.5", negate=True, to=spare),
        _multiply(y, spare, to=y),
    )
    return (Step(a=d, second="rsqrt", to=y), _multiply(d, "0.5", to=d), *newton * iterations)


def _gated(asic: AsicSection) -> tuple[Step, ...]:
    """x / (1 + e**u) for the polynomial in v3, its power of two in v2, and x in v0."""
    return (
        Step("scale", "v3", "v2", second="add", c="1", to="v1"),
        *_reciprocal("v1", "v2", "v3", asic.reciprocal_iterations),
        Step("gate", "v0", "v2", c="v1", to="memory"),
    )


def microprograms(asic: AsicSection) -> dict[str, tuple[Block, ...]]:
    """The microprogram of each ASIC operation, by its name."""
    terms = asic.exp_terms
    x = Step(load="src", to="v0")
    share = _multiply("sum", "imm2", to="s0")
    rsqrt = _rsqrt("s1", "s2", "s3", asic.rsqrt_iterations)
    return {
        "ADD": (Block("add", (x, Step(load="src2", second="add", c="v0", to="memory"))),),
        "MUL": (Block("multiply", (x, _multiply("v0", "memory", load="src2", to="memory"))),),
        "SOFTMAX": (
            Block("scale and maximum", (_multiply("memory", "imm", load="src", join="top"),)),
            Block(
                "exp and sum",
                (
                    _multiply("memory", "imm", load="src", second="subtract", c="top", to="v1"),
                    *_exp("v1", "v2", "v3", terms),
                    Step("scale", "v3", "v2", to="memory", join="sum"),
                ),
            ),
            Block(
                "reciprocal",
                _reciprocal("sum", "s1", "s2", asic.reciprocal_iterations),
                True,
            ),
            Block("normalise", (Step("gate", "memory", "s1", c="sum", load="dst", to="memory"),)),
        ),
        "LAYERNORM": (
            Block("sum", (Step(load="src", join="sum"),)),
            Block("mean", (share,), True),
            Block(
                "centre, square and sum",
                (Step(load="src", second="subtract", c="s0", to="v0"), _multiply("v0", "v0", join="sum")),
            ),
            Block("1/sqrt", (_multiply("sum", "imm2", second="add", c="imm", to="s1"), *rsqrt), True),
            Block(
                "normalise",
                (
                    Step(load="src", second="subtract", c="s0", to="v0"),
                    _multiply("v0", "s2", to="v0"),
                    _multiply("v0", "memory", load="src2", to="v0"),
                    Step(load="src3", second="add", c="v0", to="memory"),
                ),
            ),
        ),
        "RMSNORM": (
            Block("square and sum", (_multiply("memory", "memory", load="src", join="sum"),)),
            Block("1/sqrt", (_multiply("sum", "imm2", second="add", c="imm", to="s1"), *rsqrt), True),
            Block(
                "normalise",
                (
                    _multiply("memory", "s2", load="src", to="v0"),
                    _multiply("v0", "memory", load="src2", to="memory"),
                ),
            ),
        ),
        "GELU": (
            Block(
                "GELU",
                (
                    x,
                    _multiply("v0", "v0", to="v1"),
                    _multiply("v1", "v0", to="v1"),
                    _multiply("v1", str(GELU_CUBIC), second="add", c="v0", to="v1"),
                    _multiply("v1", str(GELU_SCALE), to="v1"),
                    *_exp("v1", "v2", "v3", terms),
                    *_gated(asic),
                ),
            ),
        ),
        "SILU": (Block("SiLU", (x, *_exp("v1", "v2", "v3", terms, "v0", negate=True), *_gated(asic))),),
        "RELU": (Block("maximum", (Step(load="src", second="relu", to="memory"),)),),
        "ROPE": (
            Block(
                "rotate",
                (
                    x,
                    _multiply("v0", "memory", load="src2", to="v1"),
                    _multiply("v0", "memory", load="src3", second="add", c="v1", swap=True, to="memory"),
                ),
            ),
        ),
        "ARGMAX": (Block("maximum", (Step(load="src", join="best"),)),),
    }


class Passes(NamedTuple):
    """A block as time sees it.

    A strip of g groups takes (steps - 1) * max(g, latency) + g * interval cycles; `tail` more follow the last.
    """

    steps: int
    interval: int
    tail: int
    scalar: bool
    adds: int
    multiplies: int


def passes(asic: AsicSection, lanes: int) -> dict[str, tuple[Passes, ...]]:
    """Passes of each operation, block by block.

    A running total takes a group each time that its adder has finished: interval and tail of a block that
    ends with a join are longer.
    """
    latency, tree = step_latency(asic), tree_latency(asic, lanes)

    def one(block: Block) -> Passes:
        assert not any(step.join for step in block.steps[:-1]), "only the last step of a block joins"
        joins = bool(block.steps[-1].join)
        interval = asic.adder_latency_cycles if joins else 1
        return Passes(
            len(block.steps),
            interval,
            latency - interval + joins * tree,
            block.scalar,
            sum(s.adds for s in block.steps),
            sum(s.multiplies for s in block.steps),
        )

    return {name: tuple(one(b) for b in blocks) for name, blocks in microprograms(asic).items()}
