"""Mapped programs, executed by the interpreter, against decoders written straight from the definition."""

import dataclasses
import itertools
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.arch.errors import UserError
from tilewright.arch.formats import BF16
from tilewright.arch.isa import Program, Segment
from tilewright.arch.pim import ISA, OP, OPS, PimSpec
from tilewright.arch.scenario import Scenario
from tilewright.arch.spec import apply_sets, build, load_tree
from tilewright.mappers.pim import map_model, place_weights
from tilewright.mappers.pim.overlap import Use, schedule, sram_use
from tilewright.mappers.pim.steps import TOKENS
from tilewright.sim.pim import simulate
from tilewright.workloads import asic
from tilewright.workloads.formats import from_bits, to_bits
from tilewright.workloads.graph import decode_step
from tilewright.workloads.models import ModelConfig, load_model
from tilewright.workloads.pim import Machine, blank_image, interpret

SETS = [
    "channels=2", "dram.bankgroups=2", "dram.banks_per_group=2", "dram.rows=1200", "dram.row_bytes=64",
    "dram.column_bytes=8", "pim.lanes=4", "pim.global_buffer_bytes=32", "asic.sram_bytes=1024",
    "asic.adders=4", "asic.multipliers=4",
]  # fmt: skip


def machine(*sets):
    """2 channels of 4 banks with 4 lanes; rows of 8 columns, 4 buffer columns (16 elements), 128 SRAM
    columns."""
    return build(PimSpec, apply_sets(load_tree("pim-gpt", ["pim"]), sets), "test")


SPEC = machine(*SETS)
WIDE = machine(*SETS, "dram.banks_per_group=4")  # 8 banks: two columns for an output of all banks
FEW_ROWS = machine(*SETS, "dram.rows=8")
FULL = machine()

GPT = ModelConfig(
    name="tiny-gpt", family="gpt2", layers=2, d_model=18, heads=3, kv_heads=3, head_dim=6, d_ff=37, vocab=53,
    positions=24, position_rows=24, activation="gelu_tanh", gated_mlp=False, norm="layernorm",
    norm_eps="1e-05", position="learned", tie_embeddings=True, qkv_bias=True, attention_out_bias=True,
    mlp_bias=True, d_embed=18, source="test",
)  # fmt: skip
OPT = dataclasses.replace(GPT, name="tiny-opt", activation="relu", position_rows=26, qkv_bias=False, d_ff=36)
LLAMA = ModelConfig(
    name="tiny-llama", family="llama", layers=2, d_model=24, heads=6, kv_heads=3, head_dim=10, d_ff=30,
    vocab=41, positions=None, activation="silu", gated_mlp=True, norm="rmsnorm", norm_eps="1e-05",
    position="rotary", rope_theta="10000.0", tie_embeddings=False, qkv_bias=False, attention_out_bias=False,
    mlp_bias=False, d_embed=24, source="test",
)  # fmt: skip


def rounded(x):
    """To bfloat16, as float32."""
    return from_bits(to_bits(x, BF16), BF16)


def random_weights(model, seed):
    """Arrays that bfloat16 holds exactly, such that activations stay near 1."""
    rng = np.random.default_rng(seed)
    d, q, kv, ff = model.d_model, model.q_dim, model.kv_dim, model.d_ff
    up = {"gate_up": (d, 2 * ff)} if model.gated_mlp else {"up": (d, ff)}
    matrices = {"qkv": (d, q + 2 * kv), "attention_out": (q, d), **up, "down": (ff, d)}
    out = {}
    for layer in range(model.layers):
        for name, shape in matrices.items():
            out[f"layer {layer} {name}"] = rng.normal(size=shape) / np.sqrt(shape[0])
            biased = {"qkv": model.qkv_bias, "attention_out": model.attention_out_bias}
            if biased.get(name, model.mlp_bias):
                out[f"layer {layer} {name}.bias"] = rng.normal(size=shape[1]) / 4
    norms = [f"layer {i} {n}_norm" for i in range(model.layers) for n in ("attention", "mlp")]
    for norm in [*norms, "final_norm"]:
        out[f"{norm}.gain"] = rng.uniform(0.5, 1.5, d)
        if model.norm == "layernorm":
            out[f"{norm}.bias"] = rng.normal(size=d) / 4
    out["embedding"] = rng.normal(size=(model.vocab, d))
    if model.position == "learned":
        out["positions"] = rng.normal(size=(model.position_rows, d)) / 2
    if not model.tie_embeddings:
        out["lm_head"] = rng.normal(size=(d, model.vocab)) / np.sqrt(d)
    return {name: rounded(w).astype(np.float64) for name, w in out.items()}


