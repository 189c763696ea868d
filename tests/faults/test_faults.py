"""Breaks real trainers: each fault is survived, noticed or refused, as it should be.

A fault that is survived leaves the losses of every step as they are without it, in
every bit. Two are injected at a time, in the background; the tests wait for them.
``pytest tests/faults`` ends with a line of JSON for each.
"""

import functools
import importlib.util
import os
import random
import re
import shutil
import signal
import sys
import time

import numpy as np
import pytest

from mpt_jax import errors
from mpt_jax.data import prepared as stored
from mpt_jax.training.stored import open_checkpoint
from tests.faults import harness
from tests.faults.harness import (
    SPOILED,
    arrays,
    checkpoint,
    checkpoints,
    curve,
    equal_curves,
    files,
    last_step,
    records,
    steps,
    unfinished,
    weights_file,
)

fault = FAULTS = harness.Faults()

# What a preempted machine, or a user who has mistyped, should not have to wait for.
PREEMPTION_SECONDS = 5.0
REFUSAL_SECONDS = 5.0


def test_fault(fault, survived):
    survived(fault)


# ------------------------------------------------------------------------ kill -9


def recover(lab, kind, trainer, reference):
    """Kills the trainer now, starts it again, and compares what it learned."""
    trainer.kill()
    killed, workdir = time.time(), trainer.workdir
    left, newest, reached = unfinished(workdir), steps(workdir)[-1], last_step(workdir)
    for step in steps(workdir):
        open_checkpoint(checkpoint(workdir, step))  # raises where it is damaged
    said = lab.run(workdir.name, kind)
    assert f"resumed from {checkpoint(workdir, newest)}\n" in said
    names = [f"{step:08d}" for step in steps(workdir)]
    assert sorted(p.name for p in checkpoints(workdir).iterdir()) == [".lock", *names]
    equal = equal_curves(workdir, reference)
    again = [r["wall_time"] for r in records(workdir) if r["step"] > newest]
    shutil.rmtree(checkpoints(workdir))  # 300 MB of a heavy run
    return {
        "save": "unfinished" if left else "finished",
        "resumed_from": newest,
        "steps_lost": reached - newest,
        "recovery_seconds": round(again[0] - killed, 1) if again else None,
        "equal_losses": equal,
    }


def kill_in_save(lab, reference, *, name, seconds):
    """Into the second save, so that there is one to fall back to."""
    trainer = lab.start(name, "heavy")
    trainer.until(lambda: steps(trainer.workdir), "the first save")
    trainer.until(lambda: unfinished(trainer.workdir), "the second save")
    time.sleep(seconds)
    return recover(lab, "heavy", trainer, reference)


@fault("F01", "SIGKILL as an async save begins", "heavy")
def _(lab, reference):
    detail = kill_in_save(lab, reference, name="F01", seconds=0)
    assert detail["save"] == "unfinished"
    return detail


@fault("F02", "SIGKILL 0.05 s into an async save", "heavy")
def _(lab, reference):
    detail = kill_in_save(lab, reference, name="F02", seconds=0.05)
    assert detail["save"] == "unfinished"
    return detail


@fault("F03", "SIGKILL 0.3 s into an async save", "heavy")
def _(lab, reference):
    return kill_in_save(lab, reference, name="F03", seconds=0.3)


@fault("F04", "SIGKILL 1.0 s after a save began; and just before a rename", "heavy")
def _(lab, reference):
    late = kill_in_save(lab, reference, name="F04", seconds=1.0)

    def complete():
        return any((save / "MANIFEST.json").exists() for save in unfinished(workdir))

    trainer = lab.start("F04-complete", "heavy")
    workdir = trainer.workdir
    trainer.until(lambda: steps(workdir), "the first save")
    trainer.until(complete, "a save that is only to be renamed")
    before_rename = recover(lab, "heavy", trainer, reference)
    return {"1.0 s": late, "complete": before_rename}


@fault("F05", "SIGKILL between two saves", "steady")
def _(lab, reference):
    return kill_between(lab, reference, name="F05", kind="steady")


