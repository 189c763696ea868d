"""The leaves of MPT: parameters, linear maps and norms.

Modules declare parameters by shape, logical axes and initialiser; they hold no arrays
until ``nnx.update(module, params)`` binds a plain nested dict (models/mpt.py). So
building one costs nothing, on any device count and at any size.
"""

from __future__ import annotations

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

from mpt_jax.config import ModelConfig
from mpt_jax.models import init
from mpt_jax.models.init import Fans, Initializer
from mpt_jax.models.packed import Packed
from mpt_jax.partitioning import shards

Dim = tuple[int, str | None]  # (size, logical axis)


def param(
    cfg: ModelConfig, dims: tuple[Dim, ...], initializer: Initializer
) -> nnx.Param:
    """A declared parameter: its shape, dtype, logical axes and initialiser."""
    shape = tuple(size for size, _ in dims)
    return nnx.Param(
        jax.ShapeDtypeStruct(shape, jnp.dtype(cfg.param_dtype)),
        axes=tuple(axis for _, axis in dims),
        initializer=initializer,
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def matmul(x: jax.Array, w: jax.Array, n_in: int) -> jax.Array:
    """Contracts the last ``n_in`` dims of x with the first of w, in the dtype of x.

    The backward says what JAX's own leaves to XLA: dw = x^T g of two matrices, with no
    transposition (on a CPU XLA fuses one into the activation: 380 instead of 220 ms for
    the FFN of 125M), in the dtype of w, so float32 for bfloat16 activations.
    """
    return jnp.tensordot(x, w.astype(x.dtype), n_in)


def _matmul_forward(x, w, n_in):
    # Not matmul itself: a remat policy does not see into it.
    return jnp.tensordot(x, w.astype(x.dtype), n_in), (x, w)


def _matmul_backward(n_in, residuals, g):
    x, w = residuals
    n_features, tokens = math.prod(w.shape[:n_in]), x.shape[:-n_in]
    if shards("length") == 1:  # else one dim of all tokens would gather their parts
        tokens = (math.prod(tokens),)
    x_TI, g_TO = x.reshape(*tokens, n_features), g.reshape(*tokens, -1)
    w_IO = w.reshape(n_features, -1).astype(g.dtype)
    contract, over = jax.lax.dot_general, tuple(range(len(tokens)))
    dx_TI = contract(g_TO, w_IO, (((len(tokens),), (1,)), ((), ())))
    dw_IO = contract(
        x_TI, g_TO, ((over, over), ((), ())), preferred_element_type=w.dtype
    )
    return dx_TI.reshape(x.shape), dw_IO.reshape(w.shape)


matmul.defvjp(_matmul_forward, _matmul_backward)


class Linear(nnx.Module):
    """y = x W + b over the trailing dims of x, which may be several: (H, D) -> (E,)."""

    def __init__(
        self, cfg: ModelConfig, dims_in: tuple[Dim, ...], dims_out: tuple[Dim, ...], *,
        fans: Fans, use_bias: bool,
    ):  # fmt: skip
        self.dtype = jnp.dtype(cfg.compute_dtype)
        self.n_in = len(dims_in)
        self.weight = param(cfg, dims_in + dims_out, init.linear(cfg, fans))
        # A bias lives where its output lives; over the model width that is everywhere.
        dims_bias = tuple((n, None if a == "embed" else a) for n, a in dims_out)
        self.bias = param(cfg, dims_bias, init.bias(cfg, fans)) if use_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        x, weight = x.astype(self.dtype), self.weight.get_value()
        if isinstance(weight, Packed):
            y = weight.matmul(x).astype(self.dtype)
        else:
            y = matmul(x, weight, self.n_in)
        return self.add_bias(y)

    def add_bias(self, y: jax.Array) -> jax.Array:
        if self.bias is None:
            return y
        bias = self.bias[...].astype(self.dtype)
        return y + jnp.expand_dims(bias, tuple(range(y.ndim - bias.ndim)))


class Norm(nnx.Module):
    """LayerNorm or RMSNorm over the trailing ``dims``; statistics in float32.

    low_precision_* casts x and its parameters to the compute dtype first and returns
    that dtype; the others compute and return float32 (torch's autocast does the same).
    Source: llm-foundry@8c8dd48:llmfoundry/models/layers/norm.py:LPLayerNorm.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        dims: tuple[Dim, ...],
        *,
        kind: str = "",
        eps: float = 0.0,
    ):
        kind, self.eps = kind or cfg.norm_type, eps or cfg.norm_eps
        self.rms = kind.endswith("rmsnorm")
        low = kind.startswith("low_precision")
        self.dtype = jnp.dtype(cfg.compute_dtype) if low else jnp.dtype("float32")
        self.n_dims = len(dims)
        self.weight = param(cfg, dims, init.constant(1.0))
        has_bias = not (cfg.no_bias or self.rms)
        self.bias = param(cfg, dims, init.constant(0.0)) if has_bias else None

    def __call__(self, x: jax.Array) -> jax.Array:
        lead = tuple(range(x.ndim - self.n_dims))
        axes = tuple(range(x.ndim - self.n_dims, x.ndim))
        wide = x.astype(self.dtype).astype(jnp.float32)
        if not self.rms:
            wide = wide - jnp.mean(wide, axes, keepdims=True)
        variance = jnp.mean(jnp.square(wide), axes, keepdims=True)
        y = wide * jax.lax.rsqrt(variance + self.eps)
        y = y * jnp.expand_dims(self._affine(self.weight), lead)
        if self.bias is not None:
            y = y + jnp.expand_dims(self._affine(self.bias), lead)
        return y.astype(self.dtype)

    def _affine(self, p: nnx.Param) -> jax.Array:
        return p[...].astype(self.dtype).astype(jnp.float32)


class Embedding(nnx.Module):
    """Rows of a table, in the compute dtype."""

    def __init__(self, cfg: ModelConfig, rows: Dim):
        self.dtype = jnp.dtype(cfg.compute_dtype)
        initializer = init.embedding(cfg, rows=rows[0])
        self.weight = param(cfg, (rows, (cfg.d_model, "embed")), initializer)


@jax.custom_vjp
def gelu(x: jax.Array) -> jax.Array:
    """x * Phi(x), exactly (erf). Keeps only x for the backward: half a GiB less for
    2,048 tokens of 125M than jax.nn.gelu, whose erfc also takes three times an erf."""
    return x * _normal_cdf(x)


def _gelu_backward(x: jax.Array, g: jax.Array) -> tuple[jax.Array]:
    density = jnp.exp(-0.5 * jnp.square(x)) * (2 * math.pi) ** -0.5
    return (g * (_normal_cdf(x) + x * density),)


def _normal_cdf(x: jax.Array) -> jax.Array:
    return 0.5 * (1 + jax.lax.erf(x * math.sqrt(0.5)))


gelu.defvjp(lambda x: (gelu(x), x), _gelu_backward)


def activation(cfg: ModelConfig, x: jax.Array) -> jax.Array:
    """The feed-forward activation, by its torch name."""
    act = cfg.ffn_config.ffn_act_fn
    if act.name == "gelu":
        return jax.nn.gelu(x) if act.approximate == "tanh" else gelu(x)
    if act.name == "quick_gelu":
        return x * jax.nn.sigmoid(1.702 * x)
    functions = {
        "relu": jax.nn.relu, "silu": jax.nn.silu, "elu": jax.nn.elu,
        "leaky_relu": jax.nn.leaky_relu, "mish": jax.nn.mish, "tanh": jnp.tanh,
    }  # fmt: skip
    return functions[act.name](x)


def dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    """Inverted dropout; ``key`` None (evaluation) or rate 0 is the identity."""
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1 - rate, x.shape)
    return jnp.where(keep, x / (1 - rate), jnp.zeros((), x.dtype)).astype(x.dtype)


def split_key(key: jax.Array | None, n: int) -> tuple[jax.Array | None, ...]:
    return (None,) * n if key is None else tuple(jax.random.split(key, n))
