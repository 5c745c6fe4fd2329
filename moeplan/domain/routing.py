"""Routing: how many tokens each source sends to each expert, before and after a capacity rule.

Axes of arrays: L mixture-of-experts layer, S source (one rank of an expert-parallel group), E expert, U different sets
of experts, K choice of a token.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from moeplan.errors import CatalogueError, PlanError

if TYPE_CHECKING:  # a plan has placements, and those are made from recorded tokens
    from moeplan.domain.plan import CapacityRule

Tokens = npt.NDArray[np.int64] | npt.NDArray[np.float64]
Shares = npt.NDArray[np.float64]

_SLACK = 1e-9


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class TokenSets:
    """Which experts recorded tokens chose: `count_U[u]` tokens those of row u. Rows are sorted, and all different."""

    experts_UK: npt.NDArray[np.int32]
    count_U: npt.NDArray[np.int64]

    @staticmethod
    def of(experts_NK: npt.NDArray[np.integer]) -> TokenSets:
        """The sets of tokens, one row each."""
        rows, count_U = np.unique(np.sort(experts_NK.astype(np.int32), axis=1), axis=0, return_counts=True)
        for array in (rows, count_U):
            array.setflags(write=False)
        return TokenSets(experts_UK=rows, count_U=count_U)


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Routing:
    """One micro-batch's tokens by layer, source and expert: `tokens_LSE[l, s].sum()` is `tokens_per_source * top_k`.

    Counts are whole (int64) where a router sampled them and may be fractional (float64) where it gives expectations.
    After a capacity rule `tokens_LSE` is what travels; what was left out stands in `dropped_LSE`, and the empty places
    that travel along in `padded_LSE` (None: there are none). Arrays are read-only.

    Law: tokens + dropped - padded is what the router chose; its rows sum to `tokens_per_source * top_k`, and no source
    sends an expert more than `tokens_per_source`, for no token picks an expert twice. Raises CatalogueError otherwise.
    """

    tokens_per_source: int
    top_k: int
    tokens_LSE: Tokens
    dropped_LSE: Tokens | None = None
    padded_LSE: Tokens | None = None
    sets_LS: tuple[tuple[TokenSets, ...], ...] | None = None
    """What the router chose token by token, where that was recorded; one entry for all sources if they are alike."""

    def __post_init__(self) -> None:
        for name in ("tokens_LSE", "dropped_LSE", "padded_LSE"):
            found = getattr(self, name)
            if found is not None:
                object.__setattr__(self, name, _read_only(name, found, like=self.tokens_LSE))
        if self.sets_LS is not None:
            _check_sets(self.sets_LS, self.tokens_LSE)
        chosen_LSE, wanted = self.chosen_LSE, self.tokens_per_source * self.top_k
        slack = _SLACK * max(wanted, 1)
        if abs(chosen_LSE.sum(axis=2) - wanted).max() > slack:
            found = chosen_LSE.sum(axis=2).flat[abs(chosen_LSE.sum(axis=2) - wanted).argmax()]
            raise CatalogueError(
                f"routing: a source sends {found:g} tokens, not {self.tokens_per_source} * top_k {self.top_k}; "
                f"scale its counts to {wanted}"
            )
        if chosen_LSE.max() > self.tokens_per_source + slack:
            raise CatalogueError(
                f"routing: an expert gets {chosen_LSE.max():g} tokens of a source that has {self.tokens_per_source}; "
                "no token may pick an expert twice"
            )

    @property
    def num_layers(self) -> int:
        """Mixture-of-experts layers."""
        return int(self.tokens_LSE.shape[0])

    @property
    def num_sources(self) -> int:
        """Ranks of the expert-parallel group."""
        return int(self.tokens_LSE.shape[1])

    @property
    def num_experts(self) -> int:
        """Routed experts of a layer."""
        return int(self.tokens_LSE.shape[2])

    @property
    def chosen_LSE(self) -> Tokens:
        """What the router chose, before any capacity rule."""
        chosen_LSE = self.tokens_LSE
        if self.dropped_LSE is not None:
            chosen_LSE = chosen_LSE + self.dropped_LSE
        return chosen_LSE if self.padded_LSE is None else chosen_LSE - self.padded_LSE

    @property
    def load_LE(self) -> Tokens:
        """Tokens that each expert computes, padding included, from all sources."""
        load_LE: Tokens = self.tokens_LSE.sum(axis=1)
        return load_LE

    @property
    def max_over_mean_L(self) -> Shares:
        """Load of the hottest expert over the mean load: 1 where balanced."""
        load_LE = self.load_LE
        return np.asarray(load_LE.max(axis=1) / load_LE.mean(axis=1), dtype=np.float64)

    @property
    def effective_experts_L(self) -> Shares:
        """exp(entropy of the load): as many equally loaded experts would be as hard to predict."""
        share_LE = self.load_LE / self.load_LE.sum(axis=1, keepdims=True)
        terms_LE = np.zeros_like(share_LE)
        np.log(share_LE, out=terms_LE, where=share_LE > 0)
        return np.asarray(np.exp(-(share_LE * terms_LE).sum(axis=1)), dtype=np.float64)

    @property
    def is_balanced(self) -> bool:
        """Whether in every layer all sources send all experts the same, so that all ranks behave alike."""
        spread_L = self.tokens_LSE.max(axis=(1, 2)) - self.tokens_LSE.min(axis=(1, 2))
        return bool((spread_L <= _SLACK * self.tokens_LSE.max(axis=(1, 2))).all())

    @property
    def dropped_tokens_L(self) -> Tokens:
        """Token copies that reach no expert, by layer."""
        return np.zeros(self.num_layers) if self.dropped_LSE is None else self.dropped_LSE.sum(axis=(1, 2))

    @property
    def padded_tokens_L(self) -> Tokens:
        """Empty places that are sent and computed as if they were tokens, by layer."""
        return np.zeros(self.num_layers) if self.padded_LSE is None else self.padded_LSE.sum(axis=(1, 2))


def _check_sets(sets_LS: tuple[tuple[TokenSets, ...], ...], tokens_LSE: Tokens) -> None:
    layers, sources, experts = tokens_LSE.shape
    if len(sets_LS) != layers or not {len(sets_S) for sets_S in sets_LS} <= {1, sources}:
        raise CatalogueError(
            f"routing: sets: of {len(sets_LS)} layers; record {layers}, for each of the {sources} sources or for all"
        )
    most = max((int(sets.experts_UK.max(initial=0)) for sets_S in sets_LS for sets in sets_S), default=0)
    if most >= experts:
        raise CatalogueError(f"routing: sets: expert {most} is not 0 to {experts - 1}; use the model that was recorded")


def _read_only(name: str, found: Tokens, *, like: Tokens) -> Tokens:
    if found.ndim != 3 or found.shape != like.shape or 0 in found.shape:
        raise CatalogueError(f"routing: {name}: shape {found.shape} is not (layers, sources, experts) {like.shape}")
    if not np.isfinite(found).all() or found.min() < 0:
        raise CatalogueError(f"routing: {name}: counts must be finite and 0 or more; the least is {found.min():g}")
    whole = np.issubdtype(found.dtype, np.integer)
    kept: Tokens = np.array(found, dtype=np.int64) if whole else np.array(found, dtype=np.float64)
    kept.setflags(write=False)
    return kept


def expert_capacity(routing: Routing, factor: float) -> int:
    """Places that one expert has for one source: ceil(factor * tokens * top_k / experts), at most all its tokens.

    Reference: Lepikhin et al., "GShard", ICLR 2021, section 2.2, where capacity is per group, here per source.
    """
    mean = routing.tokens_per_source * routing.top_k / routing.num_experts
    return int(min(np.ceil(factor * mean * (1 - _SLACK)), routing.tokens_per_source))


def apply_capacity(routing: Routing, rule: CapacityRule, *, factor: float | None = None) -> Routing:
    """The routing after a capacity rule; tokens + dropped - padded is the same as before.

    dropless: the same routing. drop: each source sends an expert at most `expert_capacity` tokens and drops the others.
    pad: also, and fills up to that number. pad_to_max: drops nothing, and fills up to the most that any source sends to
    any expert of the layer. Raises PlanError for a factor that is missing, without effect, or not above 0, and for a
    routing that has been through a rule.
    """
    _check_rule(routing, rule, factor)
    if rule == "dropless":
        return routing
    chosen_LSE = routing.tokens_LSE
    if factor is None:
        places_LSE = np.broadcast_to(chosen_LSE.max(axis=(1, 2), keepdims=True), chosen_LSE.shape)
        return replace(routing, tokens_LSE=places_LSE, padded_LSE=places_LSE - chosen_LSE)
    places = expert_capacity(routing, factor)
    kept_LSE = np.minimum(chosen_LSE, places)
    dropped = replace(routing, tokens_LSE=kept_LSE, dropped_LSE=chosen_LSE - kept_LSE)
    if rule == "drop":
        return dropped
    return replace(dropped, tokens_LSE=np.full_like(chosen_LSE, places), padded_LSE=places - kept_LSE)


def _check_rule(routing: Routing, rule: CapacityRule, factor: float | None) -> None:
    if rule not in ("dropless", "drop", "pad", "pad_to_max"):
        raise PlanError(f"capacity.rule: {rule!r} is unknown; use dropless, drop, pad or pad_to_max")
    if rule in ("drop", "pad") and factor is None:
        raise PlanError(f"capacity.factor: rule {rule!r} needs a number above 0, such as 1.25")
    if rule in ("dropless", "pad_to_max") and factor is not None:
        raise PlanError(f"capacity.factor: {factor} has no effect under rule {rule!r}; remove it")
    if factor is not None and not 0 < factor < np.inf:
        raise PlanError(f"capacity.factor: {factor} is not a number above 0; use one such as 1.25")
    if routing.dropped_LSE is not None or routing.padded_LSE is not None:
        raise PlanError("capacity: the routing has been through a rule; apply the rule to what the router gave")
