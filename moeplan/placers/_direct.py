"""The placement problem written out as one integer programme, for small layers, free splits and budgets of moves.

PuLP builds it, since it is small. HiGHS solves it in process; CBC is a second opinion. Neither's word is taken: a
placement is read off its places alone, and the bound is HiGHS' dual bound less its tolerance.

Variables: `on[e, k, g]` says that expert e has k replicas of which one is on GPU g, where the split is even; `on[e, g]`
and `part[e, g]`, the tokens of e that g serves, where it is free. Tokens are in means of a GPU. Where there are prices,
also `busy`, the copies through the busiest node, and with a free split `kept[e, m]`, those of e that stay in node m.
Axes of arrays: E expert, G GPU, N node.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import pulp

from moeplan.domain.placement import Floats, LayerPlacement, PlacementProblem
from moeplan.placers._cbc import solve_programme
from moeplan.placers._counts import any_counts, options
from moeplan.placers._highs import ready
from moeplan.placers._makespan import NodeProblem, routed, unit_s
from moeplan.placers._split import best_shares

WHOLE = "one programme for the whole problem: dual bound of HiGHS less its tolerance"
_TOLERANCE = 2e-6
"""Of HiGHS' rows and of its bound, in means of a GPU: twice its 1e-6."""
_PRICED = 1e-7
"""Of HiGHS' reduced costs: where there are prices, its bound may be too high by this for each unit of variables."""
Terms = dict[tuple[int, int], list[tuple[int, pulp.LpVariable]]]
"""Of expert e on GPU g: each possible number of replicas, and the variable that says so."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Model:
    """The programme and what is read off it."""

    programme: pulp.LpProblem
    on: Terms
    scale: float
    """What 1 in the objective is: the tokens of a mean GPU, or with prices seconds."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Answer:
    """A placement, if one was found, and tokens or seconds that none is below (0 where the solver told none)."""

    placement: LayerPlacement | None
    bound: float


def size(problem: PlacementProblem) -> int:
    """Whole variables of the programme at most."""
    counts = problem.slots - problem.num_experts + 1 if problem.split == "even" else 1
    return problem.num_experts * problem.num_gpus * min(problem.num_gpus, counts)


def written_out(problem: PlacementProblem, *, high: float) -> Model:
    """The programme for placements whose replicas have `high` tokens at most."""
    programme = pulp.LpProblem("placement", pulp.LpMinimize)
    mean = float(problem.tokens_E.sum()) / problem.num_gpus
    nodes = NodeProblem.of(problem) if problem.prices else None
    fullest, busy = programme.add_variable("fullest", 0), programme.add_variable("busy", 0) if nodes else None
    programme += fullest if nodes is None else _seconds(programme, fullest, busy, nodes)
    if problem.split == "even":
        on = _even_variables(programme, problem, high=high)
        _counts_agree(programme, on, problem)
        _load_even(programme, on, fullest, problem.tokens_E / mean, problem.num_gpus)
        if nodes is not None:
            _through_a_node_even(programme, on, busy, nodes.tokens_NE / mean, nodes.gpus_per_node)
    else:
        on = _free_variables(programme, problem)
        part = _load_free(programme, on, fullest, problem.tokens_E / mean, problem.num_gpus)
        if nodes is not None:
            _through_a_node_free(programme, part, busy, nodes.tokens_NE / mean, nodes.gpus_per_node)
    _every_expert_somewhere(programme, on, problem)
    _every_slot_used(programme, on, problem)
    _slots_of_a_gpu(programme, on, problem)
    if problem.max_moves is not None:
        _few_moves(programme, on, problem)
    return Model(programme=programme, on=on, scale=mean if nodes is None else unit_s(nodes))


def solved_by_highs(problem: PlacementProblem, model: Model, *, gap: float, time_limit_s: float) -> Answer:
    """What HiGHS finds and proves."""
    solver = pulp.HiGHS(msg=False, threads=1, gapRel=gap, gapAbs=0.0, timeLimit=max(0.1, time_limit_s), random_seed=0)
    ready()
    model.programme.solve(solver)
    info = model.programme.solverModel.getInfo()
    sizes = problem.slots + problem.num_experts + 2 * problem.num_gpus + 3 if problem.prices else 0
    tolerance = max(_TOLERANCE, _PRICED * sizes)
    bound = (info.mip_dual_bound - tolerance) * model.scale if np.isfinite(info.mip_dual_bound) else 0.0
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


