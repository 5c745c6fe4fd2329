"""A Model from a Hugging Face `config.json`: file, its folder, or the mapping itself.

Families differ in how they name the same dimension, in which layers are routed, and in what stands around the experts;
the aliases are in `_hf_mixers` and `_hf_feed_forward`. A `model_type` that is not known is read by the aliases, and
each guess is a sentence in `assumptions`. Refused: a config without layers, hidden size, experts, top-k or expert
width, and mechanisms that no part of a Model stands for. Only the text part of a multimodal model is read.
Reference: transformers 5.23, `models/*/configuration_*.py` and the shapes that its modules take on the meta device.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moeplan.domain.model import Model, from_mapping
from moeplan.importers._hf_feed_forward import EXPERT_WIDTH, EXPERTS, TOP_K, dense, experts, has_experts, is_moe_list
from moeplan.importers._hf_mixers import attention, mixers, norm_of, state_space
from moeplan.importers._json import Fields, read_object

Part = dict[str, Any]

_TIED = {
    "gemma3", "gemma3_text", "gemma4", "gpt2", "switch_transformers", "nllb-moe", "granitemoe", "granitemoeshared",
    "granitemoehybrid", "lfm2_moe",
}  # fmt: skip
_KNOWN = _TIED | {
    "llama", "mistral", "qwen2", "qwen3", "qwen3_5", "qwen3_vl", "mixtral", "phimoe", "olmoe", "flex_olmo", "gpt_oss",
    "jamba",
    "minimax_m2", "llama4", "deepseek_v2", "deepseek_v3", "deepseek_v32", "deepseek_v4", "kimi_k2", "glm4_moe",
    "glm_moe_dsa",
    "dots1", "ernie4_5_moe", "qwen2_moe", "qwen3_moe", "qwen3_next", "qwen3_5_moe", "qwen3_vl_moe", "hunyuan_v1_moe",
    "dbrx",
    "longcat_flash", "nemotron_h", "mimo_v2_flash",
}  # fmt: skip
# mechanisms whose weights no part of a Model stands for
_REFUSED = {
    "jetmoe": "a mixture of attention heads",
    "minimax": "lightning attention",
    "minimax_text_01": "lightning attention",
    "kimi_linear": "Kimi delta attention with output latents",
    "nemotron-nas": "blocks chosen one by one",
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Imported:
    """What came out of a file, and what had to be assumed for it, in sentences."""

    model: Model
    assumptions: tuple[str, ...]


def read(source: str | Path | Mapping[str, Any]) -> Imported:
    """The model that a `config.json` describes. Raises CatalogueError with file, field, found, allowed and remedy."""
    if isinstance(source, Mapping):
        top = Fields(source, "config")
    else:
        path = Path(source)
        path = path / "config.json" if path.is_dir() else path
        top = Fields(read_object(path), str(path))
    text = top.section("text_config")
    fields = _one_number(text if text.mapping else top)
    family = _family(fields, top)
    builders = {"switch_transformers": _switch, "nllb-moe": _nllb, "nemotron_h": _nemotron, "longcat_flash": _longcat}
    mapping = builders.get(family, _decoder)(fields, family)
    mapping["tied_embeddings"] = _tied(fields, top, family)
    return Imported(model=from_mapping(mapping, fields.where), assumptions=tuple(top.assumptions))


def _one_number(fields: Fields) -> Fields:
    """HunYuan writes the same number once per layer; where all agree, it is that number."""
    names = ("moe_topk", "num_shared_expert", "moe_intermediate_size", "num_experts")
    equal: dict[str, int] = {}
    for name in names:
        if isinstance(fields.mapping.get(name), list):
            values = fields.items(name, int) or ()
            if len(set(values)) != 1:
                raise fields.refuse(
                    name, list(values), "one number, or equal ones per layer", "layers of different shape are not read"
                )
            equal[name] = values[0]
    return Fields({**fields.mapping, **equal}, fields.where, fields.assumptions)


def _family(fields: Fields, top: Fields) -> str:
    family = (fields.text("model_type") or top.text("model_type")).removesuffix("_text")
    family = {"kimi_k25": "kimi_k2", "mimo_v2": "mimo_v2_flash", "deepseek_ref": "deepseek_v4"}.get(family, family)
    if family in _REFUSED:
        remedy = f"it has {_REFUSED[family]}, which no part stands for"
        raise fields.refuse("model_type", family, "a family whose parts are known", remedy)
    if family not in _KNOWN:
        what = "read by aliases; biases, norms and gates that it does not name may be missing."
        fields.assume(f"model_type {family!r} is not one that was checked: {what}")
    for name in ("hidden_size_per_layer_input", "num_kv_shared_layers"):
        if found := fields.maybe(name):
            raise fields.refuse(name, found, "0", "embeddings per layer and caches shared by layers are not counted")
    return family


def _tied(fields: Fields, top: Fields, family: str) -> bool:
    for level in (fields, top):
        if level.name("tie_word_embeddings"):
            return level.flag("tie_word_embeddings")
    if family not in _KNOWN:
        fields.assume("tie_word_embeddings is not given: embedding and head are counted apart.")
    return family in _TIED


def _ends(fields: Fields, family: str) -> Part:
    """What is not in the layers."""
    ends: Part = {
        "hidden_size": fields.count("hidden_size", "d_model", "n_embd", most=2**20),
        "vocab_size": fields.count("vocab_size"),
        "norm": norm_of(family), "head_bias": fields.flag("lm_head_bias", "use_bias") and family in {"phimoe",
        "ernie4_5_moe"},
    }  # fmt: skip
    if fields.name("max_position_embeddings", "max_seq_len", "n_positions"):
        ends["max_position"] = fields.count("max_position_embeddings", "max_seq_len", "n_positions", most=2**40)
    if family == "gpt2":
        ends["learned_positions"] = fields.count("n_positions", "max_position_embeddings")
    return ends


def _decoder(fields: Fields, family: str) -> Part:
    """A decoder whose layers each have a mixer and a feed-forward block."""
    number = fields.count("num_hidden_layers", "n_layers", "n_layer", "num_layers", most=4096)
    ends, attention_parts = _ends(fields, family), mixers(_attention_fields(fields, family), family, number)
    feed_forwards = _feed_forwards(fields, family, number)
    streams = fields.count("hc_mult", default=0, least=0)
    pairs = zip(attention_parts, feed_forwards, strict=True)
    layers = [{"mixer": mixer, "feed_forward": block, "hyper_streams": streams} for mixer, block in pairs]
    names = ("num_nextn_predict_layers", "mtp_num_hidden_layers", "num_mtp_modules")
    if modules := fields.count(*names, default=0, least=0, most=64):
        ends["mtp"] = {"depth": modules, "layers": [layers[-1]]}
    return {**ends, "layers": layers}


def _attention_fields(fields: Fields, family: str) -> Fields:
    if family != "dbrx":
        return fields
    return Fields({**fields.mapping, **fields.section("attn_config").mapping}, fields.where, fields.assumptions)


def _feed_forwards(fields: Fields, family: str, number: int) -> list[Part]:
    if not has_experts(fields, family):
        _insist_on_dense(fields, family)
        shared = fields.maybe("shared_intermediate_size")
        return [
            {"kind": "dense", "width": shared} if family == "granitemoehybrid" and shared else dense(fields, family)
        ] * number
    routed, flags = experts(fields, family), is_moe_list(fields, family, number)
    hashed = fields.count("num_hash_layers", default=0, least=0) if family == "deepseek_v4" else 0
    plain = None if all(flags) else dense(fields, family)
    made = [{**routed, "routing": "hash"} if i < hashed else routed for i in range(number)]
    return [made[i] if flag else plain or {} for i, flag in enumerate(flags)]


def _insist_on_dense(fields: Fields, family: str) -> None:
    """A config with top-k or expert width but no number of experts has lost it; it is not dense."""
    if family not in {"gemma4", "granitemoehybrid", "jamba", "glm4_moe"} and fields.name(*EXPERT_WIDTH, *TOP_K):
        fields.count(*EXPERTS)


def _nemotron(fields: Fields, family: str) -> Part:
    """Nemotron-H: a layer is one block, M Mamba-2, * attention, E experts, - dense."""
    words = {"mamba": "M", "linear_attention": "M", "attention": "*", "full_attention": "*", "moe": "E", "mlp": "-"}
    pattern = fields.text("hybrid_override_pattern")
    listed = fields.items("layers_block_type", str) or fields.items("layer_types", str) or ()
    pattern = pattern or "".join(words.get(word, "?") for word in listed)
    if not pattern:
        raise fields.refuse("hybrid_override_pattern", None, "letters M, *, E and -, one per layer", "add it")
    number = fields.count("num_hidden_layers", default=len(pattern), most=4096)
    if len(pattern) != number:
        raise fields.refuse(
            "hybrid_override_pattern", pattern, f"{number} letters, one per layer", "correct it or the layers"
        )
    made = {letter: _block(fields, family, letter) for letter in set(pattern)}
    ends = _ends(fields, family)
    if depth := fields.count("num_nextn_predict_layers", default=0, least=0, most=64):
        inside = fields.text("mtp_hybrid_override_pattern", default="*E")
        ends["mtp"] = {"depth": depth, "layers": [_block(fields, family, letter) for letter in inside]}
    return {**ends, "layers": [made[letter] for letter in pattern]}


def _block(fields: Fields, family: str, letter: str) -> Part:
    makers = {"M": lambda: state_space(fields), "*": lambda: attention(fields, family)}
    if letter in makers:
        return {"mixer": makers[letter]()}
    if letter in "E-":
        return {"feed_forward": experts(fields, family) if letter == "E" else dense(fields, family)}
    raise fields.refuse("hybrid_override_pattern", letter, "M, *, E and -", "this block is not known")


def _longcat(fields: Fields, family: str) -> Part:
    """LongCat-Flash: a layer is two of ours, and its experts run beside the first one's dense block."""
    number = fields.count("num_layers", "num_hidden_layers", most=2048)
    mixer, plain = mixers(fields, family, 1)[0], dense(fields, family)
    routed = {**experts(fields, family), "dense_branch": {"width": plain["width"]}}
    pair = [{"mixer": mixer, "feed_forward": routed}, {"mixer": mixer, "feed_forward": plain}]
    return {**_ends(fields, family), "layers": [{"repeat": number, "layers": pair}]}


