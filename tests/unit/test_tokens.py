"""Forced experts: whole counts as near as can be to what is expected, and rows as the program has them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moeplan import catalogue
from moeplan.compiler.tokens import NOBODY, choices_of, rounded_SE, token_numbers_T
from moeplan.domain.plan import Plan
from moeplan.partition.ranks import coordinate
from moeplan.partition.route import Tokens, load_of


@given(
    sources=st.integers(1, 6), experts=st.integers(2, 12), top_k=st.integers(1, 2), tokens=st.integers(1, 50),
    seed=st.integers(0, 100),
)  # fmt: skip
def test_rounding_sends_every_token_and_hands_on_what_it_rounds_off(
    sources: int, experts: int, top_k: int, tokens: int, seed: int
) -> None:
    weight_SE = np.random.default_rng(seed).dirichlet(np.ones(experts), size=sources)
    exact_SE = np.minimum(weight_SE * tokens * top_k, tokens)
    exact_SE += (tokens * top_k - exact_SE.sum(axis=1, keepdims=True)) / experts
    if exact_SE.max() > tokens:
        return
    whole_SE = rounded_SE(exact_SE, tokens * top_k, tokens)
    assert (whole_SE.sum(axis=1) == tokens * top_k).all()
    assert 0 <= whole_SE.min() <= whole_SE.max() <= tokens
    assert np.abs(whole_SE.sum(axis=0) - exact_SE.sum(axis=0)).max() < 2
    assert (rounded_SE(whole_SE, tokens * top_k, tokens) == whole_SE).all()


PLANS = [
    {"dp": 4, "ep": 4},
    {"dp": 4, "ep": 2, "etp": 2, "overlap_degree": 3},
    {"dp": 4, "ep": 2, "capacity": {"rule": "drop", "factor": 1.0}},
    {"dp": 4, "ep": 4, "capacity": {"rule": "pad", "factor": 1.25}, "overlap_degree": 4},
    {"dp": 4, "ep": 2, "placement": {"experts": [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1]] * 4}},
    {"dp": 1, "tp": 2, "cp": 2, "ep": 4},
]


@pytest.mark.parametrize("number", range(len(PLANS)))
@pytest.mark.parametrize("router", ["multinomial", "balanced"])
def test_rows_are_those_that_the_program_computes_with(number: int, router: str) -> None:
    scenario = catalogue.load(_document(router))
    plan = Plan(stages=(4,), **PLANS[number])  # type: ignore[arg-type]
    choices, load = choices_of(plan, scenario), load_of(
        scenario, plan, rank_tokens=Tokens.of(plan, scenario.workload).rank
    )  # fmt: skip
    assert choices is not None
    assert load is not None
    for moe, rows in enumerate(choices.layers):
        for place in range(plan.ep):
            for part in range(plan.overlap_degree):
                found = np.concatenate([rows.received(place, owner, part) for owner in range(plan.etp)])
                counts = np.bincount(rows.slots(found), minlength=rows.columns_per_place)
                assert tuple(counts.tolist()) == load.rows(moe, place, part=part, parts=plan.overlap_degree)


def _document(router: str) -> dict[str, object]:
    return dict(catalogue.document("tiny-moe-4-ranks")) | {"routing": {"router": router}}


@pytest.mark.parametrize("number", range(len(PLANS)))
def test_no_token_picks_an_expert_twice_and_every_row_has_its_token(number: int) -> None:
    scenario, plan = catalogue.load(_document("multinomial")), Plan(stages=(4,), **PLANS[number])  # type: ignore[arg-type]
    choices = choices_of(plan, scenario)
    assert choices is not None
    for position in range(4):
        chosen_TK, kept_TK = choices.experts_TK(0, 0, position)
        assert (np.diff(np.sort(chosen_TK, axis=1), axis=1) > 0).all()
        assert chosen_TK.min() >= 0
        assert ((kept_TK == chosen_TK) | (kept_TK == NOBODY)).all()
        rows, (source, owner) = choices.layers[0], (coordinate(plan, axis)[position] for axis in ("ep", "etp"))
        real = (rows.token_N != NOBODY) & (rows.source_N == source) & (rows.owner_N == owner)
        assert real.sum() == (kept_TK != NOBODY).sum()
        assert (plan.capacity.rule == "dropless") <= (kept_TK == chosen_TK).all()


@pytest.mark.parametrize("options", [{"dp": 4}, {"dp": 2, "tp": 2}, {"dp": 1, "tp": 2, "cp": 2}, {"dp": 2, "cp": 2}])
def test_every_token_of_the_batch_is_on_one_rank(options: dict[str, int]) -> None:
    scenario, plan = catalogue.load("tiny-moe-4-ranks"), Plan(stages=(4,), micro_batch=2, **options)  # type: ignore[arg-type]
    numbers = [
        token_numbers_T(plan, scenario, position=position, microbatch=microbatch)
        for position in range(4)
        for microbatch in range(plan.num_microbatches(scenario.workload.global_batch))
    ]
    assert np.sort(np.concatenate(numbers)).tolist() == list(range(scenario.workload.step_tokens))
