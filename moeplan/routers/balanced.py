"""Every source sends every expert exactly the same, fractions of a token included: what forced balancing measures."""

from __future__ import annotations

import numpy as np

from moeplan.domain.routing import Routing
from moeplan.routers._laws import alike, check_top_k


def route(
    *,
    num_layers: int,
    num_experts: int,
    top_k: int,
    num_sources: int,
    tokens_per_source: int,
    rng: np.random.Generator,
) -> Routing:
    """tokens * top_k / experts from each source to each expert; draws nothing."""
    check_top_k(num_experts, top_k)
    tokens_LE = np.full((num_layers, num_experts), tokens_per_source * top_k / num_experts)
    return alike(tokens_LE, num_sources=num_sources, top_k=top_k, tokens_per_source=tokens_per_source)
