"""The parameter tree against MosaicML's names, shapes and bits, for every model."""

import numpy as np
import pytest

from mpt_jax import presets
from mpt_jax.interop import names
from tests import reference
from tests.interop import folders

LEGACY = (
    (".norm_1.", ".ln_1."), (".norm_2.", ".ln_2."), (".norm_f.", ".ln_f."),
    (".ffn.up_proj.", ".mlp.mlp_up."), (".ffn.down_proj.", ".mlp.mlp_down."),
)  # fmt: skip


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "split"])
@pytest.mark.parametrize("name", folders.MODELS)
def test_names_shapes_and_bits_are_theirs(name, fused):
    cfg = folders.model(name)
    tree = folders.params(cfg)
    theirs = folders.tensors(cfg, tree, fused=fused)
    tensors = names.tensors(cfg, fused=fused)
    assert {n: t.shape for n, t in tensors.items()} == {
        n: t.shape for n, t in theirs.items()
    }
    ours = names.flatten(tree)
    for n, tensor in tensors.items():
        pick = lambda part: ours[part.path][  # noqa: E731
            ... if part.layer is None else part.layer
        ]
        rows = [names.to_theirs(part, pick(part)) for part in tensor.parts]
        np.testing.assert_array_equal(np.concatenate(rows), theirs[n], n)
        for part, array in tensor.split(theirs[n]):
            np.testing.assert_array_equal(array, pick(part), n)


@pytest.mark.parametrize("name", presets.PRESETS)
def test_every_parameter_of_every_size_has_one_place(name):
    """Full shapes, 125M to 70B, without an array."""
    cfg = presets.model(name)
    seen: dict[names.Path, int] = dict.fromkeys(names.structs(cfg), 0)
    for tensor in names.tensors(cfg).values():
        assert tensor.shape[0] == sum(part.rows for part in tensor.parts)
        for part in tensor.parts:
            seen[part.path] += int(np.prod(part.shape))
    assert seen == {path: s.size for path, s in names.structs(cfg).items()}
    total = sum(t.size for t in names.tensors(cfg).values())
    assert total == presets.PRESETS[name].published_params


def test_mpt_7b_is_as_on_the_hub():
    tensors = names.tensors(presets.model("mpt-7b"))
    assert len(tensors) == 2 + 32 * 6
    assert tensors["transformer.blocks.31.attn.Wqkv.weight"].shape == (12288, 4096)
    assert tensors["transformer.blocks.0.ffn.down_proj.weight"].shape == (4096, 16384)


def test_mpt_30b_has_64_heads_of_112():
    wq, *_ = names.tensors(presets.model("mpt-30b"))[
        "transformer.blocks.47.attn.Wqkv.weight"
    ].parts
    assert wq.shape == (7168, 64, 112)


@pytest.mark.parametrize(
    "prefix", ["", "model.", "state.model.model.", "module.", "base_model.model.",
               "_orig_mod.", "model._fsdp_wrapped_module."],
)  # fmt: skip
def test_wrappers_are_seen_through(prefix):
    for name in names.tensors(folders.model("grouped")):
        assert names.canonical(prefix + name) == name


def test_names_of_mosaic_gpt_are_todays():
    for name in names.tensors(folders.model("qk_ln")):
        old = name
        for new, legacy in LEGACY:
            old = old.replace(new, legacy)
        assert names.canonical(old) == name


def test_the_tree_survives_flattening():
    tree = folders.params(folders.model("glu"))
    again = names.unflatten(names.flatten(tree))
    assert dict(reference.leaves(again)).keys() == dict(reference.leaves(tree)).keys()
