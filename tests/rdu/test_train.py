"""Steps of training: what the machine gives for a layer, the reference's bits; the reference against float64."""

import json
from dataclasses import replace

import numpy as np
import pytest
import yaml

from tests.face.invoke import refused, tilewright
from tests.rdu import test_layer
from tests.rdu.test_layer import half, machine
from tilewright.arch import rdu
from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program
from tilewright.arch.scenario import Scenario
from tilewright.mappers.rdu import _Mapper, document_of, map_model, train
from tilewright.workloads import rdu_layer
from tilewright.workloads import rdu_train as reference
from tilewright.workloads.rdu import blank_image, interpret

MODEL = replace(test_layer.MODEL, kv_heads=2)
QUICK = {"moves": 20_000}
RATE = 0.01


def step(model, tokens, mapping, stages=8, layers=1):
    """A step of training: (matrices that the machine gives, those of the reference), all in bfloat16 or float32 words."""
    spec = machine(stages)
    p, m = spec.params(), replace(model, layers=layers)
    scenario = Scenario(train=tokens, generate=0, embedding=False)
    mapper = _Mapper(spec, m, scenario, document_of(spec, QUICK | mapping))
    mapper.plan()
    rng = np.random.default_rng(5)
    weights = [test_layer.random_weights(m, rng)[0] for _ in range(layers)]
    x, cos, sin, dz = (
        rdu_layer.words(rng.normal(size=(tokens, n)))
        for n in (m.d_model, m.head_dim, m.head_dim, m.d_model)
    )  # fmt: skip
    image = blank_image(p)
    moments = {}

    def blocked(a):
        return a.reshape(-1, p.lanes, a.shape[1]).transpose(0, 2, 1)

    def put(name, layer, data):
        at = mapper.address.get(train.place(name, layer)[1])
        if at is not None:
            image["hbm"][at : at + len(data)] = data

    def raw(a):
        return np.ascontiguousarray(a).view(np.uint8).ravel()

    put("x", 0, half(blocked(x)))
    put("dz", layers - 1, half(blocked(dz)))
    for name, table in (("cos", cos), ("sin", sin), ("sin.back", sin ^ np.uint32(0x80000000))):
        put(name, -1, half(blocked(table)))
    put("rate", -1, raw(np.full(p.lanes, RATE, np.float32)))
    for layer, w in enumerate(weights):
        for name in train.parameters(m):
            own = w[weight_of(name)]
            put(f"{name}.copy", layer, half(blocked(own) if own.ndim == 2 else own))
            first, second = (rng.normal(size=own.shape).astype(np.float32) for _ in range(2))
            kept = {"first": first, "second": second**2, "master": own.view(np.float32)}
            for what, a in kept.items():
                put(f"{name}.{what}", layer, raw(blocked(a) if a.ndim == 2 else a))
            moments[name, layer] = {k: v.view(np.uint32) for k, v in kept.items()}
    after, _ = interpret(spec, Program(rdu.ISA, mapper, mapper.tags), image)

    def get(name, layer, shape, words=False):
        at = mapper.address[train.place(name, layer)[1]]
        size = int(np.prod(shape)) * (4 if words else 2)
        a = after["hbm"][at : at + size].view(np.uint32 if words else np.uint16)
        if len(shape) == 1:
            return a
        return a.reshape(-1, shape[1], p.lanes).transpose(0, 2, 1).reshape(shape)

    sections = mapper.document["sections"]

    def chunks(op):
        return next(s["chunks"] for s in sections if op in s["operators"])

    cuts = {
        op.name: found for k in mapper.kernels for op in k.choice.ops if (found := _cuts(k.choice.line, op))
    }
    how = reference.Cuts(
        cuts, chunks("attention"), chunks("attention_dq"), chunks("attention_dkv"), lanes=p.lanes
    )
    tables = (cos, sin) if m.position == "rotary" else (None, None)
    expected, got, rows = {}, {}, [x]
    for w in weights:
        rows.append(reference.gradients(m, w, rows[-1], dz, *tables, how, p)[0]["z"])
    for layer in reversed(range(layers)):
        at, found = reference.gradients(m, weights[layer], rows[layer], dz, *tables, how, p)
        for name in (*train.SAVED, "x", "z", *(("dx",) if not layer else ())):
            if name in at:
                expected[name, layer] = at[name] >> 16
                got[name, layer] = get(name, layer, at[name].shape)
        if not layer:
            for name in ("df", "dgate", "dup", "dy", "da", "dqkv"):
                if name in at and train.place(name, layer)[1] in mapper.address:
                    expected[name, layer] = at[name] >> 16
                    got[name, layer] = get(name, layer, at[name].shape)
        for name, g in found.items():
            if not layer:
                expected[name, "grad"] = g >> 16
                got[name, "grad"] = get(f"{name}.grad", layer, g.shape)
            was = moments[name, layer]
            rate = np.float32(RATE).view(np.uint32)
            new = reference.adamw(
                was["master"], was["first"], was["second"], g, rate, beta1=train.BETAS[0], beta2=train.BETAS[1],
                eps=train.EPS, decay=train.DECAY, counts=p,
            )  # fmt: skip
            for what, a in zip(("master", "first", "second"), new, strict=False):
                expected[name, what, layer] = a
                got[name, what, layer] = get(f"{name}.{what}", layer, a.shape, words=True)
            expected[name, "copy", layer] = new[3] >> 16
            got[name, "copy", layer] = get(f"{name}.copy", layer, g.shape)
        dz = at["dx"]
    return got, expected


