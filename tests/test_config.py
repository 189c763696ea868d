"""config.parse: one frozen result, or one error that names every problem."""

import dataclasses

import pytest

from mpt_jax import config as C
from mpt_jax.errors import ConfigError

GOOD = {"steps": 10}
SMALL = {"d_model": 64, "n_heads": 4}


def problems(values, overrides=None, cls=C.TrainConfig):
    with pytest.raises(ConfigError) as caught:
        C.parse(cls, values, overrides)
    return caught.value.problems


def test_parse_keeps_defaults_and_is_frozen():
    config = C.parse(C.TrainConfig, GOOD)
    assert config == dataclasses.replace(C.TrainConfig(), steps=10)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.steps = 11


@pytest.mark.parametrize(
    ("path", "text", "value"),
    [
        ("steps", "1e4", 10_000),
        ("optim.lr", "1", 1.0),
        ("optim.betas", "0.9,0.99", (0.9, 0.99)),
        ("optim.betas", "(0.8, 0.9)", (0.8, 0.9)),
        ("optim.clip_norm", "none", None),
        ("optim.decay_mask", "[('.*bias', False), ('.*', True)]",
         ((".*bias", False), (".*", True))),
        ("checkpoint.every_steps", "5", 5),
        ("model.no_bias", "true", True),
        ("model.no_bias", "False", False),
        ("model.logit_scale", "inv_sqrt_d_model", "inv_sqrt_d_model"),
        ("model.logit_scale", "0.5", 0.5),
        ("model.attention_skip", "off", "off"),
        ("model.attention_skip", "1e-6", 1e-6),
        ("model.init_config.init_div_is_residual", "false", False),
        ("sample.prompt", "1e4", "1e4"),
        ("sample.prompt", "none", "none"),
    ],
)  # fmt: skip
def test_override_text_takes_the_declared_type(path, text, value):
    config = C.parse(C.TrainConfig, GOOD, {path: text})
    got = C.flatten(config)[path]
    assert got == value
    assert type(got) is type(value)


@pytest.mark.parametrize(
    ("values", "overrides", "message"),
    [
        ({"stepz": 1}, {}, 'stepz: unknown field; did you mean "steps"?'),
        (GOOD, {"optim.lrr": "1"}, 'optim.lrr: unknown field; did you mean "lr"?'),
        (GOOD, {"model.d_modle": "1"}, 'did you mean "d_model"'),
        (GOOD, {"steps": "abc"}, "steps: expected int or none, got 'abc'"),
        (GOOD, {"steps": "1.5"}, "steps: expected int or none"),
        (GOOD, {"steps": "-5"}, "steps: must be > 0, got -5"),
        (GOOD, {"optim.lr": "nan"}, "optim.lr: expected float"),
        (GOOD, {"optim.lr": "-1"}, "optim.lr: must be >= 0"),
        (GOOD, {"model.no_bias": "maybe"}, "model.no_bias: expected bool"),
        (GOOD, {"model.remat": "some"}, "expected one of 'none', 'attention'"),
        (GOOD, {"optim.betas": "0.9"}, "optim.betas:"),
        (GOOD, {"optim.betas": "0.9,1.0"}, "two numbers in [0, 1)"),
        (GOOD, {"optim": "3"}, "optim: expected fields"),
        ({**GOOD, "steps": True}, {}, "steps: expected int or none, got True"),
        ({**GOOD, "optim": {"lr": "1e-3"}}, {}, "optim.lr: expected float"),
        ({}, {}, "give exactly one"),
        (GOOD, {"tokens": "1e6"}, "give exactly one"),
        (GOOD, {"data.rates": "1,2,3"}, "3 rates for 2 tasks"),
        (GOOD, {"data.rates": "1,-1"}, "data.rates: must be > 0"),
        (GOOD, {"microbatches": "5"}, "5 does not divide global_batch_size 32"),
        (GOOD, {"data.seq_len": "4096"}, "where learned positions end"),
        (GOOD, {"mesh.context": "3"}, "3 does not divide data.seq_len 2048; nearest"),
        (GOOD, {"mesh.context": "2", "model.attn_config.attn_pdrop": "0.1"},
         "mesh.context: 2 parts of a row have no attention dropout"),
        (GOOD, {"mesh.context": "2", "model.attention": "reference"}, "use 'auto'"),
        (GOOD, {"mesh.data": "-1"}, "at most one axis can be -1"),
        (GOOD, {"mesh.tensor": "3"}, "3 does not divide model.n_heads 16"),
        (GOOD, {"mesh.fsdp": "3"}, "3 does not divide model.d_model 2048"),
        (GOOD, {"mesh.fsdp": "64"}, "global_batch_size: 32 / 1 microbatches"),
        (GOOD, {"optim.schedule": "{'warmup_steps': 1, 'warmup_tokens': 1}"},
         "only one of warmup_steps and warmup_tokens"),
    ],
)  # fmt: skip
def test_a_problem_is_named(values, overrides, message):
    found = problems(values, overrides)
    assert any(message in p for p in found), found


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"d_model": 65}, "n_heads: 4 does not divide d_model 65"),
        ({"n_layers": 0}, "n_layers: must be > 0"),
        ({"expansion_ratio": 0.7}, "not a positive integer"),
        ({"logit_scale": "sqrt"}, "logit_scale: a number or 'inv_sqrt_d_model'"),
        ({"embedding_fraction": 0.0}, "embedding_fraction: must be in (0, 1]"),
        ({"resid_pdrop": 1.0}, "resid_pdrop: a probability"),
        ({"attention_skip": 1.0}, "attention_skip: 'auto', 'off' or a share in [0, 1)"),
        ({"pad_token_id": 50368}, "outside the vocabulary"),
        ({"attn_config": {"kv_n_heads": 2}}, "with attn_type 'multihead_attention'"),
        ({"attn_config": {"attn_type": "grouped_query_attention"}}, "kv_n_heads"),
        ({"attn_config": {"attn_type": "grouped_query_attention", "kv_n_heads": 3}},
         "3 does not divide n_heads 4"),
        ({"attn_config": {"qk_ln": True, "qk_gn": True}}, "only one of qk_ln"),
        ({"attn_config": {"sliding_window_size": -2}}, "-1 (off) or >= 0"),
        ({"attn_config": {"attn_logit_softcapping": 0.0}}, "must be > 0"),
        ({"init_config": {"name": "baseline_"}}, "baseline_ needs it"),
        ({"init_config": {"name": "xavier_normal_"}}, "init_gain"),
        ({"init_config": {"emb_init_uniform_lim": (1.0,)}}, "a limit or (low, high)"),
        # MosaicML fields that we do not have
        ({"attn_config": {"rope": True}}, "attn_config.rope=True: rotary positions"),
        ({"attn_config": {"kv_dim": 8}}, "attn_config.kv_dim=8: cross-attention"),
        ({"attn_config": {"attn_temperature_tuning": {"attn_scale": 0.1}}},
         "attn_temperature_tuning.attn_scale"),
        ({"ffn_config": {"ffn_type": "mb_moe"}}, "mixture of experts"),
        ({"ffn_config": {"moe_num_experts": 8}}, "mixture of experts"),
        ({"block_overrides": {"order": []}}, "block_overrides"),
        ({"fc_type": "te"}, "Transformer Engine"),
        ({"norm_type": "triton_rmsnorm"}, "rmsnorm computes the same"),
    ],
)  # fmt: skip
def test_a_model_problem_is_named(fields, message):
    found = problems({**SMALL, **fields}, cls=C.ModelConfig)
    assert any(message in p for p in found), found
    if "d_model" not in fields:  # exactly the planted one, wherever the model sits
        nested = problems({**GOOD, "model": {**SMALL, **fields}})
        assert [p.startswith("model.") for p in nested] == [True] * len(nested)


