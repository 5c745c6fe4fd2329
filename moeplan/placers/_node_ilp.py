"""The placement of experts on nodes as an integer programme, whose dual bound holds for the whole problem.

Variables, for each expert e and node m: `x` whether e has a replica in m; `q` the slots it uses there; `L` the copies
that start in m and are computed there; `R` those computed there that start elsewhere; and `F`, the copies through the
busiest node, and `theta`, those in the fullest GPU. t[m,e] are copies that start in m, W_e = sum over m of t[m,e].

The programme relaxes the problem: whatever replicas stand on GPUs and however copies are routed, the sums over a node's
GPUs satisfy every row here, and its cost is the seconds that the routing takes. `limit` adds rows that only solutions
below a known value satisfy; so the programme's optimum or that value, whichever is less, bounds the problem.

highspy and not PuLP: at 256 experts on 8 nodes PuLP takes longer to build the model than HiGHS to relax it.

Axes of arrays: E expert, M node.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplan.domain.placement import Floats, Ints
from moeplan.placers._linear import Model
from moeplan.placers._makespan import NodeProblem, add_seconds, unit_s
from moeplan.placers._node_search import NodeSlots

_SLACK = 1e-6
"""The known solution keeps its own limits, whatever a solver rounds."""
_TOLERANCE = 1e-7
"""HiGHS's, of reduced costs: a dual bound may be too high by this for each unit of the variables' sum."""
_MOST_NODES = 500


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Limits:
    """What every solution below the known value keeps: copies through a node, copies in a GPU."""

    busiest_node: float
    fullest_gpu: float
    least_fullest_gpu: float = 0.0
    """What no placement's fullest GPU is below."""

    @staticmethod
    def below(nodes: NodeProblem, value_s: float, *, busiest_node: float, fullest_gpu: float) -> Limits:
        """The limits of solutions of at most `value_s`, where bounds of both figures are known.

        value >= nic_s * F + compute_s * theta, so that each figure's bound limits the other.
        """
        most_F = (value_s - nodes.compute_s * fullest_gpu) / nodes.nic_s if nodes.nic_s else np.inf
        most_theta = (value_s - nodes.nic_s * busiest_node) / nodes.compute_s if nodes.compute_s else np.inf
        return Limits(
            busiest_node=most_F * (1 + _SLACK), fullest_gpu=most_theta * (1 + _SLACK), least_fullest_gpu=fullest_gpu
        )


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Variables:
    """Numbers of the model's variables."""

    x_EM: Ints
    q_EM: Ints
    L_EM: Ints
    R_EM: Ints
    busy: Ints
    full: Ints


def integer_slots(
    nodes: NodeProblem, limits: Limits, *, gap: float, time_limit_s: float
) -> tuple[NodeSlots | None, float]:
    """Slots of the best solution found, if any, and seconds that no placement within the limits is below.

    The solver's status is not asked: a solution is rounded to slots, to be evaluated anew, and the dual bound lowered
    by what the solver's tolerances may be worth.
    """
    model, v = model_of(nodes, limits)
    solution = model.solve(gap=gap, time_limit_s=time_limit_s, nodes=_MOST_NODES)
    sizes = nodes.num_nodes * nodes.gpus_per_node + 2 * nodes.slots + 3
    bound_s = (solution.bound - _TOLERANCE * sizes) * unit_s(nodes)
    if solution.values is None:
        return None, bound_s if np.isfinite(bound_s) else 0.0
    return _as_slots(nodes, v, solution.values), bound_s


def slots_by_cbc(nodes: NodeProblem, limits: Limits, *, gap: float, time_limit_s: float) -> NodeSlots | None:
    """Slots of the best solution of the same programme that CBC finds, a second opinion without a bound."""
    model, v = model_of(nodes, limits)
    solution = model.solve_by_cbc(gap=gap, time_limit_s=time_limit_s)
    return None if solution.values is None else _as_slots(nodes, v, solution.values)


