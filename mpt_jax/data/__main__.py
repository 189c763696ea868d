"""What a batch really looks like: ``python -m mpt_jax.data --config configs/tiny.py``.

Prints rows of the first batches of a config, segment by segment: which source, how many
tokens, how many of them are learned, the text. Then what share of the tokens each
source has, how full the rows are, and how fast the pipeline is on its own.
"""

from __future__ import annotations

import argparse
import contextlib
import sys
import time
from collections.abc import Iterator, Sequence

import numpy as np

from mpt_jax import cli
from mpt_jax.data import feed
from mpt_jax.data.packing import Batch
from mpt_jax.errors import EXIT_OK, run_verb
from mpt_jax.tokenizer import Tokenizer


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(prog="python -m mpt_jax.data", description=__doc__)
    add = parser.add_argument
    add("--config", required=True, metavar="FILE.py", help="a file with get_config()")
    add("--split", choices=("train", "validation"), default="train", help="which text")
    add("--batch", type=int, default=0, metavar="N", help="show the Nth batch, from 0")
    add("--rows", type=int, default=4, metavar="N", help="show at most N of its rows")
    add("--width", type=int, default=100, help="characters shown of a segment")
    add("--seconds", type=float, default=5.0, help="measure so long; 0 does not")
    add("--traceback", action="store_true", help="show the stack of an error")

    def run() -> int:
        flags, overrides = cli.parse_args(parser, argv)
        config = cli.load_config(flags.config, overrides)
        tokenizer = feed.tokenizer(config)
        source = feed.open_source(
            config,
            split=flags.split,
            tokenizer=tokenizer,
            process_index=0,
            process_count=1,
        )
        with contextlib.closing(source):
            print(source.describe())
            _show(source, tokenizer, flags)
            if flags.seconds:
                print(_speed(source, flags.seconds))
        return EXIT_OK

    return run_verb(run, show_traceback="--traceback" in argv)


def _show(
    source: feed.Source, tokenizer: Tokenizer | None, flags: argparse.Namespace
) -> None:
    for _ in range(flags.batch + 1):
        batch = next(source)
    print(f"batch {flags.batch}: {shape(batch)}")
    names = source.rows_of()
    for row in range(min(flags.rows, len(batch["tokens"]))):
        print(f"row {row}{f' of {names[row]}' if names else ''}")
        print("\n".join(show_row(batch, row, tokenizer, width=flags.width)))
    for name, value in source.metrics().items():
        print(f"{name} {value:.4f}")


def shape(batch: Batch) -> str:
    rows, length = batch["tokens"].shape
    learned, padding = batch["loss_mask"].sum(), (batch["segment_ids"] == 0).sum()
    return (
        f"{rows} rows of {length} tokens, {learned:,} of them targets, "
        f"{padding:,} padding"
    )


def show_row(
    batch: Batch, row: int, tokenizer: Tokenizer | None, *, width: int
) -> Iterator[str]:
    """A line for each segment of a row: its range, targets and text.

    The text is quoted, and shortened in the middle; ``|`` stands for EOS. Without a
    tokenizer it is the ids.
    """
    tokens_L, segments_L = batch["tokens"][row], batch["segment_ids"][row]
    for segment in np.unique(segments_L):
        here = np.flatnonzero(segments_L == segment)
        first, end = int(here[0]), int(here[-1]) + 1
        label = f"segment {segment}" if segment else "padding"
        line = f"  {label:<11} [{first:>5}, {end:>5})"
        if segment:
            ids = tokens_L[first:end].tolist()
            learned = int(batch["loss_mask"][row, first:end].sum())
            text = str(ids) if tokenizer is None else repr(_text(ids, tokenizer))
            line += f"  {learned:>5} targets  {_shorten(text, width)}"
        yield line


def _text(ids: list[int], tokenizer: Tokenizer) -> str:
    end = "|" if ids[-1] == tokenizer.eos_id else ""
    return tokenizer.decode(ids) + end


def _shorten(text: str, width: int) -> str:
    """The beginning and the end of ``text``, ``width`` characters in all."""
    if len(text) <= width:
        return text
    half = max((width - 5) // 2, 1)
    return f"{text[:half]} ... {text[-half:]}"


def _speed(source: feed.Source, seconds: float) -> str:
    begin, tokens, cpu = time.perf_counter(), 0, time.process_time()
    while (elapsed := time.perf_counter() - begin) < seconds:
        try:
            tokens += next(source)["tokens"].size
        except StopIteration:
            break
    rate, busy = tokens / elapsed, (time.process_time() - cpu) / elapsed
    return f"{rate:,.0f} tokens/s, on {busy:.1f} cores"


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
