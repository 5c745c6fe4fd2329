"""A record made ready to be predicted under any constants, beside what it measured."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from typing import Any

from moeplan.accuracy import micro, phases
from moeplan.accuracy.cases import Case, training_case
from moeplan.accuracy.fits import Constants, Observation
from moeplan.accuracy.intervals import is_measured, tier_of
from moeplan.accuracy.overheads import overheads_of
from moeplan.accuracy.prediction import Prediction, Refusal, Tier
from moeplan.accuracy.records import Record, fault, published, read
from moeplan.accuracy.serving import Served, served_of
from moeplan.accuracy.steps import Step, believed_s, step_of
from moeplan.accuracy.tuned import tuned_case
from moeplan.errors import MoeplanError
from moeplan.partition.footprint import footprint, states

_FAR = 10.0
"""Times by which nothing that was really measured is off: what is, is in another unit."""
_MEMORY = {
    "weights-and-grads": ("weights", "gradients"), "optimizer": ("optimizer",),
    "activations": ("activations", "logits", "buffers"),
}  # fmt: skip


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Trained:
    """A training step, from which the fit learns."""

    observation: Observation

    def is_like(self, case: Case) -> bool:
        """Whether it tells of the GPU and the number format of a case."""
        mine = self.observation.case
        same_gpu = mine.scenario.cluster.gpu.name == case.scenario.cluster.gpu.name
        return same_gpu and mine.plan.precision.compute == case.plan.precision.compute


@dataclass(frozen=True, kw_only=True, slots=True, eq=False)
class Judged:
    """One record. `fixed` are the values of a kind that no constant changes."""

    record: Record
    group: tuple[str, ...]
    measured: Mapping[str, float]
    tags: Mapping[str, str]
    guessed: tuple[str, ...]
    fixed: Mapping[str, float]
    fixed_tier: Tier
    trained: Trained | None = None
    served: tuple[Served, Step | None, Step | None] | None = None

    @property
    def kind(self) -> str:
        """Of the record."""
        return str(self.record["kind"])

    def values(self, constants: Constants | None) -> dict[str, float]:
        """The measured quantities, predicted; None: by the constants that come with the package."""
        if self.trained is not None:
            seen = self.trained.observation
            return {"step_time_s": _seconds(seen.case, seen.step, constants)}
        if self.served is not None:
            served, filled, decoded = self.served
            times = [
                _seconds(case, step, constants) if case is not None and step is not None else 0.0
                for case, step in ((served.prefill, filled), (served.decode, decoded))
            ]
            return served.values(times[0], times[1])
        return dict(self.fixed)

    def tier(self, seen: Sequence[Trained] | None) -> Tier:
        """What the prediction rests on, if `seen` entered the fit; None: what did for the package's constants."""
        if self.trained is None:
            return self.fixed_tier
        case = self.trained.observation.case
        if seen is None:
            if _print_of(self.record) in _known_prints():
                return "measured"
            return tier_of(case.scenario, case.plan.precision.compute)
        if any(each.is_like(case) for each in seen):
            return "interpolated"
        return "extrapolated" if is_measured(case.scenario) else "assumed"


def _seconds(case: Case, step: Step, constants: Constants | None) -> float:
    if constants is None:
        return believed_s(step, case, overheads_of())
    gpu = constants.gpu(case.scenario.cluster.gpu)
    return believed_s(step, case, constants.overheads, gpu=gpu)


def judged_of(record: Record, *, group: tuple[str, ...]) -> Judged | Refusal:
    """The record ready to be predicted, or why it is not."""
    if (wrong := fault(record)) is not None:
        return Refusal(wrong)
    try:
        found = _READERS[record["kind"]](record, group)
    except MoeplanError as error:
        return Refusal(str(error).splitlines()[0])
    if isinstance(found, Refusal):
        return found
    return _checked(found)


