"""Ranks that are folded into one lane behave as they do when every GPU has a lane of its own."""

import hashlib
import subprocess
import sys
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from moeplan import catalogue
from moeplan.compiler.compile_plan import compile_plan
from moeplan.cost.cost_model import CostModel
from moeplan.domain.plan import Plan
from moeplan.domain.program import Program
from moeplan.domain.scenario import Scenario
from moeplan.domain.timeline import Timeline
from moeplan.simulator.simulate import simulate

FP16 = dict.fromkeys(("compute", "weights", "activations", "dispatch", "combine", "cache"), "fp16")
TOPOLOGIES: dict[str, dict[str, Any]] = {
    "rails": {"extends": "hgx-h100-rail", "nodes": 2, "gpus_per_node": 4, "nic": {"per_node": 4}},
    "one-switch": {"extends": "hgx-h100-rail", "nodes": 1, "gpus_per_node": 8},
    "sockets": {"extends": "johnny", "nodes": 2, "gpus_per_node": 8},
    "cube-mesh": {"extends": "p3.16xlarge", "nodes": 1},
    "torus": {"extends": "tpu-v4-torus", "nodes": 4, "fabric": {"shape": [4, 2, 2]}},
    "host": {"extends": "cpu-host", "gpus_per_node": 8},
}
ROUTINGS: dict[str, dict[str, Any]] = {
    "even": {"router": "balanced"},
    "skewed": {"router": "zipf", "skew": 1.0},
    "drawn": {"router": "multinomial"},
    "hot": {"router": "hot_experts", "share": 0.4},
}
ONE = {"stages": (4,)}
TWO = {"pp": 2, "stages": (2, 2), "schedule": "gpipe"}
FOUR = {"pp": 2, "vpp": 2, "stages": (1, 1, 1, 1)}
PLANS_OF_8: list[dict[str, Any]] = [
    {**ONE, "dp": 8, "ep": 8},
    {**ONE, "dp": 8, "ep": 4, "zero_dense": 0, "zero_expert": 0, "arbitration": "fifo"},
    {**ONE, "dp": 8, "ep": 4, "zero_dense": 2, "zero_expert": 2, "arbitration": "a2a_first"},
    {**ONE, "dp": 8, "ep": 2, "zero_dense": 3, "zero_expert": 3, "overlap_degree": 2},
    {**ONE, "dp": 4, "tp": 2, "ep": 4, "etp": 2, "overlap_degree": 2, "recompute": "selective"},
    {**ONE, "dp": 2, "tp": 2, "cp": 2, "ep": 8, "micro_batch": 2, "recompute": "full"},
    {**ONE, "dp": 4, "cp": 2, "ep": 4, "rank_order": "tp-cp-dp-ep-pp", "overlap_gradients": False},
    {**TWO, "dp": 4, "ep": 4},
    {**TWO, "dp": 4, "ep": 2, "schedule": "one_f_one_b", "rank_order": "tp-cp-ep-pp-dp", "arbitration": "fifo"},
    {**TWO, "dp": 2, "tp": 2, "ep": 4, "schedule": "zero_bubble", "rank_order": "tp-cp-dp-ep-pp", "zero_dense": 3},
    {**FOUR, "dp": 4, "ep": 4, "schedule": "interleaved", "zero_expert": 2},
    {**FOUR, "dp": 2, "cp": 2, "ep": 2, "schedule": "zbv", "rank_order": "tp-cp-ep-pp-dp"},
    {**TWO, "dp": 4, "ep": 4, "vpp": 2, "schedule": "dual_pipe", "overlap_degree": 2, "arbitration": "a2a_first"},
]
PLACED_ON_4 = {"experts": [[0, 1, 2, 2, 3, 4, 0, 5, 6, 7, 1, -1], [*range(8), 0, 1, 2, -1]] * 2}
PLACED_ON_8 = {"experts": [[expert for place in range(8) for expert in (place, (place + 3) % 8)]] * 4}
CASES: list[tuple[str, str, dict[str, Any]]] = [
    *(("rails", routing, plan) for routing in ("even", "skewed") for plan in PLANS_OF_8),
    *(("one-switch", "drawn", plan) for plan in PLANS_OF_8[::3]),
    *(("cube-mesh", routing, plan) for routing in ("even", "drawn") for plan in PLANS_OF_8[1::3]),
    *(("host", "hot", plan) for plan in PLANS_OF_8[2::3]),
    ("rails", "even", {**ONE, "dp": 8, "ep": 8, "all_to_all": "two_stage"}),
    ("rails", "drawn", {**ONE, "dp": 8, "ep": 8, "all_to_all": "two_stage", "arbitration": "fifo"}),
    ("rails", "drawn", {**ONE, "dp": 8, "ep": 8, "capacity": {"rule": "drop", "factor": 1.0}}),
    ("rails", "skewed", {**ONE, "dp": 8, "ep": 4, "capacity": {"rule": "pad", "factor": 1.25}}),
    ("rails", "drawn", {**ONE, "dp": 8, "ep": 4, "capacity": {"rule": "pad_to_max"}}),
    ("sockets", "even", {**ONE, "dp": 16, "ep": 8}),
    ("sockets", "skewed", {**ONE, "dp": 16, "ep": 8, "rank_order": "tp-cp-dp-ep-pp"}),
    ("sockets", "drawn", {**TWO, "dp": 4, "tp": 2, "ep": 4, "etp": 2}),
    ("sockets", "drawn", {**ONE, "dp": 16, "ep": 8, "arbitration": "a2a_first", "overlap_degree": 2}),
    ("torus", "even", {**ONE, "dp": 16, "ep": 8}),
    ("torus", "skewed", {**ONE, "dp": 8, "tp": 2, "ep": 4, "zero_dense": 3}),
    (
        "torus",
        "even",
        {**ONE, "dp": 16, "ep": 4, "etp": 2, "zero_dense": 2, "overlap_degree": 2, "arbitration": "fifo"},
    ),
    ("torus", "hot", {**ONE, "dp": 16, "ep": 8, "zero_dense": 3, "overlap_degree": 2, "arbitration": "a2a_first"}),
    ("one-switch", "hot", {**TWO, "dp": 4, "ep": 2, "stages": (3, 1), "zero_dense": 2, "arbitration": "fifo"}),
    ("cube-mesh", "even", {**FOUR, "dp": 4, "ep": 2, "schedule": "zbv", "stages": (2, 0, 0, 2), "arbitration": "fifo"}),
    ("torus", "drawn", {**TWO, "dp": 8, "ep": 8, "schedule": "one_f_one_b"}),
    *(
        ("rails", routing, {**plan, "placement": PLACED_ON_4})
        for routing in ("even", "skewed")
        for plan in (PLANS_OF_8[1], PLANS_OF_8[2], PLANS_OF_8[4], PLANS_OF_8[7], PLANS_OF_8[10], PLANS_OF_8[12])
    ),
    ("rails", "even", {**ONE, "dp": 8, "ep": 8, "placement": PLACED_ON_8}),
    ("rails", "drawn", {**ONE, "dp": 8, "ep": 8, "all_to_all": "node_dedup", "placement": PLACED_ON_8}),
    ("torus", "skewed", {**ONE, "dp": 16, "ep": 8, "zero_expert": 3, "placement": PLACED_ON_8}),
]


