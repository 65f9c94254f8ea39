"""Every kernel that ships, and where its compiled form comes from."""

from __future__ import annotations

import importlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from nf.kernels.compile import Artifact, CompileError, cache_dir, cached, compile_kernels, load_bundle, missing_compiler
from nf.kernels.source import KernelSource

MODULES = (
    "sampling",
    "prefill_attention",
    "gemm",
    "moe",
    "decode_attention",
    "norm",
    "rope_append",
    "gather",
    "copies",
    "stream",
    "random_fill",
    "stamp",
)
"""Modules of this package with a function ``sources() -> list[KernelSource]``. Those with what takes longest to compile
come first: begun last, it would keep one process busy after the others have ended."""


def all_sources() -> list[KernelSource]:
    """Every kernel in every configuration that ships."""
    found = [source for name in MODULES for source in importlib.import_module(f"nf.kernels.{name}").sources()]
    assert len({source.name for source in found}) == len(found), "two kernels share a name"
    return found


@dataclass(frozen=True, slots=True)
class KernelOrigin:
    """Where kernels come from: a bundle, or the cache and, for what that lacks, the compilers.

    Args:
        folder: of the bundle or the cache.
        problem: why the kernels cannot be had from there; None if they can, as far as can be told without compiling.
        held: those of ``sources`` that the folder has.
    """

    sources: tuple[KernelSource, ...]
    arch: str
    folder: Path
    problem: str | None
    held: tuple[Artifact, ...] = ()

    def artifacts(self) -> list[Artifact]:
        """The kernels; what is missing is compiled.

        Raises:
            CompileError: there is a problem, or a kernel does not compile.
        """
        if self.problem is not None:
            raise CompileError(self.problem)
        found = {artifact.source: artifact for artifact in self.held}
        missing = [source for source in self.sources if source not in found]
        found |= zip(missing, compile_kernels(missing, self.arch), strict=True)
        return [found[source] for source in self.sources]


def kernel_origin(sources: Iterable[KernelSource], arch: str) -> KernelOrigin:
    """Where this machine has ``sources`` from: the bundle ``$NF_KERNEL_BUNDLE`` if it is set, else the cache."""
    sources = tuple(sources)
    bundle = os.environ.get("NF_KERNEL_BUNDLE")
    if not bundle:
        held = cached(sources, arch)
        missing = set(sources).difference(artifact.source for artifact in held)
        return KernelOrigin(sources, arch, cache_dir() / "kernels", missing_compiler(missing), held)
    folder = Path(bundle)
    try:
        return KernelOrigin(sources, arch, folder, None, tuple(load_bundle(sources, arch, folder)))
    except CompileError as error:
        return KernelOrigin(sources, arch, folder, f"NF_KERNEL_BUNDLE cannot be used ({error})")


def artifacts(sources: Iterable[KernelSource], arch: str) -> list[Artifact]:
    """Compiled kernels, wherever they come from; see ``KernelOrigin``.

    Raises:
        CompileError: they cannot be had.
    """
    return kernel_origin(sources, arch).artifacts()
