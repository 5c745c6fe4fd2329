"""Where the time of a step goes: parts that are disjoint and complete, and cases whose answer is known beforehand."""

from collections.abc import Sequence
from functools import lru_cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

from moeplan import catalogue
from moeplan.compiler.compile_plan import compile_plan
from moeplan.cost.cost_model import Cost, CostModel, Shares
from moeplan.domain.causes import CAUSES, breakdown_s, critical_path
from moeplan.domain.plan import Plan
from moeplan.domain.program import Exchange, Flows, Lane, Program, Rendezvous, Stream, Tasks, Work
from moeplan.domain.scenario import Scenario
from moeplan.domain.timeline import Timeline
from moeplan.simulator.simulate import simulate

COMPUTE, TENSOR, EXPERT, SHARD, PIPELINE = Stream
ONE_STAGE = {"dp": 4, "ep": 4, "stages": (4,)}
TWO_STAGES = {"dp": 2, "pp": 2, "ep": 2, "stages": (2, 2)}
CHUNKED = {"dp": 2, "pp": 2, "ep": 2, "vpp": 2, "stages": (1, 1, 1, 1)}
PLANS: list[dict[str, Any]] = [
    ONE_STAGE,
    {**ONE_STAGE, "overlap_degree": 2},
    {**ONE_STAGE, "overlap_degree": 2, "arbitration": "a2a_first", "zero_dense": 2, "zero_expert": 0, "ep": 2},
    {**ONE_STAGE, "zero_dense": 0, "zero_expert": 0, "ep": 2, "arbitration": "fifo"},
    {**ONE_STAGE, "zero_dense": 2, "zero_expert": 2, "ep": 2, "overlap_gradients": False},
    {**ONE_STAGE, "zero_dense": 3, "zero_expert": 3, "ep": 2},
    {**ONE_STAGE, "all_to_all": "two_stage", "recompute": "full"},
    {"dp": 2, "tp": 2, "ep": 2, "etp": 2, "stages": (4,)},
    {"dp": 1, "tp": 2, "cp": 2, "ep": 4, "stages": (4,), "recompute": "selective"},
    *({**TWO_STAGES, "schedule": name} for name in ("gpipe", "one_f_one_b", "zero_bubble")),
    {**TWO_STAGES, "stages": (1, 3), "overlap_degree": 2, "arbitration": "a2a_first"},
    {**CHUNKED, "schedule": "interleaved"},
    {**CHUNKED, "schedule": "zbv"},
    {**TWO_STAGES, "vpp": 2, "schedule": "dual_pipe"},
]


@lru_cache
def scenario(skew: float) -> Scenario:
    return catalogue.load("small-two-nodes", changes={"routing.skew": skew})


@lru_cache
def simulated(number: int, skew: float) -> Timeline:
    given = scenario(skew)
    return simulate(compile_plan(Plan(**PLANS[number]), given), CostModel(gpu=given.cluster.gpu))


def span_s(timeline: Timeline, *kinds: str) -> float:
    """Seconds of the busiest lane's tasks of some kinds."""
    mine = np.flatnonzero(timeline.program.tasks.lane_T == timeline.busiest_lane)
    chosen = [task for task in mine if timeline.program.kind(task) in kinds]
    return float((timeline.end_s_T - timeline.start_s_T)[chosen].sum())


# ---- laws, on compiled programs


@pytest.mark.parametrize("skew", [0.0, 1.0])
@pytest.mark.parametrize("number", range(len(PLANS)))
def test_the_causes_are_all_there_never_negative_and_sum_to_the_step(number: int, skew: float) -> None:
    timeline = simulated(number, skew)
    found = breakdown_s(timeline)
    assert tuple(found) == CAUSES
    assert min(found.values()) >= 0
    assert sum(found.values()) == timeline.step_s


