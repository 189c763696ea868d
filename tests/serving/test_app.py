"""The routes without sockets, through httpx and the real openai client."""

import asyncio
import collections
import json
import random

import openai
import pytest

from mpt_jax.generation.templates import TEMPLATES, render
from mpt_jax.serving.app import Limits
from tests.serving import fake, fuzz
from tests.serving.fake import answer

KEY = "a-key-of-many-characters"


@pytest.fixture
def service():
    made = fake.service()
    yield made
    assert fake.settled(made)
    made.worker.stop()


def asking(service, work):
    """The result of ``work(openai client)``."""

    async def go():
        async with fake.client(service) as http:
            client = openai.AsyncOpenAI(
                base_url="http://127.0.0.1/v1", api_key=service.api_key or "none",
                http_client=http, max_retries=0,
            )  # fmt: skip
            return await work(client)

    return asyncio.run(go())


def posting(service, body, path="/v1/completions", **keys):
    """(status, JSON) of one request."""

    async def go():
        async with fake.client(service) as http:
            raw = body if isinstance(body, bytes) else json.dumps(body).encode()
            headers = {"content-type": "application/json"} | keys.get("headers", {})
            found = await http.post(path, content=raw, headers=headers)
            return found.status_code, found.json()

    return asyncio.run(go())


async def collect(stream):
    return [chunk async for chunk in await stream]


def complete(client, prompt, **keys):
    keys = {"max_tokens": 8, "model": fake.MODEL} | keys
    return client.completions.create(prompt=prompt, **keys)


def test_a_completion_is_what_the_engine_says(service):
    found = asking(service, lambda c: complete(c, "hello"))
    (choice,) = found.choices
    assert choice.text == answer("hello", 8)
    assert (choice.finish_reason, choice.index, choice.logprobs) == ("length", 0, None)
    usage = found.usage
    assert (usage.prompt_tokens, usage.completion_tokens) == (5, 8)
    assert usage.total_tokens == 13
    assert found.model == fake.MODEL
    assert found.id.startswith("cmpl-")


def test_prompts_may_be_ids_and_lists(service):
    ids = list(b"hello")
    for prompt, expected in (
        (ids, ["hello"]), ([ids], ["hello"]), (["hello", "you"], ["hello", "you"]),
        ([ids, [1, 2]], ["hello", [1, 2]]),
    ):  # fmt: skip
        found = asking(service, lambda c, p=prompt: complete(c, p))
        assert [c.text for c in found.choices] == [answer(e, 8) for e in expected]
        assert [c.index for c in found.choices] == list(range(len(expected)))


def test_n_answers_are_in_the_order_of_the_prompts(service):
    found = asking(service, lambda c: complete(c, ["x", "yy"], n=2))
    assert [c.text for c in found.choices] == [
        answer(p, 8) for p in "x x yy yy".split()
    ]
    assert found.usage.prompt_tokens == 3
    assert found.usage.completion_tokens == 32


def test_a_stream_is_the_whole_in_parts(service):
    keys = {"stream_options": {"include_usage": True}, "stream": True, "n": 2}
    chunks = asking(service, lambda c: collect(complete(c, ["hello", "you"], **keys)))
    *parts, last = chunks
    assert last.usage.completion_tokens == 32
    assert last.choices == []
    assert all(part.usage is None for part in parts)
    for index, prompt in enumerate(("hello", "hello", "you", "you")):
        own = [c for part in parts for c in part.choices if c.index == index]
        assert "".join(c.text for c in own) == answer(prompt, 8)
        ends = [c.finish_reason for c in own]
        assert ends == [None] * (len(ends) - 1) + ["length"]
    assert len({chunk.id for chunk in chunks}) == 1


def test_a_stream_ends_with_done(service):
    async def go():
        async with fake.client(service) as http:
            body = {"prompt": "x", "stream": True}
            return (await http.post("/v1/completions", json=body)).text

    events = asyncio.run(go()).split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    assert all(json.loads(e.removeprefix("data: ")) for e in events[:-2])