def _as_slots(nodes: NodeProblem, v: Variables, values: Floats) -> NodeSlots | None:
    """The solution's replicas in each node, and idle ones until all slots are used; None if it cannot be."""
    load_EM = (values[v.L_EM] + values[v.R_EM]) / _scale(nodes)
    count_EM = np.rint(np.maximum(values[v.x_EM], values[v.q_EM])).astype(np.int64)
    count_EM = np.minimum(count_EM, nodes.gpus_per_node)
    spare = nodes.slots - int(count_EM.sum())
    for node in range(nodes.num_nodes):
        for expert in np.lexsort((-load_EM[:, node], -load_EM[:, node] / np.maximum(count_EM[:, node], 1))):
            room = min(nodes.slots_per_node - int(count_EM[:, node].sum()), spare)
            more = min(room, nodes.gpus_per_node - int(count_EM[expert, node]), 1)
            count_EM[expert, node] += max(more, 0)
            spare -= max(more, 0)
    if spare or count_EM.sum(axis=0).max() > nodes.slots_per_node or count_EM.sum(axis=1).min() < 1:
        return None
    node_K = np.repeat(np.arange(nodes.num_nodes, dtype=np.int64), nodes.slots_per_node)
    expert_K, load_K = np.full(node_K.size, -1, dtype=np.int64), np.zeros(node_K.size)
    for node in range(nodes.num_nodes):
        held_R = np.repeat(np.arange(nodes.num_experts), count_EM[:, node])
        slot_R = node * nodes.slots_per_node + np.arange(held_R.size)
        expert_K[slot_R] = held_R
        load_K[slot_R] = load_EM[held_R, node] / count_EM[held_R, node]
    return NodeSlots(expert_K=expert_K, node_K=node_K, load_K=load_K)


def model_of(nodes: NodeProblem, limits: Limits, *, whole: bool = True) -> tuple[Model, Variables]:
    """The programme, scaled so that a GPU computes 1 on average."""
    t_EM, scale = nodes.tokens_NE.T, _scale(nodes)
    model, shape = Model(), t_EM.shape
    x_EM, q_EM = (model.add(t_EM.size, high=high, whole=whole).reshape(shape) for high in (1, nodes.gpus_per_node))
    L_EM, R_EM = model.add(t_EM.size).reshape(shape), model.add(t_EM.size).reshape(shape)
    busy, full = add_seconds(model, nodes)
    v = Variables(x_EM=x_EM, q_EM=q_EM, L_EM=L_EM, R_EM=R_EM, busy=busy, full=full)
    t_EM = t_EM * scale
    _kept_where_it_stands(model, v, t_EM)
    _foreign_where_it_stands(model, v, t_EM, limits.busiest_node * scale)
    _every_copy_is_computed(model, v, t_EM)
    _into_a_node(model, v)
    _out_of_a_node(model, v, t_EM)
    _a_node_spreads_its_load(model, v, nodes.gpus_per_node)
    _a_slot_is_used(model, v)
    _a_replica_is_not_too_full(model, v, limits.fullest_gpu * scale)
    _fullest_gpu(model, v, limits.least_fullest_gpu * scale)
    _slots_of_a_node(model, v, nodes.slots_per_node)
    _slots_of_all(model, v, nodes.slots)
    _enough_homes(model, v, homes_needed(t_EM.T, limits.busiest_node * scale))
    return model, v


def _scale(nodes: NodeProblem) -> float:
    """What a copy is in the model's units."""
    return float(nodes.num_nodes * nodes.gpus_per_node / nodes.tokens_NE.sum())


def _kept_where_it_stands(model: Model, v: Variables, t_EM: Floats) -> None:
    """`L[e,m] <= t[m,e] * x[e,m]`, all e, m."""
    row = model.rows(t_EM.size, high=0.0)
    model.put(row, v.L_EM.ravel(), 1.0)
    model.put(row, v.x_EM.ravel(), -t_EM.ravel())


