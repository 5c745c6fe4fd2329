"""A resolved document to a Scenario, and a plan's file to a Plan."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from copy import deepcopy
from pathlib import Path
from types import MappingProxyType, UnionType
from typing import Any, get_args, get_origin

from pydantic import BaseModel

from moeplan import menu
from moeplan.catalogue.checks import check
from moeplan.catalogue.citations import Citation, check_figures, checked_sources, citations
from moeplan.catalogue.figures import cluster_spec
from moeplan.catalogue.files import find, is_path, menus, names, read
from moeplan.catalogue.overlay import Given, is_figure
from moeplan.catalogue.resolve import changed, entry, from_flags, is_node_file, resolved, thing
from moeplan.catalogue.sheet import KEYS, SCHEMA, FieldPath, Sheet, bare, below, fail, moved, shown
from moeplan.catalogue.translate import models_in, validated
from moeplan.domain.cluster import Cluster, build_cluster
from moeplan.domain.model import FeedForward, Mixer, Model
from moeplan.domain.plan import Plan
from moeplan.domain.result import PlanResult
from moeplan.domain.scenario import Choices, RoutingLaw, Scenario
from moeplan.domain.workload import Workload
from moeplan.errors import CatalogueError, unknown_name


def build(document: Mapping[str, Any]) -> Scenario:
    """The scenario of a resolved document. Raises CatalogueError with at most three lines."""
    return build_sheet(bare(dict(document), shown(str(document.get("name", "scenario")))[1:-1]))


def build_sheet(sheet: Sheet) -> Scenario:
    """`build`, for a document that remembers where its values were written."""
    check_document(sheet)
    cluster, model = _cluster(sheet), _model(sheet)
    workload = validated(Workload, _plain(_mapping(sheet, "workload")), sheet.spots, ("workload",))
    routing, choices = _routing(sheet), _choices(sheet)
    check(sheet, cluster=cluster, model=model, workload=workload, routing=routing, choices=choices)
    return Scenario(
        name=sheet.data["name"],
        cluster=cluster,
        model=model,
        workload=workload,
        routing=routing,
        choices=choices,
        document=sheet.data,
    )


def check_document(sheet: Sheet) -> None:
    """Raises CatalogueError for an unknown schema, an unknown or missing section, or an unlisted source."""
    if sheet.data.get("schema") != SCHEMA:
        found = shown(sheet.data.get("schema"))
        fail(
            sheet.spots, ("schema",), f"{found} is not {SCHEMA!r}; load the scenario's YAML, or write the document anew"
        )
    for key in sheet.data:
        if key not in KEYS:
            fail(sheet.spots, (key,), f"{unknown_name('key', key, KEYS)}; or remove it")
    for key in ("model", "cluster", "workload"):
        if key not in sheet.data:
            fail(sheet.spots, (key,), f"is missing; add {key}: ...")
    if not isinstance(sheet.data.get("name"), str):
        fail(sheet.spots, ("name",), "is not text; write the scenario's name in quotes")
    rest = {key: value for key, value in sheet.data.items() if key != "sources"}
    check_figures(sheet, rest, checked_sources(sheet))


def _cluster(sheet: Sheet) -> Cluster:
    spec = cluster_spec(sheet)
    try:
        return build_cluster(spec)
    except CatalogueError as error:
        part, _, sentence = str(error).removeprefix(f"topology {spec.name}: ").partition(": ")
        steps = [int(step) if step.isdigit() else step for step in part.split(".")]
        fail(sheet.spots, ("cluster", *steps), sentence)


def _model(sheet: Sheet) -> Model:
    data = {key: _plain(value) for key, value in _mapping(sheet, "model").items() if key not in ("name", "dimensions")}
    try:
        return validated(Model, data, sheet.spots, ("model",))
    except CatalogueError:
        # A part that is written once stands in many layers; say where it is written.
        for path, block in _blocks(data):
            wanted = _block_type(block.get("kind"))
            if wanted is not None:
                validated(wanted, {"hidden_size": data.get("hidden_size"), **block}, sheet.spots, ("model", *path))
        raise


def model_card(sheet: Sheet) -> dict[str, Any]:
    """The dimensions and the parameter counts of a model's sheet."""
    wanted = {key: value for key, value in sheet.data.items() if key not in ("about", "published", "sources")}
    model = _model(Sheet(data={"model": wanted}, spots=moved(sheet.spots, ("model",))))
    experts = [layer.experts for layer in model.layers if layer.experts]
    card = {"name": sheet.data.get("name"), "about": sheet.data.get("about")}
    card |= {"hidden_size": model.hidden_size, "vocab_size": model.vocab_size, "num_layers": model.num_layers}
    card |= {"num_moe_layers": len(experts)}
    if experts:
        card |= {"num_experts": experts[0].num_experts, "top_k": experts[0].top_k, "expert_width": experts[0].width}
    totals = {"total_parameters": model.total_parameters, "active_parameters": model.active_parameters}
    return {
        key: value
        for key, value in (card | totals | {"routed_parameters": model.routed_parameters}).items()
        if value is not None
    }


