"""What a user of the package may rely on: its names, its signatures, and how little an import costs."""

from __future__ import annotations

import inspect
import subprocess
import sys
import tomllib
from collections.abc import Mapping
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

import moeplan as mp

HEAVY = ("highspy", "matplotlib", "networkx", "numpy", "pulp", "pydantic", "ruamel", "simpy", "torch")
SIGNATURES = {
    "calibrate": "(out, scenario='tiny-moe-2-ranks', *, quick=False, device='auto', progress=None)",
    "validate": (
        "(scenario, plan=None, *, cost_model=None, candidates=1, launches=3, steps=12, device='auto', seed=0, "
        "tolerance=None, progress=None)"
    ),
    "execute": "(scenario, plan=None, *, steps=3, device='auto', seed=0, progress=None)",
    "execute_roles": "(scenario, plan=None, *, steps=3, device='auto', seed=0, progress=None)",
    "document": "(source, changes={})",
    "explain": "(source, plan=None, *, replan=False, planner='ours', time_limit_s=None, gap=None, progress=None)",
    "export": "(result, path, *, format=None, **options)",
    "load": "(source, changes={})",
    "plan": "(scenario, *, planner='ours', time_limit_s=None, gap=None, progress=None)",
    "cluster_from": "(name, *, nodes=None, changes={})",
    "place": (
        "(scenario=None, *, load=None, array=None, gpus=None, gpus_per_node=None, slots=None, placer='ilp', "
        "objective='balance', split='even', now=None, max_moves=None, time_limit_s=10.0, seed=0, progress=None)"
    ),
    "replay": (
        "(trace, *, scenario=None, policy='all', gpus=None, slots=None, array=None, batch_tokens=None, experts=None, "
        "placer='local_search', split='even', time_limit_s=10.0, seed=0, progress=None, **options)"
    ),
    "scenario_from": "(*, model, cluster, global_batch, sequence, nodes=None, phase='train', changes={})",
    "show": "(name)",
    "simulate": "(scenario, plan, *, noise=None)",
    "sources": "(source)",
    "sweep": "(scenario, grid, *, planner='ours', time_limit_s=None, gap=None, progress=None)",
    "what_if": "(scenario, changes, *, replan=True, planner='ours', time_limit_s=None, gap=None, progress=None)",
}
REPLAYED = (
    "policy", "options", "ratio_TL", "value_TL", "is_replaced_TL", "moves_TL", "migration_s_TL", "oracle",
)  # fmt: skip
FIELDS = {
    "Calibration": (
        "base", "measured", "compute_share", "residuals", "environment", "date", "dropped", "repetitions",
    ),
    "Execution": (
        "scenario", "plan", "device", "timeline", "processor_s_T", "losses", "step_s_S", "sent_bytes", "gradients",
        "repetitions",
    ),
    "Explanation": (
        "scenario", "plan", "step_s", "lower_bound_s", "causes_s", "path", "helps", "memory", "runner_up", "twins",
        "stability",
    ),
    "Noise": ("jitter", "stragglers", "slowdown", "seed"),
    "Placing": ("placer", "objective", "num_gpus", "slots", "split", "numbers", "problems", "layers", "num_layers"),
    "PolicyReplay": REPLAYED,
    "Replay": ("placer", "num_gpus", "slots", "split", "num_steps", "numbers", "unit", "policies"),
    "Role": (
        "rank", "name", "device", "step_s", "predicted_step_s", "busy_s", "allocated_bytes", "reserved_bytes",
        "predicted_bytes",
    ),
    "Row": ("changes", "plan", "result", "error", "step_change"),
    "Scenario": ("name", "cluster", "model", "workload", "routing", "choices", "document"),
    "Simulation": ("scenario", "plan", "timeline", "figures", "noise"),
    "Validation": (
        "scenario", "plan", "device", "step", "speed", "tasks", "phases", "memory", "bias", "task_error", "launches",
        "repetitions", "dropped_repetitions", "tolerance", "predicted", "measured",
    ),
    "WhatIf": ("base", "rows"),
}  # fmt: skip
RESULT = (
    "schema_version", "moeplan_version", "planner", "scenario", "plan", "step_s", "step_interval_s", "tier", "mfu",
    "tokens_per_s_per_gpu", "peak_memory_bytes", "lower_bound_s", "gap", "breakdown_s", "memory",
    "evaluated", "runners_up",
)  # fmt: skip
ERRORS = ("CatalogueError", "ExecutionError", "InfeasibleError", "MoeplanError", "PlanError", "SimulationError")


