"""Measured popularity of experts while a model trains without a balancing loss, and its curve over iterations.

Measured: the counts published with SmartMoE (Zhai et al., USENIX ATC 2023): a GPT of 24 mixture-of-experts layers, 32
experts, top-2, iterations 1 to 5001. Two numbers are known of each layer late in training, the share of the hottest
expert and the effective number of experts; of earlier iterations their means over layers. What lies between is
assumed.

Axes of arrays: L layer, E expert.
"""

from __future__ import annotations

from functools import lru_cache

import numpy as np
import numpy.typing as npt

from moeplan.routers._laws import shared_out

Floats = npt.NDArray[np.float64]

_HOTTEST_PERCENT = (21, 45, 49, 49, 48, 41, 43, 46, 32, 31, 35, 50, 46, 50, 50, 49, 48, 47, 45, 15, 26, 41, 19, 15)
_EFFECTIVE = (
    7.2, 4.4, 6.7, 7.0, 6.1, 4.9, 5.3, 8.2, 7.9, 6.5, 5.3, 3.5,
    6.0, 3.3, 5.4, 6.4, 4.3, 6.0, 8.7, 17.3, 12.7, 10.4, 12.7, 12.1,
)  # fmt: skip
_MEASURED_EXPERTS, _MEASURED_TOP_K = 32, 2

_ITERATIONS = (1.0, 51.0, 501.0, 2001.0, 5001.0)
# Concentration as a part of the late one, fitted so that with the walk the means over layers are the measured ones.
_HOTTEST_CURVE = (0.0, 1.201, 0.864, 0.970, 1.009)
_EFFECTIVE_CURVE = (0.0, 1.395, 0.769, 0.926, 1.0)


@lru_cache(maxsize=32)
def popularity(num_layers: int, num_experts: int, top_k: int, iteration: int) -> Floats:
    """Shares of a layer's picks, hottest expert first, before the random walk; rows sum to 1, none above 1 / top_k.

    Another number of layers takes the measured ones in proportion. Another number of experts E or of picks k keeps how
    far, in logarithms, the hottest share lies between 1/E and 1/k and the effective number between E and k (assumed).
    """
    if num_experts == top_k:
        return np.full((num_layers, num_experts), 1 / num_experts)
    layer = np.linspace(0, len(_EFFECTIVE) - 1, num_layers)
    measured = np.arange(len(_EFFECTIVE))
    hottest_L = np.interp(layer, measured, _concentration(100 / np.array(_HOTTEST_PERCENT)))
    effective_L = np.interp(layer, measured, _concentration(np.array(_EFFECTIVE)))
    hottest_L = np.clip(hottest_L * _at(iteration, _HOTTEST_CURVE), 0, 1)
    effective_L = np.clip(effective_L * _at(iteration, _EFFECTIVE_CURVE), 0, 1)
    span, least = np.log(num_experts / top_k), np.log(top_k)
    return _shape(np.exp(-least - (1 - hottest_L) * span), least + (1 - effective_L) * span, num_experts)


def _concentration(number: Floats) -> Floats:
    """0 where all experts are alike, 1 where every token picks the same ones, in between by logarithm."""
    whole = np.log(_MEASURED_EXPERTS / _MEASURED_TOP_K)
    return np.asarray(np.clip(1 - np.log(number / _MEASURED_TOP_K) / whole, 0, 1))


def _at(iteration: int, curve: tuple[float, ...]) -> float:
    return float(np.interp(np.log(max(iteration, 1)), np.log(_ITERATIONS), curve))


_HALVINGS = 40


def _shape(hottest_L: Floats, entropy_L: Floats, num_experts: int) -> Floats:
    """The hottest share, then a geometric series, capped by it, with the ratio that comes nearest to the entropy."""
    low_L, high_L = np.full_like(hottest_L, 1e-6), np.ones_like(hottest_L)
    for _ in range(_HALVINGS):
        ratio_L = (low_L + high_L) / 2
        flat_L = _entropy(_series(hottest_L, ratio_L, num_experts)) > entropy_L
        low_L, high_L = np.where(flat_L, low_L, ratio_L), np.where(flat_L, ratio_L, high_L)
    return _series(hottest_L, (low_L + high_L) / 2, num_experts)


def _series(hottest_L: Floats, ratio_L: Floats, num_experts: int) -> Floats:
    share_LE = np.empty((len(hottest_L), num_experts))
    share_LE[:, 0] = hottest_L
    weight_LE = np.maximum(ratio_L[:, None] ** np.arange(num_experts - 1), 1e-30)
    for layer, hottest in enumerate(hottest_L):
        share_LE[layer, 1:] = shared_out(weight_LE[layer : layer + 1], 1 - hottest, most=max(hottest, 1 / num_experts))
    return share_LE


def _entropy(share_LE: Floats) -> Floats:
    return np.asarray(-(share_LE * np.log(np.maximum(share_LE, 1e-300))).sum(axis=1))
