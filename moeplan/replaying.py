"""Placement over time: a recorded routing trace step by step, under each policy of when to place experts anew.

The first step's tokens place the experts that every policy starts with. From then on each step is scored under the
placement in force, which was found on earlier steps alone; then the policy says whether to place anew before the next.
The oracle knows each step beforehand and moves experts for free: no policy can beat its lower bound.

Axes of arrays: T step, L layer, S source, E expert, G GPU, N node.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from os import PathLike
from typing import Any, Literal, NamedTuple

import numpy as np

from moeplan import menu
from moeplan.adaptations import Decision, Seen
from moeplan.api import Progress, Source
from moeplan.api import load as load_scenario
from moeplan.cost.memory import state_bytes
from moeplan.cost.migration import Bools, Migration
from moeplan.domain.placement import Floats, Ints, LayerPlacement, PlacedLayer, PlacementProblem, Split, TokenPrices
from moeplan.domain.scenario import Scenario
from moeplan.errors import PlanError
from moeplan.importers.expert_load import read, read_batches
from moeplan.placers._check import loads, value
from moeplan.placers._makespan import routed
from moeplan.placers._renaming import renamed
from moeplan.placers._seats import split as balanced
from moeplan.placing import (
    LoadSource,
    bandwidths,
    by_node,
    check_memory,
    check_time_limit,
    gpus_of,
    prices_of,
    steps_of,
)

SCHEMA = "moeplan.replay/v1"
_ROUNDING = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PolicyReplay:
    """What one policy made of the trace; `[t, l]` is of step t + 1, since the first step is not scored."""

    policy: str
    options: Mapping[str, object]
    ratio_TL: Floats
    """Tokens of the fullest GPU over those of the mean one."""
    value_TL: Floats
    """Tokens of the fullest GPU, or the layer's seconds where a scenario gives prices."""
    is_replaced_TL: Bools
    """Whether experts were placed anew just before this step; where that was no better, nothing moved."""
    moves_TL: Ints
    """Replicas that moved for it."""
    migration_s_TL: Floats
    """Seconds that took; 0 without a scenario, where a move has no price."""
    oracle: float
    """The lower bound of `total`, of any policy."""

    @property
    def total(self) -> float:
        """All steps and layers, with the seconds of migration where they are known."""
        return float(self.value_TL.sum() + self.migration_s_TL.sum())

    @property
    def regret(self) -> float:
        """How far above the oracle's bound the total is: total / oracle - 1."""
        return max(0.0, self.total / self.oracle - 1)

    def record(self) -> dict[str, Any]:
        """The policy in plain values, as a line of a table."""
        return {
            "policy": self.policy, "options": dict(self.options), "mean_ratio": float(self.ratio_TL.mean()),
            "p95_ratio": float(np.percentile(self.ratio_TL, 95)), "replacements": int(self.is_replaced_TL.sum()),
            "moves": int(self.moves_TL.sum()), "migration_s": float(self.migration_s_TL.sum()), "total": self.total,
            "regret": self.regret, "ratio_by_step": self.ratio_TL.mean(axis=1).tolist(),
        }  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Replay:
    """A trace under several policies, the best one first: least regret, then fewest moves."""

    placer: str
    num_gpus: int
    slots: int
    split: Split
    num_steps: int
    """Of the trace, the first one included."""
    numbers: tuple[int, ...]
    """Of the layers, in the file."""
    unit: Literal["tokens", "s"]
    """Of totals: seconds where a scenario gives prices. Without, moves are counted and not charged."""
    policies: tuple[PolicyReplay, ...]

    def document(self) -> dict[str, Any]:
        """What `place --routing-trace --json` prints."""
        return {
            "schema": SCHEMA, "placer": self.placer, "gpus": self.num_gpus, "slots": self.slots, "split": self.split,
            "steps": self.num_steps, "layers": list(self.numbers), "unit": self.unit,
            "oracle": self.policies[0].oracle, "policies": [each.record() for each in self.policies],
        }  # fmt: skip


