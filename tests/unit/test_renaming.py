"""The names of alike GPUs under which fewest replicas move."""

import itertools

import numpy as np
import pytest

from moeplan.domain.placement import LayerPlacement, PlacementProblem
from moeplan.placers import local_search
from moeplan.placers._check import value
from moeplan.placers._renaming import assigned, renamed


@pytest.mark.parametrize("size", range(1, 7))
def test_rows_are_assigned_at_least_cost(size: int) -> None:
    rng = np.random.default_rng(size)
    for spread in (1, 2, 5, 100):
        for _ in range(20):
            cost_GG = rng.integers(-spread, spread + 1, (size, size)).astype(np.float64)
            found = assigned(cost_GG)
            assert sorted(found) == list(range(size))
            orders = itertools.permutations(range(size))
            assert cost_GG[range(size), found].sum() == min(cost_GG[range(size), order].sum() for order in orders)


@pytest.mark.parametrize("block", [2, 4])
@pytest.mark.parametrize("seed", range(20))
def test_no_other_names_move_fewer_replicas(block: int, seed: int) -> None:
    """GPUs of a block are alike, and those of two are not."""
    rng = np.random.default_rng(seed)
    problems = [PlacementProblem(tokens_SE=rng.lognormal(0, 1, 6), num_gpus=4, slots=9) for _ in range(2)]
    now, placement = (local_search.place(each, rng=rng, time_limit_s=10.0).placement for each in problems)
    found = renamed(problems[1], placement, now, block=block)
    assert value(problems[1], found) == pytest.approx(value(problems[1], placement))
    moves = [
        LayerPlacement.even(placement.expert_R, np.array(order)[placement.gpu_R]).moves_from(now)
        for order in itertools.permutations(range(4))
        if all(new // block == old // block for old, new in enumerate(order))
    ]
    assert found.moves_from(now) == min(moves)
