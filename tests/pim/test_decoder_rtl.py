"""Complete decoders on the RTL: four generated tokens, each chosen by the argmax over the LM head before it."""

import dataclasses

import numpy as np
import pytest

from tests.pim.test_mapper import GPT, LLAMA, SETS, machine, random_weights
from tilewright.arch.isa import Program
from tilewright.arch.pim import N_CHANNEL_OPS, OPS
from tilewright.arch.scenario import Scenario
from tilewright.mappers.pim import map_model, place_weights
from tilewright.rtl.pim.run import Case, build_rtl, run_cases
from tilewright.sim.pim import simulate
from tilewright.workloads.pim import interpret

DEPTH = 1024
SIZES = {"layers": 2, "heads": 2, "vocab": 21}
GPT2 = dataclasses.replace(GPT, d_model=12, kv_heads=2, d_ff=20, d_embed=12, **SIZES)
LLAMA2 = dataclasses.replace(LLAMA, d_model=12, kv_heads=1, d_ff=20, d_embed=12, head_dim=6, **SIZES)
GENERATED = 4
FIRST = 3  # the token to begin with


def decode(spec, model):
    """The program of GENERATED steps, its image, and the tokens: step by step, each from the one before."""
    tokens = [FIRST]
    while True:
        mapped = map_model(spec, model, Scenario(generate=len(tokens)), tokens=tokens)
        image = place_weights(spec, model, mapped.document, random_weights(model, 1))
        after, _ = interpret(spec, mapped.program, image)
        if len(tokens) == GENERATED:
            return mapped, image, after, tokens
        tokens.append(int(after["argmax"][1]))


@pytest.mark.cosim
@pytest.mark.parametrize("model", [GPT2, LLAMA2], ids=lambda m: m.name)
def test_a_decoder_on_the_rtl(model):
    for overlap in ("false", "true"):
        # A clock of the ASIC that is no divisor of the tick's, and refreshes that come often.
        spec = machine(*SETS, f"asic.overlap={overlap}", "asic.clock_mhz=1500", "dram.timing.t_refi_ns=700")
        mapped, image, after, tokens = decode(spec, model)
        assert len(set(tokens)) > 1, "a decoder that repeats itself shows little"
        params = spec.params()
        build = build_rtl(spec, depth=DEPTH)
        [outcome] = run_cases(build, [Case(params, mapped.program, image)], depth=DEPTH)
        assert outcome.error is None
        for name, array in after.items():
            np.testing.assert_array_equal(outcome.image[name], array, err_msg=name)
        timeline = simulate(params, mapped.program)
        assert outcome.timeline.ticks == timeline.ticks
        assert outcome.timeline.totals() == timeline.totals()
        assert outcome.timeline.counter("ref") > GENERATED
        for unit in timeline.units:
            assert outcome.timeline.unit(unit) == timeline.unit(unit), unit
        # The model has a span for each step and tag, the RTL's log one for each tag.
        for span in outcome.timeline.spans:
            steps = timeline.spans[timeline.spans["tag"] == span["tag"]]
            assert (span["first"], span["end"]) == (steps["first"].min(), steps["end"].max())

        # Each step alone, from the image that the step before left, names the next token.
        segments = list(mapped.program.segments)
        state = image
        for step, segment in enumerate(segments):
            [outcome] = run_cases(
                build, [Case(params, Program(mapped.program.isa, [segment]), state)], depth=DEPTH
            )
            assert outcome.error is None
            state = {name: outcome.image[name] for name in image}
            if step + 1 < GENERATED:
                assert state["argmax"][1] == tokens[step + 1]
        used = {OPS[int(op)].name for op in mapped.program.flat()["op"]}
        assert used >= {"GEMV", "WR_EL", "SOFTMAX", "ARGMAX", "ADD"}
        assert len([op for op in OPS[N_CHANNEL_OPS:] if op.name in used]) >= 5
