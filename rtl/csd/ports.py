"""What an attention kernel is connected to."""

from amaranth.lib import stream
from amaranth.lib.wiring import In, Out
from amaranth.utils import bits_for

from tilewright.arch.csd import CAUSES, TOKEN_BITS, CsdParams
from tilewright.arch.formats import FP16, FP32
from tilewright.rtl.csd.controller import line_layout
from tilewright.rtl.csd.decoder import configuration_layout
from tilewright.rtl.csd.fetch import head_layout, pass_layout

__all__ = ["kernel_members"]


def kernel_members(p: CsdParams) -> dict:
    """The members of a kernel, in its own directions.

    ================== === ================== ====================================================================
    configuration      In  layout             what the last CONFIG set
    span_groups        In                     token-indexed groups of a span
    span_groups        In                     token-indexed groups of a span
    head               In  stream(head)       taken in a tick in which it is `ready`: at rest, or one ahead
    busy               Out 1                  a head is under way: from the tick after it was taken to that of `done`
    done               Out 1                  the last tick of a head
    ask                Out stream(pass)       what is to be fetched next, as `fetch.Fetch` has it
    words              Out stream(lanes)      words of its mask
    limit              Out                    rows of the pass for which there is room
    valid              In  1                  `line` holds one; it must be taken
    line               In  line_layout
    vector_read        Out 1                  wants to read the vectors
    vector_from        Out                    this line
    vector_reads       In  1                  it does in this tick
    vector_data        In  line               what was read one tick ago
    vector_write       Out 1                  wants to write the vectors
    vector_to          Out                    this line
    vector_write_data  Out line
    vector_writes      In  1                  it does in this tick
    sum_read           Out 1                  wants sums of the values of its slot
    sum_word           Out                    those of channels word * lanes on
    sum_reads          In  1                  it does in this tick
    sum_data           In  lanes * 32         what was read one tick ago
    topk_wants         Out 1                  wants the argtopk unit, until it has it
    topk_has           In  1                  it is its own in this tick
    topk_releases      Out 1                  for the last time
    topk_write         Out 1                  members of `ArgTopK`, while it has it
    topk_address       Out
    topk_keys          Out
    topk_start         Out 1
    topk_n, _take, _local Out
    topk_valid         In  1
    topk_index         In
    topk_mask          In
    topk_last          In  1
    products           Out 1                  counted in this tick: a group of products,
    exponentials       Out 1                  an exponential is begun,
    scalar_steps       Out 1                  a scalar unit begins a step
    working            Out 1                  this tick is busy
    stall              Out range(causes)      cause of this tick, where it is not
    ================== === ================== ====================================================================
    """
    vector, line = bits_for(p.vector_lines - 1), p.lanes * FP16.width
    most = max(p.max_tokens, p.max_channels)
    keys = bits_for(most)
    return {
        "configuration": In(configuration_layout()),
        "span_groups": In(TOKEN_BITS),
        "head": In(stream.Signature(head_layout(p))),
        "busy": Out(1),
        "done": Out(1),
        "ask": Out(stream.Signature(pass_layout(p))),
        "words": Out(stream.Signature(p.lanes)),
        "limit": Out(bits_for(most) + 1),
        "valid": In(1),
        "line": In(line_layout(p)),
        "vector_read": Out(1),
        "vector_from": Out(vector),
        "vector_reads": In(1),
        "vector_data": In(line),
        "vector_write": Out(1),
        "vector_to": Out(vector),
        "vector_write_data": Out(line),
        "vector_writes": In(1),
        "sum_read": Out(1),
        "sum_word": Out(bits_for(max(1, p.max_channels // p.lanes - 1))),
        "sum_reads": In(1),
        "sum_data": In(p.lanes * FP32.width),
        "topk_wants": Out(1),
        "topk_has": In(1),
        "topk_releases": Out(1),
        "topk_write": Out(1),
        "topk_address": Out(bits_for(most // p.lanes - 1)),
        "topk_keys": Out(p.lanes * FP16.width),
        "topk_start": Out(1),
        "topk_n": Out(keys),
        "topk_take": Out(keys),
        "topk_local": Out(keys),
        "topk_valid": In(1),
        "topk_index": In(bits_for(most // p.lanes - 1)),
        "topk_mask": In(p.lanes),
        "topk_last": In(1),
        "products": Out(1),
        "exponentials": Out(1),
        "scalar_steps": Out(1),
        "working": Out(1),
        "stall": Out(range(len(CAUSES))),
    }
