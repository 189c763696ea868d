import itertools
import os
import pathlib
import resource
import signal
import subprocess
import sys
import time

import pytest

from mpt_jax import errors
from mpt_jax.config import SuperviseConfig
from mpt_jax.training.supervise import newest_checkpoint, supervise

FAST = SuperviseConfig(max_failures=3, backoff_seconds=0.001, grace_seconds=30)
TIMEOUT = 60  # seconds: only a broken test waits so long
PYTHON = (sys.executable, "-S", "-c")  # -S: no site-packages, starts in 20 ms

# Each run takes the next "code" or "code:checkpoint" off the list; code -9 is SIGKILL.
SCRIPTED = """
import os, sys, time
workdir, *plan = sys.argv[1:]
runs = open(workdir + "/runs", "a+")
runs.seek(0)
code, _, step = plan[len(runs.readlines())].partition(":")
runs.write(f"{time.time()}\\n")
runs.close()
if step:
    os.makedirs(f"{workdir}/checkpoints/{step}")
if int(code) < 0:
    os.kill(os.getpid(), -int(code))
sys.exit(int(code))
"""


def scripted(workdir, plan, config=FAST, **kwargs):
    """(exit code, log, times at which the child started)."""
    log = []
    argv = [*PYTHON, SCRIPTED, str(workdir), *plan.split()]
    code = supervise(argv, workdir=workdir, config=config, log=log.append, **kwargs)
    return code, log, [float(x) for x in (workdir / "runs").read_text().split()]


def test_three_crashes_in_a_row_then_done(tmp_path):
    code, log, runs = scripted(tmp_path, "1 -9 75 0")
    assert (code, len(runs)) == (0, 4)
    assert "exit 1 (internal error)" in log[0]
    assert "killed by SIGKILL" in log[1]
    assert "exit 75 (stuck)" in log[2]
    assert "exit 0" in log[3]
    assert len(log) == 4  # one line per event


def test_crash_loop_gives_up_and_lists_the_exit_codes(tmp_path):
    code, log, runs = scripted(tmp_path, "1 4 -9 75")
    assert (code, len(runs)) == (75, 4)
    assert "none; giving up after 4 failures without a new one: exit 1" in log[-1]
    assert log[-1].endswith(
        "exit 1 (internal error), exit 4 (checkpoint error), killed by SIGKILL, "
        "exit 75 (stuck)"
    )


@pytest.mark.parametrize("number", [9, 40])  # 40: a real-time signal, without a name
def test_gives_up_with_128_plus_the_signal(tmp_path, number):
    config = SuperviseConfig(max_failures=0)
    assert scripted(tmp_path, f"-{number}", config)[0] == 128 + number


def test_new_checkpoints_reset_the_count(tmp_path):
    plan = "1 1 1 1:10 1 1 1 1:20 1 1 0"
    code, log, runs = scripted(tmp_path, plan)
    assert (code, len(runs)) == (0, 11)
    assert "checkpoint 10; restart in 0.001 s after 0 failures" in log[3]


def test_an_older_or_unfinished_checkpoint_is_no_progress(tmp_path):
    (tmp_path / "checkpoints" / "50").mkdir(parents=True)
    plan = "1:10 1:20.orbax-checkpoint-tmp 1:999.bad 1:30 0"
    code, _, runs = scripted(tmp_path, plan)
    assert (code, len(runs)) == (1, 4)


def test_progress_can_be_injected(tmp_path):
    count = iter(range(100))
    code, _, runs = scripted(tmp_path, "1 1 1 1 1 1 0", progress=lambda: next(count))
    assert (code, len(runs)) == (0, 7)


@pytest.mark.parametrize(
    "code", [errors.EXIT_OK, errors.EXIT_USER, errors.EXIT_DIVERGED]
)
def test_final_exit_codes_are_not_restarted(tmp_path, code):
    got, _, runs = scripted(tmp_path, f"{code} 0")
    assert (got, len(runs)) == (code, 1)


@pytest.mark.parametrize(
    "code",
    [
        errors.EXIT_DATA,
        errors.EXIT_CHECKPOINT,
        errors.EXIT_STUCK,
        errors.EXIT_PEER_LOST,
    ],
)
def test_what_may_pass_is_restarted(tmp_path, code):
    assert scripted(tmp_path, f"{code} 0")[0] == 0


def test_backoff_doubles_and_progress_resets_it(tmp_path):
    config = SuperviseConfig(max_failures=3, backoff_seconds=0.1)
    _, log, runs = scripted(tmp_path, "1 1 1:10 0", config)
    assert [line.split("restart in ")[1][:5] for line in log[:3]] == [
        "0.1 s",
        "0.2 s",
        "0.1 s",
    ]
    pauses = [later - earlier for earlier, later in itertools.pairwise(runs)]
    assert all(p >= s for p, s in zip(pauses, [0.1, 0.2, 0.1], strict=True))


def test_newest_checkpoint(tmp_path):
    assert newest_checkpoint(tmp_path) == -1
    for name in ("9", "100", "200.orbax-checkpoint-tmp", "300.corrupt", "x"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "500").touch()  # a file is no checkpoint
    assert newest_checkpoint(tmp_path) == 100


