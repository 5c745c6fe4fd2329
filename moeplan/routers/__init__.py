"""Routers: laws and records of how many tokens each source sends to each expert.

One file is one router. It has one function, whose keyword-only arguments after `rng` are its options:

    route(*, num_layers, num_experts, top_k, num_sources, tokens_per_source, rng, **options) -> Routing

`num_layers` counts mixture-of-experts layers, `num_sources` the ranks of one expert-parallel group, and every source
has `tokens_per_source` tokens, one micro-batch. `rng` is the only source of chance. The options a router takes are
those of its signature, so the caller refuses others by

    inspect.signature(route).parameters.keys() - moeplan.routers.GIVEN

The law (tests/contracts/test_routers.py): shapes are as asked; every row sums to `tokens_per_source * top_k`; no source
sends an expert more tokens than it has; nothing is negative, dropped or padded; a generator in the same state gives the
same bytes; arrays are read-only.

A complete router, in which each source favours one expert:

    import numpy as np
    from moeplan.domain.routing import Routing

    def route(*, num_layers, num_experts, top_k, num_sources, tokens_per_source, rng, share: float = 0.5) -> Routing:
        weight_LSE = np.full((num_layers, num_sources, num_experts), (1 - share) / (num_experts - 1))
        favourite_LS = rng.integers(num_experts, size=(num_layers, num_sources))
        np.put_along_axis(weight_LSE, favourite_LS[:, :, None], share, axis=2)
        tokens_LSE = weight_LSE * tokens_per_source * top_k
        return Routing(tokens_per_source=tokens_per_source, top_k=top_k, tokens_LSE=tokens_LSE)
"""

GIVEN = frozenset({"num_layers", "num_experts", "top_k", "num_sources", "tokens_per_source", "rng"})
"""What every router is given; its other parameters are its options."""
