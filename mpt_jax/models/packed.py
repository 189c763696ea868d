"""Matrices for inference in another form than training keeps: int8, exact bfloat16.

A packed matrix stands in a parameter tree where an array stood. It is output-major: its
first dims are those of the result, its last ones are summed over; a table's rows are
its outputs anyway.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.scipy.linalg import block_diag

# Up to so many the matrix is better the first factor, beyond that the second.
_FEW_ROWS = 48
_LONG_ROW = 1536
_TILE_COLUMNS = 32  # that a product costs the same for


class Int8(NamedTuple):
    """Integers times one float32 scale per output channel: weight-only int8.

    Numerics: rounded to nearest, the largest of a channel to 127. Products in the dtype
    of x, which holds integers up to 127 exactly.
    Source: Dettmers et al. 2022 (arXiv 2208.07339), section 2.1, for weights alone.
    """

    values: jax.Array
    scale: jax.Array  # the output dims

    @classmethod
    @functools.partial(jax.jit, static_argnums=(0, 2))
    def of(cls, w: jax.Array, n_out: int) -> Int8:
        """Rounds the output-major ``w``, whose first ``n_out`` dims are outputs."""
        inputs = tuple(range(n_out, w.ndim))
        wide = w.astype(jnp.float32)
        top = jnp.abs(wide).max(inputs, keepdims=True)
        scale = jnp.where(top > 0, top, 1) / 127
        return cls(jnp.round(wide / scale).astype(jnp.int8), scale.squeeze(inputs))

    def matmul(self, x: jax.Array) -> jax.Array:
        """float32 x W over the last dims of x."""
        inputs = self.values.shape[self.scale.ndim :]
        w_OI = self.values.reshape(-1, math.prod(inputs)).astype(x.dtype)
        y_TO = _product(x.reshape(-1, w_OI.shape[1]), w_OI) * self.scale.reshape(1, -1)
        return y_TO.reshape(*x.shape[: x.ndim - len(inputs)], *self.scale.shape)

    def rows(self, ids: jax.Array) -> jax.Array:
        """float32 rows of a table; NaN for an id that it has not."""
        values = jnp.take(self.values, ids, axis=0, mode="clip")
        return values * jnp.take(self.scale, ids, axis=0)[..., None]


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["parts"], meta_fields=["n_out"]
)
@dataclasses.dataclass(frozen=True)
class ThreePass:
    """A bfloat16 matrix times float32, exactly as in float32, at bfloat16's speed.

    A float32 is the sum of three bfloat16 numbers (8 + 8 + 8 bits), so three products
    with float32 sums lose nothing that one in float32 keeps. Half the bytes of the
    weights are read, and CPUs with bfloat16 tiles (AMX) multiply 5 times as fast.

    parts: output-major, one after the other along the first dim. n_out: how many of
    the dims are outputs.
    """

    parts: tuple[jax.Array, ...]
    n_out: int

    @classmethod
    def of(cls, w: jax.Array, n_out: int) -> ThreePass:
        """The output-major ``w`` in halves: two threads that multiply one each wait
        less for each other than two that share a product (decoding of 125M: 8 %)."""
        return cls(tuple(jnp.array_split(w, 2)), n_out)

    def matmul(self, x: jax.Array) -> jax.Array:
        """float32 x W over the last dims of x."""
        shape = self.parts[0].shape
        outputs, inputs = shape[1 : self.n_out], shape[self.n_out :]
        lead = x.shape[: x.ndim - len(inputs)]
        # Behind a barrier, or what makes x is computed three times.
        rest, thirds = lax.optimization_barrier(x.astype(jnp.float32)), []
        for _ in range(3):
            # Not astype(bfloat16): XLA may keep more of a rounding than was asked for.
            third = lax.reduce_precision(rest, exponent_bits=8, mantissa_bits=7)
            thirds.append(third.astype(jnp.bfloat16))
            rest = rest - third
        x_TI = jnp.stack(thirds).reshape(-1, math.prod(inputs))
        parts = [w.reshape(-1, x_TI.shape[1]) for w in self.parts]
        if len(x_TI) > _FEW_ROWS:
            y_TO = _joined([_product(x_TI, w_OI) for w_OI in parts], axis=1)
        else:
            # XLA's CPU back end reads w as it lies only as the first factor: 30 GB/s
            # instead of 15. Behind barriers, or it turns product and sum round.
            products = [_narrow_product(w_OI, x_TI) for w_OI in parts]
            y_OT = _joined(lax.optimization_barrier(products), axis=0)
            y_TO = lax.optimization_barrier(y_OT).T
        return y_TO.reshape(*lead, -1, *outputs)

    def rows(self, ids: jax.Array) -> jax.Array:
        """float32 rows of a table, which is one part; NaN for an id that it has not."""
        (table,) = self.parts
        return jnp.take(table, ids, axis=0).astype(jnp.float32)


def _narrow_product(w_OI: jax.Array, x_TI: jax.Array) -> jax.Array:
    """w x^T of a few rows of x, with long rows of w, which a CPU fetches in advance:
    short ones are taken in pairs, times x and zeros, and zeros and x (125M: 6 %)."""
    (n_rows, n_inputs), n_columns = w_OI.shape, len(x_TI)
    if n_inputs >= _LONG_ROW or n_rows % 2 or 2 * n_columns > _TILE_COLUMNS:
        return _product(w_OI, x_TI)
    pairs = _product(w_OI.reshape(-1, 2 * n_inputs), block_diag(x_TI, x_TI))
    return pairs.reshape(n_rows, n_columns)


def _joined(products: list[jax.Array], axis: int) -> jax.Array:
    """Along ``axis`` the parts, of which each is the sum of thirds along the other."""
    sums = []
    for product in products:
        high, middle, low = jnp.split(product, 3, axis=1 - axis)
        sums.append(high + (middle + low))
    return jnp.concatenate(sums, axis)


@functools.partial(
    jax.tree_util.register_dataclass, data_fields=["matrix"], meta_fields=["outputs"]
)
@dataclasses.dataclass(frozen=True)
class Joint:
    """Several matrices of the same x as one; outputs: the dims of each one's."""

    matrix: ThreePass
    outputs: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, *ws: jax.Array, n_out: int) -> Joint:
        """Output-major matrices, whose first ``n_out`` dims are outputs."""
        flat = [w.reshape(math.prod(w.shape[:n_out]), *w.shape[n_out:]) for w in ws]
        outputs = tuple(w.shape[:n_out] for w in ws)
        return cls(ThreePass.of(jnp.concatenate(flat), 1), outputs)

    def matmul(self, x: jax.Array) -> list[jax.Array]:
        """float32 x W of each."""
        y = self.matrix.matmul(x)
        ends = list(itertools.accumulate(map(math.prod, self.outputs)))
        each = zip(jnp.split(y, ends[:-1], axis=-1), self.outputs, strict=True)
        return [part.reshape(*y.shape[:-1], *outputs) for part, outputs in each]


Packed = Int8 | ThreePass


def _product(a: jax.Array, b: jax.Array) -> jax.Array:
    """float32 a b^T of two matrices."""
    over = ((1,), (1,)), ((), ())
    return lax.dot_general(a, b, over, preferred_element_type=jnp.float32)
