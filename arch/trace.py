"""What a cycle model keeps of a run for a trace, and what a drawing of it must know of the target."""

from dataclasses import dataclass

import numpy as np

# One instruction: its `first` tick and its `end` as in SPAN; its units execute it from `start` to before
# `complete`. `index` counts within one repetition of its segment; `op` is a number of the instruction set.
LOG = np.dtype(
    [
        ("segment", "i8"),
        ("index", "i8"),
        ("tag", "i8"),
        ("op", "i8"),
        ("first", "i8"),
        ("start", "i8"),
        ("complete", "i8"),
        ("end", "i8"),
    ]
)


@dataclass(frozen=True, kw_only=True)
class TraceForm:
    """How the instructions and memory commands of a target are drawn.

    `operations` are the names of instructions by their number, `executes` the unit that executes each alone,
    "" where memory commands show the work. For the commands by their number: `commands` their names, `opens`
    and `closes` those that open and close rows (bank -1: in all `banks`), `cadence` ticks from one to the
    next equal one at full speed, `holds` ticks for which one keeps the channel.
    """

    operations: tuple[str, ...]
    executes: tuple[str, ...]
    commands: tuple[str, ...]
    opens: frozenset[int]
    closes: frozenset[int]
    cadence: tuple[int, ...]
    holds: tuple[int, ...]
    banks: int
