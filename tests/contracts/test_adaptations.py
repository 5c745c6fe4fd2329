"""The laws of the adaptations menu on every policy found there, alone and in a replay of a trace that drifts."""

from __future__ import annotations

import inspect
from functools import cache
from itertools import pairwise
from typing import Any

import numpy as np
import pytest

import moeplan as mp
from moeplan import menu
from moeplan.adaptations import Decision, Seen
from moeplan.domain.placement import Floats, LayerPlacement
from moeplan.errors import PlanError

NAMES = menu.names("adaptations")
BUDGETS = [None, 2]
GPUS, SLOTS, STEPS = 4, 12, 7


@cache
def drifting() -> Floats:
    """Counts [step, layer, source, expert] of a run without balancing loss, early, where routing drifts most."""
    route = menu.load("routers", "drifting", "route")
    rows = [
        route(
            num_layers=3, num_experts=10, top_k=2, num_sources=2, tokens_per_source=500,
            rng=np.random.default_rng(4), iteration=51 + 150 * step,
        ).tokens_LSE
        for step in range(STEPS)
    ]  # fmt: skip
    return np.array(rows, np.float64)


def takes(name: str) -> set[str]:
    """The options of a policy."""
    return set(inspect.signature(menu.load("adaptations", name, "decide")).parameters) - {"seen"}


def replayed(name: str, trace: Floats, max_moves: int | None = None, **more: Any) -> mp.PolicyReplay:
    """One policy on a trace, with a budget if it knows one."""
    budget = {} if max_moves is None or "max_moves" not in takes(name) else {"max_moves": max_moves}
    (found,) = mp.replay(trace, policy=name, gpus=GPUS, slots=SLOTS, **budget, **more).policies
    return found


def seen(costs: list[float], *, placed_step: int = 0, promised_cost: float = 1.0, move_s: float | None = None) -> Seen:
    """A layer of four experts on two GPUs, with such costs so far."""
    tokens_TSE = np.ones((len(costs), 1, 4))
    tokens_TSE.setflags(write=False)
    cost_T = np.array(costs)
    cost_T.setflags(write=False)
    return Seen(
        tokens_TSE=tokens_TSE, cost_T=cost_T, num_gpus=2, placement=LayerPlacement.even([0, 1, 2, 3], [0, 0, 1, 1]),
        placed_step=placed_step, promised_cost=promised_cost, move_s=move_s,
    )  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_every_policy_says_what_it_does_and_its_options_have_defaults(name: str) -> None:
    first, *options = inspect.signature(menu.load("adaptations", name, "decide")).parameters.values()
    assert first.name == "seen"
    assert all(each.kind is each.KEYWORD_ONLY and each.default is not each.empty for each in options)
    assert menu.about("adaptations", name).endswith(".")


@pytest.mark.parametrize("name", NAMES)
def test_a_decision_depends_on_what_was_seen_alone(name: str) -> None:
    decide = menu.load("adaptations", name, "decide")
    for costs in ([1.0, 1.0], [1.0, 1.5], [1.0, 1.0, 1.2, 0.9, 2.0, 3.0]):
        first = decide(seen(costs))
        assert isinstance(first, Decision)
        assert decide(seen(costs)) == first


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_moves", BUDGETS)
def test_no_policy_beats_the_oracle(name: str, max_moves: int | None) -> None:
    found = replayed(name, drifting(), max_moves)
    assert found.regret == pytest.approx(found.total / found.oracle - 1, abs=1e-12)
    assert found.total >= found.oracle * (1 - 1e-9)
    assert (found.ratio_TL >= 1 - 1e-9).all()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_moves", BUDGETS)
def test_tokens_are_conserved(name: str, max_moves: int | None) -> None:
    """The fullest GPU over the ratio is the mean GPU, of which there are as many as GPUs."""
    found = replayed(name, drifting(), max_moves)
    assert found.value_TL / found.ratio_TL * GPUS == pytest.approx(drifting().sum(axis=(2, 3))[1:])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_moves", BUDGETS)
def test_where_every_step_is_like_the_first_nothing_moves(name: str, max_moves: int | None) -> None:
    constant = np.repeat(drifting()[:1], STEPS, axis=0)
    found, stays = replayed(name, constant, max_moves), replayed("static", constant)
    assert not found.moves_TL.any()
    assert np.array_equal(found.value_TL, stays.value_TL)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("max_moves", BUDGETS)
def test_what_comes_later_changes_nothing_before(name: str, max_moves: int | None) -> None:
    """So no step is scored on a placement that knew it."""
    whole, other = replayed(name, drifting(), max_moves), drifting().copy()
    other[4:] = other[4:, ..., ::-1]
    half = replayed(name, other, max_moves)
    assert np.array_equal(half.value_TL[:3], whole.value_TL[:3])
    assert np.array_equal(half.moves_TL[:4], whole.moves_TL[:4])


@pytest.mark.parametrize("name", NAMES)
def test_the_same_trace_gives_the_same_replay(name: str) -> None:
    first, again = (replayed(name, drifting(), 2).record() for _ in range(2))
    assert first == again


