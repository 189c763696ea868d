"""Optimizers: update rules, decay masks, learning-rate schedules, gradient clipping.

Every rule here is one line,

    p <- p - lr * (direction + c * p)

on the parameters before the step. The direction is Adam's, Lion's or Adafactor's; the
decay coefficient c is ``weight_decay`` for adamw and adafactor, and
``weight_decay / peak_lr`` for decoupled_adamw and decoupled_lionw, which is MosaicML's
``p *= 1 - (lr / peak_lr) * weight_decay``. A MosaicML weight_decay of 1e-5 at a peak of
1e-4 is therefore an optax weight_decay of 0.1.

Source: composer@6405188:composer/optim/decoupled_weight_decay.py:DecoupledAdamW and
scheduler.py; llm-foundry@8c8dd48:llmfoundry/optim/lion.py:DecoupledLionW and
scheduler.py:InverseSquareRootWithWarmupScheduler; Chen et al. 2023 (arXiv 2302.06675);
Shazeer and Stern 2018 (arXiv 1804.04235).
"""

from __future__ import annotations

import re
from typing import Any

import jax
import jax.numpy as jnp
import optax

from mpt_jax.config import OptimConfig
from mpt_jax.errors import ConfigError, InternalError

PyTree = Any

# Fields without a meaning for an optimizer: setting one is refused, not ignored.
UNUSED_FIELDS = {"decoupled_lionw": ("eps",), "adafactor": ("betas", "eps")}


def learning_rate(
    config: OptimConfig, *, total_steps: int, warmup_steps: int
) -> optax.Schedule:
    """The schedule: number of updates already applied -> learning rate.

    Linear from 0 over ``warmup_steps``, so update 0 has a rate of 0, as in Composer.
    Then, with tau = (t - warmup) / (total - warmup) clipped to [0, 1], the peak times
      cosine: alpha_f + (1 - alpha_f) * (1 + cos(pi * tau)) / 2
      linear: 1 + (alpha_f - 1) * tau
      inverse_sqrt: 1 / sqrt((t - warmup + s) / s) with s = max(warmup, 1). This is LLM
        Foundry's with t_scale = t_warmup, t_cooldown = 0 and alpha_f_decay = 0: after a
        warmup, sqrt(warmup / t). It does not depend on the total.
      constant: 1
    A run that ends within its warmup never decays.

    >>> schedule = learning_rate(OptimConfig(lr=1.0), total_steps=100, warmup_steps=10)
    >>> [round(float(schedule(step)), 3) for step in (0, 5, 10, 55, 100)]
    [0.0, 0.5, 1.0, 0.55, 0.1]

    Numerics: float32, within 2e-7 of the peak; steps are exact below 2**24.
    """
    if total_steps < 1 or warmup_steps < 0:
        raise ValueError(
            f"total_steps={total_steps}, warmup_steps={warmup_steps}: expected "
            "total_steps > 0 and warmup_steps >= 0"
        )
    name, alpha_f = config.schedule.name, config.schedule.alpha_f

    def decay(t: jax.Array) -> jax.Array | float:
        elapsed = jnp.maximum(t - warmup_steps, 0)
        if name == "constant":
            return 1.0
        if name == "inverse_sqrt":
            scale = max(warmup_steps, 1)
            return jnp.sqrt(scale / (elapsed + scale))
        if total_steps <= warmup_steps:
            return 1.0
        tau = jnp.minimum(elapsed / (total_steps - warmup_steps), 1)
        if name == "linear":
            return 1 + (alpha_f - 1) * tau
        return alpha_f + (1 - alpha_f) * (1 + jnp.cos(jnp.pi * tau)) / 2

    def schedule(step: jax.typing.ArrayLike) -> jax.Array:
        t = jnp.asarray(step, jnp.result_type(float))
        return config.lr * jnp.where(
            t < warmup_steps, t / max(warmup_steps, 1), decay(t)
        )

    return schedule


def _dotted(path: tuple[Any, ...]) -> str:
    """The names of the dict keys along ``path``: "blocks.attn.Wq.weight"."""
    keys = (entry for entry in path if isinstance(entry, jax.tree_util.DictKey))
    return ".".join(str(entry.key) for entry in keys)


