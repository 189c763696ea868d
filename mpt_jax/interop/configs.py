"""Their config.json and our ModelConfig, and what each format cannot say.

Nothing is assumed: sizes must be in the file, and what is absent takes the default of
the program that wrote it. Two programs spell ``model_type: mpt``: MosaicML's (its
defaults are those of ModelConfig) and Hugging Face's own MptConfig, whose defaults are
ALiBi and no biases.

Source: llm-foundry@8c8dd48:llmfoundry/models/mpt/configuration_mpt.py; transformers
5.23.0:models/mpt/configuration_mpt.py and modeling_mpt.py; the flat mosaic_gpt keys:
mosaicml/examples before May 2023, configuration_mosaic_gpt.py.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from mpt_jax.config import ActivationConfig, AttnConfig, ModelConfig, flatten, parse
from mpt_jax.errors import ConfigError

# The fields that run the model, in ModelConfig only.
OURS = (
    "compute_dtype", "param_dtype", "remat", "scan_layers", "attention",
    "attention_skip",
)  # fmt: skip
REQUIRED = ("d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len")
ALIASES = {
    "num_attention_heads": "n_heads", "hidden_size": "d_model",
    "num_hidden_layers": "n_layers",
}  # fmt: skip
# Kept beside the model: a tokenizer and a generation loop want them.
TOKENS = ("bos_token_id", "eos_token_id", "tokenizer_name")
# Of transformers' base class: they change no logit. Any other unknown key is refused.
INERT = frozenset(
    """
    _attn_implementation _attn_implementation_autoset _commit_hash _name_or_path
    add_cross_attention architectures auto_map bad_words_ids begin_suppress_tokens
    chunk_size_feed_forward cross_attention_hidden_size decoder_start_token_id
    diversity_penalty do_sample dtype early_stopping encoder_no_repeat_ngram_size
    exponential_decay_length_penalty finetuning_task forced_bos_token_id
    forced_eos_token_id id2label initializer_range is_decoder is_encoder_decoder
    label2id length_penalty loss_fn max_length min_length model_type name
    no_repeat_ngram_size num_beam_groups num_beams num_return_sequences
    output_attentions output_hidden_states output_scores prefix problem_type
    pruned_heads remove_invalid_values repetition_penalty return_dict
    return_dict_in_generate sep_token_id suppress_tokens task_specific_params
    temperature tf_legacy_loss tie_encoder_decoder tokenizer_class top_k top_p
    torch_dtype torchscript transformers_version typical_p use_bfloat16
