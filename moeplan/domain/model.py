"""The network that learns: the shape of a transformer, dense or with experts, with or without an encoder.

A model is read from a mapping (a file of `scenarios/models/`, or an importer's) in a compact form:

    hidden_size: 2048
    vocab_size: 32000
    parts:                                          # named, so that each is written once
      attention: {kind: attention, num_heads: 16, num_kv_heads: 16, head_dim: 128}
      dense:     {kind: dense, width: 8192}
      experts:   {kind: experts, num_experts: 64, top_k: 2, width: 2048}
    layers:
      - {mixer: attention, feed_forward: dense}
      - {repeat: 23, mixer: attention, feed_forward: experts}

A run may hold a pattern of layers, `{repeat: 12, layers: [...]}`; a part may also be written in place. Each part
inherits the model's
`hidden_size`. The model itself holds the layers written out, one after the other, equal layers being one object.

Counts are exact integers. Embedding and head count as parameters, active ones too, as most published counts have it;
modules that predict further tokens (MTP) and the router's balancing buffers do not, as in published counts.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from typing import Annotated, Any

from pydantic import Field, ValidationError, field_validator, model_validator

from moeplan.domain import operators as op
from moeplan.domain._compact import MAX_LAYERS, written_out
from moeplan.domain._frozen import Frozen
from moeplan.domain.compressed_attention import CompressedAttention
from moeplan.domain.feed_forward import Branch, DenseFeedForward, Experts
from moeplan.domain.mixers import Attention, Count, Dim, Indexer, LatentAttention, Norm, norm_parameters
from moeplan.domain.operators import Operator
from moeplan.domain.recurrent_mixers import DeltaNet, SelectiveScan, ShortConvolution, StateSpace
from moeplan.errors import CatalogueError

__all__ = [
    "Attention", "Branch", "CompressedAttention", "DeltaNet", "DenseFeedForward", "Experts", "Indexer",
    "LatentAttention",
    "Layer", "Model", "Operator", "Patches", "Prediction", "SelectiveScan", "ShortConvolution", "StateSpace",
    "from_mapping",
]  # fmt: skip

Mixer = Annotated[
    Attention | LatentAttention | CompressedAttention | StateSpace | SelectiveScan | DeltaNet | ShortConvolution,
    Field(discriminator="kind"),
]
FeedForward = Annotated[DenseFeedForward | Experts, Field(discriminator="kind")]
_ORIGIN = {"about", "sources", "dimensions", "published"}


class Layer(Frozen):
    """A token mixer, then a feed-forward block, each with its norm and residual; either may be absent.

    `cross_attention` stands between them in the decoder of an encoder-decoder model. `hyper_streams`: the residual is
    so many parallel streams, mixed before and after each half by weights computed from them (manifold-constrained
    hyper-connections; Xie et al. 2025).
    """

    mixer: Mixer | None = None
    cross_attention: Attention | None = None
    feed_forward: FeedForward | None = None
    hyper_streams: Count = 0

    @model_validator(mode="after")
    def _check(self) -> Layer:
        if self.mixer is None and self.feed_forward is None:
            raise ValueError("a layer has neither mixer nor feed_forward; give it one of them")
        return self

    @property
    def blocks(
        self,
    ) -> tuple[
        Attention | LatentAttention | CompressedAttention | StateSpace | SelectiveScan | DeltaNet | ShortConvolution,
        ...,
    ]:
        """The mixers that the layer has: its own, and the cross-attention."""
        return tuple(block for block in (self.mixer, self.cross_attention) if block is not None)

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        first = self.mixer or self.feed_forward
        assert first is not None
        return first.hidden_size

    @property
    def experts(self) -> Experts | None:
        """The routed experts, if there are any."""
        return self.feed_forward if isinstance(self.feed_forward, Experts) else None

    @property
    def is_moe(self) -> bool:
        """Whether tokens are routed here."""
        return self.experts is not None

    @property
    def hyper_parameters(self) -> int:
        """(2 + n) n (n d + 1) + 3 for n streams, for each half of the layer."""
        n = self.hyper_streams
        return 2 * ((2 + n) * n * (n * self.hidden_size + 1) + 3) if n else 0

    @cached_property
    def parameters(self) -> int:
        """All weights of the layer."""
        routed = self.experts.routed_parameters if self.experts else 0
        return self.dense_parameters_per_rank(1) + routed

    @property
    def routed_parameters(self) -> int:
        """Weights of its routed experts."""
        return self.experts.routed_parameters if self.experts else 0

    @property
    def active_parameters(self) -> int:
        """Weights that one token uses."""
        active = self.experts.active_routed_parameters if self.experts else 0
        return self.parameters - self.routed_parameters + active

    @property
    def replicated_parameters(self) -> int:
        """Weights that each tensor-parallel rank holds whole."""
        feed_forward = self.feed_forward.replicated_parameters if self.feed_forward else 0
        return sum(block.replicated_parameters for block in self.blocks) + feed_forward + self.hyper_parameters

    def dense_parameters_per_rank(self, tp: int) -> int:
        """Weights of one tensor-parallel rank, without routed experts."""
        feed_forward = self.feed_forward.dense_parameters_per_rank(tp) if self.feed_forward else 0
        return sum(block.parameters_per_rank(tp) for block in self.blocks) + feed_forward + self.hyper_parameters

    def hyper_operators(self, *, tokens: int, tp: int = 1) -> tuple[Operator, ...]:
        """The mixing of streams around half a layer: weights from all streams, one stream in, all streams out."""
        n, d, local = self.hyper_streams, self.hidden_size, op.share(tokens, tp)
        if n == 0:
            return ()
        streams, scores = local * n * d, (2 + n) * n
        mixed = op.elementwise(
            "hyper_mix",
            inputs=streams + local * d,
            outputs=streams + local * d,
            flops=2 * (n + 2) * streams,
            kept=streams,
        )
        return (op.gemm("hyper_weights", rows=local, columns=scores, depth=n * d, precision="accumulator"), mixed)

    def forward_flops(self, *, tokens: int, sequence: int, context: int) -> int:
        """FLOP of products, attention and scans for `tokens`, each at `top_k` experts: what model FLOP count."""
        found = [o for block in self.blocks for o in block.operators(tokens=tokens, sequence=sequence, context=context)]
        found += 2 * self.hyper_operators(tokens=tokens)
        if isinstance(self.feed_forward, DenseFeedForward):
            found += self.feed_forward.operators(tokens=tokens)
        if self.experts:
            rows = (
                tokens
                * self.experts.top_k
                * self.experts.num_experts
                // (self.experts.num_experts + self.experts.zero_experts)
            )
            found += self.experts.router_operators(tokens=tokens) + self.experts.shared_operators(tokens=tokens)
            found += self.experts.expert_operators(tokens_per_expert=(rows,)) + self.experts.combine_operators(
                tokens=tokens
            )
        return sum(o.flops for o in found if o.kind != "elementwise")


class Patches(Frozen):
    """Images as input: a square patch becomes a token by one projection, after a class token (Dosovitskiy 2020)."""

    size: Dim
    channels: Dim = 3
    class_token: bool = True

    def parameters(self, hidden_size: int) -> int:
        """Projection, its bias, and the class token."""
        return hidden_size * (self.channels * self.size * self.size + 1 + self.class_token)


class Prediction(Frozen):
    """Modules that predict further tokens (MTP): each joins the last state with the next embedding, then has layers.

    Embedding and head are the model's. Reference: DeepSeek-AI, "DeepSeek-V3" (2024), section 2.2, equations 21 to 23.
    """

    depth: Dim = 1
    layers: Annotated[tuple[Layer, ...], Field(strict=False, min_length=1, max_length=64)]

    def parameters(self, hidden_size: int, norm: Norm) -> int:
        """Per module: a projection of two states to one, norms of both and of the result, the layers."""
        joint = 2 * hidden_size * hidden_size + 3 * norm_parameters(norm, hidden_size)
        return self.depth * (joint + sum(layer.parameters for layer in self.layers))

    def operators(self, *, tokens: int, hidden_size: int, tp: int = 1) -> tuple[Operator, ...]:
        """What a module does before its layers: two norms and the projection, on the rank's own tokens."""
        local = op.share(tokens, tp)
        norms = tuple(
            op.norm(name, local * hidden_size, width=hidden_size) for name in ("mtp_state_norm", "mtp_token_norm")
        )
        kept = local * hidden_size
        return (*norms, op.gemm("mtp_projection", rows=local, columns=hidden_size, depth=2 * hidden_size, kept=kept))


