"""Steps of training: what the machine gives for a layer, the reference's bits; the reference against float64."""

from dataclasses import replace

import numpy as np
import pytest

from tests.rdu import test_layer
from tests.rdu.test_layer import half, machine
from tilewright.arch import rdu
from tilewright.arch.isa import Program
from tilewright.arch.scenario import Scenario
from tilewright.mappers.rdu import _Mapper, document_of, train
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
            own = w.get(name, w.get(f"{name}.gain"))
            flat = blocked(own) if own.ndim == 2 else own
            put(f"{name}.{'w' if own.ndim == 2 else 'gain'}", layer, half(flat))
            if name in train.GAINS and f"{name}.bias" in w:
                put(f"{name}.bias", layer, half(w[f"{name}.bias"]))
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
    expected, got, rows = {}, {}, [x]
    for w in weights:
        rows.append(reference.gradients(m, w, rows[-1], dz, cos, sin, how, p)[0]["z"])
    for layer in reversed(range(layers)):
        at, found = reference.gradients(m, weights[layer], rows[layer], dz, cos, sin, how, p)
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


def _cuts(line, op):
    """Pieces of the depth of a product of the backward pass."""
    if op.kind != "product_dx":
        return 0
    return len({u.rsplit(".x.", 1)[0] for u in line.units if u.startswith(f"{op.name}.0.") and ".x." in u})


@pytest.mark.parametrize(
    ("change", "tokens", "mapping", "layers"),
    [({}, 16, {"fusion": "unfused"}, 1), ({}, 32, {}, 2)],
)
def test_values(change, tokens, mapping, layers):
    got, expected = step(replace(MODEL, **change), tokens, mapping, layers=layers)
    wrong = [name for name in expected if not np.array_equal(got[name], expected[name])]
    assert not wrong
