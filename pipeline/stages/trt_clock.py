"""Let the clock stand still for a native library: what it writes must not depend on how long its work took.

TensorRT-RTX formats durations while it builds. Their length moves its heap, the heap decides in which order it walks
objects that it keeps by address, and so a plan's bytes depend on the time that a build took (measured: 6 of 20 plans
differed; with the clock stopped, none of 24). There is no setting for it. So, in the process that does nothing but
compile, the library's calls of clock_gettime are led to clock_getres, which takes the same arguments and always gives
the same answer. Linux on x86-64 and Arm64 with glibc; elsewhere nothing is done, and plans may differ.
"""

from __future__ import annotations

import ctypes
import mmap
import platform
import struct
import sys
from pathlib import Path

_FROM, _TO = b"clock_gettime", b"clock_getres"
# Tags of an ELF file's dynamic section, and the types of relocations that hold a function's address.
_STRTAB, _SYMTAB, _RELA, _RELASZ, _JMPREL, _PLTRELSZ = 5, 6, 7, 8, 23, 2
_PT_DYNAMIC = 2
_SLOTS = {"x86_64": (6, 7), "aarch64": (1025, 1026)}


def stop(*libraries: str) -> int:
    """Lead the calls of the loaded libraries whose file names begin so to a still clock. How many were led."""
    kinds = _SLOTS.get(platform.machine(), ()) if sys.platform == "linux" else ()
    target = ctypes.cast(getattr(ctypes.CDLL(None), _TO.decode()), ctypes.c_void_p).value if kinds else None
    if target is None:
        return 0
    return sum(_lead(base, kinds, target) for base in _bases(libraries))


def _bases(libraries: tuple[str, ...]) -> list[int]:
    """Where each library begins in memory."""
    found: dict[str, int] = {}
    for line in Path("/proc/self/maps").read_text("utf-8").splitlines():
        parts = line.split(maxsplit=5)
        if len(parts) == 6 and parts[5].rpartition("/")[2].startswith(libraries):
            found.setdefault(parts[5], int(parts[0].partition("-")[0], 16))
    return list(found.values())


def _lead(base: int, kinds: tuple[int, ...], target: int) -> int:
    dynamic = _dynamic(base)
    strings, symbols = dynamic[_STRTAB], dynamic[_SYMTAB]
    led = 0
    for start, size in ((_JMPREL, _PLTRELSZ), (_RELA, _RELASZ)):
        if start not in dynamic:
            continue
        table = ctypes.string_at(dynamic[start], dynamic[size])
        for offset, info, _ in struct.iter_unpack("<QQq", table):
            if info & 0xFFFFFFFF not in kinds:
                continue
            (name,) = struct.unpack("<I", ctypes.string_at(symbols + 24 * (info >> 32), 4))
            if ctypes.string_at(strings + name, len(_FROM) + 1) == _FROM + b"\0":
                led += _write(base + offset, target)
    return led


def _dynamic(base: int) -> dict[int, int]:
    """Tag -> value of the dynamic section; addresses as they are in memory."""
    header = ctypes.string_at(base, 64)
    offset, size, count = (*struct.unpack_from("<Q", header, 32), *struct.unpack_from("<HH", header, 54))
    found: dict[int, int] = {}
    for index in range(count):
        kind, _, _, address, _, _, length, _ = struct.unpack(
            "<IIQQQQQQ", ctypes.string_at(base + offset + index * size, 56)
        )
        if kind == _PT_DYNAMIC:
            for tag, value in struct.iter_unpack("<qQ", ctypes.string_at(base + address, length)):
                found.setdefault(tag, value)
    # glibc has made addresses of the tables' offsets already, but not in every version.
    for tag in (_STRTAB, _SYMTAB, _RELA, _JMPREL):
        if tag in found and found[tag] < base:
            found[tag] += base
    return found


def _write(address: int, value: int) -> bool:
    """Put a pointer into a table that the loader may have made read-only; it stays writable, for the loader."""
    page = address & ~(mmap.PAGESIZE - 1)
    protect = ctypes.CDLL(None, use_errno=True).mprotect
    protect.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    if protect(page, mmap.PAGESIZE, mmap.PROT_READ | mmap.PROT_WRITE):
        return False
    ctypes.c_uint64.from_address(address).value = value
    return True
