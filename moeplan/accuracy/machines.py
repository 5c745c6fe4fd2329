"""The machine of a record: a topology of the catalogue, as large and as fast as the record says."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from moeplan import catalogue
from moeplan.domain.cluster import Gpu
from moeplan.errors import CatalogueError, unknown_name

Row = Mapping[str, Any]
_MACHINES = {
    "GB300": "nvl72-gb300", "GB200": "nvl72-gb200", "B300": "hgx-b300-rail", "B200": "hgx-b200-rail",
    "H200": "hgx-h200-rail", "H800": "h800-deepseek", "H100": "hgx-h100-rail", "A800": "hgx-a100",
    "A100": "hgx-a100", "MI300X": "mi300x-8", "L40S": "pcie-8-l40s", "H20": "hgx-h20-rail",
}  # fmt: skip
"""The first of these words that a GPU's name has says which topology it works in."""
_VARIANTS = {("H100", "96GB"): "h100-96gb", ("A100", "40GB"): "a100-40gb-sxm"}
"""GPUs of a family with a sheet of their own, by a word of their name."""
_RACK = 72
"""GPUs of an NVLink domain that is a rack."""


def family(gpu: str) -> str:
    """The word of `_MACHINES` in a GPU's name. Raises CatalogueError."""
    words = re.findall(r"[A-Z0-9]+", gpu.upper())
    found = next((name for name in _MACHINES if name in words), None)
    if found is None:
        raise CatalogueError(f"hardware.gpu: {unknown_name('GPU', gpu[:60], _MACHINES)}")
    return found


def machine_of(hardware: Row) -> tuple[str, dict[str, object]]:
    """A topology's name, and what changes in it. Raises CatalogueError for an unknown GPU or an odd number of them."""
    gpu, count = str(hardware.get("gpu")), hardware.get("count")
    name = family(gpu)
    if not isinstance(count, int) or count < 1:
        raise CatalogueError(f"hardware.count: found {count!r}, not a number of GPUs; use 1 or more")
    topology = catalogue.show(_MACHINES[name])
    per_node = _per_node(hardware, count, is_rack=_MACHINES[name].startswith("nvl72"))
    changes: dict[str, object] = {"nodes": count // per_node}
    if per_node != topology["gpus_per_node"]["value"]:
        changes |= {"cluster.gpus_per_node": per_node, "cluster.nic.per_node": per_node}
    changes |= _links(hardware, topology, per_node)
    return _MACHINES[name], changes


def topology_of(name: str, hardware: Row) -> dict[str, Any]:
    """The topology with its sources, and in it the GPU that the record names, if that has a sheet of its own."""
    found = catalogue.show(name)
    gpu = str(hardware.get("gpu"))
    for (which, word), sheet in _VARIANTS.items():
        if which == family(gpu) and word in gpu.upper().replace(" ", ""):
            own = catalogue.show(sheet)
            found["sources"] |= own["sources"]
            found["gpu"] = {key: value for key, value in own.items() if key not in ("about", "sources")}
    return found


def _per_node(hardware: Row, count: int, *, is_rack: bool) -> int:
    """GPUs of one NVLink domain: in a rack as many as divide the job, elsewhere a machine's."""
    if is_rack:
        return next(size for size in range(min(_RACK, count), 0, -1) if count % size == 0)
    size = min(hardware.get("gpus_per_node") or 8, count)
    if count % size:
        raise CatalogueError(f"hardware.count: {count} GPUs are no whole number of nodes of {size}")
    return int(size)


def _links(hardware: Row, topology: Row, per_node: int) -> dict[str, object]:
    """Bandwidths that the record states otherwise than the topology."""
    found: dict[str, object] = {}
    intra, inter = str(hardware.get("intra_link") or ""), str(hardware.get("inter_nic") or "")
    if near := re.search(r"(\d+(?:\.\d+)?) GB/s (per direction|bidirectional)", intra):
        speed = float(near[1]) / (1 if near[2] == "per direction" else 2)
        if "nvlink" in topology["links"]:
            found["cluster.links.nvlink.bandwidth"] = f"{speed:g} GB/s"
    if far := re.search(r"(?:(\d+) x )?(\d+(?:\.\d+)?) Gb/s", inter):
        speed = float(far[2]) / (per_node if far[1] is None and "per node" in inter else 1)
        found["cluster.nic.bandwidth"] = f"{speed:g} Gbit/s"
    known = {"cluster.links.nvlink.bandwidth": ("links", "nvlink"), "cluster.nic.bandwidth": ("nic",)}
    return {key: text for key, text in found.items() if _stands(topology, known[key]) != text}


def _stands(topology: Row, path: tuple[str, ...]) -> str:
    for step in path:
        topology = topology[step]
    return str(topology["bandwidth"]["value"])


def at_full_speed(gpu: Gpu) -> Gpu:
    """The GPU as it is for the moment of a benchmark, before its clocks fall."""
    return sustained(gpu, 1.0, None, None)


def sustained(gpu: Gpu, wide: float, fp8: float | None, fp4: float | None) -> Gpu:
    """The GPU with these shares of its speed in a long step."""
    return replace(gpu, sustained_efficiency=wide, sustained_fp8_efficiency=fp8, sustained_fp4_efficiency=fp4)
