"""Real data for the tests that want some: a folder that is not part of this repository.

MPT_JAX_TEST_DATA names it; otherwise it is shared/data beside the checkout. The tests
that need it are skipped where it is absent.
"""

import os
import pathlib

import pytest

BESIDE = pathlib.Path(__file__).parents[2].parent / "shared" / "data"


@pytest.fixture(scope="session")
def shared_data() -> pathlib.Path:
    folder = pathlib.Path(os.environ.get("MPT_JAX_TEST_DATA") or BESIDE)
    if not (folder / "pretrain").is_dir():
        pytest.skip(f"no test data in {folder}; set MPT_JAX_TEST_DATA")
    return folder
