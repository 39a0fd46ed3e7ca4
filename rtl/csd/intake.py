"""What an attention kernel takes in: the lines that it asked for, in the parts of an operand buffer."""

from amaranth.hdl import Array, Assert, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.csd import TOKEN_BITS, CsdParams, buffered_rows
from tilewright.arch.formats import FP16
from tilewright.rtl.csd.argtopk import tree_sum
from tilewright.rtl.csd.controller import line_layout
from tilewright.rtl.csd.operands import OperandBuffer

__all__ = ["Intake"]


class Intake(wiring.Component):
    """Sorts lines into batches: one is worked on in `part`, those that follow fill the parts behind it, in a ring.

    A batch of an estimate is a span: rows of channels as they come, or, behind the last whole span, tokens of which the
    chosen channels become a column; a line's turn is its part. Of keys and values a batch is the rows from `base` on that
    fit a part; those of the next pass come behind the `left` batches of this one. A line counts from the tick after it came.

    Parameters
    ----------
    params : CsdParams
    black_box : bool
        The buffer is outside of the netlist.

    Members
    -------
    ============ === ============= ==============================================================
    estimating   In  1             batches are spans
    spans        In                spans that come as channels,
    span         In                the one that is worked on
    base         In                first row of the batch that is worked on
    part         In  range(batches) where it is
    left         In                batches of this pass from it on
    turn         In  1             of the pass that it belongs to
    row_lines    In                lines of a token
    span_lines   In                lines of a channel in a span
    rows         Out               rows of a part
    valid        In  1             there is a line
    line         In  line_layout
    word         Out               which chosen channels are needed in this tick,
    mask         In  lanes         these,
    prefix       In                and how many there are before
    drop         In  1             the batch is done
    expected     In                its lines
    complete     Out 1             all of them came
    read         In  1             of the buffer; latency 1
    read_column  In  1
    read_line    In                within the part
    read_turn    In  range(lanes)
    read_data    Out lanes * 16
    ============ === ============= ==============================================================
    """

    def __init__(self, *, params: CsdParams, black_box: bool = True):
        self._params, self._black_box = params, black_box
        p, lines, words = params, bits_for(params.buffer_lines), bits_for(params.max_channels // params.lanes)
        # A token of which one channel is needed comes whole.
        self._count = bits_for(p.buffer_lines * p.max_channels)
        super().__init__(
            {
                "estimating": In(1),
                "spans": In(12),
                "span": In(TOKEN_BITS),
                "base": In(TOKEN_BITS),
                "part": In(bits_for(p.batches - 1)),
                "left": In(bits_for(p.batches)),
                "turn": In(1),
                "row_lines": In(words),
                "span_lines": In(lines),
                "rows": Out(bits_for(p.buffer_lines)),
                "valid": In(1),
                "line": In(line_layout(p)),
                "word": Out(words),
                "mask": In(p.lanes),
                "prefix": In(bits_for(p.max_channels)),
                "drop": In(1),
                "expected": In(self._count),
                "complete": Out(1),
                "read": In(1),
                "read_column": In(1),
                "read_line": In(lines),
                "read_turn": In(bits_for(p.lanes - 1)),
                "read_data": Out(p.lanes * FP16.width),
            }
        )

    def elaborate(self, platform):
        m = Module()
        p, line = self._params, self.line
        place = p.lanes.bit_length() - 1
        m.submodules.operands = operands = OperandBuffer(
            lanes=p.lanes, lines=p.batches * p.buffer_lines, black_box=self._black_box
        )
        fits = [0, *(buffered_rows(p, n) for n in range(1, p.max_channels // p.lanes + 1))]
        mine, column = Signal(), Signal()
        part, ahead = (
            Signal.like(self.part),
            Signal.like(self.part),
        )  # of the line; batches before its own in the pass
        offset, row, within = Signal(TOKEN_BITS), Signal(TOKEN_BITS), Signal(TOKEN_BITS)
        m.d.comb += [
            self.rows.eq(Array(fits)[self.row_lines]),
            mine.eq(line.turn == self.turn),
            offset.eq(Mux(mine, line.row - self.base, line.row)),
            ahead.eq(tree_sum(offset >= k * self.rows for k in range(1, p.batches))),
            part.eq(Mux(self.estimating, line.turn, self.part + ahead + Mux(mine, 0, self.left))),
            column.eq(self.estimating & (self.span + (line.turn - self.part)[: len(part)] >= self.spans)),
            self.word.eq(line.word),
            row.eq(Mux(column, self.prefix, Mux(self.estimating, line.row, offset - ahead * self.rows))),
            within.eq(Mux(column, line.row >> place, line.word)),
            operands.stride.eq(Mux(self.estimating, self.span_lines, self.row_lines)),
            operands.write.eq(self.valid),
            operands.write_column.eq(column),
            operands.write_line.eq(part * p.buffer_lines + row * operands.stride + within),
            operands.write_turn.eq(row + Mux(column, line.row, 0)),
            operands.write_mask.eq(Mux(column, self.mask, (1 << p.lanes) - 1)),
            operands.write_data.eq(line.data),
            operands.read.eq(self.read),
            operands.read_column.eq(self.read_column),
            operands.read_line.eq(self.part * p.buffer_lines + self.read_line),
            operands.read_turn.eq(self.read_turn),
            self.read_data.eq(operands.read_data),
        ]
        came = [Signal(self._count, name=f"came_{i}") for i in range(p.batches)]
        for i, lines in enumerate(came):
            with m.If(self.drop & (self.part == i)):
                m.d.sync += lines.eq(0)
            with m.Elif(self.valid & (part == i)):
                m.d.sync += lines.eq(lines + 1)
        m.d.comb += self.complete.eq(Array(came)[self.part] == self.expected)
        m.d.sync += [
            Assert(~(self.valid & self.drop & (part == self.part)), "a line for a batch that is done"),
            Assert(
                self.estimating | ~self.valid | (offset < p.batches * self.rows), "a line beyond all parts"
            ),
        ]
        return m
