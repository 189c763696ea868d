"""What a request may say."""

import json
import math
import random

import pytest

from mpt_jax.serving.protocol import FIELDS, Refusal, Rules, parse
from tests.serving import fuzz

RULES = Rules(model="m", context=100, vocab_size=50, max_choices=8)


def asked(kind="completion", **fields):
    base = {"messages": [{"role": "user", "content": "x"}]}
    base = {"prompt": "x"} if kind == "completion" else base
    return parse(json.dumps(base | fields).encode(), kind, RULES)


def refused(kind="completion", **fields):
    with pytest.raises(Refusal) as caught:
        asked(kind, **fields)
    assert caught.value.status == 400
    return caught.value


def test_defaults_are_openais():
    ask = asked()
    assert ask.prompts == ("x",)
    assert (ask.max_tokens, ask.n, ask.logprobs) == (16, 1, None)
    assert (ask.echo, ask.stream, ask.include_usage) == (False, False, False)
    sampling = ask.sampling(0, 1, RULES)
    assert (sampling.temperature, sampling.top_p, sampling.stop) == (1.0, 1.0, ())
    assert asked("chat").max_tokens is None
    assert asked("chat").sampling(0, 30, RULES).max_tokens == 70


def test_a_null_is_as_good_as_no_field():
    nulls = dict.fromkeys(FIELDS["completion"] - {"prompt"})
    first, second = asked(**nulls), asked()
    first.options["seed"] = second.options["seed"] = 0
    assert first == second


def test_every_field_arrives():
    ask = asked(
        max_tokens=9, temperature=0.5, top_p=0.9, top_k=7, min_p=0.1, n=2, seed=-1,
        presence_penalty=1, frequency_penalty=-1, repetition_penalty=1.5,
        stop=["a", "b"], stop_token_ids=[3], ignore_eos=True, min_tokens=2,
        logit_bias={"4": -100}, logprobs=3, echo=True, stream=True,
        stream_options={"include_usage": True}, best_of=2, user="u",
    )  # fmt: skip
    assert ask.n == 2
    assert ask.stream
    assert ask.include_usage
    s = ask.sampling(1, 4, RULES)
    assert (s.max_tokens, s.temperature, s.top_p, s.top_k) == (9, 0.5, 0.9, 7)
    assert (s.min_p, s.presence_penalty, s.frequency_penalty) == (0.1, 1, -1)
    assert (s.repetition_penalty, s.stop, s.stop_ids) == (1.5, ("a", "b"), (3,))
    assert (s.ignore_eos, s.min_tokens, s.logit_bias) == (True, 2, {4: -100.0})
    assert (s.logprobs, s.prompt_logprobs, s.seed) == (3, True, 0)
    assert ask.sampling(0, 4, RULES).seed == 2**63 - 1


def test_requests_without_a_seed_differ():
    assert asked().options["seed"] != asked().options["seed"]


def test_fields_of_no_effect_are_let_pass():
    asked(user="me", metadata={"a": 1}, store=False, suffix="", tools=[])
    asked("chat", response_format={"type": "text"}, tool_choice="none")


def test_all_problems_are_named_at_once():
    error = refused(temperature=3, top_p=True, maxtokens=1, stop=[""], tools=[{}])
    lines = error.message.splitlines()
    assert lines == [
        "maxtokens: unknown field; did you mean 'max_tokens'?",
        "tools: this server does not support it, got [{}]",
        "temperature: expected a number in [0, 2], got 3",
        "top_p: expected a number in (0, 1], got True",
        "stop: expected text or a list of at most 16, none of them empty, got ['']",
    ]
    assert error.param == "maxtokens"


def test_prompt_and_answer_must_fit_the_context():
    ask = asked(max_tokens=60)
    assert ask.sampling(0, 40, RULES).max_tokens == 60
    with pytest.raises(Refusal, match="41 tokens and max_tokens 60 are over") as caught:
        ask.sampling(0, 41, RULES)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(Refusal, match="messages: 100 tokens"):
        asked("chat").sampling(0, 100, RULES)


def test_another_model_is_not_found():
    with pytest.raises(Refusal, match="'other' is not served here; 'm' is") as caught:
        asked(model="other")
    assert caught.value.status == 404


def test_junk_is_refused_or_understood_but_never_a_surprise():
    rng, outcomes, told = random.Random(0), {"fine": 0, "refused": 0}, []
    for _ in range(2000):
        try:
            ask = parse(fuzz.body(rng), rng.choice(("completion", "chat")), RULES)
            ask.sampling(0, 1, RULES)
            outcomes["fine"] += 1
        except Refusal as refusal:
            outcomes["refused"] += 1
            told.append(refusal)
    assert min(outcomes.values()) > 100
    assert {refusal.status for refusal in told} == {400, 404}
    assert max(len(json.dumps(refusal.body())) for refusal in told) < 3000


def test_numbers_are_checked_at_their_ends():
    for name, low, high in (("temperature", 0, 2), ("presence_penalty", -2, 2),
                            ("min_p", 0, 1), ("logprobs", 0, 20), ("n", 1, 8),
                            ("max_tokens", 1, 100), ("top_k", -1, 50)):  # fmt: skip
        for good in (low, high):
            asked(**{name: good})
        for bad in (low - 1, high + 1, math.nan, "1", False, [low]):
            if bad != bad:
                with pytest.raises(Refusal, match="NaN is no JSON number"):
                    asked(**{name: bad})
            else:
                assert refused(**{name: bad}).param == name
