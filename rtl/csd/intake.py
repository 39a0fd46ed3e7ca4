"""What an attention kernel takes in: the lines that it asked for, in two halves of an operand buffer."""

from amaranth.hdl import Array, Assert, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.csd import TOKEN_BITS, CsdParams, buffered_rows
from tilewright.arch.formats import FP16
from tilewright.rtl.csd.controller import line_layout
from tilewright.rtl.csd.operands import OperandBuffer

__all__ = ["Intake"]


class Intake(wiring.Component):
    """Sorts lines into batches: one is worked on in `half`, the next one fills the other half.

    A batch of an estimate is a span: rows of channels as they come, or, behind the last whole span, tokens of which the
    chosen channels become a column. Of keys and values it is the rows from `base` on that fit a half; the first batch of
    values may come while the last one of keys is worked on. A line counts from the tick after it came.

    Parameters
    ----------
    params : CsdParams
    black_box : bool
        The buffer is outside of the netlist.

    Members
    -------
    ============ === ============= ==============================================================
    estimating   In  1             batches are spans
    by_tokens    In  2             of either parity of the span: they come as tokens
    base         In                first row of the batch that is worked on
    half         In  1             where it is
    turn         In  1             of the pass that it belongs to
    row_lines    In                lines of a token
    span_lines   In                lines of a channel in a span
    rows         Out               rows of a half
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
    read_line    In                within the half
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
                "by_tokens": In(2),
                "base": In(TOKEN_BITS),
                "half": In(1),
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
            lanes=p.lanes, lines=2 * p.buffer_lines, black_box=self._black_box
        )
        fits = [0, *(buffered_rows(p, n) for n in range(1, p.max_channels // p.lanes + 1))]
        mine, beyond, half, column = Signal(), Signal(), Signal(), Signal()
        offset, row, within = Signal(TOKEN_BITS), Signal(TOKEN_BITS), Signal(TOKEN_BITS)
        m.d.comb += [
            self.rows.eq(Array(fits)[self.row_lines]),
            # Of this batch, or of the next one.
            mine.eq(line.turn == self.turn),
            offset.eq(Mux(mine, line.row - self.base, line.row)),
            beyond.eq(mine & (offset >= self.rows)),
            half.eq(Mux(self.estimating, line.turn, self.half ^ (beyond | ~mine))),
            column.eq(self.estimating & self.by_tokens.bit_select(line.turn, 1)),
            self.word.eq(line.word),
            row.eq(
                Mux(column, self.prefix, Mux(self.estimating, line.row, offset - Mux(beyond, self.rows, 0)))
            ),
            within.eq(Mux(column, line.row >> place, line.word)),
            operands.stride.eq(Mux(self.estimating, self.span_lines, self.row_lines)),
            operands.write.eq(self.valid),
            operands.write_column.eq(column),
            operands.write_line.eq(Mux(half, p.buffer_lines, 0) + row * operands.stride + within),
            operands.write_turn.eq(row + Mux(column, line.row, 0)),
            operands.write_mask.eq(Mux(column, self.mask, (1 << p.lanes) - 1)),
            operands.write_data.eq(line.data),
            operands.read.eq(self.read),
            operands.read_column.eq(self.read_column),
            operands.read_line.eq(Mux(self.half, p.buffer_lines, 0) + self.read_line),
            operands.read_turn.eq(self.read_turn),
            self.read_data.eq(operands.read_data),
        ]
        came = [Signal(self._count, name=f"came_{i}") for i in range(2)]
        for i, lines in enumerate(came):
            with m.If(self.drop & (self.half == i)):
                m.d.sync += lines.eq(0)
            with m.Elif(self.valid & (half == i)):
                m.d.sync += lines.eq(lines + 1)
        m.d.comb += self.complete.eq(Array(came)[self.half] == self.expected)
        m.d.sync += [
            Assert(~(self.valid & self.drop & (half == self.half)), "a line for a batch that is done"),
            Assert(
                self.estimating | ~(self.valid & beyond & (offset >= 2 * self.rows)),
                "a line beyond both halves",
            ),
        ]
        return m
