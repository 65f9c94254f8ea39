"""The import rules of docs/architecture.md, read off the source, and what ``import nf`` costs."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
CUDA = {"cuda", "cupy", "cupyx", "cutlass", "nccl", "tvm_ffi"}
FRAMEWORKS = {"torch", "jax", "tensorflow"}

# A module may import from its own layer and those to its left.
LAYERS = ["nf.kernels", "nf.graphs", "nf.executors", "nf.engine", "nf.llm", "nf.cli"]
PURE_GRAPHS = ("plan", "pipeline_plan", "dependencies", "unroll", "validation", "builtin")
PURE_PLANNING = ("hardware", "operation_costs", "cost_model", "figures", "heat_map", "structure", "shares", "resources")
NO_CUDA = [
    *("nf.scheduler", "nf.models", "nf.text"),
    *(f"nf.graphs.{name}" for name in PURE_GRAPHS),
    *(f"nf.planning.{name}" for name in PURE_PLANNING),
]


def modules() -> dict[str, Path]:
    """Dotted name → file of every module of the package; kernels/ and graphs/ count under their package names."""
    found = {}
    for folder, package in (("nf", "nf"), ("kernels", "nf.kernels"), ("graphs", "nf.graphs")):
        for file in (ROOT / folder).rglob("*.py"):
            relative = file.relative_to(ROOT / folder).with_suffix("")
            if folder == "nf" and relative.parts[0] in ("kernels", "graphs"):
                continue
            parts = [package, *relative.parts]
            found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = file
    return found


MODULES = modules()


def imports(file: Path) -> set[str]:
    """Every module a file names in an import statement, wherever it stands."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{file}: relative import"
            assert node.module is not None
            names.add(node.module)
            names |= {f"{node.module}.{alias.name}" for alias in node.names} & MODULES.keys()
    return names


def reachable(module: str) -> set[str]:
    """Every module that importing ``module`` may load, through the package's own modules; ends outside it."""
    seen: set[str] = set()
    todo = [module]
    while todo:
        name = todo.pop()
        if name in seen:
            continue
        seen.add(name)
        if name in MODULES:
            todo += imports(MODULES[name])
    return seen


def within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


def layer(name: str) -> int | None:
    return next((i for i, package in enumerate(LAYERS) if within(name, package)), None)


@pytest.mark.parametrize("module", sorted(MODULES))
def test_imports_point_one_way(module: str) -> None:
    own = layer(module)
    names = imports(MODULES[module])
    assert not {n.split(".")[0] for n in names} & FRAMEWORKS, f"{module} imports a framework"
    assert not {n.split(".")[0] for n in names} & {"kernels", "graphs", "pickle"}, f"{module} imports a bare name"
    if own is not None:
        for name in names:
            other = layer(name)
            assert other is None or other <= own, f"{module} imports {name}, which stands above it"


@pytest.mark.parametrize("package", NO_CUDA)
def test_pure_parts_reach_no_cuda(package: str) -> None:
    found = [module for module in MODULES if within(module, package)]
    assert found, f"there is no {package}"
    for module in found:
        reached = {name.split(".")[0] for name in reachable(module)}
        assert not reached & CUDA, f"{module} reaches {reached & CUDA}"


def test_the_walk_sees_what_it_should() -> None:
    assert {"nf", "nf.graphs", "nf.kernels", "nf.scheduler.batch", "nf.executors.base"} <= MODULES.keys()
    assert "nf.scheduler.batch" in imports(MODULES["nf.executors.base"])
    assert "numpy" in reachable("nf.executors.base")


def test_import_nf_is_light() -> None:
    """No CUDA, no NumPy, nothing heavy: the public names load on first use."""
    code = "import sys, nf; print(*sorted({m.split('.')[0] for m in sys.modules}))"
    loaded = set(
        subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    )
    assert not loaded & (CUDA | FRAMEWORKS | {"numpy", "tokenizers", "safetensors", "minijinja"})
