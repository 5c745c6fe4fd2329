"""The token mixers with a state instead of a cache: Mamba-2, Mamba-1, gated DeltaNet, and short convolutions.

They answer the same questions as those of `mixers`. `context` has no effect on their cost: that is what they are for.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import model_validator

from moeplan.domain import operators as op
from moeplan.domain._frozen import Frozen
from moeplan.domain.mixers import Dim, Norm, framed, kv_share, norm_parameters
from moeplan.domain.operators import Operator


def _convolution(tokens: int, channels: int, kernel: int) -> Operator:
    """A causal convolution per channel and its activation: cheap to do again."""
    flops, moved = 2 * tokens * channels * kernel, tokens * channels
    return op.elementwise(
        "convolution", inputs=moved, outputs=moved, flops=flops, weights=channels * kernel, kept=moved, recompute=True
    )


class StateSpace(Frozen):
    """Mamba-2: a scalar-decay state per head, computed in chunks.

    FLOP per token, chunk Q, state N, head width P: 2 Q N per group (C B^T), 2 Q P per head (times x), 4 N P per head
    (state in, state out).
    Reference: Dao and Gu, "Transformers are SSMs" (2024), section 6 (block decomposition) and 7 (the layer).
    """

    kind: Literal["state_space"] = "state_space"
    hidden_size: Dim
    num_heads: Dim
    head_dim: Dim
    state_size: Dim
    num_groups: Dim = 1
    conv_kernel: Dim = 4
    chunk: Dim = 256
    conv_bias: bool = True
    projection_bias: bool = False
    norm: Norm = "rms"
    post_norm: bool = False

    @model_validator(mode="after")
    def _check(self) -> StateSpace:
        if self.num_heads % self.num_groups:
            raise ValueError(f"num_groups {self.num_groups} does not divide num_heads {self.num_heads}; use a divisor")
        return self

    def _widths(self, heads: int, groups: int) -> tuple[int, int, int]:
        inner, state = heads * self.head_dim, 2 * groups * self.state_size
        return inner, inner + state, 2 * inner + state + heads

    def _parameters(self, heads: int, groups: int) -> int:
        inner, conv, projected = self._widths(heads, groups)
        biases = (conv if self.conv_bias else 0) + (projected if self.projection_bias else 0)
        return self.hidden_size * (projected + inner) + conv * self.conv_kernel + biases + 3 * heads + inner

    @property
    def replicated_parameters(self) -> int:
        """The block's norms and the output's bias."""
        d = self.hidden_size
        return norm_parameters(self.norm, d) * (1 + self.post_norm) + (d if self.projection_bias else 0)

    @property
    def parameters(self) -> int:
        """Projections in and out, convolution, gated norm, and A, D and the step's bias per head."""
        return self._parameters(self.num_heads, self.num_groups) + self.replicated_parameters

    def parameters_per_rank(self, tp: int) -> int:
        """Heads are divided by `tp`; groups too, down to one."""
        heads, groups = op.split(self.num_heads, tp, "num_heads"), kv_share(self.num_groups, tp)
        return self._parameters(heads, groups) + self.replicated_parameters

    def cache_elements_per_token(self, tp: int = 1) -> int:
        """Nothing grows with the sequence."""
        return 0

    def cache_elements_per_sequence(self, tp: int = 1) -> int:
        """The state of each head and the last inputs of the convolution."""
        heads, groups = op.split(self.num_heads, tp, "num_heads"), kv_share(self.num_groups, tp)
        return heads * self.head_dim * self.state_size + self._widths(heads, groups)[1] * (self.conv_kernel - 1)

    def cache_elements(self, *, context: int, tp: int = 1) -> int:
        """The state of one sequence, whatever its `context`."""
        return self.cache_elements_per_sequence(tp)

    def operators(self, *, tokens: int, sequence: int, context: int, tp: int = 1, cp: int = 1) -> tuple[Operator, ...]:
        """Norm, projection in, convolution, scan, gated norm, projection out, residual."""
        blocks = self._blocks(tokens=tokens, sequence=sequence, tp=tp)
        return framed(blocks, tokens=tokens, width=self.hidden_size, tp=tp, norm=self.norm, post_norm=self.post_norm)

    def _blocks(self, *, tokens: int, sequence: int, tp: int) -> Iterator[Operator]:
        heads, groups = op.split(self.num_heads, tp, "num_heads"), kv_share(self.num_groups, tp)
        inner, conv, projected = self._widths(heads, groups)
        yield op.gemm("projection_in", rows=tokens, columns=projected, depth=self.hidden_size, kept=tokens * projected)
        yield _convolution(tokens, conv, self.conv_kernel)
        yield op.scan(
            "scan",
            flops=tokens * self._scan_flops(sequence, heads, groups),
            inputs=tokens * (conv + heads),
            outputs=tokens * inner,
        )
        yield op.elementwise(
            "gated_norm", inputs=2 * tokens * inner, outputs=tokens * inner, flops=9 * tokens * inner, weights=inner,
            kept=tokens * inner, recompute=True,
        )  # fmt: skip
        yield op.gemm("projection_out", rows=tokens, columns=self.hidden_size, depth=inner)

    def _scan_flops(self, sequence: int, heads: int, groups: int) -> int:
        if sequence == 1:  # one step of the recurrence: h = a h + x B, y = C h
            return 5 * heads * self.head_dim * self.state_size
        chunk = min(self.chunk, sequence)
        within = 2 * chunk * (groups * self.state_size + heads * self.head_dim)
        return within + 4 * heads * self.state_size * self.head_dim


