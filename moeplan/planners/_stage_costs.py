"""What every stage of Alpa would take and hold: layers i to j - 1 on each submesh, in each of its configurations.

Layers meet in the residual stream alone. So each kind of layer is eliminated once for a mesh, down to a table of the
stream's states before and behind it, and a stage is a chain of tables: the exact optimum of its whole operator graph.
A configuration is a logical shape, a recomputation, and a price of memory: 0, or the seconds that a byte is worth when
a layer's bytes cost as much as its seconds. The inter-operator programme takes of these what fits.

Axes: Q sums (what is minimised, seconds, bytes that stay, bytes that a micro-batch leaves), I first layer of a stage,
J layer behind its last, U submesh, C configuration, S state of the residual stream.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from moeplan.domain.model import Layer
from moeplan.domain.plan import Recompute
from moeplan.domain.program import Floats, Ints
from moeplan.domain.scenario import Scenario
from moeplan.errors import InfeasibleError
from moeplan.planners._meshes import Mesh, mesh_of, shapes, submeshes
from moeplan.planners._operators import Batch, Graph, embedding_graph, head_graph, layer_graph
from moeplan.planners._sharded_layers import Sharded, Sharder
from moeplan.planners._sharding import chosen, reduced, tables_of
from moeplan.planners._stages_dp import MANY, StageProblem

_HELD = 4.0
"""Micro-batches whose activations a price counts."""


class Configuration(NamedTuple):
    """How the operators of a stage may be divided."""

    shape: tuple[int, int]
    recompute: Recompute
    is_priced: bool


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class StageCosts:
    """The problem of the inter-operator programme, and what its submeshes and configurations are."""

    problem: StageProblem
    batch: Batch
    configurations: tuple[tuple[Configuration, ...], ...]


def stage_costs(scenario: Scenario, sharder: Sharder, microbatches: int) -> StageCosts:
    """Of all stages, for a number of micro-batches that divides the batch. Raises InfeasibleError if there is none."""
    cluster, workload, layers = scenario.cluster, scenario.workload, scenario.model.all_layers
    batch = Batch(
        sequences=workload.global_batch // microbatches, sequence=workload.sequence, context=workload.sequence
    )
    sizes = [size for size in _sizes(scenario) if _may_hold(scenario, size)]
    if not sizes:
        raise InfeasibleError(f"the smallest layer does not fit a submesh of {cluster.num_gpus} GPUs; use more")
    ways = [tuple(_configurations(scenario, size)) for size in sizes]
    most_ways, shape = max(map(len, ways)), (len(layers), len(layers) + 1, len(sizes))
    seconds, most = np.full((*shape, most_ways), np.inf), np.zeros((*shape, most_ways), np.int64)
    for u, c in np.ndindex(len(sizes), most_ways):
        if c >= len(ways[u]):
            continue
        _, seconds[:, :, u, c], states_IJ, kept_IJ = _Chain(scenario, sharder, batch, microbatches, ways[u][c]).stages()
        usable_bytes = cluster.gpu.usable_memory_bytes
        most[:, :, u, c] = _most_stages(states_IJ, kept_IJ, microbatches=microbatches, usable_bytes=usable_bytes)
    problem = StageProblem(
        seconds_IJUC=seconds, most_IJUC=most, gpus_U=np.array(sizes, np.int64), num_gpus=cluster.num_gpus,
        num_microbatches=microbatches,
    )  # fmt: skip
    return StageCosts(problem=problem, batch=batch, configurations=tuple(ways))


def _configurations(scenario: Scenario, num_gpus: int) -> list[Configuration]:
    recomputes = scenario.choices.recompute or ("none", "full")
    grids = shapes(num_gpus, scenario.cluster.gpus_per_node)
    return [Configuration(*each) for each in product(grids, recomputes, (False, True))]


def _sizes(scenario: Scenario) -> list[int]:
    """GPUs of the submeshes: all of Alpa's, or those that the allowed numbers of stages leave."""
    gpus, listed = scenario.cluster.num_gpus, scenario.choices.pp
    return submeshes(scenario.cluster) if listed is None else sorted({gpus // pp for pp in listed if gpus % pp == 0})


def _may_hold(scenario: Scenario, num_gpus: int) -> bool:
    """Whether the smallest layer, divided in all ways, fits a submesh: two bytes for a weight and its gradient."""
    least = min(layer.parameters for layer in scenario.model.all_layers)
    return least * 2 / num_gpus <= scenario.cluster.gpu.usable_memory_bytes


def _most_stages(states_IJ: Floats, kept_IJ: Floats, *, microbatches: int, usable_bytes: float) -> Ints:
    """The largest s with  states + min(s, B) * kept <= usable bytes; 0 if not even one micro-batch fits."""
    with np.errstate(invalid="ignore"):
        most_IJ = np.floor((usable_bytes - states_IJ) / np.maximum(kept_IJ, 1.0))
        most_IJ[states_IJ + microbatches * kept_IJ <= usable_bytes] = MANY
    found_IJ: Ints = np.nan_to_num(np.clip(most_IJ, 0, MANY), nan=0.0).astype(np.int64)
    return found_IJ


class _Chain(NamedTuple):
    """The layers in one configuration."""

    scenario: Scenario
    sharder: Sharder
    batch: Batch
    microbatches: int
    configuration: Configuration

    def stages(self) -> Floats:
        """[Q, I, J]: of the stage of layers i to j - 1; infinite where there is none."""
        model, mesh = self.scenario.model, mesh_of(self.scenario.cluster, self.configuration.shape)
        kinds = dict.fromkeys(model.all_layers)
        price = self._price(mesh, max(kinds, key=lambda each: each.parameters)) if self.configuration.is_priced else 0.0
        tables = {layer: self._table(mesh, layer_graph(layer, self.batch), price) for layer in kinds}
        start_QIS = self._table(mesh, embedding_graph(model, self.batch), price)
        size = len(model.all_layers)
        out_QIJ = np.full((4, size, size + 1), np.inf)
        now_QIS = start_QIS[:, :0]
        for j, layer in enumerate(model.all_layers):
            new_QIS = start_QIS if j == 0 else 0.0 * start_QIS
            now_QIS = _then(np.concatenate([now_QIS, new_QIS], axis=1), tables[layer])
            last_QIS = self._behind(now_QIS, mesh, price) if j + 1 == size else now_QIS
            out_QIJ[:, : j + 1, j + 1] = _best(last_QIS[..., None])[..., 0]
        return out_QIJ

    def _behind(self, now_QIS: Floats, mesh: Mesh, price: float) -> Floats:
        """The head behind the last layer; then each module that predicts a further token, and the head again."""
        model, workload = self.scenario.model, self.scenario.workload
        head_QIS = self._table(mesh, head_graph(model, self.batch), price).swapaxes(1, 2)
        now_QIS = now_QIS + head_QIS
        if model.mtp is not None and workload.train_mtp:
            for _ in range(model.mtp.depth):
                for layer in model.mtp.layers:
                    now_QIS = _then(now_QIS, self._table(mesh, layer_graph(layer, self.batch), price))
                now_QIS = now_QIS + head_QIS
        return now_QIS

    def _price(self, mesh: Mesh, layer: Layer) -> float:
        """Seconds a byte: of the layer as it is cheapest, its seconds over its bytes."""
        value_QSS = self._table(mesh, layer_graph(layer, self.batch), 0.0)
        _, seconds, states, kept = value_QSS.reshape(4, -1)[:, value_QSS[0].argmin()]
        return float(seconds / (states + _HELD * kept))

    def _table(self, mesh: Mesh, graph: Graph, price: float) -> Floats:
        """[Q, S, S] by the states at both ends of a graph; one state at an end that is none."""
        return ends_table(
            self.sharder.sharded(
                graph, mesh, self.batch, recompute=self.configuration.recompute, microbatches=self.microbatches
            ),
            price,
        )


def _then(now_QIS: Floats, table_QSS: Floats) -> Floats:
    """[Q, I, S] and one layer more: the best state before it for each state behind."""
    return _best(now_QIS[..., None] + table_QSS[:, None])


def _best(total_QISS: Floats) -> Floats:
    """Over the states before."""
    at_IS = total_QISS[0].argmin(axis=1)
    found_QIS: Floats = np.take_along_axis(total_QISS, at_IS[None, :, None], axis=2)[:, :, 0]
    return found_QIS


def ends_table(sharded: Sharded, price_s_per_byte: float) -> Floats:
    """[Q, S, S]: all operators but those at the ends chosen best, for each state of the stream at the ends."""
    keep = tuple(end for end in sharded.ends if end is not None)
    problem = sharded.problem(held=_HELD)
    value, taken = reduced(tables_of(problem, price_s_per_byte=price_s_per_byte), keep=keep)
    grids = np.meshgrid(*(np.arange(len(sharded.ways[end])) for end in keep), indexing="ij")
    choice = chosen(taken, {end: grid.ravel() for end, grid in zip(keep, grids, strict=True)})
    sums = [
        np.sum([np.broadcast_to(s[at], value.size) for s, at in zip(column, choice, strict=True)], axis=0)
        for column in (sharded.seconds_S, sharded.state_bytes_S, sharded.kept_bytes_S)
    ]
    sums[0] += np.sum([r[choice[v], choice[w]] for (v, w), r in sharded.edges_SS.items()], axis=0)
    shape = (1 if end is None else len(sharded.ways[end]) for end in sharded.ends)
    return np.array([value.ravel(), *sums]).reshape(4, *shape)
