"""What a request may say: JSON bytes -> Ask, or a Refusal that names every mistake.

OpenAI's fields under their names, and those that vLLM adds for what OpenAI lacks
(top_k, min_p, repetition_penalty, min_tokens, stop_token_ids, ignore_eos). A null is
as good as no field. Nothing else is guessed: an unknown field is refused, and so is
one whose meaning this server would not honour.
"""

from __future__ import annotations

import collections
import dataclasses
import difflib
import json
import math
import reprlib
import secrets
from typing import Any, Literal

from mpt_jax.errors import MptError
from mpt_jax.generation.sampling import TOP, Sampling

Kind = Literal["completion", "chat"]

MAX_STOPS, MAX_STOP_CHARACTERS = 16, 256
MAX_MESSAGES = 1000
MAX_BIASES = 1024
MAX_PROBLEMS = 20  # told of one request
ROLES = ("system", "user", "assistant")


@dataclasses.dataclass(eq=False)
class Refusal(Exception):
    """An answer that is an error; ``param`` is the first field that is wrong."""

    status: int
    message: str
    param: str | None = None
    code: str | None = None
    headers: tuple[tuple[str, str], ...] = ()

    def body(self) -> dict[str, Any]:
        kinds = {400: "invalid_request_error", 401: "authentication_error",
                 404: "not_found_error", 429: "rate_limit_error"}  # fmt: skip
        default = "server_error" if self.status >= 500 else kinds[400]
        return {
            "error": {
                "message": self.message,
                "type": kinds.get(self.status, default),
                "param": self.param,
                "code": self.code,
            }
        }


@dataclasses.dataclass(frozen=True)
class Rules:
    """What this server can serve.

    context: tokens of prompt and answer together. vocab_size: ids of the tokenizer.
    max_choices: prompts times n of one request.
    """

    model: str
    context: int
    vocab_size: int
    max_choices: int


@dataclasses.dataclass(frozen=True)
class Ask:
    """A request whose every field is right; the prompt is not tokenised yet.

    prompts: texts or ids, of a completion. messages: of a chat. max_tokens: None is
    whatever the context leaves. logprobs: alternatives a token; None is no logprobs.
    options: the rest of Sampling's fields.
    """

    kind: Kind
    prompts: tuple[str | tuple[int, ...], ...]
    messages: tuple[dict[str, str], ...]
    max_tokens: int | None
    n: int
    logprobs: int | None
    echo: bool
    stream: bool
    include_usage: bool
    options: dict[str, Any]

    def sampling(self, index: int, n_prompt: int, rules: Rules) -> Sampling:
        """Of choice ``index`` of a prompt of ``n_prompt`` tokens.

        Choice i draws with seed + i, so that n = 2 gives what two requests would.
        Raises: Refusal: the prompt and max_tokens are over the context.
        """
        room = rules.context - n_prompt
        wanted = room if self.max_tokens is None else self.max_tokens
        needed = 1 if self.max_tokens is None else wanted
        if n_prompt == 0:
            raise Refusal(400, "prompt: has no tokens; expected at least one", "prompt")
        if needed > room:
            field = "prompt" if self.kind == "completion" else "messages"
            message = (
                f"{field}: {n_prompt} tokens and max_tokens {needed} are over this "
                f"server's context of {rules.context} tokens"
            )
            raise Refusal(400, message, field, "context_length_exceeded")
        options = self.options | {"seed": (self.options["seed"] + index) % 2**63}
        scored = self.echo and (self.logprobs is not None or wanted == 0)
        try:
            return Sampling(
                max_tokens=wanted,
                logprobs=self.logprobs,
                prompt_logprobs=scored,
                **options,
            )
        except MptError as error:
            raise Refusal(400, str(error)) from None


@dataclasses.dataclass(frozen=True)
class Number:
    """A number of [low, high]; ``over``: low itself is too little."""

    low: float
    high: float
    default: Any
    over: bool = False
    whole: bool = False

    def problem(self, value: Any) -> str | None:
        kinds = int if self.whole else int | float
        fits = isinstance(value, kinds) and not isinstance(value, bool)
        if fits and self.low <= value <= self.high:
            if not (self.over and value == self.low):
                return None
        kind = "a whole number" if self.whole else "a number"
        if math.isinf(self.high):
            return f"expected {kind} {'>' if self.over else '>='} {self.low:g}"
        bracket = "(" if self.over else "["
        return f"expected {kind} in {bracket}{self.low:.16g}, {self.high:.16g}]"


