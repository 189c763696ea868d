"""Checkpoints that are wrong, damaged or hostile, and what is said: one row for each.

As in test_bad_inputs.py, each is tried and called clear, silent, traceback or hang.
Nothing is ever written, and the code that a pickle names never runs.
"""

import json
import os
import pickle
import re
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpt_jax.convert import convert_from
from mpt_jax.errors import CheckpointError
from tests.bad_inputs.test_bad_inputs import outcome
from tests.interop import folders

WTE, NORM = "transformer.wte.weight", "transformer.norm_f.weight"
UP = "transformer.blocks.1.ffn.up_proj.weight"


def config(**changes: object) -> Callable[[Path], None]:
    """Changes fields of config.json; None removes one."""

    def damage(folder: Path) -> None:
        raw = json.loads((folder / "config.json").read_text()) | changes
        raw = {k: v for k, v in raw.items() if v is not None}
        (folder / "config.json").write_text(json.dumps(raw))

    return damage


def text(name: str, content: str) -> Callable[[Path], None]:
    return lambda folder: (folder / name).write_text(content) and None


def tensors(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Changes the dictionary of tensors in place."""

    def damage(folder: Path) -> None:
        arrays = load_file(folder / "model.safetensors")
        change(arrays)
        arrays = {k: np.ascontiguousarray(v) for k, v in arrays.items()}
        save_file(arrays, folder / "model.safetensors")

    return damage


def header(change: Callable[[dict], object]) -> Callable[[Path], None]:
    """Changes the header of the file, and leaves its data."""

    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        content = file.read_bytes()
        n = struct.unpack("<Q", content[:8])[0]
        found = json.loads(content[8 : 8 + n])
        change(found)
        new = json.dumps(found).encode()
        file.write_bytes(struct.pack("<Q", len(new)) + new + content[8 + n :])

    return damage


def content(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        file = folder / "model.safetensors"
        file.write_bytes(change(file.read_bytes()))

    return damage


def shards(
    change: Callable[[Path, dict], object], *, index: bool = True
) -> Callable[[Path], None]:
    """Splits the weights in two files; changes the folder and the index's map."""

    def damage(folder: Path) -> None:
        arrays = load_file(folder / "model.safetensors")
        (folder / "model.safetensors").unlink()
        raw = json.loads((folder / "config.json").read_text())
        folders.write(folder, raw, arrays, n_files=2)
        file = folder / "model.safetensors.index.json"
        found = json.loads(file.read_text())
        change(folder, found["weight_map"])
        file.write_text(json.dumps(found))
        if not index:
            file.unlink()

    return damage


def replace_all(name: str, body: bytes) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        (folder / name).write_bytes(body)

    return damage


class Evil:
    """What runs code when it is unpickled: makes a folder where the test is."""

    def __reduce__(self):
        return os.mkdir, ("it-ran",)


def half_split(arrays: dict) -> None:
    q, k, v = np.split(arrays.pop("transformer.blocks.0.attn.Wqkv.weight"), 3)
    for name, rows in (("Wq", q), ("Wk", k), ("Wv", v)):
        arrays[f"transformer.blocks.0.attn.{name}.weight"] = rows


SECOND = "model-00002-of-00002.safetensors"
# Name -> (what is done to a good folder, what is said).
CASES: dict[str, tuple[Callable[[Path], object], str]] = {
    # The config
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: missing"),
    "config not JSON": (text("config.json", "{d_model: 3}"), "config.json: Expecting"),
    "config a list": (text("config.json", "[]"), "config.json: expected a JSON obj"),
    "config nested 100,000 deep": (
        text("config.json", "[" * 100_000), "config.json: nested too deeply"),
    "another model": (config(model_type="llama"), "model_type: expected 'mpt'"),
    "no head count": (config(n_heads=None), "config.json: n_heads: missing"),
    "a size of text": (config(d_model="16"), "d_model: missing"),
    "a misspelt field": (config(qk_lm=True), "qk_lm: unknown field"),
    "rotary positions": (config(attn_config={"rope": True}), "rotary positions"),
    "a mixture of experts": (
        config(ffn_config={"ffn_type": "mb_moe"}), "mixture of experts"),
    "quantised": (config(quantization_config={"bits": 4}), "quantised weights"),
    "heads that do not divide": (config(n_heads=5), "n_heads: 5 does not divide"),
    "two norm epsilons": (
        config(norm_eps=1e-5, layer_norm_epsilon=1e-3), "epsilon=0.001 differ"),
    "a thousand million layers": (
        config(n_layers=10**9), "n_layers=1000000000: there are 20 tensors"),
    "a wider model": (config(d_model=32), r"stored \[40, 16\], expected \[40, 32\]"),
    "one layer more": (
        config(n_layers=4), r"blocks.3.norm_1.weight: missing, expected \[16\]"),
    "one layer less": (config(n_layers=2), "blocks.2.norm_1.weight: unexpected"),
    "another vocabulary": (
        config(vocab_size=44), r"\[40, 16\], expected \[44, 16\] \(vocab_size=44"),
    # The tensors
    "a missing tensor": (tensors(lambda t: t.pop(NORM)), f"{NORM}: missing"),
    "an extra tensor": (
        tensors(lambda t: t.update(extra=t[NORM])), r"extra: unexpected, float32\[16"),
    "a transposed tensor": (
        tensors(lambda t: t.update({UP: t[UP].T})),
        r"up_proj.weight: stored \[16, 64\], expected \[64, 16\]"),
    "eight bits": (
        tensors(lambda t: t.update({UP: t[UP].astype(np.int8)})), "stored as I8"),
    "float64": (
        tensors(lambda t: t.update({UP: t[UP].astype(np.float64)})), "--dtype says"),
    "NaN": (
        tensors(lambda t: t[UP].__setitem__((0, 0), np.nan)),
        f"{UP}: 1 values are not finite"),
    "infinity": (tensors(lambda t: t[WTE].fill(np.inf)), "640 values are not finite"),
    "a tied head that differs": (
        tensors(lambda t: t.update({"lm_head.weight": t[WTE] + 1})), "is not transfor"),
    "no untied head": (config(tie_word_embeddings=False), "lm_head.weight: missing"),
    "one tensor twice": (
        tensors(lambda t: t.update({f"model.{NORM}": t[NORM]})), "is the same tensor"),
    "one layer of split QKV": (
        tensors(half_split), r"blocks.\{1-2\}.attn.Wqkv.weight: unexpected"),
    "a bias too many": (
        tensors(lambda t: t.update({"transformer.norm_f.bias": t[NORM]})),
        "norm_f.bias: unexpected"),
    # The files
    "truncated": (content(lambda b: b[:-9]), "model.safetensors: "),
    "something after the end": (content(lambda b: b + b"x"), "model.safetensors: "),
    "empty": (content(lambda b: b""), "model.safetensors: "),
    "a header of 2^60 bytes": (
        content(lambda b: struct.pack("<Q", 1 << 60) + b[8:]), "model.safetensors: "),
    "a header that is not JSON": (
        content(lambda b: b[:8] + b"x" + b[9:]), "model.safetensors: "),
    "overlapping tensors": (
        header(lambda h: h[NORM].update(data_offsets=h[WTE]["data_offsets"])),
        "model.safetensors: "),
    "offsets past the end": (
        header(lambda h: h[NORM].update(data_offsets=[0, 1 << 62])),
        "model.safetensors: "),
    "offsets backwards": (
        header(lambda h: h[NORM].update(data_offsets=[64, 0])), "model.safetensors: "),
    "a shape that overflows": (
        header(lambda h: h[NORM].update(shape=[1 << 40, 1 << 40])),
        "model.safetensors: "),
    "an unknown dtype": (
        header(lambda h: h[NORM].update(dtype="F7")), "model.safetensors: "),
    "a negative shape": (
        header(lambda h: h[NORM].update(shape=[-16])), "model.safetensors: "),
    "a pickle by another name": (
        content(lambda b: pickle.dumps(Evil())), "model.safetensors: "),
    "a missing file": (
        shards(lambda f, _: (f / SECOND).unlink()), f"{SECOND}: missing"),
    "a missing file, without index": (
        shards(lambda f, _: (f / SECOND).unlink(), index=False), f"{SECOND}: missing"),
    "a truncated file of two": (
        shards(lambda f, _: (f / SECOND).write_bytes(b"12345")), f"{SECOND}: "),
    "an index that leaves the folder": (
        shards(lambda f, m: m.update({NORM: "../model.safetensors"})), "no file name"),
    "an index to an absolute path": (
        shards(lambda f, m: m.update({NORM: "/etc/passwd"})), "'/etc/passwd': no file"),
    "an index of other tensors": (
        shards(lambda f, m: m.update(ghost=SECOND)), "ghost: the index has it in"),
    "a tensor not in the index": (
        shards(lambda f, m: m.pop(WTE)), f"{WTE}: in model-.* not in the index"),
    "an index that is not JSON": (
        text("model.safetensors.index.json", "{"), "index.json: Expecting"),
    "an index without a map": (
        text("model.safetensors.index.json", "{}"), "no weight_map"),
    "an adapter": (
        replace_all("adapter_model.safetensors", b""), "no checkpoint here"),
    "a GPTQ file": (
        tensors(lambda t: t.update({UP.replace("weight", "qweight"): t.pop(UP)})),
        "up_proj.qweight: unexpected"),
    # The tokenizer
    "more ids than rows": (
        text("tokenizer.json", '{"model": {"vocab": {"a": 39, "b": 40}}}'),
        "tokenizer.json: has ids to 40, but vocab_size is 40"),
    "an added token past the rows": (
        text("tokenizer.json", '{"model": {"vocab": {"a": 0}}, '
             '"added_tokens": [{"id": 77, "content": "x"}]}'), "has ids to 77"),
    "a tokenizer that is none": (
        text("tokenizer.json", '{"model": 3}'), "not a tokenizer.json"),
}  # fmt: skip


def try_one(
    damage: Callable[[Path], object], said: str, folder: Path
) -> tuple[str, BaseException | None]:
    folders.make(folder / "src")
    damage(folder / "src")
    out = folder / "out"
    found, error = outcome(lambda: convert_from(folder / "src", out))
    if found == "clear" and not re.search(said, str(error)):
        found = "unclear"
    left = [p.name for p in folder.iterdir() if p.name != "src"]
    assert left == [], "something was written, or code of the file was run"
    return found, error


@pytest.mark.parametrize("name", CASES)
def test_a_bad_checkpoint_is_refused_clearly(
    name, tmp_path, monkeypatch, record_property
):
    monkeypatch.chdir(tmp_path)
    found, error = try_one(*CASES[name], tmp_path)
    record_property("outcome", found)
    assert found == "clear", f"{type(error).__name__}: {error}"
    assert isinstance(error, CheckpointError)


def test_the_hostile_pickle_would_run(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    pickle.loads(pickle.dumps(Evil()))
    assert (tmp_path / "it-ran").is_dir()


def torch_file(make: Callable[[Path], object]) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        (folder / "model.safetensors").unlink()
        make(folder / "pytorch_model.bin")

    return damage


def save(value: object, **keys: object) -> Callable[[Path], None]:
    import torch

    return torch_file(lambda file: torch.save(value, file, **keys))


# Made when they are run: they need torch.
PICKLES: dict[str, tuple[Callable[[], Callable[[Path], object]], str]] = {
    "a pickle that runs code": (
        lambda: torch_file(lambda f: f.write_bytes(pickle.dumps(Evil()))),
        "pytorch_model.bin: "),
    "a torch file that runs code": (
        lambda: save({WTE: Evil()}), "refused: .*only tensors are loaded, never code"),
    "a torch file of another object": (
        lambda: save({WTE: Path("x")}), "refused: it names .*[Pp]ath"),
    "no dictionary": (lambda: save([1, 2]), "not a dictionary of tensors"),
    "no tensor": (lambda: save({WTE: "x"}), f"{WTE} is a str, not a tensor"),
    "torch's format of 2019": (
        lambda: save({WTE: None}, _use_new_zipfile_serialization=False), "save it aga"),
    "a torch file cut short": (
        lambda: torch_file(lambda f: f.write_bytes(b"PK\x03\x04" + b"\0" * 500)),
        "cannot be read"),
    "an empty torch file": (
        lambda: torch_file(lambda f: f.write_bytes(b"")), "pytorch_model.bin: "),
}  # fmt: skip


@pytest.mark.hf
@pytest.mark.parametrize("name", PICKLES)
def test_a_bad_pickle_is_refused_clearly(name, tmp_path, monkeypatch, record_property):
    monkeypatch.chdir(tmp_path)
    pytest.importorskip("torch", reason="needs the 'hf' extra")
    make, said = PICKLES[name]
    found, error = try_one(make(), said, tmp_path)
    record_property("outcome", found)
    assert found == "clear", f"{type(error).__name__}: {error}"
    assert isinstance(error, CheckpointError)
