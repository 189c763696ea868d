"""Two or three processes in one: each Peers has its own thread and its own end."""

import contextlib
import json
import socket
import threading
import time

import pytest

from mpt_jax import errors
from mpt_jax.config import ProcessesConfig
from mpt_jax.runtime import Cluster
from mpt_jax.training import peers as module
from mpt_jax.training.peers import Peers

SOON = 10.0  # seconds: only a broken test waits so long
RUNS = {"optim.lr": "0.1"}


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as server:
        return server.getsockname()[1]


class Job:
    """``processes`` Peers; deaths: process -> exit code of those that ended."""

    def __init__(self, processes, *, arrival=30.0, silence=30.0):
        self.port, self.processes = free_port(), processes
        self.config = ProcessesConfig(arrival, silence)
        self.deaths, self.peers = {}, {}

    def peer(self, process):
        cluster = Cluster(f"127.0.0.1:{self.port}", self.processes, process)

        def die(code):
            self.deaths.setdefault(process, code)
            with contextlib.suppress(OSError):
                self.peers[process]._closed.set()

        self.peers[process] = Peers(cluster, self.config, die=die)
        return self.peers[process]

    def meet(self, runs=None):
        """Of each process what meet() raised, or None."""
        raised = {}

        def one(process, peer):
            try:
                raised[process] = peer.meet((runs or {}).get(process, RUNS))
            except errors.MptError as error:
                raised[process] = error

        pairs = [(i, self.peer(i)) for i in range(self.processes)]
        threads = [threading.Thread(target=one, args=pair) for pair in pairs]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(SOON)
        return raised

    def wait(self, condition):
        end = time.monotonic() + SOON
        while not condition():
            assert time.monotonic() < end, "timed out"
            time.sleep(0.01)

    def drop(self, process):
        """As the kernel does for a process that is killed."""
        peer = self.peers[process]
        peer._closed.set()
        peer._thread.join()
        peer._hang_up()

    def end(self):
        """What is left of it, for the next test."""
        for peer in self.peers.values():
            peer._closed.set()
            if peer._thread.is_alive():
                peer._thread.join()
            peer._hang_up()


@pytest.fixture
def new_job():
    with contextlib.ExitStack() as stack:

        def new(*args, **kwargs):
            job = Job(*args, **kwargs)
            stack.callback(job.end)
            return job

        yield new


@pytest.fixture(autouse=True)
def fast(monkeypatch):
    monkeypatch.setattr(module, "BEAT_SECONDS", 0.05)
    monkeypatch.setattr(module, "LOOK_SECONDS", 0.02)
    monkeypatch.setattr(module, "RETRY_SECONDS", 0.02)
    monkeypatch.setattr(module, "LINGER_SECONDS", 0.2)
    monkeypatch.setattr(module, "SEND_SECONDS", 0.5)


