"""The socket behind a host port."""

from amaranth.hdl import Array, C, Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import Out, connect, flipped

from tilewright.arch.rdu import (
    ARGS,
    CODE,
    CONFIG_SWITCH,
    CONFIG_TOKEN,
    DRAM_TIMINGS,
    NETWORKS,
    TIERS,
    RduParams,
    is_pcu,
)
from tilewright.arch.rdu import WORD_BITS as PACKET_WORD_BITS
from tilewright.arch.rdu_host import (
    ACTIVITIES,
    CONFIG_BITS,
    COUNTED,
    RECORD_BITS,
    REGISTERS,
    hostmap,
    positions,
)
from tilewright.rtl.host import HostDecoder, HostPort
from tilewright.rtl.layouts import layout_of
from tilewright.rtl.lib.memory import BlackBoxMemory
from tilewright.rtl.rdu.channel import Channel
from tilewright.rtl.rdu.config import ConfigBus, heard
from tilewright.rtl.rdu.dma import Dma
from tilewright.rtl.rdu.lines import LineMemory
from tilewright.rtl.rdu.network import Network, total
from tilewright.rtl.rdu.sequencer import Sequencer
from tilewright.rtl.rdu.shared import SharedModule
from tilewright.rtl.rdu.tile import AgcuTile, PcuTile, PmuTile, metered, probe_bus
from tilewright.rtl.rdu.tokens import TokenNetwork

__all__ = ["Top"]


