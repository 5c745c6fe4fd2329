"""AIConfigurator and moeplan on the same measured rows: H200, Mixture-of-Experts models, time per output token.

    python -m pip install 'moeplan[silicon]' && python benchmarks/aiconfigurator.py

The rows are those of AIConfigurator's own wheel (`silicon_sample.csv`) that `tests/published` holds, whose layout and
concurrency were read from the rows' ids, as the columns are multiplied by EP where EP is more than 1. Both tools get
the same model, layout, lengths and requests in flight. AIConfigurator gets the number formats that Hopper has for a
model: blocks of FP8 with attention in 16 bits for DeepSeek and Qwen, and those of its checkpoint for GPT-OSS, experts
in 4 bits and the rest in 16 (its rows say NVFP4, which Hopper lacks); its database is the newest of the wheel for the
framework. Errors are shares of the measured time.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from moeplan.accuracy import assess
from moeplan.accuracy.records import published, read
from moeplan.accuracy.scores import kendall

MODELS = {
    "deepseek_v3": "deepseek-ai/DeepSeek-V3", "gpt_oss_120b": "openai/gpt-oss-120b",
    "qwen3_235b": "Qwen/Qwen3-235B-A22B-FP8",
}  # fmt: skip
_FORMATS = {"gpt_oss_120b": ("bfloat16", "w4a16_mxfp4")}
_BLOCKS = ("fp8_block", "fp8_block")
"""Of products by weights, and of experts."""


def theirs_ms(record: Mapping[str, Any]) -> float:
    """AIConfigurator's time per output token of an aggregated server, as one of its own sweep's points."""
    from aiconfigurator_core.sdk.backends.factory import get_backend
    from aiconfigurator_core.sdk.config import RuntimeConfig
    from aiconfigurator_core.sdk.config_builders import build_model_config
    from aiconfigurator_core.sdk.models import get_model
    from aiconfigurator_core.sdk.perf_database import get_database, get_latest_database_version

    asked, shape, notes = record["parallel"], record["shape"], str(record["parallel"].get("notes"))
    framework = re.match(r"(trtllm|sglang|vllm)", notes)
    assert framework is not None, notes
    products, experts = _FORMATS.get(record["model"]["key"], _BLOCKS)
    config = build_model_config(
        tp_size=asked["tp"], pp_size=1, attention_dp_size=asked["dp"], moe_tp_size=asked.get("etp") or 1,
        moe_ep_size=asked["ep"], gemm_quant_mode=products, moe_quant_mode=experts, kvcache_quant_mode="bfloat16",
        fmha_quant_mode="bfloat16",
    )  # fmt: skip
    version = get_latest_database_version("h200_sxm", framework[1])
    database = get_database("h200_sxm", framework[1], version)
    model = get_model(MODELS[record["model"]["key"]], config, framework[1])
    requests = max(1, round(shape["concurrency"] / asked["dp"]))
    runtime = RuntimeConfig(batch_size=requests, isl=shape["isl"], osl=shape["osl"])
    summary = get_backend(framework[1]).run_agg(model, database, runtime, ctx_tokens=shape["isl"])
    return float(summary.get_summary_df()["tpot"].iloc[0])


def main() -> None:
    """A line for each row, and both tools' errors."""
    ours = {row.id: row for row in assess(kinds=["serving_e2e"]).rows if row.quantity == "tpot_ms"}
    rows = []
    for record in read(published()):
        if record["id"] not in ours or not str(record["hardware"]["gpu"]).startswith("H200"):
            continue
        row = ours[record["id"]]
        try:
            their = theirs_ms(record)
        except Exception as error:
            print(f"{record['id']}: AIConfigurator has no answer: {type(error).__name__}: {error}")
            continue
        rows.append((row.measured, row.predicted, their))
        print(
            f"{record['id']:90} measured {row.measured:7.2f}  moeplan {row.predicted:7.2f}  AIConfigurator {their:7.2f}"
        )
    if not rows:
        print("no row has both answers")
        return
    measured_N, ours_N, theirs_N = np.array(rows).T
    for name, found_N in (("moeplan", ours_N), ("AIConfigurator", theirs_N)):
        error_N = np.abs(found_N / measured_N - 1)
        print(
            f"{name}: {len(rows)} rows, median error {100 * np.median(error_N):.1f} %, "
            f"90th percentile {100 * np.quantile(error_N, 0.9):.1f} %, Kendall tau {kendall(measured_N, found_N):.2f}"
        )


if __name__ == "__main__":
    main()
