"""The attention kernel: one K/V head at a time, dense or by SparF, step after step."""

from amaranth.hdl import Array, Assert, Cat, Const, Module, Mux, Signal
from amaranth.lib import wiring
from amaranth.lib.memory import Memory
from amaranth.utils import bits_for

from tilewright.arch.csd import ATTENTIONS, CAUSES, FORMS, TOKEN_BITS, VECTOR_TICKS, CsdParams
from tilewright.arch.formats import FP16, FP32
from tilewright.rtl.csd.argtopk import tree_sum
from tilewright.rtl.csd.gemv import GemvUnit
from tilewright.rtl.csd.intake import Intake
from tilewright.rtl.csd.memory import store
from tilewright.rtl.csd.operands import OperandBuffer
from tilewright.rtl.csd.ports import kernel_members
from tilewright.rtl.csd.softmax import PROGRAMS, ScalarUnit, SoftmaxUnit
from tilewright.rtl.csd.vector_unit import VectorUnit
from tilewright.rtl.lib.fp import FpMaximum
from tilewright.rtl.pim.asic_lane import delay

__all__ = ["AttentionKernel"]

_TOKENS, _CHANNELS = FORMS.index("tokens"), FORMS.index("channels")
_FLASH, _ARGTOPK, _QUEUE, _IDLE = (CAUSES.index(name) for name in ("flash", "argtopk", "queue", "idle"))
_ONE = 127 << 23  # FP32
_DATA = 1  # ticks from a memory's address to its word


def count(m, *levels):
    """Move nested counters, (signal, limit), the innermost first, to their next position. Returns whether this is their
    last one, behind which they begin anew."""
    ends = Const(1)
    for signal, limit in levels:
        last = signal == limit - 1
        with m.If(ends):
            m.d.sync += signal.eq(Mux(last, 0, signal + 1))
        ends = ends & last
    return ends


