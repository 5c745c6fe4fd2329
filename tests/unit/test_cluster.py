"""Laws of a cluster: every path is a walk from sender to receiver, capacities add up, symmetric machines look alike."""

from __future__ import annotations

import pickle
import subprocess
import sys
from typing import Any

import networkx as nx
import numpy as np
import pytest
from _racks import (
    GPU,
    LINKS,
    NIC,
    SWITCHED,
    TORUS,
    all_pairs,
    cluster,
    clusters,
    names_on,
    shapes,
    spec,
    torus,
    two_sockets,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from moeplan.domain.cluster import Cluster, Gpu
from moeplan.errors import CatalogueError


@settings(max_examples=60, deadline=None)
@given(clusters())
def test_every_path_is_a_walk_without_loops_from_sender_to_receiver(wanted: Cluster) -> None:
    graph = wanted.graph()
    edges = {edge["link"]: ends for *ends, edge in graph.edges(data=True)}
    assert sorted(edges) == list(range(wanted.num_links)), "each directed link is one edge"
    src, dst = all_pairs(wanted)
    for a, b, row in zip(src.tolist(), dst.tolist(), wanted.paths(src, dst).tolist(), strict=True):
        links = [link for link in row if link >= 0]
        assert row == links + [-1] * (len(row) - len(links))
        walk = [wanted.gpu_name(a)] + [edges[link][1] for link in links]
        assert [edges[link][0] for link in links] == walk[:-1]
        assert walk[-1] == wanted.gpu_name(b)
        assert len(set(walk)) == len(walk)


@settings(max_examples=40, deadline=None)
@given(clusters(), st.data())
def test_a_path_is_the_same_alone_and_among_others(wanted: Cluster, data: st.DataObject) -> None:
    src, dst = all_pairs(wanted)
    paths, latency_s = wanted.paths(src, dst), wanted.path_latency_s(src, dst)
    row = data.draw(st.integers(0, len(src) - 1))
    path = wanted.path(int(src[row]), int(dst[row]))
    assert path == tuple(link for link in paths[row].tolist() if link >= 0)
    assert latency_s[row] == pytest.approx(wanted.latency_s_K[list(path)].sum())


@settings(max_examples=40, deadline=None)
@given(clusters())
def test_both_directions_of_a_wire_are_equally_wide(wanted: Cluster) -> None:
    width = {wanted.link_ends(link): wanted.bandwidth_bytes_per_s_K[link] for link in range(wanted.num_links)}
    assert all(width[b, a] == rate for (a, b), rate in width.items())


@settings(max_examples=40, deadline=None)
@given(clusters())
def test_the_tier_says_what_the_path_crosses(wanted: Cluster) -> None:
    src, dst = all_pairs(wanted)
    tier, path_FH = wanted.tier(src, dst), wanted.paths(src, dst)
    kind_FH = np.array([*wanted.link_kinds, ""])[np.where(path_FH >= 0, wanted.kind_K[path_FH], -1)]
    assert np.array_equal(tier == 0, src == dst)
    assert np.array_equal(tier <= 1, wanted.node_of(src) == wanted.node_of(dst))
    if not wanted.spec.is_torus:
        assert np.array_equal(tier >= 2, (kind_FH == "nic").any(axis=1))
        assert np.array_equal(tier == 3, ((kind_FH == "leaf") | (kind_FH == "optical")).any(axis=1))


@pytest.mark.parametrize("kind", ["single_switch", "fat_tree", "rail_optimised"])
@given(st.permutations(range(4)))
def test_relabelling_nodes_does_not_change_path_bandwidths(kind: str, order: list[int]) -> None:
    leaf = {} if kind == "single_switch" else {"nodes_per_leaf": 1, "oversubscription": 4.0}
    wanted = cluster(fabric={"kind": kind, **leaf})
    src, dst = all_pairs(wanted)
    relabelled = np.array(order).repeat(4) * 4 + np.tile(np.arange(4), 4)
    before = wanted.path_bandwidth_bytes_per_s(src, dst)
    assert np.array_equal(before, wanted.path_bandwidth_bytes_per_s(relabelled[src], relabelled[dst]))


def test_gpus_of_a_symmetric_rack_have_equal_capacities() -> None:
    wanted = cluster(fabric={"kind": "rail_optimised", "nodes_per_leaf": 2})
    for direction in (0, 1):
        totals: dict[str, float] = {}
        for link, rate in enumerate(wanted.bandwidth_bytes_per_s_K):
            end = wanted.link_ends(link)[direction]
            totals[end] = totals.get(end, 0.0) + rate
        assert len({round(total) for name, total in totals.items() if ".gpu" in name}) == 1
        assert len({round(total) for name, total in totals.items() if name.startswith("leaf")}) == 1


def test_hop_counts_of_a_rail_optimised_rack() -> None:
    wanted = cluster(fabric={"kind": "rail_optimised", "nodes_per_leaf": 2})
    assert [len(wanted.path(0, dst)) for dst in (0, 1, 4, 5, 8, 9)] == [0, 2, 4, 6, 6, 6]
    assert names_on(wanted, 0, 5) == ["n0.gpu0", "n0.nic0", "leaf0.0", "spine", "leaf0.1", "n1.nic1", "n1.gpu1"]
    assert wanted.tier([0] * 5, [0, 1, 4, 5, 8]).tolist() == [0, 1, 2, 3, 3]
    assert wanted.tier_names == ("same GPU", "same node", "same leaf", "across")


def test_hop_counts_of_a_fat_tree() -> None:
    wanted = cluster(fabric={"kind": "fat_tree", "nodes_per_leaf": 2})
    assert [len(wanted.path(0, dst)) for dst in (1, 5, 9)] == [2, 4, 6]


def test_a_leaf_pipe_is_the_sum_of_its_nics_divided_by_the_oversubscription() -> None:
    tree = cluster(nodes=5, fabric={"kind": "fat_tree", "nodes_per_leaf": 2, "oversubscription": 2.0})
    rails = cluster(nodes=5, fabric={"kind": "rail_optimised", "nodes_per_leaf": 2, "oversubscription": 2.0})
    assert tree.bandwidth_bytes_per_s_K[-6:].tolist() == pytest.approx([180e9, 180e9, 180e9, 180e9, 90e9, 90e9])
    assert rails.bandwidth_bytes_per_s_K[-24:].tolist() == pytest.approx([45e9] * 16 + [22.5e9] * 8)


def test_a_single_leaf_has_no_uplinks() -> None:
    wanted = cluster(fabric={"kind": "fat_tree", "nodes_per_leaf": 8, "oversubscription": 2.0})
    assert "leaf" not in wanted.link_kinds
    assert wanted.tier([0], [15]).tolist() == [2]


def test_efficiency_and_parallel_wires_multiply_the_bandwidth() -> None:
    links = {"nvlink": {"bandwidth_bytes_per_s": 25e9, "efficiency": 0.8}}
    wiring = [
        {"from": "gpu0", "to": "gpu1", "link": "nvlink", "count": 2},
        {"from": "gpu1", "to": "gpu0", "link": "nvlink"},
    ]
    wanted = cluster(nodes=1, gpus_per_node=2, links=links, wiring=wiring, nic=None, fabric=None)
    assert wanted.bandwidth_bytes_per_s_K.tolist() == pytest.approx([60e9, 60e9])


def test_a_path_between_nodes_pays_two_cards_and_every_switch() -> None:
    same_leaf, across = cluster(), cluster(fabric={"kind": "fat_tree", "nodes_per_leaf": 1, "latency_s": 2e-7})
    assert same_leaf.path_latency_s([0], [4])[0] == pytest.approx(2 * 5e-7 + 2 * 6e-7 + 2e-7)
    assert across.path_latency_s([0], [4])[0] == pytest.approx(2 * 5e-7 + 2 * 6e-7 + 3 * 2e-7)


def test_the_message_overhead_is_the_cards_between_nodes_and_the_wires_inside() -> None:
    links = {**LINKS, "nvlink": {"bandwidth_bytes_per_s": 450e9, "message_overhead_s": 1e-6}}
    wanted = cluster(links=links)
    assert wanted.message_overhead_s == 5e-6
    assert wanted.path_overhead_s([0, 0, 0], [0, 1, 4]).tolist() == [0.0, 1e-6, 5e-6]


def test_gpus_on_two_sockets_talk_over_the_link_between_them() -> None:
    wanted = two_sockets()
    assert names_on(wanted, 0, 4) == ["n0.gpu0", "n0.socket0", "n0.socket1", "n0.gpu4"]
    assert names_on(wanted, 0, 1) == ["n0.gpu0", "n0.socket0", "n0.gpu1"]
    assert "n1.socket0" in names_on(wanted, 0, 15)


def test_gpus_that_share_a_card_share_its_link() -> None:
    wanted = two_sockets()
    cards = {
        next(link for link in wanted.path(gpu, 8) if wanted.link_name(link) == "n0.nic0 -> switch") for gpu in range(8)
    }
    assert len(cards) == 1


def test_an_equally_near_card_with_the_gpus_own_number_is_taken() -> None:
    wiring = [{"from": "gpu*", "to": "plx", "link": "pcie"}, {"from": "nic*", "to": "plx", "link": "pcie"}]
    own = cluster(links={"pcie": LINKS["pcie"]}, wiring=wiring)
    shared = cluster(links={"pcie": LINKS["pcie"]}, wiring=wiring, nic={**NIC, "per_node": 2})
    assert own.wiring is not None
    assert shared.wiring is not None
    assert own.wiring.nic_G.tolist() == [0, 1, 2, 3]
    assert shared.wiring.nic_G.tolist() == [0, 1, 0, 1]


def test_a_gpu_relays_only_where_no_switch_offers_a_way() -> None:
    ring = [{"from": f"gpu{g}", "to": f"gpu{(g + 1) % 4}", "link": "nvlink"} for g in range(4)]
    host = [{"from": "gpu*", "to": "host", "link": "pcie"}]
    alone = cluster(nodes=1, links={"nvlink": LINKS["nvlink"]}, wiring=ring, nic=None, fabric=None)
    hosted = cluster(nodes=1, wiring=ring + host, nic=None, fabric=None)
    assert names_on(alone, 0, 2) == ["n0.gpu0", "n0.gpu1", "n0.gpu2"]
    assert names_on(hosted, 0, 2) == ["n0.gpu0", "n0.host", "n0.gpu2"]


def test_inside_a_node_the_way_back_is_the_same_way() -> None:
    wanted = two_sockets(nodes=1)
    src, dst = all_pairs(wanted)
    for a, b in zip(src.tolist(), dst.tolist(), strict=True):
        assert names_on(wanted, a, b) == names_on(wanted, b, a)[::-1]


@settings(max_examples=40, deadline=None)
@given(shapes)
def test_distances_in_a_torus_are_manhattan_with_wrap_around(shape: list[int]) -> None:
    wanted = torus(*shape)
    src, dst = all_pairs(wanted)
    ahead = (np.array(np.unravel_index(dst, shape)) - np.array(np.unravel_index(src, shape))) % np.array(shape)[:, None]
    expected = np.minimum(ahead, np.array(shape)[:, None] - ahead).sum(axis=0)
    assert np.array_equal((wanted.paths(src, dst) >= 0).sum(axis=1), expected)


def test_a_torus_path_follows_the_dimensions_in_order_and_breaks_ties_forward() -> None:
    wanted = torus(4, 5)
    assert names_on(wanted, 0, 12) == ["n0.gpu0", "n5.gpu0", "n10.gpu0", "n11.gpu0", "n12.gpu0"]
    assert names_on(wanted, 0, 4) == ["n0.gpu0", "n4.gpu0"]
    assert len(torus(300).path(0, 150)) == 150


def test_a_torus_axis_of_two_has_one_wire() -> None:
    assert torus(2).num_links == 2
    assert torus(2, 2, 2).num_links == 24
    assert torus(1, 1).num_links == 0


def test_the_cut_between_two_nodes_is_all_their_cards() -> None:
    assert cluster().bisection_bytes_per_s(range(4), range(4, 8)) == pytest.approx(4 * 45e9)
    halves = cluster(fabric={"kind": "fat_tree", "nodes_per_leaf": 2, "oversubscription": 4.0})
    assert halves.bisection_bytes_per_s(range(8), range(8, 16)) == pytest.approx(8 * 45e9 / 4)


def test_the_graph_is_one_piece() -> None:
    graph = cluster(fabric={"kind": "rail_optimised", "nodes_per_leaf": 2}).graph()
    assert nx.is_strongly_connected(graph)
    assert graph.edges["n0.gpu0", "n0.nvswitch"]["kind"] == "nvlink"


def test_a_million_gpus_answer_and_more_links_are_refused() -> None:
    fabric = {"kind": "rail_optimised", "nodes_per_leaf": 32}
    large = cluster(nodes=250_000, fabric=fabric)
    assert large.num_gpus == 10**6
    assert len(large.path(0, 999_999)) == 6
    with pytest.raises(CatalogueError, match=r"at most 20000000 are allowed; use 833333 nodes or fewer"):
        cluster(nodes=10**7, fabric={"kind": "single_switch"})


def test_a_cluster_is_read_only_equal_by_its_spec_and_can_be_sent_to_another_process() -> None:
    wanted = cluster()
    with pytest.raises(ValueError, match="read-only"):
        wanted.bandwidth_bytes_per_s_K[0] = 1.0
    assert pickle.loads(pickle.dumps(wanted)) == wanted == cluster()
    assert wanted != cluster(nodes=2)
    assert hash(wanted) == hash(cluster())


def test_importing_a_cluster_does_not_import_networkx() -> None:
    code = "import sys, moeplan.domain.cluster; sys.exit('networkx' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"nic": None}, "4 nodes need a nic section"),
        ({"fabric": None}, "4 nodes need a fabric"),
        ({"wiring": SWITCHED[:1], "links": {"nvlink": LINKS["nvlink"]}}, "no wires lead from gpu0 to a nic"),
        ({"wiring": SWITCHED[1:], "links": {"pcie": LINKS["pcie"]}}, "no wires lead from gpu0 to gpu1"),
        ({"wiring": SWITCHED[:1]}, "'pcie' has no effect"),
        ({"wiring": [{"from": "gpu*", "to": "nvswitch", "link": "nvlnk"}]}, "did you mean 'nvlink'"),
        ({"wiring": [{"from": "gpu0-4", "to": "nvswitch", "link": "nvlink"}]}, "a node has 4 gpus"),
        ({"wiring": [{"from": "gpu", "to": "nvswitch", "link": "nvlink"}]}, "a node has 4 gpus"),
        ({"wiring": [{"from": "GPU 0", "to": "nvswitch", "link": "nvlink"}]}, "is not a name"),
        ({"wiring": [{"from": "gpu*", "to": "plx*", "link": "nvlink"}]}, "write a range such as plx0-3"),
        ({"wiring": [{"from": "gpu0-2", "to": "gpu0-1", "link": "nvlink"}]}, "lists of equal length"),
        ({"wiring": [*SWITCHED, {"from": "gpu0", "to": "nvswitch", "link": "pcie"}]}, "to nvswitch by nvlink already"),
        ({"wiring": [*SWITCHED, {"from": "gpu0", "to": "gpu0", "link": "pcie"}]}, "wired to itself"),
        ({"fabric": {"kind": "fat_tree"}}, "a fat_tree needs nodes_per_leaf"),
        ({"fabric": {"kind": "single_switch", "nodes_per_leaf": 4}}, "nodes_per_leaf has no effect on a single_switch"),
        ({"fabric": {"kind": "torus", "shape": [4, 4], "link": "ici"}}, "wiring has no effect on a torus"),
        (
            {**TORUS, "fabric": {"kind": "torus", "shape": [4, 5], "link": "ici"}},
            "4 x 5 is 20 GPUs, but 4 nodes of 4 are 16",
        ),
        ({**TORUS, "fabric": {"kind": "torus", "shape": [4, 4], "link": "icl"}}, "did you mean 'ici'"),
        ({"links": {**LINKS, "nic": LINKS["pcie"]}}, "'nic' is what the fabric's own links are called"),
        ({"links": {"nvlink": {"bandwidth_bytes_per_s": 0.0}}}, "greater than 0"),
        ({"nic": {**NIC, "efficiency": 1.5}}, "less than or equal to 1"),
        ({"nic": {**NIC, "bandwidth": 1.0}}, "Extra inputs are not permitted"),
    ],
)
def test_a_wrong_spec_is_refused_in_words(changes: dict[str, Any], said: str) -> None:
    with pytest.raises(ValidationError) as error:
        spec(**changes)
    assert said in str(error.value)


def test_a_gpu_cannot_use_more_memory_than_it_has() -> None:
    with pytest.raises(ValidationError, match="usable_memory"):
        Gpu(**{name: getattr(GPU, name) for name in GPU.__dataclass_fields__} | {"usable_memory_bytes": 81e9})