@pytest.mark.parametrize("stream", [False, True])
def test_a_stop_string_ends_an_answer_and_frees_its_slot(service, stream):
    whole = answer("hello", 100)
    stop = whole[10:13]
    cut = whole[: whole.index(stop)]
    keys = {"max_tokens": 100, "stop": [stop, "never"], "stream": stream}
    if stream:
        chunks = asking(service, lambda c: collect(complete(c, "hello", **keys)))
        assert "".join(c.choices[0].text for c in chunks) == cut
        assert chunks[-1].choices[0].finish_reason == "stop"
    else:
        found = asking(service, lambda c: complete(c, "hello", **keys))
        assert found.choices[0].text == cut
        assert found.choices[0].finish_reason == "stop"


def test_logprobs_belong_to_their_text(service):
    found = asking(service, lambda c: complete(c, "hello", logprobs=2))
    (choice,) = found.choices
    said = choice.logprobs
    assert "".join(said.tokens) == choice.text
    assert said.text_offset == list(range(8))
    ids = choice.text.encode()
    assert said.token_logprobs == [-i / 100 for i in ids]
    assert said.top_logprobs[0] == {
        chr(ids[0]): -ids[0] / 100, chr(ids[0] + 1): -ids[0] / 100 - 1,
    }  # fmt: skip


def test_no_logprob_is_told_of_a_stop_string(service):
    whole = answer("hello", 100)
    stop = whole[10:13]
    keys = {"max_tokens": 100, "stop": stop, "logprobs": 0}
    (choice,) = asking(service, lambda c: complete(c, "hello", **keys)).choices
    assert "".join(choice.logprobs.tokens) == choice.text
    assert choice.logprobs.top_logprobs is None


def test_echo_scores_the_prompt(service):
    """As lm-eval asks: ids, echo, one more token."""
    keys = {"echo": True, "logprobs": 1, "max_tokens": 1}
    found = asking(service, lambda c: complete(c, [list(b"hello")], **keys))
    (choice,) = found.choices
    said = choice.logprobs
    assert choice.text == "hello" + answer("hello", 1)
    assert said.tokens == list(choice.text)
    assert said.text_offset == list(range(6))
    assert said.token_logprobs == [None, *(-i / 100 for i in choice.text.encode()[1:])]
    assert said.top_logprobs[0] is None
    assert [len(top) for top in said.top_logprobs[1:]] == [1] * 5


def test_echo_may_generate_nothing(service):
    keys = {"echo": True, "logprobs": 1, "max_tokens": 0}
    (choice,) = asking(service, lambda c: complete(c, "hello", **keys)).choices
    assert choice.text == "hello"
    assert len(choice.logprobs.tokens) == 5
    keys = {"echo": True, "max_tokens": 0}
    (choice,) = asking(service, lambda c: complete(c, "hello", **keys)).choices
    assert (choice.text, choice.logprobs) == ("hello", None)


def test_a_token_that_is_no_text_has_a_name(service):
    keys = {"echo": True, "logprobs": 0, "max_tokens": 0}
    prompt = [104, 0xC3, 0xA9, 256]
    (choice,) = asking(service, lambda c: complete(c, prompt, **keys)).choices
    assert choice.text == "h\u00e9"
    named = ["h", "token_id:195", "token_id:169", "token_id:256"]
    assert choice.logprobs.tokens == named
    assert choice.logprobs.text_offset == [0, 1, 1, 2]


CONVERSATION = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": [{"type": "text", "text": "Hi "},
                                 {"type": "text", "text": "there"}]},
]  # fmt: skip


def chat(client, **keys):
    keys = {"model": fake.MODEL, "messages": CONVERSATION} | keys
    return client.chat.completions.create(**keys)


def rendered(service):
    flat = [CONVERSATION[0], {"role": "user", "content": "Hi there"}]
    return render(flat, TEMPLATES["instruct"], service.tokenizer)


def test_a_chat_is_rendered_by_its_template(service):
    found = asking(service, lambda c: chat(c, max_completion_tokens=8))
    (choice,) = found.choices
    prompt = rendered(service)
    assert choice.message.role == "assistant"
    assert choice.message.content == answer(prompt, 8)
    assert found.usage.prompt_tokens == len(prompt)
    assert found.object == "chat.completion"


