"""Real trainers as child processes: started, broken, restarted and compared.

What a fault must not change is the curve: the loss of every step and the validation
loss at the end, as hex floats, so that equal means equal in every bit.
"""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import pathlib
import random
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from mpt_jax.data import prepared
from mpt_jax.training.writers import Record, read_metrics

HERE = pathlib.Path(__file__).parent
ROOT = HERE.parents[1]
TRAIN = ("-m", "mpt_jax.train")
SPOILED = (str(HERE / "spoiled.py"),)
TIMEOUT = 300.0  # seconds: only a broken trainer is waited for so long
LISTEN = "0A"  # a state in /proc/net/tcp
POLL = 0.002  # seconds: a tenth of the shortest thing that is waited for


def patience() -> float:
    """How much longer than on a quiet machine something may take, by the clock.

    A trainer wants two cores, hence 1 up to a load of one process a core.
    """
    return max(1.0, 2 * os.getloadavg()[0] / (os.cpu_count() or 1))


class Trainer:
    """A running trainer; its output goes to ``log``."""

    def __init__(
        self,
        command: list[str],
        workdir: pathlib.Path,
        *,
        devices: int = 1,
        log: str = "",
        **streams: Any,
    ):
        self.workdir = workdir
        self.log = workdir.with_name(log or f"{workdir.name}.log")
        environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "JAX_NUM_CPU_DEVICES": str(devices),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
        }
        with open(self.log, "ab") as log:
            self._start = log.tell()
            self.process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=environment,
                stdin=subprocess.DEVNULL,
                **{"stdout": log, "stderr": log, **streams},
            )

    @property
    def pid(self) -> int:
        return self.process.pid

    def output(self) -> str:
        """What this trainer said, and not those before it in the same directory."""
        return self.log.read_bytes()[self._start :].decode(errors="replace")

    def until(self, condition: Callable[[], Any], what: str) -> None:
        """Returns once ``condition()`` holds; the trainer must live until then."""
        end = time.monotonic() + TIMEOUT
        while not condition():
            if self.process.poll() is not None:
                raise AssertionError(
                    f"exit {self.process.returncode} before {what}:\n{self.output()}"
                )
            if time.monotonic() > end:
                raise AssertionError(f"{TIMEOUT:g} s without {what}:\n{self.output()}")
            time.sleep(POLL)

    def signal(self, number: signal.Signals) -> None:
        self.process.send_signal(number)

    def kill(self) -> None:
        """SIGKILL; returns when the process is gone."""
        self.process.kill()
        self.process.wait()

    def finish(self, code: int = 0) -> str:
        """Waits for the end, which must be exit ``code``; returns the output."""
        try:
            found = self.process.wait(TIMEOUT)
        except subprocess.TimeoutExpired:
            self.kill()
            raise AssertionError(f"{TIMEOUT:g} s later:\n{self.output()}") from None
        assert found == code, f"exit {found}, expected {code}:\n{self.output()}"
        return self.output()


def free_port() -> int:
    """Below those that connections are given: one of them may take such a port."""
    while True:
        port = random.randrange(10_000, 30_000)
        with (
            contextlib.suppress(OSError),
            socket.create_server(("127.0.0.1", port)),
        ):
            return port


