"""The vector unit alone, under Verilator: bits, cycles and counts of every operation, over sizes and latencies."""

import subprocess
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import pytest
from amaranth.hdl import Module
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from tests.lib import vectors
from tilewright.arch.formats import BF16
from tilewright.arch.pim import ISA, OPS, PimSpec
from tilewright.arch.pim_asic import passes, step_latency, tree_latency, vector_lanes
from tilewright.arch.spec import build, load_tree
from tilewright.rtl.pim.asic import VectorUnit
from tilewright.workloads import asic as reference
from tilewright.workloads.formats import from_bits, to_bits

pytestmark = pytest.mark.cosim

ELEMENTS = 480  # of the SRAM, in four areas: src, src2, src3 and dst
AREA = ELEMENTS // 4
FIELDS = {op.name: op.fields for op in OPS}
SPEC = build(PimSpec, load_tree("pim-gpt", ["pim"]), "test")
INSTRUCTION_BITS = ISA.record("code").bits


@dataclass(frozen=True)
class Machine:
    """A vector unit of some structure: column, multipliers, latencies (adder, multiplier), rows, terms, iterations."""

    column: int
    multipliers: int
    adder: int = 1
    multiplier: int = 1
    rows: int = 2
    terms: int = 6
    reciprocal: int = 3
    rsqrt: int = 2

    @cached_property
    def asic(self):
        return SPEC.asic.model_copy(
            update={
                "adders": 2 * self.multipliers,
                "multipliers": self.multipliers,
                "adder_latency_cycles": self.adder,
                "multiplier_latency_cycles": self.multiplier,
                "register_rows": self.rows,
                "exp_terms": self.terms,
                "reciprocal_iterations": self.reciprocal,
                "rsqrt_iterations": self.rsqrt,
            }
        )

    @cached_property
    def lanes(self):
        return vector_lanes(self.asic, self.column)

    @cached_property
    def unit(self):
        params = SPEC.params()._replace(
            lanes=self.column,
            sram_columns=ELEMENTS // self.column,
            vector_lanes=self.lanes,
            register_rows=self.rows,
            step_latency=step_latency(self.asic),
            tree_latency=tree_latency(self.asic, self.lanes),
        )
        return VectorUnit(params=params, asic=self.asic)


# Lanes: as many as a column, fewer, more, no power of two. Rows: fewer than the latency, as many, more.
MACHINES = (
    Machine(2, 2),
    Machine(8, 2, adder=2, rows=6, terms=4, reciprocal=1, rsqrt=3),
    Machine(8, 7, multiplier=3, rows=3, terms=3, reciprocal=2),
    Machine(1, 3, adder=3, multiplier=2, rows=1, terms=1, reciprocal=0, rsqrt=0),
    Machine(2, 6, rows=4, terms=5, rsqrt=1),
    Machine(1, 5, adder=2, rows=8, terms=2),
)


class Units(wiring.Component):
    """Every machine's unit behind ports of one width; the one called `which` is started and works."""

    def __init__(self):
        self.units = [machine.unit for machine in MACHINES]
        self.outputs = (
            *("busy", "read_enable", "read_address", "write_enable", "write_address", "write_data"),
            *("adds", "multiplies"),
        )
        widest = max(len(unit.read_data) for unit in self.units)
        super().__init__(
            {
                "which": In(8),
                "clear": In(1),
                "enable": In(1),
                "start": In(1),
                "instruction": In(INSTRUCTION_BITS),
                "init": In(64),
                "read_data": In(widest),
                "write_data": Out(widest),
                "best": Out(64),
                **{name: Out(16) for name in self.outputs if name != "write_data"},
            }
        )

    def elaborate(self, platform):
        m = Module()
        for i, unit in enumerate(self.units):
            m.submodules[f"unit_{i}"] = unit
            mine = self.which == i
            m.d.comb += [
                unit.clear.eq(self.clear & mine),
                unit.enable.eq(self.enable & mine),
                unit.start.eq(self.start & mine),
                unit.instruction.eq(self.instruction),
                unit.argmax_init.index.eq(self.init[:32]),
                unit.argmax_init.value.eq(self.init[32:]),
                unit.read_data.eq(self.read_data),
            ]
            with m.If(mine):
                m.d.comb += [getattr(self, name).eq(getattr(unit, name)) for name in self.outputs]
                m.d.comb += [self.best[:32].eq(unit.argmax.index), self.best[32:].eq(unit.argmax.value)]
        return m


