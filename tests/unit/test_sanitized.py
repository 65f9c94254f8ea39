"""Every test that `make sanitize` is to run is there; a name that is none would be passed over in silence."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

FOLDER = Path(__file__).parents[1] / "gpu"


def test_sanitized_tests_exist() -> None:
    spec = importlib.util.spec_from_file_location("gpu_conftest", FOLDER / "conftest.py")
    assert spec is not None
    assert spec.loader is not None
    conftest = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(conftest)
    assert "test_gpu_executor" in conftest.SANITIZED
    for file, names in conftest.SANITIZED.items():
        tree = ast.parse((FOLDER / f"{file}.py").read_text())
        assert set(names) <= {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, file
