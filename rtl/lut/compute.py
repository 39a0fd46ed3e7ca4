"""The compute unit: walks the loops of an LMMA, one plane a tick, and feeds the arrays."""

from amaranth.hdl import Cat, Module, Mux, Shape, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.formats import FloatFormat
from tilewright.arch.lut import LutParams
from tilewright.rtl.lut.array import PLANE_BITS, LutArray, QuantisedLutArray, delayed
from tilewright.rtl.lut.load import fields

LMMA = fields(
    *("table", "table_base", "weight", "weight_base", "result", "result_base"),
    *("m_tiles", "n_tiles", "groups", "bits", "accumulate"),
)


class ComputeUnit(wiring.Component):
    """For every m-tile, n-tile, group and plane: one tick, without bubbles, also between instructions.

    From a plane's issue it takes one tick to read its tables, one to keep them beside those in use, one to have
    them take their place; then the arrays' latency; then the sums are written, if they are a tile's last. Partial
    sums are read from the result buffer unless they are only now being written.

    Parameters
    ----------
    params : LutParams
    table_bits : int
        Bits of a row of tables, scales included.
    accumulator : Shape or FloatFormat
    quantised : bool
        Tables are of int8, with scales.
    entry : Shape or FloatFormat
        Type of an exact table's entries.

    Members
    -------
    ============== === ============ ============================================================
    clear          In  1            forget everything
    valid, head    In               the instruction to carry out
    wait           In  1            it may not begin
    start, pop     Out 1            its first, and its last plane is issued in this tick
    complete       Out 1            the oldest instruction's last result is written in this tick
    working        Out 1            a plane is issued
    table_read     Out 1            it is a group's first: tables are read in this tick
    table_address  Out
    table_data     In               what was read one tick ago
    weight_read    Out 1
    weight_address Out
    weight_data    In  line
    psum_read      Out 2            a tile is read in this tick, from this half
    psum_address   Out
    psum_data      In  2 x tile
    result_write   Out 2            a tile is written in this tick, to this half
    result_address Out
    result_data    Out tile
    tile           Out 1            the plane issued is a tile's last
    ============== === ============ ============================================================
    """

    def __init__(
        self,
        *,
        params: LutParams,
        table_bits: int,
        accumulator: Shape | FloatFormat,
        entry: Shape | FloatFormat,
        quantised: bool,
    ):
        self._params, self._accumulator = params, accumulator
        self._entry, self._quantised = entry, quantised
        p = params
        tile = p.rows * p.n * accumulator.width
        super().__init__(
            {
                "clear": In(1),
                "valid": In(1),
                "head": In(LMMA),
                "wait": In(1),
                "start": Out(1),
                "pop": Out(1),
                "complete": Out(1),
                "working": Out(1),
                "table_read": Out(1),
                "table_address": Out(bits_for(2 * p.table_rows - 1)),
                "table_data": In(table_bits),
                "weight_read": Out(1),
                "weight_address": Out(bits_for(2 * p.weight_lines - 1)),
                "weight_data": In(p.line_bits),
                "psum_read": Out(2),
                "psum_address": Out(bits_for(p.result_tiles - 1)),
                "psum_data": In(tile).array(2),
                "result_write": Out(2),
                "result_address": Out(bits_for(p.result_tiles - 1)),
                "result_data": Out(tile),
                "tile": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        p, head = self._params, self.head

        # Where the loops are; at an instruction's first plane, at the beginning.
        fresh = Signal(init=1)
        loops = {
            name: Signal(16, name=name)
            for name in ("m_tile", "n_tile", "group", "row", "line", "tile_address")
        }
        loops |= {"plane": Signal(PLANE_BITS, name="plane"), "block": Signal(16, name="block")}
        row_base = Signal(16)
        begin = {"row": head.table_base, "line": head.weight_base, "tile_address": head.result_base}
        now = {}
        for name, register in loops.items():
            now[name] = Signal.like(register, name=f"{name}_now")
            m.d.comb += now[name].eq(Mux(fresh, begin.get(name, 0), register))
        base = Signal(16)
        m.d.comb += base.eq(Mux(fresh, head.table_base, row_base))

        last_plane, last_group, last_n, last_m = (
            Signal(name=name) for name in ("last_plane", "last_group", "last_n", "last_m")
        )
        first_plane, first_group, first_block = (
            Signal(name=name) for name in ("first_plane", "first_group", "first_block")
        )
        closes = Signal()  # the plane is the last of a block of groups
        issue = self.working
        m.d.comb += [
            issue.eq(self.valid & ~self.wait),
            first_plane.eq(now["plane"] == 0),
            first_group.eq(now["group"] == 0),
            last_plane.eq(now["plane"] == head.bits - 1),
            last_group.eq(last_plane & (now["group"] == head.groups - 1)),
            last_n.eq(last_group & (now["n_tile"] == head.n_tiles - 1)),
            last_m.eq(last_n & (now["m_tile"] == head.m_tiles - 1)),
            first_block.eq(now["group"] == now["block"]),
            closes.eq(last_group | (last_plane & (now["block"] == p.table_block - 1))),
            self.start.eq(issue & fresh),
            self.pop.eq(issue & last_m),
            self.tile.eq(issue & last_group),
        ]
        with m.If(issue):
            m.d.sync += [
                fresh.eq(last_m),
                loops["plane"].eq(Mux(last_plane, 0, now["plane"] + 1)),
                loops["group"].eq(Mux(last_group, 0, now["group"] + last_plane)),
                loops["n_tile"].eq(Mux(last_n, 0, now["n_tile"] + last_group)),
                loops["m_tile"].eq(now["m_tile"] + last_n),
                loops["line"].eq(Mux(last_n, head.weight_base, now["line"] + 1)),
                loops["tile_address"].eq(now["tile_address"] + last_group),
                loops["block"].eq(Mux(closes, 0, now["block"] + last_plane)),
                row_base.eq(Mux(last_n, base + head.groups, base)),
            ]
            # Every n-tile reads the m-tile's rows anew.
            with m.If(last_group):
                m.d.sync += loops["row"].eq(Mux(last_n, base + head.groups, base))
            with m.Else():
                m.d.sync += loops["row"].eq(now["row"] + last_plane)
        with m.If(self.clear):
            m.d.sync += fresh.eq(1)

        # Tick 0: tables are read. 1: kept. 2: they take their place; weights are read. 3: looked up.
        def later(value, ticks, name):
            return delayed(m, value, ticks, name)

        m.d.comb += [
            self.table_read.eq(issue & first_plane),
            self.table_address.eq(Mux(head.table, p.table_rows, 0) + now["row"]),
        ]
        load = later(self.table_read, 1, "load")
        swap = later(load, 1, "swap")
        weight = Signal.like(self.weight_address)
        m.d.comb += weight.eq(Mux(head.weight, p.weight_lines, 0) + now["line"])
        m.d.comb += [
            self.weight_read.eq(later(issue, 2, "issued")),
            self.weight_address.eq(later(weight, 2, "weight")),
        ]
        marks = {
            "valid": later(self.weight_read, 1, "valid"),
            "first": later(issue & first_group & first_plane, 3, "first"),
            "last": later(issue & last_group, 3, "last"),
            "plane": later(now["plane"], 3, "plane"),
        }
        arrays = self._arrays(m, load, swap, marks, later(closes, 3, "closes"))
        latency = arrays[0].latency

        # The array takes partial sums with a tile's first sum: of its first plane, or of its first block.
        opens = issue & first_group & first_plane
        if self._quantised:
            opens = issue & closes & first_block
        place = Cat(now["tile_address"][: len(self.psum_address)], head.result)
        reads = later(opens & head.accumulate, latency + 1, "reads")
        read_place = later(place, latency + 1, "read_place")
        takes, take_place = later(reads, 1, "takes"), later(read_place, 1, "take_place")
        m.d.comb += [
            self.psum_address.eq(read_place[:-1]),
            self.psum_read.eq(Mux(reads, 1 << read_place[-1], 0)),
        ]
        done = later(issue & last_group, 3 + latency, "done")
        done_place = later(place, 3 + latency, "done_place")
        result = Cat(unit.result for unit in arrays)
        m.d.comb += [
            self.result_write.eq(Mux(done, 1 << done_place[-1], 0)),
            self.result_address.eq(done_place[:-1]),
            self.result_data.eq(result),
            self.complete.eq(later(self.pop, 3 + latency, "completes")),
        ]
        # Sums that the read came too early for: written in this tick, or in the one before.
        held, held_done, held_place = Signal.like(self.result_data), Signal(), Signal.like(done_place)
        m.d.sync += [held.eq(result), held_done.eq(done), held_place.eq(done_place)]
        psum = Signal.like(self.result_data)
        with m.If(~takes):
            m.d.comb += psum.eq(0)
        with m.Elif(done & (done_place == take_place)):
            m.d.comb += psum.eq(result)
        with m.Elif(held_done & (held_place == take_place)):
            m.d.comb += psum.eq(held)
        with m.Else():
            m.d.comb += psum.eq(Mux(take_place[-1], self.psum_data[1], self.psum_data[0]))
        for i, unit in enumerate(arrays):
            m.d.comb += unit.psum.eq(psum.word_select(i, len(unit.psum)))
        return m

    def _arrays(self, m, load, swap, marks, closes):
        """The lookup arrays, which share weights and marks; each has the tables of its rows."""
        p = self._params
        size = p.m * p.entries * p.entry_bits
        arrays = []
        scales = None
        if self._quantised:
            # Scales go the way of their tables.
            spare, scales = Signal(p.rows * 32), Signal(p.rows * 32)
            with m.If(load):
                m.d.sync += spare.eq(self.table_data[p.rows * p.entries * p.entry_bits :])
            with m.If(swap):
                m.d.sync += scales.eq(spare)
        for i in range(p.arrays):
            common = {"m": p.m, "n": p.n, "k": p.k, "weight_bits": p.max_bits}
            if self._quantised:
                unit = QuantisedLutArray(**common, block=p.table_block)
                m.d.comb += [
                    unit.close.eq(closes),
                    unit.scales.eq(scales.word_select(i, p.m * 32)),
                ]
            else:
                unit = LutArray(**common, entry=self._entry, accumulator=self._accumulator)
            m.submodules[f"array_{i}"] = unit
            m.d.comb += [
                unit.load.eq(load.replicate(p.m)),
                unit.tables.eq(self.table_data.word_select(i, size)),
                unit.swap.eq(swap),
                unit.words.eq(self.weight_data),
                *(getattr(unit, name).eq(mark) for name, mark in marks.items()),
            ]
            arrays.append(unit)
        return arrays
