"""A program moves the bytes and does the FLOPs that the model's equations say, and what cannot be run is refused."""

from collections import defaultdict
from dataclasses import replace
from functools import lru_cache
from typing import Any

import numpy as np
import pytest

from moeplan import catalogue
from moeplan.compiler.compile_plan import compile_plan
from moeplan.cost.cost_model import CostModel
from moeplan.domain.plan import Plan
from moeplan.domain.program import Pass, Program, Stream
from moeplan.domain.scenario import Scenario
from moeplan.errors import PlanError, SimulationError
from moeplan.network.expand import expand
from moeplan.partition.route import load_of
from moeplan.simulator.noise import Noise
from moeplan.simulator.simulate import simulate

TINY = {"dp": 8, "stages": (4,)}
BF16, FP32 = 2.0, 4.0


@lru_cache
def tiny(model: str = "tiny-moe", nodes: int = 1, **changes: Any) -> Scenario:
    """A small model on eight GPUs, 32 sequences of 512 tokens, even routing."""
    given = {"global_batch": 32, "sequence": 512} | changes
    return catalogue.scenario_from(model=model, cluster="hgx-h100-rail", nodes=nodes, **given)


def compiled(given: Scenario, **options: Any) -> Program:
    return compile_plan(Plan(**options), given)


def sent_bytes(program: Program, given: Scenario) -> dict[str, float]:
    """Bytes that all GPUs together send in the step, by kind of exchange."""
    times: dict[int, int] = {}
    for task in np.flatnonzero(program.tasks.stream_T != Stream.COMPUTE).tolist():
        meeting = program.meetings[program.tasks.unit_T[task]]
        times[meeting.exchange] = times.get(meeting.exchange, 0) + (program.tasks.lane_T[task] == meeting.lanes[0])
    meetings = defaultdict(int)
    for meeting in program.meetings:
        meetings[meeting.exchange] += 1
    total: dict[str, float] = defaultdict(float)
    for number, count in times.items():
        exchange = program.exchanges[number]
        share = float(expand(exchange, given.cluster).share_F.sum())
        total[exchange.kind] += share * exchange.size_bytes * count / meetings[number]
    return total


def done_flops(program: Program, *passes: Pass) -> dict[str, float]:
    """FLOP that all GPUs together do in some passes, by kind of kernel."""
    by_work: list[dict[str, float]] = []
    for work in program.works:
        kinds: dict[str, float] = defaultdict(float)
        for kernel in work.kernels:
            kinds[kernel.kind] += kernel.flops
        by_work.append(kinds)
    total: dict[str, float] = defaultdict(float)
    chosen = (program.tasks.stream_T == Stream.COMPUTE) & np.isin(program.tasks.pass_T, passes)
    for task in np.flatnonzero(chosen).tolist():
        ranks = program.lanes[program.tasks.lane_T[task]].multiplicity
        for kind, flops in by_work[program.tasks.unit_T[task]].items():
            total[kind] += flops * ranks
    return total


# ---- bytes


@pytest.mark.parametrize(("ep", "etp"), [(2, 1), (4, 1), (8, 1), (2, 2), (4, 2)])
@pytest.mark.parametrize("overlap_degree", [1, 2])
def test_dispatch_and_combine_carry_each_token_to_its_experts_and_back(ep: int, etp: int, overlap_degree: int) -> None:
    given = tiny()
    found = sent_bytes(compiled(given, **TINY, ep=ep, etp=etp, overlap_degree=overlap_degree), given)
    once = given.workload.step_tokens * 2 * 256 * BF16 * (1 - 1 / ep) * 4
    assert found["dispatch"] == pytest.approx(2 * once)
    assert found["combine"] == pytest.approx(2 * once)


