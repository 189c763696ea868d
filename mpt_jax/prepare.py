"""Tokenises the data of a config once: ``python -m mpt_jax.prepare``.

    python -m mpt_jax.prepare --config configs/tiny.py --out data/tiny
    python -m mpt_jax.train --config configs/tiny.py \\
        --config.data.source=prepared --config.data.prepared=data/tiny

The same command again goes on where it was stopped; two runs write the same bytes. One
machine does it by default. A Beam cluster does it with --beam and an --out that all of
its workers see:

    --beam "--runner=FlinkRunner --flink_master=HOST:8081"
    --beam "--direct_num_workers=8 --direct_running_mode=multi_processing"

Needs the beam extra: pip install -e .[beam]. Reading what it wrote does not.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pathlib
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mpt_jax import cli
from mpt_jax.config import DataConfig
from mpt_jax.errors import EXIT_OK, UserError, run_verb

if TYPE_CHECKING:
    from mpt_jax.data.prepared import Manifest

POLL_SECONDS = 1.0
LINE_SECONDS = 30.0  # between two lines, where there is no terminal


def main(argv: Sequence[str]) -> int:
    parser = cli.Parser(prog="python -m mpt_jax.prepare", description=__doc__)
    add = parser.add_argument
    add("--config", metavar="FILE.py", help="a file with get_config(); its data.*")
    add("--out", required=True, metavar="DIR", help="the folder to write or to verify")
    add(
        "--train-tokenizer",
        "--train_tokenizer",
        type=int,
        metavar="IDS",
        help="first train a SentencePiece model of so many ids on the text, to "
        "DIR/tokenizer.model, and use it instead of data.tokenizer",
    )
    add("--beam", default="", metavar="FLAGS", help="of Apache Beam, in one argument")
    add("--verify", action="store_true", help="read every byte of DIR, and stop")
    add("--traceback", action="store_true", help="show the stack of an error")

    def run() -> int:
        flags, overrides = cli.parse_args(parser, argv)
        out = pathlib.Path(flags.out).expanduser().absolute()
        if flags.verify:
            from mpt_jax.data import prepared

            _say_sizes(prepared.verify(out), out)
            return EXIT_OK
        if not flags.config:
            raise UserError("expected a file with get_config()", location="--config")
        config = cli.load_config(flags.config, overrides)
        manifest = prepare(
            config.data,
            out,
            train_tokenizer=flags.train_tokenizer,
            beam_flags=shlex.split(flags.beam),
        )
        _say_sizes(manifest, out)
        return EXIT_OK

    return run_verb(run, show_traceback="--traceback" in argv)


def prepare(
    data: DataConfig,
    out: pathlib.Path,
    *,
    train_tokenizer: int | None = None,
    beam_flags: Sequence[str] = (),
) -> Manifest:
    """Writes (the rest of) the prepared folder ``out`` of the tasks of ``data``.

    Raises: ConfigError, UserError: settings; ``out`` is of another preparation.
      DataError: what the text or the tokenizer have wrong.
    """
    if data.source != "seqio":
        message = f"there is no text to prepare in {data.source!r}; set it to 'seqio'"
        raise UserError(message, location="data.source")
    try:
        from mpt_jax.data import caching
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] != "apache_beam":
            raise
        message = "needs Apache Beam: pip install -e '.[beam]'"
        raise UserError(message) from None
    from mpt_jax.data import preparing, tasks, vocab

    with preparing.locked(out):
        if train_tokenizer:
            path = preparing.train_tokenizer(out, data, train_tokenizer)
            data = dataclasses.replace(data, tokenizer=str(path))
        tokenizer = vocab.load_tokenizer(data)
        wanted = preparing.request(data, tokenizer)
        if manifest := preparing.begin(out, wanted):
            return manifest
        jobs = [
            caching.Job(str(out), data, name, split)
            for name, corpus in tasks.corpora(data).items()
            for split in corpus.splits
        ]
        shards = {job: job.shards() for job in jobs}
        paths = [path for paths in shards.values() for path in paths]
        size = preparing.token_bytes(tokenizer)
        with _progress(out, paths, token_bytes=size):
            caching.run(jobs, beam_flags)
        results: dict[str, dict[str, Any]] = {}
        for job, paths in shards.items():
            made = [caching.result(job.root, path) for path in paths]
            results.setdefault(job.source, {})[job.split] = made
        return preparing.finish(
            out,
            wanted,
            results,
            name="tokenizer.model" if train_tokenizer else data.tokenizer,
            tokenizer=tokenizer,
            max_bad_fraction=data.max_bad_fraction,
        )


def _say_sizes(manifest: Manifest, out: pathlib.Path) -> None:
    for source, splits in manifest.report.items():
        for split, found in splits.items():
            left_out = sum((*found["bad"].values(), *found["filtered"].values()))
            print(
                f"{source} {split}: {found['documents']:,} documents, "
                f"{found['tokens']:,} tokens, {left_out:,} rows left out"
            )
    print(f"{out}: complete and as its manifest says", flush=True)


@contextlib.contextmanager
def _progress(
    out: pathlib.Path, paths: Sequence[str], *, token_bytes: int
) -> Iterator[None]:
    """Shows the shards that are done and the tokens written, whoever writes them."""
    from mpt_jax.training.progress import Progress

    stop, began = threading.Event(), time.monotonic()

    def tokens() -> int:
        return sum(_size(p) for p in out.glob("*/*.tokens*")) // token_bytes

    before = tokens()

    def look(progress: Progress) -> None:
        done = sum((out / f"{path}.json").exists() for path in paths)
        rate = (tokens() - before) / max(time.monotonic() - began, 1e-9)
        progress.update(done, {"tokens_per_second": rate})

    def watch(progress: Progress) -> None:
        every = POLL_SECONDS if progress.live else LINE_SECONDS
        while not stop.wait(every):
            look(progress)

    with Progress(len(paths), unit="shard") as progress:
        watcher = threading.Thread(target=watch, args=[progress], daemon=True)
        watcher.start()
        try:
            yield
        finally:
            stop.set()
            watcher.join()
            look(progress)


def _size(path: pathlib.Path) -> int:
    with contextlib.suppress(OSError):  # renamed meanwhile
        return path.stat().st_size
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
