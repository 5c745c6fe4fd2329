"""Calibrate and validate on the processors at hand: files, documents and statuses; no speed is asserted."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from moeplan import api, catalogue
from moeplan.cli import app
from moeplan.domain.plan import Plan
from moeplan.errors import ExecutionError, MoeplanError
from moeplan.executor import execute as executor
from moeplan.executor.execute import Execution, Job, execute_all
from moeplan.validating import calibrate, validate
from moeplan.validator import calibrate as calibrator
from moeplan.validator import cases
from moeplan.validator.validate import WARM_UP, candidates, counted_steps, document

NAME = "tiny-moe-2-ranks"
SMALL = {"workload.sequence": 32, "workload.global_batch": 4}


@pytest.fixture(scope="module")
def host(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A cost model of this machine, of fewer shapes and steps still than a quick one."""
    path = tmp_path_factory.mktemp("host") / "my-host.yaml"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(calibrator, "_STEPS", 3)
        patch.setattr(calibrator, "_WATCHED", 2)
        patch.setattr(calibrator, "_worlds", lambda: [2])
        patch.setattr(cases, "_EXCHANGED", ((8, 1), (32, 1), (64, 1)))
        found = calibrate(path, quick=True, device="cpu")
    assert {each.name for each in found.residuals} >= {"gemm fp32", "task experts_backward fp32", "all_to_all of 2"}
    assert found.repetitions >= found.dropped >= 0
    return path


def plan() -> Plan:
    return Plan(dp=2, ep=2, stages=(4,), precision=catalogue.load(NAME).choices.precision)


def test_a_calibration_is_a_cost_model_that_changes_a_simulation(host: Path) -> None:
    before, after = catalogue.load(NAME), catalogue.load(NAME, changes={"cluster.gpu": str(host)})
    found = after.cluster.gpu.measured
    assert found is not None
    assert {"gemm", "gemm_dgrad", "gemm_wgrad", "attention", "attention_grad", "grouped_gemm"} <= set(
        found.products["fp32"]
    )
    assert {"experts", "merge_backward", "routed_attention", "router", "optimizer"} <= set(found.tasks["fp32"])
    assert {"all_to_all of 2", "all_gather of 2", "reduce_scatter of 2", "send of 2"} <= set(found.exchanges)
    assert api.simulate(before, plan()).figures.step_s != api.simulate(after, plan()).figures.step_s
    assert [path.name for path in host.parent.iterdir()] == [host.name]


def run(*words: str) -> Any:
    return CliRunner().invoke(app, ["validate", NAME, *words], catch_exceptions=False)


def test_validate_prints_one_document_and_its_status_says_whether_it_held(host: Path, tmp_path: Path) -> None:
    small = [word for key, value in SMALL.items() for word in ("--set", f"{key}={value}")]
    chosen = ["--set", "choose.ep=2", "--cost-model", str(host), "--steps", "5", "--launches", "2", "--device", "cpu"]
    done = run(*small, *chosen, "--json", "--tolerance", "1000", "--report", str(tmp_path / "report.json"))
    assert done.exit_code == 0
    told = json.loads(done.stdout)
    assert json.loads((tmp_path / "report.json").read_text()) == told
    assert set(told["step"]) == {"predicted_s", "measured_s", "error", "noise"}
    assert told["step"]["error"] == pytest.approx(told["step"]["predicted_s"] / told["step"]["measured_s"] - 1)
    assert {"experts", "dispatch", "combine"} <= set(told["tasks"])
    assert told["ranking"] is None
    assert 0 <= told["dropped_repetitions"] <= told["repetitions"] == 2 * (5 - WARM_UP)
    assert told["within_tolerance"] is True
    assert told["memory"]["process"]["measured_bytes"] > 1e8


