"""What the compiler gave a kernel — registers, stack, shared memory — read from the cubin's ELF sections.

The attribute codes are those of ``.nv.info`` (EIATTR_*), as ``cuobjdump --dump-elf`` names them.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass

_ELF_MAGIC = b"\x7fELF\x02\x01"
_MACHINE_CUDA = 190
_REGISTER_COUNT, _FRAME_SIZE = 0x2F, 0x11  # EIATTR_REGCOUNT, EIATTR_FRAME_SIZE: (symbol, value)
_SIZED_VALUE = 0x04  # EIFMT_SVAL: a size and that many bytes follow; other formats hold their value in place


@dataclass(frozen=True, slots=True)
class Resources:
    """Per thread: ``registers`` and ``stack_bytes`` (spills live there). Per CTA: static ``shared_bytes``."""

    kernel: str
    registers: int
    stack_bytes: int
    shared_bytes: int

    def to_dict(self) -> dict[str, str | int]:
        return asdict(self)


def read_resources(data: bytes) -> tuple[Resources, ...]:
    """Resources of every kernel in the cubins that ``data`` (a cubin, or a library that embeds some) holds."""
    found: list[Resources] = []
    start = data.find(_ELF_MAGIC)
    while start >= 0:
        if struct.unpack_from("<H", data, start + 18)[0] == _MACHINE_CUDA:
            found += _kernels(data[start:])
        start = data.find(_ELF_MAGIC, start + 1)
    return tuple(found)


def _sections(elf: bytes) -> dict[str, bytes]:
    (table,) = struct.unpack_from("<Q", elf, 40)
    entry_size, count, names_index = struct.unpack_from("<HHH", elf, 58)
    headers = [struct.unpack_from("<IIQQQQIIQQ", elf, table + i * entry_size) for i in range(count)]
    names = elf[headers[names_index][4] :]
    sections = {}
    for name, kind, _, _, offset, size, *_ in headers:
        text = names[name : names.index(b"\0", name)].decode()
        no_bits = kind == 8  # .nv.shared takes no room in the file; its size is what counts
        sections[text] = bytes(size) if no_bits else elf[offset : offset + size]
    return sections


def _kernels(elf: bytes) -> Iterator[Resources]:
    sections = _sections(elf)
    strings, symbols = sections[".strtab"], sections[".symtab"]
    values: dict[int, dict[int, int]] = {_REGISTER_COUNT: {}, _FRAME_SIZE: {}}
    for attribute, payload in _attributes(sections.get(".nv.info", b"")):
        if attribute in values:
            symbol, value = struct.unpack("<II", payload[:8])
            values[attribute][symbol] = value
    for symbol, registers in values[_REGISTER_COUNT].items():
        (name_at,) = struct.unpack_from("<I", symbols, symbol * 24)
        name = strings[name_at : strings.index(b"\0", name_at)].decode()
        shared = len(sections.get(f".nv.shared.{name}", b""))
        yield Resources(name, registers, values[_FRAME_SIZE].get(symbol, 0), shared)


def _attributes(info: bytes) -> Iterator[tuple[int, bytes]]:
    at = 0
    while at + 4 <= len(info):
        form, attribute, size = struct.unpack_from("<BBH", info, at)
        at += 4
        if form == _SIZED_VALUE:
            yield attribute, info[at : at + size]
            at += size
