"""The feed of prepared data: every row by its index, the position one integer.

Row g of the run is of the source that order.Mixture says, the n-th of that source; in
the (n // rows)-th epoch of it, and there the (n % rows)-th of a permutation that the
seed and the epoch make. Nothing of this knows a host or a history: host i of k computes
its own part of each global batch, any k gives the same batches, and a run goes on at
any step at once. No TensorFlow.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np

from mpt_jax.config import DataConfig, TrainConfig, suggest
from mpt_jax.data import order, packing, position, prepared, tasks
from mpt_jax.data.packing import Batch, Binned, Chopped
from mpt_jax.errors import ConfigError, DataError
from mpt_jax.tokenizer import Tokenizer


@dataclasses.dataclass(frozen=True)
class _Part:
    """One source of the mixture: its tokens, and the rows that they make."""

    name: str
    tokens: prepared.Tokens
    layout: Chopped | Binned

    @functools.cached_property
    def mean_tokens(self) -> float:
        """Of a row, padding aside."""
        return self.layout.tokens / self.layout.n_rows


class PreparedSource:
    """Batches of a folder that ``python -m mpt_jax.prepare`` wrote; see the module.

    A position holds for the same seed, tokens, tokenizer, mixture, packing and shape,
    and for any number of hosts.
    """

    part = (0, 1)

    def __init__(
        self,
        config: TrainConfig,
        *,
        split: str,
        tokenizer: Tokenizer,
        rows: Sequence[int],
    ):
        """Raises: ConfigError, DataError: no such source or split; another tokenizer;
        a damaged folder."""
        data, root = config.data, Path(config.data.prepared).expanduser()
        manifest = prepared.read_manifest(root)
        names = [name for name, has in splits(data).items() if split in has]
        _check_tokenizer(data, tokenizer, manifest, root=root)
        self._config, self._split, self._rows = config, split, rows
        self.name = f"{split} split of {', '.join(names)} in {root}"
        self._eos_id, self._vocab_size = tokenizer.eos_id, tokenizer.vocab_size
        self._parts = [
            _open(config, manifest, root=root, name=name, split=split) for name in names
        ]
        # Validation is the same for every seed: losses of two runs compare.
        self._key = order.key_of(split, config.seed if split == "train" else 0)
        self._mixture = order.Mixture(self._counts(), key=self._key)
        self._header = position.header(
            config,
            split=split,
            tokenizer=tokenizer.fingerprint,
            tokens={name: manifest.fingerprint(name) for name in names},
            mixture=dict(zip(names, self._mixture.counts, strict=True)),
            packing=data.packing,
            on_long=data.on_long,
        )
        self._batch = 0

    def _counts(self) -> list[int]:
        """Rows of each source in a period of the mixture."""
        data, parts = self._config.data, self._parts
        if data.epochs:
            epochs = dict(zip(data.tasks, data.epochs, strict=True))
            rows = [epochs[part.name] * part.layout.n_rows for part in parts]
            # A small run is one period: exactly the epochs that were asked for.
            return order.counts(rows, min(round(sum(rows)), order.PERIOD))
        rates = tasks.rates(data)
        # Rates are of tokens: a source whose rows are emptier gives more of them.
        shares = [rates[part.name] / part.mean_tokens for part in parts]
        return order.counts(shares, order.PERIOD)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        first = self._batch * self._config.global_batch_size
        if self._split == "validation" and self._ends_before(
            first + self._config.global_batch_size
        ):
            raise StopIteration
        length = self._config.seq_len
        # Padding is EOS, as an id that there is: its segment says that it is padding.
        tokens_BL = np.full((len(self._rows), length), self._eos_id, np.int32)
        segment_ids_BL = np.zeros_like(tokens_BL)
        for b, row in enumerate(self._rows):
            self._fill(first + row, tokens_BL[b], segment_ids_BL[b])
        packing.check_ids(tokens_BL, vocab_size=self._vocab_size, location=self.name)
        self._batch += 1
        if self._config.data.packing == "bins":
            return packing.as_binned_batch(tokens_BL, segment_ids_BL)
        used_B = np.count_nonzero(segment_ids_BL, axis=1)
        return packing.as_batch(tokens_BL, eos_id=self._eos_id, used_B=used_B)

    def _ends_before(self, row: int) -> bool:
        """Whether a source has had its one epoch before the run is at ``row``."""
        seen = self._mixture.seen(row)
        pairs = zip(seen, self._parts, strict=True)
        return any(n > part.layout.n_rows for n, part in pairs)

    def _fill(self, row: int, tokens_L: np.ndarray, segment_ids_L: np.ndarray) -> None:
        part, in_source = self._where(row)
        at = 0
        for segment, span in enumerate(part.layout.spans(in_source), 1):
            begin = at
            for piece in part.tokens.read(span.start, span.size):
                tokens_L[at : at + piece.size] = piece
                at += piece.size
            segment_ids_L[begin:at] = segment
            if span.cut:
                tokens_L[at - 1] = self._eos_id

    def _where(self, row: int) -> tuple[_Part, int]:
        """(source, row of it) of row ``row`` of the run."""
        source, n = self._mixture.place(row)
        part = self._parts[source]
        epoch, at = divmod(n, part.layout.n_rows)
        key = order.key_of(self._key, part.name, epoch)
        return part, order.shuffled(at, part.layout.n_rows, key=key)

    def rows_of(self) -> list[str]:
        if not self._batch:
            return []
        first = (self._batch - 1) * self._config.global_batch_size
        return [self._where(first + row)[0].name for row in self._rows]

    def metrics(self) -> dict[str, float]:
        """What share of the tokens read so far is of which source; how full rows are.

        Of all hosts, computed from the position: rows times the mean tokens of a row.
        """
        seen = self._mixture.seen(self._batch * self._config.global_batch_size)
        pairs = zip(seen, self._parts, strict=True)
        tokens = {part.name: n * part.mean_tokens for n, part in pairs}
        return packing.shares(tokens, capacity=sum(seen) * self._config.seq_len)

    def describe(self) -> str:
        """Sizes, shares and epochs of the sources, and what order the rows have."""
        steps, size = self._config.total_steps, self._config.global_batch_size
        seen = self._mixture.seen(steps * size)
        lines = ["prepared data, in the same order for any number of hosts:"]
        for n, count, part in zip(seen, self._mixture.counts, self._parts, strict=True):
            full = part.mean_tokens / self._config.seq_len
            lines.append(
                f"  {part.name}: {part.tokens.n_documents:,} documents, "
                f"{part.tokens.n_tokens:,} tokens, {part.layout.n_rows:,} rows, "
                f"{full:.2%} full; {count / self._mixture.period:.2%} of the rows, "
                f"{n / part.layout.n_rows:.2f} epochs in {steps:,} steps"
            )
        return "\n".join(lines)

    def state(self) -> bytes:
        return position.pack(self._header, {"batch": str(self._batch).encode()})

    def restore(self, state: bytes) -> None:
        self._batch = int(position.unpack(state, self._header)["batch"])

    def close(self) -> None:
        for part in self._parts:
            part.tokens.close()


def _open(
    config: TrainConfig,
    manifest: prepared.Manifest,
    *,
    root: Path,
    name: str,
    split: str,
) -> _Part:
    data, length = config.data, config.seq_len
    tokens = prepared.Tokens(root, manifest, source=name, split=split)
    layout: Chopped | Binned
    if data.packing == "bins":
        layout = Binned(tokens.ends_N, length, on_long=data.on_long)
    else:
        cut = data.on_long == "truncate"
        ends_N = tokens.ends_N if cut else None
        layout = Chopped(tokens.n_tokens, length, ends_N=ends_N)
    return _Part(name, tokens, layout)


def _check_names(data: DataConfig, manifest: prepared.Manifest, *, root: Path) -> None:
    problems = []
    known = list(manifest.shards)
    for name in data.tasks:
        if name not in known:
            problems.append(
                f"data.tasks: {root} has no source {name!r}, it has "
                f"{', '.join(known)}{suggest(name, known)}"
            )
    if len(set(data.tasks)) < len(data.tasks):
        problems.append(f"data.tasks: a source is named twice in {data.tasks}")
    if problems:
        raise ConfigError(problems)


def splits(data: DataConfig) -> dict[str, Collection[str]]:
    """The splits of each source of ``data`` that hold something."""
    root = Path(data.prepared).expanduser()
    manifest = prepared.read_manifest(root)
    _check_names(data, manifest, root=root)
    return {
        name: [s for s in manifest.shards[name] if manifest.tokens(name, s)]
        for name in data.tasks
    }


def _check_tokenizer(
    data: DataConfig, tokenizer: Tokenizer, manifest: prepared.Manifest, *, root: Path
) -> None:
    saved = manifest.tokenizer
    if saved["fingerprint"] != tokenizer.fingerprint:
        raise DataError(
            f"prepared with tokenizer {saved['name']!r} ({saved['vocab_size']} ids, "
            f"{saved['fingerprint'][:12]}), but data.tokenizer is {data.tokenizer!r} "
            f"({tokenizer.vocab_size} ids, {tokenizer.fingerprint[:12]})",
            location=str(root),
        )
