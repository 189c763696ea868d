"""The generate verb, as a user runs it."""

import io
import json
import sys

import pytest

from mpt_jax import loading
from mpt_jax.generate import main
from mpt_jax.generation.sampling import Sampling
from tests.interop import folders
from tests.test_loading import letters

MORE = ["--max-tokens", "6", "--temperature", "0"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "mpt-x"
    folders.make(folder, eos_token_id=0)
    (folder / "tokenizer.json").write_text(letters())
    return folder


@pytest.fixture(scope="module")
def want(folder):
    greedy = Sampling(max_tokens=6, temperature=0.0)
    (done,) = loading.generate(loading.load(folder), ["CAD"], greedy)
    return done


def run(capsys, folder, *argv):
    code = main(["--checkpoint", str(folder), *MORE, *map(str, argv)])
    return code, *capsys.readouterr()


def test_the_prompt_comes_as_argument_file_or_stdin(
    capsys, folder, want, tmp_path, monkeypatch
):
    code, out, err = run(capsys, folder, "--prompt", "CAD")
    assert (code, out) == (0, want.text + "\n")
    assert "prompt: 3 tokens" in err
    assert "output: 6 tokens" in err
    (tmp_path / "prompt.txt").write_text("CAD\n")
    _, out, err = run(capsys, folder, "--file", tmp_path / "prompt.txt", "--quiet")
    assert (out, err) == (want.text + "\n", "")
    stdin = io.TextIOWrapper(io.BytesIO(b"CAD"))
    monkeypatch.setattr(sys, "stdin", stdin)
    assert run(capsys, folder)[1] == want.text + "\n"


def test_json_has_all_and_answers_come_in_order(capsys, folder, want):
    _, out, _ = run(capsys, folder, "--prompt", "CAD", "--json", "--logprobs", 2)
    answer = json.loads(out)
    assert (answer["text"], answer["ids"]) == (want.text, list(want.ids))
    assert (answer["finish_reason"], answer["seed"]) == (want.finish_reason, 0)
    assert [p["id"] for p in answer["logprobs"]] == answer["ids"]
    assert all(len(p["top"]) == 2 for p in answer["logprobs"])
    warm = ("--prompt", "CAD", "--json", "--n", 2, "--temperature", 3, "--ignore-eos")
    _, out, _ = run(capsys, folder, *warm)
    answers = [json.loads(line) for line in out.splitlines()]
    assert [a["seed"] for a in answers] == [0, 1]
    assert len({a["text"] for a in answers}) > 1
    _, out, _ = run(capsys, folder, *warm[:2], *warm[3:])
    assert out.startswith(f"--- seed 0\n{answers[0]['text']}\n--- seed 1\n")


def test_a_template_asks_as_a_user_does(capsys, folder):
    """Its letters are not in this vocabulary: what counts is that it is applied."""
    code, _, err = run(capsys, folder, "--prompt", "CAD", "--template", "nobody")
    assert code == 2
    assert "no template 'nobody'; known are instruct" in err


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--prompt", "A", "--top-p", "3"], "top_p: got 3.0"),
        (["--prompt", "A", "--n", "0"], "--n: got 0"),
        (["--prompt", "A", "--logprobs", "1"], "--logprobs: needs --json"),
        (["--prompt", "A", "--mesh", "tensor"], "--mesh: got 'tensor', expected AXIS"),
        (["--prompt", "A", "--mesh", "tensr=2"], "tensr"),
        (["--prompt", "A", "--mesh", "tensor=3"], "does not use 8 devices"),
        (["--file", "nowhere.txt"], "nowhere.txt: cannot be read: No such file"),
        (["--file", __file__ + "c", "--prompt", "A"], "not allowed with"),
    ],
)
def test_mistakes_are_one_line(capsys, folder, argv, message):
    code, out, err = run(capsys, folder, *argv)
    assert (code, out) == (2, "")
    assert message in err
    assert "Traceback" not in err


def test_a_prompt_that_is_not_utf8_is_refused(capsys, folder, tmp_path):
    (tmp_path / "latin1").write_bytes(b"caf\xe9")
    code, _, err = run(capsys, folder, "--file", tmp_path / "latin1")
    assert (code, "latin1: not UTF-8 at byte 3" in err) == (2, True)


def test_who_has_seen_enough_may_leave(folder, monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

        def fileno(self):
            return 1

    monkeypatch.setattr("os.dup2", lambda *_: None)
    monkeypatch.setattr(sys, "stdout", Closed())
    assert main(["--checkpoint", str(folder), *MORE, "--prompt", "CAD"]) == 0
