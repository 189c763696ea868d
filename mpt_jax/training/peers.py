"""The other processes of a job: whether all have come, and whether they still live.

JAX finds a dead process after 100 s and a stuck one never; then it aborts the others
with no name. Here every process keeps a connection to process 0::

    at the start    process 0 listens at the coordinator's address until all have come,
                    and JAX takes the port when it is done: no second one is needed
    afterwards      each says every second how far it is
    a process dies  the kernel closes its connection: known at once
    is stopped      it is silent: known after processes.silence_seconds
    is stuck        everyone's watchdog asks behind() which one the others wait for

Process 0 tells all others, and everyone exits, for their supervisors to start again.
Messages are lines of JSON: like JAX's own, for a private network only.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import selectors
import socket
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

from mpt_jax import errors
from mpt_jax.config import ProcessesConfig
from mpt_jax.errors import ConfigError, PeerError
from mpt_jax.runtime import Cluster
from mpt_jax.training.progress import say

BEAT_SECONDS = 1.0
LOOK_SECONDS = 0.25  # of the watching thread; a message wakes it at once
NEWS_SECONDS = 10.0  # between two lines that say who is missing
RETRY_SECONDS = 0.2
SEND_SECONDS = 5.0  # a beat is 100 bytes: only a peer that is lost blocks it
LINGER_SECONDS = 1.0  # of process 0, for its last words to arrive
BLAME_SECONDS = 3.0  # from a failed collective to the news of who failed it
MAX_LINE = 1 << 18  # bytes; a config is 10,000
# How a process ended that ends the others alike: all of them started again would only
# end so again, or have nothing to do. After any other end they have lost a peer.
SHARED = (
    errors.EXIT_OK, errors.EXIT_USER, errors.EXIT_STUCK, errors.EXIT_DIVERGED,
)  # fmt: skip


class _Line:
    """A connection that carries a JSON object a line."""

    def __init__(self, connection: socket.socket):
        connection.settimeout(SEND_SECONDS)
        self.socket, self._rest, self._lock = connection, b"", threading.Lock()

    def send(self, **message: Any) -> None:
        """If it can: that the other end is gone, receive() says."""
        with self._lock, contextlib.suppress(OSError):
            self.socket.sendall(json.dumps(message).encode() + b"\n")

    def receive(self) -> list[dict[str, Any]]:
        """What has come. Raises: EOFError: the end, or something that is not ours."""
        try:
            content = self.socket.recv(1 << 16)
        except TimeoutError:
            return []
        except OSError:
            content = b""
        *lines, self._rest = (self._rest + content).split(b"\n")
        try:
            messages = [json.loads(line) for line in lines]
        except (ValueError, RecursionError):
            raise EOFError from None
        ours = all(isinstance(message, dict) for message in messages)
        if not (content and ours and len(self._rest) <= MAX_LINE):
            raise EOFError
        return messages


@dataclasses.dataclass
class _Peer:
    """Another process. at: its batches so far; doing: what it said last."""

    line: _Line
    name: str
    runs: Mapping[str, str] = dataclasses.field(default_factory=dict)
    at: int = 0
    doing: str = "starting"
    silent: int = 0  # beats without a word
    done: bool = False  # it has said that it is


class Peers:
    """The other processes of ``cluster``; none, and nothing to do, where it is None.

    where: says how far this process is: batches so far, and what it does.

    Args: die: ends this process at once, as its main thread may wait for a dead one.
    """

    def __init__(
        self,
        cluster: Cluster | None,
        config: ProcessesConfig,
        *,
        die: Callable[[int], object] = os._exit,
    ):
        self.where: Callable[[], tuple[int, str]] = lambda: (0, "starting")
        self._cluster, self._config, self._die = cluster, config, die
        self._peers: dict[int, _Peer] = {}  # of process 0: all; of others: process 0
        self._behind = ""
        self._ending, self._closed = threading.Lock(), threading.Event()
        self._thread = threading.Thread(target=self._watch, name="peers", daemon=True)
        if cluster is not None:
            self.name = (
                f"process {cluster.process} (host {socket.gethostname()}, "
                f"pid {os.getpid()})"
            )

    # --------------------------------------------------------------------- meeting

    def meet(self, runs: Mapping[str, str]) -> None:
        """Returns when all have come, and watches them from then on.

        Args: runs: what this process is about to run, the same for all.
        Raises:
          PeerError: names those who have not come in processes.arrival_seconds.
          ConfigError: another process is to run something else, or is this one.
        """
        if self._cluster is None:
            return
        try:
            if self._cluster.process == 0:
                self._gather(dict(runs))
            else:
                self._join(dict(runs))
        except errors.MptError as error:
            self._pass_on(error.message, error.exit_code)
            self._hang_up()
            raise
        self._thread.start()

    def _gather(self, runs: dict[str, str]) -> None:
        news, deadline = _News(), time.monotonic() + self._config.arrival_seconds
        with (
            self._listen() as server,
            selectors.DefaultSelector() as selector,
            contextlib.ExitStack() as strangers,
        ):
            selector.register(server, selectors.EVENT_READ)
            while missing := self._missing():
                if time.monotonic() > deadline:
                    raise PeerError(self._absent(missing))
                for key, _ in selector.select(LOOK_SECONDS):
                    if key.data is None:
                        line = _Line(server.accept()[0])
                        strangers.callback(self._dismiss, line)
                        selector.register(line.socket, selectors.EVENT_READ, line)
                    elif not self._admit(key.data, runs):
                        selector.unregister(key.fileobj)
                        key.data.socket.close()
                self._tell(missing=missing)
                news.say(f"waiting for {self._named(missing)}")
        self._tell(welcome=self.name)

    def _dismiss(self, line: _Line) -> None:
        if all(peer.line is not line for peer in self._peers.values()):
            line.socket.close()

    def _listen(self) -> socket.socket:
        """As JAX will: on one address where that is this machine's own, else on all."""
        host, port = self._cluster.address
        waiting = self._cluster.processes
        try:
            if self._cluster.loopback:
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                return socket.create_server(
                    (host, port), family=family, backlog=waiting
                )
            both = socket.has_dualstack_ipv6()
            family = socket.AF_INET6 if both else socket.AF_INET
            return socket.create_server(
                ("", port), family=family, backlog=waiting, dualstack_ipv6=both
            )
        except OSError as error:
            raise PeerError(
                f"cannot listen: {error.strerror or error}; does an earlier run still "
                "hold the port?",
                location=self._cluster.coordinator,
            ) from None

    def _admit(self, line: _Line, runs: dict[str, str]) -> bool:
        """Reads from someone who has come; False: an end of it, or a stranger."""
        known = [process for process, peer in self._peers.items() if peer.line is line]
        try:
            messages = line.receive()
        except EOFError:
            for process in known:  # it may come again: its supervisor restarts it
                del self._peers[process]
            return False
        for message in messages:
            if known and "end" in message:
                raise _error(message)
            process, name = message.get("process"), str(message.get("name"))
            if process not in range(1, self._cluster.processes):
                return False
            if process in self._peers:
                other = self._peers[process].name
                line.send(end=f"{name}: {other} has come before", code=errors.EXIT_USER)
                return False
            self._peers[process] = _Peer(line, name)
            found = _differences(runs, message.get("runs"), name)
            if found:
                raise ConfigError(found)
        return True

    def _join(self, runs: dict[str, str]) -> None:
        """Comes to process 0, again and again until it is there and all have come."""
        address, process = self._cluster.address, self._cluster.process
        # Process 0 knows more, so that its reason to give up should come first.
        deadline = time.monotonic() + self._config.arrival_seconds + SEND_SECONDS
        news, missing, reason = _News(), [0], "no answer"
        while time.monotonic() < deadline:
            try:
                line = _Line(socket.create_connection(address, SEND_SECONDS))
            except OSError as error:
                reason = error.strerror or str(error)
                news.say(f"waiting for process 0 at {self._cluster.coordinator}")
                time.sleep(RETRY_SECONDS)
                continue
            self._peers[0] = peer = _Peer(line, "process 0")
            line.send(process=process, name=self.name, runs=runs)
            with contextlib.suppress(EOFError):  # it ended, or is of an earlier run
                while time.monotonic() < deadline:
                    for message in line.receive():
                        if "end" in message:
                            raise _error(message)
                        if "welcome" in message:
                            peer.name = str(message["welcome"])
                            return
                        missing = message.get("missing", missing)
                    news.say(f"waiting for {self._named(missing)}")
            line.socket.close()
            reason = "it closed the connection"
            time.sleep(RETRY_SECONDS)
        raise PeerError(f"{self._absent(missing)} (process 0: {reason})")

    def _missing(self) -> list[int]:
        return [p for p in range(1, self._cluster.processes) if p not in self._peers]

    def _named(self, missing: list[int]) -> str:
        shown = ", ".join(map(str, missing[:8])) + ("..." if missing[8:] else "")
        return f"{len(missing)} of {self._cluster.processes} processes: {shown}"

    def _absent(self, missing: list[int]) -> str:
        return (
            f"{self._named(missing)} did not come to {self._cluster.coordinator} in "
            f"{self._config.arrival_seconds:g} s"
        )

    # -------------------------------------------------------------------- watching

    def behind(self) -> str:
        """Which processes the others wait for; "" where none is behind."""
        return self._behind

    def _watch(self) -> None:
        told = 0.0
        with selectors.DefaultSelector() as selector:
            for peer in self._peers.values():
                selector.register(peer.line.socket, selectors.EVENT_READ, peer)
            while not self._closed.is_set():
                for key, _ in selector.select(LOOK_SECONDS):
                    if not self._hear(key.data):
                        selector.unregister(key.fileobj)
                if time.monotonic() - told >= BEAT_SECONDS:
                    told = time.monotonic()
                    self._beat()

    def _hear(self, peer: _Peer) -> bool:
        """Reads from a peer; False at its end."""
        try:
            messages = peer.line.receive()
        except EOFError:
            if not peer.done:
                self._lose(peer, "its connection closed")
            return False
        peer.silent = 0
        for message in messages:
            if "end" in message:
                self._end(str(message["end"]), message.get("code"))
            peer.done = peer.done or "done" in message
            peer.at, peer.doing = message.get("at", peer.at), message.get("doing", "")
            self._behind = message.get("behind", self._behind)
        return True

    def _beat(self) -> None:
        at, doing = self.where()
        if self._cluster.process == 0:
            ahead = max(at, *(peer.at for peer in self._peers.values()))
            rows = [(self.name, at, doing)]
            rows += [(peer.name, peer.at, peer.doing) for peer in self._peers.values()]
            late = [f"{name} ({doing})" for name, at, doing in rows if at < ahead]
            self._behind = f"all wait for {', '.join(late[:8])}" if late else ""
            self._tell(at=at, doing=doing, behind=self._behind)
        else:
            self._tell(at=at, doing=doing)
        # In beats, not by the clock: a process that was stopped did not listen.
        limit = self._config.silence_seconds / BEAT_SECONDS
        for peer in self._peers.values():
            peer.silent += 1
            if peer.silent > limit and not peer.done:
                self._lose(peer, f"silent for {self._config.silence_seconds:g} s")

    def _lose(self, peer: _Peer, how: str) -> None:
        self._end(f"{peer.name} is lost: {how}", errors.EXIT_PEER_LOST)

    def _end(self, why: str, code: Any) -> None:
        """Ends this process, and through process 0 all others."""
        if not self._ending.acquire(blocking=False):
            return
        code = code if code in SHARED else errors.EXIT_PEER_LOST
        # Not in this thread: what reads stderr may be what is stuck.
        report = threading.Thread(target=say, args=(f"{why}; exit {code}",))
        report.daemon = True
        report.start()
        self._pass_on(why, code)
        report.join(SEND_SECONDS)
        self._die(code)

    def _pass_on(self, why: str, code: int) -> None:
        self._tell(end=why, code=code)
        if self._cluster.process == 0:
            # A connection that is closed with something unread in it takes back what
            # was sent: reads on until the others have left.
            deadline = time.monotonic() + LINGER_SECONDS
            lines = [peer.line for peer in self._peers.values()]
            while lines and time.monotonic() < deadline:
                for line in list(lines):
                    line.socket.settimeout(RETRY_SECONDS / len(lines))
                    try:
                        line.receive()
                    except EOFError:
                        lines.remove(line)

    def _tell(self, **message: Any) -> None:
        for peer in list(self._peers.values()):
            if not peer.done:
                peer.line.send(**message)

    # ----------------------------------------------------------------------- ending

    def leave(self, code: int, why: str) -> None:
        """Tells all that this process ends with ``code``: they end, too.

        Says nothing where they do already.
        """
        if self._peers and self._ending.acquire(blocking=False):
            why = f"{self.name} left, exit {code}: {why}"
            self._pass_on(why, code if code in SHARED else errors.EXIT_PEER_LOST)

    def blame(self) -> None:
        """After a failed collective: time for the news of a lost peer to end this."""
        if self._peers:
            time.sleep(BLAME_SECONDS)

    def close(self) -> None:
        """Returns when all are done; ends this process if one is lost before."""
        if self._thread.is_alive():
            first = self._cluster.process == 0
            if not first:
                self._tell(done=True)
            while not all(peer.done for peer in self._peers.values()):
                time.sleep(LOOK_SECONDS / 5)
            if first:
                for peer in self._peers.values():
                    peer.line.send(done=True)
            self._closed.set()
            self._thread.join()
        self._hang_up()

    def _hang_up(self) -> None:
        while self._peers:
            self._peers.popitem()[1].line.socket.close()


class _News:
    """Says something now and then, and not at once: most waits are short."""

    def __init__(self) -> None:
        self._next = time.monotonic() + NEWS_SECONDS / 5

    def say(self, text: str) -> None:
        if time.monotonic() > self._next:
            self._next = time.monotonic() + NEWS_SECONDS
            say(text)


def _error(message: Mapping[str, Any]) -> errors.MptError:
    why = str(message["end"])
    user = message.get("code") == errors.EXIT_USER
    return ConfigError([why]) if user else PeerError(why)


def _differences(runs: Mapping[str, str], other: Any, name: str) -> list[str]:
    other = other if isinstance(other, dict) else {}
    return [
        f"{key}: {runs.get(key)} for process 0, {other.get(key)} for {name}"
        for key in sorted(runs.keys() | other.keys())
        if runs.get(key) != other.get(key)
    ]
