"""Faults that the plan of target lut must catch."""

from contextlib import AbstractContextManager
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from tilewright.sim import lut as sim
from tilewright.verify.mutants import Mutant, constant, edited, replaced, told
from tilewright.workloads import lut as meaning

_INT8, _FP16, _FP8, _SHORT_QUEUE, _BLOCKS = 0, 1, 2, 3, 5  # structures of the plan


def _rtl(module: str, name: str, old: str, new: str) -> AbstractContextManager[None]:
    return edited(import_module(f"tilewright.rtl.lut.{module}"), name, old, new)


def _psum_last() -> AbstractContextManager[None]:
    true = meaning.lookup

    def lookup(tables: Any, weights: Any, psum: Any, accumulator: str) -> Any:
        total = true(tables, weights, None, accumulator)
        with np.errstate(all="ignore"):
            return total if psum is None else total + psum

    return replaced(meaning, "lookup", lookup)


MUTANTS = (
    Mutant(
        "rtl: a sum that is being written is not forwarded",
        partial(_rtl, "compute", "ComputeUnit.elaborate", "done & (done_place == take_place)", "done & 0"),
        _FP8,
        25,
    ),
    Mutant(
        "rtl: a sum that was written a tick ago is not forwarded",
        partial(
            _rtl,
            "compute",
            "ComputeUnit.elaborate",
            "held_done & (held_place == take_place)",
            "held_done & 0",
        ),
        _FP8,
        25,
    ),
    Mutant(
        "rtl: an n-tile goes on with the rows of the one before",
        partial(
            _rtl,
            "compute",
            "ComputeUnit.elaborate",
            'loops["row"].eq(Mux(last_n, base + head.groups, base))',
            'loops["row"].eq(now["row"] + 1)',
        ),
        _INT8,
    ),
    Mutant(
        "rtl: lines of a load and a store may overlap",
        partial(_rtl, "top", "Top._windows", "(i.line < slot.end) & (slot.line < end)", "C(0, 1)"),
        _SHORT_QUEUE,
        25,
    ),
    Mutant(
        "rtl: lines overlap only if the earlier ones begin before",
        partial(_rtl, "top", "Top._windows", "(i.line < slot.end) & (slot.line < end)", "i.line < slot.end"),
        _SHORT_QUEUE,
    ),
    Mutant(
        "rtl: what completes in the tick of dispatch is waited for",
        partial(
            _rtl,
            "window",
            "Window.elaborate",
            "self.waits_operands & ~self.done_operands",
            "self.waits_operands",
        ),
        _FP16,
        25,
    ),
    Mutant(
        "rtl: a line arrives one tick early",
        partial(
            _rtl, "load", "LoadUnit.elaborate", "self.tick >= arriving.due", "self.tick + 1 >= arriving.due"
        ),
        _FP16,
    ),
    Mutant(
        "rtl: the last line of a row comes first",
        partial(
            _rtl, "load", "LoadUnit.elaborate", "Cat(before, self.mem_data)", "Cat(self.mem_data, before)"
        ),
        _FP16,
    ),
    Mutant(
        "rtl: a store completes one tick early",
        partial(_rtl, "store", "StoreUnit.elaborate", "self.tick >= dues", "self.tick + 1 >= dues"),
        _SHORT_QUEUE,
    ),
    Mutant(
        "rtl: one working tick too many",
        partial(_rtl, "decoder", "Rate.elaborate", "part < self.p", "part <= self.p"),
        _SHORT_QUEUE,
    ),
    Mutant(
        "rtl: not_before is one tick late",
        partial(
            _rtl,
            "decoder",
            "Sequencer.elaborate",
            "self.tick < self.instruction",
            "self.tick <= self.instruction",
        ),
        _SHORT_QUEUE,
    ),
    Mutant(
        "rtl: a block takes the scale of the row before its last",
        partial(_rtl, "compute", "ComputeUnit._arrays", "with m.If(swap):", "with m.If(load):"),
        _BLOCKS,
    ),
    Mutant(
        "model: latency one tick longer",
        partial(told, sim, lambda p: p._replace(latency=constant(p.latency + 1))),
        _SHORT_QUEUE,
        4,
    ),
    Mutant(
        "model: an LMMA completes one tick early",
        partial(told, sim, lambda p: p._replace(compute_drain=p.compute_drain - 1)),
        _SHORT_QUEUE,
        4,
    ),
    Mutant(
        "model: results may be overwritten while they are stored",
        partial(edited, sim, "_run", "operands, m.halves[_STORED, result], row", "operands, 0, row"),
        _SHORT_QUEUE,
    ),
    Mutant(
        "model: a line does not wait for the one before",
        partial(
            edited,
            sim,
            "_move",
            "arrival = max(last + latency, arrival + lines)",
            "arrival = last + latency",
        ),
        _INT8,
    ),
    Mutant("interpreter: partial sums are added last", _psum_last, _FP16),
    Mutant(
        "interpreter: a block has the scale of its first row",
        partial(edited, meaning, "Machine._multiply", "min(i + block, groups) - 1", "i"),
        _BLOCKS,
    ),
)
