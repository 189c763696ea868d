"""The verb as a user meets it: its output, files, resumption and refusals."""

import json
import pathlib
import subprocess
import sys
import time

import jax
import pytest

from mpt_jax import loading, train
from mpt_jax.data.synthetic import SyntheticSource
from mpt_jax.training.writers import read_metrics
from tests.test_loading import letters

ROOT = pathlib.Path(__file__).parents[1]
CONFIG = """
from mpt_jax import presets
def get_config():
    config = presets.config()
    config.model.update(dict(d_model=16, n_heads=2, n_layers=2, max_seq_len=16,
                             vocab_size=48, compute_dtype="float32"))
    config.model.attn_config.alibi = True
    config.data.source = "synthetic"
    config.steps = 6
    config.global_batch_size = 8
    config.optim.lr = 1e-2
    config.optim.schedule.warmup_steps = 1
    config.log.every_steps = 1
    config.checkpoint.every_steps = 4
    config.eval.every_steps = 3
    config.eval.batches = 2
    return config
"""


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(CONFIG)
    return str(path)


def run(config_file, workdir, *args):
    return train.main(["--config", config_file, "--workdir", str(workdir), *args])


def losses(workdir):
    records = read_metrics(pathlib.Path(workdir) / "metrics.jsonl")
    return {r["step"]: r["loss"].hex() for r in records if "loss" in r}


def test_a_run_leaves_everything_and_resumes_bitwise(config_file, tmp_path, capsys):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run(config_file, whole) == 0
    assert capsys.readouterr().out.splitlines()[-1].endswith(str(whole))
    names = {p.name for p in whole.iterdir()}
    assert {"checkpoints", "config.json", "metrics.jsonl", "loss.png"} <= names
    assert "tensorboard" in names
    assert (whole / "loss.png").read_bytes().startswith(b"\x89PNG")
    records = list(read_metrics(whole / "metrics.jsonl"))
    assert [r["step"] for r in records if "validation_loss" in r] == [3, 6]
    assert records[-1]["validation_loss"] < records[0]["loss"]

    # The schedule's length is that of the whole run, as after a kill.
    assert run(config_file, parts, "--config.steps=4") == 0
    assert sorted(p.name for p in (parts / "checkpoints").glob("0*")) == ["00000004"]
    assert run(config_file, parts) == 0
    assert "resumed from" in capsys.readouterr().err
    assert list(losses(parts)) == list(range(1, 7))
    # Steps 5 and 6 run on the same state, data and schedule position as a run that was
    # always configured for 6 steps would from this checkpoint.
    again = tmp_path / "again"
    assert run(config_file, again, "--config.steps=4") == 0
    assert run(config_file, again) == 0
    assert losses(again) == losses(parts)


def test_where_the_time_went_is_known_over_restarts(config_file, tmp_path, capsys):
    workdir = tmp_path / "w"
    assert run(config_file, workdir, "--config.steps=4") == 0
    assert "0 restarts: startup" in capsys.readouterr().err
    first = json.loads((workdir / "goodput.json").read_text())
    assert run(config_file, workdir) == 0
    assert "1 restarts: startup" in capsys.readouterr().err
    second = json.loads((workdir / "goodput.json").read_text())
    assert (first["restarts"], second["restarts"]) == (0, 1)
    for kind in ("productive", "startup", "compile", "checkpoint"):
        assert second["seconds"][kind] > first["seconds"][kind]
    records = list(read_metrics(workdir / "metrics.jsonl"))
    assert all(0 < r["goodput"] < 1 for r in records[1:] if "loss" in r)


