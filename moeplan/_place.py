"""The sub-command `moeplan place`: experts on GPUs, from a load or a scenario.

What it needs is imported when it runs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeplan._flags import Json, ScenarioName, Settings, scenario_of
from moeplan._replay import check_flags, run_replay
from moeplan.errors import MoeplanError

if TYPE_CHECKING:
    from moeplan.domain.plan import Plan
    from moeplan.domain.scenario import Scenario
    from moeplan.placing import Placing


def place(
    scenario: ScenarioName = None,
    load: Annotated[
        Path | None, typer.Option(help="Tokens of each expert: .npz, .csv, .jsonl, or SGLang's .json or .pt.")
    ] = None,
    array: Annotated[str | None, typer.Option(help="Which array of the .npz.")] = None,
    gpus: Annotated[int | None, typer.Option(help="GPUs of the expert-parallel group.")] = None,
    gpus_per_node: Annotated[int | None, typer.Option(help="Of objective visits, without a scenario.")] = None,
    slots: Annotated[int | None, typer.Option(help="Replicas in all. Default: one of each expert.")] = None,
    placer: Annotated[
        str | None, typer.Option(help="A name of `moeplan list placers`. Default: ilp; with a trace local_search.")
    ] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="balance (the default: tokens of the fullest GPU), makespan (seconds; needs a scenario) or visits "
            "(nodes that a token is sent to; --load holds expert ids by token, layer and pick)."
        ),
    ] = None,
    split: Annotated[str, typer.Option(help="even or optimal: how an expert's tokens go to its replicas.")] = "even",
    now: Annotated[Path | None, typer.Option("--from", help="Where experts stand: what `place --json` wrote.")] = None,
    max_moves: Annotated[int | None, typer.Option(help="The most replicas of a layer that may move.")] = None,
    time_limit: Annotated[float, typer.Option(help="Seconds for a layer.")] = 10.0,
    seed: Annotated[int, typer.Option(help="Of the search.")] = 0,
    trace: Annotated[
        Path | None,
        typer.Option("--routing-trace", help="Place over time, as recorded: counts by step, or expert ids."),
    ] = None,
    policy: Annotated[
        str | None, typer.Option(help="A name of `moeplan list adaptations`, or all (the default).")
    ] = None,
    every: Annotated[int | None, typer.Option(help="Steps from one re-placement to the next. [4]")] = None,
    threshold: Annotated[
        float | None, typer.Option(help="Place anew where a step costs this share more than promised. [0.1]")
    ] = None,
    horizon: Annotated[
        int | None, typer.Option(help="Place anew where so many steps like the last pay the moves back. [10]")
    ] = None,
    move_cost: Annotated[
        float | None, typer.Option(help="What a move costs then, in balanced steps; a scenario times it. [0.01]")
    ] = None,
    window: Annotated[int | None, typer.Option(help="Past steps that a re-placement looks at. [1]")] = None,
    batch_tokens: Annotated[
        int | None, typer.Option(help="The trace holds expert ids; cut them into steps of so many tokens.")
    ] = None,
    experts: Annotated[int | None, typer.Option(help="How many experts the ids name. Default: the largest.")] = None,
    plot: Annotated[
        Path | None, typer.Option(help="Draw the trace's steps under each policy: .png, .svg or .pdf.")
    ] = None,
    plan_file: Annotated[
        Path | None,
        typer.Option(
            "--plan", help="For this plan's groups; prints what --json does, with the plan and its placement."
        ),
    ] = None,
    settings: Settings = None,
    as_json: Json = False,
) -> None:
    """Place experts, and replicas of them, on GPUs: how full the fullest is, and how much better it could be.

    With --routing-trace over time: when to place anew, and what each policy loses against an oracle.
    """
    from moeplan._waiting import waiting
    from moeplan.placing import place as run

    over_time = {
        "policy": policy, "every": every, "threshold": threshold, "horizon": horizon, "move_cost": move_cost,
        "window": window, "batch_tokens": batch_tokens, "experts": experts,
    }  # fmt: skip
    flags = {f"--{name.replace('_', '-')}": value for name, value in over_time.items()}
    check_flags(
        trace is not None,
        with_trace={**flags, "--plot": plot},
        without={
            "--load": load,
            "--from": now,
            "--objective": objective,
            "--gpus-per-node": gpus_per_node,
            "--plan": plan_file,
        },
    )
    problem, plan = _asked(scenario, plan_file, settings)
    if trace is not None:
        run_replay(
            trace, scenario=problem, array=array, gpus=gpus, slots=slots, placer=placer, split=split,
            max_moves=max_moves, time_limit_s=time_limit, seed=seed, plot=plot, as_json=as_json, **over_time,
        )  # fmt: skip
        return
    gpus = plan.ep if plan and gpus is None else gpus
    with waiting("placing") as progress:
        found = run(
            problem, load=load, array=array, gpus=gpus, gpus_per_node=gpus_per_node, slots=slots,
            placer=placer or "ilp", objective=objective or "balance", split=split,  # type: ignore[arg-type]
            now=now, max_moves=max_moves, time_limit_s=time_limit, seed=seed, progress=progress,
        )  # fmt: skip
    if as_json or plan:
        from moeplan._screen import print_json

        print_json(found.document() | _planned(found, problem, plan))
    else:
        _print(found)


def _asked(name: str | None, plan_file: Path | None, settings: list[str] | None) -> tuple[Scenario | None, Plan | None]:
    """The scenario that is named, or else the one in the plan's file, and the plan."""
    from moeplan.catalogue import read_plan
    from moeplan.catalogue.files import read

    plan = None if plan_file is None else read_plan(plan_file)
    source = name if name is not None or plan_file is None else read(plan_file).data.get("scenario")
    if source is None and settings:
        raise MoeplanError(f"--set {settings[0]}: no scenario is given; name one, or leave out --set")
    return None if source is None else scenario_of(source, settings, {}), plan


