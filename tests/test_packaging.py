"""What is installed, by which command: setup.py, constraints.txt, Makefile."""

import ast
import functools
import importlib.util
import os
import pathlib
import re
import shutil
import subprocess
import sys
import tokenize

import pytest
import setuptools
from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

import mpt_jax

ROOT = pathlib.Path(__file__).parents[1]
PYTHONS = ["3.11", "3.12", "3.13"]
EXTRAS = {
    "tpu", "cuda12", "cuda13", "hf", "beam", "gguf", "notebooks", "aot", "aot-cuda",
    "lm-eval", "serve", "dev",
}  # fmt: skip
# Import name -> distribution, where they differ. tensorflow comes with tensorflow-text,
# google.protobuf with tensorflow.
DISTRIBUTIONS = {
    "absl": "absl-py",
    "apache_beam": "apache-beam",
    "orbax": "orbax-checkpoint",
}
# What benchmarks compare with where it is installed; no part of the package uses it.
PEERS = {"datasets", "streaming", "tokamax"}
UNNAMED = {"tensorflow", "google"} | PEERS


@functools.cache
def metadata() -> dict:
    """The arguments that setup.py gives to setup()."""
    spec = importlib.util.spec_from_file_location("mpt_jax_setup", ROOT / "setup.py")
    caught: dict = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(setuptools, "setup", lambda **arguments: caught.update(arguments))
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
    return caught


def requirements() -> list[str]:
    extras = metadata()["extras_require"].values()
    return [
        *metadata()["install_requires"],
        *(line for extra in extras for line in extra),
    ]


def pins(python: str) -> dict[str, str]:
    """Distribution -> version that constraints.txt holds for a Python on Linux."""
    environment = default_environment() | {
        "python_version": python,
        "python_full_version": f"{python}.9",
        "sys_platform": "linux",
    }
    held: dict[str, str] = {}
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if line.startswith("#"):
            continue
        pin = Requirement(line)
        if pin.marker is None or pin.marker.evaluate(environment):
            assert pin.name not in held, f"two pins of {pin.name} on {python}"
            held[pin.name] = str(pin.specifier).removeprefix("==")
    return held


@pytest.mark.parametrize("python", PYTHONS)
def test_constraints_satisfy_setup(python):
    held = pins(python)
    for line in requirements():
        wanted = Requirement(line)
        version = held.get(canonicalize_name(wanted.name))
        assert version is not None, f"{wanted.name} has no pin on Python {python}"
        assert wanted.specifier.contains(version), f"{line}, but {version} on {python}"


@pytest.mark.parametrize(
    ("python", "jax", "libtpu"),
    [
        ("3.11", "0.10.2", "0.0.42"),
        ("3.12", "0.12", "0.0.50"),
        ("3.13", "0.12", "0.0.50"),
    ],
)
def test_constraints_pair_jax_with_its_libtpu(python, jax, libtpu):
    held = pins(python)
    assert held["jax"] == held["jaxlib"]
    assert held["jax"].startswith(jax)
    assert held["libtpu"].startswith(libtpu)  # a TPU program loads no other


def test_constraints_are_exact():
    for python in PYTHONS:
        for name, version in pins(python).items():
            assert re.fullmatch(r"[0-9][0-9a-z.]*", version), f"{name}{version}"


def test_upper_bounds_have_reasons():
    """The comment ends the line of the bound or stands right above it, and names it."""
    with (ROOT / "setup.py").open("rb") as file:
        tokens = list(tokenize.tokenize(file.readline))
    comments = {t.start[0]: t.string for t in tokens if t.type == tokenize.COMMENT}
    bounds = [
        (token.start[0], bound)
        for token in tokens
        if token.type == tokenize.STRING
        for bound in re.findall(r",(<=?[0-9.]+)", token.string)
    ]
    assert len(bounds) >= 15, "this test no longer finds the bounds of setup.py"
    for line, bound in bounds:
        reason, above = comments.get(line, ""), line - 1
        while above in comments:
            reason, above = f"{comments[above]} {reason}", above - 1
        assert f"{bound}: " in reason, f"setup.py:{line}: why {bound}?"


def test_extras_are_the_documented_ones():
    assert set(metadata()["extras_require"]) == EXTRAS


def test_version_is_written_once():
    assert metadata()["version"] == mpt_jax.__version__
    assert mpt_jax.__version__ not in (ROOT / "setup.py").read_text()


def test_every_package_is_shipped():
    written = {
        ".".join(path.parent.relative_to(ROOT).parts)
        for path in (ROOT / "mpt_jax").rglob("*.py")
    }
    assert set(metadata()["packages"]) == written  # a folder without __init__.py is not


def test_every_import_is_required():
    """Whatever the package imports, lazily too, some line of setup.py installs."""
    declared = {canonicalize_name(Requirement(line).name) for line in requirements()}
    for path in sorted((ROOT / "mpt_jax").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module]
            for top in {name.split(".")[0] for name in names}:
                if top in sys.stdlib_module_names or top in UNNAMED | {"mpt_jax"}:
                    continue
                distribution = canonicalize_name(DISTRIBUTIONS.get(top, top))
                assert distribution in declared, f"{path}: {top} is in no requirement"


def make(*arguments: str) -> subprocess.CompletedProcess[str]:
    """Runs make as a user would, also when these tests run under make."""
    outer = {"MAKEFLAGS", "MAKELEVEL", "MFLAGS", "PYTHON"}
    environment = {key: os.environ[key] for key in os.environ if key not in outer}
    return subprocess.run(
        ["make", *arguments], cwd=ROOT, env=environment, capture_output=True, text=True
    )


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
def test_make_lists_every_target():
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.M)
    assert re.findall(r"make ([a-z-]+)", make().stdout) == phony[1].split()


@pytest.mark.skipif(shutil.which("make") is None, reason="needs make")
@pytest.mark.parametrize("target", ["train", "test"])
def test_make_refuses_a_python_that_does_not_run(tmp_path, target):
    venv = tmp_path / "venv"
    done = make(target, "PYTHON=/nowhere/python", f"VENV={venv}")
    assert done.returncode == 2  # make's code for a recipe that failed
    assert "needs Python 3.11, 3.12 or 3.13" in done.stderr
    assert f"make PYTHON=/path/to/python3.12 {target}" in done.stderr
    assert not venv.exists()


def test_tree_names_no_registry_host():
    # pip's own settings say where packages come from; split, or this file is a match.
    hosts = re.compile("pypi" r"\.org|pythonhosted" r"\.org|--(extra-)?index" "-url")
    kinds = {
        ".py",
        ".txt",
        ".toml",
        ".md",
        ".sh",
        ".yaml",
        ".yml",
        ".ipynb",
        ".cfg",
        "",
    }
    files = [
        path
        for path in ROOT.rglob("*")
        if not any(part in (".git", ".venv", "runs") for part in path.parts)
        and path.suffix in kinds
        and path.is_file()
    ]
    assert ROOT / ".ci/run" in files
    for path in files:
        found = hosts.search(path.read_text(errors="replace"))
        assert found is None, f"{path} names {found}"
