"""The sub-commands `moeplan calibrate` and `moeplan validate`: the devices at hand measured, and predictions held
against them.

What they need is imported when they run.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeplan._flags import CostModelName, Json, PlanFile, ScenarioName, Settings, refuse_choices, scenario_of
from moeplan.errors import MoeplanError

if TYPE_CHECKING:
    from moeplan.validator.calibrate import Calibration
    from moeplan.validator.metrics import Error
    from moeplan.validator.validate import Validation

_BEYOND = 1
"""Status of a prediction that is further off than the tolerance and twice the noise."""


def calibrate(
    out: Annotated[Path, typer.Option(help="Where to write the cost model: a .yaml file.")],
    scenario: Annotated[
        str, typer.Argument(metavar="[SCENARIO]", help="Whose devices' sheet the cost model extends.")
    ] = "tiny-moe-2-ranks",
    quick: Annotated[bool, typer.Option("--quick", help="Fewer shapes and sizes: two minutes instead of ten.")] = False,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: a GPU where there is one.")] = "auto",
    as_json: Json = False,
) -> None:
    """Measure this machine's devices, where they work in real steps, into a cost model."""
    from moeplan._waiting import waiting
    from moeplan.validating import calibrate as run
    from moeplan.validator.sheet import summary

    with waiting("calibrating") as progress:
        found = run(out, scenario, quick=quick, device=device, progress=progress)
    if as_json:
        from moeplan._screen import print_json

        print_json(dict(summary(found)))
    else:
        _print_calibration(found, out)


def _print_calibration(found: Calibration, out: Path) -> None:
    from moeplan._screen import Screen

    screen = Screen()
    screen.line(found.environment, style="bold cyan")
    rows = [
        (
            each.name, _percent(each.fitted), "" if each.held_out is None else _percent(each.held_out),
            _percent(each.p90), f"{each.count:,}",
        )
        for each in found.residuals
    ]  # fmt: skip
    screen.table(("", "off by", "held out", "of ten, nine", "samples"), rows, title="What was measured", right="lrrrr")
    screen.line()
    screen.line(f"{found.dropped} of {found.repetitions} repetitions were disturbed by others and dropped")
    screen.line(f"beside an exchange kernels have {_percent(found.compute_share)} of their speed")
    screen.line(f"wrote {out}; use it as --cost-model {out}")


def validate(
    scenario: ScenarioName = None,
    plan_file: PlanFile = None,
    settings: Settings = None,
    cost_model: CostModelName = None,
    candidates: Annotated[int, typer.Option(help="Plans in all: the best, and so many behind it, are ranked.")] = 1,
    launches: Annotated[int, typer.Option(help="Of which the median counts, and the spread is the noise.")] = 3,
    steps: Annotated[int, typer.Option(help="Of each launch; the first three warm up.")] = 12,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: GPUs where there are enough.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of weights and words.")] = 0,
    tolerance: Annotated[
        float | None, typer.Option(help="Of the step's error. [default: 0.06, 0.08, 0.12 by 1, 2, more ranks]")
    ] = None,
    report: Annotated[Path | None, typer.Option(help="Write what --json prints into a file as well.")] = None,
    as_json: Json = False,
) -> None:
    """Predict a plan, run it, and say how far off the prediction was. Status 1 beyond the tolerance and the noise."""
    from moeplan._waiting import waiting
    from moeplan.validating import validate as run
    from moeplan.validator.validate import document

    if report is not None and not report.parent.is_dir():
        raise MoeplanError(f"{report}: there is no folder {report.parent}; make it, or use another path")
    origin = scenario or (None if plan_file is None else str(plan_file))
    if plan_file is not None:
        refuse_choices(settings or [])
    problem = scenario_of(origin, settings, {})
    given: dict[str, Any] = {"cost_model": cost_model, "candidates": candidates, "launches": launches, "steps": steps}
    with waiting(f"validating {problem.name}") as progress:
        found = run(problem, plan_file, device=device, seed=seed, tolerance=tolerance, progress=progress, **given)
    told = document(found)
    if report is not None:
        _write(report, told)
    if as_json:
        from moeplan._screen import print_json

        print_json(told)
    else:
        _print(found, told)
    if not told["within_tolerance"]:
        raise typer.Exit(_BEYOND)


def _write(path: Path, told: Mapping[str, Any]) -> None:
    part = path.with_name(f".{path.name}.part")
    try:
        part.write_text(json.dumps(told, indent=2) + "\n", encoding="utf-8")
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _print(found: Sequence[Validation], told: Mapping[str, Any]) -> None:
    from moeplan._screen import Screen, plan_in_words

    first, screen = found[0], Screen()
    screen.line(first.scenario.name, style="bold cyan")
    screen.table(("", ""), plan_in_words(first.plan, first.scenario), title="Plan")
    heads = ("", "predicted", "measured", "error", "noise")
    rows = [_row("step", first.step, "s")]
    rows += [_row(f"phase {name}", each, "s") for name, each in first.phases.items()]
    rows += [_row(f"tasks {name}", each, "s") for name, each in first.tasks.items()]
    rows += [_row(f"memory {name}", each, "B") for name, each in first.memory.items()]
    screen.table(heads, rows, title="Predicted and measured, median of launches", right="lrrrr")
    if told["ranking"] is not None:
        rows = [_row(f"plan {number}", each.step, "s") for number, each in enumerate(found, 1)]
        screen.table(heads, rows, title="Candidates", right="lrrrr")
        agreement, regret = told["ranking"]["kendall_tau"], _percent(told["ranking"]["regret"])
        screen.line(f"rank agreement (Kendall) {agreement:.2f}; regret of the chosen plan {regret}")
    screen.line()
    screen.line(
        f"{told['dropped_repetitions']} of {told['repetitions']} repetitions were disturbed by others and dropped"
    )
    if first.speed is not None:
        screen.line(
            f"the device had {_percent(first.speed)} of the speed at which it was calibrated; predictions are for that"
        )
    screen.line(f"all computation {_signed(first.bias)}; tasks one by one {_percent(first.task_error)} off")
    within = "within" if told["within_tolerance"] else "beyond"
    screen.line(f"{within} the tolerance of {_percent(first.tolerance)} (or twice the noise)")


def _row(name: str, error: Error, unit: str) -> tuple[str, ...]:
    from moeplan.units import show

    values = (show(error.predicted, unit), show(error.measured, unit))
    return (name, *values, _signed(error.error), _percent(error.noise))


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


def _signed(share: float) -> str:
    return f"{100 * share:+.1f} %"