@pytest.mark.parametrize("name", NAMES)
def test_a_budget_is_kept_in_every_layer_and_step(name: str) -> None:
    if "max_moves" in takes(name):
        assert replayed(name, drifting(), 2).moves_TL.max() <= 2


@pytest.mark.parametrize("name", NAMES)
def test_nothing_moves_where_nothing_is_placed_anew(name: str) -> None:
    found = replayed(name, drifting())
    assert not found.moves_TL[~found.is_replaced_TL].any()
    assert not found.is_replaced_TL[0].any(), "the first scored step is under the placement of the step before"


@pytest.mark.parametrize("name", NAMES)
def test_a_window_looks_further_back_and_still_not_ahead(name: str) -> None:
    if "window" not in takes(name):
        return
    constant, other = np.repeat(drifting()[:1], STEPS, axis=0), drifting().copy()
    assert not replayed(name, constant, window=3).moves_TL.any()
    other[4:] = other[4:, ..., ::-1]
    whole, half = (replayed(name, trace, window=3) for trace in (drifting(), other))
    assert np.array_equal(half.value_TL[:3], whole.value_TL[:3])


def test_static_never_moves() -> None:
    assert not replayed("static", drifting()).is_replaced_TL.any()


def test_every_places_anew_at_each_step() -> None:
    assert replayed("every", drifting()).is_replaced_TL[1:].all()


def test_periodic_places_anew_once_in_a_period() -> None:
    at = np.flatnonzero(replayed("periodic", drifting(), every=2).is_replaced_TL[:, 0])
    assert at.tolist() == [2, 4]
    assert all(later - before == 2 for before, later in pairwise(at))
    assert replayed("periodic", drifting(), every=1).record()["moves"] == replayed("every", drifting()).moves_TL.sum()


def test_threshold_moves_less_the_higher_it_is() -> None:
    counts = [replayed("threshold", drifting(), threshold=at).is_replaced_TL.sum() for at in (0.0, 0.05, 0.5, 100.0)]
    assert counts == sorted(counts, reverse=True)
    assert counts[0] > 0 == counts[-1]


def test_threshold_looks_at_what_was_promised_and_not_at_what_is_ideal() -> None:
    decide = menu.load("adaptations", "threshold", "decide")
    assert not decide(seen([3.0, 3.2], promised_cost=3.0)).replaces
    assert decide(seen([3.0, 3.4], promised_cost=3.0)).replaces
    assert decide(seen([3.0, 3.4], promised_cost=3.0), max_moves=5) == Decision(replaces=True, max_moves=5)


@pytest.mark.parametrize(
    ("options", "move_s"),
    [
        ({"move_cost": 1.25}, None),  # four replicas, 1.25 each
        ({"move_cost": 2.5, "max_moves": 2}, None),
        ({"move_cost": 1.25, "max_moves": 7}, None),
        ({}, 5.0),  # two on each GPU, 5 / 2 of a balanced step each
        ({"max_moves": 1}, 10.0),
    ],
)
def test_payback_places_anew_where_ten_steps_lose_more_than_the_moves_cost(
    options: dict[str, Any], move_s: float | None
) -> None:
    """Of ten steps each loses 0.5: that is worth 5, and no more."""
    decide = menu.load("adaptations", "payback", "decide")
    last = seen([1.0, 1.5], move_s=move_s)
    assert not decide(last, **options).replaces
    assert decide(last, horizon=11, **options) == Decision(replaces=True, max_moves=options.get("max_moves"))
    if move_s is not None:
        assert decide(seen([1.0, 1.5], move_s=0.99 * move_s), **options).replaces
    else:
        assert decide(last, **(options | {"move_cost": 0.99 * options["move_cost"]})).replaces


def test_payback_looks_at_the_last_steps_under_the_present_placement_alone() -> None:
    decide = menu.load("adaptations", "payback", "decide")
    assert not decide(seen([1.0, 9.0, 9.0, 1.0], placed_step=2), window=3).replaces
    noisy = seen([1.0, 1.0, 1.0, 1.4])
    assert decide(noisy, move_cost=0.5).replaces
    assert not decide(noisy, move_cost=0.5, window=3).replaces


def test_payback_moves_more_the_longer_it_looks_ahead_and_less_the_more_a_move_costs() -> None:
    ahead, cost = (
        [int(replayed("payback", drifting(), **{name: each}).is_replaced_TL.sum()) for each in many]
        for name, many in (("horizon", (1, 3, 30)), ("move_cost", (0.0, 0.05, 100.0)))
    )
    assert ahead == sorted(ahead)
    assert cost == sorted(cost, reverse=True)
    assert cost[0] > 0 == cost[-1]


@pytest.mark.parametrize(
    ("options", "move_s", "says"),
    [
        ({"horizon": 0}, None, "horizon: 0 steps"),
        ({"move_cost": -1.0}, None, "move_cost: -1.0"),
        ({"move_cost": float("nan")}, None, "move_cost: nan"),
        ({"move_cost": 0.1}, 1.0, "has no effect where a scenario says"),
    ],
)
def test_payback_refuses_what_says_nothing(options: dict[str, Any], move_s: float | None, says: str) -> None:
    with pytest.raises(PlanError, match=says):
        menu.load("adaptations", "payback", "decide")(seen([1.0, 1.5], move_s=move_s), **options)
