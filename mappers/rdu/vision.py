"""Images of a prompt: sections before those of the prompt, whose last one writes the prompt's first rows.

The rows are an image's patches, and the class token behind them: nothing in the tower depends on their order, and what
the projector takes, the patches, is then a range of blocks. The class token's patch is all zeros; its vector
lies in the table of positions, as a row of it.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from tilewright.arch.errors import UserError
from tilewright.mappers.rdu.layer import Op, summed
from tilewright.workloads.models import ModelConfig, Vision

__all__ = ["KEYS", "PHASE", "PIXELS", "count", "embedding", "projector", "projector_model", "widths"]

KEYS = ("images",)
"""Of a mapping, beside those of any model."""
PHASE = "vision"
PIXELS = "pixels"
"""The patches of an image, as the host lays them down."""


def count(mapping: Mapping[str, Any], model: ModelConfig, prompt: int) -> int:
    """Images of each prompt: what the mapping says, or one where the prompt has room for it. Raises UserError."""
    if model.vision is None:
        return 0
    room = prompt // model.vision.tokens
    images = mapping.get("images", min(1, room))
    if type(images) is not int or not 0 <= images <= room:
        raise UserError(
            f"mapping: images must be in 0..{room}, not {images!r}: an image is {model.vision.tokens} tokens of the prompt"
        )
    return images


def embedding() -> list[Op]:
    """From the patches to the rows of the tower's first layer, `z`."""
    return [
        Op("patches", "product", (PIXELS,), ("patch",)),
        Op("position", "add", ("table", "patch"), ("s",)),
        Op("pre_norm", "norm", ("s",), ("z",)),
    ]


def projector(sockets: int = 1) -> list[Op]:
    """From the rows of the tower's last layer, `x`, to those of the prompt, `w`."""
    return [
        Op("up", "product", ("x",), ("up_out",)),
        Op("activation", "activation", ("up_out",), ("f",)),
        *summed(Op("down", "product", ("f",), ("w",)), sockets),
    ]


def projector_model(vision: Vision) -> ModelConfig:
    """The tower's shape with the projector's columns for those of its MLP."""
    return replace(vision.tower, d_ff=vision.columns, activation=vision.activation)


def widths(vision: Vision) -> dict[str, int]:
    """Columns of matrices that are not as wide as the tower."""
    return {PIXELS: vision.patch_elements, "w": vision.columns, "w_part": vision.columns}
