"""The machine below a program: its processes, XLA's options, compiled programs kept."""

from __future__ import annotations

import contextlib
import dataclasses
import ipaddress
import os
import sys
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from mpt_jax.errors import ConfigError

if TYPE_CHECKING:
    from jax._src.clusters import ClusterEnv
    from jax.sharding import Mesh

# XLA options of the training step by platform of its mesh; others take the defaults.
COMPILER_OPTIONS: dict[str, dict[str, bool | int]] = {
    # Sees that a donated buffer's last reader comes before its writer, so parameters
    # and moments are updated in place: 0.45 instead of 0.75 s, 0.3 GiB less, for 125M.
    "cpu": {"xla_cpu_copy_insertion_use_region_analysis": True},
}


# And those for programs whose devices exchange something. None for TPUs: on v5e the
# flags that others set for asynchronous collectives change none of the step, and those
# that do on v5p and v6e nobody has run yet: they are in launch/.
COLLECTIVE_OPTIONS: dict[str, dict[str, bool | int]] = {
    "gpu": {
        # Off by default: without it a layer's matmuls wait for its parameters.
        "xla_gpu_enable_latency_hiding_scheduler": True,
        # NCCL needs tens of MB a call to fill its links, and a layer's gathers are a
        # few MB each. Source: the GPU performance tips of JAX's documentation.
        "xla_gpu_all_gather_combine_threshold_bytes": 2**27,
        "xla_gpu_reduce_scatter_combine_threshold_bytes": 2**27,
        "xla_gpu_all_reduce_combine_threshold_bytes": 2**27,
    },
}


def compiler_options(mesh: Mesh) -> dict[str, bool | int]:
    """The options for programs on ``mesh``, whose devices need not be attached."""
    platform = mesh.devices.flat[0].platform
    several = COLLECTIVE_OPTIONS.get(platform, {}) if mesh.size > 1 else {}
    return COMPILER_OPTIONS.get(platform, {}) | several


@contextlib.contextmanager
def compilation_cache(directory: str | os.PathLike[str]) -> Iterator[None]:
    """Keeps compiled programs in ``directory`` inside; "" leaves JAX's own setting.

    Of several processes the first one writes. A file torn by a crash is compiled again.
    """
    import jax
    from jax.experimental.compilation_cache import compilation_cache as cache

    if not directory:
        yield
        return
    before = jax.config.jax_compilation_cache_dir
    jax.config.update("jax_compilation_cache_dir", os.fspath(directory))
    try:
        yield
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
        cache.reset_cache()


# ------------------------------------------------------------------------- processes

# The schedulers whose variables say all that there is to know (JAX's names of them).
# Kubernetes without TPUs is left out: its detection asks the cluster's API server.
SCHEDULERS = ("gcetpu", "gketpu", "slurm", "ompi")
VARIABLES = {
    "coordinator": "JAX_COORDINATOR_ADDRESS",
    "processes": "JAX_NUM_PROCESSES",
    "process": "JAX_PROCESS_ID",
}
# Every process has said that it is there (training/peers.py) when JAX connects them;
# what is left takes a second.
CONNECT_SECONDS = 60


@dataclasses.dataclass(frozen=True)
class Cluster:
    """The processes of a job, of which this is one.

    coordinator: HOST:PORT of process 0. local_devices: those of this process, where it
    shares its host with others.
    """

    coordinator: str
    processes: int
    process: int
    local_devices: tuple[int, ...] | None = None

    @property
    def address(self) -> tuple[str, int]:
        host, _, port = self.coordinator.rpartition(":")
        return host.strip("[]"), int(port)

    @property
    def loopback(self) -> bool:
        """Whether all of it is on this machine, and nobody else need see it."""
        host = self.address[0]
        try:
            return ipaddress.ip_address(host).is_loopback
        except ValueError:
            return host == "localhost"


def find_cluster(
    flags: Mapping[str, str | None], *, seconds: float = 300
) -> Cluster | None:
    """The job that this process is one of; None where it is alone.

    What ``flags`` do not say (coordinator, processes, process) the environment does,
    under JAX's names; without either, a scheduler that JAX knows: Cloud TPU, SLURM,
    Open MPI. One process of one is alone whoever says so: nothing is started for it.

    Args: seconds: until the scheduler must have given process 0's host a name.
    Raises: ConfigError: some of the three are missing, or impossible, or a scheduler
      does not tell them.
    """
    given = {
        name: flags.get(name) or os.environ.get(variable)
        for name, variable in VARIABLES.items()
    }
    if given["processes"] == "1":
        return None
    if not any(given.values()):
        return _scheduled(seconds)
    if missing := [f"--{name}" for name, value in given.items() if not value]:
        raise ConfigError([f"{' and '.join(missing)}: needed, too; see --help"])
    try:
        cluster = Cluster(
            given["coordinator"], int(given["processes"]), int(given["process"])
        )
        ok = cluster.address[0] and 0 <= cluster.process < cluster.processes
    except ValueError:
        ok = False
    if not ok:
        told = ", ".join(f"{name}={value}" for name, value in given.items())
        message = "expected HOST:PORT and 0 <= process < processes, got "
        raise ConfigError([message + told])
    return cluster


def _scheduled(seconds: float) -> Cluster | None:
    from jax._src.clusters import ClusterEnv  # JAX's detection has no public name

    for kind in ClusterEnv._cluster_types:
        if kind.name in SCHEDULERS and kind.is_env_present():
            break
    else:
        return None
    try:
        return _told_by(kind, seconds)
    except (KeyError, RuntimeError, ValueError) as error:
        flags = " ".join(f"--{name}" for name in VARIABLES)
        problem = f"{type(error).__name__}: {error}; say it with {flags}"
        raise ConfigError([problem], location=f"scheduler {kind.name}") from None


def _told_by(kind: type[ClusterEnv], seconds: float) -> Cluster | None:
    if (processes := kind.get_process_count()) == 1:
        return None
    port = os.environ.get("JAX_COORDINATOR_PORT")
    address = kind.get_coordinator_address(int(seconds), port)
    # On a TPU host one process has all chips; elsewhere a scheduler starts one for each
    # device (what JAX assumes, too).
    local = None if "tpu" in kind.name else kind.get_local_process_id()
    devices = None if local is None else (local,)
    return Cluster(address, processes, kind.get_process_id(), devices)


def connect(cluster: Cluster) -> None:
    """Makes the devices of all processes one machine; before any other use of JAX.

    JAX's own notice of SIGTERM stays off: it would take the signal from training/stop,
    and with it the way to end a process that compiles or waits.
    """
    import jax

    jax.config.update("jax_enable_preemption_service", False)
    jax.distributed.initialize(
        cluster.coordinator,
        cluster.processes,
        cluster.process,
        local_device_ids=cluster.local_devices,
        cluster_detection_method="deactivate",
        initialization_timeout=CONNECT_SECONDS,
        # Where this is not said, JAX listens on every interface, also for 127.0.0.1.
        coordinator_bind_address=cluster.coordinator if cluster.loopback else None,
        shutdown_timeout_seconds=CONNECT_SECONDS,
    )


def connected() -> bool:
    """Whether this process is one of a job."""
    jax = sys.modules.get("jax")
    return jax is not None and jax.distributed.is_initialized()


def disconnect() -> None:
    """At an orderly end, which all processes have reached; else their exits wait."""
    if connected():
        import jax

        jax.distributed.shutdown()
