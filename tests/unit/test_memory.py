"""Memory: laws, a slow second implementation, and the sentence about a plan that does not fit."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from moeplan import catalogue, menu
from moeplan.compiler.compile_plan import orders
from moeplan.cost import memory
from moeplan.domain.cluster import build_cluster
from moeplan.domain.model import Layer, from_mapping
from moeplan.domain.operators import Operator
from moeplan.domain.plan import Plan, Precision
from moeplan.domain.scenario import Scenario
from moeplan.domain.workload import Workload
from moeplan.partition.footprint import check_memory, footprint, held, states
from moeplan.partition.legal import problems
from moeplan.partition.route import Tokens, load_of
from moeplan.partition.stages import VirtualStage, pipeline
from moeplan.partition.weights import weights_of
from moeplan.schedules import peak_held

PARTS = ("weights", "gradients", "optimizer", "activations", "buffers", "logits", "cache")
SCHEDULES = [("gpipe", 1), ("one_f_one_b", 1), ("interleaved", 2), ("zero_bubble", 1), ("zbv", 2), ("dual_pipe", 2)]


def model(*, layers: int = 7, mtp: bool = True) -> Any:
    parts = {
        "attention": {"kind": "attention", "num_heads": 8, "num_kv_heads": 4, "head_dim": 32},
        "dense": {"kind": "dense", "width": 512},
        "experts": {"kind": "experts", "num_experts": 8, "top_k": 2, "width": 256, "shared": {"width": 128}},
    }
    moe = {"mixer": "attention", "feed_forward": "experts"}
    found = {
        "hidden_size": 128, "vocab_size": 1000, "parts": parts,
        "layers": [{"mixer": "attention", "feed_forward": "dense"}, {"repeat": layers - 1, **moe}],
    }  # fmt: skip
    return from_mapping(found | ({"mtp": {"depth": 1, "layers": [moe]}} if mtp else {}))


BASE = replace(
    catalogue.load("small-8-gpus"), model=model(), workload=Workload(phase="train", global_batch=64, sequence=256)
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    schedule, vpp = draw(st.sampled_from(SCHEDULES))
    pp = draw(st.sampled_from([2, 4] if schedule != "gpipe" else [1, 2, 4]))
    tp = draw(st.sampled_from([1, 2]))
    cp = draw(st.sampled_from([1, 2]))
    assume(8 % (pp * tp * cp) == 0)
    dp = 8 // (pp * tp * cp)
    virtual = menu.load("schedules", schedule, "num_virtual_stages")(pp, vpp)
    cuts = sorted(draw(st.lists(st.integers(0, 7), min_size=virtual - 1, max_size=virtual - 1)))
    stages = tuple(np.diff([0, *cuts, 7]).tolist())
    ep = draw(st.sampled_from([each for each in (1, 2, 4, 8) if dp * tp * cp % each == 0]))
    etp = draw(st.sampled_from([each for each in (1, 2) if dp * tp * cp % (ep * each) == 0]))
    zero = 1 if schedule == "dual_pipe" else 3
    found = Plan.model_validate(
        {
            "dp": dp, "tp": tp, "pp": pp, "vpp": vpp, "cp": cp, "ep": ep, "etp": etp, "stages": stages,
            "schedule": schedule, "micro_batch": draw(st.sampled_from([1, 2])),
            "recompute": draw(st.sampled_from(["none", "selective", "full"])),
            "zero_dense": draw(st.integers(0, zero)), "zero_expert": draw(st.integers(0, zero)),
            "overlap_degree": draw(st.sampled_from([1, 2])) if ep > 1 else 1,
            "capacity": draw(st.sampled_from([{"rule": "dropless"}, {"rule": "pad", "factor": 1.25}])),
        }
    )  # fmt: skip
    assume(next(problems(found, BASE), None) is None)
    return found


def total_P(plan: Plan, scenario: Scenario = BASE) -> Any:
    return (states(plan, scenario) + held(plan, scenario)).total_P


@settings(max_examples=60, deadline=None)
@given(plans())
def test_the_parts_sum_to_the_total_and_none_is_negative(plan: Plan) -> None:
    found = footprint(plan, BASE)
    assert [stage.stage for stage in found] == list(range(plan.pp))
    for stage in found:
        assert stage.total == pytest.approx(sum(getattr(stage, part) for part in PARTS), rel=1e-12)
        assert stage.cache == 0.0


@settings(max_examples=60, deadline=None)
@given(plans())
def test_recomputing_more_never_holds_more(plan: Plan) -> None:
    none, selective, full = (
        held(plan.model_copy(update={"recompute": policy}), BASE).total_P for policy in ("none", "selective", "full")
    )
    assert (none >= selective).all()
    assert (selective >= full).all()


@settings(max_examples=40, deadline=None)
@given(plans())
def test_larger_micro_batches_hold_more_on_every_stage_that_keeps_as_many(plan: Plan) -> None:
    small, large = (plan.model_copy(update={"micro_batch": size}) for size in (1, 2))
    batch = BASE.workload.model_copy(update={"global_batch": 128})
    for_large = replace(BASE, workload=batch)
    assert (held(large, for_large).total_P >= held(small, BASE).total_P * 1.2).all()


@settings(max_examples=40, deadline=None)
@given(plans(), st.booleans())
def test_a_higher_zero_stage_never_holds_more(plan: Plan, expert: bool) -> None:
    name = "zero_expert" if expert else "zero_dense"
    found = [states(plan.model_copy(update={name: zero}), BASE).total_P for zero in range(4)]
    for lower, higher in pairwise(found):
        assert (higher <= lower).all()


@settings(max_examples=30, deadline=None)
@given(plans())
def test_the_hottest_place_holds_no_less_than_under_even_routing(plan: Plan) -> None:
    plan = plan.model_copy(update={"capacity": Plan.model_fields["capacity"].default})
    assert BASE.routing is not None
    even = replace(BASE, routing=BASE.routing.model_copy(update={"router": "balanced", "options": {}}))
    slack = 1 + 8 * 8 / (2 * 128)  # tokens are whole, an even share of few may be rounded up for every expert
    assert (held(plan, BASE).total_P * slack >= held(plan, even).total_P).all()


def layer_operators(layer: Layer, plan: Plan, rows: tuple[int, ...]) -> tuple[Operator, ...]:
    tokens = Tokens.of(plan, BASE.workload)
    group = {"tokens": tokens.group, "tp": plan.tp}
    found: tuple[Operator, ...] = ()
    for block in layer.blocks:
        found += block.operators(
            tokens=tokens.group, sequence=tokens.sequence, context=tokens.context, tp=plan.tp, cp=plan.cp
        )
    if layer.experts is None:
        assert layer.feed_forward is not None
        assert layer.feed_forward.kind == "dense"
        return found + layer.feed_forward.operators(**group)
    experts = layer.experts
    found += experts.router_operators(**group) + experts.shared_operators(**group) + experts.combine_operators(**group)
    return found + experts.expert_operators(tokens_per_expert=rows, etp=plan.etp)


def chunk_bytes(stage: VirtualStage, plan: Plan, place: int) -> tuple[float, float]:
    """What F leaves and what W waits with, operator by operator, with nothing recomputed."""
    load = load_of(BASE, plan, rank_tokens=Tokens.of(plan, BASE.workload).rank)
    assert load is not None
    tokens, precision = Tokens.of(plan, BASE.workload), plan.precision
    hidden = 2.0 * tokens.rank * BASE.model.hidden_size
    found: list[Operator] = []
    for layer, moe in zip((*stage.layers, *stage.prediction), (*stage.moe, *(5,) * len(stage.prediction)), strict=True):
        rows = load.rows(moe, place, part=0, parts=1) if layer.is_moe else ()
        found += layer_operators(layer, plan, rows)
    extra = 0.0
    if stage.has_head:
        heads = BASE.model.head_operators(tokens=tokens.group, tp=plan.tp) * 2
        assert BASE.model.mtp is not None
        modules = BASE.model.mtp.operators(tokens=tokens.group, hidden_size=BASE.model.hidden_size, tp=plan.tp)
        found += (*heads, *modules)
        extra += hidden
    return memory.kept_bytes(found, precision).whole + extra, memory.weight_input_bytes(found, precision)[0]


@settings(max_examples=30, deadline=None)
@given(plans())
def test_the_peak_is_that_of_the_real_order_operator_by_operator(plan: Plan) -> None:
    """Against `peak_held` of the schedule, for the hottest place. What is there for a moment is a part of one layer."""
    plan = plan.model_copy(update={"recompute": "none"})
    stages = pipeline(BASE.model, plan, BASE.workload)
    found = held(plan, BASE)
    for rank, order in enumerate(orders(plan, BASE)):
        slow = max(
            peak_held(order, activation=[a for a, _ in chunks], weight_input=[w for _, w in chunks])
            for place in range(plan.ep)
            for chunks in [[chunk_bytes(stages.stages[v], plan, place) for v in stages.virtual[rank]]]
        )
        passing = total_of_one_layer(plan) * max(map(len, order))
        fast = found.activations_P[rank] + found.logits_P[rank]
        assert slow * (1 - 1e-9) <= fast + found.buffers_P[rank]
        assert fast <= slow * (1 + 1e-9) + passing


def total_of_one_layer(plan: Plan) -> float:
    """More than any kernel of a layer reads and writes."""
    rows = (2 * Tokens.of(plan, BASE.workload).group * plan.ep * plan.etp,) * 8
    return max(memory.work_bytes(layer_operators(layer, plan, rows), plan.precision) for layer in BASE.model.layers)


@settings(max_examples=30, deadline=None)
@given(plans())
def test_weights_are_those_that_the_compiler_shards(plan: Plan) -> None:
    plan = plan.model_copy(update={"zero_dense": 0, "zero_expert": 0})
    stages = pipeline(BASE.model, plan, BASE.workload)
    for rank, chunks in enumerate(stages.virtual):
        count = sum(w.dense + w.expert for v in chunks for w in weights_of(stages.stages[v], BASE.model, plan))
        found = states(plan, BASE)
        assert found.weights_P[rank] == 2 * count
        assert found.gradients_P[rank] == 4 * count
        assert found.optimizer_P[rank] == 12 * count


@pytest.mark.parametrize(("schedule", "vpp"), SCHEDULES)
def test_the_moments_kept_are_enough_for_any_sizes(schedule: str, vpp: int) -> None:
    rng = np.random.default_rng(0)
    for pp, microbatches in ((2, 8), (4, 16), (6, 24)):
        for order in menu.load("schedules", schedule, "actions")(pp, microbatches, num_chunks=vpp):
            moments_KC = memory.moments(order, num_chunks=vpp)
            for _ in range(5):
                sizes_C = rng.random(2 * vpp)
                slow = peak_held(order, activation=sizes_C[:vpp].tolist(), weight_input=sizes_C[vpp:].tolist())
                assert (moments_KC[:, : 2 * vpp] @ sizes_C).max() == pytest.approx(slow, rel=1e-12)


def serving(phase: str, **update: Any) -> tuple[Plan, Scenario]:
    workload = Workload.model_validate({"phase": phase, "global_batch": 64, "sequence": 256})
    found = {"dp": 4, "pp": 2, "ep": 4, "stages": (4, 3), "schedule": "gpipe", "micro_batch": 4} | update
    return Plan.model_validate(found), replace(BASE, workload=workload)


def test_the_cache_holds_keys_and_values_of_all_sequences_of_a_replica() -> None:
    plan, scenario = serving("decode")
    found = held(plan, scenario)
    per_layer = 64 // 4 * 256 * 2 * 4 * 32 * 2  # sequences, tokens, key and value, heads, width, bytes
    assert found.cache_P.tolist() == [4 * per_layer, 3 * per_layer]
    assert found.logits_P.tolist() == [0, 4 * 1000 * 4]
    sharded, scenario = serving("decode", dp=2, cp=2)
    assert held(sharded, scenario).cache_P.sum() == found.cache_P.sum()


def test_states_of_recurrent_mixers_do_not_grow_with_the_sequence() -> None:
    plan, scenario = serving("decode")
    layer = model(mtp=False).layers[1]
    state = {"kind": "state_space", "num_heads": 8, "head_dim": 32, "state_size": 16, "num_groups": 1}
    recurrent = from_mapping(
        {
            "hidden_size": 128, "vocab_size": 1000,
            "parts": {"state": state},
            "layers": [{"repeat": 7, "mixer": "state", "feed_forward": layer.feed_forward.model_dump()}],
        }
    )  # fmt: skip
    caches = []
    for sequence in (256, 4096):
        workload = scenario.workload.model_copy(update={"sequence": sequence})
        caches.append(held(plan, replace(scenario, model=recurrent, workload=workload)).cache_P.tolist())
    assert caches[0] == caches[1]
    assert min(caches[0]) > 0


@pytest.mark.parametrize("phase", ["prefill", "decode"])
def test_serving_holds_weights_and_cache_but_no_gradients(phase: str) -> None:
    plan, scenario = serving(phase)
    for stage in footprint(plan, scenario):
        assert stage.gradients == stage.optimizer == 0
        assert min(stage.weights, stage.cache, stage.activations, stage.buffers) > 0


def test_dual_pipe_holds_two_virtual_stages_on_every_rank() -> None:
    base: dict[str, Any] = {"dp": 2, "pp": 4, "stages": (1, 2, 2, 2), "ep": 2}
    dual = Plan.model_validate(base | {"schedule": "dual_pipe", "vpp": 2})
    once_P = states(Plan.model_validate(base), BASE).weights_P
    assert states(dual, BASE).weights_P.tolist() == (once_P + once_P[::-1]).tolist()


def test_tokens_that_came_in_a_narrow_format_are_kept_in_it() -> None:
    plan = Plan.model_validate({"dp": 8, "ep": 8, "stages": (7,)})
    narrow = plan.model_copy(update={"precision": Precision(dispatch="fp8")})
    assert held(narrow, BASE).total_P < held(plan, BASE).total_P
    wide = plan.model_copy(update={"precision": Precision(dispatch="fp32")})
    assert held(wide, BASE).activations_P == held(plan, BASE).activations_P


def on_a_gpu_of(usable_bytes: float) -> Scenario:
    spec = BASE.cluster.spec
    gpu = replace(spec.gpu, usable_memory_bytes=usable_bytes)
    return replace(BASE, cluster=build_cluster(spec.model_copy(update={"gpu": gpu})))


def test_a_plan_that_fits_is_not_refused() -> None:
    assert check_memory(Plan.model_validate({"dp": 8, "ep": 8, "stages": (7,)}), BASE) is None


@pytest.mark.parametrize(
    ("plan", "remedy"),
    [
        ({"dp": 8, "ep": 8}, "use recompute selective"),
        (
            {"dp": 8, "ep": 8, "micro_batch": 4, "recompute": "full", "zero_expert": 3, "zero_dense": 3},
            "use micro_batch",
        ),
        (
            {"dp": 8, "ep": 1, "recompute": "full", "zero_dense": 0, "zero_expert": 0},
            "use zero_dense 1 and zero_expert 1",
        ),
    ],
)
def test_a_plan_that_does_not_fit_is_told_the_smallest_change(plan: dict[str, Any], remedy: str) -> None:
    asked = Plan.model_validate(plan | {"stages": (7,)})
    needed = float(total_P(asked).max())
    found = check_memory(asked, on_a_gpu_of(needed * 0.99))
    assert found is not None
    assert found.startswith("stage 0 needs ")
    assert remedy in found
    assert "\n" not in found


def test_a_plan_that_nothing_helps_is_told_to_use_more_gpus() -> None:
    found = check_memory(Plan.model_validate({"dp": 8, "ep": 8, "stages": (7,)}), on_a_gpu_of(1e6))
    assert found is not None
    assert "use more GPUs" in found
