"""config.json of every writer, both ways."""

import dataclasses
import json

import pytest

from mpt_jax import presets
from mpt_jax.config import InitConfig, ModelConfig
from mpt_jax.errors import ConfigError
from mpt_jax.interop import configs
from tests.interop import folders

# As transformers 5.23 writes its own class (defaults left out where it allows that).
HF_NATIVE = {
    "architectures": ["MptForCausalLM"], "model_type": "mpt", "dtype": "float32",
    "d_model": 32, "n_heads": 4, "n_layers": 2, "vocab_size": 97, "max_seq_len": 64,
    "layer_norm_epsilon": 1e-4, "attn_config": {"model_type": "", "clip_qkv": 3.0,
    "return_dict": True, "id2label": {"0": "LABEL_0"}}, "initializer_range": 0.02,
    "transformers_version": "5.23.0", "use_cache": False, "learned_pos_emb": True,
}  # fmt: skip
MOSAIC_GPT = {
    "model_type": "mosaic_gpt", "architectures": ["MosaicGPT"], "d_model": 2048,
    "n_heads": 16, "n_layers": 24, "mlp_ratio": 4, "max_seq_len": 2048,
    "vocab_size": 50368, "attn_pdrop": 0, "resid_pdrop": 0, "emb_pdrop": 0,
    "attn_impl": "torch", "attn_qk_ln": True, "attn_clip_qkv": None,
    "softmax_scale": None, "prefix_lm": False, "attn_uses_sequence_id": False,
    "alibi": True, "alibi_bias_max": 8, "init_device": "cpu", "logit_scale": None,
    "no_bias": True, "verbose": 0, "param_init_fn": "kaiming_normal_",
    "init_div_is_residual": True, "init_std": 0.02, "emb_init_std": None,
    "emb_init_uniform_lim": None, "init_gain": 0, "fan_mode": "fan_in",
    "init_nonlinearity": "relu", "embedding_fraction": 1.0,
    "low_precision_layernorm": True, "use_cache": False, "torch_dtype": "float32",
    "transformers_version": "4.27.4", "tokenizer_name": "EleutherAI/gpt-neox-20b",
    "auto_map": {"AutoConfig": "configuration_mosaic_gpt.MosaicGPTConfig"},
}  # fmt: skip
# As beside the weights of MPT-7B (mirrors of the release agree).
MPT_7B = {
    "architectures": ["MPTForCausalLM"], "model_type": "mpt", "d_model": 4096,
    "n_heads": 32, "n_layers": 32, "expansion_ratio": 4, "max_seq_len": 2048,
    "vocab_size": 50432, "attn_config": {
        "alibi": True, "alibi_bias_max": 8, "attn_impl": "torch", "attn_pdrop": 0,
        "attn_type": "multihead_attention", "attn_uses_sequence_id": False,
        "clip_qkv": None, "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
    }, "auto_map": {"AutoConfig": "configuration_mpt.MPTConfig"},
    "emb_pdrop": 0, "embedding_fraction": 1.0, "init_config": {
        "emb_init_std": None, "emb_init_uniform_lim": None, "fan_mode": "fan_in",
        "init_div_is_residual": True, "init_gain": 0, "init_nonlinearity": "relu",
        "init_std": 0.02, "name": "kaiming_normal_", "verbose": 0,
    }, "init_device": "cpu", "learned_pos_emb": True, "logit_scale": None,
    "no_bias": True, "norm_type": "low_precision_layernorm", "resid_pdrop": 0,
    "tokenizer_name": "EleutherAI/gpt-neox-20b", "torch_dtype": "bfloat16",
    "transformers_version": "4.28.1", "use_cache": False, "verbose": 0,
}  # fmt: skip


def read(raw: dict) -> ModelConfig:
    return configs.read(raw, location="config.json")


@pytest.mark.parametrize("for_hf", [True, False])
@pytest.mark.parametrize("name", [*folders.MODELS, *presets.PRESETS])
def test_a_written_config_reads_as_the_same_model(name, for_hf):
    mine = name in folders.MODELS
    cfg = folders.model(name) if mine else presets.model(name)
    raw = configs.write(cfg, dtype="float32", tokens={"eos_token_id": 0}, for_hf=for_hf)
    again = read(json.loads(json.dumps(raw)))
    ours = {n: getattr(cfg, n) for n in configs.OURS}
    assert dataclasses.replace(again, **ours) == cfg
    assert raw["eos_token_id"] == 0


def test_hf_native_has_other_defaults():
    cfg = read(HF_NATIVE)
    assert cfg.no_bias
    assert cfg.attn_config.alibi
    assert cfg.attn_config.clip_qkv == 3
    assert cfg.norm_eps == 1e-4
    mosaic = read(HF_NATIVE | {"architectures": ["MPTForCausalLM"]})
    assert not mosaic.no_bias
    assert not mosaic.attn_config.alibi


