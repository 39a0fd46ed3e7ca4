"""Whole layers on a small machine: interpreted, they give the bits of the reference."""

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from tilewright.arch import rdu
from tilewright.arch import spec as specs
from tilewright.arch.errors import UserError
from tilewright.arch.isa import Program
from tilewright.mappers.rdu.layer import Share, Tiles, layer_operators, slope
from tilewright.mappers.rdu.plan import kept
from tilewright.mappers.rdu.rows import Rows
from tilewright.mappers.rdu.section import Section, segment
from tilewright.mappers.rdu.stages import first_column
from tilewright.mappers.rdu.vectors import Vectors, shares_of
from tilewright.workloads import rdu_layer as reference
from tilewright.workloads.models import ModelConfig
from tilewright.workloads.rdu import blank_image, interpret

LANES = 8
MODEL = ModelConfig(
    name="tiny", family="llama", layers=1, d_model=16, heads=2, kv_heads=1, head_dim=8, d_ff=24, vocab=32,
    positions=None, activation="silu", gated_mlp=True, norm="rmsnorm", norm_eps="1e-05", position="rotary",
    tie_embeddings=False, qkv_bias=False, attention_out_bias=False, mlp_bias=False, d_embed=16, source="",
)  # fmt: skip
BIASED = {"qkv_bias": True, "attention_out_bias": True, "mlp_bias": True}
GPT = {"norm": "layernorm", "activation": "gelu_tanh", "gated_mlp": False, "position": "learned", **BIASED}
UNITS = {"qkv": 2, "attention_out": 1, "gate": 3, "up": 2, "down": 2}


def machine(stages=8, sockets=1, sets=()):
    tree = specs.load_tree("plasticine", ["rdu"])
    sets = [
        f"pcu.lanes={max(LANES, 16 if stages > 8 else 8)}", f"pcu.stages={stages}", "pmu.banks=32", "pmu.bytes=65536",
        "pcu.systolic=true", "memory.ddr.channels=16", "memory.hbm.channels=16", "memory.hbm.bytes=1048576",
        "node.p2p_channels=16", "grid.columns=24", "grid.rows=16", "agcu.per_side=16",
        f"node.sockets={sockets}", *sets,
    ]  # fmt: skip
    return specs.build(rdu.RduSpec, specs.apply_sets(tree, sets), "small")


def half(words):
    """bfloat16 words as the bytes that are off chip."""
    return np.ascontiguousarray((np.asarray(words) >> 16).astype(np.uint16)).view(np.uint8).ravel()


def streamed(line, banks, gates, tensor, w, lanes):
    """The bytes of a section's weights, `w` by operator, in the order in which its gates load them."""
    held = []
    for i, share in enumerate(shares_of(banks, tensor, gates)):
        words = []
        for bank, j in share:
            own = w[bank.name][bank.part * bank.depth : (bank.part + 1) * bank.depth]
            whole = np.pad(own, ((0, 0), (0, bank.units * bank.strips * lanes - own.shape[1])))
            strips = whole.reshape(bank.depth, bank.units, bank.strips, lanes)[:, j]
            words.append(strips.transpose(1, 0, 2).reshape(-1, lanes))
        fields = line.units[f"{tensor}.load{i}"].fields
        room = fields["count0"] * fields["count1"]
        held.append(np.pad(np.concatenate(words), ((0, room - sum(map(len, words))), (0, 0))))
    return half(np.concatenate(held))


