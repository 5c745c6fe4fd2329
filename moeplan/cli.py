"""The command `moeplan`: a sub-command for each verb, few flags, and every field of a scenario by `--set key=value`.

What a command needs is imported when it runs, so that `--help` is quick. What a user got wrong is one message on
standard error and status 2; Ctrl-C is status 130; a reader that goes away is no error.
"""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeplan._accuracy import accuracy
from moeplan._emulate import emulate
from moeplan._execute import execute
from moeplan._explain import explain
from moeplan._flags import (
    Batch,
    Cluster,
    CostModelName,
    Gap,
    Json,
    Model,
    Nodes,
    Phase,
    PlanFile,
    Planner,
    ScenarioName,
    Sequence,
    Settings,
    Strict,
    TimeLimit,
    given_flags,
    grid_of,
    noise_of,
    refuse_assumed,
    refuse_choices,
    scenario_of,
    with_cost_model,
)
from moeplan._network import network_app
from moeplan._place import place
from moeplan._validate import calibrate, validate
from moeplan.errors import MoeplanError

if TYPE_CHECKING:
    from moeplan.api import Simulation
    from moeplan.domain.plan import Plan
    from moeplan.domain.result import PlanResult
    from moeplan.domain.scenario import Scenario
    from moeplan.grid import Row
    from moeplan.simulator.noise import Noise

app = typer.Typer(
    help="Plans, simulates and runs Mixture-of-Experts models on GPU clusters, with certificates.",
    add_completion=False,
    no_args_is_help=True,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)


def main() -> None:
    """The entry point of the command."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if stream is None:
            setattr(sys, name, Path(os.devnull).open("w", encoding="utf-8"))  # noqa: SIM115 - until the end
        else:
            stream.reconfigure(errors="backslashreplace")
    app(prog_name="moeplan")


def _version(asked: bool) -> None:
    if asked:
        from moeplan import __version__

        print(f"moeplan {__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@contextmanager
def _guarded() -> Iterator[None]:
    """Turns what a user can cause into a message and a status."""
    try:
        yield
        sys.stdout.flush()
    except MoeplanError as error:
        print(f"moeplan: {error}", file=sys.stderr)
        raise typer.Exit(2) from None
    except KeyboardInterrupt:
        raise typer.Exit(130) from None
    except OSError as error:
        if error.filename is not None:
            raise
        _give_up_stdout()
        if isinstance(error, BrokenPipeError):
            raise typer.Exit(0) from None
        print(f"moeplan: cannot write: {error.strerror or error}; free some space or use another path", file=sys.stderr)
        raise typer.Exit(2) from None


def _give_up_stdout() -> None:
    """Nobody reads any more: what is left in the buffer goes nowhere."""
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, sys.stdout.fileno())
    os.close(nowhere)


@app.command()
@_guarded()
def plan(
    scenario: ScenarioName = None,
    settings: Settings = None,
    cost_model: CostModelName = None,
    model: Model = None,
    cluster: Cluster = None,
    nodes: Nodes = None,
    global_batch: Batch = None,
    sequence: Sequence = None,
    phase: Phase = None,
    planner: Planner = "ours",
    time_limit: TimeLimit = None,
    gap: Gap = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Find the fastest legal plan of a scenario, with its certificate."""
    from moeplan._screen import print_json, print_result

    flags = given_flags(model, cluster, nodes, global_batch, sequence, phase)
    problem = with_cost_model(scenario_of(scenario, settings, flags), cost_model)
    result = _planned(problem, planner=planner, time_limit_s=time_limit, gap=gap)
    if strict:
        refuse_assumed(result.tier, problem)
    if as_json:
        print_json(result.model_dump(mode="json", by_alias=True))
    else:
        print_result(result, problem)