def test_the_ranks_of_one_expert_gather_its_tokens_and_scatter_their_sums() -> None:
    """Twice in each pass, and each of the two ranks sends half of the tokens of its place."""
    given = tiny()
    found = sent_bytes(compiled(given, **TINY, ep=4, etp=2), given)
    assert found["expert_tensor"] == pytest.approx(2 * 2 * 4 * given.workload.step_tokens * 2 * 256 * BF16)


def test_full_recomputation_dispatches_once_more() -> None:
    given = tiny()
    plain, again = (
        sent_bytes(compiled(given, **TINY, ep=8, recompute=recompute), given) for recompute in ("none", "full")
    )
    assert again["dispatch"] == pytest.approx(1.5 * plain["dispatch"])
    assert again["combine"] == pytest.approx(1.5 * plain["combine"])


def test_tokens_in_fewer_bits_are_fewer_bytes() -> None:
    given = tiny()
    plain, small = (
        sent_bytes(compiled(given, **TINY, ep=8, precision={"dispatch": dtype}), given) for dtype in ("bf16", "fp8")
    )
    assert small["dispatch"] == pytest.approx(plain["dispatch"] / 2)
    assert small["combine"] == plain["combine"]


def test_layers_padded_to_their_own_most_send_their_own_bytes() -> None:
    """All sources of a layer are alike then, but not all layers."""
    given = catalogue.load("small-two-nodes", changes={"routing.router": "multinomial"})
    plan = Plan(dp=4, ep=4, stages=(4,), capacity={"rule": "pad_to_max"})  # type: ignore[arg-type]
    load = load_of(given, plan, rank_tokens=given.workload.sequence)
    assert load is not None
    most = [float(table[0, 0]) for table in load.tokens_SE_by_layer]
    assert len(set(most)) > 1
    sizes = {exchange.size_bytes for exchange in compile_plan(plan, given).exchanges if exchange.kind == "dispatch"}
    assert sizes == {each * 8 * 256 * BF16 for each in most}


def test_the_embedding_waits_for_what_tensor_ranks_sum_before_it() -> None:
    program = compiled(tiny(), dp=2, tp=2, pp=2, stages=(2, 2), schedule="zero_bubble")
    tasks = program.tasks
    embedding = [
        task for task in np.flatnonzero((tasks.stream_T == Stream.COMPUTE) & (tasks.layer_T == -1)).tolist()
        if tasks.pass_T[task] == Pass.WEIGHT_GRADIENT and program.lanes[tasks.lane_T[task]].stage == 0
    ]  # fmt: skip
    assert embedding
    for task in embedding:
        before = program.before_D[program.after_D == task]
        assert {program.kind(each) for each in before.tolist()} == {"tensor"}
        assert (tasks.microbatch_T[before] == tasks.microbatch_T[task]).all()


def test_uneven_routing_sends_what_the_router_says() -> None:
    given = catalogue.load("small-two-nodes", changes={"routing.router": "multinomial"})
    program = compiled(given, dp=4, ep=4, stages=(4,))
    for exchange in program.exchanges:
        if exchange.kind in ("dispatch", "combine"):
            assert exchange.share_GG is not None
            tokens = exchange.share_GG * exchange.size_bytes / (256 * BF16)
            assert tokens == pytest.approx(np.rint(tokens))
            places = tokens.sum(axis=1 if exchange.kind == "dispatch" else 0)
            assert places == pytest.approx(np.full(4, 512 * 2))