def loaded_by(*arguments: str) -> set[str]:
    """The packages that a fresh interpreter has loaded in the end."""
    code = "import sys, atexit; atexit.register(lambda: print('\\n', *sys.modules, file=sys.stderr)); "
    done = subprocess.run([sys.executable, "-c", code + arguments[0], *arguments[1:]], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return {name.partition(".")[0] for name in done.stderr.split()}


def bare(function: Any) -> str:
    """A signature without its types."""
    signature, empty = inspect.signature(function), inspect.Parameter.empty
    shown = [each.replace(annotation=empty, default=_plain(each.default)) for each in signature.parameters.values()]
    return str(signature.replace(parameters=shown, return_annotation=inspect.Signature.empty))


def _plain(default: object) -> object:
    return dict(default) if isinstance(default, Mapping) else default


def test_the_public_names_are_these() -> None:
    nouns = {*FIELDS, *ERRORS, "Plan", "PlanResult", "Figures", "__version__", "accuracy", "network"}
    assert set(mp.__all__) == {*SIGNATURES, *nouns}
    assert mp.__all__ == sorted(mp.__all__)
    assert all(getattr(mp, name) is not None and name in dir(mp) for name in mp.__all__)


@pytest.mark.parametrize("name", SIGNATURES)
def test_a_signature_is_as_promised(name: str) -> None:
    assert bare(getattr(mp, name)) == SIGNATURES[name]


@pytest.mark.parametrize("name", FIELDS)
def test_the_fields_of_a_noun_are_as_promised(name: str) -> None:
    assert tuple(field.name for field in fields(getattr(mp, name))) == FIELDS[name]


def test_a_result_has_the_fields_that_are_promised() -> None:
    assert tuple(mp.PlanResult.model_fields) == RESULT
    assert set(mp.Figures.model_fields) <= set(RESULT)


def test_every_error_is_a_moeplan_error() -> None:
    assert all(issubclass(getattr(mp, name), mp.MoeplanError) for name in ERRORS)
    assert issubclass(mp.InfeasibleError, mp.PlanError)


def test_a_name_that_is_not_there_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="nothing_of_that_name"):
        mp.nothing_of_that_name  # noqa: B018


def test_a_verb_stays_a_verb_when_its_module_is_imported() -> None:
    modules = "moeplan.api, moeplan.cli, moeplan.grid"
    loaded_by(f"import moeplan as mp, {modules}; assert all(callable(getattr(mp, name)) for name in {[*SIGNATURES]})")


def test_the_version_is_the_projects() -> None:
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    assert mp.__version__ == project["version"]


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import moeplan").isdisjoint({*HEAVY, "rich", "typer"})


@pytest.mark.parametrize("words", [["--help"], ["plan", "--help"], ["simulate", "--help"], ["what-if", "--help"]])
def test_help_loads_nothing_heavy(words: list[str]) -> None:
    loaded = loaded_by("from moeplan.cli import main; main()", *words)
    assert "typer" in loaded
    assert loaded.isdisjoint({*HEAVY} - {"pydantic"})  # typer may read options with it


def test_loading_a_scenario_loads_no_solver_simulator_or_picture() -> None:
    loaded = loaded_by("import moeplan as mp; mp.show('mixtral-8x7b')")
    assert loaded.isdisjoint({"highspy", "matplotlib", "pulp", "simpy", "torch"})
