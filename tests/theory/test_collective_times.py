"""Exchanges of equal shares on one switch and on two tiers take what alpha-beta formulas say: latencies + bytes / pace.

Letters: G members, B nodes with L of them each, S bytes of one member; a and z seconds of a message inside a node and
between nodes, C and N the usable bytes/s of NVLink and of a network card, h and g seconds for which a message keeps
either busy beyond its bytes, M bytes/s of copies in memory.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import lru_cache
from math import log2
from typing import Any, NamedTuple

import numpy as np
import pytest

from moeplan import catalogue, menu
from moeplan.compiler.compile_plan import compile_plan
from moeplan.cost.cost_model import CostModel
from moeplan.domain.cluster import Cluster
from moeplan.domain.plan import Plan
from moeplan.domain.program import Exchange
from moeplan.domain.scenario import Scenario
from moeplan.network.expand import expand
from moeplan.simulator.simulate import simulate

SIZE_BYTES = 48e9
NVLINK, NIC = 0.70 * 450e9, 0.96 * 50e9
START_S, INSIDE_S, BETWEEN_S, GAP_S = 9e-6, 0.9e-6, 2 * 0.5e-6 + 2 * 0.6e-6 + 5e-6, 1e-6
"""Of an exchange; NVLink twice; PCIe and a card at each end, and the message's overhead. Switches take next to no time
here.
"""


class Shape(NamedTuple):
    """The letters of the formulas."""

    G: int
    B: int
    L: int
    S: float
    a: float
    z: float
    C: float
    N: float
    h: float
    g: float
    M: float


Formula = Callable[[Shape], float]


@lru_cache
def scenario(nodes: int, gpus: int) -> Scenario:
    """H100 machines on rails without latency in the switches; a short Mixtral."""
    changes: dict[str, Any] = {
        "cluster.nodes": nodes, "cluster.gpus_per_node": gpus, "cluster.nic.per_node": gpus,
        "cluster.fabric.latency": "0.001 ns", "workload.global_batch": 48,
    }  # fmt: skip
    found = catalogue.load("mixtral-8x7b-64xh100", changes=changes)
    return replace(found, model=found.model.model_copy(update={"layers": found.model.layers[:1]}))


def seconds(exchange: Exchange, cluster: Cluster) -> float:
    """The waves one after another: delay, copies, and the busiest link's bytes (and gaps) over its capacity."""
    pattern, total = expand(exchange, cluster), 0.0
    for phase, copy_s_per_byte in enumerate(pattern.copy_s_per_byte_P.tolist()):
        now = pattern.phase_F == phase
        total += float(pattern.delay_s_F[now].max(initial=0.0)) + copy_s_per_byte * exchange.size_bytes
        row, hop = np.nonzero(pattern.paths_FH[now] >= 0)
        bytes_F = pattern.share_F[now] * exchange.size_bytes + pattern.extra_bytes_F[now]
        load_K = np.bincount(pattern.paths_FH[now][row, hop], weights=bytes_F[row], minlength=cluster.num_links)
        total += float((load_K / cluster.bandwidth_bytes_per_s_K).max())
    return total


def exchange(name: str, operation: str, members: list[int], reach_GB: np.ndarray | None = None) -> Exchange:
    return Exchange(
        kind="dispatch", operation=operation, algorithm=name, groups_NG=np.array([members]), size_bytes=SIZE_BYTES,
        reach_GB=reach_GB,
    )  # fmt: skip


def shape(cluster: Cluster, *, nodes: int, local: int) -> Shape:
    return Shape(
        G=nodes * local, B=nodes, L=local, S=SIZE_BYTES, a=INSIDE_S, z=BETWEEN_S, C=NVLINK, N=NIC, h=0.0, g=GAP_S,
        M=cluster.gpu.copy_bytes_per_s,
    )  # fmt: skip


def depth(places: int) -> int:
    """Of the deeper of two trees, counted by walking up from every place."""
    parents = menu.load("collectives", "tree", "parents")(places)

    def steps(parent: list[int], at: int) -> int:
        return 0 if at == 0 else 1 + steps(parent, parent[at])

    return max(steps(parent.tolist(), at) for parent in parents for at in range(places))


