"""A drive behind a host port."""

from amaranth.hdl import Cat, Const, Module, Mux, ResetInserter, Signal
from amaranth.lib import data, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import Out, connect, flipped

from tilewright.arch.csd import CAUSES, COUNTERS, ISA, OP, REGISTERS, CsdParams, hostmap
from tilewright.arch.flash import ERASE, PROGRAM, READ
from tilewright.rtl.csd.argtopk import ArgTopK, tree_sum
from tilewright.rtl.csd.channel import any_of, pick
from tilewright.rtl.csd.controller import FlashController, PortSwitch
from tilewright.rtl.csd.decoder import TICK_BITS, CommandDecoder
from tilewright.rtl.csd.fetch import Fetch, StagedPages
from tilewright.rtl.csd.ftl import PageTables
from tilewright.rtl.csd.kernel import AttentionKernel
from tilewright.rtl.csd.staging import GroupBuffer
from tilewright.rtl.csd.vectors import Turns, Vectors
from tilewright.rtl.csd.writer import Writer
from tilewright.rtl.host import HostDecoder, HostPort
from tilewright.rtl.layouts import layout_of
from tilewright.rtl.lib.arbiter import RoundRobin
from tilewright.rtl.lib.fifo import StreamFifo

__all__ = ["Top"]

_READS, _WRITES = range(2)


