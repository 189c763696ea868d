"""The command line that every verb shares: --config FILE and --config.FIELD=VALUE.

Only the standard library and ml_collections are imported here, so that ``--help``,
``--print_config`` and every config error answer before JAX is loaded.
"""

from __future__ import annotations

import argparse
import importlib.util
import sys
import traceback
from collections.abc import Mapping, Sequence
from typing import Any

from mpt_jax.config import TrainConfig, flatten, meanings, parse
from mpt_jax.errors import ConfigError, UserError

OVERRIDE = "--config."


def parse_args(
    parser: argparse.ArgumentParser, argv: Sequence[str]
) -> tuple[argparse.Namespace, dict[str, str]]:
    """The parsed flags, and the overrides: dotted path -> text.

    ``--config.steps=10`` and ``--config.steps 10`` are the same.
    Raises: UserError: an override without a value. argparse exits 2 on other mistakes.
    """
    rest: list[str] = []
    overrides: dict[str, str] = {}
    words = list(argv)
    while words:
        word = words.pop(0)
        if not word.startswith(OVERRIDE):
            rest.append(word)
            continue
        path, equals, value = word.removeprefix(OVERRIDE).partition("=")
        if not equals:
            if not words:
                raise UserError(f"{word}: expected a value, as in {word}=VALUE")
            value = words.pop(0)
        overrides[path] = value
    return parser.parse_args(rest), overrides


def load_config(path: str, overrides: Mapping[str, str]) -> TrainConfig:
    """Runs ``get_config()`` of the Python file at ``path`` and parses what it returns.

    ``FILE.py:ARG`` calls get_config("ARG"). A config file is code: run only your own.
    Raises: ConfigError: no such file, no get_config(), an exception in it, or any
      problem that parse() finds.
    """
    file, _, argument = path.partition(":")
    spec = importlib.util.spec_from_file_location("mpt_jax_config_file", file)
    if spec is None or spec.loader is None:
        raise ConfigError(["expected a Python file (.py)"], location=file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
        values = module.get_config(*([argument] if argument else []))
    except FileNotFoundError:
        raise ConfigError(["no such config file"], location=file) from None
    except Exception as error:
        frames = [f for f in traceback.extract_tb(error.__traceback__)]
        line = next((f.lineno for f in reversed(frames) if f.filename == file), 0)
        what = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError([what], location=f"{file}:{line}") from error
    return parse(TrainConfig, values, overrides, location=path)


def show_config(config: TrainConfig, overrides: Mapping[str, str]) -> str:
    """Every knob with its value; ``*`` marks the command line's."""
    marked = {p: any(p == o or p.startswith(f"{o}.") for o in overrides)
              for p in flatten(config)}  # fmt: skip
    return "\n".join(
        f"{'*' if marked[path] else ' '} {path} = {value!r}"
        for path, value in flatten(config).items()
    )


def knob_help() -> str:
    """Every knob: name, type, default, meaning; the --help epilog."""
    lines = []
    for path, (kind, default, meaning) in meanings(TrainConfig).items():
        lines.append(f"  --config.{path}=  ({kind}; default {default!r})")
        lines.append(f"      {meaning}")
    return "config fields:\n" + "\n".join(lines)


class Parser(argparse.ArgumentParser):
    """argparse with our error line and the knobs below the flags."""

    def __init__(self, **kwargs: Any):
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter,
            allow_abbrev=False,
            **kwargs,
        )

    def format_help(self) -> str:
        return super().format_help() + "\n" + knob_help() + "\n"

    def error(self, message: str) -> Any:
        print(f"error: {message} (see --help)", file=sys.stderr)
        raise SystemExit(2)
