"""The load unit: asks memory for lines, and fills the operand buffers with what arrives."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.lut import ISA, LEVELS, LutParams
from tilewright.rtl.lib.fifo import StreamFifo
from tilewright.rtl.lut.array import delayed
from tilewright.rtl.lut.precompute import TablePrecompute
from tilewright.rtl.lut.window import TICK_BITS

MOVE_FIELDS = ("half", "base", "count", "line", "level")


def fields(*names, **more) -> data.StructLayout:
    """A layout of fields of the instruction set, and others."""
    table = ISA.record("code").by_name
    return data.StructLayout({**{name: table[name].bits for name in names}, **more})


LOAD = fields(*MOVE_FIELDS, tables=1, end=33)  # of activations, to become tables; memory line behind the last


class LoadUnit(wiring.Component):
    """Asks for a line in each tick in which the level works; a line arrives `latency` ticks later, or after the one
    before.

    Activation rows are put together from their lines, become tables, one row a tick, and are written; weights
    are written as they are. Quantised tables are rows of tables already.

    Parameters
    ----------
    params : LutParams
    activation : Shape or FloatFormat, optional
        What tables are built from; None: they are loaded.

    Members
    -------
    ============== === ============= ====================================================================
    clear          In  1             forget everything
    tick           In  32            the present tick
    works          In  2             levels that move a line in this tick
    latency        In  2 x 16        of each level
    valid, head    In                the instruction to carry out
    wait           In  1             it may not begin
    start, pop     Out 1             its first, and its last line is asked for in this tick
    complete       Out 1             the oldest instruction's last line is written in this tick
    request        Out 2             a line is asked for, from this level
    row            Out 1             it is the last one of a row of activations
    mem_enable     Out 1             memory is read in this tick
    mem_address    Out
    mem_data       In  line          what was read one tick ago
    table_write    Out 1             a row of tables is written in this tick
    table_address  Out
    table_data     Out
    weight_write   Out 1             a line of weights is written in this tick
    weight_address Out
    weight_data    Out line
    ============== === ============= ====================================================================
    """

    def __init__(self, *, params: LutParams, activation):
        self._params, self._activation = params, activation
        p = params
        self.table_bits = p.rows * p.entries * p.entry_bits
        if activation is None:
            self.table_bits += p.rows * 32  # scales
        self._line = bits_for(p.lines - 1)
        super().__init__(
            {
                "clear": In(1),
                "tick": In(TICK_BITS),
                "works": In(len(LEVELS)),
                "latency": In(16).array(len(LEVELS)),
                "valid": In(1),
                "head": In(LOAD),
                "wait": In(1),
                "start": Out(1),
                "pop": Out(1),
                "complete": Out(1),
                "request": Out(len(LEVELS)),
                "row": Out(1),
                "mem_enable": Out(1),
                "mem_address": Out(self._line),
                "mem_data": In(p.line_bits),
                "table_write": Out(1),
                "table_address": Out(bits_for(2 * p.table_rows - 1)),
                "table_data": Out(self.table_bits),
                "weight_write": Out(1),
                "weight_address": Out(bits_for(2 * p.weight_lines - 1)),
                "weight_data": Out(p.line_bits),
            }
        )

    def elaborate(self, platform):
        m = Module()
        p, head = self._params, self.head
        place = max(len(self.table_address), len(self.weight_address))

        # Asking: line `part` of row `row`, where a row of weights is one line.
        row, part, asked = Signal(16), Signal(range(max(2, p.row_lines))), Signal(32)
        last_part, last = Signal(), Signal()
        asks = Signal()
        first = Signal()
        m.d.comb += [
            asks.eq(self.valid & ~self.wait & self.works.bit_select(head.level, 1)),
            first.eq((row == 0) & (part == 0)),
            last_part.eq(~head.tables | (part == p.row_lines - 1)),
            last.eq(last_part & (row == head.count - 1)),
            self.start.eq(asks & first),
            self.pop.eq(asks & last),
            self.request.eq(Mux(asks, 1 << head.level, 0)),
            self.row.eq(asks & head.tables & last_part),
        ]
        with m.If(asks):
            m.d.sync += [
                part.eq(Mux(last_part, 0, part + 1)),
                row.eq(Mux(last, 0, row + last_part)),
                asked.eq(Mux(last, 0, asked + 1)),
            ]
        with m.If(self.clear):
            m.d.sync += [row.eq(0), part.eq(0), asked.eq(0)]

        # Under way, in order.
        flight = data.StructLayout(
            {"due": TICK_BITS, "line": self._line, "tables": 1, "place": place, "full": 1, "last": 1}
        )
        m.submodules.flights = flights = StreamFifo(shape=flight, depth=p.lines_in_flight, always_ready=True)
        offset = Mux(head.tables, p.table_rows, p.weight_lines)
        item = flights.i.payload
        m.d.comb += [
            flights.i.valid.eq(asks),
            item.due.eq(self.tick + Mux(head.level, self.latency[1], self.latency[0])),
            item.line.eq(head.line + asked),
            item.tables.eq(head.tables),
            item.place.eq(Mux(head.half, offset, 0) + head.base + row),
            item.full.eq(last_part),
            item.last.eq(last),
        ]
        arriving = flights.o.payload
        arrives = Signal()
        m.d.comb += [
            arrives.eq(flights.o.valid & (self.tick >= arriving.due)),
            flights.o.ready.eq(arrives),
            self.mem_enable.eq(arrives),
            self.mem_address.eq(arriving.line),
        ]

        # Read: the data of the line that arrived one tick ago.
        came, kept = Signal(), Signal(flight)
        m.d.sync += [came.eq(arrives), kept.eq(arriving)]
        m.d.comb += [
            self.weight_write.eq(came & ~kept.tables),
            self.weight_address.eq(kept.place),
            self.weight_data.eq(self.mem_data),
        ]
        whole = self.mem_data
        if p.row_lines > 1:
            before = Signal((p.row_lines - 1) * p.line_bits)
            whole = Cat(before, self.mem_data)
            with m.If(came & kept.tables):
                m.d.sync += before.eq(whole[p.line_bits :])
        has_row = Signal()
        m.d.comb += has_row.eq(came & kept.tables & kept.full)

        latency = 0
        if self._activation is None:
            m.d.comb += [self.table_write.eq(has_row), self.table_data.eq(whole)]
        else:
            row_bits = p.k * p.activation_bits
            tables = []
            for r in range(p.rows):
                m.submodules[f"build_{r}"] = unit = TablePrecompute(k=p.k, activation=self._activation)
                m.d.comb += [unit.valid.eq(has_row), unit.a.eq(whole[r * row_bits : (r + 1) * row_bits])]
                tables.append(unit.table)
            latency = unit.latency
            m.d.comb += [self.table_write.eq(unit.table_valid), self.table_data.eq(Cat(tables))]
        m.d.comb += [
            self.table_address.eq(delayed(m, kept.place, latency, "place")),
            self.complete.eq(delayed(m, came & kept.last, latency, "complete")),
        ]
        return m
