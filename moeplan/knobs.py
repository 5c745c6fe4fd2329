"""What of a scenario can be a little more or less: what may be bought, and what calibration may have got wrong.

And how long plans then take.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from moeplan.compiler.compile_plan import Compilation
from moeplan.cost.cost_model import Cost, CostModel, Shares
from moeplan.domain.cluster import Cluster
from moeplan.domain.plan import Plan
from moeplan.domain.program import Program
from moeplan.domain.scenario import Scenario
from moeplan.domain.timeline import Timeline
from moeplan.simulator.simulate import simulate
from moeplan.units import scaled

STEP = 0.1
_STARTS = ("kernel_start", "scaled_start", "tile_start", "attention_block", "exchange_start")
_CALIBRATED = ("latency", "message_overhead", "message_gap", "kernel_launch", "usable_memory", *_STARTS)
_SHARES = ("efficiency", "share_beside_exchange", "share_beside_compute")


@dataclass(frozen=True, kw_only=True, slots=True)
class Knob:
    """Fields of a scenario that are changed together, as `load` takes them, and what a person calls that."""

    name: str
    change: str
    """In words: `+10 %`, or `to 100 %` where a share can be no more."""
    changes: Mapping[str, object]


class Steps:
    """Steps of legal plans in a scenario, and where figures of its cluster are others: what is alike is done once."""

    def __init__(self, scenario: Scenario) -> None:
        self.scenario = scenario
        self._compiled: dict[Plan, Compilation] = {}
        self._step_s: dict[tuple[Program, Shares, tuple[Cost, ...]], float] = {}

    def timeline(self, plan: Plan) -> Timeline:
        """Of the scenario as it is."""
        self._compiled[plan] = Compilation(plan=plan, scenario=self.scenario)
        program, cost_model = self._compiled[plan].program, CostModel(gpu=self.scenario.cluster.gpu)
        timeline = simulate(program, cost_model)
        self._step_s[_told_apart(program, cost_model)] = timeline.step_s
        return timeline

    def changed_s(self, plan: Plan, cluster: Cluster) -> float:
        """Seconds of a plan whose timeline was asked for, on the cluster with other figures."""
        program, cost_model = self._compiled[plan].on(cluster).program, CostModel(gpu=cluster.gpu)
        key = _told_apart(program, cost_model)
        if key not in self._step_s:
            self._step_s[key] = simulate(program, cost_model).step_s
        return self._step_s[key]


def _told_apart(program: Program, cost_model: CostModel) -> tuple[Program, Shares, tuple[Cost, ...]]:
    """All that a simulation asks for."""
    return program, cost_model.shares, tuple(cost_model.cost(work) for work in program.works)


def worth_buying(scenario: Scenario) -> tuple[Knob, ...]:
    """A tenth more of each bandwidth and peak, a tenth less of each delay; those that the cluster has.

    The uplinks of a fabric grow with its NICs, and cards that `speeds` sets apart with the others; single wires that
    it sets apart do not.
    """
    figures = dict(_figures(scenario.document["cluster"]))
    links = sorted({path.split(".")[2] for path in figures if path.startswith("cluster.links.")})
    delays = ("latency", "message_overhead", "message_gap")
    more = {
        "NIC bandwidth": ["cluster.nic.bandwidth"],
        **{f"{link} bandwidth": [f"cluster.links.{link}.bandwidth"] for link in links},
        "memory bandwidth": ["cluster.gpu.memory_bandwidth"],
        "peak FLOP/s": [path for path in figures if path.startswith("cluster.gpu.peak_")],
    }
    less = {
        "message latency and overhead": [path for path in figures if path.rpartition(".")[2] in delays],
        "kernel launch": ["cluster.gpu.kernel_launch"],
    }
    found = [_knob(name, paths, figures, 1 + STEP) for name, paths in more.items()]
    found += [_knob(name, paths, figures, 1 - STEP) for name, paths in less.items()]
    cards = _faster_cards(scenario.document["cluster"])
    if cards and found[0] is not None:
        found[0] = Knob(name=found[0].name, change=found[0].change, changes={**found[0].changes, **cards})
    return tuple(knob for knob in found if knob is not None)


def asking_for_another_plan(scenario: Scenario) -> tuple[Knob, ...]:
    """A tenth more memory, and twice the nodes: what helps only those who plan anew."""
    memory = _knob("memory of each GPU", ["cluster.gpu.memory"], dict(_figures(scenario.document["cluster"])), 1 + STEP)
    assert memory is not None, "every GPU has memory"
    nodes = 2 * scenario.cluster.spec.nodes
    return memory, Knob(name="nodes", change="x 2", changes={"cluster.nodes": nodes})


def calibrated(scenario: Scenario) -> tuple[Knob, ...]:
    """Every constant of the cluster that is measured or guessed, a tenth less and a tenth more; a share ends at 100 %.

    A knob's name is the constant's path.
    """
    figures = {
        path: value
        for path, value in _figures(scenario.document["cluster"])
        if path.endswith(_SHARES) or path.rpartition(".")[2] in _CALIBRATED
    }
    found = [_knob(path, [path], figures, factor) for path in figures for factor in (1 - STEP, 1 + STEP)]
    return tuple(knob for knob in found if knob is not None)


def _knob(name: str, paths: list[str], figures: Mapping[str, str], factor: float) -> Knob | None:
    """None where the cluster has none of the fields, or none of them can change."""
    changes = {path: scaled(figures[path], factor) for path in paths if path in figures}
    changes = {path: value for path, value in changes.items() if value != scaled(figures[path], 1.0)}
    if not changes:
        return None
    is_cut = factor > 1 and "100 %" in changes.values()
    change = "to 100 %" if is_cut else f"{100 * (factor - 1):+.0f} %"
    return Knob(name=name, change=change, changes=dict[str, object](changes))


def _figures(section: Mapping[str, Any], path: str = "cluster") -> Iterator[tuple[str, str]]:
    """Path and text of every figure with a unit, lists left out."""
    for key, value in section.items():
        here = f"{path}.{key}"
        if isinstance(value, Mapping) and isinstance(value.get("value"), str):
            yield here, value["value"]
        elif isinstance(value, Mapping) and "value" not in value:
            yield from _figures(value, here)


def _faster_cards(cluster: Mapping[str, Any]) -> dict[str, object]:
    """The cluster's `speeds` with the bandwidth of cards and rails a tenth higher, if there are such."""
    speeds = cluster.get("speeds") or []
    chosen = [("nic" in each or "rail" in each) and "bandwidth" in each for each in speeds]
    if not any(chosen):
        return {}
    faster = [
        {**each, "bandwidth": {**each["bandwidth"], "value": scaled(each["bandwidth"]["value"], 1 + STEP)}}
        if is_card
        else each
        for each, is_card in zip(speeds, chosen, strict=True)
    ]
    return {"cluster.speeds": faster}