def _foreign_where_it_stands(model: Model, v: Variables, t_EM: Floats, most: float) -> None:
    """`R[e,m] <= min(W_e - t[m,e], F's limit) * x[e,m]`, all e, m."""
    row = model.rows(t_EM.size, high=0.0)
    model.put(row, v.R_EM.ravel(), 1.0)
    model.put(row, v.x_EM.ravel(), -np.minimum(t_EM.sum(axis=1, keepdims=True) - t_EM, most).ravel())


def _every_copy_is_computed(model: Model, v: Variables, t_EM: Floats) -> None:
    """`sum over m of L[e,m] + R[e,m] = W_e`, all e."""
    row = model.rows(t_EM.shape[0], low=t_EM.sum(axis=1), high=t_EM.sum(axis=1))[:, None]
    model.put(row, v.L_EM, 1.0)
    model.put(row, v.R_EM, 1.0)


def _into_a_node(model: Model, v: Variables) -> None:
    """`sum over e of R[e,m] <= F`, all m."""
    row = model.rows(v.x_EM.shape[1], high=0.0)
    model.put(row, v.R_EM, 1.0)
    model.put(row, v.busy, -1.0)


def _out_of_a_node(model: Model, v: Variables, t_EM: Floats) -> None:
    """`sum over e of t[m,e] - L[e,m] <= F`, all m."""
    row = model.rows(v.x_EM.shape[1], low=t_EM.sum(axis=0))
    model.put(row, v.L_EM, 1.0)
    model.put(row, v.busy, 1.0)


def _a_node_spreads_its_load(model: Model, v: Variables, gpus_per_node: int) -> None:
    """`sum over e of L[e,m] + R[e,m] <= GPUs of a node * theta`, all m."""
    row = model.rows(v.x_EM.shape[1], high=0.0)
    model.put(row, v.L_EM, 1.0)
    model.put(row, v.R_EM, 1.0)
    model.put(row, v.full, -float(gpus_per_node))


def _a_slot_is_used(model: Model, v: Variables) -> None:
    """`q[e,m] >= x[e,m]`, all e, m."""
    row = model.rows(v.x_EM.size, low=0.0)
    model.put(row, v.q_EM.ravel(), 1.0)
    model.put(row, v.x_EM.ravel(), -1.0)


def _a_replica_is_not_too_full(model: Model, v: Variables, most: float) -> None:
    """`L[e,m] + R[e,m] <= theta's limit * q[e,m]`, all e, m."""
    if np.isfinite(most):
        row = model.rows(v.x_EM.size, high=0.0)
        model.put(row, v.L_EM.ravel(), 1.0)
        model.put(row, v.R_EM.ravel(), 1.0)
        model.put(row, v.q_EM.ravel(), -most)


def _fullest_gpu(model: Model, v: Variables, least: float) -> None:
    """`theta >= its known bound`."""
    model.put(model.rows(1, low=least), v.full, 1.0)


def _slots_of_a_node(model: Model, v: Variables, most: int) -> None:
    """`sum over e of q[e,m] <= GPUs of a node * slots of a GPU`, all m."""
    model.put(model.rows(v.x_EM.shape[1], high=float(most)), v.q_EM, 1.0)


def _slots_of_all(model: Model, v: Variables, slots: int) -> None:
    """`sum over e, m of q[e,m] <= slots`."""
    model.put(model.rows(1, high=float(slots)), v.q_EM, 1.0)


def _enough_homes(model: Model, v: Variables, homes_E: Ints) -> None:
    """`sum over m of x[e,m] >= homes that e needs for F's limit`, all e."""
    model.put(model.rows(homes_E.size, low=homes_E)[:, None], v.x_EM, 1.0)


def homes_needed(tokens_NE: Floats, busiest_node: float) -> Ints:
    """The fewest nodes k for each expert: W_e - its k largest own counts <= k * busiest node's copies."""
    tops_NE = np.cumsum(-np.sort(-tokens_NE, axis=0), axis=0)
    steps_N = np.arange(1, tokens_NE.shape[0] + 1)[:, None]
    enough_NE = tokens_NE.sum(axis=0) - tops_NE <= steps_N * busiest_node * (1 + 1e-9)
    return np.asarray(enough_NE.argmax(axis=0) + 1, dtype=np.int64)
