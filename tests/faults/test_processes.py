"""Breaks one process of several: the others notice, name it, leave, and come again.

As in test_faults.py, a fault that is survived leaves every loss as it is without it, in
every bit where mesh and processes are the same.
"""

import functools
import os
import random
import re
import shutil
import signal
import time

import numpy as np

from mpt_jax import errors
from tests.faults import harness
from tests.faults.harness import (
    SPOILED,
    checkpoint,
    curve,
    equal_curves,
    last_step,
    listening,
    records,
    steps,
)

fault = FAULTS = harness.Faults()
AT_ONCE = 1  # each is several trainers
DETECTION_SECONDS = 5.0  # from a process's end to the others'
# float32 sums in another order, over 24 steps that amplify it.
MESH_RTOL = 2e-6
FLOAT64_RTOL = 1e-12


def test_fault(fault, survived):
    survived(fault)


def named(process, trainer):
    return rf"process {process} \(host \S+, pid {trainer.pid}\)"


def leave(trainers, code):
    """What the others said; each must leave soon, with ``code``. And how soon."""
    began = time.monotonic()
    said = [trainer.finish(code) for trainer in trainers]
    seconds = time.monotonic() - began
    assert seconds < DETECTION_SECONDS * harness.patience()
    return said, round(seconds, 2)


def recover(lab, fault_name, reference, job, **more):
    """Starts all again, as supervisors do, and compares what they learned."""
    workdir, killed = job[0].workdir, time.time()
    newest, reached = steps(workdir)[-1], last_step(workdir)
    said = lab.run_job(fault_name, "steady", processes=len(job), **more)
    assert f"resumed from {checkpoint(workdir, newest)}\n" in said[0]
    again = [r["wall_time"] for r in records(workdir) if r["step"] > newest]
    return {
        "steps_lost": reached - newest,
        "recovery_seconds": round(again[0] - killed, 1),
        "equal_losses": equal_curves(workdir, reference),
    }


# ---------------------------------------------------------------------------- signals


@fault("F08", "SIGTERM to one process of two", "steady", processes=2, devices=2)
def _(lab, reference):
    return preempt(lab, reference, "F08", processes=2)


@fault("F08-4", "SIGTERM to one process of four; to all", "steady", slow=True,
       processes=4, devices=2)  # fmt: skip
def _(lab, reference):
    return {
        "one": preempt(lab, reference, "F08-one", processes=4),
        "all": preempt(lab, reference, "F08-all", processes=4, victims=range(4)),
    }


def preempt(lab, reference, name, *, processes, victims=(1,)):
    # No save is due: that there is one is the signal's doing.
    job = lab.start_job(
        name, "steady", "checkpoint.every_steps=99", processes=processes
    )
    workdir = job[0].workdir
    job[0].until(lambda: last_step(workdir) >= 4, "step 4")
    reached_from = [listening(trainer.pid) for trainer in job]
    began = time.monotonic()
    for i in victims:
        job[i].signal(signal.SIGTERM)
        job[i].signal(signal.SIGTERM)  # from the machine, and from a supervisor
    said = [trainer.finish(errors.EXIT_OK) for trainer in job]
    seconds = time.monotonic() - began
    saved = last_step(workdir)
    assert saved < last_step(reference), "too late: it has finished"
    assert steps(workdir) == [saved]
    assert reached_from[0], "the coordinator is there"
    assert all(a.is_loopback for found in reached_from for a in found), reached_from
    for i, text in enumerate(said):
        who = "SIGTERM" if i in victims else "another process was stopped"
        assert (f"{who}: saved step {saved};" in text) == (i == 0)
    lab.run_job(name, "steady", processes=processes)
    return {
        "saved": saved,
        "seconds": round(seconds, 1),
        "equal_losses": equal_curves(workdir, reference),
    }


@fault("F08-early", "SIGTERM before there is a step: waiting, starting, compiling",
       "tiny", slow=True)  # fmt: skip
def _(lab, reference):
    """Nothing is saved as there is nothing; the job leaves at once, with 0."""
    waits = lab.start_job("F08-waits", "tiny", processes=2, only=[1])[0]
    waits.until(lambda: "waiting for process 0" in waits.output(), "its wait")
    seconds = {"waiting": end_early([waits], waits)}
    starting = lab.start_job("F08-starts", "tiny", processes=2)
    starting[1].until(lambda: "Gloo" in starting[1].output(), "JAX's own start")
    seconds["starting"] = end_early(starting, starting[1])
    compiling = lab.start_job(
        "F08-compiles", "tiny", "compilation_cache=", "model.scan_layers=false",
        "model.n_layers=12", processes=2,
    )  # fmt: skip
    compiling[0].until(lambda: "in the same order" in compiling[0].output(), "data")
    seconds["compiling"] = end_early(compiling, compiling[1])
    return {"seconds": seconds}


