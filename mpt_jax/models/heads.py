"""The order in which heads lie in memory while a run trains on a ``tensor`` axis.

ALiBi lets attention skip most of a steep head's row and nothing of a flat one's, and a
mesh cuts heads in contiguous runs: with the heads in their own order the device of the
flat ones works as if nothing were skipped, and all others wait for it. So the heads are
dealt to the devices in turns (kernels.skip.head_order). Blocks of 512 keys that the
busiest device visits, of those it would visit without skipping, and the mean of all
devices; logits of standard deviation 1 (tests/models/test_heads.py measures them):

    slopes        tokens   tensor   own order   dealt   mean
    MPT-7B         8,192        4        0.89    0.46   0.45
    MPT-7B         8,192        8        0.99    0.47   0.45
    MPT-7B        65,536        8        0.25    0.11   0.08
    StoryWriter   65,536        8        1.00    0.53   0.50

The order is a matter of memory alone. mpt.init makes the heads in their own order on
any mesh; checkpoints and whatever reads them know no other; the optimizer's moments
follow their parameters. training/layout.py arranges a run's state and gives it back to
be saved; training/step.py says with arranged() in which order its steps find the heads.
"""

from __future__ import annotations

import contextlib
import contextvars
import math
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax.config import ModelConfig
from mpt_jax.kernels import skip
from mpt_jax.kernels.attention import Rule
from mpt_jax.models import alibi
from mpt_jax.partitioning import Axes

BLOCK = 512  # the kernels' blocks of keys, in which rows too short to skip are counted


class Order(NamedTuple):
    """Which head stands at each place; fields are logical axes of parameters."""

    heads: tuple[int, ...]
    kv_heads: tuple[int, ...]

    @property
    def inverse(self) -> Order:
        return Order(*(tuple(np.argsort(places).tolist()) for places in self))


_ORDER: contextvars.ContextVar[Order | None] = contextvars.ContextVar(
    "order", default=None
)


def order(cfg: ModelConfig, *, shards: int, length: int) -> Order | None:
    """The order that balances ``shards`` devices on rows of ``length`` tokens.

    None, the heads' own order, where that balances, where nothing is skipped (one
    shard, no ALiBi, a backend or rows that do not skip) and with dropout of softmax
    weights, whose mask would follow the place and not the head. KV heads stay with
    their query heads; a single one, which every device has, leaves those free.
    """
    a = cfg.attn_config
    rule = Rule(cfg.softmax_scale, skip=cfg.attention_skip)
    skips = a.alibi and not a.attn_pdrop and cfg.attention not in ("xla", "reference")
    if shards == 1 or not skips or not skip.skip_eps(rule, math.ceil(length / BLOCK)):
        return None
    slopes_H = alibi.slopes(cfg.n_heads, bias_max=a.alibi_bias_max)
    group = cfg.n_heads // cfg.n_kv_heads if cfg.n_kv_heads > 1 else 1
    heads_H = skip.head_order(slopes_H, shards, group=group)
    if (heads_H == np.arange(cfg.n_heads)).all():
        return None
    kv_heads_K = heads_H[::group] // group if cfg.n_kv_heads > 1 else np.zeros(1, int)
    return Order(tuple(heads_H.tolist()), tuple(kv_heads_K.tolist()))


@contextlib.contextmanager
def arranged(order: Order | None) -> Iterator[None]:
    """Says that the parameters of what is traced inside are arranged so."""
    token = _ORDER.set(order)
    try:
        yield
    finally:
        _ORDER.reset(token)


def slopes(cfg: ModelConfig) -> np.ndarray | None:
    """The ALiBi slope of the head at each place, (H,) float32; None without ALiBi."""
    a, order = cfg.attn_config, _ORDER.get()
    if not a.alibi:
        return None
    slopes_H = alibi.slopes(cfg.n_heads, bias_max=a.alibi_bias_max)
    return slopes_H if order is None else slopes_H[np.asarray(order.heads)]


def arrange(tree: Any, axes: Any, order: Order | None) -> Any:
    """``tree`` of heads in their own order, arranged; inside a jit.

    Args: axes: the logical axes of every leaf, as mpt.param_axes or optim.state_axes.
    """
    if order is None:
        return tree
    return jax.tree.map(lambda leaf, axes: _arrange(leaf, axes, order), tree, axes)


def _arrange(leaf: jax.Array, axes: Axes, order: Order) -> jax.Array:
    for name in set(axes) & set(Order._fields):
        places = jnp.asarray(getattr(order, name), jnp.int32)
        leaf = jnp.take(leaf, places, axis=axes.index(name), mode="clip")
    return leaf
