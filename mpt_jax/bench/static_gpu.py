"""GPU half of bench/attention_static: registers, spills and instructions, from ptxas.

XLA compiles for a GPU that is not there when told its properties, and dumps PTX. ptxas
turns that into machine code and says what registers it took; nvdisasm prints it, and
the innermost loop that multiplies matrices is the one over blocks of keys or queries.
Where official Triton is installed, the same forward by it stands beside ours. All of it
comes from wheels: ``pip install -e .[aot-cuda]``; measured with jax 0.10.2,
CUDA 12.9's ptxas and nvdisasm 13.5.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from typing import Any

from mpt_jax.errors import UserError

PACKAGES = (
    "jax", "jax-cuda12-plugin", "nvidia-cuda-nvcc-cu12", "nvidia-cuda-nvdisasm",
)  # fmt: skip
COLUMNS = (
    "chip", "case", "kernel", "tile", "warps", "registers", "spill_bytes",
    "instructions", "matmul_instructions", "per_128x64",
)  # fmt: skip
KERNELS = ("forward", "dq", "dkv")
BATCH, LENGTH, HEADS = 2, 4096, 4


@dataclasses.dataclass(frozen=True)
class Chip:
    """What XLA asks about a GPU; from NVIDIA's data sheets and CUDA's limits."""

    kind: str
    capability: tuple[int, int]
    arch: str
    cores: int
    fpus_per_core: int
    shared_per_core: int
    l2_bytes: int
    clock_ghz: float
    memory_bandwidth: int

    @property
    def target(self) -> str:
        """XLA's GpuTargetConfigProto as text."""
        major, minor = self.capability
        return f"""
            platform_name: "CUDA" device_description_str: "{self.kind}"
            dnn_version_info {{ major: 9 minor: 10 patch: 0 }}
            gpu_device_info {{
              cuda_compute_capability {{ major: {major} minor: {minor} }}
              core_count: {self.cores} fpus_per_core: {self.fpus_per_core}
              clock_rate_ghz: {self.clock_ghz} l2_cache_size: {self.l2_bytes}
              memory_bandwidth: {self.memory_bandwidth}
              device_memory_size: 85000000000
              shared_memory_per_block: 49152
              shared_memory_per_core: {self.shared_per_core}
              shared_memory_per_block_optin: {self.shared_per_core - 1024}
              registers_per_core_limit: 65536 registers_per_block_limit: 65536
              threads_per_warp: 32 threads_per_block_limit: 1024
              threads_per_core_limit: 2048 block_dim_limit_x: 2147483647
              block_dim_limit_y: 65535 block_dim_limit_z: 65535
            }}"""


