"""SIGTERM and SIGINT: an orderly stop at any time, also before there is a loop.

Python runs a signal's handler between two bytecodes of the main thread: not while XLA
compiles, for minutes, or while JAX waits for a process that never comes. A thread reads
the signals here as they arrive.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable

from mpt_jax.errors import EXIT_OK

SIGNALS = (signal.SIGTERM, signal.SIGINT)


class Stop:
    """Notes the first signal for the loop; a context manager, of the main thread only.

    Before armed() there is nothing to save: the process ends at once, with 0. A SIGINT
    after the first signal ends it, too, with 130, whatever it is doing: someone waits
    at a terminal. A SIGTERM does not: a machine that shuts down sends it to a trainer
    and to its supervisor, which passes it on, so that two are one.

    Args: early: told the signal's name before such an end.
    """

    def __init__(
        self,
        early: Callable[[str], object],
        *,
        die: Callable[[int], object] = os._exit,
    ):
        self.signal = 0  # that asked for a stop
        self._early, self._die, self._armed = early, die, False

    @property
    def name(self) -> str:
        return signal.Signals(self.signal).name

    def arm(self) -> None:
        """From now on there is work to save."""
        self._armed = True

    def __enter__(self) -> Stop:
        self._read, self._write = os.pipe()
        os.set_blocking(self._write, False)
        self._wakeup = signal.set_wakeup_fd(self._write, warn_on_full_buffer=False)
        # Without a handler in Python nothing is written to the pipe.
        self._before = {n: signal.signal(n, lambda *_: None) for n in SIGNALS}
        self._thread = threading.Thread(target=self._watch, name="stop", daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._write)
        self._thread.join()
        os.close(self._read)

    def _watch(self) -> None:
        while number := os.read(self._read, 1):
            if number[0] in SIGNALS:
                self._note(number[0])

    def _note(self, number: int) -> None:
        if self.signal:
            if number == signal.SIGINT:
                self._die(128 + number)
            return
        self.signal = number
        if not self._armed:
            self._early(self.name)
            self._die(EXIT_OK)
