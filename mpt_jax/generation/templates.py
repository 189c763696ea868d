"""How MosaicML's Instruct and Chat models want to be spoken to.

A template is text with the special tokens of ChatML in it. Only the template's own
become special ids: in a message, ``<|im_end|>`` stays the characters that it is, so
that nobody ends a turn in another's name.

Sources: llm-foundry:llmfoundry/data/finetuning/tasks.py (dolly_preprocessing_function)
and scripts/inference/hf_chat.py; the model cards of mpt-30b-instruct, mpt-7b-chat;
FastChat:fastchat/conversation.py (the system messages; several turns of Instruct, whose
data had only one).
"""

from __future__ import annotations

import dataclasses
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

from mpt_jax.errors import UserError
from mpt_jax.tokenizer import CHATML, Tokenizer

Message = Mapping[str, str]  # {"role": one of ROLES, "content": text}
ROLES = ("system", "user", "assistant")

INTRODUCTION = (
    "Below is an instruction that describes a task. Write a response that "
    "appropriately completes the request."
)
SYSTEM_7B_CHAT = (
    "- You are a helpful assistant chatbot trained by MosaicML.\n"
    "- You answer questions.\n"
    "- You are excited to be able to help the user, but will refuse to do anything "
    "that could be considered harmful to the user.\n"
    "- You are more than just an information source, you are also able to write "
    "poetry, short stories, and make jokes."
)
SYSTEM_30B_CHAT = (
    "A conversation between a user and an LLM-based AI assistant. The assistant gives "
    "helpful and honest answers."
)


@dataclasses.dataclass(frozen=True)
class Template:
    """The text around the messages of each role, and what opens the answer.

    default_system: the system message where a conversation brings none. Instruct's is
    its introduction, which a conversation's own takes the place of.
    """

    name: str
    default_system: str
    system: str
    user: str
    assistant: str
    answer: str

    @property
    def specials(self) -> tuple[str, ...]:
        """The special tokens that it needs."""
        return tuple(token for token in CHATML if token in self.user)


_CHATML = "<|im_start|>{role}\n{{content}}<|im_end|>\n"
TEMPLATES = {
    template.name: template
    for template in (
        Template(
            "instruct",
            default_system=INTRODUCTION,
            system="{content}",
            user="\n\n### Instruction:\n{content}",
            assistant="\n\n### Response:\n{content}",
            answer="\n\n### Response:\n",
        ),
        # As the cards of MPT-30B-Instruct and MPT-7B-8k-Instruct print it.
        Template(
            "instruct-v3",
            default_system=INTRODUCTION,
            system="{content}",
            user="\n\n###Instruction\n{content}",
            assistant="\n\n### Response\n{content}",
            answer="\n\n### Response\n",
        ),
        Template(
            "chatml",
            default_system="",
            system=_CHATML.format(role="system"),
            user=_CHATML.format(role="user"),
            assistant=_CHATML.format(role="assistant"),
            answer="<|im_start|>assistant\n",
        ),
    )
}


def _chat(system: str) -> Template:
    return dataclasses.replace(TEMPLATES["chatml"], default_system=system)


RELEASED = {
    "mpt-1b-redpajama-200b-dolly": TEMPLATES["instruct"],
    "mpt-7b-instruct": TEMPLATES["instruct"],
    "mpt-7b-8k-instruct": TEMPLATES["instruct-v3"],
    "mpt-30b-instruct": TEMPLATES["instruct-v3"],
    "mpt-7b-chat": _chat(SYSTEM_7B_CHAT),
    "mpt-7b-8k-chat": _chat(SYSTEM_7B_CHAT),
    "mpt-30b-chat": _chat(SYSTEM_30B_CHAT),
}


def choose(template: str | None, *, name: str, tokenizer: Tokenizer) -> Template:
    """The template called ``template``, or else the one that the checkpoint wants.

    Args:
      name: of the checkpoint, such as its folder's: a released name within it decides
        ("my-mpt-7b-chat-v2"); otherwise a tokenizer that knows ChatML does.
    Raises: UserError: no such template, none that fits, or one whose special tokens
      are not in the vocabulary.
    """
    if template is not None and template not in TEMPLATES:
        message = f"no template {template!r}; known are {', '.join(TEMPLATES)}"
        raise UserError(message)
    released = max((r for r in RELEASED if r in name.lower()), key=len, default=None)
    wanted = RELEASED.get(released) if released else None
    if template is None:
        if wanted is None and None not in (special_id(tokenizer, t) for t in CHATML):
            wanted = TEMPLATES["chatml"]
        if wanted is None:
            raise UserError(
                f"{name!r} is no released Instruct or Chat model and its tokenizer has "
                f"no ChatML tokens: choose a --template of {', '.join(TEMPLATES)}"
            )
    elif wanted is None or wanted.name != template:
        wanted = TEMPLATES[template]
    _special_ids(wanted, tokenizer)
    return wanted


