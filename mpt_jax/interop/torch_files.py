"""Torch pickles, read by torch's weights-only loader: tensors, and never code."""

from __future__ import annotations

import datetime
import pathlib
import pickle
import re
from collections.abc import Mapping
from typing import Any

import ml_dtypes
import numpy as np

from mpt_jax.errors import UserError
from mpt_jax.interop.formats import DamagedError, Stored

MIN_TORCH = (2, 6)  # before it, weights_only could be made to run code: CVE-2025-32434


class TorchFiles:
    """Torch pickles, mapped for one tensor at a time, of which the pages are read."""

    def __init__(self) -> None:
        self._file: pathlib.Path | None = None
        self._content: Any = None

    def load(self, file: pathlib.Path) -> Any:
        if file != self._file:
            self._file = self._content = None
            self._content, self._file = _load_weights_only(file), file
        return self._content

    def stored(
        self, file: pathlib.Path, *, root: tuple[str, ...] = (), prefix: str = ""
    ) -> list[Stored]:
        torch = _import_torch()

        def tensors() -> Mapping[str, Any]:
            content = self.load(file)
            for key in root:
                content = content.get(key) if isinstance(content, Mapping) else None
            if not isinstance(content, Mapping):
                where = ".".join(root) or "the file"
                raise DamagedError(f"{where} is not a dictionary of tensors")
            return content

        def read(name: str) -> np.ndarray:
            tensor = tensors()[name].detach().contiguous()
            if tensor.dtype == torch.bfloat16:  # numpy has none
                array = tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
            else:
                array = tensor.numpy()
            array = array.copy()
            # Mapped anew each time: pages that were read count as our memory.
            self._file = self._content = None
            return array

        found = []
        for name, tensor in tensors().items():
            if not isinstance(tensor, torch.Tensor):
                raise DamagedError(f"{name} is a {type(tensor).__name__}, not a tensor")
            plain = tensor.layout == torch.strided and not tensor.is_quantized
            dtype = str(tensor.dtype).removeprefix("torch.")
            dtype = dtype if plain else f"{tensor.layout} {dtype}"
            shape = tuple(tensor.shape)
            found.append(
                Stored(prefix + name, file, shape, dtype, lambda n=name: read(n))
            )
        return found


def _import_torch() -> Any:
    try:
        import torch
    except ModuleNotFoundError:
        message = "a torch pickle needs torch: pip install -e '.[hf]'"
        raise UserError(message) from None
    version = tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2])
    if version < MIN_TORCH:
        raise UserError(f"torch {torch.__version__}: its weights-only loader can be "
                        "made to run code (CVE-2025-32434); needs 2.6")  # fmt: skip
    return torch


def _load_weights_only(file: pathlib.Path) -> Any:
    torch = _import_torch()
    if not file.is_file():
        raise DamagedError("missing")
    # What Composer puts beside the weights, all of it plain data: its clock, and
    # numpy's random state.
    reconstruct = np._core.multiarray._reconstruct  # type: ignore[attr-defined]
    harmless = [
        datetime.timedelta, np.ndarray, np.dtype, type(np.dtype(np.uint32)),
        (reconstruct, "numpy.core.multiarray._reconstruct"), reconstruct,
    ]  # fmt: skip
    try:
        with torch.serialization.safe_globals(harmless):
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"(?:GLOBAL|global|class|type) (\w+(?:\.\w+)+)", str(error))
        what = f"it names {found[1]}" if found else "no pickle of tensors alone"
        raise DamagedError(f"refused: {what}; only tensors are loaded, never code"
                           ) from error  # fmt: skip
    except Exception as error:  # torch raises most kinds for a damaged file
        cause = (str(error).splitlines() or [""])[0][:200]
        if "mmap" in cause:
            cause = "written by torch < 1.6, which cannot be mapped; save it again"
        raise DamagedError(f"cannot be read: {type(error).__name__}: {cause}"
                           ) from error  # fmt: skip
