import json
import pathlib

import pytest

from mpt_jax.bench import scaling
from mpt_jax.errors import EXIT_OK, EXIT_USER

CONFIG = str(pathlib.Path(__file__).parents[2] / "configs/mpt_7b.py")


def test_rows_compare_with_the_first_mesh(tmp_path, capsys):
    out = tmp_path / "scaling.json"
    argv = ["--config", CONFIG, "--topology", "h100:64", "--out", str(out)]
    argv += ["--meshes", "fsdp=64;data=2,fsdp=32;fsdp=32,tensor=2"]
    assert scaling.main(argv) == EXIT_OK
    rows = json.loads(out.read_text())["rows"]
    assert [r["mesh"] for r in rows] == [
        "fsdp=64",
        "data=2,fsdp=32",
        "fsdp=32,tensor=2",
    ]
    assert rows[0]["of_first"] == 1
    assert {"data", "fsdp"} <= set(rows[1])
    assert rows[2]["bytes_per_token"] == rows[2]["fsdp"] + rows[2]["tensor"]
    assert "bytes_per_token" in capsys.readouterr().out


@pytest.mark.parametrize("meshes", ["fsdp", "rows=4", "fsdp=-1"])
def test_a_mesh_that_is_none_is_refused(meshes, capsys):
    argv = ["--config", CONFIG, "--topology", "h100:8", "--meshes", meshes]
    assert scaling.main(argv) == EXIT_USER
    assert "AXIS=SIZE" in capsys.readouterr().err