def replay(
    trace: LoadSource,
    *,
    scenario: Source | None = None,
    policy: str = "all",
    gpus: int | None = None,
    slots: int | None = None,
    array: str | None = None,
    batch_tokens: int | None = None,
    experts: int | None = None,
    placer: str = "local_search",
    split: Split = "even",
    time_limit_s: float = 10.0,
    seed: int = 0,
    progress: Progress | None = None,
    **options: Any,
) -> Replay:
    """Each policy's imbalance, moves and regret over a recorded trace; `policy` is a dish of adaptations, or all.

    `trace` is a file or an array of counts [step, layer, expert] or [step, layer, source, expert]; with `batch_tokens`
    a file of expert ids [token, layer, pick], of `experts` experts, cut into steps of so many tokens. With `scenario`
    time is the layer's seconds, moves included. `options` go to the policies that have them: every, threshold, horizon,
    move_cost, window, max_moves. With split optimal each step's tokens are split anew.
    Raises CatalogueError, PlanError, InfeasibleError.
    """
    given = None if scenario is None else load_scenario(scenario)
    chosen = _policies(policy, options)
    check_time_limit(time_limit_s)
    num_gpus = gpus_of(given, gpus)
    tokens_TLSE, numbers = _trace(trace, given, array=array, batch_tokens=batch_tokens, experts=experts)
    num_slots = tokens_TLSE.shape[3] if slots is None else slots
    problems_TL = _problems(tokens_TLSE, given, numbers=numbers, num_gpus=num_gpus, slots=num_slots, split=split)
    dish = menu.load("placers", placer, "place")

    def place(problem: PlacementProblem, layer: int) -> PlacedLayer:
        found: PlacedLayer = dish(problem, rng=np.random.default_rng([seed, numbers[layer]]), time_limit_s=time_limit_s)
        return found

    fresh_TL = []
    for step, problem_L in enumerate(problems_TL):
        fresh_TL.append(tuple(place(problem, layer) for layer, problem in enumerate(problem_L)))
        if progress is not None:
            progress(f"oracle, step {step}", step + 1, len(problems_TL))
    migration = None if given is None else _migration(given, num_gpus)
    record = _Record(problems_TL=problems_TL, fresh_TL=tuple(fresh_TL), place=place, migration=migration)
    found = [_replayed(record, name, mine) for name, mine in chosen.items()]
    return Replay(
        placer=placer, num_gpus=num_gpus, slots=num_slots, split=split, num_steps=len(problems_TL), numbers=numbers,
        unit="tokens" if given is None else "s",
        policies=tuple(sorted(found, key=lambda each: (each.regret, each.moves_TL.sum(), each.policy))),
    )  # fmt: skip


# ---- what is asked


def _policies(policy: str, options: Mapping[str, object]) -> dict[str, dict[str, object]]:
    """The options of each policy that is asked for; one that none of them has is refused."""
    names = menu.names("adaptations") if policy == "all" else [policy]
    takes = {name: set(inspect.signature(menu.load("adaptations", name, "decide")).parameters) for name in names}
    known = sorted(set().union(*takes.values()) - {"seen"})
    for option in options:
        if option not in known:
            use = f"use {', '.join(known)}, or remove it" if known else "remove it"
            raise PlanError(f"{option}: has no effect on policy {policy!r}; {use}")
    return {name: {key: each for key, each in options.items() if key in takes[name]} for name in names}


def _trace(
    trace: LoadSource,
    scenario: Scenario | None,
    *,
    array: str | None,
    batch_tokens: int | None,
    experts: int | None,
) -> tuple[Floats, tuple[int, ...]]:
    """[T, L, S, E] tokens and the layers' numbers, at least two steps, none of them without tokens."""
    model = {layer.experts.num_experts for layer in scenario.model.layers if layer.experts} if scenario else set()
    if experts is not None and batch_tokens is None:
        raise PlanError("experts: has no effect on counts, which say how many there are; remove it")
    if experts is None and len(model) == 1:
        experts = min(model)
    if not isinstance(trace, str | PathLike):
        if array is not None or batch_tokens is not None:
            raise PlanError("array and batch_tokens have no effect without a file; give counts by step")
        tokens_TLSE = steps_of(trace)
        numbers = tuple(range(tokens_TLSE.shape[1]))
    else:
        if batch_tokens is None:
            found = read(trace, array=array)
        else:
            found = read_batches(trace, batch_tokens=batch_tokens, array=array, num_experts=experts)
        tokens_TLSE, numbers = found.tokens_TLSE, found.layers
    _check(tokens_TLSE, numbers, model)
    return tokens_TLSE, numbers


