"""A plan that is run has the loss and gradients of the one-device model, and sends the bytes that were predicted."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from _reference import Reference, given_experts, run_on_one_device

from moeplan import catalogue
from moeplan.compiler.compile_plan import compile_plan
from moeplan.compiler.tokens import token_numbers_T
from moeplan.domain.plan import Plan
from moeplan.domain.program import Stream
from moeplan.domain.scenario import Scenario
from moeplan.errors import ExecutionError
from moeplan.executor.execute import Execution, Job, document_of, joined
from moeplan.executor.launch import run_ranks
from moeplan.executor.weights import unit_specs
from moeplan.network.expand import expand

STEPS, GLOBAL_BATCH, SEQUENCE = 2, 8, 16
FP32 = dict.fromkeys(
    ("compute", "weights", "activations", "gradients", "moments", "dispatch", "combine", "cache"), "fp32"
) | {"master_weights": None}
ONE, TWO = {"stages": (4,)}, {"pp": 2, "stages": (2, 2)}
ZIPF = {"with": {"routing": {"router": "zipf", "skew": 0.9}}}
NODES = {"cluster": {"extends": "hgx-h100-rail", "nodes": 2, "gpus_per_node": 2, "nic": {"per_node": 2}}}
NODES_OF_4 = {"cluster": {**NODES["cluster"], "gpus_per_node": 4, "nic": {"per_node": 4}}}
REPLICAS = {"experts": [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1]] * 4}
SHARES = {
    "experts": [[0, 1, 2, 3, 4, 5, 6, 7, 0, 1]] * 4,
    "shares": [[0.75, 0.5, 1, 1, 1, 1, 1, 1, 0.25, 0.5]] * 4,
}
SPREAD = {"experts": [[0, 1, 2, 0, 3, 4, 0, 5, 6, 0, 7, -1], [*range(8), 1, 2, 3, -1]] * 2}

Run = Callable[[int], Execution]
Case = tuple[str, int, dict[str, Any], dict[str, Any]]
CASES: list[Case] = [
    ("one rank", 1, ONE, {}),
    ("one rank, recomputed", 1, {**ONE, "recompute": "full", "micro_batch": 2}, {}),
    ("latent attention, shared expert, layer norm, dense", 1, {"stages": (3,)}, {"model": "mixed"}),
    ("window, chunk, sinks and biases", 1, {"stages": (3,)}, {"model": "seeing"}),
    ("window, chunk, sinks and biases, cp", 2, {"stages": (3,), "dp": 1, "cp": 2}, {"model": "seeing"}),
    ("window, chunk, sinks and biases, tp", 2, {"stages": (3,), "dp": 1, "tp": 2, "ep": 2}, {"model": "seeing"}),
    ("dp", 2, {**ONE, "dp": 2, "zero_dense": 0, "zero_expert": 0}, {}),
    ("ep", 2, {**ONE, "dp": 2, "ep": 2}, {}),
    ("ep, zipf", 2, {**ONE, "dp": 2, "ep": 2}, ZIPF),
    ("ep, zipf, overlap 2", 2, {**ONE, "dp": 2, "ep": 2, "overlap_degree": 2, "micro_batch": 2}, ZIPF),
    ("ep, zero 3, recomputed", 2, {**ONE, "dp": 2, "ep": 2, "zero_dense": 3, "recompute": "full"}, {}),
    ("ep, drop", 2, {**ONE, "dp": 2, "ep": 2, "capacity": {"rule": "drop", "factor": 1.0}}, {}),
    ("ep, pad", 2, {**ONE, "dp": 2, "ep": 2, "capacity": {"rule": "pad", "factor": 1.25}}, {}),
    ("ep, pad to max, overlap 4", 2, {**ONE, "dp": 2, "ep": 2, "capacity": {"rule": "pad_to_max"}, "overlap_degree": 4},
     {}),
    ("replicas", 2, {**ONE, "dp": 2, "ep": 2, "placement": REPLICAS}, {}),
    ("replicas, shares, overlap 2", 2, {**ONE, "dp": 2, "ep": 2, "placement": SHARES, "overlap_degree": 2}, {}),
    ("tp", 2, {**ONE, "dp": 1, "tp": 2, "micro_batch": 2}, {}),
    ("tp, latent attention", 2, {"stages": (3,), "dp": 1, "tp": 2, "etp": 2}, {"model": "mixed"}),
    ("tp, recomputed", 2, {**ONE, "dp": 1, "tp": 2, "recompute": "full"}, {}),
    ("tp and ep", 2, {**ONE, "dp": 1, "tp": 2, "ep": 2}, {}),
    ("etp", 2, {**ONE, "dp": 2, "etp": 2}, {}),
    ("cp and ep", 2, {**ONE, "dp": 1, "cp": 2, "ep": 2}, {}),
    ("cp, latent, recomputed", 2, {"stages": (3,), "dp": 1, "cp": 2, "recompute": "full"}, {"model": "mixed"}),
    ("gpipe", 2, {**TWO, "dp": 1, "schedule": "gpipe"}, {}),
    ("1f1b, uneven stages", 2, {**TWO, "dp": 1, "stages": (3, 1)}, {}),
    ("zero bubble", 2, {**TWO, "dp": 1, "schedule": "zero_bubble"}, {}),
    ("interleaved", 2, {**TWO, "dp": 1, "vpp": 2, "stages": (1, 1, 1, 1), "schedule": "interleaved"}, {}),
    ("zbv", 2, {**TWO, "dp": 1, "vpp": 2, "stages": (1, 1, 1, 1), "schedule": "zbv"}, {}),
    ("zbv, empty stages", 2, {**TWO, "dp": 1, "vpp": 2, "stages": (2, 0, 0, 2), "schedule": "zbv"}, {}),
    ("dual pipe", 2, {**TWO, "dp": 1, "vpp": 2, "schedule": "dual_pipe"}, {}),
    ("pipeline, recomputed", 2, {**TWO, "dp": 1, "recompute": "full", "schedule": "zero_bubble"}, {}),
    ("bf16 with fp32 masters", 2, {**ONE, "dp": 2, "ep": 2, "precision": {}}, {}),
    ("dp and ep, zero 1", 4, {**ONE, "dp": 4, "ep": 2}, {}),
    ("dp and ep, zero 0", 4, {**ONE, "dp": 4, "ep": 2, "zero_dense": 0, "zero_expert": 0}, {}),
    ("dp and ep, zero 2", 4, {**ONE, "dp": 4, "ep": 2, "zero_dense": 2, "zero_expert": 2}, {}),
    ("dp and ep, zero 3", 4, {**ONE, "dp": 4, "ep": 2, "zero_dense": 3, "zero_expert": 3}, {}),
    ("gradients after the passes", 4, {**ONE, "dp": 4, "ep": 2, "overlap_gradients": False}, {}),
    ("ep 4, overlap 2", 4, {**ONE, "dp": 4, "ep": 4, "overlap_degree": 2}, {}),
    ("ep and etp", 4, {**ONE, "dp": 4, "ep": 2, "etp": 2}, {}),
    ("tp, ep and etp", 4, {**ONE, "dp": 2, "tp": 2, "ep": 2, "etp": 2, "overlap_degree": 2}, {}),
    ("tp, cp", 4, {**ONE, "dp": 1, "tp": 2, "cp": 2, "ep": 4}, {}),
    ("tp, pp", 4, {**TWO, "dp": 1, "tp": 2, "schedule": "zero_bubble", "ep": 2}, {}),
    ("pp, dp and ep", 4, {**TWO, "dp": 2, "ep": 2, "zero_dense": 2}, {}),
    ("pp 4, far order", 4, {"dp": 1, "pp": 4, "stages": (1, 1, 1, 1)}, {}),
    ("dual pipe with ep", 4, {**TWO, "dp": 2, "ep": 2, "vpp": 2, "schedule": "dual_pipe", "micro_batch": 1}, {}),
    ("other rank order", 4, {**TWO, "dp": 2, "ep": 2, "rank_order": "tp-cp-ep-pp-dp"}, {}),
    ("ep far", 4, {**ONE, "dp": 4, "ep": 2, "rank_order": "tp-cp-dp-ep-pp", "zero_expert": 2}, {}),
    ("replicas in groups, zero 1", 4, {**ONE, "dp": 4, "ep": 2, "placement": REPLICAS}, {}),
    ("replicas on four places", 4, {**ONE, "dp": 4, "ep": 4, "placement": SPREAD}, {}),
    ("dp, tp, pp and ep, zero 3, overlap 2", 8, {**TWO, "dp": 2, "tp": 2, "ep": 4, "schedule": "zero_bubble",
     "zero_dense": 3, "overlap_degree": 2}, NODES_OF_4),
    ("ep 8 in two stages, zero 2, recomputed", 8, {**ONE, "dp": 8, "ep": 8, "all_to_all": "two_stage",
     "zero_dense": 2, "recompute": "full"}, NODES_OF_4),
    ("dp, cp, pp and ep, zbv", 8, {"dp": 2, "cp": 2, "pp": 2, "vpp": 2, "ep": 4, "stages": (1, 1, 1, 1),
     "schedule": "zbv"}, NODES_OF_4),
    *(
        (f"{name} among nodes", 4, {**ONE, "dp": 4, "ep": 4, "all_to_all": name}, NODES)
        for name in ("two_stage", "two_dh", "rail_aligned", "leader_gather", "grouped_pairwise", "scheduled", "ring")
    ),
    ("node_dedup among nodes", 4, {**ONE, "dp": 4, "ep": 4, "all_to_all": "node_dedup"}, NODES),
    ("node_dedup, zipf, zero 3, recomputed", 4, {**ONE, "dp": 4, "ep": 4, "all_to_all": "node_dedup", "zero_dense": 3,
     "recompute": "full"}, NODES | ZIPF),
    ("node_dedup, pad, replicas", 4, {**ONE, "dp": 4, "ep": 4, "all_to_all": "node_dedup", "placement": SPREAD,
     "capacity": {"rule": "pad", "factor": 1.25}}, NODES),
    ("node_dedup, drop, tp and etp", 8, {**ONE, "dp": 4, "tp": 2, "ep": 4, "etp": 2, "all_to_all": "node_dedup",
     "capacity": {"rule": "drop", "factor": 1.0}}, NODES_OF_4),
    *((f"{name} in a node", 4, {**ONE, "dp": 4, "ep": 4, "all_to_all": name}, {}) for name in (
        "pairwise_rounds", "ring", "scheduled",
    )),
]  # fmt: skip
MIXED = {
    "hidden_size": 64, "vocab_size": 96, "norm": "layer",
    "parts": {
        "mla": {
            "kind": "latent_attention", "num_heads": 4, "q_lora_rank": 24, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
            "qk_rope_head_dim": 4, "v_head_dim": 8,
        },
        "plain": {"kind": "latent_attention", "num_heads": 4, "kv_lora_rank": 16, "qk_nope_head_dim": 8,
                  "qk_rope_head_dim": 4, "v_head_dim": 8, "norm": "layer"},
        "mha": {"kind": "attention", "num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "qk_norm": "head"},
        "dense": {"kind": "dense", "width": 96, "gated": False, "norm": "layer"},
        "experts": {"kind": "experts", "num_experts": 8, "top_k": 3, "width": 32, "shared": {"width": 48}},
    },
    "layers": [
        {"mixer": "mla", "feed_forward": "experts"},
        {"mixer": "mha", "feed_forward": "dense"},
        {"mixer": "plain", "feed_forward": "experts"},
    ],
}  # fmt: skip
SEEING = {
    "hidden_size": 64, "vocab_size": 96,
    "parts": {
        "window": {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "window": 5, "sinks": True},
        "chunk": {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16, "chunk": 4, "qkv_bias": True},
        "sinks": {"kind": "attention", "num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "sinks": True,
                  "qkv_bias": True},
        "experts": {"kind": "experts", "num_experts": 8, "top_k": 2, "width": 32},
    },
    "layers": [{"mixer": name, "feed_forward": "experts"} for name in ("window", "chunk", "sinks")],
}  # fmt: skip
SMALL = {
    "hidden_size": 64, "vocab_size": 128,
    "parts": {
        "attention": {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16},
        "experts": {"kind": "experts", "num_experts": 8, "top_k": 2, "width": 64},
    },
    "layers": [{"repeat": 4, "mixer": "attention", "feed_forward": "experts"}],
}  # fmt: skip


@lru_cache
def scenario(number: int) -> Scenario:
    _, world, _, changes = CASES[number]
    cluster = {"cluster": changes["cluster"]} if "cluster" in changes else {"cluster.gpus_per_node": world}
    document = dict(catalogue.document("tiny-moe-2-ranks", cluster))
    document |= {
        "model": {"mixed": MIXED, "seeing": SEEING}.get(changes.get("model", ""), SMALL),
        "routing": {"router": "multinomial"},
        **changes.get("with", {}),
    }
    document["workload"] = {"phase": "train", "global_batch": GLOBAL_BATCH, "sequence": SEQUENCE}
    return catalogue.load(document)


def plan(number: int) -> Plan:
    return Plan(**({"dp": 1, "precision": FP32} | CASES[number][2]))


@pytest.fixture(scope="session")
def executed(tmp_path_factory: pytest.TempPathFactory) -> Run:
    """The run of a case. All plans of so many ranks are one launch, which the processes of the tests share."""
    base = tmp_path_factory.getbasetemp()
    root = base.parent if "PYTEST_XDIST_TESTRUNUID" in os.environ else base

    def of(number: int) -> Execution:
        found = launched(CASES[number][1], root)
        if isinstance(found, str):
            raise ExecutionError(found)
        return found[number]

    return of


@lru_cache
def launched(world: int, root: Path) -> dict[int, Execution] | str:
    """All that so many ranks run, or what went wrong."""
    numbers = [number for number, case in enumerate(CASES) if case[1] == world]
    programs = [compile_plan(plan(number), scenario(number), folded=False) for number in numbers]
    folder = root / f"world-{world}"
    said = folder / "said"
    try:
        folder.mkdir()
    except FileExistsError:
        until_s = time.monotonic() + 300
        while not said.exists() and time.monotonic() < until_s:
            time.sleep(0.2)
    else:
        jobs = [Job(scenario=scenario(at), plan=plan(at), steps=STEPS, keeps_gradients=True) for at in numbers]
        (folder / "jobs.json").write_text(json.dumps([document_of(job, "cpu") for job in jobs]))
        try:
            run_ranks(folder, programs, world)
            said.write_text("")
        except ExecutionError as error:
            said.write_text(str(error))
    if message := said.read_text():
        return message
    return {
        number: joined(folder, at, scenario=scenario(number), plan=plan(number), program=programs[at], device="cpu")
        for at, number in enumerate(numbers)
    }


@lru_cache
def reference(number: int) -> Reference:
    torch.set_num_threads(1)
    return run_on_one_device(plan(number), scenario(number), steps=STEPS)


def ids(number: int) -> str:
    return CASES[number][0].replace(",", "").replace(" ", "-")


every = pytest.mark.parametrize("number", range(len(CASES)), ids=ids)


@every
def test_loss_and_gradients_are_those_of_the_one_device_model(number: int, executed: Run) -> None:
    found, wanted = executed(number), reference(number)
    is_exact = found.plan.precision.compute == "fp32"
    assert found.losses[0] == pytest.approx(wanted.losses[0], rel=2e-6 if is_exact else 5e-3)
    assert found.losses == pytest.approx(wanted.losses, rel=1e-4 if is_exact else 2e-2)
    worst = gradient_error(found, wanted)
    assert worst < (1e-5 if is_exact else 0.1)


def gradient_error(found: Execution, wanted: Reference) -> float:
    """The largest difference in a weight's gradient over the largest number in it."""
    worst = 0.0
    for rank in range(found.plan.world_size):
        specs = unit_specs(found.plan, found.scenario, rank)
        for spec, table in zip(specs, found.gradients[rank], strict=True):
            whole = spec.filled(lambda name: wanted.gradients[name])
            size = torch.cat([part.abs().amax(1, keepdim=True).expand_as(part) for part in
                              whole.split(np.diff(spec.starts).tolist(), dim=1)], dim=1)[:, spec.own]  # fmt: skip
            error = (torch.from_numpy(table) - whole[:, spec.own]).abs() / size.clamp_min(1e-30)
            worst = max(worst, float(error.max()))
    return worst