@pytest.mark.parametrize(("model", "halves"), [("tiny-moe", 1), ("tiny-dense", 2)])
@pytest.mark.parametrize("tp", [2])
def test_tensor_parallelism_gathers_and_scatters_around_each_block(model: str, halves: int, tp: int) -> None:
    """Per block and pass one gather and one scatter, in which tp ranks each send (tp - 1) / tp of the hidden states; at
    both ends of the model one of the two.
    """
    given = tiny(model)
    found = sent_bytes(compiled(given, dp=8 // tp, tp=tp, stages=(4,)), given)
    hidden = given.workload.step_tokens * 256 * BF16
    assert found["tensor"] == pytest.approx(2 * 2 * (halves * 4 + 1) * hidden * (tp - 1))


def test_tensor_ranks_tell_each_other_three_numbers_of_each_token() -> None:
    given = tiny()
    for tp in (2, 4):
        found = sent_bytes(compiled(given, dp=8 // tp, tp=tp, stages=(4,)), given)
        assert found["scores"] == pytest.approx(3 * 4 * given.workload.step_tokens * tp * (tp - 1))


def test_tensor_ranks_sum_the_gradients_of_norms_and_routers() -> None:
    """Two norms of 256 and a router of 8 experts in each of 4 layers, and the last norm; all are summed at once."""
    given = tiny()
    whole = 4 * (2 * 256 + 8 * 256) + 256
    for tp in (2, 4):
        program = compiled(given, dp=8 // tp, tp=tp, stages=(4,))
        assert sent_bytes(program, given)["tensor_gradients"] == pytest.approx(2 * (tp - 1) * (8 // tp) * whole * FP32)


def test_the_sum_over_tensor_ranks_stands_between_reductions_and_the_optimizer() -> None:
    program = compiled(tiny(), dp=2, tp=2, pp=2, stages=(2, 2), schedule="zero_bubble")
    kinds = np.array([program.kind(task) for task in range(len(program.tasks.lane_T))])
    for task in np.flatnonzero(kinds == "tensor_gradients").tolist():
        lane = program.tasks.lane_T == program.tasks.lane_T[task]
        before = program.before_D[program.after_D == task]
        assert set(np.flatnonzero(lane & (kinds == "gradients"))) <= set(before)
        computed = np.flatnonzero(lane & (program.tasks.stream_T == Stream.COMPUTE) & (kinds != "optimizer"))
        assert computed[-1] in before
        (update,) = np.flatnonzero(lane & (kinds == "optimizer"))
        assert task in program.before_D[program.after_D == update]


def test_context_parallelism_gathers_keys_and_values() -> None:
    """Gathered in both passes, their gradients scattered in one; 2 x 2 heads of 64 a token."""
    given = tiny()
    found = sent_bytes(compiled(given, dp=2, cp=4, stages=(4,)), given)
    keys = given.workload.step_tokens * 2 * 2 * 64 * BF16
    assert found["context"] == pytest.approx(3 * 4 * keys * 3)


@pytest.mark.parametrize(
    ("options", "crossings"),
    [
        ({"dp": 2, "pp": 4, "stages": (1, 1, 1, 1)}, 3),
        ({"dp": 4, "pp": 2, "stages": (2, 2)}, 1),
        ({"dp": 4, "pp": 2, "vpp": 2, "stages": (1, 1, 1, 1), "schedule": "interleaved"}, 3),
        ({"dp": 4, "pp": 2, "vpp": 2, "stages": (1, 1, 1, 1), "schedule": "zbv"}, 2),
        ({"dp": 4, "pp": 2, "vpp": 2, "stages": (2, 2), "schedule": "dual_pipe"}, 1),
    ],
)
def test_pipelines_send_hidden_states_over_each_boundary_and_back(options: dict[str, Any], crossings: int) -> None:
    """In a V the two chunks at the turn are neighbours on one rank."""
    given = tiny()
    found = sent_bytes(compiled(given, **options), given)
    assert found["send"] == pytest.approx(2 * crossings * given.workload.step_tokens * 256 * BF16)


@pytest.mark.parametrize(("zero", "gradients", "parameters"), [(0, 2, 0), (1, 1, 1), (2, 4, 1), (3, 4, 8)])
@pytest.mark.parametrize("ep", [1, 4])
def test_replicas_exchange_gradients_and_parameters_as_zero_says(
    zero: int, gradients: int, parameters: int, ep: int
) -> None:
    """In rings of n ranks each of which sends (n - 1) / n; four micro-batches, so ZeRO 2 and 3 repeat themselves."""
    given = tiny()
    found = sent_bytes(compiled(given, **TINY, ep=ep, zero_dense=zero, zero_expert=zero), given)
    model = given.model
    weights = 7 * (model.total_parameters - model.routed_parameters) + (8 // ep - 1) * model.routed_parameters
    assert found["gradients"] == pytest.approx(gradients * weights * FP32)
    assert found["parameters"] == pytest.approx(parameters * weights * BF16)


def test_both_holders_of_a_stage_reduce_their_gradients_together() -> None:
    given = tiny("tiny-dense")
    options = {"dp": 4, "pp": 2, "vpp": 2, "stages": (2, 2), "schedule": "dual_pipe", "zero_dense": 0}
    found = sent_bytes(compiled(given, **options), given)
    assert found["gradients"] == pytest.approx(2 * 7 * given.model.total_parameters * FP32)


# ---- FLOPs


FLOP_PLANS: list[dict[str, Any]] = [
    TINY,
    {**TINY, "ep": 8},
    {**TINY, "ep": 4, "overlap_degree": 2, "zero_dense": 3},
    {"dp": 4, "tp": 2, "ep": 4, "etp": 2, "stages": (4,)},
    {"dp": 2, "tp": 2, "cp": 2, "ep": 2, "stages": (4,), "micro_batch": 2},
    {"dp": 4, "pp": 2, "ep": 4, "stages": (3, 1)},
    {"dp": 4, "pp": 2, "ep": 2, "stages": (2, 2), "schedule": "zero_bubble"},
    {"dp": 4, "pp": 2, "vpp": 2, "stages": (1, 1, 1, 1), "schedule": "zbv"},
    {"dp": 4, "pp": 2, "vpp": 2, "stages": (2, 2), "schedule": "dual_pipe", "ep": 4},
]


@pytest.mark.parametrize("number", range(len(FLOP_PLANS)))
def test_all_gpus_together_do_the_flops_of_the_model(number: int) -> None:
    """Forward: the model's. Backward: twice that for products, two and a half times for fused attention."""
    given = tiny()
    program = compiled(given, **FLOP_PLANS[number])
    forward = done_flops(program, Pass.FORWARD)
    backward = done_flops(program, Pass.BACKWARD, Pass.INPUT_GRADIENT, Pass.WEIGHT_GRADIENT)
    wanted = given.model.forward_flops(tokens=32 * 512, sequence=512)
    assert sum(forward[kind] for kind in ("gemm", "grouped_gemm", "attention")) == pytest.approx(wanted, rel=1e-12)
    assert backward["gemm"] == pytest.approx(2 * forward["gemm"], rel=1e-12)
    assert backward["grouped_gemm"] == pytest.approx(2 * forward["grouped_gemm"], rel=1e-12)
    assert backward["attention"] == pytest.approx(2.5 * forward["attention"], rel=1e-12)
    assert program.model_flops == 3 * wanted


def test_full_recomputation_does_the_layers_forward_twice() -> None:
    given = tiny()
    plain, again = (compiled(given, **TINY, recompute=recompute) for recompute in ("none", "full"))
    more = done_flops(again, Pass.BACKWARD)["gemm"] - done_flops(plain, Pass.BACKWARD)["gemm"]
    head = 2 * 32 * 512 * 256 * 1024
    assert more == pytest.approx(done_flops(plain, Pass.FORWARD)["gemm"] - head, rel=1e-12)
    assert again.model_flops == plain.model_flops


def test_selective_recomputation_repeats_no_product() -> None:
    given = tiny()
    plain, again = (done_flops(compiled(given, **TINY, recompute=r), Pass.BACKWARD) for r in ("none", "selective"))
    assert again["gemm"] == plain["gemm"]
    assert again["elementwise"] > plain["elementwise"]


def test_dropped_tokens_are_not_computed_and_padding_is() -> None:
    given = catalogue.load("small-two-nodes", changes={"routing.skew": 1.0})
    rules = [
        {"rule": "dropless"},
        {"rule": "drop", "factor": 1.0},
        {"rule": "pad", "factor": 1.0},
        {"rule": "pad_to_max"},
    ]
    dropless, drop, pad, most = (
        done_flops(compiled(given, dp=4, ep=4, stages=(4,), capacity=rule), Pass.FORWARD)["grouped_gemm"]
        for rule in rules
    )
    assert drop < pad < most
    assert pad == pytest.approx(dropless, rel=1e-3)
    assert drop < dropless < most


# ---- what is refused


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"dp": 4}, ("dp 4", "= 4 GPUs", "has 8")),
        ({"ep": 3}, ("ep 3", "does not divide the 8")),
        ({"etp": 16}, ("etp 16", "does not divide the 8")),
        ({"micro_batch": 3}, ("micro_batch 3", "global_batch 32")),
        ({"stages": (3,)}, ("3 layers", "has 4")),
        ({"stages": (2, 2)}, ("2 entries", "1 virtual stages")),
        ({"dp": 1, "tp": 8}, ("tp 8", "use one of 1, 2")),
        ({"dp": 2, "pp": 4, "stages": (4,)}, ("1 entries", "4 virtual stages")),
        ({"vpp": 2}, ("num_chunks: 2", "only 1")),
        ({"schedule": "zero_bubble"}, ("num_stages: 1", "2 or more")),
        ({"dp": 4, "pp": 2, "vpp": 2, "stages": (2, 2), "schedule": "dual_pipe", "zero_dense": 2}, ("ZeRO 0 or 1",)),
        (
            {"dp": 4, "pp": 2, "vpp": 2, "stages": (2, 2), "schedule": "dual_pipe", "micro_batch": 4},
            ("num_microbatches: 2", "from 4"),
        ),
        ({"all_to_all": "two_stage", "ep": 8}, ("two_stage", "no effect", "use 'linear'")),
        ({"all_to_all": "tree", "ep": 8}, ("tree", "not an all-to-all")),
        ({"overlap_degree": 2}, ("overlap_degree 2", "no effect", "use 1")),
    ],
)
def test_what_cannot_be_run_is_refused_with_what_was_found_and_what_is_allowed(
    options: dict[str, Any], words: tuple[str, ...]
) -> None:
    with pytest.raises(PlanError) as refused:
        compiled(tiny(), **{**TINY, **options})
    assert str(refused.value).startswith("plan: ")
    for word in words:
        assert word in str(refused.value)


def test_expert_parallelism_of_a_dense_model_is_refused() -> None:
    with pytest.raises(PlanError, match="without experts; use 1"):
        compiled(tiny("tiny-dense"), **TINY, ep=2)


def test_a_schedule_without_a_backward_pass_is_refused() -> None:
    with pytest.raises(PlanError, match="use gpipe with vpp 1"):
        compiled(tiny(phase="prefill"), **TINY)


# ---- every family of models, every phase


@pytest.mark.parametrize(
    ("model", "options"),
    [
        ("tiny-dense", {"dp": 2, "tp": 2, "pp": 2}),
        ("llama-3-70b", {"dp": 1, "tp": 8}),
        ("deepseek-v3", {"dp": 4, "pp": 2, "ep": 4}),
        ("switch-base-128", {"dp": 4, "pp": 2, "ep": 4}),
        ("nemotron-3-super", {"dp": 4, "pp": 2, "ep": 4}),
        ("qwen3.5-35b-a3b", {"dp": 8, "ep": 8}),
        ("deepseek-v4-flash", {"dp": 8, "ep": 8}),
        ("v-moe-l", {"dp": 4, "pp": 2, "ep": 2}),
        ("gpt-oss-20b", {"dp": 4, "pp": 2, "ep": 4}),
        ("deepspeed-2.4b-moe-128", {"dp": 8, "ep": 8}),
    ],
)
def test_every_family_of_models_compiles_and_simulates(model: str, options: dict[str, Any]) -> None:
    given = tiny(model, global_batch=8)
    pp, layers = options.get("pp", 1), len(given.model.all_layers)
    stages = tuple(layers // pp + (stage < layers % pp) for stage in range(pp))
    timeline = simulate(compiled(given, **options, stages=stages), CostModel(gpu=given.cluster.gpu))
    assert 0 < timeline.mfu(given.cluster.gpu.peak_flops_per_s["bf16"]) < 1


def test_predicting_further_tokens_costs_time_and_can_be_left_out() -> None:
    given = tiny("deepseek-v3", global_batch=8)
    without = replace(given, workload=given.workload.model_copy(update={"train_mtp": False}))
    options = {"dp": 8, "ep": 8, "stages": (61,)}
    longer, shorter = (
        simulate(compiled(each, **options), CostModel(gpu=each.cluster.gpu)) for each in (given, without)
    )
    assert longer.step_s > shorter.step_s
    assert longer.program.model_flops == shorter.program.model_flops


@pytest.mark.parametrize("phase", ["prefill", "decode"])
@pytest.mark.parametrize("options", [{"dp": 8, "ep": 8, "stages": (4,)}, {"dp": 2, "tp": 2, "pp": 2, "stages": (2, 2)}])
def test_serving_runs_forward_alone(phase: str, options: dict[str, Any]) -> None:
    given = tiny(phase=phase)
    program = compiled(given, **options, schedule="gpipe", zero_dense=0, zero_expert=0)
    assert set(program.tasks.pass_T.tolist()) == {Pass.FORWARD}
    assert {program.kind(task) for task in range(len(program.tasks))}.isdisjoint(
        {"optimizer", "gradients", "parameters"}
    )
    timeline = simulate(program, CostModel(gpu=given.cluster.gpu))
    assert timeline.step_s > 0
    assert program.step_tokens == (32 if phase == "decode" else 32 * 512)


# ---- noise


def test_noise_is_seeded_and_no_noise_changes_nothing() -> None:
    given = tiny()
    program, costs = compiled(given, **TINY, ep=8), CostModel(gpu=given.cluster.gpu)
    quiet = simulate(program, costs)
    assert simulate(program, costs, noise=Noise()).step_s == quiet.step_s
    one, same, other = (simulate(program, costs, noise=Noise(jitter=0.05, seed=seed)) for seed in (1, 1, 2))
    assert one.start_s_T.tobytes() == same.start_s_T.tobytes()
    assert one.step_s != other.step_s


@pytest.mark.parametrize("field", ["jitter", "slowdown", "stragglers"])
def test_more_noise_never_makes_a_folded_step_shorter(field: str) -> None:
    """A lane of eight ranks goes at the pace of the slowest, so that jitter mostly costs; stragglers always do."""
    given = tiny()
    program, costs = compiled(given, **TINY, ep=8), CostModel(gpu=given.cluster.gpu)
    assert len(program.lanes) == 1
    grades: dict[str, list[dict[str, Any]]] = {
        "jitter": [{"jitter": size} for size in (0.0, 0.02, 0.1, 0.5)],
        "slowdown": [{"stragglers": 1, "slowdown": size} for size in (1.0, 1.1, 2.0, 10.0)],
        "stragglers": [{"stragglers": size, "slowdown": 1.5} for size in (0, 1, 2, 8)],
    }
    steps = [simulate(program, costs, noise=Noise(**grade, seed=3)).step_s for grade in grades[field]]
    assert steps == sorted(steps)
    assert steps[0] < steps[-1]


@pytest.mark.parametrize("wrong", [{"jitter": -0.1}, {"jitter": 3.0}, {"stragglers": -1}, {"slowdown": 0.5}])
def test_noise_out_of_range_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SimulationError, match="noise: "):
        Noise(**wrong)
