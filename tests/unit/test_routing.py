"""The routing noun: its laws under every capacity rule, and what it refuses."""

import os
from dataclasses import replace
from itertools import combinations
from math import comb
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan import menu
from moeplan.domain.plan import CapacityRule
from moeplan.domain.routing import Routing, TokenSets, apply_capacity, expert_capacity
from moeplan.errors import CatalogueError, PlanError
from moeplan.partition.reach import ANYWHERE, Limit, reach_LSB


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


# ---- destination counts: tokens with at least one choice in a block of experts


def by_sets(chance: dict[tuple[int, ...], float], num_experts: int, **how: Any) -> Routing:
    """One source with 1000 tokens, which draw these sets of experts; only the counts are told."""
    tokens_E = np.zeros(num_experts)
    for experts, share in chance.items():
        tokens_E[list(experts)] += 1000 * share
    top_k = len(next(iter(chance)))
    return Routing(tokens_per_source=1000, top_k=top_k, tokens_LSE=tokens_E[None, None], **how)


def law(num_experts: int, top_k: int, seed: int, limit: Limit = ANYWHERE) -> dict[tuple[int, ...], float]:
    """The law of most entropy, every set written out; a set may come from any of the groups' choices that hold it."""
    weight_E = np.random.default_rng(seed).uniform(0.05, 1, num_experts)
    size, found = num_experts // limit.num_groups, {}
    for experts in combinations(range(num_experts), top_k):
        used = len({expert // size for expert in experts})
        if used <= limit.top_groups:
            ways = comb(limit.num_groups - used, limit.top_groups - used)
            found[experts] = ways * float(weight_E[list(experts)].prod())
    total = sum(found.values())
    return {experts: share / total for experts, share in found.items()}


def reached(chance: dict[tuple[int, ...], float], block_E: np.ndarray) -> list[float]:
    """Tokens of 1000 with a choice in each block, counted over all sets."""
    blocks = range(int(block_E.max()) + 1)
    return [1000 * sum(p for experts, p in chance.items() if block in block_E[list(experts)]) for block in blocks]


@pytest.mark.parametrize("limit", [ANYWHERE, Limit(4, 2), Limit(2, 1), Limit(4, 3)], ids=str)
@pytest.mark.parametrize("top_k", [1, 2])
@pytest.mark.parametrize("seed", range(3))
def test_reach_under_a_law_is_what_all_sets_written_out_say(limit: Limit, top_k: int, seed: int) -> None:
    chance = law(8, top_k, seed, limit)
    for block_E in (np.arange(8) // 4, np.arange(8) // 2, np.array([0, 0, 0, 1, 2, 2, -1, 1])):
        found = reach_LSB(by_sets(chance, 8), block_E, limit)[0, 0]
        assert found == pytest.approx(reached(chance, block_E), rel=1e-6)


def test_reach_with_more_choices_than_groups_is_what_all_sets_written_out_say() -> None:
    chance, block_E = law(12, 5, 1, Limit(4, 3)), np.arange(12) // 4
    assert reach_LSB(by_sets(chance, 12), block_E, Limit(4, 3))[0, 0] == pytest.approx(
        reached(chance, block_E), rel=1e-6
    )


@pytest.mark.parametrize(("num_experts", "top_k", "blocks"), [(8, 2, 4), (256, 8, 8), (64, 6, 2), (128, 1, 16)])
def test_reach_of_even_routing_is_the_hypergeometric_law(num_experts: int, top_k: int, blocks: int) -> None:
    each = 100 * top_k / num_experts
    routing = Routing(tokens_per_source=100, top_k=top_k, tokens_LSE=np.full((1, 1, num_experts), each))
    outside = comb(num_experts - num_experts // blocks, top_k) / comb(num_experts, top_k)
    found = reach_LSB(routing, np.arange(num_experts) * blocks // num_experts)
    assert found == pytest.approx(np.full((1, 1, blocks), 100 * (1 - outside)), rel=1e-12)


def test_reach_of_deepseek_v3_is_half_of_what_its_groups_hold() -> None:
    """4 of 8 groups are kept, and 8 of their 128 experts chosen; a node holds the 32 of one group."""
    routing = Routing(tokens_per_source=100, top_k=8, tokens_LSE=np.full((1, 1, 256), 100 * 8 / 256))
    found = reach_LSB(routing, np.arange(256) // 32, Limit(8, 4))
    assert found == pytest.approx(np.full((1, 1, 8), 100 / 2 * (1 - comb(96, 8) / comb(128, 8))), rel=1e-12)
    assert found.sum() <= 4 * 100


@settings(derandomize=True, deadline=None, max_examples=40)
@given(st.integers(0, 30), st.sampled_from(RULES), st.floats(0.3, 2), st.integers(1, 4), st.integers(1, 5))
def test_reach_lies_between_the_largest_and_the_sum_of_what_travels(
    seed: int, rule: tuple[CapacityRule, bool], factor: float, top_k: int, blocks: int
) -> None:
    routing = apply_capacity(skewed(seed, top_k=top_k), rule[0], factor=factor if rule[1] else None)
    padded_LSE = 0 if routing.padded_LSE is None else routing.padded_LSE
    block_E = np.arange(6) % blocks
    found = reach_LSB(routing, block_E)
    for block in range(blocks):
        travels = routing.tokens_LSE[:, :, block_E == block]
        real = (routing.tokens_LSE - padded_LSE)[:, :, block_E == block]
        assert (found[:, :, block] <= travels.sum(axis=2) * (1 + 1e-12)).all()
        assert (found[:, :, block] >= real.max(axis=2) * (1 - 1e-12)).all()
        if top_k == 1:
            assert found[:, :, block] == pytest.approx(travels.sum(axis=2))


@pytest.mark.parametrize("seed", range(4))
def test_every_token_reaches_all_experts_together(seed: int) -> None:
    assert reach_LSB(skewed(seed), np.zeros(6, int)) == pytest.approx(np.full((2, 3, 1), 50.0))


def test_experts_that_all_tokens_choose_are_reached_by_all() -> None:
    tokens_E = np.array([100.0, 100.0, 40.0, 30.0, 20.0, 10.0])
    routing = Routing(tokens_per_source=100, top_k=3, tokens_LSE=tokens_E[None, None])
    assert reach_LSB(routing, np.arange(6) // 2)[0, 0] == pytest.approx([100, 70, 30], rel=1e-6)


def test_groups_that_cannot_hold_the_popular_experts_are_given_up() -> None:
    """An expert that all choose in each of three groups, when two may be used."""
    tokens_E = np.array([100.0, 10.0, 100.0, 20.0, 100.0, 30.0, 20.0, 20.0])
    routing = Routing(tokens_per_source=100, top_k=4, tokens_LSE=tokens_E[None, None])
    limited, free = (reach_LSB(routing, np.arange(8) // 2, limit) for limit in (Limit(4, 2), ANYWHERE))
    np.testing.assert_allclose(limited, free, rtol=1e-6)


def recorded(seed: int, *, sources: int = 1) -> tuple[Routing, np.ndarray]:
    """Tokens of one layer, and what each chose: sets that no law of single experts makes (neighbours go together)."""
    rng = np.random.default_rng(seed)
    first = rng.integers(0, 6, size=(sources, 200))
    ids_SNK = np.stack([first, (first + 1) % 6], axis=2)
    tokens_SE = np.array([np.bincount(ids.ravel(), minlength=6) for ids in ids_SNK])
    sets_LS = (tuple(TokenSets.of(ids) for ids in ids_SNK),)
    return Routing(tokens_per_source=200, top_k=2, tokens_LSE=tokens_SE[None], sets_LS=sets_LS), ids_SNK


@pytest.mark.parametrize("sources", [1, 3])
def test_recorded_tokens_are_counted(sources: int) -> None:
    routing, ids_SNK = recorded(5, sources=sources)
    block_E = np.array([0, 0, 1, 1, 2, 2])
    wanted = [[(block_E[ids] == block).any(axis=1).sum() for block in range(3)] for ids in ids_SNK]
    assert reach_LSB(routing, block_E)[0] == pytest.approx(np.array(wanted, float))
    assert (reach_LSB(replace(routing, sets_LS=None), block_E)[0] > wanted).all()


def test_recorded_tokens_that_are_dropped_are_dropped_as_likely_as_any() -> None:
    """Monte Carlo: of each expert's tokens some are taken away at random, over and over."""
    routing, ids_SNK = recorded(6)
    after = apply_capacity(routing, "drop", factor=0.9)
    block_E, rng, total = np.array([0, 0, 0, 1, 1, 1]), np.random.default_rng(0), np.zeros(2)
    kept_E = after.tokens_LSE[0, 0] / routing.tokens_LSE[0, 0]
    for _ in range(2000):
        kept = rng.random(ids_SNK[0].shape) < kept_E[ids_SNK[0]]
        total += [((block_E[ids_SNK[0]] == block) & kept).any(axis=1).sum() / 2000 for block in range(2)]
    assert reach_LSB(after, block_E)[0, 0] == pytest.approx(total, rel=2e-3)


def test_empty_places_travel_each_for_itself() -> None:
    routing = Routing(tokens_per_source=8, top_k=2, tokens_LSE=np.array([[[6, 6, 2, 2]]]))
    padded = apply_capacity(routing, "pad", factor=1.5)
    assert padded.padded_LSE is not None
    dropped = apply_capacity(routing, "drop", factor=1.5)
    block_E = np.array([0, 0, 1, 1])
    empty = padded.padded_LSE[0, 0].reshape(2, 2).sum(axis=1)
    assert reach_LSB(padded, block_E)[0, 0] == pytest.approx(reach_LSB(dropped, block_E)[0, 0] + empty)


@pytest.mark.parametrize(
    ("layers", "sources", "expert", "word"), [(2, 1, 0, "layers"), (1, 2, 0, "sources"), (1, 1, 9, "expert 9")]
)
def test_sets_of_another_routing_are_refused(layers: int, sources: int, expert: int, word: str) -> None:
    sets_LS = ((TokenSets.of(np.array([[expert, 1]])),) * sources,) * layers
    with pytest.raises(CatalogueError, match=word):
        Routing(tokens_per_source=3, top_k=2, tokens_LSE=np.full((1, 3, 4), 1.5), sets_LS=sets_LS)


TRACE = Path(os.environ.get("MOEPLAN_SHARED", Path(__file__).parents[3] / "shared")) / "reference" / "traces"


@pytest.mark.skipif(not TRACE.is_dir(), reason="the recorded traces are not here; set MOEPLAN_SHARED")
@pytest.mark.parametrize(("blocks", "band"), [(2, 0.01), (4, 0.02), (8, 0.03)])
def test_the_law_comes_near_what_deepseek_v2_lite_was_seen_to_choose(blocks: int, band: float) -> None:
    """6 of 64 experts, 26 layers, 8,222 tokens of the recorded prompts."""
    options = {"path": str(TRACE / "deepseek_v2_lite_top6.npz"), "array": "topk_intent", "holds": "expert_ids"}
    routing = menu.load("routers", "trace", "route")(
        num_layers=26, num_experts=64, top_k=6, num_sources=2, tokens_per_source=1000, rng=np.random.default_rng(0),
        **options,
    )  # fmt: skip
    block_E = np.arange(64) * blocks // 64
    counted, expected = (reach_LSB(each, block_E) for each in (routing, replace(routing, sets_LS=None)))
    assert expected.mean() == pytest.approx(counted.mean(), rel=band)