""".split()
)
# transformers' defaults where they are not ours.
HF_DEFAULTS = {"no_bias": True, "attn_config": {"alibi": True}}
_LEGACY_ATTN = (
    "attn_pdrop", "attn_impl", "softmax_scale", "prefix_lm", "attn_uses_sequence_id",
    "alibi", "alibi_bias_max",
)  # fmt: skip
_LEGACY_INIT = (
    "fan_mode", "init_nonlinearity", "init_gain", "init_std", "init_div_is_residual",
    "emb_init_std", "emb_init_uniform_lim",
)  # fmt: skip


def read(raw: Mapping[str, Any], *, location: str) -> ModelConfig:
    """The model that a config.json describes.

    Raises: ConfigError: every unknown field, missing size and thing that we do not
      implement (rotary positions, mixtures of experts, quantised weights ...).
    """
    problems = _refusals(raw)
    fields = {ALIASES.get(k, k): v for k, v in raw.items()}
    if problems:
        raise ConfigError(problems, location=location)
    if raw.get("model_type") == "mosaic_gpt":
        fields = _from_mosaic_gpt(fields)
    elif raw.get("architectures") == ["MptForCausalLM"]:  # MosaicML's is MPTFor...
        attn = HF_DEFAULTS["attn_config"] | dict(fields.get("attn_config") or {})
        fields = HF_DEFAULTS | fields | {"attn_config": attn}
    eps = fields.pop("layer_norm_epsilon", None)  # what HF calls norm_eps
    if eps is not None and fields.setdefault("norm_eps", eps) != eps:
        problems.append(
            f"norm_eps={fields['norm_eps']} and layer_norm_epsilon={eps} differ"
        )
    problems += [f"{n}: missing" for n in REQUIRED if not _is_size(fields.get(n))]
    fields = {k: v for k, v in fields.items() if k not in INERT and k not in TOKENS}
    attn = dict(fields.get("attn_config") or {})
    fields["attn_config"] = {k: v for k, v in attn.items() if k not in INERT}
    try:
        return parse(ModelConfig, fields) if not problems else _raise(problems)
    except ConfigError as error:
        found = [*problems, *(p for p in error.problems if p not in problems)]
        raise ConfigError(found, location=location) from None


def _raise(problems: list[str]) -> ModelConfig:
    raise ConfigError(problems)


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _refusals(raw: Mapping[str, Any]) -> list[str]:
    problems = []
    kind = raw.get("model_type")
    if kind not in ("mpt", "mosaic_gpt"):
        problems.append(f"model_type: expected 'mpt' or 'mosaic_gpt', got {kind!r}")
    if raw.get("quantization_config"):
        problems.append("quantization_config: quantised weights cannot be read")
    for name in ("attn_config", "ffn_config", "init_config"):
        if not isinstance(raw.get(name, {}), (Mapping, type(None))):
            problems.append(f"{name}: expected fields, got {raw[name]!r}")
    return problems


def _from_mosaic_gpt(fields: Mapping[str, Any]) -> dict[str, Any]:
    """The flat keys of before May 2023 in today's places."""
    new = dict(fields)
    attn = {k: new.pop(k) for k in _LEGACY_ATTN if k in new}
    for old, name in (("attn_qk_ln", "qk_ln"), ("attn_clip_qkv", "clip_qkv")):
        if old in new:
            attn[name] = new.pop(old)
    init = {k: new.pop(k) for k in _LEGACY_INIT if k in new}
    if "param_init_fn" in new:
        init["name"] = new.pop("param_init_fn")
    if "mlp_ratio" in new:
        new["expansion_ratio"] = new.pop("mlp_ratio")
    if "low_precision_layernorm" in new:
        low = new.pop("low_precision_layernorm")
        new["norm_type"] = "low_precision_layernorm" if low else "layernorm"
    new["attn_config"] = attn | dict(new.get("attn_config") or {})
    new["init_config"] = init | dict(new.get("init_config") or {})
    return new


# ---------------------------------------------------------------------------- writing

# What MosaicML has had since its first release; later fields only where they differ
# from their defaults, so that older versions of its code read the file too.
_SINCE_V01 = frozenset(
    """
    d_model n_heads n_layers expansion_ratio max_seq_len vocab_size resid_pdrop
    emb_pdrop learned_pos_emb logit_scale no_bias embedding_fraction norm_type norm_eps
    tie_word_embeddings attn_config.attn_type attn_config.attn_pdrop attn_config.qk_ln
    attn_config.clip_qkv attn_config.softmax_scale attn_config.attn_uses_sequence_id
    attn_config.alibi attn_config.alibi_bias_max ffn_config.ffn_type
""".split()
)
# Floats of ours that transformers' config classes want as integers; the others they
# want as floats.
_INTEGERS = ("expansion_ratio", "attn_config.alibi_bias_max", "attn_config.attn_pdrop")


def write(
    cfg: ModelConfig, *, dtype: str, tokens: Mapping[str, Any], for_hf: bool = False
) -> dict[str, Any]:
    """A config.json for MosaicML's code, or with ``for_hf`` for transformers' too.

    Args:
      dtype: of the weights.
      tokens: bos_token_id and so on, where known.
      for_hf: check hf_ignores() first.
    """
    defaults, flat = flatten(ModelConfig()), flatten(cfg)
    new: dict[str, Any] = {
        "architectures": ["MPTForCausalLM"],  # llama.cpp knows no other spelling
        "model_type": "mpt", "torch_dtype": dtype, "use_cache": True,
        "init_device": "cpu", "attn_config": {"attn_impl": "torch"},
        "ffn_config": {}, "init_config": {},
    }  # fmt: skip
    for path, value in flat.items():
        same = path not in _SINCE_V01 and value == defaults[path]
        if (same and not path.startswith("init_config")) or path in OURS:
            continue
        node = new
        *parents, leaf = path.split(".")
        for parent in parents:
            node = node.setdefault(parent, {})
        integer = path in _INTEGERS and value == int(value)
        node[leaf] = int(value) if integer else value
    act = cfg.ffn_config.ffn_act_fn
    if act != ActivationConfig():  # torch passes every key on to the function
        approximate = {"approximate": act.approximate} if act.name == "gelu" else {}
        new["ffn_config"]["ffn_act_fn"] = {"name": act.name} | approximate
    if cfg.attn_config.attn_type == "grouped_query_attention":
        new["attn_config"]["kv_n_heads"] = cfg.n_kv_heads
    if for_hf:
        new["layer_norm_epsilon"] = cfg.norm_eps
    return new | {k: v for k, v in tokens.items() if v is not None}


