"""Models as programs: what `map_model` plans, counts and tells."""

from dataclasses import replace

import pytest

from tilewright.arch import rdu
from tilewright.arch import spec as specs
from tilewright.arch.errors import UserError
from tilewright.arch.scenario import Scenario
from tilewright.mappers.rdu import _Mapper, document_of, map_model
from tilewright.mappers.rdu.layer import Share, layer_operators
from tilewright.mappers.rdu.plan import Limits, kept, plan_rows, plan_vectors
from tilewright.mappers.rdu.search import HOPELESS, Search
from tilewright.mappers.rdu.section import Section
from tilewright.sim.rdu import simulate
from tilewright.workloads.models import ModelConfig, load_model

MODEL = ModelConfig(
    name="tiny", family="llama", layers=2, d_model=64, heads=2, kv_heads=1, head_dim=32, d_ff=96, vocab=64,
    positions=None, activation="silu", gated_mlp=True, norm="rmsnorm", norm_eps="1e-05", position="rotary",
    tie_embeddings=False, qkv_bias=False, attention_out_bias=False, mlp_bias=False, d_embed=64, source="",
)  # fmt: skip
QUICK = {"moves": 200_000, "granule": 64}


def machine(name="sn40l", *sets):
    tree = specs.load_tree(name, ["rdu"])
    small = ("grid.columns=24", "grid.rows=20", "grid.dies=1", "agcu.per_side=20", *sets)
    return specs.build(rdu.RduSpec, specs.apply_sets(tree, small), "small")


def segments(mapped):
    return list(mapped.program.segments)


def code(segment):
    ops = [op.name for op in rdu.OPS]
    return [ops[i] for i in segment.regions["code"]["op"]]


def test_a_token_is_one_kernel_a_layer():
    mapped = map_model(machine(), MODEL, Scenario(context=64, generate=2), QUICK)
    # An embedding, two layers and the LM head for each of the steps; cached tokens 64 and 65: two kernels of layers.
    assert mapped.steps == 8 == len(segments(mapped))
    assert list(mapped.step_of) == [0] * 4 + [1] * 4
    kinds = [code(s) for s in segments(mapped)]
    whole = ["PROGRAM_LOAD", "ARGUMENT_LOAD", "KERNEL_EXECUTE"]
    assert kinds == [["COPY", "WAIT"], whole, whole[1:], whole] * 2
    assert [info.layer for info in mapped.tags][:3] == [-1, 0, 1]


def test_layers_differ_by_their_arguments():
    mapped = map_model(
        machine(), MODEL, Scenario(context=64, generate=1, embedding=False, lm_head=False), QUICK
    )
    first, second = (s.regions["args"]["value"] for s in segments(mapped))
    kernel = mapped.document["sections"][0]
    assert kernel["keys"] == 64
    assert (first != second).any()
    # The second layer reads what the first wrote, and writes where that read: x and z change places.
    assert {int(v) for v in first} & {int(v) for v in second}


def test_the_mapped_token_runs():
    spec = machine()
    mapped = map_model(spec, MODEL, Scenario(context=64, generate=1, embedding=False, lm_head=False), QUICK)
    timeline = simulate(spec.params(), mapped.program)
    assert timeline.counter("launches") == 2


def test_unfused_is_a_kernel_an_operator():
    scenario = Scenario(context=64, generate=1, embedding=False, lm_head=False)
    mapped = map_model(machine(), MODEL, scenario, {**QUICK, "fusion": "unfused", "orchestration": "host"})
    assert mapped.steps == MODEL.layers * len(layer_operators(MODEL))
    assert all(s.regions["code"]["host"][-1] for s in segments(mapped))
    fused = map_model(machine(), MODEL, scenario, QUICK)
    assert set(fused.beside) == {"unfused", "unfused, hardware", "host"}
    assert mapped.beside == {}


def test_places_are_looked_for_longer_where_streams_would_wait_for_one_another(monkeypatch):
    # Streams are said to wait for one another but with the second seed; then, whatever is tried.
    tries = []
    build = Section.build

    def built(self, **fields):
        tries.append((fields["seed"], fields["moves"]))
        return build(self, **fields)

    def mapper():
        tries.clear()
        scenario = Scenario(context=64, generate=1, embedding=False, lm_head=False)
        out = _Mapper(machine(), MODEL, scenario, document_of(machine(), QUICK | {"moves": 100_000}))
        out.plan()
        return out

    monkeypatch.setattr(Section, "build", built)
    monkeypatch.setattr(Search, "kept_apart", lambda *args: (int(tries[-1][0] == 0), *args[1:]))
    assert not any(kernel.blocked for kernel in mapper().kernels)
    assert tries == [(0, 100_000), (0, 800_000), (1, 800_000)]
    monkeypatch.setattr(Search, "kept_apart", lambda *args: (HOPELESS + 1, *args[1:]))
    assert [kernel.blocked for kernel in mapper().kernels] == [HOPELESS + 1]
    assert tries[:2] == [(0, 100_000), (0, 800_000)] and len(tries) > 2  # smaller sections after that