# A parent in a process of its own, since signals and its death are what is tested.
PARENT = """
import sys
from mpt_jax.config import SuperviseConfig
from mpt_jax.training.supervise import supervise
config = SuperviseConfig(grace_seconds={grace}, backoff_seconds={backoff})
sys.exit(supervise(sys.argv[2:], workdir=sys.argv[1], config=config))
"""
# A trainer: says it is there, and on a signal does what {on_signal} says.
TRAINER = """
import os, signal, sys, time
def handler(number, frame):
    open(sys.argv[1] + "/signals", "a").write(signal.Signals(number).name + "\\n")
    {on_signal}
for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, handler)
open(sys.argv[1] + "/pid.new", "w").write(str(os.getpid()))
os.rename(sys.argv[1] + "/pid.new", sys.argv[1] + "/pid")
{then}
while True:
    time.sleep(0.02)
"""


def wait_for(condition):
    end = time.monotonic() + TIMEOUT
    while not condition():
        assert time.monotonic() < end, "timed out"
        time.sleep(0.01)


def start(workdir, *, on_signal="sys.exit(0)", then="", grace=30.0, backoff=1.0):
    trainer = TRAINER.format(on_signal=on_signal, then=then)
    supervisor = PARENT.format(grace=grace, backoff=backoff)
    child = [*PYTHON, trainer, str(workdir)]
    parent = subprocess.Popen(
        [sys.executable, "-c", supervisor, str(workdir), *child],
        stderr=subprocess.PIPE,
        text=True,
    )
    wait_for((workdir / "pid").exists)
    return parent, int((workdir / "pid").read_text())


def gone(pid):
    """Whether the process has ended (perhaps unreaped, where pid 1 does not reap)."""
    try:
        stat = pathlib.Path(f"/proc/{pid}/stat").read_text()
    except FileNotFoundError:
        return True
    return stat.rsplit(")", 1)[1].split()[0] == "Z"


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize("code", [0, 4])
def test_signals_reach_the_child_and_its_code_comes_back(tmp_path, number, code):
    parent, _ = start(tmp_path, on_signal=f"sys.exit({code})")
    parent.send_signal(number)
    _, err = parent.communicate(timeout=TIMEOUT)
    assert parent.returncode == code  # 4 is not restarted: we were told to stop
    assert (tmp_path / "signals").read_text() == f"{number.name}\n"
    assert f"stopped by {number.name}" in err


def test_sigkill_after_grace(tmp_path):
    parent, pid = start(tmp_path, on_signal="pass", grace=0.2)
    parent.send_signal(signal.SIGTERM)
    _, err = parent.communicate(timeout=TIMEOUT)
    assert parent.returncode == 128 + 9
    assert "killed by SIGKILL" in err
    assert gone(pid)


def test_signal_during_backoff_ends_it(tmp_path):
    parent, _ = start(tmp_path, then="sys.exit(3)", backoff=TIMEOUT)
    line = parent.stderr.readline()
    assert f"restart in {TIMEOUT} s" in line
    begin = time.monotonic()
    parent.send_signal(signal.SIGTERM)
    _, err = parent.communicate(timeout=TIMEOUT)
    assert time.monotonic() - begin < TIMEOUT / 2
    assert parent.returncode == 3
    assert "stopped by SIGTERM before the restart" in err


def test_what_a_crashed_trainer_leaves_behind_is_killed(tmp_path):
    worker = (
        "child = os.fork()\n"
        "if child:\n"
        f"    open('{tmp_path}/worker', 'w').write(str(child))\n"
        "    sys.exit(2)"
    )
    parent, _ = start(tmp_path, then=worker)
    parent.communicate(timeout=TIMEOUT)
    assert parent.returncode == 2
    wait_for(lambda: gone(int((tmp_path / "worker").read_text())))


@pytest.mark.skipif(sys.platform != "linux", reason="needs PR_SET_PDEATHSIG")
def test_child_gets_sigterm_when_the_parent_is_killed(tmp_path):
    parent, pid = start(tmp_path)
    parent.kill()
    parent.communicate(timeout=TIMEOUT)
    wait_for(lambda: gone(pid))
    assert (tmp_path / "signals").read_text() == "SIGTERM\n"


def test_the_parent_survives_a_closed_stderr(tmp_path):
    reader, writer = os.pipe()
    os.close(reader)
    argv = [*PYTHON, SCRIPTED, str(tmp_path), "1", "1", "0"]
    code = PARENT.format(grace=1, backoff=0.001)
    parent = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), *argv],
        stderr=writer,
        stdout=writer,
        timeout=TIMEOUT,
    )
    os.close(writer)
    assert parent.returncode == 0
    assert len((tmp_path / "runs").read_text().split()) == 3


def test_imports_no_jax_and_starts_in_time():
    module = "mpt_jax.training.supervise"
    code = f"import sys, {module}; print({{'jax', 'rich'}} & {{*sys.modules}})"
    times = []
    for _ in range(3):
        begin = cpu_seconds()
        out = subprocess.run(
            [sys.executable, "-c", code], capture_output=True, text=True
        )
        times.append(cpu_seconds() - begin)
        assert out.stdout == "set()\n"
    # A promise of the verb. Not by the clock, since machines are shared.
    assert 0 < min(times) < 0.3


def cpu_seconds():
    """Of all children that have ended."""
    return sum(resource.getrusage(resource.RUSAGE_CHILDREN)[:2])
