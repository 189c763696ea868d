import json
import pathlib

import pytest

from mpt_jax import plan
from mpt_jax.errors import EXIT_OK, EXIT_USER, UserError
from mpt_jax.planning import compiled

ROOT = pathlib.Path(__file__).parents[2]
SEVEN = ["--config", str(ROOT / "configs/mpt_7b.py")]


def test_the_verb_prints_a_table_and_writes_the_same_as_json(tmp_path, capsys):
    out = tmp_path / "plan.json"
    argv = [*SEVEN, "--topology", "h100:64", "--mesh", "fsdp=32,tensor=2"]
    argv += ["--json", str(out), "--config.microbatches=8"]
    assert plan.main(argv) == EXIT_OK
    text = capsys.readouterr().out
    values = json.loads(out.read_text())
    assert "analytic" in text
    assert values["verdict"] in text
    assert values["fits"]
    assert values["mesh"] == {"data": 1, "fsdp": 32, "tensor": 2, "context": 1}
    assert values["command"].startswith("python -m mpt_jax.plan --config")
    kinds = {(c["kind"], *c["axes"]) for c in values["collectives"]}
    assert {("all-gather", "fsdp"), ("all-reduce", "tensor")} <= kinds


def test_what_does_not_fit_is_an_answer_and_not_an_error(capsys):
    argv = [*SEVEN, "--topology", "a100-40:8", "--config.global_batch_size=1024"]
    assert plan.main([*argv, "--config.microbatches=1"]) == EXIT_OK
    assert "nearest change that does: --config.microbatches=" in capsys.readouterr().out


def test_where_nothing_helps_the_answer_is_more_devices(capsys):
    argv = ["--config", str(ROOT / "configs/mpt_70b.py"), "--topology", "a100-40:8"]
    assert plan.main(argv) == EXIT_OK
    assert "take more devices" in capsys.readouterr().out


def test_search_prints_flags_that_plan_takes(capsys):
    argv = [*SEVEN, "--topology", "a100-80:8", "--search"]
    assert plan.main(argv) == EXIT_OK
    _, best, *_ = capsys.readouterr().out.splitlines()
    step, words = best.split()[0], best.split("analytic")[1].split()
    flags = [] if words == ["as", "it", "is"] else words
    assert plan.main([*argv[:-1], *flags]) == EXIT_OK
    assert f"step >= {step} s, MFU" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--topology", "h100:7"], "global_batch_size"),
        (["--topology", "h100:8", "--mesh", "fsdp=4"], "does not fit 8 devices"),
        (["--topology", "h100:8", "--mesh", "fsdp"], "expected AXIS=SIZE"),
        (["--topology", "x100:8"], "none of v4"),
    ],
)
def test_mistakes_are_one_line(argv, says, capsys):
    assert plan.main([*SEVEN, *argv]) == EXIT_USER
    assert says in capsys.readouterr().err


def test_mesh_overrides_refuse_what_is_no_size():
    with pytest.raises(UserError, match="AXIS=SIZE"):
        plan.mesh_overrides("fsdp=many")


@pytest.mark.parametrize(
    ("message", "gib"),
    [
        ("RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 33.97G of "
         "15.75G hbm. Exceeded hbm capacity by 18.22G.", 33.97),
        ("RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for "
         "HLO temporaries (384.00G) exceeds available HBM (95.74G).", 384),
    ],
)  # fmt: skip
def test_the_compiler_says_how_much_it_needed(message, gib):
    error = compiled.too_big(RuntimeError(message), 1.0)
    assert error.needed == pytest.approx(gib * 2**30, rel=1e-6)
    assert compiled.too_big(RuntimeError("INTERNAL: something else"), 1.0) is None
