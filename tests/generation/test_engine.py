"""The engine: what a request gets does not depend on who else is there, or was.

The oracle is tests/reference.py, which computes every token from the whole text.
"""

import functools
import logging

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpt_jax import partitioning
from mpt_jax.config import MeshConfig, ModelConfig, parse
from mpt_jax.errors import UserError
from mpt_jax.generation import engine as engine_module
from mpt_jax.generation import memory, text
from mpt_jax.generation.engine import Engine, Request
from mpt_jax.generation.sampling import Sampling
from mpt_jax.models import weights
from mpt_jax.tokenizer import ByteTokenizer
from tests import reference

V, MAX_LEN, SLOTS, CHUNK = 40, 120, 4, 16
FIELDS = {
    "d_model": 16, "n_heads": 4, "n_layers": 2, "vocab_size": V, "max_seq_len": 100,
    "learned_pos_emb": False, "tie_word_embeddings": False,
    "compute_dtype": "float32", "attn_config": {
        "alibi": True, "attn_type": "grouped_query_attention", "kv_n_heads": 2,
    },
}  # fmt: skip
CFG = parse(ModelConfig, FIELDS)
# float32 through two layers beside float64; log-probabilities are of the size of 3.
LOGPROB_ATOL = 1e-5
GREEDY = Sampling(temperature=0.0, max_tokens=8)
RNG = np.random.default_rng(3)
PROMPTS = [RNG.integers(V, size=n).tolist() for n in (3, 40, 17, 1, 16, 33, 64, 5)]


@functools.cache
def params():
    return reference.random_params(CFG, 7)  # whose greedy texts are not all of one word


@functools.cache
def serving():
    return weights.unstack(jax.tree.map(jax.numpy.asarray, params()))


