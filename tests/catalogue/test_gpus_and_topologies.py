"""Every GPU and topology of the catalogue loads, names its units and sources, and is physically possible.

A small parser of the test's own reads the files, so that an error in the catalogue's cannot hide one in them.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from ruamel.yaml import YAML

from moeplan import units
from moeplan.domain.cluster import Cluster, ClusterSpec, Gpu, build_cluster

ROOT = Path(__file__).resolve().parents[2]
GPUS = {path.name.removesuffix(".yaml"): path for path in sorted((ROOT / "cost_models" / "gpus").glob("*.yaml"))}
TOPOLOGIES = {path.name.removesuffix(".yaml"): path for path in sorted((ROOT / "topologies").glob("*.yaml"))}
FILES = GPUS | TOPOLOGIES
SUFFIX = {"B": "_bytes", "B/s": "_bytes_per_s", "FLOP/s": "_flops_per_s", "s": "_s", "W": "_w", "share": ""}
COUNTS = {"nodes", "gpus_per_node", "per_node", "num_sms", "nodes_per_leaf", "oversubscription", "shape"}
DIMENSIONS = {
    "memory": "B", "memory_bandwidth": "B/s", "num_sms": "", "l2_cache": "B", "tdp": "W", "kernel_launch": "s",
    "usable_memory": "share", "gemm_efficiency": "share", "grouped_gemm_efficiency": "share",
    "attention_efficiency": "share", "memory_efficiency": "share", "bandwidth": "B/s", "latency": "s",
    "efficiency": "share", "message_overhead": "s",
} | {f"peak_{dtype}": "FLOP/s" for dtype in ("fp32", "tf32", "bf16", "fp16", "fp8", "fp4")}  # fmt: skip


@cache
def written(name: str) -> dict[str, Any]:
    """One file as it stands."""
    yaml = YAML(typ="safe", pure=True)
    data: dict[str, Any] = yaml.load(FILES[name].read_text(encoding="utf-8"))
    return data


def whole(name: str) -> dict[str, Any]:
    """A file laid over what it extends."""
    data = written(name)
    return laid_over(whole(data["extends"]), data) if "extends" in data else data


def laid_over(base: Mapping[str, Any], top: Mapping[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in top.items():
        both = isinstance(value, dict) and isinstance(base.get(key), dict) and "value" not in value
        merged[key] = laid_over(base[key], value) if both else value
    return merged


def figures(data: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    if isinstance(data, dict) and "value" in data:
        yield path, data
    elif isinstance(data, dict):
        for key, value in data.items():
            yield from figures(value, (*path, str(key)))


def si(data: Mapping[str, Any]) -> dict[str, Any]:
    """A section's figures in SI under the names that the specs use."""
    plain = {}
    for key, value in data.items():
        if not isinstance(value, dict):
            plain[key] = value
        elif key in COUNTS:
            plain[key] = value["value"]
        else:
            plain[key + SUFFIX[DIMENSIONS[key]]] = units.parse(value["value"], DIMENSIONS[key])
    return plain


def gpu_of(name: str) -> Gpu:
    data = whole(name)
    plain = si(data["spec"] | data["calibration"])
    peaks = {
        key.removeprefix("peak_").removesuffix("_flops_per_s"): plain.pop(key) for key in list(plain) if "peak_" in key
    }
    share = plain.pop("usable_memory")
    return Gpu(name=name, usable_memory_bytes=share * plain["memory_bytes"], peak_flops_per_s=peaks, **plain)


def spec_of(name: str) -> ClusterSpec:
    data = {key: value for key, value in whole(name).items() if key not in ("about", "sources", "extends")}
    parts = {key: si(data[key]) for key in ("nic", "fabric") if key in data}
    counts = {key: data[key]["value"] for key in ("nodes", "gpus_per_node")}
    links = {kind: si(link) for kind, link in data["links"].items()}
    rest = {"name": name, "gpu": gpu_of(data["gpu"]), "links": links, "wiring": data.get("wiring", [])}
    return ClusterSpec.model_validate(rest | counts | parts)


@cache
def cluster_of(name: str) -> Cluster:
    return build_cluster(spec_of(name))


def test_a_name_means_one_thing() -> None:
    names = [*GPUS, *TOPOLOGIES]
    names += [
        path.name.removesuffix(".yaml")
        for folder in ("", "models")
        for path in (ROOT / "scenarios" / folder).glob("*.yaml")
    ]
    assert sorted(names) == sorted(set(names))


@pytest.mark.parametrize("name", FILES)
def test_a_file_says_what_it_is_about_first(name: str) -> None:
    about = written(name)["about"]
    assert next(iter(written(name))) == "about"
    assert isinstance(about, str)
    assert "\n" not in about


@pytest.mark.parametrize("name", FILES)
def test_every_figure_has_a_unit_and_a_listed_source(name: str) -> None:
    data = written(name)
    for path, figure in figures(data):
        assert set(figure) <= {"value", "source", "note"}, path
        assert figure["source"] in data["sources"], path
        if path[-1] in COUNTS:
            assert not isinstance(figure["value"], str), path
        else:
            units.parse(figure["value"], DIMENSIONS[path[-1]])


@pytest.mark.parametrize("name", FILES)
def test_every_source_is_used_and_complete(name: str) -> None:
    data = written(name)
    assert set(data["sources"]) == {figure["source"] for _, figure in figures(data)}
    for key, source in data["sources"].items():
        assert source["cite"], key
        if source.get("kind") == "measured":
            assert isinstance(source["date"], str), key
            assert source["environment"], key


