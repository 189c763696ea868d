import json
import math
import os
import random
import struct
import subprocess
import sys

import jax.numpy as jnp
import numpy as np
import pytest

from mpt_jax.config import LogConfig
from mpt_jax.errors import UserError
from mpt_jax.training import writers

JSONL = LogConfig(tensorboard=False, plot=False)


def lines(workdir):
    return [json.loads(x) for x in (workdir / "metrics.jsonl").read_text().splitlines()]


def run(workdir, steps, *, config=JSONL, **kwargs):
    with writers.MetricsWriter(workdir, config, **kwargs) as writer:
        for step in steps:
            writer.write(step, {"loss": 10 / step})


def events(workdir):
    """The events of each file, parsed from the framing (length, crc, data, crc)."""
    from tensorboard.compat.proto import event_pb2

    found = []
    for path in sorted((workdir / "tensorboard").iterdir()):
        data, at = path.read_bytes(), 0
        while at < len(data):
            (size,) = struct.unpack_from("<Q", data, at)
            found.append(event_pb2.Event.FromString(data[at + 12 : at + 12 + size]))
            at += 12 + size + 4
    return found


def test_jsonl_has_one_object_per_write(tmp_path):
    with writers.MetricsWriter(tmp_path / "new", JSONL, clock=lambda: 12.5) as writer:
        writer.write(1, {"loss": 2.5, "tokens": 7})
        writer.write(1, {"validation_loss": 3.5})
    assert lines(tmp_path / "new") == [
        {"step": 1, "wall_time": 12.5, "loss": 2.5, "tokens": 7},
        {"step": 1, "wall_time": 12.5, "validation_loss": 3.5},
    ]


def test_jsonl_floats_round_trip_exactly(tmp_path):
    rng = random.Random(0)
    values = [rng.uniform(0, 12) for _ in range(100)] + [1e-308, math.pi, 0.1 + 0.2]
    with writers.MetricsWriter(tmp_path, JSONL) as writer:
        for step, value in enumerate(values, 1):
            writer.write(step, {"loss": value})
    read = list(writers.read_metrics(tmp_path / "metrics.jsonl"))
    assert [r["loss"].hex() for r in read] == [v.hex() for v in values]


def test_jsonl_takes_array_scalars_and_nothing_else(tmp_path):
    with writers.MetricsWriter(tmp_path, JSONL) as writer:
        writer.write(1, {"a": jnp.float32(0.1), "b": np.int32(3), "c": jnp.bool_(True)})
        with pytest.raises(TypeError, match="'text'"):
            writer.write(2, {"loss": "text"})
    (line,) = lines(tmp_path)
    assert line["a"] == float(np.float32(0.1))
    assert (line["b"], line["c"]) == (3, True)


def test_jsonl_writes_non_finite_as_strings(tmp_path):
    values = {"a": math.nan, "b": math.inf, "c": -math.inf}
    with writers.MetricsWriter(tmp_path, JSONL) as writer:
        writer.write(1, values)
    (line,) = lines(tmp_path)
    assert (line["a"], line["b"], line["c"]) == ("nan", "inf", "-inf")
    (read,) = writers.read_metrics(tmp_path / "metrics.jsonl")
    assert math.isnan(read["a"])
    assert (read["b"], read["c"]) == (math.inf, -math.inf)


def test_jsonl_is_readable_after_every_write(tmp_path):
    writer = writers.MetricsWriter(tmp_path, JSONL)
    writer.write(1, {"loss": 1.0})
    assert len(lines(tmp_path)) == 1  # a kill here loses nothing
    writer.close()


def test_resume_drops_later_steps_and_keeps_earlier_bytes(tmp_path):
    run(tmp_path, range(1, 8))
    before = (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:4]
    run(tmp_path, range(5, 10), start_step=4)
    assert (tmp_path / "metrics.jsonl").read_bytes().splitlines()[:4] == before
    assert [x["step"] for x in lines(tmp_path)] == list(range(1, 10))


@pytest.mark.parametrize(
    "torn", [b'{"step": 3, "wall_', b'{"step": 3, "loss": 1.0}', b"3"]
)
def test_resume_drops_a_torn_last_line(tmp_path, torn):
    run(tmp_path, [1, 2])
    with open(tmp_path / "metrics.jsonl", "ab") as file:
        file.write(torn)
    assert [r["step"] for r in writers.read_metrics(tmp_path / "metrics.jsonl")] == [
        1,
        2,
    ]
    run(tmp_path, [4], start_step=3)
    assert [x["step"] for x in lines(tmp_path)] == [1, 2, 4]


def test_fresh_start_begins_an_empty_file(tmp_path):
    run(tmp_path, [1, 2, 3])
    run(tmp_path, [1])
    assert [x["step"] for x in lines(tmp_path)] == [1]


def test_rewind_in_mid_run(tmp_path):
    with writers.MetricsWriter(tmp_path, JSONL) as writer:
        for step in (1, 2, 3):
            writer.write(step, {"loss": 1.0})
        writer.rewind(1)
        writer.write(2, {"loss": 5.0})
    assert [(x["step"], x["loss"]) for x in lines(tmp_path)] == [(1, 1.0), (2, 5.0)]


def test_disabled_writes_nothing(tmp_path):
    run(tmp_path, [1], config=LogConfig(), enabled=False)
    assert list(tmp_path.iterdir()) == []


def test_unwritable_sinks_warn_once_each_and_training_goes_on(tmp_path):
    (tmp_path / "metrics.jsonl").mkdir()  # not even root can append to a directory
    (tmp_path / "tensorboard").write_text("a file where a directory should be")
    warnings = []
    run(tmp_path, range(1, 6), config=LogConfig(), warn=warnings.append)
    assert sorted(w.split(": ")[1] for w in warnings) == [
        "loss.png",
        "metrics.jsonl",
        "tensorboard",
    ]


