"""A plan compiled for a cluster with other figures, from what it was compiled to before, is what compiling says."""

from __future__ import annotations

from dataclasses import fields

import numpy as np
import pytest

import moeplan as mp
from moeplan.compiler.compile_plan import Compilation, compile_plan
from moeplan.cost.cost_model import CostModel
from moeplan.domain.program import Program
from moeplan.knobs import Steps, calibrated, worth_buying
from moeplan.simulator.simulate import simulate

CHANGES: dict[str, dict[str, object]] = {
    **{f"{knob.name} {knob.change}": dict(knob.changes) for knob in worth_buying(mp.load("small-two-nodes"))},
    **{f"{knob.name} {knob.change}": dict(knob.changes) for knob in calibrated(mp.load("small-two-nodes"))},
    "one slow card": {"cluster.speeds": [{"nic": "n0.nic1", "bandwidth": "20 GB/s"}]},
}


def compiled(decided: dict[str, object]) -> Compilation:
    scenario = mp.load("small-two-nodes", {f"choose.{key}": value for key, value in decided.items()})
    return Compilation(plan=mp.plan(scenario).plan, scenario=scenario)


def assert_same(found: Program, wanted: Program) -> None:
    for column in fields(wanted.tasks):
        np.testing.assert_array_equal(getattr(found.tasks, column.name), getattr(wanted.tasks, column.name))
    for name in ("before_D", "after_D"):
        np.testing.assert_array_equal(getattr(found, name), getattr(wanted, name))
    assert [lane.ranks_R.tolist() for lane in found.lanes] == [lane.ranks_R.tolist() for lane in wanted.lanes]
    assert [(each.exchange, each.lanes) for each in found.meetings] == [
        (each.exchange, each.lanes) for each in wanted.meetings
    ]


@pytest.mark.parametrize("decided", [{"pp": 2}, {"ep": 4, "all_to_all": "two_dh"}], ids=["stages", "copies"])
def test_programs_and_steps_under_every_change_are_those_of_compiling_anew(decided: dict[str, object]) -> None:
    base = compiled(decided)
    steps, kept, split = Steps(base.scenario), 0, 0
    steps.timeline(base.plan)
    for what, changes in CHANGES.items():
        changed = mp.load(base.scenario, changes)
        anew, cost_model = compile_plan(base.plan, changed), CostModel(gpu=changed.cluster.gpu)
        found = base.on(changed.cluster)
        assert_same(found.program, anew)
        assert steps.changed_s(base.plan, changed.cluster) == simulate(anew, cost_model).step_s, what
        kept += found is base
        split += len(anew.lanes) > len(base.program.lanes)
    assert kept > 6
    assert split == ("pp" in decided)
