"""The independent checker: it says whether a placement is legal and what it is worth, and shares no code with a solver.

Axes of arrays: E expert, G GPU, R replica, S source.
"""

from __future__ import annotations

import numpy as np

from moeplan.domain.placement import Floats, LayerPlacement, PlacedLayer, PlacementProblem
from moeplan.errors import PlanError
from moeplan.placers._bounds import bounds

_ROUNDING = 1e-9


def certified(
    problem: PlacementProblem,
    placement: LayerPlacement,
    *,
    seconds: float,
    bound: float | None = None,
    proof: str | None = None,
) -> PlacedLayer:
    """The placement, checked and evaluated, with the best of the given bound and the cheap ones.

    A bound above the value is our own mistake, never the user's. One that rounding put above it is cut to it.
    """
    check(problem, placement)
    found = value(problem, placement)
    known = [*bounds(problem), *([] if bound is None else [(bound, proof or "the placer's own bound")])]
    best, sentence = max(known, key=lambda pair: pair[0])
    assert best <= found * (1 + _ROUNDING), f"bound {best} ({sentence}) is above the value {found} of a legal placement"
    return PlacedLayer(placement=placement, value=found, lower_bound=min(best, found), proof=sentence, seconds=seconds)


def value(problem: PlacementProblem, placement: LayerPlacement) -> float:
    """Tokens of the fullest GPU; with prices the layer's seconds, with visits the nodes that a token visits."""
    if problem.visits is not None:
        node_E = placement.gpu_R // problem.visits.gpus_per_node  # one replica of each expert, in their order
        visited_U = [len(set(row)) for row in node_E[problem.visits.sets.experts_UK].tolist()]
        return float(np.average(visited_U, weights=problem.visits.sets.count_U))
    if problem.prices is None:
        return float(loads(problem, placement).max())
    from moeplan.placers._makespan import value_s

    return float(value_s(problem, placement))


def loads(problem: PlacementProblem, placement: LayerPlacement) -> Floats:
    """Tokens of each GPU: sum over sources and replicas on the GPU of tokens times share."""
    tokens_R = (problem.tokens_SE[:, placement.expert_R] * placement.share_SR).sum(axis=0)
    return np.bincount(placement.gpu_R, weights=tokens_R, minlength=problem.num_gpus).astype(np.float64)


def check(problem: PlacementProblem, placement: LayerPlacement) -> None:
    """Nothing, if the placement is legal for the problem. Raises PlanError that names the first rule it breaks."""
    _check_places(problem, placement)
    _check_shares(problem, placement)
    if problem.now is not None and problem.max_moves is not None:
        moves = placement.moves_from(problem.now)
        if moves > problem.max_moves:
            raise PlanError(
                f"placement: {moves} replicas stand where none of their expert stood, and max_moves is "
                f"{problem.max_moves}; move fewer, or raise max_moves"
            )


def _check_places(problem: PlacementProblem, placement: LayerPlacement) -> None:
    expert_R, gpu_R = placement.expert_R, placement.gpu_R
    for name, index_R, allowed in (("expert", expert_R, problem.num_experts), ("GPU", gpu_R, problem.num_gpus)):
        if index_R.min() < 0 or index_R.max() >= allowed:
            raise PlanError(f"placement: {name} {index_R.max()} or {index_R.min()} is not one of 0 to {allowed - 1}")
    missing = np.flatnonzero(np.bincount(expert_R, minlength=problem.num_experts) == 0)
    if missing.size:
        raise PlanError(f"placement: expert {missing[0]} stands nowhere; give every expert at least one replica")
    twice = np.flatnonzero(np.diff(expert_R * problem.num_gpus + gpu_R) == 0)
    if twice.size:
        at = f"expert {expert_R[twice[0]]} stands twice on GPU {gpu_R[twice[0]]}"
        raise PlanError(f"placement: {at}, where one copy does the same; put the second one on another GPU")
    held_G = np.bincount(gpu_R, minlength=problem.num_gpus)
    if held_G.max() > problem.slots_per_gpu:
        at = f"GPU {held_G.argmax()} holds {held_G.max()} replicas"
        raise PlanError(f"placement: {at}, above {problem.slots_per_gpu} = ceil(slots / GPUs); move some elsewhere")
    if expert_R.size != problem.slots:
        raise PlanError(f"placement: {expert_R.size} replicas for {problem.slots} slots; use every slot, and no more")


def _check_shares(problem: PlacementProblem, placement: LayerPlacement) -> None:
    rows, sources = placement.share_SR.shape[0], problem.tokens_SE.shape[0]
    if rows not in (1, sources):
        raise PlanError(f"placement: shares for {rows} sources, and the load has {sources}; give 1 row or {sources}")
    if problem.split == "even":
        even_R = 1.0 / np.bincount(placement.expert_R)[placement.expert_R]
        if np.abs(placement.share_SR - even_R).max() > _ROUNDING:
            raise PlanError("placement: shares differ between an expert's replicas; set split to optimal, or even them")
