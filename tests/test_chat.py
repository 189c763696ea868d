"""The chat session: what it remembers, what it shows, how Ctrl-C ends an answer."""

import io
import json
import os
import pathlib
import pty
import signal
import subprocess
import sys
import time

import pytest

from mpt_jax import chat, loading
from mpt_jax.errors import CheckpointError, UserError
from mpt_jax.generation import templates
from mpt_jax.generation.engine import Event
from mpt_jax.generation.sampling import Sampling
from mpt_jax.tokenizer import ByteTokenizer
from tests.generation import checkpoint

TEMPLATE = templates.TEMPLATES["instruct"]
WORDS = "one two three four five"


class ScriptedEngine:
    """Says the next of ``answers``, four bytes a step; bytes are its tokens."""

    def __init__(self, *answers: str, capacity: int = 1000):
        self.answers, self.capacity = list(answers), capacity
        self.prompts, self.seeds, self.cancelled = [], [], []
        self.left, self.id = b"", None

    def submit(self, request):
        assert self.idle
        assert len(request.prompt_ids) + request.sampling.max_tokens <= self.capacity
        self.prompts.append(ByteTokenizer().decode(request.prompt_ids))
        self.seeds.append(request.sampling.seed)
        answer = self.answers.pop(0).encode()
        self.reason = "stop" if len(answer) <= request.sampling.max_tokens else "length"
        self.left, self.id = answer[: request.sampling.max_tokens], request.id

    def cancel(self, id):
        if self.id == id:
            self.cancelled.append(id)
            self.left, self.reason = b"", "cancelled"

    def step(self):
        ids, self.left = tuple(self.left[:4]), self.left[4:]
        event = Event(self.id, ids, finish_reason=None if self.left else self.reason)
        self.id = self.id if self.left else None
        return [event]

    @property
    def idle(self):
        return self.id is None


def make(*answers: str, max_tokens: int = 100, system=None, **keys) -> chat.Session:
    return chat.Session(
        ScriptedEngine(*answers, **keys), ByteTokenizer(), TEMPLATE,
        sampling=Sampling(max_tokens=max_tokens, seed=5), system=system,
    )  # fmt: skip


def talk(session: chat.Session, *lines: str) -> tuple[str, str]:
    """What a shell wrote to stdout and stderr when given these lines."""
    left, out, err = list(lines), io.StringIO(), io.StringIO()

    def read(prompt: str) -> str:
        if not left:
            raise EOFError
        line = left.pop(0)
        if line == "^C":
            raise KeyboardInterrupt
        return line

    chat.Shell(session, read=read, out=out, err=err).run()
    assert session.engine.idle
    return out.getvalue(), err.getvalue()


# ------------------------------------------------------------------------- the session


def test_turns_are_remembered():
    session = make("Hello!", "It is 4.")
    assert "".join(session.say("Hi")) == "Hello!"
    assert "".join(session.say("2+2?")) == "It is 4."
    contents = [m["content"] for m in session.turns]
    assert contents == ["Hi", "Hello!", "2+2?", "It is 4."]
    first, second = session.engine.prompts
    assert second.startswith(first + "Hello!")  # so that the cache is of use
    assert session.engine.seeds == [6, 7]


def test_system_message_is_the_callers_or_the_templates():
    session = make("a", system="Be brief.")
    list(session.say("Hi"))
    assert session.engine.prompts[0].startswith("Be brief.\n\n### Instruction:\nHi")
    session = make("a")
    list(session.say("Hi"))
    assert session.engine.prompts[0].startswith(templates.INTRODUCTION)


def test_an_answer_can_be_closed_and_is_kept_as_far_as_it_came():
    session = make(WORDS, "ok")
    parts = session.say("Count")
    said = next(parts) + next(parts)
    parts.close()
    assert said == WORDS[:8]
    assert session.turns[-1] == {"role": "assistant", "content": said}
    assert session.engine.cancelled == ["1"]
    assert session.engine.idle
    assert "".join(session.say("Go on")) == "ok"
    assert said in session.engine.prompts[1]


def test_an_answer_closed_before_it_began_leaves_nothing():
    session = make("\u00e9" * 8)
    parts = session.say("Count")
    parts.close()
    assert session.turns == []


def test_half_a_character_is_not_shown():
    session = make("abc\u20acdef")  # the euro's three bytes are in two steps
    assert list(session.say("x")) == ["abc", "\u20acde", "f"]


