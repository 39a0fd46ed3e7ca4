"""Model configurations: published parameter counts, every rule of the reader, every refusal."""

import dataclasses
import json
import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tilewright.arch.errors import UserError
from tilewright.workloads.models import CONFIGS, builtin_models, load_model

GPT2 = {
    "model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "n_positions": 32, "vocab_size": 100,
    "layer_norm_epsilon": 1e-05,
}  # fmt: skip
LLAMA = {
    "model_type": "llama", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
    "intermediate_size": 96, "vocab_size": 100, "max_position_embeddings": 32, "rms_norm_eps": 1e-06,
}  # fmt: skip
OPT = {
    "model_type": "opt", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4, "ffn_dim": 256,
    "vocab_size": 100, "max_position_embeddings": 32,
}  # fmt: skip
FALCON = {
    "model_type": "falcon", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
    "vocab_size": 100, "layer_norm_epsilon": 1e-05, "multi_query": True, "parallel_attn": True,
}  # fmt: skip
BLOOM = {
    "model_type": "bloom", "n_layer": 2, "hidden_size": 64, "n_head": 4, "vocab_size": 100,
    "layer_norm_epsilon": 1e-05,
}  # fmt: skip
BERT = {
    "model_type": "bert", "num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 4,
    "intermediate_size": 128, "vocab_size": 100, "max_position_embeddings": 32, "type_vocab_size": 2,
    "layer_norm_eps": 1e-12,
}  # fmt: skip
MISTRAL = LLAMA | {"model_type": "mistral"}
MIXTRAL = LLAMA | {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2}
QWEN2 = LLAMA | {"model_type": "qwen2"}
QWEN3 = LLAMA | {"model_type": "qwen3", "head_dim": 32}
QWEN2_MOE = LLAMA | {
    "model_type": "qwen2_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
    "shared_expert_intermediate_size": 80,
}  # fmt: skip
QWEN3_MOE = QWEN3 | {
    "model_type": "qwen3_moe", "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48,
}  # fmt: skip
BITNET = LLAMA | {"model_type": "bitnet", "tie_word_embeddings": True}
FAMILIES = [
    GPT2, LLAMA, OPT, FALCON, BLOOM, BERT, MISTRAL, MIXTRAL, QWEN2, QWEN3, QWEN2_MOE, QWEN3_MOE, BITNET,
]  # fmt: skip


@pytest.fixture
def read(tmp_path):
    """Writes a config (a dict, or raw text) and loads it."""

    def load(config):
        path = tmp_path / "model.json"
        path.write_text(config if isinstance(config, str) else json.dumps(config, indent=1))
        return load_model(path)

    return load


def without(config, *keys):
    return {k: v for k, v in config.items() if k not in keys}