def kill_between(lab, reference, *, name, kind):
    trainer = lab.start(name, kind)
    workdir = trainer.workdir

    def between():
        saved = max(steps(workdir), default=99)
        return last_step(workdir) >= saved + 2 and not unfinished(workdir)

    trainer.until(between, "two steps after a save")
    detail = recover(lab, kind, trainer, reference)
    assert detail["save"] == "finished"
    assert detail["steps_lost"] >= 2
    return detail


@fault("F06", "10 SIGKILLs at random times while saving every step", "tiny",
       flags=("steps=60",))  # fmt: skip
def _(lab, reference):
    """60: a fast disk takes several saves between a start and its kill."""
    rng, every = random.Random(6), ("checkpoint.every_steps=1", "steps=60")
    workdir, newest, left = lab.root / "F06", 0, 0
    for _ in range(10):
        trainer = lab.start("F06", "tiny", *every)
        # A leftover of the last kill is not yet a save of this one.
        trainer.until(functools.partial(resumed, trainer, newest), "resuming")
        trainer.until(lambda: unfinished(workdir), "a save")
        time.sleep(rng.uniform(0, 0.1))
        assert trainer.process.poll() is None, "too late: it has finished"
        trainer.kill()
        for step in steps(workdir):
            open_checkpoint(checkpoint(workdir, step))
        before, newest = newest, max(steps(workdir), default=0)
        assert newest >= before
        left += bool(unfinished(workdir))
    lab.run("F06", "tiny", *every)
    return {
        "kills": 10,
        "kills_that_left_an_unfinished_save": left,
        "equal_losses": equal_curves(workdir, reference),
    }


def resumed(trainer, step):
    """Whether it is past resuming from ``step``; 0 is a fresh start."""
    return not step or f"resumed from {checkpoint(trainer.workdir, step)}" in (
        trainer.output()
    )


# ---------------------------------------------------------------- signals, supervision


@fault("F07", "SIGTERM, and SIGINT", "steady")
def _(lab, reference):
    found = {
        number.name: interrupt(lab, reference, number)
        for number in (signal.SIGTERM, signal.SIGINT)
    }
    return found | {"SIGTERM before a step is recorded": interrupt_unrecorded(lab)}


NO_SAVE = "checkpoint.every_steps=99"  # is due: that there is one is the signal's doing


def interrupt(lab, reference, number):
    name = f"F07-{number.name}"
    trainer = lab.start(name, "steady", NO_SAVE)
    workdir = trainer.workdir
    trainer.until(lambda: last_step(workdir) >= 4, "step 4")
    began = time.monotonic()
    trainer.signal(number)
    said = trainer.finish(errors.EXIT_OK)
    seconds = time.monotonic() - began
    saved = last_step(workdir)
    assert saved < last_step(reference), "too late: it has finished"
    assert (steps(workdir), unfinished(workdir)) == ([saved], [])
    assert f"{number.name}: saved step {saved}" in said
    assert seconds < PREEMPTION_SECONDS * harness.patience()
    assert f"resumed from {checkpoint(workdir, saved)}\n" in lab.run(name, "steady")
    return {
        "saved": saved,
        "seconds": round(seconds, 1),
        "equal_losses": equal_curves(workdir, reference),
    }


def interrupt_unrecorded(lab):
    """Metrics of a step are read one step later: those of the last one count, too."""
    said = lab.run("F07-unrecorded", "tiny", "--terminate=9", program=SPOILED)
    workdir = lab.root / "F07-unrecorded"
    assert f"SIGTERM: saved step {last_step(workdir)};" in said
    lab.run("F07-unrecorded", "tiny", program=SPOILED)
    return equal_curves(workdir, lab.reference("tiny", program=SPOILED))


