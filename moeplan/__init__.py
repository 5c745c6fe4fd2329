"""moeplan plans, simulates and runs Mixture-of-Experts models on GPU clusters; every plan comes with a certificate.

    import moeplan as mp

    scenario = mp.load("mixtral-8x7b-64xh100", {"cluster.nic.bandwidth": "25 GB/s"})
    result = mp.plan(scenario)
    simulation = mp.simulate(scenario, result.plan, noise=mp.Noise(jitter=0.02))
    mp.export(simulation, "step.json")
    table = mp.what_if(scenario, {"nodes": [4, 8, 16]})

A name is imported when it is first used, so that `import moeplan` loads nothing.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moeplan import accuracy, network
    from moeplan.api import Simulation, export, load, plan, simulate
    from moeplan.catalogue import cluster_from, document, scenario_from, show, sources
    from moeplan.domain.plan import Plan
    from moeplan.domain.result import Figures, PlanResult
    from moeplan.domain.scenario import Scenario
    from moeplan.errors import (
        CatalogueError,
        ExecutionError,
        InfeasibleError,
        MoeplanError,
        PlanError,
        SimulationError,
    )
    from moeplan.executing import execute, execute_roles
    from moeplan.executor.execute import Execution
    from moeplan.executor.roles import Role
    from moeplan.explaining import Explanation, explain
    from moeplan.grid import Row, WhatIf, sweep, what_if
    from moeplan.placing import Placing, place
    from moeplan.replaying import PolicyReplay, Replay, replay
    from moeplan.simulator.noise import Noise
    from moeplan.validating import calibrate, validate
    from moeplan.validator.calibrate import Calibration
    from moeplan.validator.validate import Validation

__version__ = "0.1.0"

_HOMES = {
    "moeplan.api": ("Simulation", "export", "load", "plan", "simulate"),
    "moeplan.catalogue": ("cluster_from", "document", "scenario_from", "show", "sources"),
    "moeplan.domain.plan": ("Plan",),
    "moeplan.domain.result": ("Figures", "PlanResult"),
    "moeplan.domain.scenario": ("Scenario",),
    "moeplan.errors": (
        "CatalogueError",
        "ExecutionError",
        "InfeasibleError",
        "MoeplanError",
        "PlanError",
        "SimulationError",
    ),
    "moeplan.executing": ("execute", "execute_roles"),
    "moeplan.executor.execute": ("Execution",),
    "moeplan.executor.roles": ("Role",),
    "moeplan.explaining": ("Explanation", "explain"),
    "moeplan.grid": ("Row", "WhatIf", "sweep", "what_if"),
    "moeplan.placing": ("Placing", "place"),
    "moeplan.replaying": ("PolicyReplay", "Replay", "replay"),
    "moeplan.simulator.noise": ("Noise",),
    "moeplan.validating": ("calibrate", "validate"),
    "moeplan.validator.calibrate": ("Calibration",),
    "moeplan.validator.validate": ("Validation",),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}

__all__ = [
    "Calibration",
    "CatalogueError",
    "Execution",
    "ExecutionError",
    "Explanation",
    "Figures",
    "InfeasibleError",
    "MoeplanError",
    "Noise",
    "Placing",
    "Plan",
    "PlanError",
    "PlanResult",
    "PolicyReplay",
    "Replay",
    "Role",
    "Row",
    "Scenario",
    "Simulation",
    "SimulationError",
    "Validation",
    "WhatIf",
    "__version__",
    "accuracy",
    "calibrate",
    "cluster_from",
    "document",
    "execute",
    "execute_roles",
    "explain",
    "export",
    "load",
    "network",
    "place",
    "plan",
    "replay",
    "scenario_from",
    "show",
    "simulate",
    "sources",
    "sweep",
    "validate",
    "what_if",
]


def __getattr__(name: str) -> Any:
    """The public object of that name, from the module where it lives."""
    if name in ("accuracy", "network"):
        return import_module(f"moeplan.{name}")
    if name not in _HOME_OF:
        raise AttributeError(f"module 'moeplan' has no attribute {name!r}")
    found = getattr(import_module(_HOME_OF[name]), name)
    globals()[name] = found
    return found


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
