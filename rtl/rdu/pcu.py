"""The compute unit: header, body and tail."""

from amaranth.hdl import Array, Assert, Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from tilewright.arch.formats import BF16, FP32
from tilewright.arch.rdu import (
    CAUSE,
    CONFIG_PCU,
    CONFIG_STAGE,
    FOLDS,
    FUNCTIONS,
    HEADER,
    INPUTS,
    LEVELS,
    MODES,
    OPERANDS,
    SEQUENCE_BITS,
    TAIL,
    TOKENS,
    WORD_BITS,
    RduParams,
    simd_latency,
    systolic_fill,
    tail_latency,
)
from tilewright.rtl.layouts import layout_of
from tilewright.rtl.lib.fp import FpAdd, FpConvert, FpMultiply
from tilewright.rtl.rdu.chain import CounterChain, chain_of, event
from tilewright.rtl.rdu.function import Function
from tilewright.rtl.rdu.lane import JOINS, OP, LaneOp
from tilewright.rtl.rdu.packet import packet_layout
from tilewright.rtl.rdu.shared import SharedModule

__all__ = ["Pcu"]

MODE = {name: i for i, name in enumerate(MODES)}
FOLD = {name: i for i, name in enumerate(FOLDS)}
FROM = {name: i for i, name in enumerate(OPERANDS)}


class _Move:
    """The flags that go with what moves through a pipeline."""

    def __init__(self, name: str, width: int):
        self.data = Signal(width, name=f"{name}_data")
        self.valid = Signal(name=f"{name}_valid")
        self.first = Signal(name=f"{name}_first")  # of an accumulation
        self.final = Signal(name=f"{name}_final")  # of it
        self.last = Signal(name=f"{name}_last")  # flag of the packet

    def signals(self):
        return (self.data, self.valid, self.first, self.final, self.last)


