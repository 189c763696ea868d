"""Every MPT there is: the LLM Foundry ladder as trained, the checkpoints as released.

``published_params`` is what MosaicML printed or what the released shapes add up to; a
test holds each against the model's shapes to the last digit. ``unverified`` names
fields that no source we could read confirms: trust the checkpoint's own config.json.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from ml_collections import ConfigDict

from mpt_jax.config import ModelConfig, TrainConfig, nest, parse

YAMLS = "llm-foundry@8c8dd48:scripts/train/yamls/pretrain"
README = "llm-foundry@8c8dd48:scripts/train/benchmarking/README.md"


@dataclasses.dataclass(frozen=True)
class Preset:
    """A named model. ``model``: ModelConfig fields that differ from the defaults;
    ``train``: likewise of TrainConfig, dotted, where the recipe was published."""

    model: dict[str, Any]
    published_params: int
    source: str
    train: dict[str, Any] = dataclasses.field(default_factory=dict)
    unverified: tuple[str, ...] = ()


def _foundry(
    d_model: int, n_heads: int, n_layers: int, *, params: int, lr: float, batch: int,
    batches: int, name: str, remat: str = "none",
) -> Preset:  # fmt: skip
    """A yaml of LLM Foundry: biases and learned positions, as it really trains."""
    return Preset(
        model={
            "d_model": d_model, "n_heads": n_heads, "n_layers": n_layers,
            "max_seq_len": 2048, "vocab_size": 50368, "remat": remat,
        },
        published_params=params,
        source=f"{YAMLS}/{name}.yaml; {README}",
        train={
            "steps": batches, "global_batch_size": batch, "optim.lr": lr,
            "optim.name": "decoupled_adamw", "optim.betas": (0.9, 0.95),
            "optim.eps": 1e-8, "optim.weight_decay": 0.0, "optim.clip_norm": 1.0,
            "optim.schedule.name": "cosine", "optim.schedule.warmup_steps": 100,
            "optim.schedule.alpha_f": 0.1, "seed": 17, "eval.every_steps": 500,
        },
    )  # fmt: skip


def _released(
    d_model: int, n_heads: int, n_layers: int, *, params: int, source: str,
    max_seq_len: int = 2048, alibi_bias_max: float = 8, clip_qkv: float | None = None,
    qk_ln: bool = False, unverified: tuple[str, ...] = (),
) -> Preset:  # fmt: skip
    """A checkpoint on the hub: ALiBi, no biases, 50432 = 394 * 128 embedding rows."""
    return Preset(
        model={
            "d_model": d_model, "n_heads": n_heads, "n_layers": n_layers,
            "max_seq_len": max_seq_len, "vocab_size": 50432, "no_bias": True,
            "attn_config": {
                "alibi": True, "alibi_bias_max": alibi_bias_max, "clip_qkv": clip_qkv,
                "qk_ln": qk_ln,
            },
        },
        published_params=params,
        source=source,
        unverified=unverified,
    )  # fmt: skip


_7B = {"d_model": 4096, "n_heads": 32, "n_layers": 32, "params": 6_649_286_656}
# 64 heads of 112 features; the Foundry yaml's 56 heads of 128 are another model.
_30B = {"d_model": 7168, "n_heads": 64, "n_layers": 48, "params": 29_957_200_896}

PRESETS: dict[str, Preset] = {
    "mpt-125m": _foundry(768, 12, 12, params=125_311_488, lr=6e-4, batch=256,
                         batches=4800, name="mpt-125m"),
    "mpt-350m": _foundry(1024, 16, 24, params=355_985_408, lr=3e-4, batch=256,
                         batches=13400, name="mpt-350m"),
    "mpt-760m": _foundry(1536, 12, 24, params=760_470_528, lr=2.5e-4, batch=256,
                         batches=29000, name="mpt-760m"),
    "mpt-1b": _foundry(2048, 16, 24, params=1_315_950_592, lr=2e-4, batch=512,
                       batches=24800, name="mpt-1b"),
    "mpt-3b": _foundry(2560, 20, 32, params=2_651_837_440, lr=1.6e-4, batch=512,
                       batches=51500, name="mpt-3b", remat="full"),
    "mpt-7b-foundry": _foundry(4096, 32, 32, params=6_658_859_008, lr=1.2e-4,
                               batch=1024, batches=63900, name="mpt-7b", remat="full"),
    "mpt-13b": _foundry(5120, 40, 40, params=12_853_954_560, lr=1e-4, batch=1024,
                        batches=124000, name="mpt-13b", remat="full"),
    "mpt-30b-foundry": _foundry(7168, 56, 48, params=29_975_214_080, lr=1e-4,
                                batch=2048, batches=143100, name="mpt-30b",
                                remat="full"),
    "mpt-70b": _foundry(8192, 64, 80, params=64_862_437_376, lr=8e-5, batch=2048,
                        batches=333800, name="mpt-70b", remat="full"),
    "mpt-7b": _released(**_7B, source="config.json copies; model card"),
    "mpt-7b-instruct": _released(**_7B, source="model card",
                                 unverified=("config.json not seen",)),
    "mpt-7b-chat": _released(**_7B, source="model card",
                             unverified=("config.json not seen",)),
    "mpt-7b-storywriter": _released(
        **_7B, max_seq_len=65536, alibi_bias_max=16, clip_qkv=6,
        source="config.json @7ab7042; ggml issue 145"),
    "mpt-7b-8k": _released(**_7B, max_seq_len=8192, source="model card; a copy"),
    "mpt-7b-8k-instruct": _released(**_7B, max_seq_len=8192, source="model card",
                                    unverified=("config.json not seen",)),
    "mpt-7b-8k-chat": _released(**_7B, max_seq_len=8192, source="model card",
                                unverified=("config.json not seen",)),
    "mpt-30b": _released(
        **_30B, max_seq_len=8192, source="model card (29.95B); config.json copies",
        unverified=("attn_config.clip_qkv", "attn_config.attn_uses_sequence_id")),
    "mpt-30b-instruct": _released(
        **_30B, max_seq_len=8192, source="model card",
        unverified=("attn_config.clip_qkv", "attn_config.attn_uses_sequence_id")),
    "mpt-30b-chat": _released(
        **_30B, max_seq_len=8192, source="model card; a pre-release config differs",
        unverified=("attn_config.clip_qkv", "attn_config.attn_uses_sequence_id")),
    "mpt-1b-redpajama-200b": _released(
        2048, 16, 24, params=1_311_442_944, qk_ln=True,
        source="model card; mosaic_gpt state dict names",
        unverified=("no_bias", "vocab_size")),
    "mpt-1b-redpajama-200b-dolly": _released(
        2048, 16, 24, params=1_311_442_944, qk_ln=True, source="model card",
        unverified=("no_bias", "vocab_size")),
}  # fmt: skip


def model(name: str) -> ModelConfig:
    """The ModelConfig of a preset.

    >>> model("mpt-7b").n_heads
    32
    """
    return parse(ModelConfig, PRESETS[name].model, location=f"preset {name}")


def config(name: str | None = None, **fields: Any) -> ConfigDict:
    """Every knob with its default, then the preset's model and recipe, then ``fields``.

    What a file in configs/ starts from; parse() reports a misspelt assignment to it.
    """
    values: dict[str, Any] = dataclasses.asdict(TrainConfig())
    if name is not None:
        preset = PRESETS[name]
        values = nest(preset.train, values)
        values["model"] = _merge(values["model"], preset.model)
    values = _merge(values, fields)
    return ConfigDict(values)


def _merge(base: dict[str, Any], top: dict[str, Any]) -> dict[str, Any]:
    out = dict(base)
    for key, value in top.items():
        nested = isinstance(value, dict) and isinstance(out.get(key), dict)
        out[key] = _merge(out[key], value) if nested else value
    return out
