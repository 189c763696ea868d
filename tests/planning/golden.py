"""What a training step is made of, as golden files; writes them when run:

python -m tests.planning.golden          (this machine's CPU; any change is a diff)
python -m tests.planning.golden aot      (TPU cuts; needs the aot extra)
"""

import dataclasses
import json
import os
import pathlib
import subprocess
import sys

FOLDER = pathlib.Path(__file__).parents[1] / "golden" / "plans"
ROOT = pathlib.Path(__file__).parents[2]

TINY = {
    "d_model": 64, "n_heads": 4, "n_layers": 2, "max_seq_len": 64, "vocab_size": 512,
    "no_bias": True, "attn_config": {"alibi": True}, "remat": "full",
}  # fmt: skip
CPU_MESHES = (
    {"fsdp": 8},
    {"data": 2, "fsdp": 2, "tensor": 2},
    {"fsdp": 4, "context": 2},
)
# (preset, topology, mesh, sequence length, rows): two layers of each at full width.
AOT_CUTS = (
    ("mpt-7b", "v5e:4x4", "fsdp=16", 2048, 16),
    ("mpt-7b", "v5p:2x2x4", "fsdp=8,tensor=2", 2048, 16),
    ("mpt-7b", "v4:2x2x4", "data=4,fsdp=4", 2048, 16),
    ("mpt-30b", "v5p:2x2x4", "fsdp=16", 8192, 16),
    ("mpt-70b", "v5p:2x2x4", "fsdp=16", 2048, 16),
    ("mpt-7b-storywriter", "v5p:2x2x2", "fsdp=4,context=2", 65536, 4),
)


def name(mesh: dict[str, int]) -> str:
    return "_".join(f"{axis}{size}" for axis, size in mesh.items())


def cut_name(preset: str, topology: str, mesh: str) -> str:
    return f"{preset}_{topology}_{mesh}".translate(str.maketrans(":=,", "___"))


def facts(step, *, counts: bool) -> dict:
    """The collectives of the program, for a diff.

    counts: how many, too: how XLA bundles small ones on a CPU varies with its version.
    """
    figures = step.figures
    return {
        "mesh": figures.mesh,
        "collectives": [
            f"{c.kind} over {'+'.join(c.axes)}: {f'{c.count} x, ' * counts}"
            f"{c.bytes} bytes{', asynchronous' if c.asynchronous else ''}"
            for c in figures.collectives
        ],
    }


def shardings(config, mesh) -> dict[str, str]:
    """Path -> PartitionSpec of every parameter; moments lie as their parameters do."""
    import jax

    from mpt_jax import partitioning
    from mpt_jax.training.step import make_program

    with partitioning.use(mesh):
        struct = make_program(config, mesh).struct
    leaves = jax.tree_util.tree_leaves_with_path(struct.params)
    return {
        jax.tree_util.keystr(path, simple=True, separator="."): str(leaf.sharding.spec)
        for path, leaf in leaves
    }


def cpu(mesh_sizes: dict[str, int]) -> dict:
    """Facts of a tiny model on 8 CPU devices."""
    from mpt_jax import partitioning, presets
    from mpt_jax.config import TrainConfig, parse
    from mpt_jax.planning import compiled
    from mpt_jax.planning.chips import CHIPS
    from mpt_jax.planning.topology import Fabric

    values = presets.config(global_batch_size=16, steps=10)
    values.model.update(TINY)
    values.mesh.update(mesh_sizes)
    config = parse(TrainConfig, values)
    mesh = partitioning.make_mesh(config.mesh)
    fabric = Fabric(CHIPS["h100"], dict(mesh.shape))
    step = compiled.compile_step(config, mesh, fabric)
    return {"shardings": shardings(config, mesh), **facts(step, counts=False)}


def cut_config(preset: str, mesh: str, seq_len: int, rows: int, layers: int):
    """``layers`` layers of a preset."""
    from mpt_jax import plan, presets
    from mpt_jax.config import TrainConfig, parse

    overrides = {
        "model.n_layers": str(layers), "model.remat": "full", "steps": "10",
        "tokens": "none", "global_batch_size": str(rows), "data.seq_len": str(seq_len),
        "optim.schedule.warmup_steps": "2",
    }  # fmt: skip
    values = presets.config(preset)
    return parse(TrainConfig, values, overrides | plan.mesh_overrides(mesh))


def cut(preset: str, topology: str, mesh: str, seq_len: int, rows: int, layers: int):
    """(Facts, configuration, figures) of a cut on a TPU topology, compiled."""
    from mpt_jax.planning import compiled
    from mpt_jax.planning import topology as topologies

    topologies.prepare_environment()
    config = cut_config(preset, mesh, seq_len, rows, layers)
    place = topologies.parse(topology)
    step = compiled.train_step(config, place)
    placed = shardings(config, topologies.make_mesh(config.mesh, place))
    return {"shardings": placed, **facts(step, counts=True)}, config, step.figures


def cut_in_a_child(*args) -> dict:
    """As cut() in a process of its own: libtpu reads its environment once."""
    command = [sys.executable, "-m", "tests.planning.golden", "cut", *map(str, args)]
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout.splitlines()[-1])


def _main(argv: list[str]) -> None:
    if argv[:1] == ["cut"]:
        from mpt_jax.planning import analytic

        preset, topology, mesh, seq_len, rows, layers = argv[1:]
        found, config, figures = cut(
            preset, topology, mesh, int(seq_len), int(rows), int(layers)
        )
        estimate = analytic.train_step(config, figures.n_devices, lanes=128)
        peaks = {"peak": figures.memory.peak, "estimate": estimate.memory.peak}
        state = dataclasses.asdict(figures.memory)
        guess = dataclasses.asdict(estimate.memory)
        print(json.dumps({"facts": found, **peaks, "state": state, "guess": guess}))
        return
    if argv == ["aot"]:
        for args in AOT_CUTS:
            _write(cut_name(*args[:3]), cut_in_a_child(*args, 2)["facts"])
        return
    import jax

    # As tests/conftest.py has it.
    jax.config.update("jax_num_cpu_devices", 8)
    jax.config.update("jax_disable_most_optimizations", True)
    for mesh in CPU_MESHES:
        _write(f"cpu_{name(mesh)}", cpu(mesh))


def _write(stem: str, values: dict) -> None:
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / f"{stem}.json").write_text(json.dumps(values, indent=1) + "\n")


if __name__ == "__main__":
    os.environ.setdefault("JAX_PLATFORMS", "cpu")
    _main(sys.argv[1:])
