"""The NAND flash controller of a channel: cells, the channel in time, and the filter that forwards rows."""

from amaranth.hdl import Cat, Module, Mux, ResetInserter, Signal
from amaranth.lib import data, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.csd import CsdParams
from tilewright.arch.formats import FP16
from tilewright.rtl.csd.argtopk import tree_sum
from tilewright.rtl.csd.channel import FlashChannel, address_layout, timing_layout
from tilewright.rtl.csd.filter import EntryFilter
from tilewright.rtl.csd.memory import store
from tilewright.rtl.lib.arbiter import RoundRobin
from tilewright.rtl.lib.fifo import StreamFifo

__all__ = ["FlashController", "PortSwitch", "job_layout", "line_layout"]


def job_layout(p: CsdParams, ports: int) -> data.StructLayout:
    """What is to be done with a page that is read: for whom, in which of several passes (`turn`), which rows of how many
    lines, and how many selected rows came in pages before."""
    return data.StructLayout(
        {
            "port": bits_for(ports - 1),
            "turn": bits_for(p.batches - 1),
            "mask": p.page_lines,
            "row_lines": bits_for(p.page_lines),
            "rank": bits_for(max(p.max_tokens, p.max_channels)),
        }
    )


def line_layout(p: CsdParams) -> data.StructLayout:
    """A line on its way: line `word` of selected row `row` of the pass `turn`."""
    return data.StructLayout(
        {
            "turn": bits_for(p.batches - 1),
            "row": bits_for(max(p.max_tokens, p.max_channels)),
            "word": bits_for(p.page_lines - 1),
            "data": p.lanes * FP16.width,
        }
    )


