"""From logits to the next token: how a request wants to be continued, and the draw.

``Sampling`` is what a user asks for and checks itself. On the devices the same knobs
are ``Rows``, one row per slot of the cache, so that one compiled program serves any mix
of requests; what no row asks for is not computed.

Dims beside the usual ones: T = TOP alternatives reported, W = 2 words of a seed; B in
the fields of Rows is all slots, elsewhere the rows at hand.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from mpt_jax.errors import UserError

TOP = 20  # the most alternatives that a request may ask to see, as OpenAI's
# Logits below 1000 stay finite when divided by it; a lower one acts as this one does.
_COLDEST = 1e-6


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How to continue a prompt.

    max_tokens: new tokens at most; 0 only scores the prompt (prompt_logprobs).
    temperature: 0 is greedy. top_k: 0 is off. top_p, min_p: 1 and 0 are off.
    repetition_penalty: Hugging Face's, over prompt and output; 1 is off.
    presence_penalty, frequency_penalty: OpenAI's, over the output; 0 is off.
    seed: the same seed, prompt and model give the same tokens.
    stop: texts that end the output, themselves left out (text.Stream looks for them).
    stop_ids: ids that end it like EOS. ignore_eos: EOS is a token like others.
    min_tokens: neither EOS nor stop_ids before so many new tokens.
    logit_bias: id -> what is added to its logit.
    logprobs: None is off; n reports each token's log-probability and the n likeliest.
    prompt_logprobs: report the prompt's tokens, too (logprobs says how many likeliest).

    Raises: UserError: listing every field that is out of its range.
    """

    max_tokens: int = 256
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    min_tokens: int = 0
    logit_bias: Mapping[int, float] = dataclasses.field(default_factory=dict)
    logprobs: int | None = None
    prompt_logprobs: bool = False

    def __post_init__(self) -> None:
        problems = [
            f"{name}: got {getattr(self, name)!r}, expected {expected}"
            for name, (fits, expected) in _RANGES.items()
            if not fits(getattr(self, name))
        ]
        if not problems and self.min_tokens > self.max_tokens:
            problems.append(
                f"min_tokens: got {self.min_tokens}, expected at most max_tokens "
                f"({self.max_tokens})"
            )
        if problems:
            raise UserError("; ".join(problems))


def _integer(low: int, high: int = 2**31 - 1) -> tuple[Callable[[Any], bool], str]:
    most = f"an integer of {low} to {high}"
    return lambda v: type(v) is int and low <= v <= high, most


def _number(low: float, high: float) -> tuple[Callable[[Any], bool], str]:
    def fits(value: Any) -> bool:
        return type(value) in (int, float) and low <= value <= high

    return fits, f"a number of {low:g} to {high:g}"


def _is_bias(value: Any) -> bool:
    number, _ = _number(-100, 100)
    if not isinstance(value, Mapping):
        return False
    return all(type(i) is int and i >= 0 and number(b) for i, b in value.items())


_above_0 = lambda fits: lambda value: fits(value) and value > 0  # noqa: E731
_RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {
    "max_tokens": _integer(0),
    "temperature": _number(0, 100),
    "top_k": _integer(0),
    "top_p": (_above_0(_number(0, 1)[0]), "a number above 0, to 1"),
    "min_p": _number(0, 1),
    "repetition_penalty": (_above_0(_number(0, 100)[0]), "a number above 0, to 100"),
    "presence_penalty": _number(-2, 2),
    "frequency_penalty": _number(-2, 2),
    "seed": _integer(0, 2**63 - 1),
    "stop": (
        lambda v: isinstance(v, tuple) and all(isinstance(s, str) and s for s in v),
        "a tuple of texts that are not empty",
    ),
    "stop_ids": (
        lambda v: isinstance(v, tuple) and all(type(i) is int and i >= 0 for i in v),
        "a tuple of ids",
    ),
    "ignore_eos": (lambda v: isinstance(v, bool), "true or false"),
    "min_tokens": _integer(0),
    "logit_bias": (_is_bias, "ids with numbers of -100 to 100"),
    "logprobs": (
        lambda v: v is None or (type(v) is int and 0 <= v <= TOP),
        f"none, or an integer of 0 to {TOP}",
    ),
    "prompt_logprobs": (lambda v: isinstance(v, bool), "true or false"),
}  # fmt: skip


# ----------------------------------------------------------------------- on the devices


class Rows(NamedTuple):
    """The Sampling of every slot, and which tokens it has seen."""

    temperature_B: jax.Array
    top_k_B: jax.Array
    top_p_B: jax.Array
    min_p_B: jax.Array
    steered_B: jax.Array  # bool: has a penalty or a bias
    repetition_B: jax.Array
    presence_B: jax.Array
    frequency_B: jax.Array
    seed_BW: jax.Array
    logprobs_B: jax.Array  # bool: wanted
    no_stop_before_B: jax.Array  # positions below this one take none of stops
    stops_BV: jax.Array  # bool
    bias_BV: jax.Array
    prompt_BV: jax.Array  # bool: in the prompt
    counts_BV: jax.Array  # int32: how often in the output