class Model(Frozen):
    """The shape of a network; counts its parameters, and names the kernels at its two ends."""

    hidden_size: Dim
    vocab_size: Dim
    layers: Annotated[tuple[Layer, ...], Field(strict=False, min_length=1, max_length=MAX_LAYERS)]
    encoder_layers: Annotated[tuple[Layer, ...], Field(strict=False, max_length=MAX_LAYERS)] = ()
    mtp: Prediction | None = None
    max_position: Annotated[int, Field(ge=1, le=2**40)] | None = None
    learned_positions: Count = 0
    encoder_learned_positions: Count = 0
    patches: Patches | None = None
    embedding_norm: Norm = "none"
    norm: Norm = "rms"
    head: bool = True
    head_bias: bool = False
    tied_embeddings: bool = False

    @model_validator(mode="before")
    @classmethod
    def _write_out(cls, data: Any) -> Any:
        return written_out(data) if isinstance(data, Mapping) else data

    @field_validator("layers", "encoder_layers", mode="after")
    @classmethod
    def _share_equal(cls, layers: tuple[Layer, ...]) -> tuple[Layer, ...]:
        seen: dict[Layer, Layer] = {}
        return tuple(seen.setdefault(layer, layer) for layer in layers)

    @model_validator(mode="after")
    def _check(self) -> Model:
        for layer in {*self.all_layers, *(self.mtp.layers if self.mtp else ())}:
            for part in (*layer.blocks, layer.feed_forward):
                if part is not None and part.hidden_size != self.hidden_size:
                    raise ValueError(
                        f"{part.kind} has hidden_size {part.hidden_size}, the model {self.hidden_size}; leave it out"
                    )
        if any(layer.cross_attention for layer in self.layers) and not self.encoder_layers:
            raise ValueError(
                "a layer has cross_attention but the model no encoder_layers; add them, or leave cross_attention out"
            )
        if self.tied_embeddings and self.patches:
            raise ValueError(
                "tied_embeddings with patches: there is no embedding table to share; set tied_embeddings: false"
            )
        return self

    @property
    def all_layers(self) -> tuple[Layer, ...]:
        """The encoder's layers, then the decoder's: a model without an encoder has only `layers`."""
        return self.encoder_layers + self.layers

    @property
    def num_layers(self) -> int:
        """Layers of the decoder, that is all of them in a model without an encoder."""
        return len(self.layers)

    @cached_property
    def moe_layers(self) -> tuple[int, ...]:
        """Indices into `layers` of those with routed experts."""
        return tuple(i for i, layer in enumerate(self.layers) if layer.is_moe)

    @cached_property
    def total_parameters(self) -> int:
        """All weights, MTP modules and buffers left out."""
        return (
            self.embedding_parameters_per_rank(1)
            + self.head_parameters_per_rank(1)
            + sum(layer.parameters for layer in self.all_layers)
        )

    @cached_property
    def active_parameters(self) -> int:
        """Weights that one token uses: all but the experts it was not sent to. Embedding and head count whole."""
        return self.total_parameters - sum(layer.parameters - layer.active_parameters for layer in self.all_layers)

    @cached_property
    def routed_parameters(self) -> int:
        """Weights of the routed experts of all layers."""
        return sum(layer.routed_parameters for layer in self.all_layers)

    @cached_property
    def mtp_parameters(self) -> int:
        """Weights of the modules that predict further tokens."""
        return self.mtp.parameters(self.hidden_size, self.norm) if self.mtp else 0

    @property
    def embedding_replicated_parameters(self) -> int:
        """Of the embedding, what each tensor-parallel rank holds whole: positions, patches and norm."""
        positions = self.hidden_size * (self.learned_positions + self.encoder_learned_positions)
        patches = self.patches.parameters(self.hidden_size) if self.patches else 0
        return patches + positions + norm_parameters(self.embedding_norm, self.hidden_size)

    def embedding_parameters_per_rank(self, tp: int) -> int:
        """Token table, divided by rows and padded to whole rows, and what is held whole."""
        table = 0 if self.patches else op.share(self.vocab_size, tp) * self.hidden_size
        return table + self.embedding_replicated_parameters

    @property
    def head_replicated_parameters(self) -> int:
        """Final norms (one more for an encoder), and the mixing of hyper-connections."""
        n = self.layers[-1].hyper_streams
        mixing = n * (n * self.hidden_size + 1) + 1 if n else 0
        return norm_parameters(self.norm, self.hidden_size) * (2 if self.encoder_layers else 1) + mixing

    def head_parameters_per_rank(self, tp: int) -> int:
        """What is held whole, and a head that is not tied, divided by its rows."""
        rows = op.share(self.vocab_size, tp)
        weights = rows * self.hidden_size if self.head and not self.tied_embeddings else 0
        return self.head_replicated_parameters + weights + (rows if self.head and self.head_bias else 0)

    def embedding_operators(self, *, tokens: int, tp: int = 1) -> tuple[Operator, ...]:
        """Rows of the table (or patches by a projection), positions, norm: what the first layer starts from."""
        d, local = self.hidden_size, op.share(tokens, tp)
        if self.patches:
            inputs = self.patches.channels * self.patches.size**2
            first = op.gemm("patches", rows=local, columns=d, depth=inputs, kept=local * (d + inputs))
        else:
            # Of the words of all tensor ranks each writes those that it has, and nothing in place of the others.
            first = op.elementwise(
                "embedding", inputs=tokens, outputs=tokens * d, weights=tokens * d // tp, kept=local * d
            )
        positions = (op.elementwise("positions", inputs=2 * local * d, outputs=local * d, flops=local * d),)
        norm = (op.norm("embedding_norm", local * d, width=d),)
        return (first, *(positions if self.learned_positions else ()), *(norm if self.embedding_norm != "none" else ()))

    def head_operators(self, *, tokens: int, tp: int = 1, training: bool = True) -> tuple[Operator, ...]:
        """Final norm, scores over the vocabulary in fp32 and, in training, the loss, which keeps them as softmax.

        Reference: Korthikanti et al. 2022, section 4.3: 4 s b v bytes for the fp32 scores, divided by tensor
        parallelism.
        """
        elements, columns = op.share(tokens, tp) * self.hidden_size, op.share(self.vocab_size, tp)
        norm = (
            ()
            if self.norm == "none"
            else (op.norm("final_norm", elements, width=norm_parameters(self.norm, self.hidden_size)),)
        )
        if not self.head:
            return norm
        scores = tokens * columns
        logits = op.gemm("head", rows=tokens, columns=columns, depth=self.hidden_size, precision="accumulator")
        loss = op.elementwise(
            "loss", inputs=scores, outputs=tokens, flops=5 * scores, kept_accumulator=scores, precision="accumulator"
        )
        return (*norm, logits, *((loss,) if training else ()))

    def forward_flops(self, *, tokens: int, sequence: int, context: int | None = None) -> int:
        """Model FLOP of one forward pass over `tokens` in whole sequences; a training step is three times that.

        Counted: matrix products, attention (causal half where it is causal), scans; each token at `top_k` experts. An
        encoder sees as many tokens as the decoder. Reference: Narayanan et al. 2021, equation 3; Chowdhery et al.
        2022 (PaLM), appendix B.
        """
        keys = sequence if context is None else context
        layers = sum(
            layer.forward_flops(tokens=tokens, sequence=sequence, context=keys) * self.all_layers.count(layer)
            for layer in set(self.all_layers)
        )
        ends = self.embedding_operators(tokens=tokens) + self.head_operators(tokens=tokens, training=False)
        return layers + sum(o.flops for o in ends if o.kind != "elementwise")


def from_mapping(mapping: Mapping[str, Any], where: str = "model") -> Model:
    """The model that `mapping` (compact or written out) describes.

    What a file says about its origin (`about`, `sources`, `dimensions`, `published`) is no part of the shape and
    passed over. Raises CatalogueError with `where`, field, what was found and what is allowed.
    """
    try:
        return Model.model_validate({key: value for key, value in mapping.items() if key not in _ORIGIN})
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        field = "".join(f"{step}." for step in first["loc"])[:-1]
        message = first["msg"].removeprefix("Value error, ")
        found = "" if first["type"] in ("value_error", "missing") else f", found {str(first['input'])[:60]!r}"
        raise CatalogueError(f"{where}: {field + ': ' if field else ''}{message}{found}") from None
