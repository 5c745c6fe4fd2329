"""What kernels of real GPUs took, as the few constants that `moeplan.cost.compute` needs of each.

    pip install '.[silicon]'
    python benchmarks/calibrate_silicon.py            # fits, residuals, and groups left out
    python benchmarks/calibrate_silicon.py --write    # the same, and the figures into cost_models/gpus

Reads the tables of the installed aiconfigurator-core (0.12.0), those of SGLang: their bf16 products end at 797 TFLOP/s
on an H200, as random operands do elsewhere (790), where vLLM's reach 940. Forward kernels alone are in the tables, so
the backward pass has figures of its own elsewhere. A fit has the least mean |log(predicted / measured)|, by coordinate
search from fixed starts over a fixed sample: the same bytes each time.
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

import numpy as np

from moeplan.catalogue import cluster_from
from moeplan.cost.compute import _OPERAND, _SOFTMAX, _TILES, QUERIES
from moeplan.cost.cost_model import ROUNDED, CostModel
from moeplan.domain.cluster import Gpu
from moeplan.domain.program import Kernel

VERSION = "aiconfigurator-core 0.12.0"
SAMPLE, SEED, SMALLEST, LARGE = 3000, 7, 1024, 2048
DTYPES = {"bfloat16": ("bf16", 2.0), "fp8_block": ("fp8", 1.0), "nvfp4": ("fp4", 0.5)}
ELEMENT = dict(DTYPES.values())
HEADS, TUNED = (64, 128, 256), ("flash_attention", "fa3", "trtllm_mha")
"""Sizes of heads, and kernels made for a generation; elsewhere SGLang falls back to one of Triton, 5 times slower."""


@dataclass(frozen=True)
class System:
    """One table's machine: its folder, the tables' release, the sheet its figures go to, a cluster that has the GPU."""

    folder: str
    release: str
    sheet: str
    cluster: str
    generation: str


SYSTEMS = (
    System("a100_sxm", "0.5.10", "a100-40gb-sxm", "hgx-a100", "ampere"),
    System("h100_sxm", "0.5.14", "h100-sxm", "hgx-h100-rail", "hopper"),
    System("h200_sxm", "0.5.14", "h200-sxm", "hgx-h200-rail", "hopper"),
    System("b200_sxm", "0.5.14", "b200", "hgx-b200-rail", "blackwell"),
    System("b300_sxm", "0.5.14", "b300", "hgx-b300-rail", "blackwell"),
    System("gb200", "0.5.14", "gb200", "nvl72-gb200", "blackwell"),
    System("gb300", "0.5.14", "gb300", "nvl72-gb300", "blackwell"),
)


# ---- tables


def table(system: System, family: str, name: str) -> dict[str, np.ndarray]:
    """The columns of a table. Raises SystemExit where the package is not installed."""
    import pyarrow.parquet as parquet

    spec = find_spec("aiconfigurator_core")
    if spec is None or spec.submodule_search_locations is None:
        raise SystemExit("aiconfigurator-core is not installed; pip install 'moeplan[silicon]'")
    root = Path(next(iter(spec.submodule_search_locations))) / "systems/data" / system.folder
    found = parquet.read_table(root / family / "sglang" / system.release / f"{name}.parquet")
    return {column: found[column].to_numpy(zero_copy_only=False) for column in found.column_names}


def sampled(columns: dict[str, np.ndarray], keep: np.ndarray) -> dict[str, np.ndarray]:
    """At most `SAMPLE` of the rows to keep, always the same."""
    rows = np.random.default_rng(SEED).permutation(np.flatnonzero(keep))[:SAMPLE]
    return {name: values[rows] for name, values in columns.items()}


def products(system: System) -> dict[str, np.ndarray]:
    """Dense products of all formats: rows m, columns n, depth k, seconds, bytes of an operand's element, format."""
    found = table(system, "gemm", "gemm_perf")
    parts = []
    for name, (dtype, size) in DTYPES.items():
        keep = (found["gemm_dtype"] == name) & (found["n"] >= SMALLEST) & (found["k"] >= SMALLEST)
        part = sampled(found, keep)
        shape = {axis: part[axis].astype(float) for axis in "mnk"}
        same = np.ones(len(part["m"]))
        parts.append(
            {**shape, "s": part["latency"] * 1e-3, "element": same * size, "dtype": np.array([dtype] * len(same))}
        )
    return {key: np.concatenate([part[key] for part in parts]) for key in parts[0]}


