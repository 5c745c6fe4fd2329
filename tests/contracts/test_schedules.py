"""The laws of the schedules menu, on every schedule found there."""

import random
from collections import defaultdict
from collections.abc import Iterator
from types import ModuleType

import pytest

from moeplan import menu
from moeplan.errors import PlanError, SimulationError
from moeplan.schedules import Action, Order, Times, finish_times, in_flight

NAMES = menu.names("schedules")
LONGEST = 24


def legal(dish: ModuleType) -> Iterator[tuple[int, int, int]]:
    """Stages, micro-batches and chunks, up to a modest size, that the schedule's own check lets pass."""
    fewest, most = dish.CHUNKS
    for num_stages in (1, 2, 3, 4, 5, 6, 8):
        for num_microbatches in range(1, LONGEST + 1):
            for num_chunks in range(fewest, min(most or 3, 3) + 1):
                try:
                    dish.check(num_stages, num_microbatches, num_chunks=num_chunks)
                except PlanError:
                    continue
                yield num_stages, num_microbatches, num_chunks


def layout(dish: ModuleType, num_stages: int, num_chunks: int) -> list[list[int]]:
    """The virtual stage of each chunk of each stage."""
    return [
        [dish.virtual_stage(stage, chunk, num_stages=num_stages, num_chunks=num_chunks) for chunk in range(num_chunks)]
        for stage in range(num_stages)
    ]


def timed(dish: ModuleType, size: tuple[int, int, int], *costs_s: float, hop_s: float = 0.0) -> Times:
    """The schedule run with equal stages; `costs_s` are those of F, I and W."""
    num_stages, num_microbatches, num_chunks = size
    forward_s, input_s, weight_s = costs_s
    cost_s = {"F": forward_s, "B": input_s + weight_s, "I": input_s, "W": weight_s}
    return finish_times(
        dish.actions(num_stages, num_microbatches, num_chunks=num_chunks),
        virtual_stages=layout(dish, num_stages, num_chunks),
        durations_s=[[cost_s] * num_chunks] * num_stages,
        hop_s=hop_s,
    )


@pytest.fixture(params=NAMES)
def dish(request: pytest.FixtureRequest) -> ModuleType:
    """Each schedule on the menu."""
    return menu.module("schedules", request.param)


def test_every_schedule_is_legal_somewhere(dish: ModuleType) -> None:
    assert len(list(legal(dish))) >= 6


def test_every_microbatch_passes_every_virtual_stage_once_each_way(dish: ModuleType) -> None:
    for num_stages, num_microbatches, num_chunks in legal(dish):
        where = layout(dish, num_stages, num_chunks)
        seen = defaultdict(list)
        for stage, order in enumerate(dish.actions(num_stages, num_microbatches, num_chunks=num_chunks)):
            for action in (action for slot in order for action in slot):
                seen[where[stage][action.chunk], action.microbatch].append(action.kind)
        num_virtual = dish.num_virtual_stages(num_stages, num_chunks)
        assert set(seen) == {(v, m) for v in range(num_virtual) for m in range(num_microbatches)}
        assert all(sorted(kinds) in (["B", "F"], ["F", "I", "W"]) for kinds in seen.values())


def test_on_its_stage_forward_comes_before_backward_and_input_before_weight_gradient(dish: ModuleType) -> None:
    for num_stages, num_microbatches, num_chunks in legal(dish):
        for order in dish.actions(num_stages, num_microbatches, num_chunks=num_chunks):
            place = {action: index for index, slot in enumerate(order) for action in slot}
            for action, index in place.items():
                if action.kind in ("B", "I"):
                    assert place[action._replace(kind="F")] < index
                if action.kind == "W":
                    assert place[action._replace(kind="I")] < index


def test_a_slot_has_one_action_or_a_forward_and_another(dish: ModuleType) -> None:
    for num_stages, num_microbatches, num_chunks in legal(dish):
        slots = {slot for order in dish.actions(num_stages, num_microbatches, num_chunks=num_chunks) for slot in order}
        assert all(isinstance(action, Action) for slot in slots for action in slot)
        assert all(len(slot) == 1 or (len(slot) == 2 and slot[0].kind == "F" != slot[1].kind) for slot in slots)


def test_every_virtual_stage_is_held_by_as_many_stages_as_the_schedule_says(dish: ModuleType) -> None:
    for num_stages, _, num_chunks in legal(dish):
        held = sorted(v for stage in layout(dish, num_stages, num_chunks) for v in stage)
        assert held == sorted(list(range(dish.num_virtual_stages(num_stages, num_chunks))) * dish.COPIES)


def test_no_schedule_deadlocks_whatever_its_passes_cost(dish: ModuleType) -> None:
    rng = random.Random(0)
    for size in legal(dish):
        times = timed(dish, size, rng.random(), rng.random(), rng.random(), hop_s=rng.random())
        assert all(finish == sorted(finish) for finish in times.finish_s)


