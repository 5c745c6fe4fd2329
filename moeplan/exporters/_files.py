"""Files written whole or not at all, and the sentences for those that cannot be."""

from __future__ import annotations

import os
import secrets
import stat
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from moeplan.errors import MoeplanError

Content = bytes | str | Iterable[bytes]


def write_atomically(path: str | Path, content: Content) -> None:
    """A file at `path` that holds `content`: written beside it, synced to the disk and then renamed over it.

    Text is UTF-8. An existing file keeps its mode, a symbolic link its place: its target is written. On any failure
    the file is as it was and nothing else is left in the folder. Raises MoeplanError where there is no folder to write
    in, where something that is not a file has the name, and where the disk or its permissions refuse.
    """
    target = _resolved(path)
    mode = _mode_of(target, shown(path))
    draft = target.with_name(f".moeplan-{secrets.token_hex(8)}")
    try:
        _write(draft, content, mode)
        draft.replace(target)
    except OSError as error:
        raise MoeplanError(f"{shown(path)}: cannot be written: {_why(error)}; {_remedy(error)}") from error
    finally:
        with suppress(OSError):
            draft.unlink()


def suffix_of(path: str | Path, allowed: tuple[str, ...]) -> str:
    """That of `allowed` which the name of `path` ends in, in any case. MoeplanError if there is none."""
    for suffix in allowed:
        if os.fspath(path).lower().endswith(suffix):
            return suffix
    raise MoeplanError(f"{shown(path)}: the suffix says nothing that can be written here; use {' or '.join(allowed)}")


def shown(path: str | Path) -> str:
    """The path as it may stand in a message: as it is, or quoted where it has line breaks or the like."""
    text = os.fspath(path)
    return text if text.isprintable() and text else repr(text)


def label(text: str, *, longest: int = 60) -> str:
    """`text` fit to be shown anywhere: printable ASCII on one line, cut at `longest` characters."""
    plain = text[: longest + 1].encode("unicode_escape").decode("ascii")
    return plain if len(plain) <= longest else plain[: longest - 3] + "..."


def _resolved(path: str | Path) -> Path:
    try:
        return Path(os.path.realpath(path))
    except (OSError, ValueError) as error:
        raise MoeplanError(f"{shown(path)}: is no path ({error}); use another name") from error


def _mode_of(target: Path, name: str) -> int | None:
    """The permissions of the file that will be replaced; None if there is none."""
    try:
        mode = target.stat().st_mode
    except FileNotFoundError:
        if target.parent.is_dir():
            return None
        raise MoeplanError(f"{name}: there is no folder {shown(target.parent)}; make it, or use another path") from None
    except OSError as error:
        raise MoeplanError(f"{name}: cannot be written: {_why(error)}; {_remedy(error)}") from error
    if not stat.S_ISREG(mode):
        raise MoeplanError(f"{name}: is {_kind(mode)}, not a file; add a file's name, or use another path")
    if not os.access(target, os.W_OK):
        raise MoeplanError(f"{name}: is read-only; make it writable, or use another path")
    return stat.S_IMODE(mode)


def _write(draft: Path, content: Content, mode: int | None) -> None:
    pieces = (content.encode(),) if isinstance(content, str) else (content,) if isinstance(content, bytes) else content
    with draft.open("xb") as file:
        if mode is not None:
            draft.chmod(mode)
        file.writelines(pieces)
        file.flush()
        os.fsync(file.fileno())


def _kind(mode: int) -> str:
    return "a folder" if stat.S_ISDIR(mode) else "a device, a pipe or a socket"


def _why(error: OSError) -> str:
    return (error.strerror or type(error).__name__).lower()


def _remedy(error: OSError) -> str:
    if isinstance(error, PermissionError):
        return "use a folder that you may write in"
    if isinstance(error, NotADirectoryError):
        return "use a path whose folders are folders"
    if isinstance(error, FileNotFoundError):
        return "use a folder that takes files"
    return "free some space or use another path"
