"""Writes llama.cpp's one-file format through the gguf library; see gguf.py."""

from __future__ import annotations

import json
import math
import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mpt_jax.config import ModelConfig
from mpt_jax.errors import UserError
from mpt_jax.interop import configs, names
from mpt_jax.interop.formats import DTYPES
from mpt_jax.interop.gguf import ARCH, library, their_names
from mpt_jax.interop.read import check
from mpt_jax.interop.write import Canvas, Parts, Place, count_bytes, unfinished

_RAW = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}


def write_gguf(
    out: pathlib.Path,
    parts: Parts,
    cfg: ModelConfig,
    *,
    dtype: str,
    tokens: Mapping[str, Any],
    tokenizer: Iterable[pathlib.Path] = (),
) -> pathlib.Path:
    """Writes ``out``/NAME.gguf and reads it back; arguments as write_folder().

    Without a tokenizer.json among ``tokenizer`` the file has no vocabulary, and
    llama.cpp takes and gives ids.

    Raises: UserError: llama.cpp's MPT cannot compute this model.
    """
    gguf = library()
    if ignored := configs.gguf_ignores(cfg):
        raise UserError(
            "llama.cpp's MPT would compute something else, as it has:\n  "
            + "\n  ".join(ignored)
        )
    tensors = names.tensors(cfg)
    theirs = their_names(gguf, tensors, cfg.n_layers)
    name = f"{out.name}.gguf"
    with unfinished(out, n_bytes=count_bytes(cfg, dtype)) as folder:
        folder.mkdir()
        file = folder / name
        writer = gguf.GGUFWriter(file, ARCH)
        _add_config(gguf, writer, cfg, dtype)
        _add_tokenizer(gguf, writer, cfg, tokens, tokenizer)
        dtypes, n_bytes = {}, {}
        for n, tensor in tensors.items():
            kind = dtype if len(tensor.shape) > 1 else "float32"
            dtypes[n], raw = DTYPES[kind], gguf.GGMLQuantizationType[_RAW[kind]]
            n_bytes[n] = tensor.size * dtypes[n].itemsize
            writer.add_tensor_info(
                theirs[n], tensor.shape, np.dtype(np.float32), n_bytes[n], raw_dtype=raw
            )
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        pad = writer.data_alignment
        offset = math.ceil(file.stat().st_size / pad) * pad
        writer.close()
        places = {}
        for n in tensors:
            places[n] = Place(file, offset, dtypes[n])
            offset += math.ceil(n_bytes[n] / pad) * pad
        with open(file, "r+b") as stream:
            stream.truncate(offset)
        canvas = Canvas(tensors, places)
        canvas.fill(parts)
        canvas.compare(check(file).stream())
    return out / name


def _add_config(gguf: Any, writer: Any, cfg: ModelConfig, dtype: str) -> None:
    a, types = cfg.attn_config, gguf.LlamaFileType
    writer.add_name(f"MPT {cfg.d_model}x{cfg.n_layers}")
    writer.add_context_length(cfg.max_seq_len)
    writer.add_embedding_length(cfg.d_model)
    writer.add_block_count(cfg.n_layers)
    writer.add_feed_forward_length(cfg.d_mlp)
    writer.add_head_count(cfg.n_heads)
    writer.add_head_count_kv(cfg.n_kv_heads)
    writer.add_layer_norm_eps(cfg.norm_eps)
    writer.add_vocab_size(cfg.vocab_size)
    if a.clip_qkv:
        writer.add_clamp_kqv(a.clip_qkv)
    writer.add_max_alibi_bias(a.alibi_bias_max if a.alibi else 0.0)
    kind = {"float32": types.ALL_F32, "bfloat16": types.MOSTLY_BF16,
            "float16": types.MOSTLY_F16}[dtype]  # fmt: skip
    writer.add_file_type(kind)


def _add_tokenizer(
    gguf: Any, writer: Any, cfg: ModelConfig, tokens: Mapping[str, Any],
    files: Iterable[pathlib.Path],
) -> None:  # fmt: skip
    """The byte-level BPE of a tokenizer.json, padded to the rows of the embedding."""
    file = next((f for f in files if f.name == "tokenizer.json"), None)
    if file is None:
        writer.add_tokenizer_model("no_vocab")
        return
    raw = json.loads(file.read_bytes())
    model, kinds = raw["model"], gguf.TokenType
    if model.get("type") != "BPE":
        raise UserError("only a BPE tokenizer can go into GGUF", location=str(file))
    words = {i: f"[PAD{i}]" for i in range(cfg.vocab_size)}
    types = dict.fromkeys(words, kinds.UNUSED)
    for word, i in model["vocab"].items():
        words[i], types[i] = word, kinds.NORMAL
    special = {}
    for token in raw.get("added_tokens") or []:
        i, word = token["id"], token["content"]
        words[i] = special[word] = word
        types[i] = kinds.CONTROL if token.get("special") else kinds.USER_DEFINED
        special[word] = i
    merges = [m if isinstance(m, str) else " ".join(m) for m in model["merges"]]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("mpt")
    writer.add_token_list([words[i] for i in range(cfg.vocab_size)])
    writer.add_token_types([types[i] for i in range(cfg.vocab_size)])
    writer.add_token_merges(merges)
    end = special.get("<|endoftext|>")
    for add, name in ((writer.add_bos_token_id, "bos_token_id"),
                      (writer.add_eos_token_id, "eos_token_id")):  # fmt: skip
        value = tokens.get(name, end)
        if isinstance(value, int):
            add(value)
