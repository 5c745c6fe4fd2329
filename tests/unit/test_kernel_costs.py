"""Kernels: what each term of their seconds does in its limits."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.catalogue import cluster_from
from moeplan.cost.compute import TILE, arithmetic_s, reachable_flops_per_s, start_s
from moeplan.cost.cost_model import CostModel
from moeplan.domain.cluster import Gpu
from moeplan.domain.program import Kernel

GPU = cluster_from("hgx-h200-rail").gpu
SIZES = st.sampled_from([1, 64, 128, 200, 512, 1000, 4096, 7168])


def product(rows: float, columns: float, depth: float, dtype: str = "bf16", **more: object) -> Kernel:
    element = {"bf16": 2.0, "fp8": 1.0}[dtype]
    size = element * depth * (rows + columns) + 2 * rows * columns
    kernel = Kernel(name="", kind="gemm", dtype=dtype, flops=2 * rows * columns * depth, size_bytes=size, rows=rows,
                    columns=columns, depth=depth)  # fmt: skip
    return replace(kernel, **more)


def grouped(counts: tuple[float, ...], columns: float = 4096, depth: float = 7168) -> Kernel:
    rows = sum(counts)
    return product(rows, columns, depth, kind="grouped_gemm", rows_per_expert=counts)


def seconds(kernel: Kernel, gpu: Gpu = GPU) -> float:
    return CostModel(gpu=gpu).kernel_s(kernel)


@pytest.mark.parametrize("dtype", ["bf16", "fp8"])
def test_a_huge_product_reaches_the_share_of_its_number_format(dtype: str) -> None:
    kernel = product(132 * TILE * 64, 256 * 132, 65536, dtype)
    assert kernel.flops / seconds(kernel) == pytest.approx(reachable_flops_per_s(kernel, GPU), rel=0.01)


def test_a_tiny_product_takes_its_start_and_a_scaled_one_longer() -> None:
    small = {dtype: seconds(product(1, 64, 64, dtype)) for dtype in ("bf16", "fp8")}
    assert small["bf16"] == pytest.approx(GPU.kernel_start_s, rel=0.15)
    assert small["fp8"] - small["bf16"] == pytest.approx(GPU.scaled_start_s, rel=0.05)


def test_no_work_takes_no_time() -> None:
    assert seconds(product(0, 0, 0)) == 0.0


@settings(derandomize=True, deadline=None, max_examples=80)
@given(SIZES, SIZES, SIZES, st.sampled_from(["bf16", "fp8"]))
def test_more_of_anything_never_takes_less(rows: int, columns: int, depth: int, dtype: str) -> None:
    base = seconds(product(rows, columns, depth, dtype))
    for more in ((2 * rows, columns, depth), (rows, 2 * columns, depth), (rows, columns, 2 * depth)):
        assert seconds(product(*more, dtype)) >= base * (1 - 1e-12)


def test_deep_products_reach_more_of_the_peak() -> None:
    rates = [product(4096, 4096, depth).flops / seconds(product(4096, 4096, depth)) for depth in (256, 1024, 4096)]
    assert rates == sorted(rates)
    assert rates[0] < 0.9 * rates[-1]


@settings(derandomize=True, deadline=None, max_examples=80)
@given(SIZES, SIZES, SIZES)
def test_a_kernel_takes_no_less_than_its_slower_side_and_at_most_a_fifth_more(m: int, n: int, k: int) -> None:
    kernel = product(m, n, k)
    busy = seconds(kernel) - start_s(kernel, GPU)
    slower = max(arithmetic_s(kernel, GPU), CostModel(gpu=GPU).memory_s(kernel))
    assert slower * (1 - 1e-9) <= busy <= 1.2 * slower


def test_an_expert_with_one_row_costs_a_tile_of_rows() -> None:
    """A low one, where no expert has many rows."""
    assert arithmetic_s(grouped((1.0,) * 264), GPU) == pytest.approx(arithmetic_s(grouped((16.0,) * 264), GPU))
    assert arithmetic_s(grouped((65.0,) * 264), GPU) == pytest.approx(arithmetic_s(grouped((128.0,) * 264), GPU))
    assert arithmetic_s(grouped((129.0,) * 264), GPU) == pytest.approx(arithmetic_s(grouped((256.0,) * 264), GPU))


def test_experts_apart_never_take_less_than_as_one() -> None:
    """The bounds of `planners/_anywhere.py` rest on it."""
    for counts in ((100.0, 28.0), (1.0, 255.0, 300.0), (64.0,) * 8):
        assert arithmetic_s(grouped(counts), GPU) >= arithmetic_s(grouped((sum(counts),)), GPU)


def attention(head: float, queries: float, keys: float, *, backward: bool = False) -> Kernel:
    flops = 2 * 2 * head * queries * keys * (2.5 if backward else 1.0)
    return Kernel(name="", kind="attention", dtype="bf16", flops=flops, size_bytes=1.0, rows=queries, depth=head,
                  is_backward=backward)  # fmt: skip


def test_long_attention_reaches_its_share_and_short_ones_pay_for_their_blocks() -> None:
    peak = GPU.peak_flops_per_s["bf16"]
    rates = [attention(128, 2**17, keys).flops / seconds(attention(128, 2**17, keys)) for keys in (2**7, 2**10, 2**16)]
    assert rates == sorted(rates)
    assert rates[-1] == pytest.approx(GPU.attention_efficiency * peak, rel=0.01)


def test_small_heads_wait_for_exponentials_and_large_ones_do_not() -> None:
    times = {head: seconds(attention(head, 2**17, 2**15)) for head in (40, 80, 160)}
    assert times[40] == pytest.approx(times[80], rel=0.02)
    assert times[160] == pytest.approx(2 * times[80], rel=0.02)


def test_the_backward_pass_has_a_share_of_its_own() -> None:
    long = {way: attention(128, 2**17, 2**16, backward=way) for way in (False, True)}
    reached = {way: kernel.flops / seconds(kernel) for way, kernel in long.items()}
    assert GPU.attention_backward_efficiency is not None
    assert reached[True] / reached[False] == pytest.approx(
        GPU.attention_backward_efficiency / GPU.attention_efficiency, rel=0.02
    )


def test_a_sheet_without_the_new_figures_has_none_of_the_terms() -> None:
    plain = replace(GPU, kernel_start_s=0.0, scaled_start_s=0.0, tile_start_s=0.0, attention_block_s=0.0,
                    attention_backward_efficiency=None)  # fmt: skip
    kernel = attention(128, 2**10, 2**10, backward=True)
    assert seconds(kernel, plain) == pytest.approx(
        kernel.flops / plain.peak_flops_per_s["bf16"] / plain.attention_efficiency
    )
