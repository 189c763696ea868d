import os
import subprocess
import sys

import pytest

from mpt_jax.training import progress

METRICS = {
    "loss": 3.21451,
    "learning_rate": 1e-3,
    "tokens_per_second": 12345.3,
    "mfu": 0.4123,
    "data_wait_share": 0.013,
    "eta_seconds": 192.3,
}
LINE = "loss 3.2145  12,345 tok/s  mfu 41.2%  data 1.3%  eta 0:03:12"


def test_plain_lines_without_a_terminal(capsys):
    with progress.Progress(2000, start_step=100) as p:  # capsys is no terminal
        p.update(120, METRICS)
        p.message("checkpoint 120 saved")
        p.update(130, {"loss": float("nan")})
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        f"step    120/2000  {LINE}",
        "checkpoint 120 saved",
        "step    130/2000  loss nan",
    ]


def test_bar_on_a_terminal_has_messages_above(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "100")
    with progress.Progress(2000, start_step=100, tty=True) as p:
        p.update(110, METRICS)
        p.message("validation [loss] 3.01")
        p.update(120, METRICS | {"loss": 3.1})
    err = capsys.readouterr().err
    assert " 100/2000" in err  # resumed there
    assert LINE in err
    assert "validation [loss] 3.01" in err
    last = err[err.index("validation") :].replace("\x1b[0m", "")
    assert " 120/2000" in last
    assert "loss 3.1000" in last


@pytest.mark.parametrize("tty", [False, True])
def test_disabled_shows_nothing(capsys, tty):
    with progress.Progress(10, enabled=False, tty=tty) as p:
        p.update(1, METRICS)
        p.message("event")
    assert capsys.readouterr() == ("", "")


def test_dumb_terminal_is_no_terminal(monkeypatch):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    monkeypatch.setenv("TERM", "xterm")
    assert progress._stderr_is_terminal()
    monkeypatch.setenv("TERM", "dumb")
    assert not progress._stderr_is_terminal()


def test_guard_warns_once_and_lets_interrupts_through():
    warnings = []
    guard = progress.Guard("sink", warn=warnings.append)
    for _ in range(3):
        with guard:
            raise OSError(28, "No space left on device")
    assert len(warnings) == 1
    assert "sink: OSError" in warnings[0]

    def interrupt():
        with guard:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupt()


RUN = """
from mpt_jax.training.progress import Progress
with Progress(3, tty={tty}) as p:
    for step in (1, 2, 3):
        p.update(step, {{"loss": 1.0}})
        p.message("event")
open({done!r}, "w").close()
"""


@pytest.mark.parametrize("tty", [False, True])
@pytest.mark.parametrize("stdout", ["open", "closed"])
def test_closed_pipes_cost_one_warning_and_no_exit_code(tmp_path, tty, stdout):
    done = tmp_path / "done"
    reader, broken = os.pipe()
    os.close(reader)
    child = subprocess.run(
        [sys.executable, "-c", RUN.format(tty=tty, done=str(done))],
        stdout=subprocess.PIPE if stdout == "open" else broken,
        stderr=broken,
        env=os.environ | {"PYTHONUNBUFFERED": ""},  # else nothing is left to flush
        text=True,
        timeout=60,
    )
    os.close(broken)
    assert child.returncode == 0
    assert done.exists()
    if stdout == "open":
        assert child.stdout.count("warning: ") == 1
        assert "stderr: BrokenPipeError" in child.stdout


def test_imports_neither_jax_nor_rich():
    code = (
        "import sys, mpt_jax.training.progress; print({'jax', 'rich'} & {*sys.modules})"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout == "set()\n"
