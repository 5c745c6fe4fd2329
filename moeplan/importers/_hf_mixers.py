"""Token mixers of Hugging Face configs: which one a layer has, and its dimensions, as a Model reads them."""

from __future__ import annotations

from typing import Any

from moeplan.importers._json import Fields

Part = dict[str, Any]

# RMS norm of queries and keys: one scale for all heads, or one for the whole projection
_HEAD_NORM = {
    "qwen3", "qwen3_moe", "qwen3_next", "qwen3_5", "qwen3_5_moe", "qwen3_vl", "qwen3_vl_moe", "dots1", "lfm2_moe",
    "gemma3",
    "gemma3_text", "gemma4", "step3p7", "minimax_m3",
}  # fmt: skip
_FULL_NORM = {"olmoe", "flex_olmo", "minimax_m2"}
# families whose `attention_bias` is on the output too
_BIAS_EVERYWHERE = {
    "gpt_oss", "phimoe", "dots1", "granitemoe", "granitemoeshared", "granitemoehybrid", "llama", "llama4", "olmoe",
    "flex_olmo",
    "qwen3", "qwen3_moe", "qwen3_5", "qwen3_5_moe", "qwen3_next", "qwen3_vl", "qwen3_vl_moe", "hunyuan_v1_moe",
    "gemma3",
    "gemma3_text", "gemma4", "ernie4_5_moe", "gpt2", "nllb-moe",
}  # fmt: skip
_SLIDING = {"sliding_attention", "chunked_attention"}


def mixers(fields: Fields, family: str, layers: int) -> list[Part]:
    """The mixer of each layer."""
    if family == "deepseek_v4":
        return _compressed_layers(fields, layers)
    if fields.name("kv_lora_rank"):
        return [_latent(fields)] * layers
    made: dict[str, Part] = {}
    kinds = _layer_kinds(fields, family, layers)
    for kind in set(kinds):
        made[kind] = _mixer(fields, family, kind)
    return [made[kind] for kind in kinds]


def _layer_kinds(fields: Fields, family: str, layers: int) -> list[str]:
    """A word per layer, as transformers has them: full_attention, sliding_attention, linear_attention, mamba, ..."""
    if types := fields.items("layer_types", str, length=layers):
        return list(types)
    if pattern := fields.items("hybrid_layer_pattern", int, length=layers):
        return ["sliding_attention" if local else "full_attention" for local in pattern]
    if (full := fields.items("full_attn_idxs", int)) is not None:
        return ["full_attention" if i in full else "conv" for i in range(layers)]
    if family == "llama4":
        ropes = fields.items("no_rope_layers", int, length=layers) if fields.mapping.get("no_rope_layers") else None
        step = fields.count("no_rope_layer_interval", default=4)
        ropes = ropes or [int((i + 1) % step != 0) for i in range(layers)]
        return ["chunked_attention" if rope else "full_attention" for rope in ropes]
    if family == "jamba":
        period = fields.count("attn_layer_period", default=8)
        offset = fields.count("attn_layer_offset", default=4, least=0)
        return ["full_attention" if i % period == offset else "selective_scan" for i in range(layers)]
    if interval := fields.maybe("full_attention_interval"):
        return ["full_attention" if (i + 1) % interval == 0 else "linear_attention" for i in range(layers)]
    if interval := fields.maybe("sliding_window_pattern"):
        return ["full_attention" if (i + 1) % interval == 0 else "sliding_attention" for i in range(layers)]
    windowed = family in {"mistral", "mixtral", "phimoe"} or fields.flag("use_sliding_window")
    return ["sliding_attention" if windowed and fields.name("sliding_window") else "full_attention"] * layers


def _mixer(fields: Fields, family: str, kind: str) -> Part:
    if kind == "linear_attention" and fields.name("linear_num_value_heads"):
        return _delta(fields)
    if kind in {"mamba", "mamba2"} or (kind == "linear_attention" and fields.name("mamba_n_heads", "mamba_num_heads")):
        return state_space(fields)
    if kind == "selective_scan":
        return _selective(fields)
    if kind in {"conv", "short_conv"}:
        kernel, bias = fields.count("conv_L_cache", default=3), fields.flag("conv_bias")
        return {"kind": "short_convolution", "conv_kernel": kernel, "conv_bias": bias}
    if kind in _SLIDING | {"full_attention", "attention"}:
        return attention(fields, family, sliding=kind in _SLIDING)
    known = "full_attention, sliding_attention, linear_attention, mamba, conv"
    raise fields.refuse("layer_types", kind, known, "this mixer is not known")


