"""The shelves of the catalogue: which files there are, which one a name means, and their text, read with care."""

from __future__ import annotations

import stat
from functools import lru_cache
from os import fspath
from pathlib import Path
from typing import NamedTuple

from moeplan import menu
from moeplan.catalogue.sheet import Sheet, from_json, from_yaml, shown
from moeplan.errors import CatalogueError, unknown_name

SHELVES = {
    "gpus": "cost_models/gpus",
    "topologies": "topologies",
    "models": "scenarios/models",
    "scenarios": "scenarios",
}
ALIASES = {"cost-models": "gpus", "cost_models": "gpus", "clusters": "topologies"}
MAX_JSON_BYTES, MAX_YAML_BYTES = 4 * 10**6, 256 * 2**10
_PACKAGE = Path(__file__).resolve().parents[1]


class Found(NamedTuple):
    """A thing of the catalogue: the shelf it stands on and its file."""

    kind: str
    path: Path


def root() -> Path:
    """The folder of cost_models/, topologies/ and scenarios/: inside an installed package, beside it in a checkout."""
    packed = _PACKAGE / "_catalogue"
    return packed if packed.is_dir() else _PACKAGE.parent


def names(kind: str) -> list[str]:
    """The names on a shelf (gpus, topologies, models, scenarios) or a menu (schedules, routers, ...), sorted.

    Raises CatalogueError for a kind that does not exist.
    """
    shelf = SHELVES.get(ALIASES.get(kind, kind))
    if shelf is not None:
        return sorted(path.stem for path in (root() / shelf).glob("*.yaml"))
    if kind not in menus():
        raise CatalogueError(unknown_name("kind of thing", kind, [*SHELVES, *menus()]))
    return menu.names(kind)


def menus() -> list[str]:
    """The folders of the package in which each file is one dish: those whose names are plural."""
    folders = (path for path in _PACKAGE.iterdir() if (path / "__init__.py").is_file())
    return sorted(path.name for path in folders if path.name.endswith("s"))


def find(name: str, kind: str | None = None) -> Found:
    """The file that a name of the catalogue means, on one shelf or on any. Raises CatalogueError."""
    shelves = SHELVES if kind is None else {kind: SHELVES[kind]}
    for shelf, folder in shelves.items():
        if name in names(shelf):
            return Found(shelf, root() / folder / f"{name}.yaml")
    word = _word(kind or "names")
    for other in [each for each in SHELVES if each not in shelves]:
        if name in names(other):
            flag = {"models": "--model", "topologies": "--cluster", "gpus": "--cost-model"}.get(other)
            remedy = f"give it with {flag}" if kind == "scenarios" else f"see `moeplan list {kind}`"
            raise CatalogueError(f"{name!r} is a {_word(other)}, not a {word}; {remedy}")
    allowed = [each for shelf in shelves for each in names(shelf)]
    raise CatalogueError(unknown_name(word, name[:80], allowed))


def _word(kind: str) -> str:
    return {"gpus": "GPU", "topologies": "cluster"}.get(kind, kind.removesuffix("s"))


def is_path(text: str) -> bool:
    """Whether a person means a file and not a name: it has a slash or ends like a file."""
    return "/" in text or "\\" in text or text.lower().endswith((".yaml", ".yml", ".json"))


def label(path: Path) -> str:
    """The file as messages name it: from the catalogue's root if it stands there, else as it was given."""
    folder = root()
    inside = path.is_relative_to(folder) and path.relative_to(folder).parts[0] in (
        "cost_models",
        "topologies",
        "scenarios",
    )
    return path.relative_to(folder).as_posix() if inside else shown(fspath(path), limit=250)[1:-1]


def check_regular(path: Path) -> None:
    """Raises CatalogueError for what is not a regular file of at most 4 MB: nothing, a directory, a device."""
    try:
        state = path.stat()
    except (OSError, ValueError) as error:
        raise CatalogueError(f"{label(path)}: {_reason(error)}; give the path of a YAML or JSON file") from None
    if not stat.S_ISREG(state.st_mode):
        what = "a directory" if stat.S_ISDIR(state.st_mode) else "not a regular file"
        raise CatalogueError(f"{label(path)}: is {what}; give the path of a YAML or JSON file")
    if state.st_size > MAX_JSON_BYTES:
        raise CatalogueError(f"{label(path)}: is larger than {MAX_JSON_BYTES / 1e6:.2g} MB; give a smaller file")


def read(path: Path) -> Sheet:
    """The sheet of a YAML or JSON file. Raises CatalogueError for a file that is missing, odd or too large."""
    check_regular(path)
    state = path.stat()
    return _parsed(path, state.st_mtime_ns, state.st_size)


@lru_cache(maxsize=128)
def _parsed(path: Path, mtime_ns: int, size: int) -> Sheet:
    """`read`, remembered for as long as the file does not change. Nobody writes into a sheet."""
    is_json = path.suffix.lower() == ".json"
    text = read_text(path, limit_bytes=MAX_JSON_BYTES if is_json else MAX_YAML_BYTES)
    return (from_json if is_json else from_yaml)(text, label(path))


def read_text(path: Path, *, limit_bytes: int = MAX_JSON_BYTES) -> str:
    """The file's text, which must be UTF-8 without a byte order mark and at most `limit_bytes` long."""
    try:
        with path.open("rb") as file:
            raw = file.read(limit_bytes + 1)
    except OSError as error:
        raise CatalogueError(f"{label(path)}: {_reason(error)}; give a file that can be read") from None
    if len(raw) > limit_bytes:
        raise CatalogueError(f"{label(path)}: is larger than {limit_bytes / 1e6:.2g} MB; give a smaller file")
    return _decoded(raw, label(path))


def _decoded(raw: bytes, file: str) -> str:
    if raw.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise CatalogueError(f"{file}: is UTF-16; save it as UTF-8")
    if raw.startswith(b"\xef\xbb\xbf"):
        raise CatalogueError(f"{file}: starts with a byte order mark (BOM); save it as UTF-8 without one")
    if b"\0" in raw:
        line = raw[: raw.index(b"\0")].count(b"\n") + 1
        raise CatalogueError(f"{file}:{line}: holds a NUL byte, so it is no text; save it as UTF-8")
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw[: error.start].count(b"\n") + 1
        raise CatalogueError(f"{file}:{line}: holds a byte that is not UTF-8; save it as UTF-8") from None


def _reason(error: OSError | ValueError) -> str:
    if isinstance(error, FileNotFoundError | NotADirectoryError):
        return "does not exist"
    if isinstance(error, PermissionError):
        return "may not be read"
    return (error.strerror if isinstance(error, OSError) and error.strerror else "is not a path").lower()
