"""A lower bound of the copies through the busiest node, mostly by prices: for any number of nodes, in a second.

Three families of rows tie the experts together: copies into a node, copies out of a node, and slots of a node. Each row
is given a price (a Lagrange multiplier) of 0 or more, the first two families together 1. Then for *any* prices

    F >= sum over nodes of out_price * copies that start there - slot_price * slots
       + sum over experts of the least that the expert can cost at these prices,

since in a legal placement the busiest node's copies are at least the priced mean of all copies in and out, and its
slots' prices at most those of all slots. Each expert is then on its own: where it stands in whole replicas is decided
exactly, which an ILP's relaxation does not (it puts an eighteenth of an expert on each of eighteen nodes). Prices are
improved by subgradient steps; a bad price makes a weak bound, never a wrong one.

Reference: Geoffrion, "Lagrangean relaxation for integer programming", Mathematical Programming Study 2, 1974.

Axes of arrays: E expert, N node; `price_3N` and `surplus_3N` have rows in, out, slot.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from moeplan.domain.placement import Floats, Ints
from moeplan.jit import compiled
from moeplan.placers._makespan import NodeProblem
from moeplan.placers._node_ilp import Limits, homes_needed

_ROUNDING = 1e-9
_KEPT_DIRECTION, _SHRINK, _PATIENCE = 0.6, 0.7, 20


class _Terms(NamedTuple):
    """The problem in units of a slot's mean copies, for compiled functions."""

    tokens_EN: Floats
    homes_E: Ints
    replicas_E: Ints
    most_F: float
    most_replicas: int
    gpus: int
    node_slots: int
    slots: int
    is_even: bool


def busiest_node_bound(nodes: NodeProblem, limits: Limits, *, is_even: bool, rounds: int) -> float:
    """Copies through the busiest node of any placement that keeps the limits; `limits.busiest_node` at most."""
    if nodes.num_nodes == 1 or not np.isfinite(limits.busiest_node):
        return 0.0
    unit = nodes.tokens_NE.sum() / nodes.slots
    total_E = nodes.tokens_NE.sum(axis=0)
    fewest = (
        np.ceil(total_E / limits.fullest_gpu * (1 - _ROUNDING)) if limits.fullest_gpu > 0 else np.ones(total_E.size)
    )
    most = min(nodes.slots - nodes.num_experts + 1, nodes.num_nodes * nodes.gpus_per_node)
    terms = _Terms(
        tokens_EN=np.ascontiguousarray(nodes.tokens_NE.T) / unit,
        homes_E=homes_needed(nodes.tokens_NE, limits.busiest_node),
        replicas_E=np.clip(fewest, 1, most).astype(np.int64),
        most_F=limits.busiest_node / unit * (1 + _ROUNDING),
        most_replicas=most,
        gpus=nodes.gpus_per_node,
        node_slots=nodes.slots_per_node,
        slots=nodes.slots,
        is_even=is_even,
    )
    found = max(float(_ascend(terms, rounds)) * unit, _companions(nodes))
    return float(min(found - _ROUNDING * abs(found), limits.busiest_node))


def _companions(nodes: NodeProblem) -> float:
    """Copies into the node of some expert, where there are no replicas: its own and those of the least ones beside it.

    A node holds k = slots - (nodes - 1) * slots of a node experts or more. So wherever expert e stands, copies into
    that node n are at least foreign[n, e] + the k - 1 least foreign[n, other]. Prices know that by halves only.
    """
    held = nodes.slots - (nodes.num_nodes - 1) * nodes.slots_per_node
    if nodes.slots > nodes.num_experts or held < 1:
        return 0.0
    foreign_NE = nodes.tokens_NE.sum(axis=0) - nodes.tokens_NE
    rising_NE = np.sort(foreign_NE, axis=1)
    beside_N1 = rising_NE[:, : held - 1].sum(axis=1, keepdims=True)
    into_NE = beside_N1 + np.maximum(foreign_NE, rising_NE[:, held - 1 : held])
    return float(into_NE.min(axis=0).max())


