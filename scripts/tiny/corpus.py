"""The documents nf-tiny learns from: Python code, prose and questions with answers.

Everything is cut from Python's own standard library (``*.py``) and documentation sources (``*.rst``, ``*.rst.txt``).
Each document is short and whole, so that a model trained on it learns to come to an end.
"""

from __future__ import annotations

import ast
import inspect
import re
import textwrap
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from random import Random

from tiny.rst import OBJECTS, Block, parse, render

MAX_CODE_CHARS = 2400
MAX_PROSE_CHARS = 1600
MAX_ANSWER_CHARS = 600
MIN_CODE_LINES = 3

SKIPPED_FOLDERS = {
    *("test", "tests", "idle_test", "site-packages", "__pycache__", "lib-dynload"),
    *("encodings", "pydoc_data", "ensurepip"),  # tables and bundled wheels
}
SKIPPED_PAGES = {"about", "bugs", "copyright", "license", "contents", "index", "sphinx"}

HELD_OUT = {
    *("aifc", "asynchat", "asyncore", "audioop", "cgi", "cgitb", "chunk", "crypt", "imghdr", "mailcap", "msilib"),
    *("nis", "nntplib", "ossaudiodev", "pipes", "smtpd", "sndhdr", "spwd", "sunau", "telnetlib", "uu", "xdrlib"),
}
"""Modules kept out of training to measure the loss: those PEP 594 took out of Python."""

SYSTEM_PROMPTS = (
    "You are a helpful assistant.",
    "You answer questions about Python.",
    "Answer from Python's documentation.",
    "You are a Python expert. Be brief.",
)


@dataclass(frozen=True, slots=True)
class Document:
    """One text to learn: a single turn with role "" is plain text, other roles are "system", "user", "assistant"."""

    kind: str  # "code", "prose" or "chat"
    turns: tuple[tuple[str, str], ...]
    held_out: bool

    @property
    def first_exchange(self) -> tuple[str, str]:
        """The first question and its answer."""
        (_, question), (_, answer) = [turn for turn in self.turns if turn[0] != "system"][:2]
        return question, answer


@dataclass(frozen=True, slots=True)
class Source:
    """One text file; ``module`` is the dotted name of what it holds or documents."""

    path: Path
    module: str

    @property
    def held_out(self) -> bool:
        return self.module.split(".")[0] in HELD_OUT


def read_corpus(folders: Iterable[Path], seed: int) -> list[Document]:
    """All documents under ``folders``, without repeats, in an order that ``seed`` decides."""
    sources = [source for folder in folders for source in _sources(folder)]
    documents: list[Document] = []
    documented: set[str] = set()
    for source in sources:
        if source.path.suffix != ".py":
            documents += _documentation(source, documented, Random(f"{seed} {source.module}"))
    for source in sources:
        if source.path.suffix == ".py":
            documents += _code(source, documented, Random(f"{seed} {source.module}"))
    answers: dict[str, str] = {}
    unique = [
        document
        for document in dict.fromkeys(documents)
        # one question has one answer, the first: headings such as "Examples" come often
        if document.kind != "chat" or answers.setdefault(*document.first_exchange) == document.first_exchange[1]
    ]
    Random(seed).shuffle(unique)
    return unique


def _sources(folder: Path) -> Iterator[Source]:
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        name = re.sub(r"\.(py|rst|rst\.txt)$", "", inside.name)
        if name == inside.name or not path.is_file() or SKIPPED_FOLDERS & set(inside.parts):
            continue
        if path.suffix != ".py":
            if name not in SKIPPED_PAGES:
                yield Source(path, name)
        elif not path.name.startswith("_sysconfigdata"):
            package = inside.parts[:-1]
            yield Source(path, ".".join(package if name == "__init__" else (*package, name)))


# Python code