def decay_mask(pairs: tuple[tuple[str, bool], ...], params: PyTree) -> PyTree:
    """Which parameters decay, by the first regex that matches their whole dotted path.

    >>> params = {"ffn": {"weight": 0.0, "bias": 0.0}}
    >>> decay_mask(((r".*\\.bias", False), (".*", True)), params)
    {'ffn': {'bias': False, 'weight': True}}

    Args:
      pairs: (regex, decays). Together they must cover every parameter, and each (except
        a closing ".*") must decide at least one: a pattern without effect is a typo.
      params: nested dict; the leaves are not looked at.
    Returns: the tree of ``params`` with a bool at each leaf.
    Raises:
      ConfigError: naming the uncovered paths and the patterns without effect.
    """
    leaves, structure = jax.tree_util.tree_flatten_with_path(params)
    paths = [_dotted(path) for path, _ in leaves]
    try:
        regexes = [re.compile(pattern) for pattern, _ in pairs]
    except re.error as error:
        problem = f"optim.decay_mask: {error.pattern!r} is no regex: {error}"
        raise ConfigError([problem]) from error
    matches = [[bool(r.fullmatch(path)) for r in regexes] for path in paths]
    deciders = [row.index(True) if any(row) else None for row in matches]

    problems = []
    uncovered = [p for p, i in zip(paths, deciders, strict=True) if i is None]
    if uncovered:
        problems.append(
            f"optim.decay_mask: no pattern covers {', '.join(uncovered)}; close with "
            "('.*', True) or ('.*', False)"
        )
    for i, (pattern, _) in enumerate(pairs):
        if pattern == ".*" or i in deciders:
            continue
        reason = "matches no parameter (the whole dotted path must match)"
        if any(row[i] for row in matches):
            reason = "decides nothing: earlier patterns match first"
        problems.append(f"optim.decay_mask: {pattern!r} {reason}")
    if problems:
        raise ConfigError(problems)
    return structure.unflatten([pairs[i][1] for i in deciders])


def _wide(tree: PyTree) -> PyTree:
    """Leaves in float32, or in their own dtype where that is wider."""
    return jax.tree.map(
        lambda x: x.astype(jnp.promote_types(x.dtype, jnp.float32)), tree
    )


def _direction(config: OptimConfig) -> optax.GradientTransformation:
    if config.name == "adafactor":
        # optax's default, with its lr and decay left to the common tail: its own
        # weight_decay_rate is not multiplied by lr. It ends in a descent sign; undo it.
        return optax.chain(optax.adafactor(), optax.scale(-1.0))
    b1, b2 = config.betas
    if config.name == "decoupled_lionw":
        return optax.scale_by_lion(b1, b2)
    return optax.scale_by_adam(b1, b2, config.eps)


def make_optimizer(
    config: OptimConfig, params_like: PyTree, *, total_steps: int, warmup_steps: int
) -> optax.GradientTransformation:
    """The optimizer of ``config``, without clipping (see clip_by_global_norm).

    ``update(grads, state, params)`` needs the parameters. An update's learning rate is
    ``learning_rate(...)`` at the number of updates applied before it, which the state
    counts: a skipped update (state kept as it was) does not advance the schedule.

    adafactor's lr is relative: a step is lr times the RMS of the parameter (at least
    1e-3), taken over a whole leaf, so over all layers of a stacked one. It factors only
    over two dims of at least 128: narrower heads keep full moments of Wq to out_proj.

    Args:
      params_like: nested dict of arrays or ShapeDtypeStructs; only its paths matter.
    Raises:
      ConfigError: decay_mask does not fit the parameters, or a field that the optimizer
        has no use for is not at its default.
    Numerics: moments and updates are float32 for bfloat16 parameters and gradients too;
      optax.apply_updates then rounds once. Adam matches MosaicML's
      sqrt(v) / sqrt(1 - b2^t) + eps.
    """
    problems = [
        f"optim.{field}: {config.name} has no use for it; leave it at its default"
        for field in UNUSED_FIELDS.get(config.name, ())
        if getattr(config, field) != getattr(OptimConfig(), field)
    ]
    decay, decoupled = config.weight_decay, config.name.startswith("decoupled_")
    if decoupled and decay:
        if config.lr > 0:
            decay /= config.lr
        else:
            problems.append("optim.lr: must be > 0, weight_decay is relative to it")
    if problems:
        raise ConfigError(problems)
    inner = optax.chain(
        _direction(config),
        optax.add_decayed_weights(decay, decay_mask(config.decay_mask, params_like)),
        optax.scale_by_learning_rate(
            learning_rate(config, total_steps=total_steps, warmup_steps=warmup_steps)
        ),
    )

    def init(params: PyTree) -> PyTree:
        return inner.init(_wide(params))

    def update(
        grads: PyTree, state: PyTree, params: PyTree = None
    ) -> tuple[PyTree, PyTree]:
        return inner.update(_wide(grads), state, _wide(params))

    return optax.GradientTransformation(init, update)


