"""Random networks for `make.py`: the capacity of each link, and a way to draw paths.

Axes: K links.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from random import Random

BASE_BYTES_PER_S = 1e8
Route = list[int]


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """Links, and a function that draws the links of a flow."""

    capacity_bytes_per_s_K: list[float]
    draw: Callable[[], Route]


def capacities(rng: Random, links: int) -> list[float]:
    """All alike, of three kinds, or each its own within a factor of ten."""
    law = rng.choice(("alike", "kinds", "own"))
    factors = {
        "alike": lambda: 1.0,
        "kinds": lambda: rng.choice((1.0, 2.0, 5.0)),
        "own": lambda: 10 ** rng.random(),
    }
    return [BASE_BYTES_PER_S * factors[law]() for _ in range(links)]


def pair(rng: Random, nodes: int) -> tuple[int, int]:
    """Two different nodes."""
    source, target = rng.sample(range(nodes), 2)
    return source, target


def one_link(rng: Random) -> Network:
    """All flows share one link."""
    return Network(capacity_bytes_per_s_K=capacities(rng, 1), draw=lambda: [0])


def scattered(rng: Random) -> Network:
    """A flow crosses any one to five links: no map would have such paths, but the law holds for them too."""
    links = rng.randint(2, 150)
    capacity_K = capacities(rng, links)
    return Network(
        capacity_bytes_per_s_K=capacity_K,
        draw=lambda: rng.sample(range(links), rng.randint(1, min(5, links))),
    )


def graph(rng: Random) -> Network:
    """A ring of one-way links with short cuts; a flow takes a shortest way."""
    nodes = rng.randint(3, 40)
    ends = [(node, (node + 1) % nodes) for node in range(nodes)]
    ends += [pair(rng, nodes) for _ in range(rng.randint(0, 2 * nodes))]
    return Network(
        capacity_bytes_per_s_K=capacities(rng, len(ends)), draw=lambda: shortest(ends, *pair(rng, nodes)),
    )  # fmt: skip


def shortest(ends: list[tuple[int, int]], source: int, target: int) -> Route:
    """A way with the fewest links."""
    ways: dict[int, Route] = {source: []}
    waiting = deque([source])
    while target not in ways:
        here = waiting.popleft()
        for link, (tail, head) in enumerate(ends):
            if tail == here and head not in ways:
                ways[head] = [*ways[here], link]
                waiting.append(head)
    return ways[target]


def star(rng: Random) -> Network:
    """A port out and a port in for each node, around a switch that never blocks."""
    nodes = rng.randint(2, 75)

    def draw() -> Route:
        source, target = pair(rng, nodes)
        return [source, nodes + target]

    return Network(capacity_bytes_per_s_K=capacities(rng, 2 * nodes), draw=draw)


def tree(rng: Random) -> Network:
    """A link up and a link down between each node and its parent, of what is below the node / the oversubscription."""
    nodes, oversub = rng.randint(3, 75), rng.choice((1.0, 2.0, 4.0))
    parent = [0, *(rng.randrange(max(0, node - 8), node) for node in range(1, nodes))]
    leaves = [node for node in range(nodes) if node not in parent[1:]]
    up_K = [0.0] * nodes
    for node in reversed(range(1, nodes)):
        up_K[node] = up_K[node] / oversub or capacities(rng, 1)[0]
        up_K[parent[node]] += up_K[node]

    def draw() -> Route:
        up, down = (ancestors(parent, node) for node in rng.sample([*leaves, 0], 2))
        return [node for node in up if node not in down] + [nodes + node for node in down[::-1] if node not in up]

    return Network(capacity_bytes_per_s_K=[*up_K, *up_K], draw=draw)


def ancestors(parent: list[int], node: int) -> list[int]:
    """A node, its parent, and so on up to the root, which is left out."""
    found = []
    while node:
        found.append(node)
        node = parent[node]
    return found


def ring(rng: Random) -> Network:
    """Two links between neighbours, one for each direction; a flow takes the shorter way round."""
    nodes = rng.randint(3, 75)

    def draw() -> Route:
        source, target = pair(rng, nodes)
        return around(source, target, nodes, clockwise=0, counter=nodes)

    return Network(capacity_bytes_per_s_K=capacities(rng, 2 * nodes), draw=draw)


def around(source: int, target: int, nodes: int, *, clockwise: int, counter: int) -> Route:
    """The links of the shorter way round a ring; the link out of node 0 is numbered `clockwise` or `counter`."""
    ahead = (target - source) % nodes
    if 2 * ahead <= nodes:
        return [clockwise + (source + step) % nodes for step in range(ahead)]
    return [counter + (source - step) % nodes for step in range(nodes - ahead)]


def torus(rng: Random) -> Network:
    """Rings along rows and columns; a flow goes along its row first."""
    rows, columns = rng.randint(2, 6), rng.randint(2, 6)
    nodes = rows * columns

    def draw() -> Route:
        (row, column), (last_row, last_column) = (divmod(node, columns) for node in pair(rng, nodes))
        along = around(column, last_column, columns, clockwise=row * columns, counter=nodes + row * columns)
        first = 2 * nodes + last_column * rows
        return along + around(row, last_row, rows, clockwise=first, counter=nodes + first)

    return Network(capacity_bytes_per_s_K=capacities(rng, 4 * nodes), draw=draw)


def rails(rng: Random) -> Network:
    """GPUs with a port in their node and a NIC on the leaf of their rail and pod; leaves meet at the top."""
    pods, pod_nodes, node_gpus = rng.randint(1, 2), rng.randint(1, 2), rng.choice((2, 4, 8))
    gpus, leaves = pods * pod_nodes * node_gpus, pods * node_gpus
    port, nic = 9 * BASE_BYTES_PER_S, BASE_BYTES_PER_S
    leaf = pod_nodes * nic / rng.choice((1.0, 2.0, 4.0))

    def draw() -> Route:
        source, target = pair(rng, gpus)
        if source // node_gpus == target // node_gpus:
            return [source, gpus + target]
        up, down = (gpu // (pod_nodes * node_gpus) * node_gpus + gpu % node_gpus for gpu in (source, target))
        between = [] if up == down else [4 * gpus + up, 4 * gpus + leaves + down]
        return [2 * gpus + source, *between, 3 * gpus + target]

    return Network(
        capacity_bytes_per_s_K=[port] * (2 * gpus) + [nic] * (2 * gpus) + [leaf] * (2 * leaves), draw=draw,
    )  # fmt: skip


def islands(rng: Random) -> Network:
    """Two or three small networks side by side, which know nothing of each other."""
    parts = [rng.choice((one_link, star, ring, rails))(rng) for _ in range(rng.randint(2, 3))]
    first = [sum(len(part.capacity_bytes_per_s_K) for part in parts[:number]) for number in range(len(parts))]

    def draw() -> Route:
        number = rng.randrange(len(parts))
        return [first[number] + link for link in parts[number].draw()]

    return Network(capacity_bytes_per_s_K=[one for part in parts for one in part.capacity_bytes_per_s_K], draw=draw)


NETWORKS: dict[str, Callable[[Random], Network]] = {
    "one_link": one_link, "scattered": scattered, "graph": graph, "star": star, "tree": tree,
    "ring": ring, "torus": torus, "rails": rails, "islands": islands,
}  # fmt: skip
