"""What the works of a program compute: a mixer, a router, experts, a dense block, the two ends of the model.

Each function is one stretch of forward pass between two exchanges. Its products by weights go through a `Tape`, which
puts their weight gradients aside: so the two halves of a backward pass can be run apart, as schedules ask.

Axes: T tokens, N rows at experts, D hidden size, B sequences, S their length here, H heads, K keys.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.nn import functional as nn

from moeplan.domain.feed_forward import Branch, DenseFeedForward, Experts
from moeplan.domain.mixers import Attention, LatentAttention, norm_parameters
from moeplan.domain.model import Layer, Model

_EPSILON = 1e-6
_ROTARY_BASE = 10_000.0


@dataclass(frozen=True, kw_only=True, slots=True)
class Parameter:
    """A weight of the one-device model. Tensor ranks share `axis`, each of the `pieces` along it by itself; None: all
    hold it whole.
    """

    name: str
    shape: tuple[int, ...]
    axis: int | None = None
    pieces: tuple[int, ...] = ()

    def part(self, whole: Tensor, ranks: int, rank: int) -> Tensor:
        """What one tensor rank holds."""
        if self.axis is None or ranks == 1:
            return whole
        pieces = whole.split(self.pieces or (whole.shape[self.axis],), dim=self.axis)
        return torch.cat([piece.chunk(ranks, dim=self.axis)[rank] for piece in pieces], dim=self.axis)

    def part_shape(self, ranks: int) -> tuple[int, ...]:
        """The shape of what one tensor rank holds."""
        return tuple(size // ranks if axis == self.axis else size for axis, size in enumerate(self.shape))


# ---- the weights of each block, in the order in which a rank holds them


def mixer_parameters(mixer: Attention | LatentAttention, prefix: str) -> list[Parameter]:
    """Norm, projections, output."""
    d, heads = mixer.hidden_size, mixer.num_heads
    if isinstance(mixer, LatentAttention):
        return _latent_parameters(mixer, prefix)
    q, k, v = heads * mixer.head_dim, mixer.num_kv_heads * mixer.head_dim, mixer.num_kv_heads * mixer.value_dim
    found = [
        *_norm(f"{prefix}norm", mixer.norm, d),
        Parameter(name=f"{prefix}query_key_value", shape=(q + k + v, d), axis=0, pieces=(q, k, v)),
    ]
    if mixer.qkv_bias:
        found += [Parameter(name=f"{prefix}query_key_value_bias", shape=(q + k + v,), axis=0, pieces=(q, k, v))]
    if mixer.sinks:
        found += [Parameter(name=f"{prefix}sinks", shape=(heads,), axis=0)]
    if mixer.qk_norm == "head":
        found += [Parameter(name=f"{prefix}query_key_norm", shape=(2, mixer.head_dim))]
    return [*found, Parameter(name=f"{prefix}output", shape=(d, heads * mixer.value_dim), axis=1)]


def _latent_parameters(mixer: LatentAttention, prefix: str) -> list[Parameter]:
    d, heads, rank = mixer.hidden_size, mixer.num_heads, mixer.q_lora_rank
    key, value = mixer.qk_nope_head_dim + mixer.qk_rope_head_dim, mixer.qk_nope_head_dim + mixer.v_head_dim
    down = (rank or 0) + mixer.kv_lora_rank + mixer.qk_rope_head_dim
    return [
        *_norm(f"{prefix}norm", mixer.norm, d),
        Parameter(name=f"{prefix}down", shape=(down, d)),
        *([Parameter(name=f"{prefix}query_norm", shape=(1, rank))] if rank else []),
        Parameter(name=f"{prefix}latent_norm", shape=(1, mixer.kv_lora_rank)),
        Parameter(name=f"{prefix}query_up", shape=(heads * key, rank or d), axis=0),
        Parameter(name=f"{prefix}key_value_up", shape=(heads * value, mixer.kv_lora_rank), axis=0),
        Parameter(name=f"{prefix}output", shape=(d, heads * mixer.v_head_dim), axis=1),
    ]


def _norm(name: str, kind: str, width: int) -> list[Parameter]:
    rows = norm_parameters(kind, width) // width  # type: ignore[arg-type]
    return [Parameter(name=name, shape=(rows, width))] if rows else []


def block_parameters(block: DenseFeedForward | Branch | Experts, d: int, prefix: str) -> list[Parameter]:
    """Up (and gate), down: of a dense block, a branch or one expert."""
    width, copies = block.width, 2 if block.gated else 1
    return [
        Parameter(name=f"{prefix}up", shape=(copies * width, d), axis=0, pieces=(width,) * copies),
        Parameter(name=f"{prefix}down", shape=(d, width), axis=1),
    ]


def layer_parameters(layer: Layer, prefix: str) -> list[Parameter]:
    """All but the routed experts."""
    found: list[Parameter] = []
    if isinstance(layer.mixer, Attention | LatentAttention):
        found += mixer_parameters(layer.mixer, f"{prefix}mixer.")
    block, inner = layer.feed_forward, f"{prefix}feed_forward."
    if block is None:
        return found
    found += _norm(f"{inner}norm", block.norm, block.hidden_size)
    if isinstance(block, DenseFeedForward):
        return found + block_parameters(block, block.hidden_size, inner)
    found += [Parameter(name=f"{inner}router", shape=(block.num_experts, block.hidden_size))]
    return found + (block_parameters(block.shared, block.hidden_size, f"{inner}shared.") if block.shared else [])


def end_parameters(model: Model, *, embedding: bool, head: bool) -> list[Parameter]:
    """Embedding, final norm and head, where a stage has them."""
    table = (model.vocab_size, model.hidden_size)
    found = [Parameter(name="embedding", shape=table, axis=0)] if embedding else []
    return found + (
        [*_norm("final_norm", model.norm, model.hidden_size), Parameter(name="head", shape=table, axis=0)]
        if head
        else []
    )


# ---- products by weights


class Weights(Protocol):
    """Where a tape finds weights and leaves their gradients."""

    def value(self, name: str) -> Tensor:
        """The weight as it is now."""

    def add_gradient(self, name: str, gradient: Tensor) -> None:
        """A micro-batch's part of the gradient."""


