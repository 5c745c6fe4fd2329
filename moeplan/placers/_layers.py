"""All layers of a model, one after another, by one placer.

Axes: G GPU, R replica.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np

from moeplan import menu
from moeplan.domain.placement import Floats, LayerPlacement, PlacedLayer, PlacementProblem
from moeplan.placers._check import loads


def place_layers(
    problems: Sequence[PlacementProblem],
    numbers: Sequence[int],
    *,
    placer: str,
    seed: int,
    time_limit_s: float,
    on_layer: Callable[[int, int], None] = lambda number, done: None,
) -> tuple[PlacedLayer, ...]:
    """The layers' placements; layers with the same load and start are placed alike, but for the numbers of GPUs.

    Where only balance counts, nothing stands yet, and the placer has no order of its own, a layer's GPUs are numbered
    so that its fullest one has least of the layers before: no GPU should be the hottest in all of them.
    """
    dish, keeps = menu.load("placers", placer, "place"), getattr(menu.module("placers", placer), "KEEPS_ORDER", False)
    known: dict[tuple[bytes, LayerPlacement | None], PlacedLayer] = {}
    found, total_G = [], np.zeros(problems[0].num_gpus)
    for number, problem in zip(numbers, problems, strict=True):
        key = (problem.tokens_SE.tobytes(), problem.now)
        if key not in known:
            known[key] = dish(problem, rng=np.random.default_rng([seed, number]), time_limit_s=time_limit_s)
        free = not keeps and problem.now is None and problem.prices is None and problem.visits is None
        found.append(_renumbered(problem, known[key], total_G) if free else known[key])
        total_G += loads(problem, found[-1].placement)
        on_layer(number, len(found))
    return tuple(found)


def _renumbered(problem: PlacementProblem, placed: PlacedLayer, total_G: Floats) -> PlacedLayer:
    """The same placement on GPUs in another order: the fullest where there is least so far."""
    placement, new_G = placed.placement, np.zeros(problem.num_gpus, np.int64)
    fullest_first = np.argsort(-loads(problem, placement), kind="stable")
    new_G[fullest_first] = np.argsort(total_G, kind="stable")
    turned = LayerPlacement(
        expert_R=placement.expert_R, gpu_R=new_G[placement.gpu_R], share_SR=placement.share_SR
    )  # fmt: skip
    return replace(placed, placement=turned)