class Exact:
    """Arithmetic with the machine's rounding, in the order that the layout implies."""

    def __init__(self, spec):
        self.asic, self.lanes, self.wide = spec.asic, spec.pim.lanes, spec.params().vector_lanes
        self.segment = spec.pim.global_buffer_bytes // 2
        self.banks = spec.dram.bankgroups * spec.dram.banks_per_group

    def join(self, heads, w):
        """Head vectors side by side times w, each filled up to a multiple of the banks as in the layout."""
        pad = ((0, 0), (0, -heads.shape[1] % self.banks))
        rows = np.pad(w.reshape(*heads.shape, -1), (*pad, (0, 0)))
        return self.dot(np.pad(heads, pad).ravel(), rows.reshape(-1, w.shape[1]))

    def number(self, x):
        return rounded(x)

    def dot(self, x, w):
        """x [k], w [k, n]: columns of `lanes` products as a tree, columns in order, segments rounded and
        added."""
        out = None
        for start in range(0, len(x), self.segment):
            xs, ws = x[start : start + self.segment], w[start : start + self.segment]
            pad = -len(xs) % self.lanes
            p = np.pad(xs.astype(np.float32), (0, pad))[:, None] * np.pad(
                ws.astype(np.float32), ((0, pad), (0, 0))
            )
            p = p.reshape(-1, self.lanes, w.shape[1])
            while p.shape[1] > 1:
                p = p[:, 0::2] + p[:, 1::2]
            acc = np.zeros(w.shape[1], np.float32)
            for column in p[:, 0]:
                acc = acc + column
            out = rounded(acc) if out is None else rounded(out + rounded(acc))
        return out

    def add(self, a, b):
        return rounded(a.astype(np.float32) + b.astype(np.float32))

    def norm(self, model, x, gain, bias):
        gain, eps, share = gain.astype(np.float32), np.float32(model.norm_eps), np.float32(1 / len(x))
        unit = self.asic, self.wide
        if bias is None:
            return rounded(asic.rmsnorm(x, gain, eps, share, *unit))
        return rounded(asic.layernorm(x, gain, bias.astype(np.float32), eps, share, *unit))

    def activation(self, name, x):
        f = {
            "gelu_tanh": lambda v: asic.gelu(v, self.asic),
            "silu": lambda v: asic.silu(v, self.asic),
            "relu": asic.relu,
        }
        return rounded(f[name](x))

    def multiply(self, a, b):
        return rounded(a * b)

    def softmax(self, x, scale):
        return rounded(asic.softmax(x, np.float32(scale), self.asic, self.wide))

    def rope(self, x, cosine, sine):
        """Halves become pairs of neighbours: x0 x3 x1 x4 x2 x5."""
        pairs = x.reshape(2, -1).T.ravel()
        signed = np.stack([-sine, sine], axis=1).ravel()
        return rounded(asic.rope(pairs, rounded(np.repeat(cosine, 2)), rounded(signed)))


class Plain:
    """float64, and the textbook's formulas."""

    def number(self, x):
        return x

    def dot(self, x, w):
        return x @ w

    def join(self, heads, w):
        return heads.ravel() @ w

    def add(self, a, b):
        return a + b

    def norm(self, model, x, gain, bias):
        centred = x if bias is None else x - x.mean()
        y = centred / np.sqrt((centred**2).mean() + float(model.norm_eps)) * gain
        return y if bias is None else y + bias

    def activation(self, name, x):
        if name == "gelu_tanh":
            return x / 2 * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))
        return x / (1 + np.exp(-x)) if name == "silu" else np.maximum(x, 0)

    def multiply(self, a, b):
        return a * b

    def softmax(self, x, scale):
        e = np.exp(x * scale - (x * scale).max())
        return e / e.sum()

    def rope(self, x, cosine, sine):
        half = len(cosine)
        turned = np.concatenate([-x[half:], x[:half]])
        return x * np.tile(cosine, 2) + turned * np.tile(sine, 2)


