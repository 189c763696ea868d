import os
import signal
import subprocess
import sys
import time

import pytest

from mpt_jax.training.stop import Stop

TIMEOUT = 60  # seconds: only a broken test waits so long
# The main thread is where Python runs no handler, as in a compilation.
BUSY = """
import sys, threading
from mpt_jax.training.stop import Stop
stop = Stop(lambda name: print("early", name, flush=True)).__enter__()
if {armed}:
    stop.arm()
print("ready", flush=True)
numbers = list(range(3 * 10**7))
while True:
    sorted(numbers)  # seconds of C code
"""


def wait_for(condition):
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_is_noted_once_there_is_work(number):
    deaths = []
    before = signal.getsignal(number)
    with Stop(deaths.append, die=deaths.append) as stop:
        stop.arm()
        os.kill(os.getpid(), number)
        wait_for(lambda: stop.signal)
        os.kill(os.getpid(), signal.SIGTERM)  # from a supervisor, too
        time.sleep(0.1)
        assert (stop.name, deaths) == (number.name, [])
        os.kill(os.getpid(), signal.SIGINT)  # someone does not wait
        wait_for(lambda: deaths)
    assert deaths == [128 + signal.SIGINT]
    assert signal.getsignal(number) is before


def test_before_there_is_work_it_ends_the_process():
    events = []
    with Stop(events.append, die=events.append):
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: len(events) == 2)
    assert events == ["SIGTERM", 0]


def test_other_signals_are_left_alone():
    heard = []
    before = signal.signal(signal.SIGUSR1, lambda *_: heard.append(1))
    with Stop(heard.append, die=heard.append) as stop:
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_for(lambda: heard)
    signal.signal(signal.SIGUSR1, before)
    assert (heard, stop.signal) == ([1], 0)


@pytest.mark.slow  # 30 million integers
def test_a_main_thread_that_runs_no_handler_does_not_hold_it_up():
    code = BUSY.format(armed=False).replace("sorted(numbers)", "sum(numbers)")
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    out, _ = process.communicate(timeout=TIMEOUT)
    assert (process.returncode, out) == (0, "early SIGTERM\n")