def clip_by_global_norm(
    grads: PyTree, max_norm: float | None, *, divisor: jax.typing.ArrayLike = 1
) -> tuple[PyTree, jax.Array]:
    """``grads / divisor`` scaled to a global L2 norm of at most ``max_norm``, and the
    norm before: sums become clipped means in one pass.

    Scales by min(1, max_norm / (norm + 1e-6)), which is torch.nn.utils.clip_grad_norm_
    and so MosaicML's gradient_clipping. None only measures.

    Returns: (clipped, norm), in float32 for bfloat16 gradients too. Where the norm is
      not finite (NaN or inf as the worst gradient is, or a true norm over 3e38), the
      clipped gradients are NaN or 0 and must not be applied.
    Numerics: squares are taken relative to the largest entry. Otherwise entries over
      2e19 would overflow the norm to infinity, and clipping would silently turn a
      finite gradient into a zero update.
    """
    grads = _wide(grads)
    wide = jax.tree.leaves(grads)
    largest = jnp.max(jnp.stack([jnp.max(jnp.abs(g)) for g in wide]))
    # Zero, subnormal and non-finite maxima do not divide; 1 hands inf and NaN through.
    usable = (largest >= jnp.finfo(largest.dtype).tiny) & jnp.isfinite(largest)
    unit = jnp.where(usable, largest, 1)
    norm = unit / divisor * jnp.sqrt(sum(jnp.sum(jnp.square(g / unit)) for g in wide))
    scale = 1 if max_norm is None else jnp.minimum(1, max_norm / (norm + 1e-6))
    scale = scale / divisor
    return jax.tree.map(lambda g: g * scale, grads), norm


def state_axes(opt_state_abstract: PyTree, param_axes: PyTree) -> PyTree:
    """Logical axes of every leaf of an optimizer state, for sharding it.

    Moments take the axes of their parameter. Counters, adafactor's row and column
    statistics (a parameter's rank less one) and its (1,) placeholders are replicated.

    Args:
      opt_state_abstract: ``jax.eval_shape(make_optimizer(...).init, params)``.
      param_axes: nested dict like the parameters with a tuple of names at each leaf.
    Returns: the tree of the state with a tuple at each leaf. Map over it together with
      the state, which comes first: jax.tree.map(f, opt_state_abstract, axes).
    Raises:
      InternalError: a leaf that belongs to no parameter, or has a rank that is none of
        the above.
    """
    flat = jax.tree_util.tree_leaves_with_path(
        param_axes, is_leaf=lambda node: isinstance(node, tuple)
    )
    by_path = {_dotted(path): axes for path, axes in flat}

    def place(path: tuple[Any, ...], leaf: jax.ShapeDtypeStruct) -> tuple:
        axes, rank = by_path.get(_dotted(path)), len(leaf.shape)
        if rank == 0:
            return ()
        if axes is not None and rank == len(axes) and leaf.shape != (1,):
            return axes
        if axes is not None and (rank == len(axes) - 1 or leaf.shape == (1,)):
            return (None,) * rank
        raise InternalError(
            f"optimizer state{jax.tree_util.keystr(path)} of shape {leaf.shape} has no "
            f"place: its parameter has the axes {axes}"
        )

    return jax.tree_util.tree_map_with_path(place, opt_state_abstract)
