"""A config named after a model is that model."""

import dataclasses
import pathlib

import pytest

from mpt_jax import cli, presets
from mpt_jax.config import TrainConfig, flatten, parse
from mpt_jax.models import mpt

ROOT = pathlib.Path(__file__).parents[1]
CONFIGS = sorted((ROOT / "configs").rglob("*.py"))


@pytest.mark.parametrize("name", presets.PRESETS)
def test_parameter_count_is_the_published_one(name):
    model = presets.model(name)
    assert mpt.count_params(model) == presets.PRESETS[name].published_params


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("mpt-7b", {"alibi": True, "alibi_bias_max": 8, "clip_qkv": None}),
        ("mpt-7b-storywriter", {"alibi": True, "alibi_bias_max": 16, "clip_qkv": 6}),
        ("mpt-1b-redpajama-200b", {"alibi": True, "qk_ln": True}),
        ("mpt-7b-foundry", {"alibi": False}),
    ],
)
def test_what_tells_the_models_apart(name, fields):
    attn = dataclasses.asdict(presets.model(name).attn_config)
    assert {k: attn[k] for k in fields} == fields


def test_mpt_30b_has_64_heads_of_112():
    model = presets.model("mpt-30b")
    assert (model.n_heads, model.d_head) == (64, 112)


def test_unverified_fields_are_fields():
    names = flatten(presets.model("mpt-7b"))
    for preset in presets.PRESETS.values():
        assert all(u in names or "not seen" in u for u in preset.unverified)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda p: p.stem)
def test_every_config_file_parses_and_says_how_to_run_it(path):
    overrides = {"steps": "10"} if path.stem == "base" else {}
    config = cli.load_config(str(path), overrides)
    assert config.total_steps > 0
    assert f"--config {path.relative_to(ROOT)}" in path.read_text()


NO_MODEL = ("base", "tiny", "tiny_mixture")


@pytest.mark.parametrize("path", [p for p in CONFIGS if p.stem not in NO_MODEL],
                         ids=lambda p: p.stem)  # fmt: skip
def test_a_config_named_after_a_model_is_that_model(path):
    config = cli.load_config(str(path), {})
    names = {
        "mpt_7b" if path.parent.name == "released" else "": "mpt-7b",
        "mpt_1b_redpajama": "mpt-1b-redpajama-200b",
    }
    name = names.get(path.stem, path.stem.replace("_", "-"))
    if path.parent.name != "released" and f"{name}-foundry" in presets.PRESETS:
        name = f"{name}-foundry"
    model = dataclasses.replace(config.model, remat=presets.model(name).remat)
    assert model == presets.model(name)
    recipe = presets.PRESETS[name].train
    assert {k: flatten(config)[k] for k in recipe} == recipe


def test_config_of_a_preset_round_trips():
    values = presets.config("mpt-125m", global_batch_size=8)
    config = parse(TrainConfig, values)
    assert config.global_batch_size == 8
    assert config.model == presets.model("mpt-125m")
