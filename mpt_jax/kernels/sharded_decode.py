"""Decode attention on every device's own heads and slots, under jax.shard_map.

Each device goes over the blocks that its own heads need, and the Triton kernel, which
XLA cannot cut in parts, runs on each device's part of the cache.
"""

from __future__ import annotations

from typing import Any

import jax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from mpt_jax.kernels.decode import decode_attention
from mpt_jax.kernels.sharded import Layout


def sharded_decode(
    q_BLHD: jax.Array,
    k_BKSD: jax.Array,
    v_BKSD: jax.Array,
    lengths_B: jax.Array,
    slopes_H: jax.Array | None = None,
    *,
    mesh: Mesh,
    layout: Layout,
    key_norms_BKJ: jax.Array | None = None,
    **options: Any,
) -> jax.Array:
    """kernels.decode.decode_attention of arrays that lie on ``mesh``.

    Nothing is communicated.

    Args: as decode_attention; layout: what cuts the slots (``batch``, both of q and of
      the cache, which then have as many rows), the heads and the KV heads. Each row's
      keys are whole, on one device.
    Raises: as decode_attention; ValueError: slots that are cut otherwise in q than in
      the cache; from shard_map, a dim that its mesh axes do not divide.
    """
    if layout.batch and len(q_BLHD) != len(k_BKSD):
        raise ValueError(
            f"q_BLHD: got {len(q_BLHD)} rows, expected the {len(k_BKSD)} of the cache, "
            f"as layout cuts both over {layout.batch}"
        )
    cache = P(layout.batch, layout.kv_heads)
    arrays_and_specs = {
        "q_BLHD": (q_BLHD, P(layout.batch, None, layout.heads)),
        "k_BKSD": (k_BKSD, cache),
        "v_BKSD": (v_BKSD, cache),
        "lengths_B": (lengths_B, P(layout.batch)),
        "slopes_H": (slopes_H, P(layout.heads)),
        "key_norms_BKJ": (key_norms_BKJ, cache),
    }
    given = {n: pair for n, pair in arrays_and_specs.items() if pair[0] is not None}
    return jax.shard_map(
        lambda arrays: decode_attention(**arrays, **options),
        mesh=mesh,
        in_specs=({name: spec for name, (_, spec) in given.items()},),
        out_specs=P(layout.batch, None, layout.heads),
        check_vma=False,  # a pallas_call does not say over which axes its results vary
    )({name: array for name, (array, _) in given.items()})
