"""Names and overlays to one resolved document: every part written out, every figure with its source.

A thing may extend another of its kind, and a scenario or a topology names its parts. All of it is one operation: a
sheet is laid over a base. `--set` is a sheet as well, laid over the document last.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from copy import deepcopy
from itertools import groupby
from pathlib import Path
from typing import Any

from moeplan import menu
from moeplan.catalogue.citations import sourced, with_used_sources
from moeplan.catalogue.files import check_regular, find, is_path, label, read
from moeplan.catalogue.overlay import USER, change_sheet, is_figure, overlaid, part, with_part, without
from moeplan.catalogue.sheet import KEYS, SCHEMA, FieldPath, Sheet, Spot, bare, below, fail, shown
from moeplan.domain.model import Model
from moeplan.errors import CatalogueError, unknown_name

NODE_FILES = {".xml": "nccl_topology", ".txt": "nvidia_smi_topo"}
"""How the files of other programs end that describe a machine, and the importer that reads them."""
PARTS = {"scenarios": {"model": "models", "cluster": "topologies"}, "topologies": {"gpu": "gpus"}}


def entry(text: str, kind: str, *, folder: Path = Path(), chain: tuple[Path, ...] = ()) -> Sheet:
    """The thing that a name or a path means, laid over what it extends. Sources are renamed `file:key`."""
    path = folder / text if _is_file(text, kind) else find(text, kind).path
    if kind == "models" and path.suffix.lower() == ".json":
        return _imported(path)
    sheet = _imported_node(path) if kind == "topologies" and is_node_file(path.name) else read(path)
    if (real := Path(os.path.realpath(path))) in chain:
        raise CatalogueError(f"{label(path)}: extends: leads back to itself; extend a file that does not")
    if "name" in sheet.data:
        fail(sheet.spots, ("name",), f"a file's name is the thing's name, {path.stem!r}; remove this key")
    _check_about(sheet)
    sheet = sourced(sheet, path.stem)
    sheet = _flat(sheet) if kind == "gpus" else sheet
    sheet = _with_paths(sheet, path.parent) if kind == "scenarios" else sheet
    giver = f"{label(path)}, without a source" if kind == "scenarios" else None
    whole = thing(sheet, kind, name=path.stem, giver=giver, folder=path.parent, chain=(*chain, real))
    if kind == "models" and not is_figure(whole.data.get("dimensions")):
        fail(whole.spots, ("dimensions",), "has no source; add dimensions: {source: a key under sources}")
    return whole


def _with_paths(sheet: Sheet, folder: Path) -> Sheet:
    """A trace's path is written as seen from the scenario's file."""
    routing = sheet.data.get("routing")
    if not isinstance(routing, dict) or not isinstance(routing.get("path"), str):
        return sheet
    return Sheet(data=sheet.data | {"routing": routing | {"path": str(folder / routing["path"])}}, spots=sheet.spots)


def thing(
    sheet: Sheet, kind: str, *, name: str | None, giver: str | None, folder: Path = Path(), chain: tuple[Path, ...] = ()
) -> Sheet:
    """`sheet` with its parts written out, laid over what it extends. Without a name it only changes another."""
    base = None
    if "extends" in sheet.data:
        base = entry(_extended(sheet, kind), kind, folder=folder, chain=chain)
        sheet = without(sheet, "extends")
    for key, shelf in PARTS.get(kind, {}).items():
        value = sheet.data.get(key)
        if isinstance(value, str):
            sheet = with_part(sheet, key, _named(sheet, key, shelf, folder))
        elif isinstance(value, dict):
            sheet = with_part(sheet, key, thing(part(sheet, key), shelf, name=None, giver=giver, folder=folder))
    if base is not None:
        sheet = overlaid(base, sheet, giver=giver, is_cluster=kind in ("topologies", "gpus"))
    return sheet if name is None else Sheet(data=sheet.data | {"name": name}, spots=sheet.spots)


def _extended(sheet: Sheet, kind: str) -> str:
    text = sheet.data["extends"]
    if not isinstance(text, str):
        fail(sheet.spots, ("extends",), f"{shown(text)} is not a name; write the name of another file")
    _check_name(sheet, "extends", kind)
    return text


def _named(sheet: Sheet, key: str, shelf: str, folder: Path) -> Sheet:
    _check_name(sheet, key, shelf)
    return entry(sheet.data[key], shelf, folder=folder)


def _check_name(sheet: Sheet, key: str, shelf: str) -> None:
    text = sheet.data[key]
    if not _is_file(text, shelf):
        try:
            find(text, shelf)
        except CatalogueError as error:
            fail(sheet.spots, (key,), str(error))


def is_node_file(text: str) -> bool:
    """Whether a person means a file of another program that describes a machine."""
    return text.lower().endswith(tuple(NODE_FILES))


def _is_file(text: str, kind: str) -> bool:
    return is_path(text) or (kind == "topologies" and is_node_file(text))


def _check_about(sheet: Sheet) -> None:
    about = sheet.data.get("about")
    if not isinstance(about, str) or not about.strip():
        fail(sheet.spots, ("about",), "is missing; add a line such as 'about: what this is'")


def _flat(sheet: Sheet) -> Sheet:
    """A GPU's figures without the headings `spec` and `calibration`."""
    allowed = ("about", "sources", "extends", "spec", "calibration")
    for key in sheet.data:
        if key not in allowed:
            fail(sheet.spots, (key,), f"{unknown_name('key', key, allowed)}; figures stand under spec or calibration")
    flat = without(without(sheet, "spec"), "calibration")
    for heading in ("spec", "calibration"):
        if heading in sheet.data:
            flat = _with_figures(flat, sheet, heading)
    return flat


