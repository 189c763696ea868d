"""Speed of generation: ``python -m mpt_jax.bench.decode``.

    python -m mpt_jax.bench.decode --dtype float32 --peer hf
    python -m mpt_jax.bench.decode --preset mpt-7b --prompt 2048 --batches 1

For each batch size random prompts go through the engine that generate and serve use,
with fresh weights: the prompts alone (prefill), then prompts and new tokens, of which
each step that decodes the whole batch is timed (decode). A step must read every weight
and the keys of every row once; ``floor`` is those bytes over the speed at which this
machine reads a large array, measured in the same run. Weights are rounded to bfloat16,
as all released ones are, whatever the arithmetic, or with --weights float32 not at all.
With ``--peer hf`` transformers' generate() runs on the same weights in a process
beside, round about, and the ratios of the medians are reported.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import itertools
import pathlib
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mpt_jax import presets
from mpt_jax.bench.common import beside, interleave, provenance, save, table
from mpt_jax.config import ModelConfig
from mpt_jax.errors import EXIT_OK, run_verb

COLUMNS = (
    "batch", "who", "prefill_tokens_per_second", "decode_tokens_per_second",
    "p50_ms", "p90_ms", "p99_ms", "floor_ms", "share_of_floor",
)  # fmt: skip
# Read by one sum: well over every cache, well under every memory.
_PROBE_BYTES = 2**29


@dataclasses.dataclass(frozen=True)
class Load:
    """batch requests of ``prompt`` tokens, each continued by ``tokens`` (0: scored)."""

    batch: int
    prompt: int
    tokens: int


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mpt_jax.bench.decode", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False,
    )  # fmt: skip
    add = parser.add_argument
    add("--preset", default="mpt-125m", choices=sorted(presets.PRESETS))
    add("--batches", type=int, nargs="+", default=[1, 8, 32])
    add("--prompt", type=int, default=128, help="tokens of each prompt")
    add("--tokens", type=int, default=64, help="new tokens of each")
    add("--rounds", type=int, default=3, help="of which the median is reported")
    add(
        "--dtype",
        choices=("float32", "bfloat16"),
        default="bfloat16",
        help="of the arithmetic",
    )
    add(
        "--weights",
        choices=("float32", "bfloat16", "int8"),
        default="bfloat16",
        help="how matrices are stored; the peer takes those of int8 as bfloat16",
    )
    add("--peer", choices=("hf",), help="time this one too, round about")
    add("--out", metavar="FILE.json", help="also write the result there")
    add("--traceback", action="store_true", help="show the stack of an error")

    def run() -> int:
        flags = parser.parse_args(argv)
        result = provenance("decode", argv) | bench(flags)
        print(table(result["rows"], COLUMNS))
        save(result, flags.out)
        return EXIT_OK

    return run_verb(run, show_traceback="--traceback" in argv)


def bench(flags: argparse.Namespace) -> dict[str, Any]:
    """Medians of every batch size.

    Raises: ConfigError: the peer cannot express the model.
    """
    import jax

    from mpt_jax.models import mpt, weights

    cfg = _config(flags)
    params = jax.jit(mpt.init, static_argnums=0)(cfg, jax.random.key(0))
    read_rate = read_bytes_per_second()
    rows = []
    with contextlib.ExitStack() as stack:
        peer = None
        if flags.peer:
            folder = stack.enter_context(_hf_folder(cfg, params))
            peer = stack.enter_context(beside(_hf, folder, flags.dtype))
        params = weights.unstack(params, consume=True)
        if flags.weights == "int8":
            params = weights.quantize(params)
        elif flags.weights != flags.dtype:
            params = weights.three_pass(params)
        params = weights.settle(params)
        for batch in flags.batches:
            load = Load(batch, flags.prompt, flags.tokens)
            runs = {"ours": _ours(cfg, params, batch, load.prompt + load.tokens)}
            if peer is not None:
                runs["hf"] = peer
            found = _measure(runs, load, flags.rounds)
            n_bytes = step_bytes(cfg, params, batch, load.prompt + load.tokens // 2)
            floor = n_bytes / read_rate
            for who, row in found.items():
                row |= {"batch": batch, "who": who, "floor_ms": round(floor * 1e3, 3)}
                row["share_of_floor"] = round(floor * 1e3 / row["p50_ms"], 3)
                rows.append(row)
    result = {
        "device": jax.devices()[0].device_kind,
        "preset": flags.preset,
        "dtype": flags.dtype,
        "weights": flags.weights,
        "prompt": flags.prompt,
        "tokens": flags.tokens,
        "read_gb_per_second": round(read_rate / 1e9, 1),
        "rows": rows,
    }
    if flags.peer:
        result["over_hf"] = [
            {"batch": ours["batch"]} | {
                name: round(ours[name] / theirs[name], 2) for name in
                ("prefill_tokens_per_second", "decode_tokens_per_second")
            }
            for ours, theirs in zip(rows[::2], rows[1::2], strict=True)
        ]  # fmt: skip
    return result


def _config(flags: argparse.Namespace) -> ModelConfig:
    """The preset with room for the load; for the peer the nearest that HF has."""
    most = flags.prompt + flags.tokens
    cfg = presets.model(flags.preset)
    stored = "bfloat16" if flags.weights == "int8" else flags.weights
    fields: dict[str, Any] = {
        "param_dtype": stored, "compute_dtype": flags.dtype,
        "max_seq_len": max(cfg.max_seq_len, most),
    }  # fmt: skip
    if flags.peer:
        attn = dataclasses.replace(cfg.attn_config, alibi=True)
        fields |= {"attn_config": attn, "learned_pos_emb": False, "no_bias": True}
    return dataclasses.replace(cfg, **fields)


def read_bytes_per_second() -> float:
    """How fast this device reads memory: the best of five sums over half a GiB."""
    import jax
    import jax.numpy as jnp

    a = jnp.ones((_PROBE_BYTES // 4,), jnp.float32)
    total = jax.jit(jnp.sum)
    seconds = []
    for _ in range(6):
        begin = time.perf_counter()
        jax.block_until_ready(total(a))
        seconds.append(time.perf_counter() - begin)
    return a.nbytes / min(seconds[1:])


def step_bytes(cfg: ModelConfig, params: Any, batch: int, length: int) -> int:
    """What one decoding step must read: weights once, each row's keys and values.

    Of an untied embedding only the rows at hand count.
    """
    import jax

    from mpt_jax.models import cache

    used = {k: v for k, v in params.items() if k != "wpe"}
    if not cfg.tie_word_embeddings:
        used.pop("wte")
    weights = sum(a.nbytes for a in jax.tree.leaves(used))
    return weights + cache.n_bytes(cfg, batch, length)


def _measure(
    runs: dict[str, Callable[[Load], list[float]]], load: Load, rounds: int
) -> dict[str, dict[str, Any]]:
    short = dataclasses.replace(load, tokens=1)
    alone = interleave(runs, rounds, warm_up=short, timed=short)
    both = interleave(runs, rounds, warm_up=short, timed=load)
    found = {}
    for who in runs:
        prefill = statistics.median(seconds for seconds, _ in alone[who])
        steps = np.array([s for _, latencies in both[who] for s in latencies]) * 1e3
        found[who] = {
            "prefill_tokens_per_second": round(load.batch * load.prompt / prefill, 1),
            "decode_tokens_per_second": round(load.batch * 1e3 / steps.mean(), 1),
            **{f"p{p}_ms": round(float(np.percentile(steps, p)), 2)
               for p in (50, 90, 99)},
        }  # fmt: skip
    return found


def _ours(
    cfg: ModelConfig, params: Any, batch: int, capacity: int
) -> Callable[[Load], list[float]]:
    """A function that serves a load and returns the seconds of each decoding step."""
    from mpt_jax.generation.engine import Engine, Request
    from mpt_jax.generation.sampling import Sampling

    engine = Engine(cfg, params, n_slots=batch, capacity=capacity)
    engine.warm_up()
    rng = np.random.default_rng(0)

    def run(load: Load) -> list[float]:
        greedy = Sampling(temperature=0.0, max_tokens=load.tokens, ignore_eos=True)
        for i in range(load.batch):  # ids never seen before: nothing is reused
            prompt = rng.integers(cfg.vocab_size, size=load.prompt).tolist()
            engine.submit(Request(str(i), prompt, greedy))
        steps: list[list[float]] = []
        while not engine.idle:
            begin = time.perf_counter()
            told = sum(len(event.ids) for event in engine.step())
            n, rest = divmod(told, load.batch)
            if n and not rest:  # several tokens of each: their share
                steps.append([(time.perf_counter() - begin) / n] * n)
        return list(itertools.chain(*steps[1:]))  # the first waited for a prompt

    return run


@contextlib.contextmanager
def _hf_folder(cfg: ModelConfig, params: Any) -> Iterator[str]:
    """The model as transformers reads it."""
    from mpt_jax.interop import names, write

    flat = names.flatten(params)

    def parts() -> write.Parts:
        for tensor in names.tensors(cfg).values():
            for part in tensor.parts:
                whole = flat[part.path]
                layer = whole if part.layer is None else whole[part.layer]
                yield part, np.asarray(layer)

    with tempfile.TemporaryDirectory() as folder:
        out = pathlib.Path(folder) / "model"
        write.write_folder(
            out, parts(), cfg, kind="hf", dtype=cfg.param_dtype, tokens={}, tokenizer=[]
        )
        yield str(out)


def _hf(folder: str, dtype: str) -> Callable[[Load], list[float]]:
    """Like _ours, through transformers as its users would run it."""
    import torch
    import transformers

    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=getattr(torch, dtype)
    ).to(device).eval()  # fmt: skip
    rng = np.random.default_rng(0)

    class Clock(transformers.StoppingCriteria):
        """Asked after each token of a batch; stops nothing."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def __call__(self, input_ids: Any, scores: Any, **kwargs: Any) -> Any:
            self.times.append(time.perf_counter())
            return torch.zeros(len(input_ids), dtype=torch.bool, device=device)

    def run(load: Load) -> list[float]:
        shape = load.batch, load.prompt
        ids = rng.integers(model.config.vocab_size, size=shape)
        batch, clock = torch.from_numpy(ids).to(device), Clock()
        model.generate(
            batch, attention_mask=torch.ones_like(batch), do_sample=False,
            min_new_tokens=load.tokens, max_new_tokens=load.tokens, pad_token_id=0,
            stopping_criteria=[clock],
        )  # fmt: skip
        return np.diff(clock.times).tolist()

    return run


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
