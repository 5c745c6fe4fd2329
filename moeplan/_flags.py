"""The flags that several commands share, and what they mean."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from moeplan.errors import MoeplanError

if TYPE_CHECKING:
    from moeplan.domain.scenario import Scenario
    from moeplan.simulator.noise import Noise

ScenarioName = Annotated[
    str | None,
    typer.Argument(metavar="SCENARIO", help="A scenario's name or file, or a file that `plan --json` wrote."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="Set any field, as in cluster.nic.bandwidth=25GB/s."),
]
Model = Annotated[str | None, typer.Option(help="A model's name, or the path of a Hugging Face config.json.")]
Cluster = Annotated[str | None, typer.Option(help="A topology's name or file.")]
Nodes = Annotated[int | None, typer.Option(help="Nodes of the cluster.")]
Batch = Annotated[int | None, typer.Option("--global-batch", help="Sequences of a step.")]
Sequence = Annotated[int | None, typer.Option("--seq", help="Tokens of a sequence.")]
Phase = Annotated[str | None, typer.Option(help="train, prefill or decode.")]
Planner = Annotated[str, typer.Option(help="Which planner: see `moeplan list planners`.")]
TimeLimit = Annotated[float | None, typer.Option(help="Seconds after which the best plan so far is the answer.")]
Gap = Annotated[
    float | None,
    typer.Option(help="Stop when proven within this share of the best (0.01: one per cent). Default: a fixed effort."),
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON document and nothing else.")]
Strict = Annotated[bool, typer.Option("--strict", help="Refuse a step of which nothing was ever measured.")]
PlanFile = Annotated[
    Path | None, typer.Option("--plan", help="A plan, or what `plan --json` wrote; without it, planned now.")
]
CostModelName = Annotated[
    str | None,
    typer.Option("--cost-model", metavar="NAME", help="The devices' sheet: a name of the catalogue, or a file."),
]

FIELDS = {
    "model": "model",
    "cluster": "cluster",
    "nodes": "nodes",
    "global_batch": "workload.global_batch",
    "sequence": "workload.sequence",
    "phase": "workload.phase",
}
"""The field that each flag sets where a scenario is named."""


def given_flags(
    model: str | None,
    cluster: str | None,
    nodes: int | None,
    global_batch: int | None,
    sequence: int | None,
    phase: str | None,
) -> dict[str, str | int]:
    """The flags that were given."""
    values = (model, cluster, nodes, global_batch, sequence, phase)
    return {name: value for name, value in zip(FIELDS, values, strict=True) if value is not None}


def scenario_of(
    source: str | Mapping[str, Any] | None, settings: list[str] | None, flags: Mapping[str, Any]
) -> Scenario:
    """The scenario that is given, or else made of a model and a cluster, after every `--set`."""
    from moeplan.api import load
    from moeplan.catalogue import scenario_from
    from moeplan.catalogue.overlay import Given

    changes = changes_of(settings or [])
    if source is not None:
        given: dict[str, object] = {FIELDS[flag]: Given(value, _word(flag)) for flag, value in flags.items()}
        for key in given.keys() & changes.keys():
            raise MoeplanError(f"--set {key}: is also given as a flag; give it once")
        return load(source, given | changes)
    missing = [flag for flag in ("model", "cluster", "global_batch", "sequence") if flag not in flags]
    if missing:
        words = ", ".join(map(_word, missing))
        raise MoeplanError(f"no scenario is named, and {words} not given; name one (see `moeplan list scenarios`)")
    return scenario_from(**flags, changes=changes)


def refuse_assumed(tier: str | None, scenario: Scenario) -> None:
    """Raises MoeplanError where a step's seconds rest on guesses alone."""
    if tier == "assumed":
        gpu = scenario.cluster.gpu.name
        found = f"--strict: nothing of {gpu} was measured, so what its step takes is assumed"
        raise MoeplanError(f"{found}; give it a sheet with measured figures, or leave --strict out")


def with_cost_model(scenario: Scenario, cost_model: str | None) -> Scenario:
    """The scenario with another sheet for its devices."""
    from moeplan.validating import with_cost_model as changed

    return changed(scenario, cost_model)


def _word(flag: str) -> str:
    return {"sequence": "--seq"}.get(flag, "--" + flag.replace("_", "-"))


def changes_of(settings: list[str]) -> dict[str, str]:
    """The fields that `--set` options set."""
    found: dict[str, str] = {}
    for text in settings:
        key, equals, value = text.partition("=")
        if not equals or not key.strip():
            raise MoeplanError(f"--set {text!r}: is not key=value; write it as in --set nodes=4")
        if key.strip() in found:
            raise MoeplanError(f"--set {key.strip()}: is set twice; set it once")
        found[key.strip()] = value
    return found


def refuse_choices(settings: list[str], *, but: str | None = None) -> None:
    """Raises MoeplanError: a plan that is given has chosen. `but`: what a scenario of flags may need all the same."""
    for setting in settings:
        key = setting.partition("=")[0].strip()
        if key.split(".")[0] == "choose" and not (but and key.startswith(but)):
            raise MoeplanError(f"--set {key}: choose has no effect on a given plan; leave out --plan, or the setting")


def grid_of(words: list[str]) -> dict[str, list[str]]:
    """Each key with its values; a comma inside brackets, braces or quotes belongs to a value."""
    found: dict[str, list[str]] = {}
    for key, text in ((key, value) for word in words for key, value in changes_of([word]).items()):
        if key in found:
            raise MoeplanError(f"{key}: is varied twice; write its values in one list, as in {key}=1,2")
        found[key] = [
            value.strip() for value in re.findall(r"""((?:\[[^\]]*\]|\{[^}]*\}|"[^"]*"|'[^']*'|[^,])+)""", text)
        ]
        if not found[key] or not all(found[key]) or text.count(",,") or text.startswith(",") or text.endswith(","):
            raise MoeplanError(f"{key}={text}: a value is missing; write them as in {key}=1,2")
    return found


def noise_of(*, jitter: float, stragglers: int, slowdown: float | None, seed: int | None) -> Noise | None:
    from moeplan.simulator.noise import Noise

    if slowdown is not None and not stragglers:
        raise MoeplanError(f"--slowdown {slowdown:g} has no effect without --stragglers; add it, or leave this out")
    if seed is not None and not stragglers and not jitter:
        raise MoeplanError(f"--seed {seed} has no effect without noise; add --jitter or --stragglers, or leave it out")
    if not stragglers and not jitter:
        return None
    return Noise(jitter=jitter, stragglers=stragglers, slowdown=1.1 if slowdown is None else slowdown, seed=seed or 0)