CHIPS = {
    "A100": Chip(
        "NVIDIA A100-SXM4-80GB", (8, 0), "sm_80", 108, 64, 167_936, 41_943_040,
        1.41, 2_039_000_000_000,
    ),
    "H100": Chip(
        "NVIDIA H100 80GB HBM3", (9, 0), "sm_90a", 132, 128, 233_472, 52_428_800,
        1.98, 3_352_000_000_000,
    ),
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Case:
    """One call to compile, bfloat16, forward and backward."""

    name: str
    head_dim: int = 128
    alibi: bool = True
    packed: bool = False


CASES = (
    Case("alibi"),
    Case("no bias", alibi=False),
    Case("alibi, packed", packed=True),
    Case("alibi, head_dim 64", head_dim=64),
    Case("alibi, head_dim 112", head_dim=112),
)


def measure(only: str | None = None) -> list[dict[str, Any]]:
    """One row per kernel of every case on every chip, and official Triton's forward.

    The loop counted is the one over blocks that hide nothing. per_128x64 scales its
    instructions to a 128 x 64 tile of 8 warps.

    Raises: UserError: a chip unknown here, a missing wheel, or a failed compile.
    """
    if only not in (None, *CHIPS):
        raise UserError(f"--only: got {only!r}, expected one of {list(CHIPS)}")
    return [row for name in ([only] if only else CHIPS) for row in _chip_rows(name)]


def gates(rows: list[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """No kernel spills; the plain forward's instructions, beside official Triton's."""
    limits = {"A100": 520, "H100": 380}
    spills = [
        (f"{r['chip']} {r['kernel']} ({r['case']}) spilled bytes", r["spill_bytes"], 0)
        for r in rows
        if r["kernel"] in KERNELS
    ]
    return spills + [
        (f"{r['chip']} forward instructions per 128x64", r["per_128x64"], limit)
        for r in rows
        for chip, limit in limits.items()
        if (r["chip"], r["case"], r["kernel"]) == (chip, "alibi", "forward")
    ]


def _chip_rows(name: str) -> Iterator[dict[str, Any]]:
    with tempfile.TemporaryDirectory() as folder:
        here = pathlib.Path(folder)
        for number, tiles in enumerate(_compile(name, folder, _tool("ptxas"))):
            case = CASES[number]
            for kernel in KERNELS:
                ptx = _find_ptx(here, number, kernel)
                row = {"chip": name, "case": case.name, "kernel": kernel}
                yield row | _assembled(ptx, CHIPS[name].arch, tiles[kernel])
            if case.name in ("alibi", "no bias") and _has_triton():
                ptx = here / "triton.ptx"
                ptx.write_text(_triton_ptx(CHIPS[name], case, tiles["forward"]))
                kernel = f"forward, Triton {importlib.metadata.version('triton')}"
                row = {"chip": name, "case": case.name, "kernel": kernel}
                yield row | _assembled(ptx, CHIPS[name].arch, tiles["forward"])


def _assembled(ptx: pathlib.Path, arch: str, tile: list[int]) -> dict[str, Any]:
    cubin = ptx.with_name("kernel.cubin")
    report = _run([_tool("ptxas"), "-v", f"-arch={arch}", ptx, "-o", cubin]).stderr
    loop = _inner_loop(_run([_tool("nvdisasm"), "-c", cubin]).stdout)
    rows, columns, warps, _ = tile
    scale = (128 * 64) / (rows * columns) * warps / 8
    return {
        "tile": f"{rows}x{columns}",
        "warps": warps,
        "registers": _number(r"Used (\d+) registers", report),
        "spill_bytes": _number(r"(\d+) bytes spill stores", report)
        + _number(r"(\d+) bytes spill loads", report),
        "instructions": len(loop),
        "matmul_instructions": sum("MMA" in line for line in loop),
        "per_128x64": round(len(loop) * scale),
    }


def _has_triton() -> bool:
    return importlib.util.find_spec("triton") is not None


def _triton_ptx(chip: Chip, case: Case, tile: list[int]) -> str:
    from mpt_jax.bench import static_triton

    rows, columns, warps, stages = tile
    return static_triton.forward_ptx(
        capability=chip.capability,
        rows=rows,
        columns=columns,
        warps=warps,
        stages=stages,
        alibi=case.alibi,
    )


def _compile(chip: str, folder: str, ptxas: pathlib.Path) -> list[dict[str, list[int]]]:
    """Compiles CASES in a process of its own; the tiles of each kernel, by case."""
    flags = {
        "xla_gpu_cuda_data_dir": ptxas.parents[1],
        "xla_gpu_autotune_level": 0,  # there is no device to time on
        "xla_dump_to": folder,
    }
    xla_flags = " ".join(f"--{name}={value}" for name, value in flags.items())
    env = {**os.environ, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": xla_flags}
    done = _run([sys.executable, "-m", "mpt_jax.bench.static_gpu", chip], env=env)
    return json.loads(done.stdout.splitlines()[-1])


def _run(command: list[Any], **options: Any) -> subprocess.CompletedProcess[str]:
    done = subprocess.run(command, capture_output=True, text=True, **options)
    if done.returncode:
        raise UserError(f"{command[0]} failed: {done.stderr[-2000:]}")
    return done


def _tool(name: str) -> pathlib.Path:
    """From the newest CUDA wheel that has it."""
    spec = importlib.util.find_spec("nvidia")
    roots = list(spec.submodule_search_locations or ()) if spec else []
    found = [p for root in roots for p in pathlib.Path(root).glob(f"*/bin/{name}")]
    if not found:
        raise UserError(
            f"{name} is not installed; pip install -c constraints.txt -e .[aot-cuda]"
        )
    return max(found)


def _find_ptx(folder: pathlib.Path, case: int, kernel: str) -> pathlib.Path:
    for path in folder.glob(f"*jit_case_{case}.*.ptx"):
        if re.search(rf"\.entry {kernel}_kernel\b", path.read_text()):
            return path
    raise UserError(f"XLA dumped no PTX of {kernel} ({CASES[case].name}) in {folder}")


def _number(pattern: str, text: str) -> int:
    return max(int(n) for n in re.findall(pattern, text))


def _inner_loop(sass: str) -> list[str]:
    """Instructions of the shortest innermost loop that multiplies matrices.

    >>> text = '''
    ... .L_x_1:
    ...   /*0000*/  HMMA.16816.F32 R0, R1, R2, R0 ;
    ...   /*0010*/  @P0 BRA `(.L_x_1) ;
    ...   /*0020*/  EXIT ;'''
    >>> len(_inner_loop(text))
    2
    """
    labels: dict[str, int] = {}
    lines: list[str] = []
    for line in sass.splitlines():
        if label := re.match(r"\s*(\.L\w+):", line):
            labels[label[1]] = len(lines)
        elif code := re.search(r"/\*[0-9a-f]{4,}\*/\s+(.*?);", line):
            lines.append(code[1])
    loops = []
    for end, line in enumerate(lines):
        jump = re.search(r"\bBRA\b.*`\((\.L\w+)\)", line)
        if jump and labels.get(jump[1], end + 1) <= end:
            loops.append(range(labels[jump[1]], end + 1))
    inner = [
        [lines[n] for n in loop]
        for loop in loops
        if not any(o != loop and o[0] >= loop[0] and o[-1] <= loop[-1] for o in loops)
    ]
    return min((b for b in inner if any("MMA" in x for x in b)), key=len)


def _child(chip_name: str) -> None:
    import jax
    import jax.numpy as jnp
    import numpy as np
    from jax.experimental import topologies
    from jax.sharding import NamedSharding, PartitionSpec

    from mpt_jax.kernels.attention import Operands, Rule
    from mpt_jax.kernels.attention_gpu import attention_gpu
    from mpt_jax.kernels.tiles import gpu_tiles

    chip = CHIPS[chip_name]
    topology = topologies.get_topology_desc(
        platform="cuda", target_config=chip.target, topology="1x1x1"
    )
    mesh = jax.sharding.Mesh(np.array(topology.devices[:1]), ("x",))
    here = NamedSharding(mesh, PartitionSpec())

    def struct(*shape: int, dtype: str = "bfloat16") -> jax.ShapeDtypeStruct:
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype), sharding=here)

    used = []
    for number, case in enumerate(CASES):

        def run(q, k, v, slopes, ids, case=case):
            operands = Operands(
                slopes_H=slopes if case.alibi else None,
                q_segment_ids_BL=ids if case.packed else None,
                kv_segment_ids_BS=ids if case.packed else None,
            )
            rule = Rule(softmax_scale=case.head_dim**-0.5)
            out, pull = jax.vjp(
                lambda *a: attention_gpu(*a, rule, operands)[0], q, k, v
            )
            return out, pull(out)

        run.__name__ = f"case_{number}"
        tensor = struct(BATCH, LENGTH, HEADS, case.head_dim)
        slopes = struct(HEADS, dtype="float32")
        ids = struct(BATCH, LENGTH, dtype="int32")
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            lowered = jax.jit(run).lower(tensor, tensor, tensor, slopes, ids)
            lowered.compile()
        padded = 64 if case.head_dim <= 64 else 128
        used.append(gpu_tiles(chip.kind, 2, padded)._asdict())
    print(json.dumps(used))


if __name__ == "__main__":
    _child(sys.argv[1])
