"""The fetch unit: hands heads to the attention kernels, and gets the pages that these ask for."""

from amaranth.hdl import Cat, Module, Mux, ResetInserter, Signal
from amaranth.lib import data, stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.csd import FORMS, ISA, CsdParams
from tilewright.arch.formats import FP16
from tilewright.rtl.csd.channel import address_layout, pick
from tilewright.rtl.csd.controller import job_layout, line_layout
from tilewright.rtl.csd.decoder import TICK_BITS, configuration_layout
from tilewright.rtl.csd.filter import EntryFilter, PageFilter
from tilewright.rtl.csd.ftl import entry_layout
from tilewright.rtl.csd.staging import staged_layout
from tilewright.rtl.layouts import layout_of
from tilewright.rtl.lib.arbiter import RoundRobin
from tilewright.rtl.lib.fifo import StreamFifo

__all__ = ["Fetch", "StagedPages", "head_layout", "lookup_layout", "pass_layout", "staged_page_layout"]

_CHANNELS = FORMS.index("channels")


def head_layout(p: CsdParams) -> data.StructLayout:
    """A K/V head of an ATTEND: its slot, what it attends to, where its queries are and its results go."""
    line = bits_for(p.vector_lines - 1)
    return data.StructLayout(
        {
            "slot": max(1, bits_for(p.slots - 1)),
            "tokens": bits_for(p.max_tokens),
            "spans": 12,
            "share": 32,
            "line": line,
            "line2": line,
        }
    )


def pass_layout(p: CsdParams) -> data.StructLayout:
    """What a kernel asks for: rows of pages of a form, from the group `first` on, or of the span `first`.

    It counts `n` entries in pages of `rows`, a row being `row_lines` lines; `all`: without a mask. `values`: of V;
    `turn` comes back with each line.
    """
    return data.StructLayout(
        {
            "form": 1,
            "values": 1,
            "turn": bits_for(p.batches - 1),
            "all": 1,
            "first": p.table_bits,
            "n": bits_for(max(p.max_tokens, p.max_channels)),
            "rows": bits_for(p.page_lines),
            "row_lines": bits_for(p.page_lines),
        }
    )


def lookup_layout(p: CsdParams, ports: int) -> data.StructLayout:
    """A page by its table entry, and what is to be done with it."""
    return data.StructLayout({"entry": entry_layout(p), "job": job_layout(p, ports)})


def staged_page_layout(p: CsdParams, ports: int) -> data.StructLayout:
    """A page in the group buffer (its first line), and what is to be done with it."""
    return data.StructLayout({"at": staged_layout(p), "job": job_layout(p, ports)})


