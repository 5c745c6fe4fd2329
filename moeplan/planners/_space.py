"""Every plan that a scenario allows, as columns of whole numbers: what a planner searches, and what a certificate
speaks of.

Degrees multiply to the number of GPUs; lists of what is not a degree come from the scenario's `choose`, else from the
defaults below. A combination that could not be told from another one is left out: an algorithm or an order that
changes no group, ZeRO over one replica, an overlap of nothing. Stages are split in two ways: evenly, and so that the
largest forward FLOP of a stage (embedding, head and multi-token prediction with it) is smallest.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cache, cached_property, lru_cache
from itertools import product
from math import lcm
from typing import Any

import numpy as np

from moeplan import menu
from moeplan.domain.model import Model
from moeplan.domain.plan import Arbitration, Plan, RankOrder
from moeplan.domain.scenario import Scenario
from moeplan.errors import PlanError
from moeplan.partition.ranks import groups, ranks_of_stage

MICRO_BATCHES = (1, 2, 4, 8, 16)
CHUNKS = (2, 3, 4, 6, 8)
OVERLAP_DEGREES = (1, 2, 4)
RECOMPUTE = ("none", "selective", "full")
RANK_ORDERS: tuple[RankOrder, ...] = ("tp-cp-ep-dp-pp", "tp-cp-dp-ep-pp", "tp-cp-ep-pp-dp")
ARBITRATIONS: tuple[Arbitration, ...] = ("fair", "fifo", "a2a_first")
ZERO = (0, 1, 2, 3)

Cuts = Callable[[int], list[tuple[int, ...]]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Layout:
    """The two grids over the machine, and the pipeline: what groups of GPUs there are."""

    dp: int
    tp: int
    cp: int
    pp: int
    ep: int
    etp: int
    rank_order: RankOrder
    schedule: str
    vpp: int
    stages: tuple[int, ...]
    replicas: tuple[int, int]
    """Ranks that hold the same dense weights, and the same experts."""
    copies: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Branch:
    """All plans of one layout: the product of the lists, in this order, the last running fastest."""

    layout: Layout
    micro_batch: tuple[int, ...]
    recompute: tuple[str, ...]
    all_to_all: tuple[str, ...]
    overlap_degree: tuple[int, ...]
    zero_dense: tuple[int, ...]
    zero_expert: tuple[int, ...]
    arbitration: tuple[Arbitration, ...]

    @property
    def lists(self) -> tuple[tuple[object, ...], ...]:
        """In the order of the product."""
        return (
            self.micro_batch, self.recompute, self.all_to_all, self.overlap_degree,
            self.zero_dense, self.zero_expert, self.arbitration,
        )  # fmt: skip

    @property
    def size(self) -> int:
        """How many plans."""
        return int(np.prod([len(values) for values in self.lists]))


@dataclass(frozen=True)
class Space:
    """The branches of a scenario. Raises PlanError when built from choices that leave none."""

    scenario: Scenario
    branches: tuple[Branch, ...] = field(init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "branches", tuple(_branches(self.scenario)))

    @cached_property
    def size(self) -> int:
        """How many plans."""
        return sum(branch.size for branch in self.branches)

    def plan(self, branch: Branch, index: int) -> Plan:
        """Plan number `index` of a branch."""
        where = np.unravel_index(index, [len(values) for values in branch.lists])
        names = ("micro_batch", "recompute", "all_to_all", "overlap_degree", "zero_dense", "zero_expert", "arbitration")
        chosen: dict[str, Any] = {name: values[at] for name, values, at in zip(names, branch.lists, where, strict=True)}
        layout, choices = branch.layout, self.scenario.choices
        return Plan(
            dp=layout.dp, tp=layout.tp, cp=layout.cp, pp=layout.pp, ep=layout.ep, etp=layout.etp, vpp=layout.vpp,
            rank_order=layout.rank_order, schedule=layout.schedule, stages=layout.stages, capacity=choices.capacity,
            precision=choices.precision, overlap_gradients=choices.overlap_gradients, **chosen,
        )  # fmt: skip


def _branches(scenario: Scenario) -> Iterator[Branch]:
    for layout in _layouts(scenario):
        micro_batches = _micro_batches(scenario, layout)
        if micro_batches and (branch := _branch(scenario, layout, micro_batches)).size:
            yield branch


def _branch(scenario: Scenario, layout: Layout, micro_batches: tuple[int, ...]) -> Branch:
    choices, training = scenario.choices, scenario.workload.is_training
    zero = [
        _zero(values, replicas, layout.copies, training)
        for values, replicas in zip((choices.zero_dense, choices.zero_expert), layout.replicas, strict=True)
    ]
    contended = training and max(layout.replicas) > 1
    return Branch(
        layout=layout,
        micro_batch=micro_batches,
        recompute=(choices.recompute or RECOMPUTE) if training else ("none",),
        all_to_all=_algorithms(scenario, layout),
        overlap_degree=_overlap_degrees(scenario, layout),
        zero_dense=zero[0],
        zero_expert=zero[1],
        arbitration=(choices.arbitration or ARBITRATIONS) if contended else (choices.arbitration or ARBITRATIONS)[:1],
    )


def _zero(values: tuple[int, ...] | None, replicas: int, copies: int, training: bool) -> tuple[int, ...]:
    """Over one replica all stages are one; two holders of a stage cannot do more than stage 1."""
    listed = values or ZERO
    if not training or replicas == 1:
        return listed[:1] if copies == 1 or listed[0] < 2 else (0,)
    return tuple(value for value in listed if copies == 1 or value < 2)


def _micro_batches(scenario: Scenario, layout: Layout) -> tuple[int, ...]:
    """Those that divide the batch and that the schedule can run."""
    batch, workload = scenario.workload.global_batch, scenario.workload
    found = []
    for size in scenario.choices.micro_batch or MICRO_BATCHES:
        if batch % (layout.dp * size) == 0 and batch >= layout.dp * size:
            microbatches = batch // (layout.dp * size)
            if not workload.is_training or _runs(layout.schedule, layout.pp, microbatches, layout.vpp):
                found.append(size)
    return tuple(found)


@lru_cache(maxsize=65536)
def _runs(schedule: str, pp: int, microbatches: int, vpp: int) -> bool:
    try:
        menu.load("schedules", schedule, "check")(pp, microbatches, num_chunks=vpp)
    except PlanError:
        return False
    return True


# ---- layouts


def _layouts(scenario: Scenario) -> Iterator[Layout]:
    model, choices, gpus = scenario.model, scenario.choices, scenario.cluster.num_gpus
    layers = len(model.all_layers)
    cuts = cache(lambda virtual: splits(scenario, virtual))
    for pp, tp, cp in product(_divisors(gpus), repeat=3):
        allowed = _allowed(choices.pp, pp) and _allowed(choices.tp, tp) and _allowed(choices.cp, cp)
        if not allowed or gpus % (pp * tp * cp) or pp > layers or not _splits(scenario, tp, cp):
            continue
        dp = gpus // (pp * tp * cp)
        if not _allowed(choices.dp, dp) or scenario.workload.global_batch % dp:
            continue
        for ep, etp in _expert_degrees(scenario, gpus // pp):
            for order in _orders(scenario, (dp, tp, cp, pp, ep, etp)):
                yield from _pipelines(scenario, cuts, dp=dp, tp=tp, cp=cp, pp=pp, ep=ep, etp=etp, rank_order=order)


def _pipelines(scenario: Scenario, cuts: Cuts, **grid: int | RankOrder) -> Iterator[Layout]:
    """Every schedule and number of chunks, with every split of the layers."""
    pp, layers = int(grid["pp"]), len(scenario.model.all_layers)
    stage_size = int(grid["dp"]) * int(grid["tp"]) * int(grid["cp"])
    for schedule, vpp in _schedules(scenario, pp):
        machine = menu.module("schedules", schedule)
        virtual = machine.num_virtual_stages(pp, vpp) if scenario.workload.is_training else pp
        if virtual > layers:
            continue
        copies = machine.COPIES if scenario.workload.is_training else 1
        edp = stage_size // (int(grid["ep"]) * int(grid["etp"]))
        replicas = (stage_size // int(grid["tp"]) * copies, edp * copies)
        for stages in cuts(virtual):
            yield Layout(**grid, schedule=schedule, vpp=vpp, stages=stages, replicas=replicas, copies=copies)  # type: ignore[arg-type]


def _schedules(scenario: Scenario, pp: int) -> Iterator[tuple[str, int]]:
    if not scenario.workload.is_training:
        yield "gpipe", 1
        return
    for schedule in scenario.choices.schedule or tuple(menu.names("schedules")):
        least, most = menu.load("schedules", schedule, "CHUNKS")
        for vpp in (1, *CHUNKS) if scenario.choices.vpp is None else scenario.choices.vpp:
            if vpp >= least and (most is None or vpp <= most):
                yield schedule, vpp


def _expert_degrees(scenario: Scenario, stage_size: int) -> Iterator[tuple[int, int]]:
    experts = list({id(layer.experts): layer.experts for layer in scenario.model.all_layers if layer.experts}.values())
    choices = scenario.choices
    for ep, etp in product(_divisors(stage_size), repeat=2):
        if stage_size % (ep * etp) or not (_allowed(choices.ep, ep) and _allowed(choices.etp, etp)):
            continue
        if (experts and all(e.num_experts % ep == 0 and e.width % etp == 0 for e in experts)) or (
            not experts and (ep, etp) == (1, 1)
        ):
            yield ep, etp


def _orders(scenario: Scenario, degrees: tuple[int, ...]) -> Iterator[RankOrder]:
    """Orders that group the GPUs differently: replicas near or far need both, stages inside need blocks."""
    dp, tp, cp, pp, ep, etp = degrees
    stage_size = dp * tp * cp
    block = lcm(tp * cp, etp * ep)
    for order in scenario.choices.rank_order or RANK_ORDERS:
        given = scenario.choices.rank_order is not None and len(scenario.choices.rank_order) == 1
        if order == "tp-cp-dp-ep-pp" and not given and (ep == 1 or stage_size == ep * etp):
            continue
        if order == "tp-cp-ep-pp-dp" and (stage_size % block or (not given and (pp == 1 or block == stage_size))):
            continue
        yield order


def _algorithms(scenario: Scenario, layout: Layout) -> tuple[str, ...]:
    """The all-to-alls that differ on these groups; none if none that is listed does."""
    listed = scenario.choices.all_to_all or all_to_alls()
    return tuple(name for name in listed if name == "linear" or (layout.ep > 1 and _applies(name, scenario, layout)))


def _overlap_degrees(scenario: Scenario, layout: Layout) -> tuple[int, ...]:
    """Without an exchange there is nothing to overlap."""
    return tuple(n for n in scenario.choices.overlap_degree or OVERLAP_DEGREES if layout.ep > 1 or n == 1)


def _applies(name: str, scenario: Scenario, layout: Layout) -> bool:
    plan = Plan(
        dp=layout.dp, tp=layout.tp, cp=layout.cp, pp=layout.pp, ep=layout.ep, etp=layout.etp,
        rank_order=layout.rank_order, stages=layout.stages,
    )  # fmt: skip
    members = ranks_of_stage(plan, 0)[groups(plan, ("ep",))]
    return bool(menu.load("collectives", name, "applies")(members, scenario.cluster))


@lru_cache
def all_to_alls() -> tuple[str, ...]:
    """The all-to-alls of the `collectives` menu that are tried unasked."""
    names = menu.names("collectives")
    return tuple(name for name in names if getattr(menu.module("collectives", name), "IS_USUAL", False))


def _splits(scenario: Scenario, tp: int, cp: int) -> bool:
    """Whether heads, widths and the sequence can be divided so."""
    if scenario.workload.query_length % cp:
        return False
    try:
        for layer in {id(layer): layer for layer in scenario.model.all_layers}.values():
            layer.dense_parameters_per_rank(tp)
    except PlanError:
        return False
    return True


def no_layout(scenario: Scenario) -> str:
    """Why the space is empty: which choices could each be given up for a plan to exist, and for what."""
    choices, ways = scenario.choices, []
    for name, listed in choices:
        if isinstance(listed, tuple):
            free = replace(scenario, choices=choices.model_copy(update={name: None}))
            branch = next(_branches(free), None)
            if branch is not None:
                value = getattr(branch.layout, name, None) or getattr(branch, name, (None,))[0]
                ways.append(f"choose.{name} {', '.join(map(str, listed))} (use {value})")
    suits = f"suit {' or '.join(choices.schedule)}" if choices.schedule else "suit a schedule"
    rule = f"degrees must divide GPUs, heads, experts, layers, the batch and the sequence, and {suits}"
    found = f"{scenario.name}: no plan of {scenario.cluster.num_gpus} GPUs is legal under `choose`: {rule}"
    if not ways:
        return (
            f"{found}; widen choose, or use a global batch that has more divisors than {scenario.workload.global_batch}"
        )
    return f"{found}; change one of: {'; '.join(ways)}"


# ---- stages


def splits(scenario: Scenario, virtual: int) -> list[tuple[int, ...]]:
    """The ways to cut the layers into `virtual` stages: even, and even in FLOP, if they differ."""
    layers = len(scenario.model.all_layers)
    whole, rest = divmod(layers, virtual)
    even = tuple(whole + (stage < rest) for stage in range(virtual))
    train_mtp = scenario.workload.is_training and scenario.workload.train_mtp
    balanced = _balanced(layer_flops(scenario.model, scenario.workload.sequence, train_mtp), virtual)
    return list(dict.fromkeys((balanced, even)))


def layer_flops(model: Model, sequence: int, train_mtp: bool) -> tuple[int, ...]:
    """Forward FLOP of each layer for one sequence; the first has the embedding's, the last head and MTP modules."""
    known = {
        id(layer): layer.forward_flops(tokens=sequence, sequence=sequence, context=sequence)
        for layer in {id(layer): layer for layer in model.all_layers}.values()
    }
    flops = [known[id(layer)] for layer in model.all_layers]
    head = sum(o.flops for o in model.head_operators(tokens=sequence))
    flops[-1] += head
    if model.mtp is not None and train_mtp:
        modules = sum(
            layer.forward_flops(tokens=sequence, sequence=sequence, context=sequence) for layer in model.mtp.layers
        )
        flops[-1] += model.mtp.depth * (modules + head + 4 * sequence * model.hidden_size**2)
    return tuple(flops)