class AttentionKernel(wiring.Component):
    """Attends for the heads that share a K/V head, as `workloads.csd_kernels` computes it.

    Its phases follow one another; while a batch is worked on the next one comes (see `Intake`). g query heads, S tokens,
    d channels, rows of d / lanes lines; of K and V n tokens are needed: S, or with an estimate (k < S) k:

    | phase    | ticks that do something                    | what                                               |
    | -------- | ------------------------------------------ | -------------------------------------------------- |
    | load     | a line of queries each, as granted         |                                                    |
    | rank *   | g * words, 17 passes of the argtopk unit   | channels by their magnitude                        |
    | tau *    | for each query head 2 * rows, scalars      | 1/tau from magnitudes                              |
    | pack *   | g * rows                                   | chosen channels of the queries, a column a head    |
    | work *   | each span: g * ceil(r / lanes) * tokens    | estimated scores                                   |
    | softmax *| for each query head S, scalars             | their weights                                      |
    | rank *   | g * ceil(S / lanes), 17 passes             | tokens by their weight                             |
    | cover *  | for each query head ceil(S / lanes), scalars | alpha                                            |
    | work     | each batch of keys: tokens * g * rows      | scores                                             |
    | softmax  | for each query head n, scalars             | weights                                            |
    | work     | each batch of values: g * ceil(tokens / lanes) * d | their mix                                  |
    | factors, sums + | scalars for each query head; rows, as granted | the mean of the values                   |
    | out      | g * rows, twice as many with the mean      | results, FP16                                      |
    | store    | a line of results each, as granted         |                                                    |

    *: with an estimate; +: and with the mean. Between phases are the latencies of the units (`arch.csd`), and a tick in
    which the state sees that a batch is complete. Pages of keys are asked for as soon as it is known which, those of
    values while the last batch of keys is worked on.

    Parameters
    ----------
    params : CsdParams
    black_box : bool
        Memories are outside of the netlist.

    Members
    -------
    See `ports.kernel_members`.
    """

    def __init__(self, *, params: CsdParams, black_box: bool = True):
        self._params, self._black_box = params, black_box
        super().__init__(kernel_members(params))

    def elaborate(self, platform):
        m = Module()
        p, c = self._params, self.configuration
        lanes, group = p.lanes, c.group
        place = lanes.bit_length() - 1
        word_bits, token_bits = bits_for(max(1, p.max_channels // lanes - 1)), bits_for(p.max_tokens - 1)
        channel_bits = place + word_bits
        heads = p.max_group

        # ---- the head ----
        head, following = (Signal(self.head.payload.shape(), name=name) for name in ("now", "following"))
        follows = Signal()  # there is a following head
        estimates, mean, estimating = Signal(), Signal(), Signal()
        row_lines, span_lines = Signal(bits_for(p.max_channels // lanes)), Signal(bits_for(p.buffer_lines))
        chosen, needed = Signal(bits_for(p.max_channels)), Signal(TOKEN_BITS)
        m.d.comb += [
            row_lines.eq(c.d >> place),
            span_lines.eq(c.span >> place),
            estimates.eq((c.attention == ATTENTIONS.index("sparf")) & (c.k < head.tokens)),
            mean.eq(c.mean & estimates),
            chosen.eq(Mux(c.r < c.d, c.r, c.d)),
            needed.eq(Mux(estimates, c.k, head.tokens)),
        ]

        # ---- counters of the phases ----
        h, w = Signal(range(heads)), Signal(word_bits)
        item, part = Signal(TOKEN_BITS), Signal()  # a token, row, group or word of weights; one of two
        element = Signal(TOKEN_BITS)
        rest = Signal(range(p.exp_latency + p.reduce_latency + p.gemv_latency + VECTOR_TICKS + 2))
        of_tokens = Signal()  # what is ranked
        values, mixed = Signal(), Signal()  # the phase is that of values; they are mixed

        # ---- units and memories ----
        def memory(name, width, depth, granularity=None):
            unit = store(black_box=self._black_box, width=width, depth=depth, granularity=granularity)
            m.submodules[name] = unit
            return unit

        line = lanes * FP16.width
        packed_lines = -(-heads // lanes)
        q = memory("q", line, heads << word_bits)
        scores = memory("scores", FP32.width, heads << token_bits)
        weights = memory("weights", line, heads << max(0, token_bits - place))
        mix = memory("mix", lanes * FP32.width, heads << word_bits, FP32.width)
        sums = memory("sums", lanes * FP32.width, 1 << word_bits)
        m.submodules.packed = packed = OperandBuffer(
            lanes=lanes, lines=max(2, p.max_channels * packed_lines), black_box=self._black_box
        )
        m.submodules.intake = intake = Intake(params=p, black_box=self._black_box)
        m.submodules.gemv = gemv = GemvUnit(
            lanes=lanes, totals=1 << max(channel_bits + bits_for(heads - 1), token_bits)
        )
        m.submodules.softmax = softmax = SoftmaxUnit(lanes=lanes, terms=p.exp_terms)
        m.submodules.scalars = scalars = ScalarUnit(
            reciprocal_iterations=p.reciprocal_iterations, rsqrt_iterations=p.rsqrt_iterations
        )
        m.submodules.vector = vector = VectorUnit(lanes=lanes)
        m.submodules.maximum = maximum = FpMaximum(format=FP32)
        top, tau, inverse, alpha, mix_factor, sum_factor = (
            Array(Signal(FP32.width, name=f"{name}_{i}") for i in range(heads))
            for name in ("top", "tau", "inverse", "alpha", "mix_factor", "sum_factor")
        )
        m.submodules.channel_masks = channel_masks = Memory(shape=lanes, depth=1 << word_bits, init=[])
        m.submodules.prefixes = prefixes = Memory(shape=len(chosen), depth=1 << word_bits, init=[])
        m.submodules.token_masks = token_masks = Memory(
            shape=lanes, depth=1 << max(0, token_bits - place), init=[]
        )

        def look(memory, address):
            """What a memory of few words holds, in the same tick."""
            port = memory.read_port(domain="comb")
            m.d.comb += port.addr.eq(address)
            return port.data

        # What was asked of a memory one tick ago.
        h_data, w_data, item_data, part_data = (
            delay(m, s, _DATA, name=f"{s.name}_data") for s in (h, w, item, part)
        )
        mask_data, prefix_data = look(channel_masks, w_data), look(prefixes, w_data)
        loads, ranks, measures, packs, covers, works, weighs, joins, stores = (
            Signal(name=name)
            for name in (
                "loads",
                "ranks",
                "measures",
                "packs",
                "covers",
                "works",
                "weighs",
                "joins",
                "stores",
            )
        )

        # ---- batches ----
        base, batch = (
            Signal(TOKEN_BITS),
            Signal(range(p.batches)),
        )  # first row of the batch, and the part where it is
        batches_left = Signal(
            range(p.batches + 1)
        )  # batches of the pass from this one on, at most as many as there are parts
        later = Signal()  # lines that come belong to values
        spans_done, asked_spans = Signal(TOKEN_BITS), Signal(TOKEN_BITS)
        rows, step, total = Signal(TOKEN_BITS), Signal(TOKEN_BITS), Signal(TOKEN_BITS)
        final, groups, drop = Signal(), Signal(TOKEN_BITS), Signal()
        m.d.comb += [
            step.eq(Mux(estimating, c.span, intake.rows)),
            total.eq(Mux(estimating, head.tokens, needed)),
            final.eq(base + step >= total),
            rows.eq(Mux(final, total - base, step)),
            groups.eq((Mux(estimating, chosen, rows) + lanes - 1) >> place),
            intake.estimating.eq(estimating),
            intake.spans.eq(head.spans),
            intake.span.eq(spans_done),
            intake.base.eq(base),
            intake.part.eq(batch),
            batches_left.eq(1 + tree_sum(total - base > k * intake.rows for k in range(1, p.batches))),
            intake.left.eq(batches_left),
            intake.turn.eq(later),
            intake.row_lines.eq(row_lines),
            intake.span_lines.eq(span_lines),
            intake.valid.eq(self.valid),
            intake.line.eq(self.line),
            intake.mask.eq(look(channel_masks, intake.word)),
            intake.prefix.eq(look(prefixes, intake.word)),
            intake.drop.eq(drop),
            intake.expected.eq(
                Mux(estimating & (spans_done < head.spans), chosen * span_lines, rows * row_lines)
            ),
        ]

        # ---- what is asked for ----
        by_channels, of_values = Signal(), Signal()
        keys_wanted, keys_asked, values_asked, following_asked = Signal(), Signal(), Signal(), Signal()
        asked_base, asked_group = Signal(TOKEN_BITS), Signal(TOKEN_BITS)
        mask_word, masks_channels = Signal(token_bits), Signal()
        ask, accepted, limit = self.ask.payload, Signal(), Signal(TOKEN_BITS + 1)
        left = Signal(TOKEN_BITS)
        # The next pass, of values or of the following head's keys (if it has no estimate), fills the parts that are left.
        takes, ahead, near, room = Signal(), Signal(), Signal(), Signal(TOKEN_BITS)
        m.d.comb += [
            near.eq(batches_left != p.batches),
            room.eq((p.batches - batches_left) * intake.rows),
            takes.eq(
                self.busy
                & ~estimates
                & values_asked
                & (mixed | (later & near))
                & ~follows
                & self.ask.ready
                & ~self.vector_write
            ),
            ahead.eq(
                follows
                & ~following_asked
                & ~((c.attention == ATTENTIONS.index("sparf")) & (c.k < following.tokens))
            ),
            by_channels.eq(estimating & (asked_spans < head.spans)),
            of_values.eq(~estimating & keys_asked & ~follows),
            left.eq(head.tokens - asked_base),
            self.ask.valid.eq(
                Mux(
                    estimating,
                    (asked_base < head.tokens) & (asked_spans - spans_done != p.batches),
                    keys_wanted | (keys_asked & ~values_asked & (later | near)) | ahead,
                )
            ),
            accepted.eq(self.ask.valid & self.ask.ready),
            ask.form.eq(Mux(by_channels, _CHANNELS, _TOKENS)),
            ask["values"].eq(of_values),
            ask.turn.eq(Mux(estimating, asked_spans, of_values)),
            ask["all"].eq(Mux(estimating, ~by_channels, ~estimates)),
            ask.first.eq(Mux(estimating, Mux(by_channels, asked_spans, asked_group), 0)),
            ask.n.eq(
                Mux(
                    by_channels,
                    c.d,
                    Mux(
                        estimating,
                        Mux(left < c.span, left, c.span),
                        Mux(follows, following.tokens, head.tokens),
                    ),
                )
            ),
            ask.rows.eq(Mux(by_channels, c.page_channels, c.page_tokens)),
            ask.row_lines.eq(Mux(by_channels, span_lines, row_lines)),
            self.words.valid.eq(1),
            self.words.payload.eq(
                Mux(masks_channels, look(channel_masks, mask_word), look(token_masks, mask_word))
            ),
            limit.eq(
                Mux(
                    following_asked,
                    Mux(mixed, p.batches * intake.rows, room),
                    Mux(values_asked & ~later, room, base + p.batches * intake.rows),
                )
            ),
            # All rows may be there before the last page is looked at, which is read where pages are not filtered.
            self.limit.eq(
                Mux(
                    estimating
                    | (mixed & ~following_asked)
                    | (later & ~values_asked)
                    | (limit > max(p.max_tokens, p.max_channels)),
                    (1 << len(self.limit)) - 1,
                    limit,
                )
            ),
        ]
        with m.If(self.words.ready):
            m.d.sync += mask_word.eq(mask_word + 1)
        with m.If(accepted):
            m.d.sync += [mask_word.eq(0), masks_channels.eq(by_channels)]
            with m.If(estimating):
                m.d.sync += [
                    asked_spans.eq(asked_spans + 1),
                    asked_base.eq(asked_base + c.span),
                    asked_group.eq(asked_group + self.span_groups),
                ]
            with m.Elif(keys_wanted):
                m.d.sync += [keys_wanted.eq(0), keys_asked.eq(1)]
            with m.Elif(follows):
                m.d.sync += following_asked.eq(1)
            with m.Else():
                m.d.sync += values_asked.eq(1)

        # ---- products ----
        operands_line, operands_turn = Signal(len(intake.read_line)), Signal(place)
        m.d.comb += [
            intake.read.eq(works),
            intake.read_column.eq(estimating | values),
            operands_line.eq(
                Mux(
                    estimating,
                    item * c.span + (element >> place),
                    Mux(values, item * c.d + (element >> place), item * row_lines + w),
                )
            ),
            operands_turn.eq(Mux(intake.read_column, element, item)),
            intake.read_line.eq(operands_line),
            intake.read_turn.eq(operands_turn),
            packed.stride.eq(packed_lines),
            packed.read.eq(works),
            packed.read_column.eq(1),
            packed.read_line.eq(item * lanes * packed_lines + (h >> place)),
            packed.read_turn.eq(h),
            packed.write.eq(delay(m, packs, _DATA, name="packs", reset_less=False)),
            packed.write_column.eq(1),
            packed.write_line.eq(prefix_data * packed_lines + (h_data >> place)),
            packed.write_turn.eq(prefix_data + h_data),
            packed.write_mask.eq(mask_data),
            packed.write_data.eq(q.read_data),
        ]
        by_rows = ~estimating & ~values
        operand_rows = Signal(TOKEN_BITS)  # of this group: those of the last one may be fewer
        m.d.comb += operand_rows.eq(Mux(estimating, chosen, rows) - (item << place))
        index, first, last = Signal(len(gemv.index)), Signal(), Signal()
        target, opens = Signal(max(token_bits, channel_bits)), Signal()
        m.d.comb += [
            index.eq(Mux(by_rows, 0, Mux(estimating, element, element | h << channel_bits))),
            first.eq(Mux(by_rows, w == 0, (item == 0) & (estimating | (base == 0)))),
            last.eq(Mux(by_rows, w == row_lines - 1, (item == groups - 1) & (estimating | final))),
            target.eq(Mux(values, element, base + Mux(estimating, element, item))),
            opens.eq((base == 0) & (Mux(estimating, element, item) == 0)),
        ]
        active = Cat(by_rows | (lane < operand_rows) for lane in range(lanes))
        data_estimates, data_values = (
            delay(m, s, _DATA, name=f"data_{name}")
            for s, name in ((estimating, "estimates"), (values, "values"))
        )
        m.d.comb += [
            gemv.valid.eq(delay(m, works, _DATA, name="works", reset_less=False)),
            gemv.a.eq(intake.read_data),
            gemv.b.eq(
                Mux(data_estimates, packed.read_data, Mux(data_values, weights.read_data, q.read_data))
            ),
            gemv.active.eq(delay(m, active, _DATA, name="active")),
            gemv.index.eq(delay(m, index, _DATA, name="index")),
            gemv.first.eq(delay(m, first, _DATA, name="first")),
            gemv.last.eq(delay(m, last, _DATA, name="last")),
            self.products.eq(gemv.valid),
        ]
        behind = _DATA + p.gemv_latency
        result_head, result_target = (delay(m, s, behind, name=f"result_{s.name}") for s in (h, target))
        result_opens = delay(m, opens, behind, name="result_opens")
        result_values = delay(m, values, behind, name="result_values")
        result = Signal()
        m.d.comb += [
            result.eq(gemv.done & gemv.result_last),
            scores.write_enable.eq(result & ~result_values),
            scores.write_address.eq(result_target[:token_bits] | result_head << token_bits),
            scores.write_data.eq(gemv.result),
            mix.write_enable.eq(Mux(result & result_values, 1 << result_target[:place], 0)),
            mix.write_address.eq(result_target[place:channel_bits] | result_head << word_bits),
            mix.write_data.eq(gemv.result.replicate(lanes)),
            maximum.a.eq(top[result_head]),
            maximum.b.eq(gemv.result),
        ]
        with m.If(scores.write_enable):
            m.d.sync += top[result_head].eq(Mux(result_opens, gemv.result, maximum.o))

        # ---- weights ----
        weight_count = Signal(token_bits)
        kept = [Signal(FP16.width, name=f"kept_{lane}") for lane in range(lanes - 1)]
        filled = weight_count[:place]
        m.d.comb += [
            scores.read_enable.eq(weighs),
            scores.read_address.eq(item[:token_bits] | h << token_bits),
            softmax.valid.eq(delay(m, weighs, _DATA, name="weighs", reset_less=False)),
            softmax.last.eq(item_data == total - 1),
            softmax.score.eq(scores.read_data),
            softmax.top.eq(top[h_data]),
            softmax.scale.eq(Mux(estimating, tau[h_data], c.scale)),
            self.exponentials.eq(softmax.valid),
            weights.write_enable.eq(softmax.weight_valid & (softmax.weight_last | (filled == lanes - 1))),
            weights.write_address.eq(weight_count[place:] | h << max(0, token_bits - place)),
            weights.write_data.eq(
                Cat(
                    Mux(lane == filled, softmax.weight, Mux(lane < filled, kept[lane], 0))
                    if lane < lanes - 1
                    else Mux(lane == filled, softmax.weight, 0)
                    for lane in range(lanes)
                )
            ),
        ]
        with m.If(softmax.weight_valid):
            m.d.sync += [
                Array(kept)[filled].eq(softmax.weight),
                weight_count.eq(Mux(softmax.weight_last, 0, weight_count + 1)),
            ]

        # ---- words of queries, weights and results ----
        word_of_weights = Signal(TOKEN_BITS)
        m.d.comb += [
            word_of_weights.eq(Mux(works, (base >> place) + item, item)),
            weights.read_enable.eq(covers | (ranks & of_tokens) | (works & values)),
            weights.read_address.eq(
                word_of_weights[: max(0, token_bits - place)] | h << max(0, token_bits - place)
            ),
            q.read_enable.eq((ranks & ~of_tokens) | measures | packs | (works & by_rows) | stores),
            q.read_address.eq(w | h << word_bits),
        ]
        magnitudes = q.read_data & sum((FP16.sign - 1) << FP16.width * lane for lane in range(lanes))
        ranked = Signal(line)
        measures_data = delay(m, measures, _DATA, name="measures", reset_less=False)
        covers_data = delay(m, covers, _DATA, name="covers", reset_less=False)
        joins_data = delay(m, joins, _DATA, name="joins", reset_less=False)
        scaled = Signal(FP32.width)  # 1/total * 2**15 / the group, rounded up to a power of two
        lift = Signal(5)
        own = inverse[h_data]
        m.d.comb += [
            lift.eq(15 - tree_sum([(group > 1 << i) for i in range(4)])),
            scaled.eq(Mux((own[23:31] == 0) | own[23:31].all(), own, own + (lift << 23))),
            ranked.eq(Mux(of_tokens | covers_data, weights.read_data, magnitudes)),
            vector.word.eq(ranked),
            vector.wide.eq(Mux(part_data, sums.read_data, mix.read_data)),
            vector.widen.eq(~joins_data),
            vector.factor.eq(
                Mux(
                    joins_data,
                    Mux(part_data, sum_factor[h_data], Mux(mean, mix_factor[h_data], own)),
                    Mux(of_tokens, scaled, _ONE),
                )
            ),
            vector.first.eq(Mux(joins_data, ~part_data, h_data == 0)),
            vector.group.eq(measures_data | covers_data),
            vector.fresh.eq(Mux(measures_data, w_data == 0, item_data == 0)),
            vector.active.eq(
                Mux(
                    covers_data,
                    look(token_masks, item_data),
                    mask_data | part_data.replicate(lanes),
                )
            ),
            mix.read_enable.eq(joins & ~part),
            mix.read_address.eq(w | h << word_bits),
            sums.read_enable.eq(joins & part),
            sums.read_address.eq(w),
        ]

        # ---- keys of the argtopk unit, and what it selects ----
        ranked_word = Mux(of_tokens, item, w)
        plain = delay(m, ranked, VECTOR_TICKS - _DATA, name="plain")
        before = Signal(len(chosen))
        write_channels, write_tokens = channel_masks.write_port(), token_masks.write_port()
        write_prefix = prefixes.write_port()
        m.d.comb += [
            self.topk_write.eq(
                delay(m, ranks & (h == group - 1), VECTOR_TICKS, name="ranks", reset_less=False)
            ),
            self.topk_address.eq(delay(m, ranked_word, VECTOR_TICKS, name="ranked_word")),
            self.topk_keys.eq(Mux(group == 1, plain, vector.halves)),
            self.topk_n.eq(Mux(of_tokens, head.tokens, c.d)),
            self.topk_take.eq(Mux(of_tokens, c.k, chosen)),
            self.topk_local.eq(Mux(of_tokens, Mux(c.local < head.tokens, c.local, head.tokens), 0)),
            write_channels.en.eq(self.topk_valid & ~of_tokens),
            write_channels.addr.eq(self.topk_index),
            write_channels.data.eq(self.topk_mask),
            write_prefix.en.eq(write_channels.en),
            write_prefix.addr.eq(self.topk_index),
            write_prefix.data.eq(before),
            write_tokens.en.eq(self.topk_valid & of_tokens),
            write_tokens.addr.eq(self.topk_index),
            write_tokens.data.eq(self.topk_mask),
            self.topk_releases.eq(self.topk_last),
        ]
        with m.If(self.topk_valid):
            m.d.sync += before.eq(Mux(self.topk_last, 0, before + tree_sum([*self.topk_mask])))

        # ---- lines in and out ----
        taken = Signal(len(self.vector_from))
        joined = delay(m, joins & (part == mean), VECTOR_TICKS, name="joined", reset_less=False)
        joined_at = delay(m, Cat(w, h), VECTOR_TICKS, name="joined_at")
        loaded = delay(m, loads, _DATA, name="loaded", reset_less=False)
        summed = delay(m, self.sum_read & self.sum_reads, _DATA, name="summed", reset_less=False)
        m.d.comb += [
            self.vector_from.eq(head.line + taken),
            self.vector_to.eq(head.line2 + taken),
            self.vector_write_data.eq(q.read_data),
            self.sum_word.eq(w),
            q.write_enable.eq(loaded | joined),
            q.write_address.eq(Mux(loaded, Cat(w_data, h_data), joined_at)),
            q.write_data.eq(Mux(loaded, self.vector_data, vector.halves)),
            sums.write_enable.eq(summed),
            sums.write_address.eq(w_data),
            sums.write_data.eq(self.sum_data),
        ]

        # ---- scalars ----
        some = Signal(FP32.width)
        some_ends = delay(
            m,
            measures & ~part & (w == row_lines - 1),
            _DATA + p.reduce_latency,
            name="some",
            reset_less=False,
        )
        with m.If(some_ends):
            m.d.sync += some.eq(vector.sum)
        m.d.comb += [
            self.scalar_steps.eq(scalars.steps),
            scalars.x.eq(softmax.total),
            scalars.u.eq(head.share),
        ]

        # ---- phases ----
        m.d.comb += [self.working.eq(1), self.stall.eq(_IDLE)]

        def settle(name, ticks, following):
            """A state that waits until what the units are given has come out."""
            with m.State(name):
                m.d.sync += rest.eq(Mux(rest == ticks - 1, 0, rest + 1))
                with m.If(rest == ticks - 1):
                    m.next = following

        def compute(name, program, following, *, done):
            """A state in which a scalar program begins, and one that waits for its end; for each query head in turn, then
            on to `following`, else to `again`."""
            again, operands, results = done
            with m.State(name):
                m.d.comb += [scalars.start.eq(1), scalars.program.eq(PROGRAMS.index(program)), *operands]
                m.next = f"{name} ENDS"
            with m.State(f"{name} ENDS"):
                with m.If(scalars.done):
                    m.d.sync += results
                    over = count(m, (h, group))
                    m.next = again
                    with m.If(over):
                        following()

        def go(state):
            def to():
                m.next = state

            return to

        def behind_weights():
            """Tokens are ranked after the softmax of an estimate, values mixed after the other one."""
            with m.If(estimating):
                m.d.sync += [of_tokens.eq(1), estimating.eq(0), base.eq(0), batch.eq(0)]
                m.next = "TURN"
            with m.Else():
                m.d.sync += values.eq(1)
                m.next = "WAIT"

        m.d.comb += self.head.ready.eq(takes)
        with m.If(takes & self.head.valid):
            m.d.sync += [following.eq(self.head.payload), follows.eq(1)]

        with m.FSM():
            with m.State("REST"):
                m.d.comb += [self.head.ready.eq(1), self.working.eq(0)]
                with m.If(self.head.valid):
                    m.d.sync += [
                        head.eq(self.head.payload),
                        self.busy.eq(1),
                    ]
                    m.next = "BEGIN"
            with m.State("BEGIN"):
                m.d.sync += keys_wanted.eq(~estimates & ~keys_asked & ~accepted)
                with m.If(estimates):
                    m.d.sync += batch.eq(0)
                m.next = "LOAD"
            with m.State("LOAD"):
                m.d.comb += [
                    self.vector_read.eq(1),
                    loads.eq(self.vector_reads),
                    self.working.eq(loads),
                    self.stall.eq(_QUEUE),
                ]
                with m.If(loads):
                    m.d.sync += taken.eq(taken + 1)
                    with m.If(count(m, (w, row_lines), (h, group))):
                        m.next = "LOADED"
            with m.State("LOADED"):
                m.next = "WAIT"
                with m.If(estimates):
                    m.next = "TURN"

            with m.State("TURN"):
                m.d.comb += [self.topk_wants.eq(1), self.working.eq(0), self.stall.eq(_ARGTOPK)]
                with m.If(self.topk_has):
                    m.next = "RANK"
            with m.State("RANK"):
                m.d.comb += ranks.eq(1)
                with m.If(of_tokens):
                    with m.If(count(m, (h, group), (item, (head.tokens + lanes - 1) >> place))):
                        m.next = "RANKED"
                with m.Else():
                    with m.If(count(m, (h, group), (w, row_lines))):
                        m.next = "RANKED"
            settle("RANKED", VECTOR_TICKS, "START")
            with m.State("START"):
                m.d.comb += self.topk_start.eq(1)
                m.next = "SELECT"
            with m.State("SELECT"):
                m.d.comb += [self.working.eq(0), self.stall.eq(_ARGTOPK)]
                with m.If(self.topk_last):
                    m.d.sync += [estimating.eq(~of_tokens), keys_wanted.eq(of_tokens)]
                    m.next = "MEASURE"
                    with m.If(of_tokens):
                        m.next = "COVER"

            with m.State("MEASURE"):
                m.d.comb += measures.eq(1)
                with m.If(count(m, (w, row_lines), (part, 2))):
                    m.next = "MEASURED"
            settle("MEASURED", p.reduce_latency, "TAU")
            compute(
                "TAU", "tau", go("PACK"),
                done=(
                    "MEASURE",
                    [
                        scalars.x.eq(some), scalars.y.eq(vector.sum), scalars.u.eq(c.scale),
                        scalars.plain.eq((c.r >= c.d) | (vector.sum == 0)),
                    ],
                    [tau[h].eq(scalars.x_result)],
                ),
            )  # fmt: skip
            with m.State("PACK"):
                m.d.comb += packs.eq(1)
                with m.If(count(m, (w, row_lines), (h, group))):
                    m.next = "WAIT"

            with m.State("WAIT"):
                m.d.comb += [self.working.eq(0), self.stall.eq(_FLASH)]
                with m.If(intake.complete):
                    m.next = "WORK"
            with m.State("WORK"):
                m.d.comb += works.eq(1)
                with m.If(by_rows):
                    m.d.comb += drop.eq(count(m, (w, row_lines), (h, group), (item, rows)))
                with m.Else():
                    elements = Mux(estimating, rows, c.d)
                    m.d.comb += drop.eq(count(m, (element, elements), (item, groups), (h, group)))
                with m.If(drop):
                    m.d.sync += [batch.eq(batch + 1), base.eq(base + step)]
                    m.next = "WAIT"
                    with m.If(estimating):
                        m.d.sync += spans_done.eq(spans_done + 1)
                    with m.If(final):
                        m.next = "WORKED"
                        with m.If(~estimating):
                            m.d.sync += [base.eq(0), later.eq(~values), mixed.eq(values)]
            with m.State("WORKED"):
                # Until the last result is in its memory.
                over = rest == p.gemv_latency
                m.d.sync += rest.eq(Mux(over, 0, rest + 1))
                with m.If(over):
                    m.next = "SOFTMAX"
                    with m.If(mixed):
                        m.next = "JOIN"
                        with m.If(mean):
                            m.next = "FACTORS"

            with m.State("SOFTMAX"):
                m.d.comb += weighs.eq(1)
                with m.If(count(m, (item, total))):
                    m.next = "WEIGHED"
            settle("WEIGHED", p.exp_latency + p.reduce_latency, "INVERT")
            compute(
                "INVERT", "inverse", behind_weights,
                done=("SOFTMAX", [], [inverse[h].eq(scalars.x_result)]),
            )  # fmt: skip

            with m.State("COVER"):
                m.d.comb += covers.eq(1)
                with m.If(count(m, (item, (head.tokens + lanes - 1) >> place))):
                    m.next = "COVERED"
            settle("COVERED", p.reduce_latency, "ALPHA")
            compute(
                "ALPHA", "coverage", go("WAIT"),
                done=(
                    "COVER",
                    [scalars.x.eq(vector.sum), scalars.y.eq(inverse[h])],
                    [alpha[h].eq(scalars.x_result)],
                ),
            )  # fmt: skip

            compute(
                "FACTORS", "factors", go("SUMS"),
                done=(
                    "FACTORS",
                    [scalars.x.eq(alpha[h]), scalars.y.eq(inverse[h])],
                    [mix_factor[h].eq(scalars.x_result), sum_factor[h].eq(scalars.y_result)],
                ),
            )  # fmt: skip
            with m.State("SUMS"):
                m.d.comb += [self.sum_read.eq(1), self.working.eq(self.sum_reads), self.stall.eq(_QUEUE)]
                with m.If(self.sum_reads):
                    with m.If(count(m, (w, row_lines))):
                        m.next = "JOIN"
            with m.State("JOIN"):
                m.d.comb += joins.eq(1)
                with m.If(count(m, (part, 1 + mean), (w, row_lines), (h, group))):
                    m.d.sync += taken.eq(0)
                    m.next = "JOINED"
            settle("JOINED", VECTOR_TICKS, "FIRST")
            with m.State("FIRST"):
                # The line to be written is read a tick ahead. A head is fetched for until its last page was looked at.
                over = self.ask.ready | follows
                m.d.comb += [stores.eq(over), self.working.eq(over), self.stall.eq(_QUEUE)]
                with m.If(over):
                    count(m, (w, row_lines), (h, group))
                    m.next = "STORE"
            with m.State("STORE"):
                last_line = taken == group * row_lines - 1
                m.d.comb += [
                    self.vector_write.eq(1),
                    self.working.eq(self.vector_writes),
                    self.stall.eq(_QUEUE),
                    stores.eq(self.vector_writes),
                    self.done.eq(self.vector_writes & last_line),
                ]
                with m.If(self.vector_writes):
                    m.d.sync += taken.eq(taken + 1)
                    count(m, (w, row_lines), (h, group))
                with m.If(self.done):
                    m.d.sync += [
                        self.busy.eq(follows),
                        head.eq(following),
                        keys_asked.eq(following_asked | (follows & accepted)),
                        keys_wanted.eq(ahead & ~accepted),
                        *(s.eq(0) for s in (follows, following_asked, values_asked, later, values, mixed)),
                        *(s.eq(0) for s in (spans_done, asked_spans, asked_base, asked_group, base)),
                        *(s.eq(0) for s in (w, h, taken, of_tokens)),
                    ]
                    m.next = "REST"
                    with m.If(follows):
                        m.next = "BEGIN"

        m.d.sync += [
            Assert(~(scalars.start & (scalars.program == PROGRAMS.index("inverse"))) | softmax.total_valid),
            Assert(~(self.topk_write | self.topk_start) | self.topk_has, "the argtopk unit is not its own"),
        ]
        return m
