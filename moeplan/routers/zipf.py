"""Popularity by rank, (r + 1) ** -skew: one number from balanced (0) to a few experts that take nearly all (2)."""

from __future__ import annotations

import numpy as np

from moeplan.domain.routing import Routing
from moeplan.routers._laws import alike, check_top_k, refuse, shared_out


def route(
    *,
    num_layers: int,
    num_experts: int,
    top_k: int,
    num_sources: int,
    tokens_per_source: int,
    rng: np.random.Generator,
    skew: float = 0.0,
) -> Routing:
    """Expected counts, fractions included, alike on all sources; `rng` says which expert has which rank in each layer.

    An expert that would get more tokens than there are gets all of them, and the others share what it leaves.
    """
    check_top_k(num_experts, top_k)
    if not 0 <= skew <= 100:
        raise refuse("skew", skew, allowed="a number from 0 to 100", remedy="use 0 for balanced, 1 for strong skew")
    weight_LE = np.tile(np.arange(1.0, num_experts + 1) ** -skew, (num_layers, 1))
    tokens_LE = shared_out(weight_LE, tokens_per_source * top_k, most=tokens_per_source)
    tokens_LE = rng.permuted(tokens_LE, axis=1)
    return alike(tokens_LE, num_sources=num_sources, top_k=top_k, tokens_per_source=tokens_per_source)
