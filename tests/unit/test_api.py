"""The verbs in Python: load, plan, simulate, export, what_if and sweep."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import moeplan as mp
from moeplan.grid import in_short

SMALL = "tiny-moe-2-ranks"
FEW = {
    "choose.tp": 1, "choose.cp": 1, "choose.ep": 2, "choose.etp": 1, "choose.micro_batch": 1,
    "choose.recompute": "none", "choose.zero_dense": 1, "choose.zero_expert": 1, "choose.overlap_degree": 1,
    "choose.schedule": "one_f_one_b", "choose.rank_order": "tp-cp-ep-dp-pp", "choose.arbitration": "fair",
    "choose.all_to_all": "linear",
}  # fmt: skip
"""What leaves few plans, so that they are sought quickly."""


@pytest.fixture(scope="module")
def scenario() -> mp.Scenario:
    return mp.load(SMALL, FEW)


@pytest.fixture(scope="module")
def result(scenario: mp.Scenario) -> mp.PlanResult:
    return mp.plan(scenario)


@pytest.fixture(scope="module")
def simulation(scenario: mp.Scenario, result: mp.PlanResult) -> mp.Simulation:
    return mp.simulate(scenario, result.plan)


# load


def test_a_scenario_is_found_by_name_path_document_and_itself(tmp_path: Path) -> None:
    found = mp.load(SMALL)
    (tmp_path / "it.json").write_text(json.dumps(dict(found.document)))
    assert found == mp.load(tmp_path / "it.json") == mp.load(str(tmp_path / "it.json"))
    assert found == mp.load(found.document) == mp.load(found)


def test_a_change_leaves_the_scenario_itself_as_it_was() -> None:
    found = mp.load(SMALL)
    before = json.dumps(found.document)
    assert mp.load(found, {"workload.global_batch": 16}).workload.global_batch == 16
    assert json.dumps(found.document) == before
    assert found.workload.global_batch == 8


def test_a_cluster_can_be_replaced_and_changed_at_once() -> None:
    found = mp.load("small-8-gpus", {"cluster": "hgx-h200-rail", "nodes": 2, "cluster.nic.bandwidth": "25 GB/s"})
    assert (found.cluster.name, found.cluster.num_nodes) == ("hgx-h200-rail", 2)
    assert found.cluster.spec.nic is not None
    assert found.cluster.spec.nic.bandwidth_bytes_per_s == 25e9


def test_a_change_to_a_field_that_is_not_there_is_refused() -> None:
    with pytest.raises(mp.CatalogueError, match="nodez"):
        mp.load(SMALL, {"nodez": 4})


# plan


def test_a_plan_names_its_scenario_and_is_within_its_certificate(result: mp.PlanResult, scenario: mp.Scenario) -> None:
    assert mp.load(result.scenario) == scenario
    assert result.lower_bound_s <= result.step_s
    assert result.gap == pytest.approx(result.step_s / result.lower_bound_s - 1, abs=1e-12)


def test_a_result_survives_being_written_and_read(result: mp.PlanResult) -> None:
    assert mp.PlanResult.model_validate_json(result.model_dump_json(by_alias=True)) == result


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"planner": "exhaustife"}, "did you mean 'exhaustive'"),
        ({"gap": -0.1}, "0.01"),
        ({"gap": float("nan")}, "0.01"),
        ({"time_limit_s": 0}, "such as 60"),
        ({"time_limit_s": float("inf")}, "such as 60"),
    ],
)
def test_an_option_without_sense_is_refused_with_a_remedy(options: dict[str, Any], words: str) -> None:
    for ask in (lambda: mp.plan(SMALL, **options), lambda: mp.what_if(SMALL, {"nodes": 1}, **options)):
        with pytest.raises(mp.MoeplanError, match=words):
            ask()


# simulate


def test_simulating_the_plan_gives_the_figures_of_the_result(result: mp.PlanResult, simulation: mp.Simulation) -> None:
    for name in mp.Figures.model_fields:
        assert getattr(simulation.figures, name) == getattr(result, name)


def test_the_parts_of_the_step_sum_to_the_step(simulation: mp.Simulation) -> None:
    assert sum(simulation.figures.breakdown_s.values()) == pytest.approx(simulation.figures.step_s, rel=1e-12)


def test_a_plan_is_taken_as_itself_as_a_result_and_from_a_file(
    scenario: mp.Scenario, result: mp.PlanResult, simulation: mp.Simulation, tmp_path: Path
) -> None:
    (tmp_path / "result.json").write_text(result.model_dump_json(by_alias=True))
    (tmp_path / "plan.json").write_text(result.plan.model_dump_json(by_alias=True))
    for plan in (result, tmp_path / "result.json", str(tmp_path / "plan.json")):
        assert mp.simulate(scenario, plan).figures == simulation.figures


def test_noise_makes_the_step_longer_and_the_seed_decides_by_how_much(
    scenario: mp.Scenario, result: mp.PlanResult, simulation: mp.Simulation
) -> None:
    slow = [mp.simulate(scenario, result, noise=mp.Noise(jitter=0.05, seed=seed)).figures.step_s for seed in (1, 1, 2)]
    assert slow[0] == slow[1] != slow[2]
    straggler = mp.simulate(scenario, result, noise=mp.Noise(stragglers=1, slowdown=2.0))
    assert straggler.figures.step_s > simulation.figures.step_s


def test_a_plan_of_another_scenario_is_refused(result: mp.PlanResult) -> None:
    with pytest.raises(mp.PlanError, match="GPUs"):
        mp.simulate("small-8-gpus", result.plan)


# export


def test_a_suffix_that_one_format_has_chooses_it(simulation: mp.Simulation, tmp_path: Path) -> None:
    mp.export(simulation, tmp_path / "step.csv")
    assert (tmp_path / "step.csv").read_text().startswith("lane,")
    mp.export(simulation.timeline, tmp_path / "step.json.gz")
    assert (tmp_path / "step.json.gz").read_bytes()[:2] == b"\x1f\x8b"


def test_a_suffix_that_several_formats_have_needs_a_format(simulation: mp.Simulation, tmp_path: Path) -> None:
    with pytest.raises(mp.MoeplanError, match="perfetto, sglang and table"):
        mp.export(simulation, tmp_path / "step.json")
    mp.export(simulation, tmp_path / "step.json", format="perfetto")
    assert json.loads((tmp_path / "step.json").read_text())["traceEvents"]


def test_what_no_format_can_write_is_refused(simulation: mp.Simulation, tmp_path: Path) -> None:
    with pytest.raises(mp.MoeplanError, match="no format"):
        mp.export(simulation, tmp_path / "step.xyz")
    with pytest.raises(mp.MoeplanError, match="not a Plan"):
        mp.export(simulation.plan, tmp_path / "step.csv", format="table")
    with pytest.raises(mp.MoeplanError, match="did you mean 'table'"):
        mp.export(simulation, tmp_path / "step.csv", format="tabel")
    assert not list(tmp_path.iterdir())


# what_if and sweep


def test_what_if_gives_what_planning_the_changed_scenario_from_scratch_gives(scenario: mp.Scenario) -> None:
    changes = {"workload.global_batch": [8, 16], "routing.skew": [0.0, 0.5]}
    answer = mp.what_if(scenario, changes)
    assert [tuple(row.changes.values()) for row in answer.rows] == [(8, 0.0), (8, 0.5), (16, 0.0), (16, 0.5)]
    for row in answer.rows:
        assert row.result == mp.plan(mp.load(scenario, row.changes))
    assert answer.base.result == mp.plan(scenario)


def test_the_change_is_against_the_base(scenario: mp.Scenario) -> None:
    answer = mp.what_if(scenario, {"workload.global_batch": 16})
    (row,) = answer.rows
    assert answer.base.step_change == 0
    assert row.step_s is not None
    assert answer.base.step_s is not None
    assert row.step_change == row.step_s / answer.base.step_s - 1 > 0.5
    assert row.record()["plan"] == in_short(row.plan) if row.plan else False


def test_a_sweep_is_the_rows_of_what_if_without_the_base(scenario: mp.Scenario) -> None:
    grid = {"routing.skew": [0.0, 1.0]}
    rows = mp.sweep(scenario, grid)
    assert [row.result for row in rows] == [row.result for row in mp.what_if(scenario, grid).rows]
    assert all(row.step_change is None for row in rows)


def test_a_cell_without_a_plan_says_why_and_stops_nothing(scenario: mp.Scenario) -> None:
    sizes = ["80 MB", "12 GB"]
    poor, rich = mp.what_if(scenario, {"cluster.gpu.memory": sizes}).rows
    assert poor.error is not None
    assert (poor.result, poor.plan, poor.gap, poor.step_change) == (None, None, None, None)
    assert rich.error is None
    assert rich.result is not None


def test_a_cell_that_is_no_scenario_says_why_unless_all_are(scenario: mp.Scenario) -> None:
    bad, good = mp.what_if(scenario, {"workload.global_batch": [-1, 8]}).rows
    assert "global_batch" in (bad.error or "")
    assert good.result is not None
    with pytest.raises(mp.CatalogueError, match="global_batch"):
        mp.what_if(scenario, {"workload.global_batch": [-1, 0]})


@pytest.mark.parametrize("changes", [{}, {"nodes": []}])
def test_a_grid_without_a_cell_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(mp.CatalogueError):
        mp.what_if(SMALL, changes)


def test_without_replanning_the_plan_is_kept_where_it_is_legal_and_fits(scenario: mp.Scenario) -> None:
    answer = mp.what_if(scenario, {"workload.global_batch": [16, 9]}, replan=False)
    longer, illegal = answer.rows
    assert longer.plan == answer.base.plan
    assert longer.plan is not None
    assert longer.step_s == mp.simulate(mp.load(scenario, longer.changes), longer.plan).figures.step_s
    assert longer.gap is None
    assert "9" in (illegal.error or "")
    (small,) = mp.what_if(scenario, {"cluster.gpu.memory": "80 MB"}, replan=False).rows
    assert small.error is not None
    assert small.result is None


def test_progress_says_which_cell_is_planned(scenario: mp.Scenario) -> None:
    told: list[str] = []
    mp.what_if(scenario, {"routing.skew": [0.1]}, progress=lambda message, done, total: told.append(message))
    assert all(text.startswith(("base: ", "routing.skew=0.1: ")) for text in told)


def test_a_plan_in_short_names_the_degrees_and_what_is_unusual() -> None:
    plan = mp.Plan(dp=16, pp=4, ep=8, stages=(8, 8, 8, 8))
    assert in_short(plan) == "pp4 dp16 ep8 one_f_one_b mb1"
    odd = plan.model_copy(
        update={"dp": 1, "zero_dense": 3, "recompute": "full", "schedule": "zbv", "overlap_degree": 2}
    )
    assert in_short(odd) == "pp4 dp1 ep8 zbv mb1 z3/1 recompute-full overlap2"