def _load_free(
    programme: pulp.LpProblem, on: Terms, fullest: pulp.LpVariable, tokens_E: Floats, num_gpus: int
) -> dict[tuple[int, int], pulp.LpVariable]:
    """`part[e, g] <= tokens[e] * on[e, g]`, `sum_g part[e, g] = tokens[e]` and `sum_e part[e, g] <= fullest`."""
    part = {place: programme.add_variable(f"part_{place[0]}_{place[1]}", 0) for place in on}
    for (e, g), [(_, variable)] in on.items():
        programme += part[e, g] <= float(tokens_E[e]) * variable
    for e, tokens in enumerate(tokens_E.tolist()):
        programme += pulp.lpSum(part[e, g] for g in range(num_gpus)) == tokens
    for g in range(num_gpus):
        programme += pulp.lpSum(part[e, g] for e in range(tokens_E.size)) <= fullest
    return part


def _seconds(
    programme: pulp.LpProblem, fullest: pulp.LpVariable, busy: pulp.LpVariable, nodes: NodeProblem
) -> pulp.LpAffineExpression:
    """`exchange + compute_s * fullest`, where `exchange >= nic_s * busy` and `exchange >= nvlink_s * fullest`."""
    each_s = unit_s(nodes) * nodes.num_nodes * nodes.gpus_per_node / float(nodes.tokens_NE.sum())
    exchange = programme.add_variable("exchange", 0)
    programme += exchange >= nodes.nic_s / each_s * busy
    programme += exchange >= nodes.nvlink_s / each_s * fullest
    return exchange + nodes.compute_s / each_s * fullest


def _through_a_node_even(
    programme: pulp.LpProblem, on: Terms, busy: pulp.LpVariable, tokens_NE: Floats, size: int
) -> None:
    """Of each node m, `sum_e,k,g in m foreign[m, e] / k * on[e, k, g] <= busy`, and the same for what leaves it:
    `sum_e own[m, e] - sum_e,k,g in m own[m, e] / k * on[e, k, g] <= busy`.
    """
    total_E = tokens_NE.sum(axis=0)
    for m, own_E in enumerate(tokens_NE):
        here = [(e, 1 / k * variable) for (e, g), terms in on.items() if g // size == m for k, variable in terms]
        programme += pulp.lpSum(float(total_E[e] - own_E[e]) * part for e, part in here) <= busy
        programme += float(own_E.sum()) - pulp.lpSum(float(own_E[e]) * part for e, part in here) <= busy


def _through_a_node_free(
    programme: pulp.LpProblem, part: dict[tuple[int, int], pulp.LpVariable], busy: pulp.LpVariable,
    tokens_NE: Floats, size: int,
) -> None:  # fmt: skip
    """`kept[e, m] <= own[m, e]`, `kept[e, m] <= sum_g in m part[e, g]`; of each node m, what comes in,
    `sum_e,g in m part[e, g] - sum_e kept[e, m] <= busy`, and what leaves, `sum_e own[m, e] - kept[e, m] <= busy`.
    """
    for m, own_E in enumerate(tokens_NE):
        kept = [programme.add_variable(f"kept_{e}_{m}", 0, own) for e, own in enumerate(own_E.tolist())]
        here = [
            [variable for (e, g), variable in part.items() if e == at and g // size == m] for at in range(len(kept))
        ]
        for stays, parts in zip(kept, here, strict=True):
            programme += stays <= pulp.lpSum(parts)
        programme += pulp.lpSum(variable for parts in here for variable in parts) - pulp.lpSum(kept) <= busy
        programme += float(own_E.sum()) - pulp.lpSum(kept) <= busy


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
    if problem.prices is not None:
        return routed(problem, expert_R, gpu_R)
    if problem.split == "even":
        return LayerPlacement.even(expert_R, gpu_R)
    share_R = best_shares(problem.tokens_E, expert_R, gpu_R, problem.num_gpus)
    return LayerPlacement(expert_R=expert_R, gpu_R=gpu_R, share_SR=share_R[None, :])
