"""Records of serving: time per output token, or tokens a second, from one step of decoding and one of prefill.

Requests come and go all the time: each step of decoding serves all requests in flight, and meanwhile the prompts of
those that came in are filled, `osl` steps being one request's life. So a token takes

    decode step of all requests  +  requests of a data-parallel rank / osl  x  prefill of one prompt on every rank,

and with prompts filled elsewhere (disaggregated) the first part alone. The context of a request is on the mean its
prompt and half of its answer. What a record leaves open: without a batch, as many requests as memory holds, at most
1,024 on a GPU; dp 1.
Reference: Yu et al., "Orca" (OSDI 2022), for batching by iteration; Agrawal et al., "Sarathi-Serve" (OSDI 2024), for
prompts between the tokens of others.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from moeplan.accuracy.cases import Case, deduplicating, precision_of, scenario_of
from moeplan.domain.plan import Plan, Precision
from moeplan.domain.scenario import Scenario
from moeplan.errors import CatalogueError
from moeplan.partition.footprint import footprint
from moeplan.partition.legal import check_plan

Row = Mapping[str, Any]
_MOST_PER_GPU = 1024
"""Requests in flight on a GPU that a server is asked for at most, where nothing is said."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Served:
    """What a serving record was: the step of prefill, of decoding, or both, and how they make up the figure."""

    prefill: Case | None
    decode: Case | None
    requests_per_rank: float
    """In flight on a data-parallel rank."""
    output_tokens: float
    """Of one request."""
    shares_gpus: bool
    """Whether prompts are filled on the GPUs that decode."""
    guessed: tuple[str, ...]

    def values(self, prefill_s: float, decode_s: float) -> dict[str, float]:
        """The figures that a record may hold, by name, from the times of the two steps."""
        if self.decode is None:
            assert self.prefill is not None
            workload, gpus = self.prefill.scenario.workload, self.prefill.scenario.cluster.num_gpus
            return _throughput(workload.step_tokens / prefill_s / gpus, self.prefill)
        between_s = prefill_s * self.requests_per_rank / self.output_tokens if self.shares_gpus else 0.0
        token_s = decode_s + between_s
        scenario = self.decode.scenario
        rate = scenario.workload.global_batch / token_s / scenario.cluster.num_gpus
        return {"tpot_ms": 1e3 * token_s} | _throughput(rate, self.decode)


def _throughput(rate: float, case: Case) -> dict[str, float]:
    return {"tokens_per_s_per_gpu": rate, "tokens_per_s_per_node": rate * case.scenario.cluster.gpus_per_node}


