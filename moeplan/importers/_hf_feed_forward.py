"""Feed-forward blocks of Hugging Face configs: which layers have experts, and their dimensions."""

from __future__ import annotations

from typing import Any

from moeplan.importers._hf_mixers import norm_of
from moeplan.importers._json import Fields

Part = dict[str, Any]

EXPERTS = ("n_routed_experts", "num_experts", "num_local_experts", "moe_num_experts")
TOP_K = (
    "num_experts_per_tok",
    "moe_top_k",
    "moe_k",
    "moe_topk",
    "top_k_experts",
    "num_experts_per_token",
    "experts_per_token",
)
EXPERT_WIDTH = ("moe_intermediate_size", "expert_ffn_hidden_size", "expert_ffn_dim")
_SHARED_WIDTH = (
    "moe_shared_expert_intermediate_size",
    "shared_expert_intermediate_size",
    "shared_intermediate_size",
    "share_expert_dim",
)
_SHARED_NUMBER = ("n_shared_experts", "num_shared_experts", "moe_num_shared_experts", "num_shared_expert")
# families whose experts are as wide as `intermediate_size` says
_PLAIN_WIDTH = {
    "mixtral", "phimoe", "olmoe", "flex_olmo", "granitemoe", "granitemoeshared", "granitemoehybrid", "gpt_oss", "jamba",
    "minimax_m2", "llama4",
}  # fmt: skip
_CORRECTED = {
    "deepseek_v3", "deepseek_v32", "deepseek_v4", "kimi_k2", "glm4_moe", "glm_moe_dsa", "dots1", "minimax_m2",
    "minimax_m3",
    "nemotron_h", "longcat_flash", "lfm2_moe", "ernie4_5_moe", "mimo_v2_flash", "step3p7",
}  # fmt: skip


def has_experts(fields: Fields, family: str) -> bool:
    """Whether the config names experts at all."""
    named = fields.name(*EXPERTS) or (family == "dbrx")
    if family == "gemma4":
        return fields.flag("enable_moe_block")
    if family in {"granitemoehybrid", "jamba"} and named:
        return fields.count(*EXPERTS, least=0) > (1 if family == "jamba" else 0)
    if family in {"glm4_moe"} and not named:
        return False
    return bool(named)


def is_moe_list(fields: Fields, family: str, layers: int) -> list[bool]:
    """Which layers are routed, by whichever of the nine ways a family has of saying so."""
    if types := fields.items("mlp_layer_types", str, length=layers):
        return [kind in {"sparse", "moe", "hash_moe"} for kind in types]
    if isinstance(fields.mapping.get("moe_layer_freq"), list):
        return [bool(flag) for flag in fields.items("moe_layer_freq", int, length=layers) or ()]
    if (listed := fields.items("moe_layers", int)) is not None:
        return [i in listed for i in range(layers)]
    if isinstance(text := fields.mapping.get("moe_layers_enum"), str):
        return [str(i) in text.replace(" ", "").split(",") for i in range(layers)]
    if step := fields.maybe("interleave_moe_layer_step"):
        return [(i + 1) % step == 0 for i in range(layers)]
    if period := fields.maybe("expert_layer_period"):
        offset = fields.count("expert_layer_offset", default=0, least=0)
        return [i % period == offset for i in range(layers)]
    if fields.name("moe_layer_start_index", "moe_layer_interval"):
        first, step = (
            fields.count("moe_layer_start_index", default=0, least=0),
            fields.count("moe_layer_interval", default=1),
        )
        last = _last(fields, layers)
        return [first <= i <= last and (i + 1) % step == 0 for i in range(layers)]
    if fields.name("decoder_sparse_step") or fields.name("mlp_only_layers"):
        step, dense = fields.count("decoder_sparse_step", default=1), fields.items("mlp_only_layers", int) or ()
        return [(i + 1) % step == 0 and i not in dense for i in range(layers)]
    first = fields.count("first_k_dense_replace", "num_dense_layers", default=0, least=0)
    freq = fields.count("moe_layer_freq", default=1)
    return [i >= first and i % freq == 0 for i in range(layers)]


def _last(fields: Fields, layers: int) -> int:
    end = fields.mapping.get("moe_layer_end_index")
    return layers - 1 if end in (None, -1) else fields.count("moe_layer_end_index", least=0)


