"""Requests and command lines that are wrong, and what is said: one row for each.

As in test_bad_inputs.py, each is tried and called clear (a 4xx whose error names what
is wrong; of a command line, exit code 2), silent, traceback (a 5xx or an exception) or
hang. The application runs without sockets, around an engine of known arithmetic.
"""

import asyncio
import json
import re

import pytest

from mpt_jax import serve
from mpt_jax.errors import EXIT_USER
from mpt_jax.serving.app import Limits
from tests.bad_inputs.test_bad_inputs import outcome
from tests.serving import fake

TEXT, CHAT = "/v1/completions", "/v1/chat/completions"
HUGE = "9" * 5000


def prompt(**fields: object) -> bytes:
    return json.dumps({"prompt": "x"} | fields).encode()


def messages(*given: object, **fields: object) -> bytes:
    return json.dumps({"messages": given} | fields).encode()


def user(content: object) -> dict[str, object]:
    return {"role": "user", "content": content}


# Name -> (path, body, status, what is said).
BODIES: dict[str, tuple[str, bytes, int, str]] = {
    "no body": (TEXT, b"", 400, "not JSON: Expecting value"),
    "half a body": (TEXT, b'{"prompt": "x', 400, "not JSON: Unterminated string"),
    "two bodies": (TEXT, prompt() * 2, 400, "not JSON: Extra data"),
    "a list": (TEXT, b"[]", 400, r"expected a JSON object, got \[\]"),
    "a text": (TEXT, b'"x"', 400, "expected a JSON object"),
    "null": (TEXT, b"null", 400, "expected a JSON object"),
    "not UTF-8": (TEXT, b'{"prompt": "\xe9"}', 400, "not UTF-8: byte 12"),
    "UTF-16": (TEXT, prompt().decode().encode("utf-16"), 400, "not UTF-8"),
    "NaN": (TEXT, b'{"prompt": "x", "top_p": NaN}', 400, "NaN is no JSON number"),
    "Infinity": (TEXT, b'{"prompt": "x", "seed": -Infinity}', 400, "-Infinity is"),
    "1e999": (
        TEXT, b'{"prompt": "x", "top_p": 1e999}', 400, r"top_p: .* got inf"),
    "100,000 deep": (
        TEXT, b'{"prompt": ' + b"[" * 10**5 + b"]" * 10**5 + b"}", 400,
        "nested too deeply"),
    "an integer of 5,000 digits": (
        TEXT, f'{{"prompt": "x", "seed": {HUGE}}}'.encode(), 400,
        "not JSON: Exceeds the limit"),
    "an integer of 4,000 digits": (
        TEXT, prompt(seed=10**4000), 400, "seed: expected a whole number in"),
    "a field given twice": (
        TEXT, b'{"prompt": "x", "n": 1, "n": 2}', 400, "'n' is given twice"),
    "200,000 fields": (
        TEXT, json.dumps({f"f{i}": 1 for i in range(200_000)}).encode(), 413,
        "over 2000000 bytes"),
    "100,000 fields": (
        TEXT, json.dumps({f"f{i}": 1 for i in range(100_000)}).encode(), 400,
        "f0: unknown field"),
    "a million ids": (
        TEXT, prompt(prompt=[1] * 600_000), 400, "over this server's context"),
    "an unknown field": (
        TEXT, prompt(max_token=1), 400, "max_token: .* mean 'max_tokens'"),
    "a field of chats": (TEXT, prompt(messages=[]), 400, "messages: unknown"),
    "a field with a lone surrogate": (
        TEXT, b'{"prompt": "x", "\\ud800": 1}', 400, "'.ud800': unknown field"),
    "no prompt": (TEXT, b"{}", 400, "prompt: expected text, token ids"),
    "an empty prompt": (TEXT, prompt(prompt=""), 400, "prompt: expected at least"),
    "no ids": (TEXT, prompt(prompt=[]), 400, "prompt: expected text, token ids"),
    "one prompt without ids": (
        TEXT, prompt(prompt=[[1], []]), 400, "prompt: expected at least one"),
    "a number for a prompt": (TEXT, prompt(prompt=7), 400, "prompt: expected text"),
    "an object for a prompt": (TEXT, prompt(prompt={}), 400, "prompt: expected"),
    "text among ids": (
        TEXT, prompt(prompt=[1, "x"]), 400, "prompt: token 1: expected a whole"),
    "ids among texts": (
        TEXT, prompt(prompt=["x", [1]]), 400, "prompt: expected a list of texts"),
    "true for an id": (
        TEXT, prompt(prompt=[True]), 400, "prompt: token 0: .* got True"),
    "a fraction for an id": (TEXT, prompt(prompt=[1.5]), 400, "token 0: .*1.5"),
    "a negative id": (TEXT, prompt(prompt=[1, -1]), 400, r"token 1: .*\[0, 256\]"),
    "an id outside the vocabulary": (
        TEXT, prompt(prompt=[257]), 400, r"token 0: .*\[0, 256\], got 257"),
    "a lone surrogate": (
        TEXT, b'{"prompt": "a\\ud800"}', 400, "prompt: has a lone surrogate"),
    "a long prompt": (
        TEXT, prompt(prompt="x" * 241), 400, "241 tokens and max_tokens 16 are"),
    "too many prompts": (
        TEXT, prompt(prompt=["x"] * 13), 400, "13 prompts times n = 1 are over"),
    "too many answers": (
        TEXT, prompt(prompt=["x"] * 4, n=4), 400, "4 prompts times n = 4 are"),
    "max_tokens 0": (TEXT, prompt(max_tokens=0), 400, r"max_tokens: .*\[1, 256\]"),
    "max_tokens -1": (TEXT, prompt(max_tokens=-1), 400, "max_tokens: .*got -1"),
    "max_tokens 1e9": (
        TEXT, prompt(max_tokens=10**9), 400, r"max_tokens: .*\[1, 256\]"),
    "max_tokens true": (TEXT, prompt(max_tokens=True), 400, "max_tokens: .*True"),
    "max_tokens 1.5": (TEXT, prompt(max_tokens=1.5), 400, "max_tokens: .*whole"),
    "max_tokens text": (TEXT, prompt(max_tokens="9"), 400, "max_tokens: .*'9'"),
    "min_tokens beyond": (
        TEXT, prompt(min_tokens=17), 400, r"min_tokens: .*\[0, 16\], got 17"),
    "a negative temperature": (
        TEXT, prompt(temperature=-0.1), 400, r"temperature: .*\[0, 2\], got -0.1"),
    "a hot temperature": (TEXT, prompt(temperature=2.1), 400, "temperature: .*2.1"),
    "top_p 0": (TEXT, prompt(top_p=0), 400, r"top_p: .*\(0, 1\], got 0"),
    "top_p 1.1": (TEXT, prompt(top_p=1.1), 400, r"top_p: .*\(0, 1\], got 1.1"),
    "top_k -2": (TEXT, prompt(top_k=-2), 400, r"top_k: .*\[-1, 257\], got -2"),
    "min_p 2": (TEXT, prompt(min_p=2), 400, r"min_p: .*\[0, 1\], got 2"),
    "repetition_penalty 0": (
        TEXT, prompt(repetition_penalty=0), 400, r"repetition_penalty: .*\(0,"),
    "presence_penalty 3": (
        TEXT, prompt(presence_penalty=3), 400, r"presence_penalty: .*\[-2, 2\]"),
    "n 0": (TEXT, prompt(n=0), 400, r"n: .*\[1, 12\], got 0"),
    "n of a million": (TEXT, prompt(n=10**6), 400, r"n: .*\[1, 12\], got 1000000"),
    "best_of": (TEXT, prompt(best_of=3), 400, "best_of: this server does not rank"),
    "a huge seed": (TEXT, prompt(seed=2**63), 400, "seed: expected a whole number"),
    "logprobs true": (TEXT, prompt(logprobs=True), 400, "logprobs: .*whole"),
    "logprobs 21": (TEXT, prompt(logprobs=21), 400, r"logprobs: .*\[0, 20\]"),
    "echo 1": (TEXT, prompt(echo=1), 400, "echo: expected true or false, got 1"),
    "stream yes": (TEXT, prompt(stream="yes"), 400, "stream: expected true or"),
    "stream_options alone": (
        TEXT, prompt(stream_options={"include_usage": True}), 400,
        "stream_options: needs stream: true"),
    "bad stream_options": (
        TEXT, prompt(stream=True, stream_options={"usage": True}), 400,
        'stream_options: expected {"include_usage"'),
    "an empty stop": (TEXT, prompt(stop=""), 400, "stop: .*none of them empty"),
    "1,000 stops": (TEXT, prompt(stop=["x"] * 1000), 400, "stop: .*at most 16"),
    "a stop of numbers": (TEXT, prompt(stop=[1]), 400, "stop: expected text"),
    "a long stop": (TEXT, prompt(stop="x" * 257), 400, "stop: .*256 characters"),
    "bad stop ids": (
        TEXT, prompt(stop_token_ids=[999]), 400, "stop_token_ids: token 0"),
    "a bias of no token": (
        TEXT, prompt(logit_bias={"x": 1}), 400, r"logit_bias: .*\[0, 256\]"),
    "a bias too large": (
        TEXT, prompt(logit_bias={"1": 101}), 400, "logit_bias: token 1: .*101"),
    "a bias of a list": (TEXT, prompt(logit_bias=[1]), 400, "logit_bias: expected"),
    "a suffix": (TEXT, prompt(suffix="x"), 400, "suffix: .* does not support it"),
    "another model": (TEXT, prompt(model="gpt-4"), 404, "'gpt-4' is not served"),
    "a model of a number": (TEXT, prompt(model=4), 404, "4 is not served here"),
    "no messages": (CHAT, b"{}", 400, "messages: expected a list of 1 to 1000"),
    "empty messages": (CHAT, messages(), 400, "messages: expected a list of 1 to"),
    "too many messages": (
        CHAT, messages(*[user("x")] * 1001), 400, "messages: expected a list of 1 to"),
    "a prompt in a chat": (CHAT, messages(user("x"), prompt="x"), 400, "prompt: unkn"),
    "a message of text": (CHAT, messages("x"), 400, r"messages\[0\]: expected an obj"),
    "an unknown role": (
        CHAT, messages({"role": "robot", "content": "x"}), 400, r"\[0\].role: .*robot"),
    "a role of a list": (CHAT, messages({"role": [], "content": "x"}), 400, "role: "),
    "no content": (CHAT, messages({"role": "user"}), 400, r"\[0\].content: .*got None"),
    "a content of a number": (CHAT, messages(user(1)), 400, r"\[0\].content: .*text"),
    "a content of pictures": (
        CHAT, messages(user([{"type": "image_url", "image_url": {}}])), 400,
        r"\[0\].content: expected parts"),
    "a lone surrogate in a chat": (
        CHAT, b'{"messages": [{"role": "user", "content": "\\udfff"}]}', 400,
        r"messages\[0\].content: has a lone surrogate"),
    "a call of a tool": (
        CHAT, messages({"role": "user", "content": "x", "tool_calls": [1]}), 400,
        r"messages\[0\]: unknown field 'tool_calls'"),
    "the assistant last": (
        CHAT, messages(user("x"), {"role": "assistant", "content": "y"}), 400,
        "the last must be a user's"),
    "the system in the middle": (
        CHAT, messages(user("x"), {"role": "system", "content": "y"}, user("z")), 400,
        "only the first message may be the system's"),
    "tools": (CHAT, messages(user("x"), tools=[{}]), 400, "tools: .*does not support"),
    "a JSON answer": (
        CHAT, messages(user("x"), response_format={"type": "json_object"}), 400,
        "response_format: this server does not support it"),
    "top_logprobs alone": (
        CHAT, messages(user("x"), top_logprobs=2), 400, "needs logprobs: true"),
    "a long chat": (CHAT, messages(user("x" * 300)), 400, "messages: .* are over this"),
    "a large body": (TEXT, prompt(user="x" * 2_000_000), 413, "over 2000000 bytes"),
    "an unknown path": ("/v1/embeddings", prompt(), 404, "POST /v1/embeddings: Not Fo"),
    "a POST of a GET": ("/health", prompt(), 405, "POST /health: Method Not Allowed"),
}  # fmt: skip
# Name -> (content type, status).
TYPES = {
    "a form": ("application/x-www-form-urlencoded", 415),
    "plain text": ("text/plain", 415),
    "no content type": ("", 415),
}


