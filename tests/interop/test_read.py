"""Reading folders: the right bits into the right arrays, and one error for the rest."""

import dataclasses
import json
import weakref

import jax
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from mpt_jax import partitioning
from mpt_jax.config import MeshConfig
from mpt_jax.errors import CheckpointError
from mpt_jax.interop import names, read
from mpt_jax.models import mpt
from tests import reference
from tests.interop import folders
from tests.interop.test_configs import MOSAIC_GPT
from tests.interop.test_names import LEGACY

# float32 against the float64 reference, three layers deep: rounding of either is 1e-6.
LOGITS_RTOL = 1e-5
N_FLIPS = 100


def assert_bitwise_equal(got, expected):
    got, expected = dict(reference.leaves(got)), dict(reference.leaves(expected))
    assert got.keys() == expected.keys()
    for path, array in expected.items():
        mine = np.asarray(got[path])
        assert mine.dtype == array.dtype, path
        assert mine.tobytes() == np.ascontiguousarray(array).tobytes(), path


def collect(folder, **keys):
    """(config, parameters) as stream() gives them: load() without its compilations."""
    checked = read.check(folder, **keys)
    structs = names.structs(checked.config)
    arrays = {path: np.zeros(s.shape, s.dtype) for path, s in structs.items()}
    for part, array in checked.stream():
        arrays[part.path][... if part.layer is None else part.layer] = array
    return checked.config, names.unflatten(arrays)


@pytest.mark.parametrize("name", folders.MODELS)
def test_every_model_is_read_bitwise(name, tmp_path):
    cfg, tree = folders.make(tmp_path, name, n_files=3)
    got, params = collect(tmp_path)
    assert_bitwise_equal(params, tree)
    assert dataclasses.replace(got, compute_dtype="float32") == cfg


def test_logits_are_those_of_the_reference(tmp_path):
    cfg, tree = folders.make(tmp_path, "storywriter")
    _, params = read.load(tmp_path)
    assert_bitwise_equal(params, tree)
    tokens = np.arange(18).reshape(2, 9) % cfg.vocab_size
    expected = reference.forward(cfg, tree, tokens)
    logits = jax.jit(mpt.apply, static_argnums=0)(cfg, params, tokens)
    error = np.abs(np.asarray(logits) - expected).max()
    assert error <= LOGITS_RTOL * np.abs(expected).max()


@pytest.mark.parametrize(
    ("stored", "becomes"),
    [("float32", "float32"), ("bfloat16", "bfloat16"), ("float16", "float32")],
)
def test_default_dtypes_are_exact(stored, becomes, tmp_path):
    _, tree = folders.make(tmp_path, dtype=stored)
    got, params = collect(tmp_path)
    assert got.param_dtype == becomes
    wide = reference.map_leaves(tree, lambda _, a: a.astype(folders.DTYPES[becomes]))
    assert_bitwise_equal(params, wide)


def test_a_mixture_of_dtypes_becomes_the_wide_one(tmp_path):
    cfg, tree = folders.make(tmp_path, dtype="bfloat16")
    arrays = folders.tensors(cfg, tree)
    wide = {k: v.astype(np.float32) if "norm" in k else v for k, v in arrays.items()}
    save_file(wide, tmp_path / "model.safetensors")
    got, params = collect(tmp_path)
    assert got.param_dtype == "float32"
    np.testing.assert_array_equal(
        np.asarray(params["wte"]["weight"]), tree["wte"]["weight"].astype(np.float32)
    )


def test_a_dtype_can_be_asked_for(tmp_path):
    _, tree = folders.make(tmp_path)
    got, params = collect(tmp_path, dtype="bfloat16")
    assert got.param_dtype == "bfloat16"
    narrow = folders.DTYPES["bfloat16"]
    assert_bitwise_equal(
        params, reference.map_leaves(tree, lambda _, a: a.astype(narrow))
    )


def test_arrays_are_placed_on_the_mesh(tmp_path):
    _, tree = folders.make(tmp_path)
    mesh = partitioning.make_mesh(MeshConfig(fsdp=4, tensor=2))
    with partitioning.use(mesh):
        cfg, params = read.load(tmp_path)
    assert_bitwise_equal(params, tree)
    axes = dict(reference.leaves(mpt.param_axes(cfg)))
    for path, array in reference.leaves(params):
        expected = partitioning.sharding(mesh, axes[path], array.shape)
        assert array.sharding.is_equivalent_to(expected, array.ndim), path
    weight = params["blocks"]["ffn"]["up_proj"]["weight"]
    assert weight.addressable_shards[0].data.size == weight.size // 8


def rename(folder, name):
    arrays = load_file(folder / "model.safetensors")
    save_file({name(k): v for k, v in arrays.items()}, folder / "model.safetensors")


@pytest.mark.parametrize(
    "prefix", ["model.", "base_model.model.", "state.model.model."]
)
def test_wrapped_names_load(prefix, tmp_path):
    _, tree = folders.make(tmp_path)
    rename(tmp_path, lambda name: prefix + name)
    assert_bitwise_equal(collect(tmp_path)[1], tree)