@every
def test_the_bytes_that_are_sent_are_those_predicted(number: int, executed: Run) -> None:
    """To the byte where the routing gives whole tokens, and no rows are halved for two rings; else to the row."""
    found = executed(number)
    program = found.timeline.program
    sent: dict[tuple[int, int, int], float] = {}
    for task, target, size in found.sent_bytes.tolist():
        if program.tasks.stream_T[task] != Stream.COMPUTE:
            key = (exchange_of(found, task), int(program.tasks.lane_T[task]), target)
            sent[key] = sent.get(key, 0) + size
    wanted, times = predicted(found)
    assert set(sent) <= set(wanted)
    for key, size in wanted.items():
        exchange = program.exchanges[key[0]]
        is_whole = not CASES[number][0].startswith(("ep, zipf", "ring among")) and found.plan.etp == 1
        row = found.scenario.model.hidden_size * 4
        slack = (
            0 if is_whole or exchange.kind not in ("dispatch", "combine", "expert_tensor") else times[key[0]] * 8 * row
        )
        # How many tokens meet in a node is a matter of chance, of which the program has the mean.
        close = 0.3 if exchange.reach_GB is not None else 1e-9
        assert sent.get(key, 0) == pytest.approx(size, rel=close, abs=slack), (exchange.kind, key)