@lru_cache
def scenario(topology: str, routing: str) -> Scenario:
    old = topology in ("sockets", "cube-mesh")
    changes = {f"routing.{key}": value for key, value in ROUTINGS[routing].items()}
    changes |= {"cluster": TOPOLOGIES[topology], "workload.sequence": 256}
    return catalogue.load("small-two-nodes", changes=changes | ({"choose.precision": FP16} if old else {}))


def timeline(topology: str, routing: str, options: dict[str, Any], *, folded: bool) -> Timeline:
    given = scenario(topology, routing)
    precision = {"precision": FP16} if topology in ("sockets", "cube-mesh") else {}
    program = compile_plan(Plan(**options, **precision), given, folded=folded)
    return simulate(program, CostModel(gpu=given.cluster.gpu))


def by_lane(program: Program) -> list[np.ndarray]:
    """The tasks of each lane, stream by stream, in order."""
    tasks = program.tasks
    order = np.lexsort((np.arange(len(tasks)), tasks.stream_T, tasks.lane_T))
    return np.split(order, np.cumsum(np.bincount(tasks.lane_T))[:-1])


def names(program: Program, chosen: np.ndarray) -> list[tuple[Any, ...]]:
    tasks = program.tasks
    columns = (tasks.stream_T, tasks.pass_T, tasks.layer_T, tasks.microbatch_T, tasks.chunk_T)
    return [(program.kind(task), *(int(column[task]) for column in columns)) for task in chosen.tolist()]


