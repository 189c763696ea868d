"""The shape of the code base, held by its syntax trees: CONTRIBUTING.md says why."""

import ast
import dataclasses
import functools
import pathlib
import subprocess
import sys
import typing

import pytest

from mpt_jax.config import ModelConfig, TrainConfig

ROOT = pathlib.Path(__file__).parents[1]
PACKAGE = ROOT / "mpt_jax"

# A module may import strictly lower rings and its own package.
RINGS = {
    "config": 0, "errors": 0, "presets": 0, "validate": 0, "cli": 0, "verbs": 0,
    "partitioning": 1, "runtime": 1, "durable": 1, "tokenizer": 1, "kernels": 1,
    "models": 2, "objectives": 2, "optim": 2,
    "data": 3, "training": 3, "generation": 3, "interop": 3,
    "planning": 4, "serving": 4, "loading": 4,
    "train": 5, "generate": 5, "serve": 5, "convert": 5, "prepare": 5,
    "plan": 5, "chat": 5, "lm_eval": 5,
    "bench": 6,  # of the verbs, too
}  # fmt: skip
RING_0_MAY_IMPORT_RING_0 = {"config", "presets", "cli"}
# Library -> the only places that may import it.
OWNERS = {
    "tensorflow": {"data"}, "seqio": {"data"}, "tensorflow_datasets": {"data"},
    "tensorflow_text": {"data"},
    "orbax": {"training", "interop"},
    "flax": {"models"},
    "optax": {"optim", "training"},
    "torch": {"interop", "bench"}, "transformers": {"interop", "bench"},
    "safetensors": {"interop"},
    "starlette": {"serving"}, "prometheus_client": {"serving"},
    "uvicorn": {"serving", "serve"},
}  # fmt: skip
MAX_LINES, MAX_KERNEL_LINES = 800, 1000
MAX_FUNCTION_LINES = 80  # with its docstring; the attention op's contract is longer
# What one may have to read below train.py. The formats, the bad rows and the order of
# data are a world of their own, behind the few names of data/feed.py, and so are the
# kernels, behind kernels/attention.py. Many processes, which must not wait for a dead
# or stuck one, took 1,000 lines.
MAX_REACHABLE_LINES = {"data": 3500, "kernels": 2500, "all else": 7600}


@functools.cache
def sources() -> dict[str, ast.Module]:
    return {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): ast.parse(
            path.read_text()
        )
        for path in sorted(PACKAGE.rglob("*.py"))
    }


def imports(tree: ast.AST) -> list[str]:
    """Every module named by an import anywhere in ``tree``, TYPE_CHECKING aside."""
    found = []
    skipped = {
        id(node)
        for parent in ast.walk(tree)
        if isinstance(parent, ast.If) and ast.unparse(parent.test) == "TYPE_CHECKING"
        for child in parent.body
        for node in ast.walk(child)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            found += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            found += [f"{node.module}.{alias.name}" for alias in node.names]
    return found


def room(module: str) -> str:
    parts = module.split(".")
    return parts[1] if len(parts) > 1 else ""


def test_every_module_has_a_ring():
    assert {room(m) for m in sources()} - {"__init__"} <= set(RINGS)


@pytest.mark.parametrize("module", sources())
def test_imports_go_down(module):
    here = room(module)
    for name in imports(sources()[module]):
        there = room(name)
        if not name.startswith("mpt_jax.") or there == here or there not in RINGS:
            continue
        if RINGS[here] == RINGS[there] == 0 and here in RING_0_MAY_IMPORT_RING_0:
            continue
        assert RINGS[there] < RINGS[here], f"{module} imports {name}"


@pytest.mark.parametrize("module", sources())
def test_libraries_stay_in_their_rooms(module):
    for name in imports(sources()[module]):
        owners = OWNERS.get(name.split(".")[0])
        assert owners is None or room(module) in owners, f"{module} imports {name}"


@pytest.mark.parametrize("module", [m for m in sources() if m.endswith("__init__")])
def test_packages_import_nothing(module):
    assert imports(sources()[module]) == []


@pytest.mark.parametrize("module", sources())
def test_files_and_functions_are_short(module):
    path = ROOT / (module.replace(".", "/") + ".py")
    cap = MAX_KERNEL_LINES if room(module) == "kernels" else MAX_LINES
    assert len(path.read_text().splitlines()) <= cap
    for node in ast.walk(sources()[module]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            body = node.body[1:] if ast.get_docstring(node) else node.body
            lines = body[-1].end_lineno - body[0].lineno + 1 if body else 0
            assert lines <= MAX_FUNCTION_LINES, f"{module}.{node.name}: {lines} lines"


def test_little_code_is_reachable_from_train():
    seen, queue = set(), ["mpt_jax.train"]
    while queue:
        module = queue.pop()
        if module in seen or module not in sources():
            continue
        seen.add(module)
        for name in imports(sources()[module]):
            queue += [name, name.rpartition(".")[0]]
    lines = {
        m: len((ROOT / (m.replace(".", "/") + ".py")).read_text().splitlines())
        for m in seen
    }
    by_room = dict.fromkeys(MAX_REACHABLE_LINES, 0)
    for module, n in lines.items():
        by_room[room(module) if room(module) in by_room else "all else"] += n
    for name, most in MAX_REACHABLE_LINES.items():
        assert 1000 < by_room[name] <= most, by_room


def knobs(cls: type = TrainConfig) -> set[str]:
    names = set()
    for field in dataclasses.fields(cls):
        hint = typing.get_type_hints(cls)[field.name]
        names.add(field.name)
        if dataclasses.is_dataclass(hint):
            names |= knobs(hint)
    return names


def test_every_knob_is_read():
    """Outside config.py and validate.py, or through a property of its dataclass."""
    read = set()
    for module, tree in sources().items():
        if room(module) in ("validate", "presets"):
            continue
        attributes = (n for n in ast.walk(tree) if isinstance(n, ast.Attribute))
        names = {n.attr for n in attributes if isinstance(n.ctx, ast.Load)}
        if room(module) == "config":  # properties read for others
            names &= {"kv_n_heads", "attn_type", "head_dim", "expansion_ratio",
                      "ffn_hidden_size", "softmax_scale", "attention_bias",
                      "learned_pos_emb", "logit_scale", "steps", "tokens", "seq_len",
                      "warmup_steps", "warmup_tokens"}  # fmt: skip
        read |= names
    # The mesh's axes are read by their names as data (partitioning.MESH_AXES).
    assert knobs() - read - {"data", "fsdp", "tensor", "context"} == set()


def test_every_knob_has_a_meaning():
    for cls in (TrainConfig, ModelConfig):
        assert all(field.metadata["meaning"] for field in dataclasses.fields(cls))


@pytest.mark.slow  # seconds of imports
def test_machines_without_tensorflow_can_train_and_generate():
    modules = [
        m for m in sources()
        if RINGS.get(room(m), 0) < 3 or room(m) in ("training", "generation", "interop")
    ]  # fmt: skip
    modules = [m.removesuffix(".__init__") for m in modules] + ["mpt_jax.data.feed"]
    code = (
        f"import importlib, sys\nfor m in {modules!r}: importlib.import_module(m)\n"
        "bad = {'tensorflow', 'seqio', 'torch', 'transformers'} & set(sys.modules)\n"
        "assert not bad, bad"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)
