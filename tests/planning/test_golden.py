"""An all-gather that a change adds shows here, on a laptop and without libtpu.

Rewrite the files with ``python -m tests.planning.golden`` and review the diff.
"""

import json

import pytest

from tests.planning import golden


@pytest.mark.parametrize("mesh", golden.CPU_MESHES, ids=golden.name)
def test_the_step_shards_and_communicates_as_before(mesh):
    path = golden.FOLDER / f"cpu_{golden.name(mesh)}.json"
    assert golden.cpu(mesh) == json.loads(path.read_text())
