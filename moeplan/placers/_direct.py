"""The placement problem written out as one integer programme, for small layers, free splits and budgets of moves.

PuLP builds it, since it is small. HiGHS solves it in process; CBC is a second opinion. Neither's word is taken: a
placement is read off its places alone, and the bound is HiGHS' dual bound less its tolerance.

Variables: `on[e, k, g]` says that expert e has k replicas of which one is on GPU g, where the split is even; `on[e, g]`
and `part[e, g]`, the tokens of e that g serves, where it is free. Tokens are in means of a GPU.
Axes of arrays: E expert, G GPU.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pulp

from moeplan.domain.placement import Floats, LayerPlacement, PlacementProblem
from moeplan.placers._cbc import solve_programme
from moeplan.placers._counts import any_counts, options
from moeplan.placers._highs import hush
from moeplan.placers._split import best_shares

_TOLERANCE = 2e-6
"""Of HiGHS' rows and of its bound, in means of a GPU: twice its 1e-6."""
Terms = dict[tuple[int, int], list[tuple[int, pulp.LpVariable]]]
"""Of expert e on GPU g: each possible number of replicas, and the variable that says so."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Model:
    """The programme and what is read off it."""

    programme: pulp.LpProblem
    on: Terms
    scale: float
    """Tokens of a mean GPU."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answer:
    """A placement, if one was found, and tokens that no placement is below (0 where the solver told none)."""

    placement: LayerPlacement | None
    bound: float


def size(problem: PlacementProblem) -> int:
    """Whole variables of the programme at most."""
    counts = problem.slots - problem.num_experts + 1 if problem.split == "even" else 1
    return problem.num_experts * problem.num_gpus * min(problem.num_gpus, counts)


def written_out(problem: PlacementProblem, *, high: float) -> Model:
    """The programme for placements whose fullest GPU has `high` tokens at most."""
    programme = pulp.LpProblem("placement", pulp.LpMinimize)
    scale = float(problem.tokens_E.sum()) / problem.num_gpus
    fullest = programme.add_variable("fullest", 0)
    programme += fullest
    if problem.split == "even":
        on = _even_variables(programme, problem, high=high)
        _counts_agree(programme, on, problem)
        _load_even(programme, on, fullest, problem.tokens_E / scale, problem.num_gpus)
    else:
        on = _free_variables(programme, problem)
        _load_free(programme, on, fullest, problem.tokens_E / scale, problem.num_gpus)
    _every_expert_somewhere(programme, on, problem)
    _every_slot_used(programme, on, problem)
    _slots_of_a_gpu(programme, on, problem)
    if problem.max_moves is not None:
        _few_moves(programme, on, problem)
    return Model(programme=programme, on=on, scale=scale)


def solved_by_highs(problem: PlacementProblem, model: Model, *, gap: float, time_limit_s: float) -> Answer:
    """What HiGHS finds and proves."""
    solver = pulp.HiGHS(msg=False, threads=1, gapRel=gap, gapAbs=0.0, timeLimit=max(0.1, time_limit_s), random_seed=0)
    hush()
    model.programme.solve(solver)
    info = model.programme.solverModel.getInfo()
    bound = (info.mip_dual_bound - _TOLERANCE) * model.scale if np.isfinite(info.mip_dual_bound) else 0.0
    # PuLP's status says "Optimal" for a time limit with a solution, so only the values are asked.
    found = any(variable.varValue for variable in model.programme.variables())
    return Answer(placement=_read(problem, model) if found else None, bound=max(0.0, bound))


def solved_by_cbc(problem: PlacementProblem, model: Model, *, gap: float, time_limit_s: float) -> Answer:
    """What CBC finds, without a bound; nothing where CBC is missing or had to be stopped."""
    found = solve_programme(model.programme, gap=gap, time_limit_s=time_limit_s)
    return Answer(placement=_read(problem, model) if found else None, bound=0.0)


def _even_variables(programme: pulp.LpProblem, problem: PlacementProblem, *, high: float) -> Terms:
    """`on[e, k, g]`, for each k that leaves replicas of at most `high` tokens."""
    found = options(problem, limit=high * (1 + 1e-9), within=any_counts(problem))
    on: Terms = {(e, g): [] for e in range(problem.num_experts) for g in range(problem.num_gpus)}
    for e, k in zip(found.expert_O.tolist(), found.count_O.tolist(), strict=True) if found else ():
        for g in range(problem.num_gpus):
            on[e, g].append((k, programme.add_variable(f"on_{e}_{k}_{g}", 0, 1, pulp.LpInteger)))
    return on


def _free_variables(programme: pulp.LpProblem, problem: PlacementProblem) -> Terms:
    """`on[e, g]`; the number of replicas does not matter, and stands as 1."""
    places = [(e, g) for e in range(problem.num_experts) for g in range(problem.num_gpus)]
    return {(e, g): [(1, programme.add_variable(f"on_{e}_{g}", 0, 1, pulp.LpInteger))] for e, g in places}


