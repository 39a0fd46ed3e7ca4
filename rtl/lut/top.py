"""The core behind a host port."""

from amaranth.hdl import Assert, C, Cat, Module, Mux, Shape, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import Out, connect, flipped

from tilewright.arch.formats import FloatFormat
from tilewright.arch.lut import CAUSES, COUNTERS, ISA, LEVELS, OP, REGISTERS, LutParams, hostmap
from tilewright.rtl.host import HostDecoder, HostPort
from tilewright.rtl.layouts import layout_of
from tilewright.rtl.lib.memory import BlackBoxMemory
from tilewright.rtl.lut.compute import LMMA, ComputeUnit
from tilewright.rtl.lut.decoder import Rate, Sequencer
from tilewright.rtl.lut.load import LOAD, LoadUnit
from tilewright.rtl.lut.store import STORE, StoreUnit
from tilewright.rtl.lut.window import Window


class Top(wiring.Component):
    """Code memory, sequencer, load, compute and store unit, and their buffers, of one core.

    Memory, operand buffers and result buffer are black boxes: `memory`, `table_buffer`, `weight_buffer`, `result_buffer_0` and
    `result_buffer_1`, their word at half * rows + row.

    Parameters
    ----------
    params : LutParams
        Widths and counts; rates and latencies are registers (see `arch.lut.REGISTERS`).
    depth : int
        Instructions that the code memory holds.
    activation : Shape or FloatFormat, optional
        What tables are built from; None: tables of int8 are loaded.
    entry : Shape or FloatFormat
        Of a table.
    accumulator : Shape or FloatFormat

    Members
    -------
    ==== === ======== ==================================================
    host Out HostPort regions as `arch.lut.hostmap` lays them out
    ==== === ======== ==================================================
    """

    def __init__(
        self,
        *,
        params: LutParams,
        depth: int,
        activation: Shape | FloatFormat | None,
        entry: Shape | FloatFormat,
        accumulator: Shape | FloatFormat,
    ):
        self._params, self._depth = params, depth
        self._activation, self._entry, self._accumulator = activation, entry, accumulator
        super().__init__({"host": Out(HostPort)})

    def elaborate(self, platform):
        m = Module()
        p = self._params
        m.submodules.decoder = decoder = HostDecoder(hostmap(p, self._depth))
        connect(m, flipped(self.host), decoder.host)
        register = dict(zip(REGISTERS, decoder.registers, strict=True))
        m.submodules.sequencer = sequencer = Sequencer(depth=self._depth)
        m.d.comb += [
            decoder.done.eq(~sequencer.run),
            sequencer.clear.eq(decoder.start),
            sequencer.length.eq(register["length"]),
        ]
        self._code(m, decoder.code, sequencer, decoder.start)

        works = []
        for level in LEVELS:
            m.submodules[f"rate_{level}"] = rate = Rate()
            m.d.comb += [
                rate.clear.eq(decoder.start),
                rate.p.eq(register[f"p_{level}"]),
                rate.q.eq(register[f"q_{level}"]),
            ]
            works.append(rate.works)
        latency = [register[f"latency_{level}"] for level in LEVELS]

        m.submodules.load = load = LoadUnit(params=p, activation=self._activation)
        m.submodules.compute = compute = ComputeUnit(
            params=p,
            table_bits=load.table_bits,
            accumulator=self._accumulator,
            entry=self._entry,
            quantised=self._activation is None,
        )
        m.submodules.store = store = StoreUnit(params=p)
        for unit in (load, store):
            m.d.comb += [
                unit.tick.eq(sequencer.tick),
                unit.works.eq(Cat(works)),
                *(a.eq(b) for a, b in zip(unit.latency, latency, strict=True)),
            ]
        windows = self._windows(m, sequencer, decoder.start, load, compute, store)
        self._memories(m, load, compute, store)
        self._log(m, decoder.log, sequencer, windows)
        self._count(m, decoder.status, sequencer, windows, load, compute, store, decoder.start)
        return m

    def _code(self, m, port, sequencer, start):
        m.submodules.code = code = Memory(shape=len(port.wdata), depth=self._depth, init=[])
        read, write = code.read_port(), code.write_port(granularity=32)
        m.d.comb += [
            read.addr.eq(Mux(sequencer.run | start, sequencer.code_addr, port.addr)),
            port.rdata.eq(read.data),
            write.addr.eq(port.addr),
            write.data.eq(port.wdata),
            write.en.eq(port.we),
            sequencer.code_data.eq(read.data[: layout_of(ISA.record("code")).size]),
        ]

    def _windows(self, m, sequencer, clear, load, compute, store):
        """The units' windows, and the scoreboard: for what an instruction waits is decided at its dispatch."""
        p, i = self._params, sequencer.instruction
        tables = Signal()
        lines, end = Signal(32), Signal(33)
        m.d.comb += tables.eq(i.op == OP["LOAD_A"])
        with m.If(tables):
            m.d.comb += lines.eq(i.count * p.row_lines)
        with m.Elif(i.op == OP["STORE"]):
            m.d.comb += lines.eq(i.count * p.tile_lines)
        with m.Else():
            m.d.comb += lines.eq(i.count)
        m.d.comb += end.eq(i.line + lines)

        windows = []
        for k, (name, unit, layout) in enumerate(
            (("load", load, LOAD), ("compute", compute, LMMA), ("store", store, STORE))
        ):
            window = Window(depth=p.queue_depth, layout=layout, index=len(sequencer.number))
            m.submodules[f"{name}_window"] = window
            own = {"tables": tables, "end": end}
            m.d.comb += [
                window.clear.eq(clear),
                window.tick.eq(sequencer.tick),
                window.push.eq(sequencer.dispatch[k]),
                window.index.eq(sequencer.number),
                *(window.payload[f].eq(own[f] if f in own else i[f]) for f in layout.members),
                unit.clear.eq(clear),
                unit.valid.eq(window.valid),
                unit.head.eq(window.head),
                unit.wait.eq(window.operands | window.release),
                window.start.eq(unit.start),
                window.pop.eq(unit.pop),
                window.complete.eq(unit.complete),
                sequencer.full[k].eq(window.full),
                sequencer.busy[k].eq(~window.empty),
            ]
            windows.append(window)

        def overlap(slot):
            return (i.line < slot.end) & (slot.line < end)

        def uses(slot):  # an LMMA, what a load writes
            return Mux(tables, slot.table == i.half, slot.weight == i.half)

        def fills(slot):  # a load, what an LMMA reads
            return slot.half == Mux(slot.tables, i.table, i.weight)

        # Each unit: whose results it waits for, and who has to release what it writes.
        of_load, of_compute, of_store = windows
        rules = (
            (of_load, (of_store, overlap), (of_compute, uses)),
            (of_compute, (of_load, fills), (of_store, lambda slot: slot.half == i.result)),
            (of_store, (of_compute, lambda slot: slot.result == i.half), (of_load, overlap)),
        )
        for window, operands, release in rules:
            for kind, (other, conflict) in (("operands", operands), ("release", release)):
                found = Cat(conflict(slot) for slot in other.slots)
                m.d.comb += [
                    getattr(window, f"waits_{kind}").eq(found & other.live),
                    getattr(window, f"done_{kind}").eq(other.completing),
                ]
        return windows

    def _memories(self, m, load, compute, store):
        p = self._params

        def memory(name, width, depth):
            box = BlackBoxMemory(width=width, depth=depth)
            m.submodules[name] = box
            return box

        def reads(box, enable, address, *data):
            m.d.comb += [
                box.read_enable.eq(enable),
                box.read_address.eq(address),
                *(d.eq(box.read_data) for d in data),
            ]

        def writes(box, enable, address, data):
            m.d.comb += [
                box.write_enable.eq(enable),
                box.write_address.eq(address),
                box.write_data.eq(data),
            ]

        lines = memory("memory", p.line_bits, p.lines)
        reads(lines, load.mem_enable, load.mem_address, load.mem_data)
        writes(lines, store.mem_write, store.mem_address, store.mem_data)
        tables = memory("table_buffer", load.table_bits, 2 * p.table_rows)
        reads(tables, compute.table_read, compute.table_address, compute.table_data)
        writes(tables, load.table_write, load.table_address, load.table_data)
        weights = memory("weight_buffer", p.line_bits, 2 * p.weight_lines)
        reads(weights, compute.weight_read, compute.weight_address, compute.weight_data)
        writes(weights, load.weight_write, load.weight_address, load.weight_data)
        for half in range(2):
            # The scoreboard keeps the compute unit and the store unit on different halves.
            results = memory(f"result_buffer_{half}", len(compute.result_data), p.result_tiles)
            psum, tile = compute.psum_read[half], store.tile_read[half]
            reads(
                results,
                psum | tile,
                Mux(psum, compute.psum_address, store.tile_address),
                compute.psum_data[half],
                store.tile_data[half],
            )
            writes(results, compute.result_write[half], compute.result_address, compute.result_data)
            m.d.sync += Assert(~(psum & tile), "two units read the same half of the result buffer")

    def _log(self, m, port, sequencer, windows):
        """First tick and end of each instruction."""
        m.submodules.log = log = Memory(shape=64, depth=self._depth, init=[])
        read = log.read_port()
        m.d.comb += [read.addr.eq(port.addr), port.rdata.eq(read.data)]
        for window in windows:
            write = log.write_port()
            m.d.comb += [
                write.addr.eq(window.index_out),
                write.data.eq(Cat(window.first, sequencer.tick + 1)),
                write.en.eq(window.complete),
            ]

    def _count(self, m, status, sequencer, windows, load, compute, store, clear):
        """Ticks, counters and stalls, in the order of `arch.lut.status_names`."""
        run = sequencer.run
        counted = {
            "dram_lines": load.request[0],
            "l2_lines": load.request[1],
            "dram_stores": store.send[0],
            "l2_stores": store.send[1],
            "table_rows": load.row,
            "table_reads": compute.table_read,
            "planes": compute.working,
            "result_tiles": compute.tile,
        }
        events = [run, *(counted[name] for name in COUNTERS)]
        events += [run & sequencer.working]
        events += [run & ~sequencer.working & (sequencer.stall == k) for k in range(len(CAUSES))]
        for window, working, fetch, share in zip(
            windows,
            (load.request.any(), compute.working, store.send.any()),
            (C(0), C(0), store.fetch),
            (True, False, True),
            strict=True,
        ):
            stall = Signal(range(len(CAUSES)))
            with m.If(window.valid & window.operands):
                m.d.comb += stall.eq(CAUSES.index("operands"))
            with m.Elif(window.valid & window.release):
                m.d.comb += stall.eq(CAUSES.index("release"))
            with m.Elif(fetch):
                m.d.comb += stall.eq(CAUSES.index("fetch"))
            if share:  # of the memory's lines
                with m.Elif(window.valid):
                    m.d.comb += stall.eq(CAUSES.index("rate"))
            with m.Elif(~window.empty):
                m.d.comb += stall.eq(CAUSES.index("drain"))
            with m.Else():
                m.d.comb += stall.eq(CAUSES.index("idle"))
            events += [run & working, *(run & ~working & (stall == k) for k in range(len(CAUSES)))]
            m.d.sync += Assert(~working | run, "a unit works outside a run")
        for port, event in zip(status, events, strict=True):
            counter = Signal(32)
            with m.If(clear):
                m.d.sync += counter.eq(0)
            with m.Else():
                m.d.sync += counter.eq(counter + event)
            m.d.comb += port.eq(counter)
