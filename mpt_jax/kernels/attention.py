"""The attention op: its contract, and the choice of the backend that computes it.

A backend is one function ``(q_BLHD, k_BSKD, v_BSKD, rule, operands) -> (out_BLHD,
lse_BLH)`` in a file of its own and one line in ``_BACKENDS``. It raises
NotImplementedError for what it cannot do and may trust the checks made here.
"""

from __future__ import annotations

import dataclasses
import importlib
import math
from collections.abc import Callable
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike

Implementation = Literal["auto", "xla", "tpu", "gpu", "reference"]
Skip = Literal["auto", "off"] | float

# Where each implementation lives.
_BACKENDS: dict[str, str] = {
    "reference": "mpt_jax.kernels.attention_xla:attention_reference",
    "xla": "mpt_jax.kernels.attention_xla:attention_blocked",
    "tpu": "mpt_jax.kernels.attention_tpu:attention_tpu",
    "gpu": "mpt_jax.kernels.attention_gpu:attention_gpu",
}
# Where the gradients of a part of a row's keys are: ``gradients``.
_GRADIENTS: dict[str, str] = {
    "xla": "mpt_jax.kernels.attention_xla:gradients_blocked",
    "tpu": "mpt_jax.kernels.attention_tpu:gradients_tpu",
    "gpu": "mpt_jax.kernels.attention_gpu:gradients_gpu",
}
# What "auto" tries, in order, per jax platform; every other platform runs "xla".
_AUTO_ORDER = {"tpu": ("tpu", "xla"), "gpu": ("gpu", "xla")}

# Every backend gives its saved output and log-sum-exp these names, so that a remat
# policy (jax.checkpoint_policies.save_only_these_names) need not run attention twice.
RESIDUAL_NAMES = ("attention_out", "attention_lse")

_DTYPES = ("float16", "bfloat16", "float32", "float64")


@dataclasses.dataclass(frozen=True)
class Rule:
    """The static half of a call: hashable, the same for every element."""

    softmax_scale: float
    causal: bool = True
    window: int | None = None
    logit_softcap: float | None = None
    dropout_rate: float = 0.0
    skip: Skip = "auto"

    def capped(self, logits: jax.Array) -> jax.Array:
        """softcap(logits); the bias comes after."""
        cap = self.logit_softcap
        return logits if cap is None else cap * jnp.tanh(logits / cap)


class Operands(NamedTuple):
    """The traced half of a call beside q, k and v. None: absent."""

    slopes_H: jax.Array | None = None
    q_segment_ids_BL: jax.Array | None = None
    kv_segment_ids_BS: jax.Array | None = None
    prefix_mask_BS: jax.Array | None = None
    q_offset: ArrayLike = 0
    kv_offset: ArrayLike = 0
    dropout_key: jax.Array | None = None


