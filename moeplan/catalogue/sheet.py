"""A file's text to plain dicts, lists and scalars that remember the line they stand on.

YAML is read as version 1.2 and narrower: one document, text keys, no anchor, alias, tag or directive, finite numbers.
The guards act while the file is read, so a hostile file costs no more than a long one.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from ruamel.yaml import YAML
from ruamel.yaml.error import MarkedYAMLError, YAMLError
from ruamel.yaml.events import (
    AliasEvent,
    DocumentEndEvent,
    DocumentStartEvent,
    MappingEndEvent,
    MappingStartEvent,
    ScalarEvent,
    SequenceEndEvent,
    SequenceStartEvent,
    StreamEndEvent,
)

from moeplan.errors import CatalogueError

FieldPath = tuple[str | int, ...]
SCHEMA = "moeplan.scenario/v1"
KEYS = ("schema", "name", "about", "sources", "model", "cluster", "workload", "routing", "choose")
"""The sections of a resolved document."""
MAX_DEPTH, MAX_NODES, MAX_DIGITS = 24, 20_000, 30
_NULL = {"", "~", "null", "Null", "NULL"}
_BOOL = {"true": True, "True": True, "TRUE": True, "false": False, "False": False, "FALSE": False}
_INT = re.compile(r"[-+]?[0-9]+\Z")
_FLOAT = re.compile(r"[-+]?(\.[0-9]+|[0-9]+(\.[0-9]*)?)([eE][-+]?[0-9]+)?\Z")
_NOT_FINITE = re.compile(r"[-+]?\.(inf|Inf|INF)\Z|\.(nan|NaN|NAN)\Z")
_BRACKET = re.compile(r'"(?:[^"\\]|\\.)*"|[\[{]|[\]}]', re.DOTALL)


@dataclass(frozen=True, slots=True)
class Spot:
    """Where a value was written: the file (or `--set`), the line if known, and the path inside that file."""

    file: str
    line: int | None
    path: FieldPath


Spots = Mapping[FieldPath, Spot]


@dataclass(frozen=True, kw_only=True, slots=True)
class Sheet:
    """What a file says, and the spot of every value in it. The path () is the whole file."""

    data: dict[str, Any]
    spots: Spots


def shown(value: object, limit: int = 60) -> str:
    """`value` on one line and not too long, for a message."""
    text = repr(value) if isinstance(value, str) else str(value)
    text = "".join(char if char.isprintable() else ascii(char)[1:-1] for char in text)
    return text if len(text) <= limit else f"{text[: limit - 10]}...{text[-7:]}"


def dotted(path: FieldPath) -> str:
    """The path as a person writes it: ("wiring", 2, "to") is `wiring.2.to`."""
    return ".".join(shown(str(part))[1:-1] for part in path)


def where(spots: Spots, path: FieldPath) -> str:
    """`file:line: field.path`: the spot of `path`, or of the nearest value around it that has one."""
    length = next(n for n in range(len(path), -1, -1) if path[:n] in spots)
    spot = spots[path[:length]]
    place = spot.file if spot.line is None else f"{spot.file}:{spot.line}"
    inside = dotted(spot.path + path[length:])
    return f"{place}: {inside}" if inside else place


def fail(spots: Spots, path: FieldPath, sentence: str) -> NoReturn:
    """Raises CatalogueError for the value at `path`; the sentence says what was found, what is allowed and a remedy."""
    raise CatalogueError(f"{where(spots, path)}: {sentence}")


def at(data: Any, path: FieldPath) -> Any:
    """The value at `path`, which exists."""
    for part in path:
        data = data[part]
    return data


def moved(spots: Spots, prefix: FieldPath) -> dict[FieldPath, Spot]:
    """The spots of a sheet that is put into a larger document at `prefix`."""
    return {prefix + path: spot for path, spot in spots.items()}


def below(spots: Spots, prefix: FieldPath) -> dict[FieldPath, Spot]:
    """The spots of what stands at `prefix`, for a sheet of its own."""
    return {path[len(prefix) :]: spot for path, spot in spots.items() if path[: len(prefix)] == prefix}


def bare(data: dict[str, Any], file: str) -> Sheet:
    """A sheet for a mapping that came from no file: only its name is known."""
    return Sheet(data=data, spots={(): Spot(file, None, ())})


def from_yaml(text: str, file: str) -> Sheet:
    """The sheet of a YAML text. Raises CatalogueError that names the line."""
    reader = _Reader(text, file)
    data = reader.document()
    if not isinstance(data, dict):
        raise CatalogueError(f"{file}: holds {_kind(data)}; a mapping is wanted, starting with 'about: ...'")
    return Sheet(data=data, spots=reader.spots)


def scalar(text: str, file: str) -> Any:
    """The value of one `--set` text, read by the rules of the files: `4` is a number, `[1, 2]` a list, `fp8` a text."""
    return _Reader(text, file).document()


def from_json(text: str, file: str) -> Sheet:
    """The sheet of a JSON text, without lines. Refuses NaN, Infinity, 1e999, a key twice and deep nesting."""
    _refuse_deep(text, file)

    def number(found: str) -> float:
        if not math.isfinite(float(found)):
            raise CatalogueError(f"{file}: holds the number {shown(found)[1:-1]}; write a finite one, below 1e308")
        return float(found)

    def integer(found: str) -> int:
        if len(found) > MAX_DIGITS:
            raise CatalogueError(f"{file}: holds a number of {len(found)} digits; use at most {MAX_DIGITS}")
        return int(found)

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        for name, _ in items:
            if sum(name == other for other, _ in items) > 1 if len(items) < 99 else len(dict(items)) < len(items):
                raise CatalogueError(f"{file}: the key {shown(name)} stands twice in one mapping; keep one of them")
        return dict(items)

    try:
        data = json.loads(text, parse_float=number, parse_int=integer, parse_constant=number, object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise CatalogueError(
            f"{file}:{error.lineno}: not JSON: {error.msg}; correct the text at column {error.colno}"
        ) from None
    if not isinstance(data, dict):
        raise CatalogueError(f'{file}: holds {_kind(data)}; a mapping is wanted, as in {{"key": value}}')
    return bare(data, file)


def _refuse_deep(text: str, file: str) -> None:
    depth = 0
    for match in _BRACKET.finditer(text):
        depth += {"[": 1, "{": 1, "]": -1, "}": -1}.get(match.group(), 0)
        if depth > MAX_DEPTH:
            raise CatalogueError(f"{file}: nested deeper than {MAX_DEPTH} levels; flatten it")


def _kind(data: object) -> str:
    if data is None:
        return "nothing"
    return {dict: "a mapping", list: "a list", str: "a text", bool: "a truth value"}.get(type(data), "a number")


class _Reader:
    """One pass over the parser's events, with the guards."""

    def __init__(self, text: str, file: str) -> None:
        self.file, self.spots, self.nodes = file, dict[FieldPath, Spot](), 0
        self.events: Iterator[Any] = YAML(typ="safe", pure=True).parse(text)

    def document(self) -> Any:
        try:
            return self._document()
        except MarkedYAMLError as error:
            mark = error.problem_mark or error.context_mark
            line = "" if mark is None else f":{mark.line + 1}"
            said = " ".join((error.problem or error.context or "unreadable").split())
            raise CatalogueError(f"{self.file}{line}: not YAML: {said}; correct the text there") from None
        except YAMLError as error:
            said = str(error).split("\n", 1)[0]
            raise CatalogueError(f"{self.file}: not YAML: {shown(said)[1:-1]}; remove that character") from None

    def _document(self) -> Any:
        next(self.events)
        start = next(self.events)
        if isinstance(start, StreamEndEvent):
            return None
        assert isinstance(start, DocumentStartEvent)
        if start.version or start.tags:
            self._fail(start, "a % directive is not allowed; remove it (files are YAML 1.2)")
        data = self._value(next(self.events), ())
        end = next(self.events)
        assert isinstance(end, DocumentEndEvent)
        after = next(self.events)
        if not isinstance(after, StreamEndEvent):
            self._fail(after, "a second document starts here; put it into a file of its own")
        return data

    def _value(self, event: Any, path: FieldPath) -> Any:
        self._guard(event, path)
        self.spots[path] = Spot(self.file, event.start_mark.line + 1, path)
        match event:
            case MappingStartEvent():
                return self._mapping(path)
            case SequenceStartEvent():
                return self._sequence(path)
            case _:
                return self._scalar(event, path)

    def _guard(self, event: Any, path: FieldPath) -> None:
        self.nodes += 1
        if isinstance(event, AliasEvent) or event.anchor:
            self._fail(event, "an anchor or alias (& or *) is not allowed; write the value out, or use extends", path)
        if event.tag and not (isinstance(event, ScalarEvent) and event.implicit[1]):
            self._fail(event, f"the tag {shown(str(event.tag))[1:-1]} is not allowed; remove it", path)
        if len(path) > MAX_DEPTH:
            self._fail(event, f"nested deeper than {MAX_DEPTH} levels; flatten it", path[:3])
        if self.nodes > MAX_NODES:
            self._fail(
                event, f"more than {MAX_NODES} values in one file; split it, or check what generated it", path[:3]
            )

    def _mapping(self, path: FieldPath) -> dict[str, Any]:
        found: dict[str, Any] = {}
        while not isinstance(event := next(self.events), MappingEndEvent):
            key = self._key(event, path)
            if key in found:
                first = self.spots[(*path, key)].line
                self._fail(event, f"the key stands twice, first in line {first}; keep one of them", (*path, key))
            found[key] = self._value(next(self.events), (*path, key))
        return found

    def _key(self, event: Any, path: FieldPath) -> str:
        self._guard(event, path)
        if not isinstance(event, ScalarEvent):
            self._fail(event, "a list or mapping stands as a key; keys are text", path)
        key: str = event.value
        if event.implicit[0] and not isinstance(_plain(key), str):
            self._fail(event, f"the key {shown(key)} is not text; put it in quotes or rename it", path)
        return key

    def _sequence(self, path: FieldPath) -> list[Any]:
        found: list[Any] = []
        while not isinstance(event := next(self.events), SequenceEndEvent):
            found.append(self._value(event, (*path, len(found))))
        return found

    def _scalar(self, event: Any, path: FieldPath) -> Any:
        text: str = event.value
        if not event.implicit[0]:
            return text
        if _NOT_FINITE.match(text):
            self._fail(event, f"{shown(text)[1:-1]} is not a finite number; write one below 1e308", path)
        value = _plain(text)
        if isinstance(value, int) and not isinstance(value, bool):
            self._check_digits(event, path)
        if isinstance(value, float) and not math.isfinite(value):
            self._fail(event, f"{shown(text)[1:-1]} is not a finite number; write one below 1e308", path)
        return value

    def _check_digits(self, event: Any, path: FieldPath) -> None:
        digits = event.value.lstrip("+-")
        if len(digits) > 1 and digits.startswith("0"):
            self._fail(
                event,
                f"{shown(event.value)[1:-1]} starts with 0, which half the world reads as octal; write it without",
                path,
            )

    def _fail(self, event: Any, sentence: str, path: FieldPath = ()) -> NoReturn:
        spot = Spot(self.file, event.start_mark.line + 1, path)
        fail({(): spot}, (), sentence)


def _plain(text: str) -> Any:
    """The value of a scalar without quotes. An integer too long to be meant becomes a float."""
    if text in _NULL:
        return None
    if text in _BOOL:
        return _BOOL[text]
    if _INT.match(text) and len(text) <= MAX_DIGITS:
        return int(text)
    return float(text) if _FLOAT.match(text) else text