@pytest.mark.parametrize("skew", [0.0, 1.0])
@pytest.mark.parametrize("number", range(len(PLANS)))
def test_computing_is_what_the_lane_computes_and_waiting_is_the_rest(number: int, skew: float) -> None:
    timeline = simulated(number, skew)
    found = breakdown_s(timeline)
    busy_s = timeline.busy_s(timeline.busiest_lane)
    computing = ("dense_compute", "expert_compute", "optimizer", "launch_overhead", "imbalance", "overlap_slowdown")
    computing_s = sum(found[cause] for cause in computing)
    assert computing_s >= busy_s * (1 - 1e-9)
    assert (
        sum(found[cause] for cause in CAUSES if cause not in computing)
        <= timeline.step_s - busy_s + 1e-9 * timeline.step_s
    )
    assert found["optimizer"] == pytest.approx(span_s(timeline, "optimizer"), rel=1e-6, abs=1e-5)
    if skew == 0.0:
        assert computing_s == pytest.approx(busy_s, rel=1e-9)
        assert found["imbalance"] == 0.0


@pytest.mark.parametrize("number", range(len(PLANS)))
def test_traffic_that_a_plan_does_not_have_costs_nothing(number: int) -> None:
    found, plan = breakdown_s(simulated(number, 1.0)), Plan(**PLANS[number])
    assert (found["pipeline_bubble"] + found["pipeline_traffic"] > 0) == (plan.pp > 1)
    assert (found["tensor_traffic"] > 0) == (plan.tp * plan.cp > 1)
    assert min(found["expert_compute"], found["dense_compute"], found["optimizer"]) > 0


@pytest.mark.parametrize("skew", [0.0, 1.0])
@pytest.mark.parametrize("number", range(len(PLANS)))
def test_the_critical_path_has_no_hole_from_the_end_to_the_start(number: int, skew: float) -> None:
    timeline = simulated(number, skew)
    path = critical_path(timeline)
    assert timeline.end_s_T[path[0]] == timeline.step_s
    assert timeline.start_s_T[path[-1]] == 0.0
    tasks, meetings = timeline.program.tasks, timeline.program.meetings
    for later, earlier in pairwise(path):
        alone = tasks.stream_T[later] == COMPUTE or len(meetings[tasks.unit_T[later]].lanes) == 1
        if alone:
            assert timeline.start_s_T[later] == timeline.end_s_T[earlier]
        assert timeline.start_s_T[later] <= timeline.end_s_T[earlier] <= timeline.end_s_T[later]


# ---- cases that are known beforehand


def test_without_a_pipeline_overlap_or_skew_all_of_the_all_to_all_is_exposed() -> None:
    timeline = simulated(0, 0.0)
    assert breakdown_s(timeline)["exposed_all_to_all"] == pytest.approx(
        span_s(timeline, "dispatch", "combine"), rel=1e-9
    )


def test_cutting_the_tokens_hides_all_to_all() -> None:
    whole, cut = simulated(0, 0.0), simulated(1, 0.0)
    assert breakdown_s(cut)["exposed_all_to_all"] < 0.9 * span_s(cut, "dispatch", "combine")
    assert span_s(whole, "experts") > 0


@pytest.mark.parametrize("skew", [0.5, 1.5])
def test_imbalance_is_what_the_busiest_rank_computes_beyond_the_mean(skew: float) -> None:
    given = scenario(skew)
    timeline = simulate(compile_plan(Plan(**ONE_STAGE), given), CostModel(gpu=given.cluster.gpu))
    program, seconds = timeline.program, timeline.end_s_T - timeline.start_s_T - timeline.launch_s_T
    experts = np.array([program.kind(task) == "experts" for task in range(len(seconds))])
    of_lane = np.bincount(program.tasks.lane_T[experts], weights=seconds[experts])
    ranks = np.array([lane.multiplicity for lane in program.lanes])
    mean_s = (of_lane * ranks).sum() / ranks.sum()
    found = breakdown_s(timeline)
    assert found["imbalance"] >= of_lane[timeline.busiest_lane] - mean_s > 0
    own_s = span_s(timeline, "experts", "merge")
    assert found["expert_compute"] < own_s - (of_lane[timeline.busiest_lane] - mean_s) + 1e-12


