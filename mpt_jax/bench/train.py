"""Speed and memory of the training step: ``python -m mpt_jax.bench.train``.

    python -m mpt_jax.bench.train --config configs/mpt_125m.py --batch 4 --seq_len 512
    python -m mpt_jax.bench.train --config configs/mpt_1b.py --batch 8 --out r.json

Times the step that train.py runs, on synthetic batches (or the config's own with
``--data config``), as rounds of steps with one wait at the end of each. With
``--peer hf`` the same shape runs through transformers' MptForCausalLM and torch's AdamW
in a process beside, round about, and the ratio of the medians is reported: machine
noise hits both. MFU is LLM Foundry's: (6 N + 12 layers d_model S) FLOPs per token over
the dense bfloat16 peak of the chip.
"""

from __future__ import annotations

import contextlib
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

from mpt_jax import cli
from mpt_jax.bench.common import beside, interleave, provenance, save
from mpt_jax.config import TrainConfig
from mpt_jax.errors import EXIT_OK, ConfigError, run_verb
from mpt_jax.validate import check_mesh


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(prog="python -m mpt_jax.bench.train", description=__doc__)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE.py")
    add("--batch", type=int, help="sequences a step; default the config's")
    add("--seq_len", type=int, help="tokens a sequence; default the config's")
    add("--rounds", type=int, default=5, help="timed rounds; the median is reported")
    add("--steps", type=int, default=2, help="steps a round")
    add("--data", choices=("synthetic", "config"), default="synthetic")
    add("--peer", choices=("hf",), help="time this one too, round about")
    add("--out", metavar="FILE.json", help="also write the result there")
    add("--traceback", action="store_true")

    def run() -> int:
        flags, overrides = cli.parse_args(parser, argv)
        shape = {"global_batch_size": flags.batch, "data.seq_len": flags.seq_len}
        given = {k: str(v) for k, v in shape.items() if v is not None}
        if flags.data == "synthetic":
            given |= {"data.source": "synthetic", "sample.max_tokens": "0"}
        config = cli.load_config(flags.config, {**given, **overrides})
        result = bench(
            config, rounds=flags.rounds, steps=flags.steps, peer=flags.peer is not None
        )
        overrides = {**given, **overrides}
        result = provenance("train", argv) | {"overrides": overrides} | result
        print(json.dumps(result, indent=1))
        save(result, flags.out)
        return EXIT_OK

    return run_verb(run, show_traceback="--traceback" in argv)


def bench(
    config: TrainConfig, *, rounds: int, steps: int, peer: bool = False
) -> dict[str, Any]:
    """Medians over ``rounds`` of ``steps`` steps of ours, and of the peer's.

    Raises: ConfigError: the mesh does not fit, or HF cannot express the model.
    """
    import jax

    from mpt_jax import partitioning

    if problems := check_mesh(config, jax.device_count()):
        raise ConfigError(problems)
    device = jax.devices()[0]
    with contextlib.ExitStack() as stack:
        stack.enter_context(partitioning.use(partitioning.make_mesh(config.mesh)))
        compile_seconds, memory, ours = _ours(config)
        runs = {"ours": ours}
        if peer:
            runs["hf"] = stack.enter_context(beside(_hf, config))
        samples = interleave(runs, rounds, warm_up=1, timed=steps)
    seconds = {name: [s for s, _ in both] for name, both in samples.items()}
    result = {
        "device": device.device_kind,
        "devices": jax.device_count(),
        "batch": config.global_batch_size,
        "seq_len": config.seq_len,
        "compute_dtype": config.model.compute_dtype,
        "remat": config.model.remat,
        "compile_seconds": round(compile_seconds, 1),
        **memory,
    }
    for name, samples in seconds.items():
        result[name] = _rates(config, [s / steps for s in samples])
    if peer:
        ratio = statistics.median(seconds["hf"]) / statistics.median(seconds["ours"])
        result["speedup_over_hf"] = round(ratio, 3)
    return result


