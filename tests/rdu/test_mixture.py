"""Mixtures of experts: whose weights a section reads follows from a trace, and what comes out is the reference's bits."""

from dataclasses import replace

import numpy as np
import pytest

from tests.rdu import test_layer
from tests.rdu.test_layer import half, machine
from tilewright.arch import rdu
from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program
from tilewright.arch.registry import load_spec
from tilewright.arch.scenario import Scenario
from tilewright.mappers.rdu import _Mapper, document_of, mixture
from tilewright.mappers.rdu.layer import Share
from tilewright.mappers.rdu.stages import first_column
from tilewright.mappers.rdu.vectors import Vectors
from tilewright.workloads import rdu_layer as reference
from tilewright.workloads.models import load_model
from tilewright.workloads.rdu import blank_image, interpret

CONTEXT, KEYS, EXPERTS = 12, 16, 4
MODEL = replace(
    test_layer.MODEL, layers=2, d_model=32, head_dim=16, d_embed=32, experts=EXPERTS, experts_per_token=2, d_expert=24
)  # fmt: skip
QUICK = {"granule": KEYS, "moves": 20_000}


def random_weights(rng):
    """By operator and, for those of an expert, its number."""
    w, make = test_layer.random_weights(replace(MODEL, d_ff=MODEL.d_expert), rng)
    w["router"] = reference.words(rng.normal(size=(MODEL.d_model, EXPERTS)))
    for name in ("up", "down", "gate"):
        shape = w.pop(name).shape
        w |= {f"{name}_{e}": make(*shape) for e in range(EXPERTS)}
    return w


def step(mapping, batch=1, seed=0):
    """A step for `batch` sequences: (what the machine gives, what the reference gives), and the mapper."""
    spec = machine()
    p, m = spec.params(), MODEL
    scenario = Scenario(context=CONTEXT, generate=1, batch=batch, embedding=False, lm_head=False, seed=seed)
    document = document_of(spec, QUICK | mapping, mixture.KEYS) | mapping
    mapper = _Mapper(spec, m, scenario, document)
    mapper.plan()
    rng = np.random.default_rng(seed + 1)
    layers = [random_weights(rng) for _ in range(m.layers)]
    x, cos, sin = (reference.words(rng.normal(size=s)) for s in ((batch, 32), (16,), (16,)))
    past = reference.words(rng.normal(size=(m.layers, 2, batch, KEYS, m.kv_dim)) / 2)
    mask = reference.words(np.where(np.arange(KEYS) < CONTEXT, 0, reference.LOWEST))
    image = blank_image(p)

    def weights(choice, tensor, w):
        return test_layer.streamed(choice.line, choice.banks, choice.tiles["gates"], tensor, w, p.lanes)

    def put(at, data, tier="hbm"):
        image[tier][at : at + len(data)] = data

    put(mapper.memory.address["rows", "x", -1], half(x))
    for layer in range(m.layers):
        for i, name in enumerate(("keys", "values")):
            whole = np.zeros((batch, m.kv_dim, mapper.pitch), np.uint32)
            whole[:, :, :KEYS] = past[layer, i].transpose(0, 2, 1)
            put(mapper.memory.address["cache", name, layer], half(whole))
    for launch in mapper.launches:
        if not hasattr(launch, "kernel"):
            continue
        kernel, w = mapper.kernels[launch.kernel], layers[launch.layer]
        for r, at in zip(kernel.choice.line.arguments, mapper.memory.arguments(launch).values(), strict=True):
            if r.tensor in ("cos", "sin", "mask") and not r.offset:
                put(at, half({"cos": cos, "sin": sin, "mask": mask}[r.tensor]))
            elif r.tensor == "weights" and not r.offset:
                put(at, weights(kernel.choice, "weights", w))
            elif r.tensor.endswith(".gain"):
                put(at, half(w[r.tensor]))
        for tensor in kernel.choice.line.extents:
            if not tensor.startswith("expert."):
                continue
            slot = tensor.removeprefix("expert.")
            for e in range(EXPERTS):
                named = {f"{name}_{slot}": w[f"{name}_{e}"] for name in ("up", "down", "gate")}
                own = weights(kernel.choice, tensor, named)
                number = mapper.memory.residence.number[kernel.phase, launch.layer, e]
                tier = "hbm" if mapper.memory.residence.fixed else "ddr"
                within = mapper.memory._within[mapper.memory._stored(kernel, tensor)]
                put(mapper.memory._first_expert[tier] + number * mapper.memory._region + within, own, tier)
    after, _ = interpret(spec, Program(rdu.ISA, mapper, mapper.tags), image)
    at = mapper.memory.address["rows", "x", -1]  # of two layers: x -> z -> x
    got = after["hbm"][at : at + batch * 64].view(np.uint16).reshape(batch, 32)
    banks = {b.name: b.part + 1 for k in mapper.kernels for b in k.choice.banks}
    how = reference.Layer(1, banks["qkv"], banks["down_0"])
    expected = []
    for b in range(batch):
        row = x[b]
        for layer, w in enumerate(layers):
            row, _, _ = reference.token_layer(
                m, w, row, cos, sin, tuple(past[layer, :, b]), np.broadcast_to(mask, (m.heads, KEYS)), how, p, p.lanes,
                mapper.trace.of(b, layer),
            )  # fmt: skip
        expected.append(row >> 16)
    return got, np.array(expected), mapper


