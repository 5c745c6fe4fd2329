"""Bytes of memory against the equations of the papers, written out here a second time."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from moeplan import catalogue
from moeplan.cost import memory
from moeplan.domain.model import Layer, Model, from_mapping
from moeplan.domain.operators import Operator
from moeplan.domain.plan import Plan, Precision
from moeplan.domain.scenario import Scenario
from moeplan.domain.workload import Workload
from moeplan.partition.footprint import held, states

HALF = Precision(gradients="bf16")
S, B, H, A, V, LAYERS = 256, 2, 512, 8, 4096, 16
"""Sequence, sequences of a micro-batch, hidden size, heads, vocabulary, layers: the papers' s, b, h, a, v, L."""


def gpt(*, layers: int = LAYERS) -> Model:
    """A GPT of layers with 4 h feed-forward width, no gate and no rotary positions."""
    attention = {"kind": "attention", "num_heads": A, "num_kv_heads": A, "head_dim": H // A, "rotary": False}
    return from_mapping(
        {
            "hidden_size": H,
            "vocab_size": V,
            "norm": "layer",
            "parts": {
                "attention": attention | {"norm": "layer"},
                "dense": {"kind": "dense", "width": 4 * H, "gated": False, "norm": "layer"},
            },
            "layers": [{"repeat": layers, "mixer": "attention", "feed_forward": "dense"}],
        }
    )


@pytest.fixture(scope="module")
def scenario() -> Scenario:
    small = catalogue.load("small-8-gpus")
    workload = Workload(phase="train", global_batch=64, sequence=S)
    return replace(small, model=gpt(), workload=workload, routing=None)


def operators(layer: Layer, *, tp: int = 1) -> tuple[Operator, ...]:
    mixer, block = layer.mixer, layer.feed_forward
    assert mixer is not None
    assert block is not None
    assert block.kind == "dense"
    return (
        *mixer.operators(tokens=S * B, sequence=S, context=S, tp=tp),
        *block.operators(tokens=S * B, tp=tp),
    )


def layer_bytes(*, tp: int = 1) -> float:
    """s b h (34 - 2) / t of Korthikanti et al., and in place of 5 a s^2 b of softmax a log-sum-exp of 4 a s b."""
    return (32 * S * B * H + 4 * A * S * B) / tp


@pytest.mark.parametrize("tp", [1, 2, 4, 8])
def test_a_layer_keeps_what_korthikanti_says_but_dropout_masks_and_softmax(tp: int) -> None:
    """Korthikanti et al. 2023, equations 1 and 4: s b h (34 + 5 a s / h) / t, of which 2 s b h are dropout masks."""
    assert memory.kept_bytes(operators(gpt().layers[0], tp=tp), HALF).whole == layer_bytes(tp=tp)


def test_a_weight_gradient_waits_with_32_s_b_h() -> None:
    """Qi et al. 2024, table 1."""
    assert memory.weight_input_bytes(operators(gpt().layers[0]), HALF) == (32 * S * B * H, 0.0)


def plan(schedule: str, *, pp: int, vpp: int = 1, tp: int = 1, recompute: str = "none") -> Plan:
    stages = (LAYERS // (pp * vpp),) * (pp * vpp)
    return Plan.model_validate(
        {
            "dp": 1, "tp": tp, "pp": pp, "vpp": vpp, "stages": stages, "micro_batch": B, "schedule": schedule,
            "recompute": recompute, "precision": HALF,
        }
    )  # fmt: skip


@pytest.mark.parametrize("tp", [1, 4])
@pytest.mark.parametrize("pp", [2, 4, 8])
def test_stage_s_of_1f1b_holds_p_minus_s_micro_batches(scenario: Scenario, pp: int, tp: int) -> None:
    """Korthikanti et al. 2023, section 4.2.3: the first stage holds p, that is L layers' worth whatever p is."""
    activations_P = held(plan("one_f_one_b", pp=pp, tp=tp), scenario).activations_P
    one_stage = LAYERS / pp * layer_bytes(tp=tp)
    assert np.diff(activations_P[:-1]).tolist() == [-one_stage] * (pp - 2)
    passing = activations_P[0] - pp * one_stage
    assert 0 < passing < 2 * layer_bytes(tp=tp)


@pytest.mark.parametrize("vpp", [2, 4])
@pytest.mark.parametrize("pp", [2, 4])
def test_interleaving_costs_the_first_stage_its_factor(scenario: Scenario, pp: int, vpp: int) -> None:
    """Korthikanti et al. 2023, section 4.2.3: 1 + (p - 1) / (p m) for m chunks."""
    once = held(plan("one_f_one_b", pp=pp), scenario).activations_P[0]
    more = held(plan("interleaved", pp=pp, vpp=vpp), scenario).activations_P[0]
    assert more - once == pytest.approx((pp - 1) / (pp * vpp) * LAYERS * layer_bytes(), rel=1e-12)


def test_gpipe_holds_every_micro_batch(scenario: Scenario) -> None:
    """Huang et al., "GPipe" (2019), section 2.3, without recomputation."""
    many, few = plan("gpipe", pp=4), replace(scenario, workload=Workload(phase="train", global_batch=32, sequence=S))
    difference_P = held(many, scenario).activations_P - held(many, few).activations_P
    assert difference_P[1] == 16 * LAYERS / 4 * layer_bytes()


def test_full_recomputation_keeps_2_s_b_h_a_layer(scenario: Scenario) -> None:
    """Korthikanti et al. 2023, table 2: 2 s b h, over t where sequence parallelism divides the inputs."""
    for tp in (1, 2):
        activations_P = held(plan("one_f_one_b", pp=4, tp=tp, recompute="full"), scenario).activations_P
        assert activations_P[0] - activations_P[1] == LAYERS / 4 * 2 * S * B * H / tp


def test_the_last_stage_keeps_fp32_scores(scenario: Scenario) -> None:
    """Korthikanti et al. 2023, section 4.3: 4 s b v / t bytes."""
    for tp in (1, 2, 8):
        logits_P = held(plan("one_f_one_b", pp=4, tp=tp), scenario).logits_P
        assert logits_P.tolist() == [0, 0, 0, 4 * S * B * V / tp]


@pytest.mark.parametrize(("zero", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.88)])
def test_states_are_those_of_the_zero_paper(zero: int, gigabytes: float) -> None:
    """Rajbhandari et al. 2020, figure 1: 7.5e9 parameters, 64 ranks, 2 + 2 + 12 bytes."""
    parameters, ranks = np.array([7.5e9]), 64
    found = sum(memory.state_bytes(parameters, replicas=ranks, zero=zero, precision=HALF))
    formula = [16, 4 + 12 / ranks, 2 + 14 / ranks, 16 / ranks][zero]
    assert found == pytest.approx(7.5e9 * formula, rel=1e-12)
    assert found == pytest.approx(gigabytes * 1e9, rel=0.003)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
def test_a_stage_holds_its_share_of_a_models_states(scenario: Scenario, zero: int) -> None:
    dp, tp, bytes_each = 2, 2, [16, 4 + 12 / 2, 2 + 14 / 2, 16 / 2][zero]
    asked = plan("one_f_one_b", pp=2, tp=tp).model_copy(update={"dp": dp, "zero_dense": zero})
    found = states(asked, scenario)
    rank_states_P = found.weights_P + found.gradients_P + found.optimizer_P
    model = scenario.model
    layers = sum(layer.dense_parameters_per_rank(tp) for layer in model.layers)
    whole = layers + model.embedding_parameters_per_rank(tp) + model.head_parameters_per_rank(tp)
    assert rank_states_P.sum() == pytest.approx(whole * bytes_each, rel=1e-12)


def test_smartmoes_20_bytes_a_parameter_are_18_here_and_a_gradient_in_half_precision() -> None:
    """Weight 2, fp16 gradient 2, fp32 gradient 4, master 4, moments 8. A `Precision` has one format of gradients.

    So 18 where they are summed in fp32 (a kernel that sums as it goes needs no copy), 16 where they stay in half.
    """
    one = np.array([1.0])
    fp32 = Precision(weights="fp16", activations="fp16", gradients="fp32")
    half = fp32.model_copy(update={"gradients": "fp16"})
    found = [sum(memory.state_bytes(one, replicas=1, zero=0, precision=each)) for each in (fp32, half)]
    assert found == [18, 16]
    assert found[0] + 2 == 20