def attentions(system: System) -> dict[str, np.ndarray]:
    """Causal prefill in bf16 of 100 us and more, for below the tables hold several launches: sequences b of length l,
    heads h and kv, head d, seconds s.
    """
    found = table(system, "attention", "context_attention_perf")
    plain = (found["attn_dtype"] == "bfloat16") & (found["kv_cache_dtype"] == "bfloat16") & (found["isl"] >= 256)
    if "window_size" in found:
        plain &= found["window_size"] <= 0
    plain &= np.isin(found["head_dim"], HEADS) & np.isin(found["kernel_source"], TUNED)
    part = sampled(found, plain & (found["latency"] > 0.1))
    names = {"b": "batch_size", "l": "isl", "h": "num_heads", "kv": "num_key_value_heads", "d": "head_dim"}
    return {key: part[name].astype(float) for key, name in names.items()} | {"s": part["latency"] * 1e-3}


# ---- the cost model over arrays; `main` holds it against the one that plans


def product_s(rows: dict[str, np.ndarray], gpu: Gpu, p: dict[str, float]) -> np.ndarray:
    """As `cost_model.kernel_s` for a dense product."""
    m, n, k, element = (rows[key] for key in ("m", "n", "k", "element"))
    share = np.select(
        [rows["dtype"] == each for each in ELEMENT], [p.get(f"{each}_gemm_efficiency", 1.0) for each in ELEMENT]
    )
    peak = np.select(
        [rows["dtype"] == each for each in ELEMENT], [gpu.peak_flops_per_s.get(each, 1.0) for each in ELEMENT]
    )
    work = {tile: 1 + _OPERAND * (1 / tile[0] + 1 / tile[1]) for tile in _TILES}
    each = 2 * k * gpu.num_sms / (peak * share * work[_TILES[0]])
    best = np.full(len(m), np.inf)
    for (height, width), wasted in work.items():
        waves = np.ceil(np.ceil(m / height) * np.ceil(n / width) / gpu.num_sms)
        best = np.minimum(best, waves * (height * width * wasted * each + p["tile_start"]))
    memory = (element * k * (m + n) + 2 * m * n) / (gpu.memory_bandwidth_bytes_per_s * p["memory_efficiency"])
    return (
        p["kernel_start"]
        + np.where(element < 2, p.get("scaled_start", 0.0), 0.0)
        + (best**ROUNDED + memory**ROUNDED) ** (1 / ROUNDED)
    )


def attention_s(
    rows: dict[str, np.ndarray], gpu: Gpu, p: dict[str, float], memory_efficiency: float, start: float
) -> np.ndarray:
    """As `cost_model.kernel_s` for causal attention."""
    b, length, h, kv, d = (rows[key] for key in ("b", "l", "h", "kv", "d"))
    flops = 4 * b * h * d * length * (length + 1) / 2
    reachable = gpu.peak_flops_per_s["bf16"] * p["attention_efficiency"]
    softmax = np.maximum(1, _SOFTMAX / d)
    busy = flops / reachable * softmax + b * length * h / QUERIES * p["attention_block"] / gpu.num_sms
    moved = 2 * b * length * d * (2 * h + 2 * kv) / (gpu.memory_bandwidth_bytes_per_s * memory_efficiency)
    return start + (busy**ROUNDED + moved**ROUNDED) ** (1 / ROUNDED)


# ---- fits


def fit(predict, measured_s: np.ndarray, start: dict[str, tuple[float, float, float]]) -> dict[str, float]:
    """Constants of least mean |log ratio|; `start` has for each its first value and its least and greatest."""
    p = {name: first for name, (first, _, _) in start.items()}
    best, step = np.mean(np.abs(np.log(predict(p) / measured_s))), 0.3
    for _ in range(40):
        for name, (_, least, most) in start.items():
            for factor in (1 + step, 1 / (1 + step)):
                tried = p | {name: min(most, max(least, p[name] * factor))}
                value = np.mean(np.abs(np.log(predict(tried) / measured_s)))
                if value < best:
                    best, p = value, tried
        step *= 0.85
    return p