@pytest.mark.parametrize(
    ("mapping", "batch"),
    [
        ({}, 1),
        ({"requests": [[[3, 1], [0, 2]]]}, 1),
        ({"fusion": "unfused"}, 1),
        ({"regions": 2}, 1),
        ({"requests": [[[0, 1], [3, 2]], [[1, 0], [2, 1]], [[1, 2], [0, 2]]]}, 3),
        ({"regions": 3}, 2),
    ],
)
def test_values(mapping, batch):
    got, expected, mapper = step(mapping, batch)
    assert np.array_equal(got, expected)
    assert mapper.memory.residence.fixed == ("regions" not in mapping)


def prompt(rows, mapping, seed=0):
    """A prompt of the first layer: (what the machine gives, what the reference gives), and the mapper."""
    spec = machine()
    p, m = spec.params(), replace(MODEL, layers=1)
    scenario = Scenario(prompt=rows, generate=0, embedding=False, lm_head=False, seed=seed)
    mapper = _Mapper(spec, m, scenario, document_of(spec, QUICK | mapping, mixture.KEYS) | mapping)
    mapper.plan()
    rng = np.random.default_rng(seed + 1)
    w = random_weights(rng)
    x, cos, sin = (reference.words(rng.normal(size=s)) for s in ((rows, 32), (rows, 16), (rows, 16)))
    image = blank_image(p)

    def blocked(a):
        return half(a.reshape(-1, p.lanes, a.shape[1]).transpose(0, 2, 1))

    def put(at, data):
        image["hbm"][at : at + len(data)] = data

    def product(line, tensor, name, own):
        """The strips of a product, as its memory units hold them; its parts are not cut on this machine."""
        units = [u for u in line.units if u.startswith(f"{name}.w") and u.endswith(".0")]
        strips, (depth, n) = line.units[units[0]].fields["read_count1"], own.shape
        width = strips * p.stages
        whole = np.zeros((depth, max(n, width)), np.uint32)
        whole[:, :n] = own
        held = []
        for j in range(len(units)):
            at = first_column(j, len(units), width, n)
            words = whole[:, at : at + width].reshape(depth, strips, -1).transpose(1, 0, 2).ravel()
            held.append(np.pad(words, (0, -len(words) % p.lanes)))
        return half(np.concatenate(held))

    put(mapper.memory.address["rows", "x", -1], blocked(x))
    for launch in mapper.launches:
        if not hasattr(launch, "kernel"):
            continue
        line = mapper.kernels[launch.kernel].choice.line
        for r, at in zip(line.arguments, mapper.memory.arguments(launch).values(), strict=True):
            if r.offset:
                continue
            if r.tensor in ("cos", "sin"):
                put(at, blocked({"cos": cos, "sin": sin}[r.tensor]))
            elif r.tensor.endswith(".gain"):
                put(at, half(w[r.tensor]))
            elif r.tensor.startswith("slot."):
                numbers = np.array([mapper.trace.of(t, 0)[int(r.tensor[5:])] for t in range(rows)], np.uint32)
                put(at, numbers.view(np.uint8))
            elif r.tensor.endswith(".w"):
                name = r.tensor[:-2].removeprefix("expert.0.")
                op = name.split(".")[0]
                own = w[f"{op[:-1]}{launch.experts[0]}" if launch.experts else op]
                put(at, product(line, r.tensor, name, own))
    after, _ = interpret(spec, Program(rdu.ISA, mapper, mapper.tags), image)
    got = after["hbm"][mapper.memory.address["rows", "z", -1] :][: rows * 64].view(np.uint16)
    got = got.reshape(-1, 32, p.lanes).transpose(0, 2, 1).reshape(rows, 32)
    sections = mapper.document["sections"]
    attends = next(s for s in sections if "attention" in s["operators"])
    none = np.zeros((0, m.kv_dim), np.uint32)
    z, _, _ = reference.layer(
        m, w, x, cos, sin, (none, none), attends["keys"], reference.Layer(attends["chunks"], 1, 1), p,
        chosen=[mapper.trace.of(t, 0) for t in range(rows)],
    )  # fmt: skip
    return got, z >> 16, mapper


