"""Breaks a real server: a request of poison, and SIGTERM while streams are under way.

One server serves both, in this order. Beside those of the trainer, in test_faults.py.
"""

import contextlib
import re
import signal
import sys
import threading
import time

import httpx
import pytest

from tests.faults import harness
from tests.serving import checkpoint

SLOTS, CAPACITY, LONG = 2, 512, 480
DRAIN_SECONDS = 60.0
# What a stream that is not drained, but given up, may still take to end.
AT_ONCE_SECONDS = 5.0
# Nothing but letters: no end of text, and no poison that the model makes itself.
LETTERS = {"ignore_eos": True, "logit_bias": {"33": -100, "256": -100}}


class Running:
    """``python -m mpt_jax.serve`` as a child process."""

    def __init__(self, root, name="server", **flags):
        folder = root / "model"
        if not folder.exists():
            checkpoint.write(folder, poison="!")
        flags = {"checkpoint": folder, "tokenizer": "bytes", "port": 0, "slots": SLOTS,
                 "capacity": CAPACITY, "drain": DRAIN_SECONDS} | flags  # fmt: skip
        words = [w for k, v in flags.items() for w in (f"--{k}", str(v))]
        command = [sys.executable, "-m", "mpt_jax.serve", *words]
        self.process = harness.Trainer(command, root / name)
        self.process.until(lambda: "serving model" in self.process.output(), "a line")
        self.url = re.search(r"at (http://\S+)/v1", self.process.output())[1]

    def get(self, path):
        return httpx.get(f"{self.url}{path}", timeout=60)

    def complete(self, prompt, n=LONG):
        body = {"prompt": prompt, "max_tokens": n, "temperature": 0} | LETTERS
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=120)

    def stream(self, prompt, found, n=LONG):
        """Appends the events of a stream to ``found`` as they come."""
        body = {"prompt": prompt, "max_tokens": n, "temperature": 0, "stream": True}
        address = f"{self.url}/v1/completions"
        with (
            contextlib.suppress(httpx.HTTPError),
            httpx.stream("POST", address, json=body | LETTERS, timeout=120) as answer,
        ):
            found.append(answer.status_code)
            found.extend(line for line in answer.iter_lines() if line)

    def streams(self, prompts, n=LONG):
        """(threads, their lists), once all are taken and one has its first tokens.

        One that waits for a slot has no status yet: the server itself is asked.
        """
        lists = [[] for _ in prompts]
        threads = [
            threading.Thread(target=self.stream, args=(p, found, n))
            for p, found in zip(prompts, lists, strict=True)
        ]
        for thread in threads:
            thread.start()

        def taken():
            text = self.get("/metrics").text
            busy, waiting = (
                float(re.search(rf"^{name} (\S+)$", text, re.MULTILINE)[1])
                for name in ("mpt_slots_busy", "mpt_queue")
            )
            done = sum(found[-1:] == ["data: [DONE]"] for found in lists)
            return busy + waiting + done >= len(lists)

        self.process.until(taken, "all requests")
        self.process.until(lambda: any(len(f) > 3 for f in lists), "a token")
        return threads, lists


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    root = tmp_path_factory.mktemp("servers")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("JAX_COMPILATION_CACHE_DIR", str(root / "compiled"))
        yield root


@pytest.fixture(scope="module")
def running(root):
    made = Running(root)
    yield made
    if made.process.process.poll() is None:
        made.process.kill()


@contextlib.contextmanager
def recorded(record_property, id, text):
    """Tells conftest.py what came of a fault; the body fills the detail."""
    began, detail = time.monotonic(), {}
    line = {"id": id, "fault": text, "passed": False}
    try:
        yield detail
        line["passed"] = True
    finally:
        seconds = round(time.monotonic() - began, 1)
        record_property("fault", line | {"seconds": seconds, "detail": detail})


def whole(events):
    """A stream that ended as it should."""
    return (
        events[0] == 200 and events[-1] == "data: [DONE]" and '"length"' in events[-2]
    )


def test_a_poisoned_request_fails_alone(running, record_property):
    text = "a request whose logits are not finite, among streams"
    with recorded(record_property, "F33", text) as detail:
        expected = running.complete("hello").json()["choices"][0]["text"]
        threads, lists = running.streams(["hello"] * 3)
        answers = [running.complete("hi! there", 4) for _ in range(3)]
        for thread in threads:
            thread.join()
        assert [a.status_code for a in answers] == [500] * 3
        assert "not finite" in answers[0].json()["error"]["message"]
        assert all(map(whole, lists))
        assert running.complete("hello").json()["choices"][0]["text"] == expected
        assert running.get("/health").json() == {"status": "ok"}
        metrics = running.get("/metrics").text
        assert "mpt_slots_busy 0.0" in metrics
        assert 'mpt_finished_total{reason="error"} 3.0' in metrics
        detail |= {"failed": 3, "streams_whole": len(lists)}


def test_sigterm_finishes_what_is_under_way(running, record_property):
    with recorded(record_property, "F34", "SIGTERM with streams under way") as detail:
        threads, lists = running.streams(["hello"] * (3 * SLOTS))
        began = time.monotonic()
        running.process.signal(signal.SIGTERM)
        running.process.until(lambda: "draining" in running.process.output(), "a line")
        new, health = running.complete("hello", 4), running.get("/health")
        assert (new.status_code, health.status_code) == (503, 503)
        assert health.json() == {"status": "draining"}
        assert any(thread.is_alive() for thread in threads)
        said = running.process.finish(0)
        detail["drained_seconds"] = round(time.monotonic() - began, 1)
        for thread in threads:
            thread.join()
        assert all(map(whole, lists)), said
        assert detail["drained_seconds"] < DRAIN_SECONDS
        detail |= {"streams_whole": len(lists), "refused": 1}


@pytest.mark.slow
def test_what_cannot_be_drained_is_given_up(root):
    running = Running(root, "given-up", drain=0.5, slots=1)
    threads, lists = running.streams(["hello"] * 8)
    began = time.monotonic()
    running.process.signal(signal.SIGTERM)
    said = running.process.finish(0)
    assert time.monotonic() - began < AT_ONCE_SECONDS * harness.patience()
    for thread in threads:
        thread.join()
    assert not all(map(whole, lists))
    assert re.search(r"gave up \d requests", said)


@pytest.mark.slow
def test_a_second_sigterm_ends_at_once(root):
    running = Running(root, "at-once", slots=1)
    threads, _ = running.streams(["hello"] * 8)
    running.process.signal(signal.SIGTERM)
    running.process.until(lambda: "draining" in running.process.output(), "a line")
    running.process.signal(signal.SIGTERM)
    began = time.monotonic()
    running.process.finish(128 + signal.SIGTERM)
    assert time.monotonic() - began < AT_ONCE_SECONDS
    for thread in threads:
        thread.join()
