"""Any checkpoint gives the same tokens: ours, foreign, on a mesh, in int8."""

import json
import shutil

import jax
import numpy as np
import pytest
import tokenizers

from mpt_jax import loading, partitioning
from mpt_jax.config import DataConfig, MeshConfig
from mpt_jax.convert import convert_from
from mpt_jax.errors import CheckpointError, ConfigError, DataError, UserError
from mpt_jax.generation import memory
from mpt_jax.generation.sampling import Sampling
from mpt_jax.interop import configs, names
from mpt_jax.models import mpt, weights
from mpt_jax.models.packed import Int8, ThreePass
from mpt_jax.training import stored
from tests import reference
from tests.interop import folders

GREEDY = Sampling(temperature=0.0, max_tokens=6)
PROMPTS = [[3, 1, 4, 1, 5], [9, 2]]


def letters(top=39):
    """A tokenizer.json whose ids are letters; EOS is 0."""
    vocab = {"<|endoftext|>": 0} | {chr(64 + i): i for i in range(1, top + 1)}
    library = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    library.add_special_tokens(["<|endoftext|>"])
    library.decoder = tokenizers.decoders.Fuse()
    return library.to_str()


def greedy(cfg, params, prompt, n=6):
    ids = list(prompt)
    for _ in range(n):
        logits = reference.forward(cfg, params, np.array([ids]))[0, -1]
        ids.append(int(logits.argmax()))
        if ids[-1] == 0:
            return tuple(ids[len(prompt) : -1])
    return tuple(ids[len(prompt) :])


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(folder of Hugging Face, checkpoint of ours, model, parameters)."""
    root = tmp_path_factory.mktemp("made")
    cfg, params = folders.make(root / "mpt-x", eos_token_id=0, bos_token_id=7)
    (root / "mpt-x" / "tokenizer.json").write_text(letters())
    convert_from(root / "mpt-x", root / "ours")
    return root / "mpt-x", root / "ours", cfg, params


def test_ours_and_foreign_continue_texts_alike(made):
    foreign, ours, cfg, params = made
    want = [greedy(cfg, params, p) for p in PROMPTS]
    for folder in (foreign, ours):
        loaded = loading.load(folder)
        assert (loaded.name, loaded.eos_ids, loaded.bos_id) == (folder.name, (0,), 7)
        done = loading.generate(loaded, PROMPTS, GREEDY)
        assert [c.ids for c in done] == want
        assert [c.text for c in done] == [loaded.tokenizer.decode(w) for w in want]
        texts = [loaded.tokenizer.decode(p) for p in PROMPTS]
        assert loading.generate(loaded, texts, GREEDY) == done
        assert loading.encode(loaded, "") == [7]
    assert loading.generate(loaded, [], GREEDY) == []


@pytest.mark.slow  # two meshes, two programs each
@pytest.mark.parametrize("mesh", [{"tensor": 2, "fsdp": 1}, {"fsdp": 2}], ids=str)
def test_a_mesh_holds_a_part_each_and_says_the_same(made, mesh):
    _, ours, cfg, params = made
    on = partitioning.make_mesh(MeshConfig(**mesh), jax.devices()[:2])
    loaded = loading.load(ours, mesh=on)
    up = loaded.params["blocks"][0]["ffn"]["up_proj"]["weight"]
    assert up.addressable_shards[0].data.size == up.size // 2
    done = loading.generate(loaded, PROMPTS, GREEDY)
    assert [c.ids for c in done] == [greedy(cfg, params, p) for p in PROMPTS]


def test_a_mesh_can_be_written_as_text(made):
    loaded = loading.load(made[1], mesh="fsdp=4, tensor=2")
    up = loaded.params["blocks"][0]["ffn"]["up_proj"]["weight"]
    assert up.addressable_shards[0].data.size == up.size // 8
    with pytest.raises(UserError, match=r"--mesh: got 'tensor', expected AXIS=N"):
        loading.load(made[1], mesh="tensor")
    with pytest.raises(ConfigError, match="tensr"):
        loading.load(made[1], mesh="tensr=2")
    with pytest.raises(UserError, match=r"tensor=8.*heads of size 4 does not split"):
        loading.load(made[1], mesh="tensor=8")


def test_int8_is_the_rounding_of_every_layer(made):
    _, ours, _, params = made
    got = loading.load(ours, int8=True).params
    tree = jax.tree.map(jax.numpy.asarray, params)
    want = weights.quantize(weights.unstack(tree))
    assert isinstance(got["blocks"][2]["attn"]["Wq"]["weight"], Int8)
    jax.tree.map(np.testing.assert_array_equal, got, want)


def test_dtype_of_parameters_and_arithmetic(made, tmp_path, monkeypatch):
    _, ours, _, _ = made
    loaded = loading.load(ours, dtype="bfloat16")
    assert loaded.cfg.compute_dtype == loaded.cfg.param_dtype == "bfloat16"
    assert {a.dtype.name for a in jax.tree.leaves(loaded.params)} == {"bfloat16"}
    folders.make(tmp_path / "half", dtype="bfloat16")
    for tiles, kind in ((True, ThreePass), (False, jax.Array)):
        monkeypatch.setattr(weights, "has_bfloat16_tiles", lambda tiles=tiles: tiles)
        half = loading.load(tmp_path / "half")
        assert half.cfg.compute_dtype == "float32"
        assert isinstance(half.params["blocks"][0]["ffn"]["up_proj"]["weight"], kind)


def checkpoint(root, made, **data):
    """As the trainer writes it, without a tokenizer: the newest step of a run."""
    _, ours, cfg, _ = made
    step = root / "runs" / "mine" / "checkpoints" / "00000012"
    step.parent.mkdir(parents=True)
    shutil.copytree(ours, step)
    shutil.rmtree(step / "tokenizer")
    (step / stored.MANIFEST).unlink()
    meta = {"config": {"model": configs.to_meta(cfg), "data": data}}
    (step / stored.META).write_text(json.dumps(meta))
    arrays = stored.describe({"params": names.unflatten(names.structs(cfg))})
    stored.write_manifest(stored.absolute(step), step=12, arrays=arrays)
    return root / "runs" / "mine"


def test_a_run_brings_the_tokenizer_of_its_data(made, tmp_path):
    (tmp_path / "t.json").write_text(letters())
    run = checkpoint(tmp_path, made, tokenizer=str(tmp_path / "t.json"))
    for path in (run, run / "checkpoints", run / "checkpoints" / "00000012"):
        loaded = loading.load(path)
        assert (loaded.name, loaded.need_tokenizer().vocab_size) == ("mine", 40)
    (tmp_path / "t.json").unlink()
    loaded = loading.load(run)
    with pytest.raises(UserError, match=r"cannot read the tokenizer.*--tokenizer PATH"):
        loaded.need_tokenizer()
    assert len(loading.generate(loaded, PROMPTS, GREEDY)) == 2  # ids need none


def test_synthetic_tokens_are_no_text(made, tmp_path):
    run = checkpoint(tmp_path, made, source="synthetic")
    assert DataConfig().source != "synthetic"
    with pytest.raises(UserError, match="synthetic tokens, which are no text"):
        loading.load(run).need_tokenizer()


def test_a_folder_without_tokenizer_says_what_to_add(made, tmp_path):
    folders.make(tmp_path / "bare")
    loaded = loading.load(tmp_path / "bare")
    with pytest.raises(
        UserError, match=r"no tokenizer in .*bare; put a tokenizer\.json"
    ):
        loading.generate(loaded, ["text"], GREEDY)
    (tmp_path / "other.json").write_text(letters(top=45))
    with pytest.raises(DataError, match="has 46 ids, but the model's vocab_size is 40"):
        loading.load(tmp_path / "bare", tokenizer=str(tmp_path / "other.json"))


def test_what_is_no_checkpoint_is_said(tmp_path):
    with pytest.raises(CheckpointError, match="no such file or folder"):
        loading.load(tmp_path / "nowhere")
    with pytest.raises(CheckpointError, match="no checkpoint here"):
        loading.load(tmp_path)


def test_a_model_that_does_not_fit_is_not_read(made, monkeypatch):
    _, ours, cfg, _ = made
    monkeypatch.setattr(memory, "_host_bytes", lambda: 1000)
    gib = mpt.count_params(cfg) * 4 / 2**30
    with pytest.raises(
        UserError, match=r"the model ours needs .* GiB are missing"
    ) as e:
        loading.load(ours)
    assert f"needs {gib:.2f} GiB" in str(e.value)
    assert "int8 needs less" in str(e.value)


def test_seeds_count_up_with_the_prompts(made):
    loaded = loading.load(made[1])
    warm = Sampling(max_tokens=6, temperature=2.0, seed=5, ignore_eos=True)
    both = loading.generate(loaded, [PROMPTS[0]] * 2, warm)
    assert both[0].ids != both[1].ids
    next_seed = Sampling(max_tokens=6, temperature=2.0, seed=6, ignore_eos=True)
    assert loading.generate(loaded, [PROMPTS[0]], next_seed)[0].ids == both[1].ids