def errors(predicted_s: np.ndarray, measured_s: np.ndarray) -> str:
    off = predicted_s / measured_s - 1
    worst, bias = np.quantile(abs(off), 0.9), np.median(off)
    return f"median {np.median(abs(off)):.3f}, 90th percentile {worst:.3f}, bias {bias:+.3f}, {len(off)} rows"


def at_large(rows: dict[str, np.ndarray], gpu: Gpu, p: dict[str, float]) -> dict[str, float]:
    """The same with the shares of the peaks that fit large products best, whose time training is made of."""
    for each in sorted(set(rows["dtype"].tolist())):
        part = chosen(rows, (rows["dtype"] == each) & (rows["m"] >= LARGE))
        tried = [p | {f"{each}_gemm_efficiency": share} for share in np.arange(0.2, 1.0, 0.004)]
        off = [np.mean(np.abs(np.log(product_s(part, gpu, q) / part["s"]))) for q in tried]
        p = tried[int(np.argmin(off))]
    return p


def product_start(rows: dict[str, np.ndarray]) -> dict[str, tuple[float, float, float]]:
    formats = sorted(set(rows["dtype"].tolist()))
    return (
        {f"{each}_gemm_efficiency": (0.7, 0.2, 1.0) for each in formats}
        | {
            "memory_efficiency": (0.8, 0.4, 1.0),
            "kernel_start": (3e-6, 5e-7, 2e-5),
            "tile_start": (3e-7, 1e-8, 1e-5),
        }
        | ({"scaled_start": (3e-6, 1e-7, 2e-5)} if len(formats) > 1 else {})
    )


def chosen(rows: dict[str, np.ndarray], keep: np.ndarray) -> dict[str, np.ndarray]:
    return {key: values[keep] for key, values in rows.items()}


def check(gpu: Gpu, p: dict[str, float], rows: dict[str, np.ndarray]) -> None:
    """The arrays say what the cost model says."""
    from dataclasses import replace

    made = replace(
        gpu,
        gemm_efficiency=p["bf16_gemm_efficiency"],
        fp8_gemm_efficiency=p.get("fp8_gemm_efficiency"),
        fp4_gemm_efficiency=p.get("fp4_gemm_efficiency"),
        memory_efficiency=p["memory_efficiency"],
        kernel_start_s=p["kernel_start"],
        scaled_start_s=p.get("scaled_start", 0.0),
        tile_start_s=p["tile_start"],
    )
    seconds = product_s(rows, gpu, p)
    for at in range(0, len(seconds), 97):
        m, n, k, element = (float(rows[key][at]) for key in ("m", "n", "k", "element"))
        kernel = Kernel(
            name="",
            kind="gemm",
            dtype=str(rows["dtype"][at]),
            flops=2 * m * n * k,
            rows=m,
            columns=n,
            depth=k,
            size_bytes=element * k * (m + n) + 2 * m * n,
        )
        assert np.isclose(CostModel(gpu=made).kernel_s(kernel), seconds[at]), kernel


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", action="store_true", help="put the figures into cost_models/gpus")
    parser.add_argument(
        "--families", action="store_true", help="also leave out families of shapes, which takes minutes"
    )
    asked = parser.parse_args()
    found: dict[str, dict[str, float]] = {}
    rows, flash, gpus = {}, {}, {}
    for system in SYSTEMS:
        name, gpus[system.folder] = system.folder, cluster_from(system.cluster).gpu
        gpu, rows[name], flash[name] = gpus[name], products(system), attentions(system)
        p = fit(lambda p, rows=rows[name], gpu=gpu: product_s(rows, gpu, p), rows[name]["s"], product_start(rows[name]))
        p = at_large(rows[name], gpu, p)
        check(gpu, p, rows[name])
        a = fit(
            lambda a, rows=flash[name], gpu=gpu, p=p: attention_s(
                rows, gpu, a, p["memory_efficiency"], p["kernel_start"]
            ),
            flash[name]["s"],
            {"attention_efficiency": (0.6, 0.2, 1.0), "attention_block": (4e-6, 1e-7, 2e-5)},
        )
        found[name] = p | a
        print(name, {key: float(f"{value:.4g}") for key, value in found[name].items()})
        for each in sorted(set(rows[name]["dtype"].tolist())):
            part = chosen(rows[name], rows[name]["dtype"] == each)
            print(f"   {each} products: {errors(product_s(part, gpu, p), part['s'])}")
        said = attention_s(flash[name], gpu, a, p["memory_efficiency"], p["kernel_start"])
        print(f"   attention: {errors(said, flash[name]['s'])}")
        if asked.write:
            write(system, found[name], product_s(rows[name], gpu, p) / rows[name]["s"])
    print("one GPU left out, the mean of its generation (or of Hopper) for it:")
    for system in SYSTEMS:
        name, own = system.folder, system.generation
        others = [
            s.folder for s in SYSTEMS if s.folder != name and s.generation == (own if own != "ampere" else "hopper")
        ]
        mean = {key: float(np.exp(np.mean([np.log(found[o][key]) for o in others]))) for key in found[name]}
        print(f"   {name}: products {errors(product_s(rows[name], gpus[name], mean), rows[name]['s'])}")
        said = attention_s(flash[name], gpus[name], mean, mean["memory_efficiency"], mean["kernel_start"])
        print(f"      attention {errors(said, flash[name]['s'])}")
    if asked.families:
        families_left_out(rows, gpus)


