"""A compiled and simulated step against the closed form of its schedule: a free network, equal stages."""

from dataclasses import replace
from functools import lru_cache

import numpy as np
import pytest

from moeplan import catalogue, menu
from moeplan.compiler.compile_plan import compile_plan
from moeplan.cost.cost_model import Cost, CostModel, Shares
from moeplan.domain.cluster import Cluster
from moeplan.domain.plan import Plan
from moeplan.domain.program import Pass, Stream, Work
from moeplan.domain.scenario import Scenario
from moeplan.domain.timeline import Timeline
from moeplan.errors import PlanError
from moeplan.schedules import finish_times
from moeplan.simulator.simulate import simulate

RATIOS = [(1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (1.0, 2.0, 1.0), (1.0, 1.0, 2.0), (4.0, 4.0, 3.0), (0.25, 0.5, 0.125)]
SIZES = [
    (name, pp, microbatches, chunks)
    for name in ("gpipe", "one_f_one_b", "zero_bubble", "interleaved", "zbv", "dual_pipe")
    for pp in (2, 4)
    for microbatches in (1, 2, 4, 8, 16)
    for chunks in {"interleaved": (2, 4), "zbv": (2,), "dual_pipe": (2,)}.get(name, (1,))
]


def without_wires(cluster: Cluster) -> Cluster:
    """The same cluster with links of 1e30 bytes/s and no latency, on which an exchange starts at once."""
    gpu = replace(cluster.gpu, exchange_start_s=0.0)
    return replace(
        cluster,
        spec=cluster.spec.model_copy(update={"gpu": gpu}),
        bandwidth_bytes_per_s_K=np.full_like(cluster.bandwidth_bytes_per_s_K, 1e30),
        latency_s_K=np.zeros_like(cluster.latency_s_K),
    )


@lru_cache
def scenario(model: str, num_gpus: int, microbatches: int, num_layers: int) -> Scenario:
    """One node whose network is free, and a model of equal layers."""
    one_node = {"cluster.nodes": 1, "cluster.gpus_per_node": num_gpus, "cluster.nic.per_node": 1}
    given = catalogue.scenario_from(
        model=model, cluster="hgx-h100-rail", global_batch=microbatches, sequence=512, changes=one_node
    )
    equal = given.model.model_copy(update={"layers": given.model.layers[:1] * num_layers})
    return replace(given, cluster=without_wires(given.cluster), model=equal)


class EqualStages:
    """Costs of a layer's passes; the ends of the model and the optimizer cost nothing."""

    shares = Shares()

    def __init__(self, forward_s: float, input_s: float, weight_s: float) -> None:
        self.seconds = {"forward": forward_s, "input": input_s, "weight": weight_s}

    def cost(self, work: Work) -> Cost:
        if work.kind != "attention":
            return Cost(0.0, 0.0)
        ends = {kernel.name.rsplit("_", 1)[-1] for kernel in work.kernels}
        passes = [name for name, end in (("input", "dgrad"), ("weight", "wgrad")) if end in ends]
        return Cost(sum(self.seconds[name] for name in passes or ["forward"]), 0.0)


def plan_of(name: str, pp: int, chunks: int, layers_per_stage: int = 1) -> Plan:
    num_virtual = menu.load("schedules", name, "num_virtual_stages")(pp, chunks)
    stages = (layers_per_stage,) * num_virtual
    return Plan(dp=1, pp=pp, vpp=chunks, schedule=name, stages=stages, zero_dense=0, zero_expert=0)


def is_legal(name: str, pp: int, microbatches: int, chunks: int) -> bool:
    try:
        menu.load("schedules", name, "check")(pp, microbatches, num_chunks=chunks)
    except PlanError:
        return False
    return True


def simulated(name: str, pp: int, microbatches: int, chunks: int, costs: EqualStages | CostModel) -> Timeline:
    plan = plan_of(name, pp, chunks)
    given = scenario("tiny-dense", pp, microbatches, len(plan.stages))
    return simulate(compile_plan(plan, given), costs)  # type: ignore[arg-type]


CASES = [size for size in SIZES if is_legal(*size)]


def test_every_schedule_is_tried() -> None:
    assert {case[0] for case in CASES} == set(menu.names("schedules"))


@pytest.mark.parametrize(("name", "pp", "microbatches", "chunks"), CASES)
def test_the_simulated_step_is_the_closed_form_of_the_schedule(
    name: str, pp: int, microbatches: int, chunks: int
) -> None:
    form = menu.load("schedules", name, "ideal_step_s")
    for forward_s, input_s, weight_s in RATIOS:
        wanted_s = form(
            pp,
            microbatches,
            num_chunks=chunks,
            forward_s=forward_s,
            input_gradient_s=input_s,
            weight_gradient_s=weight_s,
        )
        if wanted_s is not None:
            found = simulated(name, pp, microbatches, chunks, EqualStages(forward_s, input_s, weight_s))
            if menu.load("schedules", name, "COPIES") == 1:
                assert found.step_s == pytest.approx(wanted_s, rel=1e-9)
            else:
                # In the form both passes of a slot end when the slot ends; here what ends first goes on at once.
                assert microbatches * (forward_s + input_s + weight_s) <= found.step_s <= wanted_s * (1 + 1e-9)


@pytest.mark.parametrize(("name", "pp", "microbatches", "chunks"), CASES)
def test_with_any_costs_the_simulated_step_is_what_the_order_alone_gives(
    name: str, pp: int, microbatches: int, chunks: int
) -> None:
    """Costs of a real GPU, where the ends of the model make stages unequal; two passes at once may hide nothing."""
    gpu = scenario("tiny-dense", pp, microbatches, 1).cluster.gpu
    timeline = simulated(name, pp, microbatches, chunks, CostModel(gpu=gpu))
    tasks, seconds = timeline.program.tasks, timeline.end_s_T - timeline.start_s_T
    stage_T = np.array([lane.stage for lane in timeline.program.lanes])[tasks.lane_T]

    def pass_s(stage: int, chunk: int, *passes: Pass) -> float:
        mine = (stage_T == stage) & (tasks.chunk_T == chunk) & np.isin(tasks.pass_T, passes)
        first = tasks.microbatch_T == tasks.microbatch_T[mine].min(initial=microbatches)
        chosen = mine & first & (tasks.stream_T == Stream.COMPUTE)
        return float(seconds[chosen].sum())

    def durations_s(stage: int, chunk: int) -> dict[str, float]:
        input_s, weight_s = pass_s(stage, chunk, Pass.INPUT_GRADIENT), pass_s(stage, chunk, Pass.WEIGHT_GRADIENT)
        whole_s = pass_s(stage, chunk, Pass.BACKWARD) or input_s + weight_s
        return {"F": pass_s(stage, chunk, Pass.FORWARD), "B": whole_s, "I": input_s or whole_s, "W": weight_s}

    virtual = menu.load("schedules", name, "virtual_stage")
    times = finish_times(
        menu.load("schedules", name, "actions")(pp, microbatches, num_chunks=chunks),
        virtual_stages=[[virtual(s, c, num_stages=pp, num_chunks=chunks) for c in range(chunks)] for s in range(pp)],
        durations_s=[[durations_s(stage, chunk) for chunk in range(chunks)] for stage in range(pp)],
    )
    update_s = np.bincount(stage_T, weights=seconds * (tasks.pass_T == Pass.STEP), minlength=pp)
    wanted_s = max(finish[-1] + extra for finish, extra in zip(times.finish_s, update_s, strict=True))
    if menu.load("schedules", name, "COPIES") == 1:
        assert timeline.step_s == pytest.approx(wanted_s, rel=1e-9)
    else:
        assert timeline.step_s <= wanted_s * (1 + 1e-9)


def test_a_slower_network_never_makes_a_step_shorter() -> None:
    plan, given = plan_of("one_f_one_b", 4, 1), scenario("tiny-dense", 4, 8, 4)
    steps = []
    for bandwidth in (1e30, 1e12, 1e10, 1e8):
        slower = np.full_like(given.cluster.bandwidth_bytes_per_s_K, bandwidth)
        cluster = replace(given.cluster, bandwidth_bytes_per_s_K=slower)
        program = compile_plan(plan, replace(given, cluster=cluster))
        steps.append(simulate(program, CostModel(gpu=cluster.gpu)).step_s)
    assert steps == sorted(steps)
    assert steps[0] < steps[-1]