def _switch(fields: Fields, family: str) -> Part:
    """Switch Transformers: T5's encoder and decoder; the first layer of each holds the bias by distance."""
    ends = {"hidden_size": fields.count("d_model"), "vocab_size": fields.count("vocab_size")}
    encoder = fields.count("num_layers", most=2048)
    decoder = fields.count("num_decoder_layers", "num_layers", most=2048)
    gated = fields.text("feed_forward_proj", default="relu").startswith("gated")
    buckets = fields.count("relative_attention_num_buckets", default=32)
    plain: Part = {"kind": "dense", "width": fields.count("d_ff"), "gated": gated}
    routed = {**plain, "kind": "experts", "num_experts": fields.count("num_experts"), "top_k": 1}
    routed["router_bias"] = fields.flag("router_bias")

    def stack(layers: int, step: int, cross: bool) -> list[Part]:
        base = attention(fields, family) | {"causal": cross}
        flags = [i % step == 1 or step == 1 for i in range(layers)]
        found = [{"mixer": base, "feed_forward": routed if flag else plain} for flag in flags]
        found[0] = {**found[0], "mixer": {**base, "relative_buckets": buckets}}
        return [{**layer, "cross_attention": {**base, "cross": True}} for layer in found] if cross else found

    steps = [fields.count(f"{side}_sparse_step", default=1) for side in ("encoder", "decoder")]
    return {**ends, "encoder_layers": stack(encoder, steps[0], False), "layers": stack(decoder, steps[1], True)}