class SelectiveScan(Frozen):
    """Mamba-1: a state of `state_size` per channel with its own decay, scanned; with norms on step, B and C.

    FLOP per token and channel: about 9 per state element (decay, input, update, output).
    Reference: Gu and Dao, "Mamba" (2023), algorithm 2; Lieber et al., "Jamba" (2024), for the norms inside.
    """

    kind: Literal["selective_scan"] = "selective_scan"
    hidden_size: Dim
    inner_size: Dim
    state_size: Dim
    step_rank: Dim
    conv_kernel: Dim = 4
    conv_bias: bool = True
    projection_bias: bool = False
    inner_norms: bool = True
    norm: Norm = "rms"
    post_norm: bool = False

    def _parameters(self, inner: int) -> int:
        small = self.step_rank + 2 * self.state_size
        biases = (inner if self.conv_bias else 0) + (2 * inner if self.projection_bias else 0)
        recurrence = inner * (self.step_rank + 1) + inner * self.state_size + inner
        return 3 * self.hidden_size * inner + inner * self.conv_kernel + inner * small + recurrence + biases

    @property
    def replicated_parameters(self) -> int:
        """The block's norms, those on step, B and C, and the output's bias."""
        inside = self.step_rank + 2 * self.state_size if self.inner_norms else 0
        bias = self.hidden_size if self.projection_bias else 0
        return norm_parameters(self.norm, self.hidden_size) * (1 + self.post_norm) + inside + bias

    @property
    def parameters(self) -> int:
        """Projections, convolution, step, A and D."""
        return self._parameters(self.inner_size) + self.replicated_parameters

    def parameters_per_rank(self, tp: int) -> int:
        """Channels are divided by `tp`."""
        return self._parameters(op.split(self.inner_size, tp, "inner_size")) + self.replicated_parameters

    def cache_elements_per_token(self, tp: int = 1) -> int:
        """Nothing grows with the sequence."""
        return 0

    def cache_elements_per_sequence(self, tp: int = 1) -> int:
        """The state of each channel and the last inputs of the convolution."""
        return op.split(self.inner_size, tp, "inner_size") * (self.state_size + self.conv_kernel - 1)

    def cache_elements(self, *, context: int, tp: int = 1) -> int:
        """The state of one sequence, whatever its `context`."""
        return self.cache_elements_per_sequence(tp)

    def operators(self, *, tokens: int, sequence: int, context: int, tp: int = 1, cp: int = 1) -> tuple[Operator, ...]:
        """Norm, projection in, convolution, step, scan, projection out, residual."""
        blocks = self._blocks(tokens=tokens, inner=op.split(self.inner_size, tp, "inner_size"))
        return framed(blocks, tokens=tokens, width=self.hidden_size, tp=tp, norm=self.norm, post_norm=self.post_norm)

    def _blocks(self, *, tokens: int, inner: int) -> Iterator[Operator]:
        small = self.step_rank + 2 * self.state_size
        yield op.gemm("projection_in", rows=tokens, columns=2 * inner, depth=self.hidden_size, kept=2 * tokens * inner)
        yield _convolution(tokens, inner, self.conv_kernel)
        yield op.gemm("step_state", rows=tokens, columns=small, depth=inner, kept=tokens * small)
        yield op.gemm("step", rows=tokens, columns=inner, depth=self.step_rank, kept=tokens * inner, recompute=True)
        flops = 9 * tokens * inner * self.state_size
        yield op.scan("scan", flops=flops, inputs=tokens * (3 * inner + 2 * self.state_size), outputs=tokens * inner)
        yield op.gemm("projection_out", rows=tokens, columns=self.hidden_size, depth=inner)


