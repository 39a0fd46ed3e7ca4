"""Where pages lie: the two tables from table entries to flash addresses, and the logs that give out pages."""

from amaranth.hdl import Array, Assert, Cat, Module, Mux, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.csd import FORMS, CsdParams
from tilewright.arch.flash import FlashParams
from tilewright.rtl.csd.channel import address_layout
from tilewright.rtl.csd.memory import store

__all__ = ["PageLogs", "PageTables", "entry_layout", "log_layout"]


def entry_layout(p: CsdParams) -> data.StructLayout:
    """Which entry of the tables: `position` within the table of a slot, lowest, so that the parts are an address."""
    return data.StructLayout(
        {"position": p.table_bits, "slot": max(1, bits_for(p.slots - 1)), "form": bits_for(len(FORMS) - 1)}
    )


class PageTables(wiring.Component):
    """The tables of token-indexed and channel-indexed pages, in the drive's DRAM: `table`.

    A lookup a tick, latency 1. The channel follows from slot and position, as `arch.csd.channel_of` says; the table
    holds the rest of the address.

    Parameters
    ----------
    params : CsdParams
    black_box : bool
        The table is outside of the netlist.

    Members
    -------
    ============== === ============ ==================================================
    lookup         In  1            read this tick
    entry          In  layout       which entry
    channel        Out              of the page of the entry looked up one tick ago
    address        Out layout       where it is in that channel
    assign         In  1            write this tick
    assign_entry   In  layout
    assign_address In  layout
    assign_channel Out              the channel that `assign_entry` lies in
    ============== === ============ ==================================================
    """

    def __init__(self, *, params: CsdParams, black_box: bool = True):
        self._params, self._black_box = params, black_box
        self._entry, self._address = entry_layout(params), address_layout(params.flash)
        channel = bits_for(params.flash.channels - 1)
        super().__init__(
            {
                "lookup": In(1),
                "entry": In(self._entry),
                "channel": Out(channel),
                "address": Out(self._address),
                "assign": In(1),
                "assign_entry": In(self._entry),
                "assign_address": In(self._address),
                "assign_channel": Out(channel),
            }
        )

    def elaborate(self, platform):
        m = Module()
        channels = self._params.flash.channels
        width = self._address.size
        m.submodules.table = table = store(
            black_box=self._black_box, width=width, depth=1 << self._entry.size
        )

        def channel(entry):
            if channels == 1:
                return 0
            pair, bits = entry.position >> 1, channels.bit_length() - 1
            half = Mux(entry.position[0], channels >> 1, 0)
            return (entry.slot + pair + (pair >> bits) + half)[:bits]

        with m.If(self.lookup):
            m.d.sync += self.channel.eq(channel(self.entry))
        m.d.comb += [
            table.read_enable.eq(self.lookup),
            table.read_address.eq(self.entry.as_value()),
            self.address.eq(table.read_data),
            table.write_enable.eq(self.assign),
            table.write_address.eq(self.assign_entry.as_value()),
            table.write_data.eq(self.assign_address.as_value()),
            self.assign_channel.eq(channel(self.assign_entry)),
        ]
        return m


def log_layout(f: FlashParams) -> data.StructLayout:
    """A log: the address of its next page, and how many of its blocks were opened and not erased since."""
    return data.StructLayout({"next": address_layout(f), "used": bits_for(f.blocks)})


class PageLogs(wiring.Component):
    """A ring of pages for each channel, filled in the order of `arch.csd.log_address`.

    A log opens a block, that of the same number in every plane, with its first page there, and needs one that is
    erased for that: `full` says that there is none. `release` gives the oldest block of every channel back.

    Parameters
    ----------
    params : FlashParams
    order : str
        `placement.order`: which of W(ay), D(ie), P(lane) counts first.

    Members
    -------
    ======= === ============================ ========================================================
    load    In  1                            the logs are `initial`
    initial In  array of channels, log_layout
    logs    Out array of channels, log_layout their present state
    channel In  range(channels)              the log in question
    address Out layout                       its next page
    full    Out 1                            it has none
    take    In  1                            the page is given out; not if `full`
    oldest  Out range(blocks)                the block that `release` gives back in this log
    release In  1                            of every channel; each must have one
    ======= === ============================ ========================================================
    """

    def __init__(self, *, params: FlashParams, order: str):
        self._params, self._order = params, order
        self._log = log_layout(params)
        super().__init__(
            {
                "load": In(1),
                "initial": In(self._log).array(params.channels),
                "logs": Out(self._log).array(params.channels),
                "channel": In(bits_for(params.channels - 1)),
                "address": Out(address_layout(params)),
                "full": Out(1),
                "take": In(1),
                "oldest": Out(bits_for(params.blocks - 1)),
                "release": In(1),
            }
        )

    def elaborate(self, platform):
        m = Module()
        f = self._params
        names = {"W": ("chip", f.chips), "D": ("die", f.dies), "P": ("plane", f.planes)}
        digits = [names[letter] for letter in self._order if letter != "C"]
        digits += [("page", f.pages), ("block", f.blocks)]
        log = Signal(self._log)
        opens, following = Signal(), Signal(address_layout(f))
        below = log.used - log.next.block
        m.d.comb += [
            log.eq(Array(item.as_value() for item in self.logs)[self.channel]),
            self.address.eq(log.next),
            opens.eq(~Cat(log.next[name] for name, _ in digits[:-1]).any()),
            self.full.eq(opens & (log.used == f.blocks)),
        ]
        # Opened blocks are the `used` ones below the next page's; its own is open once it has a page.
        first = Signal(range(-f.blocks, f.blocks + 1))
        m.d.comb += [
            first.eq(Mux(opens, -below, 1 - below)),
            self.oldest.eq(Mux(first < 0, first + f.blocks, first)),
        ]
        carry = 1
        for name, size in digits:
            wraps = Signal(name=f"{name}_wraps")
            m.d.comb += [
                wraps.eq(carry & (log.next[name] == size - 1)),
                following[name].eq(Mux(wraps, 0, log.next[name] + carry)),
            ]
            carry = wraps
        for c, item in enumerate(self.logs):
            taken = Signal(name=f"taken_{c}")
            m.d.comb += taken.eq(self.take & (self.channel == c))
            with m.If(taken):
                m.d.sync += item.next.eq(following)
            m.d.sync += item.used.eq(item.used + (taken & opens) - self.release)
            m.d.sync += Assert(~(self.release & (item.used == 0)), "a log has no block to give back")
            with m.If(self.load):
                m.d.sync += item.eq(self.initial[c])
        m.d.sync += Assert(~(self.take & self.full), "a page of a full log")
        return m
