"""Archives: no verb unpacks one, and those that are read as files are only read.

An archive where a checkpoint should be is refused, by name, and nothing of it lands on
the disk. What is compressed and read (text in gzip or zstd) is read as a stream.
"""

import ast
import io
import pickle
import re
import tarfile
import zipfile
from pathlib import Path

import pytest

from mpt_jax import convert, loading
from mpt_jax.errors import CheckpointError, UserError
from tests.bad_inputs.test_bad_inputs import outcome

PACKAGE = Path(convert.__file__).parent


def tar(*members: tuple[tarfile.TarInfo, bytes]) -> bytes:
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w") as archive:
        for info, content in members:
            info.size = len(content)
            archive.addfile(info, io.BytesIO(content))
    return stream.getvalue()


def link(name: str, target: str) -> tarfile.TarInfo:
    info = tarfile.TarInfo(name)
    info.type, info.linkname = tarfile.SYMTYPE, target
    return info


def packed(**members: bytes) -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name.replace("__", "/"), content)
    return stream.getvalue()


EVIL = b"evil"
# Name -> (file, content).
ARCHIVES = {
    "a tar of ../": ("m.tar", tar((tarfile.TarInfo("../evil"), EVIL))),
    "a tar of an absolute path": ("m.tar", tar((tarfile.TarInfo("/tmp/evil"), EVIL))),
    "a tar with a link out": (
        "m.tar", tar((link("out", ".."), b""), (tarfile.TarInfo("out/evil"), EVIL))),
    "a zip of ../": ("m.zip", packed(**{"..__evil": EVIL})),
    "a zip of a gigabyte": ("m.zip", packed(**{"config.json": b"\0" * 2**26})),
    "a tar that is called safetensors": (
        "m.safetensors", tar((tarfile.TarInfo("x"), EVIL))),
    "a zip that is called GGUF": ("m.gguf", packed(x=EVIL)),
    "a pickle that is called GGUF": ("m.gguf", pickle.dumps({"x": 1})),
}  # fmt: skip
READERS = {
    "convert": lambda source, out: convert.convert_from(source, out),
    "load": lambda source, out: loading.load(source),
}


@pytest.mark.parametrize("reader", READERS)
@pytest.mark.parametrize("name", ARCHIVES)
def test_an_archive_is_no_checkpoint(name, reader, tmp_path, record_property):
    file, content = ARCHIVES[name]
    inner = tmp_path / "a" / "b"
    inner.mkdir(parents=True)
    (inner / file).write_bytes(content)
    found, error = outcome(lambda: READERS[reader](inner / file, inner / "out"))
    if found == "clear" and file not in str(error):
        found = "unclear"
    record_property("outcome", found)
    assert found == "clear", f"{type(error).__name__}: {error}"
    assert isinstance(error, CheckpointError | UserError)
    assert [p.name for p in tmp_path.rglob("*") if p.is_file()] == [file]


UNPACKERS = {"extractall", "extract", "unpack_archive"}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=str)
def test_nothing_is_unpacked_or_run(path):
    """Nor is a pickle loaded, a shell called or a string evaluated."""
    source = path.read_text()
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.Call):
            continue
        called = ast.unparse(node.func)
        assert called.rpartition(".")[2] not in UNPACKERS, f"{path}: {called}"
        assert called not in ("eval", "exec", "os.system"), f"{path}: {called}"
        assert not re.fullmatch(r"c?[pP]ickle\.loads?|yaml\.load", called), called
        for key in node.keywords:
            said = f"{key.arg}={ast.unparse(key.value)}"
            forbidden = ("shell=True", "allow_pickle=True", "trust_remote_code=True",
                         "weights_only=False")  # fmt: skip
            assert said not in forbidden, f"{path}: {said}"