@pytest.mark.parametrize(
    ("name", "total"),
    [
        # 50257*1600 + 1024*1600 + 48*(12*1600^2 + 13*1600) + 2*1600
        ("gpt2-xl", 1_557_611_200),
        ("gpt2-small", 124_439_808),
        ("gpt2-medium", 354_823_168),
        ("gpt2-large", 774_030_080),
        # 50272*5120 + (2048+2)*5120 + 40*(12*5120^2 + 13*5120) + 2*5120
        ("opt-13b", 12_853_473_280),
        # As opt-13b with 50257 + 2048 rows of tables, and one in eight of the weights of products: 40 * 12 * 5120^2 / 8
        ("sparse-gpt-13b", (50_257 + 2048) * 5120 + 40 * (12 * 5120**2 // 8 + 13 * 5120) + 2 * 5120),
        ("opt-30b", 29_974_540_288),
        # 250880*14336 + 2*14336 + 70*(12*14336^2 + 13*14336) + 2*14336
        ("bloom-176b", 176_247_271_424),
        # 2*32000*4096 + 32*(4*4096^2 + 3*4096*11008 + 2*4096) + 4096
        ("llama-2-7b", 6_738_415_616),
        ("llava-1.5-7b", 6_738_415_616),  # its language model
        ("llama-2-13b", 13_015_864_320),
        ("llama-2-70b", 68_976_648_192),
        ("llama-3-8b", 8_030_261_248),
        ("llama-3.1-70b", 70_553_706_496),
        ("llama-3.1-405b", 405_853_388_800),
        # 2*32000*4096 + 32*(2*4096^2 + 2*4096*1024 + 3*4096*14336 + 2*4096) + 4096
        ("mistral-7b", 7_241_732_096),
        # as mistral-7b, with 8 FFNs and a router of 8*4096 in each layer
        ("mixtral-8x7b", 46_702_792_704),
        # 65024*8192 + 60*(8192*144*64 + 9*8192^2 + 4*8192) + 2*8192
        ("falcon-40b", 41_303_293_952),
        ("bitnet-b1.58-2b-4t", 2_412_820_480),
        # 64*(5120*7168 + 7168 + 5120^2 + 3*5120*27648 + 2*5120) + 5120 + 2*152064*5120
        ("qwen2.5-32b", 32_763_876_352),
        ("qwen3-8b", 8_190_735_360),
        ("bert-base", 109_482_240),
        ("bert-large", 335_141_888),
        ("all-minilm-l6-v2", 22_713_216),
    ],
)
def test_published_parameter_counts(name, total):
    assert load_model(name).parameters["total"] == total


def test_the_vision_tower_of_llava():
    # (588 of a patch + class token + 577 positions + a norm's 2) * 1024; 23 * (12*1024^2 + 13*1024); the projector:
    # 1025*4096 + 4097*4096.
    vision = load_model("llava-1.5-7b").vision
    assert vision.parameters == 1_196_032 + 289_713_152 + 20_979_712
    assert (vision.tower.layers, vision.tower.positions, vision.tower.activation) == (23, 577, "quick_gelu")
    assert (vision.tokens, vision.patch_elements) == (576, 588)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vision_config": None}, "vision_config is null: a llava model needs it"),
        ({"vision_config": 3}, "vision_config must be an object, not a number"),
        ({"mm_vision_select_layer": 1}, "mm_vision_select_layer must be in -24..-1, not 1"),
        ({"mm_vision_select_layer": -25}, "mm_vision_select_layer must be in -24..-1, not -25"),
        ({"mm_projector_type": "linear"}, 'mm_projector_type must be "mlp2x_gelu", not'),
        ({"vision_config": {"image_size": 335}}, "image_size 335 must be a multiple of patch_size 14"),
        ({"vision_config": {"hidden_act": "quick"}}, "hidden_act 'quick' is unknown"),
        ({"vision_config": {"model_type": "siglip"}}, "model_type 'siglip' is unknown"),
        ({"vision_config": {"layer_norm_eps": None}}, "layer_norm_eps is null"),
    ],
)
def test_towers_are_checked(read, change, message):
    file = json.loads((CONFIGS / "llava-1.5-7b.json").read_text())
    for key, value in change.items():
        file[key] = file[key] | value if isinstance(value, dict) else value
    with pytest.raises(UserError, match=message):
        read(file)


def test_blocks_of_gpt2_xl():
    # The matrices alone: 12 * 48 * 1600^2 = 1,474,560,000; biases 9 d per layer; norms 4 d per layer and 2 d.
    parts = load_model("gpt2-xl").parameters
    assert parts["attention"] + parts["mlp"] == 1_474_560_000 + 48 * 9 * 1600
    assert parts["norms"] == 48 * 4 * 1600 + 2 * 1600
    assert parts["embedding"] == 50257 * 1600
    assert parts["positions"] == 1024 * 1600
    assert parts["lm_head"] == 0  # tied


def test_printed_sizes():
    # The 3B and 0.7B reproductions of BitNet are printed as 3.32 B and 729 M; OPT-175B as 175 B.
    assert round(load_model("bitnet-b1.58-3b").parameters["total"] / 1e7) == 332
    assert round(load_model("bitnet-b1.58-700m").parameters["total"] / 1e6) == 729
    assert round(load_model("opt-175b").parameters["total"] / 1e9) == 175
    assert round(load_model("gpt3-large").parameters["total"] / 1e6) == 760  # Brown et al., Table 2.1


