"""``import nf``: light, and with exactly the names it promises."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tomllib
from dataclasses import fields
from pathlib import Path

import pytest

import nf
from nf.config import EngineConfig
from nf.loading import Options

ROOT = Path(__file__).parents[2]


def test_every_public_name_is_there() -> None:
    for name in nf.__all__:
        assert getattr(nf, name) is not None
    assert set(nf.__all__) <= set(dir(nf))
    with pytest.raises(AttributeError, match="no attribute 'Llm'"):
        nf.Llm  # noqa: B018


def test_version_is_the_packages() -> None:
    assert nf.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]


def test_import_pulls_in_nothing_heavy() -> None:
    heavy = ["numpy", "tokenizers", "tqdm", "asyncio", "torch", "cuda", "cupy", "minijinja", "safetensors"]
    code = f"import sys, nf; nf.SamplingParams, nf.InputError; print([m for m in {heavy} if m in sys.modules])"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"


def test_options_are_those_of_the_engine_and_of_text() -> None:
    text = {"tokenizer", "chat_template", "skip_tokenizer_init"}
    assert set(Options.__annotations__) == {field.name for field in fields(EngineConfig)} | text
    documented = inspect.getdoc(nf.LLM) or ""
    for name in Options.__annotations__:
        assert f"{name}:" in documented or f"{name}," in documented
