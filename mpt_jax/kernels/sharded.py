"""The attention op on every device's own rows and heads, under jax.shard_map.

XLA cannot cut a Pallas kernel in parts by itself. It need not: rows of the batch, heads
and queries do not depend on each other, so that each device calls the op on its part.
Keys that are cut too go round (``ring.py``).
"""

from __future__ import annotations

from typing import Any, NamedTuple

import jax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P
from jax.typing import ArrayLike

from mpt_jax.kernels.attention import attention
from mpt_jax.kernels.ring import ring_attention

MeshAxes = tuple[str, ...]


class Layout(NamedTuple):
    """The mesh axes over which each dim is cut. kv_length: of keys and values, which
    have whole rows or are cut as the queries are."""

    batch: MeshAxes = ()
    length: MeshAxes = ()
    heads: MeshAxes = ()
    kv_heads: MeshAxes = ()
    kv_length: MeshAxes = ()


def sharded_attention(
    q_BLHD: jax.Array,
    k_BSKD: jax.Array,
    v_BSKD: jax.Array,
    slopes_H: jax.Array | None = None,
    *,
    mesh: Mesh,
    layout: Layout,
    q_segment_ids_BL: jax.Array | None = None,
    kv_segment_ids_BS: jax.Array | None = None,
    prefix_mask_BS: jax.Array | None = None,
    q_offset: ArrayLike = 0,
    kv_offset: ArrayLike = 0,
    **options: Any,
) -> jax.Array | tuple[jax.Array, jax.Array]:
    """kernels.attention.attention of arrays that lie on ``mesh`` as ``layout`` says.

    With whole keys nothing is communicated forward; backward, dk and dv are summed over
    the axes that cut queries or heads but not keys. Each device's queries know where
    they stand. Keys that are cut along their length go round a ring.

    Args: as attention, without dropout, whose mask would depend on the mesh.
    Raises: NotImplementedError: dropout, or a ring of what ring_attention cannot.
      ValueError: keys cut otherwise than queries; from shard_map, a dim that its mesh
      axes do not divide.
    """
    if options.get("dropout_rate"):
        raise NotImplementedError("sharded_attention has no dropout; use attention")
    if layout.kv_length and (
        layout.kv_length != layout.length or len(layout.length) != 1
    ):
        raise ValueError(
            f"layout: keys are cut over {layout.kv_length} and queries over "
            f"{layout.length}, expected the same one axis, or none for keys"
        )
    rows, keys = P(layout.batch, layout.length), P(layout.batch, layout.kv_length)
    arrays_and_specs = {
        "q_BLHD": (q_BLHD, P(*rows, layout.heads)),
        "k_BSKD": (k_BSKD, P(*keys, layout.kv_heads)),
        "v_BSKD": (v_BSKD, P(*keys, layout.kv_heads)),
        "slopes_H": (slopes_H, P(layout.heads)),
        "q_segment_ids_BL": (q_segment_ids_BL, rows),
        "kv_segment_ids_BS": (kv_segment_ids_BS, keys),
        "prefix_mask_BS": (prefix_mask_BS, keys),
        "q_offset": (q_offset, P()),
        "kv_offset": (kv_offset, P()),
    }
    given = {n: pair for n, pair in arrays_and_specs.items() if pair[0] is not None}
    # An offset that is known stays known: self-attention then needs no gather to skip.
    for name in ("q_offset", "kv_offset"):
        if isinstance(given[name][0], int):
            options[name] = given.pop(name)[0]

    [ring] = layout.kv_length or (None,)
    if ring is not None and mesh.shape[ring] == 1:
        ring = None

    def part(arrays: dict[str, Any]) -> jax.Array | tuple[jax.Array, jax.Array]:
        call = options | arrays
        if ring is not None:
            return ring_attention(**call, axis=ring, everyone=mesh.axis_names)
        if layout.length:
            call["q_offset"] += lax.axis_index(layout.length) * call["q_BLHD"].shape[1]
        return attention(**call)

    return jax.shard_map(
        part,
        mesh=mesh,
        in_specs=({n: spec for n, (_, spec) in given.items()},),
        out_specs=P(*rows, layout.heads),
        check_vma=False,  # a pallas_call does not say over which axes its results vary
    )({n: array for n, (array, _) in given.items()})
