"""Sockets, signals and the end: uvicorn, with the timeouts that it lacks.

Before its head has come, a request is nobody's but uvicorn's, which waits for ever for
a client that sends a byte a minute, or never reads. Those are cut off here.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import logging
import os
import socket
import sys
import time
from types import FrameType
from typing import Any

import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from mpt_jax.errors import EXIT_INTERNAL, EXIT_OK, UserError
from mpt_jax.serving.app import Service, make_app

# Below the 1,024 files that a process may open by default.
MAX_CONNECTIONS = 512
WRITE_SECONDS = 30.0  # for a client to take some of what it was sent
TICK_SECONDS = 0.1
LAST_WORDS_SECONDS = 1.0  # for 503s, once the engine is dead

log = logging.getLogger(__name__)


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(host).is_loopback
    return False


def bind(host: str, port: int) -> socket.socket:
    """A socket that does not listen yet. Raises: UserError: the address is taken."""
    with contextlib.ExitStack() as undo:
        try:
            found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
            family, kind, _, _, address = found[0]
            bound = undo.enter_context(socket.socket(family, kind))
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            bound.bind(address)
        except OSError as error:
            message = f"cannot listen at {host} port {port}: {error}"
            raise UserError(message) from None
        undo.pop_all()
        return bound


def url(bound: socket.socket) -> str:
    host, port = bound.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


def timed_protocol(head_seconds: float) -> type[H11Protocol]:
    """uvicorn's HTTP/1.1 with a limit on connections, slow heads and slow readers."""

    class Timed(H11Protocol):
        _alarms: dict[str, asyncio.TimerHandle]

        def connection_made(self, transport: Any) -> None:
            self._alarms = {}
            super().connection_made(transport)
            if len(self.connections) > MAX_CONNECTIONS:
                transport.abort()
            self._arm("head", head_seconds)

        def data_received(self, data: bytes) -> None:
            super().data_received(data)
            # No request, or the next one, of which some bytes are there.
            if self.cycle is None or self.cycle.response_complete:
                self._arm("head", head_seconds)
            else:
                self._disarm("head")

        def pause_writing(self) -> None:
            super().pause_writing()
            self._arm("write", WRITE_SECONDS)

        def resume_writing(self) -> None:
            super().resume_writing()
            self._disarm("write")

        def connection_lost(self, exc: Exception | None) -> None:
            for name in list(self._alarms):
                self._disarm(name)
            super().connection_lost(exc)

        def _arm(self, name: str, seconds: float) -> None:
            """Bytes that trickle in do not put off an alarm that is set."""
            if name not in self._alarms:
                abort = self.transport.abort
                self._alarms[name] = self.loop.call_later(seconds, abort)

        def _disarm(self, name: str) -> None:
            if alarm := self._alarms.pop(name, None):
                alarm.cancel()

    return Timed


class Server(uvicorn.Server):
    """Drains at the first SIGTERM or SIGINT, and ends at once at the second."""

    def __init__(self, service: Service, *, drain: float):
        self._service, self._drain = service, drain
        config = uvicorn.Config(
            make_app(service),
            http=timed_protocol(service.limits.read_timeout),
            ws="none", lifespan="off", log_config=None, access_log=False,
            server_header=False, proxy_headers=False, timeout_graceful_shutdown=1,
        )  # fmt: skip
        super().__init__(config)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.draining:
            os._exit(128 + sig)
        self._service.draining = True

    def serve_until_done(self, bound: socket.socket) -> int:
        """Serves on ``bound``; returns the exit code."""
        try:
            asyncio.run(self._both(bound))
        finally:
            self._service.worker.stop()
        return EXIT_OK if self._service.worker.failure is None else EXIT_INTERNAL

    async def _both(self, bound: socket.socket) -> None:
        watch = asyncio.create_task(self._watch())
        try:
            await self.serve(sockets=[bound])
        finally:
            watch.cancel()

    async def _watch(self) -> None:
        """Sets should_exit: drained, or out of time, or the engine is dead."""
        service = self._service
        end: float | None = None
        while True:
            await asyncio.sleep(TICK_SECONDS)
            now = time.monotonic()
            if service.worker.failure is not None:
                end = end or now + LAST_WORDS_SECONDS
            elif service.draining:
                if end is None:
                    end = now + self._drain
                    say(f"draining: {service.in_flight} requests, {self._drain:g} s")
                if service.in_flight == 0:
                    break
            if end is not None and now >= end:
                break
        if service.in_flight:
            say(f"gave up {service.in_flight} requests")
        self.should_exit = True


def say(text: str) -> None:
    """One line to stderr; a closed one is no reason to end."""
    with contextlib.suppress(OSError, ValueError):
        print(f"mpt_jax.serve: {text}", file=sys.stderr, flush=True)