@fault("F14", "--supervise: two SIGKILLs; and a crash loop", "steady")
def _(lab, reference):
    flags = ("--supervise", "supervise.backoff_seconds=0.1")
    supervisor = lab.start("F14", "steady", *flags, "checkpoint.every_steps=4")
    workdir, victims = supervisor.workdir, [None]
    for reached in (6, 14):
        supervisor.until(
            lambda reached=reached: (
                last_step(workdir) >= reached and trainer_pid(workdir) != victims[-1]
            ),
            f"step {reached}",
        )
        victims.append(trainer_pid(workdir))
        os.kill(victims[-1], signal.SIGKILL)
    said = supervisor.finish()
    assert said.count("trainer killed by SIGKILL") == 2

    looping = lab.copy(reference, "F14-loop")
    shutil.rmtree(checkpoints(looping))
    checkpoint(looping, 12).mkdir(parents=True)
    limit = "supervise.max_failures=1"
    gave_up = lab.run("F14-loop", "steady", *flags, limit, code=errors.EXIT_CHECKPOINT)
    assert "giving up after 2 failures without a new one" in gave_up
    return {"restarts": 2, "equal_losses": equal_curves(workdir, reference)}


def trainer_pid(workdir):
    """Of the trainer that holds the checkpoints."""
    found = re.match("pid ([0-9]+) on", (checkpoints(workdir) / ".lock").read_text())
    return int(found[1]) if found else None


# ------------------------------------------------------------------ damaged checkpoints


def flip_bit(step):
    file = weights_file(step)
    content = bytearray(file.read_bytes())
    bit = random.Random(21).randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    file.write_bytes(content)


