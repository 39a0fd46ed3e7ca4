"""Steps of training: what the machine gives for a layer, the reference's bits; the reference against float64."""

import json
from dataclasses import replace
from fractions import Fraction

import numpy as np
import pytest
import yaml

from tests.face.invoke import refused, tilewright
from tests.rdu import test_layer
from tests.rdu.test_layer import half, machine
from tilewright.arch import rdu
from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program
from tilewright.arch.registry import load_spec
from tilewright.arch.scenario import Scenario
from tilewright.mappers.rdu import _Mapper, document_of, map_model, train
from tilewright.mappers.rdu.layer import Share
from tilewright.mappers.rdu.plan import Limits, plan_rows
from tilewright.workloads import rdu_layer
from tilewright.workloads import rdu_train as reference
from tilewright.workloads.models import load_model
from tilewright.workloads.rdu import blank_image, interpret

MODEL = replace(test_layer.MODEL, kv_heads=2)
GPT = {**test_layer.GPT, "tie_embeddings": True, "vocab": 50, "positions": 40, "d_ff": 64}
GPT |= {"d_model": 32, "d_embed": 32, "head_dim": 16}
QUICK = {"moves": 20_000}
RATE = 0.01


class Memory:
    """A mapped step, and what is in HBM before and after it."""

    def __init__(self, model, tokens, mapping, stages, **scenario):
        self.spec = machine(stages, scenario.pop("sockets", 1))
        self.p = self.spec.params()
        scenario = Scenario(train=tokens, generate=0, embedding=False, **scenario)
        self.mapper = _Mapper(self.spec, model, scenario, document_of(self.spec, QUICK | mapping))
        self.mapper.plan()
        self.image = blank_image(self.p)
        self.moments = {}
        rate = np.full(self.p.lanes, RATE, np.float32)
        self.put("rate", -1, rate.view(np.uint8))

    def at(self, name, layer):
        return self.mapper.memory.address.get(train.place(name, layer)[1])

    def blocked(self, a):
        """As a matrix lies off chip; rows that are missing in the last block are zero."""
        if a.ndim == 1:
            return a
        a = np.pad(a, ((0, -len(a) % self.p.lanes), (0, 0)))
        return np.ascontiguousarray(a.reshape(-1, self.p.lanes, a.shape[1]).transpose(0, 2, 1))

    def put(self, name, layer, data):
        at = self.at(name, layer)
        if at is not None:
            self.image["hbm"][at : at + data.size] = data

    def half(self, name, layer, a):
        self.put(name, layer, half(self.blocked(a)))

    def stored(self, name, own):
        """A weight as it lies: a sparse one by group, with the residual stream's side as rows."""
        groups = self.mapper.model.weight_groups
        if groups == 1 or name not in rdu_layer.SPARSE:
            return own
        of_row, of_column = (
            rdu_layer.members(n, groups, t) for n, t in zip(own.shape, rdu_layer.turns_of(name), strict=True)
        )
        parts = [own[of_row == j][:, of_column == j] for j in range(groups)]
        return np.concatenate([a.T if name in ("attention_out", "down") else a for a in parts])

    def weight(self, name, layer, own, rng):
        """What the layer takes of a weight, and what the optimizer keeps of it."""
        own = self.stored(name, own)
        self.half(f"{name}.copy", layer, own)
        first, second = (rng.normal(size=own.shape).astype(np.float32) for _ in range(2))
        kept = {"first": first, "second": second**2, "master": own.view(np.float32)}
        for what, a in kept.items():
            self.put(f"{name}.{what}", layer, self.blocked(a).view(np.uint8).ravel())
        self.moments[name, layer] = {k: v.view(np.uint32) for k, v in kept.items()}

    def run(self):
        program = Program(rdu.ISA, self.mapper, self.mapper.tags)
        self.after, _ = interpret(self.spec, program, self.image)

    def get(self, name, layer, shape, words=False):
        at = self.at(name, layer)
        lanes = self.p.lanes
        rows = shape[0] + (-shape[0] % lanes if len(shape) > 1 else 0)
        size = rows * int(np.prod(shape[1:])) * (4 if words else 2)
        a = self.after["hbm"][at : at + size].view(np.uint32 if words else np.uint16)
        if len(shape) == 1:
            return a
        return a.reshape(-1, shape[1], lanes).transpose(0, 2, 1).reshape(rows, shape[1])[: shape[0]]

    def optimized(self, name, layer, g):
        """(What the machine has of a weight after the step, what the reference has), by name, from its gradient."""
        was, g = self.moments[name, layer], self.stored(name, g)
        rate = np.float32(RATE).view(np.uint32)
        new = reference.adamw(
            was["master"], was["first"], was["second"], g, rate, beta1=train.BETAS[0], beta2=train.BETAS[1],
            eps=train.EPS, decay=train.DECAY, counts=self.p,
        )  # fmt: skip
        got, expected = {}, {(name, "copy", layer): new[3] >> 16}
        for what, a in zip(("master", "first", "second"), new, strict=False):
            expected[name, what, layer] = a
            got[name, what, layer] = self.get(f"{name}.{what}", layer, a.shape, words=True)
        got[name, "copy", layer] = self.get(f"{name}.copy", layer, g.shape)
        return got, expected

    def cuts(self):
        """How the mapping cuts sums."""
        sections = self.mapper.document["sections"]

        def chunks(op):
            return next(s["chunks"] for s in sections if op in s["operators"])

        depths = {
            op.name: found
            for k in self.mapper.kernels
            for op in k.choice.ops
            if (found := _cuts(k.choice.line, op))
        }
        return reference.Cuts(
            depths, chunks("attention"), chunks("attention_dq"), chunks("attention_dkv"), lanes=self.p.lanes
        )

    def parts(self):
        """Ranges of a row of logits."""
        lines = [k.choice.line for k in self.mapper.kernels if any(op.kind == "loss" for op in k.choice.ops)]
        return sum(u.startswith("loss.exp") and u.endswith(".0") for u in lines[0].units)


