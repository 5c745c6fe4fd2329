"""Operators: the forward kernels of one layer on one GPU, as a cost model sees them, and the helpers that build them.

Who keeps what. An operator *keeps* its own output if the backward pass of a later operator reads it. So each kept
tensor is counted once, by its producer, and an operator with `recompute=True` may drop its output and be run again.
This is the account of Korthikanti et al., "Reducing activation recomputation in large transformer models" (MLSys
2023), section 4, for fused attention without dropout: it leaves out their dropout masks (1 byte an element) and
softmax matrix (5 a s^2 b), and adds the log-sum-exp of each row in fp32. Statistics of norms (two numbers a token)
are left out, as there.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from moeplan.errors import PlanError

Kind = Literal["gemm", "grouped_gemm", "attention", "scan", "elementwise"]
Precision = Literal["activation", "accumulator"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Operator:
    """One forward kernel on one GPU.

    `rows`, `columns`, `depth` are a GEMM's m, n, k and `batch` how often it is done (0 for what is not a GEMM). A
    grouped GEMM has its rows per group in `group_rows`, their sum in `rows`, and the groups that have a row in
    `batch`. Attention has a row for each query of a head, and for `depth` the mean of a head's elements in keys and
    values.
    `input_elements` and `output_elements` are activations that move through memory, `weight_elements` the weights read.
    `kept_elements` stay until the backward pass in the activation's precision, `kept_accumulator_elements` in fp32.
    `precision` is the precision of the output: "activation", or "accumulator" for fp32 router scores and logits.
    """

    name: str
    kind: Kind
    flops: int
    rows: int = 0
    columns: int = 0
    depth: int = 0
    batch: int = 0
    group_rows: tuple[int, ...] = ()
    weight_elements: int = 0
    input_elements: int = 0
    output_elements: int = 0
    kept_elements: int = 0
    kept_accumulator_elements: int = 0
    recompute: bool = False
    precision: Precision = "activation"
    input_gradient_flops: int = 0
    weight_gradient_flops: int = 0

    @property
    def backward_flops(self) -> int:
        """FLOP of the backward pass: towards the input plus towards the weights."""
        return self.input_gradient_flops + self.weight_gradient_flops


def gemm(
    name: str,
    *,
    rows: int,
    columns: int,
    depth: int,
    batch: int = 1,
    kept: int = 0,
    recompute: bool = False,
    precision: Precision = "activation",
) -> Operator:
    """A product by weights: 2 * rows * columns * depth * batch FLOP forward, and as many for each of two gradients."""
    flops = 2 * rows * columns * depth * batch
    return Operator(
        name=name, kind="gemm", flops=flops, rows=rows, columns=columns, depth=depth, batch=batch,
        weight_elements=columns * depth * batch, input_elements=rows * depth * batch,
        output_elements=rows * columns * batch, kept_elements=kept, recompute=recompute, precision=precision,
        input_gradient_flops=flops, weight_gradient_flops=flops,
    )  # fmt: skip


def grouped_gemm(name: str, *, group_rows: Sequence[int], columns: int, depth: int, kept: int = 0) -> Operator:
    """One product per expert: 2 * sum(group_rows) * columns * depth FLOP. Experts without a row are not read."""
    rows, groups = sum(group_rows), sum(count > 0 for count in group_rows)
    flops = 2 * rows * columns * depth
    return Operator(
        name=name, kind="grouped_gemm", flops=flops, rows=rows, columns=columns, depth=depth, batch=groups,
        group_rows=tuple(group_rows), weight_elements=groups * columns * depth, input_elements=rows * depth,
        output_elements=rows * columns, kept_elements=kept, input_gradient_flops=flops, weight_gradient_flops=flops,
    )  # fmt: skip


def elementwise(
    name: str,
    *,
    inputs: int,
    outputs: int,
    flops: int = 0,
    weights: int = 0,
    kept: int = 0,
    kept_accumulator: int = 0,
    recompute: bool = False,
    precision: Precision = "activation",
) -> Operator:
    """A kernel bound by memory; its backward pass does twice the forward FLOP (read the gradient and the input)."""
    return Operator(
        name=name, kind="elementwise", flops=flops, weight_elements=weights, input_elements=inputs,
        output_elements=outputs, kept_elements=kept, kept_accumulator_elements=kept_accumulator, recompute=recompute,
        precision=precision, input_gradient_flops=2 * flops,
    )  # fmt: skip


def norm(name: str, elements: int, *, width: int, kept: bool = True) -> Operator:
    """A layer norm or RMS norm: about 4 FLOP an element; its output is cheap to make again."""
    return elementwise(
        name, inputs=elements, outputs=elements, flops=4 * elements, weights=width,
        kept=elements if kept else 0, recompute=kept,
    )  # fmt: skip


def residual(name: str, elements: int) -> Operator:
    """The addition to the residual stream; its output is what the next block starts from."""
    return elementwise(name, inputs=2 * elements, outputs=elements, flops=elements, kept=elements)


def attention(name: str, *, flops: int, queries: int, keys: int, outputs: int, rows: int) -> Operator:
    """Fused attention: keeps its output and one fp32 log-sum-exp per row (a query of a head).

    The backward pass is five products of the forward's two: 2.5 times the FLOP, all towards the inputs.
    Reference: Dao, "FlashAttention-2" (2023), section 3.1 (the scores are computed again) and 4.1 (the factor 2.5).
    """
    return Operator(
        name=name, kind="attention", flops=flops, rows=rows, depth=(queries + outputs) // (2 * rows) if rows else 0,
        input_elements=queries + keys, output_elements=outputs,
        kept_elements=outputs, kept_accumulator_elements=rows, input_gradient_flops=5 * flops // 2,
    )  # fmt: skip


def scan(name: str, *, flops: int, inputs: int, outputs: int) -> Operator:
    """A chunked linear recurrence. Backward: two gradients per product and the states once more, 3 times the FLOP."""
    return Operator(
        name=name, kind="scan", flops=flops, input_elements=inputs, output_elements=outputs,
        kept_elements=outputs, input_gradient_flops=3 * flops,
    )  # fmt: skip


def split(count: int, tp: int, what: str) -> int:
    """`count / tp`, which must be whole. Raises PlanError with the degrees that would do."""
    if tp < 1 or count % tp:
        fits = ", ".join(str(n) for n in range(1, min(count, 64) + 1) if count % n == 0)
        raise PlanError(f"tp {tp} does not divide {what} {count}; use one of {fits}")
    return count // tp


def share(tokens: int, tp: int) -> int:
    """Tokens of one rank under sequence parallelism, rounded up."""
    return -(-tokens // tp)


def pairs(sequence: int, context: int, *, limit: int | None = None, causal: bool = True) -> int:
    """(query, key) pairs of a sequence whose last query is the last key: sum over queries of min(keys seen, limit).

    Causal query i of 0..s-1 sees context - s + i + 1 keys: without a limit s * context - s (s - 1) / 2. A limit is a
    sliding window (a query and the keys before it) or the top-k of a sparse index; a query that is not causal sees
    min(context, limit).
    """
    if not causal:
        return sequence * (context if limit is None else min(context, limit))
    first = context - sequence + 1
    if limit is None or limit >= context:
        return sequence * (first + context) // 2
    growing = max(0, min(sequence, limit - first))
    return growing * (2 * first + growing - 1) // 2 + (sequence - growing) * limit


def chunked_pairs(sequence: int, context: int, chunk: int) -> int:
    """Causal pairs when a query sees only its own chunk of positions: sum over positions p of (p mod chunk) + 1."""

    def up_to(positions: int) -> int:
        whole, rest = divmod(positions, chunk)
        return whole * (chunk * (chunk + 1) // 2) + rest * (rest + 1) // 2

    return up_to(context) - up_to(context - sequence)


def strided_pairs(sequence: int, context: int, *, stride: int, limit: int | None = None) -> int:
    """Causal pairs where a key stands for `stride` tokens: sum over positions p of min((p + 1) // stride, limit)."""

    def up_to(positions: int) -> int:
        whole, rest = divmod(positions + 1, stride)
        if limit is not None and whole > limit:
            return stride * limit * (limit - 1) // 2 + limit * (positions + 1 - stride * limit)
        return stride * whole * (whole - 1) // 2 + whole * rest

    return up_to(context) - up_to(context - sequence)