def special_id(tokenizer: Tokenizer, token: str) -> int | None:
    """The id of a special token; None if the vocabulary does not have it as one."""
    encode = getattr(tokenizer, "encode_special", None)
    ids = encode(token) if encode else []
    return ids[0] if len(ids) == 1 and ids != tokenizer.encode(token) else None


def _special_ids(template: Template, tokenizer: Tokenizer) -> dict[str, int]:
    found = {token: special_id(tokenizer, token) for token in template.specials}
    missing = [token for token, i in found.items() if i is None]
    if missing:
        raise UserError(
            f"the template {template.name!r} needs {' and '.join(missing)}, which the "
            "tokenizer does not have as special tokens: take the tokenizer.json that "
            "came with the Chat model, or --tokenizer FILE+chatml"
        )
    return {token: i for token, i in found.items() if i is not None}


def stop_ids(template: Template, tokenizer: Tokenizer) -> tuple[int, ...]:
    """The ids that end an answer: the end of text, and of a turn of ChatML."""
    ends = _special_ids(template, tokenizer)
    return (tokenizer.eos_id, *(ends[t] for t in CHATML[1:] if t in ends))


def render(
    messages: Sequence[Message], template: Template, tokenizer: Tokenizer
) -> list[int]:
    """The ids of a conversation, up to where the assistant's answer begins.

    Args:
      messages: an optional system message, then those of the user and the assistant;
        the last is the user's. An empty system message keeps the default away.
    Raises: UserError: what is wrong with which message. DataError: a lone surrogate.
    """
    specials = _special_ids(template, tokenizer)
    ids: list[int] = []
    for special, group in itertools.groupby(pieces(messages, template), lambda p: p[1]):
        texts = [text for text, _ in group]
        if special:
            ids += [specials[text] for text in texts]
        else:  # together: a piece of the vocabulary may cross from one to the next
            ids += tokenizer.encode("".join(texts))
    return ids


def render_text(messages: Sequence[Message], template: Template) -> str:
    """What render() encodes, to read.

    >>> print(render_text([{"role": "user", "content": "Hi"}], TEMPLATES["chatml"]))
    <|im_start|>user
    Hi<|im_end|>
    <|im_start|>assistant
    <BLANKLINE>
    """
    return "".join(text for text, _ in pieces(messages, template))


_SPECIAL = re.compile("(" + "|".join(map(re.escape, CHATML)) + ")")


def pieces(messages: Sequence[Message], template: Template) -> list[tuple[str, bool]]:
    """(text, whether it is a special token) of a conversation, in order."""
    _check(messages)
    if messages[0]["role"] != "system" and template.default_system:
        system = {"role": "system", "content": template.default_system}
        messages = [system, *messages]
    messages = [m for m in messages if m["role"] != "system" or m["content"]]
    forms = [(getattr(template, m["role"]), m["content"]) for m in messages]
    return [
        (part if part in CHATML else part.replace("{content}", content), part in CHATML)
        for form, content in [*forms, (template.answer, "")]
        for part in _SPECIAL.split(form)
        if part
    ]


def _check(messages: Any) -> None:
    """Raises UserError unless ``messages`` is a conversation that can be answered."""
    if not isinstance(messages, Sequence) or isinstance(messages, str) or not messages:
        raise UserError("messages: expected a list of at least one message")
    for i, message in enumerate(messages):
        where = f"messages[{i}]"
        if not isinstance(message, Mapping):
            raise UserError(f"{where}: expected role and content")
        if message.get("role") not in ROLES:
            raise UserError(f"{where}.role: expected one of {', '.join(ROLES)}")
        if not isinstance(message.get("content"), str):
            raise UserError(f"{where}.content: expected text")
        if message["role"] == "system" and i:
            raise UserError(f"{where}.role: only the first message may be the system's")
    if messages[-1]["role"] != "user":
        raise UserError(
            f"messages[{len(messages) - 1}].role: the last must be a user's"
        )
