"""A DRAM bank with its MAC unit."""

from amaranth.hdl import Assert, Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out

from tilewright.arch import formats
from tilewright.arch.pim import CMD, PimParams
from tilewright.rtl.lib.memory import BlackBoxMemory
from tilewright.rtl.pim.bus import command_layout
from tilewright.rtl.pim.mac import MacUnit


class Bank(wiring.Component):
    """Cell array, the row that is open, and a MAC unit between the array and the global buffer.

    The row buffer is the open row's number: column accesses go through it to the array. What a command may not
    do to this bank (open an open one, read a closed one or another row) fails an assertion, whatever the
    controller believes.

    Parameters
    ----------
    params : PimParams
    index : int
        Which bank of the channel this is.
    accumulator : FloatFormat

    Members
    -------
    ======== === ============== ===========================================================
    bus      In  command_layout command of this tick
    reset    In  1              a run begins: the row closes, the accumulator is +0
    run      In  1              commands count
    gb       In  lanes * 16     global buffer column of the MACAB of the last tick
    wdata    In  lanes * 16     SRAM column of the WR of the last tick
    rdata    Out lanes * 16     array column of the RD of the last tick
    acc      Out width          accumulator
    ======== === ============== ===========================================================
    """

    def __init__(self, *, params: PimParams, index: int, accumulator: formats.FloatFormat):
        self._params, self._index, self._format = params, index, accumulator
        width = params.lanes * formats.BF16.width
        super().__init__(
            {
                "bus": In(command_layout(params)),
                "reset": In(1),
                "run": In(1),
                "gb": In(width),
                "wdata": In(width),
                "rdata": Out(width),
                "acc": Out(accumulator.width),
            }
        )

    def elaborate(self, platform):
        m = Module()
        p, bus, i = self._params, self.bus, self._index
        element = formats.BF16.width
        mine = self.run & bus.valid & (bus.bank == i)
        every = self.run & bus.valid

        is_open, row = Signal(), Signal(bus.row.shape())
        activate = (mine & (bus.code == CMD.ACT)) | (every & (bus.code == CMD.ACTAB))
        precharge = (mine & (bus.code == CMD.PRE)) | (every & (bus.code == CMD.PREAB))
        read, write = mine & (bus.code == CMD.RD), mine & (bus.code == CMD.WR)
        mac = every & (bus.code == CMD.MACAB)
        with m.If(self.reset | precharge):
            m.d.sync += is_open.eq(0)
        with m.Elif(activate):
            m.d.sync += [is_open.eq(1), row.eq(bus.row)]
        m.d.sync += [
            Assert(~(activate & is_open), "activate of an open bank"),
            Assert(
                ~((read | write | mac) & (~is_open | (row != bus.row))),
                "column access to a row that is not open",
            ),
            Assert(~(every & (bus.code == CMD.REFAB) & is_open), "refresh of an open bank"),
        ]

        m.submodules.array = array = BlackBoxMemory(
            width=p.lanes * element, depth=p.rows * p.columns, granularity=element
        )
        column_bits = (p.columns - 1).bit_length()
        address = Cat(bus.col[:column_bits], row) if column_bits else row
        write_q, masked_q, address_q = Signal(), Signal(), Signal(array.write_address.shape())
        lane_q = Signal(bus.lane.shape())
        m.d.sync += [write_q.eq(write), masked_q.eq(bus.masked), address_q.eq(address), lane_q.eq(bus.lane)]
        scattered = self.wdata.word_select(i % p.lanes, element).replicate(p.lanes)
        m.d.comb += [
            array.read_enable.eq(read | mac),
            array.read_address.eq(address),
            self.rdata.eq(array.read_data),
            array.write_enable.eq(Mux(write_q, Mux(masked_q, 1 << lane_q, (1 << p.lanes) - 1), 0)),
            array.write_address.eq(address_q),
            array.write_data.eq(Mux(masked_q, scattered, self.wdata)),
        ]

        m.submodules.mac = unit = MacUnit(lanes=p.lanes, accumulator=self._format)
        mac_q = Signal()
        m.d.sync += mac_q.eq(mac)
        read_acc = every & (bus.code == CMD.RDMAC) & (bus.burst == i // p.lanes)
        m.d.comb += [
            unit.valid.eq(mac_q),
            unit.a.eq(array.read_data),
            unit.b.eq(self.gb),
            unit.clear.eq(read_acc),
            unit.reset.eq(self.reset),
            self.acc.eq(unit.acc),
        ]
        return m
