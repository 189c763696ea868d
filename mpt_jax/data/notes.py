"""What the data has to say on the side."""

from __future__ import annotations

import contextlib
import sys


def note(text: str) -> None:
    """A line on stderr; a closed pipe there costs the line, never the run."""
    with contextlib.suppress(OSError, ValueError):  # ValueError: the stream is closed
        print(text, file=sys.stderr, flush=True)
