"""A prepared folder from beginning to end: request, shards, report, manifest.

While it is made, DIR also holds ``request.json`` (what was asked for: a folder goes on
only with the same), a ``.json`` for each finished shard, and ``.lock``. All of them are
gone when ``manifest.json`` is there. Nothing in a finished folder says when, where or
by how many workers it was made: the same request gives the same bytes.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from mpt_jax import durable
from mpt_jax.config import DataConfig
from mpt_jax.data import position, prepared, tasks, vocab
from mpt_jax.data.prepared import Manifest
from mpt_jax.errors import DataError, UserError
from mpt_jax.tokenizer import Tokenizer

REQUEST = "request.json"
LOCK = ".lock"
MODEL = "tokenizer.model"  # of --train-tokenizer
REPORT = "report.md"
PLOT = "lengths.png"
SAMPLED_FILES = 32  # of a source, to train a tokenizer


def request(data: DataConfig, tokenizer: Tokenizer) -> dict[str, Any]:
    """What determines every byte of a folder, as JSON."""
    sources = {
        name: {"text": corpus.fingerprint(), "splits": list(corpus.splits)}
        for name, corpus in tasks.corpora(data).items()
    }
    return {
        "format": prepared.FORMAT,
        "tokenizer": tokenizer.fingerprint,
        "sources": sources,
    }


def token_bytes(tokenizer: Tokenizer) -> int:
    return 2 if prepared.token_dtype(tokenizer.vocab_size) == "<u2" else 4


@contextlib.contextmanager
def locked(root: Path) -> Iterator[None]:
    """Raises: UserError: another process is at it, or nothing can be written here."""
    try:
        root.mkdir(parents=True, exist_ok=True)
        file = open(root / LOCK, "w")
    except OSError as error:
        message = f"cannot write here: {error.strerror}"
        raise UserError(message, location=str(root)) from None
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            message = "another python -m mpt_jax.prepare is at this folder"
            raise UserError(message, location=str(root)) from None
        try:
            yield
        finally:
            (root / LOCK).unlink()


def begin(root: Path, wanted: Mapping[str, Any]) -> Manifest | None:
    """Claims ``root`` for ``wanted``; the manifest, if all is there already.

    Raises: UserError: it holds other data, or something else.
    """
    if (root / prepared.MANIFEST).exists():
        manifest = prepared.read_manifest(root)
        _same(manifest.request, wanted, root)
        return manifest
    path = root / REQUEST
    if path.exists():
        _same(json.loads(path.read_bytes()), wanted, root)
    else:
        _check_empty(root)
        prepared.replace(path, json.dumps(wanted, sort_keys=True).encode())
    return None


def _check_empty(root: Path) -> None:
    if others := sorted({p.name for p in root.iterdir()} - {LOCK, MODEL}):
        message = f"not empty, it has {others[0]!r}: name another --out"
        raise UserError(message, location=str(root))


def _same(saved: Mapping[str, Any], wanted: Mapping[str, Any], root: Path) -> None:
    if differences := position.differences(saved, wanted):
        raise UserError(
            "this folder is of another preparation, name another --out:\n  "
            + "\n  ".join(differences),
            location=str(root),
        )


def finish(
    root: Path,
    wanted: Mapping[str, Any],
    shards: Mapping[str, Mapping[str, Sequence[Mapping[str, Any]]]],
    *,
    name: str,
    tokenizer: Tokenizer,
    max_bad_fraction: float,
) -> Manifest:
    """Writes report and manifest, and deletes all that is not of the finished folder.

    Args:
      shards: what caching.result() says of each, by source and split, in order.
      name: of the tokenizer, as the configuration has it.
    Raises: DataError: a source of bad rows, or without one document.
    """
    manifest = Manifest(
        dtype=prepared.token_dtype(tokenizer.vocab_size),
        tokenizer={
            "name": name,
            "fingerprint": tokenizer.fingerprint,
            "vocab_size": tokenizer.vocab_size,
            "eos_id": tokenizer.eos_id,
        },
        request=wanted,
        shards={
            source: {
                split: tuple(made["shard"] for made in results)
                for split, results in splits.items()
            }
            for source, splits in shards.items()
        },
        report={
            source: {split: _summary(results) for split, results in splits.items()}
            for source, splits in shards.items()
        },
    )
    _check_report(manifest, max_bad_fraction=max_bad_fraction)
    prepared.check_files(root, manifest, kinds=())
    prepared.replace(root / REPORT, report(manifest).encode())
    plot_lengths(manifest, root / PLOT)
    keep = {
        root / f"{shard.path}.{kind}"
        for splits in manifest.shards.values()
        for group in splits.values()
        for shard in group
        for kind in prepared.KINDS
    }
    keep |= {root / LOCK, root / REPORT, root / PLOT, root / MODEL}
    prepared.write_manifest(root, manifest)
    for path in root.rglob("*"):
        if path.is_file() and path not in keep and path.name != prepared.MANIFEST:
            path.unlink()
    return manifest


def train_tokenizer(root: Path, data: DataConfig, vocab_size: int) -> Path:
    """Trains a SentencePiece model on the beginnings of the tasks' files, once.

    Every source gives the same number of characters, and every file of it.
    """
    path = root / MODEL
    if not path.exists():
        _check_empty(root)
        model = vocab.train(_sample(data), vocab_size=vocab_size)
        prepared.replace(path, model)
    return path


def _sample(data: DataConfig) -> Iterator[str]:
    from mpt_jax.data.sources import Document, documents

    corpora = tasks.corpora(data).values()
    for corpus in corpora:
        files = corpus.files("train")
        files = files[:: math.ceil(len(files) / SAMPLED_FILES)]
        budget = vocab.TRAINING_CHARACTERS // len(corpora) // len(files)
        for file in files:
            seen = 0
            for row in documents(corpus, file, "train"):
                if isinstance(row, Document):
                    yield row.text[: budget - seen]
                    seen += len(row.text)
                if seen >= budget:
                    break


# --------------------------------------------------------------------------- report


def _summary(results: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Documents, tokens, what was left out and why, and lengths, over all shards."""
    left_out: dict[str, Counter[str]] = {"bad": Counter(), "filtered": Counter()}
    lengths: Counter[int] = Counter()
    for made in results:
        for kind, counter in left_out.items():
            counter.update(made["rows"].get(kind, {}))
        lengths.update(dict(enumerate(made["lengths"])))
    return {
        "documents": sum(made["shard"].documents for made in results),
        "tokens": sum(made["shard"].tokens for made in results),
        **{kind: dict(sorted(counter.items())) for kind, counter in left_out.items()},
        # lengths[n]: documents of 2^(n-1) to 2^n - 1 tokens, EOS included.
        "lengths": [lengths[n] for n in range(max(lengths, default=-1) + 1)],
    }


