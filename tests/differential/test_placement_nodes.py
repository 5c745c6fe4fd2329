"""Placements where nodes count against all that there are, for tiny layers: by nodes that tokens visit.

Axes of arrays: E expert, K choice of a token, N node, U different sets of experts.
"""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from moeplan.domain.placement import PlacementProblem, TokenVisits
from moeplan.domain.routing import TokenSets
from moeplan.placers import ilp

CLOSE = 1e-6


def random_visits(rng: np.random.Generator) -> PlacementProblem:
    """Up to 6 experts, as many on each of 2 or 3 nodes of 1 or 2 GPUs, and tokens that choose 2 or 3 of them."""
    shapes = [(2, 1, 1), (2, 1, 2), (2, 1, 3), (3, 1, 1), (3, 1, 2), (2, 2, 1), (3, 2, 1)]
    num_nodes, size, each = shapes[rng.integers(len(shapes))]
    num_experts = num_nodes * size * each
    popularity_E = np.exp(rng.normal(0, 1, num_experts))
    top_k = min(int(rng.integers(2, 4)), num_experts)
    ids_NK = np.array([
        rng.choice(num_experts, top_k, replace=False, p=popularity_E / popularity_E.sum()) for _ in range(30)
    ])  # fmt: skip
    visits = TokenVisits(sets=TokenSets.of(ids_NK), gpus_per_node=size, most_load=float(rng.choice([1.05, 1.3, 9.0])))
    tokens_E = np.bincount(ids_NK.ravel(), minlength=num_experts)
    return PlacementProblem(tokens_SE=tokens_E, num_gpus=num_nodes * size, slots=num_experts, visits=visits)


def fewest(problem: PlacementProblem) -> tuple[float, float]:
    """The least load of a node above what is allowed, and with it the fewest nodes that a token visits on average."""
    visits = problem.visits
    assert visits is not None
    num_nodes = problem.num_gpus // visits.gpus_per_node
    most = visits.most_load * problem.tokens_E.sum() / num_nodes
    found = []
    for node_E in itertools.product(range(num_nodes), repeat=problem.num_experts):
        if np.ptp(np.bincount(node_E, minlength=num_nodes)) == 0:
            load_N = np.bincount(node_E, problem.tokens_E, num_nodes)
            visited_U = [len({node_E[e] for e in row}) for row in visits.sets.experts_UK.tolist()]
            over = max(0.0, float(load_N.max()) - most * (1 + 1e-12))
            found.append((over, float(np.average(visited_U, weights=visits.sets.count_U))))
    return min(found)


def test_200_tiny_layers_are_grouped_so_that_tokens_visit_the_fewest_nodes() -> None:
    rng = np.random.default_rng(4)
    for number in range(200):
        problem = random_visits(rng)
        over, least = fewest(problem)
        placed = ilp.place(problem, rng=np.random.default_rng(number), time_limit_s=30)
        assert placed.value == pytest.approx(least, rel=CLOSE), (number, problem)
        assert over > 0 or placed.lower_bound <= least * (1 + 1e-9), (number, problem)