FULL_DISK = """
import resource, signal, sys
from mpt_jax.config import LogConfig
from mpt_jax.training.writers import MetricsWriter
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
warnings = []
config = LogConfig(tensorboard=False, plot=False)
with MetricsWriter(sys.argv[1], config, warn=warnings.append) as writer:
    hard = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    resource.setrlimit(resource.RLIMIT_FSIZE, (200, hard))
    for step in range(1, 11):
        writer.write(step, {"loss": 1 / step})
    resource.setrlimit(resource.RLIMIT_FSIZE, (hard, hard))
    writer.write(11, {"loss": 1 / 11})
print(len(warnings), warnings)
"""


def test_full_disk_warns_once_and_loses_no_line_when_space_returns(tmp_path):
    child = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True
    )
    assert child.stdout.startswith("1 "), child.stderr
    assert "File too large" in child.stdout
    assert [x["step"] for x in lines(tmp_path)] == list(range(1, 12))


def test_tensorboard_scalars(tmp_path):
    config = LogConfig(plot=False)
    with writers.MetricsWriter(tmp_path, config, clock=lambda: 12.5) as writer:
        writer.write(3, {"loss": 2.5, "mfu": math.nan})
    version, _, scalars = events(tmp_path)
    assert version.file_version == "brain.Event:2"
    assert (scalars.step, scalars.wall_time) == (3, 12.5)
    values = {v.tag: v.simple_value for v in scalars.summary.value}
    assert values["loss"] == 2.5
    assert math.isnan(values["mfu"])


def test_tensorboard_resume_purges_replayed_steps(tmp_path):
    config = LogConfig(plot=False)
    run(tmp_path, [1, 2, 3], config=config)
    run(tmp_path, [3], config=config, start_step=2)
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    starts = [e for e in events(tmp_path) if e.HasField("session_log")]
    assert [e.step for e in starts] == [
        0,
        3,
    ]  # readers drop earlier events from there on
    assert all(e.session_log.status == e.session_log.START for e in starts)


@pytest.mark.parametrize("package", ["tensorboard", "matplotlib"])
def test_missing_package_is_named_at_start(tmp_path, monkeypatch, package):
    for name in [m for m in sys.modules if m.split(".")[0] == package]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)
    field = {"tensorboard": "log.tensorboard", "matplotlib": "log.plot"}[package]
    with pytest.raises(UserError, match=f"{field}=false"):
        writers.MetricsWriter(tmp_path, LogConfig())
    off = {field.removeprefix("log."): False}
    writers.MetricsWriter(tmp_path, LogConfig(**{"tensorboard": False} | off)).close()


def png_curves(monkeypatch):
    """What savefig draws: label -> (steps, values)."""
    from matplotlib.figure import Figure

    curves, save = {}, Figure.savefig

    def spy(figure, *args, **kwargs):
        for axes in figure.axes:
            curves.update({c.get_label(): c.get_data() for c in axes.lines})
        save(figure, *args, **kwargs)

    monkeypatch.setattr(Figure, "savefig", spy)
    return curves


def test_plot_spans_resumptions_and_skips_non_finite(tmp_path, monkeypatch):
    curves = png_curves(monkeypatch)
    run(tmp_path, range(1, 6))
    config = LogConfig(tensorboard=False)
    with writers.MetricsWriter(tmp_path, config, start_step=4) as writer:
        writer.write(5, {"loss": math.nan, "learning_rate": 1e-3})
        writer.write(6, {"loss": 1.5, "learning_rate": 5e-4})
        writer.write(6, {"validation_loss": 1.75})
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert list(curves["train"][0]) == [1, 2, 3, 4, 6]
    assert [float(x) for x in curves["validation"][1]] == [1.75]
    assert list(curves["learning rate"][1]) == [1e-3, 5e-4]
    assert {p.name for p in tmp_path.iterdir()} == {"metrics.jsonl", "loss.png"}


@pytest.mark.parametrize("losses", [[], [math.nan]])
def test_plot_without_losses_draws_nothing(tmp_path, losses):
    warnings = []
    config = LogConfig(tensorboard=False)
    with writers.MetricsWriter(tmp_path, config, warn=warnings.append) as writer:
        for loss in losses:
            writer.write(1, {"loss": loss})
    assert not (tmp_path / "loss.png").exists()
    assert warnings == []


def test_failed_plot_keeps_the_old_one_and_warns(tmp_path, monkeypatch):
    from matplotlib.figure import Figure

    def fail(figure, path, **kwargs):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(Figure, "savefig", fail)
    (tmp_path / "loss.png").write_bytes(b"old")
    warnings = []
    run(tmp_path, [1], config=LogConfig(tensorboard=False), warn=warnings.append)
    assert (tmp_path / "loss.png").read_bytes() == b"old"
    assert sorted(os.listdir(tmp_path)) == ["loss.png", "metrics.jsonl"]
    assert "disk full" in warnings[0]


NO_TENSORFLOW = """
import sys
from mpt_jax.config import LogConfig
from mpt_jax.training.writers import MetricsWriter
with MetricsWriter(sys.argv[1], LogConfig(plot=False)) as writer:
    writer.write(1, {"loss": 1.0})
print({"tensorflow", "jax"} & {*sys.modules})
"""


def test_imports_neither_tensorflow_nor_jax(tmp_path):
    child = subprocess.run(
        [sys.executable, "-c", NO_TENSORFLOW, str(tmp_path)],
        capture_output=True,
        text=True,
    )
    assert child.stdout == "set()\n", child.stderr