def _code(source: Source, documented: set[str], random: Random) -> Iterator[Document]:
    """Functions and classes cut out whole, questions about documented ones and requests to write them."""
    text = source.path.read_text(encoding="utf-8", errors="replace")
    lines = text.split("\n")
    for node, owner in _definitions(ast.parse(text), ()):
        code = _cut(node, lines)
        if code is not None:
            yield Document("code", (("", code),), source.held_out)
        name = ".".join((source.module, *owner, node.name))
        if any(part.startswith("_") for part in name.split(".")):
            continue
        if (docstring := ast.get_docstring(node)) and name not in documented:
            answer = _answer(inspect.cleandoc(docstring).split("\n\n"))
            yield from _chats([(_ask(node, name, random), answer)], source, random)
        if code is not None and not owner and isinstance(node, ast.FunctionDef) and len(code) <= MAX_ANSWER_CHARS:
            request = f"Write a function {node.name}({ast.unparse(node.args)})."
            yield from _chats([(request, code)], source, random)
            yield from _chats([(f"Show me the source of {name}.", code)], source, random)


Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


def _definitions(node: ast.AST, owner: tuple[str, ...]) -> Iterator[tuple[Definition, tuple[str, ...]]]:
    """Functions and classes at module and class level, with the names of the classes around them."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, Definition):
            yield child, owner
        if isinstance(child, ast.ClassDef):
            yield from _definitions(child, (*owner, child.name))
        elif isinstance(child, ast.If | ast.Try):
            yield from _definitions(child, owner)


def _cut(node: Definition, lines: list[str]) -> str | None:
    """The dedented source of ``node``; a class too long keeps its first methods. None where nothing useful is left."""
    ends = [node.end_lineno or 0]
    if isinstance(node, ast.ClassDef):
        ends += [child.end_lineno or 0 for child in reversed(node.body)]
    for end in ends:
        code = textwrap.dedent("\n".join(lines[node.lineno - 1 : end])).rstrip()
        if code.count("\n") + 1 < MIN_CODE_LINES:
            return None
        if len(code) <= MAX_CODE_CHARS:
            return code if _parses(code) else None
    return None


def _parses(code: str) -> bool:
    try:
        ast.parse(code)
    except SyntaxError:  # dedenting can break a docstring that is indented less than its function
        return False
    return True


def _ask(node: Definition, name: str, random: Random) -> str:
    return _question("class" if isinstance(node, ast.ClassDef) else "function", name, random)


# Documentation


@dataclass(slots=True)
class Section:
    """A heading's own text: ``chunks`` are its paragraphs, lists and examples."""

    title: str
    chunks: list[str]


def _documentation(source: Source, documented: set[str], random: Random) -> Iterator[Document]:
    """Prose by sections, reference entries, and questions about both."""
    blocks = parse(source.path.read_text(encoding="utf-8", errors="replace").split("\n"))
    exchanges: list[tuple[str, str]] = []
    for section in _sections(blocks):
        for prose in _grouped(section.chunks):
            yield Document("prose", (("", prose),), source.held_out)
        if section.chunks:
            answer = _answer(section.chunks)
            exchanges += [(question, answer) for question in _section_questions(section.title)]
    for kind, name, signature, chunks in _entries(blocks, "", ""):
        documented.add(name)
        answer = _answer(chunks)
        whole = f"{signature}\n\n{_answer(chunks, MAX_PROSE_CHARS)}"
        yield Document("prose", (("", whole),), source.held_out)
        questions = {_question(kind, name, random) for _ in range(3)}
        exchanges += [(question, answer) for question in sorted(questions)]
        if "(" in signature:
            exchanges.append((f"How do I use {name}?", f"{signature}\n\n{answer}"))
    for term in (block for glossary in _named(blocks, "glossary") for block in glossary.body):
        if term.kind == "definition" and (chunks := render(term.body)):
            article = "an" if term.text[0] in "aeiou" else "a"
            questions = (f"What is {article} {term.text}?", f"What is {term.text}?", f"Define {term.text}.")
            exchanges += [(question, _answer(chunks)) for question in questions]
    yield from _chats(exchanges, source, random)


def _sections(blocks: tuple[Block, ...]) -> Iterator[Section]:
    title, run = "", []
    for block in (*blocks, Block("heading")):
        if block.kind != "heading":
            run.append(block)
            continue
        chunks = [chunk for chunk in render(tuple(run)) if not chunk.startswith("Source code:")]
        if chunks:
            yield Section(title, chunks)
        title, run = block.text, []


