"""A record as something that can be simulated: a scenario, a plan, and what the record leaves open.

A field that is null is filled by one rule, which is said in `guessed` and widens the interval:

    dp          GPUs / (tp pp cp)
    etp         1, as the framework does unasked
    vpp, mbs    1, or what `tuned.py` finds to be fastest
    recompute   the least of none, selective, full that fits in memory
    dispatcher  NCCL's all-to-all
    routing     every expert gets the same
    overlaps    gradients and parameters beside the passes
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

from moeplan import catalogue, menu
from moeplan.accuracy.machines import machine_of, topology_of
from moeplan.accuracy.models import model_of
from moeplan.catalogue.sheet import SCHEMA
from moeplan.domain.plan import Capacity, Dtype, Plan, Precision
from moeplan.domain.scenario import Scenario
from moeplan.errors import CatalogueError
from moeplan.partition.footprint import footprint
from moeplan.partition.legal import check_plan
from moeplan.partition.ranks import groups, ranks_of_stage

Row = Mapping[str, Any]
Graphs = Literal["all", "some", "none", "unknown"]
_FORMATS: tuple[tuple[str, Dtype], ...] = (("FP4", "fp4"), ("FP8", "fp8"), ("BF16", "bf16"))


@dataclass(frozen=True, kw_only=True, slots=True)
class Case:
    """What a record says was run."""

    scenario: Scenario
    plan: Plan
    guessed: tuple[str, ...] = ()
    graphs: Graphs = "all"
    """What the host launches as graphs, rather than kernel by kernel."""
    overlaps_passes: bool = False
    """Whether experts' exchanges of one micro-batch run beside the passes of another."""
    overlaps_tensor: bool = False
    """Whether tensor exchanges run beside the products that they belong to."""
    fuses_attention: bool = True
    """Whether scores of attention stay on the chip, rather than pass through memory."""
    fuses_sinks: bool = False
    """Whether they do so where attention has sinks, which kernels learned late."""
    routes_freely: bool = False
    """Whether tokens choose their experts, so that some of many experts get none of a few tokens."""
    reduces_alone: bool = False
    """Whether all ranks have all tokens, and all-reduce what attention and feed-forward blocks make of them with a
    kernel for that, as servers do; experts' tokens are then not exchanged."""
    recomputed: float = 1.0
    """Of the layers, where these are recomputed fully."""
    recomputes_products: bool = False
    """Whether every other product is computed again, as PyTorch's own selective recomputation does."""
    divides_norms: bool = True
    """Whether tensor-parallel ranks share out norms and residuals (sequence parallelism), rather than each do all."""


@lru_cache(maxsize=2048)
def _loaded(text: str, changes: str) -> Scenario:
    return catalogue.load(json.loads(text), changes=json.loads(changes))


def scenario_of(record: Row, workload: Row) -> Scenario:
    """The scenario of a record: its model on its machine, every expert alike. Raises CatalogueError."""
    name, changes = machine_of(record["hardware"])
    machine = topology_of(name, record["hardware"])
    model = model_of(record["model"], train_mtp=workload["phase"] == "train")
    called = str(record["model"].get("name") or record["model"].get("key") or "model")
    cite = f"{record['source'].get('name')}, {record['source'].get('ref')}, {record['source'].get('table')}"
    document = {
        "schema": SCHEMA, "name": f"{called} on {record['hardware']['count']} {record['hardware']['gpu']}",
        "model": {"name": called, "dimensions": {"source": "record"}, **model},
        "cluster": {key: value for key, value in machine.items() if key not in ("about", "sources")},
        "workload": dict(workload),
        "sources": machine["sources"] | {"record": {"cite": cite, "kind": "published"}},
    }  # fmt: skip
    if record["model"].get("experts"):
        document["routing"] = {"router": "balanced"}
    return _loaded(json.dumps(document), json.dumps(changes))


# ---- training


