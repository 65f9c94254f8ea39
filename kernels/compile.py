"""The only place that compiles kernels and keeps what was compiled.

An artifact is one file — a shared library with a launcher (CuTe DSL) or a cubin (CUDA C++) — beside a small JSON that
says what it was made from. Artifacts live in the cache (``NF_CACHE_DIR``, else ``XDG_CACHE_HOME``/nf) or in a kernel
bundle, a folder of the same layout that loads without any compiler. Their names tell versions of a kernel apart, so
versions of nf can share a cache. Compiling needs neither a GPU nor libcuda.
"""

from __future__ import annotations

import concurrent.futures
import fcntl
import hashlib
import itertools
import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nf.errors import InputError, NfError
from nf.files import make_folder, write_whole
from nf.kernels.compiler_processes import CompilerProcessError, CompilerProcesses
from nf.kernels.cubin import Resources, read_resources
from nf.kernels.source import KernelSource
from nf.kernels.toolchain import find_linker
from nf.machine import cpu_cores, package_version

log = logging.getLogger(__name__)

ARCHES = ("sm_90a",)
SCHEMA = 1  # of the artifact's JSON; raised when its meaning changes
PACKAGES = {
    "cute": ("nvidia-cutlass-dsl-libs-base", "nvidia-cutlass-dsl-libs-cu13", "cuda-bindings"),
    "cuda": ("nvidia-cuda-nvrtc", "cuda-core", "cuda-pathfinder"),
}
"""What a language takes. The first is its compiler, whose version decides whether an artifact is still right."""
SUFFIX = {"cute": ".so", "cuda": ".cubin"}
POLL_SECONDS = 0.05  # between looks whether another process is done with a kernel


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
    own, shared = os.environ.get("NF_CACHE_DIR"), os.environ.get("XDG_CACHE_HOME")
    if own or shared:
        return Path(own) if own else Path(shared or "") / "nf"
    try:
        return Path.home() / ".cache" / "nf"
    except RuntimeError:
        raise InputError("NF_CACHE_DIR", "must be set, as there is no home directory") from None


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
        processes: compiler processes; None takes one per core that this process may use.
        progress: called with the name of each kernel that was compiled.

    Raises:
        InputError: the arch is unknown, or nothing can be written in the folder.
        CompileError: a compiler is not installed, or a source does not compile; the message names it.
    """
    if arch not in ARCHES:
        raise InputError("arch", f"must be one of {', '.join(ARCHES)}, not {arch!r}")
    home = (folder or cache_dir() / "kernels") / arch
    sources = list(sources)
    found = {source: _fresh(home, source, arch) for source in sources}
    missing = [source for source, artifact in found.items() if artifact is None]
    problem = missing_compiler(missing)
    if problem is not None:
        raise CompileError(problem)
    if missing:
        make_folder("folder" if folder else "NF_CACHE_DIR", home)
    for source, artifact in _compile_all(home, missing, arch, processes):
        found[source] = artifact
        if progress is not None:
            progress(source.name)
    return [artifact for artifact in map(found.__getitem__, sources) if artifact is not None]


def prune(sources: Iterable[KernelSource], arch: str, folder: Path) -> None:
    """Remove from a kernel bundle what it has of other versions, so that it is as large as what it is for."""
    home = folder / arch
    wanted = {artifact_path(home, source, source.digest(arch)).stem for source in sources}
    for record in home.glob("*-????????????.json"):
        if record.stem not in wanted:
            for suffix in (*SUFFIX.values(), ".json"):
                record.with_suffix(suffix).unlink(missing_ok=True)
    for lock in home.glob(".*.lock"):
        lock.unlink(missing_ok=True)


def cached(sources: Iterable[KernelSource], arch: str) -> tuple[Artifact, ...]:
    """Those of ``sources`` that need not be compiled, because the cache has them."""
    home = cache_dir() / "kernels" / arch
    found = (_fresh(home, source, arch) for source in sources)
    return tuple(artifact for artifact in found if artifact is not None)


def missing_compiler(sources: Iterable[KernelSource]) -> str | None:
    """Why ``sources``, which nobody has compiled yet, cannot be: a compiler is not installed. None if they can."""
    needed = {source.language for source in sources}
    for language, packages in PACKAGES.items():
        if language not in needed:
            continue
        for package in packages:
            if package_version(package) is None:
                return _not_compiled(f"{package} is not installed", "pip install 'nf[cuda]'")
        if language == "cute" and find_linker() is None:
            if own := os.environ.get("CC"):
                return _not_compiled(f"CC, {own!r}, is no command that is there", "set CC to a C compiler")
            return _not_compiled("there is no C compiler to link their launchers", "install gcc, or set CC")
    return None


def _not_compiled(why: str, remedy: str) -> str:
    return (
        f"the kernels are not compiled and {why} ({remedy}, or point NF_KERNEL_BUNDLE at a bundle made by `nf compile`)"
    )


def load_bundle(sources: Iterable[KernelSource], arch: str, folder: Path) -> list[Artifact]:
    """Artifacts of all ``sources`` from a kernel bundle; nothing is compiled.

    Raises:
        CompileError: the bundle was made for another arch or from other sources, or is damaged; names the kernel.
    """
    home = folder / arch
    try:
        held = sorted(path.name for path in folder.iterdir() if path.name.startswith("sm_"))
    except OSError as error:
        raise CompileError(f"{folder}: {error.strerror}") from None
    if arch not in held:
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
    """Each as soon as it is done."""
    if not sources:
        return
    count = min(processes or cpu_cores(), len(sources))
    with CompilerProcesses(count) as compilers, concurrent.futures.ThreadPoolExecutor(count) as pool:
        left, jobs = iter(sources), dict[concurrent.futures.Future[Artifact], KernelSource]()

        def begin(number: int) -> None:
            for source in itertools.islice(left, number):
                jobs[pool.submit(_compile_locked, home, source, arch, compilers)] = source

        try:
            begin(count)  # no more: at its end the interpreter waits for all that has been submitted
            while jobs:
                done, _ = concurrent.futures.wait(jobs, return_when=concurrent.futures.FIRST_COMPLETED)
                begin(len(done))
                for job in done:
                    yield jobs.pop(job), job.result()
        except CompileError:
            raise  # what was begun is kept
        except BaseException:
            compilers.stop()
            raise


def _compile_locked(home: Path, source: KernelSource, arch: str, compilers: CompilerProcesses) -> Artifact:
    """Compile one source unless another process has done so by the time its lock is ours."""
    with _lock(home, source.name, compilers):
        fresh = _fresh(home, source, arch)
        if fresh is not None:
            return fresh
        try:
            binary = compilers.compile(source, arch)
        except CompilerProcessError as error:
            raise CompileError(f"{source.name}: {error}") from error
        resources, digest = read_resources(binary), source.digest(arch)
        record = {
            "schema": SCHEMA,
            "name": source.name,
            "arch": arch,
            "digest": digest,
            "compiler": package_version(PACKAGES[source.language][0]),
            "sha256": hashlib.sha256(binary).hexdigest(),
            "resources": [resource.to_dict() for resource in resources],
        }
        path = artifact_path(home, source, digest)
        write_whole(path, binary)
        write_whole(path.with_suffix(".json"), json.dumps(record, indent=1))
        return Artifact(source, path, resources)


def artifact_path(home: Path, source: KernelSource, digest: str) -> Path:
    """Where ``home``, the kernels for an arch, has the artifact of the version of ``source`` with this digest."""
    return home / f"{source.name}-{digest[:12]}{SUFFIX[source.language]}"


def _fresh(home: Path, source: KernelSource, arch: str) -> Artifact | None:
    """The artifact of ``source`` in ``home`` unless the installed compiler is another than the one that made it."""
    compiler = package_version(PACKAGES[source.language][0])
    return _stored(home, source, arch, lambda record: compiler in (None, record["compiler"]))


def _stored(
    home: Path, source: KernelSource, arch: str, accept: Callable[[dict[str, Any]], bool] = lambda _record: True
) -> Artifact | None:
    """The artifact of ``source`` in ``home`` if it is whole, of these sources and its record acceptable."""
    digest = source.digest(arch)
    path = artifact_path(home, source, digest)
    try:
        binary = path.read_bytes()
        record = json.loads(path.with_suffix(".json").read_bytes())
        if record["schema"] != SCHEMA or record["digest"] != digest or not accept(record):
            return None
        if record["sha256"] == hashlib.sha256(binary).hexdigest():
            return Artifact(source, path, tuple(Resources(**values) for values in record["resources"]))
    except OSError:  # mostly, there is none
        return None
    except (ValueError, TypeError, KeyError, RecursionError):  # no record
        pass
    log.warning("%s: damaged, not used", path)
    return None


@contextmanager
def _lock(home: Path, name: str, compilers: CompilerProcesses) -> Iterator[None]:
    """Hold the file lock of one kernel; another process that wants the same kernel waits and then finds it done."""
    path = home / f".{name}.lock"
    with open(path, "w") as file:
        while True:
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if compilers.stopped.is_set():
                    raise CompileError(f"{name}: stopped") from None
                time.sleep(POLL_SECONDS)
            except OSError as error:
                raise CompileError(f"{path}: cannot be locked: {error.strerror}") from None
        yield