def end_early(job, victim):
    victim.signal(signal.SIGTERM)
    _, seconds = leave(job, errors.EXIT_OK)
    assert last_step(victim.workdir) == 0
    assert not steps(victim.workdir)
    return seconds


# ------------------------------------------------------------------------- a lost one


@fault("F09", "SIGKILL to process 1 of two", "steady", processes=2, devices=2)
def _(lab, reference):
    return kill_one(lab, reference, "F09", victim=1)


@fault("F10", "SIGKILL to process 0, the coordinator, of two", "steady", slow=True,
       processes=2, devices=2)  # fmt: skip
def _(lab, reference):
    return kill_one(lab, reference, "F10", victim=0)


@fault("F10-4", "SIGKILL to process 2 of four", "steady", slow=True, processes=4,
       devices=2)  # fmt: skip
def _(lab, reference):
    return kill_one(lab, reference, "F10-4", victim=2, processes=4)


def kill_one(lab, reference, name, *, victim, processes=2):
    job = lab.start_job(name, "steady", processes=processes)
    workdir = job[0].workdir
    job[0].until(lambda: steps(workdir) and last_step(workdir) >= 14, "step 14")
    job[victim].kill()
    others = [trainer for trainer in job if trainer is not job[victim]]
    said, seconds = leave(others, errors.EXIT_PEER_LOST)
    for text in said:
        lost = rf"^{named(victim, job[victim])} is lost: its connection closed; exit 76"
        assert re.search(lost, text, re.MULTILINE), text
    return {"detection_seconds": seconds} | recover(lab, name, reference, job)


@fault("F09-supervised", "five SIGKILLs to one process or the other, --supervise",
       "steady", slow=True, processes=2, devices=2)  # fmt: skip
def _(lab, reference):
    """Nobody starts anything again by hand; every sample counts once."""
    rng, interval = random.Random(9), 4
    flags = (
        "--supervise", "supervise.backoff_seconds=0.1",
        f"checkpoint.every_steps={interval}",
    )  # fmt: skip
    job = lab.start_job("F09-supervised", "steady", *flags, processes=2)
    workdir, kills, lost, recovery = job[0].workdir, 0, [], []
    for reached in (2, 6, 10, 14, 18):
        fresh = functools.partial(pids, job, workdir, reached)
        job[0].until(fresh, f"step {reached}")
        newest, at = max(steps(workdir), default=0), last_step(workdir)
        os.kill(rng.choice(fresh()), signal.SIGKILL)
        kills, killed = kills + 1, time.time()
        lost.append(at - newest)
        again = functools.partial(records_since, workdir, killed)
        job[0].until(again, "a step after the kill")
        recovery.append(again()[0] - killed)
    said = [trainer.finish() for trainer in job]
    assert all(text.count("restart in") == kills for text in said)
    # A save begins when the one before has finished.
    assert max(lost) < 2 * interval
    found = curve(workdir)  # each step once, in order
    return {
        "kills": kills,
        "steps_lost_at_most": max(lost),
        "recovery_seconds": [round(seconds, 1) for seconds in recovery],
        "duplicate_or_missing_steps": len(found) - len(curve(reference)),
        "equal_losses": equal_curves(workdir, reference),
    }


def records_since(workdir, then):
    return [r["wall_time"] for r in records(workdir) if r["wall_time"] > then]


def pids(job, workdir, reached):
    """Of the trainers below the supervisors, once they are at step ``reached``."""
    if last_step(workdir) < reached:
        return []
    found = []
    for supervisor in job:
        task = f"/proc/{supervisor.pid}/task/{supervisor.pid}/children"
        with open(task) as children:
            found += [int(pid) for pid in children.read().split()]
    return found if len(found) == len(job) else []


@fault("F11", "SIGSTOP to one process of two", "steady", slow=True, processes=2,
       devices=2)  # fmt: skip
def _(lab, reference):
    silence = 3
    job = lab.start_job(
        "F11", "steady", f"processes.silence_seconds={silence}", processes=2
    )
    workdir = job[0].workdir
    job[0].until(lambda: steps(workdir) and last_step(workdir) >= 14, "step 14")
    with harness.frozen(job[1]):
        began = time.monotonic()
        said = job[0].finish(errors.EXIT_PEER_LOST)
        seconds = time.monotonic() - began
    assert seconds < (silence + DETECTION_SECONDS) * harness.patience()
    lost = rf"^{named(1, job[1])} is lost: silent for {silence} s; exit 76"
    assert re.search(lost, said, re.MULTILINE), said
    # What it was told while it was stopped.
    assert re.search(lost, job[1].finish(errors.EXIT_PEER_LOST), re.MULTILINE)
    detail = recover(lab, "F11", reference, job)
    return {"detection_seconds": round(seconds, 1)} | detail


