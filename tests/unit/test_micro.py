"""Records of single kernels and exchanges: each predicted in its own unit, or refused with a reason."""

from typing import Any

import pytest

from moeplan.accuracy.libraries import library
from moeplan.accuracy.micro import predict
from moeplan.accuracy.prediction import Prediction, Refusal
from moeplan.accuracy.records import published, read
from moeplan.errors import CatalogueError

KINDS = ("microbench_gemm", "microbench_attn", "microbench_comm")
H100 = {"gpu": "H100 SXM 80GB", "count": 8, "gpus_per_node": 8}
DISPATCH = {"op": "moe_dispatch", "ep": 8, "tokens_per_rank": 4096, "hidden": 7168, "experts": 256, "top_k": 8}


def record(kind: str, shape: dict[str, Any], measured: dict[str, Any], **hardware: Any) -> dict[str, Any]:
    found = {"id": "mine", "kind": kind, "source": {}, "hardware": H100 | hardware, "shape": shape}
    return found | {"measured": measured}


def values(*given: Any, **hardware: Any) -> dict[str, float]:
    found = predict(record(*given, **hardware))
    assert isinstance(found, Prediction), found
    return dict(found.values)


def test_every_published_record_is_predicted_or_refused_and_most_are_near() -> None:
    records = [each for each in read(published()) if each["kind"] in KINDS]
    found = {each["id"]: (each, predict(each)) for each in records}
    refused = {name: said.reason for name, (_, said) in found.items() if isinstance(said, Refusal)}
    assert all("flashmla" in name and "best case" in reason for name, reason in refused.items())
    errors = sorted(
        abs(value / each["measured"][key] - 1)
        for each, said in found.values()
        if isinstance(said, Prediction) and each["scorable"]
        for key, value in said.values.items()
    )
    assert len(errors) > 250
    assert errors[len(errors) // 2] < 0.1
    assert errors[9 * len(errors) // 10] < 0.3


def test_twice_the_tokens_take_almost_twice_as_long() -> None:
    times = [
        values("microbench_comm", DISPATCH | {"tokens_per_rank": tokens}, {"latency_us": 1.0})["latency_us"]
        for tokens in (4096, 8192)
    ]
    assert 1.8 * times[0] < times[1] < 2 * times[0]


def test_more_sms_help_until_the_wires_are_full() -> None:
    shape = {"op": "moe_dispatch", "backend": "deepep"} | DISPATCH
    times = [values("microbench_comm", shape | {"sms": n}, {"latency_us": 1.0})["latency_us"] for n in (4, 8, 64, 128)]
    assert times[0] == pytest.approx(2 * times[1], rel=0.05)
    assert times[2] == times[3] < times[1]


def test_one_copy_for_each_node_takes_less_than_one_for_each_expert() -> None:
    far = {"count": 32}
    each = values("microbench_comm", DISPATCH | {"ep": 32, "backend": "nccl-alltoall"}, {"latency_us": 1.0}, **far)
    once = values("microbench_comm", DISPATCH | {"ep": 32, "backend": "hybridep"}, {"latency_us": 1.0}, **far)
    assert 1.5 * once["latency_us"] < each["latency_us"] < 4 * once["latency_us"]


def test_a_rate_is_the_payload_over_the_time() -> None:
    shape = DISPATCH | {"backend": "hybridep"}
    both = values("microbench_comm", shape, {"latency_us": 1.0, "kernel_dispatch_bf16_gbps": 1.0})
    received = 4096 * 7168 * 2 * 8 * (1 - 0.3365)  # 1 - C(224, 8) / C(256, 8) of the tokens come to each of 8 ranks
    assert both["kernel_dispatch_bf16_gbps"] * both["latency_us"] * 1e3 == pytest.approx(received, rel=0.01)


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        (record("microbench_comm", DISPATCH, {"latency_us": 1.0}, gpu="Cerebras"), "unknown GPU"),
        (record("microbench_gemm", {"op": "gemm_fp8"}, {"tflops": 1.0}), "best case"),
        (record("microbench_attn", {"op": "decode-dense"}, {"tflops": 1.0}), "best case"),
    ],
)
def test_what_cannot_be_expressed_is_refused_with_a_reason(given: dict[str, Any], hint: str) -> None:
    found = predict(given)
    assert isinstance(found, Refusal)
    assert hint in found.reason


def test_an_unknown_library_is_refused_by_name() -> None:
    with pytest.raises(CatalogueError, match="hybridep"):
        library("hybrid")