def _with_figures(flat: Sheet, sheet: Sheet, heading: str) -> Sheet:
    inner = sheet.data[heading]
    if not isinstance(inner, dict):
        fail(
            sheet.spots,
            (heading,),
            f"{shown(inner)} is no mapping; write figures under it, as in 'tdp: {{value: 700 W, source: sheet}}'",
        )
    for key in inner:
        if key in flat.data:
            fail(sheet.spots, (heading, key), "stands twice, under spec and under calibration; keep one of them")
    return Sheet(data=flat.data | inner, spots={**below(sheet.spots, (heading,)), **flat.spots})


def _imported(path: Path) -> Sheet:
    """The model of a Hugging Face `config.json` in the compact form; what had to be assumed for it is a note."""
    from moeplan.importers import hf_config

    check_regular(path)
    try:
        imported = hf_config.read(path)
    except CatalogueError as error:
        raise CatalogueError(str(error).replace(str(path), label(path))) from None
    name = shown(path.resolve().parent.name)[1:-1] or path.stem
    source = f"{name}:config"
    sources = {source: {"cite": f"{label(path)}, a Hugging Face configuration", "kind": "published"}}
    dimensions = {"source": source} | ({"note": " ".join(imported.assumptions)} if imported.assumptions else {})
    data = {"name": name, "dimensions": dimensions, **compact(imported.model), "sources": sources}
    return bare(data, label(path))


def _imported_node(path: Path) -> Sheet:
    """The topology of a machine that another program describes; what that leaves open is said where it is missed."""
    try:
        imported = menu.load("importers", NODE_FILES[path.suffix.lower()], "read")(path)
    except CatalogueError as error:
        raise CatalogueError(str(error).replace(str(path), label(path))) from None
    spots: dict[FieldPath, Spot] = {(): Spot(label(path), None, ())}
    spots |= {(key,): Spot(f"{label(path)}: {text}", None, (key,)) for key, text in imported.unanswered.items()}
    return Sheet(data=imported.topology, spots=spots)


def compact(model: Model) -> dict[str, Any]:
    """The mapping that a model is read from, equal layers in one run."""
    data = model.model_dump(mode="json", exclude_unset=True)
    for holder, key in ((data, "layers"), (data, "encoder_layers"), (data.get("mtp") or {}, "layers")):
        if key in holder:
            runs = [(layer, len(list(equal))) for layer, equal in groupby(holder[key])]
            holder[key] = [{"repeat": count, **layer} if count > 1 else layer for layer, count in runs]
    return data


def resolved(source: str | Path | Mapping[str, Any], changes: Mapping[str, object]) -> Sheet:
    """The document of a source after changes, with the spot of every value."""
    sheet = _opened(source)
    ordered = {"schema": SCHEMA} | {key: sheet.data[key] for key in KEYS if key in sheet.data} | sheet.data
    return changed(Sheet(data=with_used_sources(ordered), spots=sheet.spots), changes)


def _opened(source: str | Path | Mapping[str, Any]) -> Sheet:
    if isinstance(source, Mapping):
        return _written_out(bare(dict(source), "document"))
    text = str(source)
    if not isinstance(source, Path) and not is_path(text):
        return entry(text, "scenarios")
    sheet = read(Path(source))
    is_ours = Path(text).suffix.lower() == ".json" or "schema" in sheet.data or "scenario" in sheet.data
    return _written_out(sheet) if is_ours else entry(text if is_path(text) else f"./{text}", "scenarios")


def _written_out(sheet: Sheet) -> Sheet:
    """The document in a sheet that is one, or that is a result with a scenario in it."""
    if sheet.data.get("schema") != SCHEMA and isinstance(sheet.data.get("scenario"), dict):
        sheet = Sheet(data=sheet.data["scenario"], spots=below(sheet.spots, ("scenario",)) or sheet.spots)
    if sheet.data.get("schema") != SCHEMA:
        if "model_type" in sheet.data or "architectures" in sheet.data:
            fail(sheet.spots, (), "is a model's config.json, not a scenario; give it with --model, beside --cluster")
        found = shown(sheet.data["schema"]) if "schema" in sheet.data else "a mapping without schema"
        fail(
            sheet.spots,
            (),
            f"found {found}, not a document with schema {SCHEMA!r}; give a scenario's name or YAML file",
        )
    return sheet


def changed(sheet: Sheet, changes: Mapping[str, object]) -> Sheet:
    """The document after changes, which are laid over a copy of it."""
    sheet = Sheet(data=deepcopy(sheet.data), spots=sheet.spots)
    if not changes:
        return sheet
    top = thing(change_sheet(changes, sheet.data), "scenarios", name=None, giver=USER)
    new_router = top.data.get("routing", {}).get("router")
    if new_router is not None and isinstance(sheet.data.get("routing"), dict):
        # Another router takes other options; those of the old one would be refused.
        sheet.data["routing"] = {key: value for key, value in sheet.data["routing"].items() if key == "seed"}
    whole = overlaid(sheet, top, giver=USER)
    return Sheet(data=with_used_sources(whole.data), spots=whole.spots)


def from_flags(data: dict[str, Any]) -> Sheet:
    """A scenario that was given as flags of the command, which are where its values were written."""
    flags = {
        "model": "--model",
        "cluster": "--cluster",
        "global_batch": "--global-batch",
        "sequence": "--seq",
        "phase": "--phase",
    }
    spots: dict[FieldPath, Spot] = {(): Spot("the command", None, ())}
    spots |= {(key,): Spot(flags[key], None, ()) for key in ("model", "cluster")}
    spots |= {("workload", key): Spot(flags[key], None, ()) for key in data["workload"]}
    return Sheet(data=data, spots=spots)
