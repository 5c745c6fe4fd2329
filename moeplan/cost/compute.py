"""Seconds of a kernel's arithmetic: FLOP over the peak that a large kernel reaches, times what its shape wastes."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import cast

from moeplan.domain.cluster import Gpu
from moeplan.domain.program import Kernel
from moeplan.errors import CatalogueError

TILE = 128
"""Rows and columns of the output that one SM computes at a time: the usual tile of cuBLAS for 16-bit products."""
_SPLIT_DEPTH = 1024
"""A product with too few tiles is also cut along its depth, into parts of no less than this."""


def arithmetic_s(kernel: Kernel, gpu: Gpu) -> float:
    """Seconds of the FLOPs alone. Raises CatalogueError for a number format that the GPU has no peak for."""
    if kernel.flops == 0:
        return 0.0
    if kernel.kind == "elementwise":
        return kernel.flops / (_peak(gpu, "fp32") * gpu.memory_efficiency)
    if kernel.kind in ("attention", "scan"):
        return kernel.flops / (_peak(gpu, kernel.dtype) * gpu.attention_efficiency)
    if kernel.kind == "grouped_gemm":
        return kernel.flops / (_peak(gpu, kernel.dtype) * gpu.grouped_gemm_efficiency * _grouped_share(kernel, gpu))
    return kernel.flops / (_peak(gpu, kernel.dtype) * gpu.gemm_efficiency * _gemm_share(kernel, gpu))


def _peak(gpu: Gpu, dtype: str) -> float:
    peaks = cast(Mapping[str, float], gpu.peak_flops_per_s)
    if dtype not in peaks:
        raise CatalogueError(f"{gpu.name}: no peak for {dtype}; use one of {', '.join(peaks)}, or state peak_{dtype}")
    return peaks[dtype]


def _gemm_share(kernel: Kernel, gpu: Gpu) -> float:
    tiles = ceil(kernel.rows / TILE) * ceil(kernel.columns / TILE) * kernel.batch
    exact = kernel.rows * kernel.columns * kernel.batch / TILE**2
    return _wave_share(tiles, exact, kernel.depth, gpu.num_sms)


def _grouped_share(kernel: Kernel, gpu: Gpu) -> float:
    rows = sum(ceil(count / TILE) for count in kernel.rows_per_expert)
    tiles = rows * ceil(kernel.columns / TILE)
    exact = kernel.rows * kernel.columns / TILE**2
    return _wave_share(tiles, exact, kernel.depth, gpu.num_sms)


def _wave_share(tiles: float, exact: float, depth: float, num_sms: int) -> float:
    """Useful part of the tiles' work over all waves: whole tiles, whole waves, each wave as wide as the GPU.

    Reference: NVIDIA, "Matrix multiplication background user's guide", sections on tile and wave quantization.
    """
    splits = 1 if tiles >= num_sms else max(1, min(int(depth // _SPLIT_DEPTH), int(num_sms // max(tiles, 1))))
    waves = ceil(tiles * splits / num_sms)
    return exact * splits / (waves * num_sms)