def test_counts_of_other_published_files(read):
    # OPT-350M: 50272*512 + 2050*1024 + 2*512*1024 + 24*(12*1024^2 + 13*1024), post-norm, no final norm.
    opt_350m = OPT | {
        "num_hidden_layers": 24, "hidden_size": 1024, "num_attention_heads": 16, "ffn_dim": 4096,
        "vocab_size": 50272, "max_position_embeddings": 2048, "word_embed_proj_dim": 512,
        "do_layer_norm_before": False,
    }  # fmt: skip
    assert read(opt_350m).parameters["total"] == 331_196_416
    # Falcon-7B: 65024*4544 + 32*(4544*73*64 + 9*4544^2 + 2*4544) + 2*4544: one KV head, one norm.
    falcon_7b = FALCON | {
        "num_hidden_layers": 32, "hidden_size": 4544, "num_attention_heads": 71, "vocab_size": 65024,
    }  # fmt: skip
    assert read(falcon_7b).parameters["total"] == 6_921_720_704
    # Qwen1.5-MoE-A2.7B: 60 experts of 1408, one shared of 5632 with its gate.
    moe = QWEN2_MOE | {
        "num_hidden_layers": 24, "hidden_size": 2048, "num_attention_heads": 16, "intermediate_size": 5632,
        "vocab_size": 151936, "num_experts": 60, "num_experts_per_tok": 4, "moe_intermediate_size": 1408,
        "shared_expert_intermediate_size": 5632,
    }  # fmt: skip
    assert read(moe).parameters["total"] == 14_315_784_192
    # Qwen3-30B-A3B, whose file may call its experts num_experts or num_local_experts.
    moe = without(QWEN3_MOE, "num_experts") | {
        "num_hidden_layers": 48, "hidden_size": 2048, "num_attention_heads": 32, "num_key_value_heads": 4,
        "head_dim": 128, "intermediate_size": 6144, "vocab_size": 151936, "num_local_experts": 128,
        "num_experts_per_tok": 8, "moe_intermediate_size": 768,
    }  # fmt: skip
    assert read(moe).parameters["total"] == 30_532_122_624


def test_gpt3_xl_has_the_printed_head():
    model = load_model("gpt3-xl")
    assert (model.layers, model.d_model, model.heads, model.head_dim) == (24, 2048, 24, 128)
    assert (model.q_dim, model.vocab, model.positions) == (3072, 50257, 2048)


def test_kv_cache_per_token():
    # OPT-13B in 16 bits: 2 * 40 * 5120 * 2 B = 819,200 B; Llama 2 70B: 2 * 80 * 8 * 128 elements.
    assert load_model("opt-13b").kv_elements_per_token * 2 == 819_200
    assert load_model("llama-2-70b").kv_elements_per_token == 163_840


def test_builtins_load_and_say_where_they_come_from():
    names = builtin_models()
    assert names == sorted(names)
    assert len(names) >= 32
    for name in names:
        model = load_model(name)
        assert model.name == name
        assert model.source == json.loads((CONFIGS / f"{name}.json").read_text())["_source"]


def test_gpt2_xl_file_is_the_published_shape():
    data = json.loads((CONFIGS / "gpt2-xl.json").read_text())
    shape = {
        "model_type": "gpt2", "n_layer": 48, "n_embd": 1600, "n_head": 25, "n_positions": 1024,
        "vocab_size": 50257, "activation_function": "gelu_new", "n_inner": None,
        "layer_norm_epsilon": 1e-05, "tie_word_embeddings": True,
    }  # fmt: skip
    assert {key: data[key] for key in shape} == shape


