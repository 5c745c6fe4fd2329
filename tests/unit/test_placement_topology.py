"""Placement by the cluster's shape: seconds as a slow program finds them, placements as brute force does."""

import itertools
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pulp
import pytest

from moeplan.domain.placement import LayerPlacement, PlacementProblem, TokenPrices
from moeplan.domain.routing import TokenSets
from moeplan.errors import PlanError
from moeplan.placers._bounds import token_bounds
from moeplan.placers._makespan import NodeProblem, optimal_routing, routed, value_s
from moeplan.placers._node_bound import busiest_node_bound
from moeplan.placers._node_ilp import Limits, integer_slots
from moeplan.placers._node_search import annealed, estimate_s, first_slots
from moeplan.placers._nodes import place
from moeplan.placers._visits import grouped, visits, visits_bound

PRICES = TokenPrices(gpus_per_node=2, compute_s=0.147e-6, nic_s=0.159e-6, nvlink_s=0.045e-6, exchange_factor=3.0)


def random_problem(
    seed: int, *, experts: int, slots: int, nodes: int = 2, gpus: int = 2, split: str = "optimal", one_row: bool = False
) -> PlacementProblem:
    rng = np.random.default_rng(seed)
    prices = replace(
        PRICES, gpus_per_node=gpus, compute_s=float(rng.choice([0.05, 0.147, 2.0])) * 1e-6,
        nvlink_s=float(rng.choice([0.0, 0.045, 1.0])) * 1e-6,
    )  # fmt: skip
    tokens_SE = np.round(np.exp(rng.normal(5, 1.0, (1 if one_row else nodes, experts))))
    return PlacementProblem(
        tokens_SE=tokens_SE, num_gpus=nodes * gpus, slots=slots, split="even" if split == "even" else "optimal",
        prices=prices,
    )  # fmt: skip


