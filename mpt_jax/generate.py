"""Continues a text: ``python -m mpt_jax.generate --checkpoint DIR --prompt TEXT``.

    python -m mpt_jax.generate --checkpoint ~/mpt-7b --prompt "Here is a recipe"
    python -m mpt_jax.generate --checkpoint runs/tiny --file story.txt --temperature 0
    echo "What is ALiBi?" | python -m mpt_jax.generate --checkpoint ~/mpt-7b-instruct \\
        --template instruct --json

DIR is a run or a checkpoint of ours, or anything that convert reads: a folder of
MosaicML or Hugging Face, a Composer checkpoint or a .gguf. The new text goes to stdout
as it comes, speeds to stderr. JAX_COMPILATION_CACHE_DIR=DIR spares the next start most
of its compiling.
"""

from __future__ import annotations

import argparse
import json
import pathlib
import sys
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mpt_jax import verbs
from mpt_jax.errors import EXIT_OK, CheckpointError, UserError, run_verb

if TYPE_CHECKING:
    from mpt_jax.generation.sampling import Sampling
    from mpt_jax.generation.text import Delta
    from mpt_jax.loading import Loaded

N_SLOTS = 8  # of --n answers, so many at a time


def main(argv: Sequence[str]) -> int:
    def run() -> int:
        flags = _parser().parse_args(argv)
        if flags.logprobs is not None and not flags.json:
            raise UserError("--logprobs: needs --json, which has room for them")
        sampling, prompt = _sampling(flags), _prompt(flags)
        with verbs.reader_may_leave():
            _run(flags, sampling, prompt)
        return EXIT_OK

    return run_verb(run, show_traceback="--traceback" in argv)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mpt_jax.generate", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    verbs.add_checkpoint_flags(parser)
    add = parser.add_argument
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--prompt", metavar="TEXT")
    source.add_argument("--file", metavar="FILE", help="the prompt's; default stdin; "
                        "one newline at its end is left out")  # fmt: skip
    add("--template", metavar="NAME", help="ask as a user does: instruct, chatml ...")

    add = parser.add_argument_group("what comes").add_argument
    add("--max-tokens", type=int, default=256, metavar="N", help="at most (256)")
    add("--temperature", type=float, default=0.8, metavar="T", help="0 is greedy (0.8)")
    add("--top-k", type=int, default=0, metavar="K", help="0 is off (0)")
    add("--top-p", type=float, default=1.0, metavar="P", help="1 is off (1)")
    add("--min-p", type=float, default=0.0, metavar="P", help="0 is off (0)")
    add("--repetition-penalty", type=float, default=1.0, metavar="R", help="1 is off")
    add("--stop", action="append", default=[], metavar="TEXT", help="end before this; "
        "may be repeated")  # fmt: skip
    add("--ignore-eos", action="store_true", help="go on after an end of text")
    add("--seed", type=int, default=0, metavar="N", help="same seed, same text (0)")
    add("--n", type=int, default=1, metavar="N", help="so many answers, with seeds "
        "from --seed on")  # fmt: skip

    add = parser.add_argument_group("how").add_argument
    add("--json", action="store_true", help="one object per answer: text, ids, "
        "finish_reason, logprobs")  # fmt: skip
    add("--logprobs", type=int, metavar="N", help="with --json: log-probability of "
        "each token and the N likeliest")  # fmt: skip
    add("--quiet", action="store_true", help="no speeds")
    return parser


def _sampling(flags: argparse.Namespace) -> Sampling:
    """Before anything is loaded: it finds mistakes."""
    from mpt_jax.generation.sampling import Sampling

    if flags.n < 1:
        raise UserError(f"--n: got {flags.n}, expected at least 1")
    return Sampling(
        max_tokens=flags.max_tokens,
        temperature=flags.temperature,
        top_k=flags.top_k,
        top_p=flags.top_p,
        min_p=flags.min_p,
        repetition_penalty=flags.repetition_penalty,
        seed=flags.seed,
        stop=tuple(flags.stop),
        ignore_eos=flags.ignore_eos,
        logprobs=flags.logprobs,
    )


def _prompt(flags: argparse.Namespace) -> str:
    if flags.prompt is not None:
        return flags.prompt
    where = flags.file or "stdin"
    if not flags.file and sys.stdin.isatty():
        print("prompt, then Ctrl-D:", file=sys.stderr)
    try:
        raw = pathlib.Path(flags.file).read_bytes() if flags.file else (
            sys.stdin.buffer.read())  # fmt: skip
        return raw.decode().removesuffix("\n")
    except OSError as error:
        raise UserError(f"cannot be read: {error.strerror}", location=where) from None
    except UnicodeDecodeError as error:
        message = f"not UTF-8 at byte {error.start}"
        raise UserError(message, location=where) from None


