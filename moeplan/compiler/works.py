"""Operators of the model become kernels of one pass: forward, towards the inputs, towards the weights, or both.

Bytes are what must move through the GPU's memory: operands once in, results once out, no reuse from cache.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from moeplan.domain.operators import Operator
from moeplan.domain.plan import DTYPE_BYTES, Precision
from moeplan.domain.program import Kernel, Pass, Work

_MATRIX = ("gemm", "grouped_gemm")


def work(kind: str, operators: Iterable[Operator], passes: Pass, *, precision: Precision, again: bool = False) -> Work:
    """The kernels of `operators` in one pass. `again`: what selective recomputation drops is computed again first."""
    chosen = tuple(operators)
    if passes == Pass.FORWARD:
        return Work(kind=kind, kernels=tuple(_forward(o, precision) for o in chosen))
    kernels: list[Kernel] = []
    if again and passes != Pass.WEIGHT_GRADIENT:
        kernels += [_forward(o, precision) for o in chosen if o.recompute]
    for operator in reversed(chosen):
        if passes != Pass.WEIGHT_GRADIENT:
            kernels.append(_input_gradient(operator, precision))
        if passes != Pass.INPUT_GRADIENT and operator.weight_gradient_flops:
            kernels.append(_weight_gradient(operator, precision))
    return Work(kind=kind, kernels=tuple(kernels))


def optimizer_work(parameters: float, precision: Precision) -> Work:
    """AdamW over this rank's share: read gradient, master and both moments, write master, moments and the weight."""
    master = DTYPE_BYTES[precision.master_weights or precision.weights]
    once = DTYPE_BYTES[precision.gradients] + DTYPE_BYTES[precision.weights]
    size = parameters * (once + 2 * master + 4 * DTYPE_BYTES[precision.moments])
    kernel = Kernel(name="adamw", kind="elementwise", dtype="fp32", flops=12.0 * parameters, size_bytes=size)
    return Work(kind="optimizer", kernels=(kernel,))


def dtype(operator: Operator, precision: Precision) -> str:
    """Matrix products by weights run in `compute`, those with fp32 results and everything else in `activations`."""
    if operator.kind in _MATRIX and operator.precision == "activation":
        return precision.compute
    return precision.activations


def _sizes(operator: Operator, precision: Precision) -> tuple[float, float, float]:
    """Bytes of the weights read, of the inputs, of the outputs."""
    operand = DTYPE_BYTES[dtype(operator, precision)]
    result = 4.0 if operator.precision == "accumulator" else DTYPE_BYTES[precision.activations]
    return (
        operator.weight_elements * operand,
        operator.input_elements * operand,
        operator.output_elements * result,
    )


def _kernel(operator: Operator, precision: Precision, *, flops: float, size_bytes: float, suffix: str = "") -> Kernel:
    return Kernel(
        name=operator.name + suffix,
        kind=operator.kind,
        dtype=dtype(operator, precision),
        flops=float(flops),
        size_bytes=size_bytes,
        rows=operator.rows,
        columns=operator.columns,
        depth=operator.depth,
        batch=operator.batch,
        rows_per_expert=operator.group_rows,
    )


def _forward(operator: Operator, precision: Precision) -> Kernel:
    return _kernel(operator, precision, flops=operator.flops, size_bytes=sum(_sizes(operator, precision)))


def _input_gradient(operator: Operator, precision: Precision) -> Kernel:
    weights, inputs, outputs = _sizes(operator, precision)
    flops = operator.input_gradient_flops
    if operator.kind in _MATRIX:
        kernel = _kernel(operator, precision, flops=flops, size_bytes=weights + inputs + outputs, suffix="_dgrad")
        return replace(kernel, columns=operator.depth, depth=operator.columns)
    size = weights + 2 * inputs + 2 * outputs
    return replace(_kernel(operator, precision, flops=flops, size_bytes=size, suffix="_grad"), is_backward=True)


def _weight_gradient(operator: Operator, precision: Precision) -> Kernel:
    """The gradient is read and written once, as it is summed over micro-batches."""
    _, inputs, outputs = _sizes(operator, precision)
    gradient = 2 * operator.weight_elements * DTYPE_BYTES[precision.gradients]
    size = inputs + outputs + gradient
    kernel = _kernel(operator, precision, flops=operator.weight_gradient_flops, size_bytes=size, suffix="_wgrad")
    if operator.kind == "grouped_gemm":
        return kernel
    return replace(kernel, rows=operator.depth, columns=operator.columns, depth=operator.rows)
