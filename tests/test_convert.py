"""The convert verb: every pair of formats, bit for bit, whole or not at all."""

import dataclasses
import fcntl
import itertools
import json
import os
import re

import jax
import numpy as np
import pytest

from mpt_jax import partitioning, presets
from mpt_jax.config import CheckpointConfig, MeshConfig, ModelConfig, parse
from mpt_jax.convert import convert_from, convert_to, inspect, main
from mpt_jax.errors import CheckpointError, InternalError, UserError
from mpt_jax.interop import read, write
from mpt_jax.models import mpt
from mpt_jax.training.checkpoints import Checkpoints, open_checkpoint, restore_params
from tests import reference
from tests.interop import folders
from tests.interop.test_read import assert_bitwise_equal, collect

FORMATS = ("mpt_jax", "hf", "mosaicml", "gguf")


def convert(source, out, format, **keys):
    if format == "gguf":
        pytest.importorskip("gguf", reason="needs the gguf extra")
    if format != "mpt_jax":
        convert_to(source, out, format=format, **keys)
        return out
    if (source / "MANIFEST.json").exists():  # ours to ours: nothing to convert
        return source
    convert_from(source, out, **keys)
    return out


def load(folder):
    """The parameters in a folder of any format."""
    if not (folder / "MANIFEST.json").exists():
        return collect(folder)[1]
    step = open_checkpoint(folder)
    cfg = parse(ModelConfig, step.meta["config"]["model"])
    return step.restore_params(mpt.abstract_params(cfg))


@pytest.mark.parametrize(("first", "second"), list(itertools.product(FORMATS, FORMATS)))
def test_round_trips_are_bitwise_in_every_pair_of_formats(first, second, tmp_path):
    """float32 one way round, bfloat16 the other."""
    dtype = "float32" if FORMATS.index(first) <= FORMATS.index(second) else "bfloat16"
    _, tree = folders.make(tmp_path / "src", "untied", dtype=dtype)
    one = convert(tmp_path / "src", tmp_path / "one", first)
    two = convert(one, tmp_path / "two", second)
    assert_bitwise_equal(load(one), tree)
    assert_bitwise_equal(load(two), tree)


@pytest.mark.parametrize("name", folders.MODELS)
def test_every_model_goes_through_our_checkpoint_to_mosaicml(name, tmp_path):
    _, tree = folders.make(tmp_path / "src", name)
    source = read.check(tmp_path / "src").config
    convert_from(tmp_path / "src", tmp_path / "ckpt")
    convert_to(tmp_path / "ckpt", tmp_path / "out", format="mosaicml")
    again, params = collect(tmp_path / "out")
    assert again == source
    assert_bitwise_equal(params, tree)


def test_a_checkpoint_is_restored_on_any_mesh(tmp_path):
    """As checkpoint.init_from does it."""
    _, tree = folders.make(tmp_path / "src")
    cfg = convert_from(tmp_path / "src", tmp_path / "ckpt")
    mesh = partitioning.make_mesh(MeshConfig(fsdp=4, tensor=2))
    struct = jax.tree.map(
        lambda s, axes: jax.ShapeDtypeStruct(
            s.shape, s.dtype, sharding=partitioning.sharding(mesh, axes, s.shape)
        ),
        mpt.abstract_params(cfg),
        mpt.param_axes(cfg),
    )
    params = restore_params(tmp_path / "ckpt", struct)
    assert_bitwise_equal(params, tree)


def test_what_a_trainer_saved_is_converted(tmp_path):
    cfg, tree = folders.make(tmp_path / "src", "grouped")
    mesh = partitioning.make_mesh(MeshConfig(fsdp=4, tensor=2))
    params = jax.tree.map(
        lambda leaf, axes: jax.device_put(
            leaf, partitioning.sharding(mesh, axes, leaf.shape)
        ),
        tree,
        mpt.param_axes(cfg),
    )
    meta = {"config": {"model": dataclasses.asdict(cfg)}}  # and much else
    run = tmp_path / "run"
    with Checkpoints(run, CheckpointConfig()) as checkpoints:
        state = {"opt_state": {"n": np.zeros(1)}, "data": b"", "meta": meta}
        state["tokenizer"] = {"tokenizer.model": b"its model"}
        checkpoints.save(7, params=params, **state, wait=True)
    convert_to(run, tmp_path / "out", format="mosaicml")
    assert_bitwise_equal(collect(tmp_path / "out")[1], tree)
    assert (tmp_path / "out/tokenizer.model").read_bytes() == b"its model"


