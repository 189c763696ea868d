"""One mesh, one table from logical axes to mesh axes, one strict helper.

Flax's helpers drop a constraint in silence when the mesh or rules context is missing, a
logical name is misspelt, or two logical axes land on one mesh axis. Here each raises.
"""

from __future__ import annotations

import contextlib
import contextvars
import dataclasses
import functools
import math
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
from jax.experimental import mesh_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from mpt_jax.config import MeshConfig
from mpt_jax.errors import ConfigError, InternalError

MESH_AXES = ("data", "fsdp", "tensor", "context")

# logical axis -> mesh axes. Parameters and activations have different names because
# FSDP puts the batch and the parameters' embed axis on one mesh axis.
RULES: dict[str, tuple[str, ...]] = {
    # parameters
    "layers": (),
    "embed": ("fsdp", "context"),  # all that have the same parameters, once
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "head_dim": (),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "norm": (),
    # activations
    "batch": ("data", "fsdp"),
    "length": ("context",),
    "kv_length": ("context",),
    "residual_length": ("context", "tensor"),  # between attention and FFN
    "tokens": ("data", "fsdp", "context"),  # batch and length in one dim
    "act_embed": (),
    "act_heads": ("tensor",),
    "act_mlp": ("tensor",),
    "act_vocab": ("tensor",),
}

Axes = tuple[str | None, ...]

_MESH: contextvars.ContextVar[Mesh | None] = contextvars.ContextVar(
    "mesh", default=None
)
_Overrides = Mapping[str, tuple[str, ...]]
_OVERRIDES: contextvars.ContextVar[_Overrides] = contextvars.ContextVar(
    "overrides", default=types.MappingProxyType({})
)


def make_mesh(config: MeshConfig, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The ("data", "fsdp", "tensor", "context") mesh over all ``devices``.

    Devices of several slices, which only a data center network connects, are split over
    data, and over fsdp where data has too few parts; the rest stays inside a slice.

    Raises: ConfigError: the sizes do not use every device exactly once, or tensor or
      context would have to cross slices.
    """
    devices = jax.devices() if devices is None else devices
    sizes = [getattr(config, name) for name in MESH_AXES]
    known = math.prod(s for s in sizes if s > 0)
    sizes = [len(devices) // known if s == -1 else s for s in sizes]
    if math.prod(sizes) != len(devices):
        shape = " x ".join(f"{n}={s}" for n, s in zip(MESH_AXES, sizes, strict=True))
        raise ConfigError([f"mesh: {shape} does not use {len(devices)} devices"])
    # jax >= 0.10 defaults to Explicit axis types; our constraints are for Auto ones.
    kinds = (AxisType.Auto,) * len(MESH_AXES)
    n_slices = len({getattr(d, "slice_index", 0) for d in devices})
    if n_slices == 1:
        return jax.make_mesh(tuple(sizes), MESH_AXES, axis_types=kinds, devices=devices)
    across = _across_slices(sizes, n_slices)
    inside = [size // n for size, n in zip(sizes, across, strict=True)]
    array = mesh_utils.create_hybrid_device_mesh(inside, across, devices)
    return Mesh(array, MESH_AXES, axis_types=kinds)


def _across_slices(sizes: Sequence[int], n_slices: int) -> list[int]:
    """Into how many parts each axis is split between slices."""
    data, fsdp, *_ = sizes
    over_data = math.gcd(data, n_slices)
    over_fsdp = n_slices // over_data
    if fsdp % over_fsdp:
        raise ConfigError(
            [
                f"mesh: data={data} x fsdp={fsdp} does not split over the {n_slices} "
                f"slices of these devices; make mesh.data a multiple of {n_slices}"
            ]
        )
    return [over_data, over_fsdp, 1, 1]


@contextlib.contextmanager
def use(mesh: Mesh, **overrides: tuple[str, ...]) -> Iterator[Mesh]:
    """Makes ``mesh`` the one that spec(), shard() and shards() speak of.

    Args: overrides: rules that differ inside, as batch=() for single requests.
    Raises: InternalError: other mesh axes than ours, or an unknown logical axis.
    """
    if tuple(mesh.axis_names) != MESH_AXES:
        raise InternalError(f"mesh axes must be {MESH_AXES}, got {mesh.axis_names}")
    if unknown := set(overrides) - set(RULES):
        raise InternalError(f"unknown logical axes {unknown}")
    tokens = _MESH.set(mesh), _OVERRIDES.set(overrides)
    try:
        with jax.set_mesh(mesh):
            yield mesh
    finally:
        _MESH.reset(tokens[0])
        _OVERRIDES.reset(tokens[1])


def rule(axis: str) -> tuple[str, ...]:
    """The mesh axes of logical ``axis``; InternalError if there is no such axis."""
    if axis not in RULES:
        raise InternalError(f"unknown logical axis {axis!r}")
    return _OVERRIDES.get().get(axis, RULES[axis])


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
    (None, ('fsdp', 'context'), 'tensor', None)

    Raises: InternalError: an unknown logical axis, or a mesh axis used twice.
    """
    used: set[str] = set()
    entries: list[Any] = []
    for axis in axes:
        names = rule(axis) if axis is not None else ()
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
        parts = math.prod(mesh.shape[n] for n in (rule(axis) if axis else ()))
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


@functools.partial(jax.custom_vjp, nondiff_argnums=(1, 2))
def reshard(x: jax.Array, source: Axes, target: Axes) -> jax.Array:
    """Constrains ``x`` to ``target`` and its gradient to ``source``.

    shard() constrains both alike, so that the matmuls behind a change of sharding would
    get a gradient that is not cut as their inputs are.
    """
    return shard(x, *target)


reshard.defvjp(
    lambda x, source, target: (shard(x, *target), None),
    lambda source, target, _, gradient: (shard(gradient, *source),),
)


def shards(axis: str) -> int:
    """How many parts logical ``axis`` is split into on the current mesh."""
    mesh = current_mesh()
    return math.prod(mesh.shape[n] for n in rule(axis)) if mesh is not None else 1


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