def post(path: str, body: bytes, kind: str = "application/json") -> tuple[int, str]:
    """(status, message) of an answer, whose form is checked."""
    service = fake.service(limits=Limits())

    async def go() -> tuple[int, str]:
        async with fake.client(service) as client:
            headers = {"content-type": kind} if kind else {}
            found = await client.post(path, content=body, headers=headers)
            error = found.json().get("error")
            if error is None:
                return found.status_code, ""
            assert error.keys() == {"message", "type", "param", "code"}
            return found.status_code, error["message"]

    try:
        return asyncio.run(go())
    finally:
        service.worker.stop()


def judged(path: str, body: bytes, kind: str, status: int, message: str) -> str:
    """The outcome, as the tables of bad inputs have it."""
    answers: list[tuple[int, str]] = []
    failed, error = outcome(lambda: answers.append(post(path, body, kind)))
    if failed != "silent":  # which here says that an answer came
        return f"{failed}: {error}"
    found, said = answers[0]
    if found < 400:
        return "silent"
    if found >= 500 or "Traceback" in said:
        return "traceback"
    clear = found == status and re.search(message, said) and len(said) < 4000
    return "clear" if clear else f"unclear: {found} {said[:300]}"


@pytest.mark.parametrize("name", BODIES)
def test_a_bad_body_is_refused_clearly(name, record_property):
    path, body, status, message = BODIES[name]
    found = judged(path, body, "application/json", status, message)
    record_property("outcome", found)
    assert found == "clear"