def test_a_step_is_dispatched_before_the_last_one_is_read(
    config_file, tmp_path, monkeypatch
):
    """So the next batch is made, and copied to the devices, while a step runs."""
    events = []
    settle, place = train.Run._settle, train.Run._device_batch

    def settled(self, step, *more):
        events.append(f"read {step}")
        return settle(self, step, *more)

    def placed(self, batch):
        events.append("batch")
        return place(self, batch)

    monkeypatch.setattr(train.Run, "_settle", settled)
    monkeypatch.setattr(train.Run, "_device_batch", placed)
    flags = ("--config.eval.batches=0", "--config.steps=3")
    assert run(config_file, tmp_path / "w", *flags) == 0
    assert events == ["batch", "batch", "read 1", "batch", "read 2", "read 3"]


def test_what_was_read_is_counted_only_where_it_is_written(
    config_file, tmp_path, monkeypatch
):
    asked = []
    monkeypatch.setattr(
        SyntheticSource, "metrics", lambda self: asked.append(self._batch) or {}
    )
    assert run(config_file, tmp_path / "w", "--config.log.every_steps=3") == 0
    assert asked == [1, 3, 6]


@pytest.fixture
def keep_all():
    """JAX keeps what took a second to compile; here, all."""
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    yield
    jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


def test_the_next_start_finds_every_program(config_file, tmp_path, keep_all):
    knobs = {
        "compilation_cache": tmp_path / "compiled", "steps": 1, "eval.batches": 0,
        "log.plot": False, "log.tensorboard": False,
    }  # fmt: skip
    short = [f"--config.{knob}={value}" for knob, value in knobs.items()]
    assert run(config_file, tmp_path / "first", *short) == 0
    programs = {path.name for path in tmp_path.glob("compiled/*-cache")}
    assert any(name.startswith("jit_step-") for name in programs)
    assert run(config_file, tmp_path / "second", *short) == 0
    assert {path.name for path in tmp_path.glob("compiled/*-cache")} == programs


@pytest.mark.slow  # the profiler starts and stops in seconds
def test_steps_are_traced(config_file, tmp_path):
    assert run(config_file, tmp_path / "w", "--profile=2:3") == 0
    assert list((tmp_path / "w" / "profile").rglob("*.xplane.pb"))


@pytest.mark.slow  # reads text through SeqIO
def test_a_run_can_be_used_where_its_data_is_not(config_file, tmp_path):
    """Its checkpoint has the tokenizer and the id that ends a text."""
    (tmp_path / "t.json").write_text(letters())
    (tmp_path / "a.jsonl").write_text('{"text": "ABACADABRA"}\n' * 50)
    data = {"source": "seqio", "tasks": f"('jsonl:{tmp_path}/a.jsonl',)",
            "tokenizer": f"{tmp_path}/t.json"}  # fmt: skip
    flags = [f"--config.data.{name}={value}" for name, value in data.items()]
    more = ["--config.steps=1", "--config.eval.batches=0"]
    assert run(config_file, tmp_path / "w", *flags, *more) == 0
    for name in ("t.json", "a.jsonl"):
        (tmp_path / name).unlink()
    loaded = loading.load(tmp_path / "w")
    assert loaded.need_tokenizer().encode("ABBA") == [1, 2, 2, 1]
    opened = loading.open_checkpoint(tmp_path / "w")
    assert (loaded.eos_ids, opened.tokens) == ((0,), {"eos_token_id": 0})


def test_a_finished_run_has_nothing_to_do(config_file, tmp_path, capsys):
    assert run(config_file, tmp_path / "w", "--config.steps=2") == 0
    before = losses(tmp_path / "w")
    assert run(config_file, tmp_path / "w", "--config.steps=2") == 0
    assert losses(tmp_path / "w") == before


def test_an_incompatible_config_is_refused_with_the_fields(
    config_file, tmp_path, capsys
):
    assert run(config_file, tmp_path / "w", "--config.steps=1") == 0
    code = run(config_file, tmp_path / "w", "--config.optim.lr=0.5",
               "--config.model.n_layers=3")  # fmt: skip
    assert code == 2
    error = capsys.readouterr().err
    assert "model.n_layers: checkpoint has 2, this run has 3" in error
    assert "optim.lr: checkpoint has 0.01, this run has 0.5" in error
    saved = json.loads((tmp_path / "w" / "config.json").read_text())
    assert saved["optim"]["lr"] == 0.01


