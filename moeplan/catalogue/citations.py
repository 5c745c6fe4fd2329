"""The sources of a file's figures: each figure names one, each is listed, and a report tells three kinds apart."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from moeplan.catalogue.overlay import is_figure
from moeplan.catalogue.sheet import FieldPath, Sheet, at, dotted, fail, shown
from moeplan.errors import unknown_name

SOURCE_KINDS = ("published", "measured", "assumed")
_FIGURE_KEYS = ("value", "source", "note")
_SOURCE_KEYS = ("cite", "kind", "url", "date", "environment", "note")


class Citation(NamedTuple):
    """One row of the bibliography behind a result."""

    figure: str
    value: str
    kind: str
    """published, measured or assumed."""
    cite: str
    note: str


def sourced(sheet: Sheet, name: str) -> Sheet:
    """`sheet` with each source renamed `name:key`, after checking that each figure's is listed and each is used."""
    sources = checked_sources(sheet)
    rest = {key: value for key, value in sheet.data.items() if key != "sources"}
    check_figures(sheet, rest, sources)
    unused = sources.keys() - {at(rest, path)["source"] for path in figures(rest)}
    if unused:
        fail(sheet.spots, ("sources", min(unused)), "is not used by any figure; use it, or remove it")
    rename = {key: f"{name}:{key}" for key in sources}
    return Sheet(
        data=_renamed(rest, rename) | {"sources": {rename[key]: row for key, row in sources.items()}}, spots=sheet.spots
    )


def checked_sources(sheet: Sheet) -> dict[str, Any]:
    """The sheet's sources, each with its kind. Raises CatalogueError for one that does not say what it cites."""
    sources = sheet.data.get("sources") or {}
    if not isinstance(sources, dict):
        fail(sheet.spots, ("sources",), f"{shown(sources)} is not a mapping; write 'key: {{cite: \"...\"}}' under it")
    return {key: _checked_source(sheet, ("sources", key), row) for key, row in sources.items()}


def _checked_source(sheet: Sheet, path: FieldPath, row: object) -> dict[str, Any]:
    if not isinstance(row, dict) or not isinstance(row.get("cite"), str) or not row["cite"].strip():
        fail(sheet.spots, path, 'does not say what it cites; write {cite: "author, title, table"}')
    for key, value in row.items():
        if key not in _SOURCE_KEYS:
            fail(sheet.spots, (*path, key), f"{unknown_name('key of a source', key, _SOURCE_KEYS)}; or remove it")
        if not isinstance(value, str):
            fail(sheet.spots, (*path, key), f"{shown(value)} is not text; put it in quotes")
    kind = row.get("kind", "assumed" if path[1] == "assumed" else "published")
    if kind not in SOURCE_KINDS:
        fail(sheet.spots, (*path, "kind"), unknown_name("kind of source", kind, SOURCE_KINDS))
    for key in ("date", "environment") if kind == "measured" else ():
        if key not in row:
            fail(sheet.spots, path, f'is measured but has no {key}; add {key}: "..."')
    return row | {"kind": kind}


def check_figures(sheet: Sheet, data: object, sources: Mapping[str, object]) -> None:
    """Raises CatalogueError for a figure in `data` that has an unknown key, or a source that is not listed."""
    for path in figures(data):
        _check_figure(sheet, path, sources)


def figures(data: object, path: FieldPath = ()) -> Iterator[FieldPath]:
    """The path of every figure in `data`."""
    if is_figure(data):
        yield path
    elif isinstance(data, dict):
        for key, value in data.items():
            yield from figures(value, (*path, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from figures(value, (*path, index))


def _check_figure(sheet: Sheet, path: FieldPath, sources: Mapping[str, object]) -> None:
    figure = at(sheet.data, path)
    if "value" not in figure and path not in (("dimensions",), ("model", "dimensions")):
        fail(sheet.spots, path, "has no value; add value: with a number and its unit")
    for key in figure:
        if key not in _FIGURE_KEYS:
            fail(sheet.spots, (*path, key), f"{unknown_name('key of a figure', key, _FIGURE_KEYS)}; or remove it")
    if not isinstance(figure.get("source"), str):
        fail(
            sheet.spots,
            path,
            f"has no source; add source: with one of {', '.join(sources) or 'the keys listed under sources'}",
        )
    if figure["source"] not in sources:
        fail(
            sheet.spots,
            (*path, "source"),
            f"{unknown_name('source', figure['source'], sources)}; or list it under sources",
        )
    if not isinstance(figure.get("note", ""), str):
        fail(sheet.spots, (*path, "note"), f"{shown(figure['note'])} is not text; put it in quotes")


def _renamed(data: Any, rename: Mapping[str, str]) -> Any:
    if is_figure(data):
        return data | {"source": rename[data["source"]]}
    if isinstance(data, dict):
        return {key: _renamed(value, rename) for key, value in data.items()}
    return [_renamed(value, rename) for value in data] if isinstance(data, list) else data


def citations(document: Mapping[str, Any]) -> list[Citation]:
    """The bibliography of a document: one row for each figure, and one for the dimensions of its model."""
    rest = {key: value for key, value in document.items() if key != "sources"}
    return [_row(path, at(rest, path), document["sources"]) for path in figures(rest)]


def _row(path: FieldPath, figure: Mapping[str, Any], listed: Mapping[str, Any]) -> Citation:
    source, value = listed[figure["source"]], figure.get("value", "all")
    return Citation(dotted(path), str(value), source["kind"], source["cite"], figure.get("note", ""))


def with_used_sources(document: dict[str, Any]) -> dict[str, Any]:
    """`document` without the sources that no figure names: those of a part that was replaced."""
    listed = document.get("sources")
    if not isinstance(listed, dict):
        return document
    rest = {key: value for key, value in document.items() if key != "sources"}
    used = {str(at(rest, path).get("source")) for path in figures(rest)}
    return document | {"sources": {key: row for key, row in listed.items() if key in used}}
