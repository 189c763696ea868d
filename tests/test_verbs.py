"""What generate, chat and serve share."""

import argparse
import inspect

from mpt_jax import loading, verbs


def test_every_flag_reaches_load():
    parser = argparse.ArgumentParser()
    verbs.add_checkpoint_flags(parser)
    flags = parser.parse_args(
        ["--checkpoint", "c", "--tokenizer", "bytes", "--dtype", "bfloat16", "--int8",
         "--mesh", "tensor=2"]
    )  # fmt: skip
    arguments = verbs.checkpoint_arguments(flags)
    assert arguments == {
        "path": "c", "tokenizer": "bytes", "dtype": "bfloat16", "int8": True,
        "mesh": "tensor=2",
    }  # fmt: skip
    assert arguments.keys() == inspect.signature(loading.load).parameters.keys()