class FlashController(wiring.Component):
    """Takes operations for its channel; forwards the selected rows of each page that was read to a port.

    It holds `flash_queue` operations, counted from their push until they are done: a program or an erase with its last
    tick in the cells, a read with the last line that is forwarded, or with its page's arrival if no row is wanted.
    Pages are forwarded in the order in which they were read. A page's first line is there two ticks after its port is
    granted, the others follow without gaps; the port may be granted anew in the tick before the page's last line.

    What a page will hold is written to `cells` before its program is pushed: the channel keeps reads of it back until
    the program is done.

    Parameters
    ----------
    params : CsdParams
    types : tuple of int
        The type of each page of a block, see `FlashChannel`.
    ports : int
        Where rows go.
    black_box : bool
        Cells are outside of the netlist.

    Members
    -------
    ============== === ============= ======================================================
    clear          In  1             forget everything but the cells
    anew           In  1             the first unit comes first
    times          In  timing_layout
    push           In  1             an operation; only while `ready`
    kind, address  In                as of `FlashChannel`
    job            In  job_layout    of a read
    ready          Out 1
    working        Out 1             an operation is held
    unfinished     Out 1             one of them is not through its cells and the bus in this tick
    write          In  1             a line of cells is written
    write_address  In  layout        its page
    write_word     In                which line of it
    write_data     In  line
    request        Out ports         a page is to be forwarded there, one-hot
    grant          In  1             it may be, from now on
    releases       Out ports         with this tick the port is given back
    valid          Out 1             `line` holds one
    port           Out range(ports)  for whom
    line           Out line_layout
    bus            Out 1             the bus moves something
    command        Out 1             a command is given to a unit,
    command_kind   Out 2             of this kind,
    command_planes Out               made of so many operations
    ============== === ============= ======================================================
    """

    def __init__(self, *, params: CsdParams, types, ports: int, black_box: bool = True):
        self._params, self._types, self._ports, self._black_box = params, types, ports, black_box
        p, address = params, address_layout(params.flash)
        super().__init__(
            {
                "clear": In(1),
                "anew": In(1),
                "times": In(timing_layout()),
                "push": In(1),
                "kind": In(2),
                "address": In(address),
                "job": In(job_layout(p, ports)),
                "ready": Out(1),
                "working": Out(1),
                "unfinished": Out(1),
                "write": In(1),
                "write_address": In(address),
                "write_word": In(bits_for(p.page_lines - 1)),
                "write_data": In(p.lanes * FP16.width),
                "request": Out(ports),
                "grant": In(1),
                "releases": Out(ports),
                "valid": Out(1),
                "port": Out(bits_for(ports - 1)),
                "line": Out(line_layout(p)),
                "bus": Out(1),
                "command": Out(1),
                "command_kind": Out(2),
                "command_planes": Out(range(p.flash.planes + 1)),
            }
        )

    def elaborate(self, platform):
        m = Module()
        p, job = self._params, self.job.shape()
        page = data.StructLayout({"address": address_layout(p.flash), "job": job})
        depth = p.flash_queue
        m.submodules.channel = channel = FlashChannel(
            params=p.flash, types=self._types, slots=depth, tag=job.size
        )
        m.submodules.pages = pages = StreamFifo(shape=page, depth=depth, always_ready=True)
        m.submodules.filter = rows = EntryFilter(lines=p.page_lines, rows=p.page_lines)
        m.submodules.cells = cells = store(
            black_box=self._black_box,
            width=p.lanes * FP16.width,
            depth=1 << (len(self.write_word) + address_layout(p.flash).size),
        )

        held = Signal(range(depth + 1))
        m.d.comb += [
            self.ready.eq(held != depth),
            self.working.eq(held != 0),
            self.unfinished.eq((channel.held & ~channel.finished).any()),
            channel.clear.eq(self.clear),
            channel.anew.eq(self.anew),
            channel.times.eq(self.times),
            channel.push.eq(self.push),
            channel.kind.eq(self.kind),
            channel.address.eq(self.address),
            channel.tag.eq(self.job.as_value()),
            pages.i.valid.eq(channel.read_valid),
            pages.i.payload.address.eq(channel.read_address),
            pages.i.payload.job.eq(channel.read_tag),
            *(
                getattr(self, name).eq(getattr(channel, name))
                for name in ("bus", "command", "command_kind", "command_planes")
            ),
            cells.write_enable.eq(self.write),
            cells.write_address.eq(Cat(self.write_word, self.write_address.as_value())),
            cells.write_data.eq(self.write_data),
        ]

        # The next page, and the one whose rows are forwarded.
        head, now = pages.o.payload, Signal(page)
        wanted, begins, drops = Signal(), Signal(), Signal()
        m.d.comb += [
            wanted.eq(head.job.mask.any()),
            self.request.eq(Mux(pages.o.valid & wanted & rows.ready, 1 << head.job.port, 0)),
            begins.eq(self.request.any() & self.grant),
            drops.eq(pages.o.valid & ~wanted),
            pages.o.ready.eq(begins | drops),
            rows.start.eq(begins),
            rows.mask.eq(head.job.mask),
            rows.row_lines.eq(head.job.row_lines),
            rows.go.eq(1),
            self.releases.eq(Mux(rows.last, 1 << now.job.port, 0)),
            cells.read_enable.eq(rows.valid),
            cells.read_address.eq(Cat(rows.line, now.address.as_value())),
            self.line.data.eq(cells.read_data),
        ]
        with m.If(begins):
            m.d.sync += now.eq(head)
        m.d.sync += [
            self.valid.eq(rows.valid),
            self.port.eq(now.job.port),
            self.line.turn.eq(now.job.turn),
            self.line.row.eq(now.job.rank + rows.row),
            self.line.word.eq(rows.word),
        ]
        finished = tree_sum([channel.finished[i] for i in range(depth)])
        done = Mux(channel.read_valid, finished - 1, finished) + rows.last + drops
        m.d.sync += held.eq(Mux(self.clear, 0, held + self.push - done))
        return m


class PortSwitch(wiring.Component):
    """Gives a port to one controller at a time, round robin, for a page.

    A controller asks with `requests`, and has the port from the tick of its grant to that of its `releases`, in which
    the next one is granted.

    Parameters
    ----------
    sources : int

    Members
    -------
    ======== === ======= ============================================
    clear    In  1       nobody has the port, and the first one comes first
    anew     In  1       the first one comes first
    requests In  sources
    releases In  sources its last line is forwarded in this tick
    grant    Out sources one-hot
    ======== === ======= ============================================
    """

    def __init__(self, *, sources: int):
        self._sources = sources
        super().__init__(
            {
                "clear": In(1),
                "anew": In(1),
                "requests": In(sources),
                "releases": In(sources),
                "grant": Out(sources),
            }
        )

    def elaborate(self, platform):
        m = Module()
        turn = RoundRobin(count=self._sources)
        m.submodules.turn = ResetInserter(self.clear | self.anew)(turn)
        taken = Signal()
        free = ~taken | self.releases.any()
        m.d.comb += [
            turn.requests.eq(self.requests),
            turn.ready.eq(free),
            self.grant.eq(Mux(free, turn.grant, 0)),
        ]
        m.d.sync += taken.eq(~self.clear & (self.grant.any() | (taken & ~self.releases.any())))
        return m
