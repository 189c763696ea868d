"""Reading ptxas and nvdisasm, and the gates around them."""

from __future__ import annotations

import pytest

from mpt_jax.bench import attention_static, static_gpu
from mpt_jax.errors import UserError

# As nvdisasm prints it: an outer loop, an inner one that multiplies, one that does not.
SASS = """\
.L_x_1:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
.L_x_2:
        /*0010*/                   HMMA.16816.F32.BF16 R4, R8, R12, R4 ;
        /*0020*/                   FFMA.FTZ R2, R3, R4, R5 ;
        /*0030*/              @!P0 BRA `(.L_x_2) ;
.L_x_3:
        /*0040*/              @!P1 BRA `(.L_x_3) ;
        /*0050*/              @!P2 BRA `(.L_x_1) ;
        /*0060*/                   EXIT ;
"""


def test_the_loop_counted_is_the_inner_one_that_multiplies():
    lines = static_gpu._inner_loop(SASS)
    assert [line.split()[0] for line in lines] == [
        "HMMA.16816.F32.BF16",
        "FFMA.FTZ",
        "@!P0",
    ]


def row(kernel: str, *, spills: int, per_tile: int) -> dict:
    return {
        "chip": "H100", "case": "alibi", "kernel": kernel, "spill_bytes": spills,
        "per_128x64": per_tile,
    }  # fmt: skip


def test_gates_are_no_spills_and_the_forwards_instructions():
    rows = [row("forward", spills=0, per_tile=381), row("dq", spills=8, per_tile=999)]
    missed = [gate for gate in static_gpu.gates(rows) if gate[1] > gate[2]]
    assert missed == [
        ("H100 dq (alibi) spilled bytes", 8, 0),
        ("H100 forward instructions per 128x64", 381, 380),
    ]


def test_a_chip_unknown_here_is_named():
    with pytest.raises(UserError, match="--only: got 'B200', expected one of"):
        static_gpu.measure("B200")


def test_help_and_a_missing_compiler(monkeypatch, capsys):
    assert attention_static.main(["--help"]) == 0
    assert "no figure here is a speed" in capsys.readouterr().out.replace("\n", " ")
    monkeypatch.setattr(static_gpu, "PACKAGES", ("no-such-package",))
    assert attention_static.main(["--platform", "gpu"]) == 2
    assert "no-such-package is not installed" in capsys.readouterr().err