class Drawn(NamedTuple):
    """What was drawn. id -1: the logits were not finite. The log-probabilities are 0
    unless some row wanted them."""

    id_B: jax.Array
    logprob_B: jax.Array
    top_id_BT: jax.Array
    top_logprob_BT: jax.Array


def make_rows(n_slots: int, vocab: int) -> Rows:
    """Greedy rows of no prompt."""
    row = host_row(Sampling(temperature=0.0), (), stops=(), vocab=vocab)
    return jax.tree.map(lambda a: jnp.repeat(jnp.asarray(a)[None], n_slots, 0), row)


def host_row(
    sampling: Sampling, prompt_ids: Any, *, stops: Collection[int], vocab: int
) -> Rows:
    """One row of Rows, without the slot's dim, in NumPy.

    Args: stops: what min_tokens keeps away. vocab: rows of the head.
    """
    s = sampling
    stops_V, prompt_V = np.zeros(vocab, bool), np.zeros(vocab, bool)
    stops_V[list(stops)] = True
    prompt_V[np.asarray(prompt_ids, np.int64)] = True
    bias_V = np.zeros(vocab, np.float32)
    bias_V[list(s.logit_bias)] = list(s.logit_bias.values())
    penalised = s.repetition_penalty != 1 or s.presence_penalty or s.frequency_penalty
    return Rows(
        temperature_B=np.float32(s.temperature),
        top_k_B=np.int32(s.top_k),
        top_p_B=np.float32(s.top_p),
        min_p_B=np.float32(s.min_p),
        steered_B=np.bool_(penalised or s.logit_bias),
        repetition_B=np.float32(s.repetition_penalty),
        presence_B=np.float32(s.presence_penalty),
        frequency_B=np.float32(s.frequency_penalty),
        seed_BW=np.array([s.seed >> 32, s.seed & 0xFFFFFFFF], np.uint32),
        logprobs_B=np.bool_(s.logprobs is not None),
        no_stop_before_B=np.int32(len(prompt_ids) + s.min_tokens),
        stops_BV=stops_V,
        bias_BV=bias_V,
        prompt_BV=prompt_V,
        counts_BV=np.zeros(vocab, np.int32),
    )


def draw(
    logits_BV: jax.Array,
    rows: Rows,
    *,
    slots_B: jax.Array,
    position_B: jax.Array,
    live_B: jax.Array,
    vocab_size: int,
) -> tuple[Drawn, Rows]:
    """One token for each of B slots.

    In this order: repetition, presence and frequency penalty, bias, min_tokens; then,
    unless greedy, temperature, top-k, top-p of what that leaves, min-p. A draw depends
    on its row's logits, seed and position alone. Ids that tie with the last one kept
    are kept.

    Args:
      logits_BV: float32, whole on every device.
      slots_B: which row of ``rows`` each is. position_B: where the token will stand.
      live_B: rows that count; the others may draw anything.
      vocab_size: ids from here on are padding of the head and are never drawn. They do
        count in log-probabilities, which are the model's own.
    Returns: Drawn, and ``rows`` that have counted it.
    """
    pick = lambda a_B: a_B[slots_B]  # noqa: E731
    V = logits_BV.shape[1]
    steered_BV = _steer(logits_BV, rows, slots_B, position_B, live_B)
    steered_BV = jnp.where(jnp.arange(V)[None] < vocab_size, steered_BV, -jnp.inf)
    warm_B = live_B & (pick(rows.temperature_B) > 0)
    greedy_B = _argmax(steered_BV)
    id_B = lax.cond(
        warm_B.any(),
        lambda: jnp.where(
            warm_B, _sample(steered_BV, rows, slots_B, position_B, warm_B), greedy_B
        ),
        lambda: greedy_B,
    )
    id_B = jnp.where(jnp.isfinite(logits_BV).all(-1), id_B, -1)
    T = min(TOP, vocab_size)
    B = logits_BV.shape[0]
    blank = jnp.zeros((B,)), jnp.zeros((B, T), jnp.int32), jnp.zeros((B, T))
    logprobs = lax.cond(
        (live_B & pick(rows.logprobs_B)).any(),
        lambda: score(logits_BV, id_B, vocab_size=vocab_size),
        lambda: blank,
    )
    counts_BV = rows.counts_BV.at[slots_B, jnp.where(live_B, id_B, V)].add(
        1, mode="drop"
    )
    return Drawn(id_B, *logprobs), rows._replace(counts_BV=counts_BV)


