"""A few experts share a given part of all tokens evenly, the others the rest: skew with two knobs and no noise."""

from __future__ import annotations

import numpy as np

from moeplan.domain.routing import Routing
from moeplan.routers._laws import alike, check_top_k, refuse


def route(
    *,
    num_layers: int,
    num_experts: int,
    top_k: int,
    num_sources: int,
    tokens_per_source: int,
    rng: np.random.Generator,
    num_hot: int = 1,
    share: float,
) -> Routing:
    """Expected counts: `share` of all picks to `num_hot` experts, which `rng` chooses in each layer.

    `share` lies between num_hot / experts, which is balanced, and num_hot / top_k, where every token picks them all.
    """
    check_top_k(num_experts, top_k)
    _check(num_hot, share, num_experts=num_experts, top_k=top_k)
    picks = tokens_per_source * top_k
    row_E = np.full(num_experts, picks * share / num_hot)
    if num_hot < num_experts:
        row_E[num_hot:] = picks * (1 - share) / (num_experts - num_hot)
    tokens_LE = rng.permuted(np.tile(row_E, (num_layers, 1)), axis=1)
    return alike(tokens_LE, num_sources=num_sources, top_k=top_k, tokens_per_source=tokens_per_source)


def _check(num_hot: int, share: float, *, num_experts: int, top_k: int) -> None:
    if not 1 <= num_hot <= num_experts:
        raise refuse("num_hot", num_hot, allowed=f"1 to {num_experts}, the experts", remedy="use 1 for one hot expert")
    least, most = num_hot / num_experts, min(num_hot / top_k, 1.0)
    if not least <= share <= most:
        allowed = f"from {least:g}, which is balanced, to {most:g}, where each token picks every hot expert it can"
        raise refuse(
            "share", share, allowed=allowed, remedy=f"use {min(max(share, least), most):g}, or another num_hot"
        )
