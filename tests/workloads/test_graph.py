"""Operator graphs: shapes and sums derived by hand, then laws that hold for every model."""

import dataclasses

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.arch.errors import UserError
from tilewright.workloads.graph import OpKind, attended_pairs, decode_step, prefill
from tilewright.workloads.models import ModelConfig, builtin_models, load_model

DECODERS = [n for n in builtin_models() if (m := load_model(n)).causal and m.composition is None]

TINY = ModelConfig(
    name="tiny", family="llama", layers=3, d_model=32, heads=4, kv_heads=2, head_dim=8, d_ff=48, vocab=50,
    positions=None, activation="silu", gated_mlp=True, norm="rmsnorm", norm_eps="1e-05", position="rotary",
    tie_embeddings=False, qkv_bias=False, attention_out_bias=False, mlp_bias=False, d_embed=32, source="test",
)  # fmt: skip
MOE = dataclasses.replace(
    TINY, experts=4, experts_per_token=2, d_expert=16, d_shared_expert=24, dense_layers=(1,), name="moe"
)
WINDOWED = dataclasses.replace(TINY, sliding_window=5, windowed_layers=(0, 2), qk_norm=True, name="windowed")
PARALLEL = dataclasses.replace(
    TINY, parallel_attention=True, norm="layernorm", gated_mlp=False, activation="gelu", name="parallel"
)
POST = dataclasses.replace(
    TINY, post_norm=True, final_norm=False, d_embed=16, position="learned", position_rows=64, positions=64,
    qkv_bias=True, mlp_bias=True, norm="layernorm", name="post",
)  # fmt: skip
SUB = dataclasses.replace(TINY, sub_norms=True, activation="relu2", name="sub")
ALIBI = dataclasses.replace(TINY, position="alibi", embedding_norm=True, norm="layernorm", name="alibi")
SPARSE = dataclasses.replace(TINY, weight_groups=4, qkv_bias=True, name="sparse")
VARIANTS = [TINY, MOE, WINDOWED, PARALLEL, POST, SUB, ALIBI, SPARSE]

models = st.sampled_from(VARIANTS)
small = st.integers(1, 9)


def named(graph, name, layer=0):
    (op,) = [op for op in graph.operators if op.name == name and op.layer == layer]
    return op


def producers(graph, name, layer=0):
    return [graph.operators[i].name for i in named(graph, name, layer).inputs]


def matmul_macs(graph, *kinds):
    return sum(op.macs for op in graph.operators if op.kind in kinds)


