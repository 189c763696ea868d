"""Any MPT checkpoint, ready to generate: ours, or one that interop reads."""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from mpt_jax import partitioning
from mpt_jax import tokenizer as tokenizers
from mpt_jax.config import DataConfig, MeshConfig, ModelConfig, parse
from mpt_jax.errors import CheckpointError, DataError, InternalError, UserError
from mpt_jax.generation import memory, text
from mpt_jax.generation.engine import Engine, Request, TokenLogprob
from mpt_jax.generation.sampling import Sampling
from mpt_jax.interop import names, read, store
from mpt_jax.models import mpt, weights
from mpt_jax.models.mpt import Params
from mpt_jax.tokenizer import Tokenizer
from mpt_jax.training import stored

Parts = Iterable[tuple[names.Part, np.ndarray]]


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A model with what belongs to it.

    params: unstacked, in cfg.compute_dtype (or int8). tokenizer: None where the
    checkpoint has none; no_tokenizer says why. eos_ids: end a text. bos_id: starts one,
    where the checkpoint says so. name: of the checkpoint, for people. mesh: where
    params are.
    """

    cfg: ModelConfig
    params: Params
    tokenizer: Tokenizer | None
    eos_ids: tuple[int, ...]
    bos_id: int | None
    name: str
    mesh: Mesh | None = None
    no_tokenizer: str = ""

    def need_tokenizer(self) -> Tokenizer:
        """The tokenizer. Raises: UserError: why there is none, and what to do."""
        if self.tokenizer is None:
            raise UserError(
                f"{self.no_tokenizer}; put a tokenizer.json (or a SentencePiece "
                "tokenizer.model) there, or name one by --tokenizer PATH"
            )
        return self.tokenizer

    def engine(
        self, *, n_slots: int, capacity: int | None = None, **keys: Any
    ) -> Engine:
        """An Engine of this model on its mesh.

        Args: capacity: default max_seq_len. keys: of Engine.
        """
        vocab_size = self.tokenizer.vocab_size if self.tokenizer else None
        with _on(self.mesh):
            return Engine(
                self.cfg, self.params, n_slots=n_slots,
                capacity=capacity or self.cfg.max_seq_len, vocab_size=vocab_size,
                eos_ids=self.eos_ids, **keys,
            )  # fmt: skip


def load(
    path: str | os.PathLike,
    *,
    dtype: str | None = None,
    int8: bool = False,
    mesh: Mesh | str | None = None,
    tokenizer: str | None = None,
) -> Loaded:
    """Loads a checkpoint of ours (a step, or the newest of a run), or a foreign one.

    Args:
      dtype: float32 or bfloat16, of parameters and arithmetic; default bfloat16 on
        accelerators and float32 on CPUs. A bfloat16 checkpoint keeps its matrices so
        in float32 arithmetic on CPUs where that is faster, and as exact.
      int8: keep the matrices as int8 with a scale per output channel.
      mesh: where to put it, or its axes over all devices, as in "fsdp=2,tensor=2";
        default one device.
      tokenizer: a name or file as tokenizer.load() takes it, instead of the
        checkpoint's own.
    Raises: CheckpointError: all that is wrong with it. DataError: of ``tokenizer``.
      UserError: it does not fit in memory, or on the mesh. ConfigError: no mesh.
    """
    mesh = _mesh(mesh) if isinstance(mesh, str) else mesh
    opened = open_checkpoint(path)
    found, why = _tokenizer(opened, tokenizer)
    device = mesh.devices.flat[0] if mesh is not None else jax.devices()[0]
    dtype = dtype or ("float32" if device.platform == "cpu" else "bfloat16")
    # No sharded matrix: its outputs would have to move before its other dims.
    three_pass = (
        dtype == "float32" and opened.cfg.param_dtype == "bfloat16" and mesh is None
        and not int8 and weights.has_bfloat16_tiles()
    )  # fmt: skip
    pack = weights.quantize if int8 else weights.three_pass if three_pass else None
    cfg = dataclasses.replace(
        opened.cfg,
        compute_dtype=dtype,
        param_dtype="bfloat16" if three_pass else dtype,
    )
    if found is not None and found.vocab_size > cfg.vocab_size:
        raise DataError(
            f"has {found.vocab_size} ids, but the model's vocab_size is "
            f"{cfg.vocab_size}: this is the tokenizer of another model",
            location=tokenizer or str(opened.path),
        )
    with _on(mesh):
        _check_split(cfg, mesh)
        params = _place(cfg, opened.parts, pack=pack, int8=int8, name=opened.name)
        params = weights.settle(params)
    eos = opened.tokens.get("eos_token_id")
    eos_ids = {*(eos if isinstance(eos, list) else [eos]), found and found.eos_id}
    return Loaded(
        cfg, params, found, tuple(sorted(i for i in eos_ids if i is not None)),
        opened.tokens.get("bos_token_id"), opened.name, mesh, why,
    )  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Completion:
    """A finished request. prompt_logprobs, logprobs: where asked for."""

    text: str
    ids: tuple[int, ...]
    finish_reason: str
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None


def generate(
    loaded: Loaded,
    prompts: Sequence[str | Sequence[int]],
    sampling: Sampling,
    *,
    n_slots: int = 8,
) -> list[Completion]:
    """Continues each prompt (text, or ids); prompt i draws with seed + i.

    Raises: UserError: a text or stop strings without a tokenizer, an empty prompt, or
      more tokens than learned positions. CheckpointError: logits are not finite.
    """
    requests = []
    for i, prompt in enumerate(prompts):
        if isinstance(prompt, str):
            prompt = encode(loaded, prompt)
        s = dataclasses.replace(sampling, seed=sampling.seed + i)
        requests.append(Request(str(i), prompt, s))
    if not requests:
        return []
    most = max(len(r.prompt_ids) for r in requests) + sampling.max_tokens
    engine = loaded.engine(n_slots=min(n_slots, len(requests)), capacity=most)
    parts: dict[str, list[text.Delta]] = {r.id: [] for r in requests}
    for delta in text.run(engine, loaded.tokenizer, requests):
        parts[delta.id].append(delta)
    return [_joined(deltas, name=loaded.name) for deltas in parts.values()]


def encode(loaded: Loaded, prompt: str) -> list[int]:
    """The ids of a text; of "" the one that a text starts with.

    Raises: UserError: no tokenizer. DataError: a lone surrogate.
    """
    ids = loaded.need_tokenizer().encode(prompt)
    start = loaded.need_tokenizer().eos_id if loaded.bos_id is None else loaded.bos_id
    return ids or [start]


def _joined(deltas: list[text.Delta], *, name: str) -> Completion:
    last = deltas[-1]
    if last.finish_reason == "error":
        raise CheckpointError(last.error, location=name)
    scored = [d.prompt_logprobs for d in deltas if d.prompt_logprobs is not None]
    return Completion(
        "".join(d.text for d in deltas),
        tuple(i for d in deltas for i in d.ids),
        str(last.finish_reason),
        tuple(p for d in deltas for p in d.logprobs),
        scored[0] if scored else None,
    )


# ----------------------------------------------------------------------- what is there


@dataclasses.dataclass(frozen=True)
class Opened:
    """A checkpoint of whatever kind, checked.

    parts: read once. tokens: ids by name. tokenizer: its files, which would lie in
    folder. data: of a training run of ours.
    """

    kind: str
    path: pathlib.Path
    name: str
    cfg: ModelConfig
    parts: Parts
    tokens: dict[str, Any]
    tokenizer: Sequence[pathlib.Path]
    folder: pathlib.Path
    data: dict[str, Any] | None = None


def open_checkpoint(path: str | os.PathLike) -> Opened:
    """A checkpoint of ours, the newest of a run, or anything that interop reads.

    Raises: CheckpointError: all that is wrong with it.
    """
    root = stored.absolute(os.path.expanduser(path))
    if stored.list_steps(root / "checkpoints"):  # the folder of a run
        root = root / "checkpoints"
    ours = (root / stored.MANIFEST).exists() or stored.STEP_NAME.fullmatch(root.name)
    if ours or stored.list_steps(root):
        return _open_ours(stored.open_checkpoint(root))
    checked = read.check(root)
    source = checked.source
    is_file = source.path.is_file()
    return Opened(
        source.kind, source.path, source.path.stem if is_file else source.path.name,
        checked.config, checked.stream(), source.tokens, source.tokenizer,
        source.path.parent if is_file else source.path,
    )  # fmt: skip


def _open_ours(step: stored.StoredStep) -> Opened:
    config, path = step.meta["config"], pathlib.Path(step.path)
    cfg = parse(ModelConfig, config["model"], location=str(path))
    step.check_fit(params=names.unflatten(names.structs(cfg)))

    def parts() -> Iterator[tuple[names.Part, np.ndarray]]:
        with stored.readable_errors("read the parameters", step.path):
            yield from store.ParamStore(step.path).stream(cfg)

    named = (  # runs/NAME/checkpoints/00000100
        p.name
        for p in (path, *path.parents)
        if p.name != "checkpoints" and not stored.STEP_NAME.fullmatch(p.name)
    )
    folder = path / stored.TOKENIZER
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    return Opened(
        "mpt_jax", path, next(named), cfg, parts(), step.meta.get("tokens") or {},
        files, folder, config.get("data"),
    )  # fmt: skip


def _tokenizer(opened: Opened, name: str | None) -> tuple[Tokenizer | None, str]:
    """The tokenizer, or why there is none."""
    if name is not None:
        return tokenizers.load(name), ""
    files = {file.name: file for file in opened.tokenizer}
    if file := files.get("tokenizer.json") or files.get("tokenizer.model"):
        return tokenizers.load(str(file)), ""
    if opened.data is None:
        return None, f"{opened.path}: no tokenizer in {opened.folder}"
    data = parse(DataConfig, opened.data, location=f"{opened.path}: data")
    if data.source == "synthetic":
        return None, f"{opened.path}: trained on synthetic tokens, which are no text"
    from mpt_jax.data import vocab

    try:
        return vocab.load_tokenizer(data), ""
    except DataError as error:
        return None, f"{opened.path}: the tokenizer of its data: {error}"


# ----------------------------------------------------------------------- to the devices


def _place(
    cfg: ModelConfig,
    parts: Parts,
    *,
    pack: Callable[[Params], Params] | None,
    int8: bool,
    name: str,
) -> Params:
    """The unstacked parameters, one in the host's memory at a time; a layer is packed
    as soon as it is whole, so that the devices never hold all in cfg.param_dtype."""
    pack = pack or (lambda params: params)
    mesh, axes = partitioning.current_mesh(), names.flatten(mpt.param_axes(cfg))
    structs = names.structs(cfg)

    def place(path: names.Path, shape: tuple[int, ...]) -> jax.sharding.Sharding:
        if mesh is None:
            return jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
        return partitioning.sharding(mesh, axes[path][-len(shape) :], shape)

    def device_bytes(path: names.Path, s: jax.ShapeDtypeStruct) -> int:
        shape = s.shape[1:] if path[0] == "blocks" else s.shape
        item = 1 if int8 and len(shape) > 1 else s.dtype.itemsize
        n_layers = math.prod(s.shape) // math.prod(shape)
        return math.prod(place(path, shape).shard_shape(shape)) * item * n_layers

    needed = sum(device_bytes(path, s) for path, s in structs.items())
    memory.check(
        needed, f"the model {name}", hint="int8 needs less" if not int8 else ""
    )

    n_leaves = sum(path[0] == "blocks" for path in structs)
    layers: list[dict[names.Path, Any]] = [{} for _ in range(cfg.n_layers)]
    trees: list[Params] = [{} for _ in layers]
    rest: dict[names.Path, Any] = {}
    for part, array in parts:
        array = np.array(array, structs[part.path].dtype)  # theirs may be a view
        on_device = jax.make_array_from_callback(
            part.shape, place(part.path, part.shape), lambda i, a=array: a[i]
        )
        if part.layer is None:
            rest[part.path] = on_device
            continue
        layer = layers[part.layer]
        layer[part.path[1:]] = on_device
        if len(layer) == n_leaves:
            (trees[part.layer],) = pack({"blocks": (names.unflatten(layer),)})["blocks"]
            layer.clear()
    params = pack({**names.unflatten(rest), "blocks": ()})
    return {**params, "blocks": tuple(trees)}


def _check_split(cfg: ModelConfig, mesh: Mesh | None) -> None:
    """Raises: UserError: every dim that the mesh does not divide."""
    axes, problems = names.flatten(mpt.param_axes(cfg)), {}
    for path, struct in names.structs(cfg).items() if mesh is not None else ():
        try:
            partitioning.sharding(mesh, axes[path], struct.shape)
        except InternalError as error:
            problems[error.message] = None  # each once, in order
    if problems:
        shape = ", ".join(f"{axis}={n}" for axis, n in mesh.shape.items())
        raise UserError(f"--mesh: {shape}: " + "; ".join(problems))


def _mesh(axes: str) -> Mesh:
    pairs = [part.partition("=") for part in axes.split(",")]
    try:
        sizes = {axis.strip(): int(size) for axis, _, size in pairs}
    except ValueError:
        message = f"--mesh: got {axes!r}, expected AXIS=N, as in tensor=4"
        raise UserError(message) from None
    return partitioning.make_mesh(parse(MeshConfig, sizes, location="--mesh"))


def _on(mesh: Mesh | None) -> contextlib.AbstractContextManager[Any]:
    return contextlib.nullcontext() if mesh is None else partitioning.use(mesh)