class Decoder:
    """One token at a time, from the definition of the model."""

    def __init__(self, model, weights, arithmetic):
        self.model, self.w, self.a = model, weights, arithmetic
        self.keys = [[[] for _ in range(model.kv_heads)] for _ in range(model.layers)]
        self.values = [[[] for _ in range(model.kv_heads)] for _ in range(model.layers)]

    def linear(self, name, x):
        return self.bias(name, self.a.dot(x, self.w[name]))

    def bias(self, name, y):
        return self.a.add(y, self.w[f"{name}.bias"]) if f"{name}.bias" in self.w else y

    def norm(self, name, x):
        return self.a.norm(self.model, x, self.w[f"{name}.gain"], self.w.get(f"{name}.bias"))

    def attention(self, layer, x, position):
        m, dim = self.model, self.model.head_dim
        qkv = self.linear(f"layer {layer} qkv", x).reshape(-1, dim)
        q, k, v = np.split(qkv, [m.heads, m.heads + m.kv_heads])
        if m.position == "rotary":
            angles = position * float(m.rope_theta) ** (-np.arange(dim // 2) / (dim // 2))
            q, k = (np.array([self.a.rope(h, np.cos(angles), np.sin(angles)) for h in x]) for x in (q, k))
        out = []
        for g in range(m.kv_heads):
            self.keys[layer][g].append(k[g])
            self.values[layer][g].append(v[g])
        for h in range(m.heads):
            g = h * m.kv_heads // m.heads
            scores = self.a.dot(q[h], np.array(self.keys[layer][g]).T)
            out.append(self.a.dot(self.a.softmax(scores, dim**-0.5), np.array(self.values[layer][g])))
        name = f"layer {layer} attention_out"
        return self.bias(name, self.a.join(np.array(out), self.w[name]))

    def mlp(self, layer, x):
        m = self.model
        if m.gated_mlp:
            gate, up = np.split(self.linear(f"layer {layer} gate_up", x), 2)
            h = self.a.multiply(self.a.activation(m.activation, gate), up)
        else:
            h = self.a.activation(m.activation, self.linear(f"layer {layer} up", x))
        return self.linear(f"layer {layer} down", h)

    def step(self, token, position):
        """(residual behind the last layer, logits)"""
        m = self.model
        x = self.a.number(self.w["embedding"][token])
        if m.position == "learned":
            x = self.a.add(x, self.w["positions"][position + m.position_rows - m.positions])
        for layer in range(m.layers):
            h = self.norm(f"layer {layer} attention_norm", x)
            x = self.a.add(x, self.attention(layer, h, position))
            x = self.a.add(x, self.mlp(layer, self.norm(f"layer {layer} mlp_norm", x)))
        head = self.w["embedding"].T if m.tie_embeddings else self.w["lm_head"]
        return x, self.a.dot(self.norm("final_norm", x), head)


def residual(mapped, model, image, lanes=4):
    at = mapped.document["sram"]["x"] * lanes
    return from_bits(image["sram"][at : at + model.d_model], BF16)


def run_steps(spec, mapped, image):
    """The image behind each step, changed in place."""
    machine = Machine(spec, image)
    for segment in mapped.program.segments:
        machine.run(Program(ISA, [segment]))
        yield machine.image


@pytest.mark.parametrize(
    ("model", "spec"), [(GPT, SPEC), (OPT, SPEC), (LLAMA, SPEC), (GPT, WIDE), (LLAMA, WIDE)],
    ids=lambda x: x.name if isinstance(x, ModelConfig) else f"{x.dram.banks_per_group}-banks",
)  # fmt: skip
def test_program_is_the_decoder(model, spec):
    # 22 tokens: more than the 16 that a global buffer of softmax weights holds, and no multiple of anything.
    scenario = Scenario(prompt=3, generate=19)
    tokens = np.random.default_rng(1).integers(model.vocab, size=22)
    mapped = map_model(spec, model, scenario, tokens=tokens)
    weights = random_weights(model, 2)
    exact, plain = Decoder(model, weights, Exact(spec)), Decoder(model, weights, Plain())
    image = place_weights(spec, model, mapped.document, weights)
    image["sram"][:] = BF16.nan  # what lay there before must not matter
    agree = 0
    for i, out in enumerate(run_steps(spec, mapped, image)):
        x, logits = exact.step(tokens[i], i)
        _, true = plain.step(tokens[i], i)
        assert np.array_equal(to_bits(residual(mapped, model, out), BF16), to_bits(x, BF16))
        if i < 2:
            assert not out["argmax"].any()  # no LM head before the last token of the prompt
            continue
        best = int(np.argmax(logits))
        assert out["argmax"].tolist() == [to_bits(logits, BF16)[best], best]
        # Two layers of roundings to 8 bits; measured: up to 0.034 of the logits' deviation.
        error = np.abs(logits - true).max() / true.std()
        assert error < 0.05
        margin = (np.sort(true)[-1] - np.sort(true)[-2]) / true.std()
        if margin > 0.1:  # both logits may be off by 0.05
            assert best == np.argmax(true)
            agree += 1
    assert i == 21 and agree > 10


def test_sequences_of_a_batch_have_their_own_cache():
    scenario = Scenario(generate=5, batch=2)
    tokens = np.random.default_rng(3).integers(GPT.vocab, size=(2, 5))
    mapped = map_model(SPEC, GPT, scenario, tokens=tokens)
    weights = random_weights(GPT, 4)
    decoders = [Decoder(GPT, weights, Exact(SPEC)) for _ in range(2)]
    image = place_weights(SPEC, GPT, mapped.document, weights)
    for i, segment in enumerate(mapped.program.segments):
        code = segment.regions["code"]
        for b, half in enumerate(np.split(code, 2)):
            one = dataclasses.replace(segment, regions={"code": half})
            image, _ = interpret(SPEC, Program(ISA, [one]), image)
            logits = decoders[b].step(tokens[b, i], i)[1]
            assert image["argmax"][1] == np.argmax(logits)


def test_small_tiles_change_no_value():
    # LM head in six tiles, partial sums one out at a time, slot by slot.
    scenario = Scenario(generate=18)
    weights = random_weights(LLAMA, 5)
    images = []
    for mapping in ({}, {"tiles": {"lm_head_outs": 2, "partial_outs": 1, "attention_slots": 1}}):
        mapped = map_model(SPEC, LLAMA, scenario, mapping)
        image = place_weights(SPEC, LLAMA, mapped.document, weights)
        images.append(list(run_steps(SPEC, mapped, image))[-1])
    assert images[0]["argmax"].tolist() == images[1]["argmax"].tolist() != [0, 0]
    assert np.array_equal(images[0]["dram"], images[1]["dram"])


def test_without_embedding_and_head():
    mapped = map_model(SPEC, GPT, Scenario(generate=1, lm_head=False, embedding=False))
    names = {tag.op for tag in mapped.tags}
    assert not names & {"embedding", "positions", "final_norm", "lm_head", "argmax"}
    assert not {"lm_head", "positions"} & set(mapped.document["regions"])
    assert mapped.assumed == []
    weights = random_weights(GPT, 6)
    for name in ("embedding", "positions", "final_norm.gain", "final_norm.bias"):
        del weights[name]
    image = place_weights(SPEC, GPT, mapped.document, weights)
    x = rounded(np.random.default_rng(7).normal(size=18))
    at = mapped.document["sram"]["x"] * 4
    image["sram"][at : at + 18] = to_bits(x, BF16)
    out = interpret(SPEC, mapped.program, image)[0]
    d = Decoder(GPT, weights, Exact(SPEC))
    for layer in range(2):
        x = d.a.add(x, d.attention(layer, d.norm(f"layer {layer} attention_norm", x), 0))
        x = d.a.add(x, d.mlp(layer, d.norm(f"layer {layer} mlp_norm", x)))
    assert np.array_equal(residual(mapped, GPT, out), x)


def test_rotary_pairs_become_neighbours():
    # 3 query and 3 key heads of 6 (0 3 1 4 2 5 within each), then 3 value heads as they are.
    model = dataclasses.replace(LLAMA, heads=3, d_model=18, d_embed=18, head_dim=6)
    mapped = map_model(SPEC, model, Scenario(generate=2))
    weights = random_weights(model, 10)
    image = place_weights(SPEC, model, mapped.document, weights)
    dram = image["dram"].reshape(2, 4, -1, 4)  # channel, bank, column, lane
    base = mapped.document["regions"]["layer 0 qkv"] * 8
    want = to_bits(weights["layer 0 qkv"], BF16)
    # Heads are filled up to 8 rows; 72 rows of ceil(18 / 4) = 5 columns, 4 in the first segment. Row n lies in
    # out n // 8, channel n // 4 % 2, bank n % 4. Its first element is column out * 4, lane 0.
    order = (0, 3, 1, 4, 2, 5)
    for head in range(9):
        for i in range(6):
            out, rest = divmod(head * 8 + i, 8)
            old = head * 6 + (order[i] if head < 6 else i)
            assert dram[rest // 4, rest % 4, base + out * 4, 0] == want[0, old]
    # Position 1 lies in bank 1: 6 cosines in 2 columns, then 6 sines in 2; the channels take 2 columns each.
    angles = np.repeat(1 / 10000 ** (np.arange(3) / 3), 2)
    sines = np.sin(angles) * [-1, 1, -1, 1, -1, 1]
    at = mapped.document["regions"]["rotary"] * 8
    rows = from_bits(dram[:, 1, at : at + 2].reshape(2, 8), BF16)
    assert np.array_equal(rows[:, :6], rounded(np.array([np.cos(angles), sines])))
    assert not rows[:, 6:].any()


# ---- structure ----------------------------------------------------------------------------------------


def test_tags_are_the_operators_of_the_graph():
    mapped = map_model(SPEC, GPT, Scenario(generate=1))
    operators = decode_step(GPT, context=0).operators
    assert [(t.op, t.layer) for t in mapped.tags] == [(o.name, o.layer) for o in operators]
    assert mapped.tags[3].name == "layer 0 qkv"
    code = next(iter(mapped.program.segments)).regions["code"]
    assert set(code["tag"].tolist()) == set(range(len(operators)))


def test_program_text_reads_back():
    mapped = map_model(SPEC, LLAMA, Scenario(prompt=1, generate=2), mapping={"cache_tokens": 20})
    back = ISA.assemble(mapped.program.text())
    assert list(back.tags) == list(mapped.program.tags)
    for a, b in zip(mapped.program.segments, back.segments, strict=True):
        assert a.label.replace(" ", "_") == b.label.replace(" ", "_")
        assert np.array_equal(a.regions["code"], b.regions["code"])


def mac_columns(code, channel=0):
    gemv = code[(code["op"] == OP["GEMV"]) & (code["channels"] >> channel & 1 == 1)]
    return int((gemv["cols"].astype(np.int64) * gemv["outs"]).sum())


def test_mac_columns_of_gpt2_xl():
    # d = 1600 = 100 columns of 16; outputs / (8 channels * 16 banks), rounded up, times input columns:
    # QKV 4800 -> 38 * 100 = 3800; out 1600 -> 13 * 100 = 1300; up 6400 -> 50 * 100 = 5000;
    # down 1600 -> 13 * 400 = 5200; a layer 15300, 48 layers 734400; LM head 50257 -> 393 * 100 = 39300.
    # Attention in channel 0 with 25 heads over 8 channels: 4 slots. Token 1007 attends to 1008 = 63 * 16:
    # scores 63 outs of 64 / 16 = 4 columns = 252 a head; values 4 groups of 63 columns = 252.
    # 48 * 4 * (252 + 252) = 96768. Channel 1 has 3 slots: 72576.
    mapped = map_model(FULL, load_model("gpt2-xl"), Scenario(context=1007, generate=1))
    (segment,) = mapped.program.segments
    code = segment.regions["code"]
    assert mac_columns(code) == 734400 + 39300 + 96768
    assert mac_columns(code, 1) == 734400 + 39300 + 72576
    # Two tiles of logits, 197 outs of 128 and what is left of the vocabulary.
    argmax = code[code["op"] == OP["ARGMAX"]]
    assert argmax[["imm", "n", "clear"]].tolist() == [(0, 25216, 1), (25216, 50257 - 25216, 0)]
    assert len(code) < 20_000


def test_steps_differ_only_with_the_context():
    mapped = map_model(FULL, load_model("gpt2-small"), Scenario(prompt=2, generate=3))
    steps = list(mapped.program.segments)
    assert [s.label for s in steps] == ["prompt 0", "prompt 1", "token 0", "token 1", "token 2"]
    assert mapped.steps == 5
    lengths = [len(s.regions["code"]) for s in steps]
    # Behind the last prompt token and each generated one: two loads and the norm, WR_GB, GEMV, ARGMAX.
    assert lengths[0] + 6 == lengths[1] == lengths[2]
    again = list(mapped.program.segments)
    assert all(
        np.array_equal(a.regions["code"], b.regions["code"]) for a, b in zip(steps, again, strict=True)
    )
    softmax = [s.regions["code"]["n"][s.regions["code"]["op"] == OP["SOFTMAX"]].tolist() for s in steps]
    assert softmax == [[n] * 12 for n in range(1, 6)]


def test_token_ids():
    a = map_model(SPEC, GPT, Scenario(generate=2, seed=5))
    assert a.assumed == [
        "token ids: random, seed 5; they choose the bank that the embedding row is read from"
    ]
    ids = np.random.default_rng(5).integers(GPT.vocab, size=(1, 2))
    b = map_model(SPEC, GPT, Scenario(generate=2), tokens=ids[0])
    assert b.assumed == []
    assert a.program.text() == b.program.text()
    with pytest.raises(UserError, match=r"tokens must be in 0\.\.52, not 53"):
        map_model(SPEC, GPT, Scenario(generate=2), tokens=[1, 53])
    with pytest.raises(UserError, match="tokens must be 1 x 2 whole numbers, not int64 of shape"):
        map_model(SPEC, GPT, Scenario(generate=2), tokens=[1, 2, 3])


# ---- overlap ------------------------------------------------------------------------------------------


def test_columns_of_an_instruction_by_hand():
    p = WIDE.params()  # 2 channels, 4 lanes, 8 banks: 2 columns for an output of all banks

    def use(text):
        code = ISA.assemble(text).segments[0].regions["code"][0]
        op = next(name for name, i in OP.items() if i == code["op"])
        names = [n for n in code.dtype.names if n in text]
        return sram_use(p, op, {n: int(code[n]) for n in names})

    # Channel 1 is 10 further, the third out 2 * 20: 5 + 10 + 40, and 2 columns.
    gemv = use("GEMV channels=3 cols=7 dst=5 stride=10 outs=3 pitch=20")
    assert gemv == Use(False, (), (range(5, 57),))
    assert use("WR_GB channels=1 cols=7 src=5 stride=10") == Use(False, (range(5, 12),), ())
    assert use("WR_EL channels=2 src=5 stride=10 outs=3 pitch=90") == Use(False, (range(5, 21),), ())
    assert use("MAC_AB channels=3 cols=7").writes == ()
    # 9 elements are 3 columns; the tables of ROPE are there once.
    rope = use("ROPE dst=1 src=2 src2=30 src3=40 n=9 outs=2 pitch=8")
    assert rope == Use(True, (range(2, 13), range(30, 33), range(40, 43)), (range(1, 12),))
    assert use("ARGMAX src=7 n=4") == Use(True, (range(7, 8),), ())


def test_schedule_by_hand():
    def asic(reads, writes):
        return Use(True, (range(reads, reads + 1),), (range(writes, writes + 1),))

    def channels(writes):
        return Use(False, (), (range(writes, writes + 1),))

    # Two tiles: channels write 0, the ASIC takes it to 1 and that to 2; the next tile is 3, 4, 5.
    tiles = [channels(0), asic(0, 1), asic(1, 2), channels(3), asic(3, 4), asic(4, 5)]
    # The second tile's channels go before the first's second ASIC instruction, and so alongside the first.
    # The ASIC's first on the second tile waits for them.
    assert schedule(tiles) == [(0, False), (1, False), (3, True), (2, True), (4, False), (5, True)]
    # With one buffer they stay behind.
    tiles = [channels(0), asic(0, 1), asic(0, 2), channels(0)]
    assert schedule(tiles) == [(0, False), (1, False), (2, True), (3, False)]
    # The latest of the channels decides: when it was dispatched, the one before had completed.
    assert schedule([channels(0), channels(1), asic(0, 2)]) == [(0, False), (1, True), (2, True)]
    assert schedule([channels(0), channels(1), asic(1, 2)])[2] == (2, False)


SMALL = st.integers(0, 11)
COLUMNS = {"dst": SMALL, "src": SMALL, "src2": SMALL}
VECTOR = {"n": st.integers(1, 8)}
BANKS = {"channels": st.integers(1, 3), "stride": st.integers(2, 4)}
INSTRUCTIONS = {
    "WR_GB": {**BANKS, "cols": st.integers(1, 2), "gb": st.integers(0, 2)},
    "GEMV": {**BANKS, "cols": st.integers(1, 4), "outs": st.integers(1, 2), "pitch": st.just(1)},
    "RD_BK": {**BANKS, "cols": st.integers(1, 2), "bank": st.integers(0, 3)},
    "WR_BK": {**BANKS, "cols": st.integers(1, 2), "bank": st.integers(0, 3)},
    "WR_EL": {**BANKS, "outs": st.integers(1, 2), "pitch": st.integers(0, 3), "lane": st.integers(0, 3)},
    "ADD": VECTOR,
    "RELU": VECTOR,
    "SOFTMAX": {"n": st.integers(1, 4), "outs": st.integers(1, 2), "pitch": st.integers(1, 3)},
    "ARGMAX": VECTOR,
}


@st.composite
def instructions(draw):
    op = draw(st.sampled_from(sorted(INSTRUCTIONS)))
    operands = {name: c for name, c in COLUMNS.items() if name in OPS[OP[op]].fields}
    return op, {name: draw(values) for name, values in (operands | INSTRUCTIONS[op]).items()}


@settings(deadline=None, max_examples=60)
@given(st.lists(instructions(), min_size=2, max_size=14), st.integers(0, 99))
def test_any_schedule_is_accepted_and_changes_nothing(records, seed):
    image = blank_image(FEW_ROWS.params())
    rng = np.random.default_rng(seed)
    for name in ("dram", "sram", "gb"):
        image[name][:] = to_bits(rng.normal(size=image[name].shape), BF16)

    def execute(entries):
        code = np.concatenate([ISA.make(op, **fields) for op, fields in entries])
        return interpret(FEW_ROWS, Program(ISA, [Segment({"code": code})]), image)[0]

    valid = []
    for record in records:  # those that the interpreter takes one by one
        try:
            execute([record])
        except ValueError:
            continue
        valid.append(record)
    if valid:
        order = schedule([sram_use(FEW_ROWS.params(), op, fields) for op, fields in valid])
        assert sorted(i for i, _ in order) == list(range(len(valid)))
        after = execute([(valid[i][0], {**valid[i][1], "alongside": int(a)}) for i, a in order])
        plain = execute(valid)
        assert all(np.array_equal(after[name], plain[name]) for name in plain)


def test_what_moves_counts_as_far_as_it_goes():
    # The ADD takes as many elements as there are tokens: 21 in the last step, 6 columns, 40 to 45.
    steps = map_model(
        machine(*SETS, "asic.overlap=true"), OPT, Scenario(prompt=3, generate=18)
    ).program.segments
    growing = ("ADD", {"dst": 40, "src": 50, "src2": 50, "n": TOKENS})
    for column, alongside in ((39, 1), (40, 0), (45, 0), (46, 1), (55, 0), (56, 1)):
        load = ("RD_BK", {"channels": 1, "address": 0, "cols": 1, "dst": column})
        assert [fields["alongside"] for _, fields in steps.overlapped([growing, load])] == [0, alongside]


@pytest.mark.parametrize(
    ("model", "sets", "sram"),
    [
        (GPT, SETS, 4096), (LLAMA, SETS, 4096), (OPT, SETS, 2048),
        (LLAMA, [*SETS, "dram.banks_per_group=4"], 1536),  # room for one group of heads at a time
    ],
    ids=["gpt", "llama", "opt", "little room"],
)  # fmt: skip
def test_overlap_changes_no_number_and_takes_less_time(model, sets, sram):
    # 22 tokens as above; the interpreter refuses what is alongside something that it depends on.
    scenario, weights = Scenario(prompt=3, generate=19), random_weights(model, 12)
    outs, ticks = [], []
    for overlap in ("false", "true"):
        spec = machine(*sets, f"asic.sram_bytes={sram}", f"asic.overlap={overlap}")
        mapped = map_model(spec, model, scenario)
        image = place_weights(spec, model, mapped.document, weights)
        image["sram"][:] = BF16.nan
        outs.append(
            [
                (out["argmax"].tolist(), to_bits(residual(mapped, model, out), BF16).tolist())
                for out in run_steps(spec, mapped, image)
            ]
        )
        outs[-1].append(image["dram"].tobytes())
        ticks.append(simulate(spec.params(), mapped.program).ticks)
        code = np.concatenate([s.regions["code"] for s in mapped.program.segments])
        assert code["alongside"].any() == (overlap == "true")
        if overlap == "true":
            # The same program without: only its dispatches wait.
            flat = np.array(code)
            flat["alongside"] = 0
            alone = simulate(spec.params(), Program(ISA, [Segment({"code": flat})], mapped.program.tags))
            assert ticks[1] < alone.ticks
    assert outs[0] == outs[1]
    assert ticks[1] < ticks[0]


def test_overlap_pipelines_the_slots():
    mapped = map_model(
        machine("asic.overlap=true"), load_model("gpt2-xl"), Scenario(context=1000, generate=1)
    )
    (segment,) = mapped.program.segments
    code = segment.regions["code"]
    names = np.array([tag.op for tag in mapped.tags])[code["tag"]]
    layers = np.array([tag.layer for tag in mapped.tags])[code["tag"]]
    chosen = (layers == 0) & np.isin(names, ["scores", "softmax", "values"])
    # The values of a slot come behind the softmax of the next, and so alongside.
    order = [name for name, _ in itertools.groupby(names[chosen])]
    assert order == [*["scores", "softmax"] * 2, "values", *["scores", "softmax", "values"] * 2]
    # Each of the four softmaxes waits for its scores. Of the channels' instructions only the values behind the
    # last softmax wait for it.
    waits = names[chosen & (code["alongside"] == 0)].tolist()
    assert waits == ["softmax"] * 4 + ["values"]


# ---- the mapping document -----------------------------------------------------------------------------


def test_document_round_trip_gives_the_same_program():
    first = map_model(SPEC, LLAMA, Scenario(generate=3))
    kept = json.loads(json.dumps(first.document))
    again = map_model(SPEC, LLAMA, Scenario(generate=3), kept)
    assert again.document == first.document
    assert again.program.text() == first.program.text()


def test_regions_can_be_moved():
    first = map_model(SPEC, GPT, Scenario(generate=1))
    free = 1199
    moved = map_model(SPEC, GPT, Scenario(generate=1), {"regions": {"vectors": free - 100}})
    assert moved.document["regions"]["vectors"] == free - 100
    assert moved.document["regions"]["lm_head"] == first.document["regions"]["lm_head"]
    weights = random_weights(GPT, 8)
    outs = [
        interpret(SPEC, m.program, place_weights(SPEC, GPT, m.document, weights))[0] for m in (first, moved)
    ]
    assert outs[0]["argmax"].tolist() == outs[1]["argmax"].tolist()


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"tile": {}}, "mapping has no 'tile': did you mean tiles?"),
        ({"model": "gpt2-xl"}, "mapping.model must be 'tiny-gpt' here, not 'gpt2-xl'"),
        ({"cache_tokens": 0}, "mapping.cache_tokens must be a whole number in 1..1000000000, not 0"),
        ({"tiles": {"attention_slots": 3}}, "mapping.tiles.attention_slots must be a whole number in 1..2,"),
        ({"tiles": {"lm_head_outs": "all"}}, "mapping.tiles.lm_head_outs must be a whole number in"),
        ({"tiles": 3}, "mapping.tiles must be a mapping, not 3"),
        ({"regions": {"layer 0 qvk": 3}}, "mapping.regions has no 'layer 0 qvk': did you mean layer 0 qkv?"),
        ({"regions": {"layer 0 up": 0}}, "mapping.regions.layer 0 up must be at least"),
        ({"regions": {"vectors": 1199}}, "mapping.regions.vectors must be a whole number in 0.."),
        ({"sram": {"h": 1}}, "mapping.sram.h must be at least"),
        ({"sram": {"logits": 3}}, "mapping.sram.logits must be a whole number in"),
        ({"heads": []}, "mapping.heads must be [{'channel': 0"),
    ],
)  # fmt: skip
def test_document_errors_name_the_key(mapping, message):
    with pytest.raises(UserError) as error:
        map_model(SPEC, GPT, Scenario(generate=1), mapping)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


