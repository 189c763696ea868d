"""What everything that cuts rows into blocks needs: padding, and sums in float32."""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jax.typing import ArrayLike


def pad_to(
    a: jax.Array, multiple: int, *, axis: int = 1, fill: ArrayLike = 0
) -> jax.Array:
    """``a`` with ``axis`` in whole blocks of ``multiple``; itself where it is."""
    missing = -a.shape[axis] % multiple
    if not missing:
        return a
    widths = [(0, missing if n == axis else 0) for n in range(a.ndim)]
    return jnp.pad(a, widths, constant_values=fill)


def accumulator(a: jax.Array) -> jnp.dtype:
    """float32, or the dtype of ``a`` where that is wider."""
    return jnp.promote_types(a.dtype, jnp.float32)


def einsum(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=accumulator(a))
