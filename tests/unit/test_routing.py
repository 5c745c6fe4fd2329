"""The routing noun: its laws under every capacity rule, and what it refuses."""

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.domain.plan import CapacityRule
from moeplan.domain.routing import Routing, apply_capacity, expert_capacity
from moeplan.errors import CatalogueError, PlanError


def skewed(seed: int = 0, *, top_k: int = 2, num_experts: int = 6, whole: bool = True) -> Routing:
    """Two layers, three sources, random picks without repetition."""
    rng = np.random.default_rng(seed)
    tokens_LSE = np.zeros((2, 3, num_experts), dtype=np.int64)
    for layer, source in np.ndindex(2, 3):
        for _ in range(50):
            picks = rng.choice(num_experts, top_k, replace=False, p=rng.dirichlet(np.ones(num_experts)))
            tokens_LSE[layer, source, picks] += 1
    counts_LSE: Any = tokens_LSE if whole else tokens_LSE.astype(float)
    return Routing(tokens_per_source=50, top_k=top_k, tokens_LSE=counts_LSE)


def even() -> Routing:
    return Routing(tokens_per_source=3, top_k=2, tokens_LSE=np.full((1, 2, 4), 1.5))


RULES: list[tuple[CapacityRule, bool]] = [("dropless", False), ("drop", True), ("pad", True), ("pad_to_max", False)]


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(0, 20), st.floats(0.05, 8), st.sampled_from(RULES), st.booleans())
def test_what_is_sent_and_dropped_less_what_is_padded_is_what_was_chosen(
    seed: int, factor: float, rule: tuple[CapacityRule, bool], whole: bool
) -> None:
    routing = skewed(seed, whole=whole)
    after = apply_capacity(routing, rule[0], factor=factor if rule[1] else None)
    np.testing.assert_array_equal(after.chosen_LSE, routing.tokens_LSE)
    assert after.load_LE.sum() + after.dropped_tokens_L.sum() - after.padded_tokens_L.sum() == routing.load_LE.sum()
    assert after.tokens_LSE.dtype == routing.tokens_LSE.dtype


def test_dropless_changes_nothing() -> None:
    routing = skewed()
    assert apply_capacity(routing, "dropless") is routing
    assert routing.dropped_tokens_L.tolist() == routing.padded_tokens_L.tolist() == [0, 0]


@settings(derandomize=True, deadline=None, max_examples=30)
@given(st.integers(0, 20), st.floats(0.05, 3), st.floats(1, 2))
def test_more_capacity_never_drops_more(seed: int, factor: float, more: float) -> None:
    routing = skewed(seed)
    tight, wide = (apply_capacity(routing, "drop", factor=each) for each in (factor, factor * more))
    assert (wide.dropped_tokens_L <= tight.dropped_tokens_L).all()
    assert tight.tokens_LSE.max() <= expert_capacity(routing, factor)


def test_drop_keeps_what_fits_and_pad_also_fills_what_is_free() -> None:
    routing = Routing(tokens_per_source=8, top_k=1, tokens_LSE=np.array([[[6, 2, 0, 0]]]))
    dropped, padded = (apply_capacity(routing, rule, factor=1.5) for rule in ("drop", "pad"))
    assert expert_capacity(routing, 1.5) == 3
    assert dropped.tokens_LSE.tolist() == [[[3, 2, 0, 0]]]
    assert dropped.dropped_tokens_L.tolist() == padded.dropped_tokens_L.tolist() == [3]
    assert padded.tokens_LSE.tolist() == [[[3, 3, 3, 3]]]
    assert padded.padded_tokens_L.tolist() == [7]
    assert padded.is_balanced


def test_pad_to_max_drops_nothing_and_evens_out_each_layer() -> None:
    after = apply_capacity(skewed(), "pad_to_max")
    assert after.is_balanced
    assert after.dropped_LSE is None
    assert after.tokens_LSE[:, 0, 0].tolist() == skewed().tokens_LSE.max(axis=(1, 2)).tolist()


