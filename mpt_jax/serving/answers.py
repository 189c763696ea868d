"""What is said back: an engine's events -> the JSON of OpenAI's API, whole or streamed.

A token that is not text by itself (half a character, the end of text) is shown as
"token_id:N".
"""

from __future__ import annotations

import dataclasses
import functools
import json
import math
import time
import uuid
from collections.abc import AsyncIterator, Callable, Sequence
from typing import Any

from mpt_jax.generation.engine import Event, TokenLogprob
from mpt_jax.generation.text import Stream
from mpt_jax.serving.jobs import Group
from mpt_jax.serving.protocol import Ask, Refusal
from mpt_jax.tokenizer import Tokenizer

NOT_TEXT = "\ufffd"
LEAST = -9999.0  # JSON has no -inf
DONE = b"data: [DONE]\n\n"


def to_json(value: Any) -> bytes:
    """ASCII, so that nothing that a client sent can fail to be sent back."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False).encode()


def to_event(value: Any) -> bytes:
    """One server-sent event."""
    return b"data: " + to_json(value) + b"\n\n"


def token_namer(tokenizer: Tokenizer) -> Callable[[int], str]:
    """A function from an id to its text, or to token_id:N."""
    # Behind another token: at the beginning of a text some decoders drop a space.
    before = tokenizer.encode("a")
    n_before = len(tokenizer.decode(before))

    @functools.lru_cache(maxsize=100_000)
    def name(id: int) -> str:
        text = tokenizer.decode([*before, id])[n_before:]
        return f"token_id:{id}" if not text or NOT_TEXT in text else text

    return name


@dataclasses.dataclass(frozen=True)
class Token:
    """A token of an answer; logprob: None for the first of a prompt."""

    id: int
    offset: int
    logprob: float | None
    top: tuple[tuple[int, float], ...]


@dataclasses.dataclass(frozen=True)
class Piece:
    """What one event adds to a choice."""

    index: int
    text: str
    tokens: tuple[Token, ...]
    finish_reason: str | None


class Choice:
    """One answer as it grows: text with its tokens, cut at stop strings.

    A token's logprob is told once its text is, so that none of a stop string appears.
    """

    def __init__(
        self, index: int, ask: Ask, prompt: Sequence[int], tokenizer: Tokenizer
    ):
        self.index, self.ask, self.prompt = index, ask, prompt
        self.n_tokens = 0
        stops = ask.options["stop"]
        self._stream = Stream(tokenizer, prompt_ids=prompt, stop=stops)
        # Counts characters with nothing held back for stop strings.
        self._ruler = Stream(tokenizer, prompt_ids=() if ask.echo else prompt)
        self._told = 0  # characters
        self._held: list[Token] = []
        self._echo = tokenizer.decode(prompt) if ask.echo else ""

    def push(self, event: Event) -> Piece:
        text, self._echo = self._echo, ""
        if self.ask.logprobs is not None:
            if event.prompt_logprobs is not None:
                self._hold(self.prompt, event.prompt_logprobs)
            self._hold(event.ids, event.logprobs)
        self.n_tokens += len(event.ids)
        text += self._stream.push(event.ids)
        reason = event.finish_reason
        if reason is not None:
            text += self._stream.finish()
        if self._stream.stopped:
            reason = "stop"
        self._told += len(text)
        whole = reason is not None and not self._stream.stopped
        due = [t for t in self._held if whole or t.offset < self._told]
        self._held = self._held[len(due) :]
        return Piece(self.index, text, tuple(due), reason)

    def _hold(
        self, ids: Sequence[int], logprobs: Sequence[TokenLogprob | None]
    ) -> None:
        for id, found in zip(ids, logprobs, strict=True):
            offset = len(self._ruler.text)
            self._ruler.push([id])
            chosen = None if found is None else found.logprob
            top = () if found is None else found.top
            self._held.append(Token(id, offset, chosen, top))


class Answer:
    """The answer to one Ask: ``whole()`` or ``stream()``, once."""

    def __init__(
        self,
        ask: Ask,
        prompts: Sequence[Sequence[int]],
        group: Group,
        *,
        tokenizer: Tokenizer,
        name: Callable[[int], str],
        model: str,
    ):
        self._ask, self._group, self._name = ask, group, name
        self._n_prompt = sum(map(len, prompts))
        self._choices = [
            Choice(i * ask.n + k, ask, prompt, tokenizer)
            for i, prompt in enumerate(prompts)
            for k in range(ask.n)
        ]
        chat = ask.kind == "chat"
        kind = "chat.completion" if chat else "text_completion"
        self._head = {
            "id": ("chatcmpl-" if chat else "cmpl-") + uuid.uuid4().hex,
            "object": kind + (".chunk" if chat and ask.stream else ""),
            "created": int(time.time()),
            "model": model,
        }

    @property
    def usage(self) -> dict[str, int]:
        n = sum(choice.n_tokens for choice in self._choices)
        return {
            "prompt_tokens": self._n_prompt,
            "completion_tokens": n,
            "total_tokens": self._n_prompt + n,
        }

    async def pieces(self) -> AsyncIterator[Piece]:
        """As they come. Raises: Refusal: as Group.events()."""
        async for index, event in self._group.events():
            piece = self._choices[index].push(event)
            if piece.finish_reason is not None and event.finish_reason is None:
                self._group.cancel(index)  # a stop string
            yield piece

    async def whole(self) -> bytes:
        """The JSON of the finished answer. Raises: Refusal."""
        found: list[list[Piece]] = [[] for _ in self._choices]
        async for piece in self.pieces():
            found[piece.index].append(piece)
        choices = []
        for index, parts in enumerate(found):
            text = "".join(part.text for part in parts)
            tokens = [token for part in parts for token in part.tokens]
            said = {"text": text}
            if self._ask.kind == "chat":
                said = {"message": {"role": "assistant", "content": text}}
            choices.append(self._choice(index, said, tokens, parts[-1].finish_reason))
        return to_json(self._head | {"choices": choices, "usage": self.usage})

    async def stream(self) -> AsyncIterator[bytes]:
        """Server-sent events; what goes wrong on the way is one, too.

        Raises: Refusal: what goes wrong before the first, when the status is not sent.
        """
        begun = False
        try:
            async for piece in self.pieces():
                if self._ask.kind == "chat" and not begun:
                    for i in range(len(self._choices)):
                        role = {"delta": {"role": "assistant", "content": ""}}
                        yield self._chunk([self._choice(i, role, (), None)])
                begun = True
                if piece.text or piece.tokens or piece.finish_reason:
                    yield self._chunk([self._part(piece)])
        except Refusal as refusal:
            if not begun:
                raise
            yield to_event(refusal.body())
        else:
            if self._ask.include_usage:
                yield self._chunk([], usage=self.usage)
        yield DONE

    def _chunk(self, choices: list[Any], **more: Any) -> bytes:
        if self._ask.include_usage:
            more = {"usage": None} | more
        return to_event(self._head | {"choices": choices} | more)

    def _part(self, piece: Piece) -> dict[str, Any]:
        said: dict[str, Any] = {"text": piece.text}
        if self._ask.kind == "chat":
            said = {"delta": {"content": piece.text} if piece.text else {}}
        return self._choice(piece.index, said, piece.tokens, piece.finish_reason)

    def _choice(
        self,
        index: int,
        said: dict[str, Any],
        tokens: Sequence[Token],
        reason: str | None,
    ) -> dict[str, Any]:
        logprobs = None
        if self._ask.logprobs is not None:
            form = self._of_chat if self._ask.kind == "chat" else self._of_completion
            logprobs = form(tokens)
        return {"index": index, **said, "logprobs": logprobs, "finish_reason": reason}

    def _of_completion(self, tokens: Sequence[Token]) -> dict[str, Any]:
        def top(token: Token) -> dict[str, float] | None:
            """Best first; the token itself is always among them."""
            if token.logprob is None or not self._ask.logprobs:
                return None
            found: dict[str, float] = {}
            for id, logprob in (*token.top, (token.id, token.logprob)):
                found.setdefault(self._name(id), _finite(logprob))
            return found

        return {
            "tokens": [self._name(t.id) for t in tokens],
            "token_logprobs": [_finite(t.logprob) for t in tokens],
            "top_logprobs": [top(t) for t in tokens] if self._ask.logprobs else None,
            "text_offset": [t.offset for t in tokens],
        }

    def _of_chat(self, tokens: Sequence[Token]) -> dict[str, Any]:
        def one(id: int, logprob: float | None) -> dict[str, Any]:
            name = self._name(id)
            told = None if name == f"token_id:{id}" else list(name.encode())
            return {"token": name, "logprob": _finite(logprob), "bytes": told}

        return {
            "content": [
                one(t.id, t.logprob) | {"top_logprobs": [one(*pair) for pair in t.top]}
                for t in tokens
            ]
        }


def _finite(logprob: float | None) -> float | None:
    if logprob is None:
        return None
    return logprob if math.isfinite(logprob) else LEAST
