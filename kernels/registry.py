"""Every kernel that ships, and where its compiled form comes from."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

from nf.kernels.compile import Artifact, compile_kernels, load_bundle
from nf.kernels.source import KernelSource

MODULES = (
    "gemm",
    "moe",
    "decode_attention",
    "prefill_attention",
    "norm",
    "rope_append",
    "gather",
    "copies",
    "sampling",
    "stream",
    "random_fill",
)
"""Modules of this package with a function ``sources() -> list[KernelSource]``."""


def all_sources() -> list[KernelSource]:
    """Every kernel in every configuration that ships."""
    found = [source for name in MODULES for source in importlib.import_module(f"nf.kernels.{name}").sources()]
    assert len({source.name for source in found}) == len(found), "two kernels share a name"
    return found


def artifacts(sources: list[KernelSource], arch: str) -> list[Artifact]:
    """Compiled kernels, from the bundle ``$NF_KERNEL_BUNDLE`` if it is set, else from the cache or the compilers.

    Raises:
        CompileError: the bundle lacks a kernel, or one has to be compiled and cannot be.
    """
    bundle = os.environ.get("NF_KERNEL_BUNDLE")
    return load_bundle(sources, arch, Path(bundle)) if bundle else compile_kernels(sources, arch)
