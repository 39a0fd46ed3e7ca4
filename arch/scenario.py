"""What a machine is asked to run, and what a mapper answers: the contract between the face and every target."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program
from tilewright.arch.timeline import Timeline


@dataclass(frozen=True, kw_only=True)
class Scenario:
    """`context` tokens are cached, `prompt` are prefilled, then `generate` decode steps; or a step of training with
    sequences of `train` tokens, and nothing else.

    Decode step i attends to context + prompt + i + 1 tokens. Raises UserError for impossible counts.
    """

    context: int = 0
    prompt: int = 0
    generate: int = 1
    batch: int = 1
    lm_head: bool = True
    embedding: bool = True
    seed: int = 0
    train: int = 0

    def __post_init__(self) -> None:
        counts = (("context", 0), ("prompt", 0), ("generate", 0), ("batch", 1), ("seed", 0), ("train", 0))
        for name, low in counts:
            value = getattr(self, name)
            if not low <= value <= 10**9:
                raise UserError(f"--{name} must be in {low}..{10**9}, not {value}")
        if self.train and self.context + self.prompt + self.generate:
            raise UserError("--train is a step of its own, without --context, --prompt and --generate")
        if self.prompt + self.generate + self.train == 0:
            raise UserError("nothing to run: --prompt, --generate and --train are all 0")


@dataclass(frozen=True)
class TagInfo:
    """What a tag of a mapped program stands for: an operator of a layer (-1: outside the layers)."""

    name: str
    op: str
    layer: int


@dataclass(frozen=True, kw_only=True)
class Mapped:
    """A model mapped onto a machine.

    `tags[i]` describes tag i of the program; `document` is the mapping as a person may read, keep and hand
    back (`--mapping-out`, `--mapping`); `steps` counts the program's segments. A segment is a step (the prompt, or a
    token) of its own, unless `step_of` has the step of each. `draw` gives an SVG picture of the mapping, where
    there is one. `conclude` gives notes that follow from the run's Timeline. `beside` are mapping documents of ways to
    do without what this mapping does, by name: they are run too, to compare with.
    """

    program: Program
    tags: Sequence[TagInfo]
    steps: int
    document: Mapping[str, Any]
    step_of: Sequence[int] | None = None
    notes: Sequence[str] = field(default=())
    assumed: Sequence[str] = field(default=())
    draw: Callable[[], str] | None = None
    conclude: Callable[[Timeline], Sequence[str]] | None = None
    beside: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


class Progress(Protocol):
    """Called by long work with (done, total) in its own unit."""

    def __call__(self, done: int, total: int) -> None: ...
