"""The host port: the one interface through which every machine is loaded, started and read back."""

from amaranth import Array, Cat, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import ceil_log2

from tilewright.arch.hostmap import ADDRESS_BITS, WORD_BITS

HostPort = wiring.Signature(
    {
        "addr": In(ADDRESS_BITS),
        "wdata": In(WORD_BITS),
        "we": In(1),
        "rdata": Out(WORD_BITS),
        "start": In(1),
        "done": Out(1),
    }
)
"""The host port in the device's own directions: a machine declares `host: Out(HostPort)`.

| member | direction | meaning |
|---|---|---|
| `addr` | in | word address |
| `wdata`, `we` | in | the word is written at the edge that samples `we`; honoured only while `done` |
| `rdata` | out | the word at the address sampled one tick ago |
| `start` | in | sampled while `done`: the next tick is tick 0 of the run |
| `done` | out | high before the first start and after the last tick of a run |

    clk    _/~\\_/~\\_/~\\_/~\\_/~\\_
    start  _/~~~\\___________________
    done   ~~~~~~\\___________/~~~~~~    a run of 3 ticks
"""


class HostMemory(wiring.Signature):
    """The decoder's side of one memory region of the host map.

    `addr` is the element, `re` reads it, `we` (one bit per host word of it) writes `wdata`, the host word
    repeated over the element; `rdata` must be the element that was read one tick ago. An element of several
    words is rounded up to whole words, so a memory needs a write granularity of one host word. `re` and `we`
    stay 0 during a run, and beyond the last element: the machine may OR its own enables to them.
    """

    def __init__(self, region):
        words = region.element_words
        bits = region.element_bits if words == 1 else words * WORD_BITS
        super().__init__(
            {
                "addr": Out(ceil_log2(region.elements)),
                "re": Out(1),
                "we": Out(words),
                "wdata": Out(bits),
                "rdata": In(bits),
            }
        )


class HostDecoderSignature(wiring.Signature):
    """The ports of a `HostDecoder`. Raises ValueError for a region too wide or named as a port."""

    def __init__(self, hostmap, registers, status):
        members = {"host": Out(HostPort), "start": Out(1), "done": In(1)}
        roles = {registers: (Out, WORD_BITS), status: (In, 2 * WORD_BITS)}
        for region in hostmap:
            name, bits = region.name, region.element_bits
            if name in members:
                raise ValueError(f"region name {name} is taken by a port of the decoder")
            if name in roles:
                flow, widest = roles[name]
                if bits > widest:
                    raise ValueError(f"region {name}: element_bits must be at most {widest}, not {bits}")
                members[name] = flow(bits).array(region.elements)
            else:
                members[name] = Out(HostMemory(region))
        super().__init__(members)


class HostDecoder(wiring.Component):
    """Splits the host port into registers, status words and memories.

    Parameters: `hostmap`; `registers` and `status`, the names of the regions that are not memories. Register
    elements are at most 32 bits, status elements at most 64.

    | member | direction | shape | meaning |
    |---|---|---|---|
    | `host` | | `HostPort` | to the machine's own port |
    | `start` | out | 1 | the host's start, while `done` |
    | `done` | in | 1 | no run in progress: writes and starts are honoured |
    | `registers` | out | array of the region's elements | written by the host, 0 after reset |
    | `status` | in | array of the region's elements | read by the host, low word first |
    | any other region's name | out | `HostMemory` | that memory |

    An address outside every region reads 0, and so does an element or a word beyond a region's end.
    """

    def __init__(self, hostmap, *, registers="registers", status="status"):
        self._map = hostmap
        self._registers, self._status = registers, status
        super().__init__(HostDecoderSignature(hostmap, registers, status))

    def elaborate(self, platform):
        m = Module()
        host = self.host
        m.d.comb += [host.done.eq(self.done), self.start.eq(host.start & self.done)]

        rdata = 0
        for region in self._map:
            # A region owns an aligned power of two of words: its base is in the upper address bits alone.
            span_bits = ceil_log2(region.span)
            word_bits = ceil_log2(region.stride)
            element_bits = ceil_log2(region.elements)
            selected = Signal(name=f"{region.name}_selected")
            base = self._map.base(region.name)
            m.d.comb += selected.eq(host.addr[span_bits:] == base >> span_bits)
            word = host.addr[:word_bits]
            element = host.addr[word_bits : word_bits + element_bits]
            inside = element < region.elements
            write = selected & inside & host.we & self.done

            word_q = Signal(word_bits, name=f"{region.name}_word")
            read_q = Signal(name=f"{region.name}_read")
            m.d.sync += [word_q.eq(word), read_q.eq(selected & inside)]

            ports = getattr(self, region.name)
            if region.name == self._registers:
                value = Signal(region.element_bits, name=f"{region.name}_value")
                m.d.sync += value.eq(Array(ports)[element])
                for i, register in enumerate(ports):
                    with m.If(write & (element == i)):
                        m.d.sync += register.eq(host.wdata)
            elif region.name == self._status:
                value = Signal(region.element_bits, name=f"{region.name}_value")
                m.d.sync += value.eq(Array(ports)[element])
            else:
                value = ports.rdata
                m.d.comb += [
                    ports.addr.eq(element),
                    ports.re.eq(selected & inside & self.done),
                    ports.wdata.eq(host.wdata.replicate(region.element_words)),
                    ports.we.eq(Cat(write & (word == i) for i in range(region.element_words))),
                ]
            rdata |= Mux(read_q, value.word_select(word_q, WORD_BITS), 0)
        m.d.comb += host.rdata.eq(rdata)
        return m