def test_prompts_store_keys_before_attention():
    mapped = map_model(
        machine(), MODEL, Scenario(prompt=32, generate=0, embedding=False, lm_head=False), QUICK
    )
    operators = [s["operators"] for s in mapped.document["sections"]]
    assert operators[0] == ["attention_norm", "qkv", "rotary"]
    assert operators[1][0] == "attention"
    assert sum(len(o) for o in operators) == len(layer_operators(MODEL))


@pytest.mark.parametrize("scenario", [Scenario(prompt=32, generate=0), Scenario(train=32, generate=0)])
def test_sparse_weights_over_sockets(scenario):
    # One in four weights: fewer bytes move, but as many between the sockets.
    spec = machine("sn40l-node", "node.sockets=2")
    model, whole = replace(MODEL, layers=1, kv_heads=2), {"lm_head": False, "embedding": False}
    dense, sparse = (
        simulate(spec.params(), map_model(spec, m, replace(scenario, **whole), QUICK).program)
        for m in (model, replace(model, weight_groups=4))
    )
    assert sparse.counter("hbm_lines") < dense.counter("hbm_lines")
    assert sparse.counter("remote_lines") == dense.counter("remote_lines") > 0


def test_sockets_share_heads_and_columns():
    share = Share(load_model("llama-2-70b"), 8)
    assert (share.heads, share.kv_heads, share.inner) == (8, 1, 3584)
    assert (share.q_dim, share.kv_dim) == (1024, 128)
    names = [op.name for op in layer_operators(share.model, 8)]
    assert [n for n in names if n.endswith("_reduce")] == ["attention_out_reduce", "down_reduce"]


@pytest.mark.parametrize("name", ["llama-2-7b", "mistral-7b", "llama-2-70b", "falcon-40b", "bloom-176b"])
def test_published_models_have_a_section_a_layer(name):
    """The next token's layer is one section of a socket of the node, but for the largest model."""
    spec = specs.build(rdu.RduSpec, specs.load_tree("sn40l-node", ["rdu"]), "sn40l-node")
    p, model = spec.params(), load_model(name)
    share = Share(model, 8)
    ops = layer_operators(model, 8, token=True)
    limits = Limits(p.pcus, p.pmus, 2 * p.agcus_per_side)
    found = plan_vectors(p, share, ops, ("z",), limits, batch=1, keys=2048, pitch=4096)
    if name == "bloom-176b":  # 12 * 14336 ** 2 / 8 words of weights are twice what a socket's 1040 PMUs hold
        assert found is None
        return
    assert found is not None
    weights = sum(n for unit, n in found.line.traffic.items() if unit.startswith("weights"))
    params = model.parameters
    exact = 2 * (params["attention"] + params["mlp"]) / model.layers / 8
    assert exact <= weights < 1.2 * exact  # whole strips, and a share each


def test_rows_take_the_units_they_need():
    spec = specs.build(rdu.RduSpec, specs.load_tree("sn40l-node", ["rdu"]), "sn40l-node")
    p, model = spec.params(), load_model("llama-2-7b")
    ops = layer_operators(model, 8)
    first = [op.kind for op in ops].index("attention")
    choice = plan_rows(
        p, Share(model, 8), ops[:first], kept(ops[:first], ops[first:], ["z"]), Limits(900, 900, 80), rows=1024, keys=1024,
        pitch=1280, context=0, window=None,
    )  # fmt: skip
    assert choice is not None
    # The products alone: 1024 rows of 4096 x 1536 on 16 x 12 multipliers a tick.
    work = 1024 * 4096 * 1536 // (16 * 12)
    assert choice.line.interval()[0] * choice.line.count("pcu") >= work
    assert choice.line.count("pcu") <= 900


def test_pictures():
    mapped = map_model(machine(), MODEL, Scenario(context=64, generate=1, lm_head=False), QUICK)
    assert mapped.draw is not None
    assert mapped.draw().startswith("<svg")


@pytest.mark.parametrize(
    ("mapping", "message"),
    [
        ({"fusion": "half"}, "mapping: fusion must be one of fused, unfused, not 'half'"),
        ({"granule": 0}, "mapping: granule must be in 1..1048576, not 0"),
        ({"grnule": 1}, "mapping: unknown key 'grnule'"),
    ],
)
def test_choices_are_checked(mapping, message):
    with pytest.raises(UserError, match=message):
        map_model(machine(), MODEL, Scenario(context=64, generate=1), mapping)


def test_what_is_not_supported():
    mixture = replace(MODEL, experts=4, experts_per_token=2, d_expert=MODEL.d_ff)
    with pytest.raises(UserError, match="mixtures with experts that all tokens go to"):
        map_model(machine(), replace(mixture, d_shared_expert=32), Scenario(generate=1))
    with pytest.raises(UserError, match="norms within attention"):
        map_model(machine(), replace(MODEL, qk_norm=True), Scenario(generate=1))
    with pytest.raises(UserError, match="does not decode with sparse weights"):
        map_model(machine(), replace(MODEL, weight_groups=2), Scenario(prompt=8, generate=1))
    with pytest.raises(UserError, match="a prompt needs systolic arrays"):
        map_model(machine("plasticine"), MODEL, Scenario(prompt=8, generate=0))