@fault("F12", "one process of two lives, but makes no steps", "steady", slow=True,
       program=SPOILED, processes=2, devices=2)  # fmt: skip
def _(lab, reference):
    limit = round(6 * harness.patience())
    flag = f"watchdog_seconds={limit}"
    port = harness.free_port()
    cluster = (f"--coordinator=127.0.0.1:{port}", "--processes=2")
    more = {"program": SPOILED, "devices": 2}
    job = [
        lab.start("F12", "steady", *cluster, "--process=0", flag, log="F12-0.log",
                  **more),
        lab.start("F12", "steady", *cluster, "--process=1", flag, "--hang=14",
                  log="F12-1.log", **more),
    ]  # fmt: skip
    workdir = job[0].workdir
    job[0].until(lambda: last_step(workdir) >= 13, "step 13")
    began = time.monotonic()
    said = [trainer.finish(errors.EXIT_STUCK) for trainer in job]
    seconds = time.monotonic() - began
    assert seconds < 1.2 * limit + DETECTION_SECONDS * harness.patience()
    stuck = rf"all wait for {named(1, job[1])} \(last step 1\d, waiting for synthetic"
    for text in said:
        assert re.search(stuck, text), text
    detail = recover(lab, "F12", reference, job, program=SPOILED)
    return {"watchdog_seconds": limit, "detection_seconds": round(seconds, 1)} | detail


@fault("F13", "a process that never comes: the second, or the coordinator", "tiny",
       slow=True)  # fmt: skip
def _(lab, reference):
    limit, found = 4, {}
    for present, absent in ((0, 1), (1, 0)):
        began = time.monotonic()
        trainer = lab.start_job(
            f"F13-{absent}", "tiny", f"processes.arrival_seconds={limit}", processes=2,
            only=[present],
        )[0]  # fmt: skip
        said = trainer.finish(errors.EXIT_PEER_LOST)
        found[f"process {absent}"] = round(time.monotonic() - began, 1)
        expected = (
            rf"^process lost: 1 of 2 processes: {absent} did not come to "
            rf"127\.0\.0\.1:\d+ in {limit} s"
        )
        assert re.search(expected, said, re.MULTILINE), said
    return {"seconds": found}


@fault("F13-other", "a process that was started otherwise; the same one twice", "tiny",
       slow=True)  # fmt: skip
def _(lab, reference):
    port = harness.free_port()
    cluster = (f"--coordinator=127.0.0.1:{port}", "--processes=2")
    job = [
        lab.start("F13-o", "tiny", *cluster, "--process=0", log="F13-o0.log"),
        lab.start("F13-o", "tiny", *cluster, "--process=1", "optim.lr=0.5",
                  log="F13-o1.log"),
    ]  # fmt: skip
    for trainer in job:
        said = trainer.finish(errors.EXIT_USER)
        assert "config error: optim.lr: 0.001 for process 0, 0.5 for process 1" in said
    port = harness.free_port()
    cluster = (f"--coordinator=127.0.0.1:{port}", "--processes=3")
    first = lab.start("F13-t", "tiny", *cluster, "--process=0", log="F13-t0.log")
    twins = [
        lab.start("F13-t", "tiny", *cluster, "--process=1", log=f"F13-t1{i}.log")
        for i in "ab"
    ]
    ended = functools.partial(any_ended, twins)
    first.until(ended, "the end of a twin")
    [twin] = [trainer for trainer in twins if trainer.process.poll() is not None]
    said = twin.finish(errors.EXIT_USER)
    assert re.search("has come before", said), said
    return {"exit": errors.EXIT_USER}


def any_ended(trainers):
    return any(trainer.process.poll() is not None for trainer in trainers)


# ------------------------------------------------------- other meshes, other processes


