"""What a drive knows without time: where pages lie (`PageTables`), and what attention selects (`Decisions`).

Both follow from the commands in the order of the program, and from nothing else. Pages are given out:

- by WRITE, head by head, and within a head by group: for tokens the key page, then the value page of each group whose
  last token is written; for channels one page of each channel group;
- by TRANSPOSE, head by head, one page of each channel group, after the head's key pages of the span were read.

A page goes to the channel of its table entry, and takes the next page of that channel's log.
"""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from tilewright.arch.csd import ATTENTIONS, FORMS, OP, CsdParams, channel_of, groups, staged_groups

__all__ = ["PLACE", "Decisions", "PageTables", "Places", "Selection"]

PLACE = np.dtype([(name, "i8") for name in ("channel", "chip", "die", "plane", "block", "page")])
Array = npt.NDArray[np.int64]
Mask = npt.NDArray[np.bool_]
Command = Any  # a record of the program, or a mapping of its fields
_TOKENS, _CHANNELS = range(len(FORMS))


class Places(NamedTuple):
    """Pages by their channel, and by their number in its log since the beginning; arrays of one shape."""

    channel: Array
    number: Array


class PageTables:
    """The two tables, from the entries of slots to pages, and the logs that pages are taken from.

    They are empty at first. Methods raise ValueError for a log that is full, for a page that was never written or is
    erased, and for a block that cannot be given back.
    """

    def __init__(self, p: CsdParams) -> None:
        f = p.flash
        self._p = p
        self.block_pages = f.chips * f.dies * f.planes * f.pages  # of a log
        self.taken = np.zeros(f.channels, np.int64)  # pages given out of each log
        self.erased = np.zeros(f.channels, np.int64)  # blocks given back, of each log
        # By form and entry, the page's number in its log plus one; 0 for none. Untouched memory costs nothing.
        self.table = np.zeros((len(FORMS), p.slots << p.table_bits), np.uint32)

    # ---- what commands do ----

    def write_tokens(self, config: Command, slot: int, heads: int, first: int, tokens: int) -> Places:
        """Pages of the groups that tokens from `first` on fill: [heads, groups, 2], keys and values."""
        size = int(config["page_tokens"])
        filled = np.arange(first // size, (first + tokens) // size)
        positions = 2 * filled[:, None] + np.arange(2)
        return self._give(_TOKENS, slot, heads, positions)

    def write_channels(self, config: Command, slot: int, heads: int, span: int) -> Places:
        """[heads, channel groups]."""
        count = _channel_groups(config)
        return self._give(_CHANNELS, slot, heads, span * count + np.arange(count))

    def transpose(self, config: Command, slot: int, heads: int, span: int) -> tuple[Places, Places]:
        """Key pages that are read [heads, groups of the span], and pages given out [heads, channel groups]."""
        count = int(config["span"]) // int(config["page_tokens"])
        keys = 2 * (span * count + np.arange(count))
        return self._find(_TOKENS, slot, heads, keys), self.write_channels(config, slot, heads, span)

    def read(self, config: Command, form: int, slot: int, heads: int, first: int, count: int) -> Places:
        """[heads, count] from table entry `first` on, or from the first entry of span `first`."""
        begin = first * _channel_groups(config) if form == _CHANNELS else first
        return self._find(form, slot, heads, np.arange(begin, begin + count))

    def token_pages(self, config: Command, slot: int, heads: int, tokens: int) -> Places:
        """Key and value pages of an ATTEND that lie in flash: [heads, groups, 2]."""
        size = int(config["page_tokens"])
        count = groups(tokens, size) - staged_groups(tokens, size)
        return self._find(_TOKENS, slot, heads, 2 * np.arange(count)[:, None] + np.arange(2))

    def channel_pages(self, config: Command, slot: int, heads: int, spans: int) -> Places:
        """[heads, spans, channel groups]."""
        count = _channel_groups(config)
        return self._find(_CHANNELS, slot, heads, count * np.arange(spans)[:, None] + np.arange(count))

    def reclaim(self, count: int) -> Places:
        """The first page of each plane of the oldest blocks: [count, channels, planes], planes in a log's order."""
        whole = self.taken // self.block_pages - self.erased
        if whole.min() < count:
            least = int(np.argmin(whole))
            raise ValueError(
                f"the log of channel {least} has {int(whole[least])} full blocks, not {count} to erase"
            )
        block: Array = self.erased + np.arange(count)[:, None]
        planes = np.arange(self.block_pages // self._p.flash.pages)
        number: Array = block[:, :, None] * self.block_pages + planes
        self.erased += count
        channel = np.broadcast_to(np.arange(len(self.taken))[:, None], number.shape)
        return Places(channel, number)

    def command(self, config: Command, record: Command) -> None:
        """Do what a command of the program does to tables and logs, and refuse what it may not do."""
        op, slot, heads = int(record["op"]), int(record["slot"]), int(record["heads"])
        first, tokens = int(record["first"]), int(record["tokens"])
        if op == OP["WRITE"] and int(record["form"]) == _TOKENS:
            self.write_tokens(config, slot, heads, first, tokens)
        elif op == OP["WRITE"]:
            self.write_channels(config, slot, heads, first)
        elif op == OP["TRANSPOSE"]:
            self.transpose(config, slot, heads, first)
        elif op == OP["READ"]:
            self.read(config, int(record["form"]), slot, heads, first, int(record["count"]))
        elif op == OP["RECLAIM"]:
            self.reclaim(int(record["count"]))
        elif op == OP["ATTEND"]:
            self.token_pages(config, slot, heads, tokens)
            if _estimates(config, tokens):
                self.channel_pages(config, slot, heads, int(record["spans"]))

    def addresses(self, places: Places) -> npt.NDArray[Any]:
        """PLACE of the same shape."""
        f, s = self._p.flash, self._p.log_strides
        out = np.zeros(places.number.shape, PLACE)
        out["channel"] = places.channel
        for name, stride, size in zip(("chip", "die", "plane"), s, (f.chips, f.dies, f.planes), strict=True):
            out[name] = places.number // stride % size
        out["page"] = places.number // (self.block_pages // f.pages) % f.pages
        out["block"] = places.number // self.block_pages % f.blocks
        return out

    # ---- tables and logs ----

    def _entries(self, slot: int, heads: int, positions: Array) -> tuple[Array, Array]:
        """Table entries [heads, *positions] and their channels."""
        slots = (slot + np.arange(heads)).reshape(-1, *[1] * positions.ndim)
        return (slots << self._p.table_bits) + positions, channel_of(slots, positions, self._p.flash.channels)

    def _find(self, form: int, slot: int, heads: int, positions: Array) -> Places:
        entries, channel = self._entries(slot, heads, positions)
        number = self.table[form, entries].astype(np.int64) - 1
        lost = number < self.erased[channel] * self.block_pages  # also those that were never written
        if lost.any():
            i = tuple(np.argwhere(lost)[0])
            where, position = divmod(int(entries[i]), 1 << self._p.table_bits)[0], int(positions[i[1:]])
            what = "was never written" if number[i] < 0 else "was erased"
            raise ValueError(f"page {position} of slot {where} ({FORMS[form]}) {what}")
        return Places(channel, number)

    def _give(self, form: int, slot: int, heads: int, positions: Array) -> Places:
        entries, channel = self._entries(slot, heads, positions)
        flat = channel.reshape(-1)
        number = np.empty(len(flat), np.int64)
        for c in range(len(self.taken)):
            mine = np.flatnonzero(flat == c)
            number[mine] = self.taken[c] + np.arange(len(mine))
            end = self.taken[c] + len(mine)
            room = (self.erased[c] + self._p.flash.blocks) * self.block_pages
            if end > room:
                raise ValueError(
                    f"the log of channel {c} is full: {int(end - room)} pages more than its "
                    f"{self._p.flash.blocks} blocks of {self.block_pages} hold"
                )
            if end >= 1 << 32:
                raise ValueError(f"the log of channel {c} has given out more than 2^32 pages")
            self.taken[c] = end
        self.table[form, entries.reshape(-1)] = number + 1
        return Places(channel, number.reshape(entries.shape))


def _channel_groups(config: Command) -> int:
    return int(config["d"]) // int(config["page_channels"])


def _estimates(config: Command, tokens: int) -> bool:
    """Whether an ATTEND over so many tokens needs an estimate: what attends to all of them does not."""
    return int(config["attention"]) == ATTENTIONS.index("sparf") and int(config["k"]) < tokens


# ---- decisions ----------------------------------------------------------------------------------------


class Selection(NamedTuple):
    """What the heads of an ATTEND select; without an estimate no channels and all tokens."""

    channels: Mask  # [heads, d]
    tokens: Mask  # [heads, tokens]


class Decisions:
    """Selections of the ATTENDs of a program, in the order in which they are executed."""

    def __init__(self, p: CsdParams, recorded: Sequence[Selection] | None = None, seed: int = 0) -> None:
        self._p, self._seed = p, seed
        self._recorded: Iterator[Selection] | None = None if recorded is None else iter(recorded)
        self._drawn: dict[tuple[int, ...], tuple[Mask, Mask]] = {}

    @classmethod
    def drawn(cls, p: CsdParams, seed: int = 0) -> "Decisions":
        """Selections by chance: channels at random, tokens in runs.

        The last `local` tokens are always among the k, the others come in runs of `run_tokens` on average. Heads take
        the `patterns` different selections in turn, by their slot.
        """
        return cls(p, None, seed)

    @classmethod
    def recorded(cls, p: CsdParams, selections: Sequence[Selection]) -> "Decisions":
        """Selections that an interpreter made, one for each ATTEND, repetitions of segments written out."""
        return cls(p, selections)

    @property
    def by_pattern(self) -> bool:
        """Whether slots whose numbers are alike modulo `patterns` select alike."""
        return self._recorded is None

    def of(self, config: Command, record: Command) -> Selection:
        """What the next ATTEND selects. Raises ValueError where there is none, or one of another shape."""
        heads, tokens, d = int(record["heads"]), int(record["tokens"]), int(config["d"])
        if self._recorded is not None:
            selection = next(self._recorded, None)
            if selection is None:
                raise ValueError("there are more ATTENDs than selections")
            if selection.channels.shape != (heads, d) or selection.tokens.shape != (heads, tokens):
                raise ValueError(
                    f"a selection must be of channels [{heads}, {d}] and tokens [{heads}, {tokens}], "
                    f"not {selection.channels.shape}, {selection.tokens.shape}"
                )
            return selection
        if not _estimates(config, tokens):
            return Selection(np.zeros((heads, d), np.bool_), np.ones((heads, tokens), np.bool_))
        turn = (int(record["slot"]) + np.arange(heads)) % self._p.patterns
        drawn = [self._pattern(n, config, tokens) for n in range(self._p.patterns)]
        channels, chosen = (np.stack(masks) for masks in zip(*drawn, strict=True))
        return Selection(channels[turn], chosen[turn])

    def _pattern(self, number: int, config: Command, tokens: int) -> tuple[Mask, Mask]:
        d, r = int(config["d"]), min(int(config["r"]), int(config["d"]))
        k, local = int(config["k"]), min(int(config["local"]), int(config["k"]))
        key = (self._seed, number, d, r, tokens, k, local)
        if key not in self._drawn:
            rng = np.random.default_rng(key)
            channels = np.zeros(d, np.bool_)
            channels[rng.permutation(d)[:r]] = True
            chosen = np.ones(tokens, np.bool_)
            chosen[: tokens - local] = _runs(rng, tokens - local, k - local, self._p.run_tokens)
            self._drawn = {} if len(self._drawn) > 4096 else self._drawn
            self._drawn[key] = channels, chosen
        return self._drawn[key]


def _runs(rng: np.random.Generator, n: int, k: int, run: int) -> Mask:
    """k of n, in about k / run runs, which do not touch."""
    out = np.zeros(n, np.bool_)
    if k == 0:
        return out
    count = min(max(1, round(k / run)), n - k + 1)
    # Where runs end among the chosen, and where they stand among the others: each at another place.
    ends = np.sort(rng.permutation(k - 1)[: count - 1]) + 1
    lengths = np.diff(ends, prepend=0, append=k)
    before = np.sort(rng.permutation(n - k + 1)[:count])
    begins = before + np.cumsum(lengths) - lengths
    out[np.repeat(begins - np.cumsum(lengths) + lengths, lengths) + np.arange(k)] = True
    return out