class OnePassOneSecond:
    """Costs under which a forward pass of a layer takes 1 s and a backward pass 2 s, whatever runs beside."""

    shares = Shares()

    def cost(self, work: Work) -> Cost:
        if work.kind != "attention":
            return Cost(0.0, 0.0)
        return Cost(2.0 if any(kernel.name.endswith("_dgrad") for kernel in work.kernels) else 1.0, 0.0)


@pytest.mark.parametrize("name", ["gpipe", "one_f_one_b"])
def test_the_bubble_of_gpipe_and_1f1b_is_p_minus_1_over_m(name: str) -> None:
    plan = Plan(dp=1, pp=4, stages=(1, 1, 1, 1), schedule=name, zero_dense=0, zero_expert=0)
    timeline = simulate(compile_plan(plan, scenario(0.0)), OnePassOneSecond())  # type: ignore[arg-type]
    found = breakdown_s(timeline)
    assert found["dense_compute"] == pytest.approx(16 * 3.0)
    assert found["pipeline_bubble"] + found["pipeline_traffic"] == pytest.approx(
        found["dense_compute"] * 3 / 16, rel=1e-3
    )
    assert found["pipeline_bubble"] == pytest.approx(9.0, rel=1e-3)


def test_a_large_program_is_explained_from_its_start() -> None:
    given = catalogue.load("mixtral-8x7b-64xh100", changes={"cluster.nodes": 1, "workload.global_batch": 32})
    timeline = simulate(compile_plan(Plan(dp=8, ep=8, stages=(32,)), given), CostModel(gpu=given.cluster.gpu))
    found = breakdown_s(timeline)
    assert sum(found.values()) == timeline.step_s
    assert found["expert_compute"] > found["exposed_all_to_all"] > found["gradient_traffic"] > 0


# ---- by hand: lane, stream, kind, start, end


Row = tuple[int, Stream, str, float, float]


def by_hand(rows: Sequence[Row], *, after: Sequence[tuple[int, int]], stages: Sequence[int] = (0,)) -> Timeline:
    """A measured timeline; exchanges of the same kind on several lanes meet, if they are not sends."""
    works = tuple(Work(kind=kind, kernels=()) for kind in dict.fromkeys(row[2] for row in rows if row[1] == COMPUTE))
    kinds = list(dict.fromkeys(row[2] for row in rows if row[1] != COMPUTE))
    members = [tuple(sorted({row[0] for row in rows if row[2] == kind})) for kind in kinds]
    group = np.arange(2)[None]
    exchanges = tuple(Exchange(kind=k, operation="", algorithm="", groups_NG=group, size_bytes=1.0) for k in kinds)
    meetings = tuple(Rendezvous(exchange=i, lanes=lanes, phases=()) for i, lanes in enumerate(members))
    names = [work.kind for work in works]
    unit = [names.index(row[2]) if row[1] == COMPUTE else kinds.index(row[2]) for row in rows]
    none = np.full(len(rows), -1)
    tasks = Tasks(
        lane_T=np.array([row[0] for row in rows]), stream_T=np.array([int(row[1]) for row in rows]),
        unit_T=np.array(unit), pass_T=none, layer_T=none, microbatch_T=none, chunk_T=none,
    )  # fmt: skip
    nothing = np.zeros(0)
    flows = Flows(
        share_C=nothing, extra_bytes_C=nothing,
        count_C=np.zeros(0, np.int64), crossing_CK=np.zeros((0, 0)), capacity_bytes_per_s_K=nothing,
        link_kind_K=(), num_links_K=np.zeros(0, np.int64), lanes_C=(),
    )  # fmt: skip
    ties = np.array(after, np.int64).reshape(-1, 2)
    program = Program(
        lanes=tuple(Lane(stage=stage, ranks_R=np.array([rank])) for rank, stage in enumerate(stages)), works=works,
        exchanges=exchanges, meetings=meetings, flows=flows, tasks=tasks, before_D=ties[:, 0], after_D=ties[:, 1],
        arbitration="fair", micro_op_bytes=1.0, step_tokens=1, model_flops=1.0, num_gpus=len(stages),
    )  # fmt: skip
    start, end = np.array([row[3] for row in rows]), np.array([row[4] for row in rows])
    return Timeline(program=program, start_s_T=start, end_s_T=end, launch_s_T=np.zeros(len(rows)), source="measured")


