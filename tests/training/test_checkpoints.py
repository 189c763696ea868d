"""Saving and restoring: what goes in comes out, and who may write where."""

import json
import os
import pathlib
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mpt_jax.config import CheckpointConfig
from mpt_jax.errors import CheckpointError
from mpt_jax.training import stored
from mpt_jax.training.checkpoints import Checkpoints, open_checkpoint, restore_params

PROMPTLY_SECONDS = 10.0  # a refusal must not wait for a time-out, of minutes
KEEP_ALL = CheckpointConfig(keep=100)


class Counters(NamedTuple):
    step: jax.Array
    inner: tuple


def make_params(seed: int) -> dict:
    """Every kind of leaf: bf16, f32 with -0.0, NaN and inf, int, bool, scalars."""
    rng = np.random.default_rng(seed)
    f32 = rng.normal(size=(8, 16)).astype(np.float32)
    f32[0, :4] = -0.0, np.nan, np.inf, np.finfo(np.float32).smallest_subnormal
    bf16 = rng.normal(size=(2, 8, 4, 2)).astype(jnp.bfloat16)
    return {
        "wte": {"weight": jnp.asarray(f32)},
        "blocks": {"attn": {"Wq": {"weight": jnp.asarray(bf16)}}},
        "scale": jnp.float32(seed),
        "mask": jnp.asarray(rng.integers(0, 2, 8).astype(bool)),
    }


def make_opt_state(seed: int) -> Counters:
    floats = {"w": jnp.full((8, 4), seed, jnp.bfloat16), "b": jnp.full(8, float(seed))}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    return Counters(jnp.int32(seed), optimizer.init(floats))


def save(checkpoints: Checkpoints, step: int, *, wait: bool = True, **changes) -> None:
    content = {
        "params": make_params(step),
        "opt_state": make_opt_state(step),
        "data": b"position %d" % step,
        "meta": {"step": step},
    }
    checkpoints.save(step, **(content | changes), wait=wait)


def abstract(tree, sharding=None):
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree
    )


def assert_bitwise_equal(got, expected) -> None:
    assert jax.tree.structure(got) == jax.tree.structure(expected)
    for x, y in zip(jax.tree.leaves(got), jax.tree.leaves(expected), strict=True):
        assert isinstance(x, jax.Array)
        assert (x.dtype, x.shape) == (y.dtype, y.shape)
        assert np.asarray(x).tobytes() == np.asarray(y).tobytes()


def test_round_trip_is_bitwise(tmp_path):
    meta = {"config": {"lr": 1e-3, "betas": [0.9, 0.95]}, "window": [float("inf")]}
    data = bytes(range(256))
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        save(checkpoints, 7, data=data, meta=meta)
        latest = checkpoints.latest_valid()
    assert latest.step == 7
    assert latest.meta == meta  # known before anything is restored
    restored = latest.restore(abstract(make_params(7)), abstract(make_opt_state(7)))
    assert_bitwise_equal(restored.params, make_params(7))
    assert_bitwise_equal(restored.opt_state, make_opt_state(7))
    assert (restored.data, restored.meta) == (data, meta)


def test_restores_onto_other_meshes(tmp_path):
    def on_mesh(shape, spec):
        names = ("fsdp", "tensor")[: len(shape)]
        devices = jax.devices()[: int(np.prod(shape))]
        mesh = jax.make_mesh(
            shape, names, axis_types=(AxisType.Auto,) * len(shape), devices=devices
        )
        return NamedSharding(mesh, PartitionSpec(*spec))

    expected = np.arange(8 * 16, dtype=np.float32).reshape(8, 16)
    placements = [
        on_mesh((8,), ("fsdp",)),
        on_mesh((4, 2), ("fsdp", "tensor")),
        on_mesh((2, 4), (None, "tensor")),  # partly replicated
        on_mesh((1,), ()),
    ]
    params = {"w": jax.device_put(expected, placements[0])}
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        for step, sharding in enumerate(placements[1:]):
            opt_state = {"step": jnp.int32(step)}
            save(checkpoints, step, params=params, opt_state=opt_state)
            params = restore_params(tmp_path, abstract(params, sharding))
            assert params["w"].sharding == sharding
            np.testing.assert_array_equal(params["w"], expected)


