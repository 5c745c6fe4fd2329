"""Makes `cases.json.gz`: flows on random networks, and when each of them ends according to SimGrid.

    python tests/data/simgrid/make.py       some Python must import simgrid (on Debian: apt-get install python3-simgrid)

The settings that leave SimGrid nothing but max-min fair sharing stand in `benchmarks/simgrid_runs.py`. A case is made
of a network, a law of sizes, a law of starts and a kind, with its name as the seed. No link has latency. Where flows
have weights or caps, SimGrid is given one more link for each, which that flow alone crosses: as fast as its cap, with a
latency of UNIT_S / weight, since SimGrid makes a flow's weight 1 / latency. The file tells of weights and caps, not of
these links.

Axes: K links, F flows; F1 where the links of each flow begin, and their end.
"""

from __future__ import annotations

import gzip
import json
import sys
from collections.abc import Callable, Iterator
from itertools import accumulate, chain, product
from math import inf, isqrt
from pathlib import Path
from random import Random
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[3] / "benchmarks"))

from networks import BASE_BYTES_PER_S, NETWORKS, Network, Route
from simgrid_runs import Job, run

MOST_FLOWS = 400
MEAN_BYTES = 1e8
"""A second for a flow that is alone: SimGrid takes for one what ends within 1e-12 s."""
UNIT_S = 2.0**-10
LEAST_WEIGHT = 0.25
TIED = 100
KINDS = ("capped", "weighted", "both")
SIZES: dict[str, Callable[[Random], float]] = {
    "equal": lambda rng: 1.0,
    "own": lambda rng: 0.5 + rng.random(),
    "heavy": lambda rng: min(100.0, 0.2 * (1.0 - rng.random()) ** (-1 / 1.2)),
    "tiny": lambda rng: rng.choice((1.0, 1e-3, 1e-6, 1e-8)) * rng.random(),
}
"""Sizes as multiples of their mean."""
STARTS: dict[str, Callable[[Random], float]] = {
    "together": lambda rng: 0.0,
    "spread": lambda rng: rng.random(),
    "waves": lambda rng: rng.randrange(4) / 4,
    "late": lambda rng: 4 * rng.random(),
}
"""Starts as multiples of the time that the busiest link needs; late: most flows are alone."""
Case = dict[str, Any]


def main() -> None:
    """Writes the file: the same bytes each time, one case a line."""
    cases, last = [], None
    for name in names():
        case = drawn(name)
        last = run(as_job(case))
        assert last is not None
        cases.append(case | {"finish_s_F": last.finish_s_F.tolist()})
        print(name, len(last.finish_s_F), file=sys.stderr)
    assert last is not None
    head = json.dumps({"simgrid": last.simgrid, "settings": last.settings})
    lines = ",\n".join(json.dumps(case) for case in cases)
    text = f'{head[:-1]}, "cases": [\n{lines}\n]}}\n'
    Path(__file__).with_name("cases.json.gz").write_bytes(gzip.compress(text.encode(), mtime=0))


def names() -> Iterator[str]:
    """Each network with each law of sizes and of starts; with weights and caps a few of these; and ties."""
    for network in NETWORKS:
        yield from (f"{network}-plain-{sizes}-{starts}" for sizes, starts in product(SIZES, STARTS))
        for shift, kind in enumerate(KINDS):
            starts = [*STARTS][shift:] + [*STARTS][:shift]
            yield from (f"{network}-{kind}-{one}-{other}" for one, other in zip(SIZES, starts, strict=True))
    yield from (f"tied-{number}" for number in range(TIED))


def drawn(name: str) -> Case:
    """The flows of a case. No weights, no caps: null; a flow without a cap among others with one: null, too."""
    rng = Random(name)
    return {"name": name} | (tied(rng) if name.startswith("tied") else varied(rng, *name.split("-")))


def varied(rng: Random, network: str, kind: str, sizes: str, starts: str) -> Case:
    """Flows by the laws of that name."""
    net = NETWORKS[network](rng)
    path_F = [net.draw() for _ in range(round(MOST_FLOWS ** rng.random()))]
    size_bytes_F = [max(1, round(MEAN_BYTES * SIZES[sizes](rng))) for _ in path_F]
    first_s = UNIT_S / LEAST_WEIGHT if kind in ("weighted", "both") else 0.0
    span_s = port_bound_s(net, path_F, size_bytes_F)
    return {
        "capacity_bytes_per_s_K": net.capacity_bytes_per_s_K,
        "path_F": path_F,
        "size_bytes_F": size_bytes_F,
        "start_s_F": [first_s + span_s * STARTS[starts](rng) for _ in path_F],
        "weight_F": weights(rng, len(path_F)) if kind in ("weighted", "both") else None,
        "rate_cap_bytes_per_s_F": caps(rng, net, path_F) if kind in ("capped", "both") else None,
    }


