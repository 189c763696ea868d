"""Talks with an MPT in the terminal: ``python -m mpt_jax.chat --checkpoint DIR``.

    python -m mpt_jax.chat --checkpoint ~/mpt-7b-chat --int8
    echo "What is ALiBi?" | python -m mpt_jax.chat --checkpoint ~/mpt-7b-instruct

DIR is a checkpoint of ours, or any folder that the convert verb reads. Ctrl-C stops an
answer and keeps what was said; Ctrl-D ends. Of each turn only what is new is computed:
the engine keeps the conversation's keys and values.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import json
import pathlib
import secrets
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, TextIO

from mpt_jax import verbs
from mpt_jax.errors import EXIT_OK, CheckpointError, MptError, UserError, run_verb

if TYPE_CHECKING:
    from mpt_jax.generation.engine import Engine
    from mpt_jax.generation.sampling import Sampling
    from mpt_jax.generation.templates import Message, Template
    from mpt_jax.tokenizer import Tokenizer

QUOTES = '"""'
HELP = f"""\
/reset         forget the conversation (not the system message)
/system TEXT   the system message from now on; without TEXT: show it
/history       show the conversation
/save FILE     write it to a new file, as a line of JSON that finetuning reads
/help          this
/exit          end, as Ctrl-D does
{QUOTES} starts and ends a message of several lines; // starts one with a slash.
Ctrl-C stops an answer and keeps what was said of it."""


def main(argv: Sequence[str]) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m mpt_jax.chat", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        epilog=f"in the session:\n{HELP}",
    )  # fmt: skip
    verbs.add_checkpoint_flags(parser)
    add = parser.add_argument
    add("--system", metavar="TEXT", help="the system message; default the template's")
    add("--template", help="instruct, instruct-v3 or chatml; default: what the model "
        "was released with, or ChatML where the tokenizer knows it")  # fmt: skip
    add("--max-tokens", type=int, default=512, metavar="N", help="of an answer (512)")
    add("--temperature", type=float, default=0.7, metavar="T", help="0 is greedy (0.7)")
    add("--top-p", type=float, default=1.0, metavar="P", help="1 is off (1)")
    add("--seed", type=int, metavar="N", help="default: another one each time")
    add("--context", type=int, metavar="TOKENS", help="that it remembers; default the "
        "model's max_seq_len")  # fmt: skip

    def run() -> int:
        flags = parser.parse_args(argv)
        session, about = _open(flags)
        with verbs.reader_may_leave():
            Shell(session).run(about)
        return EXIT_OK

    return run_verb(run, show_traceback="--traceback" in argv)


def _open(flags: argparse.Namespace) -> tuple[Session, str]:
    from mpt_jax import loading
    from mpt_jax.generation import templates
    from mpt_jax.generation.sampling import Sampling

    seed = secrets.randbits(31) if flags.seed is None else flags.seed
    sampling = Sampling(  # first: it finds mistakes before anything is loaded
        max_tokens=flags.max_tokens,
        temperature=flags.temperature,
        top_p=flags.top_p,
        seed=seed,
    )
    loaded = loading.load(**verbs.checkpoint_arguments(flags))
    tokenizer = loaded.need_tokenizer()
    template = templates.choose(flags.template, name=loaded.name, tokenizer=tokenizer)
    engine = loaded.engine(n_slots=1, capacity=flags.context, grow=True)
    session = Session(
        engine, tokenizer, template, sampling=sampling, system=flags.system
    )
    about = (
        f"{loaded.name} (template {template.name}, {engine.capacity:,} tokens of "
        f"context, seed {seed}). /help lists the commands, Ctrl-D ends."
    )
    return session, about


