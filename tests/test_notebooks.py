"""The notebooks run from top to bottom, in a fresh process, as a reader would."""

import json
import os
import pathlib
import subprocess
import sys

import pytest

ROOT = pathlib.Path(__file__).parents[1]
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))


def code_cells(path):
    cells = json.loads(path.read_text())["cells"]
    return [cell for cell in cells if cell["cell_type"] == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_is_stored_without_outputs(path):
    assert code_cells(path)
    for cell in code_cells(path):
        assert not cell["outputs"]
        assert cell["execution_count"] is None


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_runs(path, tmp_path):
    """Beside a copy of configs/, so that what it writes is thrown away."""
    cells = [
        "".join(cell["source"])
        for cell in code_cells(path)
        if "install" not in cell["metadata"].get("tags", ())
    ]
    folder = tmp_path / "notebooks"
    folder.mkdir()
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    script = folder / "notebook.py"
    script.write_text("\n".join(cells))
    environment = {
        **os.environ,
        "PYTHONPATH": str(ROOT),
        "MPLBACKEND": "agg",
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",
    }
    done = subprocess.run(
        [sys.executable, script.name],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=900,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert "finished=True" in done.stdout
