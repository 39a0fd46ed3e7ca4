"""Units with what belongs to each: its configuration registers, its counts of ticks and its log."""

from amaranth.hdl import Array, Cat, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.memory import Memory
from amaranth.lib.wiring import In, Out, connect, flipped
from amaranth.utils import bits_for

from tilewright.arch.rdu import (
    ARGS,
    CAUSES,
    CONFIG_AGCU,
    CONFIG_PCU,
    CONFIG_PMU,
    CONFIG_STAGE,
    LINE_BITS,
    TIERS,
    TOKENS,
    WORD_BITS,
    X_BITS,
    Y_BITS,
    RduParams,
)
from tilewright.arch.rdu_host import ACTIVITIES
from tilewright.rtl.lib.memory import BlackBoxMemory
from tilewright.rtl.rdu.agcu import Agcu
from tilewright.rtl.rdu.config import ConfigBus, configured
from tilewright.rtl.rdu.packet import packet_layout
from tilewright.rtl.rdu.pcu import Pcu
from tilewright.rtl.rdu.pmu import Pmu
from tilewright.rtl.rdu.sequencer import TICK_BITS

__all__ = ["AgcuTile", "Meter", "PcuTile", "PmuTile", "SpanLog", "metered", "probe_bus"]


def probe_bus(depth: int) -> wiring.Signature:
    """What the machine tells every meter and log, and what of them it reads.

    ======== === ======== =====================================================================
    clear    Out 1        a run begins in the next tick
    run      Out 1        this tick belongs to it
    tick     Out 32       its number
    kernel   Out 1        this tick belongs to a kernel
    outside  Out 4        otherwise, what the ticks of units count as
    finished Out 1        last tick of a kernel
    number   Out          the operation that it is
    activity Out          the count to read, shown in the same tick
    entry    Out          the log's entry to read, shown a tick later
    ======== === ======== =====================================================================
    """
    return wiring.Signature(
        {
            "clear": Out(1),
            "run": Out(1),
            "tick": Out(TICK_BITS),
            "kernel": Out(1),
            "outside": Out(4),
            "finished": Out(1),
            "number": Out(bits_for(depth - 1)),
            "activity": Out(range(ACTIVITIES)),
            "entry": Out(bits_for(depth - 1)),
        }
    )


class Meter(wiring.Component):
    """Counts the ticks of one unit by what it does.

    Members
    -------
    ======== === ========= =====================================
    clear    In  1         begin at 0
    run      In  1         this tick counts
    activity In  4         0 is busy, n is CAUSES[n - 1]
    index    In            the count to show: likewise
    count    Out 32        it
    ======== === ========= =====================================
    """

    clear: In(1)
    run: In(1)
    activity: In(4)
    index: In(range(ACTIVITIES))
    count: Out(32)

    def elaborate(self, platform):
        m = Module()
        counts = [Signal(32, name=f"count_{n}") for n in range(1 + len(CAUSES))]
        for n, count in enumerate(counts):
            with m.If(self.clear):
                m.d.sync += count.eq(0)
            with m.Elif(self.run & (self.activity == n)):
                m.d.sync += count.eq(count + 1)
        with m.If(self.index < len(counts)):
            m.d.comb += self.count.eq(Array(counts)[self.index])
        return m


class SpanLog(wiring.Component):
    """For each operation the first tick in which a unit was busy, and the last one plus 1; 0 where it never was.

    Parameters
    ----------
    depth : int
        Operations.

    Members
    -------
    ===== === ========= ===========================================
    probe In  probe_bus
    busy  In  1         in this tick of a kernel
    span  Out 64        entry `probe.entry`, first tick lowest
    ===== === ========= ===========================================
    """

    def __init__(self, *, depth: int):
        self._depth = depth
        super().__init__({"probe": In(probe_bus(depth)), "busy": In(1), "span": Out(64)})

    def elaborate(self, platform):
        m = Module()
        probe = self.probe
        m.submodules.entries = entries = Memory(shape=64, depth=self._depth, init=[])
        write, read = entries.write_port(), entries.read_port()
        first, end = Signal(TICK_BITS), Signal(TICK_BITS)
        first_now, end_now = Signal(TICK_BITS), Signal(TICK_BITS)
        busy = Signal()
        m.d.comb += [
            busy.eq(probe.kernel & self.busy),
            first_now.eq(Mux(busy & (end == 0), probe.tick, first)),
            end_now.eq(Mux(busy, probe.tick + 1, end)),
            write.addr.eq(probe.number),
            write.data.eq(Cat(first_now, end_now)),
            write.en.eq(probe.finished),
            read.addr.eq(probe.entry),
            self.span.eq(read.data),
        ]
        with m.If(probe.clear | probe.finished):
            m.d.sync += [first.eq(0), end.eq(0)]
        with m.Else():
            m.d.sync += [first.eq(first_now), end.eq(end_now)]
        return m


