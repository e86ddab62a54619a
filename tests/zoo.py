"""Tiny random models of every causal language model class that transformers can build from a configuration alone.

Sizes shrink by the names of a configuration's fields, with the equalities among them kept, and the number of layers
grows until every kind of layer of the full model is there. What that gets wrong stands in `ROWS`; `UNBUILDABLE` says
why a class can't be had.
"""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

FAMILIES = tuple(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
VOCABULARY = 128
_SIZES: dict[int, str] = {
    VOCABULARY: "vocab_size decoder_vocab_size vocab_size_per_layer_input unpadded_vocab_size",
    32: """hidden_size n_embd d_model emb_dim embedding_dim embedding_size lru_width input_embedding_size
        output_embedding_size word_embed_proj_dim attention_hidden_size moe_intermediate_size expert_ffn_hidden_size
        shared_expert_intermediate_size shared_experts_intermediate_size moe_shared_expert_intermediate_size""",
    64: """intermediate_size ffn_dim n_inner decoder_ffn_dim encoder_ffn_dim ffn_hidden_size feed_forward_size dff
        d_inner dim_ff shared_intermediate_size intermediate_size_mlp dense_intermediate_size mamba_d_ssm
        max_position_embeddings n_positions n_ctx max_seq_len context_length model_max_length""",
    2: """num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers num_encoder_layers
        num_decoder_layers num_blocks num_key_value_heads num_kv_heads swa_num_key_value_heads num_query_groups
        num_experts_per_tok moe_topk moe_k top_k_experts num_experts_per_token linear_num_key_heads index_n_heads""",
    4: """num_attention_heads n_head n_heads num_heads decoder_attention_heads encoder_attention_heads attention_heads
        num_encoder_attention_heads num_decoder_attention_heads swa_num_attention_heads qk_rope_head_dim
        qk_nope_head_dim n_routed_experts num_experts num_local_experts moe_num_experts linear_num_value_heads
        linear_num_heads mamba_dt_rank time_step_rank rotary_dim""",
    8: """head_dim v_head_dim swa_head_dim attention_head_size d_head dim_head kv_channels index_head_dim qk_head_dim
        linear_key_head_dim linear_value_head_dim linear_head_dim index_topk mamba_d_state state_size ssm_state_size
        mamba_n_heads mamba_num_heads mamba_d_head mamba_head_dim mamba_headdim mamba_chunk_size chunk_size
        sliding_window sliding_window_size attention_window_size local_attention window_size attention_chunk_size
        attention_head_dim adapter_rank""",
    16: "kv_lora_rank q_lora_rank o_lora_rank router_hidden_size",
    1: "n_group topk_group num_expert_group n_shared_experts first_k_dense_replace bos_token_id",
    0: "pad_token_id sep_token_id cls_token_id",
}  # fmt: skip
SMALL = {name: size for size, names in _SIZES.items() for name in names.split()} | {"eos_token_id": 2}
# Fields that are set where the configuration leaves them open, too.
_ALWAYS = ("head_dim", "num_key_value_heads", "n_routed_experts", "num_experts_per_tok", "n_group", "topk_group")
_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
_KINDS = ("layer_types", "layers_block_type", "block_types", "mlp_layer_types")

# Family -> fields that its configuration needs besides.
_DOTS = {"per_layer_config": {}, "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 8}
_INDEXER = {
    "indexer_n_heads": 2,
    "indexer_kv_heads": 1,
    "indexer_head_dim": 8,
    "indexer_budget": 8,
    "indexer_compress_ratio": 4,
}
ROWS: dict[str, dict[str, Any]] = {
    "bamba": {"attn_layer_indices": [1]},
    "blt": {"encoder_hash_byte_group_vocab": 64, "encoder_config": {"hidden_size_global": 32},
            "decoder_config": {"hidden_size_global": 32}},
    "cohere_compass_text": {"rope_parameters": {"full_attention": None, "sliding_attention": {
        "rope_type": "default", "rope_theta": 10000.0}}},
    "dbrx": {"attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 10000.0}, "ffn_config": {
        "ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2}},
    "dory": {"num_hidden_layers": 6, "n_input_layers": 2, "n_recurrent_layers": 2, "n_output_layers": 2},
    "dots1": {"n_shared_experts": 1, "n_routed_experts": 4, "num_experts_per_tok": 2},
    "dots3_note": {"text_config": _DOTS, "audio_config": {"adapter_input_size": 32, "adapter_output_size": 32},
                   "vision_config": {"per_layer_config": {}, "adapter_in_dim": 32, "adapter_out_dim": 32}},
    "dots3_note_text": _DOTS,
    "gemma3n_text": {"num_hidden_layers": 4, "num_kv_shared_layers": 2, "intermediate_size": 64,
                     "activation_sparsity_pattern": [0.5, 0.0, 0.5, 0.0], "hidden_size_per_layer_input": 8,
                     "laurel_rank": 8, "layer_types": ["sliding_attention", "full_attention"] * 2},
    "gpt_neo": {"num_layers": 2, "attention_types": [[["global", "local"], 1]]},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"]},
    "jamba": {"attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1},
    "lfm2_moe": {"layer_types": ["conv", "conv", "full_attention", "conv"], "num_hidden_layers": 4},
    "mamba2": {"num_heads": 8},
    "qwen4_exp": {"text_config": _INDEXER},
    "qwen4_exp_text": _INDEXER,
    "recurrent_gemma": {"num_hidden_layers": 3},
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "attn_layers": ["local", "lsh"],
                 "local_attn_chunk_length": 8, "lsh_attn_chunk_length": 8, "num_buckets": 4},
    "roc_bert": {"shape_vocab_size": 128, "pronunciation_vocab_size": 128, "shape_embed_dim": 16,
                 "pronunciation_embed_dim": 16},
    "rwkv": {"rescale_every": 0},  # else the forward pass changes weights, which is refused
    "xmod": {"default_language": "en_XX"},
    "zamba": {"num_hidden_layers": 5, "layers_block_type": ["linear_attention", "hybrid"] * 2 + ["linear_attention"],
              "attention_hidden_size": 64, "attention_head_dim": 16},
    "zamba2": {"num_hidden_layers": 5, "layers_block_type": ["linear_attention", "hybrid"] * 2 + ["linear_attention"],
               "attention_hidden_size": 64, "attention_head_dim": 16},
    "zaya": {"num_experts_per_tok": 1},
}  # fmt: skip
UNBUILDABLE: dict[str, str] = {
    "gemma3n": "its vision tower needs timm",
    "gemma4_assistant": "its default configuration is refused by its own validator",
    "gemma4_unified_assistant": "a draft head: it runs on another model's states, not on tokens",
    "musicgen": "the mapping's class takes the configuration of its decoder, which has no mapping",
    "musicgen_melody": "the mapping's class takes the configuration of its decoder, which has no mapping",
}


def tiny_config(family: str, least_depth: int = 2) -> Any:
    """A configuration of the family with every size small."""
    full, row = CONFIG_MAPPING[family](), ROWS.get(family, {})
    for depth in [each for each in (2, 3, 4, 6, 8) if each >= least_depth]:
        small = _shrunk(full, row, depth)
        if any(name in row for name in (*_DEPTHS, *_KINDS)) or _kinds(small) >= _kinds(full):
            return small
    raise AssertionError(f"{family} shows not every kind of its layers in 8 of them")


def _kinds(config: Any) -> set[str]:
    text = config.get_text_config(decoder=True)
    return {f"{name} {kind}" for name in _KINDS for kind in getattr(text, name, None) or ()}


def _shrunk(full: Any, row: dict[str, Any], depth: int) -> Any:
    names = vars(full)
    small = {
        name: value
        for name, value in SMALL.items()
        if name in names and (_is_size(names[name]) or (names[name] is None and name in _ALWAYS))
    }
    small |= {name: depth for name in _DEPTHS if name in small}
    heads = next((name for name in ("num_attention_heads", "n_head") if name in small), None)
    if heads and names.get("num_key_value_heads") in (names[heads], None) and "num_key_value_heads" in small:
        small["num_key_value_heads"] = small[heads]
    if "qk_rope_head_dim" in small and names.get("head_dim") == names["qk_rope_head_dim"]:
        small["head_dim"] = small["qk_rope_head_dim"]
    parts = {name for name in getattr(type(full), "sub_configs", {}) if getattr(full, name, None) is not None}
    small |= {name: _shrunk(getattr(full, name), row.get(name, {}), depth).to_diff_dict() for name in parts}
    return type(full)(**(small | {name: value for name, value in row.items() if name not in parts}))


def _is_size(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def tiny(family: str, seed: int = 0, least_depth: int = 2) -> Any:
    """A random fp32 model of the family in evaluation mode; weights are as large as a trained model's."""
    torch.manual_seed(seed)
    model: Any = transformers.AutoModelForCausalLM.from_config(tiny_config(family, least_depth)).float().eval()
    assert sum(parameter.numel() for parameter in model.parameters()) < 3e6, f"{family} is not tiny"
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, parameter.shape[-1] ** -0.5)
    return model


def token_batches() -> list[torch.Tensor]:
    """Random tokens, 16 x 24."""
    generator = torch.Generator().manual_seed(0)
    return list(torch.randint(3, VOCABULARY, (16, 24), generator=generator).split(4))


def matrices_in_layers(model: nn.Module) -> set[str]:
    """Matrices inside the elements of module lists, found without the library.

    Not of elements that are a single linear map: those are heads and projections, not layers.
    """
    names: dict[int, list[str]] = {}  # a parameter that layers share counts once, by its first path
    layers = {
        f"{path}.{index}": layer
        for path, module in model.named_modules()
        if isinstance(module, nn.ModuleList)
        for index, layer in enumerate(module)
        if list(layer.children())
    }
    for path, layer in layers.items():
        for inner, module in layer.named_modules():
            if isinstance(module, nn.Embedding) or (
                type(module).__name__.startswith("Conv") and hasattr(module, "stride")
            ):
                continue
            for name, parameter in module.named_parameters(recurse=False):
                full = ".".join(filter(None, (path, inner, "" if name == "weight" else name)))
                if parameter.ndim == 2 and min(parameter.shape) > 1:
                    names.setdefault(id(parameter), [full])
                elif parameter.ndim == 3 and min(parameter.shape) > 1:
                    names.setdefault(id(parameter), [f"{full}[{index}]" for index in range(len(parameter))])
    return {name for found in names.values() for name in found}


def stored(model: nn.Module, name: str) -> torch.Tensor:
    """A matrix by the name it has in a report."""
    path, _, index = name.partition("[")
    parameters = dict(model.named_parameters(remove_duplicate=False))
    parameter = parameters[f"{path}.weight"] if f"{path}.weight" in parameters else parameters[path]
    return parameter[int(index.rstrip("]"))] if index else parameter
