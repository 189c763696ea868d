import ast
import inspect
import io
import sys
import textwrap

import pytest

from mpt_jax.data import notes, stdlib_corpus
from mpt_jax.errors import DataError


@pytest.fixture(scope="module")
def code():
    return stdlib_corpus.code()


@pytest.fixture(scope="module")
def prose(code):
    """Of every tenth module: parsing all 8 MB takes seconds."""
    some = {n: code[n] for n in [*list(code)[::10], "textwrap.py"]}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stdlib_corpus, "code", lambda: some)
        return stdlib_corpus.prose.__wrapped__()


def test_code_is_the_sorted_source_files(code):
    assert list(code) == sorted(code)
    assert code["textwrap.py"] == inspect.getsource(textwrap)
    assert "asyncio/base_events.py" in code
    assert not any(set(n.split("/")) & {"test", "tests", "encodings"} for n in code)
    assert all(text.strip() for text in code.values())


def test_prose_is_docstrings_and_the_reference(prose):
    document = prose["textwrap.py"]
    assert document.startswith(inspect.cleandoc(textwrap.__doc__))
    for function in (textwrap.dedent, textwrap.TextWrapper.fill):
        assert inspect.getdoc(function) in document
    assert "def " not in document.splitlines()[0]
    assert "import" in prose["topics/import"]


def test_splits_are_disjoint_and_complete(code, prose):
    for documents in (code, prose):
        train = stdlib_corpus.select(documents, "train")
        held_out = stdlib_corpus.select(documents, "validation")
        assert not train.keys() & held_out.keys()
        assert train | held_out == documents
        assert train
        assert held_out
    # Of all code: 13 of 256 by name; documents differ in size.
    share = len("".join(stdlib_corpus.select(code, "validation").values()))
    assert 0.03 < share / len("".join(code.values())) < 0.09


def test_validation_prose_is_not_in_training_code(code, prose):
    held_out = stdlib_corpus.select(prose, "validation")
    train_code = stdlib_corpus.select(code, "train")
    assert held_out.keys() & code.keys()
    assert not held_out.keys() & train_code.keys()


def test_select_refuses_an_unknown_split():
    with pytest.raises(ValueError, match=r"expected one of .* got 'test'"):
        stdlib_corpus.select({}, "test")


def test_fingerprint_depends_on_names_texts_and_order():
    base = {"a": "x", "b": "y"}
    others = [{"a": "x"}, base | {"b": "z"}, {"a": "x", "c": "y"}, {"b": "y", "a": "x"}]
    prints = [stdlib_corpus.fingerprint(d) for d in (base, *others)]
    assert len(set(prints)) == 5
    assert stdlib_corpus.fingerprint(dict(base)) == prints[0]


def test_a_missing_library_is_an_error_that_says_what_to_install(tmp_path):
    (tmp_path / "os.py").write_text("import sys\n")
    with pytest.raises(DataError, match=r"1 modules found.*apt-get install libpython3"):
        stdlib_corpus.code(str(tmp_path))


def test_missing_topics_are_an_error(monkeypatch):
    monkeypatch.setattr(stdlib_corpus, "code", lambda: {"a.py": '"""Doc."""\n'})
    monkeypatch.setitem(sys.modules, "pydoc_data.topics", None)
    with pytest.raises(DataError, match=r"pydoc_data/topics\.py"):
        stdlib_corpus.prose.__wrapped__()


def test_unreadable_files_are_counted_aloud(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(stdlib_corpus, "MIN_FILES", 1)
    (tmp_path / "good.py").write_text("x = 1\n")
    (tmp_path / "latin.py").write_bytes(b"# coding: latin-1\n# caf\xe9\n")
    (tmp_path / "bad.py").write_bytes(b"# caf\xe9\n")
    (tmp_path / "empty.py").write_text("\n")
    documents = stdlib_corpus.code(str(tmp_path))
    assert list(documents) == ["good.py", "latin.py"]
    assert "caf\u00e9" in documents["latin.py"]
    assert "skipped 1 unreadable files" in capsys.readouterr().err


def test_docstrings_come_in_source_order():
    tree = ast.parse(
        '"""A."""\nclass B:\n  """B."""\n'
        '  async def c(self):\n    """C.\n\n    More.\n    """\n'
        "def d():\n  'D.'\n  def e():\n    'E.'\n"
    )
    assert list(stdlib_corpus._docstrings(tree)) == [
        "A.",
        "B.",
        "C.\n\nMore.",
        "D.",
        "E.",
    ]


def test_a_note_into_a_closed_pipe_is_lost_not_fatal(monkeypatch):
    class Closed(io.StringIO):
        def write(self, text):
            raise BrokenPipeError

    monkeypatch.setattr(sys, "stderr", Closed())
    notes.note("nobody hears this")