def weight_of(name):
    """The key of a parameter among the reference's weights."""
    if name.endswith(train.BIAS):
        return f"{name.removesuffix(train.BIAS)}.bias"
    return f"{name}.gain" if name in train.GAINS else name


def _cuts(line, op):
    """Pieces of the depth of a product of the backward pass."""
    if op.kind != "product_dx":
        return 0
    return len({u.rsplit(".x.", 1)[0] for u in line.units if u.startswith(f"{op.name}.0.") and ".x." in u})


@pytest.mark.parametrize(
    ("change", "tokens", "mapping", "layers", "stages"),
    [
        ({}, 16, {"fusion": "unfused"}, 1, 8), ({}, 32, {}, 2, 8), ({**test_layer.GPT, "d_ff": 32}, 32, {}, 1, 12),
        ({**test_layer.GPT, "d_model": 32, "head_dim": 16, "d_ff": 48}, 32, {"fusion": "unfused"}, 1, 12),
    ],
)  # fmt: skip
def test_values(change, tokens, mapping, layers, stages):
    got, expected = step(replace(MODEL, **change), tokens, mapping, stages, layers)
    wrong = [name for name in expected if not np.array_equal(got[name], expected[name])]
    assert not wrong


# ---- the reference against calculus ------------------------------------------------------------------