def test_parameters_alone_start_another_run(config_file, tmp_path, capsys):
    assert run(config_file, tmp_path / "a") == 0
    source = f"--config.checkpoint.init_from={tmp_path}/a/checkpoints"
    assert run(config_file, tmp_path / "b", "--config.seed=5", source) == 0
    a, b = losses(tmp_path / "a"), losses(tmp_path / "b")
    assert float.fromhex(b[1]) < float.fromhex(a[1]) - 0.05


def test_print_config_marks_overrides(config_file, tmp_path, capsys):
    assert run(config_file, tmp_path, "--print_config", "--config.optim.lr=1e-4") == 0
    lines = capsys.readouterr().out.splitlines()
    assert "* optim.lr = 0.0001" in lines
    assert "  steps = 6" in lines


def test_dry_run_trains_nothing(config_file, tmp_path, capsys):
    assert run(config_file, tmp_path / "w", "--dry_run") == 0
    out = capsys.readouterr().out
    assert "blocks.attn.Wq.weight" in out
    assert "parameters    7,360" in out
    assert "compiled step" in out
    assert not (tmp_path / "w").exists()


def test_help_prints_every_knob(capsys):
    assert train.main(["--help"]) == 0
    out = capsys.readouterr().out
    assert "--config.model.attn_config.alibi_bias_max=" in out
    assert "--supervise" in out


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["--config.stepz=1"], 'did you mean "steps"?'),
        (["--config.mesh.data=3"], "mesh: data=3"),
        (["--config.global_batch_size=7"], "global_batch_size: 7"),
        (["--config.steps"], "expected a value"),
        (["--stepz"], "unrecognized arguments"),
        (["--profile=10"], "argument --profile: invalid"),
        (["--profile=20:10"], "argument --profile: invalid"),
        (["--process=1"], "--coordinator and --processes: needed, too"),
    ],
)
def test_mistakes_exit_2_with_one_message(config_file, tmp_path, capsys, args, message):
    assert run(config_file, tmp_path / "w", *args) == 2
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
    assert not (tmp_path / "w" / "checkpoints").exists()


def test_a_bucket_is_not_taken_for_a_folder(config_file, capsys):
    assert train.main(["--config", config_file, "--workdir", "gs://bucket/x"]) == 2
    assert "mount the bucket" in capsys.readouterr().err


def test_a_broken_config_file_is_named_with_its_line(tmp_path, capsys):
    path = tmp_path / "broken.py"
    path.write_text("def get_config():\n    return 1 / 0\n")
    assert run(str(path), tmp_path) == 2
    assert f"{path}:2: ZeroDivisionError" in capsys.readouterr().err
    assert run(str(tmp_path / "absent.py"), tmp_path) == 2
    assert "no such config file" in capsys.readouterr().err


def test_a_config_error_needs_no_jax(config_file, tmp_path):
    """Under two seconds, and mostly Python's own start."""
    code = (
        "import sys; from mpt_jax.train import main\n"
        f"assert main(['--config', {config_file!r}, '--config.stepz=1']) == 2\n"
        "assert 'jax' not in sys.modules and 'numpy' not in sys.modules"
    )
    begin = time.monotonic()
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
    assert time.monotonic() - begin < 20  # a hang, not slowness: machines differ


def test_training_diverges_loudly(config_file, tmp_path, capsys):
    code = run(config_file, tmp_path / "w", "--config.optim.lr=1e30",
               "--config.stability.nonfinite=stop", "--config.optim.clip_norm=none",
               "--config.steps=40")  # fmt: skip
    assert code == 77
    assert "not finite" in capsys.readouterr().err