def test_one_copy_of_each_token_goes_to_a_node_and_a_number_for_each_choice(executed: Run) -> None:
    """To the rank of the same index, in the dispatch of both passes; forward with the weights."""
    number = next(at for at, case in enumerate(CASES) if case[0] == "node_dedup among nodes")
    found, row = executed(number), 4 * SMALL["hidden_size"]
    program, chosen, wanted = found.timeline.program, given_experts(plan(number), scenario(number)), np.zeros(4, int)
    for rank in range(4):
        for microbatch in range(found.plan.num_microbatches(GLOBAL_BATCH)):
            tokens = token_numbers_T(found.plan, found.scenario, position=rank, microbatch=microbatch)
            for _, kept_NK in chosen:
                is_away = kept_NK[tokens] // 4 != rank // 2
                wanted[rank] += 2 * row * is_away.any(axis=1).sum() + 4 * is_away.sum()
    sent = np.zeros(4, int)
    for task, target, size in found.sent_bytes.tolist():
        source = int(program.tasks.lane_T[task])
        if program.kind(task) == "dispatch" and target // 2 != source // 2:
            assert target % 2 == source % 2
            sent[source] += size
    assert (sent == wanted).all()


def exchange_of(found: Execution, task: int) -> int:
    program = found.timeline.program
    return program.meetings[int(program.tasks.unit_T[task])].exchange