def _checked(found: Judged) -> Judged | Refusal:
    """Refuses a value so far off that it is in another unit; phases of a profile are told apart by their ids."""
    values = found.values(None)
    if found.kind == "trace_phase":
        return found
    for name, measured in found.measured.items():
        if not 1 / _FAR < values[name] / measured < _FAR:
            unit = f"measured.{name}: found {measured:.4g}, where about {values[name]:.4g} is expected"
            return Refusal(f"{unit}; is it in another unit, such as tokens/s for a step's seconds?")
    return found


# ---- training and memory


def _training(record: Record, group: tuple[str, ...]) -> Judged | Refusal:
    case = tuned_case(record, lambda case: _seconds(case, _step(case), None))
    memory = float(states(case.plan, case.scenario).total_P.max())
    if memory > case.scenario.cluster.gpu.memory_bytes:
        has = case.scenario.cluster.gpu.memory_bytes
        taken = f"weights and optimizer alone take {memory / 1e9:.0f} GB of a GPU's {has / 1e9:.0f}"
        return Refusal(f"parallel: {taken}; it does not fit")
    step = _step(case)
    seconds, guessed = _measured_s(record, step), case.guessed
    if isinstance(seconds, Refusal):
        return seconds
    observation = Observation(group=group, case=case, step=step, measured_s=seconds, weight=record["weight"])
    tags = _tags(record) | {"tokens": str(step.num_tokens), "layout": case.plan.model_dump_json()}
    return Judged(
        record=record, group=group, measured={"step_time_s": seconds}, tags=tags, guessed=guessed, fixed={},
        fixed_tier="assumed", trained=Trained(observation=observation),
    )  # fmt: skip


@cache
def _cached(key: str) -> dict[str, Step]:
    return {}


def _step(case: Case) -> Step:
    """Rows of one configuration are simulated once."""
    flags = f"{case.fuses_attention} {case.divides_norms} {case.recomputed} {case.recomputes_products}"
    workload = case.scenario.workload.model_dump_json()
    kept = _cached(f"{case.scenario.name} {case.plan.model_dump_json()} {workload} {flags}")
    document = repr(case.scenario.document["model"]) + repr(case.scenario.document["cluster"])
    if document not in kept:
        kept[document] = step_of(case)
    return kept[document]


def _measured_s(record: Record, step: Step) -> float | Refusal:
    """Seconds of the step, from whatever was measured."""
    measured, hardware = record["measured"], record["hardware"]
    found = dict[str, float]()
    if measured.get("step_time_s"):
        found["step_time_s"] = float(measured["step_time_s"])
    if rate := measured.get("tokens_per_s_per_gpu"):
        found["tokens_per_s_per_gpu"] = step.num_tokens / rate / hardware["count"]
    if rate := measured.get("cluster_tokens_per_s"):
        found["cluster_tokens_per_s"] = step.num_tokens / rate
    tflops = measured.get("tflops_per_gpu") or record["derived"].get("tflops_per_gpu_from_mfu")
    if not tflops and measured.get("mfu_pct") and hardware.get("peak_bf16_tflops"):
        tflops = measured["mfu_pct"] / 100 * hardware["peak_bf16_tflops"]
    if tflops:
        found["tflops_per_gpu"] = step.model_flops / (tflops * 1e12 * step.num_gpus)
    if not found:
        return Refusal("measured: holds no step time, tokens a second or TFLOP/s; give one of them")
    first = next(iter(found))
    for name, seconds in found.items():
        if not 0.5 < seconds / found[first] < 2.0:
            return Refusal(
                f"measured: {first} means {found[first]:.4g} s and {name} {seconds:.4g} s; one is in another unit"
            )
    return found[first]