def test_a_model_without_its_head_loads(tmp_path):
    """What transformers' MptModel.save_pretrained() writes."""
    _, tree = folders.make(tmp_path)
    rename(tmp_path, lambda name: name.removeprefix("transformer."))
    assert_bitwise_equal(collect(tmp_path)[1], tree)


def test_split_qkv_loads(tmp_path):
    _, tree = folders.make(tmp_path, "grouped", fused=False)
    assert_bitwise_equal(collect(tmp_path)[1], tree)


def test_mosaic_gpt_loads(tmp_path):
    cfg, tree = folders.make(tmp_path, "qk_ln")
    sizes = ("d_model", "n_heads", "n_layers", "vocab_size", "max_seq_len")
    raw = MOSAIC_GPT | {name: getattr(cfg, name) for name in sizes}
    (tmp_path / "config.json").write_text(json.dumps(raw))

    def old(name):
        for new, legacy in LEGACY:
            name = name.replace(new, legacy)
        return name

    rename(tmp_path, old)
    got, params = collect(tmp_path)
    assert got.attn_config == cfg.attn_config
    assert_bitwise_equal(params, tree)


def test_a_stored_tied_head_must_be_the_embedding(tmp_path):
    cfg, tree = folders.make(tmp_path)
    arrays = folders.tensors(cfg, tree)
    head = {"lm_head.weight": arrays["transformer.wte.weight"].copy()}
    save_file(arrays | head, tmp_path / "model.safetensors")
    assert_bitwise_equal(collect(tmp_path)[1], tree)
    head["lm_head.weight"][3, 2] += 1
    save_file(arrays | head, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError, match="is not transformer"):
        read.check(tmp_path)


def test_everything_wrong_is_in_one_error(tmp_path):
    cfg, tree = folders.make(tmp_path)
    arrays = folders.tensors(cfg, tree)
    for n in range(cfg.n_layers):
        del arrays[f"transformer.blocks.{n}.norm_1.weight"]
    up = "transformer.blocks.1.ffn.up_proj.weight"
    arrays[up] = arrays[up].T.copy()
    arrays["transformer.wte.weight"] = arrays["transformer.wte.weight"][:37].copy()
    arrays["transformer.norm_f.weight"] = np.ones(16, np.int8)
    arrays["transformer.extra"] = np.ones((2, 3), np.float32)
    save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        read.check(tmp_path)
    message = str(error.value)
    assert message.startswith(f"{tmp_path}: 5 problems:\n")
    for said in (
        "transformer.wte.weight: stored [37, 16], expected [40, 16] (vocab_size=40, d_",
        "transformer.blocks.{0-2}.norm_1.weight: missing, expected [16]",
        "transformer.blocks.1.ffn.up_proj.weight: stored [16, 64], expected [64, 16]",
        "transformer.norm_f.weight: stored as I8[16], expected floats",
        "transformer.extra: unexpected, float32[2, 3]",
    ):
        assert said in message


def test_a_value_that_is_not_finite_is_found(tmp_path):
    cfg, tree = folders.make(tmp_path, dtype="bfloat16")
    arrays = folders.tensors(cfg, tree)
    arrays["transformer.blocks.2.norm_2.weight"][3] = np.nan
    arrays["transformer.wte.weight"][1, :2] = np.inf
    save_file(arrays, tmp_path / "model.safetensors")
    with pytest.raises(CheckpointError) as error:
        list(read.check(tmp_path).stream())
    assert "transformer.wte.weight: 2 values are not finite" in str(error.value)
    assert "blocks.2.norm_2.weight: 1 values are not finite" in str(error.value)


def test_one_tensor_is_in_memory_at_a_time(tmp_path, monkeypatch):
    """What stream() holds on to is the tensor that it hands on."""
    folders.make(tmp_path)
    checked, alive = read.check(tmp_path), []
    for i, (tensor, stored) in enumerate(checked.tensors):

        def watched(read=stored.read):
            assert sum(ref() is not None for ref in alive) <= 1  # that before
            alive.append(weakref.ref(array := read()))
            return array

        stored = stored.__class__(**vars(stored) | {"read": watched})
        checked.tensors[i] = (tensor, stored)
    for _part, array in checked.stream():
        del array
    assert len(alive) == len(checked.tensors)


def test_jax_is_not_started_by_a_check(tmp_path, monkeypatch):
    folders.make(tmp_path)
    monkeypatch.setattr(jax, "devices", None)
    monkeypatch.setattr(jax, "local_devices", None)
    read.check(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json"])
def test_a_damaged_byte_is_an_error_or_harmless(name, tmp_path):
    """Any byte of a header or the config: a message, never another exception."""
    folders.make(tmp_path, "storywriter")
    content = (tmp_path / name).read_bytes()
    rng, refused = np.random.default_rng(0), 0
    for _ in range(N_FLIPS):
        flipped = bytearray(content)
        flipped[rng.integers(min(len(content), 2000))] = rng.integers(256)
        (tmp_path / name).write_bytes(flipped)
        try:
            list(read.check(tmp_path).stream())
        except CheckpointError:
            refused += 1
    assert refused > N_FLIPS // 3
