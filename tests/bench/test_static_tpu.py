"""Reading libtpu's dumps, and the table and gates around it."""

from __future__ import annotations

import pytest

from mpt_jax.bench import attention_static, static_tpu
from mpt_jax.bench.static_tpu import Loop, loop_bodies

# As libtpu 0.0.42 prints it: two nested loops, an empty cycle, a branch in the outer.
BUNDLES = """\
= control target key start
LB: loop body
= control target key end

     0   :  { %1 = smov 0 }
   0x1 LB: > { %2 = vmatmul }
   0x2 LB: >> { %3 = vmatmul }
   0x3   :  {}
   0x4   : >> { %4 = vadd ;;  %5 = vmatmul }
   0x5 PF: > { %6 = vst }
   0x6   :  { %7 = vmatmul }
"""
UTILIZATION = """\
== CAPACTIY:
MXU, XLU, VALU, VPOP, EUP, VLOAD, VLOAD:FILL, VSTORE, VSTORE:SPILL, SALU
    4     3     4     2     1     3     3     1     1     2
== UTILIZATION:
0 0 0 0 0 0 0 0 0 1
2 0 0 0 0 0 0 0 0 0
4 0 0 0 0 0 0 0 0 0
0 0 0 0 0 0 0 0 0 0
2 0 1 0 0 0 0 0 0 0
0 0 0 0 0 0 0 1 0 0
4 0 0 0 0 0 0 0 0 0
"""


def test_loop_bodies_count_empty_cycles_and_leave_out_what_runs_once():
    bodies = loop_bodies(BUNDLES, UTILIZATION)
    assert bodies == [Loop(cycles=1, floor=0.5), Loop(cycles=3, floor=1.5)]


def test_a_dump_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="7 bundles but 6 rows of utilization"):
        loop_bodies(BUNDLES, UTILIZATION.removesuffix("4 0 0 0 0 0 0 0 0 0\n"))


def row(direction: str, case: str, cycles: int) -> dict:
    return {
        "chip": "v5e", "kernel": "ours", "direction": direction, "case": case,
        "tiles": "plain", "cycles": cycles,
    }  # fmt: skip


def test_gates_are_cycles_and_what_the_bias_adds():
    rows = [row("forward", "alibi", 1326), row("forward", "no bias", 1300)]
    gates = {what: (value, limit) for what, value, limit in static_tpu.gates(rows)}
    assert gates == {
        "v5e forward, cycles per tile": (1326, 1300),
        "v5e forward, ALiBi overhead": (0.02, 0.02),
    }


def test_a_missed_gate_is_the_exit_code(monkeypatch, capsys, tmp_path):
    rows = [row("backward", "alibi", 2801), row("backward", "no bias", 2800)]
    monkeypatch.setattr(static_tpu, "measure", lambda only: rows)
    monkeypatch.setattr(static_tpu, "PACKAGES", ("jax",))
    out = tmp_path / "r.json"
    command = ["--platform", "tpu", "--out", str(out)]
    assert attention_static.main(command) == 1
    assert "cycles per tile: 2801 (limit 2800) MISSED" in capsys.readouterr().out
    assert '"met": false' in out.read_text()
    rows[0]["cycles"] = 2800
    assert attention_static.main(command) == 0


def test_a_compiler_that_is_not_installed_says_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(static_tpu, "PACKAGES", ("no-such-package",))
    assert attention_static.main(["--platform", "tpu"]) == 2
    assert "no-such-package is not installed" in capsys.readouterr().err