def predicted(found: Execution) -> tuple[dict[tuple[int, int, int], float], dict[int, int]]:
    """Bytes of each exchange from rank to rank in one step, and how often each rank takes part."""
    program, cluster = found.timeline.program, found.scenario.cluster
    bytes_of: dict[tuple[int, int, int], float] = {}
    times: dict[tuple[int, int], int] = {}
    for task in np.flatnonzero(program.tasks.stream_T != Stream.COMPUTE).tolist():
        key = (exchange_of(found, task), int(program.tasks.lane_T[task]))
        times[key] = times.get(key, 0) + 1
    for number in {number for number, _ in times}:
        exchange = program.exchanges[number]
        pattern = expand(exchange, cluster)
        columns = (pattern.source_F.tolist(), pattern.target_F.tolist(), pattern.share_F.tolist())
        for source, target, share in zip(*columns, strict=True):
            size = share * exchange.size_bytes * times.get((number, source), 0)
            bytes_of[number, source, target] = bytes_of.get((number, source, target), 0.0) + size
    return bytes_of, {number: count for (number, _), count in times.items()}


@every
def test_every_expert_gets_the_tokens_of_the_routing(number: int, executed: Run) -> None:
    """As many as the program computes with; of expectations, which need not be whole, one more or less."""
    found, chosen = executed(number), given_experts(plan(number), scenario(number))
    rule, groups = found.plan.capacity.rule, found.plan.num_microbatches(GLOBAL_BATCH) * found.plan.edp
    for kept_E, (chosen_NK, kept_NK) in zip(reference(number).kept_E, chosen, strict=True):
        assert kept_E.sum() <= chosen_NK.size
        if rule in ("dropless", "pad_to_max"):
            assert (kept_NK == chosen_NK).all()
        else:
            assert (kept_E <= groups * found.plan.ep * capacity(found)).all()


def capacity(found: Execution) -> int:
    tokens = found.plan.micro_batch * SEQUENCE // (found.plan.cp * found.plan.tp) * found.plan.etp
    return int(np.ceil((found.plan.capacity.factor or 1.0) * tokens * 2 / 8))


@every
def test_every_task_is_a_span_of_the_timeline(number: int, executed: Run) -> None:
    """After what it waits for, in the order of its stream, with processor time."""
    found = executed(number)
    timeline, program = found.timeline, found.timeline.program
    assert timeline.source == "measured"
    assert (timeline.end_s_T >= timeline.start_s_T).all()
    assert timeline.start_s_T.min() == 0
    own = program.tasks.lane_T[program.before_D] == program.tasks.lane_T[program.after_D]
    before, after = program.before_D[own], program.after_D[own]
    assert (timeline.start_s_T[after] >= timeline.end_s_T[before]).all()
    computes = program.tasks.stream_T == Stream.COMPUTE
    assert (found.processor_s_T[computes] >= 0).all()
    assert found.processor_s_T[computes].sum() > 0
    assert len(CASES) >= 30