def training_case(record: Row, fills: Mapping[str, int] | None = None) -> Case:
    """The case of a record of kinds training_e2e and memory; `fills` are counts that are left open and are not 1.

    Raises CatalogueError and PlanError.
    """
    asked, guessed = record["parallel"], list[str]()
    batch, length = asked.get("gbs"), (record.get("model") or {}).get("seq_len")
    if not length:
        raise CatalogueError("model.seq_len is not recorded")
    fields = _degrees(record, guessed, fills or {})
    if not batch:
        batch = fields["dp"] * fields["micro_batch"] * fields["pp"]
        guessed.append(f"gbs {batch}, as many micro-batches as stages")
    scenario = scenario_of(record, {"phase": "train", "global_batch": batch, "sequence": length})
    fields |= _pipeline(record, scenario, fields["vpp"])
    fields |= _choices(record, scenario, guessed)
    plan = _recomputing(Plan(**fields), scenario, asked, guessed)
    plan = plan.model_copy(update={"all_to_all": deduplicating(plan, scenario, asked)})
    check_plan(plan, scenario)
    return Case(
        scenario=scenario, plan=plan, guessed=tuple(guessed),
        graphs=_graphs(asked.get("cuda_graphs")), overlaps_passes=bool(asked.get("overlap_moe_a2a")),
        overlaps_tensor=_overlaps_tensor(asked), fuses_attention=_fuses_attention(record),
        # Attention in 8 bits is one kernel, or it would not be in 8 bits.
        fuses_sinks="FP8 attention" in str(record.get("notes")),
        divides_norms=asked.get("sequence_parallel") is not False,
        recomputed=_recomputed(asked, layers=len(scenario.model.all_layers), chunks=plan.pp * plan.vpp),
        recomputes_products=plan.recompute == "selective" and str(asked.get("sharding")).startswith("FSDP2"),
    )  # fmt: skip


def _recomputed(asked: Row, *, layers: int, chunks: int) -> float:
    """The share of layers in "full, block, 5 layers", where Megatron recomputes five of each stage."""
    block = re.match(r"full, block, (\d+) layers", str(asked.get("recompute")))
    return min(1.0, int(block[1]) * chunks / layers) if block else 1.0


def _fuses_attention(record: Row) -> bool:
    """As `parallel.attention` says, else from June 2022 on.

    Reference: Dao et al., "FlashAttention", arXiv 2205.14135, of 27 May 2022.
    """
    asked, date = record["parallel"].get("attention"), str(record["source"].get("date") or "")
    if asked not in (None, "fused", "unfused"):
        raise CatalogueError(f"parallel.attention: found {asked!r}; use fused or unfused")
    return asked == "fused" if asked else not date or date >= "2022-06"


def _degrees(record: Row, guessed: list[str], fills: Mapping[str, int]) -> dict[str, Any]:
    asked, count = record["parallel"], record["hardware"]["count"]
    known = {"cp": 1, "vpp": 1, "etp": 1, "mbs": 1, **fills}
    fields = {key: _count(asked, key, guessed, known.get(key)) for key in ("tp", "pp", "cp", "vpp")}
    size = fields["tp"] * fields["pp"] * fields["cp"]
    if count % size:
        layout = f"tp {fields['tp']} x pp {fields['pp']} x cp {fields['cp']}"
        raise CatalogueError(f"parallel: {layout} = {size} does not divide {count} GPUs")
    fields["dp"] = count // size
    if record["model"].get("experts"):
        fields |= {key: _count(asked, key, guessed, known.get(key)) for key in ("ep", "etp")}
    fields["micro_batch"] = _count(asked, "mbs", guessed, known["mbs"])
    return fields


def _count(asked: Row, key: str, guessed: list[str], unasked: int | None) -> int:
    value = asked.get(key)
    if value is None and unasked is not None:
        if key != "cp" and not (key == "vpp" and asked.get("pp") == 1):
            guessed.append(f"{key} {unasked}")
        return unasked
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise CatalogueError(f"parallel.{key}: found {value!r}; use a whole number from 1")
    return value


def _pipeline(record: Row, scenario: Scenario, vpp: int) -> dict[str, Any]:
    asked = record["parallel"]
    pp, vpp = asked["pp"], vpp if asked["pp"] > 1 else 1
    schedule = "interleaved" if vpp > 1 else "one_f_one_b"
    layers = len(scenario.model.all_layers)
    stages = stages_of(asked.get("pp_layout"), layers, pp * vpp)
    return {"schedule": schedule, "vpp": vpp, "stages": stages}