def test_an_answer_ends_at_max_tokens_and_says_so():
    session = make(WORDS, "ok", max_tokens=7)
    assert "".join(session.say("Count")) == WORDS[:7]
    assert session.cut
    assert "".join(session.say("Go on")) == "ok"
    assert not session.cut


def test_the_oldest_turns_go_when_the_context_is_full():
    answers = ["a" * 60] * 6
    session = make(*answers, capacity=500, max_tokens=80)
    for n in range(6):
        list(session.say(f"question {n}"))
        if session.forgotten:
            break
    assert session.forgotten == 3
    assert [m["content"] for m in session.turns[::2]] == ["question 3"]
    assert "question 2" not in session.engine.prompts[-1]
    assert len(session.engine.prompts[-1]) <= 250  # half: it will not happen each time


def test_a_message_longer_than_the_context_is_refused_and_nothing_is_lost():
    session = make("fine", "well", capacity=400)
    list(session.say("Hi"))
    before = list(session.turns)
    with pytest.raises(
        UserError, match=r"too long: \d+ tokens of prompt, where a cont"
    ):
        list(session.say("x" * 400))
    assert session.turns == before
    assert "".join(session.say("Still there?")) == "well"


def test_the_engine_failing_is_an_error_not_an_answer():
    session = make("abc")
    step = session.engine.step
    session.engine.step = lambda: (
        step() and [Event("1", finish_reason="error", error="out of memory")]
    )
    with pytest.raises(CheckpointError, match="out of memory"):
        list(session.say("Hi"))
    assert session.turns == []


# --------------------------------------------------------------------------- the shell


def test_answers_go_to_stdout_and_nothing_else():
    out, err = talk(make("Hello!", "Bye!"), "Hi", "", "  ", "Bye", "/exit", "unread")
    assert out == "Hello!\nBye!\n"
    assert err == ""


def test_a_message_of_several_lines():
    session = make("ok", "ok", "ok")
    talk(session, '"""', "a", "  b", '"""', '"""one line"""', '"""x', 'y"""')
    assert [m["content"] for m in session.turns[::2]] == ["a\n  b", "one line", "x\ny"]


def test_two_slashes_send_one():
    session = make("ok")
    talk(session, "//etc is a folder")
    assert session.turns[0]["content"] == "/etc is a folder"


def test_commands(tmp_path):
    file = tmp_path / "talk.jsonl"
    session = make("Hello!", "Hm.")
    out, err = talk(
        session, "/system", "/system Be kind.", "Hi", "/history", f"/save {file}",
        f"/save {file}", "/save", "/save /no/where", "/help", "/nonsense", "/reset",
        "/history", "Again",
    )  # fmt: skip
    assert out == "Hello!\nHm.\n"
    assert f"system: {templates.INTRODUCTION}\nsystem: Be kind.\n" in err
    assert "system: Be kind.\nuser: Hi\nassistant: Hello!\n" in err
    assert f"error: {file}: cannot write it: File exists" in err
    assert "error: /save: expected a file" in err
    assert "error: /no/where: cannot write it: No such file or directory" in err
    assert "/reset         forget the conversation" in err
    assert "no command /nonsense; /help lists them" in err
    assert err.endswith("(forgotten)\nsystem: Be kind.\n")
    saved = json.loads(file.read_text())
    assert saved == {"messages": [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
    ]}  # fmt: skip
    assert "Hi" not in session.engine.prompts[1]


def test_interrupt_at_the_prompt_only_drops_the_line():
    out, err = talk(make("Hello!"), "^C", "Hi")
    assert out == "Hello!\n"
    assert "(Ctrl-D or /exit ends)" in err


def test_interrupt_stops_an_answer(monkeypatch):
    session = make(WORDS, "ok")
    step, steps = session.engine.step, []

    def interrupted_step():
        steps.append(1)
        if len(steps) == 2:
            signal.raise_signal(signal.SIGINT)
        return step()

    monkeypatch.setattr(session.engine, "step", interrupted_step)
    before = signal.getsignal(signal.SIGINT)
    out, err = talk(session, "Count", "Go on")
    assert out == WORDS[:8] + "\nok\n"
    assert "(stopped)" in err
    assert session.turns[1]["content"] == WORDS[:8]
    assert signal.getsignal(signal.SIGINT) is before


