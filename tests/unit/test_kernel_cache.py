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
from nf.kernels.compile import CompileError, artifact_path, cache_dir, compile_kernels, load_bundle, prune
from nf.kernels.compiler_processes import CompilerProcessError, CompilerProcesses
from nf.kernels.cubin import read_resources
from nf.kernels.source import KernelSource

ARCH = "sm_90a"


class Compiler:
    """Counts what it is asked to compile; its version can be set, None is not installed."""

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.version: str | None = "1.0"

    def compile(self, source: KernelSource, arch: str) -> bytes:
        assert arch == ARCH
        if source.name.startswith("wrong"):
            raise CompilerProcessError("error: expected a ';'")
        self.compiled.append(source.name)
        return f"{source.name} by {self.version}".encode()


@pytest.fixture
def compiler(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Compiler:
    double = Compiler()
    monkeypatch.setattr(CompilerProcesses, "compile", lambda _self, source, arch: double.compile(source, arch))
    monkeypatch.setattr(kernel_compile, "package_version", lambda _package: double.version)
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
    assert first.path == again.path == artifact_path(cache_dir() / "kernels" / ARCH, kernel(), kernel().digest(ARCH))
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


def test_versions_of_a_kernel_stand_side_by_side(compiler: Compiler) -> None:
    old, new = (compile_kernels([kernel(TILE=tile)], ARCH)[0] for tile in (64, 128))
    assert old.path != new.path
    compiler.version = None
    assert [compile_kernels([made.source], ARCH)[0].path for made in (old, new)] == [old.path, new.path]


NO_RECORDS = ("[]", "null", "3", '"x"', "{}", "[" * 100_000)
DAMAGE = ("binary", "truncated record", "no record", "no binary", "another schema", "resources", *NO_RECORDS)


@pytest.mark.parametrize("damage", DAMAGE, ids=lambda damage: damage[:20])
def test_a_damaged_entry_is_made_anew(compiler: Compiler, damage: str) -> None:
    path = compile_kernels([kernel()], ARCH)[0].path
    record = path.with_suffix(".json")
    if damage == "binary":
        path.write_bytes(b"scale by 1.1")
    elif damage == "truncated record":
        record.write_text(record.read_text()[:40])
    elif damage == "another schema":
        record.write_text(json.dumps(json.loads(record.read_text()) | {"schema": 0}))
    elif damage == "resources":
        record.write_text(json.dumps(json.loads(record.read_text()) | {"resources": [{"registers": 1}]}))
    elif damage in NO_RECORDS:
        record.write_text(damage)
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


def test_what_is_written_to_is_named_before_any_work(
    compiler: Compiler, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "scale.cu"
    with pytest.raises(InputError, match=r"folder: .*scale\.cu/sm_90a cannot be a folder: Not a directory"):
        compile_kernels([kernel()], ARCH, folder=file)
    monkeypatch.setenv("NF_CACHE_DIR", str(file))
    with pytest.raises(InputError, match=r"NF_CACHE_DIR: .*scale\.cu/kernels/sm_90a cannot be a folder"):
        compile_kernels([kernel()], ARCH)
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
    (tmp_path / "empty").mkdir()
    for name, reason in (("nowhere", "No such file"), ("scale.cu", "Not a directory"), ("empty", "kernels for no GPU")):
        with pytest.raises(CompileError, match=rf"{name}: .*{reason}"):
            load_bundle([kernel()], ARCH, tmp_path / name)


@pytest.mark.usefixtures("compiler")
def test_a_bundle_is_rid_of_other_versions_and_of_nothing_else(tmp_path: Path) -> None:
    old, new, other = (
        compile_kernels([source], ARCH, folder=tmp_path)[0]
        for source in (kernel(TILE=64), kernel(TILE=128), kernel("other"))
    )
    own = tmp_path / ARCH / "notes.json"
    own.write_text("{}")
    prune([new.source, other.source], ARCH, tmp_path)
    kept = [path for made in (new, other) for path in (made.path, made.path.with_suffix(".json"))]
    assert sorted((tmp_path / ARCH).iterdir()) == sorted([*kept, own])
    assert old.path not in kept


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
