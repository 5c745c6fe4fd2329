"""Experts that tokens choose together share a node, so that a token is sent to few nodes; no node gets much too full.

Grouping by co-activation is the idea of GRACE-MoE and Occult; here the number of visits itself is annealed, without
replicas.
"""

from __future__ import annotations

import numpy as np

from moeplan.domain.placement import Ints, PlacedLayer, PlacementProblem
from moeplan.errors import PlanError
from moeplan.jit import clock_s
from moeplan.placers._seats import placed
from moeplan.placers._visits import grouped

NEEDS_SETS = True


def place(problem: PlacementProblem, *, rng: np.random.Generator, time_limit_s: float) -> PlacedLayer:
    """Nodes by co-activation, then in each node the heaviest expert on the lightest GPU that has room."""
    start_s = clock_s()
    if problem.visits is None:
        raise PlanError(
            "placer co_activation: needs to know which experts tokens choose together; use objective visits"
        )
    size = problem.visits.gpus_per_node
    num_nodes = problem.num_gpus // size
    node_E = grouped(
        problem.visits.sets, num_experts=problem.num_experts, num_nodes=num_nodes, rng=rng,
        most_load=problem.visits.most_load,
    )  # fmt: skip
    gpu_E = np.zeros(problem.num_experts, np.int64)
    for node in range(num_nodes):
        experts = np.flatnonzero(node_E == node)
        gpu_E[experts] = node * size + _dealt(problem, experts, size)
    return placed(problem, np.arange(problem.num_experts), gpu_E, start_s=start_s)


def _dealt(problem: PlacementProblem, experts: Ints, size: int) -> Ints:
    """GPUs of one node, heaviest expert first."""
    found, load_G, room_G = np.zeros(experts.size, np.int64), np.zeros(size), np.full(size, problem.slots_per_gpu)
    for at in np.argsort(-problem.tokens_E[experts], kind="stable"):
        gpu = int(np.where(room_G > 0, load_G, np.inf).argmin())
        found[at], room_G[gpu] = gpu, room_G[gpu] - 1
        load_G[gpu] += problem.tokens_E[experts[at]]
    return found
