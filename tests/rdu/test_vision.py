"""Images of a prompt: patches through the tower's layers to the prompt's first rows, the reference's bits."""

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
from tilewright.mappers.rdu import _Mapper, document_of, map_model, vision
from tilewright.mappers.rdu.layer import Share
from tilewright.mappers.rdu.stages import first_column
from tilewright.workloads import rdu_layer as reference
from tilewright.workloads.models import Vision, load_model
from tilewright.workloads.rdu import blank_image, interpret

TOWER = replace(
    test_layer.MODEL, name="tower", layers=2, kv_heads=2, vocab=0, **test_layer.GPT | {"activation": "quick_gelu"},
    causal=False, embedding_norm=True, final_norm=False,
)  # fmt: skip
SEEN = Vision(tower=TOWER, image=8, patch=2, channels=3, columns=16, activation="gelu")
MODEL = replace(test_layer.MODEL, vision=SEEN)
ROWS = SEEN.tokens + 1
QUICK = {"granule": 16, "moves": 20_000}


def strips(line, tensor, own, stages):
    """The bytes of a product's weights, strip after strip of each memory unit."""
    name = tensor.removesuffix(".w")
    units = [u for u in line.units if u.startswith(f"{name}.w") and u.endswith(".0")]
    count, (depth, n) = line.units[units[0]].fields["read_count1"], own.shape
    width = count * stages
    whole = np.zeros((depth, max(n, width)), np.uint32)
    whole[:, :n] = own
    held = []
    for j in range(len(units)):
        at = first_column(j, len(units), width, n)
        words = whole[:, at : at + width].reshape(depth, count, -1).transpose(1, 0, 2).ravel()
        held.append(np.pad(words, (0, -len(words) % 8)))
    return half(np.concatenate(held))


def run(prompt, mapping, batch=1):
    """A prompt with images: (rows of the last sequence that the machine gives, those of the reference)."""
    spec = machine()
    p, m = spec.params(), MODEL
    scenario = Scenario(prompt=prompt, generate=0, batch=batch, embedding=False, lm_head=False)
    mapper = _Mapper(spec, m, scenario, document_of(spec, QUICK | mapping, vision.KEYS) | mapping)
    mapper.plan()
    rng = np.random.default_rng(3)
    w, make = test_layer.random_weights(m, rng)
    layers = [test_layer.random_weights(TOWER, rng)[0] for _ in range(TOWER.layers)]
    outer = {
        "patches": make(SEEN.patch_elements, 16), "table": make(ROWS, 16), "pre_norm.gain": make(16),
        "pre_norm.bias": make(16), "up": make(16, 16), "up.bias": make(16), "down": make(16, 16), "down.bias": make(16),
    }  # fmt: skip
    x, cos, sin = make(prompt, 16), make(prompt, 8), make(prompt, 8)
    pixels = make(batch * mapper.images, SEEN.tokens, SEEN.patch_elements)
    image = blank_image(p)

    def blocked(a):
        padded = np.pad(a, ((0, -len(a) % p.lanes), (0, 0)))
        return half(padded.reshape(-1, p.lanes, a.shape[1]).transpose(0, 2, 1))

    def put(at, data):
        image["hbm"][at : at + len(data)] = data

    put(mapper.memory.address["rows", "x", -1], blocked(x))
    for launch in mapper.launches:
        kernel = mapper.kernels[launch.kernel]
        line = kernel.choice.line
        seen = kernel.phase == vision.PHASE
        own = (layers[launch.layer] if 0 <= launch.layer < TOWER.layers else outer) if seen else w
        for r, at in zip(line.arguments, mapper.memory.arguments(launch).values(), strict=True):
            if r.offset:
                continue
            if r.tensor == vision.PIXELS:
                start = at - launch.slot[r.tensor]
                for i, patches in enumerate(pixels):
                    put(start + i * line.extents[r.tensor], blocked(patches))
            elif r.tensor in ("cos", "sin"):
                put(at, blocked({"cos": cos, "sin": sin}[r.tensor]))
            elif r.tensor == "table":
                put(at, blocked(outer["table"]))
            elif r.tensor.endswith(".w"):
                put(at, strips(line, r.tensor, own[r.tensor.split(".")[0]], p.stages))
            elif r.tensor in own:
                put(at, half(own[r.tensor]))
    after, _ = interpret(spec, Program(rdu.ISA, mapper, mapper.tags), image)
    got = after["hbm"][mapper.memory.address["rows", "z", -1] :][: prompt * 32].view(np.uint16)
    how = reference.Layer()
    sections = mapper.document["sections"]
    room = next(s["keys"] for s in sections if s["phase"] == "prompt" and "attention" in s["operators"])
    for i in range(mapper.images):
        given = reference.image(SEEN, outer, layers, pixels[(batch - 1) * mapper.images + i], ROWS, how, p)
        x[i * SEEN.tokens : (i + 1) * SEEN.tokens] = given
    none = np.zeros((0, m.kv_dim), np.uint32)
    z, _, _ = reference.layer(m, w, x, cos, sin, (none, none), room, how, p)
    return got.reshape(-1, 16, p.lanes).transpose(0, 2, 1).reshape(prompt, 16), z >> 16


@pytest.mark.parametrize(
    ("prompt", "mapping", "batch"), [(24, {}, 1), (40, {"images": 2}, 2), (24, {"fusion": "unfused"}, 1)]
)
def test_values(prompt, mapping, batch):
    # 16 patches and a class token: 17 rows are two blocks and a part of a third, whose other rows nobody attends to.
    got, expected = run(prompt, mapping, batch)
    assert np.array_equal(got, expected)


def test_padding_is_seen_by_nobody():
    # A row of keys that is none changes nothing: the limit is what the tower has, not what blocks are padded to.
    spec = machine()
    mapper = _Mapper(spec, MODEL, Scenario(prompt=24, generate=0), document_of(spec, QUICK))
    mapper.plan()
    kernel = next(k for k in mapper.kernels if k.name == "vision_attention to mlp_add")
    masks = [s for u in kernel.choice.line.units.values() for s in u.stages if s["operation"] == "less"]
    assert kernel.choice.tiles["keys"] == 32
    assert masks and {s["constant"] for s in masks} == {ROWS}


@pytest.mark.parametrize(
    ("mapping", "prompt", "images"), [({}, 15, 0), ({}, 16, 1), ({}, 47, 1), ({"images": 0}, 47, 0), ({"images": 2}, 47, 2)]
)  # fmt: skip
def test_images_of_a_prompt(mapping, prompt, images):
    assert vision.count(mapping, MODEL, prompt) == images


@pytest.mark.parametrize("images", [3, -1, True, "one"])
def test_images_are_checked(images):
    with pytest.raises(UserError, match=r"images must be in 0\.\.2, not .*: an image is 16 tokens"):
        vision.count({"images": images}, MODEL, 47)


def test_images_need_a_tower():
    spec = machine()
    with pytest.raises(UserError, match="unknown key 'images'"):
        map_model(spec, replace(MODEL, vision=None), Scenario(prompt=24, generate=0), {"images": 1})


def test_the_tower_of_llava_on_a_node():
    # 16 heads and 4096 columns of the MLP on eight sockets; 588 elements of a patch; 576 of its tokens, 23 of 24 layers.
    seen = load_model("llava-1.5-7b").vision
    share = Share(seen.tower, load_spec("sn40l-node").node.sockets)
    assert (share.heads, share.inner) == (2, 512)
    assert (seen.patch_elements, seen.tokens, seen.tower.layers) == (588, 576, 23)
