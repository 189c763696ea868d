"""Converts MPT checkpoints: ``python -m mpt_jax.convert from|to|inspect``.

    python -m mpt_jax.convert inspect ~/mpt-7b
    python -m mpt_jax.convert from ~/mpt-7b checkpoints/mpt-7b --dtype float32
    python -m mpt_jax.convert to runs/sft/checkpoints ~/my-mpt --format hf

``from`` reads a folder of MosaicML or Hugging Face (config.json with safetensors or
pytorch_model*.bin), mosaic_gpt's names, a Composer checkpoint (.pt) or a .gguf, and
writes a checkpoint for checkpoint.init_from and generate. ``to`` takes one of ours, or
anything that ``from`` reads. One tensor is in memory at a time. No file is executed.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pathlib
import shutil
import sys
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

from mpt_jax.config import ModelConfig, flatten
from mpt_jax.errors import EXIT_OK, run_verb

if TYPE_CHECKING:
    from mpt_jax.interop.write import Parts

FORMATS = ("hf", "mosaicml", "gguf")


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mpt_jax.convert", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument(
        "--traceback", action="store_true", help="show an error's stack"
    )
    verbs = parser.add_subparsers(dest="verb", required=True)
    dtypes = ["float32", "bfloat16"]
    one = verbs.add_parser("from", help="any MPT checkpoint -> ours")
    one.add_argument("source", metavar="SRC")
    one.add_argument("out", metavar="OUT_CHECKPOINT")
    one.add_argument("--dtype", choices=dtypes, help="default: as stored; training "
                     "with param_dtype float32 wants float32")  # fmt: skip
    one = verbs.add_parser("to", help="ours (or any) -> a format")
    one.add_argument("source", metavar="CHECKPOINT")
    one.add_argument("out", metavar="OUT_FOLDER")
    one.add_argument("--format", choices=FORMATS, required=True)
    one.add_argument("--dtype", choices=[*dtypes, "float16"], help="default: as stored")
    one = verbs.add_parser("inspect", help="check a checkpoint and describe it")
    one.add_argument("source", metavar="SRC")

    def run() -> int:
        flags = parser.parse_args([a for a in argv if a != "--traceback"])
        if flags.verb == "inspect":
            print(inspect(flags.source))
        elif flags.verb == "from":
            convert_from(flags.source, flags.out, dtype=flags.dtype)
            print(f"{flags.out}: complete")
        else:
            convert_to(flags.source, flags.out, format=flags.format, dtype=flags.dtype)
            print(f"{flags.out}: complete, and reads back as it was written")
        return EXIT_OK

    return run_verb(run, show_traceback="--traceback" in argv)


def convert_from(
    source: str | pathlib.Path, out: str | pathlib.Path, *, dtype: str | None = None
) -> ModelConfig:
    """Writes a foreign checkpoint as one of ours: parameters, config, tokenizer.

    Args:
      dtype: float32 or bfloat16, rounding to it. Default: bfloat16 where all tensors
        are that, else float32; both exact.
    Returns: the model that ``out`` holds.
    Raises: CheckpointError: all that is wrong with ``source``. UserError: ``out``
      exists.
    """
    from mpt_jax.interop import configs, names, read, store, write
    from mpt_jax.training import stored

    checked, out = read.check(source, dtype=dtype), _absolute(out)
    cfg, found = checked.config, checked.source
    meta = {
        "config": {"model": configs.to_meta(cfg)},
        "converted_from": {"path": str(found.path), "kind": found.kind},
        "tokens": found.tokens,
    }
    n_bytes = write.count_bytes(cfg, cfg.param_dtype)
    with (
        write.unfinished(out, n_bytes=n_bytes) as folder,
        stored.readable_errors("write the checkpoint", _epath(out)),
    ):
        params = store.ParamStore.create(folder, cfg)
        for part, array in _shown(checked.stream(), cfg):
            params.write(part, array)
        (folder / stored.META).write_text(json.dumps(meta, indent=1))
        (folder / stored.TOKENIZER).mkdir()
        for file in found.tokenizer:
            shutil.copyfile(file, folder / stored.TOKENIZER / file.name)
        arrays = stored.describe({"params": names.unflatten(names.structs(cfg))})
        step = int(out.name) if stored.STEP_NAME.fullmatch(out.name) else 0
        stored.write_manifest(_epath(folder), step=step, arrays=arrays)
    return cfg


def convert_to(
    source: str | pathlib.Path,
    out: str | pathlib.Path,
    *,
    format: str,
    dtype: str | None = None,
) -> None:
    """Writes a checkpoint of ours, or any that convert_from() reads, for others.

    Args:
      format: "hf" (transformers' MptForCausalLM gives equal logits), "mosaicml" (every
        model) or "gguf" (llama.cpp).
      dtype: float32, bfloat16 or float16, rounding to it; default as stored.
    Raises: UserError: the format would compute another model, by each such field.
      CheckpointError: all that is wrong with ``source``.
    """
    from mpt_jax import loading
    from mpt_jax.interop import gguf_write, write

    opened, out = loading.open_checkpoint(source), _absolute(out)
    keys: dict[str, Any] = {
        "dtype": dtype or opened.cfg.param_dtype, "tokens": opened.tokens,
        "tokenizer": opened.tokenizer,
    }  # fmt: skip
    parts = _shown(opened.parts, opened.cfg)
    if format == "gguf":
        gguf_write.write_gguf(out, parts, opened.cfg, **keys)
    else:
        write.write_folder(out, parts, opened.cfg, kind=format, **keys)


def inspect(source: str | pathlib.Path) -> str:
    """What a checkpoint is and where it can go, after checking it whole."""
    from mpt_jax import loading, presets
    from mpt_jax.interop import configs
    from mpt_jax.models.mpt import count_params

    opened = loading.open_checkpoint(source)
    cfg, default = opened.cfg, flatten(ModelConfig())
    fields = {
        path: value for path, value in flatten(cfg).items()
        if value != default[path] and path not in configs.OURS
    }  # fmt: skip
    same = [
        name for name in presets.PRESETS
        if _essence(presets.model(name)) == _essence(cfg)
    ]  # fmt: skip
    lines = [
        f"{opened.kind}: {count_params(cfg):,} parameters in {cfg.param_dtype}",
        *([f"the model of {', '.join(same)}"] if same else []),
        *(f"  {path} = {value!r}" for path, value in fields.items()),
        f"tokenizer: {', '.join(f.name for f in opened.tokenizer) or 'none'}",
    ]
    for name, ignored in (("hf", configs.hf_ignores(cfg)), ("mosaicml", []),
                          ("gguf", configs.gguf_ignores(cfg))):  # fmt: skip
        said = "no, as it has " + "; ".join(ignored) if ignored else "yes"
        lines.append(f"can be written as {name}: {said}")
    return "\n".join(lines)


def _essence(cfg: ModelConfig) -> ModelConfig:
    """What is left of a model when how it runs and starts does not matter."""
    from mpt_jax.interop import configs

    plain = {name: getattr(ModelConfig(), name) for name in configs.OURS}
    plain |= {"init_config": ModelConfig().init_config}
    if not cfg.has_wpe:
        plain["learned_pos_emb"] = False
    return dataclasses.replace(cfg, **plain)


def _shown(parts: Parts, cfg: ModelConfig) -> Iterator[Any]:
    """``parts``, with a bar on a terminal."""
    from mpt_jax.interop import names
    from mpt_jax.training.progress import Progress

    total = sum(len(t.parts) for t in names.tensors(cfg).values())
    with Progress(total, unit="array") as progress:
        for done, part in enumerate(parts, start=1):
            yield part
            if progress.live:
                progress.update(done, {})


def _absolute(path: str | pathlib.Path) -> pathlib.Path:
    return pathlib.Path(path).expanduser().absolute()


def _epath(path: pathlib.Path) -> Any:
    from etils import epath

    return epath.Path(path)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
