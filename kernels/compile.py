"""The only place that compiles kernels and keeps what was compiled.

An artifact is one file — a shared library with a launcher (CuTe DSL) or a cubin (CUDA C++) — beside a small JSON that
says what it was made from. Artifacts live in the cache (``NF_CACHE_DIR``, else ``XDG_CACHE_HOME``/nf) or in a kernel
bundle, a folder of the same layout that loads without any compiler. Compiling needs neither a GPU nor libcuda.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import hashlib
import importlib.metadata
import json
import logging
import multiprocessing
import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nf.errors import InputError, NfError
from nf.files import write_whole
from nf.kernels.cubin import Resources, read_resources
from nf.kernels.source import KernelSource

log = logging.getLogger(__name__)

ARCHES = ("sm_90a",)
SCHEMA = 1  # of the artifact's JSON; raised when its meaning changes
COMPILERS = {"cute": "nvidia-cutlass-dsl-libs-base", "cuda": "nvidia-cuda-nvrtc"}
SUFFIX = {"cute": ".so", "cuda": ".cubin"}


class CompileError(NfError, RuntimeError):
    """A kernel cannot be compiled: the toolchain is missing or refused the source."""


@dataclass(frozen=True, slots=True)
class Artifact:
    """A compiled kernel on disk; ``path`` is a shared library ("cute") or a cubin ("cuda")."""

    source: KernelSource
    path: Path
    resources: tuple[Resources, ...]


def cache_dir() -> Path:
    """Where compiled kernels are kept: ``$NF_CACHE_DIR``, else ``$XDG_CACHE_HOME/nf``, else ``~/.cache/nf``."""
    own = os.environ.get("NF_CACHE_DIR")
    return Path(own) if own else Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "nf"


def compile_kernels(
    sources: Iterable[KernelSource],
    arch: str,
    *,
    folder: Path | None = None,
    processes: int | None = None,
    progress: Callable[[str], None] | None = None,
) -> list[Artifact]:
    """Artifacts of all ``sources``, in their order, compiled where ``folder`` has none that fits.

    Args:
        sources: kernels to compile.
        arch: e.g. "sm_90a".
        folder: a kernel bundle to fill; None is the cache.
        processes: compiler processes; None takes one per core.
        progress: called with the name of each kernel that was compiled.

    Raises:
        InputError: the arch is unknown.
        CompileError: a compiler is not installed, or a source does not compile; the message names it.
    """
    if arch not in ARCHES:
        raise InputError("arch", f"must be one of {', '.join(ARCHES)}, not {arch!r}")
    home = (folder or cache_dir() / "kernels") / arch
    sources = list(sources)
    found = {source.name: _fresh(home, source, arch) for source in sources}
    missing = [source for source in sources if found[source.name] is None]
    problem = missing_compiler(missing)
    if problem is not None:
        raise CompileError(problem)
    for source, artifact in _compile_all(home, missing, arch, processes):
        found[source.name] = artifact
        if progress is not None:
            progress(source.name)
    return [artifact for artifact in found.values() if artifact is not None]


def cached(sources: Iterable[KernelSource], arch: str) -> tuple[Artifact, ...]:
    """Those of ``sources`` that need not be compiled, because the cache has them."""
    home = cache_dir() / "kernels" / arch
    found = (_fresh(home, source, arch) for source in sources)
    return tuple(artifact for artifact in found if artifact is not None)


def missing_compiler(sources: Iterable[KernelSource]) -> str | None:
    """Why ``sources``, which nobody has compiled yet, cannot be: a compiler is not installed. None if they can."""
    needed = {source.language for source in sources}
    for language, package in COMPILERS.items():
        if language in needed and _compiler_version(language) is None:
            return (
                f"the kernels are not compiled and {package} is not installed "
                "(pip install 'nf[cuda]', or point NF_KERNEL_BUNDLE at a bundle made by `nf compile`)"
            )
    return None


def load_bundle(sources: Iterable[KernelSource], arch: str, folder: Path) -> list[Artifact]:
    """Artifacts of all ``sources`` from a kernel bundle; nothing is compiled.

    Raises:
        CompileError: the bundle was made for another arch or from other sources, or is damaged; names the kernel.
    """
    home = folder / arch
    if not home.is_dir():
        held = sorted(path.name for path in folder.glob("sm_*")) if folder.is_dir() else []
        raise CompileError(f"{folder}: holds kernels for {', '.join(held) or 'no GPU'}, this GPU needs {arch}")
    artifacts = []
    for source in sources:
        artifact = _stored(home, source, arch)
        if artifact is None:
            raise CompileError(f"{home}: no intact {source.name} of this version of nf; make the bundle anew")
        artifacts.append(artifact)
    return artifacts


def _compile_all(
    home: Path, sources: list[KernelSource], arch: str, processes: int | None
) -> Iterator[tuple[KernelSource, Artifact]]:
    if len(sources) < 2:
        yield from ((source, _compile_locked(home, source, arch)) for source in sources)
        return
    # A process each: the DSL's compiler is not thread-safe and keeps state.
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(processes or os.cpu_count(), mp_context=context) as pool:
        jobs = {pool.submit(_compile_locked, home, source, arch): source for source in sources}
        try:
            for job in concurrent.futures.as_completed(jobs):
                yield jobs[job], job.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def _compile_locked(home: Path, source: KernelSource, arch: str) -> Artifact:
    """Compile one source unless another process has done so by the time its lock is ours."""
    from nf.kernels import toolchain  # the compilers are heavy and often not there

    with _lock(home, source.name):
        fresh = _fresh(home, source, arch)
        if fresh is not None:
            return fresh
        try:
            binary = toolchain.compile_source(source, arch)
        except Exception as error:
            raise CompileError(f"{source.name}: {error}") from error
        resources = read_resources(binary)
        record = {
            "schema": SCHEMA,
            "name": source.name,
            "arch": arch,
            "digest": source.digest(arch),
            "compiler": _compiler_version(source.language),
            "sha256": hashlib.sha256(binary).hexdigest(),
            "resources": [resource.to_dict() for resource in resources],
        }
        path = home / (source.name + SUFFIX[source.language])
        write_whole(path, binary)
        write_whole(path.with_suffix(".json"), json.dumps(record, indent=1))
        return Artifact(source, path, resources)


def _fresh(home: Path, source: KernelSource, arch: str) -> Artifact | None:
    """The artifact of ``source`` in ``home`` unless the installed compiler is another than the one that made it."""
    compiler = _compiler_version(source.language)
    return _stored(home, source, arch, lambda record: compiler in (None, record.get("compiler")))


def _stored(
    home: Path, source: KernelSource, arch: str, accept: Callable[[dict[str, Any]], bool] = lambda _record: True
) -> Artifact | None:
    """The artifact of ``source`` in ``home`` if it is whole, of these sources and its record acceptable."""
    path = home / (source.name + SUFFIX[source.language])
    try:
        record = json.loads(path.with_suffix(".json").read_bytes())
        binary = path.read_bytes()
    except (OSError, ValueError):
        return None
    if record.get("schema") != SCHEMA or record.get("digest") != source.digest(arch) or not accept(record):
        return None
    if record.get("sha256") != hashlib.sha256(binary).hexdigest():
        log.warning("%s: damaged, not used", path)
        return None
    return Artifact(source, path, tuple(Resources(**values) for values in record["resources"]))


def _compiler_version(language: str) -> str | None:
    try:
        return importlib.metadata.version(COMPILERS[language])
    except importlib.metadata.PackageNotFoundError:
        return None


@contextmanager
def _lock(home: Path, name: str) -> Iterator[None]:
    """Hold the file lock of one kernel; another process that wants the same kernel waits and then finds it done."""
    home.mkdir(parents=True, exist_ok=True)
    with open(home / f".{name}.lock", "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
