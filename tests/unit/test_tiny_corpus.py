"""scripts/tiny: reStructuredText to plain text, and the documents that train_tiny.py cuts from a folder."""

from __future__ import annotations

import ast
from pathlib import Path
from types import ModuleType

import pytest

SCRIPTS = Path(__file__).parents[2] / "scripts"

PAGE = """\
:mod:`shelf` --- Keeping books
==============================

.. module:: shelf
   :synopsis: Books.

The :mod:`shelf` module keeps *books*; see :pep:`8` and `the site <https://example.org>`_.

.. function:: put(book, *others, \\
                  place=None)
              put(book)

   Put *book* on the shelf, as :meth:`Shelf.put` does::

      put("Emma")

   .. versionchanged:: 3.1
      Faster.

   .. note:: Books are ``heavy``.

.. class:: Shelf(width)

   A board for books:

   * of oak, or
   * of pine.

   .. method:: put(book)

      Put *\\*book* away.
"""
CODE = '''\
def put(book):
    """Put a book away."""
    return book

class Shelf:
    def take(self):
        """Take a book."""
        return None
'''


@pytest.fixture
def corpus(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(SCRIPTS))
    import tiny.corpus

    return tiny.corpus


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "shelf.rst.txt").write_text(PAGE)
    (tmp_path / "shelf.py").write_text(CODE)
    (tmp_path / "telnetlib.py").write_text(CODE)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "test_shelf.py").write_text("def test_put():\n    put(1)\n    put(2)\n")
    return tmp_path


def test_markup_becomes_plain_text(corpus: ModuleType) -> None:
    entries = list(corpus._entries(corpus.parse(PAGE.split("\n")), "", ""))
    assert [entry[:3] for entry in entries] == [
        ("function", "shelf.put", "shelf.put(book, *others, place=None)\nshelf.put(book)"),
        ("class", "shelf.Shelf", "shelf.Shelf(width)"),
        ("method", "shelf.Shelf.put", "shelf.Shelf.put(book)"),
    ]
    assert entries[0][3] == [
        "Put book on the shelf, as Shelf.put() does:",
        '    put("Emma")',
        "Note: Books are `heavy`.",
    ]
    assert entries[1][3] == ["A board for books:", "* of oak, or\n* of pine."]
    assert entries[2][3] == ["Put *book away."]


def test_documents_are_whole_and_the_held_out_module_is_marked(corpus: ModuleType, folder: Path) -> None:
    documents = corpus.read_corpus([folder], seed=0)
    code = {document.turns[0][1]: document.held_out for document in documents if document.kind == "code"}
    assert len(code) == 3  # put, Shelf and its method; tests are left out
    assert all(ast.parse(text) for text in code)
    prose = [document.turns[0][1] for document in documents if document.kind == "prose"]
    assert "The shelf module keeps books; see PEP 8 and the site." in prose
    assert any(document.held_out for document in documents)


def test_questions_are_answered_once_and_the_documentation_goes_first(corpus: ModuleType, folder: Path) -> None:
    chats = [document for document in corpus.read_corpus([folder], seed=0) if document.kind == "chat"]
    answers: dict[str, set[str]] = {}
    for document in chats:
        question, answer = document.first_exchange
        answers.setdefault(question, set()).add(answer)
    assert all(len(found) == 1 for found in answers.values())
    (usage,) = answers["How do I use shelf.put?"]
    assert usage.startswith("shelf.put(book, *others, place=None)\nshelf.put(book)\n\nPut book on the shelf")
    assert answers["What is the shelf module?"] == {"The shelf module keeps books; see PEP 8 and the site."}


def test_the_seed_alone_decides_the_order(corpus: ModuleType, folder: Path) -> None:
    assert corpus.read_corpus([folder], seed=1) == corpus.read_corpus([folder], seed=1)
