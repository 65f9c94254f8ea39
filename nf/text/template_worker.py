"""Renders one chat template in a process of its own; nf.text.template_process runs this file as a script.

The template engine bounds steps, but a few steps can double a string until memory is gone, which would take the
whole process with it. So templates render where memory is limited and where killing is safe. One JSON line in, one
JSON line out; the first line in holds the template and the limits.
"""

from __future__ import annotations

import json
import re
import resource
import sys
from collections.abc import Iterable
from datetime import datetime
from typing import Any

import minijinja

STRING = re.compile(r"'(?:\\.|[^'\\])*'|\"(?:\\.|[^\"\\])*\"", re.DOTALL)
TAG = re.compile(r"\{[{%].*?[%}]\}", re.DOTALL)
GENERATION = re.compile(r"\{%([-+]?)\s*(end)?generation\s*([-+]?)%\}")


class RefusalError(Exception):
    """The template called raise_exception."""


def raise_exception(message: str) -> None:
    raise RefusalError(message)


def strftime_now(form: str) -> str:
    return datetime.now().strftime(form)


def tojson(
    value: Any, ensure_ascii: bool = False, indent: int | None = None, separators: Any = None, sort_keys: bool = False
) -> str:
    """As Hugging Face's templates expect it: characters stay as they are, HTML is not escaped."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def is_iterable(value: Any) -> bool:
    """Jinja's meaning: ``none`` is not iterable."""
    return isinstance(value, Iterable)


def compile_template(source: str, fuel: int) -> minijinja.Environment:
    """The engine as Hugging Face sets up Jinja: trimmed blocks, loop controls, its functions and filters."""
    for tag in TAG.findall(source):
        if re.search(r"\.\s*__", STRING.sub("''", tag)):
            raise ValueError(f"{tag[:60]!r} reaches for a Python internal")
    environment = minijinja.Environment(
        trim_blocks=True,
        lstrip_blocks=True,
        fuel=fuel,
        debug=False,
        filters={"tojson": tojson},
        tests={"iterable": is_iterable},
        globals={"raise_exception": raise_exception, "strftime_now": strftime_now},
    )
    environment.remove_global("debug")  # shows the engine's state
    # The mark of what an assistant wrote concerns training; a block that always renders has the same text.
    plain = GENERATION.sub(lambda m: f"{{%{m[1]} {'endif' if m[2] else 'if true'} {m[3]}%}}", source)
    environment.add_template("chat_template", plain)
    return environment


def render(environment: minijinja.Environment, context: dict[str, Any], max_chars: int) -> dict[str, str]:
    """One reply: the text, or the kind of error and its message."""
    try:
        text = environment.render_template("chat_template", **context)
    except RefusalError as error:
        return {"error": "refused", "message": str(error)}
    except minijinja.TemplateError as error:
        return {"error": "failed", "message": error.message}
    except MemoryError:
        return {"error": "failed", "message": "out of memory"}
    except Exception as error:
        return {"error": "failed", "message": f"{error}"}
    if len(text) > max_chars:
        return {"error": "failed", "message": f"{len(text)} characters of text, more than {max_chars}"}
    return {"text": text}


def main() -> None:
    setup = json.loads(sys.stdin.readline())
    for limit, most in ((resource.RLIMIT_AS, setup["max_bytes"]), (resource.RLIMIT_CORE, 0)):
        hard = resource.getrlimit(limit)[1]
        resource.setrlimit(limit, (most if hard == resource.RLIM_INFINITY else min(most, hard), hard))
    broken = None
    try:
        environment = compile_template(setup["source"], setup["fuel"])
    except Exception as error:
        message = error.message if isinstance(error, minijinja.TemplateError) else str(error)
        broken = {"error": "failed", "message": message}
    for line in sys.stdin:
        reply = broken or render(environment, json.loads(line), setup["max_chars"])
        sys.stdout.write(json.dumps(reply) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