def test_all_problems_come_at_once():
    found = problems({"stepz": 1, "model": {"d_model": 65}}, {"optim.lrr": "2"})
    assert len(found) == 4  # and steps is missing


def test_a_mosaicml_config_json_reads_as_ours():
    # The keys of llm-foundry's MPTConfig, as mpt-7b-storywriter's config.json has them.
    values = {
        "d_model": 4096, "n_heads": 32, "n_layers": 32, "expansion_ratio": 4,
        "max_seq_len": 65536, "vocab_size": 50432, "resid_pdrop": 0, "emb_pdrop": 0,
        "learned_pos_emb": True, "no_bias": True, "logit_scale": None,
        "embedding_fraction": 1.0, "norm_type": "low_precision_layernorm",
        "use_cache": False, "verbose": 0, "init_device": "cpu", "fc_type": "torch",
        "attn_config": {
            "alibi": True, "alibi_bias_max": 16, "attn_impl": "torch", "attn_pdrop": 0,
            "attn_type": "multihead_attention", "attn_uses_sequence_id": False,
            "clip_qkv": 6, "prefix_lm": False, "qk_ln": False, "softmax_scale": None,
        },
        "init_config": {
            "name": "kaiming_normal_", "fan_mode": "fan_in", "init_gain": 0,
            "init_nonlinearity": "relu", "init_div_is_residual": True, "verbose": 0,
            "emb_init_std": None, "emb_init_uniform_lim": None, "init_std": None,
        },
    }  # fmt: skip
    model = C.parse(C.ModelConfig, values)
    assert model.attn_config.alibi_bias_max == 16
    assert model.attn_config.clip_qkv == 6
    assert not model.has_wpe


def test_json_round_trip():
    import json

    config = C.parse(C.TrainConfig, GOOD, {"model.attn_config.clip_qkv": "6"})
    assert C.parse(C.TrainConfig, json.loads(C.to_json(config))) == config


def test_resume_names_the_differing_fields():
    saved = dataclasses.asdict(C.parse(C.TrainConfig, GOOD))
    new = {"steps": "20", "mesh.data": "2", "optim.lr": "0.5", "model.d_model": "1024"}
    config = C.parse(C.TrainConfig, GOOD, new)
    found = C.resume_differences(saved, config)
    assert [line.split(":")[0] for line in found] == ["model.d_model", "optim.lr"]
    assert "checkpoint has 2048, this run has 1024" in found[0]


def test_durations_in_tokens():
    config = C.parse(
        C.TrainConfig,
        {"tokens": 1_000_000, "global_batch_size": 4, "data": {"seq_len": 512},
         "optim": {"schedule": {"warmup_tokens": 4096}}},
    )  # fmt: skip
    assert config.total_steps == 489  # 488.3 rounded up: never fewer tokens than asked
    assert config.warmup_steps == 2


def test_help_knows_every_knob():
    assert set(C.meanings(C.TrainConfig)) == set(C.flatten(C.TrainConfig()))
