"""MosaicML's initialisation schemes as functions of a parameter's fans.

Every scheme gives linear weights and embeddings one distribution (normal or uniform)
whose scale depends on the fans of the matrix; fused projections are initialised per
head, so a head's fan_out is head_dim. Biases start at 0 and norm weights at 1; weights
on a residual branch (out_proj, down_proj) are divided by init_div_is_residual.
``default_`` is torch's: linears U(+-1/sqrt(fan_in)), biases too, embeddings N(0, 1).

Source: llm-foundry@8c8dd48:llmfoundry/models/utils/param_init_fns.py; torch.nn.init.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp

from mpt_jax.config import ModelConfig

Initializer = Callable[[jax.Array, tuple[int, ...], jnp.dtype], jax.Array]


@dataclasses.dataclass(frozen=True)
class Fans:
    """What a matrix is, for its initialiser: torch's fans, and its place."""

    fan_in: int
    fan_out: int
    residual: bool = False


def _normal(std: float) -> Initializer:
    return lambda key, shape, dtype: std * jax.random.normal(key, shape, dtype)


def _uniform(low: float, high: float) -> Initializer:
    return lambda key, shape, dtype: jax.random.uniform(key, shape, dtype, low, high)


def constant(value: float) -> Initializer:
    return lambda key, shape, dtype: jnp.full(shape, value, dtype)


def _gain(nonlinearity: str, slope: float) -> float:
    """torch.nn.init.calculate_gain."""
    if nonlinearity == "leaky_relu":
        return math.sqrt(2 / (1 + slope**2))
    return {"relu": math.sqrt(2), "tanh": 5 / 3, "linear": 1.0, "sigmoid": 1.0}[
        nonlinearity
    ]


def scale(cfg: ModelConfig, fans: Fans) -> tuple[Literal["normal", "uniform"], float]:
    """(distribution, std or half-width) of a matrix before the residual division."""
    init = cfg.init_config
    name = init.name
    if name == "default_":
        return "uniform", 1 / math.sqrt(fans.fan_in)
    if name == "baseline_":
        assert init.init_std is not None  # config.check_model
        return "normal", init.init_std
    if name in ("small_init_", "neox_init_"):
        return "normal", math.sqrt(2 / (5 * cfg.d_model))
    if name.startswith("xavier"):
        std = init.init_gain * math.sqrt(2 / (fans.fan_in + fans.fan_out))
    else:
        fan = fans.fan_in if init.fan_mode == "fan_in" else fans.fan_out
        std = _gain(init.init_nonlinearity, init.init_gain) / math.sqrt(fan)
    return ("normal", std) if "normal" in name else ("uniform", math.sqrt(3) * std)


def residual_divisor(cfg: ModelConfig) -> float:
    """What out_proj and down_proj are divided by."""
    init = cfg.init_config
    if init.name == "neox_init_":
        return cfg.n_layers / math.sqrt(10)
    if init.name == "default_" or init.init_div_is_residual is False:
        return 1.0
    if init.init_div_is_residual is True:
        return math.sqrt(2 * cfg.n_layers)
    return float(init.init_div_is_residual)


def linear(cfg: ModelConfig, fans: Fans) -> Initializer:
    """A linear weight."""
    kind, size = scale(cfg, fans)
    size /= residual_divisor(cfg) if fans.residual else 1.0
    return _normal(size) if kind == "normal" else _uniform(-size, size)


def bias(cfg: ModelConfig, fans: Fans) -> Initializer:
    """A linear bias: 0, or torch's uniform under default_."""
    if cfg.init_config.name != "default_":
        return constant(0.0)
    limit = 1 / math.sqrt(fans.fan_in)
    return _uniform(-limit, limit)


def embedding(cfg: ModelConfig, *, rows: int) -> Initializer:
    """An embedding of ``rows`` rows; its own std or limits win over the scheme."""
    init = cfg.init_config
    if init.emb_init_std is not None:
        return _normal(init.emb_init_std)
    limits = init.emb_init_uniform_lim
    if limits is not None:
        low, high = limits if isinstance(limits, tuple) else (-limits, limits)
        return _uniform(low, high)
    if init.name == "default_":
        return _normal(1.0)
    kind, size = scale(cfg, Fans(fan_in=cfg.d_model, fan_out=rows))
    return _normal(size) if kind == "normal" else _uniform(-size, size)
