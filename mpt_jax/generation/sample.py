"""Sampling by running the whole prefix for every token: short, exact, no cache.

Good for a glance at a small model; its cost is quadratic in the text.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.config import ModelConfig
from mpt_jax.errors import UserError
from mpt_jax.models import mpt


def sample(
    cfg: ModelConfig,
    params: mpt.Params,
    prompt: Sequence[int],
    *,
    max_tokens: int,
    temperature: float,
    seed: int,
    vocab_size: int | None = None,
    eos_id: int | None = None,
) -> list[int]:
    """Continues ``prompt`` by up to ``max_tokens`` ids; stops before ``eos_id``.

    Args:
      prompt: at least one id.
      temperature: 0 takes the most likely id.
      vocab_size: ids the tokenizer knows; the head's padding rows above it never come.
    Raises: UserError: an empty prompt, or more tokens than learned positions.
    """
    length = len(prompt) + max_tokens
    if not prompt:
        raise UserError("sample: the prompt has no tokens")
    if cfg.has_wpe and length > cfg.max_seq_len:
        raise UserError(
            f"sample: {len(prompt)} + {max_tokens} tokens are over max_seq_len "
            f"{cfg.max_seq_len}, where the learned positions end"
        )
    # Causal: what stands right of a position cannot change it, so zeros will do.
    tokens = np.zeros((1, length), np.int32)
    tokens[0, : len(prompt)] = prompt
    key = jax.random.key(seed)
    for end in range(len(prompt), length):
        next_id = int(
            _next_id(
                cfg, vocab_size or cfg.vocab_size, params, tokens, end,
                jax.random.fold_in(key, end), temperature,
            )
        )  # fmt: skip
        if next_id == eos_id:
            break
        tokens[0, end] = next_id
    else:
        end = length
    return tokens[0, len(prompt) : end].tolist()


@functools.partial(jax.jit, static_argnums=(0, 1))
def _next_id(cfg, vocab_size, params, tokens_BL, end, key, temperature):
    x_BLE = mpt.hidden_states(cfg, params, tokens_BL)
    x_BLE = jax.lax.dynamic_slice_in_dim(x_BLE, end - 1, 1, axis=1)
    logits_V = mpt.logits(cfg, params, x_BLE)[0, 0, :vocab_size]
    scaled_V = logits_V / jnp.maximum(temperature, 1e-6)
    drawn = jax.random.categorical(key, scaled_V)
    return jnp.where(temperature > 0, drawn, jnp.argmax(logits_V))