def _blocks(data: object, path: FieldPath = ()) -> Iterator[tuple[FieldPath, dict[str, Any]]]:
    """Every mapping in a model that names its kind, and where it is written."""
    if isinstance(data, dict):
        if "kind" in data:
            yield path, data
        for key, value in data.items():
            yield from _blocks(value, (*path, key))
    elif isinstance(data, list):
        for index, value in enumerate(data):
            yield from _blocks(value, (*path, index))


def _block_type(kind: object) -> type[BaseModel] | None:
    blocks = models_in(Mixer) + models_in(FeedForward)
    return next((block for block in blocks if kind in get_args(block.model_fields["kind"].annotation)), None)


def _routing(sheet: Sheet) -> RoutingLaw | None:
    if sheet.data.get("routing") is None:
        return None
    data = _plain(_mapping(sheet, "routing"))
    law = {key: data.pop(key) for key in ("router", "seed") if key in data}
    return validated(RoutingLaw, law | {"options": data}, sheet.spots, ("routing",))


def _choices(sheet: Sheet) -> Choices:
    data = _plain(_mapping(sheet, "choose")) if sheet.data.get("choose") is not None else {}
    values = {key: _choice(sheet, key, value) for key, value in data.items()}
    return validated(Choices, values, sheet.spots, ("choose",))


def _choice(sheet: Sheet, key: str, value: Any) -> Any:
    """A list or a single value as the tuple that a searched field takes; a field that is given stays as it is."""
    field = Choices.model_fields.get(key)
    if value is None or field is None or not _is_tuple(field.annotation):
        return value
    values = value if isinstance(value, list) else [value]
    if not values:
        fail(sheet.spots, ("choose", key), "is an empty list, so nothing may be chosen; name a value, or remove it")
    if any(values.count(each) > 1 for each in values):
        fail(sheet.spots, ("choose", key), f"{shown(values)} names a value twice; keep one of them")
    return tuple(values)


def _is_tuple(annotation: Any) -> bool:
    if get_origin(annotation) is tuple:
        return True
    return isinstance(annotation, UnionType) and any(map(_is_tuple, get_args(annotation)))


def _mapping(sheet: Sheet, key: str) -> dict[str, Any]:
    value = sheet.data[key]
    if not isinstance(value, dict):
        fail(sheet.spots, (key,), f"{shown(value)} is not a mapping; write key: value pairs under it")
    return value


def _plain(data: Any) -> Any:
    """`data` with each figure's value in place of the figure."""
    if is_figure(data):
        return _plain(data["value"])
    if isinstance(data, dict):
        return {key: _plain(value) for key, value in data.items()}
    return [_plain(value) for value in data] if isinstance(data, list) else data


def read_plan(path: str | Path) -> Plan:
    """The plan in a file: a plan's own JSON, or a result's with the plan in it. Raises CatalogueError."""
    sheet = read(Path(path))
    if "plan" in sheet.data:
        inner = sheet.data["plan"]
        if not isinstance(inner, dict):
            fail(
                sheet.spots, ("plan",), f"{shown(inner)} is not a plan; write a mapping, as `moeplan plan --json` does"
            )
        sheet = Sheet(data=inner, spots=below(sheet.spots, ("plan",)) or sheet.spots)
    _check_plan_schema(sheet)
    return validated(Plan, sheet.data, sheet.spots, ())


def read_result(path: str | Path) -> PlanResult | None:
    """The result in a file that `plan --json` wrote, or None if it holds something else. Raises CatalogueError."""
    sheet = read(Path(path))
    if sheet.data.get("schema") != "moeplan.result/v1":
        return None
    return validated(PlanResult, sheet.data, sheet.spots, ())


def _check_plan_schema(sheet: Sheet) -> None:
    schema = sheet.data.get("schema")
    if schema != "moeplan.plan/v1":
        found = "is missing" if schema is None else f"{shown(schema)} is not known"
        fail(
            sheet.spots, ("schema",), f"{found}; this version reads 'moeplan.plan/v1', so plan again, or update moeplan"
        )


