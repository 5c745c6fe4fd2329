"""DeepSeek-V4's attention: one key-value head, a window of exact tokens, and compressed tokens for older ones.

Reference: DeepSeek-AI, "DeepSeek-V4" (2026), section 2.3: compressed sparse attention (CSA) and heavily compressed
attention (HCA).
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from pydantic import model_validator

from moeplan.domain import operators as op
from moeplan.domain._frozen import Frozen
from moeplan.domain.mixers import Dim, Norm, framed, norm_parameters
from moeplan.domain.operators import Operator


class CompressedIndex(Frozen):
    """The indexer of CSA: it compresses its own narrow keys and chooses the `top_k` best compressed tokens."""

    num_heads: Dim
    head_dim: Dim
    top_k: Dim


class Compression(Frozen):
    """`stride` tokens become one, by a learned softmax per channel; `overlap`: blocks share tokens (twice as wide)."""

    stride: Dim
    overlap: bool = False
    index: CompressedIndex | None = None

    def parameters(self, hidden_size: int, width: int) -> int:
        """Key and gate projections, a bias per position, a norm."""
        wide = (2 if self.overlap else 1) * width
        return 2 * hidden_size * wide + self.stride * wide + width


class CompressedAttention(Frozen):
    """Queries by a low rank, one key head that is also the value, and an output in groups of low rank.

    Heads and output groups are divided by tensor parallelism; the low-rank query, the key head, compressor and
    indexer are whole. A compressed token stands in the cache for `stride` tokens.
    """

    kind: Literal["compressed_attention"] = "compressed_attention"
    hidden_size: Dim
    num_heads: Dim
    head_dim: Dim
    q_lora_rank: Dim
    output_groups: Dim
    output_rank: Dim
    window: Dim
    compression: Compression | None = None
    norm: Norm = "rms"
    post_norm: bool = False

    @model_validator(mode="after")
    def _check(self) -> CompressedAttention:
        if self.num_heads % self.output_groups:
            raise ValueError(
                f"output_groups {self.output_groups} does not divide num_heads {self.num_heads}; use a divisor"
            )
        return self

    def _parameters(self, heads: int, groups: int) -> int:
        query, output = self.q_lora_rank * heads * self.head_dim, heads * self.head_dim * self.output_rank
        return query + output + groups * self.output_rank * self.hidden_size + heads

    @property
    def _index_parameters(self) -> int:
        if self.compression is None or self.compression.index is None:
            return 0
        index, d = self.compression.index, self.hidden_size
        return (
            self.compression.parameters(d, index.head_dim) + (self.q_lora_rank * index.head_dim + d) * index.num_heads
        )

    @property
    def replicated_parameters(self) -> int:
        """The low-rank query, the key head, norms, compressor and indexer."""
        d, hd, rank = self.hidden_size, self.head_dim, self.q_lora_rank
        compressor = self.compression.parameters(d, hd) + self._index_parameters if self.compression else 0
        return d * (rank + hd) + rank + hd + compressor + norm_parameters(self.norm, d) * (1 + self.post_norm)

    @property
    def parameters(self) -> int:
        """All weights of the block, the sinks included."""
        return self._parameters(self.num_heads, self.output_groups) + self.replicated_parameters

    def parameters_per_rank(self, tp: int) -> int:
        """Weights of one rank."""
        heads, groups = op.split(self.num_heads, tp, "num_heads"), op.split(self.output_groups, tp, "output_groups")
        return self._parameters(heads, groups) + self.replicated_parameters

    def cache_elements_per_token(self, tp: int = 1) -> int:
        """Compressed keys and the indexer's, per token that leaves the window, rounded up; whole on each rank."""
        if self.compression is None:
            return 0
        index = self.compression.index.head_dim if self.compression.index else 0
        return -(-(self.head_dim + index) // self.compression.stride)

    def cache_elements_per_sequence(self, tp: int = 1) -> int:
        """The exact keys of the window."""
        return self.window * self.head_dim

    def cache_elements(self, *, context: int, tp: int = 1) -> int:
        """The window's keys and one compressed key (and index key) per whole stride of `context`."""
        exact = min(context, self.window) * self.head_dim
        if self.compression is None:
            return exact
        index = self.compression.index.head_dim if self.compression.index else 0
        return exact + context // self.compression.stride * (self.head_dim + index)

    def pairs(self, sequence: int, context: int) -> int:
        """(query, key) pairs of one sequence: those of the window and those with compressed tokens."""
        exact = op.pairs(sequence, context, limit=self.window)
        if self.compression is None:
            return exact
        limit = self.compression.index.top_k if self.compression.index else None
        return exact + op.strided_pairs(sequence, context, stride=self.compression.stride, limit=limit)

    def operators(self, *, tokens: int, sequence: int, context: int, tp: int = 1, cp: int = 1) -> tuple[Operator, ...]:
        """Norm, down, compression, index, query up, attention, grouped output, residual."""
        blocks = self._blocks(tokens=tokens, sequence=sequence, context=context, tp=tp, cp=cp)
        return framed(blocks, tokens=tokens, width=self.hidden_size, tp=tp, norm=self.norm, post_norm=self.post_norm)

    def _blocks(self, *, tokens: int, sequence: int, context: int, tp: int, cp: int) -> Iterator[Operator]:
        heads, groups = op.split(self.num_heads, tp, "num_heads"), op.split(self.output_groups, tp, "output_groups")
        local, down, query = op.share(tokens, tp), self.q_lora_rank + self.head_dim, heads * self.head_dim
        yield op.gemm("down", rows=local, columns=down, depth=self.hidden_size, kept=local * down)
        yield op.norm("latent_norm", local * down, width=down)
        keys = -(-tokens * cp // sequence) * (context // self.compression.stride if self.compression else 0)
        if self.compression:
            yield from self._compressor("", self.compression, local, self.head_dim)
        if self.compression and self.compression.index:
            yield from self._indexer(self.compression, local, sequence, context, keys)
        yield op.gemm(
            "query_up", rows=tokens, columns=query, depth=self.q_lora_rank, kept=tokens * query, recompute=True
        )
        pairs = tokens * self.pairs(sequence, context) // sequence
        read = (keys + -(-tokens * cp // sequence) * min(context, self.window + sequence - 1)) * self.head_dim
        yield op.attention(
            "attention",
            flops=4 * query * pairs,
            queries=tokens * query,
            keys=read,
            outputs=tokens * query,
            rows=tokens * heads,
        )
        inner = groups * self.output_rank
        yield op.gemm(
            "output_groups",
            rows=tokens,
            columns=self.output_rank,
            depth=query // groups,
            batch=groups,
            kept=tokens * inner,
        )
        yield op.gemm("output", rows=tokens, columns=self.hidden_size, depth=inner)

    def _compressor(self, name: str, compression: Compression, tokens: int, width: int) -> Iterator[Operator]:
        wide = (4 if compression.overlap else 2) * width
        yield op.gemm(f"{name}compressor", rows=tokens, columns=wide, depth=self.hidden_size, kept=tokens * wide)
        made = -(-tokens // compression.stride) * width
        weights = compression.stride * wide // 2 + width
        yield op.elementwise(
            f"{name}compress", inputs=tokens * wide, outputs=made, flops=4 * tokens * wide, weights=weights, kept=made
        )

    def _indexer(
        self, compression: Compression, tokens: int, sequence: int, context: int, keys: int
    ) -> Iterator[Operator]:
        index = compression.index
        assert index is not None
        width = index.num_heads * index.head_dim
        yield from self._compressor("index_", compression, tokens, index.head_dim)
        yield op.gemm(
            "index_query", rows=tokens, columns=width, depth=self.q_lora_rank, kept=tokens * width, recompute=True
        )
        yield op.gemm(
            "index_weights", rows=tokens, columns=index.num_heads, depth=self.hidden_size, kept=tokens * index.num_heads
        )
        pairs = tokens * op.strided_pairs(sequence, context, stride=compression.stride) // sequence
        flops = 2 * index.num_heads * (index.head_dim + 1) * pairs
        yield Operator(
            name="index_scores", kind="attention", flops=flops, input_elements=tokens * width + keys * index.head_dim,
            output_elements=tokens * index.top_k, precision="accumulator", input_gradient_flops=2 * flops,
        )  # fmt: skip
