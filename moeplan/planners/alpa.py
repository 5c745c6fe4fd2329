"""Alpa: operators are sharded by an integer programme, stages cut by a dynamic one; the plan nearest to its answer.

For each number of micro-batches the shardings of every layer on every submesh are priced, and layers are cut into
stages on submeshes; the number is raised or lowered as long as that makes Alpa's own step time shorter. Its answer may
give each stage another submesh and each operator another sharding. A plan has one layout for all, so this is carried
over: the best cut whose stages are all on alike submeshes (Alpa's own, if they are), the degrees that most FLOP of its
layers ask for, the size of a micro-batch, recomputation, 1F1B. Where such a plan is not legal or does not fit, the
nearest one is taken. Not carried over: shardings of single operators, and stages that are not alike. As published,
exchanges are not overlapped, sends between stages cost nothing, and routing is taken as even: Alpa sees no data.
Reference: Zheng et al., "Alpa" (OSDI 2022), sections 4 and 5.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, replace
from itertools import product
from math import gcd, log2, prod

import numpy as np

from moeplan.domain.plan import Plan
from moeplan.domain.result import PlanResult
from moeplan.domain.scenario import Scenario
from moeplan.errors import InfeasibleError, PlanError
from moeplan.planners._meshes import mesh_of
from moeplan.planners._operators import Node, layer_graph
from moeplan.planners._published import certified, is_runnable
from moeplan.planners._search import Progress, Search, no_time
from moeplan.planners._sharded_layers import Pair, Sharder
from moeplan.planners._sharding import cheapest_sharding
from moeplan.planners._space import RECOMPUTE, Branch, Layout, Space
from moeplan.planners._stage_costs import Configuration, StageCosts, stage_costs
from moeplan.planners._stages_dp import Stage, Stages, cut_into_stages

IS_EXACT = False
_SCHEDULE = "one_f_one_b"
_DEGREES = ("pp", "tp", "cp", "ep", "etp")


@dataclass(frozen=True, kw_only=True, slots=True)
class Answer:
    """What Alpa says for one number of micro-batches."""

    costs: StageCosts
    stages: Stages
    microbatches: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Wish:
    """The layout that an answer asks for."""

    degrees: dict[str, int]
    micro_batch: float
    recompute: str
    cut: tuple[int, ...]


def plan(
    scenario: Scenario, *, time_limit_s: float | None = None, gap: float | None = None, progress: Progress | None = None
) -> PlanResult:
    """The plan nearest to what Alpa answers, simulated, with the least bound of the whole space as its certificate.

    `gap` changes nothing: Alpa finds what it finds. Raises PlanError for a workload that is no training, or choices
    without 1F1B, and InfeasibleError if nothing fits or the time is over before there is an answer.
    """
    _check(scenario)
    search = Search(Space(scenario), gap=gap, time_limit_s=time_limit_s, progress=progress)
    started = time.monotonic()

    def tell(answer: Answer) -> None:
        if progress is not None:
            said = f"{answer.microbatches} micro-batches, {len(answer.stages.stages)} stages"
            progress(f"{said}: Alpa expects {answer.stages.step_s:.4g} s", 0, 1)

    def is_over() -> bool:
        return time_limit_s is not None and time.monotonic() - started > time_limit_s

    sharder = Sharder(scenario)
    answer = best_answer(scenario, sharder, tell=tell, is_over=is_over)
    if answer is None:
        raise InfeasibleError(no_time(search))
    chosen = nearest_plan(search.space, wish_of(scenario, sharder, answer))
    search.simulate(chosen, search.plan_s(chosen))
    return certified(search, planner="alpa")


def _check(scenario: Scenario) -> None:
    where, schedules = scenario.name, scenario.choices.schedule
    if not scenario.workload.is_training:
        found = f"workload.phase {scenario.workload.phase!r}"
        raise PlanError(f"{where}: {found}, but planner 'alpa' plans training steps; use --planner ours")
    if schedules is not None and _SCHEDULE not in schedules:
        found = f"choose.schedule {', '.join(schedules)}"
        raise PlanError(f"{where}: {found}, but planner 'alpa' runs {_SCHEDULE}; allow it, or use --planner ours")


# ---- what Alpa says


def best_answer(
    scenario: Scenario, sharder: Sharder, *, tell: Callable[[Answer], None], is_over: Callable[[], bool]
) -> Answer | None:
    """The answer for the best number of micro-batches that a climb over powers of two finds; None if out of time.

    Raises InfeasibleError if for no number there are stages that fit.
    """
    batch = scenario.workload.global_batch
    counts = [batch >> k for k in range(batch.bit_length()) if batch % (1 << k) == 0]
    known: dict[int, Answer] = {}
    failed: dict[int, str] = {}

    def value(at: int) -> float:
        if not 0 <= at < len(counts) or (known and is_over()):
            return np.inf
        if at not in known and at not in failed:
            try:
                costs = stage_costs(scenario, sharder, counts[at])
                known[at] = Answer(costs=costs, stages=cut_into_stages(costs.problem), microbatches=counts[at])
                tell(known[at])
            except InfeasibleError as error:
                failed[at] = str(error)
        return known[at].stages.step_s if at in known else np.inf

    at = _bottom(value, len(counts))
    if is_over():
        return None
    if at not in known:
        raise InfeasibleError(f"{scenario.name}: {failed[at]}")
    return known[at]


def _bottom(value: Callable[[int], float], size: int) -> int:
    """Where a step to either side makes it no better; starts at the first finite value from the middle."""
    order = sorted(range(size), key=lambda at: (abs(at - size // 2), at))
    at = next((each for each in order if np.isfinite(value(each))), 0)
    while True:
        best = min((at, at - 1, at + 1), key=value)
        if best == at:
            return at
        at = best


# ---- what a plan can carry over


def wish_of(scenario: Scenario, sharder: Sharder, answer: Answer) -> Wish:
    """The cut into stages on alike submeshes, and the degrees of the configuration that most of its layers have."""
    submesh, stages = _alike(answer)
    layers: Counter[int] = Counter()
    for stage in stages:
        layers[stage.configuration] += (stage.end - stage.first) * (stage.submesh == submesh)
    configuration = answer.costs.configurations[submesh][layers.most_common(1)[0][0]]
    degrees = _degrees(scenario, sharder, answer, configuration, held=len(stages))
    ranks = int(answer.costs.problem.gpus_U[submesh]) / (degrees["tp"] * degrees["cp"])
    return Wish(
        degrees={"pp": len(stages), **degrees}, recompute=configuration.recompute,
        micro_batch=answer.costs.batch.sequences / ranks, cut=tuple(stage.end - stage.first for stage in stages),
    )  # fmt: skip


def _alike(answer: Answer) -> tuple[int, tuple[Stage, ...]]:
    """The best stages that are all on one submesh, and that submesh; Alpa's own answer if it is such.

    If there are none, Alpa's own stages, and the submesh on which most of its GPUs are.
    """
    problem = answer.costs.problem
    found: dict[int, Stages] = {}
    for submesh in np.flatnonzero(problem.num_gpus % problem.gpus_U == 0).tolist():
        alike = replace(
            problem, seconds_IJUC=problem.seconds_IJUC[:, :, [submesh]], most_IJUC=problem.most_IJUC[:, :, [submesh]],
            gpus_U=problem.gpus_U[[submesh]],
        )  # fmt: skip
        with suppress(InfeasibleError):
            found[submesh] = cut_into_stages(alike)
    if found:
        best = min(found, key=lambda each: found[each].step_s)
        return best, tuple(stage._replace(submesh=best) for stage in found[best].stages)
    used: Counter[int] = Counter()
    for stage in answer.stages.stages:
        used[stage.submesh] += int(problem.gpus_U[stage.submesh])
    return used.most_common(1)[0][0], answer.stages.stages


def _degrees(
    scenario: Scenario, sharder: Sharder, answer: Answer, configuration: Configuration, *, held: int
) -> dict[str, int]:
    """Axes by what most FLOP of the layer of most FLOP are divided by, where a layer has its share of the memory."""
    costs, mesh = answer.costs, mesh_of(scenario.cluster, configuration.shape)
    layers = Counter(scenario.model.all_layers)
    layer = max(layers, key=lambda each: layers[each] * each.active_parameters)
    graph = layer_graph(layer, costs.batch)
    sharded = sharder.sharded(
        graph, mesh, costs.batch, recompute=configuration.recompute, microbatches=answer.microbatches
    )
    share_bytes = scenario.cluster.gpu.usable_memory_bytes * held / len(scenario.model.all_layers)
    micro_batches = float(min(held, answer.microbatches))
    found = cheapest_sharding(sharded.problem(held=micro_batches, memory_bytes=share_bytes))
    found = found or cheapest_sharding(sharded.problem(held=micro_batches))
    assert found is not None, "some sharding is cheapest"
    pairs = {name: ways[at] for name, ways, at in zip(sharded.names, sharded.ways, found.choice, strict=True)}
    return _voted({name: graph.nodes[name]["node"] for name in graph}, pairs, mesh.shape, costs.batch.sequences)


def _voted(nodes: dict[str, Node], pairs: dict[str, Pair], shape: tuple[int, int], sequences: int) -> dict[str, int]:
    """Degrees from the shardings of a layer's products and attention.

    Shares of heads count as tensor parallelism even where products are divided by tokens: a plan has no other way to
    give a sequence to several GPUs but context parallelism, which is what shares of a sequence count as.
    """
    dense: list[Counter[str]] = [Counter(), Counter()]
    expert: list[Counter[str]] = [Counter(), Counter()]
    heads = tokens = 1
    for name, node in nodes.items():
        if node.operator.kind in ("gemm", "grouped_gemm", "attention"):
            for way, vote in zip(pairs[name], expert if node.role == "expert_gemm" else dense, strict=True):
                vote[way.divides] += node.operator.flops
        if node.gathered_elements:
            kinds = [(way.divides, size) for way, size in zip(pairs[name], shape, strict=True)]
            heads, tokens = (prod(size for what, size in kinds if what == each) for each in ("columns", "tokens"))
    tensor = max(heads, _product(dense, shape, ("columns", "depth")))
    tokens = min(tokens, prod(shape) // tensor)
    return {
        "tp": tensor, "cp": tokens // gcd(tokens, sequences), "ep": _product(expert, shape, ("experts",)),
        "etp": _product(expert, shape, ("columns", "depth")),
    }  # fmt: skip


def _product(votes: list[Counter[str]], shape: tuple[int, int], what: tuple[str, ...]) -> int:
    """The sizes of the axes along which most FLOP are divided in such a way."""
    return prod(s for vote, s in zip(votes, shape, strict=True) if vote and vote.most_common(1)[0][0] in what)


def nearest_plan(space: Space, wish: Wish) -> Plan:
    """The plan of the space nearest to a wish that fits, with the wished cut into stages where that fits too.

    The layout counts first: how often its degrees have to be doubled or halved.
    """
    scenario = space.scenario
    branches = [each for each in space.branches if each.layout.schedule == _SCHEDULE and each.layout.vpp == 1]
    for branch in sorted(branches, key=lambda each: (_distance(each.layout, wish), each.layout.stages != wish.cut)):
        for chosen in _plans(space, branch, wish):
            cut = chosen.model_copy(update={"stages": wish.cut}) if len(wish.cut) == chosen.pp else chosen
            for each in dict.fromkeys((cut, chosen)):
                if is_runnable(each, scenario):
                    return each
    raise InfeasibleError(f"{scenario.name}: no plan with {_SCHEDULE} fits; use --planner ours, or more GPUs")


def _distance(layout: Layout, wish: Wish) -> float:
    return sum(abs(log2(getattr(layout, name) / wish.degrees[name])) for name in _DEGREES)


def _plans(space: Space, branch: Branch, wish: Wish) -> Iterator[Plan]:
    """The plans of a branch, the nearest first: micro-batch, recomputation, ZeRO 1, nothing that Alpa has not."""

    def away(at: tuple[int, ...]) -> tuple[float, ...]:
        again = abs(RECOMPUTE.index(branch.recompute[at[1]]) - RECOMPUTE.index(wish.recompute))
        zero = abs(branch.zero_dense[at[4]] - 1) + abs(branch.zero_expert[at[5]] - 1)
        unlike = (branch.all_to_all[at[2]] != "linear") + (branch.overlap_degree[at[3]] != 1)
        return abs(log2(branch.micro_batch[at[0]] / wish.micro_batch)), again, unlike, zero

    sizes = [len(values) for values in branch.lists]
    for at in sorted(product(*map(range, sizes)), key=away):
        yield space.plan(branch, int(np.ravel_multi_index(at, sizes)))
