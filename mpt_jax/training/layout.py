"""How a state lies in memory while it trains: not always as a checkpoint holds it.

mpt.init and checkpoints know one form, on any mesh: a parameter of all layers is one
array, heads stand in their own order, and the optimizer's moments are like the
parameters. In memory heads may be dealt to devices (models/heads.py), and layers that
are not scanned lie apart: what has to be cut out of a stacked array is read and written
once more by every step, and its gradient, too.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from mpt_jax.models import heads, mpt
from mpt_jax.partitioning import Axes


class Layout(NamedTuple):
    """head_order: None is the heads' own. apart: a leaf of n layers is n arrays.

    ``axes`` are logical axes of the stored form.
    """

    head_order: heads.Order | None
    apart: bool

    def arrange(self, tree: Any, axes: Any) -> Any:
        """``tree`` from the stored form to that in memory; inside a jit."""
        tree = heads.arrange(tree, axes, self.head_order)
        return _map(lambda axes, a: mpt.apart(a) if self._cuts(axes) else a, axes, tree)

    def struct(self, stored: Any, axes: Any) -> Any:
        """arrange() of ShapeDtypeStructs with shardings."""

        def one(axes: Axes, leaf: jax.ShapeDtypeStruct) -> Any:
            if not self._cuts(axes):
                return leaf
            n, *shape = leaf.shape
            where = self._in_memory(axes, leaf.sharding)
            return (jax.ShapeDtypeStruct(shape, leaf.dtype, sharding=where),) * n

        return _map(one, axes, stored)

    def to_memory(self, tree: Any, axes: Any) -> Any:
        """arrange() of arrays on a mesh, which are given up leaf by leaf: beside them,
        one leaf is in memory. Gathers a leaf over the axis that cuts its heads."""

        def one(axes: Axes, leaf: jax.Array) -> Any:
            if not self._moves(axes):
                return leaf
            move = _forth(self, axes, self._in_memory(axes, leaf.sharding))
            moved = jax.block_until_ready(move(leaf))
            leaf.delete()
            return moved

        return _map(one, axes, tree)

    def to_stored(self, tree: Any, axes: Any, *, on_host: bool = False) -> Any:
        """The way back; ``tree`` stays. What does not move stays itself.

        Args: on_host: moves into host memory, to spare the devices.
        """

        def one(axes: Axes, leaf: Any) -> jax.Array:
            if not self._moves(axes):
                return leaf
            if self._cuts(axes):
                layer = leaf[0].sharding
                where = NamedSharding(layer.mesh, PartitionSpec(None, *layer.spec))
            else:
                where = leaf.sharding
            if on_host:
                where = where.with_memory_kind("pinned_host")
            return jax.block_until_ready(_back(self, axes, where)(leaf))

        return _map(one, axes, tree)

    def _cuts(self, axes: Axes) -> bool:
        return self.apart and "layers" in axes

    def _moves(self, axes: Axes) -> bool:
        deals = self.head_order is not None and set(axes) & set(heads.Order._fields)
        return self._cuts(axes) or bool(deals)

    def _in_memory(self, axes: Axes, where: NamedSharding) -> NamedSharding:
        if not self._cuts(axes):
            return where
        return NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))


@functools.cache
def _forth(layout: Layout, axes: Axes, where: NamedSharding) -> Callable[..., Any]:
    return jax.jit(lambda leaf: layout.arrange(leaf, axes), out_shardings=where)


@functools.cache
def _back(layout: Layout, axes: Axes, where: NamedSharding) -> Callable[..., jax.Array]:
    def move(leaf: Any) -> jax.Array:
        leaf = jnp.stack(leaf) if isinstance(leaf, tuple) else leaf
        order = layout.head_order
        return heads.arrange(leaf, axes, order and order.inverse)

    return jax.jit(move, out_shardings=where)


def _map(f: Callable[..., Any], axes: Any, tree: Any) -> Any:
    """f(axes, leaf) in the place of each leaf, which in memory may be a tuple."""

    def is_axes(node: Any) -> bool:
        names = isinstance(node, tuple) and not hasattr(node, "_fields")
        return names and all(a is None or isinstance(a, str) for a in node)

    return jax.tree.map(f, axes, tree, is_leaf=is_axes)