def test_parameters_alone_go_to_the_first_device(tmp_path):
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        save(checkpoints, 1)
        save(checkpoints, 2)
        struct = abstract(make_params(0))
        newest = restore_params(tmp_path, struct)  # beside the trainer: no lock
        one = restore_params(str(tmp_path / "00000001"), struct)
    assert_bitwise_equal(newest, make_params(2))
    assert_bitwise_equal(one, make_params(1))
    assert newest["wte"]["weight"].devices() == {jax.devices()[0]}


def test_a_step_directory_may_be_copied_elsewhere(tmp_path):
    with Checkpoints(tmp_path / "run", KEEP_ALL) as checkpoints:
        save(checkpoints, 3)
    copy = shutil.copytree(tmp_path / "run" / "00000003", tmp_path / "best")
    assert open_checkpoint(copy).step == 3


def test_nothing_to_open_is_an_error(tmp_path):
    with pytest.raises(CheckpointError, match="there is no checkpoint here"):
        open_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="there is no checkpoint here"):
        open_checkpoint(tmp_path / "absent")
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        assert checkpoints.latest_valid() is None


def test_donated_and_mutated_arrays_are_saved_as_they_were(tmp_path):
    mesh = jax.make_mesh((8,), ("fsdp",), axis_types=(AxisType.Auto,))
    overwrite = jax.jit(lambda x: x * 0 - 1, donate_argnums=0)
    n = 1 << 20  # 4 MiB each: the write outlasts the return of save()
    expected = np.arange(n, dtype=np.float32)
    params = {
        "sharded": jax.device_put(expected, NamedSharding(mesh, PartitionSpec("fsdp"))),
        "replicated": jax.device_put(expected, NamedSharding(mesh, PartitionSpec())),
        "single": jax.device_put(expected, jax.devices()[0]),
    }
    # Made by XLA, so that the memory is its own to reuse.
    params = jax.tree.map(lambda x: jax.jit(jnp.copy)(x), params)
    numpy_leaf = expected.copy()
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        opt_state = {"numpy": numpy_leaf}
        save(checkpoints, 1, params=params, opt_state=opt_state, wait=False)
        numpy_leaf[:] = -1
        for _ in range(3):
            params = jax.block_until_ready(jax.tree.map(overwrite, params))
        checkpoints.wait()
    stored_step = open_checkpoint(tmp_path)
    restored = stored_step.restore(abstract(params), abstract(opt_state))
    for leaf in jax.tree.leaves((restored.params, restored.opt_state)):
        np.testing.assert_array_equal(leaf, expected)


def test_save_returns_before_the_step_is_finished(tmp_path, monkeypatch):
    release = threading.Event()
    write_manifest = stored.write_manifest

    def held(*args, **kwargs):
        assert release.wait(timeout=10)
        write_manifest(*args, **kwargs)

    monkeypatch.setattr(stored, "write_manifest", held)
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        save(checkpoints, 1, wait=False)
        assert checkpoints.steps() == []
        release.set()
        checkpoints.wait()
        assert checkpoints.steps() == [1]


def test_keeps_the_newest(tmp_path):
    with Checkpoints(tmp_path, CheckpointConfig(keep=2)) as checkpoints:
        for step in (1, 5, 9, 100):
            save(checkpoints, step)
        assert checkpoints.steps() == [9, 100]
    assert sorted(os.listdir(tmp_path)) == [".lock", "00000009", "00000100"]


def test_foreign_names_are_ignored(tmp_path):
    for name in ("5", "00000005.bak", "best", "latest-00000007"):
        (tmp_path / name).mkdir()
    (tmp_path / "00000008").write_text("a file")
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        assert checkpoints.steps() == []
        assert checkpoints.latest_valid() is None


def test_a_run_that_does_not_resume_is_refused(tmp_path):
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        save(checkpoints, 5)
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        for step in (1, 5):
            with pytest.raises(CheckpointError, match="as step 5 exists; resume from"):
                save(checkpoints, step)
        assert checkpoints.latest_valid().step == 5
        save(checkpoints, 6)


