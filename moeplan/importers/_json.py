"""JSON from strangers: read with care, and then field by field with a name for everything that is wrong.

Python's own reader lets pass NaN, Infinity, 1e999, duplicate keys and nesting that ends the interpreter; here each is
a CatalogueError.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moeplan.errors import CatalogueError

MAX_BYTES = 16 * 1024 * 1024
MAX_DEPTH = 32
# transformers itself writes an infinite upper bound of Mamba's step here; no dimension depends on it
_MAY_BE_INFINITE = {"time_step_limit"}


class _NotFinite:
    """Stands for a number that is none, until its key is known."""

    def __init__(self, text: str) -> None:
        self.text = text


def read_object(path: Path) -> dict[str, Any]:
    """The JSON object in the file at `path`. Raises CatalogueError for what is not plain, small UTF-8 JSON."""
    try:
        size = path.stat().st_size
        if size > MAX_BYTES:
            raise CatalogueError(
                f"{path}: the file has {size} bytes; allowed are {MAX_BYTES}; give the config, not the weights"
            )
        data = path.read_bytes()
    except OSError as error:
        raise CatalogueError(f"{path}: cannot be read ({error.strerror}); give a config.json or its folder") from None
    return parse_object(data, str(path))


def parse_object(data: bytes, where: str) -> dict[str, Any]:
    """The JSON object in `data`, which came from `where`."""
    text = _decode(data, where)
    _check_depth(text, where)

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        return _unique(pairs, where)

    try:
        found = json.loads(
            text, object_pairs_hook=unique, parse_constant=_NotFinite, parse_float=_finite, parse_int=_whole
        )
    except json.JSONDecodeError as error:
        raise CatalogueError(f"{where}: line {error.lineno}: not JSON ({error.msg}); mend the file there") from None
    if not isinstance(found, dict):
        raise CatalogueError(f"{where}: found a {_word(found)}; a config is an object, {{...}}")
    return found


def _decode(data: bytes, where: str) -> str:
    if data.startswith((b"\xef\xbb\xbf", b"\xff\xfe", b"\xfe\xff")):
        raise CatalogueError(f"{where}: the file starts with a byte order mark; save it as plain UTF-8")
    if b"\0" in data:
        raise CatalogueError(f"{where}: the file holds zero bytes (UTF-16, or binary); save it as plain UTF-8")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise CatalogueError(f"{where}: byte {error.start} is not UTF-8; save it as plain UTF-8") from None


def _check_depth(text: str, where: str) -> None:
    depth, in_string, escaped = 0, False, False
    for character in text:
        if in_string:
            in_string = escaped or character != '"'
            escaped = character == "\\" and not escaped
        elif character == '"':
            in_string = True
        elif character in "[{":
            depth += 1
            if depth > MAX_DEPTH:
                raise CatalogueError(f"{where}: nested more than {MAX_DEPTH} deep; a config needs about 4; flatten it")
        elif character in "]}":
            depth -= 1


def _unique(pairs: list[tuple[str, Any]], where: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in pairs:
        if key in found:
            raise CatalogueError(f"{where}: {key}: found twice; a key stands once; delete one")
        items = value if isinstance(value, list) else [value]
        if key not in _MAY_BE_INFINITE:
            for item in items:
                if isinstance(item, _NotFinite):
                    raise CatalogueError(f"{where}: {key}: found {item.text}; allowed are finite numbers; write one")
        found[key] = value
    return found


def _finite(text: str) -> float | _NotFinite:
    value = float(text)
    return value if math.isfinite(value) else _NotFinite(text)


def _whole(text: str) -> int | _NotFinite:
    return int(text) if len(text) <= 300 else _NotFinite(text[:12] + "...")


def _word(value: Any) -> str:
    words = {bool: "true or false", int: "number", float: "number", str: "text", list: "list", type(None): "null"}
    return words.get(type(value), "number that is not finite")


def show(value: Any) -> str:
    """A found value in a message: short, whatever it is."""
    text = repr(value) if isinstance(value, str) else json.dumps(value, default=lambda odd: getattr(odd, "text", "?"))
    return text if len(text) <= 60 else text[:57] + "..."


class Fields:
    """One object of a config, read by alias and type; remembers what had to be assumed.

    Each reader takes all names under which families know a field, and gives the first that is present and not null.
    """

    def __init__(self, mapping: Mapping[str, Any], where: str, assumptions: list[str] | None = None) -> None:
        self.mapping, self.where = mapping, where
        self.assumptions = [] if assumptions is None else assumptions

    def refuse(self, name: str, found: Any, allowed: str, remedy: str) -> CatalogueError:
        """The error for one field."""
        return CatalogueError(f"{self.where}: {name}: found {show(found)}; allowed: {allowed}; {remedy}")

    def assume(self, sentence: str) -> None:
        """Note what the config does not say."""
        if sentence not in self.assumptions:
            self.assumptions.append(sentence)

    def name(self, *names: str) -> str | None:
        """The first of `names` that is present and not null."""
        return next((name for name in names if self.mapping.get(name) is not None), None)

    def count(self, *names: str, default: int | None = None, least: int = 1, most: int = 2**24) -> int:
        """A whole number; without it `default`, and without that an error."""
        name = self.name(*names)
        if name is None:
            if default is None:
                raise CatalogueError(f"{self.where}: {names[0]}: missing, under any of its {len(names)} names; add it")
            return default
        value = self.mapping[name]
        if type(value) is not int or not least <= value <= most:
            raise self.refuse(name, value, f"a whole number from {least} to {most}", "correct it")
        return value

    def maybe(self, *names: str, least: int = 0) -> int | None:
        """A whole number or None; 0 is None too."""
        return self.count(*names, default=0, least=least) or None

    def flag(self, *names: str, default: bool = False) -> bool:
        """true or false."""
        name = self.name(*names)
        if name is None:
            return default
        value = self.mapping[name]
        if type(value) is not bool:
            raise self.refuse(name, value, "true or false", "correct it")
        return value

    def text(self, *names: str, default: str = "") -> str:
        """Text."""
        name = self.name(*names)
        if name is None:
            return default
        value = self.mapping[name]
        if not isinstance(value, str):
            raise self.refuse(name, value, "text", "correct it")
        return value

    def section(self, name: str) -> Fields:
        """A nested object, empty where it is absent."""
        value = self.mapping.get(name)
        if value is not None and not isinstance(value, Mapping):
            raise self.refuse(name, value, "an object", "correct it")
        return Fields(value or {}, f"{self.where}: {name}" if value else self.where, self.assumptions)

    def items(self, name: str, kind: type, *, length: int | None = None) -> Sequence[Any] | None:
        """A list of `kind`, of `length` if given, or None."""
        value = self.mapping.get(name)
        if value is None:
            return None
        if not isinstance(value, list | tuple) or any(type(item) is not kind for item in value):
            raise self.refuse(name, value, f"a list of {'whole numbers' if kind is int else 'words'}", "correct it")
        if length is not None and len(value) != length:
            raise self.refuse(
                name, value, f"{length} entries, one per layer (found {len(value)})", "correct the list or the layers"
            )
        return value