@app.command()
@_guarded()
def simulate(
    scenario: ScenarioName = None,
    plan_file: PlanFile = None,
    settings: Settings = None,
    cost_model: CostModelName = None,
    model: Model = None,
    cluster: Cluster = None,
    nodes: Nodes = None,
    global_batch: Batch = None,
    sequence: Sequence = None,
    phase: Phase = None,
    trace: Annotated[Path | None, typer.Option(help="Write a trace for ui.perfetto.dev: .json or .json.gz.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Draw the step: .png, .svg or .pdf.")] = None,
    heatmap: Annotated[Path | None, typer.Option(help="Draw who sends how much to whom: .png, .svg or .pdf.")] = None,
    jitter: Annotated[float, typer.Option(help="Standard deviation of the logarithm of each task's time.")] = 0.0,
    stragglers: Annotated[int, typer.Option(help="GPUs that are slow all the time.")] = 0,
    slowdown: Annotated[
        float | None, typer.Option(help="Times as long as others a straggler takes.  [default: 1.1]")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of the noise.  [default: 0]")] = None,
    strict: Strict = False,
    as_json: Json = False,
) -> None:
    """Run one step of a plan in virtual time: step time, where it goes, memory, traces and pictures."""
    files = _checked({"perfetto": trace, "gantt": plot, "heatmap": heatmap})
    noise = noise_of(jitter=jitter, stragglers=stragglers, slowdown=slowdown, seed=seed)
    flags = given_flags(model, cluster, nodes, global_batch, sequence, phase)
    problem, chosen = _problem_and_plan(scenario, plan_file, settings, flags, cost_model)
    _simulated(problem, chosen, noise, files=files, as_json=as_json, strict=strict)


@app.command(name="export")
@_guarded()
def export_command(
    format_name: Annotated[
        str, typer.Argument(metavar="FORMAT", help="What kind of file: see `moeplan list exporters`.")
    ],
    path: Annotated[Path, typer.Argument(metavar="FILE", help="Where to write it.")],
    scenario: ScenarioName = None,
    plan_file: PlanFile = None,
    settings: Settings = None,
) -> None:
    """Write a plan's step, or where a placed plan has its experts, in one format of the exporters' menu."""
    from moeplan import api

    files = _checked({format_name: path})
    problem, chosen = _problem_and_plan(scenario, plan_file, settings, {})
    if api.noun_of(format_name) == "placing":
        api.export(api.expert_map(problem, chosen), path, format=format_name)
        print(f"wrote {path}", file=sys.stderr)
    else:
        _simulated(problem, chosen, None, files=files, as_json=None)


@app.command(name="what-if")
@_guarded()
def what_if(
    words: Annotated[
        list[str],
        typer.Argument(
            metavar="[SCENARIO] KEY=A,B,C...", help="The scenario (unless --model is given), then the changes."
        ),
    ],
    settings: Settings = None,
    model: Model = None,
    cluster: Cluster = None,
    nodes: Nodes = None,
    global_batch: Batch = None,
    sequence: Sequence = None,
    phase: Phase = None,
    replan: Annotated[
        bool, typer.Option("--replan/--no-replan", help="Plan each anew, or keep the base's plan.")
    ] = True,
    planner: Planner = "ours",
    time_limit: TimeLimit = None,
    gap: Gap = None,
    as_json: Json = False,
) -> None:
    """Plan every cell of a grid of changes and compare each with the scenario as it is.

    Several keys make a grid: `nodes=4,8 routing.skew=0,1.2` are four cells, after the base.
    """
    from moeplan._waiting import waiting
    from moeplan.grid import what_if as ask

    flags = given_flags(model, cluster, nodes, global_batch, sequence, phase)
    name, changes = (None, words) if re.match(r"[\w.]+=", words[0]) else (words[0], words[1:])
    problem, grid = scenario_of(name, settings, flags), grid_of(changes)
    limits: dict[str, Any] = {"planner": planner, "time_limit_s": time_limit, "gap": gap}
    with waiting("planning") as progress:
        found = ask(problem, grid, replan=replan, progress=progress, **limits)
    if as_json:
        from moeplan._screen import print_json

        rows = [_row_document(row) for row in found.rows]
        print_json({"schema": "moeplan.what-if/v1", "base": _row_document(found.base), "rows": rows})
    else:
        from moeplan._screen import print_rows

        print_rows(found.base, found.rows)


@app.command(name="list")
@_guarded()
def list_command(
    kind: Annotated[
        str | None, typer.Argument(metavar="KIND", help="models, topologies, cost-models, scenarios, schedules, ...")
    ] = None,
    as_json: Json = False,
) -> None:
    """List what there is of a kind; without one, the kinds."""
    from moeplan._screen import Screen, print_json

    rows = _kinds() if kind is None else [(name, _about(kind, name)) for name in _names(kind)]
    if as_json:
        print_json([{"name": name, "about": about} for name, about in rows])
    else:
        Screen().table(("", ""), rows)


@app.command()
@_guarded()
def show(
    name: Annotated[
        str, typer.Argument(metavar="NAME", help="Anything that `list` lists, or a file, such as a config.json.")
    ],
    as_json: Json = False,
) -> None:
    """Show what is known of a thing: a model's dimensions and parameter counts, a GPU's figures."""
    from moeplan import catalogue
    from moeplan._screen import print_json, print_thing

    found = catalogue.show(name)
    print_json(found) if as_json else print_thing(found)


@app.command()
@_guarded()
def sources(
    name: Annotated[str, typer.Argument(metavar="NAME", help="A scenario, model, topology or GPU, or a file.")],
    as_json: Json = False,
) -> None:
    """Print the bibliography behind a thing: each figure, and whether it is published, measured or assumed."""
    from moeplan import catalogue
    from moeplan._screen import Screen, print_json

    rows = catalogue.sources(name)
    if as_json:
        print_json([row._asdict() for row in rows])
    else:
        lines = [(row.figure, row.value, row.kind, "; ".join(filter(None, (row.cite, row.note)))) for row in rows]
        Screen().table(("figure", "value", "kind", "source and note"), lines, whole=(0, 2))


for command in (explain, place, execute, validate, calibrate, emulate, accuracy):
    app.command()(_guarded()(command))
app.add_typer(network_app(_guarded), name="network")


def _planned(scenario: Scenario, **options: Any) -> PlanResult:
    from moeplan import api
    from moeplan._waiting import waiting

    with waiting(f"planning {scenario.name}") as progress:
        return api.plan(scenario, progress=progress, **options)


def _problem_and_plan(
    name: str | None,
    plan_file: Path | None,
    settings: list[str] | None,
    flags: Mapping[str, Any],
    cost_model: str | None = None,
) -> tuple[Scenario, Plan | Path]:
    """The scenario and the plan or its file; a result's file holds both, and without a plan one is sought."""
    from moeplan.catalogue import read_plan
    from moeplan.catalogue.files import read

    if plan_file is None:
        problem = with_cost_model(scenario_of(name, settings, flags), cost_model)
        return problem, _planned(problem).plan
    read_plan(plan_file)
    made_here = name is None and {"model", "cluster"} <= flags.keys()
    refuse_choices(settings or [], but="choose.precision" if made_here else None)
    if name is not None or made_here:
        return with_cost_model(scenario_of(name, settings, flags), cost_model), plan_file
    document = read(plan_file).data.get("scenario")
    if not isinstance(document, dict):
        raise MoeplanError(f"{plan_file}: holds a plan without its scenario; name the scenario before --plan")
    return with_cost_model(scenario_of(document, settings, flags), cost_model), plan_file


def _checked(files: Mapping[str, Path | None]) -> dict[str, Path]:
    """The files that are asked for, by format; what cannot be written is found before the work and not after it."""
    from moeplan import menu
    from moeplan.exporters import suffix_of

    asked = {name: path for name, path in files.items() if path is not None}
    for name, path in asked.items():
        suffix_of(path, menu.load("exporters", name, "SUFFIXES"))
        if not path.parent.is_dir():
            raise MoeplanError(f"{path}: there is no folder {path.parent}; make it, or use another path")
    for path in asked.values():
        if sum(path.resolve() == other.resolve() for other in asked.values()) > 1:
            raise MoeplanError(f"{path}: is asked for twice, and one would replace the other; use two paths")
    return asked


def _simulated(
    problem: Scenario,
    plan: Plan | Path,
    noise: Noise | None,
    *,
    files: Mapping[str, Path],
    as_json: bool | None,
    strict: bool = False,
) -> None:
    """One step, the files that are asked for, and then the figures (`as_json` None: no figures)."""
    from moeplan import api
    from moeplan._waiting import waiting

    with waiting(f"simulating {problem.name}") as progress:
        progress("running the step", 0, None)
        found = api.simulate(problem, plan, noise=noise)
        if strict:
            refuse_assumed(found.figures.tier, problem)
        for name, path in files.items():
            progress(f"writing {path}", 0, None)
            api.export(found, path, format=name)
    if as_json:
        _print_simulation(found)
    elif as_json is not None:
        from moeplan._screen import print_figures

        print_figures(found.figures, found.plan, problem)
    for path in files.values():
        print(f"wrote {path}", file=sys.stderr)


def _print_simulation(found: Simulation) -> None:
    from moeplan import __version__
    from moeplan._screen import print_json

    noise = None if found.noise is None else asdict(found.noise)
    head = {"schema": "moeplan.simulation/v1", "moeplan_version": __version__, "scenario": found.scenario.document}
    plan = found.plan.model_dump(mode="json", by_alias=True)
    print_json(head | {"plan": plan, "noise": noise} | found.figures.model_dump(mode="json"))


def _row_document(row: Row) -> dict[str, Any]:
    result = None if row.result is None else row.result.model_dump(mode="json", by_alias=True)
    return row.record() | {"result": result}


def _kinds() -> list[tuple[str, str]]:
    from moeplan import catalogue
    from moeplan.catalogue.files import ALIASES, SHELVES, menus

    words = {kind: word for word, kind in ALIASES.items() if "-" in word}
    kinds = [*SHELVES, *menus()]
    return [(words.get(kind, kind), f"{len(catalogue.names(kind))} of them") for kind in kinds]


def _names(kind: str) -> list[str]:
    from moeplan import catalogue

    return catalogue.names(kind)


def _about(kind: str, name: str) -> str:
    from moeplan import menu
    from moeplan.catalogue.files import ALIASES, SHELVES, find, read

    kind = ALIASES.get(kind, kind)
    return str(read(find(name, kind).path).data.get("about", "")) if kind in SHELVES else menu.about(kind, name)
