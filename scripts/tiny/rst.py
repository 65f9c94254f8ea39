"""Just enough reStructuredText to turn Python's documentation sources into plain text."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass, field

OBJECTS = {
    "function": "function",
    "decorator": "decorator",
    "coroutinefunction": "function",
    "class": "class",
    "exception": "exception",
    "method": "method",
    "classmethod": "method",
    "staticmethod": "method",
    "abstractmethod": "method",
    "coroutinemethod": "method",
    "data": "data",
    "attribute": "data",
    "opcode": "opcode",
}
"""Directives that document a named object, and what kind of object it is."""

CODE = {"code-block", "code", "sourcecode", "doctest", "testcode"}
ADMONITIONS = {"note": "Note", "warning": "Warning", "tip": "Tip", "important": "Important", "admonition": "Note"}

_DIRECTIVE = re.compile(r"\.\. ([\w:-]+)::(?: +(.*))?$")
_ITEM = re.compile(r"([*-]|#\.|\d+\.|\([a-z0-9]\)) +(?=\S)")
_FIELD = re.compile(r":[A-Za-z][\w .*-]*:(\s|$)")
_RULE = re.compile(r"([=\-~^\"'`#*+.:_])\1{2,}$")
_TABLE = re.compile(r"\+[-=]|\| |=+ +=|=+$")


@dataclass(frozen=True, slots=True)
class Block:
    """One block of a document. ``kind``: heading, paragraph, code, item, definition or directive.

    ``text`` is the cleaned text of a heading, paragraph or term, the verbatim text of code, an item's marker and a
    directive's arguments, one per line. ``name`` is the directive's; ``body`` holds what is nested in the block.
    """

    kind: str
    text: str = ""
    name: str = ""
    body: tuple[Block, ...] = field(default=())


def parse(lines: list[str]) -> tuple[Block, ...]:
    """Split source lines into blocks; tables, comments, targets and field lists are left out."""
    blocks: list[Block] = []
    at = 0
    while at < len(lines):
        line = lines[at].rstrip()
        following = lines[at + 1].rstrip() if at + 1 < len(lines) else ""
        if not line:
            at += 1
        elif line[0] == " ":
            body, at = _indented(lines, at)
            blocks.extend(parse(body))
        elif line == ".." or line.startswith(".. "):
            tight = bool(following)  # what follows without a blank line continues the directive's arguments
            body, at = _indented(lines, at + 1)
            if match := _DIRECTIVE.match(line):
                blocks.append(_directive(match[1], match[2] or "", body, tight))
        elif _RULE.match(line) and _RULE.match(lines[at + 2].rstrip() if at + 2 < len(lines) else ""):
            blocks.append(Block("heading", clean(following.strip())))
            at += 3
        elif following and _RULE.match(following) and len(following) >= len(line) - 2:
            blocks.append(Block("heading", clean(line)))
            at += 2
        elif line.startswith(">>>"):
            body, at = _until_blank(lines, at)
            blocks.append(Block("code", "\n".join(body)))
        elif _TABLE.match(line) or _RULE.match(line):
            _, at = _until_blank(lines, at)
        elif _FIELD.match(line):
            _, at = _indented(lines, at + 1)
        elif match := _ITEM.match(line):
            body, at = _indented(lines, at + 1)
            marker = "*" if match[1] in "*-" else match[1]
            blocks.append(Block("item", marker, body=parse([line[match.end() :], *body])))
        else:
            at = _paragraph(lines, at, blocks)
    return tuple(blocks)


def _paragraph(lines: list[str], at: int, blocks: list[Block]) -> int:
    """Append the paragraph, definition or paragraph with literal block at ``at``; returns the line after it."""
    start = at
    while at < len(lines) and lines[at].strip() and (lines[at][0] != " " or at == start):
        at += 1
    text = " ".join(line.strip() for line in lines[start:at])
    if at < len(lines) and lines[at].strip():  # a term directly followed by indented lines: a definition list
        body, at = _indented(lines, at)
        blocks.append(Block("definition", clean(text), body=parse(body)))
        return at
    if not text.endswith("::"):
        blocks.append(Block("paragraph", clean(text)))
        return at
    if text != "::":
        blocks.append(Block("paragraph", clean(text[:-2].rstrip().rstrip(":")) + ":"))
    body, at = _indented(lines, at)
    if body:
        blocks.append(Block("code", "\n".join(body)))
    return at


def _directive(name: str, argument: str, body: list[str], tight: bool) -> Block:
    split = next((i for i, line in enumerate(body) if not line.strip()), len(body)) if tight else 0
    head = [line for line in body[:split] if not _FIELD.match(line)]
    if name in OBJECTS or name in ("module", "currentmodule"):
        arguments = "\n".join([argument, *head]).replace("\\\n", " ")
        signatures = [re.sub(r"\s+", " ", one).strip() for one in arguments.split("\n")]
        return Block("directive", "\n".join(filter(None, signatures)), name, parse(body[split:]))
    if name in CODE:
        return Block("code", "\n".join([*head, *body[split:]]).strip("\n"))
    return Block("directive", argument, name, parse([argument, *head, *body[split:]]))


def _indented(lines: list[str], at: int) -> tuple[list[str], int]:
    """The run of indented and blank lines from ``at``, dedented, and the line after it."""
    start = at
    while at < len(lines) and (not lines[at].strip() or lines[at][0] == " "):
        at += 1
    return textwrap.dedent("\n".join(line.rstrip() for line in lines[start:at])).strip("\n").split("\n"), at


def _until_blank(lines: list[str], at: int) -> tuple[list[str], int]:
    start = at
    while at < len(lines) and lines[at].strip():
        at += 1
    return [line.rstrip() for line in lines[start:at]], at


_INLINE = re.compile(
    r"``(?P<literal>.+?)``"
    r"|:(?P<role>[\w:+-]+):`(?P<target>(?:\\.|[^`\\])+)`"
    r"|`(?P<link>[^`<]+?)\s*<[^`>]+>`__?"
    r"|`(?P<reference>[^`]+)`_{0,2}"
    r"|\*\*(?P<strong>\S(?:\\.|[^*\\])*)\*\*"
    r"|(?<![\w*])\*(?P<emphasis>(?![\s*])(?:\\.|[^*\\])+)\*(?!\w)"
    r"|(?P<footnote>\s?\[[#\w]*\]_)"
    r"|\|(?P<substitution>[\w-]+)\|_?"
    r"|\\(?P<escaped>.)"
)


def clean(text: str) -> str:
    """Inline markup removed: roles, links, emphasis, escapes; ``literals`` keep one backtick either side."""
    return _INLINE.sub(_plain, re.sub(r"(?<=[.?!:;]) {2,}", " ", text)).strip()


def _plain(match: re.Match[str]) -> str:
    if match["literal"]:
        return f"`{match['literal']}`"
    if match["role"]:
        return _role(match["role"].split(":")[-1], _unescape(match["target"]))
    if match["footnote"]:
        return ""
    if match["escaped"]:
        return match["escaped"].strip()
    return _unescape(match["link"] or match["reference"] or match["strong"] or match["emphasis"] or match[8] or "")


def _role(role: str, target: str) -> str:
    if titled := re.match(r"(.+?)\s*<[^>]*>$", target, re.DOTALL):
        return titled[1]
    if role in ("pep", "rfc"):
        return f"{role.upper()} {target}"
    short = target.split(".")[-1] if target.startswith("~") else target.lstrip("!.")
    return f"{short}()" if role in ("func", "meth") and not short.endswith(")") else short


def _unescape(text: str) -> str:
    return re.sub(r"\\(.)", lambda match: match[1].strip(), text)


def render(blocks: tuple[Block, ...]) -> list[str]:
    """The blocks' own prose and code as text chunks; nested objects and version notes are left out."""
    chunks: list[str] = []
    last = ""
    for block in blocks:
        texts = list(_chunks(block))
        if block.kind == "item" and last == "item" and texts and "\n\n" not in chunks[-1]:
            chunks[-1] += "\n" + texts[0]  # a tight list is one chunk
        else:
            chunks.extend(texts)
        last = block.kind if texts else last
    return chunks


def _chunks(block: Block) -> Iterator[str]:
    if block.kind == "paragraph" and block.text.strip(":"):
        yield block.text
    elif block.kind == "code" and block.text.strip():
        yield textwrap.indent(block.text, "    ")
    elif block.kind == "item":
        yield f"{block.text} " + textwrap.indent("\n\n".join(render(block.body)), "  ").strip()
    elif block.kind == "definition" and (body := render(block.body)):
        yield f"{block.text}: {body[0].strip()}"
        yield from body[1:]
    elif block.kind == "directive" and block.name in ADMONITIONS and (body := render(block.body)):
        yield f"{ADMONITIONS[block.name]}: {body[0].strip()}"
        yield from body[1:]
