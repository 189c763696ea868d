"""Restarts a trainer that fails; it resumes from its newest checkpoint by itself.

Runs the trainer as a child process and never touches a device, so that nothing the
trainer does wrong can take this process with it.
"""

from __future__ import annotations

import contextlib
import functools
import os
import pathlib
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from types import FrameType

from mpt_jax import errors
from mpt_jax.config import SuperviseConfig
from mpt_jax.training.progress import say

# Not restarted: done, a mistake that stays one, and a divergence, which a restarted run
# would repeat bit by bit. Data and checkpoint errors are restarted: storage may be away
# for a while, and where it is not, max_failures ends it.
FINAL = (errors.EXIT_OK, errors.EXIT_USER, errors.EXIT_DIVERGED)
MEANING = {
    errors.EXIT_OK: "done, or preempted and saved",
    errors.EXIT_INTERNAL: "internal error",
    errors.EXIT_USER: "user error",
    errors.EXIT_DATA: "data error",
    errors.EXIT_CHECKPOINT: "checkpoint error",
    errors.EXIT_STUCK: "stuck",
    errors.EXIT_PEER_LOST: "another process lost",
    errors.EXIT_DIVERGED: "diverged",
}
MAX_BACKOFF_SECONDS = 300.0
# Becomes the trainer, which then gets SIGTERM when its parent dies, even by SIGKILL; it
# saves and exits. Linux only: elsewhere it lives on. Not a preexec_fn, since that forks
# Python code, which JAX forbids where it is loaded.
DIE_WITH_PARENT = """
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # 1 is PR_SET_PDEATHSIG
if os.getppid() != int(sys.argv[1]):  # it died before that
    sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


def supervise(
    child_argv: Sequence[str],
    *,
    workdir: str | os.PathLike[str],
    config: SuperviseConfig,
    progress: Callable[[], int] | None = None,
    log: Callable[[str], None] = say,
) -> int:
    """Runs ``child_argv`` until it is done, hopeless, or told to stop.

    SIGTERM and SIGINT go on to the child, which has grace_seconds to save and exit, and
    then gets SIGKILL. max_failures failures in a row without a new checkpoint are
    survived, with pauses that double; the next one is the last. Main thread only.

    Args:
      progress: greater after a run than before it if the run achieved something;
        default newest_checkpoint(workdir).
    Returns: the last exit code of the child; 128 + n where signal n ended it.
    """
    progress = progress or functools.partial(newest_checkpoint, workdir)
    failures, backoff = [], config.backoff_seconds
    with _Child(config.grace_seconds) as child:
        while True:
            before, began = progress(), time.monotonic()
            code = child.run(child_argv)
            seconds = time.monotonic() - began
            event = f"supervise: trainer {_describe(code)} after {seconds:.0f} s"
            if child.stop is not None:
                log(f"{event}, stopped by {child.stop.name}")
                break
            if code in FINAL:
                log(event)
                break
            newest = progress()
            if newest > before:
                failures, backoff = [], config.backoff_seconds
            else:
                failures.append(_describe(code))
            event += f", newest checkpoint {newest if newest >= 0 else 'none'}"
            count = f"{len(failures)} failures without a new one"
            if len(failures) > config.max_failures:
                log(f"{event}; giving up after {count}: {', '.join(failures)}")
                break
            log(f"{event}; restart in {backoff:g} s after {count}")
            child.sleep(backoff)
            if child.stop is not None:
                log(f"supervise: stopped by {child.stop.name} before the restart")
                break
            backoff = min(2 * backoff, max(MAX_BACKOFF_SECONDS, config.backoff_seconds))
    return code if code >= 0 else 128 - code


def newest_checkpoint(workdir: str | os.PathLike[str]) -> int:
    """Largest step saved under ``workdir``, -1 without one.

    Unfinished checkpoints do not count: their names are not only digits; nor do files.
    """
    try:
        paths = list((pathlib.Path(workdir) / "checkpoints").iterdir())
    except OSError:
        return -1
    steps = [int(p.name) for p in paths if p.name.isdecimal() and p.is_dir()]
    return max(steps, default=-1)


def _tied(argv: Sequence[str]) -> list[str]:
    if sys.platform != "linux":
        return [*argv]
    return [sys.executable, "-I", "-S", "-c", DIE_WITH_PARENT, str(os.getpid()), *argv]


def _describe(code: int) -> str:
    if code < 0:
        names = {number: number.name for number in signal.Signals}
        return f"killed by {names.get(-code, f'signal {-code}')}"
    return f"exit {code}" + (f" ({MEANING[code]})" if code in MEANING else "")


class _Child:
    """Runs one child at a time; as a context, passes signals on to it.

    The handlers run in the main thread, like all else here: no locks. They do not
    print, since they may interrupt a print.
    """

    def __init__(self, grace_seconds: float):
        self.stop: signal.Signals | None = None  # the first one that arrived
        self._grace_seconds = grace_seconds
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> _Child:
        pass_on, kill = self._pass_on, lambda *_: self._kill()
        handlers = {
            signal.SIGTERM: pass_on,
            signal.SIGINT: pass_on,
            signal.SIGALRM: kill,
        }
        self._previous = {s: signal.signal(s, h) for s, h in handlers.items()}
        return self

    def __exit__(self, *exc: object) -> None:
        signal.setitimer(signal.ITIMER_REAL, 0)
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def run(self, argv: Sequence[str]) -> int:
        """The exit code; minus the signal's number where one ended it."""
        # A process group of its own: Ctrl-C in the terminal reaches it once, through
        # us, and what it leaves behind (workers that hold a device) gets killed.
        self._process = subprocess.Popen(
            _tied(argv), stdin=subprocess.DEVNULL, process_group=0
        )
        if self.stop is not None:  # it came while the process was being made
            self._pass_on(self.stop, None)
        try:
            return self._process.wait()
        finally:
            self._kill()
            self._process = None

    def sleep(self, seconds: float) -> None:
        """Sleeps, but not past a signal."""
        end = time.monotonic() + seconds
        while self.stop is None and (left := end - time.monotonic()) > 0:
            time.sleep(min(left, 0.1))

    def _pass_on(self, number: int, frame: FrameType | None) -> None:
        self.stop = self.stop or signal.Signals(number)
        if self._process is not None:
            self._process.send_signal(number)
            if not signal.getitimer(signal.ITIMER_REAL)[0]:
                signal.setitimer(signal.ITIMER_REAL, max(self._grace_seconds, 1e-6))

    def _kill(self) -> None:
        if self._process is not None:
            # PermissionError: what macOS says of a group of zombies.
            with contextlib.suppress(ProcessLookupError, PermissionError):
                os.killpg(self._process.pid, signal.SIGKILL)