@pytest.fixture(scope="module", autouse=True)
def several_tokens_per_call():
    """Wherever there may be, though no request here is long."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(engine_module, "WORTH_COMPILING", 0)
        yield


@functools.cache
def continued(prompt, n):
    """What follows a prompt (a tuple) by the whole-text argmax."""
    ids = list(prompt)
    for _ in range(n):
        logits = reference.forward(CFG, params(), np.array([ids]))[0, -1]
        ids.append(int(logits.argmax()))
    return tuple(ids[len(prompt) :])


def make(**keys):
    keys = {"n_slots": SLOTS, "capacity": MAX_LEN, "prefill_chunk": CHUNK} | keys
    return Engine(CFG, serving(), **keys)


def finish(engine, *requests):
    """Id -> its events, after all have ended."""
    for request in requests:
        engine.submit(request)
    events = {}
    for _ in range(1000):
        for event in engine.step():
            events.setdefault(event.id, []).append(event)
        if engine.idle:
            return events
    raise AssertionError("the engine does not end")


def ids_of(events):
    return tuple(i for event in events for i in event.ids)


def one(engine, prompt, sampling=GREEDY):
    (events,) = finish(engine, Request("one", prompt, sampling)).values()
    return ids_of(events)


def test_batches_of_unequal_prompts_get_the_argmax_of_the_whole_text():
    """More requests than slots, prompts longer than a chunk."""
    events = finish(
        make(), *[Request(str(i), p, GREEDY) for i, p in enumerate(PROMPTS)]
    )
    for i, prompt in enumerate(PROMPTS):
        assert ids_of(events[str(i)]) == continued(tuple(prompt), 8)
        assert [e.finish_reason for e in events[str(i)]] == [None] * 7 + ["length"]


# (steps before it comes, which prompt, when to cancel it, greedy or not)
ARRIVALS = st.lists(
    st.tuples(
        st.integers(0, 4),
        st.integers(0, len(PROMPTS) - 1),
        st.one_of(st.none(), st.integers(0, 12)),
        st.booleans(),
    ),
    min_size=1, max_size=9,
)  # fmt: skip


@functools.cache
def alone(which, seed):
    s = Sampling(max_tokens=8, seed=seed, top_p=0.9)
    return one(make(), PROMPTS[which], s)


@settings(max_examples=12, deadline=None)
@given(arrivals=ARRIVALS)
def test_nobody_is_disturbed_under_any_order_of_arrivals_and_cancels(arrivals):
    engine, due, cancels, seen = make(), 0, {}, {}
    pending = []
    for n, (wait, which, cancel, greedy) in enumerate(arrivals):
        due += wait
        s = GREEDY if greedy else Sampling(max_tokens=8, seed=which, top_p=0.9)
        pending.append((due, Request(str(n), PROMPTS[which], s)))
        if cancel is not None:
            cancels[str(n)] = due + cancel
    for step in range(1000):
        while pending and pending[0][0] <= step:
            engine.submit(pending.pop(0)[1])
        for id, at in cancels.items():
            if at == step:
                engine.cancel(id)
        for event in engine.step():
            seen.setdefault(event.id, []).append(event)
        if engine.idle and not pending:
            break
    assert engine.n_running == engine.n_waiting == 0
    for n, (_, which, _, greedy) in enumerate(arrivals):
        events, prompt = seen[str(n)], tuple(PROMPTS[which])
        want = continued(prompt, 8) if greedy else alone(which, which)
        reasons = [e.finish_reason for e in events]
        assert reasons[:-1] == [None] * (len(reasons) - 1)  # one end, and it is last
        if reasons[-1] == "cancelled":
            assert str(n) in cancels
            assert ids_of(events) == want[: len(ids_of(events))]
        else:
            assert ids_of(events) == want


def test_any_chunk_gives_the_same():
    for chunk in (7, 32, 128):
        assert one(make(prefill_chunk=chunk), PROMPTS[6]) == continued(
            tuple(PROMPTS[6]), 8
        )


@pytest.mark.parametrize("n", [1, 3, 8])
def test_any_number_of_tokens_per_call_gives_the_same(n):
    engine = make(tokens_per_call=n)
    requests = [
        Request(str(i), PROMPTS[i], Sampling(max_tokens=8, seed=i, logprobs=2))
        for i in range(SLOTS + 2)
    ]
    events = finish(engine, *requests)
    for i, request in enumerate(requests):
        (alone,) = finish(make(tokens_per_call=1), request).values()
        assert ids_of(events[str(i)]) == ids_of(alone)
        for got, want in zip(events[str(i)], alone, strict=True):
            assert [t.id for t in got.logprobs] == [t.id for t in want.logprobs]
            np.testing.assert_allclose(
                [t.logprob for t in got.logprobs], [t.logprob for t in want.logprobs],
                atol=1e-5,
            )  # fmt: skip


@pytest.mark.parametrize(
    ("max_tokens", "warm", "most"), [(20, False, 4), (11, False, 1), (11, True, 4)]
)
def test_calls_of_several_tokens_must_be_worth_compiling(
    max_tokens, warm, most, monkeypatch
):
    monkeypatch.setattr(engine_module, "WORTH_COMPILING", 12)
    engine = make(n_slots=1, tokens_per_call=4)
    if warm:
        engine.warm_up()
    s = Sampling(temperature=0.0, max_tokens=max_tokens)
    engine.submit(Request("a", PROMPTS[0], s))
    told = []
    while not engine.idle:
        told.append(sum(len(event.ids) for event in engine.step()))
    assert sum(told) == max_tokens
    assert max(told[2:]) == most  # the first come with the prompt's


def test_what_is_drawn_after_a_stop_in_the_same_call_is_not_told():
    prompt = tuple(PROMPTS[6])
    want = continued(prompt, 8)
    at = next(i for i in range(2, 8) if want[i] not in want[:i])
    engine = make(tokens_per_call=8)
    s = Sampling(temperature=0.0, max_tokens=20, stop_ids=(want[at],))
    assert one(engine, prompt, s) == want[:at]
    assert engine.counters.generated_tokens == at + 1
    # Nor is it taken for a part of what the slot remembers.
    turn = (*prompt, *want[: at + 1], 5, 6, 7)
    assert one(engine, turn) == continued(turn, 8)
    assert engine.counters.cached_tokens == len(prompt) + at + 1


def test_the_next_turn_reads_only_what_is_new():
    engine = make()
    prompt = tuple(PROMPTS[6])
    answer = one(engine, prompt)
    turn = (*prompt, *answer, 5, 6, 7)
    assert one(engine, turn) == continued(turn, 8)
    # The last of the answer was told, but never fed to the model.
    assert engine.counters.cached_tokens == len(prompt) + len(answer) - 1
    assert engine.counters.prefix_hits == 1
    # Another beginning is not mistaken for it.
    other = (prompt[0] ^ 1, *prompt[1:])
    assert one(engine, other) == continued(other, 8)
    assert engine.counters.prefix_hits == 1


def test_conversations_that_take_turns_are_all_remembered():
    engine = make()
    turns = [tuple(PROMPTS[i]) for i in (1, 5, 6)]
    for round_ in range(3):
        for i, turn in enumerate(turns):
            answer = one(engine, turn)
            assert answer == continued(turn, 8)
            turns[i] = (*turn, *answer, round_)
    assert engine.counters.prefix_hits == 6


def test_answers_to_one_prompt_read_it_once():
    engine = make()
    prompt = PROMPTS[6]
    requests = [
        Request(str(i), prompt, Sampling(max_tokens=8, seed=i)) for i in range(SLOTS)
    ]
    events = finish(engine, *requests)
    assert engine.counters.prefix_hits == SLOTS - 1
    assert engine.counters.cached_tokens == (SLOTS - 1) * (len(prompt) - 1)
    assert len({ids_of(e) for e in events.values()}) > 1
    for i in range(SLOTS):
        fresh = one(make(), prompt, Sampling(max_tokens=8, seed=i))
        assert ids_of(events[str(i)]) == fresh


def test_slots_do_not_leak_after_many_cancels():
    engine = make()
    rng = np.random.default_rng(0)
    for n in range(300):
        engine.submit(Request(str(n), PROMPTS[n % len(PROMPTS)], GREEDY))
        if rng.random() < 0.5:
            engine.step()
        engine.cancel(str(n - int(rng.integers(4))))
    for n in range(300):
        engine.cancel(str(n))
    engine.step()
    assert engine.idle
    assert engine.n_running == engine.n_waiting == 0
    assert sum(engine.counters.finished.values()) == 300
    assert one(engine, PROMPTS[2]) == continued(tuple(PROMPTS[2]), 8)


def test_stop_ids_eos_and_min_tokens():
    prompt = tuple(PROMPTS[2])
    want = continued(prompt, 8)
    stop = next(i for i in want if i != want[0])
    at = want.index(stop)
    eos = make(eos_ids=(stop,))
    for engine, knobs in ((make(), {"stop_ids": (stop,)}), (eos, {})):
        s = Sampling(temperature=0.0, max_tokens=8, **knobs)
        (events,) = finish(engine, Request("a", prompt, s)).values()
        assert ids_of(events) == want[:at]
        assert (events[-1].finish_reason, events[-1].stop_id) == ("stop", stop)
        assert events[-1].ids == ()
    ignoring = Sampling(temperature=0.0, max_tokens=8, ignore_eos=True)
    assert one(eos, prompt, ignoring) == want
    early = Sampling(temperature=0.0, max_tokens=8, min_tokens=6)
    ids = one(eos, prompt, early)
    assert ids[:at] == want[:at]
    assert len(ids) >= 6
    assert stop not in ids[:6]


def test_log_probabilities_of_prompt_and_output():
    prompt = PROMPTS[5]
    s = Sampling(temperature=0.0, max_tokens=4, logprobs=3, prompt_logprobs=True)
    engine = make()
    one(engine, prompt)  # so that there is a prefix that must not be used
    (events,) = finish(engine, Request("a", prompt, s)).values()
    ids = [*prompt, *ids_of(events)]
    logits = reference.forward(CFG, params(), np.array([ids]))[0]
    logp = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)
    told = [*events[0].prompt_logprobs, *(p for e in events for p in e.logprobs)]
    assert told[0] is None
    assert len(told) == len(ids)
    for i, p in enumerate(told[1:], start=1):
        assert p.id == ids[i]
        assert p.logprob == pytest.approx(logp[i - 1, ids[i]], abs=LOGPROB_ATOL)
        best = np.argsort(-logp[i - 1])[:3]
        assert [t for t, _ in p.top] == best.tolist()
        np.testing.assert_allclose(
            [x for _, x in p.top], logp[i - 1, best], atol=LOGPROB_ATOL
        )


def test_a_prompt_alone_is_scored():
    s = Sampling(max_tokens=0, prompt_logprobs=True)
    (events,) = finish(make(), Request("a", PROMPTS[5], s)).values()
    (event,) = events
    assert (event.ids, event.finish_reason) == ((), "length")
    assert len(event.prompt_logprobs) == len(PROMPTS[5])
    assert event.prompt_logprobs[3].top == ()


@pytest.mark.slow  # three sizes of every program
def test_a_cache_that_grows_gives_the_same():
    rng = np.random.default_rng(5)
    prompts = [tuple(rng.integers(V, size=n).tolist()) for n in (60, 300)]
    engine = make(capacity=600, grow=True)
    for prompt in prompts:
        assert one(engine, prompt) == continued(prompt, 8)
    turn = (*prompts[0], *continued(prompts[0], 8)[:1])
    assert one(engine, turn) == continued(turn, 8)
    assert engine.counters.prefix_hits == 1  # it kept what it held


def test_to_the_last_column():
    """Where a chunk's padding has no room, some tokens are read once more."""
    engine = make(capacity=128, prefill_chunk=100)
    prompt = tuple(np.random.default_rng(6).integers(V, size=125).tolist())
    s = Sampling(temperature=0.0, max_tokens=3, logprobs=0, prompt_logprobs=True)
    (events,) = finish(engine, Request("a", prompt, s)).values()
    assert ids_of(events) == continued(prompt, 3)
    assert None not in events[0].prompt_logprobs[1:]


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (Request("a", [], GREEDY), "no tokens"),
        (Request("a", [0, V], GREEDY), f"prompt: id {V} is not in the vocabulary"),
        (Request("a", [-1], GREEDY), "prompt: id -1"),
        (Request("a", [1] * 113, GREEDY), "are 121, over the capacity of 120"),
        (Request("a", [1], Sampling(stop_ids=(V,), max_tokens=1)), "stop_ids: id"),
        (Request("a", [1], Sampling(logit_bias={V: 1}, max_tokens=1)), "logit_bias:"),
        (Request("a", [1], Sampling(max_tokens=0)), "0 needs prompt_logprobs"),
        (Request("busy", [1], GREEDY), "'busy' is not finished"),
    ],
)
def test_impossible_requests_are_refused(request_, message):
    engine = make()
    engine.submit(Request("busy", [1], GREEDY))
    with pytest.raises(UserError, match=message):
        engine.submit(request_)
    assert len(finish(engine)) == 1