class TestFormulas:
    """Absent or null keys."""

    @pytest.mark.parametrize("null", [{}, {"n_inner": None}])
    def test_gpt2(self, read, null):
        model = read(GPT2 | null)
        assert (model.d_ff, model.kv_heads, model.head_dim) == (256, 4, 16)  # 4 * 64, heads, 64 / 4
        assert model.activation == "gelu_tanh"
        assert (model.position, model.norm, model.norm_eps) == ("learned", "layernorm", "1e-05")
        assert model.tie_embeddings and model.qkv_bias and model.mlp_bias and not model.gated_mlp
        assert read(GPT2 | {"n_inner": 100}).d_ff == 100

    def test_aliases(self, read):
        config = without(GPT2, "n_layer") | {"num_hidden_layers": 3}
        assert read(config).layers == 3
        assert read(without(BLOOM, "hidden_size") | {"n_embed": 64}).d_model == 64
        with pytest.raises(UserError, match="num_hidden_layers 3 contradicts n_layer 2"):
            read(GPT2 | {"num_hidden_layers": 3})

    def test_llama(self, read):
        model = read(LLAMA)
        assert (model.kv_heads, model.head_dim, model.activation) == (4, 16, "silu")
        assert model.gated_mlp and not model.tie_embeddings and not model.qkv_bias
        assert (model.rope_theta, model.norm_eps) == ("10000.0", "1e-06")
        assert read(LLAMA | {"num_key_value_heads": 2}).kv_heads == 2
        assert read(LLAMA | {"head_dim": 32}).q_dim == 128
        assert read(LLAMA | {"head_dim": None, "num_key_value_heads": None}) == model
        assert read(LLAMA | {"attention_bias": True}).attention_out_bias
        assert read(LLAMA | {"mlp_bias": True}).mlp_bias
        assert read(without(LLAMA, "max_position_embeddings")).positions is None
        assert read(LLAMA | {"rope_theta": 500000}).rope_theta == "500000"
        assert read(LLAMA | {"rope_parameters": {"rope_theta": 1e6}}).rope_theta == "1000000.0"

    def test_opt(self, read):
        model = read(OPT)
        assert (model.position_rows, model.positions, model.d_embed) == (34, 32, 64)
        assert model.final_norm and not model.post_norm and model.qkv_bias
        model = read(OPT | {"do_layer_norm_before": False, "enable_bias": False, "word_embed_proj_dim": 16})
        assert model.post_norm and not model.final_norm and not model.mlp_bias
        assert model.d_embed == 16

    def test_windows(self, read):
        assert read(MISTRAL).window(0) is None
        assert read(MISTRAL | {"sliding_window": None}).sliding_window is None
        assert read(MISTRAL | {"sliding_window": 8}).window(1) == 8
        # Qwen2: only with use_sliding_window, and only from max_window_layers on
        qwen = QWEN2 | {"sliding_window": 8, "max_window_layers": 1}
        assert read(qwen).sliding_window is None
        model = read(qwen | {"use_sliding_window": True})
        assert (model.window(0), model.window(1)) == (None, 8)
        types = {"layer_types": ["sliding_attention", "full_attention"], "use_sliding_window": True}
        assert read(qwen | types).windowed_layers == (0,)

    def test_mixtral(self, read):
        model = read(MIXTRAL)
        assert (model.experts, model.experts_per_token, model.d_expert) == (4, 2, 96)
        assert model.is_moe(0)

    def test_qwen(self, read):
        assert read(QWEN2).qkv_bias and not read(QWEN2).attention_out_bias
        model = read(QWEN3)
        assert model.qk_norm and not model.qkv_bias
        assert (model.head_dim, model.q_dim) == (32, 128)
        model = read(QWEN2_MOE | {"num_hidden_layers": 4, "decoder_sparse_step": 2, "mlp_only_layers": [3]})
        # step 2 keeps layers 1 and 3 sparse, and 3 is dense by name
        assert [model.is_moe(i) for i in range(4)] == [False, True, False, False]
        assert read(QWEN3_MOE).d_shared_expert == 0

    def test_bitnet(self, read):
        model = read(BITNET)
        assert model.sub_norms and model.tie_embeddings and model.activation == "relu2"
        with pytest.raises(UserError, match="tie_word_embeddings is missing"):
            read(without(BITNET, "tie_word_embeddings"))

    def test_falcon(self, read):
        model = read(FALCON)
        assert (model.kv_heads, model.d_ff, model.parallel_norms) == (1, 256, 1)
        assert model.parallel_attention and model.position == "rotary" and not model.qkv_bias
        model = read(FALCON | {"multi_query": False, "parallel_attn": False, "alibi": True, "bias": True})
        assert (model.kv_heads, model.position, model.positions) == (4, "alibi", None)
        assert model.qkv_bias and not model.parallel_attention
        new = without(FALCON, "multi_query", "parallel_attn") | {
            "new_decoder_architecture": True, "num_kv_heads": 2,
        }  # fmt: skip
        model = read(new)
        assert (model.kv_heads, model.parallel_norms, model.parallel_attention) == (2, 2, True)
        assert read(new | {"num_ln_in_parallel_attn": 1}).parallel_norms == 1
        for key in ("multi_query", "parallel_attn"):
            with pytest.raises(UserError, match=f"{key} is missing"):
                read(without(FALCON, key))

    def test_bloom_and_bert(self, read):
        model = read(BLOOM)
        assert (model.d_ff, model.positions, model.position) == (256, None, "alibi")
        assert model.embedding_norm
        model = read(BERT)
        assert not model.causal and model.post_norm and model.token_types == 2
        assert model.norm_eps == "1e-12"

    def test_eps_keeps_its_text(self, read):
        text = json.dumps(LLAMA).replace("1e-06", "0.00000100")
        assert read(text).norm_eps == "0.00000100"


