"""The routes of the server, as one ASGI application without sockets.

What every request passes, outermost first: Guard (key, host, draining, the count of
what is in flight), the route, reading the body within its limits, protocol.parse, the
tokenizer in a thread, the engine, and an Answer, for as long as the client listens.
"""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import hmac
import logging
import time
from collections.abc import AsyncIterator, Coroutine
from typing import Any

from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response, StreamingResponse
from starlette.routing import Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from mpt_jax.errors import MptError
from mpt_jax.generation import templates
from mpt_jax.generation.templates import Template
from mpt_jax.serving.answers import Answer, to_json, token_namer
from mpt_jax.serving.jobs import Worker
from mpt_jax.serving.metrics import Metrics
from mpt_jax.serving.protocol import Ask, Kind, Refusal, Rules, parse
from mpt_jax.tokenizer import Tokenizer

CLOSE = (("connection", "close"),)  # with a body that will not be read

log = logging.getLogger(__name__)


@dataclasses.dataclass(frozen=True)
class Limits:
    """max_body: bytes. timeout: of an answer. read_timeout: of a head or a body."""

    max_body: int = 2_000_000
    timeout: float = 600.0
    read_timeout: float = 30.0


@dataclasses.dataclass
class Service:
    """All that the routes need.

    template: None answers no chats, for the reason ``no_chat``. api_key: None lets
    everyone in. hosts: the Host headers that are answered; None is any.
    """

    worker: Worker
    tokenizer: Tokenizer
    rules: Rules
    limits: Limits
    template: Template | None = None
    no_chat: str = ""
    api_key: str | None = None
    hosts: frozenset[str] | None = None
    draining: bool = False
    in_flight: int = 0

    def __post_init__(self):
        self.metrics = Metrics(self.worker)
        self.namer = token_namer(self.tokenizer)
        self.turn_ends: tuple[int, ...] = ()
        if self.template is not None:
            ends = templates.stop_ids(self.template, self.tokenizer)
            self.turn_ends = tuple(i for i in ends if i != self.tokenizer.eos_id)
        self.created = int(time.time())


def make_app(service: Service) -> ASGIApp:
    """The application; ``service.draining`` may be set while it runs."""

    async def completions(request: Request) -> Response:
        return await _generate(service, request, "completion")

    async def chat(request: Request) -> Response:
        if service.template is None:
            raise Refusal(400, f"no chats here: {service.no_chat}", code="no_template")
        return await _generate(service, request, "chat")

    async def models(request: Request) -> Response:
        return _json({"object": "list", "data": [_model(service)]})

    async def model(request: Request) -> Response:
        if request.path_params["name"] != service.rules.model:
            message = f"the model served here is {service.rules.model!r}"
            raise Refusal(404, message, "model", "model_not_found")
        return _json(_model(service))

    async def health(request: Request) -> Response:
        state = "ok" if service.worker.healthy else "the engine has stopped"
        state = "draining" if service.draining and state == "ok" else state
        return _json({"status": state}, status=200 if state == "ok" else 503)

    async def metrics(request: Request) -> Response:
        kind = "text/plain; version=0.0.4; charset=utf-8"
        return Response(service.metrics.text(), media_type=kind)

    routes = [
        Route("/v1/completions", completions, methods=["POST"]),
        Route("/v1/chat/completions", chat, methods=["POST"]),
        Route("/v1/models", models),
        Route("/v1/models/{name:path}", model),
        Route("/health", health),
        Route("/metrics", metrics),
    ]
    handlers = {Refusal: _refused, HTTPException: _no_route, Exception: _broken}
    app = Starlette(routes=routes, exception_handlers=handlers)
    return Guard(app, service, {r.path for r in routes})


class Guard:
    """Lets in who may come in, and counts."""

    def __init__(self, app: ASGIApp, service: Service, paths: set[str]):
        self._app, self._service, self._paths = app, service, paths

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":  # no websockets, and nothing to start or stop
            raise NotImplementedError(f"ASGI {scope['type']}")
        service, status = self._service, 0

        async def counted(message: Message) -> None:
            nonlocal status
            status = message.get("status", status)
            await send(message)

        service.in_flight += 1
        try:
            if (refusal := self._refuse(scope)) is not None:
                await _answer(refusal)(scope, receive, counted)
            else:
                await self._app(scope, receive, counted)
        finally:
            service.in_flight -= 1
            path = scope["path"] if scope["path"] in self._paths else "other"
            service.metrics.requests.labels(path, status or "none").inc()

    def _refuse(self, scope: Scope) -> Refusal | None:
        service, headers = self._service, Headers(scope=scope)
        if service.hosts is not None:  # a page of some site, under a name of its own
            host = headers.get("host", "").lower()
            name = host if host.endswith("]") else host.rpartition(":")[0] or host
            if name not in service.hosts:
                return Refusal(403, "this server answers to its own address only")
        if scope["path"] == "/health":
            return None
        if service.api_key is not None:
            scheme, _, key = headers.get("authorization", "").partition(" ")
            # Bytes: compare_digest takes no text beyond ASCII.
            same = hmac.compare_digest(key.strip().encode(), service.api_key.encode())
            if scheme.lower() != "bearer" or not same:
                message = "expected the header Authorization: Bearer API_KEY"
                ask = (("www-authenticate", "Bearer"), *CLOSE)
                return Refusal(401, message, code="invalid_api_key", headers=ask)
        if service.draining and scope["path"] != "/metrics":
            return Refusal(503, "this server is going down", headers=CLOSE)
        return None


