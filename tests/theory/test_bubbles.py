"""Pipeline bubbles and memory against the formulas of the papers, written out here a second time."""

from collections.abc import Callable, Iterator, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan import menu
from moeplan.schedules import Order, Slot, Times, awaiting_weight_gradient, finish_times, in_flight, peak_held

Costs = tuple[float, float, float]
GRID = [(p, m) for p in (2, 3, 4, 6, 8) for m in (1, 2, 3, 4, 5, 7, 8, 12, 16, 24)]
RATIOS: list[Costs] = [
    (1, 1, 1), (2, 1, 1), (1, 2, 1), (1, 1, 2), (1, 2, 2), (2, 2, 1), (2, 1, 2), (3, 1, 1), (1, 3, 1), (1, 1, 3),
    (4, 5, 3), (4, 4, 3), (3, 4, 4), (5, 5, 1), (0.25, 0.5, 0.125),
]  # fmt: skip


def orders(name: str, p: int, m: int, v: int) -> tuple[Order, ...]:
    return menu.load("schedules", name, "actions")(p, m, num_chunks=v)


def run(
    name: str,
    p: int,
    m: int,
    v: int,
    costs: Costs,
    *,
    hop_s: float = 0.0,
    pair_s: Callable[[int, Slot], Sequence[Sequence[float]]] | None = None,
) -> Times:
    where = menu.load("schedules", name, "virtual_stage")
    forward_s, input_s, weight_s = costs
    cost_s = {"F": forward_s, "B": input_s + weight_s, "I": input_s, "W": weight_s}
    return finish_times(
        orders(name, p, m, v),
        virtual_stages=[[where(stage, chunk, num_stages=p, num_chunks=v) for chunk in range(v)] for stage in range(p)],
        durations_s=[[cost_s] * v] * p,
        hop_s=hop_s,
        pair_s=pair_s,
    )


def ideal(name: str, p: int, m: int, v: int, costs: Costs) -> float | None:
    form = menu.load("schedules", name, "ideal_step_s")
    return form(p, m, num_chunks=v, forward_s=costs[0], input_gradient_s=costs[1], weight_gradient_s=costs[2])


def cases(*, at_least: int = 1, even: bool = False) -> Iterator[tuple[int, int, Costs]]:
    for p, m in GRID:
        if m >= at_least * p and not (even and (p % 2 or m % 2)):
            yield from ((p, m, costs) for costs in RATIOS)


@pytest.mark.parametrize("name", ["gpipe", "one_f_one_b"])
def test_gpipe_and_1f1b_have_a_bubble_of_p_minus_1_pairs(name: str) -> None:
    for p, m in [(1, 1), (1, 5), *GRID]:
        for costs in RATIOS:
            expected = m * sum(costs) + (p - 1) * sum(costs)
            assert run(name, p, m, 1, costs).step_s == pytest.approx(expected, rel=1e-12)
            assert ideal(name, p, m, 1, costs) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("chunks", [2, 3, 5])
def test_interleaving_divides_the_bubble_by_the_chunks(chunks: int) -> None:
    for p, m, costs in cases():
        if m % p == 0:
            stage_s = chunks * sum(costs)
            expected = m * stage_s + (p - 1) * stage_s / chunks
            assert run("interleaved", p, m, chunks, costs).step_s == pytest.approx(expected, rel=1e-12)
            assert ideal("interleaved", p, m, chunks, costs) == pytest.approx(expected, rel=1e-12)


def test_zb_h1_takes_two_weight_gradients_a_stage_out_of_the_bubble_of_1f1b() -> None:
    for p, m, (f, i, w) in cases(at_least=1):
        step_s, formula_s = run("zero_bubble", p, m, 1, (f, i, w)).step_s, ideal("zero_bubble", p, m, 1, (f, i, w))
        if w <= min(f, i):
            expected = m * (f + i + w) + (p - 1) * (f + i - w)
            assert step_s == pytest.approx(expected, rel=1e-12)
            assert formula_s == pytest.approx(expected, rel=1e-12)
        else:
            assert formula_s is None
            assert step_s < run("one_f_one_b", p, m, 1, (f, i, w)).step_s


def test_zb_h1_with_fewer_microbatches_than_stages_fills_as_much_as_it_has() -> None:
    for p, m in GRID:
        if m < p:
            for f, i, w in RATIOS:
                expected = (m + p - 1) * (f + i) + w
                formula_s = ideal("zero_bubble", p, m, 1, (f, i, w))
                assert formula_s == (None if w > min(f, i) else pytest.approx(expected, rel=1e-12))


def test_zbv_has_no_bubble_on_any_stage_where_all_passes_take_as_long() -> None:
    for p, m in GRID:
        times = run("zbv", p, m, 2, (1, 1, 1))
        formula_s = ideal("zbv", p, m, 2, (1, 1, 1))
        assert (formula_s is None) == (m < 2 * p - 1)
        if formula_s is not None:
            spans_s = [finish[-1] - start[0] for start, finish in zip(times.start_s, times.finish_s, strict=True)]
            assert spans_s == [2 * m * 3.0] * p
            assert times.step_s == formula_s == 2 * m * 3.0 + p - 1


def test_dual_pipe_has_the_bubble_of_its_report() -> None:
    for p, m, (f, i, w) in cases(at_least=2, even=True):
        b = i + w
        step_s, formula_s = run("dual_pipe", p, m, 2, (f, i, w)).step_s, ideal("dual_pipe", p, m, 2, (f, i, w))
        if p == 2 or (f == i and w <= f):
            expected = m * (f + b) + (p / 2 - 1) * ((f + b) + b - 3 * w)
            assert step_s == pytest.approx(expected, rel=1e-12)
            assert formula_s == pytest.approx(expected, rel=1e-12)
        else:
            assert formula_s is None


