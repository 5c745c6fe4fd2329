"""What experts of the fullest place take at least, against placements drawn at random, with replicas and without."""

from __future__ import annotations

import numpy as np
import pytest

import moeplan as mp
from moeplan.compiler.works import work
from moeplan.cost.cost_model import CostModel
from moeplan.domain.plan import Plan
from moeplan.domain.program import Floats, Pass
from moeplan.planners._anywhere import LeastExperts

ROUNDING = 1e-9


def placed_rows(rng: np.random.Generator, tokens_E: Floats, places: int, *, replicas: bool) -> Floats:
    """rows_GE: whole tokens of each expert on each place: equal places without replicas, else shares at random."""
    experts = tokens_E.size
    share_GE = np.zeros((places, experts))
    if replicas:
        stands_GE = rng.random((places, experts)) < rng.uniform(0.2, 1.0)
        stands_GE[rng.integers(places, size=experts), np.arange(experts)] = True
        share_GE = stands_GE * rng.uniform(0.1, 1.0, (places, experts))
        if rng.random() < 0.7:  # most placements even loads out
            for _ in range(50):
                share_GE /= share_GE.sum(axis=0)
                load_G = share_GE @ tokens_E
                share_GE *= (load_G.mean() / np.maximum(load_G, 1.0))[:, None] ** 0.5
        share_GE /= share_GE.sum(axis=0)
    else:
        share_GE[rng.permutation(np.arange(experts) % places), np.arange(experts)] = 1.0
    return np.rint(share_GE * tokens_E)


@pytest.mark.parametrize("replicas", [False, True])
@pytest.mark.parametrize("parts", [1, 2, 4])
def test_no_placement_has_a_fullest_place_that_is_faster_than_said(replicas: bool, parts: int) -> None:
    scenario, rng = mp.load("mixtral-8x22b-128xh100"), np.random.default_rng(parts)
    experts, cost_model = scenario.model.all_layers[0].experts, CostModel(gpu=scenario.cluster.gpu)
    assert experts is not None
    closest = np.inf
    for _ in range(60):
        places = int(rng.choice([2, 4, 8]))
        plan = Plan(dp=places, ep=places, stages=(1,), overlap_degree=parts)
        tokens_E = rng.lognormal(0.0, 0.5, 8)
        tokens_E *= int(rng.integers(10, 3000)) * places / tokens_E.sum()
        which = Pass(int(rng.integers(0, 4)))
        said = LeastExperts(experts=experts, passes=which, plan=plan, cost_model=cost_model, replicas=replicas)
        least_s = said.seconds(tokens_E).hottest
        rows_GE = placed_rows(rng, tokens_E, places, replicas=replicas)
        cuts_PGE = [(part + 1) * rows_GE // parts - part * rows_GE // parts for part in range(parts)]
        seconds_PG = np.array([[seconds(experts, plan, which, rows, cost_model) for rows in cut] for cut in cuts_PGE])
        slowest_s = float(seconds_PG.sum(axis=0).max()) / parts
        assert slowest_s >= least_s * (1 - ROUNDING), (places, tokens_E, rows_GE)
        closest = min(closest, slowest_s / least_s)
    assert closest < 1.3


def seconds(experts: object, plan: Plan, which: Pass, rows_E: Floats, cost_model: CostModel) -> float:
    counts = tuple(int(rows) for rows in rows_E if rows > 0) or (0,)
    operators = experts.expert_operators(tokens_per_expert=counts, etp=plan.etp)  # type: ignore[attr-defined]
    return cost_model.cost(work("experts", operators, which, precision=plan.precision, again=False)).seconds