def _grouped(chunks: list[str]) -> Iterator[str]:
    """Consecutive chunks joined to documents of at most MAX_PROSE_CHARS; an example stays with its introduction."""
    group: list[str] = []
    for chunk in (*chunks, ""):
        size = sum(map(len, group)) + len(chunk)
        if group and (not chunk or (size > MAX_PROSE_CHARS and not group[-1].endswith(":"))):
            yield _rounded(group)
            group = []
        group.append(chunk)
        if size > 2 * MAX_PROSE_CHARS:  # a long listing: no part of it reads well alone
            group = []


def _named(blocks: Iterable[Block], name: str) -> Iterator[Block]:
    for block in blocks:
        if block.kind == "directive" and block.name == name:
            yield block
        yield from _named(block.body, name)


def _entries(blocks: Iterable[Block], module: str, owner: str) -> Iterator[tuple[str, str, str, list[str]]]:
    """Documented objects as (kind, dotted name, signature, chunks); ``owner`` is the class around them."""
    for block in blocks:
        if block.kind != "directive":
            continue
        if block.name in ("module", "currentmodule"):
            module = block.text.split("\n")[0]
        elif block.name in OBJECTS:
            signatures = [signature.removeprefix("async ") for signature in block.text.split("\n")]
            short = re.split(r"[(\s\[]", signatures[0])[0]
            kind = OBJECTS[block.name]
            inside = owner and not short.startswith(f"{owner}.")
            name = ".".join(filter(None, (module, owner if inside else "", short)))
            if chunks := render(block.body):
                prefix = name[: len(name) - len(short)]
                yield kind, name, "\n".join(prefix + signature for signature in signatures), chunks
            if kind in ("class", "exception"):
                yield from _entries(block.body, module, short)


def _answer(chunks: list[str], limit: int = MAX_ANSWER_CHARS) -> str:
    """The first chunks that fit in ``limit`` characters."""
    taken = chunks[:1]
    for chunk in chunks[1:]:
        if sum(map(len, taken)) + len(chunk) > limit:
            break
        taken.append(chunk)
    return _rounded(taken)


def _rounded(chunks: list[str]) -> str:
    """Chunks as one text that does not end by announcing an example or a table left out."""
    while len(chunks) > 1 and chunks[-1].endswith(":"):
        chunks = chunks[:-1]
    text = "\n\n".join(chunks)
    return f"{text[:-1]}." if text.endswith(":") else text


# Questions

QUESTIONS = {
    "function": ("What does {} do?", "What does {}() do?", "What is {}?", "Explain {}.", "What is {} for?"),
    "class": ("What is {}?", "What does {} do?", "Explain {}.", "What is the {} class?"),
    "exception": ("What is {}?", "When is {} raised?", "Explain {}.", "What does {} mean?"),
    "data": ("What is {}?", "Explain {}.", "What does {} mean?"),
    "opcode": ("What does the opcode {} do?", "What is {}?"),
}
QUESTIONS["decorator"] = QUESTIONS["method"] = QUESTIONS["function"]


def _question(kind: str, name: str, random: Random) -> str:
    return random.choice(QUESTIONS[kind]).format(name)


def _section_questions(title: str) -> list[str]:
    if not title:
        return []
    if title.endswith("?"):
        return [title]
    name, _, rest = title.partition(" --- ")
    if rest:
        return [f"What is the {name} module?", f"What is {name} for?", f"What is {name}?", f"Explain {name}."]
    topic = title.rstrip(".")
    statement = topic.endswith("statement") or topic.startswith("The ")
    topic = topic[0].lower() + topic[1:] if statement else topic
    if statement and not topic.startswith(("the ", "a ")):
        topic = f"the {topic}"
    questions = [f"Explain {topic}.", f"Tell me about {topic}."]
    return [*questions, f"How does {topic} work?"] if statement else questions


def _chats(exchanges: list[tuple[str, str]], source: Source, random: Random) -> Iterator[Document]:
    """One conversation per exchange; some begin with a system message, some go on with the next exchange."""
    following = [later for _, later in pairwise([*exchanges, ("", "")])]
    for (question, answer), (next_question, next_answer) in zip(exchanges, following, strict=True):
        turns = [("user", question), ("assistant", answer)]
        if random.random() < 0.1:
            turns.insert(0, ("system", random.choice(SYSTEM_PROMPTS)))
        if next_question and next_answer != answer and random.random() < 0.3:
            turns += [("user", next_question), ("assistant", next_answer)]
        yield Document("chat", tuple(turns), source.held_out)
