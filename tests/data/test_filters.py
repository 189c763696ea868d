"""The published rules, each at its border."""

import pytest

from mpt_jax.data import filters

# 100 different words, most of 9 letters.
WORDS = [f"{chr(97 + i % 26)}ordword{chr(97 + i // 26)}" for i in range(100)]


def words(n: int, *, top: int = 0) -> list[str]:
    """``n`` words, the most common of them ``top`` times."""
    rest = [WORDS[i % 100] for i in range(n - top)]
    return ["the"] * top + rest


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (words(200), ""),
        (words(199), "fewer than 200 words"),
        (words(50_000), ""),
        (words(50_001), "more than 50,000 words"),
        (words(1000, top=75), ""),
        (words(1000, top=76), "one word too often"),
        (words(500, top=150), ""),
        (words(500, top=151), "one word too often"),
        (words(501, top=38), "one word too often"),
    ],
)
def test_mc4_counts_words(text, reason):
    assert filters.mc4(" ".join(text), {}) == reason


@pytest.mark.parametrize(
    ("dots", "reason"), [(156, ""), (157, "under 92% alphanumeric")]
)
def test_mc4_counts_characters_but_spaces(dots, reason):
    text = " ".join(words(200))
    assert len(text.replace(" ", "")) == 1800  # 92 % of 1956.5
    assert filters.mc4(text + "." * dots, {}) == reason


def test_mc4_wants_letters():
    text = " ".join(f"{i:04d}a" for i in range(300))
    assert filters.mc4(text, {}) == "most common character is no letter"


PAPER = {"open_access": True, "title": "T", "abstract": "A", "language": "en",
         "date": "2001-02-03"}  # fmt: skip
BODY = "\n".join(" ".join(WORDS) for _ in range(5))


@pytest.mark.parametrize(
    ("changes", "text", "reason"),
    [
        ({}, BODY, ""),
        ({"open_access": False}, BODY, "not open access"),
        ({"title": ""}, BODY, "no title or no abstract"),
        ({"abstract": None}, BODY, "no title or no abstract"),
        ({"language": "de"}, BODY, "not English"),
        ({"date": 1969}, BODY, "not from 1970 to 2022-12-01"),
        ({"date": 1970}, BODY, ""),
        ({"date": "2022-12-01"}, BODY, ""),
        ({"date": "2022-12-02"}, BODY, "not from 1970 to 2022-12-01"),
        ({}, BODY.rpartition(" ")[0], "fewer than 500 words"),
        ({}, BODY.replace("\n", " ", 1), "fewer than 5 paragraphs"),
        ({}, BODY.replace("\n", "\n \n"), ""),
        ({}, BODY + " is" * 41, "most common word"),
        ({}, BODY + " 1999" * 20, "most common word"),
    ],
)
def test_s2orc(changes, text, reason):
    assert filters.s2orc(text, PAPER | changes) == reason


@pytest.mark.parametrize("language", ["C", "FORTRAN", "Common Lisp", "tex"])
def test_stack_knows_its_languages(language):
    assert filters.stack("x", {"lang": language}) == ""
    assert filters.stack_markdown("x", {"lang": language}) == "another language"


def test_stack_drops_the_others():
    assert len(filters.STACK_LANGUAGES) == 18
    assert filters.stack("x", {"lang": "Markdown"}) == "another language"
    assert filters.stack_markdown("x", {"lang": "Markdown"}) == ""
    assert filters.FILTERS.keys() == filters.FIELDS.keys()