def _memory(record: Record, group: tuple[str, ...]) -> Judged | Refusal:
    """The pipeline rank whose states are largest; the record's id or its shape says which part was measured."""
    if not record["measured"].get("memory_gb"):
        return Refusal("measured.memory_gb: is missing; give it in GB")
    case = training_case(record)
    part = str(record["shape"].get("part") or record["id"])
    wanted = next((parts for name, parts in _MEMORY.items() if part.endswith(name)), ("total",))
    stages = footprint(case.plan, case.scenario)
    stage = stages[1] if len(stages) > 2 else stages[0]
    size = sum(getattr(stage, name) for name in wanted) / 1e9
    return Judged(
        record=record, group=group, measured={"memory_gb": float(record["measured"]["memory_gb"])}, tags=_tags(record),
        guessed=case.guessed, fixed={"memory_gb": size}, fixed_tier="extrapolated",
    )  # fmt: skip


# ---- serving, phases, single kernels


def _serving(record: Record, group: tuple[str, ...]) -> Judged | Refusal:
    served = served_of(record)
    case = served.decode or served.prefill
    assert case is not None
    steps = [None if each is None else _step(each) for each in (served.prefill, served.decode)]
    wanted = "tpot_ms" if record["measured"].get("tpot_ms") else "tokens_per_s_per_gpu"
    value = record["measured"].get(wanted)
    if value is None and (rate := record["measured"].get("tokens_per_s_per_node")):
        wanted, value = "tokens_per_s_per_node", rate
    if value is None:
        return Refusal(
            "measured: holds neither tpot_ms nor tokens a second; times to the first token are not predicted"
        )
    return Judged(
        record=record, group=group, measured={wanted: float(value)}, tags=_tags(record), guessed=served.guessed,
        fixed={}, fixed_tier="extrapolated" if is_measured(case.scenario) else "assumed",
        served=(served, steps[0], steps[1]),
    )  # fmt: skip


def _phase(record: Record, group: tuple[str, ...]) -> Judged | Refusal:
    values = phases.values_of(record)
    measured = {name: _mean(record["measured"][name]) for name in values if record["measured"].get(name) is not None}
    return Judged(
        record=record, group=group, measured=measured, tags=_tags(record), guessed=(), fixed=values,
        fixed_tier="extrapolated",
    )  # fmt: skip


def _mean(value: Any) -> float:
    return float(sum(value) / len(value)) if isinstance(value, list) else float(value)


def _micro(record: Record, group: tuple[str, ...]) -> Judged | Refusal:
    answer = micro.predict(record)
    if not isinstance(answer, Prediction):
        return answer
    measured = {
        name: _mean(record["measured"][name]) for name in answer.values if record["measured"].get(name) is not None
    }
    if not measured:
        return Refusal("measured: holds nothing that is predicted")
    return Judged(
        record=record, group=group, measured=measured, tags=_tags(record), guessed=answer.guessed,
        fixed=answer.values, fixed_tier=answer.tier,
    )  # fmt: skip


_READERS = {
    "training_e2e": _training, "memory": _memory, "serving_e2e": _serving, "trace_phase": _phase,
    "microbench_comm": _micro, "microbench_gemm": _micro, "microbench_attn": _micro,
}  # fmt: skip


def _tags(record: Record) -> dict[str, str]:
    model = record["model"]
    return {
        "source": str(record["source"].get("name")), "gpu": str(record["hardware"].get("gpu")),
        "model": str(model.get("name") or model.get("key") or "none"), "scale": str(record["hardware"].get("count")),
        "precision": str(record["parallel"].get("precision")),
    }  # fmt: skip


# ---- configurations that entered the shipped fit


def _print_of(record: Record) -> str:
    """What two records of one configuration have in common."""
    parallel = {key: value for key, value in record["parallel"].items() if key != "notes"}
    hardware = {key: record["hardware"].get(key) for key in ("gpu", "count")}
    return repr((sorted(record["model"].items(), key=str), sorted(hardware.items()), sorted(parallel.items(), key=str)))


@lru_cache(maxsize=1)
def _known_prints() -> frozenset[str]:
    chosen = (each for each in read(published()) if each["kind"] == "training_e2e" and each["scorable"])
    return frozenset(_print_of(each) for each in chosen if each["completeness"] == "A")
