"""Mixtures of experts: which experts the tokens of a layer go to, and where their weights are.

A layer's router scores its experts for each token, and the best of them are at work. Which these are depends on values,
so it stands outside of the program, as it does for a composition: a trace of requests is an input, or drawn. What the
program does with it is the same, too: a section for an expert stays as it is, and its arguments say whose weights it
reads. Where HBM does not hold all experts, the DMA copies them from DDR, and the one used least recently gives way.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from tilewright.arch.errors import UserError
from tilewright.mappers.rdu.coe import Regions
from tilewright.workloads.models import ModelConfig

__all__ = ["KEYS", "Place", "Residence", "Trace", "check", "rounded", "rows_at_once"]

KEYS = ("requests", "regions")
"""Of a mapping, beside those of any model."""
Expert = tuple[str, int, int]
"""An expert's weights: phase (they lie in the order in which its sections stream them), layer, number."""


def check(model: ModelConfig) -> None:
    """Raises UserError for mixtures that are not supported."""
    for what, there in (
        ("experts that all tokens go to", model.d_shared_expert),
        ("layers without experts beside others", model.dense_layers),
        ("biases in experts", model.mlp_bias),
        ("attention beside the experts, or norms behind them", model.parallel_attention or model.post_norm),
    ):
        if there:
            raise UserError(f"{model.name}: target rdu does not support mixtures with {what}")


@dataclass(frozen=True)
class Trace:
    """The experts of each token and layer, in the order of the router's slots."""

    experts: Sequence[Sequence[Sequence[int]]]
    drawn: bool

    @classmethod
    def read(cls, mapping: Mapping[str, Any], model: ModelConfig, tokens: int, seed: int) -> "Trace":
        """What the mapping's `requests` say, or different ones drawn uniformly. Raises UserError."""
        e, k, layers = model.experts, model.experts_per_token, model.layers
        if "requests" not in mapping:
            found = np.argsort(np.random.default_rng(seed).random((tokens, layers, e)), axis=-1)[..., :k]
            return cls(found.tolist(), drawn=True)
        given = mapping["requests"]
        _check_list("requests", given, tokens, "tokens")
        for t, of_token in enumerate(given):
            _check_list(f"requests[{t}]", of_token, layers, "layers")
            for layer, chosen in enumerate(of_token):
                at = f"requests[{t}][{layer}]"
                _check_list(at, chosen, k, "experts of a token")
                for i in chosen:
                    if type(i) is not int or not 0 <= i < e:
                        raise UserError(f"mapping: {at} must list experts in 0..{e - 1}, not {i!r}")
                if len(set(chosen)) < k:
                    raise UserError(f"mapping: {at} must list different experts, not {list(chosen)}")
        return cls(given, drawn=False)

    def of(self, token: int, layer: int) -> tuple[int, ...]:
        """A token's experts in a layer, slot by slot."""
        return tuple(self.experts[token][layer])

    def groups(self, tokens: Iterable[int], layer: int) -> dict[int, list[tuple[int, int]]]:
        """Expert -> (position among `tokens`, slot) of those that go to it, experts in ascending order."""
        out: dict[int, list[tuple[int, int]]] = {}
        for position, token in enumerate(tokens):
            for slot, e in enumerate(self.of(token, layer)):
                out.setdefault(e, []).append((position, slot))
        return dict(sorted(out.items()))


def _check_list(key: str, value: Any, length: int, what: str) -> None:
    if not isinstance(value, Sequence) or isinstance(value, str) or len(value) != length:
        found = (
            f"{len(value)}" if isinstance(value, Sequence) and not isinstance(value, str) else f"{value!r}"
        )
        raise UserError(f"mapping: {key} must be a list of the {length} {what}, not {found}")


def rows_at_once(counts: Sequence[int], lanes: int) -> int:
    """Rows that a section for a prompt's experts is made for: the most that one gets, or twice what they get on average.

    >>> rows_at_once([250, 260, 258], 16), rows_at_once([1000, 8, 8, 8], 16)
    (272, 512)
    """
    most = min(max(counts), -(-2 * sum(counts) // len(counts)))
    return -(-most // lanes) * lanes


def rounded(n: int) -> int:
    """Tokens that a section is made for: the next power of two, so that few sections serve all counts."""
    return 1 << (n - 1).bit_length()


@dataclass(frozen=True)
class Place:
    """A copy that an expert needs before it is at work: its bytes in DDR go to a region of HBM."""

    expert: Expert
    region: int


class Residence:
    """Where experts are: all in HBM, or in `regions` of it, least recently used first to give way."""

    def __init__(self, experts: Sequence[Expert], regions: int) -> None:
        self.number = {expert: i for i, expert in enumerate(experts)}
        self.regions = min(regions, len(self.number))
        self.fixed = self.regions == len(self.number)
        self._held = Regions(self.regions)
        self.copies = self.uses = 0

    def use(self, experts: Sequence[Expert]) -> tuple[list[int], list[Place]]:
        """The regions of experts that are at work together, and what must be copied there before."""
        if self.fixed:
            return [self.number[e] for e in experts], []
        numbers = [self.number[e] for e in experts]
        found, copies = [], []
        for expert, n in zip(experts, numbers, strict=True):
            region, copied = self._held.use(n, numbers)
            found.append(region)
            copies += [Place(expert, region)] if copied else []
        self.uses += len(numbers)
        self.copies += len(copies)
        return found, copies