def resume_elsewhere(lab, reference, *, name, kind, resumed, flags=()):
    """The first steps on one machine, the others on another."""
    workdir = lab.copy(reference, name)
    *_, at = kept = steps(workdir)[: len(steps(workdir)) // 2]
    for step in set(steps(workdir)) - set(kept):
        shutil.rmtree(checkpoint(workdir, step))
    said = run(lab, name, kind, resumed, *flags)
    assert f"resumed from {checkpoint(workdir, at)}\n" in said
    return {"resumed_from": at} | compare(workdir, reference, rtol=MESH_RTOL)


def run(lab, name, kind, machine, *flags, **more):
    processes, devices = machine
    if processes == 1:
        return lab.run(name, kind, *flags, devices=devices, **more)
    more |= {"processes": processes, "devices": devices}
    return lab.run_job(name, kind, *flags, **more)[0]


def compare(workdir, reference, *, rtol):
    found, expected = curve(workdir), curve(reference)
    assert found.keys() == expected.keys()
    got, want = (
        np.array([float.fromhex(x) for x in c.values()]) for c in (found, expected)
    )
    worst = float(np.max(np.abs(got / want - 1)))
    assert worst <= rtol, f"{worst:.2g} > {rtol:.2g}"
    return {"worst_relative_difference": float(f"{worst:.2g}")}


ELSEWHERE = {
    # id: (text, processes x devices that saved, that resume, their mesh)
    "F15": ("fsdp=8, resumed on fsdp=4 tensor=2", (1, 8), (1, 8),
            ("mesh.fsdp=4", "mesh.tensor=2")),
    "F16": ("fsdp=8, resumed on 4 devices", (1, 8), (1, 4), ()),
    "F17": ("fsdp=8, resumed on 2 devices", (1, 8), (1, 2), ()),
    "F18": ("fsdp=8, resumed on 1 device", (1, 8), (1, 1), ()),
    "F19": ("fsdp=8, resumed on data=2 tensor=2", (1, 8), (1, 4),
            ("mesh.data=2", "mesh.fsdp=1", "mesh.tensor=2")),
    "F20": ("2 processes, resumed by 4", (2, 2), (4, 1), ()),
    "F20-many": ("1 process, resumed by 2", (1, 8), (2, 4), ()),
}  # fmt: skip


for name, (text, saved, resumed, flags) in ELSEWHERE.items():
    fault(
        name, f"saved on {text}", "tiny", slow=True, processes=saved[0],
        devices=saved[1], flags=("checkpoint.keep=9",),
    )(functools.partial(
        resume_elsewhere, name=name, kind="tiny", resumed=resumed, flags=flags
    ))  # fmt: skip


@fault("F20-one", "saved by 2 processes, resumed by 1", "steady", processes=2,
       devices=2)  # fmt: skip
def _(lab, reference):
    return resume_elsewhere(
        lab, reference, name="F20-one", kind="steady", resumed=(1, 2)
    )


@fault("F20-stored", "prepared data read by 2 processes, killed; then read by 1",
       "stored", slow=True, processes=2, devices=2)  # fmt: skip
def _(lab, reference):
    """Another batch, or another row in one, would be another loss."""
    job = lab.start_job("F20-stored", "stored", processes=2)
    workdir = job[0].workdir
    job[0].until(lambda: steps(workdir) and last_step(workdir) >= 14, "step 14")
    job[1].kill()
    leave(job[:1], errors.EXIT_PEER_LOST)
    assert "resumed from" in lab.run("F20-stored", "stored", devices=2)
    return compare(workdir, reference, rtol=MESH_RTOL)


@fault("F20-text", "text through SeqIO by 2 processes, killed; then resumed by 1",
       "text", slow=True, processes=2, devices=1)  # fmt: skip
def _(lab, reference):
    """By as many it goes on exactly; another number is refused, not begun anew."""
    job = lab.start_job("F20-text", "text", processes=2, devices=1)
    workdir = job[0].workdir
    job[0].until(lambda: steps(workdir) and last_step(workdir) >= 14, "step 14")
    job[1].kill()
    leave(job[:1], errors.EXIT_PEER_LOST)
    said = lab.run("F20-text", "text", code=errors.EXIT_CHECKPOINT)
    assert "no process_0-of-1.bin, only process_0-of-2.bin, process_1-of-2.bin" in said
    lab.run_job("F20-text", "text", processes=2, devices=1)
    return {"equal_losses": equal_curves(workdir, reference)}


@fault("F20-float64", "processes and meshes of every kind, in float64", "tiny",
       slow=True, program=SPOILED, flags=("--float64",), processes=1)  # fmt: skip
def _(lab, reference):
    found = {}
    for processes, devices, *flags in (
        (2, 2),
        (4, 1),
        (2, 4, "mesh.data=2", "mesh.fsdp=4"),
        (2, 2, "mesh.data=2", "mesh.fsdp=1", "mesh.tensor=2"),
        # The rows of a batch are on both processes: tensor spans them.
        (2, 1, "mesh.fsdp=1", "mesh.tensor=2"),
        (2, 2, "mesh.fsdp=1", "mesh.context=4"),
    ):
        name = f"F20-f64-{processes}x{devices}-{'-'.join(flags)}"
        machine = processes, devices
        run(lab, name, "tiny", machine, "--float64", *flags, program=SPOILED)
        where = f"{processes} x {devices} {' '.join(flags)}".strip()
        found[where] = compare(lab.root / name, reference, rtol=FLOAT64_RTOL)
    return found