# ---- limits -------------------------------------------------------------------------------------------


def test_capacity_is_checked():
    # Rows of 64 columns: QKV 38 * 100 = 3800 columns are 60 rows, out 21, up 79, down 82; 48 * 242 = 11616.
    # LM head 39300 columns: 615. Vectors: 8 a layer and 2, 386 over 16 banks are 25 of ceil(400 / 8) = 50
    # columns: 20 rows. Positions: 1024 / 16 * 13 = 832 columns: 13. A token of KV cache: a layer's keys take
    # 1 * 4 columns of 4 slots, its values 4 * 1: 16 columns each, a row each; 96. Together 12360.
    small = machine("dram.rows=12360")
    map_model(small, load_model("gpt2-xl"), Scenario(generate=1))
    with pytest.raises(UserError) as error:
        map_model(machine("dram.rows=12000"), load_model("gpt2-xl"), Scenario(generate=1))
    assert str(error.value) == (
        "gpt2-xl does not fit pim-gpt: needs 12360 rows a bank, has 12000 (3.0 % too much)"
    )


def test_sram_and_buffer_are_checked():
    with pytest.raises(UserError, match=r"tiny-gpt does not fit pim-gpt: needs \d+ bytes of SRAM"):
        map_model(machine(*SETS, "asic.sram_bytes=256"), GPT, Scenario(generate=1))
    with pytest.raises(
        UserError, match=r"a head of 6 needs 2 columns of global buffer, pim\.global_buffer_bytes has 1"
    ):
        map_model(machine(*SETS, "pim.global_buffer_bytes=8"), GPT, Scenario(generate=1))


