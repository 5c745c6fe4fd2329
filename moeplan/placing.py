"""Placement alone: the experts of every layer on GPUs, from a load or a scenario, with a certificate for each layer.

Axes: T step, L layer, S source, E expert, N node, R replica.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from os import PathLike, fspath
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt

from moeplan.api import Progress, Source
from moeplan.api import load as load_scenario
from moeplan.compiler.works import work
from moeplan.cost.cost_model import CostModel
from moeplan.domain.cluster import Cluster
from moeplan.domain.placement import (
    ExpertMap,
    Floats,
    LayerPlacement,
    PlacedLayer,
    Placement,
    PlacementProblem,
    Split,
    TokenPrices,
    TokenVisits,
)
from moeplan.domain.plan import DTYPE_BYTES, Plan
from moeplan.domain.program import Pass
from moeplan.domain.routing import TokenSets
from moeplan.domain.scenario import Scenario
from moeplan.errors import CatalogueError, InfeasibleError, PlanError, unknown_name
from moeplan.importers.expert_load import Ids, read_ids
from moeplan.importers.expert_load import read as read_load
from moeplan.partition.route import load_of
from moeplan.placers._layers import place_layers

SCHEMA = "moeplan.placing/v1"
Objective = Literal["balance", "makespan", "visits"]
LoadSource = str | PathLike[str] | npt.ArrayLike
_MOST_GPUS = 64
"""Of an expert-parallel group whose size nobody has given."""


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Placing:
    """Placed layers; `layers[l]`, of `problems[l]`, is number `numbers[l]` of the file or the model."""

    placer: str
    objective: Objective
    num_gpus: int
    slots: int
    split: Split
    numbers: tuple[int, ...]
    problems: tuple[PlacementProblem, ...]
    layers: tuple[PlacedLayer, ...]
    num_layers: int
    """Of the model, dense ones included; without a scenario the last of the load is the model's last."""

    def document(self) -> dict[str, Any]:
        """What `place --json` prints, and `now` reads."""
        rows = zip(self.numbers, self.problems, self.layers, strict=True)
        return {
            "schema": SCHEMA, "placer": self.placer, "objective": self.objective, "gpus": self.num_gpus,
            "slots": self.slots, "split": self.split, "layers": [_document(*row) for row in rows],
        }  # fmt: skip

    @property
    def placement(self) -> Placement:
        """What a plan keeps of it: shares are those of the tokens of all sources together."""
        rows = [
            replace(placed.placement, share_SR=_share_R(problem, placed.placement))
            for problem, placed in zip(self.problems, self.layers, strict=True)
        ]
        return Placement.of(rows, num_places=self.num_gpus)

    def into(self, plan: Plan) -> Plan:
        """`plan` with this placement. Raises PlanError where the plan's expert-parallel group is not of these GPUs."""
        if plan.ep != self.num_gpus:
            found = f"plan: ep {plan.ep} is not the {self.num_gpus} GPUs that experts are placed on"
            raise PlanError(f"{found}; place them on {plan.ep}")
        return plan.model_copy(update={"placement": self.placement})

    def expert_map(self) -> ExpertMap:
        """What engines load."""
        return ExpertMap.of(self.placement, numbers=self.numbers, num_layers=self.num_layers, num_gpus=self.num_gpus)