@pytest.mark.parametrize("name", TYPES)
def test_a_bad_content_type_is_refused_clearly(name, record_property):
    kind, status = TYPES[name]
    found = judged(TEXT, prompt(), kind, status, "expected content-type")
    record_property("outcome", found)
    assert found == "clear"


# Name -> (flags, what is said).
FLAGS = {
    "an open host without a key": (
        ["--host", "0.0.0.0"], "there is no API key: give --api-key-file"),
    "another host without a key": (["--host", "192.0.2.1"], "lets others in"),
    "no slots": (["--slots", "0"], "--slots 0: expected at least 1"),
    "a negative queue": (["--max-queue", "-1"], "--max-queue -1: expected at least 0"),
    "a port too far": (["--port", "65536"], "--port 65536: expected at most 65535"),
    "a timeout of NaN": (["--timeout", "nan"], "--timeout nan: expected at least"),
    "no such key file": (["--api-key-file", "no-such"], "cannot read the API key: No"),
    "an empty key file": (["--api-key-file", "empty"], "expected a key of at least 16"),
    "a short key": (["--api-key-file", "short"], "expected a key of at least 16"),
    "a key of two words": (["--api-key-file", "words"], "without spaces"),
    "a key that is not ASCII": (["--api-key-file", "bytes"], "not ASCII text"),
    "a host that is none": (["--host", "no.such.host.invalid"], "lets others in"),
}  # fmt: skip


@pytest.mark.parametrize("name", FLAGS)
def test_a_bad_command_line_is_refused_clearly(
    name, tmp_path, monkeypatch, capsys, record_property
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    for file, content in {"empty": b"", "short": b"secret", "bytes": b"\xff" * 20,
                          "words": b"two words of a key"}.items():  # fmt: skip
        (tmp_path / file).write_bytes(content)
    flags, message = FLAGS[name]
    code = serve.main(["--checkpoint", "no-such-checkpoint", *flags])
    said = capsys.readouterr().err
    clear = code == EXIT_USER and re.search(message, said) and "Traceback" not in said
    record_property("outcome", "clear" if clear else "unclear")
    assert clear, said
    for secret in ("secret", "two words of a key"):
        assert secret not in said
