"""Lina: all-to-alls first and in micro-ops, experts packed until they outlast them, popular ones on several GPUs.

Training. The exchange of a layer is cut into equal micro-ops of at most 30 MB, which are the parts of a plan's overlap,
or the number of them nearest to that which is allowed; gradients are cut as well, and none starts while an all-to-all
is on or due (`a2a_first`). From one expert on a GPU, or as few as the framework has, their number is doubled until a
micro-op of the experts takes at least as long as one of the exchange. Each doubling halves the GPUs that exchange
tokens, and doubles those that hold the same experts, whose gradients the rule does not see. Lina measures both while it
trains; here they are what kernels and idle wires take in the forward pass, for the mean layer, at the place that gets
most tokens.

Inference. Popular experts get GPUs in proportion to their tokens, others share one, at most four of them, by first-fit
decreasing (the placer `popularity` does it with slots in place of both limits).

The framework has all-to-alls of one stage and of two, and its user sets ZeRO over those that come to hold the same
experts, at most the stage of the dense part (a higher one would make room, and be slow); Lina says nothing of either:
all of them are simulated, and the fastest is taken. Not carried over: packed experts that go to the host's memory
(where they do not fit, packing ends), packing that is looked at again every few steps, and popularity that is guessed
from the experts of earlier layers; here it is known. All else is what the framework runs by default: data and expert
parallelism alone.
Reference: Li et al., "Accelerating distributed MoE training and inference with Lina" (USENIX ATC 2023), sections 4 to
6.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from math import ceil, inf
from typing import NamedTuple

import numpy as np

from moeplan.compiler.compile_plan import MICRO_OP_BYTES
from moeplan.domain.placement import Floats, LayerPlacement, Placement
from moeplan.domain.plan import Plan
from moeplan.domain.result import PlanResult
from moeplan.domain.scenario import Scenario
from moeplan.partition.route import Tokens, load_of
from moeplan.planners._bounds import Bounds
from moeplan.planners._published import (
    Trials,
    algorithms_of,
    best_set,
    certified,
    degrees_of,
    is_alike,
    is_runnable,
    plainest,
)
from moeplan.planners._search import Progress, Search
from moeplan.planners._space import RANK_ORDERS, Branch, Space, branch_of

IS_EXACT = False
_ALGORITHMS = ("linear", "two_stage")
_DEGREES = tuple(range(1, 65))
_MOST_EXPERTS = 4
"""On one GPU, in inference."""
_SLACK = 1e-9


class MicroOps(NamedTuple):
    """Seconds of one micro-op of an exchange, and of the experts on what it brings."""

    sent_s: float
    computed_s: float


def plan(
    scenario: Scenario, *, time_limit_s: float | None = None, gap: float | None = None, progress: Progress | None = None
) -> PlanResult:
    """The framework's layout with Lina's micro-ops and packing, under the best of what Lina leaves open, simulated.

    `gap` changes nothing; when the time is over the best plan tried so far is kept. Raises InfeasibleError if
    nothing fits.
    """
    search = Search(Space(scenario), gap=gap, time_limit_s=time_limit_s, progress=progress)
    trials = Trials(search)
    for each in candidates(search, plainest(search)):
        trials.step_s(each)
    return certified(search, planner="lina")


def candidates(search: Search, plain: Plan) -> Iterator[Plan]:
    """Lina's plan under each of the framework's all-to-alls and, where experts were packed, each stage of ZeRO."""
    for algorithm in algorithms_of(search.scenario, plain, _ALGORITHMS):
        under = plain.model_copy(update={"all_to_all": algorithm})
        if search.scenario.workload.is_training:
            yield from _sharded(search.space, packed(search, under), under)
        else:
            yield placed(search.scenario, under)


# ---- training


def packed(search: Search, plain: Plan) -> Plan:
    """The plan with micro-ops and as many experts on a GPU as these ask for; as it is where nothing is exchanged, or
    if it does not fit with them.
    """
    if plain.ep == 1:
        return plain
    found = enough(packings(search, plain), lambda each: micro_ops(search.exact.bounds, each))
    return plain if found is None else found


def enough(plans: Iterable[Plan], timed: Callable[[Plan], MicroOps]) -> Plan | None:
    """The first plan whose experts take at least as long as their exchange; the last if none do; None of none."""
    found = None
    for found in plans:
        sent_s, computed_s = timed(found)
        if computed_s >= sent_s:
            break
    return found


def packings(search: Search, plain: Plan) -> Iterator[Plan]:
    """Plans in micro-ops with twice the experts on a GPU each time, as far as they are of the space and fit."""
    ep, count = plain.ep, num_micro_ops(search.exact.bounds, plain)
    while (found := _packing(search, plain, ep, count)) is not None:
        yield found
        if ep % 2:
            return
        ep //= 2


def _packing(search: Search, plain: Plan, ep: int, count: int) -> Plan | None:
    """The plan with groups of `ep` GPUs, at the stage of ZeRO of the least bound that fits; None if none does."""
    branch = _branch(search.space, plain, ep)
    return None if branch is None else best_set(search, _set(branch, plain, count))


def _branch(space: Space, plain: Plan, ep: int) -> Branch | None:
    """The plan's, with groups of `ep` GPUs that are near each other; None if the space has none.

    Those who come to hold the same experts shard them at any stage of ZeRO up to that of the dense part.
    """
    found = [
        branch for branch in space.branches
        if (branch.layout.ep, branch.layout.etp) == (ep, plain.etp) and is_alike(branch.layout, plain)
    ]  # fmt: skip
    if not found:
        return None
    branch = min(found, key=lambda branch: RANK_ORDERS.index(branch.layout.rank_order))
    most = max(plain.zero_dense, plain.zero_expert)
    stages = tuple(stage for stage in branch.zero_expert if stage <= most)
    return replace(branch, zero_expert=(plain.zero_expert,) if ep == plain.ep else stages)


def _set(branch: Branch, plain: Plan, count: int) -> Branch:
    """The plans of a branch with the settings of the plan and `count` micro-ops."""
    given = replace(
        branch, micro_batch=(plain.micro_batch,), recompute=(plain.recompute,), zero_dense=(plain.zero_dense,)
    )
    if branch.layout.ep == 1:
        return given
    return replace(
        given, overlap_degree=(count,),
        all_to_all=(plain.all_to_all,) if plain.all_to_all in branch.all_to_all else branch.all_to_all,
        arbitration=("a2a_first",) if "a2a_first" in branch.arbitration else branch.arbitration,
    )  # fmt: skip


def _sharded(space: Space, found: Plan, plain: Plan) -> Iterator[Plan]:
    """The packed plan at each stage of ZeRO of its experts."""
    branch = _branch(space, plain, found.ep)
    assert branch is not None
    for stage in branch.zero_expert:
        yield found.model_copy(update={"zero_expert": stage})


def num_micro_ops(bounds: Bounds, plan: Plan) -> int:
    """Equal micro-ops of at most 30 MB in the largest exchange that one GPU sends, or the allowed number nearest."""
    exchanges = bounds.chains(_alone(plan.model_copy(update={"overlap_degree": 1}))).exchanges
    most_bytes = max(float(max(x.dispatch_bytes.max(), x.combine_bytes.max())) for x in exchanges)
    wanted = max(1, ceil(most_bytes / MICRO_OP_BYTES))
    allowed = degrees_of(bounds.scenario, plan, _DEGREES)
    return min(allowed, key=lambda count: max(count / wanted, wanted / count))


def micro_ops(bounds: Bounds, plan: Plan) -> MicroOps:
    """Of the mean layer with experts in the forward pass; dispatch and combine count with their mean."""
    chains, (kinds, of_layer, _) = bounds.chains(_alone(plan)), bounds.prices.kinds
    layers = [kind for kind in of_layer if kinds[kind].layer.is_moe]
    sent_s = np.mean([(chains.exchanges[k].dispatch + chains.exchanges[k].combine) / 2 for k in layers])
    computed_s = np.mean([chains.costs[k][0]["experts"] for k in layers])
    return MicroOps(float(sent_s), float(computed_s))


def _alone(plan: Plan) -> Branch:
    """A branch of the plan alone."""
    return branch_of(plan, 1, (plan.dp * plan.cp, plan.edp))


# ---- inference


def placed(scenario: Scenario, plan: Plan) -> Plan:
    """The plan with popular experts of each layer on several GPUs; as it is where nothing is exchanged or nothing is
    popular, or if it does not fit so.
    """
    load = load_of(scenario, plan, rank_tokens=Tokens.of(plan, scenario.workload).rank)
    if load is None or plan.ep == 1:
        return plan
    layers = [shared_out(table.sum(axis=0), plan.ep) for table in load.tokens_SE_by_layer]
    placement = Placement.of(layers, num_places=plan.ep)
    found = plan.model_copy(update={"placement": placement})
    return plan if placement.is_in_order or not is_runnable(found, scenario) else found


def shared_out(tokens_E: Floats, num_gpus: int) -> LayerPlacement:
    """Each expert on as many GPUs as its tokens are worth, `num_gpus * tokens[e] / tokens of all`: whole ones, and a
    part of another, which first-fit decreasing packs.

    A part for which no GPU has room goes to the emptiest. At most four experts stand on a GPU, or one more than
    without copies.
    """
    worth_E = num_gpus * tokens_E / tokens_E.sum()
    most = max(_MOST_EXPERTS, 1 + ceil(len(tokens_E) / num_gpus))
    here_EG, worth_EG = np.zeros((len(tokens_E), num_gpus), np.bool_), np.zeros((len(tokens_E), num_gpus))
    for worth, expert in _pieces(worth_E):
        may_G = here_EG[expert] | (here_EG.sum(axis=0) < most)
        after_G = np.where(may_G, worth_EG.sum(axis=0) + worth, inf)
        fits_G = after_G <= 1 + _SLACK
        gpu = fits_G.argmax() if fits_G.any() else after_G.argmin()
        here_EG[expert, gpu], worth_EG[expert, gpu] = True, worth_EG[expert, gpu] + worth
    expert_R, gpu_R = here_EG.nonzero()
    share_R = np.where(worth_E == 0, 1.0, worth_EG.T / np.where(worth_E == 0, 1.0, worth_E)).T[here_EG]
    return LayerPlacement(expert_R=expert_R, gpu_R=gpu_R, share_SR=share_R[None])


def _pieces(worth_E: Floats) -> list[tuple[float, int]]:
    """What each expert is worth, cut into whole GPUs and the rest, the largest first, and whose it is."""
    whole_E = np.floor(worth_E + _SLACK)
    rest_E = np.maximum(worth_E - whole_E, 0.0)
    pieces = [(1.0, expert) for expert, whole in enumerate(whole_E.tolist()) for _ in range(int(whole))]
    pieces += [(rest, e) for e, rest in enumerate(rest_E.tolist()) if rest > _SLACK or whole_E[e] == 0]
    return sorted(pieces, key=lambda piece: -piece[0])