def test_learned_positions_end():
    cfg = parse(ModelConfig, FIELDS | {"learned_pos_emb": True, "attn_config": {}})
    with pytest.raises(UserError, match="over max_seq_len 100, where the learned"):
        Engine(cfg, {}, n_slots=1, capacity=101)


def test_beyond_max_seq_len_is_said_once(caplog):
    engine = make()
    long = tuple(np.random.default_rng(8).integers(V, size=98).tolist())
    with caplog.at_level(logging.WARNING):
        assert one(engine, long) == continued(long, 8)
        one(engine, long)
    assert len(caplog.records) == 1
    assert "106 tokens are over max_seq_len 100" in caplog.text


def test_memory_that_is_short_is_told_before_it_is_taken(monkeypatch):
    monkeypatch.setattr(memory, "_host_bytes", lambda: 2**30)
    with pytest.raises(UserError) as caught:
        make(capacity=2**22)
    # 2 layers, 2 KV heads of 4, k and v in float32; and a norm per 128 columns.
    gib = 4 * 2**22 * (2 * 2 * 2 * 4 * 4 + 2 * 2 * 4 / 128) / 2**30
    assert str(caught.value).startswith(
        f"a cache of 4 x {2**22} tokens needs {gib:.2f} GiB, and this machine has 1.00 "
        f"GiB free: {gib - 1:.2f} GiB are missing"
    )
    engine = make(capacity=2**22, grow=True)  # as long as it is small
    with pytest.raises(UserError, match="are missing"):
        finish(engine, Request("a", [1] * 10, Sampling(max_tokens=2**21)))


