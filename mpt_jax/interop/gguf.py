"""llama.cpp's one-file format: its names, and reading it through the gguf library.

Weights keep their dtype; norms and biases are float32 there, as llama.cpp wants them,
and narrowed again on reading. Quantised files cannot be read.

Source: llama.cpp:conversion/mpt.py (which keys and which names llama.cpp's MPT reads)
and src/models/mpt.cpp (what it computes).
"""

from __future__ import annotations

import pathlib
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mpt_jax.errors import UserError
from mpt_jax.interop import names
from mpt_jax.interop.formats import DTYPES, Source, Stored

ARCH = "mpt"


def library() -> Any:
    try:
        import gguf
    except ModuleNotFoundError:
        raise UserError("needs the gguf library: pip install -e '.[gguf]'") from None
    return gguf


def their_names(gguf: Any, mosaicml: Iterable[str], n_layers: int) -> dict[str, str]:
    """MosaicML's name -> llama.cpp's."""
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MPT, n_layers)
    return {n: table.get_name(n, try_suffixes=(".weight", ".bias")) for n in mosaicml}


def open_gguf(path: pathlib.Path) -> Source:
    """The checkpoint in a .gguf file of architecture mpt; see sources.open_source()."""
    gguf = library()
    source = Source("gguf", path)
    try:
        reader = gguf.GGUFReader(path)
        fields = {name: f.contents() for name, f in reader.fields.items()
                  if name.startswith((f"{ARCH}.", "general."))}  # fmt: skip
        listed = [(t.name, t) for t in reader.tensors]
    except Exception as error:  # the library reads where the file says, or past it
        cause = (str(error).splitlines() or [""])[0]
        source.problems.append(f"{path.name}: {type(error).__name__}: {cause}")
        return source
    if fields.get("general.architecture") != ARCH:
        kind = fields.get("general.architecture")
        source.problems.append(f"{path.name}: architecture {kind!r}, expected 'mpt'")
        return source
    tensors = dict(listed)
    try:
        raw = _config(fields, tensors, path.name, source.problems)
    except (TypeError, ValueError, IndexError, ArithmeticError) as error:
        source.problems.append(f"{path.name}: keys of a wrong type: {error}")
        return source
    if raw is None:
        return source
    source.set_config(raw, path.name)
    for key in ("bos", "eos"):
        field = reader.fields.get(f"tokenizer.ggml.{key}_token_id")
        if field is not None:
            source.tokens[f"{key}_token_id"] = int(field.contents())
    every = names.tensors(source.config) if source.config is not None else {}
    back = {v: k for k, v in their_names(gguf, every, raw["n_layers"]).items()}
    narrow = None
    if fields.get("general.file_type") == gguf.LlamaFileType.MOSTLY_BF16:
        narrow = DTYPES["bfloat16"]
    source.tensors = [
        _stored(path, back.get(n, n), t, narrow) for n, t in tensors.items()
    ]
    return source


def _config(
    fields: Mapping[str, Any], tensors: dict[str, Any], location: str,
    problems: list[str],
) -> dict[str, Any] | None:  # fmt: skip
    """The config.json that the keys and the tensors' names amount to."""
    keys = {
        "n_heads": "attention.head_count", "d_model": "embedding_length",
        "n_layers": "block_count", "max_seq_len": "context_length",
        "d_mlp": "feed_forward_length", "norm_eps": "attention.layer_norm_epsilon",
        "alibi": "attention.max_alibi_bias",
    }  # fmt: skip
    found = {name: fields.get(f"{ARCH}.{key}") for name, key in keys.items()}
    lacking = [
        f"{location}: no {ARCH}.{keys[n]}" for n, v in found.items() if v is None
    ]
    if "token_embd.weight" not in tensors:
        lacking.append(f"{location}: no token_embd.weight")
    elif (found["n_layers"] or 0) > len(tensors):
        lacking.append(f"{location}: {len(tensors)} tensors cannot be so many blocks")
    if lacking:
        problems += lacking
        return None
    heads = found["n_heads"]
    kv_heads = fields.get(f"{ARCH}.attention.head_count_kv", heads)
    bias_max = found.pop("alibi")
    d_mlp, d_model = found.pop("d_mlp"), found["d_model"]
    attn: dict[str, Any] = {
        "alibi": bias_max > 0, "qk_ln": "blk.0.attn_q_norm.weight" in tensors,
        "clip_qkv": fields.get(f"{ARCH}.attention.clamp_kqv"),
    }  # fmt: skip
    if bias_max > 0:
        attn["alibi_bias_max"] = bias_max
    if kv_heads == 1 != heads:
        attn["attn_type"] = "multiquery_attention"
    elif kv_heads != heads:
        attn |= {"attn_type": "grouped_query_attention", "kv_n_heads": kv_heads}
    raw = found | {
        "model_type": "mpt", "attn_config": attn,
        "norm_eps": _shortest(found["norm_eps"]),
        "vocab_size": int(tensors["token_embd.weight"].shape[1]),
        "learned_pos_emb": "position_embd.weight" in tensors,
        "no_bias": "output_norm.bias" not in tensors,
        "attention_bias": "blk.0.attn_qkv.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
    }  # fmt: skip
    if d_mlp % d_model:
        raw["ffn_config"] = {"ffn_hidden_size": d_mlp}
    else:
        raw["expansion_ratio"] = d_mlp // d_model
    if raw["attention_bias"] != raw["no_bias"]:
        del raw["attention_bias"]
    if attn["clip_qkv"] is not None:
        attn["clip_qkv"] = _shortest(attn["clip_qkv"])
    return raw


def _shortest(value: float) -> float:
    """The decimal that was meant by a float32: 1e-05, not 9.999999747378752e-06."""
    return float(str(np.float32(value)))


def _stored(
    path: pathlib.Path, name: str, tensor: Any, narrow: np.dtype | None
) -> Stored:
    shape = tuple(int(n) for n in reversed(tensor.shape))
    dtype = {"F32": "float32", "F16": "float16", "BF16": "bfloat16", "F64": "float64"}
    kind = dtype.get(tensor.tensor_type.name, tensor.tensor_type.name)
    # A norm of a bfloat16 model: float32 that bfloat16 holds too.
    narrowed = narrow is not None and len(shape) == 1 and kind == "float32" and bool(
        np.array_equal(tensor.data.astype(narrow).astype(np.float32), tensor.data)
    )  # fmt: skip

    def read() -> np.ndarray:
        # Not tensor.data: pages read of a mapped file stay, and count as our memory.
        data = np.fromfile(path, np.uint8, tensor.n_bytes, offset=tensor.data_offset)
        data = data.view(DTYPES[kind]).reshape(shape)
        return data.astype(narrow) if narrowed else data

    return Stored(name, path, shape, "bfloat16" if narrowed else kind, read)