def test_a_flipped_bit_in_our_checkpoint_is_refused(tmp_path):
    folders.make(tmp_path / "src")
    convert_from(tmp_path / "src", tmp_path / "ckpt")
    data = max((tmp_path / "ckpt/params").rglob("*"), key=lambda f: f.stat().st_size)
    content = bytearray(data.read_bytes())
    content[len(content) // 2] ^= 1
    data.write_bytes(content)
    with pytest.raises(CheckpointError, match="crc32"):
        convert_to(tmp_path / "ckpt", tmp_path / "out", format="mosaicml")
    assert not (tmp_path / "out").exists()


def test_tokenizer_and_ids_travel_along(tmp_path):
    folders.make(tmp_path / "src", eos_token_id=0, tokenizer_name="neox")
    (tmp_path / "src/tokenizer_config.json").write_text("{}")
    convert_from(tmp_path / "src", tmp_path / "ckpt")
    convert_to(tmp_path / "ckpt", tmp_path / "out", format="hf")
    assert (tmp_path / "out/tokenizer_config.json").read_text() == "{}"
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert raw["eos_token_id"] == 0
    assert raw["tokenizer_name"] == "neox"


def test_large_folders_have_several_files(tmp_path):
    _, tree = folders.make(tmp_path / "src")
    checked = read.check(tmp_path / "src")
    write.write_folder(
        tmp_path / "out", checked.stream(), checked.config, kind="hf", dtype="float32",
        tokens={}, max_file_bytes=5000,
    )  # fmt: skip
    files = sorted(f.name for f in (tmp_path / "out").glob("*.safetensors"))
    assert len(files) > 2
    assert files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    assert_bitwise_equal(collect(tmp_path / "out")[1], tree)


def test_float16_is_written_on_demand(tmp_path):
    _, tree = folders.make(tmp_path / "src", dtype="float16")
    convert_to(tmp_path / "src", tmp_path / "out", format="mosaicml", dtype="float16")
    raw = json.loads((tmp_path / "out/config.json").read_text())
    assert raw["torch_dtype"] == "float16"
    wide = reference.map_leaves(tree, lambda _, a: a.astype(np.float32))
    assert_bitwise_equal(collect(tmp_path / "out")[1], wide)


def test_what_float16_cannot_hold_is_refused(tmp_path):
    cfg, tree = folders.make(tmp_path / "src")
    tree["wte"]["weight"][0, 0] = 1e5
    folders.write(tmp_path / "src", folders.PLAIN, folders.tensors(cfg, tree))
    with pytest.raises(CheckpointError, match=r"transformer.wte.weight: too large"):
        convert_to(tmp_path / "src", tmp_path / "out", format="hf", dtype="float16")
    assert not list(tmp_path.glob("*out*"))


@pytest.mark.parametrize(
    "name", sorted(set(folders.MODELS) - {"plain", "clip", "untied"})
)
def test_hf_is_refused_what_it_would_ignore(name, tmp_path):
    folders.make(tmp_path / "src", name)
    with pytest.raises(UserError, match="without a word"):
        convert_to(tmp_path / "src", tmp_path / "out", format="hf")
    assert not list(tmp_path.glob("*out*"))


# ----------------------------------------------------------------- whole or not at all


def test_nothing_is_left_of_a_failed_conversion(tmp_path):
    cfg, tree = folders.make(tmp_path / "src")
    tree["norm_f"]["weight"][1] = np.nan  # known only once all is written
    folders.write(tmp_path / "src", folders.PLAIN, folders.tensors(cfg, tree))
    with pytest.raises(CheckpointError, match="not finite"):
        convert_from(tmp_path / "src", tmp_path / "ckpt")
    with pytest.raises(CheckpointError, match="not finite"):
        convert_to(tmp_path / "src", tmp_path / "out", format="hf")
    assert [f.name for f in tmp_path.iterdir()] == ["src"]


def test_what_a_killed_conversion_left_is_replaced(tmp_path):
    _, tree = folders.make(tmp_path / "src")
    left = tmp_path / ".ckpt.unfinished" / "new"
    left.mkdir(parents=True)
    (left / "junk").write_text("half")
    convert_from(tmp_path / "src", tmp_path / "ckpt")
    assert_bitwise_equal(load(tmp_path / "ckpt"), tree)
    assert not (tmp_path / "ckpt/junk").exists()
    assert not left.parent.exists()


def test_two_conversions_to_one_place_are_refused(tmp_path):
    folders.make(tmp_path / "src")
    hidden = tmp_path / ".ckpt.unfinished"
    hidden.mkdir()
    lock = os.open(hidden, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(UserError, match="another process is writing this"):
            convert_from(tmp_path / "src", tmp_path / "ckpt")
    finally:
        os.close(lock)
    convert_from(tmp_path / "src", tmp_path / "ckpt")


def test_nothing_is_overwritten(tmp_path):
    folders.make(tmp_path / "src")
    (tmp_path / "ckpt").mkdir()
    convert_from(tmp_path / "src", tmp_path / "ckpt")  # an empty folder is free
    before = (tmp_path / "ckpt/MANIFEST.json").read_bytes()
    with pytest.raises(UserError, match="exists already"):
        convert_from(tmp_path / "src", tmp_path / "ckpt")
    assert (tmp_path / "ckpt/MANIFEST.json").read_bytes() == before


def test_too_little_room_is_said_first(tmp_path, monkeypatch):
    folders.make(tmp_path / "src")
    usage = type("usage", (), {"free": 100})
    monkeypatch.setattr(write.shutil, "disk_usage", lambda _: usage)
    with pytest.raises(CheckpointError, match=r"needs .* GiB and .* GiB are free"):
        convert_from(tmp_path / "src", tmp_path / "ckpt")
    assert [f.name for f in tmp_path.iterdir()] == ["src"]


def test_a_missing_part_is_never_passed_over(tmp_path):
    folders.make(tmp_path / "src")
    checked = read.check(tmp_path / "src")
    parts = itertools.islice(checked.stream(), 5)
    with pytest.raises(InternalError, match="never written"):
        write.write_folder(
            tmp_path / "out", parts, checked.config, kind="hf", dtype="float32",
            tokens={},
        )  # fmt: skip
    assert not (tmp_path / "out").exists()


# ----------------------------------------------------------------------------- the verb


def test_the_verb_converts_and_says_so(tmp_path, capsys):
    folders.make(tmp_path / "src")
    src, ckpt, out = (str(tmp_path / n) for n in ("src", "ckpt", "out"))
    assert main(["from", src, ckpt, "--dtype", "bfloat16"]) == 0
    assert main(["to", ckpt, out, "--format", "hf"]) == 0
    assert main(["inspect", out]) == 0
    said = capsys.readouterr().out
    assert f"{ckpt}: complete" in said
    assert "safetensors: " in said
    assert "parameters in bfloat16" in said
    assert re.search("can be written as hf: yes", said)


def test_inspect_recognises_a_release_by_its_config(tmp_path, monkeypatch):
    """The released model's config, tiny: sizes are what inspect compares."""
    cfg, _ = folders.make(tmp_path)
    preset = presets.Preset(folders.PLAIN, mpt.count_params(cfg), source="this test")
    monkeypatch.setitem(presets.PRESETS, "the-tiny-one", preset)
    assert "the model of the-tiny-one" in inspect(tmp_path)
    said = inspect(tmp_path)
    assert "can be written as gguf: yes" in said


@pytest.mark.parametrize(
    ("argv", "code", "said"),
    [
        (["from", "{}/nothing", "{}/out"], 4, "no such file or folder"),
        (["to", "{}/src", "{}/src", "--format", "hf"], 2, "exists already"),
        (["to", "{}/src", "{}/out"], 2, "--format"),
        (["from", "{}/src"], 2, "OUT_CHECKPOINT"),
        (["convert", "{}/src"], 2, "invalid choice"),
        (["inspect", "{}"], 4, "no checkpoint here"),
    ],
)
def test_mistakes_have_a_code_and_a_line(argv, code, said, tmp_path, capsys):
    folders.make(tmp_path / "src")
    assert main([a.format(tmp_path) for a in argv]) == code
    err = capsys.readouterr().err
    assert said in err
    assert "Traceback" not in err
