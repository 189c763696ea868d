"""What the launch scripts tell the compiler."""

import pathlib
import subprocess

COMMON = pathlib.Path(__file__).parents[2] / "launch" / "common.sh"


def sparse_cores() -> str:
    command = ["bash", "-c", f'source {COMMON}; printf %s "$sparse_core_flags"']
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.startswith("--xla_tpu_"), done.stdout
    return done.stdout
