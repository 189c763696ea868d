"""The error hierarchy and the exit code of every verb.

Exit codes (documented in README): 0 done, or preempted and saved; 1 internal;
2 user or configuration; 3 data; 4 checkpoint; 75 no step for watchdog_seconds;
76 another process of the job is lost; 77 training diverged. A verb prints one line for
an MptError and keeps the traceback for ``--traceback``.
"""

from __future__ import annotations

import contextlib
import logging
import sys
import traceback
from collections.abc import Callable, Sequence

EXIT_OK = 0
EXIT_INTERNAL = 1
EXIT_USER = 2
EXIT_DATA = 3
EXIT_CHECKPOINT = 4
EXIT_STUCK = 75
EXIT_PEER_LOST = 76
EXIT_DIVERGED = 77


class MptError(Exception):
    """Base of every error a user may meet; ``location``: a path, or file:line."""

    exit_code = EXIT_INTERNAL
    kind = "internal error"

    def __init__(self, message: str, *, location: str = ""):
        super().__init__(message)
        self.message = message
        self.location = location

    def __str__(self) -> str:
        return f"{self.location}: {self.message}" if self.location else self.message


class InternalError(MptError):
    """A bug in mpt_jax: please report it with the traceback."""


class UserError(MptError):
    """The caller asked for something impossible."""

    exit_code = EXIT_USER
    kind = "error"


class ConfigError(UserError):
    """One or more problems in a configuration, all listed at once."""

    kind = "config error"

    def __init__(self, problems: Sequence[str], *, location: str = ""):
        self.problems = tuple(problems)
        message = (
            self.problems[0]
            if len(self.problems) == 1
            else f"{len(self.problems)} problems:\n  " + "\n  ".join(self.problems)
        )
        super().__init__(message, location=location)


class DataError(MptError):
    """A data set, tokenizer or batch is missing, malformed or out of range."""

    exit_code = EXIT_DATA
    kind = "data error"


class CheckpointError(MptError):
    """A checkpoint cannot be written, found, verified or restored."""

    exit_code = EXIT_CHECKPOINT
    kind = "checkpoint error"


class PeerError(MptError):
    """Another process of the job did not come, or is gone."""

    exit_code = EXIT_PEER_LOST
    kind = "process lost"


class DivergedError(MptError):
    """The loss is not finite or has spiked past what the stability policy allows."""

    exit_code = EXIT_DIVERGED
    kind = "diverged"


def run_verb(main: Callable[[], int | None], *, show_traceback: bool) -> int:
    """Runs a verb; turns an exception into one readable message and an exit code."""
    # Before absl, which would show the names of loggers.
    logging.basicConfig(format="%(levelname)s: %(message)s")
    try:
        return main() or EXIT_OK
    except MptError as error:
        _report(f"{error.kind}: {error}", stack=show_traceback)
        return error.exit_code
    except SystemExit as stop:  # argparse: --help, or a mistake that it has printed
        return stop.code if isinstance(stop.code, int) else EXIT_USER
    except KeyboardInterrupt:
        _report("interrupted", stack=False)
        return 130
    except Exception as error:
        hint = "" if show_traceback else " (run again with --traceback for the stack)"
        text = f"internal error: {type(error).__name__}: {error}{hint}"
        _report(text, stack=show_traceback)
        return EXIT_INTERNAL


def _report(text: str, *, stack: bool) -> None:
    """To stderr; a closed one must not change the exit code."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        if stack:
            traceback.print_exc()
        print(text, file=sys.stderr, flush=True)
