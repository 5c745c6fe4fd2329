"""Seconds that one layer takes under a placement, and the best routing of tokens to replicas that stand already.

A GPU computes all copies that its replicas are given. Of these, (M - 1) / M reach it over NVLink: the GPU where a copy
starts, or whose NIC it comes in by, is each of the node's M with the same chance, and one of them is the GPU itself. So
the seconds depend on three figures only: copies in and out of the busiest node, and those of the fullest GPU.

Left out: a token whose experts share a node could be sent there once (de-duplicated dispatch). Counts by expert do not
tell which tokens those are; where token sets were recorded, `_visits` tells how many copies would then be sent.

Axes of arrays: E expert, G GPU, N node, R replica, S source, H home (an expert in a node).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moeplan.domain.placement import Floats, Ints, LayerPlacement, PlacementProblem, TokenPrices
from moeplan.errors import PlanError

if TYPE_CHECKING:
    from moeplan.placers._linear import Model

_ROUNDING = 1e-12


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class NodeProblem:
    """What a problem with prices says in terms of nodes.

    Seconds are `max(nic_s * busiest node's copies, nvlink_s * fullest GPU's) + compute_s * fullest GPU's`: the prices
    here hold the exchange factor and the share of copies that NVLink carries.
    """

    tokens_NE: Floats
    gpus_per_node: int
    slots: int
    slots_per_gpu: int
    nic_s: float
    nvlink_s: float
    compute_s: float

    @staticmethod
    def of(problem: PlacementProblem) -> NodeProblem:
        """The problem's nodes; raises PlanError where it has no prices, or where its GPUs or sources are not nodes."""
        prices = _prices(problem)
        share = (prices.gpus_per_node - 1) / prices.gpus_per_node
        return NodeProblem(
            tokens_NE=_tokens_NE(problem, prices.gpus_per_node),
            gpus_per_node=prices.gpus_per_node,
            slots=problem.slots,
            slots_per_gpu=problem.slots_per_gpu,
            nic_s=prices.exchange_factor * prices.nic_s,
            nvlink_s=prices.exchange_factor * prices.nvlink_s * share,
            compute_s=prices.compute_s,
        )

    @property
    def num_nodes(self) -> int:
        """Nodes of the expert-parallel group."""
        return int(self.tokens_NE.shape[0])

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return int(self.tokens_NE.shape[1])

    @property
    def slots_per_node(self) -> int:
        """The most replicas that a node holds."""
        return self.gpus_per_node * self.slots_per_gpu

    def seconds(self, busiest_node: float, fullest_gpu: float) -> float:
        """Seconds of the layer for copies through the busiest node's NICs and in the fullest GPU."""
        return max(self.nic_s * busiest_node, self.nvlink_s * fullest_gpu) + self.compute_s * fullest_gpu


def _prices(problem: PlacementProblem) -> TokenPrices:
    if problem.prices is None:
        raise PlanError("prices: none are given, so that a placement has no seconds; give what a token copy costs")
    if problem.num_gpus % problem.prices.gpus_per_node:
        raise PlanError(
            f"prices.gpus_per_node: {problem.prices.gpus_per_node} does not divide {problem.num_gpus} GPUs; "
            "use whole nodes"
        )
    return problem.prices


def _tokens_NE(problem: PlacementProblem, gpus_per_node: int) -> Floats:
    nodes, sources = problem.num_gpus // gpus_per_node, problem.tokens_SE.shape[0]
    if sources not in (1, nodes):
        raise PlanError(
            f"load: {sources} rows are not those of {nodes} nodes; give a row for each node, or one for all"
        )
    return problem.tokens_SE if sources == nodes else np.repeat(problem.tokens_SE / nodes, nodes, axis=0)


def value_s(problem: PlacementProblem, placement: LayerPlacement) -> float:
    """Seconds of the layer: `exchange_factor * max(NIC, NVLink) + compute`, each of the busiest node or GPU."""
    return NodeProblem.of(problem).seconds(*busiest(problem, placement))


