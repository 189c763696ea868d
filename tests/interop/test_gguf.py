"""llama.cpp's format: what its reader of MPT looks for, and what it cannot hold."""

import json

import numpy as np
import pytest

from mpt_jax.convert import convert_to
from mpt_jax.errors import CheckpointError, UserError
from mpt_jax.interop import read
from tests.interop import folders
from tests.interop.test_read import assert_bitwise_equal, collect

gguf = pytest.importorskip("gguf", reason="needs the gguf extra")

N_FLIPS = 100

TOKENIZER = {
    "model": {
        "type": "BPE",
        "vocab": {"<|endoftext|>": 0, "a": 1, "b": 2, "ab": 3},
        "merges": [["a", "b"]],
    },
    "added_tokens": [
        {"id": 0, "content": "<|endoftext|>", "special": True},
        {"id": 4, "content": "  ", "special": False},
    ],
}


def write(folder, name="plain", *, dtype="float32", tokenizer=None):
    cfg, tree = folders.make(folder / "src", name, dtype=dtype)
    if tokenizer is not None:
        (folder / "src/tokenizer.json").write_text(json.dumps(tokenizer))
    convert_to(folder / "src", folder / "out", format="gguf")
    return cfg, tree, folder / "out/out.gguf"


def keys(file):
    return {n: f.contents() for n, f in gguf.GGUFReader(file).fields.items()}


def test_the_keys_are_those_that_llama_cpp_reads(tmp_path):
    cfg, _, file = write(tmp_path, "storywriter")
    found = keys(file)
    assert found["general.architecture"] == "mpt"
    assert found["mpt.attention.max_alibi_bias"] == 16
    assert found["mpt.attention.clamp_kqv"] == 6
    assert found["mpt.attention.head_count"] == cfg.n_heads
    assert found["mpt.context_length"] == cfg.max_seq_len
    assert found["mpt.feed_forward_length"] == 4 * cfg.d_model
    assert found["mpt.attention.layer_norm_epsilon"] == pytest.approx(1e-5)
    assert found["tokenizer.ggml.model"] == "no_vocab"


def test_without_alibi_its_bias_is_zero_and_positions_are_there(tmp_path):
    _, tree, file = write(tmp_path, "biases_and_wpe")
    assert keys(file)["mpt.attention.max_alibi_bias"] == 0
    names = {t.name for t in gguf.GGUFReader(file).tensors}
    assert {"position_embd.weight", "blk.2.attn_qkv.bias", "output_norm.bias"} <= names
    assert_bitwise_equal(collect(file)[1], tree)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_matrices_keep_their_dtype_and_norms_are_float32(dtype, tmp_path):
    cfg, tree = folders.make(tmp_path / "src", "qk_ln", dtype=dtype)
    convert_to(tmp_path / "src", tmp_path / "out", format="gguf", dtype=dtype)
    file = tmp_path / "out/out.gguf"
    for tensor in gguf.GGUFReader(file).tensors:
        kind = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}[dtype]
        kind = kind if len(tensor.shape) > 1 else "F32"
        assert tensor.tensor_type.name == kind, tensor.name
    got, params = collect(file)
    assert got.attn_config == cfg.attn_config
    wide = np.float32 if dtype == "float16" else folders.DTYPES[dtype]
    assert params["wte"]["weight"].dtype == wide
    np.testing.assert_array_equal(params["wte"]["weight"], tree["wte"]["weight"])


@pytest.mark.parametrize(
    "name",
    ["plain", "clip", "storywriter", "grouped", "multiquery", "biases_and_wpe"],
)
def test_the_config_comes_back(name, tmp_path):
    write(tmp_path, name)
    assert read.check(tmp_path / "out").config == read.check(tmp_path / "src").config


def test_the_vocabulary_is_padded_to_the_embedding(tmp_path):
    cfg, _, file = write(tmp_path, tokenizer=TOKENIZER)
    found = keys(file)
    tokens = found["tokenizer.ggml.tokens"]
    assert len(tokens) == cfg.vocab_size
    assert tokens[:5] == ["<|endoftext|>", "a", "b", "ab", "  "]
    assert tokens[39] == "[PAD39]"
    kinds = gguf.TokenType
    assert found["tokenizer.ggml.token_type"][:6] == [
        kinds.CONTROL, kinds.NORMAL, kinds.NORMAL, kinds.NORMAL, kinds.USER_DEFINED,
        kinds.UNUSED,
    ]  # fmt: skip
    assert found["tokenizer.ggml.merges"] == ["a b"]
    assert found["tokenizer.ggml.eos_token_id"] == 0
    assert found["tokenizer.ggml.pre"] == "mpt"


@pytest.mark.parametrize("name", ["glu", "odd"])
def test_what_llama_cpp_would_compute_otherwise_is_refused(name, tmp_path):
    with pytest.raises(UserError, match=r"llama\.cpp's MPT would compute"):
        write(tmp_path, name)
    assert not (tmp_path / "out").exists()


def test_another_architecture_is_refused(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "llama")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(CheckpointError, match="architecture 'llama', expected 'mpt'"):
        read.check(tmp_path)


def test_damage_is_one_line(tmp_path):
    _, _, file = write(tmp_path)
    content = file.read_bytes()
    for name, damaged in {
        "magic": b"GGML" + content[4:], "truncated": content[:3000],
        "header": content[:200], "empty": b"",
        "count": content[:8] + b"\xff" * 7 + content[15:],
    }.items():  # fmt: skip
        bad = tmp_path / f"{name}.gguf"
        bad.write_bytes(damaged)
        with pytest.raises(CheckpointError) as error:
            list(read.check(bad).stream())
        assert "\n" not in str(error.value), name
        assert bad.name in str(error.value)


def test_a_damaged_header_is_an_error_or_harmless(tmp_path):
    """Any byte of it: a message, never another exception."""
    _, _, file = write(tmp_path, "storywriter")
    content, bad = file.read_bytes(), tmp_path / "bad.gguf"
    rng, refused = np.random.default_rng(0), 0
    header = min(int(t.data_offset) for t in gguf.GGUFReader(file).tensors)
    for _ in range(N_FLIPS):
        flipped = bytearray(content)
        flipped[rng.integers(header)] = rng.integers(256)
        bad.write_bytes(flipped)
        try:
            list(read.check(bad).stream())
        except CheckpointError:
            refused += 1
    assert refused > N_FLIPS // 3
