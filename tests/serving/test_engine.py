"""The server around the real engine, with a tiny model of random weights."""

import asyncio
import random

import openai
import pytest

from mpt_jax import loading
from mpt_jax.generation.engine import Request
from mpt_jax.generation.sampling import Sampling
from tests.serving import checkpoint, fake

SLOTS, CAPACITY, CHUNK = 4, 256, 32
POISON = "!"
NO_POISON = {str(ord(POISON)): -100}  # nor does the model poison itself


@pytest.fixture(scope="module")
def loaded(tmp_path_factory):
    folder = checkpoint.write(tmp_path_factory.mktemp("model") / "m", poison=POISON)
    return loading.load(folder, tokenizer="bytes")


@pytest.fixture(scope="module")
def engine(loaded):
    made = loaded.engine(n_slots=SLOTS, capacity=CAPACITY, prefill_chunk=CHUNK)
    made.warm_up()
    return made


@pytest.fixture
def url(engine):
    service = fake.service(engine, max_queue=300)
    with fake.running(service) as found:
        yield found
        assert fake.settled(service)


def openai_client(url):
    return openai.AsyncOpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0)


async def complete(client, prompt, **keys):
    keys = {"temperature": 0, "max_tokens": 24, "logit_bias": NO_POISON} | keys
    return await client.completions.create(model=fake.MODEL, prompt=prompt, **keys)


PROMPTS = [bytes(random.Random(i).choices(range(97, 123), k=n)).decode()
           for i, n in enumerate((1, 5, 33, 60, 90, 2, 32, 31, 64, 7))]  # fmt: skip


@pytest.mark.parametrize("seed", range(3))
def test_greedy_texts_do_not_depend_on_who_else_asks(url, seed):
    """Each alone, one after another; then all, arriving in any order and at any time,
    some streamed, some leaving half way."""
    rng = random.Random(seed)

    async def alone(client):
        found = [await complete(client, prompt) for prompt in PROMPTS]
        return [one.choices[0].text for one in found]

    async def late(client, prompt):
        kind, wait = rng.randrange(3), rng.random() * 0.2
        await asyncio.sleep(wait)
        if kind == 0:
            return (await complete(client, prompt)).choices[0].text
        texts = []
        async with await complete(client, prompt, stream=True) as stream:
            async for chunk in stream:
                texts.append(chunk.choices[0].text)
                if kind == 2 and len(texts) == 5:
                    break
        return "".join(texts)

    async def go():
        async with openai_client(url) as client:
            expected = await alone(client)
            order = rng.sample(range(len(PROMPTS)), len(PROMPTS))
            found = await asyncio.gather(*(late(client, PROMPTS[i]) for i in order))
            return [(expected[i], text) for i, text in zip(order, found, strict=True)]

    pairs = asyncio.run(go())
    assert all(whole.startswith(text) for whole, text in pairs)
    assert sum(whole == text for whole, text in pairs) >= len(PROMPTS) // 3
    assert len({whole for whole, _ in pairs}) > len(PROMPTS) // 2


def test_a_sampled_stream_is_the_whole_in_parts(url):
    """Random bytes: characters of several tokens, and halves of characters."""

    async def go():
        async with openai_client(url) as client:
            pairs = []
            for seed in range(5):
                keys = {"temperature": 2, "seed": seed, "max_tokens": 60}
                whole = await complete(client, "hi", **keys)
                stream = await complete(client, "hi", stream=True, **keys)
                parts = [chunk.choices[0].text async for chunk in stream]
                pairs.append((whole.choices[0].text, "".join(parts)))
            return pairs

    pairs = asyncio.run(go())
    assert all(whole == parts for whole, parts in pairs)
    assert len({whole for whole, _ in pairs}) == len(pairs)


def test_n_answers_draw_with_seeds_in_a_row(url):
    async def go():
        async with openai_client(url) as client:
            keys = {"temperature": 1, "max_tokens": 12}
            both = await complete(client, "hi", n=2, seed=5, **keys)
            single = [await complete(client, "hi", seed=5 + i, **keys) for i in (0, 1)]
            return both.choices, [one.choices[0] for one in single]

    both, single = asyncio.run(go())
    assert [c.text for c in both] == [c.text for c in single]
    assert both[0].text != both[1].text


def test_echo_and_answer_score_alike(url):
    """What was generated, given back as a prompt, has the same log-probabilities."""

    async def go():
        async with openai_client(url) as client:
            first = await complete(client, "hello", logprobs=2, max_tokens=8)
            ids = [i for i in range(97, 105)]
            scored = [await complete(client, [ids], echo=True, logprobs=2, max_tokens=n)
                      for n in (0, 1)]  # fmt: skip
            return first.choices[0].logprobs, [s.choices[0].logprobs for s in scored]

    first, (none, one) = asyncio.run(go())
    greedy = zip(first.token_logprobs, first.top_logprobs, strict=True)
    assert all(own == max(top.values()) for own, top in greedy)
    assert none.token_logprobs == one.token_logprobs[:-1]
    assert none.tokens == list("abcdefgh")


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_of_poison_fails_alone(url, stream):
    async def go():
        async with openai_client(url) as client:
            expected = (await complete(client, "hello")).choices[0].text
            asked = [complete(client, p, stream=stream) for p in ("hello", "a!b")]
            asked += [complete(client, "hello") for _ in range(3)]
            good, bad, *rest = await asyncio.gather(*asked, return_exceptions=True)
            if stream:
                good = "".join([c.choices[0].text async for c in good])
            else:
                good = good.choices[0].text
            return expected, bad, [good, *(r.choices[0].text for r in rest)]

    expected, bad, good = asyncio.run(go())
    assert isinstance(bad, openai.InternalServerError)
    assert "logits are not finite" in bad.message
    assert good == [expected] * 4


def cancel_many(engine, n, seed=0):
    """Submits ``n`` requests and cancels each at some moment of its life."""
    rng = random.Random(seed)
    doomed, ends, i = {}, {}, 0
    while i < n or doomed:
        while i < n and engine.n_waiting < 8:
            prompt = rng.choices(range(97, 123), k=rng.randrange(1, 80))
            sampling = Sampling(temperature=0.0, max_tokens=100)
            engine.submit(Request(f"r{i}", prompt, sampling))
            doomed[f"r{i}"] = rng.randrange(6)
            i += 1
        for name in list(doomed):
            doomed[name] -= 1
            if doomed[name] < 0:
                engine.cancel(name)
                del doomed[name]
        for event in engine.step():
            if event.finish_reason is not None:
                assert event.id not in ends
                ends[event.id] = event.finish_reason
    while not engine.idle:
        ends |= {e.id: e.finish_reason for e in engine.step() if e.finish_reason}
    return ends


@pytest.mark.parametrize(
    "n", [200, pytest.param(2000, marks=pytest.mark.slow)]
)  # fmt: skip
def test_no_slot_is_lost_to_cancelled_requests(engine, n):
    ends = cancel_many(engine, n)
    assert len(ends) == n
    assert list(ends.values()).count("cancelled") > n // 2
    assert engine.n_running == engine.n_waiting == 0
    # All slots still work, at once.
    for i in range(SLOTS):
        engine.submit(Request(f"last{i}", [104, 105], Sampling(max_tokens=20)))
    seen = 0
    while not engine.idle:
        engine.step()
        seen = max(seen, engine.n_running)
    assert seen == SLOTS
