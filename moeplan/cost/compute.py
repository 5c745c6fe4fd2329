"""Seconds of a kernel's arithmetic: FLOP over the peak that a large kernel reaches, times what its shape wastes."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from typing import cast

from moeplan.domain.cluster import Gpu
from moeplan.domain.program import Kernel
from moeplan.errors import CatalogueError

TILE = 128
"""Rows of an expert that a grouped product computes at a time: its part of the buffer is padded to as many.
Reference: DeepGEMM, whose contiguous layout aligns each group to 128 rows.
"""
QUERIES = 128
"""Queries of a block of fused attention. Reference: Shah et al., FlashAttention-3 (2024), section 3."""
_TILES = ((128, 256), (64, 256), (128, 128), (64, 128), (64, 64), (32, 128), (16, 128))
"""Rows and columns of the output that one SM computes at a time: what libraries choose from, the largest first."""
SHORT, SHORTEST = 64, 16
_LOW = (SHORT, 32, SHORTEST)
"""Where no expert, or a whole product, has more than `SHORT` rows, as when tokens are decoded, libraries swap the
operands, so that tiles are as low as `SHORTEST` rows.
Reference: sgl-project/sglang, pull request 25532 (tiles of 16 and 32 on Hopper); NVIDIA/TensorRT-LLM, pull request 7355
(the same on Blackwell).
"""
_OPERAND = 12.0
"""A tile of r rows and c columns takes 1 + 12 (1 / r + 1 / c) times its products: operands come over shared memory.
As fitted to the dense products of `benchmarks/calibrate_silicon.py`, for all GPUs.
"""
_SOFTMAX = 80.0
"""Exponentials of attention take as long as the products of a head of 80 elements, beside which they run. As fitted to
heads of 64, 128 and 256 by `benchmarks/calibrate_silicon.py`, for all GPUs. Reference: Shah et al., FlashAttention-3
(2024), section 2.2: 3.9 TFLOP/s of exponentials beside 989 of products on an H100, which makes it 64.
"""


def arithmetic_s(kernel: Kernel, gpu: Gpu) -> float:
    """Seconds of the FLOPs alone. Raises CatalogueError for a number format that the GPU has no peak for."""
    if kernel.flops == 0:
        return 0.0
    if kernel.kind == "elementwise":
        return kernel.flops / (_peak(gpu, "fp32") * gpu.memory_efficiency)
    reachable = reachable_flops_per_s(kernel, gpu)
    if kernel.kind == "attention":
        return _attention_s(kernel, gpu, reachable)
    if kernel.kind == "scan":
        return kernel.flops / reachable
    rows = kernel.rows_per_expert if kernel.kind == "grouped_gemm" else None
    if rows is None:
        heights: tuple[int, ...] = (TILE, SHORT) if kernel.rows > SHORT else _LOW
        counts = {height: ceil(kernel.rows / height) * kernel.batch for height in heights}
    else:
        heights = (TILE,) if max(rows, default=0) > SHORT else _LOW
        counts = {height: float(sum(ceil(count / height) for count in rows)) for height in heights}
    return _tiles_s(kernel, gpu, counts, reachable)


def reachable_flops_per_s(kernel: Kernel, gpu: Gpu) -> float:
    """The peak of the kernel's number format, times the share of it that a large kernel of its kind reaches."""
    peak = _peak(gpu, kernel.dtype)
    if kernel.kind == "scan":
        return peak * gpu.attention_efficiency
    if kernel.kind == "attention":
        is_forward = not kernel.is_backward or gpu.attention_backward_efficiency is None
        return peak * (gpu.attention_efficiency if is_forward else gpu.attention_backward_efficiency or 1.0)
    own = {"fp8": gpu.fp8_gemm_efficiency, "fp4": gpu.fp4_gemm_efficiency}.get(kernel.dtype) or gpu.gemm_efficiency
    grouped = gpu.grouped_gemm_efficiency / gpu.gemm_efficiency if kernel.kind == "grouped_gemm" else 1.0
    return peak * own * grouped * _sustained(gpu, kernel.dtype)


def _sustained(gpu: Gpu, dtype: str) -> float:
    own = {"fp8": gpu.sustained_fp8_efficiency, "fp4": gpu.sustained_fp4_efficiency}.get(dtype)
    return own or gpu.sustained_efficiency


def _peak(gpu: Gpu, dtype: str) -> float:
    peaks = cast(Mapping[str, float], gpu.peak_flops_per_s)
    if dtype not in peaks:
        raise CatalogueError(f"{gpu.name}: no peak for {dtype}; use one of {', '.join(peaks)}, or state peak_{dtype}")
    return peaks[dtype]


def _tiles_s(kernel: Kernel, gpu: Gpu, rows_of_tiles: Mapping[int, float], reachable: float) -> float:
    """min over tiles r x c of  waves (2 r c depth w(r, c) / w(128, 256) / reachable of one SM + tile start).

    waves = ceil(tiles / SMs): whole tiles, whole waves; a library takes the tile that is fastest. w is `_OPERAND`.
    Reference: NVIDIA, "Matrix multiplication background user's guide", sections on tile and wave quantization.
    """
    each = 2.0 * kernel.depth * gpu.num_sms / (reachable * _work(*_TILES[0]))
    return min(
        ceil(rows_of_tiles[rows] * ceil(kernel.columns / columns) / gpu.num_sms)
        * (rows * columns * _work(rows, columns) * each + gpu.tile_start_s)
        for rows, columns in _TILES
        if rows in rows_of_tiles
    )


def _work(rows: int, columns: int) -> float:
    return 1.0 + _OPERAND * (1.0 / rows + 1.0 / columns)


def _attention_s(kernel: Kernel, gpu: Gpu, reachable: float) -> float:
    """FLOP / reachable x max(1, s / head)  +  blocks of queries x start of one / SMs; backward, blocks start 2.5 times.

    `rows` are queries of a head, `depth` the mean of its elements in keys and in values; s is `_SOFTMAX`. A kernel that
    does not say its shape has no blocks, and heads wider than s.
    """
    softmax = max(1.0, _SOFTMAX / kernel.depth) if kernel.depth else 1.0
    starts = (2.5 if kernel.is_backward else 1.0) * kernel.rows / QUERIES
    return kernel.flops / reachable * softmax + starts * gpu.attention_block_s / gpu.num_sms


def start_s(kernel: Kernel, gpu: Gpu) -> float:
    """Of the kernel on the device, before and after its work; longer where operands come with scales of blocks."""
    is_scaled = kernel.kind in ("gemm", "grouped_gemm") and kernel.dtype in ("fp8", "fp4")
    return gpu.kernel_start_s + (gpu.scaled_start_s if is_scaled else 0.0)