class TestByHand:
    def test_sparse_weights(self):
        # Each of 4 groups is a product of its own, of 32/4 inputs and (32 + 2*16)/4 outputs.
        sparse = prefill(dataclasses.replace(TINY, weight_groups=4), prompt=3)
        qkv = named(sparse, "qkv")
        assert (qkv.m, qkv.k, qkv.n, qkv.instances) == (3, 8, 16, 4)
        assert (qkv.macs, qkv.weight_elements, qkv.input_elements) == (3 * 8 * 16 * 4, 8 * 16 * 4, 3 * 32)
        dense = prefill(TINY, prompt=3)
        assert 4 * matmul_macs(sparse, OpKind.LINEAR) == matmul_macs(dense, OpKind.LINEAR)
        assert matmul_macs(sparse, OpKind.SCORES) == matmul_macs(dense, OpKind.SCORES)

    def test_gpt2_xl_decode(self):
        # Blocks: 12 * 48 * 1600^2 = 1,474,560,000 MACs; attention over t = 512 keys: 2 * 48 * 1600 * 512.
        graph = decode_step(load_model("gpt2-xl"), context=511, lm_head=False, embedding=False)
        assert matmul_macs(graph, OpKind.LINEAR) == 1_474_560_000
        assert matmul_macs(graph, OpKind.SCORES, OpKind.VALUES) == 2 * 48 * 1600 * 512 == 78_643_200
        assert 2 * graph.macs == 2 * 1_474_560_000 + 4 * 48 * 1600 * 512
        # Weights: the matrices, 9 d biases and 4 d norm parameters per layer.
        assert graph.weight_elements == 1_474_560_000 + 48 * 13 * 1600
        assert graph.weight_bytes(16) == 2 * (1_474_560_000 + 48 * 13 * 1600)

    def test_gpt2_xl_head(self):
        graph = decode_step(load_model("gpt2-xl"), context=0)
        head = named(graph, "lm_head", -1)
        assert (head.kind, head.m, head.k, head.n) == (OpKind.LM_HEAD, 1, 1600, 50257)
        assert named(graph, "argmax", -1).flops == 50256
        assert producers(graph, "argmax", -1) == ["lm_head"]
        assert graph.operators[-1].kind is OpKind.ARGMAX

    def test_gpt2_xl_other_flops(self):
        graph = decode_step(load_model("gpt2-xl"), context=9)
        assert named(graph, "attention_norm").flops == 7 * 1600 + 4
        assert named(graph, "qkv").flops == 2 * 1600 * 4800 + 4800  # and the bias
        assert named(graph, "softmax").flops == 6 * 25 * 10
        assert named(graph, "activation").flops == 6400
        assert named(graph, "attention_add").flops == 1600
        assert named(graph, "positions", -1).flops == 1600
        assert named(graph, "embedding", -1).flops == 0

    def test_gqa_shapes(self):
        # Llama 2 70B: 64 query heads and 8 KV heads of 128; batch 2 behind 99 cached tokens.
        graph = decode_step(load_model("llama-2-70b"), context=99, batch=2)
        qkv, scores, values = (named(graph, name) for name in ("qkv", "scores", "values"))
        assert (qkv.m, qkv.k, qkv.n) == (2, 8192, (64 + 2 * 8) * 128)
        assert (scores.m, scores.k, scores.n, scores.instances) == (1, 128, 100, 128)
        assert (values.m, values.k, values.n, values.instances) == (1, 100, 128, 128)
        assert scores.kv_read_elements == values.kv_read_elements == 2 * 100 * 8 * 128
        assert named(graph, "kv_append").kv_write_elements == 2 * 2 * 8 * 128
        assert named(graph, "rotary").flops == 3 * 2 * (64 + 8) * 128
        assert graph.kv_write_bytes(16) == 2 * 163_840 * 2
        gate_up, down = named(graph, "gate_up"), named(graph, "down")
        assert (gate_up.k, gate_up.n, down.k, down.n) == (8192, 2 * 28672, 28672, 8192)

    def test_opt_13b_kv_traffic(self):
        # A step behind 1023 tokens reads 1024 of them: 1024 * 819,200 B, and appends 819,200 B.
        graph = decode_step(load_model("opt-13b"), context=1023)
        assert graph.kv_read_bytes(16) == 1024 * 819_200
        assert graph.kv_write_bytes(16) == 819_200

    def test_prefill_is_triangular(self):
        # 4 tokens: 1 + 2 + 3 + 4 = 10 pairs per head; behind 3 cached ones: 4 + 5 + 6 + 7 = 22.
        for context, pairs in ((0, 10), (3, 22)):
            graph = prefill(TINY, prompt=4, context=context)
            scores = named(graph, "scores")
            assert scores.macs == 4 * pairs * 8
            assert (scores.m, scores.n) == (4, 4 + context)
            assert named(graph, "softmax").flops == 6 * 4 * pairs
            assert scores.kv_read_elements == (4 + context) * 2 * 8
        assert named(graph, "qkv").m == 4
        assert named(graph, "lm_head", -1).m == 1
        assert named(prefill(TINY, prompt=4, batch=3), "lm_head", -1).m == 3

    def test_sliding_window(self):
        # A window of 5 behind 9 tokens: layer 1 is full.
        graph = decode_step(WINDOWED, context=9)
        assert [named(graph, "scores", i).n for i in range(3)] == [5, 10, 5]
        assert [named(graph, "values", i).kv_read_elements for i in range(3)] == [80, 160, 80]
        # 4 tokens behind 3: they see 4, 5, 5, 5 keys, 7 distinct ones; behind 9: 5 each, 5 + 3 distinct.
        graph = prefill(WINDOWED, prompt=4, context=3)
        assert (named(graph, "scores").macs, named(graph, "scores").n) == (4 * 19 * 8, 7)
        graph = prefill(WINDOWED, prompt=4, context=9)
        assert (named(graph, "scores").macs, named(graph, "scores").n) == (4 * 20 * 8, 8)

    def test_mistral_7b_window(self):
        model = load_model("mistral-7b")
        assert named(decode_step(model, context=4000), "scores").n == 4001
        assert named(decode_step(model, context=8000), "scores").n == 4096

    def test_mixtral_experts(self):
        # One token: 2 of 8 experts, 3 * 4096 * 14336 MACs each, and a router of 4096 x 8.
        model = load_model("mixtral-8x7b")
        graph = decode_step(model, context=0)
        up, down = named(graph, "expert_gate_up"), named(graph, "expert_down")
        assert (up.m, up.k, up.n, up.instances) == (1, 4096, 28672, 2)
        assert up.macs + down.macs == 2 * 3 * 4096 * 14336
        assert up.weight_elements == 2 * 4096 * 28672
        assert named(graph, "router").flops == 2 * 4096 * 8 + 5 * 8
        # 3 tokens could choose 6 experts; 5 tokens at most the 8 there are.
        assert (
            named(decode_step(model, context=0, batch=3), "expert_down").weight_elements == 6 * 14336 * 4096
        )
        assert (
            named(decode_step(model, context=0, batch=5), "expert_down").weight_elements == 8 * 14336 * 4096
        )
        assert producers(graph, "expert_gate_up") == ["mlp_norm", "router"]
        assert producers(graph, "expert_scale") == ["router", "expert_down"]
        assert producers(graph, "mlp_add") == ["attention_add", "expert_sum"]

    def test_shared_expert_and_dense_layer(self):
        graph = decode_step(MOE, context=0)
        assert producers(graph, "shared_scale") == ["shared_down", "shared_expert_gate"]
        assert producers(graph, "mlp_add") == ["attention_add", "shared_add"]
        assert named(graph, "gate_up", 1).n == 96
        assert not any(op.kind is OpKind.ROUTER and op.layer == 1 for op in graph.operators)
        # layer 0: 2 slots of 3*32*16, the shared expert 3*32*24, its gate 32, the router 32*4
        mlp = [op for op in graph.operators if op.layer == 0 and op.k and op.name not in ("scores", "values")]
        assert sum(op.macs for op in mlp) == 32 * 64 + 32 * 32 + 2 * 1536 + 2304 + 32 + 128

    def test_falcon_40b_dependences(self):
        graph = decode_step(load_model("falcon-40b"), context=5)
        assert producers(graph, "attention_norm") == ["embedding"]
        assert producers(graph, "mlp_norm") == ["embedding"]  # beside attention, not behind it
        assert producers(graph, "up") == ["mlp_norm"]
        assert producers(graph, "branch_add") == ["attention_out", "down"]
        assert producers(graph, "residual_add") == ["embedding", "branch_add"]
        assert producers(graph, "attention_norm", 1) == ["residual_add"]
        one = dataclasses.replace(PARALLEL, parallel_norms=1)
        assert producers(decode_step(one, context=0), "up") == ["attention_norm"]

    def test_dependences_of_a_llama_layer(self):
        graph = decode_step(TINY, context=5)
        for layer, before in ((0, "embedding"), (1, "mlp_add"), (2, "mlp_add")):
            assert producers(graph, "attention_norm", layer) == [before]
            assert producers(graph, "rotary", layer) == ["qkv"]
            assert producers(graph, "kv_append", layer) == ["qkv", "rotary"]  # V is not rotated
            assert producers(graph, "scores", layer) == ["rotary", "kv_append"]
            assert producers(graph, "values", layer) == ["kv_append", "softmax"]
            assert producers(graph, "attention_add", layer) == [before, "attention_out"]
            assert producers(graph, "gate", layer) == ["gate_up", "activation"]
            assert producers(graph, "mlp_add", layer) == ["attention_add", "down"]
        bare = decode_step(TINY, context=5, embedding=False, lm_head=False)
        assert producers(bare, "attention_norm") == []
        assert producers(bare, "attention_add") == ["attention_out"]
        assert producers(bare, "attention_norm", 1) == ["mlp_add"]
        assert bare.operators[-1].name == "mlp_add"

    def test_optional_norms(self):
        graph = decode_step(WINDOWED, context=0)
        assert named(graph, "qk_norm").flops == 6 * (4 * 8 + 3)  # 4 + 2 heads of 8
        assert producers(graph, "rotary") == ["qk_norm"]
        graph = decode_step(SUB, context=0)
        assert producers(graph, "attention_out") == ["attention_sub_norm"]
        assert producers(graph, "down") == ["mlp_sub_norm"]
        assert named(graph, "mlp_sub_norm").n == 48
        graph = decode_step(POST, context=0)
        assert producers(graph, "qkv") == ["positions"]
        assert producers(graph, "attention_norm") == ["attention_add"]
        assert producers(graph, "positions", -1) == ["embedding_in"]
        assert producers(graph, "lm_head", -1) == ["embedding_out"]
        assert named(decode_step(ALIBI, context=3), "softmax").flops == 7 * 4 * 4
        assert producers(decode_step(ALIBI, context=3), "attention_norm") == ["embedding_norm"]

    def test_encoder(self):
        # BERT base, 16 tokens: all 256 pairs, no cache, no head.
        graph = prefill(load_model("bert-base"), prompt=16)
        assert named(graph, "scores").macs == 12 * 256 * 64
        assert graph.kv_read_elements == graph.kv_write_elements == 0
        assert producers(graph, "scores") == ["qkv"]
        assert producers(graph, "values") == ["qkv", "softmax"]
        assert named(graph, "scores").input_elements == 2 * 16 * 768  # Q and K
        assert graph.operators[-1].name == "mlp_norm"
        assert named(graph, "token_types", -1).flops == 16 * 768

    def test_bytes_round_up(self):
        norm = named(decode_step(dataclasses.replace(TINY, d_model=33), context=0), "attention_norm")
        assert [norm.weight_bytes(bits) for bits in (1, 2, 3, 4, 16)] == [5, 9, 13, 17, 66]
        assert norm.input_bytes(8) == norm.output_bytes(8) == 33
        assert norm.weight and not named(decode_step(TINY, context=0), "scores").weight


