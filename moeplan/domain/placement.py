"""Which GPU holds which experts of a layer, and how their tokens are split between replicas.

Axes of arrays: E expert, G GPU of the expert-parallel group, N node, R replica, S source of tokens (one row where all
sources are alike, else a row for each node).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Literal, get_args

import numpy as np
import numpy.typing as npt
from pydantic import Field, model_validator

from moeplan.domain._frozen import Frozen
from moeplan.domain.routing import TokenSets
from moeplan.errors import PlanError, unknown_name

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]
Split = Literal["even", "optimal"]
"""even: each replica of an expert gets the same share, as serving engines do. optimal: whatever is best."""

_SLACK = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True)
class TokenPrices:
    """What one token copy costs where, in seconds, when the cluster's shape counts.

    A layer takes `exchange_factor * max(NIC in or out of a node, NVLink into a GPU) + the slowest GPU's experts`.
    """

    gpus_per_node: int
    compute_s: float
    """Of one token copy in one expert."""
    nic_s: float
    """Of one copy through all NICs of a node, in one direction."""
    nvlink_s: float
    """Of one copy into a GPU from another GPU of its node, or from the NIC side through NVLink."""
    exchange_factor: float = 2.0
    """Seconds of dispatch and combine together over those of dispatch: 2 if both send equally wide numbers."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenVisits:
    """Which experts tokens choose together: then the nodes that a token visits are to be few.

    No node is to get more than `most_load` times the mean load, where experts can be dealt out so.
    """

    sets: TokenSets
    gpus_per_node: int
    most_load: float = 1.05


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlacementProblem:
    """One layer's experts to be put on GPUs: `slots` replicas in all, at most ceil(slots / GPUs) on a GPU.

    The objective is the tokens of the fullest GPU, with `prices` the seconds that `TokenPrices` states, with `visits`
    the nodes that a token visits on average.
    No expert stands twice on a GPU, and every slot is used. `now` is where experts stand; with `max_moves` at most
    so many replicas may stand where they did not stand before.
    Raises PlanError for loads that are negative, not finite, all zero or of the wrong shape, and for too few or too
    many slots.
    """

    tokens_SE: Floats
    num_gpus: int
    slots: int
    split: Split = "even"
    prices: TokenPrices | None = None
    visits: TokenVisits | None = None
    now: LayerPlacement | None = None
    max_moves: int | None = None

    def __post_init__(self) -> None:
        if self.split not in get_args(Split):
            raise PlanError(unknown_name("split", self.split, get_args(Split)))
        tokens_SE = np.array(self.tokens_SE, dtype=np.float64, ndmin=2)
        if tokens_SE.ndim != 2 or 0 in tokens_SE.shape:
            raise PlanError(f"load: shape {np.shape(self.tokens_SE)} is not (sources, experts); give a row of counts")
        if not np.isfinite(tokens_SE).all() or tokens_SE.min() < 0 or not tokens_SE.any():
            raise PlanError("load: counts must be finite, 0 or more, and not all 0; count tokens of each expert")
        tokens_SE.setflags(write=False)
        object.__setattr__(self, "tokens_SE", tokens_SE)
        if self.num_gpus < 1 or not self.num_experts <= self.slots <= self.num_experts * self.num_gpus:
            raise PlanError(
                f"slots: {self.slots} do not hold {self.num_experts} experts on {self.num_gpus} GPUs without an expert "
                f"twice on a GPU; use {self.num_experts} to {self.num_experts * max(self.num_gpus, 1)}"
            )
        if self.visits is not None:
            self._check_visits(self.visits)
        if self.max_moves is not None and self.now is None:
            raise PlanError("max_moves has no effect without a present placement; give the placement to start from")

    def _check_visits(self, visits: TokenVisits) -> None:
        if self.prices is not None:
            raise PlanError("objective: prices and visits are two; give one of them")
        if self.slots != self.num_experts:
            raise PlanError(f"slots: visits are counted without replicas; use {self.num_experts}, one of each expert")
        if self.num_gpus % visits.gpus_per_node or self.num_experts % self.num_gpus:
            raise PlanError(
                f"gpus: {self.num_experts} experts on {self.num_gpus} GPUs in nodes of {visits.gpus_per_node} are not "
                "equally many on each; use numbers that divide"
            )

    @property
    def num_experts(self) -> int:
        """Experts of the layer."""
        return int(self.tokens_SE.shape[1])

    @property
    def tokens_E(self) -> Floats:
        """Tokens of each expert, from all sources."""
        return np.asarray(self.tokens_SE.sum(axis=0))

    @property
    def slots_per_gpu(self) -> int:
        """The most replicas that a GPU holds."""
        return -(-self.slots // self.num_gpus)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class LayerPlacement:
    """Replica r of expert `expert_R[r]` stands on GPU `gpu_R[r]` and gets `share_SR[s, r]` of source s's tokens of it.

    Replicas are sorted by expert, then GPU. Shares of an expert sum to 1 for every source. Arrays are read-only.
    """

    expert_R: Ints
    gpu_R: Ints
    share_SR: Floats

    def __post_init__(self) -> None:
        expert_R, gpu_R = np.asarray(self.expert_R, np.int64), np.asarray(self.gpu_R, np.int64)
        share_SR = np.array(self.share_SR, dtype=np.float64, ndmin=2)
        order = np.lexsort((gpu_R, expert_R))
        for name, array in (("expert_R", expert_R[order]), ("gpu_R", gpu_R[order]), ("share_SR", share_SR[:, order])):
            array.setflags(write=False)
            object.__setattr__(self, name, array)
        sums_SE = np.array([np.bincount(self.expert_R, weights=row) for row in self.share_SR])
        if expert_R.size == 0 or np.abs(sums_SE - 1).max() > _SLACK or self.share_SR.min() < -_SLACK:
            raise PlanError("placement: the shares of an expert's replicas must be 0 or more and sum to 1; scale them")

    @staticmethod
    def even(expert_R: npt.ArrayLike, gpu_R: npt.ArrayLike) -> LayerPlacement:
        """Each replica of an expert gets the same share of its tokens."""
        expert = np.asarray(expert_R, np.int64)
        share_R = 1.0 / np.bincount(expert)[expert]
        return LayerPlacement(expert_R=expert, gpu_R=np.asarray(gpu_R, np.int64), share_SR=share_R[None, :])

    def moves_from(self, now: LayerPlacement) -> int:
        """Replicas that stand where `now` has none of their expert: each is one transfer of an expert's weights."""
        stood = set(zip(now.expert_R.tolist(), now.gpu_R.tolist(), strict=True))
        return sum(pair not in stood for pair in zip(self.expert_R.tolist(), self.gpu_R.tolist(), strict=True))


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class PlacedLayer:
    """A placement with its certificate: no legal placement of the stated problem is below `lower_bound`."""

    placement: LayerPlacement
    value: float
    """Tokens of the fullest GPU, or seconds where the problem has prices; as the checker works it out."""
    lower_bound: float
    proof: str
    """How the bound was found, as a sentence."""
    seconds: float
    """Of the placer's work, without those in which functions were compiled."""

    @property
    def gap(self) -> float:
        """How far above the bound the value is: value / lower_bound - 1, 0 where proven best."""
        return max(0.0, self.value / self.lower_bound - 1) if self.lower_bound > 0 else float("inf")


EMPTY = -1
"""The expert of a slot that holds none."""

_Row = Annotated[tuple[Annotated[int, Field(ge=EMPTY, le=10**6)], ...], Field(min_length=1, strict=False)]
_Shares = Annotated[tuple[Annotated[float, Field(ge=0, le=1)], ...], Field(strict=False)]


class Placement(Frozen):
    """The expert in each slot of an expert-parallel group, layer by layer: what a plan says of where experts stand.

    `experts[l][s]` stands in slot s of the l-th layer with experts (layers of multi-token prediction are like the last
    of them), on place s // (slots / ep); -1 is an empty slot. `shares[l][s]` is what part of its expert's tokens the
    slot gets; None: replicas of an expert get the same. It is hashed once, for plans are keys of caches.
    """

    experts: Annotated[tuple[_Row, ...], Field(min_length=1, strict=False)]
    shares: Annotated[tuple[_Shares, ...], Field(strict=False)] | None = None

    @model_validator(mode="after")
    def _is_a_table(self) -> Placement:
        lengths = sorted({len(row) for row in self.experts})
        if len(lengths) > 1:
            raise ValueError(
                f"experts: layers have {lengths[0]} to {lengths[-1]} slots; fill up with -1, an empty slot"
            )
        if self.shares is None:
            return self
        if [len(row) for row in self.shares] != [len(row) for row in self.experts]:
            raise ValueError("shares: they are not a number for each slot; give as many as experts, or leave them out")
        for layer, (row, shares) in enumerate(zip(self.experts, self.shares, strict=True)):
            sums = np.bincount(np.array(row) + 1, weights=shares)
            wanted = np.bincount(np.array(row) + 1) > 0
            wanted[0] = False
            if np.abs(sums - wanted).max() > _SLACK:
                raise ValueError(f"shares: of an expert of layer {layer} they do not sum to 1 (0 if empty); scale them")
        return self

    @cached_property
    def _hash(self) -> int:
        return hash((self.experts, self.shares))

    def __hash__(self) -> int:
        return self._hash

    @property
    def num_slots(self) -> int:
        """Of each layer, empty ones included."""
        return len(self.experts[0])

    @cached_property
    def is_in_order(self) -> bool:
        """Whether each expert stands once, in the order of its number: as without a placement."""
        return all(row == tuple(range(self.num_slots)) for row in self.experts)

    def share_C(self, layer: int) -> Floats:
        """What part of its expert's tokens each slot of a layer gets; 0 if empty."""
        if self.shares is not None:
            return np.array(self.shares[layer])
        expert_C = np.array(self.experts[layer])
        return np.where(expert_C == EMPTY, 0.0, 1.0 / np.bincount(expert_C + 1)[expert_C + 1])

    def layer(self, layer: int, *, num_places: int) -> LayerPlacement:
        """One layer, as placers know it."""
        expert_C, place_C = np.array(self.experts[layer]), np.arange(self.num_slots) * num_places // self.num_slots
        full_C = expert_C != EMPTY
        return LayerPlacement(
            expert_R=expert_C[full_C], gpu_R=place_C[full_C], share_SR=self.share_C(layer)[None, full_C]
        )

    @staticmethod
    def of(layers: Sequence[LayerPlacement], *, num_places: int) -> Placement:
        """What placers found, in as many slots as the fullest place of a layer needs.

        A plan has no shares for each source: they are averaged over sources.
        """
        width = max(int(np.bincount(each.gpu_R).max()) for each in layers)
        table_LC = np.full((len(layers), num_places * width), EMPTY)
        share_LC = np.zeros(table_LC.shape)
        for row_C, share_C, each in zip(table_LC, share_LC, layers, strict=True):
            by_place = np.argsort(each.gpu_R, kind="stable")
            place_R = each.gpu_R[by_place]
            slot_R = place_R * width + np.arange(place_R.size) - np.searchsorted(place_R, place_R)
            share_R = np.clip(each.share_SR.mean(axis=0), 0.0, 1.0)
            share_R /= np.bincount(each.expert_R, weights=share_R)[each.expert_R]
            row_C[slot_R], share_C[slot_R] = each.expert_R[by_place], share_R[by_place]
        even = Placement(experts=tuple(map(tuple, table_LC.tolist())))
        if all(np.allclose(row, even.share_C(at), rtol=0, atol=_SLACK) for at, row in enumerate(share_LC)):
            return even
        return Placement(experts=even.experts, shares=tuple(map(tuple, share_LC.tolist())))


@dataclass(frozen=True, kw_only=True, slots=True)
class ExpertMap:
    """The expert in each slot of every layer of a model, as engines load it; None for a layer without experts."""

    num_gpus: int
    num_experts: int
    rows: tuple[tuple[int, ...] | None, ...]

    @staticmethod
    def of(placement: Placement, *, numbers: Sequence[int], num_layers: int, num_gpus: int) -> ExpertMap:
        """Of a placement whose l-th layer is number `numbers[l]` of `num_layers`."""
        rows = dict(zip(numbers, placement.experts, strict=True))
        return ExpertMap(
            num_gpus=num_gpus, num_experts=1 + max(map(max, placement.experts)),
            rows=tuple(rows.get(number) for number in range(num_layers)),
        )  # fmt: skip

    @property
    def num_slots(self) -> int:
        """Of each layer with experts."""
        return next(len(row) for row in self.rows if row is not None)
