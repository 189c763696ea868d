"""A text corpus that every machine has: the standard library of the running Python.

``code()`` is its source files, one document each; ``prose()`` is its documentation: the
docstrings of each module together, and the language reference in pydoc_data. A document
belongs to the validation split by the hash of its name, and a module's code and prose
bear the same name: no validation docstring is seen in training code.
"""

from __future__ import annotations

import ast
import functools
import hashlib
import importlib
import os
import platform
import sysconfig
import tokenize
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path

from mpt_jax.data.notes import note
from mpt_jax.errors import DataError

SPLITS = ("train", "validation")

# Not text that someone wrote for a reader: tests, generated tables (encodings is 120
# character maps), other people's packages, and what is prose in a dict (pydoc_data).
SKIPPED_DIRECTORIES = frozenset(
    "test tests idle_test idlelib turtledemo encodings pydoc_data "
    "site-packages dist-packages __pycache__".split()
)
# Build settings: they differ from machine to machine.
SKIPPED_PREFIXES = ("_sysconfigdata", "config-")
# CPython 3.11-3.13 have 421 to 525; Debian's python3-minimal about a third of that.
MIN_FILES = 300


@functools.cache
def code(root: str = "") -> Mapping[str, str]:
    """Source files by path relative to ``root`` (default: the library), sorted.

    Raises: DataError: the library's source is not installed.
    """
    base = Path(root or sysconfig.get_path("stdlib"))
    documents, unreadable = {}, []
    for path in sorted(_python_files(base)):
        try:
            with tokenize.open(path) as file:  # honours the file's declared encoding
                text = file.read()
        except (OSError, SyntaxError, UnicodeDecodeError):
            unreadable.append(path)
            continue
        if text.strip():
            documents[path.relative_to(base).as_posix()] = text
    if unreadable:
        note(
            f"stdlib corpus: skipped {len(unreadable)} unreadable files, the first is "
            f"{unreadable[0]}"
        )
    if len(documents) < MIN_FILES:
        version = ".".join(platform.python_version_tuple()[:2])
        raise DataError(
            "the source of Python's standard library is not installed: "
            f"{len(documents)} modules found, at least {MIN_FILES} expected; on Debian "
            f"or Ubuntu run apt-get install libpython{version}-stdlib",
            location=str(base),
        )
    return documents


@functools.cache
def prose() -> Mapping[str, str]:
    """Docstrings by module path, and the reference by ``topics/NAME``.

    Raises: DataError: the library's source or pydoc_data is not installed.
    """
    documents = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's source
        for name, text in code().items():
            docstrings = list(_docstrings(ast.parse(text)))
            if docstrings:
                documents[name] = "\n\n".join(docstrings) + "\n"
    try:
        topics = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        raise DataError(
            "pydoc_data/topics.py, part of Python's standard library, is not installed",
            location=sysconfig.get_path("stdlib"),
        ) from None
    return documents | {f"topics/{name}": topics[name] for name in sorted(topics)}


def select(documents: Mapping[str, str], split: str) -> dict[str, str]:
    """The documents of "train" or "validation" (about 1 in 20), in the same order."""
    if split not in SPLITS:
        raise ValueError(f"split: expected one of {SPLITS}, got {split!r}")
    held_out = split == "validation"
    return {k: v for k, v in documents.items() if _is_held_out(k) == held_out}


def fingerprint(documents: Mapping[str, str]) -> str:
    """Hash of names and texts, in order: other text is another corpus."""
    digest = hashlib.sha256()
    for item in documents.items():
        digest.update(repr(item).encode())
    return digest.hexdigest()[:16]


def _is_held_out(name: str) -> bool:
    # 13 of 256. By text it is 5.1 to 6.5 % of either task on CPython 3.11, 3.12, 3.13.
    return hashlib.sha256(name.encode()).digest()[0] % 20 == 0


def _python_files(base: Path) -> Iterator[Path]:
    for directory, subdirectories, files in os.walk(base):
        subdirectories[:] = (
            d
            for d in subdirectories
            if d not in SKIPPED_DIRECTORIES and not d.startswith(SKIPPED_PREFIXES)
        )
        for file in files:
            if file.endswith(".py") and not file.startswith(SKIPPED_PREFIXES):
                yield Path(directory, file)


def _docstrings(node: ast.Module | ast.ClassDef | ast.FunctionDef) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, in source order, dedented."""
    if docstring := ast.get_docstring(node):
        yield docstring
    for child in node.body:
        if isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            yield from _docstrings(child)