def whole(low: int, high: int, default: int | None) -> Number:
    return Number(low, high, default, whole=True)


FLAGS = ("stream", "ignore_eos")
NUMBERS = {
    "temperature": Number(0, 2, 1.0),
    "top_p": Number(0, 1, 1.0, over=True),
    "min_p": Number(0, 1, 0.0),
    "presence_penalty": Number(-2, 2, 0.0),
    "frequency_penalty": Number(-2, 2, 0.0),
    "repetition_penalty": Number(0, 100, 1.0, over=True),
    "seed": whole(-(2**63), 2**63 - 1, None),
}
# Read by both; the rest is of one kind.
SHARED = {"model", "n", "max_tokens", "stop", "stop_token_ids", "logit_bias", "top_k",
          "min_tokens", "stream_options", *FLAGS, *NUMBERS}  # fmt: skip
FIELDS: dict[Kind, set[str]] = {
    "completion": SHARED | {"prompt", "logprobs", "echo", "best_of"},
    "chat": SHARED | {"messages", "logprobs", "top_logprobs", "max_completion_tokens"},
}
# Said by clients, and of no effect on what is generated.
IGNORED = {"user", "metadata", "store", "service_tier", "safety_identifier",
           "prompt_cache_key", "prompt_cache_retention", "verbosity",
           "parallel_tool_calls"}  # fmt: skip
# Known, and not honoured: the values that ask for nothing.
UNSUPPORTED: dict[str, tuple[Any, ...]] = {
    "suffix": ("",),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "audio": (),
    "prediction": (),
    "reasoning_effort": ("none",),
    "web_search_options": (),
}
SHOW = reprlib.Repr()
SHOW.maxstring = SHOW.maxother = 60


def parse(body: bytes, kind: Kind, rules: Rules) -> Ask:
    """Raises: Refusal: 400 with every problem, or 404 for another model."""
    fields = _Fields(_object(body), kind)
    ask = _ask(fields, kind, rules)
    fields.refuse()
    model = fields.values.get("model", rules.model)
    if model != rules.model:
        message = f"model: {SHOW.repr(model)} is not served here; {rules.model!r} is"
        raise Refusal(404, message, "model", "model_not_found")
    return ask


def _object(body: bytes) -> dict[str, Any]:
    """The JSON object; strict where Python is not.

    Raises: Refusal: not UTF-8, not JSON, nested too deeply, NaN, a number of thousands
      of digits, a name that is given twice, or no object.
    """

    def constant(name: str) -> Any:
        raise ValueError(f"{name} is no JSON number")

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            counts = collections.Counter(name for name, _ in items)
            twice = SHOW.repr(counts.most_common(1)[0][0])
            raise ValueError(f"{twice} is given twice")
        return found

    try:
        value = json.loads(
            body.decode(), parse_constant=constant, object_pairs_hook=pairs
        )
    except RecursionError:
        raise Refusal(400, "the body is nested too deeply") from None
    except UnicodeDecodeError as error:
        raise Refusal(400, f"the body is not UTF-8: byte {error.start}") from None
    except ValueError as error:
        reason = str(error).partition(";")[0]  # the rest is advice to programmers
        raise Refusal(400, f"the body is not JSON: {reason}") from None
    if not isinstance(value, dict):
        raise Refusal(400, f"expected a JSON object, got {SHOW.repr(value)}")
    return value