def parts(timeline: Timeline) -> dict[str, float]:
    return {cause: seconds for cause, seconds in breakdown_s(timeline).items() if seconds}


def test_a_wait_is_walked_back_through_all_that_led_to_it() -> None:
    rows: list[Row] = [
        (0, COMPUTE, "attention", 0, 4),
        (0, EXPERT, "dispatch", 4, 7),
        (0, TENSOR, "expert_tensor", 7, 9),
        (0, COMPUTE, "experts", 9, 15),
        (0, SHARD, "gradients", 15, 16),
    ]
    timeline = by_hand(rows, after=[(0, 1), (1, 2), (2, 3), (3, 4)])
    wanted = {
        "dense_compute": 4,
        "expert_compute": 6,
        "exposed_all_to_all": 3,
        "tensor_traffic": 2,
        "gradient_traffic": 1,
    }
    assert parts(timeline) == wanted
    assert critical_path(timeline) == [4, 3, 2, 1, 0]


def test_only_the_part_of_an_exchange_that_nothing_hides_is_exposed() -> None:
    rows: list[Row] = [
        (0, COMPUTE, "attention", 0, 2),
        (0, EXPERT, "dispatch", 2, 9),
        (0, COMPUTE, "shared", 2, 8),
        (0, COMPUTE, "experts", 9, 10),
    ]
    timeline = by_hand(rows, after=[(0, 1), (0, 2), (1, 3)])
    assert parts(timeline) == {"dense_compute": 8, "expert_compute": 1, "exposed_all_to_all": 1}
    assert critical_path(timeline) == [3, 1, 0]


def test_waiting_for_a_partner_of_the_same_stage_is_imbalance() -> None:
    rows: list[Row] = [
        (0, COMPUTE, "attention", 0, 2),
        (1, COMPUTE, "attention", 0, 5),
        (0, EXPERT, "combine", 2, 8),
        (1, EXPERT, "combine", 5, 8),
        (0, COMPUTE, "head", 8, 18),
        (1, COMPUTE, "head", 8, 12),
    ]
    after = [(0, 2), (1, 3), (2, 4), (3, 5)]
    timeline = by_hand(rows, after=after, stages=(0, 0))
    assert parts(timeline) == {"dense_compute": 12, "imbalance": 3, "exposed_all_to_all": 3}
    assert critical_path(timeline) == [4, 2, 1]
    assert parts(by_hand(rows, after=after, stages=(0, 1)))["pipeline_bubble"] == 3


def test_another_stage_is_a_bubble_and_its_send_is_traffic() -> None:
    rows: list[Row] = [
        (0, COMPUTE, "attention", 0, 3),
        (0, PIPELINE, "send", 3, 5),
        (1, COMPUTE, "attention", 5, 11),
        (1, COMPUTE, "attention", 12, 13),
        (0, COMPUTE, "head", 13, 15),
    ]
    timeline = by_hand(rows, after=[(0, 1), (1, 2), (3, 4)], stages=(0, 1))
    wanted = {"dense_compute": 7, "pipeline_traffic": 2, "pipeline_bubble": 5, "launch_overhead": 1}
    assert parts(timeline) == wanted
    assert critical_path(timeline) == [4, 3, 2, 1, 0]


def test_experts_beyond_the_mean_of_the_stage_are_imbalance() -> None:
    rows: list[Row] = [(lane, COMPUTE, "experts", 0, end) for lane, end in enumerate((2, 8, 5, 100))]
    timeline = by_hand(rows[:3], after=[], stages=(0, 0, 0))
    assert parts(timeline) == {"expert_compute": 5, "imbalance": 3}
    assert parts(by_hand(rows[:3], after=[], stages=(0, 1, 0))) == {"expert_compute": 8}