def listening(pid: int) -> list[ipaddress.IPv4Address | ipaddress.IPv6Address]:
    """The addresses at which a process takes connections; Linux only."""
    process, sockets, found = pathlib.Path(f"/proc/{pid}"), set(), []
    for descriptor in (process / "fd").iterdir():
        with contextlib.suppress(OSError):  # closed meanwhile
            sockets.add(os.readlink(descriptor))
    for table in ("tcp", "tcp6"):
        for line in (process / "net" / table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == LISTEN and f"socket:[{fields[9]}]" in sockets:
                words = bytes.fromhex(fields[1].partition(":")[0])
                packed = [words[i : i + 4][::-1] for i in range(0, len(words), 4)]
                found.append(ipaddress.ip_address(b"".join(packed)))
    return [getattr(address, "ipv4_mapped", None) or address for address in found]


class Lab:
    """Directories, one compilation cache and shared reference runs below ``root``."""

    def __init__(self, root: pathlib.Path):
        self.root = root
        self._trainers: list[Trainer] = []
        self._locks: dict[str, threading.Lock] = {}
        self._guard = threading.Lock()

    def start(
        self,
        name: str | pathlib.Path,
        kind: str,
        *flags: str,
        program: tuple[str, ...] = TRAIN,
        prefix: tuple[str, ...] = (),
        **streams: Any,
    ) -> Trainer:
        """A trainer of config ``kind`` in the directory ``name``.

        Args:
          flags: of the command line; "steps=9" stands for "--config.steps=9".
          prefix: a command that runs the trainer, such as a shell with a ulimit.
          streams: stdout, stderr, as subprocess has them; devices, log of Trainer.
        """
        workdir = self.root / name
        if kind == "stored":
            flags = (f"data.prepared={self.prepared()}", *flags)
        overrides = [f if f.startswith("--") else f"--config.{f}" for f in flags]
        command = [
            *prefix,
            sys.executable,
            *program,
            f"--config={HERE / 'config.py'}:{kind}",
            f"--workdir={workdir}",
            f"--config.compilation_cache={self.root / 'compiled'}",
            f"--config.data.cache_dir={self.root / 'tokenizer'}",
            *overrides,
        ]
        return self.watch(Trainer(command, workdir, **streams))

    def watch(self, trainer: Trainer) -> Trainer:
        """close() will end it."""
        self._trainers.append(trainer)
        return trainer

    def run(self, name: str, kind: str, *flags: str, code: int = 0, **more: Any) -> str:
        """start() and finish()."""
        return self.start(name, kind, *flags, **more).finish(code)

    def start_job(
        self,
        name: str,
        kind: str,
        *flags: str,
        processes: int,
        devices: int = 2,
        only: Sequence[int] | None = None,
        **more: Any,
    ) -> list[Trainer]:
        """The processes of a job, each with so many devices. only: start just these."""
        port = free_port()
        return [
            self.start(
                name,
                kind,
                f"--coordinator=127.0.0.1:{port}",
                f"--processes={processes}",
                f"--process={i}",
                *flags,
                devices=devices,
                log=f"{name}-{i}.log",
                **more,
            )
            for i in (range(processes) if only is None else only)
        ]

    def run_job(self, name: str, kind: str, *flags: str, **more: Any) -> list[str]:
        """start_job() and finish() of each; what they said."""
        return [job.finish() for job in self.start_job(name, kind, *flags, **more)]

    def reference(
        self,
        kind: str,
        *flags: str,
        program: tuple[str, ...] = TRAIN,
        processes: int = 1,
        devices: int = 1,
    ) -> pathlib.Path:
        """The directory of an unbroken run; the first who asks makes it."""
        parts = ["reference", kind, pathlib.Path(program[-1]).stem, *flags]
        if (processes, devices) != (1, 1):
            parts.append(f"{processes}x{devices}")
        name = "-".join(parts).replace("--", "")
        with self._guard:
            lock = self._locks.setdefault(name, threading.Lock())
        with lock:
            workdir = self.root / name
            if not (workdir / "done").exists():
                more = {"program": program, "devices": devices}
                if processes > 1:
                    self.run_job(name, kind, *flags, processes=processes, **more)
                else:
                    self.run(name, kind, *flags, **more)
                (workdir / "done").touch()
            return workdir

    def prepared(self, name: str = "prepared", *, seed: int = 0) -> pathlib.Path:
        """A prepared folder of ids that ``seed`` makes; the first who asks makes it."""
        root = self.root / name
        with self._guard:
            if not root.exists():
                write_prepared(root, seed)
        return root

    def copy(self, reference: pathlib.Path, name: str) -> pathlib.Path:
        return pathlib.Path(shutil.copytree(reference, self.root / name))

    def close(self) -> None:
        for trainer in self._trainers:
            if trainer.process.poll() is None:
                trainer.signal(signal.SIGCONT)
                trainer.kill()
        shutil.rmtree(self.root)


def write_prepared(root: pathlib.Path, seed: int, *, spoiled: int = 1) -> None:
    """Two sources of 40 documents in two shards; of 257 ids, the last one is EOS.

    spoiled: the id that the last document of each shard begins with.
    """
    rng, shards = np.random.default_rng(seed), {}

    def documents() -> Iterator[np.ndarray]:
        for i in range(20):
            ids = np.append(rng.integers(0, 256, 500), 256)
            if i == 19:
                ids[0] = spoiled
            yield ids

    for name in ("low", "high"):
        shards[name] = {
            split: tuple(
                prepared.write_shard(
                    root, f"{name}/{split}-{i:05d}-of-{n:05d}", documents(),
                    dtype="<u2",
                )
                for i in range(n)
            )
            for split, n in (("train", 2), ("validation", 1))
        }  # fmt: skip
    about = {"name": "bytes", "fingerprint": "bytes", "vocab_size": 257, "eos_id": 256}
    prepared.write_manifest(root, prepared.Manifest("<u2", about, {}, shards, {}))


# ------------------------------------------------------------------ what a run leaves


def records(workdir: pathlib.Path) -> list[Record]:
    """Of metrics.jsonl; none while there is no such file."""
    with contextlib.suppress(FileNotFoundError):
        return list(read_metrics(workdir / "metrics.jsonl"))
    return []


def last_step(workdir: pathlib.Path) -> int:
    return max((record["step"] for record in records(workdir)), default=0)


def curve(workdir: pathlib.Path) -> dict[str, str]:
    """The loss of each step, in order, and the validation loss, as hex floats."""
    found = records(workdir)
    losses = [(r["step"], r["loss"].hex()) for r in found if "loss" in r]
    steps = [step for step, _ in losses]
    assert steps == list(range(1, len(steps) + 1)), f"lost or repeated steps: {steps}"
    ends = [r["validation_loss"].hex() for r in found if "validation_loss" in r]
    assert len(ends) == 1, f"{len(ends)} validation losses"
    return {**{f"step {step}": loss for step, loss in losses}, "end": ends[0]}


def equal_curves(workdir: pathlib.Path, reference: pathlib.Path) -> str:
    """Asserts that they are, in every bit; returns how many losses that are."""
    found, expected = curve(workdir), curve(reference)
    different = [at for at in expected if found.get(at) != expected[at]]
    assert not different, f"other losses than without the fault: {different}"
    assert found == expected
    return f"{len(expected)} of {len(expected)}"


def checkpoints(workdir: pathlib.Path) -> pathlib.Path:
    return workdir / "checkpoints"


def unfinished(workdir: pathlib.Path) -> list[pathlib.Path]:
    """The saves under way, or left over; [] between two."""
    with contextlib.suppress(FileNotFoundError):
        found = [p for p in checkpoints(workdir).iterdir() if ".saving-" in p.name]
        return [path for path in found if "probe" not in path.name]
    return []


def steps(workdir: pathlib.Path) -> list[int]:
    """Finished checkpoints, ascending."""
    with contextlib.suppress(FileNotFoundError):
        names = [path.name for path in checkpoints(workdir).iterdir()]
        return sorted(int(name) for name in names if name.isdecimal())
    return []


def checkpoint(workdir: pathlib.Path, step: int) -> pathlib.Path:
    return checkpoints(workdir) / f"{step:08d}"


def arrays(step: pathlib.Path) -> dict[str, Any]:
    """Every array of a checkpoint that is intact, by its path ("params.wte.weight")."""
    import jax
    from orbax.checkpoint import v1 as ocp

    from mpt_jax.training.stored import open_checkpoint

    open_checkpoint(step)
    here = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    stored = ocp.checkpointables_metadata(step).metadata
    tree = jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here),
        {item: stored[item] for item in ("params", "opt_state")},
    )
    leaves = jax.tree.leaves_with_path(ocp.load_checkpointables(step, tree))
    name = jax.tree_util.keystr
    return {name(key, simple=True, separator="."): leaf for key, leaf in leaves}


