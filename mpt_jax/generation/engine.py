"""Continuous batching over the slots of a KV cache; no text, no threads, no network.

    engine = Engine(cfg, params, n_slots=8, capacity=2048, eos_ids=(0,))
    engine.submit(Request("a", prompt_ids, Sampling(max_tokens=20)))
    while not engine.idle:
        for event in engine.step():
            print(event.ids)

Everything runs in the thread that calls step(); submit() and cancel() belong to it too.

A slot remembers what its cache holds when its request has ended. A new prompt starts
from the longest beginning of it that any slot, busy or not, holds: the next turn of a
conversation reads only what is new, and n answers to one prompt read it once.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import logging
from collections.abc import Sequence
from typing import Any, Literal

import jax
import numpy as np

from mpt_jax import partitioning
from mpt_jax.config import ModelConfig
from mpt_jax.errors import UserError
from mpt_jax.generation import memory, programs, sampling
from mpt_jax.generation.sampling import Drawn, Sampling
from mpt_jax.models import cache
from mpt_jax.models.mpt import Params

logger = logging.getLogger(__name__)

FinishReason = Literal["stop", "length", "cancelled", "error"]

SMALLEST_CHUNK = 32  # a prompt's end is padded to this, or twice it, and so on
FIRST_REACH = 512  # columns that a chunk attends to: so many, or four times, and so on
FIRST_CAPACITY = 256  # of a cache that grows
# A call costs the host about 1 ms, which shows where the devices are done soon: where
# the weights are fewer bytes, tokens are asked for so many at a time. Compiling that
# takes about 2 s, which so many tokens pay for.
FEW_BYTES = 2**30
TOKENS_PER_CALL = 4
WORTH_COMPILING = 2000
# Shorter common beginnings of two prompts are not worth copying a slot for.
MIN_COPIED = 32


@dataclasses.dataclass(frozen=True)
class Request:
    """prompt_ids: at least one. id: the caller's, unique among the unfinished."""

    id: str
    prompt_ids: Sequence[int]
    sampling: Sampling


@dataclasses.dataclass(frozen=True)
class TokenLogprob:
    """log P of a token by the model alone (before temperature and penalties).

    top: (id, logprob) of the likeliest, as many as were asked for, best first.
    """

    id: int
    logprob: float
    top: tuple[tuple[int, float], ...] = ()


@dataclasses.dataclass(frozen=True)
class Event:
    """News of one request: new tokens, its end, or both.

    ids: without the id that stopped it (stop_id). logprobs: one for each of ids where
    asked for. prompt_logprobs: once, where asked for; the first token's is None.
    error: what went wrong, with finish_reason "error".
    """

    id: str
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    stop_id: int | None = None
    error: str = ""


@dataclasses.dataclass
class Counters:
    """Since the engine was made; for metrics."""

    prompt_tokens: int = 0  # of admitted requests
    cached_tokens: int = 0  # of those, taken from the cache of an earlier one
    prefix_hits: int = 0  # requests that took any
    generated_tokens: int = 0
    finished: dict[str, int] = dataclasses.field(default_factory=dict)  # by reason


@dataclasses.dataclass(eq=False)
class _Active:
    """A request on its way. n_read: its prompt's tokens in the cache; n_asked, n_told:
    new tokens that the devices were asked for, and that the host has seen."""

    request: Request
    prompt: np.ndarray
    ends: frozenset[int]
    slot: int = -1
    n_read: int = 0
    n_asked: int = 0
    n_told: int = 0
    finished: bool = False
    scores: list[TokenLogprob | None] | None = None

    @property
    def decoding(self) -> bool:
        more = self.n_asked < self.request.sampling.max_tokens
        return self.n_read == len(self.prompt) and more

    @property
    def n_fed(self) -> int:
        """Columns of the cache that are its own."""
        return self.n_read + max(self.n_asked - 1, 0)


