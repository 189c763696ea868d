"""A tiny Chat checkpoint as others write it: random weights, ChatML's tokens."""

from __future__ import annotations

import pathlib

import tokenizers

from mpt_jax.config import ModelConfig, parse
from tests.interop import folders

VOCAB = 320  # 300 pieces, ChatML's two, padding
MODEL = {
    "d_model": 16, "n_heads": 4, "n_layers": 2, "vocab_size": VOCAB,
    "max_seq_len": 4096, "learned_pos_emb": False, "no_bias": True,
    "attn_config": {"alibi": True},
}  # fmt: skip


def tokenizer_json(*, chatml: bool) -> str:
    """GPT-NeoX's tokenizer in small."""
    library = tokenizers.Tokenizer(tokenizers.models.BPE())
    library.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    library.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|endoftext|>", "<|padding|>"],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    library.train_from_iterator(
        ["user\nassistant system\n### Response:\n"] * 3, trainer
    )
    if chatml:
        library.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return library.to_str()


def write(folder: pathlib.Path) -> tuple[ModelConfig, dict]:
    """Writes the checkpoint; returns the model and its parameters."""
    cfg = parse(ModelConfig, MODEL | {"compute_dtype": "float32"})
    params = folders.params(cfg)
    folders.write(folder, MODEL, folders.tensors(cfg, params))
    (folder / "tokenizer.json").write_text(tokenizer_json(chatml=True))
    return cfg, params
