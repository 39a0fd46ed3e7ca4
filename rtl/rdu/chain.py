"""Nested loops in hardware: when a unit may take its next iteration, and which events that is."""

from amaranth.hdl import Assert, Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out

from tilewright.arch.rdu import COUNT_BITS, LEVELS, TOKENS, TOKENS_HELD, chain_fields

__all__ = ["CHAIN_LAYOUT", "EVENTS", "CounterChain", "chain_of", "event"]

CHAIN_LAYOUT = data.StructLayout({f.name: unsigned(f.bits) for f in chain_fields()})
EVENTS = LEVELS + 2  # a level has three bits; beyond the outermost it is the outermost


def chain_of(m: Module, config, prefix: str = "") -> Signal:
    """The chain's part of a configuration record, its fields' names beginning with `prefix`."""
    chain = Signal(CHAIN_LAYOUT, name=f"{prefix}chain")
    m.d.comb += [getattr(chain, f.name).eq(getattr(config, prefix + f.name)) for f in chain_fields()]
    return chain


def event(events, level):
    """Whether the event of that level happens."""
    return events.bit_select(level, 1)


class CounterChain(wiring.Component):
    """A chain of counters, level 0 the innermost, with control tokens at both ends of a level.

    ``start`` at tick t makes the first iteration ready at t + 1 at the earliest, and leaves ``hold<i>`` tokens at
    input i, whatever it held before. Where the iteration at hand is the first of ``wait_level``, it is ready only with
    a token held from each input in ``wait``; ``step`` takes them. Where it is the last of ``signal_level``, ``step``
    raises ``signal`` in the same tick. Steps are at least ``interval`` ticks apart. A token that comes in at tick t
    counts from t + 1, with those of the tick of ``start``; more than 15 held at one input fail an assertion, and so
    does a step without ``ready``.

    Parameters
    ----------
    levels : int
        Counters, 1..LEVELS; those beyond count to one.

    Members
    -------
    ======== === ==================== ==============================================================
    start    In  1                    begin; `config` is valid from now on
    config   In  CHAIN_LAYOUT         loop counts, tokens, interval
    tokens   In  TOKENS               tokens that come in
    step     In  1                    the iteration at hand is done
    running  Out 1                    there is an iteration at hand
    ready    Out 1                    and nothing in the chain holds it up
    missing  Out 1                    a token does
    pausing  Out 1                    the interval does
    counters Out array(COUNT_BITS)    loop indices of the iteration at hand, LEVELS of them
    first    Out EVENTS               bit n: it is the first of level n
    last     Out EVENTS               bit n: it is the last of level n
    signal   Out TOKENS               tokens that go out
    ======== === ==================== ==============================================================
    """

    def __init__(self, *, levels: int):
        if not 1 <= levels <= LEVELS:
            raise ValueError(f"levels must be in 1..{LEVELS}, not {levels!r}")
        self._levels = levels
        super().__init__(
            {
                "start": In(1),
                "config": In(CHAIN_LAYOUT),
                "tokens": In(TOKENS),
                "step": In(1),
                "running": Out(1),
                "ready": Out(1),
                "missing": Out(1),
                "pausing": Out(1),
                "counters": Out(data.ArrayLayout(unsigned(COUNT_BITS), LEVELS)),
                "first": Out(EVENTS),
                "last": Out(EVENTS),
                "signal": Out(TOKENS),
            }
        )

    def elaborate(self, platform):
        m = Module()
        c = self.config
        zero, end = [], []
        for n in range(self._levels):
            counter = Signal(COUNT_BITS, name=f"counter_{n}")
            count = getattr(c, f"count{n}")
            m.d.comb += self.counters[n].eq(counter)
            zero.append(counter == 0)
            end.append(counter + 1 >= count)
            with m.If(self.start):
                m.d.sync += counter.eq(0)
            with m.Elif(self.step & self.last[n]):
                m.d.sync += counter.eq(Mux(self.last[n + 1], 0, counter + 1))
        for events, flags in ((self.first, zero), (self.last, end)):
            m.d.comb += events[0].eq(1)
            for n in range(1, EVENTS):
                m.d.comb += events[n].eq(events[n - 1] & (flags[n - 1] if n <= self._levels else Const(1)))

        waits, needs = Signal(TOKENS), Signal()
        held = [Signal(range(TOKENS_HELD + 1), name=f"held_{i}") for i in range(TOKENS)]
        m.d.comb += [
            waits.eq(Mux(self.running & event(self.first, c.wait_level), c.wait, 0)),
            needs.eq((waits & ~Cat(h != 0 for h in held)).any()),
        ]
        for i, h in enumerate(held):
            with m.If(self.start):
                hold = getattr(c, f"hold{i}")
                m.d.sync += [
                    h.eq(hold + self.tokens[i]),
                    Assert(~(self.tokens[i] & (hold == TOKENS_HELD)), "too many tokens held at the start"),
                ]
            with m.Else():
                m.d.sync += [
                    h.eq(h + self.tokens[i] - (self.step & waits[i])),
                    Assert(
                        ~(self.tokens[i] & (h == TOKENS_HELD) & ~(self.step & waits[i])),
                        "too many tokens held",
                    ),
                ]

        gap = Signal(len(c.interval))
        with m.If(self.start):
            m.d.sync += gap.eq(0)
        with m.Elif(self.step):
            m.d.sync += gap.eq(Mux(c.interval == 0, 0, c.interval - 1))
        with m.Elif(gap != 0):
            m.d.sync += gap.eq(gap - 1)

        m.d.comb += [
            self.missing.eq(needs),
            self.pausing.eq(self.running & (gap != 0)),
            self.ready.eq(self.running & ~needs & (gap == 0)),
            self.signal.eq(Mux(self.step & event(self.last, c.signal_level), c.signal, 0)),
        ]
        with m.If(self.start):
            m.d.sync += self.running.eq(1)
        with m.Elif(self.step & self.last[LEVELS]):
            m.d.sync += self.running.eq(0)
        m.d.sync += Assert(~(self.step & ~self.ready), "a step of an iteration that was not ready")
        return m
