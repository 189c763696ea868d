"""What lies in a folder: its config, its tensors by name, and what is wrong with both.

Opening reads headers only. Nothing raises for damage: it is noted in ``problems``, so
that read.check() can tell all of it at once. Nothing is executed either: safetensors
and GGUF are data; a torch pickle is read by torch's weights-only loader, which builds
tensors and refuses any other object.
"""

from __future__ import annotations

import pathlib
import re
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from mpt_jax.errors import CheckpointError
from mpt_jax.interop import gguf
from mpt_jax.interop.formats import DamagedError, Source, Stored, read_json
from mpt_jax.interop.torch_files import TorchFiles

_SAFETENSORS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16",
                "F64": "float64"}  # fmt: skip
# What belongs to a tokenizer, or to generation: copied along with the weights.
TOKENIZER_FILES = (
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json",
    "added_tokens.json", "vocab.json", "merges.txt", "tokenizer.model",
    "chat_template.jinja", "generation_config.json",
)  # fmt: skip


def open_source(path: str | pathlib.Path) -> Source:
    """A folder (config.json and weights), a Composer checkpoint or a .gguf file.

    Raises: CheckpointError: there is nothing of the kind at ``path``. UserError: torch
      or gguf is not installed and needed.
    """
    path = pathlib.Path(path).expanduser().absolute()
    if path.is_file():
        return _open_file(path)
    if not path.is_dir():
        raise CheckpointError("no such file or folder", location=str(path))
    for index, suffix, kind in (
        ("model.safetensors.index.json", ".safetensors", "safetensors"),
        ("pytorch_model.bin.index.json", ".bin", "torch"),
    ):
        files = sorted(path.glob(f"*model*{suffix}"))  # not optimizer.bin
        files = [f for f in files if not f.name.startswith("adapter_")]
        if (path / index).exists() or files:
            return _open_folder(path, path / index, files, kind)
    lone = [f for s in ("*.pt", "*.gguf") for f in sorted(path.glob(s))]
    if len(lone) == 1:
        return _open_file(lone[0])
    if (path / "adapter_config.json").exists():
        message = "a LoRA adapter, not a model: merge it into its base model first"
        raise CheckpointError(message, location=str(path))
    names = ", ".join(sorted(f.name for f in path.iterdir())[:8]) or "nothing"
    raise CheckpointError(
        "no checkpoint here: expected config.json with *.safetensors or "
        f"pytorch_model*.bin, one Composer .pt, or one .gguf; found {names}",
        location=str(path),
    )


def _open_file(path: pathlib.Path) -> Source:
    if path.suffix == ".gguf":
        return gguf.open_gguf(path)
    if path.suffix == ".pt":
        return _open_composer(path)
    message = "expected a folder, a Composer checkpoint (.pt) or a .gguf file"
    raise CheckpointError(message, location=str(path))


def _open_folder(
    path: pathlib.Path, index: pathlib.Path, files: list[pathlib.Path], kind: str
) -> Source:
    source = Source(kind, path)
    raw = read_json(path / "config.json", source.problems)
    if raw is not None:
        source.set_config(raw, "config.json")
    source.tokenizer = [path / n for n in TOKENIZER_FILES if (path / n).is_file()]
    weight_map = _weight_map(index, source)
    if weight_map is None:
        weight_map = {}
        _check_numbering(files, source)
    else:
        files = [path / name for name in sorted(set(weight_map.values()))]
    torch = TorchFiles() if kind == "torch" else None
    for file in files:
        named = {n for n, f in weight_map.items() if f == file.name}
        try:
            tensors = torch.stored(file) if torch else _list_safetensors(file)
        except DamagedError as error:
            source.problems.append(f"{file.name}: {error}")
            source.lost |= named
            source.all_lost |= not named
            continue
        source.tensors += tensors
        if named:
            _compare_with_index(source, file.name, named, {t.name for t in tensors})
    return source


