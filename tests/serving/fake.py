"""An engine of known arithmetic, and servers around it.

A token is a letter that the sum of all ids before it gives, so that any test can say
what an answer must be. No JAX program is compiled.
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import threading
import time
from collections.abc import Iterator, Sequence
from typing import Any

import httpx

from mpt_jax.generation.engine import Counters, Event, Request, TokenLogprob
from mpt_jax.generation.templates import TEMPLATES
from mpt_jax.serving import server
from mpt_jax.serving.app import Limits, Service, make_app
from mpt_jax.serving.jobs import Worker
from mpt_jax.serving.protocol import Rules
from mpt_jax.tokenizer import ByteTokenizer

CONTEXT, MODEL = 256, "fake"
POISON, DEATH = ord("!"), ord("~")  # in a prompt: this request fails, the engine dies


def next_id(ids: Sequence[int]) -> int:
    return 97 + sum(ids) % 26


def answer(prompt: str | Sequence[int], n: int) -> str:
    """What the engine says to ``prompt``."""
    ids = list(prompt.encode() if isinstance(prompt, str) else prompt)
    start = len(ids)
    for _ in range(n):
        ids.append(next_id(ids))
    return bytes(ids[start:]).decode()


def logprob(id: int, top: int) -> TokenLogprob:
    """Alternatives are the id and those after it."""
    return TokenLogprob(
        id, -id / 100, tuple((id + i, -id / 100 - i) for i in range(top))
    )


class FakeEngine:
    """As mpt_jax.generation.engine.Engine.

    seconds: what a step takes. go: a step waits for it.
    """

    def __init__(self, *, n_slots: int = 4, seconds: float = 0.0):
        self.n_slots, self.capacity, self.seconds = n_slots, CONTEXT, seconds
        self.counters = Counters()
        self.go = threading.Event()
        self.go.set()
        self.most_running = 0
        self._waiting: collections.deque[Request] = collections.deque()
        self._running: dict[str, tuple[Request, list[int]]] = {}
        self._told: list[Event] = []

    def submit(self, request: Request) -> None:
        self._waiting.append(request)

    def cancel(self, id: str) -> None:
        waiting = [r for r in self._waiting if r.id != id]
        if len(waiting) < len(self._waiting) or self._running.pop(id, None):
            self._waiting = collections.deque(waiting)
            self._told.append(Event(id, finish_reason="cancelled"))

    @property
    def idle(self) -> bool:
        return not (self._waiting or self._running or self._told)

    @property
    def n_waiting(self) -> int:
        return len(self._waiting)

    @property
    def n_running(self) -> int:
        return len(self._running)

    def step(self) -> list[Event]:
        self.go.wait()
        if self.seconds:
            time.sleep(self.seconds)
        events, self._told = self._told, []
        while self._waiting and len(self._running) < self.n_slots:
            request = self._waiting.popleft()
            self._running[request.id] = request, list(request.prompt_ids)
        self.most_running = max(self.most_running, len(self._running))
        for request, ids in list(self._running.values()):
            events.append(self._advance(request, ids))
        return events

    def _advance(self, request: Request, ids: list[int]) -> Event:
        s, prompt = request.sampling, request.prompt_ids
        if DEATH in prompt:
            raise FloatingPointError("the devices are gone")
        if POISON in prompt:
            del self._running[request.id]
            return Event(request.id, finish_reason="error", error="it is poisoned")
        news: dict[str, Any] = {}
        if s.prompt_logprobs and len(ids) == len(prompt):
            scored = [logprob(i, s.logprobs or 0) for i in prompt[1:]]
            news["prompt_logprobs"] = (None, *scored)
        if s.max_tokens:
            id = next_id(ids)
            ids.append(id)
            news["ids"] = (id,)
            self.counters.generated_tokens += 1
            if s.logprobs is not None:
                news["logprobs"] = (logprob(id, s.logprobs),)
            if id in s.stop_ids:
                news |= {"ids": (), "logprobs": (), "stop_id": id}
        done = len(ids) - len(prompt) >= s.max_tokens
        reason = "stop" if "stop_id" in news else "length" if done else None
        if reason:
            del self._running[request.id]
        return Event(request.id, finish_reason=reason, **news)


def service(
    engine: Any = None, *, max_queue: int = 8, limits: Limits | None = None, **keys: Any
) -> Service:
    """Of a fake engine; end it by ``service.worker.stop()``."""
    engine = engine or FakeEngine()
    most = engine.n_slots + max_queue
    given = {"template": TEMPLATES["instruct"], "tokenizer": ByteTokenizer()} | keys
    vocab_size = given["tokenizer"].vocab_size
    return Service(
        worker=Worker(engine, most=most),
        rules=Rules(MODEL, engine.capacity, vocab_size, most),
        limits=limits or Limits(),
        **given,
    )


@contextlib.asynccontextmanager
async def client(service: Service, **keys: Any) -> Any:
    """An httpx client of the application, without sockets."""
    transport = httpx.ASGITransport(app=make_app(service))
    keys = {"base_url": "http://127.0.0.1", "timeout": 60} | keys
    try:
        async with httpx.AsyncClient(transport=transport, **keys) as found:
            yield found
    finally:  # the loop must live to hear of what was cancelled
        end = time.monotonic() + 10
        while service.worker.pending and time.monotonic() < end:
            await asyncio.sleep(0.01)


@contextlib.contextmanager
def running(service: Service) -> Iterator[str]:
    """A real server in a thread; yields its URL."""
    bound = server.bind("127.0.0.1", 0)
    made = server.Server(service, drain=5)
    thread = threading.Thread(target=made.serve_until_done, args=(bound,), daemon=True)
    thread.start()
    end = time.monotonic() + 30
    while not made.started and time.monotonic() < end:
        time.sleep(0.01)
    try:
        yield server.url(bound)
    finally:
        made.should_exit = True
        thread.join(30)
        bound.close()
    assert not thread.is_alive()


def settled(service: Service, seconds: float = 10.0) -> bool:
    """Whether every slot and place is free, or becomes so in time."""
    end, engine = time.monotonic() + seconds, service.worker.engine
    while service.in_flight or service.worker.pending or not engine.idle:
        if time.monotonic() > end:
            return False
        time.sleep(0.01)
    return engine.n_running == engine.n_waiting == 0
