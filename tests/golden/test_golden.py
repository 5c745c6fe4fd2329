"""The plan of each small scenario, and what it costs, as they were when somebody last looked at them.

`pytest tests/golden --rewrite-golden -n 0 -s` writes the files anew and shows the difference.
"""

from __future__ import annotations

import difflib
import json
from pathlib import Path
from typing import Any

import pytest

import moeplan as mp

HERE = Path(__file__).parent
SCENARIOS = ("small-4-gpus", "small-8-gpus", "small-two-nodes", "tiny-moe-2-ranks")
DIGITS = 9


def rounded(seconds: float) -> float:
    return float(f"{seconds:.{DIGITS - 1}e}")


def content(name: str) -> dict[str, Any]:
    result = mp.plan(name, gap=0.0)
    return {
        "scenario": name,
        "plan": result.plan.model_dump(mode="json", by_alias=True),
        "step_s": rounded(result.step_s),
        "lower_bound_s": rounded(result.lower_bound_s),
        "breakdown_s": {cause: rounded(seconds) for cause, seconds in sorted(result.breakdown_s.items())},
    }


@pytest.mark.parametrize("name", SCENARIOS)
def test_the_plan_and_its_figures_are_those_of_the_golden_file(name: str, request: pytest.FixtureRequest) -> None:
    path = HERE / f"{name}.json"
    written = path.read_text(encoding="utf-8") if path.exists() else ""
    fresh = json.dumps(content(name), indent=2) + "\n"
    difference = "".join(difflib.unified_diff(written.splitlines(True), fresh.splitlines(True), "golden", "now"))
    if request.config.getoption("--rewrite-golden"):
        path.write_text(fresh, encoding="utf-8")
        print(difference or f"{name}: as before")
    else:
        assert difference == "", f"\n{difference}\nif this is meant: pytest tests/golden --rewrite-golden -n 0 -s"


def test_every_golden_file_is_of_a_scenario_and_every_scenario_has_one() -> None:
    assert {path.stem for path in HERE.glob("*.json")} == set(SCENARIOS)