def busiest(problem: PlacementProblem, placement: LayerPlacement) -> tuple[float, float]:
    """Copies in or out of the busiest node, whichever is more, and copies computed by the fullest GPU."""
    nodes = NodeProblem.of(problem)
    node_R = placement.gpu_R // nodes.gpus_per_node
    copies_NR = nodes.tokens_NE[:, placement.expert_R] * placement.share_SR
    foreign_NR = np.where(node_R == np.arange(nodes.num_nodes)[:, None], 0.0, copies_NR)
    into_N = np.bincount(node_R, weights=foreign_NR.sum(axis=0), minlength=nodes.num_nodes)
    load_G = np.bincount(placement.gpu_R, weights=copies_NR.sum(axis=0), minlength=problem.num_gpus)
    return float(max(into_N.max(), foreign_NR.sum(axis=1).max())), float(load_G.max())


def routed(problem: PlacementProblem, expert_R: npt.ArrayLike, gpu_R: npt.ArrayLike) -> LayerPlacement:
    """These replicas with the split that the problem asks for: even, or the one of least seconds."""
    even = LayerPlacement.even(expert_R, gpu_R)
    return even if problem.split == "even" else optimal_routing(problem, even.expert_R, even.gpu_R)


def optimal_routing(problem: PlacementProblem, expert_R: Ints, gpu_R: Ints) -> LayerPlacement:
    """The shares, by source node and replica, that take the fewest seconds.

    Only the load of each replica has to be found, by a linear programme. For what a node computes of an expert, it best
    takes its own copies first: exchanging a foreign copy kept here for an own one sent away lowers both nodes' traffic
    and leaves all loads. So a home that computes l copies of an expert and has t of its own keeps min(l, t), and what
    the nodes do not keep goes to the homes that compute more than they have. Which of these is served by whom makes no
    difference to any node's or GPU's total.
    """
    nodes = NodeProblem.of(problem)
    order = np.lexsort((gpu_R, expert_R))
    expert_R, gpu_R = np.asarray(expert_R, np.int64)[order], np.asarray(gpu_R, np.int64)[order]
    load_R = _loads(nodes, expert_R, gpu_R)
    return LayerPlacement(expert_R=expert_R, gpu_R=gpu_R, share_SR=shares(nodes, expert_R, gpu_R, load_R))


