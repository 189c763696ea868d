"""ALiBi attention, ours beside the others: ``python -m mpt_jax.bench.attention``.

    python -m mpt_jax.bench.attention --out r.json --plot r.png
    python -m mpt_jax.bench.attention --lengths 2048,8192 --only "ours,torch flex"

On an NVIDIA GPU: bfloat16, 32 heads of 128, 16k tokens a call (one row beyond 16k),
the slopes of MPT-7B and of StoryWriter, logits of standard deviation 1 and 4. On a CPU:
float32, 4 heads of 128, one row. All in one process, round about, so that the noise
of the machine hits all; inputs exceed the GPU's cache. FLOPs are the causal half's,
skipped or not ("effective"); the backward counts 2.5 times the forward.

Before it is timed, a contender's last rows and keys are compared with float64: "error"
is its worst relative L2 distance over that of naive bfloat16 (bfloat16 matmuls, float32
softmax). Ours must stay within 1.5, or the bench fails; for others it is reported.
"""

from __future__ import annotations

import argparse
import os
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpt_jax.bench import attention_peers as peers
from mpt_jax.bench import common
from mpt_jax.bench.attention_peers import GIB, Problem, Runner
from mpt_jax.errors import EXIT_OK, MptError, UserError, run_verb

# Rows at the end whose outputs and gradients are checked: dk and dv of the last keys
# come from these rows alone.
CHECKED = 64
ERROR_LIMIT = 1.5
# float32 has no naive form to compare with: these are the tests' tolerances.
FLOAT32_RTOL = 1e-5
GPU_TOKENS, GPU_HEADS, CPU_HEADS, HEAD_DIM = 16_384, 32, 4, 128
SLOPES = {"mpt-7b": 8, "storywriter": 16}  # alibi_bias_max
DEFAULTS = {
    "gpu": {"lengths": (2048, 4096, 8192, 16_384, 65_536), "std": (1.0, 4.0)},
    "cpu": {"lengths": (2048, 4096, 8192, 16_384, 32_768), "std": (1.0,)},
}
COLUMNS = (
    "slopes", "std", "length", "contender", "error", "forward_ms", "forward_tflops",
    "both_ms", "both_tflops", "forward_gib", "both_gib",
)  # fmt: skip


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mpt_jax.bench.attention", description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    add = parser.add_argument
    numbers = {"type": _list_of(int), "metavar": "N,N"}
    add("--lengths", **numbers, help="default 2k to 65k on a GPU, to 32k on a CPU")
    add("--std", type=_list_of(float), metavar="X,X", help="of logits before the bias")
    add("--slopes", type=_list_of(str), default=tuple(SLOPES), help=f"{list(SLOPES)}")
    add("--only", type=_list_of(str), metavar="A,B", help="contenders; default all")
    add("--rounds", type=int, default=7, help="timed rounds; the median is reported")
    add("--sample_seconds", type=float, default=0.1, help="calls fill this per sample")
    add("--max_gib", type=float, default=None, help="skip what would need more")
    add("--out", metavar="FILE.json", help="also write the result there")
    add("--plot", metavar="FILE.png", help="also draw it there")
    add("--traceback", action="store_true")

    def run() -> int:
        os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
        flags = parser.parse_args(argv)
        result = bench(flags)
        result = common.provenance("attention", argv) | result
        common.save(result, flags.out)
        if flags.plot:
            plot(result, flags.plot)
        return EXIT_OK

    return run_verb(run, show_traceback="--traceback" in argv)


def _list_of(kind: Callable[[str], Any]) -> Callable[[str], tuple[Any, ...]]:
    return lambda text: tuple(kind(part.strip()) for part in text.split(","))


def bench(flags: argparse.Namespace) -> dict[str, Any]:
    """Every contender on every problem; prints a line for each as it is done.

    Raises: UserError: unknown names, or ours is wrong.
    """
    import jax

    platform = "gpu" if jax.default_backend() == "gpu" else "cpu"
    known = peers.GPU if platform == "gpu" else peers.CPU
    names = flags.only or tuple(known)
    for what, given, allowed in (
        ("--only", names, known),
        ("--slopes", flags.slopes, SLOPES),
    ):
        if unknown := set(given) - set(allowed):
            raise UserError(f"{what}: got {unknown}, expected some of {list(allowed)}")
    max_gib = flags.max_gib or _memory_gib(platform) * 0.8
    result: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "matmul_tflops": round(_matmul_tflops(platform), 1),
        "rows": [],
    }
    print("  ".join(COLUMNS))
    for problem in problems(platform, flags):
        for row in _bench_one(problem, names, known, flags, max_gib):
            result["rows"].append(row)
            cells = [_cell(row.get(c)) for c in COLUMNS] + [row.get("skipped", "")]
            print("  ".join(cells).rstrip(), flush=True)
    return result