def test_a_request_that_is_not_finite_ends_alone_and_leaves_nothing():
    spoiled = jax.tree.map(lambda a: a, serving())
    table = np.array(spoiled["wte"]["weight"])
    table[V - 1] = np.nan
    spoiled["wte"] = {"weight": jax.numpy.asarray(table)}
    engine = Engine(CFG, spoiled, n_slots=2, capacity=MAX_LEN, prefill_chunk=CHUNK)
    good = next(tuple(p) for p in PROMPTS if V - 1 not in (*p, *continued(tuple(p), 8)))
    bad = Request("bad", [1] * 20 + [V - 1] + [2] * 30, GREEDY)
    events = finish(engine, bad, Request("good", good, GREEDY))
    (error,) = events["bad"]
    assert (error.finish_reason, error.ids) == ("error", ())
    assert "not finite" in error.error
    assert ids_of(events["good"]) == continued(good, 8)
    assert one(engine, good) == continued(good, 8)  # in the slot of the bad one


@pytest.mark.parametrize(
    "mesh",
    [{"tensor": 2, "fsdp": 1}, pytest.param({"fsdp": 2}, marks=pytest.mark.slow)],
    ids=str,
)
def test_the_mesh_changes_no_greedy_token(mesh):
    devices = jax.devices()[:2]
    with partitioning.use(partitioning.make_mesh(MeshConfig(**mesh), devices)):
        placed = jax.tree.map(
            lambda a: jax.device_put(a, jax.NamedSharding(
                partitioning.current_mesh(), jax.P())), serving())  # fmt: skip
        engine = Engine(CFG, placed, n_slots=2, capacity=MAX_LEN, prefill_chunk=CHUNK)
    # And outside of use(), as a server's thread is.
    requests = [Request(str(i), PROMPTS[i], GREEDY) for i in (0, 2)]
    events = finish(engine, *requests)
    for i in (0, 2):
        assert ids_of(events[str(i)]) == continued(tuple(PROMPTS[i]), 8)


