"""What fixed paths can carry is at most the smallest cut (max flow, min cut); cuts of regular networks in closed form.

Axes: K directed link, F pair of ranks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

import moeplan as mp
from moeplan.domain.cluster import Cluster, ClusterSpec, build_cluster

GPU = mp.load("small-two-nodes").cluster.gpu
GB = 1e9
WIRES = {"nvlink": {"bandwidth_bytes_per_s": 400 * GB}, "pcie": {"bandwidth_bytes_per_s": 60 * GB}}
FABRIC_WIRES = {"local": {"bandwidth_bytes_per_s": 500 * GB}, "optical": {"bandwidth_bytes_per_s": 5 * GB}}
DRAGONFLY = {
    "kind": "dragonfly", "nodes_per_router": 1, "routers_per_group": 2, "global_links_per_router": 3,
    "link": "local", "global_link": "optical",
}  # fmt: skip
FABRICS: tuple[dict[str, Any], ...] = (
    {"kind": "single_switch"},
    {"kind": "fat_tree", "nodes_per_leaf": 2, "oversubscription": 3.0},
    {"kind": "fat_tree", "nodes_per_leaf": 1, "routing": "ecmp", "spines": 3},
    {"kind": "rail_optimised", "nodes_per_leaf": 2, "oversubscription": 2.0},
    {"kind": "rail_optimised", "nodes_per_leaf": 2, "routing": "rail_aligned"},
    {"kind": "rail_only"},
    {"kind": "rail_only", "nodes_per_leaf": 2, "spines": 2, "seed": 3},
    DRAGONFLY,
)


def nodes_of_two(fabric: dict[str, Any], nodes: int = 6, **changes: Any) -> Cluster:
    """Machines of two GPUs on an NVSwitch, each with its own card."""
    wiring = [{"from": "gpu*", "to": "nvswitch", "link": "nvlink"}, {"from": "nic*", "to": "gpu*", "link": "pcie"}]
    links = WIRES | (FABRIC_WIRES if fabric["kind"] == "dragonfly" else {})
    fields = {"name": "x", "gpu": GPU, "nodes": nodes, "gpus_per_node": 2, "links": links, "wiring": wiring}
    nic = {"per_node": 2, "bandwidth_bytes_per_s": 50 * GB}
    return build_cluster(ClusterSpec.model_validate({**fields, "nic": nic, "fabric": fabric, **changes}))


def torus(*shape: int) -> Cluster:
    fabric = {"kind": "torus", "shape": list(shape), "link": "ici"}
    links = {"ici": {"bandwidth_bytes_per_s": 50 * GB}}
    nodes = int(np.prod(shape))
    fields = {"name": "x", "gpu": GPU, "nodes": nodes, "gpus_per_node": 1, "links": links, "fabric": fabric}
    return build_cluster(ClusterSpec.model_validate(fields))


def carried_bytes_per_s(wanted: Cluster, senders: list[int], receivers: list[int], weight_F: np.ndarray) -> float:
    """The most that the fixed paths carry, if pairs send in proportion to their weights."""
    src, dst = np.repeat(senders, len(receivers)), np.tile(receivers, len(senders))
    path_FH = wanted.paths(src, dst)
    row, hop = np.nonzero(path_FH >= 0)
    load_K = np.bincount(path_FH[row, hop], weights=weight_F[row], minlength=wanted.num_links)
    used = load_K > 0
    return float((wanted.bandwidth_bytes_per_s_K[used] / load_K[used]).min() * weight_F.sum())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FABRICS), st.data())
def test_fixed_paths_carry_at_most_the_smallest_cut(fabric: dict[str, Any], data: st.DataObject) -> None:
    faults = data.draw(st.sampled_from([[], [{"nic": "n1.nic0"}], [{"nic": "n2.nic1", "capacity": 0.5}, {"node": 4}]]))
    wanted = nodes_of_two(fabric, faults=faults)
    side = data.draw(st.lists(st.sampled_from("ab-"), min_size=wanted.num_gpus, max_size=wanted.num_gpus))
    senders, receivers = ([rank for rank, name in enumerate(side) if name == end] for end in "ab")
    assume(senders and receivers)
    weight_F = np.random.default_rng(data.draw(st.integers(0, 99))).exponential(size=len(senders) * len(receivers))
    cut = wanted.bisection_bytes_per_s(senders, receivers)
    assert carried_bytes_per_s(wanted, senders, receivers, weight_F) <= cut * (1 + 1e-9)


@settings(max_examples=30, deadline=None)
@given(st.sampled_from(FABRICS), st.integers(0, 11), st.integers(0, 11))
def test_no_path_is_wider_than_the_cut_between_its_ends(fabric: dict[str, Any], src: int, dst: int) -> None:
    assume(src != dst)
    wanted = nodes_of_two(fabric)
    assert wanted.path_bandwidth_bytes_per_s([src], [dst])[0] <= wanted.bisection_bytes_per_s([src], [dst]) * (1 + 1e-9)


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(FABRICS), st.data())
def test_a_fault_never_widens_a_cut(fabric: dict[str, Any], data: st.DataObject) -> None:
    whole = nodes_of_two(fabric)
    link = whole.link_name(data.draw(st.integers(0, whole.num_links - 1)))
    capacity = data.draw(st.sampled_from([0.0, 0.3]))
    assume(capacity or "nic" in link)
    hurt = nodes_of_two(fabric, faults=[{"link": link, "capacity": capacity}])
    halves = range(6), range(6, 12)
    assert hurt.bisection_bytes_per_s(*halves) <= whole.bisection_bytes_per_s(*halves) * (1 + 1e-9)


def test_spines_cut_as_the_pipe_that_they_share_and_carry_less() -> None:
    pipe = {"kind": "fat_tree", "nodes_per_leaf": 3, "oversubscription": 2.0}
    fluid, hashed = nodes_of_two(pipe), nodes_of_two({**pipe, "routing": "ecmp", "spines": 4})
    halves = list(range(6)), list(range(6, 12))
    assert fluid.bisection_bytes_per_s(*halves) == pytest.approx(6 * 50 * GB / 2)
    assert hashed.bisection_bytes_per_s(*halves) == pytest.approx(6 * 50 * GB / 2)
    even = np.ones(36)
    assert carried_bytes_per_s(fluid, *halves, even) == pytest.approx(6 * 50 * GB / 2)
    assert carried_bytes_per_s(hashed, *halves, even) < 6 * 50 * GB / 2


@pytest.mark.parametrize("shape", [(4,), (4, 3), (6, 2), (4, 4, 2)])
def test_halves_of_a_torus_are_joined_by_two_wires_for_each_ring(shape: tuple[int, ...]) -> None:
    wanted = torus(*shape)
    half = wanted.num_gpus // 2
    rings = wanted.num_gpus // shape[0]
    cut = wanted.bisection_bytes_per_s(range(half), range(half, 2 * half))
    assert cut == pytest.approx(2 * rings * 50 * GB)


@pytest.mark.parametrize("groups", [2, 3, 4, 7])
def test_groups_of_a_dragonfly_are_joined_by_the_ports_they_deal_out(groups: int) -> None:
    wanted = nodes_of_two(DRAGONFLY, nodes=2 * groups)
    left = groups // 2
    cables = left * (groups - left) * (2 * 3 // (groups - 1))
    split = 4 * left
    cut = wanted.bisection_bytes_per_s(range(split), range(split, wanted.num_gpus))
    assert cut == pytest.approx(cables * 5 * GB)


def test_what_one_gpu_sends_to_another_rail_fits_through_the_cards_of_its_node() -> None:
    wanted = nodes_of_two({"kind": "rail_only"})
    assert wanted.bisection_bytes_per_s([0], [3]) == pytest.approx(2 * 50 * GB), "over both cards and both NVSwitches"
    assert wanted.path_bandwidth_bytes_per_s([0], [3])[0] == pytest.approx(50 * GB)
    assert wanted.bisection_bytes_per_s(range(2), range(2, 12)) == pytest.approx(2 * 50 * GB)


def test_the_halves_of_a_hybrid_cube_are_joined_by_six_nvlinks_the_sockets_and_two_cards() -> None:
    cube = mp.load("fastermoe-johnny-16xv100", {"cluster": "dgx-1-v100"}).cluster
    one = build_cluster(ClusterSpec.model_validate(dict(cube.spec) | {"nodes": 1}))
    width = 6 * 25e9 * 0.9 + 19.2e9 * 0.7 + 2 * 12.5e9 * 0.93
    assert one.bisection_bytes_per_s(range(4), range(4, 8)) == pytest.approx(width)
