"""The published filters of MPT-7B's sources, as reasons to leave a document out.

A filter is (text, row) -> why not, or "" to keep; ``row`` holds the FIELDS it asks for.
The reasons are counted, never the documents dropped in silence. Words are what white
space separates. Source: MosaicML, "Introducing MPT-7B" (2023), appendix on data; where
its wording leaves a choice, the docstring says which one was made here.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

Filter: TypeAlias = Callable[[str, Mapping[str, Any]], str]

# The 18 languages of The Stack that MPT-7B was trained on; Markdown is its own source.
STACK_LANGUAGES = frozenset(
    ("c", "c#", "c++", "common lisp", "f#", "fortran", "go", "haskell", "java", "ocaml",
     "perl", "python", "ruby", "rust", "scala", "scheme", "shell", "tex")
)  # fmt: skip


def mc4(text: str, row: Mapping[str, Any]) -> str:
    """English mC4: prose of a page's length that does not repeat itself.

    The shares of characters are of those that are not white space: counting the spaces
    between its words, no English text is 92 % alphanumeric.
    """
    words = text.split()
    if not 200 <= len(words) <= 50_000:
        return "fewer than 200 words" if len(words) < 200 else "more than 50,000 words"
    if _top_share(words)[1] > (0.075 if len(words) > 500 else 0.30):
        return "one word too often"
    characters = collections.Counter("".join(words))
    if not characters.most_common(1)[0][0].isalpha():
        return "most common character is no letter"
    alphanumeric = sum(n for c, n in characters.items() if c.isalnum())
    return "" if alphanumeric >= 0.92 * characters.total() else "under 92% alphanumeric"


def s2orc(text: str, row: Mapping[str, Any]) -> str:
    """S2ORC: whole English papers with a title and an abstract, 1970 to 2022-12-01.

    ``language`` is what a language identifier found (the original's was cld3), ``date``
    a year or an ISO date. A paragraph is a line that is not blank.
    """
    if not row["open_access"]:
        return "not open access"
    if not (row["title"] and row["abstract"]):
        return "no title or no abstract"
    if row["language"] != "en":
        return "not English"
    if not "1970" <= str(row["date"]) <= "2022-12-01":
        return "not from 1970 to 2022-12-01"
    words = text.split()
    if len(words) < 500:
        return "fewer than 500 words"
    if sum(not line.isspace() for line in text.split("\n") if line) < 5:
        return "fewer than 5 paragraphs"
    word, share = _top_share(words)
    return "" if word.isalpha() and share < 0.075 else "most common word"


def stack(text: str, row: Mapping[str, Any]) -> str:
    """The Stack: source code in one of the 18 languages."""
    return "" if str(row["lang"]).lower() in STACK_LANGUAGES else "another language"


def stack_markdown(text: str, row: Mapping[str, Any]) -> str:
    """The Stack: Markdown."""
    return "" if str(row["lang"]).lower() == "markdown" else "another language"


FILTERS: dict[str, Filter] = {
    "mc4": mc4, "s2orc": s2orc, "stack": stack, "stack_markdown": stack_markdown,
}  # fmt: skip
# What a row must hold besides its text.
FIELDS: dict[str, tuple[str, ...]] = {
    "mc4": (),
    "s2orc": ("open_access", "title", "abstract", "language", "date"),
    "stack": ("lang",),
    "stack_markdown": ("lang",),
}


def _top_share(words: list[str]) -> tuple[str, float]:
    """The most common word, the first of equals, and its share of all."""
    word, n = collections.Counter(words).most_common(1)[0]
    return word, n / len(words)