class TestComposition:
    """Experts of one shape behind a router."""

    FILE = {"model_type": "composition", "expert": "llama-2-7b", "experts": 3, "router": "gpt2-small"}  # noqa: RUF012

    def test_samba(self):
        # 150 * 6738415616 + 6738415616
        model, seven = load_model("samba-coe"), load_model("llama-2-7b")
        assert model.composition.router == seven
        assert (model.composition.experts, model.layers) == (150, 32)
        assert model.parameters["total"] == 151 * 6_738_415_616 == 1_017_500_758_016

    def test_parts_are_those_of_experts_and_router(self, read):
        model = read(self.FILE)
        assert model.name == "model" and model.source.endswith("model.json")
        expert = dataclasses.replace(model, composition=None)
        assert dataclasses.replace(load_model("llama-2-7b"), name="model", source=model.source) == expert
        assert model.composition.router == load_model("gpt2-small")
        # 3 * 6738415616 + 124439808; positions are the router's alone
        assert model.parameters["total"] == 20_339_686_656
        assert model.parameters["positions"] == 1024 * 768
        assert sum(v for k, v in model.parameters.items() if k != "total") == 20_339_686_656

    @pytest.mark.parametrize(
        ("changed", "message"),
        [
            ({"expert": "llama-2-8b"}, r"expert 'llama-2-8b' is unknown; did you mean llama-"),
            ({"router": None}, "router is missing; allowed: .*llama-2-7b"),
            ({"router": "bert-base"}, "router 'bert-base' is an encoder; allowed: a decoder"),
            ({"expert": "samba-coe"}, "expert 'samba-coe' is a composition itself; allowed: a decoder"),
            ({"experts": 0}, "experts must be a whole number of at least 1, not 0"),
            ({"experts": None}, "experts is null: a composition model needs it"),
        ],
    )
    def test_refusals(self, read, changed, message):
        with pytest.raises(UserError, match=message):
            read(self.FILE | changed)


