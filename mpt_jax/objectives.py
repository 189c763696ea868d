"""Training objectives: pure functions from hidden states to sums.

Sums, not means: microbatches of unequal token counts then add up to the full batch.
"""

from __future__ import annotations

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mpt_jax.partitioning import shard, shards

# Legend: G shards of the tokens, T tokens of one shard, C tokens of one chunk.


class LossSums(NamedTuple):
    """Float32 scalars over all learned tokens.

    total: what is differentiated, ce + z_loss * z; ce: cross-entropy in nats;
    z: squared log-partition; weight: number of learned tokens.
    """

    total: jax.Array
    ce: jax.Array
    z: jax.Array
    weight: jax.Array


def next_token_loss(
    hidden_BLE: jax.Array,
    unembed_VE: jax.Array,
    tokens_BL: jax.Array,
    loss_mask_BL: jax.Array,
    *,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    z_loss: float = 0.0,
    chunk_tokens: int = 1024,
) -> LossSums:
    """Sum of cross-entropies of each next token, without the B x L x V logits.

    Position l predicts tokens[l + 1] with weight loss_mask[l + 1]; the last position
    predicts nothing, as MPT's labels are the tokens rolled by one. Logits exist for
    ``chunk_tokens`` tokens per shard at a time. The gradient of a chunk is taken
    while its logits are there (the loss is a scalar, so the backward pass only scales
    it): three vocabulary matmuls a step where recomputation needs four. Each shard of
    the tokens keeps its own sum of the head's gradient: they meet once, at the end.

    Args:
      hidden_BLE: normed final states, compute dtype.
      unembed_VE: the head, parameter dtype; cast to the compute dtype.
      tokens_BL: int32 ids; loss_mask_BL: 0/1, 1 where the token is learned as a target.
      z_loss: weight of log(Z)^2 (PaLM, arXiv 2204.02311, section 5).
    Returns: LossSums; only ``total`` has gradients (to hidden_BLE and unembed_VE).
    Numerics: logits, softmax and sums in float32; matmul inputs in the compute dtype.
    """
    if tokens_BL.shape != hidden_BLE.shape[:2] or loss_mask_BL.shape != tokens_BL.shape:
        raise ValueError(
            f"tokens_BL {tokens_BL.shape} and loss_mask_BL {loss_mask_BL.shape} must "
            f"match hidden_BLE {hidden_BLE.shape}"
        )
    targets_BL = jnp.roll(tokens_BL, -1, axis=1)
    weights_BL = jnp.roll(loss_mask_BL, -1, axis=1).astype(jnp.float32)
    weights_BL = weights_BL.at[:, -1].set(0)
    options = _Options(logit_scale, logit_softcap, z_loss, chunk_tokens)
    total, ce, z = _loss(options, hidden_BLE, unembed_VE, targets_BL, weights_BL)
    return LossSums(total, *jax.lax.stop_gradient((ce, z)), jnp.sum(weights_BL))


class _Options(NamedTuple):
    logit_scale: float
    logit_softcap: float | None
    z_loss: float
    chunk_tokens: int


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _loss(options, hidden_BLE, unembed_VE, targets_BL, weights_BL):
    sums, _ = _scan_chunks(
        options, hidden_BLE, unembed_VE, targets_BL, weights_BL, with_grads=False
    )
    return sums


def _loss_fwd(options, hidden_BLE, unembed_VE, targets_BL, weights_BL):
    return _scan_chunks(
        options, hidden_BLE, unembed_VE, targets_BL, weights_BL, with_grads=True
    )


def _loss_bwd(options, grads, cotangents):
    hidden_BLE, unembed_VE = grads
    scale = cotangents[0]
    return (
        (hidden_BLE * scale).astype(hidden_BLE.dtype),
        (unembed_VE * scale).astype(unembed_VE.dtype),
        None,
        None,
    )


_loss.defvjp(_loss_fwd, _loss_bwd)


