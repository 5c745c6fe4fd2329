"""The token mixers with softmax attention: what they weigh, keep in a cache, and do.

Every mixer holds its own norm and residual, and answers the same questions: `parameters`, `replicated_parameters`
(those that each tensor-parallel rank holds whole), `parameters_per_rank(tp)`, `cache_elements(context=, tp=)` and
`operators(...)`. In `operators`, `tokens` are the tokens of one tensor-parallel group on this context-parallel rank,
`sequence` is the query length of one whole sequence and `context` its key length, so `tokens / sequence` is how much
of a sequence is done here. Norms and residuals work on `tokens / tp` (sequence parallelism). Context parallelism
divides causal work evenly (zig-zag), while the keys of the whole context pass through each rank.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Literal

from pydantic import Field, model_validator

from moeplan.domain import operators as op
from moeplan.domain._frozen import Frozen
from moeplan.domain.operators import Operator

Dim = Annotated[int, Field(ge=1, le=2**24)]
Count = Annotated[int, Field(ge=0, le=2**24)]
Norm = Literal["rms", "layer", "none"]


def norm_parameters(kind: Norm, width: int) -> int:
    """RMS: a scale per channel; layer norm: a scale and a shift."""
    return {"rms": width, "layer": 2 * width, "none": 0}[kind]


def framed(
    blocks: Iterator[Operator], *, tokens: int, width: int, tp: int, norm: Norm, post_norm: bool
) -> tuple[Operator, ...]:
    """`blocks` between their norm before, their norm after and the residual addition."""
    elements, weights = op.share(tokens, tp) * width, norm_parameters(norm, width)
    before = [] if norm == "none" else [op.norm("norm", elements, width=weights)]
    after = [op.norm("post_norm", elements, width=weights, kept=False)] if post_norm else []
    return (*before, *blocks, *after, op.residual("residual", elements))


def kv_share(num_kv_heads: int, tp: int) -> int:
    """Key-value heads of one rank: each rank of a degree above their number holds a copy of one head."""
    return 1 if tp % num_kv_heads == 0 else op.split(num_kv_heads, tp, "num_kv_heads")


class Attention(Frozen):
    """Softmax attention by heads: multi-head, grouped-query or multi-query, with the oddities of today's models.

    `window`: each query sees so many keys, itself included. `chunk`: it sees only its own chunk of positions. `gate`:
    the output is multiplied by a sigmoid per head or per element. `qk_norm`: RMS norm of queries and keys, one scale
    for all heads ("head") or for the whole projection ("full"). `shared_key_value`: values are the keys, no weights
    of their own. `cross`: keys come from the encoder, and are computed unless `sequence` is 1 (decoding finds them in
    the cache).
    References: Vaswani et al. 2017; Shazeer 2019 (multi-query); Ainslie et al. 2023 (grouped-query); Xiao et al. 2023
    (sinks); Qiu et al. 2025 (gated attention).
    """

    kind: Literal["attention"] = "attention"
    hidden_size: Dim
    num_heads: Dim
    num_kv_heads: Dim
    head_dim: Dim
    v_head_dim: Dim | None = None
    qkv_bias: bool = False
    output_bias: bool = False
    qk_norm: Literal["none", "head", "full"] = "none"
    gate: Literal["none", "head", "element"] = "none"
    sinks: bool = False
    shared_key_value: bool = False
    rotary: bool = True
    window: Dim | None = None
    chunk: Dim | None = None
    causal: bool = True
    cross: bool = False
    relative_buckets: Count = 0
    norm: Norm = "rms"
    post_norm: bool = False

    @model_validator(mode="after")
    def _check(self) -> Attention:
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_kv_heads {self.num_kv_heads} does not divide num_heads {self.num_heads}; use a divisor"
            )
        if self.window and self.chunk:
            raise ValueError(f"window {self.window} and chunk {self.chunk} exclude each other; leave one out")
        return self

    @property
    def value_dim(self) -> int:
        """Width of one value head."""
        return self.v_head_dim or self.head_dim

    def _parameters(self, heads: int, kv_heads: int) -> int:
        q, k, v = heads * self.head_dim, kv_heads * self.head_dim, kv_heads * self.value_dim
        v = 0 if self.shared_key_value else v
        gate = {"none": 0, "head": heads, "element": heads * self.value_dim}[self.gate]
        qk_norm = q + k if self.qk_norm == "full" else 0
        bias = q + k + v + (gate if self.gate == "element" else 0) if self.qkv_bias else 0
        per_head = heads * (self.sinks + self.relative_buckets)
        return self.hidden_size * (q + k + v + gate + heads * self.value_dim) + bias + qk_norm + per_head

    @property
    def replicated_parameters(self) -> int:
        """Norms, the output's bias, and the scale of a norm that all heads share."""
        d = self.hidden_size
        shared = 2 * self.head_dim if self.qk_norm == "head" else 0
        return norm_parameters(self.norm, d) * (1 + self.post_norm) + shared + (d if self.output_bias else 0)

    @property
    def parameters(self) -> int:
        """Weights of queries, keys, values and output, biases, norms and the rest."""
        return self._parameters(self.num_heads, self.num_kv_heads) + self.replicated_parameters

    def parameters_per_rank(self, tp: int) -> int:
        """Weights of one rank: heads are divided by `tp`; keys and values too, down to one head."""
        heads, kv_heads = op.split(self.num_heads, tp, "num_heads"), kv_share(self.num_kv_heads, tp)
        return self._parameters(heads, kv_heads) + self.replicated_parameters

    def cache_elements_per_token(self, tp: int = 1) -> int:
        """Key and value of one token on one rank."""
        return kv_share(self.num_kv_heads, tp) * (self.head_dim + self.value_dim)

    def cache_elements_per_sequence(self, tp: int = 1) -> int:
        """No state beside the tokens."""
        return 0

    def cache_elements(self, *, context: int, tp: int = 1) -> int:
        """Keys and values of one sequence of `context` tokens; a window or chunk forgets the older ones."""
        return min(context, self.window or self.chunk or context) * self.cache_elements_per_token(tp)

    def pairs(self, sequence: int, context: int) -> int:
        """(query, key) pairs of one sequence."""
        if self.chunk:
            return op.chunked_pairs(sequence, context, self.chunk)
        return op.pairs(sequence, context, limit=self.window, causal=self.causal and not self.cross)

    def operators(self, *, tokens: int, sequence: int, context: int, tp: int = 1, cp: int = 1) -> tuple[Operator, ...]:
        """Norm, projections, attention (2 (head_dim + value_dim) FLOP per pair and head), output, residual."""
        blocks = self._blocks(tokens=tokens, sequence=sequence, context=context, tp=tp, cp=cp)
        return framed(blocks, tokens=tokens, width=self.hidden_size, tp=tp, norm=self.norm, post_norm=self.post_norm)

    def _blocks(self, *, tokens: int, sequence: int, context: int, tp: int, cp: int) -> Iterator[Operator]:
        heads, kv_heads = op.split(self.num_heads, tp, "num_heads"), kv_share(self.num_kv_heads, tp)
        q, k, out = heads * self.head_dim, kv_heads * self.head_dim, heads * self.value_dim
        yield from self._projections(tokens=tokens, sequence=sequence, context=context, heads=heads, kv_heads=kv_heads)
        if self.rotary or self.qk_norm != "none":
            kept = tokens * (q + k) if self.qk_norm != "none" else 0
            moved, flops = tokens * (q + k), 4 * tokens * (q + k)
            yield op.elementwise("query_key", inputs=moved, outputs=moved, flops=flops, kept=kept, recompute=kept > 0)
        flops = 2 * (self.head_dim + self.value_dim) * heads * (tokens * self.pairs(sequence, context)) // sequence
        seen = (
            context
            if self.cross or not self.causal
            else min(context, (self.window or self.chunk or context) + sequence - 1)
        )
        keys = -(-tokens * cp // sequence) * seen * (k + kv_heads * self.value_dim)
        yield op.attention(
            "attention", flops=flops, queries=tokens * q, keys=keys, outputs=tokens * out, rows=tokens * heads
        )
        if self.gate != "none":
            moved = tokens * (out if self.gate == "element" else heads)
            yield op.elementwise(
                "gate",
                inputs=tokens * out + moved,
                outputs=tokens * out,
                flops=5 * tokens * out,
                kept=tokens * out,
                recompute=True,
            )
        kept = op.share(tokens, tp) * self.hidden_size if self.post_norm else 0
        yield op.gemm("output", rows=tokens, columns=self.hidden_size, depth=out, kept=kept)

    def _projections(
        self, *, tokens: int, sequence: int, context: int, heads: int, kv_heads: int
    ) -> Iterator[Operator]:
        q, k, v = heads * self.head_dim, kv_heads * self.head_dim, kv_heads * self.value_dim
        v = 0 if self.shared_key_value else v
        gate = {"none": 0, "head": heads, "element": heads * self.value_dim}[self.gate]
        if not self.cross:
            yield op.gemm(
                "query_key_value",
                rows=tokens,
                columns=q + k + v + gate,
                depth=self.hidden_size,
                kept=tokens * (q + k + v + gate),
            )
            return
        yield op.gemm("query", rows=tokens, columns=q + gate, depth=self.hidden_size, kept=tokens * (q + gate))
        if sequence > 1:
            rows = tokens * context // sequence
            yield op.gemm("key_value", rows=rows, columns=k + v, depth=self.hidden_size, kept=rows * (k + v))


class Indexer(Frozen):
    """The lightning indexer of sparse attention: small heads score all keys, attention sees the `top_k` best.

    Reference: DeepSeek-AI, "DeepSeek-V3.2" (2025), section 2.1. Its weights are not divided by tensor parallelism.
    """

    num_heads: Dim
    head_dim: Dim
    top_k: Dim

    def parameters(self, hidden_size: int, q_rank: int) -> int:
        """Queries from the query's latent, one key per token with its layer norm, and a weight per head."""
        key = hidden_size * self.head_dim + 2 * self.head_dim
        return q_rank * self.num_heads * self.head_dim + key + hidden_size * self.num_heads

    def operators(self, *, tokens: int, pairs: int, keys: int, hidden_size: int, q_rank: int) -> Iterator[Operator]:
        """2 heads (head_dim + 1) FLOP per pair: scores and their weighted sum."""
        width = self.num_heads * self.head_dim
        yield op.gemm("index_query", rows=tokens, columns=width, depth=q_rank, kept=tokens * width, recompute=True)
        narrow = self.head_dim + self.num_heads
        yield op.gemm("index_key", rows=tokens, columns=narrow, depth=hidden_size, kept=tokens * narrow)
        flops = 2 * self.num_heads * (self.head_dim + 1) * pairs
        yield Operator(
            name="index_scores", kind="attention", flops=flops, input_elements=tokens * width + keys * self.head_dim,
            output_elements=tokens * self.top_k, precision="accumulator", input_gradient_flops=2 * flops,
        )  # fmt: skip


class LatentAttention(Frozen):
    """Multi-head latent attention: keys and values of all heads come from one latent vector, and only that is cached.

    The down-projections, their norms and the indexer are held whole by each tensor-parallel rank; heads are divided.
    A single query (decoding) or a sparse one works in the latent space ("absorbed"): keys of kv_rank + rope, values
    of kv_rank.
    Reference: DeepSeek-AI, "DeepSeek-V2" (2024), section 2.1, equations 9 to 19 and appendix C.
    """

    kind: Literal["latent_attention"] = "latent_attention"
    hidden_size: Dim
    num_heads: Dim
    q_lora_rank: Dim | None = None
    kv_lora_rank: Dim
    qk_nope_head_dim: Dim
    qk_rope_head_dim: Dim
    v_head_dim: Dim
    indexer: Indexer | None = None
    down_bias: bool = False
    output_bias: bool = False
    norm: Norm = "rms"
    post_norm: bool = False

    @model_validator(mode="after")
    def _check(self) -> LatentAttention:
        if self.indexer and self.q_lora_rank is None:
            raise ValueError(
                "indexer needs q_lora_rank, found none; the indexer's queries come from the query's latent"
            )
        return self

    @property
    def _key_dim(self) -> int:
        return self.qk_nope_head_dim + self.qk_rope_head_dim

    @property
    def _down(self) -> int:
        return (self.q_lora_rank or 0) + self.kv_lora_rank + self.qk_rope_head_dim

    def _parameters(self, heads: int) -> int:
        query = (self.q_lora_rank or self.hidden_size) * heads * self._key_dim
        key_value = self.kv_lora_rank * heads * (self.qk_nope_head_dim + self.v_head_dim)
        return query + key_value + heads * self.v_head_dim * self.hidden_size

    @property
    def replicated_parameters(self) -> int:
        """Down-projections with their norms and biases, the indexer, the block's norms."""
        d = self.hidden_size
        index = self.indexer.parameters(d, self.q_lora_rank or 0) if self.indexer else 0
        biases = (self._down if self.down_bias else 0) + (d if self.output_bias else 0)
        norms = norm_parameters(self.norm, d) * (1 + self.post_norm) + (self.q_lora_rank or 0) + self.kv_lora_rank
        return d * self._down + norms + index + biases

    @property
    def parameters(self) -> int:
        """Down- and up-projections, output, norms, indexer."""
        return self._parameters(self.num_heads) + self.replicated_parameters

    def parameters_per_rank(self, tp: int) -> int:
        """Weights of one rank: up-projections and output divided by heads, the rest whole."""
        return self._parameters(op.split(self.num_heads, tp, "num_heads")) + self.replicated_parameters

    def cache_elements_per_token(self, tp: int = 1) -> int:
        """The latent and the rotary key, whole on each rank; the indexer's key too."""
        return self.kv_lora_rank + self.qk_rope_head_dim + (self.indexer.head_dim if self.indexer else 0)

    def cache_elements_per_sequence(self, tp: int = 1) -> int:
        """No state beside the tokens."""
        return 0

    def cache_elements(self, *, context: int, tp: int = 1) -> int:
        """The cache of one sequence of `context` tokens."""
        return context * self.cache_elements_per_token(tp)

    def operators(self, *, tokens: int, sequence: int, context: int, tp: int = 1, cp: int = 1) -> tuple[Operator, ...]:
        """Norm, down, up, attention, output, residual; up-projections are cheap to do again, from the latents kept."""
        blocks = self._blocks(tokens=tokens, sequence=sequence, context=context, tp=tp, cp=cp)
        return framed(blocks, tokens=tokens, width=self.hidden_size, tp=tp, norm=self.norm, post_norm=self.post_norm)

    def _blocks(self, *, tokens: int, sequence: int, context: int, tp: int, cp: int) -> Iterator[Operator]:
        heads, local = op.split(self.num_heads, tp, "num_heads"), op.share(tokens, tp)
        keys = -(-tokens * cp // sequence) * context
        yield op.gemm("down", rows=local, columns=self._down, depth=self.hidden_size, kept=local * self._down)
        yield op.norm(
            "latent_norm", local * (self._down - self.qk_rope_head_dim), width=self._down - self.qk_rope_head_dim
        )
        if self.indexer:
            scored = local * op.pairs(sequence, context) // sequence
            yield from self.indexer.operators(
                tokens=local, pairs=scored, keys=keys, hidden_size=self.hidden_size, q_rank=self.q_lora_rank or 0
            )
        query = heads * self._key_dim
        yield op.gemm(
            "query_up",
            rows=tokens,
            columns=query,
            depth=self.q_lora_rank or self.hidden_size,
            kept=tokens * query,
            recompute=True,
        )
        pairs = tokens * op.pairs(sequence, context, limit=self.indexer.top_k if self.indexer else None) // sequence
        absorbed = self.indexer is not None or sequence == 1
        inner = self._absorbed if absorbed else self._expanded
        yield from inner(tokens=tokens, heads=heads, pairs=pairs, keys=keys)
        kept = local * self.hidden_size if self.post_norm else 0
        yield op.gemm("output", rows=tokens, columns=self.hidden_size, depth=heads * self.v_head_dim, kept=kept)

    def _expanded(self, *, tokens: int, heads: int, pairs: int, keys: int) -> Iterator[Operator]:
        key_value = heads * (self.qk_nope_head_dim + self.v_head_dim)
        yield op.gemm(
            "key_value_up",
            rows=tokens,
            columns=key_value,
            depth=self.kv_lora_rank,
            kept=tokens * key_value,
            recompute=True,
        )
        flops = 2 * (self._key_dim + self.v_head_dim) * heads * pairs
        out, read = tokens * heads * self.v_head_dim, keys * (key_value + self.qk_rope_head_dim)
        yield op.attention(
            "attention",
            flops=flops,
            queries=tokens * heads * self._key_dim,
            keys=read,
            outputs=out,
            rows=tokens * heads,
        )

    def _absorbed(self, *, tokens: int, heads: int, pairs: int, keys: int) -> Iterator[Operator]:
        rank, rope, nope = self.kv_lora_rank, self.qk_rope_head_dim, self.qk_nope_head_dim
        yield op.gemm(
            "query_absorb",
            rows=tokens,
            columns=rank,
            depth=nope,
            batch=heads,
            kept=tokens * heads * rank,
            recompute=True,
        )
        flops = 2 * (2 * rank + rope) * heads * pairs
        read = min(keys, pairs) * (rank + rope)
        out = tokens * heads * rank
        yield op.attention(
            "attention", flops=flops, queries=out + tokens * heads * rope, keys=read, outputs=out, rows=tokens * heads
        )
        yield op.gemm(
            "value_up",
            rows=tokens,
            columns=self.v_head_dim,
            depth=rank,
            batch=heads,
            kept=tokens * heads * self.v_head_dim,
        )
