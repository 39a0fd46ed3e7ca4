"""The meaning of a program of a drive: `interpret` executes it over a memory image and knows no time.

An image is a dict of the arrays of `arch.csd.image_shapes`. Tables and logs are no part of it: a run begins with empty
ones, so that a program reads what it has written before. Token t of a slot is row t % page_tokens of group
t // page_tokens, which the group buffer holds in the half of the group's parity. A row is written where it belongs, and
lines behind the last row keep what they held, in the group buffer and in flash; so do cells that are erased. The value
sum begins anew, from +0, with token 0. What is computed is `csd_kernels`.

Commands mean what they say one after the other. A drive begins with ATTEND, TRANSPOSE and READ while it attends for
ATTENDs before, unless a WRITE, RECLAIM or CONFIG stands between, or it is to come `after` the drive: what they do must
not depend on that, and an ATTEND must not write results over queries.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from tilewright.arch.csd import (
    AFTER_DRIVE,
    ATTENTIONS,
    FORMS,
    OPS,
    CsdParams,
    CsdSpec,
    check,
    groups,
    image_shapes,
    staged_groups,
)
from tilewright.arch.csd_pages import PageTables, Places, Selection
from tilewright.arch.isa import Program
from tilewright.workloads.csd_kernels import Attention, Engine, add_values, dense, sparf

Image = dict[str, NDArray[Any]]
Fields = Mapping[str, int]
Bits16 = NDArray[np.uint16]

_TOKENS, _CHANNELS = range(len(FORMS))


def blank_image(params: CsdParams) -> Image:
    """An image of zeros: the arrays of `arch.csd.image_shapes`."""
    return {name: np.zeros(shape, dtype) for name, (dtype, shape) in image_shapes(params).items()}


def interpret(
    spec: CsdSpec,
    program: Program,
    image: Mapping[str, NDArray[Any]],
    decisions: Mapping[str, Any] | None = None,
) -> tuple[Image, dict[str, Any]]:
    """The image that `program` leaves, and the decisions that its timing depends on, added to those given:
    "selections", a `Selection` for each ATTEND that is executed.

    `image` is not changed. GPU and LINK leave it as it is. Raises ValueError for arrays that do not fit the spec, and
    naming segment and command for one that reaches outside the machine, reads what was never written or is erased, or
    not held by the group buffer where it is read from there, finds a log full, erases a block that is not full, or
    depends on when an ATTEND before it ends.
    """
    machine = Machine(spec, {name: np.array(array) for name, array in image.items()})
    machine.run(program)
    return machine.image, {**(decisions or {}), "selections": machine.selections}


class _Touch(NamedTuple):
    """Lines of the vectors, or channel-indexed pages, that a command reads or writes: a rectangle of entries."""

    what: str
    writes: bool
    columns: range  # lines, or positions in the tables
    rows: range = range(1)  # slots

    def meets(self, other: "_Touch") -> bool:
        """Whether their order shows."""
        return (
            self.what == other.what
            and (self.writes or other.writes)
            and all(
                max(a.start, b.start) < min(a.stop, b.stop)
                for a, b in ((self.columns, other.columns), (self.rows, other.rows))
            )
        )


class Machine:
    """The state of a drive, and a method for each of its commands, named like it.

    It works on the arrays of the image that it is given: `interpret` hands it a copy. `selections` holds what the
    ATTENDs so far selected.
    """

    def __init__(self, spec: CsdSpec, image: Mapping[str, NDArray[Any]]) -> None:
        """Raises ValueError if the arrays of the image do not fit the spec."""
        self.params = p = spec.params()
        self.engine = Engine(p.lanes, p.exp_terms, p.reciprocal_iterations, p.rsqrt_iterations)
        self.image = dict(image)
        for name, (dtype, shape) in image_shapes(p).items():
            got = (image[name].shape, image[name].dtype) if name in image else "nothing"
            if got != (shape, np.dtype(dtype)):
                raise ValueError(f"image: {name} must be {dtype} of shape {shape}, not {got}")
        self.vectors, self.sums = self.image["vectors"].reshape(-1), self.image["sums"]
        # Pages as rows of elements.
        self.groups = self.image["groups"].reshape(p.slots, 2, 2, -1)
        self.cells = self.image["cells"].reshape(*self.image["cells"].shape[:-2], -1)
        self.pages = PageTables(p)
        self.config: Fields = {}
        # Of each half of the group buffer the group that it holds, plus one, and how many tokens of it.
        self.held = np.zeros((p.slots, 2, 2), np.int64)
        self.attending: list[_Touch] = []  # of ATTENDs that may still be under way
        self.selections: list[Selection] = []

    def run(self, program: Program) -> None:
        """All of a program; raises as `interpret` does, with the commands before the faulty one executed."""
        for s, segment in enumerate(program.segments):
            code = segment.regions["code"]
            check(self.params, code, f"segment {s}, ")
            for _ in range(segment.repeat):
                for i, record in enumerate(code):
                    try:
                        self.execute(record)
                    except ValueError as error:
                        name = OPS[int(record["op"])].name
                        raise ValueError(f"segment {s}, command {i} ({name}): {error}") from None

    def execute(self, record: Any) -> None:
        """One command, which lies within the machine."""
        fields = dict(zip(record.dtype.names, record.tolist(), strict=True))
        if fields["after"] & AFTER_DRIVE:
            self.attending.clear()
        method: Callable[[Fields], None] = getattr(self, OPS[fields["op"]].name)
        method(fields)

    # ---- commands ----

    def CONFIG(self, f: Fields) -> None:
        """What holds from here on."""
        self.attending.clear()
        self.config = f

    def ATTEND(self, f: Fields) -> None:
        """Results [heads, group, d] of queries; what was selected is kept."""
        c, p = self.config, self.params
        slot, heads, tokens, d = f["slot"], f["heads"], f["tokens"], c["d"]
        size = heads * c["group"] * d
        lines = size // p.lanes
        estimates = c["attention"] == ATTENTIONS.index("sparf") and c["k"] < tokens
        spans = range(f["spans"] * self._channel_groups() if estimates else 0)
        touched = [
            _Touch("vectors", False, range(f["line"], f["line"] + lines)),
            _Touch("vectors", True, range(f["line2"], f["line2"] + lines)),
            _Touch("channel-indexed pages", False, spans, range(slot, slot + heads)),
        ]
        self._beside(touched[:1])
        self._beside(touched[1:], touched[0])
        self.attending += touched
        q = self._lines(f["line"], size).reshape(heads, c["group"], d)
        keys, values = self._cached(slot, heads, tokens)
        scale, share = np.array([c["scale"], f["share"]], np.uint32).view(np.float32)
        out: Attention
        if estimates:
            out = sparf(
                q, keys, values, scale, self.engine, r=c["r"], k=c["k"], local=c["local"],
                value_sum=self.sums[slot : slot + heads, :d] if c["mean"] else None,
                share=share, estimate_keys=self._second_copy(slot, f["spans"], keys),
            )  # fmt: skip
        else:
            out = dense(q, keys, values, scale, self.engine)
        self._lines(f["line2"], size)[...] = out.out.reshape(-1)
        self.selections.append(Selection(out.channels, out.tokens))

    def WRITE(self, f: Fields) -> None:
        """Tokens to the group buffer, with pages of the groups that they fill and the sum of their values; or
        channel-indexed pages of a span."""
        self.attending.clear()
        c, slot, heads = self.config, f["slot"], f["heads"]
        if f["form"] == _CHANNELS:
            keys = self._lines(f["line"], heads * c["d"] * c["span"]).reshape(heads, c["d"], c["span"])
            self._program(self.pages.write_channels(c, slot, heads, f["first"]), keys)
            return
        size, d, first, tokens = c["page_tokens"], c["d"], f["first"], f["tokens"]
        rows = [
            self._lines(f[line], heads * tokens * d).reshape(heads, tokens, d) for line in ("line", "line2")
        ]
        if first % size:
            self._staged(slot, heads, first // size, first % size)
        places = self.pages.write_tokens(c, slot, heads, first, tokens)
        mine = slice(slot, slot + heads)
        for i, g in enumerate(range(first // size, groups(first + tokens, size))):
            begin, end = max(first, g * size), min(first + tokens, (g + 1) * size)
            pages = self.groups[mine, g % 2]
            for page, given in enumerate(rows):
                part = given[:, begin - first : end - first].reshape(heads, -1)
                pages[:, page, (begin - g * size) * d : (end - g * size) * d] = part
            held = self.held[mine, g % 2]
            there = np.where(held[:, 0] == g + 1, held[:, 1], 0)  # tokens behind these are still held
            held[:, 0], held[:, 1] = g + 1, np.maximum(there, end - g * size)
            if end == (g + 1) * size:
                self._program(Places(*(a[:, i] for a in places)), pages[..., : size * d])
        before = self.sums[mine, :d] if first else np.zeros((heads, d), np.uint32)
        self.sums[mine, :d] = add_values(before, rows[1])

    def TRANSPOSE(self, f: Fields) -> None:
        """The channel-indexed pages of a span, from the token-indexed ones in flash."""
        c, slot, heads = self.config, f["slot"], f["heads"]
        size, d, count = c["page_tokens"], c["d"], self._channel_groups()
        span = range(f["first"] * count, (f["first"] + 1) * count)
        self._beside([_Touch("channel-indexed pages", True, span, range(slot, slot + heads))])
        stored, given = self.pages.transpose(c, slot, heads, f["first"])
        keys = self._page(stored)[..., : size * d].reshape(heads, -1, d)
        self._program(given, keys.swapaxes(1, 2))

    def READ(self, f: Fields) -> None:
        """Whole pages to the vectors."""
        p, slot, heads, count = self.params, f["slot"], f["heads"], f["count"]
        lines = heads * count * p.page_lines
        self._beside([_Touch("vectors", True, range(f["line"], f["line"] + lines))])
        places = self.pages.read(self.config, f["form"], slot, heads, f["first"], count)
        self._lines(f["line"], lines * p.lanes)[...] = self._page(places).reshape(-1)

    def RECLAIM(self, f: Fields) -> None:
        """Blocks are given back; their pages are lost."""
        self.attending.clear()
        self.pages.reclaim(f["count"])

    def GPU(self, f: Fields) -> None:
        """Nothing: see `interpret`."""

    LINK = GPU

    # ---- where things are ----

    def _channel_groups(self) -> int:
        return self.config["d"] // self.config["page_channels"]

    def _lines(self, line: int, elements: int) -> Bits16:
        """A view of the vectors."""
        return self.vectors[line * self.params.lanes :][:elements]

    def _where(self, places: Places) -> tuple[Any, ...]:
        at = self.pages.addresses(places)
        return tuple(at[name] for name in at.dtype.names or ())

    def _page(self, places: Places) -> Bits16:
        """Pages [...] as [..., elements]."""
        return self.cells[self._where(places)]

    def _program(self, places: Places, rows: Bits16) -> None:
        """Rows of elements to pages, evenly: any shape with as many elements for each, in order."""
        held = np.ascontiguousarray(rows).reshape(*places.number.shape, -1)
        self.cells[(*self._where(places), slice(held.shape[-1]))] = held

    def _staged(self, slot: int, heads: int, group: int, tokens: int) -> Bits16:
        """A group in the group buffer [heads, keys and values, elements], of which so many tokens are needed."""
        held = self.held[slot : slot + heads, group % 2]
        lost = (held[:, 0] != group + 1) | (held[:, 1] < tokens)
        if lost.any():
            where = slot + int(np.argmax(lost))
            raise ValueError(f"group {group} of slot {where} is not in the group buffer with {tokens} tokens")
        return self.groups[slot : slot + heads, group % 2]

    def _cached(self, slot: int, heads: int, tokens: int) -> Bits16:
        """Keys and values [2, heads, tokens, d]."""
        size, d = self.config["page_tokens"], self.config["d"]
        count = groups(tokens, size)
        stored = self._page(self.pages.token_pages(self.config, slot, heads, tokens))
        staged = [
            self._staged(slot, heads, g, min(size, tokens - g * size))
            for g in range(count - staged_groups(tokens, size), count)
        ]
        pages = np.concatenate([stored, np.stack(staged, axis=1)], axis=1)[..., : size * d]
        rows = pages.reshape(heads, count, 2, size, d).transpose(2, 0, 1, 3, 4).reshape(2, heads, -1, d)
        return rows[:, :, :tokens]

    def _second_copy(self, slot: int, spans: int, keys: Bits16) -> Bits16:
        """What the estimate reads: keys of whole spans from channel-indexed pages."""
        c, (heads, _, d) = self.config, keys.shape
        span, per_page = c["span"], c["page_channels"]
        pages = self._page(self.pages.channel_pages(c, slot, heads, spans))[..., : per_page * span]
        by_token = pages.reshape(heads, spans, d, span).swapaxes(2, 3).reshape(heads, -1, d)
        return np.concatenate([by_token, keys[:, spans * span :]], axis=1)

    def _beside(self, touched: Sequence[_Touch], *own: _Touch) -> None:
        """A command begins while the drive attends; raises ValueError if it shows, also beside something of its own."""
        for one in touched:
            for other in (*self.attending, *own):
                if one.meets(other):
                    raise ValueError(
                        f"it {'writes' if one.writes else 'reads'} {one.what} that ATTEND "
                        f"{'writes' if other.writes else 'reads'} meanwhile, from "
                        f"{max(one.columns.start, other.columns.start)} on"
                    )
