import contextlib
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from mpt_jax.training.watchdog import Watchdog

SECONDS = 0.3  # beats come four times as often: 225 ms of slack for a loaded machine

STUCK = """
import sys, time
from mpt_jax.training.watchdog import Watchdog

def a_function_that_hangs():
    time.sleep(60)

watchdog = Watchdog({seconds}, sys.argv[1])
{before}
a_function_that_hangs()
"""


def child(tmp_path, *, before="", seconds=SECONDS, **kwargs):
    code = STUCK.format(seconds=seconds, before=before)
    return subprocess.Popen(
        [sys.executable, "-c", code, str(tmp_path / "sub" / "stacks.txt")], **kwargs
    )


def test_stuck_process_exits_75_and_names_step_host_and_stack(tmp_path):
    process = child(
        tmp_path, before="watchdog.beat(7)", stderr=subprocess.PIPE, text=True
    )
    _, err = process.communicate(timeout=60)
    assert process.returncode == 75
    headline, stacks = err.split("\n", 1)
    assert "last step 7" in headline
    assert f"host {socket.gethostname()}" in headline
    assert str(tmp_path / "sub" / "stacks.txt") in headline
    assert "a_function_that_hangs" in stacks
    assert (tmp_path / "sub" / "stacks.txt").read_text() == err


def test_stuck_before_the_first_step(tmp_path):
    process = child(tmp_path, stderr=subprocess.PIPE, text=True)
    assert "no step yet" in process.communicate(timeout=60)[1]
    assert process.returncode == 75


def test_a_closed_stderr_does_not_keep_it_alive(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    process = child(tmp_path, stderr=writer)
    os.close(writer)
    assert process.wait(timeout=60) == 75
    assert (tmp_path / "sub" / "stacks.txt").exists()


def test_a_full_pipe_that_nobody_reads_does_not_keep_it_alive(tmp_path):
    reader, writer = os.pipe()
    os.set_blocking(writer, False)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(writer, b"x" * 4096)
    os.set_blocking(writer, True)
    before = "import mpt_jax.training.watchdog as w; w.REPORT_SECONDS = 0.1"
    process = child(tmp_path, before=before, stderr=writer)
    assert process.wait(timeout=60) == 75
    os.close(reader)
    os.close(writer)


def test_an_unwritable_dump_does_not_keep_it_alive(tmp_path):
    (tmp_path / "sub").write_text("a file where a directory should be")
    process = child(tmp_path, stderr=subprocess.PIPE, text=True)
    assert "a_function_that_hangs" in process.communicate(timeout=60)[1]
    assert process.returncode == 75


def test_beats_and_pauses_keep_it_alive_until_they_end(tmp_path):
    before = f"""
for step in range(6):
    time.sleep({SECONDS} / 4)
    watchdog.beat(step)
with watchdog.pause(), watchdog.pause():
    time.sleep({SECONDS} * 2)
open(sys.argv[1] + ".alive", "w").close()
"""
    (tmp_path / "sub").mkdir()
    process = child(tmp_path, before=before, stderr=subprocess.DEVNULL)
    assert process.wait(timeout=60) == 75
    assert (tmp_path / "sub" / "stacks.txt.alive").exists()


def test_a_stopped_process_lives_on(tmp_path):
    code = f"""
import time
from mpt_jax.training.watchdog import Watchdog
watchdog = Watchdog({SECONDS}, {str(tmp_path / "stacks.txt")!r})
print("ready", flush=True)
begin = time.monotonic()
while time.monotonic() - begin < {SECONDS} * 4:
    time.sleep(0.02)
    watchdog.beat(0)
"""
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
    process.stdout.readline()
    process.send_signal(signal.SIGSTOP)
    time.sleep(SECONDS * 2)
    process.send_signal(signal.SIGCONT)
    assert process.communicate(timeout=60) is not None
    assert process.returncode == 0


@pytest.mark.parametrize("end", ["off", "closed"])
def test_off_or_closed_never_dies(tmp_path, end):
    deaths = []
    seconds = 0 if end == "off" else 0.1
    with Watchdog(seconds, tmp_path / "stacks.txt", die=deaths.append) as watchdog:
        watchdog.beat(1)
    time.sleep(0.3)
    assert deaths == []
    assert not (tmp_path / "stacks.txt").exists()


def wait_for(condition):
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


def test_it_says_whom_all_wait_for_and_tells_the_others_first(tmp_path, capfd):
    events = []
    watchdog = Watchdog(
        SECONDS,
        tmp_path / "stacks.txt",
        blame=lambda: "all wait for process 1",
        tell=lambda code, why: events.append((code, why)),
        die=lambda code: (events.append(code), watchdog.close()),
    )
    watchdog.beat(7)
    with watchdog.waiting_for("validation split of books"):
        wait_for(lambda: len(events) == 2)
    why = (
        f"no step for {SECONDS} s, last step 7, waiting for validation split of books; "
        "all wait for process 1"
    )
    assert events == [(75, why), 75]
    assert f"): {why}; exit 75, stacks in " in capfd.readouterr().err


def test_a_pause_is_long_but_ends(tmp_path):
    deaths = []
    with Watchdog(0.1, tmp_path / "stacks.txt", die=deaths.append) as watchdog:
        with watchdog.pause("saving"):
            time.sleep(0.25)
            assert deaths == []
            wait_for(lambda: deaths)
    assert deaths[0] == 75
    assert b"no step yet, saving; exit 75" in (tmp_path / "stacks.txt").read_bytes()


def test_where_it_is_counts_batches_and_says_what_is_done_inside(tmp_path):
    with Watchdog(0, tmp_path / "stacks.txt") as watchdog:
        assert watchdog.where() == (0, "no step yet")
        watchdog.enter()
        with watchdog.pause("compiling"), watchdog.waiting_for("text"):
            assert watchdog.where() == (1, "no step yet, waiting for text")
        watchdog.beat(5)
        watchdog.enter()
        assert watchdog.where() == (2, "last step 5")
