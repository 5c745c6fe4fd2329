"""What bounds know of a branch: its passes, where its layers are, and the chains of its kinds of layer.

U rows of a branch, K kinds of layer, V virtual stages.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from moeplan.cost.cost_model import Shares
from moeplan.domain.program import Floats, Ints
from moeplan.planners._chains import Chain, Exchanges, beside_s

FORWARD, BACKWARD, INPUT_GRADIENT, WEIGHT_GRADIENT = range(4)


@dataclass(frozen=True, kw_only=True, slots=True)
class Passes:
    """Least seconds of the passes through each virtual stage, [V, U]: chains of F, B, I; W; and what a pair can
    hide.
    """

    forward: Floats
    backward: Floats
    input_gradient: Floats
    weight_gradient: Floats
    busy_forward: Floats
    busy_backward: Floats
    sent_forward: Floats
    sent_backward: Floats
    flow_forward: Floats
    flow_backward: Floats
    hop: Floats
    """[U]: from one pipeline rank to the next."""
    before_forward: Floats
    before_backward: Floats
    """Between the pass of the virtual stage before (behind) and this one, beside the hop: exchanges at their ends."""
    shares: Shares

    @property
    def any_backward(self) -> Floats:
        """A whole backward pass, split or not."""
        return np.minimum(self.backward, self.input_gradient + self.weight_gradient)

    def pair_s(self, forward: Ints, backward: Ints) -> Floats:
        """[P, U]: at least a slot of F of one virtual stage and B of another: each chain, and all computation beside
        all exchanges.
        """
        alone = np.maximum(self.forward[forward], self.backward[backward])
        busy = self.busy_forward[forward] + self.busy_backward[backward]
        sent = self.sent_forward[forward] + self.sent_backward[backward]
        flow = self.flow_forward[forward] + self.flow_backward[backward]
        return np.asarray(np.maximum(alone, beside_s(busy, sent, flow, self.shares)))


@dataclass(frozen=True, kw_only=True, slots=True)
class Shape:
    """Where the layers are: how many of each kind in each virtual stage, its first and last kind, and who does what."""

    counts_VK: Floats
    kinds_V: tuple[tuple[int, ...], ...]
    first_V: Ints
    last_V: Ints
    extra: tuple[int, ...]
    """Kinds of the layers of multi-token prediction."""
    virtual: tuple[tuple[int, ...], ...]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chains:
    """Of each kind of layer, stacked [K, U]: the chains of the passes, seconds of W, and [end, pass, U] of the
    model's ends.
    """

    by_pass: dict[str, Chain]
    weights: Floats
    ends: Floats
    costs: list[list[dict[str, Floats]]]
    """[kind][pass][work]: what the chains were made of."""
    exchanges: list[Exchanges]

    def seconds(self, kind: int, name: str, passes: int) -> Floats | None:
        """[U] of a work or an exchange of a kind of layer, or of an end of the model (kind -1); None: taken for
        nothing.
        """
        if name in ("embedding", "head", "mtp"):
            return np.asarray(self.ends[("embedding", "head", "mtp").index(name), passes])
        exchange = {"dispatch": "dispatch_hottest"}.get(name, name)
        if exchange in Exchanges.__dataclass_fields__:
            found: Floats = getattr(self.exchanges[kind], exchange)
            return found
        return self.costs[kind][passes].get(name)

    def flow_s(self, kind: int, name: str, passes: int) -> Floats | None:
        """[U] of them while an exchange has its bytes on the wires; None: of nothing else is it known."""
        return getattr(self.exchanges[kind], f"{name}_flow", None)


def at_ends(p: int, shape: Shape, chains: Chains) -> tuple[Floats, Floats]:
    """[V, U]: the exchanges before the first and behind the last computation of a pass, but for those of the model's
    ends.
    """
    chain = chains.by_pass[("forward", "backward", "input_gradient")[p]]
    start, end = (shape.first_V, shape.last_V) if p == FORWARD else (shape.last_V, shape.first_V)
    lead, trail = chain.lead[start], chain.trail[end]
    opens, closes = (0, -1) if p == FORWARD else (-1, 0)
    lead[opens] = 0.0
    if p != INPUT_GRADIENT:
        trail[closes] = 0.0
    return lead, trail


def between(shape: Shape, chains: Chains) -> tuple[Floats, Floats]:
    """[V, U]: the exchanges behind one pass and before the next of the same direction: forward and backward."""
    lead, trail = at_ends(FORWARD, shape, chains)
    back = [at_ends(p, shape, chains) for p in (BACKWARD, INPUT_GRADIENT)]
    forward, backward = np.zeros_like(lead), np.zeros_like(lead)
    forward[1:] = trail[:-1] + lead[1:]
    backward[:-1] = np.minimum(*(each[0] for each in back))[:-1] + np.minimum(*(each[1] for each in back))[1:]
    return forward, backward