def attention(
    q_BLHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    slopes_H: jax.Array | None = None,
    *,
    softmax_scale: float,
    causal: bool = True,
    q_segment_ids_BL: jax.Array | None = None,
    kv_segment_ids_BS: jax.Array | None = None,
    prefix_mask_BS: jax.Array | None = None,
    window: int | None = None,
    logit_softcap: float | None = None,
    q_offset: ArrayLike = 0,
    kv_offset: ArrayLike = 0,
    dropout_rate: float = 0.0,
    dropout_key: jax.Array | None = None,
    skip: Skip = "auto",
    implementation: Implementation = "auto",
    return_lse: bool = False,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """Softmax attention with ALiBi: out_i = sum_j softmax_j(logit_ij) v_j.

    With i = q_offset + row and j = kv_offset + column, head h (KV head h // (H // K)):

        logit_ij = softcap(softmax_scale * q_i . k_j) - slopes_h * |i - j|
        softcap(x) = logit_softcap * tanh(x / logit_softcap)

    and j is visible to i where (j <= i or prefix_mask_j or not causal), |i - j| <=
    window, and both have the same segment, which is not 0 (padding). A row that sees
    nothing returns 0 and lse -inf. The bias is never stored, nor its gradient: slopes
    are constants. MPT's softmax_scale is 1/sqrt(d_model / n_heads) even where head_dim
    is set, others' 1/sqrt(head_dim); hence there is no default.

    Args:
      q_BLHD: queries, float16 to float64.
      k_BSKD, v_BSKD: keys and values, dtype of q; H is a multiple of K.
      slopes_H: ALiBi slopes (positive), or None for no position bias.
      q_segment_ids_BL, kv_segment_ids_BS: integers, both or neither.
      prefix_mask_BS: bool; keys that every query of their segment sees.
      window: keys farther than this are hidden; 0 leaves the diagonal.
      q_offset, kv_offset: position of row 0 and of column 0, int or traced scalar.
      dropout_rate: probability of dropping each softmax weight; needs dropout_key.
      skip: what a kernel may pass over because the bias has erased it: keys that have,
        for certain and together, at most this share of a row's softmax; "auto" is
        2^-24 where rows are long enough for it to pay, "off" nothing. It changes the
        output by at most 2 * share * max |v|. Backends without it compute everything.
      implementation: "auto" takes the platform's first kernel that supports the case;
        a named one never falls back.

    Returns:
      out_BLHD in the dtype of q; with return_lse also lse_BLH = log sum_j exp(logit_ij)
      of the undropped softmax, float32 (float64 for float64 inputs), differentiable:
      two calls over parts of the keys can be merged exactly.

    Raises:
      ValueError: an argument outside the contract above.
      NotImplementedError: a named implementation lacks the case or the platform.

    Numerics: logits, softmax and sums in float32 (float64 for float64 inputs), from
      distances as exact integers. Relative L2 error against float64: float32 3e-6 out,
      5e-6 gradients; bfloat16 4e-3 and 1e-2.
    Source: Press et al. 2022 (arXiv 2108.12409);
      llm-foundry@8c8dd48:llmfoundry/models/layers/attention.py.
    """
    rule = Rule(softmax_scale, causal, window, logit_softcap, dropout_rate, skip)
    operands = Operands(
        slopes_H,
        q_segment_ids_BL,
        kv_segment_ids_BS,
        prefix_mask_BS,
        q_offset,
        kv_offset,
        dropout_key,
    )
    check(q_BLHD, k_BSKD, v_BSKD, rule, operands)
    out, lse = attend(implementation, q_BLHD, k_BSKD, v_BSKD, rule, operands)
    return (out, lse) if return_lse else out


def attend(implementation: str, *call: Any) -> tuple[jax.Array, jax.Array]:
    """(out, lse) of a call that is known to be in order: a backend's arguments."""
    return _dispatch(_BACKENDS, implementation, *call)


def gradients(
    implementation: str, *call: Any
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """dq, dk and dv through these keys alone, in rows that also see others.

    Args: a backend's, then out_BLHD and lse_BLH of the whole rows, and the cotangents
      of both. Over all parts of the keys, dq adds up to the whole row's.
    """
    return _dispatch(_GRADIENTS, implementation, *call)


def _dispatch(table: dict[str, str], implementation: str, *call: Any) -> Any:
    if implementation != "auto":
        return _backend(table, implementation)(*call)
    *preferred, last = _AUTO_ORDER.get(_platform(), ("xla",))
    for name in preferred:
        try:
            return _backend(table, name)(*call)
        except NotImplementedError:
            pass
    return _backend(table, last)(*call)


def _platform() -> str:
    """Of the devices compiled for: the ambient mesh's, which need not be here."""
    device = jax.sharding.get_abstract_mesh().abstract_device
    platform = getattr(device, "platform", None) or jax.default_backend()
    return "gpu" if platform in ("cuda", "rocm") else platform


def _backend(table: dict[str, str], name: str) -> Callable[..., Any]:
    if name not in table:
        names = ["auto", *table]
        raise ValueError(f"implementation: got {name!r}, expected one of {names}")
    module, function = table[name].split(":")
    return getattr(importlib.import_module(module), function)


def check(
    q_BLHD: jax.Array, k_BSKD: jax.Array, v_BSKD: jax.Array, rule: Rule, x: Operands
) -> None:
    """Raises: ValueError: a call outside the contract of attention()."""
    _check_arrays(q_BLHD, k_BSKD, v_BSKD, x)
    _check_rule(rule, x)


def _check_arrays(q: jax.Array, k: jax.Array, v: jax.Array, x: Operands) -> None:
    _expect(q.ndim == 4 and q.size, "q_BLHD", q.shape, "a non-empty (B, L, H, D)")
    B, L, H, D = q.shape
    fits = k.ndim == 4 and k.size and (k.shape[0], k.shape[3]) == (B, D)
    _expect(fits, "k_BSKD", k.shape, f"a non-empty (B, S, K, D) with B={B}, D={D}")
    S, K = k.shape[1:3]
    _expect(H % K == 0, "k_BSKD", f"K={K} heads", f"a divisor of q's H={H}")
    _expect(v.shape == k.shape, "v_BSKD", v.shape, f"the shape of k, {k.shape}")
    _expect(str(q.dtype) in _DTYPES, "q_BLHD", q.dtype, f"one of {_DTYPES}")
    for name, array in (("k_BSKD", k), ("v_BSKD", v)):
        _expect(array.dtype == q.dtype, name, array.dtype, f"the dtype of q, {q.dtype}")

    for name, shape, kind in (
        ("slopes_H", (H,), jnp.floating),
        ("q_segment_ids_BL", (B, L), jnp.integer),
        ("kv_segment_ids_BS", (B, S), jnp.integer),
        ("prefix_mask_BS", (B, S), jnp.bool_),
        ("q_offset", (), jnp.integer),
        ("kv_offset", (), jnp.integer),
    ):
        array = getattr(x, name)
        if array is not None:
            _expect(jnp.shape(array) == shape, name, jnp.shape(array), f"shape {shape}")
            dtype = jnp.result_type(array)
            _expect(jnp.issubdtype(dtype, kind), name, dtype, f"{kind.__name__} dtype")


def _check_rule(rule: Rule, x: Operands) -> None:
    scale, window, cap = rule.softmax_scale, rule.window, rule.logit_softcap
    _expect(_is_real(scale), "softmax_scale", scale, "a finite Python number")
    natural = window is None or (isinstance(window, int) and window >= 0)
    _expect(natural, "window", window, "None or an int >= 0")
    positive = cap is None or (_is_real(cap) and cap > 0)
    _expect(positive, "logit_softcap", cap, "None or a number > 0")
    allowed = rule.skip in ("auto", "off") or (
        _is_real(rule.skip) and 0 <= rule.skip < 1
    )
    _expect(allowed, "skip", rule.skip, "'auto', 'off' or a number in [0, 1)")
    rate, key = rule.dropout_rate, x.dropout_key
    in_range = _is_real(rate) and 0 <= rate < 1
    _expect(in_range, "dropout_rate", rate, "a number in [0, 1)")
    _expect(not rate or key is not None, "dropout_key", key, f"a key to drop {rate}")
    alone = (x.q_segment_ids_BL is None) != (x.kv_segment_ids_BS is None)
    _expect(not alone, "q_/kv_segment_ids", "one of them", "both or neither")
    useless = x.prefix_mask_BS is not None and not rule.causal
    _expect(not useless, "prefix_mask_BS", "a mask", "None where causal=False")


def _is_real(x: object) -> bool:
    return isinstance(x, int | float) and math.isfinite(x)


def _expect(ok: object, name: str, got: object, expected: str) -> None:
    if not ok:
        raise ValueError(f"{name}: got {got}, expected {expected}")
