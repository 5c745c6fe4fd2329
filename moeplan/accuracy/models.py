"""The model of a record as the mapping that a catalogue's model is: what the fields mean, and what they leave open."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from moeplan.errors import CatalogueError

Row = Mapping[str, Any]
_LATENT = re.compile(r"^MLA .*?(?:q_lora=(\w+) )?kv_lora=(\d+) qk_nope=(\d+) qk_rope=(\d+) v=(\d+)")
_HEADS = re.compile(r"^(MHA|GQA|MQA)\b")
_NEEDED = ("layers", "hidden", "heads", "vocab")


def model_of(model: Row, *, train_mtp: bool) -> dict[str, Any]:
    """The compact mapping of `domain/model.py`. Raises CatalogueError for what is missing or no transformer of ours.

    A block whose width is four times the hidden size has two matrices, any other three (GLU). Layers without experts
    come first, or every other one where experts are in half of all layers.
    """
    missing = [key for key in _NEEDED if not model.get(key)]
    if missing:
        raise CatalogueError(f"model.{missing[0]} is not recorded")
    mixers, parts = _mixers(model)
    blocks, more = _blocks(model)
    layers = [
        {"mixer": mixers[number % len(mixers)], "feed_forward": blocks[number]} for number in range(model["layers"])
    ]
    found = {"hidden_size": model["hidden"], "vocab_size": model["vocab"], "parts": parts | more, "layers": layers}
    if train_mtp and model.get("mtp_layers"):
        found["mtp"] = {"depth": model["mtp_layers"], "layers": [layers[-1]]}
    return found


def _mixers(model: Row) -> tuple[list[str], dict[str, Any]]:
    """The mixers of the first layers, which repeat, and what each is."""
    text, heads = str(model.get("attention") or "MHA"), model["heads"]
    if latent := _LATENT.match(text):
        q_rank, *rest = latent.groups()
        names = ("kv_lora_rank", "qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")
        sizes = dict(zip(names, map(int, rest), strict=True))
        rank = {} if q_rank in (None, "None", "none", "0") else {"q_lora_rank": int(q_rank)}
        return ["attention"], {"attention": {"kind": "latent_attention", "num_heads": heads, **rank, **sizes}}
    if not _HEADS.match(text):
        raise CatalogueError(f"model.attention: {text[:60]!r} is not expressed; MLA, MHA, GQA and MQA are")
    head_dim = model.get("head_dim") or model["hidden"] // heads
    whole = {"kind": "attention", "num_heads": heads, "num_kv_heads": model.get("kv_heads") or heads}
    whole |= {"head_dim": head_dim} | ({"sinks": True} if "sinks" in text else {})
    if window := re.search(r"alternating sliding-window\((\d+)\)/full", text):
        return ["near", "attention"], {"near": whole | {"window": int(window[1])}, "attention": whole}
    if chunk := re.search(r"(\d+) of (\d+) layers chunked\((\d+)\)", text):
        near, of, size = map(int, chunk.groups())
        order = ["near"] * near + ["attention"] * (of - near)
        return order, {"near": whole | {"chunk": size}, "attention": whole}
    return ["attention"], {"attention": whole}


def _blocks(model: Row) -> tuple[list[str], dict[str, Any]]:
    """The feed-forward block of each layer, and what each is."""
    layers, hidden = model["layers"], model["hidden"]
    with_experts = (layers if model.get("moe_layers") is None else model["moe_layers"]) if model.get("experts") else 0
    order = ["dense"] * (layers - with_experts) + ["experts"] * with_experts
    if 2 * with_experts == layers:
        order = ["dense", "experts"] * with_experts
    parts: dict[str, Any] = {}
    if "dense" in order:
        if not model.get("dense_ffn"):
            raise CatalogueError("model.dense_ffn is not recorded")
        parts["dense"] = {"kind": "dense", "width": model["dense_ffn"], "gated": _is_gated(model["dense_ffn"], hidden)}
    if "experts" in order:
        parts["experts"] = _experts(model)
    return order, parts


def _experts(model: Row) -> dict[str, Any]:
    for key in ("moe_ffn", "top_k"):
        if not model.get(key):
            raise CatalogueError(f"model.{key} is not recorded")
    gated = _is_gated(model["moe_ffn"], model["hidden"])
    found = {"kind": "experts", "num_experts": model["experts"], "top_k": model["top_k"]}
    found |= {"width": model["moe_ffn"], "gated": gated}
    if model.get("shared_experts"):
        found["shared"] = {"width": model.get("shared_ffn") or model["shared_experts"] * model["moe_ffn"]}
    return found


def _is_gated(width: int, hidden: int) -> bool:
    return width != 4 * hidden
