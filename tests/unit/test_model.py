"""The noun Model: counts are exact, ranks add up, and kernels do the FLOP and keep the bytes that papers say."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from ruamel.yaml import YAML

from moeplan.domain import operators as op
from moeplan.domain.model import (
    Attention,
    CompressedAttention,
    DeltaNet,
    DenseFeedForward,
    Experts,
    Indexer,
    LatentAttention,
    Layer,
    Model,
    Operator,
    SelectiveScan,
    ShortConvolution,
    StateSpace,
    from_mapping,
)
from moeplan.errors import CatalogueError, PlanError

MODELS = Path(__file__).parents[2] / "scenarios" / "models"
ATTENTION = {"kind": "attention", "num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
EXPERTS = {"kind": "experts", "num_experts": 8, "top_k": 2, "width": 48}
DENSE = {"kind": "dense", "width": 96}
FULL = {"mixer": "attention", "feed_forward": "experts"}


def parts(**changes: dict[str, Any]) -> dict[str, Any]:
    both = {"attention": ATTENTION, "experts": EXPERTS}
    return {"parts": {name: part | changes.get(name, {}) for name, part in both.items()}}


def model(**changes: Any) -> Model:
    parts = {"attention": ATTENTION, "experts": EXPERTS}
    run = {"repeat": 3, "mixer": "attention", "feed_forward": "experts"}
    return from_mapping({"hidden_size": 64, "vocab_size": 128, "parts": parts, "layers": [run]} | changes)


def file_model(name: str) -> Model:
    return from_mapping(YAML(typ="safe", pure=True).load(MODELS / f"{name}.yaml"), name)


def gpt(h: int, heads: int, layers: int, vocab: int, *, causal: bool = True) -> Model:
    attention = {
        "kind": "attention", "num_heads": heads, "num_kv_heads": heads, "head_dim": h // heads, "qkv_bias": True,
        "output_bias": True,
        "norm": "layer", "rotary": False, "causal": causal,
    }  # fmt: skip
    dense = {"kind": "dense", "width": 4 * h, "gated": False, "bias": True, "norm": "layer"}
    runs = [{"repeat": layers, "mixer": attention, "feed_forward": dense}]
    return from_mapping(
        {"hidden_size": h, "vocab_size": vocab, "norm": "layer", "tied_embeddings": True, "layers": runs}
    )


MIXERS = [
    Attention(hidden_size=64, num_heads=8, num_kv_heads=4, head_dim=16, qkv_bias=True, output_bias=True,
    qk_norm="head", sinks=True), Attention(hidden_size=64, num_heads=8, num_kv_heads=8, head_dim=16, v_head_dim=8,
    qk_norm="full", gate="element", post_norm=True), Attention(hidden_size=64, num_heads=8, num_kv_heads=4,
    head_dim=16, window=8, gate="head", relative_buckets=32, norm="layer"), Attention(hidden_size=64, num_heads=8,
    num_kv_heads=4, head_dim=16, chunk=8, shared_key_value=True), LatentAttention(hidden_size=64, num_heads=8,
    q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=12), LatentAttention(
    hidden_size=64, num_heads=8, q_lora_rank=24, kv_lora_rank=16, qk_nope_head_dim=8, qk_rope_head_dim=4,
    v_head_dim=12, indexer=Indexer(num_heads=2, head_dim=8, top_k=4), ), CompressedAttention.model_validate({
    "hidden_size": 64, "num_heads": 8, "head_dim": 16, "q_lora_rank": 24, "output_groups": 4, "output_rank": 8,
    "window": 8, "compression": {"stride": 4, "overlap": True, "index": {"num_heads": 2, "head_dim": 8, "top_k": 3}},
    }), StateSpace(hidden_size=64, num_heads=8, head_dim=16, state_size=12, num_groups=4),
    SelectiveScan(hidden_size=64, inner_size=128, state_size=8, step_rank=4), DeltaNet(hidden_size=64,
    num_key_heads=4, num_value_heads=8, key_head_dim=8, value_head_dim=12), ShortConvolution(hidden_size=64),
]  # fmt: skip
mixers = pytest.mark.parametrize("mixer", MIXERS, ids=lambda mixer: mixer.kind)


@mixers
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_ranks_of_a_mixer_hold_the_whole_once_and_the_replicated_part_each(mixer: Any, tp: int) -> None:
    assert tp * mixer.parameters_per_rank(tp) == mixer.parameters + (tp - 1) * mixer.replicated_parameters


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_ranks_of_a_layer_and_of_the_ends_hold_the_whole(tp: int) -> None:
    shared = {"width": 32, "token_gate": True, "bias": True}
    around = {"shared": shared, "dense_branch": {"width": 96, "mixing": True}, "latent_size": 32, "router_bias": True}
    network = model(parts={"attention": {**ATTENTION, "num_kv_heads": 4}, "experts": {**EXPERTS, **around}})
    layer = network.layers[0]
    divided = layer.parameters - layer.routed_parameters
    assert tp * layer.dense_parameters_per_rank(tp) == divided + (tp - 1) * layer.replicated_parameters
    assert tp * network.embedding_parameters_per_rank(tp) == network.embedding_parameters_per_rank(1)


def test_more_ranks_than_key_value_heads_hold_copies() -> None:
    mixer = Attention(hidden_size=64, num_heads=8, num_kv_heads=2, head_dim=16)
    copies = (8 - 2) * 2 * 64 * 16
    assert 8 * mixer.parameters_per_rank(8) == mixer.parameters + 7 * mixer.replicated_parameters + copies
    assert mixer.cache_elements_per_token(8) == 2 * 16


def test_a_degree_that_does_not_divide_is_refused_with_those_that_do() -> None:
    with pytest.raises(PlanError, match="tp 3 does not divide num_heads 8; use one of 1, 2, 4, 8"):
        MIXERS[0].parameters_per_rank(3)


def test_expert_tensor_parallelism_divides_an_expert() -> None:
    experts = Experts(hidden_size=64, num_experts=8, top_k=2, width=48)
    assert experts.expert_parameters == 3 * 64 * 48
    assert 4 * experts.expert_parameters_per_rank(4) == experts.expert_parameters


def test_the_total_is_the_sum_of_what_it_is_made_of() -> None:
    network = model()
    attention, router, expert = 64 * (64 + 2 * 32 + 64) + 64, 8 * 64 + 64, 3 * 64 * 48
    assert network.total_parameters == 3 * (attention + router + 8 * expert) + 2 * 128 * 64 + 64
    assert network.active_parameters == network.total_parameters - 3 * 6 * expert
    assert network.routed_parameters == 3 * 8 * expert
    assert network.moe_layers == (0, 1, 2)


def test_zero_experts_lower_what_a_token_uses_on_average() -> None:
    plain = Experts(hidden_size=64, num_experts=8, top_k=4, width=48)
    lazy = Experts(hidden_size=64, num_experts=8, top_k=4, width=48, zero_experts=8)
    assert 2 * lazy.active_routed_parameters == plain.active_routed_parameters


def test_equal_layers_are_one_object_and_a_model_survives_json() -> None:
    network = file_model("deepseek-v4-flash")
    assert len({id(layer) for layer in network.layers}) == 4
    again = Model.model_validate_json(network.model_dump_json())
    assert again == network
    assert hash(again) == hash(network)
    assert again.total_parameters == network.total_parameters


@given(st.integers(1, 12), st.integers(0, 20), st.integers(1, 30), st.integers(1, 8))
def test_pairs_are_what_counting_them_gives(sequence: int, past: int, limit: int, stride: int) -> None:
    context = sequence + past
    seen = [position + 1 for position in range(past, context)]
    assert op.pairs(sequence, context) == sum(seen)
    assert op.pairs(sequence, context, limit=limit) == sum(min(keys, limit) for keys in seen)
    assert op.pairs(sequence, context, causal=False) == sequence * context
    assert op.chunked_pairs(sequence, context, stride) == sum((keys - 1) % stride + 1 for keys in seen)
    assert op.strided_pairs(sequence, context, stride=stride) == sum(keys // stride for keys in seen)
    assert op.strided_pairs(sequence, context, stride=stride, limit=limit) == sum(
        min(keys // stride, limit) for keys in seen
    )


def one_layer(network: Model, *, tokens: int, sequence: int, tp: int = 1) -> list[Operator]:
    layer = network.layers[0]
    assert layer.mixer is not None
    assert isinstance(layer.feed_forward, DenseFeedForward)
    found = [*layer.mixer.operators(tokens=tokens, sequence=sequence, context=sequence, tp=tp)]
    return [*found, *layer.feed_forward.operators(tokens=tokens, tp=tp)]


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_kept_bytes_and_what_korthikanti_counts_besides_are_34_and_5_a_s_over_h(tp: int) -> None:
    h, a, s, b = 256, 8, 128, 2
    kept = 2 * sum(o.kept_elements for o in one_layer(gpt(h, a, 1, 1000), tokens=s * b, sequence=s, tp=tp))
    dropout_masks, softmax = 2 * s * b * h // tp, 5 * a * s * s * b // tp
    assert (kept + dropout_masks + softmax) * h * tp == s * b * h * (34 * h + 5 * a * s)


def test_fused_attention_keeps_one_fp32_number_per_query_and_head() -> None:
    found = one_layer(gpt(256, 8, 1, 1000), tokens=256, sequence=128, tp=2)
    assert sum(o.kept_accumulator_elements for o in found) == 256 * 8 // 2


@pytest.mark.parametrize("causal", [False, True])
def test_a_dense_model_does_the_flop_of_narayanan_equation_3(causal: bool) -> None:
    h, heads, layers, vocab, s, b = 256, 8, 6, 1024, 128, 4
    network = gpt(h, heads, layers, vocab, causal=causal)
    closed = 72 * b * s * layers * h * h + 12 * b * s * s * layers * h + 6 * b * s * h * vocab
    unseen = 12 * b * layers * h * (s * s - s * (s + 1) // 2) if causal else 0
    assert 3 * network.forward_flops(tokens=s * b, sequence=s) == closed - unseen


def test_the_backward_pass_is_twice_the_forward_and_attention_half_once_more() -> None:
    found = [o for o in one_layer(gpt(256, 8, 1, 1000), tokens=256, sequence=128) if o.kind != "elementwise"]
    forward, attention = sum(o.flops for o in found), sum(o.flops for o in found if o.kind == "attention")
    assert sum(o.backward_flops for o in found) == 2 * forward + attention // 2
    assert all(o.weight_gradient_flops == (o.flops if o.kind == "gemm" else 0) for o in found)


@mixers
@pytest.mark.parametrize("tp", [1, 2, 4])
def test_tensor_parallel_ranks_together_do_no_less_and_hold_no_less(mixer: Any, tp: int) -> None:
    def total(degree: int, field: str) -> int:
        found = mixer.operators(tokens=64, sequence=32, context=32, tp=degree)
        return degree * sum(getattr(o, field) for o in found)

    for field in ("flops", "kept_elements", "weight_elements"):
        assert total(tp, field) >= total(1, field)
    assert all(
        isinstance(o.flops, int) and o.flops >= 0 for o in mixer.operators(tokens=64, sequence=32, context=32, tp=tp)
    )


@mixers
def test_a_gemm_reads_the_weights_that_the_mixer_has(mixer: Any) -> None:
    found = mixer.operators(tokens=64, sequence=32, context=32)
    weights = sum(o.weight_elements for o in found if o.kind == "gemm")
    assert 0.9 * mixer.parameters <= weights <= 1.15 * mixer.parameters


@mixers
def test_work_grows_with_tokens_and_never_shrinks_with_context(mixer: Any) -> None:
    def flops(tokens: int, context: int) -> int:
        return sum(o.flops for o in mixer.operators(tokens=tokens, sequence=16, context=context))

    assert flops(32, 16) == 2 * flops(16, 16)
    assert flops(16, 64) >= flops(16, 16)


@mixers
def test_a_step_of_decoding_costs_less_than_the_prompt(mixer: Any) -> None:
    step = sum(o.flops for o in mixer.operators(tokens=1, sequence=1, context=64))
    prompt = sum(o.flops for o in mixer.operators(tokens=64, sequence=64, context=64))
    assert 0 < step < prompt


@mixers
def test_the_cache_grows_with_the_context_or_is_a_state(mixer: Any) -> None:
    short, long = mixer.cache_elements(context=1024), mixer.cache_elements(context=4096)
    if mixer.kind in {"state_space", "delta_net", "selective_scan", "short_convolution"}:
        assert short == long == mixer.cache_elements_per_sequence() > 0
    else:
        assert short <= long <= 4 * short


def test_latent_attention_caches_512_and_64_on_each_rank() -> None:
    mixer = file_model("deepseek-v3").layers[0].mixer
    assert mixer is not None
    assert mixer.cache_elements_per_token(1) == mixer.cache_elements_per_token(8) == 576


def test_absorbed_decoding_does_the_flop_of_the_deepseek_v2_paper() -> None:
    mixer, context = MIXERS[4], 100
    attention = [o for o in mixer.operators(tokens=1, sequence=1, context=context) if o.kind == "attention"]
    assert [o.flops for o in attention] == [2 * 8 * context * (16 + 4 + 16)]


def test_a_window_limits_work_and_cache() -> None:
    free = Attention(hidden_size=64, num_heads=8, num_kv_heads=4, head_dim=16)
    local = Attention(hidden_size=64, num_heads=8, num_kv_heads=4, head_dim=16, window=8)
    assert local.pairs(64, 64) == 8 * 64 - 28 < free.pairs(64, 64)
    assert local.cache_elements(context=64) * 8 == free.cache_elements(context=64)


def test_context_parallelism_divides_work_evenly_but_every_key_passes() -> None:
    mixer = Attention(hidden_size=64, num_heads=8, num_kv_heads=4, head_dim=16)
    whole = mixer.operators(tokens=64, sequence=64, context=64)
    part = mixer.operators(tokens=16, sequence=64, context=64, cp=4)
    (full,), (quarter,) = ([o for o in found if o.kind == "attention"] for found in (whole, part))
    assert 4 * quarter.flops == full.flops
    assert quarter.input_elements == full.input_elements - 48 * 128


def test_experts_read_only_weights_of_those_that_got_tokens() -> None:
    experts = Experts(hidden_size=64, num_experts=4, top_k=2, width=48)
    up, down = (o for o in experts.expert_operators(tokens_per_expert=(5, 0, 3, 0)) if o.kind == "grouped_gemm")
    assert up.weight_elements + down.weight_elements == 2 * experts.expert_parameters
    assert (up.rows, up.batch, up.group_rows) == (8, 2, (5, 0, 3, 0))
    assert up.flops + down.flops == 8 * 2 * experts.expert_parameters


def test_experts_without_tokens_do_nothing() -> None:
    experts = Experts(hidden_size=64, num_experts=4, top_k=2, width=48)
    assert all(o.flops == o.weight_elements == 0 for o in experts.expert_operators(tokens_per_expert=(0, 0)))


def test_router_scores_are_fp32_and_each_rank_routes_its_own_tokens() -> None:
    experts = Experts(hidden_size=64, num_experts=8, top_k=2, width=48)
    router = next(o for o in experts.router_operators(tokens=64, tp=4) if o.name == "router")
    assert (router.rows, router.columns, router.precision) == (16, 8, "accumulator")


def test_active_flop_are_twice_the_active_weights() -> None:
    network = file_model("mixtral-8x7b")
    per_token = network.forward_flops(tokens=1, sequence=1, context=1)
    table = network.embedding_parameters_per_rank(1)
    assert per_token == pytest.approx(2 * (network.active_parameters - table), rel=1e-3)


def test_head_keeps_fp32_scores_in_training_only() -> None:
    network = model()
    assert sum(o.kept_accumulator_elements for o in network.head_operators(tokens=32, tp=2)) == 32 * 64
    assert all(o.name != "loss" for o in network.head_operators(tokens=32, training=False))


def test_hyper_connections_and_predictions_have_kernels() -> None:
    network = file_model("deepseek-v4-flash")
    weights, mixing = network.layers[0].hyper_operators(tokens=8)
    assert (weights.columns, weights.depth, mixing.kind) == (24, 4 * 4096, "elementwise")
    assert network.mtp is not None
    assert network.mtp.operators(tokens=8, hidden_size=4096)[-1].depth == 8192


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"vocab_size": True}, "vocab_size: .*True"),
        ({"hidden_size": 64.5}, "hidden_size"),
        ({"layers": [], "parts": {}}, "layers: "),
        ({"layers": "many"}, "write a list"),
        ({"layers": [{"repeat": 0, "mixer": "attention"}]}, "repeat is 0"),
        ({"layers": [{"repeat": 5000, "mixer": "attention"}]}, "repeat is 5000"),
        ({"layers": [{"mixer": "magic"}]}, "mixer 'magic' is not among parts"),
        ({"layers": [{"mixer": "attention"}]}, "parts.experts is used by no layer"),
        ({"layers": [FULL | {"cross_attention": ATTENTION}]}, "encoder_layers"),
        ({"layers": [FULL | {"mixer": {**ATTENTION, "hidden_size": 32}}]}, "used by no layer|hidden_size 32"),
        ({"parts": [1]}, "parts is list"),
        ({"colour": "red"}, "colour"),
        ({"learned_positions": float("nan")}, "learned_positions"),
        (parts(attention={"num_kv_heads": 3}), "num_kv_heads 3 does not divide num_heads 4"),
        (parts(experts={"top_k": 9}), "top_k 9 exceeds num_experts 8"),
        (parts(experts={"num_groups": 3}), "num_groups 3 does not divide"),
        (parts(experts={"num_groups": 8, "top_groups": 1}), "exceeds the 1 experts"),
        (parts(experts={"kind": "expert"}), "expert"),
    ],
)
def test_a_mapping_that_is_no_model_is_refused_in_one_line(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CatalogueError, match=words) as caught:
        model(**changes)
    assert "\n" not in str(caught.value)
    assert str(caught.value).startswith("model: ")


def test_a_layer_has_at_least_one_half() -> None:
    with pytest.raises(ValueError, match="neither mixer nor feed_forward"):
        Layer()


def test_what_a_file_says_of_its_origin_is_no_part_of_the_shape() -> None:
    assert model(about="x", sources={}, dimensions={"source": "x"}, published={}) == model()


def test_a_dense_feed_forward_reads_its_weights_once() -> None:
    dense = DenseFeedForward.model_validate({"hidden_size": 64, **DENSE})
    gemms = [o for o in dense.operators(tokens=10, tp=2) if o.kind == "gemm"]
    assert 2 * sum(o.weight_elements for o in gemms) == dense.parameters - 64
