"""Matrices for inference in another form than training keeps: int8, exact bfloat16.

A packed matrix stands in a parameter tree where an array stood. It is output-major: its
first dims are those of the result, its last ones are summed over; a table's rows are
its outputs anyway.
"""

from __future__ import annotations

import functools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax


class Int8(NamedTuple):
    """Integers times one float32 scale per output channel: weight-only int8.

    Numerics: rounded to nearest, the largest of a channel to 127. Products in the dtype
    of x, which holds integers up to 127 exactly.
    Source: Dettmers et al. 2022 (arXiv 2208.07339), section 2.1, for weights alone.
    """

    values: jax.Array
    scale: jax.Array  # the output dims

    @classmethod
    def of(cls, w: jax.Array, n_out: int) -> Int8:
        """Rounds the output-major ``w``, whose first ``n_out`` dims are outputs."""
        return cls(*_rounded(w, n_out))

    def matmul(self, x: jax.Array) -> jax.Array:
        """float32 x W over the last dims of x."""
        n_out = self.scale.ndim
        y = _contract(x, self.values.astype(x.dtype), n_out)
        return y * jnp.expand_dims(self.scale, tuple(range(y.ndim - n_out)))

    def rows(self, ids: jax.Array) -> jax.Array:
        """float32 rows of a table; NaN for an id that it has not."""
        values = jnp.take(self.values, ids, axis=0, mode="clip")
        return values * jnp.take(self.scale, ids, axis=0)[..., None]


@functools.partial(jax.jit, static_argnums=1)
def _rounded(w: jax.Array, n_out: int) -> tuple[jax.Array, jax.Array]:
    inputs = tuple(range(n_out, w.ndim))
    wide = w.astype(jnp.float32)
    top = jnp.abs(wide).max(inputs, keepdims=True)
    scale = jnp.where(top > 0, top, 1) / 127
    return jnp.round(wide / scale).astype(jnp.int8), scale.squeeze(inputs)


@jax.tree_util.register_pytree_node_class
class ThreePass:
    """A bfloat16 matrix times float32, exactly as in float32, at bfloat16's speed.

    A float32 is the sum of three bfloat16 numbers (8 + 8 + 8 bits), so three products
    with float32 sums lose nothing that one in float32 keeps. Half the bytes of the
    weights are read, and CPUs with bfloat16 tiles (AMX) multiply 5 times as fast.
    """

    def __init__(self, values: jax.Array, n_out: int):
        self.values, self.n_out = values, n_out

    def tree_flatten(self) -> tuple[tuple[jax.Array], int]:
        return (self.values,), self.n_out

    @classmethod
    def tree_unflatten(cls, n_out: int, children: tuple[jax.Array]) -> ThreePass:
        return cls(*children, n_out)

    def matmul(self, x: jax.Array) -> jax.Array:
        """float32 x W over the last dims of x."""
        rest, parts = x.astype(jnp.float32), []
        for _ in range(3):
            # Not astype(bfloat16): XLA may keep more of a rounding than was asked for.
            part = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
            parts.append(part.astype(jnp.bfloat16))
            rest = rest - part
        high, middle, low = _contract(jnp.stack(parts), self.values, self.n_out)
        return high + (middle + low)

    def rows(self, ids: jax.Array) -> jax.Array:
        """float32 rows of a table; NaN for an id that it has not."""
        return jnp.take(self.values, ids, axis=0).astype(jnp.float32)


Packed = Int8 | ThreePass


def _contract(x: jax.Array, w: jax.Array, n_out: int) -> jax.Array:
    """float32 x w^T: the last dims of x with all but the first ``n_out`` of w."""
    n_in = w.ndim - n_out
    lead, inputs = x.shape[: x.ndim - n_in], math.prod(w.shape[n_out:])
    y = lax.dot_general(
        x.reshape(math.prod(lead), inputs), w.reshape(-1, inputs),
        (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32,
    )  # fmt: skip
    return y.reshape(*lead, *w.shape[:n_out])
