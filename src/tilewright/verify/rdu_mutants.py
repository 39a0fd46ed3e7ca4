"""Faults that the plan of target rdu must catch."""

from contextlib import AbstractContextManager
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from tilewright.arch import rdu as arch
from tilewright.sim import rdu as sim
from tilewright.verify.mutants import Mutant, constant, edited, replaced, told
from tilewright.workloads import rdu as meaning

_ARRAYS, _, _SLOW, _, _SMALL = range(5)  # structures of the plan


def _rtl(module: str, name: str, old: str, new: str) -> AbstractContextManager[None]:
    return edited(import_module(f"tilewright.rtl.rdu.{module}"), name, old, new)


def _tail(change: int) -> AbstractContextManager[None]:
    true = arch.tail_latency
    return replaced(arch, "tail_latency", lambda p, function: true(p, function) + change * (function != 0))


def _rounded_first() -> AbstractContextManager[None]:
    """The tail rounds before its function, not behind it."""
    true = meaning.special

    def special(function: str, words: Any, counts: Any) -> Any:
        return true(function, meaning.round_bf16(words), counts)

    return replaced(meaning, "special", special)


def _without_the_last() -> AbstractContextManager[None]:
    """A tree that leaves out its last lane."""

    def reduce_tree(fold: str, kind: str, lanes: Any) -> Any:
        total = lanes[..., 0]
        for k in range(1, lanes.shape[-1] - 1):
            total = meaning.lane_op(fold, kind, total, lanes[..., k])
        return np.asarray(total)

    return replaced(meaning, "reduce_tree", reduce_tree)


def _sooner(p: arch.RduParams) -> arch.RduParams:
    dram = p.dram.copy()
    dram[:, arch.DRAM.index("rp")] -= 1
    return p._replace(dram=constant(dram))


MUTANTS = (
    Mutant(
        "rtl: an input that is not in use fills its register",
        partial(_rtl, "pcu", "Pcu._simd", "with m.If(c.vectors[i]):", "with m.If(1):"),
        _SMALL,
        25,
    ),
    Mutant(
        "rtl: the first value of a fold meets the sum before",
        partial(_rtl, "pcu", "Pcu._simd", "Mux(results.first, value, join)", "join"),
        _SMALL,
    ),
    Mutant(
        "rtl: a tile waits for the tick after the last column of the one before",
        partial(_rtl, "pcu", "Pcu._systolic", " & ~((left == 1) & move)", ""),
        _ARRAYS,
        25,
    ),
    Mutant(
        "rtl: a sequence id does not move on",
        partial(
            _rtl, "pmu", "Pmu.elaborate", "sequence.eq(sequence + c.sequence_step)", "sequence.eq(sequence)"
        ),
        _SMALL,
        25,
    ),
    Mutant(
        "rtl: a side gives its tokens before its accesses are done",
        partial(
            _rtl, "pmu", "_Side.__init__", "Mux(self.finishes, signal, 0)", "Mux(self.step, chain.signal, 0)"
        ),
        _SMALL,
    ),
    Mutant(
        "rtl: reading always comes first at a bank",
        partial(_rtl, "pmu", "Pmu.elaborate", "write_first.eq(~write_first)", "write_first.eq(0)"),
        _SMALL,
    ),
    Mutant(
        "rtl: diagonal stripes carry into the banks above",
        partial(_rtl, "pmu", "BankMap.elaborate", "((bank + row) & mask)", "((bank + row + 1) & mask)"),
        _SMALL,
    ),
    Mutant(
        "rtl: an AGCU keeps a line across a token",
        partial(_rtl, "agcu", "Agcu._load", "kept.eq(same & ~taking)", "kept.eq(same)"),
        _SMALL,
        25,
    ),
    Mutant(
        "rtl: one load too few is under way",
        partial(
            _rtl, "agcu", "Agcu._load", "room.eq(count < p.in_flight)", "room.eq(count + 1 < p.in_flight)"
        ),
        _SMALL,
    ),
    Mutant(
        "rtl: a store's tokens go out before its line is written",
        partial(
            _rtl,
            "agcu",
            "Agcu._store",
            "buffer.signal.eq(Mux(granted, owed, 0))",
            "buffer.signal.eq(Mux(step, chain.signal, 0))",
        ),
        _SMALL,
        25,
    ),
    Mutant(
        "rtl: channels do not begin with the first AGCU again",
        partial(
            _rtl,
            "channel",
            "Channel.elaborate",
            "ResetInserter(self.start)(RoundRobin(count=self._count))",
            "RoundRobin(count=self._count)",
        ),
        _SMALL,
        25,
    ),
    Mutant(
        "rtl: a row that is open is not looked at",
        partial(_rtl, "banks", "Banks.elaborate", "opened[index] & (rows[index] == row)", "opened[index]"),
        _SMALL,
        25,
    ),
    Mutant(
        "rtl: a refresh leaves rows open",
        partial(_rtl, "banks", "Banks.elaborate", "with m.If(self.start | due):", "with m.If(self.start):"),
        _SMALL,
        25,
    ),
    Mutant(
        "rtl: a token is a tick early",
        partial(
            _rtl,
            "tokens",
            "TokenNetwork.elaborate",
            "ticks.eq(p.token * (dx + dy + 1))",
            "ticks.eq(p.token * (dx + dy) + 1)",
        ),
        _SLOW,
    ),
    Mutant(
        "rtl: a copy waits a tick too long for its lines",
        partial(
            _rtl,
            "dma",
            "Dma.elaborate",
            "lead.eq(Mux(o.lines == 0, 0, wait - 1))",
            "lead.eq(Mux(o.lines == 0, 0, wait))",
        ),
        _SMALL,
    ),
    Mutant(
        "rtl: dimension order begins with the other one",
        partial(_rtl, "switch", "Switch._dimension_order", "if self._y_first:", "if not self._y_first:"),
        _SMALL,
        25,
    ),
    Mutant(
        "model: latency of memory one tick longer",
        partial(told, sim, lambda p: p._replace(latency=constant(p.latency + 1))),
        _SMALL,
        4,
    ),
    Mutant(
        "model: activates one tick closer to precharges",
        partial(told, sim, _sooner),
        _SMALL,
        25,
    ),
    Mutant(
        "model: tokens one tick late", partial(told, sim, lambda p: p._replace(token=p.token + 1)), _SMALL
    ),
    Mutant(
        "model: credits one tick late", partial(told, sim, lambda p: p._replace(credit=p.credit + 1)), _SMALL
    ),
    Mutant(
        "model: an AGCU may have one more load under way",
        partial(told, sim, lambda p: p._replace(in_flight=p.in_flight + 1)),
        _SMALL,
    ),
    Mutant(
        "model: a copy ends a tick early",
        partial(edited, sim, "_Run.copy", "last + latency + 2", "last + latency + 1"),
        _SMALL,
    ),
    Mutant("model: a special function takes a tick less", partial(_tail, -1), _SMALL),
    Mutant("interpreter: results are rounded before the function", _rounded_first, _SMALL),
    Mutant("interpreter: a tree leaves out its last lane", _without_the_last, _SMALL, 25),
    Mutant(
        "interpreter: scalars fill the registers of vectors",
        partial(edited, meaning, "Pcu._simd", 'INPUTS if kind == "scalar" else 0', "0"),
        _SMALL,
    ),
    Mutant(
        "interpreter: half a word is its lower half",
        partial(edited, meaning, "Gate.work", "elements << _HALF if half else elements", "elements"),
        _SMALL,
    ),
)
