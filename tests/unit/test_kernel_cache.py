"""Compiled artifacts: kept, found again, made anew when what they depend on has changed. The compiler is a double."""

from __future__ import annotations

import json
import struct
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from nf.errors import InputError
from nf.kernels import compile as kernel_compile
from nf.kernels import source as kernel_source
from nf.kernels import toolchain
from nf.kernels.compile import CompileError, cache_dir, compile_kernels, load_bundle
from nf.kernels.cubin import read_resources
from nf.kernels.source import KernelSource

ARCH = "sm_90a"


class Compiler:
    """Counts what it is asked to compile; its version can be set, None is not installed."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.version: str | None = "1.0"

    def compile_source(self, source: KernelSource, arch: str) -> bytes:
        assert arch == ARCH
        if source.name.startswith("wrong"):
            raise RuntimeError("error: expected a ';'")
        self.compiled.append(source.name)
        return f"{source.name} by {self.version}".encode()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    double = Compiler()
    monkeypatch.setattr(toolchain, "compile_source", double.compile_source)
    monkeypatch.setattr(kernel_compile, "_compiler_version", lambda _language: double.version)
    monkeypatch.setenv("NF_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.setattr(kernel_source, "HERE", tmp_path)
    (tmp_path / "scale.cu").write_text("// scale")
    return double


def kernel(name: str = "scale", **config: int) -> KernelSource:
    return KernelSource(name, "cuda", ("scale.cu",), ("pointer", "int32"), entry="scale", config=tuple(config.items()))


def test_compiled_once_and_found_again(compiler: Compiler) -> None:
    first = compile_kernels([kernel()], ARCH)[0]
    again = compile_kernels([kernel()], ARCH)[0]
    assert compiler.compiled == ["scale"]
    assert first.path == again.path == cache_dir() / "kernels" / ARCH / "scale.cubin"
    assert again.path.read_bytes() == b"scale by 1.0"


def test_a_changed_source_configuration_or_compiler_compiles_anew(compiler: Compiler, tmp_path: Path) -> None:
    compile_kernels([kernel(TILE=64)], ARCH)
    compile_kernels([kernel(TILE=128)], ARCH)
    assert len(compiler.compiled) == 2
    (tmp_path / "scale.cu").write_text("// scale, faster")
    compile_kernels([kernel(TILE=128)], ARCH)
    assert len(compiler.compiled) == 3
    compiler.version = "1.1"
    assert compile_kernels([kernel(TILE=128)], ARCH)[0].path.read_bytes() == b"scale by 1.1"
    compile_kernels([kernel(TILE=128)], ARCH)
    assert len(compiler.compiled) == 4


@pytest.mark.parametrize("damage", ["binary", "truncated record", "no record", "no binary", "another schema"])
def test_a_damaged_entry_is_made_anew(compiler: Compiler, damage: str) -> None:
    path = compile_kernels([kernel()], ARCH)[0].path
    record = path.with_suffix(".json")
    if damage == "binary":
        path.write_bytes(b"scale by 1.1")
    elif damage == "truncated record":
        record.write_text(record.read_text()[:40])
    elif damage == "another schema":
        record.write_text(json.dumps(json.loads(record.read_text()) | {"schema": 0}))
    else:
        (record if damage == "no record" else path).unlink()
    assert compile_kernels([kernel()], ARCH)[0].path.read_bytes() == b"scale by 1.0"
    assert compiler.compiled == ["scale", "scale"]


def test_without_a_compiler_what_is_there_serves(compiler: Compiler) -> None:
    compile_kernels([kernel()], ARCH)
    compiler.version = None
    assert compile_kernels([kernel()], ARCH)[0].path.read_bytes() == b"scale by 1.0"
    with pytest.raises(CompileError, match=r"not compiled and nvidia-cuda-nvrtc is not installed \(pip install"):
        compile_kernels([kernel("other")], ARCH)


def test_errors_name_the_kernel_and_the_arch(compiler: Compiler) -> None:
    with pytest.raises(CompileError, match="wrong: error: expected a ';'"):
        compile_kernels([kernel("wrong")], ARCH)
    with pytest.raises(InputError, match="arch: must be one of sm_90a, not 'sm_80'"):
        compile_kernels([kernel()], "sm_80")
    assert compiler.compiled == []


def test_many_at_a_time_compile_one_kernel_once(compiler: Compiler) -> None:
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda _: compile_kernels([kernel()], ARCH)[0].path.read_bytes(), range(16)))
    assert set(found) == {b"scale by 1.0"}
    assert compiler.compiled == ["scale"]


def test_a_bundle_loads_without_a_compiler_and_tells_what_is_wrong(compiler: Compiler, tmp_path: Path) -> None:
    bundle = tmp_path / "bundle"
    compile_kernels([kernel()], ARCH, folder=bundle)
    for version in (None, "another"):
        compiler.version = version
        assert [artifact.path.parent for artifact in load_bundle([kernel()], ARCH, bundle)] == [bundle / ARCH]
    assert compiler.compiled == ["scale"]
    with pytest.raises(CompileError, match=r"bundle: holds kernels for sm_90a, this GPU needs sm_100a"):
        load_bundle([kernel()], "sm_100a", bundle)
    with pytest.raises(CompileError, match=r"no intact scale of this version of nf; make the bundle anew"):
        load_bundle([kernel(TILE=8)], ARCH, bundle)
    with pytest.raises(CompileError, match="holds kernels for no GPU"):
        load_bundle([kernel()], ARCH, tmp_path / "nowhere")


@pytest.mark.usefixtures("compiler")
def test_the_digest_covers_the_whole_declaration() -> None:
    one = kernel(TILE=64)
    others = [replace(one, entry="b"), replace(one, parameters=("pointer",)), replace(one, config=(("TILE", 65),))]
    assert len({source.digest(ARCH) for source in [one, *others]}) == 4
    assert one.digest(ARCH) != one.digest("sm_100a")


def test_resources_are_read_from_the_elf() -> None:
    """A cubin of one kernel, put together by hand after the ELF specification."""
    names = [b"", b".shstrtab", b".strtab", b".symtab", b".nv.info", b".nv.shared.scale"]
    name_table = b"\0".join(names) + b"\0"
    strings = b"\0scale\0"
    symbols = bytes(24) + struct.pack("<IBBHQQ", 1, 0, 0, 0, 0, 0)
    info = struct.pack("<BBHII", 4, 0x2F, 8, 1, 168) + struct.pack("<BBHII", 4, 0x11, 8, 1, 16)
    bodies = [b"", name_table, strings, symbols, struct.pack("<BBH", 3, 0x1B, 255) + info, b""]
    kinds, sizes = [0, 3, 3, 2, 1, 8], [len(body) for body in bodies[:-1]] + [1024]
    offset, headers, data = 64, b"", b""
    for index, body in enumerate(bodies):
        name_at = 0 if index == 0 else name_table.index(b"\0" + names[index] + b"\0") + 1
        headers += struct.pack("<IIQQQQIIQQ", name_at, kinds[index], 0, 0, offset, sizes[index], 0, 0, 1, 0)
        data += body
        offset += len(body)
    head = (
        b"\x7fELF\x02\x01\x01"
        + bytes(9)
        + struct.pack("<HHIQQQIHHHHHH", 2, 190, 1, 0, 0, offset, 0, 64, 0, 0, 64, 6, 1)
    )
    library = b"\x7fELF\x02\x01\x01" + bytes(9) + struct.pack("<HH", 3, 62) + bytes(100)  # what embeds it
    (found,) = read_resources(library + head + data + headers)
    assert (found.kernel, found.registers, found.stack_bytes, found.shared_bytes) == ("scale", 168, 16, 1024)
