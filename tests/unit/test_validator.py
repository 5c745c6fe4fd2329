"""Errors, noise, rankings and fits on made timelines and samples; what is said of a device that was measured."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from moeplan import api, catalogue
from moeplan.compiler.compile_plan import compile_plan
from moeplan.cost.cost_model import CostModel
from moeplan.domain.measured import Measured, Terms, at
from moeplan.domain.plan import Plan
from moeplan.domain.program import Kernel, Stream, Work
from moeplan.domain.scenario import Scenario
from moeplan.errors import CatalogueError, SimulationError
from moeplan.simulator.simulate import simulate
from moeplan.validator.calibrate import Calibration
from moeplan.validator.fit import Residual, fit_table, fit_terms, table_errors
from moeplan.validator.metrics import Error, bias, busy_s, joined, kendall_tau, noise, phases_s, regret, task_error
from moeplan.validator.samples import Sample, meetings
from moeplan.validator.sheet import write
from moeplan.validator.validate import slowed

SECOND = 1e-3


def tiny(**changes: object) -> Scenario:
    return catalogue.load("tiny-moe-2-ranks", changes={key.replace("__", "."): value for key, value in changes.items()})


def plan(given: Scenario, **options: object) -> Plan:
    return Plan(**({"dp": 2, "ep": 2, "stages": (4,), "precision": given.choices.precision} | options))  # type: ignore[arg-type]


def sample(seconds: float, *, flops: float = 0.0, size: float = 0.0, calls: float = 1.0, held: bool = False) -> Sample:
    return Sample(
        name="gemm", dtype="fp32", seconds=seconds, flops=flops, size_bytes=size, calls=calls, count=1, is_held_out=held
    )


# ---- errors and rankings


def test_an_error_is_negative_where_the_prediction_was_too_fast() -> None:
    assert Error(predicted=0.9, measured=1.0).error == pytest.approx(-0.1)


@pytest.mark.parametrize(("spread", "holds"), [(0.0, False), (0.04, False), (0.06, True)])
def test_a_failure_is_beyond_the_tolerance_and_twice_the_noise(spread: float, holds: bool) -> None:
    assert Error(predicted=1.1, measured=1.0, noise=spread).is_within(0.05) is holds


def test_noise_is_the_coefficient_of_variation() -> None:
    assert noise([2.0]) == 0.0
    assert noise([1.0, 3.0]) == pytest.approx(0.5)


def test_tau_counts_pairs_in_order() -> None:
    assert kendall_tau([1, 2, 3], [10, 20, 30]) == 1.0
    assert kendall_tau([1, 2, 3], [30, 20, 10]) == -1.0
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2, 4]) == pytest.approx(4 / 6)
    assert kendall_tau([1, 1], [1, 2]) == 1.0
    # The middle pair is closer than its noise.
    assert kendall_tau([1, 2, 3, 4], [1, 3, 2.9, 4], noise=[0.05] * 4) == pytest.approx(5 / 30**0.5)


def test_regret_is_what_the_chosen_plan_loses_against_the_best() -> None:
    assert regret([1.0, 2.0], [3.0, 2.0]) == pytest.approx(0.5)
    assert regret([1.0, 2.0], [2.0, 3.0]) == 0.0


def test_a_timeline_that_is_slowed_is_off_by_as_much_in_everything() -> None:
    given = tiny()
    program = compile_plan(plan(given), given, folded=False)
    predicted = simulate(program, CostModel(gpu=given.cluster.gpu))
    measured = slowed(predicted, 0.8)
    assert measured.step_s == pytest.approx(1.25 * predicted.step_s)
    for errors in (joined(busy_s(predicted), [busy_s(measured)]), joined(phases_s(predicted), [phases_s(measured)])):
        assert {round(each.error, 9) for each in errors.values()} == {-0.2}
    assert bias(predicted, measured) == pytest.approx(-0.2)
    assert task_error(predicted, measured) == pytest.approx(0.2)


def test_waiting_for_the_last_rank_is_not_time_of_an_exchange() -> None:
    given = tiny()
    program = compile_plan(plan(given), given, folded=False)
    timeline = simulate(program, CostModel(gpu=given.cluster.gpu))
    early = replace(timeline, start_s_T=timeline.start_s_T.copy())
    tasks = next(tasks for tasks in meetings(program).values() if len(tasks) == 2)
    early.start_s_T[tasks[0]] = 0.0
    kind = program.kind(tasks[0])
    assert busy_s(early)[kind] == pytest.approx(busy_s(timeline)[kind])


# ---- fits


def test_terms_are_found_again_in_what_they_made() -> None:
    made = Terms(overhead_s=2e-5, peak_flops_per_s=8e10, bandwidth_bytes_per_s=9e9)
    rng = np.random.default_rng(0)
    works = [(float(f), float(b), float(c)) for f, b, c in rng.uniform((1e6, 1e5, 1), (1e9, 1e7, 9), (40, 3))]
    samples = [
        sample(made.seconds(flops=f, size_bytes=b, count=c), flops=f, size=b, calls=c) for f, b, c in works
    ]  # fmt: skip
    found = fit_terms([*samples, sample(1.0, flops=1e6)])  # one that was disturbed
    assert found.overhead_s == pytest.approx(made.overhead_s, rel=0.02)
    assert found.peak_flops_per_s == pytest.approx(8e10, rel=0.02)
    assert found.bandwidth_bytes_per_s == pytest.approx(9e9, rel=0.02)


def test_no_term_is_negative_and_nothing_is_fitted_to_what_is_held_out() -> None:
    falling = [sample(1e-3 / k, flops=1e6 * k) for k in (1, 2, 4)]
    found = fit_terms([*falling, sample(100.0, held=True)])
    assert 0 <= found.overhead_s < 1e-2
    assert found.peak_flops_per_s is None


def test_a_table_rises_and_goes_through_its_samples() -> None:
    table = fit_table([sample(seconds, size=size) for size, seconds in ((1e3, 2e-4), (1e4, 1e-4), (1e6, 1e-3))])
    assert [seconds for _, seconds in table] == pytest.approx([1.5e-4, 1.5e-4, 1e-3])
    assert at(table, 10) == pytest.approx(1.5e-4)
    assert at(table, 1e5) == pytest.approx(np.sqrt(1.5e-4 * 1e-3))
    assert at(table, 2e6) == pytest.approx(2e-3)
    assert at((), 2e6) == 0.0


def test_each_sample_is_judged_by_the_table_of_the_others() -> None:
    errors = table_errors([sample(1e-4, size=1e3), sample(1e-4, size=1e5), sample(2e-4, size=1e7)])
    assert errors[0] == pytest.approx(0.0)
    assert errors[2] == pytest.approx(1e-4 * 100 / 2e-4 - 1)


def test_residuals_tell_known_shapes_from_unknown_ones() -> None:
    found = Residual.of("gemm", [sample(1.0), sample(1.0, held=True)], [0.02, -0.1])
    assert (found.fitted, found.held_out, found.p90) == (0.02, 0.1, pytest.approx(0.1))


# ---- a measured device


def measured(**changes: object) -> Measured:
    products = {
        name: Terms(overhead_s=1e-5, peak_flops_per_s=8e10)
        for name in ("gemm", "gemm_dgrad", "gemm_wgrad", "grouped_gemm", "attention", "attention_grad")
    }
    figures = {
        "device": "cpu of a test", "processors": 2, "reference_s": 0.015, "process_memory_bytes": 3e8,
        "products": {"fp32": products}, "tasks": {"fp32": {"experts": Terms(overhead_s=1e-3)}},
        "exchanges": {"all_to_all of 2": ((1e3, 5e-4), (1e6, 1e-3)), "send of 2": ((1e3, 7e-4),)},
    }  # fmt: skip
    return Measured(**(figures | changes))  # type: ignore[arg-type]


def calibration() -> Calibration:
    return Calibration(
        base="cpu-core", measured=measured(), compute_share=0.7, environment="a test", date="2026-12-01", dropped=1,
        repetitions=9, residuals=(Residual(name="gemm fp32", fitted=0.03, held_out=0.05, p90=0.1, count=7),),
    )  # fmt: skip


@pytest.fixture
def sheet(tmp_path: Path) -> str:
    write(calibration(), tmp_path / "my-host.yaml")
    assert [path.name for path in tmp_path.iterdir()] == ["my-host.yaml"]
    return str(tmp_path / "my-host.yaml")


def test_a_calibration_is_read_as_it_was_written(sheet: str) -> None:
    gpu = tiny(cluster__gpu=sheet).cluster.gpu
    assert gpu.name == "my-host"
    assert gpu.compute_share_beside_exchange == pytest.approx(0.7)
    found = gpu.measured
    assert found is not None
    assert found.products["fp32"]["gemm"].peak_flops_per_s == pytest.approx(8e10)
    assert found.exchanges["all_to_all of 2"] == ((1e3, 5e-4), (1e6, 1e-3))
    cited = [row for row in catalogue.sources(dict(tiny(cluster__gpu=sheet).document)) if "gemm.overhead" in row.figure]
    assert {row.kind for row in cited} == {"measured"}
    assert "off by 3.0 %, 5.0 % on shapes held out; 7 samples" in {row.note for row in cited}


def test_a_measured_device_changes_what_is_simulated_and_planned(sheet: str) -> None:
    small = {"choose.tp": 1, "choose.cp": 1, "choose.pp": 1, "choose.micro_batch": 4, "choose.recompute": "none"}
    before, after = tiny(**small), tiny(cluster__gpu=sheet, **small)
    assert api.simulate(before, plan(before)).figures.step_s != api.simulate(after, plan(after)).figures.step_s
    result = api.plan(after)
    assert result.lower_bound_s <= result.step_s


def test_a_task_is_its_products_and_the_rest() -> None:
    given = tiny()
    model = CostModel(gpu=replace(given.cluster.gpu, measured=measured()))
    kernel = Kernel(
        name="expert_up", kind="grouped_gemm", dtype="fp32", flops=8e7, size_bytes=1e6, rows_per_expert=(3, 0)
    )
    moved = Kernel(name="permute", kind="elementwise", dtype="fp32", flops=0.0, size_bytes=1e6)
    assert model.cost(Work(kind="experts", kernels=(moved, kernel))).seconds == pytest.approx(1e-3 + 2e-5 + 1e-3)
    # A task and a class that were not measured are priced by the roofline.
    assert model.cost(Work(kind="merge", kernels=(moved,))).seconds == pytest.approx(model.kernel_s(moved))


def test_an_exchange_waits_for_what_its_hosts_do() -> None:
    given = tiny()
    after = replace(given, cluster=replace_gpu(given, measured()))
    program = compile_plan(plan(after), after, folded=False)
    sent = next(m for m in program.meetings if program.exchanges[m.exchange].operation == "all_to_all")
    size = program.exchanges[sent.exchange].size_bytes
    bare = compile_plan(plan(given), given, folded=False)
    before = next(m for m in bare.meetings if bare.exchanges[m.exchange].operation == "all_to_all")
    more_s = sent.phases[0].delay_s(size) - before.phases[0].delay_s(size)
    assert 5e-4 < more_s < 1e-3


def replace_gpu(given: Scenario, found: Measured):  # type: ignore[no-untyped-def]
    from moeplan.domain.cluster import build_cluster

    spec = given.cluster.spec.model_copy(update={"gpu": replace(given.cluster.gpu, measured=found)})
    return build_cluster(spec)


def test_ranks_that_share_processors_take_turns() -> None:
    given = catalogue.load("tiny-moe-4-ranks")
    chosen = Plan(dp=4, ep=1, stages=(4,), precision=given.choices.precision)
    program = compile_plan(chosen, given, folded=False)
    own, shared = (
        simulate(program, CostModel(gpu=replace(given.cluster.gpu, measured=measured(processors=count))))
        for count in (4, 2)
    )
    compute = program.tasks.stream_T == Stream.COMPUTE
    spent = [float((each.end_s_T - each.start_s_T)[compute].sum()) for each in (own, shared)]
    assert spent[1] == pytest.approx(2 * spent[0], rel=0.05)
    assert shared.step_s < 2.05 * own.step_s
    with pytest.raises(SimulationError, match="share processors"):
        simulate(program, CostModel(gpu=replace(given.cluster.gpu, measured=measured())), engine="compiled")


@pytest.mark.parametrize(
    ("before", "after", "said"),
    [
        ("all_to_all of 2", "all_to_all", "no exchange of a group"),
        ("overhead:", "overheat:", "overheat"),
        ("value: 10 us", "value: 10 ms/s", "10 ms/s"),
    ],
)
def test_what_is_odd_in_a_calibration_is_refused(sheet: str, before: str, after: str, said: str) -> None:
    path = Path(sheet)
    text = path.read_text()
    assert before in text
    path.write_text(text.replace(before, after, 1))
    with pytest.raises(CatalogueError, match=said):
        tiny(cluster__gpu=sheet)


def test_a_summary_is_plain_json() -> None:
    from moeplan.validator.sheet import summary

    assert json.loads(json.dumps(summary(calibration())))["residuals"][0]["held_out"] == 0.05
