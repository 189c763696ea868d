"""The verb's own decisions; tests/faults/test_server.py runs it whole."""

import types

import pytest

from mpt_jax import serve
from mpt_jax.errors import UserError
from mpt_jax.tokenizer import ByteTokenizer

KEY = "0123456789abcdef"


def test_the_key_comes_from_a_file_or_the_environment(tmp_path, monkeypatch):
    monkeypatch.delenv(serve.KEY_VARIABLE, raising=False)
    assert serve.read_key(None) is None
    (tmp_path / "key").write_text(f"{KEY}\n")
    assert serve.read_key(str(tmp_path / "key")) == KEY
    monkeypatch.setenv(serve.KEY_VARIABLE, KEY)
    assert serve.read_key(None) == KEY
    assert serve.read_key(None) is None  # no child process inherits it


def test_a_key_in_the_environment_is_checked_and_not_shown(monkeypatch):
    monkeypatch.setenv(serve.KEY_VARIABLE, "short")
    with pytest.raises(UserError, match="environment's MPT_JAX_API_KEY: expected") as e:
        serve.read_key(None)
    assert "short" not in str(e.value)


def model(name):
    return types.SimpleNamespace(name=name, need_tokenizer=ByteTokenizer)


def test_the_template_is_what_the_model_was_released_with():
    found, _ = serve.choose_template("auto", model("my-mpt-7b-instruct"))
    assert found.name == "instruct"
    found, why = serve.choose_template("auto", model("mpt-7b"))
    assert found is None
    assert "choose a --template" in why
    assert serve.choose_template("none", model("mpt-7b-instruct"))[0] is None
    found, _ = serve.choose_template("instruct", model("mpt-7b"))
    assert found.name == "instruct"


def test_a_template_that_cannot_be_is_an_error():
    with pytest.raises(UserError, match="no template 'x'"):
        serve.choose_template("x", model("mpt-7b"))
    with pytest.raises(UserError, match=r"<\|im_start\|>"):
        serve.choose_template("chatml", model("mpt-7b"))