def served_of(record: Row) -> Served:
    """The steps behind a serving record. Raises CatalogueError and PlanError for what is not expressed."""
    shape, guessed = record["shape"], list[str]()
    phase, prompt = shape.get("phase"), shape.get("isl")
    if not isinstance(prompt, int) or prompt < 1:
        raise CatalogueError(f"shape.isl: found {prompt!r}; give the tokens of a prompt")
    if phase not in ("prefill", "decode", "aggregated", "disaggregated"):
        raise CatalogueError(f"shape.phase: found {phase!r}; use prefill, decode, aggregated or disaggregated")
    if phase == "disaggregated":
        record = {**record, "hardware": record["hardware"] | {"count": _decoding_gpus(record)}}
    layout = _layout(record, guessed)
    if phase == "prefill":
        size = max(1, (shape.get("tokens_per_device") or prompt) // prompt)
        return Served(
            prefill=_case(record, "prefill", layout, requests=size, length=prompt), decode=None, requests_per_rank=size,
            output_tokens=1.0, shares_gpus=False, guessed=tuple(guessed),
        )  # fmt: skip
    answer = shape.get("osl") or 1
    context = prompt + answer // 2
    requests = _requests(record, layout, context, guessed)
    shares = phase == "aggregated"
    return Served(
        prefill=_case(record, "prefill", layout, requests=1, length=prompt) if shares else None,
        decode=_case(record, "decode", layout, requests=requests, length=context),
        requests_per_rank=requests, output_tokens=float(answer), shares_gpus=shares, guessed=tuple(guessed),
    )  # fmt: skip


def _decoding_gpus(record: Row) -> int:
    """GPUs of one worker that decodes: the record shows the layout of that one."""
    asked = record["parallel"]
    return int((asked.get("tp") or 1) * (asked.get("dp") or 1))


def _layout(record: Row, guessed: list[str]) -> dict[str, Any]:
    """Degrees of attention and of experts, which need not be the same GPUs' axes: tp x dp = ep x etp."""
    asked, count = record["parallel"], record["hardware"]["count"]
    tp, ep = asked.get("tp") or 1, asked.get("ep") or 1
    if count % tp:
        raise CatalogueError(f"parallel.tp: {tp} does not divide {count} GPUs")
    found = {"tp": tp, "dp": count // tp, "pp": 1}
    if asked.get("dp") not in (None, found["dp"]):
        raise CatalogueError(f"parallel: tp {tp} x dp {asked['dp']} is not {count} GPUs")
    if experts := record["model"].get("experts"):
        etp = asked.get("etp") or max(1, tp // ep)
        if asked.get("etp") is None and ep < count:
            guessed.append(f"etp {etp}")
        # Where widths are divided all ranks have all tokens, and nothing is gathered: bytes and products are those of
        # experts divided by number.
        found |= {"ep": ep * etp, "etp": 1} if experts % (ep * etp) == 0 else {"ep": ep, "etp": etp}
    return found


def _case(record: Row, phase: str, layout: Mapping[str, Any], *, requests: int, length: int) -> Case:
    """One step of `requests` on each data-parallel rank."""
    workload = {"phase": phase, "global_batch": requests * layout["dp"], "sequence": length}
    scenario = scenario_of(_held(record), workload)
    plan = _plan(record, scenario, layout, requests)
    check_plan(plan, scenario)
    return Case(
        scenario=scenario, plan=plan, overlaps_passes=bool(record["parallel"].get("overlap_moe_a2a")),
        reduces_alone=layout["tp"] > 1 and layout["dp"] == 1, routes_freely=True,
    )  # fmt: skip


def _held(record: Row) -> Row:
    """With redundant experts counted: as many as the next multiple of ep, the copies taking their share of tokens."""
    model, ep = record["model"], record["parallel"].get("ep") or 1
    experts = model.get("experts") or 0
    return {**record, "model": {**model, "experts": -(-experts // ep) * ep}} if experts % ep else record


def _plan(record: Row, scenario: Scenario, layout: Mapping[str, Any], requests: int) -> Plan:
    layers = len(scenario.model.all_layers)
    plan = Plan(
        **layout, stages=(layers,), zero_dense=0, zero_expert=0, micro_batch=requests, schedule="gpipe",
        precision=_precision(record, scenario),
    )  # fmt: skip
    return plan.model_copy(update={"all_to_all": deduplicating(plan, scenario, record["parallel"])})


def _precision(record: Row, scenario: Scenario) -> Precision:
    """Weights are kept as they are multiplied: nobody trains them. A GPU without 4-bit products does them in 8 bits."""
    asked = precision_of(record["parallel"])
    compute = asked.compute
    if compute == "fp4" and "fp4" not in scenario.cluster.gpu.peak_flops_per_s:
        compute = "fp8"
    return asked.model_copy(update={"compute": compute, "weights": compute})


def _requests(record: Row, layout: Mapping[str, Any], context: int, guessed: list[str]) -> int:
    """In flight on each data-parallel rank: the whole number that is stated, or as many as memory holds."""
    shape = record["shape"]
    stated = shape.get("batch_per_gpu")
    if stated is None and shape.get("concurrency"):
        stated = shape["concurrency"] / layout["dp"]
    if stated is not None:
        return max(1, round(float(stated)))
    most = _fitting(record, layout, context)
    guessed.append(f"{most} requests on each rank, as many as memory holds")
    return most


def _fitting(record: Row, layout: Mapping[str, Any], context: int) -> int:
    """The largest power of two of requests whose cache fits beside the weights."""
    found = 1
    while found < _MOST_PER_GPU:
        case = _case(record, "decode", layout, requests=2 * found, length=context)
        if any(stage.total > stage.usable for stage in footprint(case.plan, case.scenario)):
            break
        found *= 2
    return found
