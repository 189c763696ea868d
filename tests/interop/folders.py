"""Checkpoints as other programs write them, made without mpt_jax.interop."""

from __future__ import annotations

import json
import pathlib
from typing import Any

import ml_dtypes
import numpy as np
from safetensors.numpy import save_file

from mpt_jax.config import ModelConfig, parse
from tests import reference

# What HF and llama.cpp can both say; three layers show a layer in the wrong place.
PLAIN = {
    "d_model": 16, "n_heads": 4, "n_layers": 3, "vocab_size": 40, "max_seq_len": 24,
    "learned_pos_emb": False, "no_bias": True, "attn_config": {"alibi": True},
}  # fmt: skip
# Beyond HF; each shows other tensors, or more fields.
MODELS: dict[str, dict[str, Any]] = {
    "plain": PLAIN,
    "clip": PLAIN | {"attn_config": {"alibi": True, "clip_qkv": 6}, "norm_eps": 1e-3},
    "untied": PLAIN | {"tie_word_embeddings": False},
    "storywriter": PLAIN
    | {"attn_config": {"alibi": True, "alibi_bias_max": 16, "clip_qkv": 6}},
    "biases_and_wpe": PLAIN
    | {"no_bias": False, "learned_pos_emb": True, "attn_config": {}},
    "qk_ln": PLAIN | {"attn_config": {"alibi": True, "qk_ln": True}},
    "grouped": PLAIN
    | {"attn_config": {"alibi": True, "attn_type": "grouped_query_attention",
                       "kv_n_heads": 2, "qk_ln": True}, "no_bias": False},
    "multiquery": PLAIN
    | {"attn_config": {"alibi": True, "attn_type": "multiquery_attention"}},
    "glu": PLAIN
    | {"ffn_config": {"ffn_type": "mptglu", "ffn_hidden_size": 24,
                      "ffn_act_fn": {"name": "silu"}}, "attention_bias": True},
    "odd": PLAIN
    | {"head_dim": 6, "logit_scale": "inv_sqrt_d_model", "norm_type": "rmsnorm",
       "final_logit_softcapping": 20.0, "expansion_ratio": 2, "pad_token_id": 1,
       "attn_config": {"alibi": True, "qk_gn": True, "prefix_lm": True,
                       "sliding_window_size": 5, "attn_logit_softcapping": 10.0}},
}  # fmt: skip
DTYPES = {"float32": np.float32, "bfloat16": ml_dtypes.bfloat16, "float16": np.float16}


def model(name: str, **ours: Any) -> ModelConfig:
    ours = {"compute_dtype": "float32"} | ours
    return parse(ModelConfig, MODELS[name] | ours)


def params(cfg: ModelConfig, *, seed: int = 0, dtype: str = "float32") -> dict:
    """Random parameters, of values that ``dtype`` holds."""
    tree = reference.random_params(cfg, seed)
    return reference.map_leaves(tree, lambda _, leaf: leaf.astype(DTYPES[dtype]))


def tensors(cfg: ModelConfig, tree: dict, *, fused: bool = True) -> dict[str, Any]:
    """torch's tensors of ``tree``, under MosaicML's names, layer by layer."""
    out: dict[str, np.ndarray] = {"transformer.wte.weight": tree["wte"]["weight"]}
    if "wpe" in tree:
        out["transformer.wpe.weight"] = tree["wpe"]["weight"]
    for n in range(cfg.n_layers):
        block = reference.layer(tree["blocks"], n)
        attn = dict(block.pop("attn"))
        qkv = {w: attn.pop(w) for w in ("Wq", "Wk", "Wv")}
        here = f"transformer.blocks.{n}."
        for kind in qkv["Wq"]:
            lead = cfg.d_model if kind == "weight" else 1
            rows = {w: p[kind].reshape(lead, -1).T for w, p in qkv.items()}
            rows = {w: r if kind == "weight" else r[:, 0] for w, r in rows.items()}
            if fused:
                whole = np.concatenate(list(rows.values()))
                out[f"{here}attn.Wqkv.{kind}"] = whole
            else:
                out |= {f"{here}attn.{w}.{kind}": r for w, r in rows.items()}
        out_proj = attn.pop("out_proj")
        weight = out_proj["weight"].reshape(-1, cfg.d_model).T
        out[f"{here}attn.out_proj.weight"] = weight
        if "bias" in out_proj:
            out[f"{here}attn.out_proj.bias"] = out_proj["bias"]
        for group, parts in (("attn.", attn), ("ffn.", block.pop("ffn")), ("", block)):
            for module, leaves in parts.items():
                for kind, leaf in leaves.items():
                    matrix = group == "ffn." and kind == "weight"
                    flat = leaf.T if matrix else leaf.reshape(-1)
                    out[f"{here}{group}{module}.{kind}"] = flat
    for kind, leaf in tree["norm_f"].items():
        out[f"transformer.norm_f.{kind}"] = leaf
    if "lm_head" in tree:
        out["lm_head.weight"] = tree["lm_head"]["weight"]
    return {name: np.ascontiguousarray(t) for name, t in out.items()}


def write(
    folder: pathlib.Path, config: dict[str, Any], arrays: dict[str, Any], *,
    n_files: int = 1,
) -> pathlib.Path:  # fmt: skip
    """A folder of config.json and safetensors, with an index if they are several."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json.dumps({"model_type": "mpt"} | config)
    (folder / "config.json").write_text(text)
    metadata, weight_map = {"format": "pt"}, {}
    if n_files == 1:
        save_file(arrays, folder / "model.safetensors", metadata)
        return folder
    names = list(arrays)
    for i in range(n_files):
        file = f"model-{i + 1:05d}-of-{n_files:05d}.safetensors"
        mine = names[i::n_files]
        save_file({n: arrays[n] for n in mine}, folder / file, metadata)
        weight_map |= dict.fromkeys(mine, file)
    index = {"metadata": {}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def make(
    folder: pathlib.Path, name: str = "plain", *, dtype: str = "float32", seed: int = 0,
    n_files: int = 1, fused: bool = True, **config: Any,
) -> tuple[ModelConfig, dict]:  # fmt: skip
    """Writes a MODELS folder; returns the model and its parameters."""
    cfg = model(name, param_dtype=dtype if dtype != "float16" else "float32")
    tree = params(cfg, seed=seed, dtype=dtype)
    arrays = tensors(cfg, tree, fused=fused)
    write(folder, MODELS[name] | config, arrays, n_files=n_files)
    return cfg, tree
