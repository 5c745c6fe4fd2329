"""Memory as published against memory as predicted, row by row; `memory.yaml` says where each comes from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
from ruamel.yaml import YAML

from moeplan import catalogue
from moeplan.domain.plan import DTYPE_BYTES, Plan, Precision
from moeplan.domain.result import StageMemory
from moeplan.domain.workload import Workload
from moeplan.partition.footprint import footprint
from moeplan.units import parse

DATA = YAML(typ="safe").load(Path(__file__).with_name("memory.yaml"))

WHAT: dict[str, Callable[[StageMemory, Precision], float]] = {
    "parameters": lambda m, p: m.weights / DTYPE_BYTES[p.weights],
    "weights and gradients": lambda m, p: m.weights + m.gradients,
    "optimizer": lambda m, p: m.optimizer,
    "activations": lambda m, p: m.activations + m.logits + m.buffers,
    "total": lambda m, p: m.total,
    "states and a half gradient": lambda m, p: m.weights + m.gradients + m.optimizer + m.weights,
}


@cache
def predicted(run: str) -> tuple[StageMemory, Precision]:
    """The published GPU's pipeline rank under the plan of the run; a run with a workload of its own is in BF16."""
    given: dict[str, Any] = DATA["runs"][run]
    scenario = catalogue.load(given["scenario"])
    precision = scenario.choices.precision
    if "workload" in given:
        precision = Precision()
        scenario = replace(scenario, workload=Workload.model_validate(given["workload"]))
    plan = Plan.model_validate(given["plan"] | {"stages": tuple(given["plan"]["stages"]), "precision": precision})
    return footprint(plan, scenario)[given["rank"]], precision


@pytest.mark.parametrize("row", DATA["rows"], ids=lambda row: f"{row['run']}: {row['what']}")
def test_memory_is_predicted_within_the_band_of_the_row(row: dict[str, Any]) -> None:
    found = WHAT[row["what"]](*predicted(row["run"]))
    text = row["measured"]
    measured = parse(text, "B") if isinstance(text, str) else float(text)
    error = found / measured - 1
    print(f"{row['run']}: {row['what']}: measured {text}, predicted {found:.4g}, error {100 * error:+.1f} %")
    assert abs(error) <= parse(row["band"], "share"), row["why"]


def test_every_row_has_a_run_with_a_source_and_a_reason() -> None:
    for row in DATA["rows"]:
        assert DATA["runs"][row["run"]]["source"] in DATA["sources"]
        assert row["why"]
