"""The engine's thread, and what the event loop sees of it.

The engine is stepped by one thread, which alone touches it. The event loop puts
requests and cancellations in an inbox and gets each step's events back in one call. A
Group is one HTTP request: its choices are engine requests of their own.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import itertools
import logging
import queue
import threading
import time
from collections.abc import AsyncIterator, Callable, Sequence

from mpt_jax.errors import MptError
from mpt_jax.generation.engine import Engine, Event, Request
from mpt_jax.generation.sampling import Sampling
from mpt_jax.serving.protocol import Refusal

RETRY_SECONDS = 1  # a slot ends a request about so often
STALL_SECONDS = 120.0  # a step takes milliseconds, and warm_up() has compiled all

log = logging.getLogger(__name__)


def dead() -> Refusal:
    return Refusal(503, "the engine has stopped; this server goes down", code="dead")


def failed(why: str) -> Refusal:
    return Refusal(500, f"this request failed: {why}", code="failed")


class Worker:
    """Owns ``engine`` and the thread that steps it.

    Args:
      most: engine requests that may be unfinished: running, waiting, being cancelled.
    """

    def __init__(self, engine: Engine, *, most: int):
        self.engine, self.most = engine, most
        self.failure: BaseException | None = None
        self._groups: dict[str, tuple[Group, int]] = {}  # the loop's, by request id
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._loop: asyncio.AbstractEventLoop | None = None
        self._ids = itertools.count()
        self._busy_since: float | None = None
        self._thread = threading.Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def pending(self) -> int:
        """Engine requests that have not ended."""
        return len(self._groups)

    @property
    def healthy(self) -> bool:
        """The engine lives, and its step has not hung."""
        since = self._busy_since
        stalled = since is not None and time.monotonic() - since > STALL_SECONDS
        return self.failure is None and not stalled

    def submit(
        self, asked: Sequence[tuple[Sequence[int], Sampling]], *, seconds: float
    ) -> Group:
        """Queues one engine request for each (prompt, sampling); all or none.

        Args:
          seconds: after which the group is given up.
        Raises: Refusal: 429 when too many are unfinished, 503 when the engine is dead.
        """
        if self.failure is not None:
            raise dead()
        if self.pending + len(asked) > self.most:
            message = (
                f"this server is busy: {self.pending} of {self.most} places are taken "
                f"and this request needs {len(asked)}"
            )
            retry = (("retry-after", str(RETRY_SECONDS)),)
            raise Refusal(429, message, code="overloaded", headers=retry)
        self._loop = asyncio.get_running_loop()
        names = [str(next(self._ids)) for _ in asked]
        group = Group(self, names, seconds)
        for i, (name, (prompt, sampling)) in enumerate(zip(names, asked, strict=True)):
            self._groups[name] = group, i
            request = Request(name, prompt, sampling)
            self._inbox.put(lambda request=request: self._admit(request))
        return group

    def cancel(self, name: str) -> None:
        """Ends an engine request; its "cancelled" event frees its place."""
        if name in self._groups:
            self._inbox.put(lambda: self.engine.cancel(name))

    def stop(self) -> None:
        """Ends the thread after its current step."""
        self._inbox.put(None)
        self._thread.join(STALL_SECONDS)

    # ------------------------------------------------------------ the engine's thread

    def _run(self) -> None:
        try:
            while self._take():
                self._busy_since = time.monotonic()
                events = self.engine.step()
                self._busy_since = None
                if events:
                    self._tell(lambda events=events: self._deliver(events))
        except BaseException as error:
            log.exception("the engine has stopped")
            self.failure, self._busy_since = error, None
            self._tell(self._fail_all)

    def _take(self) -> bool:
        """Does what came in; sleeps while there is nothing to do. False: stop."""
        block = self.engine.idle
        while True:
            try:
                task = self._inbox.get(block=block)
            except queue.Empty:
                return True
            if task is None:
                return False
            task()
            block = False

    def _admit(self, request: Request) -> None:
        """What the engine does not take fails alone."""
        try:
            self.engine.submit(request)
        except MptError as error:
            refusal = Refusal(400, str(error))
        except Exception as error:
            log.exception("the engine failed to take a request")
            refusal = failed(f"{type(error).__name__}: {error}")
        else:
            return
        self._tell(lambda: self._fail(request.id, refusal))

    def _tell(self, call: Callable[[], None]) -> None:
        if self._loop is not None:
            with contextlib.suppress(RuntimeError):  # the loop is closed: none listens
                self._loop.call_soon_threadsafe(call)

    # ---------------------------------------------------------------- the event loop

    def _deliver(self, events: Sequence[Event]) -> None:
        for event in events:
            if event.id not in self._groups:
                continue
            group, index = self._groups[event.id]
            if event.finish_reason is not None:
                del self._groups[event.id]
            group.put(index, event)

    def _fail(self, name: str, why: Refusal) -> None:
        group, _ = self._groups.pop(name)
        group.fail(why)

    def _fail_all(self) -> None:
        for name in list(self._groups):
            self._fail(name, dead())


class Group:
    """The engine requests of one HTTP request, and their events in order."""

    def __init__(self, worker: Worker, names: Sequence[str], seconds: float):
        self._worker, self._names = worker, names
        self._running = set(range(len(names)))
        self._news: asyncio.Queue[tuple[int, Event] | Refusal] = asyncio.Queue()
        message = f"no whole answer within {seconds:g} s"
        late = Refusal(504, message, code="timeout")
        self._timer = asyncio.get_running_loop().call_later(seconds, self.fail, late)

    async def events(self) -> AsyncIterator[tuple[int, Event]]:
        """(choice, event) until every choice has ended or was cancelled.

        What came of a choice while the last event was dealt with is one event: a loop
        that falls behind the engine has less to send, not more.

        Raises: Refusal: the engine failed, or the time is over.
        """
        while self._running:
            news, merged = [await self._news.get()], {}
            while not self._news.empty():
                news.append(self._news.get_nowait())
            for one in news:
                if isinstance(one, Refusal):
                    raise one
                index, event = one
                merged[index] = _merged(merged.get(index), event)
            for index, event in merged.items():
                if index not in self._running:
                    continue
                if event.finish_reason is not None:
                    self._running.discard(index)
                if event.finish_reason == "error":
                    raise failed(event.error)
                yield index, event

    def cancel(self, index: int) -> None:
        """Ends one choice: nothing more is heard of it."""
        self._running.discard(index)
        self._worker.cancel(self._names[index])

    def close(self) -> None:
        """Ends all that has not ended."""
        self._timer.cancel()
        for index in list(self._running):
            self.cancel(index)

    def put(self, index: int, event: Event) -> None:
        self._news.put_nowait((index, event))

    def fail(self, why: Refusal) -> None:
        self._news.put_nowait(why)


def _merged(first: Event | None, then: Event) -> Event:
    """Two events of one request, as one."""
    if first is None:
        return then
    scores = first.prompt_logprobs
    return dataclasses.replace(
        then,
        ids=first.ids + then.ids,
        logprobs=first.logprobs + then.logprobs,
        prompt_logprobs=then.prompt_logprobs if scores is None else scores,
    )
