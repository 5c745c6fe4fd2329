"""Which experts every GPU holds, so that their tokens stay at home: FasterMoE's rules, ours, and a placement by one.

A shadowed expert's weights are broadcast, its tokens computed where they are, its gradients reduced to its owner.
Axes: W workers, E experts, G GPU. `tokens_WE` are the tokens that a worker's gate sends to an expert, `owner_E` the
worker that holds it, a set of shadows is a tuple of experts by falling load.
Reference: He et al., "FasterMoE" (PPoPP 2022), section 4.1; FastMoE repository, `fmoe/fastermoe/shadow_policy.py`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from moeplan.domain.placement import Floats, Ints, PlacedLayer, PlacementProblem
from moeplan.placers._seats import Bools, filled, placed

Shadows = tuple[int, ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class ShadowCosts:
    """Seconds of FasterMoE's model: forward pass of one token in an expert, one token and one expert over the wires.

    In the paper's letters 4 alpha H^2 / P, H / W and 2 alpha H^2 / W, where W counts elements.
    """

    compute_s: float
    token_s: float
    expert_s: float


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class ShadowProblem:
    """The loads of one layer in one step, and what they cost."""

    tokens_WE: Floats
    owner_E: Ints
    costs: ShadowCosts

    @property
    def by_load(self) -> Shadows:
        """Experts by falling load."""
        return tuple(np.argsort(-self.tokens_WE.sum(axis=0), kind="stable").tolist())

    def computed_W(self, shadows: Shadows) -> Floats:
        """Tokens that each worker computes: those of its experts from all, and its own of shadowed experts."""
        return np.asarray(self._received_W(shadows) + self.tokens_WE[:, list(shadows)].sum(axis=1))

    def _received_W(self, shadows: Shadows) -> Floats:
        tokens_E = self.tokens_WE.sum(axis=0, dtype=np.float64)
        tokens_E[list(shadows)] = 0.0
        return np.bincount(self.owner_E, weights=tokens_E, minlength=len(self.tokens_WE)).astype(np.float64)

    def seconds(self, shadows: Shadows) -> float:
        """3 max computed * compute + 4 max received * token + 2 |shadows| * expert: forward and backward pass.

        One worker's experts count as received, wherever the tokens come from, as in the published rules.
        """
        costs, computed = self.costs, float(self.computed_W(shadows).max())
        received = float(self._received_W(shadows).max())
        return 3 * computed * costs.compute_s + 4 * received * costs.token_s + 2 * len(shadows) * costs.expert_s


# ---- the published rules: by falling load, until the predicted seconds rise for the first time


def paper_rule(problem: ShadowProblem) -> Shadows:
    """The paper's rule: with shadows the exchange of tokens is not charged, as if the transfers of experts hid it.

    Without: 3 B compute + 4 B token; with r of them: 3 B' compute + 2 r expert.
    """
    costs = problem.costs

    def predicted_s(shadows: Shadows) -> float:
        computed = float(problem.computed_W(shadows).max())
        moved = 2 * len(shadows) * costs.expert_s if shadows else 4 * computed * costs.token_s
        return 3 * computed * costs.compute_s + moved

    return _first_rise(problem, predicted_s)


def code_rule(problem: ShadowProblem) -> Shadows:
    """The repository's rule: the load left is that of the next expert, as if each GPU had one; an expert moves once.

    With r shadows: (3 compute + 4 token) * tokens of expert r + 1 by load, + r expert. The last expert is never one.
    """
    costs = problem.costs
    falling_E = problem.tokens_WE.sum(axis=0)[list(problem.by_load)]

    def predicted_s(shadows: Shadows) -> float:
        left = float(falling_E[len(shadows)])
        return (3 * costs.compute_s + 4 * costs.token_s) * left + len(shadows) * costs.expert_s

    return _first_rise(problem, predicted_s, most=len(falling_E) - 1)


def first_rise(problem: ShadowProblem) -> Shadows:
    """The same stop with what a set really costs."""
    return _first_rise(problem, problem.seconds)


def _first_rise(problem: ShadowProblem, predicted_s: Callable[[Shadows], float], most: int | None = None) -> Shadows:
    order, least_s, count = problem.by_load, predicted_s(()), 0
    for size in range(1, (len(order) if most is None else most) + 1):
        if (now_s := predicted_s(order[:size])) >= least_s:
            break
        least_s, count = now_s, size
    return order[:count]


# ---- ours


def best_prefix(problem: ShadowProblem) -> Shadows:
    """The best of all sets of hottest experts: where several are alike, time falls only when the last of them is one.

    No worse than any rule that takes experts by falling load.
    """
    order = problem.by_load
    return min((order[:size] for size in range(len(order) + 1)), key=problem.seconds)


# ---- a placement by a rule


def shadowed(problem: PlacementProblem, rule: Callable[[ShadowProblem], Shadows], *, start_s: float) -> PlacedLayer:
    """The experts that `rule` shadows on every GPU, the others at home, and more replicas where slots are left.

    What a shadow costs is G - 1 more slots. The problem has them, so no seconds of a broadcast are charged, and the
    hottest shadows are made until the slots are used up. Experts stand in equal blocks, in order; one whose GPU has no
    room beside the shadows goes to the emptiest. Slots that are left go to the largest replicas.
    """
    experts, gpus, per_gpu = problem.num_experts, problem.num_gpus, problem.slots_per_gpu
    home_E = np.arange(experts) * gpus // experts
    paid = (problem.slots - experts) // max(1, gpus - 1)
    shadows = list(rule(as_workers(problem, home_E))[:paid])
    here_EG: Bools = np.zeros((experts, gpus), np.bool_)
    here_EG[shadows] = True
    for e in np.setdiff1d(np.arange(experts), shadows):
        free_G = per_gpu - here_EG.sum(axis=0)
        here_EG[e, home_E[e] if free_G[home_E[e]] > 0 else free_G.argmax()] = True
    here_EG = filled(here_EG, problem.tokens_E, slots=problem.slots, per_gpu=per_gpu)
    return placed(problem, *np.nonzero(here_EG), start_s=start_s)


def as_workers(problem: PlacementProblem, home_E: Ints) -> ShadowProblem:
    """Every GPU sends an expert the same, as an even split has it; seconds are those of all passes.

    Without prices only computing counts: then a rule says where the fullest GPU's tokens fall, whatever a token costs.
    """
    prices, gpus = problem.prices, problem.num_gpus
    compute_s, token_s = 1.0, 0.0
    if prices is not None:
        into_s = prices.nic_s * prices.gpus_per_node if gpus > prices.gpus_per_node else prices.nvlink_s
        compute_s, token_s = prices.compute_s, prices.exchange_factor * into_s
    return ShadowProblem(
        tokens_WE=np.tile(problem.tokens_E / gpus, (gpus, 1)), owner_E=home_E,
        costs=ShadowCosts(compute_s=compute_s / 3, token_s=token_s / 4, expert_s=0.0),
    )  # fmt: skip