@pytest.mark.parametrize("name", FILES)
def test_a_guess_says_why_it_is_that_large(name: str) -> None:
    for path, figure in figures(written(name)):
        assert figure["source"] != "assumed" or figure.get("note"), path


@pytest.mark.parametrize("name", FILES)
def test_a_rate_says_its_direction_and_a_tensor_peak_that_it_is_dense(name: str) -> None:
    for path, figure in figures(written(name)):
        if path[-1] == "bandwidth":
            assert "per direction" in figure["note"], path
        if path[-1] in ("peak_tf32", "peak_bf16", "peak_fp16", "peak_fp8", "peak_fp4") and name != "cpu-core":
            assert "dense" in figure["note"], path


@pytest.mark.parametrize("name", GPUS)
def test_a_gpu_is_physically_possible(name: str) -> None:
    gpu = gpu_of(name)
    peaks = [
        gpu.peak_flops_per_s[dtype] for dtype in ("fp32", "tf32", "bf16", "fp8", "fp4") if dtype in gpu.peak_flops_per_s
    ]
    assert peaks == sorted(peaks), "narrower formats are never slower"
    assert "fp32" in gpu.peak_flops_per_s, "element-wise work is counted in fp32"
    assert 10e9 <= gpu.memory_bandwidth_bytes_per_s <= 1e13
    assert gpu.memory_bandwidth_bytes_per_s < min(peaks), "one byte for each operation is out of reach"
    assert 0.8 <= gpu.usable_memory_bytes / gpu.memory_bytes < 1
    assert gpu.l2_cache_bytes < gpu.memory_bytes / 100
    assert 1e9 < max(peaks) / gpu.tdp_w < 2e13
    assert gpu.grouped_gemm_efficiency <= gpu.gemm_efficiency
    assert 1e-7 < gpu.kernel_launch_s < 2e-5


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_topology_is_physically_possible(name: str) -> None:
    wanted = cluster_of(name)
    assert wanted.bandwidth_bytes_per_s_K.min() >= 1e6
    for kind, link in wanted.spec.links.items():
        assert 1e6 <= link.bandwidth_bytes_per_s <= 1e13, kind
        assert link.bandwidth_bytes_per_s < wanted.gpu.memory_bandwidth_bytes_per_s, "wires are slower than memory"
        assert 1e-8 < link.latency_s < 1e-4, kind
    if wanted.spec.nic is not None:
        assert 1e6 <= wanted.spec.nic.bandwidth_bytes_per_s <= 1e13


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_every_rank_reaches_every_other_and_no_faster_between_nodes(name: str) -> None:
    wanted = cluster_of(name)
    src, dst = np.divmod(np.arange(min(wanted.num_gpus, 128) ** 2), min(wanted.num_gpus, 128))
    width = wanted.path_bandwidth_bytes_per_s(src, dst)
    tier = wanted.tier(src, dst)
    assert np.array_equal(np.isinf(width), src == dst)
    if (tier >= 2).any():
        assert width[tier >= 2].max() <= width[tier == 1].max()
    assert 5e-7 < wanted.path_latency_s(src, dst)[src != dst].max() < 1e-4


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_topology_takes_other_numbers_of_nodes(name: str) -> None:
    spec = spec_of(name)
    if not spec.is_torus and spec.nic is not None:
        for nodes in (1, 3, 64):
            assert build_cluster(spec.model_copy(update={"nodes": nodes})).num_nodes == nodes


@pytest.mark.parametrize(
    ("name", "links_per_gpu"), [("p3.16xlarge", 6), ("p3dn", 6), ("lina-4x4-a100", 12), ("mi300x-8", 7)]
)
def test_direct_wires_use_every_port_of_a_gpu_once(name: str, links_per_gpu: int) -> None:
    wires = [wire for wire in spec_of(name).wiring if wire.link in ("nvlink", "xgmi")]
    ports = dict.fromkeys(range(cluster_of(name).gpus_per_node), 0)
    for wire in wires:
        ends = [int(part) for part in wire.end.removeprefix("gpu").split("-")]
        for end in range(ends[0], ends[-1] + 1):
            ports[end] += wire.count
            ports[int(wire.start.removeprefix("gpu"))] += wire.count
    assert set(ports.values()) == {links_per_gpu}


def test_johnny_has_the_published_widths() -> None:
    johnny = cluster_of("johnny")
    within = johnny.path_bandwidth_bytes_per_s([0, 0, 0], [1, 4, 8])
    assert within.tolist() == pytest.approx([88e9 / 8, 88e9 / 8, 50e9 / 8])
    kinds = [johnny.link_kinds[johnny.kind_K[link]] for link in johnny.path(0, 4)]
    assert kinds == ["pcie", "socket_link", "pcie"]


def test_the_h800_machines_reach_what_deepseek_reports() -> None:
    widths = cluster_of("h800-deepseek").path_bandwidth_bytes_per_s([0, 0], [1, 8])
    assert widths.tolist() == pytest.approx([160e9, 46e9])


def test_both_gpus_of_a_pair_share_a_card_on_p4d() -> None:
    p4d = cluster_of("p4d")
    assert p4d.wiring is not None
    assert p4d.wiring.nic_G.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
