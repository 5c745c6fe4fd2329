"""Seconds of a task on a device that was measured: its products by their class, and the rest by the bytes it moves."""

from __future__ import annotations

from collections.abc import Callable

from moeplan.domain.measured import Measured, Terms
from moeplan.domain.program import Kernel, Work

_SIDES = ("_dgrad", "_wgrad", "_grad")


def side(kernel: Kernel) -> str:
    """What part of the backward pass a kernel is of; empty in a forward pass."""
    return next((each for each in _SIDES if kernel.name.endswith(each)), "")


def product_class(kernel: Kernel) -> str:
    """The class under which a kernel is priced by itself; empty for an elementwise one, which belongs to its task."""
    return "" if kernel.kind == "elementwise" else kernel.kind + side(kernel)


def task_class(work: Work) -> str:
    """The class of a task beside its products; empty for weight gradients alone, which are products and no more."""
    sides = {side(kernel) for kernel in work.kernels}
    if sides == {"_wgrad"}:
        return ""
    kind = _kind(work)
    return kind if sides <= {""} else f"{kind}_backward"


def _kind(work: Work) -> str:
    """The embedding is told from the head, and attention with a router behind it from attention alone."""
    names = {kernel.name.removesuffix(side(kernel)) for kernel in work.kernels}
    if "embedding" in names:
        return "embedding"
    return "routed_attention" if work.kind == "attention" and "router" in names else work.kind


def elementwise_bytes(work: Work) -> float:
    """What the kernels of a task move that are no products."""
    return sum(kernel.size_bytes for kernel in work.kernels if kernel.kind == "elementwise")


def calls(kernel: Kernel) -> int:
    """A grouped product is one call for each expert, with rows or without."""
    return max(1, len(kernel.rows_per_expert))


def product_s(kernel: Kernel, terms: Terms) -> float:
    """Seconds of a product or an attention."""
    return terms.seconds(flops=kernel.flops, size_bytes=kernel.size_bytes, count=calls(kernel))


def measured_s(work: Work, measured: Measured, *, otherwise: Callable[[Kernel], float]) -> float:
    """Of a whole task; `otherwise` prices a kernel whose class was not measured."""
    total, own = 0.0, measured.tasks.get(_dtype(work), {}).get(task_class(work))
    if own is not None:
        total += own.seconds(flops=0.0, size_bytes=elementwise_bytes(work))
    for kernel in work.kernels:
        if kernel.kind != "elementwise":
            terms = measured.products.get(kernel.dtype, {}).get(product_class(kernel))
            total += otherwise(kernel) if terms is None else product_s(kernel, terms)
        elif own is None:
            total += otherwise(kernel)
    return total


def _dtype(work: Work) -> str:
    """The format of a task's elementwise kernels, or else of its products."""
    formats = [each.dtype for each in sorted(work.kernels, key=lambda each: each.kind != "elementwise")]
    return formats[0] if formats else ""
