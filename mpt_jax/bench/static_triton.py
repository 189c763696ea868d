"""OpenAI's Triton beside ours in bench/attention_static, where it is installed.

The plain FlashAttention 2 forward over blocks that hide nothing, with the bias as ours
has it: slope * column within the block, and the block's distance in the running
maximum. triton.compile() makes PTX for a GPU that is not there.
"""

from __future__ import annotations

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource


@triton.jit
def _forward(
    q_ptr, k_ptr, v_ptr, out_ptr, slope, scale, n_columns,
    ROWS: tl.constexpr, COLUMNS: tl.constexpr, D: tl.constexpr, ALIBI: tl.constexpr,
):  # fmt: skip
    block = tl.program_id(0)
    rows, dims = block * ROWS + tl.arange(0, ROWS), tl.arange(0, D)
    columns = tl.arange(0, COLUMNS)
    q = tl.load(q_ptr + rows[:, None] * D + dims[None, :])
    top = tl.full((ROWS,), -1e30, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    acc = tl.zeros((ROWS, D), tl.float32)
    for start in range(0, n_columns, COLUMNS):
        at = (start + columns[:, None]) * D + dims[None, :]
        k, v = tl.load(k_ptr + at), tl.load(v_ptr + at)
        s = tl.dot(q, tl.trans(k)) * scale
        base = 0.0
        if ALIBI:
            s += slope * columns.to(tl.float32)[None, :]
            base = slope * (start - block * ROWS).to(tl.float32)
        new_top = tl.maximum(top, tl.max(s, 1) + base)
        p = tl.exp2(s - (new_top - base)[:, None])
        shrink = tl.exp2(top - new_top)
        total = total * shrink + tl.sum(p, 1)
        acc = tl.dot(p.to(v.dtype), v, acc * shrink[:, None])
        top = new_top
    out = (acc / total[:, None]).to(q.dtype)
    tl.store(out_ptr + rows[:, None] * D + dims[None, :], out)


def forward_ptx(
    *,
    capability: tuple[int, int],
    rows: int,
    columns: int,
    warps: int,
    stages: int,
    alibi: bool,
    head_dim: int = 128,
) -> str:
    """The bfloat16 forward with this tile; capability as (8, 0)."""
    signature = dict.fromkeys(("q_ptr", "k_ptr", "v_ptr", "out_ptr"), "*bf16")
    signature |= {"slope": "fp32", "scale": "fp32", "n_columns": "i32"}
    constants = {"ROWS": rows, "COLUMNS": columns, "D": head_dim, "ALIBI": alibi}
    signature |= dict.fromkeys(constants, "constexpr")
    # As at a call with aligned pointers and a length that is a multiple of 16.
    names = ("q_ptr", "k_ptr", "v_ptr", "out_ptr", "n_columns")
    order = list(signature)
    attrs = {(order.index(name),): [["tt.divisibility", 16]] for name in names}
    source = ASTSource(_forward, signature, constexprs=constants, attrs=attrs)
    major, minor = capability
    compiled = triton.compile(
        source,
        target=GPUTarget("cuda", 10 * major + minor, 32),
        options={"num_warps": warps, "num_stages": stages},
    )
    return compiled.asm["ptx"]
