"""Small clusters of every kind, for the tests of paths and links."""

from __future__ import annotations

from typing import Any

import numpy as np
from hypothesis import assume
from hypothesis import strategies as st

from moeplan.domain.cluster import Cluster, ClusterSpec, Gpu, build_cluster
from moeplan.errors import CatalogueError

GPU = Gpu(
    name="a-gpu",
    memory_bytes=80e9,
    usable_memory_bytes=72e9,
    memory_bandwidth_bytes_per_s=3e12,
    peak_flops_per_s={"bf16": 1e15},
    num_sms=132,
    l2_cache_bytes=5e7,
    tdp_w=700.0,
    kernel_launch_s=4e-6,
    gemm_efficiency=0.8,
    grouped_gemm_efficiency=0.7,
    attention_efficiency=0.6,
    memory_efficiency=0.9,
)
LINKS = {
    "nvlink": {"bandwidth_bytes_per_s": 450e9, "latency_s": 1e-6},
    "pcie": {"bandwidth_bytes_per_s": 64e9, "latency_s": 5e-7},
}
SWITCHED = [{"from": "gpu*", "to": "nvswitch", "link": "nvlink"}, {"from": "nic*", "to": "gpu*", "link": "pcie"}]
NIC = {"per_node": 4, "bandwidth_bytes_per_s": 50e9, "latency_s": 6e-7, "efficiency": 0.9, "message_overhead_s": 5e-6}
TORUS = {"nic": None, "wiring": [], "links": {"ici": {"bandwidth_bytes_per_s": 50e9, "latency_s": 1e-6}}}


def spec(**changes: Any) -> ClusterSpec:
    """Four machines of four GPUs and four NICs on one switch, changed."""
    fields = {
        "name": "rack",
        "gpu": GPU,
        "nodes": 4,
        "gpus_per_node": 4,
        "links": LINKS,
        "wiring": SWITCHED,
        "nic": NIC,
    }
    return ClusterSpec.model_validate({**fields, "fabric": {"kind": "single_switch", "latency_s": 2e-7}, **changes})


def cluster(**changes: Any) -> Cluster:
    return build_cluster(spec(**changes))


def torus(*shape: int) -> Cluster:
    size = int(np.prod(shape))
    return cluster(nodes=size, gpus_per_node=1, fabric={"kind": "torus", "shape": list(shape), "link": "ici"}, **TORUS)


def two_sockets(nodes: int = 2) -> Cluster:
    """As johnny: four GPUs on each socket, one NIC on the first."""
    links = {name: {"bandwidth_bytes_per_s": rate} for name, rate in (("pcie", 11e9), ("socket_link", 22.5e9))}
    wiring = [
        {"from": "gpu0-3", "to": "socket0", "link": "pcie"},
        {"from": "gpu4-7", "to": "socket1", "link": "pcie"},
        {"from": "socket0", "to": "socket1", "link": "socket_link"},
        {"from": "nic0", "to": "socket0", "link": "pcie"},
    ]
    return cluster(nodes=nodes, gpus_per_node=8, links=links, wiring=wiring, nic={**NIC, "per_node": 1})


def all_pairs(wanted: Cluster) -> tuple[np.ndarray, np.ndarray]:
    src, dst = np.divmod(np.arange(wanted.num_gpus**2), wanted.num_gpus)
    return src, dst


def names_on(wanted: Cluster, src: int, dst: int) -> list[str]:
    links = wanted.path(src, dst)
    return [wanted.link_ends(link)[0] for link in links] + [wanted.link_ends(link)[1] for link in links[-1:]]


def dragonfly(nodes: int = 12, routers: int = 3, ports: int = 2, **changes: Any) -> Cluster:
    """One node of two GPUs and two NICs on each router, three routers in a group."""
    links = {**LINKS, "local": {"bandwidth_bytes_per_s": 25e9}, "optical": {"bandwidth_bytes_per_s": 20e9}}
    fabric = {
        "kind": "dragonfly",
        "nodes_per_router": 1,
        "routers_per_group": routers,
        "global_links_per_router": ports,
        "link": "local",
        "global_link": "optical",
        "latency_s": 3e-7,
    }
    fields = {"nodes": nodes, "gpus_per_node": 2, "links": links, "fabric": fabric, "nic": {**NIC, "per_node": 2}}
    return cluster(**(fields | changes))