def _scan_chunks(
    options, hidden_BLE, unembed_VE, targets_BL, weights_BL, *, with_grads
):
    """((total, ce, z), (d total/d hidden, d total/d unembed)); gradients optional."""
    B, L, E = hidden_BLE.shape
    V, rows, parts = unembed_VE.shape[0], shards("batch"), shards("length")
    G, T = rows * parts, B * L // (rows * parts)
    n_chunks = -(-T // options.chunk_tokens)
    C = -(-T // n_chunks)
    dtype = hidden_BLE.dtype
    head_VE = shard(unembed_VE.astype(dtype), "vocab", "act_embed")
    is_sharded = shards("tokens") * shards("act_vocab") > 1

    def chunked(x, *trailing):
        x = x.reshape(rows, B // rows, parts, L // parts, *trailing)
        x = x.swapaxes(1, 2).reshape(G, T, *trailing)
        padding = [(0, 0), (0, n_chunks * C - T)] + [(0, 0)] * len(trailing)
        x = jnp.pad(x, padding).reshape(G, n_chunks, C, *trailing)
        x = jnp.moveaxis(x, 1, 0)
        return shard(x, None, "tokens", *[None] * (x.ndim - 2))

    def step(carry, chunk):
        sums, dhead_GVE = carry
        x_GCE, target_GC, weight_GC = chunk
        raw_GCV = options.logit_scale * jnp.einsum(
            "gce,ve->gcv", x_GCE, head_VE, preferred_element_type=jnp.float32
        )
        raw_GCV = shard(raw_GCV, "tokens", None, "act_vocab")
        cap = options.logit_softcap
        logits_GCV = raw_GCV if cap is None else cap * jnp.tanh(raw_GCV / cap)
        # One exponential for the sum and for the probabilities.
        top_GC = jnp.max(logits_GCV, axis=-1)
        exp_GCV = jnp.exp(logits_GCV - top_GC[..., None])
        total_GC = jnp.sum(exp_GCV, axis=-1)
        log_z_GC = top_GC + jnp.log(total_GC)
        vocab_11V = jnp.arange(V)[None, None]
        is_target_GCV = vocab_11V == target_GC[..., None]
        if is_sharded:
            target_logit_GC = jnp.sum(jnp.where(is_target_GCV, logits_GCV, 0), axis=-1)
        else:  # a sum over the vocabulary is slow on CPUs
            target_logit_GC = jnp.take_along_axis(
                logits_GCV, target_GC[..., None], axis=-1
            )[..., 0]
        ce_G = jnp.sum(weight_GC * (log_z_GC - target_logit_GC), axis=-1)
        z_G = jnp.sum(weight_GC * jnp.square(log_z_GC), axis=-1)
        sums = (sums[0] + ce_G, sums[1] + z_G)
        if not with_grads:
            return (sums, dhead_GVE), None
        slope_GC = (1 + 2 * options.z_loss * log_z_GC) / total_GC
        d_GCV = exp_GCV * slope_GC[..., None] - is_target_GCV
        d_GCV = weight_GC[..., None] * d_GCV
        if cap is not None:
            d_GCV = d_GCV * (1 - jnp.square(logits_GCV / cap))
        d_GCV = (d_GCV * options.logit_scale).astype(dtype)
        dx_GCE = jnp.einsum("gcv,ve->gce", d_GCV, head_VE)
        dhead_GVE = dhead_GVE + jnp.einsum(
            "gcv,gce->gve", d_GCV, x_GCE, preferred_element_type=jnp.float32
        )
        return (sums, shard(dhead_GVE, "tokens", "act_vocab", None)), dx_GCE

    zero_G = jnp.zeros((G,), jnp.float32)
    dhead_GVE = jnp.zeros((G, V, E) if with_grads else (), jnp.float32)
    if with_grads:
        dhead_GVE = shard(dhead_GVE, "tokens", "act_vocab", None)
    chunks = (chunked(hidden_BLE, E), chunked(targets_BL), chunked(weights_BL))
    (sums, dhead_GVE), dx = jax.lax.scan(step, ((zero_G, zero_G), dhead_GVE), chunks)
    ce, z = jnp.sum(sums[0]), jnp.sum(sums[1])
    totals = (ce + options.z_loss * z, ce, z)
    if not with_grads:
        return totals, None
    dx = jnp.moveaxis(dx, 0, 1).reshape(G, n_chunks * C, E)[:, :T]
    dx = dx.reshape(rows, parts, B // rows, L // parts, E).swapaxes(1, 2)
    dx = shard(dx.reshape(B, L, E), "batch", "length", "act_embed")
    dhead_VE = jnp.sum(dhead_GVE, axis=0).astype(unembed_VE.dtype)
    return totals, (dx, shard(dhead_VE, "vocab", "embed"))