def files(directory: pathlib.Path) -> dict[str, bytes]:
    """Content of every file below, to see whether anything changed."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file() and path.name != ".lock"
    }


def weights_file(step: pathlib.Path) -> pathlib.Path:
    """The file that holds the parameters of a checkpoint."""
    found = [path for path in (step / "params").rglob("*") if path.is_file()]
    return max(found, key=lambda path: path.stat().st_size)


# -------------------------------------------------------------------------- the faults


@dataclasses.dataclass(frozen=True)
class Fault:
    """A way to break a trainer.

    inject gets a Lab and the directory of an unbroken run (of config ``kind``, with
    ``flags``); it returns what it measured, or raises.
    """

    id: str
    text: str
    kind: str
    inject: Callable[[Lab, pathlib.Path], dict[str, Any]]
    flags: tuple[str, ...] = ()
    program: tuple[str, ...] = TRAIN
    slow: bool = False
    processes: int = 1
    devices: int = 1

    def reference(self, lab: Lab) -> pathlib.Path:
        return lab.reference(
            self.kind,
            *self.flags,
            program=self.program,
            processes=self.processes,
            devices=self.devices,
        )


class Faults(dict[str, Fault]):
    """Those of a module, by id; a decorator of their inject functions."""

    def __call__(self, name: str, text: str, kind: str, **options: Any) -> Callable:
        def register(inject: Callable) -> Callable:
            self[name] = Fault(name, text, kind, inject, **options)
            return inject

        return register


@dataclasses.dataclass(frozen=True)
class Result:
    fault: Fault
    seconds: float
    detail: dict[str, Any]
    error: BaseException | None = None

    def line(self) -> dict[str, Any]:
        """What is printed, as one line of JSON."""
        return {
            "id": self.fault.id,
            "fault": self.fault.text,
            "passed": self.error is None,
            "seconds": round(self.seconds, 1),
            "detail": self.detail,
        }


def inject(fault: Fault, lab: Lab) -> Result:
    began = time.monotonic()
    detail, error = {}, None
    try:
        reference = fault.reference(lab)
        began = time.monotonic()
        detail = fault.inject(lab, reference)
    except BaseException as caught:
        error = caught
    return Result(fault, time.monotonic() - began, detail, error)


@contextlib.contextmanager
def frozen(trainer: Trainer) -> Iterator[None]:
    """Stopped inside: alive, but it does nothing."""
    trainer.signal(signal.SIGSTOP)
    try:
        yield
    finally:
        trainer.signal(signal.SIGCONT)
