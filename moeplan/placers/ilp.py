"""Integer programmes where they earn their place, and a proof of how good the answer is: each layer gets what fits it.

Local search and the cheap bounds come first: they settle most layers of three or more slots on a GPU in milliseconds.
Where the wanted gap is not proven, `_exact` goes on:

    prices                                    the nodes' programme; with few variables also the whole one (`_nodes`)
    visits                                    `co_activation`
    few variables, free split, or few moves   the whole problem as one programme (`_direct`)
    else                                      limits between bound and value, each refuted or met by a placement

A limit is refuted by the configuration LP (`_configurations`); then with two slots on a GPU by the ILP of pairs
(`_pairs`), with more by branching on replica counts (`_branching`). What they leave over is rounded and packed
(`_packing`). A method that finds nothing, runs out of time or claims what the checker denies leaves the best so far.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from moeplan.domain.placement import PlacedLayer, PlacementProblem
from moeplan.jit import clock_s
from moeplan.placers import co_activation, local_search
from moeplan.placers._check import certified

_FEW = 200
"""Places of experts up to which no walk is worth its time before the whole problem is solved."""
_LOOSE = 1.0
"""Gap that is asked of local search then: its greedy start is enough."""


def place(
    problem: PlacementProblem, *, rng: np.random.Generator, time_limit_s: float, gap: float = 1e-3
) -> PlacedLayer:
    """The best placement found until its gap is proven to be `gap` or less, or methods or time are at an end."""
    if problem.prices is not None:
        from moeplan.placers import _nodes

        return _nodes.place(problem, rng=rng, time_limit_s=time_limit_s)
    if problem.visits is not None:  # the relaxation says nothing: every expert in equal parts everywhere
        return co_activation.place(problem, rng=rng, time_limit_s=time_limit_s)
    start = clock_s()
    is_tiny = problem.num_experts * problem.num_gpus <= _FEW
    first = local_search.place(problem, rng=rng, time_limit_s=time_limit_s, gap=max(gap, _LOOSE) if is_tiny else gap)
    if first.gap <= gap:
        return first
    try:
        from moeplan.placers._exact import Search, improve
    except ImportError as missing:
        proof = f"{first.proof} ({missing.name} is not installed, so no integer programme was tried)"
        return replace(first, proof=proof, seconds=clock_s() - start)
    search = Search(
        problem=problem, gap=gap, stop_s=start + time_limit_s, rng=rng,
        placement=first.placement, value=first.value, bound=first.lower_bound, proof=first.proof,
    )  # fmt: skip
    improve(search)
    seconds = clock_s() - start
    return certified(problem, search.placement, bound=search.bound, proof=search.proof, seconds=seconds)
