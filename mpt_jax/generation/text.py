"""From tokens to text as they come, and the loop that drives an engine.

The parts that a Stream gives, put together, are the text of all its tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Sequence

from mpt_jax.errors import UserError
from mpt_jax.generation.engine import Engine, FinishReason, Request, TokenLogprob
from mpt_jax.tokenizer import Tokenizer

# Half a character decodes as at most three of these, one for each of its bytes.
REPLACEMENT, MAX_HALF = "\ufffd", 3
# Tokens that are decoded along with a new one: what precedes it decides how it is
# written (SentencePiece leaves out a space before the first), and completes characters.
CONTEXT = 8


class Stream:
    """The text of one request, token by token.

    Held back are half a character, and what may become a stop string.

    Args:
      prompt_ids: what comes before.
      stop: texts that end the stream, themselves left out.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        *,
        prompt_ids: Sequence[int] = (),
        stop: Sequence[str] = (),
    ):
        self.text = ""  # all that push() and finish() returned
        self.stopped = False  # a stop string came: nothing more will
        self._tokenizer, self._stop = tokenizer, tuple(stop)
        self._held = ""  # may begin a stop string
        # The last tokens, and how much of their text is told already.
        self._window = [
            i for i in map(int, prompt_ids[-CONTEXT:]) if i < tokenizer.vocab_size
        ]
        self._known = tokenizer.decode(self._window)

    def push(self, ids: Iterable[int]) -> str:
        """The text that ``ids`` make certain; "" after a stop string."""
        return "".join(self._emit(self._decode(int(i))) for i in ids)

    def finish(self) -> str:
        """What was held back, at the end of the tokens."""
        return self._emit(self._new(self._tokenizer.decode(self._window)), last=True)

    def _decode(self, token: int) -> str:
        window = [*self._window, token]
        new = self._new(_whole(self._tokenizer.decode(window)))
        self._window = window[-CONTEXT:]
        self._known = _whole(self._tokenizer.decode(self._window))
        return new

    def _new(self, text: str) -> str:
        known = self._known
        if not text.startswith(known):  # the prompt ended in half a character
            known = known.rstrip(REPLACEMENT)
        return text[len(known) :]

    def _emit(self, new: str, *, last: bool = False) -> str:
        """``new`` as far as it is no beginning of a stop string, up to the first."""
        if self.stopped:
            return ""
        text = self._held + new
        found = [at for at in (text.find(stop) for stop in self._stop) if at >= 0]
        if found:
            self.stopped, end = True, min(found)
        else:
            end = len(text) if last else len(text) - self._beginning(text)
        self._held = text[end:]
        self.text += text[:end]
        return text[:end]

    def _beginning(self, text: str) -> int:
        """How long an end of ``text`` may begin a stop string."""
        longest = max((len(stop) - 1 for stop in self._stop), default=0)
        for n in range(min(longest, len(text)), 0, -1):
            if any(stop.startswith(text[-n:]) for stop in self._stop):
                return n
        return 0


def _whole(text: str) -> str:
    """``text`` without what may be half a character at its end."""
    half = len(text) - len(text.rstrip(REPLACEMENT))
    return text[: len(text) - min(half, MAX_HALF)]


@dataclasses.dataclass(frozen=True)
class Delta:
    """News of one request, as text. Its last one has a finish_reason."""

    id: str
    text: str
    ids: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] | None = None
    finish_reason: FinishReason | None = None
    error: str = ""


def run(
    engine: Engine, tokenizer: Tokenizer | None, requests: Iterable[Request]
) -> Iterator[Delta]:
    """Submits ``requests`` and steps ``engine`` until they end; closing cancels them.

    Without a tokenizer, all text is "".

    Raises: UserError: of Engine.submit(); stop strings without a tokenizer.
    """
    streams: dict[str, Stream | None] = {}
    stopped: set[str] = set()  # whose "cancelled" is still to come
    try:
        for request in requests:
            stop = request.sampling.stop
            if stop and tokenizer is None:
                raise UserError("stop strings need a tokenizer; stop_ids do not")
            engine.submit(request)
            streams[request.id] = tokenizer and Stream(
                tokenizer, prompt_ids=request.prompt_ids, stop=stop
            )
        while streams or stopped:
            for event in engine.step():
                if event.id in stopped:
                    stopped -= {event.id} if event.finish_reason else set()
                    continue
                stream, reason, text = streams[event.id], event.finish_reason, ""
                if stream is not None:
                    text = stream.push(event.ids)
                    text += stream.finish() if reason else ""
                    if stream.stopped and reason is None:
                        engine.cancel(event.id)
                        stopped.add(event.id)
                    reason = "stop" if stream.stopped else reason
                if reason is not None:
                    del streams[event.id]
                yield Delta(
                    event.id, text, event.ids, event.logprobs, event.prompt_logprobs,
                    reason, event.error,
                )  # fmt: skip
    except (GeneratorExit, UserError):
        for id in streams:
            engine.cancel(id)
        left = stopped | set(streams)
        while left:
            left -= {event.id for event in engine.step() if event.finish_reason}
        raise
