"""The one-device model in plain PyTorch: no tape, no unit, no rank. Same data, same weights, same forced experts.

Axes: B sequences, S their length, N tokens of the batch, K choices of a token.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as nn

from moeplan.compiler.tokens import choices_of, token_numbers_T
from moeplan.domain.feed_forward import DenseFeedForward, Experts
from moeplan.domain.mixers import Attention, LatentAttention
from moeplan.domain.model import Model
from moeplan.domain.plan import Plan
from moeplan.domain.scenario import Scenario
from moeplan.executor.layers import initial_weight, model_parameters
from moeplan.executor.worker import batch_of
from moeplan.partition.ranks import ranks_of_stage


@dataclass(kw_only=True)
class Reference:
    """Losses of some steps, the first step's gradients by name, and the tokens that each expert kept, by layer."""

    losses: list[float]
    gradients: dict[str, Tensor]
    kept_E: list[np.ndarray]


def run_on_one_device(plan: Plan, scenario: Scenario, *, steps: int, seed: int = 0) -> Reference:
    """Some steps of training."""
    dtype = {"fp32": torch.float32, "bf16": torch.bfloat16}[plan.precision.weights]
    model = scenario.model
    master = {name: initial_weight(each, name, seed) for name, each in model_parameters(model).items()}
    adam = torch.optim.AdamW(list(master.values()), lr=1e-3, weight_decay=0.01)
    chosen = given_experts(plan, scenario)
    losses: list[float] = []
    first: dict[str, Tensor] = {}
    for step in range(steps):
        weights = {name: value.detach().to(dtype).requires_grad_() for name, value in master.items()}
        words, targets = batch_of(scenario, step, seed)
        loss = loss_of(model, weights, words.view(scenario.workload.global_batch, -1), targets, chosen)
        loss.backward()
        losses.append(loss.item())
        for name, value in master.items():
            gradient = weights[name].grad
            value.grad = torch.zeros_like(value) if gradient is None else gradient.to(value.dtype)
        if step == 0:
            first = {name: value.grad.clone() for name, value in master.items() if value.grad is not None}
        adam.step()
    kept_E = [
        np.bincount(kept_NK[kept_NK >= 0], minlength=experts.num_experts)
        for (_, kept_NK), experts in zip(
            chosen, [each.experts for each in model.all_layers if each.experts], strict=True
        )
        if experts
    ]
    return Reference(losses=losses, gradients=first, kept_E=kept_E)


def given_experts(plan: Plan, scenario: Scenario) -> list[tuple[np.ndarray, np.ndarray]]:
    """By layer, the experts of every token of the batch, and the same with -1 for what a capacity rule drops."""
    choices, tokens = choices_of(plan, scenario), scenario.workload.step_tokens
    if choices is None:
        return []
    found = [(np.full((tokens, k), -2), np.full((tokens, k), -2)) for k in choices.top_k]
    for position in range(len(ranks_of_stage(plan, 0))):
        for microbatch in range(plan.num_microbatches(scenario.workload.global_batch)):
            numbers = token_numbers_T(plan, scenario, position=position, microbatch=microbatch)
            for moe, (chosen_NK, kept_NK) in enumerate(found):
                chosen_NK[numbers], kept_NK[numbers] = choices.experts_TK(moe, microbatch, position)
    assert all((chosen_NK >= 0).all() for chosen_NK, _ in found), "every token has all its experts"
    return found


def loss_of(
    model: Model, w: dict[str, Tensor], words_BS: Tensor, targets_N: Tensor, chosen: list[tuple[np.ndarray, np.ndarray]]
) -> Tensor:
    """Mean cross entropy."""
    x = w["embedding"][words_BS]
    left = iter(chosen)
    for number, layer in enumerate(model.all_layers):
        prefix = f"layers.{number}."
        assert isinstance(layer.mixer, Attention | LatentAttention)
        attend = latent if isinstance(layer.mixer, LatentAttention) else grouped
        x = x + attend(layer.mixer, w, norm(x, w, f"{prefix}mixer.norm"), f"{prefix}mixer.")
        block, inner = layer.feed_forward, f"{prefix}feed_forward."
        if block is None:
            continue
        u = norm(x, w, f"{inner}norm")
        if isinstance(block, DenseFeedForward):
            x = x + mlp(u, w[f"{inner}up"], w[f"{inner}down"], gated=block.gated)
        else:
            x = x + moe(block, w, u.flatten(0, 1), inner, *next(left)).view_as(x)
    scores = nn.linear(norm(x, w, "final_norm"), w["head"]).float()
    return nn.cross_entropy(scores.flatten(0, 1), targets_N)


def norm(x: Tensor, w: dict[str, Tensor], name: str) -> Tensor:
    if name not in w:
        return x
    if len(w[name]) == 1:
        return x * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + 1e-6).to(x.dtype) * w[name][0]
    return nn.layer_norm(x, x.shape[-1:], w[name][0], w[name][1], 1e-6)