def shares(nodes: NodeProblem, expert_R: Ints, gpu_R: Ints, load_R: Floats) -> Floats:
    """The share of each node's copies that each replica gets, so that replica r computes `load_R[r]` copies.

    Loads of an expert's replicas need only be in proportion. A node serves itself first.
    """
    count, experts = nodes.num_nodes, nodes.num_experts
    total_E = nodes.tokens_NE.sum(axis=0)
    load_R = np.maximum(load_R, 0.0)
    given_E = np.bincount(expert_R, weights=load_R, minlength=experts)
    idle_R = given_E[expert_R] <= _ROUNDING * (total_E[expert_R] + _ROUNDING)
    load_R = np.where(idle_R, 1.0, load_R)
    given_E = np.bincount(expert_R, weights=load_R, minlength=experts)
    home_R = expert_R * count + gpu_R // nodes.gpus_per_node
    part_R = load_R / given_E[expert_R]
    part_NE = np.bincount(home_R, weights=part_R, minlength=experts * count).reshape(experts, count).T
    inside_R = part_R / np.where(part_R > 0, part_NE.T.ravel()[home_R], 1.0)
    moved_NNE = _transport(nodes.tokens_NE, part_NE * total_E)
    share_NR = moved_NNE[:, gpu_R // nodes.gpus_per_node, expert_R] * inside_R
    tokens_NR = nodes.tokens_NE[:, expert_R]
    is_sent_NR = (tokens_NR > 0) & (moved_NNE.sum(axis=1)[:, expert_R] > 0)
    return np.where(is_sent_NR, share_NR / np.where(is_sent_NR, tokens_NR, 1.0), part_R)


def _transport(tokens_NE: Floats, load_NE: Floats) -> Floats:
    """Copies by source node, home and expert: own ones first, the others in proportion to what homes still compute."""
    kept_NE = np.minimum(tokens_NE, load_NE)
    away_NE, over_NE = tokens_NE - kept_NE, load_NE - kept_NE
    left_E = over_NE.sum(axis=0)
    moved_NNE: Floats = away_NE[:, None, :] * (over_NE / np.where(left_E > 0, left_E, 1.0))[None, :, :]
    own = np.arange(tokens_NE.shape[0])
    moved_NNE[own, own] += kept_NE
    # What rounding loses of a source's copies is given back in proportion.
    sent_NE = moved_NNE.sum(axis=1)
    scale_NE = np.where(sent_NE > 0, tokens_NE / np.where(sent_NE > 0, sent_NE, 1.0), 1.0)
    return np.asarray(moved_NNE * scale_NE[:, None, :])


def _loads(nodes: NodeProblem, expert_R: Ints, gpu_R: Ints) -> Floats:
    """Copies that each replica computes under the best routing: the optimum of a small linear programme.

    Variables are each replica's load, what each home keeps of its node's own copies, and the layer's figures. Loads are
    scaled so that a GPU computes 1 on average, and seconds likewise: solvers' tolerances are absolute.
    """
    from moeplan.placers._linear import Model

    count, gpus = nodes.num_nodes, nodes.num_nodes * nodes.gpus_per_node
    home_R, pair_H = _homes(nodes, expert_R, gpu_R)
    expert_H, node_H = np.divmod(pair_H, count)
    scale = gpus / nodes.tokens_NE.sum()
    tokens_NE = nodes.tokens_NE * scale
    model = Model()
    load_R, kept_H = model.add(expert_R.size), model.add(pair_H.size, high=tokens_NE[node_H, expert_H])
    busy, full = add_seconds(model, nodes)
    total_E = tokens_NE.sum(axis=0)
    model.put(model.rows(total_E.size, low=total_E, high=total_E)[expert_R], load_R, 1.0)
    home = model.rows(pair_H.size, low=0.0)
    model.put(home[home_R], load_R, 1.0)
    model.put(home, kept_H, -1.0)
    into = model.rows(count, high=0.0)
    model.put(into[node_H[home_R]], load_R, 1.0)
    model.put(into[node_H], kept_H, -1.0)
    model.put(into, busy, -1.0)
    out = model.rows(count, low=tokens_NE.sum(axis=1))
    model.put(out[node_H], kept_H, 1.0)
    model.put(out, busy, 1.0)
    on_gpu = model.rows(gpus, high=0.0)
    model.put(on_gpu[gpu_R], load_R, 1.0)
    model.put(on_gpu, full, -1.0)
    values = model.solve().values
    assert values is not None, "every routing of legal replicas is feasible"
    return np.asarray(values[load_R] / scale)


def add_seconds(model: Model, nodes: NodeProblem) -> tuple[Ints, Ints]:
    """The variables `busiest node` and `fullest GPU`, with the seconds that they cost.

    exchange >= nic_s * busiest node;  exchange >= nvlink_s * fullest GPU;  cost = exchange + compute_s * fullest GPU.
    """
    unit = _price_s(nodes)
    exchange = model.add(1, cost=1.0)
    busy, full = model.add(1), model.add(1, cost=nodes.compute_s / unit)
    for price, figure in ((nodes.nic_s, busy), (nodes.nvlink_s, full)):
        row = model.rows(1, low=0.0)
        model.put(row, exchange, 1.0)
        model.put(row, figure, -price / unit)
    return busy, full


def unit_s(nodes: NodeProblem) -> float:
    """Seconds of 1 in the models' costs: those of a GPU's mean copies at all prices together."""
    return _price_s(nodes) * float(nodes.tokens_NE.sum()) / (nodes.num_nodes * nodes.gpus_per_node)


def _price_s(nodes: NodeProblem) -> float:
    return nodes.compute_s + nodes.nic_s + nodes.nvlink_s


def _homes(nodes: NodeProblem, expert_R: Ints, gpu_R: Ints) -> tuple[Ints, Ints]:
    """The home of each replica, and each home as `expert * nodes + node`."""
    pair_H, home_R = np.unique(expert_R * nodes.num_nodes + gpu_R // nodes.gpus_per_node, return_inverse=True)
    return home_R.astype(np.int64), pair_H