def attention(fields: Fields, family: str, *, sliding: bool = False) -> Part:
    """Attention by heads, by the names that families give to windows, biases, norms and local layers' own heads."""
    if not sliding and family == "gemma4":
        fields = _global_layers(fields)
    hidden, own = fields.count("hidden_size", "d_model", "n_embd"), "swa" if sliding else "global"
    heads = fields.count(f"{own}_num_attention_heads", "num_attention_heads", "num_heads", "n_heads", "n_head")
    names = (f"{'swa_num' if sliding else 'num_global'}_key_value_heads", "num_key_value_heads", "kv_n_heads")
    kv_heads = fields.count(*names, "num_attention_groups", default=heads)
    if heads % kv_heads:
        allowed = f"a divisor of num_attention_heads {heads}"
        raise fields.refuse("num_key_value_heads", kv_heads, allowed, "correct one of them")
    if not fields.name("head_dim", "d_kv") and hidden % heads:
        allowed = f"a divisor of hidden_size {hidden}"
        raise fields.refuse("num_attention_heads", heads, allowed, "correct it, or add head_dim")
    dim = fields.count(f"{own}_head_dim", "head_dim", "d_kv", default=hidden // heads)
    part: Part = {"kind": "attention", "num_heads": heads, "num_kv_heads": kv_heads, "head_dim": dim}
    if value := fields.maybe(*(("swa_v_head_dim",) if sliding else ()), "v_head_dim"):
        part["v_head_dim"] = value
    return part | _window(fields, sliding) | _biases(fields, family) | _oddities(fields, family, sliding)


def _global_layers(fields: Fields) -> Fields:
    """Gemma 4 as transformers 5 writes it again: what global layers have of their own stands under a layer's index."""
    layers = fields.section("per_layer_config")
    own = layers.section(next(iter(layers.mapping), "")).mapping
    return Fields({**fields.mapping, **own}, fields.where, fields.assumptions)


def _window(fields: Fields, sliding: bool) -> Part:
    if not sliding:
        return {}
    if fields.name("attention_chunk_size") and not fields.name("sliding_window"):
        return {"chunk": fields.count("attention_chunk_size")}
    return {"window": fields.count("sliding_window", "sliding_window_size")}


def _biases(fields: Fields, family: str) -> Part:
    default = family in {"qwen2", "qwen2_moe", "gpt_oss", "gpt2", "phimoe"}
    qkv = fields.flag("attention_bias", "qkv_bias", "use_qkv_bias", "use_bias", default=default)
    everywhere = family in _BIAS_EVERYWHERE
    return {"qkv_bias": qkv, "output_bias": qkv and everywhere}


def _oddities(fields: Fields, family: str, sliding: bool) -> Part:
    part: Part = {"qk_norm": "head" if family in _HEAD_NORM else "full" if family in _FULL_NORM else "none"}
    if family in {"glm4_moe", "hunyuan_v1_moe"} and fields.flag("use_qk_norm", default=family != "glm4_moe"):
        part["qk_norm"] = "head"
    sink_name = "add_swa_attention_sink_bias" if sliding else "add_full_attention_sink_bias"
    sink = fields.flag(sink_name, default=sliding and family == "mimo_v2_flash")
    part["sinks"] = family == "gpt_oss" or sink
    if family in {"qwen3_next", "qwen3_5", "qwen3_5_moe"} and fields.flag("attn_output_gate", default=True):
        part["gate"] = "element"
    if family == "step3p7":
        part["gate"] = "head"
    if family == "gemma4":
        part["shared_key_value"] = fields.flag("attention_k_eq_v") and not sliding
    part["rotary"] = family not in {"gpt2", "switch_transformers", "nllb-moe", "jamba", "nemotron_h"}
    part["post_norm"] = family in {"gemma3", "gemma3_text", "gemma4"}
    part["norm"] = norm_of(family)
    return part


def norm_of(family: str) -> str:
    """The kind of norm that a family has; DBRX's layer norm has no shift, so it weighs as an RMS norm does."""
    return "layer" if family in {"phimoe", "gpt2", "nllb-moe"} else "rms"


def _latent(fields: Fields) -> Part:
    part: Part = {
        "kind": "latent_attention", "num_heads": fields.count("num_attention_heads"),
        "q_lora_rank": fields.maybe("q_lora_rank"),
        "kv_lora_rank": fields.count("kv_lora_rank"), "qk_nope_head_dim": fields.count("qk_nope_head_dim"),
        "qk_rope_head_dim": fields.count("qk_rope_head_dim"), "v_head_dim": fields.count("v_head_dim"),
        "output_bias": fields.flag("attention_bias"), "down_bias": fields.flag("attention_bias"),
    }  # fmt: skip
    if fields.name("index_topk", "index_n_heads"):
        part["indexer"] = {
            "num_heads": fields.count("index_n_heads"), "head_dim": fields.count("index_head_dim"),
            "top_k": fields.count("index_topk"),
        }  # fmt: skip
    return part


def state_space(fields: Fields) -> Part:
    """Mamba-2, by Nemotron's names or Granite's."""
    return {
        "kind": "state_space", "num_heads": fields.count("mamba_num_heads", "mamba_n_heads"),
        "head_dim": fields.count("mamba_head_dim", "mamba_d_head"), "state_size": fields.count("ssm_state_size",
        "mamba_d_state"),
        "num_groups": fields.count("n_groups", "mamba_n_groups", default=1),
        "conv_kernel": fields.count("conv_kernel", "mamba_d_conv", default=4),
        "chunk": fields.count("chunk_size", "mamba_chunk_size", default=256),
        "conv_bias": fields.flag("use_conv_bias", "mamba_conv_bias", default=True),
        "projection_bias": fields.flag("use_bias", "mamba_proj_bias"),
    }  # fmt: skip


def _selective(fields: Fields) -> Part:
    hidden = fields.count("hidden_size")
    rank = fields.mapping.get("mamba_dt_rank")
    return {
        "kind": "selective_scan", "inner_size": hidden * fields.count("mamba_expand", default=2),
        "state_size": fields.count("mamba_d_state", default=16),
        "step_rank": -(-hidden // 16) if rank == "auto" else fields.count("mamba_dt_rank", default=-(-hidden // 16)),
        "conv_kernel": fields.count("mamba_d_conv", default=4), "conv_bias": fields.flag("mamba_conv_bias",
        default=True),
        "projection_bias": fields.flag("mamba_proj_bias"),
    }  # fmt: skip


def _delta(fields: Fields) -> Part:
    return {
        "kind": "delta_net", "num_key_heads": fields.count("linear_num_key_heads"),
        "num_value_heads": fields.count("linear_num_value_heads"),
        "key_head_dim": fields.count("linear_key_head_dim"), "value_head_dim": fields.count("linear_value_head_dim"),
        "conv_kernel": fields.count("linear_conv_kernel_dim", default=4),
    }  # fmt: skip


_COMPRESSED = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}


def _compressed_layers(fields: Fields, layers: int) -> list[Part]:
    """DeepSeek-V4: a stride per layer (0, 4 or 128; its list has one more entry per MTP module) or a word per layer."""
    words = fields.items("layer_types", str, length=layers)
    listed = list(fields.items("compress_ratios", int) or ())
    ratios = [_COMPRESSED.get(word, -1) for word in words] if words else listed
    if len(ratios) not in {layers, layers + fields.count("num_nextn_predict_layers", default=0, least=0)}:
        allowed = f"{layers} entries, one per layer"
        raise fields.refuse("compress_ratios", ratios, allowed, "correct the list or the layers")
    made = {ratio: _compressed(fields, ratio) for ratio in set(ratios)}
    return [made[ratio] for ratio in ratios[:layers]]


def _compressed(fields: Fields, ratio: int) -> Part:
    if ratio not in (0, 4, 128):
        raise fields.refuse("compress_ratios", ratio, "0, 4 or 128", "this compression is not known")
    part: Part = {
        "kind": "compressed_attention", "num_heads": fields.count("num_attention_heads"),
        "head_dim": fields.count("head_dim"),
        "q_lora_rank": fields.count("q_lora_rank"), "output_groups": fields.count("o_groups"),
        "output_rank": fields.count("o_lora_rank"), "window": fields.count("sliding_window"),
    }  # fmt: skip
    if ratio:
        part["compression"] = {"stride": ratio, "overlap": ratio == 4}
    if ratio == 4:
        names = (("num_heads", "index_n_heads"), ("head_dim", "index_head_dim"), ("top_k", "index_topk"))
        part["compression"]["index"] = {ours: fields.count(theirs) for ours, theirs in names}
    return part
