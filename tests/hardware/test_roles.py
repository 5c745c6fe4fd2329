"""A rank alone: it runs its own program, exchanges take as long as they are predicted to, and memory is counted."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch

from moeplan import catalogue
from moeplan.compiler.compile_plan import compile_plan
from moeplan.cost.cost_model import CostModel
from moeplan.domain.plan import Plan
from moeplan.domain.program import Stream
from moeplan.domain.scenario import Scenario
from moeplan.errors import ExecutionError
from moeplan.executing import execute_roles
from moeplan.executor.delayed import Delays
from moeplan.executor.lane import Message
from moeplan.executor.roles import Role, roles_of
from moeplan.simulator.simulate import simulate


def tiny(**changes: Any) -> Scenario:
    slow = {"cluster.links.loopback.bandwidth": "10 MB/s", "routing.skew": 1.0, "workload.sequence": 32}
    return catalogue.load("tiny-moe-4-ranks", changes=slow | changes)


def plan(given: Scenario, **options: Any) -> Plan:
    return Plan(**({"dp": 4, "ep": 4, "stages": (4,), "precision": given.choices.precision} | options))


def test_roles_are_the_ends_of_the_pipeline_and_the_extremes_of_the_experts() -> None:
    given = tiny()
    flat = roles_of(compile_plan(plan(given), given, folded=False))
    assert sorted(flat.values()) == ["coldest experts", "hottest experts"]
    staged = roles_of(compile_plan(plan(given, dp=2, ep=2, pp=2, stages=(2, 2)), given, folded=False))
    assert sorted(staged.values()) == [
        f"{stage} stage, {heat} experts" for stage in ("first", "last") for heat in ("coldest", "hottest")
    ]
    deep = roles_of(compile_plan(plan(given, dp=1, ep=1, pp=4, stages=(1, 1, 1, 1)), given, folded=False))
    assert sorted(deep.values()) == [f"{stage} stage, any experts" for stage in ("first", "last", "middle")]


EVEN = {"routing.skew": 0.0}
"""So that a stage has one role."""


@pytest.fixture(scope="module")
def roles() -> list[Role]:
    given = tiny(**EVEN)
    return execute_roles(given, plan(given, dp=2, ep=2, pp=2, stages=(2, 2)), steps=2, device="cpu")


def test_each_role_does_its_own_work(roles: list[Role]) -> None:
    assert [role.name for role in roles] == ["first stage, any experts", "last stage, any experts"]
    for role in roles:
        assert set(role.busy_s) == {"attention", "experts", "merge", "optimizer", "head"}
        assert all(said > 0 and took > 0 for said, took in role.busy_s.values())
        assert role.allocated_bytes > 0


def test_exchanges_take_at_least_what_is_predicted(roles: list[Role]) -> None:
    given = tiny(**EVEN)
    program = compile_plan(plan(given, dp=2, ep=2, pp=2, stages=(2, 2)), given, folded=False)
    predicted = simulate(program, CostModel(gpu=given.cluster.gpu))
    for role in roles:
        mine = np.flatnonzero((program.tasks.lane_T == role.rank) & (program.tasks.stream_T == Stream.EXPERT))
        waited_s = float((predicted.end_s_T[mine] - predicted.start_s_T[mine]).min()) * len(mine)
        assert waited_s > 0.1
        assert role.step_s > waited_s


def test_an_exchange_waits_for_the_others_and_then_takes_its_time() -> None:
    delays, took_s = Delays({"7": (0.05, 0.02), "8": (0.0, 0.03)}, torch.device("cpu")), []
    import time

    def handle(one: Message) -> None:
        begun_s = time.monotonic()
        delays.wait()
        delays.wait()
        took_s.append(time.monotonic() - begun_s)

    delays.begin()
    for task in (7, 8, 9):
        delays.before(handle)(Message(task, 0, 0, 0, False))
    assert took_s[0] > 0.06
    assert took_s[1] >= 0.03
    assert took_s[2] < took_s[0]


def test_what_cannot_be_run_is_refused_for_roles_too() -> None:
    given = tiny()
    with pytest.raises(ExecutionError, match="recompute 'selective'"):
        execute_roles(given, plan(given, recompute="selective"), device="cpu")
    with pytest.raises(ExecutionError, match="steps: 0 is none"):
        execute_roles(given, plan(given), steps=0, device="cpu")


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu_its_allocator_is_counted() -> None:
    given = tiny()
    for role in execute_roles(given, plan(given), steps=3, device="cuda"):
        assert role.device == "cuda"
        assert 0 < role.allocated_bytes <= role.reserved_bytes
        assert role.step_s > 0
