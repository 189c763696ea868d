"""What a checkpoint is, once opened: its tensors by name, and what is wrong with it."""

from __future__ import annotations

import dataclasses
import json
import pathlib
from collections.abc import Callable, Mapping
from typing import Any

import ml_dtypes
import numpy as np

from mpt_jax.config import ModelConfig
from mpt_jax.errors import ConfigError
from mpt_jax.interop import configs

DTYPES = {
    "float32": np.dtype(np.float32),
    "bfloat16": np.dtype(ml_dtypes.bfloat16),
    "float16": np.dtype(np.float16),
    "float64": np.dtype(np.float64),
}
MAX_JSON_BYTES = 100_000_000  # the index of 30B has 30 kB, a tokenizer.json 2 MB


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file. dtype: a key of DTYPES, or what else it is called there."""

    name: str
    file: pathlib.Path
    shape: tuple[int, ...]
    dtype: str
    read: Callable[[], np.ndarray]

    def __str__(self) -> str:
        return f"{self.dtype}{list(self.shape)}"


@dataclasses.dataclass
class Source:
    """A checkpoint of another program.

    kind: "safetensors", "torch", "composer" or "gguf". config: None where it cannot be
    read, which ``problems`` says. lost: tensors of files that are missing or damaged;
    all_lost: nobody knows which those are. tokens: bos_token_id and so on. tokenizer:
    files to copy along.
    """

    kind: str
    path: pathlib.Path
    config: ModelConfig | None = None
    tensors: list[Stored] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    lost: set[str] = dataclasses.field(default_factory=set)
    all_lost: bool = False
    tokens: dict[str, Any] = dataclasses.field(default_factory=dict)
    tokenizer: list[pathlib.Path] = dataclasses.field(default_factory=list)

    def set_config(self, raw: Mapping[str, Any], location: str) -> None:
        try:
            self.config = configs.read(raw, location=location)
        except ConfigError as error:
            self.problems += [f"{location}: {p}" for p in error.problems]
        self.tokens = {k: raw[k] for k in configs.TOKENS if raw.get(k) is not None}


def read_json(path: pathlib.Path, problems: list[str]) -> dict[str, Any] | None:
    """The object in a JSON file; None, and a problem, where there is none."""
    try:
        if path.stat().st_size > MAX_JSON_BYTES:
            raise ValueError(f"{path.stat().st_size} bytes of JSON are too many")
        value = json.loads(path.read_bytes())
        if not isinstance(value, dict):
            raise ValueError("expected a JSON object")
        return value
    except FileNotFoundError:
        problems.append(f"{path.name}: missing")
    except RecursionError:
        problems.append(f"{path.name}: nested too deeply")
    except (OSError, ValueError) as error:
        problems.append(f"{path.name}: {str(error).splitlines()[0]}")
    return None


class DamagedError(Exception):
    """A file that cannot be read, with the reason in one line."""