def test_positions_are_checked():
    with pytest.raises(UserError) as error:
        map_model(SPEC, GPT, Scenario(context=5, prompt=10, generate=12))
    assert str(error.value) == "tiny-gpt has 24 positions: context 5 + prompt 10 + generate 12 are 3 too many"


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"causal": False}, "encoders"),
        ({"experts": 4, "experts_per_token": 2}, "mixtures of experts"),
        ({"position": "alibi"}, "ALiBi positions"),
        ({"parallel_attention": True}, "parallel attention and MLP"),
        ({"post_norm": True}, "norms behind the residual addition"),
        ({"embedding_norm": True}, "a norm of the embedding"),
        ({"qk_norm": True}, "norms of Q and K"),
        ({"weight_groups": 2}, "sparse weights"),
        ({"sub_norms": True}, "BitNet's sub-norms"),
        ({"d_embed": 9}, "an embedding narrower than the model"),
        ({"activation": "relu2"}, "the activation relu2 (allowed: gelu_tanh, silu, relu)"),
        ({"sliding_window": 4, "windowed_layers": (1,)}, "a sliding window of 4 over 5 tokens"),
    ],
)
def test_unsupported_models_are_refused(changes, what):
    with pytest.raises(UserError) as error:
        map_model(SPEC, dataclasses.replace(GPT, **changes), Scenario(generate=5))
    assert str(error.value) == f"tiny-gpt: target pim does not support {what}"


def test_a_window_that_does_not_bind_is_no_obstacle():
    model = dataclasses.replace(GPT, sliding_window=5, windowed_layers=(0, 1))
    assert map_model(SPEC, model, Scenario(generate=5)).steps == 5


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("layer 1 up"), "weights: 'layer 1 up' is missing, an array of shape (18, 37)"),
        (lambda w: w.update({"layer 1 down": np.eye(3)}), "weights: 'layer 1 down' must have shape (37, 18)"),
        (lambda w: w.update({"layer 2 up": 0}), "weights: 'layer 2 up' is not used: did you mean layer"),
    ],
)  # fmt: skip
def test_weights_are_checked(change, message):
    mapped = map_model(SPEC, GPT, Scenario(generate=1))
    weights = random_weights(GPT, 9)
    change(weights)
    with pytest.raises(UserError) as error:
        place_weights(SPEC, GPT, mapped.document, weights)
    assert message in str(error.value)