@compiled
def _ascend(terms: _Terms, rounds: int) -> float:
    """The best bound found in so many rounds."""
    count = terms.tokens_EN.shape[1]
    price_3N, all_price = np.full((3, count), 0.5 / count), 0.0
    price_3N[2] = 0.0
    best_3N, best_all, best = price_3N.copy(), 0.0, -1e18
    move_3N, move_all, length, worse = np.zeros((3, count)), 0.0, 1.0, 0
    surplus_3N = np.zeros((3, count))
    for _ in range(rounds):
        bound = _bound(terms, price_3N, all_price, surplus_3N)
        worse += 1
        if bound > best:
            worse = 0 if bound > best + 1e-6 * abs(best) else worse
            best, best_all = bound, all_price
            best_3N[:] = price_3N
        if best >= terms.most_F or length < 1e-3:
            break
        if worse >= _PATIENCE:
            length, worse, move_all = length * _SHRINK, 0, 0.0
            price_3N[:], all_price = best_3N, best_all
            move_3N[:] = 0.0
            continue
        move_3N = surplus_3N + _KEPT_DIRECTION * move_3N
        over_all = terms.node_slots * count > terms.slots
        move_all = surplus_3N[2].sum() + terms.node_slots * count - terms.slots + _KEPT_DIRECTION * move_all
        level = move_3N[:2].sum() / (2 * count)
        norm = ((move_3N[:2] - level) ** 2).sum() + (move_3N[2] ** 2).sum() + 1e-12
        step = length * max(terms.most_F - bound, 1e-4 * terms.most_F) / norm
        price_3N[:2] = _onto_simplex((price_3N[:2] + step * move_3N[:2]).ravel()).reshape((2, count))
        price_3N[2] = np.maximum(price_3N[2] + step * move_3N[2], 0.0)
        all_price = max(all_price + step * move_all, 0.0) if over_all else 0.0
    return best


@compiled
def _onto_simplex(point: Floats) -> Floats:
    """The nearest point with numbers of 0 or more that sum to 1."""
    falling, total, level = -np.sort(-point), 0.0, 0.0
    for index in range(point.size):
        total += falling[index]
        if falling[index] > (total - 1) / (index + 1):
            level = (total - 1) / (index + 1)
    return np.asarray(np.maximum(point - level, 0.0))


@compiled
def _bound(terms: _Terms, price_3N: Floats, all_price: float, surplus_3N: Floats) -> float:
    """The bound at these prices. `surplus_3N` becomes each row's use minus what it allows (out: what is sent away)."""
    tokens_N = terms.tokens_EN.sum(axis=0)
    surplus_3N[0], surplus_3N[1], surplus_3N[2] = 0.0, tokens_N, -float(terms.node_slots)
    bound = (price_3N[1] * tokens_N).sum() - terms.node_slots * price_3N[2].sum() - terms.slots * all_price
    slot_N, use_3N = price_3N[2] + all_price, np.zeros_like(price_3N)
    for expert in range(terms.tokens_EN.shape[0]):
        use_3N[:] = 0.0
        if terms.is_even:
            bound += _even(terms, expert, price_3N, slot_N, use_3N)
        else:
            bound += _optimal(terms, expert, price_3N, slot_N, use_3N)
        surplus_3N[0] += use_3N[0]
        surplus_3N[1] -= use_3N[1]
        surplus_3N[2] += use_3N[2]
    return float(bound)


@compiled
def _even(terms: _Terms, expert: int, price_3N: Floats, slot_N: Floats, use_3N: Floats) -> float:
    """The least cost of an evenly split expert, exact: for each number of replicas r, the r cheapest places.

    A replica in node m gets (W - t_m) / r from other nodes and keeps t_m / r. Places that alone would break a limit are
    left out.
    """
    own_N = terms.tokens_EN[expert]
    total, best, best_r = own_N.sum(), np.inf, 0
    least, least_slot = (price_3N[0] * (total - own_N) - price_3N[1] * own_N).min(), slot_N.min()
    for r in range(terms.replicas_E[expert], terms.most_replicas + 1):
        if least + r * least_slot >= best:
            break
        cost_N = (price_3N[0] * (total - own_N) - price_3N[1] * own_N) / r + slot_N
        cost, left = 0.0, r
        for node in np.argsort(cost_N):
            taken = min(left, terms.gpus, int(terms.most_F * r / max(total - own_N[node], 1e-12) + 1e-9))
            cost += taken * cost_N[node]
            left -= taken
        if left == 0 and cost < best:
            best, best_r = cost, r
    if best_r == 0:
        return 1e12
    cost_N, left = (price_3N[0] * (total - own_N) - price_3N[1] * own_N) / best_r + slot_N, best_r
    for node in np.argsort(cost_N):
        taken = min(left, terms.gpus, int(terms.most_F * best_r / max(total - own_N[node], 1e-12) + 1e-9))
        use_3N[0, node], use_3N[1, node] = (total - own_N[node]) * taken / best_r, own_N[node] * taken / best_r
        use_3N[2, node] = taken
        left -= taken
    return best


