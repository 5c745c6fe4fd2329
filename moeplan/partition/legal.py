"""What a plan must satisfy to be run at all: divisibility, sizes, and choices that have an effect. Memory is another
matter.
"""

from __future__ import annotations

from collections.abc import Iterator
from types import ModuleType

from moeplan import menu
from moeplan.domain.feed_forward import Experts
from moeplan.domain.placement import EMPTY, Placement
from moeplan.domain.plan import Plan
from moeplan.domain.scenario import Scenario
from moeplan.errors import PlanError
from moeplan.partition.ranks import block_size, groups, ranks_of_stage


def check_plan(plan: Plan, scenario: Scenario) -> None:
    """Raises PlanError for the first thing that `plan` breaks; see the functions below for what is asked."""
    for problem in problems(plan, scenario):
        raise PlanError(f"plan: {problem}")


def problems(plan: Plan, scenario: Scenario) -> Iterator[str]:
    """Every reason why `plan` cannot be run in `scenario`, each with what is allowed."""
    first = list(_size_problems(plan, scenario))
    yield from first
    if not first:
        yield from _model_problems(plan, scenario)
        yield from _schedule_problems(plan, scenario)
        yield from _effect_problems(plan, scenario)


def _size_problems(plan: Plan, scenario: Scenario) -> Iterator[str]:
    gpus, batch = scenario.cluster.num_gpus, scenario.workload.global_batch
    if plan.world_size != gpus:
        degrees = f"dp {plan.dp} x tp {plan.tp} x cp {plan.cp} x pp {plan.pp}"
        found = f"{degrees} = {plan.world_size} GPUs, but the cluster has {gpus}"
        yield f"{found}; plan again, or use the scenario that the plan was made for"
    if plan.stage_size % (plan.ep * plan.etp):
        yield f"ep {plan.ep} x etp {plan.etp} does not divide the {plan.stage_size} GPUs of a stage (dp x tp x cp)"
        return
    if batch % (plan.dp * plan.micro_batch):
        yield f"micro_batch {plan.micro_batch} x dp {plan.dp} does not divide global_batch {batch}"
    try:
        block_size(plan)
    except PlanError as error:
        yield str(error)


def _model_problems(plan: Plan, scenario: Scenario) -> Iterator[str]:
    model, workload = scenario.model, scenario.workload
    if sum(plan.stages) != len(model.all_layers):
        yield f"stages hold {sum(plan.stages)} layers, but the model has {len(model.all_layers)}"
    if workload.query_length % plan.cp:
        yield f"cp {plan.cp} does not divide the sequence of {workload.query_length} tokens"
    for experts in dict.fromkeys(layer.experts for layer in model.all_layers if layer.experts):
        if plan.placement is None and experts.num_experts % plan.ep:
            yield f"ep {plan.ep} does not divide {experts.num_experts} experts"
        if experts.width % plan.etp:
            yield f"etp {plan.etp} does not divide the expert width {experts.width}"
    if plan.placement is not None:
        found = [layer.experts for layer in model.all_layers if layer.experts]
        yield from _placement_problems(plan.placement, found, plan.ep)
    try:
        for layer in dict.fromkeys(model.all_layers):
            layer.dense_parameters_per_rank(plan.tp)
    except PlanError as error:
        yield str(error)


def _placement_problems(placement: Placement, layers: list[Experts], ep: int) -> Iterator[str]:
    if ep == 1:
        yield "placement has no effect without expert parallelism; leave it out, or use a plan with ep 2 or more"
    elif len(placement.experts) != len(layers):
        found = f"placement.experts: {len(placement.experts)} layers, but the model has {len(layers)} with experts"
        yield f"{found}; give a row for each, or place the experts of this model"
    elif placement.num_slots % ep:
        yield f"placement.experts: ep {ep} does not divide {placement.num_slots} slots; fill up with -1, an empty slot"
    else:
        for number, (row, experts) in enumerate(zip(placement.experts, layers, strict=True)):
            yield from _row_problems(row, experts.num_experts, ep, where=f"placement.experts[{number}]")


def _row_problems(row: tuple[int, ...], num_experts: int, ep: int, *, where: str) -> Iterator[str]:
    wrong, missing = sorted(set(row) - set(range(EMPTY, num_experts))), set(range(num_experts)) - set(row)
    if wrong:
        yield f"{where}: expert {wrong[0]} is not one of 0 to {num_experts - 1}; use those, or -1 for an empty slot"
    if missing:
        yield f"{where}: expert {min(missing)} stands nowhere; give each of {num_experts} experts a slot"
    per_place = len(row) // ep
    for place in range(ep):
        held = [expert for expert in row[place * per_place : (place + 1) * per_place] if expert != EMPTY]
        if len(set(held)) < len(held):
            twice = next(expert for expert in held if held.count(expert) > 1)
            yield f"{where}: expert {twice} stands twice on place {place}; move one of them to another place"
            return


def _schedule_problems(plan: Plan, scenario: Scenario) -> Iterator[str]:
    schedule = menu.module("schedules", plan.schedule)
    microbatches = plan.num_microbatches(scenario.workload.global_batch)
    if not scenario.workload.is_training:
        if plan.schedule != "gpipe" or plan.vpp != 1:
            found = f"schedule {plan.schedule} with vpp {plan.vpp}"
            yield f"{found} has no effect without a backward pass; use gpipe with vpp 1"
        elif len(plan.stages) != plan.pp:
            yield f"stages has {len(plan.stages)} entries, but there are pp {plan.pp} stages"
        return
    yield from _chunk_problems(plan, schedule)
    try:
        schedule.check(plan.pp, microbatches, num_chunks=plan.vpp)
    except PlanError as error:
        yield str(error)
    else:
        wanted = schedule.num_virtual_stages(plan.pp, plan.vpp)
        if len(plan.stages) != wanted:
            yield f"stages has {len(plan.stages)} entries, but schedule {plan.schedule} has {wanted} virtual stages"


def _chunk_problems(plan: Plan, schedule: ModuleType) -> Iterator[str]:
    if schedule.COPIES > 1 and max(plan.zero_dense, plan.zero_expert) > 1:
        yield f"schedule {plan.schedule} meets each stage's replicas in opposite orders; use ZeRO 0 or 1"


def _effect_problems(plan: Plan, scenario: Scenario) -> Iterator[str]:
    has_experts = any(layer.is_moe for layer in scenario.model.all_layers)
    if not has_experts and (plan.ep, plan.etp, plan.overlap_degree) != (1, 1, 1):
        yield "ep, etp and overlap_degree have no effect on a model without experts; use 1"
    operations = menu.load("collectives", plan.all_to_all, "OPERATIONS")
    if "all_to_all" not in operations:
        yield f"all_to_all {plan.all_to_all!r} does {', '.join(operations)}, not an all-to-all"
    elif plan.all_to_all != "linear":
        members = ranks_of_stage(plan, 0)[groups(plan, ("ep",))]
        applies = menu.load("collectives", plan.all_to_all, "applies")
        if plan.ep == 1 or not applies(members, scenario.cluster):
            yield f"all_to_all {plan.all_to_all!r} has no effect on these expert-parallel groups; use 'linear'"
    if plan.ep == 1 and plan.overlap_degree > 1:
        yield f"overlap_degree {plan.overlap_degree} has no effect without expert parallelism; use 1"
