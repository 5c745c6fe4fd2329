"""What `explain` says of a change is what simulating, or planning, the changed scenario by hand says."""

from __future__ import annotations

from functools import lru_cache

import pytest

import moeplan as mp

SCENARIOS = ("small-two-nodes", "small-8-gpus")
CHANGES: dict[str, dict[str, object]] = {
    "NIC bandwidth": {"cluster.nic.bandwidth": "55 GB/s"},
    "nvlink bandwidth": {"cluster.links.nvlink.bandwidth": "495 GB/s"},
    "pcie bandwidth": {"cluster.links.pcie.bandwidth": "69.3 GB/s"},
    "memory bandwidth": {"cluster.gpu.memory_bandwidth": "3.685 TB/s"},
    "peak FLOP/s": {
        "cluster.gpu.peak_fp32": "73.7 TFLOP/s",
        "cluster.gpu.peak_tf32": "543.95 TFLOP/s",
        "cluster.gpu.peak_bf16": "1088.45 TFLOP/s",
        "cluster.gpu.peak_fp16": "1088.45 TFLOP/s",
        "cluster.gpu.peak_fp8": "2176.9 TFLOP/s",
    },
    "message latency and overhead": {
        "cluster.links.nvlink.latency": "405 ns",
        "cluster.links.pcie.latency": "450 ns",
        "cluster.nic.latency": "540 ns",
        "cluster.nic.message_overhead": "4.5 us",
        "cluster.nic.message_gap": "900 ns",
        "cluster.fabric.latency": "180 ns",
    },
    "kernel launch": {"cluster.gpu.kernel_launch": "3.6 us"},
    "memory of each GPU": {"cluster.gpu.memory": "88 GB"},
}


@lru_cache
def explained(name: str) -> mp.Explanation:
    return mp.explain(mp.plan(name, gap=0.0), replan=True, gap=0.0)


def changes_of(name: str, knob: str) -> dict[str, object]:
    nodes = mp.load(name).cluster.num_nodes
    return {"nodes": 2 * nodes} if knob == "nodes" else CHANGES[knob]


@pytest.mark.parametrize("name", SCENARIOS)
def test_every_change_is_one_that_was_worked_out_by_hand(name: str) -> None:
    assert {each.knob.name for each in explained(name).helps} == {*CHANGES, "nodes"}


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize("knob", [*CHANGES, "nodes"])
def test_a_change_costs_what_simulating_and_planning_the_changed_scenario_say(name: str, knob: str) -> None:
    found = explained(name)
    (each,) = [each for each in found.helps if each.knob.name == knob]
    changed = mp.load(name, changes_of(name, knob))
    if each.step_s is not None:
        kept_s = mp.simulate(changed, found.plan).figures.step_s
        assert each.step_s == pytest.approx(kept_s, rel=1e-12)
        assert each.step_change == pytest.approx(kept_s / found.step_s - 1, abs=1e-11)
    assert each.replanned is not None
    scratch = mp.plan(changed, gap=0.0)
    assert each.replanned.step_s == pytest.approx(scratch.step_s, rel=1e-12)
    assert each.replanned.lower_bound_s == pytest.approx(scratch.lower_bound_s, rel=1e-12)
    assert each.step_s is None or scratch.step_s <= each.step_s * (1 + 1e-9)


@pytest.mark.parametrize("name", SCENARIOS)
@pytest.mark.parametrize(
    ("constant", "less", "more"),
    [
        ("cluster.gpu.gemm_efficiency", "74.16 %", "90.64 %"),
        ("cluster.gpu.kernel_launch", "3.6 us", "4.4 us"),
        ("cluster.gpu.exchange_share_beside_compute", "90 %", None),
        ("cluster.nic.efficiency", "86.4 %", "100 %"),
        ("cluster.links.nvlink.latency", "0.405 us", "0.495 us"),
    ],
)
def test_the_plan_and_its_rival_under_a_wrong_constant_are_simulated_as_by_hand(
    name: str, constant: str, less: str, more: str | None
) -> None:
    found = explained(name)
    shifts = [each for each in found.stability if each.knob.name == constant]
    assert len(shifts) == len([value for value in (less, more) if value])
    for shift, value in zip(shifts, filter(None, (less, more)), strict=True):
        changed = mp.load(name, {constant: value})
        assert shift.step_s == pytest.approx(mp.simulate(changed, found.plan).figures.step_s, rel=1e-12)
        assert shift.rival is not None
        assert shift.rival_step_s == pytest.approx(mp.simulate(changed, shift.rival).figures.step_s, rel=1e-12)
