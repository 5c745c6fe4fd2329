"""What routers share: how many tokens experts get when no token may pick an expert twice.

Axes of arrays: L layer, S source, E expert, K picks that a token still has to make (0 .. top_k).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeplan.domain.routing import Routing
from moeplan.errors import CatalogueError

Floats = npt.NDArray[np.float64]
Counts = npt.NDArray[np.int64]


def refuse(option: str, found: object, *, allowed: str, remedy: str) -> CatalogueError:
    """The error for an option of a router."""
    return CatalogueError(f"routing.options.{option}: {found} is not {allowed}; {remedy}")


def check_top_k(num_experts: int, top_k: int) -> None:
    """Refuses a token that must pick more experts than there are."""
    if not 1 <= top_k <= num_experts:
        raise CatalogueError(f"routing: top_k: {top_k} is not 1 to num_experts {num_experts}; use a smaller top_k")


def shared_out(weight_LE: Floats, total: float, *, most: float) -> Floats:
    """`total` for each layer, shared in proportion to the weights, with no share above `most`.

    What a capped share leaves goes to the others in proportion; the shares sum to `total` exactly, up to rounding.
    Needs total <= most * E.
    """
    share_LE = np.array(total * weight_LE / weight_LE.sum(axis=1, keepdims=True))
    for share_E, weight_E in zip(share_LE, weight_LE, strict=True):
        full_E = np.zeros(len(share_E), dtype=bool)
        while (over_E := (share_E > most) & ~full_E).any():
            full_E |= over_E
            rest_E = ~full_E
            share_E[full_E] = most
            left = max(total - most * full_E.sum(), 0.0)
            if rest_E.any():
                weights = weight_E[rest_E] if weight_E[rest_E].sum() > 0 else np.ones(rest_E.sum())
                share_E[rest_E] = left * weights / weights.sum()
    return share_LE


def alike(tokens_LE: Floats, *, num_sources: int, top_k: int, tokens_per_source: int) -> Routing:
    """The routing in which every source sends the same."""
    tokens_LSE = np.repeat(tokens_LE[:, None, :], num_sources, axis=1)
    return Routing(tokens_per_source=tokens_per_source, top_k=top_k, tokens_LSE=tokens_LSE)


def sampled(
    chance_LE: Floats, *, num_sources: int, top_k: int, tokens_per_source: int, rng: np.random.Generator
) -> Routing:
    """Every token draws `top_k` different experts, expert e with probability `chance_LE[l, e]`; rows sum to `top_k`.

    Counts are drawn, not tokens: of n tokens that have k picks left before expert e, Binomial(n, p[e, k]) take it, with
    p from the conditional Poisson design, which of all ways to draw top_k different experts with these probabilities
    has the most entropy. With equal chances that is every set of experts alike.

    Reference: Chen, Dempster, Liu, "Weighted finite population sampling to maximize entropy", Biometrika 81, 1994.
    """
    take_ELK = _take_chances(chance_LE, top_k)
    num_experts, num_layers, _ = take_ELK.shape
    left_LSK = np.zeros((num_layers, num_sources, top_k + 1), dtype=np.int64)
    left_LSK[:, :, top_k] = tokens_per_source
    tokens_LSE = np.empty((num_layers, num_sources, num_experts), dtype=np.int64)
    for expert in range(num_experts):
        took_LSK = rng.binomial(left_LSK, take_ELK[expert, :, None, :])
        tokens_LSE[:, :, expert] = took_LSK.sum(axis=2)
        left_LSK -= took_LSK
        left_LSK[:, :, :-1] += took_LSK[:, :, 1:]
    return Routing(tokens_per_source=tokens_per_source, top_k=top_k, tokens_LSE=tokens_LSE)


_ROUNDS = 200
_CLOSE = 1e-7
_STEP = 0.6  # a whole step overshoots for ever where two experts share one pick


def _take_chances(chance_LE: Floats, top_k: int) -> Floats:
    """Probability that a token with k picks left takes expert e, such that each is taken with its chance over all."""
    wanted_LE = np.clip(chance_LE, 1e-9, 1 - 1e-9)
    logit_LE = np.log(wanted_LE / (1 - wanted_LE))
    coin_logit_LE = logit_LE.copy()
    for _ in range(_ROUNDS):
        take_ELK = _conditional(1 / (1 + np.exp(-coin_logit_LE)), top_k)
        found_LE = np.clip(_taken(take_ELK), 1e-12, 1 - 1e-12)
        if np.abs(found_LE - wanted_LE).max() < _CLOSE:
            break
        coin_logit_LE += _STEP * (logit_LE - np.log(found_LE / (1 - found_LE)))
    return take_ELK


def _conditional(coin_LE: Floats, top_k: int) -> Floats:
    """P(coin e shows heads | k heads among coins e, e + 1, ...), from the last coin to the first."""
    num_layers, num_experts = coin_LE.shape
    heads_LK = np.zeros((num_layers, top_k + 1))
    heads_LK[:, 0] = 1.0
    take_ELK = np.zeros((num_experts, num_layers, top_k + 1))
    for expert in reversed(range(num_experts)):
        coin_L1 = coin_LE[:, expert, None]
        with_LK = np.zeros_like(heads_LK)
        with_LK[:, 1:] = coin_L1 * heads_LK[:, :-1]
        heads_LK = with_LK + (1 - coin_L1) * heads_LK
        np.divide(with_LK, heads_LK, out=take_ELK[expert], where=heads_LK > 0)
    return take_ELK


def _taken(take_ELK: Floats) -> Floats:
    """The probability that each expert is taken by a token that begins with all its picks."""
    num_experts, num_layers, num_states = take_ELK.shape
    state_LK = np.zeros((num_layers, num_states))
    state_LK[:, -1] = 1.0
    taken_LE = np.empty((num_layers, num_experts))
    for expert in range(num_experts):
        moved_LK = state_LK * take_ELK[expert]
        taken_LE[:, expert] = moved_LK.sum(axis=1)
        state_LK -= moved_LK
        state_LK[:, :-1] += moved_LK[:, 1:]
    return taken_LE
