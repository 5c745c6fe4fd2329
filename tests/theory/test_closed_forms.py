"""Exchanges that are alone on the wires take latency + bytes / bandwidth, as the papers' formulas have it.

Figures of the machine are written out here: NVLink 0.70 x 450 GB/s and 0.45 us a crossing (two from GPU to GPU),
network cards 0.96 x 50 GB/s, 5 us for each message, and 1 us for which it keeps the card busy beyond its bytes; every
exchange starts in 9 us.
"""

from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from moeplan import catalogue
from moeplan.compiler.compile_plan import compile_plan
from moeplan.cost.cost_model import CostModel
from moeplan.domain.cluster import Cluster
from moeplan.domain.plan import Plan
from moeplan.domain.program import Exchange
from moeplan.domain.scenario import Scenario
from moeplan.simulator.simulate import simulate

NVLINK, NIC = 0.70 * 450e9, 0.96 * 50e9
START_S, INSIDE_S, MESSAGE_S, GAP_S = 9e-6, 0.9e-6, 5e-6, 1e-6
ONE = {"stages": (4,), "overlap_gradients": False}


@lru_cache
def scenario(nodes: int, **changes: Any) -> Scenario:
    """Mixtral with 4 layers on DGX H100; every token's way is even."""
    given = {"cluster": "hgx-h100-rail", "nodes": nodes} | changes
    model = catalogue.scenario_from(model="mixtral-8x7b", global_batch=32, sequence=2048, **given)
    short = model.model.model_copy(update={"layers": model.model.layers[:4]})
    return Scenario(**{name: getattr(model, name) for name in Scenario.__slots__} | {"model": short})


def alone(given: Scenario, kind: str, **options: Any) -> list[tuple[Exchange, float]]:
    """Exchanges of a kind with their seconds."""
    timeline = simulate(compile_plan(Plan(**options), given), CostModel(gpu=given.cluster.gpu))
    program = timeline.program
    chosen = [task for task in range(len(program.tasks)) if program.kind(task) == kind]
    assert chosen
    exchanges = [program.exchanges[program.meetings[program.tasks.unit_T[task]].exchange] for task in chosen]
    return list(zip(exchanges, (timeline.end_s_T - timeline.start_s_T)[chosen].tolist(), strict=True))


def check(found: list[tuple[Exchange, float]], latency_s: float, seconds_per_byte: float) -> None:
    for exchange, seconds in found:
        assert seconds == pytest.approx(START_S + latency_s + exchange.size_bytes * seconds_per_byte, rel=1e-9)


def between_s(cluster: Cluster, groups: np.ndarray) -> float:
    """Latency and overhead of the farthest pair of two nodes' members."""
    source, target = (side.ravel() for side in np.broadcast_arrays(groups[:, :, None], groups[:, None, :]))
    far = source // cluster.gpus_per_node != target // cluster.gpus_per_node
    return float(cluster.path_latency_s(source[far], target[far]).max()) + MESSAGE_S


# ---- rings: (n - 1) latencies and (n - 1) / n of the bytes, twice for an all-reduce


def test_gather_and_scatter_of_tensor_parallelism_inside_a_node() -> None:
    found = alone(scenario(1), "tensor", **ONE, dp=1, tp=8)
    assert {exchange.operation for exchange, _ in found} == {"all_gather", "reduce_scatter"}
    assert {exchange.size_bytes for exchange, _ in found} == {2048 * 4096 * 2.0}
    check(found, 7 * INSIDE_S, 7 / 8 / NVLINK)


@pytest.mark.parametrize("members", [2, 4, 8])
def test_all_reduce_inside_a_node(members: int) -> None:
    tp = 8 // members
    found = alone(scenario(1), "gradients", **ONE, dp=members, tp=tp, etp=tp, zero_dense=0, zero_expert=0)
    assert {exchange.groups_NG.shape for exchange, _ in found} == {(tp, members)}
    check(found, 2 * (members - 1) * INSIDE_S, 2 * (members - 1) / members / NVLINK)


@pytest.mark.parametrize(("zero", "kind", "times"), [(0, "gradients", 2), (1, "gradients", 1), (1, "parameters", 1)])
def test_rings_over_two_nodes_use_every_network_card(zero: int, kind: str, times: int) -> None:
    """Eight rings: each crosses a card of its own, and each GPU's NVLink carries the seven that stay inside."""
    given = scenario(2)
    found = alone(given, kind, **ONE, dp=16, zero_dense=zero, zero_expert=zero)
    pace = min(NIC, NVLINK / 7)
    hop_s = between_s(given.cluster, np.array([[7, 8], [15, 0]]))
    check(found, times * 15 * hop_s, times * 15 / 16 / 8 / pace)


