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
COUNTS = {"nodes", "gpus_per_node", "per_node", "num_sms", "nodes_per_leaf", "oversubscription", "shape", "spines"}
COUNTS |= {"nodes_per_router", "routers_per_group", "global_links_per_router"}
WIDE_AREA = {"swarm-wan"}
DIMENSIONS = {
    "memory": "B", "memory_bandwidth": "B/s", "num_sms": "", "l2_cache": "B", "tdp": "W", "kernel_launch": "s",
    "usable_memory": "share", "gemm_efficiency": "share", "grouped_gemm_efficiency": "share",
    "compute_share_beside_exchange": "share", "exchange_share_beside_compute": "share",
    "attention_efficiency": "share", "memory_efficiency": "share", "bandwidth": "B/s", "latency": "s",
    "efficiency": "share", "message_overhead": "s", "message_gap": "s", "capacity": "share",
    "attention_backward_efficiency": "share", "fp8_gemm_efficiency": "share", "fp4_gemm_efficiency": "share",
    "sustained_efficiency": "share", "sustained_fp8_efficiency": "share", "sustained_fp4_efficiency": "share",
    "kernel_start": "s", "scaled_start": "s", "tile_start": "s", "attention_block": "s", "exchange_start": "s",
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
    elif isinstance(data, list):
        for item in data:
            yield from figures(item, path)


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
    lists = {key: [si(item) for item in data.get(key, [])] for key in ("speeds", "faults")}
    rest = {"name": name, "gpu": gpu_of(data["gpu"]), "links": links, "wiring": data.get("wiring", [])}
    return ClusterSpec.model_validate(rest | counts | parts | lists)


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
    width = wanted.bandwidth_bytes_per_s_K
    assert width[width > 0].min() >= 1e6
    assert (width > 0).all() or wanted.spec.faults
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
    if (tier >= 2).any() and (tier == 1).any():
        assert width[tier >= 2].max() <= width[tier == 1].max()
    assert 5e-7 < wanted.path_latency_s(src, dst)[src != dst].max() < (0.5 if name in WIDE_AREA else 1e-4)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_a_topology_takes_other_numbers_of_nodes(name: str) -> None:
    spec = spec_of(name)
    if not spec.is_torus and spec.nic is not None:
        for nodes in (1, 3, 64):
            whole = {"nodes": nodes, "speeds": (), "faults": ()}
            assert build_cluster(spec.model_copy(update=whole)).num_nodes == nodes


@pytest.mark.parametrize(
    ("name", "links_per_gpu"),
    [
        ("p3.16xlarge", 6),
        ("p3dn", 6),
        ("dgx-1-v100", 6),
        ("lina-4x4-a100", 12),
        ("slingshot-dragonfly", 12),
        ("mi300x-8", 7),
    ],
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


@pytest.mark.parametrize("name", ["p3.16xlarge", "p3dn", "dgx-1-v100"])
def test_a_hybrid_cube_is_wired_as_published(name: str) -> None:
    # NVLinks between each two GPUs, as nvidia-smi topo -m prints them on a DGX-1 with V100: a cube whose twelve edges
    # have one or two NVLinks, and the diagonals of two of its faces.
    nvlinks_GG = np.array(
        [
            [0, 1, 1, 2, 2, 0, 0, 0],
            [1, 0, 2, 1, 0, 2, 0, 0],
            [1, 2, 0, 2, 0, 0, 1, 0],
            [2, 1, 2, 0, 0, 0, 0, 1],
            [2, 0, 0, 0, 0, 1, 1, 2],
            [0, 2, 0, 0, 1, 0, 2, 1],
            [0, 0, 1, 0, 1, 2, 0, 2],
            [0, 0, 0, 1, 2, 1, 2, 0],
        ]
    )
    graph, found_GG = cluster_of(name).graph(), np.zeros((8, 8))
    for a, b, edge in graph.edges(data=True):
        if edge["kind"] == "nvlink" and a.startswith("n0."):
            found_GG[int(a[-1]), int(b[-1])] = edge["bandwidth_bytes_per_s"] / (25e9 * 0.9)
    assert found_GG == pytest.approx(nvlinks_GG)


def test_both_gpus_of_a_dgx_1_pair_share_the_card_on_their_switch() -> None:
    dgx1 = cluster_of("dgx-1-v100")
    assert dgx1.wiring is not None
    assert dgx1.wiring.nic_G.tolist() == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [dgx1.link_ends(link)[1] for link in dgx1.path(0, 7)] == [
        "n0.plx0", "n0.socket0", "n0.socket1", "n0.plx3", "n0.gpu7",
    ]  # fmt: skip


def test_gpus_on_two_sockets_share_the_way_over_both() -> None:
    server = cluster_of("pcie-2-socket-rtx-4090")
    names = [server.link_name(link) for link in server.path(1, 6)]
    assert names[1:4] == ["n0.plx0 -> n0.socket0", "n0.socket0 -> n0.socket1", "n0.socket1 -> n0.plx1"]
    assert len(server.path(0, 1)) == 2


def test_between_supernodes_three_sixteenths_are_left() -> None:
    supernodes = cluster_of("bagualu-supernodes")
    inside = supernodes.spec.nic
    assert inside is not None
    assert supernodes.bandwidth_bytes_per_s_K[-1] == pytest.approx(256 * inside.usable_bytes_per_s * 3 / 16, rel=1e-6)
    assert supernodes.tier([0, 0], [255, 256]).tolist() == [2, 3]


def test_the_groups_of_the_dragonfly_are_cabinets_of_512_cards() -> None:
    slingshot = cluster_of("slingshot-dragonfly")
    assert slingshot.tier([0, 0, 0], [15, 511, 512]).tolist() == [2, 2, 3]
    assert slingshot.alike_block == 512
    assert max(len(slingshot.path(0, rank)) for rank in range(1, 1024)) == 8


def test_wide_area_peers_are_as_slow_as_the_slower_of_two() -> None:
    swarm = cluster_of("swarm-wan")
    widths = swarm.path_bandwidth_bytes_per_s([0, 0, 12], [1, 12, 13])
    assert widths.tolist() == pytest.approx([0.9 * 62.5e6, 0.9 * 25e6, 0.9 * 25e6])
    assert swarm.path_latency_s([0], [1])[0] == pytest.approx(0.1, rel=1e-3)


def test_degraded_machines_keep_every_pair_joined_and_lose_one_machine() -> None:
    degraded = cluster_of("hgx-h100-degraded")
    assert degraded.num_gpus == 120
    src, dst = np.divmod(np.arange(120**2), 120)
    assert (degraded.path_bandwidth_bytes_per_s(src, dst) > 0).all()
    assert degraded.path_bandwidth_bytes_per_s([5, 0], [13, 8]).tolist() == pytest.approx([24e9, 48e9])
