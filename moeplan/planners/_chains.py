"""The least time of one layer's pass: its tasks in the order of `compiler/blocks.py`, on wires that nothing else uses.

All quantities are arrays over the plans that are bounded together. `span` is from when the layer's input is there to
when its output is; `lead` is the exchange before the first computation and `trail` the one behind the last, which a
neighbouring pass of the same stage may hide; `busy` is computation alone, `sent` what the expert stream does.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplan.domain.program import Floats


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchanges:
    """Seconds of the exchanges of a layer: tensor, context and expert-tensor gathers (each as long as its scatter)."""

    tensor: Floats
    context: Floats
    expert_tensor: Floats
    dispatch: Floats
    """One part of the tokens, until all places have theirs."""
    dispatch_hottest: Floats
    """Until the hottest place has its own."""
    combine: Floats
    early: Floats
    """How much sooner than the last place another one can be done with the exchanges before this layer."""
    is_even: bool


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """What a bound needs of a pass through a layer or through a stage."""

    span: Floats
    lead: Floats
    trail: Floats
    busy: Floats
    sent: Floats

    def then(self, other: Chain) -> Chain:
        """This layer, then the other."""
        return Chain(
            span=self.span + other.span, lead=self.lead, trail=other.trail, busy=self.busy + other.busy,
            sent=self.sent + other.sent,
        )  # fmt: skip


def forward(
    cost: dict[str, Floats], x: Exchanges, *, has_mixer: bool, has_experts: bool, has_dense: bool, parts: int
) -> Chain:
    """Mixer; then dense block, or router, exchange, experts, exchange, merge. `cost` is by the names of
    `_prices.WORKS`.
    """
    zero = np.zeros_like(x.tensor)
    lead = x.tensor + x.context if has_mixer else x.tensor if has_dense else zero
    span = x.tensor + x.context + cost["mixer"] + x.tensor if has_mixer else zero
    busy = cost["mixer"] + cost["dense"]
    if has_dense:
        span = span + x.tensor + cost["dense"] + x.tensor
    if not has_experts:
        return Chain(span=span, lead=lead, trail=x.tensor, busy=busy, sent=zero)
    span = span + cost["router"]
    routed, sent = _routed(cost, x, parts)
    span = span + routed + cost["merge"]
    busy = busy + cost["router"] + cost["shared"] + parts * cost["steady_experts"] + cost["merge"]
    return Chain(span=span, lead=lead, trail=zero, busy=busy, sent=sent)


def backward(
    cost: dict[str, Floats], x: Exchanges, *, has_mixer: bool, has_experts: bool, has_dense: bool, parts: int
) -> Chain:
    """The mirror image: merge, exchange, experts, exchange, router; or dense block; then mixer."""
    zero = np.zeros_like(x.tensor)
    span, busy, sent, lead = zero, zero, zero, zero
    if has_experts:
        routed, sent = _routed(cost, x, parts)
        span = cost["merge"] + routed + cost["router"]
        busy = cost["merge"] + cost["router"] + cost["shared"] + parts * cost["steady_experts"]
    elif has_dense:
        span, busy, lead = x.tensor + cost["dense"] + x.tensor, cost["dense"], x.tensor
    else:
        lead = x.tensor + x.context
    trail = x.tensor if has_dense else zero
    if has_mixer:
        span = span + x.tensor + x.context + cost["mixer"] + x.context + x.tensor
        busy, trail = busy + cost["mixer"], x.context + x.tensor
    return Chain(span=span, lead=lead, trail=trail, busy=busy, sent=sent)


def weights(cost: dict[str, Floats], *, parts: Floats) -> Floats:
    """Seconds of the weight gradients of a layer."""
    return sum((cost[name] for name in ("mixer", "router", "dense", "shared", "merge")), parts * cost["steady_experts"])


def _routed(cost: dict[str, Floats], x: Exchanges, parts: int) -> tuple[Floats, Floats]:
    """From the router's end to when all is back: parts go out one by one, are worked on, and come back one by one.

    The hottest place may come here before the last one, from which the time counts, and begin its shared branch sooner.
    """
    beside = np.where(cost["shared"] > 0, x.tensor + cost["shared"] + x.tensor, 0.0)
    free = np.where(cost["shared"] > 0, np.maximum(x.tensor + cost["shared"] - x.early, 0.0), 0.0)
    ready = []
    for part in range(parts):
        there = (part + 1) * (x.dispatch if x.is_even else x.dispatch_hottest)
        free = np.maximum(free, there + x.expert_tensor) + cost["experts"]
        ready.append(free + x.expert_tensor)
    back = parts * x.dispatch
    for out in ready:
        back = np.maximum(back, out) + x.combine
    return np.maximum(np.maximum(back, beside), free), parts * (x.dispatch + x.combine)