def ends(m, p, rng, sockets=1):
    """Weights of a socket's head and tables."""
    _, make = test_layer.random_weights(m, rng)
    rows = train.vocabulary(Share(m, sockets), p)
    own = {"lm_head": make(rows, m.d_model)}
    own |= {"embedding": make(rows, m.d_model)} if not m.tie_embeddings else {}
    own |= {"final_norm.gain": make(m.d_model)} if m.final_norm else {}
    own |= {"final_norm.bias": make(m.d_model)} if m.final_norm and m.norm == "layernorm" else {}
    own |= {"positions": make(m.positions, m.d_model)} if m.position == "learned" else {}
    return own


def alike(m, own, x, targets, how, p, parts, sockets):
    """`reference.head` as one socket sees it that receives what it sends: the others are as it is.

    They have its columns and targets. Of a matrix it adds up its first columns, and takes for others' parts of them what it
    sends them, its other columns; its sum stands for theirs.
    """
    same, over = replace(m, vocab=m.vocab // sockets), reference._over_sockets

    def sliced(how, parts):
        if parts[0].ndim == 1:
            return over(how, parts)
        return np.concatenate([over(how, np.split(parts[0], sockets, axis=1))] * sockets, axis=1)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(reference, "_over_sockets", sliced)
        return reference.head(same, [own] * sockets, x, targets, how, p, parts, firsts=[0] * sockets)


def step(model, tokens, mapping, stages=8, layers=1, lm_head=False, sockets=1):
    """A step of training: (matrices that the machine gives, those of the reference), all in bfloat16 or float32 words."""
    m = replace(model, layers=layers)
    run = Memory(m, tokens, mapping, stages, lm_head=lm_head, sockets=sockets)
    p, learned = run.p, m.position == "learned"
    rng = np.random.default_rng(5)
    weights = [test_layer.random_weights(m, rng)[0] for _ in range(layers)]
    x, cos, sin, dz = (
        rdu_layer.words(rng.normal(size=(tokens, n)))
        for n in (m.d_model, m.head_dim, m.head_dim, m.d_model)
    )  # fmt: skip
    expected, got = {}, {}
    read, targets = rng.integers(5, size=tokens), rng.integers(m.vocab // sockets, size=tokens)
    around = ends(m, p, rng, sockets) if lm_head else {}
    run.half("embedded" if lm_head and learned else "x", 0, x)
    if lm_head and learned:
        x = rdu_layer.round_bf16(rdu_layer._op("add", x, around["positions"][:tokens]))
    for name, a in (("tokens", read), ("targets", targets), ("limit", np.full(p.lanes, m.vocab // sockets))):
        run.put(name, -1, a.astype(np.uint32).view(np.uint8))
    run.half("dz", layers - 1, dz)
    for name, table in (("cos", cos), ("sin", sin), ("sin.back", sin ^ np.uint32(0x80000000))):
        run.half(name, -1, table)
    for layer, w in enumerate(weights):
        for name in train.parameters(m):
            run.weight(name, layer, w[weight_of(name)], rng)
    for name in train.end_parameters(m) if lm_head else ():
        run.weight(name, -1, around[weight_of(name)], rng)
    run.run()
    how = run.cuts()

    def check(name, layer, a, words=False):
        expected[name, layer] = a if words else a >> 16
        got[name, layer] = run.get(name, layer, a.shape, words)

    def updated(name, layer, g):
        for mine, theirs in zip((got, expected), run.optimized(name, layer, g), strict=True):
            mine.update(theirs)

    tables = (cos, sin) if m.position == "rotary" else (None, None)
    rows, behind = [x], []
    for w in weights:
        rows.append(reference.gradients(m, w, rows[-1], dz, *tables, how, p)[0]["z"])
    if lm_head:
        at, behind = alike(m, around, rows[-1], targets, how, p, run.parts(), sockets)
        dz = at["dx"]
        if layers != 2:  # whose first layer's gradient takes that place
            check("dx", layers, dz)
        for what in ("top", "total", "target"):
            check(f"loss.{what}", -1, at[what], words=True)
    for layer in reversed(range(layers)):
        at, found = reference.gradients(m, weights[layer], rows[layer], dz, *tables, how, p)
        for name in (*train.SAVED, "x", "z", *(("dx",) if not layer else ())):
            if name in at:
                check(name, layer, at[name])
        if not layer:
            for name in ("df", "dgate", "dup", "dy", "da", "dqkv"):
                if name in at and run.at(name, layer) is not None:
                    check(name, layer, at[name])
        for name, g in found.items():
            if not layer:
                check(f"{name}.grad", layer, run.stored(name, g))
            updated(name, layer, g)
        dz = at["dx"]
    if lm_head:
        found = reference.table_gradients(m, behind, read, dz)[0]
        for name, g in found.items():
            if name == "positions":
                g = np.pad(g, ((0, m.positions - len(g)), (0, 0)))
            check(f"{name}.grad", -1, g)
            updated(name, -1, g)
    return got, expected


@pytest.mark.parametrize("change", [{"d_ff": 32}, {**GPT, "d_ff": 32}])
def test_gradients_of_sequences_are_added_up(change):
    # Three sequences: thirds are rounded, and the order of additions shows.
    m, tokens, sequences = replace(MODEL, **change), 32, 3
    run = Memory(m, tokens, {}, 12, batch=sequences)
    p, learned = run.p, m.position == "learned"
    rng = np.random.default_rng(6)
    w, make = test_layer.random_weights(m, rng)
    around = ends(m, p, rng)
    cos, sin = make(tokens, m.head_dim), make(tokens, m.head_dim)
    for name, table in (("cos", cos), ("sin", sin), ("sin.back", sin ^ np.uint32(0x80000000))):
        run.half(name, -1, table)
    for name in (*train.parameters(m), *train.end_parameters(m)):
        run.weight(name, 0, (w | around)[weight_of(name)], rng)
    rows = make(sequences, tokens, m.d_model)
    read, targets = (rng.integers(n, size=(sequences, tokens)) for n in (5, m.vocab))
    for name, a in (("tokens", read), ("targets", targets), ("limit", np.full(p.lanes, m.vocab))):
        run.put(name, -1, a.astype(np.uint32).view(np.uint8).ravel())
    name = "embedded" if learned else "x"
    run.half(name, 0, rows[0])
    for b in range(1, sequences):
        at = run.mapper.memory.address["rows", f"{name} {b}", -1]
        data = half(run.blocked(rows[b]))
        run.image["hbm"][at : at + data.size] = data
    run.run()
    how, tables = run.cuts(), (None, None) if learned else (cos, sin)
    words, every = {"top": [], "total": [], "target": []}, []
    for b in range(sequences):
        x = rows[b]
        if learned:
            x = rdu_layer.round_bf16(rdu_layer._op("add", x, around["positions"][:tokens]))
        at, _ = reference.gradients(m, w, x, x, *tables, how, p)
        at, behind = reference.head(m, [around], at["z"], targets[b], how, p)
        for what, found in words.items():
            found.append(at[what])
        at, found = reference.gradients(m, w, x, at["dx"], *tables, how, p)
        every.append(found | reference.table_gradients(m, behind, read[b], at["dx"])[0])
    got, expected = {}, {what: np.concatenate(found) for what, found in words.items()}
    for what in words:
        got[what] = run.get(f"loss.{what}", -1, (sequences * tokens,), words=True)
    for name in every[0]:
        g = reference.accumulated([found[name] for found in every])
        if name == "positions":
            g = np.pad(g, ((0, m.positions - tokens), (0, 0)))
        for mine, theirs in zip((got, expected), run.optimized(name, 0, g), strict=True):
            mine.update(theirs)
    wrong = [name for name in expected if not np.array_equal(got[name], expected[name])]
    assert not wrong


def weight_of(name):
    """The key of a parameter among the reference's weights."""
    if name.endswith(train.BIAS):
        return f"{name.removesuffix(train.BIAS)}.bias"
    return f"{name}.gain" if name in train.NORMS else name


def _cuts(line, op):
    """Pieces of the depth of a product with transposed weights: <name>.<part of the result>.<part>.<column>, and a group."""
    if op.kind != "product_dx":
        return 0
    return len({tuple(u.split(".")[2:4]) for u in line.units if u.startswith(f"{op.name}.0.") and ".x." in u})


@pytest.mark.parametrize(
    ("change", "tokens", "mapping", "layers", "stages"),
    [
        ({}, 16, {"fusion": "unfused"}, 1, 8), ({}, 32, {}, 2, 8), ({**GPT, "d_model": 16, "d_embed": 16, "head_dim": 8, "d_ff": 32}, 32, {}, 1, 12),
        ({**GPT, "d_ff": 48}, 32, {"fusion": "unfused"}, 1, 12), ({**GPT, "weight_groups": 2}, 32, {"fusion": "unfused"}, 1, 12),
        ({"weight_groups": 2, "d_ff": 32}, 32, {}, 2, 8),
    ],
)  # fmt: skip
def test_values(change, tokens, mapping, layers, stages):
    # Those that are fused are whole: from tokens to the loss, and back to the tables.
    got, expected = step(replace(MODEL, **change), tokens, mapping, stages, layers, lm_head=not mapping)
    wrong = [name for name in expected if not np.array_equal(got[name], expected[name])]
    assert not wrong


@pytest.mark.parametrize(
    ("change", "sockets", "mapping", "stages"),
    [
        ({}, 1, {"fusion": "unfused"}, 8), ({}, 2, {}, 8), (GPT, 1, {"fusion": "unfused"}, 12),
        ({**GPT, "vocab": 100}, 2, {}, 12), ({**GPT, "final_norm": False, "vocab": 600}, 1, {}, 12),
    ],
)  # fmt: skip
def test_values_outside_the_layers(change, sockets, mapping, stages):
    # 32 columns are whole vectors; of 50 on a socket, which 64 make room for, the last ones are masked; 600 are two parts.
    m = replace(MODEL, **({"vocab": 32 * sockets, "d_ff": 32} | change))
    got, expected = step(m, 32, mapping, stages, 0, True, sockets)
    wrong = [name for name in expected if not np.array_equal(got[name], expected[name])]
    assert not wrong


@pytest.mark.parametrize("name", ["qkv", "attention_out", "up", "down"])
def test_blocks_of_a_group_of_sparse_weights_are_never_filled_up(name):
    # 640 rows of a group are 40 blocks; 3 groups of tiles would take 42, the last two of them the next group's rows.
    spec, model = load_spec("sn40l-node"), load_model("sparse-gpt-13b")
    p, share = spec.params(), Share(model, 8)
    op = next(op for op in train.weight_gradients(model) if op.name == f"{name}_dw")
    rows, _ = train.gradient_shape(share, op, 512, p)
    found = plan_rows(
        p, share, [op], op.writes, Limits.of(p, Fraction(2, 5)), rows=rows, keys=512, pitch=512, context=0, window=None,
        attended=512, builder=train.Training,
    )  # fmt: skip
    assert rows == 640 == found.tiles["groups"] * found.tiles["blocks"] * p.lanes


def test_groups_of_sparse_weights_have_whole_blocks():
    spec, model = load_spec("sn40l-node"), load_model("sparse-gpt-13b")
    with pytest.raises(UserError, match="48 rows of a group of qkv are no even number of blocks of 16"):
        train.check(Share(replace(model, weight_groups=8, d_model=384, d_embed=384)), spec.params())


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


def test_loss_by_hand():
    # Logits 0 and 0, the target is the first: shares are 1/2, the gradient (-1/2, 1/2); of two rows the mean's is half of it.
    # Logits 1 and 0, the target is the second: 1/(1 + 1/e) = 0.7311. A third column is masked.
    p = machine().params()
    logits = rdu_layer.words([[0, 0, 9], [1, 0, 9]])
    (slopes,), top, total, target = reference.loss([logits], [0, 1], 2, p)
    found = slopes.view(np.float32)
    assert found == pytest.approx(np.array([[-0.25, 0.25, 0], [0.3655, -0.3655, 0]]), rel=2**-8)
    assert list(top.view(np.float32)) == [0, 1]
    assert total.view(np.float32) == pytest.approx([2, 1 + np.exp(-1)], rel=1e-6)
    assert list(target.view(np.float32)) == [0, 0]
    # The same columns on three sockets.
    apart, *words = reference.loss([logits[:, k : k + 1] for k in range(3)], [0, 1], 2, p)
    assert np.array_equal(np.concatenate(apart, axis=1), slopes)
    assert all(np.array_equal(a, b) for a, b in zip(words, (top, total, target), strict=True))


@pytest.mark.parametrize("change", [{}, test_layer.GPT | {"positions": 16}, {"final_norm": False}])
def test_head_against_differences(change):
    # Two sockets of 16 columns each, of which 21 are tokens. The loss's slope along a direction d is sum(g d), by central
    # differences of float64; products round their results to eight bits.
    m = replace(MODEL, vocab=21, **change)
    p = machine().params()
    rng = np.random.default_rng(11)
    own = [ends(m, p, rng, 2) for _ in range(2)]
    weights = [own[0] | {"lm_head": w["lm_head"]} for w in own]
    x, targets = rdu_layer.words(rng.normal(size=(16, m.d_model))), rng.integers(21, size=16)
    at, found = reference.head(m, weights, x, targets, reference.Cuts(lanes=8), p)

    def real(a):
        return a.view(np.float32).astype(float)

    def loss(w):
        a = w["x"]
        if m.final_norm:
            a = a - a.mean(1, keepdims=True) if m.norm == "layernorm" else a
            a = a / np.sqrt((a * a).mean(1, keepdims=True) + float(m.norm_eps))
            a = a * w["final_norm"] + w.get("final_norm_bias", 0)
        logits = a @ w["lm_head"][:21].T
        return np.mean(np.log(np.exp(logits).sum(1)) - logits[np.arange(16), targets])

    exact = {name: real(weights[0][weight_of(name)]) for name in found[0] if name != "lm_head"}
    exact |= {"x": real(x), "lm_head": np.concatenate([real(w["lm_head"]) for w in weights])}
    mean = np.mean(real(at["top"]) + np.log(real(at["total"])) - real(at["target"]))
    assert mean == pytest.approx(loss(exact), rel=0.01)
    slopes = {name: real(g) for name, g in found[0].items()} | {"x": real(at["dx"])}
    slopes["lm_head"] = np.concatenate([real(g["lm_head"]) for g in found])
    assert not slopes["lm_head"][21:].any()
    for name, g in slopes.items():
        for d in (g, *(rng.normal(size=g.shape) for _ in range(3))):
            d = d / np.linalg.norm(d)
            up, down = (loss(exact | {name: exact[name] + h * d}) for h in (1e-5, -1e-5))
            assert abs((up - down) / 2e-5 - np.sum(g * d)) < 0.02 * np.linalg.norm(g), name


def test_rows_of_a_table_take_the_gradients_of_all_their_tokens():
    rng = np.random.default_rng(12)
    dx, tokens = rdu_layer.words(rng.normal(size=(16, 4))), rng.integers(3, 8, size=16)
    expected = np.zeros((8, 4))
    np.add.at(expected, tokens, dx.view(np.float32))
    found = [reference.embedding_dw(tokens, dx, first, 4) for first in (0, 4)]
    found = np.concatenate(found).view(np.float32)
    assert np.abs(found - expected).max() < 2**-8 * np.abs(expected).max()
    assert not found[:3].any()


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
    assert {"final_norm to final_norm_dx", "embedding_dw"} <= {s["op"] for s in found["spans"]}
    assert any("of which the host makes the loss" in text for text in found["assumed"])
