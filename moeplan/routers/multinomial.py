"""Every token picks its experts by fair chance: the least imbalance that a router without forced balance can have."""

from __future__ import annotations

import numpy as np

from moeplan.domain.routing import Routing
from moeplan.routers._laws import check_top_k, sampled


def route(
    *,
    num_layers: int,
    num_experts: int,
    top_k: int,
    num_sources: int,
    tokens_per_source: int,
    rng: np.random.Generator,
) -> Routing:
    """Counts of tokens that each draw one of the sets of `top_k` experts, all sets alike."""
    check_top_k(num_experts, top_k)
    chance_LE = np.full((num_layers, num_experts), top_k / num_experts)
    return sampled(chance_LE, num_sources=num_sources, top_k=top_k, tokens_per_source=tokens_per_source, rng=rng)