def test_a_chat_fills_the_context_by_default(service):
    found = asking(service, lambda c: chat(c))
    assert found.usage.total_tokens == fake.CONTEXT
    assert found.choices[0].finish_reason == "length"


def test_a_chat_streams_with_logprobs(service):
    keys = {"max_tokens": 6, "logprobs": True, "top_logprobs": 2, "stream": True}
    first, *rest = asking(service, lambda c: collect(chat(c, **keys)))
    assert first.object == "chat.completion.chunk"
    assert first.choices[0].delta.role == "assistant"
    expected = answer(rendered(service), 6)
    deltas = [chunk.choices[0].delta.content or "" for chunk in rest]
    assert "".join(deltas) == expected
    said = [t for c in rest for t in c.choices[0].logprobs.content]
    assert [t.token for t in said] == list(expected)
    assert [t.bytes for t in said] == [[i] for i in expected.encode()]
    assert all(len(t.top_logprobs) == 2 for t in said)
    assert rest[-1].choices[0].finish_reason == "length"


def test_a_server_without_a_template_says_so():
    service = fake.service(template=None, no_chat="no such thing")
    with pytest.raises(openai.BadRequestError, match="no chats here: no such thing"):
        asking(service, lambda c: chat(c))
    service.worker.stop()


def test_the_model_is_listed(service):
    (model,) = asking(service, lambda c: c.models.list()).data
    assert model.id == fake.MODEL
    found = asking(service, lambda c: c.models.retrieve(fake.MODEL))
    assert found == model
    with pytest.raises(openai.NotFoundError, match="the model served here is 'fake'"):
        asking(service, lambda c: c.models.retrieve("gpt"))
    with pytest.raises(openai.NotFoundError, match="'gpt' is not served here"):
        asking(service, lambda c: complete(c, "x", model="gpt"))


@pytest.mark.parametrize("stream", [False, True])
def test_a_poisoned_request_fails_alone(service, stream):
    async def work(client):
        bad = complete(client, "x!", stream=stream)
        good = [complete(client, "hello", max_tokens=50) for _ in range(3)]
        return await asyncio.gather(bad, *good, return_exceptions=True)

    bad, *good = asking(service, work)
    assert isinstance(bad, openai.InternalServerError)
    assert bad.status_code == 500
    assert bad.body["message"] == "this request failed: it is poisoned"
    assert [g.choices[0].text for g in good] == [answer("hello", 50)] * 3
    assert service.worker.healthy


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_dead_engine_ends_all(caplog):
    service = fake.service(fake.FakeEngine(seconds=0.05))

    async def work(client):
        both = complete(client, "hello", max_tokens=200), complete(client, "~")
        found = await asyncio.gather(*both, return_exceptions=True)
        with pytest.raises(openai.InternalServerError) as late:
            await complete(client, "hello")
        return [*found, late.value]

    for error in asking(service, work):
        assert error.status_code == 503
        assert error.body["code"] == "dead"

    async def health():
        async with fake.client(service) as http:
            return (await http.get("/health")).status_code

    assert asyncio.run(health()) == 503
    assert isinstance(service.worker.failure, FloatingPointError)
    assert "the engine has stopped" in caplog.text


def test_more_than_the_queue_holds_is_refused_at_once():
    engine = fake.FakeEngine(n_slots=2)
    service = fake.service(engine, max_queue=3)
    engine.go.clear()  # nothing is answered before the last has asked

    async def work(client):
        asked = [complete(client, "x", max_tokens=30) for _ in range(9)]
        tasks = list(map(asyncio.ensure_future, asked))
        async with asyncio.timeout(60):
            while sum(task.done() for task in tasks) < 4:
                await asyncio.sleep(0.01)
        engine.go.set()
        return await asyncio.gather(*tasks, return_exceptions=True)

    found = asking(service, work)
    refused = [e for e in found if isinstance(e, openai.RateLimitError)]
    assert len(refused) == 4
    assert all(e.response.headers["retry-after"] == "1" for e in refused)
    served = [f for f in found if not isinstance(f, Exception)]
    assert [f.choices[0].text for f in served] == [answer("x", 30)] * 5
    assert engine.most_running == 2
    assert fake.settled(service)
    service.worker.stop()