def metered(m: Module, probe, name: str, activity) -> Signal:
    """A meter on the bus. Gives the count that is read."""
    m.submodules[name] = meter = Meter()
    m.d.comb += [
        meter.clear.eq(probe.clear),
        meter.run.eq(probe.run),
        meter.activity.eq(Mux(probe.kernel, activity, probe.outside)),
        meter.index.eq(probe.activity),
    ]
    return meter.count


def logged(m: Module, probe, depth: int, busy) -> Signal:
    """A log on the bus. Gives the entry that is read."""
    m.submodules.log = log = SpanLog(depth=depth)
    connect(m, flipped(probe), log.probe)
    m.d.comb += log.busy.eq(busy)
    return log.span


def _tile_members(depth: int, meters: int) -> dict:
    return {
        "x": In(X_BITS),
        "y": In(Y_BITS),
        "start": In(1),
        "bus": In(ConfigBus),
        "probe": In(probe_bus(depth)),
        "done": Out(1),
        "counts": Out(data.ArrayLayout(unsigned(32), meters)),
        "span": Out(64),
    }


class PcuTile(wiring.Component):
    """A PCU at position (x, y).

    Members beside the PCU's streams and tokens, and `done`:
    `start` as the PCU's; `bus`, the configuration bus; `probe`, see `probe_bus`; `counts` and `span`, what is read by it;
    `iterates`, an iteration is taken in this tick.
    """

    def __init__(self, *, params: RduParams, depth: int):
        p, self._depth = params, depth
        self._params = p
        vector, scalar = (stream.Signature(packet_layout(n)) for n in (p.lanes, 1))
        super().__init__(
            {
                **_tile_members(depth, 1),
                **{f"vector_{i}": In(vector) for i in range(p.vector_inputs)},
                **{f"scalar_{i}": In(scalar) for i in range(p.scalar_inputs)},
                "vector": Out(vector),
                "scalar": Out(scalar),
                "tokens": In(TOKENS),
                "signal": Out(TOKENS),
                "iterates": Out(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        p = self._params
        m.submodules.unit = unit = Pcu(params=p)
        place = {"x": self.x, "y": self.y}
        m.d.comb += [
            unit.start.eq(self.start),
            unit.config.eq(configured(m, self.bus, CONFIG_PCU, "config", **place)),
            unit.tokens.eq(self.tokens),
            self.signal.eq(unit.signal),
            self.done.eq(unit.done),
        ]
        for s in range(p.stages):
            m.d.comb += unit.stage[s].eq(
                configured(m, self.bus, CONFIG_STAGE, f"stage_{s}", stage=s, **place)
            )
        for name in ("vector", "scalar"):
            connect(m, getattr(unit, name), flipped(getattr(self, name)))
            for i in range(getattr(p, f"{name}_inputs")):
                connect(m, flipped(getattr(self, f"{name}_{i}")), getattr(unit, f"{name}_{i}"))
        m.d.comb += [
            self.iterates.eq(self.probe.kernel & (unit.activity == 0)),
            self.counts[0].eq(metered(m, self.probe, "meter", unit.activity)),
            self.span.eq(logged(m, self.probe, self._depth, unit.activity == 0)),
        ]
        return m


class PmuTile(wiring.Component):
    """A PMU at position (x, y), its banks black boxes.

    Members beside the PMU's streams and tokens, `done`, `conflict`, `words_read`, `words_written` and `dropped`: see
    `PcuTile`; `counts` are of the write side and of the read side.
    """

    def __init__(self, *, params: RduParams, depth: int):
        p, self._depth = params, depth
        self._params = p
        packets = stream.Signature(packet_layout(p.lanes))
        super().__init__(
            {
                **_tile_members(depth, 2),
                "write": In(packets),
                "read": Out(packets),
                "write_tokens": In(TOKENS),
                "read_tokens": In(TOKENS),
                "write_signal": Out(TOKENS),
                "read_signal": Out(TOKENS),
                "conflict": Out(1),
                "words_read": Out(range(p.lanes + 1)),
                "words_written": Out(range(p.lanes + 1)),
                "dropped": Out(range(2 * p.lanes + 1)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.unit = unit = Pmu(params=self._params, memory=BlackBoxMemory)
        config = configured(m, self.bus, CONFIG_PMU, "config", x=self.x, y=self.y)
        activities = unit.write_activity, unit.read_activity
        m.d.comb += [unit.start.eq(self.start), unit.config.eq(config)]
        for side in ("write", "read"):
            m.d.comb += [
                getattr(unit, f"{side}_tokens").eq(getattr(self, f"{side}_tokens")),
                getattr(self, f"{side}_signal").eq(getattr(unit, f"{side}_signal")),
            ]
        connect(m, flipped(self.write), unit.write)
        connect(m, unit.read, flipped(self.read))
        for name in ("done", "conflict", "words_read", "words_written", "dropped"):
            m.d.comb += getattr(self, name).eq(getattr(unit, name))
        for k, (name, activity) in enumerate(zip(("write", "read"), activities, strict=True)):
            m.d.comb += self.counts[k].eq(metered(m, self.probe, f"{name}_meter", activity))
        busy = (activities[0] == 0) | (activities[1] == 0)
        m.d.comb += self.span.eq(logged(m, self.probe, self._depth, busy))
        return m


class AgcuTile(wiring.Component):
    """AGCU number `place`.

    Members beside the AGCU's streams, memory port and tokens, and `done`: see `PcuTile`; `argument` is the argument
    register to show as `base`.
    """

    def __init__(self, *, params: RduParams, depth: int):
        p, self._depth = params, depth
        self._params = p
        packets = stream.Signature(packet_layout(p.lanes))
        line = p.lanes * WORD_BITS
        super().__init__(
            {
                "place": In(CONFIG_AGCU.by_name["agcu"].bits),
                "start": In(1),
                "bus": In(ConfigBus),
                "probe": In(probe_bus(depth)),
                "done": Out(1),
                "counts": Out(data.ArrayLayout(unsigned(32), 1)),
                "span": Out(64),
                "argument": Out(ARGS.by_name["index"].bits),
                "base": In(ARGS.by_name["value"].bits),
                "latency": In(TICK_BITS).array(len(TIERS)),
                "store": In(packets),
                "load": Out(packets),
                "request": Out(len(TIERS)),
                "line": Out(LINE_BITS),
                "write": Out(line // 8),
                "data": Out(line),
                "grant": In(1),
                "answer": In(line),
                "tokens": In(TOKENS),
                "signal": Out(TOKENS),
            }
        )

    def elaborate(self, platform):
        m = Module()
        m.submodules.unit = unit = Agcu(params=self._params)
        config = configured(m, self.bus, CONFIG_AGCU, "config", agcu=self.place)
        m.d.comb += [unit.config.eq(config), self.argument.eq(config.argument)]
        m.d.comb += [getattr(unit, name).eq(getattr(self, name)) for name in _AGCU_INPUTS]
        m.d.comb += [a.eq(b) for a, b in zip(unit.latency, self.latency, strict=True)]
        m.d.comb += [getattr(self, name).eq(getattr(unit, name)) for name in _AGCU_OUTPUTS]
        connect(m, flipped(self.store), unit.store)
        connect(m, unit.load, flipped(self.load))
        m.d.comb += [
            self.counts[0].eq(metered(m, self.probe, "meter", unit.activity)),
            self.span.eq(logged(m, self.probe, self._depth, unit.activity == 0)),
        ]
        return m


_AGCU_INPUTS = ("start", "base", "grant", "answer", "tokens")
_AGCU_OUTPUTS = ("done", "request", "line", "write", "data", "signal")
