"""Every test that `make sanitize` is to run is there; a name that is none would be passed over in silence."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

TESTS = Path(__file__).parents[1]
FOLDER = TESTS / "gpu"


def functions(file: Path) -> set[str]:
    """Names of a file's functions and methods, and of those of the modules of tests that it imports."""
    nodes = list(ast.walk(ast.parse(file.read_text())))
    names = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    imported = {TESTS / f"{node.module}.py" for node in nodes if isinstance(node, ast.ImportFrom)}
    return names.union(*(functions(module) for module in imported if module.exists()))


def test_sanitized_tests_exist() -> None:
    spec = importlib.util.spec_from_file_location("gpu_conftest", FOLDER / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    assert "test_gpu_executor" in conftest.SANITIZED
    for file, names in conftest.SANITIZED.items():
        assert set(names) <= functions(FOLDER / f"{file}.py"), file
