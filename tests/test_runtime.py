"""What mpt_jax/runtime.py asks of XLA, and how it finds the processes of a job."""

import jax
import jax.numpy as jnp
import pytest

from mpt_jax import runtime
from mpt_jax.config import MeshConfig
from mpt_jax.errors import ConfigError
from mpt_jax.partitioning import make_mesh


def test_xla_knows_every_option_of_this_platform():
    options = runtime.compiler_options(make_mesh(MeshConfig()))
    assert options == runtime.COMPILER_OPTIONS["cpu"]
    jax.jit(lambda x: x + 1, compiler_options=options).lower(jnp.ones(2)).compile()


def test_xla_knows_every_option_of_a_gpu():
    """Its names are XLA's on every platform; a misspelt one is refused."""
    options = runtime.COLLECTIVE_OPTIONS["gpu"]
    jax.jit(lambda x: x + 1, compiler_options=options).lower(jnp.ones(2)).compile()
    bad = {name + "s": value for name, value in options.items()}
    with pytest.raises(Exception, match="No such compile option"):
        jax.jit(lambda x: x + 2, compiler_options=bad).lower(jnp.ones(2)).compile()


def test_compiled_programs_are_kept_while_asked_for(tmp_path):
    before = jax.config.jax_compilation_cache_dir
    seconds = jax.config.jax_persistent_cache_min_compile_time_secs
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0)
    try:
        with runtime.compilation_cache(tmp_path / "compiled"):
            jax.jit(lambda x: x * 3 + 1)(jnp.ones(3)).block_until_ready()
        assert len(list((tmp_path / "compiled").glob("*-cache"))) >= 1
        assert jax.config.jax_compilation_cache_dir == before
        with runtime.compilation_cache(""):
            assert jax.config.jax_compilation_cache_dir == before
    finally:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", seconds)


# ------------------------------------------------------------------------- processes

SLURM = {
    "SLURM_JOB_ID": "8000",
    "SLURM_STEP_NODELIST": "node[007-009]",
    "SLURM_NTASKS": "6",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
}


OPEN_MPI = {
    "OMPI_MCA_orte_hnp_uri": "1531576320.0;tcp://10.96.0.1,10.148.0.1:34911",
    "OMPI_VERSION": "4.1.6",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
}
TPU_PODS = {  # the second of two slices, and of its three hosts the last
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_WORKER_HOSTNAMES": "host-3,host-4,host-5",
    "TPU_WORKER_ID": "2",
    "MEGASCALE_COORDINATOR_ADDRESS": "127.0.0.1:8080",
    "MEGASCALE_NUM_SLICES": "2",
    "MEGASCALE_SLICE_ID": "1",
}
ON_TPU = "jax._src.clusters.cloud_tpu_cluster.running_in_cloud_tpu_vm"


@pytest.fixture(autouse=True)
def alone(monkeypatch):
    """No scheduler and no variables, whatever the machine of the tests is."""
    for name in (*SLURM, *OPEN_MPI, *TPU_PODS, *runtime.VARIABLES.values()):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(ON_TPU, False)


def flags(coordinator=None, processes=None, process=None):
    return {"coordinator": coordinator, "processes": processes, "process": process}


def test_without_a_word_a_process_is_alone():
    assert runtime.find_cluster({}) is None


def test_flags_say_it_and_the_environment_says_the_rest(monkeypatch):
    found = runtime.find_cluster(flags("10.0.0.1:1234", "4", "3"))
    assert found == runtime.Cluster("10.0.0.1:1234", 4, 3)
    monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "10.0.0.1:1234")
    monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
    monkeypatch.setenv("JAX_PROCESS_ID", "3")
    assert runtime.find_cluster({}) == found
    assert runtime.find_cluster(flags(process="0")).process == 0


def test_slurm_says_it_all(monkeypatch):
    for name, value in SLURM.items():
        monkeypatch.setenv(name, value)
    found = runtime.find_cluster({})
    host, port = found.address
    assert (host, found.processes, found.process) == ("node007", 6, 4)
    assert 61440 <= port < 65536
    assert found.local_devices == (1,)
    # An interactive shell of such a job: one process, whatever the variables say.
    assert runtime.find_cluster(flags(processes="1")) is None
    monkeypatch.setenv("SLURM_NTASKS", "1")
    assert runtime.find_cluster({}) is None


def test_open_mpi_says_it_all(monkeypatch):
    for name, value in OPEN_MPI.items():
        monkeypatch.setenv(name, value)
    found = runtime.find_cluster({})
    host, port = found.address
    assert (host, found.processes, found.process) == ("10.96.0.1", 2, 1)
    assert 61440 <= port < 65536
    assert found.local_devices == (1,)


def test_tpu_pods_of_several_slices_say_it_all(monkeypatch):
    for name, value in TPU_PODS.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(ON_TPU, True)
    found = runtime.find_cluster({})
    assert (found.address[0], found.processes, found.process) == ("127.0.0.1", 6, 5)
    assert found.local_devices is None  # all chips of the host


def test_a_scheduler_that_does_not_say_it_is_named(monkeypatch):
    for name, value in OPEN_MPI.items():
        monkeypatch.setenv(name, value)
    monkeypatch.delenv("OMPI_COMM_WORLD_RANK")
    with pytest.raises(ConfigError) as caught:
        runtime.find_cluster({})
    error = str(caught.value)
    assert error.startswith("scheduler ompi: KeyError: 'OMPI_COMM_WORLD_RANK'; say it")
    assert error.endswith("with --coordinator --processes --process")


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (flags("host:1", "2"), "--process: needed, too"),
        (flags(process="1"), "--coordinator and --processes: needed, too"),
        (flags("host:1", "2", "2"), "0 <= process < processes, got"),
        (flags("host:1", "2", "-1"), "process=-1"),
        (flags("host", "2", "0"), "coordinator=host"),
        (flags(":1", "2", "0"), "expected HOST:PORT"),
        (flags("host:1", "two", "0"), "processes=two"),
    ],
)
def test_half_a_cluster_is_refused(given, message):
    with pytest.raises(ConfigError) as caught:
        runtime.find_cluster(given)
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("coordinator", "address", "loopback"),
    [
        ("127.0.0.1:80", ("127.0.0.1", 80), True),
        ("localhost:80", ("localhost", 80), True),
        ("[::1]:80", ("::1", 80), True),
        ("10.0.0.1:80", ("10.0.0.1", 80), False),
        ("node-1.internal:80", ("node-1.internal", 80), False),
    ],
)
def test_only_this_machine_is_loopback(coordinator, address, loopback):
    cluster = runtime.Cluster(coordinator, 2, 0)
    assert (cluster.address, cluster.loopback) == (address, loopback)


@pytest.mark.parametrize(
    ("coordinator", "bound"),
    [("127.0.0.1:80", "127.0.0.1:80"), ("[::1]:80", "[::1]:80"), ("node-1:80", None)],
)
def test_jax_listens_no_wider_than_it_must(monkeypatch, coordinator, bound):
    """What it does without a word: on every interface, also for 127.0.0.1."""
    told = {}
    monkeypatch.setattr(jax.distributed, "initialize", lambda *_, **k: told.update(k))
    preemption = jax.config.jax_enable_preemption_service
    try:
        runtime.connect(runtime.Cluster(coordinator, 2, 0))
        assert told["coordinator_bind_address"] == bound
        assert not jax.config.jax_enable_preemption_service
    finally:
        jax.config.update("jax_enable_preemption_service", preemption)