class _Fields:
    """The fields of one request; what is wrong with them is kept in ``problems``."""

    def __init__(self, given: dict[str, Any], kind: Kind):
        self.problems: dict[str, str] = {}
        self.values = {k: v for k, v in given.items() if v is not None}
        known = FIELDS[kind] | IGNORED | UNSUPPORTED.keys()
        for name, value in self.values.items():
            if name in FIELDS[kind] or name in IGNORED:
                continue
            if name not in UNSUPPORTED:
                near = difflib.get_close_matches(name[:99], known, n=1)
                hint = f"; did you mean {near[0]!r}?" if near else ""
                self.bad(name, f"unknown field{hint}")
            elif not any(_same(value, harmless) for harmless in UNSUPPORTED[name]):
                self.bad(name, "this server does not support it", value)

    def bad(self, name: str, expected: str, *value: Any) -> None:
        """Keeps the first problem of each field."""
        shown = f", got {SHOW.repr(value[0])}" if value else ""
        name = name if name.isascii() and len(name) < 60 else SHOW.repr(name)
        self.problems.setdefault(name, f"{name}: {expected}{shown}")
        if len(self.problems) == MAX_PROBLEMS:
            self.refuse()

    def refuse(self) -> None:
        """Raises: Refusal: of all problems, if there are any."""
        if self.problems:
            message = "\n".join(self.problems.values())
            raise Refusal(400, message, next(iter(self.problems)))

    def number(self, name: str, spec: Number) -> Any:
        value = self.values.get(name, spec.default)
        problem = spec.problem(value) if name in self.values else None
        if problem is None:
            return value
        self.bad(name, problem, value)
        return spec.default

    def flag(self, name: str) -> bool:
        value = self.values.get(name, False)
        if not isinstance(value, bool):
            self.bad(name, "expected true or false", value)
            return False
        return value

    def text(self, name: str, value: Any, *, longest: float = math.inf) -> str:
        """``value`` if it is text that UTF-8 can hold, else ''."""
        if not isinstance(value, str):
            self.bad(name, "expected text", value)
        elif len(value) > longest:
            self.bad(name, f"expected at most {longest} characters", len(value))
        elif not _is_text(value):
            self.bad(name, "has a lone surrogate: not text", value)
        else:
            return value
        return ""

    def ids(self, name: str, value: Any, rules: Rules) -> tuple[int, ...]:
        """``value`` if it is a list of token ids, else ()."""
        if not isinstance(value, list):
            self.bad(name, "expected a list of token ids", value)
            return ()
        if len(value) > rules.context:
            n, most = len(value), rules.context
            self.bad(name, f"{n} tokens are over this server's context of {most}")
            return ()
        spec = whole(0, rules.vocab_size - 1, None)
        for i, one in enumerate(value):
            if problem := spec.problem(one):
                self.bad(name, f"token {i}: {problem}", one)
                return ()
        return tuple(value)


def _ask(fields: _Fields, kind: Kind, rules: Rules) -> Ask:
    n = fields.number("n", whole(1, rules.max_choices, 1))
    prompts, messages = (), ()
    if kind == "completion":
        prompts = _prompts(fields, rules)
        if max(1, len(prompts)) * n > rules.max_choices:
            most = rules.max_choices
            text = f"{len(prompts)} prompts times n = {n} are over the {most} at a time"
            fields.bad("prompt", text)
        if fields.values.get("best_of", n) != n:
            text = f"this server does not rank answers; leave it out or give n ({n})"
            fields.bad("best_of", text, fields.values["best_of"])
    else:
        messages = _messages(fields)
    stream = fields.flag("stream")
    echo = kind == "completion" and fields.flag("echo")
    max_tokens = _max_tokens(fields, kind, rules, echo=echo)
    most = rules.context if max_tokens is None else max_tokens
    options = {name: fields.number(name, spec) for name, spec in NUMBERS.items()}
    # Without a seed no two requests are alike.
    seed = secrets.randbits(32) if options["seed"] is None else options["seed"]
    options |= {
        "seed": seed,
        "top_k": max(0, fields.number("top_k", whole(-1, rules.vocab_size, 0))),
        "min_tokens": fields.number("min_tokens", whole(0, most, 0)),
        "ignore_eos": fields.flag("ignore_eos"),
        "stop": _stops(fields),
        "stop_ids": fields.ids(
            "stop_token_ids", fields.values.get("stop_token_ids", []), rules
        ),
        "logit_bias": _biases(fields, rules),
    }
    return Ask(
        kind=kind, prompts=prompts, messages=messages, max_tokens=max_tokens, n=n,
        logprobs=_logprobs(fields, kind), echo=echo, stream=stream,
        include_usage=_include_usage(fields, stream=stream), options=options,
    )  # fmt: skip


def _prompts(fields: _Fields, rules: Rules) -> tuple[str | tuple[int, ...], ...]:
    """Of a text, ids, or a list of either."""
    value = fields.values.get("prompt")
    if isinstance(value, str):
        value = [value]
    elif isinstance(value, list) and value and not isinstance(value[0], str | list):
        value = [value]
    if not isinstance(value, list) or not value:
        text = "expected text, token ids, or a list of either that is not empty"
        fields.bad("prompt", text, value)
        return ()
    prompts: list[str | tuple[int, ...]] = []
    for one in value:
        if isinstance(one, list) and isinstance(value[0], list):
            prompts.append(fields.ids("prompt", one, rules))
        elif isinstance(one, str) and isinstance(value[0], str):
            prompts.append(fields.text("prompt", one))
        else:
            fields.bad("prompt", "expected a list of texts or one of token ids", one)
            continue
        if not one:
            fields.bad("prompt", "expected at least one token", one)
    return tuple(prompts)