@settings(derandomize=True, deadline=None, max_examples=60)
@given(st.sampled_from([2, 4, 6, 8]), st.integers(1, 4), st.floats(0.1, 10), st.floats(0.0, 1.0))
def test_closed_forms_hold_at_any_scale_of_time(p: int, groups: int, f: float, share: float) -> None:
    m = 2 * p * groups
    for name, v in [("one_f_one_b", 1), ("interleaved", 2), ("zero_bubble", 1), ("dual_pipe", 2)]:
        costs = (f, f, share * f)
        assert run(name, p, m, v, costs).step_s == pytest.approx(ideal(name, p, m, v, costs), rel=1e-9)


def test_where_passes_take_as_long_the_published_order_of_schedules_holds() -> None:
    one_chunk, two_chunks = (1.0, 1.0, 1.0), (0.5, 0.5, 0.5)
    for p, m in [(4, 8), (4, 16), (8, 16), (8, 24)]:
        steps_s = [
            run("gpipe", p, m, 1, one_chunk).step_s,
            run("one_f_one_b", p, m, 1, one_chunk).step_s,
            run("interleaved", p, m, 2, two_chunks).step_s,
            run("zero_bubble", p, m, 1, one_chunk).step_s,
            run("zbv", p, m, 2, two_chunks).step_s,
        ]
        assert steps_s == sorted(steps_s, reverse=True)
        assert run("dual_pipe", p, m, 2, one_chunk).step_s < steps_s[3]


def test_what_overlap_hides_comes_off_the_step() -> None:
    def hides(stage: int, slot: Slot) -> list[list[float]]:
        return [[2.0, 2.0], [2.0, 2.0]]

    for p, m in [(2, 8), (4, 8), (8, 32)]:
        hidden_s = run("dual_pipe", p, m, 2, (1, 1, 1), pair_s=hides).step_s
        shown_s = run("dual_pipe", p, m, 2, (1, 1, 1)).step_s
        pairs = min(sum(len(slot) == 2 for slot in order) for order in orders("dual_pipe", p, m, 2))
        assert hidden_s == pytest.approx(shown_s - pairs, abs=2 * p)
        assert hidden_s < shown_s


def test_a_single_microbatch_pays_every_hop_there_and_back() -> None:
    for p in (1, 2, 5):
        assert run("gpipe", p, 1, 1, (1, 1, 1), hop_s=0.25).step_s == pytest.approx(3 * p + 2 * (p - 1) * 0.25)


def test_the_turn_of_the_v_crosses_no_wire() -> None:
    for p in (2, 4):
        step_s, free_s = (run("zbv", p, 1, 2, (1, 1, 1), hop_s=hop_s).step_s for hop_s in (0.25, 0.0))
        assert step_s - free_s == pytest.approx(4 * (p - 1) * 0.25)


def test_1f1b_holds_one_microbatch_less_on_each_further_stage() -> None:
    for p, m in GRID:
        assert [in_flight(order) for order in orders("one_f_one_b", p, m, 1)] == [min(m, p - s) for s in range(p)]


def test_gpipe_holds_every_microbatch() -> None:
    for p, m in GRID:
        assert {in_flight(order) for order in orders("gpipe", p, m, 1)} == {m}


def test_zb_h1_holds_everywhere_what_1f1b_holds_on_its_first_stage() -> None:
    for p, m in GRID:
        for s, order in enumerate(orders("zero_bubble", p, m, 1)):
            assert in_flight(order) == min(m, p)
            assert peak_held(order, activation=[1], weight_input=[0]) == min(m, p - s)
            assert awaiting_weight_gradient(order) == min(m, s + 1)


def test_zbv_holds_everywhere_what_1f1b_holds_on_its_first_stage() -> None:
    for p, m in GRID:
        assert {in_flight(order) for order in orders("zbv", p, m, 2)} <= set(range(2 * min(m, p) + 1))
        if m >= 2 * p:
            assert {in_flight(order) for order in orders("zbv", p, m, 2)} == {2 * p}


def test_interleaving_holds_what_megatron_reports() -> None:
    for p, m, v in [(4, 8, 2), (4, 16, 3), (8, 16, 4)]:
        held = [in_flight(order) for order in orders("interleaved", p, m, v)]
        assert held == [min(m * v, 2 * (p - s - 1) + (v - 1) * p + 1) for s in range(p)]
        # Narayanan et al. 2021: the first stage's memory grows by 1 + (p - 1) / (p v) over that of 1F1B.
        assert (held[0] + 1) / v == pytest.approx(p * (1 + (p - 1) / (p * v)), abs=1 / v)


def test_dual_pipe_holds_p_plus_1_passes_on_every_stage() -> None:
    for p in (2, 4, 8, 16):
        assert {in_flight(order) for order in orders("dual_pipe", p, 2 * p + 4, 2)} == {p + 1}


def test_dual_pipe_feeds_each_half_of_the_microbatches_from_its_own_end() -> None:
    first, *_, last = orders("dual_pipe", 4, 12, 2)
    assert first[0][0][1:] == (0, 0)
    assert last[0][0][1:] == (1, 6)


def test_finish_times_of_a_two_stage_pipeline_by_hand() -> None:
    times = run("one_f_one_b", 2, 2, 1, (1, 1, 1), hop_s=0.5)
    assert times.start_s == [[0.0, 1.0, 5.0, 8.0], [1.5, 2.5, 4.5, 5.5]]
    assert times.finish_s == [[1.0, 2.0, 7.0, 10.0], [2.5, 4.5, 5.5, 7.5]]