class StagedPages(wiring.Component):
    """Forwards rows of the group buffer's pages as a `FlashController` does those of its channel.

    What is pushed at tick t asks for its port from t + 1 on, when the page before has forwarded its last line or does so.
    A page's first line is there two ticks after the grant.

    Parameters
    ----------
    params : CsdParams
    ports : int

    Members
    -------
    =========== === ================= ===============================================
    i           In  stream(page)      pages in the order in which they are forwarded
    request     Out ports             one-hot
    grant       In  1
    releases    Out ports             with this tick the port is given back
    valid       Out 1
    port        Out range(ports)
    line        Out line_layout
    read        Out 1                 of the group buffer; latency 1
    read_at     Out staged_layout
    read_data   In  line
    =========== === ================= ===============================================
    """

    def __init__(self, *, params: CsdParams, ports: int):
        self._params, self._ports = params, ports
        super().__init__(
            {
                "i": In(stream.Signature(staged_page_layout(params, ports))),
                "request": Out(ports),
                "grant": In(1),
                "releases": Out(ports),
                "valid": Out(1),
                "port": Out(bits_for(ports - 1)),
                "line": Out(line_layout(params)),
                "read": Out(1),
                "read_at": Out(staged_layout(params)),
                "read_data": In(params.lanes * FP16.width),
            }
        )

    def elaborate(self, platform):
        m = Module()
        p = self._params
        m.submodules.pages = pages = StreamFifo(shape=staged_page_layout(p, self._ports), depth=p.flash_queue)
        m.submodules.filter = rows = EntryFilter(lines=p.page_lines, rows=p.page_lines)
        head, now = pages.o.payload, Signal(staged_page_layout(p, self._ports))
        wanted, begins = Signal(), Signal()
        wiring.connect(m, wiring.flipped(self.i), pages.i)
        m.d.comb += [
            wanted.eq(head.job.mask.any()),
            self.request.eq(Mux(pages.o.valid & wanted & rows.ready, 1 << head.job.port, 0)),
            begins.eq(self.request.any() & self.grant),
            pages.o.ready.eq(begins | (pages.o.valid & ~wanted)),
            rows.start.eq(begins),
            rows.mask.eq(head.job.mask),
            rows.row_lines.eq(head.job.row_lines),
            rows.go.eq(1),
            self.releases.eq(Mux(rows.last, 1 << now.job.port, 0)),
            self.read.eq(rows.valid),
            self.read_at.eq(now.at),
            self.read_at.line.eq(rows.line),
            self.line.data.eq(self.read_data),
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
        return m


class Fetch(wiring.Component):
    """Splits ATTENDs into heads for whichever kernel is ready, and filters, looks up and pushes pages.

    Each kernel has a page filter. Pages wait for the one lookup of a tick, round robin, kernels first, then the mover's;
    one that was looked up waits until its controller takes it, and all others behind it. Pages of the last two groups of
    a head go to the group buffer's queue without a lookup, one a tick.

    A page is looked at no earlier than its rows fit: rank and count together reach `limit` at most.

    Parameters
    ----------
    params : CsdParams
    depth : int
        Commands that the code memory holds.

    Members
    -------
    ============== === ===================== ===========================================================
    anew           In  1                     turns begin with the first kernel
    tick           In  32
    configuration  In  layout                what the last CONFIG set
    channel_groups In                        pages of a span
    valid          In  1                     an ATTEND is the next command
    command        In  record
    number         In                        which command it is
    pop            Out 1                     its last head is handed over
    heads          Out stream(head) a kernel valid for one tick at most, only to a kernel that is ready
    begun          Out 32                    the first tick of the command of a head that is handed over
    asks           In  stream(pass) a kernel
    words          In  stream(lanes) a kernel masks, entry 0 first
    limits         In  a kernel              rows of the pass for which there is room
    page           In  stream(lookup)        a page of the mover
    lookup         Out 1                     of the tables; latency 1
    entry          Out layout
    channel        In                        what was looked up
    address        In  layout
    ready          In  channels              the controller takes an operation
    push           Out channels              one-hot: a read
    push_address   Out layout
    push_job       Out layout
    staged         Out stream(page)          pages of the group buffer
    working        Out 1                     a head, a page or a push is handed on, or a page left out
    waits          Out 1                     a page or a head waits to be taken
    taken          Out 2                     a page of this form is looked up for a kernel
    skipped        Out 2 * kernels           pages of tokens, then of channels, that are left out
    ============== === ===================== ===========================================================
    """

    def __init__(self, *, params: CsdParams, depth: int):
        self._params = p = params
        self._ports = ports = p.kernels + 1
        number = bits_for(depth + 1)
        c, k = p.flash.channels, p.kernels
        super().__init__(
            {
                "anew": In(1),
                "tick": In(TICK_BITS),
                "configuration": In(configuration_layout()),
                "channel_groups": In(12),
                "valid": In(1),
                "command": In(layout_of(ISA.record("code"))),
                "number": In(number),
                "pop": Out(1),
                "heads": Out(stream.Signature(head_layout(p))).array(k),
                "begun": Out(TICK_BITS),
                "asks": In(stream.Signature(pass_layout(p))).array(k),
                "words": In(stream.Signature(p.lanes)).array(k),
                "limits": In(bits_for(max(p.max_tokens, p.max_channels)) + 1).array(k),
                "page": In(stream.Signature(lookup_layout(p, ports))),
                "lookup": Out(1),
                "entry": Out(entry_layout(p)),
                "channel": In(bits_for(c - 1)),
                "address": In(address_layout(p.flash)),
                "ready": In(c),
                "push": Out(c),
                "push_address": Out(address_layout(p.flash)),
                "push_job": Out(job_layout(p, ports)),
                "staged": Out(stream.Signature(staged_page_layout(p, ports))),
                "working": Out(1),
                "waits": Out(1),
                "taken": Out(2),
                "skipped": Out(2 * k),
            }
        )

    def elaborate(self, platform):
        m = Module()
        p, kernels = self._params, range(self._params.kernels)
        handed = self._hand_over(m)
        lookups, stagings, looks = [], [], []
        for k in kernels:
            lookup, staging, look = self._pass(m, k)
            lookups.append(lookup)
            stagings.append(staging)
            looks.append(look)

        # The lookup, and the page that was looked up one tick ago or waits since.
        anew = ResetInserter(self.anew)
        turn, staging_turn = RoundRobin(count=p.kernels + 1), RoundRobin(count=p.kernels)
        m.submodules.turn, m.submodules.staging_turn = anew(turn), anew(staging_turn)
        held, pushed = Signal(), Signal()
        requests = [valid for valid, _, _ in lookups] + [self.page.valid]
        pages = [page for _, page, _ in lookups] + [self.page.payload]
        chosen = Signal(lookup_layout(p, self._ports))
        job = Signal(job_layout(p, self._ports))
        m.d.comb += [
            turn.requests.eq(Cat(requests)),
            turn.ready.eq(~held | pushed),
            chosen.eq(pick(turn.grant, [page.as_value() for page in pages])),
            self.lookup.eq(turn.valid & turn.ready),
            self.entry.eq(chosen.entry),
            self.page.ready.eq(turn.ready & turn.grant[-1]),
            self.push.eq(Mux(held, 1 << self.channel, 0) & self.ready),
            pushed.eq(self.push.any()),
            self.push_address.eq(self.address),
            self.push_job.eq(job),
        ]
        for k, (_, _, ready) in enumerate(lookups):
            m.d.comb += ready.eq(turn.ready & turn.grant[k])
        m.d.sync += held.eq(self.lookup | (held & ~pushed))
        with m.If(self.lookup):
            m.d.sync += job.eq(chosen.job)

        m.d.comb += [
            staging_turn.requests.eq(Cat(valid for valid, _, _ in stagings)),
            staging_turn.ready.eq(self.staged.ready),
            self.staged.valid.eq(staging_turn.valid),
            self.staged.payload.eq(pick(staging_turn.grant, [page.as_value() for _, page, _ in stagings])),
        ]
        for k, (_, _, ready) in enumerate(stagings):
            m.d.comb += ready.eq(self.staged.ready & staging_turn.grant[k])

        of_kernel = self.lookup & ~turn.grant[-1]
        m.d.comb += [
            self.working.eq(handed | pushed | self.lookup | Cat(looks).any()),
            self.waits.eq(held | self.valid),
            self.taken.eq(Cat(of_kernel & (chosen.entry.form == form) for form in range(len(FORMS)))),
        ]
        return m

    def _hand_over(self, m):
        """Heads of the ATTEND, one a tick."""
        p, command = self._params, self.command
        turn = RoundRobin(count=p.kernels)
        m.submodules.heads_turn = ResetInserter(self.anew)(turn)
        head, first, offset = Signal(10), Signal(TICK_BITS), Signal(bits_for(p.vector_lines - 1))
        handed, last = Signal(), Signal()
        m.d.comb += [
            turn.requests.eq(Cat(port.ready for port in self.heads)),
            turn.ready.eq(self.valid),
            handed.eq(self.valid & turn.valid),
            last.eq(head == command.heads - 1),
            self.pop.eq(handed & last),
            self.begun.eq(Mux(head == 0, self.tick, first)),
        ]
        for k, port in enumerate(self.heads):
            m.d.comb += [
                port.valid.eq(self.valid & turn.grant[k]),
                port.payload.slot.eq(command.slot + head),
                port.payload.tokens.eq(command.tokens),
                port.payload.spans.eq(command.spans),
                port.payload.share.eq(command.share),
                port.payload.line.eq(command.line + offset),
                port.payload.line2.eq(command.line2 + offset),
            ]
        row_lines = self.configuration.d >> (p.lanes.bit_length() - 1)
        with m.If(handed):
            m.d.sync += [
                first.eq(self.begun),
                head.eq(Mux(last, 0, head + 1)),
                offset.eq(Mux(last, 0, offset + self.configuration.group * row_lines)),
            ]
        return handed

    def _pass(self, m, k):
        """(valid, page, ready) of the next page's lookup, the same of its staging, and whether one is left out."""
        p = self._params
        ask, words, port = self.asks[k], self.words[k], self.heads[k]
        m.submodules[f"filter_{k}"] = pages = PageFilter(
            lanes=p.lanes, rows=p.page_lines, entries=max(p.max_tokens, p.max_channels)
        )
        now = Signal(pass_layout(p), name=f"pass_{k}")
        slot = Signal.like(port.payload.slot, name=f"slot_{k}")
        tokens = Signal.like(port.payload.tokens, name=f"tokens_{k}")
        with m.If(port.valid):
            m.d.sync += [slot.eq(port.payload.slot), tokens.eq(port.payload.tokens)]
        with m.If(pages.start):
            m.d.sync += now.eq(ask.payload)
        out = pages.o.payload
        m.d.comb += [
            ask.ready.eq(~pages.busy),
            pages.start.eq(ask.valid & ask.ready),
            pages.n.eq(ask.payload.n),
            pages.rows.eq(ask.payload.rows),
            pages.skip.eq(int(p.page_filter)),
            pages.pick.eq(1),
            pages.i.valid.eq(words.valid | now["all"]),
            pages.i.payload.eq(words.payload | now["all"].replicate(p.lanes)),
            words.ready.eq(pages.i.ready & ~now["all"]),
        ]
        by_channels, group = Signal(name=f"by_channels_{k}"), Signal(p.table_bits, name=f"group_{k}")
        staged, fits = Signal(name=f"is_staged_{k}"), Signal(name=f"fits_{k}")
        lookup = Signal(lookup_layout(p, self._ports), name=f"lookup_{k}")
        staging = Signal(staged_page_layout(p, self._ports), name=f"staging_{k}")
        lookup_ready, staging_ready = Signal(name=f"lookup_ready_{k}"), Signal(name=f"staging_ready_{k}")
        m.d.comb += [
            by_channels.eq(now.form == _CHANNELS),
            group.eq(now.first + out.page),
            staged.eq(~by_channels & ((group + 2) * self.configuration.page_tokens >= tokens)),
            fits.eq(out.rank + out.count <= self.limits[k]),
            lookup.entry.form.eq(now.form),
            lookup.entry.slot.eq(slot),
            lookup.entry.position.eq(
                Mux(by_channels, now.first * self.channel_groups + out.page, Cat(now.values, group))
            ),
            lookup.job.port.eq(k),
            lookup.job.turn.eq(now.turn),
            lookup.job.mask.eq(out.mask),
            lookup.job.row_lines.eq(now.row_lines),
            lookup.job.rank.eq(out.rank),
            staging.at.slot.eq(slot),
            staging.at.odd.eq(group[0]),
            staging.at["values"].eq(now.values),
            staging.job.eq(lookup.job),
            pages.o.ready.eq(fits & Mux(staged, staging_ready, lookup_ready)),
            self.skipped[k].eq(pages.skipped & ~by_channels & ~staged),
            self.skipped[p.kernels + k].eq(pages.skipped & by_channels),
        ]
        wants = pages.o.valid & fits
        return (
            (wants & ~staged, lookup, lookup_ready),
            (wants & staged, staging, staging_ready),
            pages.looked & (pages.skipped | staged),
        )