def load(source: str | Path | Mapping[str, Any], *, changes: Mapping[str, object] = MappingProxyType({})) -> Scenario:
    """The scenario that a name, a path, a resolved document or a result means, after `changes`.

    `changes` maps paths of fields to values or their text: `{"cluster.nic.bandwidth": "25 GB/s", "choose.tp": [1, 2]}`.
    Raises CatalogueError with file, line, field, found, allowed and remedy.
    """
    return build_sheet(resolved(source, changes))


def document(
    source: str | Path | Mapping[str, Any], changes: Mapping[str, object] = MappingProxyType({})
) -> dict[str, Any]:
    """The self-contained document behind a scenario, as JSON takes it; `load` of it gives an equal scenario."""
    sheet = resolved(source, changes)
    build_sheet(sheet)
    return sheet.data


def scenario_from(
    *,
    model: str,
    cluster: str,
    global_batch: int,
    sequence: int,
    nodes: int | None = None,
    phase: str = "train",
    changes: Mapping[str, object] = MappingProxyType({}),
) -> Scenario:
    """The scenario of a model (a name, or a path to a Hugging Face config.json) on a cluster; its routing is balanced.

    Raises CatalogueError.
    """
    given = {"model": model, "cluster": cluster}
    workload = {"phase": phase, "global_batch": global_batch, "sequence": sequence}
    sheet = from_flags({"about": f"{model} on {cluster}", **given, "workload": workload})
    whole = thing(sheet, "scenarios", name=None, giver=None)
    parts = whole.data["model"], whole.data["cluster"]
    data = {"schema": SCHEMA, "name": "-on-".join(str(part.get("name")) for part in parts)} | whole.data
    if _has_experts(data["model"]):
        data |= {"routing": {"router": "balanced"}}
    nodes_changed = {} if nodes is None else {"cluster.nodes": Given(nodes, "--nodes")}
    return build_sheet(changed(Sheet(data=data, spots=whole.spots), nodes_changed | dict(changes)))


def cluster_from(
    name: str, *, nodes: int | None = None, changes: Mapping[str, object] = MappingProxyType({})
) -> Cluster:
    """The cluster of a topology's name or file, of so many nodes, after changes: `{"nic.bandwidth": "25 GB/s"}`.

    A change may also be written from the scenario: `cluster.nic.bandwidth`. Raises CatalogueError.
    """
    sheet = from_flags({"about": name, "cluster": name, "workload": {}})
    whole = thing(sheet, "scenarios", name=None, giver=None)
    given: dict[str, object] = {} if nodes is None else {"cluster.nodes": Given(nodes, "--nodes")}
    given |= {key if key.startswith("cluster.") else f"cluster.{key}": value for key, value in changes.items()}
    data = {"schema": SCHEMA, "name": str(whole.data["cluster"].get("name"))} | whole.data
    changed_sheet = changed(Sheet(data=data, spots=whole.spots), given)
    check_figures(changed_sheet, {"cluster": changed_sheet.data["cluster"]}, checked_sources(changed_sheet))
    return _cluster(changed_sheet)


def _has_experts(data: object) -> bool:
    if isinstance(data, dict):
        return data.get("kind") == "experts" or any(map(_has_experts, data.values()))
    return isinstance(data, list) and any(map(_has_experts, data))


def show(name: str) -> dict[str, Any]:
    """What the catalogue knows of a thing: a model's dimensions and parameter counts, else the figures of its file."""
    if is_path(name) and name.lower().endswith(".json"):
        return model_card(entry(name, "models"))
    if is_node_file(name):
        return deepcopy(entry(name, "topologies").data)
    if is_path(name):
        return document(name)
    for folder in menus():
        if name in names(folder):
            return {"name": name, "kind": folder, "about": menu.about(folder, name)}
    kind = find(name).kind
    if kind == "scenarios":
        return document(name)
    sheet = entry(name, kind)
    return model_card(sheet) if kind == "models" else deepcopy(sheet.data)


def sources(source: str | Path | Mapping[str, Any]) -> list[Citation]:
    """The bibliography behind a scenario, or behind any other thing of the catalogue: one row for each figure."""
    if isinstance(source, str) and is_node_file(source):
        return citations(entry(source, "topologies").data)
    if isinstance(source, str) and not is_path(source):
        kind = find(source).kind
        if kind != "scenarios":
            return citations(entry(source, kind).data)
    return citations(document(source))
