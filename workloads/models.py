"""Transformer shapes, read from Hugging Face `config.json` files without any library of theirs.

A key that is absent or null follows the *family's* own formula (an FFN of 4 d, as many KV heads as heads,
a head of d/heads); a shape key that has no formula must be there. What a library would fill in from its
class defaults is never used: those belong to one checkpoint of the family, not to the file at hand.
"""

import difflib
import json
import re
from collections.abc import Callable
from copy import copy
from dataclasses import dataclass, replace
from decimal import Decimal
from pathlib import Path
from typing import Any

from tilewright.arch.errors import UserError, nearest

CONFIGS = Path(__file__).parent / "configs"

ACTIVATIONS = {
    "gelu": "gelu",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
    "relu2": "relu2",
    "silu": "silu",
    "swish": "silu",
}
"""Names in config files -> ours. `gelu` is the exact erf form, `gelu_tanh` its tanh approximation (Hendrycks
and Gimpel 2016), `relu2` the squared ReLU (So et al. 2021)."""


@dataclass(frozen=True)
class Composition:
    """What stands beside the expert that a ModelConfig describes: equal experts, and what chooses one for a prompt.

    Each prompt is read by the router and then by one expert alone, a model of its own (Prabhakar et al. 2024,
    arXiv 2405.07518): no mixture of experts, where layers choose token by token.
    """

    router: "ModelConfig"
    experts: int