def hf_ignores(cfg: ModelConfig) -> list[str]:
    """Fields whose value transformers' MptForCausalLM ignores, or cannot hold."""
    plain = AttnConfig()
    rows: list[tuple[str, Any, str, bool]] = [
        (f"attn_config.{name}", getattr(cfg.attn_config, name), expected,
         getattr(cfg.attn_config, name) == getattr(plain, name))
        for name, expected in (
            ("attn_type", "multihead_attention"), ("attn_pdrop", "0"),
            ("qk_ln", "False"), ("qk_gn", "False"), ("alibi_bias_max", "8"),
            ("attn_logit_softcapping", "None"), ("attn_uses_sequence_id", "False"),
            ("sliding_window_size", "-1"), ("prefix_lm", "False"),
        )
    ]  # fmt: skip
    ratio = cfg.d_mlp / cfg.d_model
    rows += [
        ("attn_config.alibi", cfg.attn_config.alibi, "True", cfg.attn_config.alibi),
        ("resid_pdrop", cfg.resid_pdrop, "0", cfg.resid_pdrop == 0),
        ("emb_pdrop", cfg.emb_pdrop, "0", cfg.emb_pdrop == 0),
        ("embedding_fraction", cfg.embedding_fraction, "1",
         cfg.embedding_fraction == 1),
        *_inference_rows(cfg),
        ("no_bias", cfg.no_bias, "True", cfg.no_bias),
        ("attention_bias", cfg.attention_bias, "False or None", not cfg.attention_bias),
        ("expansion_ratio", ratio, "4", ratio == 4),
    ]  # fmt: skip
    return _misfits(rows)


def gguf_ignores(cfg: ModelConfig) -> list[str]:
    """Fields whose value changes logits, and that llama.cpp's MPT does not have.

    Dropouts and what else only training sees are not in a GGUF file.
    """
    a = cfg.attn_config
    default_scale = (cfg.d_model / cfg.n_heads) ** -0.5
    return _misfits([
        ("attn_config.qk_gn", a.qk_gn, "False", not a.qk_gn),
        ("attn_config.softmax_scale", a.softmax_scale, "None",
         cfg.softmax_scale == default_scale),
        ("attn_config.attn_logit_softcapping", a.attn_logit_softcapping, "None",
         a.attn_logit_softcapping is None),
        ("attn_config.sliding_window_size", a.sliding_window_size, "-1",
         a.sliding_window_size == -1),
        ("attn_config.prefix_lm", a.prefix_lm, "False", not a.prefix_lm),
        *_inference_rows(cfg),
    ])  # fmt: skip


def _inference_rows(cfg: ModelConfig) -> list[tuple[str, Any, str, bool]]:
    """What neither transformers nor llama.cpp has."""
    scale, ffn = cfg.logit_multiplier, cfg.ffn_config
    return [
        ("head_dim", cfg.head_dim, "d_model / n_heads",
         cfg.d_head * cfg.n_heads == cfg.d_model),
        ("logit_scale", cfg.logit_scale, "None", scale == 1),
        ("final_logit_softcapping", cfg.final_logit_softcapping, "None",
         cfg.final_logit_softcapping is None),
        ("norm_type", cfg.norm_type, "a layernorm", "layernorm" in cfg.norm_type),
        ("ffn_config.ffn_type", ffn.ffn_type, "mptmlp", ffn.ffn_type == "mptmlp"),
        ("ffn_config.ffn_act_fn", ffn.ffn_act_fn.name + (
            ":tanh" if ffn.ffn_act_fn.approximate == "tanh" else ""), "gelu",
         ffn.ffn_act_fn == ActivationConfig()),
    ]  # fmt: skip


def _misfits(rows: list[tuple[str, Any, str, bool]]) -> list[str]:
    return [
        f"{name}={value!r}: only {expected}"
        for name, value, expected, fits in rows
        if not fits
    ]


def to_meta(cfg: ModelConfig) -> dict[str, Any]:
    """The model as the meta.json of our checkpoints holds it."""
    return dataclasses.asdict(cfg)