def families_left_out(rows: dict[str, dict[str, np.ndarray]], gpus: dict[str, Gpu]) -> None:
    print("one family of shapes left out:")
    for name, system_rows in rows.items():
        for family, keep in families(system_rows).items():
            kept, out = chosen(system_rows, ~keep), chosen(system_rows, keep)
            p = fit(lambda p, rows=kept, gpu=gpus[name]: product_s(rows, gpu, p), kept["s"], product_start(kept))
            print(f"   {name}, {family}: {errors(product_s(out, gpus[name], p), out['s'])}")


def families(rows: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {
        "fewer than 256 rows": rows["m"] < 256,
        "4,096 rows or more": rows["m"] >= 4096,
        "8,192 deep or more": rows["k"] >= 8192,
    }


# ---- figures into sheets

_KEYS = {"bf16_gemm_efficiency": "gemm_efficiency"}


def write(system: System, p: dict[str, float], ratio: np.ndarray) -> None:
    """Each figure's line under `calibration` of the sheet, and the source that it names with the products' residual."""
    path = Path(__file__).parents[1] / "cost_models/gpus" / f"{system.sheet}.yaml"
    text, off = path.read_text(encoding="utf-8"), abs(ratio - 1)
    middle, worst = 100 * np.median(off), 100 * np.quantile(off, 0.9)
    cite = (
        f'  silicon: {{cite: "{VERSION}, systems/data/{system.folder}: gemm_perf and context_attention_perf of SGLang '
        f'{system.release}, fitted by benchmarks/calibrate_silicon.py", kind: measured, date: "2026", environment: '
        f'"one GPU, {len(off)} products with n and k of {SMALLEST} and more, off by {middle:.1f} % in the median and '
        f'{worst:.0f} % at the 90th percentile"}}\n'
    )
    text = re.sub(r"  silicon: .*\n", "", text).replace("sources:\n", "sources:\n" + cite, 1)
    text += "" if "calibration:\n" in text else "calibration:\n"
    for name, value in reversed(p.items()):
        key = _KEYS.get(name, name)
        shown = f"{100 * value:.1f} %" if name.endswith("efficiency") else f"{1e6 * value:.2f} us"
        line = f"  {key}: {{value: {shown}, source: silicon}}\n"
        text, count = re.subn(rf"  {key}: .*\n", line, text)
        text = text if count else text.replace("calibration:\n", "calibration:\n" + line, 1)
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