def test_rolling_back_removes_the_abandoned_steps(tmp_path):
    struct = abstract(make_params(0))
    with Checkpoints(tmp_path, CheckpointConfig(keep=2)) as checkpoints:
        for step in (10, 20):
            save(checkpoints, step)
        checkpoints.latest_valid().restore_params(struct)  # fills any cache
        assert checkpoints.latest_valid(before=20).step == 10
        assert checkpoints.steps() == [10]  # a crash now must not resume from step 20
        assert checkpoints.latest_valid().step == 10
        save(checkpoints, 15)
        assert checkpoints.steps() == [10, 15]
        save(checkpoints, 20, params=make_params(99))
    assert_bitwise_equal(restore_params(tmp_path, struct), make_params(99))


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (CheckpointConfig(every_steps=3, every_minutes=None), [3, 6]),
        # A step takes 20 s; counted from the call for step 1.
        (CheckpointConfig(every_steps=None, every_minutes=1), [4, 7]),
        # The save at step 3 restarts the minutes.
        (CheckpointConfig(every_steps=3, every_minutes=1), [3, 6]),
        (CheckpointConfig(every_steps=None, every_minutes=None), []),
    ],
)
def test_due_by_steps_and_by_minutes(tmp_path, config, expected):
    with Checkpoints(tmp_path, config) as checkpoints:
        due = [
            step for step in range(1, 9) if checkpoints.due(step, now=1e6 + 20 * step)
        ]
        assert due == expected


def test_due_does_not_ask_twice_for_a_step(tmp_path):
    config = CheckpointConfig(every_steps=3, every_minutes=None)
    with Checkpoints(tmp_path, config) as checkpoints:
        save(checkpoints, 3)
        assert not checkpoints.due(3, now=0.0)
        assert checkpoints.due(6, now=0.0)
    with Checkpoints(tmp_path, config) as checkpoints:
        checkpoints.latest_valid()
        assert not checkpoints.due(3, now=0.0)


def test_every_mismatch_is_named(tmp_path):
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        save(checkpoints, 1)
    struct = abstract(make_params(1))
    struct["wte"]["weight"] = jax.ShapeDtypeStruct((8, 17), jnp.float32)
    struct["scale"] = jax.ShapeDtypeStruct((), jnp.bfloat16)  # Orbax would cast
    struct["new"] = struct.pop("mask")
    with pytest.raises(CheckpointError) as caught:
        restore_params(tmp_path, struct)
    assert caught.value.message.splitlines() == [
        "4 arrays do not fit:",
        "  params.mask: stored bool[8], expected nowhere",
        "  params.new: stored nowhere, expected bool[8]",
        "  params.scale: stored float32[], expected bfloat16[]",
        "  params.wte.weight: stored float32[8, 16], expected float32[8, 17]",
    ]
    opt_state = abstract(make_opt_state(1))._replace(step=struct["scale"])
    with pytest.raises(CheckpointError, match=r"opt_state\.step: stored int32\[\]"):
        open_checkpoint(tmp_path).restore(abstract(make_params(1)), opt_state)


def test_trees_that_cannot_be_saved_are_refused(tmp_path):
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        with pytest.raises(ValueError, match=r"opt_state\.count: expected an array"):
            save(checkpoints, 1, opt_state={"count": 3})
        twins = {"a": {"b": jnp.ones(1)}, "a.b": jnp.ones(1)}
        with pytest.raises(ValueError, match=r"params\.a\.b: two arrays"):
            save(checkpoints, 1, params=twins)
        with pytest.raises(TypeError, match="not JSON serializable"):
            save(checkpoints, 1, meta={"path": pathlib.Path("x")})
        with pytest.raises(ValueError, match=r"params\.empty: expected elements"):
            save(checkpoints, 1, params={"empty": jnp.zeros((0, 3))})
        save(checkpoints, 1)  # the refusals left nothing in the way


def test_the_data_of_another_process_count_is_explained(tmp_path):
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        save(checkpoints, 1)
    latest = open_checkpoint(tmp_path)
    params, opt_state = abstract(make_params(1)), abstract(make_opt_state(1))
    with pytest.raises(CheckpointError) as caught:
        latest.restore(params, opt_state, part=(0, 4))
    message = "no process_0-of-4.bin, only process_0-of-1.bin: a position in the data"
    assert caught.value.message.startswith(message)


