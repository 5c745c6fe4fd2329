"""The clock of limits of time stands still while functions are compiled. Time here is a number that the tests set."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from numba.core.event import Event, Listener, install_listener, trigger_event

from moeplan import jit, placers
from moeplan.domain.placement import PlacementProblem
from moeplan.placers import _balance, local_search


class Clock:
    """Seconds that go on only where a test says so."""

    now_s = 0.0

    def __call__(self) -> float:
        return self.now_s


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    found = Clock()
    monkeypatch.setattr(jit, "perf_counter", found)
    return found


@contextmanager
def slow_compiler(clock: Clock) -> Iterator[list[str]]:
    """Every function that is compiled takes 1000 s more; yields what was compiled."""
    names = []

    class Slow(Listener):
        def on_start(self, event: Event) -> None:
            names.append(event.data["dispatcher"].py_func.__name__)
            clock.now_s += 1000.0

        def on_end(self, event: Event) -> None:
            pass

    with install_listener("numba:compile", Slow()):
        yield names


def test_the_clock_goes_on_with_time(clock: Clock) -> None:
    start_s = jit.clock_s()
    clock.now_s += 7.0
    assert jit.clock_s() - start_s == 7.0


def test_the_clock_stands_still_while_a_function_and_those_that_it_calls_are_compiled(clock: Clock) -> None:
    @jit.njit
    def inner(x: float) -> float:
        return x + 1

    @jit.njit
    def outer(x: float) -> float:
        return inner(x) + inner(2 * x)

    start_s = jit.clock_s()
    with slow_compiler(clock) as names:
        assert outer(1.0) == 5.0
    assert sorted(set(names)) == ["inner", "outer"]
    assert clock.now_s >= 2000.0
    assert jit.clock_s() == pytest.approx(start_s)


def test_a_placer_that_compiles_has_as_much_time_as_one_that_need_not(
    clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each walk takes a thousand times the limit. Where the compiler took it all walks are walked, else one."""
    problem = PlacementProblem(tokens_SE=np.random.default_rng(3).lognormal(0, 1.5, 24), num_gpus=8, slots=32)
    walk, walks = _balance.annealed, []

    def placed(before: Callable[[], None]) -> tuple[int, float]:
        def slow_walk(*given: object) -> object:
            walks.append(before())
            return walk(*given)  # type: ignore[arg-type]

        walks.clear()
        monkeypatch.setattr(_balance, "annealed", slow_walk)
        found = local_search.place(problem, rng=np.random.default_rng(0), time_limit_s=1.0, gap=0.0)
        return len(walks), found.seconds

    def compiling() -> None:
        with trigger_event("numba:compiler_lock"):
            clock.now_s += 1000.0

    def working() -> None:
        clock.now_s += 1000.0

    quick, by_compiler, by_work = (placed(each) for each in (lambda: None, compiling, working))
    assert by_compiler == pytest.approx(quick, abs=1e-6)
    assert quick[0] > by_work[0] == 1
    assert (quick[1], by_work[1]) == pytest.approx((0.0, 1000.0))


def test_no_placer_looks_at_another_clock() -> None:
    for path in Path(placers.__file__).parent.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "perf_counter" not in text, path.name
        assert "import time" not in text, path.name
