"""What `what_if` says of a change is what planning the changed scenario from scratch says."""

from __future__ import annotations

import pytest

import moeplan as mp

CHANGES: list[tuple[str, dict[str, object]]] = [
    ("small-two-nodes", {"nodes": 1}),
    ("small-two-nodes", {"nodes": 4}),
    ("small-two-nodes", {"cluster.nic.bandwidth": "5 GB/s"}),
    ("small-two-nodes", {"cluster.nic.bandwidth": "100 GB/s"}),
    ("small-two-nodes", {"cluster.gpu.memory": "1 GB"}),
    ("small-two-nodes", {"cluster.gpu.memory": "160 MB"}),
    ("small-two-nodes", {"cluster.gpu.gemm_efficiency": "40 %"}),
    ("small-two-nodes", {"routing.skew": 0.0}),
    ("small-two-nodes", {"routing.skew": 1.2}),
    ("small-two-nodes", {"routing.seed": 5}),
    ("small-two-nodes", {"workload.global_batch": 32}),
    ("small-two-nodes", {"workload.global_batch": 12, "choose.micro_batch": [1, 2]}),
    ("small-two-nodes", {"workload.sequence": 256}),
    ("small-two-nodes", {"choose.tp": 2}),
    ("small-two-nodes", {"choose.all_to_all": "linear"}),
    ("small-two-nodes", {"choose.schedule": ["gpipe", "one_f_one_b"]}),
    ("small-two-nodes", {"choose.capacity": {"rule": "pad", "factor": 1.25}}),
    ("small-4-gpus", {"routing.router": "multinomial"}),
    ("small-4-gpus", {"choose.ep": 4}),
    ("small-4-gpus", {"choose.zero_dense": [0, 1, 2, 3]}),
    ("small-4-gpus", {"choose.recompute": "full"}),
    ("small-4-gpus", {"cluster.gpu.kernel_launch": "20 us"}),
    ("small-8-gpus", {"routing.share": 0.5}),
    ("small-8-gpus", {"choose.schedule": "zero_bubble"}),
    ("small-8-gpus", {"workload.global_batch": 64, "workload.sequence": 128}),
]


@pytest.mark.parametrize(("scenario", "changes"), CHANGES, ids=lambda value: str(value))
def test_a_changed_scenario_is_answered_as_if_planned_from_scratch(scenario: str, changes: dict[str, object]) -> None:
    grid = {key: [value] if isinstance(value, list) else value for key, value in changes.items()}
    (row,) = mp.what_if(scenario, grid, gap=0.0).rows
    scratch = mp.plan(mp.load(scenario, changes), gap=0.0)
    assert row.error is None
    assert row.plan == scratch.plan
    assert (row.step_s, row.lower_bound_s, row.gap) == (scratch.step_s, scratch.lower_bound_s, scratch.gap)
    assert isinstance(row.result, mp.PlanResult)
    assert row.result.model_dump_json(by_alias=True) == scratch.model_dump_json(by_alias=True)


def test_cells_of_a_grid_do_not_colour_one_another() -> None:
    grid = {"routing.skew": [0.0, 0.9], "cluster.nic.bandwidth": ["5 GB/s", "50 GB/s"], "workload.global_batch": [16]}
    answer = mp.what_if("small-two-nodes", grid, gap=0.0)
    base = mp.plan("small-two-nodes", gap=0.0)
    assert (answer.base.plan, answer.base.step_s) == (base.plan, base.step_s)
    assert len(answer.rows) == 4
    for row in answer.rows:
        scratch = mp.plan(mp.load("small-two-nodes", row.changes), gap=0.0)
        assert (row.plan, row.step_s, row.lower_bound_s) == (scratch.plan, scratch.step_s, scratch.lower_bound_s)
        assert row.step_change == scratch.step_s / base.step_s - 1


def test_a_change_that_changes_nothing_is_answered_with_the_base() -> None:
    (row,) = mp.what_if("small-4-gpus", {"workload.global_batch": 16}, gap=0.0).rows
    assert row.step_change == 0
    assert row.plan == mp.plan("small-4-gpus", gap=0.0).plan


def test_a_kept_plan_costs_what_the_simulator_says_and_never_less_than_a_new_one() -> None:
    grid = {"cluster.nic.bandwidth": ["5 GB/s", "100 GB/s"]}
    kept, new = (mp.what_if("small-two-nodes", grid, replan=replan, gap=0.0) for replan in (False, True))
    for old, fresh in zip(kept.rows, new.rows, strict=True):
        assert old.plan == kept.base.plan
        assert old.step_s == mp.simulate(mp.load("small-two-nodes", old.changes), kept.base.plan).figures.step_s
        assert old.step_s >= fresh.step_s
