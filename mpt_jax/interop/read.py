"""Checks a foreign checkpoint whole, then streams it: one tensor in memory at a time.

``load()`` puts it into sharded arrays, ``stream()`` hands on one layer of one of our
parameters after another, in the order of the files.
"""

from __future__ import annotations

import dataclasses
import functools
import pathlib
import re
from collections.abc import Iterator

import jax
import jax.numpy as jnp
import numpy as np

from mpt_jax import partitioning
from mpt_jax.config import ModelConfig
from mpt_jax.errors import CheckpointError
from mpt_jax.interop import names
from mpt_jax.interop.formats import DTYPES, Source, Stored, read_json
from mpt_jax.interop.names import Part
from mpt_jax.interop.sources import open_source
from mpt_jax.models import mpt

BLOCK_ELEMENTS = 1 << 22  # compared at a time, for little memory
MAX_LAYERS = 1000  # believed of a config alone


@dataclasses.dataclass(frozen=True)
class Checked:
    """A source without a problem. config.param_dtype is that of what it streams."""

    source: Source
    config: ModelConfig
    tensors: list[tuple[names.Tensor, Stored]]

    def stream(self) -> Iterator[tuple[Part, np.ndarray]]:
        """(part, array) of every layer of every parameter, in the order of the files.

        The array may be a view; it is valid until the next one.

        Raises: CheckpointError: in the end, naming each tensor that is not finite.
        """
        dtype, problems = DTYPES[self.config.param_dtype], []
        for tensor, stored in self.tensors:
            try:
                array = stored.read()
            except Exception as error:
                raise _error(self.source.path, [
                    f"{stored.name}: cannot be read from {stored.file.name}: {error}"
                ]) from error  # fmt: skip
            with np.errstate(over="ignore"):
                array = array.astype(dtype, copy=False)
            if bad := _not_finite(array):
                problems.append(f"{stored.name}: {bad} values are not finite")
            yield from tensor.split(array)
        if problems:
            raise _error(self.source.path, problems)


def check(path: str | pathlib.Path, *, dtype: str | None = None) -> Checked:
    """Opens a checkpoint and finds everything that is wrong with it.

    Args:
      dtype: what the parameters become, rounding where needed. Default: bfloat16 where
        all of them are that, else float32, which holds float16 too.
    Raises: CheckpointError: every missing, extra and misshapen tensor, wrong dtype,
      damaged file and mismatch of the vocabulary, with names and shapes.
    """
    source = open_source(path)
    problems, tensors = list(source.problems), []
    cfg = source.config
    if cfg is not None:
        tensors = _match(source, cfg, problems)
        problems += _check_tokenizer(source, cfg)
        dtype = dtype or _dtype([stored for _, stored in tensors], problems)
    if problems or cfg is None:
        raise _error(source.path, problems)
    return Checked(source, dataclasses.replace(cfg, param_dtype=dtype), tensors)