class TestPaths:
    def test_folder_file_and_name(self, tmp_path, monkeypatch):
        folder = tmp_path / "tiny"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(GPT2))
        by_folder = load_model(str(folder))
        assert by_folder.name == "tiny"
        assert by_folder.source == str(folder / "config.json")
        assert load_model(folder / "config.json") == by_folder
        monkeypatch.chdir(tmp_path)
        assert load_model("tiny").d_model == 64  # a bare name that exists
        assert load_model("tiny/config.json").name == "tiny"

    def test_a_builtin_name_does_not_depend_on_the_folder(self, tmp_path, monkeypatch):
        (tmp_path / "gpt2-xl").mkdir()
        monkeypatch.chdir(tmp_path)
        assert load_model("gpt2-xl").d_model == 1600
        with pytest.raises(UserError, match=r"gpt2-xl/config\.json: cannot be read"):
            load_model("./gpt2-xl")

    def test_unknown_name(self):
        with pytest.raises(UserError, match=r"model 'gpt2-xxl' is unknown; did you mean gpt2-xl\?"):
            load_model("gpt2-xxl")
        with pytest.raises(UserError, match=r"allowed: .*bloom-176b"):
            load_model("")

    @pytest.mark.parametrize("name", ["no/such/folder", "none.json"])
    def test_unreadable(self, name):
        with pytest.raises(UserError, match=f"{name}: cannot be read: No such file"):
            load_model(name)