def plain(model, w, x, cos, sin):
    """A layer in float64: nothing in common with the reference."""
    d, heads, rows = model.head_dim, model.heads, len(x)

    def normed(name, a):
        if model.norm == "layernorm":
            a = a - a.mean(1, keepdims=True)
        a = a / np.sqrt((a * a).mean(1, keepdims=True) + float(model.norm_eps))
        return a * w[f"{name}.gain"] + w.get(f"{name}.bias", 0)

    def rotary(a):
        a = a.reshape(rows, heads, d)
        other = np.concatenate([a[..., d // 2 :], a[..., : d // 2]], -1)
        return (a * cos[:, None] + other * sin[:, None]).reshape(rows, -1)

    def linear(name, a):
        return a @ w[name] + w.get(f"{name}.bias", 0)

    q, k, v = np.split(linear("qkv", normed("attention_norm", x)), 3, axis=1)
    if model.position == "rotary":
        q, k = rotary(q), rotary(k)
    q, k, v = (a.reshape(rows, heads, d).transpose(1, 0, 2) for a in (q, k, v))
    scores = np.where(np.tri(rows) > 0, q @ k.transpose(0, 2, 1) / np.sqrt(d), -np.inf)
    power = np.exp(scores - scores.max(-1, keepdims=True))
    out = (power / power.sum(-1, keepdims=True)) @ v
    y = x + linear("attention_out", out.transpose(1, 0, 2).reshape(rows, -1))
    h = normed("mlp_norm", y)
    up = linear("up", h)
    if model.gated_mlp:
        gate = linear("gate", h)
        f = gate / (1 + np.exp(-gate)) * up
    else:
        f = up / (1 + np.exp(-2 * np.sqrt(2 / np.pi) * (up + 0.044715 * up**3)))
    return y + linear("down", f)


@pytest.mark.parametrize("change", [{}, test_layer.GPT])
def test_gradients_against_differences(change):
    # Along its own direction d = g / |g| the loss sum(z dz) rises by |g|, along another one by g d: central differences
    # of float64 agree within what bfloat16's eight bits leave, here 2 % of |g|.
    m = replace(MODEL, **change)
    p = machine().params()
    rng = np.random.default_rng(7)
    w, make = test_layer.random_weights(m, rng)
    x, dz = make(16, m.d_model), make(16, m.d_model)
    angle = np.concatenate([rng.normal(size=(16, m.head_dim // 2))] * 2, 1)
    sign = np.repeat([-1, 1], m.head_dim // 2)
    cos, sin = (rdu_layer.words(a) for a in (np.cos(angle), np.sin(angle) * sign))
    rotary = m.position == "rotary"
    at, found = reference.gradients(
        m, w, x, dz, cos if rotary else None, sin if rotary else None, reference.Cuts(lanes=8), p
    )

    def real(a):
        return a.view(np.float32).astype(float)

    exact = {name: real(a) for name, a in w.items()}
    c, s, seed, start = real(cos), real(sin), real(dz), real(x)
    z = plain(m, exact, start, c, s)
    assert np.linalg.norm(real(at["z"]) - z) < 0.01 * np.linalg.norm(z)

    def rise(name, direction):
        """The loss's derivative along a direction of a weight or of x."""
        both = []
        for step in (1e-5, -1e-5):
            moved = dict(exact)
            rows = start + step * direction if name == "x" else start
            if name != "x":
                moved[name] = exact[name] + step * direction
            both.append(np.sum(plain(m, moved, rows, c, s) * seed))
        return (both[0] - both[1]) / 2e-5

    for name, g in {**found, "x": at["dx"]}.items():
        g = real(g)
        own = name if name == "x" else weight_of(name)
        size = np.linalg.norm(g)
        assert abs(rise(own, g / size) - size) < 0.02 * size, name
        for _ in range(3):
            d = rng.normal(size=g.shape)
            d /= np.linalg.norm(d)
            assert abs(rise(own, d) - np.sum(g * d)) < 0.02 * size, name


def test_adamw_by_hand():
    # m = 0.9 * 0 + 0.1 * 2 = 0.2; v = 0.95 * 0 + 0.05 * 4 = 0.2; m / sqrt(v) = 0.4472; + 0.1 * 1; times 0.5: 0.2736.
    p = machine().params()
    one, two, none, rate = (np.full(1, a, np.float32).view(np.uint32) for a in (1.0, 2.0, 0.0, 0.5))
    w, m, v, copy = reference.adamw(
        one, none, none, two, rate, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.1, counts=p
    )
    assert m.view(np.float32)[0] == pytest.approx(0.2, rel=1e-6)
    assert v.view(np.float32)[0] == pytest.approx(0.2, rel=1e-6)
    assert w.view(np.float32)[0] == pytest.approx(1 - 0.5 * (0.2 / 0.2**0.5 + 0.1), rel=1e-6)
    assert copy[0] == rdu_layer.words(w.view(np.float32))[0]
    # Where nothing was learned yet, a gradient of zero moves a weight by its decay alone.
    w, _, _, _ = reference.adamw(
        one, none, none, none, rate, beta1=0.9, beta2=0.95, eps=1e-8, decay=0.1, counts=p
    )
    assert w.view(np.float32)[0] == pytest.approx(0.95, rel=1e-6)


# ---- what is refused ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kv_heads": 1}, "tiny: target rdu does not train heads that share keys"),
        ({"causal": False}, "tiny: target rdu does not train encoders"),
        ({"parallel_attention": True}, "tiny: target rdu does not train attention beside the MLP"),
        ({"activation": "relu2"}, "tiny: target rdu does not train activation relu2"),
        (
            {"d_ff": 20},
            "tiny: 20 columns of gate on a socket are no multiple of the 8 lanes, as training needs",
        ),
        ({"position": "alibi"}, "tiny: target rdu does not train linear biases of positions"),
    ],
)
def test_models_are_checked(change, message):
    with pytest.raises(UserError, match=message):
        map_model(machine(), replace(MODEL, **change), Scenario(train=16, generate=0))


def test_scenarios_are_checked():
    spec = machine()
    with pytest.raises(UserError, match="--train is a step of its own"):
        Scenario(train=16)
    with pytest.raises(UserError, match="--train must be a multiple of 16, twice the lanes, not 24"):
        map_model(spec, MODEL, Scenario(train=24, generate=0))
    with pytest.raises(UserError, match="--batch must be 1 with --train, not 2"):
        map_model(spec, MODEL, Scenario(train=16, generate=0, batch=2))


@pytest.mark.parametrize(
    ("preset", "message"),
    [
        ("pim-gpt", "--train: target pim does not train models; allowed: rdu"),
        ("a100", "--train: roofline a100 does not train models; allowed: specs of target rdu"),
    ],
)
def test_other_targets_do_not_train(preset, message):
    assert refused("run", preset, "--model", "gpt2-small", "--train", 64) == message


def test_a_step_from_the_command_line(tmp_path):
    spec, model, mapping = (tmp_path / name for name in ("spec.yaml", "model.json", "mapping.yaml"))
    spec.write_text(yaml.safe_dump(machine().model_dump(mode="json")))
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "intermediate_size": 24}
    model.write_text(json.dumps({"model_type": "llama", "vocab_size": 32, "rms_norm_eps": 1e-5} | shape))
    mapping.write_text(yaml.safe_dump(QUICK))
    ran = tilewright("run", spec, "--model", model, "--train", 32, "--mapping", mapping, "--json", "-")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert (found["scenario"]["train"], found["scenario"]["generate"]) == (32, 0)
    assert {"qkv_dw", "mlp_norm_dw", "down_first_moment to down_round"} <= {s["op"] for s in found["spans"]}
    assert any("without LM head and loss" in text for text in found["assumed"])
