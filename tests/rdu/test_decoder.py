"""A tiny decoder layer on RTL: the next token, in three kernels on a small grid.

Its values are the reference's bit for bit, and its ticks the cycle model's, wherever units lie and however deep the
queues are. With TILEWRIGHT_LONG=1: a build of 36 positions takes some four minutes of processor time.
"""

import os
from dataclasses import replace

import numpy as np
import pytest

from tests.rdu import test_layer
from tests.rdu.test_fused import observe
from tilewright.arch import rdu
from tilewright.arch import spec as specs
from tilewright.rtl.rdu.run import Case, build_rtl, run_cases
from tilewright.verify import engine

MODEL = replace(test_layer.MODEL, d_model=8, heads=1, d_ff=8, d_embed=8)
TOKEN = {"context": 5, "keys": 8, "pitch": 16, "words": 256, "cuts": ("attention", "attention_add")}
DEPTHS = (2, 5)  # of the queues; each is RTL of its own
RECORDS = 1024  # that its memories of code and of records hold


def machine(depth):
    """36 positions: its kernels take 17 PCUs and 16 PMUs at most, one for all would take twice as many."""
    sizes = [
        *("grid.columns=6", "grid.rows=6", "agcu.per_side=6", "agcu.counters=5", "agcu.in_flight=8"),
        *("pcu.lanes=4", "pcu.stages=4", "pcu.systolic=true", "pcu.op_latency_cycles=2"),
        *("pcu.exp_terms=2", "pcu.reciprocal_iterations=1", "pcu.rsqrt_iterations=1"),
        *("pmu.banks=16", "pmu.bytes=2048", f"network.fifo_depth={depth}", "network.flows=16"),
        *("memory.hbm.bytes=8192", "memory.hbm.channels=4", "memory.hbm.gb_per_s=64"),
        *("memory.hbm.efficiency=1", "memory.hbm.latency_ns=9", "memory.ddr.bytes=4096"),
        *("memory.ddr.channels=16", "node.p2p_channels=16", "node.copy_lines=8"),
        *(f"launch.{name}_us=0" for name in ("program_load", "argument_load", "host_launch")),
    ]
    tree = specs.apply_sets(specs.load_tree("plasticine", ["rdu"]), sizes)
    return specs.build(rdu.RduSpec, tree, "tiny")


@pytest.mark.parametrize("seed", range(2))
def test_interpreted(seed):
    rows, keys = test_layer.token(MODEL, spec=machine(2), seed=seed, **TOKEN)
    assert np.array_equal(*rows)
    assert np.array_equal(*keys)


@pytest.mark.cosim
@pytest.mark.skipif(not os.environ.get("TILEWRIGHT_LONG"), reason="TILEWRIGHT_LONG=1: a build of minutes")
@pytest.mark.parametrize("depth", DEPTHS)
def test_rtl_agrees(depth):
    spec = machine(depth)
    build = build_rtl(spec, depth=RECORDS, waves=False)

    def execute(spec, program, image):
        observed = observe(spec, program, image)
        case = Case(spec.params(), observed.steps, observed.before)
        (outcome,) = run_cases(build, [case], depth=RECORDS)
        assert outcome.error is None
        assert engine.compare(observed, outcome) is None
        return outcome.image

    for seed in range(3):
        rows, keys = test_layer.token(MODEL, spec=spec, seed=seed, execute=execute, **TOKEN)
        assert np.array_equal(*rows)
        assert np.array_equal(*keys)
