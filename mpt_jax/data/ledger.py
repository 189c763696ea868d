"""The count of what was read, rejected and why; it stops a run that loses too much."""

from __future__ import annotations

import collections
import dataclasses
import threading
from typing import TypedDict

from mpt_jax.data.notes import note
from mpt_jax.data.sources import Document, Row
from mpt_jax.errors import DataError

# A share is judged over at least so many rows: one bad row among the first ten is not
# ten percent of the data.
ENOUGH_ROWS = 1000
SHOWN = 3


class Summary(TypedDict):
    """Of one source: documents given; rows rejected, by reason."""

    documents: int
    bad: dict[str, int]
    filtered: dict[str, int]


@dataclasses.dataclass
class _Counts:
    documents: int = 0
    bad: collections.Counter = dataclasses.field(default_factory=collections.Counter)
    filtered: collections.Counter = dataclasses.field(
        default_factory=collections.Counter
    )

    @property
    def rows(self) -> int:
        return self.documents + self.bad.total() + self.filtered.total()


class Ledger:
    """Counts rows per source, from any thread.

    ``error`` is what stopped a pipeline: tf.data tells its own story of it.
    """

    def __init__(self, max_bad_fraction: float = 0.0):
        self._allowed = max_bad_fraction
        self._counts: dict[str, _Counts] = collections.defaultdict(_Counts)
        self._lock = threading.Lock()
        self.error: DataError | None = None

    def admit(self, source: str, row: Row) -> str | None:
        """The text of a document, None for a rejected row.

        Raises: DataError: the bad rows of ``source`` are more than its share.
        """
        with self._lock:
            counts = self._counts[source]
            if isinstance(row, Document):
                counts.documents += 1
                return row.text
            getattr(counts, row.kind)[row.reason] += 1
            if row.kind == "filtered":
                return None
            bad, rows = counts.bad.total(), counts.rows
        where = f"{row.file}:{row.line}"
        what = f"{row.reason}: {row.detail}"
        if bad > self._allowed * max(rows, ENOUGH_ROWS):
            self.error = DataError(self._refusal(source, what), location=where)
            raise self.error
        # The first few, then ever more rarely.
        if bad <= SHOWN or str(bad).strip("0") == "1":
            note(f"{source}: bad row {bad} of {rows}: {where}: {what}")
        return None

    def finish(self) -> None:
        """Judges the shares at the end of a finite pass.

        Raises: DataError: too many bad rows, or a source without one document.
        """
        for source, counts in self._counts.items():
            bad, rows = counts.bad.total(), counts.rows
            if bad > self._allowed * rows:
                reasons = ", ".join(f"{n} {r}" for r, n in counts.bad.most_common())
                raise DataError(self._refusal(source, reasons), location=source)
            if rows and not counts.documents:
                raise DataError(f"none of its {rows} rows is kept", location=source)

    def summary(self) -> dict[str, Summary]:
        with self._lock:
            return {
                source: {
                    "documents": counts.documents,
                    "bad": dict(counts.bad),
                    "filtered": dict(counts.filtered),
                }
                for source, counts in self._counts.items()
            }

    def _refusal(self, source: str, what: str) -> str:
        if not self._allowed:
            return f"{what}. Mend it, or skip such rows by data.max_bad_fraction > 0"
        counts = self._counts[source]
        return (
            f"{what}. {counts.bad.total()} of {counts.rows} rows of {source} are bad, "
            f"over data.max_bad_fraction={self._allowed:g}"
        )