def _planned(found: Placing, problem: Scenario | None, plan: Plan | None) -> dict[str, Any]:
    from moeplan.partition.legal import check_plan

    if plan is None:
        return {}
    placed = found.into(plan)
    if problem is not None:
        check_plan(placed, problem)
    scenario = {} if problem is None else {"scenario": problem.document}
    return scenario | {"plan": placed.model_dump(mode="json", by_alias=True)}


def _print(found: Placing) -> None:
    from moeplan._screen import Screen

    screen, layers = Screen(), found.document()["layers"]
    title = f"{found.slots} replicas on {found.num_gpus} GPUs by {found.placer}, split {found.split}"
    screen.line(title, style="bold cyan")
    also = {"makespan": ("time", "bound"), "visits": ("nodes per token", "bound")}.get(found.objective, ())
    heads = (
        "layer",
        *also,
        "fullest GPU",
        "over mean",
        "bound",
        "gap",
        "took",
        "bound by",
    )
    rows = [
        _row(layer, problem.tokens_E.sum() / found.num_gpus)
        for layer, problem in zip(layers, found.problems, strict=True)
    ]
    screen.table(heads, _folded(found.numbers, rows), right="r" * (len(heads) - 1))
    worst = max(layers, key=lambda layer: float(layer["gap"]))
    screen.line()
    screen.line(f"Proven within {_share(worst['gap'])} of the best in every layer (worst: layer {worst['layer']}).")


def _folded(numbers: Sequence[int], rows: Sequence[tuple[str, ...]]) -> Iterator[tuple[str, ...]]:
    """A row for each layer after its number; neighbours that are alike in all share one."""
    numbered = enumerate(zip(numbers, rows, strict=True))
    for (_, row), alike in groupby(numbered, key=lambda each: (each[1][0] - each[0], each[1][1])):
        layers = [number for _, (number, _) in alike]
        yield (f"{layers[0]}-{layers[-1]}" if len(layers) > 1 else str(layers[0]), *row)


def _row(layer: dict[str, Any], mean: float) -> tuple[str, ...]:
    from moeplan.units import show

    times = tuple(show(layer[key], "s") for key in ("makespan_s", "lower_bound_s") if key in layer)
    times += tuple(f"{layer[key]:.3f}" for key in ("visits", "lower_bound_visits") if key in layer)
    return (
        *times, f"{layer['max_tokens']:,.0f}", f"{layer['max_tokens'] / mean:.4f}",
        f"{layer['lower_bound_tokens']:,.0f}", _share(layer["gap"]), show(layer["seconds"], "s"),
        layer["proof"].partition(":")[0],
    )  # fmt: skip


def _share(gap: float) -> str:
    return f"{100 * gap:.2g} %" if gap < 1 else f"{1 + gap:.3g} times"
