"""The store unit: sends result tiles to memory, line by line."""

from amaranth.hdl import Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.lut import LEVELS, LutParams
from tilewright.rtl.lib.fifo import StreamFifo
from tilewright.rtl.lut.load import MOVE_FIELDS, fields
from tilewright.rtl.lut.window import TICK_BITS

STORE = fields(*MOVE_FIELDS, end=33)  # memory line behind the last


class StoreUnit(wiring.Component):
    """Reads a tile from the result buffer in a tick of its own, then sends a line in each tick in which the level works;
    the next tile is read while the last line of the one before is sent.

    Parameters
    ----------
    params : LutParams

    Members
    -------
    ============= === ======== ====================================================================
    clear         In  1        forget everything
    tick          In  32       the present tick
    works         In  2        levels that move a line in this tick
    latency       In  2 x 16   of each level
    valid, head   In           the instruction to carry out
    wait          In  1        it may not begin
    start, pop    Out 1        its first tick, and its last one
    complete      Out 1        the oldest instruction that is not complete completes in this tick
    fetch         Out 1        the first tile is being read
    send          Out 2        a line is sent, to this level
    tile_read     Out 2        a tile is read in this tick, from this half
    tile_address  Out
    tile_data     In  2 x tile what was read last
    mem_write     Out 1
    mem_address   Out
    mem_data      Out line
    ============= === ======== ====================================================================
    """

    def __init__(self, *, params: LutParams):
        self._params = p = params
        super().__init__(
            {
                "clear": In(1),
                "tick": In(TICK_BITS),
                "works": In(len(LEVELS)),
                "latency": In(16).array(len(LEVELS)),
                "valid": In(1),
                "head": In(STORE),
                "wait": In(1),
                "start": Out(1),
                "pop": Out(1),
                "complete": Out(1),
                "fetch": Out(1),
                "send": Out(len(LEVELS)),
                "tile_read": Out(2),
                "tile_address": Out(bits_for(p.result_tiles - 1)),
                "tile_data": In(p.rows * p.n * p.acc_bits).array(2),
                "mem_write": Out(1),
                "mem_address": Out(bits_for(p.lines - 1)),
                "mem_data": Out(p.line_bits),
            }
        )

    def elaborate(self, platform):
        m = Module()
        p, head = self._params, self.head
        fetched, tile = Signal(), Signal(16)
        part, sent = Signal(range(max(2, p.tile_lines))), Signal(32)
        sends, last_part, last = Signal(), Signal(), Signal()
        m.d.comb += [
            self.fetch.eq(self.valid & ~self.wait & ~fetched),
            sends.eq(self.valid & fetched & self.works.bit_select(head.level, 1)),
            last_part.eq(part == p.tile_lines - 1),
            last.eq(last_part & (tile == head.count - 1)),
            self.start.eq(self.fetch),
            self.pop.eq(sends & last),
            self.send.eq(Mux(sends, 1 << head.level, 0)),
            self.tile_read.eq(Mux(self.fetch | (sends & last_part & ~last), 1 << head.half, 0)),
            self.tile_address.eq(head.base + Mux(fetched, tile + 1, 0)),
        ]
        with m.If(self.fetch):
            m.d.sync += [fetched.eq(1), tile.eq(0), part.eq(0), sent.eq(0)]
        with m.Elif(sends):
            m.d.sync += [
                fetched.eq(~last),
                part.eq(Mux(last_part, 0, part + 1)),
                tile.eq(tile + last_part),
                sent.eq(sent + 1),
            ]
        with m.If(self.clear):
            m.d.sync += fetched.eq(0)

        data = Signal(p.tile_lines * p.line_bits)
        m.d.comb += [
            data.eq(Mux(head.half, self.tile_data[1], self.tile_data[0])),
            self.mem_write.eq(sends),
            self.mem_address.eq(head.line + sent),
            self.mem_data.eq(data.word_select(part, p.line_bits) if p.tile_lines > 1 else data),
        ]

        m.submodules.dues = dues = StreamFifo(shape=TICK_BITS, depth=p.queue_depth, always_ready=True)
        m.d.comb += [
            dues.i.valid.eq(self.pop),
            dues.i.payload.eq(self.tick + Mux(head.level, self.latency[1], self.latency[0])),
            self.complete.eq(dues.o.valid & (self.tick >= dues.o.payload)),
            dues.o.ready.eq(self.complete),
        ]
        return m