def dense(fields: Fields, family: str) -> Part:
    """The dense block of a layer that is not routed."""
    hidden = fields.count("hidden_size", "d_model", "n_embd")
    names = ("intermediate_size_mlp",) if family == "llama4" else ("dense_intermediate_size",)
    default = 4 * hidden if family == "gpt2" else None
    width = fields.count(*names, "intermediate_size", "ffn_hidden_size", "d_ff", "n_inner", default=default)
    if family == "lfm2_moe" and fields.flag("block_auto_adjust_ff_dim"):
        raise fields.refuse("block_auto_adjust_ff_dim", True, "false", "give the adjusted intermediate_size")
    activation = fields.text("hidden_act", "mlp_hidden_act", "activation_function", default="silu")
    gated = family not in {"gpt2", "nemotron_h"} and activation != "relu2"
    bias = fields.flag("mlp_bias", "use_bias", default=family == "gpt2")
    return {
        "kind": "dense",
        "width": width,
        "gated": gated,
        "bias": bias,
        "norm": norm_of(family),
        "post_norm": _sandwich(family),
    }


def _sandwich(family: str) -> bool:
    return family in {"gemma3", "gemma3_text", "gemma4"}


def experts(fields: Fields, family: str) -> Part:
    """The routed block: experts, router, groups, and what stands beside them."""
    where = fields.section("ffn_config") if family == "dbrx" else fields
    number = where.count(*EXPERTS, most=2**16)
    top_k = where.count(*TOP_K, most=number + 2**12)
    width = _expert_width(where, family)
    part: Part = {"kind": "experts", "num_experts": number, "top_k": top_k, "width": width, "norm": norm_of(family)}
    part |= {"bias": family == "gpt_oss" or fields.flag("mlp_bias"), "router_bias": family == "gpt_oss"}
    part |= {"gated": family != "nemotron_h", "post_norm": _sandwich(family), "correction_bias": family in _CORRECTED}
    part |= {"router_scale": family == "gemma4", "expert_scale": family == "gemma4"}
    part |= _groups(fields, number) | _around(fields, family, width)
    if family == "longcat_flash":
        zero = fields.count("zero_expert_num", default=0, least=0)
        return part | {"zero_experts": zero, "router_bias": fields.flag("router_bias")}
    if top_k > number:
        name = where.name(*TOP_K) or "top_k"
        raise where.refuse(name, top_k, f"1 to {number}, the number of experts", "correct it")
    return part


def _expert_width(fields: Fields, family: str) -> int:
    if family in _PLAIN_WIDTH and not fields.name(*EXPERT_WIDTH):
        return fields.count("intermediate_size")
    if family == "dbrx":
        return fields.count("ffn_hidden_size")
    if family == "hunyuan_v1_moe" and not fields.name(*EXPERT_WIDTH):
        return fields.count("intermediate_size")
    return fields.count(*EXPERT_WIDTH)


def _groups(fields: Fields, number: int) -> Part:
    groups, top = fields.count("n_group", default=1), fields.count("topk_group", default=1)
    if fields.text("topk_method") == "greedy":
        return {}
    if number % groups:
        raise fields.refuse("n_group", groups, f"a divisor of the {number} experts", "correct one of them")
    if top > groups:
        raise fields.refuse("topk_group", top, f"1 to {groups}, the number of groups", "correct it")
    return {"num_groups": groups, "top_groups": top}


def _around(fields: Fields, family: str, width: int) -> Part:
    """Shared experts, a dense branch, a latent space."""
    part: Part = {}
    gated = family != "nemotron_h"
    if (shared := _shared_width(fields, family, width)) > 0:
        part["shared"] = {"width": shared, "gated": gated, "bias": fields.flag("use_bias", "mlp_bias")}
        part["shared"]["token_gate"] = family in {"qwen2_moe", "qwen3_next", "qwen3_5_moe"}
    if family == "gemma4":
        part["dense_branch"] = {"width": fields.count("intermediate_size"), "norms": 3}
    if latent := fields.maybe("moe_latent_size"):
        part |= {"latent_size": latent, "latent_bias": fields.flag("mlp_bias")}
    return part


def _shared_width(fields: Fields, family: str, width: int) -> int:
    if family == "llama4":
        return fields.count("intermediate_size")
    if family == "nemotron_h" and not fields.count("n_shared_experts", default=0, least=0):
        return 0
    if fields.name(*_SHARED_WIDTH):
        return fields.count(*_SHARED_WIDTH, least=0)
    return width * fields.count(*_SHARED_NUMBER, default=int(family == "hunyuan_v1_moe"), least=0)
