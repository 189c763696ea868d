"""Speed of the server: ``python -m mpt_jax.bench.serve``.

    python -m mpt_jax.bench.serve --streams 1 32
    python -m mpt_jax.bench.serve --preset mpt-7b --dtype bfloat16 --prompt 512

A real server on a loopback socket, with fresh weights, and its clients in a process
beside: so many at a time each stream one answer after another. Reported are the tokens
of all streams a second, and what a client sees: the seconds to its first token and
between two. Only ASCII is drawn, so that every token is a byte of text.
"""

from __future__ import annotations

import argparse
import asyncio
import dataclasses
import json
import statistics
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from mpt_jax import presets
from mpt_jax.bench.common import beside, interleave, provenance, save, table
from mpt_jax.errors import EXIT_OK, InternalError, run_verb

COLUMNS = (
    "streams", "tokens_per_second", "over_one_stream", "first_token_p50_ms",
    "first_token_p99_ms", "between_tokens_p50_ms", "between_tokens_p99_ms",
)  # fmt: skip
ASCII = 128


@dataclasses.dataclass(frozen=True)
class Load:
    """``streams`` clients, each with ``requests`` prompts, one after another."""

    streams: int
    requests: int
    prompt: int
    tokens: int


@dataclasses.dataclass(frozen=True)
class Answer:
    """seconds: from asking to each news of a token."""

    n_tokens: int
    seconds: tuple[float, ...]


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mpt_jax.bench.serve", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    add("--preset", default="mpt-125m", choices=sorted(presets.PRESETS))
    add("--dtype", choices=("float32", "bfloat16"), default="float32")
    add("--streams", type=int, nargs="+", default=[1, 32], help="clients at a time")
    add("--requests", type=int, default=2, help="of each client, in a round")
    add("--prompt", type=int, default=64, help="tokens of each prompt")
    add("--tokens", type=int, default=64, help="new tokens of each answer")
    add("--rounds", type=int, default=3, help="of which the median is reported")
    add("--out", metavar="FILE.json", help="also write the result there")
    add("--traceback", action="store_true", help="show the stack of an error")

    def run() -> int:
        flags = parser.parse_args(argv)
        result = provenance("serve", argv) | bench(flags)
        print(table(result["rows"], COLUMNS))
        save(result, flags.out)
        return EXIT_OK

    return run_verb(run, show_traceback="--traceback" in argv)


def bench(flags: argparse.Namespace) -> dict[str, Any]:
    """A row for each number of streams; the first is what others are compared with."""
    import jax

    from mpt_jax.serving import server

    bound = server.bind("127.0.0.1", 0)
    running = server.Server(_service(flags), drain=0.0)
    thread = threading.Thread(target=running.serve_until_done, args=(bound,))
    thread.start()
    try:
        while not running.started:
            time.sleep(0.01)
        rows = _measure(server.url(bound), flags)
    finally:
        running.should_exit = True
        thread.join()
        bound.close()
    return {
        "device": jax.devices()[0].device_kind,
        "preset": flags.preset,
        "dtype": flags.dtype,
        "prompt": flags.prompt,
        "tokens": flags.tokens,
        "rows": rows,
    }


def _service(flags: argparse.Namespace) -> Any:
    """A server's service of fresh weights; as many slots as there are streams."""
    import jax

    from mpt_jax.generation.engine import Engine
    from mpt_jax.models import mpt, weights
    from mpt_jax.serving.app import Limits, Service
    from mpt_jax.serving.jobs import Worker
    from mpt_jax.serving.protocol import Rules
    from mpt_jax.tokenizer import ByteTokenizer

    most, context = max(flags.streams), flags.prompt + flags.tokens
    cfg = presets.model(flags.preset)
    cfg = dataclasses.replace(
        cfg, param_dtype=flags.dtype, compute_dtype=flags.dtype,
        max_seq_len=max(cfg.max_seq_len, context),
    )  # fmt: skip
    params = jax.jit(mpt.init, static_argnums=0)(cfg, jax.random.key(0))
    params = weights.settle(weights.unstack(params, consume=True))
    engine = Engine(
        cfg, params, n_slots=most, capacity=context, vocab_size=ASCII, tokens_per_call=1
    )
    engine.warm_up()
    return Service(
        worker=Worker(engine, most=most),
        tokenizer=ByteTokenizer(),
        rules=Rules(flags.preset, context, ASCII, most),
        limits=Limits(timeout=3600.0),
    )


def _measure(url: str, flags: argparse.Namespace) -> list[dict[str, Any]]:
    rows = []
    with beside(_clients, url) as run:
        for streams in flags.streams:
            load = Load(streams, flags.requests, flags.prompt, flags.tokens)
            once = dataclasses.replace(load, requests=1)
            found = interleave({"": run}, flags.rounds, warm_up=once, timed=load)[""]
            rates = [sum(a.n_tokens for a in told) / sec for sec, told in found]
            answers = [a for _, told in found for a in told]
            between = [
                later - sooner
                for a in answers
                for sooner, later in zip(a.seconds, a.seconds[1:], strict=False)
            ]
            rate = statistics.median(rates)
            row = {
                "streams": streams,
                "tokens_per_second": round(rate, 1),
                "spread": round((max(rates) - min(rates)) / rate, 3),
                **_percentiles("first_token", [a.seconds[0] for a in answers]),
                **_percentiles("between_tokens", between),
            }
            base = (rows or [row])[0]["tokens_per_second"]
            rows.append(row | {"over_one_stream": round(rate / base, 2)})
    return rows


def _percentiles(name: str, seconds: Sequence[float]) -> dict[str, float]:
    import numpy as np

    found = np.percentile(np.array(seconds) * 1e3, (50, 99)).tolist()
    pairs = zip((50, 99), found, strict=True)
    return {f"{name}_p{p}_ms": round(value, 2) for p, value in pairs}


def _clients(url: str) -> Callable[[Load], list[Answer]]:
    """A function that puts a load on the server and returns all answers."""
    import random

    import httpx

    rng = random.Random(0)

    async def ask(client: httpx.AsyncClient, load: Load) -> Answer:
        prompt = rng.choices(range(ASCII), k=load.prompt)  # never seen before
        body = {"prompt": prompt, "max_tokens": load.tokens, "temperature": 0,
                "stream": True, "stream_options": {"include_usage": True}}  # fmt: skip
        begin, seconds, usage = time.perf_counter(), [], {}
        async with client.stream("POST", "/v1/completions", json=body) as answer:
            if answer.status_code != 200:
                raise InternalError((await answer.aread()).decode())
            async for line in answer.aiter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line.removeprefix("data: "))
                    usage = event["usage"] or usage
                    if event["choices"]:
                        seconds.append(time.perf_counter() - begin)
        return Answer(usage["completion_tokens"], tuple(seconds))

    async def all_of(load: Load) -> list[Answer]:
        async with httpx.AsyncClient(base_url=url, timeout=None) as client:

            async def one() -> list[Answer]:
                return [await ask(client, load) for _ in range(load.requests)]

            told = await asyncio.gather(*(one() for _ in range(load.streams)))
        return [answer for answers in told for answer in answers]

    return lambda load: asyncio.run(all_of(load))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
