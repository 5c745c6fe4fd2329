"""Reads recorded routings from files that may come from anywhere: never pickle, never more than a stated size.

Axes of arrays: T step, L layer, S source, E expert, N token, K pick of a token.
"""

from __future__ import annotations

import gzip
import io
import json
import math
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

import numpy as np
import numpy.typing as npt

from moeplan.errors import CatalogueError

MAX_BYTES = 256 * 2**20
MAX_LINE_BYTES = 16 * 2**20
MAX_HEADER_BYTES = 10_000
_BROKEN = (
    OSError,
    EOFError,
    ValueError,
    KeyError,
    RuntimeError,  # an encrypted archive; a header or line nested beyond the recursion limit
    NotImplementedError,
    MemoryError,
    zipfile.BadZipFile,
    zlib.error,
)


def refuse(path: Path, field: str, found: object, *, allowed: str, remedy: str) -> CatalogueError:
    """The error for something in a trace file."""
    return CatalogueError(f"{path}: {field}: {found} is not {allowed}; {remedy}")


def existing_file(text: str) -> Path:
    """The file at `text`; refuses what is not there and what is no plain file."""
    path = Path(text)
    if not path.is_file():
        found = "is not a file" if path.exists() else "is not there"
        raise CatalogueError(f"{path}: {found}; give the path of a .npz, .jsonl or .jsonl.gz file")
    return path


def read_npz(path: Path, array: str | None) -> npt.NDArray[Any]:
    """One array of numbers of an .npz archive: `array`, or the only one. Reads the .npy format itself, so no pickle."""
    try:
        with zipfile.ZipFile(path) as archive:
            info = archive.getinfo(_member(path, archive, array))
            if info.file_size > MAX_BYTES:
                raise _too_large(path, info.filename, info.file_size)
            with archive.open(info) as member:
                return _read_npy(path, info.filename, member, info.file_size)
    except _BROKEN as error:
        raise refuse(path, "file", f"it ({error})", allowed="a whole .npz archive", remedy="write it again") from error


def _too_large(path: Path, field: str, size_bytes: int) -> CatalogueError:
    allowed = f"at most {MAX_BYTES} bytes unpacked"
    return refuse(path, field, f"{size_bytes} bytes", allowed=allowed, remedy="add the counts of steps up first")


def _member(path: Path, archive: zipfile.ZipFile, array: str | None) -> str:
    there = sorted(name.removesuffix(".npy") for name in archive.namelist())
    shown = ", ".join(there[:12]) or "none"
    if array is None and len(there) != 1:
        raise refuse(path, "array", "none named", allowed="clear", remedy=f"set array to one of: {shown}")
    if array is not None and array not in there:
        raise refuse(path, "array", repr(array), allowed="in the file", remedy=f"use one of: {shown}")
    return f"{array if array is not None else there[0]}.npy"


def _read_npy(path: Path, name: str, member: IO[bytes], size_bytes: int) -> npt.NDArray[Any]:
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(member)
    if version not in readers:
        raise refuse(path, name, f"npy version {version}", allowed="1.0 or 2.0", remedy="save plain numbers with numpy")
    shape, fortran, dtype = readers[version](member, max_header_size=MAX_HEADER_BYTES)
    if dtype.kind not in "iuf":
        raise refuse(path, name, f"dtype {dtype}", allowed="whole or real numbers", remedy="save int64 or float64")
    wanted = math.prod(shape) * dtype.itemsize
    if min(shape, default=0) <= 0 or wanted > size_bytes:
        raise refuse(path, name, f"shape {shape}", allowed=f"what {size_bytes} bytes can hold", remedy="write it again")
    data = member.read(wanted)
    if len(data) != wanted:
        raise refuse(path, name, f"{len(data)} bytes", allowed=f"the {wanted} of its shape", remedy="write it again")
    return np.frombuffer(data, dtype=dtype).reshape(shape, order="F" if fortran else "C")


def read_jsonl(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Place and content of each line of a .jsonl or .jsonl.gz file; every line is a JSON object."""
    try:
        with gzip.open(path) if path.suffix == ".gz" else path.open("rb") as stream:
            yield from _records(path, stream)
    except _BROKEN as error:
        raise refuse(path, "file", f"it ({error})", allowed="whole JSON lines", remedy="write it again") from error


def _records(path: Path, stream: IO[bytes] | gzip.GzipFile | io.BufferedReader) -> Iterator[tuple[str, dict[str, Any]]]:
    size_bytes = number = 0
    while line := stream.readline(MAX_LINE_BYTES + 1):
        number += 1
        size_bytes += len(line)
        if size_bytes > MAX_BYTES or len(line) > MAX_LINE_BYTES:
            raise _too_large(path, f"line {number}", size_bytes)
        if not line.strip():
            continue
        record = json.loads(line, parse_constant=_refuse_constant)
        if not isinstance(record, dict):
            raise refuse(path, f"line {number}", type(record).__name__, allowed="a JSON object", remedy="use {...}")
        yield f"line {number}", record


def _refuse_constant(text: str) -> float:
    raise ValueError(f"{text} is not a finite number")