def _check(tokens_TLSE: Floats, numbers: tuple[int, ...], model: set[int]) -> None:
    steps, _, _, experts = tokens_TLSE.shape
    if steps < 2:
        raise PlanError(
            "routing trace: 1 step, which places experts and leaves none to score them on; record two or more, or give "
            "expert ids and the tokens of a batch"
        )
    if model and experts not in model:
        raise PlanError(f"routing trace: {experts} experts are not the {min(model)} of the model; use its own trace")
    empty = np.argwhere(~tokens_TLSE.any(axis=(2, 3)))
    if len(empty):
        step, layer = empty[0]
        raise PlanError(f"routing trace: step {step}, layer {numbers[layer]}: no tokens; leave steps without load out")


def _problems(
    tokens_TLSE: Floats,
    scenario: Scenario | None,
    *,
    numbers: tuple[int, ...],
    num_gpus: int,
    slots: int,
    split: Split,
) -> tuple[tuple[PlacementProblem, ...], ...]:
    prices: TokenPrices | None = None
    if scenario is None:
        tokens_TLSE = tokens_TLSE.sum(axis=2, keepdims=True)
    else:
        check_memory(scenario, -(-slots // num_gpus))
        rows = max(1, round(float(tokens_TLSE.sum(axis=(2, 3)).mean()) / slots))
        prices = prices_of(scenario, num_gpus, slots, rows=rows)
        tokens_TLSE = np.array([by_node(each, num_gpus, scenario.cluster.gpus_per_node) for each in tokens_TLSE])
    return tuple(
        tuple(
            PlacementProblem(tokens_SE=tokens_SE, num_gpus=num_gpus, slots=slots, split=split, prices=prices)
            for tokens_SE in tokens_LSE
        )
        for tokens_LSE in tokens_TLSE
    )


def _migration(scenario: Scenario, num_gpus: int) -> Migration:
    """Of an expert's weights, and in training the optimizer's state of them, unsharded."""
    most = max(layer.experts.expert_parameters for layer in scenario.model.layers if layer.experts)
    states = state_bytes(np.array(float(most)), replicas=1, zero=0, precision=scenario.choices.precision)
    nic, nvlink = bandwidths(scenario.cluster, num_gpus)
    return Migration(
        replica_bytes=float(states.weights + (states.optimizer if scenario.workload.is_training else 0.0)),
        gpus_per_node=min(scenario.cluster.gpus_per_node, num_gpus), nic_bytes_per_s=nic, nvlink_bytes_per_s=nvlink,
    )  # fmt: skip


# ---- the replay


def _here_EG(problem: PlacementProblem, placement: LayerPlacement) -> Bools:
    here_EG = np.zeros((problem.num_experts, problem.num_gpus), np.bool_)
    here_EG[placement.expert_R, placement.gpu_R] = True
    return here_EG


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _Record:
    """The trace as placement problems, and the best placement found for each step on its own tokens."""

    problems_TL: tuple[tuple[PlacementProblem, ...], ...]
    fresh_TL: tuple[tuple[PlacedLayer, ...], ...]
    place: Callable[[PlacementProblem, int], PlacedLayer]
    migration: Migration | None

    def problem(self, step: int, layer: int, *, window: int) -> PlacementProblem:
        """With the tokens of `step` and the ones before it, `window` in all."""
        problems = [problem_L[layer] for problem_L in self.problems_TL[max(0, step + 1 - window) : step + 1]]
        return replace(problems[-1], tokens_SE=np.sum([problem.tokens_SE for problem in problems], axis=0))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class _InForce:
    """A placement, and the last step that it was found on."""

    placement: LayerPlacement
    step: int
    promised_cost: float


class _Change(NamedTuple):
    """What was done to one layer between two steps."""

    is_replaced: bool = False
    moves: int = 0
    migration_s: float = 0.0


class _Scored(NamedTuple):
    """One layer in one step, and what was done just before it."""

    ratio: float
    value: float
    is_replaced: bool
    moves: int
    migration_s: float


def _replayed(record: _Record, name: str, options: dict[str, object]) -> PolicyReplay:
    decide = partial(menu.load("adaptations", name, "decide"), **options)
    layers = [_layer(record, layer, decide) for layer in range(len(record.problems_TL[0]))]
    columns: dict[str, Any] = {
        f"{field}_TL": np.array([[getattr(step, field) for step in steps] for steps in layers]).T
        for field in _Scored._fields
    }
    for column in columns.values():
        column.setflags(write=False)
    oracle = sum(placed.lower_bound for placed_L in record.fresh_TL[1:] for placed in placed_L)
    return PolicyReplay(policy=name, options=options, oracle=oracle, **columns)


def _layer(record: _Record, layer: int, decide: Callable[[Seen], Decision]) -> list[_Scored]:
    """The steps of one layer after the first, each scored before the policy is asked about the next."""
    problem_T = [problem_L[layer] for problem_L in record.problems_TL]
    tokens_TSE = np.array([problem.tokens_SE for problem in problem_T])
    tokens_TSE.setflags(write=False)
    start = record.fresh_TL[0][layer]
    now = _InForce(placement=start.placement, step=0, promised_cost=start.value / _mean(problem_T[0]))
    scored, costs, change = [], [now.promised_cost], _Change()
    for step, problem in enumerate(problem_T[1:], start=1):
        placement = _split(problem, now.placement)
        ratio, worth = float(loads(problem, placement).max()) / _mean(problem), value(problem, placement)
        scored.append(_Scored(ratio, worth, *change))
        costs.append(worth / _mean(problem))
        if step + 1 < len(problem_T):
            decision = decide(_seen(record, now, tokens_TSE[: step + 1], costs))
            now, change = _adapted(record, now, decision, step=step, layer=layer)
    return scored


def _mean(problem: PlacementProblem) -> float:
    return float(problem.tokens_SE.sum()) / problem.num_gpus


def _split(problem: PlacementProblem, placement: LayerPlacement) -> LayerPlacement:
    """The same replicas, this step's tokens split between them by the problem's rule."""
    rule = balanced if problem.prices is None else routed
    return rule(problem, placement.expert_R, placement.gpu_R)


def _seen(record: _Record, now: _InForce, tokens_TSE: Floats, costs: list[float]) -> Seen:
    cost_T = np.array(costs)
    cost_T.setflags(write=False)
    return Seen(
        tokens_TSE=tokens_TSE, cost_T=cost_T, num_gpus=record.problems_TL[0][0].num_gpus, placement=now.placement,
        placed_step=now.step, promised_cost=now.promised_cost,
        move_s=record.migration.move_s if record.migration else None,
    )  # fmt: skip


def _adapted(record: _Record, now: _InForce, decision: Decision, *, step: int, layer: int) -> tuple[_InForce, _Change]:
    """What is in force next, and what that took. A placement that is no better on what it saw is not adopted."""
    if not decision.replaces:
        return now, _Change()
    problem = record.problem(step, layer, window=decision.window)
    if decision.max_moves is None:
        fresh = record.fresh_TL[step][layer] if decision.window == 1 else record.place(problem, layer)
        block = problem.prices.gpus_per_node if problem.prices else problem.num_gpus
        found = renamed(problem, fresh.placement, now.placement, block=block)
    else:
        found = record.place(replace(problem, now=now.placement, max_moves=decision.max_moves), layer).placement
    stays, best = value(problem, _split(problem, now.placement)), value(problem, found)
    if best >= stays * (1 - _ROUNDING):
        found, best = now.placement, stays
    stood_EG, stands_EG = _here_EG(problem, now.placement), _here_EG(problem, found)
    seconds = record.migration.seconds(stood_EG, stands_EG) if record.migration else 0.0
    after = _InForce(placement=found, step=step, promised_cost=best / _mean(problem))
    return after, _Change(is_replaced=True, moves=found.moves_from(now.placement), migration_s=seconds)
