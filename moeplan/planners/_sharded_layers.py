"""Operator graphs on a mesh as sharding problems: the ways to divide each operator, their seconds and their bytes.

An operator is divided over each of the two axes of a mesh in one way: by tokens (data, or sequence where there are more
shares than sequences), by columns or rows of its weights, by heads, by experts, or not at all. Axes: S sharding.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property
from itertools import product
from math import gcd, prod
from typing import Any, NamedTuple

import numpy as np

from moeplan.compiler.works import work
from moeplan.cost.cost_model import CostModel
from moeplan.cost.memory import kept_bytes, state_bytes
from moeplan.domain import operators as op
from moeplan.domain.operators import Operator
from moeplan.domain.plan import DTYPE_BYTES, Recompute
from moeplan.domain.program import Floats, Pass
from moeplan.domain.scenario import Choices, Scenario
from moeplan.planners._meshes import STATES, E, F, Mesh, P, R, T
from moeplan.planners._operators import Batch, Graph, Node, Role
from moeplan.planners._sharding import ShardingProblem


class Way(NamedTuple):
    """How an operator is divided over one axis: states of its input and output, and what of it is divided."""

    name: str
    into: int
    out: int
    divides: str
    moves: tuple[int, int] = (R, R)
    """States between which the operator itself moves its tensor."""


_DATA, _WHOLE = Way("data", T, T, "tokens"), Way("replicated", R, R, "")
_FEATURES, _EXPERT = Way("features", F, F, "columns"), Way("expert", E, E, "experts")
_COLUMN, _ROW = Way("column", P, F, "columns"), Way("row", F, P, "depth")
WAYS: dict[Role, tuple[Way, ...]] = {
    "stream": (_DATA, _WHOLE),
    "pointwise": (_DATA, _FEATURES, _WHOLE),
    "gemm": (_DATA, _COLUMN, _ROW, _WHOLE),
    "router": (_DATA, _WHOLE),
    "attention": (_DATA, _FEATURES, _WHOLE),
    "embedding": (_DATA, Way("row", R, P, "depth"), _WHOLE),
    "dispatch": (_DATA, Way("expert", T, E, "experts", (T, E)), Way("select", P, E, "experts"), _WHOLE),
    "routed": (_DATA, _EXPERT, _FEATURES, _WHOLE),
    "expert_gemm": (_DATA, _EXPERT, _COLUMN, _ROW, _WHOLE),
    "return": (_DATA, Way("expert", E, T, "experts", (E, T)), Way("select", E, P, "experts"), _WHOLE),
}
Pair = tuple[Way, Way]


class Split(NamedTuple):
    """Into how many parts a sharding divides tokens, columns, depth and experts."""

    tokens: int
    columns: int
    depth: int
    experts: int

    @property
    def weights(self) -> int:
        """Parts of the weights."""
        return self.columns * self.depth * self.experts


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Sharded:
    """A graph on a mesh: the names of its operators, their shardings, and seconds and bytes of each."""

    names: tuple[str, ...]
    ways: tuple[tuple[Pair, ...], ...]
    seconds_S: tuple[Floats, ...]
    state_bytes_S: tuple[Floats, ...]
    kept_bytes_S: tuple[Floats, ...]
    edges_SS: dict[tuple[int, int], Floats]
    ends: tuple[int | None, int | None]

    def problem(self, *, held: float, memory_bytes: float = np.inf) -> ShardingProblem:
        """With what `held` micro-batches leave behind."""
        return ShardingProblem(
            seconds_S=self.seconds_S, edges_SS=self.edges_SS, memory_bytes=memory_bytes,
            bytes_S=tuple(s + held * k for s, k in zip(self.state_bytes_S, self.kept_bytes_S, strict=True)),
        )  # fmt: skip


@dataclass
class Sharder:
    """Sharding problems of one training scenario; an operator divided in the same way is priced once."""

    scenario: Scenario
    _known: dict[tuple[Operator, Split, Recompute], tuple[float, float]] = field(default_factory=dict)
    _sharded: dict[tuple[object, ...], Sharded] = field(default_factory=dict)
    _states: dict[int, float] = field(default_factory=dict)

    @cached_property
    def cost_model(self) -> CostModel:
        """Of the cluster's GPU."""
        return CostModel(gpu=self.scenario.cluster.gpu)

    def sharded(self, graph: Graph, mesh: Mesh, batch: Batch, *, recompute: Recompute, microbatches: int) -> Sharded:
        """Seconds of a forward and a backward pass of a micro-batch, and its share of the exchange of gradients."""
        key = (graph, mesh.shape, recompute, microbatches)
        if key not in self._sharded:
            self._sharded[key] = self._shard(graph, mesh, batch, recompute, microbatches)
        return self._sharded[key]

    def _shard(self, graph: Graph, mesh: Mesh, batch: Batch, recompute: Recompute, microbatches: int) -> Sharded:
        number = {name: v for v, name in enumerate(graph)}
        nodes: list[Node] = [graph.nodes[name]["node"] for name in graph]
        ways = [tuple(shardings(node, mesh, batch, self.scenario.choices)) for node in nodes]
        priced = [
            np.array([self._price(node, pair, mesh, batch, recompute, microbatches) for pair in pairs]).T
            for node, pairs in zip(nodes, ways, strict=True)
        ]
        edges = {
            (number[tail], number[head]): self._edge(
                nodes[number[head]], data, ways[number[tail]], ways[number[head]], mesh
            )
            for tail, head, data in graph.edges(data=True)
        }
        start, end = graph.graph["ends"]
        return Sharded(
            names=tuple(graph), ways=tuple(ways), seconds_S=tuple(p[0] for p in priced),
            state_bytes_S=tuple(p[1] for p in priced), kept_bytes_S=tuple(p[2] for p in priced), edges_SS=edges,
            ends=(number.get(start), number.get(end)),
        )  # fmt: skip

    def _price(
        self, node: Node, pair: Pair, mesh: Mesh, batch: Batch, recompute: Recompute, microbatches: int
    ) -> tuple[float, float, float]:
        """Seconds, bytes of weights, gradients and optimizer, and bytes kept of one micro-batch."""
        split = split_of(pair, mesh)
        seconds, kept = self._kernel(node.operator, split, recompute)
        weights = node.weights / split.weights
        states = weights * self._bytes_per_weight(mesh.num_gpus // split.weights)
        seconds += self._inside_s(node, pair, mesh, batch)
        seconds += self._gradients_s(weights, pair, mesh) / microbatches
        return seconds, states, kept

    def _bytes_per_weight(self, replicas: int) -> float:
        """Weight, gradient and optimizer, the latter divided over the replicas."""
        if replicas not in self._states:
            precision = self.scenario.choices.precision
            parts = state_bytes(np.array(1.0), replicas=replicas, zero=1, precision=precision)
            self._states[replicas] = float(sum(parts))
        return self._states[replicas]

    def _kernel(self, operator: Operator, split: Split, recompute: Recompute) -> tuple[float, float]:
        """Seconds of both passes of one share, and the bytes it keeps. A layer made again keeps what comes in."""
        key = (operator, split, recompute)
        if key not in self._known:
            share, precision = divided(operator, split), self.scenario.choices.precision
            passes = [Pass.FORWARD, Pass.BACKWARD] + [Pass.FORWARD] * (recompute == "full")
            again = recompute == "selective"
            works = [work("", (share,), each, precision=precision, again=again) for each in passes]
            kept = kept_bytes((share,), precision)
            stays = kept.whole - (kept.dropped if again else 0.0)
            if recompute == "full":
                stays = share.output_elements * precision.kept_bytes if operator.name == "in" else 0.0
            seconds = (
                0.0 if share.input_elements + share.flops == 0 else sum(self.cost_model.cost(w).seconds for w in works)
            )
            self._known[key] = (seconds, stays)
        return self._known[key]

    def _inside_s(self, node: Node, pair: Pair, mesh: Mesh, batch: Batch) -> float:
        """Dispatch and return of tokens, and the keys and values that shares of one sequence gather."""
        element = DTYPE_BYTES[self.scenario.choices.precision.activations]
        if node.role in ("dispatch", "return"):
            which = "dispatch" if node.role == "dispatch" else "combine"
            size = node.operator.output_elements * DTYPE_BYTES[getattr(self.scenario.choices.precision, which)]
            at = tuple(pair[0].moves[k] * STATES + pair[1].moves[k] for k in (0, 1))
            return float(mesh.latency_s_OI[at] + size * mesh.per_byte_s_OI[at])
        found, shares = 0.0, 1
        for axis, way in enumerate(pair):
            if way.divides == "tokens" and node.gathered_elements:
                shares *= mesh.shape[axis]
                whole = gcd(shares, batch.sequences)
                if whole < shares:
                    wire, heads = mesh.gathers[axis], split_of(pair, mesh).columns
                    found += 2 * (wire.latency_s + wire.per_byte_s * node.gathered_elements * element / whole / heads)
        return found

    def _gradients_s(self, weights: float, pair: Pair, mesh: Mesh) -> float:
        """Gradients are reduced to shares and weights gathered again, along each axis that divides tokens."""
        precision = self.scenario.choices.precision
        size = weights * (DTYPE_BYTES[precision.gradients] + DTYPE_BYTES[precision.weights])
        wires = [wire for way, wire in zip(pair, mesh.gathers, strict=True) if way.divides == "tokens" and weights]
        return sum(2 * wire.latency_s + wire.per_byte_s * size for wire in wires)

    def _edge(
        self, head: Node, data: dict[str, float], tail_ways: tuple[Pair, ...], head_ways: tuple[Pair, ...], mesh: Mesh
    ) -> Floats:
        out_S = np.array([a.out * STATES + b.out for a, b in tail_ways])
        into_S = np.array([_into(a, head, data) * STATES + _into(b, head, data) for a, b in head_ways])
        at = np.ix_(out_S, into_S)
        size = data["elements"] * DTYPE_BYTES[self.scenario.choices.precision.activations]
        return np.asarray(mesh.latency_s_OI[at] + size * mesh.per_byte_s_OI[at])


def _into(way: Way, head: Node, data: dict[str, float]) -> int:
    """A share of the heads reads all of what was made without heads."""
    return P if head.role == "attention" and way is _FEATURES and data["is_whole"] else way.into


def shardings(node: Node, mesh: Mesh, batch: Batch, choices: Choices) -> Iterator[Pair]:
    """The pairs of ways, one for each axis, that divide without a rest; an axis of one has one way.

    Operators are divided no more than the scenario allows: by tp or etp columns and depth, by ep experts, by cp the
    sequences of attention.
    """
    ways = WAYS[node.role]
    for pair in product(*(ways if size > 1 else (_WHOLE,) for size in mesh.shape)):
        split = split_of((pair[0], pair[1]), mesh)
        if _divides(split, node, batch) and _is_allowed(split, node, batch, choices):
            yield pair[0], pair[1]


def _is_allowed(split: Split, node: Node, batch: Batch, choices: Choices) -> bool:
    is_expert = node.role in ("expert_gemm", "routed")
    tensor, listed = split.columns * split.depth, choices.etp if is_expert else choices.tp
    shares = split.tokens // gcd(split.tokens, batch.sequences) if node.gathered_elements else 1
    asked = ((tensor, listed), (split.experts, choices.ep), (shares, choices.cp))
    return all(values is None or count <= max(values) for count, values in asked)


def _divides(split: Split, node: Node, batch: Batch) -> bool:
    operator = node.operator
    if batch.tokens % split.tokens or node.parts % split.experts:
        return False
    if node.gathered_elements and batch.sequence % (split.tokens // gcd(split.tokens, batch.sequences)):
        return False
    if node.role == "attention":
        return node.parts % split.columns == 0
    if operator.kind in ("gemm", "grouped_gemm"):
        return operator.columns % split.columns == 0 and operator.depth % split.depth == 0
    return True


def split_of(pair: Pair, mesh: Mesh) -> Split:
    """Parts of each kind over both axes."""
    return Split(
        *(
            prod(size for way, size in zip(pair, mesh.shape, strict=True) if way.divides == what)
            for what in Split._fields
        )
    )


def divided(operator: Operator, split: Split) -> Operator:
    """One share of an operator, the largest."""
    if operator.kind == "gemm":
        return op.gemm(
            operator.name, rows=_part(operator.rows, split.tokens), columns=operator.columns // split.columns,
            depth=operator.depth // split.depth, batch=operator.batch, recompute=operator.recompute,
            precision=operator.precision, kept=_part(operator.kept_elements, split.tokens * split.columns),
        )  # fmt: skip
    if operator.kind == "grouped_gemm":
        rows = [_part(r, split.tokens) for r in operator.group_rows[: len(operator.group_rows) // split.experts]]
        kept = _part(operator.kept_elements, split.tokens * split.columns * split.experts)
        return op.grouped_gemm(
            operator.name, group_rows=rows, columns=operator.columns // split.columns,
            depth=operator.depth // split.depth, kept=kept,
        )  # fmt: skip
    names = (
        "flops", "input_elements", "output_elements", "kept_elements", "kept_accumulator_elements",
        "input_gradient_flops",
    )  # fmt: skip
    parts = split.tokens * split.columns * split.experts
    fields: dict[str, Any] = {name: _part(getattr(operator, name), parts) for name in names}
    return replace(operator, weight_elements=_part(operator.weight_elements, split.columns), **fields)


def _part(count: int, parts: int) -> int:
    return -(-count // parts)
