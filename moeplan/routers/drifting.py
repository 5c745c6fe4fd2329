"""A router without balancing loss as training goes on: a fast collapse, a slow relaxation, then a drift; as measured.

Sources: statistics of the counts published with SmartMoE (Zhai et al., USENIX ATC 2023); see `_popularity.py`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from moeplan.domain.routing import Routing
from moeplan.routers._laws import check_top_k, refuse, sampled, shared_out
from moeplan.routers._popularity import popularity

Floats = npt.NDArray[np.float64]


def route(
    *,
    num_layers: int,
    num_experts: int,
    top_k: int,
    num_sources: int,
    tokens_per_source: int,
    rng: np.random.Generator,
    iteration: int = 5001,
) -> Routing:
    """Counts sampled at `iteration` (1 is the first) of one training run; `rng` in the same state is the same run.

    Popularity is the measured shape of each layer, its experts in random order, times exp(slow walk + noise of the
    iteration's batch). Then every token draws its experts without taking one twice.
    """
    check_top_k(num_experts, top_k)
    if not 0 <= iteration <= 10**9:
        raise refuse("iteration", iteration, allowed="0 to 1e9", remedy="use 1 for the first, 5001 for late training")
    run = int(rng.integers(2**62))
    shape_LE = popularity(num_layers, num_experts, top_k, iteration)
    shuffled_LE = np.random.default_rng(run).permuted(shape_LE, axis=1)
    weight_LE = shuffled_LE * np.exp(_walk(run, shape_LE.shape, iteration))
    chance_LE = shared_out(weight_LE, top_k, most=1.0)
    draws = np.random.default_rng([run, 2, iteration])
    return sampled(chance_LE, num_sources=num_sources, top_k=top_k, tokens_per_source=tokens_per_source, rng=draws)


_OCTAVES = 7
_SHORTEST = 1000.0
_WALK = 0.029
_NOISE = 0.046


def _walk(run: int, shape: tuple[int, ...], iteration: int) -> Floats:
    """Logarithm by which each expert's popularity is off: waves whose variance grows with their period, and noise.

    A sum of waves is a random walk that can be read at any iteration without the ones before, and stays bounded.
    """
    waves = np.random.default_rng([run, 1])
    total = _NOISE * np.random.default_rng([run, 3, iteration]).standard_normal(shape)
    for octave in range(_OCTAVES):
        period = _SHORTEST * 2.0 ** (octave + waves.random(shape))
        phase = 2 * np.pi * waves.random(shape)
        total += _WALK * 2.0 ** (octave / 2) * np.cos(2 * np.pi * iteration / period + phase)
    return np.asarray(total)