class TestRefusals:
    def test_positions(self):
        model = load_model("gpt2-xl")
        assert decode_step(model, context=1023).tokens == 1
        with pytest.raises(
            UserError, match=r"gpt2-xl has 1024 positions: 1024 cached \+ 1 new tokens are 1 too"
        ):
            decode_step(model, context=1024)
        with pytest.raises(UserError, match=r"1000 cached \+ 100 new tokens are 76 too many"):
            prefill(model, prompt=100, context=1000)
        assert decode_step(load_model("bloom-176b"), context=10**6).context == 10**6  # ALiBi: no limit

    @pytest.mark.parametrize("bad", [-1, 1.0, "1", True, None])
    def test_numbers(self, bad):
        with pytest.raises(UserError, match=f"context must be a whole number of at least 0, not {bad!r}"):
            decode_step(TINY, context=bad)
        with pytest.raises(UserError, match="batch must be a whole number of at least 1"):
            decode_step(TINY, context=0, batch=bad)
        with pytest.raises(UserError, match="prompt must be a whole number of at least 1"):
            prefill(TINY, prompt=bad)

    def test_zero(self):
        for call in (lambda: decode_step(TINY, context=0, batch=0), lambda: prefill(TINY, prompt=0)):
            with pytest.raises(UserError, match="at least 1, not 0"):
                call()

    def test_encoder(self):
        with pytest.raises(UserError, match=r"bert-base is an encoder \(bert\): it has no decode step"):
            decode_step(load_model("bert-base"), context=4)
        with pytest.raises(UserError, match="context must be 0, not 4"):
            prefill(load_model("bert-base"), prompt=4, context=4)

    def test_numpy_integers_are_whole_numbers(self):
        graph = decode_step(TINY, context=np.int64(4), batch=np.int8(1))
        assert type(graph.context) is int
        assert graph == decode_step(TINY, context=4)


