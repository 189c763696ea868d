"""Peak memory of a conversion: one tensor, however large the model is."""

import json
import subprocess
import sys

import ml_dtypes
import numpy as np
import pytest

from mpt_jax.config import ModelConfig, parse
from mpt_jax.interop import names
from tests.interop import folders

# 151 million parameters in bfloat16, as MPT-1B in shape: 302 MB in files of 60 MB.
FIELDS = folders.PLAIN | {
    "d_model": 512, "n_heads": 4, "n_layers": 47, "vocab_size": 5000
}  # fmt: skip
N_FILES = 5
FACTOR = 1.3

MEASURE = """
import sys, threading, time
import jax
from mpt_jax import convert
from mpt_jax.interop import gguf, read, store, write
from mpt_jax.training import stored
def resident():
    pages = int(open("/proc/self/statm").read().split()[1])
    return pages * 4096
jax.devices()
peak, start, stop = 0, resident(), threading.Event()
def watch():
    global peak
    while not stop.wait(0.005):
        peak = max(peak, resident())
thread = threading.Thread(target=watch)
thread.start()
try:
    source, out, format = sys.argv[1:]
    if format == "mpt_jax":
        convert.convert_from(source, out)
    else:
        convert.convert_to(source, out, format=format)
finally:
    stop.set()
    thread.join()
print(peak - start)
"""


def grown(*argv) -> int:
    command = [sys.executable, "-c", MEASURE, *map(str, argv)]
    return int(subprocess.run(command, check=True, capture_output=True).stdout)


@pytest.mark.slow
def test_peak_memory_is_below_the_largest_file(tmp_path):
    """Mapped pages of the files included."""
    cfg = parse(ModelConfig, FIELDS)
    rng = np.random.default_rng(0)
    arrays = {
        name: rng.standard_normal(t.shape, np.float32).astype(ml_dtypes.bfloat16)
        for name, t in names.tensors(cfg).items()
    }
    folders.write(tmp_path / "src", FIELDS, arrays, n_files=N_FILES)
    files = (tmp_path / "src").glob("*.safetensors")
    limit = FACTOR * max(file.stat().st_size for file in files)
    assert limit < FACTOR * sum(a.nbytes for a in arrays.values()) / (N_FILES - 1)
    assert grown(tmp_path / "src", tmp_path / "ckpt", "mpt_jax") < limit
    assert grown(tmp_path / "ckpt", tmp_path / "out", "mosaicml") < limit
    json.loads((tmp_path / "out/config.json").read_text())
