"""One sheet laid over another, key by key: how `extends`, a scenario's own numbers and `--set` work."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any, TypeGuard

from moeplan.catalogue.figures import figure_names
from moeplan.catalogue.sheet import FieldPath, Sheet, Spot, at, below, dotted, fail, moved, scalar, shown
from moeplan.errors import CatalogueError

USER = "set by the user"
SHORT = {"nodes": ("cluster", "nodes")}
"""Words that stand for a path."""
_FILE = "--set"


@dataclass(frozen=True, slots=True)
class Given:
    """A change's value, and the place where a person gave it, such as a flag."""

    value: object
    place: str


def is_figure(value: object) -> bool:
    """Whether `value` is written as a figure: {value, source, note}; a model's `dimensions` has no value."""
    return isinstance(value, dict) and ("value" in value or ("source" in value and value.keys() <= {"source", "note"}))


def without(sheet: Sheet, key: str) -> Sheet:
    """`sheet` without one of its keys."""
    data = {name: value for name, value in sheet.data.items() if name != key}
    return Sheet(data=data, spots={path: spot for path, spot in sheet.spots.items() if path[:1] != (key,)})


def part(sheet: Sheet, key: str) -> Sheet:
    """What stands under one key, as a sheet of its own."""
    return Sheet(data=sheet.data[key], spots=below(sheet.spots, (key,)))


def with_part(sheet: Sheet, key: str, inner: Sheet) -> Sheet:
    """`sheet` with `inner` under `key`; the inner sources move up to the sheet's."""
    data = {name: value for name, value in inner.data.items() if name not in ("about", "published", "sources")}
    sources = inner.data.get("sources", {}) | sheet.data.get("sources", {})
    spots = {**without(sheet, key).spots, **moved(inner.spots, (key,))}
    return Sheet(data=sheet.data | {key: data, "sources": sources}, spots=spots)


def overlaid(base: Sheet, top: Sheet, *, giver: str | None, is_cluster: bool = False) -> Sheet:
    """`top` laid over `base`. A list, a figure, a thing with a name replaces; a mapping is laid over another.

    With a `giver`, a number without a source may stand for a figure of a cluster; the giver is then its source.
    """
    overlay = _Overlay(top, dict(base.spots), giver, is_cluster)
    data = overlay.merged(base.data, ())
    if overlay.given:
        data["sources"] = data.get("sources", {}) | {giver: {"cite": giver, "kind": "assumed"}}
    return Sheet(data=data, spots=overlay.spots)


class _Overlay:
    def __init__(self, top: Sheet, spots: dict[FieldPath, Spot], giver: str | None, is_cluster: bool) -> None:
        self.top, self.spots, self.giver, self.is_cluster = top, spots, giver, is_cluster
        self.given: list[FieldPath] = []
        self.figures = figure_names()

    def merged(self, under: Mapping[Any, Any], path: FieldPath) -> dict[Any, Any]:
        """What stands at `path` of the top laid over `under`; an item of a list has its place as its key."""
        found = dict(under)
        for key, value in at(self.top.data, path).items():
            here, old = (*path, key), under.get(key)
            if _is_mapping(old) and _is_mapping(value) and "name" not in value:
                self.spots[here] = self.top.spots.get(here, self.spots.get(here, self.top.spots[()]))
                found[key] = self.merged(old, here)
                continue
            if isinstance(old, list) and _is_mapping(value) and value.keys() <= set(range(len(old))):
                found[key] = list(self.merged(dict(enumerate(old)), here).values())
                continue
            if _is_mapping(old) and not isinstance(value, dict | None):
                fail(
                    self.top.spots,
                    here,
                    f"{shown(value)} stands for a whole mapping; set one of its keys: {', '.join(old)}",
                )
            found[key] = self._sourced(value, here, replaces_figure=is_figure(old))
            self._move_spots(here)
        return found

    def _sourced(self, value: Any, path: FieldPath, *, replaces_figure: bool) -> Any:
        in_cluster = self.is_cluster or path[0] == "cluster"
        is_wanted = replaces_figure or (in_cluster and path[-1] in self.figures)
        if self.giver is not None and in_cluster and not is_wanted and isinstance(value, list):
            return [self._sourced_item(item, (*path, index)) for index, item in enumerate(value)]
        if self.giver is None or not is_wanted or isinstance(value, dict | None):
            return value
        self.given.append(path)
        return {"value": value, "source": self.giver}

    def _sourced_item(self, item: Any, path: FieldPath) -> Any:
        """One of a list of faults, speeds or wires, whose figures may be bare as well."""
        if not _is_mapping(item):
            return item
        return {key: self._sourced(value, (*path, key), replaces_figure=False) for key, value in item.items()}

    def _move_spots(self, path: FieldPath) -> None:
        for known in [known for known in self.spots if known[: len(path)] == path]:
            del self.spots[known]
        self.spots |= moved(below(self.top.spots, path), path)