def test_no_stage_holds_more_than_its_limit(dish: ModuleType) -> None:
    for num_stages, num_microbatches, num_chunks in legal(dish):
        orders = dish.actions(num_stages, num_microbatches, num_chunks=num_chunks)
        for stage, order in enumerate(orders):
            limit = dish.in_flight_limit(stage, num_stages, num_microbatches, num_chunks=num_chunks)
            assert in_flight(order) <= limit
            assert in_flight(order) <= sum(in_flight(order, chunk) for chunk in range(num_chunks))


def test_a_step_is_never_shorter_than_the_work_of_a_stage_or_the_way_of_a_microbatch(dish: ModuleType) -> None:
    rng = random.Random(1)
    for size in legal(dish):
        num_stages, num_microbatches, num_chunks = size
        costs_s = [rng.random() for _ in "FIW"]
        step_s = timed(dish, size, *costs_s).step_s
        passes = num_microbatches * num_chunks / dish.COPIES
        assert step_s >= passes * sum(costs_s) - 1e-9
        assert step_s >= dish.num_virtual_stages(num_stages, num_chunks) * (costs_s[0] + costs_s[1]) - 1e-9


def test_a_slower_wire_never_makes_a_step_shorter(dish: ModuleType) -> None:
    for size in list(legal(dish))[::3]:
        steps_s = [timed(dish, size, 1.0, 1.2, 0.9, hop_s=hop_s).step_s for hop_s in (0.0, 0.1, 0.5)]
        assert steps_s == sorted(steps_s)


def test_the_closed_form_is_what_the_orders_take(dish: ModuleType) -> None:
    ratios = [
        (1, 1, 1),
        (2, 1, 1),
        (1, 2, 1),
        (1, 1, 2),
        (2, 2, 1),
        (3, 1, 1),
        (1, 3, 1),
        (4, 5, 3),
        (4, 4, 3),
        (5, 5, 0),
    ]
    for size in legal(dish):
        for forward_s, input_s, weight_s in ratios:
            ideal_s = dish.ideal_step_s(
                size[0], size[1], num_chunks=size[2],
                forward_s=forward_s, input_gradient_s=input_s, weight_gradient_s=weight_s,
            )  # fmt: skip
            if ideal_s is not None:
                assert timed(dish, size, forward_s, input_s, weight_s).step_s == pytest.approx(ideal_s, rel=1e-12)


@pytest.mark.parametrize(("stages", "microbatches"), [(0, 4), (-1, 4), (4, 0), (4, -8)])
def test_nothing_to_run_or_to_run_on_is_refused(dish: ModuleType, stages: int, microbatches: int) -> None:
    with pytest.raises(PlanError, match=r"schedule \w+: num_\w+: -?\d+ is not allowed, only .*; "):
        dish.check(stages, microbatches, num_chunks=dish.CHUNKS[0])


def test_chunks_outside_the_stated_range_are_refused(dish: ModuleType) -> None:
    fewest, most = dish.CHUNKS
    num_stages, num_microbatches, _ = list(legal(dish))[-1]
    for num_chunks in [fewest - 1, 0, -2, *([] if most is None else [most + 1])]:
        with pytest.raises(PlanError, match="num_chunks"):
            dish.actions(num_stages, num_microbatches, num_chunks=num_chunks)


@pytest.mark.parametrize(
    ("name", "size", "remedy"),
    [
        ("interleaved", (1, 4, 2), "2 or more, or schedule one_f_one_b"),
        ("interleaved", (4, 4, 1), "or use schedule one_f_one_b"),
        ("interleaved", (4, 6, 2), "use 4 or 8"),
        ("interleaved", (4, 3, 2), "use 4"),
        ("zbv", (4, 8, 1), "use 2, or schedule one_f_one_b"),
        ("zbv", (4, 8, 3), "use 2, or schedule interleaved"),
        ("one_f_one_b", (4, 8, 2), "use 1, or schedule interleaved"),
        ("dual_pipe", (3, 8, 2), "use 2 or 4"),
        ("dual_pipe", (4, 7, 2), "use 8"),
        ("dual_pipe", (4, 9, 2), "use 10"),
        ("dual_pipe", (4, 6, 2), "use 8"),
    ],
)
def test_a_refusal_says_what_would_do(name: str, size: tuple[int, int, int], remedy: str) -> None:
    with pytest.raises(PlanError, match=remedy):
        menu.module("schedules", name).check(size[0], size[1], num_chunks=size[2])


def test_orders_that_wait_for_each_other_are_named() -> None:
    first: Order = ((Action("B", 0, 0),), (Action("F", 0, 0),))
    second: Order = ((Action("F", 0, 0),), (Action("B", 0, 0),))
    cost_s = [{"F": 1.0, "B": 1.0}]
    with pytest.raises(SimulationError, match="deadlock: stage 0 at B of chunk 0, micro-batch 0; stage 1 at F"):
        finish_times([first, second], virtual_stages=[[0], [1]], durations_s=[cost_s, cost_s])