def _check_report(manifest: Manifest, *, max_bad_fraction: float) -> None:
    """Raises: DataError: too many bad rows in a source, or no document."""
    for source, splits in manifest.report.items():
        for split, found in splits.items():
            bad = sum(found["bad"].values())
            rows = found["documents"] + bad + sum(found["filtered"].values())
            where = f"{split} split of {source}"
            if bad > max_bad_fraction * rows:
                raise DataError(
                    f"{bad} of {rows} rows are bad, over data.max_bad_fraction="
                    f"{max_bad_fraction:g}: {found['bad']}",
                    location=where,
                )
            if not found["documents"]:
                raise DataError(f"none of its {rows} rows is kept", location=where)


def report(manifest: Manifest) -> str:
    """The folder in Markdown."""
    t = manifest.tokenizer
    lines = [
        "# Prepared data",
        "",
        f"Tokenizer {t['name']}: {t['vocab_size']:,} ids, EOS {t['eos_id']}, "
        f"{t['fingerprint'][:16]}. Tokens are {manifest.dtype}.",
        "",
        "| source | split | documents | tokens | mean tokens | left out |",
        "|---|---|---:|---:|---:|---|",
    ]
    for source, splits in manifest.report.items():
        for split, found in splits.items():
            mean = found["tokens"] / max(found["documents"], 1)
            reasons = {**found["bad"], **found["filtered"]}
            why = ", ".join(f"{n:,} {reason}" for reason, n in reasons.items())
            lines.append(
                f"| {source} | {split} | {found['documents']:,} | {found['tokens']:,} "
                f"| {mean:,.0f} | {why or 'none'} |"
            )
    return "\n".join([*lines, "", f"![lengths]({PLOT})", ""])


def plot_lengths(manifest: Manifest, path: Path) -> None:
    """Draws how many tokens are in documents of which length, source by source."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), dpi=120, layout="constrained")
    axes = figure.subplots()
    for source, splits in manifest.report.items():
        counted = [found["lengths"] for found in splits.values()]
        total = [
            sum(c[n] for c in counted if n < len(c))
            for n in range(max(map(len, counted), default=0))
        ]
        if any(total):
            axes.stairs(total[1:], range(len(total)), label=source, linewidth=1.5)
    axes.xaxis.set_major_formatter(lambda n, _: f"{2 ** int(n):,}")
    axes.set(xlabel="tokens of a document", ylabel="documents", yscale="symlog")
    axes.grid(alpha=0.2)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    durable.replace(
        path,
        lambda to: figure.savefig(to, format="png", metadata={"Software": None}),
    )