def _nllb(fields: Fields, family: str) -> Part:
    """NLLB-MoE: layer norms and biases everywhere, positions by sines, top-2 routing."""
    norm: Part = {"bias": True, "gated": False, "norm": "layer"}
    number, router_bias = fields.count("num_experts"), fields.flag("router_bias")

    def stack(side: str, cross: bool) -> list[Part]:
        width, step = fields.count(f"{side}_ffn_dim"), fields.count(f"{side}_sparse_step", default=4, least=0)
        heads = fields.count(f"{side}_attention_heads")
        base: Part = {
            "kind": "attention", "num_heads": heads, "num_kv_heads": heads,
            "head_dim": fields.count("d_model") // heads,
            "qkv_bias": True, "output_bias": True, "rotary": False, "causal": cross, "norm": "layer",
        }  # fmt: skip
        plain = {"kind": "dense", "width": width, **norm}
        routed = {
            "kind": "experts",
            "num_experts": number,
            "top_k": 2,
            "width": width,
            "router_bias": router_bias,
            **norm,
        }
        flags = [step > 0 and (i + 1) % step == 0 for i in range(fields.count(f"{side}_layers", most=2048))]
        found = [{"mixer": base, "feed_forward": routed if flag else plain} for flag in flags]
        return [{**layer, "cross_attention": {**base, "cross": True}} for layer in found] if cross else found

    return {**_ends(fields, family), "encoder_layers": stack("encoder", False), "layers": stack("decoder", True)}
