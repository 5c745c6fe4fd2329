"""The law of the planners' menu: a legal plan that fits, the simulator's own figures, and an honest certificate."""

from __future__ import annotations

import itertools
import time
from functools import cache
from math import fsum

import pytest

import moeplan as mp
from moeplan import menu
from moeplan.partition import footprint
from moeplan.partition.legal import problems

PLANNERS = menu.names("planners")
EXACT = [name for name in PLANNERS if getattr(menu.module("planners", name), "IS_EXACT", True)]
SCENARIOS = ("small-4-gpus", "small-8-gpus", "small-two-nodes")


@cache
def found(planner: str, scenario: str) -> mp.PlanResult:
    return mp.plan(scenario, planner=planner, gap=0.0)


@pytest.fixture(params=itertools.product(PLANNERS, SCENARIOS), ids="-".join)
def result(request: pytest.FixtureRequest) -> mp.PlanResult:
    return found(*request.param)


def test_the_plan_is_legal(result: mp.PlanResult) -> None:
    assert list(problems(result.plan, mp.load(result.scenario))) == []


def test_the_plan_fits_and_its_memory_is_that_of_the_footprint(result: mp.PlanResult) -> None:
    scenario = mp.load(result.scenario)
    assert footprint.check_memory(result.plan, scenario) is None
    assert result.memory == footprint.footprint(result.plan, scenario)
    assert result.peak_memory_bytes == max(stage.total for stage in result.memory)
    assert all(stage.total <= stage.usable for stage in result.memory)


def test_the_figures_are_what_the_simulator_says(result: mp.PlanResult) -> None:
    figures = mp.simulate(result.scenario, result.plan).figures
    for name in ("step_s", "mfu", "tokens_per_s_per_gpu", "peak_memory_bytes", "breakdown_s"):
        assert getattr(result, name) == getattr(figures, name), name


def test_the_breakdown_sums_to_the_step(result: mp.PlanResult) -> None:
    assert min(result.breakdown_s.values()) >= 0
    assert fsum(result.breakdown_s.values()) == pytest.approx(result.step_s, rel=1e-9)


def test_the_gap_is_that_of_step_and_lower_bound(result: mp.PlanResult) -> None:
    assert 0 < result.lower_bound_s <= result.step_s
    assert result.gap == result.step_s / result.lower_bound_s - 1


def test_every_legal_plan_is_accounted_for_once(result: mp.PlanResult) -> None:
    counts = result.evaluated
    parts = (counts.infeasible_by_memory, counts.bounded_out, counts.simulated, counts.unresolved)
    assert sum(parts) == counts.legal
    assert min(parts) >= 0
    assert counts.simulated >= 1


def test_no_runner_up_beats_the_plan_or_its_own_bound(result: mp.PlanResult) -> None:
    for other in result.runners_up:
        assert list(problems(other.plan, mp.load(result.scenario))) == []
        assert other.plan != result.plan
        assert other.reason
        if other.step_s is not None:
            assert other.step_s >= result.step_s
            assert other.lower_bound_s <= other.step_s * (1 + 1e-9)


def test_result_and_plan_survive_being_written_and_read(result: mp.PlanResult) -> None:
    written = result.model_dump_json(by_alias=True)
    assert mp.PlanResult.model_validate_json(written) == result
    assert mp.PlanResult.model_validate_json(written).model_dump_json(by_alias=True) == written
    assert mp.Plan.model_validate_json(result.plan.model_dump_json(by_alias=True)) == result.plan


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("planner", PLANNERS)
def test_two_runs_give_the_same_bytes(planner: str, scenario: str) -> None:
    again = mp.plan(scenario, planner=planner, gap=0.0)
    assert again.model_dump_json(by_alias=True) == found(planner, scenario).model_dump_json(by_alias=True)


@pytest.mark.parametrize("planner", EXACT)
def test_a_wider_gap_is_kept_and_asks_for_no_more_work(planner: str) -> None:
    loose, tight = mp.plan("small-two-nodes", planner=planner, gap=0.25), found(planner, "small-two-nodes")
    assert loose.gap <= 0.25 * (1 + 1e-9)
    assert loose.lower_bound_s <= tight.step_s <= loose.step_s
    assert loose.evaluated.simulated <= tight.evaluated.simulated


@pytest.mark.parametrize("planner", EXACT)
def test_without_limits_a_small_scenario_is_proven_best(planner: str) -> None:
    free = mp.plan("small-4-gpus", planner=planner)
    assert free.step_s == found(planner, "small-4-gpus").step_s
    assert free.evaluated.unresolved == 0


def until_stopped(planner: str, time_limit_s: float) -> mp.PlanResult | str:
    """The result, or what the error says."""
    try:
        return mp.plan("small-two-nodes", planner=planner, time_limit_s=time_limit_s, gap=0.0)
    except mp.InfeasibleError as error:
        return str(error)


@pytest.mark.parametrize("looks", [1, 20, 60, 200])
@pytest.mark.parametrize("planner", PLANNERS)
def test_when_the_time_is_over_there_is_an_incumbent_or_an_error_that_names_time(
    planner: str, looks: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The clock goes on by a second at each look, so the time is over after `looks` of them on any machine."""
    ticks = itertools.count()
    with monkeypatch.context() as patch:
        patch.setattr(time, "monotonic", lambda: float(next(ticks)))
        stopped = until_stopped(planner, looks)
    if isinstance(stopped, str):
        assert "time limit" in stopped
        return
    best, counts = found(planner, "small-two-nodes"), stopped.evaluated
    assert stopped.lower_bound_s <= best.step_s * (1 + 1e-9)
    assert best.step_s <= stopped.step_s
    assert counts.infeasible_by_memory + counts.bounded_out + counts.simulated + counts.unresolved == counts.legal
    assert stopped.gap == stopped.step_s / stopped.lower_bound_s - 1


@pytest.mark.parametrize("planner", PLANNERS)
def test_progress_is_told_in_words_and_never_runs_past_its_end(planner: str) -> None:
    told: list[tuple[str, float, float | None]] = []
    mp.plan("small-4-gpus", planner=planner, progress=lambda *each: told.append(each))
    assert told
    for message, done, total in told:
        assert message
        assert total is None or done <= total * (1 + 1e-9)


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("planner", PLANNERS)
def test_no_plan_of_another_planner_beats_a_certificate(planner: str, scenario: str) -> None:
    bound_s, in_blocks = (
        found(planner, scenario).lower_bound_s,
        getattr(menu.module("planners", planner), "IN_BLOCKS", 0),
    )
    for other in PLANNERS:
        rival = found(other, scenario)
        assert rival.step_s >= bound_s * (1 - 1e-9) or (in_blocks and rival.plan.placement is not None), other


@pytest.mark.parametrize("scenario", SCENARIOS)
@pytest.mark.parametrize("planner", PLANNERS)
def test_no_planner_finds_a_faster_plan_than_ours(planner: str, scenario: str) -> None:
    assert found("ours", scenario).step_s <= found(planner, scenario).step_s * (1 + 1e-9)