class DeltaNet(Frozen):
    """Gated DeltaNet: a matrix state per value head, corrected by the delta rule and decayed by a gate, in chunks.

    FLOP per token and value head, chunk C, key and value width K, V: C (6 K + 4 V) + C^2 within the chunk (three K
    K^T-like products, the triangular solve, values), 6 K V with the state. Decoding: 7 K V.
    Reference: Yang et al., "Gated Delta Networks" (ICLR 2025), section 3.3, chunkwise form.
    """

    kind: Literal["delta_net"] = "delta_net"
    hidden_size: Dim
    num_key_heads: Dim
    num_value_heads: Dim
    key_head_dim: Dim
    value_head_dim: Dim
    conv_kernel: Dim = 4
    chunk: Dim = 64
    norm: Norm = "rms"
    post_norm: bool = False

    @model_validator(mode="after")
    def _check(self) -> DeltaNet:
        if self.num_value_heads % self.num_key_heads:
            raise ValueError(
                f"num_key_heads {self.num_key_heads} does not divide num_value_heads {self.num_value_heads}; change one"
            )
        return self

    def _heads(self, tp: int) -> tuple[int, int]:
        return op.split(self.num_key_heads, tp, "num_key_heads"), op.split(self.num_value_heads, tp, "num_value_heads")

    def _widths(self, key_heads: int, value_heads: int) -> tuple[int, int]:
        value = value_heads * self.value_head_dim
        return 2 * key_heads * self.key_head_dim + value, value

    def _parameters(self, key_heads: int, value_heads: int) -> int:
        conv, value = self._widths(key_heads, value_heads)
        return self.hidden_size * (conv + 2 * value + 2 * value_heads) + conv * self.conv_kernel + 2 * value_heads

    @property
    def replicated_parameters(self) -> int:
        """The block's norms and the output norm that all heads share."""
        return norm_parameters(self.norm, self.hidden_size) * (1 + self.post_norm) + self.value_head_dim

    @property
    def parameters(self) -> int:
        """Queries, keys, values, output gate, decay and step per head, convolution, output, norms."""
        return self._parameters(self.num_key_heads, self.num_value_heads) + self.replicated_parameters

    def parameters_per_rank(self, tp: int) -> int:
        """Heads are divided by `tp`."""
        return self._parameters(*self._heads(tp)) + self.replicated_parameters

    def cache_elements_per_token(self, tp: int = 1) -> int:
        """Nothing grows with the sequence."""
        return 0

    def cache_elements_per_sequence(self, tp: int = 1) -> int:
        """The matrix of each value head and the last inputs of the convolution."""
        key_heads, value_heads = self._heads(tp)
        state = value_heads * self.key_head_dim * self.value_head_dim
        return state + self._widths(key_heads, value_heads)[0] * (self.conv_kernel - 1)

    def cache_elements(self, *, context: int, tp: int = 1) -> int:
        """The state of one sequence, whatever its `context`."""
        return self.cache_elements_per_sequence(tp)

    def operators(self, *, tokens: int, sequence: int, context: int, tp: int = 1, cp: int = 1) -> tuple[Operator, ...]:
        """Norm, projection in, convolution, scan, gated norm, projection out, residual."""
        blocks = self._blocks(tokens=tokens, sequence=sequence, tp=tp)
        return framed(blocks, tokens=tokens, width=self.hidden_size, tp=tp, norm=self.norm, post_norm=self.post_norm)

    def _blocks(self, *, tokens: int, sequence: int, tp: int) -> Iterator[Operator]:
        key_heads, value_heads = self._heads(tp)
        conv, value = self._widths(key_heads, value_heads)
        columns = conv + value + 2 * value_heads
        yield op.gemm("projection_in", rows=tokens, columns=columns, depth=self.hidden_size, kept=tokens * columns)
        yield _convolution(tokens, conv, self.conv_kernel)
        flops = tokens * value_heads * self._scan_flops(sequence)
        yield op.scan("scan", flops=flops, inputs=tokens * (conv + 2 * value_heads), outputs=tokens * value)
        yield op.elementwise(
            "gated_norm", inputs=2 * tokens * value, outputs=tokens * value, flops=9 * tokens * value,
            weights=self.value_head_dim, kept=tokens * value, recompute=True,
        )  # fmt: skip
        yield op.gemm("projection_out", rows=tokens, columns=self.hidden_size, depth=value)

    def _scan_flops(self, sequence: int) -> int:
        k, v = self.key_head_dim, self.value_head_dim
        if sequence == 1:
            return 7 * k * v
        chunk = min(self.chunk, sequence)
        return chunk * (6 * k + 4 * v) + chunk * chunk + 6 * k * v