@dataclasses.dataclass(eq=False)
class _Slot:
    """A row of the cache: the tokens whose keys it holds, ``valid`` of them."""

    index: int
    tokens: np.ndarray
    valid: int = 0
    active: _Active | None = None
    used: int = 0  # when a request last ended here

    def common(self, prompt: np.ndarray) -> int:
        """How many tokens at its beginning ``prompt`` shares."""
        n = min(self.valid, len(prompt))
        differ = np.flatnonzero(self.tokens[:n] != prompt[:n])
        return int(differ[0]) if differ.size else n


@dataclasses.dataclass(frozen=True)
class _Pending:
    """A program's results, still on the devices. rows: which request each row of
    ``drawn`` is. scored: (request, first position, n, arrays) of prompt tokens."""

    drawn: Drawn
    rows: tuple[tuple[int, _Active], ...]
    scored: tuple[_Active, int, int, Any] | None = None


class Engine:
    """One model, ``n_slots`` requests at a time, each of up to ``capacity`` tokens.

    It stays on the mesh of partitioning.use() that it is made under.

    Args:
      params: of models.weights.unstack() or quantize().
      capacity: prompt and output of one request, at most.
      vocab_size: ids that may be drawn; default all rows of the head.
      eos_ids: end a request.
      prefill_chunk: tokens of a prompt per step, so that others go on meanwhile.
      tokens_per_call: of each slot, while no request waits, after warm_up() or where
        many are to come; default TOKENS_PER_CALL for a model of FEW_BYTES, else 1. A
        server wants 1: what is drawn is the same, but comes in bursts of so many, and
        after a stop twice as many may be computed in vain, while a newcomer waits.
      grow: start with a small cache and double it when a request needs it (one user);
        otherwise all is allocated now (a server).
    Raises: UserError: a capacity beyond learned positions; a cache that does not fit,
      with the bytes needed, there and missing.
    """

    def __init__(
        self,
        cfg: ModelConfig,
        params: Params,
        *,
        n_slots: int,
        capacity: int,
        vocab_size: int | None = None,
        eos_ids: Sequence[int] = (),
        prefill_chunk: int = 512,
        tokens_per_call: int | None = None,
        grow: bool = False,
    ):
        if cfg.has_wpe and capacity > cfg.max_seq_len:
            raise UserError(
                f"capacity {capacity} is over max_seq_len {cfg.max_seq_len}, where the "
                "learned positions of this model end"
            )
        if min(n_slots, capacity, prefill_chunk) < 1:
            raise UserError(
                "n_slots, capacity, prefill_chunk: expected at least 1, got "
                f"{n_slots}, {capacity}, {prefill_chunk}"
            )
        self.cfg, self.params = cfg, params
        self.n_slots, self.capacity = n_slots, capacity
        self.vocab_size = min(vocab_size or cfg.vocab_size, cfg.vocab_size)
        self.eos_ids = tuple(eos_ids)
        self.counters = Counters()
        self._mesh = partitioning.current_mesh()
        self._chunk = prefill_chunk
        n_bytes = sum(a.nbytes for a in jax.tree.leaves(params))
        default = TOKENS_PER_CALL if n_bytes < FEW_BYTES else 1
        self._at_once = tokens_per_call or default
        self._at_once_compiled: set[int] = set()  # for so many slots
        self._clock = 0
        self._warned = False
        self._waiting: collections.deque[_Active] = collections.deque()
        self._prefilling: _Active | None = None
        self._by_id: dict[str, _Active] = {}
        self._pending: list[_Pending] = []
        self._told: list[Event] = []  # of cancel(), for the next step
        columns = _columns(min(FIRST_CAPACITY, capacity) if grow else capacity)
        self._slots = [_Slot(i, np.zeros(columns, np.int32)) for i in range(n_slots)]
        with self._on_mesh():
            self._check_memory(columns)
            state = programs.make_state(cfg, n_slots, columns)
            if self._mesh is None:
                # As firmly there as the params, which make it so with the first step:
                # else the programs would be compiled again.
                (device,) = jax.tree.leaves(params)[0].devices()
                state = jax.device_put(state, device)
            self._state = state

    # ----------------------------------------------------------------------- requests

    def submit(self, request: Request) -> None:
        """Queues a request.

        Raises: UserError: an empty prompt, ids outside the vocabulary, more tokens than
          the capacity, an id that is in use.
        """
        s, prompt = request.sampling, request.prompt_ids
        needed = len(prompt) + s.max_tokens
        if not len(prompt):
            raise UserError("the prompt has no tokens")
        if s.max_tokens == 0 and not s.prompt_logprobs:
            raise UserError("max_tokens: 0 needs prompt_logprobs")
        if needed > self.capacity:
            raise UserError(
                f"{len(prompt)} tokens of prompt and {s.max_tokens} new ones are "
                f"{needed}, over the capacity of {self.capacity}"
            )
        for name, ids in (("prompt", prompt), ("stop_ids", s.stop_ids),
                          ("logit_bias", s.logit_bias)):  # fmt: skip
            bad = next((i for i in ids if not 0 <= i < self.cfg.vocab_size), None)
            if bad is not None:
                most = self.cfg.vocab_size - 1
                raise UserError(
                    f"{name}: id {bad} is not in the vocabulary, 0 to {most}"
                )
        if request.id in self._by_id:
            raise UserError(f"a request {request.id!r} is not finished yet")
        if needed > self.cfg.max_seq_len and not self._warned:
            self._warned = True
            logger.warning(
                "%d tokens are over max_seq_len %d: the model extrapolates by ALiBi",
                needed, self.cfg.max_seq_len,
            )  # fmt: skip
        ends = frozenset((() if s.ignore_eos else self.eos_ids) + s.stop_ids)
        active = _Active(request, np.array(prompt, np.int32), ends)
        if s.prompt_logprobs:
            active.scores = [None] * len(prompt)
        self._by_id[request.id] = active
        self._waiting.append(active)

    def cancel(self, id: str) -> None:
        """Ends a request (a "cancelled" event follows); nothing if it has ended."""
        if (active := self._by_id.get(id)) is not None:
            self._told.append(self._finish(active, "cancelled"))

    @property
    def idle(self) -> bool:
        """Nothing is queued, running or still to be told."""
        return not (self._by_id or self._told)

    @property
    def n_waiting(self) -> int:
        """Requests without a slot."""
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        """Requests with a slot."""
        return sum(slot.active is not None for slot in self._slots)

    # ----------------------------------------------------------------------- the step

    def step(self) -> list[Event]:
        """Admits, prefills at most one chunk, decodes the next of each busy slot.

        The tokens are those of the step before, while the devices compute these.
        """
        with self._on_mesh():
            self._admit()
            dispatched = [p for p in (self._prefill(), self._decode()) if p]
            settled, self._pending = self._pending, dispatched
            events, self._told = self._told, []
            for pending in settled:
                events += self._read(pending)
            return events

    def warm_up(self) -> None:
        """Compiles every program, so that no request waits for a compiler.

        Raises: UserError: there are requests, whose tokens it would spoil.
        """
        if not self.idle:
            raise UserError("warm_up: there are requests already")
        columns = cache.capacity(self._state.cache)
        with self._on_mesh():
            self._set_row(0, Sampling(temperature=0.0), (), ())
            self._copy(0, 0)
            for size in _sizes(self.n_slots, 1):
                for n in {1, self._at_once}:
                    self._run_decode(n, np.full(size, -1, np.int32))
                self._at_once_compiled.add(size)
            for length in _sizes(self._longest_chunk(), SMALLEST_CHUNK):
                for reach in _reaches(columns, length):
                    ids = np.zeros(length, np.int32)
                    self._run_prefill(ids, slot=0, start=0, reach=reach, n=length)
            self._slots[0].valid = 0
            jax.block_until_ready(self._state)

    def _admit(self) -> None:
        """Gives the first in the queue the lowest free slot, with what is known of it.

        One at a time: what it reads, the next may share. Low slots keep the batch of
        decode() small.
        """
        free = [slot for slot in self._slots if slot.active is None]
        if not (free and self._waiting) or self._prefilling is not None:
            return
        active = self._waiting.popleft()
        s, prompt, slot = active.request.sampling, active.prompt, free[0]
        self._grow(len(prompt) + s.max_tokens)
        # The last token's state is needed to go on, and all of them to score.
        alone = self.cfg.attn_config.prefix_lm or s.prompt_logprobs
        known = prompt[: 0 if alone else -1]
        source = max(self._slots, key=lambda o: (o.common(known), o is slot))
        reused = source.common(known)
        if source is not slot and reused < MIN_COPIED:
            source, reused = slot, slot.common(known)
        if source is not slot or not reused:
            self._park(slot, free, keep=source)
        if source is not slot:
            self._copy(source.index, slot.index)
            slot.tokens[:reused] = source.tokens[:reused]
            if source.active is None and reused == source.valid:
                source.valid = 0  # a beginning of what the slot will hold
        slot.active, slot.valid, active.slot = active, reused, slot.index
        slot.tokens[reused : len(prompt)] = prompt[reused:]
        active.n_read = reused
        self._set_row(slot.index, s, prompt, active.ends)
        self._prefilling = active
        self.counters.prompt_tokens += len(prompt)
        self.counters.cached_tokens += reused
        self.counters.prefix_hits += reused > 0

    def _park(self, slot: _Slot, free: list[_Slot], *, keep: _Slot) -> None:
        """Moves what ``slot`` remembers to the slot that was idle longest, while
        nothing else runs: then conversations alternate, and all are remembered."""
        others = [o for o in free if o is not keep and o is not slot]
        if not slot.valid or len(free) < self.n_slots or not others:
            return
        oldest = min(others, key=lambda o: (o.valid > 0, o.used))
        if oldest.valid and oldest.used > slot.used:
            return
        self._copy(slot.index, oldest.index)
        oldest.tokens[: slot.valid] = slot.tokens[: slot.valid]
        oldest.valid, oldest.used = slot.valid, slot.used

    def _prefill(self) -> _Pending | None:
        """The next chunk of the prompt that is being read."""
        active = self._prefilling
        if active is None:
            return None
        prompt, total = active.prompt, len(active.prompt)
        limit = self._longest_chunk()
        if self.cfg.attn_config.prefix_lm:  # everyone sees everyone: all at once
            limit = self._last_column()
            length = next(n for n in _sizes(limit, SMALLEST_CHUNK) if n >= total)
        else:
            left = min(total - active.n_read, limit)
            length = next(n for n in _sizes(limit, SMALLEST_CHUNK) if n >= left)
        # At the cache's end the padding has no room: then some is read once more.
        start = min(active.n_read, self._last_column() - length)
        ids = np.zeros(length, np.int32)
        n = min(total - start, length)
        ids[:n] = prompt[start : start + n]
        reach = next(r for r in _reaches(cache.capacity(self._state.cache), length)
                     if r >= start + length)  # fmt: skip
        x_LE, drawn = self._run_prefill(
            ids, slot=active.slot, start=start, reach=reach, n=n, total=total
        )
        scored = None
        if active.scores is not None:
            targets = np.zeros(length, np.int32)
            known = prompt[start + 1 : start + n + 1]
            targets[: len(known)] = known
            arrays = programs.score(
                self.cfg, self.vocab_size, self.params, x_LE, targets
            )
            scored = active, start + 1, len(known), arrays
        active.n_read = self._slots[active.slot].valid = start + n
        done = active.n_read == total
        if done:
            self._prefilling = None
            active.n_asked = 1
        return _Pending(drawn, ((0, active),) if done else (), scored)

    def _decode(self) -> _Pending | None:
        """The next token, or some, of every slot whose prompt is read."""
        live = [s.active for s in self._slots if s.active and s.active.decoding]
        if not live:
            return None
        top = max(active.slot for active in live) + 1
        size = next(n for n in _sizes(self.n_slots, 1) if n >= top)
        n, compiled = self._at_once, size in self._at_once_compiled
        enough = n if compiled else max(n, WORTH_COMPILING)
        left = min(a.request.sampling.max_tokens - a.n_asked for a in live)
        if self._waiting or self._prefilling is not None or left < enough:
            n = 1
        else:
            self._at_once_compiled.add(size)
        lengths_B = np.full(size, -1, np.int32)
        for active in live:
            lengths_B[active.slot] = active.n_fed
            active.n_asked += n
        drawn = self._run_decode(n, lengths_B)
        return _Pending(drawn, tuple((a.slot, a) for a in live))

    # ------------------------------------------------------------------- on the devices

    def _run_prefill(
        self, ids_L: np.ndarray, *, slot: int, start: int, reach: int, n: int,
        total: int = -1,
    ) -> tuple[jax.Array, Drawn]:  # fmt: skip
        """total: the prompt's length; the chunk that reaches it draws a token."""
        x_LE, drawn, self._state = programs.prefill(
            self.cfg, self.vocab_size, reach, self.params, self._state, ids_L,
            np.int32(slot), np.int32(start), np.int32(n), np.int32(total),
        )  # fmt: skip
        return x_LE, drawn

    def _run_decode(self, n: int, lengths_B: np.ndarray) -> Drawn:
        drawn, self._state = programs.decode(
            self.cfg, self.vocab_size, n, self.params, self._state, lengths_B
        )
        drawn.id_B.copy_to_host_async()
        return drawn

    def _copy(self, source: int, target: int) -> None:
        self._state = programs.copy_slot(
            self._state, np.int32(source), np.int32(target)
        )

    def _set_row(
        self, slot: int, s: Sampling, prompt: Any, ends: Sequence[int] | frozenset[int]
    ) -> None:
        row = sampling.host_row(s, prompt, stops=ends, vocab=self.cfg.vocab_size)
        self._state = programs.set_row(self._state, np.int32(slot), row)

    def _grow(self, needed: int) -> None:
        """Makes room for ``needed`` tokens in every slot."""
        columns = cache.capacity(self._state.cache)
        if needed <= columns:
            return
        while columns < needed:
            columns = min(2 * columns, _columns(self.capacity))
        self._check_memory(columns)
        grown = programs.grow(self.cfg, self._state.cache, columns)
        self._state = self._state._replace(cache=grown)
        for slot in self._slots:
            slot.tokens = np.pad(slot.tokens, (0, columns - len(slot.tokens)))

    def _check_memory(self, columns: int) -> None:
        cfg = self.cfg
        parts = partitioning.shards("act_heads") if cfg.n_kv_heads > 1 else 1
        memory.check(
            cache.n_bytes(cfg, self.n_slots, columns) // parts,
            f"a cache of {self.n_slots} x {columns} tokens",
            hint="fewer slots or tokens need less, and so does a mesh with more tensor",
        )

    def _on_mesh(self) -> contextlib.AbstractContextManager[Any]:
        if self._mesh is None:
            return contextlib.nullcontext()
        return partitioning.use(self._mesh, batch=(), length=())

    # -------------------------------------------------------------------- on the host

    def _read(self, pending: _Pending) -> list[Event]:
        """Waits for a program's results and tells them."""
        if pending.scored is not None:
            active, first, n, arrays = pending.scored
            self._keep_scores(active, first, n, jax.device_get(arrays))
        live = [(row, active) for row, active in pending.rows if not active.finished]
        if not live:
            return []
        wants = any(a.request.sampling.logprobs is not None for _, a in live)
        drawn = jax.device_get(pending.drawn if wants else pending.drawn.id_B)
        events = []
        for n, ids_B in enumerate((drawn.id_B if wants else drawn).tolist()):
            one = Drawn(*(a[n] for a in drawn)) if wants else None
            for row, active in live:
                if not active.finished:  # by a token before
                    events.append(self._tell(active, ids_B[row], one, row))
        return events

    def _keep_scores(self, active: _Active, first: int, n: int, arrays: Any) -> None:
        logprob, top_id, top_logprob = arrays
        top = active.request.sampling.logprobs or 0
        for i in range(n):
            tops = zip(top_id[i, :top].tolist(), top_logprob[i, :top].tolist(),
                       strict=True)  # fmt: skip
            active.scores[first + i] = TokenLogprob(
                int(active.prompt[first + i]), float(logprob[i]), tuple(tops)
            )

    def _tell(
        self, active: _Active, token: int, drawn: Drawn | None, row: int
    ) -> Event:
        """The event of one new token."""
        s = active.request.sampling
        news: dict[str, Any] = {}
        if active.n_told == 0 and active.scores is not None:
            news["prompt_logprobs"] = tuple(active.scores)
        if s.max_tokens == 0:
            return self._finish(active, "length", **news)
        if token < 0:
            message = "the model's logits are not finite"
            return self._finish(active, "error", error=message, **news)
        slot = self._slots[active.slot]
        at = len(active.prompt) + active.n_told
        slot.tokens[at : at + 1] = token
        active.n_told += 1
        slot.valid = min(at + 1, active.n_fed)
        self.counters.generated_tokens += 1
        if token in active.ends:
            return self._finish(active, "stop", stop_id=token, **news)
        news["ids"] = (token,)
        if s.logprobs is not None:
            tops = zip(drawn.top_id_BT[row, : s.logprobs].tolist(),
                       drawn.top_logprob_BT[row, : s.logprobs].tolist(),
                       strict=True)  # fmt: skip
            own = TokenLogprob(token, float(drawn.logprob_B[row]), tuple(tops))
            news["logprobs"] = (own,)
        if active.n_told == s.max_tokens:
            return self._finish(active, "length", **news)
        return Event(active.request.id, **news)

    def _finish(self, active: _Active, reason: FinishReason, **news: Any) -> Event:
        """Ends a request wherever it is, and frees its slot."""
        active.finished = True
        del self._by_id[active.request.id]
        if active.slot < 0:
            self._waiting.remove(active)
        else:
            slot = self._slots[active.slot]
            slot.active, self._clock = None, self._clock + 1
            slot.used = self._clock
            if self.cfg.attn_config.prefix_lm:  # its keys have seen the whole prompt
                slot.valid = 0
            if reason == "error":  # nothing of it may reach another request
                with self._on_mesh():
                    self._state = programs.clear(self._state, np.int32(slot.index))
                slot.valid = 0
        if self._prefilling is active:
            self._prefilling = None
        finished = self.counters.finished
        finished[reason] = finished.get(reason, 0) + 1
        return Event(active.request.id, finish_reason=reason, **news)

    def _last_column(self) -> int:
        """Where a chunk and its padding must end."""
        columns = cache.capacity(self._state.cache)
        return min(columns, self.cfg.max_seq_len) if self.cfg.has_wpe else columns

    def _longest_chunk(self) -> int:
        return min(self._chunk, self._last_column())


def _columns(capacity: int) -> int:
    """``capacity`` in whole blocks of the cache."""
    return -(-capacity // cache.NORM_BLOCK) * cache.NORM_BLOCK


@functools.cache
def _sizes(most: int, least: int) -> tuple[int, ...]:
    """The shapes that are compiled.

    >>> _sizes(12, 1)
    (1, 2, 4, 8, 12)
    """
    sizes = [least]
    while sizes[-1] < most:
        sizes.append(2 * sizes[-1])
    return (*sizes[:-1], most)


@functools.cache
def _reaches(columns: int, length: int) -> tuple[int, ...]:
    """How many columns a chunk of ``length`` may be shown."""
    reaches = [FIRST_REACH]
    while reaches[-1] < columns:
        reaches.append(4 * reaches[-1])
    return tuple(min(r, columns) for r in reaches if min(r, columns) >= length)