def replicas(problem: PlacementProblem, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Any legal replicas: each expert once in turn, then more where there is room."""
    rng = np.random.default_rng(seed)
    room = np.full(problem.num_gpus, problem.slots_per_gpu)
    held = [(expert, expert % problem.num_gpus) for expert in range(problem.num_experts)]
    for _, gpu in held:
        room[gpu] -= 1
    for expert, gpu in rng.permutation(list(np.ndindex(problem.num_experts, problem.num_gpus))).tolist():
        if len(held) < problem.slots and room[gpu] > 0 and (expert, gpu) not in held:
            held.append((expert, gpu))
            room[gpu] -= 1
    return np.array([expert for expert, _ in held]), np.array([gpu for _, gpu in held])


def slow_value_s(problem: PlacementProblem, placement: LayerPlacement) -> float:
    """One copy's way after the other."""
    prices = problem.prices
    assert prices is not None
    size = prices.gpus_per_node
    nodes = problem.num_gpus // size
    into, out, load = [0.0] * nodes, [0.0] * nodes, [0.0] * problem.num_gpus
    for source, (expert, gpu) in itertools.product(
        range(nodes), enumerate_replicas(placement)
    ):  # fmt: skip
        replica = expert[1]
        row = source if len(problem.tokens_SE) > 1 else 0
        tokens = problem.tokens_SE[row][expert[0]] / (1 if len(problem.tokens_SE) > 1 else nodes)
        copies = tokens * placement.share_SR[source if len(placement.share_SR) > 1 else 0][replica]
        load[gpu] += copies
        if gpu // size != source:
            into[gpu // size] += copies
            out[source] += copies
    over_nvlink = max(load) * (size - 1) / size
    exchange = max(max(into + out) * prices.nic_s, over_nvlink * prices.nvlink_s)
    return prices.exchange_factor * exchange + max(load) * prices.compute_s


def enumerate_replicas(placement: LayerPlacement) -> list[tuple[tuple[int, int], int]]:
    pairs = zip(placement.expert_R.tolist(), placement.gpu_R.tolist(), strict=True)
    return [((expert, number), gpu) for number, (expert, gpu) in enumerate(pairs)]


def flow_value_s(problem: PlacementProblem, expert_R: np.ndarray, gpu_R: np.ndarray) -> float:
    """The best routing as a flow from each source node to each replica, by CBC."""
    nodes = NodeProblem.of(problem)
    count, size = nodes.num_nodes, nodes.gpus_per_node
    lp = pulp.LpProblem("routing", pulp.LpMinimize)
    flow = {
        (n, r): pulp.LpVariable(f"f{n}_{r}", 0) for n in range(count) for r in range(len(expert_R))
    }  # fmt: skip
    exchange, full = pulp.LpVariable("exchange", 0), pulp.LpVariable("full", 0)
    lp += exchange + nodes.compute_s * 1e6 * full
    for n, e in np.ndindex(count, nodes.num_experts):
        lp += pulp.lpSum(flow[n, r] for r in range(len(expert_R)) if expert_R[r] == e) == nodes.tokens_NE[n, e]
    for m in range(count):
        here = [r for r in range(len(gpu_R)) if gpu_R[r] // size == m]
        away = [r for r in range(len(gpu_R)) if gpu_R[r] // size != m]
        lp += exchange >= nodes.nic_s * 1e6 * pulp.lpSum(flow[n, r] for n in range(count) if n != m for r in here)
        lp += exchange >= nodes.nic_s * 1e6 * pulp.lpSum(flow[m, r] for r in away)
    for g in range(problem.num_gpus):
        lp += full >= pulp.lpSum(flow[n, r] for n in range(count) for r in range(len(gpu_R)) if gpu_R[r] == g)
    lp += exchange >= nodes.nvlink_s * 1e6 * full
    lp.solve(pulp.PULP_CBC_CMD(msg=False))
    return float(pulp.value(lp.objective)) * 1e-6


def all_replicas(problem: PlacementProblem) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """All legal placements of two nodes with two GPUs, without those that only exchange a node's GPUs."""
    subsets = [
        each for size in range(problem.slots_per_gpu + 1)
        for each in itertools.combinations(range(problem.num_experts), size)
    ]  # fmt: skip
    pairs = list(itertools.combinations_with_replacement(subsets, 2))
    for first, second in itertools.product(pairs, pairs):
        on_gpus = [*first, *second]
        held = [(expert, gpu) for gpu, group in enumerate(on_gpus) for expert in group]
        if len(held) == problem.slots and {expert for expert, _ in held} == set(range(problem.num_experts)):
            yield np.array([expert for expert, _ in held]), np.array([gpu for _, gpu in held])


@pytest.mark.parametrize("one_row", [False, True])
@pytest.mark.parametrize("split", ["even", "optimal"])
def test_a_layer_takes_what_its_copies_take_one_by_one(split: str, one_row: bool) -> None:
    for seed in range(30):
        problem = random_problem(seed, experts=7, slots=12, nodes=3, split=split, one_row=one_row)
        placement = routed(problem, *replicas(problem, seed))
        assert value_s(problem, placement) == pytest.approx(slow_value_s(problem, placement), rel=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # PuLP announces its version 4
def test_the_best_routing_is_that_of_flows_by_another_solver() -> None:
    for seed in range(25):
        problem = random_problem(seed, experts=5, slots=10, nodes=3)
        expert_R, gpu_R = replicas(problem, seed)
        found = value_s(problem, optimal_routing(problem, expert_R, gpu_R))
        assert found == pytest.approx(flow_value_s(problem, expert_R, gpu_R), rel=1e-6)


def test_the_best_routing_is_never_worse_than_an_even_one() -> None:
    for seed in range(50):
        problem = random_problem(seed, experts=6, slots=14, nodes=4)
        expert_R, gpu_R = replicas(problem, seed)
        even = value_s(problem, LayerPlacement.even(expert_R, gpu_R))
        assert value_s(problem, optimal_routing(problem, expert_R, gpu_R)) <= even * (1 + 1e-9)


@pytest.mark.parametrize("split", ["even", "optimal"])
def test_no_placement_of_a_tiny_layer_is_below_the_bound_and_all_are_found(split: str) -> None:
    best = 0
    for seed in range(100):
        experts = 4 if seed % 10 == 0 else 2 + seed % 2
        slots = 4 if experts == 4 else min(experts + seed % 3, 4 + seed % 4 // 3)
        problem = random_problem(seed, experts=experts, slots=slots, split=split)
        least = min(value_s(problem, routed(problem, *each)) for each in all_replicas(problem))
        found = place(problem, rng=np.random.default_rng(0), time_limit_s=10)
        assert found.lower_bound <= least * (1 + 1e-9), seed
        assert found.value >= least * (1 - 1e-9), seed
        best += found.value <= least * (1 + 1e-6)
    assert best == 100


@pytest.mark.parametrize("split", ["even", "optimal"])
def test_each_bound_holds_for_any_limits_that_the_best_placement_keeps(split: str) -> None:
    """Bounds may use that better placements keep limits; so those of the best one itself are the hardest test."""
    for seed in range(15):
        problem = random_problem(seed, experts=3, slots=3 + seed % 3, split=split)
        nodes = NodeProblem.of(problem)
        least = min(value_s(problem, routed(problem, *each)) for each in all_replicas(problem))
        full = max(tokens for tokens, _ in token_bounds(problem))
        limits = Limits.below(nodes, least, busiest_node=0.0, fullest_gpu=full)
        busy = busiest_node_bound(nodes, limits, is_even=split == "even", rounds=300)
        assert nodes.seconds(max(busy, 0.0), full) <= least * (1 + 1e-5)
        _, bound_s = integer_slots(nodes, limits, gap=0.0, time_limit_s=10)
        assert bound_s <= least * (1 + 1e-5)


def test_the_node_of_an_expert_as_large_as_a_node_is_bounded_with_what_stands_beside_it() -> None:
    """One of 12 experts, on 3 nodes of 4 GPUs, has a third of all; three more stand beside it wherever it is."""
    rng, prices = np.random.default_rng(0), replace(PRICES, gpus_per_node=4)
    for _ in range(20):
        tokens_NE = rng.lognormal(0, 0.6, (3, 12))
        tokens_NE[:, 0] *= 6
        foreign_NE = tokens_NE.sum(axis=0) - tokens_NE
        beside_N = np.sort(foreign_NE[:, 1:], axis=1)[:, :3].sum(axis=1)
        nodes = NodeProblem.of(PlacementProblem(tokens_SE=tokens_NE, num_gpus=12, slots=12, prices=prices))
        limits = Limits.below(nodes, 1e9, busiest_node=0.0, fullest_gpu=float(tokens_NE.sum()))
        busy = busiest_node_bound(nodes, limits, is_even=False, rounds=10)
        assert busy >= (foreign_NE[:, 0] + beside_N).min() * (1 - 1e-6)


@pytest.mark.parametrize("split", ["even", "optimal"])
def test_the_same_seed_gives_the_same_placement(split: str) -> None:
    problem = random_problem(3, experts=8, slots=12, nodes=3, split=split)
    one, two = (place(problem, rng=np.random.default_rng(5), time_limit_s=60) for _ in range(2))
    assert one.placement.gpu_R.tobytes() == two.placement.gpu_R.tobytes()
    assert one.placement.share_SR.tobytes() == two.placement.share_SR.tobytes()
    assert one.lower_bound == two.lower_bound


@pytest.mark.parametrize("split", ["even", "optimal"])
def test_annealing_books_what_it_moves(split: str) -> None:
    """After many moves slots are still legal, no copy is lost, and all experts stand somewhere."""
    problem = random_problem(1, experts=20, slots=31, nodes=5, split=split)
    nodes = NodeProblem.of(problem)
    slots = annealed(nodes, first_slots(nodes), seed=2, steps=100_000, is_even=split == "even")
    held = slots.expert_K >= 0
    load_E = np.bincount(slots.expert_K[held], weights=slots.load_K[held], minlength=20)
    assert load_E == pytest.approx(problem.tokens_E, rel=1e-6)
    assert held.sum() == problem.slots
    in_node = np.unique(slots.node_K[held] * 20 + slots.expert_K[held], return_counts=True)[1]
    assert in_node.max() <= nodes.gpus_per_node
    assert estimate_s(nodes, slots, is_even=split == "even") <= estimate_s(
        nodes, first_slots(nodes), is_even=split == "even"
    )


def test_nodes_with_much_traffic_of_their_own_keep_it() -> None:
    """Two nodes that use different experts: each gets its own, and nothing crosses."""
    tokens_SE = np.array([[10.0, 10.0, 0.0, 0.0], [0.0, 0.0, 10.0, 10.0]])
    problem = PlacementProblem(tokens_SE=tokens_SE, num_gpus=4, slots=4, split="optimal", prices=PRICES)
    found = place(problem, rng=np.random.default_rng(0), time_limit_s=5)
    assert found.value == pytest.approx(10 * PRICES.compute_s + 3 * 5 * PRICES.nvlink_s)
    assert found.gap < 1e-6


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prices": None}, "prices: none are given"),
        ({"prices": replace(PRICES, gpus_per_node=3)}, "does not divide 4 GPUs"),
        ({"tokens_SE": np.ones((3, 4))}, "3 rows are not those of 2 nodes"),
    ],
)
def test_what_has_no_nodes_is_refused(change: dict[str, object], message: str) -> None:
    problem = replace(random_problem(0, experts=4, slots=4), **change)  # type: ignore[arg-type]
    with pytest.raises(PlanError, match=message):
        place(problem, rng=np.random.default_rng(0), time_limit_s=1)


def token_sets(seed: int, *, experts: int = 8, width: int = 3, tokens: int = 60) -> TokenSets:
    rng = np.random.default_rng(seed)
    favour = np.exp(rng.normal(0, 1, experts))
    rows = [rng.choice(experts, width, replace=False, p=favour / favour.sum()) for _ in range(tokens)]
    return TokenSets.of(np.array(rows))


def all_groups(experts: int, nodes: int) -> Iterator[np.ndarray]:
    """All ways to put as many experts on each node."""
    for node_E in itertools.product(range(nodes), repeat=experts):
        if set(np.bincount(node_E, minlength=nodes).tolist()) == {experts // nodes}:
            yield np.array(node_E)


def test_tokens_visit_the_nodes_of_their_experts_once() -> None:
    sets = TokenSets.of(np.array([[0, 1, 2], [0, 1, 2], [1, 2, 3]]))
    assert visits(sets, np.array([0, 0, 1, 1])) == 2
    assert visits(sets, np.array([1, 0, 0, 0])) == pytest.approx((2 + 2 + 1) / 3)


def test_grouping_is_as_good_as_brute_force_and_no_group_is_below_the_bound() -> None:
    for seed in range(12):
        sets = token_sets(seed)
        bound = visits_bound(sets, num_experts=8, num_nodes=2)
        least = min(visits(sets, node_E) for node_E in all_groups(8, 2))
        assert bound <= least + 1e-12
        found = grouped(sets, num_experts=8, num_nodes=2, rng=np.random.default_rng(0), most_load=2.0)
        assert visits(sets, found) == pytest.approx(least)


def test_grouping_keeps_nodes_balanced_where_that_can_be() -> None:
    sets = token_sets(0, experts=32, tokens=2000)
    node_E = grouped(sets, num_experts=32, num_nodes=4, rng=np.random.default_rng(0), most_load=1.05)
    load_N = np.bincount(node_E[sets.experts_UK].ravel(), np.repeat(sets.count_U, 3), 4)
    assert np.bincount(node_E).tolist() == [8, 8, 8, 8]
    assert load_N.max() <= 1.05 * load_N.mean() * (1 + 1e-9)
    assert visits_bound(sets, num_experts=32, num_nodes=4) <= visits(sets, node_E)


def test_groups_that_cannot_be_are_refused() -> None:
    with pytest.raises(PlanError, match="3 do not divide 8 experts"):
        grouped(token_sets(0), num_experts=8, num_nodes=3, rng=np.random.default_rng(0))
    with pytest.raises(PlanError, match="experts 0 to 3"):
        grouped(token_sets(0), num_experts=4, num_nodes=2, rng=np.random.default_rng(0))
