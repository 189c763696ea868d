"""Whose tensor is which parameter: MosaicML's names and ours.

torch stores a linear map as (out, in) and names every layer; we store (in..., out...)
with heads apart, stacked on a leading layer axis. Wqkv holds the rows of q, then k,
then v, each with heads outermost. Everything here is a change of view, never of bits.

Source: llm-foundry@8c8dd48:llmfoundry/models/mpt/modeling_mpt.py and
models/layers/attention.py. The names before May 2023 (ln_1, mlp.mlp_up):
llm-foundry@v0.5.0:scripts/misc/convert_examples_ckpt.py.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np

from mpt_jax.config import ModelConfig
from mpt_jax.models import mpt

Path = tuple[str, ...]

# Linear maps, and how many leading dims of our weight are inputs.
_INPUT_DIMS = {
    "Wq": 1, "Wk": 1, "Wv": 1, "out_proj": 2,
    "up_proj": 1, "gate_proj": 1, "down_proj": 1,
}  # fmt: skip
_TABLES = ("wte", "wpe", "lm_head")
_FUSED = ("Wq", "Wk", "Wv")
TIED_HEAD = "lm_head.weight"  # stored by some, though it is wte again


@dataclasses.dataclass(frozen=True)
class Part:
    """One layer of one of our parameters: its path, layer (None: not stacked), shape
    without the layer axis, and how many rows it has in their tensor."""

    path: Path
    layer: int | None
    shape: tuple[int, ...]
    rows: int


@dataclasses.dataclass(frozen=True)
class Tensor:
    """A tensor of theirs: its shape, and the parts whose rows it holds in turn."""

    name: str
    shape: tuple[int, ...]
    parts: tuple[Part, ...]

    @property
    def size(self) -> int:
        return math.prod(self.shape)

    def split(self, array: np.ndarray) -> Iterator[tuple[Part, np.ndarray]]:
        """Our arrays in their ``array``: views of it."""
        start = 0
        for part in self.parts:
            yield part, _to_ours(part, array[start : start + part.rows])
            start += part.rows


def flatten(tree: Mapping[str, Any]) -> dict[Path, Any]:
    """Path -> leaf of nested dicts, in their order."""
    flat: dict[Path, Any] = {}
    for name, child in tree.items():
        if isinstance(child, Mapping):
            flat |= {(name, *path): leaf for path, leaf in flatten(child).items()}
        else:
            flat[(name,)] = child
    return flat


def unflatten(flat: Mapping[Path, Any]) -> dict[str, Any]:
    """Nested dicts of path -> leaf."""
    tree: dict[str, Any] = {}
    for path, leaf in flat.items():
        node = tree
        for name in path[:-1]:
            node = node.setdefault(name, {})
        node[path[-1]] = leaf
    return tree


def structs(cfg: ModelConfig) -> dict[Path, jax.ShapeDtypeStruct]:
    """Path -> shape and dtype of each of our parameters."""
    return flatten(mpt.abstract_params(cfg))


def tensors(cfg: ModelConfig, *, fused: bool = True) -> dict[str, Tensor]:
    """Every tensor of a model under MosaicML's names, layer by layer.

    Args:
      fused: one Wqkv, or Wq, Wk and Wv.
    """
    specs = flatten(mpt.param_specs(cfg))
    found: dict[str, Tensor] = {}

    def add(name: str, *parts: Part) -> None:
        rest = _their_shape(parts[0])[1:]
        rows = sum(part.rows for part in parts)
        found[name] = Tensor(name, (rows, *rest), parts)

    def part(path: Path, layer: int | None) -> Part:
        shape = specs[path].shape[0 if layer is None else 1 :]
        rows = _their_shape(Part(path, layer, shape, 0))[0]
        return Part(path, layer, shape, rows)

    single = [path for path in specs if path[0] != "blocks"]
    stacked = [path for path in specs if path[0] == "blocks"]
    for path in (p for p in single if p[0] in ("wte", "wpe")):
        add("transformer." + ".".join(path), part(path, None))
    for layer in range(cfg.n_layers):
        for path in stacked:
            prefix = f"transformer.blocks.{layer}."
            if not fused or path[-2] not in _FUSED:
                add(prefix + ".".join(path[1:]), part(path, layer))
            elif path[-2] == "Wq":
                each = [part((*path[:-2], w, path[-1]), layer) for w in _FUSED]
                add(f"{prefix}attn.Wqkv.{path[-1]}", *each)
    for path in (p for p in single if p[0] == "norm_f"):
        add("transformer." + ".".join(path), part(path, None))
    if ("lm_head", "weight") in specs:
        add(TIED_HEAD, part(("lm_head", "weight"), None))
    return found


def _matrix(part: Part) -> tuple[int, int] | None:
    """(inputs, outputs) of a linear map's weight; None for anything else."""
    *_, module, kind = part.path
    if kind != "weight" or module not in _INPUT_DIMS:
        return None
    n = _INPUT_DIMS[module]
    return math.prod(part.shape[:n]), math.prod(part.shape[n:])


def _their_shape(part: Part) -> tuple[int, ...]:
    if matrix := _matrix(part):
        return matrix[::-1]
    if part.path[0] in _TABLES:
        return part.shape
    return (math.prod(part.shape),)  # norms and biases over (heads, head_dim) too


def _to_ours(part: Part, array: np.ndarray) -> np.ndarray:
    return (array.T if _matrix(part) else array).reshape(part.shape)


def to_theirs(part: Part, array: np.ndarray) -> np.ndarray:
    """The rows of their tensor that hold our ``array``: a view of it."""
    if matrix := _matrix(part):
        return array.reshape(matrix).T
    return array.reshape(_their_shape(part))


# ---------------------------------------------------------------- names as they occur

# Wrappers around the model: Composer, peft, FSDP, DDP and torch.compile.
_WRAPPERS = re.compile(
    r"(?:^|(?<=\.))(?:base_model|model|module|_orig_mod|_fsdp_wrapped_module)\."
)
_LEGACY = (
    (re.compile(r"\.ln_([12f])\."), r".norm_\1."),
    (re.compile(r"\.mlp\.mlp_(up|down)\."), r".ffn.\1_proj."),
)


def canonical(name: str) -> str:
    """The name that MosaicML gives the tensor today.

    >>> canonical("state.model.model.transformer.blocks.3.mlp.mlp_up.weight")
    'transformer.blocks.3.ffn.up_proj.weight'
    >>> canonical("wte.weight")
    'transformer.wte.weight'
    """
    name = _WRAPPERS.sub("", name.removeprefix("state."))
    if re.match(r"(wte|wpe|blocks|norm_f|ln_f)\.", name):  # the model without its head
        name = f"transformer.{name}"
    for pattern, replacement in _LEGACY:
        name = pattern.sub(replacement, name)
    return name


def is_split(names: Mapping[str, Any]) -> bool:
    """Whether q, k and v are tensors of their own."""
    return any(re.search(r"\.attn\.W[qkv]\.", name) for name in names)