class Tape:
    """The weights of one stretch, and what is left to do for their gradients once those of its inputs are there."""

    def __init__(self, weights: Weights) -> None:
        self.weights = weights
        self.later: list[Callable[[], None]] = []
        self.leaves: list[tuple[str, Tensor]] = []

    def linear(self, x: Tensor, name: str) -> Tensor:
        """x W^T."""
        found: Tensor = _Linear.apply(x, self, name)  # type: ignore[no-untyped-call]
        return found

    def grouped(self, x_ND: Tensor, counts: Sequence[int], names: Sequence[str]) -> Tensor:
        """The rows of each expert by that expert's matrix."""
        found: Tensor = _Grouped.apply(x_ND, self, tuple(counts), tuple(names))  # type: ignore[no-untyped-call]
        return found

    def leaf(self, name: str) -> Tensor:
        """A small weight whose gradient comes with that of the inputs."""
        found = self.weights.value(name).detach().clone().requires_grad_(torch.is_grad_enabled())
        self.leaves.append((name, found))
        return found

    def finish(self) -> None:
        """Computes the weight gradients that were put aside."""
        while self.later:
            self.later.pop(0)()


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, tape: Tape, name: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.tape, ctx.name = tape, name
        return x @ tape.weights.value(name).mT

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (x,), tape, name = ctx.saved_tensors, ctx.tape, ctx.name
        rows, width = gradient.reshape(-1, gradient.shape[-1]), x.shape[-1]
        tape.later.append(lambda: tape.weights.add_gradient(name, rows.mT @ x.reshape(-1, width)))
        return gradient @ tape.weights.value(name), None, None