def _run(flags: argparse.Namespace, sampling: Sampling, prompt: str) -> None:
    import dataclasses

    from mpt_jax import loading
    from mpt_jax.generation import text
    from mpt_jax.generation.engine import Request

    loaded = loading.load(**verbs.checkpoint_arguments(flags))
    tokenizer = loaded.need_tokenizer()
    ids, stop_ids = _ids(loaded, prompt, flags.template)
    sampling = dataclasses.replace(sampling, stop_ids=stop_ids)
    engine = loaded.engine(
        n_slots=min(flags.n, N_SLOTS), capacity=len(ids) + sampling.max_tokens
    )
    requests = [
        Request(str(i), ids, dataclasses.replace(sampling, seed=flags.seed + i))
        for i in range(flags.n)
    ]
    clock = _Clock(len(ids))
    deltas = clock.timed(text.run(engine, tokenizer, requests))
    _show(deltas, flags, sampling)
    if not flags.quiet:
        print(clock.report(), file=sys.stderr)


def _ids(
    loaded: Loaded, prompt: str, template: str | None
) -> tuple[list[int], tuple[int, ...]]:
    """The prompt's ids, and those that end the answer beside EOS."""
    from mpt_jax import loading
    from mpt_jax.generation import templates

    if template is None:
        return loading.encode(loaded, prompt), ()
    tokenizer = loaded.need_tokenizer()
    chosen = templates.choose(template, name=loaded.name, tokenizer=tokenizer)
    messages = [{"role": "user", "content": prompt}]
    return (
        templates.render(messages, chosen, tokenizer),
        templates.stop_ids(chosen, tokenizer),
    )


def _show(
    deltas: Iterator[Delta], flags: argparse.Namespace, sampling: Sampling
) -> None:
    """One answer as it comes; several, or JSON, each when it has ended, in order."""
    live = flags.n == 1 and not flags.json
    parts: dict[str, list[Delta]] = {str(i): [] for i in range(flags.n)}
    shown = 0
    for delta in deltas:
        if delta.finish_reason == "error":
            raise CheckpointError(delta.error, location=flags.checkpoint)
        parts[delta.id].append(delta)
        if live:
            print(delta.text, end="", flush=True)
        while not live and shown < flags.n:
            answer = parts[str(shown)]
            if not answer or answer[-1].finish_reason is None:
                break
            _show_whole(answer, flags, seed=sampling.seed + shown)
            shown += 1
    if live:
        print(flush=True)


def _show_whole(deltas: list[Delta], flags: argparse.Namespace, *, seed: int) -> None:
    text = "".join(delta.text for delta in deltas)
    if not flags.json:
        print(f"--- seed {seed}\n{text}", flush=True)
        return
    answer = {
        "text": text,
        "ids": [i for delta in deltas for i in delta.ids],
        "finish_reason": deltas[-1].finish_reason,
        "seed": seed,
    }
    if flags.logprobs is not None:
        answer["logprobs"] = [
            {"id": p.id, "logprob": p.logprob, "top": dict(p.top)}
            for delta in deltas
            for p in delta.logprobs
        ]
    print(json.dumps(answer), flush=True)


class _Clock:
    """How fast it goes: until the first token, and from there on."""

    def __init__(self, prompt_tokens: int):
        self.prompt_tokens, self.n, self.start = prompt_tokens, 0, time.perf_counter()
        self.first = self.last = self.start
        self.n_first = 0

    def timed(self, deltas: Iterator[Delta]) -> Iterator[Delta]:
        for delta in deltas:
            self.last = time.perf_counter()
            if not self.n and delta.ids:
                self.first, self.n_first = self.last, len(delta.ids)
            self.n += len(delta.ids)
            yield delta

    def report(self) -> str:
        """The first token waits for the compiler, too; the others do not."""
        wait, rest = self.first - self.start, self.n - self.n_first
        said = (
            f"prompt: {self.prompt_tokens} tokens, {self.prompt_tokens / wait:.1f} "
            f"tokens/s with compiling" if self.n else "no tokens"
        )  # fmt: skip
        if rest and self.last > self.first:
            speed = rest / (self.last - self.first)
            said += f"; output: {self.n} tokens, {speed:.1f} tokens/s"
        return said


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