@pytest.mark.parametrize("name", DECODERS)
def test_a_step_reads_every_parameter_once(name):
    model = load_model(name)
    tokens = model.experts or 1  # enough tokens for every expert
    graph = decode_step(model, context=0, batch=tokens)
    parts = model.parameters
    read = graph.weight_elements - sum(
        op.weight_elements for op in graph.operators if op.name in ("embedding", "positions", "lm_head")
    )
    assert read == parts["attention"] + parts["mlp"] + parts["norms"]
    assert named(graph, "lm_head", -1).weight_elements == parts["embedding"]


@settings(deadline=None, max_examples=60)
@given(models, st.integers(0, 20), small, small, st.booleans(), st.booleans())
def test_order_and_consistency(model, context, prompt, batch, lm_head, embedding):
    graph = prefill(model, prompt=prompt, context=context, batch=batch, lm_head=lm_head, embedding=embedding)
    read = set()
    for index, op in enumerate(graph.operators):
        assert all(0 <= i < index for i in op.inputs)  # topological, so without a cycle
        assert list(op.inputs) == sorted(set(op.inputs))
        assert 0 <= op.macs <= op.m * op.k * op.n * op.instances
        assert op.flops >= 0
        read |= set(op.inputs)
    assert read == set(range(len(graph.operators) - 1))  # only the last result is not used
    assert [op.layer for op in graph.operators if op.layer >= 0] == sorted(
        op.layer for op in graph.operators if op.layer >= 0
    )
    assert graph.flops == sum(op.flops for op in graph.operators)