def _messages(fields: _Fields) -> tuple[dict[str, str], ...]:
    value = fields.values.get("messages")
    if not isinstance(value, list) or not 0 < len(value) <= MAX_MESSAGES:
        text = f"expected a list of 1 to {MAX_MESSAGES} messages"
        fields.bad("messages", text, value)
        return ()
    messages = []
    for i, message in enumerate(value):
        if not isinstance(message, dict):
            text = 'expected an object {"role": ..., "content": ...}'
            fields.bad(f"messages[{i}]", text, message)
            continue
        for name in message.keys() - {"role", "content", "name"}:
            if message[name]:  # null, "" and [] ask for nothing
                fields.bad(f"messages[{i}]", f"unknown field {SHOW.repr(name)}")
        role, content = message.get("role"), message.get("content")
        if role not in ROLES:
            fields.bad(f"messages[{i}].role", f"expected one of {ROLES}", role)
        if isinstance(content, list):
            content = _parts(fields, f"messages[{i}].content", content)
        content = fields.text(f"messages[{i}].content", content)
        messages.append({"role": role, "content": content})
    return tuple(messages)


def _parts(fields: _Fields, name: str, parts: list[Any]) -> str:
    """The text of a content that comes in parts."""
    texts = []
    for part in parts:
        keys = ("type", "text")
        if isinstance(part, dict) and part.keys() == {*keys} and part["type"] == "text":
            texts.append(fields.text(name, part["text"]))
        else:
            fields.bad(name, 'expected parts {"type": "text", "text": ...}', part)
    return "".join(texts)


def _max_tokens(fields: _Fields, kind: Kind, rules: Rules, *, echo: bool) -> int | None:
    """echo: nothing may be generated, to score the prompt alone."""
    low = 0 if echo else 1
    default = 16 if kind == "completion" else None
    found = fields.number("max_tokens", whole(low, rules.context, default))
    if kind == "chat":
        found = fields.number("max_completion_tokens", whole(1, rules.context, found))
    return found


def _stops(fields: _Fields) -> tuple[str, ...]:
    value = fields.values.get("stop", [])
    value = [value] if isinstance(value, str) else value
    if not isinstance(value, list) or len(value) > MAX_STOPS or "" in value:
        text = f"expected text or a list of at most {MAX_STOPS}, none of them empty"
        fields.bad("stop", text, value)
        return ()
    longest = MAX_STOP_CHARACTERS
    return tuple(fields.text("stop", one, longest=longest) for one in value)


def _biases(fields: _Fields, rules: Rules) -> dict[int, float]:
    value = fields.values.get("logit_bias", {})
    if not isinstance(value, dict) or len(value) > MAX_BIASES:
        text = f"expected an object of at most {MAX_BIASES} token ids"
        fields.bad("logit_bias", text, value)
        return {}
    found: dict[int, float] = {}
    for name, bias in value.items():
        known = name.isascii() and name.isdecimal() and len(name) < 10
        if not known or int(name) >= rules.vocab_size:
            text = f"expected token ids in [0, {rules.vocab_size - 1}]"
            fields.bad("logit_bias", text, name)
        elif problem := Number(-100, 100, 0).problem(bias):
            fields.bad("logit_bias", f"token {name}: {problem}", bias)
        else:
            found[int(name)] = float(bias)
    return found


def _logprobs(fields: _Fields, kind: Kind) -> int | None:
    """Alternatives a token; None asks for no logprobs at all."""
    if kind == "completion":
        return fields.number("logprobs", whole(0, TOP, None))
    wanted = fields.flag("logprobs")
    top = fields.number("top_logprobs", whole(0, TOP, 0))
    if top and not wanted:
        fields.bad("top_logprobs", "needs logprobs: true", top)
    return top if wanted else None


def _include_usage(fields: _Fields, *, stream: bool) -> bool:
    value = fields.values.get("stream_options", {})
    known = {"include_usage": bool, "include_obfuscation": bool}
    if not isinstance(value, dict) or any(
        name not in known or not isinstance(one, bool | None)
        for name, one in value.items()
    ):
        text = 'expected {"include_usage": true or false}'
        fields.bad("stream_options", text, value)
        return False
    if value and not stream:
        fields.bad("stream_options", "needs stream: true", value)
    return bool(value.get("include_usage"))


def _is_text(value: str) -> bool:
    try:
        value.encode()
    except UnicodeEncodeError:
        return False
    return True


def _same(value: Any, other: Any) -> bool:
    """Equal, and of one type: true is not 1."""
    return type(value) is type(other) and value == other