class ShortConvolution(Frozen):
    """A gated short convolution: three projections, one convolution per channel, two elementwise gates.

    Reference: Liquid AI, LFM2 model card (2025), "double-gated short-range convolution".
    """

    kind: Literal["short_convolution"] = "short_convolution"
    hidden_size: Dim
    conv_kernel: Dim = 3
    conv_bias: bool = False
    norm: Norm = "rms"
    post_norm: bool = False

    def _parameters(self, inner: int) -> int:
        biases = 4 * inner if self.conv_bias else 0
        return 4 * self.hidden_size * inner + inner * self.conv_kernel + biases

    @property
    def replicated_parameters(self) -> int:
        """The block's norms and the output's bias."""
        return norm_parameters(self.norm, self.hidden_size) * (1 + self.post_norm) + (
            self.hidden_size if self.conv_bias else 0
        )

    @property
    def parameters(self) -> int:
        """Projections in and out, and the convolution."""
        return self._parameters(self.hidden_size) + self.replicated_parameters

    def parameters_per_rank(self, tp: int) -> int:
        """Channels are divided by `tp`."""
        return self._parameters(op.split(self.hidden_size, tp, "hidden_size")) + self.replicated_parameters

    def cache_elements_per_token(self, tp: int = 1) -> int:
        """Nothing grows with the sequence."""
        return 0

    def cache_elements_per_sequence(self, tp: int = 1) -> int:
        """The last inputs of the convolution."""
        return op.split(self.hidden_size, tp, "hidden_size") * (self.conv_kernel - 1)

    def cache_elements(self, *, context: int, tp: int = 1) -> int:
        """The state of one sequence, whatever its `context`."""
        return self.cache_elements_per_sequence(tp)

    def operators(self, *, tokens: int, sequence: int, context: int, tp: int = 1, cp: int = 1) -> tuple[Operator, ...]:
        """Norm, projection in, gated convolution, projection out, residual."""
        inner = op.split(self.hidden_size, tp, "hidden_size")
        blocks = iter((
            op.gemm("projection_in", rows=tokens, columns=3 * inner, depth=self.hidden_size, kept=3 * tokens * inner),
            _convolution(tokens, inner, self.conv_kernel),
            op.gemm("projection_out", rows=tokens, columns=self.hidden_size, depth=inner),
        ))  # fmt: skip
        return framed(blocks, tokens=tokens, width=self.hidden_size, tp=tp, norm=self.norm, post_norm=self.post_norm)