def test_mpt_7b_reads_as_its_preset():
    cfg = read(MPT_7B)
    assert cfg.init_config.init_std == 0.02  # of no use to kaiming_normal_
    assert dataclasses.replace(cfg, init_config=InitConfig()) == presets.model("mpt-7b")
    long = {
        "attn_config": MPT_7B["attn_config"] | {"alibi_bias_max": 16, "clip_qkv": 6}
    }
    cfg = dataclasses.replace(
        read(MPT_7B | long | {"max_seq_len": 65536}), init_config=InitConfig()
    )
    assert cfg == presets.model("mpt-7b-storywriter")


def test_mosaic_gpt_becomes_mpt():
    cfg = read(MOSAIC_GPT)
    assert cfg.attn_config.qk_ln
    assert cfg.attn_config.alibi
    assert cfg.d_mlp == 8192
    assert cfg.norm_type == "low_precision_layernorm"
    assert cfg.init_config.init_std == 0.02
    old = read(MOSAIC_GPT | {"low_precision_layernorm": False, "mlp_ratio": 2})
    assert old.norm_type == "layernorm"
    assert old.d_mlp == 4096


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"model_type": "llama"}, "model_type: expected 'mpt'"),
        ({"quantization_config": {"bits": 4}}, "quantised weights"),
        ({"n_heads": None}, "n_heads: missing"),
        ({"attn_config": {"rope": True}}, "rotary positions are not supported"),
        ({"ffn_config": {"ffn_type": "mb_moe"}}, "mixture of experts"),
        ({"d_modle": 3}, 'did you mean "d_model"'),
        ({"layer_norm_epsilon": 1e-3, "norm_eps": 1e-5}, "differ"),
        ({"attn_config": 7}, "attn_config: expected fields"),
        ({"n_heads": 5}, "does not divide d_model"),
    ],
)
def test_what_is_not_an_mpt_of_ours_is_refused(changes, said):
    with pytest.raises(ConfigError, match=said):
        read({"model_type": "mpt"} | folders.PLAIN | changes)


# Field -> a value that transformers ignores (each measured: equal logits).
IGNORED_BY_HF = {
    "attn_config.attn_type": {"attn_type": "multiquery_attention"},
    "attn_config.qk_ln": {"qk_ln": True},
    "attn_config.qk_gn": {"qk_gn": True},
    "attn_config.alibi": {"alibi": False},
    "attn_config.alibi_bias_max": {"alibi_bias_max": 16},
    "attn_config.attn_logit_softcapping": {"attn_logit_softcapping": 9.0},
    "attn_config.sliding_window_size": {"sliding_window_size": 4},
    "attn_config.prefix_lm": {"prefix_lm": True},
    "attn_config.attn_uses_sequence_id": {"attn_uses_sequence_id": True},
    "attn_config.attn_pdrop": {"attn_pdrop": 0.5},
}
IGNORED_BY_HF_AT_THE_TOP = {
    "no_bias": {"no_bias": False},
    "attention_bias": {"attention_bias": True},
    "expansion_ratio": {"expansion_ratio": 3},
    "head_dim": {"head_dim": 6},
    "logit_scale": {"logit_scale": 0.5},
    "norm_type": {"norm_type": "rmsnorm"},
    "final_logit_softcapping": {"final_logit_softcapping": 3.0},
    "resid_pdrop": {"resid_pdrop": 0.1},
    "emb_pdrop": {"emb_pdrop": 0.1},
    "embedding_fraction": {"embedding_fraction": 0.5},
    "ffn_config.ffn_type": {"ffn_config": {"ffn_type": "mptglu"}},
    "ffn_config.ffn_act_fn": {"ffn_config": {"ffn_act_fn": {"name": "relu"}}},
}


@pytest.mark.parametrize("field", [*IGNORED_BY_HF, *IGNORED_BY_HF_AT_THE_TOP])
def test_each_field_that_hf_ignores_is_named(field):
    attn = {"alibi": True} | IGNORED_BY_HF.get(field, {})
    changes = {"attn_config": attn} | IGNORED_BY_HF_AT_THE_TOP.get(field, {})
    cfg = configs.read(
        {"model_type": "mpt"} | folders.PLAIN | changes, location="config.json"
    )
    (said,) = configs.hf_ignores(cfg)
    assert said.startswith(f"{field}=")


@pytest.mark.parametrize("name", ["plain", "clip", "untied"])
def test_hf_holds_what_it_holds(name):
    assert configs.hf_ignores(folders.model(name)) == []


def test_gguf_is_refused_only_what_changes_its_logits():
    assert configs.gguf_ignores(folders.model("storywriter")) == []
    assert configs.gguf_ignores(folders.model("grouped")) == []
    said = "\n".join(configs.gguf_ignores(folders.model("odd")))
    for field in ("qk_gn", "prefix_lm", "head_dim", "logit_scale", "norm_type",
                  "sliding_window_size"):  # fmt: skip
        assert field in said
    assert configs.gguf_ignores(presets.model("mpt-7b-storywriter")) == []