@compiled
def _optimal(terms: _Terms, expert: int, price_3N: Floats, slot_N: Floats, use_3N: Floats) -> float:
    """The least cost of an optimally split expert, or less.

    Every home keeps its node's copies. All others go to the home with the least price of copies in, so trying each node
    as that home is exact, where one node may get them all. Else `_by_price` is asked, and the greater counts.
    """
    own_N, into_N, out_N = terms.tokens_EN[expert], price_3N[0], price_3N[1]
    total, best, best_main = own_N.sum(), np.inf, 0
    for main in range(own_N.size):
        gain_N = np.minimum(slot_N - (out_N + into_N[main]) * own_N, 0.0)
        cost = into_N[main] * total + slot_N[main] - (out_N[main] + into_N[main]) * own_N[main]
        cost += gain_N.sum() - gain_N[main]
        if cost < best:
            best, best_main = cost, main
    here_N = slot_N - (out_N + into_N[best_main]) * own_N < 0.0
    here_N[best_main] = True
    use_3N[1], use_3N[2] = np.where(here_N, own_N, 0.0), np.where(here_N, 1.0, 0.0)
    use_3N[0, best_main] = max(total - use_3N[1].sum(), 0.0)
    if use_3N[0, best_main] > terms.most_F:
        other_3N = np.zeros_like(use_3N)
        other = _by_price(terms, expert, price_3N, slot_N, other_3N)
        if other > best:
            use_3N[:] = other_3N
            return other
    return best


@compiled
def _by_price(terms: _Terms, expert: int, price_3N: Floats, slot_N: Floats, use_3N: Floats) -> float:
    """A bound of the cost of an expert that needs several homes: a copy not computed costs `price`, whichever is worst.

    At a price, a node is worth opening if what it keeps and takes in costs less; at least `homes_E` must be. The bound
    is concave in the price; its top is found by halving, and the uses on both sides are mixed so that all is computed.
    """
    own_N = terms.tokens_EN[expert]
    total, best = own_N.sum(), -np.inf
    room_N = np.minimum(terms.most_F, total - own_N)
    low, high = 0.0, 2 * (price_3N[0] + slot_N / np.maximum(room_N, 1e-9)).max() + 1e-9
    low_3N, high_3N, low_left, high_left = np.zeros_like(use_3N), np.zeros_like(use_3N), 1.0, 0.0
    trial_3N = np.zeros_like(use_3N)
    for turn in range(40):
        price = low if turn == 0 else high if turn == 1 else (low + high) / 2
        cost_N = slot_N - (price_3N[1] + price) * own_N + np.minimum(price_3N[0] - price, 0.0) * room_N
        value, left = price * total, total
        trial_3N[:] = 0.0
        for rank, node in enumerate(np.argsort(cost_N)):
            if cost_N[node] < 0.0 or rank < terms.homes_E[expert]:
                value += cost_N[node]
                trial_3N[0, node] = room_N[node] if price > price_3N[0, node] else 0.0
                trial_3N[1, node], trial_3N[2, node] = own_N[node], 1.0
                left -= own_N[node] + trial_3N[0, node]
        best = max(best, value)
        if left > 0.0:
            low, low_left = price, left
            low_3N[:] = trial_3N
        else:
            high, high_left = price, left
            high_3N[:] = trial_3N
            if turn == 0:
                break
    part = -high_left / (low_left - high_left) if low_left > high_left else 0.0
    use_3N[:] = part * low_3N + (1 - part) * high_3N
    return best