def test_manifest_says_what_it_is(tmp_path):
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        save(checkpoints, 12)
    step = tmp_path / "00000012"
    manifest = json.loads((step / "MANIFEST.json").read_text())
    files = {str(p.relative_to(step)) for p in step.rglob("*") if p.is_file()}
    assert set(manifest["files"]) == files - {"MANIFEST.json"}
    assert manifest["files"]["data/process_0-of-1.bin"] == "11 bytes, crc32 724322b6"
    assert manifest["step"] == 12
    assert manifest["jax"] == jax.__version__
    assert manifest["arrays"]["params.wte.weight"] == "float32[8, 16]"
    assert manifest["arrays"]["opt_state.inner.1.0.mu.w"] == "bfloat16[8, 4]"


# ------------------------------------------------------------- who may write, and where


def test_a_second_trainer_is_refused_at_once(tmp_path):
    with Checkpoints(tmp_path, KEEP_ALL):
        start = time.monotonic()
        with pytest.raises(CheckpointError, match=rf"pid {os.getpid()} on .*, started"):
            Checkpoints(tmp_path, KEEP_ALL)
        assert time.monotonic() - start < PROMPTLY_SECONDS
    Checkpoints(tmp_path, KEEP_ALL).close()


@pytest.mark.parametrize("below", ["", "sub/dir"])
def test_a_path_through_a_file_is_refused_at_once(tmp_path, below):
    (tmp_path / "file").write_text("not a directory")
    start = time.monotonic()
    with pytest.raises(CheckpointError, match=r"[Nn]ot a directory"):
        Checkpoints(tmp_path / "file" / below, KEEP_ALL)
    assert time.monotonic() - start < PROMPTLY_SECONDS


@pytest.mark.skipif(not os.path.isdir("/proc/self"), reason="needs Linux's /proc")
def test_a_path_that_cannot_be_made_is_refused():
    with pytest.raises(CheckpointError, match="cannot write here"):
        Checkpoints("/proc/self/checkpoints", KEEP_ALL)