@dataclass(frozen=True, kw_only=True)
class Vision:
    """What makes tokens of a decoder's prompt of an image (Liu et al. 2024, arXiv 2310.03744): a vision transformer
    (Dosovitskiy et al. 2021, arXiv 2010.11929) over the image's patches, and a projector of two layers.

    Patches are projected to columns of the tower; the position's vector is added, to a class token's, too; a norm and
    the tower's layers follow. What they give for the patches goes through the projector.
    """

    tower: "ModelConfig"
    """Its layers are those whose result is used; its positions are the patches and a class token."""
    image: int
    """Pixels of a side."""
    patch: int
    channels: int
    columns: int
    """Of the projector's result, and between its layers."""
    activation: str
    """Between the projector's layers."""

    @property
    def tokens(self) -> int:
        """Tokens of a prompt that an image gives: its patches."""
        return (self.image // self.patch) ** 2

    @property
    def patch_elements(self) -> int:
        return self.patch**2 * self.channels

    @property
    def parameters(self) -> int:
        """Those of the projection, the class token, the positions, a norm, the layers that are used, and the projector."""
        t = self.tower
        embedding = (self.patch_elements + 1 + self.tokens + 1) * t.d_model
        rest = t.parameters["attention"] + t.parameters["mlp"] + t.parameters["norms"]
        return embedding + rest + (t.d_model + 1) * self.columns + (self.columns + 1) * self.columns


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """The shape of one transformer: a decoder, or an encoder if not `causal`.

    Widths count elements. A matrix applied to x is (in, out) = (k, n) everywhere. Of a composition, it is the shape
    of one of its experts.
    """

    name: str
    family: str
    """The file's model_type."""
    layers: int
    d_model: int
    heads: int
    kv_heads: int
    head_dim: int
    d_ff: int
    """FFN width of a dense layer."""
    vocab: int
    positions: int | None
    """Longest sequence that the position embedding allows; None: no limit (ALiBi, or rotary without one)."""
    activation: str
    """gelu | gelu_tanh | relu | relu2 | silu; of a vision tower also quick_gelu, x * sigmoid(1.702 x)"""
    gated_mlp: bool
    norm: str
    """layernorm (gain and bias) | rmsnorm (gain)"""
    norm_eps: str
    """As written in the file, so that a kernel can round it once, in its own format."""
    position: str
    """learned | rotary | alibi"""
    tie_embeddings: bool
    qkv_bias: bool
    attention_out_bias: bool
    mlp_bias: bool
    d_embed: int
    """Width of the token embedding; where it is not d_model, projections join the two."""
    source: str
    rope_theta: str | None = None
    position_rows: int = 0
    """Rows of the learned position table (OPT keeps two more than it has positions)."""
    token_types: int = 0
    """Rows of a segment table (BERT)."""
    post_norm: bool = False
    """The norm follows the residual addition (BERT, OPT-350M) instead of opening the branch."""
    embedding_norm: bool = False
    final_norm: bool = True
    parallel_attention: bool = False
    """Attention and FFN read the same input and are added together (Falcon)."""
    parallel_norms: int = 2
    """Norms of a parallel layer: 2, one for each branch, or 1 shared by both."""
    experts: int = 0
    experts_per_token: int = 0
    d_expert: int = 0
    d_shared_expert: int = 0
    """Width of an expert that sees every token behind a sigmoid gate (Qwen2-MoE); 0: none."""
    dense_layers: tuple[int, ...] = ()
    """Layers of a mixture-of-experts model that keep a dense FFN."""
    sliding_window: int | None = None
    windowed_layers: tuple[int, ...] = ()
    qk_norm: bool = False
    """An RMSNorm over each head of Q and K."""
    sub_norms: bool = False
    """BitNet's norms before the attention output and the FFN down projections."""
    weight_groups: int = 1
    """Of sparse weights: each output of a layer's product reads one in so many of its inputs, those of its group.

    Input c belongs to group c mod `weight_groups`. So do outputs that are heads or the MLP's inner columns; those
    of the residual stream do side by side, in equal ranges, so that groups mix from one product to the next.
    """
    causal: bool = True
    pooler: bool = False
    """A dense layer over the first token (BERT), counted as parameters and no part of the operator graph."""
    composition: Composition | None = None
    vision: Vision | None = None
    """What images of a prompt go through; no part of `parameters` and of the operator graph."""

    @property
    def q_dim(self) -> int:
        return self.heads * self.head_dim

    @property
    def kv_dim(self) -> int:
        return self.kv_heads * self.head_dim

    @property
    def kv_elements_per_token(self) -> int:
        """Elements that one token adds to the KV cache, over all layers."""
        return 2 * self.layers * self.kv_dim

    def is_moe(self, layer: int) -> bool:
        return self.experts > 0 and layer not in self.dense_layers

    def window(self, layer: int) -> int | None:
        """Keys that a token of this layer may attend to, itself included; None: all."""
        return self.sliding_window if layer in self.windowed_layers else None

    def norm_parameters(self, width: int) -> int:
        return 2 * width if self.norm == "layernorm" else width

    @property
    def parameters(self) -> dict[str, int]:
        """Parameter counts by formula: disjoint parts of the whole model, and their "total".

        "lm_head" is 0 where it shares the embedding; biases belong to the part that adds them. A composition has
        those of all its experts and of its router.
        """
        if self.composition is not None:
            expert = replace(self, composition=None).parameters
            router = self.composition.router.parameters
            return {part: self.composition.experts * n + router[part] for part, n in expert.items()}
        d, q, kv = self.d_model, self.q_dim, self.kv_dim
        sparse = self.weight_groups
        attention = (d * (q + 2 * kv) + q * d) // sparse
        attention += self.qkv_bias * (q + 2 * kv) + self.attention_out_bias * d
        up = 2 if self.gated_mlp else 1

        def ffn(width: int) -> int:
            return (up + 1) * d * width // sparse + self.mlp_bias * (up * width + d)

        moe = self.experts * (d + ffn(self.d_expert))
        if self.d_shared_expert:
            moe += ffn(self.d_shared_expert) + d
        moe_layers = self.layers - len(self.dense_layers) if self.experts else 0
        norms = 1 if self.parallel_attention and self.parallel_norms == 1 else 2
        layer_norms = norms * self.norm_parameters(d)
        layer_norms += self.qk_norm * 2 * self.head_dim
        layer_norms += self.sub_norms * (self.norm_parameters(q) + self.norm_parameters(self.d_ff))
        parts = {
            "embedding": self.vocab * self.d_embed,
            "positions": (self.position_rows + self.token_types) * d,
            "embedding_projections": 2 * d * self.d_embed if self.d_embed != d else 0,
            "attention": self.layers * attention,
            "mlp": (self.layers - moe_layers) * ffn(self.d_ff) + moe_layers * moe,
            "norms": self.layers * layer_norms
            + (self.embedding_norm + self.final_norm) * self.norm_parameters(d),
            "pooler": self.pooler * (d * d + d),
            "lm_head": self.vocab * self.d_embed if self.causal and not self.tie_embeddings else 0,
        }
        return parts | {"total": sum(parts.values())}


class _Float(str):
    """A JSON number with a fraction or an exponent, kept as its text."""

    __slots__ = ()

    def __repr__(self) -> str:
        return str(self)


class _Config:
    """One file's keys, fetched with their checks. `None` in the file counts as absent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            self.text = path.read_text(encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError:
            raise UserError(f"{path}: is not UTF-8 text") from None
        try:
            data = json.loads(self.text, parse_float=_Float, parse_constant=_Float)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}:{error.lineno}: is not valid JSON: {error.msg}") from None
        except (ValueError, RecursionError) as error:  # integers of thousands of digits, endless nesting
            raise UserError(f"{path}: is not valid JSON: {error}") from None
        if not isinstance(data, dict):
            raise UserError(f"{path}: must hold a JSON object, not {_json_type(data)}")
        self.data: dict[str, Any] = data
        self.family = "unknown"
        self.family = self.name("model_type", (*_FAMILIES, COMPOSITION))

    def fail(self, key: str, problem: str) -> UserError:
        match = re.search(rf'"{re.escape(key)}"\s*:', self.text)
        where = f"{self.path}:{self.text.count(chr(10), 0, match.start()) + 1}" if match else str(self.path)
        return UserError(f"{where}: {key} {problem}")

    def find(self, keys: tuple[str, ...]) -> tuple[str, Any]:
        """The first key that has a value; aliases that disagree are refused."""
        present = [(key, self.data[key]) for key in keys if self.data.get(key) is not None]
        for key, value in present[1:]:
            if value != present[0][1]:
                raise self.fail(key, f"{value!r} contradicts {present[0][0]} {present[0][1]!r}")
        return present[0] if present else (keys[0], None)

    def missing(self, key: str) -> UserError:
        close = difflib.get_close_matches(key, self.data, n=1, cutoff=0.8)
        hint = f"; did you mean {key} by {close[0]}?" if close and close[0] != key else ""
        state = "is null" if key in self.data else "is missing"
        return self.fail(key, f"{state}: a {self.family} model needs it{hint}")

    def whole(self, *keys: str) -> int:
        """A required whole number of at least 1."""
        key, value = self.find(keys)
        if value is None:
            raise self.missing(key)
        if not isinstance(value, int) or isinstance(value, bool) or value < 1:
            raise self.fail(key, f"must be a whole number of at least 1, not {value!r}")
        return value

    def whole_or(self, default: int, *keys: str) -> int:
        return default if self.find(keys)[1] is None else self.whole(*keys)

    def flag(self, key: str, default: bool | None = None) -> bool:
        """true or false; required if there is no default."""
        value = self.find((key,))[1]
        if value is None:
            if default is None:
                raise self.missing(key)
            return default
        if not isinstance(value, bool):
            raise self.fail(key, f"must be true or false, not {value!r}")
        return value

    def only(self, key: str, allowed: Any) -> None:
        """Refuse a variant of the family that this reader does not model."""
        value = self.find((key,))[1]
        if value is not None and value != allowed:
            raise self.fail(
                key, f"must be {json.dumps(allowed)}, not {value!r}: no other variant is modelled"
            )

    def name(self, key: str, allowed: Any, default: str | None = None) -> str:
        value = self.find((key,))[1]
        if value is None:
            if default is None:
                raise self.fail(key, f"is missing; {nearest('', allowed)}")
            return default
        if not isinstance(value, str) or isinstance(value, _Float):
            raise self.fail(key, f"must be a name, not {value!r}; {nearest('', allowed)}")
        if value not in allowed:
            raise self.fail(key, f"{value!r} is unknown; {nearest(value, allowed)}")
        return value

    def activation(self, key: str, default: str) -> str:
        return ACTIVATIONS[self.name(key, ACTIVATIONS, default)]

    def part(self, key: str) -> "_Config":
        """A required object, as a file of its own family."""
        value = self.find((key,))[1]
        if value is None:
            raise self.missing(key)
        if not isinstance(value, dict):
            raise self.fail(key, f"must be an object, not {_json_type(value)}")
        out = copy(self)
        out.data = value
        return out

    def number(self, key: str, default: str | None = None) -> str:
        """The text of a positive number."""
        value = self.find((key,))[1]
        if value is None:
            if default is None:
                raise self.missing(key)
            return default
        if isinstance(value, bool) or not isinstance(value, int | _Float):
            raise self.fail(key, f"must be a positive number, not {value!r}")
        exact = Decimal(value)
        if not exact.is_finite() or exact <= 0:
            raise self.fail(key, f"must be a positive number, not {value!r}")
        return str(value)

    def indices(self, key: str, below: int) -> list[int]:
        """A list of layer numbers; absent: none."""
        value = self.find((key,))[1]
        if value is None:
            return []
        if not isinstance(value, list):
            raise self.fail(key, f"must be a list of layer numbers, not {value!r}")
        for item in value:
            if not isinstance(item, int) or isinstance(item, bool) or not 0 <= item < below:
                raise self.fail(key, f"must list layer numbers from 0 to {below - 1}, not {item!r}")
        return value

    def heads(
        self, d_key: tuple[str, ...], head_keys: tuple[str, ...], kv_heads: int | None
    ) -> dict[str, int]:
        """d_model, heads, kv_heads and head_dim, which must fit each other."""
        d, heads = self.whole(*d_key), self.whole(*head_keys)
        kv = heads if kv_heads is None else kv_heads
        if heads % kv:
            raise UserError(
                f"{self.path}: {heads} heads cannot share {kv} KV heads evenly; allowed: a divisor"
            )
        if d % heads and self.data.get("head_dim") is None:
            raise self.fail(
                self.find(head_keys)[0], f"{heads} does not divide {d_key[0]} {d}: head_dim must be given"
            )
        return {
            "d_model": d,
            "heads": heads,
            "kv_heads": kv,
            "head_dim": self.whole_or(d // heads, "head_dim"),
        }

    def rope_theta(self) -> str:
        """The rotary base: 10000 unless the file says otherwise (Su et al. 2021)."""
        nested = self.data.get("rope_parameters")
        if nested is None:
            return self.number("rope_theta", "10000.0")
        if not isinstance(nested, dict) or nested.get("rope_theta") is None:
            raise self.fail("rope_parameters", "must be an object with rope_theta")
        self.data = self.data | {"rope_theta": nested["rope_theta"]}
        return self.number("rope_theta")

    def windowed(self, layers: int, first: int = 0) -> tuple[int, ...]:
        """The layers that the sliding window applies to, by `layer_types` or from layer `first` on."""
        types = self.data.get("layer_types")
        if types is None:
            return tuple(range(first, layers))
        if not isinstance(types, list) or len(types) != layers:
            raise self.fail("layer_types", f"must be a list of {layers} names, one per layer")
        for item in types:
            if item not in ("full_attention", "sliding_attention"):
                raise self.fail(
                    "layer_types", f"{item!r} is unknown; allowed: full_attention, sliding_attention"
                )
        return tuple(i for i, item in enumerate(types) if item == "sliding_attention")


def _json_type(value: Any) -> str:
    names = {list: "a list", str: "a string", bool: "true or false", int: "a number", _Float: "a number"}
    return names.get(type(value), "null")


def _gpt2(c: _Config) -> dict[str, Any]:
    c.only("add_cross_attention", False)
    shape = c.heads(("n_embd", "hidden_size"), ("n_head", "num_attention_heads"), None)
    positions = c.whole("n_positions", "max_position_embeddings")
    return shape | {
        "layers": c.whole("n_layer", "num_hidden_layers"),
        "d_ff": c.whole_or(4 * shape["d_model"], "n_inner"),
        "positions": positions,
        "position_rows": positions,
        "activation": c.activation("activation_function", "gelu_new"),
        "gated_mlp": False,
        "norm": "layernorm",
        "norm_eps": c.number("layer_norm_epsilon"),
        "position": "learned",
        "tie_embeddings": c.flag("tie_word_embeddings", True),
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
    }


def _opt(c: _Config) -> dict[str, Any]:
    c.only("layer_norm_elementwise_affine", True)
    shape = c.heads(("hidden_size",), ("num_attention_heads",), None)
    positions = c.whole("max_position_embeddings")
    bias = c.flag("enable_bias", True)
    post_norm = not c.flag("do_layer_norm_before", True)
    return shape | {
        "layers": c.whole("num_hidden_layers"),
        "d_ff": c.whole("ffn_dim"),
        "d_embed": c.whole_or(shape["d_model"], "word_embed_proj_dim"),
        "positions": positions,
        "position_rows": positions + 2,  # rows 0 and 1 stand for padding
        "activation": c.activation("activation_function", "relu"),
        "gated_mlp": False,
        "norm": "layernorm",
        "norm_eps": "1e-05",  # fixed in the family, no key
        "position": "learned",
        "tie_embeddings": c.flag("tie_word_embeddings", True),
        "qkv_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": bias,
        "post_norm": post_norm,
        "final_norm": not post_norm and not c.flag("_remove_final_layer_norm", False),
    }


def _llama(c: _Config, *, tied: bool | None = False) -> dict[str, Any]:
    """Llama, and the trunk of all that descend from it. `tied` None: the file must say."""
    heads = c.whole("num_attention_heads")
    shape = c.heads(("hidden_size",), ("num_attention_heads",), c.whole_or(heads, "num_key_value_heads"))
    attention_bias = c.flag("attention_bias", False)
    limit = c.data.get("max_position_embeddings")
    return shape | {
        "layers": c.whole("num_hidden_layers"),
        "d_ff": c.whole("intermediate_size"),
        "positions": None if limit is None else c.whole("max_position_embeddings"),
        "activation": c.activation("hidden_act", "silu"),
        "gated_mlp": True,
        "norm": "rmsnorm",
        "norm_eps": c.number("rms_norm_eps"),
        "position": "rotary",
        "rope_theta": c.rope_theta(),
        "tie_embeddings": c.flag("tie_word_embeddings", tied),
        "qkv_bias": attention_bias,
        "attention_out_bias": attention_bias,
        "mlp_bias": c.flag("mlp_bias", False),
    }


def _clip(c: _Config, layers: int) -> ModelConfig:
    """The vision transformer of CLIP (Radford et al. 2021, arXiv 2103.00020), up to its layer `layers`."""
    shape: dict[str, Any] = {**c.heads(("hidden_size",), ("num_attention_heads",), None)}
    side = c.whole("image_size") // c.whole("patch_size")
    return ModelConfig(
        name="vision tower", family=VISION, source=str(c.path), **shape, layers=layers, d_embed=shape["d_model"],
        d_ff=c.whole("intermediate_size"), vocab=0, positions=side**2 + 1, position_rows=side**2 + 1,
        activation={**ACTIVATIONS, "quick_gelu": "quick_gelu"}[
            c.name("hidden_act", (*ACTIVATIONS, "quick_gelu"))
        ],
        gated_mlp=False, norm="layernorm", norm_eps=c.number("layer_norm_eps"), position="learned",
        tie_embeddings=True, qkv_bias=True, attention_out_bias=True, mlp_bias=True, embedding_norm=True,
        final_norm=False, causal=False,
    )  # fmt: skip


def _llava(c: _Config) -> dict[str, Any]:
    """A Llama with images: its config.json names a vision tower, whose own config.json stands under `vision_config`."""
    shape = _llama(c)
    c.only("mm_projector_type", "mlp2x_gelu")
    c.only("mm_vision_select_feature", "patch")
    tower = c.part("vision_config")
    tower.name("model_type", (VISION,))
    layers = tower.whole("num_hidden_layers")
    select = c.find(("mm_vision_select_layer",))[1]
    if type(select) is not int or not -layers <= select <= -1:
        raise c.fail("mm_vision_select_layer", f"must be in {-layers}..-1, not {select!r}")
    image, patch = tower.whole("image_size"), tower.whole("patch_size")
    if image % patch:
        raise tower.fail("image_size", f"{image} must be a multiple of patch_size {patch}")
    return shape | {
        "vision": Vision(
            tower=_clip(tower, layers + 1 + select), image=image, patch=patch, columns=shape["d_model"],
            channels=tower.whole_or(3, "num_channels"), activation="gelu",
        )
    }  # fmt: skip


def _mistral(c: _Config) -> dict[str, Any]:
    shape = _llama(c)
    if c.data.get("sliding_window") is not None:
        shape["sliding_window"] = c.whole("sliding_window")
        shape["windowed_layers"] = c.windowed(shape["layers"])
    return shape


def _mixtral(c: _Config) -> dict[str, Any]:
    shape = _mistral(c)
    return shape | {
        "experts": c.whole("num_local_experts"),
        "experts_per_token": c.whole("num_experts_per_tok"),
        "d_expert": shape["d_ff"],
    }


def _qwen2(c: _Config) -> dict[str, Any]:
    shape = _llama(c) | {"qkv_bias": c.flag("qkv_bias", True)}
    if c.flag("use_sliding_window", False):
        shape["sliding_window"] = c.whole("sliding_window")
        # Layers below max_window_layers keep full attention.
        first = 0 if c.data.get("layer_types") is not None else c.whole("max_window_layers")
        shape["windowed_layers"] = c.windowed(shape["layers"], first)
    return shape


def _qwen3(c: _Config) -> dict[str, Any]:
    return _qwen2(c) | {"qkv_bias": c.flag("attention_bias", False), "qk_norm": True}


def _qwen_experts(c: _Config, shape: dict[str, Any]) -> dict[str, Any]:
    step, dense = c.whole_or(1, "decoder_sparse_step"), c.indices("mlp_only_layers", shape["layers"])
    return shape | {
        "experts": c.whole("num_experts", "num_local_experts"),
        "experts_per_token": c.whole("num_experts_per_tok"),
        "d_expert": c.whole("moe_intermediate_size"),
        "dense_layers": tuple(i for i in range(shape["layers"]) if i in dense or (i + 1) % step),
    }


def _qwen2_moe(c: _Config) -> dict[str, Any]:
    shape = _qwen_experts(c, _qwen2(c))
    return shape | {"d_shared_expert": c.whole("shared_expert_intermediate_size")}


def _qwen3_moe(c: _Config) -> dict[str, Any]:
    return _qwen_experts(c, _qwen3(c))


def _bitnet(c: _Config) -> dict[str, Any]:
    # Published BitNets are tied, the library's class is not: the file must say.
    return _llama(c, tied=None) | {"activation": c.activation("hidden_act", "relu2"), "sub_norms": True}


def _falcon(c: _Config) -> dict[str, Any]:
    heads = c.whole("num_attention_heads", "n_head")
    new = c.flag("new_decoder_architecture", False)
    if new:
        kv = c.whole_or(heads, "num_kv_heads", "n_head_kv")
    else:
        kv = 1 if c.flag("multi_query") else heads
    shape = c.heads(("hidden_size", "n_embed"), ("num_attention_heads", "n_head"), kv)
    alibi, bias = c.flag("alibi", False), c.flag("bias", False)
    norms = c.whole_or(2 if new else 1, "num_ln_in_parallel_attn") if new else 1
    if norms > 2:
        raise c.fail("num_ln_in_parallel_attn", f"must be 1 or 2, not {norms}")
    limit = c.data.get("max_position_embeddings")
    return shape | {
        "layers": c.whole("num_hidden_layers", "n_layer"),
        "d_ff": c.whole_or(4 * shape["d_model"], "ffn_hidden_size"),
        "positions": None if alibi or limit is None else c.whole("max_position_embeddings"),
        "activation": c.activation("activation", "gelu"),
        "gated_mlp": False,
        "norm": "layernorm",
        "norm_eps": c.number("layer_norm_epsilon"),
        "position": "alibi" if alibi else "rotary",
        "rope_theta": None if alibi else c.rope_theta(),
        "tie_embeddings": c.flag("tie_word_embeddings", True),
        "qkv_bias": bias,
        "attention_out_bias": bias,
        "mlp_bias": bias,
        "parallel_attention": new or c.flag("parallel_attn"),
        "parallel_norms": norms,
    }


def _bloom(c: _Config) -> dict[str, Any]:
    c.only("apply_residual_connection_post_layernorm", False)
    shape = c.heads(("hidden_size", "n_embed"), ("n_head", "num_attention_heads"), None)
    return shape | {
        "layers": c.whole("n_layer", "num_hidden_layers"),
        "d_ff": 4 * shape["d_model"],
        "positions": None,
        "activation": "gelu_tanh",
        "gated_mlp": False,
        "norm": "layernorm",
        "norm_eps": c.number("layer_norm_epsilon"),
        "position": "alibi",
        "tie_embeddings": c.flag("tie_word_embeddings", True),
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "embedding_norm": True,
    }


def _bert(c: _Config) -> dict[str, Any]:
    c.only("is_decoder", False)
    c.only("position_embedding_type", "absolute")
    shape = c.heads(("hidden_size",), ("num_attention_heads",), None)
    positions = c.whole("max_position_embeddings")
    return shape | {
        "layers": c.whole("num_hidden_layers"),
        "d_ff": c.whole("intermediate_size"),
        "positions": positions,
        "position_rows": positions,
        "token_types": c.whole("type_vocab_size"),
        "activation": c.activation("hidden_act", "gelu"),
        "gated_mlp": False,
        "norm": "layernorm",
        "norm_eps": c.number("layer_norm_eps"),
        "position": "learned",
        "tie_embeddings": True,
        "qkv_bias": True,
        "attention_out_bias": True,
        "mlp_bias": True,
        "post_norm": True,
        "embedding_norm": True,
        "final_norm": False,
        "causal": False,
        "pooler": True,
    }


_FAMILIES: dict[str, Callable[[_Config], dict[str, Any]]] = {
    "bert": _bert,
    "bitnet": _bitnet,
    "bloom": _bloom,
    "falcon": _falcon,
    "gpt2": _gpt2,
    "llama": _llama,
    "llava": _llava,
    "mistral": _mistral,
    "mixtral": _mixtral,
    "opt": _opt,
    "qwen2": _qwen2,
    "qwen2_moe": _qwen2_moe,
    "qwen3": _qwen3,
    "qwen3_moe": _qwen3_moe,
}


VISION = "clip_vision_model"
COMPOSITION = "composition"
"""The `model_type`, ours, of a file that names built-in models: `expert`, of which there are `experts`, and `router`."""


def _composition(c: _Config, name: str, source: str) -> ModelConfig:
    def part(key: str) -> ModelConfig:
        model = load_model(c.name(key, builtin_models()))
        if model.composition is not None or not model.causal:
            kind = "an encoder" if model.composition is None else "a composition itself"
            raise c.fail(key, f"{model.name!r} is {kind}; allowed: a decoder")
        return model

    composition = Composition(part("router"), c.whole("experts"))
    return replace(part("expert"), name=name, source=source, composition=composition)


def builtin_models() -> list[str]:
    """Names that `load_model` knows without a file, sorted."""
    return sorted(path.name.removesuffix(".json") for path in CONFIGS.glob("*.json"))


def load_model(name_or_path: str | Path) -> ModelConfig:
    """The model of a built-in name, of a `config.json`, or of the folder that holds one.

    Anything that contains "/", ends in ".json" or exists is a path; but a built-in name stays one
    whatever lies in the current folder ("./gpt2-xl" is that folder). `rope_scaling` and `quantization_config`
    change values and not shapes, and are not read. Beside the published keys a file may give `head_dim` in
    any family, `weight_groups`, `_source` and `_note`. A file of `model_type` composition holds no shape: it names built-in models.

    Raises UserError for an unknown name or model_type, an unreadable file, invalid JSON, a missing shape key,
    or a value that is not allowed; the message names the file, the line and the key.
    """
    given = str(name_or_path)
    path = Path(name_or_path)
    is_path = isinstance(name_or_path, Path) or "/" in given or given.endswith(".json")
    if not is_path and given in (names := builtin_models()):
        path, name = CONFIGS / f"{given}.json", given
    elif is_path or (given and path.exists()):
        path = path / "config.json" if path.is_dir() else path
        name = path.absolute().parent.name if path.name == "config.json" else path.stem
    else:
        raise UserError(f"model {given!r} is unknown; {nearest(given, names)}; or give a config.json")
    config = _Config(path)
    source = str(config.data.get("_source", str(path)))
    if config.family == COMPOSITION:
        return _composition(config, name, source)
    shape = {"d_embed": 0, "vocab": config.whole("vocab_size")} | _FAMILIES[config.family](config)
    shape["d_embed"] = shape["d_embed"] or shape["d_model"]
    if shape["position"] == "rotary" and shape["head_dim"] % 2:
        raise UserError(f"{path}: head_dim must be even for rotary positions, not {shape['head_dim']}")
    experts, used = shape.get("experts", 0), shape.get("experts_per_token", 0)
    if used > experts:
        raise config.fail("num_experts_per_tok", f"must be at most the {experts} experts, not {used}")
    groups = config.whole_or(1, "weight_groups")
    if groups > 1 and experts:
        raise config.fail("weight_groups", "must be 1 in a mixture of experts, whose weights are dense here")
    heads = shape["heads"], shape["kv_heads"]
    for width in (shape["d_model"], *(n * shape["head_dim"] for n in heads), shape["d_ff"]):
        if width % groups:
            raise config.fail(
                "weight_groups", f"must divide the layer's widths: {width} is no multiple of {groups}"
            )
    return ModelConfig(name=name, family=config.family, source=source, weight_groups=groups, **shape)