# The SRAM, and the clock: of 256 ticks the unit works in about `rate`. Elements beyond the SRAM are no numbers
# that anything should see. A job that breaks the protocol is answered with the number of ticks in which it did.
MAIN = """
#include "Vtop.h"
#include "verilated.h"
#include <cstdint>
#include <cstdio>
#include <cstring>

double sc_time_stamp() { return 0; }

struct Job { uint32_t which, column, rate, clear, abort, index, value, instruction[INSTRUCTION_WORDS]; uint16_t sram[ELEMENTS]; };
struct Answer { uint32_t cycles, adds, multiplies, wrong, index, value; };

static Vtop top;
static Job job;
static uint32_t seed = 1;

static bool enabled() {
    seed = seed * 1664525 + 1013904223;
    return (seed >> 24) < job.rate;
}

static void tick() {
    const bool reads = top.read_enable;
    const uint32_t from = top.read_address * job.column, to = top.write_address * job.column;
    uint16_t seen[sizeof(top.read_data) / 2], data[sizeof(top.write_data) / 2];
    for (uint32_t k = 0; k < sizeof seen / 2; k++) seen[k] = from + k < ELEMENTS ? job.sram[from + k] : 0x7fff;
    memcpy(data, &top.write_data, sizeof data);
    for (uint32_t k = 0; k < 16; k++)
        if (top.write_enable >> k & 1) job.sram[to + k] = data[k];
    top.clk = 1;
    top.eval();
    if (reads) memcpy(&top.read_data, seen, sizeof seen);
    top.clk = 0;
}

int main() {
    top.rst = 0;
    top.clk = 0;
    while (fread(&job, sizeof job, 1, stdin) == 1) {
        Answer answer = {};
        top.which = job.which;
        top.init = static_cast<uint64_t>(job.value) << 32 | job.index;
        top.clear = job.clear;
        top.enable = enabled();
        top.eval();
        tick();
        top.clear = 0;
        memcpy(&top.instruction, job.instruction, sizeof top.instruction);
        top.start = top.enable = 1;
        top.eval();
        answer.wrong += top.busy;
        tick();
        top.start = 0;
        for (uint32_t ticks = 1;; ticks++) {
            top.enable = enabled();
            top.clear = ticks == job.abort;
            top.eval();
            if (!top.busy || answer.cycles > 1000000) break;
            answer.cycles += top.enable;
            answer.adds += top.adds;
            answer.multiplies += top.multiplies;
            answer.wrong += job.abort && ticks > job.abort;
            answer.wrong += !top.enable && (top.read_enable || top.write_enable || top.adds || top.multiplies);
            tick();
        }
        memset(&top.instruction, 0, sizeof top.instruction);
        top.enable = 1;
        for (int k = 0; k < 8; k++) {
            top.eval();
            answer.wrong += top.busy || top.read_enable || top.write_enable || top.adds || top.multiplies;
            tick();
        }
        answer.index = static_cast<uint32_t>(top.best);
        answer.value = static_cast<uint32_t>(top.best >> 32);
        fwrite(&answer, sizeof answer, 1, stdout);
        fwrite(job.sram, sizeof job.sram, 1, stdout);
    }
    return 0;
}
"""
WORDS = -(-INSTRUCTION_BITS // 32)
JOB = np.dtype(
    [
        *((name, "<u4") for name in ("which", "column", "rate", "clear", "abort", "index", "value")),
        ("instruction", "<u4", WORDS),
        ("sram", "<u2", ELEMENTS),
    ]
)
ANSWER = np.dtype(
    [
        *((name, "<u4") for name in ("cycles", "adds", "multiplies", "wrong", "index", "value")),
        ("sram", "<u2", ELEMENTS),
    ]
)


@pytest.fixture(scope="module")
def program():
    main = MAIN.replace("INSTRUCTION_WORDS", str(WORDS)).replace("ELEMENTS", str(ELEMENTS))
    return vectors.build(Units(), main)


@dataclass
class Job:
    """An instruction that meets an SRAM (uint16 elements). A run begins with the `best` (value, index) so far, or
    goes on; it is broken off in tick `abort` of the instruction, if not 0, and another one begins.
    """

    machine: Machine
    op: str
    sram: np.ndarray
    fields: dict = field(default_factory=dict)
    rate: int = 256
    best: tuple[int, int] | None = (0xFF80, 0)
    abort: int = 0

    def record(self):
        m = self.machine
        record = np.zeros((), JOB)
        record["which"] = MACHINES.index(m)
        record["column"], record["rate"], record["abort"] = m.column, self.rate, self.abort
        if self.best is not None:
            record["clear"], record["value"], record["index"] = 1, *self.best
        record["instruction"] = ISA.record("code").encode(ISA.make(self.op, **self.fields).reshape(1))[0]
        record["sram"] = self.sram
        return record


def play(program, jobs):
    done = subprocess.run(
        [program], input=np.array([job.record() for job in jobs]).tobytes(), capture_output=True, check=False
    )
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr
    return np.frombuffer(done.stdout, ANSWER)


# ---- what is expected ---------------------------------------------------------------------------------


def cycles(job):
    """From the passes: each strip, then what is waited for."""
    m, f = job.machine, job.fields
    total = 0
    for block in passes(m.asic, m.lanes)[job.op]:
        groups = 1 if block.scalar else -(-f["n"] // m.lanes)
        for first in range(0, groups, m.rows):
            g = min(m.rows, groups - first)
            total += (block.steps - 1) * max(g, step_latency(m.asic)) + g * block.interval
        total += block.tail
    return total * f.get("outs", 1)


def counts(job):
    """Additions and multiplications: those of an element, for each element."""
    m, f = job.machine, job.fields
    blocks = [(1 if b.scalar else f["n"], b) for b in passes(m.asic, m.lanes)[job.op]]
    outs = f.get("outs", 1)
    return outs * sum(n * b.adds for n, b in blocks), outs * sum(n * b.multiplies for n, b in blocks)


def float32(bits):
    return np.uint32(bits).view(np.float32)


def image(job):
    """The SRAM that the reference leaves, with everything but the destination as it was."""
    m, f = job.machine, job.fields
    if job.op == "ARGMAX":
        return job.sram

    def place(name, k=0):
        first = (f[name] + k * f.get("pitch", 0)) * m.column
        return slice(first, first + f["n"])

    def load(name, k=0):
        return from_bits(job.sram[place(name, k)], BF16)

    a, s = m.asic, m.lanes
    imm, imm2 = float32(f.get("imm", 0)), float32(f.get("imm2", 0))
    functions = {
        "ADD": lambda x: x + load("src2"),
        "MUL": lambda x: x * load("src2"),
        "SOFTMAX": lambda x: reference.softmax(x, imm, a, s),
        "LAYERNORM": lambda x: reference.layernorm(x, load("src2"), load("src3"), imm, imm2, a, s),
        "RMSNORM": lambda x: reference.rmsnorm(x, load("src2"), imm, imm2, a, s),
        "GELU": lambda x: reference.gelu(x, a),
        "SILU": lambda x: reference.silu(x, a),
        "RELU": reference.relu,
        "ROPE": lambda x: reference.rope(x, load("src2"), load("src3")),
    }
    sram = job.sram.copy()
    with np.errstate(all="ignore"):
        for k in range(f.get("outs", 1)):
            sram[place("dst", k)] = to_bits(functions[job.op](load("src", k)), BF16)
    return sram


def argmax(job, best):
    """(value, index) after the job: each element in order, if it is greater."""
    if job.best is not None:
        best = job.best
    if job.op == "ARGMAX":
        f = job.fields
        if f["clear"]:
            best = (0xFF80, f["imm"])
        first = f["src"] * job.machine.column
        for j, bits in enumerate(job.sram[first : first + f["n"]].tolist()):
            if from_bits(bits, BF16) > from_bits(best[0], BF16):
                best = (bits, f["imm"] + j)
    return best


def check(program, jobs):
    best = dict.fromkeys(MACHINES, (0, 0))  # a unit that knows of no run
    for job, answer in zip(jobs, play(program, jobs), strict=True):
        what = f"{job.op} on {job.machine} with {job.fields}"
        np.testing.assert_array_equal(answer["sram"], image(job), err_msg=what)
        assert answer["cycles"] == cycles(job), what
        assert (answer["adds"], answer["multiplies"]) == counts(job), what
        assert answer["wrong"] == 0, what
        best[job.machine] = argmax(job, best[job.machine])
        assert (answer["value"], answer["index"]) == best[job.machine], what


# ---- jobs ---------------------------------------------------------------------------------------------

# Zeros, ones, subnormals, the ends of the ranges, infinities, NaNs; and arguments at which e**x leaves its range.
SPECIAL = [
    0x0000,
    0x3F80,
    0x0001,
    0x007F,
    0x0080,
    0x7F7F,
    0x7F80,
    0x7F81,
    0x7FC0,
    0x42B1,
    0x42AE,
    0x4F00,
    0x3300,
]
SPECIAL = np.uint16(SPECIAL + [bits | 0x8000 for bits in SPECIAL])


def values(rng, kind):
    """An SRAM full of numbers: tame, tame with special ones in between, of any size, or few different ones."""
    if kind == "few":  # the greatest, the zeros, comes more than once
        return rng.choice(np.uint16([0x0000, 0x8000, 0xBF80, 0x7FC0, 0xFF80]), size=ELEMENTS)
    if kind == "any":
        return rng.integers(1 << 16, size=ELEMENTS, dtype=np.uint16)
    bits = to_bits(rng.normal(size=ELEMENTS) * rng.choice([0.1, 1, 8]), BF16)
    chosen = rng.random(ELEMENTS) < (0.1 if kind == "special" else 0)
    return np.where(chosen, rng.choice(SPECIAL, size=ELEMENTS), bits).astype(np.uint16)


def random_job(rng, machine, op, n, kind, outs=1):
    """Operands in three areas and the result in a fourth, or where src is."""
    has = FIELDS[op]
    area, column = AREA // machine.column, machine.column
    size = -(-n // column)
    pitch = size + int(rng.integers(area // outs - size + 1)) if "pitch" in has else size
    starts = np.arange(4) * area + rng.integers(area - (outs - 1) * pitch - size + 1, size=4)
    fields = dict(zip(("src", "src2", "src3", "dst"), starts.tolist(), strict=True))
    if rng.random() < 0.3:
        fields["dst"] = fields["src"]
    numbers = np.float32([rng.choice([0.125, 1, 3]) if op == "SOFTMAX" else 1e-5, 1 / n]).view(np.uint32)
    fields |= {"n": n, "outs": outs, "pitch": pitch, "imm": int(numbers[0]), "imm2": int(numbers[1])}
    if op == "ARGMAX":
        fields |= {"imm": int(rng.integers(1 << 31)), "clear": int(rng.integers(2))}
    fields = {name: value for name, value in fields.items() if name in has}
    rate = int(rng.choice([256, 256, 170, 60]))
    best = None if op == "ARGMAX" and rng.random() < 0.3 else (int(rng.choice(SPECIAL)), 77)
    return Job(machine, op, values(rng, kind), fields, rate, best)


OPERATIONS = [op.name for op in OPS if op.name in passes(SPEC.asic, 2)]


@pytest.mark.parametrize("op", OPERATIONS)
def test_an_operation_on_every_machine(program, op):
    rng = np.random.default_rng(OPERATIONS.index(op))
    jobs = []
    for machine in MACHINES:
        s, strip = machine.lanes, machine.lanes * machine.rows
        sizes = [1, s - 1, s, s + 1, strip, strip + 1, *rng.integers(1, AREA // 2, size=3).tolist()]
        for n in sizes:
            n += n % 2 if op == "ROPE" else 0
            for kind in ("tame", "special", "any", "few"):
                outs = 1
                if "outs" in FIELDS[op] and kind == "tame":
                    outs = int(rng.integers(1, 4)) if n < AREA // 4 else 1
                jobs.append(random_job(rng, machine, op, n, kind, outs))
    check(program, jobs)


# ---- by hand ------------------------------------------------------------------------------------------

ZEROS = np.zeros(ELEMENTS, np.uint16)


@pytest.mark.parametrize(
    ("op", "n", "expected"),
    [
        # Two lanes, strips of two groups, latency 4. One group: it issues, and again when its result is there
        # after 4 cycles; that takes 4 cycles too.
        ("ADD", 2, 4 + 4),
        # Three groups: two take the two steps, 4 + 2 cycles, then the third.
        ("ADD", 5, 4 + 2 + 4 + 4),
        ("RELU", 5, 3 - 1 + 4),
        # One level of comparisons, and the best so far.
        ("ARGMAX", 5, 3 - 1 + 4 + 2),
        # Sum, and sum * 1/n; two steps to the sum of squares; six steps to a seed and a step of Newton's, three
        # more for the second; four to normalise.
        ("LAYERNORM", 2, (4 + 2) + 4 + (2 * 4 + 2) + 9 * 4 + 4 * 4),
    ],
)
def test_cycles(program, op, n, expected):
    fields = {"dst": 60, "src": 0, "src2": 100, "src3": 140, "n": n}
    [answer] = play(program, [Job(MACHINES[0], op, ZEROS, {k: fields[k] for k in FIELDS[op] if k in fields})])
    assert answer["cycles"] == expected


def test_powers_of_e_below_the_normal_range_are_zero(program):
    # e**-87 = 1.2 * 2**-126; e**-87.5 = 1.7 * 2**-127; then further and further below.
    exponents = [0, -87, -87.5, -88, -88.5, -89, -200, -(2.0**30), -np.inf]
    sram = ZEROS.copy()
    sram[: len(exponents)] = to_bits(exponents, BF16)
    fields = {"src": 0, "dst": 0, "n": len(exponents), "outs": 1, "pitch": 0, "imm": 0x3F800000}
    job = Job(MACHINES[0], "SOFTMAX", sram, fields)
    check(program, [job])
    [answer] = play(program, [job])
    assert (answer["sram"][: len(exponents)] != 0).tolist() == [True, True] + [False] * 7


def test_a_unit_whose_clock_is_slow(program):
    # 20 times as many ticks as those in which the unit works: the cycles are the same.
    rng = np.random.default_rng(0)
    jobs = [random_job(rng, machine, "SOFTMAX", 11, "tame") for machine in MACHINES]
    for job in jobs:
        job.rate = 12
    check(program, jobs)


def test_a_new_run_forgets_the_one_before(program):
    rng = np.random.default_rng(1)
    for machine in MACHINES:
        for ticks in (*range(1, 30), 100):
            broken = random_job(rng, machine, "SOFTMAX", 20, "special")
            broken.abort, broken.best, broken.rate = ticks, (0x4000, 7), 128
            after = random_job(rng, machine, "RMSNORM", 20, "tame")
            after.best = None
            stopped, done = play(program, [broken, after])
            assert (stopped["wrong"], stopped["value"], stopped["index"]) == (0, 0x4000, 7)
            np.testing.assert_array_equal(done["sram"], image(after))
            assert done["cycles"] == cycles(after)


@pytest.mark.parametrize(
    ("op", "fields", "message"),
    [
        ("RELU", {"src": 239, "dst": 0, "n": 3}, "a group is read beyond the SRAM"),
        ("RELU", {"src": 0, "dst": 239, "n": 3}, "a group is written beyond the SRAM"),
        ("RELU", {"src": 0, "dst": 0, "n": 0}, "a vector without elements"),
        ("RD_MAC", {"dst": 0}, "an operation without microprogram"),
    ],
)
def test_what_fails_an_assertion(program, op, fields, message):
    job = Job(MACHINES[0], op, ZEROS, fields).record().tobytes()
    done = subprocess.run([program], input=job, capture_output=True, check=False)
    assert done.returncode != 0 and message in (done.stdout + done.stderr).decode(errors="replace")
    # The last column that there is, with one element in it.
    assert play(program, [Job(MACHINES[0], "RELU", ZEROS, {"src": 239, "dst": 239, "n": 1})])["wrong"] == 0
