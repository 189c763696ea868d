"""OpenAI's API for an MPT: ``python -m mpt_jax.serve --checkpoint DIR``.

    python -m mpt_jax.serve --checkpoint ~/mpt-7b-chat --int8 --slots 16
    curl http://127.0.0.1:8000/v1/completions -H 'content-type: application/json' \\
        -d '{"prompt": "MPT is", "max_tokens": 20}'

DIR is a checkpoint of ours, or any folder that the convert verb reads. POST
/v1/completions and /v1/chat/completions, GET /v1/models, /health and /metrics
(Prometheus). SIGTERM finishes what is under way and refuses what is new; a second one
ends at once. SECURITY.md says who may be let near it. Needs the 'serve' extra.
"""

from __future__ import annotations

import argparse
import os
import pathlib
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING

from mpt_jax import verbs
from mpt_jax.errors import UserError, run_verb

if TYPE_CHECKING:
    from mpt_jax.loading import Loaded
    from mpt_jax.serving.app import Service

KEY_VARIABLE = "MPT_JAX_API_KEY"
MIN_KEY_CHARACTERS = 16  # that nobody guesses it over a network


def main(argv: Sequence[str]) -> int:
    def run() -> int:
        flags = make_parser().parse_args(argv)
        _check(flags)
        key = read_key(flags.api_key_file)
        try:
            import uvicorn  # noqa: F401

            from mpt_jax.serving import server
        except ImportError as error:
            message = f"{error}: pip install -c constraints.txt -e '.[serve]'"
            raise UserError(message) from None
        if key is None and not server.is_loopback(flags.host):
            raise UserError(
                f"--host {flags.host} lets others in, and there is no API key: give "
                f"--api-key-file FILE or {KEY_VARIABLE}, or stay on 127.0.0.1"
            )
        # Before the model is loaded, which takes longer than to learn that it is taken.
        with server.bind(flags.host, flags.port) as bound:
            service, facts = make_service(flags, key)
            server.say(f"serving {facts} at {server.url(bound)}/v1")
            drained = server.Server(service, drain=flags.drain)
            return drained.serve_until_done(bound)

    return run_verb(run, show_traceback="--traceback" in argv)


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m mpt_jax.serve", description=__doc__, allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    verbs.add_checkpoint_flags(parser)
    add = parser.add_argument
    add("--model-name", metavar="NAME", help="what clients call it; default DIR's name")
    add("--template", default="auto", help="instruct, instruct-v3, chatml, none (no "
        "chats) or auto: what the model was released with (auto)")  # fmt: skip
    add("--slots", type=int, default=32, metavar="N", help="requests at a time (32)")
    add("--capacity", type=int, metavar="TOKENS", help="of prompt and answer together; "
        "default the model's max_seq_len")  # fmt: skip
    add("--host", default="127.0.0.1", help="(127.0.0.1); others need an API key")
    add("--port", type=int, default=8000, help="(8000); 0 takes a free one")
    add("--api-key-file", metavar="FILE", help="holds the key that clients must send; "
        f"or set {KEY_VARIABLE}")  # fmt: skip
    add("--max-queue", type=int, default=128, metavar="N", help="requests waiting for "
        "a slot; more are answered 429 (128)")  # fmt: skip
    add("--max-body", type=int, default=2_000_000, metavar="BYTES", help="(2000000)")
    add("--timeout", type=float, default=600, metavar="SECONDS",
        help="for a whole answer (600)")  # fmt: skip
    add("--read-timeout", type=float, default=30, metavar="SECONDS",
        help="for a client to send its request (30)")  # fmt: skip
    add("--drain", type=float, default=30, metavar="SECONDS",
        help="for what is under way at SIGTERM (30)")  # fmt: skip
    return parser


def _check(flags: argparse.Namespace) -> None:
    """Raises: UserError: every flag that is out of its range."""
    least = {"slots": 1, "capacity": 1, "port": 0, "max_queue": 0, "max_body": 1,
             "timeout": 0.001, "read_timeout": 0.001, "drain": 0}  # fmt: skip
    problems = [
        f"--{name.replace('_', '-')} {value}: expected at least {low}"
        for name, low in least.items()
        if (value := getattr(flags, name)) is not None and not value >= low
    ]
    if flags.port > 65535:
        problems.append(f"--port {flags.port}: expected at most 65535")
    if problems:
        raise UserError("\n".join(problems))


def read_key(file: str | None) -> str | None:
    """The API key; never an argument, which every user of the machine can read.

    Raises: UserError: no such file, or nothing in it that can be a key.
    """
    source = file or f"the environment's {KEY_VARIABLE}"
    if file is not None:
        try:
            key = pathlib.Path(file).expanduser().read_text("ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            reason = getattr(error, "strerror", None) or "not ASCII text"
            raise UserError(
                f"cannot read the API key: {reason}", location=file
            ) from None
    elif KEY_VARIABLE in os.environ:
        key = os.environ.pop(KEY_VARIABLE)  # no child process needs it
    else:
        return None
    fits = len(key) >= MIN_KEY_CHARACTERS and key.isascii() and key.isprintable()
    if not fits or " " in key:
        message = (
            f"expected a key of at least {MIN_KEY_CHARACTERS} printable ASCII "
            "characters without spaces, such as `openssl rand -hex 32` makes"
        )
        raise UserError(message, location=source)
    return key


def make_service(flags: argparse.Namespace, key: str | None) -> tuple[Service, str]:
    """The loaded and compiled model behind its limits, and a line about it."""
    from mpt_jax import loading
    from mpt_jax.serving import server
    from mpt_jax.serving.app import Limits, Service
    from mpt_jax.serving.jobs import Worker
    from mpt_jax.serving.protocol import Rules

    loaded = loading.load(**verbs.checkpoint_arguments(flags))
    tokenizer = loaded.need_tokenizer()
    template, no_chat = choose_template(flags.template, loaded)
    engine = loaded.engine(
        n_slots=flags.slots, capacity=flags.capacity, tokens_per_call=1
    )
    context, trained = engine.capacity, loaded.cfg.max_seq_len
    if context > trained:
        server.say(
            f"{context} tokens are over the model's max_seq_len of {trained}: "
            "ALiBi extrapolates, and quality may fall"
        )
    engine.warm_up()
    most = flags.slots + flags.max_queue
    rules = Rules(
        model=flags.model_name or loaded.name,
        context=context,
        vocab_size=min(tokenizer.vocab_size, loaded.cfg.vocab_size),
        max_choices=most,
    )
    # Without a key, a web page must not reach the server through a name of its own.
    own = {flags.host, "localhost", "127.0.0.1", "[::1]"} if key is None else None
    service = Service(
        worker=Worker(engine, most=most),
        tokenizer=tokenizer,
        rules=rules,
        limits=Limits(flags.max_body, flags.timeout, flags.read_timeout),
        template=template,
        no_chat=no_chat,
        api_key=key,
        hosts=frozenset(own) if own else None,
    )
    kind = f"template {template.name}" if template else "no template"
    facts = f"{rules.model} ({flags.slots} slots of {context} tokens, {kind})"
    return service, facts


def choose_template(name: str, loaded: Loaded) -> tuple:
    """(template or None, why there is none)."""
    from mpt_jax.generation import templates

    if name == "none":
        return None, "it was started with --template none"
    wanted = None if name == "auto" else name
    try:
        found = templates.choose(
            wanted, name=loaded.name, tokenizer=loaded.need_tokenizer()
        )
    except UserError as error:
        if name != "auto":
            raise
        return None, str(error)  # completions need none
    return found, ""


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