def close(job):
    threads = [threading.Thread(target=p.close) for p in job.peers.values()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    assert not any(thread.is_alive() for thread in threads)


def test_all_meet_and_part_in_order(new_job, capfd):
    job = new_job(3)
    assert job.meet() == {0: None, 1: None, 2: None}
    with socket.create_server(("127.0.0.1", job.port)):  # JAX can have it
        pass
    close(job)
    assert job.deaths == {}
    assert capfd.readouterr().err == ""


def test_one_process_is_alone():
    peers = Peers(None, ProcessesConfig())
    peers.meet(RUNS)
    peers.leave(1, "nobody hears it")
    peers.blame()
    peers.close()
    assert peers.behind() == ""


@pytest.mark.parametrize("lost", [0, 1])
def test_a_process_that_dies_ends_the_others_with_its_name(new_job, lost, capfd):
    job = new_job(3)
    job.meet()
    job.drop(lost)
    others = {0, 1, 2} - {lost}
    job.wait(lambda: set(job.deaths) == others)
    assert set(job.deaths.values()) == {errors.EXIT_PEER_LOST}
    said = capfd.readouterr().err.splitlines()
    name = job.peers[lost].name
    assert said == [f"{name} is lost: its connection closed; exit 76"] * 2


def test_a_silent_process_is_lost(new_job, capfd):
    job = new_job(2, silence=0.4)
    job.meet()
    job.peers[1]._closed.set()  # its thread stops: the connection stays
    job.wait(lambda: 0 in job.deaths)
    name = job.peers[1].name
    assert f"{name} is lost: silent for 0.4 s; exit 76\n" in capfd.readouterr().err


def test_a_process_that_says_nothing_new_is_not_lost(new_job):
    job = new_job(2, silence=0.4)
    job.meet()
    time.sleep(1.0)
    assert job.deaths == {}
    close(job)


@pytest.mark.parametrize(
    ("code", "others"), [(2, 2), (77, 77), (75, 75), (0, 0), (3, 76), (1, 76)]
)
def test_the_reason_of_one_is_told_to_all(new_job, code, others, capfd):
    job = new_job(3)
    job.meet()
    job.peers[2].leave(code, "config error: no such task")
    job.wait(lambda: len(job.deaths) >= 2)
    assert (job.deaths[0], job.deaths[1]) == (others, others)
    line = f"{job.peers[2].name} left, exit {code}: config error: no such task; exit"
    assert capfd.readouterr().err.count(f"{line} {others}\n") == 2


def test_who_is_behind_is_known_to_all(new_job):
    job = new_job(3)
    job.meet()
    for process, peer in job.peers.items():
        at = 6 if process == 1 else 7
        peer.where = lambda at=at: (at, f"last step {at}, reading")
    text = f"all wait for {job.peers[1].name} (last step 6, reading)"
    job.wait(lambda: all(p.behind() == text for p in job.peers.values()))
    job.peers[1].where = lambda: (7, "")
    job.wait(lambda: all(p.behind() == "" for p in job.peers.values()))
    close(job)


def test_those_that_do_not_come_are_named(new_job):
    job = new_job(4, arrival=0.5)
    raised = {}

    def come(process):
        with pytest.raises(errors.PeerError) as caught:
            job.peer(process).meet(RUNS)
        raised[process] = caught.value.message

    threads = [threading.Thread(target=come, args=(i,)) for i in (0, 2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(SOON)
    missing = f"2 of 4 processes: 1, 3 did not come to 127.0.0.1:{job.port} in 0.5 s"
    assert raised == {0: missing, 2: missing}


def test_without_process_0_the_others_give_up(new_job):
    job = new_job(2, arrival=0.2)
    with pytest.raises(errors.PeerError, match=r"1 of 2 processes: 0 .*refused"):
        job.peer(1).meet(RUNS)


def test_another_config_is_refused_on_all(new_job):
    raised = new_job(3).meet({2: {"optim.lr": "0.5"}})
    assert {type(error) for error in raised.values()} == {errors.ConfigError}
    text = "optim.lr: 0.1 for process 0, 0.5 for process 2 (host"
    assert all(text in str(error) for error in raised.values())


def test_the_same_process_twice_is_refused_and_the_first_goes_on(new_job):
    job = new_job(3)
    first, twin = job.peer(1), job.peer(1)
    threads = [
        threading.Thread(target=peer.meet, args=(RUNS,))
        for peer in (job.peer(0), first)
    ]
    for thread in threads:
        thread.start()
    job.wait(lambda: 1 in job.peers[0]._peers)
    with pytest.raises(errors.ConfigError, match=r"process 1 .* has come before"):
        twin.meet(RUNS)
    last = job.peer(2)
    last.meet(RUNS)
    for thread in threads:
        thread.join(SOON)
    job.peers[1] = first
    close(job)


def test_a_process_may_go_and_come_again_before_all_are_there(new_job):
    job = new_job(2)
    hub = threading.Thread(target=job.peer(0).meet, args=(RUNS,))
    hub.start()
    job.wait(lambda: _listens(job.port))
    early = _connect(job.port)
    early.sendall(json.dumps({"process": 1, "name": "x", "runs": RUNS}).encode())
    early.close()
    job.peer(1).meet(RUNS)
    hub.join(SOON)
    close(job)


@pytest.mark.parametrize(
    "noise", [b"GET / HTTP/1.1\r\n\r\n", b"[1]\n", b'{"process": 7}\n', b"[" * 10**6]
)
def test_a_stranger_is_sent_away(new_job, noise):
    job = new_job(2)
    hub = threading.Thread(target=job.peer(0).meet, args=(RUNS,))
    hub.start()
    job.wait(lambda: _listens(job.port))
    stranger = _connect(job.port)
    with contextlib.suppress(OSError):
        stranger.sendall(noise)
        stranger.settimeout(SOON)
        while stranger.recv(1000):
            pass
    stranger.close()
    job.peer(1).meet(RUNS)
    hub.join(SOON)
    assert not hub.is_alive()
    close(job)


def _connect(port):
    with contextlib.suppress(OSError):
        return socket.create_connection(("127.0.0.1", port))


def _listens(port):
    if connection := _connect(port):
        connection.close()
    return connection is not None


def test_a_port_in_use_is_said(new_job):
    job = new_job(2)
    with socket.create_server(("127.0.0.1", job.port)):
        with pytest.raises(errors.PeerError, match=f"{job.port}: cannot listen"):
            job.peer(0).meet(RUNS)
