"""The companion ASIC's vector unit: executes the microprograms of `arch.pim_asic`."""

import numpy as np
from amaranth.hdl import Assert, Cat, Const, EnableInserter, Module, Mux, ResetInserter, Signal, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out

from tilewright.arch.formats import BF16, FP32
from tilewright.arch.pim import ISA, OP, OPS, PimParams
from tilewright.arch.pim_asic import (
    FIELDS,
    SCALARS,
    TOTALS,
    VECTORS,
    AsicSection,
    microprograms,
    passes,
)
from tilewright.rtl.layouts import layout_of
from tilewright.rtl.lib.fp import FpCompare, FpConvert
from tilewright.rtl.pim.asic_lane import FIRST, JOIN, SECOND, WIDTH, ArgMaximum, Lane, Tree, delay
from tilewright.rtl.pim.bus import bits_for_count

SOURCE = ("", "memory", *VECTORS, *SCALARS, *TOTALS, *FIELDS)  # an operand's; "" is its constant
TARGET = ("", "memory", *VECTORS, *SCALARS)
LOAD = ("", "src", "src2", "src3", "dst")

ARGMAX = data.StructLayout({"value": unsigned(BF16.width), "index": unsigned(32)})


class Rom:
    """The microprograms as words of a read-only memory, one for each step, operation after operation.

    Attributes
    ----------
    layout : StructLayout
        A step's fields as `arch.pim_asic.Step` names them, the index of a name instead of the name; and those
        of its block: `head` is the block's first word, `last` marks its last step, `final` the last of the
        operation's last block, `interval` and `tail` are those of `arch.pim_asic.Passes`.
    words : list of dict
    begin : dict of str to int
        First word of each operation.
    """

    def __init__(self, asic: AsicSection, lanes: int):
        self.words: list[dict] = []
        self.begin: dict[str, int] = {}
        timing = passes(asic, lanes)
        for name, blocks in microprograms(asic).items():
            self.begin[name] = len(self.words)
            for block, times in zip(blocks, timing[name], strict=True):
                head = len(self.words)
                for step in block.steps:
                    self.words.append(
                        {
                            **{name: self._operand(getattr(step, name)) for name in "abc"},
                            "first": FIRST.index(step.first),
                            "negate": step.negate,
                            "second": SECOND.index(step.second),
                            "swap": step.swap,
                            "load": LOAD.index(step.load),
                            "to": TARGET.index(step.to),
                            "join": JOIN.index(step.join),
                            "adds": step.adds,
                            "multiplies": step.multiplies,
                            "scalar": block.scalar,
                            "head": head,
                            "last": 0,
                            "final": 0,
                            "interval": 1,
                            "tail": times.tail,
                        }
                    )
                self.words[-1] |= {"last": 1, "interval": times.interval}
            self.words[-1]["final"] = 1

        operand = data.StructLayout({"source": range(len(SOURCE)), "constant": WIDTH})
        numbers = ("adds", "multiplies", "head", "interval", "tail")
        self.layout = data.StructLayout(
            {
                **dict.fromkeys("abc", operand),
                "first": range(len(FIRST)),
                "second": range(len(SECOND)),
                "load": range(len(LOAD)),
                "to": range(len(TARGET)),
                "join": range(len(JOIN)),
                **dict.fromkeys(("negate", "swap", "scalar", "last", "final"), 1),
                **{name: range(max(word[name] for word in self.words) + 1) for name in numbers},
            }
        )

    @staticmethod
    def _operand(text: str) -> dict:
        if text in SOURCE:
            return {"source": SOURCE.index(text), "constant": 0}
        return {"source": 0, "constant": int(np.float32(text).view(np.uint32))}