class Top(wiring.Component):
    """Decoder, fetch unit, writer, kernels, argtopk unit, flash controllers and the drive's DRAM.

    Commands that read the cache and those that write it have a queue each. What a tick is charged to:

    | unit    | busy                                             | else                                               |
    | ------- | ------------------------------------------------ | -------------------------------------------------- |
    | fetch   | a head, a page or a push is handed on, or a page | queue: one waits to be taken; drain: kernels work; |
    |         | is left out                                      | idle                                               |
    | argtopk | it searches                                      | idle                                               |
    | channel | its bus moves something                          | array: an operation is under way; idle             |

    Black boxes, by path: `vectors.lines`, `buffer.groups`, `buffer.sums`, `tables.table`, `controller_<c>.cells`.

    Parameters
    ----------
    params : CsdParams
        Structure; times of the flash are registers, see `arch.csd.REGISTERS`.
    order : str
        `flash.placement.order`.
    types : tuple of int
        The type of each page of a block, see `arch.csd.page_types`.
    depth : int
        Commands that the code memory holds.

    Members
    -------
    ==== === ======== ==================================================
    host Out HostPort regions as `arch.csd.hostmap` lays them out
    ==== === ======== ==================================================
    """

    def __init__(self, *, params: CsdParams, order: str, types, depth: int):
        self._params, self._order, self._types, self._depth = params, order, tuple(types), depth
        super().__init__({"host": Out(HostPort)})

    def elaborate(self, platform):
        m = Module()
        p = self._params
        m.submodules.host = host = HostDecoder(hostmap(p, self._depth))
        connect(m, flipped(self.host), host.host)
        register = dict(zip(REGISTERS, host.registers, strict=True))
        clear = host.start

        # What arbitrates begins every run alike.
        renewed = ResetInserter(clear)
        m.submodules.decoder = decoder = CommandDecoder(depth=self._depth)
        fetch = Fetch(params=p, depth=self._depth)
        m.submodules.fetch = renewed(fetch)
        m.submodules.writer = writer = Writer(params=p, order=self._order)
        vectors = Vectors(params=p, users=p.kernels)
        m.submodules.vectors = renewed(vectors)
        m.submodules.buffer = buffer = GroupBuffer(params=p)
        staged = StagedPages(params=p, ports=p.kernels + 1)
        m.submodules.staged = renewed(staged)
        m.submodules.tables = tables = PageTables(params=p)
        topk = ArgTopK(lanes=p.lanes, keys=max(p.max_tokens, p.max_channels))
        m.submodules.topk = renewed(topk)
        kernels, controllers = [], []
        for k in range(p.kernels):
            kernels.append(AttentionKernel(params=p))
            m.submodules[f"kernel_{k}"] = renewed(kernels[k])
        for c in range(p.flash.channels):
            controller = FlashController(params=p, types=self._types, ports=p.kernels + 1)
            m.submodules[f"controller_{c}"] = controller
            controllers.append(controller)

        m.d.comb += [
            host.done.eq(~decoder.run),
            decoder.clear.eq(clear),
            fetch.anew.eq(decoder.anew),
            decoder.length.eq(register["length"]),
            decoder.draining.eq(any_of([controller.working for controller in controllers])),
            writer.clear.eq(clear),
            *(kernel.configuration.eq(decoder.configuration) for kernel in kernels),
            *(kernel.span_groups.eq(writer.span_groups) for kernel in kernels),
        ]
        self._code(m, host.code, decoder, clear)
        ends = self._commands(m, decoder, fetch, writer, kernels, clear)
        self._log(m, host.log, ends)
        self._derive(m, decoder.configuration, writer, fetch)
        self._pages(m, fetch, writer, tables, staged, controllers)
        for controller in controllers:
            m.d.comb += [controller.clear.eq(clear), controller.anew.eq(decoder.anew)]
            self._times(m, controller.times, register)
        forwarded = self._lines(m, fetch, writer, kernels, controllers, staged, clear, decoder.anew)
        self._dram(m, writer, kernels, fetch, staged, vectors, buffer, clear, decoder.anew)
        self._topk(m, topk, kernels, clear, decoder.anew)

        counted = {
            "channel_pages": [fetch.taken[1]],
            "channel_pages_skipped": [*fetch.skipped[p.kernels :]],
            "token_pages": [fetch.taken[0]],
            "token_pages_skipped": [*fetch.skipped[: p.kernels]],
            "other_pages": [writer.page.valid & writer.page.ready],
            "programs": [writer.push.any() & (writer.push_kind == PROGRAM)],
            "erases": [writer.push.any() & (writer.push_kind == ERASE)],
            "forwarded_lines": forwarded,
            "vector_lines": [vectors.read_lines, vectors.written_lines],
            "group_lines": [writer.buffer_write, writer.buffer_read, staged.read],
            "products": [kernel.products for kernel in kernels],
            "exponentials": [kernel.exponentials for kernel in kernels],
            "compared_words": [topk.compares],
            "scalar_steps": [kernel.scalar_steps for kernel in kernels],
        }
        works = any_of([kernel.busy for kernel in kernels])
        idle, array = CAUSES.index("idle"), CAUSES.index("array")
        queue, drain = CAUSES.index("queue"), CAUSES.index("drain")
        units = [
            (decoder.working, decoder.stall),
            (writer.working, writer.stall),
            (fetch.working, Mux(fetch.waits, queue, Mux(works, drain, idle))),
            (topk.busy, Const(idle)),
            *((kernel.working, kernel.stall) for kernel in kernels),
            *((unit.bus, Mux(unit.unfinished, array, idle)) for unit in controllers),
        ]
        self._count(m, host.status, decoder.run, [counted[name] for name in COUNTERS], units, clear)
        return m

    def _code(self, m, port, decoder, clear):
        m.submodules.code = code = Memory(shape=len(port.wdata), depth=self._depth, init=[])
        read, write = code.read_port(), code.write_port(granularity=32)
        m.d.comb += [
            read.addr.eq(Mux(decoder.run | clear, decoder.code_addr, port.addr)),
            port.rdata.eq(read.data),
            write.addr.eq(port.addr),
            write.data.eq(port.wdata),
            write.en.eq(port.we),
            decoder.code_data.eq(read.data[: layout_of(ISA.record("code")).size]),
        ]

    def _commands(self, m, decoder, fetch, writer, kernels, clear):
        """The two queues. Returns when which commands end, and the first tick of each."""
        p = self._params
        record = layout_of(ISA.record("code"))
        waiting = data.StructLayout({"command": record, "number": len(decoder.number)})
        queues = []
        for kind, name in enumerate(("reads", "writes")):
            queue = StreamFifo(shape=waiting, depth=p.command_queue, always_ready=True)
            m.submodules[name] = queue
            m.d.comb += [
                queue.i.valid.eq(decoder.dispatch[kind]),
                queue.i.payload.command.eq(decoder.command),
                queue.i.payload.number.eq(decoder.number),
                decoder.full[kind].eq(queue.level == p.command_queue),
            ]
            queues.append(queue.o)
        reads, writes = queues
        attends = Signal()
        now = Signal(waiting)  # the writer's
        m.d.comb += [
            attends.eq(reads.payload.command.op == OP["ATTEND"]),
            fetch.tick.eq(decoder.tick),
            fetch.configuration.eq(decoder.configuration),
            fetch.valid.eq(reads.valid & attends),
            fetch.command.eq(reads.payload.command),
            fetch.number.eq(reads.payload.number),
            now.eq(Mux(writes.valid, writes.payload.as_value(), reads.payload.as_value())),
            writer.configuration.eq(decoder.configuration),
            writer.valid.eq(writes.valid | (reads.valid & ~attends)),
            writer.command.eq(now.command),
            writes.ready.eq(writer.pop),
            reads.ready.eq(fetch.pop | (writer.pop & ~writes.valid)),
            decoder.busy[_READS].eq(reads.valid | any_of([kernel.busy for kernel in kernels])),
            decoder.busy[_WRITES].eq(writes.valid),
        ]
        # Of the heads that a kernel has: the one that it works on, and the one that follows.
        of_heads = data.StructLayout({"number": len(decoder.number), "first": TICK_BITS})
        attended = []
        for k, kernel in enumerate(kernels):
            numbers = StreamFifo(shape=of_heads, depth=2, always_ready=True)
            m.submodules[f"numbers_{k}"] = ResetInserter(clear)(numbers)
            m.d.comb += [
                numbers.i.valid.eq(fetch.heads[k].valid),
                numbers.i.payload.number.eq(fetch.number),
                numbers.i.payload.first.eq(fetch.begun),
                numbers.o.ready.eq(kernel.done),
            ]
            attended.append((kernel.done, numbers.o.payload.number, numbers.o.payload.first, decoder.tick))
        first = Signal(TICK_BITS)
        with m.If(writer.loads):
            m.d.sync += first.eq(decoder.tick)
        configures = (
            decoder.run & decoder.working & (decoder.number != decoder.length) & ~decoder.dispatch.any()
        )
        return [
            (configures, decoder.number, decoder.tick, decoder.tick),
            (writer.pop, now.number, first, decoder.tick),
            *attended,
        ]

    def _log(self, m, port, ends):
        """First tick and end of each command; of an ATTEND, its last head writes last."""
        m.submodules.log = log = Memory(shape=64, depth=self._depth, init=[])
        read = log.read_port()
        m.d.comb += [read.addr.eq(port.addr), port.rdata.eq(read.data)]
        # Heads of one command may end in the same tick: one of them writes.
        for i, (done, number, first, tick) in enumerate(ends):
            same = any_of([other & (number == theirs) for other, theirs, _, _ in ends[:i]])
            write = log.write_port()
            m.d.comb += [
                write.addr.eq(number),
                write.data.eq(Cat(first, (tick + 1)[:TICK_BITS])),
                write.en.eq(done & ~same),
            ]

    def _derive(self, m, config, writer, fetch):
        """Quotients that follow from configuration and command."""
        m.d.comb += [
            writer.channel_groups.eq(config.d // config.page_channels),
            fetch.channel_groups.eq(writer.channel_groups),
            writer.span_groups.eq(config.span // config.page_tokens),
            writer.first_group.eq(writer.command.first // config.page_tokens),
            writer.first_row.eq(writer.command.first % config.page_tokens),
        ]

    def _pages(self, m, fetch, writer, tables, staged, controllers):
        """Tables, and what the controllers are given."""
        connect(m, writer.page, fetch.page)
        connect(m, fetch.staged, staged.i)
        m.d.comb += [
            tables.lookup.eq(fetch.lookup),
            tables.entry.eq(fetch.entry),
            fetch.channel.eq(tables.channel),
            fetch.address.eq(tables.address),
            tables.assign.eq(writer.assign),
            tables.assign_entry.eq(writer.assign_entry),
            tables.assign_address.eq(writer.assign_address),
            writer.assign_channel.eq(tables.assign_channel),
            fetch.ready.eq(Cat(controller.ready for controller in controllers)),
            writer.ready.eq(fetch.ready),
            writer.others.eq(fetch.push),
        ]
        for c, controller in enumerate(controllers):
            m.d.comb += [
                controller.push.eq(fetch.push[c] | writer.push[c]),
                controller.kind.eq(Mux(fetch.push[c], READ, writer.push_kind)),
                controller.address.eq(
                    Mux(fetch.push[c], fetch.push_address.as_value(), writer.push_address.as_value())
                ),
                controller.job.eq(fetch.push_job),
                controller.write.eq(writer.cell_write[c]),
                controller.write_address.eq(writer.assign_address),
                controller.write_word.eq(writer.cell_word),
                controller.write_data.eq(writer.cell_data),
            ]

    def _times(self, m, times, register):
        kinds, types = ("read", "program", "erase"), ("lsb", "csb", "msb")
        m.d.comb += [
            *(times.command[i].eq(register[f"{kind}_command"]) for i, kind in enumerate(kinds)),
            *(times.command_plane[i].eq(register[f"{kind}_command_plane"]) for i, kind in enumerate(kinds)),
            times.page_transfer.eq(register["page_transfer"]),
            *(times.read[i].eq(register[f"read_{name}"]) for i, name in enumerate(types)),
            *(times.program[i].eq(register[f"program_{name}"]) for i, name in enumerate(types)),
            times.erase.eq(register["erase"]),
        ]

    def _lines(self, m, fetch, writer, kernels, controllers, staged, clear, anew):
        """Rows from controllers and group buffer to kernels and writer. Returns which kernels get a line."""
        sources = [*controllers, staged]
        grants = [[] for _ in sources]
        forwarded = []
        for n in range(len(kernels) + 1):
            m.submodules[f"switch_{n}"] = switch = PortSwitch(sources=len(sources))
            here = Cat(source.valid & (source.port == n) for source in sources)
            line = pick(here, [source.line.as_value() for source in sources])
            user = kernels[n] if n < len(kernels) else writer
            valid, target = (user.valid, user.line) if n < len(kernels) else (user.line_valid, user.line)
            m.d.comb += [
                switch.clear.eq(clear),
                switch.anew.eq(anew),
                switch.requests.eq(Cat(source.request[n] for source in sources)),
                switch.releases.eq(Cat(source.releases[n] for source in sources)),
                valid.eq(here.any()),
                target.eq(line),
            ]
            for i, grant in enumerate(grants):
                grant.append(switch.grant[i])
            if n < len(kernels):
                forwarded.append(valid)
        for source, grant in zip(sources, grants, strict=True):
            m.d.comb += source.grant.eq(any_of(grant))
        return forwarded

    def _dram(self, m, writer, kernels, fetch, staged, vectors, buffer, clear, anew):
        m.d.comb += [
            vectors.anew.eq(anew),
            vectors.first_read.eq(writer.vector_read),
            vectors.first_from.eq(writer.vector_address),
            vectors.first_write.eq(writer.vector_write),
            vectors.first_to.eq(writer.vector_write_address),
            vectors.first_data.eq(writer.vector_write_data),
            writer.vector_data.eq(vectors.data),
            vectors.read.eq(Cat(kernel.vector_read for kernel in kernels)),
            vectors.write.eq(Cat(kernel.vector_write for kernel in kernels)),
        ]
        turn = RoundRobin(count=len(kernels))
        m.submodules.sum_turn = ResetInserter(clear | anew)(turn)
        slots = []
        for k, kernel in enumerate(kernels):
            slot = Signal.like(kernel.head.payload.slot, name=f"slot_{k}")
            with m.If(kernel.head.valid):
                m.d.sync += slot.eq(kernel.head.payload.slot)
            slots.append(Cat(kernel.sum_word, slot))
            connect(m, fetch.heads[k], kernel.head)
            connect(m, kernel.ask, fetch.asks[k])
            connect(m, kernel.words, fetch.words[k])
            m.d.comb += [
                fetch.limits[k].eq(kernel.limit),
                vectors.read_from[k].eq(kernel.vector_from),
                kernel.vector_reads.eq(vectors.reads[k]),
                kernel.vector_data.eq(vectors.data),
                vectors.write_to[k].eq(kernel.vector_to),
                vectors.write_data[k].eq(kernel.vector_write_data),
                kernel.vector_writes.eq(vectors.writes[k]),
                kernel.sum_reads.eq(turn.grant[k]),
                kernel.sum_data.eq(buffer.sum_data),
            ]
        m.d.comb += [
            turn.requests.eq(Cat(kernel.sum_read for kernel in kernels)),
            turn.ready.eq(1),
            buffer.sum_read.eq(turn.valid),
            buffer.sum_read_at.eq(pick(turn.grant, slots)),
            buffer.write.eq(writer.buffer_write),
            buffer.write_at.eq(writer.buffer_write_at),
            buffer.write_data.eq(writer.buffer_write_data),
            buffer.accumulate.eq(writer.buffer_accumulate),
            buffer.fresh.eq(writer.buffer_fresh),
            buffer.sum_at.eq(writer.buffer_sum_at),
            # The writer reads for programs of tokens only, when no kernel works.
            buffer.read.eq(writer.buffer_read | staged.read),
            buffer.read_at.eq(Mux(staged.read, staged.read_at.as_value(), writer.buffer_read_at.as_value())),
            writer.buffer_read_data.eq(buffer.read_data),
            staged.read_data.eq(buffer.read_data),
        ]

    def _topk(self, m, topk, kernels, clear, anew):
        m.submodules.topk_turns = turns = Turns(users=len(kernels))
        m.d.comb += [
            turns.clear.eq(clear),
            turns.anew.eq(anew),
            turns.wants.eq(Cat(kernel.topk_wants for kernel in kernels)),
            turns.releases.eq(Cat(kernel.topk_releases for kernel in kernels)),
        ]
        for port, name in (
            (topk.write_enable, "write"),
            (topk.write_address, "address"),
            (topk.write_data, "keys"),
            (topk.start, "start"),
            (topk.n, "n"),
            (topk.take, "take"),
            (topk.local, "local"),
        ):
            m.d.comb += port.eq(pick(turns.has, [getattr(kernel, f"topk_{name}") for kernel in kernels]))
        for k, kernel in enumerate(kernels):
            m.d.comb += [
                kernel.topk_has.eq(turns.has[k]),
                kernel.topk_valid.eq(topk.valid & turns.has[k]),
                kernel.topk_index.eq(topk.index),
                kernel.topk_mask.eq(topk.mask),
                kernel.topk_last.eq(topk.last & turns.has[k]),
            ]

    def _count(self, m, status, run, counted, units, clear):
        """Ticks, counters and stalls, in the order of `arch.csd.status_names`."""
        events = [run, *(tree_sum(c) for c in counted)]
        for working, stall in units:
            events += [run & working, *(run & ~working & (stall == k) for k in range(len(CAUSES)))]
        for port, event in zip(status, events, strict=True):
            counter = Signal(32)
            with m.If(clear):
                m.d.sync += counter.eq(0)
            with m.Else():
                m.d.sync += counter.eq(counter + event)
            m.d.comb += port.eq(counter)