def score(
    logits_BV: jax.Array, id_B: jax.Array, *, vocab_size: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """log P of each id under a softmax of the logits, and the T likeliest ids' too:
    (logprob_B, top_id_BT, top_logprob_BT)."""
    total_B1 = jax.nn.logsumexp(logits_BV, axis=-1, keepdims=True)
    own_B1 = jnp.take_along_axis(logits_BV, jnp.maximum(id_B, 0)[:, None], axis=-1)
    top_BT, top_id_BT = lax.top_k(logits_BV[:, :vocab_size], min(TOP, vocab_size))
    return (own_B1 - total_B1)[:, 0], top_id_BT, top_BT - total_B1


def _steer(
    logits_BV: jax.Array,
    rows: Rows,
    slots_B: jax.Array,
    position_B: jax.Array,
    live_B: jax.Array,
) -> jax.Array:
    """Penalties, bias and min_tokens, where any row has one."""

    def pick(a_B: jax.Array) -> jax.Array:
        a_B = a_B[slots_B]
        return a_B[:, None] if a_B.ndim == 1 else a_B

    def steered() -> jax.Array:
        x_BV, counts_BV = logits_BV, pick(rows.counts_BV)
        seen_BV = pick(rows.prompt_BV) | (counts_BV > 0)
        by_B1 = pick(rows.repetition_B)
        penalised_BV = jnp.where(x_BV > 0, x_BV / by_B1, x_BV * by_B1)
        x_BV = jnp.where(seen_BV, penalised_BV, x_BV)
        x_BV -= pick(rows.presence_B) * (counts_BV > 0)
        x_BV -= pick(rows.frequency_B) * counts_BV
        x_BV += pick(rows.bias_BV)
        early_B1 = position_B[:, None] < pick(rows.no_stop_before_B)
        return jnp.where(early_B1 & pick(rows.stops_BV), -jnp.inf, x_BV)

    asked_B = rows.steered_B[slots_B]
    asked_B |= position_B < rows.no_stop_before_B[slots_B]
    return lax.cond((asked_B & live_B).any(), steered, lambda: logits_BV)


def _sample(
    steered_BV: jax.Array,
    rows: Rows,
    slots_B: jax.Array,
    position_B: jax.Array,
    warm_B: jax.Array,
) -> jax.Array:
    """Draws from a softmax at each row's temperature, cut by top-k, top-p, min-p."""
    temperature_B1 = jnp.maximum(rows.temperature_B[slots_B], _COLDEST)[:, None]
    scaled_BV = steered_BV / temperature_B1
    k_B, p_B = rows.top_k_B[slots_B], rows.top_p_B[slots_B]
    kept_BV = lax.cond(
        (warm_B & ((k_B > 0) | (p_B < 1))).any(),
        lambda: scaled_BV >= _threshold(scaled_BV, k_B, p_B),
        lambda: jnp.ones_like(scaled_BV, bool),
    )
    # P(id) >= min_p P(likeliest), in logs; log 0 keeps all.
    floor_B = scaled_BV.max(-1) + jnp.log(rows.min_p_B[slots_B])
    kept_BV &= scaled_BV >= floor_B[:, None]

    def noise(seed_W: jax.Array, position: jax.Array) -> jax.Array:
        key = jax.random.wrap_key_data(seed_W, impl="threefry2x32")
        return jax.random.gumbel(
            jax.random.fold_in(key, position), steered_BV.shape[1:]
        )

    noise_BV = jax.vmap(noise)(rows.seed_BW[slots_B], position_B)
    drawn_BV = jnp.where(kept_BV, scaled_BV + noise_BV, -jnp.inf)
    return _argmax(drawn_BV)


def _argmax(a_BV: jax.Array) -> jax.Array:
    """The first of the largest, as int32; twice as fast on CPUs as jnp.argmax."""
    V = a_BV.shape[1]
    id_1V = jnp.arange(V, dtype=jnp.int32)[None]
    is_top_BV = a_BV == a_BV.max(-1, keepdims=True)
    return jnp.where(is_top_BV, id_1V, V - 1).min(-1)


def _threshold(scaled_BV: jax.Array, k_B: jax.Array, p_B: jax.Array) -> jax.Array:
    """(B, 1): the least logit that top-k and then top-p leave.

    top-p keeps an id while those before it hold less than p of the mass.
    """
    V = scaled_BV.shape[1]
    ordered_BV = -jnp.sort(-scaled_BV, axis=-1)
    k_B1 = jnp.where(k_B > 0, jnp.minimum(k_B, V), V)[:, None]
    best_BV = jnp.where(jnp.arange(V)[None] < k_B1, ordered_BV, -jnp.inf)
    mass_BV = jax.nn.softmax(best_BV, axis=-1)
    before_BV = jnp.cumsum(mass_BV, axis=-1) - mass_BV
    # Sums of float32 may reach 1 too early: p = 1 keeps all.
    p_B1 = jnp.where(p_B < 1, p_B, jnp.inf)[:, None]
    n_B1 = (before_BV < p_B1).sum(-1, keepdims=True)
    n_B1 = jnp.clip(jnp.minimum(n_B1, k_B1), 1)
    return jnp.take_along_axis(ordered_BV, n_B1 - 1, axis=-1)
