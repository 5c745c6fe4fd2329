"""The operator graphs that Alpa shards: of a layer, of the embedding, and of the head, alike layers being one graph.

A node is one forward kernel for a whole micro-batch on one GPU, its `role` says how it can be divided; an edge is the
tensor that goes from one to the next. A layer's graph runs from the node "in", the residual stream as it comes, to its
last residual addition. Routing is taken as even: Alpa does not look at data.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Literal, TypeAlias

from moeplan.domain import operators as op
from moeplan.domain.feed_forward import DenseFeedForward, Experts
from moeplan.domain.model import Layer, Model
from moeplan.domain.operators import Operator

if TYPE_CHECKING:
    import networkx as nx

Graph: TypeAlias = "nx.DiGraph[str]"

Role = Literal[
    "stream", "pointwise", "gemm", "router", "attention", "embedding", "dispatch", "routed", "expert_gemm", "return"
]
_FROM = {
    "query_up": ("latent_norm", "down", "norm"),
    "key_value_up": ("latent_norm",),
    "compressor": ("norm",),
    "index_compressor": ("norm",),
    "index_query": ("latent_norm",),
    "index_key": ("norm",),
    "index_weights": ("norm",),
    "key_value": ("norm",),
    "latent_down": ("norm",),
}
"""What an operator starts from, the first that there is, where that is not the operator before it."""
_JOINS = ("index_scores", "attention", "dispatch")
"""They read every operator before them that no other has read."""
_WHOLE = ("in", "norm", "down", "latent_norm", "index_scores", "router_choice")
"""Made without heads: each share of the heads reads all of it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Node:
    """An operator as it would run undivided, and what bounds its division."""

    operator: Operator
    role: Role
    parts: int = 1
    """Heads, or experts: what a division of these must divide."""
    gathered_elements: int = 0
    """Keys and values that a division of sequences gathers."""
    weights: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Batch:
    """One micro-batch: tokens in all, of one sequence, and keys that a query sees."""

    sequences: int
    sequence: int
    context: int

    @property
    def tokens(self) -> int:
        """Of all sequences."""
        return self.sequences * self.sequence


@lru_cache(maxsize=512)
def layer_graph(layer: Layer, batch: Batch) -> Graph:
    """Mixers, then the feed-forward block: norms, projections, attention, experts with their exchanges, residuals."""
    import networkx as nx

    graph: Graph = nx.DiGraph()
    stream = op.elementwise("in", inputs=0, outputs=batch.tokens * layer.hidden_size)
    graph.add_node("in", node=Node(operator=stream, role="stream"))
    last = "in"
    for number, block in enumerate(layer.blocks):
        before = layer.hyper_operators(tokens=batch.tokens)
        inner = block.operators(tokens=batch.tokens, sequence=batch.sequence, context=batch.context)
        keys = batch.tokens * block.cache_elements_per_token() if batch.sequence > 1 else 0
        heads = int(getattr(block, "num_heads", 1))
        nodes = [_mixer_node(each, heads=heads, keys=keys) for each in (*before, *inner)]
        last = _add_block(graph, f"mixer{number or ''}", nodes, last)
    if layer.feed_forward is not None:
        hyper = [_node(each) for each in layer.hyper_operators(tokens=batch.tokens)]
        if isinstance(layer.feed_forward, DenseFeedForward):
            nodes = [_node(each) for each in layer.feed_forward.operators(tokens=batch.tokens)]
            last = _add_block(graph, "dense", hyper + nodes, last)
        else:
            last = _add_experts(graph, layer.feed_forward, hyper, batch.tokens, last)
    graph.graph["ends"] = ("in", last)
    return graph


@lru_cache(maxsize=64)
def embedding_graph(model: Model, batch: Batch) -> Graph:
    """What the first layer starts from."""
    import networkx as nx

    graph: Graph = nx.DiGraph()
    operators = model.embedding_operators(tokens=batch.tokens)
    for number, each in enumerate(operators):
        weights = model.embedding_parameters_per_rank(1) if number == 0 else 0
        role: Role = "embedding" if number == 0 and each.kind != "gemm" else "stream"
        graph.add_node(each.name, node=Node(operator=each, role=role, weights=weights))
    _chain(graph, [each.name for each in operators])
    out = op.elementwise("out", inputs=0, outputs=operators[-1].output_elements)
    graph.add_node("out", node=Node(operator=out, role="stream"))
    _connect(graph, operators[-1].name, "out")
    graph.graph["ends"] = (None, "out")
    return graph


@lru_cache(maxsize=64)
def head_graph(model: Model, batch: Batch) -> Graph:
    """From the last residual stream to the loss."""
    import networkx as nx

    graph: Graph = nx.DiGraph()
    stream = op.elementwise("in", inputs=0, outputs=batch.tokens * model.hidden_size)
    graph.add_node("in", node=Node(operator=stream, role="stream"))
    names = ["in"]
    for each in model.head_operators(tokens=batch.tokens):
        graph.add_node(each.name, node=_node(each))
        names.append(each.name)
    _chain(graph, names)
    graph.graph["ends"] = ("in", None)
    return graph