@pytest.mark.parametrize("committed", [False, True])
def test_after_warming_up_nothing_is_compiled(committed):
    params = jax.device_put(serving(), jax.devices()[0] if committed else None)
    engine = Engine(CFG, params, n_slots=2, capacity=MAX_LEN, prefill_chunk=CHUNK)
    engine.warm_up()
    compiled = []

    def listen(event, seconds, **kwargs):
        if event == "/jax/core/compile/backend_compile_duration":
            compiled.append(kwargs)

    jax.monitoring.register_event_duration_secs_listener(listen)
    try:
        finish(engine, *(Request(str(i), p, GREEDY) for i, p in enumerate(PROMPTS)))
        assert compiled == []
        jax.jit(lambda x: x + len(compiled))(1)  # as it would be seen
        assert compiled
    finally:
        jax.monitoring.unregister_event_duration_listener(listen)


def test_warming_up_leaves_no_trace():
    engine = make(n_slots=2, prefill_chunk=32)
    engine.warm_up()
    assert one(engine, PROMPTS[1]) == continued(tuple(PROMPTS[1]), 8)
    engine.submit(Request("a", [1], GREEDY))
    with pytest.raises(UserError, match="there are requests"):
        engine.warm_up()


# ------------------------------------------------------------------ as text: text.run()


class Letters(ByteTokenizer):
    """Ids 0..39 as bytes from "@" on."""

    vocab_size, eos_id = V, V - 1

    def encode(self, text):
        return [b - 64 for b in text.encode()]

    def decode(self, ids):
        return bytes(i + 64 for i in ids).decode()


def told(engine, *requests):
    deltas = {}
    for delta in text.run(engine, Letters(), requests):
        deltas.setdefault(delta.id, []).append(delta)
    return deltas


def test_stop_strings_end_a_request_and_free_its_slot():
    prompt = tuple(PROMPTS[0])
    whole = Letters().decode(continued(prompt, 8))
    stop = whole[3:5]  # over two tokens
    s = Sampling(temperature=0.0, max_tokens=8, stop=(stop,))
    engine = make(n_slots=1)
    for _ in range(3):  # the same id again: no news of the last one are taken for it
        (deltas,) = told(engine, Request("a", prompt, s)).values()
        assert "".join(d.text for d in deltas) == whole[: whole.index(stop)]
        assert deltas[-1].finish_reason == "stop"
        assert engine.idle
    assert engine.counters.finished == {"cancelled": 3}


def test_leaving_early_cancels():
    engine = make()
    requests = [Request(str(i), PROMPTS[i], GREEDY) for i in range(6)]
    deltas = text.run(engine, Letters(), requests)
    next(deltas)
    deltas.close()
    assert engine.idle
    with pytest.raises(UserError, match="no tokens"):
        told(engine, requests[0], Request("bad", [], GREEDY))
    assert engine.idle
    stop = Sampling(stop=("x",), max_tokens=1)
    with pytest.raises(UserError, match="stop strings need a tokenizer"):
        list(text.run(engine, None, [Request("a", [1], stop)]))
