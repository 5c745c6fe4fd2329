"""The text of a topology file, read with care, and the sentences for what is wrong in it."""

from __future__ import annotations

import stat
from pathlib import Path

from moeplan.errors import CatalogueError

MAX_BYTES = 16 * 1024 * 1024
MAX_STRING = 255
"""NCCL's own limit of a name or value (MAX_STR_LEN in NCCL 2.30.7, src/graph/xml.h)."""
Source = str | Path | bytes


def text_of(source: Source) -> tuple[str, str]:
    """The text of a file, or of the bytes that are given, and what messages call it. Raises CatalogueError."""
    where = "topology" if isinstance(source, bytes) else str(source)
    data = source if isinstance(source, bytes) else _read(Path(source), where)
    if len(data) > MAX_BYTES:
        raise CatalogueError(f"{where}: is larger than {MAX_BYTES} bytes, a topology has about 20_000; give the file")
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise CatalogueError(f"{where}: starts with a byte order mark; save it as plain UTF-8")
    if b"\0" in data:
        raise CatalogueError(f"{where}: holds zero bytes (UTF-16, or binary); save it as plain UTF-8")
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        line = data[: error.start].count(b"\n") + 1
        raise CatalogueError(f"{where}:{line}: holds a byte that is not UTF-8; save it as plain UTF-8") from None
    if not text.strip():
        raise CatalogueError(f"{where}: is empty; give what NCCL_TOPO_DUMP_FILE or `nvidia-smi topo -m` wrote")
    return text, where


def _read(path: Path, where: str) -> bytes:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            raise CatalogueError(f"{where}: is not a regular file; give a topology file")
        with path.open("rb") as file:
            return file.read(MAX_BYTES + 1)
    except (OSError, ValueError) as error:
        said = (error.strerror if isinstance(error, OSError) and error.strerror else "is not a path").lower()
        raise CatalogueError(f"{where}: cannot be read ({said}); give the path of a topology file") from None


def plain(text: str) -> str:
    """A text of a file without what would move a terminal's cursor or turn its writing around."""
    return "".join(char if char.isprintable() else "?" for char in text)


def shown(value: str, limit: int = 60) -> str:
    """A found value in a message: quoted, on one line, short."""
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in repr(value))
    return text if len(text) <= limit else f"{text[: limit - 10]}...{text[-7:]}"


def refusal(where: str, line: int | None, field: str, sentence: str) -> CatalogueError:
    """The error for a place in a file."""
    place = where if line is None else f"{where}:{line}"
    return CatalogueError(f"{place}: {field}: {sentence}")