@pytest.mark.parametrize("number", range(len(CASES)))
def test_folded_and_unfolded_give_every_rank_the_same_times(number: int) -> None:
    folded, whole = (timeline(*CASES[number], folded=folded) for folded in (True, False))
    assert folded.step_s == pytest.approx(whole.step_s, rel=1e-9)
    assert [lane.ranks_R.tolist() for lane in whole.program.lanes] == [[rank] for rank in range(whole.program.num_gpus)]
    of_rank = by_lane(whole.program)
    for lane, chosen in zip(folded.program.lanes, by_lane(folded.program), strict=True):
        wanted = names(folded.program, chosen)
        for rank in lane.ranks_R.tolist():
            assert names(whole.program, of_rank[rank]) == wanted
            for found_s, true_s in ((folded.start_s_T, whole.start_s_T), (folded.end_s_T, whole.end_s_T)):
                np.testing.assert_allclose(found_s[chosen], true_s[of_rank[rank]], rtol=1e-9, atol=1e-9 * whole.step_s)


def test_the_cases_leave_nothing_out() -> None:
    plans = [Plan(**options) for topology, _, options in CASES]
    assert len(plans) >= 40
    assert len({topology for topology, _, _ in CASES}) >= 4
    assert {plan.schedule for plan in plans} == {
        "gpipe",
        "one_f_one_b",
        "zero_bubble",
        "interleaved",
        "zbv",
        "dual_pipe",
    }
    assert {plan.zero_dense for plan in plans} == {0, 1, 2, 3}
    assert {plan.arbitration for plan in plans} == {"fair", "fifo", "a2a_first"}
    assert {plan.recompute for plan in plans} == {"none", "selective", "full"}


def test_even_routing_on_a_symmetric_cluster_needs_one_lane_for_each_stage() -> None:
    for topology, options, lanes in (
        ("rails", PLANS_OF_8[0], 1),
        ("rails", PLANS_OF_8[7], 2),
        ("host", PLANS_OF_8[0], 1),
    ):
        assert len(compile_plan(Plan(**options), scenario(topology, "even")).lanes) == lanes


def test_uneven_routing_needs_a_lane_for_each_place_and_not_for_each_replica() -> None:
    program = compile_plan(Plan(**ONE, dp=8, ep=4), scenario("rails", "drawn"))
    assert sorted(lane.ranks_R.tolist() for lane in program.lanes) == [[0, 4], [1, 5], [2, 6], [3, 7]]


def test_ranks_on_different_wires_are_never_merged() -> None:
    """In the cube mesh the links of a GPU are not all alike, so an all-to-all tells the GPUs apart by their wires."""
    program = compile_plan(Plan(**ONE, dp=8, ep=4, precision=FP16), scenario("cube-mesh", "even"))  # type: ignore[arg-type]
    assert len(program.lanes) > 1


def digest(number: int) -> str:
    found = timeline(*CASES[number], folded=True)
    return hashlib.sha256(found.start_s_T.tobytes() + found.end_s_T.tobytes()).hexdigest()


def test_the_same_seed_gives_the_same_bytes_in_every_process() -> None:
    numbers = [1, 17, 27, 40]
    wanted = [digest(number) for number in numbers]
    code = f"import sys; sys.path.insert(0, {str(__file__.rsplit('/', 1)[0])!r}); import test_folding as t; "
    code += f"print([t.digest(number) for number in {numbers}])"
    for seed in ("1", "2"):
        run = subprocess.run(
            [sys.executable, "-c", code], env={"PYTHONHASHSEED": seed, "PYTHONPATH": ":".join(sys.path)},
            capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert run.stdout.strip() == str(wanted)
