"""The server on real sockets: who is slow, who goes away, who breaks the protocol."""

import asyncio
import contextlib
import socket
import threading
import time

import httpx
import openai
import pytest

from mpt_jax.errors import EXIT_INTERNAL
from mpt_jax.serving import server
from mpt_jax.serving.app import Limits
from tests.serving import fake
from tests.serving.fake import answer

HEAD = b"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\n"
HEALTHY_SECONDS = 5.0  # that a short request may take while others misbehave


@contextlib.contextmanager
def serving(engine=None, **keys):
    service = fake.service(engine, **keys)
    with fake.running(service) as url:
        yield service, url
        assert fake.settled(service)


def ask(url, prompt="hello", n=8, **keys):
    base = {"base_url": f"{url}/v1", "api_key": "none", "timeout": 60}
    client = openai.OpenAI(**base, max_retries=0)
    with client:
        found = client.completions.create(
            model=fake.MODEL, prompt=prompt, max_tokens=n, **keys
        )
        return found.choices[0].text if not keys.get("stream") else list(found)


def connect(url):
    host, port = url.removeprefix("http://").split(":")
    return socket.create_connection((host, int(port)), timeout=30)


def sent(url, data):
    """The status line that ``data`` is answered with; b"" if it is not."""
    with connect(url) as wire:
        wire.sendall(data)
        with contextlib.suppress(ConnectionError):
            return wire.recv(65536).partition(b"\r\n")[0]
        return b""


def test_the_openai_client_streams_over_a_socket():
    with serving() as (_, url):
        assert ask(url) == answer("hello", 8)
        chunks = ask(url, stream=True)
        assert "".join(c.choices[0].text for c in chunks) == answer("hello", 8)


@pytest.mark.parametrize("stream", [False, True])
def test_who_goes_away_frees_the_slot(stream):
    """200 requests that nobody waits for, and a short one right after them."""
    engine = fake.FakeEngine(n_slots=4, seconds=0.01)
    with serving(engine, max_queue=300) as (service, url):

        async def abandon(client):
            body = {"prompt": "x", "max_tokens": 250, "stream": stream}
            with contextlib.suppress(httpx.TimeoutException):
                await client.post(f"{url}/v1/completions", json=body, timeout=0.5)

        async def all_of_them():
            limits = httpx.Limits(max_connections=None)
            async with httpx.AsyncClient(limits=limits) as client:
                await asyncio.gather(*(abandon(client) for _ in range(200)))

        asyncio.run(all_of_them())
        began = time.monotonic()
        assert ask(url) == answer("hello", 8)
        assert time.monotonic() - began < HEALTHY_SECONDS
        assert fake.settled(service)


def test_slow_clients_are_cut_off_and_hurt_nobody():
    """300 half heads and half bodies; then each is closed by its timeout."""
    limits = Limits(read_timeout=1.5)
    halves = (HEAD[:30], HEAD + b"content-length: 99\r\n\r\n{", b"")
    with serving(limits=limits) as (service, url), contextlib.ExitStack() as stack:
        wires = []
        for i in range(300):  # each has read_timeout from its own connect() on
            wires.append(stack.enter_context(connect(url)))
            wires[-1].sendall(halves[i % 3])
        began = time.monotonic()
        assert ask(url) == answer("hello", 8)
        assert time.monotonic() - began < HEALTHY_SECONDS
        for i, wire in enumerate(wires):
            with contextlib.suppress(ConnectionError):
                heard = wire.recv(100)
                assert heard.startswith(b"HTTP/1.1 408" if i % 3 == 1 else b"")
                assert i % 3 == 1 or not heard
        assert ask(url) == answer("hello", 8)
        assert fake.settled(service)