# ---- parts of a layer


def _node(operator: Operator) -> Node:
    if operator.kind == "gemm":
        return Node(operator=operator, role="gemm", weights=operator.weight_elements)
    is_stream = operator.name == "residual" or operator.name.endswith("norm") or operator.name.startswith("hyper")
    return Node(operator=operator, role="stream" if is_stream else "pointwise", weights=operator.weight_elements)


def _mixer_node(operator: Operator, *, heads: int, keys: int) -> Node:
    if operator.kind in ("attention", "scan"):
        gathered = keys if operator.name == "attention" else 0
        return Node(operator=operator, role="attention", parts=heads, gathered_elements=gathered)
    return _node(operator)


def _add_block(graph: Graph, prefix: str, nodes: list[Node], start: str) -> str:
    """A chain, but for what `_FROM` and `_JOINS` say; its residual addition reads the block's start. Its last name."""
    names: dict[str, str] = {}
    before = start
    for node in nodes:
        name = names[node.operator.name] = f"{prefix}.{node.operator.name}"
        graph.add_node(name, node=node)
        sources = [names[each] for each in _FROM.get(node.operator.name, ()) if each in names][:1] or [before]
        if node.operator.name in _JOINS:
            sources += [each for each in names.values() if graph.out_degree(each) == 0 and each not in (name, before)]
        if node.operator.name == "attention" and "query_absorb" in names:
            sources.append(names["latent_norm"])
        if node.operator.name == "residual" and start != before:
            sources.append(start)
        for each in sources:
            _connect(graph, each, name)
        before = name
    return before


def _add_experts(graph: Graph, experts: Experts, hyper: list[Node], tokens: int, start: str) -> str:
    """Router, dispatch, experts, return and sum, with the branches that every token uses beside them."""
    rows = -(-tokens * experts.top_k // (experts.num_experts + experts.zero_experts))
    inner = experts.expert_operators(tokens_per_expert=(rows,) * experts.num_experts)
    moved = rows * experts.num_experts * experts.expert_input
    before = [*hyper, *(_router_node(each) for each in experts.router_operators(tokens=tokens))]
    dispatch, back = (op.elementwise(name, inputs=0, outputs=moved) for name in ("dispatch", "return"))
    routed = [Node(operator=dispatch, role="dispatch", parts=experts.num_experts)]
    routed += [_routed_node(each, experts.num_experts) for each in inner]
    routed += [Node(operator=back, role="return", parts=experts.num_experts)]
    after = [
        Node(operator=each, role="gemm" if each.kind == "gemm" else "stream", weights=each.weight_elements)
        for each in experts.combine_operators(tokens=tokens)
    ]
    last = _add_block(graph, "moe", before + routed + after, start)
    source = "moe.norm" if "moe.norm" in graph else start
    if "moe.latent_down" not in graph:
        _connect(graph, source, "moe.dispatch")
    _add_branches(graph, experts.shared_operators(tokens=tokens), source, last)
    return last


def _router_node(operator: Operator) -> Node:
    if operator.kind == "gemm":
        role: Role = "router" if operator.name == "router" else "gemm"
        return Node(operator=operator, role=role, weights=operator.weight_elements)
    return Node(operator=operator, role="stream", weights=operator.weight_elements)


def _routed_node(operator: Operator, num_experts: int) -> Node:
    role: Role = "expert_gemm" if operator.kind == "grouped_gemm" else "routed"
    return Node(operator=operator, role=role, parts=num_experts, weights=operator.weight_elements)


def _add_branches(graph: Graph, operators: Iterable[Operator], source: str, last: str) -> None:
    """Each branch starts anew at its up-projection, and ends in the layer's residual addition."""
    before = source
    for operator in operators:
        name = f"moe.{operator.name}"
        while name in graph:
            name += "'"
        graph.add_node(name, node=_node(operator))
        is_start = operator.name.endswith(("up", "gate"))
        if is_start and before != source:
            _connect(graph, before, last)
        _connect(graph, source if is_start else before, name)
        before = name
    if before != source:
        _connect(graph, before, last)


def _chain(graph: Graph, names: list[str]) -> None:
    for tail, head in pairwise(names):
        _connect(graph, tail, head)


def _connect(graph: Graph, tail: str, head: str) -> None:
    """An edge as large as what its tail makes; `is_whole` if every share of the heads reads all of it."""
    operator: Operator = graph.nodes[tail]["node"].operator
    is_whole = tail.rpartition(".")[2] in _WHOLE
    graph.add_edge(tail, head, elements=operator.output_elements, is_whole=is_whole)
