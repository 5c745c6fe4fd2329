"""What is alike may be worked out once: classes of flows end as their flows do, batches as nearly as they say."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.catalogue import cluster_from
from moeplan.domain.cluster import Cluster
from moeplan.network import FlowSet, all_to_all, finish_times
from moeplan.network.classes import classes_of
from moeplan.network.matrix import PortTraffic, matrix_finish_times

CLOSE = 1e-9


def flow_set(paths: list[list[int]], sizes: np.ndarray, capacities: np.ndarray, starts: np.ndarray) -> FlowSet:
    return FlowSet(
        capacity_bytes_per_s_K=capacities, link_I=np.array([link for path in paths for link in path], np.int32),
        first_F1=np.concatenate([[0], np.cumsum([len(path) for path in paths])]).astype(np.int64), size_bytes_F=sizes,
        start_s_F=starts,
    )  # fmt: skip


def symmetric(rng: np.random.Generator) -> FlowSet:
    """Some traffic, copied onto links of its own or onto shared ones."""
    links, flows, copies = rng.integers(2, 8), rng.integers(2, 8), rng.integers(2, 6)
    base = [rng.permutation(links)[: rng.integers(1, links)].tolist() for _ in range(flows)]
    shared = rng.integers(0, 2)
    paths = [
        [link + copy * links for link in path] + [copies * links] * shared for copy in range(copies) for path in base
    ]
    capacities = np.concatenate([np.tile(rng.integers(1, 4, links) * 1.0, copies), [rng.integers(1, 9) * 1.0]])
    starts = rng.choice([0.0, 0.0, 1.5], flows)
    return flow_set(paths, np.tile(rng.integers(1, 5, flows) * 1.0, copies), capacities, np.tile(starts, copies))


def asymmetric(rng: np.random.Generator) -> FlowSet:
    """Few kinds of sizes and links, put together by chance."""
    links, flows = rng.integers(2, 10), rng.integers(3, 25)
    paths = [rng.permutation(links)[: rng.integers(1, min(links, 4))].tolist() for _ in range(flows)]
    return flow_set(paths, rng.choice([1.0, 2.0], flows), rng.choice([1.0, 2.0], links), rng.choice([0.0, 1.0], flows))


@pytest.mark.parametrize("make", [symmetric, asymmetric])
@pytest.mark.parametrize("seed", range(4))
def test_classes_end_as_their_flows_do(make, seed: int) -> None:  # type: ignore[no-untyped-def]
    rng = np.random.default_rng(seed)
    for _ in range(100):
        flows = make(rng)
        lumped, apart = finish_times(flows), finish_times(flows, lump=False)
        np.testing.assert_allclose(lumped.finish_s_F, apart.finish_s_F, rtol=CLOSE)


def test_copies_make_no_more_classes() -> None:
    rng = np.random.default_rng(3)
    for _ in range(50):
        flows = symmetric(rng)
        starts = np.zeros(len(flows)) if flows.start_s_F is None else flows.start_s_F
        found = classes_of(
            flows.first_F1, flows.link_I, flows.capacity_bytes_per_s_K, features_F=(flows.size_bytes_F, starts)
        )
        assert found is not None
        for size, start, number in zip(flows.size_bytes_F, starts, found.class_F, strict=True):
            assert (size, start) == (flows.size_bytes_F[found.flow_C[number]], starts[found.flow_C[number]])
        loads = np.repeat(np.bincount(found.class_F), np.diff(found.first_C1))
        assert loads.sum() <= len(flows.link_I)
        assert len(found.flow_C) <= len(flows) / 2


def rails(nodes: int, oversubscription: float) -> Cluster:
    changes = {"fabric.nodes_per_leaf": 4, "fabric.oversubscription": oversubscription}
    return cluster_from("hgx-h100-rail", nodes=nodes, changes=changes)


@pytest.mark.parametrize("oversubscription", [1.0, 2.0])
@pytest.mark.parametrize("nodes", [4, 8, 6])
def test_an_even_exchange_is_the_same_from_a_few_pairs(nodes: int, oversubscription: float) -> None:
    cluster = rails(nodes, oversubscription)
    few = all_to_all(cluster, size_bytes=2.0**26)
    gpus = cluster.num_gpus
    listed = all_to_all(cluster, traffic_bytes_GG=np.full((gpus, gpus), 2.0**26 / gpus))
    assert few.time_s == pytest.approx(listed.time_s, rel=CLOSE)
    assert few.bound_s == pytest.approx(listed.bound_s, rel=CLOSE)
    assert few.cut_bound_s == pytest.approx(listed.cut_bound_s, rel=CLOSE)
    assert few.tier_bytes == pytest.approx(listed.tier_bytes)
    assert few.count_F.sum() == listed.count_F.sum() == gpus * (gpus - 1)
    assert (few.finish_s_F * few.count_F).sum() == pytest.approx(listed.finish_s_F.sum(), rel=CLOSE)


def skewed(gpus: int, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    popular = (1.0 + rng.permutation(gpus)) ** -0.5
    return 1e6 * rng.uniform(0.5, 1.5, (gpus, gpus)) * popular


@pytest.mark.parametrize("oversubscription", [1.0, 2.0])
def test_batches_are_as_near_as_the_benchmark_says(oversubscription: float) -> None:
    cluster = rails(8, oversubscription)
    traffic = skewed(64, 1)
    exact = all_to_all(cluster, traffic_bytes_GG=traffic)
    batched = all_to_all(cluster, traffic_bytes_GG=traffic, fidelity="batched", tolerance=0.01)
    off = np.abs(batched.finish_s_F / exact.finish_s_F - 1)
    assert abs(batched.time_s / exact.time_s - 1) < 1e-4
    assert 0 < off.mean() < 5e-4
    assert off.max() < 0.02


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(0, 10**6), st.integers(2, 24), st.integers(1, 4))
def test_no_port_or_pipe_carries_its_bytes_faster_than_it_can(seed: int, gpus: int, leaves: int) -> None:
    rng = np.random.default_rng(seed)
    size_B = np.bincount(rng.integers(0, min(leaves, gpus), gpus))
    first_B1 = np.concatenate([[0], np.cumsum(size_B[size_B > 0])])
    table = rng.uniform(0, 1, (gpus, gpus)) * (rng.random((gpus, gpus)) < 0.8)
    np.fill_diagonal(table, 0.0)
    traffic = PortTraffic(
        bytes_GG=table, out_bytes_per_s_G=rng.uniform(1, 2, gpus), in_bytes_per_s_G=rng.uniform(1, 2, gpus),
        first_B1=first_B1, up_bytes_per_s_B=rng.uniform(1, 5, len(first_B1) - 1),
        down_bytes_per_s_B=rng.uniform(1, 5, len(first_B1) - 1),
    )  # fmt: skip
    ends = matrix_finish_times(traffic, tolerance=0.02).finish_s_GG
    assert ((ends > 0) == (table > 0)).all()
    leaf = traffic.leaf_G
    far = table * (leaf[:, None] != leaf)
    for g in range(gpus):
        assert ends[g].max() >= table[g].sum() / traffic.out_bytes_per_s_G[g] * 0.98
        assert ends[:, g].max() >= table[:, g].sum() / traffic.in_bytes_per_s_G[g] * 0.98
    for b in range(len(first_B1) - 1):
        assert ends[leaf == b].max(initial=0.0) >= far[leaf == b].sum() / traffic.up_bytes_per_s_B[b] * 0.98