class Session:
    """A conversation: messages and the engine that answers them; no terminal.

    ``turns``: the messages so far, without the system's, the user's and the
    assistant's in turn. ``forgotten``: how many pairs of them the last say() dropped.
    ``cut``: whether its answer ended by max_tokens or at the context's end.
    """

    def __init__(
        self,
        engine: Engine,
        tokenizer: Tokenizer,
        template: Template,
        *,
        sampling: Sampling,
        system: str | None = None,
    ):
        from mpt_jax.generation import templates

        self.engine, self.tokenizer, self.template = engine, tokenizer, template
        stops = templates.stop_ids(template, tokenizer)
        self.sampling = dataclasses.replace(sampling, stop_ids=stops)
        self.system = template.default_system if system is None else system
        self.turns: list[Message] = []
        self.forgotten, self.cut, self._asked = 0, False, 0

    @property
    def messages(self) -> list[Message]:
        """The system message, if there is one, and the turns."""
        system = [{"role": "system", "content": self.system}] if self.system else []
        return system + self.turns

    def reset(self) -> None:
        self.turns = []

    def say(self, content: str) -> Iterator[str]:
        """Yields the answer to ``content`` as it comes, "" where nothing came yet.

        It computes one step between two yields, and may be closed at any of them: the
        turns then hold what was said until there, or nothing if nothing was.

        Raises: UserError: the message alone does not fit into the context.
          CheckpointError: what the engine met, such as logits that are not finite.
        """
        from mpt_jax.generation.engine import Request
        from mpt_jax.generation.text import Stream

        prompt = self._fit(content)
        room = self.engine.capacity - len(prompt)
        self._asked += 1
        sampling = dataclasses.replace(
            self.sampling,
            max_tokens=min(self.sampling.max_tokens, room),
            seed=self.sampling.seed + self._asked,
        )
        stream = Stream(self.tokenizer, prompt_ids=prompt)
        self.cut, ended, id = False, False, str(self._asked)
        self.engine.submit(Request(id, prompt, sampling))
        try:
            while not ended:
                part = ""
                for event in self.engine.step():
                    if event.finish_reason == "error":
                        raise CheckpointError(event.error)
                    part += stream.push(event.ids)
                    ended = event.finish_reason is not None
                    self.cut = event.finish_reason == "length"
                yield part + (stream.finish() if ended else "")
        finally:
            self.engine.cancel(id)
            while not self.engine.idle:  # so that it is free for the next message
                self.engine.step()
            if stream.text or ended:
                self.turns += [
                    {"role": "user", "content": content},
                    {"role": "assistant", "content": stream.text},
                ]

    def _fit(self, content: str) -> list[int]:
        """The prompt's ids. Where they leave an answer no room, the oldest turns go.

        So many that half of the context is free: each time they do, the prompt starts
        otherwise than the one before and is computed anew.
        """
        capacity = self.engine.capacity
        room = limit = capacity - min(self.sampling.max_tokens, capacity // 4)
        turns = self.turns
        while len(ids := self._prompt(turns, content)) > limit and turns:
            turns, limit = turns[2:], min(room, capacity // 2)
        if len(ids) > room:
            raise UserError(
                f"the message is too long: {len(ids):,} tokens of prompt, where a "
                f"context of {capacity:,} has room for {room:,} beside an answer"
            )
        self.forgotten = (len(self.turns) - len(turns)) // 2
        self.turns = turns
        return ids

    def _prompt(self, turns: Sequence[Message], content: str) -> list[int]:
        from mpt_jax.generation import templates

        system = {"role": "system", "content": self.system}
        messages = [system, *turns, {"role": "user", "content": content}]
        return templates.render(messages, self.template, self.tokenizer)


class Shell:
    """A session in a terminal, or in a pipe: then each line of stdin is a message.

    Answers go to ``out``, all else to ``err``.
    """

    def __init__(
        self,
        session: Session,
        *,
        read: Callable[[str], str] | None = None,
        out: TextIO | None = None,
        err: TextIO | None = None,
    ):
        self.session = session
        self.out, self.err = out or sys.stdout, err or sys.stderr
        self.tty = read is None and sys.stdin.isatty()
        self.read = read or _reader(self.tty)

    def run(self, about: str = "") -> None:
        """Until /exit or the end of the input."""
        if self.tty and about:
            self.note(about)
        while True:
            try:
                message = self._message()
                if not message.strip():
                    continue
                if message.startswith("/") and not message.startswith("//"):
                    if not self.command(message):
                        return
                else:
                    self.answer(message.removeprefix("/"))
            except EOFError:
                if self.tty:
                    self.note("")
                return
            except KeyboardInterrupt:  # at the prompt: the line is dropped
                self.note("\n(Ctrl-D or /exit ends)")
            except MptError as error:
                self.note(f"{error.kind}: {error}")

    def note(self, text: str) -> None:
        print(text, file=self.err, flush=True)

    def _message(self) -> str:
        line = self.read("> " if self.tty else "")
        if not line.startswith(QUOTES):
            return line
        lines = [line.removeprefix(QUOTES)]
        while not lines[-1].rstrip().endswith(QUOTES):
            lines.append(self.read(". " if self.tty else ""))
        lines[-1] = lines[-1].rstrip().removesuffix(QUOTES)
        return "\n".join(lines).strip("\n")

    def answer(self, content: str) -> None:
        """Shows the answer as it comes; Ctrl-C ends it."""
        with (
            _interrupts() as interrupted,
            contextlib.closing(self.session.say(content)) as parts,
        ):
            for n, part in enumerate(parts):
                if n == 0 and self.session.forgotten:
                    self.note(
                        "(the context is full: the oldest "
                        f"{self.session.forgotten} exchanges are forgotten)"
                    )
                self.out.write(printable(part))
                self.out.flush()
                if interrupted():
                    break
        self.out.write("\n")
        self.out.flush()
        if interrupted():
            self.note("(stopped)")
        elif self.session.cut:
            self.note("(cut off: --max-tokens or the context's end)")

    def command(self, line: str) -> bool:
        """Does what a line with a slash says; False ends the session."""
        session = self.session
        name, _, argument = line.partition(" ")
        argument = argument.strip()
        if name == "/exit":
            return False
        if name == "/help":
            self.note(HELP)
        elif name == "/reset":
            session.reset()
            self.note("(forgotten)")
        elif name == "/system":
            if argument:
                session.system = argument
            self.note(f"system: {printable(session.system) or '(none)'}")
        elif name == "/history":
            for message in session.messages:
                self.note(f"{message['role']}: {printable(message['content'])}")
        elif name == "/save":
            self.save(argument)
        else:
            self.note(f"no command {name}; /help lists them, // sends a slash")
        return True

    def save(self, name: str) -> None:
        if not name:
            raise UserError("/save: expected a file")
        path = pathlib.Path(name).expanduser()
        line = json.dumps({"messages": self.session.messages})
        try:
            with path.open("x", encoding="utf-8") as file:  # never over another file
                file.write(line + "\n")
        except OSError as error:
            raise UserError(
                f"cannot write it: {error.strerror}", location=name
            ) from None
        self.note(f"(written to {path})")


def _reader(tty: bool) -> Callable[[str], str]:
    if tty:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (input() then edits and remembers lines)
        return input

    def read(prompt: str) -> str:
        line = sys.stdin.readline()
        if not line:
            raise EOFError
        return line.rstrip("\r\n")

    return read


# What a terminal would obey rather than show, but for tab and newline.
_CONTROLS = {c: 0x2400 + c for c in range(32) if chr(c) not in "\t\n"}
_CONTROLS |= dict.fromkeys(range(0x7F, 0xA0), 0xFFFD)


def printable(text: str) -> str:
    r"""``text`` without power over the terminal: control characters become pictures.

    >>> printable("a\tb\x1b[2J") == "a\tb\u241b[2J"
    True
    """
    return text.translate(_CONTROLS)


@contextlib.contextmanager
def _interrupts() -> Iterator[Callable[[], bool]]:
    """Notes Ctrl-C, to be acted on between two steps: an exception within one would
    leave the engine without the cache that the step was given."""
    seen = []
    before = signal.signal(signal.SIGINT, lambda number, frame: seen.append(number))
    try:
        yield lambda: bool(seen)
    finally:
        signal.signal(signal.SIGINT, before)


if __name__ == "__main__":
    for stream in (sys.stdin, sys.stdout, sys.stderr):
        stream.reconfigure(encoding="utf-8", errors="replace")
    sys.exit(main(sys.argv[1:]))
