"""The writer: all commands but attention, each of which moves whole rows between the drive's memories and its flash."""

from amaranth.hdl import Cat, Module, Mux, Signal
from amaranth.lib import stream, wiring
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.csd import CAUSES, FORMS, ISA, OP, CsdParams
from tilewright.arch.flash import ERASE, PROGRAM
from tilewright.arch.formats import FP16
from tilewright.rtl.csd.channel import address_layout
from tilewright.rtl.csd.controller import line_layout
from tilewright.rtl.csd.decoder import configuration_layout
from tilewright.rtl.csd.fetch import lookup_layout
from tilewright.rtl.csd.ftl import PageLogs, entry_layout
from tilewright.rtl.csd.operands import OperandBuffer
from tilewright.rtl.csd.staging import staged_layout, sum_layout
from tilewright.rtl.layouts import layout_of
from tilewright.rtl.pim.asic_lane import delay

__all__ = ["Writer"]

_CHANNELS = FORMS.index("channels")


class Writer(wiring.Component):
    """Executes WRITE, RECLAIM, READ and TRANSPOSE, one at a time.

    A command is loaded in a tick, worked on, and ends with a tick of its own. A line is read in each tick, and written
    in the next one. In detail:

    - tokens: head by head, group by group the lines of keys, then those of values; of a group that is full then,
      the page of keys is programmed, then that of values.
    - a program: the lines of the page, from the group buffer, the vectors or the transposition buffer; then, in at least
      one tick, the operation is pushed, its page taken from the log and its table entry written.
    - READ: a page after the other; the next one is looked up when all lines of the one before are there.
    - TRANSPOSE: head by head; all pages of keys are looked up, their lines gathered, and the pages of channels programmed.
    - RECLAIM: erases channel by channel, plane by plane in the log's order.

    Where its operation and one of the fetch unit are for the same controller, it waits.

    Parameters
    ----------
    params : CsdParams
    order : str
        `placement.order`.
    black_box : bool
        The transposition buffer is outside of the netlist.

    Members
    -------
    ==================== === ================= =========================================================
    clear                In  1
    configuration        In  layout            what the last CONFIG set
    channel_groups       In                    channel-indexed pages of a span
    span_groups          In                    token-indexed groups of a span
    first_group          In                    group of the command's first token,
    first_row            In                    and its row there
    valid                In  1                 there is a command
    command              In  record            stays until `pop`
    loads, pop           Out 1                 it begins, and ends, with this tick
    vector_read          Out 1                 latency 1
    vector_address       Out
    vector_data          In  line
    vector_write         Out 1
    vector_write_address Out
    vector_write_data    Out line
    buffer_*                                   of `GroupBuffer`: write_*, accumulate, fresh, sum_at, read_*
    assign               Out 1                 of the tables
    assign_entry         Out layout
    assign_address       Out layout
    assign_channel       In                    where the entry lies
    cell_write           Out channels          one-hot: a line of cells is written
    cell_word            Out                   which one of the page at `assign_address`
    cell_data            Out line
    ready                In  channels          the controller takes an operation
    others               In  channels          the fetch unit has one for it
    push                 Out channels          one-hot
    push_kind            Out 2
    push_address         Out layout
    page                 Out stream(lookup)    a page to be read
    line_valid           In  1                 a line of such a page
    line                 In  line_layout
    working              Out 1                 this tick is busy
    stall                Out range(causes)     cause of this tick, where it is not
    ==================== === ================= =========================================================
    """

    def __init__(self, *, params: CsdParams, order: str, black_box: bool = True):
        self._params, self._order, self._black_box = params, order, black_box
        p = params
        c, line = p.flash.channels, p.lanes * FP16.width
        vector, address = bits_for(p.vector_lines - 1), address_layout(p.flash)
        super().__init__(
            {
                "clear": In(1),
                "configuration": In(configuration_layout()),
                "channel_groups": In(12),
                "span_groups": In(20),
                "first_group": In(p.table_bits),
                "first_row": In(12),
                "valid": In(1),
                "command": In(layout_of(ISA.record("code"))),
                "loads": Out(1),
                "pop": Out(1),
                "vector_read": Out(1),
                "vector_address": Out(vector),
                "vector_data": In(line),
                "vector_write": Out(1),
                "vector_write_address": Out(vector),
                "vector_write_data": Out(line),
                "buffer_write": Out(1),
                "buffer_write_at": Out(staged_layout(p)),
                "buffer_write_data": Out(line),
                "buffer_accumulate": Out(1),
                "buffer_fresh": Out(1),
                "buffer_sum_at": Out(sum_layout(p)),
                "buffer_read": Out(1),
                "buffer_read_at": Out(staged_layout(p)),
                "buffer_read_data": In(line),
                "assign": Out(1),
                "assign_entry": Out(entry_layout(p)),
                "assign_address": Out(address),
                "assign_channel": In(bits_for(c - 1)),
                "cell_write": Out(c),
                "cell_word": Out(bits_for(p.page_lines - 1)),
                "cell_data": Out(line),
                "ready": In(c),
                "others": In(c),
                "push": Out(c),
                "push_kind": Out(2),
                "push_address": Out(address),
                "page": Out(stream.Signature(lookup_layout(p, p.kernels + 1))),
                "line_valid": In(1),
                "line": In(line_layout(p)),
                "working": Out(1),
                "stall": Out(range(len(CAUSES))),
            }
        )

    def elaborate(self, platform):
        m = Module()
        p, c, config = self._params, self.command, self.configuration
        shift = p.lanes.bit_length() - 1
        m.submodules.logs = logs = PageLogs(params=p.flash, order=self._order)
        m.submodules.transposed = matrix = OperandBuffer(
            lanes=p.lanes, lines=p.batches * p.buffer_lines, black_box=self._black_box
        )

        # What follows from command and configuration.
        is_ = {name: c.op == OP[name] for name in ("WRITE", "TRANSPOSE", "READ", "RECLAIM")}
        shapes = Signal()  # channel-indexed pages are programmed
        row_lines, span_lines = Signal(12), Signal(20)
        page_lines = Signal(bits_for(p.page_lines))  # that are programmed
        m.d.comb += [
            shapes.eq(is_["TRANSPOSE"] | (is_["WRITE"] & (c.form == _CHANNELS))),
            row_lines.eq(config.d >> shift),
            span_lines.eq(config.span >> shift),
            page_lines.eq(Mux(shapes, config.page_channels * span_lines, config.page_tokens * row_lines)),
        ]

        head = Signal(10)
        slot = Signal(len(self.assign_entry.slot))
        index = Signal(20)  # of a page of the head, or of the oldest blocks
        group, row, left = (
            Signal(p.table_bits),
            Signal(12),
            Signal.like(c.tokens),
        )  # of the tokens to be written
        at = Signal(bits_for(p.page_lines))  # line of a page
        word = Signal(20)  # line of a row
        keys, values = Signal.like(self.vector_address), Signal.like(self.vector_address)
        of_values = Signal()
        element = Signal.like(config.d)  # of the transposition buffer
        got = Signal(bits_for(max(p.batches * p.buffer_lines, p.page_lines)))
        m.d.comb += slot.eq(c.slot + head)
        last_head = head == c.heads - 1

        # The rows of this group that are written, and the lines that these are.
        here, first_line, end_line = Signal(12), Signal.like(at), Signal.like(at)
        room = config.page_tokens - row
        m.d.comb += [
            here.eq(Mux(left < room, left, room)),
            first_line.eq(row * row_lines),
            end_line.eq((row + here) * row_lines),
        ]
        full = row + here == config.page_tokens

        # The page in question.
        entry = self.assign_entry
        span_first = Mux(is_["TRANSPOSE"], self.span_groups, self.channel_groups) * c.first
        m.d.comb += [
            entry.slot.eq(slot),
            entry.form.eq(shapes),
            entry.position.eq(Mux(shapes, c.first * self.channel_groups + index, Cat(of_values, group))),
            self.assign_address.eq(logs.address),
            logs.load.eq(self.clear),
            logs.channel.eq(self.assign_channel),
            self.page.payload.entry.slot.eq(slot),
            self.page.payload.entry.form.eq(is_["READ"] & (c.form == _CHANNELS)),
            self.page.payload.entry.position.eq(
                Mux(
                    is_["TRANSPOSE"],
                    (span_first + index) << 1,
                    Mux(c.form == _CHANNELS, span_first, c.first) + index,
                )
            ),
            self.page.payload.job.port.eq(p.kernels),
            self.page.payload.job.mask.eq(
                Mux(is_["READ"], -1, Cat(i < config.page_tokens for i in range(p.page_lines)))
            ),
            self.page.payload.job.row_lines.eq(Mux(is_["READ"], 1, row_lines)),
            self.page.payload.job.rank.eq(Mux(is_["READ"], 0, index * config.page_tokens)),
        ]
        wanted = Signal.like(got)  # lines of what was looked up
        m.d.comb += wanted.eq(Mux(is_["READ"], p.page_lines, (config.span * row_lines)[: len(got)]))

        # Planes of a channel in the log's order.
        f = p.flash
        sizes = {"W": ("chip", f.chips), "D": ("die", f.dies), "P": ("plane", f.planes)}
        digits = [sizes[letter] for letter in self._order if letter != "C"]
        plane = Signal(address_layout(f))
        channel = Signal.like(self.assign_channel)
        following, wraps = Signal(address_layout(f)), 1
        for name, size in digits:
            ends = Signal(name=f"{name}_ends")
            m.d.comb += [
                ends.eq(wraps & (plane[name] == size - 1)),
                following[name].eq(Mux(ends, 0, plane[name] + wraps)),
            ]
            wraps = ends
        last_plane = wraps
        last_channel = channel == f.channels - 1

        target, takes = Signal(f.channels), Signal()
        m.d.comb += [
            target.eq(1 << Mux(is_["RECLAIM"], channel, self.assign_channel)),
            takes.eq((target & self.ready & ~self.others).any()),
            self.push_address.eq(logs.address),
        ]

        # Lines that were read one tick ago.
        kinds = {name: Signal(name=f"reads_{name}") for name in ("row", "page")}
        moved = {name: delay(m, s, 1, name=f"moves_{name}", reset_less=False) for name, s in kinds.items()}
        place, sums = Signal(staged_layout(p)), Signal(sum_layout(p))
        m.d.comb += [
            place.line.eq(at),
            place["values"].eq(of_values),
            place.odd.eq(group[0]),
            place.slot.eq(slot),
            sums.word.eq(word),
            sums.slot.eq(slot),
            self.buffer_write.eq(moved["row"]),
            self.buffer_write_at.eq(delay(m, place.as_value(), 1, name="place")),
            self.buffer_write_data.eq(self.vector_data),
            self.buffer_accumulate.eq(delay(m, of_values, 1, name="values")),
            self.buffer_fresh.eq(delay(m, (group == 0) & (at < row_lines), 1, name="fresh")),
            self.buffer_sum_at.eq(delay(m, sums.as_value(), 1, name="sums")),
            self.buffer_read_at.eq(place),
            self.cell_write.eq(Mux(moved["page"], 1 << self.assign_channel, 0)),
            self.cell_word.eq(delay(m, at, 1, name="cell_word")),
            self.cell_data.eq(
                Mux(is_["TRANSPOSE"], matrix.read_data, Mux(shapes, self.vector_data, self.buffer_read_data))
            ),
            self.vector_address.eq(Mux(of_values & ~shapes, values, keys)),
            self.vector_write.eq(self.line_valid & is_["READ"]),
            self.vector_write_address.eq(keys),
            self.vector_write_data.eq(self.line.data),
            matrix.stride.eq(row_lines),
            matrix.write.eq(self.line_valid & is_["TRANSPOSE"]),
            matrix.write_line.eq(self.line.row * row_lines + self.line.word),
            matrix.write_turn.eq(self.line.row),
            matrix.write_mask.eq(-1),
            matrix.write_data.eq(self.line.data),
            matrix.read_column.eq(1),
            matrix.read_line.eq(word * config.d + (element >> shift)),
            matrix.read_turn.eq(element),
        ]
        with m.If(self.line_valid):
            m.d.sync += got.eq(got + 1)
            with m.If(is_["READ"]):
                m.d.sync += keys.eq(keys + 1)

        m.d.comb += [self.working.eq(1), self.stall.eq(CAUSES.index("queue"))]
        with m.FSM():
            with m.State("IDLE"):
                m.d.comb += [
                    self.working.eq(self.valid),
                    self.loads.eq(self.valid),
                    self.stall.eq(CAUSES.index("idle")),
                ]
                m.d.sync += [
                    s.eq(0) for s in (head, index, at, word, of_values, element, got, channel, plane)
                ]
                m.d.sync += [
                    keys.eq(c.line),
                    values.eq(c.line2),
                    left.eq(c.tokens),
                    group.eq(self.first_group),
                    row.eq(self.first_row),
                ]
                with m.If(self.valid):
                    with m.If(is_["RECLAIM"]):
                        m.next = "ERASE"
                    with m.Elif(is_["WRITE"] & shapes):
                        m.next = "PAGE"
                    with m.Elif(is_["WRITE"]):
                        m.d.sync += at.eq(self.first_row * row_lines)
                        m.next = "ROWS"
                    with m.Else():
                        m.next = "LOOK"

            with m.State("ROWS"):  # of keys or values, from the vectors
                m.d.comb += [kinds["row"].eq(1), self.vector_read.eq(1)]
                with m.If(of_values):
                    m.d.sync += values.eq(values + 1)
                with m.Else():
                    m.d.sync += keys.eq(keys + 1)
                m.d.sync += [at.eq(at + 1), word.eq(Mux(word == row_lines - 1, 0, word + 1))]
                with m.If(at == end_line - 1):
                    m.d.sync += [at.eq(first_line), of_values.eq(~of_values)]
                    with m.If(of_values):
                        with m.If(full):
                            m.d.sync += at.eq(0)
                            m.next = "PAGE"
                        with m.Else():  # the last group of the head
                            self._next_head(m, last_head, head, group, row, left, at, row_lines)

            with m.State("PAGE"):  # its lines to the cells
                m.d.comb += [
                    kinds["page"].eq(1),
                    self.vector_read.eq(shapes & is_["WRITE"]),
                    self.buffer_read.eq(~shapes),
                    matrix.read.eq(is_["TRANSPOSE"]),
                ]
                m.d.sync += at.eq(at + 1)
                with m.If(shapes):
                    m.d.sync += word.eq(word + 1)
                    with m.If(is_["WRITE"]):
                        m.d.sync += keys.eq(keys + 1)
                    with m.If(word == span_lines - 1):
                        m.d.sync += [word.eq(0), element.eq(element + 1)]
                with m.If(at == page_lines - 1):
                    m.d.sync += at.eq(0)
                    m.next = "PUSH"

            with m.State("PUSH"):
                m.d.comb += [
                    self.working.eq(takes),
                    self.push.eq(Mux(takes, target, 0)),
                    self.push_kind.eq(PROGRAM),
                    self.assign.eq(takes),
                    logs.take.eq(takes),
                ]
                with m.If(takes):
                    m.next = "PAGE"
                    with m.If(shapes):
                        m.d.sync += index.eq(index + 1)
                        with m.If(index == self.channel_groups - 1):
                            m.d.sync += [index.eq(0), element.eq(0), got.eq(0), head.eq(head + 1)]
                            m.next = "LOOK"
                            with m.If(is_["WRITE"]):
                                m.next = "PAGE"
                            with m.If(last_head):
                                m.next = "FINISH"
                    with m.Else():
                        m.d.sync += of_values.eq(~of_values)
                        with m.If(of_values):
                            m.d.sync += [group.eq(group + 1), row.eq(0), left.eq(left - here)]
                            m.next = "ROWS"
                            with m.If(left == here):
                                self._next_head(m, last_head, head, group, row, left, at, row_lines)

            with m.State("LOOK"):
                m.d.comb += [self.page.valid.eq(1), self.working.eq(self.page.ready)]
                with m.If(self.page.ready):
                    m.d.sync += index.eq(index + 1)
                    with m.If(is_["READ"]):
                        m.next = "GATHER"
                    with m.Elif(index == self.span_groups - 1):
                        m.d.sync += index.eq(0)
                        m.next = "GATHER"

            with m.State("GATHER"):
                m.d.comb += [self.working.eq(0), self.stall.eq(CAUSES.index("flash"))]
                with m.If(self.line_valid & (got == wanted - 1)):
                    m.d.sync += got.eq(0)
                    with m.If(is_["TRANSPOSE"]):
                        m.next = "PAGE"
                    with m.Else():
                        m.next = "LOOK"
                        with m.If(index == c.count):
                            m.d.sync += [index.eq(0), head.eq(head + 1)]
                            with m.If(last_head):
                                m.next = "FINISH"

            with m.State("ERASE"):
                m.d.comb += [
                    self.working.eq(takes),
                    self.push.eq(Mux(takes, target, 0)),
                    self.push_kind.eq(ERASE),
                    logs.channel.eq(channel),
                    self.push_address.eq(plane),
                    self.push_address.block.eq(logs.oldest),
                ]
                with m.If(takes):
                    m.d.sync += plane.eq(following)
                    with m.If(last_plane):
                        m.d.sync += channel.eq(Mux(last_channel, 0, channel + 1))
                        with m.If(last_channel):
                            m.d.comb += logs.release.eq(1)
                            m.d.sync += index.eq(index + 1)
                            with m.If(index == c.count - 1):
                                m.next = "FINISH"

            with m.State("FINISH"):
                m.d.comb += self.pop.eq(1)
                m.next = "IDLE"
        return m

    def _next_head(self, m, last, head, group, row, left, at, row_lines):
        """The tokens of the next head, or the end."""
        m.d.sync += [
            head.eq(head + 1),
            group.eq(self.first_group),
            row.eq(self.first_row),
            left.eq(self.command.tokens),
            at.eq(self.first_row * row_lines),
        ]
        m.next = "ROWS"
        with m.If(last):
            m.next = "FINISH"