@lru_cache(maxsize=256)
def _balanced(costs: tuple[int, ...], parts: int) -> tuple[int, ...]:
    """Consecutive parts, none empty, with the smallest largest cost: by dynamic programming over prefixes."""
    sums = np.concatenate([[0], np.cumsum(np.array(costs, np.float64))])
    size = len(costs)
    best = np.full((parts + 1, size + 1), np.inf)
    cut = np.zeros((parts + 1, size + 1), np.int64)
    best[0, 0] = 0.0
    for part in range(1, parts + 1):
        for end in range(part, size + 1):
            worst = np.maximum(best[part - 1, part - 1 : end], sums[end] - sums[part - 1 : end])
            cut[part, end] = int(worst.argmin()) + part - 1
            best[part, end] = worst.min()
    found, end = [], size
    for part in range(parts, 0, -1):
        found.append(end - int(cut[part, end]))
        end = int(cut[part, end])
    return tuple(found[::-1])


def _allowed(values: Sequence[int] | None, value: int) -> bool:
    return values is None or value in values


@lru_cache
def _divisors(number: int) -> tuple[int, ...]:
    return tuple(each for each in range(1, number + 1) if number % each == 0)


def branch_of(plan: Plan, copies: int, replicas: tuple[int, int]) -> Branch:
    """A branch of one plan."""
    layout = Layout(
        dp=plan.dp, tp=plan.tp, cp=plan.cp, pp=plan.pp, ep=plan.ep, etp=plan.etp, rank_order=plan.rank_order,
        schedule=plan.schedule, vpp=plan.vpp, stages=plan.stages, replicas=replicas, copies=copies,
    )  # fmt: skip
    return Branch(
        layout=layout, micro_batch=(plan.micro_batch,), recompute=(plan.recompute,), all_to_all=(plan.all_to_all,),
        overlap_degree=(plan.overlap_degree,), zero_dense=(plan.zero_dense,), zero_expert=(plan.zero_expert,),
        arbitration=(plan.arbitration,),
    )  # fmt: skip


def row_of(branch: Branch, row: int) -> Branch:
    """The plans of a branch of one micro-batch, recomputation, all-to-all and overlap."""
    m, r, a, o = np.unravel_index(row, [len(values) for values in branch.lists[:4]])
    return replace(
        branch, micro_batch=(branch.micro_batch[m],), recompute=(branch.recompute[r],),
        all_to_all=(branch.all_to_all[a],), overlap_degree=(branch.overlap_degree[o],),
    )  # fmt: skip
