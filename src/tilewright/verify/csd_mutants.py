"""Faults that the plan of target csd must catch."""

from contextlib import AbstractContextManager
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from tilewright.sim import csd as sim
from tilewright.verify.mutants import Mutant, constant, edited, replaced, told
from tilewright.workloads import csd_kernels as meaning

_TWO, _UNFILTERED, _CACHED, _SMALL, _ONE = range(5)  # structures of the plan


def _rtl(module: str, name: str, old: str, new: str) -> AbstractContextManager[None]:
    return edited(import_module(f"tilewright.rtl.csd.{module}"), name, old, new)


def _kernel(old: str, new: str) -> AbstractContextManager[None]:
    return _rtl("kernel", "AttentionKernel.elaborate", old, new)


def _highest_first() -> AbstractContextManager[None]:
    """Of equal keys the highest positions are taken."""
    true = meaning.argtopk

    def argtopk(keys: Any, n: int) -> Any:
        return true(np.asarray(keys)[..., ::-1], n)[..., ::-1]

    return replaced(meaning, "argtopk", argtopk)


def _scaled_first() -> AbstractContextManager[None]:
    """Scores are scaled before the largest one is taken off."""
    true = meaning.weigh

    def weigh(score: Any, scale: Any, engine: Any) -> Any:
        with np.errstate(all="ignore"):
            return true(score * scale, np.float32(1), engine)

    return replaced(meaning, "weigh", weigh)


MUTANTS = (
    Mutant(
        "rtl: the first of several scores is compared with the top of the softmax before",
        partial(_kernel, "Mux(result_opens, gemv.result, maximum.o)", "maximum.o"),
        _ONE,
    ),
    Mutant(
        "rtl: of a partial group of channels all lanes count",
        partial(_kernel, "by_rows | (lane < operand_rows)", "1"),
        _TWO,
    ),
    Mutant(
        "rtl: values that come while keys are worked on have all parts",
        partial(
            _kernel,
            "Mux(values_asked & ~later, room, base + p.batches * intake.rows)",
            "base + p.batches * intake.rows",
        ),
        _SMALL,
        24,
    ),
    Mutant(
        "rtl: a span is asked for when the one before is worked on",
        partial(_kernel, "(asked_spans - spans_done != p.batches)", "(asked_spans - spans_done != 1)"),
        _TWO,
    ),
    Mutant(
        "rtl: a kernel writes while pages are still looked at",
        partial(_kernel, "over = self.ask.ready | follows", "over = Const(1)"),
        _UNFILTERED,
        24,
    ),
    Mutant(
        "rtl: alpha is taken where no mean is wanted",
        partial(_kernel, "mean.eq(c.mean & estimates)", "mean.eq(estimates)"),
        _ONE,
    ),
    Mutant(
        "rtl: channels of tail tokens are not packed behind those of words before",
        partial(_rtl, "intake", "Intake.elaborate", "Mux(column, self.prefix,", "Mux(column, 0,"),
        _TWO,
        24,
    ),
    Mutant(
        "rtl: what comes after the drive leaves turns of heads as they are",
        partial(_rtl, "fetch", "Fetch._hand_over", "ResetInserter(self.anew)(turn)", "turn"),
        _TWO,
        24,
    ),
    Mutant(
        "rtl: local tokens are not preferred",
        partial(
            _rtl, "argtopk", "ArgTopK.elaborate", "Mux(self.local < self.n, self.n - self.local, 0)", "self.n"
        ),
        _TWO,
        24,
    ),
    Mutant(
        "rtl: only the last group is taken from the group buffer",
        partial(_rtl, "fetch", "Fetch._pass", "(group + 2) *", "(group + 1) *"),
        _TWO,
    ),
    Mutant(
        "model: exponentials take a tick more",
        partial(told, sim, lambda p: p._replace(exp_latency=p.exp_latency + 1)),
        _ONE,
    ),
    Mutant(
        "model: a page takes a tick more on the bus",
        partial(
            told, sim, lambda p: p._replace(flash=p.flash._replace(page_transfer=p.flash.page_transfer + 1))
        ),
        _ONE,
    ),
    Mutant(
        "model: a step of the temperature is left out",
        partial(
            told,
            sim,
            lambda p: p._replace(scalar_ticks=constant(p.scalar_ticks - np.array([0, 2, 0, 0]))),
        ),
        _TWO,
    ),
    Mutant("interpreter: of equal keys the last ones are taken", _highest_first, _TWO, 24),
    Mutant("interpreter: scores are scaled before the largest is taken off", _scaled_first, _ONE),
)