@settings(deadline=None, max_examples=40)
@given(models, st.integers(0, 20), small)
def test_decode_is_linear_in_batch(model, context, batch):
    one, many = decode_step(model, context=context), decode_step(model, context=context, batch=batch)
    assert many.flops == batch * one.flops
    assert many.input_elements == batch * one.input_elements
    assert many.output_elements == batch * one.output_elements
    assert many.kv_read_elements == batch * one.kv_read_elements
    assert many.kv_write_elements == batch * one.kv_write_elements
    assert len(many.operators) == len(one.operators)


@settings(deadline=None, max_examples=40)
@given(models, st.integers(0, 20), small, small)
def test_prefill_is_the_sum_of_its_steps(model, context, prompt, batch):
    whole = prefill(model, prompt=prompt, context=context, batch=batch, lm_head=False)
    steps = [decode_step(model, context=context + i, batch=batch, lm_head=False) for i in range(prompt)]
    assert whole.macs == sum(step.macs for step in steps)
    assert whole.flops == sum(step.flops for step in steps)
    assert whole.kv_write_elements == sum(step.kv_write_elements for step in steps)
    assert whole.kv_read_elements <= sum(step.kv_read_elements for step in steps)


@settings(deadline=None, max_examples=40)
@given(models, st.integers(0, 20), small)
def test_layers_alike_are_the_same(model, context, prompt):
    """A copied layer equals the one that a model of that layer alone would build."""
    graph = prefill(model, prompt=prompt, context=context, embedding=True, lm_head=False)
    for layer in range(model.layers):
        alone = dataclasses.replace(
            model, layers=1, windowed_layers=(0,) if model.window(layer) else (),
            dense_layers=() if model.is_moe(layer) else (0,),
        )  # fmt: skip
        expected = prefill(alone, prompt=prompt, context=context, embedding=True, lm_head=False)
        ours = [op for op in graph.operators if op.layer == layer]
        theirs = [op for op in expected.operators if op.layer == 0]
        shift = graph.operators.index(ours[0]) - expected.operators.index(theirs[0])
        assert ours == [
            dataclasses.replace(op, layer=layer, inputs=tuple(i + shift for i in op.inputs)) for op in theirs
        ]


@given(st.integers(1, 40), st.integers(0, 40), st.one_of(st.none(), st.integers(1, 50)))
def test_attended_pairs_is_the_plain_sum(tokens, context, window):
    expected = sum(min(context + i + 1, window or 10**9) for i in range(tokens))
    assert attended_pairs(tokens, context, window) == expected