def _is_mapping(value: object) -> TypeGuard[dict[str, Any]]:
    return isinstance(value, dict) and not is_figure(value)


def change_sheet(changes: Mapping[str, object], document: Mapping[str, Any]) -> Sheet:
    """The changes as one nested mapping. A text is read as YAML, so `choose.tp=1,2` and `choose.tp=[1, 2]` are lists.

    Raises CatalogueError for a word without a path, and for two changes of which one holds the other.
    """
    data: dict[Any, Any] = {}
    spots: dict[FieldPath, Spot] = {(): Spot(_FILE, None, ())}
    for text, given in changes.items():
        value, place = (
            (given.value, given.place) if isinstance(given, Given) else (given, f"{_FILE} {shown(text)[1:-1]}")
        )
        path = _path(text, document, place)
        _put(data, path, _value(value, path, place), place)
        for length in range(1, len(path) + 1):
            here = path[:length]
            spots[here] = Spot(place, None, ()) if isinstance(given, Given) else Spot(_FILE, None, here)
    return Sheet(data=data, spots=spots)


def _path(text: str, document: Mapping[str, Any], place: str) -> FieldPath:
    path = SHORT.get(text) or tuple(text.split("."))
    if not all(path) or path[-1] == "name" or path[0] in ("schema", "sources"):
        raise CatalogueError(f"{place}: cannot be set; give the path of a field, such as workload.global_batch")
    if len(path) == 1 and path[0] not in ("model", "cluster", "about"):
        inside = [dotted(found) for found in _paths(document) if found[-1] == path[0] or found[0] == path[0]]
        close = inside or get_close_matches(path[0], SHORT, n=1)
        remedy = f"did you mean {close[0]!r}?" if close else "write section.field, such as workload.global_batch"
        raise CatalogueError(f"{place}: is not the path of a field; {remedy}")
    return _with_places(path, document, place)


def _with_places(words: tuple[str, ...], document: Mapping[str, Any], place: str) -> FieldPath:
    """The path with whole numbers where the document has lists, as `show` prints it: model.layers.0.repeat."""
    here: Any = document
    path: FieldPath = ()
    for word in words:
        if not isinstance(here, list):
            path, here = (*path, word), here.get(word) if isinstance(here, dict) else None
        elif word.isdecimal() and int(word) < len(here):
            path, here = (*path, int(word)), here[int(word)]
        else:
            remedy = f"use 0 to {len(here) - 1}, or set the whole list" if here else "set the whole list"
            raise CatalogueError(f"{place}: {shown(word)} is no place of the list {dotted(path)}; {remedy}")
    return path


def _paths(data: Mapping[str, Any], path: FieldPath = ()) -> list[FieldPath]:
    found: list[FieldPath] = []
    for key, value in data.items():
        if isinstance(value, dict) and "value" not in value:
            found += _paths(value, (*path, key))
        elif path:
            found.append((*path, key))
    return found


def _value(value: object, path: FieldPath, place: str) -> object:
    if not isinstance(value, str):
        return list(value) if isinstance(value, tuple) else value
    if path[0] == "choose" and "," in value and not value.lstrip().startswith(("[", "{")):
        value = f"[{value}]"
    if "\n" in value or " #" in value:
        raise CatalogueError(f"{place}: {shown(value)} is not one value; write it on one line, without a comment")
    return scalar(value, place)


def _put(data: dict[Any, Any], path: FieldPath, value: object, place: str) -> None:
    for part in path[:-1]:
        data = data.setdefault(part, {})
        if not isinstance(data, dict):
            raise CatalogueError(f"{place}: is inside another field that is set; set one of the two")
    if path[-1] in data:
        raise CatalogueError(f"{place}: is set twice, or holds another field that is set; set it once")
    data[path[-1]] = value