def _counts_agree(programme: pulp.LpProblem, on: Terms, problem: PlacementProblem) -> None:
    """`sum_g on[e, k, g] = k * chosen[e, k]`, `on[e, k, g] <= chosen[e, k]` and `sum_k chosen[e, k] = 1`."""
    for e in range(problem.num_experts):
        chosen = {k: programme.add_variable(f"chosen_{e}_{k}", 0, 1, pulp.LpInteger) for k, _ in on[e, 0]}
        programme += pulp.lpSum(chosen.values()) == 1
        for place, (k, _) in enumerate(on[e, 0]):
            replicas = [on[e, g][place][1] for g in range(problem.num_gpus)]
            programme += pulp.lpSum(replicas) == k * chosen[k]
            for replica in replicas:
                programme += replica <= chosen[k]


def _load_even(programme: pulp.LpProblem, on: Terms, fullest: pulp.LpVariable, tokens_E: Floats, num_gpus: int) -> None:
    """`sum_e,k tokens[e] / k * on[e, k, g] <= fullest`, all g."""
    for g in range(num_gpus):
        load = ((tokens / k) * variable for e, tokens in enumerate(tokens_E.tolist()) for k, variable in on[e, g])
        programme += pulp.lpSum(load) <= fullest


def _load_free(programme: pulp.LpProblem, on: Terms, fullest: pulp.LpVariable, tokens_E: Floats, num_gpus: int) -> None:
    """`part[e, g] <= tokens[e] * on[e, g]`, `sum_g part[e, g] = tokens[e]` and `sum_e part[e, g] <= fullest`."""
    part = {place: programme.add_variable(f"part_{place[0]}_{place[1]}", 0) for place in on}
    for (e, g), [(_, variable)] in on.items():
        programme += part[e, g] <= float(tokens_E[e]) * variable
    for e, tokens in enumerate(tokens_E.tolist()):
        programme += pulp.lpSum(part[e, g] for g in range(num_gpus)) == tokens
    for g in range(num_gpus):
        programme += pulp.lpSum(part[e, g] for e in range(tokens_E.size)) <= fullest


def _every_expert_somewhere(programme: pulp.LpProblem, on: Terms, problem: PlacementProblem) -> None:
    """`sum_k,g on[e, k, g] >= 1`, all e; and `sum_k on[e, k, g] <= 1`, all e and g: none is twice on a GPU."""
    for e in range(problem.num_experts):
        programme += pulp.lpSum(_of(on[e, g] for g in range(problem.num_gpus))) >= 1
        for g in range(problem.num_gpus):
            programme += pulp.lpSum(_of([on[e, g]])) <= 1


def _every_slot_used(programme: pulp.LpProblem, on: Terms, problem: PlacementProblem) -> None:
    """`sum_e,k,g on[e, k, g] = slots`."""
    programme += pulp.lpSum(_of(on.values())) == problem.slots


def _slots_of_a_gpu(programme: pulp.LpProblem, on: Terms, problem: PlacementProblem) -> None:
    """`sum_e,k on[e, k, g] <= ceil(slots / GPUs)`, all g."""
    for g in range(problem.num_gpus):
        programme += pulp.lpSum(_of(on[e, g] for e in range(problem.num_experts))) <= problem.slots_per_gpu


def _few_moves(programme: pulp.LpProblem, on: Terms, problem: PlacementProblem) -> None:
    """`sum of on[e, k, g] over all (e, g) where e does not stand now <= max_moves`."""
    assert problem.now is not None
    stood = set(zip(problem.now.expert_R.tolist(), problem.now.gpu_R.tolist(), strict=True))
    programme += pulp.lpSum(_of(terms for place, terms in on.items() if place not in stood)) <= problem.max_moves


def _of(many: Iterable[list[tuple[int, pulp.LpVariable]]]) -> list[pulp.LpVariable]:
    """The variables alone."""
    return [variable for terms in many for _, variable in terms]


def _read(problem: PlacementProblem, model: Model) -> LayerPlacement | None:
    """The placement whose places the solution names; None if some expert has none."""
    places = [place for place, terms in model.on.items() if sum(v.varValue or 0.0 for _, v in terms) > 0.5]
    if {e for e, _ in places} != set(range(problem.num_experts)):
        return None
    expert_R, gpu_R = np.array(places, np.int64).T
    if problem.split == "even":
        return LayerPlacement.even(expert_R, gpu_R)
    share_R = best_shares(problem.tokens_E, expert_R, gpu_R, problem.num_gpus)
    return LayerPlacement(expert_R=expert_R, gpu_R=gpu_R, share_SR=share_R[None, :])