def test_an_answer_that_takes_too_long_is_given_up():
    limits = Limits(timeout=0.2)
    service = fake.service(fake.FakeEngine(seconds=0.02), limits=limits)
    with pytest.raises(openai.InternalServerError, match=r"within 0\.2 s") as caught:
        asking(service, lambda c: complete(c, "x", max_tokens=200))
    assert caught.value.status_code == 504

    keys = {"max_tokens": 200, "stream": True}
    with pytest.raises(openai.APIError, match=r"within 0\.2 s"):
        asking(service, lambda c: collect(complete(c, "x", **keys)))
    assert fake.settled(service)
    service.worker.stop()


def test_only_who_has_the_key_comes_in():
    service = fake.service(api_key=KEY)
    asking(service, lambda c: complete(c, "x"))
    for wrong in ("Bearer wrong", "Basic " + KEY, KEY, "Bearer", "Bearer \u00e9"):
        headers = {"authorization": wrong.encode("latin-1")}
        status, said = posting(service, {"prompt": "x"}, headers=headers)
        assert (status, said["error"]["code"]) == (401, "invalid_api_key")

    async def go():
        async with fake.client(service) as http:
            paths = ("/health", "/metrics", "/v1/models", "/nowhere")
            return [(await http.get(path)).status_code for path in paths]

    assert asyncio.run(go()) == [200, 401, 401, 401]
    service.worker.stop()


def test_a_page_of_another_host_is_not_answered():
    service = fake.service(hosts=frozenset({"127.0.0.1", "localhost"}))
    hosts = {"127.0.0.1:8000": 200, "LOCALHOST": 200, "evil.example": 403,
             "evil.example:8000": 403}  # fmt: skip
    for host, expected in hosts.items():
        found = posting(service, {"prompt": "x"}, headers={"host": host})
        assert found[0] == expected
    service.worker.stop()


def test_a_draining_server_takes_nothing_new(service):
    service.draining = True

    async def go():
        async with fake.client(service) as http:
            health = await http.get("/health")
            post = await http.post("/v1/completions", json={"prompt": "x"})
            metrics = await http.get("/metrics")
            return health, post, metrics

    health, post, metrics = asyncio.run(go())
    assert (health.status_code, health.json()) == (503, {"status": "draining"})
    assert post.status_code == 503
    assert post.headers["connection"] == "close"
    assert metrics.status_code == 200


def test_the_metrics_count(service):
    asking(service, lambda c: complete(c, "hello"))

    async def go():
        async with fake.client(service) as http:
            await http.get("/nowhere")
            return (await http.get("/metrics")).text

    lines = asyncio.run(go()).splitlines()
    path = 'mpt_http_requests_total{path="/v1/completions",status="200"} 1.0'
    other = 'mpt_http_requests_total{path="other",status="404"} 1.0'
    gauges = {"mpt_slots 4.0", "mpt_slots_busy 0.0", "mpt_queue 0.0", "mpt_healthy 1.0"}
    assert {path, other, "mpt_generated_tokens_total 8.0", *gauges} <= {*lines}


@pytest.mark.slow
def test_no_body_of_5000_is_an_internal_error(service):
    """And what is understood is answered."""
    rng, counts = random.Random(1), collections.Counter()

    async def go():
        async with fake.client(service) as http:
            for _ in range(5000):
                path = rng.choice(("/v1/completions", "/v1/chat/completions"))
                kind = {"content-type": "application/json"}
                found = await http.post(path, content=fuzz.body(rng), headers=kind)
                counts[found.status_code] += 1

    asyncio.run(go())
    assert counts.keys() == {200, 400, 404}
    assert counts[200] > 100
    assert counts[400] > 1000