def near(s: Shape, share: float, messages: int = 1) -> float:
    """Seconds of a wave in which the busiest port inside a node has `share` of the bytes."""
    return s.a + share * s.S / s.C + messages * s.h


def far(s: Shape, share: float, messages: int = 1) -> float:
    """Seconds of a wave in which the busiest card has `share` of the bytes."""
    return s.z + share * s.S / s.N + messages * s.g


def forwarded(s: Shape, cards_s: float) -> float:
    """What comes over cards goes on in the node meanwhile, where each member gets (L - 1) / L of all."""
    return s.a + max(cards_s, s.z + (s.L - 1) / s.L * s.S / s.C)


# ---- one switch

FLAT: dict[tuple[str, str], Formula] = {
    ("linear", "all_to_all"): lambda s: near(s, (s.G - 1) / s.G, s.G - 1),
    ("pairwise_rounds", "all_to_all"): lambda s: (s.G - 1) * near(s, 1 / s.G),
    ("scheduled", "all_to_all"): lambda s: (s.G - 1) * near(s, 1 / s.G),
    ("ring", "all_to_all"): lambda s: (s.G - 1) * near(s, 1 / 2),
    ("tp_coordinated", "all_to_all"): lambda s: near(s, s.G - 1),
    ("ring", "all_gather"): lambda s: (s.G - 1) * near(s, 1 / s.G),
    ("ring", "reduce_scatter"): lambda s: (s.G - 1) * near(s, 1 / s.G),
    ("ring", "all_reduce"): lambda s: 2 * (s.G - 1) * near(s, 1 / s.G),
    ("ring", "broadcast"): lambda s: (s.G - 2) * s.a + near(s, 1),
    ("direct", "all_gather"): lambda s: near(s, (s.G - 1) / s.G),
    ("direct", "reduce_scatter"): lambda s: near(s, (s.G - 1) / s.G),
    ("direct", "all_reduce"): lambda s: 2 * near(s, (s.G - 1) / s.G),
    ("direct", "broadcast"): lambda s: near(s, s.G - 1),
    ("recursive", "all_gather"): lambda s: log2(s.G) * s.a + (s.G - 1) / s.G * s.S / s.C,
    ("recursive", "reduce_scatter"): lambda s: log2(s.G) * s.a + (s.G - 1) / s.G * s.S / s.C,
    ("recursive", "all_reduce"): lambda s: 2 * (log2(s.G) * s.a + (s.G - 1) / s.G * s.S / s.C),
    ("recursive", "broadcast"): lambda s: 2 * (log2(s.G) * s.a + (s.G - 1) / s.G * s.S / s.C),
    ("tree", "all_reduce"): lambda s: 2 * (depth(s.G) * s.a + s.S / s.C),
    ("tree", "broadcast"): lambda s: depth(s.G) * s.a + s.S / s.C,
}


@pytest.mark.parametrize("members", [3, 4, 6, 8])
@pytest.mark.parametrize(("name", "operation"), FLAT)
def test_on_one_switch(name: str, operation: str, members: int) -> None:
    cluster = scenario(1, 8).cluster
    asked = exchange(name, operation, list(range(8 - members, 8)))
    if menu.load("collectives", name, "applies")(asked.groups_NG, cluster):
        expected = FLAT[name, operation](shape(cluster, nodes=1, local=members))
        assert seconds(asked, cluster) == pytest.approx(START_S + expected, rel=1e-9)


# ---- two tiers, each member with a card of its own


def rings(s: Shape, share: float, *, steps: int, messages: int) -> float:
    """Seconds in which L rings carry `share` together: a card has one of them, NVLink the others."""
    return steps * s.z + max(share * s.S / s.L / s.N + messages * s.g, share * (s.L - 1) / s.L * s.S / s.C)


def inside(s: Shape) -> float:
    """1 / L to each of the other members of a node."""
    return near(s, (s.L - 1) / s.L)


