"""Against transformers and torch themselves: what they write, and what they load."""

import datetime
import json

import numpy as np
import pytest

from mpt_jax.config import ModelConfig, parse
from mpt_jax.convert import convert_from, convert_to
from mpt_jax.errors import CheckpointError
from mpt_jax.interop import read
from mpt_jax.models import mpt
from tests.golden import make_hf_golden as golden
from tests.interop import folders
from tests.interop.test_read import assert_bitwise_equal, collect

pytestmark = pytest.mark.hf

# Ours against theirs in float32, three layers: the order of sums, as in test_hf.py.
HF_RTOL = 1e-5
TOKENS = np.arange(34).reshape(2, 17) % 40


@pytest.fixture(scope="module")
def torch():
    pytest.importorskip("transformers", reason="needs the 'hf' extra")
    return pytest.importorskip("torch", reason="needs the 'hf' extra")


def state_dict(torch, cfg, tree):
    def tensor(array):
        if array.dtype == np.float32:
            return torch.from_numpy(array)
        return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)

    return {n: tensor(a) for n, a in folders.tensors(cfg, tree).items()}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", ["plain", "clip", "untied"])
def test_auto_model_loads_what_we_write_with_equal_logits(torch, name, dtype, tmp_path):
    import transformers

    folders.make(tmp_path / "src", name, dtype=dtype)
    convert_from(tmp_path / "src", tmp_path / "ckpt")
    convert_to(tmp_path / "ckpt", tmp_path / "out", format="hf")
    model, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True, dtype="auto"
    )
    assert not any(info.values())
    assert str(model.dtype) == f"torch.{dtype}"
    theirs = model.float()(torch.from_numpy(TOKENS)).logits.detach().numpy()
    cfg, params = collect(tmp_path / "src", dtype="float32")
    cfg = parse(ModelConfig, folders.MODELS[name] | {"compute_dtype": "float32"})
    ours = np.asarray(mpt.apply(cfg, params, TOKENS))
    assert np.abs(ours - theirs).max() <= HF_RTOL * np.abs(theirs).max()


@pytest.mark.parametrize("tie", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("safe", [True, False], ids=["safetensors", "bin"])
def test_what_transformers_saves_is_read(torch, safe, tie, tmp_path):
    fields = golden.BASE | {
        "d_model": 36, "n_heads": 6, "max_seq_len": 24, "tie_word_embeddings": tie
    }  # fmt: skip
    model = golden.make_model(fields, seed=3, dtype="float32")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    if not safe:  # as the hub has them: transformers 5 no longer writes these
        for file in tmp_path.glob("*.safetensors*"):
            file.unlink()
        weights = dict(model.state_dict())  # lm_head too, though it is tied
        assert "lm_head.weight" in weights
        torch.save(weights, tmp_path / "pytorch_model.bin")
    cfg, params = collect(tmp_path)
    assert cfg.attn_config.alibi  # nowhere in the file: its class's default
    expected = golden.our_tree(
        dict(model.named_parameters()), n_layers=cfg.n_layers, n_heads=cfg.n_heads
    )
    assert_bitwise_equal(params, expected)


def test_sharded_pickles_are_read(torch, tmp_path):
    cfg, tree = folders.make(tmp_path, dtype="bfloat16")
    (tmp_path / "model.safetensors").unlink()
    weights = list(state_dict(torch, cfg, tree).items())
    weight_map = {}
    for i in range(2):
        file = f"pytorch_model-{i + 1:05d}-of-00002.bin"
        mine = dict(weights[i::2])
        torch.save(mine, tmp_path / file)
        weight_map |= dict.fromkeys(mine, file)
    text = json.dumps({"weight_map": weight_map})
    (tmp_path / "pytorch_model.bin.index.json").write_text(text)
    assert_bitwise_equal(collect(tmp_path)[1], tree)
    (tmp_path / "pytorch_model-00002-of-00002.bin").unlink()
    with pytest.raises(CheckpointError, match=r"pytorch_model-00002-.*: missing"):
        read.check(tmp_path)


@pytest.mark.parametrize("own_config", [True, False], ids=["config", "config beside"])
def test_composer_checkpoints_are_read(torch, own_config, tmp_path):
    cfg, tree = folders.make(tmp_path, "grouped")
    (tmp_path / "model.safetensors").unlink()
    weights = state_dict(torch, cfg, tree)
    raw = json.loads((tmp_path / "config.json").read_text())
    content = raw | {"return_dict": True, "is_decoder": False, "top_k": 50}
    hf = {"model": {"config": {"file_extension": ".json", "content": content}}}
    state = {
        "model": {f"model.{n}": t for n, t in weights.items()},
        "optimizers": {"DecoupledLionW": {"state": {0: {"exp_avg": torch.zeros(3)}}}},
        "timestamp": {"Timestamp": {"total_wct": datetime.timedelta(3)}},
        "integrations": {"huggingface": hf} if own_config else {},
    }
    rng = [{"numpy": np.random.get_state(), "torch": torch.get_rng_state()}]
    torch.save({"state": state, "rng": rng}, tmp_path / "ep0-ba10-rank0.pt")
    if own_config:
        (tmp_path / "config.json").unlink()
    got, params = collect(tmp_path / "ep0-ba10-rank0.pt")
    assert got.attn_config == cfg.attn_config
    assert_bitwise_equal(params, tree)
