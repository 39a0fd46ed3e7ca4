"""Maps decoders onto PIM-GPT: one program segment for each token, weights and KV cache laid out in the banks.

Layout, with C channels, B banks, L lanes and B / L = `bursts` columns for one output of all banks:

- Matrix: output n is computed in out o, channel c, bank b with n = (o*C + c)*B + b. The input is cut into
  segments that fit the global buffer; a segment's columns of consecutive outs follow one another in every
  bank, over row ends.
- Head vectors are padded with zeros to whole outputs of all banks, ceil(head_dim / B) * B elements.
- Vector (bias, gain, position, embedding row): columns striped over the channels in one bank.
- KV head g lives in channel g mod C, slot g // C. Keys row-major: token t in bank t mod B, columns t // B *
  head columns. Values column-major: element i in bank i mod B, group i // B; token t in lane t mod L of
  column t // L.

Padding is sound as long as the KV cache is zero where nothing was written: the scores of tokens that are not
there yet are then q * 0 = 0 in a whole column, the softmax leaves them alone, and 0 * 0 adds nothing to the
values.

- Rotary embedding: rows 2i and 2i + 1 of a head of Q or K are the model's rows i and i + head_dim / 2, which
  turn together.

With `asic.overlap` the outputs of a matrix come tile by tile, so that the ASIC works on one while the channels
compute the next, and the softmax of one group of heads goes with scores and values of its neighbours; see
`overlap.py`. Values are the same bit for bit.

Mapping after Wu, Wang, Lu, "PIM-GPT", npj Unconventional Computing 2024: concatenated heads, weights
packed for row hits, keys row-major and values column-major.
"""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program
from tilewright.arch.pim import ISA, PimSpec
from tilewright.arch.scenario import Mapped, Scenario, TagInfo
from tilewright.mappers.pim.layout import ACTIVATIONS, Layout
from tilewright.mappers.pim.steps import Steps
from tilewright.mappers.pim.weights import place_weights
from tilewright.workloads.models import ModelConfig

__all__ = ["Layout", "check_model", "map_model", "place_weights"]


def check_model(model: ModelConfig, tokens: int) -> None:
    """Raises UserError, naming the feature, for a model that this mapper does not support."""
    binding = [w for w in map(model.window, range(model.layers)) if w is not None and w < tokens]
    unsupported = {
        "encoders": not model.causal,
        "mixtures of experts": model.experts > 0,
        "sparse weights": model.weight_groups > 1,
        "ALiBi positions": model.position == "alibi",
        "parallel attention and MLP": model.parallel_attention,
        "norms behind the residual addition": model.post_norm,
        "a norm of the embedding": model.embedding_norm,
        "norms of Q and K": model.qk_norm,
        "BitNet's sub-norms": model.sub_norms,
        "an embedding narrower than the model": model.d_embed != model.d_model,
        "a model without a final norm": not model.final_norm,
        f"a sliding window of {binding[0] if binding else 0} over {tokens} tokens": bool(binding),
        f"the activation {model.activation} (allowed: {', '.join(ACTIVATIONS)})": (
            model.activation not in ACTIVATIONS
        ),
    }
    for what, present in unsupported.items():
        if present:
            raise UserError(f"{model.name}: target pim does not support {what}")


def map_model(
    spec: PimSpec,
    model: ModelConfig,
    scenario: Scenario,
    mapping: Mapping[str, Any] | None = None,
    tokens: ArrayLike | None = None,
) -> Mapped:
    """The program of `scenario`: every token of prompt and generation is one step of one segment.

    A prompt runs token by token, and the LM head only behind its last one. The sequences of a batch follow
    one another within a step, each with its own KV cache. `tokens` are the token ids by step, [prompt +
    generate] or [batch, prompt + generate]; they are drawn at random if left out. `mapping` is a document as
    this function returns it, or parts of one, that overrides its choices.

    Raises UserError for a model that the target does not support or that does not fit, for more tokens than
    the model has positions, and for values of `mapping` or `tokens` that are not allowed; walking the
    segments does so where a size exceeds the field of an instruction.
    """
    steps = scenario.prompt + scenario.generate
    total = scenario.context + steps
    check_model(model, total)
    if model.positions is not None and total > model.positions:
        raise UserError(
            f"{model.name} has {model.positions} positions: context {scenario.context} + prompt "
            f"{scenario.prompt} + generate {scenario.generate} are {total - model.positions} too many"
        )
    layout = Layout(
        spec, model, tokens=total, batch=scenario.batch, lm_head=scenario.lm_head,
        embedding=scenario.embedding, mapping=mapping,
    )  # fmt: skip
    assumed = []
    if tokens is None:
        ids = np.random.default_rng(scenario.seed).integers(model.vocab, size=(scenario.batch, steps))
        if scenario.embedding:
            assumed.append(
                f"token ids: random, seed {scenario.seed}; they choose the bank that the "
                "embedding row is read from"
            )
    else:
        ids = _token_ids(tokens, model, scenario.batch, steps)
    segments = Steps(layout, scenario, ids)
    tags = [
        TagInfo(f"layer {op.layer} {op.name}" if op.layer >= 0 else op.name, op.name, op.layer)
        for op in segments.operators
    ]
    rows = f"{sum(layout.row_sizes.values())} of {layout.p.rows} rows in every bank"
    return Mapped(
        program=Program(ISA, segments, [tag.name.replace(" ", "_") for tag in tags]),
        tags=tags,
        steps=steps,
        document=layout.document,
        notes=(f"{rows}; KV cache for {layout.tokens} tokens x {layout.batch}",),
        assumed=assumed,
    )


def _token_ids(tokens: ArrayLike, model: ModelConfig, batch: int, steps: int) -> NDArray[np.int64]:
    ids = np.asarray(tokens)
    shapes = [(batch, steps)] + [(steps,)] * (batch == 1)
    if ids.dtype.kind not in "iu" or ids.shape not in shapes:
        raise UserError(
            f"tokens must be {batch} x {steps} whole numbers, not {ids.dtype} of shape {ids.shape}"
        )
    if ids.min() < 0 or ids.max() >= model.vocab:
        bad = ids[(ids < 0) | (ids >= model.vocab)].flat[0]
        raise UserError(f"tokens must be in 0..{model.vocab - 1}, not {bad}")
    return ids.reshape(batch, steps).astype(np.int64)