def halved(s: Shape) -> float:
    """Halves inside the node, what is left of them between nodes."""
    return log2(s.L) * s.a + (1 - 1 / s.L) * s.S / s.C + log2(s.B) * (s.z + s.g) + (1 / s.L - 1 / s.G) * s.S / s.N


def to_leader(s: Shape) -> float:
    """All that L - 1 members have for others, into one port, or out of it."""
    return near(s, (s.L - 1) * (s.G - 1) / s.G)


TIERS: dict[tuple[str, str], Formula] = {
    ("linear", "all_to_all"): lambda s: far(s, (s.G - s.L) / s.G, s.G - s.L),
    ("grouped_pairwise", "all_to_all"): lambda s: near(s, (s.L - 1) / s.G) + (s.B - 1) * far(s, s.L / s.G, s.L),
    ("pairwise_rounds", "all_to_all"): lambda s: (s.L - 1) * near(s, 1 / s.G) + (s.G - s.L) * far(s, 1 / s.G),
    ("scheduled", "all_to_all"): lambda s: (s.G - s.L) * far(s, 1 / s.G),
    ("ring", "all_to_all"): lambda s: rings(s, (s.G - 1) / 2, steps=s.G - 1, messages=s.G - 1),
    ("two_stage", "all_to_all"): lambda s: (
        inside(s) + far(s, (s.B - 1) / s.B, s.B - 1) + ((s.L - 1) / s.L + (s.B - 1) / s.B) * s.S / s.M
    ),
    ("two_dh", "all_to_all"): lambda s: inside(s) + far(s, (s.B - 1) / s.B, s.B - 1) + 2 * s.S / s.M,
    ("rail_aligned", "all_to_all"): lambda s: inside(s) + far(s, (s.B - 1) / s.B, s.G - s.L),
    ("leader_gather", "all_to_all"): lambda s: (
        2 * to_leader(s) + far(s, s.L * (s.G - s.L) / s.G, s.B - 1) + 2 * s.L * (s.G - 1) / s.G * s.S / s.M
    ),
    ("tp_coordinated", "all_to_all"): lambda s: far(s, (s.B - 1) / s.B, s.B - 1) + near(s, s.L - 1),
    ("node_dedup", "all_to_all"): lambda s: forwarded(s, far(s, (s.B - 1) / s.B, s.B - 1)),
    ("ring", "all_gather"): lambda s: rings(s, (s.G - 1) / s.G, steps=s.G - 1, messages=s.G - 1),
    ("ring", "all_reduce"): lambda s: rings(s, 2 * (s.G - 1) / s.G, steps=2 * s.G - 2, messages=2 * s.G - 2),
    ("ring", "broadcast"): lambda s: rings(s, 1, steps=s.G - 1, messages=s.G - 1),
    ("direct", "all_reduce"): lambda s: 2 * far(s, (s.G - s.L) / s.G, s.G - s.L),
    ("direct", "broadcast"): lambda s: far(s, s.G - s.L, s.G - s.L),
    ("recursive", "all_gather"): halved,
    ("recursive", "reduce_scatter"): halved,
    ("recursive", "all_reduce"): lambda s: 2 * halved(s),
    ("hierarchical", "all_reduce"): lambda s: 2 * inside(s) + 2 * (s.B - 1) * far(s, 1 / s.G),
    ("hierarchical", "all_gather"): lambda s: inside(s) + (s.B - 1) * far(s, 1 / s.G),
    ("hierarchical", "reduce_scatter"): lambda s: inside(s) + (s.B - 1) * far(s, 1 / s.G),
    ("hierarchical", "broadcast"): lambda s: 2 * inside(s) + (s.B - 2) * s.z + far(s, 1 / s.L, s.B - 1),
    ("tree", "all_reduce"): lambda s: 2 * rings(s, 1, steps=depth(s.B) + s.L - 1, messages=2),
    ("tree", "broadcast"): lambda s: rings(s, 1, steps=depth(s.B) + s.L, messages=2),
}


NEIGHBOURS_DIFFER = ("pairwise_rounds", (3, 4))
"""Of 12 members i + r is in the same node for some and not for others: no round is of one tier."""