def load(
    path: str | pathlib.Path, *, dtype: str | None = None
) -> tuple[ModelConfig, mpt.Params]:
    """The model in a foreign checkpoint, its parameters sharded over the current mesh.

    Each tensor is read once and written into the arrays on the devices: beside them,
    the host holds one tensor. Without partitioning.use() all go to one device.
    """
    checked = check(path, dtype=dtype)
    mesh = partitioning.current_mesh()
    axes = names.flatten(mpt.param_axes(checked.config))
    structs = names.structs(checked.config)

    def place(path: names.Path, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        if mesh is None:
            return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return partitioning.sharding(mesh, axes[path][-len(shape) :], shape)

    places = {path: place(path, s.shape) for path, s in structs.items()}
    zeros = lambda: {p: jnp.zeros(s.shape, s.dtype) for p, s in structs.items()}  # noqa: E731
    arrays = jax.jit(zeros, out_shardings=places)()
    for part, array in checked.stream():
        piece = jax.make_array_from_callback(
            part.shape, place(part.path, part.shape), lambda i, a=array: np.array(a[i])
        )
        if part.layer is not None:
            piece = _set_layer(arrays[part.path], piece, part.layer)
        arrays[part.path] = piece
    return checked.config, names.unflatten(arrays)


@functools.partial(jax.jit, donate_argnums=0)
def _set_layer(whole: jax.Array, piece: jax.Array, layer: int) -> jax.Array:
    return jax.lax.dynamic_update_index_in_dim(whole, piece, layer, 0)


# ---------------------------------------------------------------------------- checking


def _match(
    source: Source, cfg: ModelConfig, problems: list[str]
) -> list[tuple[names.Tensor, Stored]]:
    """Their tensors beside what the model needs; what does not fit, to problems."""
    known = len(source.tensors) + len(source.lost)
    if cfg.n_layers > (MAX_LAYERS if source.all_lost else known):  # or we hang below
        problems.append(f"n_layers={cfg.n_layers}: there are {known} tensors in all")
        return []
    found: dict[str, Stored] = {}
    for stored in source.tensors:
        name = names.canonical(stored.name)
        if name in found:
            problems.append(f"{stored.name}: {found[name].name} is the same tensor")
        found[name] = stored
    lost = {names.canonical(name) for name in source.lost}
    expected = names.tensors(cfg, fused=not names.is_split(found))
    head = found.pop(names.TIED_HEAD, None) if cfg.tie_word_embeddings else None
    pairs, lines = [], []
    for name, tensor in expected.items():
        stored = found.pop(name, None)
        if stored is None:
            if name not in lost and not source.all_lost:
                lines.append((name, f"missing, expected {list(tensor.shape)}"))
        elif stored.shape != tensor.shape:
            hint = ""
            if name in ("transformer.wte.weight", names.TIED_HEAD):
                hint = f" (vocab_size={cfg.vocab_size}, d_model={cfg.d_model})"
            lines.append((
                name, f"stored {list(stored.shape)}, expected "
                      f"{list(tensor.shape)}{hint}"
            ))  # fmt: skip
        elif stored.dtype not in DTYPES:
            lines.append((name, f"stored as {stored}, expected floats"))
        else:
            pairs.append((tensor, stored))
    lines += [(n, f"unexpected, {s}") for n, s in found.items()]
    problems += _fold(lines)
    if head is not None:
        problems += _check_tied(head, {t.name: s for t, s in pairs})
    order = {id(stored): i for i, stored in enumerate(source.tensors)}
    return sorted(pairs, key=lambda pair: order[id(pair[1])])


def _fold(lines: list[tuple[str, str]]) -> list[str]:
    """One line for a problem that many layers have: blocks.{0-47}.norm_1.weight."""
    groups: dict[tuple[str, str, str], list[int | None]] = {}
    for name, problem in lines:
        match = re.fullmatch(r"(transformer\.blocks\.)(\d{1,6})(\..*)", name)
        start, layer, end = match.groups() if match else (name, None, "")
        layers = groups.setdefault((start, end, problem), [])
        layers.append(None if layer is None else int(layer))
    return [
        f"{start}{'' if layers == [None] else _ranges(layers)}{end}: {problem}"
        for (start, end, problem), layers in groups.items()
    ]


def _ranges(numbers: list[int]) -> str:
    """
    >>> _ranges([3]), _ranges([0, 1, 2, 7])
    ('3', '{0-2,7}')
    """
    runs: list[list[int]] = []
    for n in sorted(numbers):
        if runs and n == runs[-1][1] + 1:
            runs[-1][1] = n
        else:
            runs.append([n, n])
    text = ",".join(f"{a}-{b}" if b > a else str(a) for a, b in runs)
    return text if text.isdigit() else f"{{{text}}}"


def _dtype(tensors: list[Stored], problems: list[str]) -> str:
    wide = [t for t in tensors if t.dtype == "float64"]
    problems += [
        f"{t.name}: {t}; --dtype says what to round it to" for t in wide
    ]  # fmt: skip
    return "bfloat16" if {t.dtype for t in tensors} == {"bfloat16"} else "float32"


def _check_tied(head: Stored, found: dict[str, Stored]) -> list[str]:
    """A stored head of a tied model must be the embedding."""
    table = found.get("transformer.wte.weight")
    if table is None:
        return []
    if head.shape == table.shape and head.dtype == table.dtype:
        if _equal(head.read(), table.read()):
            return []
    return [
        f"{head.name}: {head} is not transformer.wte.weight ({table}), though the "
        "config ties them (tie_word_embeddings)"
    ]


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    bits = f"u{a.dtype.itemsize}"
    a, b = (np.ascontiguousarray(x).view(bits).reshape(-1) for x in (a, b))
    return all(
        np.array_equal(a[i : i + BLOCK_ELEMENTS], b[i : i + BLOCK_ELEMENTS])
        for i in range(0, a.size, BLOCK_ELEMENTS)
    )


def _not_finite(array: np.ndarray) -> int:
    """How many values are infinite or NaN: those whose exponent is all ones."""
    bits, mask = {4: ("u4", 0x7F800000), 2: ("u2", 0x7F80)}[array.dtype.itemsize]
    flat = np.ascontiguousarray(array).view(bits).reshape(-1)
    return sum(
        int(np.count_nonzero((flat[i : i + BLOCK_ELEMENTS] & mask) == mask))
        for i in range(0, flat.size, BLOCK_ELEMENTS)
    )


def _check_tokenizer(source: Source, cfg: ModelConfig) -> list[str]:
    """The ids of a tokenizer.json must have rows in the embedding."""
    file = next((f for f in source.tokenizer if f.name == "tokenizer.json"), None)
    if file is None:
        return []
    problems: list[str] = []
    raw = read_json(file, problems)
    if raw is None:
        return problems
    try:
        vocab = raw["model"]["vocab"]
        ids = list(vocab.values()) if isinstance(vocab, dict) else range(len(vocab))
        top = max([*ids, *(t["id"] for t in raw.get("added_tokens") or [])])
    except (ValueError, KeyError, TypeError):
        return [f"{file.name}: not a tokenizer.json of Hugging Face tokenizers"]
    if top < cfg.vocab_size:
        return []
    return [f"{file.name}: has ids to {top}, but vocab_size is {cfg.vocab_size}"]


def _error(path: pathlib.Path, problems: list[str]) -> CheckpointError:
    if len(problems) == 1:
        return CheckpointError(problems[0], location=str(path))
    text = f"{len(problems)} problems:\n  " + "\n  ".join(problems)
    return CheckpointError(text, location=str(path))