async def _generate(service: Service, request: Request, kind: Kind) -> Response:
    body = await _read(request, service.limits)
    began = time.monotonic()
    ask = parse(body, kind, service.rules)
    if kind == "chat":
        ask.options["stop_ids"] += service.turn_ends
    prompts = await run_in_threadpool(_prompts, service, ask)
    asked = [
        (prompt, ask.sampling(k, len(prompt), service.rules))
        for prompt in prompts
        for k in range(ask.n)
    ]
    group = service.worker.submit(asked, seconds=service.limits.timeout)
    answer = Answer(
        ask, prompts, group, tokenizer=service.tokenizer, name=service.namer,
        model=service.rules.model,
    )  # fmt: skip
    try:
        if not ask.stream:
            said = await _while_heard(request, answer.whole())
            service.metrics.answer.observe(time.monotonic() - began)
            group.close()
            return Response(said, media_type="application/json")
        stream = answer.stream()
        first = await _while_heard(request, anext(stream))
        service.metrics.first_token.observe(time.monotonic() - began)
    except BaseException:
        group.close()
        raise
    return _Events(service, answer, first, stream, group.close, began)


class _Events(StreamingResponse):
    """Server-sent events; however it ends, nothing goes on in the engine."""

    def __init__(self, service, answer, first, rest, close, began):
        async def content() -> AsyncIterator[bytes]:
            yield first
            async for event in rest:
                yield event
            service.metrics.answer.observe(time.monotonic() - began)

        headers = {"cache-control": "no-cache", "x-accel-buffering": "no"}
        super().__init__(content(), media_type="text/event-stream", headers=headers)
        self._close = close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._close()


async def _read(request: Request, limits: Limits) -> bytes:
    """The body. Raises: Refusal: not JSON, too large, too slow."""
    kind = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        message = f"expected content-type application/json, got {kind[:99]!r}"
        raise Refusal(415, message, headers=CLOSE)
    large = Refusal(413, f"the body is over {limits.max_body} bytes", headers=CLOSE)
    length = request.headers.get("content-length", "0")
    if not length.isdecimal() or int(length[:20]) > limits.max_body:
        raise large
    body = bytearray()
    try:
        async with asyncio.timeout(limits.read_timeout):
            async for part in request.stream():
                body += part
                if len(body) > limits.max_body:
                    raise large
    except TimeoutError:
        message = f"the body did not come within {limits.read_timeout:g} s"
        raise Refusal(408, message, headers=CLOSE) from None
    except ClientDisconnect:
        raise gone() from None
    return bytes(body)


def _prompts(service: Service, ask: Ask) -> list[list[int]]:
    """Token ids of each prompt. Runs in a thread: a long text takes a while."""
    try:
        if ask.kind == "chat":
            ids = templates.render(ask.messages, service.template, service.tokenizer)
            return [list(ids)]
        return [
            service.tokenizer.encode(one) if isinstance(one, str) else list(one)
            for one in ask.prompts
        ]
    except MptError as error:
        field = "messages" if ask.kind == "chat" else "prompt"
        raise Refusal(400, str(error), field) from None


async def _while_heard(request: Request, work: Coroutine[Any, Any, bytes]) -> bytes:
    """The result of ``work``; it is cancelled when the client has gone.

    Raises: Refusal: that of ``work``, or one that nobody is left to read.
    """

    async def listen() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(work), asyncio.ensure_future(listen())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if tasks[0].done():
            return tasks[0].result()
        raise gone()
    finally:
        for task in tasks:
            task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await asyncio.gather(*tasks, return_exceptions=True)


def gone() -> Refusal:
    """Nobody is left to read it; the metrics count it."""
    return Refusal(499, "the client has gone")


def _model(service: Service) -> dict[str, Any]:
    rules = service.rules
    return {"id": rules.model, "object": "model", "created": service.created,
            "owned_by": "mpt_jax", "max_model_len": rules.context}  # fmt: skip


def _json(value: Any, *, status: int = 200, headers: Any = ()) -> Response:
    kind, headers = "application/json", dict(headers)
    return Response(to_json(value), status, headers=headers, media_type=kind)


def _answer(refusal: Refusal) -> Response:
    return _json(refusal.body(), status=refusal.status, headers=refusal.headers)


async def _refused(request: Request, refusal: Exception) -> Response:
    assert isinstance(refusal, Refusal)
    return _answer(refusal)


async def _no_route(request: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    message = f"{request.method} {request.url.path[:99]}: {error.detail}"
    headers = tuple((error.headers or {}).items())
    return _answer(Refusal(error.status_code, message, headers=(*headers, *CLOSE)))


async def _broken(request: Request, error: Exception) -> Response:
    """Starlette raises it again behind this answer, and the log has its stack."""
    return _answer(Refusal(500, "internal error; the server's log says more"))