def test_a_ring_with_one_member_in_each_node_goes_at_the_pace_of_a_card() -> None:
    given = scenario(4)
    found = alone(given, "gradients", **ONE, dp=4, tp=8, ep=8, zero_dense=0, zero_expert=0)
    check(found, 6 * (between_s(given.cluster, np.array([[0, 8]])) + GAP_S), 2 * 3 / 4 / NIC)


# ---- all-to-all


def test_linear_all_to_all_inside_a_node() -> None:
    for kind in ("dispatch", "combine"):
        found = alone(scenario(1), kind, **ONE, dp=8, ep=8)
        assert {exchange.size_bytes for exchange, _ in found} == {2 * 2048 * 4096 * 2.0}
        check(found, INSIDE_S, 7 / 8 / NVLINK)


def test_linear_all_to_all_over_two_nodes_waits_for_the_cards() -> None:
    """Two groups, each with four members in each node: half of a rank's bytes leave the node over its own card."""
    given = scenario(2)
    found = alone(given, "dispatch", **ONE, dp=16, ep=8, rank_order="tp-cp-dp-ep-pp")
    assert found[0][0].groups_NG.tolist() == [list(range(0, 16, 2)), list(range(1, 16, 2))]
    check(found, between_s(given.cluster, found[0][0].groups_NG) + 4 * GAP_S, 4 / 8 / NIC)


def test_two_stages_of_an_all_to_all_follow_one_another() -> None:
    """Inside: 3 of 4 parts to the neighbours. Between: half of the bytes, rail to rail."""
    given = scenario(2)
    found = alone(given, "dispatch", **ONE, dp=16, ep=8, rank_order="tp-cp-dp-ep-pp", all_to_all="two_stage")
    rail_s = between_s(given.cluster, np.array([[0, 8]]))
    copies = 1.25 / given.cluster.gpu.copy_bytes_per_s  # the whole buffer, then what is for other nodes
    check(found, INSIDE_S + rail_s + GAP_S, 3 / 4 / NVLINK + 4 / 8 / NIC + copies)


def test_cutting_the_tokens_repeats_the_latency_and_divides_the_bytes() -> None:
    found = alone(scenario(1), "dispatch", **ONE, dp=8, ep=8, overlap_degree=1)
    parts = alone(scenario(1), "dispatch", **ONE, dp=8, ep=8, overlap_degree=4)
    assert len(parts) == 4 * len(found)
    assert parts[0][0].size_bytes == found[0][0].size_bytes / 4
    check(parts[:1], INSIDE_S, 7 / 8 / NVLINK)


# ---- sends


def test_a_send_inside_a_node() -> None:
    found = alone(scenario(1), "send", dp=4, pp=2, stages=(2, 2), overlap_gradients=False)
    assert {exchange.size_bytes for exchange, _ in found} == {2048 * 4096 * 2.0}
    forward = found[: len(found) // 2]  # the last one back meets gradients
    check(forward, INSIDE_S, 1 / NVLINK)


@pytest.mark.parametrize("tp", [1, 4])
def test_a_send_between_nodes_is_divided_over_tensor_ranks(tp: int) -> None:
    given = scenario(2)
    found = alone(given, "send", dp=8 // tp, tp=tp, pp=2, stages=(2, 2))
    assert {exchange.size_bytes for exchange, _ in found} == {2048 * 4096 * 2.0 / tp}
    check(found, between_s(given.cluster, np.array([[0, 8]])) + GAP_S, 1 / NIC)


# ---- overhead of messages inside a node


def test_software_overhead_counts_inside_a_node_where_the_wire_has_one() -> None:
    """Loopback of a host: 2 GB/s, 1 us each way to memory, and 59 us for every message."""
    given = catalogue.load("tiny-moe-2-ranks")
    fp32 = given.choices.precision
    found = alone(given, "dispatch", dp=2, ep=2, stages=(4,), precision=fp32, zero_dense=0, zero_expert=0)
    pairs = found[0][0].share_GG
    busiest = 0.5 if pairs is None else float((pairs * (1 - np.eye(2))).max())
    check(found[:1], 2e-6 + 59e-6 - START_S, busiest / 2e9)