@pytest.mark.parametrize("trace", [False, True])
def test_prompts(trace):
    # All rows go to experts 0 and 3, more than a section is made for: eight on average, twice that at once.
    mapping = {"requests": [[[3, 0]]] * 31 + [[[1, 2]]]} if trace else {}
    got, expected, mapper = prompt(32, mapping)
    assert np.array_equal(got, expected)
    assert mapper.infos and any(info.op == "move rows" for info in mapper.infos)


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"requests": [[[0, 1]]]}, r"mapping: requests\[0\] must be a list of the 2 layers, not 1"),
        ({"requests": [[[0, 1], [2, 4]]]}, r"mapping: requests\[0\]\[1\] must list experts in 0..3, not 4"),
        ({"requests": [[[0, 1], [2, 2]]]}, r"requests\[0\]\[1\] must list different experts, not \[2, 2\]"),
        ({"requests": 3}, "mapping: requests must be a list of the 1 tokens, not 3"),
    ],
)
def test_traces_are_checked(mapping, message):
    with pytest.raises(UserError, match=message):
        mixture.Trace.read(mapping, MODEL, 1, 0)


def test_experts_give_way_by_use():
    # Two regions: 0 and 1 are copied, 0 is there, 2 takes the place of 1, which was used before 0.
    held = mixture.Residence([("token", 0, e) for e in range(3)], 2)
    found = [held.use([("token", 0, e)]) for e in (0, 1, 0, 2, 0)]
    assert [regions for regions, _ in found] == [[0], [1], [0], [1], [0]]
    assert [len(places) for _, places in found] == [1, 1, 0, 1, 0]
    assert (held.copies, held.uses) == (3, 5)


def test_gpt2_xl_fits_eight_sockets():
    # 100 packets of 16 columns are no eight equal slices: 104 are. 25 heads are four on each socket.
    builder = Vectors(load_spec("sn40l-node").params(), Share(load_model("gpt2-xl"), 8))
    assert [builder.columns(t) for t in ("x", "o_part", "o", "a")] == [1600, 1664, 1664, 256]