class _Grouped(torch.autograd.Function):
    """A loop over experts: on CPUs a grouped product is no faster, and it has no weight of its own for each expert."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, tape: Tape, counts: tuple[int, ...], names: tuple[str, ...]) -> Tensor:
        ctx.save_for_backward(x_ND)
        ctx.tape, ctx.counts, ctx.names = tape, counts, names
        parts = zip(x_ND.split(counts), names, strict=True)
        return torch.cat([x @ tape.weights.value(name).mT for x, name in parts])

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None, None]:
        (x_ND,), tape, names = ctx.saved_tensors, ctx.tape, ctx.names
        parts = list(zip(gradient.split(ctx.counts), x_ND.split(ctx.counts), names, strict=True))

        def weights() -> None:
            for rows, x, name in parts:
                if len(rows):
                    tape.weights.add_gradient(name, rows.mT @ x)

        tape.later.append(weights)
        return torch.cat([rows @ tape.weights.value(name) for rows, _, name in parts]), None, None, None


# ---- forward


@dataclass(frozen=True, kw_only=True, slots=True)
class Geometry:
    """The tokens of one micro-batch on a rank: so many sequences, the places of their tokens, and who shares heads."""

    batch: int
    place_S: Tensor
    tp: int
    place_K: Tensor | None = None
    """Of all keys where context-parallel ranks share sequences, in the order in which they come."""


def normed(tape: Tape, x: Tensor, kind: str, name: str) -> Tensor:
    """RMS norm or layer norm, with its weights."""
    if kind == "none":
        return x
    weight, width = tape.leaf(name), (x.shape[-1],)
    if kind == "rms":
        return nn.rms_norm(x, width, weight[0], _EPSILON)
    return nn.layer_norm(x, width, weight[0], weight[1], _EPSILON)


def rotated(x_BHSD: Tensor, place_S: Tensor) -> Tensor:
    """Rotary position embedding of whole heads. Reference: Su et al., "RoFormer" (2021), halves as in GPT-NeoX."""
    half = x_BHSD.shape[-1] // 2
    power = torch.arange(half, device=x_BHSD.device, dtype=torch.float32) / half
    angle = place_S[:, None].to(torch.float32) * _ROTARY_BASE**-power
    cos, sin = angle.cos().to(x_BHSD.dtype), angle.sin().to(x_BHSD.dtype)
    first, second = x_BHSD[..., :half], x_BHSD[..., half:]
    return torch.cat([first * cos - second * sin, second * cos + first * sin], dim=-1)


def projected(
    tape: Tape, mixer: Attention | LatentAttention, x_TD: Tensor, geometry: Geometry, *, prefix: str
) -> tuple[Tensor, Tensor]:
    """Queries (B, H, S, head), and what other ranks need of these tokens: keys and values, or their latent (T, ...)."""
    normal = normed(tape, x_TD, mixer.norm, f"{prefix}norm")
    if isinstance(mixer, LatentAttention):
        return _latent_projected(tape, mixer, normal, geometry, prefix=prefix)
    heads, kv_heads = mixer.num_heads // geometry.tp, mixer.num_kv_heads // geometry.tp
    whole = tape.linear(normal, f"{prefix}query_key_value")
    if mixer.qkv_bias:
        whole = whole + tape.leaf(f"{prefix}query_key_value_bias")
    q, k, v = whole.split((heads * mixer.head_dim, kv_heads * mixer.head_dim, kv_heads * mixer.value_dim), dim=-1)
    q, k = _by_head(q, geometry.batch, heads), _by_head(k, geometry.batch, kv_heads)
    if mixer.qk_norm == "head":
        weight = tape.leaf(f"{prefix}query_key_norm")
        q, k = (nn.rms_norm(each, (mixer.head_dim,), weight[at], _EPSILON) for at, each in enumerate((q, k)))
    if mixer.rotary:
        q, k = rotated(q, geometry.place_S), rotated(k, geometry.place_S)
    return q, torch.cat([_by_token(k), v], dim=-1)


def _latent_projected(
    tape: Tape, mixer: LatentAttention, normal: Tensor, geometry: Geometry, *, prefix: str
) -> tuple[Tensor, Tensor]:
    rank, heads = mixer.q_lora_rank or 0, mixer.num_heads // geometry.tp
    down = tape.linear(normal, f"{prefix}down")
    q, latent, rope = down.split((rank, mixer.kv_lora_rank, mixer.qk_rope_head_dim), dim=-1)
    q = normed(tape, q, "rms", f"{prefix}query_norm") if rank else normal
    q = _by_head(tape.linear(q, f"{prefix}query_up"), geometry.batch, heads)
    plain, turned = q.split((mixer.qk_nope_head_dim, mixer.qk_rope_head_dim), dim=-1)
    rope = _by_token(rotated(_by_head(rope, geometry.batch, 1), geometry.place_S))
    latent = normed(tape, latent, "rms", f"{prefix}latent_norm")
    return torch.cat([plain, rotated(turned, geometry.place_S)], dim=-1), torch.cat([latent, rope], dim=-1)


def attended(
    tape: Tape, mixer: Attention | LatentAttention, q: Tensor, shared_T: Tensor, geometry: Geometry, *, prefix: str
) -> Tensor:
    """Attention to all keys, and the output's projection: under tensor parallelism one part of a sum (T, D)."""
    if isinstance(mixer, LatentAttention):
        k, v = _latent_keys(tape, mixer, shared_T, geometry, prefix=prefix)
    else:
        kv_heads = mixer.num_kv_heads // geometry.tp
        keys, values = shared_T.split((kv_heads * mixer.head_dim, kv_heads * mixer.value_dim), dim=-1)
        k, v = _by_head(keys, geometry.batch, kv_heads), _by_head(values, geometry.batch, kv_heads)
    grouped, mask = q.shape[1] != k.shape[1], _seen_SK(mixer, geometry)
    if mask is not None and isinstance(mixer, Attention) and mixer.sinks:
        k, v, mask = _with_sinks(tape.leaf(f"{prefix}sinks"), k, v, mask)
    out = nn.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=grouped)
    return tape.linear(_by_token(out), f"{prefix}output")