def test_a_second_head_may_not_trickle_either():
    with serving(limits=Limits(read_timeout=1.0)) as (_, url), connect(url) as wire:
        wire.sendall(b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n")
        assert wire.recv(1000).startswith(b"HTTP/1.1 200")
        wire.sendall(b"GET /he")
        began = time.monotonic()
        with contextlib.suppress(ConnectionError):
            while wire.recv(1000):
                pass
        assert time.monotonic() - began < HEALTHY_SECONDS


def test_who_does_not_read_is_cut_off(monkeypatch):
    monkeypatch.setattr(server, "WRITE_SECONDS", 0.3)
    prompts = '["' + '","'.join("x" * 200 for _ in range(200)) + '"]'
    body = f'{{"prompt": {prompts}, "max_tokens": 50, "stream": true, "echo": true}}'
    head = HEAD + f"content-length: {len(body)}\r\n\r\n".encode()
    with serving(max_queue=300) as (service, url), connect(url) as wire:
        wire.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        wire.sendall(head + body.encode())
        assert fake.settled(service, seconds=30)


def test_there_is_a_limit_on_connections(monkeypatch):
    monkeypatch.setattr(server, "MAX_CONNECTIONS", 5)
    with serving() as (_, url), contextlib.ExitStack() as stack:
        held = [stack.enter_context(connect(url)) for _ in range(5)]
        for wire in held:
            wire.sendall(b"GET /hea")
        time.sleep(0.2)
        assert sent(url, b"GET /health HTTP/1.1\r\nhost: x\r\n\r\n") == b""
        held[0].sendall(b"lth HTTP/1.1\r\nhost: x\r\n\r\n")
        assert held[0].recv(1000).startswith(b"HTTP/1.1 200")


BROKEN = {
    "no HTTP": (b"hello\r\n\r\n", b"400"),
    "a negative length": (HEAD + b"content-length: -5\r\n\r\n", b"400"),
    "a length of letters": (HEAD + b"content-length: abc\r\n\r\n", b"400"),
    "two lengths": (HEAD + b"content-length: 1\r\ncontent-length: 2\r\n\r\n", b"400"),
    "a length of 30 digits": (
        HEAD + b"content-length: " + b"9" * 30 + b"\r\n\r\n", b"4"),
    "a body of many bytes": (HEAD + b"content-length: 3000000\r\n\r\n", b"413"),
    "chunks of many bytes": (
        HEAD + b"transfer-encoding: chunked\r\n\r\n2DC6C0\r\n" + b" " * 3_000_000,
        b"413"),
    "a bad chunk": (HEAD + b"transfer-encoding: chunked\r\n\r\nzz\r\n", b"400"),
    "an address of 70 kB": (
        b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\nhost: x\r\n\r\n", b"4"),
    "200,000 headers": (
        b"GET /health HTTP/1.1\r\nhost: x\r\n" + b"a: b\r\n" * 200_000 + b"\r\n",
        b"400"),
    "GET of a POST": (b"GET /v1/completions HTTP/1.1\r\nhost: x\r\n\r\n", b"405"),
    "an upgrade": (
        b"GET /health HTTP/1.1\r\nhost: x\r\nconnection: upgrade\r\n"
        b"upgrade: websocket\r\n\r\n", b"200"),
}  # fmt: skip


def test_a_broken_request_is_refused(caplog):
    with serving() as (_, url):
        for name, (data, status) in BROKEN.items():
            found = sent(url, data)
            assert found.startswith(b"HTTP/1.1 " + status), f"{name}: {found}"
            assert "Traceback" not in caplog.text
        assert ask(url) == answer("hello", 8)


def test_a_dead_engine_ends_the_server():
    service = fake.service()
    bound, codes = server.bind("127.0.0.1", 0), []
    made = server.Server(service, drain=5)
    thread = threading.Thread(target=lambda: codes.append(made.serve_until_done(bound)))
    thread.start()
    url = server.url(bound)
    while not made.started:
        time.sleep(0.01)
    with pytest.raises(openai.InternalServerError, match="the engine has stopped"):
        ask(url, "~")
    assert httpx.get(f"{url}/health").status_code == 503
    thread.join(30)
    assert codes == [EXIT_INTERNAL]
    bound.close()


def test_an_address_that_is_taken_is_an_error():
    with server.bind("127.0.0.1", 0) as bound:
        bound.listen()
        with pytest.raises(server.UserError, match=r"cannot listen at 127\.0\.0\.1"):
            server.bind("127.0.0.1", bound.getsockname()[1])


@pytest.mark.parametrize(
    ("host", "expected"),
    [("localhost", True), ("127.0.0.1", True), ("127.8.8.8", True), ("::1", True),
     ("0.0.0.0", False), ("::", False), ("example.org", False), ("", False)],
)  # fmt: skip
def test_loopback(host, expected):
    assert server.is_loopback(host) is expected