@pytest.mark.parametrize("sizes", [(4, 4), (4, 2), (3, 4), (2, 4)], ids=str)
@pytest.mark.parametrize(("name", "operation"), TIERS)
def test_on_two_tiers(name: str, operation: str, sizes: tuple[int, int]) -> None:
    nodes, local = sizes
    cluster = scenario(4, 4).cluster
    asked = exchange(name, operation, [4 * node + index for node in range(nodes) for index in range(local)])
    if menu.load("collectives", name, "applies")(asked.groups_NG, cluster) and (name, sizes) != NEIGHBOURS_DIFFER:
        expected = TIERS[name, operation](shape(cluster, nodes=nodes, local=local))
        assert seconds(asked, cluster) == pytest.approx(START_S + expected, rel=1e-9)


@pytest.mark.parametrize("members", [[0, 4, 8, 12], [2, 7, 9]], ids=str)
@pytest.mark.parametrize("name", ["linear", "grouped_pairwise", "pairwise_rounds", "scheduled"])
def test_a_member_in_each_node_is_one_tier_of_cards(name: str, members: list[int]) -> None:
    cluster = scenario(4, 4).cluster
    card = shape(cluster, nodes=1, local=len(members))._replace(a=BETWEEN_S, C=NIC, h=GAP_S)
    formula = FLAT["pairwise_rounds" if name != "linear" else name, "all_to_all"]
    assert seconds(exchange(name, "all_to_all", members), cluster) == pytest.approx(START_S + formula(card), rel=1e-9)


@pytest.mark.parametrize("reach", [0.05, 0.15, 0.25])
def test_counting_copies_once_saves_what_goes_between_nodes(reach: float) -> None:
    """`reach`: what part of its bytes a member has for each node, counted once, instead of 1 / B."""
    cluster = scenario(4, 4).cluster
    s = shape(cluster, nodes=4, local=4)
    table = np.full((s.G, s.B), reach)
    found = {name: seconds(exchange(name, "all_to_all", list(range(16)), table), cluster) for name in COUNTING}
    first = far(s, (s.B - 1) * reach, s.B - 1)
    assert found["node_dedup"] == pytest.approx(START_S + forwarded(s, first), rel=1e-9)
    gathered = near(s, (s.L - 1) * s.B * reach)
    assert found["tp_coordinated"] == pytest.approx(START_S + first + gathered, rel=1e-9)


COUNTING = [
    name for name in menu.names("collectives") if getattr(menu.module("collectives", name), "COUNTS_COPIES", False)
]


def test_every_dish_and_operation_has_a_formula_on_each_machine_that_it_is_for() -> None:
    cluster = scenario(4, 4).cluster
    for name in menu.names("collectives"):
        dish = menu.module("collectives", name)
        for operation in dish.OPERATIONS:
            is_flat = dish.applies(np.arange(4)[None], cluster)
            assert (name, operation) in FLAT or (name, operation) in TIERS
            assert is_flat == any(each == name for each, _ in FLAT)


# ---- and the simulator says the same


@pytest.mark.parametrize(
    "name", [each for each in menu.names("collectives") if "all_to_all" in menu.module("collectives", each).OPERATIONS]
)
def test_the_simulator_takes_as_long_as_the_waves_one_by_one(name: str) -> None:
    given = scenario(2, 4)
    plan = Plan(dp=8, ep=8, stages=(1,), all_to_all=name, overlap_gradients=False)
    program = compile_plan(plan, given)
    timeline = simulate(program, CostModel(gpu=given.cluster.gpu))
    chosen = [task for task in range(len(program.tasks)) if program.kind(task) in ("dispatch", "combine")]
    found = {program.meetings[int(program.tasks.unit_T[task])].exchange for task in chosen}
    expected = [seconds(program.exchanges[each], given.cluster) for each in found]
    took = (timeline.end_s_T - timeline.start_s_T)[chosen].max()
    assert [took] * len(expected) == pytest.approx(expected, rel=1e-9)
