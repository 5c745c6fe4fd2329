"""Laws of fabrics and their routing: rails, spines, dragonflies, faults, speeds, and how often a cluster repeats."""

from __future__ import annotations

import itertools
import pickle
from collections import Counter
from typing import Any

import networkx as nx
import numpy as np
import pytest
from _racks import (
    LINKS,
    NIC,
    TORUS,
    all_pairs,
    cluster,
    clusters,
    damaged,
    dragonfly,
    names_on,
    spec,
    torus,
    with_faults,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import moeplan as mp
from moeplan.catalogue.citations import citations
from moeplan.domain.cluster import Cluster, build_cluster
from moeplan.domain.fabric import splitmix64
from moeplan.domain.lattice import Dragonfly, Torus
from moeplan.domain.ways import switched_paths, ways_of
from moeplan.errors import CatalogueError

RAILS = {"kind": "rail_optimised", "nodes_per_leaf": 2, "latency_s": 2e-7}


def rails(**changes: Any) -> Cluster:
    """Four machines in two pods of rails."""
    return cluster(fabric={**RAILS, **changes})


def faulty(whole: Cluster, *faults: dict[str, Any]) -> Cluster:
    return build_cluster(with_faults(whole, *faults))


def switches_on(wanted: Cluster, src: int, dst: int) -> list[str]:
    """The switches outside the nodes that a path crosses."""
    return [name for name in names_on(wanted, src, dst) if not name.startswith("n")]


def cards_on(wanted: Cluster, src: int, dst: int) -> list[str]:
    return [name for name in names_on(wanted, src, dst) if ".nic" in name]


# Rails


@pytest.mark.parametrize("leaf", [{}, {"nodes_per_leaf": 2}, {"nodes_per_leaf": 1, "spines": 3, "seed": 5}])
def test_a_rail_only_fabric_never_leads_from_rail_to_rail(leaf: dict[str, Any]) -> None:
    wanted = cluster(nodes=6, fabric={"kind": "rail_only", **leaf})
    for src, dst in itertools.product(range(24), range(24)):
        if src // 4 != dst // 4:
            rail = dst % 4
            assert {card.rsplit("nic", 1)[1] for card in cards_on(wanted, src, dst)} == {str(rail)}
            for name in switches_on(wanted, src, dst):
                assert name.startswith((f"spine{rail}", "leaf"))
                assert not name.startswith("leaf") or name.endswith(f".{rail}")
    outside = nx.DiGraph(wanted.graph())
    outside.remove_nodes_from([name for name in list(outside) if name.startswith("n")])
    pieces = list(nx.weakly_connected_components(outside))
    assert len(pieces) == 4, "the switches of a rail are not joined to those of another"


def test_a_message_changes_rail_at_the_sender_over_nvlink() -> None:
    for wanted in (cluster(fabric={"kind": "rail_only"}), rails(routing="rail_aligned")):
        assert names_on(wanted, 0, 6) == [
            "n0.gpu0", "n0.nvswitch", "n0.gpu2", "n0.nic2", "leaf0.2", "n1.nic2", "n1.gpu2",
        ]  # fmt: skip
        assert wanted.tier([0, 0], [6, 4]).tolist() == [2, 2]


def test_within_a_rail_aligned_routing_is_the_shortest() -> None:
    shortest, aligned = rails(), rails(routing="rail_aligned")
    src, dst = all_pairs(shortest)
    same = src % 4 == dst % 4
    assert np.array_equal(shortest.paths(src[same], dst[same]), aligned.paths(src[same], dst[same]))
    assert (aligned.paths(src, dst) >= 0).sum() != (shortest.paths(src, dst) >= 0).sum()


def test_a_hand_over_goes_over_nvlink_and_not_over_the_host() -> None:
    links = {**LINKS, "host": {"bandwidth_bytes_per_s": 64e9}}
    wiring = [{"from": "gpu*", "to": "nvswitch", "link": "nvlink"}]
    wiring += [{"from": f"{part}{k}", "to": f"plx{k}", "link": "pcie"} for k in range(4) for part in ("gpu", "nic")]
    wiring += [{"from": "plx0-3", "to": "socket", "link": "host"}]
    wanted = cluster(links=links, wiring=wiring, fabric={"kind": "rail_only"})
    assert names_on(wanted, 0, 7)[:5] == ["n0.gpu0", "n0.nvswitch", "n0.gpu3", "n0.plx3", "n0.nic3"]


def test_without_nvlink_a_message_changes_rail_over_the_host_without_a_loop() -> None:
    wiring = [{"from": "gpu*", "to": "host", "link": "pcie"}, {"from": "nic*", "to": "host", "link": "pcie"}]
    wanted = cluster(links={"pcie": LINKS["pcie"]}, wiring=wiring, fabric={"kind": "rail_only"})
    assert names_on(wanted, 0, 7)[:3] == ["n0.gpu0", "n0.host", "n0.nic3"]


def test_a_rail_only_fabric_of_leaves_has_a_spine_for_each_rail() -> None:
    wanted = cluster(fabric={"kind": "rail_only", "nodes_per_leaf": 2, "oversubscription": 2.0})
    assert switches_on(wanted, 1, 13) == ["leaf0.1", "spine1", "leaf1.1"]
    assert wanted.bandwidth_bytes_per_s_K[-1] == pytest.approx(45e9)
    assert wanted.tier([0, 1], [4, 13]).tolist() == [2, 3]


# Spines chosen by a hash


def reference_splitmix64(state: int) -> int:
    z = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return z ^ (z >> 31)


@given(st.integers(0, 2**64 - 1))
def test_the_hash_is_splitmix64(state: int) -> None:
    assert int(splitmix64(np.array([state], dtype=np.uint64))[0]) == reference_splitmix64(state)
    assert reference_splitmix64(0) == 0xE220A8397B1DCDAF


def test_a_flow_takes_the_spine_that_its_seed_and_ends_say() -> None:
    wanted = rails(routing="ecmp", spines=8, seed=7)
    for src, dst in [(0, 5), (5, 0), (3, 12), (15, 2)]:
        spine = reference_splitmix64(reference_splitmix64(7) ^ (src << 32 | dst)) % 8
        assert f"spine{spine}" in names_on(wanted, src, dst)


@pytest.mark.parametrize("kind", ["fat_tree", "rail_optimised", "rail_only"])
def test_the_same_seed_gives_the_same_paths_and_another_gives_others(kind: str) -> None:
    routing = {} if kind == "rail_only" else {"routing": "ecmp"}
    one, same, other = (
        cluster(nodes=8, fabric={"kind": kind, "nodes_per_leaf": 2, "spines": 4, "seed": seed, **routing})
        for seed in (1, 1, 2)
    )
    src, dst = all_pairs(one)
    paths, others = one.paths(src, dst), other.paths(src, dst)
    assert np.array_equal(paths, same.paths(src, dst))
    far = one.tier(src, dst) == 3
    assert np.array_equal((paths != others).any(axis=1) & ~far, np.zeros(len(far), dtype=bool))
    assert (paths != others).any(axis=1)[far].mean() > 0.5
    used = {name for row in np.flatnonzero(far) for name in names_on(one, int(src[row]), int(dst[row]))}
    spines = {name for name in one.graph() if name.startswith("spine")}
    assert spines <= used, "every spine carries something"


def test_the_spines_of_a_hash_are_evenly_used() -> None:
    wanted = cluster(nodes=64, fabric={"kind": "fat_tree", "nodes_per_leaf": 8, "routing": "ecmp", "spines": 8})
    src, dst = all_pairs(wanted)
    links = wanted.paths(src, dst)
    ups = links[(links >= wanted.fabric.first_link) & (links % 2 == 0)]
    counts = np.bincount(ups - wanted.fabric.first_link)[::2]
    assert len(counts) == 8 * 8
    assert 0.85 * counts.mean() < counts.min() < counts.max() < 1.15 * counts.mean()


def test_spines_share_the_width_of_the_pipe() -> None:
    fluid, split = rails(oversubscription=2.0), rails(oversubscription=2.0, routing="ecmp", spines=4)
    assert split.bandwidth_bytes_per_s_K[-64:].reshape(-1, 4, 2).sum(axis=1) == pytest.approx(
        fluid.bandwidth_bytes_per_s_K[-16:].reshape(-1, 2)
    )
    src, dst = all_pairs(fluid)
    assert np.array_equal((split.paths(src, dst) >= 0).sum(axis=1), (fluid.paths(src, dst) >= 0).sum(axis=1))


# Dragonfly


def minimal_hops(wanted: Cluster) -> dict[tuple[str, str], int]:
    """Links between each two routers: the fewest over one global link, by trying all."""
    edges = wanted.graph().edges(data="kind")
    local = {(x, y) for x, y, kind in edges if kind == "local"}
    far = {(x, y) for x, y, kind in edges if kind == "optical"}
    routers = {name for edge in [*local, *far] for name in edge}
    near = {(x, x): 0 for x in routers} | dict.fromkeys(local, 1)
    hops = dict(near)
    for (a, x), (y, b) in itertools.product(near, near):
        if (x, y) in far:
            hops[a, b] = min(hops.get((a, b), 9), near[a, x] + 1 + near[y, b])
    return hops


@pytest.mark.parametrize(("nodes", "routers", "ports"), [(12, 3, 2), (21, 3, 2), (6, 3, 4), (20, 4, 1), (10, 1, 9)])
def test_a_dragonfly_path_is_minimal(nodes: int, routers: int, ports: int) -> None:
    wanted = dragonfly(nodes, routers, ports)
    fewest = minimal_hops(wanted)
    for a, b in itertools.product(range(nodes), range(nodes)):
        if a != b:
            path = switches_on(wanted, 2 * a, 2 * b)
            assert len(path) - 1 == fewest[path[0], path[-1]]
            groups = [name.split(".")[0] for name in path]
            assert len(list(itertools.groupby(groups))) == len(set(groups)) <= 2


@pytest.mark.parametrize(("nodes", "routers", "ports"), [(12, 3, 2), (21, 3, 2), (6, 3, 4), (20, 4, 1), (8, 2, 5)])
def test_a_dragonfly_joins_all_groups_equally_and_no_router_has_too_many_cables(
    nodes: int, routers: int, ports: int
) -> None:
    wanted = dragonfly(nodes, routers, ports)
    fabric = wanted.fabric
    assert isinstance(fabric, Dragonfly)
    cables: Counter[str] = Counter()
    pairs: Counter[tuple[str, str]] = Counter()
    for x, y, edge in wanted.graph().edges(data=True):
        if edge["kind"] == "optical":
            count = round(edge["bandwidth_bytes_per_s"] / 20e9)
            cables[x] += count
            pairs[x.split(".")[0], y.split(".")[0]] += count
    assert max(cables.values()) <= ports
    assert set(pairs.values()) == {routers * ports // (fabric.num_groups - 1)}
    assert len(pairs) == fabric.num_groups * (fabric.num_groups - 1)


def test_latencies_of_a_dragonfly_pay_each_router_once() -> None:
    wanted = dragonfly()
    own, near = wanted.path_latency_s([0, 0], [2, 0])
    assert near == 0
    assert own == pytest.approx(2 * 5e-7 + 2 * 6e-7 + 2 * 3e-7)
    assert wanted.tier([0, 0, 0, 0], [0, 1, 2, 12]).tolist() == [0, 1, 2, 3]
    assert wanted.tier_names[2] == "same group"


def test_too_many_groups_for_the_ports_are_refused() -> None:
    with pytest.raises(ValidationError, match="each of 8 groups needs 7 global links, but has 6; raise"):
        dragonfly(24)
    assert dragonfly(21).num_nodes == 21


# Faults


@settings(max_examples=80, deadline=None)
@given(damaged())
def test_with_faults_every_path_is_a_walk_without_loops_over_links_that_work(both: tuple[Cluster, Cluster]) -> None:
    wanted = both[1]
    edges = {edge["link"]: ends for *ends, edge in wanted.graph().edges(data=True)}
    src, dst = all_pairs(wanted)
    for a, b, row in zip(src.tolist(), dst.tolist(), wanted.paths(src, dst).tolist(), strict=True):
        links = [link for link in row if link >= 0]
        assert row == links + [-1] * (len(row) - len(links))
        walk = [wanted.gpu_name(a)] + [edges[link][1] for link in links]
        assert [edges[link][0] for link in links] == walk[:-1]
        assert walk[-1] == wanted.gpu_name(b)
        assert len(set(walk)) == len(walk)
        nodes = {name.split(".")[0] for name in walk if name.startswith("n")}
        assert wanted.spec.is_torus or nodes <= {walk[0].split(".")[0], walk[-1].split(".")[0]}


@settings(max_examples=40, deadline=None)
@given(damaged(), st.data())
def test_with_faults_a_path_is_the_same_alone_and_among_others(
    both: tuple[Cluster, Cluster], data: st.DataObject
) -> None:
    wanted = both[1]
    src, dst = all_pairs(wanted)
    row = data.draw(st.integers(0, len(src) - 1))
    alone = wanted.path(int(src[row]), int(dst[row]))
    assert alone == tuple(link for link in wanted.paths(src, dst)[row].tolist() if link >= 0)


@settings(max_examples=60, deadline=None)
@given(damaged(capacities=(0.1, 0.5, 0.9)))
def test_a_weaker_link_makes_no_path_wider_and_moves_none(both: tuple[Cluster, Cluster]) -> None:
    whole, weak = both
    if whole.num_nodes == weak.num_nodes:
        src, dst = all_pairs(whole)
        assert np.array_equal(whole.paths(src, dst), weak.paths(src, dst))
        before, after = (each.path_bandwidth_bytes_per_s(src, dst) for each in both)
        assert (after <= before).all()
        assert (weak.bandwidth_bytes_per_s_K <= whole.bandwidth_bytes_per_s_K).all()


@settings(max_examples=40, deadline=None)
@given(clusters())
def test_tables_for_each_nic_say_the_same_as_the_short_way(whole: Cluster) -> None:
    fabric, wiring = whole.fabric, whole.wiring
    if isinstance(fabric, Torus) or whole.ways is not None:
        return
    assert wiring is not None
    ways = ways_of(whole.spec, wiring, np.ones(fabric.first_link, dtype=bool), is_whole=False)
    src, dst = (ranks.astype(np.int32) for ranks in all_pairs(whole))
    assert ways is not None or not fabric.first_link
    assert np.array_equal(
        switched_paths(fabric, wiring, ways, src_F=src, dst_F=dst),
        switched_paths(fabric, wiring, None, src_F=src, dst_F=dst),
    )


def test_the_gpus_of_a_dead_card_take_the_nearest_that_works() -> None:
    wanted = faulty(rails(), {"nic": "n0.nic1"})
    assert names_on(wanted, 1, 5)[:4] == ["n0.gpu1", "n0.nvswitch", "n0.gpu2", "n0.nic2"]
    assert names_on(wanted, 2, 6) == names_on(rails(), 2, 6)
    assert cards_on(wanted, 5, 1) == ["n1.nic1", "n0.nic2"]
    shared = cluster(
        wiring=[{"from": "gpu*", "to": "plx", "link": "pcie"}, {"from": "nic*", "to": "plx", "link": "pcie"}],
        links={"pcie": LINKS["pcie"]},
    )
    one_less = faulty(shared, {"nic": "n0.nic1"})
    assert [cards_on(one_less, gpu, 4)[0] for gpu in range(4)] == ["n0.nic0", "n0.nic2", "n0.nic2", "n0.nic3"]


def test_a_dead_rail_is_avoided_and_a_weak_one_is_kept() -> None:
    dead, weak = faulty(rails(), {"rail": 1}), faulty(rails(), {"rail": 1, "capacity": 0.5})
    src, dst = all_pairs(dead)
    names = {dead.link_name(link) for link in np.unique(dead.paths(src, dst)) if link >= 0}
    assert not [name for name in names if "nic1" in name or "leaf0.1" in name or "leaf1.1" in name]
    assert np.array_equal(weak.paths(src, dst), rails().paths(src, dst))
    assert weak.path_bandwidth_bytes_per_s([1], [5])[0] == pytest.approx(0.5 * 45e9)
    assert weak.bandwidth_bytes_per_s_K[-1] == rails().bandwidth_bytes_per_s_K[-1], "the last leaf is of another rail"


def test_in_a_rail_only_fabric_a_message_for_a_dead_card_changes_rail_at_the_receiver() -> None:
    wanted = faulty(cluster(fabric={"kind": "rail_only"}), {"nic": "n1.nic2"}, {"nic": "n0.nic3"})
    assert cards_on(wanted, 0, 6) == ["n0.nic0", "n1.nic0"], "GPU 2's next card is 3, which the sender lacks"
    assert names_on(wanted, 0, 6)[-2:] == ["n1.nvswitch", "n1.gpu2"]
    assert cards_on(wanted, 8, 6) == ["n2.nic3", "n1.nic3"]


def test_a_dead_uplink_is_gone_round_over_another_rail() -> None:
    wanted = faulty(rails(), {"link": "leaf0.1 -> spine"})
    assert switches_on(wanted, 1, 5) == ["leaf0.1"]
    assert switches_on(wanted, 1, 9) == ["leaf0.2", "spine", "leaf1.1"]
    assert cards_on(wanted, 9, 1) == ["n2.nic1", "n0.nic2"]


def test_a_dead_spine_is_hashed_round() -> None:
    whole = cluster(nodes=8, fabric={"kind": "fat_tree", "nodes_per_leaf": 1, "routing": "ecmp", "spines": 3})
    wanted = faulty(whole, {"switch": "spine1"}, {"link": "leaf0 -> spine2"})
    src, dst = all_pairs(whole)
    spines = {
        (a // 4 == 0 or b // 4 == 0, name)
        for a, b in zip(src.tolist(), dst.tolist(), strict=True)
        for name in names_on(wanted, a, b)
        if name.startswith("spine")
    }
    assert spines == {(True, "spine0"), (False, "spine0"), (False, "spine2")}


def test_two_gpus_whose_wires_fail_meet_over_the_fabric() -> None:
    wanted = faulty(rails(), {"link": "n0.gpu1 -> n0.nvswitch"})
    assert names_on(wanted, 1, 3) == ["n0.gpu1", "n0.nic1", "leaf0.1", "spine", "leaf0.3", "n0.nic3", "n0.gpu3"]
    assert wanted.tier([1], [3]).tolist() == [1]
    assert wanted.path_overhead_s([1, 0], [3, 3]).tolist() == [5e-6, 0.0]


def test_a_damaged_cluster_can_be_sent_to_another_process() -> None:
    wanted = faulty(rails(), {"nic": "n0.nic1"}, {"node": 3})
    copy = pickle.loads(pickle.dumps(wanted))
    assert copy == wanted
    assert hash(copy) == hash(wanted)
    assert np.array_equal(copy.paths(*all_pairs(copy)), wanted.paths(*all_pairs(wanted)))
    assert wanted != rails()


def test_a_node_that_is_lost_leaves_its_place_and_its_numbers() -> None:
    whole = cluster(nodes=5, fabric={"kind": "fat_tree", "nodes_per_leaf": 2, "oversubscription": 2.0})
    wanted = faulty(whole, {"node": "1-2"})
    assert (wanted.num_nodes, wanted.num_gpus) == (3, 12)
    assert [wanted.gpu_name(rank) for rank in (0, 4, 11)] == ["n0.gpu0", "n3.gpu0", "n4.gpu3"]
    assert switches_on(wanted, 0, 4) == ["leaf0", "spine", "leaf1"]
    kept = [name for name in whole.graph().edges if not {"n1", "n2"} & {end.split(".")[0] for end in name}]
    assert set(wanted.graph().edges) == set(kept)
    assert all(
        wanted.graph().edges[edge]["bandwidth_bytes_per_s"] == whole.graph().edges[edge]["bandwidth_bytes_per_s"]
        for edge in kept
    )


def test_a_wire_out_of_order_in_a_torus_or_dragonfly_is_gone_round() -> None:
    ring = faulty(torus(5), {"link": "n1.gpu0 -> n2.gpu0"})
    assert names_on(ring, 1, 2) == [f"n{n}.gpu0" for n in (1, 0, 4, 3, 2)]
    square = faulty(torus(2, 2), {"link": "n0.gpu0 -> n1.gpu0"})
    assert names_on(square, 0, 1) == [f"n{n}.gpu0" for n in (0, 2, 3, 1)]
    whole = dragonfly()
    direct = switches_on(whole, 0, 2)
    around = switches_on(faulty(whole, {"link": " -> ".join(direct)}), 0, 2)
    assert len(direct) == 2
    assert len(around) == 3


def test_a_dead_leaf_takes_its_ports_with_it() -> None:
    wanted = faulty(rails(), {"switch": "leaf0.1"})
    src, dst = all_pairs(wanted)
    names = {name for a, b in zip(src.tolist(), dst.tolist(), strict=True) for name in names_on(wanted, a, b)}
    assert not names & {"leaf0.1", "n0.nic1", "n1.nic1"}
    assert {"leaf1.1", "n2.nic1"} <= names


def test_faults_of_one_link_multiply() -> None:
    wanted = faulty(rails(), {"rail": 1, "capacity": 0.5}, {"nic": "n*.nic*", "capacity": 0.5})
    assert wanted.path_bandwidth_bytes_per_s([1, 0], [5, 4]).tolist() == pytest.approx([0.25 * 45e9, 0.5 * 45e9])


@pytest.mark.parametrize(
    ("whole", "faults", "said"),
    [
        (cluster(), [{"nic": "n2.nic*"}], "faults: no way is left between n2.gpu0 and n0.gpu0"),
        (cluster(), [{"nic": "n0.nic*"}], "or lose the whole node: {node: 0}"),
        (rails(), [{"link": "n0.gpu1 -> n0.nvswitch"}, {"nic": "n0.nic1"}], "between n0.gpu1 and n0.gpu0"),
        (rails(), [{"switch": "spine"}], "no way is left between n2.gpu0 and n0.gpu0"),
        (cluster(fabric={"kind": "rail_only"}), [{"nic": "n0.nic0-1"}, {"nic": "n1.nic2-3"}], "n0.gpu0 and n1.gpu0"),
        (torus(4), [{"link": "n0.gpu0 -> n1.gpu0"}, {"link": "n1.gpu0 -> n2.gpu0"}], "between n1.gpu0 and n0.gpu0"),
        (dragonfly(2, 1, 1), [{"link": "router0.0 -> router1.0"}], "between n1.gpu0 and n0.gpu0"),
        (cluster(nodes=1, nic=None, fabric=None, links={"nvlink": LINKS["nvlink"]},
                 wiring=[{"from": "gpu*", "to": "nvswitch", "link": "nvlink"}]),
         [{"link": "n0.gpu2 -> n0.nvswitch"}], "n0.gpu0 and n0.gpu2; leave some capacity on a link that joins them$"),
        (cluster(), [{"nic": "n9.nic0"}], "faults.0: node '9' is not there; use a number below 4"),
        (cluster(), [{"nic": "n0.nic0", "capacity": 0.5}, {"nic": "n0.nic4"}], "faults.1: .*numbers below 4"),
        (cluster(), [{"nic": "n0.gpu0"}], "'n0.gpu0' is not a NIC; write it as in n0.nic3"),
        (cluster(), [{"nic": "nic0"}], "'nic0' is not a part of a node; write it as in"),
        (cluster(), [{"rail": 0}], "rail has no effect on a fabric without rails; name the cards"),
        (rails(), [{"rail": 4}], "rail '4' is not there; use a number below 4"),
        (cluster(), [{"node": 4}], "node '4' is not there"),
        (cluster(), [{"node": "0-3"}], "all 4 nodes are lost; leave at least one"),
        (cluster(), [{"node": 0}, {"nic": "n0.nic0"}], "nic 'n0.nic0' is only on nodes that are lost; remove it"),
        (cluster(), [{"link": "n0.gpu0"}], "is not a link; write its two ends"),
        (cluster(), [{"link": "n0.gpu0 -> n0.gpu1"}], "is not a wire of a node; its wires are such as"),
        (cluster(), [{"link": "n0.gpu0 -> n1.nvswitch"}], "from node to node, where no wire is"),
        (cluster(), [{"link": "leaf0 -> spine"}], "is not a link of this fabric; its switch has no links"),
        (rails(), [{"link": "leaf0.0 -> leaf0.1"}], "its links are such as leaf0.0 -> spine"),
        (rails(), [{"link": "n0.nic1 -> leaf0.0"}], "n0.nic1 is plugged into leaf0.1"),
        (rails(), [{"switch": "leaf2.0"}], "switch 'leaf2.0' is not there; leaf0.0 to leaf1.3 are"),
        (rails(), [{"switch": "n0.plx"}], "'n0.plx' is not a wire of a node"),
        (torus(4), [{"node": 1}], "a torus cannot lose a node, because its ranks are places"),
        (torus(4), [{"switch": "leaf0"}], "a torus has none; name a link"),
        (torus(4), [{"nic": "n0.nic0"}], "'n0.nic0' is not a NIC"),
        (torus(4), [{"link": "n0.gpu0 -> n2.gpu0"}], "the two GPUs are no neighbours"),
        (torus(4), [{"link": "n0.gpu0 -> n4.gpu0"}], "'n4.gpu0' is not a GPU of this torus"),
    ],
)  # fmt: skip
def test_a_fault_that_cannot_be_is_refused_in_words(whole: Cluster, faults: list[dict[str, Any]], said: str) -> None:
    with pytest.raises(CatalogueError, match=said):
        faulty(whole, *faults)


# Speeds


def test_nodes_may_have_cards_of_other_speeds() -> None:
    wanted = cluster(speeds=[{"nic": "n2-3.nic*", "bandwidth_bytes_per_s": 25e9, "latency_s": 1e-6}])
    assert wanted.path_bandwidth_bytes_per_s([0, 0, 8], [4, 8, 12]).tolist() == pytest.approx([45e9, 22.5e9, 22.5e9])
    assert wanted.path_latency_s([0], [8])[0] - cluster().path_latency_s([0], [8])[0] == pytest.approx(4e-7)
    assert np.array_equal(wanted.paths(*all_pairs(wanted)), cluster().paths(*all_pairs(wanted)))


def test_an_uplink_is_as_wide_as_its_cards_whatever_their_speeds() -> None:
    fabric = {"kind": "fat_tree", "nodes_per_leaf": 2, "oversubscription": 2.0}
    fast = {"nic": "n0.nic*", "bandwidth_bytes_per_s": 100e9}
    wanted = cluster(fabric=fabric, speeds=[fast])
    assert wanted.bandwidth_bytes_per_s_K[-4:].tolist() == pytest.approx([270e9, 270e9, 180e9, 180e9])
    own = cluster(fabric=fabric, speeds=[fast, {"link": "leaf0 -> spine", "bandwidth_bytes_per_s": 10e9}])
    assert own.bandwidth_bytes_per_s_K[-4:].tolist() == pytest.approx([9e9, 9e9, 180e9, 180e9])
    railed = rails(oversubscription=1.0)
    slow = build_cluster(spec(fabric=railed.spec.fabric, speeds=[{"rail": 2, "bandwidth_bytes_per_s": 10e9}]))
    assert slow.path_bandwidth_bytes_per_s([2, 0], [6, 4]).tolist() == pytest.approx([9e9, 45e9])
    assert slow.bandwidth_bytes_per_s_K[-16:-8].tolist() == pytest.approx([90e9] * 4 + [18e9] * 2 + [90e9] * 2)


@settings(max_examples=40, deadline=None)
@given(st.one_of(clusters(), damaged().map(lambda both: both[1])))
def test_a_link_that_cannot_bind_is_as_wide_as_the_cards_below_it(whole: Cluster) -> None:
    graph, binds = whole.graph(), whole.can_bind_K
    below: Counter[str] = Counter()
    for _, b, edge in graph.edges(data=True):
        below[b] += edge["bandwidth_bytes_per_s"] if edge["kind"] == "nic" else 0
    for a, b, edge in graph.edges(data=True):
        if edge["kind"] == "leaf":
            leaf = a if a.startswith("leaf") else b
            assert binds[edge["link"]] == (edge["bandwidth_bytes_per_s"] < below[leaf] * (1 - 1e-6))
        else:
            assert binds[edge["link"]]


# How often a cluster repeats


def assert_repeats(wanted: Cluster, block: int) -> None:
    """Paths that are a block apart have like links, and share them as the first ones do."""
    src, dst = all_pairs(wanted)
    both = (src + block < wanted.num_gpus) & (dst + block < wanted.num_gpus)
    here, there = wanted.paths(src[both], dst[both]), wanted.paths(src[both] + block, dst[both] + block)
    assert here.shape == there.shape
    assert np.array_equal(here >= 0, there >= 0)
    a, b = here[here >= 0], there[there >= 0]
    width = np.where(wanted.can_bind_K, wanted.bandwidth_bytes_per_s_K, np.inf)
    assert np.array_equal(width[a], width[b])
    assert np.array_equal(wanted.latency_s_K[a], wanted.latency_s_K[b])
    assert np.array_equal(wanted.kind_K[a], wanted.kind_K[b])
    pairs = np.unique(np.stack([a, b]), axis=1)
    assert len(np.unique(pairs[0])) == len(np.unique(pairs[1])) == pairs.shape[1], "shared links are shared alike"


@settings(max_examples=80, deadline=None)
@given(st.one_of(clusters(), damaged().map(lambda both: both[1])))
def test_a_cluster_repeats_as_it_says(wanted: Cluster) -> None:
    block = wanted.alike_block
    if block is not None:
        assert 0 < block < wanted.num_gpus
        assert block % wanted.gpus_per_node == 0
        assert_repeats(wanted, block)


TREE = {"kind": "fat_tree", "nodes_per_leaf": 2}


@pytest.mark.parametrize(
    ("wanted", "block"),
    [
        (cluster(), 4),
        (cluster(nodes=1), None),
        (cluster(fabric=TREE), 8),
        (cluster(fabric={**TREE, "nodes_per_leaf": 4}), 4),
        (cluster(nodes=5, fabric=TREE), 8),
        (cluster(nodes=5, fabric={**TREE, "oversubscription": 2.0}), None),
        (cluster(nodes=6, fabric={**TREE, "oversubscription": 2.0}), 8),
        (cluster(fabric={**TREE, "routing": "ecmp", "spines": 2}), None),
        (cluster(fabric={**TREE, "nodes_per_leaf": 4, "routing": "ecmp", "spines": 2}), 4),
        (rails(), 8),
        (rails(nodes_per_leaf=4), 4),
        (rails(nodes_per_leaf=4, routing="ecmp", spines=2), None),
        (cluster(fabric={"kind": "rail_only"}), 4),
        (cluster(fabric={"kind": "rail_only", "nodes_per_leaf": 2, "spines": 2}), None),
        (dragonfly(), 6),
        (dragonfly(3), 2),
        (torus(4, 5), 5),
        (torus(6), 1),
        (faulty(rails(), {"rail": 1}), 8),
        (faulty(rails(), {"rail": 1, "capacity": 0.5}), 8),
        (faulty(rails(), {"nic": "n0.nic1"}), None),
        (faulty(rails(), {"link": "leaf0.1 -> spine"}), None),
        (faulty(rails(), {"switch": "spine", "capacity": 0.1}), 8),
        (faulty(cluster(), {"node": 1}), 4),
        (faulty(cluster(nodes=6, fabric=TREE), {"node": 1}, {"node": 3}, {"node": 5}), 4),
        (faulty(cluster(nodes=6, fabric=TREE), {"node": 1}), None),
        (faulty(cluster(nodes=6), {"nic": "n1.nic0"}, {"nic": "n3.nic0"}, {"nic": "n5.nic0"}), 8),
        (faulty(torus(4, 5), {"link": "n0.gpu0 -> n1.gpu0", "capacity": 0.5}), None),
        (faulty(dragonfly(), {"link": "router0.0 -> router0.1", "capacity": 0.5}), None),
        (faulty(dragonfly(3), {"link": "router0.0 -> router0.1", "capacity": 0.5}), None),
        (faulty(dragonfly(3), {"nic": "n*.nic0", "capacity": 0.5}), 2),
        (cluster(speeds=[{"nic": "n2-3.nic*", "bandwidth_bytes_per_s": 1e9}]), None),
        (cluster(speeds=[{"nic": "n*.nic3", "latency_s": 1e-3}]), 4),
    ],
)
def test_the_block_after_which_a_cluster_repeats(wanted: Cluster, block: int | None) -> None:
    assert wanted.alike_block == block
    if block is not None:
        assert_repeats(wanted, block)


# What a person can set


def test_faults_and_speeds_can_be_set_without_sources() -> None:
    faults = "[{nic: n0.nic3}, {rail: 5, capacity: 50 %}, {node: 7}]"
    speeds = "[{nic: n6.nic*, bandwidth: 200 Gbit/s, latency: 2 us}]"
    changes = {"cluster.faults": faults, "cluster.speeds": speeds}
    scenario = mp.load("mixtral-8x7b-64xh100", changes)
    assert scenario.cluster.num_gpus == 56
    assert scenario.cluster.path_bandwidth_bytes_per_s([0, 5, 0], [8, 13, 48]).tolist() == [48e9, 24e9, 24e9]
    figures = {row.figure: (row.value, row.cite) for row in citations(scenario.document)}
    assert figures["cluster.faults.1.capacity"] == ("50 %", "set by the user")
    again = mp.load(scenario.document)
    assert again.cluster == scenario.cluster
    assert np.array_equal(again.cluster.bandwidth_bytes_per_s_K, scenario.cluster.bandwidth_bytes_per_s_K)


def test_faults_of_a_topology_can_be_taken_back() -> None:
    degraded = {"cluster": "hgx-h100-degraded"}
    assert mp.load("mixtral-8x7b-64xh100", degraded).cluster.num_gpus == 120
    document = mp.load("mixtral-8x7b-64xh100", degraded).document
    with pytest.raises(CatalogueError, match=r"cluster\.faults\.0: node '11' is not there"):
        mp.load(document, {"nodes": 8})
    whole = mp.load(document, {"cluster.faults": "[]", "nodes": 8}).cluster
    assert (whole.num_gpus, whole.alike_block) == (64, 8)


def test_the_fabric_and_its_routing_can_be_set() -> None:
    name = "mixtral-8x7b-64xh100"
    hashed = {"cluster.fabric.routing": "ecmp", "cluster.fabric.spines": 8, "cluster.fabric.seed": 3}
    assert mp.load(name, hashed).cluster.spec.fabric.seed == 3  # type: ignore[union-attr]
    assert mp.load(name, {"cluster.fabric.kind": "rail_only"}).cluster.tier([0], [9]).tolist() == [2]


# Size


@pytest.mark.parametrize(
    "changes",
    [
        {"fabric": {"kind": "rail_only", "nodes_per_leaf": 64}},
        {"fabric": {"kind": "fat_tree", "nodes_per_leaf": 32, "routing": "ecmp", "spines": 16}},
        {"fabric": {"kind": "rail_optimised", "nodes_per_leaf": 32}, "faults": [{"rail": 1}, {"node": 7}]},
        {"fabric": {"kind": "rail_only"}, "faults": [{"nic": "n3.nic2"}]},
        {"fabric": {"kind": "single_switch"}, "speeds": [{"nic": "n0-99999.nic*", "bandwidth_bytes_per_s": 1e9}]},
    ],
)
def test_a_million_gpus_answer_whatever_the_fabric(changes: dict[str, Any]) -> None:
    wanted = cluster(nodes=250_000, **changes)
    assert wanted.num_gpus >= 10**6 - 4
    assert len(wanted.path(1, wanted.num_gpus - 1)) >= 4
    assert wanted.alike_block is None or wanted.alike_block > 0


def test_a_million_gpus_in_a_torus_or_dragonfly_answer_or_are_refused() -> None:
    cube = torus(100, 100, 100)
    assert len(cube.path(0, 505_050)) == 150
    links = {**LINKS, "local": {"bandwidth_bytes_per_s": 25e9}, "optical": {"bandwidth_bytes_per_s": 20e9}}
    fabric = {"kind": "dragonfly", "nodes_per_router": 16, "link": "local", "global_link": "optical"}
    sizes = {"routers_per_group": 32, "global_links_per_router": 16}
    large = cluster(nodes=250_000, links=links, fabric={**fabric, **sizes})
    assert len(large.path(0, 999_999)) <= 7
    dense = {"routers_per_group": 4096, "global_links_per_router": 4096, "nodes_per_router": 1}
    with pytest.raises(CatalogueError, match="at most 20000000 are allowed; use"):
        cluster(nodes=250_000, links=links, fabric={**fabric, **dense})


# What is refused


@pytest.mark.parametrize(
    ("fabric", "said"),
    [
        ({"kind": "fat_tree", "nodes_per_leaf": 2, "routing": "ecmp"}, "routing ecmp needs spines, such as 16"),
        ({"kind": "fat_tree", "nodes_per_leaf": 2, "spines": 2}, "spines has no effect on routing shortest"),
        ({"kind": "fat_tree", "nodes_per_leaf": 2, "seed": 2}, "seed has no effect without spines"),
        ({"kind": "fat_tree", "nodes_per_leaf": 2, "routing": "ecmp", "spines": 1}, "greater than or equal to 2"),
        ({"kind": "fat_tree", "nodes_per_leaf": 2, "routing": "rail_aligned"}, "use shortest or ecmp"),
        ({"kind": "single_switch", "routing": "ecmp"}, "routing ecmp has no effect on a single_switch"),
        ({"kind": "single_switch", "spines": 4}, "spines has no effect on a single_switch"),
        ({"kind": "rail_only", "routing": "shortest"}, "shortest has no effect on a rail_only; use rail_aligned"),
        ({"kind": "rail_only", "oversubscription": 2.0}, "oversubscription has no effect on rails of one switch"),
        ({"kind": "rail_only", "spines": 2}, "spines has no effect on rails of one switch"),
        ({"kind": "dragonfly"}, "a dragonfly needs nodes_per_router, such as 4"),
        ({"kind": "dragonfly", "nodes_per_leaf": 4}, "nodes_per_leaf has no effect on a dragonfly"),
        ({"kind": "dragonfly", "nodes_per_router": 1, "routers_per_group": 2, "global_links_per_router": 1,
          "link": "nvlnk", "global_link": "nvlink"}, "fabric.link: unknown link 'nvlnk'; did you mean 'nvlink'"),
    ],
)  # fmt: skip
def test_a_wrong_fabric_is_refused_in_words(fabric: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as error:
        spec(fabric=fabric)
    assert said in str(error.value)


def test_what_a_torus_or_its_routing_does_not_have_is_refused() -> None:
    shape = {"kind": "torus", "shape": [4, 4], "link": "ici"}
    assert build_cluster(spec(**TORUS, fabric={**shape, "routing": "dimension_order"})).num_gpus == 16
    with pytest.raises(ValidationError, match="routing shortest has no effect on a torus; use dimension_order"):
        spec(**TORUS, fabric={**shape, "routing": "shortest"})


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"faults": [{}]}, "has no place; give exactly one of link, nic, rail, switch, node"),
        ({"faults": [{"nic": "n0.nic0", "rail": 1}]}, "has nic and rail; give exactly one"),
        ({"faults": [{"nic": "n0.nic0", "capacity": 1.0}]}, "capacity 100 % has no effect"),
        ({"faults": [{"node": 0, "capacity": 0.5}]}, "node 0 is lost or it is not"),
        ({"faults": [{"nic": "n0.nic0", "capacity": -0.5}]}, "greater than or equal to 0"),
        ({"speeds": [{"nic": "n0.nic0"}]}, "has no effect without bandwidth or latency"),
        ({"speeds": [{"nic": "n0.nic0", "bandwidth_bytes_per_s": 0.0}]}, "greater than 0"),
        ({"speeds": [{"nic": "n0.nic0", "bandwidth_bytes_per_s": float("nan")}]}, "finite number"),
        ({"speeds": [{"node": 0, "latency_s": 1.0}]}, "Extra inputs are not permitted"),
    ],
)
def test_a_wrong_fault_or_speed_is_refused_in_words(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as error:
        spec(**changes)
    assert said in str(error.value)


def test_the_gap_between_messages_is_the_cards_between_nodes_and_the_wires_inside() -> None:
    links = {**LINKS, "nvlink": {"bandwidth_bytes_per_s": 450e9, "message_gap_s": 2e-9}}
    wanted = cluster(links=links, nic={**NIC, "message_gap_s": 5e-9})
    assert wanted.path_gap_s([0, 0, 0], [0, 1, 4]).tolist() == [0.0, 2e-9, 5e-9]
