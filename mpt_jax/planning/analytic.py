"""The figures of a training step by formula: for GPUs, and to search before compiling.

Memory follows what XLA keeps at the worst moment of the step, traffic and collectives
what the sharding asks for. Tests hold both against what the compiler found: the peak
within 10% (most within 5%), the bytes sent within 20%.

Dims: B rows and L tokens of a row on one device in one microbatch; t, f, d the sizes of
the mesh axes tensor, fsdp and data; E, V, F, H, D as elsewhere.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping
from typing import Any

import jax

from mpt_jax import optim, partitioning
from mpt_jax.config import MeshConfig, ModelConfig, OptimConfig, TrainConfig
from mpt_jax.models import mpt
from mpt_jax.planning.collectives import Collective
from mpt_jax.planning.figures import Figures, Memory
from mpt_jax.training.metrics import flops_per_token

FLOAT32, BFLOAT16 = 4, 2


def mesh_sizes(mesh: MeshConfig, n_devices: int) -> dict[str, int]:
    """Every axis with its size, -1 filled in; the product is ``n_devices``."""
    sizes = {name: getattr(mesh, name) for name in partitioning.MESH_AXES}
    known = math.prod(s for s in sizes.values() if s > 0)
    return {k: n_devices // known if s == -1 else s for k, s in sizes.items()}


@dataclasses.dataclass(frozen=True)
class _Shape:
    """One device's share of a step."""

    model: ModelConfig
    mesh: Mapping[str, int]
    rows: int  # of a microbatch
    length: int
    full_length: int
    parts: int
    chunk: int
    lanes: int

    @property
    def tokens(self) -> int:
        return self.rows * self.length

    @property
    def item(self) -> int:
        return FLOAT32 if self.model.compute_dtype == "float32" else BFLOAT16

    @property
    def table(self) -> int:
        """Elements of the embedding on one device once its embed axis is gathered."""
        return self.model.vocab_size * self.model.d_model // self.mesh["tensor"]

    @property
    def layer(self) -> int:
        """Elements of a gathered layer on one device."""
        specs = jax.tree.leaves(mpt.param_specs(self.model)["blocks"])
        whole = sum(math.prod(s.shape[1:]) for s in specs if len(s.shape) > 2)
        return whole // self.mesh["tensor"]


