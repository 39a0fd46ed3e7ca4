"""Faults that the plan of target pim must catch."""

from contextlib import AbstractContextManager
from functools import partial
from importlib import import_module
from typing import Any

import numpy as np

from tilewright.arch import pim as arch
from tilewright.arch.formats import BF16, FloatFormat
from tilewright.arch.pim import CMD, PimParams
from tilewright.sim import pim as sim
from tilewright.verify.mutants import Mutant, constant, edited, replaced, told
from tilewright.workloads import asic as vectors
from tilewright.workloads import formats
from tilewright.workloads import pim as meaning

_TWO_LANES, _ONE_BANK, _EIGHT_BANKS = 3, 4, 5  # structures of the plan; the first has four lanes


def _rtl(module: str, name: str, old: str, new: str) -> AbstractContextManager[None]:
    return edited(import_module(f"tilewright.rtl.{module}"), name, old, new)


def _shorter(command: int) -> AbstractContextManager[None]:
    """The RTL is given one tick less from `command` to the next one like it."""
    true = arch.register_values

    def values(p: PimParams, *rest: Any) -> list[int]:
        out = true(p, *rest)
        first, end = int(p.dram.row_start[command]), int(p.dram.row_start[command + 1])
        base = len(out) - len(p.dram.row_prev)
        for row in range(first, end):
            if p.dram.row_prev[row] == command and p.dram.row_window[row] == 1:
                out[base + row] -= 1
        return out

    return replaced(arch, "register_values", values)


def _halves(bank: np.ndarray, buffer: np.ndarray, fmt: FloatFormat) -> np.ndarray:
    products = formats.multiply(bank, buffer, BF16, fmt)
    while (n := products.shape[-1]) > 1:
        products = formats.add(products[..., : n // 2], products[..., n // 2 :], fmt)
    return products[..., 0]


def _unrounded(x: np.ndarray, scale: np.float32, asic: Any, lanes: int) -> np.ndarray:
    s = x * scale
    e = vectors.exp(s - vectors.reduce(s, lanes, np.maximum, -np.inf), asic)
    return e * vectors.reciprocal(vectors.reduce(e, lanes, np.add, 0), asic)


MUTANTS = (
    Mutant(
        "rtl: products are cut off, not rounded",
        partial(_rtl, "lib.fp", "FpRound.elaborate", "up = kept[0] & (rest | kept[1])", "up = 0"),
        _ONE_BANK,
    ),
    Mutant(
        "rtl: ties round away from zero",
        partial(_rtl, "lib.fp", "FpRound.elaborate", "up = kept[0] & (rest | kept[1])", "up = kept[0]"),
        _ONE_BANK,
    ),
    Mutant(
        "rtl: RDMAC does not clear",
        partial(_rtl, "pim.bank", "Bank.elaborate", "unit.clear.eq(read_acc)", "unit.clear.eq(0)"),
        _ONE_BANK,
    ),
    Mutant(
        "rtl: accumulators outlive the run",
        partial(_rtl, "pim.bank", "Bank.elaborate", "unit.reset.eq(self.reset)", "unit.reset.eq(0)"),
        _ONE_BANK,
    ),
    Mutant("rtl: all-bank MACs one tick too close", partial(_shorter, CMD.MACAB), _TWO_LANES),
    Mutant("rtl: activates one tick too close", partial(_shorter, CMD.ACT), _EIGHT_BANKS),
    Mutant(
        "rtl: no refresh while data drains",
        partial(
            _rtl,
            "pim.controller",
            "ChannelController.elaborate",
            "(refresh | active) & ~timing",
            "((refresh & (waiting == 0)) | active) & ~timing",
        ),
        _ONE_BANK,
    ),
    Mutant(
        "rtl: stall causes in the wrong order",
        partial(
            _rtl,
            "pim.controller",
            "ChannelController.elaborate",
            "for k in reversed(range(len(DRAM_CAUSES)))",
            "for k in range(len(DRAM_CAUSES))",
        ),
        _ONE_BANK,
    ),
    Mutant(
        "rtl: the drain is one tick short",
        partial(_rtl, "pim.controller", "ChannelController.elaborate", "latency - 1", "latency - 2"),
        _ONE_BANK,
    ),
    Mutant(
        "rtl: not_before is one tick late",
        partial(
            _rtl,
            "pim.sequencer",
            "Sequencer.elaborate",
            "self.tick < self.instruction",
            "self.tick <= self.instruction",
        ),
        _ONE_BANK,
    ),
    Mutant(
        "rtl: an instruction alongside waits for both units",
        partial(
            _rtl,
            "pim.sequencer",
            "Sequencer.elaborate",
            "self.overlap & self.instruction.alongside",
            "self.overlap & 0",
        ),
        _TWO_LANES,
        25,
    ),
    Mutant(
        "rtl: a vector's second half of a pair is its first",
        partial(_rtl, "pim.asic", "VectorUnit._operands", 'operands["a"][i ^ 1]', 'operands["a"][i & ~1]'),
        _ONE_BANK,
        25,
    ),
    Mutant(
        "rtl: a strip hands over one group early",
        partial(_rtl, "pim.asic", "VectorUnit._issue", "group == rows - 1", "group == max(rows - 2, 0)"),
        _TWO_LANES,
    ),
    Mutant(
        "rtl: inactive elements enter the joins",
        partial(
            _rtl, "pim.asic", "VectorUnit.elaborate", "i < done.count for i in lanes", "1 for i in lanes"
        ),
        _TWO_LANES,
    ),
    Mutant(
        "rtl: the last of equals is the best",
        partial(
            _rtl,
            "pim.asic",
            "VectorUnit.elaborate",
            "best.found & compare.lt",
            "best.found & (compare.lt | compare.eq)",
        ),
        _ONE_BANK,
    ),
    Mutant(
        "model: strips one group longer",
        partial(told, sim, lambda p: p._replace(register_rows=p.register_rows + 1)),
        _TWO_LANES,
    ),
    Mutant(
        "model: a step's result one cycle late",
        partial(told, sim, lambda p: p._replace(step_latency=p.step_latency + 1)),
        _TWO_LANES,
    ),
    Mutant(
        "model: nothing executes alongside",
        partial(told, sim, lambda p: p._replace(overlap=0)),
        _TWO_LANES,
    ),
    Mutant(
        "interpreter: softmax keeps its numerators unrounded",
        lambda: replaced(vectors, "softmax", _unrounded),
        _TWO_LANES,
        25,
    ),
    Mutant(
        "model: refresh interval one tick longer",
        partial(told, sim, lambda p: p._replace(n_refi=p.n_refi + 1)),
    ),
    Mutant(
        "model: the drain is one tick long",
        partial(told, sim, lambda p: p._replace(drain=constant(p.drain + 1))),
    ),
    Mutant(
        "model: banks open in the order of their numbers",
        partial(told, sim, lambda p: p._replace(stagger_order=constant(np.arange(p.n_banks)))),
    ),
    Mutant(
        "model: refresh phase drifts",
        partial(edited, sim, "_refresh", "v[_DUE] += p.n_refi", "v[_DUE] = v[_TIME] + p.n_refi"),
        programs=4,
    ),
    Mutant(
        "model: a row that the run leaves open counts a tick too many",
        partial(edited, sim, "_finish", "max(end - 1 - v[_SINCE], 0)", "max(end - v[_SINCE], 0)"),
        _ONE_BANK,
        4,
    ),
    Mutant(
        "interpreter: sums by halves, not by neighbours",
        lambda: replaced(meaning, "column_sums", _halves),
        programs=25,
    ),
)
