"""Initial scales against torch's formulas, and MosaicML's rules for who gets which."""

import functools
import math

import jax
import numpy as np
import pytest

from mpt_jax.config import ModelConfig, parse
from mpt_jax.models import mpt

D, H, N, F, V = 64, 4, 8, 256, 512
DIV = math.sqrt(2 * N)
# 8 layers x 64 x 64 draws and more: the standard error of a std is < 0.5 %.
STD_RTOL = 0.03


@functools.cache
def params(**init):
    cfg = parse(
        ModelConfig,
        {"d_model": D, "n_heads": H, "n_layers": N, "vocab_size": V, "max_seq_len": 256,
         "init_config": init},
    )  # fmt: skip
    return jax.jit(mpt.init, static_argnums=0)(cfg, jax.random.key(0))


def stds(p):
    blocks = p["blocks"]
    return {
        "wte": p["wte"]["weight"],
        "wpe": p["wpe"]["weight"],
        "Wq": blocks["attn"]["Wq"]["weight"],
        "out_proj": blocks["attn"]["out_proj"]["weight"],
        "up_proj": blocks["ffn"]["up_proj"]["weight"],
        "down_proj": blocks["ffn"]["down_proj"]["weight"],
    }


K = math.sqrt(2 / D)  # kaiming relu, fan_in = D
SMALL = math.sqrt(2 / (5 * D))
XAVIER = {"wte": D + V, "wpe": D + 256, "Wq": D + D // H, "out_proj": 2 * D,
          "up_proj": D + F, "down_proj": D + F}  # fmt: skip


@pytest.mark.parametrize(
    ("init", "expected"),
    [
        ({}, {"wte": K, "wpe": K, "Wq": K, "out_proj": K / DIV, "up_proj": K,
              "down_proj": math.sqrt(2 / F) / DIV}),
        ({"name": "kaiming_uniform_"}, {"wte": K, "Wq": K, "out_proj": K / DIV}),
        # fan_out of a head's slice of the fused qkv is head_dim.
        ({"fan_mode": "fan_out"}, {"wte": math.sqrt(2 / V),
                                   "Wq": math.sqrt(2 / (D // H)),
                                   "up_proj": math.sqrt(2 / F)}),
        ({"init_nonlinearity": "leaky_relu", "init_gain": 1.0},
         {"Wq": 1 / math.sqrt(D)}),
        ({"init_nonlinearity": "tanh"}, {"Wq": 5 / 3 / math.sqrt(D)}),
        ({"name": "baseline_", "init_std": 0.02, "init_div_is_residual": False},
         {"wte": 0.02, "Wq": 0.02, "out_proj": 0.02, "down_proj": 0.02}),
        ({"name": "baseline_", "init_std": 0.02, "init_div_is_residual": "5"},
         {"Wq": 0.02, "out_proj": 0.004}),
        ({"name": "baseline_", "init_std": 0.02, "init_div_is_residual": 2.0},
         {"out_proj": 0.01}),
        ({"name": "small_init_"}, {"wte": SMALL, "Wq": SMALL, "out_proj": SMALL / DIV}),
        ({"name": "neox_init_"}, {"up_proj": SMALL,
                                  "down_proj": SMALL / (N / math.sqrt(10))}),
        ({"name": "xavier_normal_", "init_gain": 1.0, "init_div_is_residual": False},
         {k: math.sqrt(2 / fans) for k, fans in XAVIER.items()}),
        ({"name": "xavier_uniform_", "init_gain": 2.0, "init_div_is_residual": False},
         {k: 2 * math.sqrt(2 / fans) for k, fans in XAVIER.items()}),
        ({"name": "default_"}, {"wte": 1.0, "Wq": 1 / math.sqrt(3 * D),
                                "down_proj": 1 / math.sqrt(3 * F)}),
        ({"emb_init_std": 0.5}, {"wte": 0.5, "wpe": 0.5, "Wq": K}),
        ({"emb_init_uniform_lim": 0.3}, {"wte": 0.3 / math.sqrt(3)}),
        ({"emb_init_uniform_lim": (0.0, 0.3)}, {"wte": 0.3 / math.sqrt(12)}),
    ],
    ids=lambda x: "-".join(map(str, x.values())) if "wte" not in x else "",
)  # fmt: skip
def test_std(init, expected):
    got = stds(params(**init))
    for name, std in expected.items():
        np.testing.assert_allclose(np.std(got[name]), std, rtol=STD_RTOL, err_msg=name)


@pytest.mark.parametrize("name", ["kaiming_uniform_", "default_", "xavier_uniform_"])
def test_uniform_schemes_are_bounded(name):
    up = np.abs(params(name=name, init_gain=1.0)["blocks"]["ffn"]["up_proj"]["weight"])
    assert up.max() < math.sqrt(3) * 1.02 * np.sqrt(np.mean(np.square(up)))


def test_norms_are_one_and_biases_zero():
    p = params()
    assert np.all(p["norm_f"]["weight"] == 1)
    assert np.all(p["blocks"]["norm_1"]["bias"] == 0)
    assert np.all(p["blocks"]["ffn"]["up_proj"]["bias"] == 0)
    torch_default = params(name="default_")["blocks"]["ffn"]["up_proj"]["bias"]
    assert 0 < np.abs(torch_default).max() <= 1 / math.sqrt(D)


def test_layers_and_parameters_differ():
    p = params()["blocks"]["attn"]
    assert np.abs(p["Wq"]["weight"][0] - p["Wq"]["weight"][1]).min() >= 0
    assert not np.array_equal(p["Wq"]["weight"][0], p["Wq"]["weight"][1])
    assert not np.array_equal(p["Wq"]["weight"], p["Wk"]["weight"])


def test_a_parameter_depends_on_its_path_only():
    """Another vocabulary leaves the blocks as they were."""
    other = parse(
        ModelConfig,
        {"d_model": D, "n_heads": H, "n_layers": N, "vocab_size": 32, "no_bias": True},
    )
    a, b = params()["blocks"], mpt.init(other, jax.random.key(0))["blocks"]
    weights = [x["attn"]["Wq"]["weight"] for x in (a, b)]
    np.testing.assert_allclose(*weights, rtol=1e-6)  # one is compiled, one is not