def test_candidates_are_ranked_and_a_wrong_model_fails(host: Path) -> None:
    given = catalogue.load(NAME, changes=SMALL | {"choose.ep": 2, "choose.overlap_degree": [1, 2]})
    # Without its calibration the sheet is far off.
    found = validate(given, candidates=2, launches=1, steps=4, device="cpu", tolerance=1e-6)
    told = document(found)
    assert len(found) == len(told["ranking"]["candidates"]) == 2
    assert -1 <= told["ranking"]["kendall_tau"] <= 1
    assert told["ranking"]["regret"] >= 0
    assert told["within_tolerance"] is False
    assert told["speed"] is None
    assert found[0].predicted.source == "predicted"
    assert found[0].measured.source == "measured"
    assert len(found[0].predicted.start_s_T) == len(found[0].measured.start_s_T)


def test_a_disturbed_repetition_is_dropped_and_none_is_where_all_are() -> None:
    given = catalogue.load(NAME, changes=SMALL)
    (found,) = execute_all([Job(scenario=given, plan=plan(), steps=6)], device="cpu")
    kept = found.repetitions
    assert kept.yardstick_s_SR.shape == (6, 2)
    assert (kept.yardstick_s_SR > 0).all()

    def disturbed(*steps: int) -> Execution:
        share_S = np.zeros(6)
        share_S[list(steps)] = 0.02
        return replace(found, repetitions=replace(kept, others_share_S=share_S))

    assert counted_steps(disturbed(4)).tolist() == [3, 5]
    assert counted_steps(disturbed()).tolist() == [3, 4, 5]
    assert counted_steps(disturbed(3, 4, 5)).tolist() == [3, 4, 5]


def test_only_what_can_be_run_is_a_candidate() -> None:
    given, first = catalogue.load(NAME), plan()
    odd = first.model_copy(update={"recompute": "selective"})
    other = first.model_copy(update={"overlap_degree": 2})
    assert candidates(given, [first, odd, first, other], 6) == [first, other]


# ---- what is wrong is said before a process starts


@pytest.fixture
def nothing_starts(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*given: object, **options: object) -> None:
        raise AssertionError("a process was started")

    monkeypatch.setattr(executor, "run_ranks", refuse)


@pytest.mark.usefixtures("nothing_starts")
class TestBadInput:
    def test_a_cost_model_of_another_device(self, host: Path, tmp_path: Path) -> None:
        other = tmp_path / "other.yaml"
        text = host.read_text()
        device = text.partition('device: "')[2].partition('"')[0]
        other.write_text(text.replace(f'device: "{device}"', 'device: "cpu of another kind"'))
        with pytest.raises(MoeplanError, match="was measured on 'cpu of another kind', but this is"):
            validate(NAME, plan(), cost_model=other, device="cpu")

    def test_more_ranks_than_the_machine_allows(self) -> None:
        given = catalogue.load(NAME, changes={"cluster.gpus_per_node": 64, "workload.global_batch": 64})
        chosen = Plan(dp=64, stages=(4,), precision=given.choices.precision)
        with pytest.raises(ExecutionError, match="64 ranks"):
            validate(given, chosen, device="cpu")

    def test_a_plan_of_an_older_schema(self, tmp_path: Path) -> None:
        path = tmp_path / "plan.json"
        path.write_text(json.dumps(plan().model_dump(mode="json", by_alias=True) | {"schema": "moeplan.plan/v0"}))
        done = CliRunner().invoke(app, ["validate", NAME, "--plan", str(path)])
        assert done.exit_code == 2

    def test_no_torch(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(executor, "find_spec", lambda name: None)
        with pytest.raises(ExecutionError, match="PyTorch is not installed"):
            validate(NAME, plan())
        with pytest.raises(ExecutionError, match="PyTorch is not installed"):
            calibrate("host.yaml")

    def test_settings_that_have_no_effect_or_no_place(self, tmp_path: Path) -> None:
        with pytest.raises(MoeplanError, match="no runners-up"):
            validate(NAME, plan(), candidates=6)
        with pytest.raises(MoeplanError, match="warm up"):
            validate(NAME, plan(), steps=3, device="cpu")
        with pytest.raises(MoeplanError, match=r"ends in \.yaml"):
            calibrate(tmp_path / "host.json")
        with pytest.raises(MoeplanError, match="there is no folder"):
            calibrate(tmp_path / "nowhere" / "host.yaml")