def rotary(x: Tensor) -> Tensor:
    """By complex numbers: the pair (i, i + half) turns by place / 10000 ** (i / half)."""
    half = x.shape[-1] // 2
    angle = torch.arange(x.shape[-2])[:, None] / 10_000 ** (torch.arange(half) / half)
    pair = torch.complex(x[..., :half].float(), x[..., half:].float()) * torch.polar(torch.ones_like(angle), angle)
    return torch.cat([pair.real, pair.imag], dim=-1).to(x.dtype)


def heads(x: Tensor, count: int) -> Tensor:
    return x.unflatten(-1, (count, -1)).transpose(1, 2)


def softmax_attention(
    q: Tensor, k: Tensor, v: Tensor, hidden: Tensor | None = None, sink_H: Tensor | None = None
) -> Tensor:
    scores = (q @ k.mT).float() * q.shape[-1] ** -0.5
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    scores = scores.masked_fill(later if hidden is None else later | hidden, -torch.inf)
    weight = scores.exp()
    total = weight.sum(-1, keepdim=True) + (0 if sink_H is None else sink_H[:, None, None].float().exp())
    return ((weight / total).to(v.dtype) @ v).transpose(1, 2).flatten(2)


def unseen(mixer: Attention, length: int) -> Tensor:
    """Keys that a window or chunk hides, query by query."""
    hidden = torch.zeros(length, length, dtype=torch.bool)
    for query in range(length):
        for key in range(query + 1):
            hidden[query, key] = bool(
                (mixer.window and query - key >= mixer.window)
                or (mixer.chunk and query // mixer.chunk != key // mixer.chunk)
            )
    return hidden


def grouped(mixer: Attention, w: dict[str, Tensor], x: Tensor, prefix: str) -> Tensor:
    sizes = (
        mixer.num_heads * mixer.head_dim,
        mixer.num_kv_heads * mixer.head_dim,
        mixer.num_kv_heads * mixer.value_dim,
    )
    q, k, v = nn.linear(x, w[f"{prefix}query_key_value"], w.get(f"{prefix}query_key_value_bias")).split(sizes, dim=-1)
    q, k, v = heads(q, mixer.num_heads), heads(k, mixer.num_kv_heads), heads(v, mixer.num_kv_heads)
    if mixer.qk_norm == "head":
        q, k = (
            nn.rms_norm(each, (mixer.head_dim,), w[f"{prefix}query_key_norm"][at], 1e-6)
            for at, each in enumerate((q, k))
        )
    if mixer.rotary:
        q, k = rotary(q), rotary(k)
    times = mixer.num_heads // mixer.num_kv_heads
    k, v = k.repeat_interleave(times, 1), v.repeat_interleave(times, 1)
    out = softmax_attention(q, k, v, unseen(mixer, x.shape[1]), w.get(f"{prefix}sinks"))
    return nn.linear(out, w[f"{prefix}output"])


def latent(mixer: LatentAttention, w: dict[str, Tensor], x: Tensor, prefix: str) -> Tensor:
    rank, rope, nope = mixer.q_lora_rank or 0, mixer.qk_rope_head_dim, mixer.qk_nope_head_dim
    q, c, turned = nn.linear(x, w[f"{prefix}down"]).split((rank, mixer.kv_lora_rank, rope), dim=-1)
    q = norm(q, w, f"{prefix}query_norm") if rank else x
    q = heads(nn.linear(q, w[f"{prefix}query_up"]), mixer.num_heads)
    kv = heads(nn.linear(norm(c, w, f"{prefix}latent_norm"), w[f"{prefix}key_value_up"]), mixer.num_heads)
    k = torch.cat([kv[..., :nope], rotary(heads(turned, 1)).expand(-1, mixer.num_heads, -1, -1)], dim=-1)
    q = torch.cat([q[..., :nope], rotary(q[..., nope:])], dim=-1)
    return nn.linear(softmax_attention(q, k, kv[..., nope:]), w[f"{prefix}output"])


def mlp(x: Tensor, up: Tensor, down: Tensor, *, gated: bool) -> Tensor:
    inner = nn.linear(x, up)
    if gated:
        gate, value = inner.chunk(2, dim=-1)
        return nn.linear(nn.silu(gate) * value, down)
    return nn.linear(nn.gelu(inner), down)


def moe(
    block: Experts, w: dict[str, Tensor], u: Tensor, prefix: str, chosen_NK: np.ndarray, kept_NK: np.ndarray
) -> Tensor:
    """Expert by expert, each on the tokens that keep it."""
    weight = nn.linear(u, w[f"{prefix}router"]).float().softmax(-1).to(u.dtype)
    out = torch.zeros_like(u)
    for expert in range(block.num_experts):
        tokens = torch.from_numpy(np.flatnonzero((kept_NK == expert).any(axis=1)))
        y = mlp(u[tokens], w[f"{prefix}experts.{expert}.up"], w[f"{prefix}experts.{expert}.down"], gated=block.gated)
        out = out.index_add(0, tokens, y * weight[tokens, expert, None])
    if block.shared:
        out = out + mlp(u, w[f"{prefix}shared.up"], w[f"{prefix}shared.down"], gated=block.shared.gated)
    assert ((kept_NK == chosen_NK) | (kept_NK == -1)).all()
    return out
