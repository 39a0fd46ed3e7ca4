"""The gate between the vector network and off-chip memory."""

from amaranth.hdl import Array, Assert, Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out

from tilewright.arch.formats import BF16
from tilewright.arch.rdu import (
    ARGS,
    CAUSE,
    CONFIG_AGCU,
    FORMATS,
    LINE_BITS,
    LOAD_LATENCY,
    SEQUENCE_BITS,
    TIERS,
    TOKENS,
    WORD_BITS,
    RduParams,
)
from tilewright.rtl.layouts import layout_of
from tilewright.rtl.lib.fifo import StreamFifo
from tilewright.rtl.rdu.chain import CounterChain, chain_of, event
from tilewright.rtl.rdu.packet import packet_layout

__all__ = ["Agcu"]

ADDRESS = ARGS.by_name["value"].bits
BYTE = 8
DIRECTION = {name: i for i, name in enumerate(CONFIG_AGCU.by_name["direction"].names)}
TIME_BITS = 48


class Agcu(wiring.Component):
    """An AGCU: in each iteration `words` elements at one address are loaded and sent, or received and stored.

    The address is base + sum of counter * stride, modulo 2**48, in bytes; its elements must lie in one line of memory
    and on a multiple of their size, or an assertion fails. Lanes behind `words` are 0 in a load and left out in a
    store. Elements of format bf16 are 2 bytes of memory, and the upper half of a word above zeros.

    A load's iteration is of the line before where the last one's line is the same, and it takes no tokens: it is taken
    when the chain is ready, and fewer than `in_flight` packets are under way: taken at an earlier tick, and not left
    at one. Any other one must be granted as well: it asks its channel for the line from the first tick that all else
    allows, and is taken in the tick of the grant. What is read is what was stored by grants of earlier ticks.
    Tokens go out with the iteration. Packets leave in order, and each is at the output at the latest of these: a tick
    after the one ahead has left; `LOAD_LATENCY` ticks after its iteration; and with a line of its own the tier's
    latency later than that.

    A store merges elements in a line buffer. A buffer that holds anything asks to be written, from the tick after its
    last iteration on, where the iteration at hand (be it ready or not) is of another line, where there is none, or
    where tokens are to go out. The grant writes and empties the buffer, and lets these tokens out in that tick: a
    store's iteration that raises tokens is the last one of its line. An iteration is taken when the chain is ready,
    there is a packet, and the buffer is empty, is granted in this tick, or holds the same line and no tokens.

    In a tick without an iteration the cause is: "output" for a packet that can't leave while `in_flight` are under way
    or no iteration is left; "token"; "operand" for a store without a packet; "interval"; "memory" while iterations are
    left; "pipeline" while a packet or a line is; "idle".

    Parameters
    ----------
    params : RduParams

    Members
    -------
    ======== === ====================== =================================================================
    start    In  1                      a run begins; the unit must be done
    config   In  layout_of(CONFIG_AGCU) constant from `start` to `done`
    base     In  48                     the argument register that `config` names; likewise
    latency  In  array(32), TIERS       ticks from a grant to the line, of each tier; likewise
    store    In  stream of packets      what is stored
    load     Out stream of packets      what was loaded
    request  Out TIERS                  a line of that tier is asked for
    line     Out LINE_BITS              its number
    write    Out bytes of a line        bytes to be written, none in a load
    data     Out bits of a line         what is written
    grant    In  1                      the request is granted in this tick
    answer   In  bits of a line         the line read that was granted in the tick before
    tokens   In  TOKENS                 control inputs
    signal   Out TOKENS                 control outputs
    done     Out 1                      nothing is left to do, or under way
    activity Out 4                      0 is busy: an iteration is taken; n is CAUSES[n - 1]
    ======== === ====================== =================================================================
    """

    def __init__(self, *, params: RduParams):
        p = self._params = params
        packets = stream.Signature(packet_layout(p.lanes))
        line = p.lanes * WORD_BITS
        super().__init__(
            {
                "start": In(1),
                "config": In(layout_of(CONFIG_AGCU)),
                "base": In(ADDRESS),
                "latency": In(32).array(len(TIERS)),
                "store": In(packets),
                "load": Out(packets),
                "request": Out(len(TIERS)),
                "line": Out(LINE_BITS),
                "write": Out(line // BYTE),
                "data": Out(line),
                "grant": In(1),
                "answer": In(line),
                "tokens": In(TOKENS),
                "signal": Out(TOKENS),
                "done": Out(1),
                "activity": Out(unsigned(4)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        p, c = self._params, self.config
        load, store = c.direction == DIRECTION["load"], c.direction == DIRECTION["store"]
        half = c.format == FORMATS.index("bf16")
        offset_bits = (p.lanes * WORD_BITS // BYTE).bit_length() - 1

        m.submodules.chain = chain = CounterChain(levels=p.agcu_counters)
        m.d.comb += [
            chain.start.eq(self.start & (load | store)),
            chain.config.eq(chain_of(m, c)),
            chain.tokens.eq(self.tokens),
        ]
        step, asks, room, full, empty = Signal(), Signal(), Signal(), Signal(), Signal()
        under_way = Signal()
        m.d.comb += chain.step.eq(step)

        # ---- addresses
        offsets = []
        for n in range(p.agcu_counters):
            offset = Signal(ADDRESS, name=f"offset_{n}")
            with m.If(chain.start):
                m.d.sync += offset.eq(0)
            with m.Elif(step & chain.last[n]):
                stride = getattr(c, f"stride{n}")
                m.d.sync += offset.eq(Mux(chain.last[n + 1], 0, offset + stride))
            offsets.append(offset)
        address, line, offset = Signal(ADDRESS), Signal(LINE_BITS), Signal(offset_bits)
        m.d.comb += [
            address.eq(sum(offsets, self.base)),
            offset.eq(address[:offset_bits]),
            line.eq(address[offset_bits:]),
        ]
        size = Mux(half, BF16.width // BYTE, WORD_BITS // BYTE)
        fits = (offset + c.words * size <= 1 << offset_bits) & ~offset[0] & (half | ~offset[1])
        fits = fits & (c.words != 0) & (c.words <= p.lanes)
        m.d.sync += [
            Assert(~step | fits, "elements that are not in one line, or not on multiples of their size"),
            Assert(~step | (address[offset_bits:] < 1 << LINE_BITS), "an address beyond every memory"),
        ]
        held = Signal(LINE_BITS)  # line of the last iteration
        same = Signal()  # as that of the iteration at hand; only after a first one
        some = Signal()
        m.d.comb += same.eq(some & (line == held))
        with m.If(self.start):
            m.d.sync += some.eq(0)
        with m.Elif(step):
            m.d.sync += [some.eq(1), held.eq(line)]

        stored = self._store(m, chain, step & store, store, offset, half, same)
        kept = self._load(m, chain, step & load, offset, half, same, room, full, under_way)
        m.d.comb += [
            asks.eq(Mux(load, chain.ready & room & ~kept, stored.asks)),
            self.request.eq(Mux(asks, 1 << c.tier, 0)),
            self.line.eq(Mux(load, line, held)),
            empty.eq(store & ~self.store.valid),
            self.store.ready.eq(step & store),
            self.signal.eq(Mux(load, chain.signal, stored.signal)),
            self.done.eq(~chain.running & ~under_way & ~stored.dirty),
        ]
        with m.If(load):
            m.d.comb += step.eq(chain.ready & room & (kept | self.grant))
        with m.Else():
            m.d.comb += step.eq(chain.ready & ~empty & (stored.open | self.grant))
        with m.If(step):
            m.d.comb += self.activity.eq(0)
        for cause, condition in (
            ("output", full & (~room | ~chain.running)),
            ("token", chain.missing),
            ("operand", chain.running & empty),
            ("interval", chain.pausing),
            ("memory", chain.running),
            ("pipeline", under_way | stored.dirty),
        ):
            with m.Elif(condition):
                m.d.comb += self.activity.eq(CAUSE[cause])
        with m.Else():
            m.d.comb += self.activity.eq(CAUSE["idle"])
        m.d.sync += [
            Assert(~(self.start & ~self.done), "a run begins before the last has ended"),
            Assert(~self.grant | asks, "a grant that nobody asked for"),
        ]
        return m

    def _load(self, m, chain, step, offset, half, same, room, full, under_way):
        """Whether the iteration at hand needs no line of its own; drives the flags of packets under way."""
        p, c = self._params, self.config
        taking = (c.wait != 0) & event(chain.first, c.wait_level)
        kept = Signal()
        m.d.comb += kept.eq(same & ~taking)

        now = Signal(TIME_BITS)
        m.d.sync += now.eq(Mux(self.start, 0, now + 1))
        entry = data.StructLayout(
            {"due": unsigned(TIME_BITS), "offset": unsigned(len(offset)), "fresh": 1, "last": 1}
        )
        bits = p.lanes * WORD_BITS
        m.submodules.entries = entries = StreamFifo(shape=entry, depth=p.in_flight, always_ready=True)
        m.submodules.lines = lines = StreamFifo(shape=unsigned(bits), depth=p.in_flight, always_ready=True)
        latency = Array(self.latency)[c.tier] + LOAD_LATENCY - 1
        fetched = Signal()
        m.d.sync += fetched.eq(step & ~kept)
        m.d.comb += [
            entries.i.valid.eq(step),
            entries.i.payload.due.eq(Mux(kept, 0, now + latency)),
            entries.i.payload.offset.eq(offset),
            entries.i.payload.fresh.eq(~kept),
            entries.i.payload.last.eq(event(chain.last, c.last_level)),
            lines.i.valid.eq(fetched),
            lines.i.payload.eq(self.answer),
        ]

        head = entries.o.payload
        moves, leaves = Signal(), Signal()
        buffer, line = Signal(bits), Signal(bits)
        packet, valid, last = Signal(bits), Signal(), Signal()
        sequence = Signal(SEQUENCE_BITS)
        m.d.comb += [
            self.load.valid.eq(valid),
            leaves.eq(valid & self.load.ready),
            full.eq(valid & ~self.load.ready),
            moves.eq(entries.o.valid & (now >= head.due) & ~full),
            entries.o.ready.eq(moves),
            lines.o.ready.eq(moves & head.fresh),
            line.eq(Mux(head.fresh, lines.o.payload, buffer)),
            self.load.payload.data.as_value().eq(packet),
            self.load.payload.flow.eq(c.flow),
            self.load.payload.sequence.eq(sequence),
            self.load.payload.last.eq(last),
        ]
        with m.If(~full):
            m.d.sync += valid.eq(moves)
        aligned = Signal(bits)
        m.d.comb += aligned.eq(line >> head.offset * BYTE)
        with m.If(moves):
            m.d.sync += [buffer.eq(line), last.eq(head.last)]
            for k in range(p.lanes):
                word = aligned.word_select(k, WORD_BITS)
                upper = Cat(Const(0, BF16.width), aligned.word_select(k, BF16.width))
                m.d.sync += packet.word_select(k, WORD_BITS).eq(Mux(c.words > k, Mux(half, upper, word), 0))
        m.d.sync += Assert(~(moves & head.fresh & ~lines.o.valid), "a line is not there in time")
        with m.If(self.start):
            m.d.sync += sequence.eq(c.sequence)
        with m.Elif(leaves):
            m.d.sync += sequence.eq(sequence + c.sequence_step)

        count = Signal(range(p.in_flight + 1))
        m.d.sync += count.eq(count + step - leaves)
        m.d.comb += [room.eq(count < p.in_flight), under_way.eq(count != 0)]
        return kept

    def _store(self, m, chain, step, store, offset, half, same):
        """The line buffer: `_Buffer`; `step` takes the packet at hand."""
        p, c = self._params, self.config
        buffer = _Buffer()
        owed = Signal(TOKENS)  # tokens that go out when the buffer is written
        granted = Signal()
        m.d.comb += [
            granted.eq(store & self.grant),
            buffer.asks.eq(store & buffer.dirty & (~chain.running | ~same | (owed != 0))),
            buffer.open.eq(~buffer.dirty | (same & (owed == 0))),
            buffer.signal.eq(Mux(granted, owed, 0)),
        ]
        mask, words = Signal(len(self.write)), Signal(len(self.data))
        new, incoming = Signal(len(self.write)), Signal(len(self.data))
        for k in range(p.lanes):
            word = self.store.payload.data[k]
            for size, condition in ((WORD_BITS // BYTE, ~half), (BF16.width // BYTE, half)):
                with m.If(condition):
                    m.d.comb += [
                        incoming.word_select(k, size * BYTE).eq(word[-size * BYTE :]),
                        new.word_select(k, size).eq((c.words > k).replicate(size)),
                    ]
        shifted = Signal(len(self.write))
        placed = Signal(len(self.data))
        kept = Signal(len(self.write))
        m.d.comb += [
            shifted.eq(new << offset),
            placed.eq(incoming << offset * BYTE),
            kept.eq(Mux(granted, 0, mask)),
            self.write.eq(Mux(store, mask, 0)),
            self.data.eq(words),
        ]
        with m.If(step):
            m.d.sync += [mask.eq(kept | shifted), buffer.dirty.eq(1), owed.eq(chain.signal)]
            for k in range(len(mask)):
                with m.If(shifted[k]):
                    m.d.sync += words.word_select(k, BYTE).eq(placed.word_select(k, BYTE))
        with m.Elif(granted):
            m.d.sync += [mask.eq(0), buffer.dirty.eq(0), owed.eq(0)]
        return buffer


class _Buffer:
    def __init__(self):
        self.dirty = Signal(name="dirty")  # it holds bytes that are not written
        self.asks = Signal(name="buffer_asks")  # and wants them to be
        self.open = Signal(name="open")  # the iteration at hand may be merged
        self.signal = Signal(TOKENS, name="written_signal")  # tokens that go out