def train_step(config: TrainConfig, n_devices: int, *, lanes: int = 1) -> Figures:
    """The figures of one step of ``config``, whose mesh must fit ``n_devices``.

    Args: lanes: what memory rounds a head's dims up to.
    """
    mesh = mesh_sizes(config.mesh, n_devices)
    rows = config.global_batch_size // config.microbatches
    shape = _Shape(
        config.model,
        mesh,
        rows=max(rows // (mesh["data"] * mesh["fsdp"]), 1),
        length=config.seq_len // mesh["context"],
        full_length=config.seq_len,
        parts=config.microbatches,
        chunk=config.loss.chunk_tokens,
        lanes=lanes,
    )
    flops = flops_per_token(
        config.model, config.seq_len, mpt.count_params(config.model)
    )
    tokens, memory = config.tokens_per_step, _memory(config, shape)
    return Figures(
        source="analytic",
        mesh=mesh,
        tokens=tokens,
        memory=memory,
        model_flops=tokens * flops.full,
        causal_flops=tokens * flops.causal,
        executed_flops=tokens * _executed(config.model, config.seq_len),
        hbm_bytes=_traffic(config, shape),
        collectives=_collectives(shape),
        host_bytes=2 * memory.host * config.microbatches,
    )


# ------------------------------------------------------------------------------ memory


def state_bytes(config: TrainConfig, mesh: Mapping[str, int]) -> tuple[int, int]:
    """(parameters, optimizer) of one device, exactly."""

    def total(leaves: tuple[tuple[int, tuple[str, ...]], ...]) -> int:
        return sum(size // math.prod(mesh[n] for n in names) for size, names in leaves)

    params, state = _state(config.model, config.optim)
    return total(params), total(state)


@functools.cache
def _state(model: ModelConfig, optimizer: OptimConfig) -> tuple[Any, Any]:
    """(bytes, mesh axes) of each leaf of the parameters and of the optimizer state."""
    params, axes = mpt.abstract_params(model), mpt.param_axes(model)
    # The schedule's lengths are in no shape.
    init = optim.make_optimizer(optimizer, params, total_steps=1, warmup_steps=0).init
    state = jax.eval_shape(init, params)

    def leaves(tree: Any, axes: Any) -> tuple[Any, ...]:
        found: list[Any] = []

        def note(x: jax.ShapeDtypeStruct, axes: partitioning.Axes) -> None:
            names = tuple(n for a in axes if a for n in partitioning.rule(a))
            found.append((math.prod(x.shape) * x.dtype.itemsize, names))

        jax.tree.map(note, tree, axes)
        return tuple(found)

    return leaves(params, axes), leaves(state, optim.state_axes(state, axes))


def _memory(config: TrainConfig, s: _Shape) -> Memory:
    """The worst of three moments: a chunk's logits, the head's gradient meeting over
    the mesh, and the backward of the last layer's FFN."""
    m, t = s.model, s.mesh["tensor"]
    parameters, optimizer = state_bytes(config, s.mesh)
    batch = 3 * 4 * s.rows * s.parts * s.length
    count = parameters // jax.numpy.dtype(m.param_dtype).itemsize
    stream = s.tokens * m.d_model * s.item  # one activation of the residual stream
    saved, host = _saved(s), 0
    residuals = m.n_layers * saved
    if m.remat == "offload":  # but those of a layer on its way, and of the next
        residuals, host = 2 * saved, residuals
    always = FLOAT32 * s.table  # the head's own gradient
    always += FLOAT32 * count if s.parts > 1 else 0  # the sum over microbatches
    cast = count * s.item if s.item < FLOAT32 else 0  # once, for all layers
    chunk = min(s.chunk, s.tokens) * m.vocab_size // t
    table = s.table * s.item
    logits = cast + residuals + table + chunk * (FLOAT32 + s.item) + 2 * stream
    meeting = table + FLOAT32 * s.table + FLOAT32 * count  # when all layers are done
    ffn = s.item * s.tokens * m.d_mlp / t
    weight = m.d_model * m.d_mlp // t
    # up, its activation and both gradients, where they are not among the saved.
    at_once = {"none": 1.5, "dots": 2.5}.get(m.remat, 4.0)
    # In a small ring that is all there is, libtpu multiplies while it gathers: it never
    # holds a whole matrix, but sums up both ways round.
    ring = math.prod(s.mesh[a] for a in partitioning.rule("embed"))
    if 1 < ring == math.prod(s.mesh.values()) <= 16:
        weight, at_once = 0, at_once + 2
    backward = cast + residuals + FLOAT32 * count + at_once * ffn + 1.5 * stream
    backward += weight * (FLOAT32 + s.item)
    worst = int(always + max(logits, meeting, backward))
    peak = parameters + optimizer + batch + worst
    return Memory(parameters, optimizer, batch, peak, host=host)


def _saved(s: _Shape) -> int:
    """Bytes that the forward keeps of one layer for the backward, wherever."""
    m, t = s.model, s.mesh["tensor"]
    d_head = math.ceil(m.d_head / s.lanes) * s.lanes
    heads, kv_heads = m.n_heads * d_head / t, m.n_kv_heads * d_head / t
    stream = m.d_model / t  # between attention and FFN each has its part of the tokens
    glu = m.ffn_config.ffn_type == "mptglu"
    mlp = m.d_mlp / t
    kept = {
        "full": stream,
        "attention": stream + heads,
        "offload": stream + heads,
        "dots": 2 * stream + 2 * heads + 2 * kv_heads + (3 if glu else 1) * mlp,
        # Of norms what goes in and out; of activations what goes in.
        "none": 4 * stream + 2 * heads + 2 * kv_heads + (2 if glu else 1) * mlp,
    }[m.remat] * s.item
    if m.remat != "full":
        kept += FLOAT32 * m.n_heads / t  # log-sum-exp
    return int(s.tokens * kept)


# ------------------------------------------------------------------- FLOPs and traffic


def _executed(m: ModelConfig, length: int) -> float:
    """FLOPs of a token with recomputation; causal attention, forward 2 products and
    backward 5."""
    specs = jax.tree.leaves(mpt.param_specs(m)["blocks"])
    weights = sum(math.prod(s.shape) for s in specs if len(s.shape) > 2)
    again = m.remat in ("attention", "offload", "full")
    # The last product of a layer is not needed by its backward.
    last = m.d_mlp * m.d_model / (weights / m.n_layers)
    blocks = 2 * weights * (3 + again * (1 - last))
    products = 7 + (2 if m.remat == "full" else 0)
    attention = products * m.n_layers * m.n_heads * m.d_head * length
    return blocks + 6 * m.vocab_size * m.d_model + attention


def _traffic(config: TrainConfig, s: _Shape) -> int:
    """Bytes to and from HBM: the update, gathered weights, activations, the loss."""
    m, t = s.model, s.mesh["tensor"]
    parameters, optimizer = state_bytes(config, s.mesh)
    update = 2 * (parameters + optimizer) + 4 * parameters
    passes = 2 if m.remat == "none" else 3
    weights = s.parts * m.n_layers * s.layer * (2 * passes * s.item + 2 * FLOAT32)
    wide = (4 * m.n_heads * m.d_head + 6 * m.d_mlp) / t + 16 * m.d_model
    again = 1 if m.remat == "none" else 1.4
    activations = s.parts * m.n_layers * s.tokens * s.item * wide * 2 * again
    chunks = math.ceil(s.tokens / s.chunk)
    logits = s.parts * chunks * (2 * FLOAT32 + 3 * s.item) * s.table
    return int(update + weights + activations + logits)


def _collectives(s: _Shape) -> tuple[Collective, ...]:
    """What the sharding of parameters, batch, heads and sequence asks for."""
    m, mesh, n = s.model, s.mesh, s.model.n_layers
    found: list[Collective] = []

    def add(kind: str, axes: tuple[str, ...], count: int, each: float) -> None:
        """``each``: bytes of a whole operand; a ring hands on (size - 1) / size."""
        axes = tuple(a for a in axes if mesh[a] > 1)
        size = math.prod(mesh[a] for a in axes)
        if size > 1 and count:
            received = count * s.parts * each * (size - 1) / size
            received *= 2 if kind == "all-reduce" else 1
            waits = kind == "all-reduce" or axes == ("tensor",)
            calls = count * s.parts
            found.append(Collective(kind, axes, not waits, count, calls, int(received)))

    weights = partitioning.rule("embed")
    passes = 2 if m.remat == "none" else 3  # backward and recomputation gather each
    add("all-gather", weights, passes * n, s.layer * s.item)
    add("all-gather", weights, 1, s.table * s.item)
    add("reduce-scatter", weights, n, s.layer * FLOAT32)
    add("all-reduce", ("data", *weights), 1, s.table * (FLOAT32 + s.item))
    own = n * s.layer / math.prod(mesh[a] for a in weights)
    add("all-reduce", ("data",), 1, own * FLOAT32)
    stream = s.tokens * m.d_model * s.item
    # Of each layer's tokens, that they be whole in attention and FFN and cut between:
    # forward two of each, backward two, and what is computed again.
    twice = m.remat != "none"
    add("all-gather", ("tensor",), (4 + 2 * twice) * n + 2, stream)
    add("reduce-scatter", ("tensor",), (4 + twice) * n + 1, stream)
    add("all-reduce", ("tensor",), 1, stream)
    # Keys and values once around; backward also their gradients, in float32.
    kv = 2 * s.tokens * m.n_kv_heads * m.d_head / mesh["tensor"] * mesh["context"]
    again = 2 if m.remat == "full" else 1
    rounds = (again + 1) * s.item + FLOAT32
    add("collective-permute", ("context",), n, kv * rounds)
    return tuple(found)
