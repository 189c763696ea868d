"""Peak memory of a conversion: one tensor, however large the model is."""

import json

import pytest

from mpt_jax.bench import convert
from mpt_jax.config import ModelConfig, parse
from tests.interop import folders

# 151 million parameters in bfloat16, as MPT-1B in shape: 302 MB in files of 60 MB.
FIELDS = folders.PLAIN | {
    "d_model": 512, "n_heads": 4, "n_layers": 47, "vocab_size": 5000,
    "param_dtype": "bfloat16",
}  # fmt: skip
FILE_BYTES = 60_000_000
FACTOR = 1.3


@pytest.mark.slow
def test_peak_memory_is_below_the_largest_file(tmp_path):
    """Mapped pages of the files included."""
    convert.make_folder(
        tmp_path / "src", parse(ModelConfig, FIELDS), file_bytes=FILE_BYTES
    )
    sizes = [f.stat().st_size for f in (tmp_path / "src").glob("*.safetensors")]
    assert len(sizes) > 4
    limit = FACTOR * max(sizes)
    for source, out, format in (
        ("src", "ckpt", "mpt_jax"), ("ckpt", "out", "mosaicml"),
        ("ckpt", "llama", "gguf"), ("llama", "again", "mpt_jax"),
    ):  # fmt: skip
        _, peak = convert.measured(tmp_path / source, tmp_path / out, format)
        assert 0 < peak < limit
    json.loads((tmp_path / "out/config.json").read_text())


@pytest.mark.hf
def test_peak_memory_of_a_torch_pickle_is_far_below_the_file(tmp_path):
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    source = tmp_path / "src"
    convert.make_folder(source, parse(ModelConfig, FIELDS), file_bytes=10**9)
    torch.save(load_file(source / "model.safetensors"), source / "pytorch_model.bin")
    (source / "model.safetensors").unlink()
    _, peak = convert.measured(source, tmp_path / "ckpt", "mpt_jax")
    assert 0 < peak < (source / "pytorch_model.bin").stat().st_size


def test_the_benchmark_measures_every_format(tmp_path, monkeypatch, capsys):
    small = parse(ModelConfig, folders.PLAIN)
    monkeypatch.setattr(convert.presets, "model", lambda name: small)
    file = tmp_path / "result.json"
    arguments = ["--file_gb", "1e-5", "--dir", str(tmp_path), "--out", str(file)]
    arguments += ["--formats", *convert.FORMATS]
    assert convert.main(arguments) == 0
    rows = json.loads(file.read_text())["rows"]
    assert [row["what"] for row in rows] == [
        "copy", "to ours", "to mosaicml", "to hf", "to gguf",
    ]  # fmt: skip
    assert rows[0]["of_copying"] == 1
    assert all(row["peak_mb"] >= 0 for row in rows[1:])
    assert "of_largest_file" in capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [file]