class Pcu(wiring.Component):
    """A PCU: in each iteration a word of every input in use for every lane goes in.

    The header takes an iteration when every input in use holds a packet, its counter chain is ready and the body
    moves; an input is popped at the last iteration of its level. The body is one of

    - the SIMD pipeline: `stages` operations on the registers of a lane, then, if configured, lane-wise accumulation
      (first value as it is, then acc = fold(acc, value), a result at the last iteration of ``fold_level``) and a
      tree (adjacent lanes first, level by level; all lanes take the result);
    - the systolic array, which keeps its sums in place: acc[r][c] = a[r] * b[c], then acc + a[r] * b[c], for
      vector inputs 0 (a, a word for each row) and 1 (b, for each column). Words are bfloat16, their lower halves
      ignored; products and sums float32. At the last iteration of ``fold_level`` the sums are copied, and leave
      column by column while the next tile accumulates.

    The tail gives what the body gives, or a special function of it, `arch.rdu.tail_latency` ticks later; multiplies
    that, if it is `gated`, by what the register `gate` held behind the last stage, `op_latency` ticks later (SIMD
    without fold and tree only); rounds to bfloat16 where asked to; and holds the packet until it has left by every
    output in use. What can't leave stops the tail and the whole SIMD pipeline, or the drain of the array; the array
    itself stops when a tile ends while the one before is still leaving. Latencies are `arch.rdu.simd_latency` and
    `systolic_fill`. Tokens go out with the iteration that raises them. An accumulation of latency n takes an
    iteration every n ticks.

    Parameters
    ----------
    params : RduParams

    Members
    -------
    ========== === ============================= ==========================================================
    start      In  1                             a run begins; the unit must be done
    config     In  layout_of(CONFIG_PCU)         constant from `start` to `done`
    stage      In  array(layout_of(CONFIG_STAGE)) likewise, one for each stage
    vector_i   In  stream of packets             vector input i
    scalar_i   In  stream of packets of a word   scalar input i
    vector     Out stream of packets             vector output
    scalar     Out stream of packets of a word   scalar output: lane 0
    tokens     In  TOKENS                        control inputs
    signal     Out TOKENS                        control outputs
    done       Out 1                             nothing is left to do, or under way
    activity   Out 4                             0 is busy: an iteration is taken; n is CAUSES[n - 1]
    ========== === ============================= ==========================================================
    """

    def __init__(self, *, params: RduParams):
        p = self._params = params
        vector, scalar = (stream.Signature(packet_layout(n)) for n in (p.lanes, 1))
        super().__init__(
            {
                "start": In(1),
                "config": In(layout_of(CONFIG_PCU)),
                "stage": In(data.ArrayLayout(layout_of(CONFIG_STAGE), p.stages)),
                **{f"vector_{i}": In(vector) for i in range(p.vector_inputs)},
                **{f"scalar_{i}": In(scalar) for i in range(p.scalar_inputs)},
                "vector": Out(vector),
                "scalar": Out(scalar),
                "tokens": In(TOKENS),
                "signal": Out(TOKENS),
                "done": Out(1),
                "activity": Out(unsigned(4)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        p, c = self._params, self.config
        width = p.lanes * WORD_BITS
        simd, systolic = c.mode == MODE["simd"], c.mode == MODE["systolic"]
        folds = c.fold != FOLD["none"]

        # ---- header
        m.submodules.chain = chain = CounterChain(levels=p.counters)
        loops = chain_of(m, c)
        m.d.comb += [
            chain.start.eq(self.start & (c.mode != MODE["off"])),
            chain.config.eq(loops),
            chain.tokens.eq(self.tokens),
            self.signal.eq(chain.signal),
        ]
        if p.op_latency > 1:
            with m.If(simd & folds & (c.interval < p.op_latency)):
                m.d.comb += chain.config.interval.eq(p.op_latency)
        step, stopped, full, draining = Signal(), Signal(), Signal(), Signal()
        empty = Signal()
        inputs = [
            (getattr(self, f"{kind}_{i}"), mask[i], getattr(c, f"{kind}{i}_level"))
            for kind, mask, count in (
                ("vector", c.vectors, p.vector_inputs),
                ("scalar", c.scalars, p.scalar_inputs),
            )
            for i in range(count)
        ]
        m.d.comb += [
            empty.eq(Cat(used & ~port.valid for port, used, _ in inputs).any()),
            stopped.eq(Mux(systolic, draining, full)),
            step.eq(chain.ready & ~empty & ~stopped),
            chain.step.eq(step),
        ]
        for port, used, level in inputs:
            m.d.comb += port.ready.eq(step & used & event(chain.last, level))

        # ---- output: what body and tail give, and when they may move
        gives, gate = _Move("gives", width), Signal(width)
        leaves = _Move("leaves", width)
        held = _Move("held", width)
        sent_vector, sent_scalar = Signal(), Signal()
        left_vector, left_scalar = Signal(), Signal()
        m.d.comb += [
            self.vector.valid.eq(held.valid & c.send_vector & ~sent_vector),
            self.scalar.valid.eq(held.valid & c.send_scalar & ~sent_scalar),
            left_vector.eq(~c.send_vector | sent_vector | self.vector.ready),
            left_scalar.eq(~c.send_scalar | sent_scalar | self.scalar.ready),
            full.eq(held.valid & ~(left_vector & left_scalar)),
        ]
        sequence = Signal(SEQUENCE_BITS)
        with m.If(self.start):
            m.d.sync += sequence.eq(c.sequence)
        with m.Elif(held.valid & ~full):
            m.d.sync += sequence.eq(sequence + c.sequence_step)
        with m.If(full):
            m.d.sync += [
                sent_vector.eq(sent_vector | (self.vector.valid & self.vector.ready)),
                sent_scalar.eq(sent_scalar | (self.scalar.valid & self.scalar.ready)),
            ]
        with m.Else():
            m.d.sync += [held.valid.eq(leaves.valid), held.last.eq(leaves.last)]
            m.d.sync += [sent_vector.eq(0), sent_scalar.eq(0)]
        for lane in range(p.lanes):
            m.submodules[f"round_{lane}"] = rounding = FpConvert(source=FP32, result=BF16)
            word = leaves.data.word_select(lane, WORD_BITS)
            m.d.comb += rounding.a.eq(word)
            with m.If(~full):
                m.d.sync += held.data.word_select(lane, WORD_BITS).eq(
                    Mux(c.round, Cat(Const(0, WORD_BITS - BF16.width), rounding.o), word)
                )
        for port, flow, words in ((self.vector, c.flow, width), (self.scalar, c.scalar_flow, WORD_BITS)):
            m.d.comb += [
                port.payload.data.as_value().eq(held.data[:words]),
                port.payload.flow.eq(flow),
                port.payload.sequence.eq(sequence),
                port.payload.last.eq(held.last),
            ]

        # ---- body
        under_way = [held.valid]
        result, stirs = self._simd(m, chain, step & simd, ~full, gate)
        under_way += stirs
        with m.If(simd):
            for to, value in zip(gives.signals(), result.signals(), strict=True):
                m.d.comb += to.eq(value)
        if p.systolic:
            column, stirs = self._systolic(m, chain, step & systolic, ~full, draining)
            under_way += stirs
            with m.If(systolic):
                for to, value in zip(gives.signals(), column.signals(), strict=True):
                    m.d.comb += to.eq(value)
        else:
            m.d.sync += Assert(~(self.start & systolic), "there is no systolic array")
        tail, stirs = self._tail(m, gives, gate, ~full)
        under_way += stirs
        for to, value in zip(leaves.signals(), tail.signals(), strict=True):
            m.d.comb += to.eq(value)
        alone = ~folds & (c.tree == FOLD["none"])
        m.d.sync += Assert(
            ~(self.start & c.gated & ~(simd & alone)), "a gate goes with SIMD mode without fold and tree"
        )

        busy = Signal()
        m.d.comb += [busy.eq(Cat(under_way).any()), self.done.eq(~chain.running & ~busy)]
        with m.If(step):
            m.d.comb += self.activity.eq(0)
        for cause, condition in (
            ("output", full & (stopped | ~chain.running)),
            ("drain", draining),
            ("token", chain.missing),
            ("operand", chain.running & empty),
            ("interval", chain.pausing),
            ("pipeline", busy),
        ):
            with m.Elif(condition):
                m.d.comb += self.activity.eq(CAUSE[cause])
        with m.Else():
            m.d.comb += self.activity.eq(CAUSE["idle"])
        m.d.sync += Assert(~(self.start & ~self.done), "a run begins before the last has ended")
        return m

    def _later(self, m, move, before, name, ticks):
        """What `before` was, `ticks` movements ago; and the valid bits in between."""
        flags = []
        for k in range(ticks):
            after = _Move(f"{name}_{k}", len(before.data))
            with m.If(move):
                m.d.sync += [
                    to.eq(value) for to, value in zip(after.signals(), before.signals(), strict=True)
                ]
            flags.append(after.valid)
            before = after
        return before, flags

    def _tail(self, m, gives, gate, move):
        """What `gives` is behind function and gate, and the valid bits within."""
        p, c, word = self._params, self.config, WORD_BITS
        latencies = [tail_latency(p, f) for f in range(len(FUNCTIONS))]

        # What goes with the words, and the gate, wait as long as the function takes: they join a delay line there.
        def joined(name, behind, condition):
            out = _Move(name, len(gate))
            m.d.comb += [to.eq(value) for to, value in zip(out.signals(), behind, strict=True)]
            with m.If(condition):
                m.d.comb += [out.data.eq(gate), out.valid.eq(gives.valid), out.last.eq(gives.last)]
            return out

        stirs = []
        beside, behind = None, [0] * 5
        for left in reversed(range(max(latencies) + 1)):
            at = [f for f, ticks in enumerate(latencies) if ticks == left]
            beside = joined(f"beside_{left}", behind, Cat(c.function == f for f in at).any())
            if left:
                later, flags = self._later(m, move, beside, f"beside_{left}", 1)
                stirs += flags
                behind = later.signals()
        done = _Move("function", len(gate))
        m.d.comb += [done.valid.eq(beside.valid), done.last.eq(beside.last)]
        product = _Move("product", len(gate))
        m.d.comb += [product.valid.eq(done.valid & c.gated), product.last.eq(done.last)]
        for lane in range(p.lanes):
            m.submodules[f"function_{lane}"] = function = SharedModule(Function, params=p)
            m.submodules[f"gate_{lane}"] = multiply = FpMultiply(source=FP32, result=FP32)
            m.d.comb += [
                function.function.eq(c.function),
                function.move.eq(move),
                function.i.eq(gives.data.word_select(lane, word)),
                done.data.word_select(lane, word).eq(function.o),
                multiply.a.eq(function.o),
                multiply.b.eq(beside.data.word_select(lane, word)),
                product.data.word_select(lane, word).eq(multiply.o),
            ]
        gated, flags = self._later(m, move, product, "gated", p.op_latency)
        return self._chosen(m, "tail", c.gated, gated, done), [*stirs, *flags]

    def _chosen(self, m, name, condition, yes, no):
        out = _Move(name, len(yes.data))
        for to, a, b in zip(out.signals(), yes.signals(), no.signals(), strict=True):
            m.d.comb += to.eq(Mux(condition, a, b))
        return out

    def _simd(self, m, chain, step, move, gate):
        """The pipeline's results, and the valid bits within; drives `gate` with the register of that name."""
        p, c = self._params, self.config
        registers = p.registers
        word, lanes = WORD_BITS, range(p.lanes)
        row = registers * word
        stirs = []

        # Counter values travel along; every lane has its registers side by side.
        loops = LEVELS * len(chain.counters[0])
        enter = _Move("enter", p.lanes * row + loops)
        for i in range(p.vector_inputs):
            with m.If(c.vectors[i]):  # other registers begin as 0
                for lane in lanes:
                    word_of = getattr(self, f"vector_{i}").payload.data[lane]
                    m.d.comb += enter.data.word_select(lane * registers + i, word).eq(word_of)
        for i in range(p.scalar_inputs):
            with m.If(c.scalars[i]):
                for lane in lanes:
                    word_of = getattr(self, f"scalar_{i}").payload.data[0]
                    m.d.comb += enter.data.word_select(lane * registers + INPUTS + i, word).eq(word_of)
        m.d.comb += [
            enter.data[p.lanes * row :].eq(chain.counters.as_value()),
            enter.valid.eq(step),
            enter.first.eq(event(chain.first, c.fold_level)),
            enter.final.eq(event(chain.last, c.fold_level)),
            enter.last.eq(event(chain.last, c.last_level)),
        ]
        now, flags = self._later(m, move, enter, "header", HEADER)
        stirs += flags

        for s in range(p.stages):
            stage = self.stage[s]
            after = _Move(f"stage_{s}", len(now.data))
            for to, value in zip(after.signals()[1:], now.signals()[1:], strict=True):
                m.d.comb += to.eq(value)
            m.d.comb += after.data.eq(now.data)
            counters = data.ArrayLayout(unsigned(loops // LEVELS), LEVELS)(now.data[p.lanes * row :])
            for lane in lanes:
                own = Array(now.data.word_select(lane * registers + r, word) for r in range(registers))
                m.submodules[f"stage_{s}_{lane}"] = unit = LaneOp()
                m.d.comb += [
                    unit.operation.eq(stage.operation),
                    unit.type.eq(stage.type),
                    unit.choose.eq(own[stage.c] != 0),
                ]
                for to, kind, index in ((unit.a, stage.a_from, stage.a), (unit.b, stage.b_from, stage.b)):
                    with m.Switch(kind):
                        with m.Case(FROM["register"]):
                            m.d.comb += to.eq(own[index])
                        with m.Case(FROM["constant"]):
                            m.d.comb += to.eq(stage.constant)
                        with m.Case(FROM["counter"]):
                            m.d.comb += to.eq(Array(counters[n] for n in range(LEVELS))[index])
                        with m.Case(FROM["lane"]):
                            m.d.comb += to.eq(lane)
                for r in range(registers):
                    with m.If(stage.to == r):
                        m.d.comb += after.data.word_select(lane * registers + r, word).eq(unit.o)
            now, flags = self._later(m, move, after, f"stage_{s}", p.op_latency)
            stirs += flags

        results = _Move("results", p.lanes * word)
        for to, value in zip(results.signals()[1:], now.signals()[1:], strict=True):
            m.d.comb += to.eq(value)
        for lane in lanes:
            own = Array(now.data.word_select(lane * registers + r, word) for r in range(registers))
            m.d.comb += [
                results.data.word_select(lane, word).eq(own[c.result]),
                gate.word_select(lane, word).eq(own[c.gate]),
            ]

        def joined(name, how, a, b):
            m.submodules[name] = unit = LaneOp(operations=JOINS)
            m.d.comb += [unit.type.eq(c.fold_type), unit.a.eq(a), unit.b.eq(b)]
            with m.Switch(how):
                for fold in JOINS:
                    with m.Case(FOLD[fold]):
                        m.d.comb += unit.operation.eq(OP[fold])
            return unit.o

        # Lane-wise accumulation: what leaves is the sum so far, and only the last of its level is valid.
        folds = c.fold != FOLD["none"]
        total = Signal(p.lanes * word)
        summed = _Move("summed", p.lanes * word)
        m.d.comb += [
            summed.valid.eq(results.valid & results.final & folds),
            summed.last.eq(results.last),
        ]
        for lane in lanes:
            value = results.data.word_select(lane, word)
            join = joined(f"fold_{lane}", c.fold, total.word_select(lane, word), value)
            m.d.comb += summed.data.word_select(lane, word).eq(Mux(results.first, value, join))
        with m.If(move & results.valid):
            m.d.sync += total.eq(summed.data)
        folded, flags = self._later(m, move, summed, "fold", p.op_latency)
        stirs += flags

        now = self._chosen(m, "single", folds, folded, results)
        levels = p.lanes.bit_length() - 1
        trees = c.tree != FOLD["none"]
        branch = _Move("branch", p.lanes * word)
        m.d.comb += [
            branch.data.eq(now.data),
            branch.valid.eq(now.valid & trees),
            branch.last.eq(now.last),
        ]
        for depth in range(levels):
            count = p.lanes >> depth + 1
            after = _Move(f"level_{depth}", count * word)
            m.d.comb += [after.valid.eq(branch.valid), after.last.eq(branch.last)]
            for i in range(count):
                pair = (branch.data.word_select(2 * i + k, word) for k in range(2))
                m.d.comb += after.data.word_select(i, word).eq(joined(f"tree_{depth}_{i}", c.tree, *pair))
            branch, flags = self._later(m, move, after, f"tree_{depth}", p.op_latency)
            stirs += flags
        spread = _Move("spread", p.lanes * word)
        for to, value in zip(spread.signals()[1:], branch.signals()[1:], strict=True):
            m.d.comb += to.eq(value)
        m.d.comb += spread.data.eq(branch.data[:word].replicate(p.lanes))
        assert simd_latency(p) == HEADER + p.stages * p.op_latency + TAIL
        return self._chosen(m, "body", trees, spread, now), stirs

    def _systolic(self, m, chain, step, move, draining):
        """The columns that leave the array, and the valid bits within."""
        p, c = self._params, self.config
        rows, columns, word = p.lanes, p.stages, WORD_BITS
        half = BF16.width
        hold = Signal()

        # The header broadcasts a along the rows and b along the columns.
        enter = _Move("broadcast", (rows + columns) * half)
        a, b = self.vector_0.payload.data, self.vector_1.payload.data
        m.d.comb += [
            enter.data.eq(Cat(*(a[r][-half:] for r in range(rows)), *(b[k][-half:] for k in range(columns)))),
            enter.valid.eq(step),
            enter.first.eq(event(chain.first, c.fold_level)),
            enter.final.eq(event(chain.last, c.fold_level)),
            enter.last.eq(event(chain.last, c.last_level)),
        ]
        now, stirs = self._later(m, ~hold, enter, "array_header", HEADER)
        after = _Move("products", rows * columns * word)
        for to, value in zip(after.signals()[1:], now.signals()[1:], strict=True):
            m.d.comb += to.eq(value)
        for r in range(rows):
            for k in range(columns):
                m.submodules[f"multiply_{r}_{k}"] = unit = FpMultiply(source=BF16, result=FP32)
                m.d.comb += [
                    unit.a.eq(now.data.word_select(r, half)),
                    unit.b.eq(now.data.word_select(rows + k, half)),
                    after.data.word_select(k * rows + r, word).eq(unit.o),
                ]
        products, flags = self._later(m, ~hold, after, "array", p.op_latency)
        stirs += flags

        sums = Signal(rows * columns * word)
        totals = Signal.like(sums)
        for i in range(rows * columns):
            m.submodules[f"accumulate_{i}"] = unit = FpAdd(format=FP32)
            product = products.data.word_select(i, word)
            m.d.comb += [
                unit.a.eq(sums.word_select(i, word)),
                unit.b.eq(product),
                totals.word_select(i, word).eq(Mux(products.first, product, unit.o)),
            ]
        # A finished tile moves beside the sums, from where its columns leave.
        tile = Signal.like(sums)
        left = Signal(range(columns + 1))
        last = Signal()
        column = _Move("column", rows * word)
        finishes = products.valid & products.final
        m.d.comb += [
            hold.eq(finishes & (left != 0) & ~((left == 1) & move)),
            draining.eq(hold),
            column.data.eq(tile),
            column.valid.eq(left != 0),
            column.last.eq(last & (left == 1)),
        ]
        with m.If(products.valid & ~hold):
            m.d.sync += sums.eq(totals)
        with m.If(finishes & ~hold):
            m.d.sync += [tile.eq(totals), left.eq(columns), last.eq(products.last)]
        with m.Elif((left != 0) & move):
            m.d.sync += [tile.eq(tile >> rows * word), left.eq(left - 1)]
        assert systolic_fill(p) == HEADER + p.op_latency + 1
        return column, [*stirs, left != 0]