def _ours(
    config: TrainConfig,
) -> tuple[float, dict[str, float], Callable[[int], None]]:
    """(seconds to compile, memory in GiB, a function that runs so many steps)."""
    import jax

    from mpt_jax.data import feed
    from mpt_jax.partitioning import current_mesh
    from mpt_jax.training.step import make_program

    program = make_program(config, current_mesh())
    begin = time.perf_counter()
    lowered = program.step.lower(program.struct, program.batch_struct(config))
    analysis = lowered.compile().memory_analysis()
    compile_seconds = time.perf_counter() - begin
    memory = {}
    if analysis is not None:
        memory = {
            "state_gib": round(analysis.argument_size_in_bytes / 2**30, 3),
            "temporaries_gib": round(analysis.temp_size_in_bytes / 2**30, 3),
        }
    source = feed.open_source(config, tokenizer=feed.tokenizer(config))
    put = jax.make_array_from_process_local_data
    batch = {k: put(program.batch_sharding, v) for k, v in next(source).items()}
    source.close()
    state = [program.init(jax.random.key(config.seed))]

    def run(steps: int) -> None:
        for _ in range(steps):
            state[0], metrics = program.step(state[0], batch)
        jax.block_until_ready((state[0], metrics))

    return compile_seconds, memory, run


def _hf(config: TrainConfig) -> Callable[[int], None]:
    """The same shape through transformers and torch, as its users would train it."""
    import torch
    import transformers

    m = config.model
    hidden = m.attn_config
    fits = hidden.alibi and hidden.alibi_bias_max == 8 and m.no_bias
    fits = fits and m.expansion_ratio == 4 and m.n_kv_heads == m.n_heads
    if not fits or m.compute_dtype != "float32":
        raise ConfigError(
            ["--peer hf: transformers only has MPT with ALiBi (bias_max 8), no biases, "
             "MHA, expansion 4; here in float32. Override model.no_bias=true, "
             "model.attn_config.alibi=true, model.compute_dtype=float32"]
        )  # fmt: skip
    model = transformers.MptForCausalLM(
        transformers.MptConfig(
            d_model=m.d_model, n_heads=m.n_heads, n_layers=m.n_layers,
            vocab_size=m.vocab_size, max_seq_len=config.seq_len, use_cache=False,
        )
    ).train()  # fmt: skip
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=config.optim.lr, betas=config.optim.betas,
        eps=config.optim.eps, weight_decay=config.optim.weight_decay,
    )  # fmt: skip
    shape = (config.global_batch_size, config.seq_len)
    ids = torch.randint(0, m.vocab_size, shape)

    def run(steps: int) -> None:
        for _ in range(steps):
            loss = model(ids, labels=ids).loss
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), config.optim.clip_norm)
            optimizer.step()
            optimizer.zero_grad()

    return run


def _rates(config: TrainConfig, step_seconds: list[float]) -> dict[str, float]:
    import jax

    from mpt_jax.models.mpt import count_params
    from mpt_jax.training.metrics import flops_per_token, peak_flops

    median = statistics.median(step_seconds)
    tokens_per_second = config.tokens_per_step / median
    flops = flops_per_token(config.model, config.seq_len, count_params(config.model))
    rates = {
        "step_seconds": round(median, 4),
        "spread": round((max(step_seconds) - min(step_seconds)) / median, 3),
        "tokens_per_second": round(tokens_per_second, 1),
        "teraflops": round(tokens_per_second * flops.full / 1e12, 3),
    }
    peak = peak_flops(jax.devices()[0].device_kind)
    if peak is not None:
        peak *= jax.device_count()
        rates["mfu"] = round(tokens_per_second * flops.full / peak, 4)
        rates["mfu_causal"] = round(tokens_per_second * flops.causal / peak, 4)
    return rates


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
