"""Where the experts of one plan stand: in blocks, each once but evened out, or with replicas as far as memory goes."""

from __future__ import annotations

from functools import cache, lru_cache

from moeplan.compiler.parts import Parts
from moeplan.cost.cost_model import CostModel
from moeplan.domain.model import Model
from moeplan.domain.placement import EMPTY, Placement, PlacementProblem
from moeplan.domain.plan import Plan
from moeplan.domain.program import Pass
from moeplan.domain.scenario import Scenario
from moeplan.partition.footprint import filled_share
from moeplan.partition.route import Load, Tokens, load_of
from moeplan.placers._layers import place_layers

_TIME_LIMIT_S = 10.0
"""Of one layer; local search is through long before."""
_WORTH = 0.03
"""By how much replicas must speed up the slowest places."""


def is_open(plan: Plan, scenario: Scenario) -> bool:
    """Whether it matters to a plan where experts stand: there are several places, and routing is uneven."""
    load = _load(plan, scenario) if plan.ep > 1 else None
    return load is not None and not load.is_even


def best_placed(plan: Plan, scenario: Scenario) -> Plan | None:
    """The plan with the placement under which the slowest places take least in all layers; None if none fits.

    Replicas have to be worth their weights and gradients.
    """
    load = _load(plan, scenario)
    assert load is not None
    ways = [(plan, 1.0)]
    ways += [(plan.model_copy(update={"placement": _placement(load, spare)}), 1 + _WORTH * spare) for spare in (0, 1)]
    fitting = [(each, worth) for each, worth in ways if filled_share(each, scenario) <= 1]
    return min(fitting, key=lambda way: way[1] * _slowest_s(way[0], scenario), default=(None, 0.0))[0]


@lru_cache(maxsize=64)
def _placement(load: Load, spare: int) -> Placement:
    """With so many slots more on each place than without replicas: one evens out any load."""
    places = load.num_places
    problems = [
        PlacementProblem(
            tokens_SE=table.sum(axis=0), num_gpus=places, split="optimal",
            slots=min(table.shape[1] + spare * places, table.shape[1] * places),
        )
        for table in load.tokens_SE_by_layer
    ]  # fmt: skip
    placed = place_layers(problems, range(len(problems)), placer="local_search", seed=0, time_limit_s=_TIME_LIMIT_S)
    return Placement.of([each.placement for each in placed], num_places=places)


@lru_cache(maxsize=64)
def one_more(model: Model, ep: int) -> Placement:
    """Some placement with one slot more on each of `ep` places than the layer with fewest experts needs."""
    counts = [layer.experts.num_experts for layer in model.all_layers if layer.experts]
    slots = max(max(counts), min(counts) + ep)
    return Placement(experts=tuple((*range(count), *[EMPTY] * (slots - count)) for count in counts))


def _load(plan: Plan, scenario: Scenario) -> Load | None:
    return load_of(scenario, plan, rank_tokens=Tokens.of(plan, scenario.workload).rank)


def _slowest_s(plan: Plan, scenario: Scenario) -> float:
    """Seconds of the experts of a micro-batch at the place that takes longest, summed over layers."""
    load = _load(plan, scenario)
    assert load is not None
    parts = Parts(model=scenario.model, plan=plan, workload=scenario.workload, load=load)
    model = CostModel(gpu=scenario.cluster.gpu)
    passes = (Pass.FORWARD, Pass.BACKWARD) if scenario.workload.is_training else (Pass.FORWARD,)
    seconds = cache(lambda unit: model.cost(parts.works[unit]).seconds)
    total, layers = 0.0, [layer.experts for layer in scenario.model.all_layers if layer.experts]
    for moe, experts in enumerate(layers):
        total += max(
            sum(seconds(parts.experts(experts, which, moe=moe, place=place, part=0)) for which in passes)
            for place in range(load.num_places)
        )
    return total