def _seen_SK(mixer: Attention | LatentAttention, geometry: Geometry) -> Tensor | None:
    """Which keys each query sees; None: itself and all that come before, in order, and no sink."""
    plain = isinstance(mixer, LatentAttention) or not (mixer.window or mixer.chunk or mixer.sinks)
    if geometry.place_K is None and plain:
        return None
    place_S, place_K = geometry.place_S[:, None], geometry.place_S if geometry.place_K is None else geometry.place_K
    seen_SK = place_S >= place_K
    if isinstance(mixer, Attention) and mixer.window:
        seen_SK &= place_S - place_K < mixer.window
    if isinstance(mixer, Attention) and mixer.chunk:
        seen_SK &= place_S // mixer.chunk == place_K // mixer.chunk
    return seen_SK


def _with_sinks(sink_H: Tensor, k: Tensor, v: Tensor, seen_SK: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """One key more, of zeros, whose score is the head's sink, and whose value is nothing (gpt-oss, 2025)."""
    closed_SK = torch.zeros_like(seen_SK, dtype=k.dtype).masked_fill(~seen_SK, -torch.inf)
    of_heads = (closed_SK.expand(len(sink_H), -1, -1), sink_H[:, None, None].expand(-1, len(closed_SK), 1))
    k, v = (torch.cat([each, torch.zeros_like(each[:, :, :1])], dim=2) for each in (k, v))
    return k, v, torch.cat(of_heads, dim=2)[None]


def _latent_keys(
    tape: Tape, mixer: LatentAttention, shared_T: Tensor, geometry: Geometry, *, prefix: str
) -> tuple[Tensor, Tensor]:
    heads = mixer.num_heads // geometry.tp
    latent, rope = shared_T.split((mixer.kv_lora_rank, mixer.qk_rope_head_dim), dim=-1)
    up = _by_head(tape.linear(latent, f"{prefix}key_value_up"), geometry.batch, heads)
    plain, v = up.split((mixer.qk_nope_head_dim, mixer.v_head_dim), dim=-1)
    turned = _by_head(rope, geometry.batch, 1).expand(-1, heads, -1, -1)
    return torch.cat([plain, turned], dim=-1), v


def _by_head(x_T: Tensor, batch: int, heads: int) -> Tensor:
    return x_T.reshape(batch, x_T.shape[0] // batch, heads, -1).transpose(1, 2)


def _by_token(x_BHSD: Tensor) -> Tensor:
    batch, _, length, _ = x_BHSD.shape
    return x_BHSD.transpose(1, 2).reshape(batch * length, -1)


def feed_forward(tape: Tape, x: Tensor, *, gated: bool, prefix: str) -> Tensor:
    """Up, activation, down: silu of a gate, or gelu without one."""
    return tape.linear(_activated(tape.linear(x, f"{prefix}up"), gated=gated), f"{prefix}down")


def expert_rows(tape: Tape, x_ND: Tensor, counts: Sequence[int], names: Sequence[str], *, gated: bool) -> Tensor:
    """The same by each row's own expert, rows in the order of experts."""
    up = tape.grouped(x_ND, counts, [f"{name}up" for name in names])
    return tape.grouped(_activated(up, gated=gated), counts, [f"{name}down" for name in names])


def _activated(up: Tensor, *, gated: bool) -> Tensor:
    if not gated:
        return nn.gelu(up)
    gate, value = up.chunk(2, dim=-1)
    return nn.silu(gate) * value


def routed(tape: Tape, x_TD: Tensor, experts: Experts, experts_TK: Tensor, *, prefix: str) -> tuple[Tensor, Tensor]:
    """The normed tokens, and the router's probability of each of their given experts, from scores in fp32."""
    normal = normed(tape, x_TD, experts.norm, f"{prefix}norm")
    scores = tape.linear(normal, f"{prefix}router").to(torch.float32)
    return normal, scores.softmax(dim=-1).gather(1, experts_TK).to(normal.dtype)


def merged(x_TD: Tensor, weight_TK: Tensor, rows_ND: Tensor, row_TK: Tensor) -> Tensor:
    """Each token with the weighted sum of its experts' rows; the row past the last one stands for a dropped choice."""
    nothing = rows_ND.new_zeros(1, rows_ND.shape[1])
    back_TKD = torch.cat([rows_ND, nothing])[row_TK]
    return x_TD + (weight_TK[..., None] * back_TKD).sum(dim=1)


def expert_prefix(layer: int, expert: int) -> str:
    """What the names of an expert's weights begin with in the one-device model."""
    return f"layers.{layer}.feed_forward.experts.{expert}."


def initial_weight(parameter: Parameter, name: str, seed: int) -> Tensor:
    """The same on every rank: normal numbers over the root of the row length; norms are near 1."""
    generator = torch.Generator().manual_seed(zlib.crc32(f"{seed}.{name}".encode()))
    drawn = torch.randn(parameter.shape, generator=generator)
    if name.endswith("norm"):
        scale = 1.0 + 0.1 * drawn
        return torch.cat([scale[:1], scale[1:] - 1.0]) if "query_key" not in name else scale
    scaled: Tensor = drawn * float(parameter.shape[-1]) ** -0.5
    return scaled


def model_parameters(model: Model) -> Mapping[str, Parameter]:
    """Every weight of the one-device model, by name."""
    found = {each.name: each for each in end_parameters(model, embedding=True, head=True)}
    for number, layer in enumerate(model.all_layers):
        found |= {each.name: each for each in layer_parameters(layer, f"layers.{number}.")}
        found |= _expert_parameters(number, layer)
    return found


def _expert_parameters(number: int, layer: Layer) -> dict[str, Parameter]:
    if layer.experts is None:
        return {}
    each = block_parameters(layer.experts, layer.hidden_size, "")
    prefixes = [expert_prefix(number, expert) for expert in range(layer.experts.num_experts)]
    return {prefix + parameter.name: parameter for prefix in prefixes for parameter in each}
