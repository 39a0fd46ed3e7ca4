"""What a mapping chooses, where keys and values lie, and whether everything fits; a mapping document may choose."""

from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from tilewright.arch.csd import ATTENTIONS, CsdSpec, groups
from tilewright.arch.errors import UserError, nearest
from tilewright.arch.scenario import Scenario
from tilewright.arch.system import load_roofline
from tilewright.workloads.graph import Graph, OpKind
from tilewright.workloads.models import ModelConfig

BYTES = 2
"""Of a weight, an activation, a key's or a value's element: FP16."""

KV = ("drive", "host", "ssd")
"""Where keys and values are kept: in drives that attend, in host memory, on a plain SSD."""

MAX_HEADS = 1023  # of a command
CHUNK = 128  # heads of an ATTEND, unless the mapping says


def ceil_div(a: int, b: int) -> int:
    return -(-a // b)


def pieces(total: int, limit: int, unit: int) -> int:
    """How many of `total` go at a time, at most `limit`: all, else the most that divide it, whole units if possible.

    >>> pieces(40, 128, 8), pieces(2560, 128, 8), pieces(100, 64, 8), pieces(7 * 13, 20, 8), pieces(262, 64, 8)
    (40, 128, 50, 13, 64)
    """
    if total <= limit:
        return total
    divisors = [n for n in range(1, limit + 1) if total % n == 0]
    whole = [n for n in divisors if n % unit == 0]
    best = max(whole or divisors)
    # A remainder is better than many small pieces.
    return best if 4 * best >= limit else max(limit // unit * unit, 1)


class Layout:
    """Choices and places of a run, for one drive.

    Heads are dealt out to drives. A drive's slots are numbered by layer, sequence and K/V head, so that those of a
    layer follow each other. Its vectors hold queries, keys, values and results of a layer while it decodes; for a
    prompt, or to give back what is cached, they are two halves that take turns.
    """

    def __init__(
        self,
        spec: CsdSpec,
        model: ModelConfig,
        scenario: Scenario,
        graphs: Mapping[str, Graph],
        mapping: Mapping[str, Any] | None = None,
    ) -> None:
        """`graphs` by phase ("prompt", "decode"). Raises UserError for what does not fit, and for a value of
        `mapping` that is not allowed."""
        self.spec, self.model, self.scenario = spec, model, scenario
        given = dict(mapping or {})
        known = (
            "target",
            "model",
            "spec",
            "kv",
            "attention",
            "chunk",
            "prompt_batch",
            "page_channels",
            "reclaim",
        )
        for key in given:
            if key not in known:
                raise UserError(f"mapping has no {key!r}: {nearest(str(key), known)}")
        for key, value in (("target", "csd"), ("model", model.name)):
            if given.get(key, value) != value:
                raise UserError(f"mapping.{key} must be {value!r} here, not {given[key]!r}")
        self.kv = _one_of(given, "kv", KV, KV[0])
        own = spec.attention.kind if self.kv == "drive" else ATTENTIONS[0]
        self.attention = _one_of(given, "attention", ATTENTIONS, own)
        if self.kv != "drive" and self.sparse:
            raise UserError(f"mapping.attention must be dense where kv is {self.kv}, not {self.attention!r}")
        self.reclaim = _share(given, "reclaim", Fraction(1, 10))
        s = scenario
        self.tokens = s.context + s.prompt + s.generate
        self.prompt_batch = self._prompt_batch(graphs, _whole(given, "prompt_batch", 0, s.batch))
        if self.kv == "drive":
            self._pages(_whole(given, "page_channels", 0, spec.engine.max_channels))
            self._slots(_whole(given, "chunk", 0, MAX_HEADS))
            self._vectors()
            self._flash()
        else:
            self.chunk = _whole(given, "chunk", 0, MAX_HEADS)
            self.page_channels = spec.attention.page_channels
            self._elsewhere()

    @property
    def document(self) -> dict[str, Any]:
        """The mapping as plain data."""
        return {
            "target": "csd",
            "model": self.model.name,
            "spec": self.spec.name,
            "kv": self.kv,
            "attention": self.attention,
            "chunk": self.chunk,
            "prompt_batch": self.prompt_batch,
            "page_channels": self.page_channels,
            "reclaim": float(self.reclaim),
        }

    @property
    def sparse(self) -> bool:
        return self.attention == "sparf"

    @property
    def kv_bytes(self) -> int:
        """Of all keys and values at the end, K once."""
        return self.tokens * self.scenario.batch * self.model.kv_elements_per_token * BYTES

    @property
    def weight_bytes(self) -> int:
        return self.model.parameters["total"] * BYTES

    # ---- GPU memory ---------------------------------------------------------------------------------

    def _prompt_batch(self, graphs: Mapping[str, Graph], given: int) -> int:
        """Sequences of the prompt that the GPU's memory takes at once; the run is refused where it takes none."""
        s, host = self.scenario, self.spec.host
        memory = int(load_roofline(host.gpu).memory.gb * 10**9) * host.gpus
        decode = self._gpu_bytes(graphs["decode"], s.batch) if "decode" in graphs else 0
        each = self._gpu_bytes(graphs["prompt"], 1) if "prompt" in graphs else 0
        fit = (memory - self.weight_bytes) // each if each else s.batch
        if self.weight_bytes + max(decode, each * (given or 1)) > memory:
            raise UserError(
                f"{self.model.name} does not fit {host.gpus} x {host.gpu}: weights {self.weight_bytes / 1e9:.1f} GB and "
                f"activations {max(decode, each * (given or 1)) / 1e9:.1f} GB are more than {memory / 1e9:.1f} GB"
            )
        return given or ceil_div(s.batch, ceil_div(s.batch, min(fit, s.batch)))

    def _gpu_bytes(self, graph: Graph, sequences: int) -> int:
        """Of the GPU beside weights: the residual stream, an operator's input and output, and two layers' K and V on
        their way, which where they are kept elsewhere are all that decode attends to. Scores stay in the SMs."""
        m, s, rows = self.model, self.scenario, sequences * graph.tokens
        work = max(
            op.input_elements + op.output_elements
            for op in graph.operators
            if op.kind not in (OpKind.SCORES, OpKind.SOFTMAX, OpKind.VALUES)
        )
        tokens = graph.tokens
        if graph.phase == "decode" and self.kv != "drive":
            tokens = self.tokens
        elif graph.phase == "prefill":
            tokens += s.context
        copies = 3 if self.kv == "drive" and self.sparse and graph.phase == "prefill" else 2
        kv = 2 * copies * sequences * tokens * m.kv_dim
        return (rows * m.d_model + ceil_div(work * sequences, graph.batch) + kv) * BYTES

    # ---- pages and slots ----------------------------------------------------------------------------

    def _pages(self, page_channels: int) -> None:
        spec, m = self.spec, self.model
        e, page = spec.engine, spec.page_elements
        d, self.group = m.head_dim, m.heads // m.kv_heads
        if d > e.max_channels or d % e.lanes:
            raise UserError(
                f"{m.name}: heads of {d} channels; engine.lanes {e.lanes} and engine.max_channels {e.max_channels} "
                f"take multiples of {e.lanes} up to {e.max_channels}"
            )
        if self.group > e.max_group:
            raise UserError(
                f"{m.name}: {self.group} query heads share a K/V head, more than engine.max_group {e.max_group}"
            )
        if self.tokens > e.max_tokens:
            raise UserError(f"{self.tokens} tokens are more than engine.max_tokens {e.max_tokens}")
        if d > page:
            raise UserError(f"a token of {d} channels takes more than a page of {page} elements")
        self.page_tokens = 1 << (page // d).bit_length() - 1
        wanted = page_channels or spec.attention.page_channels
        self.page_channels = max(n for n in range(1, min(wanted, d) + 1) if d % n == 0)
        unit = max(e.lanes, self.page_tokens)  # both powers of two
        self.span = page // self.page_channels // unit * unit
        if not self.span:
            raise UserError(
                f"page_channels {self.page_channels} leaves {page // self.page_channels} tokens of a page of {page} "
                f"elements, less than {unit}, the least that lines and token-indexed pages allow"
            )
        part = e.buffer_lines * e.lanes
        r = spec.selection(self.tokens, d)[0]
        for what, need, where, room in (
            ("the estimate's r x span", r * self.span, "a part of an operand buffer", part),
            ("a span's keys", d * self.span, "an operand buffer", e.batches * part),
        ):
            if self.sparse and need > room:
                raise UserError(
                    f"{what}, {need} elements, do not fit {where}, {room} (engine.buffer_lines): "
                    f"mapping.page_channels may be larger"
                )
        self.channel_groups = d // self.page_channels
        entries = 1 << spec.dram.table_bits
        held = max(2 * groups(self.tokens, self.page_tokens), self.spans(self.tokens) * self.channel_groups)
        if held > entries:
            raise UserError(
                f"{self.tokens} tokens need {held} table entries a head, more than the {entries} of dram.table_bits "
                f"{spec.dram.table_bits}"
            )

    def spans(self, tokens: int) -> int:
        """Complete spans of so many tokens, of which there are channel-indexed pages."""
        return tokens // self.span if self.sparse else 0

    def _slots(self, chunk: int) -> None:
        spec, m, s = self.spec, self.model, self.scenario
        if spec.drives > m.kv_heads:
            raise UserError(f"drives {spec.drives} are more than the {m.kv_heads} K/V heads of {m.name}")
        self.heads = ceil_div(m.kv_heads, spec.drives)
        self.layer_slots = s.batch * self.heads
        self.slots = m.layers * self.layer_slots
        if self.slots > spec.dram.slots:
            raise UserError(
                f"{m.layers} layers x batch {s.batch} x {self.heads} heads are {self.slots} slots, more than "
                f"dram.slots {spec.dram.slots}"
            )
        self.chunk = chunk or pieces(self.layer_slots, CHUNK, spec.flash.geometry.channels)
        self.append_heads = pieces(self.layer_slots, MAX_HEADS, spec.flash.geometry.channels)

    def _vectors(self) -> None:
        """Lines of the vectors: where decode keeps what, and how many heads of a prompt go at a time."""
        spec, s, d = self.spec, self.scenario, self.model.head_dim
        room, line = spec.dram.vector_lines, spec.engine.lanes
        q, kv = (self.layer_slots * n * d // line for n in (self.group, 1))
        self.key_line, self.value_line, self.result_line = q, q + kv, q + 2 * kv
        if 2 * (q + kv) > room:
            raise UserError(
                f"queries, keys, values and results of {self.layer_slots} heads take {2 * (q + kv)} lines, more than "
                f"dram.vector_lines {room}"
            )
        self.half = room // 2
        self.send_heads = self.back_heads = self.cached_heads = self.layer_slots
        unit = spec.flash.geometry.channels
        if s.prompt:
            self.send_heads = self._batch_of_heads(self.head_lines(s.context, s.prompt), "a prompt's", unit)
        if s.context:
            self.cached_heads = self._batch_of_heads(self.head_lines(0, s.context), "the context's", unit)
        if s.context and s.prompt:
            lines = self.full_pages(s.context) * spec.page_elements // line
            self.back_heads = self._batch_of_heads(max(lines, 1), "the context's", unit)

    def head_lines(self, first: int, tokens: int) -> int:
        """Lines of a head's keys, values and keys once more by channel, for tokens from `first` on."""
        spans = self.spans(first + tokens) - self.spans(first)
        return self.model.head_dim // self.spec.engine.lanes * (2 * tokens + spans * self.span)

    def full_pages(self, tokens: int) -> int:
        """Token-indexed pages of a head that are full."""
        return 2 * (tokens // self.page_tokens)

    def _batch_of_heads(self, lines: int, whose: str, unit: int) -> int:
        fit = min(self.half // lines, MAX_HEADS)
        if not fit:
            raise UserError(
                f"{whose} keys and values of one head take {lines} lines, more than half of dram.vector_lines "
                f"{self.spec.dram.vector_lines}"
            )
        return pieces(self.layer_slots, fit, unit)

    def _flash(self) -> None:
        """Pages of each channel's log at the end of the run, and blocks that they fill."""
        g = self.spec.flash.geometry
        n = g.channels
        by_slot = [len(range(c, self.slots, n)) for c in range(n)]
        counts = (self.full_pages(self.tokens), self.spans(self.tokens) * self.channel_groups)
        positions = Counter(i % n for count in counts for i in range(count))
        logs = [sum(by_slot[(c - i) % n] * k for i, k in positions.items()) for c in range(n)]
        stripe = g.chips_per_channel * g.dies_per_chip * g.planes_per_die * g.pages_per_block
        if max(logs) > stripe * g.blocks_per_plane:
            have = self.spec.flash_pages * g.page_bytes / 1e9
            raise UserError(
                f"{self.tokens} tokens x batch {self.scenario.batch} take {n * max(logs) * g.page_bytes / 1e9:.1f} GB of a "
                f"drive's flash, more than its {have:.1f} GB"
            )
        self.pages = sum(logs)
        self.full_blocks = min(logs) // stripe
        self.free_blocks = g.blocks_per_plane - ceil_div(max(logs), stripe)

    # ---- without drives that attend -----------------------------------------------------------------

    def _elsewhere(self) -> None:
        host = self.spec.host
        have = host.memory_bytes if self.kv == "host" else host.ssd_bytes
        where = "host memory" if self.kv == "host" else "a plain SSD"
        if self.kv_bytes > have:
            raise UserError(
                f"{self.tokens} tokens x batch {self.scenario.batch} are {self.kv_bytes / 1e9:.1f} GB of keys and values, "
                f"more than the {have / 1e9:.1f} GB of {where} (host.{'memory' if self.kv == 'host' else 'ssd'}_bytes)"
            )


# ---- mapping documents --------------------------------------------------------------------------------


def _one_of(given: Mapping[str, Any], key: str, allowed: Sequence[str], default: str) -> str:
    value = given.get(key, default)
    if value not in allowed:
        raise UserError(f"mapping.{key} must be {' or '.join(allowed)}, not {value!r}")
    return str(value)


def _whole(given: Mapping[str, Any], key: str, low: int, high: int) -> int:
    value = given.get(key, 0)
    if type(value) is not int or not low <= value <= high:
        raise UserError(f"mapping.{key} must be a whole number in {low}..{high} (0: chosen), not {value!r}")
    return value


def _share(given: Mapping[str, Any], key: str, default: Fraction) -> Fraction:
    value = given.get(key, default)
    number = isinstance(value, (int, float, Fraction)) and not isinstance(value, bool)
    if not number or not 0 <= value <= 1:
        raise UserError(f"mapping.{key} must be a share in 0..1 of the blocks, not {value!r}")
    return Fraction(str(value)) if isinstance(value, float) else Fraction(value)