class VectorUnit(wiring.Component):
    """Lanes with their registers, the joins behind them, and the sequencer that issues steps group by group.

    A group takes the same way in every step, m and a being the latencies of multiplier and adder:

        cycle   0        1           1 + m    1 + m + a
                issue    multiply    add      write, join

    Addresses go out at issue, and operands are there a cycle later. What is written can be asked for in the next
    cycle, a running total after the tree's latency.

    The unit works in ticks with `enable`, and keeps all its state in others. The first group issues in the first
    such tick after `start`; an operation takes the cycles that `arch.pim_asic.Passes` gives. An active element
    beyond the SRAM, or an operation without microprogram, fails an assertion.

    Parameters
    ----------
    params : PimParams
        Sizes and latencies.
    asic : AsicSection
        What the microprograms are made of.

    Members
    -------
    ============= === =============== =================================================================
    clear         In  1               a run begins: forget everything, the best so far is `argmax_init`
    enable        In  1               the ASIC's clock domain works in this tick
    start         In  1               with `enable`: begin `instruction` in the next such tick
    instruction   In  record          stays until the unit is done
    busy          Out 1               an instruction executes
    read_enable   Out 1               read this tick; what is read stays until the next read
    read_address  Out                 SRAM column of the group's first element
    read_data     In  columns         the columns of a group, or the one that it is a part of
    write_enable  Out lanes           which elements of the columns from `write_address` on are written
    write_address Out                 SRAM column of the group's first element
    write_data    Out columns         bfloat16, as all elements of the SRAM
    adds          Out                 additions and comparisons that issue in this tick
    multiplies    Out                 multiplications
    argmax_init   In  (value, index)  the best so far of earlier runs, bfloat16 and index
    argmax        Out (value, index)  the best so far
    ============= === =============== =================================================================
    """

    def __init__(self, *, params: PimParams, asic: AsicSection):
        self._params, self._asic = params, asic
        s = params.vector_lanes
        self._rom = Rom(asic, s)
        self._width = max(s, params.lanes)  # elements of the columns that a group lies in
        address = bits_for_count(params.sram_columns)
        counts = {n: max(w[n] for w in self._rom.words) * s for n in ("adds", "multiplies")}
        super().__init__(
            {
                "clear": In(1),
                "enable": In(1),
                "start": In(1),
                "instruction": In(layout_of(ISA.record("code"))),
                "busy": Out(1),
                "read_enable": Out(1),
                "read_address": Out(address),
                "read_data": In(self._width * BF16.width),
                "write_enable": Out(self._width),
                "write_address": Out(address),
                "write_data": Out(self._width * BF16.width),
                "adds": Out(range(counts["adds"] + 1)),
                "multiplies": Out(range(counts["multiplies"] + 1)),
                "argmax_init": In(ARGMAX),
                "argmax": Out(ARGMAX),
            }
        )

    def elaborate(self, platform):
        m = Module()
        unit = Module()  # all that knows no other ticks than the domain's
        m.submodules.unit = ResetInserter(self.clear)(EnableInserter(self.enable)(unit))
        p, a = self._params, self._asic
        lanes = range(p.vector_lanes)
        latency = a.multiplier_latency_cycles + a.adder_latency_cycles
        assert latency + 2 == p.step_latency

        issued, issued_step = self._issue(unit)
        asked, step = Signal.like(issued), Signal.like(issued_step)  # a cycle later: the operands are there
        unit.d.sync += [asked.eq(issued), step.eq(issued_step)]
        done = delay(unit, asked, latency, name="done", reset_less=False)

        # Registers: a row of each vector register is read whole, and written whole, whatever lanes are active.
        read, write = {}, {}
        for name in VECTORS:
            unit.submodules[name] = memory = Memory(
                shape=unsigned(WIDTH * len(lanes)), depth=p.register_rows, init=[]
            )
            read[name], write[name] = memory.read_port(), memory.write_port()
            unit.d.comb += [read[name].en.eq(issued.valid), read[name].addr.eq(issued.row)]
        scalars = {name: Signal(WIDTH, name=name) for name in SCALARS}
        unit.submodules.tree = tree = Tree(lanes=len(lanes), latency=a.adder_latency_cycles)

        common = {
            **scalars,
            **{name: getattr(tree, name) for name in TOTALS},
            **{name: self.instruction[name] for name in FIELDS},
        }
        own = {name: read[name].data for name in VECTORS}
        operands = self._operands(unit, step, asked.part, own, common)

        # Results.
        results, stored = [], []
        for i in lanes:
            unit.submodules[f"lane_{i}"] = lane = Lane(
                multiply_latency=a.multiplier_latency_cycles, add_latency=a.adder_latency_cycles
            )
            unit.submodules[f"round_{i}"] = rounded = FpConvert(source=FP32, result=BF16)
            unit.d.comb += [
                lane.first.eq(step.first),
                lane.negate.eq(step.negate),
                lane.second.eq(step.second),
                *(getattr(lane, x).eq(operands[x][i]) for x in "abc"),
                rounded.a.eq(lane.o),
            ]
            results.append(lane.o)
            stored.append(rounded.o)
        active = Signal(len(lanes))
        unit.d.comb += active.eq(Cat(i < done.count for i in lanes))

        # Where they go.
        for name in VECTORS:
            unit.d.comb += [
                write[name].en.eq(done.valid & (done.to == TARGET.index(name))),
                write[name].addr.eq(done.row),
                write[name].data.eq(Cat(results)),
            ]
        for name, scalar in scalars.items():
            with unit.If(done.valid & (done.to == TARGET.index(name))):
                unit.d.sync += scalar.eq(results[0])
        store = self.enable & done.valid & (done.to == TARGET.index("memory"))
        joins = {name: done.valid & (done.join == JOIN.index(name)) for name in JOIN}
        unit.submodules.best = best = ArgMaximum(lanes=len(lanes), latency=a.adder_latency_cycles)
        unit.d.comb += [
            self.write_enable.eq(Mux(store, active, 0) << done.part * len(lanes)),
            self.write_address.eq(done.column),
            self.write_data.eq(Cat(stored).replicate(self._width // len(lanes))),
            tree.valid.eq(joins["sum"] | joins["top"]),
            tree.maximum.eq(joins["top"]),
            tree.fresh.eq(done.fresh),
            tree.active.eq(active),
            best.valid.eq(joins["best"]),
            best.first.eq(done.index),
            best.active.eq(active),
        ]
        unit.d.comb += [port.eq(x) for port, x in zip(tree.elements, results, strict=True)]
        unit.d.comb += [port.eq(x) for port, x in zip(best.elements, stored, strict=True)]

        # The best so far outlives instructions, and a run may begin in any tick.
        m.submodules.compare = compare = FpCompare(format=BF16)
        m.d.comb += [compare.a.eq(self.argmax.value), compare.b.eq(best.value)]
        with m.If(self.clear):
            m.d.sync += self.argmax.eq(self.argmax_init)
        with m.Elif(self.enable & self.start & _has(self.instruction, "clear") & self.instruction.clear):
            m.d.sync += [
                self.argmax.value.eq(BF16.sign | BF16.overflow),
                self.argmax.index.eq(self.instruction.imm),
            ]
        with m.Elif(self.enable & best.found & compare.lt):
            m.d.sync += [self.argmax.value.eq(best.value), self.argmax.index.eq(best.index)]
        return m

    def _operands(self, m, step, part, own, common):
        """The operands a, b and c of every lane; `own` has registers of all lanes, `common` single values."""
        lanes = range(self._params.vector_lanes)
        loaded = Signal(len(lanes) * BF16.width)
        m.d.comb += loaded.eq(self.read_data.word_select(part, len(loaded)))
        operands = {}
        for x in "abc":
            shared = _choose(m, step[x], common, step[x].constant, name=f"shared_{x}")
            operands[x] = []
            for i in lanes:
                values = {name: register.word_select(i, WIDTH) for name, register in own.items()}
                values["memory"] = Cat(Const(0, WIDTH - BF16.width), loaded.word_select(i, BF16.width))
                operands[x].append(_choose(m, step[x], values, shared, name=f"{x}_{i}"))
        operands["a"] = [Mux(step.swap, operands["a"][i ^ 1], operands["a"][i]) for i in lanes]
        return operands

    def _issue(self, m):
        """The sequencer: the group that issues in this cycle, and its step."""
        p, i, rom = self._params, self.instruction, self._rom
        s, rows = p.vector_lanes, p.register_rows
        m.submodules.rom = memory = Memory(shape=rom.layout, depth=len(rom.words), init=rom.words)
        port = memory.read_port(domain="comb")
        step, word = port.data, port.addr
        begin = Signal.like(word)
        with m.Switch(i.op):
            for name, first in rom.begin.items():
                with m.Case(OP[name]):
                    m.d.comb += begin.eq(first)

        position = Signal.like(word)
        vectors, offset = Signal(16), Signal(32)  # vectors to come, SRAM columns from the first to this one
        strip = Signal(len(i.n))  # groups before this strip
        # The strip's group; it counts on while the result of the first is waited for.
        group = Signal(range(max(rows, p.step_latency)))
        phase = Signal(range(max(w["interval"] for w in rom.words)))  # cycles since the group issued
        past = Signal()  # the step's last group has issued
        wait = Signal.like(step.tail)  # for the results of a block
        number, left = Signal.like(i.n), Signal.like(i.n)
        issues, ends, last, advance = Signal(), Signal(), Signal(), Signal()
        m.d.comb += [
            word.eq(position),
            number.eq(strip + group),
            left.eq(Mux(step.scalar, 1, i.n) - number * s),
            issues.eq(self.busy & (wait == 0) & (phase == 0) & ~past),
            ends.eq(left <= s),
            last.eq(ends | (group == rows - 1)),
            advance.eq(phase == step.interval - 1),
        ]
        with m.If(~self.busy):
            with m.If(self.start):
                m.d.sync += [
                    self.busy.eq(1),
                    position.eq(begin),
                    vectors.eq(Mux(_has(i, "outs"), i.outs, 1)),
                    offset.eq(0),
                ]
        with m.Elif(wait != 0):
            m.d.sync += wait.eq(wait - 1)
            with m.If(wait == 1):
                m.d.sync += strip.eq(0)
                with m.If(~step.final):
                    m.d.sync += position.eq(position + 1)
                with m.Elif(vectors > 1):
                    m.d.sync += [position.eq(begin), vectors.eq(vectors - 1), offset.eq(offset + i.pitch)]
                with m.Else():
                    m.d.sync += self.busy.eq(0)
        with m.Elif(~advance):
            m.d.sync += phase.eq(phase + 1)
        with m.Elif((past | last) & (step.last | (group >= p.step_latency - 1))):
            m.d.sync += [phase.eq(0), group.eq(0), past.eq(0)]
            with m.If(~step.last):
                m.d.sync += position.eq(position + 1)
            with m.Elif(~ends):
                m.d.sync += [position.eq(step.head), strip.eq(strip + rows)]
            with m.Else():
                m.d.sync += wait.eq(step.tail)
        with m.Else():
            m.d.sync += [phase.eq(0), group.eq(group + 1), past.eq(past | last)]

        # Where the group lies. Of a vector's groups each is some columns, or some share one.
        shares = max(p.lanes // s, 1)
        column, part = number * (s // p.lanes), 0
        if shares > 1:
            column, part = number // shares, number % shares
        bases = {"src": i.src + offset, "src2": i.src2, "src3": i.src3, "dst": i.dst + offset}
        source, target = Signal(34), Signal(34)
        with m.Switch(step.load):
            for name, base in bases.items():
                with m.Case(LOAD.index(name)):
                    m.d.comb += source.eq(base + column)
        m.d.comb += target.eq(bases["dst"] + column)

        issued = Signal(
            data.StructLayout(
                {
                    "valid": 1,
                    "row": range(rows),
                    "count": range(s + 1),  # active elements
                    "fresh": 1,  # the block's first
                    "index": 32,  # of the first element, counted from the instruction's immediate
                    "part": range(shares),  # of the column
                    "column": self.write_address.shape(),
                    "to": range(len(TARGET)),
                    "join": range(len(JOIN)),
                }
            )
        )
        loads = issues & (step.load != 0)
        m.d.comb += [
            issued.valid.eq(issues),
            issued.row.eq(group),
            issued.count.eq(Mux(ends, left, s)),
            issued.fresh.eq(number == 0),
            issued.index.eq(i.imm + number * s),
            issued.part.eq(part),
            issued.column.eq(target),
            issued.to.eq(step.to),
            issued.join.eq(step.join),
            self.read_enable.eq(self.enable & loads),
            self.read_address.eq(source),
            self.adds.eq(Mux(self.enable & issues, issued.count * step.adds, 0)),
            self.multiplies.eq(Mux(self.enable & issues, issued.count * step.multiplies, 0)),
        ]
        beyond = (issued.count - 1)[: len(issued.count)] // p.lanes  # columns to the last active element's
        stores = issues & (step.to == TARGET.index("memory"))
        known = Cat(i.op == OP[name] for name in rom.begin).any()
        m.d.sync += [
            Assert(~self.start | ~self.busy, "the vector unit is started while it is busy"),
            Assert(~self.start | known, "an operation without microprogram"),
            Assert(~self.start | (i.n != 0), "a vector without elements"),
            Assert(~loads | (source + beyond < p.sram_columns), "a group is read beyond the SRAM"),
            Assert(~stores | (target + beyond < p.sram_columns), "a group is written beyond the SRAM"),
        ]
        return issued, step


def _choose(m, operand, values, default, *, name):
    """The value that the operand's source names, of those in `values`."""
    out = Signal(WIDTH, name=name)
    with m.Switch(operand.source):
        for source, value in values.items():
            with m.Case(SOURCE.index(source)):
                m.d.comb += out.eq(value)
        with m.Default():
            m.d.comb += out.eq(default)
    return out


def _has(instruction, field):
    """Whether the instruction's operation has this field."""
    return Cat(instruction.op == k for k, op in enumerate(OPS) if field in op.fields).any()
