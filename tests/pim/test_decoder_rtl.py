"""A mapped decoder on the RTL: everything that its channels do, between what the ASIC does.

The RTL has no ASIC arithmetic yet, so the interpreter executes those instructions, and each run of channel
instructions between them is played on the RTL from the image that it meets there.
"""

import dataclasses

import numpy as np
import pytest

from tests.pim.test_mapper import GPT, SPEC, random_weights
from tilewright.arch.isa import Program, Segment
from tilewright.arch.pim import ISA, N_CHANNEL_OPS, OP
from tilewright.arch.scenario import Scenario
from tilewright.mappers.pim import map_model, place_weights
from tilewright.rtl.pim.run import Case, build_rtl, run_cases
from tilewright.sim.pim import simulate
from tilewright.workloads.pim import Machine

MODEL = dataclasses.replace(GPT, layers=1, d_model=12, heads=2, kv_heads=2, d_ff=20, vocab=21, d_embed=12)
TOKENS = (3, 17, 20, 3, 8)  # five tokens: keys of both channels in every bank, and in a second output


def runs(code):
    """The instructions cut where channels and ASIC take turns."""
    ours = code["op"] < N_CHANNEL_OPS
    cuts = np.flatnonzero(ours[1:] != ours[:-1]) + 1
    return np.split(code, cuts)


@pytest.mark.cosim
def test_the_channels_of_a_decoder():
    mapped = map_model(SPEC, MODEL, Scenario(generate=len(TOKENS)), tokens=TOKENS)
    machine = Machine(SPEC, place_weights(SPEC, MODEL, mapped.document, random_weights(MODEL, 1)))
    params = SPEC.params()
    cases, expected = [], []
    for segment in mapped.program.segments:
        for code in runs(segment.regions["code"]):
            program = Program(ISA, [Segment({"code": code})])
            before = {name: array.copy() for name, array in machine.image.items()}
            machine.run(program)
            if code["op"][0] < N_CHANNEL_OPS:
                cases.append(Case(params, program, before))
                expected.append({name: array.copy() for name, array in machine.image.items()})
    assert len(cases) > 10 * len(TOKENS)
    used = {int(op) for case in cases for op in case.program.segments[0].regions["code"]["op"]}
    assert used == {OP[name] for name in ("WR_GB", "GEMV", "RD_BK", "WR_BK", "WR_EL")}
    for case, image, outcome in zip(cases, expected, run_cases(build_rtl(SPEC), cases), strict=True):
        assert outcome.error is None
        for name, array in outcome.image.items():
            np.testing.assert_array_equal(array, image[name], err_msg=name)
        model = simulate(params, case.program)
        assert outcome.timeline.ticks == model.ticks
        assert outcome.timeline.totals().items() <= model.totals().items()
        for unit in outcome.timeline.units:
            assert outcome.timeline.unit(unit) == model.unit(unit)
