"""A compiled and simulated step against the closed form of its schedule, where the network is free and the stages equal."""

from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from moeplan import catalogue, menu
from moeplan.compiler.compile_plan import compile_plan
from moeplan.cost.cost_model import Cost, CostModel
from moeplan.domain.cluster import Cluster
from moeplan.domain.plan import Plan
from moeplan.domain.program import Pass, Stream, Work
from moeplan.domain.scenario import Scenario
from moeplan.domain.timeline import Timeline
from moeplan.schedules import finish_times
from moeplan.simulator.simulate import simulate

RATIOS = [(1.0, 1.0, 1.0), (2.0, 1.0, 1.0), (1.0, 2.0, 1.0), (1.0, 1.0, 2.0), (4.0, 4.0, 3.0), (0.25, 0.5, 0.125)]
SIZES = [
    (name, pp, microbatches, chunks)
    for name in ("gpipe", "one_f_one_b", "zero_bubble", "interleaved", "zbv", "dual_pipe")
    for pp in (2, 4)
    for microbatches in (1, 2, 4, 8, 16)
    for chunks in {"interleaved": (2, 4), "zbv": (2,), "dual_pipe": (2,)}.get(name, (1,))
]


def without_wires(cluster: Cluster) -> Cluster:
    """The same cluster with links of 1e30 bytes/s and no latency."""
    return replace(
        cluster,
        bandwidth_bytes_per_s_K=np.full_like(cluster.bandwidth_bytes_per_s_K, 1e30),
        latency_s_K=np.zeros_like(cluster.latency_s_K),
    )


@lru_cache
def scenario(model: str, num_gpus: int, microbatches: int) -> Scenario:
    """One node whose network is free, and a model of 16 layers or less."""
    one_node = {"cluster.nodes": 1, "cluster.gpus_per_node": num_gpus, "cluster.nic.per_node": 1}
    changes: dict[str, Any] = {**one_node, "workload.global_batch": microbatches, "workload.sequence": 512}
    given = catalogue.scenario_from(
        model=model, cluster="hgx-h100-rail", global_batch=microbatches, sequence=512, changes=changes
    )
    return replace(given, cluster=without_wires(given.cluster))


def deeper(given: Scenario, num_layers: int) -> Scenario:
    layers = given.model.layers[:1] * num_layers
    return replace(given, model=given.model.model_copy(update={"layers": layers}))


class EqualStages:
    """Costs of a layer's passes; the ends of the model and the optimizer cost nothing."""

    def __init__(self, forward_s: float, input_s: float, weight_s: float) -> None:
        self.seconds = {"forward": forward_s, "input": input_s, "weight": weight_s}

    def cost(self, work: Work) -> Cost:
        if work.kind != "attention":
            return Cost(0.0, 0.0)
        ends = {kernel.name.rsplit("_", 1)[-1] for kernel in work.kernels}
        passes = {"input"} * ("dgrad" in ends) | {"weight"} * ("wgrad" in ends) or {"forward"}
        return Cost(sum(self.seconds[each] for each in passes), 0.0)


EqualStages.cost.__doc__ = "Seconds by what the kernels' names say of the pass."


def plan_of(name: str, pp: int, chunks: int, layers_per_stage: int = 1) -> Plan:
    num_virtual = menu.load("schedules", name, "num_virtual_stages")(pp, chunks)
    stages = (layers_per_stage,) * num_virtual
    return Plan(dp=1, pp=pp, vpp=chunks, schedule=name, stages=stages, zero_dense=0, zero_expert=0)


def is_legal(name: str, pp: int, microbatches: int, chunks: int) -> bool:
    try:
        menu.load("schedules", name, "check")(pp, microbatches, num_chunks=chunks)
    except ValueError:
        return False
    return True
