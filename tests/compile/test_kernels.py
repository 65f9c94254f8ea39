"""Every kernel in every configuration that ships compiles for its GPU, within the resources it was made for."""

from __future__ import annotations

import shutil

import pytest

from nf.kernels.compile import Artifact
from nf.kernels.gemm import GemmConfig
from nf.kernels.registry import all_sources, artifacts

ARCH = "sm_90a"
STATIC_SHARED_BYTES = 48 * 1024  # more has to be asked for at the launch
STACK_BYTES = {"sample_": 120, "gemm_128x64_1x1x2_swapped_": 16}
"""Per thread, by how a name begins; all others must do without. Two CTAs of these share an SM, which leaves a thread of
sampling 128 registers and one of the GEMM 80, and they spill what they touch once per row or tile, never in a loop over
the row or over K."""

EVICTING = GemmConfig(256, 192, 1, 2, evict="lf").source("none")
"""As the tuning scripts try it, and the table does not name it."""

SOURCES = {source.name: source for source in [*all_sources(), EVICTING]}


@pytest.fixture(scope="session")
def compiled() -> dict[str, Artifact]:
    """All kernels, from the cache where it has them: the first run compiles, later ones find."""
    assert shutil.which("cc") or shutil.which("gcc"), "linking a CuTe DSL launcher needs a C compiler"
    return {artifact.source.name: artifact for artifact in artifacts(list(SOURCES.values()), ARCH)}


@pytest.mark.parametrize("name", SOURCES)
def test_compiles_within_its_resources(compiled: dict[str, Artifact], name: str) -> None:
    resources = compiled[name].resources
    assert resources, "no kernel in the binary"
    for kernel in resources:
        stack = max((limit for start, limit in STACK_BYTES.items() if name.startswith(start)), default=0)
        assert kernel.stack_bytes <= stack, f"{kernel.kernel} spills or indexes registers: {kernel.stack_bytes} bytes"
        assert kernel.registers <= 255
        assert kernel.shared_bytes <= STATIC_SHARED_BYTES
