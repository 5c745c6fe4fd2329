"""The least time of one layer's pass: its tasks in the order of `compiler/blocks.py`, on wires that nothing else uses.

All quantities are arrays over the plans that are bounded together. `span` is from when the layer's input is there to
when its output is; `lead` is the exchange before the first computation and `trail` the one behind the last, which a
neighbouring pass of the same stage may hide; `busy` is computation alone, `sent` what the expert stream does, `flow`
the part of it in which bytes are on the wires, and `idle` exchanges beside which the pass can compute nothing.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplan.cost.cost_model import Shares
from moeplan.domain.program import Floats

Flags = np.ndarray[tuple[int, ...], np.dtype[np.bool_]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Exchanges:
    """Seconds of the exchanges of a layer: tensor, context and expert-tensor gathers (each as long as its scatter)."""

    tensor: Floats
    tensor_flow: Floats
    """While its bytes are on the wires."""
    context: Floats
    context_flow: Floats
    expert_tensor: Floats
    expert_tensor_flow: Floats
    dispatch: Floats
    """One part of the tokens, until all places have theirs."""
    dispatch_hottest: Floats
    """Until the hottest place has its own."""
    combine: Floats
    dispatch_flow: Floats
    combine_flow: Floats
    """While the bytes of one part are on the wires."""
    dispatch_bytes: Floats
    combine_bytes: Floats
    """From one GPU, of one part."""
    early: Floats
    """How much sooner than the last place another one can be done with the exchanges before this layer."""
    is_certain: Flags
    """Whether all kernels take just what is said: routing is even and parts are equal."""
    is_even: bool
    shares: Shares


@dataclass(frozen=True, kw_only=True, slots=True)
class Chain:
    """What a bound needs of a pass through a layer or through a stage."""

    span: Floats
    lead: Floats
    trail: Floats
    busy: Floats
    sent: Floats
    flow: Floats
    idle: Floats

    def then(self, other: Chain) -> Chain:
        """This layer, then the other."""
        return Chain(
            span=self.span + other.span, lead=self.lead, trail=other.trail, busy=self.busy + other.busy,
            sent=self.sent + other.sent, flow=self.flow + other.flow, idle=self.idle + other.idle,
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
    idle = span - busy
    if not has_experts:
        return Chain(span=span, lead=lead, trail=x.tensor, busy=busy, sent=zero, flow=zero, idle=idle)
    span = span + cost["router"]
    routed, sent = _routed(cost, x, parts)
    span = span + routed + cost["merge"]
    busy = busy + cost["router"] + cost["shared"] + parts * cost["steady_experts"] + cost["merge"]
    flow = parts * (x.dispatch_flow + x.combine_flow)
    return Chain(span=span, lead=lead, trail=zero, busy=busy, sent=sent, flow=flow, idle=idle + _alone(cost, x))


def backward(
    cost: dict[str, Floats], x: Exchanges, *, has_mixer: bool, has_experts: bool, has_dense: bool, parts: int
) -> Chain:
    """The mirror image: merge, exchange, experts, exchange, router; or dense block; then mixer."""
    zero = np.zeros_like(x.tensor)
    span, busy, sent, flow, lead, idle = zero, zero, zero, zero, zero, zero
    if has_experts:
        routed, sent = _routed(cost, x, parts)
        flow = parts * (x.dispatch_flow + x.combine_flow)
        span = cost["merge"] + routed + cost["router"]
        busy = cost["merge"] + cost["router"] + cost["shared"] + parts * cost["steady_experts"]
        idle = _alone(cost, x)
    elif has_dense:
        span, busy, lead, idle = x.tensor + cost["dense"] + x.tensor, cost["dense"], x.tensor, 2 * x.tensor
    else:
        lead = x.tensor + x.context
    trail = x.tensor if has_dense else zero
    if has_mixer:
        span = span + x.tensor + x.context + cost["mixer"] + x.context + x.tensor
        busy, trail, idle = busy + cost["mixer"], x.context + x.tensor, idle + 2 * (x.tensor + x.context)
    return Chain(span=span, lead=lead, trail=trail, busy=busy, sent=sent, flow=flow, idle=idle)


def weights(cost: dict[str, Floats], *, parts: Floats) -> Floats:
    """Seconds of the weight gradients of a layer."""
    return sum((cost[name] for name in ("mixer", "router", "dense", "shared", "merge")), parts * cost["steady_experts"])


def _alone(cost: dict[str, Floats], x: Exchanges) -> Floats:
    """What moves before the first experts of a place and behind its last, where no shared branch is beside it.

    Of uneven routing this is the mean over places, of which dispatch and combine say nothing.
    """
    both_ways = np.where(x.is_certain, x.dispatch + x.combine, 0.0)
    return np.where(cost["shared"] > 0, 0.0, both_ways + 2 * x.expert_tensor)


def _routed(cost: dict[str, Floats], x: Exchanges, parts: int) -> tuple[Floats, Floats]:
    """From the router's end to when all is back: parts go out one by one, are worked on, and come back one by one.

    The hottest place may come here before the last one, from which the time counts, and begin its shared branch sooner.
    On the tensor stream a part's gather stands before the scatter of the part before it.
    """
    beside = np.where(cost["shared"] > 0, x.tensor + cost["shared"] + x.tensor, 0.0)
    free = np.where(cost["shared"] > 0, np.maximum(x.tensor + cost["shared"] - x.early, 0.0), 0.0)
    there = x.dispatch if x.is_even else x.dispatch_hottest
    ready, gathered = [], there + x.expert_tensor
    wire = gathered
    for part in range(1, parts + 1):
        free = np.maximum(free, gathered) + cost["experts"]
        if part < parts:
            wire = gathered = np.maximum(wire, (part + 1) * there) + x.expert_tensor
        wire = np.maximum(wire, free) + x.expert_tensor
        ready.append(wire)
    back = parts * x.dispatch
    for out in ready:
        back = np.maximum(back, out) + x.combine
    sent = parts * (x.dispatch + x.combine)
    if x.is_even:
        flow = parts * (x.dispatch_flow + x.combine_flow)
        # What moves before the first experts and behind the last slows nothing down, all else does.
        moving, share = np.maximum(flow, 2 * parts * x.expert_tensor_flow), x.shares.compute
        alone = there + 2 * x.expert_tensor + x.combine
        back = np.maximum(back, parts * cost["steady_experts"] + (1 - share) * moving + share * alone)
        back = np.maximum(back, beside_s(cost["shared"] + parts * cost["experts"], sent, flow, x.shares))
    return np.maximum(np.maximum(back, beside), free), sent


def beside_s(work: Floats, sent: Floats, flow: Floats, shares: Shares, idle: Floats | float = 0.0) -> Floats:
    """At least the seconds of kernels and of exchanges of one GPU that slow each other down.

    Kernels keep the share c of their speed beside an exchange, flows the share e of theirs beside kernels, and the
    rest of an exchange (latency, copies) takes as long as ever. With x seconds of flows and y of the rest beside
    kernels all takes work + sent - (c + e - 1) x - c y, where e x <= flow, y <= sent - flow, c (x + y) <= work.
    Holds where all that share a link compute at the same times, as under even routing. While it is surely `idle`, no
    more can move than alone, flows first, since these slow kernels down most.
    """
    sent, flow = np.maximum(sent - idle, 0.0), np.maximum(flow - idle, 0.0)
    rest = np.minimum(sent - flow, work / shares.compute)
    flows = np.minimum(flow / shares.exchange, work / shares.compute - rest)
    gained = max(shares.compute + shares.exchange - 1.0, 0.0)
    return np.asarray(idle + work + sent - gained * flows - shares.compute * rest)
