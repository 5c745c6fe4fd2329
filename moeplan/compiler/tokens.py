"""Which token goes to which expert, forced: every source sends every expert as many tokens as the program says.

A router that learns would send what it likes, and nothing predicted could be held against what ran. So the experts of
each token are given, in the counts of the scenario's routing, while the router's scores still weigh their outputs.
Counts that a router gives as expectations are rounded, each by less than one and such that each source sends all its
tokens; experts then get what the program rounds their loads to, or one row more or less.

Axes: S sources, E experts, C columns (slots where the plan has a placement, else experts), N rows that travel, T
tokens of one rank, K choices of a token, G places.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moeplan.domain.placement import EMPTY
from moeplan.domain.plan import Capacity, Plan
from moeplan.domain.program import Floats, Ints
from moeplan.domain.routing import Routing, apply_capacity
from moeplan.domain.scenario import Scenario
from moeplan.partition.ranks import coordinate
from moeplan.partition.route import Tokens, load_of
from moeplan.partition.slots import tokens_of_slots

NOBODY = -1
"""The token of a row of padding; the expert of a choice that was dropped."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Rows:
    """The rows of one layer that the sources of one expert-parallel group send, by source, column and number.

    Row n is choice `choice_N[n]` of token `token_N[n]` of its source, which is on the `owner_N[n]`-th of the ranks that
    are the source together, and travels in part `part_N[n]`.
    """

    num_places: int
    columns_per_place: int
    expert_C: Ints
    source_N: Ints
    column_N: Ints
    token_N: Ints
    choice_N: Ints
    owner_N: Ints
    part_N: Ints

    @property
    def place_N(self) -> Ints:
        """Where each row goes."""
        return self.column_N // self.columns_per_place

    def sent(self, source: int, owner: int, part: int) -> Ints:
        """The rows that one rank sends in a part, by receiving place, column and number."""
        return np.flatnonzero((self.source_N == source) & (self.owner_N == owner) & (self.part_N == part))

    def counts_GG(self, owner: int, part: int) -> Ints:
        """Rows from source to place, of the ranks that are the `owner`-th of theirs."""
        chosen = np.flatnonzero((self.owner_N == owner) & (self.part_N == part))
        cell = self.source_N[chosen] * self.num_places + self.place_N[chosen]
        return np.bincount(cell, minlength=self.num_places**2).reshape(self.num_places, -1)

    def received(self, place: int, owner: int, part: int) -> Ints:
        """The rows that the `owner`-th rank of a place gets in a part, in the order in which they come."""
        return np.flatnonzero((self.place_N == place) & (self.owner_N == owner) & (self.part_N == part))

    def slots(self, rows: Ints) -> Ints:
        """The slot, on its place, of each of some rows."""
        return self.column_N[rows] % self.columns_per_place


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Choices:
    """The forced experts of every layer of one micro-batch; all micro-batches have the same counts."""

    plan: Plan
    rank_tokens: int
    top_k: tuple[int, ...]
    chosen_SE: tuple[Ints, ...]
    """By layer, before any capacity rule."""
    slot_SX: tuple[Ints, ...]
    """By layer, choice x tokens + token of the X-th choice of each source, in the order of experts."""
    layers: tuple[Rows, ...]

    def local_T(self, moe: int, microbatch: int, position: int, token_N: Ints) -> Ints:
        """The numbers, on the rank at `position` of its stage, of tokens of its source; padding is one past the last.

        Tokens are dealt out anew for each layer, micro-batch and rank, so that neighbours differ.
        """
        order = np.random.default_rng([moe, microbatch, position]).permutation(self.rank_tokens)
        return np.where(token_N == NOBODY, self.rank_tokens, order[token_N // self.plan.etp])

    def experts_TK(self, moe: int, microbatch: int, position: int) -> tuple[Ints, Ints]:
        """The experts of each token of a rank, and the same with `NOBODY` where a capacity rule drops the choice."""
        source, owner = (int(coordinate(self.plan, axis)[position]) for axis in ("ep", "etp"))
        chosen_E = self.chosen_SE[moe][source]
        expert_X = np.repeat(np.arange(len(chosen_E)), chosen_E)
        choice_X, token_X = np.divmod(self.slot_SX[moe][source], self.rank_tokens * self.plan.etp)
        mine = token_X % self.plan.etp == owner
        local = self.local_T(moe, microbatch, position, token_X[mine])
        experts_TK = np.full((self.rank_tokens, self.top_k[moe]), NOBODY)
        experts_TK[local, choice_X[mine]] = expert_X[mine]
        rows, kept_TK = self.layers[moe], np.full_like(experts_TK, NOBODY)
        real = np.flatnonzero((rows.source_N == source) & (rows.owner_N == owner) & (rows.token_N != NOBODY))
        local = self.local_T(moe, microbatch, position, rows.token_N[real])
        kept_TK[local, rows.choice_N[real]] = rows.expert_C[rows.column_N[real]]
        return experts_TK, kept_TK


def choices_of(plan: Plan, scenario: Scenario) -> Choices | None:
    """The forced experts under a plan; None for a model without experts."""
    rank_tokens = Tokens.of(plan, scenario.workload).rank
    as_chosen = plan.model_copy(update={"capacity": Capacity(), "placement": None})
    load = load_of(scenario, as_chosen, rank_tokens=rank_tokens)
    if load is None:
        return None
    tokens = rank_tokens * plan.etp
    top_k = tuple(layer.experts.top_k for layer in scenario.model.all_layers if layer.experts)
    chosen = tuple(
        rounded_SE(exact_SE, tokens * each, tokens)
        for exact_SE, each in zip(load.tokens_SE_by_layer, top_k, strict=True)
    )
    slots = tuple(
        np.stack(
            [mixed_X(chosen_E, tokens, seed=(moe, source), owners=plan.etp) for source, chosen_E in enumerate(each)]
        )
        for moe, each in enumerate(chosen)
    )
    makers = [_Maker(plan, chosen_SE, slots[moe], moe, top_k[moe], tokens) for moe, chosen_SE in enumerate(chosen)]
    return Choices(
        plan=plan, rank_tokens=rank_tokens, top_k=top_k, chosen_SE=chosen, slot_SX=slots,
        layers=tuple(each.rows for each in makers),
    )  # fmt: skip


_SWAPS = 8
"""How often a choice is exchanged for another, on average, of which some meet a hindrance."""


def mixed_X(chosen_E: Ints, tokens: int, *, seed: tuple[int, int], owners: int) -> Ints:
    """Choice x tokens + token of each choice, choices in the order of experts, which go together by chance.

    Two tokens of one owner exchange a choice unless one of them would then have an expert twice: a walk whose law in
    the end is uniform among all ways to choose each expert as often. For large numbers that is the law with the most
    entropy, by which `partition/reach.py` says how many tokens have a choice in a node.
    Reference: Rao, Jana, Bandyopadhyay, "A Markov chain Monte Carlo method for generating random (0, 1)-matrices with
    given marginals", Sankhya A 58, 1996.
    """
    rng, top_k = np.random.default_rng(seed), int(chosen_E.sum()) // tokens
    expert_KT = np.repeat(np.arange(len(chosen_E)), chosen_E).reshape(top_k, tokens)
    place_KT = np.arange(top_k * tokens).reshape(top_k, tokens)
    for _ in range(_SWAPS * top_k * owners if top_k < len(chosen_E) else 0):
        order = rng.permutation(tokens // owners) * owners + rng.integers(owners)
        one, other = order[: len(order) // 2], order[len(order) // 2 :][: len(order) // 2]
        k, m = rng.integers(top_k, size=(2, len(one)))
        a, b = expert_KT[k, one], expert_KT[m, other]
        fits = ~((expert_KT[:, one] == b) | (expert_KT[:, other] == a)).any(axis=0)
        k, m, one, other = k[fits], m[fits], one[fits], other[fits]
        for table_KT in (expert_KT, place_KT):
            table_KT[k, one], table_KT[m, other] = table_KT[m, other], table_KT[k, one]
    slot_X = np.empty(top_k * tokens, np.int64)
    slot_X[place_KT.ravel()] = np.arange(top_k * tokens)
    return slot_X


def rounded_SE(exact_SE: Floats | Ints, wanted: int, most: int) -> Ints:
    """Whole counts of which each row sums to `wanted`, none above `most`, and sums over rows as near as can be.

    What a row rounds off is handed on to the next one, so that no column is rounded the same way by all sources.
    """
    found_SE, owed_E = np.zeros(exact_SE.shape, np.int64), np.zeros(exact_SE.shape[1])
    for source, exact_E in enumerate(exact_SE):
        target_E = np.round(exact_E + owed_E, 9)
        whole_E = np.clip(np.floor(target_E), 0, most).astype(np.int64)
        while (lack := wanted - int(whole_E.sum())) != 0:
            step = 1 if lack > 0 else -1
            can = whole_E < most if step > 0 else whole_E > 0
            gain_E = np.where(can, step * (target_E - whole_E), -np.inf)
            whole_E[np.argsort(-gain_E, kind="stable")[: min(abs(lack), int(can.sum()))]] += step
        found_SE[source], owed_E = whole_E, target_E - whole_E
    return found_SE


class _Maker:
    """The rows of one layer."""

    def __init__(self, plan: Plan, chosen_SE: Ints, slot_SX: Ints, moe: int, top_k: int, tokens: int) -> None:
        self.plan, self.chosen_SE, self.slot_SX, self.moe, self.tokens = plan, chosen_SE, slot_SX, moe, tokens
        routing = Routing(tokens_per_source=tokens, top_k=top_k, tokens_LSE=chosen_SE[None])
        ruled = apply_capacity(routing, plan.capacity.rule, factor=plan.capacity.factor)
        self.travels_SE: Ints = ruled.tokens_LSE[0].astype(np.int64)
        padded = 0 if ruled.padded_LSE is None else ruled.padded_LSE[0]
        self.kept_SE = (self.travels_SE - padded).astype(np.int64)

    @cached_property
    def expert_C(self) -> Ints:
        placement = self.plan.placement
        in_order: Ints = np.arange(self.chosen_SE.shape[1])
        return in_order if placement is None else np.array(placement.experts[self.moe])

    @cached_property
    def travels_SC(self) -> Ints:
        if self.plan.placement is None:
            return self.travels_SE
        split: Floats = tokens_of_slots(self.travels_SE.astype(np.float64), self.plan.placement, self.moe)
        return np.rint(split).astype(np.int64)

    @cached_property
    def ahead_SC(self) -> Ints:
        """Rows of the same expert in columns before each one."""
        before_SC: Ints = np.zeros_like(self.travels_SC)
        for expert in np.unique(self.expert_C[self.expert_C != EMPTY]):
            columns = np.flatnonzero(self.expert_C == expert)
            before_SC[:, columns] = np.cumsum(self.travels_SC[:, columns], axis=1) - self.travels_SC[:, columns]
        return before_SC

    @cached_property
    def rows(self) -> Rows:
        """Each expert's choices in turn; padding follows them, as if it were choices."""
        sources, columns = self.travels_SC.shape
        count_X = self.travels_SC.ravel()
        cell_N = np.repeat(np.arange(sources * columns), count_X)
        number_N = np.arange(len(cell_N)) - np.repeat(np.cumsum(count_X) - count_X, count_X)
        source_N, column_N = np.divmod(cell_N, columns)
        expert_N = self.expert_C[column_N]
        of_expert_N = self.ahead_SC[source_N, column_N] + number_N
        start_SE = np.cumsum(self.chosen_SE, axis=1) - self.chosen_SE
        turn_N = start_SE[source_N, expert_N] + of_expert_N
        is_real_N = of_expert_N < self.kept_SE[source_N, expert_N]
        slot_N = self.slot_SX[source_N, turn_N % self.slot_SX.shape[1]]
        return Rows(
            num_places=self.plan.ep, columns_per_place=columns // self.plan.ep, expert_C=self.expert_C,
            source_N=source_N, column_N=column_N, token_N=np.where(is_real_N, slot_N % self.tokens, NOBODY),
            choice_N=np.where(is_real_N, slot_N // self.tokens, 0), owner_N=turn_N % self.plan.etp,
            part_N=self._part_N(source_N, column_N, number_N),
        )  # fmt: skip

    def _part_N(self, source_N: Ints, column_N: Ints, number_N: Ints) -> Ints:
        """The rows of a column in equal parts, as the program has them, with each source's rows spread over all."""
        parts, total_C = self.plan.overlap_degree, self.travels_SC.sum(axis=0)
        when_N = (number_N + 0.5) / self.travels_SC[source_N, column_N]
        order = np.lexsort((source_N, when_N, column_N))
        place_N = np.empty_like(order)
        place_N[order] = np.arange(len(order)) - np.repeat(np.cumsum(total_C) - total_C, total_C)
        return np.asarray(((place_N + 1) * parts - 1) // np.maximum(total_C[column_N], 1))


def token_numbers_T(plan: Plan, scenario: Scenario, *, position: int, microbatch: int) -> Ints:
    """Which tokens of the whole batch the rank at `position` of its stage has: sequence times length, plus place.

    A context-parallel rank has two pieces of each sequence, the i-th from the front and from the end (zig-zag), so that
    causal attention is the same work for all. Tensor-parallel ranks share its tokens in equal runs.
    """
    length, size = scenario.workload.query_length, plan.micro_batch
    tp, cp, dp = (int(coordinate(plan, axis)[position]) for axis in ("tp", "cp", "dp"))
    first = dp * plan.num_microbatches(scenario.workload.global_batch) * size + microbatch * size
    pieces = np.arange(length).reshape(2 * plan.cp if plan.cp > 1 else 1, -1)
    mine = np.concatenate([pieces[cp], pieces[-1 - cp]]) if plan.cp > 1 else pieces[0]
    group = (np.arange(first, first + size)[:, None] * length + mine).ravel()
    rank = len(group) // plan.tp
    return np.asarray(group[tp * rank : (tp + 1) * rank])
