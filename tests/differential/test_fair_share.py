"""Fair rates, and flows that come and go, against programs written for these tests alone: plain loops over flows."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pytest
import simpy
from hypothesis import given, settings
from hypothesis import strategies as st

from moeplan.domain.program import Exchange, Flows, Lane, Phase, Program, Rendezvous, Tasks
from moeplan.simulator.network import Network, max_min_rates


@dataclass(frozen=True)
class Net:
    """Flows by the links that each crosses, and the capacity of each link."""

    paths: tuple[tuple[int, ...], ...]
    capacity: tuple[float, ...]

    @property
    def crossing(self) -> np.ndarray:
        table = np.zeros((len(self.paths), len(self.capacity)))
        for flow, path in enumerate(self.paths):
            table[flow, list(path)] = 1.0
        return table


def filled_step_by_step(net: Net, active: Sequence[int]) -> dict[int, float]:
    """Textbook: raise all rates alike until a link is full; its flows stop; go on with the others."""
    rate = dict.fromkeys(active, 0.0)
    free, left = set(active), list(net.capacity)
    while free:
        users = {link: [flow for flow in free if link in net.paths[flow]] for link in range(len(left))}
        rise = min(left[link] / len(flows) for link, flows in users.items() if flows)
        for flow in free:
            rate[flow] += rise
        for link, flows in users.items():
            left[link] -= rise * len(flows)
        full = {link for link, flows in users.items() if flows and left[link] <= 1e-9 * net.capacity[link]}
        free = {flow for flow in free if full.isdisjoint(net.paths[flow])}
    return rate


@st.composite
def nets(draw: st.DrawFn) -> Net:
    num_links = draw(st.integers(1, 6))
    path = st.lists(st.integers(0, num_links - 1), min_size=1, max_size=4, unique=True).map(tuple)
    paths = draw(st.lists(path, min_size=1, max_size=8))
    capacity = draw(st.lists(st.sampled_from([1.0, 2.0, 3.0, 5.0, 7.5, 0.25]), min_size=num_links, max_size=num_links))
    return Net(tuple(paths), tuple(capacity))


@settings(derandomize=True, deadline=None, max_examples=300)
@given(nets())
def test_rates_are_those_of_progressive_filling(net: Net) -> None:
    found = max_min_rates(net.crossing, np.array(net.capacity))
    wanted = filled_step_by_step(net, range(len(net.paths)))
    assert found.tolist() == pytest.approx([wanted[flow] for flow in range(len(net.paths))], rel=1e-9)


@settings(derandomize=True, deadline=None, max_examples=300)
@given(nets())
def test_no_link_is_overfull_and_every_flow_has_a_full_link_on_which_none_has_more(net: Net) -> None:
    rates = max_min_rates(net.crossing, np.array(net.capacity))
    load = rates @ net.crossing
    assert (load <= np.array(net.capacity) * (1 + 1e-9)).all()
    for flow, path in enumerate(net.paths):
        narrow = [link for link in path if load[link] >= net.capacity[link] * (1 - 1e-9)]
        others = [max(rates[f] for f, other in enumerate(net.paths) if link in other) for link in narrow]
        assert any(rates[flow] >= most * (1 - 1e-9) for most in others)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(nets(), st.floats(0.1, 10.0))
def test_rates_scale_with_the_capacities_and_forget_the_order_of_flows(net: Net, factor: float) -> None:
    crossing, capacity = net.crossing, np.array(net.capacity)
    rates = max_min_rates(crossing, capacity)
    assert max_min_rates(crossing, capacity * factor) == pytest.approx(rates * factor)
    assert max_min_rates(crossing[::-1], capacity) == pytest.approx(rates[::-1])


@settings(derandomize=True, deadline=None, max_examples=100)
@given(nets())
def test_one_class_of_many_flows_gets_what_each_of_them_would_get(net: Net) -> None:
    """A class of n equal flows crosses each link n times; a class of n equal links stands for one of them."""
    several = np.repeat(net.crossing, 3, axis=0)
    each = max_min_rates(several, np.array(net.capacity))
    assert max_min_rates(3 * net.crossing, np.array(net.capacity)) == pytest.approx(each[::3])


def test_a_flow_over_no_link_has_no_limit() -> None:
    assert max_min_rates(np.array([[0.0], [1.0]]), np.array([2.0])).tolist() == [np.inf, 2.0]


# ---- flows that come and go


def program_of(net: Net, sizes: Sequence[float], latencies_s: Sequence[float]) -> Program:
    """One exchange of one flow on one lane for each path."""
    flows = Flows(
        share_C=np.ones(len(net.paths)), extra_bytes_C=np.zeros(len(net.paths)),
        count_C=np.ones(len(net.paths), np.int64), crossing_CK=net.crossing,
        capacity_bytes_per_s_K=np.array(net.capacity), link_kind_K=("wire",) * len(net.capacity),
        num_links_K=np.ones(len(net.capacity), np.int64), lanes_C=tuple((lane,) for lane in range(len(net.paths))),
    )  # fmt: skip
    none = np.zeros(0, np.int64)
    group = np.zeros((1, 2), np.int64)
    return Program(
        lanes=tuple(Lane(stage=0, ranks_R=np.array([rank])) for rank in range(len(net.paths))), works=(),
        exchanges=tuple(
            Exchange(kind="send", operation="send", algorithm="", groups_NG=group, size_bytes=size) for size in sizes
        ),
        meetings=tuple(
            Rendezvous(exchange=flow, lanes=(flow,), phases=(Phase(latency_s=latency_s, classes=(flow,)),))
            for flow, latency_s in enumerate(latencies_s)
        ),
        flows=flows, tasks=Tasks(**dict.fromkeys(Tasks.__slots__, none)), before_D=none, after_D=none,
        arbitration="fair", micro_op_bytes=1e9, step_tokens=1, model_flops=1.0, num_gpus=len(net.paths),
    )  # fmt: skip


def integrated(net: Net, sizes: Sequence[float], starts_s: Sequence[float]) -> list[float]:
    """When each flow ends: from event to event at the rates of the flows that are there."""
    left, done_s, now_s = list(sizes), [-1.0] * len(sizes), 0.0
    while -1.0 in done_s:
        active = [flow for flow in range(len(sizes)) if starts_s[flow] <= now_s and done_s[flow] < 0]
        rate = filled_step_by_step(net, active)
        coming = [start_s - now_s for start_s in starts_s if start_s > now_s]
        step_s = min([left[flow] / rate[flow] for flow in active] + coming)
        for flow in active:
            left[flow] -= rate[flow] * step_s
            if left[flow] <= 1e-9 * sizes[flow]:
                done_s[flow] = now_s + step_s
        reached = [start_s for start_s in starts_s if 0 < start_s - now_s <= step_s * (1 + 1e-12)]
        now_s = max([now_s + step_s, *reached])
    return done_s


def networked(net: Net, sizes: Sequence[float], begins_s: Sequence[float], latencies_s: Sequence[float]) -> list[float]:
    env = simpy.Environment()
    network, done_s = Network(env, program_of(net, sizes, latencies_s)), [-1.0] * len(sizes)

    def finished(meeting: int, lane: int) -> None:
        assert meeting == lane
        done_s[meeting] = env.now

    for flow, begin_s in enumerate(begins_s):
        env.timeout(begin_s).callbacks.append(lambda event, flow=flow: network.start(flow, finished))
    env.run()
    return done_s


@settings(derandomize=True, deadline=None, max_examples=200)
@given(nets(), st.randoms(use_true_random=False))
def test_flows_that_start_one_after_another_end_when_a_plain_integration_says(net: Net, random) -> None:  # type: ignore[no-untyped-def]
    sizes = [random.choice([1.0, 2.0, 3.5, 10.0]) for _ in net.paths]
    begins_s = [random.choice([0.0, 0.0, 0.5, 1.0, 2.25, 6.0]) for _ in net.paths]
    latencies_s = [random.choice([0.0, 0.125, 1.0]) for _ in net.paths]
    starts_s = [begin_s + latency_s for begin_s, latency_s in zip(begins_s, latencies_s, strict=True)]
    assert networked(net, sizes, begins_s, latencies_s) == pytest.approx(integrated(net, sizes, starts_s), rel=1e-8)


@settings(derandomize=True, deadline=None, max_examples=100)
@given(nets(), st.randoms(use_true_random=False))
def test_no_flow_ends_before_its_narrowest_link_would_let_it_alone(net: Net, random) -> None:  # type: ignore[no-untyped-def]
    sizes = [random.uniform(0.1, 9.0) for _ in net.paths]
    begins_s = [random.uniform(0.0, 5.0) for _ in net.paths]
    done_s = networked(net, sizes, begins_s, [0.25] * len(sizes))
    for flow, path in enumerate(net.paths):
        alone_s = 0.25 + sizes[flow] / min(net.capacity[link] for link in path)
        assert done_s[flow] >= begins_s[flow] + alone_s * (1 - 1e-9)


def test_two_flows_on_one_wire_each_get_half_while_both_are_there() -> None:
    net = Net(((0,), (0,)), (2.0,))
    assert networked(net, [4.0, 4.0], [0.0, 1.0], [0.0, 0.0]) == pytest.approx([3.0, 4.0])