def _compare_with_index(
    source: Source, file: str, named: set[str], stored: set[str]
) -> None:
    for name in sorted(named - stored):
        source.problems.append(f"{name}: the index has it in {file}, which has not")
    for name in sorted(stored - named):
        source.problems.append(f"{name}: in {file}, but not in the index")
    source.lost |= named - stored


def _weight_map(index: pathlib.Path, source: Source) -> dict[str, str] | None:
    """Tensor -> file name of an index; None without one."""
    if not index.exists():
        return None
    raw = read_json(index, source.problems)
    found = raw.get("weight_map") if raw is not None else {}
    if not isinstance(found, dict):
        source.problems.append(f"{index.name}: no weight_map")
    if not isinstance(found, dict) or raw is None:
        source.all_lost = True
        return {}
    good = {}
    for name, file in found.items():
        if isinstance(file, str) and re.fullmatch(r"[\w][\w.\-]*", file):
            good[name] = file
        else:  # a path out of the folder must not be followed
            source.problems.append(f"{index.name}: {name} is in {file!r}: no file name")
            source.lost.add(name)
    return good


def _check_numbering(files: Iterable[pathlib.Path], source: Source) -> None:
    """Without an index, the files count themselves: model-00001-of-00003."""
    numbers: dict[tuple[str, str, str], set[int]] = {}
    for file in files:
        if match := re.fullmatch(r"(.*-)(\d+)-of-(\d+)(\..*)", file.name):
            start, number, total, end = match.groups()
            numbers.setdefault((start, total, end), set()).add(int(number))
    for (start, total, end), found in numbers.items():
        for number in sorted(set(range(1, int(total) + 1)) - found):
            name = f"{start}{number:0{len(total)}d}-of-{total}{end}"
            source.problems.append(f"{name}: missing")
            source.all_lost = True


# ------------------------------------------------------------------------ safetensors


def _list_safetensors(file: pathlib.Path) -> list[Stored]:
    import safetensors

    if not file.is_file():
        raise DamagedError("missing")

    def read(name: str) -> np.ndarray:
        # Opened each time: what is read stays mapped, and counts as our memory.
        with safetensors.safe_open(file, "numpy") as opened:
            return opened.get_tensor(name)

    try:
        with safetensors.safe_open(file, "numpy") as opened:
            slices = {name: opened.get_slice(name) for name in opened.offset_keys()}
            return [
                Stored(
                    name, file, tuple(s.get_shape()),
                    _SAFETENSORS.get(s.get_dtype(), s.get_dtype()),
                    lambda name=name: read(name),
                )
                for name, s in slices.items()
            ]  # fmt: skip
    except (safetensors.SafetensorError, OSError, ValueError) as error:
        raise DamagedError(str(error).splitlines()[0]) from error


def _open_composer(path: pathlib.Path) -> Source:
    """A Composer checkpoint: the weights and, where HuggingFaceModel wrote it, the
    config of one file, whose optimizer state stays unread on the disk."""
    source = Source("composer", path)
    files = TorchFiles()
    try:
        content = files.load(path)
        state = content.get("state") if isinstance(content, Mapping) else None
        source.tensors = files.stored(
            path, root=("state", "model"), prefix="state.model."
        )
    except DamagedError as error:
        source.problems.append(f"{path.name}: {error}")
        return source
    raw: Any = state
    for key in ("integrations", "huggingface", "model", "config", "content"):
        raw = raw.get(key) if isinstance(raw, Mapping) else None
    if isinstance(raw, Mapping):
        source.set_config(raw, f"{path.name}: config")
    else:
        beside = path.parent / "config.json"
        raw = read_json(beside, source.problems)
        if raw is not None:
            source.set_config(raw, "config.json")
    source.tokenizer = [
        path.parent / n for n in TOKENIZER_FILES if (path.parent / n).is_file()
    ]
    return source
