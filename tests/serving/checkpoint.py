"""A tiny checkpoint of bytes, one of which may be poison: it makes all logits NaN."""

from __future__ import annotations

import pathlib

import numpy as np

from mpt_jax.config import ModelConfig, parse
from tests.interop import folders

MODEL = {
    "d_model": 16, "n_heads": 4, "n_layers": 1, "vocab_size": 257, "max_seq_len": 256,
    "learned_pos_emb": False, "no_bias": True, "tie_word_embeddings": False,
    "attn_config": {"alibi": True},
}  # fmt: skip


def write(folder: pathlib.Path, *, poison: str = "") -> pathlib.Path:
    """Writes it; serve it with --tokenizer bytes."""
    params = folders.params(parse(ModelConfig, MODEL))
    for byte in poison.encode():
        params["wte"]["weight"][byte] = np.finfo(np.float32).max  # their sum is inf
    cfg = parse(ModelConfig, MODEL)
    return folders.write(folder, MODEL, folders.tensors(cfg, params))