def truncate(step):
    os.truncate(weights_file(step), weights_file(step).stat().st_size // 2)


def empty(step):
    shutil.rmtree(step)
    step.mkdir()


def garbage(step):
    file = weights_file(step)
    file.write_bytes(random.Random(22).randbytes(file.stat().st_size))


def fall_back(lab, reference, *, name, damage, reason):
    """The newest checkpoint is damaged: resumes from the one before, and says so."""
    workdir, began = lab.copy(reference, name), time.time()
    damage(checkpoint(workdir, 24))
    said = lab.run(name, "tiny")
    damage = f"skipping a damaged checkpoint: .*00000024: .*{reason}"
    assert re.search(damage, said), said
    assert f"resumed from {checkpoint(workdir, 18)}\n" in said
    new = [
        r["step"] for r in records(workdir) if "loss" in r and r["wall_time"] > began
    ]
    assert new == [19, 20, 21, 22, 23, 24]
    open_checkpoint(checkpoint(workdir, 24))  # a good one again
    return equal_curves(workdir, reference)


@fault("F21", "a flipped bit in the newest checkpoint", "tiny")
def _(lab, reference):
    wrong = r"params/.*: \d+ bytes, crc32 \w+, expected"
    equal = fall_back(lab, reference, name="F21", damage=flip_bit, reason=wrong)
    return {"fell_back_to": 18, "equal_losses": equal}


@fault("F22", "newest checkpoint truncated, without a file, empty, or garbage", "tiny")
def _(lab, reference):
    damages = {
        "truncated": (truncate, r"params/.*: \d+ bytes.*, expected \d+ bytes"),
        "file missing": (lambda s: weights_file(s).unlink(), "params/.*: missing"),
        "empty": (empty, "MANIFEST.json is missing"),
        "garbage": (garbage, "params/.*: .* crc32"),
    }
    return {
        name: fall_back(
            lab, reference, name=f"F22 {name}", damage=damage, reason=reason
        )
        for name, (damage, reason) in damages.items()
    }


@fault("F23", "all checkpoints damaged", "tiny")
def _(lab, reference):
    workdir = lab.copy(reference, "F23")
    flip_bit(checkpoint(workdir, 18))
    empty(checkpoint(workdir, 24))
    before = files(workdir)
    said = lab.run("F23", "tiny", code=errors.EXIT_CHECKPOINT)
    assert "checkpoint error: " in said
    assert "every checkpoint is damaged" in said
    assert re.search("^  step 18: params/.* crc32", said, re.MULTILINE)
    assert "\n  step 24: MANIFEST.json is missing\n" in said
    assert files(workdir) == before
    return {"exit": errors.EXIT_CHECKPOINT}


# ------------------------------------------------------------------------- the disk


def limited(kibibytes):
    """A command prefix: no file may grow larger, as on a full disk."""
    return ("sh", "-c", f'ulimit -f {2 * kibibytes}; exec "$@"', "sh")


@fault("F24", "disk full", "tiny")
def _(lab, reference):
    workdir = lab.copy(reference, "F24")
    shutil.rmtree(checkpoint(workdir, 24))
    before = files(checkpoint(workdir, 18))
    # Enough for metrics.jsonl, not for the weights.
    said = lab.run("F24", "tiny", prefix=limited(32), code=errors.EXIT_CHECKPOINT)
    [line] = [li for li in said.splitlines() if li.startswith("checkpoint error: ")]
    assert f"{checkpoints(workdir)}: cannot save step 24: " in line
    assert "File too large" in line
    assert steps(workdir) == [18]
    assert files(checkpoint(workdir, 18)) == before
    assert f"resumed from {checkpoint(workdir, 18)}\n" in lab.run("F24", "tiny")
    assert steps(workdir) == [18, 24]
    return {"exit": 4, "says": line, "equal_losses": equal_curves(workdir, reference)}


@fault("F25", "checkpoint directory is a file, read-only, or another's", "steady")
def _(lab, reference):
    is_file = lab.root / "F25-file"
    is_file.mkdir()
    checkpoints(is_file).touch()
    seconds = {"file": refused(lab, is_file.name, "checkpoints: not a directory")}

    read_only = lab.root / "F25-read-only"
    read_only.mkdir()
    if os.geteuid():
        checkpoints(read_only).mkdir(mode=0o555)
    else:  # may write everywhere, but not there
        checkpoints(read_only).symlink_to("/sys/kernel")
    reason = (
        "cannot write here: (Permission|OS)Error: .*(denied|not permitted|Read-only)"
    )
    seconds["read-only"] = refused(lab, read_only.name, reason)

    first = lab.start("F25-first", "steady")
    first.until(lambda: last_step(first.workdir) >= 2, "step 2")
    with harness.frozen(first):
        holder = f"another trainer is writing here \\(pid {first.pid} on "
        seconds["second trainer"] = refused(lab, first.workdir.name, holder)
    first.finish()
    return {"seconds": seconds, "equal_losses": equal_curves(first.workdir, reference)}


def refused(lab, name, reason):
    began = time.monotonic()
    said = lab.run(name, "steady", code=errors.EXIT_CHECKPOINT)
    seconds = time.monotonic() - began
    assert re.search(f"^checkpoint error: .*{reason}", said, re.MULTILINE), said
    assert seconds < REFUSAL_SECONDS * harness.patience()
    return round(seconds, 1)


# ----------------------------------------------------------------------- divergence


@fault("F26", "a gradient that is not finite, once", "tiny", program=SPOILED,
       flags=("--without=9",))  # fmt: skip
def _(lab, reference):
    """Step 10 counts, but otherwise all is as if its batch had not been there."""
    said = lab.run("F26", "tiny", "--nan=9", program=SPOILED)
    assert said.count("not finite, update not applied") == 1
    assert "step 10: not finite, update not applied" in said
    workdir = lab.root / "F26"
    assert [r["step"] for r in records(workdir) if r.get("finite") == 0] == [10]
    found = [loss for step, loss in curve(workdir).items() if step != "end"]
    expected = [loss for step, loss in curve(reference).items() if step != "end"]
    assert found == [*expected[:9], "nan", *expected[9:-1]]
    final = arrays(checkpoint(workdir, 24))
    assert all(np.isfinite(array).all() for array in final.values())
    assert (final["opt_state.step"], final["opt_state.skipped"]) == (24, 1)
    return {"skipped": 1, "equal_losses": f"{len(found) - 1} of {len(expected) - 1}"}


@fault("F27", "many such gradients; a loss spike; and no end of either", "tiny",
       program=SPOILED, flags=("--without=6,7,8,9,10",))  # fmt: skip
def _(lab, reference):
    # Steps 8, 9, 10 are bad; 11 is on its way when the last of them is read.
    said = lab.run("F27", "tiny", "--nan=7,8,9", *NONFINITE, program=SPOILED)
    assert (
        "10: loss is not finite, 3 in a row (2 allowed); rolled back to step 6" in said
    )
    nonfinite = equal_curves(lab.root / "F27", reference)
    return {
        "nonfinite": nonfinite,
        "spike": roll_back_and_kill(lab),
        "stop": diverge(lab),
    }


NONFINITE = ("stability.nonfinite=rollback", "stability.max_skips=2")
SPIKE = (
    "stability.spike=rollback",
    "stability.spike_factor=3",
    "stability.spike_window=4",
    "stability.spike_patience=2",
)


def roll_back_and_kill(lab):
    """Steps 11, 12, 13 spike, and 12 is saved: back to 6; then kill -9, twice.

    First while the 12 from after the rollback is being saved, so that the one of the
    spike may be the newest; then when it certainly is not.
    """
    without = "--without=" + ",".join(str(batch) for batch in range(6, 14))
    reference = lab.reference("tiny", without, program=SPOILED)
    run = functools.partial(
        lab.run, "F27-spike", "tiny", "--spike=10,11,12", *SPIKE, program=SPOILED
    )
    said = run("--kill=20", code=-signal.SIGKILL)
    assert re.search("step 13: loss .* 3 steps in a row; rolled back to step 6", said)
    run("--kill=28", code=-signal.SIGKILL)
    said = run()
    assert "resumed from" in said
    assert "rolled back" not in said
    return equal_curves(lab.root / "F27-spike", reference)


def diverge(lab):
    """Every batch is bad from the eighth on: stops, and nothing bad was saved."""
    nan = "--nan=" + ",".join(str(batch) for batch in range(7, 64))
    flags = (*NONFINITE, "stability.max_rollbacks=2", nan)
    code = errors.EXIT_DIVERGED
    said = lab.run("F27-stop", "tiny", *flags, program=SPOILED, code=code)
    assert said.count("rolled back to step 6") == 2
    # After a rollback to 6, no batch is good.
    assert "diverged: step 9: loss is not finite, 3 in a row (2 allowed); " in said
    assert "2 rollbacks did not help" in said
    lab.run("F27-stop", "tiny", program=SPOILED)
    reference = lab.reference("tiny", program=SPOILED)
    return {"exit": code, "then": equal_curves(lab.root / "F27-stop", reference)}


# --------------------------------------------------------------------------- the sinks


@fault("F35", "stderr closed, stderr full, metrics.jsonl unwritable or full", "tiny")
def _(lab, reference):
    return {
        "stderr closed": without_stderr(lab, reference, "F35-closed", closed_pipe()),
        "stderr full": without_stderr(
            lab, reference, "F35-full", os.open("/dev/full", os.O_WRONLY)
        ),
        "metrics.jsonl unwritable": metrics_unwritable(lab, reference),
        "metrics.jsonl full": metrics_full(lab, reference),
    }


def closed_pipe():
    read, write = os.pipe()
    os.close(read)
    return write


def without_stderr(lab, reference, name, stderr):
    trainer = lab.start(name, "tiny", stderr=stderr)
    os.close(stderr)
    assert trainer.finish().count("warning: stderr: ") == 1
    return equal_curves(trainer.workdir, reference)


def metrics_unwritable(lab, reference):
    workdir = lab.root / "F35-unwritable"
    (workdir / "metrics.jsonl").mkdir(parents=True)  # root may write every file
    return warned_once(lab, reference, workdir)


def metrics_full(lab, reference):
    """The disk takes checkpoints, but not a byte more of metrics.jsonl."""
    workdir = lab.copy(reference, "F35-metrics")
    shutil.rmtree(checkpoint(workdir, 24))
    file = workdir / "metrics.jsonl"
    lines = file.read_bytes().splitlines(keepends=True)[:18]
    lines.append(b'{"step": 18, "padding": "' + b"." * 2**21 + b'"}\n')
    file.write_bytes(b"".join(lines))
    detail = warned_once(lab, reference, workdir, prefix=limited(2**10))
    assert file.read_bytes() == b"".join(lines)
    return detail


def warned_once(lab, reference, workdir, **more):
    said = lab.run(workdir.name, "tiny", **more)
    assert said.count("warning: metrics.jsonl: ") == 1
    assert said.count("training goes on") == 1
    found, expected = (arrays(checkpoint(w, 24)) for w in (workdir, reference))
    assert found.keys() == expected.keys()
    for name, array in expected.items():
        np.testing.assert_array_equal(found[name], array, strict=True)
    return "equal weights"


# -------------------------------------------------------------------------------- SeqIO


@fault("F05-seqio", "SIGKILL between two saves, text through SeqIO", "text", slow=True)
def _(lab, reference):
    return kill_between(lab, reference, name="F05-seqio", kind="text")


# ------------------------------------------------------------------------------- data


def shard_of(folder, source="low"):
    return folder / source / "train-00001-of-00002.tokens"


def damaged_midway(lab, reference, *, name, damage, reason):
    """Noticed at the next row that is read from there; mended, it goes on exactly."""
    folder = lab.prepared(f"{name}-data")
    trainer = lab.start(name, "stored", f"data.prepared={folder}")
    trainer.until(lambda: last_step(trainer.workdir) >= 2, "step 2")
    with harness.frozen(trainer):
        at = last_step(trainer.workdir)
        whole = shard_of(folder).read_bytes()
        damage(shard_of(folder))
    said = trainer.finish(errors.EXIT_DATA)
    assert re.search(f"^data error: {shard_of(folder)}: .*{reason}", said, re.MULTILINE)
    noticed = last_step(trainer.workdir) - at
    assert noticed <= 4, "a row in four is of that shard"
    shard_of(folder).write_bytes(whole)
    lab.run(name, "stored", f"data.prepared={folder}")
    return {
        "steps_until_noticed": noticed,
        "equal_losses": equal_curves(trainer.workdir, reference),
    }


def flip_everywhere(file):
    content = np.fromfile(file, np.uint8)
    (content ^ 1).tofile(file)


@fault("F28", "a shard of prepared data damaged, cut short, or missing", "stored")
def _(lab, reference):
    detail = {
        "flipped midway": damaged_midway(
            lab, reference, name="F28-flipped", damage=flip_everywhere,
            reason="checksum is wrong",
        ),
        "cut short midway": damaged_midway(
            lab, reference, name="F28-short", damage=lambda f: os.truncate(f, 9),
            reason="cut short since it was opened",
        ),
    }  # fmt: skip
    folder = lab.prepared("F28-missing-data")
    shard_of(folder).unlink()
    flags = (f"data.prepared={folder}",)
    said = lab.run("F28-missing", "stored", *flags, code=errors.EXIT_DATA)
    assert f"data error: {shard_of(folder)}: a shard of the prepared data is" in said
    return detail


@fault("F29", "what reads the text hangs, or breaks off", "tiny", slow=True)
def _(lab, reference):
    pipe = lab.root / "F29.txt"
    os.mkfifo(pipe)  # opening it waits for a writer, as a dead disk does
    flags = (
        "data.rates=()", "data.tokenizer=bytes", "model.vocab_size=384",
        "eval.batches=0",
    )  # fmt: skip
    named = f"data.tasks=('text:{pipe}?name=pipe&document=line',)"
    began = time.monotonic()
    said = lab.run(
        "F29-hangs",
        "text",
        *flags,
        named,
        "watchdog_seconds=20",
        code=errors.EXIT_STUCK,
    )
    seconds = time.monotonic() - began
    assert "no step yet, waiting for train split of pipe; exit 75" in said

    lines = lab.root / "F29.jsonl"
    good = b'{"text": "%s"}\n' % (b"some words of text " * 10)
    lines.write_bytes(good * 130 + b'{"text": 7}\n' + good * 9)
    named = (f"data.tasks=('jsonl:{lines}',)", "data.shuffle_buffer=0")
    said = lab.run("F29-breaks", "text", *flags, *named, code=errors.EXIT_DATA)
    assert re.search(f"^data error: {lines}:131: ", said, re.MULTILINE)
    reached = last_step(lab.root / "F29-breaks")
    assert 0 < reached < 24
    return {"seconds_until_named": round(seconds, 1), "steps_before_it": reached}


@fault("F30", "a data position of another seed, mixture, or other tokens", "stored")
def _(lab, reference):
    changed = {"seed=18": "seed", "data.rates=(1,3)": r"data\.rates"}
    for flag, field in changed.items():
        name = lab.copy(reference, f"F30 {field[-5:]}").name
        said = lab.run(name, "stored", flag, "steps=30", code=errors.EXIT_USER)
        assert re.search(rf"^config error: cannot resume .*\b{field}: ", said, re.S)
    other = lab.prepared("F30-data", seed=1)
    name = lab.copy(reference, "F30 tokens").name
    flags = (f"data.prepared={other}", "steps=30")
    said = lab.run(name, "stored", *flags, code=errors.EXIT_CHECKPOINT)
    assert "checkpoint error: the data position is of another run:\n" in said
    for source in ("low", "high"):
        assert re.search(
            rf"^  tokens\.{source}: saved with '\w+', now '\w+'", said, re.M
        )
    return {"refused": [*changed, "other tokens"]}


@fault("F31", "an id outside the vocabulary in a batch", "stored")
def _(lab, reference):
    """Bytes as they were written, by someone with a larger tokenizer."""
    folder = lab.root / "F31-data"
    harness.write_prepared(folder, seed=0, spoiled=300)
    flags = (f"data.prepared={folder}",)
    said = lab.run("F31", "stored", *flags, code=errors.EXIT_DATA)
    expected = r"^data error: train split of low, high in .*: row \d+ has id 300 at "
    assert re.search(expected, said, re.MULTILINE)
    reached = last_step(lab.root / "F31")
    assert reached < 24
    return {"steps_before_it": reached}


def prepare(lab, name, *, tasks):
    """A running ``python -m mpt_jax.prepare``."""
    command = [
        sys.executable, "-m", "mpt_jax.prepare",
        f"--config={harness.HERE / 'config.py'}:text", f"--out={lab.root / name}",
        "--config.data.tokenizer=bytes", f"--config.data.tasks=('{tasks}',)",
        "--config.data.rates=()",
    ]  # fmt: skip
    return lab.watch(harness.Trainer(command, lab.root / name))


def prepare_killed(lab, reference):
    texts = lab.root / "F32-text"
    texts.mkdir()
    rng = random.Random(32)
    for i in range(8):
        words = (f"{rng.random():.17f}" for _ in range(4000))
        (texts / f"{i}.txt").write_text("\n".join(words))
    named = f"text:{texts}?document=line&name=numbers"
    prepare(lab, "F32-whole", tasks=named).finish()
    kills, folder = 0, lab.root / "F32"
    for done in (1, 3, 6):
        worker = prepare(lab, "F32", tasks=named)
        worker.until(
            lambda done=done: len(list(folder.glob("numbers/*.json"))) >= done,
            f"{done} shards",
        )
        time.sleep(rng.uniform(0, 0.05))
        worker.kill()
        kills += 1
        assert not (folder / "manifest.json").exists()
        with pytest.raises(errors.DataError, match="it was not finished"):
            stored.read_manifest(folder)
    prepare(lab, "F32", tasks=named).finish()
    found, expected = files(folder), files(lab.root / "F32-whole")
    assert found.keys() == expected.keys()
    assert found == expected
    return {"kills": kills, "equal_files": len(found)}


if importlib.util.find_spec("apache_beam"):
    fault("F32", "prepare killed three times", "tiny", slow=True)(prepare_killed)