def place(
    scenario: Source | None = None,
    *,
    load: LoadSource | None = None,
    array: str | None = None,
    gpus: int | None = None,
    gpus_per_node: int | None = None,
    slots: int | None = None,
    placer: str = "ilp",
    objective: Objective = "balance",
    split: Split = "even",
    now: Placing | Mapping[str, Any] | str | PathLike[str] | None = None,
    max_moves: int | None = None,
    time_limit_s: float = 10.0,
    seed: int = 0,
    progress: Progress | None = None,
) -> Placing:
    """Every layer's experts on `gpus` GPUs with `slots` replicas in all, by one dish of the placers' menu.

    The load comes from `load` (a file, or counts by layer and expert, with step and source before) or from the
    scenario's routing. `objective` balance: the fullest GPU has few tokens. makespan: the seconds of the layer's
    exchanges and experts, which needs a scenario. visits: the nodes, of `gpus_per_node`, that a token is sent to;
    `load` then holds expert ids by token, layer and pick. `slots` None: one for each expert. `now`: where experts
    stand, of which at most `max_moves` replicas of a layer may move. Raises CatalogueError, PlanError, InfeasibleError.
    """
    if load is None and scenario is None:
        raise PlanError("place: neither a load nor a scenario is given; give counts of tokens, or a scenario's name")
    given = None if scenario is None else load_scenario(scenario)
    num_gpus = gpus_of(given, gpus)
    ids_NLK = _ids(load, array) if objective == "visits" else None
    counted = _counts_of(given, ids_NLK) if ids_NLK is not None else load
    tokens_LSE, numbers = _tokens(given, counted, array, num_gpus=num_gpus, objective=objective)
    visits_L = _visits(given, ids_NLK, gpus_per_node, num_layers=len(numbers))
    check_time_limit(time_limit_s)
    num_slots = tokens_LSE.shape[2] if slots is None else slots
    prices = prices_of(given, num_gpus, num_slots) if objective == "makespan" else None
    if given is not None:
        check_memory(given, -(-num_slots // num_gpus))
    before = _placements(now, num_layers=len(numbers))
    problems = tuple(
        PlacementProblem(
            tokens_SE=tokens_SE, num_gpus=num_gpus, slots=num_slots, split=split, prices=prices, visits=visits,
            now=at, max_moves=max_moves,
        )
        for tokens_SE, visits, at in zip(tokens_LSE, visits_L, before, strict=True)
    )  # fmt: skip
    tell = progress or (lambda message, done, total: None)
    placed = place_layers(
        problems, numbers, placer=placer, seed=seed, time_limit_s=time_limit_s,
        on_layer=lambda number, done: tell(f"layer {number}", done, len(problems)),
    )  # fmt: skip
    return Placing(
        placer=placer, objective=objective, num_gpus=num_gpus, slots=num_slots, split=split, numbers=numbers,
        problems=problems, layers=placed,
        num_layers=max(1 + max(numbers), 0 if given is None else len(given.model.all_layers)),
    )  # fmt: skip


def check_time_limit(time_limit_s: float) -> None:
    """Raises PlanError for seconds in which no layer can be placed."""
    if time_limit_s <= 0 or not np.isfinite(time_limit_s):
        raise PlanError(f"time limit: {time_limit_s} s is no time for a layer; use more than 0, such as 10")


# ---- the load


def gpus_of(scenario: Scenario | None, gpus: int | None) -> int:
    """GPUs of the expert-parallel group: as given, as the scenario fixes, or as many as divide the model's experts."""
    if gpus is not None:
        if gpus < 1:
            raise PlanError(f"gpus: {gpus} GPUs hold nothing; give the size of the expert-parallel group")
        return gpus
    if scenario is None:
        raise PlanError("gpus: a load alone does not say how many; give the size of the expert-parallel group")
    if scenario.choices.ep is not None and len(scenario.choices.ep) == 1:
        return scenario.choices.ep[0]
    experts = [layer.experts.num_experts for layer in scenario.model.all_layers if layer.experts]
    most = min(_MOST_GPUS, scenario.cluster.num_gpus)
    return max(size for size in range(1, most + 1) if all(count % size == 0 for count in experts))


def _tokens(
    scenario: Scenario | None, load: LoadSource | None, array: str | None, *, num_gpus: int, objective: Objective
) -> tuple[Floats, tuple[int, ...]]:
    """[L, S, E] tokens and the layers' numbers; sources are nodes where the topology counts, and else one."""
    if load is None:
        assert scenario is not None
        tokens_LSE, numbers = _routed(scenario, num_gpus)
    elif isinstance(load, str | PathLike):
        found = read_load(fspath(load), array=array)
        tokens_LSE, numbers = found.tokens_TLSE.sum(axis=0), found.layers
    else:
        counts = steps_of(load).sum(axis=0)
        tokens_LSE, numbers = counts, tuple(range(len(counts)))
    if objective not in get_args(Objective):
        raise PlanError(unknown_name("objective", objective, get_args(Objective)))
    if objective != "makespan":
        return tokens_LSE.sum(axis=1, keepdims=True), numbers
    if scenario is None:
        raise PlanError("objective makespan: needs a cluster and a model; give a scenario beside the load")
    return by_node(tokens_LSE, num_gpus, scenario.cluster.gpus_per_node), numbers


def _ids(load: LoadSource | None, array: str | None) -> Ids:
    if load is None:
        raise PlanError("objective visits: needs which experts each token chose; give expert ids as the load")
    ids_NLK = read_ids(fspath(load), array=array) if isinstance(load, str | PathLike) else _table(load)
    if ids_NLK.ndim != 3 or ids_NLK.dtype.kind not in "iu" or 0 in ids_NLK.shape or ids_NLK.min() < 0:
        raise PlanError(f"load: shape {ids_NLK.shape} is not expert ids [token, layer, pick], 0 or more; give those")
    return ids_NLK.astype(np.int32)


def _counts_of(scenario: Scenario | None, ids_NLK: Ids) -> Floats:
    """[L, E]: as many experts as the model has, or as the ids name."""
    experts = [layer.experts.num_experts for layer in scenario.model.layers if layer.experts] if scenario else []
    width = max([int(ids_NLK.max()) + 1, *experts])
    if experts and width > max(experts):
        raise PlanError(f"load: expert {width - 1} is not 0 to {max(experts) - 1}; use the model that chose")
    layers = range(ids_NLK.shape[1])
    return np.array([np.bincount(ids_NLK[:, at].ravel(), minlength=width) for at in layers], np.float64)


def _visits(
    scenario: Scenario | None, ids_NLK: Ids | None, gpus_per_node: int | None, *, num_layers: int
) -> Sequence[TokenVisits | None]:
    if ids_NLK is None:
        if gpus_per_node is not None:
            raise PlanError("gpus_per_node has no effect without objective visits; the cluster says it; remove it")
        return [None] * num_layers
    size = gpus_per_node or (scenario.cluster.gpus_per_node if scenario else None)
    if size is None:
        raise PlanError("objective visits: needs the GPUs of a node; give gpus_per_node, or a scenario")
    return [TokenVisits(sets=TokenSets.of(ids_NLK[:, at]), gpus_per_node=size) for at in range(num_layers)]


def _table(given: npt.ArrayLike, dtype: npt.DTypeLike | None = None) -> npt.NDArray[Any]:
    try:
        return np.asarray(given, dtype)
    except (TypeError, ValueError):
        raise PlanError("load: is no table of numbers; give rows of one length, and numbers in them") from None


def steps_of(given: npt.ArrayLike) -> Floats:
    """[T, L, S, E] of counts by layer and expert, with step and source before where there are several."""
    counts = _table(given, np.float64)
    if counts.ndim not in (2, 3, 4) or 0 in counts.shape:
        allowed = "[layer, expert], [step, layer, expert] or [step, layer, source, expert]"
        raise PlanError(f"load: shape {counts.shape} is not {allowed}; reshape it")
    return counts if counts.ndim == 4 else counts.reshape(-1, counts.shape[-2], 1, counts.shape[-1])


def _routed(scenario: Scenario, num_gpus: int) -> tuple[Floats, tuple[int, ...]]:
    """What the scenario's routing sends in one micro-batch of one sequence on each GPU."""
    num_layers = len(scenario.model.layers)
    plan = Plan(dp=num_gpus, ep=num_gpus, stages=(num_layers,))
    found = load_of(scenario, plan, rank_tokens=scenario.workload.query_length)
    if found is None:
        raise PlanError(f"{scenario.name}: its model has no experts; choose one that has")
    shapes = {table.shape for table in found.tokens_SE_by_layer}
    if len(shapes) > 1:
        raise PlanError(f"{scenario.name}: layers differ in their number of experts; place them one load at a time")
    moe = [number for number, layer in enumerate(scenario.model.all_layers) if layer.experts]
    return np.array(found.tokens_SE_by_layer), tuple(moe)


def by_node(tokens_LSE: Floats, num_gpus: int, gpus_per_node: int) -> Floats:
    """The same tokens with a source for each node."""
    sources, nodes = tokens_LSE.shape[1], -(-num_gpus // gpus_per_node)
    if num_gpus % gpus_per_node and nodes > 1:
        raise PlanError(f"gpus: {num_gpus} GPUs are not whole nodes of {gpus_per_node}; use {gpus_per_node * nodes}")
    if sources == 1:
        return np.repeat(tokens_LSE / nodes, nodes, axis=1)
    if sources % nodes:
        raise PlanError(f"load: {sources} sources do not spread over {nodes} nodes; record one for each GPU or node")
    layers, _, experts = tokens_LSE.shape
    return np.asarray(tokens_LSE.reshape(layers, nodes, sources // nodes, experts).sum(axis=2))


# ---- the machine


def prices_of(scenario: Scenario | None, num_gpus: int, slots: int, *, rows: int | None = None) -> TokenPrices:
    """Of one token copy: its experts' kernels, forward (in training also backward), and its way there and back.

    A replica computes `rows` copies at once: as many as given, or as one sequence on each GPU sends it on average.
    """
    assert scenario is not None
    cluster, workload, precision = scenario.cluster, scenario.workload, scenario.choices.precision
    experts = next(layer.experts for layer in scenario.model.layers if layer.experts)
    rows = rows or max(1, workload.query_length * experts.top_k * num_gpus // slots)
    operators = experts.expert_operators(tokens_per_expert=(rows,) * -(-slots // num_gpus))
    passes = [Pass.FORWARD, Pass.BACKWARD] if workload.is_training else [Pass.FORWARD]
    model = CostModel(gpu=cluster.gpu)
    seconds = sum(model.cost(work("experts", operators, each, precision=precision)).seconds for each in passes)
    width = experts.expert_input * DTYPE_BYTES[precision.dispatch]
    nic, nvlink = bandwidths(cluster, num_gpus)
    both = 1 + DTYPE_BYTES[precision.combine] / DTYPE_BYTES[precision.dispatch]
    return TokenPrices(
        gpus_per_node=min(cluster.gpus_per_node, num_gpus), compute_s=seconds / (rows * -(-slots // num_gpus)),
        nic_s=width / nic, nvlink_s=width / nvlink, exchange_factor=both * len(passes),
    )  # fmt: skip


def bandwidths(cluster: Cluster, num_gpus: int) -> tuple[float, float]:
    """Bytes/s out of a node through all its NICs, and into a GPU from its node."""
    inside = cluster.path_bandwidth_bytes_per_s([0], [1])[0] if min(cluster.gpus_per_node, num_gpus) > 1 else np.inf
    if num_gpus <= cluster.gpus_per_node:
        return np.inf, float(inside)
    width_K = cluster.bandwidth_bytes_per_s_K
    ways = [cluster.path(gpu, gpu + cluster.gpus_per_node) for gpu in range(cluster.gpus_per_node)]
    narrowest = {min(way, key=lambda link: width_K[link]) for way in ways}
    return float(sum(width_K[link] for link in narrowest)), float(inside)


def check_memory(scenario: Scenario, slots_per_gpu: int) -> None:
    """Raises InfeasibleError if the weights of the replicas alone are more than a GPU has: of all layers of a stage,
    and where in training the number of stages is open, of one layer.
    """
    experts = [layer.experts for layer in scenario.model.layers if layer.experts]
    stages = max(scenario.choices.pp or (len(experts),)) if scenario.workload.is_training else 1
    each = DTYPE_BYTES[scenario.choices.precision.weights] * max(e.expert_parameters for e in experts)
    layers, usable = -(-len(experts) // stages), scenario.cluster.gpu.usable_memory_bytes
    if slots_per_gpu * layers * each > usable:
        most = int(usable // (layers * each))
        raise InfeasibleError(
            f"{scenario.name}: slots: {slots_per_gpu} replicas of {layers} layers take "
            f"{slots_per_gpu * layers * each / 1e9:.4g} GB of a GPU's {usable / 1e9:.4g}; use at most {most} a GPU"
        )


# ---- documents


def _document(number: int, problem: PlacementProblem, placed: PlacedLayer) -> dict[str, Any]:
    from moeplan.placers._bounds import token_bounds
    from moeplan.placers._check import loads

    most = float(loads(problem, placed.placement).max())
    name, unit = ("makespan", "_s") if problem.prices else ("visits", "_visits") if problem.visits else ("", "")
    least = max(bound for bound, _ in token_bounds(problem)) if name else placed.lower_bound
    other = {"makespan_s" if problem.prices else "visits": placed.value, f"lower_bound{unit}": placed.lower_bound}
    times = other if name else {}
    share_R = _share_R(problem, placed.placement)
    rows = zip(placed.placement.expert_R.tolist(), placed.placement.gpu_R.tolist(), share_R.tolist(), strict=True)
    return {
        "layer": number, "max_tokens": most, "lower_bound_tokens": min(least, most), **times, "gap": placed.gap,
        "proof": placed.proof, "seconds": placed.seconds,
        "replicas": [{"expert": expert, "gpu": gpu, "share": share} for expert, gpu, share in rows],
    }  # fmt: skip


def _share_R(problem: PlacementProblem, placement: LayerPlacement) -> Floats:
    """What part of all tokens of its expert each replica gets; the mean of the sources' shares where it has none."""
    weight_SE = problem.tokens_SE / np.maximum(problem.tokens_E, 1e-300)
    share_R = (weight_SE[:, placement.expert_R] * placement.share_SR).sum(axis=0)
    idle_R = problem.tokens_E[placement.expert_R] == 0
    return np.asarray(np.where(idle_R, placement.share_SR.mean(axis=0), share_R))


def _placements(
    now: Placing | Mapping[str, Any] | str | PathLike[str] | None, *, num_layers: int
) -> Sequence[LayerPlacement | None]:
    if now is None:
        return [None] * num_layers
    if isinstance(now, Placing):
        found: list[LayerPlacement | None] = [each.placement for each in now.layers]
    else:
        found = _read(now)
    if len(found) != num_layers:
        raise PlanError(f"from: {len(found)} layers, and the load has {num_layers}; give the placement of this model")
    return found


def _read(now: Mapping[str, Any] | str | PathLike[str]) -> list[LayerPlacement | None]:
    where = "placement" if isinstance(now, Mapping) else fspath(now)
    try:
        document = now if isinstance(now, Mapping) else json.loads(Path(where).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CatalogueError(f"{where}: it is not JSON ({error}); give what `place --json` wrote") from None
    if not isinstance(document, Mapping) or document.get("schema") != SCHEMA:
        raise CatalogueError(f"{where}: schema is not {SCHEMA}; give what `place --json` wrote")
    try:
        layers = [layer["replicas"] for layer in document["layers"]]
        return [
            LayerPlacement(
                expert_R=np.array([each["expert"] for each in replicas]),
                gpu_R=np.array([each["gpu"] for each in replicas]),
                share_SR=np.array([[each["share"] for each in replicas]]),
            )
            for replicas in layers
        ]
    except (KeyError, TypeError, ValueError, IndexError) as error:
        raise CatalogueError(f"{where}: replicas: {error!r} in them; give what `place --json` wrote") from None