shapes = st.lists(st.integers(1, 6), min_size=1, max_size=3).filter(lambda shape: np.prod(shape) <= 60)
LEAF_FABRICS = (
    ("single_switch", None),
    ("fat_tree", None),
    ("fat_tree", "ecmp"),
    ("rail_optimised", None),
    ("rail_optimised", "ecmp"),
    ("rail_optimised", "rail_aligned"),
    ("rail_only", None),
)


@st.composite
def fabrics(draw: st.DrawFn) -> dict[str, Any]:
    """A fabric of leaves of every kind, with every routing."""
    kind, routing = draw(st.sampled_from(LEAF_FABRICS))
    fabric: dict[str, Any] = {"kind": kind, "routing": routing, "latency_s": 1e-7}
    if kind != "single_switch" and (kind != "rail_only" or draw(st.booleans())):
        fabric |= {"nodes_per_leaf": draw(st.integers(1, 4)), "oversubscription": draw(st.sampled_from([1.0, 2.0]))}
        if routing == "ecmp" or (routing == "rail_aligned" and draw(st.booleans())):
            fabric |= {"spines": draw(st.integers(2, 4)), "seed": draw(st.integers(0, 3))}
    return fabric


@st.composite
def specs(draw: st.DrawFn) -> ClusterSpec:
    """Machines with switches, direct wires or two sockets, under every kind of fabric."""
    kind = draw(st.sampled_from(["torus", "dragonfly", "switched", "switched", "hosted"]))
    if kind == "torus":
        return torus(*draw(shapes)).spec
    if kind == "dragonfly":
        routers, ports = draw(st.integers(1, 4)), draw(st.integers(1, 3))
        most = routers * (routers * ports + 1)
        return dragonfly(draw(st.integers(1, min(most, 16))), routers, ports).spec
    nodes, gpus, fabric = draw(st.integers(1, 7)), draw(st.integers(1, 5)), draw(fabrics())
    if kind == "switched":
        return spec(nodes=nodes, gpus_per_node=gpus, nic={**NIC, "per_node": gpus}, fabric=fabric)
    wiring = [{"from": f"gpu{a}", "to": f"gpu{b}", "link": "nvlink"} for a in range(gpus) for b in range(a)]
    wiring += [{"from": "gpu*", "to": "host", "link": "pcie"}, {"from": "nic*", "to": "host", "link": "pcie"}]
    links = LINKS if gpus > 1 else {"pcie": LINKS["pcie"]}
    nic = {**NIC, "per_node": draw(st.integers(1, 5))}
    return spec(nodes=nodes, gpus_per_node=gpus, links=links, wiring=wiring, nic=nic, fabric=fabric)


def clusters() -> st.SearchStrategy[Cluster]:
    """Clusters without faults."""
    return specs().map(build_cluster)


@st.composite
def damaged(draw: st.DrawFn, capacities: tuple[float, ...] = (0.0, 0.0, 0.25)) -> tuple[Cluster, Cluster]:
    """A cluster, and the same with one to three faults that cut nobody off."""
    whole = build_cluster(draw(specs()))
    assume(whole.num_links)
    faults: list[dict[str, Any]] = []
    for _ in range(draw(st.integers(1, 3))):
        capacity = draw(st.sampled_from(capacities))
        if capacity == 0 and whole.spec.nodes > 1 and not whole.spec.is_torus and draw(st.integers(0, 4)) == 0:
            faults.append({"node": draw(st.integers(0, whole.spec.nodes - 1))})
        else:
            link = draw(st.integers(0, whole.num_links - 1))
            faults.append({"link": whole.link_name(link), "capacity": capacity})
    try:
        return whole, build_cluster(with_faults(whole, *faults))
    except CatalogueError:
        assume(False)
        raise


def with_faults(whole: Cluster, *faults: dict[str, Any]) -> ClusterSpec:
    """The spec of a cluster with faults."""
    return ClusterSpec.model_validate(dict(whole.spec) | {"faults": faults})