def tied(rng: Random) -> Case:
    """Small whole numbers of everything, so that much happens at one instant and many links are full at one level."""
    links, flows = rng.randint(1, 12), rng.randint(2, 60)
    most = rng.randint(1, min(links, 6))
    weight_F = [float(rng.randint(1, 4)) for _ in range(flows)]
    quarters = [rng.choice((None, 1, 2, 3, 4)) for _ in range(flows)]
    return {
        "capacity_bytes_per_s_K": [BASE_BYTES_PER_S * rng.randint(1, 2) for _ in range(links)],
        "path_F": [rng.sample(range(links), rng.randint(1, most)) for _ in range(flows)],
        "size_bytes_F": [round(MEAN_BYTES) * rng.randint(1, 4) for _ in range(flows)],
        "start_s_F": [1 + rng.randrange(4 * flows) / 4 for _ in range(flows)],
        "weight_F": weight_F if rng.random() < 0.5 else None,
        "rate_cap_bytes_per_s_F": [each and BASE_BYTES_PER_S * each / 4 for each in quarters],
    }


def port_bound_s(net: Network, path_F: list[Route], size_bytes_F: list[int]) -> float:
    """The time that the busiest link needs for its bytes."""
    load_bytes_K = [0] * len(net.capacity_bytes_per_s_K)
    for path, size_bytes in zip(path_F, size_bytes_F, strict=True):
        for link in path:
            load_bytes_K[link] += size_bytes
    return max(load / capacity for load, capacity in zip(load_bytes_K, net.capacity_bytes_per_s_K, strict=True))


def weights(rng: Random, flows: int) -> list[float]:
    """Small whole numbers, or anything within a factor of 32."""
    if rng.random() < 0.5:
        return [float(rng.randint(1, 4)) for _ in range(flows)]
    return [LEAST_WEIGHT * 32 ** rng.random() for _ in range(flows)]


def caps(rng: Random, net: Network, path_F: list[Route]) -> list[float | None]:
    """For half of the flows, from twice the narrowest link on its path down to a fiftieth of it."""
    return [
        narrowest(net.capacity_bytes_per_s_K, path) * 2 * 100 ** -rng.random() if rng.random() < 0.5 else None
        for path in path_F
    ]


def narrowest(capacity_K: list[float], path: Route) -> float:
    """The least capacity on a path."""
    return min(capacity_K[link] for link in path)


def as_job(case: Case) -> Job:
    """The case for SimGrid. Each flow has its own pair of hosts, so that any path can be its route."""
    capacity_K, path_F, flows = [*case["capacity_bytes_per_s_K"]], [*case["path_F"]], len(case["path_F"])
    latency_s_F = [UNIT_S / weight for weight in case["weight_F"] or [inf] * flows]
    if case["weight_F"] or case["rate_cap_bytes_per_s_F"]:
        free_F = [2 * narrowest(capacity_K, path) for path in path_F]
        path_F = [[*path, len(capacity_K) + flow] for flow, path in enumerate(path_F)]
        capacity_K += [cap or free for cap, free in zip(case["rate_cap_bytes_per_s_F"] or free_F, free_F, strict=True)]
    side = isqrt(flows) + 1
    return Job(
        capacity_bytes_per_s_K=capacity_K,
        latency_s_K=[*([0.0] * len(case["capacity_bytes_per_s_K"])), *latency_s_F][: len(capacity_K)],
        link_I=[*chain(*path_F)],
        first_F1=[0, *accumulate(len(path) for path in path_F)],
        size_bytes_F=case["size_bytes_F"],
        start_s_F=[start_s - latency_s for start_s, latency_s in zip(case["start_s_F"], latency_s_F, strict=True)],
        source_F=[flow // side for flow in range(flows)],
        target_F=[side + flow % side for flow in range(flows)],
    )


if __name__ == "__main__":
    main()
