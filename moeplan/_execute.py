"""The sub-command `moeplan execute`: a plan run by PyTorch on the devices at hand.

What it needs is imported when it runs.
"""

from __future__ import annotations

import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeplan._flags import Json, PlanFile, ScenarioName, Settings, refuse_choices, scenario_of
from moeplan.errors import MoeplanError

if TYPE_CHECKING:
    from moeplan.executor.execute import Execution
    from moeplan.executor.roles import Role


def execute(
    scenario: ScenarioName = None,
    plan_file: PlanFile = None,
    settings: Settings = None,
    steps: Annotated[int, typer.Option(help="Steps of training; the first one warms up.")] = 3,
    device: Annotated[str, typer.Option(help="cpu, cuda, or auto: GPUs where there are enough.")] = "auto",
    seed: Annotated[int, typer.Option(help="Of weights and words.")] = 0,
    roles: Annotated[
        bool,
        typer.Option("--roles", help="Run each distinct rank alone on one device; exchanges take what is predicted."),
    ] = False,
    trace: Annotated[Path | None, typer.Option(help="Write a trace for ui.perfetto.dev: .json or .json.gz.")] = None,
    as_json: Json = False,
) -> None:
    """Run a plan with PyTorch on this machine, a process for each rank, and measure every task."""
    from moeplan import api
    from moeplan._waiting import waiting
    from moeplan.executing import execute as run
    from moeplan.executing import execute_roles

    _check_trace(trace)
    if roles and trace is not None:
        raise MoeplanError(
            "execute: --trace has no effect on --roles, which run one rank at a time; leave one of them out"
        )
    origin = scenario or (None if plan_file is None else str(plan_file))
    if plan_file is not None:
        refuse_choices(settings or [])
    problem = scenario_of(origin, settings, {})
    with waiting(f"executing {problem.name}") as progress:
        if roles:
            alone = execute_roles(problem, plan_file, steps=steps, device=device, seed=seed, progress=progress)
            _print_roles(alone, as_json=as_json)
            return
        found = run(problem, plan_file, steps=steps, device=device, seed=seed, progress=progress)
        if trace is not None:
            api.export(found.timeline, trace, format="perfetto")
    if as_json:
        from moeplan._screen import print_json

        print_json(_document(found))
    else:
        _print(found)
    if trace is not None:
        print(f"wrote {trace}", file=sys.stderr)


def _check_trace(path: Path | None) -> None:
    """What cannot be written is found before the work and not after it."""
    from moeplan.exporters import suffix_of
    from moeplan.exporters.perfetto import SUFFIXES

    if path is not None:
        suffix_of(path, SUFFIXES)
        if not path.parent.is_dir():
            raise MoeplanError(f"{path}: there is no folder {path.parent}; make it, or use another path")


def _document(found: Execution) -> dict[str, Any]:
    from moeplan import __version__
    from moeplan.executor.execute import summary

    head = {"schema": "moeplan.execution/v1", "moeplan_version": __version__, "scenario": found.scenario.document}
    return head | {"plan": found.plan.model_dump(mode="json", by_alias=True)} | summary(found)


def _print(found: Execution) -> None:
    from moeplan._screen import Screen, plan_in_words
    from moeplan.executor.execute import summary
    from moeplan.units import show

    screen, figures = Screen(), summary(found)
    screen.line(found.scenario.name, style="bold cyan")
    screen.table(("", ""), plan_in_words(found.plan, found.scenario), title="Plan")
    loss = " ".join(f"{each:.4f}" for each in (found.losses[0], found.losses[-1]))
    spread = f"{show(float(found.step_s_S.min()), 's')} to {show(float(found.step_s_S.max()), 's')}"
    rows = [
        ("step", show(figures["step_s"], "s")),
        (f"{len(found.losses)} steps", spread),
        ("throughput", f"{figures['tokens_per_s_per_gpu']:,.0f} tokens/s on each rank"),
        ("loss, first and last", loss),
        ("device", found.device),
    ]
    screen.table(("", ""), rows, title="Measured")
    busy, step_s = figures["busy_s"], figures["step_s"]
    lines = [(kind, show(seconds, "s"), f"{100 * seconds / step_s:.1f} %") for kind, seconds in busy.items()]
    screen.table(
        ("busiest rank", "time", "of the step"), lines, title="Tasks, exchanges with their waiting", right="lrr"
    )
    sent = [(kind, show(float(size), "B")) for kind, size in figures["sent_bytes"].items()]
    screen.table(("all ranks", "sent"), sent, title="Bytes of a step", right="lr")


def _print_roles(roles: list[Role], *, as_json: bool) -> None:
    from moeplan._screen import Screen, print_json
    from moeplan.executor.roles import MODELLED
    from moeplan.units import show

    if as_json:
        print_json({"schema": "moeplan.roles/v1", "modelled": MODELLED, "roles": [asdict(role) for role in roles]})
        return
    screen = Screen()
    for role in roles:
        rows = [("step", role.predicted_step_s, role.step_s), *((kind, *both) for kind, both in role.busy_s.items())]
        lines = [
            (what, show(said, "s"), show(took, "s"), f"{100 * (said / took - 1):+.1f} %") for what, said, took in rows
        ]
        memory = [("memory, most allocated", role.allocated_bytes), ("memory, most reserved", role.reserved_bytes)]
        lines += [(what, show(role.predicted_bytes, "B"), show(float(size), "B"),
                   f"{100 * (role.predicted_bytes / size - 1):+.1f} %") for what, size in memory]  # fmt: skip
        head = ("", "predicted", f"measured on {role.device}", "error")
        screen.table(head, lines, title=f"Rank {role.rank}: {role.name}", right="lrrr")
    screen.line(MODELLED)
