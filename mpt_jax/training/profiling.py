"""``--profile FIRST:LAST``: a trace of some steps, for XProf."""

from __future__ import annotations

import os


class Profile:
    """Traces from before step ``first`` until step ``last`` is done.

    A run that resumes between them traces the rest. Each process writes its own file.
    """

    def __init__(
        self, steps: tuple[int, int] | None, directory: str | os.PathLike[str]
    ):
        self._steps, self._directory = steps, os.fspath(directory)
        self._on = False

    def begin(self, step: int) -> None:
        """``step`` is about to be dispatched."""
        import jax

        first, last = self._steps or (0, 0)
        if not self._on and first <= step <= last:
            jax.profiler.start_trace(self._directory)
            self._on = True

    def end(self, step: int) -> None:
        """``step`` is done, its results on the host."""
        if self._on and step >= self._steps[1]:
            self.close()

    def close(self) -> None:
        import jax

        if self._on:
            self._on = False
            jax.profiler.stop_trace()
