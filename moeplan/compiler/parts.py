"""The works and exchanges that a plan is made of, each named once: what blocks are built from.

A *part* is a stage, and under uneven routing also a place in the expert-parallel group: ranks of one part get the
same works.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np

from moeplan import menu
from moeplan.compiler.works import optimizer_work, work
from moeplan.domain.feed_forward import DenseFeedForward, Experts
from moeplan.domain.model import Layer, Model
from moeplan.domain.operators import Operator
from moeplan.domain.plan import DTYPE_BYTES, Plan
from moeplan.domain.program import Exchange, Floats, Ints, Pass, Work
from moeplan.domain.workload import Workload
from moeplan.partition.ranks import coordinate, groups, ranks_of_stage
from moeplan.partition.route import Load, Tokens, node_blocks
from moeplan.partition.slots import ring_GG
from moeplan.partition.stages import VirtualStage
from moeplan.partition.weights import Weights

Place = int
"""A rank's coordinate in its expert-parallel group."""


@dataclass
class Parts:
    """Works and exchanges by name; asking for the same one again gives the same number."""

    model: Model
    plan: Plan
    workload: Workload
    load: Load | None
    gpus_per_node: int = 1
    """Of the cluster: what goes to several members of a node goes there once, if the all-to-all can do that."""
    works: list[Work] = field(default_factory=list)
    exchanges: list[Exchange] = field(default_factory=list)
    _works: dict[tuple[object, ...], int] = field(default_factory=dict)
    _exchanges: dict[tuple[object, ...], int] = field(default_factory=dict)

    @cached_property
    def tokens(self) -> Tokens:
        """Of one micro-batch."""
        return Tokens.of(self.plan, self.workload)

    @cached_property
    def element_bytes(self) -> float:
        """Of an activation."""
        return DTYPE_BYTES[self.plan.precision.activations]

    # ---- works

    def _work(
        self, key: tuple[object, ...], kind: str, passes: Pass, operators: Callable[[], tuple[Operator, ...]]
    ) -> int:
        full = (*key, passes)
        if full not in self._works:
            again = self.plan.recompute == "selective"
            self.works.append(work(kind, operators(), passes, precision=self.plan.precision, again=again))
            self._works[full] = len(self.works) - 1
        return self._works[full]

    def work_key(self, unit: int) -> tuple[object, ...]:
        """What a work was asked for as: its name first, its pass last."""
        return next(key for key, number in self._works.items() if number == unit)

    def mixer(self, layer: Layer, passes: Pass, *, routed: bool) -> int:
        """Attention (and cross-attention); with the router behind it where nothing has to be exchanged between them."""

        def operators() -> tuple[Operator, ...]:
            found = layer.hyper_operators(tokens=self.tokens.group, tp=self.plan.tp)
            for block in layer.blocks:
                found += block.operators(
                    tokens=self.tokens.group, sequence=self.tokens.sequence, context=self.tokens.context,
                    tp=self.plan.tp, cp=self.plan.cp,
                )  # fmt: skip
            return found + (self._router(layer) if routed else ())

        return self._work(("mixer", id(layer), routed), "attention", passes, operators)

    def router(self, layer: Layer, passes: Pass) -> int:
        """The router alone."""
        return self._work(("router", id(layer)), "router", passes, lambda: self._router(layer))

    def _router(self, layer: Layer) -> tuple[Operator, ...]:
        assert layer.experts is not None
        hyper = layer.hyper_operators(tokens=self.tokens.group, tp=self.plan.tp)
        return hyper + layer.experts.router_operators(tokens=self.tokens.group, tp=self.plan.tp)

    def dense(self, layer: Layer, passes: Pass) -> int:
        """A dense feed-forward block."""
        block = layer.feed_forward
        assert isinstance(block, DenseFeedForward)
        hyper = layer.hyper_operators(tokens=self.tokens.group, tp=self.plan.tp)
        return self._work(
            ("dense", id(layer)), "dense", passes,
            lambda: hyper + block.operators(tokens=self.tokens.group, tp=self.plan.tp),
        )  # fmt: skip

    def shared(self, experts: Experts, passes: Pass) -> int | None:
        """The branches beside the routed experts, or None if there are none."""
        if experts.shared is None and experts.dense_branch is None:
            return None
        return self._work(
            ("shared", id(experts)), "shared", passes,
            lambda: experts.shared_operators(tokens=self.tokens.group, tp=self.plan.tp),
        )  # fmt: skip

    def merge(self, experts: Experts, passes: Pass) -> int:
        """The weighted sum of what the experts sent back."""
        return self._work(
            ("merge", id(experts)), "merge", passes,
            lambda: experts.combine_operators(tokens=self.tokens.group, tp=self.plan.tp),
        )  # fmt: skip

    def experts(self, experts: Experts, passes: Pass, *, moe: int, place: Place, part: int) -> int:
        """The experts of one rank on one of the `overlap_degree` parts of the tokens it gets."""
        assert self.load is not None
        rows = self.load.rows(moe, place, part=part, parts=self.plan.overlap_degree)
        key = ("experts", id(experts), rows)
        return self._work(
            key, "experts", passes, lambda: experts.expert_operators(tokens_per_expert=rows, etp=self.plan.etp)
        )

    def embedding(self, passes: Pass) -> int:
        """Token embedding."""
        return self._work(
            ("embedding",), "head", passes,
            lambda: self.model.embedding_operators(tokens=self.tokens.group, tp=self.plan.tp),
        )  # fmt: skip

    def head(self, passes: Pass) -> int:
        """Final norm, scores over the vocabulary and, in training, the loss. Serving scores each sequence's last
        token.
        """
        tokens = self.tokens.group if self.workload.is_training else self.plan.micro_batch
        return self._work(
            ("head",), "head", passes,
            lambda: self.model.head_operators(tokens=tokens, tp=self.plan.tp, training=self.workload.is_training),
        )  # fmt: skip

    def prediction(self, passes: Pass) -> int:
        """What joins the last state with the next embedding before the layers of a multi-token-prediction module."""
        mtp = self.model.mtp
        assert mtp is not None
        return self._work(
            ("mtp",), "head", passes,
            lambda: mtp.operators(tokens=self.tokens.group, hidden_size=self.model.hidden_size, tp=self.plan.tp),
        )  # fmt: skip

    def optimizer(self, parameters: float) -> int:
        """The update of `parameters` weights."""
        key = ("optimizer", parameters)
        if key not in self._works:
            self.works.append(optimizer_work(parameters, self.plan.precision))
            self._works[key] = len(self.works) - 1
        return self._works[key]

    # ---- exchanges

    def _exchange(
        self, key: tuple[object, ...], *, kind: str, operation: str, algorithm: str, members: Callable[[], Ints],
        size_bytes: float, share_GG: Floats | None = None, reach_GB: Floats | None = None,
    ) -> int:  # fmt: skip
        if key not in self._exchanges:
            exchange = Exchange(
                kind=kind, operation=operation, algorithm=algorithm, groups_NG=members(), size_bytes=size_bytes,
                share_GG=share_GG, reach_GB=reach_GB,
            )  # fmt: skip
            self.exchanges.append(exchange)
            self._exchanges[key] = len(self.exchanges) - 1
        return self._exchanges[key]

    def _members(self, stage: int, *axes: str) -> Ints:
        return ranks_of_stage(self.plan, stage)[groups(self.plan, axes)]

    def tensor(self, stage: int, operation: str) -> int:
        """The hidden states of one context-parallel rank's tokens, gathered from or scattered to its `tp` ranks."""
        size = self.tokens.group * self.model.hidden_size * self.element_bytes
        return self._exchange(
            ("tensor", stage, operation), kind="tensor", operation=operation, algorithm="ring",
            members=lambda: self._members(stage, "tp"), size_bytes=size,
        )  # fmt: skip

    def scores(self, stage: int) -> int:
        """What tensor ranks tell each other of their parts of the vocabulary: in training of each token the greatest
        score, the sum of exponentials and the target's score, in fp32; in serving the scores of each sequence's last
        token.

        Reference: Shoeybi et al., "Megatron-LM" (2019), section 3.
        """
        size = 3.0 * 4.0 * self.tokens.group * self.plan.tp
        if not self.workload.is_training:
            size = self.plan.micro_batch * self.model.vocab_size * self.element_bytes
        return self._exchange(
            ("scores", stage), kind="scores", operation="all_gather", algorithm="ring",
            members=lambda: self._members(stage, "tp"), size_bytes=size,
        )  # fmt: skip

    def tensor_gradients(self, stage: int, parameters: int) -> int | None:
        """The gradients of weights that each tensor rank holds whole, and has those of its own tokens or heads of; None
        where there are none. Also of those that ZeRO has divided all are summed, as Megatron-LM does
        (`finalize_model_grads`): which part of a rank's shard is of such weights differs from rank to rank.
        """
        if self.plan.tp == 1 or parameters == 0:
            return None
        size = parameters * DTYPE_BYTES[self.plan.precision.gradients]
        return self._exchange(
            ("tensor_gradients", stage, size), kind="tensor_gradients", operation="all_reduce", algorithm="ring",
            members=lambda: self._members(stage, "tp"), size_bytes=size,
        )  # fmt: skip

    def context(self, stage: int, layer: Layer, operation: str) -> int | None:
        """Keys and values of the whole sequence, gathered over `cp`; None for a mixer that keeps none."""
        per_token = sum(block.cache_elements_per_token(self.plan.tp) for block in layer.blocks)
        if self.plan.cp == 1 or per_token == 0 or self.workload.phase == "decode":
            return None
        size = per_token * self.tokens.batch * self.element_bytes
        return self._exchange(
            ("context", stage, per_token, operation), kind="context", operation=operation, algorithm="ring",
            members=lambda: self._members(stage, "cp"), size_bytes=size,
        )  # fmt: skip

    def routed(self, stage: int, experts: Experts, kind: str, *, moe: int) -> int | None:
        """Dispatch (token to expert) or combine (back) of one of the parts of the tokens; None if nothing has to
        move.
        """
        assert self.load is not None
        # Padded to the most of each layer, layers whose sources are all alike still differ from one another.
        which = float(self.load.tokens_SE_by_layer[moe][0, 0]) if self.load.is_even else moe
        key = (kind, stage, id(experts), which)
        if self.plan.ep == 1 or key in self._exchanges:
            return self._exchanges.get(key)
        dispatch = kind == "dispatch"
        precision = self.plan.precision.dispatch if dispatch else self.plan.precision.combine
        tokens, share_GG = self.load.traffic(moe)
        size = tokens * experts.expert_input * DTYPE_BYTES[precision] / self.plan.overlap_degree / self.plan.etp
        matrix = share_GG if dispatch or share_GG is None else np.ascontiguousarray(share_GG.T)
        groups_NG = self._members(stage, "ep")
        return self._exchange(
            key, kind=kind, operation="all_to_all", algorithm=self.plan.all_to_all, members=lambda: groups_NG,
            size_bytes=size, share_GG=matrix, reach_GB=self._reach(groups_NG, moe),
        )  # fmt: skip

    def _reach(self, groups_NG: Ints, moe: int) -> Floats | None:
        """What goes to each node once; None for an algorithm that does not count so, or groups that differ in nodes."""
        assert self.load is not None
        if not getattr(menu.module("collectives", self.plan.all_to_all), "COUNTS_COPIES", False):
            return None
        block_G = node_blocks(groups_NG, self.gpus_per_node)
        return None if block_G is None else self.load.reach(moe, block_G)

    def expert_tensor(
        self, stage: int, experts: Experts, operation: str, *, moe: int, place: Place, part: int
    ) -> int | None:
        """The tokens of one expert-parallel place, gathered over its `etp` ranks, or their sums scattered."""
        assert self.load is not None
        if self.plan.etp == 1:
            return None
        is_even = self.load.is_even
        rows = sum(self.load.rows(moe, place, part=part, parts=self.plan.overlap_degree))
        size = rows * experts.expert_input * self.element_bytes

        def members() -> Ints:
            positions = groups(self.plan, ("etp",))
            if not is_even:
                positions = positions[coordinate(self.plan, "ep")[positions[:, 0]] == place]
            return ranks_of_stage(self.plan, stage)[positions]

        where = -1 if is_even else place
        return self._exchange(
            ("expert_tensor", stage, where, rows, experts.expert_input, operation), kind="expert_tensor",
            operation=operation, algorithm="ring", members=members, size_bytes=size,
        )  # fmt: skip

    def sharding(self, stage: VirtualStage, weights: Weights, *, expert: bool, operation: str) -> int | None:
        """A layer's weights gathered (all_gather), or its gradients reduced, over the ranks that hold the same; None:
        nothing to do.
        """
        gathers, precision, holders = operation == "all_gather", self.plan.precision, stage.holders
        size_bytes = weights.count(expert=expert) * DTYPE_BYTES[precision.weights if gathers else precision.gradients]
        if self.replicas(holders, expert=expert) == 1 or size_bytes == 0:
            return None
        axes = ("edp",) if expert else ("cp", "dp")
        return self._exchange(
            ("sharding", holders, expert, operation, size_bytes), kind="parameters" if gathers else "gradients",
            operation=operation, algorithm="ring", size_bytes=size_bytes,
            members=lambda: np.concatenate([self._members(holder, *axes) for holder in holders], axis=1),
        )  # fmt: skip

    def same_experts(self, stage: int, holders: tuple[int, ...], experts: Experts, *, moe: int) -> int | None:
        """The gradients of experts that stand on several places of a group, summed; None where none do.

        With ZeRO each rank has its part of them left when the replicas of the group have been reduced.
        """
        placement, precision = self.plan.placement, self.plan.precision
        share_GG = None if placement is None else ring_GG(placement, moe, self.plan.ep)
        if share_GG is None:
            return None
        parts = self.replicas(holders, expert=True) if self.plan.zero_expert else 1
        size = experts.expert_parameters_per_rank(self.plan.etp) * DTYPE_BYTES[precision.gradients] / parts
        return self._exchange(
            ("same_experts", stage, moe, size), kind="gradients", operation="all_to_all", algorithm="linear",
            members=lambda: self._members(stage, "ep"), size_bytes=size, share_GG=share_GG,
        )  # fmt: skip

    def replicas(self, holders: tuple[int, ...], *, expert: bool) -> int:
        """Ranks that hold the same weights of a virtual stage."""
        return (self.plan.edp if expert else self.plan.cp * self.plan.dp) * len(holders)

    def send(self, source: int, target: int) -> int:
        """Hidden states (or their gradients) of each rank's own tokens to the same position of another stage."""
        streams = max(1, self.model.layers[0].hyper_streams)
        size = self.tokens.rank * self.model.hidden_size * streams * self.element_bytes
        return self._exchange(
            ("send", source, target), kind="send", operation="send", algorithm="", size_bytes=size,
            members=lambda: np.stack([ranks_of_stage(self.plan, source), ranks_of_stage(self.plan, target)], axis=1),
        )  # fmt: skip