def test_a_directory_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    def read_only(descriptor):  # chmod would not stop root, who runs many containers
        raise OSError(30, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", read_only)
        with pytest.raises(CheckpointError, match=r"cannot write here.*Read-only"):
            Checkpoints(tmp_path, KEEP_ALL)
    Checkpoints(tmp_path, KEEP_ALL).close()  # and the lock was freed


def test_a_file_system_that_cannot_rename_folders_is_refused(tmp_path, monkeypatch):
    rename = os.rename

    def of_files_only(source, target):
        if os.path.isdir(source):
            raise OSError(38, "Function not implemented")  # as FUSE of a flat bucket
        rename(source, target)

    monkeypatch.setattr(os, "rename", of_files_only)
    with pytest.raises(CheckpointError, match="cannot rename a folder: Function not"):
        Checkpoints(tmp_path, KEEP_ALL)


def test_relative_paths_are_made_absolute(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Checkpoints("run/checkpoints", KEEP_ALL) as checkpoints:
        save(checkpoints, 1)
    assert (tmp_path / "run" / "checkpoints" / "00000001").is_dir()


def test_leftovers_of_a_killed_run_are_removed(tmp_path, caplog):
    for name in (".saving-00000004", ".deleting-00000002"):
        (tmp_path / name / "params").mkdir(parents=True)
    with caplog.at_level("INFO"), Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
        assert os.listdir(tmp_path) == [".lock"]
        assert checkpoints.latest_valid() is None
    for name in (".saving-00000004", ".deleting-00000002"):
        assert f"removing the unfinished {tmp_path / name}" in caplog.messages


# ------------------------------------------------------------------------ failing saves


def test_no_room_is_refused_before_anything_is_written(tmp_path, monkeypatch):
    with Checkpoints(tmp_path, CheckpointConfig(keep=2)) as checkpoints:
        save(checkpoints, 1)
        usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
        params = {"w": np.zeros(2**18, np.float32)}  # 1 MiB needs 1.1 MiB
        with pytest.raises(CheckpointError) as caught:
            save(checkpoints, 2, params=params, opt_state={"b": np.zeros(1)})
        assert "needs 0.00107 GiB and 0.000977 GiB are free" in caught.value.message
        assert "keep=2 needs room for 3" in caught.value.message
        assert checkpoints.steps() == [1]


@pytest.mark.parametrize("when", ["save", "wait", "close"])
def test_a_failure_in_the_background_is_raised_next(tmp_path, monkeypatch, when):
    def fail(*args, **kwargs):
        raise OSError(28, "No space left on device\n" + "specification\n" * 60)

    checkpoints = Checkpoints(tmp_path, KEEP_ALL)
    save(checkpoints, 1)
    with monkeypatch.context() as patch:
        patch.setattr(stored, "write_manifest", fail)
        save(checkpoints, 2, wait=False)
        concurrent_save = checkpoints._saving
        assert isinstance(concurrent_save.exception(), CheckpointError)
    action = {"save": lambda: save(checkpoints, 3)}.get(when) or getattr(
        checkpoints, when
    )
    with pytest.raises(CheckpointError) as caught:
        action()
    assert caught.value.message == (
        "cannot save step 2: OSError: [Errno 28] No space left on device"
    )
    if when == "close":  # which freed the directory all the same
        checkpoints = Checkpoints(tmp_path, KEEP_ALL)
    save(checkpoints, 4)
    assert checkpoints.steps() == [1, 4]
    checkpoints.close()
    assert not list(tmp_path.glob(".saving*"))


def test_a_failed_save_does_not_hide_the_first_error(tmp_path, monkeypatch, caplog):
    def fail(*args, **kwargs):
        raise OSError("disk on fire")

    monkeypatch.setattr(stored, "write_manifest", fail)

    def crash() -> None:
        with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:
            save(checkpoints, 1, wait=False)
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        crash()
    assert "disk on fire" in caplog.text


# ------------------------------------------------------------ in processes of their own


def run_python(program: str, *args: object) -> subprocess.Popen:
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": ""}
    root = str(pathlib.Path(stored.__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join(
        [root, environment.get("PYTHONPATH", "")]
    )
    return subprocess.Popen(
        [sys.executable, "-c", textwrap.dedent(program), *map(str, args)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


SAVE_FOREVER = """
    import sys
    import numpy as np
    from mpt_jax.config import CheckpointConfig
    from mpt_jax.training.checkpoints import Checkpoints

    with Checkpoints(sys.argv[1], CheckpointConfig(keep=2)) as checkpoints:
        for step in range(10**6):
            params = {"w": np.full(1 << 18, step, np.float32)}
            opt_state = {"step": np.full((), step, np.int32)}
            items = {"params": params, "opt_state": opt_state}
            checkpoints.save(step, **items, data=b"", meta={})
            print(step, flush=True)  # and step - 1 is finished
"""


def test_kill_9_leaves_only_finished_steps(tmp_path):
    with run_python(SAVE_FOREVER, tmp_path) as process:
        started = next((int(line) for line in process.stdout if int(line) > 3), None)
        time.sleep(0.02)  # into the next save
        process.send_signal(signal.SIGKILL)
        assert started is not None, process.stderr.read()
    with Checkpoints(tmp_path, KEEP_ALL) as checkpoints:  # the lock is free
        latest = checkpoints.latest_valid()
    assert latest.step >= started - 1
    struct = {"w": jax.ShapeDtypeStruct((1 << 18,), jnp.float32)}
    np.testing.assert_array_equal(
        latest.restore_params(struct)["w"], float(latest.step)
    )


FILL_THE_DISK = """
    import json, resource, sys
    import numpy as np
    from mpt_jax.config import CheckpointConfig
    from mpt_jax.errors import CheckpointError
    from mpt_jax.training.checkpoints import Checkpoints

    def save(step):
        w = np.random.default_rng(step).normal(size=1 << 18).astype(np.float32)
        items = {"params": {"w": w}, "opt_state": {"b": np.zeros(2)}}
        checkpoints.save(step, **items, data=b"", meta={}, wait=True)

    def limit(n_bytes):
        resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, resource.RLIM_INFINITY))

    with Checkpoints(sys.argv[1], CheckpointConfig(keep=2)) as checkpoints:
        save(1)
        limit(1 << 16)
        try:
            save(2)
        except CheckpointError as error:
            print(json.dumps(str(error)))
        limit(resource.RLIM_INFINITY)
        assert checkpoints.latest_valid().step == 1
        save(3)
        print(checkpoints.steps())
"""


def test_a_full_disk_is_survived_in_one_line(tmp_path):
    with run_python(FILL_THE_DISK, tmp_path) as process:
        output, errors = process.communicate()
    assert errors == ""  # not one of Orbax's tracebacks
    message, steps = map(json.loads, output.splitlines())
    assert message.startswith(f"{tmp_path}: cannot save step 2: ")
    assert "File too large" in message
    assert "\n" not in message
    assert steps == [1, 3]
