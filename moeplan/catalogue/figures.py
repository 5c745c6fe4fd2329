"""Figures to SI numbers: the keys of a cluster's sections with their units and ranges.

They are read from the specs of the domain, whose field names say the unit: `bandwidth_bytes_per_s` is written
`bandwidth`, in B/s. So a field that a spec gains needs no second edit here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, get_args, get_origin

from pydantic.fields import FieldInfo

from moeplan import units
from moeplan.catalogue.sheet import FieldPath, Sheet, at, fail, shown
from moeplan.catalogue.translate import validated
from moeplan.domain.cluster import ClusterSpec, FabricSpec, FaultSpec, Gpu, LinkSpec, NicSpec, SpeedSpec
from moeplan.domain.measured import Measured, Terms
from moeplan.errors import unknown_name

_SUFFIXES = {"_bytes_per_s": "B/s", "_flops_per_s": "FLOP/s", "_bytes": "B", "_s": "s", "_w": "W"}
# dimension -> example, lowest and highest SI value that can be meant
_RANGES = {
    "B/s": ("400 Gbit/s", 1e6, 1e13),
    "FLOP/s": ("989 TFLOP/s", 1e6, 1e18),
    "B": ("80 GB", 1e3, 1e15),
    "s": ("4 us", 1e-12, 10.0),
    "W": ("700 W", 0.1, 1e6),
    "share": ("80 %", 1e-4, 1.0),
}
_FASTEST_MEMORY = 1e14
_SHARES = ("efficiency", "share_beside_exchange", "share_beside_compute")
_NESTED = ("products", "tasks", "exchanges")
_TEXTS = {"device", "kind", "link", "global_link", "name", "nic", "node", "rail", "routing", "seed", "switch"}
"""Keys that hold a name or a setting, which needs no source."""


@dataclass(frozen=True, slots=True)
class Quantity:
    """What a key of a section holds: a field of the spec, in a dimension (count, number, text or list without one)."""

    field: str
    dimension: str
    is_required: bool


@lru_cache
def quantities(spec: type) -> Mapping[str, Quantity]:
    """The keys of a section and what each holds, from the spec that it becomes."""
    fields: dict[str, FieldInfo] = spec.__pydantic_fields__  # type: ignore[attr-defined]
    return dict(_quantity(name, info) for name, info in fields.items())


def _quantity(name: str, info: FieldInfo) -> tuple[str, Quantity]:
    suffix = next((suffix for suffix in _SUFFIXES if name.endswith(suffix)), "")
    dimension = _SUFFIXES[suffix] if suffix else _plain_dimension(name, info)
    return name.removesuffix(suffix), Quantity(name, dimension, info.is_required())


def _plain_dimension(name: str, info: FieldInfo) -> str:
    if name in _TEXTS:
        return "text"
    kinds = {info.annotation, *get_args(info.annotation)}
    if any(get_origin(kind) is tuple for kind in kinds):
        return "list"
    is_count = any(kind is int or int in get_args(kind) for kind in kinds)
    return "count" if is_count else "share" if name.endswith(_SHARES) or name == "capacity" else "number"


def _gpu_quantities(data: Mapping[str, Any]) -> dict[str, Quantity]:
    """The keys of a GPU: one peak for each number format, and the usable memory as a share."""
    found = dict(quantities(Gpu))
    del found["peak"]
    peaks = ("peak_fp32", "peak_tf32", "peak_bf16", "peak_fp16", "peak_fp8", "peak_fp4")
    found |= {peak: Quantity(peak, "FLOP/s", is_required=False) for peak in peaks}
    found["measured"] = Quantity("measured", "section", is_required=False)
    return found | {"usable_memory": Quantity("usable_memory", "share", is_required=True)}


def figure_names() -> frozenset[str]:
    """Every key that holds a figure, in any section of a cluster."""
    specs = (LinkSpec, NicSpec, FabricSpec, SpeedSpec, FaultSpec)
    sections = [*map(quantities, specs), _gpu_quantities({})]
    return frozenset(key for section in sections for key in section if key not in _TEXTS) | {"nodes", "gpus_per_node"}


def cluster_spec(sheet: Sheet, path: FieldPath = ("cluster",)) -> ClusterSpec:
    """The cluster at `path` in SI. Raises CatalogueError."""
    data = _mapping(sheet, path)
    _known(sheet, path, ClusterSpec.model_fields)
    _needed(sheet, path, ("gpu", "nodes", "gpus_per_node"))
    links = _mapping(sheet, (*path, "links")) if "links" in data else {}
    spec: dict[str, Any] = {
        "name": data.get("name", "cluster"),
        "gpu": gpu(sheet, (*path, "gpu")),
        "nodes": si(sheet, (*path, "nodes"), "count"),
        "gpus_per_node": si(sheet, (*path, "gpus_per_node"), "count"),
        "links": {
            name: validated(
                LinkSpec, section(sheet, (*path, "links", name), LinkSpec), sheet.spots, (*path, "links", name)
            )
            for name in links
        },
    }
    for key, part in (("nic", NicSpec), ("fabric", FabricSpec)):
        if data.get(key) is not None:
            spec[key] = validated(part, section(sheet, (*path, key), part), sheet.spots, (*path, key))
    for key, item in (("speeds", SpeedSpec), ("faults", FaultSpec)):
        if data.get(key) is not None:
            spec[key] = _items(sheet, (*path, key), item)
    if "wiring" in data:
        spec["wiring"] = data["wiring"]
    return validated(ClusterSpec, spec, sheet.spots, path)


def _items(sheet: Sheet, path: FieldPath, item: type[SpeedSpec] | type[FaultSpec]) -> list[SpeedSpec | FaultSpec]:
    """The items of a list of speeds or faults."""
    data = at(sheet.data, path)
    if not isinstance(data, list):
        fail(sheet.spots, path, f"{shown(data)} is not a list; write one such as [{{nic: n0.nic3}}]")
    places = [(*path, index) for index in range(len(data))]
    return [validated(item, section(sheet, place, item), sheet.spots, place) for place in places]


def gpu(sheet: Sheet, path: FieldPath) -> Gpu:
    """The GPU at `path` in SI. Raises CatalogueError."""
    data = _mapping(sheet, path)
    found = _gpu_quantities(data)
    _known(sheet, path, found)
    _needed(sheet, path, [key for key, each in found.items() if each.is_required and key != "name"])
    plain = [key for key in data if key not in ("name", "measured")]
    values = {found[key].field: si(sheet, (*path, key), found[key].dimension) for key in plain}
    if "measured" in data:
        values["measured"] = _measured_section(sheet, (*path, "measured"))
    peaks = {key.removeprefix("peak_"): values.pop(key) for key in list(values) if key.startswith("peak_")}
    usable_bytes = values.pop("usable_memory") * values["memory_bytes"]
    whole = values | {"name": data.get("name", "gpu"), "peak_flops_per_s": peaks, "usable_memory_bytes": usable_bytes}
    return validated(Gpu, whole, sheet.spots, path)


def _measured_section(sheet: Sheet, path: FieldPath) -> Measured:
    """What was measured of a device: terms by number format and class, tables by exchange."""
    data, found = _mapping(sheet, path), quantities(Measured)
    _known(sheet, path, found)
    _needed(sheet, path, [key for key, each in found.items() if each.is_required])
    values = {found[key].field: si(sheet, (*path, key), found[key].dimension) for key in data if key not in _NESTED}
    for key in {"products", "tasks"} & data.keys():
        values[key] = {
            dtype: {name: _terms(sheet, (*path, key, dtype, name)) for name in _mapping(sheet, (*path, key, dtype))}
            for dtype in _mapping(sheet, (*path, key))
        }
    if "exchanges" in data:
        names = _mapping(sheet, (*path, "exchanges"))
        values["exchanges"] = {name: _table(sheet, (*path, "exchanges", name)) for name in names}
    return validated(Measured, values, sheet.spots, path)


def _terms(sheet: Sheet, path: FieldPath) -> Terms:
    return validated(Terms, section(sheet, path, Terms), sheet.spots, path)


def _table(sheet: Sheet, path: FieldPath) -> tuple[tuple[float, float], ...]:
    """Seconds by sizes, which are the keys."""
    if not re.fullmatch(r"[a-z_]+ of [1-9][0-9]{0,4}", str(path[-1])):
        fail(sheet.spots, path, "is no exchange of a group; write it as in 'all_to_all of 2'")
    rows = []
    for key in _mapping(sheet, path):
        try:
            rows.append((units.parse(key, "B"), si(sheet, (*path, key), "s")))
        except ValueError as error:
            fail(sheet.spots, (*path, key), f"{error}; the key is a size, as in '64 KiB'")
    return tuple(sorted(rows))


def section(sheet: Sheet, path: FieldPath, spec: type) -> dict[str, Any]:
    """The fields of a spec, in SI, from the mapping at `path`."""
    data, found = _mapping(sheet, path), quantities(spec)
    _known(sheet, path, found)
    _needed(sheet, path, [key for key, each in found.items() if each.is_required])
    return {found[key].field: si(sheet, (*path, key), found[key].dimension) for key in data}


def si(sheet: Sheet, path: FieldPath, dimension: str) -> Any:
    """The figure at `path` in SI: a count, a number, a text, a list of counts, or what has a unit."""
    figure = at(sheet.data, path)
    if dimension == "text":
        return figure
    if not isinstance(figure, dict) or "value" not in figure:
        example = _RANGES.get(dimension, ("8",))[0]
        fail(
            sheet.spots, path, f"{shown(figure)} has no source; write {{value: {example}, source: a key under sources}}"
        )
    value = figure["value"]
    if dimension in ("count", "list"):
        return _counts(sheet, path, value, is_list=dimension == "list")
    if dimension == "number":
        return _number(sheet, path, value)
    return _measured(sheet, path, value, dimension)


def _counts(sheet: Sheet, path: FieldPath, value: object, *, is_list: bool) -> Any:
    each = value if is_list and isinstance(value, list) else [value]
    if (is_list and not isinstance(value, list)) or not each:
        fail(sheet.spots, path, f"{shown(value)} is not a list of whole numbers; write one such as [16, 16]")
    for one in each:
        if not isinstance(one, int) or isinstance(one, bool):
            fail(
                sheet.spots, path, f"{shown(one)} is not a whole number; write one such as 8, without quotes or a unit"
            )
        if not 1 <= one <= 10**8:
            fail(sheet.spots, path, f"{one} is not allowed; use a whole number from 1 to 100_000_000")
    return value


def _number(sheet: Sheet, path: FieldPath, value: object) -> float:
    if not isinstance(value, int | float) or isinstance(value, bool):
        fail(sheet.spots, path, f"{shown(value)} is not a number; write one such as 2.0, without quotes or a unit")
    return float(value)


def _measured(sheet: Sheet, path: FieldPath, value: object, dimension: str) -> float:
    example, low, high = _RANGES[dimension]
    if not isinstance(value, str):
        fail(sheet.spots, path, f"{shown(value)} has no unit; write it as in '{example}'")
    try:
        number = units.parse(value, dimension)
    except ValueError as error:
        sentence = str(error).replace(repr(value), shown(value), 1)
        has_example = "as in" in sentence or "; write " in sentence
        fail(sheet.spots, path, sentence if has_example else f"{sentence}; write it as in '{example}'")
    if path[-1] == "memory_bandwidth":
        high = _FASTEST_MEMORY
    if path[-1] == "capacity":
        low = 0.0
    if not low <= number <= high:
        hint = ", and bits against bytes (Gbit/s, GB/s)" if dimension == "B/s" else ""
        allowed = f"{units.show(low, dimension)} to {units.show(high, dimension)}"
        fail(sheet.spots, path, f"{shown(value)} is outside {allowed}; check the prefix{hint}")
    return number


def _mapping(sheet: Sheet, path: FieldPath) -> Mapping[str, Any]:
    data = at(sheet.data, path)
    if not isinstance(data, dict):
        fail(sheet.spots, path, f"{shown(data)} is not a mapping; write key: value pairs under it")
    return data


def _known(sheet: Sheet, path: FieldPath, allowed: Mapping[str, Any]) -> None:
    for key in at(sheet.data, path):
        if key not in allowed:
            fail(sheet.spots, (*path, key), f"{unknown_name('key', key, allowed)}; or remove it")


def _needed(sheet: Sheet, path: FieldPath, keys: Any) -> None:
    for key in keys:
        if key not in at(sheet.data, path):
            fail(sheet.spots, (*path, key), "is missing; add it, as in {value: ..., source: a key under sources}")
