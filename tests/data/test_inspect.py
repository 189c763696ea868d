import numpy as np

from mpt_jax.data import __main__ as inspect
from mpt_jax.data import packing
from mpt_jax.tokenizer import ByteTokenizer
from tests.data.test_prepared import DOCUMENTS, write

EOS = ByteTokenizer.eos_id
CONFIG = """
from ml_collections import ConfigDict
from mpt_jax import presets

def get_config() -> ConfigDict:
    config = presets.config()
    config.steps = 5
    config.global_batch_size = 4
    config.model.vocab_size = 257
    config.data.source = "{source}"
    config.data.prepared = "{prepared}"
    config.data.tasks = ("low", "high")
    config.data.rates = (3.0, 1.0)
    config.data.tokenizer = "bytes"
    config.data.seq_len = 32
    config.data.packing = "bins"
    return config
"""


def test_a_row_is_shown_segment_by_segment():
    text = [*b"hello", EOS, *b"wor", 0, 0]
    segments = [1] * 6 + [2] * 3 + [0] * 2
    batch = packing.as_binned_batch(np.array([text]), np.array([segments]))
    assert inspect.shape(batch) == "1 rows of 11 tokens, 7 of them targets, 2 padding"
    lines = list(inspect.show_row(batch, 0, ByteTokenizer(), width=20))
    assert sorted(lines) == [
        "  padding     [    9,    11)",
        "  segment 1   [    0,     6)      5 targets  'hello|'",
        "  segment 2   [    6,     9)      2 targets  'wor'",
    ]
    [_, first, _] = inspect.show_row(batch, 0, None, width=99)
    assert first.endswith("[104, 101, 108, 108, 111, 256]")


def test_long_text_shows_both_ends():
    assert inspect._shorten("0123456789" * 3, 15) == "01234 ... 56789"
    assert inspect._shorten("0123456789", 10) == "0123456789"


def test_the_verb(tmp_path, capsys):
    folder = write(tmp_path / "prepared", DOCUMENTS)
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(source="prepared", prepared=folder))
    flags = ["--config", str(config), "--batch", "2", "--rows", "2"]
    assert inspect.main([*flags, "--seconds", "0.05"]) == 0
    said = capsys.readouterr().out.splitlines()
    assert said[0] == "prepared data, in the same order for any number of hosts:"
    assert said[3].startswith("batch 2: 4 rows of 32 tokens, ")
    assert [line for line in said if line.startswith("row ")] == [
        "row 0 of low", "row 1 of low",
    ]  # fmt: skip
    assert any(line.startswith("share_of_tokens/low 0.") for line in said)
    assert said[-1].split()[1:3] == ["tokens/s,", "on"]


def test_synthetic_tokens_are_shown_as_ids(tmp_path, capsys):
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(source="synthetic", prepared=""))
    assert inspect.main(["--config", str(config), "--seconds", "0"]) == 0
    said = capsys.readouterr().out
    assert said.startswith("synthetic tokens, in the same order")
    assert "targets  [" in said
