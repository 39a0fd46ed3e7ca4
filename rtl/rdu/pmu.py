"""The memory unit: banks, and the two sides that read and write them."""

from amaranth.hdl import Array, Assert, Cat, Const, Module, Mux, Signal, unsigned
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.rdu import (
    ADDRESS_BITS,
    CAUSE,
    CONFIG_PMU,
    LEVELS,
    SEQUENCE_BITS,
    TOKENS,
    WORD_BITS,
    RduParams,
)
from tilewright.rtl.layouts import layout_of
from tilewright.rtl.lib.sram import Sram
from tilewright.rtl.rdu.chain import CounterChain, chain_of, event
from tilewright.rtl.rdu.packet import packet_layout

__all__ = ["BankMap", "Pmu"]


class BankMap(wiring.Component):
    """Where an address lies: the word within the scratchpad, its bits split into bank and index.

    Latency 0. The bank's bits are those of the word at the positions `bank_bit<i>`, the index what is left when they
    are taken out. Diagonal stripes add the row, the word from bit `skew_shift` upwards, to the low `skew_bits` bits
    of the bank, without a carry beyond them.

    Parameters
    ----------
    params : RduParams

    Members
    -------
    ======= === ===================== ==================================
    config  In  layout_of(CONFIG_PMU) bank bits, diagonal, valid range
    address In  ADDRESS_BITS          a word's address
    valid   Out 1                     it is held here
    bank    Out                       in which bank
    index   Out                       at which word of it
    ======= === ===================== ==================================
    """

    def __init__(self, *, params: RduParams):
        p = self._params = params
        super().__init__(
            {
                "config": In(layout_of(CONFIG_PMU)),
                "address": In(ADDRESS_BITS),
                "valid": Out(1),
                "bank": Out(bits_for(p.banks - 1)),
                "index": Out(bits_for(p.bank_words - 1)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        c = self.config
        bits = self._params.banks.bit_length() - 1
        word, row, bank = Signal(ADDRESS_BITS), Signal(bits), Signal(bits)
        m.d.comb += [
            word.eq(self.address - c.low),  # those below wrap round, beyond `words`
            self.valid.eq(word < c.words),
            row.eq(word >> c.skew_shift),
        ]
        rest = word
        for i in reversed(range(bits)):
            position = getattr(c, f"bank_bit{i}")
            less = Signal(ADDRESS_BITS, name=f"without_{i}")
            below = Signal(ADDRESS_BITS, name=f"below_{i}")
            m.d.comb += [
                bank[i].eq(word >> position),
                below.eq((Const(1, ADDRESS_BITS) << position) - 1),
                less.eq((rest & below) | ((rest >> 1) & ~below)),
            ]
            rest = less
        mask = Signal(bits)
        m.d.comb += [
            mask.eq((Const(1, bits + 1) << c.skew_bits) - 1),
            self.bank.eq((bank & ~mask) | ((bank + row) & mask)),
            self.index.eq(rest),
        ]
        return m


class _Side:
    """One side's chain, its addresses, and the accesses of the iteration that is at the banks."""

    def __init__(self, m: Module, p: RduParams, config, prefix: str, start, tokens, go, extra):
        """`go`: apart from chain and banks nothing holds the side up; `extra` is added to the address."""
        enabled = config.enable[0 if prefix == "write_" else 1]
        self.chain = chain = CounterChain(levels=p.pmu_counters)
        m.submodules[f"{prefix}chain"] = chain
        self.step = Signal(name=f"{prefix}step")
        self.occupied = Signal(name=f"{prefix}occupied")
        self.finishes = Signal(name=f"{prefix}finishes")
        self.pending = Signal(p.lanes, name=f"{prefix}pending")
        self.inside = Signal(p.lanes, name=f"{prefix}inside")  # lanes whose address is held here
        self.granted = Signal(p.lanes, name=f"{prefix}granted")
        self.last = Signal(name=f"{prefix}last")
        self.signal = Signal(TOKENS, name=f"{prefix}signal")
        m.d.comb += [
            chain.start.eq(start & enabled),
            chain.config.eq(chain_of(m, config, prefix)),
            chain.tokens.eq(tokens),
            self.step.eq(chain.ready & go & (~self.occupied | self.finishes)),
            chain.step.eq(self.step),
        ]

        offsets = []
        for n in range(p.pmu_counters):
            offset = Signal(ADDRESS_BITS, name=f"{prefix}offset_{n}")
            with m.If(chain.start):
                m.d.sync += offset.eq(0)
            with m.Elif(self.step & chain.last[n]):
                stride = getattr(config, f"{prefix}stride{n}")
                m.d.sync += offset.eq(Mux(chain.last[n + 1], 0, offset + stride))
            offsets.append(offset)
        origin = Signal(ADDRESS_BITS, name=f"{prefix}origin")
        m.d.comb += origin.eq(sum(offsets, getattr(config, f"{prefix}base")) + extra)

        inside = Signal(p.lanes, name=f"{prefix}valid")
        self.drops = Mux(self.step, sum(~bit for bit in inside), 0)
        self.banks, self.indices = [], []
        for lane in range(p.lanes):
            m.submodules[f"{prefix}map_{lane}"] = place = BankMap(params=p)
            bank = Signal.like(place.bank, name=f"{prefix}bank_{lane}")
            index = Signal.like(place.index, name=f"{prefix}index_{lane}")
            m.d.comb += [
                place.config.eq(config),
                place.address.eq(origin + lane * getattr(config, f"{prefix}lane_stride")),
                inside[lane].eq(place.valid),
            ]
            with m.If(self.step):
                m.d.sync += [bank.eq(place.bank), index.eq(place.index)]
            self.banks.append(bank)
            self.indices.append(index)

        signal = Signal(TOKENS, name=f"{prefix}signal_later")
        with m.If(self.step):
            m.d.sync += [
                self.occupied.eq(1),
                self.pending.eq(inside),
                self.inside.eq(inside),
                self.last.eq(event(chain.last, config.last_level)),
                signal.eq(chain.signal),
            ]
        with m.Else():
            m.d.sync += self.pending.eq(self.pending & ~self.granted)
            with m.If(self.finishes):
                m.d.sync += self.occupied.eq(0)
        m.d.comb += self.signal.eq(Mux(self.finishes, signal, 0))


class Pmu(wiring.Component):
    """A PMU: `banks` of words with one port each, written and read by sides of their own.

    A side takes an iteration when its chain is ready and the accesses of the one before are done, or get done in
    this tick; the write side needs a packet, and pops it. The addresses of its lanes,

        base + sum of counter * stride + lane * lane_stride, on the write side + sequence id * sequence_scale,

    all modulo 2**24, are at the banks one tick later. Lanes whose address is out of range are dropped: a write
    leaves them, a read gives 0 for them, and a vector without any other lane gives no packet. A bank serves one
    access a tick: of the side whose turn it is first, and of its lowest lane first. Reading has the first turn; it
    changes whenever both sides want one bank. So n lanes at one bank take n ticks, and accesses in different banks
    never meet. A packet is at the output 3 ticks after its iteration, or as many later as banks were in the way;
    what can't leave stops the read side. A write can be read by accesses at the banks from the next tick on. A
    side's tokens go out in the tick in which the accesses of the iteration that raises them are all done.

    Parameters
    ----------
    params : RduParams
    memory : type
        What a bank is, Sram or a memory of the same members.

    Members
    -------
    ============== === ===================== =====================================================
    start          In  1                     a run begins; the unit must be done. Banks keep their contents
    config         In  layout_of(CONFIG_PMU) constant from `start` to `done`; see `arch.rdu.check_pmu`
    write          In  stream of packets     what is written
    read           Out stream of packets     what was read
    write_tokens   In  TOKENS                control inputs of the write side; likewise read_tokens
    write_signal   Out TOKENS                control outputs of the write side; likewise read_signal
    done           Out 1                     nothing is left to do, or under way
    write_activity Out 4                     0 is busy: an iteration is taken; n is CAUSES[n - 1]
    read_activity  Out 4                     likewise
    conflict       Out 1                     an access waits for a bank
    words_read     Out                       words that banks read in this tick
    words_written  Out                       and words they write
    dropped        Out                       addresses out of range, of the iterations taken in this tick
    ============== === ===================== =====================================================
    """

    def __init__(self, *, params: RduParams, memory: type = Sram):
        self._params, self._memory = params, memory
        packets = stream.Signature(packet_layout(params.lanes))
        super().__init__(
            {
                "start": In(1),
                "config": In(layout_of(CONFIG_PMU)),
                "write": In(packets),
                "read": Out(packets),
                "write_tokens": In(TOKENS),
                "read_tokens": In(TOKENS),
                "write_signal": Out(TOKENS),
                "read_signal": Out(TOKENS),
                "done": Out(1),
                "write_activity": Out(unsigned(4)),
                "read_activity": Out(unsigned(4)),
                "conflict": Out(1),
                "words_read": Out(range(params.lanes + 1)),
                "words_written": Out(range(params.lanes + 1)),
                "dropped": Out(range(2 * params.lanes + 1)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        p, c = self._params, self.config
        lanes, banks = range(p.lanes), range(p.banks)
        move, go = Signal(), Signal()

        packet = self.write.payload
        shift = (packet.sequence * c.sequence_scale)[:ADDRESS_BITS]
        writer = _Side(m, p, c, "write_", self.start, self.write_tokens, self.write.valid, shift)
        reader = _Side(m, p, c, "read_", self.start, self.read_tokens, go, 0)
        words = Signal(data.ArrayLayout(unsigned(WORD_BITS), p.lanes))
        with m.If(writer.step):
            m.d.sync += words.eq(packet.data)
        m.d.comb += [
            go.eq(move),
            self.write.ready.eq(writer.step),
            self.write_signal.eq(writer.signal),
            self.read_signal.eq(reader.signal),
            writer.finishes.eq(writer.occupied & ~(writer.pending & ~writer.granted).any()),
            reader.finishes.eq(reader.occupied & ~(reader.pending & ~reader.granted).any() & move),
        ]

        # ---- banks
        write_first = Signal()
        both = Signal(p.banks)
        found = []
        grants = {id(side): [[] for _ in lanes] for side in (writer, reader)}
        for b in banks:
            m.submodules[f"bank_{b}"] = bank = self._memory(width=WORD_BITS, depth=p.bank_words)
            found.append(bank.read_data)
            wants, choice = {}, {}
            for side, name in ((writer, "write"), (reader, "read")):
                want = Signal(p.lanes, name=f"{name}_wants_{b}")
                hits = Cat(side.banks[lane] == b for lane in lanes)
                m.d.comb += want.eq(Mux(1 if side is writer else move, side.pending & hits, 0))
                wants[name], choice[name] = want.any(), want & -want
            writes, reads = Signal(name=f"writes_{b}"), Signal(name=f"reads_{b}")
            m.d.comb += [
                both[b].eq(wants["write"] & wants["read"]),
                writes.eq(wants["write"] & (write_first | ~wants["read"])),
                reads.eq(wants["read"] & (~write_first | ~wants["write"])),
                bank.write_enable.eq(writes),
                bank.read_enable.eq(reads),
            ]
            for side, name, serves, address in (
                (writer, "write", writes, bank.write_address),
                (reader, "read", reads, bank.read_address),
            ):
                for lane in lanes:
                    grants[id(side)][lane].append(serves & choice[name][lane])
                    with m.If(choice[name][lane]):
                        m.d.comb += address.eq(side.indices[lane])
                        if side is writer:
                            m.d.comb += bank.write_data.eq(words[lane])
            m.d.sync += Assert(~(writes & reads), "a bank reads and writes in one tick")
        for side in (writer, reader):
            m.d.comb += side.granted.eq(Cat(Cat(bits).any() for bits in grants[id(side)]))
        with m.If(self.start):
            m.d.sync += write_first.eq(0)
        with m.Elif(both.any()):
            m.d.sync += write_first.eq(~write_first)

        # ---- alignment: lanes that were served earlier are kept until all are there
        served = Signal(p.lanes)
        inside = Signal(p.lanes)
        complete, last = Signal(), Signal()
        kept = Signal(data.ArrayLayout(unsigned(WORD_BITS), p.lanes))
        aligned = Signal.like(kept)
        held = Signal.like(kept)
        held_valid, held_last = Signal(), Signal()
        for lane in lanes:
            bank = Signal.like(reader.banks[lane], name=f"served_bank_{lane}")
            m.d.comb += aligned[lane].eq(Mux(served[lane], Array(found)[bank], kept[lane]))
            with m.If(move):
                m.d.sync += bank.eq(reader.banks[lane])
        m.d.comb += move.eq(~held_valid | self.read.ready)
        with m.If(move):
            m.d.sync += [
                served.eq(reader.granted),
                inside.eq(reader.inside),
                complete.eq(reader.finishes & reader.inside.any()),
                last.eq(reader.last),
                kept.eq(aligned),
                held_valid.eq(complete),
                held_last.eq(last),
            ]
            for lane in lanes:
                m.d.sync += held[lane].eq(Mux(inside[lane], aligned[lane], 0))
        sequence = Signal(SEQUENCE_BITS)
        with m.If(self.start):
            m.d.sync += sequence.eq(c.sequence)
        with m.Elif(held_valid & self.read.ready):
            m.d.sync += sequence.eq(sequence + c.sequence_step)
        m.d.comb += [
            self.read.valid.eq(held_valid),
            self.read.payload.data.eq(held),
            self.read.payload.flow.eq(c.flow),
            self.read.payload.sequence.eq(sequence),
            self.read.payload.last.eq(held_last),
        ]

        # ---- what each side did
        under_way = reader.occupied | served.any() | complete | held_valid
        for side, activity, blocked, hungry, busy in (
            (writer, self.write_activity, 0, ~self.write.valid, writer.occupied),
            (reader, self.read_activity, ~move, 0, under_way),
        ):
            with m.If(side.step):
                m.d.comb += activity.eq(0)
            for cause, condition in (
                ("output", blocked),
                ("bank", side.occupied & ~side.finishes),
                ("token", side.chain.missing),
                ("operand", side.chain.running & hungry),
                ("interval", side.chain.pausing),
                ("pipeline", busy),
            ):
                with m.Elif(condition):
                    m.d.comb += activity.eq(CAUSE[cause])
            with m.Else():
                m.d.comb += activity.eq(CAUSE["idle"])
        chains = writer.chain.running | reader.chain.running
        m.d.comb += [
            self.conflict.eq(
                (writer.occupied & ~writer.finishes) | (reader.occupied & ~reader.finishes & move)
            ),
            self.words_read.eq(sum(reader.granted)),
            self.words_written.eq(sum(writer.granted)),
            self.dropped.eq(writer.drops + reader.drops),
            self.done.eq(~chains & ~writer.occupied & ~under_way),
        ]
        m.d.sync += Assert(~(self.start & ~self.done), "a run begins before the last has ended")
        assert len(reader.chain.counters) == LEVELS
        return m