def problems(platform: str, flags: argparse.Namespace) -> list[Problem]:
    """In the order of --slopes, --std and --lengths."""
    from mpt_jax.models.alibi import slopes

    defaults = DEFAULTS[platform]
    heads = GPU_HEADS if platform == "gpu" else CPU_HEADS
    return [
        Problem(
            batch=max(1, GPU_TOKENS // length) if platform == "gpu" else 1,
            length=length,
            heads=heads,
            head_dim=HEAD_DIM,
            dtype="bfloat16" if platform == "gpu" else "float32",
            slopes_name=name,
            slopes=tuple(slopes(heads, bias_max=SLOPES[name]).tolist()),
            logit_std=std,
        )
        for name in flags.slopes
        for std in flags.std or defaults["std"]
        for length in flags.lengths or defaults["lengths"]
    ]


def _bench_one(
    problem: Problem,
    names: Sequence[str],
    known: dict[str, Callable[[Problem], Runner]],
    flags: argparse.Namespace,
    max_gib: float,
) -> list[dict[str, Any]]:
    rows, runners = {}, {}
    wanted = oracle(problem)
    naive = None if problem.dtype == "float32" else oracle(problem, rounded=True)
    for name in names:
        rows[name] = row = {
            "slopes": problem.slopes_name,
            "std": problem.logit_std,
            "length": problem.length,
            "contender": name,
        }
        logits = problem.batch * problem.heads * problem.length**2
        needed = peers.SQUARE_BYTES.get(name, 0) * logits / GIB
        if needed > max_gib:
            row["skipped"] = f"needs about {needed:.0f} GiB of {max_gib:.0f}"
            continue
        try:
            runner = known[name](problem)
            error = _error(problem, runner, wanted, naive)
            forward_gib, both_gib = runner.memory()
        except Exception as problem_of_peer:
            if name.startswith("ours"):
                raise
            row["skipped"] = f"{type(problem_of_peer).__name__}: {problem_of_peer}"[
                :300
            ]
            continue
        row |= {"error": round(error, 3), "forward_gib": forward_gib}
        row["both_gib"] = both_gib
        if name.startswith("ours") and error > ERROR_LIMIT:
            raise MptError(f"{name} is wrong: error {error:.2f} > {ERROR_LIMIT}: {row}")
        runners[name] = runner

    for what, factor in (("forward", 1.0), ("both", 3.5)):
        seconds = _interleave(runners, what, flags.rounds, flags.sample_seconds)
        for name, samples in seconds.items():
            median = statistics.median(samples)
            tflops = factor * problem.forward_flops / median / 1e12
            rows[name][f"{what}_ms"] = median * 1e3
            rows[name][f"{what}_spread"] = (max(samples) - min(samples)) / median
            rows[name][f"{what}_tflops"] = tflops
    return list(rows.values())


def _interleave(
    runners: dict[str, Runner], what: str, rounds: int, sample_seconds: float
) -> dict[str, list[float]]:
    """Seconds a call of each, from samples of back-to-back calls, round about."""

    def sample(runner: Runner, calls: int) -> float:
        run = runner.forward if what == "forward" else runner.backward
        begin = time.perf_counter()
        for _ in range(calls):
            arrays = run()
        runner.wait(arrays)
        return (time.perf_counter() - begin) / calls

    calls = {}
    for name, runner in runners.items():
        sample(runner, 1)  # warm: compilers, caches, clocks
        calls[name] = max(1, int(sample_seconds / sample(runner, 1)))
    seconds: dict[str, list[float]] = {name: [] for name in runners}
    for _ in range(rounds):
        for name, runner in runners.items():
            seconds[name].append(sample(runner, calls[name]))
    return seconds


def oracle(problem: Problem, *, rounded: bool = False) -> list[np.ndarray]:
    """(out, dq) of the last rows and (dk, dv) of the last keys, first and last head.

    In float64 from the inputs as contenders see them; rounded: softmax and its gradient
    rounded to bfloat16 between float32 sums, results too: naive bfloat16.
    """
    import jax.numpy as jnp

    wide = np.float32 if rounded else np.float64

    def to_input(a: np.ndarray) -> np.ndarray:
        return a.astype(jnp.bfloat16) if problem.dtype == "bfloat16" else a

    def narrow(a: np.ndarray) -> np.ndarray:
        return a.astype(jnp.bfloat16).astype(wide) if rounded else a

    n = min(CHECKED, problem.length)
    found: list[list[np.ndarray]] = []
    for head in sorted({0, problem.heads - 1}):
        q, k, v, dout = (to_input(a[0, :, head]).astype(wide) for a in problem.tensors)
        i = np.arange(problem.length - n, problem.length)[:, None]
        away = i - np.arange(problem.length)[None]
        logits = problem.scale * (q[-n:] @ k.T) - wide(problem.slopes[head]) * away
        logits = np.where(away >= 0, logits, -np.inf)
        weights = np.exp(logits - logits.max(1, keepdims=True))
        p = weights / weights.sum(1, keepdims=True)
        out, dp = narrow(p) @ v, dout[-n:] @ v.T
        ds = p * (dp - (p * dp).sum(1, keepdims=True)) * problem.scale
        dk, dv = narrow(ds)[:, -n:].T @ q[-n:], narrow(p)[:, -n:].T @ dout[-n:]
        found.append([narrow(a) for a in (out, narrow(ds) @ k, dk, dv)])
    return [np.stack(arrays) for arrays in zip(*found, strict=True)]


def _error(
    problem: Problem,
    runner: Runner,
    wanted: list[np.ndarray],
    naive: list[np.ndarray] | None,
) -> float:
    """Worst of out, dq, dk, dv, in units of what naive bfloat16 or float32 may err."""
    arrays = runner.backward()
    runner.wait(arrays)
    heads, n = sorted({0, problem.heads - 1}), min(CHECKED, problem.length)
    errors = []
    for index, (array, want) in enumerate(zip(arrays, wanted, strict=True)):
        rows = [array[0, -n:, head] for head in heads]
        got = np.stack([_to_numpy(row) for row in rows])
        allowed = FLOAT32_RTOL if naive is None else _distance(naive[index], want)
        errors.append(_distance(got, want) / allowed)
    return float(np.max(errors))  # NaN stays NaN, and fails


def _distance(got: np.ndarray, want: np.ndarray) -> float:
    return float(np.linalg.norm(got - want) / np.linalg.norm(want))


def _to_numpy(array: Any) -> np.ndarray:
    if hasattr(array, "detach"):  # torch
        return array.detach().float().cpu().numpy().astype(np.float64)
    return np.asarray(array).astype(np.float64)


def _matmul_tflops(platform: str) -> float:
    """What the device reaches on one large matmul, in the dtype of the bench."""
    import jax
    import jax.numpy as jnp

    n, dtype = (8192, jnp.bfloat16) if platform == "gpu" else (1024, jnp.float32)
    a = jnp.ones((n, n), dtype)
    multiply = jax.jit(lambda a, b: a @ b)
    runner = Runner(
        lambda: (multiply(a, a),),
        lambda: (multiply(a, a),),
        jax.block_until_ready,
        lambda: (None, None),
    )
    samples = _interleave({"matmul": runner}, "forward", 5, 0.1)["matmul"]
    return 2 * n**3 / statistics.median(samples) / 1e12


def _memory_gib(platform: str) -> float:
    import jax

    if platform == "gpu":
        return (jax.devices()[0].memory_stats() or {}).get("bytes_limit", 0) / GIB
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES") / GIB


def _cell(value: Any) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def plot(result: dict[str, Any], path: str) -> None:
    """Effective TFLOP/s over length: a column per slopes and std, two rows of work."""
    import matplotlib

    matplotlib.use("agg")
    import matplotlib.pyplot as plt

    groups = list(dict.fromkeys((r["slopes"], r["std"]) for r in result["rows"]))
    names = list(dict.fromkeys(r["contender"] for r in result["rows"]))
    figure, axes = plt.subplots(
        2, len(groups), squeeze=False, figsize=(5 * len(groups), 8), sharex=True
    )
    for column, group in enumerate(groups):
        for axis, what in zip(axes[:, column], ("forward", "both"), strict=True):
            for name in names:
                points = [
                    (r["length"], r[f"{what}_tflops"])
                    for r in result["rows"]
                    if (r["slopes"], r["std"]) == group
                    and r["contender"] == name
                    and f"{what}_tflops" in r
                ]
                if points:
                    axis.plot(*zip(*points, strict=True), marker="o", label=name)
            axis.axhline(result["matmul_tflops"], color="gray", linestyle=":")
            axis.set_xscale("log", base=2)
            title = {"forward": "forward", "both": "forward and backward"}[what]
            axis.set_title(f"{title}, {group[0]} slopes, logit std {group[1]:g}")
            axis.set_ylabel("causal-effective TFLOP/s")
    axes[-1, 0].set_xlabel("sequence length")
    axes[0, 0].legend(fontsize="small")
    figure.suptitle(f"{result['device']}; dotted: one large matmul")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