def test_capacity_never_exceeds_the_tokens_there_are() -> None:
    assert expert_capacity(skewed(), 1e6) == 50
    assert apply_capacity(skewed(), "drop", factor=1e6).dropped_tokens_L.sum() == 0


def test_a_capacity_that_is_met_exactly_is_not_rounded_up() -> None:
    routing = Routing(tokens_per_source=30, top_k=1, tokens_LSE=np.full((1, 1, 3), 10))
    assert expert_capacity(routing, 1.1) == 11


@pytest.mark.parametrize(
    ("rule", "factor", "says"),
    [
        ("drop", None, "needs a number above 0"),
        ("pad", None, "needs a number above 0"),
        ("dropless", 1.0, "has no effect under rule 'dropless'; remove it"),
        ("pad_to_max", 1.0, "has no effect"),
        ("drop", 0.0, "not a number above 0"),
        ("drop", float("nan"), "not a number above 0"),
        ("drop", float("inf"), "not a number above 0"),
        ("trim", 1.0, "'trim' is unknown; use dropless, drop, pad or pad_to_max"),
    ],
)
def test_a_rule_that_cannot_be_is_refused(rule: Any, factor: float | None, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        apply_capacity(skewed(), rule, factor=factor)


def test_a_rule_is_applied_once() -> None:
    with pytest.raises(PlanError, match="has been through a rule"):
        apply_capacity(apply_capacity(skewed(), "drop", factor=1.0), "pad_to_max")


def test_load_and_its_measures_of_skew() -> None:
    routing = Routing(tokens_per_source=4, top_k=1, tokens_LSE=np.array([[[4, 0], [2, 2]], [[2, 2], [2, 2]]]))
    assert routing.load_LE.tolist() == [[6, 2], [4, 4]]
    assert routing.max_over_mean_L.tolist() == [1.5, 1.0]
    assert routing.effective_experts_L == pytest.approx([np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25)), 2.0])
    assert (routing.num_layers, routing.num_sources, routing.num_experts) == (2, 2, 2)
    assert not routing.is_balanced
    assert even().is_balanced


def test_an_even_load_of_uneven_sources_is_not_balanced() -> None:
    routing = Routing(tokens_per_source=4, top_k=1, tokens_LSE=np.array([[[4, 0], [0, 4]]]))
    assert routing.max_over_mean_L.tolist() == [1.0]
    assert not routing.is_balanced


def test_a_routing_neither_changes_nor_freezes_what_it_was_made_from() -> None:
    tokens_LSE = np.full((1, 2, 4), 1.5)
    routing = Routing(tokens_per_source=3, top_k=2, tokens_LSE=tokens_LSE)
    tokens_LSE[0, 0, 0] = 9
    assert routing.is_balanced
    with pytest.raises(ValueError, match="read-only"):
        routing.tokens_LSE[0, 0, 0] = 9


@pytest.mark.parametrize(
    ("tokens_LSE", "says"),
    [
        (np.full((2, 4), 1.5), "is not \\(layers, sources, experts\\)"),
        (np.zeros((0, 2, 4)), "shape"),
        (np.full((1, 2, 4), np.nan), "finite"),
        (np.array([[[4.0, -1.0, 3.0, 0.0]]]), "0 or more; the least is -1"),
        (np.full((1, 2, 4), 1.0), r"sends 4 tokens, not 3 \* top_k 2; scale its counts to 6"),
        (np.array([[[4, 2, 0, 0]]]), "gets 4 tokens of a source that has 3; no token may pick an expert twice"),
    ],
)
def test_counts_that_no_router_can_give_are_refused(tokens_LSE: Any, says: str) -> None:
    with pytest.raises(CatalogueError, match=says):
        Routing(tokens_per_source=3, top_k=2, tokens_LSE=tokens_LSE)