def stages_of(layout: object, layers: int, count: int) -> tuple[int, ...]:
    """Layers of each virtual stage: as Megatron's layout says, else even, with fewer at the last and first stages."""
    found = _written(str(layout)) if layout else []
    if sum(found) == layers and len(found) <= count:
        return tuple(found + [0] * (count - len(found)))
    whole, rest = divmod(layers, count)
    # The ends hold embedding and head, so they are the first to have a layer less.
    inwards = [place for near in range((count + 1) // 2) for place in (count - 1 - near, near)]
    fewer = set(list(dict.fromkeys(inwards))[: count - rest])
    return tuple(whole + (stage not in fewer) for stage in range(count))


def _written(layout: str) -> list[int]:
    """`Et*3|(tt|)*29m|L` and `4x15|1+mtp+loss` as layers of each stage; others as nothing."""
    if short := re.fullmatch(r"(\d+)x(\d+)\|(\d+)\+mtp\+loss", layout):
        size, times, last = map(int, short.groups())
        return [size] * times + [last]
    text = re.sub(r"\(([^()]*)\)\*(\d+)", lambda found: found[1] * int(found[2]), layout)
    text = re.sub(r"([a-zA-Z])\*(\d+)", lambda found: found[1] * int(found[2]), text)
    return [part.count("t") for part in text.split("|")] if re.fullmatch(r"[EtmL|]+", text) else []


def _choices(record: Row, scenario: Scenario, guessed: list[str]) -> dict[str, Any]:
    asked = record["parallel"]
    zero = _zero(str(asked.get("sharding") or ""), guessed)
    if asked.get("routing") is None and record["model"].get("experts"):
        guessed.append("routing even")
    return {
        "zero_dense": zero, "zero_expert": zero, "precision": precision_of(asked), "capacity": _capacity(asked),
        "overlap_gradients": asked.get("overlap_grad_reduce") is not False,
    }  # fmt: skip


def _zero(sharding: str, guessed: list[str]) -> int:
    if stage := re.search(r"ZeRO-(\d)", sharding):
        return int(stage[1])
    if "FSDP" in sharding:
        return 3
    if not sharding.startswith("none"):
        guessed.append("sharding ZeRO-1")
        return 1
    return 0


def precision_of(asked: Row) -> Precision:
    """The number formats that a record's one word means. Raises CatalogueError for a word that is not known."""
    word = str(asked.get("precision")).upper()
    for sign, compute in _FORMATS:
        if sign in word:
            narrow = "bf16 gradient" in str(asked.get("sharding"))
            return Precision(compute=compute, gradients="bf16" if narrow else "fp32")
    if "FP16" in word:
        gradients: Dtype = "fp16" if "fp16 gradient" in str(asked.get("sharding")) else "fp32"
        return Precision(
            compute="fp16", weights="fp16", activations="fp16", gradients=gradients, dispatch="fp16", combine="fp16"
        )
    raise CatalogueError(f"parallel.precision: found {asked.get('precision')!r}; use BF16, FP16, FP8, MXFP8 or NVFP4")


def _capacity(asked: Row) -> Capacity:
    text = str(asked.get("capacity") or "")
    if factor := re.search(r"capacity factor (\d+(?:\.\d+)?)", text):
        return Capacity(rule="pad" if "padded" in text else "drop", factor=float(factor[1]))
    return Capacity()


def _recomputing(plan: Plan, scenario: Scenario, asked: Row, guessed: list[str]) -> Plan:
    """With the recomputation that is stated, else the least that fits."""
    text = asked.get("recompute")
    if text is not None:
        word = "none" if str(text).startswith("none") else "full" if str(text).startswith("full") else "selective"
        return plan.model_copy(update={"recompute": word})
    check_plan(plan, scenario)
    tried = [plan.model_copy(update={"recompute": word}) for word in ("none", "selective", "full")]
    fitting = [each for each in tried if all(stage.total <= stage.usable for stage in footprint(each, scenario))]
    chosen = (fitting or tried)[0]
    guessed.append(f"recompute {chosen.recompute}")
    return chosen


def deduplicating(plan: Plan, scenario: Scenario, asked: Row) -> str:
    """The all-to-all: DeepEP and HybridEP send once to each node, where a group has several; NCCL to each rank."""
    if plan.ep == 1 or not re.search(r"(deep|hybrid)ep", str(asked.get("dispatcher"))):
        return "linear"
    members = ranks_of_stage(plan, 0)[groups(plan, ("ep",))]
    applies = menu.load("collectives", "node_dedup", "applies")
    return "node_dedup" if applies(members, scenario.cluster) else "linear"


def _graphs(text: object) -> Graphs:
    """Graphs of the router alone leave most launches to the host."""
    if text is None:
        return "unknown"
    return "all" if "full_iteration" in str(text) else "some" if "attn" in str(text) else "none"


def _overlaps_tensor(asked: Row) -> bool:
    """Megatron does so unasked; PyTorch's own sharding where it is told to."""
    if asked.get("overlap_tp_comm") is not None:
        return bool(asked["overlap_tp_comm"])
    return "FSDP" not in str(asked.get("sharding"))


def fits(case: Case) -> bool:
    """Whether the plan's memory is no more than the GPU has."""
    memory = case.scenario.cluster.gpu.memory_bytes
    return all(stage.total <= memory for stage in footprint(case.plan, case.scenario))