def test_shell_says_what_it_forgets_and_what_is_cut_off():
    lines = [f"question {n}" for n in range(5)]
    _, err = talk(make(*["a" * 60] * 5, capacity=500, max_tokens=80), *lines)
    assert "(the context is full: the oldest 3 exchanges are forgotten)" in err
    _, err = talk(make(WORDS, max_tokens=5), "Count")
    assert "(cut off: " in err


def test_errors_do_not_end_the_session():
    out, err = talk(make("ok", capacity=400), "x" * 500, "a\ud800", "Hi")
    assert out == "ok\n"
    assert "error: the message is too long" in err
    assert "data error: character" in err
    assert "lone surrogate" in err


def test_a_model_cannot_command_the_terminal():
    out, _ = talk(make("a\x1b]0;owned\x07b\x9b2J\r\n\tc"), "Hi")
    assert out == "a\u241b]0;owned\u2407b\ufffd2J\u240d\n\tc\n"


# ----------------------------------------------------------------------------- the verb


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> pathlib.Path:
    path = tmp_path_factory.mktemp("models") / "mpt-7b-chat"
    checkpoint.write(path)
    return path


@pytest.mark.slow  # compiles
def test_a_turn_reads_only_what_is_new(folder):
    loaded = loading.load(folder)
    template = templates.choose(None, name=loaded.name, tokenizer=loaded.tokenizer)
    assert template is templates.RELEASED["mpt-7b-chat"]
    engine = loaded.engine(n_slots=1, capacity=1024, grow=True)
    session = chat.Session(
        engine, loaded.tokenizer, template,
        sampling=Sampling(max_tokens=8, temperature=0.0),
    )  # fmt: skip
    first = "".join(session.say("Hi"))
    assert engine.counters.cached_tokens == 0
    read = engine.counters.prompt_tokens
    list(session.say("And?"))
    assert engine.counters.cached_tokens >= read
    # The same conversation in a new engine: the cache changed nothing.
    session.engine = loaded.engine(n_slots=1, capacity=1024)
    again = session.turns[-1]["content"]
    session.turns = session.turns[:2]
    assert session.turns[1]["content"] == first
    assert "".join(session.say("And?")) == again


def start(folder: pathlib.Path, *flags: str, **keys) -> subprocess.Popen:
    command = [sys.executable, "-m", "mpt_jax.chat", "--checkpoint", str(folder)]
    environment = os.environ | {"TERM": "dumb"}
    return subprocess.Popen([*command, *flags], env=environment, **keys)


@pytest.mark.slow  # a program
def test_a_pipe_gives_one_answer_for_each_line(folder):
    pipe = subprocess.PIPE
    process = start(
        folder, "--max-tokens=5", "--seed=1", stdin=pipe, stdout=pipe, stderr=pipe
    )
    out, err = process.communicate(b"Hi\n/history\nBye\n")
    assert process.returncode == 0, err
    assert out.endswith(b"\n")
    assert b"user: Hi\nassistant: " in err


@pytest.mark.slow  # a program
def test_ctrl_c_in_a_terminal(folder):
    """It stops the answer, not the session; Ctrl-D ends that with code 0."""
    ours, theirs = pty.openpty()
    process = start(
        folder, "--max-tokens=4000", "--seed=1", stdin=theirs, stdout=theirs,
        stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    shown = b""

    def wait_for(text: bytes) -> None:
        nonlocal shown
        end = time.monotonic() + 120
        while text not in shown:
            assert time.monotonic() < end, shown
            shown += os.read(ours, 1000)
        shown = shown.partition(text)[2]

    try:
        wait_for(b"/help lists the commands")
        wait_for(b"> ")
        os.write(ours, b"Hi\n")
        wait_for(b"Hi\r\n")
        while len(shown) < 20:  # the answer has begun
            shown += os.read(ours, 1000)
        os.kill(process.pid, signal.SIGINT)
        wait_for(b"(stopped)")
        wait_for(b"> ")
        os.write(ours, b"/history\n")
        wait_for(b"user: Hi\r\nassistant: ")
        wait_for(b"> ")
        os.write(ours, b"\x04")
        assert process.wait(30) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)


@pytest.mark.parametrize(
    ("flags", "problem"),
    [
        ([], "--checkpoint"),
        (["--checkpoint", "/no/where"], "/no/where"),
        (["--checkpoint", "/no/where", "--temperature", "-1"], "temperature"),
    ],
)
def test_mistakes_are_one_line(flags, problem, capsys):
    assert chat.main(flags) in (2, 4)
    assert problem in capsys.readouterr().err.splitlines()[-1]