class Memory:
    """Tensors at addresses, each on lines of its own."""

    def __init__(self, line):
        self.line, self.at, self.parts = line, {}, []
        self.size = 0

    def put(self, name, data):
        self.at[name] = self.size
        self.parts.append((self.size, np.asarray(data, np.uint8)))
        self.size += -(-len(data) // self.line) * self.line + self.line

    def fill(self, image):
        for at, data in self.parts:
            image["hbm"][at : at + len(data)] = data
        return image


def run(spec, lines, memory, fill, execute=None, seed=0):
    """The HBM behind the sections `lines`, one after the other; `fill` gives what an argument points to and is not there.

    `execute(spec, program, image)` gives the image behind them; else they are interpreted.
    """
    p = spec.params()
    segments, tags = [], []
    for i, line in enumerate(lines):
        section = Section(p, f"section {i}")
        line.into(section)
        own = {r.tensor: f"weights {i}" if r.tensor == "weights" else r.tensor for r in line.arguments}
        for tensor, name in own.items():
            if name not in memory.at:
                memory.put(name, fill(line, tensor))
        args = {k: memory.at[own[r.tensor]] + r.offset for k, r in enumerate(line.arguments)}
        built = section.build(moves=20_000, seed=seed, remember=False)
        segments.append(segment(built, args=args, index=i, tags=tags))
    program, image = Program(rdu.ISA, segments, tags), memory.fill(blank_image(p))
    after = execute(spec, program, image) if execute else interpret(spec, program, image)[0]
    return after["hbm"]


def random_weights(model, rng):
    def make(*shape):
        return reference.words(rng.normal(size=shape) / 2)

    m, d = model, model.d_model
    w = {"qkv": make(d, m.q_dim + 2 * m.kv_dim), "attention_out": make(m.q_dim, d), "up": make(d, m.d_ff)}
    w |= {"down": make(m.d_ff, d)} | ({"gate": make(d, m.d_ff)} if m.gated_mlp else {})
    for name in ("attention_norm", "mlp_norm"):
        w[f"{name}.gain"] = make(d)
        if m.norm == "layernorm":
            w[f"{name}.bias"] = make(d)
    if m.qkv_bias:
        w["qkv.bias"] = make(m.q_dim + 2 * m.kv_dim)
    if m.attention_out_bias:
        w["attention_out.bias"] = make(d)
    if m.mlp_bias:
        w |= {"up.bias": make(m.d_ff), "down.bias": make(d)} | (
            {"gate.bias": make(m.d_ff)} if m.gated_mlp else {}
        )
    return w, make


def prompt(model, *, rows, tiles, context=0, keys=None, window=None, stages=8, sets=()):
    """(rows that the machine gives, rows of the reference), bfloat16 in 16 bits."""
    spec = machine(stages, sets=sets)
    p = spec.params()
    lanes, m, d = p.lanes, model, model.d_model
    keys = keys or context + rows
    w, make = random_weights(m, np.random.default_rng(1))
    x, cos, sin = make(rows, d), make(rows, m.head_dim), make(rows, m.head_dim)
    past = make(context, m.kv_dim), make(context, m.kv_dim)

    def blocked(a):
        return half(a.reshape(-1, lanes, a.shape[1]).transpose(0, 2, 1))

    memory = Memory(4 * lanes)
    for name, a in {"x": x, "cos": cos, "sin": sin}.items():
        memory.put(name, blocked(a))
    for name, columns in (("q", m.q_dim), ("y", d), ("z", d)):
        memory.put(name, np.zeros(rows * columns * 2, np.uint8))
    for name, old in zip(("keys", "values"), past, strict=True):
        cache = np.zeros((m.kv_dim, keys), np.uint32)
        cache[:, :context] = old.T
        memory.put(name, half(cache))

    def fill(line, tensor):
        if not tensor.endswith(".w"):
            return half(w[tensor])
        name = tensor[:-2]
        op, out, part, *group = name.split(".")
        units = [u for u in line.units if u.startswith(f"{name}.w") and u.endswith(".0")]
        outs = {
            r.tensor.split(".")[1]
            for r in line.arguments
            if r.tensor.startswith(f"{op}.") and r.tensor.endswith(".w")
        }
        parts = {
            r.tensor.split(".")[2]
            for r in line.arguments
            if r.tensor.startswith(f"{op}.") and r.tensor.endswith(".w")
        }
        own = np.split(np.split(w[op], len(outs), axis=1)[int(out)], len(parts))[int(part)]
        if group:
            of_row, of_column = (
                np.split(reference.members(n, m.weight_groups, t), cuts)[int(at)]
                for n, t, cuts, at in zip(
                    w[op].shape, reference.turns_of(op), (len(parts), len(outs)), (part, out), strict=True
                )
            )
            own = own[of_row == int(*group)][:, of_column == int(*group)]
        strips, (depth, n) = line.units[units[0]].fields["read_count1"], own.shape
        width = strips * p.stages
        whole = np.zeros((depth, max(n, width)), np.uint32)
        whole[:, :n] = own
        held = []
        for j in range(len(units)):
            at = first_column(j, len(units), width, n)
            words = whole[:, at : at + width].reshape(depth, strips, -1).transpose(1, 0, 2).ravel()
            held.append(np.pad(words, (0, -len(words) % lanes)))
        return half(np.concatenate(held))

    ops = layer_operators(m)
    first = [op.kind for op in ops].index("attention")
    lines = []
    for some, keep in (
        (ops[:first], [t for t in ("q", "y") if any(t in op.writes for op in ops[:first])]),
        (ops[first:], ["z"]),
    ):
        builder = Rows(p, Share(m), tiles, keys=keys, context=context, window=window)
        lines.append(builder.build(some, keep))
    hbm = run(spec, lines, memory, fill)
    got = hbm[memory.at["z"] :][: rows * d * 2].view(np.uint16).reshape(-1, d, lanes).transpose(0, 2, 1)
    rotary = m.position == "rotary"
    slopes = None
    if m.position == "alibi":
        scale = np.array([[slope(m.heads, h)] for h in range(m.heads)], np.float32)
        slopes = (scale * np.arange(keys, dtype=np.float32)).view(np.uint32)
    whole = Rows(p, Share(m), tiles)
    how = reference.Layer(tiles.chunks, whole.parts(d), whole.parts(m.d_ff))
    z, _, _ = reference.layer(
        m, w, x, cos if rotary else None, sin if rotary else None, past, keys, how, p, slopes, window
    )
    return got.reshape(rows, d), z >> 16


@pytest.mark.parametrize(
    ("change", "arguments"),
    [
        ({}, {"rows": 32, "tiles": Tiles(1, 4, UNITS)}),
        ({}, {"rows": 32, "context": 8, "keys": 48, "tiles": Tiles(2, 2, UNITS, chunks=2)}),
        ({"kv_heads": 2}, {"rows": 8, "tiles": Tiles(1, 1, UNITS)}),
        (GPT, {"rows": 16, "tiles": Tiles(1, 2, UNITS, chunks=2)}),
        ({**GPT, "post_norm": True, "causal": False}, {"rows": 16, "tiles": Tiles(1, 2, UNITS)}),
        ({"parallel_attention": True, "activation": "relu2"}, {"rows": 16, "tiles": Tiles(1, 2, UNITS)}),
        ({"weight_groups": 2}, {"rows": 32, "tiles": Tiles(1, 4, UNITS)}),
        ({**GPT, "weight_groups": 4}, {"rows": 32, "tiles": Tiles(2, 2, UNITS)}),
    ],
)
def test_prompt(change, arguments):
    got, expected = prompt(replace(MODEL, **change), **arguments)
    assert np.array_equal(got, expected)


@pytest.mark.parametrize("change", [{}, {"norm": "layernorm", "position": "learned", **BIASED}])
def test_queries_keys_and_values_that_one_unit_can_not_hold(change):
    # 8 lanes x 3 x 32 columns x 2 buffers are 1536 words, of 1024.
    model = replace(MODEL, heads=4, kv_heads=4, d_model=32, d_ff=32, **change)
    got, expected = prompt(model, rows=32, tiles=Tiles(1, 4, UNITS), sets=("pmu.bytes=4096",))
    assert np.array_equal(got, expected)


@pytest.mark.parametrize(
    ("change", "window"), [({"position": "alibi", "norm": "layernorm"}, None), ({"sliding_window": 20}, 20)]
)
def test_masks_that_need_many_stages(change, window):
    model = replace(MODEL, **change, d_model=32, head_dim=16, d_ff=32)
    got, expected = prompt(model, rows=32, tiles=Tiles(1, 2, UNITS), window=window, stages=12)
    assert np.array_equal(got, expected)


def token(
    model,
    *,
    context,
    keys,
    pitch=32,
    batch=1,
    chunks=1,
    words=1,
    gates=2,
    cache_gates=1,
    spec=None,
    cuts=(),
    execute=None,
    seed=0,
):
    """(vectors of the machine, of the reference), and (new keys of each).

    `cuts` are the names of operators that begin another section; `execute` and `seed` as of `run`.
    """
    spec = spec or machine()
    p = spec.params()
    lanes, m, d = p.lanes, model, model.d_model
    w, make = random_weights(m, np.random.default_rng(2))
    x, cos, sin = make(batch, d), make(m.head_dim), make(m.head_dim)
    past = make(2, batch, pitch, m.kv_dim)
    mask = reference.words(np.where(np.arange(keys) < context, 0, reference.LOWEST))
    memory = Memory(4 * lanes)
    for name, data in {
        "x": half(x),
        "z": half(x),
        "cos": half(cos),
        "sin": half(sin),
        "mask": half(mask),
    }.items():
        memory.put(name, data)
    for name, cache in zip(("keys", "values"), past, strict=True):
        memory.put(name, half(cache.transpose(0, 2, 1)))
        memory.at[f"{name}.new"] = memory.at[name] + 2 * context
    ops = layer_operators(m, token=True)
    firsts = [0, *(i for i, op in enumerate(ops) if op.name in cuts), len(ops)]
    builders = []
    for first, stop in pairwise(firsts):
        builder = Vectors(
            p,
            Share(m),
            batch=batch,
            keys=keys,
            pitch=pitch,
            chunks=chunks,
            words=words,
            gates=gates,
            cache_gates=cache_gates,
        )
        builder.build(ops[first:stop], kept(ops[first:stop], ops[stop:], ["z"]))
        builders.append(builder)

    def fill(line, tensor):
        if tensor in w:
            return half(w[tensor])
        if tensor != "weights":
            return np.zeros(line.extents[tensor], np.uint8)
        builder = next(b for b in builders if b.line is line)
        return streamed(line, builder.banks, gates, tensor, w, lanes)

    hbm = run(spec, [b.line for b in builders], memory, fill, execute, seed)
    got = hbm[memory.at["z"] :][: 2 * batch * d].view(np.uint16).reshape(batch, d)
    cache = (
        hbm[memory.at["keys"] :][: 2 * batch * pitch * m.kv_dim]
        .view(np.uint16)
        .reshape(batch, m.kv_dim, pitch)
    )
    parts = {bank.name: bank.part + 1 for b in builders for bank in b.banks}
    rotary = m.position == "rotary"
    expected = [
        reference.token_layer(
            m, w, x[g], cos if rotary else None, sin if rotary else None, (past[0][g][:keys], past[1][g][:keys]),
            np.broadcast_to(mask, (m.heads, keys)), reference.Layer(chunks, parts["qkv"], parts["down"]), p, lanes,
        )
        for g in range(batch)
    ]  # fmt: skip
    return (got, np.array([z >> 16 for z, _, _ in expected])), (
        cache[:, :, context],
        np.array([k >> 16 for _, k, _ in expected]),
    )


@pytest.mark.parametrize(
    ("change", "arguments"),
    [
        ({}, {"context": 12, "keys": 16}),
        ({}, {"context": 9, "keys": 16, "batch": 2, "chunks": 2, "words": 256, "gates": 3}),
        ({}, {"context": 31, "keys": 32, "chunks": 4, "cache_gates": 2}),
        ({"kv_heads": 2}, {"context": 0, "keys": 0}),
        ({}, {"context": 12, "keys": 16, "cuts": ("rotary", "attention", "attention_add", "activation")}),
        (GPT, {"context": 17, "keys": 24}),
    ],
)
def test_token(change, arguments):
    model = replace(MODEL, d_model=32, head_dim=16, **change)
    rows, keys = token(model, **arguments)
    assert np.array_equal(*rows)
    assert np.array_equal(*keys)


def test_slopes_of_linear_biases():
    # Eight heads: 2**-1 .. 2**-8. Three: those of two, 2**-4 and 2**-8, and the first of four, 2**-2.
    assert [slope(8, h) for h in range(8)] == [2.0**-n for n in range(1, 9)]
    assert [slope(3, h) for h in range(3)] == [2.0**-4, 2.0**-8, 2.0**-2]


def test_operators_read_what_was_written():
    for change in ({}, GPT, {"parallel_attention": True}, {"post_norm": True}):
        for sockets in (1, 2):
            there = {"x"}
            for op in layer_operators(replace(MODEL, **change), sockets, token=True):
                assert set(op.reads) <= there, op
                there.update(op.writes)
            assert "z" in there


def test_heads_must_fill_vectors():
    spec = machine()
    with pytest.raises(UserError, match="tiny: 20 columns are not a multiple of the 8 lanes"):
        Vectors(spec.params(), Share(replace(MODEL, d_model=20)))
