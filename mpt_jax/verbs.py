"""What the verbs that put a checkpoint to work share: generate, chat, serve.

Only the standard library is imported, so that ``--help`` answers before JAX is loaded.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import sys
from collections.abc import Iterator
from typing import Any


def add_checkpoint_flags(parser: argparse.ArgumentParser) -> None:
    """--checkpoint, and how to load it."""
    add = parser.add_argument
    add("--checkpoint", required=True, metavar="DIR")
    add("--tokenizer", metavar="NAME", help="a file, folder, hub name or 'bytes', with "
        "+chatml where it needs ChatML; default the checkpoint's")  # fmt: skip
    add("--dtype", choices=("float32", "bfloat16"), help="default bfloat16, on CPUs "
        "float32")  # fmt: skip
    add("--int8", action="store_true", help="weights as int8: half the memory of bf16")
    add("--mesh", metavar="AXES", help="over several devices, such as tensor=4 or "
        "fsdp=2,tensor=2")  # fmt: skip
    add("--traceback", action="store_true", help="show the stack of an error")


def checkpoint_arguments(flags: argparse.Namespace) -> dict[str, Any]:
    """Those of loading.load() that add_checkpoint_flags()'s flags say."""
    return {
        "path": flags.checkpoint, "dtype": flags.dtype, "int8": flags.int8,
        "mesh": flags.mesh, "tokenizer": flags.tokenizer,
    }  # fmt: skip


@contextlib.contextmanager
def reader_may_leave() -> Iterator[None]:
    """Around what prints: ends quietly when who reads stdout has seen enough."""
    try:
        yield
    except BrokenPipeError:  # nor shall exit flush to it
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
