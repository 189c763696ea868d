"""Damaged checkpoints: each kind is noticed, said, and passed over or refused."""

import pathlib
import random
import shutil

import jax
import numpy as np
import pytest

from mpt_jax.config import CheckpointConfig
from mpt_jax.errors import CheckpointError
from mpt_jax.training import stored
from mpt_jax.training.checkpoints import Checkpoints, open_checkpoint, restore_params

STRUCT = {"w": jax.ShapeDtypeStruct((64, 32), np.float32)}
CONFIG = CheckpointConfig(keep=2)


def weights(step: int) -> np.ndarray:
    return np.random.default_rng(step).normal(size=(64, 32)).astype(np.float32)


def save(checkpoints: Checkpoints, step: int) -> None:
    checkpoints.save(
        step,
        params={"w": weights(step)},
        opt_state={"step": np.full((), step, np.int32)},
        data=b"position",
        meta={"step": step},
        wait=True,
    )


@pytest.fixture(scope="module")
def good_run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("good")
    with Checkpoints(directory, CONFIG) as checkpoints:
        save(checkpoints, 10)
        save(checkpoints, 20)
    return directory


@pytest.fixture
def run(good_run, tmp_path):
    """A copy of a run with the valid steps 10 and 20, to be damaged."""
    return pathlib.Path(shutil.copytree(good_run, tmp_path / "run"))


def data_file(step: pathlib.Path) -> pathlib.Path:
    """The file that holds the weights."""
    return max(
        (step / "params").rglob("*"), key=lambda p: p.is_file() * p.stat().st_size
    )


def flip_bit(file: pathlib.Path, bit: int | None = None) -> None:
    content = bytearray(file.read_bytes())
    bit = random.Random(0).randrange(8 * len(content)) if bit is None else bit
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def truncate(file: pathlib.Path) -> None:
    file.write_bytes(file.read_bytes()[:-1])


def empty(directory: pathlib.Path) -> None:
    shutil.rmtree(directory)
    directory.mkdir()


DAMAGES = {
    "bit flip in the weights": (lambda s: flip_bit(data_file(s)), "expected 7"),
    "truncated weights": (lambda s: truncate(data_file(s)), "bytes, crc32"),
    "weights missing": (lambda s: data_file(s).unlink(), "missing, expected"),
    "item missing": (lambda s: shutil.rmtree(s / "opt_state"), "and [0-9]+ more"),
    "meta.json missing": (lambda s: (s / "meta.json").unlink(), "meta.json: missing"),
    "meta.json changed": (lambda s: flip_bit(s / "meta.json"), "meta.json: "),
    "data position cut": (
        lambda s: truncate(s / "data" / "process_0-of-1.bin"),
        "data/process_0-of-1.bin: 7 bytes, .*, expected 8 bytes",
    ),
    "empty directory": (empty, "MANIFEST.json is missing"),
    "no manifest": (
        lambda s: (s / "MANIFEST.json").unlink(),
        "MANIFEST.json is missing",
    ),
    "empty manifest": (
        lambda s: (s / "MANIFEST.json").write_bytes(b""),
        "MANIFEST.json is corrupt",
    ),
    "garbage manifest": (
        lambda s: (s / "MANIFEST.json").write_bytes(bytes(range(256))),
        "MANIFEST.json is corrupt",
    ),
    "manifest of something else": (
        lambda s: (s / "MANIFEST.json").write_text("[1, 2]"),
        "MANIFEST.json is corrupt",
    ),
    "manifest without checksum": (
        lambda s: (s / "MANIFEST.json").write_text('{"step": 20, "files": {}}'),
        "MANIFEST.json is corrupt",
    ),
    "manifest edited": (
        lambda s: (s / "MANIFEST.json").write_text(
            (s / "MANIFEST.json").read_text().replace("float32", "float16")
        ),
        "MANIFEST.json is corrupt",
    ),
    "renamed from another step": (
        lambda s: shutil.copytree(s.with_name("00000010"), s, dirs_exist_ok=True),
        "this is a copy of step 10",
    ),
}


@pytest.mark.parametrize("kind", DAMAGES)
def test_falls_back_to_the_newest_valid_step(run, kind, caplog):
    damage, reason = DAMAGES[kind]
    if kind == "renamed from another step":
        shutil.rmtree(run / "00000020")
    damage(run / "00000020")
    with Checkpoints(run, CONFIG) as checkpoints:
        latest = checkpoints.latest_valid()
    assert latest.step == 10
    np.testing.assert_array_equal(latest.restore_params(STRUCT)["w"], weights(10))
    [line] = [
        m for m in caplog.messages if m.startswith("skipping a damaged checkpoint")
    ]
    assert f"{run}/00000020: " in line
    assert "\n" not in line
    with pytest.raises(CheckpointError, match=reason):
        open_checkpoint(run / "00000020")
    assert open_checkpoint(run).step == 10  # readers fall back as well


def test_a_flipped_bit_in_any_file_is_noticed(run):
    step = run / "00000020"
    files = [p for p in step.rglob("*") if p.is_file() and p.stat().st_size]
    assert len(files) >= 10
    rng = random.Random(1)
    for file in files:
        content = file.read_bytes()
        for _ in range(3):
            flip_bit(file, rng.randrange(8 * len(content)))
            with pytest.raises(CheckpointError):
                open_checkpoint(step)
            file.write_bytes(content)
    assert open_checkpoint(step).step == 20


def test_refuses_when_every_step_is_damaged(run):
    flip_bit(data_file(run / "00000010"))
    empty(run / "00000020")
    before = sorted(p for p in run.rglob("*") if p.name != ".lock")
    with (
        pytest.raises(CheckpointError, match="every checkpoint is damaged") as caught,
        Checkpoints(run, CONFIG) as checkpoints,
    ):
        checkpoints.latest_valid()
    *_, step_20, step_10 = caught.value.message.splitlines()
    assert step_20 == "  step 20: MANIFEST.json is missing"
    assert step_10.startswith("  step 10: params/")
    assert sorted(p for p in run.rglob("*") if p.name != ".lock") == before
    with pytest.raises(CheckpointError, match="every checkpoint is damaged"):
        restore_params(run, STRUCT)


def test_a_damaged_step_is_saved_again(run):
    flip_bit(data_file(run / "00000020"))
    with Checkpoints(run, CONFIG) as checkpoints:
        assert checkpoints.latest_valid().step == 10
        save(checkpoints, 20)
        assert checkpoints.steps() == [10, 20]
        latest = checkpoints.latest_valid()
    assert latest.step == 20
    np.testing.assert_array_equal(latest.restore_params(STRUCT)["w"], weights(20))


def test_a_damaged_step_does_not_count_as_kept(run):
    flip_bit(data_file(run / "00000020"))
    with Checkpoints(run, CONFIG) as checkpoints:
        checkpoints.latest_valid()
        save(checkpoints, 30)
        assert checkpoints.steps() == [10, 30]


def test_a_failing_read_is_one_line(run, monkeypatch):
    def fail(*args, **kwargs):
        raise ValueError("DATA_LOSS: Error reading\n" + "TensorStore spec\n" * 60)

    monkeypatch.setattr(stored.ocp, "load_checkpointables", fail)
    with pytest.raises(CheckpointError) as caught:
        restore_params(run, STRUCT)
    assert caught.value.message == (
        "cannot restore: ValueError: DATA_LOSS: Error reading"
    )


def test_a_file_that_cannot_be_read_is_damage(run):
    file = data_file(run / "00000020")
    file.unlink()
    file.mkdir()  # opening it is an OSError, as on a failing disk
    assert open_checkpoint(run).step == 10