class TestRefusals:
    def test_not_json(self, read, tmp_path):
        with pytest.raises(UserError, match=r"model\.json:2: is not valid JSON"):
            read('{"a": 1,\n oops}')
        with pytest.raises(UserError, match="must hold a JSON object, not a list"):
            read("[1]")
        with pytest.raises(UserError, match="not null"):
            read("null")
        with pytest.raises(UserError, match="is not valid JSON"):
            read("[" * 100_000)
        with pytest.raises(UserError, match="is not valid JSON"):
            read('{"n_layer": 1' + "0" * 5000 + "}")
        path = tmp_path / "latin.json"
        path.write_bytes(b'{"model_type": "gpt2\xff"}')
        with pytest.raises(UserError, match="is not UTF-8"):
            load_model(path)

    def test_model_type(self, read):
        with pytest.raises(UserError, match=r":2: model_type 'lama' is unknown; did you mean llama\?"):
            read({"model_type": "lama"})
        with pytest.raises(UserError, match=r"model_type is missing; allowed: bert, .*qwen3_moe"):
            read({})
        with pytest.raises(UserError, match="model_type must be a name, not 3"):
            read({"model_type": 3})

    @pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c["model_type"])
    def test_every_shape_key_is_needed(self, read, config):
        formula = {"model_type", "max_position_embeddings", "head_dim"}  # these have a rule of their own
        if config in (OPT, BERT):  # a learned table has a length
            formula -= {"max_position_embeddings"}
        for key in config.keys() - formula:
            with pytest.raises(
                UserError, match=rf"model\.json: {key} is missing: a {config['model_type']} model"
            ):
                read(without(config, key))
            with pytest.raises(UserError, match=rf"model\.json:\d+: {key} is null"):
                read(config | {key: None})

    @pytest.mark.parametrize("config", FAMILIES, ids=lambda c: c["model_type"])
    @pytest.mark.parametrize("bad", [0, -4, 4.0, "4", True, [4]])
    def test_every_number_is_checked(self, read, config, bad):
        numbers = [k for k, v in config.items() if isinstance(v, int) and not isinstance(v, bool)]
        for key in numbers:
            line = [*config].index(key) + 2
            with pytest.raises(UserError) as caught:
                read(config | {key: bad})
            message = str(caught.value)
            assert f"model.json:{line}: {key} must be a whole number of at least 1, not {bad!r}" in message
            assert "\n" not in message

    @pytest.mark.parametrize("bad", ["0", "-1e-5", '"1e-5"', "true", "NaN", "Infinity", "[]"])
    def test_eps(self, read, bad):
        with pytest.raises(UserError, match="rms_norm_eps must be a positive number, not "):
            read(json.dumps(LLAMA).replace("1e-06", bad))

    @pytest.mark.parametrize(
        ("config", "message"),
        [
            (LLAMA | {"num_key_value_heads": 3}, "4 heads cannot share 3 KV heads evenly"),
            (LLAMA | {"num_key_value_heads": 8}, "4 heads cannot share 8 KV heads evenly"),
            (GPT2 | {"n_head": 5}, "n_head 5 does not divide n_embd 64: head_dim must be given"),
            (LLAMA | {"head_dim": 15}, "head_dim must be even for rotary positions, not 15"),
            (LLAMA | {"hidden_act": "silo"}, "hidden_act 'silo' is unknown; did you mean silu"),
            (LLAMA | {"tie_word_embeddings": 1}, "tie_word_embeddings must be true or false, not 1"),
            (LLAMA | {"rope_parameters": {}}, "rope_parameters must be an object with rope_theta"),
            (LLAMA | {"rope_theta": -1}, "rope_theta must be a positive number, not -1"),
            (MIXTRAL | {"weight_groups": 2}, "weight_groups must be 1 in a mixture of experts"),
            (GPT2 | {"weight_groups": 3}, "weight_groups must divide the layer's widths: 64 is no multiple of 3"),
            (MIXTRAL | {"num_experts_per_tok": 5}, "must be at most the 4 experts, not 5"),
            (MISTRAL | {"sliding_window": 0}, "sliding_window must be a whole number"),
            (QWEN2 | {"use_sliding_window": True, "sliding_window": 8}, "max_window_layers is missing"),
            (
                MISTRAL | {"sliding_window": 8, "layer_types": ["full_attention"]},
                "layer_types must be a list of 2 names",
            ),
            (
                MISTRAL | {"sliding_window": 8, "layer_types": ["full_attention", "x"]},
                "layer_types 'x' is unknown; allowed: full_attention, sliding_attention",
            ),
            (QWEN2_MOE | {"mlp_only_layers": [2]}, "must list layer numbers from 0 to 1, not 2"),
            (QWEN2_MOE | {"mlp_only_layers": 1}, "mlp_only_layers must be a list of layer numbers, not 1"),
            (
                FALCON | {"new_decoder_architecture": True, "num_ln_in_parallel_attn": 3},
                "num_ln_in_parallel_attn must be 1 or 2, not 3",
            ),
            (GPT2 | {"add_cross_attention": True}, "add_cross_attention must be false, not True"),
            (BERT | {"position_embedding_type": "relative_key"}, 'must be "absolute", not '),
            (BERT | {"is_decoder": True}, "is_decoder must be false"),
            (OPT | {"layer_norm_elementwise_affine": False}, "layer_norm_elementwise_affine must be true"),
            (BLOOM | {"apply_residual_connection_post_layernorm": True}, "post_layernorm must be false"),
            (without(GPT2, "n_embd") | {"n_emdb": 64}, r"n_embd is missing.*did you mean n_embd by n_emdb\?"),
        ],
    )  # fmt: skip
    def test_by_key(self, read, config, message):
        with pytest.raises(UserError, match=message):
            read(config)


@settings(deadline=None, max_examples=50)
@given(st.integers(1, 8), st.integers(1, 8), st.integers(1, 32), st.integers(1, 200), st.booleans())
def test_llama_count_by_hand(tmp_path_factory, kv, group, half_dim, d_ff, tied):
    heads, dim = kv * group, 2 * half_dim
    d = heads * dim
    config = LLAMA | {
        "hidden_size": d, "num_attention_heads": heads, "num_key_value_heads": kv, "intermediate_size": d_ff,
        "tie_word_embeddings": tied,
    }  # fmt: skip
    path = tmp_path_factory.mktemp("m") / "config.json"
    path.write_text(json.dumps(config))
    q, k, v, o = d * heads * dim, d * kv * dim, d * kv * dim, heads * dim * d
    total = 100 * d * (1 if tied else 2) + 2 * (q + k + v + o + 3 * d * d_ff + 2 * d) + d
    model = load_model(path)
    assert model.parameters["total"] == total
    assert sum(v for k, v in model.parameters.items() if k != "total") == total


def test_every_activation_is_one_of_ours():
    for name in builtin_models():
        model = load_model(name)
        assert re.fullmatch("gelu|gelu_tanh|relu|relu2|silu", model.activation)
        assert dataclasses.replace(model) == model