class Top(wiring.Component):
    """A grid of units, its networks, AGCUs and memories, sequencer and DMA.

    Black boxes: `records`, the configuration memory; `pmu_<x>_<y>.unit.unit.bank_<b>`; and `hbm`, `ddr` and `remote`,
    as far as the params give them lines. Each memory has a port for every channel, then one for every line of the DMA's
    beat.

    Parameters
    ----------
    params : RduParams
        Widths, counts, and what of the timing is not a register (see `arch.rdu_host.REGISTERS`).
    depth : int
        Operations that the code memory holds, a power of two; and sections, arguments and configuration records.

    Members
    -------
    ==== === ======== ==================================================
    host Out HostPort regions as `arch.rdu_host.hostmap` lays them out
    ==== === ======== ==================================================
    """

    def __init__(self, *, params: RduParams, depth: int):
        self._params, self._depth = params, depth
        super().__init__({"host": Out(HostPort)})

    def elaborate(self, platform):
        m = Module()
        p = self._params
        m.submodules.decoder = decoder = HostDecoder(hostmap(p, self._depth))
        connect(m, flipped(self.host), decoder.host)
        register = dict(zip(REGISTERS, decoder.registers, strict=True))
        m.submodules.sequencer = sequencer = Sequencer(depth=self._depth)
        latencies = ("program_load", "argument_load", "hardware_launch", None, None, "host_launch")
        m.d.comb += [
            decoder.done.eq(~sequencer.run),
            sequencer.clear.eq(decoder.start),
            sequencer.length.eq(register["length"]),
            *(sequencer.latency[k].eq(register[name]) for k, name in enumerate(latencies) if name),
        ]
        probe = probe_bus(self._depth).create(path=("probe",))
        m.d.comb += [
            probe.clear.eq(decoder.start),
            probe.run.eq(sequencer.run),
            probe.tick.eq(sequencer.tick),
            probe.kernel.eq(sequencer.kernel),
            probe.outside.eq(sequencer.outside),
            probe.finished.eq(sequencer.finished),
            probe.number.eq(sequencer.number),
            probe.activity.eq(decoder.activity.addr),
            probe.entry.eq(decoder.spans.addr),
        ]
        bus, base_of = self._records(m, decoder, sequencer)
        m.submodules.dma = dma = Dma(lines=p.copy_lines)
        m.d.comb += [
            dma.start.eq(sequencer.copy),
            dma.operation.eq(sequencer.operation),
            dma.p.eq(register["copy_p"]),
            dma.q.eq(register["copy_q"]),
            *(a.eq(register[f"latency_{tier}"]) for a, tier in zip(dma.latency, TIERS, strict=True)),
            sequencer.copying.eq(dma.active),
        ]

        tiles = self._tiles(m, sequencer.start, bus, probe)
        agcus = self._agcus(m, sequencer.start, bus, probe, base_of)
        networks = self._networks(m, sequencer.start, bus, tiles, agcus)
        lines, rows = self._memories(m, sequencer.start, register, agcus, dma)

        units = [*tiles.values(), *agcus]
        m.d.comb += sequencer.quiet.eq(
            Cat(*(unit.done for unit in units), *(network.quiet for network in networks)).all()
        )
        self._log(m, decoder.log, sequencer, dma)
        counts = [count for unit in units for count in unit.counts]
        counts.append(self._own(m, sequencer, probe, "sequencer", sequencer.activity))
        counts.append(self._own(m, sequencer, probe, "dma", dma.activity))
        self._read(m, decoder, counts, [unit.span for unit in units])

        def all_of(name):
            return total(getattr(tile, name) for tile in tiles.values() if hasattr(tile, name))

        events = {
            "ticks": sequencer.run,
            "iterations": all_of("iterates"),
            "words_read": all_of("words_read"),
            "words_written": all_of("words_written"),
            "bank_conflicts": all_of("conflict"),
            "dropped": all_of("dropped"),
            **{f"{name}_hops": network.hops for name, network in zip(NETWORKS, networks, strict=True)},
            **{f"{tier}_lines": count for tier, count in zip(TIERS, lines, strict=True)},
            **rows,
            "copied_lines": dma.moved,
            "launches": sequencer.finished,
        }
        for port, name in zip(decoder.status, ("ticks", *COUNTED), strict=True):
            counter = Signal(32, name=f"counter_{name}")
            m.d.sync += counter.eq(Mux(decoder.start, 0, counter + events[name]))
            m.d.comb += port.eq(counter)
        return m

    # ---- what the sequencer reads ---------------------------------------------------------------------

    def _host_memory(self, m, name, port, domain="sync"):
        """A memory that the host writes and reads back. Gives it."""
        m.submodules[name] = memory = Memory(shape=len(port.wdata), depth=self._depth, init=[])
        words = len(port.we)
        write = memory.write_port(granularity=None if words == 1 else 32)
        m.d.comb += [write.addr.eq(port.addr), write.data.eq(port.wdata), write.en.eq(port.we)]
        return memory

    def _records(self, m, decoder, sequencer):
        """Code, directory, configuration and arguments: the bus, and what reads an argument register."""
        code = self._host_memory(m, "code", decoder.code)
        read = code.read_port()
        reads = sequencer.run | decoder.start
        m.d.comb += [
            read.addr.eq(Mux(reads, sequencer.code_addr, decoder.code.addr)),
            decoder.code.rdata.eq(read.data),
            sequencer.code_data.eq(read.data[: layout_of(CODE).size]),
        ]
        sections = self._host_memory(m, "sections", decoder.sections)
        entry, back = sections.read_port(domain="comb"), sections.read_port()
        m.d.comb += [
            entry.addr.eq(sequencer.section),
            sequencer.entry.eq(entry.data[: len(sequencer.entry.as_value())]),
            back.addr.eq(decoder.sections.addr),
            decoder.sections.rdata.eq(back.data),
        ]
        args = self._host_memory(m, "arguments", decoder.args)
        read = args.read_port()
        argument = Signal(layout_of(ARGS))
        m.d.comb += [
            read.addr.eq(Mux(sequencer.run, sequencer.args_address, decoder.args.addr)),
            decoder.args.rdata.eq(read.data),
            argument.as_value().eq(read.data),
        ]
        registers = Memory(shape=len(argument.value), depth=1 << len(argument.index), init=[])
        m.submodules.registers = registers
        write = registers.write_port()
        m.d.comb += [
            write.addr.eq(argument.index),
            write.data.eq(argument.value),
            write.en.eq(sequencer.args_valid),
        ]

        def base_of(index):
            port = registers.read_port(domain="comb")
            m.d.comb += port.addr.eq(index)
            return port.data

        m.submodules.records = config = BlackBoxMemory(width=CONFIG_BITS, depth=self._depth)
        bus = ConfigBus.create(path=("bus",))
        m.d.comb += [
            # Behind the last record nothing is read: the address may lie beyond the memory.
            config.read_enable.eq(sequencer.run & (sequencer.config_address < self._depth)),
            config.read_address.eq(sequencer.config_address),
            bus.off.eq(sequencer.off),
            bus.valid.eq(sequencer.config_valid),
            bus.record.eq(config.read_data[:RECORD_BITS]),
            bus.kind.eq(config.read_data[RECORD_BITS:]),
        ]
        return bus, base_of

    # ---- units ----------------------------------------------------------------------------------------

    def _listens(self, m, unit, start, bus, probe):
        m.d.comb += unit.start.eq(start)
        connect(m, bus, unit.bus)
        connect(m, probe, unit.probe)

    def _tiles(self, m, start, bus, probe):
        tiles = {}
        for x, y in positions(self._params):
            kind = PcuTile if is_pcu(x, y) else PmuTile
            tile = SharedModule(kind, params=self._params, depth=self._depth)
            m.submodules[f"{'pcu' if is_pcu(x, y) else 'pmu'}_{x}_{y}"] = tile
            m.d.comb += [tile.x.eq(x), tile.y.eq(y)]
            self._listens(m, tile, start, bus, probe)
            tiles[x, y] = tile
        return tiles

    def _agcus(self, m, start, bus, probe, base_of):
        agcus = []
        for i in range(2 * self._params.agcus_per_side):
            m.submodules[f"agcu_{i}"] = agcu = SharedModule(AgcuTile, params=self._params, depth=self._depth)
            m.d.comb += [agcu.place.eq(i), agcu.base.eq(base_of(agcu.argument))]
            self._listens(m, agcu, start, bus, probe)
            agcus.append(agcu)
        return agcus

    def _networks(self, m, start, bus, tiles, agcus):
        """Vector and scalar network, and the tokens' wires."""
        p = self._params
        hit, record = heard(m, bus, CONFIG_SWITCH)
        networks = []
        for number, name in enumerate(NETWORKS):
            m.submodules[f"{name}_network"] = network = Network(params=p, network=name)
            m.d.comb += [
                network.start.eq(start),
                network.table_enable.eq(hit & (record.network == number)),
                network.table_x.eq(record.x),
                network.table_y.eq(record.y),
                network.table_port.eq(record.port),
                network.table_flow.eq(record.flow),
                network.table_out.eq(record.out),
                network.table_next.eq(record.next_flow),
            ]
            for (x, y), tile in tiles.items():
                if is_pcu(x, y):
                    connect(m, getattr(tile, name), getattr(network, f"in_{x}_{y}_0"))
                    for i in range(getattr(p, f"{name}_inputs")):
                        connect(m, getattr(network, f"out_{x}_{y}_{i}"), getattr(tile, f"{name}_{i}"))
                elif name == "vector":
                    connect(m, tile.read, getattr(network, f"in_{x}_{y}_0"))
                    connect(m, getattr(network, f"out_{x}_{y}_0"), tile.write)
            if name == "vector":
                for i, agcu in enumerate(agcus):
                    side, y = ("west", "east")[i // p.agcus_per_side], i % p.agcus_per_side
                    connect(m, agcu.load, getattr(network, f"{side}_in_{y}"))
                    connect(m, getattr(network, f"{side}_out_{y}"), agcu.store)
            networks.append(network)

        hit, record = heard(m, bus, CONFIG_TOKEN)
        m.submodules.tokens = tokens = TokenNetwork(params=p)
        m.d.comb += [
            tokens.start.eq(start),
            tokens.clear.eq(bus.off),
            tokens.enable.eq(hit),
            tokens.config.eq(record),
        ]
        for (x, y), tile in tiles.items():
            out, into = getattr(tokens, f"from_{x}_{y}"), getattr(tokens, f"to_{x}_{y}")
            if is_pcu(x, y):
                m.d.comb += [out.eq(tile.signal), tile.tokens.eq(into)]
            else:
                m.d.comb += [
                    out.eq(Cat(tile.write_signal, tile.read_signal)),
                    Cat(tile.write_tokens, tile.read_tokens).eq(into),
                ]
        for i, agcu in enumerate(agcus):
            m.d.comb += [
                getattr(tokens, f"from_agcu_{i}").eq(agcu.signal),
                agcu.tokens.eq(getattr(tokens, f"to_agcu_{i}")),
            ]
        return networks

    # ---- memories -------------------------------------------------------------------------------------

    def _memories(self, m, start, register, agcus, dma):
        """Off-chip memories with their channels. Gives the lines that move in this tick, by tier, and events of rows."""
        p = self._params
        grants = [[C(0, 1)] * len(TIERS) for _ in agcus]
        answers = [[None] * len(TIERS) for _ in agcus]
        moved = []
        rows = {
            f"{tier}_{what}": C(0)
            for tier in TIERS[:2]
            for what in ("activates", "row_conflicts", "refreshes")
        }
        found = Signal(p.copy_lines * p.lanes * PACKET_WORD_BITS)  # what the DMA read
        for k, tier in enumerate(TIERS):
            count = int(p.tier_lines[k])
            if not count:
                moved.append(C(0))
                continue
            groups = [range(c, len(agcus), int(p.channels[k])) for c in range(int(p.channels[k]))]
            groups = [group for group in groups if group]
            copies = tier != "remote"
            ports = len(groups) + copies * p.copy_lines
            memory = LineMemory(width=p.lanes * PACKET_WORD_BITS, depth=count, ports=ports)
            m.submodules[tier] = memory
            granted, channels = [], []
            for c, group in enumerate(groups):
                channel = Channel(params=p, count=len(group), tier=k)
                m.submodules[f"{tier}_channel_{c}"] = channel
                m.d.comb += [
                    channel.start.eq(start),
                    channel.p.eq(register[f"p_{tier}"]),
                    channel.q.eq(register[f"q_{tier}"]),
                    channel.timed.eq(register[f"timed_{tier}"]),
                    *(
                        a.eq(register[f"{name}_{tier}"])
                        for a, name in zip(channel.timing, DRAM_TIMINGS, strict=True)
                    ),
                    memory.read_enable[c].eq(channel.read_enable),
                    memory.read_line[c].eq(channel.read_line),
                    channel.read_data.eq(memory.read_data[c]),
                    memory.write_enable[c].eq(channel.write_enable),
                    memory.write_line[c].eq(channel.write_line),
                    memory.write_data[c].eq(channel.write_data),
                ]
                for n, i in enumerate(group):
                    agcu = agcus[i]
                    m.d.comb += [
                        agcu.latency[k].eq(register[f"latency_{tier}"] + channel.later),
                        channel.requests[n].eq(agcu.request[k]),
                        channel.lines[n].eq(agcu.line),
                        channel.writes[n].eq(agcu.write),
                        channel.data[n].eq(agcu.data),
                    ]
                    grants[i][k], answers[i][k] = channel.grants[n], channel.answer
                granted.append(channel.grants.any())
                channels.append(channel)
            moved.append(total(granted))
            if tier in TIERS[:2]:
                rows |= {
                    f"{tier}_activates": total(channel.activate for channel in channels),
                    f"{tier}_row_conflicts": total(channel.conflict for channel in channels),
                    f"{tier}_refreshes": total(channel.refreshes for channel in channels),
                }
            if copies:
                reads, writes = dma.source == k, dma.target == k
                for n in range(p.copy_lines):
                    port = len(groups) + n
                    width = p.lanes * PACKET_WORD_BITS
                    m.d.comb += [
                        memory.read_enable[port].eq(dma.reads[n] & reads),
                        memory.read_line[port].eq(dma.read_line + n),
                        memory.write_enable[port].eq((dma.writes[n] & writes).replicate(width // 8)),
                        memory.write_line[port].eq(dma.write_line + n),
                        memory.write_data[port].eq(found.word_select(n, width)),
                    ]
                with m.If(reads):
                    m.d.comb += found.eq(memory.read_data.as_value()[-len(found) :])
        for agcu, grant, answer in zip(agcus, grants, answers, strict=True):
            late = Signal(len(TIERS), name="granted_before")
            m.d.sync += late.eq(Cat(grant))
            m.d.comb += agcu.grant.eq(Cat(grant).any())
            for k, value in enumerate(answer):
                if value is not None:
                    with m.If(late[k]):
                        m.d.comb += agcu.answer.eq(value)
        return moved, rows

    # ---- counts and logs ------------------------------------------------------------------------------

    def _own(self, m, sequencer, probe, name, activity):
        """The count of a unit that works outside kernels as well."""
        always = probe_bus(self._depth).create(path=(f"{name}_probe",))
        m.d.comb += [
            always.clear.eq(probe.clear),
            always.run.eq(probe.run),
            always.kernel.eq(1),
            always.activity.eq(probe.activity),
        ]
        return metered(m, always, f"{name}_meter", activity)

    def _log(self, m, port, sequencer, dma):
        """Issue and end of each operation. A COPY's is written when the DMA is done."""
        m.submodules.log = log = Memory(shape=64, depth=self._depth, init=[])
        read = log.read_port()
        number, first = Signal.like(sequencer.number), Signal.like(sequencer.first)
        with m.If(sequencer.copy):
            m.d.sync += [number.eq(sequencer.number), first.eq(sequencer.first)]
        m.d.comb += [read.addr.eq(port.addr), port.rdata.eq(read.data)]
        for index, begin, enable in (
            (sequencer.number, sequencer.first, sequencer.retire),
            (number, first, dma.finished),
        ):
            write = log.write_port()
            m.d.comb += [
                write.addr.eq(index),
                write.data.eq(Cat(begin, sequencer.tick + 1)),
                write.en.eq(enable),
            ]

    def _read(self, m, decoder, counts, spans):
        """Counts of ticks and units' logs, as the host reads them: shown a tick after their address."""
        unit = decoder.activity.addr[ACTIVITIES.bit_length() - 1 :]
        m.d.sync += decoder.activity.rdata.eq(Array(counts)[unit])
        logger = Signal.like(decoder.spans.addr)
        m.d.sync += logger.eq(decoder.spans.addr >> self._depth.bit_length() - 1)
        m.d.comb += decoder.spans.rdata.eq(Array(spans)[logger])
