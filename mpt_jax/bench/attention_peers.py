"""Who takes part in bench/attention: ours, and what else computes ALiBi attention.

A contender turns a Problem into two functions without arguments, forward and forward
with backward, that start the work and return its arrays, and says how to wait for it.
It imports its package when it is made: an absent one is reported, not fatal.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np

Arrays = tuple[Any, ...]
GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Problem:
    """Causal self-attention: shapes (B, S, H, D) and what the numbers are like."""

    batch: int
    length: int
    heads: int
    head_dim: int
    dtype: str
    slopes_name: str
    slopes: tuple[float, ...]
    logit_std: float

    @property
    def scale(self) -> float:
        return self.head_dim**-0.5

    @property
    def forward_flops(self) -> float:
        """Of the causal half, as FlashAttention counts."""
        squares = self.batch * self.heads * self.length**2
        return 4 * squares * self.head_dim / 2

    @functools.cached_property
    def tensors(self) -> tuple[np.ndarray, ...]:
        """q, k, v, dout in float32; q . k has standard deviation logit_std, scaled."""
        rng = np.random.default_rng(0)
        shape = self.batch, self.length, self.heads, self.head_dim
        q, k, v, dout = (rng.standard_normal(shape, np.float32) for _ in range(4))
        return q * self.logit_std**0.5, k * self.logit_std**0.5, v, dout


class Runner(NamedTuple):
    """forward() -> (out,), backward() -> (out, dq, dk, dv), and how to wait for them.

    memory: (forward, backward) peak GiB beside the inputs.
    """

    forward: Callable[[], Arrays]
    backward: Callable[[], Arrays]
    wait: Callable[[Arrays], Any]
    memory: Callable[[], tuple[float | None, float | None]]


def _jax_runner(problem: Problem, attend: Callable[..., Any], bias: Any) -> Runner:
    """attend(q, k, v, bias); bias is a constant of the work, but not of the program."""
    import jax
    import jax.numpy as jnp

    q, k, v, dout = (jnp.asarray(a, problem.dtype) for a in problem.tensors)

    def backward(q, k, v, dout, bias):
        out, pull = jax.vjp(lambda *a: attend(*a, bias), q, k, v)
        return out, *pull(dout)

    run_forward = jax.jit(lambda q, k, v, bias: (attend(q, k, v, bias),))
    run_forward = run_forward.lower(q, k, v, bias).compile()
    run_backward = jax.jit(backward).lower(q, k, v, dout, bias).compile()

    def gib(compiled: Any) -> float | None:
        found = compiled.memory_analysis()
        if found is None:
            return None
        return (found.temp_size_in_bytes + found.output_size_in_bytes) / GIB

    return Runner(
        lambda: run_forward(q, k, v, bias),
        lambda: run_backward(q, k, v, dout, bias),
        jax.block_until_ready,
        lambda: (gib(run_forward), gib(run_backward)),
    )


def ours(problem: Problem, *, implementation: str, skip: Any = "off") -> Runner:
    import jax.numpy as jnp

    from mpt_jax.kernels.attention import attention

    def attend(q, k, v, slopes):
        return attention(
            q,
            k,
            v,
            slopes,
            softmax_scale=problem.scale,
            implementation=implementation,
            skip=skip,
        )

    return _jax_runner(problem, attend, jnp.asarray(problem.slopes, jnp.float32))


def _stored_bias(problem: Problem, dtype: str) -> Any:
    """(1, H, S, S): what those who take no slopes are given."""
    import jax
    import jax.numpy as jnp

    def make(slopes):
        positions = jnp.arange(problem.length, dtype=jnp.float32)
        away = positions[None, :] - positions[:, None]
        return (slopes[:, None, None] * away[None])[None].astype(dtype)

    return jax.jit(make)(jnp.asarray(problem.slopes, jnp.float32))


def jax_nn(problem: Problem, *, implementation: str) -> Runner:
    """jax.nn.dot_product_attention with a stored bias, made once outside the timing."""
    import jax

    def attend(q, k, v, bias):
        return jax.nn.dot_product_attention(
            q,
            k,
            v,
            bias,
            is_causal=True,
            scale=problem.scale,
            implementation=implementation,
        )

    dtype = "float32" if implementation == "xla" else problem.dtype
    return _jax_runner(problem, attend, _stored_bias(problem, dtype))


def tokamax(problem: Problem, *, implementation: str) -> Runner:
    """tokamax takes a bias of one row, (1, H, 1, S): ALiBi by shift invariance."""
    import jax.numpy as jnp
    import tokamax as package

    columns = jnp.arange(problem.length, dtype=jnp.float32) - problem.length
    slopes = jnp.asarray(problem.slopes, jnp.float32)
    row = (slopes[:, None] * columns[None])[None, :, None].astype(problem.dtype)

    def attend(q, k, v, bias):
        return package.dot_product_attention(
            q,
            k,
            v,
            bias=bias,
            is_causal=True,
            scale=problem.scale,
            implementation=implementation,
        )

    return _jax_runner(problem, attend, row)


def _torch_runner(problem: Problem, make: Callable[..., Callable[..., Any]]) -> Runner:
    """make(torch, slopes, q, k) -> attend(q, k, v), heads before length."""
    import torch

    dtype = getattr(torch, problem.dtype)
    q, k, v, dout = (
        torch.from_numpy(a).to("cuda", dtype).transpose(1, 2).contiguous()
        for a in problem.tensors
    )
    slopes = torch.tensor(problem.slopes, device="cuda", dtype=torch.float32)
    attend = make(torch, slopes, q, k)
    leaves = [a.detach().requires_grad_() for a in (q, k, v)]

    def forward() -> Arrays:
        with torch.no_grad():
            return (attend(q, k, v).transpose(1, 2),)

    def backward() -> Arrays:
        out = attend(*leaves)
        grads = torch.autograd.grad(out, leaves, dout)
        return tuple(a.detach().transpose(1, 2) for a in (out, *grads))

    def memory() -> tuple[float, float]:
        peaks = []
        for run in (forward, backward):
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
            run()
            torch.cuda.synchronize()
            peaks.append((torch.cuda.max_memory_allocated() - before) / GIB)
        return peaks[0], peaks[1]

    return Runner(forward, backward, lambda _: torch.cuda.synchronize(), memory)


def flex(problem: Problem, *, windows: bool) -> Runner:
    """torch FlexAttention: ALiBi as score_mod, causality as block mask.

    windows: the mask also ends where a head's bias has erased all keys, by the bound
    that ours uses, taken over the whole head at once.
    """

    def make(torch, slopes, q, k):
        from torch.nn.attention.flex_attention import (
            create_block_mask,
            flex_attention,
        )

        reach = torch.full_like(slopes, float(problem.length))
        if windows:
            norms = q.float().norm(dim=-1) * k.float().norm(dim=-1).amax()
            own = (q.float() * k.float()).sum(-1)
            spread = ((norms - own) * problem.scale).amax((0, 2))
            # sum_{t >= d} exp(spread - slope t) <= 2^-24
            tail = -torch.log(-torch.expm1(-slopes))
            reach = torch.clamp((spread + tail + 16.64) / slopes, max=problem.length)

        def visible(b, h, i, j):
            return (i >= j) & (i - j <= reach[h])

        def score(s, b, h, i, j):
            return s + slopes[h] * (j - i)

        S, H = problem.length, problem.heads if windows else None
        mask = create_block_mask(visible, None, H, S, S, device="cuda", _compile=True)
        compiled = torch.compile(flex_attention, dynamic=False)
        return lambda q, k, v: compiled(
            q, k, v, score_mod=score, block_mask=mask, scale=problem.scale
        )

    return _torch_runner(problem, make)


def sdpa(problem: Problem) -> Runner:
    """torch's scaled_dot_product_attention with a stored mask, its choice of kernel."""

    def make(torch, slopes, q, k):
        away = torch.arange(problem.length, device="cuda", dtype=torch.float32)
        away = away[None, :] - away[:, None]
        mask = slopes[:, None, None] * away[None]
        mask = mask.masked_fill(away[None] > 0, -torch.inf)[None].to(q.dtype)
        return functools.partial(
            torch.nn.functional.scaled_dot_product_attention,
            attn_mask=mask,
            scale=problem.scale,
        )

    return _torch_runner(problem, make)


# Whose memory is square in the length: (bytes per logit, forward and backward).
SQUARE_BYTES = {
    "naive": 24,
    "jax.nn xla": 24,
    "jax.nn cudnn": 8,
    "torch sdpa": 8,
}

CPU: dict[str, Callable[[Problem], Runner]] = {
    "ours": functools.partial(ours, implementation="xla"),
    "naive": functools.partial(ours, implementation="reference"),
    "jax.nn xla": functools.partial(jax_nn, implementation="xla"),
}
GPU: dict[str, Callable[[Problem], Runner]] = {
    "ours": functools.partial(ours, implementation="gpu", skip="auto"),
    "ours, no skipping": functools.partial(ours, implementation="gpu"),
    "ours, xla": functools.partial(ours, implementation="xla"),
    "jax.nn xla": functools.partial(jax_nn, implementation="xla"),
    "jax.nn cudnn": functools.partial(jax_nn, implementation="cudnn"),
    "tokamax mosaic_gpu": functools.partial(tokamax, implementation="mosaic_gpu"),
    "tokamax triton": functools.partial(tokamax, implementation="triton"),
    "torch flex": functools.partial(flex, windows=False),
    "torch flex, windows": functools.partial(flex, windows=True),
    "torch sdpa": sdpa,
}
