"""One mesh, one table from logical axes to mesh axes, one strict helper.

Flax's helpers drop a constraint in silence when the mesh or rules context is missing, a
logical name is misspelt, or two logical axes land on one mesh axis. Here each raises.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mpt_jax.config import MeshConfig
from mpt_jax.errors import ConfigError, InternalError

MESH_AXES = ("data", "fsdp", "tensor", "context")

# logical axis -> mesh axes. Parameters and activations have different names because
# FSDP puts the batch and the parameters' embed axis on one mesh axis.
RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "layers": (),
    "embed": ("fsdp",),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "norm": (),
    # activations
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "kv_length": (),
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
}

Axes = tuple[str | None, ...]

_MESH: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar(
    "mesh", default=None
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The ("data", "fsdp", "tensor", "context") mesh over all ``devices``.

    Raises: ConfigError: the sizes do not use every device exactly once.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, name) for name in MESH_AXES]
    known = math.prod(s for s in sizes if s > 0)
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    if math.prod(sizes) != len(devices):
        shape = " x ".join(f"{n}={s}" for n, s in zip(MESH_AXES, sizes, strict=True))
        raise ConfigError([f"mesh: {shape} does not use {len(devices)} devices"])
    # jax >= 0.10 defaults to Explicit axis types; our constraints are for Auto ones.
    return jax.make_mesh(
        tuple(sizes), MESH_AXES, axis_types=(AxisType.Auto,) * 4, devices=devices
    )


@contextlib.contextmanager
def use(mesh: Mesh) -> Iterator[Mesh]:
    """Makes ``mesh`` the one that spec(), shard() and shards() speak of."""
    if tuple(mesh.axis_names) != MESH_AXES:
        raise InternalError(f"mesh axes must be {MESH_AXES}, got {mesh.axis_names}")
    token = _MESH.set(mesh)
    try:
        with jax.set_mesh(mesh):
            yield mesh
    finally:
        _MESH.reset(token)


def current_mesh() -> Mesh | None:
    """The mesh of ``use()``; None outside (one device, nothing to constrain).

    Raises: InternalError: jax.set_mesh is active but use() is not, where every
      constraint would be lost in silence.
    """
    mesh = _MESH.get()
    if mesh is None and not jax.sharding.get_abstract_mesh().empty:
        raise InternalError("a mesh is set without partitioning.use(mesh)")
    return mesh


def spec(axes: Axes) -> PartitionSpec:
    """The PartitionSpec of logical axes.

    >>> tuple(spec(("layers", "embed", "heads", "head_dim")))
    (None, 'fsdp', 'tensor', None)

    Raises: InternalError: an unknown logical axis, or a mesh axis used twice.
    """
    used: set[str] = set()
    entries: list[Any] = []
    for axis in axes:
        if axis is not None and axis not in RULES:
            raise InternalError(f"unknown logical axis {axis!r} in {axes}")
        names = RULES[axis] if axis is not None else ()
        if used & set(names):
            raise InternalError(f"{axes}: mesh axis {used & set(names)} is used twice")
        used |= set(names)
        entries.append(names[0] if len(names) == 1 else names or None)
    return PartitionSpec(*entries)


def sharding(mesh: Mesh, axes: Axes, shape: Sequence[int]) -> NamedSharding:
    """The NamedSharding of an array of ``shape``; InternalError if it cannot divide."""
    if len(axes) != len(shape):
        raise InternalError(f"axes {axes} do not fit shape {tuple(shape)}")
    named = NamedSharding(mesh, spec(axes))
    for axis, size in zip(axes, shape, strict=True):
        parts = math.prod(mesh.shape[n] for n in (RULES[axis] if axis else ()))
        if size % parts:
            raise InternalError(f"{axis} of size {size} does not split in {parts}")
    return named


def shard(x: jax.Array, *axes: str | None) -> jax.Array:
    """Constrains ``x`` to its logical axes under use(mesh); outside, ``x`` itself."""
    mesh = current_mesh()
    if mesh is None:
        spec(axes)  # a typo is an error on one device too
        return x
    return jax.lax.with_sharding_constraint(x, sharding(mesh, axes, x.shape))


def shards(axis: str) -> int:
    """How many parts logical ``axis`` is split into on the current mesh."""
    mesh = current_mesh()
    return math.prod(mesh.shape[n] for n in RULES[axis]) if mesh is not None else 1


@dataclasses.dataclass(frozen=True)
class Placement:
    """Bytes per device of a tree; what --dry_run prints."""

    total_bytes: int
    device_bytes: int


def placement(tree: Any) -> Placement:
    """Total and per-device bytes of ShapeDtypeStructs that carry a sharding."""
    total = device = 0
    for leaf in jax.tree.leaves(tree):
        total += math.prod(leaf.shape) * leaf.dtype.itemsize
        device += math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize
    return Placement(total, device)
